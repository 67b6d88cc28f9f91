"""Weights in flight: one update at a time, to every replica, verified, and written down.

Invariant: a version becomes current only when at least one replica has read it back from every rank; before that it
is journaled as pending, so that its number is never used for anything else. Replicas that did not take it get no
sessions, are tried again, and are given up after MAX_FAILURES. A refused update changes nothing; one that is asked
for again by its number is not done again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from actors.metrics import Metrics
from actors.replica_board import BOARD
from actors.replica_health import ReplicaTable
from rollout.errors import ConflictError, EngineError, RefusedError, RolloutError, UnavailableError, WeightsRefused
from rollout.weights import ReplicaWeights, TransferSource, WeightReport, WeightSource

logger = logging.getLogger(__name__)

# Deadlines of one replica: reading headers; loading and reading back.
CHECK_SECONDS = 60.0
UPDATE_SECONDS = 600.0
DESCRIBE_SECONDS = 10.0
# How often replicas are looked at between updates.
RECONCILE_S = 2.0
READ_SECONDS = 60.0

ODD = "its checksums differ from those of the other replicas"

Checksums = tuple[tuple[int, str], ...]
Remember = Callable[[int, WeightSource, str], Awaitable[None]]
"""Write an update into the journal: version, source, state."""


class WeightKeeper:
    """Brings weights to all replicas of one engine deployment."""

    def __init__(
        self,
        handle: Any,
        remember: Remember,
        on_version: Callable[[int], None],
        metrics: Metrics | None = None,
        *,
        on_unfit: Callable[[frozenset[str]], None] = lambda _: None,
    ) -> None:
        """`handle`: Serve's. `on_version`: told when a version has become current. `metrics`: see RunStore.

        `on_unfit`: told which replicas get no sessions although they say that they carry the newest version.
        """
        self._handle = handle
        self._remember = remember
        self._on_version = on_version
        self._on_unfit = on_unfit
        self._unfit: frozenset[str] = frozenset()
        self._checksums: Checksums | None = None
        """What every replica must read back that loads the current version; None: not known."""
        self._metrics = metrics or Metrics()
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self.replicas = ReplicaTable()
        self.version = 0
        self.last_version = 0
        """The highest number given so far."""
        self.source: WeightSource | None = None
        """Where the current weights are; None: in the served model itself."""
        self.last_report: WeightReport | None = None
        BOARD.subscribe(handle.deployment_name, self._hear)

    def restore(self, version: int, source: WeightSource | None, last_version: int) -> None:
        """Go on from what the journal has."""
        self.version, self.source, self.last_version = version, source, max(last_version, version)
        self.replicas.current = version

    async def update(self, source: WeightSource, version: int | None = None) -> WeightReport:
        """Bring new weights to all replicas.

        Raises RefusedError (nothing has changed), ConflictError for a version that is not new, UnavailableError where
        there is no replica or none could take them (the old ones are still served). The current version from the same
        source once more is a trainer that did not hear the answer: it gets the report of what was done.
        """
        async with self._lock:
            started = time.monotonic()
            if version is not None and version == self.version and source == self.source:
                return await self._report()
            number = self.last_version + 1 if version is None else version
            if number <= self.last_version:
                raise ConflictError(
                    f"version {number} is not new: the last one was {self.last_version}; leave it out, or count on",
                    "version",
                )
            names = self.replicas.names()
            if not names:
                self._metrics.weights_failed(refused=True)
                raise UnavailableError("no engine replica is running")
            try:
                await self._check(names, source)
            except RolloutError:
                self._metrics.weights_failed(refused=True)
                raise
            self.last_version = number
            await self._remember(number, source, "pending")
            try:
                done, failed = await self._load(names, source, number)
            except BaseException:
                # They may go on loading: what they say now tells nothing of what they will carry.
                for name in names:
                    self.replicas.doubted(name)
                raise
            finally:
                self._tell_unfit()
            if not done:
                self._metrics.weights_failed(refused=False, replicas=len(failed))
                await self._remember(number, source, "failed")
                raise UnavailableError(
                    f"no replica took version {number}; version {self.version} is still served. {_reasons(failed)}"
                )
            await self._remember(number, source, "current")
            self.version, self.source, self._checksums = number, source, checksums(done[0])
            self.replicas.current = number
            self._on_version(number)
            self.last_report = WeightReport(
                version=number,
                seconds=time.monotonic() - started,
                pause_ms=max(replica.pause_ms for replica in done),
                replicas=done,
                failed=failed,
            )
            self._metrics.weights_updated(self.last_report)
            return self.last_report

    async def keep(self) -> None:
        """Bring replicas that carry other weights to the current ones, for ever."""
        while True:
            await asyncio.sleep(RECONCILE_S)
            if self._lock.locked():
                continue
            try:
                async with self._lock:
                    await self._round()
            except Exception:
                logger.exception("the replicas' weights could not be looked after; it is tried again")

    async def _round(self) -> None:
        await asyncio.gather(*(self._reconcile(name) for name in self.replicas.to_update()))
        self._tell_unfit()
        for name in self.replicas.to_give_up():
            # Serve may take it off its list while another one is given up.
            logger.warning("replica %s is given up: %s", name, self.replicas.status().get(name, {}).get("reason"))
            await self._call(name, "give_up", DESCRIBE_SECONDS, swallow=True)

    def close(self) -> None:
        """Stop listening."""
        BOARD.unsubscribe(self._handle.deployment_name, self._hear)

    async def _check(self, names: list[str], source: WeightSource) -> None:
        answers = await asyncio.gather(
            *(self._call(name, "check_weights", CHECK_SECONDS, source) for name in names), return_exceptions=True
        )
        refused = [answer for answer in answers if isinstance(answer, WeightsRefused)]
        if refused:
            raise RefusedError(f"the weights were refused, nothing has changed: {refused[0]}", "source")
        if all(isinstance(answer, BaseException) for answer in answers):
            raise UnavailableError(f"no replica could look at the weights: {answers[0]}")

    async def _load(
        self, names: list[str], source: WeightSource, version: int
    ) -> tuple[list[ReplicaWeights], dict[str, str]]:
        answers = await asyncio.gather(
            *(self._call(name, "update_weights", UPDATE_SECONDS, source, version) for name in names),
            return_exceptions=True,
        )
        done: dict[str, ReplicaWeights] = {}
        failed: dict[str, str] = {}
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, BaseException):
                failed[name] = f"{type(answer).__name__}: {answer}"
            else:
                done[name] = answer
        odd = odd_ones(done)
        for name in odd:
            del done[name]
            failed[name] = ODD
        for name, reason in failed.items():
            logger.warning("replica %s did not take version %d: %s", name, version, reason)
            self.replicas.failed(name, reason)
        for name in odd:
            self.replicas.doubted(name)
        for name in done:
            self.replicas.answered(name, version)
        return list(done.values()), failed

    async def _reconcile(self, name: str) -> None:
        """Ask a replica what it carries, and give it the current weights if they are others."""
        try:
            info = await self._call(name, "describe", DESCRIBE_SECONDS)
            doubtful = name in self.replicas.doubtful()
            if info.version != self.version or doubtful:
                if isinstance(self.source, TransferSource):
                    # What came over the wire is gone, and a restart would not bring it back: the next update does.
                    if not doubtful:
                        self.replicas.answered(name, info.version, info.address)
                    return
                if self.source is None:
                    # The served model's own weights come with a restart.
                    self.replicas.failed(name, f"it carries version {info.version} and cannot load {self.version}")
                    return
                loaded = await self._call(name, "update_weights", UPDATE_SECONDS, self.source, self.version)
                if self._checksums is not None and checksums(loaded) != self._checksums:
                    self.replicas.doubted(name)
                    self.replicas.failed(name, ODD)
                    return
            self.replicas.answered(name, self.version, info.address)
        except Exception as failure:
            self.replicas.failed(name, f"{type(failure).__name__}: {failure}")

    async def _call(self, name: str, method: str, seconds: float, *arguments: Any, swallow: bool = False) -> Any:
        handle = self._handle.options(session_id=name)
        try:
            async with asyncio.timeout(seconds):
                return await getattr(handle, method).remote(*arguments)
        except TimeoutError:
            failure: Exception = EngineError(f"replica {name} did not answer {method} within {seconds:g} s")
        except Exception as told:
            # Ray wraps what the replica raised in an exception whose text is a stack.
            cause = getattr(told, "cause", told)
            failure = cause if isinstance(cause, RolloutError) else EngineError(f"{type(told).__name__}: {told}")
        if not swallow:
            raise failure
        return None

    async def _report(self) -> WeightReport:
        """Of the current version: as it was made, or read back where that was before a restart of the controller."""
        if self.last_report is not None and self.last_report.version == self.version:
            return self.last_report
        names = self.replicas.names()
        answers = await asyncio.gather(
            *(self._call(name, "weights", READ_SECONDS) for name in names), return_exceptions=True
        )
        done: list[ReplicaWeights] = []
        failed: dict[str, str] = {}
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, BaseException):
                failed[name] = f"{type(answer).__name__}: {answer}"
            elif answer.version != self.version:
                failed[name] = f"it carries version {answer.version}"
            else:
                done.append(answer)
        return WeightReport(self.version, 0.0, 0.0, done, failed)

    def _tell_unfit(self) -> None:
        unfit = self.replicas.doubtful()
        if unfit != self._unfit:
            self._unfit = unfit
            self._on_unfit(unfit)

    def _hear(self, names: frozenset[str]) -> None:
        # The board calls from the router's thread.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._listed, names)

    def _listed(self, names: frozenset[str]) -> None:
        self.replicas.listed(names)
        self._metrics.replicas_listed(names)


def checksums(replica: ReplicaWeights) -> Checksums:
    """What each rank read back."""
    return tuple((rank.rank, rank.checksum) for rank in replica.ranks)


def odd_ones(replicas: dict[str, ReplicaWeights]) -> list[str]:
    """Replicas whose checksums are not those that most of them have."""
    kinds = {name: checksums(replica) for name, replica in replicas.items()}
    if len(set(kinds.values())) <= 1:
        return []
    usual, _ = Counter(kinds.values()).most_common(1)[0]
    return [name for name, kind in kinds.items() if kind != usual]


def _reasons(failed: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in failed.items())
