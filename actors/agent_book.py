"""Agents that were added while the cluster runs, and the turns that wait for their clients: what gateways share.

Gateways hold nothing that another one would miss. They ask for the list of added agents by its version, and put a
turn that goes back to its client here, so that whichever gateway the client returns to finds it.

Invariant: an agent that was added is in the journal before anybody is told of it, and one that was removed is out of
it. Agents and turns are bounded in number and size; turns live in memory alone, and end with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass

from actors import journal_records as records
from actors.run_store import RunStore
from rollout.agents.held_turns import HeldTurn, HeldTurns
from rollout.agents.spec import NamedAgent
from rollout.errors import ConflictError, NotFoundError, RefusedError

MAX_AGENTS = 256


@dataclass(frozen=True)
class AddedAgents:
    """The list at one version. Versions grow, over a restart of the controller too."""

    version: int
    agents: tuple[NamedAgent, ...]


class AgentBook:
    """Lives on the store's event loop."""

    def __init__(self, store: RunStore, recovered: Iterable[NamedAgent]) -> None:
        self._store = store
        self._agents = {agent.name: agent for agent in recovered}
        # Above every version of an earlier life.
        self._version = time.time_ns()
        # One change after the other: what is checked must still hold when the journal has written.
        self._changing = asyncio.Lock()
        self.turns = HeldTurns()
        """Turns that wait for their clients."""

    def added(self, known: int | None) -> AddedAgents | None:
        """The agents now; None where the asker's version is the newest."""
        if known == self._version:
            return None
        return AddedAgents(self._version, tuple(self._agents.values()))

    async def add(self, agent: NamedAgent) -> AddedAgents:
        """Take one in; the same again changes nothing.

        Raises ConflictError where the name means another one, RefusedError where there are too many.
        """
        async with self._changing:
            known = self._agents.get(agent.name)
            if known is not None and known != agent:
                raise ConflictError(f"there is an agent called {agent.name!r} already; remove it first", "name")
            if known is None:
                if len(self._agents) >= MAX_AGENTS:
                    raise RefusedError(f"there are {MAX_AGENTS} added agents already; remove some", "name")
                self._store.check()
                await self._store.write(records.add_agent(agent))
                self._agents[agent.name] = agent
                self._version += 1
            return AddedAgents(self._version, tuple(self._agents.values()))

    async def remove(self, name: str) -> AddedAgents:
        """Let one go. Raises NotFoundError."""
        async with self._changing:
            if name not in self._agents:
                raise NotFoundError(f"no agent called {name!r} was added", "name")
            self._store.check()
            await self._store.write(records.remove_agent(name))
            del self._agents[name]
            self._version += 1
            return AddedAgents(self._version, tuple(self._agents.values()))

    async def hold(self, turn: HeldTurn) -> None:
        """See TurnStore.put."""
        await self.turns.put(turn)

    async def held(self, key: str) -> HeldTurn | None:
        """See TurnStore.get."""
        return await self.turns.get(key)
