"""Runs and batches as a trainer meets them: over a real journal and scheduler, without Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actors import filter_function, run_service
from actors.scheduler import Assignment
from rollout.api import Batch, Filters, LeaseRequest, NoBatch, RunRequest
from rollout.errors import BusyError, ConflictError, JournalError, NotFoundError, RefusedError
from rollout.tasks import Task
from rollout.trajectory import Trajectory
from tests.actors.service import Service, ids_of, play, tasks


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    made = Service(tmp_path / "journal.sqlite")
    yield made
    await made.close()


async def lease(service: Service, groups: int, timeout: float = 0.0, **fields: object) -> Batch | NoBatch:
    request = LeaseRequest.model_validate({"groups": groups, "timeout": timeout, **fields})
    return await service.delivery.lease("r", request)


async def run_of(service: Service, count: int, **fields: object) -> None:
    await service.runs.create(RunRequest.model_validate({"name": "r", **fields}))
    await service.runs.submit("r", tasks(count))


# Batches


async def test_a_batch_has_whole_groups_in_order(service: Service):
    await run_of(service, 3)
    await service.work()
    batch = await lease(service, 2)
    assert isinstance(batch, Batch)
    assert batch.groups == ["r/t0", "r/t1"]
    assert ids_of(batch.table) == ["r/t0/0", "r/t0/1", "r/t1/0", "r/t1/1"]
    assert 590 < batch.expires_in <= 600
    rest = await lease(service, 2)
    assert isinstance(rest, Batch) and rest.groups == ["r/t2"], "nothing more is under way"


async def test_groups_come_as_they_complete_or_as_submitted(service: Service):
    for name, order in (("r", "completed"), ("s", "submitted")):
        await service.runs.create(RunRequest.model_validate({"name": name, "order": order}))
        await service.runs.submit(name, tasks(3))
    begun = service.start()
    late = [a for a in begun if a.key.task_id == "t0"]
    await service.finish([a for a in begun if a.key.task_id != "t0"])
    batch = await lease(service, 2)
    assert isinstance(batch, Batch) and batch.groups == ["r/t1", "r/t2"]
    held = await service.delivery.lease("s", LeaseRequest(groups=1, timeout=0))
    assert isinstance(held, NoBatch) and held.ready == 2
    await service.finish(late)
    batch = await service.delivery.lease("s", LeaseRequest(groups=3, timeout=0))
    assert isinstance(batch, Batch) and batch.groups == ["s/t0", "s/t1", "s/t2"]


async def test_a_lease_waits_for_enough_groups(service: Service):
    await run_of(service, 4)
    begun = service.start()
    waiting = asyncio.create_task(lease(service, 2, timeout=5.0))
    await service.finish(begun[:2])
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await service.finish(begun[2:4])
    batch = await waiting
    assert isinstance(batch, Batch) and len(batch.groups) == 2


async def test_after_the_wait_there_is_what_there_is_or_a_reason(service: Service):
    await run_of(service, 3)
    begun = service.start()
    await service.finish(begun[:2])
    nothing = await lease(service, 2, timeout=0.05)
    assert isinstance(nothing, NoBatch)
    assert (nothing.finished, nothing.ready, nothing.running) == (False, 1, 2)
    some = await lease(service, 2, timeout=0.05, min_groups=1)
    assert isinstance(some, Batch) and some.groups == ["r/t0"]


async def test_a_run_that_is_done_says_so_at_once(service: Service):
    await run_of(service, 1)
    await service.work()
    batch = await lease(service, 1)
    assert isinstance(batch, Batch)
    leased = await lease(service, 1, timeout=0.05)
    assert isinstance(leased, NoBatch) and not leased.finished, "it may come back"
    await service.delivery.acknowledge(batch.lease_id)
    started = time.monotonic()
    done = await lease(service, 1, timeout=30)
    assert isinstance(done, NoBatch) and done.finished and time.monotonic() - started < 5
    assert service.runs.info("r").finished


async def test_two_trainers_race_and_share(service: Service):
    await run_of(service, 30)
    found: list[str] = []

    async def trainer() -> None:
        while isinstance(batch := await lease(service, 3, timeout=5.0), Batch):
            found.extend(batch.groups)
            await asyncio.sleep(0)
            await service.delivery.acknowledge(batch.lease_id)

    trainers = [asyncio.create_task(trainer()) for _ in range(2)]
    await service.work()
    await asyncio.gather(*trainers)
    assert sorted(found) == sorted(f"r/t{n}" for n in range(30))


# Leases


async def test_an_expired_lease_is_delivered_again_and_first(service: Service):
    await run_of(service, 3)
    await service.work()
    first = await lease(service, 2, ttl=0.01)
    assert isinstance(first, Batch)
    service.delivery.expire(time.time() + 1)
    again = await lease(service, 3)
    assert isinstance(again, Batch) and again.groups == ["r/t0", "r/t1", "r/t2"]
    assert service.runs.info("r").leases_expired == 1
    with pytest.raises(ConflictError, match="is expired, and its groups were given out again"):
        await service.delivery.acknowledge(first.lease_id)
    assert (await service.delivery.acknowledge(again.lease_id)).groups == 3
    with pytest.raises(ConflictError):
        await service.delivery.acknowledge(first.lease_id)


async def test_a_late_acknowledgement_counts_if_nobody_else_has_the_groups(service: Service):
    await run_of(service, 2)
    await service.work()
    batch = await lease(service, 2, ttl=0.01)
    assert isinstance(batch, Batch)
    service.delivery.expire(time.time() + 1)
    told = await service.delivery.acknowledge(batch.lease_id)
    assert told.late and told.groups == 2
    assert (await service.delivery.acknowledge(batch.lease_id)).repeated
    assert service.runs.info("r").delivered == 2


async def test_an_extended_lease_does_not_expire(service: Service):
    await run_of(service, 1)
    await service.work()
    batch = await lease(service, 1, ttl=1)
    assert isinstance(batch, Batch)
    assert await service.delivery.extend(batch.lease_id, 100) > time.time() + 90
    service.delivery.expire(time.time() + 50)
    assert not (await service.delivery.acknowledge(batch.lease_id)).late


async def test_a_released_batch_is_there_at_once(service: Service):
    await run_of(service, 1)
    await service.work()
    batch = await lease(service, 1)
    assert isinstance(batch, Batch)
    await service.delivery.release(batch.lease_id)
    again = await lease(service, 1)
    assert isinstance(again, Batch) and again.groups == batch.groups and again.lease_id != batch.lease_id
    with pytest.raises(ConflictError, match="is released"):
        await service.delivery.release(batch.lease_id)


async def test_a_repeated_call_gets_the_same_lease(service: Service):
    await run_of(service, 2)
    await service.work()
    first = await lease(service, 1, request_id="q")
    again = await lease(service, 1, request_id="q")
    assert isinstance(first, Batch) and isinstance(again, Batch)
    assert again.lease_id == first.lease_id and again.table.equals(first.table)
    fetched = await service.delivery.fetch(first.lease_id)
    assert fetched.table.equals(first.table)


async def test_a_call_that_is_repeated_while_the_first_still_waits_gets_the_same_lease(service: Service):
    await run_of(service, 2)
    calls = [asyncio.create_task(lease(service, 1, timeout=30, request_id="q")) for _ in range(2)]
    await asyncio.sleep(0.01)
    await service.work()
    first, again = await asyncio.gather(*calls)
    assert isinstance(first, Batch) and isinstance(again, Batch)
    assert again.lease_id == first.lease_id and again.groups == first.groups
    assert service.runs.info("r").leased == 1


async def test_a_trainer_that_goes_away_while_it_waits_takes_nothing(service: Service):
    await run_of(service, 1)
    begun = service.start()
    waiting = asyncio.create_task(lease(service, 1, timeout=30))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await service.finish(begun)
    assert isinstance(await lease(service, 1), Batch)


# Tasks and runs


async def test_tasks_are_known_by_their_ids(service: Service):
    await run_of(service, 3)
    again = await service.runs.submit("r", tasks(5))
    assert (again.accepted, again.duplicates) == (2, 3)
    other = Task(task_id="t1", messages=[{"role": "user", "content": "something else"}])
    with pytest.raises(ConflictError, match="task_id 't1' was already submitted") as conflict:
        await service.runs.submit("r", [*tasks(1, start=9), other])
    assert conflict.value.field == "tasks.1.task_id"
    assert service.runs.info("r").submitted == 5, "nothing of a refused submission is kept"
    twice = tasks(1, start=20) * 2
    assert (await service.runs.submit("r", twice)).duplicates == 1


async def test_a_run_is_created_once(service: Service):
    await service.runs.create(RunRequest(name="r", group_size=3))
    assert (await service.runs.create(RunRequest(name="r", group_size=3))).group_size == 3
    with pytest.raises(ConflictError, match="exists with other settings"):
        await service.runs.create(RunRequest(name="r", group_size=4))
    assert (await service.runs.create(RunRequest())).run.startswith("run-")


async def test_a_run_needs_an_environment(service: Service):
    service.runs._defaults = service.runs._defaults.model_copy(update={"environment": None})
    with pytest.raises(RefusedError) as refused:
        await service.runs.create(RunRequest(name="r"))
    assert refused.value.field == "environment"


async def test_what_does_not_exist(service: Service):
    with pytest.raises(NotFoundError, match="there is no run 'r'"):
        await lease(service, 1)
    with pytest.raises(NotFoundError):
        await service.delivery.acknowledge("nope")


async def test_too_many_tasks_are_refused_with_a_time_to_come_back(service: Service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_service, "MAX_BACKLOG", 3)
    await run_of(service, 3)
    with pytest.raises(BusyError) as busy:
        await service.runs.submit("r", tasks(1, start=5))
    assert busy.value.retry_after > 0


async def test_a_full_memory_starts_nothing_until_batches_are_acknowledged(
    service: Service, monkeypatch: pytest.MonkeyPatch
):
    await run_of(service, 4)
    await service.finish(service.start()[:2])
    monkeypatch.setattr(run_service, "MAX_SHELF_BYTES", 1)
    await service.runs.submit("r", tasks(2, start=50))
    assert service.start() == []
    assert service.runs.info("r").held_by == "memory"
    batch = await lease(service, 1)
    assert isinstance(batch, Batch)
    await service.delivery.acknowledge(batch.lease_id)
    assert len(service.start()) == 4


async def test_a_paused_run_starts_nothing(service: Service):
    await run_of(service, 1)
    info = await service.runs.pause("r", True)
    assert (info.state, info.held_by) == ("paused", "paused") and service.start() == []
    await service.runs.pause("r", False)
    assert len(service.start()) == 2


async def test_a_cancelled_run_keeps_what_it_has(service: Service):
    service.scheduler.worker_lost("w")
    service.scheduler.add_worker("w", 5)
    await run_of(service, 4)
    begun = service.start()
    await service.finish(begun[:3])
    await service.runs.cancel("r")
    assert sorted(service.cancelled) == ["r/t1/1", "r/t2/0"]
    with pytest.raises(ConflictError, match="takes no more tasks"):
        await service.runs.submit("r", tasks(1, start=9))
    await service.finish(begun[3:], lambda a: play(a, stop="cancelled"))
    batch = await lease(service, 9, timeout=1)
    assert isinstance(batch, Batch) and sorted(batch.groups) == ["r/t0", "r/t1", "r/t2"]
    reasons = dict(zip(ids_of(batch.table), batch.table["stop_reason"].to_pylist(), strict=True))
    assert reasons["r/t1/0"] == "stop" and reasons["r/t1/1"] == reasons["r/t2/0"] == reasons["r/t2/1"] == "cancelled"
    await service.delivery.acknowledge(batch.lease_id)
    info = service.runs.info("r")
    assert info.finished and info.dropped == {"cancelled": 1}


async def test_a_forgotten_run_is_gone(service: Service):
    await run_of(service, 3)
    begun = service.start()
    await service.finish(begun[:2])
    waiting = asyncio.create_task(lease(service, 3, timeout=30))
    await asyncio.sleep(0.01)
    await service.runs.forget("r")
    with pytest.raises(NotFoundError):
        await waiting
    assert set(service.cancelled) == {a.key.trajectory_id for a in begun[2:]}
    again = asyncio.create_task(run_of(service, 3))
    await asyncio.sleep(0.01)
    assert service.runs.runs() == [] and not again.done(), "the old sessions have the new ones' ids"
    await service.finish(begun[2:])
    assert service.runs.runs() == [] and service.store.shelf.num_bytes == 0
    await again
    assert service.runs.info("r").submitted == 3 and len(service.start()) == 6


async def test_a_forgotten_runs_name_is_free_as_soon_as_its_sessions_have_ended(
    service: Service, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_service, "ENDING_SECONDS", 0.05)
    await run_of(service, 1)
    service.start()
    await service.runs.forget("r")
    await service.runs.create(RunRequest(name="r-2"))
    with pytest.raises(BusyError, match="still ending"):
        await service.runs.create(RunRequest(name="r"))
    service.scheduler.worker_lost("w")
    await service.runs.create(RunRequest(name="r"))


# What is worth delivering


def failing(*trajectory_ids: str):
    def make(assignment: Assignment) -> Trajectory:
        return play(assignment, stop="error" if assignment.key.trajectory_id in trajectory_ids else "stop")

    return make


async def test_failures_are_delivered_marked(service: Service):
    await run_of(service, 1)
    await service.work(failing("r/t0/1"))
    batch = await lease(service, 1)
    assert isinstance(batch, Batch) and batch.table["stop_reason"].to_pylist() == ["stop", "error"]
    assert batch.table["reward"].to_pylist() == [1.0, None]


async def test_or_the_group_is_played_again_and_dropped_in_the_end(service: Service):
    await run_of(service, 2, failed="drop", max_replacements=2)
    await service.work(failing("r/t0/1", "r~1/t0/0", "r/t1/0", "r~1/t1/0", "r~2/t1/1"))
    batch = await lease(service, 2)
    assert isinstance(batch, Batch) and batch.groups == ["r~2/t0"]
    info = service.runs.info("r")
    assert info.replaced == {"failed": 4} and info.dropped == {"failed": 1}


async def test_groups_without_contrast_are_dropped(service: Service):
    await run_of(service, 3, filters={"drop_zero_variance": True})

    def make(a: Assignment) -> Trajectory:
        return play(a, reward={"t0": 1.0, "t1": float(a.key.sample_index), "t2": None}[a.key.task_id])

    await service.work(make)
    batch = await lease(service, 3)
    assert isinstance(batch, Batch) and batch.groups == ["r/t1", "r/t2"], "no reward is no evidence of equality"
    assert service.runs.info("r").dropped == {"zero_variance": 1}


async def test_groups_that_were_cut_are_dropped(service: Service):
    await run_of(service, 2, filters={"max_truncated": 0.5})
    await service.work(
        lambda a: play(a, stop="length" if a.key.task_id == "t0" or a.key.sample_index == 0 else "stop")
    )
    batch = await lease(service, 2)
    assert isinstance(batch, Batch) and batch.groups == ["r/t1"]
    assert service.runs.info("r").dropped == {"truncated": 1}


def only_even(rows):
    """A user's filter."""
    number = int(rows["task_id"][0].as_py()[1:])
    if number == 7:
        raise RuntimeError("seven")
    return True if number % 2 == 0 else ("odd" if number > 2 else False)


async def test_a_users_filter_decides_and_its_failure_loses_nothing(service: Service):
    await run_of(service, 8, filters=Filters(function=f"{__name__}:only_even"))
    await service.work()
    batch = await lease(service, 5, timeout=5)
    assert isinstance(batch, Batch)
    assert sorted(batch.groups) == ["r/t0", "r/t2", "r/t4", "r/t6", "r/t7"]
    info = service.runs.info("r")
    assert info.dropped == {"odd": 2, "filter": 1}
    assert info.filter_error is not None and "RuntimeError: seven" in info.filter_error


def slow(rows):
    """A user's filter."""
    time.sleep(0.05)
    return True


async def test_a_filter_with_many_groups_to_look_at_is_not_late(service: Service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(filter_function, "FILTER_SECONDS", 0.2)
    await run_of(service, 12, filters=Filters(function=f"{__name__}:slow"))
    await service.work()
    batch = await lease(service, 12, timeout=10)
    assert isinstance(batch, Batch) and len(batch.groups) == 12
    assert service.runs.info("r").filter_error is None


async def test_oversampling_cancels_the_surplus(service: Service):
    await run_of(service, 6, target_groups=2)
    begun = service.start()
    await service.finish(begun[:4])
    info = service.runs.info("r")
    assert (info.ready, info.running, info.waiting) == (2, 0, 0)
    assert info.dropped == {"surplus": 4}
    assert set(service.cancelled) == {a.key.trajectory_id for a in begun[4:]}
    await service.finish(begun[4:])
    batch = await lease(service, 6)
    assert isinstance(batch, Batch) and len(batch.groups) == 2


# Staleness


async def test_groups_too_old_are_played_again(service: Service):
    await run_of(service, 3, max_staleness=1)
    begun = service.start()
    await service.finish(begun[:2])
    service.runs.set_version(1)
    assert service.runs.info("r").replaced == {}
    service.runs.set_version(2)
    info = service.runs.info("r")
    assert info.replaced == {"stale": 3} and info.ready == 0
    assert set(service.cancelled) == {a.key.trajectory_id for a in begun[2:]}
    await service.finish(begun[2:])
    await service.work(lambda a: play(a, version=2))
    batch = await lease(service, 3)
    assert isinstance(batch, Batch) and batch.policy_version == 2
    assert {v for row in batch.table["policy_versions"].to_pylist() for v in row} == {2}


async def test_the_bound_holds_back_what_would_be_too_old(service: Service):
    await run_of(service, 9, max_staleness=1, batch_groups=2)
    assert len(service.start()) == 2 * (1 + 1) * 2
    assert service.runs.info("r").held_by == "staleness"
    nothing = await lease(service, 9, timeout=0.01)
    assert isinstance(nothing, NoBatch)
    service.runs.set_version(1)
    assert len(service.start()) == 2 * 2
    info = service.runs.info("r")
    assert info.running == 6


async def test_a_batch_that_comes_back_too_old_is_played_again(service: Service):
    await run_of(service, 1, max_staleness=0)
    await service.work()
    batch = await lease(service, 1)
    assert isinstance(batch, Batch)
    service.runs.set_version(1)
    assert service.runs.info("r").leased == 1, "what is leased is the trainer's affair"
    await service.delivery.release(batch.lease_id)
    assert service.runs.info("r").replaced == {"stale": 1}
    with pytest.raises(ConflictError):
        await service.delivery.acknowledge(batch.lease_id)


# Deaths


async def test_sessions_that_workers_die_over_become_errors(service: Service):
    await run_of(service, 1)
    for number in range(3):
        service.start()
        given_up = service.scheduler.worker_lost("w")
        service.scheduler.add_worker("w", 10)
        assert len(given_up) == (2 if number == 2 else 0)
    await service.store.give_up(given_up, "error", None)
    batch = await lease(service, 1)
    assert isinstance(batch, Batch) and batch.table["stop_reason"].to_pylist() == ["error", "error"]


async def test_a_journal_that_fails_ends_all_promises(service: Service, monkeypatch: pytest.MonkeyPatch):
    await run_of(service, 1)

    async def full(*_: object) -> None:
        raise JournalError("disk full")

    monkeypatch.setattr(service.journal, "write", full)
    with pytest.raises(JournalError, match="disk full"):
        await service.runs.submit("r", tasks(1, start=5))
    with pytest.raises(JournalError):
        await service.runs.create(RunRequest(name="s"))
    with pytest.raises(JournalError):
        await lease(service, 1)
