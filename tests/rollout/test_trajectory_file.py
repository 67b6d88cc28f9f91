"""The trajectory writer: what was flushed survives a kill, and a directory is never overwritten by accident."""

from __future__ import annotations

from array import array
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout import trajectory_file
from rollout.errors import RecordError
from rollout.ledger import Segment
from rollout.record import SCHEMA, to_table
from rollout.trajectory import SessionKey, Trajectory
from rollout.trajectory_file import FILE_NAME, PARTS, TrajectoryWriter, read_trajectories


def rows(*indices: int) -> pa.Table:
    return to_table(
        [
            Trajectory(SessionKey("run", "t", "run/t", i), [Segment(array("i", [1]))], "stop", [{"role": "user"}])
            for i in indices
        ]
    )


def ids(table: pa.Table) -> list[int]:
    return table["sample_index"].to_pylist()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [100.0]
    monkeypatch.setattr(trajectory_file.time, "monotonic", lambda: clock[0])
    return clock


def parts(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / PARTS).iterdir())


def test_everything_is_in_one_file_in_the_order_of_writing(tmp_path: Path):
    out = tmp_path / "deep" / "out"
    with TrajectoryWriter(out, {"run": "r", "model": "/m"}) as writer:
        writer.write(rows(2, 0))
        writer.flush()
        writer.write(rows(1))
    assert writer.num_rows == 3
    assert sorted(path.name for path in out.iterdir()) == [FILE_NAME]
    for path in (out, out / FILE_NAME, str(out)):
        table, info = read_trajectories(path)
        assert ids(table) == [2, 0, 1] and table.schema.equals(SCHEMA)
        assert info == {"run": "r", "model": "/m"}


def test_the_file_says_which_record_it_holds(tmp_path: Path):
    with TrajectoryWriter(tmp_path / "out") as writer:
        writer.write(rows(0))
    metadata = pq.read_schema(writer.path).metadata
    assert metadata[b"rollout_record"] == b"1"
    assert read_trajectories(writer.path)[1] == {}


def test_what_was_flushed_is_readable_after_a_kill(tmp_path: Path):
    writer = TrajectoryWriter(tmp_path / "out", {"run": "r"})
    for index in range(12):
        writer.write(rows(index))
        writer.flush()
    writer.write(rows(99))
    # Killed: neither flush nor close is reached, and a part was half written.
    (tmp_path / "out" / PARTS / "part-000012.partial").write_bytes(b"PAR1 half")
    table, _ = read_trajectories(tmp_path / "out")
    assert ids(table) == list(range(12))


def test_an_empty_run_leaves_an_empty_file(tmp_path: Path):
    with TrajectoryWriter(tmp_path / "out") as writer:
        pass
    table, _ = read_trajectories(writer.path)
    assert table.num_rows == 0 and table.schema.equals(SCHEMA)


def test_a_part_is_written_when_it_has_enough_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: list[float]):
    monkeypatch.setattr(trajectory_file, "PART_ROWS", 3)
    writer = TrajectoryWriter(tmp_path / "out")
    writer.write(rows(0, 1))
    assert parts(tmp_path / "out") == []
    writer.write(rows(2))
    assert parts(tmp_path / "out") == ["part-000000.parquet"]
    writer.write(rows(3, 4, 5, 6))
    assert parts(tmp_path / "out") == ["part-000000.parquet", "part-000001.parquet"]
    assert ids(read_trajectories(tmp_path / "out")[0]) == [0, 1, 2, 3, 4, 5, 6]


def test_a_part_is_written_when_its_first_row_has_waited(tmp_path: Path, now: list[float]):
    writer = TrajectoryWriter(tmp_path / "out")
    now[0] += 1000
    writer.write(rows(0))
    assert parts(tmp_path / "out") == [], "the wait begins with the first row, not with the writer"
    now[0] += trajectory_file.PART_SECONDS - 0.1
    writer.write(rows(1))
    assert parts(tmp_path / "out") == []
    now[0] += 0.2
    writer.write(rows(2))
    assert parts(tmp_path / "out") == ["part-000000.parquet"]
    writer.write(rows(3))
    assert parts(tmp_path / "out") == ["part-000000.parquet"], "the next part waits anew"


def test_closing_twice_and_flushing_nothing_do_no_harm(tmp_path: Path):
    writer = TrajectoryWriter(tmp_path / "out")
    writer.flush()
    assert parts(tmp_path / "out") == []
    writer.write(rows(0))
    assert writer.close() == tmp_path / "out" / FILE_NAME
    assert writer.close() == tmp_path / "out" / FILE_NAME
    assert ids(read_trajectories(writer.path)[0]) == [0]


def test_an_exception_in_the_block_keeps_what_was_written(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), TrajectoryWriter(tmp_path / "out") as writer:
        writer.write(rows(0, 1))
        raise KeyboardInterrupt
    assert ids(read_trajectories(tmp_path / "out")[0]) == [0, 1]


def test_a_directory_with_trajectories_is_refused(tmp_path: Path):
    with TrajectoryWriter(tmp_path / "done") as writer:
        writer.write(rows(0))
    killed = TrajectoryWriter(tmp_path / "killed")
    killed.write(rows(1))
    killed.flush()
    for name, kept in (("done", [0]), ("killed", [1])):
        with pytest.raises(RecordError, match="already holds trajectories; choose another directory or --overwrite"):
            TrajectoryWriter(tmp_path / name)
        assert ids(read_trajectories(tmp_path / name)[0]) == kept


def test_overwriting_leaves_nothing_of_the_old(tmp_path: Path):
    out = tmp_path / "out"
    with TrajectoryWriter(out, {"run": "old"}) as writer:
        writer.write(rows(0))
    (out / "notes.txt").write_text("mine")
    killed = TrajectoryWriter(out, overwrite=True)
    assert not (out / FILE_NAME).exists()
    killed.write(rows(1))
    killed.flush()
    with TrajectoryWriter(out, {"run": "new"}, overwrite=True) as writer:
        writer.write(rows(2))
    table, info = read_trajectories(out)
    assert (ids(table), info) == ([2], {"run": "new"})
    assert (out / "notes.txt").read_text() == "mine", "what is not ours stays"


def test_a_table_that_is_no_record_is_refused_and_not_kept(tmp_path: Path):
    with TrajectoryWriter(tmp_path / "out") as writer:
        writer.write(rows(0))
        with pytest.raises(RecordError):
            writer.write(pa.table({"a": [1]}))
    assert writer.num_rows == 1
    assert ids(read_trajectories(writer.path)[0]) == [0]


def test_where_there_is_nothing_to_read(tmp_path: Path):
    with pytest.raises(RecordError, match=f"holds no {FILE_NAME}"):
        read_trajectories(tmp_path)
    with pytest.raises(RecordError, match="not a readable Parquet file"):
        read_trajectories(tmp_path / "missing.parquet")
    TrajectoryWriter(tmp_path / "started")
    with pytest.raises(RecordError, match=f"holds no {FILE_NAME}"):
        read_trajectories(tmp_path / "started")


@pytest.mark.parametrize("info", [b"{half", b"\xff\xfe\xfa"])
def test_a_file_whose_info_is_garbage_is_still_read(tmp_path: Path, info: bytes):
    path = tmp_path / "t.parquet"
    pq.write_table(rows(0).replace_schema_metadata({trajectory_file.INFO_KEY: info}), path)
    table, found = read_trajectories(path)
    assert (ids(table), found) == ([0], {})
