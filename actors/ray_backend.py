"""The batch rollout API inside the cluster: calls to the controller actor, batches through Ray's object store.

Invariant: a batch's arrays are not copied on the way: Ray maps the sealed object into the trainer's memory. While the
controller is being started again, calls wait and are repeated, each idempotent on the other side. Only looks, which
change nothing, may be told to fail at once: people and probes ask again by themselves, and want to know why. A caller
that goes away ends what only waits, never a change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from actors.agent_book import AddedAgents
from rollout.agents.held_turns import HeldTurn
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
from rollout.capture.calls import CapturedCall
from rollout.capture.session_book import CaptureLimits
from rollout.errors import RolloutError, UnavailableError
from rollout.remote.order import RolloutCounts, RolloutOrder, RolloutTicket
from rollout.remote.wire import RolloutResponse
from rollout.tasks import Task
from rollout.viewing import History, TrajectoryPage, TrajectoryQuery, TrajectoryRows
from rollout.weights import WeightReport, WeightSource

CONTROLLER = "controller"
PATIENCE_S = 120.0
PAUSE_S = 0.5
# Beyond the time that a call may take of itself.
CALL_SECONDS = 60.0
WEIGHTS_SECONDS = 1200.0
# Prometheus gives up after 10 s.
METRICS_SECONDS = 8.0
# A request to an agent waits for this; see deployments.agents.
AGENTS_SECONDS = 5.0


class RayBackend:
    """Implements rollout.backend.Backend for a driver or actor of the cluster's Ray."""

    def __init__(
        self, namespace: str | None = None, *, patience: float = PATIENCE_S, looks_wait: bool = True
    ) -> None:
        """`namespace`: the cluster's name; None: this driver's. Raises UnavailableError without a controller.

        `patience`: seconds in which a dead controller is asked again. `looks_wait`: False: runs, weights and what the
        viewer shows raise UnavailableError at once while the cluster starts, or its controller comes back.
        """
        import ray

        try:
            self._controller = ray.get_actor(CONTROLLER, namespace)
        except ValueError:
            raise UnavailableError(
                f"Ray namespace {namespace or 'of this driver'} has no controller; start one with `rollout up`"
            ) from None
        self._patience = patience
        self._looks_wait = looks_wait

    async def create_run(self, request: RunRequest) -> RunInfo:
        """See Backend."""
        return await self._call("create_run", request)

    async def submit(self, run: str, tasks: Sequence[Task]) -> Submitted:
        """See Backend."""
        return await self._call("submit", run, list(tasks))

    async def lease(self, run: str, request: LeaseRequest) -> Batch | NoBatch:
        """See Backend."""
        return await self._call("lease", run, request, seconds=request.timeout + CALL_SECONDS, waits=True)

    async def fetch(self, lease_id: str) -> Batch:
        """See Backend."""
        return await self._call("fetch", lease_id)

    async def acknowledge(self, lease_id: str) -> Acknowledged:
        """See Backend."""
        return await self._call("acknowledge", lease_id)

    async def extend(self, lease_id: str, ttl: float) -> float:
        """See Backend."""
        return await self._call("extend", lease_id, ttl)

    async def release(self, lease_id: str) -> None:
        """See Backend."""
        await self._call("release", lease_id)

    async def pause(self, run: str, paused: bool) -> RunInfo:
        """See Backend."""
        return await self._call("pause", run, paused)

    async def cancel(self, run: str) -> RunInfo:
        """See Backend."""
        return await self._call("cancel", run)

    async def forget(self, run: str) -> None:
        """See Backend."""
        await self._call("forget", run)

    async def run_info(self, run: str) -> RunInfo:
        """See Backend."""
        return await self._call("run_info", run)

    async def runs(self) -> list[RunInfo]:
        """See Backend."""
        return await self._look("runs")

    async def watch(self, run: str, timeout: float) -> RunInfo:
        """See Backend."""
        return await self._call("watch", run, timeout, seconds=timeout + CALL_SECONDS, waits=True)

    async def update_weights(self, source: WeightSource, version: int | None) -> WeightReport:
        """See Backend."""
        return await self._call(
            "update_weights", source, version, seconds=WEIGHTS_SECONDS, repeat=version is not None
        )

    async def weights(self) -> dict[str, Any]:
        """See Backend."""
        return await self._look("weights")

    async def open_session(self, run: str, task: Task | None, limits: CaptureLimits | None) -> OpenedSession:
        """See Backend."""
        return await self._call("open_session", run, task, limits, repeat=False)

    async def session_info(self, session: str) -> CapturedSession:
        """See Backend."""
        return await self._call("session_info", session)

    async def reward_session(
        self, session: str, reward: float | None, turn_rewards: dict[str, float] | None
    ) -> CapturedSession:
        """See Backend."""
        return await self._call("reward_session", session, reward, turn_rewards)

    async def close_session(self, session: str, cancel: bool) -> CapturedSession:
        """See Backend."""
        return await self._call("close_session", session, cancel)

    async def metrics_text(self) -> bytes:
        """See Backend."""
        return await self._call("metrics_text", seconds=METRICS_SECONDS)

    async def trajectories(self, run: str | None, query: TrajectoryQuery) -> TrajectoryPage:
        """See rollout.viewing.Viewing."""
        return await self._look("trajectories", run, query)

    async def trajectory(self, trajectory_id: str) -> TrajectoryRows:
        """See rollout.viewing.Viewing."""
        return await self._look("trajectory", trajectory_id)

    async def history(self, run: str) -> History:
        """See rollout.viewing.Viewing."""
        return await self._look("history", run)

    async def added_agents(self, known: int | None) -> AddedAgents | None:
        """See deployments.agents.AgentKeeper."""
        return await self._call("added_agents", known, seconds=AGENTS_SECONDS)

    async def add_agent(self, agent: NamedAgent) -> AddedAgents:
        """See deployments.agents.AgentKeeper."""
        return await self._call("add_agent", agent)

    async def remove_agent(self, name: str) -> AddedAgents:
        """See deployments.agents.AgentKeeper."""
        return await self._call("remove_agent", name, repeat=False)

    async def hold_turn(self, turn: HeldTurn) -> None:
        """See deployments.agents.AgentKeeper."""
        await self._call("hold_turn", turn)

    async def held_turn(self, key: str) -> HeldTurn | None:
        """See deployments.agents.AgentKeeper."""
        return await self._call("held_turn", key)

    async def remote_accept(self, order: RolloutOrder) -> RolloutTicket:
        """See rollout.remote.order.RemoteRollouts."""
        return await self._call("remote_rollout", "accept", order)

    async def remote_result(self, rollout_id: str, timeout: float) -> RolloutResponse | None:
        """See rollout.remote.order.RemoteRollouts."""
        return await self._call(
            "remote_rollout", "result", rollout_id, timeout, seconds=timeout + CALL_SECONDS, waits=True
        )

    async def remote_tools(self) -> list[dict[str, Any]]:
        """See rollout.remote.order.RemoteRollouts."""
        return await self._call("remote_rollout", "tools", seconds=2 * CALL_SECONDS)

    async def remote_counts(self) -> RolloutCounts:
        """See rollout.remote.order.RemoteRollouts."""
        return await self._call("remote_rollout", "counts")

    async def begin(self, session_id: str, request_id: str) -> None:
        """See deployments.capture.SessionKeeper."""
        await self._call("begin_call", session_id, request_id)

    async def end(self, session_id: str, request_id: str, calls: list[CapturedCall], lost: bool) -> None:
        """See deployments.capture.SessionKeeper."""
        await self._call("end_call", session_id, request_id, calls, lost)

    async def close(self) -> None:
        """See Backend."""

    async def _look(self, what: str, *arguments: Any) -> Any:
        if self._looks_wait:
            return await self._call(what, *arguments)
        return await self._call("look", what, *arguments, repeat=False)

    async def _call(
        self,
        name: str,
        *arguments: Any,
        seconds: float = CALL_SECONDS,
        repeat: bool = True,
        waits: bool = False,
    ) -> Any:
        """`waits`: it waits for others, and ends with its caller. Everything else goes to its end, heard or not."""
        from ray.exceptions import RayActorError, RayTaskError

        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        while True:
            reference = getattr(self._controller, name).remote(*arguments)
            try:
                async with asyncio.timeout(seconds):
                    return await reference
            except TimeoutError:
                raise UnavailableError(f"the controller did not answer {name} within {seconds:g} s") from None
            except asyncio.CancelledError:
                if waits:
                    _give_up(reference)
                raise
            except RayTaskError as failure:
                raise failure.cause if isinstance(failure.cause, RolloutError) else failure from None
            except RayActorError as failure:
                # Dead, or being started again.
                if not repeat or loop.time() >= deadline:
                    raise UnavailableError(f"the controller is gone: {_first_line(failure)}") from None
            await asyncio.sleep(PAUSE_S)


def _first_line(failure: Exception) -> str:
    """Of its text, which may be a stack; its name where it has none."""
    return (str(failure) or type(failure).__name__).splitlines()[0]


def _give_up(reference: Any) -> None:
    """Nobody waits any more: a lease must not be granted to the void."""
    import ray

    ray.cancel(reference, force=False)
