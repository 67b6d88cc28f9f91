"""Evaluation: pass@k and mean reward of a record table, overall and by tag.

Invariant: a trajectory counts once, however many segments it has; an attempt without a reward is in no score, but
is counted by the way it ended and named in `warnings`. Pure, and the same table gives the same figures: the draws
behind an interval have a fixed seed.
"""

from __future__ import annotations

import json
import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rollout.errors import RecordError, RolloutError
from rollout.record import SCHEMA

CONFIDENCE = 0.95
# Beyond each end of a 95% interval then lie 50 draws, and an end moves by a sixtieth of the width between seeds.
RESAMPLES = 2_000
SEED = 20_210_707
# An interval over tasks says nothing where there is one task.
MIN_TASKS = 2
# The system ended these, not the policy: no reward of theirs would be the policy's (as in rollout/session.py).
NOT_PLAYED = frozenset({"error", "cancelled"})
# The policy was cut off by a limit. `tool_error` is not here: too many failed calls are its own doing.
TRUNCATED = frozenset({"length", "max_turns", "max_tokens", "deadline"})

TagsOf = Callable[[Mapping[str, Any]], Collection[str]]
"""A task's metadata to its tags; not asked where there is no metadata. May raise ValueError, KeyError, TypeError."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tasks. `low` and `high` are None where there are fewer than MIN_TASKS."""

    value: float
    low: float | None
    high: float | None
    tasks: int
    """Tasks it is over: those with enough scored attempts."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"value": self.value, "low": self.low, "high": self.high, "tasks": self.tasks}


@dataclass(frozen=True, slots=True)
class Line:
    """The figures of all tasks, or of the tasks with one tag. What nothing is known of is None, never 0."""

    tag: str | None
    """None: all tasks."""
    tasks: int
    trajectories: int
    scored: int
    unscored: dict[str, int]
    """Trajectories that are in no score, by stop_reason; others than NOT_PLAYED were given no reward."""
    errors: dict[str, int]
    """Trajectories that ended as `error`, by the error's category."""
    reward: Estimate | None
    pass_at: dict[int, Estimate | None]
    truncated_share: float | None
    """Of the trajectories that were played to an end; so are the two means."""
    mean_turns: float | None
    """Sampled turns of a trajectory."""
    mean_response_tokens: float | None
    """Tokens after the prompt, tool results included, over all segments of a trajectory."""
    stop_reasons: dict[str, int]

    @property
    def num_unscored(self) -> int:
        """Trajectories that are in no score."""
        return self.trajectories - self.scored

    def to_json(self) -> dict[str, Any]:
        """Plain data; k is a string, as JSON wants it."""
        return {
            "tasks": self.tasks,
            "trajectories": self.trajectories,
            "scored": self.scored,
            "unscored": self.num_unscored,
            "unscored_by_stop_reason": self.unscored,
            "errors": self.errors,
            "mean_reward": None if self.reward is None else self.reward.to_json(),
            "pass_at": {str(k): None if found is None else found.to_json() for k, found in self.pass_at.items()},
            "truncated_share": self.truncated_share,
            "mean_turns": self.mean_turns,
            "mean_response_tokens": self.mean_response_tokens,
            "stop_reasons": self.stop_reasons,
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a table of attempts comes to."""

    n: int
    """Attempts of a task: those asked for, or the most that a task has."""
    ks: tuple[int, ...]
    pass_threshold: float
    overall: Line
    tags: tuple[Line, ...]
    """One line a tag, by name; a task with several tags is in several lines, one without is in `overall` alone."""
    warnings: tuple[str, ...]
    """What a reader must know before believing the figures. Empty: every task has n scored attempts."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "n": self.n,
            "ks": list(self.ks),
            "pass_threshold": self.pass_threshold,
            "interval": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED, "over": "tasks"},
            "warnings": list(self.warnings),
            "overall": self.overall.to_json(),
            "tags": {str(line.tag): line.to_json() for line in self.tags},
        }


@dataclass(slots=True)
class _Attempt:
    reward: float | None
    stop_reason: str
    error: str | None
    turns: int = 0
    tokens: int = 0


@dataclass(slots=True)
class _Task:
    tags: set[str] = field(default_factory=set)
    attempts: list[_Attempt] = field(default_factory=list)

    def rewards(self) -> list[float]:
        return [attempt.reward for attempt in self.attempts if attempt.reward is not None]


def evaluate(
    table: pa.Table,
    *,
    ks: Sequence[int] | None = None,
    pass_threshold: float = 1.0,
    tags_of: TagsOf | None = None,
    n: int | None = None,
) -> Evaluation:
    """Scores of a record table (SCHEMA).

    An attempt passes where its reward is at least `pass_threshold`. An attempt that ended as `error` or `cancelled`,
    or that was given no reward, is unscored: not a failure, since nothing is known of the policy from it. A task
    with fewer than k scored attempts is left out of pass@k. Attempts at one task from several runs are pooled.

    `ks`: None means 1, 2, 4, … up to n. `tags_of`: None means `metadata_tags`. `n`: attempts that were asked for;
    None means the most that a task has. Raises RolloutError for a k outside 1 … n or a threshold that is no number,
    RecordError for a table that is not a record, rewards that are not finite, and tags that cannot be read.
    """
    threshold = check_threshold(pass_threshold)
    tasks = list(_tasks(table, tags_of or metadata_tags).values())
    n = max([n or 0, *(len(task.attempts) for task in tasks)])
    if ks is None:
        chosen = default_ks(n)
    elif n:
        chosen = check_ks(ks, n)
    else:
        # An empty table has no n of its own to hold k against.
        chosen = tuple(sorted(set(ks)))
    overall = _line(None, tasks, chosen, threshold)
    tags = sorted(set().union(*(task.tags for task in tasks)))
    lines = tuple(_line(tag, [task for task in tasks if tag in task.tags], chosen, threshold) for tag in tags)
    few = sum(len(task.attempts) < n for task in tasks)
    return Evaluation(n, chosen, pass_threshold, overall, lines, _warnings(overall, n, few))


@cache
def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of pass@k from n attempts of which c passed: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021, arXiv 2107.03374, equation 1: the share of the k-subsets of the attempts that hold a passed
    one. In integers up to the last division, so that it is the float nearest to the true value for any n.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    subsets = math.comb(n, k)
    return (subsets - math.comb(n - c, k)) / subsets


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """A CONFIDENCE interval of the mean of independent values: the bootstrap's percentiles over RESAMPLES draws.

    Given one value a task, it holds for attempts that depend on each other within a task: whole tasks are drawn.
    None for fewer than MIN_TASKS values.
    """
    if len(values) < MIN_TASKS:
        return None
    if min(values) == max(values):
        return values[0], values[0]
    # Sorted: the order of the rows must not move the figures.
    column = pa.array(sorted(values), pa.float64())
    source = random.Random(SEED)
    totals = pa.array([0.0] * RESAMPLES)
    # One value of every resample at a time: as many passes as there are values, 50 µs each, whatever RESAMPLES is.
    for _ in values:
        totals = pc.add(totals, column.take(_draw(source, len(values))))
    tail = (1 - CONFIDENCE) / 2
    low, high = pc.quantile(pc.divide(totals, float(len(values))), q=[tail, 1 - tail]).to_pylist()
    return low, high


def _draw(source: random.Random, below: int) -> pa.Array:
    """RESAMPLES indices below `below`: the high half of a 32-bit word times it. Its bias is below / 2**32."""
    words = pa.Array.from_buffers(pa.uint32(), RESAMPLES, [None, pa.py_buffer(source.randbytes(4 * RESAMPLES))])
    scaled = pc.multiply(words.cast(pa.uint64()), pa.scalar(below, pa.uint64()))
    return pc.shift_right(scaled, pa.scalar(32, pa.uint64()))


def default_ks(n: int) -> tuple[int, ...]:
    """1, 2, 4, … up to n."""
    return tuple(2**power for power in range(n.bit_length()))


def check_ks(ks: Sequence[int], n: int) -> tuple[int, ...]:
    """The ks in order, each once. Raises RolloutError for none, and for one outside 1 … n."""
    if not ks:
        raise RolloutError("no k is given; name one or more, e.g. --k 1")
    for k in ks:
        if not 1 <= k <= n:
            raise RolloutError(f"k = {k} is outside 1 … {n}: pass@k needs at least k attempts at a task; raise --n")
    return tuple(sorted(set(ks)))


def check_threshold(threshold: float) -> float:
    """The threshold as the record's float32: else a reward of 0.9 would not reach a threshold of 0.9.

    Raises RolloutError for one that is not finite.
    """
    if not math.isfinite(threshold):
        raise RolloutError(f"the pass threshold is {threshold}; give the reward from which an attempt has passed")
    return array("f", [threshold])[0]


def metadata_tags(metadata: Mapping[str, Any]) -> list[str]:
    """The tags of a task: `metadata["tags"]`, a list of texts, and `metadata["tag"]`, one text. Raises ValueError."""
    tags = metadata.get("tags")
    if tags is None:
        tags = []
    if not (isinstance(tags, list) and all(isinstance(tag, str) and tag for tag in tags)):
        raise ValueError(f"metadata.tags must be a list of texts, not {tags!r}")
    tag = metadata.get("tag")
    if tag is None:
        return tags
    if not (isinstance(tag, str) and tag):
        raise ValueError(f"metadata.tag must be a text, not {tag!r}; for several write metadata.tags")
    return [*tags, tag]


def _tasks(table: pa.Table, tags_of: TagsOf) -> dict[str, _Task]:
    """Attempts by task_id, segments of a trajectory put together."""
    if not table.schema.equals(SCHEMA):
        raise RecordError(f"the table's schema is not the record's: {table.schema}")
    # The token columns stay what they are; only their lengths become Python numbers.
    tokens = pc.list_value_length(table["response_ids"]).to_pylist()
    turns = _sampled_turns(table)
    names = ("task_id", "trajectory_id", "num_segments", "reward", "stop_reason", "error", "metadata")
    tags: dict[str, Collection[str]] = {}
    tasks: dict[str, _Task] = {}
    attempts: dict[str, _Attempt] = {}
    missing: Counter[str] = Counter()
    for index, row in enumerate(table.select(names).to_pylist()):
        trajectory_id = row["trajectory_id"]
        attempt = attempts.get(trajectory_id)
        if attempt is None:
            attempt = attempts[trajectory_id] = _Attempt(_reward(row), row["stop_reason"], row["error"])
            missing[trajectory_id] = row["num_segments"]
            task = tasks.setdefault(row["task_id"], _Task())
            task.attempts.append(attempt)
            text = row["metadata"]
            if text not in tags:
                tags[text] = _tags(row["task_id"], text, tags_of)
            # Of all its attempts: one that died on the way to the record may have lost its metadata.
            task.tags.update(tags[text])
        attempt.tokens += tokens[index]
        attempt.turns += turns[index]
        missing[trajectory_id] -= 1
    for trajectory_id, number in missing.items():
        if number:
            raise RecordError(f"segments are missing or repeated in trajectory {trajectory_id!r}")
    return tasks


def _sampled_turns(table: pa.Table) -> Counter[int]:
    """Turns of the policy in each row."""
    if table.num_rows == 0:
        return Counter()
    turns = table.select(["turns"]).combine_chunks()["turns"]
    sampled = pc.equal(pc.struct_field(pc.list_flatten(turns), "role"), "assistant")
    return Counter(pc.list_parent_indices(turns).filter(sampled).to_pylist())


def _reward(row: Mapping[str, Any]) -> float | None:
    reward: float | None = row["reward"]
    if reward is None or row["stop_reason"] in NOT_PLAYED:
        return None
    if not math.isfinite(reward):
        raise RecordError(
            f"the reward of trajectory {row['trajectory_id']!r} is {reward}; no mean can be taken of it"
        )
    return reward


def _tags(task_id: str, text: str, tags_of: TagsOf) -> Collection[str]:
    try:
        metadata = json.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError(f"metadata is {type(metadata).__name__}, not an object")
        tags = tags_of(metadata) if metadata else ()
        if isinstance(tags, str):
            # Its letters would be taken for the tags.
            raise ValueError(f"tags_of gave the text {tags!r}; give a list of texts")
        return tags
    except (ValueError, KeyError, TypeError) as error:
        detail = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise RecordError(f"the tags of task {task_id!r} cannot be read: {detail}") from None


def _line(tag: str | None, tasks: Sequence[_Task], ks: Sequence[int], threshold: float) -> Line:
    attempts = [attempt for task in tasks for attempt in task.attempts]
    played = [attempt for attempt in attempts if attempt.stop_reason not in NOT_PLAYED]
    rewards = [rewards for task in tasks if (rewards := task.rewards())]
    passed = [(len(of_task), sum(reward >= threshold for reward in of_task)) for of_task in rewards]
    return Line(
        tag=tag,
        tasks=len(tasks),
        trajectories=len(attempts),
        scored=sum(map(len, rewards)),
        unscored=_counted(attempt.stop_reason for attempt in attempts if attempt.reward is None),
        errors=_counted(
            (attempt.error or "unknown").split(":", 1)[0] for attempt in attempts if attempt.stop_reason == "error"
        ),
        reward=_estimate([math.fsum(of_task) / len(of_task) for of_task in rewards]),
        pass_at={k: _estimate([pass_at_k(scored, c, k) for scored, c in passed if scored >= k]) for k in ks},
        truncated_share=_mean([attempt.stop_reason in TRUNCATED for attempt in played]),
        mean_turns=_mean([attempt.turns for attempt in played]),
        mean_response_tokens=_mean([attempt.tokens for attempt in played]),
        stop_reasons=_counted(attempt.stop_reason for attempt in attempts),
    )


def _estimate(values: Sequence[float]) -> Estimate | None:
    """Of one value a task."""
    if not values:
        return None
    low, high = mean_interval(values) or (None, None)
    return Estimate(math.fsum(values) / len(values), low, high, len(values))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _counted(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _warnings(overall: Line, n: int, few: int) -> tuple[str, ...]:
    if overall.trajectories == 0:
        return ("there are no trajectories",)
    found = []
    if few:
        found.append(f"{few} of {overall.tasks} tasks have fewer than {n} trajectories")
    if overall.num_unscored:
        ended = ", ".join(f"{number} {reason}" for reason, number in overall.unscored.items())
        why = "; errors: " + ", ".join(f"{number} {name}" for name, number in overall.errors.items())
        found.append(
            f"{overall.num_unscored} of {overall.trajectories} trajectories are not scored and in no score "
            f"(ended by: {ended}{why if overall.errors else ''})"
        )
    if overall.scored == 0:
        return (*found, "no trajectory was scored, so there are no scores")
    assert overall.reward is not None
    if overall.reward.tasks < overall.tasks:
        found.append(f"the mean reward is over {overall.reward.tasks} of {overall.tasks} tasks")
    for k, estimate in overall.pass_at.items():
        over = 0 if estimate is None else estimate.tasks
        if over < overall.tasks:
            found.append(
                f"pass@{k} is over {over} of {overall.tasks} tasks: the others have fewer than {k} scored attempts"
            )
    return tuple(found)
