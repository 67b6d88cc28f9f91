"""What a client asks of a cluster, whichever way it reaches it.

Invariant: every backend answers with the same types and raises the same errors; those that have lost the answer of a
call repeat it only where a repetition does no harm (see each method).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

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
from rollout.capture.session_book import CaptureLimits
from rollout.tasks import Task
from rollout.weights import WeightReport, WeightSource


class Backend(Protocol):
    """The operations of the batch rollout API. All raise ApiError, and UnavailableError where nobody answers."""

    async def create_run(self, request: RunRequest) -> RunInfo:
        """A new run; the same request again is the same run."""

    async def submit(self, run: str, tasks: Sequence[Task]) -> Submitted:
        """Queue tasks, at most MAX_TASKS_PER_CALL; the same again are duplicates."""

    async def lease(self, run: str, request: LeaseRequest) -> Batch | NoBatch:
        """The next batch; the same request_id again is the same lease."""

    async def fetch(self, lease_id: str) -> Batch:
        """The batch of an active lease once more."""

    async def acknowledge(self, lease_id: str) -> Acknowledged:
        """It is trained on; again, it still is."""

    async def extend(self, lease_id: str, ttl: float) -> float:
        """Let a lease live `ttl` seconds from now; returns when it expires (seconds since the epoch)."""

    async def release(self, lease_id: str) -> None:
        """Give a batch back."""

    async def pause(self, run: str, paused: bool) -> RunInfo:
        """Hold a run back, or let it go on."""

    async def cancel(self, run: str) -> RunInfo:
        """End a run."""

    async def forget(self, run: str) -> None:
        """Drop a run with all it has."""

    async def run_info(self, run: str) -> RunInfo:
        """A run at this moment."""

    async def runs(self) -> list[RunInfo]:
        """All runs."""

    async def watch(self, run: str, timeout: float) -> RunInfo:
        """A run after its next change, or after `timeout` seconds."""

    async def update_weights(self, source: WeightSource, version: int | None) -> WeightReport:
        """Bring new weights to all engines. Never repeated by itself unless `version` is given."""

    async def weights(self) -> dict[str, Any]:
        """Version, source and replicas."""

    async def metrics_text(self) -> bytes:
        """All metrics of the cluster in Prometheus's text format."""

    async def open_session(self, run: str, task: Task | None, limits: CaptureLimits | None) -> OpenedSession:
        """An address for one black-box agent. Never repeated by itself: each call is a session."""

    async def session_info(self, session: str) -> CapturedSession:
        """A captured session at this moment."""

    async def reward_session(
        self, session: str, reward: float | None, turn_rewards: dict[str, float] | None
    ) -> CapturedSession:
        """Score it; the same again changes nothing."""

    async def close_session(self, session: str, cancel: bool) -> CapturedSession:
        """Turn its calls into a trajectory; again, they are one."""

    async def close(self) -> None:
        """Release connections."""
