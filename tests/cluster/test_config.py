"""ClusterConfig: defaults, bounds, what is refused, and what is handed to the engines."""

from __future__ import annotations

import os
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import LOGPROBS_MODE, MIN_LOGICAL_CPUS, ClusterConfig, RayConfig, bind_ranks
from rollout.errors import ConfigError


def config(**sections: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"model": {"path": "org/tiny"}} | sections)


def refusal(**sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        config(**sections)
    return str(caught.value)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 0})


def test_only_the_model_is_needed() -> None:
    made = config()
    assert made.name == "rollout"
    assert (made.engine.device, made.engine.replicas, made.engine.tensor_parallel_size) == ("gpu", 1, 1)
    assert (made.workers.count, made.workers.sessions, made.run.group_size) == (1, 256, 8)
    assert made.environment is None and made.mcp_servers == {} and made.ray.address is None
    with pytest.raises(ValidationError):
        ClusterConfig.model_validate({})


@pytest.mark.parametrize(
    ("path", "name"),
    [("org/tiny", "tiny"), ("/models/a/b", "b"), ("/models/a/b/", "b"), ("plain", "plain")],
)
def test_the_served_name_is_the_last_component(path: str, name: str) -> None:
    assert config(model={"path": path}).model.name == name
    assert config(model={"path": path, "name": None}).model.name == name
    assert config(model={"path": path, "name": "other"}).model.name == "other"


def test_empty_sections_have_their_defaults() -> None:
    empty = dict.fromkeys(
        ("engine", "workers", "environment", "mcp_servers", "sampling", "limits", "run", "ray", "pythonpath")
    )
    assert config(**empty) == config()
    assert config(engine={"vllm": None, "env": None, "replicas": None}) == config()


def test_it_survives_a_round_trip() -> None:
    made = config(
        engine={"vllm": {"max_model_len": 4096}, "env": {"A": 1}},
        environment={"path": "a.b:C", "args": {"x": [1]}},
        mcp_servers={"s": {"command": ["server"]}},
    )
    assert ClusterConfig.model_validate(made.model_dump()) == made
    assert ClusterConfig.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize("name", ["", "Upper", "-a", "a" * 41, "a_b", "a\n", "ä"])
def test_names_that_cannot_name_files_are_refused(name: str) -> None:
    assert "a-z" in refusal(name=name)


@pytest.mark.parametrize(
    "sections",
    [
        {"engine": {"replicas": 0}},
        {"engine": {"replicas": 1025}},
        {"engine": {"device": "tpu"}},
        {"engine": {"start_seconds": 0}},
        {"engine": {"start_seconds": float("inf")}},
        {"engine": {"sticky_margin": -1}},
        {"workers": {"count": 0}},
        {"workers": {"sessions": 10_001}},
        {"run": {"group_size": 1025}},
        {"run": {"max_attempts": 0}},
        {"run": {"max_concurrent_sessions": 0}},
        {"ray": {"num_cpus": 0}},
        {"ray": {"object_store_memory_mb": 79}},
        {"environment": {"path": "no_class"}},
        {"environment": {"path": "a:b:C"}},
        {"environment": {"path": "../a:C"}},
        {"environment": {}},
        {"model": {"path": ""}},
        {"unknown": 1},
    ],
)
def test_values_out_of_bounds_are_refused(sections: dict[str, Any]) -> None:
    refusal(**sections)


@pytest.mark.parametrize(
    ("argument", "value", "fix"),
    [
        ("model", "x", "model.path"),
        ("served_model_name", "x", "model.name"),
        ("revision", "x", "model.revision"),
        ("distributed_executor_backend", "mp", "remove"),
        ("logprobs_mode", "raw_logprobs", LOGPROBS_MODE),
        ("tensor_parallel_size", "2", "whole number"),
        ("tensor_parallel_size", 0, "whole number"),
        ("tensor_parallel_size", True, "whole number"),
    ],
)
def test_arguments_that_are_ours_are_refused_with_their_place(argument: str, value: Any, fix: str) -> None:
    assert fix in refusal(engine={"vllm": {argument: value}})


def test_arguments_that_only_repeat_ours_are_allowed() -> None:
    config(engine={"vllm": {"logprobs_mode": LOGPROBS_MODE, "tokenizer": "org/t", "disable_log_stats": True}})


def test_a_turn_must_fit_beside_a_prompt() -> None:
    window = {"vllm": {"max_model_len": 1024}}
    assert "lower sampling.max_tokens" in refusal(engine=window, sampling={"max_tokens": 1024})
    assert "the default" in refusal(engine=window)
    config(engine=window, sampling={"max_tokens": 1023})
    config(engine={"vllm": {"max_model_len": -1}})


def test_environment_variables_are_text() -> None:
    assert config(engine={"env": {"A": 1, "B": 0.5, "C": "x"}}).engine.env == {"A": "1", "B": "0.5", "C": "x"}
    for bad in ({"A": True}, {"A": None}, {"A": [1]}, {"A B": "x"}, {1: "x"}):
        refusal(engine={"env": bad})


def test_secrets_are_in_no_repr_and_no_error() -> None:
    made = config(
        engine={"env": {"TOKEN": "hunter2"}},
        mcp_servers={"s": {"url": "http://host/mcp", "headers": {"Authorization": "hunter2"}}},
    )
    assert "hunter2" not in repr(made) + str(made)
    assert "hunter2" not in refusal(engine={"env": {"TOKEN": "hunter2"}, "replicas": 0})
    assert "hunter2" not in refusal(engine={"env": {"TOKEN=hunter2": 1}})


def test_gpu_types_need_gpus() -> None:
    assert "device: gpu" in refusal(engine={"device": "cpu", "accelerator_type": "H200"})
    assert config(engine={"accelerator_type": "H200"}).engine.accelerator_type == "H200"


def test_environment_of_a_gpu_replica() -> None:
    assert config().replica_env() == {"VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    assert config(model={"path": "/models/x"}).replica_env()["HF_HUB_OFFLINE"] == "1"


def test_environment_of_a_cpu_replica(two_cores: None) -> None:
    one = config(engine={"device": "cpu"}).replica_env()
    assert one["VLLM_CPU_KVCACHE_SPACE"] == "1" and "VLLM_CPU_OMP_THREADS_BIND" not in one
    two = config(engine={"device": "cpu", "vllm": {"tensor_parallel_size": 2}}).replica_env()
    assert two["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
    own = {"VLLM_CPU_KVCACHE_SPACE": 4, "VLLM_CPU_OMP_THREADS_BIND": "0-1|2-3", "VLLM_NO_USAGE_STATS": "0"}
    given = config(engine={"device": "cpu", "vllm": {"tensor_parallel_size": 2}, "env": own}).replica_env()
    assert given.items() >= {key: str(value) for key, value in own.items()}.items()


def test_more_ranks_than_cores(two_cores: None) -> None:
    engine: dict[str, Any] = {"device": "cpu", "vllm": {"tensor_parallel_size": 4}}
    assert "VLLM_CPU_OMP_THREADS_BIND" in refusal(engine=engine)
    # The cores of another machine are not known here, so only asking for the binding is refused.
    elsewhere = config(engine=engine, ray={"address": "auto"})
    with pytest.raises(ConfigError, match="4 ranks on 2 core"):
        elsewhere.replica_env()
    config(engine=engine | {"env": {"VLLM_CPU_OMP_THREADS_BIND": "0|1|0|1"}}).replica_env()
    assert "4 ranks" in refusal(
        engine={"device": "cpu", "vllm": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}}
    )


@pytest.mark.parametrize(
    ("cores", "ranks", "binding"),
    [([0, 1], 2, "0|1"), ([0, 1, 2, 3], 2, "0,1|2,3"), ([4, 6, 9], 2, "4|6"), ([0, 1], 1, "0,1")],
)
def test_ranks_share_cores_evenly(cores: list[int], ranks: int, binding: str) -> None:
    assert bind_ranks(cores, ranks) == binding


def test_ranks_without_cores() -> None:
    with pytest.raises(ConfigError):
        bind_ranks([0], 2)


def test_arguments_of_the_engine() -> None:
    assert config().llm_engine_kwargs() == {"logprobs_mode": LOGPROBS_MODE, "enable_prefix_caching": True}
    assert config(engine={"device": "cpu"}).llm_engine_kwargs() == {
        "logprobs_mode": LOGPROBS_MODE,
        "enable_prefix_caching": True,
        "dtype": "bfloat16",
        "enforce_eager": True,
    }
    vllm = {"enable_prefix_caching": False, "dtype": "float32", "seed": None, "hf_overrides": {"a": [1]}}
    made = config(model={"path": "a/b", "revision": "main"}, engine={"device": "cpu", "vllm": vllm})
    kwargs = made.llm_engine_kwargs()
    assert kwargs["enable_prefix_caching"] is False and kwargs["dtype"] == "float32"
    assert kwargs["revision"] == "main" and "seed" not in kwargs
    kwargs["hf_overrides"]["a"].append(2)
    assert made.engine.vllm["hf_overrides"] == {"a": [1]}


def test_a_small_machine_claims_enough_logical_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert RayConfig().logical_cpus == MIN_LOGICAL_CPUS
    assert RayConfig(num_cpus=3).logical_cpus == 3
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert RayConfig().logical_cpus == 64
