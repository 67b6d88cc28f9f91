"""The model over HTTP: chunks out, and a clear error for whatever the other side does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from deployments.chat_engine import HttpChatEngine
from rollout.agents import ChatEngineError
from rollout.correlation import correlation_id

BODY = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0.0}


def engine(answer: Callable[[httpx.Request], Any], **options: Any) -> HttpChatEngine:
    return HttpChatEngine("http://model:8000/", "qwen", transport=httpx.MockTransport(answer), **options)


class Pieces(httpx.AsyncByteStream):
    """A body that comes in these pieces; an exception is raised, a number of seconds waited."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces = pieces
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def aclose(self) -> None:
        self.closed = True


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


async def read(made: HttpChatEngine, body: dict[str, Any] | None = None) -> list[Any]:
    return [chunk async for chunk in made.stream(body or BODY)]


async def test_chunks_come_as_they_are_cut_or_not():
    whole = event({"choices": [], "n": 1}) + b": keep-alive\r\n\r\n" + event({"n": 2}) + b"data: [DONE]\n\n"
    for size in (1, 7, len(whole)):
        pieces = Pieces(*(whole[at : at + size] for at in range(0, len(whole), size)))
        found = await read(engine(lambda _, pieces=pieces: httpx.Response(200, stream=pieces)))
        assert found == [{"choices": [], "n": 1}, {"n": 2}]


async def test_line_separators_inside_a_text_are_text():
    text = "a\u2028b\u0085c\x0b"
    found = await read(engine(lambda _: httpx.Response(200, stream=Pieces(event({"t": text}), b"data: [DONE]\n\n"))))
    assert found == [{"t": text}]


async def test_what_is_asked():
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=b"data: [DONE]\n\n")

    made = engine(answer, api_key="key")
    await read(made)
    await read(made, {**BODY, "model": "other"})
    assert str(seen[0].url) == "http://model:8000/v1/chat/completions"
    assert seen[0].headers["authorization"] == "Bearer key"
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    assert json.loads(seen[0].content) == {"model": "qwen", **BODY, **streaming}
    assert json.loads(seen[1].content)["model"] == "other"
    assert "x-correlation-id" not in seen[0].headers
    token = correlation_id.set("f81d4fae-7dec-11d0-a765-00a0c91e6bf6")
    try:
        await read(made)
    finally:
        correlation_id.reset(token)
    assert seen[2].headers["x-correlation-id"] == "f81d4fae-7dec-11d0-a765-00a0c91e6bf6"
    assert "x-request-id" not in seen[2].headers
    await made.close()


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (400, b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (404, b'{"error": "no such model"}', "no such model"),
        (500, b"<html>oops", "HTTP 500: <html>oops"),
        (502, b'{"detail": 1}', 'HTTP 502: {"detail": 1}'),
    ],
)
async def test_refusals_are_told_with_their_status(status: int, content: bytes, said: str):
    with pytest.raises(ChatEngineError) as caught:
        await read(engine(lambda _: httpx.Response(status, content=content)))
    assert caught.value.status == status and said in str(caught.value)


@pytest.mark.parametrize("told", [b"7", b"99999", b"Wed, 21 Oct 2099 07:28:00 GMT", None])
async def test_a_server_may_say_when_to_come_again(told: bytes | None):
    headers = {} if told is None else {"retry-after": told}
    with pytest.raises(ChatEngineError) as caught:
        await read(engine(lambda _: httpx.Response(429, content=b"{}", headers=headers)))
    assert caught.value.retry_after == {b"7": 7.0, b"99999": 3600.0}.get(told or b"")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "half \ud83d", "nested"])
async def test_a_body_that_is_no_json_is_the_askers_mistake(value: Any):
    if value == "nested":
        value = []
        for _ in range(100_000):
            value = [value]

    def never(_: httpx.Request) -> httpx.Response:
        raise AssertionError("nothing is sent")

    with pytest.raises(ChatEngineError, match="cannot be sent to the model as JSON") as caught:
        await read(engine(never), {**BODY, "value": value})
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("piece", "status", "said"),
    [
        (event({"error": {"message": "engine died", "code": 503}}), 503, "engine died"),
        (event({"error": {"message": "odd", "code": "bad"}}), 502, "odd"),
        (b"data: {\n\n", 502, "not JSON"),
        (b"data: 7\n\n", 502, "is a int"),
        (httpx.RemoteProtocolError("cut"), 502, "connection to the model broke: cut"),
        (httpx.ReadTimeout(""), 504, "said nothing for 9 s"),
    ],
)
async def test_what_breaks_in_the_stream_is_an_error_after_what_came(piece: Any, status: int, said: str):
    found = []
    made = engine(lambda _: httpx.Response(200, stream=Pieces(event({"n": 1}), piece)), idle_seconds=9)
    with pytest.raises(ChatEngineError) as caught:
        async for chunk in made.stream(BODY):
            found.append(chunk)  # noqa: PERF401
    assert found == [{"n": 1}]
    assert caught.value.status == status and said in str(caught.value)


async def test_a_model_that_is_not_there():
    def answer(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(ChatEngineError, match="cannot be reached: refused") as caught:
        await read(engine(answer))
    assert caught.value.status == 503


async def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deployments.openai_http.MAX_EVENT_BYTES", 100)
    with pytest.raises(ChatEngineError, match="more than 100 bytes"):
        await read(engine(lambda _: httpx.Response(200, stream=Pieces(*([b"x" * 50] * 10)))))


async def test_a_stream_that_is_left_closes_its_connection():
    pieces = Pieces(event({"n": 1}), event({"n": 2}))
    stream = engine(lambda _: httpx.Response(200, stream=pieces)).stream(BODY)
    assert await anext(stream) == {"n": 1}
    await stream.aclose()  # type: ignore[attr-defined]
    assert pieces.closed


async def test_a_server_that_says_nothing_has_a_deadline():
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            pass
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    made = HttpChatEngine(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "qwen", idle_seconds=0.1)
    with pytest.raises(ChatEngineError, match=r"said nothing for 0\.1 s"):
        await asyncio.wait_for(read(made), 10)
    await made.close()
    server.close()
    await server.wait_closed()
