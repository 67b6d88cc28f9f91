"""The example's rollout server where things end badly: every accepted rollout still ends with exactly one report."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from aiohttp import web
from pydantic import ValidationError

from examples.remote_rollout import server as example
from examples.remote_rollout.server import InitRequest, Service, Settings, create_app
from tests.conftest import MODEL
from tests.serving import serving

ANSWER: dict[str, Any] = {"role": "assistant", "content": "12"}

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Trainer:
    """Answers model calls as it is told, and keeps reports."""

    def __init__(self, answer: Answer, report: Answer | None = None) -> None:
        """`report`: what comes before a report is taken; None: nothing."""
        self._answer, self._report = answer, report
        self.called = asyncio.Event()
        self.reporting = asyncio.Event()
        self.reports: list[dict[str, Any]] = []
        self.encodings: set[str | None] = set()
        self.url = ""

    async def __aenter__(self) -> Trainer:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/rollout/completed", self._completed)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.encodings.add(request.headers.get("accept-encoding"))
        self.called.set()
        return await self._answer(request)

    async def _completed(self, request: web.Request) -> web.StreamResponse:
        self.reporting.set()
        body = json.loads(await request.read(), parse_constant=pytest.fail)
        if self._report is not None:
            await self._report(request)
        self.reports.append(body)
        return web.json_response({})

    def order(self, **fields: Any) -> InitRequest:
        """A rollout of generation B."""
        question = [{"role": "user", "content": "What is 3 times 4?"}]
        given = {"rollout_id": "r", "server_url": self.url, "messages": question, "completion_params": {}}
        return InitRequest.model_validate_json(json.dumps({**given, **fields}))

    async def played(self, service: Service, **fields: Any) -> dict[str, Any]:
        """The one report of a rollout."""
        async with asyncio.timeout(20):
            content = await service.begin("r", self.order(**fields))
        (report,) = self.reports
        assert json.loads(content) == report and (service.active, service.completed) == (0, 1)
        return report


def says(message: dict[str, Any]) -> Answer:
    async def answer(_request: web.Request) -> web.StreamResponse:
        body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}
        return web.Response(text=json.dumps(body), content_type="application/json")

    return answer


async def never(_request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError


async def a_while(_request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(0.3)
    return web.Response()


@pytest.fixture
def service() -> Service:
    return Service(Settings(max_running=1))


def failed_with(report: dict[str, Any]) -> tuple[Any, ...]:
    return report["status"], report["finish_reason"], report["reward"], report["extra_fields"]["error_category"]


INTERNAL = ("ERROR", "error", None, "internal_error")


async def test_a_report_that_is_under_way_outlives_the_shutdown(service: Service):
    async with Trainer(says(ANSWER), a_while) as trainer:
        task = service.begin("r", trainer.order())
        await asyncio.wait_for(trainer.reporting.wait(), 20)
        await service.close()
        assert task.done()
    assert [(report["status"], report["finish_reason"]) for report in trainer.reports] == [("COMPLETED", "stop")]


async def test_rollouts_that_play_wait_or_have_not_begun_report_the_shutdown(service: Service):
    async with Trainer(never) as trainer:
        service.begin("one", trainer.order(rollout_id="plays"))
        await asyncio.wait_for(trainer.called.wait(), 20)
        service.begin("two", trainer.order(rollout_id="waits"))
        await asyncio.sleep(0)
        service.begin("three", trainer.order(rollout_id="new"))
        await service.close()
    assert {report["rollout_id"] for report in trainer.reports} == {"plays", "waits", "new"}
    assert [failed_with(report) for report in trainer.reports] == [INTERNAL] * 3
    assert "shutting down" in trainer.reports[0]["error_message"]
    assert (service.active, service.completed) == (0, 3)


def broken(_messages: Sequence[Any], _metadata: Any) -> float:
    raise RuntimeError("a secret of ours")


@pytest.mark.parametrize(
    ("reward", "kind"),
    [
        (broken, "RuntimeError"),
        (lambda *_: float("nan"), "ValueError"),
        (lambda *_: float("inf"), "ValueError"),
        (lambda *_: "much", "TypeError"),
    ],
    ids=["raises", "nan", "infinite", "text"],
)
async def test_a_reward_that_fails_is_an_error_and_reported(
    service: Service, monkeypatch: pytest.MonkeyPatch, reward: Any, kind: str
):
    monkeypatch.setattr(example, "reward_of", reward)
    async with Trainer(says(ANSWER)) as trainer:
        report = await trainer.played(service)
    assert failed_with(report) == INTERNAL
    assert report["error_message"] == f"the reward could not be computed ({kind})"
    assert report["final_messages"][-1] == ANSWER and report["metrics"]["num_llm_calls"] == 1


async def test_a_conversation_that_no_json_can_hold_is_left_out_of_the_report(service: Service):
    async with Trainer(says({**ANSWER, "odd": float("nan")})) as trainer:
        report = await trainer.played(service)
    assert failed_with(report) == INTERNAL and report["final_messages"] == []
    assert report["metrics"]["num_llm_calls"] == 1


async def test_half_a_surrogate_pair_goes_back_as_it_came(service: Service):
    async with Trainer(says({**ANSWER, "content": "\ud83d 12"})) as trainer:
        report = await trainer.played(service)
    assert report["status"] == "COMPLETED" and report["final_messages"][-1]["content"] == "\ud83d 12"


@pytest.mark.parametrize(
    "tokens",
    [-1, 2**31, float("inf"), "many", 10**4200],
    ids=["negative", "too many", "infinite", "text", "a number of 4,200 digits"],
)
async def test_counts_that_are_none_are_the_trainers_error(service: Service, tokens: Any):
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(text=json.dumps({"choices": [{"message": ANSWER}], "usage": {"prompt_tokens": tokens}}))

    async with Trainer(answer) as trainer:
        report = await trainer.played(service)
    assert failed_with(report) == ("ERROR", "error", None, "trainer_error")


async def test_a_trainer_that_cannot_be_called_ends_its_rollout_all_the_same(service: Service):
    async with Trainer(says(ANSWER)) as trainer:
        with pytest.raises(ValidationError, match="server_url"):
            trainer.order(server_url="http://127.0.0.1:99999")
        for key, fields in (("a", {"server_url": "http://127.0.0.1:9/\x7f"}), ("b", {"api_key": "schlüssel"})):
            report = json.loads(await service.begin(key, trainer.order(**fields)))
            assert failed_with(report) == ("ERROR", "error", None, "validation_error")
    assert (service.active, service.completed) == (0, 2)


async def test_a_compressed_answer_is_refused_unread(service: Service):
    """A few hundred bytes that become megabytes: they must not be unpacked before their size is known."""
    packed = gzip.compress(gzip.compress(bytes(2**24)))

    async def bomb(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=packed, headers={"content-encoding": "gzip, gzip"})

    async with Trainer(bomb) as trainer:
        report = await trainer.played(service)
    assert failed_with(report) == ("ERROR", "error", None, "trainer_error")
    assert "compressed" in report["error_message"] and trainer.encodings == {"identity"}


async def test_generation_a_answers_200_whatever_the_conversation_holds():
    import httpx

    async with (
        Trainer(says({**ANSWER, "content": "\ud83d", "odd": float("nan")})) as trainer,
        serving(create_app(Settings(tokenizer=str(MODEL)))) as url,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        body = {"rollout_id": "r", "server_url": trainer.url, "messages": [{"role": "user", "content": "?"}]}
        answer = await http.post(f"{url}/rollout", json=body, timeout=20)
    assert answer.status_code == 200
    assert answer.json()["status"] == "ERROR" and "reward" not in answer.json()
