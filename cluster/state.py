"""What `rollout up` remembers of the clusters that it started, one small file each.

Invariant: a process is only ever signalled if it is the cluster's: it carries the cluster's id in its environment, or
it belongs to the session (in the sense of setsid) that the cluster's Ray leads. Process ids alone are no proof, as
they are reused; the environment alone is not enough, as processes that rename themselves (vLLM's workers, Ray's
agents) overwrite theirs.
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

# Inherited by every process of a cluster.
ID_VARIABLE = "ROLLOUT_CLUSTER_ID"
# Seconds that processes get between the request to end and the end.
TERM_SECONDS = 8.0
# What session workers call themselves. They end before the Ray under them, which would take them along while they
# still close their environments.
SESSION_WORKER = "ray::SessionWorker"
CLOSE_SECONDS = 6.0


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
    session_id: int = 0
    """Process id of the Ray node's leader, which is the session id of all its descendants; 0: not ours."""
    session_started: float = 0.0
    """When that leader started (seconds since the epoch, as psutil gives it)."""
    gateway: str = ""
    """URL of its gateway; empty where it has none."""
    journal: str = ""
    """File of its journal; empty where that goes with the cluster."""
    ray_metrics: str = ""
    """URL of the local Ray's metrics, with vLLM's and Serve's; empty where the Ray is not ours."""
    logs: str = ""
    """Directory of its processes' log files; empty where they have none that this machine knows of."""
    owns_ray: bool = True
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


def processes(cluster: ClusterState) -> Iterator[psutil.Process]:
    """All living processes of a cluster, except this one."""
    session = cluster.session_id if _session_is_ours(cluster) else -1
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            marked = process.environ().get(ID_VARIABLE) == cluster.cluster_id
            if marked or os.getsid(process.pid) == session:
                yield process
        except (psutil.Error, OSError):
            # Gone meanwhile, or another user's.
            continue


def _title(process: psutil.Process) -> str:
    try:
        return next(iter(process.cmdline()), "")
    except psutil.Error:
        return ""


def _session_is_ours(cluster: ClusterState) -> bool:
    """Whether the session id still means the cluster's session.

    The kernel gives a number to no new process while a session of that number has members, so it can only have
    passed to somebody else if a process of that id exists that did not start when our leader did.
    """
    if not cluster.session_id:
        return False
    try:
        return abs(psutil.Process(cluster.session_id).create_time() - cluster.session_started) < 1.0
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def end_processes(cluster: ClusterState, on_wait: Callable[[int], None] | None = None) -> int:
    """End all processes of a cluster: asked first, session workers before all others, then killed. Returns how many.

    Looks again after each round, as processes may still start others while they end. Raises RolloutError for those
    that survive being killed.
    """
    first = [process for process in processes(cluster) if _title(process).startswith(SESSION_WORKER)]
    asked = {process.pid for process in first}
    for process in first:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)
    psutil.wait_procs(first, timeout=CLOSE_SECONDS)
    deadline = time.monotonic() + TERM_SECONDS
    while living := list(processes(cluster)):
        late = time.monotonic() > deadline
        if time.monotonic() > deadline + TERM_SECONDS:
            raise RolloutError(f"{len(living)} processes of the cluster cannot be ended: {[p.pid for p in living]}")
        for process in living:
            if late or process.pid not in asked:
                asked.add(process.pid)
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL if late else signal.SIGTERM)
        if on_wait is not None:
            on_wait(len(living))
        psutil.wait_procs(living, timeout=0.3)
    return len(asked)
