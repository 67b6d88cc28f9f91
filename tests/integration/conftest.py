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

from cluster import launch, state
from cluster.config import ClusterConfig
from cluster.config_file import load_config
from rollout.limits import Limits
from rollout.sampling import Sampling
from rollout.tasks import Task, read_tasks
from tests.conftest import ROOT

CONFIG = Path(__file__).parent / "cluster.yaml"
TASKS = ROOT / "examples" / "calculator" / "tasks.jsonl"
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
def driver(cluster: state.ClusterState) -> Iterator[None]:
    """This process as a driver of the cluster."""
    with launch.connected(cluster):
        yield


@dataclass
class Played:
    """A finished run."""

    table: pa.Table
    progress: Any
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)


class Player:
    """Plays runs on the cluster, in this process."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config

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
        """Submit, take everything, forget. `meanwhile(progress)` is called until it returns True."""
        import ray

        from actors.messages import RunSpec

        spec = RunSpec(
            f"test-{uuid.uuid4().hex[:8]}",
            environment,
            {},
            sampling or self.config.sampling,
            limits or self.config.limits,
            group_size,
            time.time(),
        )
        controller = launch.controller()
        started = time.monotonic()
        ray.get(controller.submit.remote(spec, tasks))
        tables = []
        while True:
            delivery = ray.get(controller.take.remote(spec.run, 0.2), timeout=60)
            if delivery.table is not None:
                tables.append(delivery.table)
            if meanwhile is not None and meanwhile(delivery.progress):
                meanwhile = None
            if delivery.finished:
                break
            assert time.monotonic() - started < timeout, f"stuck: {delivery.progress}"
        assert meanwhile is None, "the run ended before its disturbance"
        ray.get(controller.forget.remote(spec.run))
        table = pa.concat_tables(tables)
        return Played(table, delivery.progress, time.monotonic() - started, table.to_pylist())


@pytest.fixture(scope="session")
def player(driver: None) -> Player:
    """Plays runs on the cluster."""
    return Player(load_config(CONFIG, check_engine=False))


@pytest.fixture(scope="session")
def tasks() -> list[Task]:
    """The calculator's tasks."""
    return read_tasks(TASKS)
