"""Log lines and spans of a session worker: each says which session it belongs to."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.messages import Collected, RunSpec, WorkerSettings
from actors.scheduler import Assignment
from actors.worker import SessionWorker
from rollout import logs, tracing
from rollout.limits import Limits
from rollout.logs import LogSettings, log_files
from rollout.sampling import Sampling
from rollout.tasks import Task
from rollout.tracing import TraceSettings
from rollout.trajectory import SessionKey
from tests.conftest import MODEL
from tests.rollout.sessions import Adder, scripted

environment_log = logging.getLogger("my_environment")


class Talking(Adder):
    """Says something in a log of its own, on the event loop and in a thread."""

    async def setup(self, task: Task) -> None:
        environment_log.info("set up %s", task.task_id)

    def close(self) -> None:  # type: ignore[override]
        environment_log.info("closed")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    logs.uninstall()
    tracing.uninstall()


class Engine:
    """A scripted engine with what a worker asks beside generations."""

    def __init__(self, inner: Any) -> None:
        self.generate, self.max_model_len = inner.generate, inner.max_model_len
        self.resends, self.replicas = 0, dict[str, Any]()

    def forget(self, session_id: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""


def worker(engine: Any, **fields: Any) -> SessionWorker:
    settings = WorkerSettings(
        model=str(MODEL), revision=None, renderer="auto", renderer_options={}, app="a", deployment="d",
        sticky_margin=4, mcp_servers={}, max_sessions=8, **fields,
    )  # fmt: skip
    made = SessionWorker("worker-7", settings)
    made._engine = Engine(engine)  # type: ignore[assignment]
    return made


async def played(made: SessionWorker, path: str, count: int) -> list[Collected]:
    spec = RunSpec("run-1", path, {}, Sampling(max_tokens=16), Limits())
    task = Task(task_id="t", messages=[{"role": "user", "content": "2+3?"}])
    keys = [SessionKey("run-1", "t", "run-1/t", index) for index in range(count)]
    await made.start(spec, [Assignment(key, task, 1) for key in keys])
    answers: list[Collected] = []
    while sum(len(answer.summaries) for answer in answers) < count:
        answers.append(await made.collect(10.0))
    await made.close()
    return answers


def entries(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in log_files(directory) for line in path.read_bytes().splitlines()]


async def test_lines_of_sessions_that_play_at_once(chat: Any, tmp_path: Path):
    settings = LogSettings("demo", level="debug", directory=str(tmp_path))
    made = worker(scripted(chat, "It is 5.<|im_end|>"), logging=settings)
    await played(made, f"{__name__}:Talking", 3)
    lines = [entry for entry in entries(tmp_path) if "trajectory_id" in entry]
    for index in range(3):
        mine = [entry for entry in lines if entry["trajectory_id"] == f"run-1/t/{index}"]
        assert [entry["message"].split()[0] for entry in mine] == ["set", "closed", "session"]
        assert {(e["run"], e["component"], e["instance"], e["cluster"]) for e in mine} == {
            ("run-1", "worker", "worker-7", "demo")
        }
        last = mine[-1]
        assert last["level"] == "debug" and last["message"].startswith("session ended with stop after ")
        assert "reward 1.0, " in last["message"]


async def test_a_session_that_fails_says_so_at_the_usual_level(chat: Any, tmp_path: Path):
    settings = LogSettings("demo", directory=str(tmp_path))
    await played(worker(scripted(chat), logging=settings), "no_such_module:Environment", 1)
    (line,) = [entry for entry in entries(tmp_path) if "trajectory_id" in entry]
    assert line["level"] == "warning" and line["trajectory_id"] == "run-1/t/0"
    assert "session ended with error" in line["message"] and "no_such_module" in line["message"]


async def test_the_spans_of_a_worker(chat: Any):
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    made = worker(scripted(chat, "It is 5.<|im_end|>"))
    tracing.install(TraceSettings("demo", "http://127.0.0.1:1/v1/traces"), "worker", "worker-7", memory)
    await played(made, f"{__name__}:Talking", 2)
    spans = memory.get_finished_spans()
    sessions = [span for span in spans if span.name == "session"]
    assert sorted(span.attributes["rollout.trajectory_id"] for span in sessions) == ["run-1/t/0", "run-1/t/1"]
    for span in sessions:
        assert span.parent is None and span.attributes["rollout.run"] == "run-1"
        assert (span.attributes["rollout.stop_reason"], span.attributes["rollout.reward"]) == ("stop", 1.0)
        assert span.attributes["gen_ai.usage.output_tokens"] > 0 and span.attributes["rollout.attempt"] == 1
        mine = {other.name for other in spans if other.context.trace_id == span.context.trace_id}
        assert mine == {"session", "turn", "engine", "environment"}
    assert not tracing.enabled(), "closing the worker has sent what was left"
