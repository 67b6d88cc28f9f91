"""The engine's side of captured sessions: whose request it is, and what was sampled for it.

A request that came in under a session's address carries the session's id (the front writes that header and lets no
client write it). It is served as any other; beside it, every generation is followed token by token and handed to the
controller when the answer is out.

Invariant: what is recorded is what AsyncLLM was asked and what it said: ids, log-probabilities, versions. Nothing is
read back from text. What a session was told to begin it is told the end of, whatever befalls the request; a
generation of which nothing was seen counts as lost. A request of no session is not touched, not even by a coroutine.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from deployments.access import route_path
from deployments.capture_request import api_of, look_at
from deployments.routes.errors import RETRY_AFTER_S
from rollout.access_paths import error_form
from rollout.capture.calls import CapturedCall
from rollout.engine import VersionSpan
from rollout.errors import AccessError, ApiError, ConflictError, LedgerError, RolloutError, UnavailableError
from rollout.session_keys import SESSION_CALLER
from rollout.tasks import Message

logger = logging.getLogger(__name__)

SESSION_HEADER = b"x-rollout-session"
# Deadline of a word with the controller before a request is served.
BEGIN_SECONDS = 30.0
# A report is tried again for so long; after it, the session counts the call as one that was not reported.
REPORT_SECONDS = 60.0
REPORT_PAUSE_S = 0.5
# A generation that vLLM cancels goes on for a moment after its request, which does not wait for it.
SETTLE_SECONDS = 2.0
SETTLE_PAUSE_S = 0.01
# Anthropic's names of errors, where they are not those of all 4xx and 5xx.
_ANTHROPIC = {403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class SessionKeeper(Protocol):
    """Who holds the sessions: the controller."""

    async def begin(self, session_id: str, request_id: str) -> None:
        """A request is about to be served. Raises ApiError where the session takes none."""

    async def end(self, session_id: str, request_id: str, calls: list[CapturedCall], lost: bool) -> None:
        """It was served, with these generations. `lost`: there was one more, of which too little is known."""


class SessionClosed(ApiError):
    """The session takes no more calls. 410: clients repeat a 409 by themselves, in vain."""

    category = "session_closed"
    status = 410


@dataclass(slots=True)
class Recording:
    """One request of a session, and its generations so far."""

    request_id: str
    api: str
    correlation_id: str
    messages: list[Message] | None
    version: Callable[[], int]
    """Of the weights, now."""
    calls: list[CapturedCall] = field(default_factory=list)
    lost: bool = False
    under_way: int = 0
    """Generations that have begun and not ended."""

    def asked(self, params: Any) -> Any:
        """vLLM's SamplingParams with the sampled token's log-probability; what the client asked for stays."""
        if params.logprobs is not None:
            return params
        changed = params.clone()
        changed.logprobs = 0
        return changed

    async def follow(self, stream: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
        """The engine's outputs as they come, written down on the way."""
        choices: dict[int, _Choice] = {}
        prompt: list[int] | None = None
        started, version = time.time(), self.version()
        self.under_way += 1
        try:
            # Closed with this one, or the engine would go on until the garbage collector looked.
            async with aclosing(stream):
                async for output in stream:
                    prompt = output.prompt_token_ids or prompt
                    for completion in output.outputs:
                        choices.setdefault(completion.index, _Choice()).take(completion)
                    yield output
        except BaseException as failure:
            # An answer that is not streamed comes at its end. Cut off before that, it sampled, and nobody saw what.
            self.lost = self.lost or not (choices or _refused(failure))
            raise
        finally:
            # Also where the client went away in the middle: what was sampled until then was sampled.
            for _, choice in sorted(choices.items()):
                self._keep(choice, prompt, started, version)
            self.under_way -= 1

    async def settle(self) -> None:
        """Wait, for a moment, until every generation has ended. One that has not is lost."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self.under_way and time.monotonic() < deadline:
            await asyncio.sleep(SETTLE_PAUSE_S)
        self.lost = self.lost or self.under_way > 0

    def _keep(self, choice: _Choice, prompt: list[int] | None, started: float, version: int) -> None:
        number = len(self.calls)
        try:
            self.calls.append(
                CapturedCall(
                    call_id=self.request_id if number == 0 else f"{self.request_id}-{number}",
                    prompt_ids=array("i", prompt or []),
                    token_ids=choice.ids,
                    logprobs=choice.logprobs,
                    versions=choice.spans(version, self.version()),
                    finish_reason=choice.finish_reason or "abort",
                    started=started,
                    finished=max(started, time.time()),
                    api=self.api,
                    correlation_id=self.correlation_id,
                    messages=self.messages,
                    answer={"role": "assistant", "content": choice.text},
                )
            )
        except LedgerError as failure:
            # Not repaired: the session says that a call was not recorded.
            logger.warning("a captured call cannot be kept: %s", failure)
            self.lost = True


@dataclass(slots=True)
class _Choice:
    """One sequence of a request, put together from deltas or from a final output."""

    ids: array[int] = field(default_factory=lambda: array("i"))
    logprobs: array[float] = field(default_factory=lambda: array("f"))
    text: str = ""
    finish_reason: Any = None
    weight_versions: Any = None

    def take(self, completion: Any) -> None:
        ids = list(completion.token_ids)
        if completion.finish_reason is not None:
            self.finish_reason = completion.finish_reason
            self.weight_versions = completion.weight_versions
        self.ids.extend(ids)
        for token, position in zip(ids, completion.logprobs or [], strict=False):
            self.logprobs.append(position[token].logprob)
        self.text += completion.text

    def spans(self, first: int, last: int) -> list[VersionSpan]:
        """The engine's own spans. A call that was cut off has none: then only weights that did not change are known.

        Raises LedgerError where they changed.
        """
        if self.weight_versions is not None:
            return [VersionSpan(int(span.version), span.start, span.end) for span in self.weight_versions]
        if first != last:
            raise LedgerError(f"it was cut off while the weights changed from version {first} to {last}")
        return [VersionSpan(first, 0, len(self.ids))] if self.ids else []


RECORDING: ContextVar[Recording | None] = ContextVar("recording", default=None)
"""The request that is being served in this context, if it belongs to a session."""


class CaptureMiddleware:
    """Around vLLM's application: begins and ends the requests of sessions."""

    def __init__(self, app: Any, keeper: SessionKeeper, version: Callable[[], int]) -> None:
        self._app = app
        self._keeper = keeper
        self._version = version
        self._reports: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        session = next((value for name, value in scope["headers"] if name == SESSION_HEADER), b"").decode("latin-1")
        state = scope.get("state", {})
        caller, scopes = state.get("caller", ""), state.get("scopes", frozenset())
        if caller.startswith(SESSION_CALLER) and caller != f"{SESSION_CALLER}{session}":
            wrong = AccessError("this key is of one session; use it with that session's base_url")
            await _refuse(scope, send, wrong)
        elif session and not caller.startswith(SESSION_CALLER) and not scopes & {"trainer", "admin"}:
            await _refuse(scope, send, AccessError("this session wants its own key, api_key"))
        elif session:
            await self._captured(session, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _captured(self, session: str, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            api = api_of(scope["method"], route_path(scope))
            # Before the session is told: a body that is too large, or never comes whole, begins nothing.
            read = None if api is None else await _read(receive)
            recording = None if api is None or read is None else await self._begun(session, api, scope, read[0])
        except ApiError as failure:
            await _refuse(scope, send, failure)
            return
        if api is None:
            # Models, tokenization: nothing is sampled.
            await self._app(scope, receive, send)
        elif read is not None and recording is not None:
            token = RECORDING.set(recording)
            try:
                await self._app(scope, read[1], send)
            finally:
                RECORDING.reset(token)
                self._end(session, recording)

    async def _begun(self, session: str, api: str, scope: Scope, body: bytes) -> Recording:
        """What the request is written down in, once its session has been told."""
        asked = await asyncio.to_thread(look_at, body)
        if asked.refusal is not None:
            raise asked.refusal
        correlation = scope.get("state", {}).get("correlation_id", "")
        recording = Recording(uuid.uuid4().hex, api, correlation, asked.messages, self._version)
        await self._begin(session, recording)
        return recording

    async def _begin(self, session: str, recording: Recording) -> None:
        """Tell the session. Raises ApiError where it takes no request, or cannot be asked."""
        known = False
        try:
            async with asyncio.timeout(BEGIN_SECONDS):
                await self._keeper.begin(session, recording.request_id)
            known = True
        except ConflictError as failure:
            known = True
            raise SessionClosed(str(failure)) from None
        except ApiError as failure:
            known = failure.status < 500
            raise
        except (RolloutError, TimeoutError) as failure:
            raise UnavailableError(str(failure) or "the controller does not answer") from None
        finally:
            if not known:
                # It may have begun all the same, and would count as under way until the session's last deadline.
                self._end(session, recording)

    def _end(self, session: str, recording: Recording) -> None:
        # Beside the request, whose client may have gone and whose task may be cancelled.
        task = asyncio.get_running_loop().create_task(self._report(session, recording))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _report(self, session: str, recording: Recording) -> None:
        await recording.settle()
        calls, lost = list(recording.calls), recording.lost
        deadline = time.monotonic() + REPORT_SECONDS
        while True:
            try:
                await self._keeper.end(session, recording.request_id, calls, lost)
                return
            except Exception as failure:
                if isinstance(failure, ApiError) and failure.status < 500:
                    logger.warning("session %s took no report: %s", session, failure)
                    return
                if time.monotonic() > deadline:
                    logger.error("a call of session %s could not be reported: %r", session, failure)
                    return
            await asyncio.sleep(REPORT_PAUSE_S)


def _refused(failure: BaseException) -> bool:
    """Whether vLLM said no before it sampled anything."""
    if isinstance(failure, asyncio.CancelledError | GeneratorExit):
        return False
    from vllm.exceptions import GracefulHTTPError, VLLMClientError

    return isinstance(failure, ValueError | GracefulHTTPError | VLLMClientError)


async def _read(receive: Receive) -> tuple[bytes, Receive] | None:
    """A request's body, and a `receive` that gives it once more; None where the client went away before its end."""
    messages = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        messages.append(message)
        if not message.get("more_body", False):
            break
    body = b"".join(message.get("body", b"") for message in messages)

    async def replayed() -> MutableMapping[str, Any]:
        return messages.pop(0) if messages else await receive()

    return body, replayed


async def _refuse(scope: Scope, send: Send, failure: ApiError) -> None:
    """Answer with an error as the clients of this path read it."""
    status, form = failure.status, error_form(route_path(scope))
    body: dict[str, Any]
    if form == "anthropic":
        kind = _ANTHROPIC.get(status, "api_error" if status >= 500 else "invalid_request_error")
        correlation = scope.get("state", {}).get("correlation_id", "")
        body = {"type": "error", "error": {"type": kind, "message": str(failure)}, "request_id": correlation}
    elif form == "openai":
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": str(failure), "type": kind, "param": failure.field, "code": failure.category}
        body = {"error": error}
    else:
        body = {"error": {"type": failure.category, "message": str(failure), "field": failure.field}}
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status == UnavailableError.status:
        headers.append((b"retry-after", f"{RETRY_AFTER_S:g}".encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else content})
