"""The remote rollout protocol on the real cluster: in both roles, and against itself."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import httpx
import pytest
from aiohttp import web

from cluster.ports import free_ports
from rollout import Batch, Task
from tests.conftest import ROOT
from tests.integration.test_deaths import processes_called
from tests.remote_peers.chatml import ChatMl
from tests.remote_peers.trainer import PeerTrainer

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300, func_only=True)]

MODEL = ROOT / "examples" / "calculator" / "model"
SYSTEM = {"role": "system", "content": "You are a careful calculator. Use the tools, then answer with one number."}
QUESTION = [SYSTEM, {"role": "user", "content": "Work out 47 + 182."}]
SCRIPT = [
    'Adding.\n<tool_call>\n{"name": "add", "arguments": {"a": 47, "b": 182}}\n</tool_call><|im_end|>',
    "The answer is 229.<|im_end|>",
]


@pytest.fixture(scope="module")
def foreign() -> Iterator[str]:
    """The example's rollout server, in a process of its own."""
    (port,) = free_ports(1)
    server = subprocess.Popen(
        [
            *(sys.executable, ROOT / "examples" / "remote_rollout" / "server.py"),
            *("--port", str(port), "--tokenizer", MODEL, "--max-running", "128"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                if httpx.get(f"{address}/health", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        else:
            pytest.fail("the example's server did not start")
        yield address
    finally:
        server.terminate()
        server.wait(20)


def play(client, remote: str, generation: str, tasks: list[Task], path: str | None = None, **options):
    """A run that a foreign server plays. Returns its rows and its info."""
    environment = {"remote": remote, "generation": generation, **({"path": path} if path else {})}
    run = client.create_run(
        name=f"remote-{uuid.uuid4().hex[:8]}", environment=environment, group_size=4, **options
    ).run
    client.submit(run, tasks)
    rows = []
    while isinstance(batch := client.lease(run, len(tasks), timeout=120), Batch):
        rows += batch.table.to_pylist()
        client.acknowledge(batch)
    info = client.run_info(run)
    client.forget(run)
    return rows, info


@pytest.mark.parametrize("generation", ["A", "B"])
def test_a_foreign_server_plays_a_run_with_exact_tokens(http_client, player, tasks, foreign, generation):
    opened = [task.model_copy(update={"messages": [SYSTEM, *task.messages]}) for task in tasks[:8]]
    scorer = "examples.calculator.environment:Calculator" if generation == "A" else None
    rows, info = play(http_client, foreign, generation, opened, scorer)
    assert len({row["trajectory_id"] for row in rows}) == 32
    assert info.stop_reasons.get("error", 0) == 0, {row["error"] for row in rows}
    called = [row for row in rows if sum(turn["role"] == "assistant" for turn in row["turns"]) > 1]
    assert called, "no session called a tool"
    for row in rows:
        assert row["num_segments"] == 1, row["fork_reason"]
        assert all(
            (mask == 1) == (version >= 0)
            for mask, version in zip(row["response_mask"], row["policy_versions"], strict=True)
        )
        assert all(logprob <= 0 for logprob in row["logprobs"])
        assert row["response_mask"][0] == 1 and 1 in row["response_mask"]
    rewards = [row["reward"] for row in rows]
    assert all(reward in (0.0, 1.0) for reward in rewards) and 0 < sum(rewards) < 32


def test_a_foreign_server_that_refuses_costs_its_own_run_alone(http_client, player, tasks, foreign):
    rows, info = play(http_client, f"{foreign}/nowhere", "B", tasks[:2])
    assert {row["stop_reason"] for row in rows} == {"error"} and info.failures == 8
    assert all(row["error"] for row in rows)
    assert player.play(tasks[:2]).info.failures == 0


@pytest.mark.parametrize("generation", ["A", "A1", "B"])
async def test_an_independent_trainer_has_its_rollouts_played_here(cluster, generation):
    chat = ChatMl.of_file(str(MODEL / "tokenizer.json"))
    async with PeerTrainer(chat, SCRIPT, generation=generation) as trainer:
        report, rollout = await trainer.play(cluster.gateway, QUESTION, metadata={"answers": ["229"]})
    assert trainer.faults == []
    assert report["status"] == "COMPLETED" and report["finish_reason"] == "stop", report
    assert [message["role"] for message in report["final_messages"]] == [
        *("system", "user", "assistant", "tool", "assistant")
    ]
    assert report["final_messages"][3]["content"] == "229"
    assert report["metrics"]["num_llm_calls"] == 2 and report["metrics"]["num_tool_calls"] == 1
    assert len(rollout.response) == len(rollout.mask) and 0 in rollout.mask


def test_trainers_elsewhere_are_not_called(cluster):
    body = {
        "rollout_id": uuid.uuid4().hex,
        "server_url": "http://169.254.169.254/latest",
        "messages": QUESTION,
        "completion_params": {},
    }
    refused = httpx.post(f"{cluster.gateway}/v1/rollout/init", json=body, timeout=30)
    assert refused.status_code in (400, 403, 422), refused.text
    assert "allowed_hosts" in refused.text


# Of A what is A's own, its masks, and what takes no pauses of seconds; the rest is B's too.
OF_A = ("tools", "two_calls", "end_not_sampled", "tool_error", "max_tokens", "truncated", "server_error", "hang_up")


@pytest.mark.parametrize(("generation", "only"), [("A", OF_A), ("B", ())])
def test_the_cluster_passes_its_own_conformance_check(cluster, generation, only):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "cluster", "remote", "check", cluster.gateway),
            *("--generation", generation, "--tokenizer", str(MODEL)),
            *(part for scenario in only for part in ("--only", scenario)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_cluster_plays_with_itself(http_client, cluster, tasks):
    """Both roles at once: its own rollout server plays a run, and its own engines are the trainer."""
    rows, info = play(http_client, cluster.gateway, "A", tasks[:4], "examples.calculator.environment:Calculator")
    assert len({row["trajectory_id"] for row in rows}) == 16
    assert info.stop_reasons.get("error", 0) == 0, {row["error"] for row in rows}
    assert all(row["num_segments"] == 1 for row in rows)


class StallingTrainer(PeerTrainer):
    """Takes a call and does not answer it."""

    async def _complete(self, request: web.Request) -> web.Response:
        self.asked.set()
        await asyncio.sleep(60)
        return web.Response(status=500)


async def test_a_killed_worker_is_reported_to_the_trainer(cluster):
    """A rollout is never played twice behind its trainer's back: the crash is its end, and is told."""
    async with StallingTrainer(ChatMl.of_file(str(MODEL / "tokenizer.json")), SCRIPT, generation="B") as trainer:
        trainer.asked = asyncio.Event()
        playing = asyncio.create_task(trainer.play(cluster.gateway, QUESTION))
        await asyncio.wait_for(trainer.asked.wait(), 30)
        for process in await asyncio.to_thread(processes_called, cluster, "ray::SessionWorker"):
            os.kill(process.pid, signal.SIGKILL)
        report, _ = await asyncio.wait_for(playing, 60)
    assert report["status"] == "ERROR" and report["extra_fields"]["error_category"] == "internal_error"
