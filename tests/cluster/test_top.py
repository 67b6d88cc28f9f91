"""`rollout top`: figures from a gateway's answers, and gateways that answer badly or not at all."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from rich.console import Console

from cluster import state, top
from cluster.state import ClusterState
from cluster.top import Target, Watcher, choose, once
from cluster.top_frame import Rates, Samples, parse, view
from rollout.api import RunInfo
from rollout.errors import RolloutError

ROOT = Path(__file__).resolve().parents[2]
METRICS = """\
# HELP rollout_sessions Sessions that are not finished.
# TYPE rollout_sessions gauge
rollout_sessions{run="r1",state="queued"} 7.0
rollout_sessions{run="r1",state="running"} 3.0
rollout_reward_mean{run="r1"} 0.625
rollout_leases_open 2.0
rollout_lease_events_total{event="expired"} 1.0
rollout_finished_rows_bytes 3145728.0
rollout_journal_bytes 2097152.0
rollout_capture_sessions{state="open"} 4.0
rollout_capture_sessions{state="rewarded"} 1.0
rollout_retries_total{kind="session"} 2.0
rollout_retries_total{kind="turn"} 3.0
rollout_deaths_total{kind="worker"} 1.0
rollout_deaths_total{kind="replica"} 0.0
rollout_worker_sessions{worker="worker-10"} 5.0
rollout_worker_sessions{worker="worker-2"} 6.0
rollout_worker_memory_bytes{worker="worker-2"} 1073741824.0
rollout_event_loop_lag_seconds{process="worker-2",quantile="0.5"} 0.001
rollout_event_loop_lag_seconds{process="worker-2",quantile="0.99"} 0.08
rollout_event_loop_lag_seconds{process="controller",quantile="0.99"} 0.004
rollout_loading_phase{phase="loading"} 1.0
rollout_loading_phase{phase="ready"} 0.0
rollout_loading_ratio{replica="a"} 0.25
rollout_loading_ratio{replica="b"} 0.75
python_info{version="3"} 1.0
"""
ENGINES = """\
ray_vllm_num_requests_running{ReplicaId="a",engine="0"} 9.0
ray_vllm_num_requests_waiting{ReplicaId="a",engine="0"} 2.0
ray_vllm_kv_cache_usage_perc{ReplicaId="a",engine="0"} 0.5
ray_vllm_generation_tokens_total{ReplicaId="a",engine="0"} 1000.0
ray_node_cpu_utilization{x="{"} 3.0
"""


class Gateway:
    """Answers by path; a callable or a status in their place."""

    def __init__(self, **answers: Any) -> None:
        self.tokens = 0
        self.asked: list[httpx.Request] = []
        self.answers: dict[str, Any] = {
            "/v1/runs": self.runs,
            "/v1/weights": {"version": 4, "replicas": {
                "b": {"health": "suspect", "version": None, "reason": "[red]no answer"},
                "a": {"health": "healthy", "version": 4, "reason": None},
            }},
            "/metrics": METRICS,
            "/ray": ENGINES,
        } | {f"/{name.replace('_', '/')}": answer for name, answer in answers.items()}  # fmt: skip

    def runs(self) -> list[dict[str, Any]]:
        self.tokens += 1000
        info = RunInfo(
            "r1", "running", "m:C", 8, submitted=10, waiting=4, running=2, ready=1, leased=1, delivered=2,
            dropped={"filter": 1}, sessions_running=3, sessions_done=self.tokens // 100, tokens=self.tokens,
            scored=10, reward_sum=5.0, stop_reasons={"stop": 9, "error": 1}, staleness_sum=3, staleness_max=2,
            held_by="staleness",
        )  # fmt: skip
        return [asdict(info)]

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self.answers[request.url.path]
        if callable(answer):
            answer = answer()
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return httpx.Response(answer, text="secret words")
        return httpx.Response(200, text=answer) if isinstance(answer, str) else httpx.Response(200, json=answer)


@pytest.fixture
def watch() -> Iterator[Callable[..., Watcher]]:
    made: list[Watcher] = []

    def make(gateway: Gateway, ray: str = "http://ray:1/ray", **options: Any) -> Watcher:
        ticks = iter(range(1_000_000_000, 2_000_000_000, 2))
        watcher = Watcher(
            Target("demo", "http://gateway:8800/", ray),
            transport=httpx.MockTransport(gateway),
            clock=lambda: float(next(ticks)),
            **options,
        )
        made.append(watcher)
        return watcher

    yield make
    for watcher in made:
        watcher.close()


def text(figures: dict[str, Any], width: int = 200) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as shown:
        console.print(view(figures, width))
    return shown.get()


def test_a_frame_of_everything(watch: Callable[..., Watcher]):
    figures = once(watch(Gateway()), 2.0, pause=lambda _: None)
    assert json.loads(json.dumps(figures)) == figures and figures["problems"] == []
    (run,) = figures["runs"]
    assert (run["sessions_running"], run["sessions_queued"], run["sessions_done"]) == (3, 7, 20)
    assert (run["waiting"], run["ready"], run["leased"], run["delivered"], run["dropped"]) == (4, 1, 1, 2, 1)
    assert (run["reward_mean"], run["staleness_mean"], run["staleness_max"]) == (0.625, 1.5, 2)
    assert (run["tokens_per_s"], run["failures"], run["held_by"]) == (500.0, 1, "staleness")
    totals = figures["totals"]
    assert (totals["tokens_per_s"], totals["trajectories_per_s"]) == (500.0, 5.0)
    assert (totals["generated_tokens_per_s"], totals["leases_open"], totals["captured_sessions"]) == (0.0, 2, 5)
    assert (totals["backlog_groups"], totals["retries"], totals["deaths"]) == (6, 5, {"worker": 1.0, "replica": 0.0})
    good, bad = figures["replicas"]
    assert (good["replica"], good["version"], good["num_requests_running"]) == ("a", 4, 9.0)
    assert (good["num_requests_waiting"], good["kv_cache_usage_perc"]) == (2.0, 0.5)
    assert (bad["health"], bad["version"], bad["num_requests_running"]) == ("suspect", None, None)
    assert [worker["worker"] for worker in figures["workers"]] == ["worker-2", "worker-10"]
    assert figures["workers"][0]["loop_lag_p99_s"] == 0.08 and figures["workers"][1]["loop_lag_p99_s"] is None
    assert figures["loading"] == {"phase": "loading", "ratio": 0.5} and figures["controller_lag_p99_s"] == 0.004


def test_a_frame_as_a_person_reads_it(watch: Callable[..., Watcher]):
    shown = text(once(watch(Gateway()), 2.0, pause=lambda _: None))
    for words in (
        "demo  http://gateway:8800/  weights 4", "engines are loading, 50 %", "3 running, 7 queued", "500 tok/s, 5.0",
        "held: staleness", "0.625", "healthy", "suspect", "80 ms", "1.0 GiB", "deaths: worker 1",
        "worker-10",
    ):  # fmt: skip
        assert words in shown, words
    narrow = text(once(watch(Gateway()), 2.0, pause=lambda _: None), width=80)
    for words in ("r1", "held: staleness", "500", "0.625", "80 ms", "worker-10"):
        assert words in narrow, words
    assert "delivered" in shown and "delivered" not in narrow
    assert text(once(watch(Gateway()), 2.0, pause=lambda _: None), width=20), "so narrow that nothing fits"


def test_without_metrics_it_shows_the_rest(watch: Callable[..., Watcher]):
    figures = watch(Gateway(metrics=404), ray="").look()
    assert figures["problems"] == ["/metrics: 404"]
    (run,) = figures["runs"]
    assert (run["reward_mean"], run["sessions_queued"], run["tokens_per_s"]) == (0.5, None, None)
    assert figures["workers"] == [] and figures["totals"]["leases_open"] is None
    assert len(figures["replicas"]) == 2
    assert "–" in text(figures) and "! /metrics: 404" in text(figures)


@pytest.mark.parametrize(
    "answers, said",
    [
        ({"v1_runs": "no json"}, "/v1/runs: the answer is no JSON; is this a gateway of ours?"),
        ({"v1_runs": {"a": 1}}, "/v1/runs: the answer has another form; is this a gateway of ours?"),
        ({"v1_weights": 503}, "/v1/weights: 503"),
        ({"v1_weights": 401}, "/v1/weights: 401; put a key with the scope `trainer` into ROLLOUT_API_KEY"),
        ({"v1_weights": httpx.ConnectError("no")}, "/v1/weights: no answer from http://gateway:8800 (ConnectError)"),
        ({"metrics": 'rollout_x{a="'}, "/metrics: the metrics cannot be read"),
        ({"ray": httpx.ReadTimeout("slow")}, "/ray: no answer from http://ray:1 (ReadTimeout)"),
    ],
)
def test_an_answer_that_fails_is_a_line_and_the_others_are_shown(
    watch: Callable[..., Watcher], answers: dict[str, Any], said: str
):
    figures = watch(Gateway(**answers)).look()
    (problem,) = figures["problems"]
    assert problem.startswith(said)
    assert said[:40] in text(figures) and "secret words" not in str(figures)


def test_an_answer_without_end_is_given_up(watch: Callable[..., Watcher], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(top, "MAX_BYTES", 100)
    assert "/metrics: the answer is larger than 0 MiB" in watch(Gateway()).look()["problems"]

    class Slow(Gateway):
        async def __call__(self, request: httpx.Request) -> httpx.Response:
            if request.url.path == "/metrics":
                await asyncio.sleep(60)
            return await super().__call__(request)

    monkeypatch.setattr(top, "MAX_BYTES", 10**6)
    monkeypatch.setattr(top, "ASK_SECONDS", 0.2)
    started = time.monotonic()
    figures = watch(Slow()).look()
    assert figures["problems"] == ["/metrics: no answer from http://gateway:8800 (TimeoutError)"]
    assert time.monotonic() - started < 10


def test_the_key_goes_to_the_gateway_and_to_nobody_else(watch: Callable[..., Watcher]):
    gateway = Gateway()
    watch(gateway, api_key="the key").look()
    sent = {request.url.path: request.headers.get("authorization") for request in gateway.asked}
    key = "Bearer the key"
    assert sent == {"/v1/runs": key, "/v1/weights": key, "/metrics": key, "/ray": None}


def test_runs_of_hostile_form_and_names_with_markup(watch: Callable[..., Watcher]):
    figures = watch(Gateway(v1_runs=[{"run": "[bold red]x[/]"}, {"x": 1}, 7, None])).look()
    assert [run["run"] for run in figures["runs"]] == ["[bold red]x[/]"]
    assert "[bold red]x[/]" in text(figures)


def test_many_rows_are_counted(watch: Callable[..., Watcher]):
    figures = watch(Gateway(v1_runs=[{"run": f"r{n}"} for n in range(30)])).look()
    assert len(figures["runs"]) == 30 and "and 6 more" in text(figures)


def test_rates_are_over_a_window_and_survive_a_restart():
    rates = Rates()
    assert rates.add(0.0, {"a": 0.0, "b": None}) == {"a": None, "b": None}
    assert rates.add(10.0, {"a": 100.0})["a"] == 10.0
    for at in range(20, 101, 10):
        told = rates.add(float(at), {"a": at * 20.0})
    assert told["a"] == 20.0, "the slow beginning has left the window"
    assert rates.add(110.0, {"a": 5.0})["a"] is None, "it began anew"
    for at in range(120, 200, 10):
        told = rates.add(float(at), {"a": 5.0 + (at - 110)})
    assert told["a"] == 1.0


def test_samples_that_are_no_numbers_are_unknown():
    samples = parse('rollout_a{x="1"} NaN\nrollout_a{x="2"} +Inf\nrollout_b 1\nother 5\n', "rollout_")
    assert samples.total("rollout_a") is None and samples.total("rollout_b") == 1.0
    assert samples.total("other") is None and Samples().by("rollout_a", "x") == {}


# Which cluster


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setenv("ROLLOUT_STATE_DIR", str(tmp_path))

    def save(name: str, **fields: Any) -> None:
        base = {
            "name": name, "cluster_id": "x", "address": "127.0.0.1:1", "config_path": "/c", "temp_dir": "",
            "log_file": "", "started_at": 0.0, "gateway": f"http://{name}:8800",
        }  # fmt: skip
        state.save(ClusterState(**(base | fields)))

    return save


def test_which_cluster_is_meant(known: Callable[..., None]):
    with pytest.raises(RolloutError, match="no cluster is known, or give --address"):
        choose(None, None)
    known("one", ray_metrics="http://127.0.0.1:9/metrics")
    assert choose(None, None) == Target("one", "http://one:8800", "http://127.0.0.1:9/metrics")
    known("two", gateway="")
    with pytest.raises(RolloutError, match=r"several clusters are known \(one, two\): name one"):
        choose(None, None)
    with pytest.raises(RolloutError, match="two has no gateway"):
        choose("two", None)
    with pytest.raises(RolloutError, match="no cluster is called 'six'; known are: one, two"):
        choose("six", None)
    assert choose(None, "https://far:1") == Target("far", "https://far:1")
    with pytest.raises(RolloutError, match="--address must be"):
        choose(None, "far:1")


# The command, in a process of its own


@pytest.fixture
def served() -> Iterator[str]:
    gateway = Gateway()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = gateway.answers.get(self.path)
            answer = answer() if callable(answer) else answer
            body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cluster", "top", *arguments]


def test_one_frame_as_json_and_as_text(served: str):
    done = subprocess.run(
        command("--address", served, "--once", "--json", "--every", "0.2"),
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["totals"]["tokens_per_s"] > 0
    done = subprocess.run(
        command("mine", "--address", served, "--once", "--every", "0.2"),
        cwd=ROOT, capture_output=True, text=True, timeout=60, env=os.environ | {"COLUMNS": "160"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("mine  http://127.0.0.1:")


def test_nobody_there_is_an_error():
    done = subprocess.run(
        command("--address", "http://127.0.0.1:9", "--once", "--every", "0.2"),
        cwd=ROOT, capture_output=True, text=True, timeout=60, env=os.environ | {"COLUMNS": "160"},
    )  # fmt: skip
    assert done.returncode == 1 and "nothing could be asked" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_the_terminal_as_it_was(served: str, end: signal.Signals):
    parent, child = pty.openpty()
    process = subprocess.Popen(
        command("--address", served, "--every", "0.2"), cwd=ROOT, stdin=child, stdout=child, stderr=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
    )  # fmt: skip
    os.close(child)
    shown = b""
    deadline = time.monotonic() + 60
    while b"worker-10" not in shown and time.monotonic() < deadline:
        shown += os.read(parent, 65536)
    assert b"\x1b[?1049h" in shown, "it shows frames on the other screen"
    started = time.monotonic()
    process.send_signal(end)
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:
            break
        shown += piece
        if not piece:
            break
    assert process.wait(20) == 0 and time.monotonic() - started < 10
    os.close(parent)
    assert shown.rstrip().endswith((b"\x1b[?25h", b"\x1b[?1049l")) and b"\x1b[?1049l" in shown
    assert process.stderr is not None and process.stderr.read() == b""
