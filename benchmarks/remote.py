"""Remote rollouts against the same sessions run locally: rollouts a second, and how long one takes.

Both roles of the cluster. As the trainer: the example's rollout server plays (`A`, `B`), a process of its own on the
same cores, so what it needs is taken from the engine as it would not be elsewhere. As the rollout server: a run whose
rollouts the cluster's own one plays (`served_A`, `served_B`), so that each is posted to /rollout or /v1/rollout/init
and asks over HTTP for every turn. All have the same tasks, the same tools and the same engine, and all start at once.
"""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.vllm_server import free_port

ROOT = Path(__file__).resolve().parent.parent
CONCURRENT = 256
GROUP = 8
# An only remote run may have 95 % of the sessions that a worker plays (see actors.scheduler).
SESSIONS = 288
GENERATIONS = ("A", "B")
START_SECONDS = 60.0


def measure(model: Path, *, tensor_parallel_size: int, rounds: int) -> dict[str, float]:
    """`remote_rollouts_per_s_X` and `remote_latency_ms_{p50,p99}_X`, X of local, A, B, served_A and served_B; and
    `remote_vs_local_X`, the ratio of the rollouts a second."""
    with _cluster(model, tensor_parallel_size) as address, _server(model) as server:
        return _compare(address, server, rounds)


def _compare(address: str, server: str, rounds: int) -> dict[str, float]:
    scorer = "examples.calculator.environment:Calculator"
    environments = {"local": {"path": scorer}}
    for prefix, remote in (("", server), ("served_", address)):
        environments |= {f"{prefix}{g}": {"remote": remote, "generation": g, "path": scorer} for g in GENERATIONS}
    points: dict[str, list[dict[str, float]]] = {name: [] for name in environments}
    for number in range(rounds + 1):
        for name, environment in environments.items():
            point = _round(address, environment)
            if number:  # the first round warms up
                points[name].append(point)
    found: dict[str, float] = {}
    for name, of in points.items():
        for key in of[0]:
            found[f"remote_{key}_{name}"] = float(np.median([point[key] for point in of]))
    for name in environments.keys() - {"local"}:
        ratios = [
            remote["rollouts_per_s"] / local["rollouts_per_s"]
            for remote, local in zip(points[name], points["local"], strict=True)
        ]
        found[f"remote_vs_local_{name}"] = float(np.median(ratios))
    return found


def _round(address: str, environment: dict[str, Any]) -> dict[str, float]:
    from examples.calculator.conversations import SYSTEM_PROMPT
    from rollout import Batch, RolloutClient, read_tasks

    tasks = read_tasks(ROOT / "examples" / "calculator" / "tasks.jsonl")[: CONCURRENT // GROUP]
    if "remote" in environment:
        # The system prompt is the environment's own when it plays here; a rollout server gets it with the task.
        system = {"role": "system", "content": SYSTEM_PROMPT}
        tasks = [task.model_copy(update={"messages": [system, *task.messages]}) for task in tasks]
    with RolloutClient(address) as client:
        run = client.create_run(environment=environment, group_size=GROUP).run
        started = time.perf_counter()
        client.submit(run, tasks)
        seconds: list[float] = []
        while isinstance(batch := client.lease(run, len(tasks), timeout=300), Batch):
            taken = time.perf_counter() - started
            for row in batch.table.select(["stop_reason", "error", "timing"]).to_pylist():
                if row["stop_reason"] in ("error", "cancelled"):
                    raise RuntimeError(f"a rollout failed: {row['error']}")
                seconds.append(row["timing"]["total_s"])
            client.acknowledge(batch)
        client.forget(run)
    if len(seconds) != CONCURRENT:
        raise RuntimeError(f"{len(seconds)} rollouts came back, {CONCURRENT} were asked for")
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    return {
        "rollouts_per_s": len(seconds) / taken,
        "latency_ms_p50": 1000 * float(p50),
        "latency_ms_p99": 1000 * float(p99),
    }


@contextmanager
def _server(model: Path) -> Iterator[str]:
    port = free_port()
    command = [
        *(sys.executable, str(ROOT / "examples" / "remote_rollout" / "server.py")),
        *("--port", str(port), "--tokenizer", str(model), "--max-running", str(2 * CONCURRENT)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if time.monotonic() > until or process.poll() is not None:
                    raise RuntimeError("the example's rollout server did not start") from None
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def _cluster(model: Path, tensor_parallel_size: int) -> Iterator[str]:
    from cluster import launch
    from cluster.config import ClusterConfig

    config = ClusterConfig.model_validate(
        {
            "name": "bench-remote",
            "model": {"path": str(model.resolve())},
            "engine": {
                "device": "cpu",
                "vllm": {"tensor_parallel_size": tensor_parallel_size, "max_model_len": 2048, "max_num_seqs": 256},
            },
            "workers": {"sessions": SESSIONS},
            "remote_rollout": {"enabled": True, "max_concurrent": CONCURRENT},
            "sampling": {"max_tokens": 128},
            "environment": {"path": "examples.calculator.environment:Calculator"},
            "pythonpath": [str(ROOT)],
            "gateway": {"port": free_port()},
        }
    )
    cluster = launch.up(config, "")
    try:
        yield cluster.gateway
    finally:
        launch.down(cluster, forget=True)
