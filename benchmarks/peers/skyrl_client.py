"""SkyRL on the comparison's episodes; run by the interpreter of SkyRL's own environment.

Its gym generator and its HTTP inference client against vLLM's server, driven as its fully asynchronous trainer drives
them: a number of workers, each generating one group of samples of one prompt at a time. SkyRL would put its router
between client and server; with one server there is nothing to route, and leaving it out saves SkyRL a hop.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import typing
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import typing_extensions

if sys.version_info < (3, 12):
    # SkyRL hands typing.TypedDict to pydantic, which before Python 3.12 takes only typing_extensions' one.
    typing.TypedDict = typing_extensions.TypedDict  # type: ignore[misc,assignment]

import skyrl_gym
from episodes import (
    REPLY,
    SAMPLES_PER_TASK,
    TEMPERATURE,
    TOKENS_PER_TURN,
    TURNS,
    arguments,
    first_messages,
    is_whole_turn,
    measure,
    report,
)
from skyrl.backends.skyrl_train.inference_servers.engine_utils import get_vllm_sampling_params
from skyrl.backends.skyrl_train.inference_servers.remote_inference_client import RemoteInferenceClient
from skyrl.train.config import GeneratorConfig, SamplingParams, SkyRLGymConfig
from skyrl.train.generators.base import BatchMetadata, GeneratorInput, TrajectoryID
from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from transformers import AutoTokenizer

ENVIRONMENT = "three_turns"


class ThreeTurns(BaseTextEnv):
    """Answers every turn but the last with the same message."""

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.max_turns = (extras or {}).get("max_turns", TURNS)

    def step(self, action: str) -> BaseTextEnvStepOutput:
        self.turns += 1
        done = self.turns >= self.max_turns
        observations = [] if done else [{"role": "user", "content": REPLY}]
        return BaseTextEnvStepOutput(
            observations=observations, reward=float(done), done=done, metadata={}, postprocessed_action=None
        )


def is_whole(loss_mask: Sequence[int], token_ids: Sequence[int], logprobs: Sequence[float] | None) -> bool:
    """Whether a trajectory holds three whole turns."""
    sampled = [index for index, in_loss in enumerate(loss_mask) if in_loss]
    turns = [sampled[start : start + TOKENS_PER_TURN] for start in range(0, len(sampled), TOKENS_PER_TURN)]
    return (
        logprobs is not None
        and len(turns) == TURNS
        and all(is_whole_turn([token_ids[i] for i in turn], [logprobs[i] for i in turn]) for turn in turns)
    )


async def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    # The server has no endpoint to close a session (SkyRL's router has), and SkyRL warns of it in every episode.
    logging.getLogger("skyrl").setLevel(logging.ERROR)
    skyrl_gym.register(id=ENVIRONMENT, entry_point=ThreeTurns)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    sampling = SamplingParams(
        max_generate_length=TOKENS_PER_TURN,
        temperature=TEMPERATURE,
        logprobs=0,  # SkyRL allows 0 and 1 and uses only the sampled token's; 0 is less work
        additional_kwargs={"ignore_eos": True},
    )
    config = GeneratorConfig(max_turns=TURNS, max_input_length=2048, sampling_params=sampling)
    sampling_dict = get_vllm_sampling_params(sampling) | {"min_tokens": TOKENS_PER_TURN}
    client = RemoteInferenceClient(
        proxy_url=options.base_url.rstrip("/"),
        server_urls=[options.base_url.rstrip("/")],
        data_parallel_size=1,
        model_name=options.model,
        tokenizer=tokenizer,
    )
    generator = SkyRLGymGenerator(config, SkyRLGymConfig(), client, tokenizer)

    async def play(indices: Sequence[int]) -> list[bool]:
        batch: GeneratorInput = {
            "prompts": [first_messages(index) for index in indices],
            "env_classes": [ENVIRONMENT] * len(indices),
            "env_extras": [{} for _ in indices],
            "sampling_params": sampling_dict,
            "trajectory_ids": [TrajectoryID(str(index), 0) for index in indices],
            "batch_metadata": BatchMetadata(global_step=0, training_phase="train"),
        }
        output = await generator.generate(batch, disable_tqdm=True)
        logprobs = output["rollout_logprobs"] or [None] * len(indices)
        return [is_whole(*row) for row in zip(output["loss_masks"], output["response_ids"], logprobs, strict=True)]

    report(await measure(play, options, version=version("skyrl"), group=SAMPLES_PER_TASK))
    await (await client._get_session()).close()


if __name__ == "__main__":
    asyncio.run(main())
