"""A batch job: tasks in, trajectories on disk.

Invariant: a trajectory that the controller handed over is on disk before more is asked for in `close`; an
interrupt ends the sessions that run, keeps what has finished, and leaves the cluster as it was.
"""

from __future__ import annotations

import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.messages import Delivery, Progress, RunSpec
from cluster.config import ClusterConfig
from cluster.launch import controller
from rollout.errors import ConfigError, RolloutError
from rollout.tasks import Task
from rollout.trajectory_file import TrajectoryWriter

# How often the caller hears of progress, in seconds.
POLL_SECONDS = 0.25
# A controller that does not answer a call within this time is as good as dead.
CALL_SECONDS = 120.0
# After an interrupt, cancelled sessions get this long to hand in what they have.
DRAIN_SECONDS = 15.0

OnProgress = Callable[[Progress, float], None]
"""Progress so far and seconds since the start."""


@dataclass(frozen=True)
class JobResult:
    """What a job came to."""

    path: Path
    progress: Progress
    seconds: float
    interrupted: bool

    @property
    def tokens_per_s(self) -> float:
        """Sampled tokens per second of the whole job."""
        return self.progress.tokens / self.seconds if self.seconds else 0.0

    def summary(self) -> dict[str, Any]:
        """The result as plain data, for --json."""
        progress = self.progress
        return {
            "path": str(self.path),
            "trajectories": progress.counts.done,
            "submitted": progress.counts.total,
            "interrupted": self.interrupted,
            "seconds": round(self.seconds, 3),
            "tokens": progress.tokens,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "turns": progress.turns,
            "tool_calls": progress.tool_calls,
            "tool_errors": progress.tool_errors,
            "forks": progress.forks,
            "mean_reward": progress.mean_reward,
            "stop_reasons": progress.stop_reasons,
            "retried": progress.counts.retried,
            "failures": progress.failures,
        }


def run_tasks(
    config: ClusterConfig,
    tasks: list[Task],
    out: Path | str,
    *,
    group_size: int | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = lambda _progress, _seconds: None,
) -> JobResult:
    """Run tasks on the connected cluster until all have trajectories. Raises ConfigError without an environment."""
    if config.environment is None:
        raise ConfigError("the config names no environment; add `environment: {path: module:Class}`")
    spec = RunSpec(
        run=f"run-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}",
        environment=config.environment.path,
        environment_args=dict(config.environment.args),
        sampling=config.sampling,
        limits=config.limits,
        group_size=group_size or config.run.group_size,
        submitted_at=time.time(),
    )
    info = {"run": spec.run, "model": config.model.path, "environment": spec.environment}
    handle = controller()
    started = time.monotonic()
    with TrajectoryWriter(out, info, overwrite=overwrite) as writer, _interrupts() as asked:
        deadline = float("inf")
        _ask(handle.submit.remote(spec, tasks))
        while True:
            delivery: Delivery = _ask(handle.take.remote(spec.run, POLL_SECONDS))
            if delivery.table is not None:
                writer.write(delivery.table)
            on_progress(delivery.progress, time.monotonic() - started)
            if delivery.finished or time.monotonic() > deadline:
                break
            if asked and deadline == float("inf"):
                deadline = time.monotonic() + DRAIN_SECONDS
                _ask(handle.cancel.remote(spec.run))
        seconds = time.monotonic() - started
    if delivery.finished:
        _ask(handle.forget.remote(spec.run))
    return JobResult(writer.path, delivery.progress, seconds, bool(asked))


def _ask(reference: Any) -> Any:
    """The controller's answer. Raises RolloutError where there is none in time."""
    import ray

    try:
        return ray.get(reference, timeout=CALL_SECONDS)
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
