"""The command line where nothing needs to be started: one clear message on standard error, and the exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from actors.engine_client import EngineInfo
from actors.messages import WorkerStats
from cluster import cli, deploy, launch, state
from cluster.state import ID_VARIABLE, ClusterState
from rollout.api import RunInfo
from rollout.ledger import Segment, TurnSpan
from rollout.record import to_table
from rollout.trajectory import SessionKey, Trajectory
from rollout.trajectory_file import FILE_NAME, TrajectoryWriter

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROLLOUT_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "state"


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("it tried to start a cluster")

    monkeypatch.setattr(launch, "_start_ray", started)
    monkeypatch.setattr(launch, "deploy", started)
    monkeypatch.setitem(sys.modules, "vllm", None)


@pytest.fixture
def rollout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs the command in this process: exit code, standard output, standard error."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rollout", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        told = capsys.readouterr()
        code = left.value.code
        assert isinstance(code, int) or code is None
        return code or 0, told.out, told.err

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text("name: unit\nmodel: {path: org/tiny}\nenvironment: {path: 'x:Y'}\n")
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"task_id": "a", "messages": [{"role": "user", "content": "x"}]}\n')
    return path


@pytest.fixture
def trajectories(tmp_path: Path) -> Path:
    segment = Segment(
        array("i", [1, 2]), array("i", [70, 71]), array("b", [1, 1]), array("f", [-0.5, -0.5]), array("i", [0, 0]),
        [TurnSpan("assistant", 0, 2, 0.5)],
    )  # fmt: skip
    made = [
        Trajectory(SessionKey("r", "a", "r/a", n), [segment], "stop", [{"role": "user", "content": "x"}], reward=n)
        for n in range(2)
    ]
    with TrajectoryWriter(tmp_path / "out", {"model": "org/tiny"}) as writer:
        writer.write(to_table(made))
    return tmp_path / "out"


# What is wrong is said once, clearly


def test_a_bad_task_line_is_named_with_its_number(rollout: Run, config: Path, tasks: Path, tmp_path: Path):
    with tasks.open("a") as file:
        file.write('\n{"task_id": "b"}\n')
    code, out, err = rollout("run", config, "--tasks", tasks, "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err == f"error {tasks}:3: messages: Field required\n"
    assert not (tmp_path / "out").exists()


def test_a_task_file_that_is_missing(rollout: Run, config: Path, tmp_path: Path):
    missing = tmp_path / "none.jsonl"
    code, out, err = rollout("run", config, "--tasks", missing, "--out", tmp_path / "out")
    assert (code, out, err) == (1, "", f"error {missing}: cannot be read: No such file or directory\n")


@pytest.mark.parametrize("command", ["up", "run", "check"])
def test_an_unknown_config_field_is_named_with_its_line(
    rollout: Run, config: Path, tasks: Path, tmp_path: Path, command: str
):
    config.write_text(config.read_text() + "workers:\n  cuont: 2\n")
    options = ["--tasks", tasks, "--out", tmp_path / "out"] if command == "run" else []
    code, out, err = rollout(command, config, *options)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (f"error {config}:5: workers.cuont: is not a known field; did you mean `count`?")


@pytest.mark.parametrize("command", ["up", "check"])
def test_a_config_that_is_missing(rollout: Run, tmp_path: Path, command: str):
    missing = tmp_path / "none.yaml"
    code, _, err = rollout(command, missing)
    assert code == 1
    assert err.splitlines()[-1] == f"error {missing}: cannot be read: No such file or directory"


def test_an_override_is_checked_like_the_file(rollout: Run, config: Path):
    code, _, err = rollout("up", config, "--set", "workers.count=many")
    assert code == 1
    assert err.splitlines()[-1].startswith("error --set workers.count: must be a whole number")


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_up_says_whose_an_address_without_keys_is(
    rollout: Run, config: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
):
    started = ClusterState("unit", "id", "127.0.0.1:1", "", "", "", 0.0)
    monkeypatch.setattr(launch, "up", lambda *_, **__: started)
    code, out, err = rollout("up", config, *options)
    told = [line for line in err.splitlines() if "needs no key" in line]
    assert code == 0 and len(told) == 1 and "needs no key" not in out
    assert told[0].startswith("http://127.0.0.1:8800 ") and "every user" in told[0] and "access.keys" in told[0]
    config.write_text(
        config.read_text() + f"access: {{keys: [{{name: app, sha256: {'0' * 64}, scopes: [serve]}}]}}\n"
    )
    assert "needs no key" not in rollout("up", config, *options)[2]
    config.write_text("name: unit\nmodel: {path: org/tiny}\ngateway: {enabled: false}\n")
    assert "needs no key" not in rollout("up", config, *options)[2]


def test_a_config_without_environment_cannot_roll_out(rollout: Run, config: Path, tasks: Path, tmp_path: Path):
    config.write_text("name: unit\nmodel: {path: org/tiny}\n")
    code, _, err = rollout("run", config, "--tasks", tasks, "--out", tmp_path / "out")
    assert code == 1
    assert err == f"error {config}: environment: is missing; name one as `environment: {{path: module:Class}}`\n"


def test_a_directory_with_trajectories_is_not_overwritten(
    rollout: Run, config: Path, tasks: Path, trajectories: Path
):
    before = (trajectories / FILE_NAME).read_bytes()
    code, _, err = rollout("run", config, "--tasks", tasks, "--out", trajectories)
    assert code == 1
    assert err == f"error {trajectories} already holds trajectories; choose another directory or --overwrite\n"
    assert (trajectories / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 50])
def test_show_on_a_file_that_is_missing_or_garbage(rollout: Run, tmp_path: Path, content: bytes | None):
    path = tmp_path / "t.parquet"
    if content is not None:
        path.write_bytes(content)
    code, out, err = rollout("show", path)
    assert (code, out) == (1, "")
    assert err.startswith(f"error {path}: not a readable Parquet file: ")
    assert "Traceback" not in err


def test_show_on_a_directory_without_trajectories(rollout: Run, tmp_path: Path):
    assert rollout("show", tmp_path) == (1, "", f"error {tmp_path} holds no {FILE_NAME}\n")


def test_a_word_of_a_message_in_brackets_is_printed(rollout: Run, tmp_path: Path):
    path = tmp_path / "[bold]odd[/x].parquet"
    code, _, err = rollout("show", path)
    assert code == 1 and err.startswith(f"error {path}: not a readable")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show"], "path"),
        (["nonsense"], "No such command 'nonsense'"),
        (["show", "x", "--nonsense"], "No such option"),
        (["run", "c.yaml", "--tasks", "t", "--out", "o", "--limit", "0"], "--limit"),
    ],
)
def test_a_wrong_usage_is_one_message_and_exit_code_2(rollout: Run, arguments: list[str], said: str):
    code, out, err = rollout(*arguments)
    assert (code, out) == (2, "")
    assert said.lower() in err.lower()


def test_a_failure_of_the_real_command_is_no_traceback(tmp_path: Path):
    command = [sys.executable, "-m", "cluster", "show", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error {tmp_path} holds no {FILE_NAME}\n"


@pytest.fixture
def terminated(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        raise AssertionError("SIGTERM did nothing")

    monkeypatch.setattr(state, "load_all", interrupted)


def test_sigterm_ends_like_an_interrupt_with_130(rollout: Run, terminated: None):
    code, out, err = rollout("status")
    assert (code, out) == (130, "")
    assert "Traceback" not in err


def test_an_interrupt_is_told(rollout: Run, terminated: None):
    assert rollout("status") == (130, "", "interrupted\n")


# show


def test_show_lists_and_finds(rollout: Run, trajectories: Path):
    code, out, err = rollout("show", trajectories, "--list")
    assert (code, err) == (0, "")
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [["r/a/0", "0", "stop"], ["r/a/1", "1", "stop"]]
    code, out, err = rollout("show", trajectories / FILE_NAME, "--trajectory", "/0")
    assert code == 0 and "r/a/0" in out and "70 71" in out
    assert err == "no tokenizer at hand: token ids are shown (give --model DIR)\n"
    code, out, err = rollout("show", trajectories, "--trajectory", "7")
    assert (code, out) == (1, "")
    assert err == "error no trajectory of 2 match '7'; see `rollout show FILE --list`\n"


def test_show_as_json(rollout: Run, trajectories: Path):
    code, out, err = rollout("show", trajectories, "--json")
    assert (code, err) == (0, "")
    (row,) = json.loads(out)
    assert (row["trajectory_id"], row["response_ids"], row["reward"]) == ("r/a/1", [70, 71], 1.0)
    assert row["messages"] == [{"role": "user", "content": "x"}]


# down and status


def remember(name: str, **fields: object) -> ClusterState:
    known = {
        "name": name, "cluster_id": f"none-{os.getpid()}-{name}", "address": "127.0.0.1:1", "config_path": "/c.yaml",
        "temp_dir": "", "log_file": "/log", "started_at": 0.0,
    }  # fmt: skip
    saved = ClusterState(**(known | fields))  # type: ignore[arg-type]
    state.save(saved)
    return saved


def test_down_with_nothing_known(rollout: Run):
    assert rollout("down") == (0, "", "no cluster is known; nothing to stop\n")
    assert rollout("down", "--all") == (0, "", "no cluster is known; nothing to stop\n")


def test_down_wants_a_name_where_there_are_several(rollout: Run):
    remember("one")
    remember("two")
    assert rollout("down") == (1, "", "error several clusters are known (one, two): name one, or give --all\n")
    assert rollout("down", "six") == (1, "", "error no cluster is called 'six'; known are: one, two\n")
    assert [found.name for found in state.load_all()] == ["one", "two"]
    code, _, err = rollout("down", "two")
    assert code == 0 and err.splitlines()[-1] == "cluster two is down, 0 processes ended"
    assert [found.name for found in state.load_all()] == ["one"]


def test_down_ends_processes_and_removes_files(rollout: Run, tmp_path: Path):
    cluster_id = f"cli-{os.getpid()}-{time.time_ns()}"
    (tmp_path / "ray").mkdir()
    env = {"PATH": os.environ["PATH"], ID_VARIABLE: cluster_id}
    process = subprocess.Popen(["sleep", "300"], env=env, start_new_session=True)
    try:
        remember("one", cluster_id=cluster_id, temp_dir=str(tmp_path / "ray"))
        remember("two")
        code, _, err = rollout("down", "--all")
        assert code == 0
        assert "cluster one is down, 1 processes ended" in err.splitlines()
        process.wait(5)
    finally:
        process.kill()
        process.wait(5)
    assert state.load_all() == [] and not (tmp_path / "ray").exists()


def test_a_state_file_that_is_garbage_is_named(rollout: Run, state_directory: Path):
    state_directory.mkdir()
    (state_directory / "demo.json").write_text("{")
    for command in ("down", "status"):
        code, out, err = rollout(command)
        assert (code, out) == (1, "")
        assert err.startswith(f"error {state_directory}/demo.json is not a readable state file (")


def test_status_of_nothing_and_of_a_dead_cluster(rollout: Run):
    assert rollout("status") == (0, "no cluster is known; start one with `rollout up CONFIG`\n", "")
    assert rollout("status", "--json") == (0, "[]\n", "")
    remember("one")
    code, out, err = rollout("status")
    assert (code, err) == (0, "")
    assert out == "one dead, `rollout down` forgets it  Ray 127.0.0.1:1  config /c.yaml\n"
    code, out, _ = rollout("status", "--json")
    assert code == 0
    assert json.loads(out) == [
        {
            "name": "one",
            "address": "127.0.0.1:1",
            "config": "/c.yaml",
            "logs": "/log",
            "alive": False,
            "ray_metrics": "",
        }
    ]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the controller of a cluster that lives says of itself; an exception under `raises` in its place."""
    told: dict[str, Any] = {
        "engine": EngineInfo("org/tiny", 4096, 2, 0),
        "policy_version": 3,
        "workers": [WorkerStats("worker-0", 5, 0.001, 0.004, 0, 0, {"r1": 2}, 512.0)],
        "runs": {},
    }

    def get(_reference: object, timeout: float) -> dict[str, Any]:
        if "raises" in told:
            raise told["raises"]
        return told

    remote = SimpleNamespace(remote=lambda: None)
    monkeypatch.setattr(launch, "is_alive", lambda _: True)
    monkeypatch.setattr(launch, "connected", lambda _: nullcontext())
    monkeypatch.setattr(deploy, "controller", lambda: SimpleNamespace(status=remote))
    monkeypatch.setattr(ray, "get", get)
    return told


def test_status_shows_workers_and_runs(rollout: Run, answers: dict[str, Any]):
    answers["runs"]["grpo"] = RunInfo(
        "grpo", "running", "x:Y", 4, submitted=10, waiting=3, running=2, ready=1, leased=1, delivered=2,
        dropped={"stale": 1}, sessions_running=7, sessions_done=20,
    )  # fmt: skip
    remember("one")
    code, out, err = rollout("status")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "engine org/tiny TP=2 context 4096 weights 3" in lines, "what the cluster carries, not what it began with"
    assert "worker-0 5 4 ms 512 MB r1 (2)" in lines
    assert lines[-1] == (
        "grpo running 10 groups: 3 waiting, 2 running, 1 ready, 1 leased, 2 delivered, 1 dropped "
        "sessions: 20 done, 7 running"
    )
    code, out, _ = rollout("status", "--json")
    assert code == 0 and json.loads(out)[0]["runs"]["grpo"]["sessions_done"] == 20


def test_status_of_a_cluster_whose_controller_fails_without_a_word(rollout: Run, answers: dict[str, Any]):
    answers["raises"] = TimeoutError()
    remember("one")
    code, out, _ = rollout("status")
    assert code == 0 and out.splitlines()[-1].strip() == "TimeoutError"
