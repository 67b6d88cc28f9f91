"""Hooks: functions of the user around each stage of a request to an agent.

Invariant: the hooks of one event run one after the other in ascending priority (in the order given where equal),
each under a deadline, each with what the one before it left. `finalize` runs for every request that began, after
an error and a disconnect too, and there every hook gets its turn even if one before it failed.

One request: connection, request, [before_llm_call, chunk ..., after_llm_call, (before_tool_call, after_tool_call)
for each of the agent's own calls] ..., message, finalize. The calls of one turn run concurrently, and so do
their hooks.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from rollout.errors import RolloutError
from rollout.tool_calls import ToolCall, ToolResult, run_anywhere

logger = logging.getLogger(__name__)

Event = Literal[
    "connection",
    "request",
    "before_llm_call",
    "chunk",
    "after_llm_call",
    "before_tool_call",
    "after_tool_call",
    "message",
    "finalize",
]
EVENTS: tuple[Event, ...] = get_args(Event)
# What these hooks return takes the value's place, and is of its type. That of the others is not looked at.
_REPLACING: dict[str, type] = {
    "request": dict,
    "before_llm_call": dict,
    "chunk": dict,
    "before_tool_call": ToolCall,
    "after_tool_call": ToolResult,
}
DEFAULT_PRIORITY = 50


class HookError(RolloutError):
    """A hook raised or took too long."""

    category = "hook"


@dataclass(slots=True)
class RequestContext:
    """What hooks know of one request. `state` is theirs: it is shared by the hooks of this request alone."""

    request_id: str
    agent: str
    scopes: frozenset[str]
    """The caller's scope names."""
    started: float = field(default_factory=time.monotonic)
    turn: int = 0
    """The model call that is going on, from 1."""
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Ending:
    """How a request ended, for `finalize`."""

    finish_reason: str | None = None
    """None: it did not come to an end of its own."""
    usage: dict[str, Any] | None = None
    """Tokens of all turns that finished; None where the engine did not say."""
    error: BaseException | None = None
    """What ended it; CancelledError or GeneratorExit: the client hung up."""


@dataclass(frozen=True, slots=True)
class Hook:
    """A function (sync or async) called as `function(context, value)`. Sync ones run in a thread.

    The values, by event: connection: None; request: the request's body; before_llm_call: the body for the engine;
    chunk: a chunk for the client (but the last two, with finish_reason and usage); after_llm_call: the assistant
    message; before_tool_call: a ToolCall; after_tool_call: a ToolResult; message: the client's whole message;
    finalize: an Ending.

    What a hook on request, before_llm_call, chunk or a tool call returns takes the value's place, unless it is None.
    A hook may raise an ApiError to refuse the request, and before a tool call a ToolError to refuse the call alone,
    which is told to the model. Raises ValueError for an unknown event.
    """

    event: Event
    function: Callable[[RequestContext, Any], Any]
    priority: int = DEFAULT_PRIORITY

    def __post_init__(self) -> None:
        if self.event not in EVENTS:
            raise ValueError(f"there is no hook event {self.event!r}; use one of {', '.join(EVENTS)}")


class HookChain:
    """The hooks of one request."""

    def __init__(self, hooks: Iterable[Hook], context: RequestContext, seconds: float) -> None:
        self._context = context
        self._seconds = seconds
        self._hooks: dict[str, list[Hook]] = {event: [] for event in EVENTS}
        for hook in sorted(hooks, key=lambda hook: hook.priority):
            self._hooks[hook.event].append(hook)

    def has(self, event: Event) -> bool:
        """Whether anything would run."""
        return bool(self._hooks[event])

    async def fire(self, event: Event, value: Any) -> Any:
        """Run an event's hooks; the value that they leave. Raises their RolloutErrors, HookError for the rest."""
        for hook in self._hooks[event]:
            said = await self._run(hook, value)
            if said is None or event not in _REPLACING:
                continue
            if not isinstance(said, _REPLACING[event]):
                wanted = _REPLACING[event].__name__
                raise HookError(f"{_name(hook)} returned {type(said).__name__}, not {wanted} or None")
            value = said
        return value

    async def finalize(self, ending: Ending) -> None:
        """Run the hooks of `finalize`. Never raises, except CancelledError: failures are logged."""
        for hook in self._hooks["finalize"]:
            try:
                await self._run(hook, ending)
            except Exception as failure:
                logger.error("agent %s, request %s: %s", self._context.agent, self._context.request_id, failure)

    async def _run(self, hook: Hook, value: Any) -> Any:
        name = _name(hook)
        try:
            async with asyncio.timeout(self._seconds) as deadline:
                return await run_anywhere(functools.partial(hook.function, self._context, value), {})
        except TimeoutError as failure:
            took = f"took longer than {self._seconds:g} s" if deadline.expired() else f"raised {failure!r}"
            raise HookError(f"{name} {took}") from failure
        except RolloutError:
            raise
        except Exception as failure:
            raise HookError(f"{name} raised {type(failure).__name__}: {failure}") from failure


def _name(hook: Hook) -> str:
    return f"hook {getattr(hook.function, '__name__', repr(hook.function))} on {hook.event}"
