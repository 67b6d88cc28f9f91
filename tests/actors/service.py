"""A run service over a real journal and a real scheduler, with a player in place of the workers (a test double)."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors import journal_records as records
from actors.delivery import Delivery
from actors.journal import Journal
from actors.messages import Collected, WorkerStats
from actors.rows import to_rows
from actors.run_service import RunService
from actors.run_store import RunStore
from actors.scheduler import Assignment, Scheduler
from rollout.api import EnvironmentRef, RunRequest
from rollout.ledger import Segment
from rollout.limits import Limits
from rollout.sampling import Sampling
from rollout.tasks import Task
from rollout.trajectory import StopReason, Trajectory

DEFAULTS = RunRequest(environment=EnvironmentRef(path="m:E"), sampling=Sampling(), limits=Limits(), group_size=2)
WORKER = "w"


def tasks(count: int, start: int = 0) -> list[Task]:
    return [
        Task(task_id=f"t{number}", messages=[{"role": "user", "content": f"{number}?"}])
        for number in range(start, start + count)
    ]


def play(
    assignment: Assignment,
    *,
    reward: float | None = 1.0,
    version: int = 0,
    stop: StopReason = "stop",
    tokens: int = 3,
) -> Trajectory:
    """A finished session."""
    segments = []
    if stop not in ("error", "cancelled"):
        segments = [
            Segment(
                array("i", [1, 2]),
                array("i", range(tokens)),
                array("b", [1] * tokens),
                array("f", [-0.1] * tokens),
                array("i", [version] * tokens),
            )
        ]
    return Trajectory(
        assignment.key, segments, stop, [], reward=None if not segments else reward, attempts=assignment.attempt
    )


class Service:
    """The controller's inside, without Ray."""

    def __init__(self, path: Path, capacity: int = 10_000) -> None:
        self.journal = Journal(path, sync=False)
        self.scheduler = Scheduler(3)
        self.cancelled: list[str] = []
        self.held: dict[str, Assignment] = {}
        self.store = RunStore(self.journal, self.scheduler, cancel_sessions=self._cancel, dispatch=lambda: None)
        self.runs = RunService(self.store, DEFAULTS)
        self.delivery = Delivery(self.store, self.runs)
        self.store.recover(records.recover(self.journal))
        self.scheduler.add_worker(WORKER, capacity)

    def _cancel(self, sessions: dict[str, list[str]]) -> None:
        for ids in sessions.values():
            self.cancelled.extend(ids)

    def start(self) -> list[Assignment]:
        """Begin what may begin; returns it."""
        begun = self.scheduler.assign(self.runs.admit).get(WORKER, [])
        self.held.update({a.key.trajectory_id: a for a in begun})
        return begun

    async def finish(self, assignments: list[Assignment], make: Callable[[Assignment], Trajectory] = play) -> None:
        """Hand in sessions, as a worker would."""
        for assignment in assignments:
            self.held.pop(assignment.key.trajectory_id, None)
        rows, summaries = to_rows([make(assignment) for assignment in assignments])
        await self.runs.accept(WORKER, Collected(rows, summaries, WorkerStats()))

    async def work(self, make: Callable[[Assignment], Trajectory] = play) -> int:
        """Start and finish until nothing starts any more; returns how many sessions that were."""
        played = 0
        while begun := self.start():
            played += len(begun)
            await self.finish(begun, make)
        return played

    def audit(self) -> None:
        self.scheduler.audit()
        self.store.leases.audit()
        for run in self.store.runs.values():
            run.book.audit()

    async def close(self) -> None:
        self.audit()
        await self.store.close()


def ids_of(table: Any) -> list[str]:
    return list(table["trajectory_id"].to_pylist())
