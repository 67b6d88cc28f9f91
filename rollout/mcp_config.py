"""The configuration of an MCP server.

Invariant: secrets need not be in it and do not leave it by accident: "${VAR}" stays as it is until `expanded`, in
the process that connects, and neither a repr nor a validation error shows the values of `env` or `headers`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rollout.errors import ConfigError

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


def expanded(name: str, kind: str, values: Mapping[str, str]) -> dict[str, str]:
    """The values of server `name` with each "${VAR}" replaced. Raises ConfigError where a variable is not set."""

    def replaced(key: str, value: str) -> str:
        def lookup(match: re.Match[str]) -> str:
            found = os.environ.get(match[1])
            if found is None:
                raise ConfigError(
                    f"MCP server {name!r}: {kind} {key!r} needs the environment variable {match[1]}, "
                    "which is not set in this process"
                )
            return found

        return _VARIABLE.sub(lookup, value)

    return {key: replaced(key, value) for key, value in values.items()}
