"""The gateway: the cluster's HTTP address, a FastAPI application on Ray Serve.

Invariant: it holds no state. Every answer is the controller's, so any number of gateways agree, and one that dies
costs its callers a repeated call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request

from actors.foreign_calls import ForeignCalls, RayForeignCalls
from actors.loading_board import BoardReader
from actors.ray_backend import RayBackend
from deployments import openapi
from deployments.access import install as install_access
from deployments.agents import AgentKeeper, ServedAgents, SharedTurns, make_registry
from deployments.chat_engine import HttpChatEngine
from deployments.completions import HttpCompletions
from deployments.routes import agents as agent_routes
from deployments.routes import (
    batches,
    errors,
    foreign,
    inference,
    loading,
    metrics,
    remote_rollout,
    runs,
    sessions,
    trajectories,
    ui,
    weights,
)
from deployments.token_text import TokenizerText, TokenText
from rollout import logs
from rollout.access import AccessSettings
from rollout.agents.chat_engine import ChatEngine
from rollout.agents.registry import AgentRegistry
from rollout.agents.spec import NamedAgent
from rollout.backend import Backend
from rollout.errors import UnavailableError
from rollout.inference import CompletionEngine
from rollout.logs import LogSettings
from rollout.mcp_config import McpServerConfig
from rollout.session_keys import REMOTE_ROLLOUTS, derived_secret

logger = logging.getLogger(__name__)

APP = "gateway"
# Calls that one gateway holds at once, long polls included.
MAX_REQUESTS = 4096
# The gateway says 503 after waiting so long for a controller that is being started again; clients come back.
PATIENCE_S = 10.0
# Probes have little patience, so /ready says 503 rather than nothing where the controller is silent for so long.
READY_SECONDS = 3.0


@dataclass(frozen=True)
class GatewaySpec:
    """What a gateway is made of."""

    cluster: str
    """The cluster's name, which is its controller's Ray namespace."""
    max_body_bytes: int
    access: AccessSettings
    engine: str = ""
    """Address at which agents reach the model; empty: there are no agents."""
    engine_key: str = field(default="", repr=False)
    model: str = ""
    """The model's name there."""
    agents: tuple[NamedAgent, ...] = ()
    mcp_servers: Mapping[str, McpServerConfig] = field(default_factory=dict, repr=False)
    replicas: int = 1
    agent_loop: str | None = None
    """What is played for foreign trainers; None: this cluster is no rollout server."""
    tokenizer: str = ""
    """The model's directory or hub name, for the text of tokens in the viewer; empty: it shows numbers."""
    revision: str | None = None
    """Of the tokenizer, on the hub."""
    logging: LogSettings | None = None
    """None: as Python and Serve do it."""


def make_app(
    backend: Callable[[], Backend],
    max_body_bytes: int,
    access: AccessSettings | None = None,
    board: Any = None,
    agents: AgentRegistry | None = None,
    chat: ChatEngine | None = None,
    completions: CompletionEngine | None = None,
    token_text: TokenText | None = None,
    remote: ForeignCalls | None = None,
    agent_loop: str | None = None,
    agent_keeper: AgentKeeper | None = None,
) -> FastAPI:
    """The application. `backend` is called once, with the first request.

    `access`: None: everybody may do everything. `board`: where loading is reported (routes.loading.Loading).
    `agents` speak to the model through `chat`, `/v1/inference` through `completions`.
    `agent_keeper`: holds the agents that are added; None: none can be.
    `token_text`: the text of tokens for the viewer; None: it shows numbers.
    `remote`: takes the calls of remote rollout servers; None: there are none.
    `agent_loop`: what is played for foreign trainers; None: nothing is.
    """
    access = access or AccessSettings()
    app = FastAPI(
        title="rollout-cluster",
        description="Tasks in, training-ready trajectories out, weights back.",
        docs_url="/docs",
        redoc_url=None,
    )
    app.state.max_body_bytes = max_body_bytes
    app.state.backend = _Lazy(backend)
    app.state.loading = board
    app.state.agents, app.state.chat_engine = ServedAgents(agents or AgentRegistry(), agent_keeper), chat
    app.state.completions, app.state.token_text = completions, token_text
    app.state.foreign, app.state.foreign_secret = remote, derived_secret(access.session_secret, REMOTE_ROLLOUTS)
    app.state.agent_loop = agent_loop
    errors.install(app)
    for module in (
        runs,
        batches,
        weights,
        sessions,
        loading,
        inference,
        agent_routes,
        metrics,
        trajectories,
        ui,
        foreign,
        remote_rollout,
    ):
        app.include_router(module.router)

    @app.get("/health", tags=["health"])
    async def health(request: Request) -> dict[str, Any]:
        """The gateway lives. A rollout server says so in its protocol's words."""
        if agent_loop is None:
            return {"status": "ok"}
        return await remote_rollout.health(request.app.state.backend, agent_loop)

    @app.get("/ready", tags=["health"])
    async def ready(request: Request) -> dict[str, Any]:
        """The whole cluster can take work; 503 otherwise, at once."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                state = await request.app.state.backend.weights()
        except TimeoutError:
            raise UnavailableError(f"the controller did not answer within {READY_SECONDS:g} s") from None
        replicas = state["replicas"].values()
        # One that is ahead carries what is about to become current.
        fit = [
            r
            for r in replicas
            if r["health"] != "suspect" and r["version"] is not None and r["version"] >= state["version"]
        ]
        if not fit:
            reasons = "; ".join(sorted({r["reason"] for r in replicas if r["reason"]})) or "none has answered yet"
            raise UnavailableError(f"no engine replica carries the current weights: {reasons}")
        return {"status": "ready", "policy_version": state["version"], "replicas": len(fit)}

    openapi.install(app)
    install_access(app, access)
    return app


class _Lazy:
    """A backend that is made when it is first needed: Ray imports this application before there is a controller."""

    def __init__(self, make: Callable[[], Backend]) -> None:
        self._make = make
        self._made: Backend | None = None

    def __getattr__(self, name: str) -> Any:
        if self._made is None:
            self._made = self._make()
        return getattr(self._made, name)


def build_gateway_app(spec: GatewaySpec) -> Any:
    """The Serve application, for `serve.run(app, name=APP, route_prefix="/")`."""
    from ray import serve

    def make() -> FastAPI:
        logs.install(spec.logging, APP, _replica_name())
        say_if_open(spec)
        backend: Any = _Lazy(lambda: RayBackend(spec.cluster, patience=PATIENCE_S, looks_wait=False))
        return make_app(
            lambda: backend,
            spec.max_body_bytes,
            spec.access,
            BoardReader(spec.cluster),
            make_registry(spec.agents, spec.mcp_servers, SharedTurns(backend)),
            HttpChatEngine(spec.engine, spec.model, api_key=spec.engine_key or None) if spec.engine else None,
            HttpCompletions(spec.engine, spec.model, api_key=spec.engine_key or None) if spec.engine else None,
            TokenizerText(spec.tokenizer, spec.revision) if spec.tokenizer else None,
            RayForeignCalls(spec.cluster),
            spec.agent_loop,
            backend,
        )

    @serve.deployment(
        name=APP,
        num_replicas=spec.replicas,
        max_ongoing_requests=MAX_REQUESTS,
        ray_actor_options={"num_cpus": 1},
        health_check_period_s=3.0,
        graceful_shutdown_timeout_s=5.0,
    )
    @serve.ingress(make)
    class Gateway:
        """Serves the application."""

    return Gateway.bind()  # type: ignore[attr-defined]


def open_notice(address: str) -> str:
    """What an operator has to know of an address without keys. A config whose address is not loopback has some."""
    return (
        f"{address} needs no key: other machines do not reach it, and every user and program of this machine may do "
        "everything there; access.keys closes it"
    )


def say_if_open(spec: GatewaySpec) -> None:
    """Tell the log where nobody has to say who they are."""
    if not spec.access.protected:
        logger.warning(open_notice(spec.engine or "the gateway"))


def _replica_name() -> str:
    """Serve's id of this replica; empty outside Serve."""
    from ray import serve

    try:
        return serve.get_replica_context().replica_id.unique_id
    except Exception:
        return ""
