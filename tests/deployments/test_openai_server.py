"""The engine's own server, around a small application: listens on a free port, asks for keys, ends when told to."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import StreamingResponse

from deployments import openai_server
from deployments.openai_server import OpenAIServer, ServingSpec
from rollout.access import AccessKey, AccessSettings


class NoSessions:
    """A TEST DOUBLE of the controller, for requests that belong to no session."""

    async def begin(self, session_id: str, request_id: str) -> None:
        raise AssertionError("there is no session")

    async def end(self, session_id: str, request_id: str, calls: Any, lost: bool) -> None:
        raise AssertionError("there is no session")


def application() -> FastAPI:
    app = FastAPI()
    app.state.going_on = asyncio.Event()

    @app.get("/v1/models")
    async def models() -> dict[str, str]:
        return {"object": "list"}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            yield "data: first\n\n"
            await app.state.going_on.wait()
            yield "data: last\n\n"

        return StreamingResponse(pieces(), media_type="text/event-stream")

    return app


def made(app: FastAPI, access: AccessSettings | None = None) -> OpenAIServer:
    return OpenAIServer(app, ServingSpec("127.0.0.1", access or AccessSettings()), NoSessions(), lambda: 1)


@asynccontextmanager
async def serving(app: FastAPI, access: AccessSettings | None = None) -> AsyncIterator[httpx.AsyncClient]:
    server = made(app, access)
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{server.address}", timeout=20) as http:
            yield http
    finally:
        await server.stop()


async def test_it_serves_from_the_running_loop_on_a_free_port():
    app = application()
    seen: list[Any] = []

    @app.get("/v1/models/loop")
    async def loop() -> None:
        seen.append(asyncio.get_running_loop())

    async with serving(app) as http:
        assert http.base_url.port
        assert (await http.get("/v1/models")).json() == {"object": "list"}
        assert (await http.get("/v1/models/loop")).status_code == 200
    assert seen == [asyncio.get_running_loop()]


async def test_two_servers_do_not_share_a_port():
    first, second = made(application()), made(application())
    assert first.address != second.address
    await first.start()
    await second.start()
    async with httpx.AsyncClient() as http:
        for server in (first, second):
            assert (await http.get(f"http://{server.address}/health")).status_code == 200
    await asyncio.gather(first.stop(), second.stop())


async def test_every_answer_has_a_correlation_id():
    async with serving(application()) as http:
        assert (await http.get("/v1/models")).headers["x-correlation-id"]
        sent = "0b8f0d3e-6c1f-4c55-9d43-2f2a8b9a0c11"
        answer = await http.get("/v1/nothing", headers={"X-Correlation-ID": sent})
        assert (answer.status_code, answer.headers["x-correlation-id"]) == (404, sent)


async def test_a_key_is_demanded_where_there_are_keys():
    key = AccessKey("ci", hashlib.sha256(b"secret-key-of-32-characters-long").hexdigest(), frozenset({"serve"}))
    async with serving(application(), AccessSettings(keys=(key,))) as http:
        refused = await http.get("/v1/models")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        right = {"authorization": "Bearer secret-key-of-32-characters-long"}
        assert (await http.get("/v1/models", headers=right)).status_code == 200
        assert (await http.get("/health")).status_code == 200, "the front's check has no key"


async def test_an_application_that_was_built_already_is_guarded_too():
    app = application()
    # As a library does that instruments vLLM's application; its CORS lets every origin in.
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    app.middleware_stack = app.build_middleware_stack()
    key = AccessKey("ci", hashlib.sha256(b"secret").hexdigest(), frozenset({"serve"}))
    async with serving(app, AccessSettings(keys=(key,))) as http:
        refused = await http.get("/v1/models", headers={"origin": "https://elsewhere"})
        assert refused.status_code == 401
        assert "access-control-allow-origin" not in refused.headers


async def test_stopping_ends_it():
    server = made(application())
    await server.start()
    address = server.address
    await server.stop()
    async with httpx.AsyncClient() as http:
        with pytest.raises(httpx.ConnectError):
            await http.get(f"http://{address}/health")


async def test_a_stream_may_end_when_the_server_stops(monkeypatch: pytest.MonkeyPatch):
    app = application()
    server = made(app)
    await server.start()
    async with httpx.AsyncClient() as http, http.stream("POST", f"http://{server.address}/v1/completions") as answer:
        lines = answer.aiter_lines()
        assert await anext(lines) == "data: first"
        stopping = asyncio.ensure_future(server.stop())
        await asyncio.sleep(0.2)
        assert not stopping.done()
        app.state.going_on.set()
        assert "data: last" in [line async for line in lines]
        await asyncio.wait_for(stopping, openai_server.DRAIN_SECONDS)


async def test_stopping_what_was_never_started_frees_the_port():
    server = made(application())
    host, _, port = server.address.rpartition(":")
    await server.stop()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))


async def test_signals_stay_with_the_process():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with serving(application()):
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
