"""Captured sessions over a real run store and journal, without Ray: samples, reports, rewards, ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from actors import capture_service
from actors.capture_service import CaptureService
from rollout.api import Batch, EnvironmentRef, LeaseRequest, RunRequest
from rollout.capture.session_book import CaptureLimits
from rollout.errors import BusyError, ConflictError, JournalError, NotFoundError, RefusedError
from rollout.reasoning import ReasoningMarkers
from rollout.session_keys import session_of
from rollout.tasks import Task
from tests.actors.service import Service, tasks
from tests.rollout.capture.made_calls import made

SECRET = b"s" * 32
TASK = Task(task_id="t", messages=[{"role": "user", "content": "?"}], metadata={"level": 2})


class Clock:
    """A TEST DOUBLE of time."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Captured:
    """A captured run of groups of two, and the service over it."""

    def __init__(self, path: Path) -> None:
        self.service = Service(path)
        self.clock = Clock()
        self.capture = CaptureService(self.service.store, SECRET, self.clock)

    async def run(self, name: str = "r", **fields: Any) -> str:
        environment = EnvironmentRef(path="captured")
        return (await self.service.runs.create(RunRequest(name=name, environment=environment, **fields))).run

    async def played(self, session: str, *calls: Any) -> None:
        """Requests that were served, each with one generation."""
        for call in calls:
            self.capture.begin(session, call.call_id)
            self.capture.end(session, call.call_id, [call], False)

    async def lease(self, run: str = "r") -> list[dict[str, Any]]:
        batch = await self.service.delivery.lease(run, LeaseRequest(groups=1, timeout=0))
        assert isinstance(batch, Batch), batch
        await self.service.delivery.acknowledge(batch.lease_id)
        return batch.table.to_pylist()


@pytest.fixture
async def captured(tmp_path: Path) -> AsyncIterator[Captured]:
    found = Captured(tmp_path / "journal.sqlite")
    yield found
    await found.service.close()


async def test_two_sessions_become_a_group(captured: Captured):
    await captured.run()
    ids = []
    for reward in (1.0, 0.0):
        opened = await captured.capture.open("r", TASK, None)
        ids.append(opened.trajectory_id)
        assert session_of(SECRET, opened.api_key) == opened.session_id
        await captured.played(opened.session_id, made([1, 2], [3, 4]))
        await captured.capture.reward(opened.session_id, reward, None)
        told = await captured.capture.close(opened.session_id)
        assert (told.state, told.stop_reason, told.reward, told.tokens) == ("closed", "stop", reward, 2)
    assert ids == ["r/t/0", "r/t/1"]
    rows = await captured.lease()
    assert [(row["trajectory_id"], row["reward"]) for row in rows] == [("r/t/0", 1.0), ("r/t/1", 0.0)]
    assert rows[0]["response_ids"] == [3, 4] and '"level": 2' in rows[0]["metadata"]


async def test_a_sample_is_held_by_one_session_and_a_task_is_done_once(captured: Captured):
    await captured.run()
    first, second = [await captured.capture.open("r", TASK, None) for _ in range(2)]
    with pytest.raises(ConflictError, match=r"all 2 samples of task 't' are taken") as taken:
        await captured.capture.open("r", TASK, None)
    assert taken.value.field == "task.task_id"
    for opened in (first, second):
        await captured.played(opened.session_id, made([1], [2]))
        await captured.capture.close(opened.session_id)
    await captured.lease()
    with pytest.raises(ConflictError, match="is done"):
        await captured.capture.open("r", TASK, None)


async def test_a_session_without_a_task_has_one_of_its_own(captured: Captured):
    await captured.run()
    first, second = [await captured.capture.open("r", None, None) for _ in range(2)]
    assert first.trajectory_id.split("/")[1] != second.trajectory_id.split("/")[1]
    assert captured.capture.states == {"open": 2}


async def test_a_run_that_plays_its_own_sessions_takes_none(captured: Captured):
    await captured.service.runs.create(RunRequest(name="own"))
    with pytest.raises(RefusedError, match="captured"):
        await captured.capture.open("own", TASK, None)
    with pytest.raises(NotFoundError, match="there is no run 'none'"):
        await captured.capture.open("none", TASK, None)
    await captured.run("paused")
    await captured.service.runs.pause("paused", True)
    with pytest.raises(ConflictError, match="is paused"):
        await captured.capture.open("paused", TASK, None)


async def test_the_staleness_bound_holds_sessions_back(captured: Captured):
    await captured.run(max_staleness=0, batch_groups=1)
    one, two = tasks(2)
    opened = await captured.capture.open("r", one, None)
    with pytest.raises(BusyError, match="staleness"):
        await captured.capture.open("r", two, None)
    assert captured.capture.info(opened.session_id).state == "open"


async def test_sessions_are_bounded_in_number(captured: Captured, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capture_service, "MAX_OPEN", 1)
    await captured.run()
    await captured.capture.open("r", None, None)
    with pytest.raises(BusyError, match="1 sessions are open"):
        await captured.capture.open("r", None, None)


async def test_closing_waits_for_calls_that_are_being_reported(captured: Captured):
    await captured.run(group_size=1)
    opened = await captured.capture.open("r", TASK, None)
    captured.capture.begin(opened.session_id, "slow")
    closing = asyncio.create_task(captured.capture.close(opened.session_id))
    again = asyncio.create_task(captured.capture.close(opened.session_id))
    await asyncio.sleep(0.05)
    assert not closing.done()
    captured.capture.end(opened.session_id, "slow", [made([1], [2, 3], call_id="slow")], False)
    told = await closing
    assert (told.tokens, told.calls) == (2, ["slow"])
    assert await again == told == await captured.capture.close(opened.session_id), "it is closed once"


async def test_a_close_that_fails_leaves_the_session_to_the_next(captured: Captured, monkeypatch: pytest.MonkeyPatch):
    await captured.run(group_size=1)
    opened = await captured.capture.open("r", TASK, None)
    await captured.played(opened.session_id, made([1], [2]))
    real, failures = captured.service.store.put, [JournalError("the disk is full")]

    async def put(*arguments: Any) -> None:
        await asyncio.sleep(0.02)
        if failures:
            raise failures.pop()
        await real(*arguments)

    monkeypatch.setattr(captured.service.store, "put", put)
    calls = [captured.capture.close(opened.session_id) for _ in range(3)]
    async with asyncio.timeout(5):
        failed, told, same = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(failed, JournalError) and told == same
    assert (await captured.lease())[0]["reward"] is None


async def test_a_session_that_cannot_be_ended_harms_no_other(captured: Captured, monkeypatch: pytest.MonkeyPatch):
    await captured.run(group_size=2)
    opened = [await captured.capture.open("r", TASK, None) for _ in range(2)]
    real, failures = captured.service.store.put, [JournalError("the disk is full")]

    async def put(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        await real(*arguments)

    monkeypatch.setattr(captured.service.store, "put", put)
    captured.clock.now += 1e6
    await captured.capture.expire()
    assert [captured.capture.info(one.session_id).state == "open" for one in opened] == [False, False]
    await captured.capture.expire()
    assert len(await captured.lease()) == 2


async def test_a_report_that_never_comes_is_waited_for_in_bounds(captured: Captured, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capture_service, "SETTLE_SECONDS", 0.05)
    await captured.run(group_size=1)
    opened = await captured.capture.open("r", TASK, None)
    captured.capture.begin(opened.session_id, "lost")
    await captured.played(opened.session_id, made([1], [2]))
    await captured.capture.close(opened.session_id)
    (row,) = await captured.lease()
    assert '"calls_not_reported": 1' in row["metadata"]
    with pytest.raises(ConflictError, match="is closed"):
        captured.capture.end(opened.session_id, "lost", [made([1], [2])], False)


async def test_reports_of_nothing_and_of_too_little(captured: Captured):
    await captured.run(group_size=1)
    opened = await captured.capture.open("r", TASK, None)
    captured.capture.begin(opened.session_id, "refused")
    captured.capture.end(opened.session_id, "refused", [], False)
    captured.capture.begin(opened.session_id, "lost")
    captured.capture.end(opened.session_id, "lost", [], True)
    await captured.played(opened.session_id, made([1], [2]))
    await captured.capture.close(opened.session_id)
    (row,) = await captured.lease()
    assert '"calls_not_reported": 1' in row["metadata"] and '"calls": 1' in row["metadata"]


async def test_a_call_over_the_limits_is_counted_and_trains_nowhere(captured: Captured):
    await captured.run(group_size=1)
    opened = await captured.capture.open("r", TASK, CaptureLimits(max_tokens=4))
    await captured.played(opened.session_id, made([1, 2], [3]), made([1, 2], [4, 5, 6]))
    told = await captured.capture.close(opened.session_id)
    assert told.tokens == 1
    (row,) = await captured.lease()
    assert '"calls_over_limits": 1' in row["metadata"]


async def test_cancelled_is_not_scored_and_gives_no_tokens_away(captured: Captured):
    await captured.run(group_size=1)
    opened = await captured.capture.open("r", TASK, None)
    await captured.played(opened.session_id, made([1], [2]))
    await captured.capture.reward(opened.session_id, 1.0, None)
    told = await captured.capture.close(opened.session_id, cancel=True)
    assert (told.stop_reason, told.reward) == ("cancelled", None)


async def test_deadlines_end_sessions_with_the_reward_they_have(captured: Captured):
    await captured.run(group_size=1)
    opened = await captured.capture.open("r", TASK, CaptureLimits(idle_seconds=10))
    await captured.played(opened.session_id, made([1], [2]))
    await captured.capture.reward(opened.session_id, 0.5, None)
    captured.clock.now += 9
    await captured.capture.expire()
    assert captured.capture.info(opened.session_id).state == "rewarded"
    captured.clock.now += 2
    await captured.capture.expire()
    told = captured.capture.info(opened.session_id)
    assert (told.state, told.stop_reason, told.reward) == ("closed", "deadline", 0.5)
    (row,) = await captured.lease()
    assert row["stop_reason"] == "deadline" and row["error"].startswith("session_timeout: ")


async def test_the_end_of_a_run_ends_its_sessions(captured: Captured):
    await captured.run("cancelled")
    await captured.run("forgotten")
    kept = await captured.capture.open("cancelled", None, None)
    gone = await captured.capture.open("forgotten", None, None)
    await captured.service.runs.cancel("cancelled")
    await captured.service.runs.forget("forgotten")
    await captured.capture.expire()
    assert captured.capture.info(kept.session_id).stop_reason == "cancelled"
    with pytest.raises(NotFoundError, match="no session"):
        captured.capture.info(gone.session_id)
    assert captured.capture.states == {}


async def test_unknown_and_closed_sessions_are_told_apart(captured: Captured):
    await captured.run()
    with pytest.raises(NotFoundError, match="when the controller died are lost"):
        captured.capture.begin("none", "x")
    opened = await captured.capture.open("r", None, None)
    await captured.capture.close(opened.session_id)
    with pytest.raises(ConflictError, match="is closed"):
        captured.capture.begin(opened.session_id, "x")
    with pytest.raises(ConflictError, match="is closed"):
        await captured.capture.reward(opened.session_id, 1.0, None)


async def test_closed_sessions_are_remembered_in_bounds(captured: Captured, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capture_service, "MAX_CLOSED", 2)
    await captured.run()
    ids = []
    for _ in range(3):
        opened = await captured.capture.open("r", None, None)
        await captured.capture.close(opened.session_id)
        ids.append(opened.session_id)
    with pytest.raises(NotFoundError):
        captured.capture.info(ids[0])
    assert captured.capture.info(ids[2]).state == "closed"


async def test_reasoning_in_captured_calls_is_marked(captured: Captured):
    captured.capture.markers = ReasoningMarkers((90,), frozenset({91}))
    await captured.run(group_size=1)
    opened = await captured.capture.open("r", TASK, None)
    await captured.played(opened.session_id, made([1], [90, 5, 6, 91, 7]))
    await captured.capture.close(opened.session_id)
    (row,) = await captured.lease()
    assert row["reasoning_spans"] == [{"start": 1, "end": 3}]


async def test_what_a_closed_session_left_survives_the_controller(tmp_path: Path):
    before = Captured(tmp_path / "journal.sqlite")
    await before.run(group_size=1)
    opened = await before.capture.open("r", TASK, None)
    await before.played(opened.session_id, made([1], [2]))
    await before.capture.close(opened.session_id)
    await before.service.close()
    after = Captured(tmp_path / "journal.sqlite")
    (row,) = await after.lease()
    assert row["trajectory_id"] == "r/t/0" and row["response_ids"] == [2]
    await after.service.close()
