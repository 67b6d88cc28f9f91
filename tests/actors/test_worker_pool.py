"""The pool over workers that hang, die or clog up. Ray and the workers are test doubles; the scheduler is real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import worker_pool
from actors.messages import Collected, ControllerSettings, Summary, WorkerSettings, WorkerStats
from actors.metrics import Metrics
from actors.scheduler import Assignment, QueuedGroup, Scheduler
from actors.worker_pool import WorkerPool
from rollout.api import RunRequest
from rollout.errors import RolloutError
from rollout.tasks import Task
from rollout.tool_calls import MAX_ABANDONED_THREADS


class FakeWorker:
    """A TEST DOUBLE of a session worker's actor: it answers `collect` with `next`, or not at all."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.hangs = False
        self.killed = False
        self.next: Collected | None = None
        self.avoided: list[frozenset[str]] = []
        self.started: list[Assignment] = []

    async def collect(self, timeout: float) -> Collected:
        while self.hangs:
            await asyncio.sleep(0.001)
        if self.killed:
            raise RuntimeError("ActorDiedError")
        await asyncio.sleep(0.001)
        told, self.next = self.next, None
        return told or Collected(None, [], WorkerStats(self.name))


class Handle:
    """An actor's handle: `handle.method.remote(…)`, awaited or not."""

    def __init__(self, worker: FakeWorker) -> None:
        self.worker = worker

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._call(method, *arguments))

    def _call(self, method: str, *arguments: Any) -> Any:
        worker = self.worker
        if method == "collect":
            return worker.collect(*arguments)
        if method == "avoid":
            worker.avoided.append(*arguments)
        elif method == "start":
            worker.started += arguments[1]
        told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        told.set_result({"connect": "info", "renderer_name": "qwen"}.get(method))
        return told


class FakeRay:
    """A TEST DOUBLE of the two calls of Ray that the pool makes."""

    def __init__(self) -> None:
        self.workers: list[FakeWorker] = []

    def remote(self, _cls: type) -> Any:
        def made(name: str, _settings: WorkerSettings) -> Handle:
            self.workers.append(FakeWorker(name))
            return Handle(self.workers[-1])

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=made))

    def kill(self, handle: Handle, no_restart: bool) -> None:
        handle.worker.killed = True


class Made:
    """A pool with what it told."""

    def __init__(self, path: Path) -> None:
        worker = WorkerSettings(
            model="m", revision=None, renderer="auto", renderer_options={}, app="a", deployment="d",
            sticky_margin=4, mcp_servers={}, max_sessions=8,
        )  # fmt: skip
        settings = ControllerSettings(worker, 2, 3, None, 5.0, str(path), False, RunRequest())
        self.scheduler = Scheduler(settings.max_attempts)
        self.scheduler.add_run("r")
        self.collected: list[str] = []
        self.pool = WorkerPool(
            settings, self.scheduler, on_collected=self.take, on_given_up=self.give_up,
            dispatch=self.dispatch, metrics=Metrics(),
        )  # fmt: skip

    async def take(self, worker: str, collected: Collected) -> None:
        for summary in collected.summaries:
            assert self.scheduler.finished(worker, summary.trajectory_id, summary.attempt, retryable=False)
            self.collected.append(summary.trajectory_id)

    async def give_up(self, assignments: list[Assignment]) -> None:
        raise AssertionError(assignments)

    def dispatch(self) -> None:
        for worker, assignments in self.scheduler.assign().items():
            self.pool.start(worker, None, assignments)

    def queue(self, samples: int) -> None:
        task = Task(task_id="t", messages=[{"role": "user", "content": "x"}])
        self.scheduler.queue("r", QueuedGroup("r/t", task, range(samples), 0.0))
        self.dispatch()


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(worker_pool, "ray", fake)
    monkeypatch.setattr(worker_pool, "RESPAWN_S", 0.001)
    return fake


@pytest.fixture
async def made(ray: FakeRay, tmp_path: Path) -> AsyncIterator[Made]:
    found = Made(tmp_path / "j.sqlite")
    assert await found.pool.spawn() == "qwen"
    await found.pool.connect()
    yield found
    await found.pool.close()


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def summary(assignment: Assignment) -> Summary:
    key = assignment.key
    return Summary(
        key.run, key.group_id, key.sample_index, assignment.attempt, False, "stop", 1.0, 1, 1, 1, 0, 0, 0, 0, 1
    )


async def test_a_worker_whose_loop_is_blocked_is_replaced(
    made: Made, ray: FakeRay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """What finds it is a TimeoutError, which has no text."""
    first = ray.workers[0]
    made.queue(2)
    (begun,) = first.started
    first.hangs = True
    monkeypatch.setattr(worker_pool, "WEDGED_S", 0.5)
    await until(lambda: first.killed)
    monkeypatch.setattr(worker_pool, "WEDGED_S", 60.0)
    await until(lambda: len(made.pool.handles) == 2)
    assert made.pool.failure is None and made.pool.lost == 1
    assert "worker-0 was lost: TimeoutError" in caplog.text
    again = [a for worker in ray.workers[1:] for a in worker.started if a.key == begun.key]
    assert [assignment.attempt for assignment in again] == [2]


async def test_a_worker_in_which_calls_hang_is_replaced_before_it_draws_more_work(made: Made, ray: FakeRay):
    clogged = ray.workers[0]
    made.queue(4)
    finished, unfinished = clogged.started
    stats = WorkerStats(clogged.name, abandoned_threads=MAX_ABANDONED_THREADS - 1)
    clogged.next = Collected(None, [], stats)
    await until(lambda: clogged.next is None)
    await asyncio.sleep(0.01)
    assert not clogged.killed
    stats = replace(stats, abandoned_threads=MAX_ABANDONED_THREADS)
    clogged.next = Collected(b"", [summary(finished)], stats)
    await until(lambda: clogged.killed and len(made.pool.handles) == 2)
    assert made.collected == [finished.key.trajectory_id], "what it had finished counts"
    assert len(clogged.started) == 2
    again = [a.key for worker in ray.workers[1:] for a in worker.started if a.attempt == 2]
    assert again == [unfinished.key]
    assert made.pool.failure is None


async def test_replicas_to_avoid_are_told_to_all_workers_and_to_those_that_come_later(made: Made, ray: FakeRay):
    made.pool.avoid(frozenset({"odd"}))
    ray.workers[0].killed = True
    await until(lambda: len(ray.workers) == 3 and len(made.pool.handles) == 2 and ray.workers[2].avoided)
    assert [worker.avoided for worker in ray.workers] == [[{"odd"}]] * 3


async def test_a_second_attempt_to_start_leaves_no_workers_of_the_first(ray: FakeRay, tmp_path: Path):
    found = Made(tmp_path / "j.sqlite")
    await found.pool.spawn()
    assert await found.pool.spawn() == "qwen"
    assert [worker.killed for worker in ray.workers] == [True, True, False, False]
    assert sorted(found.pool.handles) == ["worker-2", "worker-3"]
    await found.pool.close()


async def test_workers_that_do_not_start_are_a_clear_error(
    ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = Made(tmp_path / "j.sqlite")
    found.pool._settings = replace(found.pool._settings, start_timeout=0.01)
    never = asyncio.get_running_loop().create_future
    monkeypatch.setattr(Handle, "_call", lambda *_: never())
    with pytest.raises(RolloutError, match=r"did not start within 0\.01 s"):
        await found.pool.spawn()
