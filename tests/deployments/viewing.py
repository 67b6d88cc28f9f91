"""A cluster to look at, in one process: a real run service with made-up trajectories behind a gateway's application.

The tokens are real ones of the demo model's tokenizer; what they say, and how sure of it the policy was, is made up.
"""

from __future__ import annotations

import asyncio
import json
import random
from array import array
from pathlib import Path
from typing import Any

from actors.messages import Collected, WorkerStats
from actors.rows import to_rows
from actors.scheduler import Assignment
from actors.viewer import Viewer
from rollout.api import LeaseRequest, RunInfo, RunRequest
from rollout.ledger import Segment, TurnSpan
from rollout.loading import LoadingEvent, Snapshot
from rollout.tasks import Task
from rollout.tool_calls import ToolCallRecord
from rollout.trajectory import SessionKey, StopReason, Timing, Trajectory
from tests.actors.service import WORKER, Service

MODEL = Path(__file__).resolve().parents[2] / "examples" / "calculator" / "model"
LONG_TOKENS = 10_000
"""Of the long trajectory's response, at least."""

_QUESTIONS = (
    "What is 17 times 23, and is the result prime?",
    "A train travels 120 km in 1.5 hours. How fast is it on average, in metres per second?",
    "Add up 2 + 4 + 8 + … + 1024 and explain the shortest way to do it.",
    "How many seconds are there in a leap year? Use the calculator, and check the result.",
    "Ein Kreis hat den Radius 7 cm. Wie groß ist seine Fläche?",
    "Three friends share a bill of 87.45 €; one pays twice as much as each of the others. Who pays what?",
)
_THOUGHTS = (
    "The numbers are small enough to be checked by hand, but the calculator is there to be used. I will split the "
    "problem into two steps and verify the second with the first.\n",
    "Let me think about the units first. Kilometres per hour become metres per second by a division by 3.6, so the "
    "order of the operations does not matter.\n",
)


def tokenizer() -> Any:
    """The demo model's, as the Rust library has it."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


class Writer:
    """Writes one trajectory turn by turn, messages and tokens alike."""

    def __init__(self, tok: Any, rng: random.Random, key: SessionKey, version: int) -> None:
        self.tok, self.rng, self.key, self.version = tok, rng, key, version
        self.messages: list[dict[str, Any]] = []
        self.segments: list[Segment] = []
        self.calls: list[ToolCallRecord] = []

    def ids(self, text: str) -> list[int]:
        return list(self.tok.encode(text, add_special_tokens=False).ids)

    def open(self, fork_reason: str | None = None) -> None:
        text = "".join(f"<|im_start|>{m['role']}\n{m.get('content') or ''}<|im_end|>\n" for m in self.messages)
        prompt = array("i", self.ids(text + "<|im_start|>assistant\n"))
        self.segments.append(Segment(prompt_ids=prompt, fork_reason=fork_reason))

    def _add(self, ids: list[int], sampled: bool, role: str, seconds: float) -> None:
        segment = self.segments[-1]
        start = len(segment.response_ids)
        segment.response_ids.extend(ids)
        segment.response_mask.extend([int(sampled)] * len(ids))
        segment.logprobs.extend([self._logprob() if sampled else 0.0 for _ in ids])
        segment.policy_versions.extend([self.version if sampled else -1] * len(ids))
        segment.turns.append(TurnSpan(role, start, start + len(ids), seconds))

    def _logprob(self) -> float:
        # Most tokens are certain, a few are not at all.
        return -self.rng.expovariate(8.0) if self.rng.random() < 0.85 else -self.rng.expovariate(0.6)

    def say(self, content: str, reasoning: str | None = None, call: dict[str, Any] | None = None) -> None:
        message: dict[str, Any] = {"role": "assistant", "content": content}
        text = f"<think>\n{reasoning}</think>\n\n{content}" if reasoning else content
        if reasoning:
            message["reasoning_content"] = reasoning
        if call:
            text += f"\n<tool_call>\n{json.dumps(call)}\n</tool_call>"
            message["tool_calls"] = [{"id": f"call_{len(self.calls)}", "type": "function", "function": call}]
        self.messages.append(message)
        self._add(self.ids(text + "<|im_end|>"), True, "assistant", 0.2 + len(text) / 900)

    def answer(self, name: str, content: str, seconds: float, error: str | None = None) -> None:
        self.calls.append(ToolCallRecord(name, error is None, seconds, error))
        call_id = f"call_{len(self.calls) - 1}"
        self.messages.append({"role": "tool", "content": content, "tool_call_id": call_id, "name": name})
        text = f"\n<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        self._add(self.ids(text), False, "tool", seconds)

    def done(self, stop: StopReason, reward: float | None, error: str | None = None) -> Trajectory:
        engine = sum(t.seconds for s in self.segments for t in s.turns if t.role == "assistant")
        tools = sum(call.seconds for call in self.calls)
        timing = Timing(
            self.rng.random(),
            engine,
            tools,
            0.05 + self.rng.random() / 5,
            engine + tools + 0.3 + self.rng.random() / 4,
        )
        metadata = {"level": self.rng.choice(["easy", "hard"]), "source": "made up"}
        return Trajectory(
            self.key,
            self.segments,
            stop,
            self.messages,
            reward,
            tool_calls=self.calls,
            timing=timing,
            error=error,
            metadata=metadata,
        )


def made_up(tok: Any, assignment: Assignment, version: int, seed: int) -> Trajectory:
    """One of several kinds of ending, as chance has it."""
    rng = random.Random(seed)
    writer = Writer(tok, rng, assignment.key, version)
    writer.messages.append({"role": "system", "content": "You are careful with numbers. Use the calculator."})
    writer.messages.extend(assignment.task.messages)
    kind = rng.random()
    if kind < 0.05:
        return Trajectory(assignment.key, [], "error", writer.messages, error="engine_died: the replica went away")
    writer.open()
    one, other = rng.randint(11, 99), rng.randint(11, 99)
    expression, product = f"{one} * {other}", one * other
    writer.say(
        "I will ask the calculator.",
        rng.choice(_THOUGHTS),
        {"name": "calculator", "arguments": {"expression": expression}},
    )
    if kind < 0.15:
        writer.answer("calculator", "Error: no answer within 5 s", 5.0, "timeout: no answer within 5 s")
        if rng.random() < 0.5:
            return writer.done("tool_error", 0.0)
    else:
        writer.answer("calculator", str(product), 0.004 + rng.random() / 20)
    if kind > 0.9:
        # The template drops the thinking of earlier turns once a user speaks again.
        writer.say(f"The product is {product}.")
        writer.messages.append({"role": "user", "content": "Are you sure? Please check it once more."})
        writer.version += 1
        for message in writer.messages:
            message.pop("reasoning_content", None)
        writer.open("qwen3 does not extend this history")
    if kind > 0.8 and kind < 0.9:
        writer.say("Let me list all the factors one after the other. " * 6)
        return writer.done("length", 0.0)
    writer.say(f"The result is {product}. ✓", rng.choice(_THOUGHTS))
    return writer.done("stop", rng.choice([0.0, 0.5, 1.0, 1.0]))


def long_one(tok: Any, assignment: Assignment, version: int) -> Trajectory:
    """Many turns, LONG_TOKENS and more, and weights that change in the middle."""
    rng = random.Random(5)
    writer = Writer(tok, rng, assignment.key, version)
    writer.messages.extend(
        [
            {"role": "system", "content": "You are an agent in a terminal. Work in small steps, and check each."},
            {"role": "user", "content": "Find out why the nightly job fails, repair it and say what it was."},
        ]
    )
    writer.open()
    turn = 0
    while len(writer.segments[-1].response_ids) < LONG_TOKENS:
        turn += 1
        writer.version = version + turn // 6
        command = rng.choice(["ls -la src", "cat src/job.py", "pytest -q tests", "grep -rn retry src", "git log -3"])
        writer.say(f"Step {turn}.", rng.choice(_THOUGHTS) * 2, {"name": "shell", "arguments": {"command": command}})
        lines = "".join(
            f"{number:4d}  def step_{number}(value): return value * {rng.randint(2, 99)}\n"
            for number in range(rng.randint(4, 16))
        )
        failed = rng.random() < 0.15
        writer.answer("shell", lines, rng.random() * 2, "exception: exit status 1" if failed else None)
    writer.say("The job failed because its retry never ended. It now gives up after three attempts.")
    return writer.done("stop", 1.0)


class Shown:
    """A backend over a service in this process, with what the viewer asks for."""

    def __init__(self, service: Service) -> None:
        self.service = service
        viewer = Viewer(service.store)
        self.trajectories, self.trajectory, self.history = viewer.trajectories, viewer.trajectory, viewer.history
        self.watch = service.runs.watch

    async def run_info(self, run: str) -> RunInfo:
        return self.service.runs.info(run)

    async def runs(self) -> list[RunInfo]:
        return self.service.runs.runs()

    async def weights(self) -> dict[str, Any]:
        healthy = {"health": "healthy", "version": self.service.store.version, "reason": None}
        return {
            "version": self.service.store.version,
            "source": None,
            "replicas": {f"rollout#engine#{name}": dict(healthy) for name in ("a1b2", "c3d4")},
            "last_update": None,
        }


class StillLoading:
    """A board on which one replica of two is ready and one is half-way."""

    def __init__(self) -> None:
        rank = {"stage": "loading_to_vram", "device": "cuda", "layers_total": 36, "bytes_total": 8_000_000_000}
        ranks = [
            {**rank, "replica": "engine#c3d4", "rank": r, "layers_loaded": 19 - r, "vram_mb": 4100.0 - 90 * r,
             "bytes_read": 4_300_000_000 - r * 90_000_000}
            for r in range(2)
        ]  # fmt: skip
        self.events = [LoadingEvent(number + 1, event) for number, event in enumerate(ranks)]

    async def snapshot(self) -> Snapshot:
        return Snapshot("loading", 2, 1, self.events)

    async def wait(self, after: int, timeout: float) -> list[LoadingEvent]:
        await asyncio.sleep(timeout)
        return []


async def fill(service: Service, *, tasks: int = 24, group_size: int = 4) -> None:
    """Two runs with what a viewer should show: all endings, forks, versions, delivered and dropped groups."""
    tok = tokenizer()
    seed = 0

    def questions(count: int, start: int = 0) -> list[Task]:
        return [
            Task(
                task_id=f"question-{number:03d}",
                messages=[{"role": "user", "content": _QUESTIONS[number % len(_QUESTIONS)]}],
            )
            for number in range(start, start + count)
        ]

    await service.runs.create(
        RunRequest.model_validate(
            {"name": "calculator-grpo", "group_size": group_size, "filters": {"drop_zero_variance": True}}
        )
    )
    await service.runs.submit("calculator-grpo", questions(tasks))
    begun = service.start()
    size = max(1, len(begun) // 6)
    for part in range(0, len(begun), size):
        piece = begun[part : part + size]
        version = service.store.version
        made = []
        for assignment in piece:
            seed += 1
            made.append(made_up(tok, assignment, max(0, version - seed % 2), seed))
        await finish(service, made)
        service.runs.set_version(version + 1)
    batch = await service.delivery.lease("calculator-grpo", LeaseRequest(groups=tasks // 3, min_groups=1, timeout=0))
    await service.delivery.acknowledge(batch.lease_id)  # type: ignore[union-attr]
    await service.delivery.lease("calculator-grpo", LeaseRequest(groups=3, min_groups=1, timeout=0))
    await service.runs.submit("calculator-grpo", questions(10, tasks))
    service.start()
    await service.runs.create(RunRequest.model_validate({"name": "terminal-agent", "group_size": 1}))
    await service.runs.submit(
        "terminal-agent", [Task(task_id="nightly/../job", messages=[{"role": "user", "content": "?"}])]
    )
    (assignment,) = service.start()
    await finish(service, [long_one(tok, assignment, service.store.version)])


async def finish(service: Service, made: list[Trajectory]) -> None:
    """Hand trajectories in, as a worker would."""
    for trajectory in made:
        service.held.pop(trajectory.key.trajectory_id, None)
    rows, summaries = to_rows(made)
    await service.runs.accept(WORKER, Collected(rows, summaries, WorkerStats()))
