"""Environments of the integration tests, found by the workers through `pythonpath`."""

from __future__ import annotations

import asyncio
import time

from examples.calculator.environment import Calculator
from rollout import Environment, Episode, tool


@tool
async def add(a: float, b: float) -> str:
    """Add two numbers."""
    await asyncio.sleep(600)
    return "never"


@tool
def subtract(a: float, b: float) -> str:
    """Subtract b from a."""
    time.sleep(600)
    return "never"


@tool
async def multiply(a: float, b: float) -> str:
    """Multiply two numbers."""
    raise RuntimeError("the multiplier is broken")


@tool
def divide(a: float, b: float) -> str:
    """Divide a by b."""
    raise ValueError("so is the divider")


class Broken(Calculator):
    """The calculator's names, but its tools hang (async and sync) or raise."""

    def __init__(self) -> None:
        super().__init__()
        self.tools = [add, subtract, multiply, divide]


class Talk(Environment):
    """Three turns of conversation without tools."""

    def reply(self, episode: Episode) -> list[dict[str, str]] | None:
        """Go on twice."""
        return [{"role": "user", "content": "Go on."}] if len(episode.turns) < 3 else None

    def reward(self, episode: Episode) -> float:
        """Always 1."""
        return 1.0


class SlowTalk(Talk):
    """A second before each answer: on no machine does a session end sooner than two seconds."""

    async def reply(self, episode: Episode) -> list[dict[str, str]] | None:  # type: ignore[override]
        """Take time, then go on."""
        answer = super().reply(episode)
        if answer is not None:
            await asyncio.sleep(1)
        return answer


class Moody(Talk):
    """Fails for every third task: those sessions end as `error`, the others do not notice."""

    def setup(self, task: object) -> None:
        """Refuse some."""
        if int(task.task_id.rsplit("-", 1)[1]) % 3 == 0:  # type: ignore[attr-defined]
            raise RuntimeError("not this one")
