"""Which session runs where, and what happens when something under it dies.

Invariant, checked by `audit`: every sample that was submitted is in exactly one of queued, running, or done, and
reaches done exactly once: with a trajectory, or given up after `max_attempts`. An answer from an attempt that is
no longer the running one is ignored. Pure: no Ray, no clock, no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from rollout.tasks import Task
from rollout.trajectory import SessionKey


@dataclass(slots=True, frozen=True)
class Assignment:
    """One attempt of one sample, given to one worker."""

    key: SessionKey
    task: Task
    attempt: int


@dataclass(slots=True)
class _Sample:
    key: SessionKey
    task: Task
    attempt: int = 0
    worker: str | None = None
    done: bool = False


@dataclass(slots=True)
class Counts:
    """How far a run is. All numbers are samples."""

    total: int = 0
    queued: int = 0
    running: int = 0
    done: int = 0
    retried: int = 0
    """Attempts that were lost and started again."""


@dataclass(slots=True)
class _Worker:
    capacity: int
    running: set[str] = field(default_factory=set)


class Scheduler:
    """Samples of one or more runs over a pool of workers."""

    def __init__(self, max_attempts: int, max_concurrent: int | None = None) -> None:
        self._max_attempts = max_attempts
        self._max_concurrent = max_concurrent
        self._samples: dict[str, _Sample] = {}
        self._queue: deque[str] = deque()
        self._workers: dict[str, _Worker] = {}
        self._counts: dict[str, Counts] = {}
        self._cancelled: set[str] = set()

    def submit(self, run: str, tasks: Iterable[Task], group_size: int) -> list[SessionKey]:
        """Queue `group_size` samples of each task, group after group. Raises ValueError for a group seen before."""
        if "/" in run:
            raise ValueError(f"a run's name is a part of its trajectories' ids and may hold no '/': {run!r}")
        tasks = list(tasks)
        # All or nothing: a task that is refused leaves nothing queued.
        seen: set[str] = set()
        for task in tasks:
            if task.task_id in seen or f"{run}/{task.task_id}/0" in self._samples:
                raise ValueError(f"task_id {task.task_id!r} was already submitted to run {run!r}")
            seen.add(task.task_id)
        keys = []
        counts = self._counts.setdefault(run, Counts())
        for task in tasks:
            group_id = f"{run}/{task.task_id}"
            for index in range(group_size):
                key = SessionKey(run, task.task_id, group_id, index)
                self._samples[key.trajectory_id] = _Sample(key, task)
                self._queue.append(key.trajectory_id)
                counts.total += 1
                counts.queued += 1
                keys.append(key)
        return keys

    def add_worker(self, worker: str, capacity: int) -> None:
        """A worker that may hold `capacity` sessions."""
        self._workers[worker] = _Worker(capacity)

    def assign(self) -> dict[str, list[Assignment]]:
        """Hand queued samples to workers, the least loaded first, as far as capacity allows."""
        assignments: dict[str, list[Assignment]] = {}
        running = sum(len(worker.running) for worker in self._workers.values())
        while self._queue and (self._max_concurrent is None or running < self._max_concurrent):
            free, name = max(
                ((w.capacity - len(w.running), name) for name, w in self._workers.items()), default=(0, "")
            )
            if free <= 0:
                break
            sample = self._samples[self._queue.popleft()]
            running += 1
            sample.attempt += 1
            counts = self._counts[sample.key.run]
            counts.queued -= 1
            counts.running += 1
            sample.worker = name
            self._workers[name].running.add(sample.key.trajectory_id)
            assignments.setdefault(name, []).append(Assignment(sample.key, sample.task, sample.attempt))
        return assignments

    def finished(self, trajectory_id: str, attempt: int, *, retryable: bool) -> bool:
        """An attempt ended with a trajectory. True: keep it; False: it was stale, or the sample runs again."""
        sample = self._samples.get(trajectory_id)
        if sample is None or sample.done or sample.attempt != attempt or sample.worker is None:
            return False
        if retryable and self._may_run_again(sample):
            self._requeue(sample)
            return False
        self._release(sample)
        self._finish(sample)
        return True

    def worker_lost(self, worker: str) -> list[Assignment]:
        """A worker died with what it held. Returns the samples that have no attempts left; the rest run again."""
        gone = self._workers.pop(worker, None)
        given_up = []
        for trajectory_id in sorted(gone.running) if gone is not None else ():
            sample = self._samples[trajectory_id]
            if self._may_run_again(sample):
                self._requeue(sample)
            else:
                self._release(sample)
                self._finish(sample)
                given_up.append(Assignment(sample.key, sample.task, sample.attempt))
        return given_up

    def cancel_queued(self, run: str) -> list[Assignment]:
        """Take a run's queued samples out as done. Returns them; running ones are for the workers to cancel.

        From here on no sample of the run starts again, whatever dies under it.
        """
        self._cancelled.add(run)
        taken = []
        for trajectory_id in list(self._queue):
            sample = self._samples[trajectory_id]
            if sample.key.run == run:
                self._counts[run].queued -= 1
                self._finish(sample)
                taken.append(Assignment(sample.key, sample.task, max(1, sample.attempt)))
        self._queue = deque(t for t in self._queue if not self._samples[t].done)
        return taken

    def running_of(self, run: str) -> dict[str, list[str]]:
        """Trajectory ids of a run by the worker that holds them."""
        held: dict[str, list[str]] = {}
        for name, worker in self._workers.items():
            mine = [t for t in worker.running if self._samples[t].key.run == run]
            if mine:
                held[name] = mine
        return held

    def forget(self, run: str) -> None:
        """Drop a finished run's samples. Raises ValueError while one is queued or running."""
        mine = [t for t, sample in self._samples.items() if sample.key.run == run]
        if not all(self._samples[t].done for t in mine):
            raise ValueError(f"run {run!r} is not finished")
        for trajectory_id in mine:
            del self._samples[trajectory_id]
        self._counts.pop(run, None)
        self._cancelled.discard(run)

    def run_of(self, trajectory_id: str) -> str:
        """The run of a sample. Raises KeyError for one that was never submitted."""
        return self._samples[trajectory_id].key.run

    def counts(self, run: str) -> Counts:
        """Progress of one run; all zero for one that is not known."""
        return replace(self._counts.get(run, Counts()))

    def audit(self) -> None:
        """Check the invariant. Raises AssertionError."""
        queued = list(self._queue)
        assert len(queued) == len(set(queued)), "a sample is queued twice"
        held = [t for worker in self._workers.values() for t in worker.running]
        assert len(held) == len(set(held)), "a sample runs on two workers"
        for trajectory_id, sample in self._samples.items():
            places = (trajectory_id in queued) + (trajectory_id in held) + sample.done
            assert places == 1, f"{trajectory_id} is in {places} places"
            assert sample.attempt <= self._max_attempts, f"{trajectory_id} had {sample.attempt} attempts"
        for run, counts in self._counts.items():
            assert counts.total == counts.queued + counts.running + counts.done, f"run {run}: {counts}"

    def _may_run_again(self, sample: _Sample) -> bool:
        return sample.attempt < self._max_attempts and sample.key.run not in self._cancelled

    def _requeue(self, sample: _Sample) -> None:
        self._release(sample)
        counts = self._counts[sample.key.run]
        counts.queued += 1
        counts.retried += 1
        # To the front: the rest of its group is already done or running, and the group waits for it.
        self._queue.appendleft(sample.key.trajectory_id)

    def _finish(self, sample: _Sample) -> None:
        sample.done = True
        self._counts[sample.key.run].done += 1

    def _release(self, sample: _Sample) -> None:
        worker = self._workers.get(sample.worker or "")
        if worker is not None:
            worker.running.discard(sample.key.trajectory_id)
        self._counts[sample.key.run].running -= 1
        sample.worker = None
