"""What `rollout check` proves without a cluster."""

from __future__ import annotations

import sys

import pytest

from cluster.check import check_config, import_path
from cluster.config import ClusterConfig
from cluster.config_file import load_config
from rollout.environment import Environment
from tests.conftest import MODEL, ROOT


def config(**fields: object) -> ClusterConfig:
    return ClusterConfig.model_validate({"model": {"path": str(MODEL)}, "engine": {"device": "cpu"}, **fields})


def found(made: ClusterConfig) -> dict[str, tuple[bool, str]]:
    return {finding.what: (finding.ok, finding.detail) for finding in check_config(made)}


def test_a_good_config_names_its_tools_and_its_renderer():
    seen = found(config(environment={"path": "examples.calculator.environment:Calculator"}, pythonpath=[str(ROOT)]))
    assert seen["environment"] == (
        True,
        "examples.calculator.environment:Calculator: add, subtract, multiply, divide",
    )
    assert seen["renderer"] == (True, "qwen3: extends sampled tokens, agrees with the chat template")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"path": "no_such_module:Thing"}, "cannot import 'no_such_module'"),
        ({"path": "examples.calculator.environment:Missing"}, "has no 'Missing'"),
        ({"path": "examples.calculator.environment:Calculator", "args": {"speed": 1}}, "speed"),
    ],
)
def test_a_wrong_environment_is_a_finding(environment, words):
    ok, detail = found(config(environment=environment))["environment"]
    assert not ok and words in detail


def test_a_wrong_renderer_is_a_finding():
    seen = found(config(model={"path": str(MODEL), "renderer": "quen3"}))
    assert seen["renderer"][0] is False and "quen3" in seen["renderer"][1]


def test_a_hub_model_is_not_downloaded():
    ok, detail = found(config(model={"path": "Qwen/Qwen3-0.6B"}))["renderer"]
    assert ok and "would have to be downloaded" in detail and "rollout pull" in detail


def test_agents_are_loaded_with_their_hooks():
    calculator = "examples.calculator.environment:Calculator"
    hooks = "tests.rollout.agents.configured_hooks"
    agents = {
        "good": {"environment": calculator, "hooks": [f"{hooks}:Audit"], "scopes": {"add": "admin"}},
        "hookless": {"environment": calculator, "hooks": [f"{hooks}:Audit", "os:system"]},
        "misspelt": {"environment": calculator, "scopes": {"ad": "admin"}},
        "missing": {"environment": "no_such_module:Thing"},
    }
    seen = found(config(agents=agents, pythonpath=[str(ROOT)]))
    said = f"{calculator}: add, subtract, multiply, divide; hooks on before_tool_call, after_tool_call, finalize"
    assert seen["agents.good"] == (True, said)
    for name, words in (
        ("hookless", "hooks.1: "),
        ("misspelt", "scopes.ad names no tool"),
        ("missing", "environment: "),
    ):
        ok, detail = seen[f"agents.{name}"]
        assert not ok and words in detail


class Searching(Environment):
    """Needs a server of tools."""

    mcp_servers = ("search",)


def test_an_agent_wants_mcp_servers_that_the_config_names():
    path = f"{__name__}:Searching"
    agents = {"finder": {"environment": path}}
    for what, made in (("agents.finder", {"agents": agents}), ("environment", {"environment": {"path": path}})):
        ok, detail = found(config(**made, pythonpath=[str(ROOT)]))[what]
        assert not ok and detail == f"{path} wants MCP servers that the config does not name: ['search']"
        servers = {"search": {"url": "http://127.0.0.1:9/mcp"}}
        assert found(config(**made, mcp_servers=servers, pythonpath=[str(ROOT)]))[what] == (True, f"{path}: no tools")


def test_the_import_path_is_put_back():
    before = list(sys.path)
    with import_path(["/somewhere"]):
        assert sys.path[0] == "/somewhere"
    assert sys.path == before


# The shipped configs: what neither the types nor vLLM's command line can prove (test_config_file.py loads them all)

SHIPPED = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


def shipped(name: str) -> ClusterConfig:
    return load_config(ROOT / "configs" / name, check_engine=False)


def test_the_shipped_configs_are_looked_at():
    assert {"gpt-oss-20b.yaml", "gpt-oss-120b.yaml", "qwen3-0.6b.yaml", "qwen3-8b.yaml"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_name_parsers_that_vllm_has(name: str):
    pytest.importorskip("vllm")
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    arguments = shipped(name).engine.vllm
    assert arguments["enable_auto_tool_choice"] is True
    # The command line takes any word for them; a wrong one ends the engine's start, minutes later.
    assert arguments["tool_call_parser"] in ToolParserManager.list_registered()
    # The calculator's model has no tags in its last turn, so its configs name none.
    if arguments.get("reasoning_parser") is not None:
        assert arguments["reasoning_parser"] in ReasoningParserManager.list_registered()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_give_their_renderer_options_that_it_knows(name: str):
    from pydantic import TypeAdapter
    from renderers import RendererConfig
    from renderers.base import MODEL_RENDERER_MAP

    model = shipped(name).model
    known = MODEL_RENDERER_MAP.get(model.path, "qwen3")
    assert model.renderer in ("auto", known)
    TypeAdapter(RendererConfig).validate_python({"name": known, **model.renderer_options})


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("gpt-oss")])
def test_gpt_oss_prompts_do_not_change_with_the_day(name: str):
    from rollout.rendering import build_renderer
    from tests.rollout.harmony import HarmonyTokenizer

    made = shipped(name)
    date = made.engine.env["VLLM_SYSTEM_START_DATE"]
    chat = build_renderer(HarmonyTokenizer(), made.model.renderer, made.model.renderer_options)
    prompt = chat.decode(chat.render([{"role": "user", "content": "Hello"}], []))
    assert f"Current date: {date}" in prompt, "sessions and the API begin with the same prompt"
    assert made.replica_env()["VLLM_SYSTEM_START_DATE"] == date
