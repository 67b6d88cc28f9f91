"""The section `agents`: what of it reaches the gateways, and what is refused with its field."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import ClusterConfig
from cluster.deploy import access_settings, gateway_spec
from rollout.agents.spec import NamedAgent

ENVIRONMENT = "examples.calculator.environment:Calculator"


def config(**sections: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"model": {"path": "org/tiny"}} | sections)


def test_what_the_file_says_of_an_agent_reaches_the_gateways():
    given: dict[str, Any] = {
        "environment": ENVIRONMENT,
        "args": {"x": 1},
        "description": "Sums.",
        "limits": {"max_turns": 3},
        "scopes": {"divide": "owner"},
        "owners": ["app"],
        "hooks": ["m:h", {"path": "m:H", "priority": 10}],
        "show_tool_calls": True,
    }
    made = config(agents={"sums": given})
    spec = gateway_spec(made, access_settings(made, b"", "key"), "key")
    assert spec.agents == (NamedAgent.model_validate({"name": "sums", **given}),)
    assert [hook.priority for hook in spec.agents[0].hooks] == [50, 10]


def test_the_environment_is_an_agent_unless_there_are_others():
    own = {"path": ENVIRONMENT, "args": {"x": 1}}
    (agent,) = [a.named(n) for n, a in config(environment=own).served_agents().items()]
    assert (agent.name, agent.environment, agent.args) == ("calculator", ENVIRONMENT, {"x": 1})
    assert config(environment=own, agents={}).served_agents() == {}


def test_empty_fields_have_their_defaults():
    made = config(agents={"sums": {"environment": ENVIRONMENT, "hooks": None, "limits": None}})
    assert made.agents is not None and made.agents["sums"].hooks == []


@pytest.mark.parametrize(
    ("agents", "place", "words"),
    [
        ({"a/b": {"environment": ENVIRONMENT}}, "agents.a/b", "pattern"),
        ({"sums": {}}, "agents.sums.environment", "required"),
        ({"sums": {"environment": "calculator"}}, "agents.sums.environment", "must be module:Class"),
        ({"sums": {"environment": ENVIRONMENT, "hook": []}}, "agents.sums.hook", "not permitted"),
        ({"sums": {"environment": ENVIRONMENT, "hooks": ["m"]}}, "agents.sums.hooks.0.path", "pattern"),
        ({"sums": {"environment": ENVIRONMENT, "owners": ["a b"]}}, "agents.sums.owners.0", "pattern"),
        (
            {"sums": {"environment": ENVIRONMENT, "scopes": {"add": "owner"}}},
            "agents.sums",
            "list them under `owners`",
        ),
    ],
)
def test_what_is_wrong_is_named(agents: dict[str, Any], place: str, words: str):
    with pytest.raises(ValidationError) as refused:
        config(agents=agents)
    problems = [(".".join(map(str, p["loc"])), p["msg"]) for p in refused.value.errors()]
    assert any(where.startswith(place) and words in said for where, said in problems), problems
