"""The engine's side of captured sessions: who may, what is written down, and that it is reported whatever happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from deployments import capture
from deployments.access import install
from deployments.capture import RECORDING, CaptureMiddleware, Recording
from rollout.access import AccessSettings
from rollout.capture.calls import CapturedCall
from rollout.errors import ConflictError, NotFoundError, RefusedError, UnavailableError

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
    method: str = "POST",
) -> tuple[int, Any]:
    """One request; its status and body. `body`: JSON, or bytes as they are."""
    start, content = await answer(
        middleware, path, session=session, body=body, caller=caller, scopes=scopes, pieces=pieces, method=method
    )
    return start["status"], content


async def answer(
    middleware: CaptureMiddleware,
    path: str = CHAT,
    *,
    session: str | None = "s1",
    body: Any = None,
    caller: str = "app",
    scopes: frozenset[str] = frozenset({"trainer"}),
    pieces: int = 1,
    method: str = "POST",
) -> tuple[Any, Any]:
    """One request; the start of its answer and the body."""
    sent: list[Any] = []
    asked = body if body is not None else {"messages": [{"role": "user", "content": "?"}]}
    content = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
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
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "state": state}
    await middleware(scope, receive, send)
    return sent[0], sent[1]["body"]


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
        (CHAT, b"[" * 100_000, None),
        (CHAT, b"\xff{", None),
        # Such a one could not be sent to the controller, or not be read in the record.
        (CHAT, b'{"messages": [{"role": "user", "content": ' + b"[" * 400 + b"]" * 400 + b"}]}", None),
        (CHAT, b'{"messages": [{"role": "user", "content": "a", "weight": 1e999}]}', None),
        (CHAT, b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', [{"role": "user", "content": "\ud83d"}]),
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


async def test_an_answer_at_once_that_is_cut_off_is_lost():
    recording = Recording("r", "chat", "", None, lambda: 7)
    begun = asyncio.Event()

    async def generating() -> AsyncGenerator[Any]:
        begun.set()
        await asyncio.Event().wait()
        yield

    async def read() -> None:
        async for _ in recording.follow(generating()):
            pass

    reading = asyncio.ensure_future(read())
    await asyncio.wait_for(begun.wait(), 5)
    assert recording.under_way == 1
    reading.cancel()
    await asyncio.wait({reading})
    assert (recording.calls, recording.lost, recording.under_way) == ([], True, 0)


async def test_what_vllm_refuses_before_it_samples_is_not_lost():
    exceptions = pytest.importorskip("vllm.exceptions")
    for failure, lost in (
        (ValueError("the prompt is too long"), False),
        (exceptions.VLLMValidationError("the prompt is too long"), False),
        (RuntimeError("the engine died"), True),
    ):
        recording = Recording("r", "chat", "", None, lambda: 7)
        with pytest.raises(type(failure)):
            await anext(recording.follow(stream(failure)))
        assert (recording.calls, recording.lost) == ([], lost)


async def test_a_generation_that_ends_after_its_request_is_waited_for():
    """As vLLM has it: the handler is told to end when the client has gone, and not waited for."""
    keeper = Keeper()
    served, _ = middleware(keeper)
    ending: list[asyncio.Task[None]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        async def handle() -> None:
            recording = RECORDING.get()
            assert recording is not None
            following = recording.follow(stream(output(piece([5], "a")), output(piece([6], "b", "stop"))))
            await anext(following)
            await asyncio.sleep(0.1)
            await following.aclose()

        ending.append(asyncio.ensure_future(handle()))
        await asyncio.sleep(0.02)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    served._app = application
    await call(served)
    _, (found,), lost = await reported(keeper)
    assert (found.token_ids.tolist(), lost) == ([5], False)
    await ending[0]


async def test_a_generation_that_does_not_end_is_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capture, "SETTLE_SECONDS", 0.05)
    recording = Recording("r", "chat", "", None, lambda: 7)
    following = recording.follow(stream(output(piece([5], "a"))))
    await anext(following)
    await recording.settle()
    assert recording.lost
    await following.aclose()


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


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", CHAT),
        ("POST", "/tokenize"),
        ("POST", "/v1/messages/count_tokens"),
        ("POST", "/v1/responses/resp_1/cancel"),
    ],
)
async def test_paths_that_sample_nothing_are_not_recorded(method: str, path: str):
    keeper = Keeper()
    served, engine = middleware(keeper)
    assert (await call(served, path, method=method))[0] == 200
    assert engine.recordings == [None] and keeper.begun == []


@pytest.mark.parametrize("path", [f"{CHAT}/batch", f"{CHAT}/", "/inference/v1/generate", "/v1/nothing"])
async def test_what_would_sample_unrecorded_is_refused_in_a_session(path: str):
    keeper = Keeper()
    served, engine = middleware(keeper)
    status, content = await call(served, path)
    assert status == 400 and "would not be recorded" in json.loads(content)["error"]["message"]
    assert engine.bodies == [] and keeper.begun == []
    assert (await call(served, path, session=None))[0] == 200, "outside of sessions it is vLLM's business"


@pytest.mark.parametrize("field", ["use_beam_search", "background"])
async def test_generations_that_cannot_be_followed_are_refused_by_name(field: str):
    keeper = Keeper()
    served, engine = middleware(keeper)
    for value in (True, 1, "true"):
        status, content = await call(served, body={"messages": [], field: value})
        error = json.loads(content)["error"]
        assert (status, error["param"]) == (400, field) and field in error["message"]
    assert engine.bodies == [] and keeper.begun == []
    for value in (False, None):
        assert (await call(served, body={"messages": [], field: value}))[0] == 200
    assert (await call(served, body={"messages": [], field: True}, session=None))[0] == 200


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        # Clients repeat a 409 by themselves.
        (ConflictError("session 's1' is closed"), 410, "is closed"),
        (RefusedError("the session has had its 2 calls"), 422, "2 calls"),
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


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        (CHAT, {"message": "no", "type": "server_error", "param": None, "code": "unavailable"}),
        ("/v1/messages", {"message": "no", "type": "api_error"}),
    ],
)
async def test_refusals_have_the_form_that_their_clients_read_and_say_when(path: str, shape: dict[str, Any]):
    served, _ = middleware(Keeper(refuse=UnavailableError("no")))
    start, content = await answer(served, path)
    assert start["status"] == 503 and (b"retry-after", b"1") in start["headers"]
    told = json.loads(content)
    assert told["error"] == shape
    if path == "/v1/messages":
        assert (told["type"], told["request_id"]) == ("error", "c-1")


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (ConflictError("closed"), "invalid_request_error"),
        (NotFoundError("no session"), "not_found_error"),
    ],
)
async def test_anthropics_errors_have_anthropics_names(failure: Exception, kind: str):
    start, content = await answer(middleware(Keeper(refuse=failure))[0], "/v1/messages")
    assert json.loads(content)["error"]["type"] == kind
    assert b"retry-after" not in dict(start["headers"])
    _, content = await answer(middleware(Keeper())[0], "/v1/messages", caller="session:other")
    assert json.loads(content)["error"]["type"] == "permission_error"


# What begins, ends


async def test_a_body_that_is_too_large_begins_nothing():
    app = FastAPI()

    @app.post(CHAT)
    async def served(request: Request) -> int:
        return len(await request.body())

    keeper = Keeper()
    app.add_middleware(CaptureMiddleware, keeper=keeper, version=lambda: 1)
    install(app, AccessSettings(max_body_bytes=100))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * 10

    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        headers = {capture.SESSION_HEADER.decode(): "s1"}
        refused = await http.post(CHAT, content=pieces(11), headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
        assert keeper.begun == [] and keeper.ended == []
        assert (await http.post(CHAT, content=pieces(10), headers=headers)).text == "100"
    assert (await reported(keeper))[1] == [] and keeper.begun == ["s1"]


async def test_a_client_that_goes_away_inside_its_body_begins_nothing():
    keeper = Keeper()
    served, engine = middleware(keeper)
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError("nobody listens")

    headers = [(capture.SESSION_HEADER, b"s1")]
    state = {"caller": "app", "scopes": frozenset({"trainer"})}
    await served({"type": "http", "method": "POST", "path": CHAT, "headers": headers, "state": state}, receive, send)
    assert engine.bodies == [] and keeper.begun == []


async def test_a_body_nested_without_end_is_served_and_ends():
    keeper = Keeper()
    served, engine = middleware(keeper)
    await call(served, body=b"[" * 100_000)
    assert (await reported(keeper))[1:] == ([], False) and len(engine.bodies) == 1


@pytest.mark.parametrize("failure", [UnavailableError("the controller is gone"), TimeoutError()])
async def test_a_begin_without_an_answer_is_ended_all_the_same(failure: Exception):
    keeper = Keeper(refuse=failure)
    assert (await call(middleware(keeper)[0]))[0] == 503
    assert await reported(keeper) == ("s1", [], False)


async def test_a_begin_that_is_refused_needs_no_end():
    keeper = Keeper(refuse=ConflictError("closed"))
    served, _ = middleware(keeper)
    await call(served)
    assert not served._reports and keeper.ended == []


# Reports


async def test_a_report_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capture, "REPORT_PAUSE_S", 0.01)
    keeper = Keeper(failures=[RuntimeError("no connection"), UnavailableError("it did not answer")])
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
