"""The agents of a gateway: those of the configuration, and those that were added while the cluster runs.

What was added is the controller's to know; a gateway keeps a copy that is REFRESH_S old at most when it is used. A
name that it does not know is asked for at once. So an agent that is added at one gateway is there at all of them, and
one that is removed is gone from all of them a second later.

Invariant: an agent of the configuration keeps its name. While the controller does not answer, the agents that are
known go on, and of a name that is not known nobody says that it does not exist.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from actors.agent_book import AddedAgents
from rollout.agents.agent import Agent
from rollout.agents.held_turns import HeldTurn, TurnStore
from rollout.agents.registry import AgentRegistry
from rollout.agents.spec import NamedAgent, broken_agent, make_agent
from rollout.errors import ConflictError, NotFoundError, RefusedError, RolloutError, UnavailableError
from rollout.mcp_config import McpServerConfig
from rollout.mcp_tools import McpServers

logger = logging.getLogger(__name__)

# How old the list of added agents may be. Asking costs the controller a tenth of a millisecond.
REFRESH_S = 1.0
# A controller that is being started again holds a request up for so long.
ASK_SECONDS = 2.0
# Imports of an agent's code beyond this are told as a failure.
LOAD_SECONDS = 60.0


class AgentKeeper(Protocol):
    """Who holds what gateways share: the controller."""

    async def added_agents(self, known: int | None) -> AddedAgents | None:
        """Agents that were added; None where `known` is their version."""

    async def add_agent(self, agent: NamedAgent) -> AddedAgents:
        """Raises ConflictError, RefusedError."""

    async def remove_agent(self, name: str) -> AddedAgents:
        """Raises NotFoundError."""

    async def hold_turn(self, turn: HeldTurn) -> None:
        """See TurnStore.put."""

    async def held_turn(self, key: str) -> HeldTurn | None:
        """See TurnStore.get."""


class SharedTurns(TurnStore):
    """Turns that every gateway of the cluster finds."""

    def __init__(self, keeper: AgentKeeper) -> None:
        self._keeper = keeper

    async def put(self, turn: HeldTurn) -> None:
        """See TurnStore."""
        await self._keeper.hold_turn(turn)

    async def get(self, key: str) -> HeldTurn | None:
        """See TurnStore."""
        return await self._keeper.held_turn(key)


class ServedAgents:
    """The agents that this gateway serves now."""

    def __init__(
        self,
        registry: AgentRegistry,
        keeper: AgentKeeper | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`registry`: holds those of the configuration. `keeper` None: there are no others, and none can be added."""
        self.registry = registry
        self._configured = registry.names
        self._keeper = keeper
        self._clock = clock
        self._known: int | None = None
        self._added: dict[str, NamedAgent] = {}
        self._asked_at = float("-inf")
        self._answered = True
        self._asking = asyncio.Lock()
        self._taking = asyncio.Lock()

    async def get(self, name: str) -> Agent:
        """The agent of this name. Raises NotFoundError, UnavailableError."""
        answered = await self._refresh(REFRESH_S)
        try:
            return await self.registry.get(name)
        except NotFoundError:
            # Somebody may have been told just now, by another gateway, that it is there.
            if not answered or not await self._refresh(0.0):
                raise UnavailableError(
                    f"agent {name!r} is not known here, and the controller does not say which agents were added"
                ) from None
            return await self.registry.get(name)

    async def describe(self, scopes: frozenset[str], caller: str) -> list[dict[str, Any]]:
        """All of them, as this caller may see them. Raises ForbiddenError."""
        await self._refresh(REFRESH_S)
        return await self.registry.describe(scopes, caller)

    async def add(self, wanted: NamedAgent) -> dict[str, Any]:
        """Serve an agent, here and at every gateway; answers as `describe` does, for who may use everything.

        The same again changes nothing. Raises RefusedError for what cannot be loaded here, ConflictError for a name
        that is taken, UnavailableError.
        """
        keeper = self._required()
        if wanted.name in self._configured:
            raise ConflictError(f"agent {wanted.name!r} is of the configuration; choose another name", "name")
        # Looked at before it is told to others: whether its code is there, and its scopes name tools that it has.
        agent = await _loaded(wanted)
        (about,) = await AgentRegistry([agent], mcp=self.registry.mcp).describe(("admin",))
        if about.get("error"):
            raise RefusedError(f"environment: {about['error']}", "environment")
        await self._take(await keeper.add_agent(wanted))
        return about

    async def remove(self, name: str) -> None:
        """Serve it no more; its requests in flight go on. Raises NotFoundError, ConflictError, UnavailableError."""
        keeper = self._required()
        try:
            await self._take(await keeper.remove_agent(name))
        except NotFoundError:
            if name in self._configured:
                raise ConflictError(f"agent {name!r} is of the configuration; remove it there", "name") from None
            raise

    def _required(self) -> AgentKeeper:
        if self._keeper is None:
            raise UnavailableError("this gateway has no controller behind it that keeps agents")
        return self._keeper

    async def _refresh(self, age: float) -> bool:
        """What is known is at most `age` seconds old then. False where the controller, asked last, did not answer."""
        if self._keeper is None:
            return True
        oldest = self._clock() - age
        if self._asked_at >= oldest:
            return self._answered
        async with self._asking:
            # Somebody may have asked while we waited; one question serves all who came before it.
            if self._asked_at < oldest:
                await self._ask(self._keeper)
        return self._answered

    async def _ask(self, keeper: AgentKeeper) -> None:
        # From before the answer: what is added while it travels is asked for again.
        asked_at = self._clock()
        try:
            async with asyncio.timeout(ASK_SECONDS):
                found = await keeper.added_agents(self._known)
            if found is not None:
                await self._take(found)
            self._asked_at, self._answered = asked_at, True
        except Exception as failure:
            logger.warning("the controller does not say which agents were added: %r", failure)
            # From after it: a controller that is silent must not hold up every request.
            self._asked_at, self._answered = self._clock(), False

    async def _take(self, found: AddedAgents) -> None:
        async with self._taking:
            if self._known is not None and found.version <= self._known:
                # Overtaken by a newer one.
                return
            wanted = {agent.name: agent for agent in found.agents if agent.name not in self._configured}
            news = {name: agent for name, agent in wanted.items() if self._added.get(name) != agent}
            made = [await self._made(agent) for agent in news.values()]
            # From here on without a pause: nobody sees half a list.
            for name in self._added.keys() - wanted.keys():
                self.registry.remove(name)
            for agent in made:
                self.registry.add(agent, replace=True)
            self._added, self._known = wanted, found.version

    async def _made(self, spec: NamedAgent) -> Agent:
        try:
            return await _loaded(spec)
        except RolloutError as failure:
            # It was loaded where it was added; here something is missing, and its callers are told so.
            logger.error("agent %s cannot be loaded: %s", spec.name, failure)
            return broken_agent(spec, str(failure))


async def _loaded(spec: NamedAgent) -> Agent:
    """Off the event loop: an import may take seconds. Raises RefusedError."""
    try:
        async with asyncio.timeout(LOAD_SECONDS):
            return await asyncio.to_thread(make_agent, spec)
    except TimeoutError:
        raise RefusedError(
            f"environment: its code was not imported within {LOAD_SECONDS:g} s", "environment"
        ) from None


def make_registry(
    specs: Sequence[NamedAgent], mcp_servers: Mapping[str, McpServerConfig], held: TurnStore | None = None
) -> AgentRegistry:
    """The configuration's agents. `held`: where turns wait for their clients; None: in this process.

    Raises RefusedError that names the field of one that cannot be loaded.
    """
    agents = [make_agent(spec, f"agents.{spec.name}.") for spec in specs]
    return AgentRegistry(agents, held=held, mcp=McpServers(dict(mcp_servers)) if mcp_servers else None)
