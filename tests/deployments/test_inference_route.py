"""`POST /v1/inference`: over the real HTTP client of vLLM's endpoint, and over a real server where it matters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from deployments.completions import HttpCompletions
from deployments.routes import errors, event_stream, inference
from tests.rollout.test_inference import ScriptedCompletions, chunk
from tests.serving import serving

ASKED = {"job_id": "job-1", "prompt": "Once", "max_tokens": 8}
ID = "0b8f0d3e-6c1f-4c55-9d43-2f2a8b9a0c11"


def application(engine: Any, *, correlation_id: str | None = None) -> FastAPI:
    app = FastAPI()
    errors.install(app)
    app.include_router(inference.router)
    app.state.max_body_bytes = 10_000
    if engine is not None:
        app.state.completions = engine
    if correlation_id is not None:

        @app.middleware("http")
        async def identify(request: Request, go_on: Callable[[Request], Any]) -> Any:
            request.state.correlation_id = correlation_id
            return await go_on(request)

    return app


async def post(app: FastAPI, **options: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        return await http.post("/v1/inference", **({"json": ASKED} | options))


def events(text: str) -> list[Any]:
    """The data of a stream's events; the last is checked to be [DONE]."""
    assert text.endswith("\n\n")
    found = [one.removeprefix("data: ") for one in text.strip().split("\n\n") if not one.startswith(":")]
    assert found[-1] == "[DONE]" and found.count("[DONE]") == 1
    return [json.loads(one) for one in found[:-1]]


def sse(*data: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in data) + b"data: [DONE]\n\n"


async def test_a_completion_from_vllms_own_chunks():
    seen: list[httpx.Request] = []

    def vllm(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        chunks = [chunk("é", [5]), chunk("", [6]), chunk("🙂", [7]), chunk("", [8], "stop", "\n")]
        return httpx.Response(200, content=sse(*chunks))

    engine = HttpCompletions("http://front:8000", "qwen", transport=httpx.MockTransport(vllm))
    answer = await post(application(engine, correlation_id=ID))
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    started, *tokens, end = events(answer.text)
    assert (started["event"], started["job_id"], started["model"]) == ("started", "job-1", "qwen")
    assert tokens == [{"event": "token", "t": text, "i": index} for index, text in enumerate(["é", "", "🙂", ""])]
    assert (end["event"], end["tokens_out"], end["stop_reason"]) == ("end", 4, "stop_sequence")

    (request,) = seen
    assert str(request.url) == "http://front:8000/v1/completions"
    body = json.loads(request.content)
    assert (body["model"], body["prompt"], body["stream"], body["return_token_ids"]) == ("qwen", "Once", True, True)
    assert "job_id" not in body
    assert (request.headers["x-correlation-id"], request.headers["x-request-id"]) == (ID, ID)


async def test_without_a_correlation_id_none_is_made_up():
    seen: list[httpx.Request] = []

    def vllm(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=sse(chunk("a", [1], "length")))

    await post(application(HttpCompletions("http://front", "qwen", transport=httpx.MockTransport(vllm))))
    assert not {"x-correlation-id", "x-request-id"} & set(seen[0].headers)


async def test_all_that_is_wrong_with_a_body_is_one_answer():
    answer = await post(application(ScriptedCompletions()), json={"prompt": "", "max_tokens": 0, "x": 1})
    assert answer.status_code == 400
    found = answer.json()["errors"]
    assert {one["field"] for one in found} == {"job_id", "prompt", "max_tokens", "x"}
    (zero,) = [one for one in found if one["field"] == "max_tokens"]
    assert (zero["constraint"], zero["value"]) == (">= 1", 0) and zero["message"]


@pytest.mark.parametrize(
    ("content", "status"), [(b"", 400), (b"{", 400), (b"\xff\xfe", 400), (b"[]", 400), (b"x" * 20_000, 413)]
)
async def test_bodies_that_cannot_be_read(content: bytes, status: int):
    answer = await post(application(ScriptedCompletions()), json=None, content=content)
    assert answer.status_code == status
    if status == 400:
        assert [one["field"] for one in answer.json()["errors"]] == [""]


async def test_a_gateway_without_an_engine_says_so():
    answer = await post(application(None))
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable")


@pytest.mark.parametrize(
    ("status", "content", "code"),
    [
        (400, b'{"error": {"message": "the prompt is too long", "code": 400}}', "INVALID_REQUEST"),
        (503, b'{"error": {"message": "no engine is ready"}}', "INFERENCE_FAILED"),
        (500, b'{"error": {"message": "CUDA out of memory"}}', "VRAM_OOM"),
    ],
)
async def test_an_engine_that_refuses(status: int, content: bytes, code: str):
    transport = httpx.MockTransport(lambda _: httpx.Response(status, content=content))
    answer = await post(application(HttpCompletions("http://front", "qwen", transport=transport)))
    assert answer.status_code == 200
    message = json.loads(content)["error"]["message"]
    assert events(answer.text) == [{"event": "error", "code": code, "message": message}]


async def test_an_engine_that_is_not_there():
    def answer(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    transport = httpx.MockTransport(answer)
    (error,) = events((await post(application(HttpCompletions("http://front", "qwen", transport=transport)))).text)
    assert (error["code"], error["message"]) == ("INFERENCE_FAILED", "the model cannot be reached: refused")


async def test_a_connection_that_breaks_in_the_middle():
    class Breaking(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield sse(chunk("a", [1])).removesuffix(b"data: [DONE]\n\n")
            raise httpx.RemoteProtocolError("cut")

    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Breaking()))
    found = events((await post(application(HttpCompletions("http://front", "qwen", transport=transport)))).text)
    assert [event["event"] for event in found] == ["started", "token", "error"]
    assert found[-1]["message"] == "the connection to the model broke: cut"


async def test_the_deadline_ends_the_stream_and_the_completion(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inference, "DEADLINE_SECONDS", 0.1)
    engine = ScriptedCompletions(chunk("a", [1]), 60.0)
    found = events((await asyncio.wait_for(post(application(engine)), 10)).text)
    assert [event["event"] for event in found] == ["started", "token", "error"]
    assert (found[-1]["code"], engine.left) == ("TIMEOUT", 1)


async def test_a_silent_stream_is_kept_open(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(event_stream, "KEEP_ALIVE_S", 0.05)
    answer = await post(application(ScriptedCompletions(0.2, chunk("a", [1]), 0.2, chunk("b", [2], "length"))))
    assert answer.text.count(": keep-alive\n\n") >= 2
    assert [event["t"] for event in events(answer.text) if event["event"] == "token"] == ["a", "b"]


# Over real servers: the engine's application, HTTP between, ours, HTTP, a client


class FakeVllm:
    """A TEST DOUBLE of vLLM's server: chunks as they are put in; `gone` is set when its client goes away."""

    def __init__(self) -> None:
        self.chunks: asyncio.Queue[Any] = asyncio.Queue()
        self.gone = asyncio.Event()
        self.app = FastAPI()

        @self.app.post("/v1/completions")
        async def completions() -> StreamingResponse:
            return StreamingResponse(self._stream(), media_type="text/event-stream")

    async def _stream(self) -> AsyncIterator[str]:
        try:
            while (one := await self.chunks.get()) is not None:
                yield f"data: {json.dumps(one)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.gone.set()


@asynccontextmanager
async def both(engine: FakeVllm) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(engine.app, lifespan="off") as engine_url:
        completions = HttpCompletions(engine_url, "qwen")
        async with (
            serving(application(completions), lifespan="off") as url,
            httpx.AsyncClient(base_url=url, timeout=20) as http,
        ):
            yield http
        await completions.close()


async def test_every_token_is_there_before_the_next_is_sampled():
    engine = FakeVllm()
    async with both(engine) as http, http.stream("POST", "/v1/inference", json=ASKED) as answer:
        lines = (line async for line in answer.aiter_lines() if line.startswith("data:"))
        assert json.loads((await anext(lines))[5:])["event"] == "started"
        for index in range(5):
            engine.chunks.put_nowait(chunk(f"t{index}", [index]))
            found = json.loads((await asyncio.wait_for(anext(lines), 10))[5:])
            assert (found["t"], found["i"]) == (f"t{index}", index)
        engine.chunks.put_nowait(chunk("", [9], "stop"))
        engine.chunks.put_nowait(None)
        assert [line async for line in lines][-1] == "data: [DONE]"


async def test_a_client_that_hangs_up_ends_the_engines_call():
    engine = FakeVllm()
    async with both(engine) as http:
        async with http.stream("POST", "/v1/inference", json=ASKED) as answer:
            engine.chunks.put_nowait(chunk("a", [1]))
            async for line in answer.aiter_lines():
                if '"token"' in line:
                    break
            assert not engine.gone.is_set()
        await asyncio.wait_for(engine.gone.wait(), 10)


async def test_a_client_that_hangs_up_before_the_first_token_ends_the_engines_call():
    engine = FakeVllm()
    async with both(engine) as http:
        async with http.stream("POST", "/v1/inference", json=ASKED):
            pass
        await asyncio.wait_for(engine.gone.wait(), 10)


# ASGI by hand: a server that stops listening to us


def scope() -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": "/v1/inference",
        "raw_path": b"/v1/inference",
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "client": None,
        "server": None,
    }


async def test_a_server_that_gives_up_while_sending_leaves_nothing_behind():
    engine = ScriptedCompletions(chunk("x", [1]), chunk("y", [2]), 60.0)
    messages = [{"type": "http.request", "body": json.dumps(ASKED).encode(), "more_body": False}]
    stuck = asyncio.Event()

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            stuck.set()
            await asyncio.Event().wait()

    before = asyncio.all_tasks()
    answering = asyncio.ensure_future(application(engine)(scope(), receive, send))
    await asyncio.wait_for(stuck.wait(), 10)
    answering.cancel()
    await asyncio.wait({answering})
    assert engine.left == 1
    assert asyncio.all_tasks() == before


async def test_a_client_that_does_not_read_is_sent_nothing_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(event_stream, "KEEP_ALIVE_S", 0.01)
    messages = [{"type": "http.request", "body": json.dumps(ASKED).encode(), "more_body": False}]
    gone, sent = asyncio.Event(), []

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    engine = ScriptedCompletions(chunk("x", [1], "length"))
    answering = asyncio.ensure_future(application(engine)(scope(), receive, send))
    await asyncio.sleep(0.2)
    assert len(sent) == 2, "the head and the first event; no keep-alive lines pile up behind them"
    gone.set()
    await asyncio.wait_for(answering, 10)
    assert engine.left == 1
