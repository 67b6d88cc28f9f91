"""New weights in one engine replica: freeze, load, read back on every rank, go on.

Invariant: a replica generates with weights that were read back on every rank, or not at all. If an update fails after
the loading has begun, the weights from before are loaded again and read back; if that fails too, the replica declares
itself broken and Serve replaces it. Requests in flight are frozen and go on: later tokens carry the new version.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments.checkpoint import check_checkpoint, content_digest
from rollout.errors import EngineError, WeightsRefused
from rollout.weights import (
    CheckpointSource,
    LoraSource,
    RankWeights,
    ReplicaWeights,
    TransferSource,
    WeightSource,
)

logger = logging.getLogger(__name__)

# Deadlines of the steps, in seconds.
PAUSE_SECONDS = 60.0
LOAD_SECONDS = 900.0
READ_SECONDS = 300.0
# The one adapter that rollouts use; a new one takes its place. vLLM counts the adapters that it serves itself from 1,
# and keeps ids in arrays of 32 bits: its count never reaches their largest number.
LORA_ID = 2**31 - 1
# vLLM takes two adapters of one batch for the same where their names are equal; no served one is called like this.
LORA_NAME = "policy of the rollouts: {}"


class ReplicaUpdater:
    """Keeps the weights of one replica. `client` is vLLM's AsyncLLM."""

    def __init__(
        self, replica: str, client: Any, served: Path, on_version: Callable[[int], None], adapters: int = 0
    ) -> None:
        """`served`: the checkpoint that the engine started with. `on_version`: told inside the pause.

        `adapters`: how many vLLM serves beside the policy (its `lora_modules`).
        """
        self.broken: str | None = None
        """Why this replica must not serve any more."""
        self.lora: Any = None
        """The adapter that generations use (vLLM's LoRARequest); None: the plain model."""
        self._replica = replica
        self._client = client
        self._served = served
        self._on_version = on_version
        self._adapters = adapters
        self._lock = asyncio.Lock()
        self._version = 0
        self._loaded = served
        """The checkpoint that was loaded last."""
        self._digest: str | None = None
        """Content of `_loaded`; worked out when it is first needed."""
        self._adapter: LoraSource | None = None
        self._received = False
        """The weights came over the wire, and cannot be loaded again."""

    async def check(self, source: WeightSource) -> None:
        """Raises WeightsRefused for weights that cannot be loaded here. Touches nothing."""
        if isinstance(source, CheckpointSource):
            await asyncio.to_thread(check_checkpoint, Path(source.path), self._served)
        elif isinstance(source, LoraSource):
            lora = getattr(self._client.vllm_config, "lora_config", None)
            if lora is None:
                raise WeightsRefused("the engines take no adapters; set engine.vllm.enable_lora: true")
            if lora.max_cpu_loras <= self._adapters:
                # vLLM would throw the policy's out for a served one, and read it from its files again: by then they
                # may be others, or gone, and requests in flight name the files of the version before.
                raise WeightsRefused(
                    f"the engines hold {lora.max_cpu_loras} adapters, and engine.vllm.lora_modules has "
                    f"{self._adapters}; set engine.vllm.max_cpu_loras: {self._adapters + 1}"
                )
            if not (Path(source.path) / "adapter_config.json").is_file():
                raise WeightsRefused(f"{source.path} holds no adapter_config.json")
            if self._loaded != self._served or self._received:
                # A replica that starts anew would put it on the served model, and so be another policy.
                raise WeightsRefused(
                    "an adapter goes on top of the served model, and other weights were loaded since"
                )
        else:
            configured = getattr(self._client.vllm_config, "weight_transfer_config", None)
            if configured is None or configured.backend != source.backend:
                raise WeightsRefused(
                    f"the engines are not set up for {source.backend}; set engine.vllm.weight_transfer_config: "
                    f"{{backend: {source.backend}}}"
                )

    async def apply(self, source: WeightSource, version: int) -> ReplicaWeights:
        """Load weights as `version`. Raises WeightsRefused before anything has changed, else EngineError."""
        async with self._lock:
            await self.check(source)
            digest = None
            if isinstance(source, CheckpointSource):
                # Outside the pause; it also brings the files into the page cache.
                digest = await asyncio.to_thread(content_digest, Path(source.path))
            before = await self._read_back(None)
            started = time.perf_counter()
            try:
                # Inside: a pause that is given up may still come, and what follows undoes it.
                pause = self._client.pause_generation(mode="keep", clear_cache=False)
                await self._within(PAUSE_SECONDS, pause, "pause")
                loading = time.perf_counter()
                try:
                    await self._within(LOAD_SECONDS, self._load(source, digest), "load")
                    reading = time.perf_counter()
                    ranks = await self._verify(source, before, digest)
                    await self._set_version(version)
                except BaseException as failure:
                    await self._go_back(failure)
                    raise
                read = time.perf_counter()
            finally:
                if self.broken is None:
                    await self._resume()
            self._remember(source, digest)
            return ReplicaWeights(
                self._replica,
                version,
                ranks,
                pause_ms=1000 * (time.perf_counter() - started),
                load_ms=1000 * (reading - loading),
                verify_ms=1000 * (read - reading),
            )

    async def current(self) -> ReplicaWeights:
        """What this replica carries, read back now."""
        answers = await self._read_back(None)
        return ReplicaWeights(self._replica, self._version, [_rank(answer) for answer in answers])

    def _remember(self, source: WeightSource, digest: str | None) -> None:
        self._adapter = source if isinstance(source, LoraSource) else None
        if isinstance(source, CheckpointSource):
            self._loaded, self._digest, self._received = Path(source.path), digest, False
        elif isinstance(source, TransferSource):
            self._received = True

    async def _load(self, source: WeightSource, digest: str | None) -> None:
        if isinstance(source, CheckpointSource):
            await self._load_checkpoint(Path(source.path), digest)
        elif isinstance(source, LoraSource):
            from vllm.lora.request import LoRARequest

            name = LORA_NAME.format(source.name)
            request = LoRARequest(name, LORA_ID, source.path, load_inplace=True)
            if not await self._client.add_lora(request):
                raise EngineError(f"the engine did not take adapter {source.name!r} from {source.path}")
            # Generations name the adapter without asking for it to be loaded again.
            self.lora = LoRARequest(name, LORA_ID, source.path)
        else:
            await self._receive(source)

    async def _load_checkpoint(self, path: Path, digest: str | None) -> None:
        answers = await self._client.collective_rpc("rollout_load_checkpoint", args=(str(path),))
        for answer in answers:
            if digest is not None and answer["digest"] != digest:
                raise EngineError(f"rank {answer['rank']} read other tensors than {path} held before the load")
        # An adapter belongs to the weights that it was trained on.
        self.lora = None

    async def _receive(self, source: TransferSource) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        if source.init_info:
            await self._client.init_weight_transfer_engine(WeightTransferInitRequest(init_info=source.init_info))
        await self._client.start_weight_update()
        await self._client.update_weights(WeightTransferUpdateRequest(update_info=source.update_info))
        await self._client.finish_weight_update()

    async def _verify(
        self, source: WeightSource, before: list[dict[str, Any]], digest: str | None
    ) -> list[RankWeights]:
        path = source.path if isinstance(source, CheckpointSource) else None
        after = await self._read_back(path)
        for answer in after:
            if answer["differing"]:
                names = ", ".join(answer["differing"][:3])
                raise EngineError(f"rank {answer['rank']} does not carry what {path} holds: {names} differ")
        if isinstance(source, CheckpointSource) and digest != await self._old_digest():
            for old, new in zip(before, after, strict=True):
                # Where matrices are hidden, the visible parameters may rightly be the same.
                if old["checksum"] == new["checksum"] and not new["hidden"]:
                    raise EngineError(f"the weights of rank {new['rank']} did not change although {path} is new")
        return [_rank(answer) for answer in after]

    async def _old_digest(self) -> str | None:
        if self._digest is None:
            self._digest = await asyncio.to_thread(content_digest, self._loaded)
        return self._digest

    async def _set_version(self, version: int) -> None:
        # Both inside the pause: the engine labels tokens with it, and prefixes of older weights are not found again.
        await self._client.update_weight_version(str(version))
        self._version = version
        self._on_version(version)

    async def _resume(self) -> None:
        try:
            await self._within(PAUSE_SECONDS, self._client.resume_generation(), "resume")
        except BaseException as failure:
            self.broken = f"generation could not be resumed: {str(failure) or type(failure).__name__}"
            logger.error(self.broken)
            raise

    async def _go_back(self, cause: BaseException) -> None:
        logger.error("loading weights failed, going back to version %d: %s", self._version, cause)
        try:
            if self._received:
                raise EngineError("they came over the wire")
            await self._within(LOAD_SECONDS, self._load_checkpoint(self._loaded, None), "load")
            if self._adapter is not None:
                await self._within(LOAD_SECONDS, self._load(self._adapter, None), "load")
            answers = await self._read_back(str(self._loaded))
            if any(answer["differing"] for answer in answers):
                raise EngineError("the old weights did not come back")
            await self._client.update_weight_version(str(self._version))
        except BaseException as failure:
            self.broken = f"weights could not be loaded ({cause}), nor the old ones again ({failure})"
            logger.error(self.broken)

    async def _read_back(self, path: str | None) -> list[dict[str, Any]]:
        call = self._client.collective_rpc("rollout_read_back", args=(path,))
        return sorted(await self._within(READ_SECONDS, call, "read back"), key=lambda answer: answer["rank"])

    async def _within(self, seconds: float, work: Any, what: str) -> Any:
        try:
            async with asyncio.timeout(seconds):
                return await work
        except TimeoutError:
            raise EngineError(f"the engine did not {what} within {seconds:g} s") from None


def _rank(answer: dict[str, Any]) -> RankWeights:
    return RankWeights(answer["rank"], answer["checksum"], answer["compared"])
