"""Calls to a trainer: repetitions, bounds, refusals, and what never leaves the house."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from rollout.errors import EngineTimeout
from rollout.remote import trainer_client as module
from rollout.remote.failures import RemoteFailure
from rollout.remote.hosts import AllowedHosts
from rollout.remote.trainer_client import TrainerBusy, TrainerClient
from rollout.remote.wire import CompletionRequest, CompletionResponse, RolloutResponse

URL = "http://127.0.0.1:9/base"
ANSWER = {"id": "c", "choices": [{"message": {"role": "assistant", "content": "5"}}]}
REQUEST = CompletionRequest(messages=[{"role": "user", "content": "2+3?"}], rollout_id="r")
DONE = RolloutResponse(rollout_id="r", status="COMPLETED")


class Server:
    """Gives these answers in turn, the last for ever; keeps what it was asked, and how long was slept."""

    def __init__(self, *answers: int | httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.slept: list[float] = []

    def client(self, generation: Any = "A", url: str = URL, hosts: AllowedHosts | None = None) -> TrainerClient:
        return TrainerClient(
            url,
            generation,
            hosts or AllowedHosts(),
            api_key="hush",
            transport=httpx.MockTransport(self._handle),
            sleep=self._sleep,
        )

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer, json=ANSWER) if isinstance(answer, int) else answer


async def failure_of(server: Server, **options: Any) -> RemoteFailure:
    with pytest.raises(RemoteFailure) as caught:
        await server.client(**options).complete(REQUEST)
    assert "hush" not in str(caught.value)
    return caught.value


async def test_a_call_goes_to_the_path_of_its_generation_with_the_key():
    for generation, path in (("A", "/v1/completions"), ("A1", "/v1/chat/completions"), ("B", "/v1/chat/completions")):
        server = Server(200)
        answer = await server.client(generation).complete(REQUEST)
        assert answer.choices[0].message["content"] == "5"
        (request,) = server.requests
        assert str(request.url) == f"http://127.0.0.1:9/base{path}"
        assert request.headers["authorization"] == "Bearer hush" and request.headers["host"] == "127.0.0.1:9"


async def test_the_connection_goes_to_the_address_that_was_checked():
    async def resolve(host: str, port: int) -> list[str]:
        return ["8.8.8.8"]

    server = Server(200)
    hosts = AllowedHosts(["t.example"], resolve=resolve)
    await server.client(url="https://t.example", hosts=hosts).complete(REQUEST)
    (request,) = server.requests
    assert request.url.host == "8.8.8.8" and request.headers["host"] == "t.example"
    assert request.extensions["sni_hostname"] == "t.example"


async def test_an_address_that_is_not_allowed_is_never_called():
    server = Server(200)
    failure = await failure_of(server, url="http://10.0.0.1")
    assert failure.error_category == "validation_error" and server.requests == []


async def test_the_next_address_is_called_where_one_takes_no_connection():
    async def resolve(host: str, port: int) -> list[str]:
        return ["::1", "127.0.0.1"]

    server = Server(httpx.ConnectError(""), 200)
    await server.client(url="http://localhost:9", hosts=AllowedHosts(resolve=resolve)).complete(REQUEST)
    assert [request.url.host for request in server.requests] == ["::1", "127.0.0.1"] and server.slept == []


@pytest.mark.parametrize("trouble", [500, 503, httpx.ReadTimeout(""), httpx.ConnectError("hush")])
async def test_what_may_pass_is_tried_again_three_times(trouble: Any):
    server = Server(trouble, trouble, trouble, 200)
    assert (await server.client().complete(REQUEST)).id == "c"
    assert server.slept == [1.0, 2.0, 4.0]
    server = Server(trouble)
    failure = await failure_of(server)
    assert len(server.requests) == 4
    assert failure.error_category == ("trainer_server_error" if isinstance(trouble, int) else "network_error")


def busy(after: str) -> httpx.Response:
    return httpx.Response(429, headers={"retry-after": after})


async def test_a_trainer_that_says_when_to_come_again_is_waited_for():
    server = Server(busy("7"), busy("100000"), 200)
    await server.client().complete(REQUEST)
    assert server.slept == [7.0, module.CALL_SECONDS]
    server = Server(busy("7"))
    assert (await failure_of(server)).error_category == "rate_limited" and len(server.requests) == 4


@pytest.mark.parametrize("odd", ["", "-1", "nan", "Wed, 21 Oct 2026 07:28:00 GMT", "inf", "1e3"])
async def test_a_429_that_does_not_say_when_is_a_refusal_like_any_other(odd: str):
    server = Server(busy(odd), 200)
    failure = await failure_of(server)
    assert failure.error_category == "rate_limited" and (len(server.requests), server.slept) == (1, [])


@pytest.mark.parametrize("status", [400, 401, 403, 413, 422])
async def test_a_refusal_is_never_tried_again(status: int):
    server = Server(status)
    failure = await failure_of(server)
    assert failure.error_category == "trainer_client_error" and str(status) in str(failure)
    assert len(server.requests) == 1


async def test_redirects_are_not_followed():
    server = Server(httpx.Response(307, headers={"location": "http://10.0.0.1/"}))
    failure = await failure_of(server)
    assert failure.error_category == "trainer_error" and len(server.requests) == 1


@pytest.mark.parametrize("generation", ["A1", "B"])
async def test_only_a_looks_for_the_other_path(generation: str):
    server = Server(404)
    await failure_of(server, generation=generation)
    assert len(server.requests) == 1


async def test_once_a_path_has_answered_it_stays():
    server = Server(200, 404)
    client = server.client()
    await client.complete(REQUEST)
    with pytest.raises(RemoteFailure):
        await client.complete(REQUEST)
    assert {request.url.path for request in server.requests} == {"/base/v1/completions"}


async def test_answers_are_bounded_and_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 1000)
    failure = await failure_of(Server(httpx.Response(200, content=b"x" * 1001)))
    assert "more than 1000 bytes" in str(failure)
    for content in (b"", b"{", b'"secret"', b'{"id": "c"}'):
        failure = await failure_of(Server(httpx.Response(200, content=content)))
        assert failure.error_category == "trainer_error" and "secret" not in str(failure)


async def test_a_compressed_answer_is_refused():
    async def content() -> Any:
        yield b"\x1f\x8b"

    server = Server(httpx.Response(200, headers={"content-encoding": "gzip"}, content=content()))
    assert "compressed" in str(await failure_of(server))


async def test_the_deadline_is_for_all_repetitions_together():
    server = Server(500)
    client = TrainerClient(URL, "A", AllowedHosts(), transport=httpx.MockTransport(server._handle))
    started = asyncio.get_running_loop().time()
    with pytest.raises(EngineTimeout):
        await client.complete(REQUEST, seconds=0.05)
    assert asyncio.get_running_loop().time() - started < 1.0


async def test_the_callback_is_tried_twice_again():
    server = Server(500, 500, 200)
    await server.client("B").completed(DONE)
    assert [request.url.path for request in server.requests] == ["/base/v1/rollout/completed"] * 3
    with pytest.raises(RemoteFailure):
        await Server(500).client("B").completed(DONE)


@pytest.mark.parametrize(("after", "slept"), [("2", [2.0]), ("300", None), ("", None)])
async def test_the_callback_does_not_wait_long_itself(after: str, slept: list[float] | None):
    server = Server(busy(after), 200)
    if slept is not None:
        await server.client("B").completed(DONE)
        assert server.slept == slept
        return
    with pytest.raises(TrainerBusy) as caught:
        await server.client("B").completed(DONE)
    assert caught.value.after == (300.0 if after else None) and server.slept == []


async def test_a_trainer_that_stalls_has_one_deadline_for_all_repetitions_of_the_callback(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(module, "COMPLETED_SECONDS", 0.05)

    async def stall(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        raise AssertionError

    client = TrainerClient(URL, "B", AllowedHosts(), transport=httpx.MockTransport(stall))
    with pytest.raises(RemoteFailure) as caught:
        async with asyncio.timeout(0.5):
            await client.completed(DONE)
    assert caught.value.error_category == "network_error"


async def test_what_no_json_reader_takes_is_not_sent():
    odd = CompletionResponse.model_validate(ANSWER).choices[0].message | {"w": float("nan")}
    server = Server(200)
    with pytest.raises(RemoteFailure, match="JSON") as caught:
        await server.client("B").completed(RolloutResponse(rollout_id="r", status="COMPLETED", final_messages=[odd]))
    assert caught.value.error_category == "internal_error" and server.requests == []
    content = b'{"id": "c", "choices": [{"message": {"role": "assistant", "content": [{"w": 1e999}]}}]}'
    failure = await failure_of(Server(httpx.Response(200, content=content)))
    assert failure.error_category == "trainer_error" and "choices.0" in str(failure)
