"""The progress stream over HTTP, on a real board in this process: early, late, slow and returning listeners."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from actors.loading_board import LoadingBoard
from deployments.routes import errors, loading
from rollout.errors import UnavailableError
from rollout.loading import LoadingEvent

READY = {"stage": "ready"}


def rank(number: int, layers: int) -> dict[str, Any]:
    return {
        "stage": "loading_to_vram", "rank": number, "device": "cpu", "layers_loaded": layers, "layers_total": 32,
        "vram_mb": 64.0 * layers, "bytes_read": layers, "bytes_total": 32,
    }  # fmt: skip


class Stream:
    """One listener: the pieces of the body as they come, read only when asked for, as a slow client does."""

    def __init__(self, app: FastAPI, headers: dict[str, str] | None = None) -> None:
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue(maxsize=1)
        self._gone = asyncio.Event()
        self.status = 0
        scope = {
            "type": "http", "method": "GET", "path": "/v1/loading/progress", "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
        }  # fmt: skip
        self._task = asyncio.create_task(self._run(app, scope))
        self.text = ""

    async def _run(self, app: FastAPI, scope: dict[str, Any]) -> None:
        async def receive() -> dict[str, Any]:
            await self._gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            elif message.get("body"):
                await self._pieces.put(message["body"].decode())
            if message["type"] == "http.response.body" and not message.get("more_body"):
                await self._pieces.put(None)

        await app(scope, receive, send)

    async def next(self) -> str | None:
        """The next piece; None at the end."""
        piece = await asyncio.wait_for(self._pieces.get(), 5)
        self.text += piece or ""
        return piece

    async def rest(self) -> str:
        while await self.next() is not None:
            pass
        return self.text

    async def leave(self) -> None:
        self._gone.set()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def parse(text: str) -> list[tuple[int | None, Any]]:
    """(id, data) of every event; comments are left out."""
    found = []
    for part in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in part.splitlines() if not line.startswith(":"))
        if "data" in fields:
            data = fields["data"]
            found.append(
                (int(fields["id"]) if "id" in fields else None, data if data[0] == "[" else json.loads(data))
            )
    return found


@pytest.fixture
async def board() -> LoadingBoard:
    return LoadingBoard(2)


@pytest.fixture
def app(board: LoadingBoard) -> FastAPI:
    app = FastAPI()
    errors.install(app)
    app.include_router(loading.router)
    app.state.loading = board
    return app


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr(loading, "FAILURE_PAUSE_S", 0.001)


async def test_nothing_there_is_503_with_the_reason(http: httpx.AsyncClient):
    told = await http.get("/v1/loading/progress")
    assert told.status_code == 503 and told.headers["retry-after"]
    error = told.json()["error"]
    assert error["type"] == "unavailable" and "nothing is loading and nothing is ready" in error["message"]
    assert "2 expected" in error["message"]


async def test_a_gateway_without_a_board_is_503_too(app: FastAPI, http: httpx.AsyncClient):
    del app.state.loading
    told = await http.get("/v1/loading/progress")
    assert told.status_code == 503 and "no loading board" in told.json()["error"]["message"]


async def test_already_ready_is_the_snapshot_and_the_end(board: LoadingBoard, http: httpx.AsyncClient):
    for name in "ab":
        await board.report(name, [rank(0, 32), READY])
    told = await http.get("/v1/loading/progress")
    assert told.headers["content-type"].startswith("text/event-stream")
    events = parse(told.text)
    assert [data["stage"] for _, data in events[:-1]] == ["loading_to_vram", "loading_to_vram", "ready"]
    assert events[-1] == (None, "[DONE]")
    assert events[0][1]["replica"] == "a" and events[0][1]["layers_total"] == 32


async def test_many_listeners_early_and_late_hear_the_same_end(board: LoadingBoard, app: FastAPI):
    await board.report("a", [rank(0, 1), rank(1, 1)])
    early = [Stream(app) for _ in range(20)]
    for stream in early:
        await stream.next()
        await stream.next()
    for layers in range(2, 33):
        await board.report("a", [rank(0, layers), rank(1, layers)])
        await asyncio.sleep(0)
    late = Stream(app)
    assert [json.loads((await late.next() or "").split("data: ")[1])["layers_loaded"] for _ in range(2)] == [32, 32]
    await board.report("a", [{"stage": "warming_up"}, READY])
    await board.report("b", [rank(0, 32), READY])
    for stream in [*early, late]:
        events = parse(await stream.rest())
        ids = [number for number, _ in events if number is not None]
        assert ids == sorted(set(ids))
        assert [data["stage"] for _, data in events[-4:-1]] == ["warming_up", "loading_to_vram", "ready"]
        assert events[-1] == (None, "[DONE]") and stream.status == 200


async def test_a_slow_listener_gets_every_state_and_no_early_end(board: LoadingBoard, app: FastAPI):
    await board.report("a", [rank(0, 1)])
    slow = Stream(app)
    await slow.next()
    # Everything happens while it does not read.
    for layers in range(2, 33):
        await board.report("a", [rank(0, layers)])
        await asyncio.sleep(0.002)
    await board.report("a", [{"stage": "warming_up"}, READY])
    await board.report("b", [rank(0, 32), rank(1, 32), READY])
    await asyncio.sleep(0.15)
    events = parse(await slow.rest())
    assert events[-2][1] == READY and events[-1] == (None, "[DONE]")
    last = {(data["replica"], data["rank"]): data["layers_loaded"] for _, data in events if "rank" in data}
    assert last == {("a", 0): 32, ("b", 0): 32, ("b", 1): 32}
    assert [data for _, data in events].count("[DONE]") == 1


async def test_silence_is_kept_alive_and_never_ended(board: LoadingBoard, app: FastAPI):
    await board.report("a", [])
    stream = Stream(app)
    assert [await stream.next() for _ in range(3)] == [loading.KEEP_ALIVE] * 3
    await board.report("a", [rank(0, 1)])
    while (await stream.next() or "").startswith(":"):
        pass
    assert "[DONE]" not in stream.text
    await stream.leave()


async def test_one_that_comes_back_is_told_what_is_newer(board: LoadingBoard, app: FastAPI, http: httpx.AsyncClient):
    await board.report("a", [rank(0, 1), rank(1, 1)])
    seen = (await board.snapshot()).events[-1].id
    await board.report("a", [rank(1, 2), READY])
    await board.report("b", [READY])
    told = parse((await http.get("/v1/loading/progress", headers={"last-event-id": str(seen)})).text)
    assert [data if data == "[DONE]" else data["stage"] for _, data in told] == [
        "loading_to_vram", "ready", "[DONE]",
    ]  # fmt: skip
    end = told[1][0]
    again = await http.get("/v1/loading/progress", headers={"last-event-id": str(end)})
    assert parse(again.text) == [(None, "[DONE]")], "it has heard everything but the mark"


@pytest.mark.parametrize("strange", ["", "x", "-1", "9" * 18, "9" * 400, "²", "1.5"])
async def test_an_id_that_is_none_of_ours_is_told_everything(
    board: LoadingBoard, http: httpx.AsyncClient, strange: str
):
    for name in "ab":
        await board.report(name, [rank(0, 32), READY])
    told = await http.get("/v1/loading/progress", headers={"last-event-id": strange.encode()})
    assert len(parse(told.text)) == 4


async def test_an_error_is_an_event_and_then_the_end(board: LoadingBoard, app: FastAPI, http: httpx.AsyncClient):
    await board.report("a", [rank(0, 1)])
    stream = Stream(app)
    await stream.next()
    await board.report("a", [rank(0, 2), {"stage": "error", "message": "out of memory\n\ndata: [DONE]"}])
    for text in (await stream.rest(), (await http.get("/v1/loading/progress")).text):
        (_, last), done = parse(text)[-2:]
        assert last == {"stage": "error", "replica": "a", "message": "out of memory\n\ndata: [DONE]"}
        assert done == (None, "[DONE]")


class Falling:
    """A TEST DOUBLE of a board that answers some calls and then dies."""

    def __init__(self, board: LoadingBoard, failures: int) -> None:
        self.board, self.failures = board, failures
        self.snapshot = board.snapshot

    async def wait(self, after: int, timeout: float) -> list[LoadingEvent]:
        if self.failures:
            self.failures -= 1
            raise UnavailableError("the loading board is gone")
        return await self.board.wait(after, timeout)


async def test_a_board_that_comes_back_is_waited_for(board: LoadingBoard, app: FastAPI, http: httpx.AsyncClient):
    app.state.loading = Falling(board, loading.MAX_FAILURES - 1)
    await board.report("a", [rank(0, 1)])
    await board.expect(1)
    asyncio.get_running_loop().call_later(0.1, lambda: asyncio.ensure_future(board.report("a", [READY])))
    events = parse((await http.get("/v1/loading/progress")).text)
    assert [data for _, data in events[-2:]] == [READY, "[DONE]"]


async def test_a_board_that_stays_away_ends_the_stream_with_an_error(
    board: LoadingBoard, app: FastAPI, http: httpx.AsyncClient
):
    app.state.loading = Falling(board, 10_000)
    await board.report("a", [rank(0, 1)])
    *_, (number, last), done = parse((await http.get("/v1/loading/progress")).text)
    assert number is None and last["stage"] == "error" and "the loading board is gone" in last["message"]
    assert done == (None, "[DONE]")


async def test_a_listener_that_leaves_frees_its_place(board: LoadingBoard, app: FastAPI):
    await board.report("a", [rank(0, 1)])
    stream = Stream(app)
    await stream.next()
    await asyncio.sleep(0.01)
    assert board._listeners == 1
    await stream.leave()
    assert board._listeners == 0
