"""How late an event loop is: the first sign of CPU work that does not belong on it."""

from __future__ import annotations

import asyncio
from collections import deque

# A sample every INTERVAL_S; WINDOW of them are one minute.
INTERVAL_S = 0.1
WINDOW = 600


class LoopLag:
    """Measures how much later than asked a sleeping task wakes up."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=WINDOW)

    async def watch(self) -> None:
        """Measure for ever; run it as a task."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self._samples.append(max(0.0, loop.time() - due))

    def quantile(self, q: float) -> float:
        """Seconds of lag at quantile `q` of the last minute; 0 before the first sample."""
        if not self._samples:
            return 0.0
        ordered = sorted(self._samples)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
