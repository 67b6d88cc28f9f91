"""Dashboards and alerts: as generated, with queries that parse and metrics that exist."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import promql_parser
import pytest
import yaml

from k8s.monitoring.alerts import ALERTS, Alert, prometheus_rule
from k8s.monitoring.boards import DASHBOARDS
from k8s.monitoring.generate import FOLDER, ROOT, SDK_RELEASE, files
from k8s.monitoring.queries import FOREIGN, WITHOUT_DATA, Dashboard, as_promql, known_names, selectors
from rollout.metrics_catalogue import CATALOGUE, series_names

# Schemas of Kubernetes objects; not part of the project.
SCHEMAS = Path(os.environ.get("K8S_SCHEMAS", ROOT.parent / "shared" / "data" / "k8s-schemas"))
QUERIES = [*(query for board in DASHBOARDS for query in board.queries), *((a.name, a.expr) for a in ALERTS)]


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def load(dashboard: Dashboard) -> dict[str, Any]:
    return json.loads((ROOT / FOLDER / "dashboards" / f"{dashboard.name}.json").read_text())


def test_the_sdk_is_that_of_the_right_release_of_grafana():
    """pip prefers the release for the oldest Grafana, as each has an epoch of its own."""
    found = version("grafana-foundation-sdk")
    assert found.endswith(f"!{SDK_RELEASE}"), f"{found} is installed; install what pyproject.toml's extra [dev] names"


@pytest.mark.parametrize(
    ("path", "text"), files().items(), ids=lambda part: part.name if isinstance(part, Path) else ""
)
def test_the_files_are_as_generated(path: Path, text: str):
    assert (ROOT / path).read_text() == text, "run `python -m k8s.monitoring.generate`"


def test_there_is_no_dashboard_that_nobody_generates():
    found = {path.stem for path in (ROOT / FOLDER / "dashboards").iterdir()}
    assert found == {board.name for board in DASHBOARDS}
    kustomization = yaml.safe_load((ROOT / FOLDER / "kustomization.yaml").read_text())
    listed = kustomization["configMapGenerator"][0]["files"]
    assert sorted(listed) == sorted(f"dashboards/{board.name}.json" for board in DASHBOARDS)


# Queries


@pytest.mark.parametrize(("place", "expr"), QUERIES)
def test_every_query_parses(place: str, expr: str):
    parsed = as_promql(expr)
    assert "$" not in parsed, "a variable of Grafana is left"
    promql_parser.parse(parsed)


@pytest.mark.parametrize(("place", "expr"), QUERIES)
def test_every_metric_of_a_query_exists(place: str, expr: str):
    found = selectors(expr)
    assert found and set(found) <= known_names(), place


def test_a_metric_that_there_is_not_would_be_seen():
    assert selectors("rate(rollout_made_up_total[1m]) / on () sum(rollout_workers)") == [
        "rollout_made_up_total",
        "rollout_workers",
    ]
    assert "rollout_made_up_total" not in known_names()


def test_every_metric_of_ours_is_on_a_dashboard_or_in_an_alert():
    asked = {name for _, expr in QUERIES for name in selectors(expr)}
    unseen = [metric.name for metric in CATALOGUE.values() if not asked & set(series_names(metric))]
    assert unseen == []


def test_what_is_listed_of_others_and_as_without_data_is_asked_for():
    asked = {name for _, expr in QUERIES for name in selectors(expr)}
    assert set().union(*FOREIGN.values()) <= asked
    assert set(WITHOUT_DATA) <= asked and all(WITHOUT_DATA.values())


# Dashboards


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.name)
def test_a_dashboard_is_whole(board: Dashboard):
    found = load(board)
    assert found["uid"] == f"rollout-{board.name}" and found["title"] == board.title
    assert [v["name"] for v in found["templating"]["list"]] == ["datasource", "cluster", "run"]
    rows = [panel["title"] for panel in found["panels"] if panel["type"] == "row"]
    assert rows == [row.question for row in board.rows] and all(title.endswith("?") for title in rows)
    ids = [panel["id"] for panel in panels(found)]
    assert len(ids) == len(set(ids)) == sum(len(row.panels) for row in board.rows)
    for panel in panels(found):
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [t["refId"] for t in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
        assert all(target["expr"] for target in panel["targets"])


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.name)
def test_no_two_panels_cover_each_other(board: Dashboard):
    taken: Counter[tuple[int, int]] = Counter()
    for panel in load(board)["panels"]:
        place = panel["gridPos"]
        assert place.get("x", 0) >= 0 and place.get("x", 0) + place["w"] <= 24
        taken.update(
            (x, y)
            for x in range(place.get("x", 0), place.get("x", 0) + place["w"])
            for y in range(place.get("y", 0), place.get("y", 0) + place["h"])
        )
    assert [cell for cell, count in taken.items() if count > 1] == []


def test_every_panel_query_keeps_to_the_chosen_cluster():
    loose = [place for board in DASHBOARDS for place, expr in board.queries if "$cluster" not in expr]
    assert loose == []


# Alerts


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_says_what_to_do(alert: Alert):
    assert alert.do and alert.means.endswith(".") and not alert.summary.endswith(".")
    page = (ROOT / "docs" / "alerts.md").read_text()
    assert f"\n## {alert.name}\n" in page and alert.steps in page
    (rule,) = [one for one in prometheus_rule()["spec"]["groups"][0]["rules"] if one["alert"] == alert.name]
    assert rule["annotations"]["runbook"] == alert.steps
    assert "{{" not in "".join(rule["annotations"].values()), "Prometheus would take it for a template"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_a_step_that_needs_rollout_up_has_another_for_kubernetes(alert: Alert):
    for step in alert.do:
        if any(f"`rollout {command}" in step for command in ("up", "down", "status", "logs", "top")):
            assert "Kubernetes: " in step, step
        assert "`rollout status" not in step, "it knows clusters of this machine alone; `rollout top` asks an address"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_tells_clusters_apart(alert: Alert):
    assert "ray_io_cluster" in alert.expr and "on ()" not in alert.expr


def test_the_alert_on_missing_metrics_asks_for_the_labels_that_the_monitors_make():
    front, _ = yaml.safe_load_all((ROOT / FOLDER / "pod-monitor.yaml").read_text())
    job = front["spec"]["selector"]["matchLabels"][front["spec"]["jobLabel"]]
    (endpoint,) = front["spec"]["podMetricsEndpoints"]
    (alert,) = [alert for alert in ALERTS if alert.name == "RolloutMetricsMissing"]
    assert f'up{{job="{job}",endpoint="{endpoint["port"]}"}}' in alert.expr


def test_the_page_says_how_the_monitoring_is_installed():
    """The network policy's namespace, the chart's label, and the namespace of the Secret that the monitor reads."""
    page = (ROOT / "docs" / "kubernetes.md").read_text().partition("\n## Monitoring\n")[2].partition("\n## ")[0]
    policies = yaml.safe_load_all((ROOT / "k8s" / "base" / "network.yaml").read_text())
    admitted = [
        peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for policy in policies
        for rule in policy["spec"]["ingress"]
        for peer in rule["from"]
        if "kubernetes.io/metadata.name" in peer.get("namespaceSelector", {}).get("matchLabels", {})
    ]
    assert admitted == ["monitoring"] and f"--namespace {admitted[0]}" in page
    release = prometheus_rule()["metadata"]["labels"]["release"]
    for monitor in yaml.safe_load_all((ROOT / FOLDER / "pod-monitor.yaml").read_text()):
        assert monitor["metadata"]["labels"]["release"] == release and "namespaceSelector" not in monitor["spec"]
    assert f"helm install {release} " in page and f"`release: {release}`" in page
    assert "kubectl apply -k k8s/monitoring -n rollout" in page and "rollout-keys" in page


def test_no_two_alerts_share_a_name():
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)


def problems(kind: str, found: dict[str, Any]) -> list[str]:
    schema = SCHEMAS / f"{kind}.json"
    if not schema.is_file():
        pytest.skip(f"no schemas at {SCHEMAS}; set K8S_SCHEMAS to a folder that holds {kind}.json")
    validator = jsonschema.Draft202012Validator(json.loads(schema.read_text()))
    return [problem.message for problem in validator.iter_errors(found)]


def test_the_rule_fits_the_operators_schema():
    rule = yaml.safe_load((ROOT / FOLDER / "prometheus-rule.yaml").read_text())
    assert problems("PrometheusRule", rule) == []
    rule["spec"]["groups"][0]["rules"][0]["expresion"] = rule["spec"]["groups"][0]["rules"][0].pop("expr")
    assert problems("PrometheusRule", rule), "the schema takes anything"


def test_the_monitors_fit_the_operators_schema():
    monitors = list(yaml.safe_load_all((ROOT / FOLDER / "pod-monitor.yaml").read_text()))
    for monitor in monitors:
        assert problems("PodMonitor", monitor) == []
    monitors[0]["spec"]["podMetricsEndpoint"] = monitors[0]["spec"].pop("podMetricsEndpoints")
    assert problems("PodMonitor", monitors[0]), "the schema takes anything"


def test_what_the_monitors_name_is_there():
    """Ports of the pods, and the secret's key: Prometheus says nothing where one is missing."""
    monitors = list(yaml.safe_load_all((ROOT / FOLDER / "pod-monitor.yaml").read_text()))
    service = (ROOT / "k8s" / "base" / "rayservice.yaml").read_text()
    for monitor in monitors:
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert f"name: {endpoint['port']}," in service
        assert endpoint["relabelings"][0]["targetLabel"] == "ray_io_cluster"
        if (credentials := endpoint.get("authorization", {}).get("credentials")) is not None:
            secrets = yaml.safe_load_all((ROOT / "k8s" / "secret.example.yaml").read_text())
            known = {secret["metadata"]["name"]: secret["stringData"] for secret in secrets}
            assert credentials["key"] in known[credentials["name"]]


def test_promtool_takes_the_rules(tmp_path: Path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(prometheus_rule()["spec"]))
    done = subprocess.run([promtool, "check", "rules", str(rules)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout
