"""Figures counted in place: what the exporter hears, and when."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from rollout.deferred_metrics import Buckets, Figures, Latest, Total

VALUES = st.lists(st.floats(0, 100, allow_nan=False), max_size=40)


class Heard:
    """A TEST DOUBLE of an exporter: what it was told of one series, in order."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.broken = False

    def __call__(self, value: float) -> None:
        if self.broken:
            raise RuntimeError("the exporter is gone")
        self.values.append(value)


def test_a_gauge_tells_its_last_value_each_time():
    heard = Heard()
    gauge = Latest(heard)
    gauge.tell()
    gauge.set(3)
    gauge.set(5)
    gauge.tell()
    gauge.tell()
    assert heard.values == [5, 5]


def test_a_counter_tells_what_came_since():
    heard = Heard()
    counter = Total(heard)
    counter.tell()
    counter.inc()
    counter.inc(2)
    counter.tell()
    counter.tell()
    counter.inc(4)
    counter.tell()
    assert heard.values == [3, 4]


def test_a_counter_loses_nothing_to_an_exporter_that_fails():
    heard = Heard()
    counter = Total(heard)
    counter.inc(2)
    heard.broken = True
    with pytest.raises(RuntimeError):
        counter.tell()
    heard.broken = False
    counter.inc(3)
    counter.tell()
    assert heard.values == [5]


def test_a_counter_never_falls():
    with pytest.raises(ValueError, match="-1"):
        Total(Heard()).inc(-1)


@given(VALUES, VALUES)
def test_a_histogram_tells_what_prometheus_would_show(first: list[float], second: list[float]):
    bounds = (0.5, 1.0, 10.0)
    registry = CollectorRegistry()
    judge = Histogram("h", "-", buckets=bounds, registry=registry)
    buckets: dict[str, float] = {}
    total, count = Heard(), Heard()
    histogram = Buckets(bounds, lambda le, value: buckets.__setitem__(le, value), total, count)
    for values in (first, second):
        for value in values:
            histogram.observe(value)
            judge.observe(value)
        histogram.tell()
        shown = {(s.name, s.labels.get("le")): s.value for family in registry.collect() for s in family.samples}
        assert buckets == {le: shown["h_bucket", le] for le in ("0.5", "1.0", "10.0", "+Inf")}
        assert count.values[-1] == shown["h_count", None]
        assert total.values[-1] == pytest.approx(shown["h_sum", None])


def test_a_value_at_a_bound_is_within_it():
    buckets: dict[str, float] = {}
    histogram = Buckets((1.0, 2.0), lambda le, value: buckets.__setitem__(le, value), Heard(), Heard())
    histogram.observe(1.0)
    histogram.tell()
    assert buckets == {"1.0": 1, "2.0": 1, "+Inf": 1}


def test_bounds_ascend():
    with pytest.raises(ValueError, match="ascend"):
        Buckets((2.0, 1.0), lambda le, value: None, Heard(), Heard())


def test_the_same_labels_are_the_same_series():
    figures = Figures()
    heard = Heard()
    figures.find(("tokens", "model=a"), lambda: Total(heard)).inc(1)
    figures.find(("tokens", "model=a"), lambda: Total(Heard())).inc(2)
    other = Heard()
    figures.find(("tokens", "model=b"), lambda: Total(other)).inc(7)
    figures.tell()
    assert (heard.values, other.values) == ([3], [7])


def test_one_refused_series_is_said_once_and_harms_no_other(caplog: pytest.LogCaptureFixture):
    figures = Figures()
    broken, heard = Heard(), Heard()
    broken.broken = True
    figures.find(("bad",), lambda: Latest(broken)).set(1)
    figures.find(("good",), lambda: Latest(heard)).set(2)
    with caplog.at_level(logging.ERROR):
        figures.tell()
        figures.tell()
    assert heard.values == [2, 2]
    assert [record.getMessage() for record in caplog.records] == ["the figure bad cannot be told"]
