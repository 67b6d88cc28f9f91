"""Log files of many processes read as one: order, filters, and files that change while they are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster import logs, state
from cluster.logs import LogReader, Wanted, choose, default_directory, directory_of, follow, read, rendered
from cluster.state import ClusterState
from rollout.errors import RolloutError


@pytest.fixture(autouse=True)
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROLLOUT_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def record(second: float, message: str, **fields: Any) -> dict[str, Any]:
    known = {"time": f"2026-01-01T00:00:{second:09.6f}+00:00", "level": "info", "component": "worker"}
    return known | {"message": message} | fields


def write(path: Path, *records: dict[str, Any] | str, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in records]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + end)
    return path


def file(directory: Path, name: str = "worker-0", pid: int = 1, aside: bool = False) -> Path:
    return directory / f"{name}.host.{pid}.jsonl{'.1' if aside else ''}"


def messages(directory: Path, last: int | None = None, **wanted: Any) -> list[str]:
    return [entry["message"] for entry in read(LogReader(directory, Wanted(**wanted)), last)]


def test_files_are_merged_by_time(tmp_path: Path):
    write(file(tmp_path, aside=True), record(1, "a"), record(3, "c"))
    write(file(tmp_path), record(5, "e"))
    write(file(tmp_path, "engine-x", 2), record(2, "b"), record(4, "d"))
    write(tmp_path / "front.log", record(0, "not ours"))
    assert messages(tmp_path) == list("abcde")
    assert messages(tmp_path, last=2) == ["d", "e"]
    assert messages(tmp_path / "nowhere") == []


def test_what_is_asked_for(tmp_path: Path):
    write(
        file(tmp_path),
        record(1, "debug", level="debug"),
        record(2, "of a session", trajectory_id="run/täsk/3", run="run", instance="worker-0"),
        record(3, "of another", trajectory_id="run/täsk/13", instance="worker-1"),
        record(4, "of a request", correlation_id="f81d4fae-7dec", component="gateway", level="warning"),
        record(5, "worst", level="critical", component="engine"),
        record(6, "of no level", level="loud"),
    )
    assert messages(tmp_path, level="warning") == ["of a request", "worst", "of no level"]
    assert messages(tmp_path, components=("gateway", "worker-1")) == ["of another", "of a request"]
    assert messages(tmp_path, trajectory="run/täsk/3") == ["of a session"]
    assert messages(tmp_path, trajectory="/3") == ["of a session"]
    assert messages(tmp_path, trajectory="3") == ["of a session", "of another"]
    assert messages(tmp_path, correlation="f81d") == ["of a request"]
    assert messages(tmp_path, correlation="4fae") == []
    assert messages(tmp_path, trajectory="\udcff") == []


def test_lines_that_are_no_records_are_counted(tmp_path: Path):
    write(file(tmp_path), "{", "[]", '{"message": "no time"}', "\x00" * 10, record(1, "good"), "[" * 100_000)
    reader = LogReader(tmp_path, Wanted())
    assert [entry["message"] for entry in reader.poll()] == ["good"]
    assert reader.damaged == 5


def test_a_line_without_an_end_of_whatever_size_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logs, "MAX_LINE_BYTES", 1000)
    write(file(tmp_path), "x" * 3500, record(1, "good"))
    reader = LogReader(tmp_path, Wanted())
    assert [entry["message"] for entry in reader.poll()] == ["good"]
    assert reader.damaged == 4


def test_following_reads_each_line_once_and_only_whole_ones(tmp_path: Path):
    path = write(file(tmp_path), record(1, "a"))
    reader = LogReader(tmp_path, Wanted())

    def new() -> list[str]:
        return [entry["message"] for entry in reader.poll()]

    assert (new(), new()) == (["a"], [])
    whole = json.dumps(record(2, "b"))
    write(path, whole[:20], end="")
    assert new() == []
    write(path, whole[20:])
    write(file(tmp_path, "engine", 2), record(3, "another process"))
    assert (new(), new()) == (["b", "another process"], [])
    assert reader.damaged == 0


def test_following_goes_on_over_a_rotation(tmp_path: Path):
    path, aside = file(tmp_path), file(tmp_path, aside=True)
    write(path, *(record(n, f"{n}") for n in range(10)))
    reader = LogReader(tmp_path, Wanted())
    seen = [entry["message"] for entry in reader.poll()]
    for start in (10, 30, 50):
        write(path, record(start, f"{start}"))
        os.replace(path, aside)
        write(path, record(start + 1, f"{start + 1}"))
        seen += [entry["message"] for entry in reader.poll()]
    assert seen == [*map(str, range(10)), "10", "11", "30", "31", "50", "51"]


def test_a_new_file_with_the_number_of_one_that_is_gone_is_read_from_its_start(tmp_path: Path):
    path = write(file(tmp_path), *(record(n, f"{n}") for n in range(5)))
    reader = LogReader(tmp_path, Wanted())
    assert len(list(reader.poll())) == 5
    # The same inode with other content: what the reader meets when a file system gives a number out again.
    path.write_text("")
    write(path, record(9, "new"))
    assert [entry["message"] for entry in reader.poll()] == ["new"]


def test_follow_polls_until_it_is_told_to_end(tmp_path: Path):
    path = file(tmp_path)
    rounds: list[float] = []

    def pause(seconds: float) -> None:
        rounds.append(seconds)
        write(path, record(len(rounds), f"{len(rounds)}"))

    told = follow(LogReader(tmp_path, Wanted()), until=lambda: len(rounds) > 3, pause=pause)
    assert [entry["message"] for entry in told] == ["1", "2", "3"]
    assert set(rounds) == {logs.FOLLOW_SECONDS}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "worker.host.1.jsonl").mkdir()
    with pytest.raises(RolloutError, match=r"worker\.host\.1\.jsonl cannot be read: Is a directory"):
        messages(tmp_path)


def test_a_record_as_a_person_reads_it():
    entry = record(
        1, "bad\x1b[31m [bold]thing[/bold]\n", level="error", instance="worker-3", trajectory_id="r/t/1",
        exception="Traceback:\n  x\x07",
    )  # fmt: skip
    console = Console(width=200, force_terminal=False)
    with console.capture() as shown:
        console.print(rendered(entry), soft_wrap=True, highlight=False)
    first, *rest = shown.get().splitlines()
    expected = "error    worker-3  bad\\x1b[31m [bold]thing[/bold]\\x0a  trajectory r/t/1"
    assert first.partition(" ")[2] == expected
    assert rest == ["    Traceback:", "      x\\x07"]
    strange = rendered(record(1, "x", level=5, component=None, run=7)).plain
    assert strange.endswith("5        ?  x  run 7")


# Where they are


def known(name: str, **fields: Any) -> None:
    base = {
        "name": name, "cluster_id": "x", "address": "127.0.0.1:1", "config_path": "/c", "temp_dir": "",
        "log_file": "", "started_at": 0.0,
    }  # fmt: skip
    state.save(ClusterState(**(base | fields)))


def test_the_logs_of_a_cluster_are_found_while_it_is_up_and_afterwards(tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    write(file(elsewhere), record(1, "a"))
    known("demo", logs=str(elsewhere))
    assert directory_of("demo") == elsewhere
    state.remove("demo")
    with pytest.raises(RolloutError, match=r"there are no logs of 'demo' in .*/logs/demo$"):
        directory_of("demo")
    write(file(default_directory("demo")), record(1, "a"))
    assert directory_of("demo") == default_directory("demo")


def test_logs_that_are_on_other_machines_are_explained():
    known("far", owns_ray=False)
    with pytest.raises(RolloutError, match=r"its Ray runs elsewhere.*`kubectl logs`.*--dir"):
        directory_of("far")


def test_which_cluster_is_meant():
    with pytest.raises(RolloutError, match="no cluster is known and none has left logs"):
        choose(None)
    assert choose("any") == "any"
    write(file(default_directory("gone")), record(1, "a"))
    assert choose(None) == "gone"
    known("alive")
    assert choose(None) == "alive", "the one that is up"
    known("second")
    with pytest.raises(RolloutError, match=r"several clusters have logs \(alive, gone, second\): name one"):
        choose(None)
