"""Which session runs where, and what happens when something under it dies.

Invariant, checked by `audit`: every sample of a started group is in exactly one of open, running, done or
abandoned, and reaches done at most once: with a trajectory, or given up after `max_attempts`. An answer from an
attempt that is no longer the running one is ignored. A group is started only when `admit` says so; runs share the
workers in proportion to their `share`. Pure: no Ray, no clock, no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rollout.tasks import Task
from rollout.trajectory import SessionKey

# Of all places, those that guests may fill together, in thirds: the others' runs need never wait for them. It is what
# workers play at once; the rest are places of sessions that follow (see WorkerSettings.capacity).
GUEST_PLACES, OF_PLACES = 2, 3
# One guest may have so many times the places that are still free for guests. So a guest that stalls, and keeps what
# it has, leaves a fifth of them to the next one, which leaves a part of that to the one after it.
GUEST_FACTOR = 4
# The same where no other run has anything to play: a twentieth, and at least one place, is kept for a guest to come.
ONLY_GUEST_FACTOR = 20

Admit = Callable[[str, str], bool]
"""Asked with run and group id just before a group's first sample starts; True means that it starts."""


@dataclass(slots=True, frozen=True)
class Assignment:
    """One attempt of one sample, given to one worker."""

    key: SessionKey
    task: Task
    attempt: int
    queued_at: float = 0.0
    """Unix time of the submission, for the queue figure."""


@dataclass(slots=True, frozen=True)
class QueuedGroup:
    """A group that waits to be started."""

    group_id: str
    task: Task
    indexes: Sequence[int]
    """Samples to play: all of them, or those that a restart did not find in the journal."""
    queued_at: float = 0.0

    @property
    def size(self) -> int:
        """How many samples it will start."""
        return len(self.indexes)


@dataclass(slots=True)
class _Sample:
    key: SessionKey
    task: Task
    queued_at: float
    attempt: int = 0
    worker: str | None = None


@dataclass(slots=True)
class Counts:
    """How far a run's sessions are. All numbers are samples."""

    queued: int = 0
    """Of groups that wait, and of started groups that wait for a worker."""
    running: int = 0
    done: int = 0
    retried: int = 0
    """Attempts that were lost and started again."""


@dataclass(slots=True)
class _Run:
    share: float
    guest: bool = False
    paused: bool = False
    waiting: deque[QueuedGroup] = field(default_factory=deque)
    open: deque[str] = field(default_factory=deque)
    """Samples of started groups that wait for a worker; those of a lost attempt come first."""
    counts: Counts = field(default_factory=Counts)


@dataclass(slots=True)
class _Worker:
    capacity: int
    running: set[str] = field(default_factory=set)


class Scheduler:
    """Groups of several runs over a pool of workers."""

    def __init__(self, max_attempts: int, max_concurrent: int | None = None) -> None:
        self._max_attempts = max_attempts
        self._max_concurrent = max_concurrent
        self._runs: dict[str, _Run] = {}
        self._workers: dict[str, _Worker] = {}
        self._samples: dict[str, _Sample] = {}
        self._groups: dict[str, list[str]] = {}
        """Samples of each started group that are not done."""
        self._final: set[str] = set()
        """Runs in which nothing is tried again."""

    # Runs and groups

    def add_run(self, run: str, share: float = 1.0, *, guest: bool = False) -> None:
        """A run without groups yet. `guest`: its sessions wait for somebody else, who may stall."""
        self._runs[run] = _Run(share, guest)

    def pause(self, run: str, paused: bool) -> None:
        """Whether new sessions of a run are held back; those that run go on."""
        self._runs[run].paused = paused

    def queue(self, run: str, group: QueuedGroup, *, first: bool = False) -> None:
        """Let a group wait, at the end or before all others."""
        waiting = self._runs[run].waiting
        waiting.appendleft(group) if first else waiting.append(group)
        self._runs[run].counts.queued += group.size

    def withdraw(self, run: str, group_id: str) -> dict[str, list[str]]:
        """Forget a group, waiting or started. Returns what runs of it by worker, for the workers to cancel.

        Whatever those still answer is ignored; they hold their places until they do.
        """
        state = self._runs[run]
        running: dict[str, list[str]] = {}
        if group_id not in self._groups:
            for group in state.waiting:
                if group.group_id == group_id:
                    state.waiting.remove(group)
                    state.counts.queued -= group.size
                    break
            return running
        for trajectory_id in self._groups.pop(group_id):
            sample = self._samples.pop(trajectory_id)
            if sample.worker is None:
                state.open.remove(trajectory_id)
                state.counts.queued -= 1
            else:
                state.counts.running -= 1
                running.setdefault(sample.worker, []).append(trajectory_id)
        return running

    def end_run(self, run: str) -> tuple[list[QueuedGroup], list[Assignment], dict[str, list[str]]]:
        """Start nothing of a run any more, whatever dies under it.

        Returns the groups that had not started, the samples of started groups that will not be played, and what
        runs by worker.
        """
        state = self._runs[run]
        self._final.add(run)
        groups, state.waiting = list(state.waiting), deque()
        unplayed = []
        for trajectory_id in state.open:
            sample = self._samples[trajectory_id]
            unplayed.append(Assignment(sample.key, sample.task, max(1, sample.attempt)))
        state.open.clear()
        state.counts.queued = 0
        for assignment in unplayed:
            self._forget(self._samples[assignment.key.trajectory_id])
            state.counts.done += 1
        running: dict[str, list[str]] = {}
        for name, worker in self._workers.items():
            mine = [t for t in worker.running if t in self._samples and self._samples[t].key.run == run]
            if mine:
                running[name] = sorted(mine)
        return groups, unplayed, running

    def remove_run(self, run: str) -> dict[str, list[str]]:
        """Drop a run with all that it has. Returns what runs of it by worker."""
        running: dict[str, list[str]] = {}
        for group_id in [g for g, samples in self._groups.items() if self._run_of(samples) == run]:
            for name, ids in self.withdraw(run, group_id).items():
                running.setdefault(name, []).extend(ids)
        self._runs.pop(run, None)
        self._final.discard(run)
        return running

    def ending(self, run: str) -> bool:
        """Whether workers still hold samples of a run that was dropped; one of its name would have the same ids."""
        prefix = f"{run}/"
        held = (t for worker in self._workers.values() for t in worker.running)
        return any(t.startswith(prefix) and t not in self._samples for t in held)

    # Workers

    def add_worker(self, worker: str, capacity: int) -> None:
        """A worker that may hold `capacity` sessions."""
        self._workers[worker] = _Worker(capacity)

    def worker_lost(self, worker: str) -> list[Assignment]:
        """A worker died with what it held. Returns the samples that have no attempts left; the rest run again."""
        gone = self._workers.pop(worker, None)
        given_up = []
        # In reverse, as each goes to the front.
        for trajectory_id in sorted(gone.running, reverse=True) if gone is not None else ():
            sample = self._samples.get(trajectory_id)
            if sample is None:
                continue
            if self._may_run_again(sample):
                self._run_again(sample)
            else:
                self._done(sample)
                given_up.append(Assignment(sample.key, sample.task, sample.attempt))
        given_up.reverse()
        return given_up

    def assign(self, admit: Admit = lambda _run, _group: True) -> dict[str, list[Assignment]]:
        """Hand samples to workers, the least loaded first, as far as capacity and `admit` allow.

        Of several runs that may start something, the one with the fewest running sessions for its share comes first.
        """
        assignments: dict[str, list[Assignment]] = {}
        running = sum(len(worker.running) for worker in self._workers.values())
        held_back: set[str] = set()
        while self._max_concurrent is None or running < self._max_concurrent:
            free, name = max(
                ((w.capacity - len(w.running), name) for name, w in self._workers.items()), default=(0, "")
            )
            run = self._next_run(held_back) if free > 0 else None
            if run is None:
                break
            state = self._runs[run]
            if not state.open:
                if not admit(run, state.waiting[0].group_id):
                    held_back.add(run)
                    continue
                self._start(run, state.waiting.popleft())
            sample = self._samples[state.open.popleft()]
            running += 1
            sample.attempt += 1
            sample.worker = name
            state.counts.queued -= 1
            state.counts.running += 1
            self._workers[name].running.add(sample.key.trajectory_id)
            assignment = Assignment(sample.key, sample.task, sample.attempt, sample.queued_at)
            assignments.setdefault(name, []).append(assignment)
        return assignments

    def finished(self, worker: str, trajectory_id: str, attempt: int, *, retryable: bool) -> bool:
        """An attempt ended with a trajectory. True: keep it; False: nobody wants it, or the sample runs again."""
        sample = self._samples.get(trajectory_id)
        if sample is None:
            # Withdrawn meanwhile: only its place is freed.
            if (holder := self._workers.get(worker)) is not None:
                holder.running.discard(trajectory_id)
            return False
        if sample.attempt != attempt or sample.worker != worker:
            return False
        if retryable and self._may_run_again(sample):
            self._run_again(sample)
            return False
        self._done(sample)
        return True

    # Looking

    def has_run(self, run: str) -> bool:
        """Whether the run is known."""
        return run in self._runs

    def counts(self, run: str) -> Counts:
        """Progress of one run; all zero for one that is not known."""
        state = self._runs.get(run)
        return replace(state.counts) if state is not None else Counts()

    def audit(self) -> None:
        """Check the invariant. Raises AssertionError."""
        held = [t for worker in self._workers.values() for t in worker.running]
        assert len(held) == len(set(held)), "a sample runs on two workers"
        known = [t for samples in self._groups.values() for t in samples]
        assert sorted(known) == sorted(self._samples), "groups and samples differ"
        for name, state in self._runs.items():
            mine = [s for s in self._samples.values() if s.key.run == name]
            open_ids = list(state.open)
            assert len(open_ids) == len(set(open_ids)), "a sample is open twice"
            for sample in mine:
                places = (sample.key.trajectory_id in open_ids) + (sample.worker is not None)
                assert places == 1, f"{sample.key.trajectory_id} is in {places} places"
                if sample.worker is not None:
                    assert sample.key.trajectory_id in self._workers[sample.worker].running
                assert sample.attempt <= self._max_attempts, f"{sample.key.trajectory_id}: {sample.attempt} attempts"
            counts = state.counts
            assert counts.running == sum(s.worker is not None for s in mine), f"run {name}: {counts}"
            assert counts.queued == len(open_ids) + sum(g.size for g in state.waiting), f"run {name}: {counts}"

    # Inside

    def _next_run(self, held_back: set[str]) -> str | None:
        best: tuple[float, str] | None = None
        for name, state in self._runs.items():
            if state.paused or not (state.open or (state.waiting and name not in held_back)):
                continue
            if state.guest and not self._guest_may_start(state):
                continue
            load = (state.counts.running / state.share, name)
            if best is None or load < best:
                best = load
        return best[1] if best is not None else None

    def _guest_may_start(self, guest: _Run) -> bool:
        places = sum(worker.capacity for worker in self._workers.values())
        if self._max_concurrent is not None:
            places = min(places, self._max_concurrent)
        guests = sum(state.counts.running for state in self._runs.values() if state.guest)
        free = max(1, places * GUEST_PLACES // OF_PLACES) - guests
        running = guest.counts.running
        if running < GUEST_FACTOR * free:
            return True
        others = (state for state in self._runs.values() if state is not guest)
        alone = not any(state.counts.running or (state.counts.queued and not state.paused) for state in others)
        return alone and free > 1 and running < ONLY_GUEST_FACTOR * free

    def _start(self, run: str, group: QueuedGroup) -> None:
        ids = []
        for index in group.indexes:
            key = SessionKey(run, group.task.task_id, group.group_id, index)
            self._samples[key.trajectory_id] = _Sample(key, group.task, group.queued_at)
            ids.append(key.trajectory_id)
        self._groups[group.group_id] = ids
        self._runs[run].open.extend(ids)

    def _may_run_again(self, sample: _Sample) -> bool:
        return sample.attempt < self._max_attempts and sample.key.run not in self._final

    def _run_again(self, sample: _Sample) -> None:
        state = self._runs[sample.key.run]
        self._release(sample)
        state.counts.queued += 1
        state.counts.retried += 1
        # To the front: the rest of its group is already done or running, and the group waits for it.
        state.open.appendleft(sample.key.trajectory_id)

    def _done(self, sample: _Sample) -> None:
        self._release(sample)
        self._runs[sample.key.run].counts.done += 1
        self._forget(sample)

    def _forget(self, sample: _Sample) -> None:
        trajectory_id = sample.key.trajectory_id
        del self._samples[trajectory_id]
        left = self._groups[sample.key.group_id]
        left.remove(trajectory_id)
        if not left:
            del self._groups[sample.key.group_id]

    def _release(self, sample: _Sample) -> None:
        worker = self._workers.get(sample.worker or "")
        if worker is not None:
            worker.running.discard(sample.key.trajectory_id)
        self._runs[sample.key.run].counts.running -= 1
        sample.worker = None

    def _run_of(self, samples: list[str]) -> str:
        return self._samples[samples[0]].key.run
