"""verifiers on the comparison's episodes; run by the interpreter of verifiers' own environment.

Two ways through the library, both with its training client (renderer, token ids, log-probabilities, message graph):

- ``--path client``: our loop calls the training client turn by turn and commits each turn to a trace. This leaves out
  most of the framework and is the fastest use of its code that still ends in a trainable trace.
- ``--path agent``: whole rollouts as an environment author writes them (``Agent.interaction``), with the interception
  server and an in-process harness (see ``verifiers_harness``).

One function of its client library is replaced (``logprobs_of``): vLLM 0.32 names a token by its integer id where
renderers 0.1.12 expects the text ``token_id:N``, and without the replacement no turn gets through.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import renderers.client
import verifiers
import verifiers.v1 as vf
from episodes import (
    REPLY,
    TEMPERATURE,
    TOKENS_PER_TURN,
    TURNS,
    arguments,
    first_messages,
    is_whole_turn,
    measure,
    report,
)
from renderers import Qwen3RendererConfig, RendererConfig
from verifiers.v1 import graph
from verifiers.v1.clients import TrainClientConfig
from verifiers.v1.clients.train import TrainClient
from verifiers.v1.dialects import ChatDialect
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.runtimes import SubprocessConfig
from verifiers.v1.trace import AgentInfo, Trace, TraceTask
from verifiers.v1.types import SamplingConfig, UserMessage

SAMPLING = SamplingConfig.model_validate(
    {
        "temperature": TEMPERATURE,
        "max_tokens": TOKENS_PER_TURN,
        "min_tokens": TOKENS_PER_TURN,
        "ignore_eos": True,
    }
)


def logprobs_of(choice: Mapping[str, Any], completion_ids: Sequence[int]) -> list[float]:
    """The sampled tokens' log-probabilities in the shape that vLLM 0.32 sends them, checked like the original."""
    values = []
    for token_id, entry in zip(completion_ids, choice["logprobs"]["content"], strict=True):
        value = entry["logprob"]
        if (
            entry["token_id"] != token_id
            or not math.isfinite(value)
            or value == renderers.client.VLLM_LOGPROB_SENTINEL
        ):
            raise renderers.client.MalformedGenerateResponseError(f"no log-probability of token {token_id}")
        values.append(float(value))
    return values


def renderer_for(model: str) -> RendererConfig | None:
    """The renderer of the model; verifiers goes by public model names and cannot tell one from a directory."""
    family = json.loads((Path(model) / "config.json").read_text())["model_type"]
    return Qwen3RendererConfig(thinking_retention="all") if family == "qwen3" else None


def is_whole(trace: Trace) -> bool:
    """Whether the trace holds one conversation of three whole turns."""
    if len(trace.branches) != 1:
        return False
    branch = trace.branches[0]
    mask, token_ids, logprobs = branch.sampled_mask, branch.token_ids, branch.logprobs
    sampled = [index for index, is_sampled in enumerate(mask) if is_sampled]
    turns = [sampled[start : start + TOKENS_PER_TURN] for start in range(0, len(sampled), TOKENS_PER_TURN)]
    return len(turns) == TURNS and all(
        is_whole_turn([token_ids[i] for i in turn], [logprobs[i] for i in turn]) for turn in turns
    )


def task_of(index: int) -> vf.Task:
    """Episode ``index`` as verifiers' task."""
    return vf.Task(vf.TaskData(idx=index, prompt=first_messages(index)[0]["content"]))


async def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--path", choices=("client", "agent"), default="client")
    options = parser.parse_args()
    logging.getLogger("verifiers").setLevel(logging.ERROR)
    renderers.client._parse_completion_logprobs = logprobs_of
    config = TrainClientConfig(
        base_url=f"{options.base_url.rstrip('/')}/v1",
        api_key_var="BENCHMARK_API_KEY",  # unset: the server asks for none
        renderer=renderer_for(options.model),
        renderer_model_name=options.model,
    )
    version = verifiers.__version__
    agent_config = vf.AgentConfig(
        harness={"id": "verifiers_harness"},
        runtime=SubprocessConfig(),
        model=options.model,
        client=config,
        sampling=SAMPLING,
    )

    if options.path == "client":
        client = TrainClient(config)
        dialect = ChatDialect()

        async def play_client(indices: Sequence[int]) -> list[bool]:
            (index,) = indices
            task = task_of(index)
            trace: Trace = Trace(
                task=TraceTask(type="Task", data=task.data, key=task.key, hash=task.hash),
                agent=AgentInfo(config=agent_config),
            )
            messages: list = [UserMessage(content=first_messages(index)[0]["content"])]
            for turn in range(TURNS):
                if turn:
                    messages.append(UserMessage(content=REPLY))
                body = {"model": options.model, "messages": [message_to_wire(message) for message in messages]}
                pending = graph.prepare_turn(trace, messages)
                response = await client.get_response(dialect, body, SAMPLING, session_id=trace.id, turn=pending)
                pending.commit(response)
                messages.append(response.message)
            return [is_whole(trace)]

        try:
            report(await measure(play_client, options, version=version))
        finally:
            await client.close()
        return

    from verifiers_harness import InProcessHarness

    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session,
        vf.Agent(agent_config) as agent,
    ):
        InProcessHarness.session_for_calls = session

        async def play_agent(indices: Sequence[int]) -> list[bool]:
            (index,) = indices
            async with agent.interaction(task_of(index)) as interaction:
                segment = await interaction.turn()
                for _ in range(TURNS - 1):
                    if segment.terminated:
                        break
                    segment = await interaction.turn(REPLY)
            if interaction.trace.last_error is not None:
                raise RuntimeError(interaction.trace.last_error.message)
            return [interaction.trace.ok and is_whole(interaction.trace)]

        report(await measure(play_agent, options, version=version))


if __name__ == "__main__":
    asyncio.run(main())
