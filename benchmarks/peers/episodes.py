"""What one episode of the comparison is, and the loop that times many of them.

The peers' scripts run under other interpreters than ours, so this module needs the standard library only and is
imported by its bare name (a script's own folder is the first place Python looks).

An episode is three turns of exactly 64 sampled tokens at temperature 1; after the first and the second turn the
environment answers with the same short message. It counts when every sampled token came back as a token id with a
finite log-probability; anything else, an exception included, counts as lost.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

TURNS = 3
TOKENS_PER_TURN = 64
TEMPERATURE = 1.0
REPLY = "Go on."
SAMPLES_PER_TASK = 8  # as in group-based reinforcement learning: eight episodes start from one prompt
TOKENS_PER_EPISODE = TURNS * TOKENS_PER_TURN

# Takes the indices of up to `group` episodes, plays them together and says for each whether it is complete.
PlayGroup = Callable[[Sequence[int]], Awaitable[Sequence[bool]]]


def first_messages(index: int) -> list[dict[str, str]]:
    """The conversation that episode ``index`` starts from."""
    return [{"role": "user", "content": f"Tell me about the number {index // SAMPLES_PER_TASK}."}]


def is_whole_turn(token_ids: Sequence[int], logprobs: Sequence[float]) -> bool:
    """Whether a turn is training-grade: all 64 token ids, each with its log-probability."""
    return (
        len(token_ids) == TOKENS_PER_TURN
        and len(logprobs) == TOKENS_PER_TURN
        and all(math.isfinite(value) for value in logprobs)
    )


def arguments(description: str) -> argparse.ArgumentParser:
    """The arguments that every script here takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base-url", required=True, help="root address of vLLM's server, without /v1")
    parser.add_argument("--model", required=True, help="model directory, also the name that it is served under")
    parser.add_argument("--concurrency", type=int, required=True, help="episodes in flight")
    parser.add_argument("--episodes", type=int, default=0, help="episodes to time (0: as many as fill --seconds)")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long a point should take")
    return parser


class _Tally:
    """Counts whole and lost episodes and keeps the first failure for the report."""

    def __init__(self) -> None:
        self.whole = 0
        self.lost = 0
        self.first_failure: str | None = None

    def add(self, outcomes: Sequence[bool]) -> None:
        self.whole += sum(outcomes)
        failed = len(outcomes) - sum(outcomes)
        self.lost += failed
        if failed and self.first_failure is None:
            self.first_failure = "an episode came back without three whole turns"

    def fail(self, count: int, error: BaseException) -> None:
        self.lost += count
        if self.first_failure is None:
            self.first_failure = f"{type(error).__name__}: {error}"[:500]


async def _play(play_group: PlayGroup, first: int, count: int, concurrency: int, group: int) -> tuple[_Tally, float]:
    """Play ``count`` episodes with never more than ``concurrency`` in flight; the outcome and the wall time."""
    tally = _Tally()
    pending = iter([range(start, min(start + group, first + count)) for start in range(first, first + count, group)])

    async def worker() -> None:
        for indices in pending:  # one shared iterator: whichever worker is free takes the next group
            try:
                tally.add(await play_group(indices))
            except Exception as error:
                tally.fail(len(indices), error)

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(max(1, concurrency // group))))
    return tally, time.perf_counter() - started


async def measure(
    play_group: PlayGroup, options: argparse.Namespace, *, version: str | None, group: int = 1
) -> dict[str, Any]:
    """Warm up with one round of ``concurrency`` episodes, time the rest, and return the line to print."""
    concurrency: int = options.concurrency
    warm, seconds = await _play(play_group, 0, concurrency, concurrency, group)
    if not warm.whole:
        raise RuntimeError(f"no episode of the warm-up came through: {warm.first_failure}")
    # Whole rounds, and at least two: a ragged last round would be timed at a lower concurrency.
    rounds = max(2, round(options.seconds / seconds))
    episodes = options.episodes or rounds * concurrency
    gc.collect()
    tally, seconds = await _play(play_group, concurrency, episodes, concurrency, group)
    return {
        "episodes_per_s": tally.whole / seconds,
        "tokens_per_s": tally.whole * TOKENS_PER_EPISODE / seconds,
        "lost": tally.lost + warm.lost,
        "first_failure": warm.first_failure or tally.first_failure,
        "episodes": episodes,
        "seconds": seconds,
        "version": version,
    }


def report(result: dict[str, Any]) -> None:
    """Print the result as the one JSON line that the caller looks for (libraries may print other lines)."""
    print(json.dumps(result), flush=True)
