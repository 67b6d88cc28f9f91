"""Reads the cluster's YAML file. Every mistake in it is reported at once, each with file, line, field and a hint.

Invariant: `load_config` returns a checked ClusterConfig or raises ConfigError, whatever the file holds, and no
message repeats the value of an environment variable or a header. Only standard tags are read, so a file runs no
code.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cluster.config import ClusterConfig, FieldProblems
from cluster.engine_args import check_engine_arguments, known_engine_arguments
from cluster.yaml_places import FieldPath, Unreadable, Value, dotted, parse, word
from rollout.errors import ConfigError

# A configuration is a page or two; what is larger is another file given by mistake.
MAX_FILE_BYTES = 1024 * 1024

_OVERRIDE = "--set"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
# Where a number or a yes is text as it is written: 0755 stays 0755, yes stays yes.
_TEXT_FIELDS = (("engine", "env"), ("mcp_servers", "*", "env"), ("mcp_servers", "*", "headers"))


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, check_engine: bool = True
) -> ClusterConfig:
    """The configuration in a file, with overrides such as "engine.vllm.tensor_parallel_size=4" on top.

    Paths in it are relative to the file's directory. `check_engine` asks vLLM about its arguments, which imports
    vLLM and so takes seconds; without it only their names and values go unchecked.
    """
    file = Path(path)
    problems = _Problems(str(path))
    root = _read(file, problems)
    for text in overrides:
        _override(root, text, problems)
    data = root.plain()
    directory = Path(os.path.abspath(file)).parent
    for section, field, problem in _resolve_paths(data, directory):
        problems.add((*section, field), problem)
    for field_path, problem in _missing_variables(data):
        problems.add(field_path, problem)
    config: ClusterConfig | None = None
    try:
        # Strict, or `replicas: true` would be one replica.
        config = ClusterConfig.model_validate(data, strict=True)
    except ValidationError as error:
        _explain(error, root, problems, check_engine)
    if check_engine:
        _check_engine(data, problems)
    problems.raise_if_any(root)
    if config is None:
        raise ConfigError(f"{path}: cannot be used")
    return config


class _Problems:
    """What is wrong, gathered until it can be told all at once."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._found: list[tuple[FieldPath, str, str | None]] = []

    def add(self, field: FieldPath, text: str, where: str | None = None) -> None:
        """`where` is looked up by the field if it is not given."""
        self._found.append((field, text, where))

    def has(self, field: FieldPath) -> bool:
        return any(found == field for found, _, _ in self._found)

    def raise_if_any(self, root: Value) -> None:
        if not self._found:
            return
        by_place: dict[tuple[str, str], list[str]] = {}
        for field, text, where in self._found:
            texts = by_place.setdefault((where or self._where(root, field), dotted(field)), [])
            if text not in texts:
                texts.append(text)
        lines = [_line(where, field, "; ".join(texts)) for (where, field), texts in by_place.items()]
        raise ConfigError("\n".join(sorted(lines, key=_line_order)))

    def _where(self, root: Value, field: FieldPath) -> str:
        """Where the field was written, or else the innermost section around it."""
        value: Value | None = root
        where = root.where
        for key in field:
            value = value.child(key) if value is not None else None
            if value is None:
                break
            where = value.where
        return where


def _line(where: str, field: str, text: str) -> str:
    if where == _OVERRIDE and field:
        return f"{_OVERRIDE} {field}: {text}"
    return ": ".join(part for part in (where, field, text) if part)


def _line_order(line: str) -> tuple[int, str]:
    match = re.match(r"[^\n]*?:(\d+): ", line)
    return (int(match[1]) if match else 0, line)


def _read(file: Path, problems: _Problems) -> Value:
    """The file's values. Ends in ConfigError where there is no mapping to go on with."""
    try:
        if os.path.isdir(file):
            raise Unreadable("", "is a directory; give a YAML file")
        with file.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise Unreadable("", f"is larger than {MAX_FILE_BYTES // 1024} KiB; is it a configuration?")
        root = parse(raw.decode("utf-8-sig"), problems.file, problems.add, text_fields=_TEXT_FIELDS)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{problems.file}: is not UTF-8 text (byte {error.start})") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{problems.file}: cannot be read: {reason}") from None
    except Unreadable as bad:
        raise ConfigError(_line(bad.where or problems.file, dotted(bad.field), bad.text)) from None
    if root.mapping is None:
        raise ConfigError(f"{root.where}: must be a mapping with the section `model` at least")
    root.where = problems.file
    return root


def _override(root: Value, text: str, problems: _Problems) -> None:
    """Puts `section.field=value` into the tree, the value read as YAML."""
    name, equals, value_text = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        problems.add((), f"{word(name)}: must be section.field=value", _OVERRIDE)
        return
    try:
        value = parse(value_text, _OVERRIDE, problems.add, base=keys, has_lines=False, text_fields=_TEXT_FIELDS)
    except Unreadable as bad:
        problems.add(bad.field, bad.text, _OVERRIDE)
        return
    section = root
    for index, key in enumerate(keys[:-1]):
        if section.mapping is None:
            break
        section = section.mapping.setdefault(key, Value(_OVERRIDE, mapping={}))
        if section.mapping is None and section.items is None and section.scalar is None:
            # A section written with nothing in it.
            section.mapping = {}
        if section.mapping is None:
            problems.add(keys, f"{dotted(keys[: index + 1])} is a value and has no fields", _OVERRIDE)
    if section.mapping is not None:
        section.mapping[keys[-1]] = value


# Paths and variables


def _resolve_paths(data: dict[Any, Any], directory: Path) -> Iterator[tuple[FieldPath, str | int, str]]:
    """Makes the file's paths absolute in place; yields (section, field, problem) for those that lead nowhere."""
    model = data.get("model")
    if isinstance(model, dict) and isinstance(model.get("path"), str) and model["path"]:
        given = model["path"]
        place = _absolute(given, directory)
        # os.path, as pathlib raises for names that are too long.
        if given[0] in "./~" or os.path.exists(place):
            model["path"] = place
            if not os.path.isdir(place):
                yield ("model",), "path", f"{_long_word(place)} is not a directory"
            elif not os.path.isfile(os.path.join(place, "config.json")):
                yield ("model",), "path", f"{_long_word(place)} has no config.json, so it is no model directory"
        elif not _HUB_NAME.fullmatch(given):
            yield (
                ("model",),
                "path",
                f"is neither a directory ({_long_word(place)} does not exist) nor a hub name such as Qwen/Qwen3-0.6B",
            )
    paths = data.get("pythonpath")
    if isinstance(paths, list):
        for index, given in enumerate(paths):
            if isinstance(given, str):
                paths[index] = place = _absolute(given, directory)
                if not os.path.isdir(place):
                    yield ("pythonpath",), index, f"{_long_word(place)} is not a directory"
    servers = data.get("mcp_servers")
    for name, server in servers.items() if isinstance(servers, dict) else ():
        if isinstance(server, dict) and isinstance(server.get("cwd"), str):
            server["cwd"] = place = _absolute(server["cwd"], directory)
            if not os.path.isdir(place):
                yield ("mcp_servers", name), "cwd", f"{_long_word(place)} is not a directory"


def _absolute(given: str, directory: Path) -> str:
    return os.path.abspath(directory / os.path.expanduser(given))


def _long_word(path: str) -> str:
    """A path is shown whole: its end is what matters."""
    return path if path.isprintable() else ascii(path)


def _missing_variables(data: dict[Any, Any]) -> Iterator[tuple[FieldPath, str]]:
    """Variables that MCP servers' `${NAME}` need and this environment lacks. They are filled in on connecting."""
    servers = data.get("mcp_servers")
    for name, server in servers.items() if isinstance(servers, dict) else ():
        for field in ("env", "headers"):
            values = server.get(field) if isinstance(server, dict) else None
            for key, value in values.items() if isinstance(values, dict) else ():
                for variable in _VARIABLE.findall(value) if isinstance(value, str) else ():
                    if variable not in os.environ:
                        yield (
                            ("mcp_servers", name, field, key),
                            f"needs the environment variable {variable}, which is not set; export it first",
                        )


# Explaining


def _explain(error: ValidationError, root: Value, problems: _Problems, check_engine: bool) -> None:
    """Pydantic's errors in words about the file. Input values are left out: they may be secrets."""
    for found in error.errors(include_url=False, include_input=False):
        field = _known_part(root, found["loc"], missing=found["type"] == "missing")
        cause = found.get("ctx", {}).get("error")
        if isinstance(cause, FieldProblems):
            for path, text in cause.problems:
                problems.add((*field, *path), text)
        elif found["type"] == "extra_forbidden":
            problems.add(field, "is not a known field" + _hint(field, check_engine))
        elif found["type"] == "missing":
            problems.add(field, "is required")
        elif found["type"] == "default_factory_not_called":
            # Follows from another field's error.
            continue
        elif cause is not None:
            problems.add(field, str(cause))
        elif not problems.has(field):
            is_key = found["loc"][-1:] == ("[key]",)
            got = "" if is_key else _got(found["type"], _at_field(root, field))
            problems.add(field, ("its name " if is_key else "") + _plain_words(found["msg"]) + got)


def _known_part(root: Value, location: FieldPath, missing: bool) -> FieldPath:
    """Pydantic's location without what names no field, such as the branch of a union."""
    value: Value | None = root
    for index, key in enumerate(location):
        value = value.child(key) if value is not None else None
        if value is None:
            return location[: index + 1] if missing else location[:index]
    return location


def _at_field(root: Value, field: FieldPath) -> Value | None:
    value: Value | None = root
    for key in field:
        value = value.child(key) if value is not None else None
    return value


def _plain_words(message: str) -> str:
    for formal, plain in (
        ("Input should be a valid dictionary", "must be a mapping"),
        ("Input should be a valid integer", "must be a whole number"),
        ("Input should be a valid string", "must be text"),
        ("Input should be a valid number", "must be a number"),
        ("Input should be a valid boolean", "must be true or false"),
        ("Input should be a valid list", "must be a list"),
        ("Input should", "must"),
        ("String should", "must"),
        ("List should", "must"),
    ):
        if message.startswith(formal):
            # What follows names Python classes of ours.
            rest = "" if "dictionary" in formal else message[len(formal) :]
            return plain + rest
    return message


def _got(problem: str, value: Value | None) -> str:
    """What is there instead: its kind, or the value itself where that cannot be a secret."""
    if value is None:
        return ""
    if value.mapping is not None:
        return " (got a mapping)"
    if value.items is not None:
        return " (got a list)"
    if isinstance(value.scalar, str) and problem != "literal_error":
        return " (got text)" if problem.endswith("_type") else ""
    return f" (got {word(json.dumps(value.scalar))})"


def _hint(field: FieldPath, check_engine: bool) -> str:
    """The field that was meant: in this section, in another one, or among vLLM's arguments; or what there is."""
    *section, name = (str(key) for key in field)
    model = _model_at(section)
    if model is None:
        return ""
    paths = {other: f"{path}.{other}" for path, owner in _sections() for other in owner.model_fields}
    paths |= {own: own for own in model.model_fields}
    meant = name if name in paths else _closest(name, model.model_fields)
    engine_names: frozenset[str] = frozenset()
    if meant is None and check_engine:
        # Only now, as it imports vLLM.
        with contextlib.suppress(ConfigError):
            engine_names = known_engine_arguments()
        meant = name if name in engine_names else None
        paths = {own: f"engine.vllm.{own}" for own in engine_names} | paths
    meant = meant or _closest(name, paths)
    return f"; did you mean `{paths[meant]}`?" if meant else f"; known are {', '.join(model.model_fields)}"


def _closest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def _sections() -> list[tuple[str, type[BaseModel]]]:
    found = [(name, _model_in(info.annotation)) for name, info in ClusterConfig.model_fields.items()]
    # The fields of an MCP server stand below a name of the user's.
    return [(name, model) for name, model in found if model is not None and name != "mcp_servers"]


def _model_at(section: Sequence[str]) -> type[BaseModel] | None:
    """The model of a section by its path, or None where names are free."""
    model: type[BaseModel] = ClusterConfig
    keys = iter(section)
    for key in keys:
        info = model.model_fields.get(key)
        inner = _model_in(info.annotation) if info is not None else None
        if info is None or inner is None:
            return None
        model = inner
        if typing.get_origin(info.annotation) is dict:
            next(keys, None)
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    origin = typing.get_origin(annotation)
    if origin in (dict, typing.Union, types.UnionType):
        return next((model for part in typing.get_args(annotation) if (model := _model_in(part))), None)
    return None


# vLLM's arguments


def _check_engine(data: dict[Any, Any], problems: _Problems) -> None:
    engine = data.get("engine")
    arguments = engine.get("vllm") if isinstance(engine, dict) else None
    if not isinstance(arguments, dict) or not arguments:
        return
    try:
        found = check_engine_arguments(arguments)
    except ConfigError as error:
        problems.add(("engine", "vllm"), str(error))
        return
    for name, problem in found:
        field = ("engine", "vllm", name)
        if not problems.has(field):
            problems.add(field, problem)
