"""What lies between the `mcp` client and a server: HTTP requests, read streams, a stdio server's stderr.

Invariant: a failure is told where it belongs. One of an HTTP request stays with that request, as an error in the
place of its answer that says whether the server can have received it; the end of a read stream is told to its
watcher before any caller learns of it; stderr is read as it comes, and its last words are kept for the error.

Nothing here imports `mcp` or `httpx2` before the first connection: trainers install without them.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

# Longest silence on one HTTP response. Calls have deadlines of their own; this ends what nobody waits for.
HTTP_READ_SECONDS = 600.0

# How much of a stdio server's stderr is kept for error messages, and how long an error waits for its end.
STDERR_TAIL_BYTES = 800
STDERR_SETTLE_SECONDS = 0.2

# Marks the errors that we put in the place of an answer (JSON-RPC `error.data`).
UNDELIVERED = "rollout-undelivered"
BROKEN = "rollout-broken"
BAD_STATUS = "rollout-bad-status"


class StderrTail(asyncio.Protocol):
    """Reads a stdio server's stderr, so that it neither blocks nor reaches our console, and keeps its end."""

    def __init__(self) -> None:
        self._data = b""
        self._ended = asyncio.Event()
        self._transport: asyncio.BaseTransport | None = None

    @classmethod
    async def of(cls, descriptor: int) -> StderrTail:
        pipe = os.fdopen(descriptor, "rb", buffering=0)
        _, tail = await asyncio.get_running_loop().connect_read_pipe(cls, pipe)
        return tail

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data = (self._data + data)[-STDERR_TAIL_BYTES:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended.set()

    async def settle(self) -> None:
        try:
            async with asyncio.timeout(STDERR_SETTLE_SECONDS):
                await self._ended.wait()
        except TimeoutError:
            pass

    def text(self) -> str:
        return self._data.decode(errors="replace").strip()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class _WatchedStream:
    """A client's read stream that tells when it ends, however it ends, before any caller learns of it."""

    def __init__(self, stream: Any, ended: Callable[[BaseException], None]) -> None:
        self._stream = stream
        self._ended = ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __aiter__(self) -> _WatchedStream:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._stream.__anext__()
        except BaseException as error:
            self._ended(error)
            raise

    async def __aenter__(self) -> _WatchedStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stream.aclose()


@asynccontextmanager
async def watched(transport: Any, ended: Callable[[BaseException], None]) -> AsyncIterator[tuple[Any, Any]]:
    async with transport as (read, write):
        yield _WatchedStream(read, ended), write


def http_client(headers: Mapping[str, str], connect_seconds: float, end: Callable[[str], None]) -> Any:
    """An HTTP client whose failures stay with the request that met them.

    Inside the MCP client an exception of one request would tear down all others; here it becomes a JSON-RPC
    error in the place of the answer. Only a server that has forgotten our session ends the MCP connection, by
    `end`: one that is down for a while is found again by the next request.
    """
    import httpx2
    from mcp.client.streamable_http import MCP_SESSION_ID
    from mcp_types import CONNECTION_CLOSED

    def substitute(request: Any, message: str, data: str) -> Any:
        error = {"code": CONNECTION_CLOSED, "message": message, "data": data}
        return httpx2.Response(503, json={"jsonrpc": "2.0", "id": None, "error": error}, request=request)

    class FailsAlone(httpx2.AsyncClient):
        async def send(self, request: Any, **options: Any) -> Any:
            try:
                response = await super().send(request, **options)
                if response.status_code < 400:
                    return response
                body = await response.aread()
            except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
                answer = substitute(request, innermost(error), UNDELIVERED)
            except httpx2.TransportError as error:
                answer = substitute(request, innermost(error), BROKEN)
            else:
                if response.status_code == 404 and MCP_SESSION_ID in request.headers:
                    end("it has ended our session")
                    answer = substitute(request, "it has ended our session", UNDELIVERED)
                elif _is_rpc_error(body):
                    return response
                else:
                    text = f"HTTP {response.status_code} {response.reason_phrase}".strip()
                    answer = substitute(request, text, BAD_STATUS)
            # Taking leave of a session is a courtesy: no one waits for the answer, and it must not log a warning.
            return httpx2.Response(204, request=request) if request.method == "DELETE" else answer

    timeout = httpx2.Timeout(HTTP_READ_SECONDS, connect=connect_seconds, pool=None)
    # As many calls at once as there are sessions: a full pool would fail them for no fault of the server.
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
    return FailsAlone(headers=dict(headers), timeout=timeout, limits=limits)


def _is_rpc_error(body: bytes) -> bool:
    try:
        answer = json.loads(body)
    except ValueError:
        return False
    return isinstance(answer, dict) and isinstance(answer.get("error"), dict) and "code" in answer["error"]


def innermost(error: BaseException) -> str:
    """`Class: message` of the first real error inside the groups that task groups wrap around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    name = type(error).__name__
    return str(error) if name == "MCPError" else f"{name}: {error}"
