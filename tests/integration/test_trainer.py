"""The trainer's side on the real cluster: weights in flight, and deaths of what stands between tasks and batches."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from rollout import Batch, Limits, NoBatch, Sampling, Task
from rollout.errors import ConflictError, NotFoundError, RefusedError
from tests.conftest import ROOT
from tests.integration.test_deaths import processes_called

MODEL = ROOT / "examples" / "calculator" / "model"
WEIGHTS = "model.safetensors"
MOST_UPDATES = 100


def many(tasks: list[Task], count: int) -> list[Task]:
    """So many tasks, of those that there are."""
    return [tasks[i % len(tasks)].model_copy(update={"task_id": f"t{i}"}) for i in range(count)]


def take_all(client, run: str, groups: int, seconds: float = 240.0) -> Counter[str]:
    """Lease and acknowledge until the run is finished; how often each trajectory was delivered."""
    seen: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        batch = client.lease(run, groups, min_groups=1, timeout=2.0, ttl=60)
        if isinstance(batch, NoBatch):
            if batch.finished:
                return seen
            continue
        ids = batch.table["trajectory_id"].to_pylist()
        assert client.acknowledge(batch).groups == len(batch.groups)
        seen.update(set(ids))
    raise AssertionError(f"not finished in {seconds} s: {client.run_info(run)}")


@pytest.fixture
def checkpoint(tmp_path: Path):
    """Makes checkpoints: the demo model's tensors through a function."""

    def make(name: str, change) -> Path:
        directory = tmp_path / name
        shutil.copytree(MODEL, directory)
        tensors = change(load_file(directory / WEIGHTS))
        save_file({k: v.contiguous() for k, v in tensors.items()}, directory / WEIGHTS, metadata={"format": "pt"})
        return directory

    yield make


def nudged(tensors):
    """A little noise: other weights that still talk."""
    return {name: (t.float() * (1 + 0.002 * torch.randn(t.shape))).to(t.dtype) for name, t in tensors.items()}


# Weights


def test_sessions_in_flight_survive_an_update_and_say_which_token_came_from_which_weights(client, tasks, checkpoint):
    """Updates follow each other for as long as the sessions last, so that some fall into the middle of turns."""
    before = client.weights()["version"]
    run = client.create_run(
        environment={"path": "playgrounds:SlowTalk"},
        sampling=Sampling(max_tokens=200, min_tokens=200, ignore_eos=True),
        limits=Limits(max_turns=3),
        group_size=4,
    ).run
    other = checkpoint("new", nudged)
    client.submit(run, many(tasks, 16))
    while client.run_info(run).sessions_running < 60:
        time.sleep(0.01)
    reports = []
    while len(reports) < MOST_UPDATES and client.run_info(run).sessions_running:
        reports.append(client.update_weights(MODEL if len(reports) % 2 else other))
    for number, report in enumerate(reports, 1):
        assert report.version == before + number and report.failed == {}
        assert [rank.rank for rank in report.replicas[0].ranks] == [0, 1], "both ranks were read back"
        assert all(rank.compared > 0 for rank in report.replicas[0].ranks)
        assert 0 < report.pause_ms < 30_000
    batch = client.lease(run, 16, timeout=120)
    assert isinstance(batch, Batch)
    across_turns = inside_turns = 0
    for row in batch.table.to_pylist():
        assert row["error"] is None
        pairs = list(pairwise(zip(row["policy_versions"], row["response_mask"], strict=True)))
        versions = [v for v, sampled in zip(row["policy_versions"], row["response_mask"], strict=True) if sampled]
        assert versions == sorted(versions) and set(versions) <= set(range(before, before + len(reports) + 1))
        across_turns += len(set(versions)) > 1
        inside_turns += any(a[1] and b[1] and a[0] != b[0] for a, b in pairs)
    assert across_turns == 64, "two seconds pass in every session, and an update takes far less"
    assert inside_turns > 0, "some update fell into the middle of a turn"
    client.acknowledge(batch)
    client.forget(run)
    assert client.update_weights(MODEL).version == before + len(reports) + 1


@pytest.mark.parametrize("what", ["missing", "incomplete", "cut", "shape", "not a directory"])
def test_weights_that_do_not_fit_are_refused_and_the_old_ones_go_on(
    client, player, tasks, checkpoint, tmp_path, what
):
    if what == "missing":
        path = tmp_path / "nowhere"
    elif what == "not a directory":
        path = tmp_path / "file"
        path.write_text("x")
    elif what == "cut":
        path = checkpoint("cut", dict)
        (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100])
    elif what == "incomplete":
        path = checkpoint("incomplete", lambda t: {k: v for k, v in t.items() if "layers.2" not in k})
    else:
        path = checkpoint("shape", lambda t: {k: v[:-1] if k.endswith("norm.weight") else v for k, v in t.items()})
    before = client.weights()
    with pytest.raises(RefusedError) as refused:
        client.update_weights(path)
    assert str(path) in str(refused.value) and "nothing has changed" in str(refused.value)
    assert "Traceback" not in str(refused.value)
    after = client.weights()
    assert (after["version"], after["source"]) == (before["version"], before["source"])
    played = player.play(tasks[:2], group_size=2)
    assert {row["error"] for row in played.rows} == {None}


def test_a_version_is_given_once_and_the_call_may_be_repeated(client, checkpoint):
    version = client.weights()["version"]
    report = client.update_weights(MODEL, version + 5)
    assert report.version == version + 5
    assert client.update_weights(MODEL, version + 5) == report, "its first answer may have been lost"
    with pytest.raises(ConflictError, match="is not new"):
        client.update_weights(checkpoint("other", nudged), version + 5)
    with pytest.raises(ConflictError, match="is not new"):
        client.update_weights(MODEL, version + 4)


def test_a_replica_that_starts_anew_carries_the_current_weights(
    client, http_client, player, tasks, checkpoint, cluster
):
    """The controller dies with it: trainers are answered as soon as it is back, long before there is an engine."""
    report = client.update_weights(checkpoint("again", nudged))
    for name in ("ServeReplica:engine", "ray::Controller"):
        os.kill(processes_called(cluster, name)[0].pid, signal.SIGKILL)
    run = http_client.create_run(group_size=1).run
    assert http_client.submit(run, tasks[:1]).accepted == 1
    assert isinstance(http_client.lease(run, 1, timeout=0.1), NoBatch)
    assert httpx.get(f"{cluster.gateway}/ready").status_code == 503
    http_client.forget(run)
    played = player.play(tasks[:8], group_size=4)
    versions = {v for row in played.rows for v in row["policy_versions"] if v >= 0}
    assert versions == {report.version}
    assert {row["error"] for row in played.rows} == {None}
    client.update_weights(MODEL)


# Deaths


@pytest.mark.parametrize("name", ["Controller", "ServeReplica:gateway"])
def test_every_group_is_delivered_once_although_one_actor_dies(http_client, tasks, cluster, name):
    run = http_client.create_run(group_size=2).run
    http_client.submit(run, many(tasks, 40))
    delivered: list[Counter[str]] = []
    trainer = threading.Thread(target=lambda: delivered.append(take_all(http_client, run, 8)))
    trainer.start()
    while http_client.run_info(run).sessions_done < 10:
        time.sleep(0.05)
    os.kill(processes_called(cluster, name)[0].pid, signal.SIGKILL)
    trainer.join(300)
    assert delivered, "the trainer got through"
    assert set(delivered[0]) == {f"{run}/t{i}/{n}" for i in range(40) for n in range(2)}
    assert set(delivered[0].values()) == {1}
    http_client.forget(run)


def test_random_kills_lose_nothing_and_repeat_nothing(http_client, tasks, cluster):
    """More than 200 groups, while controller, gateway and workers die at random."""
    run = http_client.create_run(group_size=2, sampling=Sampling(max_tokens=96)).run
    http_client.submit(run, many(tasks, 210))
    delivered: list[Counter[str]] = []
    trainer = threading.Thread(target=lambda: delivered.append(take_all(http_client, run, 12, 400)))
    trainer.start()
    chance = random.Random(3)
    kills = 0
    while trainer.is_alive() and kills < 5:
        trainer.join(chance.uniform(1.0, 4.0))
        victims = processes_called(cluster, chance.choice(["Controller", "SessionWorker", "ServeReplica:gateway"]))
        if victims and trainer.is_alive():
            os.kill(chance.choice(victims).pid, signal.SIGKILL)
            kills += 1
    trainer.join(400)
    assert kills >= 3 and delivered, f"{kills} kills"
    assert set(delivered[0]) == {f"{run}/t{i}/{n}" for i in range(210) for n in range(2)}
    assert set(delivered[0].values()) == {1}
    info = http_client.run_info(run)
    assert (info.delivered, info.submitted, info.dropped) == (210, 210, {})
    http_client.forget(run)


# HTTP


def test_a_trainer_that_hangs_up_in_the_middle_of_a_batch_gets_it_again(http_client, cluster, tasks):
    run = http_client.create_run(group_size=4).run
    http_client.submit(run, many(tasks, 6))
    while http_client.run_info(run).ready < 6:
        time.sleep(0.1)
    body = {"groups": 6, "ttl": 3.0}
    with httpx.stream("POST", f"{cluster.gateway}/v1/runs/{run}/leases", json=body, timeout=30) as response:
        assert response.status_code == 200
        next(response.iter_raw(100))
    assert isinstance(http_client.lease(run, 6, timeout=0.5), NoBatch), "the lease still holds them"
    again = http_client.lease(run, 6, timeout=20)
    assert isinstance(again, Batch) and again.table.num_rows >= 24
    http_client.acknowledge(again)
    info = http_client.run_info(run)
    assert info.finished and info.leases_expired == 1
    http_client.forget(run)


def test_both_clients_see_the_same_runs(client, http_client, tasks):
    run = client.create_run(name="seen-by-both", group_size=2).run
    assert http_client.run_info(run) == client.run_info(run)
    http_client.submit(run, tasks[:3])
    assert client.submit(run, tasks[:3]).duplicates == 3
    (batch,) = list(client.batches(run, 3, timeout=60))
    assert len(batch.groups) == 3
    assert http_client.acknowledge(batch).repeated
    http_client.forget(run)
    with pytest.raises(NotFoundError):
        client.run_info(run)


def test_tasks_in_batch_out_in_one_call(http_client, tasks):
    table = http_client.rollout(tasks[:4], group_size=2, progress=False)
    assert sorted(set(table["task_id"].to_pylist())) == sorted(task.task_id for task in tasks[:4])
    assert len(set(table["trajectory_id"].to_pylist())) == 8
