"""The lag of an event loop: quantiles of the last minute, and that blocking is noticed."""

from __future__ import annotations

import asyncio
import time

import pytest

from actors import loop_lag
from actors.loop_lag import WINDOW, LoopLag


def with_samples(*samples: float) -> LoopLag:
    lag = LoopLag()
    lag._samples.extend(samples)
    return lag


def test_before_the_first_sample_there_is_no_lag():
    assert LoopLag().quantile(0.99) == 0.0


@pytest.mark.parametrize(("q", "value"), [(0.0, 1.0), (0.5, 3.0), (0.74, 3.0), (0.75, 4.0), (0.99, 4.0), (1.0, 4.0)])
def test_quantiles(q: float, value: float):
    assert with_samples(4.0, 2.0, 1.0, 3.0).quantile(q) == value


def test_only_the_last_minute_counts():
    lag = with_samples(99.0, *[0.5] * WINDOW)
    assert lag.quantile(1.0) == 0.5


async def test_a_blocked_loop_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop_lag, "INTERVAL_S", 0.01)
    lag = LoopLag()
    watching = asyncio.create_task(lag.watch())
    await asyncio.sleep(0)
    time.sleep(0.1)  # noqa: ASYNC251
    await asyncio.sleep(0.03)
    assert lag.quantile(1.0) >= 0.08
    assert min(lag._samples) >= 0.0
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
