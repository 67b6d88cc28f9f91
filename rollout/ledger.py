"""The ledger: the only writer of a session's token arrays.

Invariant, checked at every write: per segment, response_ids, response_mask, logprobs and policy_versions have
one length; mask 1 ⇔ version ≥ 0; prompt_ids + response_ids is exactly what the engine saw plus what it last
sampled. A new prompt must extend that context token by token: comparing lengths would miss drift that keeps
the length. Where it does not, the caller opens a new segment (`fork`) and says why; nothing is repaired.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from rollout.engine import Generation, VersionSpan
from rollout.errors import LedgerError, PrefixError

# Version of a token that no policy sampled.
NOT_SAMPLED = -1

# Compact C arrays: 13 bytes a token, where lists of Python numbers take about 120.
IDS, LOGPROBS, MASK = "i", "f", "b"


@dataclass(slots=True, frozen=True)
class TurnSpan:
    """Tokens `[start, end)` of a segment's response that one turn added.

    `role` is "assistant" for sampled tokens, else the role of the first message that was rendered into them.
    """

    role: str
    start: int
    end: int
    seconds: float


@dataclass(slots=True)
class Segment:
    """One unbroken stretch of context. Arrays over the response have one length."""

    prompt_ids: array[int]
    response_ids: array[int] = field(default_factory=lambda: array(IDS))
    response_mask: array[int] = field(default_factory=lambda: array(MASK))
    logprobs: array[float] = field(default_factory=lambda: array(LOGPROBS))
    policy_versions: array[int] = field(default_factory=lambda: array(IDS))
    turns: list[TurnSpan] = field(default_factory=list)
    fork_reason: str | None = None
    """Why this segment does not extend the one before; None for the first."""
    reasoning_spans: list[tuple[int, int]] | None = None
    """Reasoning tokens `[start, end)` of the response; None: not looked for, or not known (see rollout.reasoning)."""

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return sum(self.response_mask)


class Ledger:
    """Keeps the arrays of one session. Not safe for concurrent writers: a session has one."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._sampled_since_observe = True

    @property
    def segments(self) -> list[Segment]:
        """All segments, the current one last. Do not write to them."""
        return self._segments

    @property
    def num_response_tokens(self) -> int:
        """Tokens after the first prompt, sampled and observed, over all segments."""
        return sum(len(segment.response_ids) for segment in self._segments)

    def context(self) -> array[int]:
        """What the engine has seen and sampled so far in the current segment: prompt_ids + response_ids."""
        segment = self._current()
        return segment.prompt_ids + segment.response_ids

    def open(self, prompt_ids: Sequence[int], fork_reason: str | None = None) -> None:
        """Begin a segment with the prompt of its first generation.

        Raises LedgerError for an empty prompt, or for a fork without a reason.
        """
        if not prompt_ids:
            raise LedgerError("a segment needs a prompt of at least one token")
        if bool(self._segments) != (fork_reason is not None):
            raise LedgerError("the first segment has no fork reason, every later one has one")
        self._segments.append(Segment(prompt_ids=array(IDS, prompt_ids), fork_reason=fork_reason))
        self._sampled_since_observe = False

    def extends(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt begins with the context, token by token."""
        segment = self._current()
        prompt = prompt_ids if isinstance(prompt_ids, array) else array(IDS, prompt_ids)
        return first_difference(prompt, segment.prompt_ids, segment.response_ids) is None

    def observe(self, prompt_ids: Sequence[int], *, role: str, seconds: float = 0.0) -> int:
        """Record the prompt of the next generation: whatever it adds to the context was not sampled.

        Returns the number of tokens added. Raises PrefixError, with the first position that differs, if the
        prompt does not extend the context.
        """
        segment = self._current()
        if not self._sampled_since_observe:
            raise LedgerError("two prompts in a row without a generation between them")
        prompt = prompt_ids if isinstance(prompt_ids, array) else array(IDS, prompt_ids)
        position = first_difference(prompt, segment.prompt_ids, segment.response_ids)
        if position is not None:
            raise PrefixError(
                f"the new prompt of {len(prompt)} tokens leaves the context of "
                f"{len(segment.prompt_ids) + len(segment.response_ids)} tokens at position {position}"
            )
        start = len(segment.response_ids)
        added = prompt[len(segment.prompt_ids) + start :]
        if added:
            segment.response_ids.extend(added)
            segment.response_mask.frombytes(bytes(len(added)))
            segment.logprobs.extend(array(LOGPROBS, bytes(4 * len(added))))
            segment.policy_versions.extend(array(IDS, [NOT_SAMPLED]) * len(added))
            segment.turns.append(TurnSpan(role, start, start + len(added), seconds))
        self._sampled_since_observe = False
        return len(added)

    def sample(self, generation: Generation, seconds: float) -> None:
        """Record what the engine sampled as an answer to the current context.

        Raises LedgerError if lengths disagree, a version is missing or negative, or a log-probability is not one.
        """
        segment = self._current()
        if self._sampled_since_observe:
            raise LedgerError("two generations in a row without a prompt between them")
        count = len(generation.token_ids)
        if len(generation.logprobs) != count:
            raise LedgerError(f"{count} sampled tokens came with {len(generation.logprobs)} log-probabilities")
        for logprob in generation.logprobs:
            # A hair above 0 is rounding in the engine's log-softmax; NaN fails both comparisons.
            if not -float("inf") < logprob <= 1e-3:
                raise LedgerError(f"{logprob} is not a log-probability")
        versions = expand_versions(generation.versions, count)
        start = len(segment.response_ids)
        segment.response_ids.extend(generation.token_ids)
        segment.response_mask.extend(array(MASK, [1]) * count)
        segment.logprobs.extend(generation.logprobs)
        segment.policy_versions.extend(versions)
        segment.turns.append(TurnSpan("assistant", start, start + count, seconds))
        self._sampled_since_observe = True

    def _current(self) -> Segment:
        if not self._segments:
            raise LedgerError("no segment is open")
        return self._segments[-1]


def first_difference(prompt: array[int], prefix: array[int], rest: array[int]) -> int | None:
    """First position where `prompt` does not begin with `prefix` + `rest`; None if it does.

    Compares slices (memcmp speed) before it looks for the position.
    """
    split = len(prefix)
    if prompt[:split] == prefix and prompt[split : split + len(rest)] == rest:
        return None
    context = prefix + rest
    for position, (new, old) in enumerate(zip(prompt, context, strict=False)):
        if new != old:
            return position
    return len(prompt)


def expand_versions(spans: Sequence[VersionSpan], count: int) -> array[int]:
    """Spans to one version per token, int32[count]. Raises LedgerError on gaps, overlaps or negative versions."""
    versions = array(IDS)
    for span in spans:
        if span.start != len(versions) or span.end < span.start:
            raise LedgerError(f"version span {span} does not follow token {len(versions)}")
        if span.version < 0:
            raise LedgerError(f"a sampled token cannot carry version {span.version}")
        versions.extend(array(IDS, [span.version]) * (span.end - span.start))
    if len(versions) != count:
        raise LedgerError(f"{count} sampled tokens came with versions for {len(versions)}")
    return versions
