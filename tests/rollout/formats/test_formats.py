"""The record in each trainer's form: exact arrays, padding, masks, forks, failures and missing rewards."""

from __future__ import annotations

import importlib
from array import array
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.formats import to_hf_dataset, to_skyrl, to_slime, to_trl, to_verl
from rollout.formats.rows import FormatError, rows_of
from rollout.ledger import Segment, TurnSpan
from rollout.record import to_table
from rollout.trajectory import SessionKey, StopReason, Trajectory


def segment(prompt: list[int], mask: list[int], version: int = 3) -> Segment:
    """A segment whose tokens are 100, 101, … and whose log-probabilities are -0.5, -1.5, …"""
    count = len(mask)
    return Segment(
        array("i", prompt),
        array("i", range(100, 100 + count)),
        array("b", mask),
        array("f", [-(i + 0.5) if m else 0.0 for i, m in enumerate(mask)]),
        array("i", [version + i if m else -1 for i, m in enumerate(mask)]),
        [TurnSpan("assistant", 0, count, 0.1)] if count else [],
    )


def trajectory(
    task: str, index: int, *segments: Segment, reward: float | None = 1.0, stop: StopReason = "stop", **fields: Any
) -> Trajectory:
    key = SessionKey("r", task, f"r/{task}", index)
    for number, item in enumerate(segments[1:]):
        item.fork_reason = f"fork {number}"
    return Trajectory(key, list(segments), stop, [], reward=reward, **fields)


@pytest.fixture
def table() -> pa.Table:
    return to_table(
        [
            trajectory("a", 0, segment([1, 2, 3], [1, 1, 0, 1]), reward=1.0),
            trajectory("a", 1, segment([1, 2, 3], [1, 1]), reward=0.25, stop="length"),
            trajectory("b", 0, segment([7], [1]), reward=-1.0, metadata={"source": "x"}),
        ]
    )


FORKED = [trajectory("f", 0, segment([1], [1, 1]), segment([1, 100, 9], [1, 0, 1]), reward=0.5)]


# verl


def test_verl_pads_prompts_left_and_responses_right(table: pa.Table):
    found = to_verl(table, pad_token_id=9, prompt_length=4, response_length=5)
    batch = found.batch
    assert batch["prompts"].tolist() == [[9, 1, 2, 3], [9, 1, 2, 3], [9, 9, 9, 7]]
    assert batch["responses"].tolist() == [[100, 101, 102, 103, 9], [100, 101, 9, 9, 9], [100, 9, 9, 9, 9]]
    assert batch["response_mask"].tolist() == [[1, 1, 0, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert batch["attention_mask"][0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0]
    assert batch["position_ids"][0].tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 6]
    assert batch["rm_scores"].tolist() == [[0, 0, 0, 1, 0], [0, 0.25, 0, 0, 0], [-1, 0, 0, 0, 0]]
    assert batch["rollout_log_probs"][0].tolist() == [-0.5, -1.5, 0, -3.5, 0]
    assert {name: values.dtype for name, values in batch.items()} == {
        **dict.fromkeys(["prompts", "responses", "response_mask", "input_ids", "attention_mask", "position_ids"],
                        np.dtype("int64")),
        **dict.fromkeys(["rollout_log_probs", "rm_scores"], np.dtype("float32")),
    }  # fmt: skip
    others = found.non_tensor_batch
    assert others["uid"].tolist() == ["r/a", "r/a", "r/b"]
    assert others["min_global_steps"].tolist() == [3, 3, 3]
    assert others["max_global_steps"].tolist() == [6, 4, 3]
    assert others["__num_turns__"].dtype == np.int32


def test_verl_lengths_are_those_of_the_longest_row(table: pa.Table):
    batch = to_verl(table, pad_token_id=0).batch
    assert batch["input_ids"].shape == (3, 3 + 4)


@pytest.mark.parametrize("field", ["prompt_length", "response_length"])
def test_verl_does_not_cut_in_silence(table: pa.Table, field: str):
    with pytest.raises(FormatError, match=f"'r/a/0' has . {field.split('_')[0]} tokens, more than {field} = 2"):
        to_verl(table, pad_token_id=0, **{field: 2})
    batch = to_verl(table, pad_token_id=0, truncate=True, **{field: 2}).batch
    if field == "prompt_length":
        assert batch["prompts"][0].tolist() == [2, 3], "the end of a prompt is what matters"
    else:
        assert batch["response_mask"][0].tolist() == [1, 1]
        assert batch["rm_scores"][0].tolist() == [0, 1.0]


def test_verl_itself_takes_it(table: pa.Table):
    verl = pytest.importorskip("verl")
    proto = to_verl(table, pad_token_id=0).to_dataproto()
    assert isinstance(proto, verl.DataProto) and len(proto) == 3


# SkyRL


def test_skyrl_gets_unpadded_lists(table: pa.Table):
    found = to_skyrl(table)
    assert found["prompt_token_ids"] == [[1, 2, 3], [1, 2, 3], [7]]
    assert found["response_ids"] == [[100, 101, 102, 103], [100, 101], [100]]
    assert found["loss_masks"] == [[1, 1, 0, 1], [1, 1], [1]]
    assert found["rewards"] == [1.0, 0.25, -1.0]
    assert found["stop_reasons"] == ["stop", "length", "stop"]
    assert found["rollout_logprobs"][1] == [-0.5, -1.5]
    assert "is_last_step" not in found


def test_skyrl_takes_forks_step_by_step_only():
    forked = to_table(FORKED)
    with pytest.raises(FormatError, match="'r/f/0' has 2 segments; pass step_wise=True"):
        to_skyrl(forked)
    found = to_skyrl(forked, step_wise=True)
    assert found["rewards"] == [[0.0, 0.0], [0.0, 0.0, 0.5]]
    assert found["is_last_step"] == [False, True]
    assert found["trajectory_ids"] == ["r/f/0"] * 2


def test_skyrl_a_failed_trajectory_takes_its_group_with_it():
    table = to_table(
        [
            trajectory("a", 0, segment([1], [1])),
            trajectory("a", 1, reward=None, stop="error", error="tool: broke"),
            trajectory("b", 0, segment([2], [1])),
        ]
    )
    found = to_skyrl(table)
    assert found["stop_reasons"] == ["error", "error", "stop"]
    assert found["loss_masks"] == [[0], [0], [1]] and found["response_ids"][0] == [0]
    assert found["rollout_metrics"] == {"failed_groups": 1}


# slime


def test_slime_samples(table: pa.Table):
    groups = to_slime(table)
    assert [len(group) for group in groups] == [2, 1]
    first = groups[0][0]
    assert first["tokens"] == [1, 2, 3, 100, 101, 102, 103] and first["response_length"] == 4
    assert first["loss_mask"] == [1, 1, 0, 1] and len(first["rollout_log_probs"]) == 4
    assert first["weight_versions"] == ["3", "4", "6"]
    assert [sample["status"] for group in groups for sample in group] == ["completed", "truncated", "completed"]
    assert groups[1][0]["metadata"] == {"source": "x", "segment_index": 0}


def test_slime_segments_share_their_rollout():
    (group,) = to_slime(to_table(FORKED))
    assert {sample["rollout_id"] for sample in group} == {"r/f/0"}
    assert [sample["metadata"]["segment_index"] for sample in group] == [0, 1]


@pytest.mark.parametrize(("stop", "status"), [("error", "failed"), ("cancelled", "aborted")])
def test_slime_failures_have_a_status_and_no_reward(stop: StopReason, status: str):
    ((sample,),) = to_slime(to_table([trajectory("a", 0, reward=None, stop=stop)]))
    assert (sample["status"], sample["reward"]) == (status, None)


# TRL, datasets


def test_trl_columns(table: pa.Table):
    found = to_trl(table)
    assert found["env_mask"] == [[1, 1, 0, 1], [1, 1], [1]]
    assert found["completion_ids"][2] == [100] and found["prompt_ids"][2] == [7]
    assert found["reward"] == [1.0, 0.25, -1.0]


def test_datasets(table: pa.Table):
    if importlib.util.find_spec("datasets") is None:
        with pytest.raises(FormatError, match="pip install datasets"):
            to_hf_dataset(table)
    else:
        assert to_hf_dataset(table).num_rows == 3


# All


@pytest.mark.parametrize("to", [to_skyrl, to_trl, to_slime, lambda t, **k: to_verl(t, pad_token_id=0, **k)])
def test_a_missing_reward_is_never_a_zero(to: Any):
    table = to_table([trajectory("a", 0, segment([1], [1]), reward=None)])
    with pytest.raises(FormatError, match="'r/a/0' has no reward"):
        to(table)


def test_missing_rewards_can_be_left_out():
    rows = [trajectory("a", 0, segment([1], [1]), reward=None), trajectory("a", 1, segment([2], [1]))]
    assert to_trl(to_table(rows), unscored="drop")["prompt_ids"] == [[2]]


masks = st.lists(st.integers(0, 1), min_size=1, max_size=12)
prompts = st.lists(st.integers(0, 500), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(prompts, masks), min_size=1, max_size=6))
def test_every_format_holds_the_same_tokens_and_masks(parts: list[tuple[list[int], list[int]]]):
    table = to_table([trajectory("t", i, segment(prompt, mask)) for i, (prompt, mask) in enumerate(parts)])
    rows = rows_of(table)
    verl = to_verl(table, pad_token_id=0).batch
    skyrl, trl, slime = to_skyrl(table), to_trl(table), to_slime(table)
    for index, row in enumerate(rows):
        r, p = len(row.response_ids), len(row.prompt_ids)
        assert verl["responses"][index, :r].tolist() == row.response_ids == trl["completion_ids"][index]
        assert verl["prompts"][index, -p:].tolist() == row.prompt_ids == skyrl["prompt_token_ids"][index]
        assert verl["response_mask"][index].sum() == sum(row.response_mask) == sum(slime[0][index]["loss_mask"])
        assert verl["attention_mask"][index].sum() == p + r
        assert slime[0][index]["tokens"] == row.prompt_ids + row.response_ids
