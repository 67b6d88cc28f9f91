"""Agents by name: added and removed while running, described without their prompts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rollout.agents import Agent, AgentRegistry
from rollout.environment import Environment
from rollout.errors import ConflictError, NotFoundError, UnavailableError
from tests.rollout.agents.scripted_chat import Adder, Bare, agent


async def test_agents_come_and_go():
    registry = AgentRegistry([agent()])
    assert (await registry.get("adder")).name == "adder"
    with pytest.raises(ConflictError, match="remove it first"):
        registry.add(agent())
    other = agent(description="new")
    registry.add(other, replace=True)
    assert await registry.get("adder") is other
    registry.remove("adder")
    with pytest.raises(NotFoundError, match="no agent called 'adder'; the agents are: none"):
        await registry.get("adder")
    with pytest.raises(NotFoundError):
        registry.remove("adder")


async def test_the_resolver_is_asked_after_those_that_were_added():
    asked: list[str] = []

    async def resolve(name: str) -> Agent | None:
        asked.append(name)
        return Agent(name, Bare) if name.startswith("user-") else None

    registry = AgentRegistry([agent()], resolver=resolve)
    await registry.get("adder")
    assert asked == []
    assert (await registry.get("user-7")).name == "user-7"
    with pytest.raises(NotFoundError, match="nobody"):
        await registry.get("nobody")
    assert asked == ["user-7", "nobody"]
    synchronous = AgentRegistry(resolver=lambda name: Agent(name, Bare))
    assert (await synchronous.get("x")).name == "x"


@pytest.mark.parametrize(
    ("answer", "problem"), [(RuntimeError("down"), "could not look up.*down"), (agent(), "gave .* for agent 'x'")]
)
async def test_a_resolver_that_fails_is_no_unknown_agent(answer: Any, problem: str):
    def resolve(name: str) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(UnavailableError, match=problem):
        await AgentRegistry(resolver=resolve).get("x")


async def test_the_list_has_tools_and_limits_and_never_the_prompt():
    (about,) = await AgentRegistry([agent(description="Adds.", scopes={"secret": "admin"})]).describe()
    assert (about["name"], about["description"], about["limits"]["max_turns"]) == ("adder", "Adds.", 8)
    (listed,) = about["tools"]
    assert (listed["name"], listed["description"]) == ("add", "Add two numbers.")
    assert listed["parameters"]["properties"]["a"]["type"] == "integer"
    assert "PROMPT" not in json.dumps(about)


async def test_the_list_is_the_callers():
    registry = AgentRegistry([agent(scopes={"secret": "owner"})])
    for scopes, names in ((["all"], ["add"]), (["owner"], ["add", "secret"]), (["admin"], ["add", "secret"])):
        (about,) = await registry.describe(scopes)
        assert [listed["name"] for listed in about["tools"]] == names


async def test_a_broken_agent_does_not_hide_the_others():
    class Broken(Environment):
        mcp_servers = ("nowhere",)

    registry = AgentRegistry([Agent("broken", Broken), agent(Adder)])
    broken, fine = await registry.describe()
    assert broken["tools"] is None and "'nowhere'" in broken["error"]
    assert len(fine["tools"]) == 2


@pytest.mark.parametrize("name", ["", "a/b", "-a", "a b", "x" * 200])
def test_a_name_is_a_segment_of_a_url(name: str):
    with pytest.raises(ValueError, match="agent name"):
        Agent(name, Bare)


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="scope 'root' of tool 'add' is unknown; use all, owner, admin"):
        agent(scopes={"add": "root"})
