"""Killing a worker or an engine in the middle loses nothing."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

import psutil
import pytest

from cluster import state
from rollout.limits import Limits
from rollout.sampling import Sampling

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600, func_only=True)]

SAMPLING = Sampling(max_tokens=128, min_tokens=128, ignore_eos=True)
LIMITS = Limits(max_turns=3, engine_seconds=200, session_seconds=250)


def processes_called(cluster: state.ClusterState, name: str) -> list[psutil.Process]:
    """Processes of the cluster by what they call themselves."""
    found = [p for p in state.processes(cluster) if name in " ".join(p.cmdline()) or name in p.name()]
    return sorted(found, key=lambda p: p.pid)


def play_with_a_kill(player, tasks, cluster, name: str):
    """48 sessions of three long turns; while most of them run, one process called `name` gets SIGKILL."""
    killed = []

    def kill(info) -> bool:
        if info.sessions_running < 40 or info.sessions_done > 8:
            return False
        victim = processes_called(cluster, name)[0]
        os.kill(victim.pid, signal.SIGKILL)
        killed.append(victim.pid)
        return True

    played = player.play(
        tasks[:12],
        environment="playgrounds:SlowTalk",
        group_size=4,
        sampling=SAMPLING,
        limits=LIMITS,
        meanwhile=kill,
    )
    assert killed
    return played


def assert_nothing_lost(played, tasks) -> None:
    first = [row for row in played.rows if row["segment_index"] == 0]
    got = Counter("/".join(row["trajectory_id"].rsplit("/", 2)[1:]) for row in first)
    assert got == Counter(f"{task.task_id}/{index}" for task in tasks[:12] for index in range(4))
    assert {row["stop_reason"] for row in first} <= {"stop", "length"}, Counter(row["error"] for row in first)
    assert {row["error"] for row in first} == {None}
    for row in played.rows:
        assert row["num_segments"] >= 1
    whole = Counter(row["trajectory_id"] for row in played.rows)
    assert all(whole[row["trajectory_id"]] == row["num_segments"] for row in played.rows)


def test_a_killed_session_worker(player, tasks, cluster):
    played = play_with_a_kill(player, tasks, cluster, "SessionWorker")
    assert_nothing_lost(played, tasks)
    assert played.info.workers_lost == 1
    assert played.info.sessions_retried > 0
    attempts = Counter(row["attempts"] for row in played.rows)
    assert set(attempts) == {1, 2}, "only the killed worker's sessions ran again"


def test_a_killed_engine_replica(player, tasks, cluster):
    played = play_with_a_kill(player, tasks, cluster, "ServeReplica:engine")
    assert_nothing_lost(played, tasks)


def test_a_killed_controller_of_serve_ends_no_replica(player, tasks, cluster):
    before = {
        name: [p.pid for p in processes_called(cluster, f"ServeReplica:{name}")] for name in ("engine", "gateway")
    }
    played = play_with_a_kill(player, tasks, cluster, "ray::ServeController")
    assert_nothing_lost(played, tasks)
    # It looks at the replicas that it finds as soon as it is there, and at their health every few seconds.
    deadline = time.monotonic() + 60
    while not processes_called(cluster, "ray::ServeController") and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(5)
    after = {name: [p.pid for p in processes_called(cluster, f"ServeReplica:{name}")] for name in before}
    assert after == before
    assert all(len(pids) == 1 for pids in before.values())


@pytest.mark.slow
def test_a_killed_tensor_parallel_rank(player, tasks, cluster):
    """The replica lives on with a dead engine: its requests fail at once, and Serve replaces it."""
    played = play_with_a_kill(player, tasks, cluster, "VLLM::Worker")
    assert_nothing_lost(played, tasks)
    assert len(processes_called(cluster, "VLLM::Worker")) == 2, "one engine, two ranks, as before"
    # Serve's controller has read of the death without importing vLLM, which had made it 650 MiB.
    assert processes_called(cluster, "ray::ServeController")[0].memory_info().rss < 400 * 2**20
