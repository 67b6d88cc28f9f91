"""Rollouts for foreign trainers in the controller: taken, written down, handed to session workers, reported.

The book decides (actors.remote_book), the journal remembers, this room talks: to workers that play, to trainers that
wait, and to those that want to be called.

Invariant: whoever is told something can be told the same after a restart. A rollout whose worker or controller dies
is never played again: its trainer has seen calls of it; it ends as an error, and its trainer hears of that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from actors import journal_remote as records
from actors.remote_book import Entry, RemoteBook
from actors.remote_settings import RemoteSettings
from rollout.errors import NotFoundError, RefusedError, RolloutError, UnavailableError
from rollout.remote.failures import RemoteFailure
from rollout.remote.hosts import AllowedHosts, HostRefused
from rollout.remote.order import RolloutCounts, RolloutOrder, RolloutTicket
from rollout.remote.server_rollout import failed
from rollout.remote.trainer_client import TrainerBusy, TrainerClient
from rollout.remote.wire import RolloutResponse

logger = logging.getLogger(__name__)

# How often the book is looked through for what is due, stale or old, if nothing else wakes the loop.
TICK_S = 0.5
# A worker ends a rollout itself; this is for one that does not, beyond the most that it may take.
WORKER_MARGIN_S = 60.0
TOOLS_SECONDS = 60.0
# Callbacks that are under way at once, to all trainers and to one host: one that stalls must not hold up the others.
MAX_REPORTING, MAX_REPORTING_OF_HOST = 64, 16
# When the cluster is taken down, trainers are told of what is lost within so many seconds; those that cannot be are
# told when it comes back.
FAREWELL_SECONDS = 3.0
# Of these, what is under way may take so many to end when it is cancelled.
CANCEL_SECONDS = 0.5

_DIED = "the rollout's session worker died; its calls were seen by the trainer, so it is not played again"
_RESTARTED = "the rollout server was restarted during the rollout; it is not played again"
_STOPPED = "the rollout server was stopped during the rollout"
_TOO_LONG = "the rollout's session worker did not answer in time"

Write = Callable[..., Coroutine[Any, Any, None]]
"""Puts statements into the journal."""
Workers = Callable[[], Mapping[str, tuple[Any, int]]]
"""Actor handles of the session workers that take work, by name, with the sessions that each plays."""


class RemoteService:
    """Lives on the controller's event loop. `settings` None: this cluster is no rollout server."""

    def __init__(
        self,
        settings: RemoteSettings | None,
        *,
        write: Write,
        workers: Workers,
        make_client: Callable[[RolloutOrder, AllowedHosts], TrainerClient] | None = None,
        give_up: Callable[[Any], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`give_up`: ends a call to a worker. It and `make_client` are for tests."""
        self._settings = settings
        self._write = write
        self._workers = workers
        self._make_client = make_client or _client
        self._give_up = give_up or _cancel
        self._clock = clock
        given = settings or RemoteSettings(environment="")
        self._hosts = AllowedHosts(given.allowed_hosts)
        self._book = RemoteBook(
            max_concurrent=given.max_concurrent,
            max_queued=given.max_queued,
            queue_s=given.queue_seconds,
            keep_s=given.keep_seconds,
            report_s=given.report_seconds,
        )
        self._playing: dict[str, str] = {}
        self._ends: dict[str, asyncio.Event] = {}
        self._accepting: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None
        self._work = asyncio.Event()
        self._reporting: Counter[str] = Counter()
        self._tools: list[dict[str, Any]] | None = None
        self._stopping = False
        self.failure: BaseException | None = None
        """A bug, or a journal that cannot be written: nothing is taken any more."""

    # Start and end

    async def begin(self, found: list[Entry]) -> None:
        """Take up what the journal has, and begin. What was being played is lost, and says so."""
        if self._settings is None and not found:
            return
        await self._write(records.create())
        now = self._clock()
        for entry in self._book.restore(found, now):
            await self._end(entry, failed(entry.order, RemoteFailure("internal_error", _RESTARTED)))
        self._loop = asyncio.create_task(self._run())

    async def close(self) -> None:
        """End what is played, and tell trainers, within a few seconds."""
        self._stopping = True
        if self._loop is None:
            return
        self._loop.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                if tasks:
                    await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
                self._book.interrupted()
                for entry in self._book.running():
                    await self._end(entry, failed(entry.order, RemoteFailure("internal_error", _STOPPED)))
                # Failures stay due in the journal; here there is no time for them.
                due = self._book.due(self._clock())[:MAX_REPORTING]
                await asyncio.gather(*(self._report(entry) for entry in due), return_exceptions=True)
        except (TimeoutError, RolloutError):
            logger.warning("not all trainers could be told that their rollouts were stopped")

    # What the gateway asks (see rollout.remote.order.RemoteRollouts)

    async def accept(self, order: RolloutOrder) -> RolloutTicket:
        """Take an order; the same again joins the first."""
        self._check()
        try:
            self._hosts.check_listed(order.server_url)
        except HostRefused as failure:
            raise RefusedError(failure.message, "server_url") from None
        entry, new = self._book.accept(order, self._clock())
        name = entry.rollout_id
        if not new:
            if (accepting := self._accepting.get(name)) is not None:
                # The first one's order is on its way to the disk.
                await accepting.wait()
                self._book.get(name)
            if self._book.renew(name, order.api_key):
                await self._write(records.put(entry))
            return RolloutTicket(name, repeated=True)
        # Nothing starts before it is written down: `_start` leaves these alone.
        accepting = self._accepting[name] = asyncio.Event()
        try:
            await self._write(records.put(entry))
        except RolloutError:
            self._book.withdraw(name)
            raise
        finally:
            del self._accepting[name]
            accepting.set()
        self._work.set()
        return RolloutTicket(name)

    async def result(self, rollout_id: str, timeout: float) -> RolloutResponse | None:
        """How a rollout ended; None if it has not within `timeout` seconds."""
        self._check()
        entry = self._book.get(rollout_id)
        if entry.response is None or rollout_id in self._ends:
            ended = self._ends.setdefault(rollout_id, asyncio.Event())
            try:
                async with asyncio.timeout(timeout):
                    await ended.wait()
            except TimeoutError:
                return None
            if self.failure is not None:
                raise UnavailableError("the journal failed; nothing is told that a restart would not know")
        return entry.response

    async def tools(self) -> list[dict[str, Any]]:
        """The tools that rollouts are played with. Asked of a worker once."""
        self._check()
        if self._tools is None:
            worker = self._choose()
            if worker is None:
                raise UnavailableError("no session worker is there at this moment")
            try:
                async with asyncio.timeout(TOOLS_SECONDS):
                    self._tools = await self._workers()[worker][0].remote_tools.remote()
            except RolloutError:
                raise
            except Exception as failure:
                logger.warning("the tools of remote rollouts cannot be listed: %s", failure)
                raise UnavailableError("the environment's tools cannot be listed; the log says why") from None
        return self._tools

    async def counts(self) -> RolloutCounts:
        """How many there are."""
        self._check()
        return self._book.counts()

    # Inside

    def _check(self) -> None:
        if self._settings is None:
            raise NotFoundError("this cluster plays no remote rollouts; set remote_rollout.enabled in its config")
        if self._stopping or self.failure is not None:
            raise UnavailableError("the rollout server is being stopped" if self._stopping else "the journal failed")

    async def _run(self) -> None:
        """Starts, reports and forgets, until it is cancelled."""
        while True:
            try:
                self._start()
                await self._tidy()
            except Exception as failure:
                # Without this loop rollouts would wait for ever, in silence.
                logger.error("remote rollouts cannot go on", exc_info=failure)
                self.failure = failure
                return
            self._work.clear()
            try:
                async with asyncio.timeout(TICK_S):
                    await self._work.wait()
            except TimeoutError:
                pass

    def _start(self) -> None:
        while self._settings is not None and (entry := self._book.next_to_start()) is not None:
            worker = self._choose()
            if worker is None or entry.rollout_id in self._accepting:
                return
            self._book.start(entry.rollout_id, self._clock())
            self._playing[entry.rollout_id] = worker
            self._keep(self._play(entry, worker))

    async def _tidy(self) -> None:
        now = self._clock()
        for entry in self._book.stale(now):
            if entry.rollout_id not in self._accepting:
                await self._end(entry, self._book.overdue(entry))
        for entry in self._book.due(now):
            if self._reporting.total() >= MAX_REPORTING:
                break
            if self._reporting[entry.host] >= MAX_REPORTING_OF_HOST:
                continue
            self._reporting[entry.host] += 1
            self._book.reporting(entry.rollout_id)
            self._keep(self._report_counted(entry))
        gone = self._book.forgotten(now)
        if gone:
            await self._write(records.remove(gone))

    def _choose(self) -> str | None:
        """The worker with the least to do; None: there is none."""
        workers = self._workers()
        playing = list(self._playing.values())
        return min(workers, key=lambda name: workers[name][1] + playing.count(name), default=None)

    async def _play(self, entry: Entry, worker: str) -> None:
        assert self._settings is not None
        order, name = entry.order, entry.rollout_id
        try:
            # Before the trainer hears the first call of it, it is known that it may not be played again.
            await self._write(records.mark(entry))
            response = await self._played(order, worker, max(0.0, (entry.started_at or 0.0) - entry.accepted_at))
        finally:
            self._playing.pop(name, None)
        await self._end(entry, response)

    async def _played(self, order: RolloutOrder, worker: str, queue_s: float) -> RolloutResponse:
        assert self._settings is not None
        handle = self._workers().get(worker)
        if handle is None:
            return failed(order, RemoteFailure("internal_error", _DIED))
        reference = handle[0].play_remote.remote(order, queue_s)
        try:
            async with asyncio.timeout(self._settings.worker_seconds + WORKER_MARGIN_S):
                response: RolloutResponse = await reference
                return response
        except asyncio.CancelledError:
            self._give_up(reference)
            raise
        except TimeoutError:
            # The trainer hears that it has ended: it must not hear further calls of it.
            self._give_up(reference)
            return failed(order, RemoteFailure("internal_error", _TOO_LONG))
        except Exception as failure:
            # The worker, or the machine under it. Its own failures are answers.
            logger.warning("rollout %r was lost with %s: %s", order.rollout_id, worker, str(failure).splitlines()[:1])
            return failed(order, RemoteFailure("internal_error", _DIED))

    async def _end(self, entry: Entry, response: RolloutResponse) -> None:
        name = entry.rollout_id
        if not self._book.finish(name, response, self._clock()):
            return
        # From here until it is on disk there is an answer that nobody may hear yet.
        ended = self._ends.setdefault(name, asyncio.Event())
        try:
            await self._write(records.put(entry))
        except RolloutError as failure:
            self.failure = failure
            raise
        finally:
            self._ends.pop(name, None)
            ended.set()
            self._work.set()

    async def _report_counted(self, entry: Entry) -> None:
        try:
            await self._report(entry)
        finally:
            self._reporting[entry.host] -= 1
            if not self._reporting[entry.host]:
                del self._reporting[entry.host]

    async def _report(self, entry: Entry) -> None:
        """Tell a trainer of generation B how its rollout ended."""
        assert entry.response is not None
        name = entry.rollout_id
        client = self._make_client(entry.order, self._hosts)
        try:
            await client.completed(entry.response)
        except RemoteFailure as failure:
            final = failure.error_category in ("trainer_client_error", "validation_error", "internal_error")
            after = failure.after if isinstance(failure, TrainerBusy) else None
            if not final and self._book.unreported(name, self._clock(), failure.message, after):
                await self._write(records.mark(entry))
                return
            logger.warning("the trainer of rollout %r will not hear of its end: %s", name, failure.message)
            self._book.reported(name, self._clock(), failure.message)
        else:
            self._book.reported(name, self._clock())
        finally:
            await client.close()
        await self._write(records.put(entry))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._work.set()
        if not task.cancelled() and (failure := task.exception()) is not None:
            logger.error("a remote rollout could not be brought to its end", exc_info=failure)
            self.failure = failure


def _cancel(reference: Any) -> None:
    import ray

    try:
        ray.cancel(reference, force=False)
    except Exception as failure:
        # The worker is gone, or Ray is: then nothing is played any more.
        logger.warning("a rollout could not be taken back from its worker: %s", str(failure).splitlines()[:1])


def _client(order: RolloutOrder, hosts: AllowedHosts) -> TrainerClient:
    return TrainerClient(order.server_url, order.generation, hosts, api_key=order.api_key)
