"""Helpers for tests that play sessions on the scripted engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollout.engine import FinishReason
from rollout.environment import Environment
from rollout.limits import Limits
from rollout.rendering import ChatRenderer
from rollout.sampling import Sampling
from rollout.session import Session
from rollout.tasks import Task
from rollout.testing.scripted_engine import Answer, ScriptedEngine
from rollout.token_model import TokenModel
from rollout.tools import tool
from rollout.trajectory import SessionKey, Trajectory

IM_END = "<|im_end|>"


@tool
async def add(a: int, b: int) -> str:
    """Add two numbers."""
    return str(a + b)


@tool
def negate(flag: bool) -> bool:
    """Negate a flag."""
    return not flag


class Adder(Environment):
    """Two tools, and a reward of 1 for an answer with 5 in it."""

    system_prompt = "Add."
    tools = (add, negate)

    async def reward(self, episode: Any) -> float:
        return float("5" in episode.answer)


def say(chat: ChatRenderer, text: str, finish: FinishReason = "stop") -> Answer:
    """An answer of the engine: the ids of a text, written out in full."""
    return chat.tokenizer.encode(text, add_special_tokens=False), finish


def call(name: str, arguments: str) -> str:
    """A tool call as the model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def scripted(chat: ChatRenderer, *turns: str | Answer, **options: Any) -> ScriptedEngine:
    """An engine that says these turns in order, to every session alike."""
    answers = [say(chat, turn) if isinstance(turn, str) else turn for turn in turns]
    return ScriptedEngine(lambda _prompt, _session, turn: answers[turn], **options)


def session(
    chat: ChatRenderer,
    engine: Any,
    environment: type[Environment] = Adder,
    *,
    messages: Sequence[dict[str, Any]] = ({"role": "user", "content": "2+3?"},),
    sampling: Sampling | None = None,
    index: int = 0,
    task_id: str = "t",
    **limits: Any,
) -> Session:
    """A session ready to run."""
    key = SessionKey("run", task_id, f"run/{task_id}", index)
    return Session(
        key,
        Task(task_id=task_id, messages=list(messages), metadata={"level": 1}),
        environment=environment,
        model=TokenModel(key, engine, chat, sampling or Sampling(max_tokens=64)),
        limits=Limits(**limits),
    )


async def play(*args: Any, **kwargs: Any) -> Trajectory:
    """Run one session."""
    return await session(*args, **kwargs).run()


def split(trajectory: Trajectory, segment: int = 0) -> tuple[list[int], list[int]]:
    """Ids with mask 1, and ids with mask 0, in order."""
    s = trajectory.segments[segment]
    pairs = list(zip(s.response_ids, s.response_mask, strict=True))
    return [token for token, mask in pairs if mask], [token for token, mask in pairs if not mask]
