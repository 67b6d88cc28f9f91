"""A real MCP server for the tests: `mcp_server.py` speaks stdio, `mcp_server.py PORT [legacy]` HTTP.

Over HTTP every request needs `Authorization: Bearer sesame`. `legacy` refuses the newer protocol's first request,
so that clients fall back to the handshake and to server-side sessions, as most servers in the field have them.
"""

import base64
import os
import sys
from typing import Any

import anyio
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult, EmbeddedResource, ImageContent, TextContent, TextResourceContents

server = MCPServer("tests", log_level="ERROR")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two integers."""
    return a + b


@server.tool()
def echo(text: str) -> str:
    """Return the text."""
    return text


@server.tool()
async def slow(seconds: float) -> str:
    """Wait."""
    await anyio.sleep(seconds)
    return "done"


@server.tool()
def fail() -> str:
    """Fail."""
    raise ToolError("no such luck")


@server.tool()
def die(last_words: str) -> str:
    """End the server."""
    print(last_words, file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
def variable(name: str) -> str:
    """Read a variable of the server's environment."""
    return os.environ.get(name, "unset")


@server.tool()
def image() -> CallToolResult:
    """Return a picture of 10 bytes and a file."""
    notes = TextResourceContents(uri="file:///notes.txt", text="a note")
    return CallToolResult(
        content=[
            ImageContent(type="image", mime_type="image/png", data=base64.b64encode(b"0123456789").decode()),
            TextContent(type="text", text="a picture"),
            EmbeddedResource(type="resource", resource=notes),
        ]
    )


@server.tool()
def structured() -> CallToolResult:
    """Return structured content only."""
    return CallToolResult(content=[], structured_content={"answer": 42})


def guarded(app: Any, legacy: bool) -> Any:
    async def outer(scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers") or [])
        status = None
        if scope["type"] == "http" and headers.get(b"authorization") != b"Bearer sesame":
            status = 401
        elif legacy and headers.get(b"mcp-method") == b"server/discover":
            status = 400
        if status is None:
            await app(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    return outer


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print("hello from stderr", file=sys.stderr, flush=True)
        server.run("stdio")
    else:
        import uvicorn

        app = guarded(server.streamable_http_app(), legacy="legacy" in sys.argv)
        uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", lifespan="on")
