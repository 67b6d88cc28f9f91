"""`rollout logs` as a command: what it prints, where it looks, and how it ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import cli
from cluster.logs import default_directory
from rollout import logs
from rollout.logs import LogSettings, install, log_files, uninstall

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ROLLOUT_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv(logs.DIRECTORY_VARIABLE, raising=False)
    yield tmp_path / "state"
    uninstall()


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
        assert isinstance(left.value.code, int) or left.value.code is None
        return left.value.code or 0, told.out, told.err

    yield run
    signal.signal(signal.SIGTERM, before)


def written(directory: Path) -> Path:
    """Logs as two processes of a cluster write them."""
    log = logging.getLogger("actors.worker")
    install(LogSettings("demo", level="debug", directory=str(directory)), "worker", "worker-0")
    log.debug("quiet", extra={"trajectory_id": "r/t/1", "run": "r"})
    log.warning("[bold]loud[/bold] \udcff", extra={"trajectory_id": "r/t/2", "run": "r"})
    install(LogSettings("demo", directory=str(directory)), "gateway")
    log.info("asked", extra={"correlation_id": "f81d4fae-7dec-11d0-a765-00a0c91e6bf6"})
    uninstall()
    return directory


def test_the_logs_of_the_only_cluster(rollout: Run):
    written(default_directory("demo"))
    code, out, err = rollout("logs")
    assert (code, err) == (0, "")
    lines = [line.partition(" ")[2] for line in out.splitlines()]
    assert lines == [
        "debug    worker-0  quiet  run r  trajectory r/t/1",
        "warning  worker-0  [bold]loud[/bold] \\udcff  run r  trajectory r/t/2",
        "info     gateway  asked  correlation f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
    ]
    assert rollout("logs", "demo") == (code, out, err)


@pytest.mark.parametrize(
    "options, count",
    [
        ([], 3), (["--level", "info"], 2), (["--component", "gateway"], 1), (["--trajectory", "r/t/1"], 1),
        (["--correlation", "f81d4fae"], 1), (["-n", "1"], 1), (["-n", "0"], 3),
        (["--component", "worker-0", "--component", "gateway"], 3), (["--component", "front"], 0),
    ],
)  # fmt: skip
def test_what_is_asked_for_as_json(rollout: Run, tmp_path: Path, options: list[str], count: int):
    code, out, err = rollout("logs", "--dir", written(tmp_path / "there"), "--json", *options)
    assert (code, err) == (0, "")
    assert [json.loads(line)["cluster"] for line in out.splitlines()] == ["demo"] * count


def test_lines_that_are_no_records_are_told_of(rollout: Run, tmp_path: Path):
    (path, *_) = log_files(written(tmp_path / "there"))
    with path.open("a") as file:
        file.write("garbage\n")
    code, out, err = rollout("logs", "--dir", tmp_path / "there")
    assert (code, len(out.splitlines())) == (0, 3)
    assert err == "1 lines were no records, and were left out\n"


def test_no_logs_are_a_clear_error(rollout: Run, tmp_path: Path):
    code, out, err = rollout("logs")
    assert (code, out) == (1, "") and err.startswith("error no cluster is known and none has left logs")
    code, out, err = rollout("logs", "six")
    assert (code, out) == (1, "") and err.startswith("error there are no logs of 'six' in ")
    code, out, err = rollout("logs", "--dir", tmp_path / "nowhere")
    assert (code, out) == (1, "") and err.endswith("nowhere is no directory\n")
    assert rollout("logs", "--level", "loud")[0] == 2


def test_following_shows_what_is_written_and_ends_with_an_interrupt(tmp_path: Path):
    directory = written(tmp_path / "there")
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", "logs", "--dir", str(directory), "--follow", "--json", "-n", "1"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    try:
        assert json.loads(process.stdout.readline())["message"] == "asked"
        install(LogSettings("demo", directory=str(directory)), "front")
        logging.getLogger("actors.front").info("new")
        assert json.loads(process.stdout.readline())["message"] == "new"
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0 and time.monotonic() - started < 10
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
