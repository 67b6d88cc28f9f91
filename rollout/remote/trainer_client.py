"""The trainer as the rollout server calls it: model calls while a rollout is played, one callback at its end.

Invariant: every call has a deadline, a bounded answer and a bounded number of repetitions, goes to a checked address
alone, and follows no redirect. A 4xx is never tried again, but for a 429 that says when to come again: such a trainer
is busy, not of another mind. What fails is a RemoteFailure in the protocol's words; a trainer's own words and its key
are in no message.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from pydantic import ValidationError

from rollout.errors import EngineTimeout
from rollout.remote.failures import RemoteFailure
from rollout.remote.hosts import AllowedHosts, HostUnknown
from rollout.remote.wire import (
    COMPLETED_PATH,
    COMPLETION_PATHS,
    CompletionRequest,
    CompletionResponse,
    Generation,
    RolloutResponse,
)

CALL_SECONDS, CONNECT_SECONDS = 300.0, 10.0
# The callback carries a result and asks for no work; for all of its repetitions together.
COMPLETED_SECONDS = 60.0
# It has one of few places, and whoever sends it comes again: a trainer that wants more time gets it without a place.
COMPLETED_PAUSE_S = 5.0
CHAT_RETRIES, COMPLETED_RETRIES = 3, 2
FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 30.0
# A million tokens with their log-probabilities are about this much JSON.
MAX_ANSWER_BYTES = 48 * 2**20
# Larger answers are parsed off the event loop.
OFFLOAD_BYTES = 64 * 2**10
MAX_CONNECTIONS = 4

Sleep = Callable[[float], Awaitable[Any]]


class TrainerClient:
    """One rollout's trainer. Close it when the rollout has ended."""

    def __init__(
        self,
        server_url: str,
        generation: Generation,
        hosts: AllowedHosts,
        *,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """`generation` A becomes A1 by itself where the trainer has A1's path alone. `transport`: for tests."""
        self._base = server_url.rstrip("/")
        self.generation: Generation = generation
        self._hosts = hosts
        self._sleep = sleep
        headers = {"content-type": "application/json", "accept": "application/json", "accept-encoding": "identity"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self._http = httpx.AsyncClient(
            headers=headers,
            transport=transport,
            follow_redirects=False,
            # A proxy of the environment would connect to names that were never checked here.
            trust_env=False,
            limits=httpx.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=2.0),
        )
        self._answered = False
        self.retries = 0
        """Calls that were sent again."""

    async def complete(
        self,
        request: CompletionRequest,
        *,
        extra: dict[str, Any] | None = None,
        seconds: float = CALL_SECONDS,
    ) -> CompletionResponse:
        """One assistant turn. `extra`: more fields of B's body. `seconds`: for all repetitions together.

        Raises RemoteFailure, and EngineTimeout where `seconds` are over.
        """
        body = await _dumped(lambda: request.body(self.generation, extra))
        try:
            async with asyncio.timeout(seconds):
                content = await self._complete(body)
        except TimeoutError:
            raise EngineTimeout(f"the trainer did not answer a model call within {seconds:g} s") from None
        try:
            if len(content) < OFFLOAD_BYTES:
                return CompletionResponse.model_validate_json(content)
            return await asyncio.to_thread(CompletionResponse.model_validate_json, content)
        except ValidationError as failure:
            # The fields alone: pydantic's text would repeat what was in them.
            fields = ", ".join(sorted({".".join(map(str, issue["loc"])) or "the body" for issue in failure.errors()}))
            raise RemoteFailure(
                "trainer_error", f"the trainer's answer to a model call is not in the protocol's form: {fields[:500]}"
            ) from None

    async def completed(self, response: RolloutResponse) -> None:
        """Tell the trainer how the rollout ended.

        Raises RemoteFailure; `trainer_client_error` is the trainer's last word, and TrainerBusy its wish to be told
        later.
        """
        body = await _dumped(lambda: response.body("B"))
        seconds = COMPLETED_SECONDS
        try:
            async with asyncio.timeout(seconds):
                await self._post(
                    COMPLETED_PATH, body, retries=COMPLETED_RETRIES, seconds=seconds, patience=COMPLETED_PAUSE_S
                )
        except TimeoutError:
            raise RemoteFailure("network_error", f"the trainer did not take the end within {seconds:g} s") from None

    async def close(self) -> None:
        """Release the connections."""
        await self._http.aclose()

    async def _complete(self, body: bytes) -> bytes:
        path = COMPLETION_PATHS[self.generation]
        try:
            content = await self._post(path, body, retries=CHAT_RETRIES, seconds=CALL_SECONDS)
        except _Status as failure:
            if failure.status not in (404, 405) or self.generation != "A" or self._answered:
                raise
            # Nothing in a request says which of the two paths its trainer has; the body is the same.
            self.generation = "A1"
            content = await self._post(COMPLETION_PATHS["A1"], body, retries=CHAT_RETRIES, seconds=CALL_SECONDS)
        self._answered = True
        return content

    async def _post(
        self, path: str, body: bytes, *, retries: int, seconds: float, patience: float = CALL_SECONDS
    ) -> bytes:
        """`seconds`: of one attempt. `patience`: longest wait that a Retry-After can ask for."""
        pause = FIRST_PAUSE_S
        for attempt in range(retries + 1):
            try:
                return await self._once(path, body, seconds)
            except _Again as failure:
                if attempt == retries or (failure.after or 0.0) > patience:
                    raise failure.failure from None
                wait = pause if failure.after is None else failure.after
            self.retries += 1
            await self._sleep(wait)
            pause = min(2 * pause, MAX_PAUSE_S)
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, path: str, body: bytes, seconds: float) -> bytes:
        try:
            async with asyncio.timeout(seconds):
                return await self._exchange(path, body, seconds)
        except HostUnknown as failure:
            raise _Again(failure) from None
        except (TimeoutError, httpx.TimeoutException):
            raise _Again(RemoteFailure("network_error", f"the trainer did not answer within {seconds:g} s")) from None
        except (httpx.TransportError, httpx.StreamError) as failure:
            kind = type(failure).__name__
            raise _Again(RemoteFailure("network_error", f"no connection to the trainer ({kind})")) from None
        except httpx.InvalidURL:
            raise RemoteFailure("validation_error", "server_url: is not a URL that can be called") from None

    async def _exchange(self, path: str, body: bytes, seconds: float) -> bytes:
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        response = await self._hosts.send(self._http, "POST", f"{self._base}{path}", content=body, timeout=timeout)
        try:
            status = response.status_code
            if status == 429:
                busy = TrainerBusy(_after(response))
                raise busy if busy.after is None else _Again(busy, busy.after)
            if status >= 500:
                raise _Again(RemoteFailure("trainer_server_error", f"the trainer failed with status {status}"))
            if status >= 400:
                raise _Status(status)
            if not 200 <= status < 300:
                raise RemoteFailure(
                    "trainer_error", f"the trainer answered with status {status}; redirects are not followed"
                )
            return await _read(response)
        finally:
            await response.aclose()


class TrainerBusy(RemoteFailure):
    """429. `after`: seconds that the trainer asked for; None where it did not say."""

    def __init__(self, after: float | None) -> None:
        super().__init__("rate_limited", "the trainer answers that it is busy (429)")
        self.after = after


class _Status(RemoteFailure):
    """Another 4xx: never tried again."""

    def __init__(self, status: int) -> None:
        super().__init__("trainer_client_error", f"the trainer refused a call with status {status}")
        self.status = status


class _Again(Exception):
    """What may be better the next time. `after`: seconds that the trainer asked for."""

    def __init__(self, failure: RemoteFailure, after: float | None = None) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.after = after


async def _read(response: httpx.Response) -> bytes:
    if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        # Nobody asked for it, and what a few bytes may unpack to has no bound.
        raise RemoteFailure("trainer_error", "the trainer's answer is compressed, which was not asked for")
    chunks, size = [], 0
    async for chunk in response.aiter_bytes():
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise RemoteFailure("trainer_error", f"the trainer's answer has more than {MAX_ANSWER_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _after(response: httpx.Response) -> float | None:
    """Retry-After in seconds; None where it is missing or a date, which no trainer of ours sends."""
    given = response.headers.get("retry-after", "").strip()
    return min(float(given), CALL_SECONDS) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", given) else None


async def _dumped(make: Callable[[], dict[str, Any]]) -> bytes:
    """A body as JSON, written off the event loop: a long history with its mask takes a while.

    Raises RemoteFailure.
    """
    try:
        return await asyncio.to_thread(lambda: json.dumps(make(), separators=(",", ":"), allow_nan=False).encode())
    except (ValueError, TypeError, RecursionError):
        # NaN, or nothing of JSON: a trainer could not read it, and would take it for our mistake.
        raise RemoteFailure("internal_error", "a message of this rollout cannot be written as JSON") from None
