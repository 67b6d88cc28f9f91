"""A captured session's key at a gateway and at an engine: it opens its own session, and nothing beside it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from deployments.gateway import make_app
from deployments.openai_server import OpenAIServer, ServingSpec
from rollout.access import AccessKey, AccessSettings, hash_key
from rollout.agents import AgentRegistry
from rollout.session_keys import session_key
from tests.rollout.agents.scripted_chat import USER, ScriptedChatEngine, agent, say
from tests.rollout.test_inference import ScriptedCompletions, chunk

SECRET = b"of the cluster"
APP = "a" * 32
ACCESS = AccessSettings(keys=(AccessKey("app", hash_key(APP), frozenset({"serve"})),), session_secret=SECRET)
KEY = session_key(SECRET, "s1")


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/inference", {"job_id": "j", "prompt": "Once", "max_tokens": 1}),
        ("POST", "/agents/adder/v1/chat/completions", {"model": "adder", "messages": [USER]}),
        ("GET", "/agents", None),
        ("GET", "/v1/loading/progress", None),
        ("GET", "/v1/runs", None),
    ],
)
async def test_a_gateway_takes_no_sessions_key(header: str, method: str, path: str, body: Any):
    chat, completions = ScriptedChatEngine(say("5")), ScriptedCompletions(chunk("a", [1], "stop"))
    app = make_app(
        lambda: None,  # type: ignore[arg-type, return-value]
        10_000,
        ACCESS,
        agents=AgentRegistry([agent()]),
        chat=chat,
        completions=completions,
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        value = f"Bearer {KEY}" if header == "authorization" else KEY
        refused = await http.request(method, path, json=body, headers={header: value})
        assert refused.status_code == 403 and "session's base_url" in refused.json()["error"]["message"]
        assert chat.bodies == []
        if body is not None:
            served = await http.request(method, path, json=body, headers={"x-api-key": APP})
            assert served.status_code == 200, "a key that serves is let in"


class Keeper:
    """A TEST DOUBLE of the controller."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended = asyncio.Event()

    async def begin(self, session_id: str, request_id: str) -> None:
        self.begun.append(session_id)

    async def end(self, session_id: str, request_id: str, calls: Any, lost: bool) -> None:
        self.ended.set()


async def test_an_engine_takes_it_for_its_own_session_alone():
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def served() -> str:
        return "served"

    keeper = Keeper()
    server = OpenAIServer(app, ServingSpec("127.0.0.1", ACCESS), keeper, lambda: 1)
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{server.address}", timeout=20) as http:

            async def post(key: str, session: str | None) -> int:
                headers = {"authorization": f"Bearer {key}"} | ({"x-rollout-session": session} if session else {})
                return (await http.post("/v1/chat/completions", json={"messages": []}, headers=headers)).status_code

            assert [await post(KEY, session) for session in ("s1", "s2", None)] == [200, 403, 403]
            assert await post(session_key(b"of another cluster", "s1"), "s1") == 401
            assert keeper.begun == ["s1"]
            await asyncio.wait_for(keeper.ended.wait(), 5)
    finally:
        await server.stop()
