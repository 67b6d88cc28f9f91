"""Tools of MCP servers (stdio and streamable HTTP), used in the same way as local ones.

Invariant: a session cannot tell them from local tools: the schema has the form of a local tool's and is valid, a
result is text whatever the server sent, and a result that reports an error is raised as a ToolError. The tools of
a server stay usable when its connection is lost and made again.

Nothing here imports `mcp` before the first connection: trainers install without it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from rollout.errors import ConfigError, ToolError
from rollout.mcp_config import McpServerConfig
from rollout.mcp_connection import McpServer
from rollout.tools import Tool, without_titles


class McpServers:
    """The MCP servers of one process: one connection each, shared by all sessions, made on first use.

    Belongs to one event loop; `close` must run on it.
    """

    def __init__(self, configs: Mapping[str, McpServerConfig]) -> None:
        self._servers = {name: McpServer(name, config) for name, config in configs.items()}

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
        return [_tool(name, server, listed) for listed in connection.tools]

    async def close(self) -> None:
        """End all connections and their stdio servers. Calls in flight fail; later ones are refused."""
        await asyncio.gather(*(server.close() for server in self._servers.values()))


def _tool(name: str, server: McpServer, listed: Any) -> Tool:
    label = listed.name

    async def run(**arguments: Any) -> str:
        result = await server.call(label, arguments)
        text = _result_text(result)
        if result.is_error:
            raise ToolError(text or f"{label} failed without a message")
        return text

    schema = _clean_schema(listed.input_schema, f"MCP server {name!r}: tool {label!r}")
    return Tool(label, listed.description or listed.title or label, schema, run)


def _clean_schema(schema: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A server's input schema in the form of local tools. Raises ToolError where it is not a JSON schema.

    The dialect's name stays only where the schema is not valid without it (tuples of draft 7, for one).
    """
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    rest = {key: value for key, value in without_titles(dict(schema)).items() if key != "$schema"}
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
