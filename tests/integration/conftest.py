"""One real cluster for all integration tests: started by `rollout up`, stopped by `rollout down`.

Real means: Ray, Serve, and a vLLM engine with tensor_parallel_size 2 on CPU. It starts once per session.
"""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors.ray_backend import RayBackend
from cluster import launch, state
from cluster.config import ClusterConfig
from cluster.config_file import load_config
from rollout import Batch, RolloutClient
from rollout.api import RunInfo
from rollout.limits import Limits
from rollout.record import SCHEMA
from rollout.sampling import Sampling
from rollout.tasks import Task, read_tasks
from tests.conftest import ROOT
from tests.integration.guarded import Guarded

CONFIG = Path(__file__).parent / "cluster.yaml"
TASKS = ROOT / "examples" / "calculator" / "tasks.jsonl"
# A start has this deadline of its own and is no part of a test's time (func_only): it takes 90 s, and 290 s were seen
# on a busy host.
UP_SECONDS = 400


def rollout(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the `rollout` command."""
    return subprocess.run(
        [sys.executable, "-m", "cluster", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="session")
def cluster() -> Iterator[state.ClusterState]:
    """A running cluster. Its end is a test of its own: nothing of it may be left."""
    up = rollout("up", CONFIG, timeout=UP_SECONDS)
    assert up.returncode == 0, up.stdout + up.stderr
    started = state.load("integration")
    assert started is not None
    yield started
    down = rollout("down", "integration")
    assert down.returncode == 0, down.stdout + down.stderr
    assert list(state.processes(started)) == []
    assert not Path(started.temp_dir).exists()
    assert state.load("integration") is None


@pytest.fixture(scope="session")
def guarded() -> Iterator[Guarded]:
    """A second cluster, with keys; its loading was followed. Ended early by those who need it running."""
    made = Guarded()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def driver(cluster: state.ClusterState) -> Iterator[None]:
    """This process as a driver of the cluster."""
    with launch.connected(cluster):
        yield


@dataclass
class Played:
    """A finished run."""

    table: pa.Table
    info: RunInfo
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)


class Player:
    """Plays runs on the cluster as a trainer inside it would."""

    def __init__(self, config: ClusterConfig, client: RolloutClient) -> None:
        self.config = config
        self.client = client

    def play(
        self,
        tasks: list[Task],
        *,
        environment: str = "examples.calculator.environment:Calculator",
        group_size: int = 4,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        meanwhile: Callable[[Any], bool] | None = None,
        timeout: float = 280,
    ) -> Played:
        """Submit, lease everything, forget. `meanwhile(info)` is called until it returns True."""
        run = self.client.create_run(
            name=f"test-{uuid.uuid4().hex[:8]}",
            environment={"path": environment},
            sampling=sampling or self.config.sampling,
            limits=limits or self.config.limits,
            group_size=group_size,
        ).run
        started = time.monotonic()
        self.client.submit(run, tasks)
        tables = []
        while True:
            batch = self.client.lease(run, 1_000, min_groups=1, timeout=0.2)
            if isinstance(batch, Batch):
                tables.append(batch.table)
                self.client.acknowledge(batch)
            info = self.client.run_info(run)
            if meanwhile is not None and meanwhile(info):
                meanwhile = None
            if info.finished:
                break
            assert time.monotonic() - started < timeout, f"stuck: {info}"
        assert meanwhile is None, "the run ended before its disturbance"
        self.client.forget(run)
        table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        return Played(table, info, time.monotonic() - started, table.to_pylist())


@pytest.fixture(scope="session")
def client(driver: None) -> Iterator[RolloutClient]:
    """A trainer inside the cluster."""
    with RolloutClient(RayBackend()) as client:
        yield client


@pytest.fixture(scope="session")
def http_client(cluster: state.ClusterState) -> Iterator[RolloutClient]:
    """A trainer outside the cluster."""
    with RolloutClient(cluster.gateway) as client:
        yield client


@pytest.fixture(scope="session")
def player(client: RolloutClient) -> Player:
    """Plays runs on the cluster."""
    return Player(load_config(CONFIG, check_engine=False), client)


@pytest.fixture(scope="session")
def tasks() -> list[Task]:
    """The calculator's tasks."""
    return read_tasks(TASKS)


@pytest.fixture(scope="session")
def address(cluster: state.ClusterState) -> str:
    """The cluster's one address."""
    return cluster.gateway


@pytest.fixture
def captured(client: RolloutClient) -> Iterator[str]:
    """A run of captured sessions, two for each task."""
    name = f"captured-{uuid.uuid4().hex[:6]}"
    run = client.create_run(name=name, environment={"path": "captured"}, group_size=2).run
    yield run
    client.forget(run)
