"""What a trainer says to a rollout server, and what it takes from one that is full, away, broken or hostile."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from rollout.errors import RemoteDied, RemoteError
from rollout.remote import foreign_client
from rollout.remote.foreign_client import ForeignClient, RemoteSpec
from rollout.remote.hosts import AllowedHosts
from rollout.remote.wire import Generation, InitRequest, RolloutRequest

A = RolloutRequest(rollout_id="r", server_url="http://gateway", messages=[{"role": "user", "content": "x"}])
B = InitRequest(
    rollout_id="r", server_url="http://gateway", messages=[{"role": "user", "content": "x"}], completion_params={}
)
ENDED = {"rollout_id": "r", "status": "COMPLETED", "finish_reason": "stop"}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_client, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(foreign_client, "CONNECT_PATIENCE_S", 0.05)


class Server:
    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.seen: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def client(server: Server, generation: Generation = "A", **options: Any) -> ForeignClient:
    key_env = options.pop("key_env", None)
    return ForeignClient(
        RemoteSpec("http://127.0.0.1:9000/x", generation, key_env),
        2,
        transport=httpx.MockTransport(server),
        **options,
    )


async def test_a_rollout_is_sent_once_and_its_end_is_read():
    server = Server(httpx.Response(200, json={**ENDED, "metrics": {"num_llm_calls": 2}}))
    made = client(server, key_env="ROLLOUT_REMOTE_K", env={"ROLLOUT_REMOTE_K": " sesame "})
    assert (await made.rollout(A)).finish_reason == "stop"
    (request,) = server.seen
    assert str(request.url) == "http://127.0.0.1:9000/x/rollout"
    assert request.headers["authorization"] == "Bearer sesame"
    await made.close()


async def test_a_key_that_is_not_set_is_named():
    with pytest.raises(RemoteError, match="ROLLOUT_REMOTE_K"):
        client(Server(httpx.Response(200)), key_env="ROLLOUT_REMOTE_K", env={})


async def test_a_full_server_is_asked_again():
    busy = httpx.Response(429, headers={"retry-after": "0.001"})
    soon = httpx.Response(503, headers={"retry-after": "0"})
    server = Server(busy, busy, soon, httpx.Response(200, json=ENDED))
    assert (await client(server).rollout(A)).status == "COMPLETED"
    assert len(server.seen) == 4


async def test_a_server_that_is_starting_is_waited_for():
    server = Server(httpx.ConnectError("refused"), httpx.Response(200, json=ENDED))
    assert (await client(server).rollout(A)).status == "COMPLETED"


async def test_a_server_that_is_away_is_given_up():
    server = Server(httpx.ConnectError("refused"))
    with pytest.raises(RemoteDied, match="cannot be reached: ConnectError: refused"):
        await client(server).rollout(A)
    assert len(server.seen) > 1


@pytest.mark.parametrize("failure", [httpx.ReadError("reset"), httpx.RemoteProtocolError("cut")])
async def test_a_rollout_that_may_have_begun_is_not_sent_again(failure: Exception):
    server = Server(failure)
    with pytest.raises(RemoteDied, match="went away"):
        await client(server).rollout(A)
    assert len(server.seen) == 1


async def test_an_init_is_sent_again_as_it_has_an_id():
    server = Server(httpx.ReadError("reset"), httpx.Response(202, json={"rollout_id": "r", "tools": []}))
    assert (await client(server, "B").init(B)).rollout_id == "r"
    assert len(server.seen) == 2
    server = Server(httpx.ReadError("reset"))
    with pytest.raises(RemoteDied):
        await client(server, "B").init(B)
    assert len(server.seen) == 3


async def test_an_init_that_is_not_answered_has_a_deadline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(foreign_client, "ANSWER_SECONDS", 0.01)

    async def never(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        raise AssertionError

    made = ForeignClient(RemoteSpec("http://h", "B"), 1, transport=httpx.MockTransport(never))
    with pytest.raises(RemoteDied, match="did not accept"):
        await made.init(B)


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (httpx.Response(500, text="boom"), RemoteDied, "answered 500: boom"),
        (httpx.Response(503), RemoteDied, "answered 503"),
        (httpx.Response(422, json={"detail": "no"}), RemoteError, "answered 422"),
        (httpx.Response(302, headers={"location": "http://169.254.169.254/"}), RemoteError, "answered 302"),
        (httpx.Response(400, text="x" * 10_000), RemoteError, "…"),
        (httpx.Response(200, text="hello"), RemoteError, "not one of the protocol"),
        (httpx.Response(200, json={"rollout_id": "r", "status": "DONE"}), RemoteError, "status"),
        (httpx.Response(200, json={**ENDED, "reward": "much"}), RemoteError, "reward"),
    ],
)
async def test_whatever_else_is_answered_is_an_error(answer: httpx.Response, kind: type[RemoteError], text: str):
    with pytest.raises(RemoteError, match=text) as caught:
        await client(Server(answer)).rollout(A)
    assert type(caught.value) is kind and len(str(caught.value)) < 1_000


async def test_an_endless_answer_is_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(foreign_client, "MAX_ANSWER_BYTES", 1_000)
    with pytest.raises(RemoteError, match="more than 1000 bytes"):
        await client(Server(httpx.Response(200, content=b"x" * 2_000))).rollout(A)


@pytest.mark.parametrize("coding", ["gzip", "gzip, gzip", "X-Odd"])
async def test_a_compressed_answer_is_refused_before_a_byte_of_it_is_read(coding: str):
    read = []

    async def content() -> Any:
        read.append(True)
        yield b"\x1f\x8b"

    server = Server(httpx.Response(200, headers={"content-encoding": coding}, content=content()))
    with pytest.raises(RemoteError, match="POST /rollout compressed, which was not asked for"):
        await client(server).rollout(A)
    assert read == [] and server.seen[0].headers["accept-encoding"] == "identity"


async def test_tools_are_asked_for_once():
    tools = [{"type": "function", "function": {"name": "add"}}]
    server = Server(httpx.Response(200, json={"tools": tools}))
    made = client(server)
    assert await asyncio.gather(made.tools(), made.tools()) == [tools, tools]
    assert await made.tools() == tools
    assert len(server.seen) == 1


async def test_a_server_without_tools_has_none():
    assert await client(Server(httpx.Response(404))).tools() == []


@pytest.mark.parametrize("body", ["[]", "{}x", '{"tools": 3}', '{"tools": [1]}', "[" * 100_000])
async def test_tools_that_are_none_are_an_error_and_asked_for_again(body: str):
    server = Server(httpx.Response(200, text=body), httpx.Response(200, json={"tools": []}))
    made = client(server)
    with pytest.raises(RemoteError):
        await made.tools()
    assert await made.tools() == []


async def test_an_address_that_is_not_allowed_is_never_called():
    server = Server(httpx.Response(200, json=ENDED))
    made = ForeignClient(
        RemoteSpec("http://169.254.169.254", "A"), 1, hosts=AllowedHosts(), transport=httpx.MockTransport(server)
    )
    with pytest.raises(RemoteError, match="allowed_hosts"):
        await made.rollout(A)
    assert server.seen == []


async def test_an_allowed_name_is_called_at_the_address_that_was_checked():
    async def resolve(_host: str, _port: int) -> list[str]:
        return ["10.0.0.7"]

    server = Server(httpx.Response(200, json=ENDED))
    hosts = AllowedHosts(["pods.example", "10.0.0.0/8"], resolve=resolve)
    made = ForeignClient(
        RemoteSpec("http://pods.example:9000", "A"), 1, hosts=hosts, transport=httpx.MockTransport(server)
    )
    await made.rollout(A)
    assert str(server.seen[0].url) == "http://10.0.0.7:9000/rollout"
    assert server.seen[0].headers["host"] == "pods.example:9000"
