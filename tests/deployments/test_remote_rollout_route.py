"""The rollout server's HTTP: bodies, statuses, waiting, and who may call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.gateway import make_app
from deployments.routes import remote_rollout as module
from rollout.access import AccessKey, AccessSettings, hash_key
from rollout.errors import BusyError, ConflictError, NotFoundError, RefusedError, UnavailableError
from rollout.remote.failures import RemoteFailure
from rollout.remote.order import RolloutCounts, RolloutOrder, RolloutTicket
from rollout.remote.server_rollout import failed
from rollout.remote.wire import Metrics, RolloutResponse

A: dict[str, Any] = {
    "rollout_id": "r",
    "server_url": "http://127.0.0.1:9",
    "messages": [{"role": "user", "content": "2+3?"}],
}
B: dict[str, Any] = {**A, "completion_params": {"temperature": 0.5}}
DONE = RolloutResponse(
    rollout_id="r",
    status="COMPLETED",
    final_messages=[{"role": "assistant", "content": "5"}],
    finish_reason="stop",
    reward=1.0,
    metrics=Metrics(num_llm_calls=1),
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


class Backend:
    """The controller's side, as a script."""

    def __init__(self) -> None:
        self.orders: list[RolloutOrder] = []
        self.refusal: Exception | None = None
        self.results: list[Any] = [DONE]
        self.tools_failure: Exception | None = None
        self.silent = False

    async def remote_accept(self, order: RolloutOrder) -> RolloutTicket:
        if self.refusal is not None:
            raise self.refusal
        self.orders.append(order)
        return RolloutTicket(order.rollout_id)

    async def remote_result(self, rollout_id: str, timeout: float) -> RolloutResponse | None:
        result = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        if isinstance(result, Exception):
            raise result
        return result

    async def remote_tools(self) -> list[dict[str, Any]]:
        if self.tools_failure is not None:
            raise self.tools_failure
        return TOOLS

    async def remote_counts(self) -> RolloutCounts:
        if self.silent:
            await asyncio.sleep(60)
        return RolloutCounts(queued=1, running=2, unreported=0, completed=7, failed=0)


@pytest.fixture
def backend() -> Backend:
    return Backend()


def client(backend: Backend, access: AccessSettings | None = None, agent_loop: str | None = "Adder") -> Any:
    app = make_app(lambda: backend, 100_000, access, agent_loop=agent_loop)  # type: ignore[arg-type, return-value]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


@pytest.fixture
async def http(backend: Backend) -> AsyncIterator[httpx.AsyncClient]:
    async with client(backend) as made:
        yield made


async def test_generation_a_answers_when_the_rollout_has_ended(http: httpx.AsyncClient, backend: Backend):
    backend.results = [None, None, DONE]
    response = await http.post("/rollout", json={**A, "callback_api_key": "k"})
    assert response.status_code == 200
    body = response.json()
    assert body["status"] == "COMPLETED" and body["finish_reason"] == "stop" and "reward" not in body
    assert body["metrics"]["num_llm_calls"] == 1 and body["error_message"] is None
    (order,) = backend.orders
    assert (order.generation, order.key, order.api_key) == ("A", "r", "k")


async def test_a_controller_that_is_being_started_again_makes_the_call_longer(
    http: httpx.AsyncClient, backend: Backend, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    backend.results = [UnavailableError("gone"), UnavailableError("gone"), DONE]
    assert (await http.post("/rollout", json=A)).status_code == 200
    monkeypatch.setattr(module, "PATIENCE_S", 0.03)
    backend.results = [UnavailableError("gone")]
    assert (await http.post("/rollout", json=A)).status_code == 503


async def test_a_rollout_that_outlasts_the_connection_can_be_joined_again(
    http: httpx.AsyncClient, backend: Backend, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "MAX_HOLD_S", 0.0)
    response = await http.post("/rollout", json=A)
    assert response.status_code == 503 and "same request again" in response.text
    assert response.headers["retry-after"]


async def test_generation_b_answers_at_once_with_the_tools(http: httpx.AsyncClient, backend: Backend):
    response = await http.post("/v1/rollout/init", json={**B, "idempotency_key": "i"})
    assert response.status_code == 202
    assert response.json() == {"rollout_id": "r", "tools": TOOLS}
    (order,) = backend.orders
    assert (order.generation, order.key, order.params) == ("B", "i", {"temperature": 0.5})


async def test_an_order_is_not_taken_where_the_answer_would_lack_the_tools(http: httpx.AsyncClient, backend: Backend):
    backend.tools_failure = UnavailableError("no worker")
    assert (await http.post("/v1/rollout/init", json=B)).status_code == 503
    assert backend.orders == []


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (BusyError("full", 7.0), 429),
        (ConflictError("another body"), 409),
        (RefusedError("host", "server_url"), 422),
        (NotFoundError("no rollout server"), 404),
        (UnavailableError("stopping"), 503),
    ],
)
@pytest.mark.parametrize(("path", "body"), [("/rollout", A), ("/v1/rollout/init", B)])
async def test_refusals(
    http: httpx.AsyncClient, backend: Backend, path: str, body: Any, failure: Exception, status: int
):
    backend.refusal = failure
    response = await http.post(path, json=body)
    assert response.status_code == status
    assert (response.headers.get("retry-after") == "7") == (status == 429)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/rollout", {**A, "max_turns": 101}),
        ("/rollout", {**A, "server_url": "file:///etc"}),
        ("/rollout", {}),
        ("/v1/rollout/init", A),
        ("/v1/rollout/init", {**B, "rollout_id": " "}),
    ],
)
async def test_bodies_that_are_not_the_protocols_are_422(http: httpx.AsyncClient, path: str, body: Any):
    response = await http.post(path, json=body)
    assert response.status_code == 422 and response.json()["error"]["field"]


async def test_tools_and_health(http: httpx.AsyncClient, backend: Backend, monkeypatch: pytest.MonkeyPatch):
    assert (await http.get("/tools")).json() == {"tools": TOOLS}
    healthy = {
        "status": "healthy",
        "service": "rollout-server",
        "agent_loop": "Adder",
        "active_rollouts": 3,
        "completed_rollouts": 7,
    }
    assert (await http.get("/health")).json() == healthy
    assert (await http.get("/platform/health")).json() == healthy
    monkeypatch.setattr(module, "HEALTH_SECONDS", 0.01)
    backend.silent = True
    body = (await http.get("/health")).json()
    assert body["status"] == "healthy" and body["active_rollouts"] is None


async def test_a_gateway_of_no_rollout_server_says_so_as_before(backend: Backend):
    async with client(backend, agent_loop=None) as http:
        assert (await http.get("/health")).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/rollout"), ("GET", "/tools"), ("POST", "/v1/rollout/init"), ("GET", "/platform/health")],
)
async def test_a_trainers_key_is_needed(backend: Backend, method: str, path: str):
    keys = (
        AccessKey("t", hash_key("trainer-key"), frozenset({"trainer"})),
        AccessKey("s", hash_key("serve-key"), frozenset({"serve"})),
    )
    body = A if path == "/rollout" else B
    async with client(backend, AccessSettings(keys=keys)) as http:
        statuses = [
            (await http.request(method, path, json=body, headers=headers)).status_code
            for headers in (
                {},
                {"authorization": "Bearer serve-key"},
                {"authorization": "Bearer trainer-key"},
            )
        ]
        assert statuses[:2] == [401, 403] and statuses[2] in (200, 202)
        assert (await http.get("/health")).status_code == 200
        refused = await http.request(method, path, json=body)
        assert refused.json()["detail"] == "Invalid or missing API key", "as the protocol has it"


# Whatever is sent


class Echo(Backend):
    """Keeps each order as the journal would, and answers with what was asked, as a rollout that fails does."""

    async def remote_accept(self, order: RolloutOrder) -> RolloutTicket:
        assert RolloutOrder.model_validate_json(order.model_dump_json()) == order
        self.results = [failed(order, RemoteFailure("internal_error", "x"))]
        return await super().remote_accept(order)


# Finite ones are others' work; these are what pydantic's own checks do not see.
NUMBERS = st.floats() | st.sampled_from([float("nan"), float("inf"), -float("inf")])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(max_size=20) | st.just("a\ud83d"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "function", "developer"])},
    optional={"content": JSON, "tool_calls": JSON, "tool_call_id": JSON, "name": JSON, "w": JSON},
)
FIELDS: dict[str, Any] = {
    "messages": st.lists(MESSAGE, max_size=4) | JSON,
    "metadata": st.dictionaries(st.text(max_size=5), JSON, max_size=3) | JSON,
    "completion_params": st.dictionaries(st.text(max_size=5), JSON, max_size=3) | JSON,
    "sampling_params": st.dictionaries(st.sampled_from(["temperature", "top_p", "stop", "logprobs"]), JSON) | JSON,
    **dict.fromkeys(("rollout_id", "server_url", "max_turns", "max_tokens_total", "tool_server_url"), JSON),
    **dict.fromkeys(("callback_api_key", "api_key", "idempotency_key", "tokenizer_name"), JSON),
}


@settings(max_examples=200, deadline=None)
@given(
    start=st.sampled_from([("/rollout", A), ("/v1/rollout/init", B)]),
    body=st.lists(st.sampled_from(sorted(FIELDS)), max_size=2, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
    ),
)
def test_no_body_is_answered_with_a_bug(start: tuple[str, dict[str, Any]], body: dict[str, Any]):
    async def once() -> None:
        async with client(Echo()) as http:
            # As a client that escapes nothing would: NaN and lone surrogates included.
            answer = await http.post(start[0], content=json.dumps({**start[1], **body}).encode())
            assert answer.status_code in (200, 202, 422), answer.text

    asyncio.run(once())


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity"])
@pytest.mark.parametrize("place", ["messages", "metadata", "completion_params"])
@pytest.mark.parametrize(("path", "body"), [("/rollout", A), ("/v1/rollout/init", B)])
async def test_numbers_that_are_none_are_refused_by_their_field(path: str, body: Any, place: str, number: str):
    held = {"messages": [{"role": "user", "content": [{"w": "HERE"}]}]}.get(place, {"w": ["HERE"]})
    content = json.dumps({**body, place: held}).replace('"HERE"', number)
    async with client(Echo()) as http:
        answer = await http.post(path, content=content)
    if path == "/rollout" and place == "completion_params":
        assert answer.status_code == 200, "a field that A does not know"
        return
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, place), answer.text
    assert ".w" in answer.json()["error"]["message"] or "w.0" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "content", [b"null", b"[]", b"{", b'"x"', b"\xff\xfe", b"[" * 40_000, b'{"a":' * 15_000, b"1e999", b"NaN"]
)
@pytest.mark.parametrize("path", ["/rollout", "/v1/rollout/init"])
async def test_no_bytes_are_answered_with_a_bug(path: str, content: bytes):
    async with client(Echo()) as http:
        assert (await http.post(path, content=content)).status_code == 422
