"""The board that loading replicas write on and gateways read from: it lives while the engines do not yet.

An engine replica answers nobody before its constructor is through, so the state is held here, beside it.

Invariant: the board waits for nobody. Reports are taken at once and in order, and a listener costs one sleeping call;
what it holds is bounded by `rollout.loading`, however long it lives and however many listen.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rollout.errors import UnavailableError
from rollout.loading import LoadingEvent, LoadingState, Snapshot

logger = logging.getLogger(__name__)

BOARD_NAME = "loading-board"
# For `ray.remote(LoadingBoard).options(**OPTIONS)`. Ray runs 1000 calls of an async actor at once by default, and
# each listener is a call that waits: beyond that, reports would queue behind them.
OPTIONS: dict[str, Any] = {
    "name": BOARD_NAME,
    "num_cpus": 0,
    "max_concurrency": 16_384,
    "max_restarts": -1,
    "max_task_retries": 0,
}
# Listeners beyond this are turned away, so that reports always find room.
MAX_LISTENERS = 8_192
# The longest that one `wait` lasts, in seconds; listeners ask again.
MAX_WAIT_S = 60.0
# Beyond the time that a call may take of itself.
CALL_SECONDS = 10.0


class LoadingBoard:
    """A Ray actor: the progress of all replicas of one engine deployment."""

    def __init__(self, expected: int = 1) -> None:
        """`expected`: replicas that must be ready. Raises ValueError below 1."""
        self._state = LoadingState(expected)
        self._news = asyncio.Event()
        self._listeners = 0

    async def expect(self, replicas: int) -> None:
        """So many must be ready from now on. Raises ValueError below 1."""
        if self._state.expect(replicas):
            self._wake()

    async def report(self, replica: str, events: list[dict[str, Any]]) -> None:
        """What a replica has to say; nothing: it lives. Raises ValueError for events that are none."""
        if self._state.report(replica, events):
            self._wake()

    async def forget(self, replica: str) -> None:
        """A replica was stopped on purpose."""
        self._state.forget(replica)

    async def wait(self, after: int, timeout: float) -> list[LoadingEvent]:
        """What is newer than an id, as soon as there is something; empty after `timeout` seconds without news.

        Raises UnavailableError where too many wait already.
        """
        if self._listeners >= MAX_LISTENERS:
            raise UnavailableError(f"{MAX_LISTENERS} listeners follow the loading already; try again later")
        self._state.forget_vanished()
        self._listeners += 1
        try:
            async with asyncio.timeout(min(timeout, MAX_WAIT_S)):
                while not (found := self._state.since(after)):
                    await self._news.wait()
                return found
        except TimeoutError:
            return []
        finally:
            self._listeners -= 1

    async def snapshot(self) -> Snapshot:
        """Everything that is known now."""
        return self._state.snapshot()

    def _wake(self) -> None:
        # Those who wait hold the old event; the next ones get a fresh one.
        self._news.set()
        self._news = asyncio.Event()


class BoardReader:
    """The board as a gateway sees it: `app.state.loading`. Every call has a deadline, and finds the board anew."""

    def __init__(self, namespace: str | None, find: Callable[[str, str | None], Any] | None = None) -> None:
        """`namespace`: the cluster's name; None: this driver's. `find`: ray.get_actor, or a double of it."""
        self._namespace = namespace
        self._find = find
        self._actor: Any = None

    async def snapshot(self) -> Snapshot:
        """Everything that is known now. Raises UnavailableError where there is no board, or it does not answer."""
        return await self._call("snapshot", CALL_SECONDS)

    async def wait(self, after: int, timeout: float) -> list[LoadingEvent]:
        """News after an id; empty after `timeout` seconds without. Raises UnavailableError."""
        return await self._call("wait", timeout + CALL_SECONDS, after, timeout)

    async def _call(self, method: str, seconds: float, *arguments: Any) -> Any:
        try:
            if self._actor is None:
                # Ray looks it up with a blocking call.
                self._actor = await asyncio.to_thread(_find(self._find), BOARD_NAME, self._namespace)
            async with asyncio.timeout(seconds):
                return await getattr(self._actor, method).remote(*arguments)
        except TimeoutError:
            reason = f"did not answer {method} within {seconds:g} s"
        except ValueError:
            reason = "does not exist; start a cluster with `rollout up`"
        except Exception as failure:
            # Ray wraps what the board raised.
            cause = getattr(failure, "cause", None)
            if isinstance(cause, UnavailableError):
                raise cause from None
            reason = f"cannot be asked: {type(failure).__name__}: {failure}"
        self._actor = None
        raise UnavailableError(f"the loading board {reason}")


class BoardReporter:
    """A replica's way to the board, from any thread. Loading never waits for it, nor fails with it."""

    def __init__(self, namespace: str | None, find: Callable[[str, str | None], Any] | None = None) -> None:
        """See BoardReader."""
        self._namespace = namespace
        self._find = find
        self._actor: Any = None
        self._told = False

    def __call__(self, replica: str, events: Iterable[Mapping[str, Any]]) -> None:
        """Send a report. What fails is logged once; the next report says everything again."""
        try:
            if self._actor is None:
                self._actor = _find(self._find)(BOARD_NAME, self._namespace)
            self._actor.report.remote(replica, [dict(event) for event in events])
        except Exception as failure:
            self._actor = None
            if not self._told:
                logger.warning("loading progress cannot be reported: %s: %s", type(failure).__name__, failure)
            self._told = True


def _find(given: Callable[[str, str | None], Any] | None) -> Callable[[str, str | None], Any]:
    if given is not None:
        return given
    import ray

    return ray.get_actor
