"""Starts and stops a cluster: Ray, the engines on Serve, the controller and its session workers.

Invariant: `up` either leaves a cluster that is ready, or nothing; `down` ends what `up` started and nothing else
on the machine. Every step has a deadline and says what it waits for.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from cluster import state
from cluster.config import ClusterConfig
from cluster.deploy import LaunchError, Report, deploy, gateway_address, journal_path, undeploy
from cluster.logs import default_directory
from cluster.ports import free_ports
from cluster.ray_auth import use_token
from cluster.state import ClusterState
from rollout.errors import RolloutError
from rollout.logs import DIRECTORY_VARIABLE

RAY_START_SECONDS = 60.0
# How often Ray's processes hand on their record of every actor call; 0: there is none. With it, under half an hour of
# load, Ray's GCS grew by 400 MiB an hour; without it, by 1.
TASK_EVENTS = "RAY_task_events_report_interval_ms"
# Seconds between two looks of Serve's controller at its replicas. At Serve's own 0.1 it takes 10 % of a core, and
# Ray's GCS 6 % more, of a machine whose engine has two.
SERVE_LOOP, SERVE_LOOP_S = "RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.3"


def up(
    config: ClusterConfig,
    config_path: Path | str,
    report: Report = lambda _: None,
    verify: Callable[[], object] | None = None,
    *,
    lasting: bool = True,
) -> ClusterState:
    """Start a cluster and wait until it is ready. Raises LaunchError (with the end of the log) or RolloutError.

    `verify` runs while Ray starts, before anything else is started; what it raises ends the start. Checking the
    engine's arguments belongs there: it imports vLLM, which takes as long as Ray. A cluster that is not `lasting`
    keeps its journal among its temporary files: nobody comes back for its runs.
    """
    if (existing := state.load(config.name)) is not None:
        if is_alive(existing):
            raise RolloutError(f"cluster {config.name!r} is already up; stop it with `rollout down {config.name}`")
        down(existing)
    cluster = _start_ray(config, config_path, report)
    try:
        if verify is not None:
            report("checking the engine's arguments")
            verify()
        _wait_for_ray(cluster, report)
        with connected(cluster, patience=RAY_START_SECONDS):
            cluster = _with_address(cluster)
            deploy(config, cluster, report, lasting)
    except BaseException as failure:
        tail = log_tail(cluster)
        report("cleaning up")
        down(cluster)
        if not isinstance(failure, Exception):
            raise
        if isinstance(failure, RolloutError) and not isinstance(failure, LaunchError):
            raise
        raise LaunchError(f"{_first_cause(failure)}{tail}") from failure
    if lasting:
        address = gateway_address(config) if config.gateway.enabled else ""
        cluster = replace(cluster, gateway=address, journal=str(journal_path(config)))
    state.save(cluster)
    return cluster


def down(cluster: ClusterState, report: Report = lambda _: None, *, forget: bool = False) -> int:
    """Stop a cluster, dead or alive. Returns the number of processes that were ended.

    Its journal stays, and the next `up` goes on with its runs, unless `forget`.
    """
    ended = 0
    if cluster.owns_ray:
        report("ending its processes")
        ended = state.end_processes(cluster, lambda n: report(f"{n} processes are ending"))
        if cluster.temp_dir:
            shutil.rmtree(cluster.temp_dir, ignore_errors=True)
    elif is_alive(cluster):
        report("stopping the controller and the engines")
        with connected(cluster):
            undeploy()
    if forget and cluster.journal:
        for suffix in ("", "-wal", "-shm"):
            Path(cluster.journal + suffix).unlink(missing_ok=True)
    state.remove(cluster.name)
    return ended


@contextmanager
def ray_node(config: ClusterConfig, report: Report = lambda _: None) -> Iterator[ClusterState]:
    """A local Ray without engines or controller, for the length of the block (benchmarks deploy their own)."""
    cluster = _start_ray(config, "", report)
    try:
        _wait_for_ray(cluster, report)
        yield cluster
    finally:
        down(cluster)


def is_alive(cluster: ClusterState) -> bool:
    """Whether a cluster's Ray answers."""
    host, _, port = cluster.address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1.0):
            return True
    except (OSError, ValueError):
        return False


@contextmanager
def connected(cluster: ClusterState, patience: float = 0.0) -> Iterator[None]:
    """This process as a driver of the cluster's Ray, for the length of the block.

    `patience`: seconds to try again, as Ray's port opens before its node can be joined. Raises RolloutError.
    """
    if cluster.owns_ray:
        use_token()
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    deadline = time.monotonic() + patience
    while True:
        try:
            ray.init(
                address=cluster.address,
                namespace=cluster.name,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
            )
            break
        except (ConnectionError, RuntimeError) as failure:
            ray.shutdown()
            if time.monotonic() > deadline:
                raise RolloutError(f"Ray at {cluster.address} cannot be joined: {failure}") from failure
            time.sleep(0.5)
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray(config: ClusterConfig, config_path: Path | str, report: Report) -> ClusterState:
    cluster_id = uuid.uuid4().hex
    path = str(Path(config_path).resolve())
    if config.ray.address is not None:
        logs = config.logging.directory or ""
        return ClusterState(
            config.name, cluster_id, config.ray.address, path, "", "", time.time(), logs=logs, owns_ray=False
        )
    report("starting Ray")
    use_token()
    # Short: Ray puts sockets below it, whose paths may not exceed 107 characters.
    temp_dir = tempfile.mkdtemp(prefix="rollout-", dir="/tmp")
    log_file = os.path.join(temp_dir, "ray.log")
    port, client_port, agent_port, free_port = free_ports(4)
    metrics_port = config.metrics.ray_port or free_port
    command = [
        os.path.join(os.path.dirname(sys.executable), "ray"),
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        f"--ray-client-server-port={client_port}",
        f"--dashboard-agent-listen-port={agent_port}",
        f"--metrics-export-port={metrics_port}",
        "--include-dashboard=false",
        "--disable-usage-stats",
        f"--num-cpus={config.ray.logical_cpus}",
        f"--object-store-memory={config.ray.object_store_memory_mb * 2**20}",
        f"--temp-dir={temp_dir}",
    ]
    with open(log_file, "wb") as log:
        # A session of its own, so that Ctrl-C at the terminal reaches this command and not the cluster.
        leader = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_node_environment(config, cluster_id),
            start_new_session=True,
        )
    cluster = ClusterState(
        name=config.name,
        cluster_id=cluster_id,
        address=f"127.0.0.1:{port}",
        config_path=path,
        temp_dir=temp_dir,
        log_file=log_file,
        started_at=time.time(),
        session_id=leader.pid,
        session_started=psutil.Process(leader.pid).create_time(),
        ray_metrics=f"http://127.0.0.1:{metrics_port}/metrics",
        logs=config.logging.directory or str(default_directory(config.name)),
    )
    return cluster


def _with_address(cluster: ClusterState) -> ClusterState:
    """With the connected Ray's own address for words such as `auto`, which may lead elsewhere tomorrow."""
    import ray

    if cluster.owns_ray or ":" in cluster.address:
        return cluster
    return replace(cluster, address=ray.get_runtime_context().gcs_address)


def _wait_for_ray(cluster: ClusterState, report: Report) -> None:
    report("starting Ray")
    deadline = time.monotonic() + RAY_START_SECONDS
    while cluster.owns_ray and not is_alive(cluster):
        if not any(state.processes(cluster)):
            raise LaunchError("Ray ended at its start")
        if time.monotonic() > deadline:
            raise LaunchError(f"Ray did not start within {RAY_START_SECONDS:g} s")
        time.sleep(0.1)


def _node_environment(config: ClusterConfig, cluster_id: str) -> dict[str, str]:
    """The environment that every process of the cluster inherits."""
    home = str(Path(__file__).resolve().parent.parent)
    path = [home, *config.pythonpath, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        state.ID_VARIABLE: cluster_id,
        DIRECTORY_VARIABLE: str(default_directory(config.name)),
        "PYTHONPATH": os.pathsep.join(path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        TASK_EVENTS: os.environ.get(TASK_EVENTS, "0"),
        SERVE_LOOP: os.environ.get(SERVE_LOOP, SERVE_LOOP_S),
        # Not the number of cores, which Ray would set from a task's CPU share.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def log_tail(cluster: ClusterState, lines: int = 15) -> str:
    """The end of Ray's start log, and of the newest replica's, for an error message."""
    if not cluster.temp_dir:
        return ""
    texts = []
    replicas = sorted(
        Path(cluster.temp_dir).glob("session_*/logs/serve/replica_*.log"), key=lambda path: path.stat().st_mtime
    )
    for path in [Path(cluster.log_file), *replicas[-1:]]:
        try:
            tail = path.read_text(errors="replace").strip().splitlines()[-lines:]
        except OSError:
            continue
        if tail:
            texts.append(f"\n--- the end of {path.name} ---\n" + "\n".join(tail))
    return "".join(texts)


def _first_cause(failure: BaseException) -> str:
    text = str(failure).strip()
    if isinstance(failure, LaunchError) and text:
        return text
    return text.splitlines()[-1] if text else type(failure).__name__
