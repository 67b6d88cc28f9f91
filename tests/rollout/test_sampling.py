"""Sampling parameters: bounds, what reaches vLLM, and seeds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollout.sampling import Sampling, StructuredOutputs, turn_seed


def refusal(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        Sampling(**fields)
    return str(caught.value)


def test_defaults_reach_vllm_as_max_tokens_alone():
    assert Sampling().to_vllm() == {"max_tokens": 1024}
    assert Sampling(temperature=1.0, top_k=0).to_vllm() == {"max_tokens": 1024}


def test_what_differs_from_the_defaults_reaches_vllm():
    sampling = Sampling(
        temperature=0.0, top_p=0.9, top_k=20, min_p=0.1, max_tokens=7, min_tokens=2, stop=["END"], stop_token_ids=[5],
        ignore_eos=True, logit_bias={3: -100.0}, allowed_token_ids=[1, 2], bad_words=["no"], presence_penalty=0.5,
        frequency_penalty=-0.5, repetition_penalty=1.1,
    )  # fmt: skip
    assert sampling.to_vllm() == {
        "temperature": 0.0, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "max_tokens": 7, "min_tokens": 2,
        "stop": ["END"], "stop_token_ids": [5], "ignore_eos": True, "logit_bias": {3: -100.0},
        "allowed_token_ids": [1, 2], "bad_words": ["no"],
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1,
    }  # fmt: skip


def test_the_seed_is_the_sessions_business_not_vllms():
    assert Sampling(seed=7).to_vllm() == {"max_tokens": 1024}


@pytest.mark.parametrize(
    ("given_", "vllm"),
    [
        ({"json_schema": {"type": "object"}}, {"json": {"type": "object"}}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"choice": ["yes", "no"]}, {"choice": ["yes", "no"]}),
        ({"grammar": "root ::= 'a'"}, {"grammar": "root ::= 'a'"}),
    ],
)
def test_structured_outputs_have_vllms_names(given_: dict[str, Any], vllm: dict[str, Any]):
    sampling = Sampling.model_validate({"structured_outputs": given_})
    assert sampling.to_vllm() == {"max_tokens": 1024, "structured_outputs": vllm}


@pytest.mark.parametrize("given_", [{}, {"regex": "a", "choice": ["b"]}])
def test_structured_outputs_are_exactly_one(given_: dict[str, Any]):
    with pytest.raises(ValidationError, match="exactly one of json_schema, regex, choice, grammar"):
        StructuredOutputs(**given_)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": 10.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"min_p": 1.5},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0.0},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"stop": ["x"] * 17},
        {"stop_token_ids": [1] * 65},
        {"allowed_token_ids": []},
        {"seed": -1},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_values_out_of_bounds_are_refused(fields: dict[str, Any]):
    assert next(iter(fields)) in refusal(**fields)


@pytest.mark.parametrize("name", ["n", "logprobs", "detokenize", "prompt_logprobs", "max_token"])
def test_what_would_break_the_record_is_no_field(name: str):
    assert "Extra inputs are not permitted" in refusal(**{name: 1})


def test_fields_must_agree_with_each_other():
    assert "min_tokens (9) is more than max_tokens (8)" in refusal(min_tokens=9, max_tokens=8)
    assert "empty string" in refusal(stop=["a", ""])
    assert Sampling(min_tokens=8, max_tokens=8).min_tokens == 8


def test_sampling_cannot_be_changed_in_place():
    with pytest.raises(ValidationError):
        Sampling().temperature = 0.5


def test_a_turn_seed_is_the_same_in_every_process():
    # A literal, as a run is only reproducible if this never changes.
    assert turn_seed(0, "task/0", 0) == 6139009660577962876


def test_seeds_differ_by_base_sample_and_turn():
    seeds = {turn_seed(base, f"task/{sample}", turn) for base in range(4) for sample in range(8) for turn in range(8)}
    assert len(seeds) == 4 * 8 * 8


@given(st.integers(0, 2**63 - 1), st.text(), st.integers(0, 1000))
def test_a_turn_seed_is_one_that_vllm_takes(base: int, key: str, turn: int):
    seed = turn_seed(base, key, turn)
    assert 0 <= seed < 2**63
    assert seed == turn_seed(base, key, turn)
