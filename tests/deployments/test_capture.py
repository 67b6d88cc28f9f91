"""The engine's side of captured sessions: who may, what is written down, and that it is reported whatever happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from deployments import capture
from deployments.capture import RECORDING, CaptureMiddleware, Recording
from rollout.capture.calls import CapturedCall
from rollout.errors import ConflictError, UnavailableError

CHAT = "/v1/chat/completions"


@dataclass
class Keeper:
    """A TEST DOUBLE of the controller."""

    begun: list[str] = field(default_factory=list)
    ended: list[tuple[str, list[CapturedCall], bool]] = field(default_factory=list)
    refuse: Exception | None = None
    failures: list[Exception] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    async def begin(self, session_id: str, request_id: str) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.begun.append(session_id)

    async def end(self, session_id: str, request_id: str, calls: list[CapturedCall], lost: bool) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.ended.append((session_id, calls, lost))
        self.heard.set()


def piece(
    ids: list[int], text: str = "", finish: str | None = None, index: int = 0, versions: Any = None
) -> SimpleNamespace:
    """What vLLM says of one choice: a delta of it."""
    logprobs = [{token: SimpleNamespace(logprob=-0.25 * token)} for token in ids]
    return SimpleNamespace(
        index=index, token_ids=ids, logprobs=logprobs, text=text, finish_reason=finish, weight_versions=versions
    )


def output(*pieces: SimpleNamespace, prompt: list[int] | None = None) -> SimpleNamespace:
    return SimpleNamespace(prompt_token_ids=prompt or [1, 2], outputs=list(pieces))


def spans(*parts: tuple[int, int, int]) -> list[SimpleNamespace]:
    return [SimpleNamespace(version=str(v), start=start, end=end) for v, start, end in parts]


async def stream(*outputs: Any) -> AsyncGenerator[Any]:
    for item in outputs:
        if isinstance(item, Exception):
            raise item
        yield item


class Engine:
    """A TEST DOUBLE of vLLM's application: reads the body, follows a stream, answers."""

    def __init__(self, *outputs: Any) -> None:
        self.outputs = outputs
        self.bodies: list[bytes] = []
        self.recordings: list[Recording | None] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive()).get("body", b""))
        recording = RECORDING.get()
        self.recordings.append(recording)
        if recording is not None:
            async for _ in recording.follow(stream(*self.outputs)):
                pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


async def call(
    middleware: CaptureMiddleware,
    path: str = CHAT,
    *,
    session: str | None = "s1",
    body: Any = None,
    caller: str = "app",
    scopes: frozenset[str] = frozenset({"trainer"}),
    pieces: int = 1,
) -> tuple[int, Any]:
    """One request; its status and body."""
    sent: list[Any] = []
    content = json.dumps(body if body is not None else {"messages": [{"role": "user", "content": "?"}]}).encode()
    step = -(-len(content) // pieces)
    parts = [content[i : i + step] for i in range(0, len(content), step)]
    messages = [
        {"type": "http.request", "body": part, "more_body": number < len(parts) - 1}
        for number, part in enumerate(parts)
    ]

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if session is None else [(capture.SESSION_HEADER, session.encode())]
    state = {"caller": caller, "scopes": scopes, "correlation_id": "c-1"}
    scope = {"type": "http", "path": path, "headers": headers, "state": state}
    await middleware(scope, receive, send)
    return sent[0]["status"], sent[1]["body"]


def middleware(keeper: Keeper, *outputs: Any, version: Any = lambda: 3) -> tuple[CaptureMiddleware, Engine]:
    engine = Engine(*outputs)
    return CaptureMiddleware(engine, keeper, version), engine


async def reported(keeper: Keeper) -> tuple[str, list[CapturedCall], bool]:
    await asyncio.wait_for(keeper.heard.wait(), 5)
    return keeper.ended[-1]


# What is written down


async def test_a_call_is_written_down_token_by_token():
    keeper = Keeper()
    served, engine = middleware(
        keeper,
        output(piece([5, 6], "ab")),
        output(piece([7], "c", "stop", versions=spans((3, 0, 2), (4, 2, 3)))),
    )
    assert (await call(served))[0] == 200
    session, (found,), lost = await reported(keeper)
    assert (session, lost, keeper.begun) == ("s1", False, ["s1"])
    assert (found.prompt_ids.tolist(), found.token_ids.tolist()) == ([1, 2], [5, 6, 7])
    assert found.logprobs.tolist() == [-1.25, -1.5, -1.75]
    assert [(s.version, s.start, s.end) for s in found.versions] == [(3, 0, 2), (4, 2, 3)]
    assert (found.api, found.correlation_id, found.finish_reason) == ("chat", "c-1", "stop")
    assert found.messages == [{"role": "user", "content": "?"}]
    assert found.answer == {"role": "assistant", "content": "abc"}
    assert engine.bodies and b"messages" in engine.bodies[0], "the application reads the body as it came"


async def test_a_body_in_pieces_reaches_the_application_whole():
    keeper = Keeper()
    served, engine = middleware(keeper)
    received = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            received.append(message["body"])
            more = message.get("more_body", False)
        await engine(scope, receive, send)

    served._app = application
    await call(served, pieces=3)
    assert len(received) == 3 and json.loads(b"".join(received))["messages"]


async def test_several_choices_are_several_calls():
    keeper = Keeper()
    ends = spans((3, 0, 1))
    served, _ = middleware(keeper, output(piece([5], "a", "stop", 1, ends), piece([6], "b", "length", 0, ends)))
    await call(served)
    _, calls, _ = await reported(keeper)
    assert [made.token_ids.tolist() for made in calls] == [[6], [5]]
    assert len({made.call_id for made in calls}) == 2


@pytest.mark.parametrize(
    ("path", "body", "messages"),
    [
        ("/v1/completions", {"prompt": "x"}, None),
        ("/v1/responses", {"input": "hi"}, [{"role": "user", "content": "hi"}]),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": "a"}], "instructions": "be brief"},
            [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}],
        ),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "a"}], "system": "s"},
            [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
        ),
        (CHAT, {"messages": ["not a message"]}, None),
        (CHAT, [1], None),
    ],
)
async def test_conversations_come_in_several_forms(path: str, body: Any, messages: Any):
    keeper = Keeper()
    served, _ = middleware(keeper, output(piece([5], "a", "stop", versions=spans((3, 0, 1)))))
    await call(served, path, body=body)
    _, (found,), _ = await reported(keeper)
    assert found.messages == messages


def test_a_request_gets_the_sampled_tokens_logprob_and_keeps_what_it_asked_for():
    recording = Recording("r", "chat", "", None, lambda: 0)

    class Params:
        def __init__(self, logprobs: int | None) -> None:
            self.logprobs = logprobs

        def clone(self) -> Params:
            return Params(self.logprobs)

    asked = Params(5)
    assert recording.asked(asked) is asked
    none = Params(None)
    assert recording.asked(none).logprobs == 0 and none.logprobs is None, "the client's own is not changed"


# What is cut off


async def follow(recording: Recording, *outputs: Any, after: int) -> None:
    """Read so many outputs, then go away."""
    following = recording.follow(stream(*outputs))
    for _ in range(after):
        await anext(following)
    await following.aclose()


async def test_what_was_sampled_before_the_client_went_away_is_kept():
    recording = Recording("r", "chat", "", None, lambda: 7)
    await follow(recording, output(piece([5, 6], "ab")), output(piece([7], "c", "stop")), after=1)
    (found,) = recording.calls
    assert (found.token_ids.tolist(), found.finish_reason, found.cut) == ([5, 6], "abort", True)
    assert [(s.version, s.start, s.end) for s in found.versions] == [(7, 0, 2)]
    assert not recording.lost


async def test_cut_off_while_the_weights_changed_is_lost_and_not_guessed():
    versions = iter([7, 8])
    recording = Recording("r", "chat", "", None, lambda: next(versions))
    await follow(recording, output(piece([5], "a")), after=1)
    assert recording.calls == [] and recording.lost


async def test_a_generation_without_a_logprob_is_lost_and_not_repaired():
    recording = Recording("r", "chat", "", None, lambda: 7)
    bare = piece([5], "a", "stop", versions=spans((7, 0, 1)))
    bare.logprobs = None
    await follow(recording, output(bare), after=1)
    assert recording.calls == [] and recording.lost


async def test_an_engine_that_fails_is_reported_with_what_it_had():
    keeper = Keeper()
    served, _ = middleware(keeper, output(piece([5], "a")), RuntimeError("the engine died"))
    with pytest.raises(RuntimeError):
        await call(served)
    _, (found,), _ = await reported(keeper)
    assert found.cut and found.token_ids.tolist() == [5]
    assert RECORDING.get() is None


# Who may


@pytest.mark.parametrize(
    ("caller", "scopes", "session", "status"),
    [
        ("session:s1", {"serve"}, "s1", 200),
        ("session:s2", {"serve"}, "s1", 403),
        # A session's key is for its session's address alone.
        ("session:s1", {"serve"}, None, 403),
        ("app", {"serve"}, "s1", 403),
        ("app", {"trainer"}, "s1", 200),
        ("app", {"admin"}, "s1", 200),
        ("app", {"serve"}, None, 200),
    ],
)
async def test_who_may_use_a_sessions_address(caller: str, scopes: set[str], session: str | None, status: int):
    keeper = Keeper()
    served, engine = middleware(keeper)
    told, content = await call(served, session=session, caller=caller, scopes=frozenset(scopes))
    assert told == status
    if status == 403:
        assert engine.bodies == [] and keeper.begun == []
        assert json.loads(content)["error"]["message"]


async def test_a_request_of_no_session_is_not_touched():
    keeper = Keeper()
    served, engine = middleware(keeper)
    await call(served, session=None)
    assert engine.recordings == [None] and keeper.begun == []


async def test_paths_that_sample_nothing_are_not_recorded():
    keeper = Keeper()
    served, engine = middleware(keeper)
    assert (await call(served, "/v1/models"))[0] == 200
    assert engine.recordings == [None] and keeper.begun == []


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        (ConflictError("session 's1' is closed"), 409, "is closed"),
        (UnavailableError("the controller is gone"), 503, "is gone"),
        (TimeoutError(), 503, "does not answer"),
    ],
)
async def test_a_session_that_takes_nothing_is_told_before_anything_is_sampled(
    failure: Exception, status: int, said: str
):
    keeper = Keeper(refuse=failure)
    served, engine = middleware(keeper)
    told, content = await call(served)
    assert told == status and said in json.loads(content)["error"]["message"]
    assert engine.bodies == []


# Reports


async def test_a_report_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capture, "REPORT_PAUSE_S", 0.01)
    keeper = Keeper(failures=[RuntimeError("no connection"), RuntimeError("still none")])
    served, _ = middleware(keeper, output(piece([5], "a", "stop", versions=spans((3, 0, 1)))))
    await call(served)
    assert len((await reported(keeper))[1]) == 1


async def test_a_report_that_is_refused_is_not_repeated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capture, "REPORT_PAUSE_S", 0.01)
    keeper = Keeper(failures=[ConflictError("closed")])
    served, _ = middleware(keeper)
    await call(served)
    await asyncio.sleep(0.05)
    assert keeper.ended == [] and not served._reports


async def test_a_report_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(capture, "REPORT_PAUSE_S", 0.01)
    monkeypatch.setattr(capture, "REPORT_SECONDS", 0.03)
    keeper = Keeper(failures=[RuntimeError("no connection")] * 100)
    served, _ = middleware(keeper)
    await call(served)
    async with asyncio.timeout(5):
        while served._reports:
            await asyncio.sleep(0.01)
    assert "could not be reported" in caplog.text
