"""The engine deployment's own work: lanes on the replica's side, and vLLM's types to ours and back.

vLLM's AsyncLLM is a double here (named so); tests/integration has the real one.
"""

from __future__ import annotations

import asyncio
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput, WeightVersionSpan
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from deployments.app import EngineSpec, _placement
from deployments.engine import RolloutEngine, to_generation, to_sampling_params
from rollout.engine import GenerateRequest, VersionSpan
from rollout.errors import EngineDied, EngineError, EngineRefused
from rollout.sampling import Sampling


def output(ids: list[int], logprobs: list[float] | None = None, **fields: Any) -> RequestOutput:
    """What vLLM's AsyncLLM yields last, with flat log-probabilities."""
    values = [-0.25] * len(ids) if logprobs is None else logprobs
    flat = FlatLogprobs()
    for token, value in zip(ids, values, strict=False):
        flat.append_fast([token], [value], iter([1]), [None])
    completion = CompletionOutput(
        index=0,
        text="",
        token_ids=ids,
        cumulative_logprob=None,
        logprobs=flat,
        finish_reason=fields.pop("finish_reason", "stop"),
        weight_versions=fields.pop("versions", [WeightVersionSpan("3", 0, len(ids))]),
    )
    return RequestOutput("r", None, [1], None, [completion], True, num_cached_tokens=5, **fields)


class FakeAsyncLLM:
    """A TEST DOUBLE of vLLM's AsyncLLM: answers `outcome` once `release` is set."""

    def __init__(self) -> None:
        self.outcome: Any = output([7, 8])
        self.release = asyncio.Event()
        self.release.set()
        self.started: list[Any] = []
        self.cancelled = 0

    async def generate(self, prompt: Any, params: Any, request_id: str, lora_request: Any = None) -> Any:
        self.started.append((prompt, params, request_id))
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(self.outcome, Exception):
            raise self.outcome
        yield self.outcome


@pytest.fixture
async def replica() -> RolloutEngine:
    engine = RolloutEngine.__new__(RolloutEngine)
    engine._mailboxes, engine._in_flight, engine._version = {}, 0, 3
    engine._updater = SimpleNamespace(lora=None, broken=None)
    engine.engine = SimpleNamespace(client=FakeAsyncLLM())
    return engine


def requests(*names: str) -> list[GenerateRequest]:
    return [GenerateRequest(name, array("i", [1, 2, 3]), {"max_tokens": 4}) for name in names]


async def take(stream: Any, count: int) -> list[Any]:
    """Answers of a lane until there are `count`."""
    answers: list[Any] = []
    async with asyncio.timeout(5):
        while len(answers) < count:
            answers += (await anext(stream)).answers
    return answers


async def test_answers_of_one_lane_travel_together(replica):
    stream = replica.results("lane")
    await replica.submit("lane", requests("a", "b"))
    answers = dict(await take(stream, 2))
    assert answers.keys() == {"a", "b"}
    assert answers["a"].token_ids.tolist() == [7, 8]
    assert answers["a"].versions == [VersionSpan(3, 0, 2)]
    await stream.aclose()


async def test_the_engine_gets_ids_and_the_version_as_salt(replica):
    stream = replica.results("lane")
    await replica.submit("lane", requests("a"))
    await take(stream, 1)
    prompt, params, request_id = replica._client.started[0]
    assert (prompt["prompt_token_ids"], prompt["cache_salt"], request_id) == ([1, 2, 3], "3", "a")
    assert params.max_tokens == 4
    await stream.aclose()


async def test_lanes_do_not_mix(replica):
    first, second = replica.results("one"), replica.results("two")
    await replica.submit("one", requests("a"))
    await replica.submit("two", requests("b"))
    assert [name for name, _ in await take(first, 1)] == ["a"]
    assert [name for name, _ in await take(second, 1)] == ["b"]
    await first.aclose()
    await second.aclose()


async def test_a_second_listener_is_refused(replica):
    stream = replica.results("lane")
    await replica.submit("lane", requests("a"))
    await take(stream, 1)
    with pytest.raises(EngineError, match="has a listener already"):
        await anext(replica.results("lane"))
    await stream.aclose()


async def test_cancel_stops_the_engine_and_answers_nothing(replica):
    replica._client.release.clear()
    stream = replica.results("lane")
    await replica.submit("lane", requests("a", "b"))
    await asyncio.sleep(0.01)
    await replica.cancel("lane", ["a", "unknown"])
    await asyncio.sleep(0.01)
    assert replica._client.cancelled == 1
    replica._client.release.set()
    assert [name for name, _ in await take(stream, 1)] == ["b"]
    assert replica._in_flight == 0
    await stream.aclose()


async def test_a_listener_that_goes_leaves_no_work(replica):
    replica._client.release.clear()
    stream = replica.results("lane")
    await replica.submit("lane", requests("a", "b"))
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.sleep(0.01)
    assert replica._client.cancelled == 2
    assert replica._mailboxes == {}


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (EngineDeadError(), EngineDied),
        (ValueError("max_tokens must be at least 1"), EngineRefused),
        (RuntimeError("odd"), EngineError),
    ],
)
async def test_failures_are_answers(replica, raised, kind):
    replica._client.outcome = raised
    stream = replica.results("lane")
    await replica.submit("lane", requests("a"))
    ((_, answer),) = await take(stream, 1)
    assert type(answer) is kind
    await stream.aclose()


def test_versions_of_a_request_that_lived_through_an_update():
    spans = [WeightVersionSpan("6", 0, 1), WeightVersionSpan("7", 1, 3)]
    generation = to_generation(output([7, 8, 9], versions=spans))
    assert generation.versions == [VersionSpan(6, 0, 1), VersionSpan(7, 1, 3)]
    assert generation.cached_tokens == 5
    assert generation.logprobs.tolist() == [-0.25] * 3


def test_an_answer_without_all_its_logprobs_is_an_error():
    with pytest.raises(EngineError, match="2 sampled tokens came with 1 log-probabilities"):
        to_generation(output([7, 8], logprobs=[-0.1]))


def test_sampling_parameters_ask_for_the_final_output_and_the_sampled_tokens_logprob():
    params = to_sampling_params(Sampling(temperature=0.5, top_k=3, max_tokens=9).to_vllm())
    assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 3, 9)
    assert (params.logprobs, params.flat_logprobs, params.detokenize) == (0, True, False)
    assert params.output_kind is RequestOutputKind.FINAL_ONLY
    assert to_sampling_params(Sampling(stop=["END"]).to_vllm()).detokenize is True


def test_structured_outputs_reach_vllm():
    sampling = Sampling(structured_outputs={"json_schema": {"type": "object"}})
    assert to_sampling_params(sampling.to_vllm()).structured_outputs.json == {"type": "object"}


@pytest.mark.parametrize("name", sorted(set(Sampling.model_fields) - {"seed", "structured_outputs"}))
def test_every_sampling_field_is_one_of_vllms(name):
    from vllm import SamplingParams

    assert hasattr(SamplingParams(), name)


def test_tensor_parallel_ranks_of_a_gpu_engine_stay_on_one_node():
    spec = EngineSpec("m", "m", {"tensor_parallel_size": 4}, {}, "gpu")
    assert _placement(spec) == {"bundle_per_worker": {"GPU": 1, "CPU": 1}, "strategy": "STRICT_PACK"}
    over_nodes = EngineSpec("m", "m", {"tensor_parallel_size": 8, "pipeline_parallel_size": 2}, {}, "gpu")
    assert _placement(over_nodes) is None
    assert _placement(EngineSpec("m", "m", {}, {}, "cpu")) is None
