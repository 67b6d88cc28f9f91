"""Running tool calls.

Invariant: a call always gets an answer, as text, within its deadline. Unknown names, malformed JSON, arguments
that do not fit the schema, exceptions, time-outs and oversize results become an error message to the model and
a failed `ToolCallRecord` in the trajectory; none of them is ever an exception to the session.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from rollout import tracing
from rollout.errors import EnvironmentError_, ToolError
from rollout.strict_json import as_unicode
from rollout.tools import Tool

# Threads of synchronous tools that outlived their deadline and could not be stopped. Past this many the process
# refuses synchronous calls: a leak that grows without end would take the worker down silently. A session that is
# refused one may succeed in another worker, and this one is replaced (actors.worker_pool).
MAX_ABANDONED_THREADS = 256

Outcome = Literal[
    "ok", "unknown_tool", "malformed", "invalid_arguments", "exception", "timeout", "oversize", "refused"
]


@dataclass(slots=True, frozen=True)
class ToolCall:
    """One call as it was parsed from sampled tokens."""

    id: str
    name: str | None
    arguments: dict[str, Any] | str | None
    malformed: str | None = None
    """Why it could not be parsed; None if it could."""
    raw: str = ""
    """The text that the model wrote."""


@dataclass(slots=True, frozen=True)
class ToolCallRecord:
    """What became of one call (the record's `tool_calls` column)."""

    name: str
    ok: bool
    seconds: float
    error: str | None = None
    """`outcome: message` where ok is false."""


@dataclass(slots=True, frozen=True)
class ToolResult:
    """The answer to one call."""

    call: ToolCall
    content: str
    """What the model reads; begins with "Error: " where the call failed."""
    record: ToolCallRecord
    outcome: Outcome = "ok"


class ToolSet:
    """The tools of one session, by name. Raises ValueError where two share a name."""

    def __init__(self, tools: Iterable[Tool] = ()) -> None:
        self._tools: dict[str, Tool] = {}
        for item in tools:
            if item.name in self._tools:
                raise ValueError(f"two tools are called {item.name!r}")
            self._tools[item.name] = item

    def __len__(self) -> int:
        return len(self._tools)

    @property
    def specs(self) -> list[dict[str, Any]]:
        """All tools in OpenAI's function form, in the order given."""
        return [item.spec for item in self._tools.values()]

    async def call_all(
        self, calls: Sequence[ToolCall], *, timeout: float, max_output_chars: int, max_calls: int
    ) -> list[ToolResult]:
        """Run the calls of one turn concurrently; results in the order of the calls.

        `timeout` is seconds for each call. Never raises, except CancelledError where the caller is cancelled.
        """

        async def one(index: int, call: ToolCall) -> ToolResult:
            if index >= max_calls:
                return _failed(call, 0.0, "refused", f"more than {max_calls} calls in one turn")
            with tracing.span("tool", tool=call.name) as span:
                result = await self.call(call, timeout=timeout, max_output_chars=max_output_chars)
                span.set(outcome=result.outcome, error=result.record.error)
            return result

        if len(calls) == 1:
            return [await one(0, calls[0])]
        return list(await asyncio.gather(*(one(i, call) for i, call in enumerate(calls))))

    async def call(self, call: ToolCall, *, timeout: float, max_output_chars: int) -> ToolResult:
        """Run one call. Whatever goes wrong is in the result."""
        started = time.perf_counter()

        def failed(outcome: Outcome, message: str) -> ToolResult:
            return _failed(call, time.perf_counter() - started, outcome, message)

        if call.malformed is not None:
            return failed("malformed", call.malformed)
        chosen = self._tools.get(call.name or "")
        if chosen is None:
            known = ", ".join(self._tools) or "none"
            return failed("unknown_tool", f"there is no tool called {call.name!r}; the tools are: {known}")
        try:
            arguments = _validated(chosen, call.arguments)
        except ToolError as error:
            return failed("invalid_arguments", str(error))
        try:
            async with asyncio.timeout(timeout) as deadline:
                value = await run_anywhere(chosen.run, arguments)
        except TimeoutError as error:
            if not deadline.expired():
                return failed("exception", f"TimeoutError: {error}")
            return failed("timeout", f"{chosen.name} did not answer within {timeout:g} s")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled this session: the tool raised it itself.
            return failed("exception", "CancelledError")
        except _TooManyAbandoned as error:
            return failed("refused", str(error))
        except ToolError as error:
            return failed("exception", str(error))
        except Exception as error:
            return failed("exception", f"{type(error).__name__}: {error}")
        try:
            content = as_unicode(to_text(value))
        except Exception as error:
            # RecursionError for a result that is nested too deeply, and whatever a __str__ may raise.
            return failed("exception", f"the result of {chosen.name} cannot be written as text: {error}")
        if len(content) > max_output_chars:
            return failed(
                "oversize",
                f"the result of {chosen.name} has {len(content)} characters, more than {max_output_chars}; "
                "ask for less",
            )
        seconds = time.perf_counter() - started
        return ToolResult(call, content, ToolCallRecord(chosen.name, True, seconds))


def _failed(call: ToolCall, seconds: float, outcome: Outcome, message: str) -> ToolResult:
    record = ToolCallRecord(call.name or "", False, seconds, f"{outcome}: {message}"[:500])
    return ToolResult(call, as_unicode(f"Error: {message}"[:2000]), record, outcome)


def _validated(chosen: Tool, arguments: dict[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ToolError(f"the arguments of {chosen.name} are not JSON: {error}") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ToolError(f"the arguments of {chosen.name} must be an object, not {type(arguments).__name__}")
    if chosen.arguments is None:
        return _schema_checked(chosen, arguments)
    try:
        model = chosen.arguments.model_validate(arguments)
    except ValidationError as error:
        problems = "; ".join(
            f"{_path(issue['loc'])}: {issue['msg'].removeprefix('Value error, ')}"
            for issue in error.errors(include_url=False)
        )
        raise ToolError(f"invalid arguments for {chosen.name}: {problems}") from None
    return {name: getattr(model, name) for name in type(model).model_fields}


def _schema_checked(chosen: Tool, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a tool that has only a JSON schema (MCP), checked against it."""
    import jsonschema
    import referencing

    # An empty registry: a schema's $ref must never make this process fetch something from the network.
    kind = jsonschema.validators.validator_for(chosen.parameters)
    validator = kind(chosen.parameters, registry=referencing.Registry())
    try:
        problems = [f"{_path(issue.absolute_path)}: {issue.message}" for issue in validator.iter_errors(arguments)]
    except Exception as error:
        raise ToolError(f"the schema of {chosen.name} cannot be used: {type(error).__name__}: {error}") from None
    if problems:
        raise ToolError(f"invalid arguments for {chosen.name}: {'; '.join(problems)}")
    return arguments


def _path(parts: Iterable[Any]) -> str:
    return ".".join(str(part) for part in parts) or "arguments"


def to_text(value: Any) -> str:
    """A tool's result as the model reads it: text as it is, everything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    return json.dumps(value, ensure_ascii=False, default=str)


class _TooManyAbandoned(EnvironmentError_):
    """It is this process that cannot, not the session."""

    retryable = True


class _Abandoned:
    """Counts the synchronous calls of this process that run on although their caller has gone."""

    def __init__(self) -> None:
        self.count = 0
        self.lock = threading.Lock()


_abandoned = _Abandoned()


def abandoned_threads() -> int:
    """Synchronous calls still running in this process although their deadline has passed."""
    return _abandoned.count


async def run_anywhere(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Await an async function; run a sync one in a daemon thread of its own, off the event loop.

    A thread per call (about 60 µs) and no pool: a call that hangs for ever costs one thread, never a slot
    that later calls would wait for.
    """
    if inspect.iscoroutinefunction(function):
        return await function(**arguments)
    if _abandoned.count >= MAX_ABANDONED_THREADS:
        raise _TooManyAbandoned(f"{_abandoned.count} earlier synchronous calls in this worker never returned")
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()
    state = {"done": False, "abandoned": False}

    def settle(result: Any, error: BaseException | None) -> None:
        if not future.done():
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    def body() -> None:
        result: Any = None
        failure: BaseException | None = None
        try:
            result = context.run(function, **arguments)
        except (StopIteration, SystemExit, KeyboardInterrupt) as stop:
            # A future refuses the first, and the others would end the event loop; the function has simply failed.
            failure = RuntimeError(f"{type(stop).__name__}: {stop}")
        except BaseException as error:
            failure = error
        with _abandoned.lock:
            state["done"] = True
            if state["abandoned"]:
                _abandoned.count -= 1
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=body, daemon=True, name=getattr(function, "__name__", "tool")).start()
    try:
        value = await future
    except asyncio.CancelledError:
        with _abandoned.lock:
            if not state["done"]:
                state["abandoned"] = True
                _abandoned.count += 1
        raise
    return await value if inspect.isawaitable(value) else value
