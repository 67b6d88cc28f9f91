"""The connection to one MCP server: made on first use, shared by all calls, and made again after it was lost.

Invariant: every connection is entered, kept and left by one task of its own (the client's task groups demand
it), and no call outlives its connection: when the server goes away, each call in flight fails at once with a
ToolError, and the next call connects anew, at most once per RECONNECT_SECONDS. A call is repeated by itself only
where the server certainly never received it.

Nothing here imports `mcp` before the first connection: trainers install without it.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from typing import Any

from rollout.errors import ToolError
from rollout.mcp_config import McpServerConfig, expanded
from rollout.mcp_transports import BAD_STATUS, BROKEN, UNDELIVERED, StderrTail, http_client, innermost, watched

# Attempts to reach one server begin no closer together than this; in between, calls fail with the last error.
RECONNECT_SECONDS = 1.0

# Pages of a server's tool list; a server whose cursor never ends would otherwise hold the connect for ever.
MAX_PAGES = 100

# Largest server-sent event (a whole tool result, images included). The client's own default is 1 MiB.
MAX_EVENT_BYTES = 16 * 1024 * 1024

# How long calls in flight may still get their own answer after a server has ended the session they share.
DRAIN_SECONDS = 1.0

# Closing a stdio server: the client waits 2 s after closing stdin, 2 s after SIGTERM, then kills the group.
CLOSE_SECONDS = 10.0

# The cause of an end while the real one is not yet known.
_STOPPED = "the client stopped"


class McpServer:
    """One configured server and its present connection."""

    def __init__(self, name: str, config: McpServerConfig) -> None:
        self._name = name
        self._config = config
        self._connection: _Connection | None = None
        self._owners: set[asyncio.Task[None]] = set()
        self._closed = False

    async def connected(self) -> _Connection:
        """The connection, made where there is none; all who ask meanwhile wait for the same attempt."""
        if self._closed:
            raise ToolError(f"MCP server {self._name!r} was closed")
        connection = self._connection
        if connection is None or connection.over:
            if connection is not None and time.monotonic() < connection.started + RECONNECT_SECONDS:
                raise connection.failure()
            env = expanded(self._name, "variable", self._config.env)
            headers = expanded(self._name, "header", self._config.headers)
            connection = self._connection = _Connection(self._name, self._config, env, headers)
            self._owners.add(connection.owner)
            connection.owner.add_done_callback(self._owners.discard)
        await connection.ready.wait()
        if connection.over:
            raise connection.failure()
        return connection

    async def call(self, label: str, arguments: dict[str, Any]) -> Any:
        """The result of one call. A second attempt follows only a request that never reached the server."""
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        again = True
        while True:
            connection = await self.connected()
            try:
                with connection.calling():
                    return await connection.client.call_tool(label, arguments)
            except MCPError as error:
                if error.error.data == UNDELIVERED and connection.over and again:
                    again = False
                    continue
                if connection.over and error.error.code == CONNECTION_CLOSED:
                    await connection.settle()
                    raise connection.failure() from None
                if error.error.data == UNDELIVERED:
                    raise ToolError(f"MCP server {self._name!r} cannot be reached: {error.message}") from None
                if error.error.data == BAD_STATUS:
                    raise ToolError(f"MCP server {self._name!r} answered {error.message}") from None
                # The client's own words where a response stream broke off under an intact connection.
                if error.error.data == BROKEN or error.message.startswith("SSE stream ended"):
                    went = f"MCP server {self._name!r} went away during the call: {error.message}"
                    raise ToolError(went) from None
                raise ToolError(error.message) from None
            except Exception as error:
                # The client refuses results that break the tool's declared output schema.
                raise ToolError(f"MCP server {self._name!r}: {type(error).__name__}: {error}") from error

    async def close(self) -> None:
        """End the connection. Calls in flight fail; later ones are refused."""
        self._closed = True
        if self._connection is not None:
            self._connection.close()
        if self._owners:
            _, late = await asyncio.wait(list(self._owners), timeout=CLOSE_SECONDS)
            for owner in late:
                owner.cancel()
            if late:
                await asyncio.wait(late, timeout=CLOSE_SECONDS)


class _Connection:
    """One connection from its start to its end, held by the task `owner`."""

    def __init__(
        self, name: str, config: McpServerConfig, env: Mapping[str, str], headers: Mapping[str, str]
    ) -> None:
        self._name = name
        self._config = config
        self._env = dict(env)
        self._headers = dict(headers)
        self._closing = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._calls = 0
        self._cause: str | None = None
        self._stderr: StderrTail | None = None
        self.started = time.monotonic()
        self.ready = asyncio.Event()
        """Set when connected, or when that has failed (then `over`)."""
        self.client: Any = None
        self.tools: list[Any] = []
        self.owner = asyncio.create_task(self._own(), name=f"mcp {name}")
        self._deadline = asyncio.get_running_loop().call_later(config.connect_seconds, self._expire)

    @property
    def over(self) -> bool:
        """Whether calls must not use it any more. It may still be clearing up."""
        return self._cause is not None

    def failure(self) -> ToolError:
        """Why it is over."""
        what = "could not be connected" if self.client is None else "went away"
        said = self._stderr.text() if self._stderr is not None else ""
        tail = f"; its last output on stderr: {said}" if said else ""
        return ToolError(f"MCP server {self._name!r} {what}: {self._cause}{tail}")

    def end(self, cause: str) -> None:
        """No further calls; the owner clears up. The first cause stays."""
        if self._cause is None:
            self._cause = cause
        self._closing.set()

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Around each call."""
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if self._calls == 0:
                self._idle.set()

    async def _drained(self) -> None:
        """Wait briefly for calls that are about to get an answer of their own, such as a refusal."""
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._idle.wait()
        except TimeoutError:
            pass

    def close(self) -> None:
        """End it on our side."""
        self.end("it was closed")
        self._idle.set()
        if not self.ready.is_set():
            self.ready.set()
            self.owner.cancel()

    async def settle(self) -> None:
        """Wait briefly for what a dying server still wrote to stderr."""
        if self._stderr is not None:
            await self._stderr.settle()

    def _stream_ended(self, error: BaseException) -> None:
        # A cancelled reader only follows from another error, which reaches the owner a moment later.
        self.end("it closed its output" if isinstance(error, StopAsyncIteration) else _STOPPED)

    def _expire(self) -> None:
        if not self.ready.is_set():
            self.end(f"no answer within {self._config.connect_seconds:g} s")
            # Waiters learn it now; clearing up after a stuck server takes the owner seconds more.
            self.ready.set()
            self.owner.cancel()

    async def _own(self) -> None:
        try:
            # About a second, the first time.
            await asyncio.to_thread(importlib.import_module, "mcp")
            async with AsyncExitStack() as stack:
                client = await self._enter(stack)
                self.tools = await self._listed(client)
                if not self.over:
                    self.client = client
                self.ready.set()
                await self._closing.wait()
                await self._drained()
        except asyncio.CancelledError:
            self.end("its task was cancelled")
            raise
        except Exception as error:
            if self._cause == _STOPPED:
                self._cause = None
            self.end(innermost(error))
            await self.settle()
        finally:
            self._deadline.cancel()
            self.ready.set()
            if self._stderr is not None:
                self._stderr.close()

    async def _enter(self, stack: AsyncExitStack) -> Any:
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import stdio_client
        from mcp.client.streamable_http import streamable_http_client

        if self._config.command is None:
            http = await stack.enter_async_context(http_client(self._headers, self._config.connect_seconds, self.end))
            transport = streamable_http_client(self._config.url, http_client=http, max_sse_event_size=MAX_EVENT_BYTES)
            return await stack.enter_async_context(Client(watched(transport, self._stream_ended)))
        program, *arguments = self._config.command
        parameters = StdioServerParameters(command=program, args=arguments, env=self._env, cwd=self._config.cwd)
        read_end, write_end = os.pipe()
        with os.fdopen(write_end, "w") as errlog:
            self._stderr = await StderrTail.of(read_end)
            transport = stdio_client(parameters, errlog=errlog)
            # Our copy of the write end goes with this block: stderr then ends when the server does.
            return await stack.enter_async_context(Client(watched(transport, self._stream_ended)))

    @staticmethod
    async def _listed(client: Any) -> list[Any]:
        tools: list[Any] = []
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            page = await client.list_tools(cursor=cursor)
            tools.extend(page.tools)
            cursor = page.next_cursor
            if cursor is None:
                return tools
        raise ToolError(f"its tool list has more than {MAX_PAGES} pages")
