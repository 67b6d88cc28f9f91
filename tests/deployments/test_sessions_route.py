"""The routes of captured sessions over the real service: what a trainer says and hears."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.capture_service import CaptureService
from deployments.gateway import make_app
from rollout.api import CapturedSession, EnvironmentRef, OpenedSession, RunRequest
from rollout.capture.session_book import CaptureLimits
from rollout.tasks import Task
from tests.actors.service import Service
from tests.rollout.capture.made_calls import made

TASK = {"task_id": "t", "messages": [{"role": "user", "content": "?"}]}


class Direct:
    """A backend over a capture service in this process, as RayBackend is over the controller."""

    def __init__(self, capture: CaptureService) -> None:
        self.capture = capture

    async def open_session(self, run: str, task: Task | None, limits: CaptureLimits | None) -> OpenedSession:
        return await self.capture.open(run, task, limits)

    async def session_info(self, session: str) -> CapturedSession:
        return self.capture.info(session)

    async def reward_session(self, session: str, reward: Any, turn_rewards: Any) -> CapturedSession:
        await self.capture.reward(session, reward, turn_rewards)
        return self.capture.info(session)

    async def close_session(self, session: str, cancel: bool) -> CapturedSession:
        return await self.capture.close(session, cancel=cancel)


@pytest.fixture
async def capture(tmp_path: Path) -> AsyncIterator[CaptureService]:
    service = Service(tmp_path / "journal.sqlite")
    await service.runs.create(RunRequest(name="r", environment=EnvironmentRef(path="captured")))
    await service.runs.create(RunRequest(name="own"))
    yield CaptureService(service.store, b"s" * 32)
    await service.close()


@pytest.fixture
async def http(capture: CaptureService) -> AsyncIterator[httpx.AsyncClient]:
    backend = Direct(capture)
    app = make_app(lambda: backend, 50_000)  # type: ignore[arg-type, return-value]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway:88") as client:
        yield client


async def opened(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await http.post("/v1/sessions", json={"run": "r", "task": TASK, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_an_address_for_both_kinds_of_clients(http: httpx.AsyncClient):
    session = await opened(http)
    base = f"http://gateway:88/v1/sessions/{session['session_id']}/api"
    assert (session["base_url"], session["anthropic_base_url"]) == (f"{base}/v1", base)
    assert session["trajectory_id"] == "r/t/0" and session["api_key"].startswith("ses_")


async def test_the_address_is_the_one_by_which_the_client_came(http: httpx.AsyncClient):
    answer = await http.post("/v1/sessions", json={"run": "r"}, headers={"host": "cluster.example:9000"})
    assert answer.json()["base_url"].startswith("http://cluster.example:9000/v1/sessions/")


async def test_from_opening_to_closing(http: httpx.AsyncClient, capture: CaptureService):
    path = f"/v1/sessions/{(session := await opened(http))['session_id']}"
    capture.begin(session["session_id"], "a")
    capture.end(session["session_id"], "a", [made([1], [2, 3], call_id="a")], False)
    info = (await http.get(path)).json()
    assert (info["state"], info["calls"], info["tokens"], info["segments"]) == ("open", ["a"], 2, None)
    rewarded = (await http.post(f"{path}/reward", json={"turn_rewards": {"a": 0.5}})).json()
    assert rewarded["state"] == "rewarded"
    closed = (await http.post(f"{path}/close", json={"reward": 1.0})).json()
    assert (closed["state"], closed["reward"], closed["segments"], closed["stop_reason"]) == (
        "closed",
        1.0,
        1,
        "stop",
    )
    assert (await http.post(f"{path}/close")).json() == closed, "closing may be repeated"


async def test_a_session_can_be_cancelled_without_a_body_of_its_own(http: httpx.AsyncClient):
    path = f"/v1/sessions/{(await opened(http))['session_id']}"
    assert (await http.post(f"{path}/close", json={"cancel": True})).json()["stop_reason"] == "cancelled"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "run"),
        ({"run": ""}, "run"),
        ({"run": "r", "task": {"task_id": "x"}}, "task.messages"),
        ({"run": "r", "limits": {"max_calls": 0}}, "limits.max_calls"),
        ({"run": "r", "rum": 1}, "rum"),
    ],
)
async def test_what_is_wrong_is_named(http: httpx.AsyncClient, body: dict[str, Any], field: str):
    answer = await http.post("/v1/sessions", json=body)
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, field)


async def test_errors_have_their_statuses(http: httpx.AsyncClient):
    assert (await http.post("/v1/sessions", json={"run": "none"})).status_code == 404
    assert (await http.post("/v1/sessions", json={"run": "own"})).status_code == 422
    assert (await http.get("/v1/sessions/none")).status_code == 404
    assert (await http.post("/v1/sessions/none/close")).status_code == 404
    for _ in range(2):
        session = await opened(http)
    assert (await http.post("/v1/sessions", json={"run": "r", "task": TASK})).status_code == 409
    path = f"/v1/sessions/{session['session_id']}"
    for body, status in (({}, 400), ({"reward": "x"}, 422), ({"turn_rewards": {"no": 1}}, 422)):
        assert (await http.post(f"{path}/reward", json=body)).status_code == status, body
    for content in (b'{"reward": NaN}', b'{"reward": 1e999}'):
        assert (await http.post(f"{path}/reward", content=content)).status_code in (400, 422)
    await http.post(f"{path}/reward", json={"reward": 1})
    assert (await http.post(f"{path}/reward", json={"reward": 2})).status_code == 409
