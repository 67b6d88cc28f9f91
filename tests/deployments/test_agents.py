"""The agents of several gateways over one book: added, removed, agreed upon, and a controller that is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from actors.agent_book import AddedAgents, AgentBook
from deployments import agents
from deployments.agents import REFRESH_S, ServedAgents, SharedTurns, make_registry
from rollout.agents import AgentRegistry, NamedAgent, TurnLost
from rollout.agents.held_turns import HeldTurn
from rollout.errors import ConflictError, NotFoundError, RefusedError, UnavailableError
from tests.actors.service import Service
from tests.rollout.agents.scripted_chat import (
    USER,
    ScriptedChatEngine,
    Talk,
    agent,
    ask,
    client_tool,
    message_of,
    say,
)

ADDER = "tests.rollout.agents.scripted_chat:Adder"
BARE = "tests.rollout.agents.scripted_chat:Bare"


def named(name: str = "new", **fields: Any) -> NamedAgent:
    return NamedAgent.model_validate({"name": name, "environment": ADDER, **fields})


class Keeper:
    """A TEST DOUBLE of the way to the controller: its book, which may be away."""

    def __init__(self, book: AgentBook) -> None:
        self.book = book
        self.away = False
        self.asked = 0
        self.pause = 0.0

    async def added_agents(self, known: int | None) -> AddedAgents | None:
        self.asked += 1
        self._check()
        found = self.book.added(known)
        await asyncio.sleep(self.pause)
        return found

    async def add_agent(self, agent: NamedAgent) -> AddedAgents:
        self._check()
        return await self.book.add(agent)

    async def remove_agent(self, name: str) -> AddedAgents:
        self._check()
        return await self.book.remove(name)

    async def hold_turn(self, turn: HeldTurn) -> None:
        await self.book.hold(turn)

    async def held_turn(self, key: str) -> HeldTurn | None:
        return await self.book.held(key)

    def _check(self) -> None:
        if self.away:
            raise UnavailableError("the controller is gone")


class Clock:
    """A TEST DOUBLE of time, a little later with every look."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


class Cluster:
    """Gateways over one controller."""

    def __init__(self, path: Path) -> None:
        self.service = Service(path)
        self.keeper = Keeper(AgentBook(self.service.store, []))
        self.clock = Clock()

    def gateway(self) -> ServedAgents:
        return ServedAgents(AgentRegistry([agent()]), self.keeper, clock=self.clock)

    def later(self) -> None:
        self.clock.now += REFRESH_S + 0.1


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    made = Cluster(tmp_path / "journal.sqlite")
    yield made
    await made.service.close()


async def names(gateway: ServedAgents) -> list[str]:
    return [about["name"] for about in await gateway.describe(frozenset({"serve"}), "app")]


async def test_an_agent_that_is_added_at_one_gateway_is_there_at_all_of_them(cluster: Cluster):
    one, two = cluster.gateway(), cluster.gateway()
    with pytest.raises(NotFoundError):
        await two.get("new")
    about = await one.add(named(scopes={"secret": "admin"}))
    assert [tool["name"] for tool in about["tools"]] == ["add", "secret"], "told as an admin sees it"
    assert (await one.get("new")).name == "new"
    assert (await two.get("new")).scopes == {"secret": "admin"}, "asked for at once, not a second later"
    cluster.later()
    assert await names(one) == await names(two) == ["adder", "new"]


async def test_one_that_is_removed_is_gone_everywhere_a_second_later(cluster: Cluster):
    one, two = cluster.gateway(), cluster.gateway()
    await one.add(named())
    kept = await two.get("new")
    await one.remove("new")
    with pytest.raises(NotFoundError):
        await one.get("new")
    cluster.later()
    with pytest.raises(NotFoundError, match="the agents are: adder"):
        await two.get("new")
    going_on = await Talk(ScriptedChatEngine(say("ok")), kept)(model="new")
    assert message_of(going_on)["content"] == "ok", "what runs goes on"


async def test_one_that_is_replaced_is_the_new_one_everywhere(cluster: Cluster):
    one, two = cluster.gateway(), cluster.gateway()
    await one.add(named(description="old"))
    await two.get("new")
    with pytest.raises(ConflictError, match="already"):
        await two.add(named(description="new"))
    await one.remove("new")
    await one.add(named(description="new"))
    cluster.later()
    assert (await two.get("new")).description == "new"


async def test_an_agent_of_the_configuration_keeps_its_name(cluster: Cluster):
    gateway = cluster.gateway()
    with pytest.raises(ConflictError, match="of the configuration"):
        await gateway.add(named("adder", environment=BARE))
    with pytest.raises(ConflictError, match="remove it there"):
        await gateway.remove("adder")
    with pytest.raises(NotFoundError):
        await gateway.remove("nobody")
    # One of that name that was added before the configuration had it.
    await cluster.keeper.book.add(named("adder", description="added"))
    cluster.later()
    assert (await gateway.get("adder")).description == ""
    await gateway.remove("adder")
    cluster.later()
    assert (await gateway.get("adder")).name == "adder"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"environment": "no.such:Thing"}, "environment"),
        ({"environment": "os:system", "args": {"command": "true"}}, "environment"),
        ({"scopes": {"misspelt": "admin"}}, "environment"),
        ({"hooks": ["os:system"]}, "hooks.0"),
    ],
)
async def test_what_cannot_be_served_is_refused_and_told_to_nobody(cluster: Cluster, fields: Any, field: str):
    with pytest.raises(RefusedError) as refused:
        await cluster.gateway().add(named(**fields))
    assert refused.value.field == field
    assert cluster.keeper.book.added(None).agents == ()  # type: ignore[union-attr]


async def test_code_that_one_gateway_lacks_is_told_to_its_callers(cluster: Cluster):
    await cluster.keeper.book.add(named(environment="only.elsewhere:Thing"))
    gateway = cluster.gateway()
    _, about = await gateway.describe(frozenset({"serve"}), "app")
    assert about["tools"] is None and "cannot be loaded on this gateway" in about["error"]


async def test_known_agents_go_on_while_the_controller_is_away(cluster: Cluster):
    gateway = cluster.gateway()
    await gateway.add(named())
    cluster.keeper.away = True
    cluster.later()
    assert (await gateway.get("new")).name == "new" and (await gateway.get("adder")).name == "adder"
    with pytest.raises(UnavailableError, match="does not say"):
        await gateway.get("perhaps")
    with pytest.raises(UnavailableError):
        await gateway.add(named("other"))
    cluster.keeper.away = False
    cluster.later()
    with pytest.raises(NotFoundError):
        await gateway.get("perhaps")


async def test_a_silent_controller_holds_requests_up_only_so_long(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agents, "ASK_SECONDS", 0.05)
    cluster.keeper.pause = 60.0
    gateway = cluster.gateway()
    async with asyncio.timeout(5):
        found = await asyncio.gather(*(gateway.get("adder") for _ in range(20)))
    assert {one.name for one in found} == {"adder"} and cluster.keeper.asked == 1


async def test_a_second_of_requests_asks_once(cluster: Cluster):
    gateway = cluster.gateway()
    for _ in range(50):
        await gateway.get("adder")
    assert cluster.keeper.asked == 1
    cluster.later()
    await asyncio.gather(*(gateway.get("adder") for _ in range(50)))
    assert cluster.keeper.asked == 2


async def test_an_older_list_that_arrives_late_undoes_nothing(cluster: Cluster):
    gateway = cluster.gateway()
    cluster.keeper.pause = 0.05
    asking = asyncio.create_task(gateway.get("adder"))
    await asyncio.sleep(0.01)
    await gateway.add(named())
    await asking
    assert gateway.registry.names == {"adder", "new"}


async def test_without_a_controller_nothing_is_added():
    gateway = ServedAgents(AgentRegistry([agent()]))
    assert await names(gateway) == ["adder"]
    with pytest.raises(NotFoundError):
        await gateway.get("nobody")
    with pytest.raises(UnavailableError):
        await gateway.add(named())


# Turns


async def test_a_turn_that_one_gateway_holds_goes_on_at_another(cluster: Cluster):
    tools = [client_tool("weather")]
    engine = ScriptedChatEngine(ask(("add", '{"a": 2, "b": 3}'), ("weather", "{}")), say("sunny, 5"))
    one = Talk(engine, held=SharedTurns(cluster.keeper))  # type: ignore[arg-type]
    two = Talk(engine, held=SharedTurns(cluster.keeper))  # type: ignore[arg-type]
    asked = message_of(await one(USER, tools=tools))
    answer = {"role": "tool", "tool_call_id": asked["tool_calls"][0]["id"], "content": "sunny"}
    done = await two(USER, asked, answer, tools=tools)
    assert message_of(done)["content"] == "sunny, 5"
    assert [m["content"] for m in engine.bodies[1]["messages"] if m["role"] == "tool"] == ["5", "sunny"]
    # Turns live in the controller's memory alone.
    cluster.keeper.book = AgentBook(cluster.service.store, [])
    with pytest.raises(TurnLost):
        await two(USER, asked, answer, tools=tools)


def test_the_configurations_agents_are_named_in_their_errors():
    registry = make_registry([named("a"), named("b", environment=BARE)], {})
    assert registry.names == {"a", "b"}
    with pytest.raises(RefusedError, match=r"^agents\.a\.hooks\.0: "):
        make_registry([named("a", hooks=["os:system"])], {})
