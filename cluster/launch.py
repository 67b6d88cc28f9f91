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
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster import state
from cluster.config import ClusterConfig
from cluster.ray_auth import use_token
from cluster.state import ClusterState
from rollout.errors import RolloutError

CONTROLLER = "controller"
RAY_START_SECONDS = 60.0
# Serve's clean end lets engines close their sockets; what is left after it is ended by signal anyway.
SERVE_SHUTDOWN_SECONDS = 10.0

Report = Callable[[str], None]
"""Told, in a few words, what is being waited for."""


class LaunchError(RolloutError):
    """The cluster did not come up; nothing of it is left."""

    category = "launch"


def up(
    config: ClusterConfig,
    config_path: Path | str,
    report: Report = lambda _: None,
    verify: Callable[[], object] | None = None,
) -> ClusterState:
    """Start a cluster and wait until it is ready. Raises LaunchError (with the end of the log) or RolloutError.

    `verify` runs while Ray starts, before anything else is started; what it raises ends the start. Checking the
    engine's arguments belongs there: it imports vLLM, which takes as long as Ray.
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
            _deploy(config, report)
    except BaseException as failure:
        tail = log_tail(cluster)
        report("cleaning up")
        down(cluster)
        if not isinstance(failure, Exception):
            raise
        if isinstance(failure, RolloutError) and not isinstance(failure, LaunchError):
            raise
        raise LaunchError(f"{_first_cause(failure)}{tail}") from failure
    state.save(cluster)
    return cluster


def down(cluster: ClusterState, report: Report = lambda _: None) -> int:
    """Stop a cluster, dead or alive, and forget it. Returns the number of processes that were ended."""
    ended = 0
    if cluster.owns_ray:
        report("ending its processes")
        ended = state.end_processes(cluster, lambda n: report(f"{n} processes are ending"))
        if cluster.temp_dir:
            shutil.rmtree(cluster.temp_dir, ignore_errors=True)
    elif is_alive(cluster):
        report("stopping the controller and the engines")
        with connected(cluster):
            _undeploy()
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


def controller() -> Any:
    """The handle of the connected cluster's controller. Raises RolloutError if it is not there."""
    import ray

    try:
        return ray.get_actor(CONTROLLER)
    except ValueError:
        raise RolloutError(
            "the cluster has no controller; it may have been stopped, start it with `rollout up`"
        ) from None


def _start_ray(config: ClusterConfig, config_path: Path | str, report: Report) -> ClusterState:
    cluster_id = uuid.uuid4().hex
    path = str(Path(config_path).resolve())
    if config.ray.address is not None:
        return ClusterState(config.name, cluster_id, config.ray.address, path, "", "", time.time(), owns_ray=False)
    report("starting Ray")
    use_token()
    # Short: Ray puts sockets below it, whose paths may not exceed 107 characters.
    temp_dir = tempfile.mkdtemp(prefix="rollout-", dir="/tmp")
    log_file = os.path.join(temp_dir, "ray.log")
    port, client_port, agent_port = _free_ports(3)
    command = [
        os.path.join(os.path.dirname(sys.executable), "ray"),
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        f"--ray-client-server-port={client_port}",
        f"--dashboard-agent-listen-port={agent_port}",
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
    )
    return cluster


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
        "PYTHONPATH": os.pathsep.join(path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        # Not the number of cores, which Ray would set from a task's CPU share.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _deploy(config: ClusterConfig, report: Report) -> None:
    import ray
    from ray import serve

    from actors.controller import Controller
    from actors.messages import ControllerSettings, WorkerSettings
    from deployments.app import APP, DEPLOYMENT, EngineSpec, build_engine_app

    started = time.monotonic()
    settings = ControllerSettings(
        worker=WorkerSettings(
            model=config.model.path,
            revision=config.model.revision,
            renderer=config.model.renderer,
            renderer_options=config.model.renderer_options,
            app=APP,
            deployment=DEPLOYMENT,
            sticky_margin=config.engine.sticky_margin,
            mcp_servers=dict(config.mcp_servers),
            max_sessions=config.workers.sessions,
        ),
        num_workers=config.workers.count,
        max_attempts=config.run.max_attempts,
        max_concurrent_sessions=config.run.max_concurrent_sessions,
        start_timeout=config.engine.start_seconds,
        worker_env={"HF_HUB_OFFLINE": "1"} if config.model.is_local else {},
    )
    handle = (
        ray.remote(Controller)
        .options(name=CONTROLLER, lifetime="detached", num_cpus=1, max_concurrency=1000)
        .remote(settings)
    )
    # The workers load the tokenizer while the engines load the weights.
    workers = handle.spawn_workers.remote()
    report(_engines(config, 0))
    serve.start(proxy_location="Disabled")
    app = build_engine_app(
        EngineSpec(
            model=config.model.path,
            served_name=config.model.name,
            engine_kwargs=config.llm_engine_kwargs(),
            env=config.replica_env(),
            device=config.engine.device,
            replicas=config.engine.replicas,
            accelerator_type=config.engine.accelerator_type,
            warmup=config.engine.warmup,
        )
    )
    # `serve.run` waits without a deadline and says nothing; so it waits in a thread, and we watch.
    failures: list[BaseException] = []
    threading.Thread(target=_serve_run, args=(app, failures), daemon=True).start()
    _wait_for_engines(config, started, failures, report)
    report("connecting the session workers")
    left = max(1.0, config.engine.start_seconds - (time.monotonic() - started))
    ray.get(workers, timeout=left)
    ray.get(handle.connect.remote(), timeout=left)


def _serve_run(app: Any, failures: list[BaseException]) -> None:
    from ray import serve

    from deployments.app import APP

    try:
        serve.run(app, name=APP, route_prefix=None)
    except BaseException as failure:
        failures.append(failure)


def _wait_for_engines(config: ClusterConfig, started: float, failures: list[BaseException], report: Report) -> None:
    from ray import serve

    from deployments.app import APP, DEPLOYMENT

    while True:
        failed = bool(failures)
        status = serve.status().applications.get(APP)
        deployment = status.deployments.get(DEPLOYMENT) if status is not None else None
        if failed:
            # Serve's exception says only that it failed; the deployment knows why.
            why = deployment.message if deployment is not None and deployment.message else failures[0]
            raise LaunchError(f"the engines failed to start: {why}")
        running = sum(n for s, n in deployment.replica_states.items() if s == "RUNNING") if deployment else 0
        report(_engines(config, running))
        if status is not None and status.status == "RUNNING" and running >= config.engine.replicas:
            return
        if status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise LaunchError(f"the engines failed to start: {status.message or (deployment and deployment.message)}")
        if time.monotonic() - started > config.engine.start_seconds:
            message = deployment.message if deployment is not None else "nothing was scheduled"
            raise LaunchError(
                f"{running} of {config.engine.replicas} engine replicas were ready within engine.start_seconds = "
                f"{config.engine.start_seconds:g}: {message}"
            )
        time.sleep(0.25)


def _engines(config: ClusterConfig, running: int) -> str:
    engine = config.engine
    return f"loading the engine (TP={engine.tensor_parallel_size}, {running}/{engine.replicas} ready)"


def _undeploy() -> None:
    import ray
    from ray import serve

    from deployments.app import APP

    try:
        handle = controller()
        ray.get(handle.stop.remote(), timeout=SERVE_SHUTDOWN_SECONDS)
        ray.kill(handle)
    except (RolloutError, ray.exceptions.RayError):
        pass
    serve.delete(APP)


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


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
