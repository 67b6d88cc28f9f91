"""YAML whose values remember where they were written, read with bounds on size, depth and aliases.

Invariant: `parse` returns a Value or raises Unreadable, whatever the text holds. It runs no code (standard tags
only), and no message repeats a value of the text, which may be a secret; only names of fields are repeated.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any

import yaml

# A field by the keys and list positions that lead to it.
FieldPath = tuple[Any, ...]
# Takes a field, what is wrong with it, and where.
Note = Callable[[FieldPath, str, str], None]

MAX_DEPTH = 32
# Counted with every alias written out, so that a few lines of aliases of aliases cannot fill the memory.
MAX_VALUES = 20_000
# vLLM and Ray take integers of 64 bits.
MAX_INTEGER = 2**63 - 1
# Longest name of the file repeated in a message, in characters.
MAX_WORD_CHARS = 60

_TOO_MUCH = f"more than {MAX_DEPTH} levels or {MAX_VALUES} values, with all aliases written out"


@dataclasses.dataclass
class Value:
    """A value of the file and where it was written. Mappings and lists have children by their keys."""

    where: str
    scalar: Any = None
    mapping: dict[Any, Value] | None = None
    items: list[Value] | None = None

    def plain(self) -> Any:
        if self.mapping is not None:
            return {key: child.plain() for key, child in self.mapping.items()}
        if self.items is not None:
            return [child.plain() for child in self.items]
        return self.scalar

    def child(self, key: str | int) -> Value | None:
        """The child of this key. Pydantic's locations know some keys as text only."""
        if self.mapping is not None:
            return next((value for name, value in self.mapping.items() if str(name) == str(key)), None)
        if self.items is not None and isinstance(key, int) and 0 <= key < len(self.items):
            return self.items[key]
        return None


class Unreadable(Exception):
    """What cannot be read on, with its place and field."""

    def __init__(self, where: str, text: str, field: FieldPath = ()) -> None:
        super().__init__(text)
        self.where, self.text, self.field = where, text, field


def dotted(field: FieldPath) -> str:
    return ".".join(word(key) for key in field)


def word(text: object) -> str:
    """A word of the file as it can be printed on one line."""
    shown = str(text)
    if not shown.isprintable() or not shown:
        shown = ascii(shown)
    return shown if len(shown) <= MAX_WORD_CHARS else shown[: MAX_WORD_CHARS - 1] + "…"


class _TooMuch(Exception):
    """Refused while reading, before it costs time and memory."""

    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


class _Loader(yaml.SafeLoader):
    """SafeLoader with bounds, and with floats as YAML 1.2 and people write them (`1e-5`)."""

    depth = 0
    count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.count += 1
        if self.depth > MAX_DEPTH or self.count > 2 * MAX_VALUES:
            raise _TooMuch(self.peek_event().start_mark.line)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(
    text: str,
    source: str,
    note: Note,
    *,
    base: FieldPath = (),
    has_lines: bool = True,
    text_fields: Collection[FieldPath] = (),
) -> Value:
    """The values of a YAML text, placed at the field `base`.

    What is wrong with one field only is handed to `note`, and reading goes on. `source` names the text in places,
    with line numbers where it `has_lines`. Children of `text_fields` ("*" is any key) are text as written: 0755
    stays 0755, yes stays yes.
    """
    place = _Place(source, has_lines)
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise Unreadable(place.at(line), "a control character, which YAML does not allow") from None
    try:
        node = loader.get_single_node()
        if node is None:
            return Value(source)
        return _Builder(loader, place, note, text_fields, base).value(node, base)
    except _TooMuch as error:
        raise Unreadable(place.at(error.line + 1), _TOO_MUCH, base) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = source if mark is None else place.at(mark.line + 1)
        raise Unreadable(where, f"is not YAML: {_without_words(error)}", base) from None
    except (ValueError, OverflowError):
        # An escape such as "\UFFFFFFFF", which is no character.
        raise Unreadable(source, "is not YAML: an escape sequence that is no character", base) from None
    finally:
        loader.dispose()


@dataclasses.dataclass(frozen=True)
class _Place:
    source: str
    has_lines: bool

    def at(self, line: int) -> str:
        return f"{self.source}:{line}" if self.has_lines else self.source


def _without_words(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's explanation without the words of the file that it quotes: they may be a secret's."""
    text = ", ".join(part for part in (error.context, error.problem) if part)
    if "undefined alias" in text:
        return "an alias (`*name`) without an anchor; put quotes around a value that begins with *"
    return re.sub(r"""'(?!<)[^']{3,}'|"[^"]{3,}\"""", "…", text)


def _allowed(value: object) -> bool:
    """No surrogates, which cannot be encoded, and no NUL, which no path or variable takes."""
    return not isinstance(value, str) or not re.search("[\0\ud800-\udfff]", value)


class _Builder:
    """Turns PyYAML's nodes into values, and notes duplicate keys and what has no meaning here."""

    def __init__(
        self, loader: _Loader, place: _Place, note: Note, text_fields: Collection[FieldPath], base: FieldPath
    ) -> None:
        self._loader = loader
        self._place = place
        self._note = note
        self._text_fields = text_fields
        self._base = base
        self._count = 0

    def value(self, node: yaml.Node, field: FieldPath) -> Value:
        where = self._place.at(node.start_mark.line + 1)
        self._count += 1
        # The depth is reached by an alias inside of its own anchor, the count by aliases of aliases.
        if self._count > MAX_VALUES or len(field) > MAX_DEPTH:
            raise Unreadable(where, _TOO_MUCH, self._base)
        if isinstance(node, yaml.MappingNode) and self._is(node, "map"):
            return Value(where, mapping=self._mapping(node, field))
        if isinstance(node, yaml.SequenceNode) and self._is(node, "seq"):
            items = [self.value(child, (*field, index)) for index, child in enumerate(node.value)]
            return Value(where, items=items)
        return Value(where, scalar=self._scalar(node, field, where))

    def _mapping(self, node: yaml.MappingNode, field: FieldPath) -> dict[Any, Value]:
        found: dict[Any, Value] = {}
        lines: dict[Any, int] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            where = self._place.at(line)
            if not isinstance(key_node, yaml.ScalarNode):
                self._note(field, "a key must be a plain word", where)
                continue
            if self._is(key_node, "merge"):
                self._note(field, "merging with `<<` is not supported; write the fields out", where)
                continue
            # A name is what was written, also where YAML 1.1 reads a value: `on`, `NO`, `1.5`. Token ids are numbers.
            key = self._scalar(key_node, field, where) if self._is(key_node, "int") else key_node.value
            if not _allowed(key):
                self._note(field, "a name with a character that is not allowed in text", where)
                continue
            if key in found:
                self._note((*field, key), f"is given twice, first on line {lines[key]}; remove one of them", where)
                continue
            value = self.value(child, (*field, key))
            # A field's place is its key's, also where the value stands on a later line or at an anchor.
            value.where = where
            found[key], lines[key] = value, line
        return found

    def _scalar(self, node: yaml.Node, field: FieldPath, where: str) -> Any:
        if not isinstance(node, yaml.ScalarNode) or not self._is(
            node, "null", "bool", "int", "float", "str", "timestamp", "value"
        ):
            self._note(field, "has a tag (`!…`), which is not supported; put quotes around text", where)
            return None
        # Dates have no meaning in a configuration; 2026-01-02 is a name or a tag of someone's.
        as_text = self._is(node, "timestamp", "value") or (self._is_text_field(field) and not self._is(node, "null"))
        try:
            value = node.value if as_text else self._loader.construct_object(node)
        except (ValueError, LookupError, OverflowError, yaml.YAMLError):
            self._note(field, f"is no {node.tag.rpartition(':')[2]} that can be read", where)
            return None
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            self._note(field, "is too large a number", where)
            return None
        if not _allowed(value):
            self._note(field, "holds a character that is not allowed in text", where)
            return None
        return value

    def _is_text_field(self, field: FieldPath) -> bool:
        return any(
            len(field) == len(pattern) + 1
            and all(want in ("*", key) for want, key in zip(pattern, field, strict=False))
            for pattern in self._text_fields
        )

    @staticmethod
    def _is(node: yaml.Node, *names: str) -> bool:
        return node.tag in {f"tag:yaml.org,2002:{name}" for name in names}
