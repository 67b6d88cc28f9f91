"""Agents: an environment with a name, limits, scopes and hooks, spoken to over OpenAI's protocol.

Invariant: an agent is a constant. What belongs to one request (its environment, tools, messages) is made for that
request and closed at its end, however it ends, so concurrent requests never meet in it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from rollout.agents.hooks import Hook
from rollout.agents.scopes import SCOPES, Scope
from rollout.environment import Environment, EnvironmentFactory
from rollout.errors import EnvironmentError_, RolloutError
from rollout.mcp_tools import McpServers
from rollout.tasks import Task
from rollout.tool_calls import run_anywhere
from rollout.tools import Tool

logger = logging.getLogger(__name__)

# A name is one segment of a URL.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class AgentLimits(BaseModel):
    """Limits of one request to an agent. Times are seconds. The environment's own limits are those of sessions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_turns: int = Field(default=8, ge=1, le=1000)
    """Most model calls of one request; reached with the agent's own tool calls open, it ends as `length`."""

    tool_seconds: float = Field(default=30.0, gt=0)
    """Deadline of one tool call; the model is told, the request goes on."""

    total_seconds: float = Field(default=600.0, gt=0)
    """Deadline of the whole request; it ends with an error of status 504."""

    environment_seconds: float = Field(default=60.0, gt=0)
    """Deadline of the environment's `setup` and `close`, and of its MCP servers' tool lists."""

    hook_seconds: float = Field(default=10.0, gt=0)
    """Deadline of each hook."""

    max_tool_calls_per_turn: int = Field(default=16, ge=1)
    """Calls of the agent's own tools beyond this in one turn are answered with an error."""

    max_tool_output_chars: int = Field(default=16_384, ge=16)
    """A longer tool result is an error to the model."""


@dataclass(frozen=True)
class Agent:
    """One agent. Raises ValueError for a name that is no URL segment or an unknown scope."""

    name: str
    environment: EnvironmentFactory = field(repr=False)
    """System prompt, tools and MCP servers; one instance for each request."""
    description: str = ""
    limits: AgentLimits = field(default_factory=AgentLimits)
    scopes: Mapping[str, Scope] = field(default_factory=dict)
    """Who may use a tool, by the tool's name; those not named are for `all`."""
    owners: frozenset[str] = frozenset()
    """Names of the callers that have the scope `owner` here."""
    hooks: Sequence[Hook] = ()
    model: str | None = None
    """The model's name in the engine; None: the engine's own."""
    show_tool_calls: bool = False
    """Show the agent's own tool calls as extra chunks with an `agent_event` and an empty delta."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"agent name {self.name!r}: use up to 128 letters, digits, `_`, `.` and `-`, a letter or digit first"
            )
        for tool, scope in self.scopes.items():
            if scope not in SCOPES:
                raise ValueError(
                    f"agent {self.name!r}: scope {scope!r} of tool {tool!r} is unknown; use {', '.join(SCOPES)}"
                )


@dataclass(frozen=True)
class Opened:
    """An agent's environment, ready for one request."""

    environment: Environment
    tools: list[Tool]
    """Its own and its MCP servers' tools, of every scope."""


@asynccontextmanager
async def opened(agent: Agent, task: Task | None, mcp: McpServers | None) -> AsyncIterator[Opened]:
    """An agent's environment, set up for `task` (None: only looked at) and closed in the end.

    Raises EnvironmentError_ for whatever it raises, and for a scope that names no tool.
    """
    try:
        environment = agent.environment()
    except RolloutError:
        raise
    except Exception as failure:
        raise EnvironmentError_(f"agent {agent.name!r} could not be made: {_said(failure)}") from failure
    try:
        tools = await _tools(agent, environment, mcp)
        if task is not None:
            await _ask(agent, environment, "setup", task)
        yield Opened(environment, tools)
    finally:
        # Cancelled or not, what `setup` took is released; its failure must not hide the answer.
        closing = asyncio.ensure_future(_ask(agent, environment, "close"))
        try:
            await asyncio.shield(closing)
        except RolloutError as failure:
            logger.warning("agent %s: %s", agent.name, failure)


async def _tools(agent: Agent, environment: Environment, mcp: McpServers | None) -> list[Tool]:
    tools = environment.all_tools()
    for server in environment.mcp_servers:
        if mcp is None:
            raise EnvironmentError_(f"agent {agent.name!r} wants MCP server {server!r}, but none are configured")
        try:
            async with asyncio.timeout(agent.limits.environment_seconds) as deadline:
                tools.extend(await mcp.tools(server))
        except TimeoutError as failure:
            if not deadline.expired():
                raise
            raise EnvironmentError_(
                f"MCP server {server!r} of agent {agent.name!r} did not list its tools"
            ) from failure
    names = [tool.name for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise EnvironmentError_(f"agent {agent.name!r} has two tools called {twice[0]!r}")
    if missing := sorted(set(agent.scopes) - set(names)):
        # A misspelt name would leave the real tool open to everybody.
        raise EnvironmentError_(f"agent {agent.name!r}: scopes.{missing[0]} names no tool; it has {names}")
    return tools


async def _ask(agent: Agent, environment: Environment, name: str, *arguments: Any) -> None:
    if getattr(type(environment), name) is getattr(Environment, name):
        return
    method: Callable[..., Any] = getattr(environment, name)
    seconds = agent.limits.environment_seconds
    try:
        async with asyncio.timeout(seconds) as deadline:
            await run_anywhere(functools.partial(method, *arguments), {})
    except TimeoutError as failure:
        took = f"took longer than {seconds:g} s" if deadline.expired() else f"raised {failure!r}"
        raise EnvironmentError_(f"{name} of agent {agent.name!r} {took}") from failure
    except RolloutError:
        raise
    except Exception as failure:
        raise EnvironmentError_(f"{name} of agent {agent.name!r} raised {_said(failure)}") from failure


def _said(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {failure}"
