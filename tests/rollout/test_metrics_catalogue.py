"""The catalogue of metrics: names and labels that Prometheus takes, bounds for all that comes from outside."""

from __future__ import annotations

import re

import pytest

from rollout.metrics_catalogue import (
    CATALOGUE,
    LABELS,
    SECTIONS,
    Metric,
    label,
    label_names,
    series_names,
    staleness_class,
)

METRICS = list(CATALOGUE.values())


def test_no_name_is_given_twice():
    assert sum(map(len, SECTIONS.values())) == len(CATALOGUE)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_is_named_and_explained_as_prometheus_wants(metric: Metric):
    assert re.fullmatch(r"rollout(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.help.endswith(".") and len(metric.help) > 10
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_label_is_known_and_bounded(metric: Metric):
    names = label_names(metric)
    assert len(names) == len(set(names))
    for name in names:
        found = label(metric, name)
        assert re.fullmatch("[a-z_]+", name) and name not in ("le", "job", "instance")
        assert bool(found.values) != bool(found.limit), "either all values are known, or there is a bound"
        assert len(found.values) == len(set(found.values)) <= 64 and found.limit <= 1024


@pytest.mark.parametrize("name", LABELS)
def test_the_programs_own_values_leave_room_for_others(name: str):
    found = LABELS[name]
    assert len(found.known) == len(set(found.known)) and (not found.known or len(found.known) < found.limit)
    assert not (found.values and found.known)
    assert all(re.fullmatch("[a-z_]+", value) for value in found.known)


def test_what_the_ledger_may_refuse_is_there_from_the_beginning():
    assert {"ledger", "prefix", "record"} <= set(LABELS["category"].at_birth)


def test_every_label_is_used():
    used = {written.rpartition("=")[2] for metric in METRICS for written in metric.labels}
    assert used == set(LABELS)


def test_a_histogram_that_may_be_negative_has_no_sum():
    assert series_names(CATALOGUE["rollout_reward"]) == ("rollout_reward_bucket", "rollout_reward_count")
    assert "rollout_session_seconds_sum" in series_names(CATALOGUE["rollout_session_seconds"])
    assert series_names(CATALOGUE["rollout_groups"]) == ("rollout_groups",)


def test_a_label_that_a_metric_does_not_have_is_a_key_error():
    with pytest.raises(KeyError):
        label(CATALOGUE["rollout_groups"], "tool")


@pytest.mark.parametrize(
    ("versions", "name"),
    [(-1, "0"), (0, "0"), (4, "4"), (5, "5-8"), (8, "5-8"), (9, "9-16"), (16, "9-16"), (17, "17+"), (9999, "17+")],
)
def test_staleness_falls_into_classes(versions: int, name: str):
    assert staleness_class(versions) == name and name in LABELS["staleness"].values
