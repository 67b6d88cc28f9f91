"""Access end to end: keys, scopes, sizes and rates at the one address, before the gateway and before the engines."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest

from rollout import RolloutClient
from tests.integration.guarded import KEYS, Guarded

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400, func_only=True)]

MODEL = "model"
HELLO = [{"role": "user", "content": "Hello"}]
CHAT = {"model": MODEL, "messages": HELLO, "max_tokens": 4}
# Bytes; access.max_body_mb is 1.
TOO_LARGE = 2**20 + 1


@pytest.fixture(scope="module", autouse=True)
def _ends(guarded: Guarded) -> Iterator[None]:
    """Nobody needs it any more when these tests are done: the two cores are for the others."""
    yield
    guarded.stop()


def status(guarded: Guarded, key: str | None, method: str, path: str, **options: object) -> int:
    with guarded.client(key) as http:
        return http.request(method, path, **options).status_code  # type: ignore[arg-type]


# Keys and scopes

ASKED = {
    # path: (method, body, who may)
    "/v1/models": ("GET", None, {"app", "root"}),
    "/v1/chat/completions": ("POST", CHAT, {"app", "root"}),
    "/v1/loading/progress": ("GET", None, {"app", "root"}),
    "/agents": ("GET", None, {"app", "root"}),
    "/v1/runs": ("GET", None, {"trainer", "root"}),
    "/v1/weights": ("GET", None, {"trainer", "root"}),
    "/metrics": ("GET", None, {"app", "trainer", "root"}),
}


@pytest.mark.parametrize("path", ASKED)
def test_who_may_what(guarded: Guarded, path: str):
    method, body, allowed = ASKED[path]
    for key in ("app", "trainer", "root"):
        expected = 200 if key in allowed else 403
        assert status(guarded, key, method, path, json=body) == expected, key
    assert status(guarded, None, method, path, json=body) == 401


def test_only_an_admin_changes_weights_and_agents(guarded: Guarded):
    new = {"name": "sums", "environment": "examples.calculator.environment:Calculator"}
    for key in ("app", "trainer"):
        assert status(guarded, key, "POST", "/v1/weights", json={}) == 403
        assert status(guarded, key, "POST", "/agents", json=new) == 403
        assert status(guarded, key, "DELETE", "/agents/calculator") == 403
    assert status(guarded, "root", "POST", "/v1/weights", json={}) == 422
    assert status(guarded, "root", "POST", "/agents", json=new) == 201
    asked = {"model": "sums", "messages": [{"role": "user", "content": "What is 2 + 3?"}], "max_tokens": 64}
    assert status(guarded, "app", "POST", "/agents/sums/v1/chat/completions", json=asked) == 200
    assert status(guarded, "root", "DELETE", "/agents/sums") == 204
    assert status(guarded, "app", "POST", "/agents/sums/v1/chat/completions", json=asked) == 404


def test_what_is_open_needs_no_key_and_tells_no_secret(guarded: Guarded):
    with guarded.client() as http:
        for path in ("/health", "/ready"):
            answer = http.get(path)
            assert answer.status_code == 200
            assert not any(key in answer.text for key in KEYS.values())


def test_a_wrong_key_is_told_in_the_form_of_each_client(guarded: Guarded):
    chat = openai.OpenAI(base_url=f"{guarded.address}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as refused:
        chat.chat.completions.create(model=MODEL, messages=HELLO)
    assert refused.value.code == "invalid_api_key" and "wrong" not in str(refused.value)
    claude = anthropic.Anthropic(base_url=guarded.address, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        claude.messages.create(model=MODEL, max_tokens=4, messages=HELLO)
    with httpx.Client(base_url=guarded.address, headers={"authorization": "Bearer wrong"}) as http:
        answer = http.get("/v1/runs")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["error"]["type"] == "unauthenticated"
    assert uuid.UUID(answer.headers["x-correlation-id"])


def test_the_official_clients_get_in_with_their_keys(guarded: Guarded):
    chat = openai.OpenAI(base_url=f"{guarded.address}/v1", api_key=KEYS["app"], max_retries=0)
    assert chat.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4).usage.completion_tokens <= 4
    claude = anthropic.Anthropic(base_url=guarded.address, api_key=KEYS["app"], max_retries=0)
    assert claude.messages.create(model=MODEL, max_tokens=4, messages=HELLO).usage.output_tokens <= 4
    with RolloutClient(guarded.address, api_key=KEYS["trainer"]) as trainer:
        assert trainer.runs() == []


def test_owners_see_and_run_what_others_do_not(guarded: Guarded):
    tools = {}
    for key in ("app", "other", "root"):
        with guarded.client(key) as http:
            (agent,) = http.get("/agents").json()["agents"]
        tools[key] = {tool["name"] for tool in agent["tools"]}
    assert tools["other"] == {"add", "subtract"}
    assert tools["app"] == {"add", "subtract", "divide"}
    assert tools["root"] == {"add", "subtract", "divide", "multiply"}


def test_a_sessions_key_opens_its_session_alone(guarded: Guarded):
    with RolloutClient(guarded.address, api_key=KEYS["trainer"]) as trainer:
        run = trainer.create_run(name="captured", environment={"path": "captured"}, group_size=2).run
        first, second = (trainer.open_session(run) for _ in range(2))
        agent = openai.OpenAI(base_url=first.base_url, api_key=first.api_key, max_retries=0)
        agent.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4)
        thief = openai.OpenAI(base_url=second.base_url, api_key=first.api_key, max_retries=0)
        with pytest.raises(openai.PermissionDeniedError):
            thief.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4)
        with httpx.Client(headers={"authorization": f"Bearer {first.api_key}"}) as http:
            assert http.get(f"{guarded.address}/v1/runs").status_code == 403
            assert http.post(f"{guarded.address}/v1/chat/completions", json=CHAT).status_code == 403
        assert trainer.close_session(first.session_id, 1.0).calls != []
        assert trainer.close_session(second.session_id).calls == []
        trainer.forget(run)


# Sizes, rates, other origins


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/agents/calculator/v1/chat/completions", "/v1/inference"])
def test_too_large_a_body_is_refused_announced_or_not(guarded: Guarded, path: str):
    def pieces() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * (TOO_LARGE // 16)

    for content in (b" " * TOO_LARGE, pieces()):
        with guarded.client("app") as http:
            answer = http.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413, path
        assert "access.max_body_mb" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/agents", "/v1/models"])
def test_too_many_requests_are_told_when_to_come_again(guarded: Guarded, path: str):
    """Gateways and engines count for themselves. 60 a minute: so many come at once, and one a second after that."""
    with guarded.client("greedy") as http:
        answers = [http.get(path) for _ in range(90)]
    codes = [answer.status_code for answer in answers]
    assert codes[0] == 200 and set(codes) == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert status(guarded, "other", "GET", path) == 200, "one caller's greed is nobody else's"
    assert status(guarded, None, "GET", "/health") == 200, "probes meet no limit"


@pytest.mark.parametrize("path", ["/v1/models", "/agents", "/v1/chat/completions"])
def test_other_origins_are_not_let_in(guarded: Guarded, path: str):
    origin = {"origin": "https://evil.example"}
    with guarded.client("app") as http:
        plain = http.get(path, headers=origin)
        preflight = http.options(path, headers={**origin, "access-control-request-method": "POST"})
    for answer in (plain, preflight):
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert preflight.status_code >= 400
