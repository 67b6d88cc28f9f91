"""Work that goes on although nobody waits for it.

Invariant: a change that has begun goes to its end, whoever goes away meanwhile: half of it in memory and half in the
journal would be told to the next caller as done. What fails with nobody to hear it is in the log.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

# Pauses between attempts: the first, and the longest.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
# An actor's call to itself is heard within milliseconds, or was lost.
UNHEARD_S = 1.0

T = TypeVar("T")

# The event loop itself holds tasks weakly.
_running: set[asyncio.Task[Any]] = set()


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises. A caller that is cancelled no longer waits for it; the work goes on."""
    task = asyncio.get_running_loop().create_task(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_unheard)
        raise


async def until_done(what: str, attempt: Callable[[], Awaitable[None]]) -> None:
    """Try until it succeeds, with growing pauses. `what`: the attempt in a few words, for the log."""
    pause = FIRST_PAUSE_S
    while True:
        try:
            await attempt()
            return
        except Exception:
            logger.exception("%s failed; it is tried again in %g s", what, pause)
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


async def repeatedly(seconds: float, what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Do it every so many seconds, for ever, whatever fails. `what`: the work in a few words, for the log."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception:
            logger.exception("%s failed; it is tried again in %g s", what, seconds)


def ask_oneself(call: Callable[[], Any], heard: threading.Event) -> None:
    """From an actor's `__init__`: call a method of its own, again until `heard` is set. Returns at once.

    Ray fails calls to an actor that the calling process holds for dead. News of the former process's death may reach
    the new one after its birth, and its call to itself is lost: observed in one of seven kills within 30 s.
    """

    def ask() -> None:
        while not heard.is_set():
            try:
                call()
            except Exception:
                logger.exception("a call to oneself failed; it is tried again in %g s", UNHEARD_S)
            heard.wait(UNHEARD_S)

    threading.Thread(target=ask, name="ask-oneself", daemon=True).start()


def _unheard(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (failure := task.exception()) is not None:
        logger.warning("a change failed after its caller had gone: %s: %s", type(failure).__name__, failure)
