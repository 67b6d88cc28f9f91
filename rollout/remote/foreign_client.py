"""What a trainer says to a remote rollout server: its tools, a rollout from beginning to end, or the start of one.

Invariant: whatever comes back is bounded in size and is an answer of the protocol, or an error in plain words. A
rollout that the server may have begun is never sent twice, unless the protocol says that the server knows it again.
All connections of a client are its own, and there are only so many of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from rollout.errors import RemoteDied, RemoteError
from rollout.remote.hosts import AllowedHosts, HostRefused, HostUnknown
from rollout.remote.wire import (
    INIT_PATH,
    ROLLOUT_PATH,
    TOOLS_PATH,
    Generation,
    InitRequest,
    InitResponse,
    RolloutRequest,
    RolloutResponse,
    ToolsResponse,
)

M = TypeVar("M", bound=BaseModel)

CONNECT_SECONDS = 10.0
# Of what is answered at once: the tools, and B's 202.
ANSWER_SECONDS = 60.0
# A server that cannot be reached is tried again for so long: it may be starting.
CONNECT_PATIENCE_S = 30.0
# Between tries: doubled each time up to a limit, which also bounds what a server's Retry-After can ask for.
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0
# Idle connections are dropped before a server drops them, which a rollout that is just being sent would not survive.
KEEP_ALIVE_S = 2.0
# B's init has the rollout's id in it, so that a server knows a repetition.
INIT_REPEATS = 2
# An answer of A holds the whole conversation.
MAX_ANSWER_BYTES = 64 * 2**20
MAX_TOOLS_BYTES = 2**20
# Larger answers are parsed off the event loop.
OFFLOAD_BYTES = 2**16
# Of a server's own words in an error.
MAX_SAID_CHARS = 500


@dataclass(frozen=True)
class RemoteSpec:
    """Where the sessions of a run are played."""

    url: str
    """http(s)://host[:port][/prefix], without a slash at its end."""
    generation: Generation
    key_env: str | None = None
    """Environment variable of the workers that holds the server's key."""


class ForeignClient:
    """One rollout server, as the sessions of one run in one worker speak to it."""

    def __init__(
        self,
        spec: RemoteSpec,
        connections: int,
        *,
        hosts: AllowedHosts | None = None,
        env: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`connections`: at most; a rollout of A holds one to its end. `hosts`: where it may lead; None: anywhere, as
        for a URL that the cluster's own config names. `transport`: httpx's, for tests.

        Raises RemoteError where the key's variable is not set.
        """
        self.spec = spec
        self._hosts = hosts
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        if spec.key_env is not None:
            key = (os.environ if env is None else env).get(spec.key_env, "").strip()
            if not key:
                raise RemoteError(
                    f"the environment variable {spec.key_env} (environment.key_env) is not set where the session "
                    "workers run"
                )
            headers["authorization"] = f"Bearer {key}"
        self._http = httpx.AsyncClient(
            headers=headers,
            # Sessions have a deadline of their own, and wait for a connection as they wait for an answer.
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=connections, keepalive_expiry=KEEP_ALIVE_S),
            follow_redirects=False,
            # A proxy of the machine's environment would see keys and conversations.
            trust_env=False,
            transport=transport,
        )
        self._tools: asyncio.Task[list[dict[str, Any]]] | None = None

    async def tools(self) -> list[dict[str, Any]]:
        """The server's tools in OpenAI's form, asked for once; none where it has no such address.

        Raises RemoteError.
        """
        asked = self._tools
        if asked is None or (asked.done() and (asked.cancelled() or asked.exception() is not None)):
            asked = self._tools = asyncio.create_task(self._ask_tools())
            # Its failure is told to those who wait; where nobody does any more, it is no news.
            asked.add_done_callback(lambda done: done.cancelled() or done.exception())
        # Many sessions wait for one answer; that one of them is cancelled is not the others' business.
        return await asyncio.shield(asked)

    async def rollout(self, request: RolloutRequest) -> RolloutResponse:
        """Generations A and A1: a whole rollout. Waits as long as it takes. Raises RemoteDied, RemoteError."""
        content = request.model_dump_json().encode()
        answer = await self._until_accepted(lambda: self._send("POST", ROLLOUT_PATH, content, MAX_ANSWER_BYTES))
        return await _parsed(RolloutResponse, answer, f"POST {ROLLOUT_PATH}")

    async def init(self, request: InitRequest) -> InitResponse:
        """Generation B: begin a rollout; the server reports its end. Raises RemoteDied, RemoteError."""
        content = request.model_dump_json(exclude_none=True).encode()

        async def begin() -> _Answer:
            for left in reversed(range(INIT_REPEATS + 1)):
                try:
                    async with asyncio.timeout(ANSWER_SECONDS):
                        return await self._send("POST", INIT_PATH, content, MAX_TOOLS_BYTES)
                except TimeoutError:
                    raise RemoteDied(f"{self._where} did not accept a rollout within {ANSWER_SECONDS:g} s") from None
                except httpx.ConnectError:
                    raise
                except httpx.TransportError:
                    if not left:
                        raise
                    await asyncio.sleep(FIRST_PAUSE_S)
            raise AssertionError("the last repetition returns or raises")

        return await _parsed(InitResponse, await self._until_accepted(begin), f"POST {INIT_PATH}")

    async def close(self) -> None:
        """Drop all connections."""
        if self._tools is not None:
            self._tools.cancel()
            with contextlib.suppress(asyncio.CancelledError, RemoteError):
                await self._tools
        await self._http.aclose()

    @property
    def _where(self) -> str:
        return f"the rollout server at {self.spec.url}"

    async def _ask_tools(self) -> list[dict[str, Any]]:
        async def get() -> _Answer:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self._send("GET", TOOLS_PATH, None, MAX_TOOLS_BYTES)

        try:
            answer = await self._until_accepted(get, missing_is_fine=True)
        except TimeoutError:
            raise RemoteDied(f"{self._where} did not answer GET /tools within {ANSWER_SECONDS:g} s") from None
        if answer.status == 404:
            return []
        return (await _parsed(ToolsResponse, answer, f"GET {TOOLS_PATH}")).tools

    async def _until_accepted(self, send: Any, *, missing_is_fine: bool = False) -> _Answer:
        """Sends until the server takes it: while it is full, and for a while where it cannot be reached."""
        loop = asyncio.get_running_loop()
        patience = loop.time() + CONNECT_PATIENCE_S
        pause = FIRST_PAUSE_S
        while True:
            wait = pause
            try:
                answer: _Answer = await send()
            except (httpx.ConnectError, httpx.ConnectTimeout) as failure:
                # Nothing was sent.
                if loop.time() + pause > patience:
                    raise RemoteDied(f"{self._where} cannot be reached: {_name(failure)}") from None
            except (httpx.HTTPError, httpx.InvalidURL) as failure:
                raise RemoteDied(f"{self._where} went away: {_name(failure)}") from None
            else:
                if answer.retry_after is None:
                    return self._checked(answer, missing_is_fine)
                wait = max(pause, min(answer.retry_after, MAX_PAUSE_S))
            await asyncio.sleep(wait)
            pause = min(2 * pause, MAX_PAUSE_S)

    def _checked(self, answer: _Answer, missing_is_fine: bool) -> _Answer:
        if answer.status in (200, 202) or (missing_is_fine and answer.status == 404):
            return answer
        said = answer.content.decode("utf-8", "replace").strip()
        shown = said if len(said) <= MAX_SAID_CHARS else said[: MAX_SAID_CHARS - 1] + "…"
        text = f"{self._where} answered {answer.status}" + (f": {shown}" if shown else "")
        raise RemoteDied(text) if answer.status >= 500 else RemoteError(text)

    async def _send(self, method: str, path: str, content: bytes | None, limit: int) -> _Answer:
        headers = {} if content is None else {"content-type": "application/json"}
        url = self.spec.url + path
        try:
            if self._hosts is None:
                request = self._http.build_request(method, url, content=content, headers=headers)
                response = await self._http.send(request, stream=True)
            else:
                response = await self._hosts.send(self._http, method, url, content=content, headers=headers)
        except HostRefused as refusal:
            raise RemoteError(f"environment.remote: {str(refusal).removeprefix('server_url: ')}") from None
        except HostUnknown as failure:
            # The name service may know it again in a moment.
            raise RemoteDied(f"environment.remote: {str(failure).removeprefix('server_url: ')}") from None
        async with contextlib.aclosing(response):
            if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
                # One chunk from the network may unpack to gigabytes before any limit is looked at.
                raise RemoteError(
                    f"{self._where} answered {method} {path} compressed, which was not asked for: it must heed "
                    "accept-encoding"
                )
            chunks, size = [], 0
            async for chunk in response.aiter_bytes():
                size += len(chunk)
                if size > limit:
                    raise RemoteError(f"{self._where} answered {method} {path} with more than {limit} bytes")
                chunks.append(chunk)
            return _Answer(response.status_code, b"".join(chunks), _busy_for(response))


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    content: bytes
    retry_after: float | None
    """Seconds; None: the server does not ask us to come again."""


def _busy_for(response: httpx.Response) -> float | None:
    """A server that is full says 429, or 503 with a time. A 503 without one is a failure like any other 5xx."""
    given = response.headers.get("retry-after", "")
    seconds = float(given) if re.fullmatch(r"\d{1,6}(\.\d{1,6})?", given) else None
    if response.status_code == 429:
        return 0.0 if seconds is None else seconds
    return seconds if response.status_code == 503 else None


async def _parsed(model: type[M], answer: _Answer, what: str) -> M:
    try:
        if len(answer.content) < OFFLOAD_BYTES:
            return model.model_validate_json(answer.content)
        return await asyncio.to_thread(model.model_validate_json, answer.content)
    except ValidationError as failure:
        first = failure.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the body"
        raise RemoteError(f"the answer to {what} is not one of the protocol: {place}: {first['msg']}") from None


def _name(failure: Exception) -> str:
    text = str(failure).strip()[:MAX_SAID_CHARS]
    return f"{type(failure).__name__}: {text}" if text else type(failure).__name__
