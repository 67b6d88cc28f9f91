"""A real Prometheus scrapes the real cluster under load: every panel and every alert finds what it asks for."""

from __future__ import annotations

import math
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.ports import free_ports
from cluster.top_frame import parse
from k8s.monitoring.alerts import ALERTS, prometheus_rule
from k8s.monitoring.boards import DASHBOARDS
from k8s.monitoring.queries import WITHOUT_DATA, as_promql, selectors
from tests.conftest import MODEL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400, func_only=True)]

START_SECONDS = 30
# Ray hands its metrics on every 10 s, and each needs two scrapes for a rate.
DATA_SECONDS = 150
# What engines count is with the agent after so long.
TOLD_SECONDS = 14
TASKS = 16


@dataclass
class Prometheus:
    """A server and its API."""

    url: str

    def get(self, path: str, **params: str) -> Any:
        """The data of an answer."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=10)
        assert answer.status_code == 200, f"{params}: {answer.text}"
        return answer.json()["data"]

    def numbers(self, expr: str) -> list[float]:
        """What a query gives now, without what is no number."""
        found = [float(series["value"][1]) for series in self.get("query", query=expr)["result"]]
        return [number for number in found if not math.isnan(number)]


@pytest.fixture(scope="module")
def prometheus(cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Scrapes both targets of the cluster every second, with our rules."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "rules.yaml").write_text(yaml.safe_dump(prometheus_rule()["spec"]))
    # With the labels that k8s/monitoring/pod-monitor.yaml gives.
    targets = {"front": urlsplit(cluster.gateway).netloc, "metrics": urlsplit(cluster.ray_metrics).netloc}
    (folder / "prometheus.yaml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(folder / "rules.yaml")],
                "scrape_configs": [
                    {
                        "job_name": "rollout-cluster",
                        "static_configs": [
                            {"targets": [target], "labels": {"endpoint": name}} for name, target in targets.items()
                        ],
                    }
                ],
            }
        )
    )
    (port,) = free_ports(1)
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Prometheus(f"http://127.0.0.1:{port}")
    try:
        _await_targets(server, process, log)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def _await_targets(server: Prometheus, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    health: dict[str, str] = {}
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            # 503 until it has looked through its storage.
            if httpx.get(f"{server.url}/-/ready", timeout=10).status_code == 200:
                active = server.get("targets", state="active")["activeTargets"]
                health = {
                    target["labels"]["endpoint"]: f"{target['health']} {target['lastError']}" for target in active
                }
        except httpx.TransportError:
            pass
        if len(health) == 2 and all(state.startswith("up") for state in health.values()):
            return
        time.sleep(0.2)
    raise AssertionError(f"the targets are not up within {START_SECONDS} s: {health}; {log.read_text()}")


@pytest.fixture
def load(player, tasks) -> Iterator[None]:
    """Sessions with tools, one run after the other, for as long as the test lasts."""
    stop = threading.Event()

    def play() -> None:
        # Tools that raise and tools that hang, which the calculator's do not.
        player.play(tasks[:4], environment="playgrounds:Broken", group_size=2)
        while not stop.is_set():
            player.play(tasks[:TASKS], group_size=4)

    with ThreadPoolExecutor(1) as pool:
        playing = pool.submit(play)
        try:
            yield
        finally:
            stop.set()
            playing.result(timeout=300)


def needed() -> dict[str, str]:
    """Place by query, of all that must have data here."""
    wanted: dict[str, str] = {}
    for board in DASHBOARDS:
        for place, expr in board.queries:
            # What falls back to 0 has data; what is divided by nothing has none.
            if "vector(0)" in expr or " * 0)" in expr or not set(selectors(expr)) & set(WITHOUT_DATA):
                wanted[as_promql(expr)] = place
    return wanted


def alert_series() -> dict[str, str]:
    """Alert by series that it reads, of all that must be there. A whole alert has data only when it fires."""
    found: dict[str, str] = {}

    for alert in ALERTS:

        def look(node: object, name: str = alert.name) -> bool:
            if isinstance(node, promql_parser.VectorSelector) and node.name not in WITHOUT_DATA:
                # The cluster is younger than what an offset looks back at.
                found[str(node).partition(" offset ")[0]] = name
            return True

        promql_parser.walk(promql_parser.parse(alert.expr), look)
    return found


def test_every_query_of_every_panel_and_alert_has_data_under_load(prometheus: Prometheus, http_client, load):
    missing = {**needed(), **{series: f"alert {name}" for series, name in alert_series().items()}}
    assert len(missing) > 80
    # Inside the window of the rates, so that durations and pauses have something to be a quantile of.
    assert http_client.update_weights(MODEL).failed == {}
    updated = time.monotonic()
    deadline = updated + DATA_SECONDS
    while missing and time.monotonic() < deadline:
        http_client.runs()
        missing = {expr: place for expr, place in missing.items() if not prometheus.numbers(expr)}
        if time.monotonic() - updated > 30:
            http_client.update_weights(MODEL)
            updated = time.monotonic()
        time.sleep(1)
    assert missing == {}, "\n".join(f"{place}: {expr}" for expr, place in missing.items())


def test_what_is_listed_as_without_data_says_why_and_is_not_there_by_mistake(prometheus: Prometheus):
    for name, cause in WITHOUT_DATA.items():
        if "GPU" in cause:
            assert prometheus.numbers(name) == [], f"{name} has data here; take it off the list"


def test_the_rules_are_loaded_and_evaluate(prometheus: Prometheus):
    deadline = time.monotonic() + START_SECONDS
    while True:
        (group,) = prometheus.get("rules")["groups"]
        health = {rule["name"]: rule["health"] for rule in group["rules"]}
        if set(health.values()) == {"ok"}:
            break
        assert time.monotonic() < deadline, health
        time.sleep(0.5)
    assert health.keys() == {alert.name for alert in ALERTS}
    states = {rule["name"]: rule["state"] for rule in group["rules"]}
    for name in (
        "RolloutMetricsMissing",
        "RolloutControllerNotReady",
        "RolloutJournalFailed",
        "RolloutLoadingFailed",
    ):
        assert states[name] == "inactive", name


def test_a_finished_run_is_counted_exactly_once(player, tasks, cluster):
    """The counters of one run that nothing disturbs, against its own trajectories."""

    def counted(name: str, **labels: str) -> float:
        text = httpx.get(f"{cluster.gateway}/metrics", timeout=10).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    calls = counted("rollout_tool_calls_total")
    played = player.play(tasks[:4], group_size=4)
    # The text is made anew after a second.
    time.sleep(1.5)
    run = played.info.run
    assert counted("rollout_sessions_finished_total", run=run) == 16
    assert counted("rollout_groups_delivered_total", run=run) == 4
    assert counted("rollout_turns_total", run=run) == played.info.turns
    assert counted("rollout_tool_calls_total") - calls == played.info.tool_calls
    sampled = sum(sum(row["response_mask"]) for row in played.rows)
    assert counted("rollout_delivered_tokens_total", run=run) == sampled == played.info.tokens


def test_engines_count_every_token(cluster):
    """Ray is told every two seconds, hands on every ten, and not one token is missing or guessed."""
    requests, tokens = 8, 12

    def counted() -> dict[str, dict[str, float]]:
        found = parse(httpx.get(cluster.ray_metrics, timeout=10).text, "ray_vllm_")
        latency = "ray_vllm_inter_token_latency_seconds"
        return {
            "tokens": found.by("ray_vllm_generation_tokens_total", "ReplicaId"),
            "latencies": found.by(f"{latency}_count", "ReplicaId"),
            "within": found.by(f"{latency}_bucket", "ReplicaId", le="+Inf"),
            "seconds": found.by(f"{latency}_sum", "ReplicaId"),
        }

    def grown(after: dict[str, dict[str, float]], what: str) -> float:
        return sum(value - before[what].get(replica, 0.0) for replica, value in after[what].items())

    before = _settled(counted)
    started = time.monotonic()
    for number in range(requests):
        asked = {"model": "model", "prompt": [1, 2, 3 + number], "max_tokens": tokens, "ignore_eos": True}
        answer = httpx.post(f"{cluster.gateway}/v1/completions", json=asked, timeout=60)
        assert answer.status_code == 200, answer.text
    took = time.monotonic() - started
    deadline = time.monotonic() + 2 * TOLD_SECONDS
    while True:
        after = counted()
        latencies, within = grown(after, "latencies"), grown(after, "within")
        if grown(after, "tokens") == requests * tokens and latencies == within == requests * (tokens - 1):
            break
        assert time.monotonic() < deadline, f"{after} after {before}"
        time.sleep(0.5)
    # The agent's own way of handing on a histogram makes sums of the buckets' middles.
    assert 0 < grown(after, "seconds") < took


def _settled(counted: Callable[[], dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """What is counted once it stands still for longer than a report takes."""
    deadline = time.monotonic() + 3 * TOLD_SECONDS
    last, since = counted(), time.monotonic()
    while time.monotonic() - since < TOLD_SECONDS:
        assert time.monotonic() < deadline, "the engines' figures never stand still"
        time.sleep(1)
        if (now := counted()) != last:
            last, since = now, time.monotonic()
    return last
