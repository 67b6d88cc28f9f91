"""vLLM's metrics on their way to Ray: who counts, and what Ray is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import ray.util.metrics
from vllm.v1.metrics import ray_wrappers
from vllm.v1.metrics.loggers import PrometheusStatLogger

from deployments import engine_metrics
from deployments.engine_metrics import DeferredCounter, DeferredGauge, DeferredHistogram
from rollout.deferred_metrics import Figures

LABELS = ["model_name", "engine"]
HOURS = 3600.0


class Told:
    """A TEST DOUBLE of Ray's metrics, which want a running Ray: every value, by name and labels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, dict[str, str], float]] = []
        outer = self

        class Recorded:
            def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] = ()) -> None:
                self.info, self._tag_keys = {"name": name}, tag_keys

            def _record(self, value: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(self._tag_keys)
                outer.calls.append((self.info["name"], tags, value))

        class Gauge(Recorded):
            def set(self, value: float, tags: dict[str, str]) -> None:
                self._record(value, tags)

        class Counter(Recorded):
            def inc(self, value: float, tags: dict[str, str]) -> None:
                self._record(value, tags)

        monkeypatch.setattr(ray.util.metrics, "Gauge", Gauge)
        monkeypatch.setattr(ray.util.metrics, "Counter", Counter)

    def latest(self, name: str, **labels: str) -> float | None:
        found = [value for told, tags, value in self.calls if told == name and labels.items() <= tags.items()]
        return found[-1] if found else None


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr(engine_metrics, "FIGURES", Figures())
    return Told(monkeypatch)


@pytest.fixture
def wrappers() -> Iterator[Any]:
    """vLLM's own classes, given back as they were."""
    names = ("_gauge_cls", "_counter_cls", "_histogram_cls")
    families = [value for value in vars(ray_wrappers).values() if isinstance(value, type)]
    before = [(family, name, vars(family)[name]) for family in families for name in names if name in vars(family)]
    yield ray_wrappers
    for family, name, value in before:
        setattr(family, name, value)


def test_nothing_is_told_for_an_observation(told: Told):
    histogram = DeferredHistogram("vllm:latency", "-", LABELS, [0.1, 1.0]).labels("m", "0")
    counter = DeferredCounter("vllm:tokens", "-", LABELS).labels("m", "0")
    gauge = DeferredGauge("vllm:running", "-", LABELS).labels("m", "0")
    for _ in range(100):
        histogram.observe(0.5)
        counter.inc(2)
        gauge.set(3)
    assert told.calls == []


def test_names_and_labels_are_those_of_the_histogram(told: Told):
    histogram = DeferredHistogram("vllm:latency", "-", LABELS, [0.1, 1.0]).labels(model_name="m", engine=0)
    for value in (0.05, 0.5, 0.5, 7.0):
        histogram.observe(value)
    engine_metrics.FIGURES.tell()
    who = {"model_name": "m", "engine": "0", "ReplicaId": ""}
    assert [told.latest("vllm_latency_bucket", le=le, **who) for le in ("0.1", "1.0", "+Inf")] == [1, 3, 4]
    assert told.latest("vllm_latency_sum", **who) == pytest.approx(8.05)
    assert told.latest("vllm_latency_count", **who) == 4


def test_a_labelled_histogram_is_told_before_its_first_value(told: Told):
    DeferredHistogram("vllm:latency", "-", LABELS, [1.0]).labels("m", "0")
    engine_metrics.FIGURES.tell()
    assert told.latest("vllm_latency_bucket", le="+Inf") == 0


def test_series_are_apart(told: Told):
    counter = DeferredCounter("vllm:tokens", "-", LABELS)
    counter.labels("m", "0").inc(1)
    counter.labels("m", "1").inc(5)
    counter.labels("m", "0").inc(1)
    engine_metrics.FIGURES.tell()
    assert (told.latest("vllm_tokens", engine="0"), told.latest("vllm_tokens", engine="1")) == (2, 5)


def test_metrics_without_labels(told: Told):
    DeferredGauge("vllm:a").set(1)
    DeferredCounter("vllm:b").inc(2)
    DeferredHistogram("vllm:c", buckets=[1.0]).observe(3)
    engine_metrics.FIGURES.tell()
    assert [told.latest(name) for name in ("vllm_a", "vllm_b", "vllm_c_count")] == [1, 2, 1]


@pytest.mark.parametrize("kind", [DeferredGauge, DeferredCounter, DeferredHistogram])
def test_labels_must_be_as_many_as_were_announced(told: Told, kind: Any):
    with pytest.raises(ValueError, match="Expected 2, got 1"):
        kind("vllm:a", "-", LABELS).labels("m")


def test_a_labelled_copy_finds_a_series_of_its_own(told: Told):
    # Counted into before it was labelled, which vLLM does not do.
    bare = DeferredCounter("vllm:b", "-", LABELS)
    bare.inc(1)
    bare.labels("m", "0").inc(5)
    engine_metrics.FIGURES.tell()
    assert told.latest("vllm_b", model_name="m") == 5


def test_infinity_among_the_buckets_is_not_told_twice(told: Told):
    DeferredHistogram("vllm:c", buckets=[1.0, float("inf")]).observe(3)
    engine_metrics.FIGURES.tell()
    assert [tags["le"] for name, tags, _ in told.calls if name == "vllm_c_bucket"] == ["1.0", "+Inf"]


async def test_every_metric_of_vllms_is_counted_here(told: Told, wrappers: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_metrics, "TELL_S", HOURS)
    task = engine_metrics.start()
    families = (
        wrappers.RayPrometheusStatLogger,
        wrappers.RaySpecDecodingProm,
        wrappers.RayKVConnectorProm,
        wrappers.RayPerfMetricsProm,
    )
    deferred = {DeferredGauge, DeferredCounter, DeferredHistogram}
    for family in families:
        named = {name for name in dir(family) if name in ("_gauge_cls", "_counter_cls", "_histogram_cls")}
        assert named
        assert {getattr(family, name) for name in named} <= deferred
    assert {getattr(families[0], name) for name in ("_gauge_cls", "_counter_cls", "_histogram_cls")} == deferred
    # The server's own, with which this process has nothing to do.
    assert not deferred & {PrometheusStatLogger._gauge_cls, PrometheusStatLogger._histogram_cls}
    task.cancel()


async def test_they_are_told_again_and_again(told: Told, wrappers: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_metrics, "TELL_S", 0.01)
    task = engine_metrics.start()
    DeferredGauge("vllm:a").set(1)
    async with asyncio.timeout(10):
        while len(told.calls) < 3:
            await asyncio.sleep(0.01)
    task.cancel()
