"""Tools of MCP servers (stdio and streamable HTTP), used in the same way as local ones.

Invariant: every connection is entered, kept and left by one task of its own (the client's task groups demand
it), and no call outlives its connection: when the server goes away, each call in flight fails at once with a
ToolError, and the next call connects anew, at most once per RECONNECT_SECONDS. A call is repeated by itself only
where the server certainly never received it.

Nothing here imports `mcp` before the first connection: trainers install without it.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rollout.errors import ConfigError, ToolError
from rollout.tools import Tool, _without_titles

# Attempts to reach one server begin no closer together than this; in between, calls fail with the last error.
RECONNECT_SECONDS = 1.0

# Pages of a server's tool list; a server whose cursor never ends would otherwise hold the connect for ever.
MAX_PAGES = 100

# Longest silence on one HTTP response. Calls have deadlines of their own; this ends what nobody waits for.
HTTP_READ_SECONDS = 600.0

# Largest server-sent event (a whole tool result, images included). The client's own default is 1 MiB.
MAX_EVENT_BYTES = 16 * 1024 * 1024

# How much of a stdio server's stderr is kept for error messages, and how long an error waits for its end.
STDERR_TAIL_BYTES = 800
STDERR_SETTLE_SECONDS = 0.2

# How long calls in flight may still get their own answer after a server has ended the session they share.
DRAIN_SECONDS = 1.0

# Closing a stdio server: the client waits 2 s after closing stdin, 2 s after SIGTERM, then kills the group.
CLOSE_SECONDS = 10.0

# Marks the errors that we put in the place of an answer (JSON-RPC `error.data`).
_UNDELIVERED = "rollout-undelivered"
_BROKEN = "rollout-broken"
_BAD_STATUS = "rollout-bad-status"

# The cause of an end while the real one is not yet known.
_STOPPED = "the client stopped"

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class McpServerConfig(BaseModel):
    """One MCP server: a command (stdio) or a url (streamable HTTP)."""

    # Inputs stay out of validation errors as well: they may hold secrets.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    command: list[str] | None = Field(default=None, min_length=1)
    """Program and arguments of a stdio server."""

    url: str | None = None
    """Address of a streamable HTTP server."""

    env: dict[str, str] = Field(default_factory=dict, repr=False)
    """Variables of a stdio server, on top of PATH, HOME and the like; it inherits no others. "${VAR}" in a
    value is taken from this process's environment when the connection is made."""

    cwd: str | None = None
    """Working directory of a stdio server."""

    headers: dict[str, str] = Field(default_factory=dict, repr=False)
    """Headers of every HTTP request, with "${VAR}" as in `env`."""

    connect_seconds: float = Field(default=30.0, gt=0)
    """Deadline of connecting: start, handshake and the list of tools."""

    @model_validator(mode="after")
    def _check(self) -> McpServerConfig:
        if (self.command is None) == (self.url is None):
            raise ValueError("an MCP server needs exactly one of `command` (stdio) and `url` (HTTP)")
        if self.command is None and (self.env or self.cwd is not None):
            raise ValueError("`env` and `cwd` belong to `command`; a server with a `url` is not started by us")
        if self.url is None and self.headers:
            raise ValueError("`headers` belong to `url`; a stdio server gets its secrets from `env`")
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("`url` must be an http:// or https:// address")
        return self


class McpServers:
    """The MCP servers of one process: one connection each, shared by all sessions, made on first use.

    Belongs to one event loop; `close` must run on it.
    """

    def __init__(self, configs: Mapping[str, McpServerConfig]) -> None:
        self._servers = {name: _Server(name, config) for name, config in configs.items()}

    async def tools(self, name: str) -> list[Tool]:
        """The tools of a server, as it listed them when the present connection was made.

        Raises ConfigError for an unknown server or a missing variable, ToolError where it cannot be reached.
        The tools stay valid when the connection is lost and made again.
        """
        server = self._servers.get(name)
        if server is None:
            known = ", ".join(self._servers) or "none"
            raise ConfigError(f"there is no MCP server called {name!r}; the servers are: {known}")
        connection = await server.connected()
        return [server.tool(listed) for listed in connection.tools]

    async def close(self) -> None:
        """End all connections and their stdio servers. Calls in flight fail; later ones are refused."""
        await asyncio.gather(*(server.close() for server in self._servers.values()))


class _Server:
    """One configured server and its present connection."""

    def __init__(self, name: str, config: McpServerConfig) -> None:
        self._name = name
        self._config = config
        self._connection: _Connection | None = None
        self._owners: set[asyncio.Task[None]] = set()
        self._closed = False

    def tool(self, listed: Any) -> Tool:
        label = listed.name

        async def run(**arguments: Any) -> str:
            return await self._call(label, arguments)

        schema = _clean_schema(listed.input_schema, f"MCP server {self._name!r}: tool {label!r}")
        return Tool(label, listed.description or listed.title or label, schema, run)

    async def connected(self) -> _Connection:
        """The connection, made where there is none; all who ask meanwhile wait for the same attempt."""
        if self._closed:
            raise ToolError(f"MCP server {self._name!r} was closed")
        connection = self._connection
        if connection is None or connection.over:
            if connection is not None and time.monotonic() < connection.started + RECONNECT_SECONDS:
                raise connection.failure()
            env = self._filled("variable", self._config.env)
            headers = self._filled("header", self._config.headers)
            connection = self._connection = _Connection(self._name, self._config, env, headers)
            self._owners.add(connection.owner)
            connection.owner.add_done_callback(self._owners.discard)
        await connection.ready.wait()
        if connection.over:
            raise connection.failure()
        return connection

    async def close(self) -> None:
        self._closed = True
        if self._connection is not None:
            self._connection.close()
        if self._owners:
            _, late = await asyncio.wait(list(self._owners), timeout=CLOSE_SECONDS)
            for owner in late:
                owner.cancel()
            if late:
                await asyncio.wait(late, timeout=CLOSE_SECONDS)

    async def _call(self, label: str, arguments: dict[str, Any]) -> str:
        """One call. A second attempt follows only a request that never reached the server."""
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        again = True
        while True:
            connection = await self.connected()
            try:
                with connection.calling():
                    result = await connection.client.call_tool(label, arguments)
            except MCPError as error:
                if error.error.data == _UNDELIVERED and connection.over and again:
                    again = False
                    continue
                if connection.over and error.error.code == CONNECTION_CLOSED:
                    await connection.settle()
                    raise connection.failure() from None
                if error.error.data == _UNDELIVERED:
                    raise ToolError(f"MCP server {self._name!r} cannot be reached: {error.message}") from None
                if error.error.data == _BAD_STATUS:
                    raise ToolError(f"MCP server {self._name!r} answered {error.message}") from None
                # The client's own words where a response stream broke off under an intact connection.
                if error.error.data == _BROKEN or error.message.startswith("SSE stream ended"):
                    went = f"MCP server {self._name!r} went away during the call: {error.message}"
                    raise ToolError(went) from None
                raise ToolError(error.message) from None
            except Exception as error:
                # The client refuses results that break the tool's declared output schema.
                raise ToolError(f"MCP server {self._name!r}: {type(error).__name__}: {error}") from error
            text = _result_text(result)
            if result.is_error:
                raise ToolError(text or f"{label} failed without a message")
            return text

    def _filled(self, kind: str, values: Mapping[str, str]) -> dict[str, str]:
        """The values with each "${VAR}" replaced. Raises ConfigError where a variable is not set."""

        def filled(key: str, value: str) -> str:
            def lookup(match: re.Match[str]) -> str:
                found = os.environ.get(match[1])
                if found is None:
                    raise ConfigError(
                        f"MCP server {self._name!r}: {kind} {key!r} needs the environment variable {match[1]}, "
                        "which is not set in this process"
                    )
                return found

            return _VARIABLE.sub(lookup, value)

        return {key: filled(key, value) for key, value in values.items()}


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
        self._stderr: _Tail | None = None
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
            self.end(_innermost(error))
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
            http = await stack.enter_async_context(_http_client(self))
            transport = streamable_http_client(self._config.url, http_client=http, max_sse_event_size=MAX_EVENT_BYTES)
            return await stack.enter_async_context(Client(_watched(transport, self._stream_ended)))
        program, *arguments = self._config.command
        parameters = StdioServerParameters(command=program, args=arguments, env=self._env, cwd=self._config.cwd)
        read_end, write_end = os.pipe()
        with os.fdopen(write_end, "w") as errlog:
            self._stderr = await _Tail.of(read_end)
            transport = stdio_client(parameters, errlog=errlog)
            # Our copy of the write end goes with this block: stderr then ends when the server does.
            return await stack.enter_async_context(Client(_watched(transport, self._stream_ended)))

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

    @property
    def headers(self) -> dict[str, str]:
        return self._headers

    @property
    def connect_seconds(self) -> float:
        return self._config.connect_seconds


class _Tail(asyncio.Protocol):
    """Reads a stdio server's stderr, so that it neither blocks nor reaches our console, and keeps its end."""

    def __init__(self) -> None:
        self._data = b""
        self._ended = asyncio.Event()
        self._transport: asyncio.BaseTransport | None = None

    @classmethod
    async def of(cls, descriptor: int) -> _Tail:
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
async def _watched(transport: Any, ended: Callable[[BaseException], None]) -> AsyncIterator[tuple[Any, Any]]:
    async with transport as (read, write):
        yield _WatchedStream(read, ended), write


def _http_client(connection: _Connection) -> Any:
    """An HTTP client whose failures stay with the request that met them.

    Inside the MCP client an exception of one request would tear down all others; here it becomes a JSON-RPC
    error in the place of the answer. Only a server that has forgotten our session ends the MCP connection: one
    that is down for a while is found again by the next request.
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
                answer = substitute(request, _innermost(error), _UNDELIVERED)
            except httpx2.TransportError as error:
                answer = substitute(request, _innermost(error), _BROKEN)
            else:
                if response.status_code == 404 and MCP_SESSION_ID in request.headers:
                    connection.end("it has ended our session")
                    answer = substitute(request, "it has ended our session", _UNDELIVERED)
                elif _is_rpc_error(body):
                    return response
                else:
                    text = f"HTTP {response.status_code} {response.reason_phrase}".strip()
                    answer = substitute(request, text, _BAD_STATUS)
            # Taking leave of a session is a courtesy: no one waits for the answer, and it must not log a warning.
            return httpx2.Response(204, request=request) if request.method == "DELETE" else answer

    timeout = httpx2.Timeout(HTTP_READ_SECONDS, connect=connection.connect_seconds, pool=None)
    # As many calls at once as there are sessions: a full pool would fail them for no fault of the server.
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
    return FailsAlone(headers=connection.headers, timeout=timeout, limits=limits)


def _is_rpc_error(body: bytes) -> bool:
    try:
        answer = json.loads(body)
    except ValueError:
        return False
    return isinstance(answer, dict) and isinstance(answer.get("error"), dict) and "code" in answer["error"]


def _innermost(error: BaseException) -> str:
    """`Class: message` of the first real error inside the groups that task groups wrap around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    name = type(error).__name__
    return str(error) if name == "MCPError" else f"{name}: {error}"


def _clean_schema(schema: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A server's input schema in the form of local tools. Raises ToolError where it is not a JSON schema.

    The dialect's name stays only where the schema is not valid without it (tuples of draft 7, for one).
    """
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    rest = {key: value for key, value in _without_titles(dict(schema)).items() if key != "$schema"}
    head = {key: rest.pop(key, empty) for key, empty in (("type", "object"), ("properties", {}), ("required", []))}
    clean = {**head, **rest}
    dialects = [clean] + ([{**clean, "$schema": schema["$schema"]}] if "$schema" in schema else [])
    for candidate in dialects:
        try:
            validator_for(candidate).check_schema(candidate)
        except SchemaError as error:
            reason = error.message
        else:
            return candidate
    raise ToolError(f"{where} has an input schema that is not valid: {reason}")


def _result_text(result: Any) -> str:
    """What the model reads of a result: its text and notes on all else, or its structured content as JSON."""
    parts: list[str] = []
    has_text = False
    for item in result.content:
        text = _text_of(item)
        has_text = has_text or text is not None
        parts.append(_note(item) if text is None else text)
    if not has_text and result.structured_content is not None:
        parts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return "\n".join(parts)


def _text_of(item: Any) -> str | None:
    """The text of a text block, or of a text file that a server embeds in its result."""
    holder = item.resource if item.type == "resource" else item
    text = getattr(holder, "text", None)
    return text if isinstance(text, str) else None


def _note(item: Any) -> str:
    if item.type in ("image", "audio"):
        return f"[{item.type} {item.mime_type}, {_decoded_size(item.data)} bytes]"
    if item.type == "resource":
        kind = item.resource.mime_type or "unknown type"
        return f"[resource {item.resource.uri} {kind}, {_decoded_size(item.resource.blob)} bytes]"
    if item.type == "resource_link":
        return f"[resource {item.uri} {item.mime_type or 'unknown type'}, not included]"
    return f"[{item.type}]"


def _decoded_size(data: str) -> int:
    """Bytes in a base64 text."""
    return len(data) * 3 // 4 - data.count("=", -2)
