"""What `rollout up` remembers of the clusters that it started, one small file each.

Invariant: a process is only ever signalled if it carries this cluster's id in its environment. Process ids alone
are not proof: they are reused.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from rollout.errors import RolloutError

# Inherited by every process of a cluster, vLLM's workers included.
ID_VARIABLE = "ROLLOUT_CLUSTER_ID"
# Seconds that processes get between the request to end and the end.
TERM_SECONDS = 8.0


@dataclass(frozen=True)
class ClusterState:
    """One started cluster."""

    name: str
    cluster_id: str
    address: str
    """Ray's GCS address, host:port."""
    config_path: str
    temp_dir: str
    """Ray's session files and logs; empty where the Ray is not ours."""
    log_file: str
    started_at: float
    owns_ray: bool
    """Whether the Ray under it was started by us, and so ends with it."""


def state_dir() -> Path:
    """Where state files are: $ROLLOUT_STATE_DIR, or the user's state directory."""
    override = os.environ.get("ROLLOUT_STATE_DIR")
    base = Path(override) if override else Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")).expanduser()
    return base if override else base / "rollout-cluster"


def save(state: ClusterState) -> None:
    """Write the file of a cluster."""
    directory = state_dir()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{state.name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(state), indent=2))
    partial.replace(path)


def load(name: str) -> ClusterState | None:
    """The state of a named cluster; None if there is none. Raises RolloutError for a file that is not ours."""
    path = state_dir() / f"{name}.json"
    try:
        return ClusterState(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise RolloutError(
            f"{path} is not a readable state file ({error}); remove it if no cluster is running"
        ) from None


def load_all() -> list[ClusterState]:
    """All known clusters, by name."""
    directory = state_dir()
    names = sorted(path.stem for path in directory.glob("*.json")) if directory.is_dir() else []
    return [state for state in map(load, names) if state is not None]


def remove(name: str) -> None:
    """Forget a cluster."""
    (state_dir() / f"{name}.json").unlink(missing_ok=True)


def processes(cluster_id: str) -> Iterator[psutil.Process]:
    """All processes of this user that carry the cluster's id, except this one."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(ID_VARIABLE) == cluster_id:
                yield process
        except (psutil.Error, OSError):
            # Gone meanwhile, or another user's.
            continue


def end_processes(cluster_id: str, on_wait: Callable[[int], None] | None = None) -> int:
    """End all processes of a cluster: asked first, then killed. Returns how many there were.

    Looks again after each round, as processes may still start others while they end.
    """
    total = 0
    deadline = time.monotonic() + TERM_SECONDS
    asked: set[int] = set()
    while living := [process for process in processes(cluster_id) if _alive(process)]:
        late = time.monotonic() > deadline
        for process in living:
            if late or process.pid not in asked:
                total += process.pid not in asked
                asked.add(process.pid)
                _signal(process, signal.SIGKILL if late else signal.SIGTERM)
        if on_wait is not None:
            on_wait(len(living))
        if late and time.monotonic() > deadline + TERM_SECONDS:
            raise RolloutError(f"{len(living)} processes of the cluster cannot be ended: {[p.pid for p in living]}")
        psutil.wait_procs(living, timeout=0.3)
    return total


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)
