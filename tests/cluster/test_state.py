"""What is remembered of clusters, and that ending one ends exactly its processes. Real processes, no Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster import state
from cluster.state import ID_VARIABLE, ClusterState
from rollout.errors import RolloutError

ID = f"test-{os.getpid()}-{time.time_ns()}"


def cluster(**fields: object) -> ClusterState:
    known = {
        "name": "demo", "cluster_id": ID, "address": "127.0.0.1:1", "config_path": "/c.yaml", "temp_dir": "",
        "log_file": "/log", "started_at": 1.5,
    }  # fmt: skip
    return ClusterState(**(known | fields))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROLLOUT_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


# Files


def test_a_saved_cluster_is_loaded_as_it_was(directory: Path):
    saved = cluster(session_id=12, session_started=3.25, owns_ray=False)
    assert state.load("demo") is None and state.load_all() == []
    state.save(saved)
    assert state.load("demo") == saved
    assert [path.name for path in directory.iterdir()] == ["demo.json"]
    state.save(cluster(address="other:2"))
    assert state.load("demo").address == "other:2"  # type: ignore[union-attr]


def test_all_clusters_come_by_name_and_can_be_removed():
    for name in ("b", "a", "c"):
        state.save(cluster(name=name))
    assert [found.name for found in state.load_all()] == ["a", "b", "c"]
    state.remove("b")
    state.remove("b")
    assert [found.name for found in state.load_all()] == ["a", "c"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": "demo"}', '{"surprise": 1}', "\udcff"], ids=ascii)
def test_a_file_that_is_not_ours_is_named(directory: Path, text: str):
    directory.mkdir()
    (directory / "demo.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RolloutError, match=r"demo\.json is not a readable state file .*remove it if no cluster"):
        state.load("demo")
    with pytest.raises(RolloutError):
        state.load_all()


def test_where_the_files_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert state.state_dir() == tmp_path / "state"
    monkeypatch.delenv("ROLLOUT_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert state.state_dir() == tmp_path / "xdg" / "rollout-cluster"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert state.state_dir() == Path.home() / ".local" / "state" / "rollout-cluster"


# Processes

Spawn = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts a command in a session of its own; whatever is left of it at the end is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def spawn(*command: str, cluster_id: str | None = None) -> subprocess.Popen[bytes]:
        env = {"PATH": os.environ["PATH"]}
        if cluster_id is not None:
            env[ID_VARIABLE] = cluster_id
        started.append(subprocess.Popen(command, env=env, start_new_session=True, stdin=subprocess.DEVNULL))
        return started[-1]

    yield spawn
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(5)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


def running(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None


def exec_done(process: subprocess.Popen[bytes], name: str) -> None:
    """Until exec has happened: before it, a process still shows its parent's environment."""
    until(lambda: psutil.Process(process.pid).name() == name)


def children(process: subprocess.Popen[bytes], count: int) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    until(lambda: [child.name() for child in parent.children(recursive=True)] == ["sleep"] * count)
    return parent.children(recursive=True)


def started_at(process: subprocess.Popen[bytes]) -> float:
    return psutil.Process(process.pid).create_time()


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def pids(found: ClusterState) -> set[int]:
    return {process.pid for process in state.processes(found)}


def test_only_processes_that_carry_the_id_are_ended(spawn: Spawn):
    ours = [spawn("sleep", "300", cluster_id=ID) for _ in range(2)]
    others = [spawn("sleep", "300"), spawn("sleep", "300", cluster_id=f"{ID}-other")]
    for process in ours + others:
        exec_done(process, "sleep")
    assert pids(cluster()) == {process.pid for process in ours}
    waited: list[int] = []
    assert state.end_processes(cluster(), waited.append) == 2
    until(lambda: not any(map(running, ours)))
    assert [running(process) for process in others] == [True, True]
    assert waited[0] == 2
    assert state.end_processes(cluster()) == 0, "nothing is left of it"


def test_a_child_that_cleared_its_environment_is_ended_by_its_session(spawn: Spawn):
    leader = spawn("sh", "-c", "env -i sleep 300 & sleep 300 & wait", cluster_id=ID)
    bystander = spawn("sh", "-c", "env -i sleep 300 & wait")
    hidden, marked = sorted(children(leader, 2), key=lambda child: ID_VARIABLE in child.environ())
    (stranger,) = children(bystander, 1)
    assert ID_VARIABLE not in hidden.environ() and marked.environ()[ID_VARIABLE] == ID

    without_session = cluster()
    assert pids(without_session) == {leader.pid, marked.pid}, "by its environment alone it cannot be found"
    ours = cluster(session_id=leader.pid, session_started=started_at(leader))
    assert pids(ours) == {leader.pid, marked.pid, hidden.pid}
    assert state.end_processes(ours) == 3
    until(lambda: not running(leader) and not alive(hidden) and not alive(marked))
    assert running(bystander) and alive(stranger)


def test_what_outlives_the_leader_of_the_session_is_still_found(spawn: Spawn):
    leader = spawn("sh", "-c", "env -i sleep 300 & wait", cluster_id=ID)
    (hidden,) = children(leader, 1)
    ours = cluster(session_id=leader.pid, session_started=started_at(leader))
    leader.kill()
    leader.wait(5)
    assert pids(ours) == {hidden.pid}
    assert state.end_processes(ours) == 1
    until(lambda: not alive(hidden))


def test_a_session_whose_number_now_means_another_process_is_left_alone(spawn: Spawn):
    stranger = spawn("sh", "-c", "env -i sleep 300 & wait")
    (child,) = children(stranger, 1)
    reused = cluster(session_id=stranger.pid, session_started=started_at(stranger) - 100.0)
    assert pids(reused) == set()
    assert state.end_processes(reused) == 0
    assert running(stranger) and alive(child)


def test_no_session_is_nobodys_session():
    # Session 0 is that of kernel threads, and of some containers' first process.
    assert pids(cluster(session_id=0)) == set()


def test_this_process_is_never_ended():
    # In a session of its own: this one's may have been made outside the container, where it has no number here.
    script = """
import os, psutil, signal, time
from tests.cluster.test_state import cluster, pids
ours = cluster(session_id=os.getpid(), session_started=psutil.Process().create_time())
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
found = pids(ours)
os.kill(child, signal.SIGKILL)
print(os.getpid() in found, child in found)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True, timeout=60
    )
    assert done.stdout.split() == ["False", "True"]


def test_a_process_that_ignores_the_request_is_killed(spawn: Spawn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(state, "TERM_SECONDS", 0.3)
    stubborn = spawn("sh", "-c", "trap '' TERM; while :; do sleep 0.1; done", cluster_id=ID)
    children(stubborn, 1)
    state.end_processes(cluster())
    until(lambda: not running(stubborn))
    assert state.end_processes(cluster()) == 0


def test_a_process_that_ends_by_itself_in_time_is_not_killed(spawn: Spawn, tmp_path: Path):
    mark = tmp_path / "cleaned-up"
    script = f"trap 'echo done > {mark}; exit 0' TERM; : > {tmp_path}/ready; while :; do sleep 0.05; done"
    polite = spawn("sh", "-c", script, cluster_id=ID)
    until((tmp_path / "ready").exists)
    state.end_processes(cluster())
    until(lambda: not running(polite))
    assert mark.read_text() == "done\n"


def test_session_workers_close_before_anything_else_is_told_to_end(spawn: Spawn, tmp_path: Path):
    """Their environments' sandboxes may need the rest of the cluster, and Ray's end is theirs."""
    order = tmp_path / "order"
    polite = """
import os, signal, sys, time
name, seconds, order = sys.argv[1:]
def end(*_):
    time.sleep(float(seconds))
    open(order, "a").write(name + "\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, end)
open(order + "-" + name, "w")
while True:
    time.sleep(0.05)
"""
    (tmp_path / "polite.py").write_text(polite)
    for name, title, seconds in (("raylet", "raylet", "0"), ("worker", "ray::SessionWorker.collect", "0.7")):
        command = ("bash", "-c", f'exec -a "{title}" "$@"', "-", sys.executable)
        spawn(*command, str(tmp_path / "polite.py"), name, seconds, str(order), cluster_id=ID)
    until(lambda: all(Path(f"{order}-{name}").exists() for name in ("raylet", "worker")))
    assert state.end_processes(cluster()) == 2
    assert order.read_text().split() == ["worker", "raylet"]


def test_what_starts_while_others_end_is_ended_too(spawn: Spawn, tmp_path: Path):
    late = tmp_path / "late"
    script = f"trap 'sleep 300 & echo $! > {late}; exit 0' TERM; : > {tmp_path}/ready; while :; do sleep 0.05; done"
    leader = spawn("sh", "-c", script, cluster_id=ID)
    until((tmp_path / "ready").exists)
    assert state.end_processes(cluster()) >= 2
    until(lambda: not running(leader))
    pid = int(late.read_text())
    until(lambda: not psutil.pid_exists(pid) or not alive(psutil.Process(pid)))


def test_a_process_that_cannot_be_ended_is_named(monkeypatch: pytest.MonkeyPatch):
    class Immortal:
        pid = 4242

        def __init__(self) -> None:
            self.signals: list[int] = []

        def cmdline(self) -> list[str]:
            return ["ray::SessionWorker.collect"]

        def send_signal(self, number: int) -> None:
            self.signals.append(number)

    immortal = Immortal()
    now = [0.0]

    def wait(processes: list[object], timeout: float) -> None:
        now[0] += timeout

    monkeypatch.setattr(state, "processes", lambda _: [immortal])
    monkeypatch.setattr(state.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(state.psutil, "wait_procs", wait)
    with pytest.raises(RolloutError, match=r"1 processes of the cluster cannot be ended: \[4242\]"):
        state.end_processes(cluster())
    assert immortal.signals[0] == signal.SIGTERM and immortal.signals.count(signal.SIGTERM) == 1
    assert set(immortal.signals[1:]) == {signal.SIGKILL}
    patience = state.CLOSE_SECONDS + 2 * state.TERM_SECONDS
    assert patience < now[0] < patience + 1
