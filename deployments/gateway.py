"""The gateway: the cluster's HTTP address, a FastAPI application on Ray Serve.

Invariant: it holds no state. Every answer is the controller's, so any number of gateways agree, and one that dies
costs its callers a repeated call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request

from actors.ray_backend import RayBackend
from deployments.routes import batches, errors, runs, weights
from rollout.backend import Backend

APP = "gateway"
# Calls that one gateway holds at once, long polls included.
MAX_REQUESTS = 4096
# The gateway says 503 after waiting so long for a controller that is being started again; clients come back.
PATIENCE_S = 10.0


@dataclass(frozen=True)
class GatewaySpec:
    """What a gateway is made of."""

    cluster: str
    """The cluster's name, which is its controller's Ray namespace."""
    max_body_bytes: int
    replicas: int = 1


def make_app(backend: Callable[[], Backend], max_body_bytes: int) -> FastAPI:
    """The application. `backend` is called once, with the first request."""
    app = FastAPI(
        title="rollout-cluster",
        description="Tasks in, training-ready trajectories out, weights back.",
        docs_url="/docs",
        redoc_url=None,
    )
    app.state.max_body_bytes = max_body_bytes
    app.state.backend = _Lazy(backend)
    errors.install(app)
    for module in (runs, batches, weights):
        app.include_router(module.router)

    @app.get("/health", tags=["health"])
    async def health() -> dict[str, str]:
        """The gateway lives."""
        return {"status": "ok"}

    @app.get("/ready", tags=["health"])
    async def ready(request: Request) -> dict[str, Any]:
        """The whole cluster can take work; 503 otherwise."""
        state = await request.app.state.backend.weights()
        return {"status": "ready", "policy_version": state["version"], "replicas": len(state["replicas"])}

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
        return make_app(lambda: RayBackend(spec.cluster, patience=PATIENCE_S), spec.max_body_bytes)

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
