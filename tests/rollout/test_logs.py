"""Structured logs: what a line holds, what it never holds, and that files and processes stay bounded."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import logging.config
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import pytest

from rollout import logs
from rollout.correlation import correlation_id, enter_session, session_run, trajectory_id
from rollout.logs import LogSettings, as_text, install, log_files, printable, prune, uninstall
from rollout.redaction import digest

KEY = "q8Zr-3xT_wPl0mN5vYc7Bd2Kf9Hs4Jg1"
ID = "f81d4fae-7dec-11d0-a765-00a0c91e6bf6"
ours = logging.getLogger("actors.worker")


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(logs.DIRECTORY_VARIABLE, raising=False)
    yield
    uninstall()


def settings(directory: Path | None = None, **fields: Any) -> LogSettings:
    return LogSettings(cluster="demo", directory=None if directory is None else str(directory), **fields)


def entries(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in log_files(directory) for line in path.read_bytes().splitlines()]


def test_a_record_as_a_line_of_json(tmp_path: Path):
    install(settings(tmp_path), "worker", "worker-3")
    token = correlation_id.set(ID)
    try:
        ours.info("%d sessions", 4)
    finally:
        correlation_id.reset(token)
    (path,) = log_files(tmp_path)
    assert path.name.startswith("worker-3.") and path.name.endswith(f".{os.getpid()}.jsonl")
    assert path.stat().st_mode & 0o077 == 0
    (entry,) = entries(tmp_path)
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "info", "component": "worker", "instance": "worker-3", "cluster": "demo", "pid": os.getpid(),
        "logger": "actors.worker", "message": "4 sessions", "correlation_id": ID,
    }  # fmt: skip


async def test_a_session_is_in_each_of_its_lines_and_in_no_other(tmp_path: Path):
    install(settings(tmp_path), "worker", "worker-0")

    async def tool() -> None:
        ours.info("tool")

    def blocking() -> None:
        ours.info("thread")

    async def session(number: int) -> None:
        enter_session("run-1", f"run-1/t/{number}")
        ours.info("begin")
        await asyncio.sleep(0)
        await asyncio.gather(tool(), asyncio.to_thread(blocking))

    await asyncio.gather(*(asyncio.create_task(session(number)) for number in range(3)))
    ours.info("nobody's")
    found = entries(tmp_path)
    assert "trajectory_id" not in found[-1] and "run" not in found[-1]
    said = sorted((entry["trajectory_id"], entry["message"]) for entry in found[:-1])
    assert said == [(f"run-1/t/{n}", m) for n in range(3) for m in ("begin", "thread", "tool")]
    assert {entry["run"] for entry in found[:-1]} == {"run-1"}
    assert trajectory_id.get() is None and session_run.get() is None


def test_secrets_are_in_no_field_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MCP_TOKEN", "token-of-an-mcp-server-1234567")
    install(settings(tmp_path, secrets=frozenset({digest(KEY)})), "gateway")
    try:
        raise ValueError(f"no such key: {KEY}")
    except ValueError:
        ours.exception("GET /x?key=abcdefgh with {'authorization': 'Bearer %s'} and %s", KEY, os.environ["MCP_TOKEN"])
    text = log_files(tmp_path)[0].read_text()
    assert KEY not in text and "abcdefgh" not in text and "token-of-an-mcp" not in text
    (entry,) = entries(tmp_path)
    assert "ValueError: no such key: ***" in entry["exception"] and "Traceback" in entry["exception"]


def test_a_secret_that_lies_across_the_cut_leaves_no_half(tmp_path: Path):
    install(settings(tmp_path, secrets=frozenset({digest(KEY)})), "gateway")
    ours.info("x " * (logs.MAX_MESSAGE_CHARS // 2 - 8) + KEY + " y" * 5000)
    (entry,) = entries(tmp_path)
    assert KEY[:10] not in entry["message"]
    assert len(entry["message"]) < logs.MAX_MESSAGE_CHARS + 40 and "more characters)" in entry["message"]


def test_a_huge_exception_keeps_its_end(tmp_path: Path):
    install(settings(tmp_path), "worker")
    try:
        raise RuntimeError("x" * 100_000 + "the end")
    except RuntimeError:
        ours.exception("failed")
    (entry,) = entries(tmp_path)
    assert entry["exception"].endswith("the end") and len(entry["exception"]) <= logs.MAX_EXCEPTION_CHARS + 1


@pytest.mark.parametrize("message", ["two\nlines", "a\x1b[31mred", "\u2028", "\udcff lone", '{"a": 1}'], ids=ascii)
def test_a_line_is_one_record_whatever_it_says(tmp_path: Path, message: str):
    install(settings(tmp_path), "worker")
    ours.warning(message)
    (path,) = log_files(tmp_path)
    assert path.read_bytes().count(b"\n") == 1
    (entry,) = entries(tmp_path)
    assert entry["message"] == message


def test_arguments_that_do_not_fit_are_shown_as_they_are():
    record = logging.makeLogRecord({"msg": "%s and %d", "args": ("x",)})
    assert logs.JsonFormatter("demo", "worker").fields(record)["message"] == "%s and %d ('x',)"


def test_the_level_and_the_chatty_libraries(tmp_path: Path):
    install(settings(tmp_path, level="info"), "worker")
    ours.debug("no")
    ours.info("ours")
    logging.getLogger("my_environment").info("a user's")
    logging.getLogger("httpx").info("no")
    logging.getLogger("httpx").warning("httpx")
    logging.getLogger("uvicorn.error").info("no")
    assert [entry["message"] for entry in entries(tmp_path)] == ["ours", "a user's", "httpx"]


def test_libraries_that_keep_their_records_apart_are_heard_from_a_warning_on(tmp_path: Path):
    library = logging.getLogger("vllm")
    before = (library.level, library.propagate)
    library.setLevel(logging.INFO)
    library.propagate = False
    try:
        install(settings(tmp_path), "engine", "r1")
        logging.getLogger("vllm.engine").info("no")
        logging.getLogger("vllm.engine").error("dead")
        uninstall()
        assert library.handlers == []
    finally:
        library.setLevel(before[0])
        library.propagate = before[1]
    (entry,) = entries(tmp_path)
    assert (entry["message"], entry["logger"], entry["instance"]) == ("dead", "vllm.engine", "r1")
    assert log_files(tmp_path)[0].name.startswith("engine-r1.")


def test_standard_error_gets_everything_without_a_file_and_what_is_wrong_beside_one(tmp_path: Path):
    alone, beside = io.StringIO(), io.StringIO()
    install(settings(), "front", stream=alone)
    ours.info("one")
    install(settings(tmp_path), "front", stream=beside)
    ours.info("two")
    ours.warning("three")
    assert [json.loads(line)["message"] for line in alone.getvalue().splitlines()] == ["one"]
    assert [json.loads(line)["message"] for line in beside.getvalue().splitlines()] == ["three"]
    assert [entry["message"] for entry in entries(tmp_path)] == ["two", "three"]


def test_text_for_terminals():
    stream = io.StringIO()
    install(settings(format="text"), "worker", "worker-1", stream=stream)
    try:
        raise ValueError("why")
    except ValueError:
        ours.exception("bad\x1b[2J\nthing", extra={"trajectory_id": "r/t/1"})
    first, *rest = stream.getvalue().splitlines()
    assert first.split(" ", 1)[1] == "error   worker-1  bad\\x1b[2J\\x0athing [trajectory r/t/1]"
    assert rest[0] == "    Traceback (most recent call last):" and rest[-1] == "    ValueError: why"


def test_text_of_a_record_that_is_none():
    assert as_text({}).startswith("None ?") and as_text({"time": "x" * 50, "message": 5}).startswith("x" * 12 + " ")
    assert printable("a\tb\x9bc\u2028\udcffd\u202e") == "a\tb\\x9bc\\u2028\\udcffd\\u202e"


def test_the_variable_names_the_directory_where_the_settings_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(logs.DIRECTORY_VARIABLE, str(tmp_path / "a"))
    install(settings(), "worker")
    install(settings(tmp_path / "b"), "worker")
    assert len(log_files(tmp_path / "a")) == len(log_files(tmp_path / "b")) == 1


def test_none_changes_nothing_and_uninstall_undoes_everything(tmp_path: Path):
    root = logging.getLogger()
    before = (list(root.handlers), root.level, logging.getLogger("httpx").level)
    install(None, "worker")
    assert (list(root.handlers), root.level, logging.getLogger("httpx").level) == before
    install(settings(tmp_path), "worker")
    install(settings(tmp_path), "worker")
    assert len(root.handlers) == len(before[0]) + 2 and root.level == logging.INFO
    uninstall()
    uninstall()
    assert (list(root.handlers), root.level, logging.getLogger("httpx").level) == before


def test_a_directory_that_cannot_be_written_to_is_said_and_harms_nothing(tmp_path: Path):
    (tmp_path / "file").write_text("")
    stream = io.StringIO()
    install(settings(tmp_path / "file" / "logs"), "worker", stream=stream)
    ours.info("all the same")
    said = [json.loads(line)["message"] for line in stream.getvalue().splitlines()]
    assert said[0].startswith("logs go to standard error alone: ") and said[1:] == ["all the same"]


def test_a_file_is_put_aside_when_it_is_full_and_only_one_of_them(tmp_path: Path):
    install(settings(tmp_path, max_file_bytes=2_000), "worker")
    for number in range(100):
        ours.info("record %d", number)
    names = sorted(path.name for path in log_files(tmp_path))
    assert len(names) == 2 and names[1] == names[0] + ".1"
    assert all(path.stat().st_size < 2_500 for path in log_files(tmp_path))
    said = sorted(int(entry["message"].split()[1]) for entry in entries(tmp_path))
    assert said == list(range(said[0], 100)), "the newest are there, without a gap"


def test_records_that_could_not_be_written_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    install(settings(tmp_path), "worker")
    (handler,) = (h for h in logging.getLogger().handlers if isinstance(h, logs._BoundedFile))

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    working, handler.stream = handler.stream, Full()  # type: ignore[assignment]
    ours.info("lost")
    ours.info("lost, too")
    handler.stream = working
    ours.info("kept")
    assert [entry["message"] for entry in entries(tmp_path)] == [
        "kept", "2 log records before this one could not be written",
    ]  # fmt: skip
    assert "Traceback" not in capsys.readouterr().err


def test_many_threads_write_whole_lines(tmp_path: Path):
    install(settings(tmp_path, max_file_bytes=50_000), "worker")
    threads = [threading.Thread(target=lambda: [ours.info("x" * 200) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {entry["message"] for entry in entries(tmp_path)} == {"x" * 200}


def test_a_forked_child_leaves_its_parents_file_alone(tmp_path: Path):
    install(settings(tmp_path), "engine")
    child = os.fork()
    if child == 0:
        ours.warning("the child's")
        os._exit(0 if not logs._installed._handlers else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ours.info("the parent's")
    assert [entry["message"] for entry in entries(tmp_path)] == ["the parent's"]


# What dead processes leave


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left(directory: Path, pid: int, age: float, size: int, host: str | None = None, end: str = "") -> Path:
    path = directory / f"worker-{int(age)}.{host or logs._host()}.{pid}.jsonl{end}"
    path.write_bytes(b"x" * size)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_files_of_the_dead_are_removed_oldest_first_and_those_of_the_living_never(tmp_path: Path):
    pid = dead_pid()
    new, middle, old = (left(tmp_path, pid, age, 1000) for age in (1, 2, 3))
    alive = left(tmp_path, os.getpid(), 9999, 5000)
    foreign = left(tmp_path, pid, 100, 5000, host="another")
    other = tmp_path / "notes.txt"
    other.write_text("not ours")
    assert prune(tmp_path, 2500, now=1e9) == 1
    assert not old.exists() and all(path.exists() for path in (new, middle, alive, foreign, other))
    assert prune(tmp_path, 0, now=1e9 + logs.OTHER_HOST_SECONDS) == 3
    assert not foreign.exists() and alive.exists() and other.exists()


def test_files_of_the_dead_are_bounded_in_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logs, "MAX_DEAD_FILES", 3)
    pid = dead_pid()
    for age in range(6):
        left(tmp_path, pid, age, 1)
    assert prune(tmp_path, 1000, now=1e9) == 3
    assert [path.name.split(".")[0] for path in log_files(tmp_path)] == ["worker-0", "worker-1", "worker-2"]


def test_an_installation_removes_what_is_too_much(tmp_path: Path):
    gone = left(tmp_path, dead_pid(), 5, 2000)
    install(settings(tmp_path, max_dead_bytes=1000), "worker")
    assert not gone.exists() and len(log_files(tmp_path)) == 1


def test_names_of_components_become_plain_file_names(tmp_path: Path):
    install(settings(tmp_path), "engine", "../../x#Y z")
    (path,) = log_files(tmp_path)
    assert path.name.startswith("engine-x-Y-z.")


def test_a_handler_that_buffers_for_a_file_survives_a_configuration_of_logging(tmp_path: Path):
    path = tmp_path / "serve.log"
    logger = logging.getLogger("test.kept")
    logger.propagate = False
    handler = MemoryHandler(1, target=logging.FileHandler(path))
    logger.addHandler(handler)
    try:
        with pytest.raises(ValueError, match="within"), logs.kept_handlers("test.kept"):
            logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
            assert handler.target is None
            raise ValueError("within")
        logger.error("after it")
        assert path.read_text() == "after it\n"
    finally:
        logger.removeHandler(handler)
        handler.close()
