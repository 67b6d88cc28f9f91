"""Agents by name, added and removed while they are spoken to.

Invariant: a name has at most one agent. A request keeps the agent that it began with, so that removing one ends
nothing that runs. Agents that are added come before those that the resolver makes.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from rollout.agents.agent import Agent, opened
from rollout.agents.held_turns import HeldTurns, TurnStore
from rollout.agents.scopes import granted, rank
from rollout.agents.tools_merge import visible
from rollout.errors import ConflictError, NotFoundError, RolloutError, UnavailableError
from rollout.mcp_tools import McpServers
from rollout.tool_calls import run_anywhere

Resolver = Callable[[str], Agent | Awaitable[Agent | None] | None]
"""An agent for a name that was not added, or None."""

RESOLVER_SECONDS = 10.0
# An agent whose tools cannot be listed in time (an MCP server that hangs) is listed without them.
DESCRIBE_SECONDS = 10.0


class AgentRegistry:
    """The agents of one server, and what their requests share."""

    def __init__(
        self,
        agents: Iterable[Agent] = (),
        *,
        resolver: Resolver | None = None,
        held: TurnStore | None = None,
        mcp: McpServers | None = None,
    ) -> None:
        self._agents: dict[str, tuple[Agent, int]] = {}
        self._resolver = resolver
        self.held: TurnStore = held if held is not None else HeldTurns()
        """Turns that wait for their client."""
        self.mcp = mcp
        """The MCP servers of the environments; None: there are none."""
        self._since = int(time.time())
        for agent in agents:
            self.add(agent)

    def add(self, agent: Agent, *, replace: bool = False) -> None:
        """Take an agent in. Raises ConflictError where the name is taken, unless it is to be replaced."""
        if agent.name in self._agents and not replace:
            raise ConflictError(f"there is an agent called {agent.name!r} already; remove it first", "name")
        self._agents[agent.name] = (agent, int(time.time()))

    def remove(self, name: str) -> None:
        """Let an agent go; its requests in flight go on. Raises NotFoundError."""
        if self._agents.pop(name, None) is None:
            raise self._unknown(name)

    @property
    def names(self) -> frozenset[str]:
        """Of the agents that were added."""
        return frozenset(self._agents)

    async def get(self, name: str) -> Agent:
        """The agent of this name: one that was added, else the resolver's. Raises NotFoundError, UnavailableError."""
        found = self._agents.get(name)
        if found is not None:
            return found[0]
        agent = await self._resolve(name)
        if agent is None:
            raise self._unknown(name)
        return agent

    def created(self, name: str) -> int:
        """When an agent was added, in seconds since the epoch; for resolved ones, when this registry was made."""
        found = self._agents.get(name)
        return self._since if found is None else found[1]

    async def describe(self, scopes: Iterable[str] = ("all",), caller: str = "") -> list[dict[str, Any]]:
        """All agents that were added, as a caller with this name and these scopes may see them. Never their prompts.

        Raises ForbiddenError for a caller without any scope.
        """
        own = frozenset(scopes)
        ranked = [(agent, rank(granted(own, caller, agent.owners))) for agent, _ in self._agents.values()]
        rank(own)
        return list(await asyncio.gather(*(self._describe(agent, its_rank) for agent, its_rank in ranked)))

    async def _describe(self, agent: Agent, caller: int) -> dict[str, Any]:
        about: dict[str, Any] = {
            "name": agent.name,
            "description": agent.description,
            "limits": agent.limits.model_dump(),
        }
        try:
            async with asyncio.timeout(DESCRIBE_SECONDS), opened(agent, None, self.mcp) as ready:
                tools = visible(ready.tools, agent.scopes, caller)
        except (RolloutError, TimeoutError) as failure:
            # One agent that is broken must not hide the others.
            return {**about, "tools": None, "error": str(failure) or "its tools could not be listed in time"}
        listed = [{"name": t.name, "description": t.description, "parameters": t.parameters} for t in tools]
        return {**about, "tools": listed}

    async def _resolve(self, name: str) -> Agent | None:
        if self._resolver is None:
            return None
        try:
            async with asyncio.timeout(RESOLVER_SECONDS):
                agent = await run_anywhere(functools.partial(self._resolver, name), {})
        except RolloutError:
            raise
        except Exception as failure:
            text = f"the resolver could not look up agent {name!r}: {type(failure).__name__}: {failure}"
            raise UnavailableError(text) from failure
        if agent is not None and (not isinstance(agent, Agent) or agent.name != name):
            # Its requests would be held, counted and answered under another name.
            raise UnavailableError(f"the resolver gave {agent!r} for agent {name!r}")
        return agent

    def _unknown(self, name: str) -> NotFoundError:
        known = ", ".join(self._agents) or "none"
        return NotFoundError(f"there is no agent called {name!r}; the agents are: {known}", "name")
