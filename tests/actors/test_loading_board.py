"""The board between replicas and gateways, without Ray: the actor is a plain object here, or behind a double."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from actors import loading_board
from actors.loading_board import BOARD_NAME, BoardReader, BoardReporter, LoadingBoard
from rollout.errors import UnavailableError

DOWNLOADING = {"stage": "downloading", "bytes_downloaded": 1, "bytes_total": 2, "speed_mbps": 3.0}
READY = {"stage": "ready"}


class FakeActor:
    """A TEST DOUBLE of an actor handle: `method.remote(…)` calls the board here. `fail`: what calls raise."""

    def __init__(self, board: LoadingBoard) -> None:
        self.board = board
        self.fail: list[Exception] = []

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> Any:
            if self.fail:
                raise self.fail.pop(0)
            return asyncio.ensure_future(getattr(self.board, method)(*arguments))

        return type("Method", (), {"remote": staticmethod(remote)})


@pytest.fixture
async def board() -> LoadingBoard:
    return LoadingBoard(1)


async def test_a_waiting_listener_hears_a_report_at_once(board: LoadingBoard):
    listeners = [asyncio.create_task(board.wait(0, 30)) for _ in range(50)]
    await asyncio.sleep(0.01)
    await board.report("a", [DOWNLOADING])
    for told in await asyncio.wait_for(asyncio.gather(*listeners), 1):
        assert [event.data for event in told] == [{**DOWNLOADING, "replica": "a"}]


async def test_a_late_listener_need_not_wait(board: LoadingBoard):
    await board.report("a", [DOWNLOADING, READY])
    told = await board.wait(0, 0)
    assert [event.data["stage"] for event in told] == ["downloading", "ready"]
    assert (await board.snapshot()).events == told


async def test_no_news_is_an_empty_answer_in_time(board: LoadingBoard):
    await board.report("a", [DOWNLOADING])
    after = (await board.snapshot()).events[-1].id
    started = asyncio.get_running_loop().time()
    waiter = asyncio.create_task(board.wait(after, 0.05))
    await asyncio.sleep(0.01)
    await board.report("a", [DOWNLOADING])
    assert await waiter == [] and asyncio.get_running_loop().time() - started >= 0.04


async def test_a_new_expectation_wakes_listeners(board: LoadingBoard):
    await board.expect(2)
    await board.report("a", [READY])
    waiter = asyncio.create_task(board.wait(0, 5))
    await asyncio.sleep(0.01)
    await board.expect(1)
    assert [event.data for event in await asyncio.wait_for(waiter, 1)] == [READY]


async def test_engines_that_are_taken_away_or_added_change_what_is_waited_for(board: LoadingBoard):
    await board.expect(8)
    for name in "abcd":
        await board.report(name, [READY])
    assert (await board.snapshot()).phase == "loading"
    await board.expect(4)
    assert (await board.snapshot()).phase == "ready", "four of eight were ready, and four are all there are to be"
    await board.expect(5)
    found = await board.snapshot()
    assert (found.phase, found.expected, found.ready) == ("loading", 5, 4)
    assert READY not in [event.data for event in found.events], "the end of the stream is withdrawn"


async def test_what_is_no_news_wakes_nobody(board: LoadingBoard):
    await board.report("a", [READY])
    after = (await board.snapshot()).events[-1].id
    waiter = asyncio.create_task(board.wait(after, 0.05))
    await asyncio.sleep(0.01)
    await board.expect(1)
    assert await waiter == []


async def test_a_stopped_replica_is_forgotten_at_once(board: LoadingBoard):
    await board.report("a", [READY])
    await board.forget("a")
    assert (await board.snapshot()).phase == "nothing"


async def test_too_many_listeners_are_turned_away(board: LoadingBoard, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading_board, "MAX_LISTENERS", 2)
    waiting = [asyncio.create_task(board.wait(0, 30)) for _ in range(2)]
    await asyncio.sleep(0.01)
    with pytest.raises(UnavailableError, match="2 listeners"):
        await board.wait(0, 30)
    waiting[0].cancel()
    await asyncio.sleep(0.01)
    assert await board.wait(0, 0.01) == [], "one that left makes room"
    waiting[1].cancel()


async def test_what_is_no_event_is_refused(board: LoadingBoard):
    with pytest.raises(ValueError, match="stage"):
        await board.report("a", [{"stage": "?"}])


# The gateway's side


async def test_a_reader_asks_the_board_of_its_cluster(board: LoadingBoard):
    asked = []

    def find(name: str, namespace: str | None) -> Any:
        asked.append((name, namespace))
        return FakeActor(board)

    reader = BoardReader("cluster", find)
    await board.report("a", [READY])
    assert (await reader.snapshot()).phase == "ready"
    assert len(await reader.wait(0, 1)) == 1
    assert asked == [(BOARD_NAME, "cluster")], "found once"


async def test_a_reader_without_a_board():
    def find(name: str, namespace: str | None) -> Any:
        raise ValueError("Failed to look up actor")

    with pytest.raises(UnavailableError, match="does not exist"):
        await BoardReader(None, find).snapshot()


async def test_a_reader_finds_a_board_that_was_started_anew(board: LoadingBoard):
    dead, alive = FakeActor(board), FakeActor(board)
    dead.fail = [RuntimeError("actor died")]
    actors = [dead, alive]
    reader = BoardReader(None, lambda *_: actors.pop(0))
    with pytest.raises(UnavailableError, match="RuntimeError: actor died"):
        await reader.snapshot()
    assert (await reader.snapshot()).phase == "nothing"


async def test_a_board_that_does_not_answer_is_not_waited_for(board: LoadingBoard, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading_board, "CALL_SECONDS", 0.02)
    monkeypatch.setattr(board, "snapshot", lambda: asyncio.sleep(30))
    with pytest.raises(UnavailableError, match=r"did not answer snapshot within 0.02 s"):
        await BoardReader(None, lambda *_: FakeActor(board)).snapshot()


async def test_what_the_board_says_itself_is_told_as_it_is(board: LoadingBoard):
    wrapped = RuntimeError("a stack")
    wrapped.cause = UnavailableError("too many")  # type: ignore[attr-defined]
    actor = FakeActor(board)
    actor.fail = [wrapped]
    with pytest.raises(UnavailableError, match=r"^too many$"):
        await BoardReader(None, lambda *_: actor).wait(0, 1)


# The replica's side


async def test_a_reporter_sends_and_does_not_wait(board: LoadingBoard):
    BoardReporter("cluster", lambda *_: FakeActor(board))("a", [READY])
    assert (await board.snapshot()).phase == "nothing"
    await asyncio.sleep(0)
    assert (await board.snapshot()).phase == "ready"


async def test_a_reporter_survives_the_board_and_complains_once(
    board: LoadingBoard, caplog: pytest.LogCaptureFixture
):
    broken, whole = FakeActor(board), FakeActor(board)
    broken.fail = [RuntimeError("gone")]

    def missing() -> Any:
        raise ValueError("no such actor")

    answers = [lambda: broken, missing, lambda: whole]
    reporter = BoardReporter(None, lambda *_: answers.pop(0)())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            reporter("a", [READY])
    await asyncio.sleep(0)
    assert (await board.snapshot()).phase == "ready"
    assert len(caplog.records) == 1 and "gone" in caplog.text
