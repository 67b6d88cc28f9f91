"""A TEST DOUBLE of everything behind the gateway: answers at once, to some names with a refusal."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from actors.agent_book import AddedAgents
from deployments.gateway import make_app
from rollout.agents import AgentRegistry
from rollout.agents.spec import NamedAgent
from rollout.api import (
    Acknowledged,
    Batch,
    CapturedSession,
    LeaseRequest,
    NoBatch,
    OpenedSession,
    RunInfo,
    RunRequest,
    Submitted,
)
from rollout.errors import ConflictError, NotFoundError, RefusedError
from rollout.ledger import Segment, TurnSpan
from rollout.loading import LoadingState
from rollout.record import to_table
from rollout.trajectory import SessionKey, Trajectory
from rollout.viewing import History, Sibling, TrajectoryPage, TrajectoryQuery, TrajectoryRows, TrajectorySummary
from rollout.weights import RankWeights, ReplicaWeights, WeightReport
from tests.rollout.agents.scripted_chat import agent, say
from tests.rollout.test_inference import ScriptedCompletions, chunk

KNOWN = "r"
"""The run, session, lease and trajectory that there is. Every other name is unknown."""


def _known(name: str, what: str) -> None:
    # A tenth or so of what a generator makes up; the rest is refused as a real controller would.
    if name != KNOWN and len(name) != 1:
        raise NotFoundError(f"there is no {what} {name[:50]!r}", what)


def _trajectory() -> Trajectory:
    segment = Segment(
        array("i", [1, 2]), array("i", [3]), array("b", [1]), array("f", [-0.5]), array("i", [4]),
        [TurnSpan("assistant", 0, 1, 0.5)],
    )  # fmt: skip
    return Trajectory(SessionKey(KNOWN, "t", "r/t", 0), [segment], "stop", [{"role": "user", "content": "?"}], 1.0)


def _summary() -> TrajectorySummary:
    return TrajectorySummary(
        1, "r/t/0", KNOWN, "t", "r/t", 0, "ready", None, None, "stop", 1.0, 1, 1, 1, 0, 0, 1, 0, [(4, 1)]
    )


# Made here: the first table of a process takes a second or more.
_TABLE = to_table([_trajectory()])


class Canned:
    """Implements what routes ask of `app.state.backend`."""

    async def create_run(self, request: RunRequest) -> RunInfo:
        if request.group_size == 13:
            raise ConflictError("there is such a run already, and it is another", "name")
        return self._info(request.name or KNOWN)

    async def submit(self, run: str, tasks: Sequence[Any]) -> Submitted:
        _known(run, "run")
        return Submitted(len(tasks), 0)

    async def lease(self, run: str, request: LeaseRequest) -> Batch | NoBatch:
        _known(run, "run")
        if request.groups % 2:
            return NoBatch(False, 0, 1, 0, 0, "nothing is ready")
        return self._batch()

    async def fetch(self, lease_id: str) -> Batch:
        _known(lease_id, "lease")
        return self._batch()

    async def acknowledge(self, lease_id: str) -> Acknowledged:
        _known(lease_id, "lease")
        return Acknowledged(lease_id, 1)

    async def extend(self, lease_id: str, ttl: float) -> float:
        _known(lease_id, "lease")
        return 1e9 + ttl

    async def release(self, lease_id: str) -> None:
        _known(lease_id, "lease")

    async def pause(self, run: str, paused: bool) -> RunInfo:
        return await self.run_info(run)

    async def cancel(self, run: str) -> RunInfo:
        return await self.run_info(run)

    async def forget(self, run: str) -> None:
        _known(run, "run")

    async def run_info(self, run: str) -> RunInfo:
        _known(run, "run")
        return self._info(run)

    async def runs(self) -> list[RunInfo]:
        return [self._info(KNOWN)]

    async def watch(self, run: str, timeout: float) -> RunInfo:
        return await self.run_info(run)

    async def update_weights(self, source: Any, version: int | None) -> WeightReport:
        if version == 1:
            raise RefusedError("the weights were refused", "source")
        return WeightReport(version or 4, 0.5, 20.0, [ReplicaWeights("a", 4, [RankWeights(0, "ff")])], {"b": "slow"})

    async def weights(self) -> dict[str, Any]:
        return {
            "version": 3,
            "source": None,
            "replicas": {"a": {"health": "healthy", "version": 3, "reason": None}},
            "last_update": None,
        }

    async def metrics_text(self) -> bytes:
        return b"# TYPE x counter\n"

    async def open_session(self, run: str, task: Any, limits: Any) -> OpenedSession:
        _known(run, "run")
        return OpenedSession(KNOWN, "r/t/0", "ses_key")

    async def session_info(self, session: str) -> CapturedSession:
        _known(session, "session")
        return CapturedSession(session, "r/t/0", "open", [], 0, None, None, None, None)

    async def reward_session(self, session: str, reward: Any, turn_rewards: Any) -> CapturedSession:
        return await self.session_info(session)

    async def close_session(self, session: str, cancel: bool) -> CapturedSession:
        return await self.session_info(session)

    async def trajectories(self, run: str | None, query: TrajectoryQuery) -> TrajectoryPage:
        _known(run or KNOWN, "run")
        return TrajectoryPage([_summary()], 1, 1, 1, [4])

    async def trajectory(self, trajectory_id: str) -> TrajectoryRows:
        _known(trajectory_id, "trajectory")
        return TrajectoryRows(_summary(), _TABLE, [Sibling("r/t/0", 0, "stop", 1.0)])

    async def history(self, run: str) -> History:
        raise NotFoundError(f"nothing is known of run {run[:50]!r}", "run")

    # Remote rollouts: this cluster plays none.

    async def remote_tools(self) -> list[Any]:
        raise RefusedError("this cluster plays no rollouts for others", None)

    async def remote_accept(self, order: Any) -> Any:
        raise RefusedError("this cluster plays no rollouts for others", None)

    async def remote_counts(self) -> Any:
        raise RefusedError("this cluster plays no rollouts for others", None)

    def _info(self, run: str) -> RunInfo:
        return RunInfo(run, "running", "m:E", 2, submitted=1, delivered=1, dropped={"too old": 0})

    def _batch(self) -> Batch:
        return Batch("lease-1", KNOWN, _TABLE, ["r/t"], 60.0, 4)


class CannedAgents:
    """The controller's side of added agents."""

    def __init__(self) -> None:
        self.agents: dict[str, NamedAgent] = {}
        self.version = 1

    async def added_agents(self, known: int | None) -> AddedAgents | None:
        return None if known == self.version else self._now()

    async def add_agent(self, agent: NamedAgent) -> AddedAgents:
        self.agents[agent.name] = agent
        self.version += 1
        return self._now()

    async def remove_agent(self, name: str) -> AddedAgents:
        if name not in self.agents:
            raise NotFoundError(f"no agent called {name[:50]!r} was added", "name")
        del self.agents[name]
        self.version += 1
        return self._now()

    def _now(self) -> AddedAgents:
        return AddedAgents(self.version, tuple(self.agents.values()))


class Talkative:
    """A chat engine that gives every question the same answer."""

    async def stream(self, body: dict[str, Any]) -> Any:
        for part in say("an", "swer"):
            yield part


class Board:
    """Loading that has ended."""

    def __init__(self) -> None:
        # A clock that stands: replicas that give no sign are forgotten.
        self.state = LoadingState(1, clock=lambda: 0.0)
        figures = {"layers_loaded": 1, "layers_total": 1, "vram_mb": 1.0, "bytes_read": 1, "bytes_total": 1}
        self.state.report("a", [{"stage": "loading_to_vram", "rank": 0, "device": "cpu", **figures}])
        self.state.report("a", [{"stage": "ready"}])

    async def snapshot(self) -> Any:
        return self.state.snapshot()

    async def wait(self, after: int, timeout: float) -> Any:
        return self.state.since(after)


def application(**options: Any) -> Any:
    """A whole gateway that answers at once."""
    backend: Any = Canned()
    given: dict[str, Any] = {
        "board": Board(),
        "agents": AgentRegistry([agent()]),
        "chat": Talkative(),
        "completions": ScriptedCompletions(chunk("a", [1]), chunk("b", [2], "stop")),
        "agent_keeper": CannedAgents(),
    }
    return make_app(lambda: backend, 1_000_000, **(given | options))
