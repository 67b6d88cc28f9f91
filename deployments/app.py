"""Builds the Serve application of the engines.

Invariant: CPU and GPU differ only in the values that come in here; the code path is one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.lane_router import LaneRouter
from deployments.openai_server import DRAIN_SECONDS, ServingSpec
from rollout.logs import LogSettings

APP = "engine"
DEPLOYMENT = "engine"
# What vLLM mixes into its workers; by name, as it is imported in their processes.
RANK_WEIGHTS = "deployments.rank_weights.RankWeights"

# Serve's defaults (10 s) leave a dead engine listed for up to 40 s; these find it within about 10.
HEALTH_CHECK_PERIOD_S = 3.0
HEALTH_CHECK_TIMEOUT_S = 15.0
# A replica that is told to stop waits for its lanes, which Serve looks at every two seconds, and then for streams of
# HTTP (RolloutEngine.__del__). Lanes never end by themselves: workers close them when Serve lists the replica no
# more, but that of a worker that has died may stay, and would hold the replica for all of this time.
GRACEFUL_SHUTDOWN_S = DRAIN_SECONDS + 5.0
# A wrong model or argument fails every time; Serve's default would try 20 times before it says so.
START_ATTEMPTS = 2


@dataclass(frozen=True)
class EngineSpec:
    """What an engine deployment is made of."""

    model: str
    """Directory or hub name."""
    served_name: str
    engine_kwargs: Mapping[str, Any]
    """vLLM's engine arguments."""
    env: Mapping[str, str]
    """Environment of the replica and of its workers."""
    device: str
    """"cpu" or "gpu"."""
    replicas: int = 1
    accelerator_type: str | None = None
    warmup: bool = True
    start_attempts: int = START_ATTEMPTS
    """Failed starts for each replica, before the deployment counts as failed."""
    controller: str | None = None
    """"namespace/name" of the actor that starting replicas ask for the current weights; None: those of the model."""
    serving: ServingSpec | None = None
    """How each replica serves OpenAI's protocol, on a port of its own; None: not at all."""
    loading_board: str | None = None
    """Ray namespace of the loading board that replicas report to; None: they report nothing."""
    logging: LogSettings | None = None
    """None: as Python, Serve and vLLM do it."""


def build_engine_app(spec: EngineSpec, engine_cls: type | None = None) -> Any:
    """The engine application, for `serve.run(app, name=APP)`. Needs a running Ray. Raises what LLMConfig raises.

    `engine_cls`: a subclass of RolloutEngine in its place.
    """
    from ray.serve.llm import LLMConfig, build_llm_deployment

    from deployments.engine import RolloutEngine

    config = LLMConfig(
        model_loading_config={"model_id": spec.served_name, "model_source": spec.model},
        engine_kwargs={**spec.engine_kwargs, "worker_extension_cls": RANK_WEIGHTS},
        runtime_env={"env_vars": dict(spec.env)},
        accelerator_config={"kind": spec.device},
        accelerator_type=spec.accelerator_type,
        placement_group_config=_placement(spec),
        callback_config=(
            {"callback_class": "deployments.local_model.LocalModel"} if os.path.isdir(spec.model) else {}
        ),
        deployment_config={
            "num_replicas": spec.replicas,
            "health_check_period_s": HEALTH_CHECK_PERIOD_S,
            "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
            "graceful_shutdown_timeout_s": GRACEFUL_SHUTDOWN_S,
            "request_router_config": {"request_router_class": f"{LaneRouter.__module__}.{LaneRouter.__qualname__}"},
        },
    )
    return build_llm_deployment(
        config,
        deployment_cls=engine_cls or RolloutEngine,
        bind_kwargs={
            "warmup": spec.warmup,
            "controller": spec.controller,
            "serving": spec.serving,
            "loading_board": spec.loading_board,
            "log_settings": spec.logging,
        },
        override_serve_options={"name": DEPLOYMENT, "max_constructor_retry_count": _failures_allowed(spec)},
    )


def _failures_allowed(spec: EngineSpec) -> int:
    """Failed starts, of all replicas together, until Serve gives the deployment up.

    Serve counts them until the first replica runs, and takes the smaller of this and three for each replica. It must
    grow with their number: two bad nodes are no reason to end the start of a hundred engines.
    """
    return spec.start_attempts * spec.replicas


def _placement(spec: EngineSpec) -> dict[str, Any] | None:
    """All ranks of one tensor-parallel group on one node; over several nodes where pipelines ask for it.

    Ray's default would spread them if it had to, and tensor parallelism over a network is the slow kind.
    """
    if spec.device != "gpu" or int(spec.engine_kwargs.get("pipeline_parallel_size", 1)) > 1:
        return None
    return {"bundle_per_worker": {"GPU": 1, "CPU": 1}, "strategy": "STRICT_PACK"}
