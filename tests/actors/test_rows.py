"""Rows and summaries of trajectories: the oldest version, reasoning spans, and what cannot be written."""

from __future__ import annotations

from array import array

import pyarrow as pa

from actors.rows import to_rows
from rollout.ledger import Segment, TurnSpan
from rollout.reasoning import ReasoningMarkers
from rollout.trajectory import SessionKey, Trajectory


def trajectory(*segments: Segment, index: int = 0) -> Trajectory:
    return Trajectory(SessionKey("r", "t", "r/t", index), list(segments), "stop", [], reward=1.0)


def segment(versions: list[int], ids: list[int] | None = None) -> Segment:
    size = len(versions)
    mask = [int(version >= 0) for version in versions]
    return Segment(
        array("i", [1]),
        array("i", ids or [5] * size),
        array("b", mask),
        array("f", [-0.5 if m else 0.0 for m in mask]),
        array("i", versions),
        [TurnSpan("assistant", 0, size, 0.0)],
    )


def read(rows: bytes) -> pa.Table:
    return pa.ipc.open_stream(rows).read_all()


def test_the_oldest_version_is_the_lowest_of_all_sampled_tokens():
    """A captured chain may begin under newer weights than a later call of it was sampled with."""
    _, (summary,) = to_rows([trajectory(segment([7, 7, -1, 5, 6]), segment([8, 8]))])
    assert summary.oldest_version == 5
    assert summary.version_tokens == [[5, 1], [6, 1], [7, 2], [8, 2]]


def test_nothing_sampled_has_no_oldest_version():
    _, (empty, unsampled) = to_rows([trajectory(), trajectory(segment([-1, -1]), index=1)])
    assert empty.oldest_version is None and unsampled.oldest_version is None


def test_reasoning_spans_are_written_where_the_markers_are_known():
    markers = ReasoningMarkers((90,), frozenset({91}))
    made = [trajectory(segment([1] * 4, [90, 5, 91, 6]))]
    assert read(to_rows(made, markers)[0])["reasoning_spans"].to_pylist() == [[{"start": 1, "end": 2}]]
    assert read(to_rows(made)[0])["reasoning_spans"].to_pylist() == [None]


def test_one_that_cannot_be_written_is_an_error_and_the_others_are_whole():
    bad = trajectory(segment([1, 1]), index=1)
    bad.segments[0].logprobs.append(0.0)
    rows, (good, broken) = to_rows([trajectory(segment([1, 1])), bad])
    assert (good.stop_reason, broken.stop_reason) == ("stop", "error")
    table = read(rows)
    assert table["stop_reason"].to_pylist() == ["stop", "error"]
    assert "logprobs" in table["error"].to_pylist()[1]
    assert broken.reward is None and broken.num_rows == 1
