"""An environment that only scores: it is set up for a task, sees the finished episode, and is closed.

Invariant: each of its methods has a deadline, what it raises is an EnvironmentError_ of its own session, and a
reward is a finite number that the record can hold, or None.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from typing import Any

from rollout.environment import Environment, EnvironmentFactory, Episode
from rollout.errors import EnvironmentError_, RolloutError
from rollout.tasks import Task
from rollout.tool_calls import run_anywhere

# The record keeps rewards as float32; a larger number would be stored as infinite.
MAX_REWARD = 3.4028234e38


class Scorer:
    """One session's environment, without its tools and replies."""

    def __init__(self, make: EnvironmentFactory, seconds: float) -> None:
        """`seconds`: deadline of each call into it."""
        self._make = make
        self._seconds = seconds
        self._environment: Environment | None = None
        self.spent_s = 0.0

    async def open(self, task: Task) -> None:
        """Make it and set it up. Raises EnvironmentError_."""
        try:
            self._environment = self._make()
        except RolloutError:
            raise
        except Exception as failure:
            raise EnvironmentError_(f"could not be made: {type(failure).__name__}: {failure}") from failure
        await self._ask("setup", task)

    async def reward(self, episode: Episode) -> float | None:
        """What it says of an episode. Raises EnvironmentError_."""
        return checked_reward("reward returned", await self._ask("reward", episode))

    async def close(self) -> None:
        """Release what it took. Raises EnvironmentError_."""
        if self._environment is not None:
            await self._ask("close")

    async def _ask(self, name: str, *arguments: Any) -> Any:
        environment = self._environment
        assert environment is not None, "open() comes first"
        if getattr(type(environment), name) is getattr(Environment, name):
            return None
        method = getattr(environment, name)
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self._seconds) as deadline:
                if inspect.iscoroutinefunction(method):
                    return await method(*arguments)
                return await run_anywhere(lambda: method(*arguments), {})
        except TimeoutError as failure:
            took = f"took longer than {self._seconds:g} s" if deadline.expired() else f"raised {failure!r}"
            raise EnvironmentError_(f"{name} {took}") from failure
        except RolloutError:
            raise
        except Exception as failure:
            raise EnvironmentError_(f"{name} raised {type(failure).__name__}: {failure}") from failure
        finally:
            self.spent_s += time.perf_counter() - started


def checked_reward(what: str, value: Any) -> float | None:
    """A reward as the record keeps it. Raises EnvironmentError_ for what is none; `what` begins its message."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise EnvironmentError_(f"{what} {type(value).__name__}, not a number or None") from None
    if not math.isfinite(number) or abs(number) > MAX_REWARD:
        raise EnvironmentError_(f"{what} {number}, which is no reward")
    return number
