"""vLLM's metrics in a Ray cluster: counted in the replica, told to Ray every two seconds.

Invariant: no call of Ray's stands between an engine's step and its tokens, and the names, labels and values that
Prometheus finds are those of vLLM. vLLM's own bridge (vllm.v1.metrics.ray_wrappers) calls Ray for each token: 4 µs on
the event loop that hands out the tokens, where vLLM's server pays 1, and some 7 in the node's agent, which replays
every observation of a histogram with the middle of its bucket for a value, so that the sums are guesses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from ray.util import metrics as ray_metrics
from vllm.v1.metrics import ray_wrappers
from vllm.v1.metrics.ray_wrappers import RayCounterWrapper, RayGaugeWrapper, RayPrometheusMetric

from actors.unattended import repeatedly
from rollout.deferred_metrics import Buckets, Figures, Latest, Total

# Ray's own report goes out every ten seconds.
TELL_S = 2.0

FIGURES = Figures()
"""Those of this process."""


def start() -> asyncio.Task[None]:
    """Have the engine that is made from now on count here. The task tells Ray; keep it."""
    _install()

    async def tell() -> None:
        FIGURES.tell()

    return asyncio.create_task(repeatedly(TELL_S, "telling Ray the engine's metrics", tell))


def _install() -> None:
    families = (
        ray_wrappers.RayPrometheusStatLogger,
        ray_wrappers.RaySpecDecodingProm,
        ray_wrappers.RayKVConnectorProm,
        ray_wrappers.RayPerfMetricsProm,
    )
    kinds = {"_gauge_cls": DeferredGauge, "_counter_cls": DeferredCounter, "_histogram_cls": DeferredHistogram}
    for family in families:
        for name in kinds.keys() & vars(family).keys():
            setattr(family, name, kinds[name])


class _Deferred(RayPrometheusMetric):
    _found: Any = None

    def labels(self, *labels: Any, **named: Any) -> Any:
        """The metric of these labels. Raises ValueError for another number of them."""
        labelled = super().labels(*labels, **named)
        # It is a copy, and counts for itself.
        labelled._found = None
        return labelled

    def _figure(self) -> Any:
        """Where it counts."""
        if self._found is None:
            name = self.metric.info["name"]
            key = (name, *(f"{key}={value}" for key, value in sorted(self._tags.items())))
            self._found = FIGURES.find(key, self._make)
        return self._found

    def _make(self) -> Any:
        raise NotImplementedError


class DeferredGauge(_Deferred, RayGaugeWrapper):
    """prometheus_client's Gauge, as far as vLLM uses it."""

    def set(self, value: float) -> None:
        """Replace the value."""
        self._figure().set(value)

    def _make(self) -> Latest:
        return Latest(partial(self.metric.set, tags=self._tags))


class DeferredCounter(_Deferred, RayCounterWrapper):
    """prometheus_client's Counter, as far as vLLM uses it."""

    def inc(self, value: float = 1.0) -> None:
        """Raises ValueError for less than nothing."""
        self._figure().inc(value)

    def _make(self) -> Total:
        return Total(partial(self.metric.inc, tags=self._tags))


class DeferredHistogram(_Deferred):
    """prometheus_client's Histogram, as far as vLLM uses it; to Ray three gauges, as nothing else takes many at once.

    PromQL asks for names and labels, not for the type.
    """

    def __init__(
        self,
        name: str,
        documentation: str | None = "",
        labelnames: list[str] | None = None,
        buckets: Sequence[float] | None = None,
    ) -> None:
        """As vLLM calls it. Raises ValueError for buckets that do not ascend."""
        super().__init__()
        name, text = self._get_sanitized_opentelemetry_name(name), documentation or ""
        keys = self._get_tag_keys(labelnames)
        self._bounds = tuple(bound for bound in buckets or () if bound != float("inf"))
        self._bucket = ray_metrics.Gauge(f"{name}_bucket", text, tag_keys=(*keys, "le"))
        self._sum = ray_metrics.Gauge(f"{name}_sum", text, tag_keys=keys)
        # The one of which the labels are checked.
        self.metric = ray_metrics.Gauge(f"{name}_count", text, tag_keys=keys)

    def labels(self, *labels: Any, **named: Any) -> DeferredHistogram:
        """The histogram of these labels, which is told from now on."""
        labelled: DeferredHistogram = super().labels(*labels, **named)
        labelled._figure()
        return labelled

    def observe(self, value: float) -> None:
        """Count one value."""
        self._figure().observe(value)

    def _make(self) -> Buckets:
        bucket, tags = self._bucket, self._tags
        return Buckets(
            self._bounds,
            lambda le, told: bucket.set(told, tags={**tags, "le": le}),
            partial(self._sum.set, tags=tags),
            partial(self.metric.set, tags=tags),
        )
