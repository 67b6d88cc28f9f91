"""The engine's side of captured sessions: whose request it is, and what was sampled for it.

A request that came in under a session's address carries the session's id (the front writes that header and lets no
client write it). It is served as any other; beside it, every generation is followed token by token and handed to the
controller when the answer is out.

Invariant: what is recorded is what AsyncLLM was asked and what it said: ids, log-probabilities, versions. Nothing is
read back from text. A request of no session is not touched, not even by a coroutine.
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

from rollout.capture.calls import CapturedCall
from rollout.engine import VersionSpan
from rollout.errors import ApiError, LedgerError, RolloutError
from rollout.session_keys import SESSION_CALLER
from rollout.tasks import Message

logger = logging.getLogger(__name__)

SESSION_HEADER = b"x-rollout-session"
# Deadline of a word with the controller before a request is served.
BEGIN_SECONDS = 30.0
# A report is tried again for so long; after it, the session counts the call as one that was not reported.
REPORT_SECONDS = 60.0
REPORT_PAUSE_S = 0.5
# vLLM's paths, and what a session's record calls them.
_APIS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class SessionKeeper(Protocol):
    """Who holds the sessions: the controller."""

    async def begin(self, session_id: str, request_id: str) -> None:
        """A request is about to be served. Raises ApiError where the session takes none."""

    async def end(self, session_id: str, request_id: str, calls: list[CapturedCall], lost: bool) -> None:
        """It was served, with these generations. `lost`: there was one more, of which too little is known."""


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
        try:
            # Closed with this one, or the engine would go on until the garbage collector looked.
            async with aclosing(stream):
                async for output in stream:
                    prompt = output.prompt_token_ids or prompt
                    for completion in output.outputs:
                        choices.setdefault(completion.index, _Choice()).take(completion)
                    yield output
        finally:
            # Also where the client went away in the middle: what was sampled until then was sampled.
            for _, choice in sorted(choices.items()):
                self._keep(choice, prompt, started, version)

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
            await _refuse(send, 403, "this key is of one session; use it with that session's base_url")
        elif session and not caller.startswith(SESSION_CALLER) and not scopes & {"trainer", "admin"}:
            await _refuse(send, 403, "this session wants its own key, api_key")
        elif session:
            await self._captured(session, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _captured(self, session: str, scope: Scope, receive: Receive, send: Send) -> None:
        api = _APIS.get(scope["path"])
        if api is None:
            # Models, tokenization: nothing is sampled.
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        try:
            async with asyncio.timeout(BEGIN_SECONDS):
                await self._keeper.begin(session, request_id)
        except (RolloutError, TimeoutError) as failure:
            status = failure.status if isinstance(failure, ApiError) else 503
            await _refuse(send, status, str(failure) or "the controller does not answer")
            return
        body, replayed = await _read(receive)
        correlation = scope.get("state", {}).get("correlation_id", "")
        recording = Recording(request_id, api, correlation, await asyncio.to_thread(_messages, body), self._version)
        token = RECORDING.set(recording)
        try:
            await self._app(scope, replayed, send)
        finally:
            RECORDING.reset(token)
            # Beside the request, whose client may have gone and whose task may be cancelled.
            task = asyncio.get_running_loop().create_task(self._report(session, recording))
            self._reports.add(task)
            task.add_done_callback(self._reports.discard)

    async def _report(self, session: str, recording: Recording) -> None:
        deadline = time.monotonic() + REPORT_SECONDS
        while True:
            try:
                await self._keeper.end(session, recording.request_id, recording.calls, recording.lost)
                return
            except ApiError as failure:
                logger.warning("session %s took no report: %s", session, failure)
                return
            except Exception as failure:
                if time.monotonic() > deadline:
                    logger.error("a call of session %s could not be reported: %r", session, failure)
                    return
            await asyncio.sleep(REPORT_PAUSE_S)


def _messages(body: bytes) -> list[Message] | None:
    """The conversation of a request in whichever form it came, for people; None where it has none."""
    try:
        given = json.loads(body)
        found = given.get("messages", given.get("input"))
    except (ValueError, AttributeError):
        return None
    if isinstance(found, str):
        return [{"role": "user", "content": found}]
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        return None
    system = given.get("system") or given.get("instructions")
    return [*([{"role": "system", "content": system}] if system else []), *found]


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """A request's body, and a `receive` that gives it once more."""
    messages = []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body", False):
            break
    body = b"".join(message.get("body", b"") for message in messages)

    async def replayed() -> MutableMapping[str, Any]:
        return messages.pop(0) if messages else await receive()

    return body, replayed


async def _refuse(send: Send, status: int, message: str) -> None:
    content = json.dumps(
        {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    ).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
