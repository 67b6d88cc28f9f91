"""What Python's JSON reader takes and others do not: NaN and infinity, halves of surrogate pairs, endless nesting.

Python reads all of them from a client's body. The writer that hands them on refuses them, and so do the other
readers of what is kept; so they are looked for where they come in.

Invariant: a value without a problem can be written as JSON in UTF-8 and read by every reader. Looking never raises,
whatever the JSON reader made, and every place that is named is itself text that can be sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

# Deeper than any schema or conversation of people; far from where writers run out of stack.
MAX_DEPTH = 128
# Of a name or a place that a message repeats.
MAX_SHOWN = 200

Kind = Literal["text", "number", "depth"]
_Place = tuple[Any, Any] | None
"""(place of the container, name or index in it); None: the whole value."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that not every reader takes."""

    kind: Kind
    where: str
    """Such as `messages.0.content`; empty: the whole value."""
    what: str

    def __str__(self) -> str:
        return f"{self.where or 'the body'}: {self.what}"


def problems(value: Any) -> Iterator[Problem]:
    """All problems of a value that was read from JSON, in no particular order."""
    left: list[tuple[_Place, int, Any]] = [(None, 0, value)]
    while left:
        place, depth, value = left.pop()
        if isinstance(value, str):
            if not is_unicode(value):
                yield Problem("text", _path(place), "has half a surrogate pair, which is no Unicode text")
        elif isinstance(value, float):
            if not math.isfinite(value):
                yield Problem("number", _path(place), f"is {value}, which is no number of JSON")
        elif isinstance(value, dict | list):
            if depth == MAX_DEPTH:
                yield Problem("depth", _path(place), f"is nested more than {MAX_DEPTH} levels deep")
                continue
            for part, inner in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(part, str) and not is_unicode(part):
                    shown = ascii(part)[:MAX_SHOWN]
                    yield Problem("text", _path(place), f"the name {shown} has half a surrogate pair")
                else:
                    left.append(((place, part), depth + 1, inner))


def is_unicode(text: str) -> bool:
    """Whether text can be sent and stored: it has no half of a surrogate pair."""
    # Python knows of each text whether it is ASCII; the rest is looked at.
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_unicode(text: str) -> str:
    """Text that can be sent and stored, with `?` for each half of a surrogate pair, as the record has it."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _path(place: _Place) -> str:
    parts: list[str] = []
    while place is not None:
        place, part = place
        parts.append(str(part))
    return ".".join(reversed(parts))[:MAX_SHOWN]
