"""Megabytes per second of a batch on its way to the trainer: over HTTP and over Ray, against plain pickle and JSON.

The whole way is measured, from the client's call to a table in its hands: gateway and Serve's proxy are real; in
place of the controller is a stand-in that holds one batch, as it is the delivery that is measured.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from benchmarks.journal import GROUP, _task, _trajectory
from rollout.access import AccessSettings
from rollout.record import to_table
from rollout.trajectory import SessionKey

# Trajectories of the batch: about 35 MB.
TRAJECTORIES = 2_048
ROUNDS = 7


def make_batch() -> pa.Table:
    """A batch of 1,000-token trajectories."""
    from actors.scheduler import Assignment

    made = []
    for number in range(TRAJECTORIES):
        task = _task(number // GROUP)
        key = SessionKey("r", task.task_id, f"r/{task.task_id}", number % GROUP)
        made.append(_trajectory(Assignment(key, task, 1)))
    return to_table(made).combine_chunks()


class OneBatch:
    """A STAND-IN for the controller that gives out one batch again and again."""

    def __init__(self) -> None:
        self._table = make_batch()

    async def fetch(self, lease_id: str) -> Any:
        """The batch."""
        from rollout.api import Batch

        return Batch(lease_id, "r", self._table, [], 600.0, 0)

    async def weights(self) -> dict[str, Any]:
        """For the gateway's /ready."""
        return {"version": 0, "replicas": {"engine": {"health": "healthy", "version": 0, "reason": None}}}


def measure(port: int = 8_955) -> dict[str, float]:
    """MB/s (10⁶ bytes of Arrow data) of each way."""
    import ray
    from ray import serve

    from actors.ray_backend import CONTROLLER, RayBackend
    from cluster import launch
    from cluster.config import ClusterConfig
    from deployments.gateway import APP, GatewaySpec, build_gateway_app
    from rollout.http_backend import HttpBackend

    config = ClusterConfig.model_validate(
        {"name": "bench-delivery", "model": {"path": "none"}, "ray": {"object_store_memory_mb": 1024}}
    )
    table = make_batch()
    size = table.nbytes / 1e6
    found = {
        "batch_mb": size,
        "pickle": size / _median(lambda: pickle.loads(pickle.dumps(table.to_pylist()))),
        "json": size / _median(lambda: json.loads(json.dumps(table.to_pylist()))),
    }
    with launch.ray_node(config) as node, launch.connected(node, patience=launch.RAY_START_SECONDS):
        controller = ray.remote(OneBatch).options(name=CONTROLLER, lifetime="detached").remote()
        ray.get(controller.weights.remote())
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_gateway_app(GatewaySpec(config.name, 2**20, AccessSettings())), name=APP, route_prefix="/")
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()

        def fetch(backend: Any) -> None:
            batch = asyncio.run_coroutine_threadsafe(backend.fetch("x"), loop).result(120)
            assert batch.table.num_rows == TRAJECTORIES

        for name, backend in (("ray", RayBackend()), ("http", HttpBackend(f"http://127.0.0.1:{port}"))):
            found[name] = size / _median(lambda backend=backend: fetch(backend))
        loop.call_soon_threadsafe(loop.stop)
    return found


def _median(work: Callable[[], Any]) -> float:
    work()
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
