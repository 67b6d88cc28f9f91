"""Streaming chat through a cluster's address against vLLM's own OpenAI server, on the same model in the same run.

Both are up at once and asked in turn, as the machine drifts. Before each round both rest: for a second after its last
request a rank looks for the next one without pause, and would take a core from the other. The client is one process
for both, and takes its share of the cores from either.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil

from benchmarks.cpu import server_at, spent
from benchmarks.peers.vllm_server import MAX_MODEL_LEN, MAX_NUM_SEQS, free_port, vllm_server

TOKENS = 64
# vLLM's ranks sleep a second after the last message (busy_loop_s in shm_broadcast).
REST_S = 3.0
# Requests of a round, in waves of the concurrency.
WAVES = {1: 12, 16: 6, 64: 4}
PROMPT = "Tell me about the numbers from {} on."


@dataclass
class Point:
    """One round."""

    tokens_per_s: float
    ttft_ms: float
    """Median time until the first chunk with text."""
    cpu_us: dict[str, float]
    """CPU microseconds for each token, by role (benchmarks.cpu)."""


@dataclass(frozen=True)
class Asked:
    """One of the two."""

    address: str
    processes: list[psutil.Process]


def measure(model: Path, *, tensor_parallel_size: int, concurrency: tuple[int, ...], rounds: int) -> dict[int, Any]:
    """Medians over rounds, by concurrency: both servers' points, and the ratios ours / vLLM's."""
    with ExitStack() as stack:
        log_file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "vllm.log"
        server = vllm_server(model, tensor_parallel_size=tensor_parallel_size, log_file=log_file)
        address = stack.enter_context(server)
        both = {"vllm": Asked(address, server_at(urlsplit(address).port or 0))}
        both["ours"] = stack.enter_context(_cluster(model, tensor_parallel_size))
        return {concurrent: _compare(both, concurrent, rounds) for concurrent in concurrency}


def _compare(both: dict[str, Asked], concurrent: int, rounds: int) -> dict[str, float]:
    points: dict[str, list[Point]] = {"vllm": [], "ours": []}
    for number in range(rounds + 1):
        for name, asked in both.items():
            time.sleep(REST_S)
            point = asyncio.run(_round(asked, concurrent, number))
            if number:  # the first round warms both up
                points[name].append(point)
    pairs = list(zip(points["ours"], points["vllm"], strict=True))
    return {
        "tokens": statistics.median(ours.tokens_per_s / vllm.tokens_per_s for ours, vllm in pairs),
        "ttft": statistics.median(ours.ttft_ms / vllm.ttft_ms for ours, vllm in pairs),
        **{
            f"{name}_{field}": statistics.median(getattr(point, field) for point in of)
            for name, of in points.items()
            for field in ("tokens_per_s", "ttft_ms")
        },
        **{
            f"{name}_cpu_us_{role}": statistics.median(point.cpu_us.get(role, 0.0) for point in of)
            for name, of in points.items()
            for role in sorted(set().union(*(point.cpu_us for point in of)))
        },
    }


async def _round(asked: Asked, concurrent: int, number: int) -> Point:
    address, total = asked.address, WAVES[concurrent] * concurrent
    connector = aiohttp.TCPConnector(limit=concurrent)
    async with aiohttp.ClientSession(connector=connector) as http:
        model = (await (await http.get(f"{address}/v1/models")).json())["data"][0]["id"]
        waiting = iter(range(total))
        first: list[float] = []

        async def client() -> None:
            first.extend([await _stream(http, address, model, f"{number}-{index}") for index in waiting])

        before, started = spent(asked.processes), time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrent)))
        seconds, after = time.perf_counter() - started, spent(asked.processes)
    tokens = total * TOKENS
    cpu_us = {role: 1e6 * (after[role] - before[role]) / tokens for role in after}
    return Point(tokens / seconds, 1000 * statistics.median(first), cpu_us)


async def _stream(http: aiohttp.ClientSession, address: str, model: str, label: str) -> float:
    """One request. Returns the seconds until its first text; raises where the stream is not whole."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT.format(label)}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": TOKENS,
        "min_tokens": TOKENS,
        "ignore_eos": True,
    }
    started = time.perf_counter()
    first, last = None, b""
    async with http.post(f"{address}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{address} answered {response.status}: {await response.text()}")
        lines = 0
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            lines += 1
            # The first event carries the role alone.
            if first is None and lines > 1:
                first = time.perf_counter() - started
            if not line.startswith(b"data: [DONE]"):
                last = line
    usage = json.loads(last[6:])["usage"]
    if first is None or usage["completion_tokens"] != TOKENS:
        raise RuntimeError(f"{address} streamed {lines} events and {usage}")
    return first


@contextmanager
def _cluster(model: Path, tensor_parallel_size: int) -> Iterator[Asked]:
    """A cluster with the engine arguments of vLLM's server."""
    from cluster import launch, state
    from cluster.config import OMP_BINDING, ClusterConfig

    bound = os.environ.get(OMP_BINDING)
    config = ClusterConfig.model_validate(
        {
            "name": f"bench-serving-{os.getpid()}",
            "model": {"path": str(model.resolve())},
            "engine": {
                "device": "cpu",
                "env": {OMP_BINDING: bound} if bound else {},
                "vllm": {
                    "tensor_parallel_size": tensor_parallel_size,
                    "max_model_len": MAX_MODEL_LEN,
                    "max_num_seqs": MAX_NUM_SEQS,
                },
            },
            "workers": {"sessions": 1},
            "gateway": {"port": free_port()},
        }
    )
    cluster = launch.up(config, "")
    try:
        yield Asked(cluster.gateway, list(state.processes(cluster)))
    finally:
        launch.down(cluster, forget=True)
