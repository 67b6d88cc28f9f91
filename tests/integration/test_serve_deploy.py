"""The CPU overlay's serveConfigV2 on this machine, as KubeRay brings it up: engines come and go under load.

A Ray of its own, with a dashboard and a token, as the operator starts it; everything else goes over HTTP: the
configuration to Ray's dashboard, tasks and batches through the cluster's one address. The pods' paths, ports and
volumes are put here; nothing else is changed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster import state
from cluster.launch import log_tail
from cluster.ports import free_ports
from cluster.serve_app import SECRET_VARIABLE
from cluster.state import ClusterState
from rollout import NoBatch, RolloutClient
from rollout.limits import Limits
from rollout.sampling import Sampling
from rollout.tasks import Task, read_tasks
from tests.conftest import ROOT
from tests.integration.conftest import TASKS
from tests.integration.test_deaths import processes_called
from tests.k8s.manifests import HOME, built, cluster_file, serve_config

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(400, func_only=True)]

OVERLAY = "overlays/cpu-demo"
RAY_SECONDS = 90.0
READY_SECONDS = 150.0
SCALE_SECONDS = 120.0
END_SECONDS = 40.0
# Serve is asked every five seconds, and a text of the metrics is a second old at most.
BOARD_SECONDS = 20.0
# Groups that are submitted and not yet delivered, for as long as engines come and go.
AHEAD = 5
GROUP = 4
LIMITS = Limits(max_turns=3, engine_seconds=150, session_seconds=300)
LONG = Sampling(max_tokens=64, min_tokens=64, ignore_eos=True)


@dataclass
class Deployed:
    """A Ray that serves the overlay."""

    address: str
    """The front's."""
    dashboard: str
    headers: dict[str, str]
    """With Ray's token."""
    keys: dict[str, str]
    """API keys by the variable that holds them."""
    config: dict[str, Any]
    """serveConfigV2."""
    folder: Path
    env: dict[str, str]
    state: ClusterState
    """To know its processes by."""

    def deploy(self) -> None:
        """Hand serveConfigV2 to Ray's dashboard."""
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(self.config))
        self._serve("deploy", str(file))

    def shutdown(self) -> None:
        """End all applications."""
        self._serve("shutdown", "--yes")

    def applications(self) -> dict[str, Any]:
        """What Serve says of each application."""
        answer = httpx.get(f"{self.dashboard}/api/serve/applications/", headers=self.headers, timeout=20)
        answer.raise_for_status()
        return answer.json()["applications"]

    def engines(self) -> int:
        """Engine replicas that run."""
        replicas = self.applications()["engine"]["deployments"]["engine"]["replicas"]
        return sum(replica["state"] == "RUNNING" for replica in replicas)

    def expected(self) -> float:
        """Engines that the loading board waits for."""
        key = self.keys["ROLLOUT_SERVE_KEY"]
        answer = httpx.get(f"{self.address}/metrics", headers={"authorization": f"Bearer {key}"}, timeout=20)
        answer.raise_for_status()
        samples = [s for family in text_string_to_metric_families(answer.text) for s in family.samples]
        return next(s.value for s in samples if s.name == "rollout_loading_replicas_expected")

    def scale(self, engines: int) -> None:
        """Change the number of engines, as an edit of the RayService does."""
        (engine,) = [one for one in self.config["applications"] if one["name"] == "engine"]
        engine["deployments"][0]["num_replicas"] = engines
        self.deploy()

    def _serve(self, *words: str) -> None:
        command = [os.path.join(os.path.dirname(sys.executable), "serve"), *words, "--address", self.dashboard]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def until(what: str, seconds: float, check: Callable[[], bool], told: Callable[[], object] = lambda: "") -> None:
    """Wait for something. Fails with what was told last."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"{what} within {seconds} s: {told()}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def deployed() -> Iterator[Deployed]:
    """The overlay, ready; ended with all its processes."""
    # Short: Ray puts sockets below it.
    folder = Path(tempfile.mkdtemp(prefix="rollout-", dir="/tmp"))
    gcs, client, agent, dashboard, proxy, front, metrics = free_ports(7)
    token, cluster_id = secrets.token_hex(32), uuid.uuid4().hex
    keys = {f"ROLLOUT_{whose}_KEY": secrets.token_urlsafe(32) for whose in ("SERVE", "TRAINER", "ADMIN")}
    env = {
        **os.environ,
        **keys,
        SECRET_VARIABLE: secrets.token_urlsafe(48),
        state.ID_VARIABLE: cluster_id,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
    }
    # The only changes: paths, volumes and ports of the pods.
    file = folder / "cluster.yaml"
    text = cluster_file(built(OVERLAY)).replace(HOME, str(ROOT)).replace("/journal/", f"{folder}/journal/")
    text = text.replace("http://rollout:8800", f"http://127.0.0.1:{front}").replace("port: 8800", f"port: {front}")
    file.write_text(text.replace("host: 0.0.0.0", "host: 127.0.0.1"))
    config = serve_config(built(OVERLAY))
    config["http_options"] = {"host": "127.0.0.1", "port": proxy}
    for application in config["applications"]:
        application["args"]["config"] = str(file)
        if application["name"] == "controller":
            application["args"]["proxy_port"] = proxy
    command = [
        os.path.join(os.path.dirname(sys.executable), "ray"), "start", "--head", "--block",
        "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--ray-client-server-port={client}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}",
        "--include-dashboard=true", "--disable-usage-stats", "--num-cpus=16", "--object-store-memory=300000000",
        f"--temp-dir={folder}",
    ]  # fmt: skip
    with (folder / "ray.log").open("wb") as log:
        leader = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=folder, start_new_session=True
        )
    ours = ClusterState(
        "serve-deploy", cluster_id, f"127.0.0.1:{gcs}", "", str(folder), str(folder / "ray.log"), time.time(),
        session_id=leader.pid, session_started=psutil.Process(leader.pid).create_time(),
    )  # fmt: skip
    made = Deployed(
        f"http://127.0.0.1:{front}", f"http://127.0.0.1:{dashboard}", {"authorization": f"Bearer {token}"}, keys,
        config, folder, env, ours,
    )  # fmt: skip
    try:
        until(
            "Ray's dashboard answers",
            RAY_SECONDS,
            lambda: answers(f"{made.dashboard}/api/gcs_healthz"),
            lambda: log_tail(ours),
        )
        made.deploy()
        until(
            "all applications run",
            READY_SECONDS,
            lambda: {one["status"] for one in made.applications().values()} == {"RUNNING"},
            lambda: (
                {name: (one["status"], one["message"]) for name, one in made.applications().items()},
                log_tail(ours),
            ),
        )
        yield made
    finally:
        state.end_processes(ours)
        shutil.rmtree(folder, ignore_errors=True)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def listens(address: str) -> bool:
    url = httpx.URL(address)
    try:
        with socket.create_connection((url.host, url.port or 80), timeout=1):
            return True
    except OSError:
        return False


class Load:
    """Keeps a run busy, and counts what is delivered."""

    def __init__(self, client: RolloutClient, tasks: list[Task]) -> None:
        self.client = client
        self.tasks = tasks
        self.submitted = 0
        self.delivered: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.run = client.create_run(
            environment={"path": "playgrounds:SlowTalk"}, sampling=LONG, limits=LIMITS, group_size=GROUP
        ).run

    def keep_up(self) -> None:
        """Submit what is missing, take what is there."""
        missing = AHEAD - (self.submitted - len(self.delivered) // GROUP)
        if missing > 0:
            ids = range(self.submitted, self.submitted + missing)
            self.client.submit(
                self.run, [self.tasks[i % len(self.tasks)].model_copy(update={"task_id": f"t{i}"}) for i in ids]
            )
            self.submitted += missing
        self.take(0.5)

    def take(self, timeout: float) -> bool:
        """Take a batch. Whether the run is finished."""
        batch = self.client.lease(self.run, 64, min_groups=1, timeout=timeout)
        if isinstance(batch, NoBatch):
            return batch.finished
        for row in batch.table.select(["trajectory_id", "segment_index", "stop_reason"]).to_pylist():
            if row["segment_index"] == 0:
                self.delivered[row["trajectory_id"]] += 1
                self.endings[row["stop_reason"]] += 1
        self.client.acknowledge(batch)
        return False


def test_engines_come_and_go_under_load_and_nothing_is_lost(deployed: Deployed):
    """As an edit of num_replicas in the RayService: one engine, two, one again."""
    with RolloutClient(deployed.address, api_key=deployed.keys["ROLLOUT_TRAINER_KEY"]) as client:
        load = Load(client, read_tasks(TASKS))
        for engines in (2, 1):
            before = len(load.delivered)
            deployed.scale(engines)
            deadline = time.monotonic() + SCALE_SECONDS
            # Carrying the current weights is what the controller says of them, after it has asked each.
            while deployed.engines() != engines or len(client.weights()["replicas"]) != engines:
                assert time.monotonic() < deadline, (
                    client.weights(),
                    deployed.applications(),
                    log_tail(deployed.state),
                )
                load.keep_up()
            for _ in range(8):
                load.keep_up()
            assert len(load.delivered) > before, "the load went on meanwhile"
            until(
                "the loading board hears it",
                BOARD_SECONDS,
                lambda e=engines: deployed.expected() == e,
                deployed.expected,
            )
        deadline = time.monotonic() + SCALE_SECONDS
        while not load.take(2.0):
            assert time.monotonic() < deadline, client.run_info(load.run)
        info = client.run_info(load.run)
    assert len(load.delivered) == load.submitted * GROUP
    assert set(load.delivered.values()) == {1}, "each trajectory once"
    assert load.endings.keys() <= {"stop", "length", "max_turns"}, (load.endings, info)
    assert info.failures == 0 and info.workers_lost == 0


def test_the_address_speaks_openais_protocol_and_asks_for_keys(deployed: Deployed):
    body = {"model": "model", "messages": [{"role": "user", "content": "What is 2 + 3?"}], "max_tokens": 8}
    url = f"{deployed.address}/v1/chat/completions"
    assert httpx.post(url, json=body, timeout=60).status_code == 401
    for name in ("ROLLOUT_SERVE_KEY", "ROLLOUT_TRAINER_KEY"):
        answer = httpx.post(url, json=body, headers={"authorization": f"Bearer {deployed.keys[name]}"}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0
    agent = f"{deployed.address}/agents/calculator/v1/chat/completions"
    answer = httpx.post(
        agent,
        json={**body, "model": "calculator"},
        headers={"authorization": f"Bearer {deployed.keys['ROLLOUT_SERVE_KEY']}"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answers(f"{deployed.address}/ready"), "probes need no key"


def test_nothing_outlives_the_applications(deployed: Deployed):
    """The last test: controller, session workers and front end with what started them."""
    ours = ("SessionWorker", "ray::Controller", "LoadingBoard", "ray::Front", "haproxy", "VLLM::Worker")

    def left() -> list[str]:
        return [name for name in ours if processes_called(deployed.state, name)]

    assert set(left()) == set(ours), "they are found while they run"
    deployed.shutdown()
    until("everything has ended", END_SECONDS, lambda: not left() and not listens(deployed.address), left)
