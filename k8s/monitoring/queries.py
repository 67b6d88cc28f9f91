"""What dashboards are made of, and every metric that they may ask for.

Invariant: a query names metrics of `rollout.metrics_catalogue` or of FOREIGN, and nothing else; a test reads each of
them. What cannot have data on a machine without GPUs, or before something rare has happened, is in WITHOUT_DATA with
its cause: tests/integration/test_prometheus.py wants data from everything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import promql_parser

from rollout.metrics_catalogue import CATALOGUE, series_names

# The relabelling of the PodMonitor puts the RayCluster's name there. Elsewhere there is no such label, and ".*" fits.
CLUSTER = 'ray_io_cluster=~"$cluster"'
RUN = f'{CLUSTER},run=~"$run"'

# Metrics of others, as they stand on Ray's port, by whose they are.
FOREIGN: Mapping[str, frozenset[str]] = {
    "vLLM": frozenset(
        {
            "ray_vllm_num_requests_running",
            "ray_vllm_num_requests_waiting",
            "ray_vllm_kv_cache_usage_perc",
            "ray_vllm_prefix_cache_queries_total",
            "ray_vllm_prefix_cache_hits_total",
            "ray_vllm_num_preemptions_total",
            "ray_vllm_prompt_tokens_total",
            "ray_vllm_generation_tokens_total",
            "ray_vllm_time_to_first_token_seconds_bucket",
            "ray_vllm_inter_token_latency_seconds_bucket",
            "ray_vllm_request_queue_time_seconds_bucket",
            "ray_vllm_engine_sleep_state",
        }
    ),
    "Ray Serve": frozenset(
        {
            "ray_serve_deployment_request_counter_total",
            "ray_serve_deployment_error_counter_total",
            "ray_serve_deployment_processing_latency_ms_bucket",
            "ray_serve_deployment_queued_queries",
            "ray_serve_deployment_replica_healthy",
            "ray_serve_deployment_status",
            "ray_serve_http_request_latency_ms_bucket",
            "ray_serve_num_http_requests_total",
            "ray_serve_num_http_error_requests_total",
            "ray_serve_replica_processing_queries",
        }
    ),
    "Ray": frozenset(
        {
            "ray_actors",
            "ray_node_cpu_utilization",
            "ray_node_mem_used_host",
            "ray_node_mem_total_host",
            "ray_node_gpus_utilization",
            "ray_node_gram_used",
            "ray_object_store_memory",
        }
    ),
}

NEEDS_GPU = "needs a GPU"
RARE = "not there before the first such event; the panel falls back to 0"
REMOTE = "a quantile of nothing, where no run is played by a remote rollout server"
WITHOUT_DATA: Mapping[str, str] = {
    "ray_node_gpus_utilization": NEEDS_GPU,
    "ray_node_gram_used": NEEDS_GPU,
    "rollout_loading_ratio": "there only while engines load",
    "ray_vllm_engine_sleep_state": "vLLM writes it when an engine sleeps or wakes, which these engines never do",
    "rollout_foreign_seconds_bucket": REMOTE,
    "rollout_forks_total": RARE,
    "ray_vllm_num_preemptions_total": RARE,
    "ray_serve_deployment_error_counter_total": RARE,
    "ray_serve_num_http_error_requests_total": RARE,
}


@dataclass(frozen=True)
class Query:
    """One PromQL query, and how its lines are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel."""

    title: str
    help: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    """timeseries, stat or heatmap"""
    unit: str = "short"
    """Grafana's name of it."""
    stacked: bool = False
    from_zero: bool = True
    """Whether the axis begins at 0: not for what may be negative."""
    red_below: float | None = None
    red_from: float | None = None
    """Of stats."""


@dataclass(frozen=True)
class Row:
    """Panels that answer a question."""

    question: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """One dashboard."""

    name: str
    """Of its file."""
    title: str
    help: str
    rows: tuple[Row, ...]

    @property
    def queries(self) -> Iterator[tuple[str, str]]:
        """Place and expression of every query."""
        for row in self.rows:
            for panel in row.panels:
                for query in panel.queries:
                    yield f"{self.name} / {row.question} / {panel.title}", query.expr


def rate(name: str, by: Sequence[str] = (), where: str = CLUSTER) -> str:
    """Events a second, summed."""
    return f"sum{_by(by)}(rate({name}{{{where}}}[$__rate_interval]))"


def increase(name: str, by: Sequence[str] = (), where: str = CLUSTER) -> str:
    """Events within the panel's step, summed."""
    return f"sum{_by(by)}(increase({name}{{{where}}}[$__rate_interval]))"


def quantile(q: float, histogram: str, by: Sequence[str] = (), where: str = CLUSTER) -> str:
    """A quantile of a histogram's observations. `histogram`: without `_bucket`."""
    return f"histogram_quantile({q:g}, {rate(f'{histogram}_bucket', ('le', *by), where)})"


def total(name: str, by: Sequence[str] = (), where: str = CLUSTER) -> str:
    """The sum of a gauge."""
    return f"sum{_by(by)}({name}{{{where}}})"


def or_zero(expr: str) -> str:
    """For series that do not exist before their first increment."""
    return f"{expr} or on () vector(0)"


def _by(labels: Sequence[str]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""


def as_promql(expr: str, interval: str = "1m") -> str:
    """A query with Grafana's variables filled in, as Prometheus takes it."""
    return expr.replace("$__rate_interval", interval).replace("$cluster", ".*").replace("$run", ".*")


def selectors(expr: str) -> list[str]:
    """The names of all series that a query reads. Raises ValueError for what is no PromQL."""
    found: list[str] = []

    def look(node: object) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(str(node.name))
        return True

    promql_parser.walk(promql_parser.parse(as_promql(expr)), look)
    return found


def known_names() -> frozenset[str]:
    """Every series that a query may read."""
    ours = {name for metric in CATALOGUE.values() for name in series_names(metric)}
    return frozenset(ours.union(*FOREIGN.values(), {"up"}))


def quantiles(histogram: str, qs: Sequence[float] = (0.5, 0.95), where: str = CLUSTER) -> tuple[Query, ...]:
    """Several quantiles of a histogram in one panel, named p50, p95."""
    return tuple(Query(quantile(q, histogram, where=where), f"p{100 * q:g}") for q in qs)
