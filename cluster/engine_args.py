"""vLLM's own word on the arguments in `engine.vllm`: their names, types, choices and bounds.

Nothing about vLLM's arguments is written down here: names come from its dataclasses, types and choices from its
command-line parser, bounds from its config classes. Each argument is judged alone, so that each problem names its
field. What only the whole engine can tell (a model too large for a GPU) is left to the engine; no GPU is needed.

vLLM is imported on first use, because that takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import enum
import functools
import json
import logging
import os
import re
import types
import typing
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from rollout.errors import ConfigError

# Lists of choices longer than this are not printed whole.
_MAX_CHOICES = 12
# Values of these are never repeated in a message.
_SECRET = frozenset({"hf_token"})
# Longest value shown in a message, in characters.
_MAX_SHOWN_CHARS = 60
_KIND_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    set: "a list",
    tuple: "a list",
    dict: "a mapping",
}


def known_engine_arguments() -> frozenset[str]:
    """Names that `engine.vllm` takes: vLLM's engine arguments and those of its OpenAI front end."""
    return frozenset(_vllm().annotations)


def check_engine_arguments(kwargs: dict[str, Any]) -> list[tuple[str, str]]:
    """(argument, problem) for each one that vLLM would refuse; empty when all are well. None is skipped."""
    vllm = _vllm()
    problems = []
    with _quiet():
        for name, value in kwargs.items():
            if name not in vllm.annotations:
                problems.append((str(name), _unknown(vllm, str(name))))
            elif value is not None and (problem := _check(vllm, name, value)) is not None:
                problems.append((name, problem))
    return problems


@dataclasses.dataclass(frozen=True)
class _Vllm:
    """What is asked of vLLM, gathered once per process."""

    annotations: dict[str, Any]
    """Type of each argument, by its name."""
    parser: argparse.ArgumentParser
    actions: dict[str, argparse.Action]
    """How the command line reads each argument, by its name."""
    fields: dict[str, FieldInfo]
    """The argument's field in its config class, which knows its bounds."""


class _Refused(Exception):
    """The parser's error, in place of its exit from the process."""


@functools.cache
def _vllm() -> _Vllm:
    try:
        with _quiet():
            import vllm.config
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs
            from vllm.utils.argparse_utils import FlexibleArgumentParser

            class Parser(FlexibleArgumentParser):
                def error(self, message: str) -> NoReturn:
                    raise _Refused(message)

            parser = BaseFrontendArgs.add_cli_args(AsyncEngineArgs.add_cli_args(Parser(add_help=False)))
    except ImportError as error:
        raise ConfigError(
            f"cannot be checked, because vLLM cannot be imported ({error}); install "
            "rollout-cluster[cpu] or rollout-cluster[gpu], or load with check_engine=False"
        ) from error
    annotations = {
        field.name: field.type
        for owner in (BaseFrontendArgs, AsyncEngineArgs)
        for field in dataclasses.fields(owner)
        if not field.name.startswith("_")
    }
    fields: dict[str, FieldInfo] = {}
    for group in parser._action_groups:
        # vLLM titles each group with the config class that holds the group's arguments.
        owner = getattr(vllm.config, group.title or "", None)
        of_owner = getattr(owner, "__pydantic_fields__", {})
        # Other config classes have derived fields of the same names, without bounds.
        fields |= {act.dest: of_owner[act.dest] for act in group._group_actions if act.dest in of_owner}
    return _Vllm(annotations, parser, {action.dest: action for action in parser._actions}, fields)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without vLLM's log lines, which are about starting engines, and without the variables that it sets.

    A check must change nothing: what is started after it inherits the environment.
    """
    environment = dict(os.environ)
    with contextlib.suppress(ImportError):
        # vLLM sets the level of its logger as it is imported; only later can it be set here.
        import vllm.logger  # noqa: F401
    logger = logging.getLogger("vllm")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def _unknown(vllm: _Vllm, name: str) -> str:
    for action in vllm.actions.values():
        if f"-{name}" in action.option_strings:
            return f"is no argument of vLLM; did you mean `{action.dest}`?"
    close = difflib.get_close_matches(name.replace("-", "_"), vllm.annotations, n=1)
    return "is no argument of vLLM" + (f"; did you mean `{close[0]}`?" if close else "")


def _check(vllm: _Vllm, name: str, value: Any) -> str | None:
    """What is wrong with one argument, or None."""
    action = vllm.actions.get(name)
    if action is None:
        return None
    kinds = _kinds(vllm.annotations[name])
    expected = f"must be {_names(kinds)}"
    got = "" if name in _SECRET else f" (got {_shown(value)})"
    if isinstance(value, bool) or action.nargs == 0:
        # Flags have no value on the command line, and nothing else there is true or false.
        return None if isinstance(value, bool) and bool in kinds else expected + got
    several = action.nargs in ("+", "*")
    if several and not isinstance(value, list):
        return expected + got
    try:
        texts = [_text(item) for item in (value if several else [value])]
        parsed = [getattr(vllm.parser.parse_args([f"{action.option_strings[0]}={text}"]), name) for text in texts]
    except Exception as error:
        # Whatever the parser raises, vLLM's own command line would refuse the value too.
        return _refusal(action, kinds, value, error, got)
    if not several:
        return _kind_problem(value, parsed[0], kinds, expected + got) or _bound_problem(vllm, name, value)
    return None


def _kind_problem(value: Any, parsed: Any, kinds: set[type], expected: str) -> str | None:
    """What the command line forgives and a Python caller is not forgiven: there everything is text."""
    if isinstance(value, str) and not isinstance(parsed, str | enum.Enum):
        if parsed is None:
            return f"{expected}; for vLLM's default write null without quotes"
        if isinstance(parsed, int | float):
            return f"{expected}; write {parsed} without quotes"
        return expected
    if isinstance(value, list | dict) and isinstance(parsed, str):
        return expected
    choices = next((kind for kind in kinds if issubclass(kind, enum.Enum)), None)
    if choices is not None and isinstance(parsed, str) and not _is_member(choices, value):
        return _not_chosen([member.name for member in choices], value)
    if isinstance(value, int | float) and isinstance(parsed, str) and str in kinds and not kinds & {int, float}:
        return f"{expected}; put quotes around it"
    return None


def _is_member(choices: type[enum.Enum], value: Any) -> bool:
    names = {member.name.lower() for member in choices} | {"auto"}
    return str(value).lower() in names or value in [member.value for member in choices]


def _not_chosen(choices: list[str], value: Any) -> str:
    close = difflib.get_close_matches(str(value), choices, n=1)
    shown = ", ".join(choices[:_MAX_CHOICES]) + (", …" if len(choices) > _MAX_CHOICES else "")
    return f"must be one of {shown} (got {_shown(value)})" + (f"; did you mean `{close[0]}`?" if close else "")


def _bound_problem(vllm: _Vllm, name: str, value: Any) -> str | None:
    field = vllm.fields.get(name)
    if field is None or not field.metadata or not isinstance(value, int | float):
        return None
    try:
        bounded: Any = Annotated[(field.annotation, *field.metadata)]
        TypeAdapter(bounded).validate_python(value)
    except ValidationError as error:
        return error.errors()[0]["msg"].replace("Input should be", "must be", 1) + f" (got {_shown(value)})"
    return None


def _refusal(action: argparse.Action, kinds: set[type], value: Any, error: Exception, got: str) -> str:
    """The parser's refusal in words about the field, not about a command line."""
    if action.choices is not None:
        return _not_chosen([str(choice) for choice in action.choices if choice is not None], value)
    if not isinstance(error, _Refused):
        return f"is refused by vLLM ({type(error).__name__}: {error})"
    owner = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    if isinstance(value, list) and list in kinds:
        return f"has an item of a wrong type{got}"
    if owner is None or not isinstance(value, dict):
        return f"must be {_names(kinds)}{got}"
    known = [field.name for field in dataclasses.fields(owner)]
    unknown = [str(key) for key in value if key not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        return f"has no field `{unknown[0]}` in vLLM's {owner.__name__}{hint}"
    # Pydantic's text without its counts, links and values: "field: problem; field: problem".
    text = re.sub(r"\s*\[type=[^\n]*|\s*For further information[^\n]*", "", str(error))
    body = text.partition("\n")[2].strip() or text
    return "; ".join(": ".join(part.split("\n  ")) for part in re.split(r"\n(?=\S)", body))


def _kinds(annotation: Any) -> set[type]:
    """The types that an argument may have, None left out."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(annotation)))
    if origin is Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return {type(choice) for choice in typing.get_args(annotation) if choice is not None}
    kind = origin or annotation
    return {kind} if isinstance(kind, type) and kind is not types.NoneType else set()


def _names(kinds: set[type]) -> str:
    names = {"a mapping" if dataclasses.is_dataclass(kind) else _KIND_NAMES.get(kind, "text") for kind in kinds}
    return " or ".join(sorted(names)) or "something else"


def _text(value: Any) -> str:
    """The value as the command line would have it."""
    return value if isinstance(value, str) else json.dumps(value)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = type(value).__name__
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 1] + "…"
