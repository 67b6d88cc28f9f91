"""Puts controller, workers, engines and gateway on a running Ray, and takes them off again.

Invariant: `deploy` returns when all of it can take work, or raises LaunchError with the reason; nothing here waits
without a deadline.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import state
from cluster.config import ClusterConfig
from cluster.config_remote import remote_settings
from cluster.loading_text import loading_text
from cluster.ports import free_ports
from cluster.state import ClusterState
from rollout.access import AccessKey, AccessSettings, hash_key
from rollout.errors import RolloutError
from rollout.redaction import is_secret_name
from rollout.session_keys import REMOTE_ROLLOUTS, derived_secret

if TYPE_CHECKING:
    from actors.messages import ControllerSettings, ForeignSettings
    from deployments.app import EngineSpec
    from deployments.gateway import GatewaySpec
    from deployments.openai_server import ServingSpec
    from rollout.logs import LogSettings

CONTROLLER = "controller"
FRONT = "front"
# Calls that the controller holds at once; each trainer that waits for a batch is one.
CALLS = 4096
GATEWAY_SECONDS = 60.0
FRONT_SECONDS = 30.0
# Progress that does not come at once is not waited for.
BOARD_SECONDS = 2.0
# Serve's clean end lets engines close their sockets; what is left after it is ended by signal anyway.
SERVE_SHUTDOWN_SECONDS = 10.0

Report = Callable[[str], None]
"""Told, in a few words, what is being waited for."""


class LaunchError(RolloutError):
    """The cluster did not come up; nothing of it is left."""

    category = "launch"


def controller() -> Any:
    """The handle of the connected cluster's controller. Raises RolloutError if it is not there."""
    import ray

    try:
        return ray.get_actor(CONTROLLER)
    except ValueError:
        raise RolloutError(
            "the cluster has no controller; it may have been stopped, start it with `rollout up`"
        ) from None


def journal_path(config: ClusterConfig) -> Path:
    """Where the journal of a lasting cluster is."""
    return Path(config.journal.path or state.state_dir() / "journals" / f"{config.name}.sqlite")


def _passing_journal(cluster: ClusterState) -> str:
    return os.path.join(cluster.temp_dir or "/tmp", f"journal-{cluster.cluster_id}.sqlite")


def deploy(config: ClusterConfig, cluster: ClusterState, report: Report, lasting: bool) -> None:
    """Start everything on the connected Ray and wait until it can take work. Raises LaunchError."""
    import ray
    from ray import serve

    from actors.controller import Controller
    from actors.loading_board import OPTIONS as BOARD_OPTIONS
    from actors.loading_board import LoadingBoard
    from deployments.app import APP, build_engine_app
    from deployments.gateway import APP as GATEWAY
    from deployments.gateway import build_gateway_app
    from deployments.openai_server import ServingSpec

    started = time.monotonic()
    secret = secrets.token_bytes(32)
    journal = str(journal_path(config)) if lasting else _passing_journal(cluster)
    settings = controller_settings(config, journal, config.journal.sync and lasting, secret)
    handle = (
        ray.remote(Controller)
        .options(name=CONTROLLER, lifetime="detached", num_cpus=1, max_concurrency=CALLS, max_restarts=-1)
        .remote(settings)
    )
    # The workers load the tokenizer while the engines load the weights.
    workers = handle.spawn_workers.remote()
    report(_engines(config, 0))
    # A passing cluster has no gateway, unless a remote rollout server has to ask there for its turns.
    remote = config.environment is not None and config.environment.remote is not None
    front = config.gateway.enabled and (lasting or remote)
    internal = secrets.token_urlsafe(32)
    access = access_settings(config, secret, internal)
    board = (
        ray.remote(LoadingBoard)
        .options(**BOARD_OPTIONS, lifetime="detached", get_if_exists=True)
        .remote(config.engine.replicas)
    )
    if front:
        (port,) = free_ports(1)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        start_front(config, cluster, f"127.0.0.1:{port}")
    else:
        serve.start(proxy_location="Disabled")
    app = build_engine_app(engine_spec(config, ServingSpec("127.0.0.1", access) if front else None))
    # `serve.run` waits without a deadline and says nothing; so it waits in a thread, and we watch.
    failures: list[BaseException] = []
    threading.Thread(target=_serve_run, args=(app, APP, None, failures), daemon=True).start()
    if front:
        gateway = build_gateway_app(gateway_spec(config, access, internal))
        threading.Thread(target=_serve_run, args=(gateway, GATEWAY, "/", failures), daemon=True).start()
    _wait_for_engines(config, board, started, failures, report)
    report("connecting the session workers")
    left = max(1.0, config.engine.start_seconds - (time.monotonic() - started))
    ray.get(workers, timeout=left)
    ray.get(handle.connect.remote(), timeout=left)
    if front:
        _wait_for_gateway(gateway_address(config), failures, report)


def controller_settings(config: ClusterConfig, journal: str, sync: bool, secret: bytes) -> ControllerSettings:
    """What the controller is made of. `secret` makes the keys of captured sessions; engines have the same."""
    from actors.messages import ControllerSettings, WorkerSettings
    from deployments.app import APP, DEPLOYMENT

    return ControllerSettings(
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
            foreign=foreign_settings(config, secret),
            remote=remote_settings(config),
            logging=log_settings(config),
            tracing=config.tracing.resolve(config.name),
        ),
        num_workers=config.workers.count,
        max_attempts=config.run.max_attempts,
        max_concurrent_sessions=config.run.max_concurrent_sessions,
        start_timeout=config.engine.start_seconds,
        journal_path=journal,
        journal_sync=sync,
        run_defaults=config.run_defaults(),
        worker_env={"HF_HUB_OFFLINE": "1"} if config.model.is_local else {},
        session_secret=secret,
        cluster=config.name,
        gallery_trajectories=config.viewer.max_trajectories,
        gallery_bytes=config.viewer.max_mb * 2**20,
    )


def foreign_settings(config: ClusterConfig, secret: bytes) -> ForeignSettings | None:
    """How remote rollout servers play sessions of this cluster. None: there is no gateway that they could call."""
    from actors.messages import ForeignSettings

    if not config.gateway.enabled:
        return None
    named = None if config.environment is None else config.environment.ref().remote
    return ForeignSettings(
        address=config.gateway.public_url or gateway_address(config),
        secret=derived_secret(secret, REMOTE_ROLLOUTS),
        address_given=config.gateway.public_url is not None,
        allowed_hosts=tuple(config.remote_rollout.allowed_hosts),
        trusted=() if named is None else (named,),
    )


def log_settings(config: ClusterConfig, access: AccessSettings | None = None) -> LogSettings:
    """How a process logs, and which of the secrets that it may meet are never written."""
    servers = config.mcp_servers.values()
    given = [config.engine.env, *(server.env for server in servers), *(server.headers for server in servers)]
    values = [value for held in given for name, value in held.items() if is_secret_name(name)]
    return config.logging.resolve(config.name, (key.sha256 for key in access.keys) if access else (), values)


def access_settings(config: ClusterConfig, secret: bytes, internal: str) -> AccessSettings:
    """Who may use the cluster's HTTP, and the gateways with the key `internal`. Raises ConfigError."""
    access = replace(config.access.resolve(os.environ, config.gateway.max_body_mb), session_secret=secret)
    if not access.protected:
        return access
    own = AccessKey("gateway", hash_key(internal), frozenset({"serve"}), limited=False)
    return replace(access, keys=(*access.keys, own))


def engine_spec(config: ClusterConfig, serving: ServingSpec | None) -> EngineSpec:
    """What the engines are made of. Raises ConfigError."""
    from deployments.app import EngineSpec

    return EngineSpec(
        model=config.model.path,
        served_name=config.model.name,
        engine_kwargs=config.llm_engine_kwargs(),
        env=config.replica_env(),
        device=config.engine.device,
        replicas=config.engine.replicas,
        accelerator_type=config.engine.accelerator_type,
        warmup=config.engine.warmup,
        start_attempts=config.engine.start_attempts,
        controller=f"{config.name}/{CONTROLLER}",
        serving=serving,
        loading_board=config.name,
        logging=log_settings(config, serving.access if serving is not None else None),
    )


def start_front(config: ClusterConfig, cluster: ClusterState, gateway: str) -> None:
    """Listen at the cluster's address: HAProxy before the engines and before `gateway`. Raises LaunchError."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from actors.front import Front, make_folder
    from actors.front_config import FrontSettings

    host, port = config.gateway.host, config.gateway.port
    handle = (
        ray.remote(Front)
        .options(
            name=FRONT,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            # The address is that of this machine.
            scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
        )
        .remote(
            FrontSettings(host, port, gateway, cluster.temp_dir or make_folder(), logging=log_settings(config)),
            CONTROLLER,
        )
    )
    try:
        ray.get(handle.start.remote(), timeout=FRONT_SECONDS)
    except ray.exceptions.RayError as failure:
        raise LaunchError(str(getattr(failure, "cause", failure))) from None


def gateway_spec(config: ClusterConfig, access: AccessSettings, key: str) -> GatewaySpec:
    """What the gateways are made of. `key`: with which they come to the engines."""
    from deployments.gateway import GatewaySpec

    agents = [agent.named(name) for name, agent in config.served_agents().items()]
    return GatewaySpec(
        cluster=config.name,
        max_body_bytes=config.gateway.max_body_mb * 2**20,
        # Of the gateways alone: on the engines' ports the same path is vLLM's.
        access=replace(access, public_paths=frozenset({"/metrics"})) if config.metrics.public else access,
        engine=gateway_address(config),
        engine_key=key if access.protected else "",
        model=config.model.name,
        tokenizer=config.model.path,
        revision=config.model.revision,
        agent_loop=remote.agent_loop if (remote := remote_settings(config)) is not None else None,
        agents=tuple(agents),
        mcp_servers=dict(config.mcp_servers),
        logging=log_settings(config, access),
    )


def gateway_address(config: ClusterConfig) -> str:
    """The URL at which the gateway listens, as seen from this machine."""
    host = "127.0.0.1" if config.gateway.host == "0.0.0.0" else config.gateway.host
    return f"http://{host}:{config.gateway.port}"


def exposure_notice(config: ClusterConfig) -> str:
    """What to tell who starts this cluster of its open address; empty where it has keys, or there is no address."""
    from deployments.gateway import open_notice

    return "" if config.access.protected or not config.gateway.enabled else open_notice(gateway_address(config))


def _wait_for_gateway(address: str, failures: list[BaseException], report: Report) -> None:
    import httpx

    report("waiting for the gateway")
    deadline = time.monotonic() + GATEWAY_SECONDS
    while True:
        if failures:
            raise LaunchError(f"the gateway failed to start: {failures[0]}")
        try:
            if httpx.get(f"{address}/ready", timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise LaunchError(
                f"the gateway does not answer at {address} within {GATEWAY_SECONDS:g} s; is the port taken? "
                "Choose another with gateway.port"
            )
        time.sleep(0.2)


def _serve_run(app: Any, name: str, prefix: str | None, failures: list[BaseException]) -> None:
    from ray import serve

    try:
        serve.run(app, name=name, route_prefix=prefix)
    except BaseException as failure:
        failures.append(failure)


def _wait_for_engines(
    config: ClusterConfig, board: Any, started: float, failures: list[BaseException], report: Report
) -> None:
    import ray
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
        try:
            far = loading_text(ray.get(board.snapshot.remote(), timeout=BOARD_SECONDS).events)
        except ray.exceptions.RayError:
            far = ""
        report(f"{_engines(config, running)} {far}".rstrip())
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


def undeploy() -> None:
    """Take everything off the connected Ray."""
    import ray
    from ray import serve

    from actors.loading_board import BOARD_NAME
    from deployments.app import APP
    from deployments.gateway import APP as GATEWAY

    try:
        handle = controller()
        ray.get(handle.stop.remote(), timeout=SERVE_SHUTDOWN_SECONDS)
        ray.kill(handle)
    except (RolloutError, ray.exceptions.RayError):
        pass
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(BOARD_NAME))
    try:
        front = ray.get_actor(FRONT)
        ray.get(front.stop.remote(), timeout=SERVE_SHUTDOWN_SECONDS)
        ray.kill(front)
    except (ValueError, ray.exceptions.RayError):
        pass
    serve.delete(APP)
    serve.delete(GATEWAY)
