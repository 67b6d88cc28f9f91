"""Who waits before a gate, for how long, and what they are told."""

from __future__ import annotations

import asyncio

import pytest

from actors.gate import Gate
from rollout.errors import RolloutError, UnavailableError


async def test_callers_wait_until_it_opens():
    gate = Gate(5.0, lambda: None, "did not open")
    waiting = [asyncio.create_task(gate.passed()) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert not gate.is_open and not any(task.done() for task in waiting)
    gate.open()
    async with asyncio.timeout(1):
        await asyncio.gather(*waiting)
        await gate.passed()
    assert gate.is_open


async def test_nobody_waits_for_ever():
    with pytest.raises(UnavailableError, match=r"^the controller did not open$"):
        await Gate(0.01, lambda: None, "did not open").passed()


async def test_a_failure_behind_it_is_told_to_everybody():
    broken: list[BaseException] = []
    gate = Gate(5.0, lambda: broken[0] if broken else None, "did not open")
    gate.open()
    await gate.passed()
    broken.append(IndexError("worker-3"))
    with pytest.raises(RolloutError, match="the controller failed: IndexError"):
        await gate.passed()
