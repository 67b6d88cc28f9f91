"""A batch job: tasks in, trajectories on disk.

Invariant: a batch is acknowledged only when it is on disk, so that every trajectory that the cluster gave away is in
the file once; an interrupt ends the sessions that run, keeps what has finished, and leaves the cluster as it was.
"""

from __future__ import annotations

import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.messages import WorkerStats
from cluster.config import ClusterConfig
from cluster.deploy import controller
from rollout.api import MAX_TASKS_PER_CALL, Batch, LeaseRequest, NoBatch, RunInfo
from rollout.errors import ConfigError, RolloutError
from rollout.tasks import Task
from rollout.trajectory_file import TrajectoryWriter

# How often the caller hears of progress, in seconds.
POLL_SECONDS = 0.5
# Groups taken at once.
BATCH_GROUPS = 1_024
# A controller that does not answer a call within this time is as good as dead.
CALL_SECONDS = 120.0
# After an interrupt, cancelled sessions get this long to hand in what they have.
DRAIN_SECONDS = 15.0

OnProgress = Callable[[RunInfo, float], None]
"""Progress so far and seconds since the start."""


@dataclass(frozen=True)
class JobResult:
    """What a job came to."""

    path: Path
    info: RunInfo
    seconds: float
    interrupted: bool
    workers: list[WorkerStats] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Sampled tokens per second of the whole job."""
        return self.info.tokens / self.seconds if self.seconds else 0.0

    @property
    def sessions(self) -> int:
        """How many were asked for."""
        return self.info.submitted * self.info.group_size

    def summary(self) -> dict[str, Any]:
        """The result as plain data, for --json."""
        info = self.info
        return {
            "path": str(self.path),
            "run": info.run,
            "trajectories": info.sessions_done,
            "submitted": self.sessions,
            "interrupted": self.interrupted,
            "seconds": round(self.seconds, 3),
            "tokens": info.tokens,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "turns": info.turns,
            "tool_calls": info.tool_calls,
            "tool_errors": info.tool_errors,
            "forks": info.forks,
            "mean_reward": info.mean_reward,
            "stop_reasons": info.stop_reasons,
            "retried": info.sessions_retried,
            "failures": info.failures,
            "policy_version": info.policy_version,
        }


def run_tasks(
    config: ClusterConfig,
    tasks: list[Task],
    out: Path | str,
    *,
    group_size: int | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = lambda _info, _seconds: None,
) -> JobResult:
    """Run tasks on the connected cluster until all have trajectories. Raises ConfigError without an environment."""
    request = config.run_defaults()
    environment = request.environment
    if environment is None:
        raise ConfigError("the config names no environment; add `environment: {path: module:Class}`")
    name = f"run-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    given = {"name": name, **({"group_size": group_size} if group_size else {})}
    request = request.model_copy(update=given)
    about = {"run": name, "model": config.model.path, "environment": environment.name}
    handle = controller()
    started = time.monotonic()
    with TrajectoryWriter(out, about, overwrite=overwrite) as writer, _interrupts() as asked:
        _ask(handle.create_run.remote(request))
        try:
            for start in range(0, len(tasks), MAX_TASKS_PER_CALL):
                _ask(handle.submit.remote(name, tasks[start : start + MAX_TASKS_PER_CALL]))
            info = _take_all(handle, name, writer, asked, lambda info: on_progress(info, time.monotonic() - started))
        except BaseException:
            # Nobody takes its batches any more. What is complete stays there for `lease` until it is forgotten.
            handle.cancel.remote(name)
            raise
        seconds = time.monotonic() - started
    workers = _ask(handle.status.remote())["workers"]
    _ask(handle.forget.remote(name))
    return JobResult(writer.path, info, seconds, bool(asked), workers)


def _take_all(
    handle: Any, name: str, writer: TrajectoryWriter, asked: list[int], on_info: Callable[[RunInfo], None]
) -> RunInfo:
    """Batches to disk until there are none, or until the patience after an interrupt is over."""
    deadline = float("inf")
    while True:
        lease = LeaseRequest(groups=BATCH_GROUPS, min_groups=1, timeout=POLL_SECONDS, request_id=uuid.uuid4().hex)
        answer: Batch | NoBatch = _ask(handle.lease.remote(name, lease))
        if isinstance(answer, Batch):
            writer.write(answer.table)
            writer.flush()
            _ask(handle.acknowledge.remote(answer.lease_id))
        info: RunInfo = _ask(handle.run_info.remote(name))
        on_info(info)
        if info.finished or time.monotonic() > deadline:
            return info
        if asked and deadline == float("inf"):
            deadline = time.monotonic() + DRAIN_SECONDS
            _ask(handle.cancel.remote(name))


def _ask(reference: Any) -> Any:
    """The controller's answer. Raises what it raised, or RolloutError where there is none in time."""
    import ray

    try:
        return ray.get(reference, timeout=CALL_SECONDS)
    except ray.exceptions.RayTaskError as failure:
        raise failure.cause if isinstance(failure.cause, RolloutError) else failure from None
    except ray.exceptions.GetTimeoutError:
        raise RolloutError(
            f"the controller did not answer within {CALL_SECONDS:g} s; see `rollout status` and the logs it names"
        ) from None


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Signals that asked for an end, as a list that fills; the second one raises KeyboardInterrupt.

    The first must not: it would fall between the controller's handing over of rows and our writing of them.
    """
    asked: list[int] = []

    def note(number: int, _frame: object) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
