"""An agent as data: its fields, its hooks by import path, and every way in which they can be wrong."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rollout.agents import NamedAgent, hook
from rollout.agents.hook_loading import HookRef, load_hooks
from rollout.agents.scopes import granted, rank
from rollout.agents.spec import MAX_SPEC_CHARS, broken_agent, make_agent
from rollout.errors import EnvironmentError_, RefusedError
from tests.rollout.agents.configured_hooks import HEARD
from tests.rollout.agents.scripted_chat import ScriptedChatEngine, Talk, ask, message_of, say

HOOKS = "tests.rollout.agents.configured_hooks"
ADDER = "tests.rollout.agents.scripted_chat:Adder"


@pytest.fixture(autouse=True)
def _nothing_heard() -> None:
    HEARD.clear()


def named(**fields: Any) -> NamedAgent:
    return NamedAgent.model_validate({"name": "adder", "environment": ADDER, **fields})


def refs(*given: Any) -> list[HookRef]:
    return [HookRef.model_validate(item) for item in given]


async def test_an_agent_is_made_with_all_that_it_says():
    spec = named(
        description="Adds.",
        limits={"max_turns": 3},
        scopes={"secret": "owner"},
        owners=["app", "jwt:ann@example.com"],
        hooks=[f"{HOOKS}:Audit"],
        show_tool_calls=True,
    )
    agent = make_agent(spec)
    assert (agent.name, agent.description, agent.limits.max_turns, agent.show_tool_calls) == (
        "adder",
        "Adds.",
        3,
        True,
    )
    assert (agent.scopes, agent.owners) == ({"secret": "owner"}, {"app", "jwt:ann@example.com"})
    assert NamedAgent.model_validate_json(spec.model_dump_json()) == spec
    engine = ScriptedChatEngine(ask(("add", '{"a": 2, "b": 3}')), say("5"))
    assert message_of(await Talk(engine, agent)())["content"] == "5"
    assert HEARD == ["before add", "after 5", "finalize stop"]


async def test_hooks_run_by_priority_and_then_as_they_are_listed():
    spec = named(hooks=[{"path": f"{HOOKS}:polite", "priority": 60}, f"{HOOKS}:first"])
    engine = ScriptedChatEngine(say("ok"))
    await Talk(engine, make_agent(spec))()
    assert HEARD == ["first", "polite"]
    assert engine.bodies[0]["messages"][-1]["content"] == "Please: 2+3?"


def test_a_class_has_one_instance_for_all_its_hooks():
    hooks = load_hooks(refs({"path": f"{HOOKS}:Audit", "priority": 7}))
    assert [made.event for made in hooks] == ["before_tool_call", "after_tool_call", "finalize"]
    assert {made.priority for made in hooks} == {7}
    assert len({id(made.function.__self__) for made in hooks}) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (f"{HOOKS}:nothing", "has no 'nothing'"),
        ("no.such.module:hook", "cannot import 'no.such.module'"),
        (f"{HOOKS}:unmarked", "is no hook"),
        (f"{HOOKS}:NUMBER", "is no hook"),
        (f"{HOOKS}:Lookalike", "is no hook"),
        (f"{HOOKS}:Empty", "no method with the name of an event"),
        (f"{HOOKS}:NeedsArguments", "could not be made"),
        (f"{HOOKS}:takes_one", r"must take \(context, value\)"),
        # Functions of other packages are no hooks, whatever they do.
        ("os:system", "is no hook"),
        ("subprocess:Popen", "is no hook"),
    ],
)
def test_what_is_no_hook_is_refused_with_its_field(path: str, said: str):
    with pytest.raises(RefusedError, match=rf"^agents\.x\.hooks\.1: .*{said}") as refused:
        load_hooks(refs(f"{HOOKS}:first", path), "agents.x.hooks")
    assert refused.value.field == "agents.x.hooks.1"


def test_a_hook_on_no_event_is_a_mistake_at_once():
    with pytest.raises(ValueError, match=r"'toolcall'.*before_tool_call"):
        hook("toolcall")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"name": "a/b"}, "name", "pattern"),
        ({"name": ""}, "name", "pattern"),
        ({"environment": "import os"}, "environment", "must be module:Class"),
        ({"environment": "m:E\n"}, "environment", "must be module:Class"),
        ({"code": "print()"}, "code", "Extra inputs"),
        ({"limits": {"max_turns": 0}}, "limits.max_turns", "greater than"),
        ({"scopes": {"add": "root"}}, "scopes.add", "Input should be 'all', 'owner' or 'admin'"),
        ({"scopes": {"add": "owner"}}, "", "scopes.add is for owners, and there are none"),
        ({"owners": ["session:abc"]}, "owners.0", "pattern"),
        ({"owners": ["jwt:"]}, "owners.0", "pattern"),
        ({"hooks": ["os"]}, "hooks.0.path", "pattern"),
        ({"hooks": [{"path": "m:h", "priority": 0.5}]}, "hooks.0.priority", "integer"),
        ({"args": {"x": float("nan")}}, "", "args: Out of range float"),
        ({"args": {"text": "x" * MAX_SPEC_CHARS}}, "", "more than"),
        ({"description": "x" * 3_000}, "description", "at most"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], field: str, said: str):
    with pytest.raises(ValidationError) as refused:
        named(**fields)
    problems = refused.value.errors()
    assert any(".".join(map(str, p["loc"])) == field and said in p["msg"] for p in problems), problems


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"environment": "no.such:Thing"}, "agents.adder.environment"),
        ({"environment": f"{HOOKS}:Nothing"}, "agents.adder.environment"),
        ({"args": {"unknown": 1}, "environment": f"{HOOKS}:Audit"}, "agents.adder.environment"),
        ({"hooks": [f"{HOOKS}:unmarked"]}, "agents.adder.hooks.0"),
    ],
)
def test_code_that_cannot_be_loaded_is_named(fields: dict[str, Any], field: str):
    with pytest.raises(RefusedError) as refused:
        make_agent(named(**fields), "agents.adder.")
    assert refused.value.field == field and str(refused.value).startswith(f"{field}: ")


def test_a_broken_agent_tells_every_request_why():
    broken = broken_agent(named(), "no module")
    with pytest.raises(EnvironmentError_, match="cannot be loaded on this gateway: no module"):
        broken.environment()


# Owners


def test_an_owner_is_between_everybody_and_an_admin():
    owners = frozenset({"app"})
    ranks = [rank(granted(scopes, caller, owners)) for scopes, caller in (
        ({"serve"}, "other"), ({"serve"}, "app"), ({"serve", "admin"}, "other")
    )]  # fmt: skip
    assert ranks == sorted(set(ranks))


def test_an_owner_that_nobody_let_in_has_nothing():
    assert granted((), "app", {"app"}) == frozenset()
