"""The applications that serveConfigV2 names: what they are made of, and what they refuse, without a Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster import serve_app
from cluster.serve_app import SECRET_VARIABLE
from rollout.errors import ConfigError
from rollout.session_keys import derived_secret
from tests.conftest import MODEL, ROOT

SECRET = "s" * 40
KEY = "k" * 32

TEXT = f"""
name: demo
model: {{path: {MODEL}}}
engine:
  device: cpu
  vllm: {{max_model_len: 1024, tensor_parallel_size: 2}}
  env: {{VLLM_CPU_OMP_THREADS_BIND: nobind}}
environment: {{path: "examples.calculator.environment:Calculator"}}
pythonpath: [{ROOT}]
sampling: {{max_tokens: 128}}
journal: {{path: /journal/demo.sqlite}}
gateway: {{host: 0.0.0.0, port: 8801, public_url: "http://rollout:8801"}}
access: {{keys: [{{name: app, env: APP_KEY, scopes: [serve]}}]}}
"""


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    monkeypatch.setenv("APP_KEY", KEY)
    file = tmp_path / "cluster.yaml"
    file.write_text(TEXT)
    return {"config": str(file)}


def rewrite(args: dict[str, Any], old: str, new: str) -> None:
    file = Path(args["config"])
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def spec_of(app: Any) -> Any:
    """What an application was bound with."""
    (spec,) = app._bound_deployment.init_args
    return spec


@pytest.fixture
def engine_spec(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Takes the place of the engine's own builder, which needs a Ray; holds what it was given."""
    from deployments import app

    given: list[Any] = []
    monkeypatch.setattr(app, "build_engine_app", lambda *arguments: given.extend(arguments))
    return given


def test_the_supervisor_is_told_of_the_file(args):
    spec = spec_of(serve_app.controller({**args, "proxy_port": 8123}))
    assert (spec.cluster, spec.engines) == ("demo", 1)
    assert spec.controller.cluster == spec.cluster, "it looks for the loading board there"
    assert spec.controller.journal_path == "/journal/demo.sqlite" and spec.controller.journal_sync
    assert (spec.front.host, spec.front.port, spec.front.gateway) == ("0.0.0.0", 8801, "127.0.0.1:8123")


def test_the_three_share_what_they_must_and_agree_on_every_build(args, monkeypatch, engine_spec):
    from deployments import gateway as gateways
    from deployments.node_engine import NodeEngine

    gateway_specs: list[Any] = []
    monkeypatch.setattr(gateways, "build_gateway_app", gateway_specs.append)
    for _ in range(2):
        serve_app.gateway(args)
    serve_app.engine(args)
    controller = spec_of(serve_app.controller(args)).controller
    engine, engine_class = engine_spec
    first, second = gateway_specs
    assert engine_class is NodeEngine
    assert first == second, "whichever node builds it"
    assert first.engine == "http://rollout:8801"
    secret = derived_secret(SECRET.encode(), "captured sessions")
    assert controller.session_secret == engine.serving.access.session_secret == first.access.session_secret == secret
    # The gateways' key opens the engines, and is none of the callers'.
    own = {key.name: key for key in engine.serving.access.keys}["gateway"]
    from rollout.access import hash_key

    assert own.sha256 == hash_key(first.engine_key) and own.scopes == {"serve"}
    assert engine.controller == "demo/controller" and engine.loading_board == "demo"


def test_without_an_address_the_front_is_beside_the_gateway(args, monkeypatch):
    from deployments import gateway as gateways

    specs: list[Any] = []
    monkeypatch.setattr(gateways, "build_gateway_app", specs.append)
    rewrite(args, ', public_url: "http://rollout:8801"', "")
    serve_app.gateway(args)
    assert specs[0].engine == "http://127.0.0.1:8801"


def test_another_secret_makes_other_keys(args, monkeypatch):
    first = spec_of(serve_app.controller(args)).controller.session_secret
    monkeypatch.setenv(SECRET_VARIABLE, "t" * 40)
    assert spec_of(serve_app.controller(args)).controller.session_secret != first


@pytest.mark.parametrize("value", [None, "", "  ", "short"])
def test_a_missing_or_short_secret_is_refused(args, monkeypatch, value):
    if value is None:
        monkeypatch.delenv(SECRET_VARIABLE)
    else:
        monkeypatch.setenv(SECRET_VARIABLE, value)
    with pytest.raises(ConfigError, match=rf"{SECRET_VARIABLE} .*openssl rand") as refused:
        serve_app.controller(args)
    assert "short" not in str(refused.value)


def test_a_missing_key_names_its_variable(args, monkeypatch):
    monkeypatch.delenv("APP_KEY")
    with pytest.raises(ConfigError, match="APP_KEY is not set"):
        serve_app.engine(args)


def test_a_journal_needs_a_place(args):
    rewrite(args, "journal: {path: /journal/demo.sqlite}", "")
    with pytest.raises(ConfigError, match=r"journal\.path: .* volume"):
        serve_app.controller(args)


def test_a_directory_that_no_process_imports_from_is_named(args, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    rewrite(args, f"pythonpath: [{ROOT}]", f"pythonpath: [{ROOT}, {mine}]")
    with pytest.raises(ConfigError, match=rf"pythonpath: {mine} .* PYTHONPATH"):
        serve_app.controller(args)


def test_a_gateway_that_is_switched_off_is_no_application(args, engine_spec):
    rewrite(args, "gateway: {host", "gateway: {enabled: false, host")
    with pytest.raises(ConfigError, match=r"gateway\.enabled: is false"):
        serve_app.gateway(args)
    assert spec_of(serve_app.controller(args)).front is None
    serve_app.engine(args)
    assert engine_spec[0].serving is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"confg": "x"}, r"args\.confg"),
        ({"config": ""}, r"args\.config"),
        ({"proxy_port": 0}, r"args\.proxy_port"),
        ({"overrides": ["engine.replicas"]}, "engine.replicas"),
    ],
)
def test_wrong_args_are_named(args, more, words):
    with pytest.raises(ConfigError, match=words):
        serve_app.controller({**args, **more})


def test_overrides_and_a_revision(args):
    made = serve_app.controller({**args, "overrides": ["workers.count=3"], "revision": 7})
    assert spec_of(made).controller.num_workers == 3


def test_a_file_that_is_not_there(args):
    with pytest.raises(ConfigError, match="cannot be read"):
        serve_app.controller({"config": "/nowhere/cluster.yaml"})
