"""A gate: callers wait before it until what they need is there.

Invariant: nobody waits longer than its deadline, and nobody passes while a bug has ended what works behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rollout.errors import RolloutError, UnavailableError


class Gate:
    """Closed until `open`. Lives on one event loop."""

    def __init__(self, seconds: float, failure: Callable[[], BaseException | None], late: str) -> None:
        """`seconds`: how long callers wait. `failure`: what went wrong behind it. `late`: what is told afterwards."""
        self._seconds = seconds
        self._failure = failure
        self._late = late
        self._opened = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether callers pass at once."""
        return self._opened.is_set()

    def open(self) -> None:
        """Let everybody pass, from now on."""
        self._opened.set()

    async def passed(self) -> None:
        """Wait until it is open. Raises UnavailableError after `seconds`, and RolloutError with the failure."""
        if not self._opened.is_set():
            try:
                async with asyncio.timeout(self._seconds):
                    await self._opened.wait()
            except TimeoutError:
                raise UnavailableError(f"the controller {self._late}") from None
        if (failure := self._failure()) is not None:
            raise RolloutError(f"the controller failed: {failure!r}")
