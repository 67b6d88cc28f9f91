"""How a cluster of hundreds of engines behaves: the controller's and the workers' real decisions, in simulated time.

    python -m benchmarks.fleet --replicas 100 250 500 --sessions 50000

Real are the scheduler, the group books, the journal, delivery with leases (all that the controller does for a
session but Ray's calls), and the choice of a replica for each turn. Simulated are engines (a turn takes what its
tokens take at the replica's load), tools (a pause), and time itself; what a worker knows of a replica's load is as
old as it would be in its lane. So the figures say what the decisions cost and how evenly they spread work, not how
fast GPUs are.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import heapq
import json
import math
import random
import statistics
import tempfile
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors import journal_records as records
from actors.delivery import Delivery
from actors.engine_client import EngineClient
from actors.journal import Journal
from actors.messages import Collected, WorkerStats
from actors.routing import ReplicaLoad, choose_replica
from actors.rows import to_rows
from actors.run_service import RunService
from actors.run_store import RunStore
from actors.scheduler import Assignment, Scheduler
from actors.worker import COLLECT_S
from rollout.api import Batch, EnvironmentRef, LeaseRequest, RunRequest
from rollout.ledger import Segment
from rollout.limits import Limits
from rollout.sampling import Sampling
from rollout.tasks import Task
from rollout.trajectory import SessionKey, Trajectory

# Sessions that a worker plays at once, and sequences that an engine takes at once. Fewer than in configs/, so that
# 50,000 sessions fill 500 engines more than once.
SEATS = 64
GROUP = 8
STICKY_MARGIN = 4
# A lane without traffic says so often how loaded its replica is (deployments.engine).
REPORT_S = 1.0
# An engine of 8 B parameters on two H100, roughly: seconds a token alone, and more for each sequence beside it.
TOKEN_S, CROWD_S = 0.008, 0.00006
# The whole prompt anew at a replica that does not hold the prefix.
PREFILL_S = 0.4
MEAN_TURNS, MEAN_TOKENS, MEAN_TOOL_S = 4.0, 300.0, 1.0
# In the records alone: the journal's cost by size is measured elsewhere (benchmarks.journal).
TOKENS_IN_A_ROW = 256
LEASED_GROUPS = 256
ROUTING_ROUNDS = 500
RAMP = 0.15
"""Share of the time at both ends that is left out of the figures of balance."""


@dataclass
class Replica:
    """A SIMULATED engine."""

    running: int = 0
    queue: deque[tuple[float, Session]] = field(default_factory=deque)


@dataclass
class Session:
    """A session as its worker sees it."""

    assignment: Assignment
    worker: int
    turns_left: int
    held_by: str | None = None
    tokens: int = 0


@dataclass
class Worker:
    """What one session worker knows of the lanes."""

    own: dict[str, int]
    loads: dict[str, ReplicaLoad]
    """As EngineClient would make them for a turn; `told` are the reports in them."""
    told: dict[str, int]
    finished: list[Session] = field(default_factory=list)


@dataclass
class Figures:
    """What a simulation came to."""

    replicas: int
    workers: int
    sessions: int
    turns: int
    simulated_s: float
    controller_us_per_session: float
    """CPU of this process in the controller's part, the journal's thread included."""
    controller_sessions_per_s: float
    """That one core of the controller could do at most."""
    needed_sessions_per_s: float
    """That these engines finish."""
    routing_us_per_turn: float
    """That a worker spends on the choice of a replica, its look at all lanes included."""
    events_per_s: float
    """Of the simulation, per second of real time."""
    imbalance_mean: float
    """Of the busiest replica over the mean, minus 1, averaged over the seconds of the middle."""
    imbalance_p95: float
    spread: float
    """Standard deviation of replicas' loads over their mean, likewise."""
    prefix_hits: float
    """Share of later turns that went where their prefix is."""
    lanes: int
    idle_reports_per_s: int
    """Messages that the lanes send when nothing happens, in the whole cluster."""


class Fleet:
    """One simulation."""

    def __init__(self, replicas: int, sessions: int, seed: int, folder: Path) -> None:
        self._random = random.Random(seed)
        self._names = [f"replica-{number:04d}" for number in range(replicas)]
        self._replicas = {name: Replica() for name in self._names}
        # As many workers as the engines have seats for, as the configurations do it.
        self._workers = [
            Worker(
                dict.fromkeys(self._names, 0),
                {name: ReplicaLoad(0) for name in self._names},
                dict.fromkeys(self._names, 0),
            )
            for _ in range(replicas)
        ]
        self._sessions = sessions
        self._now = 0.0
        self._events: list[tuple[float, int, str, Any]] = []
        self._serial = 0
        self._controller_s = 0.0
        self._count = self._turns = self._later_turns = self._hits = 0
        self._loads: list[tuple[float, float, float]] = []
        self._template = Template()
        self._journal = Journal(folder / "fleet.sqlite", sync=False)
        self._scheduler = Scheduler(3)
        self._store = RunStore(self._journal, self._scheduler, cancel_sessions=lambda _: None, dispatch=lambda: None)
        defaults = RunRequest(
            environment=EnvironmentRef(path="m:E"), sampling=Sampling(), limits=Limits(), group_size=GROUP
        )
        self._service = RunService(self._store, defaults)
        self._delivery = Delivery(self._store, self._service)

    async def run(self) -> Figures:
        """Play all sessions and deliver them."""
        started = time.perf_counter()
        self._store.recover(records.recover(self._journal))
        await self._service.create(RunRequest(name="fleet"))
        for number in range(len(self._workers)):
            self._scheduler.add_worker(f"worker-{number}", SEATS)
        groups = math.ceil(self._sessions / GROUP)
        tasks = [
            Task(task_id=f"t{number}", messages=[{"role": "user", "content": f"Task {number}"}])
            for number in range(groups)
        ]
        for start in range(0, groups, 1000):
            await self._controller(self._service.submit("fleet", tasks[start : start + 1000]))
        self._dispatch()
        self._at(0.0, "second", None)
        delivered = 0
        while self._events:
            self._now, _, kind, what = heapq.heappop(self._events)
            self._count += 1
            match kind:
                case "turn":
                    self._turn(what)
                case "answer":
                    self._answer(*what)
                case "collect":
                    await self._collect(what)
                    delivered += await self._deliver(LEASED_GROUPS)
                case "second":
                    self._second()
        while delivered < groups:
            delivered += await self._deliver(1)
        await self._store.close()
        return self._figures(time.perf_counter() - started, groups * GROUP)

    # The controller

    async def _controller(self, work: Any) -> Any:
        """Do a part of the controller's work, and count its CPU."""
        before = time.process_time()
        try:
            return await work
        finally:
            self._controller_s += time.process_time() - before

    def _dispatch(self) -> None:
        before = time.process_time()
        found = self._scheduler.assign(self._service.admit)
        self._controller_s += time.process_time() - before
        for worker, assignments in found.items():
            number = int(worker.rpartition("-")[2])
            for assignment in assignments:
                turns = 1 + min(15, int(self._random.expovariate(1 / (MEAN_TURNS - 1))))
                # Not all in the same millisecond: prompts are rendered one after the other.
                self._at(self._random.random() * 0.2, "turn", Session(assignment, number, turns))

    async def _collect(self, number: int) -> None:
        worker = self._workers[number]
        finished, worker.finished = worker.finished, []
        collected = self._template.collected([session.assignment for session in finished])
        await self._controller(self._service.accept(f"worker-{number}", collected))
        self._dispatch()

    async def _deliver(self, least: int) -> int:
        book = self._store.runs["fleet"].book
        if book.accepted - book.delivered < least:
            return 0
        lease = LeaseRequest(groups=LEASED_GROUPS, min_groups=1, timeout=1.0)
        batch = await self._controller(self._delivery.lease("fleet", lease))
        assert isinstance(batch, Batch), batch
        await self._controller(self._delivery.acknowledge(batch.lease_id))
        return len(batch.groups)

    # Workers and engines

    def _turn(self, session: Session) -> None:
        worker = self._workers[session.worker]
        name = choose_replica(worker.loads, session.held_by, STICKY_MARGIN)
        assert name is not None
        self._turns += 1
        hit = session.held_by == name
        if session.held_by is not None:
            self._later_turns += 1
            self._hits += hit
        session.held_by = name
        worker.own[name] += 1
        _look(worker, name)
        replica = self._replicas[name]
        tokens = max(8, int(self._random.expovariate(1 / MEAN_TOKENS)))
        session.tokens += tokens
        work = (0.0 if hit else PREFILL_S, tokens)
        if replica.running < SEATS:
            self._serve(name, session, work)
        else:
            replica.queue.append((work[0], session))

    def _serve(self, name: str, session: Session, work: tuple[float, int]) -> None:
        replica = self._replicas[name]
        replica.running += 1
        seconds = work[0] + work[1] * (TOKEN_S + CROWD_S * replica.running)
        self._at(seconds, "answer", (name, session))

    def _answer(self, name: str, session: Session) -> None:
        replica, worker = self._replicas[name], self._workers[session.worker]
        replica.running -= 1
        worker.own[name] -= 1
        if replica.queue:
            prefill, waiting = replica.queue.popleft()
            self._serve(name, waiting, (prefill, max(8, int(self._random.expovariate(1 / MEAN_TOKENS)))))
        worker.told[name] = replica.running + len(replica.queue)
        _look(worker, name)
        session.turns_left -= 1
        if session.turns_left:
            self._at(self._random.expovariate(1 / MEAN_TOOL_S), "turn", session)
            return
        if not worker.finished:
            self._at(COLLECT_S, "collect", session.worker)
        worker.finished.append(session)

    def _second(self) -> None:
        loads = []
        for name, replica in self._replicas.items():
            load = replica.running + len(replica.queue)
            loads.append(load)
            # Every lane says so once a second, at least.
            for worker in self._workers:
                if worker.told[name] != load:
                    worker.told[name] = load
                    _look(worker, name)
        mean = statistics.fmean(loads)
        if mean > 1:
            self._loads.append((self._now, max(loads) / mean - 1, statistics.pstdev(loads) / mean))
        if self._events:
            self._at(REPORT_S, "second", None)

    def _at(self, seconds: float, kind: str, what: Any) -> None:
        self._serial += 1
        heapq.heappush(self._events, (self._now + seconds, self._serial, kind, what))

    def _figures(self, real_s: float, sessions: int) -> Figures:
        middle = [one for one in self._loads if RAMP * self._now <= one[0] <= (1 - RAMP) * self._now]
        uneven = sorted(one[1] for one in middle) or [0.0]
        controller = self._controller_s / sessions
        count = len(self._names)
        return Figures(
            replicas=count,
            workers=len(self._workers),
            sessions=sessions,
            turns=self._turns,
            simulated_s=round(self._now, 1),
            controller_us_per_session=round(1e6 * controller, 1),
            controller_sessions_per_s=round(1 / controller),
            needed_sessions_per_s=round(sessions / self._now),
            routing_us_per_turn=round(1e6 * routing_seconds(self._names), 1),
            events_per_s=round(self._count / real_s),
            imbalance_mean=round(statistics.fmean(uneven), 3),
            imbalance_p95=round(uneven[int(0.95 * (len(uneven) - 1))], 3),
            spread=round(statistics.fmean([one[2] for one in middle] or [0.0]), 3),
            prefix_hits=round(self._hits / max(1, self._later_turns), 3),
            lanes=count * len(self._workers),
            idle_reports_per_s=round(count * len(self._workers) / REPORT_S),
        )


def _look(worker: Worker, name: str) -> None:
    """In flight at a replica, as a lane says it: the worker's own, or what was last told, whichever is more."""
    worker.loads[name].in_flight = max(worker.own[name], worker.told[name])


def routing_seconds(names: Sequence[str]) -> float:
    """CPU of one choice, by the very code of a worker with a lane to each replica."""

    class Idle:
        """A STAND-IN for a lane."""

        broken = None
        version = 0

        def __init__(self, in_flight: int) -> None:
            self.in_flight = in_flight

    class Handle:
        """A STAND-IN for a Serve handle."""

        deployment_name = "engine"

    async def measure() -> float:
        client = EngineClient(Handle(), worker_id="w", sticky_margin=STICKY_MARGIN)
        lanes: dict[str, Any] = {name: Idle(number % SEATS) for number, name in enumerate(names)}
        client._lanes = lanes
        before = time.process_time()
        for number in range(ROUTING_ROUNDS):
            choose_replica(client.replicas, names[number % len(names)], STICKY_MARGIN)
        return (time.process_time() - before) / ROUTING_ROUNDS

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # The simulation's own event loop is running.
        return pool.submit(asyncio.run, measure()).result()


class Template:
    """Rows and summaries of finished sessions, all alike but for whose they are. Making them is the workers' part."""

    def __init__(self) -> None:
        count = TOKENS_IN_A_ROW
        segment = Segment(
            array("i", range(64)),
            array("i", range(count)),
            array("b", [1] * count),
            array("f", [-0.1] * count),
            array("i", [0] * count),
        )
        trajectory = Trajectory(SessionKey("", "", "", 0), [segment], "stop", [], reward=1.0)
        rows, (self._summary,) = to_rows([trajectory])
        self._row = pa.ipc.open_stream(rows).read_all()

    def collected(self, assignments: Sequence[Assignment]) -> Collected:
        """As a worker hands it in."""
        keys = [assignment.key for assignment in assignments]
        table = self._row.take([0] * len(keys))
        for name in ("run", "task_id", "group_id", "trajectory_id", "sample_index"):
            place = table.schema.get_field_index(name)
            values = pa.array([getattr(key, name) for key in keys], table.schema.field(place).type)
            table = table.set_column(place, table.schema.field(place), values)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        summaries = [
            replace(
                self._summary,
                run=key.run,
                group_id=key.group_id,
                sample_index=key.sample_index,
                attempt=assignment.attempt,
                first_row=row,
            )
            for row, (key, assignment) in enumerate(zip(keys, assignments, strict=True))
        ]
        return Collected(sink.getvalue().to_pybytes(), summaries, WorkerStats())


def simulate(replicas: int, sessions: int, seed: int = 0) -> Figures:
    """One simulation. Its journal is a temporary file."""
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        fleet = Fleet(replicas, sessions, seed, Path(folder))
        return asyncio.run(fleet.run())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line of JSON for each size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[100, 250, 500])
    parser.add_argument("--sessions", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    for replicas in given.replicas:
        print(json.dumps(vars(simulate(replicas, given.sessions, given.seed))), flush=True)


if __name__ == "__main__":
    main()
