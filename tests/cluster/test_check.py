"""What `rollout check` proves without a cluster."""

from __future__ import annotations

import sys

import pytest

from cluster.check import check_config, import_path
from cluster.config import ClusterConfig
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
    assert "would have to be downloaded" in found(config(model={"path": "Qwen/Qwen3-0.6B"}))["renderer"][1]


def test_the_import_path_is_put_back():
    before = list(sys.path)
    with import_path(["/somewhere"]):
        assert sys.path[0] == "/somewhere"
    assert sys.path == before
