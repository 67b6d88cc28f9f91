"""Work that goes on without its caller: alone, and as the controller does it."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import unattended
from actors.controller import Controller
from actors.gate import Gate
from actors.unattended import ask_oneself, repeatedly, to_the_end, until_done
from rollout.api import RunRequest
from rollout.errors import EngineTimeout
from tests.actors.service import Service, tasks


async def test_it_returns_and_raises_what_the_work_does():
    async def work(value: int) -> int:
        if value < 0:
            raise ValueError("negative")
        return value

    assert await to_the_end(work(3)) == 3
    with pytest.raises(ValueError, match="negative"):
        await to_the_end(work(-1))


async def test_a_caller_that_goes_away_does_not_end_the_work(caplog: pytest.LogCaptureFixture):
    gate, done = asyncio.Event(), []

    async def work(fails: bool) -> None:
        await gate.wait()
        if fails:
            raise ValueError("too late")
        done.append(True)

    callers = [asyncio.create_task(to_the_end(work(fails))) for fails in (False, True)]
    await asyncio.sleep(0)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    assert all(caller.cancelled() for caller in callers)
    gate.set()
    with caplog.at_level(logging.WARNING):
        await asyncio.sleep(0.01)
    assert done == [True] and "ValueError: too late" in caplog.text
    assert not unattended._running


async def test_attempts_are_repeated_and_each_failure_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(unattended, "FIRST_PAUSE_S", 0.001)
    failures = [EngineTimeout("no engine"), TimeoutError()]

    async def attempt() -> None:
        if failures:
            raise failures.pop(0)

    await until_done("coming back", attempt)
    assert [record.getMessage() for record in caplog.records] == [
        "coming back failed; it is tried again in 0.001 s",
        "coming back failed; it is tried again in 0.002 s",
    ]


def controller(**parts: Any) -> Controller:
    """A controller without its Ray."""
    made = object.__new__(Controller)
    for name in ("_open", "_ready"):
        gate = Gate(5.0, lambda: None, "is late")
        gate.open()
        setattr(made, name, gate)
    made._pool = SimpleNamespace(failure=None)  # type: ignore[assignment]
    for name, part in parts.items():
        setattr(made, name, part)
    return made


async def test_tasks_whose_trainer_went_away_in_the_middle_are_played(tmp_path: Path):
    """They are in the journal by then, and when the trainer asks again they are duplicates."""
    service = Service(tmp_path / "j.sqlite")
    made = controller(_service=service.runs)
    await made.create_run(RunRequest(name="r"))
    submitting = asyncio.create_task(made.submit("r", tasks(3)))
    while not service.store.run("r").book.submitted:
        await asyncio.sleep(0)
    assert not submitting.done(), "the journal is being written"
    submitting.cancel()
    await asyncio.gather(submitting, return_exceptions=True)
    assert submitting.cancelled()
    again = await made.submit("r", tasks(3))
    assert (again.accepted, again.duplicates) == (0, 3)
    assert {assignment.key.task_id for assignment in service.start()} == {"t0", "t1", "t2"}
    await service.close()


async def test_a_controller_that_cannot_come_back_at_once_tries_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unattended, "FIRST_PAUSE_S", 0.001)
    calls: list[str] = []

    async def spawn_workers() -> str:
        calls.append("spawn")
        return "renderer"

    async def connect() -> None:
        calls.append("connect")
        if calls.count("connect") < 3:
            raise EngineTimeout("the node is gone, and another not there yet")
        made._engine = "engine"  # type: ignore[assignment]

    made = controller(
        _engine=None,
        _coming_back=threading.Event(),
        _recovered=SimpleNamespace(runs={}),
        spawn_workers=spawn_workers,
        connect=connect,
    )
    async with asyncio.timeout(5):
        await made.come_back()
        assert calls == ["spawn", "connect"] * 3
        await made.come_back()
    assert calls == ["spawn", "connect"] * 3, "it was asked twice"


async def test_what_fails_is_done_again_at_its_next_time(caplog: pytest.LogCaptureFixture):
    times: list[int] = []

    async def work() -> None:
        times.append(len(times))
        if len(times) == 1:
            raise ValueError("once")

    task = asyncio.create_task(repeatedly(0.001, "ending what is overdue", work))
    async with asyncio.timeout(5):
        while len(times) < 3:
            await asyncio.sleep(0.001)
    task.cancel()
    assert "ending what is overdue failed" in caplog.text


def test_a_call_to_oneself_that_is_lost_is_repeated_until_it_is_heard(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unattended, "UNHEARD_S", 0.01)
    heard = threading.Event()
    calls: list[int] = []

    def call() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            heard.set()

    ask_oneself(call, heard)
    assert heard.wait(5)
    thread = next((t for t in threading.enumerate() if t.name == "ask-oneself"), None)
    if thread is not None:
        thread.join(5)
    assert len(calls) == 3


def test_a_call_to_oneself_that_raises_is_repeated_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(unattended, "UNHEARD_S", 0.01)
    heard = threading.Event()
    calls: list[int] = []

    def call() -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            raise RuntimeError("the core worker is not there yet")
        heard.set()

    ask_oneself(call, heard)
    assert heard.wait(5)
    assert "the core worker is not there yet" in caplog.text
