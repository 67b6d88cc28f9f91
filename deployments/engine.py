"""The engine deployment: Ray Serve LLM's server with a rollout path beside its OpenAI surface.

Invariant: the rollout path takes token ids and returns the ids that were sampled, each with the log-probability
under the distribution that it was sampled from and the version of the weights that sampled it, or an exception;
never text. A replica counts as ready only after it has generated once: the first request costs 3 to 5 s more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm.deployment import LLMServer

from actors.engine_client import EngineInfo
from actors.lanes import Answer
from actors.loading_board import BoardReporter
from actors.ray_backend import RayBackend
from deployments import rank_loading
from deployments.download import DownloadProgress, NoSafetensors, Progress, engine_download
from deployments.openai_server import OpenAIServer, ServingSpec
from deployments.replica_loading import ReplicaLoading, with_progress
from deployments.replica_weights import ReplicaUpdater
from deployments.served_client import serve_policy
from rollout import logs
from rollout.engine import FINISH_REASONS, GenerateRequest, Generation, VersionSpan
from rollout.errors import EngineDied, EngineError, EngineRefused
from rollout.logs import LogSettings
from rollout.weights import CheckpointSource, LoraSource, ReplicaWeights, WeightSource

logger = logging.getLogger(__name__)

# Answers that finish within this time travel together.
DRAIN_S = 0.003
# A lane without traffic still says so often how loaded the replica is.
REPORT_S = 1.0
# Deadline of the first generation, compilation of CPU kernels included.
WARMUP_TIMEOUT_S = 300.0
# A starting replica waits so long for a controller that is being started again.
CONTROLLER_SECONDS = 120.0
CONTROLLER_CALL_SECONDS = 10.0


class RolloutVLLMEngine(VLLMEngine):
    """Ray's vLLM engine with its client in reach: the rollout path talks to vLLM's AsyncLLM itself."""

    @property
    def client(self) -> Any:
        """vLLM's AsyncLLM."""
        return self._engine_client


@dataclass(slots=True)
class ResultBatch:
    """One message of a lane's results stream (actors.lanes.Batch)."""

    answers: list[Answer]
    in_flight: int
    """Requests that this replica holds, of all lanes."""
    version: int


@dataclass(slots=True)
class _Mailbox:
    """The replica's end of one lane."""

    answers: list[Answer] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    listening: bool = False


class RolloutEngine(LLMServer):
    """LLMServer plus `submit`, `results`, `cancel` (lanes) and `describe`."""

    _default_engine_cls = RolloutVLLMEngine

    async def __init__(  # type: ignore[misc]
        self,
        llm_config: Any,
        *,
        warmup: bool = True,
        controller: str | None = None,
        serving: ServingSpec | None = None,
        loading_board: str | None = None,
        log_settings: LogSettings | None = None,
    ) -> None:
        """Fetch the model, start the engine, load the current weights, and generate once.

        Raises DownloadError, and what vLLM raises.

        `controller`: "namespace/name" of the actor that knows the current weights; None: those of the model.
        `serving`, `loading_board`, `log_settings`: see EngineSpec.
        """
        logs.install(log_settings, "engine", _replica_name())
        self._mailboxes: dict[str, _Mailbox] = {}
        self._in_flight = 0
        self._version = 0
        self._server: OpenAIServer | None = None
        # Asked first: the reporter changes the arguments that it is made of.
        fetch = engine_download(_model(llm_config), llm_config.engine_kwargs)
        self._loading = _reporter(llm_config, loading_board)
        self._telling = _metrics_told()
        try:
            self._fetched = await _fetch(fetch, self._loading)
            # Serve asks its own logger for its file when its controller was started again, and stops each replica
            # that cannot say: one death of that controller would end all engines.
            with logs.kept_handlers("ray.serve"):
                await super().__init__(llm_config)
            # The engine's own label must be a number from the first token on; vLLM calls it "default".
            await self._client.update_weight_version(str(self._version))
            self._updater = ReplicaUpdater(
                _replica_name(), self._client, self._served(), self._set_version, _adapters(llm_config.engine_kwargs)
            )
            if controller is not None:
                await self._catch_up(controller)
            if warmup:
                await self._warm_up()
            if serving is not None:
                serve_policy(self._client, lambda: self._version, lambda: self._updater.lora)
                namespace = (controller or "").partition("/")[0]
                self._server = OpenAIServer(
                    await self.engine.build_asgi_app(), serving, RayBackend(namespace), lambda: self._version
                )
                await self._server.start()
        except BaseException as failure:
            if self._loading is not None:
                self._loading.error(failure)
            raise
        if self._loading is not None:
            self._loading.ready()

    @property
    def _client(self) -> Any:
        return self.engine.client

    async def describe(self) -> EngineInfo:
        """What this replica runs."""
        config = self._client.vllm_config
        return EngineInfo(
            model=config.model_config.model,
            max_model_len=config.model_config.max_model_len,
            tensor_parallel_size=config.parallel_config.tensor_parallel_size,
            version=self._version,
            address=self._server.address if self._server is not None else "",
        )

    async def check_health(self) -> None:
        """Serve asks every few seconds, and replaces a replica for which this raises. Raises EngineDied."""
        try:
            await super().check_health()
        except Exception as failure:
            # Never vLLM's own: Serve's controller would import vLLM to read it, and stand still for 10 to 40 s with
            # 450 MiB more, while no replica of any deployment is looked after.
            raise EngineDied(f"{type(failure).__name__}: {failure}") from None
        if self._updater.broken is not None:
            raise EngineDied(self._updater.broken)

    async def __del__(self) -> None:
        """Serve awaits this before it ends the replica on purpose, and counts no HTTP: its streams may end first."""
        try:
            if (server := getattr(self, "_server", None)) is not None:
                await server.stop()
        finally:
            await super().__del__()

    # Weights

    async def check_weights(self, source: WeightSource) -> None:
        """Raises WeightsRefused for weights that cannot be loaded here. Changes nothing."""
        await self._updater.check(source)

    async def update_weights(self, source: WeightSource, version: int) -> ReplicaWeights:
        """Freeze, load, read back on every rank, go on. Raises WeightsRefused, EngineError."""
        return await self._updater.apply(source, version)

    async def weights(self) -> ReplicaWeights:
        """What every rank carries, read back now."""
        return await self._updater.current()

    async def give_up(self) -> None:
        """Let Serve replace this replica: it cannot be brought to the current weights."""
        self._updater.broken = self._updater.broken or "it could not be brought to the current weights"

    def _set_version(self, version: int) -> None:
        self._version = version

    def _served(self) -> Path:
        """The directory of the model's own checkpoint; hub models are in the local cache once they are loaded."""
        model = self._client.vllm_config.model_config.model
        if Path(model).is_dir():
            return Path(model)
        if self._fetched is not None:
            return self._fetched
        from huggingface_hub import snapshot_download

        revision = self._client.vllm_config.model_config.revision
        return Path(snapshot_download(model, revision=revision, local_files_only=True))

    async def _catch_up(self, controller: str) -> None:
        """Load what the cluster serves now, before this replica counts as ready."""
        import ray

        namespace, _, name = controller.partition("/")
        deadline = asyncio.get_running_loop().time() + CONTROLLER_SECONDS
        while True:
            try:
                handle = ray.get_actor(name, namespace)
                async with asyncio.timeout(CONTROLLER_CALL_SECONDS):
                    version, source = await handle.current_weights.remote()
                break
            except (ValueError, TimeoutError, ray.exceptions.RayError) as failure:
                # It may be on its way back.
                if asyncio.get_running_loop().time() > deadline:
                    raise EngineError(
                        f"the controller does not say which weights are current: {failure}"
                    ) from failure
                await asyncio.sleep(1.0)
        if version > 0 and isinstance(source, CheckpointSource | LoraSource):
            await self._updater.apply(source, version)
            logger.info("caught up with version %d", version)

    # Lanes

    async def submit(self, lane_id: str, requests: Sequence[GenerateRequest]) -> None:
        """Start generations; their answers come over `results(lane_id)`."""
        mailbox = self._mailboxes.setdefault(lane_id, _Mailbox())
        for request in requests:
            mailbox.tasks[request.request_id] = asyncio.create_task(self._serve(mailbox, request))

    async def cancel(self, lane_id: str, request_ids: Sequence[str]) -> None:
        """Stop generations; nothing is answered for them."""
        mailbox = self._mailboxes.get(lane_id)
        if mailbox is None:
            return
        for request_id in request_ids:
            task = mailbox.tasks.pop(request_id, None)
            if task is not None:
                task.cancel()

    async def results(self, lane_id: str) -> AsyncIterator[ResultBatch]:
        """The answers of a lane as they finish, in batches, for as long as the caller listens.

        When it stops listening, what the lane still holds is cancelled: a worker that died leaves no work behind.
        """
        mailbox = self._mailboxes.setdefault(lane_id, _Mailbox())
        if mailbox.listening:
            raise EngineError(f"lane {lane_id!r} has a listener already; lane ids must be unique")
        mailbox.listening = True
        try:
            while True:
                try:
                    async with asyncio.timeout(REPORT_S):
                        await mailbox.ready.wait()
                    if mailbox.tasks:
                        # Others of this lane are still at work; some may finish at once. None: nothing to wait for.
                        await asyncio.sleep(DRAIN_S)
                except TimeoutError:
                    pass
                mailbox.ready.clear()
                answers, mailbox.answers = mailbox.answers, []
                yield ResultBatch(answers, self._in_flight, self._version)
        finally:
            self._mailboxes.pop(lane_id, None)
            for task in mailbox.tasks.values():
                task.cancel()

    async def _serve(self, mailbox: _Mailbox, request: GenerateRequest) -> None:
        self._in_flight += 1
        outcome: Generation | Exception
        try:
            outcome = await self._generate(request)
        except asyncio.CancelledError:
            return
        except EngineError as failure:
            outcome = failure
        except Exception as failure:
            outcome = EngineError(f"{type(failure).__name__}: {failure}")
        finally:
            self._in_flight -= 1
            mailbox.tasks.pop(request.request_id, None)
        mailbox.answers.append((request.request_id, outcome))
        mailbox.ready.set()

    async def _generate(self, request: GenerateRequest) -> Generation:
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            params = to_sampling_params(request.sampling)
            # Keys computed under other weights must never be found again: the version salts the prefix cache.
            prompt = tokens_input(request.prompt_ids.tolist(), cache_salt=str(self._version))
            final = None
            stream = self._client.generate(prompt, params, request.request_id, lora_request=self._updater.lora)
            async for output in stream:
                final = output
        except EngineDeadError as failure:
            raise EngineDied(f"the engine of this replica is dead: {failure}") from None
        except (ValueError, TypeError) as failure:
            raise EngineRefused(str(failure)) from None
        if final is None:
            raise EngineError("the engine ended a request without an output")
        return to_generation(final)

    async def _warm_up(self) -> None:
        started = time.perf_counter()
        request = GenerateRequest("warm-up", array("i", [1, 2, 3, 4]), {"max_tokens": 4, "ignore_eos": True})
        async with asyncio.timeout(WARMUP_TIMEOUT_S):
            await self._generate(request)
        logger.info("warm after %.1f s", time.perf_counter() - started)


def _metrics_told() -> asyncio.Task[None]:
    # vLLM takes seconds to import, and whoever deploys this class has no use for it.
    from deployments import engine_metrics

    return engine_metrics.start()


def _reporter(llm_config: Any, board: str | None) -> ReplicaLoading | None:
    """Who tells the board how loading goes; vLLM's arguments are made to write it down. None without a board."""
    if board is None:
        return None
    arguments = llm_config.engine_kwargs
    ranks = int(arguments.get("tensor_parallel_size", 1)) * int(arguments.get("pipeline_parallel_size", 1))
    reporter = ReplicaLoading(_replica_name(), BoardReporter(board), ranks=ranks)
    changed = with_progress(arguments, _model(llm_config), reporter.directory)
    # What has changed alone, and through its own method: Ray has sorted the arguments into others already.
    llm_config.update_engine_kwargs(**{key: v for key, v in changed.items() if arguments.get(key) != v})
    rank_loading.register()
    reporter.start()
    return reporter


async def _fetch(fetch: Callable[[Progress], Path] | None, loading: ReplicaLoading | None) -> Path | None:
    """Bring a hub model to this machine, where vLLM will find it, and say how far it is. Raises DownloadError.

    vLLM would do it too, and say nothing. None: there is nothing to fetch, or what there is vLLM must fetch itself.
    """
    if fetch is None:
        return None

    def told(far: DownloadProgress) -> None:
        if loading is not None:
            loading.downloading(far.bytes_downloaded, far.bytes_total, far.speed_mbps)

    try:
        return await asyncio.to_thread(fetch, told)
    except NoSafetensors as failure:
        # vLLM reads pickles too, where there is nothing better.
        logger.warning("%s; vLLM is left to find others", failure)
        return None


def _model(llm_config: Any) -> str:
    """Directory, hub name or URL."""
    return str(llm_config.model_loading_config.model_source or llm_config.model_id)


def _adapters(engine_kwargs: Mapping[str, Any]) -> int:
    """How many adapters vLLM serves beside the policy."""
    return sum(len(engine_kwargs.get(name) or ()) for name in ("lora_modules", "default_mm_loras"))


def _replica_name() -> str:
    """Serve's id of this replica; empty outside Serve."""
    from ray import serve

    try:
        return serve.get_replica_context().replica_id.unique_id
    except Exception:
        return ""


def to_sampling_params(sampling: dict[str, Any]) -> Any:
    """vLLM's SamplingParams for a rollout: final output only, the sampled token's log-probability, no text."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    kwargs = dict(sampling)
    constraint = kwargs.pop("structured_outputs", None)
    if constraint is not None:
        kwargs["structured_outputs"] = StructuredOutputsParams(**constraint)
    return SamplingParams(
        **kwargs,
        logprobs=0,
        flat_logprobs=True,
        # Stop strings are found in text, so only they pay for making it.
        detokenize=bool(kwargs.get("stop") or kwargs.get("bad_words")),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def to_generation(output: Any) -> Generation:
    """vLLM's RequestOutput as a Generation. Raises EngineError where it is not whole, or the request has failed.

    Log-probabilities come flat: one entry a position, the sampled token's, since `logprobs=0` asks for no others.
    """
    completion = output.outputs[0]
    if completion.finish_reason not in FINISH_REASONS:
        # vLLM says "error" of a request that failed inside, such as a grammar that does not compile.
        raise EngineError(
            f"the engine ended the request with {completion.finish_reason!r}; its log says more (a schema or grammar "
            "that cannot be compiled, for example)"
        )
    ids = completion.token_ids
    flat = completion.logprobs
    values = [] if flat is None else flat.logprobs
    if len(values) != len(ids) or (flat is not None and list(flat.token_ids) != list(ids)):
        raise EngineError(f"{len(ids)} sampled tokens came with {len(values)} log-probabilities")
    spans = completion.weight_versions or []
    stats = output.metrics
    generation = Generation(
        token_ids=array("i", ids),
        logprobs=array("f", values),
        versions=[VersionSpan(int(span.version), span.start, span.end) for span in spans],
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        cached_tokens=output.num_cached_tokens or 0,
    )
    if stats is not None and stats.scheduled_ts:
        generation.queue_s = max(0.0, stats.scheduled_ts - stats.queued_ts)
        generation.decode_s = max(0.0, stats.last_token_ts - stats.scheduled_ts)
    return generation
