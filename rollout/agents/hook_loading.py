"""Hooks from import paths: what a configuration may name, and how it becomes hooks.

A hook says itself on which event it runs: a function by `@hook("request")`, a class by the names of its methods:

    @hook("before_tool_call")
    async def ask_a_person(context, call): ...

    class Audit(AgentHooks):
        def request(self, context, body): ...
        def finalize(self, context, ending): ...

Invariant: only what was written as a hook can be named. An import path to any other function of any other package is
refused, whoever gives it. What cannot be loaded is an error that names the field.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rollout.agents.hooks import DEFAULT_PRIORITY, EVENTS, Event, Hook
from rollout.errors import RefusedError

IMPORT_PATH = r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$"
"""`module:name`."""
MAX_PATH_CHARS = 512
MAX_PRIORITY = 1_000_000
# Where `hook` writes the event. A name that nobody has by chance.
_EVENT = "__rollout_hook_event__"

F = TypeVar("F", bound=Callable[..., Any])


class HookRef(BaseModel):
    """A hook by its import path; written as `module:name`, or with its priority as an object."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    path: str = Field(pattern=IMPORT_PATH, max_length=MAX_PATH_CHARS)
    """`module:function` (made with `@hook`) or `module:Class` (of AgentHooks)."""
    priority: int = Field(default=DEFAULT_PRIORITY, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """Lower ones run first; of equal ones those that are listed first."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


def hook(event: Event) -> Callable[[F], F]:
    """Makes a function `(context, value)` a hook on an event. Raises ValueError for an unknown event."""
    if event not in EVENTS:
        raise ValueError(f"there is no hook event {event!r}; use one of {', '.join(EVENTS)}")

    def mark(function: F) -> F:
        setattr(function, _EVENT, event)
        return function

    return mark


class AgentHooks:
    """Base of classes whose methods are hooks, each on the event of its name: `def request(self, context, body)`.

    One instance is made without arguments for each agent in each gateway; it is shared by requests that run at once.
    What belongs to one request is kept in `context.state`.
    """


def load_hooks(refs: Iterable[HookRef], where: str = "hooks") -> list[Hook]:
    """The hooks of an agent, in the order of `refs`. Raises RefusedError that names the field under `where`."""
    found: list[Hook] = []
    for index, ref in enumerate(refs):
        try:
            found.extend(_load(ref))
        except _Unfit as failure:
            place = f"{where}.{index}"
            raise RefusedError(f"{place}: {failure}", place) from failure.__cause__
    return found


class _Unfit(Exception):
    """Why a path gives no hooks."""


def _load(ref: HookRef) -> list[Hook]:
    module_name, _, name = ref.path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as failure:
        # Not only ImportError: a module may raise anything while it is imported.
        raise _Unfit(
            f"cannot import {module_name!r}: {type(failure).__name__}: {failure}. "
            "Is its folder listed under `pythonpath`?"
        ) from failure
    target = getattr(module, name, None)
    if target is None:
        raise _Unfit(f"module {module_name!r} has no {name!r}")
    if inspect.isclass(target) and issubclass(target, AgentHooks):
        return _of_class(ref, target)
    event = getattr(target, _EVENT, None)
    if event is None or not callable(target):
        raise _Unfit(
            f"{ref.path} is no hook; decorate the function with @hook(event), or make it a class of AgentHooks"
        )
    _check_takes_two(ref.path, target)
    return [Hook(event, target, ref.priority)]


def _of_class(ref: HookRef, kind: type[AgentHooks]) -> list[Hook]:
    events = [event for event in EVENTS if callable(getattr(kind, event, None))]
    if not events:
        raise _Unfit(f"{ref.path} has no method with the name of an event ({', '.join(EVENTS)})")
    try:
        instance = kind()
    except Exception as failure:
        raise _Unfit(f"{ref.path} could not be made: {type(failure).__name__}: {failure}") from failure
    hooks = [Hook(event, getattr(instance, event), ref.priority) for event in events]
    for made in hooks:
        _check_takes_two(f"{ref.path}.{made.event}", made.function)
    return hooks


def _check_takes_two(what: str, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        raise _Unfit(f"{what} must take (context, value)") from None
    except ValueError:
        # A function that does not tell its signature is found out when it is called.
        return
