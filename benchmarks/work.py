"""The work that every path of the comparison does: episodes of three turns with 64 sampled tokens each.

A turn cannot end early (end-of-turn tokens are ignored), so that all paths sample exactly the same number of tokens;
between turns a short user message is appended. Log-probabilities of the sampled tokens are always asked for.
"""

from __future__ import annotations

from pathlib import Path

from rollout import Environment, Episode, Message, Sampling, Task

TURNS = 3
TOKENS_PER_TURN = 64
QUESTION = "Count upwards."
REPLY: Message = {"role": "user", "content": "Go on."}

SAMPLING = Sampling(temperature=1.0, max_tokens=TOKENS_PER_TURN, min_tokens=TOKENS_PER_TURN, ignore_eos=True)
# The history is never rewritten, so that three turns are one segment on every path.
RENDERER_OPTIONS = {"thinking_retention": "all"}


def sampling_for(model: Path) -> Sampling:
    """The same without tool calls, which would end the likeness of the paths: they are parsed and answered."""
    from tokenizers import Tokenizer

    call = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id("<tool_call>")
    return SAMPLING if call is None else SAMPLING.model_copy(update={"logit_bias": {call: -100.0}})


class Talk(Environment):
    """Three turns; what is said between them is always the same."""

    async def reply(self, episode: Episode) -> list[Message] | None:
        """Go on, twice."""
        return [REPLY] if len(episode.turns) < TURNS else None

    async def reward(self, episode: Episode) -> float:
        """A constant: scoring is not what is measured."""
        return 1.0


def make_tasks(count: int) -> list[Task]:
    """Tasks with one opening message each."""
    return [Task(task_id=f"e{index}", messages=[{"role": "user", "content": QUESTION}]) for index in range(count)]
