"""The agents' routes: OpenAI's form in every case, over the real loop, and a client that hangs up."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from actors.agent_book import AgentBook
from deployments.agents import ServedAgents
from deployments.gateway import make_app
from deployments.routes import agents, errors, event_stream
from rollout.access import AccessKey, AccessSettings, hash_key
from rollout.agents import AgentRegistry, ChatEngineError
from rollout.environment import Environment
from rollout.tools import tool
from tests.actors.service import Service
from tests.deployments.test_agents import Keeper
from tests.rollout.agents.scripted_chat import USER, ScriptedChatEngine, agent, ask, client_tool, delta, say
from tests.serving import serving

CHAT = "/agents/adder/v1/chat/completions"
FIVE = ("add", '{"a": 2, "b": 3}')


def application(engine: Any, *, caller: set[str] | None = None, name: str = "app", **fields: Any) -> FastAPI:
    app = FastAPI()
    errors.install(app)
    app.include_router(agents.router)
    app.state.max_body_bytes = 10_000
    app.state.agents = ServedAgents(AgentRegistry([agent(**fields)]))
    app.state.chat_engine = engine
    if caller is not None:

        @app.middleware("http")
        async def authenticate(request: Request, go_on: Callable[[Request], Any]) -> Any:
            request.state.scopes, request.state.caller = caller, name
            return await go_on(request)

    return app


@asynccontextmanager
async def client(engine: Any = None, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(application(engine, **options), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        yield http


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "adder", "messages": [USER], **fields}


def events(text: str) -> list[Any]:
    """The data of a stream's events; the last is checked to be [DONE]."""
    assert text.endswith("\n\n")
    found = [line.removeprefix("data: ") for line in text.strip().split("\n\n") if not line.startswith(":")]
    assert found[-1] == "[DONE]" and found.count("[DONE]") == 1
    return [json.loads(one) for one in found[:-1]]


async def test_the_list_and_the_models():
    async with client() as http:
        (about,) = (await http.get("/agents")).json()["agents"]
        assert (about["name"], [listed["name"] for listed in about["tools"]]) == ("adder", ["add", "secret"])
        models = (await http.get("/agents/adder/v1/models")).json()
        assert (models["object"], models["data"][0]["id"], models["data"][0]["object"]) == ("list", "adder", "model")
        missing = await http.get("/agents/nobody/v1/models")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


async def test_an_answer_at_once():
    async with client(ScriptedChatEngine(ask(FIVE), say("5"))) as http:
        answer = await http.post(CHAT, json=body())
    assert answer.status_code == 200
    whole = answer.json()
    assert (whole["object"], whole["usage"]["total_tokens"]) == ("chat.completion", 28)
    assert whole["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "5"},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]


@pytest.mark.parametrize("with_usage", [True, False])
async def test_an_answer_streamed(with_usage: bool):
    async with client(ScriptedChatEngine(ask(FIVE), say("f", "ive"))) as http:
        answer = await http.post(CHAT, json=body(stream=True, stream_options={"include_usage": with_usage}))
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "f"}, {"content": "ive"}, {}]
    counted = [chunk["usage"]["total_tokens"] for chunk in chunks if not chunk["choices"]]
    assert counted == ([28] if with_usage else [])


async def test_a_mixed_turn_goes_to_the_client_and_comes_back():
    engine = ScriptedChatEngine(ask(FIVE, ("weather", "{}")), say("sunny, 5"))
    async with client(engine) as http:
        fields = {"tools": [client_tool("weather")]}
        asked = (await http.post(CHAT, json=body(**fields))).json()["choices"][0]
        assert asked["finish_reason"] == "tool_calls"
        (call,) = asked["message"]["tool_calls"]
        returned = [USER, asked["message"], {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
        whole = (await http.post(CHAT, json=body(**fields, messages=returned))).json()
    assert whole["choices"][0]["message"]["content"] == "sunny, 5"
    assert [m["content"] for m in engine.bodies[1]["messages"] if m["role"] == "tool"] == ["5", "sunny"]


@pytest.mark.parametrize("stream", [True, False])
async def test_what_fails_before_the_first_chunk_has_its_own_status(stream: bool):
    async with client(ScriptedChatEngine([ChatEngineError(400, "the prompt is too long")])) as http:
        answer = await http.post(CHAT, json=body(stream=stream))
        assert answer.status_code == 400
        assert answer.json() == {
            "error": {
                "message": "the prompt is too long",
                "type": "invalid_request_error",
                "param": None,
                "code": "engine",
            }
        }
        clash = await http.post(CHAT, json=body(stream=stream, tools=[client_tool("add")]))
        assert (clash.status_code, clash.json()["error"]["param"]) == (400, "tools.0.function.name")
        assert "'add'" in clash.json()["error"]["message"]


async def test_an_error_inside_a_stream_is_an_event_before_done():
    turn = [delta(content="half"), ChatEngineError(502, "the connection to the model broke")]
    async with client(ScriptedChatEngine(turn)) as http:
        answer = await http.post(CHAT, json=body(stream=True))
    *chunks, last = events(answer.text)
    assert answer.status_code == 200 and len(chunks) == 2
    assert last["error"]["message"] == "the connection to the model broke"
    assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "engine")


@pytest.mark.parametrize(
    ("engine_status", "status"), [(400, 400), (429, 429), (503, 503), (504, 504), (401, 502), (404, 502), (500, 502)]
)
async def test_an_engines_own_trouble_is_not_the_callers(engine_status: int, status: int):
    async with client(ScriptedChatEngine([ChatEngineError(engine_status, "x")])) as http:
        assert (await http.post(CHAT, json=body())).status_code == status


async def test_a_bug_is_told_and_logged(caplog: pytest.LogCaptureFixture):
    async with client(ScriptedChatEngine([ZeroDivisionError("oops")])) as http:
        answer = await http.post(CHAT, json=body())
    assert answer.status_code == 500
    assert "ZeroDivisionError: oops; this is a bug" in answer.json()["error"]["message"]
    assert [record.levelno for record in caplog.records if record.name == agents.__name__] == [logging.ERROR]


async def test_a_deadline_is_not_repeated_by_openais_client():
    async with client(ScriptedChatEngine([30.0]), limits={"total_seconds": 0.05}) as http:
        answer = await http.post(CHAT, json=body())
    assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")
    assert answer.json()["error"]["code"] == "timeout"


async def test_bodies_that_cannot_be_read():
    async with client() as http:
        for content, status, said in ((b"{", 400, "not JSON"), (b"[]", 400, "JSON object"), (b"x" * 20_000, 413, "")):
            answer = await http.post(CHAT, content=content)
            assert answer.status_code == status and said in answer.json()["error"]["message"]
        assert (await http.post(CHAT.replace("adder", "nobody"), json=body())).status_code == 404


@pytest.mark.parametrize(
    ("more", "field", "said"),
    [
        (b'"temperature": NaN', "temperature", "nan"),
        (b'"top_p": -Infinity', "top_p", "-inf"),
        (b'"chat_template_kwargs": {"a": [1e999]}', "chat_template_kwargs.a.0", "inf"),
        (rb'"stop": ["\ud83d"]', "stop.0", "surrogate"),
        (rb'"metadata": {"\udc00": 1}', "metadata", r"'\udc00'"),
        (rb'"\udc00": 1', None, r"'\udc00'"),
        (b'"stop": "\xed\xa0\xbd"', "stop", "surrogate"),
        (b'"metadata": ' + b"[" * 500 + b"]" * 500, "metadata" + ".0" * 96, "nested more than 128 levels"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_json_that_only_python_reads_is_a_400_that_names_the_field(
    more: bytes, field: str | None, said: str, stream: bool
):
    engine = ScriptedChatEngine(say("5"))
    async with client(engine) as http:
        content = json.dumps(body(stream=stream)).encode()[:-1] + b", " + more + b"}"
        answer = await http.post(CHAT, content=content)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field) and said in error["message"]
    assert engine.bodies == []


async def test_half_a_character_in_a_message_is_named():
    messages = [USER, {"role": "user", "content": "x\ud83d"}]
    async with client(ScriptedChatEngine(say("5"))) as http:
        # As JavaScript writes a text that was cut inside a character.
        answer = await http.post(CHAT, content=json.dumps(body(messages=messages)))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages.1.content")
        answer = await http.post(CHAT, json=body(include_reasoning="no"))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "include_reasoning")


@pytest.mark.parametrize(
    ("failure", "status", "after"),
    [
        (ChatEngineError(503, "not reached"), 503, "1"),
        (ChatEngineError(429, "too many"), 429, "1"),
        (ChatEngineError(429, "too many", 7.0), 429, "7"),
        (ChatEngineError(400, "no"), 400, None),
        (ChatEngineError(401, "no", 7.0), 502, None),
    ],
)
async def test_who_may_come_again_is_told_when(failure: ChatEngineError, status: int, after: str | None):
    async with client(ScriptedChatEngine([failure])) as http:
        answer = await http.post(CHAT, json=body())
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, after)


@pytest.mark.parametrize(("scopes", "names"), [({"chat"}, ["add"]), ({"admin", "chat"}, ["add", "secret"])])
async def test_scopes_come_from_whoever_authenticates(scopes: set[str], names: list[str]):
    engine = ScriptedChatEngine(say("ok"))
    async with client(engine, caller=scopes, scopes={"secret": "admin"}) as http:
        (about,) = (await http.get("/agents")).json()["agents"]
        assert [listed["name"] for listed in about["tools"]] == names
        await http.post(CHAT, json=body())
    assert [spec["function"]["name"] for spec in engine.bodies[0]["tools"]] == names


@pytest.mark.parametrize(("name", "names"), [("app", ["add", "secret"]), ("other", ["add"])])
async def test_an_owner_is_who_the_agent_lists(name: str, names: list[str]):
    engine = ScriptedChatEngine(ask(("secret", "{}")), say("ok"))
    who = {"scopes": {"secret": "owner"}, "owners": frozenset({"app", "jwt:ann"})}
    async with client(engine, caller={"serve"}, name=name, **who) as http:
        (about,) = (await http.get("/agents")).json()["agents"]
        assert [listed["name"] for listed in about["tools"]] == names
        await http.post(CHAT, json=body())
    assert [spec["function"]["name"] for spec in engine.bodies[0]["tools"]] == names
    (said,) = (m["content"] for m in engine.bodies[1]["messages"] if m["role"] == "tool")
    assert ("s3cret" in said) == (name == "app"), "what is not offered is not run either"


async def test_a_caller_that_got_no_scope_is_refused():
    async with client(ScriptedChatEngine(), caller=set()) as http:
        assert (await http.get("/agents")).status_code == 403
        assert (await http.post(CHAT, json=body())).status_code == 403


async def test_a_silent_stream_is_kept_open(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(event_stream, "KEEP_ALIVE_S", 0.05)
    async with client(ScriptedChatEngine([delta(content="a"), 0.2, *say("b")])) as http:
        answer = await http.post(CHAT, json=body(stream=True))
    assert ": keep-alive\n\n" in answer.text
    deltas = [choice["delta"] for chunk in events(answer.text) for choice in chunk["choices"]]
    assert "".join(one.get("content", "") for one in deltas) == "ab"


# A client that hangs up, over a real server


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_ends_the_engines_call(stream: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agents, "GONE_POLL_S", 0.05)
    engine = ScriptedChatEngine([delta(content="x"), 60.0])
    async with serving(application(engine), lifespan="off") as url, httpx.AsyncClient(base_url=url) as http:
        asking = asyncio.ensure_future(_listen(http, body(stream=stream)))
        await asyncio.wait_for(engine.waiting.wait(), 10)
        asking.cancel()
        await asyncio.wait({asking})
        async with asyncio.timeout(10):
            while not engine.cancelled:
                await asyncio.sleep(0.01)
    assert engine.cancelled == 1


async def test_a_client_that_hangs_up_ends_the_tools(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agents, "GONE_POLL_S", 0.05)
    begun, ended, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @tool
    async def hang() -> str:
        """Hang."""
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    class Hanging(Environment):
        tools = (hang,)

        async def close(self) -> None:
            closed.set()

    app = application(ScriptedChatEngine(ask(("hang", "{}"))), environment=Hanging)
    async with serving(app, lifespan="off") as url, httpx.AsyncClient(base_url=url) as http:
        asking = asyncio.ensure_future(_listen(http, body(stream=True)))
        await asyncio.wait_for(begun.wait(), 10)
        asking.cancel()
        await asyncio.wait({asking})
        await asyncio.wait_for(ended.wait(), 10)
        await asyncio.wait_for(closed.wait(), 10)


async def test_a_server_that_gives_up_while_sending_leaves_nothing_behind():
    engine = ScriptedChatEngine([delta(content="x"), delta(content="y"), 60.0])
    content = json.dumps(body(stream=True)).encode()
    messages = [{"type": "http.request", "body": content, "more_body": False}]
    stuck = asyncio.Event()

    async def receive() -> Any:
        if messages:
            return messages.pop()
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            stuck.set()
            await asyncio.Event().wait()

    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "client": None,
        "server": None,
    }
    before = asyncio.all_tasks()
    answering = asyncio.ensure_future(application(engine)(scope, receive, send))
    await asyncio.wait_for(stuck.wait(), 10)
    answering.cancel()
    await asyncio.wait({answering})
    assert engine.cancelled == 1
    assert asyncio.all_tasks() == before


async def _listen(http: httpx.AsyncClient, wanted: dict[str, Any]) -> None:
    async with http.stream("POST", CHAT, json=wanted) as answer:
        async for _ in answer.aiter_bytes():
            pass


async def test_openais_own_client_plays_a_mixed_turn():
    openai = pytest.importorskip("openai")
    turns = [ask(FIVE, ("weather", '{"city": "Ulm"}'), content="Let me see."), say("sunny, 5")]
    engine = ScriptedChatEngine(
        *turns, [ChatEngineError(502, "broken")], [delta(content="x"), ChatEngineError(502, "cut")]
    )
    async with (
        serving(application(engine), lifespan="off") as url,
        openai.AsyncOpenAI(base_url=f"{url}/agents/adder/v1", api_key="none", max_retries=0) as made,
    ):
        assert [model.id async for model in made.models.list()] == ["adder"]

        async def play(messages: list[Any]) -> Any:
            tools = [client_tool("weather")]
            async with made.chat.completions.stream(model="adder", messages=messages, tools=tools) as stream:
                async for _ in stream:
                    pass
                return (await stream.get_final_completion()).choices[0]

        asked = await play([USER])
        (call,) = asked.message.tool_calls
        assert (asked.finish_reason, asked.message.content) == ("tool_calls", "Let me see.")
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Ulm"}')
        said = asked.message.model_dump(include={"role", "content", "tool_calls"})
        answer = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        done = await play([USER, said, answer])
        assert (done.finish_reason, done.message.content) == ("stop", "sunny, 5")
        assert [m["content"] for m in engine.bodies[1]["messages"] if m["role"] == "tool"] == ["5", "sunny"]
        with pytest.raises(openai.APIStatusError, match="broken"):
            await play([USER])
        with pytest.raises(openai.APIError, match="cut"):
            await play([USER])


# Added and removed over HTTP

KEYS = {"app": "a" * 32, "root": "r" * 32}


@asynccontextmanager
async def guarded(tmp_path: Path, engine: Any = None) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway with a key for serving and one for everything, over a real book."""
    service = Service(tmp_path / "journal.sqlite")
    scopes: dict[str, frozenset[Any]] = {"app": frozenset({"serve"}), "root": frozenset({"admin"})}
    keys = tuple(AccessKey(name, hash_key(key), scopes[name]) for name, key in KEYS.items())
    app = make_app(
        lambda: None,  # type: ignore[arg-type, return-value]
        100_000,
        AccessSettings(keys=keys),
        agents=AgentRegistry([agent()]),
        chat=engine,
        agent_keeper=Keeper(AgentBook(service.store, [])),
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        yield http
    await service.close()


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


NEW = {
    "name": "new",
    "environment": "tests.rollout.agents.scripted_chat:Adder",
    "scopes": {"secret": "owner"},
    "owners": ["app"],
    "hooks": ["tests.rollout.agents.configured_hooks:polite"],
}


async def test_an_agent_is_added_spoken_to_and_removed(tmp_path: Path):
    engine = ScriptedChatEngine(say("5"))
    async with guarded(tmp_path, engine) as http:
        added = await http.post("/agents", json=NEW, headers=bearer("root"))
        assert added.status_code == 201 and [one["name"] for one in added.json()["tools"]] == ["add", "secret"]
        assert (await http.post("/agents", json=NEW, headers=bearer("root"))).status_code == 201, "the same again"
        listed = (await http.get("/agents", headers=bearer("app"))).json()["agents"]
        assert [one["name"] for one in listed] == ["adder", "new"]
        asked = {"model": "new", "messages": [USER]}
        answer = await http.post("/agents/new/v1/chat/completions", json=asked, headers=bearer("app"))
        assert answer.json()["choices"][0]["message"]["content"] == "5"
        assert engine.bodies[0]["messages"][-1]["content"] == "Please: 2+3?", "its hook ran"
        assert [spec["function"]["name"] for spec in engine.bodies[0]["tools"]] == ["add", "secret"], (
            "app is an owner"
        )
        assert (await http.delete("/agents/new", headers=bearer("root"))).status_code == 204
        assert (await http.delete("/agents/new", headers=bearer("root"))).status_code == 404
        gone = await http.post("/agents/new/v1/chat/completions", json=asked, headers=bearer("app"))
        assert gone.status_code == 404 and "the agents are: adder" in gone.json()["error"]["message"]


async def test_only_an_admin_changes_what_everybody_is_served(tmp_path: Path):
    async with guarded(tmp_path) as http:
        for headers, status in ((bearer("app"), 403), ({}, 401)):
            assert (await http.post("/agents", json=NEW, headers=headers)).status_code == status
            assert (await http.post("/agents/", json=NEW, headers=headers)).status_code == status
            assert (await http.delete("/agents/adder", headers=headers)).status_code == status


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"name": "a/b"}, 422, "name"),
        ({"environment": "no.such:Thing"}, 422, "environment"),
        ({"code": "import os"}, 422, "code"),
        ({"hooks": ["os:system"]}, 422, "hooks.0"),
        ({"scopes": {"secret": "root"}}, 422, "scopes.secret"),
        ({"name": "adder"}, 409, "name"),
    ],
)
async def test_what_is_wrong_with_an_agent_is_named(tmp_path: Path, change: Any, status: int, field: str):
    async with guarded(tmp_path) as http:
        answer = await http.post("/agents", json={**NEW, **change}, headers=bearer("root"))
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, field) and error["message"]
        assert error["type"] == "invalid_request_error"
        for content in (b"", b"{", b"[]"):
            assert (await http.post("/agents", content=content, headers=bearer("root"))).status_code == 422
