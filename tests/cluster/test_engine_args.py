"""check_engine_arguments: vLLM's own names, types, choices and bounds, without an engine and without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.engine_args import check_engine_arguments, known_engine_arguments
from rollout.errors import ConfigError

pytest.importorskip("vllm")


def test_names_are_vllms_own() -> None:
    names = known_engine_arguments()
    assert {"tensor_parallel_size", "max_model_len", "logprobs_mode", "enable_log_requests"} <= names
    # Of the OpenAI front end, which Ray passes on.
    assert {"tool_call_parser", "enable_auto_tool_choice", "chat_template"} <= names
    assert not {"host", "port", "api_key"} & names
    assert not any(name.startswith("_") for name in names)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tensor_parallel_size", 2),
        ("max_model_len", 1024),
        ("max_model_len", -1),
        ("max_model_len", None),
        ("gpu_memory_utilization", 0.9),
        ("gpu_memory_utilization", 1),
        ("enforce_eager", True),
        ("enforce_eager", False),
        ("disable_log_stats", False),
        ("dtype", "bfloat16"),
        ("kv_cache_dtype", "fp8"),
        ("quantization", "mxfp4"),
        ("load_format", "dummy"),
        ("tokenizer", "org/name"),
        ("seed", -1),
        ("optimization_level", 2),
        ("attention_backend", "FLASH_ATTN"),
        ("mamba_backend", "triton"),
        ("compilation_config", {"mode": 3, "cudagraph_capture_sizes": [1, 2]}),
        ("speculative_config", {"method": "ngram", "num_speculative_tokens": 3}),
        ("hf_overrides", {"max_position_embeddings": 64}),
        ("limit_mm_per_prompt", {"image": 2}),
        ("structured_outputs_config", {"backend": "xgrammar"}),
        ("cudagraph_capture_sizes", [1, 2, 4]),
        ("allowed_media_domains", ["-a", "b"]),
        ("hf_token", True),
        ("tool_call_parser", "hermes"),
        ("enable_auto_tool_choice", True),
        ("default_chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_what_vllm_takes(name: str, value: Any) -> None:
    assert check_engine_arguments({name: value}) == []


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_modle_len", 1, "is no argument of vLLM; did you mean `max_model_len`?"),
        ("tensor-parallel-size", 1, "did you mean `tensor_parallel_size`?"),
        ("tp", 1, "did you mean `tensor_parallel_size`?"),
        ("zzzzzz", None, "is no argument of vLLM"),
        ("port", 80, "is no argument of vLLM"),
        ("tensor_parallel_size", "2", 'must be a whole number (got "2"); write 2 without quotes'),
        ("tensor_parallel_size", "two", 'must be a whole number (got "two")'),
        ("tensor_parallel_size", 0, "must be greater than or equal to 1 (got 0)"),
        ("tensor_parallel_size", True, "must be a whole number (got true)"),
        ("tensor_parallel_size", [2], "must be a whole number (got [2])"),
        ("max_num_seqs", 1.5, "must be a whole number (got 1.5)"),
        ("max_model_len", "8k", "write 8000 without quotes"),
        ("max_model_len", -2, "must be greater than or equal to -1"),
        ("gpu_memory_utilization", 1.5, "must be less than or equal to 1 (got 1.5)"),
        ("gpu_memory_utilization", "high", 'must be a number (got "high")'),
        ("enforce_eager", "yes", 'must be true or false (got "yes")'),
        ("enforce_eager", 1, "must be true or false (got 1)"),
        ("disable_log_stats", "x", "must be true or false"),
        ("dtype", "bf16", "did you mean `bfloat16`?"),
        ("moe_backend", "tritn", "did you mean `triton`?"),
        ("attention_backend", "FLASH_ATN", "did you mean `FLASH_ATTN`?"),
        ("tokenizer", ["a"], 'must be text (got ["a"])'),
        ("tokenizer_revision", 5, "put quotes around it"),
        ("quantization", "None", "write null without quotes"),
        ("allowed_media_domains", "x", "must be a list"),
        ("cudagraph_capture_sizes", [1, "x"], "has an item of a wrong type"),
        ("compilation_config", {"mod": 3}, "has no field `mod` in vLLM's CompilationConfig; did you mean `mode`?"),
        ("compilation_config", {"cudagraph_mode": "q"}, "is refused by vLLM"),
        ("structured_outputs_config", {"backend": 3}, "backend: Input should be"),
        ("eplb_config", [1], "must be a mapping"),
        ("kv_transfer_config", "x", "must be a mapping"),
    ],
)
def test_what_vllm_refuses(name: str, value: Any, expected: str) -> None:
    [(field, problem)] = check_engine_arguments({name: value})
    assert field == name
    assert expected in problem
    assert "\n" not in problem and "--" not in problem


def test_each_problem_has_its_field() -> None:
    found = check_engine_arguments({"dtype": "x", "max_num_seqs": 4, "nonsense": 1, "seed": "y"})
    assert [field for field, _ in found] == ["dtype", "nonsense", "seed"]


def test_tokens_are_not_told() -> None:
    assert "hunter2" not in str(check_engine_arguments({"hf_token": ["hunter2"]}))


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan"), {"a": object()}, "", [], {}, "-1", "--x", "a=b.c"])
def test_any_value_is_judged_and_none_raises(value: Any) -> None:
    check_engine_arguments(dict.fromkeys(known_engine_arguments(), value))


def test_without_vllm_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster import engine_args

    engine_args._vllm.cache_clear()
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", None)
    try:
        with pytest.raises(ConfigError, match=r"rollout-cluster\[cpu\]"):
            known_engine_arguments()
    finally:
        engine_args._vllm.cache_clear()


def test_it_is_quiet_and_light() -> None:
    """A check prints nothing and sets no variables, and a file that needs none does not import vLLM."""
    code = """
import os, sys
before = dict(os.environ)
from cluster.config_file import load_config
assert "vllm" not in sys.modules and "ray" not in sys.modules and "torch" not in sys.modules
from cluster.engine_args import check_engine_arguments
assert check_engine_arguments({"tensor_parallel_size": 2, "dtype": "bf16"})
assert "vllm" in sys.modules and dict(os.environ) == before
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
