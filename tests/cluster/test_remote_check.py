"""`rollout remote check`: good servers pass, and every mistake is caught by its own check, with its figures."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from cluster import remote_probe
from cluster.remote_probe import Outcome, Target, check_server
from cluster.remote_trainer import ScriptedTrainer, Voice
from examples.remote_rollout.server import Settings, call_tool, create_app, reward_of
from rollout.errors import ConfigError, RolloutError
from rollout.remote.conformance import CHECKS, Begun, Call, Played
from rollout.remote.conformance_judge import judge
from rollout.remote.conformance_plan import SCENARIOS, bad_bodies, example_call
from rollout.rendering import ChatRenderer, load_renderer
from tests.remote_peers.chatml import ChatMl
from tests.remote_peers.server import FAULTS, PeerServer
from tests.serving import serving

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "calculator" / "model"


@pytest.fixture(scope="module")
def chat() -> ChatRenderer:
    return load_renderer(str(MODEL))


@pytest.fixture(scope="module")
def chatml() -> ChatMl:
    return ChatMl.of_file(str(MODEL / "tokenizer.json"))


def found(outcome: Outcome) -> list[str]:
    return [f"{d.check} at {d.where}: {d.text}" for d in outcome.deviations]


async def check_both(url: str, chat: ChatRenderer, **options: Any) -> list[Outcome]:
    targets = [Target(url, generation, chat=chat, **options) for generation in ("A", "B")]  # type: ignore[arg-type]
    return await asyncio.gather(*(check_server(target) for target in targets))


# Servers that keep the protocol


async def test_the_example_server_keeps_both_generations(chat: ChatRenderer):
    async with serving(create_app(Settings(tokenizer=str(MODEL), api_key="secret"))) as url:
        outcomes = await check_both(url, chat, api_key="secret")
    assert [found(outcome) for outcome in outcomes] == [[], []]
    assert [len(outcome.played) for outcome in outcomes] == [15, 16]
    assert not any(outcome.skipped for outcome in outcomes)


async def test_the_example_server_keeps_a1_and_serves_prompts_without_tools(chat: ChatRenderer):
    async with serving(create_app(Settings(tokenizer=str(MODEL), chat_path=True))) as url:
        some = ("tools", "two_calls", "end_not_sampled", "max_tokens")
        with_tools = await check_server(Target(url, "A1", chat=chat, only=some))
        without = await check_server(Target(url, "A1", chat=chat, only=some, tools_in_prompt=False))
    assert found(with_tools) == found(without) == []


async def test_the_independent_server_keeps_both_generations(chat: ChatRenderer, chatml: ChatMl):
    async with PeerServer(chatml, pause=0.5) as server:
        outcomes = await check_both(server.url, chat)
    # It calls whoever it is told to, which the check may only advise against.
    assert [{d.check for d in outcome.deviations} for outcome in outcomes] == [{"callback-host"}] * 2
    assert all(outcome.ok for outcome in outcomes)


async def test_without_listed_tools_those_of_the_202_are_used(chat: ChatRenderer, chatml: ChatMl):
    async with PeerServer(chatml, "bad_tools") as server:
        outcome = await check_server(Target(server.url, "B", only=("tools",)))
    assert [played.scenario.name for played in outcome.played] == ["tools"]
    assert {d.check for d in outcome.deviations} == {"tools"}


# Mistakes: fault of the server → generation, scenario, check, what the message says

MISTAKES: dict[str, tuple[str, str, str, str]] = {
    "no_mask": ("A", "tools", "mask", r"call 2: response_mask is missing: \d+ tokens were added"),
    "mask_on_first": ("A", "tools", "mask", r"call 1: response_mask has 20 values on the first call"),
    "mask_a_call_late": ("A", "tools", "mask", r"call 2: response_mask is missing"),
    "one_more": ("A", "tools", "mask", r"one more\. Was the end-of-turn token counted as added\?.*\(here it did\)"),
    "one_less": ("A", "end_not_sampled", "mask", r"one less\. Was the end-of-turn token.*\(here it does not\)"),
    "other_tokenizer": ("A", "tools", "mask", r"has \d+ values, but \d+ tokens were added.*is the tokenizer"),
    "tool_text": ("A", "tools", "mask", r"the new messages' text alone. Count the template's tokens too"),
    "whole_prompt": ("A", "tools", "mask", r"that is the whole prompt"),
    "answer_counted": ("A", "tools", "mask", r"that is (\d+) more, as many as the answer before has"),
    "ones": ("A", "tools", "mask", r"response_mask\[0\] is 1 \((\d+) of \1 values are\): every added token is 0"),
    "cuts_history": ("A", "tools", "history", r"messages\.3\.content was '9' and is '…'"),
    "changes_answer": ("B", "tools", "history", r"messages\.2\.content was .* and is '\(edited\)'"),
    "drops_system": ("B", "single_turn", "history", r"the first call does not have the request's messages"),
    "no_key": ("B", "single_turn", "bearer", r"2 of 2 posts to the trainer had no Authorization"),
    "other_path": ("A", "single_turn", "path", r"1 calls went to /v1/chat/completions, not to /v1/completions"),
    "hot": ("A", "single_turn", "sampling", r"temperature is 1\.5, and 0\.7 was asked for"),
    "other_id": ("A", "single_turn", "call", r"rollout_id is 'other', not 'conformance-single_turn-"),
    "no_retry": ("A", "server_error", "retry", r"status 500 for call 1, and it was not made again"),
    "retries_4xx": ("A", "client_error", "retry", r"status 400 for call 1, and it was made again"),
    "restless": ("A", "gives_up", "retry", r"8 calls to a trainer that never answered; at most 4"),
    "ignores_max_turns": ("A", "max_turns", "turns", r"12 calls came, at most 2 were expected"),
    "ignores_max_tokens": ("B", "max_tokens", "turns", r"\d{3} tokens were sampled with a max_tokens_total of 150"),
    "calls_it_stop": ("A", "truncated", "finish-reason", r"is stop, and max_tokens was expected"),
    "drops_last": ("A", "truncated", "final-messages", r"the model's last answer is missing after message 1"),
    "open_calls": ("A", "max_turns", "final-messages", r"1 tool calls have no answer: 'call_1_0'"),
    "no_metrics": ("A", "tools", "metrics", r"num_llm_calls is 0; there were 3"),
    "strict": ("A", "unknown_fields", "unknown-fields", r"begun with 422 instead of 200"),
    "tool_error_ends": ("A", "tool_error", "tool-answers", r"status is ERROR \(tool_error: .*COMPLETED was expected"),
    "unmarked_error": ("A", "tool_error", "tool-answers", r"a failing tool answered 'oops ValueError'"),
    "one_answer": ("B", "two_calls", "tool-answers", r"tool call 'call_0_1' got 0 answers before the next call"),
    "no_category": ("A", "client_error", "error", r"error_category is None; use one of rate_limited"),
    "plays_again": ("B", "begun_twice", "duplicate", r"it was played again: \d calls, not 1"),
    "reports_once": ("B", "report_again", "report", r"answered 500, and the report did not come again"),
    "reports_twice": ("B", "report_again", "idle", r"1 reports came after one was answered 200"),
    "unwell": ("A", "single_turn", "health", r'answered 200, without "status": "healthy"'),
    "bad_tools": ("A", "single_turn", "tools", r"1 of 1 tools are not in OpenAI's form"),
    "hangs": ("B", "single_turn", "report", r"no report of the end came within 1 s"),
}  # fmt: skip


def test_every_mistake_of_the_independent_server_is_tried():
    assert set(MISTAKES) | {"takes_anything"} == set(FAULTS)
    assert {check for _, _, check, _ in MISTAKES.values()} <= set(CHECKS)


@pytest.mark.parametrize("fault", MISTAKES)
async def test_a_mistake_is_caught_with_its_own_message(fault: str, chat: ChatRenderer, chatml: ChatMl):
    generation, scenario, check, text = MISTAKES[fault]
    async with PeerServer(chatml, fault, pause=0.5) as server:
        seconds = {"hangs": 1.0, "reports_once": 3.0}.get(fault, 20.0)
        target = Target(server.url, generation, chat=chat, only=(scenario,), timeout=seconds)  # type: ignore
        outcome = await check_server(target)
    assert not outcome.ok
    said = [d.text for d in outcome.deviations if d.check == check]
    assert any(re.search(text, one) for one in said), found(outcome)


async def test_bodies_that_break_the_protocol_must_be_refused(chat: ChatRenderer, chatml: ChatMl):
    async with PeerServer(chatml, "takes_anything", pause=0.1) as server:
        outcome = await check_server(Target(server.url, "B", timeout=5.0))
    said = [d.text for d in outcome.deviations if d.check == "validation"]
    assert "no messages: answered 202, not 422" in said
    assert len(said) >= len(bad_bodies("B", server.url)) - 1


async def test_a_key_must_be_asked_for(chat: ChatRenderer, chatml: ChatMl):
    async with PeerServer(chatml, pause=0.1) as server:
        outcome = await check_server(Target(server.url, "A", chat=chat, api_key="secret"))
    assert {(d.check, d.text) for d in outcome.deviations if not d.advice} == {
        ("auth", "no key: answered 200, not 401"),
        ("auth", "a wrong key: answered 200, not 401"),
    }


async def test_another_trainers_tokenizer_is_found_by_the_example_server(chat: ChatRenderer, tmp_path: Path):
    """Same lengths or not: the example compares tokens, and says so instead of sending what may be wrong."""
    for file in MODEL.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    template = (MODEL / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text(template.replace("<tool_response>", "<response>"))
    async with serving(create_app(Settings(tokenizer=str(tmp_path)))) as url:
        outcome = await check_server(Target(url, "A", chat=chat, only=("tools",)))
    assert [d.check for d in outcome.deviations] == ["mask"]


# Servers that answer what nobody can use: judged like all others


class Odd:
    """Healthy, without GET /tools, and begins rollouts in its own way."""

    def __init__(self, begin: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> None:
        self._begin = begin
        self.encodings: set[str | None] = set()

    async def __aenter__(self) -> str:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_post("/{path:.+}", self._post)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _health(self, _request: web.Request) -> web.Response:
        counts = {"agent_loop": "odd", "active_rollouts": 0, "completed_rollouts": 0}
        return web.json_response({"status": "healthy", **counts})

    async def _post(self, request: web.Request) -> web.StreamResponse:
        self.encodings.add(request.headers.get("accept-encoding"))
        return await self._begin(request)


async def hang(_request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError


async def full(_request: web.Request) -> web.StreamResponse:
    return web.json_response({"detail": "full"}, status=429, headers={"retry-after": "0.1"})


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(b"[" * 2**16)
    return response


async def bomb(_request: web.Request) -> web.StreamResponse:
    packed = gzip.compress(gzip.compress(bytes(2**24)))
    return web.Response(body=packed, headers={"content-encoding": "gzip, gzip"})


@pytest.mark.parametrize("generation", ["A", "B"])
@pytest.mark.parametrize(
    ("begin", "text"),
    [
        (hang, r"POST /(v1/)?rollout(/init)? was not answered within 1 s"),
        (full, r"begun with 429 instead of 20[02]: .*full"),
        (endless, r"no proper answer: 'more than 1000000 bytes'"),
        (bomb, r'no proper answer: "a compressed body \(\'gzip, gzip\', not asked for\)"'),
    ],
    ids=["hangs", "always full", "endless", "bomb"],
)
async def test_what_cannot_be_used_is_judged(
    begin: Any, text: str, generation: str, chat: ChatRenderer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote_probe, "MAX_ANSWER_BYTES", 1_000_000)
    server = Odd(begin)
    async with server as url:
        target = Target(url, generation, chat=chat, timeout=0.7, only=("single_turn",))  # type: ignore[arg-type]
        outcome = await check_server(target)
    said = [d.text for d in outcome.deviations if d.check == "answer"]
    assert any(re.search(text, one) for one in said), found(outcome)
    assert server.encodings == {"identity"}


async def test_an_answer_that_never_ends_has_a_deadline(monkeypatch: pytest.MonkeyPatch):
    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b" ")
                await asyncio.sleep(0.05)
        return response

    monkeypatch.setattr(remote_probe, "ANSWER_SECONDS", 0.3)
    server = Odd(full)
    monkeypatch.setattr(server, "_health", drip)
    async with server as url:
        with pytest.raises(RolloutError, match=r"no rollout server answers at .*: nothing whole within 0\.3 s"):
            await check_server(Target(url, "B"))


def test_final_messages_that_are_none_are_judged():
    (single,) = (scenario for scenario in SCENARIOS if scenario.name == "single_turn")
    asked: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
    answer = {"role": "assistant", "content": "!"}
    call = Call(0.1, "/v1/completions", "Bearer k", {"messages": asked}, status=200, message=answer)
    odd = {"role": "tool", "tool_calls": 5, "tool_call_id": ["x"]}
    end = {"rollout_id": "r", "status": "COMPLETED", "finish_reason": "stop"}
    end["final_messages"] = [*asked, {**answer, "tool_calls": ["x", {"id": [1]}]}, odd]  # type: ignore[assignment]
    played = Played(single, "A", "r", "k", asked, begun=[Begun(200, end)], calls=[call])
    texts = [d.text for d in judge(played)]
    assert any("1 tool calls have no answer: [1]" in text for text in texts), texts


# The command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "remote", "check", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


async def test_the_command_prints_json_and_ends_with_1_on_a_deviation(chatml: ChatMl):
    async with PeerServer(chatml, "no_key") as server:
        done = await asyncio.to_thread(command, server.url, "--generation", "B", "--only", "single_turn", "--json")
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert told["ok"] is False
    assert [d["check"] for d in told["deviations"]] == ["bearer"]
    assert told["deviations"][0]["why"] == CHECKS["bearer"]


async def test_the_command_shows_a_table_and_ends_with_0(chatml: ChatMl):
    async with PeerServer(chatml) as server:
        done = await asyncio.to_thread(command, server.url, "--generation", "B", "--only", "single_turn")
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout and "single_turn" in done.stdout and "keeps generation B" in done.stdout


def test_the_command_says_what_is_missing():
    done = command("http://127.0.0.1:9", "--generation", "B")
    assert done.returncode == 1
    assert "no rollout server answers at http://127.0.0.1:9" in done.stderr


async def test_what_cannot_be_checked_is_said():
    with pytest.raises(ConfigError, match="--tokenizer"):
        await check_server(Target("http://127.0.0.1:9", "A"))
    with pytest.raises(ConfigError, match="--only nothing: there is no such scenario"):
        await check_server(Target("http://127.0.0.1:9", "B", only=("nothing",)))
    with pytest.raises(ConfigError, match="is no address"):
        await check_server(Target("http://127.0.0.1:99999999", "B"))
    with pytest.raises(RolloutError, match="no rollout server answers"):
        await check_server(Target("http://127.0.0.1:9", "B"))


# Its parts


def test_scenarios_have_names_of_their_own():
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)


def test_a_call_is_made_from_the_tools_schema():
    properties = {
        "n": {"type": "integer", "minimum": 5},
        "way": {"enum": ["up", "down"]},
        "maybe": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "unasked": {"type": "string"},
    }
    schema = {"type": "object", "properties": properties, "required": ["n", "way", "maybe"]}
    tools = [{"type": "function", "function": {"name": "go", "parameters": schema}}]
    made = example_call(tools, None, None)
    assert made is not None and made[0] == "go"
    assert json.loads(made[1]) == {"n": 5, "way": "up", "maybe": True}
    assert example_call([], None, None) is None
    assert example_call([], "hidden", '{"a": 1}') == ("hidden", '{"a": 1}')
    with pytest.raises(ConfigError, match="it has go"):
        example_call(tools, "stop", None)
    with pytest.raises(ConfigError, match="JSON object"):
        example_call(tools, "go", "[]")


async def test_the_trainer_names_a_port_that_it_cannot_have():
    first = ScriptedTrainer(Voice(None), ("127.0.0.1", 0), None)
    await first.start()
    try:
        port = int(first.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"--listen 127.0.0.1:{port}"):
            await ScriptedTrainer(Voice(None), ("127.0.0.1", port), None).start()
    finally:
        await first.close()


@pytest.mark.parametrize(
    ("name", "a", "b", "result"),
    [
        ("add", 0.1, 0.2, "0.3"),
        ("subtract", 1, 10, "-9"),
        ("multiply", 99999999999999999999, 3, "299999999999999999997"),
        ("divide", 1, 8, "0.125"),
        ("divide", 2, 3, "0.666666666667"),
        ("divide", 1, 0, "Error: division by zero"),
        ("add", "1e999999", 1, "Error: a must be a number of at most 100 digits"),
        ("add", True, 1, "Error: a must be a number"),
        ("power", 2, 3, "Error: there is no such tool; use add, subtract, multiply or divide"),
    ],
)
async def test_the_examples_tools_are_exact(name: str, a: Any, b: Any, result: str):
    call = {"function": {"name": name, "arguments": json.dumps({"a": a, "b": b})}}
    assert await call_tool(call, 0.0) == result


def test_the_examples_reward_wants_the_expected_numbers():
    answer = [{"role": "assistant", "content": "It is 12."}]
    assert reward_of(answer, {"data": {"answers": ["12"]}}) == 1.0
    assert reward_of(answer, {"data": {"answers": ["13"]}}) == 0.0
    assert reward_of(answer, {}) is None
