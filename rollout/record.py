"""The trajectory record: an Arrow table with one row per segment. The one format of everything that leaves.

Invariant (`check`, at every write): the per-token lists of a row have the length of response_ids; mask 1 ⇔
version ≥ 0; log-probabilities are finite, and 0 where the mask is 0; reasoning spans lie inside the response;
segments of a trajectory are complete.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rollout.errors import RecordError
from rollout.ledger import IDS, Segment
from rollout.trajectory import STOP_REASONS, Trajectory

SCHEMA = pa.schema(
    [
        pa.field("run", pa.string(), nullable=False),
        pa.field("task_id", pa.string(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("trajectory_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("segment_index", pa.int32(), nullable=False),
        pa.field("num_segments", pa.int32(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_mask", pa.list_(pa.int8()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("policy_versions", pa.list_(pa.int32()), nullable=False),
        pa.field("reward", pa.float32()),
        pa.field("turn_rewards", pa.list_(pa.float32())),
        pa.field("stop_reason", pa.string(), nullable=False),
        pa.field(
            "turns",
            pa.list_(
                pa.struct(
                    [
                        ("role", pa.string()),
                        ("start", pa.int32()),
                        ("end", pa.int32()),
                        ("seconds", pa.float32()),
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field("reasoning_spans", pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32())]))),
        pa.field("fork_reason", pa.string()),
        pa.field("messages", pa.string(), nullable=False),
        pa.field(
            "tool_calls",
            pa.list_(
                pa.struct(
                    [
                        ("name", pa.string()),
                        ("ok", pa.bool_()),
                        ("seconds", pa.float32()),
                        ("error", pa.string()),
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field(
            "timing",
            pa.struct(
                [
                    ("queue_s", pa.float32()),
                    ("engine_s", pa.float32()),
                    ("tool_s", pa.float32()),
                    ("env_s", pa.float32()),
                    ("total_s", pa.float32()),
                ]
            ),
            nullable=False,
        ),
        pa.field("error", pa.string()),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
    ],
    metadata={"rollout_record": "1"},
)

_PER_TOKEN = ("response_mask", "logprobs", "policy_versions")
# Columns that older software did not write. They are null in what it left.
_LATER = ("reasoning_spans",)
# An errored session may have died before its first prompt; its row still exists, with empty arrays.
_EMPTY = Segment(prompt_ids=array(IDS))


def to_table(trajectories: Sequence[Trajectory]) -> pa.Table:
    """Trajectories as a checked table of SCHEMA, one row per segment. Raises RecordError."""
    rows = [
        (trajectory, index, segment)
        for trajectory in trajectories
        for index, segment in enumerate(trajectory.segments or [_EMPTY])
    ]
    # Whole-trajectory values are written out once and shared by its segments.
    texts = {id(t): (_json(t.messages), _json(t.metadata)) for t in trajectories}
    columns: dict[str, pa.Array] = {
        "run": _array("run", [t.key.run for t, _, _ in rows]),
        "task_id": _array("task_id", [t.key.task_id for t, _, _ in rows]),
        "group_id": _array("group_id", [t.key.group_id for t, _, _ in rows]),
        "trajectory_id": _array("trajectory_id", [t.key.trajectory_id for t, _, _ in rows]),
        "sample_index": _array("sample_index", [t.key.sample_index for t, _, _ in rows]),
        "segment_index": _array("segment_index", [index for _, index, _ in rows]),
        "num_segments": _array("num_segments", [max(1, len(t.segments)) for t, _, _ in rows]),
        "prompt_ids": _token_lists([s.prompt_ids for _, _, s in rows], pa.int32()),
        "response_ids": _token_lists([s.response_ids for _, _, s in rows], pa.int32()),
        "response_mask": _token_lists([s.response_mask for _, _, s in rows], pa.int8()),
        "logprobs": _token_lists([s.logprobs for _, _, s in rows], pa.float32()),
        "policy_versions": _token_lists([s.policy_versions for _, _, s in rows], pa.int32()),
        "reward": _array("reward", [t.reward for t, _, _ in rows]),
        "turn_rewards": _array("turn_rewards", [t.turn_rewards for t, _, _ in rows]),
        "stop_reason": _array("stop_reason", [t.stop_reason for t, _, _ in rows]),
        "turns": _array(
            "turns",
            [
                [{"role": u.role, "start": u.start, "end": u.end, "seconds": u.seconds} for u in s.turns]
                for _, _, s in rows
            ],
        ),
        "reasoning_spans": _array("reasoning_spans", [_spans(s) for _, _, s in rows]),
        "fork_reason": _array("fork_reason", [s.fork_reason for _, _, s in rows]),
        "messages": _array("messages", [texts[id(t)][0] for t, _, _ in rows]),
        "tool_calls": _array(
            "tool_calls",
            [
                [
                    {"name": _text(c.name), "ok": c.ok, "seconds": c.seconds, "error": _text(c.error)}
                    for c in t.tool_calls
                ]
                for t, _, _ in rows
            ],
        ),
        "timing": _array(
            "timing",
            [
                {
                    "queue_s": t.timing.queue_s,
                    "engine_s": t.timing.engine_s,
                    "tool_s": t.timing.tool_s,
                    "env_s": t.timing.env_s,
                    "total_s": t.timing.total_s,
                }
                for t, _, _ in rows
            ],
        ),
        "error": _array("error", [_text(t.error) for t, _, _ in rows]),
        "attempts": _array("attempts", [t.attempts for t, _, _ in rows]),
        "metadata": _array("metadata", [texts[id(t)][1] for t, _, _ in rows]),
    }
    table = pa.table(columns, schema=SCHEMA)
    check(table)
    return table


def upgraded(table: pa.Table) -> pa.Table:
    """A table of older software with the columns that it did not know, as nulls. Others come back as they are."""
    for name in _LATER:
        if name not in table.column_names:
            field = SCHEMA.field(name)
            place = min(SCHEMA.get_field_index(name), table.num_columns)
            table = table.add_column(place, field, pa.nulls(table.num_rows, field.type))
    return table


def _spans(segment: Segment) -> list[dict[str, int]] | None:
    spans = segment.reasoning_spans
    return None if spans is None else [{"start": start, "end": end} for start, end in spans]


def _json(value: Any) -> str:
    """JSON that can be stored: a model may write half a surrogate pair, which is no Unicode text."""
    return _text(json.dumps(value, ensure_ascii=False, default=str)) or ""


def _text(value: str | None) -> str | None:
    return None if value is None else value.encode("utf-8", "replace").decode()


def _array(name: str, values: list[Any]) -> pa.Array:
    return pa.array(values, type=SCHEMA.field(name).type)


def _token_lists(arrays: Sequence[Any], kind: pa.DataType) -> pa.ListArray:
    """Typed arrays to one list column by joining their buffers: no Python number is made on the way."""
    offsets = [0]
    for item in arrays:
        offsets.append(offsets[-1] + len(item))
    joined = b"".join(item.tobytes() for item in arrays)
    values = pa.Array.from_buffers(kind, offsets[-1], [None, pa.py_buffer(joined)])
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), values)


def check(table: pa.Table) -> None:
    """Verify the record's invariant on a whole table, column at a time. Raises RecordError naming a trajectory."""
    if not table.schema.equals(SCHEMA):
        raise RecordError(f"the table's schema is not the record's: {table.schema}")
    if table.num_rows == 0:
        return
    table = table.combine_chunks()
    lengths = pc.list_value_length(table["response_ids"])
    for name in _PER_TOKEN:
        _require(
            table,
            pc.equal(pc.list_value_length(table[name]), lengths),
            f"{name} and response_ids differ in length",
        )
    mask = pc.list_flatten(table["response_mask"])
    parents = pc.list_parent_indices(table["response_mask"])
    sampled = pc.equal(mask, 1)
    versions = pc.list_flatten(table["policy_versions"])
    logprobs = pc.list_flatten(table["logprobs"])
    _require_tokens(table, parents, pc.or_(sampled, pc.equal(mask, 0)), "response_mask holds more than 0 and 1")
    _require_tokens(
        table, parents, pc.equal(sampled, pc.greater_equal(versions, 0)), "mask 1 and version >= 0 disagree"
    )
    _require_tokens(table, parents, pc.is_finite(logprobs), "a log-probability is not finite")
    _require_tokens(
        table,
        parents,
        pc.or_(sampled, pc.equal(logprobs, 0.0)),
        "a log-probability stands where the mask is 0",
    )
    _check_spans(table, lengths)
    known = pc.is_in(table["stop_reason"], value_set=pa.array(STOP_REASONS))
    _require(table, known, "unknown stop_reason")
    inside = pc.and_(
        pc.greater_equal(table["segment_index"], 0), pc.less(table["segment_index"], table["num_segments"])
    )
    _require(table, inside, "segment_index is outside num_segments")
    # Each trajectory has num_segments rows, with indices 0 … num_segments - 1.
    whole = table.group_by("trajectory_id").aggregate(
        [
            ("segment_index", "count_distinct"),
            ("segment_index", "count"),
            ("num_segments", "min"),
            ("num_segments", "max"),
        ]
    )
    complete = pc.and_(
        pc.and_(
            pc.equal(whole["segment_index_count"], whole["num_segments_max"]),
            pc.equal(whole["segment_index_count_distinct"], whole["num_segments_max"]),
        ),
        pc.equal(whole["num_segments_min"], whole["num_segments_max"]),
    )
    _require(whole, complete, "segments are missing or repeated")


def _check_spans(table: pa.Table, lengths: Any) -> None:
    spans = pc.list_flatten(table["reasoning_spans"])
    if not len(spans):
        return
    parents = pc.list_parent_indices(table["reasoning_spans"])
    start, end = pc.struct_field(spans, "start"), pc.struct_field(spans, "end")
    inside = pc.and_(
        pc.and_(pc.greater_equal(start, 0), pc.less(start, end)), pc.less_equal(end, pc.take(lengths, parents))
    )
    _require_tokens(table, parents, inside, "a reasoning span is outside the response")


def _require(table: pa.Table, good: Any, problem: str) -> None:
    good = pc.fill_null(good, False)
    if not pc.all(good).as_py():
        row = pc.index(good, False).as_py()
        raise RecordError(f"{problem} in trajectory {table['trajectory_id'][row].as_py()!r}")


def _require_tokens(table: pa.Table, parents: Any, good: Any, problem: str) -> None:
    good = pc.fill_null(good, False)
    if len(good) and not pc.all(good).as_py():
        row = parents[pc.index(good, False).as_py()].as_py()
        raise RecordError(f"{problem} in trajectory {table['trajectory_id'][row].as_py()!r}")


def read_parquet(path: Path | str) -> pa.Table:
    """A trajectory file as a checked table. Raises RecordError for a file of another kind."""
    try:
        table = upgraded(pq.read_table(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise RecordError(f"{path}: not a readable Parquet file: {error}") from None
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise RecordError(f"{path}: not a trajectory file: it lacks {', '.join(missing)}")
    try:
        table = table.select(SCHEMA.names).cast(SCHEMA)
    except pa.ArrowInvalid as error:
        raise RecordError(f"{path}: a column has another type than the record's: {error}") from None
    check(table)
    return table
