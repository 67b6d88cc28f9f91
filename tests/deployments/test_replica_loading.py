"""A replica's reporter: it tells everything every time, and nothing that fails in it disturbs the replica."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments import replica_loading
from deployments.replica_loading import ReplicaLoading, with_progress


@pytest.fixture
def progress(tmp_path: Path) -> Path:
    path = tmp_path / "progress"
    path.mkdir()
    return path


class Told:
    """A TEST DOUBLE of a reporter: keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[list[dict[str, Any]]] = []
        self.fail = False

    def __call__(self, replica: str, events: list[dict[str, Any]]) -> None:
        assert replica == "r"
        if self.fail:
            raise RuntimeError("no board")
        self.reports.append(events)

    def stages(self) -> list[str]:
        return [event["stage"] for event in self.reports[-1]]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def replica(told: Told, progress: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReplicaLoading]:
    monkeypatch.setattr(replica_loading, "POLL_S", 0.005)
    found = ReplicaLoading("r", told, ranks=2, directory=progress)
    yield found
    found.close()
    assert not found._thread.is_alive()


def rank_says(progress: Path, rank: int, **more: Any) -> None:
    said = {
        "rank": rank, "device": "cpu", "layers_loaded": 1, "layers_total": 3, "vram_mb": 1.5, "bytes_read": 10,
        "bytes_total": 30, "done": False, "reload": False, **more,
    }  # fmt: skip
    fresh = progress / "new"
    fresh.write_text(json.dumps(said))
    fresh.replace(progress / f"rank-{rank}.json")


def test_a_replica_tells_what_its_ranks_write(told: Told, replica: ReplicaLoading, progress: Path):
    replica.start()
    assert told.reports == [[{"stage": "starting"}]]
    rank_says(progress, 0)
    until(lambda: len(told.reports) > 1)
    assert told.reports[1] == [
        {"stage": "loading_to_vram", "rank": 0, "device": "cpu", "layers_loaded": 1, "layers_total": 3,
         "vram_mb": 1.5, "bytes_read": 10, "bytes_total": 30},
    ]  # fmt: skip
    rank_says(progress, 0, done=True, layers_loaded=3)
    rank_says(progress, 1)
    until(lambda: len(told.reports[-1]) == 2)
    assert "warming_up" not in told.stages(), "one rank is not through"
    rank_says(progress, 1, done=True)
    until(lambda: len(told.reports[-1]) == 3)
    assert told.stages() == ["loading_to_vram", "loading_to_vram", "warming_up"]


def test_ready_says_everything_and_cleans_up(told: Told, replica: ReplicaLoading, progress: Path):
    replica.start()
    rank_says(progress, 0, done=True)
    rank_says(progress, 1, done=True)
    replica.ready()
    assert told.stages() == ["loading_to_vram", "loading_to_vram", "warming_up", "ready"]
    assert not progress.exists()
    replica.error("too late")
    assert told.stages()[-1] == "ready", "the first outcome stays"


def test_a_ready_replica_says_that_it_lives(told: Told, replica: ReplicaLoading, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replica_loading, "ALIVE_S", 0.02)
    replica.start()
    replica.ready()
    until(lambda: len(told.reports) > 4)
    assert told.stages() == ["ready"]
    replica.close()
    count = len(told.reports)
    time.sleep(0.06)
    assert len(told.reports) == count


def test_an_error_ends_it(told: Told, replica: ReplicaLoading):
    replica.start()
    replica.error(RuntimeError("no memory"))
    assert told.reports[-1] == [{"stage": "error", "message": "RuntimeError: no memory"}]
    replica._thread.join(5)
    assert not replica._thread.is_alive()


def test_an_error_names_what_the_ranks_died_of(told: Told, replica: ReplicaLoading, progress: Path):
    replica.start()
    for rank in (0, 1):
        (progress / f"rank-{rank}.error").write_text("SafetensorError: the file is cut")
    replica.error(RuntimeError("Engine core initialization failed"))
    said = "rank 0, 1: SafetensorError: the file is cut; RuntimeError: Engine core initialization failed"
    assert told.reports[-1] == [{"stage": "error", "message": said}]


def test_files_that_are_none_and_reloads_are_no_news(told: Told, replica: ReplicaLoading, progress: Path):
    (progress / "rank-0.json").write_text("{")
    (progress / "rank-1.json").write_text('{"rank": 1}')
    (progress / "rank-2.json").write_text("[]")
    rank_says(progress, 3, reload=True)
    replica.start()
    time.sleep(0.05)
    assert told.reports == [[{"stage": "starting"}]]


def test_a_download_is_told_too(told: Told, replica: ReplicaLoading):
    replica.downloading(1, None, 2.5)
    assert told.reports[-1] == [
        {"stage": "downloading", "bytes_downloaded": 1, "bytes_total": None, "speed_mbps": 2.5}
    ]


def test_a_reporter_that_fails_disturbs_nothing(
    told: Told, replica: ReplicaLoading, progress: Path, caplog: pytest.LogCaptureFixture
):
    told.fail = True
    replica.start()
    rank_says(progress, 0)
    time.sleep(0.03)
    told.fail = False
    replica.ready()
    assert told.stages() == ["loading_to_vram", "ready"], "the next report says what the lost ones said"
    assert caplog.text.count("not reported") == 1


def test_calls_from_many_threads(told: Told, replica: ReplicaLoading):
    replica.start()
    threads = [threading.Thread(target=replica.downloading, args=(n, 100, 1.0)) for n in range(20)]
    for thread in [*threads, threading.Thread(target=replica.ready)]:
        thread.start()
    for thread in threads:
        thread.join(5)
    until(lambda: told.stages()[-1] == "ready")


def test_a_directory_of_its_own(told: Told):
    replica = ReplicaLoading("r", told)
    assert replica.directory is not None and replica.directory.is_dir()
    replica.close()
    assert not replica.directory.exists()


def test_the_engines_arguments(progress: Path):
    given = {"tensor_parallel_size": 2, "model_loader_extra_config": {"num_threads": 2}}
    ours = {"progress_dir": str(progress), "progress_load_format": "auto"}
    assert with_progress(given, "/model", progress) == {
        "tensor_parallel_size": 2, "load_format": "progress", "model_loader_extra_config": {"num_threads": 2, **ours},
    }  # fmt: skip
    assert given["model_loader_extra_config"] == {"num_threads": 2}
    chosen = with_progress({"load_format": "safetensors"}, "owner/name", progress)
    assert chosen["model_loader_extra_config"]["progress_load_format"] == "safetensors"
    for kwargs, model, where in [
        ({"load_format": "dummy"}, "/model", progress),
        ({}, "s3://bucket/model", progress),
        ({}, "/model", None),
    ]:
        assert with_progress(kwargs, model, where) == kwargs
