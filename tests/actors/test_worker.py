"""A session worker's promise: whatever is started there ends in exactly one summary."""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from actors.messages import Collected, RunSpec
from actors.scheduler import Assignment
from rollout.limits import Limits
from rollout.sampling import Sampling
from rollout.tasks import Task
from rollout.trajectory import SessionKey
from tests.actors.test_worker_logs import worker
from tests.rollout.sessions import Adder, scripted

SPEC = RunSpec("run-1", f"{__name__}:Waiting", {}, Sampling(max_tokens=16), Limits())


class Waiting(Adder):
    """Never ends by itself."""

    async def setup(self, task: Task) -> None:
        await asyncio.sleep(60)


def assignments(count: int) -> list[Assignment]:
    task = Task(task_id="t", messages=[{"role": "user", "content": "2+3?"}], metadata={"level": 3})
    return [Assignment(SessionKey("run-1", "t", "run-1/t", index), task, 1) for index in range(count)]


def rows_of(collected: Collected) -> list[dict[str, Any]]:
    assert collected.rows is not None
    return pa.ipc.open_stream(pa.py_buffer(collected.rows)).read_all().to_pylist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("steps", [0, 3], ids=["before its first step", "while it plays or waits for a place"])
async def test_a_cancelled_session_is_delivered_once_with_what_its_task_brought(chat: Any, steps: int):
    made = worker(scripted(chat))
    count = made._settings.max_sessions + 2
    mine = assignments(count)
    await made.start(SPEC, mine)
    for _ in range(steps):
        await asyncio.sleep(0)
    await made.cancel([assignment.key.trajectory_id for assignment in mine])
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            found += rows_of(await made.collect(5.0))
    assert sorted(row["trajectory_id"] for row in found) == sorted(a.key.trajectory_id for a in mine)
    assert {row["stop_reason"] for row in found} == {"cancelled"}
    assert [json.loads(row["metadata"]) for row in found] == [{"level": 3}] * count
    assert made.stats().sessions == 0 and (await made.collect(0.01)).rows is None
    await made.close()


class Holding(Waiting):
    """Holds something that must be closed, and says when it was."""

    closed: ClassVar[list[str]] = []

    async def close(self) -> None:
        await asyncio.sleep(0.05)
        self.closed.append("closed")


def test_a_worker_that_is_told_to_end_closes_its_environments(chat: Any):
    """As Ray does it: the event loop stands still when the actor hears of its end."""
    Holding.closed.clear()
    spec = RunSpec("run-1", f"{__name__}:Holding", {}, Sampling(max_tokens=16), Limits())
    loop = asyncio.new_event_loop()

    async def begin() -> Any:
        made = worker(scripted(chat))
        await made.start(spec, assignments(2))
        await asyncio.sleep(0.1)
        return made

    made = loop.run_until_complete(begin())
    made.__ray_shutdown__()
    assert Holding.closed == ["closed", "closed"]
    loop.close()
    made.__ray_shutdown__()
