"""The calculator environment: four exact tools, and a reward of 1 for the right numbers in the right order.

This is all that an environment needs to be. Name it in a config as `examples.calculator.environment:Calculator`.
"""

from __future__ import annotations

import re

from rollout import Environment, Episode
from rollout.calculator import calculator_tools

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class Calculator(Environment):
    """Arithmetic with tools. The task's `data.answers` lists the expected numbers as text."""

    system_prompt = "You are a careful calculator. Use the tools for every operation, then answer with one number."

    def __init__(self, max_delay_s: float = 0.0) -> None:
        """`max_delay_s`: the tools wait up to this many seconds, as slow ones would."""
        self.tools = calculator_tools(max_delay_s)

    async def reward(self, episode: Episode) -> float | None:
        """1 if the last turn names exactly the expected numbers in order, else 0; not scored without them."""
        expected = episode.task.data.get("answers")
        return None if expected is None else float(_NUMBER.findall(episode.answer) == expected)
