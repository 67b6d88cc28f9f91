"""The engine deployment's own work: lanes on the replica's side, and vLLM's types to ours and back.

vLLM's AsyncLLM is a double here (named so); tests/integration has the real one.
"""

from __future__ import annotations

import asyncio
import pickle
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors
from ray.serve.llm.deployment import LLMServer
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput, WeightVersionSpan
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from deployments import download as download_room
from deployments import engine as engine_room
from deployments.app import GRACEFUL_SHUTDOWN_S, EngineSpec, _failures_allowed, _placement
from deployments.download import DownloadError
from deployments.engine import RolloutEngine, to_generation, to_sampling_params
from deployments.openai_server import DRAIN_SECONDS
from rollout.engine import GenerateRequest, VersionSpan
from rollout.errors import EngineDied, EngineError, EngineRefused
from rollout.sampling import Sampling
from tests.deployments.test_download import TOTAL, FakeHub, whole


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


@pytest.mark.parametrize("reason", ["error", "repetition", None])
def test_a_request_that_failed_in_the_engine_is_no_generation(reason: str | None):
    """vLLM answers a grammar that does not compile like this, with or without tokens."""
    for ids in ([], [7, 8]):
        with pytest.raises(EngineError, match=f"ended the request with {reason!r}"):
            to_generation(output(ids, finish_reason=reason))


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


@pytest.mark.parametrize(("replicas", "attempts", "allowed"), [(1, 2, 2), (8, 2, 16), (8, 1, 8)])
def test_failed_starts_are_allowed_to_each_replica_of_those_that_serve_counts_together(
    replicas: int, attempts: int, allowed: int
):
    spec = EngineSpec("m", "m", {}, {}, "cpu", replicas=replicas, start_attempts=attempts)
    assert _failures_allowed(spec) == allowed
    from ray.serve._private.constants import MAX_PER_REPLICA_RETRY_COUNT

    assert MAX_PER_REPLICA_RETRY_COUNT == 3, "engine.start_attempts tells of Serve's own bound"


# The model's way to this machine


class Board:
    """A TEST DOUBLE of the loading board, which hears of everything at once."""

    def __init__(self) -> None:
        self.told: list[list[dict[str, Any]]] = []

    def __call__(self, replica: str, events: list[dict[str, Any]]) -> None:
        self.told.append(events)

    def of(self, stage: str) -> list[dict[str, Any]]:
        """The events of one stage, in order."""
        return [event for events in self.told for event in events if event["stage"] == stage]


class Reached(Exception):
    """Ray and vLLM would begin now."""


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    made = Board()
    monkeypatch.setattr(engine_room, "BoardReporter", lambda namespace: made)
    return made


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub(tmp_path)
    monkeypatch.setattr(download_room, "TELL_EVERY_S", 0.0)
    monkeypatch.setattr("huggingface_hub.snapshot_download", made)
    return made


async def test_a_dead_engine_is_told_without_an_exception_of_vllm(replica: RolloutEngine):
    """Serve's controller reads it, and would import vLLM for that."""

    class Dead:
        async def check_health(self) -> None:
            raise EngineDeadError()

    replica.engine = Dead()
    with pytest.raises(EngineDied, match=r"^EngineDeadError: EngineCore encountered an issue") as told:
        await replica.check_health()
    assert b"vllm" not in pickle.dumps(told.value)


async def start(model: str, **engine_kwargs: Any) -> RolloutEngine:
    """A replica up to where Ray's engine would start. Raises what stops it before."""

    async def begin(*_: Any) -> None:
        raise Reached

    config = SimpleNamespace(
        engine_kwargs=engine_kwargs,
        model_id="tiny",
        model_loading_config=SimpleNamespace(model_source=model),
        update_engine_kwargs=lambda **changed: engine_kwargs.update(changed),
    )
    replica = RolloutEngine.__new__(RolloutEngine)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LLMServer, "__init__", begin)
        try:
            await replica.__init__(config, loading_board="demo")  # type: ignore[misc]
        except Reached:
            return replica
        finally:
            assert replica._loading is not None
            replica._loading.close()
    raise AssertionError("it went on without Ray")


async def test_a_hub_model_is_fetched_first_and_the_board_is_told_how_far_it_is(hub: FakeHub, board: Board):
    replica = await start("org/tiny", revision="v1", load_format="safetensors")
    figures = [(event["bytes_downloaded"], event["bytes_total"]) for event in board.of("downloading")]
    assert figures == sorted(figures) and figures[0][0] < TOTAL and figures[-1] == (TOTAL, TOTAL)
    assert all(call["model"] == "org/tiny" and call["revision"] == "v1" for call in hub.calls)
    assert [call["dry_run"] for call in hub.calls] == [True, False]
    assert replica._fetched == hub.directory
    for pattern in ("*.safetensors", "*.json", "*.jinja"):
        assert pattern in hub.calls[-1]["allow_patterns"], "weights, tokenizer and template"


async def test_a_machine_without_the_hub_starts_with_the_copy_that_it_has(hub: FakeHub, board: Board):
    hub.offline = True
    whole(hub.directory)
    await start("org/tiny")
    assert board.of("downloading")[-1]["bytes_downloaded"] == TOTAL and board.of("error") == [board.told[-1][-1]]
    assert "Reached" in board.told[-1][-1]["message"], "it came as far as Ray's engine"


async def test_a_download_that_fails_is_an_error_in_its_own_words(hub: FakeHub, board: Board):
    hub.failure = errors.OfflineModeIsEnabled("no")
    with pytest.raises(DownloadError, match="the hub cannot be reached"):
        await start("org/tiny")
    (error,) = board.of("error")
    assert "org/tiny" in error["message"] and "HF_HUB_OFFLINE" in error["message"]


async def test_a_model_without_safetensors_is_left_to_vllm(hub: FakeHub, board: Board):
    hub.offline = True
    (hub.directory / "model.bin").touch()
    assert (await start("org/tiny"))._fetched is None


async def test_a_directory_is_not_fetched(hub: FakeHub, board: Board):
    replica = await start(str(hub.directory))
    assert (hub.calls, board.of("downloading"), replica._fetched) == ([], [], None)


def test_adapters_that_vllm_serves_are_counted():
    assert engine_room._adapters({}) == engine_room._adapters({"lora_modules": None}) == 0
    served = [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b"}]
    assert engine_room._adapters({"lora_modules": served, "default_mm_loras": {"audio": "/c"}}) == 3


class Ending:
    """A TEST DOUBLE of a part that is to end; writes down that it did."""

    def __init__(self, said: list[str], name: str, failure: Exception | None = None) -> None:
        self.said, self.name, self.failure = said, name, failure

    async def stop(self) -> None:
        self.said.append(self.name)
        if self.failure is not None:
            raise self.failure

    shutdown = stop


async def test_a_replica_that_is_told_to_stop_lets_http_end_before_its_engine(replica):
    said: list[str] = []
    replica._server, replica.engine = Ending(said, "http"), Ending(said, "engine")
    await replica.__del__()
    assert said == ["http", "engine"]


async def test_an_engine_ends_whatever_became_of_http_and_of_its_start(replica):
    said: list[str] = []
    replica._server, replica.engine = Ending(said, "http", OSError("gone")), Ending(said, "engine")
    with pytest.raises(OSError, match="gone"):
        await replica.__del__()
    assert said == ["http", "engine"]
    replica._server = None
    await replica.__del__()
    # Its start has failed before there was anything.
    await RolloutEngine.__new__(RolloutEngine).__del__()
    assert said == ["http", "engine", "engine"]


def test_serve_waits_longer_for_a_replica_than_its_http_takes_to_end():
    """Serve looks at lanes every two seconds, twice if need be, and kills what is not through by then."""
    from ray.serve._private.constants import DEFAULT_GRACEFUL_SHUTDOWN_WAIT_LOOP_S

    assert GRACEFUL_SHUTDOWN_S > DRAIN_SECONDS + 2 * DEFAULT_GRACEFUL_SHUTDOWN_WAIT_LOOP_S
