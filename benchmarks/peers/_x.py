"""Reference line: the same episodes straight to vLLM's token-in token-out endpoint, with aiohttp and nothing else.

No renderer, no environment, no trajectory: prompts and replies are token ids worked out once, before the clock
starts. It runs under our own interpreter and shows what HTTP alone leaves of the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp
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

SAMPLING = {
    "temperature": TEMPERATURE,
    "max_tokens": TOKENS_PER_TURN,
    "min_tokens": TOKENS_PER_TURN,
    "ignore_eos": True,
    "logprobs": 1,  # the sampled token's own log-probability, no alternatives
}


async def main() -> None:
    from transformers import AutoTokenizer

    options = arguments(__doc__ or "").parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    url = f"{options.base_url.rstrip('/')}/inference/v1/generate"
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    timeout = aiohttp.ClientTimeout(total=600)

    def prompt(index: int) -> list[int]:
        messages = first_messages(index)
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    # What a renderer would put between two turns, cut out of a rendered conversation of the same shape.
    before = tokenizer.apply_chat_template(first_messages(0), tokenize=False)
    after = tokenizer.apply_chat_template(
        [*first_messages(0), {"role": "user", "content": REPLY}], tokenize=False, add_generation_prompt=True
    )
    end_of_turn = [tokenizer.eos_token_id]
    bridge = end_of_turn + tokenizer.encode("\n" + after[len(before) :], add_special_tokens=False)

    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def play(indices: Sequence[int]) -> list[bool]:
            (index,) = indices
            token_ids = prompt(index)
            for turn in range(TURNS):
                if turn:
                    token_ids += bridge
                body = {"model": options.model, "token_ids": token_ids, "sampling_params": SAMPLING}
                async with session.post(url, json=body) as response:
                    response.raise_for_status()
                    choice = (await response.json())["choices"][0]
                sampled = choice["token_ids"]
                if not is_whole_turn(sampled, [entry["logprob"] for entry in choice["logprobs"]["content"]]):
                    return [False]
                token_ids += sampled
            return [True]

        report(await measure(play, options, version=aiohttp.__version__))


if __name__ == "__main__":
    asyncio.run(main())
