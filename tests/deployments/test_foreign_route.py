"""What remote rollout servers call at the gateway, over real sessions: keys, paths, bodies, and the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.foreign_rollouts import ForeignRollouts
from actors.messages import ForeignSettings, RunSpec, WorkerSettings
from actors.scheduler import Assignment
from deployments.gateway import make_app
from rollout.access import AccessKey, AccessSettings, hash_key
from rollout.errors import NotFoundError
from rollout.limits import Limits
from rollout.remote.foreign_client import RemoteSpec
from rollout.remote.foreign_session import ForeignSession
from rollout.remote.wire import CompletionRequest, CompletionResponse, Generation, RolloutResponse
from rollout.sampling import Sampling
from rollout.session_keys import REMOTE_ROLLOUTS, derived_secret, session_key
from rollout.tasks import Task
from rollout.trajectory import SessionKey
from tests.rollout.remote.foreign_peer import Peer, end, results
from tests.rollout.sessions import IM_END, call, scripted

TURNS = (call("add", '{"a": 2, "b": 3}') + IM_END, f"5{IM_END}")
SECRET = b"cluster" * 5
FOREIGN_SECRET = derived_secret(SECRET, REMOTE_ROLLOUTS)
ACCESS = AccessSettings(
    keys=(AccessKey("admin", hash_key("admin-key"), frozenset({"admin"})),), session_secret=SECRET
)
MAX_BODY = 200_000
USER = {"role": "user", "content": "2+3?"}


class Direct:
    """ForeignCalls in this process: one worker, named w."""

    def __init__(self, rollouts: ForeignRollouts) -> None:
        self.rollouts = rollouts

    async def complete(self, worker: str, rollout_id: str, request: CompletionRequest) -> CompletionResponse:
        if worker != "w":
            raise NotFoundError(f"there is no session worker {worker!r}", "worker")
        return await self.rollouts.complete(rollout_id, request)

    async def completed(self, worker: str, rollout_id: str, report: RolloutResponse) -> None:
        await self.rollouts.completed(rollout_id, report)


class House:
    """A worker's rollouts, a gateway before them, and a rollout server that calls it over HTTP."""

    def __init__(self, chat: Any) -> None:
        self.chat = chat
        self.peer = Peer("A", chat)
        foreign = ForeignSettings("http://gateway", FOREIGN_SECRET)
        made = WorkerSettings("org/m", None, "auto", {}, "app", "engine", 4, {}, 8, foreign)
        self.rollouts = ForeignRollouts("w", made, transport=self.peer.transport)
        app = make_app(lambda: None, MAX_BODY, ACCESS, remote=Direct(self.rollouts))  # type: ignore[arg-type,return-value]
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://gateway"
        )

    def session(self, generation: Generation, *turns: str, **limits: Any) -> ForeignSession:
        self.peer.generation = generation
        spec = RunSpec(
            f"r{generation}",
            "",
            {},
            Sampling(max_tokens=64),
            Limits(**limits),
            RemoteSpec("http://127.0.0.1:9000", generation),
        )
        task = Task(task_id="t", messages=[USER])
        assignment = Assignment(SessionKey("r", "t", "r/t", 0), task, 1)
        made = self.rollouts.session(spec, assignment, scripted(self.chat, *(turns or TURNS)), self.chat, None)
        self.peer.sessions[made.rollout_id] = made
        return made

    async def post(self, path: str, key: str | None, body: Any) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        content = body if isinstance(body, bytes) else json.dumps(body)
        return await self.http.post(f"/remote/w{path}", content=content, headers=headers)


@pytest.fixture
async def house(chat) -> AsyncIterator[House]:
    made = House(chat)
    yield made
    await made.http.aclose()
    await made.rollouts.close()


PATHS: dict[Generation, str] = {"A": "/v1/completions", "A1": "/v1/chat/completions", "B": "/v1/chat/completions"}


@pytest.mark.parametrize("generation", ["A", "A1", "B"])
async def test_a_rollout_over_http(house: House, generation: Generation):
    async def play(peer: Peer, body: dict[str, Any]) -> dict[str, Any]:
        rollout_id = body["rollout_id"]
        key = body["api_key"] if generation == "B" else body["callback_api_key"]
        assert body["server_url"] == "http://gateway/remote/w"
        messages, mask, last = list(body["messages"]), None, 0
        for _ in range(2):
            asked = {"rollout_id": rollout_id, "messages": messages, "response_mask": mask, "unknown": 1}
            answer = await house.post(PATHS[generation], key, asked)
            assert answer.status_code == 200, answer.text
            said = answer.json()
            assert len(said["token_ids"]) == len(said["logprobs"])
            message = said["choices"][0]["message"]
            messages = [*messages, message, *results(message)]
            last = len(said["prompt_token_ids"]) + len(said["token_ids"])
            if generation != "B":
                mask = [0] * (len(house.chat.render(messages, peer.tools or [])) - last)
        report = end(body, reward=0.5)
        if generation == "B":
            for status in ("COMPLETED", "ERROR"):
                told = await house.post("/v1/rollout/completed", key, {**report, "status": status})
                assert (told.status_code, told.json()) == (200, {"rollout_id": rollout_id, "status": "ok"})
        return report

    house.peer.play = play
    trajectory = await house.session(generation).run()
    assert trajectory.error is None and trajectory.stop_reason == "stop"
    assert trajectory.reward == (0.5 if generation == "B" else None)
    assert [m["role"] for m in trajectory.messages] == ["user", "assistant", "tool", "assistant"]
    await asyncio.gather(*house.peer.running)


async def opened(house: House, generation: Generation = "A") -> tuple[ForeignSession, str, asyncio.Task[Any]]:
    """A session that is being played by somebody who does nothing."""

    async def wait(*_: Any) -> Any:
        await asyncio.sleep(60)

    house.peer.play = wait
    session = house.session(generation)
    task = asyncio.create_task(session.run())
    await asyncio.sleep(0.02)
    return session, session_key(FOREIGN_SECRET, session.rollout_id), task


async def test_only_the_rollouts_own_key_opens_it(house: House):
    session, key, task = await opened(house)
    body = {"rollout_id": session.rollout_id, "messages": [USER]}
    for wrong in (
        None,
        "",
        "admin-key",
        key[:-1] + ("0" if key[-1] != "0" else "1"),
        session_key(SECRET, session.rollout_id),
        session_key(FOREIGN_SECRET, "another"),
        "ses_é_x",
    ):
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/rollout/completed"):
            given = {**body, "status": "COMPLETED"}
            headers = {} if wrong is None else {"authorization": f"Bearer {wrong}".encode()}
            answer = await house.http.post(f"/remote/w{path}", content=json.dumps(given), headers=headers)
            assert answer.status_code == 401, (wrong, path)
            assert key not in answer.text
    assert not task.done()
    assert (await house.post("/v1/completions", key, body)).status_code == 200
    raw = await house.http.post("/remote/w/v1/completions", content=json.dumps(body), headers={"authorization": key})
    assert raw.status_code == 200, "the key alone is what some clients send"
    task.cancel()
    await task


async def test_a_rollouts_key_opens_nothing_else(house: House):
    _, key, task = await opened(house)
    for method, path in (("GET", "/v1/runs"), ("POST", "/v1/inference/completions"), ("GET", "/remote/w")):
        answer = await house.http.request(method, path, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code in (401, 403), path
    task.cancel()
    await task


async def test_what_is_not_there_is_404_and_what_has_ended_409(house: House):
    session, key, task = await opened(house)
    body = {"rollout_id": session.rollout_id, "messages": [USER]}
    other = await house.http.post(
        "/remote/gone/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}
    )
    assert other.status_code == 404
    nobody = await house.post(
        "/v1/completions", session_key(FOREIGN_SECRET, "n"), {"rollout_id": "n", "messages": [USER]}
    )
    assert nobody.status_code == 404
    task.cancel()
    await task
    assert (await house.post("/v1/completions", key, body)).status_code == 409


async def test_a_wrong_mask_is_422_and_says_why(house: House):
    session, key, task = await opened(house)
    answer = await house.post(
        "/v1/completions", key, {"rollout_id": session.rollout_id, "messages": [USER], "response_mask": [0]}
    )
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "response_mask" and "first call" in answer.json()["error"]["message"]
    assert "first call" in (await task).error


async def test_a_body_that_is_too_large_is_413(house: House):
    _, key, task = await opened(house)
    answer = await house.post("/v1/completions", key, b"x" * (MAX_BODY + 1))
    assert answer.status_code == 413
    task.cancel()
    await task


async def test_a_gateway_without_workers_says_so():
    app = make_app(lambda: None, MAX_BODY, ACCESS)  # type: ignore[arg-type,return-value]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://g") as http:
        key = session_key(FOREIGN_SECRET, "r")
        body = {"rollout_id": "r", "messages": [USER]}
        answer = await http.post("/remote/w/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 503


# Whatever is sent

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "function", "developer"])
MESSAGE = st.fixed_dictionaries(
    {"role": ROLES},
    optional={"content": JSON, "tool_calls": JSON, "tool_call_id": JSON, "name": JSON, "reasoning_content": JSON},
)
BODY = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(MESSAGE, max_size=4) | JSON,
        "response_mask": st.lists(st.integers(-1, 2), max_size=5) | JSON,
        "temperature": st.floats(0, 2) | JSON,
        "top_p": st.floats(0, 1) | JSON,
        "max_tokens": st.integers(1, 100) | JSON,
        "stop": st.lists(st.text(max_size=3), max_size=2) | JSON,
        "logprobs": JSON,
        "model": JSON,
        "status": st.sampled_from(["COMPLETED", "ERROR"]) | JSON,
        "final_messages": JSON,
        "finish_reason": JSON,
        "error_message": JSON,
        "reward": JSON,
        "metrics": JSON,
        "extra_fields": JSON,
    },
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(body=BODY, path=st.sampled_from([*PATHS.values(), "/v1/rollout/completed"]), generation=st.sampled_from("AB"))
def test_no_body_is_answered_with_a_bug(chat, body: dict[str, Any], path: str, generation: Any):
    async def once() -> None:
        house = House(chat)
        try:
            session, key, task = await opened(house, generation)
            # As a client that escapes nothing would: NaN and lone surrogates included.
            content = json.dumps({"rollout_id": session.rollout_id, **body}).encode()
            answer = await house.post(path, key, content)
            assert answer.status_code in (200, 404, 409, 422), answer.text
            task.cancel()
            trajectory = await task
            assert trajectory.stop_reason in ("cancelled", "error", "stop", "length", "max_tokens", "max_turns")
            assert "bug" not in answer.text
        finally:
            await house.http.aclose()
            await house.rollouts.close()

    asyncio.run(once())


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"{", b'"x"', b"\xff\xfe", b"[" * 50_000, b'{"a":' * 30_000, b"1e999", b"NaN"],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/rollout/completed"])
async def test_no_bytes_are_answered_with_a_bug(house: House, content: bytes, path: str):
    _, key, task = await opened(house)
    answer = await house.post(path, key, content)
    assert answer.status_code == 422, answer.text
    task.cancel()
    await task
