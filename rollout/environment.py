"""Environments: what a task is played in (system prompt, tools, limits, reward), as a small Python class.

Invariant: one instance serves one attempt of one session and is closed at its end, however it ends; a retried
session gets a fresh one. An environment's failure is its own session's `error`, nobody else's.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from rollout.errors import EnvironmentError_
from rollout.limits import Limits
from rollout.tasks import Message, Task
from rollout.tool_calls import ToolCallRecord
from rollout.tools import Tool


@dataclass(slots=True)
class Turn:
    """What one generation came to, as the environment sees it."""

    index: int
    content: str
    """The visible text, without reasoning and tool calls."""
    reasoning: str | None
    tool_calls: list[ToolCallRecord] = field(default_factory=list)
    num_tokens: int = 0
    """Tokens sampled in this turn."""


@dataclass(slots=True)
class Episode:
    """A finished session, as the environment scores it."""

    task: Task
    messages: list[Message]
    """The whole conversation, system prompt and tool results included."""
    turns: list[Turn]
    stop_reason: str | None
    """How it ended; None while it is still being played."""

    @property
    def answer(self) -> str:
        """The visible text of the last turn; empty where there was none."""
        return self.turns[-1].content if self.turns else ""

    @property
    def tool_calls(self) -> list[ToolCallRecord]:
        """All tool calls, in order."""
        return [call for turn in self.turns for call in turn.tool_calls]


class Environment:
    """Base of all environments. Override what you need; every method may be sync or async.

    Sync methods run in a thread, off the event loop, under `limits.environment_seconds`.
    """

    system_prompt: str | None = None
    """Put before the task's messages; None where the tasks bring their own."""

    tools: Sequence[Tool] = ()
    """What the model may call. Methods decorated with `@tool` are added by themselves."""

    mcp_servers: Sequence[str] = ()
    """Names from the config's `mcp_servers` whose tools the model may call as well."""

    limits: Limits | None = None
    """Overrides the config's limits for this environment."""

    def setup(self, task: Task) -> Any:
        """Prepare for one task. Raise to refuse it."""

    def reply(self, episode: Episode) -> Any:
        """Messages that follow a turn without tool calls; None ends the session with `stop`.

        This is where a simulated user speaks. Returns `list[Message] | None`.
        """
        return None

    def turn_reward(self, turn: Turn, episode: Episode) -> Any:
        """Reward of one turn as it happens (`float | None`). None for all turns: no turn_rewards column."""
        return None

    def reward(self, episode: Episode) -> Any:
        """Final reward (`float | None`). None means not scored; it is never turned into 0."""
        return None

    def close(self) -> Any:
        """Release what `setup` took. Called exactly once, after success, failure and cancellation."""

    def all_tools(self) -> list[Tool]:
        """`tools` and the decorated methods of the class."""
        return [*self.tools, *(getattr(self, name) for name in _tool_methods(cast(Any, type(self))))]


@functools.cache
def _tool_methods(kind: Any) -> tuple[str, ...]:
    """Names of the methods of a class that `@tool` made tools of. Walking a class takes 0.3 ms, so only once."""
    return tuple(name for name, _ in inspect.getmembers_static(kind, lambda member: isinstance(member, Tool)))


EnvironmentFactory = Callable[[], Environment]


def load_environment(path: str, arguments: dict[str, Any] | None = None) -> EnvironmentFactory:
    """A factory from an import path "module:name" of an Environment class or of a function that returns one.

    Raises EnvironmentError_ that says what is missing: the module, the name, or an environment behind it.
    """
    module_name, separator, name = path.partition(":")
    if not separator or not module_name or not name:
        raise EnvironmentError_(f"{path!r} is not an import path; write module:Class or module:function")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # Not only ImportError: a module may raise anything while it is imported.
        raise EnvironmentError_(
            f"cannot import {module_name!r} for {path!r}: {type(error).__name__}: {error}. "
            "Is its folder listed under `pythonpath`?"
        ) from error
    target = getattr(module, name, None)
    if target is None:
        raise EnvironmentError_(f"module {module_name!r} has no {name!r}")
    if not callable(target):
        raise EnvironmentError_(f"{path!r} is a {type(target).__name__}, not a class or function")
    kwargs = dict(arguments or {})
    try:
        inspect.signature(target).bind(**kwargs)
    except (TypeError, ValueError) as error:
        raise EnvironmentError_(f"{path!r} does not take these arguments: {error}") from None

    def make() -> Environment:
        environment = target(**kwargs)
        if not isinstance(environment, Environment):
            raise EnvironmentError_(f"{path!r} returned {type(environment).__name__}, not an Environment")
        return environment

    return make
