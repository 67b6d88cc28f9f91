"""The record: trajectories to Arrow and back, and every invariant that `check` must refuse."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.errors import RecordError
from rollout.ledger import Segment, TurnSpan
from rollout.record import SCHEMA, check, read_parquet, to_table, upgraded
from rollout.tool_calls import ToolCallRecord
from rollout.trajectory import STOP_REASONS, SessionKey, Timing, Trajectory


def segment(ids: list[int], mask: list[int], fork_reason: str | None = None) -> Segment:
    return Segment(
        prompt_ids=array("i", [1, 2, 3]),
        response_ids=array("i", ids),
        response_mask=array("b", mask),
        logprobs=array("f", [-0.5 if m else 0.0 for m in mask]),
        policy_versions=array("i", [4 if m else -1 for m in mask]),
        turns=[TurnSpan("assistant", 0, len(ids), 0.25)],
        fork_reason=fork_reason,
    )


def trajectory(index: int = 0, segments: list[Segment] | None = None, **fields: Any) -> Trajectory:
    fields = {"stop_reason": "stop", "messages": [{"role": "user", "content": "hé"}]} | fields
    chosen = [segment([7, 8], [1, 1])] if segments is None else segments
    return Trajectory(SessionKey("run", "task", "run/task", index), chosen, **fields)


def replaced(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    field = SCHEMA.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, type=field.type))


FORKED = [segment([7, 8, 9], [1, 0, 1]), segment([5], [1], "history was rewritten")]


def test_a_trajectory_becomes_one_row_a_segment():
    table = to_table(
        [
            trajectory(
                0,
                FORKED,
                reward=0.5,
                turn_rewards=[1.0, None],  # type: ignore[list-item]
                tool_calls=[ToolCallRecord("add", True, 0.5), ToolCallRecord("div", False, 0.25, "exception: no")],
                timing=Timing(1, 2, 3, 4, 10),
                metadata={"source": "x"},
                attempts=2,
            )
        ]
    )
    assert table.schema.equals(SCHEMA, check_metadata=True)
    first, second = table.to_pylist()
    assert first == {
        "run": "run",
        "task_id": "task",
        "group_id": "run/task",
        "trajectory_id": "run/task/0",
        "sample_index": 0,
        "segment_index": 0,
        "num_segments": 2,
        "prompt_ids": [1, 2, 3],
        "response_ids": [7, 8, 9],
        "response_mask": [1, 0, 1],
        "logprobs": [-0.5, 0.0, -0.5],
        "policy_versions": [4, -1, 4],
        "reward": 0.5,
        "turn_rewards": [1.0, None],
        "stop_reason": "stop",
        "turns": [{"role": "assistant", "start": 0, "end": 3, "seconds": 0.25}],
        "reasoning_spans": None,
        "fork_reason": None,
        "messages": '[{"role": "user", "content": "hé"}]',
        "tool_calls": [
            {"name": "add", "ok": True, "seconds": 0.5, "error": None},
            {"name": "div", "ok": False, "seconds": 0.25, "error": "exception: no"},
        ],
        "timing": {"queue_s": 1, "engine_s": 2, "tool_s": 3, "env_s": 4, "total_s": 10},
        "error": None,
        "attempts": 2,
        "metadata": '{"source": "x"}',
    }
    per_segment = ("segment_index", "response_ids", "fork_reason")
    assert [second[name] for name in per_segment] == [1, [5], "history was rewritten"]
    of_tokens = {"response_mask", "logprobs", "policy_versions", "turns"}
    shared = first.keys() - {*per_segment, *of_tokens}
    assert {name: second[name] for name in shared} == {name: first[name] for name in shared}


def test_a_session_that_died_before_its_first_prompt_still_has_a_row():
    (row,) = to_table([trajectory(0, [], stop_reason="error", error="engine: no")]).to_pylist()
    assert (row["prompt_ids"], row["response_ids"], row["turns"]) == ([], [], [])
    assert (row["segment_index"], row["num_segments"], row["error"]) == (0, 1, "engine: no")


def test_a_reward_that_was_not_given_is_null_and_never_zero():
    none, zero = to_table([trajectory(0), trajectory(1, reward=0.0)]).to_pylist()
    assert (none["reward"], none["turn_rewards"], zero["reward"]) == (None, None, 0.0)


def test_no_trajectories_make_an_empty_table():
    table = to_table([])
    assert table.num_rows == 0 and table.schema.equals(SCHEMA)


def test_values_that_json_does_not_know_are_written_as_text():
    (row,) = to_table([trajectory(0, metadata={"path": Path("/x")})]).to_pylist()
    assert json.loads(row["metadata"]) == {"path": "/x"}


def test_the_stop_reasons_are_the_designs():
    assert set(STOP_REASONS) == {
        "stop", "length", "max_turns", "max_tokens", "deadline", "tool_error", "cancelled", "error",
    }  # fmt: skip


tokens = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=8)


@given(st.lists(st.lists(tokens, min_size=1, max_size=3), max_size=4))
def test_tokens_survive_the_columns(trajectories: list[list[list[tuple[int, bool]]]]):
    made = [
        trajectory(
            i, [segment([t for t, _ in s], [int(m) for _, m in s], "x" if j else None) for j, s in enumerate(one)]
        )
        for i, one in enumerate(trajectories)
    ]
    rows = to_table(made).to_pylist()
    flat = [s for one in trajectories for s in one]
    assert [row["response_ids"] for row in rows] == [[t for t, _ in s] for s in flat]
    assert [row["response_mask"] for row in rows] == [[int(m) for _, m in s] for s in flat]
    assert [row["logprobs"] for row in rows] == [[-0.5 if m else 0.0 for _, m in s] for s in flat]
    assert [row["policy_versions"] for row in rows] == [[4 if m else -1 for _, m in s] for s in flat]


# What is refused. The second of four rows is wrong: two trajectories, one of them forked, and one that is empty.


def good() -> pa.Table:
    return to_table([trajectory(0), trajectory(1, FORKED), trajectory(2, [], stop_reason="error")])


BAD = [
    ("response_mask", [[1, 1], [1, 0], [1], []], "response_mask and response_ids differ in length"),
    ("logprobs", [[-1, -1], [-1, 0, -1, 0], [-1], []], "logprobs and response_ids differ in length"),
    ("policy_versions", [[4, 4], [], [4], []], "policy_versions and response_ids differ in length"),
    ("response_mask", [[1, 1], [1, 2, 1], [1], []], "response_mask holds more than 0 and 1"),
    ("response_mask", [[1, 1], [1, -1, 1], [1], []], "response_mask holds more than 0 and 1"),
    ("policy_versions", [[4, 4], [4, 0, 4], [4], []], "mask 1 and version >= 0 disagree"),
    ("policy_versions", [[4, 4], [-1, -1, 4], [4], []], "mask 1 and version >= 0 disagree"),
    ("logprobs", [[-1, -1], [-1, 0, float("nan")], [-1], []], "a log-probability is not finite"),
    ("logprobs", [[-1, -1], [-1, 0, -float("inf")], [-1], []], "a log-probability is not finite"),
    ("logprobs", [[-1, -1], [-1, -0.1, -1], [-1], []], "a log-probability stands where the mask is 0"),
    ("stop_reason", ["stop", "finished", "stop", "error"], "unknown stop_reason"),
    ("segment_index", [0, -1, 1, 0], "segment_index is outside num_segments"),
    ("segment_index", [0, 2, 1, 0], "segment_index is outside num_segments"),
]


@pytest.mark.parametrize(("name", "values", "problem"), BAD, ids=[f"{i}-{case[0]}" for i, case in enumerate(BAD)])
@pytest.mark.parametrize("shape", ["whole", "sliced", "chunked"])
def test_a_broken_row_is_refused_and_its_trajectory_named(name: str, values: list[Any], problem: str, shape: str):
    check(good())
    bad = replaced(good(), name, values)
    table = {"whole": bad, "sliced": bad.slice(1), "chunked": pa.concat_tables([good(), bad])}[shape]
    with pytest.raises(RecordError) as caught:
        check(table)
    assert str(caught.value) == f"{problem} in trajectory 'run/task/1'"


def test_a_table_of_other_columns_is_refused():
    with pytest.raises(RecordError, match="schema is not the record's"):
        check(good().drop_columns(["reward"]))
    with pytest.raises(RecordError, match="schema is not the record's"):
        check(pa.table({"a": [1]}))


def test_to_table_checks_what_it_writes():
    bad = segment([7, 8], [1, 1])
    bad.policy_versions[1] = -1
    with pytest.raises(RecordError, match="mask 1 and version >= 0 disagree in trajectory 'run/task/5'"):
        to_table([trajectory(4), trajectory(5, [bad])])


@pytest.mark.parametrize("rows", [[0, 1, 3], [0, 2, 3], [0, 1, 1, 3]], ids=["first alone", "second alone", "twice"])
def test_segments_of_a_trajectory_must_be_complete(rows: list[int]):
    with pytest.raises(RecordError, match="run/task/1"):
        check(good().take(rows))


@pytest.mark.parametrize("name", ["response_mask", "logprobs", "policy_versions"])
def test_a_null_token_is_refused(name: str):
    values = good()[name].to_pylist()
    values[1][0] = None
    with pytest.raises(RecordError, match="run/task/1"):
        check(replaced(good(), name, values))


def test_messages_with_a_lone_surrogate_can_be_written():
    arguments = json.loads(r'{"text": "\ud800"}')
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    (row,) = to_table([trajectory(0, messages=[call])]).to_pylist()
    assert json.loads(row["messages"])[0]["tool_calls"][0]["function"]["name"] == "f"


# Files


def test_a_file_is_read_as_it_was_written(tmp_path: Path):
    path = tmp_path / "t.parquet"
    pq.write_table(good(), path)
    assert read_parquet(path).equals(good())


def test_columns_of_others_are_left_out(tmp_path: Path):
    path = tmp_path / "t.parquet"
    pq.write_table(good().append_column("extra", pa.array(range(4))), path)
    assert read_parquet(path).column_names == SCHEMA.names


def test_files_of_another_kind_are_refused(tmp_path: Path):
    path = tmp_path / "t.parquet"
    with pytest.raises(RecordError, match="not a readable Parquet file"):
        read_parquet(path)
    path.write_bytes(b"garbage" * 100)
    with pytest.raises(RecordError, match="not a readable Parquet file"):
        read_parquet(path)
    pq.write_table(pa.table({"run": ["x"]}), path)
    with pytest.raises(RecordError, match="not a trajectory file: it lacks task_id, group_id, trajectory_id"):
        read_parquet(path)


def test_a_file_that_breaks_the_invariant_is_refused(tmp_path: Path):
    path = tmp_path / "t.parquet"
    pq.write_table(replaced(good(), "stop_reason", ["stop", "what", "stop", "error"]), path)
    with pytest.raises(RecordError, match="unknown stop_reason in trajectory 'run/task/1'"):
        read_parquet(path)


def test_a_file_with_a_column_of_another_type_is_refused(tmp_path: Path):
    path = tmp_path / "t.parquet"
    at = SCHEMA.get_field_index("sample_index")
    pq.write_table(good().set_column(at, "sample_index", pa.array(["a", "b", "c", "d"])), path)
    with pytest.raises(RecordError):
        read_parquet(path)


# Reasoning spans


def reasoned(*spans: tuple[int, int]) -> Trajectory:
    made = segment([7, 8, 9], [1, 1, 1])
    made.reasoning_spans = list(spans)
    return trajectory(0, [made])


def test_reasoning_spans_are_written_as_they_are():
    (row,) = to_table([reasoned((0, 1), (2, 3))]).to_pylist()
    assert row["reasoning_spans"] == [{"start": 0, "end": 1}, {"start": 2, "end": 3}]
    assert to_table([reasoned()]).to_pylist()[0]["reasoning_spans"] == [], "looked for and not there is not null"


@pytest.mark.parametrize("span", [(-1, 1), (2, 2), (2, 1), (0, 4)])
def test_a_reasoning_span_outside_the_response_is_refused(span: tuple[int, int]):
    with pytest.raises(RecordError, match="reasoning span"):
        to_table([reasoned((0, 1), span)])


def test_what_older_software_wrote_is_read_with_nulls(tmp_path: Path):
    older = to_table([reasoned((0, 1))]).drop_columns(["reasoning_spans"])
    pq.write_table(older, tmp_path / "older.parquet")
    table = read_parquet(tmp_path / "older.parquet")
    assert table.schema.equals(SCHEMA) and table["reasoning_spans"].to_pylist() == [None]
    assert upgraded(older).schema.equals(SCHEMA)
    assert upgraded(table) is table
