"""Alerts over made-up time series, as Prometheus's own promtool evaluates them: who fires, and who does not."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.monitoring.alerts import ALERTS, prometheus_rule

# A cluster that works. "a+bxn": from a, b more each minute, n times.
HEALTHY = {
    "rollout_controller_ready": "1x120",
    "rollout_controller_start_time_seconds": "1000x120",
    "rollout_journal_failed": "0x120",
    "rollout_journal_bytes": "1000000x120",
    'rollout_replicas{health="healthy"}': "2x120",
    'rollout_replicas{health="stale"}': "0x120",
    'rollout_replicas{health="suspect"}': "0x120",
    'rollout_loading_phase{phase="ready"}': "1x120",
    'rollout_loading_phase{phase="loading"}': "0x120",
    'rollout_loading_phase{phase="failed"}': "0x120",
    'ray_vllm_num_requests_running{ReplicaId="a"}': "10x120",
    'ray_vllm_kv_cache_usage_perc{ReplicaId="a"}': "0.5x120",
    'rollout_deaths_total{kind="worker"}': "0x120",
    'rollout_groups{run="r",state="waiting"}': "50x120",
    'rollout_groups{run="r",state="running"}': "10x120",
    'rollout_sessions_finished_total{run="r",stop_reason="stop"}': "0+100x120",
    'rollout_sessions_finished_total{run="r",stop_reason="error"}': "0+1x120",
    'rollout_runs_held{reason="staleness"}': "0x120",
    'rollout_runs_held{reason="memory"}': "0x120",
    'rollout_lease_events_total{event="expired"}': "0x120",
    'rollout_session_errors_total{category="engine"}': "0+1x120",
    'rollout_forks_total{run="r",reason="x"}': "0+1x120",
    'rollout_tool_calls_total{tool="add",outcome="ok"}': "0+100x120",
    'rollout_tool_calls_total{tool="add",outcome="timeout"}': "0+5x120",
    'rollout_groups_dropped_total{run="r",reason="zero_variance"}': "0+10x120",
    'rollout_groups_delivered_total{run="r"}': "0+10x120",
    'rollout_weight_updates_total{outcome="failed"}': "0x120",
    'rollout_weight_updates_total{outcome="partial"}': "0x120",
    'rollout_event_loop_lag_seconds{process="worker-0",quantile="0.99"}': "0.02x120",
}
GONE = "_x120"
# What must change for each alert to fire. GONE: there is no such series.
TROUBLE: dict[str, dict[str, str]] = {
    "RolloutMetricsMissing": dict.fromkeys(HEALTHY, GONE),
    "RolloutControllerNotReady": {"rollout_controller_ready": "0x120"},
    "RolloutControllerRestarts": {"rollout_controller_start_time_seconds": "1000+200x120"},
    "RolloutJournalFailed": {"rollout_journal_failed": "1x120"},
    "RolloutJournalLarge": {"rollout_journal_bytes": "30000000000x120"},
    "RolloutNoHealthyReplica": {'rollout_replicas{health="healthy"}': "0x120"},
    "RolloutReplicaBehind": {'rollout_replicas{health="stale"}': "1x120"},
    "RolloutLoadingFailed": {'rollout_loading_phase{phase="failed"}': "1x120"},
    "RolloutLoadingSlow": {'rollout_loading_phase{phase="loading"}': "1x120"},
    "RolloutEngineMetricsMissing": {'ray_vllm_num_requests_running{ReplicaId="a"}': GONE},
    "RolloutCacheFull": {'ray_vllm_kv_cache_usage_perc{ReplicaId="a"}': "0.99x120"},
    "RolloutWorkersDie": {'rollout_deaths_total{kind="worker"}': "0+1x120"},
    "RolloutStalled": {
        'rollout_sessions_finished_total{run="r",stop_reason="stop"}': "500x120",
        'rollout_sessions_finished_total{run="r",stop_reason="error"}': "5x120",
        'rollout_forks_total{run="r",reason="x"}': "5x120",
    },
    "RolloutTrainerBehind": {'rollout_runs_held{reason="memory"}': "1x120"},
    "RolloutLeasesExpire": {'rollout_lease_events_total{event="expired"}': "0+1x120"},
    "RolloutSessionErrors": {'rollout_sessions_finished_total{run="r",stop_reason="error"}': "0+20x120"},
    "RolloutLedgerRefuses": {'rollout_session_errors_total{category="ledger"}': "0+1x120"},
    "RolloutHistoriesFork": {'rollout_forks_total{run="r",reason="x"}': "0+50x120"},
    "RolloutToolFails": {'rollout_tool_calls_total{tool="add",outcome="timeout"}': "0+300x120"},
    "RolloutNoSignal": {'rollout_groups_dropped_total{run="r",reason="zero_variance"}': "0+200x120"},
    "RolloutWeightUpdateFails": {'rollout_weight_updates_total{outcome="partial"}': "0+1x120"},
    "RolloutEventLoopLag": {'rollout_event_loop_lag_seconds{process="worker-0",quantile="0.99"}': "0.5x120"},
}


def firing(folder: Path, change: dict[str, str], at: str = "2h") -> set[str]:
    """The alerts that fire on the healthy cluster with a change, so long after the start."""
    return evaluated(folder, {**HEALTHY, **change}, at)


def evaluated(folder: Path, series: dict[str, str], at: str, label: str = "alertname") -> set[str]:
    """The values of a label among the alerts that fire over these series."""
    names = [alert.name for alert in ALERTS]
    case: dict[str, Any] = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        # promtool compares: it is told that nothing fires, and says which alerts do.
        "alert_rule_test": [{"eval_time": at, "alertname": name, "exp_alerts": []} for name in names],
    }
    (folder / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [case]})
    )
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yaml"], cwd=folder, capture_output=True, text=True, timeout=60
    )
    output = done.stdout + done.stderr
    assert bool(done.returncode) == bool(re.findall(r"alertname: (\w+)", output)), output
    if label == "alertname":
        return set(re.findall(r"alertname: (\w+)", output))
    fired = re.findall(rf'alertname="(\w+)"[^}}]*{label}="([^"]*)"', output)
    return {f"{name} {value}" for name, value in fired}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(prometheus_rule()["spec"]))
    return tmp_path


def test_every_alert_has_its_trouble():
    assert TROUBLE.keys() == {alert.name for alert in ALERTS}


def test_nothing_fires_on_a_cluster_that_works(folder: Path):
    assert firing(folder, {}) == set()


def test_nothing_fires_on_a_cluster_without_work(folder: Path):
    idle = {name: "0x120" if values.startswith("0+") else values for name, values in HEALTHY.items()}
    idle['rollout_groups{run="r",state="waiting"}'] = idle['rollout_groups{run="r",state="running"}'] = "0x120"
    assert firing(folder, idle) == set()


@pytest.mark.parametrize("name", TROUBLE)
def test_an_alert_fires_at_its_trouble(folder: Path, name: str):
    assert firing(folder, TROUBLE[name]) == {name}


# Events that are rare, and clusters that are several


LEDGER = 'rollout_session_errors_total{category="ledger"}'


@pytest.mark.parametrize("values", ["0x30 1x90", "_x30 1x90"], ids=["from 0", "born at 1"])
def test_the_first_refusal_of_the_ledger_is_seen_and_does_not_ring_for_ever(folder: Path, values: str):
    assert firing(folder, {LEDGER: values}, "29m") == set()
    assert firing(folder, {LEDGER: values}, "40m") == {"RolloutLedgerRefuses"}
    assert firing(folder, {LEDGER: values}, "2h") == set()


def test_a_refusal_of_long_ago_is_none_when_prometheus_has_missed_some_minutes(folder: Path):
    seen = {LEDGER: "0x5 1x30 _x20 1x80"}
    for minutes in (60, 66, 71, 75, 90):
        assert firing(folder, seen, f"{minutes}m") == set(), minutes


def of_clusters(*names: str) -> dict[str, str]:
    """The series of several clusters that work, as the PodMonitors bring them."""
    return {
        labelled(series, f'ray_io_cluster="{name}"'): values
        for name in names
        for series, values in {
            **HEALTHY,
            'up{job="rollout-cluster",endpoint="front"}': "1x120",
            'up{job="rollout-cluster",endpoint="metrics",pod="engines"}': "1x120",
        }.items()
    }


def labelled(series: str, label: str) -> str:
    """A series with one more label."""
    return f"{series[:-1]},{label}}}" if series.endswith("}") else f"{series}{{{label}}}"


def without(series: dict[str, str], cluster: str, name: str, before: str = "") -> dict[str, str]:
    """The same, but for one cluster's metrics that begin so. `before`: "x60": they were there for an hour."""
    own = {key for key in series if f'ray_io_cluster="{cluster}"' in key and key.startswith(name)}
    assert own
    last = {key: f"{series[key].removesuffix('x120')}{before} _x60" if before else GONE for key in own}
    return {**series, **last}


def test_nothing_fires_where_several_clusters_work(folder: Path):
    assert evaluated(folder, of_clusters("a", "b"), "2h") == set()


@pytest.mark.parametrize("up", ["1x120", "0x120"], ids=["the head answers", "the head does not answer"])
def test_a_cluster_without_metrics_is_missed_beside_another(folder: Path, up: str):
    series = without(of_clusters("a", "b"), "b", "rollout_")
    series['up{job="rollout-cluster",endpoint="front",ray_io_cluster="b"}'] = up
    assert evaluated(folder, series, "2h", "ray_io_cluster") == {"RolloutMetricsMissing b"}


def test_a_cluster_whose_head_is_gone_is_missed_while_its_other_pods_are_there(folder: Path):
    series = without(of_clusters("a", "b"), "b", "rollout_", "x60")
    series = without(series, "b", 'up{job="rollout-cluster",endpoint="front"', "x60")
    assert evaluated(folder, series, "50m", "ray_io_cluster") == set()
    assert evaluated(folder, series, "2h", "ray_io_cluster") == {"RolloutMetricsMissing b"}


def test_a_cluster_that_was_deleted_and_a_batch_job_are_not_missed(folder: Path):
    deleted = without(of_clusters("a", "b"), "b", "", "x60")
    job = {'up{job="rollout-cluster",endpoint="metrics",ray_io_cluster="rollout-batch"}': "1x120"}
    assert evaluated(folder, {**deleted, **job}, "2h") == set()


def test_engines_without_metrics_are_missed_beside_another_cluster(folder: Path):
    series = without(of_clusters("a", "b"), "b", "ray_vllm_num_requests_running")
    assert evaluated(folder, series, "2h", "ray_io_cluster") == {"RolloutEngineMetricsMissing b"}
