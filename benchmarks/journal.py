"""Trajectories per second through the controller's part: accepted, journaled, leased, acknowledged.

What the session workers do before (playing, writing rows) is made ready outside the clock, with made-up tokens in
place of an engine; `turn_cost` measures that. Every commit reaches the disk.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from array import array
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
from rollout.api import Batch, EnvironmentRef, LeaseRequest, RunRequest
from rollout.ledger import Segment, TurnSpan
from rollout.limits import Limits
from rollout.sampling import Sampling
from rollout.tasks import Task
from rollout.trajectory import Trajectory

TOKENS = 1_000
GROUP = 8
# Trajectories of one measurement, and how many of them a worker hands in at once.
PORTION, TOGETHER = 2_000, 64
GROWTH = 10


def measure() -> dict[str, float]:
    """`per_s`: with an empty journal; `growth_10x`: cost per trajectory with ten times as many, over that."""
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(_measure(Path(directory) / "journal.sqlite"))


async def _measure(path: Path) -> dict[str, float]:
    journal = Journal(path, sync=True)
    scheduler = Scheduler(3)
    store = RunStore(journal, scheduler, cancel_sessions=lambda _: None, dispatch=lambda: None)
    defaults = RunRequest(
        environment=EnvironmentRef(path="none:None"), sampling=Sampling(), limits=Limits(), group_size=GROUP
    )
    runs = RunService(store, defaults)
    delivery = Delivery(store, runs)
    store.recover(records.recover(journal))
    scheduler.add_worker("w", 10**9)
    await runs.create(RunRequest(name="r"))
    seconds = []
    for portion in range(GROWTH + 1):
        first = portion * PORTION // GROUP
        tasks = [_task(number) for number in range(first, first + PORTION // GROUP)]
        await runs.submit("r", tasks)
        begun = scheduler.assign(runs.admit)["w"]
        ready = [_collected(begun[start : start + TOGETHER]) for start in range(0, len(begun), TOGETHER)]
        started = time.perf_counter()
        await asyncio.gather(*(runs.accept("w", collected) for collected in ready))
        batch = await delivery.lease("r", LeaseRequest(groups=len(tasks), timeout=60))
        assert isinstance(batch, Batch) and batch.table.num_rows == PORTION
        if portion == GROWTH:
            # The others stay leased, so that the journal grows.
            await delivery.acknowledge(batch.lease_id)
        seconds.append(time.perf_counter() - started)
    size = journal.num_bytes()
    await store.close()
    return {
        "per_s": PORTION / seconds[0],
        "per_s_grown": PORTION / seconds[-1],
        "growth_10x": seconds[-1] / seconds[0],
        "bytes": size,
    }


def _task(number: int) -> Task:
    return Task(task_id=f"t{number}", messages=[{"role": "user", "content": f"What is {number}?"}])


def _collected(assignments: list[Assignment]) -> Collected:
    rows, summaries = to_rows([_trajectory(assignment) for assignment in assignments])
    return Collected(rows, summaries, WorkerStats())


def _trajectory(assignment: Assignment) -> Trajectory:
    segment = Segment(
        array("i", range(100)),
        array("i", range(TOKENS)),
        array("b", [1] * TOKENS),
        array("f", [-0.5] * TOKENS),
        array("i", [0] * TOKENS),
        [TurnSpan("assistant", 0, TOKENS, 1.0)],
    )
    messages: list[dict[str, Any]] = [*assignment.task.messages, {"role": "assistant", "content": "x" * 3 * TOKENS}]
    return Trajectory(assignment.key, [segment], "stop", messages, reward=1.0, attempts=assignment.attempt)
