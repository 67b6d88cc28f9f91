"""Plain inference as a stream of events: what may be asked, and how an engine's completion becomes the answer.

Invariant: an answer is `started`, one `token` for every sampled token and one `end`, or it breaks off with one
`error`; after either nothing follows. Tokens are counted by the engine's token ids, never by its chunks, and the
texts of all `token` events, one after another, are the completion's text.

A character may need several tokens. The engine holds its text back until it is whole, so the first of them come with
an empty text; so do tokens that have no text (the end of the turn) and those of a stop sequence.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rollout.agents.chat_engine import ChatEngineError, Chunk

logger = logging.getLogger(__name__)

# One request, from asking the engine to the last token, its queue included.
DEADLINE_SECONDS = 900.0
MAX_JOB_ID_CHARS = 256
# No model's context is longer; the served model's own, which is, is checked by its engine.
MAX_TOKENS = 2**20
# vLLM's bound.
MAX_TEMPERATURE = 2.0
MAX_REPETITION_PENALTY = 2.0
# vLLM keeps it in 32 bits, and takes seeds of 64, signed.
MAX_TOP_K = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_STOP = 16
# So many characters are held back from the stream while a stop sequence may begin in them.
MAX_STOP_CHARS = 256
# Of a refused value, so much is sent back; a larger one is left out.
MAX_VALUE_CHARS = 200
MAX_MESSAGE_CHARS = 1_000

StopReason = Literal["max_tokens", "eos", "stop_sequence", "cancelled", "error"]
ErrorCode = Literal["VRAM_OOM", "CANCELLED", "TIMEOUT", "INVALID_REQUEST", "INFERENCE_FAILED"]
Event = dict[str, Any]
"""JSON, with its name in the field `event`."""

_OUT_OF_MEMORY = re.compile(r"out of memory|outofmemory|\boom\b", re.IGNORECASE)
# Statuses of an engine that are about the request itself, and not about the engine.
_REFUSED = (400, 413, 422)
_TIMED_OUT = (408, 504)
# What servers answer for a request that was withdrawn.
_WITHDRAWN = 499


class InferenceRequest(BaseModel):
    """One completion. What is left out has the value here, never a default of the model's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    job_id: str = Field(min_length=1, max_length=MAX_JOB_ID_CHARS)
    """The caller's own; told in `started` and in the log, and of no meaning otherwise."""
    prompt: str = Field(min_length=1)
    """Text as the model sees it; no chat template is put around it."""
    max_tokens: int = Field(ge=1, le=MAX_TOKENS)
    temperature: float = Field(default=1.0, ge=0.0, le=MAX_TEMPERATURE)
    """0 is greedy."""
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    """None samples freely."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, le=MAX_TOP_K)
    """0 considers all tokens."""
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=MAX_REPETITION_PENALTY)
    stop: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]] = Field(
        default_factory=list, max_length=MAX_STOP
    )
    """Texts that end the completion and are no part of it."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)

    def completion(self) -> dict[str, Any]:
        """The same as a body of vLLM's `/v1/completions`, without `model` and `stream`."""
        body = self.model_dump(exclude={"job_id"}, exclude_none=True)
        # Without the ids, how many tokens a chunk brings could only be guessed.
        return {**body, "return_token_ids": True}


class CompletionEngine(Protocol):
    """What streams a completion."""

    @property
    def model(self) -> str:
        """The name under which the model is served."""
        ...

    def open(
        self, body: Mapping[str, Any], correlation_id: str | None
    ) -> AbstractAsyncContextManager[AsyncIterator[Chunk]]:
        """The chunks of one completion, as vLLM sends them. Entered: the engine has taken the request.

        Leaving it ends the completion in the engine. Raises ChatEngineError, entering and reading.
        """
        ...


def problems(failure: ValidationError) -> list[dict[str, Any]]:
    """All that is wrong with a request: field, constraint, message and, where it is short, the value.

    The field is empty where the whole body is meant.
    """
    return [_problem(dict(one)) for one in failure.errors(include_url=False)]


async def infer(
    engine: CompletionEngine,
    request: InferenceRequest,
    *,
    correlation_id: str | None = None,
    seconds: float = DEADLINE_SECONDS,
) -> AsyncGenerator[Event, None]:
    """The events of one request. Never raises: what goes wrong is the last event. Closing it ends the completion."""
    deadline = asyncio.get_running_loop().time() + seconds
    sampled = _Sampled()
    try:
        async with AsyncExitStack() as opened:
            async with asyncio.timeout_at(deadline):
                chunks = await opened.enter_async_context(engine.open(request.completion(), correlation_id))
            yield _started(request, engine.model)
            while not sampled.finished:
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    raise ChatEngineError(502, "the engine's stream ended before the completion did")
                for event in sampled.add(chunk):
                    yield event
        yield sampled.end()
    except ChatEngineError as failure:
        logger.warning("inference %r failed: HTTP %d, %s", request.job_id, failure.status, failure.message)
        yield _error(_code(failure, sampled.count), failure.message)
    except TimeoutError:
        text = f"the completion was not finished after {seconds:g} s; {sampled.count} tokens were sent"
        logger.warning("inference %r failed: %s", request.job_id, text)
        yield _error("TIMEOUT", text)
    except Exception as failure:
        logger.error("inference %r failed", request.job_id, exc_info=failure)
        yield _error("INFERENCE_FAILED", f"{type(failure).__name__}: {failure}; this is a bug, the log has the stack")


class _Sampled:
    """What has been sampled of one completion."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.count = 0
        self._reason: StopReason | None = None
        self._clock = clock
        self._first: float | None = None
        self._last = 0.0

    @property
    def finished(self) -> bool:
        """Whether the engine has said why it stopped."""
        return self._reason is not None

    def add(self, chunk: Chunk) -> list[Event]:
        """The events of one chunk: none, or one for each of its tokens. Raises ChatEngineError."""
        choices = chunk.get("choices") or ()
        if not choices:
            # How many tokens there were; that is known better here.
            return []
        (choice, *_) = choices
        ids, text = choice.get("token_ids"), choice.get("text") or ""
        if ids is None:
            raise ChatEngineError(
                502, "the engine sends no token ids, so its tokens cannot be counted; is it vLLM 0.32 or newer?"
            )
        if ids:
            self._last = self._clock()
            self._first = self._last if self._first is None else self._first
        if choice.get("finish_reason") is not None:
            self._reason = _stop_reason(choice["finish_reason"], choice.get("stop_reason"))
            if self._reason == "cancelled" and not self.count and not ids:
                raise ChatEngineError(_WITHDRAWN, "the engine dropped the request before its first token; ask again")
        # One chunk is one text, and it is not said which of its tokens has which part. It is whole with the last.
        events = [_token("", self.count + ahead) for ahead in range(len(ids) - 1)]
        self.count += len(ids)
        if ids or text:
            # A text that comes after its token (held back for a stop sequence that did not come) bears its index.
            events.append(_token(text, max(self.count - 1, 0)))
        return events

    def end(self) -> Event:
        """The last event."""
        first = self._last if self._first is None else self._first
        return {
            "event": "end",
            "tokens_out": self.count,
            # From the first token to the last: without the queue and the prompt.
            "decode_time_ms": round(1000 * (self._last - first)),
            "stop_reason": self._reason,
        }


def _started(request: InferenceRequest, model: str) -> Event:
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"event": "started", "job_id": request.job_id, "model": model, "started_at": at}


def _token(text: str, index: int) -> Event:
    return {"event": "token", "t": text, "i": index}


def _error(code: ErrorCode, message: str) -> Event:
    return {"event": "error", "code": code, "message": message[:MAX_MESSAGE_CHARS]}


def _stop_reason(finish_reason: str, stop_reason: str | int | None) -> StopReason:
    if finish_reason == "length":
        return "max_tokens"
    if finish_reason == "stop":
        # vLLM names the stop sequence that it met. A number is one of the model's own further ends of a turn.
        return "stop_sequence" if isinstance(stop_reason, str) else "eos"
    return "cancelled" if finish_reason == "abort" else "error"


def _code(failure: ChatEngineError, sent: int) -> ErrorCode:
    if _OUT_OF_MEMORY.search(failure.message):
        return "VRAM_OOM"
    if failure.status == _WITHDRAWN:
        return "CANCELLED"
    if failure.status in _TIMED_OUT:
        return "TIMEOUT"
    # What was refused never had a token; vLLM calls its own failures in a stream bad requests, too.
    return "INVALID_REQUEST" if failure.status in _REFUSED and not sent else "INFERENCE_FAILED"


# What pydantic found, as the constraint that was broken: `{ge}` and the like are its own names for the bounds.
_CONSTRAINTS = {
    "missing": "required",
    "extra_forbidden": "unknown",
    "json_invalid": "JSON",
    "model_type": "object",
    "greater_than": "> {gt}",
    "greater_than_equal": ">= {ge}",
    "less_than": "< {lt}",
    "less_than_equal": "<= {le}",
    "finite_number": "finite",
    "string_too_short": "length >= {min_length}",
    "string_too_long": "length <= {max_length}",
    "too_long": "length <= {max_length}",
    "string_type": "string",
    "int_type": "integer",
    "int_from_float": "integer",
    "int_parsing_size": "integer",
    "float_type": "number",
    "list_type": "list of strings",
}


def _problem(found: Mapping[str, Any]) -> dict[str, Any]:
    kind = found["type"]
    told = {
        "field": ".".join(str(part) for part in found["loc"]),
        "constraint": _CONSTRAINTS.get(kind, kind).format_map(found.get("ctx") or {}),
        "message": found["msg"],
    }
    if kind == "extra_forbidden":
        told["message"] = f"there is no such field; there are {', '.join(InferenceRequest.model_fields)}"
    # A missing field's input is the whole body, and an unreadable body is what was sent.
    if kind not in ("missing", "json_invalid", "model_type"):
        try:
            text = json.dumps(found["input"], allow_nan=False)
        except (ValueError, TypeError):
            # Not a number, infinite, or with more digits than Python writes: JSON has no such value.
            return told
        if len(text) <= MAX_VALUE_CHARS:
            told["value"] = found["input"]
    return told
