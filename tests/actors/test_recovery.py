"""After any death: every submitted task is delivered exactly once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from actors import journal_records as records
from actors.journal import Journal
from rollout.api import Batch, LeaseRequest, NoBatch, RunRequest
from rollout.errors import ConflictError
from rollout.weights import CheckpointSource
from tests.actors.service import Service, ids_of, play, tasks
from tests.conftest import ROOT


def abandon(service: Service) -> None:
    """What SIGKILL leaves: nothing in memory. Writes that are queued may or may not reach the disk."""
    for task in service.store._background:
        task.cancel()
    service.journal._queue.put(None)
    service.journal._thread.join()


async def test_everything_is_as_it_was(tmp_path: Path):
    path = tmp_path / "j.sqlite"
    before = Service(path)
    await before.runs.create(RunRequest(name="r", max_staleness=5, filters={"drop_zero_variance": False}))
    await before.runs.submit("r", tasks(6))
    begun = before.start()
    await before.finish(begun[:5])
    first = await before.delivery.lease("r", LeaseRequest(groups=1, timeout=0))
    second = await before.delivery.lease("r", LeaseRequest(groups=1, timeout=0, request_id="q"))
    assert isinstance(first, Batch) and isinstance(second, Batch)
    await before.delivery.acknowledge(first.lease_id)
    await before.journal.write(records.put_weights(4, CheckpointSource(path="/w"), "current"))
    await before.journal.write(records.put_weights(5, CheckpointSource(path="/x"), "pending"))
    told = before.runs.info("r")
    abandon(before)

    found = records.recover(Journal(path))
    assert (found.version, found.source, found.last_version) == (4, CheckpointSource(path="/w"), 5)
    after = Service(path)
    info = after.runs.info("r")
    assert (info.submitted, info.delivered, info.leased, info.tokens) == (6, 1, 1, told.tokens)
    again = await after.delivery.lease("r", LeaseRequest(groups=1, timeout=0, request_id="q"))
    assert isinstance(again, Batch) and again.lease_id == second.lease_id and again.table.equals(second.table)
    assert (await after.delivery.acknowledge(first.lease_id)).repeated
    assert not (await after.delivery.acknowledge(second.lease_id)).repeated
    restarted = {a.key.trajectory_id for a in after.start()}
    assert "r/t2/0" not in restarted and "r/t2/1" in restarted, "a finished member is not played again"
    assert len(restarted) == 7
    await after.finish(list(after.held.values()))
    rest = await after.delivery.lease("r", LeaseRequest(groups=9, timeout=0))
    assert isinstance(rest, Batch) and len(rest.groups) == 4
    await after.delivery.acknowledge(rest.lease_id)
    assert after.runs.info("r").finished and after.journal.read("SELECT count(*) FROM blocks") == [(0,)]
    await after.close()


async def test_paused_and_cancelled_runs_stay_so(tmp_path: Path):
    before = Service(tmp_path / "j.sqlite")
    for name in ("paused", "cancelled"):
        await before.runs.create(RunRequest(name=name))
        await before.runs.submit(name, tasks(2))
    begun = before.start()
    mine = [a for a in begun if a.key.run == "cancelled" and a.key.task_id == "t0"]
    await before.finish(mine[:1])
    await before.runs.pause("paused", True)
    await before.runs.cancel("cancelled")
    abandon(before)
    after = Service(tmp_path / "j.sqlite")
    await asyncio.sleep(0.05)
    assert after.start() == []
    assert after.runs.info("paused").state == "paused"
    batch = await after.delivery.lease("cancelled", LeaseRequest(groups=2, timeout=1))
    assert isinstance(batch, Batch) and batch.groups == ["cancelled/t0"]
    assert sorted(batch.table["stop_reason"].to_pylist()) == ["cancelled", "stop"]
    assert after.runs.info("cancelled").dropped == {"cancelled": 1}
    await after.close()


async def test_taking_up_the_journal_twice_changes_nothing(tmp_path: Path):
    """A controller that comes back may need several attempts to reach its engines."""
    before = Service(tmp_path / "j.sqlite")
    await before.runs.create(RunRequest(name="r"))
    await before.runs.submit("r", tasks(3))
    await before.finish(before.start()[:2])
    abandon(before)
    after = Service(tmp_path / "j.sqlite")
    run = after.store.run("r")
    after.store.recover(records.recover(after.journal))
    assert after.store.run("r") is run and len(after.start()) == 4
    await after.close()


async def test_complete_groups_beyond_the_target_are_kept(tmp_path: Path):
    before = Service(tmp_path / "j.sqlite")
    await before.runs.create(RunRequest(name="r", target_groups=2))
    for start in range(5):
        # Each time there is nothing else that could be dropped.
        await before.runs.submit("r", tasks(1, start))
        await before.finish(before.start())
    kept = before.runs.info("r").ready
    abandon(before)
    after = Service(tmp_path / "j.sqlite")
    await asyncio.sleep(0.05)
    assert after.runs.info("r").ready == kept == 5
    await after.close()


async def test_a_group_that_is_replaced_at_the_start_is_queued_once(tmp_path: Path):
    before = Service(tmp_path / "j.sqlite")
    await before.runs.create(RunRequest(name="r", max_staleness=0))
    await before.runs.submit("r", tasks(1))
    await before.finish(before.start())
    # The weights came, and the death, before the group was looked at again.
    before.store.version = 5
    await before.store.write(records.put_weights(5, CheckpointSource(path="w"), "current"))
    abandon(before)
    after = Service(tmp_path / "j.sqlite")
    await asyncio.sleep(0.05)
    assert after.runs.info("r").replaced == {"stale": 1}
    assert len(after.start()) == 2
    await after.close()


@pytest.mark.parametrize("seed", range(6))
async def test_a_random_walk_with_deaths_delivers_every_task_once(tmp_path: Path, seed: int):
    """210 groups, a death at every thirtieth step or so, expiries, late acknowledgements, new weights."""
    chance = random.Random(seed)
    path = tmp_path / "j.sqlite"
    service = Service(path, capacity=40)
    options = {"name": "r", "max_staleness": chance.choice([None, 3]), "failed": "drop", "max_replacements": 100}
    delivered: Counter[str] = Counter()
    batches: list[Batch] = []
    unsent = tasks(210)
    deaths = version = 0
    await service.runs.create(RunRequest.model_validate(options))
    for step in range(20_000):
        match chance.choices(
            ["submit", "work", "lease", "acknowledge", "expire", "die", "version"], [4, 30, 6, 8, 1, 1.5, 1]
        )[0]:
            case "submit" if unsent:
                await service.runs.submit("r", unsent[:7])
                if chance.random() < 0.7:  # else its answer was lost, and it is sent again
                    unsent = unsent[7:]
            case "work":
                service.start()
                ready = chance.sample(sorted(service.held), min(len(service.held), chance.randint(1, 12)))
                if ready:
                    failed = chance.random() < 0.05
                    await service.finish(
                        [service.held[t] for t in ready],
                        lambda a, bad=failed, v=version: play(a, version=v, stop="error" if bad else "stop"),
                    )
            case "lease":
                answer = await service.delivery.lease(
                    "r", LeaseRequest(groups=chance.randint(1, 9), min_groups=1, timeout=0)
                )
                if isinstance(answer, Batch):
                    batches.append(answer)
                elif answer.finished and not unsent and service.runs.info("r").submitted == 210:
                    break
            case "acknowledge" if batches:
                batch = batches.pop(chance.randrange(len(batches)))
                try:
                    told = await service.delivery.acknowledge(batch.lease_id)
                except ConflictError:
                    continue
                if not told.repeated:
                    delivered.update({task.split("/")[-2] for task in ids_of(batch.table)})
                if chance.random() < 0.3:
                    assert (await service.delivery.acknowledge(batch.lease_id)).repeated
            case "expire":
                service.delivery.expire(time.time() + 10_000)
            case "die":
                deaths += 1
                abandon(service)
                service = Service(path, capacity=40)
                service.store.version = version
            case "version":
                version += 1
                service.runs.set_version(version)
        if step % 50 == 0:
            service.audit()
    info = service.runs.info("r")
    assert info.finished, info
    assert deaths > 3
    assert delivered == Counter({f"t{number}": 1 for number in range(210)})
    assert info.delivered == 210 and info.dropped == {}
    await asyncio.sleep(0.05)
    assert service.journal.read("SELECT count(*) FROM blocks") == [(0,)], "nothing is kept that nobody wants"
    await service.close()


_PLAYER = """
import asyncio, sys
from pathlib import Path
from rollout.api import Batch, LeaseRequest, RunRequest
from tests.actors.service import Service, ids_of, tasks

async def main():
    service = Service(Path(sys.argv[1]), capacity=16)
    await service.runs.create(RunRequest(name="r"))
    await service.runs.submit("r", tasks(200))
    while True:
        begun = service.start()
        if begun:
            await service.finish(begun)
        answer = await service.delivery.lease("r", LeaseRequest(groups=5, min_groups=1, timeout=0, ttl=0.2))
        if isinstance(answer, Batch):
            told = await service.delivery.acknowledge(answer.lease_id)
            # Said only after it is on disk: what was said before must not come again.
            print(" ".join(answer.groups), flush=True)
        elif answer.finished:
            print("finished", flush=True)
            return
        service.delivery.expire(__import__("time").time())

asyncio.run(main())
"""


def test_a_process_that_is_really_killed(tmp_path: Path):
    """SIGKILL at random moments until it gets through; nothing that was confirmed is delivered again."""
    chance = random.Random(5)
    confirmed: list[str] = []
    kills = 0
    for _ in range(40):
        process = subprocess.Popen(
            [sys.executable, "-c", _PLAYER, str(tmp_path / "j.sqlite")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        limit = chance.randint(3, 9) if kills < 4 else 10_000
        for lines, line in enumerate(process.stdout, start=1):
            confirmed += [] if line.startswith("finished") else line.split()
            if lines >= limit:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        # What it still confirmed before the signal came.
        confirmed += [word for line in process.stdout for word in line.split() if word != "finished"]
        if process.wait() == 0:
            break
    assert kills == 4
    counted = Counter(confirmed)
    assert max(counted.values()) == 1
    # A confirmation that died on its way to us is the only way to be missing.
    assert set(counted) <= {f"r/t{number}" for number in range(200)} and len(counted) >= 200 - 5 * kills


def test_the_answer_of_a_finished_run(tmp_path: Path):
    async def twice() -> None:
        for _ in range(2):
            service = Service(tmp_path / "j.sqlite")
            await service.runs.create(RunRequest(name="r"))
            await service.runs.submit("r", tasks(3))
            await service.work()
            answer = await service.delivery.lease("r", LeaseRequest(groups=3, timeout=0))
            if isinstance(answer, Batch):
                await service.delivery.acknowledge(answer.lease_id)
            await service.close()
        assert isinstance(answer, NoBatch) and answer.finished

    asyncio.run(twice())
