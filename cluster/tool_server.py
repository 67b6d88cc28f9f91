"""Tools as an MCP server, over stdio or streamable HTTP: what `rollout tools` starts.

Invariant: a call that comes over MCP is run as a session runs it, by a ToolSet: the same checks of its arguments, a
deadline, a bound on its result, and every failure as an answer that says what is wrong (`isError`), never as a broken
connection. Over stdio nothing but the protocol is written to standard output.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

from rollout.errors import RolloutError
from rollout.tool_calls import ToolCall, ToolSet
from rollout.tools import Tool

NAME = "rollout-tools"
PATH = "/mcp"
DEFAULT_HOST = "127.0.0.1"
# The tools of a session have these bounds from its limits; here they are the limits' defaults.
CALL_SECONDS = 30.0
MAX_OUTPUT_CHARS = 16_384
# A call is a few hundred bytes.
MAX_BODY_BYTES = 2**20
# Streams that listen for news never end by themselves.
DRAIN_SECONDS = 2
BACKLOG = 2048

Say = Callable[[str], object]


class ToolServerError(RolloutError):
    """A server that could not be started. The message names the address, and what to do."""

    category = "tool_server"


def make_server(
    tools: Sequence[Tool], *, call_seconds: float = CALL_SECONDS, max_output_chars: int = MAX_OUTPUT_CHARS
) -> Any:
    """The MCP server (`mcp.server.lowlevel.Server`) of these tools. Raises ValueError where two share a name.

    `call_seconds`: deadline of one call. `max_output_chars`: a longer result is an error, as in a session.
    """
    import mcp_types as types
    from mcp.server.lowlevel import Server

    tool_set = ToolSet(tools)
    schemas = {item.name: item.parameters for item in tools}
    listed = [
        types.Tool(name=item.name, description=item.description, input_schema=item.parameters) for item in tools
    ]

    async def list_tools(_context: Any, _params: Any) -> Any:
        return types.ListToolsResult(tools=listed)

    async def call_tool(_context: Any, params: Any) -> Any:
        call = ToolCall("mcp", params.name, params.arguments)
        result = await tool_set.call(call, timeout=call_seconds, max_output_chars=max_output_chars)
        # A session puts "Error: " before what a failed tool says; this server's client does that, once.
        text = result.content if result.record.ok else result.content.removeprefix("Error: ")
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=text)], is_error=not result.record.ok
        )

    return Server(NAME, on_list_tools=list_tools, on_call_tool=call_tool, get_tool_input_schema=schemas.get)


def serve(tools: Sequence[Tool], address: str | None, say: Say) -> None:
    """Serve tools until the client leaves (stdio) or a signal comes. Blocks.

    `address`: see `parse_address`; None: stdio. `say` is told where the server is, never on standard output.
    Raises ToolServerError where it cannot listen, KeyboardInterrupt where HTTP is ended by a signal.
    """
    server = make_server(tools)
    if address is None:
        if os.isatty(0):
            say(f"{names(tools)} on standard input and output, for an MCP client; Ctrl-C ends")
        _end_on_signals()
        asyncio.run(serve_stdio(server))
        return
    host, port = parse_address(address)
    listening = listen(host, port)
    url = address_of(listening)
    say(f"{names(tools)} at {url}; Ctrl-C ends")
    if not _is_loopback(listening):
        say("other machines can reach this address, and nobody is asked for a key")
    asyncio.run(http_server(server, listening).serve([listening]))


def names(tools: Sequence[Tool]) -> str:
    """The tools in a few words."""
    return f"{len(tools)} tools ({', '.join(item.name for item in tools)})"


async def serve_stdio(server: Any) -> None:
    """Serve one client on standard input and output, until it closes them."""
    from mcp.server.stdio import stdio_server

    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


def http_server(server: Any, listening: socket.socket) -> Any:
    """The `uvicorn.Server` that serves streamable HTTP at PATH: `serve([listening])` ends with a signal, cleanly."""
    import uvicorn

    host, port = listening.getsockname()[:2]
    app = server.streamable_http_app(
        streamable_http_path=PATH, transport_security=_guard(listening), max_request_body_size=MAX_BODY_BYTES
    )
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any free one. Raises ToolServerError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as failure:
        raise ToolServerError(
            f"--http: cannot listen at {_joined(host, port)}: {failure.strerror or failure}; choose another address"
        ) from None


def address_of(listening: socket.socket) -> str:
    """The URL for MCP clients on this machine."""
    host, port = listening.getsockname()[:2]
    return f"http://{_joined({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host), port)}{PATH}"


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT, [IPv6]:PORT, :PORT or PORT, the last two on loopback. Raises ToolServerError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ToolServerError(f"--http {text}: put an IPv6 address into brackets, such as [::1]:8900")
    elif not colon:
        host = ""
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ToolServerError(f"--http {text}: must be HOST:PORT, such as {DEFAULT_HOST}:8900")
    return host or DEFAULT_HOST, int(port)


def _guard(listening: socket.socket) -> Any:
    """On loopback, which names we answer to: a page in somebody's browser could reach us through one of its own."""
    from mcp.server.transport_security import TransportSecuritySettings

    if not _is_loopback(listening):
        return TransportSecuritySettings(enable_dns_rebinding_protection=False)
    own = {"127.0.0.1", "localhost", "[::1]", _bracketed(listening.getsockname()[0])}
    return TransportSecuritySettings(
        allowed_hosts=[f"{name}:*" for name in own], allowed_origins=[f"http://{name}:*" for name in own]
    )


def _is_loopback(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def _joined(host: str, port: int) -> str:
    return f"{_bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _end_on_signals() -> None:
    """End at once on a signal: the library reads standard input in a thread, and Python would wait for its next line.

    Nothing is lost: the tools hold nothing, and the client sees the end of our output.
    """

    def end(*_: object) -> None:
        os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM):
        # Only the main thread may; a server inside another program is that program's to end.
        with contextlib.suppress(ValueError):
            signal.signal(number, end)
