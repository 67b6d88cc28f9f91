"""Spans of sessions: their tree, what is in them and what is not, and that they cost nothing while they are off."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout import tracing
from rollout.correlation import correlation_id, enter_session
from rollout.errors import ConfigError
from rollout.tracing import MAX_TEXT_CHARS, TraceSettings
from tests.rollout.sessions import Adder, call, play, scripted

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = TraceSettings("demo", "http://127.0.0.1:1/v1/traces")


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    tracing.uninstall()


class Spans:
    """What was exported, so far."""

    def __init__(self, **settings: Any) -> None:
        memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
        self._exporter = memory.InMemorySpanExporter()
        tracing.install(TraceSettings("demo", SETTINGS.endpoint, **settings), "worker", "worker-0", self._exporter)

    def all(self) -> list[Any]:
        tracing._provider.force_flush()
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time)

    def tree(self) -> list[tuple[str, str | None]]:
        """Each span with its parent, in the order in which they began."""
        names = {span.context.span_id: span.name for span in self.all()}
        return [(span.name, span.parent and names[span.parent.span_id]) for span in self.all()]


async def test_the_spans_of_a_session(chat: Any):
    spans = Spans()
    engine = scripted(chat, call("add", '{"a": 2, "b": 3}') + "<|im_end|>", "It is 5.<|im_end|>")
    with tracing.span("session", task_id="t"):
        trajectory = await play(chat, engine)
    assert trajectory.stop_reason == "stop" and trajectory.reward == 1.0
    assert spans.tree() == [
        ("session", None),
        ("turn", "session"), ("engine", "turn"), ("tool", "turn"),
        ("turn", "session"), ("engine", "turn"),
        ("environment", "session"),
    ]  # fmt: skip
    first, turn, sampled, tool, _, _, scored = spans.all()
    segment = trajectory.segments[0]
    assert turn.attributes["rollout.turn"] == 0 and turn.attributes["rollout.tool_calls"] == 1
    assert sampled.attributes["gen_ai.usage.input_tokens"] == len(segment.prompt_ids)
    assert sampled.attributes["gen_ai.usage.output_tokens"] == segment.turns[0].end
    assert sampled.attributes["rollout.finish_reason"] == "stop" and sampled.attributes["rollout.policy_version"] == 0
    assert tool.attributes["gen_ai.tool.name"] == "add" and tool.attributes["rollout.outcome"] == "ok"
    assert scored.attributes["rollout.method"] == "reward"
    assert first.resource.attributes["service.instance.id"] == "worker-0"
    everything = str([dict(span.attributes) for span in spans.all()])
    assert "It is 5" not in everything and '"a"' not in everything, "what was said is in no span"


async def test_sessions_that_play_at_once_keep_their_spans_apart():
    spans = Spans()

    async def session(number: int) -> None:
        enter_session("run-1", f"run-1/t/{number}")
        token = correlation_id.set(f"id-{number}")
        with tracing.span("session"):
            await asyncio.sleep(0.001 * (3 - number))
            with tracing.span("turn"):
                await asyncio.gather(*(asyncio.create_task(one()) for _ in range(2)))
        correlation_id.reset(token)

    async def one() -> None:
        with tracing.span("tool"):
            await asyncio.sleep(0)

    await asyncio.gather(*(asyncio.create_task(session(number)) for number in range(3)))
    of: dict[str, set[int]] = {}
    for span in spans.all():
        of.setdefault(span.attributes["rollout.trajectory_id"], set()).add(span.context.trace_id)
        number = span.attributes["rollout.trajectory_id"][-1]
        assert (
            span.attributes["rollout.run"] == "run-1" and span.attributes["rollout.correlation_id"] == f"id-{number}"
        )
    assert len(spans.all()) == 12 and len(of) == 3
    assert all(len(traces) == 1 for traces in of.values()) and len(set.union(*of.values())) == 3


async def test_a_failure_marks_its_span_and_goes_on(chat: Any):
    class Failing(Adder):
        async def reward(self, episode: Any) -> float:
            raise RuntimeError("the scorer said api_key=abcdef123456")

    spans = Spans()
    engine = scripted(chat, call("nothing", "{}") + "<|im_end|>", "5<|im_end|>")
    with tracing.span("session") as session:
        trajectory = await play(chat, engine, Failing)
        session.set(error=trajectory.error)
    assert trajectory.stop_reason == "error"
    by_name = {span.name: span for span in spans.all()}
    for name in ("environment", "session", "tool"):
        assert by_name[name].status.status_code.name == "ERROR", name
    assert by_name["environment"].attributes["error.type"] == "RuntimeError"
    assert by_name["tool"].attributes["rollout.outcome"] == "unknown_tool"
    assert "abcdef123456" not in str([(s.attributes, s.status.description, s.events) for s in spans.all()])


def test_texts_are_bounded_and_none_is_left_out():
    spans = Spans()
    with tracing.span("tool", tool="x" * 10_000, note=None):
        pass
    (span,) = spans.all()
    assert len(span.attributes["gen_ai.tool.name"]) == MAX_TEXT_CHARS and "rollout.note" not in span.attributes


def test_a_share_of_the_sessions_is_traced_each_whole():
    spans = Spans(sample_ratio=0.3)
    for _ in range(300):
        with tracing.span("session"), tracing.span("turn"):
            pass
    names = [name for name, _ in spans.tree()]
    assert 40 < names.count("session") == names.count("turn") < 150
    spans = Spans(sample_ratio=0.0)
    with tracing.span("session"):
        pass
    assert spans.all() == []


def test_a_broken_tracer_harms_nothing(monkeypatch: pytest.MonkeyPatch):
    class Broken:
        def start_span(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("no")

    monkeypatch.setattr(tracing, "_tracer", Broken())
    with tracing.span("turn", turn=1) as span:
        span.set(output_tokens=3)


def test_a_collector_that_is_not_there_is_not_waited_for():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    tracing.install(SETTINGS, "worker")
    started = time.perf_counter()
    with tracing.span("session"):
        pass
    assert time.perf_counter() - started < 0.5
    tracing.uninstall()
    assert time.perf_counter() - started < 15.0
    assert not tracing.enabled()


def test_a_missing_package_is_a_clear_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"^tracing\.endpoint: needs .* `pip install opentelemetry-sdk "):
        tracing.install(SETTINGS, "worker")
    assert not tracing.enabled()
    tracing.install(None, "worker")


def test_off_it_does_nothing_and_imports_nothing():
    code = (
        "import sys\nfrom rollout import tracing\n"
        "with tracing.span('turn', turn=1) as span:\n    span.set(output_tokens=3)\n"
        "assert tracing.span('a') is tracing.span('b')\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_off_a_hook_costs_less_than_a_microsecond():
    def seconds() -> float:
        # Of this process alone, and the best of some: others work on this machine, too.
        started = time.process_time()
        for number in range(20_000):
            with tracing.span("turn", turn=number) as span:
                span.set(output_tokens=3)
        return (time.process_time() - started) / 20_000

    assert min(seconds() for _ in range(7)) < 1e-6
