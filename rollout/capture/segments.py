"""From calls to segments: which call continues which, decided by tokens and times alone.

Invariant: every call that sampled anything is in exactly one chain, so each sampled token has mask 1 exactly once
in all segments. A call continues a chain only if its prompt begins with everything that the chain's last call saw
and sampled, token by token, if that call had finished before it began, and if no other call continues it. Else it
opens a segment with its whole prompt as prompt, and `fork_reason` says what is known of why. Where several chains
fit, the longest is taken; of equally long ones (then they are equal, token by token) the one that finished first.
Calls are looked at in the order of time, so the order in which they were reported changes nothing.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rollout.capture.calls import UNKNOWN_ROLE, CapturedCall
from rollout.errors import LedgerError
from rollout.ledger import IDS, Ledger, Segment, first_difference

SENT_AGAIN = "the same prompt was sent again"
SENT_IN_PARALLEL = "the same prompt was sent in parallel"
CONTINUED_TWICE = "another call continues the same context"
NOT_FINISHED = "the call that it continues had not finished"
REWRITTEN = "the history was rewritten"
"""The prompt begins with an earlier prompt, but not with what was sampled for it."""
NEW_BEGINNING = "the prompt begins with no earlier one"
"""Another conversation (a sub-agent), or a history that was rewritten from its beginning: tokens cannot tell."""
FORK_REASONS = (SENT_AGAIN, SENT_IN_PARALLEL, CONTINUED_TWICE, NOT_FINISHED, REWRITTEN, NEW_BEGINNING)

# Tokens that are looked up at once. A lookup costs one step a block and one short comparison for each beginning that
# ends within the block: 2,000 calls of 10,000 tokens need no comparison of each with each.
BLOCK_TOKENS = 64
_NOTHING = array(IDS)


@dataclass(slots=True)
class Chain:
    """Calls of which each continues the one before; one segment."""

    calls: list[CapturedCall]
    fork_reason: str | None
    """Why the first call continues no other; None for the session's first chain."""


def chains(calls: Iterable[CapturedCall]) -> list[Chain]:
    """The chains of a session's calls, ordered by their first calls.

    A call that sampled nothing is left out: it has no turn of its own, and what it saw is in the calls around it.
    Raises LedgerError where two calls share a call_id.
    """
    given = list(calls)
    _require_distinct(given)
    ordered = sorted((call for call in given if len(call.token_ids)), key=lambda call: call.order)
    found: list[Chain] = []
    history = _History()
    for call in ordered:
        seen = _Blocks(call.prompt_ids)
        chain = history.claim(call, seen)
        if chain is None:
            chain = Chain([], history.why(call, seen) if found else None)
            found.append(chain)
        chain.calls.append(call)
        history.add(call, seen, chain)
    return found


def segments(calls: Iterable[CapturedCall]) -> list[Segment]:
    """The segments of a session's calls. Raises LedgerError where two calls share a call_id."""
    return to_segments(chains(calls))


def to_segments(found: Sequence[Chain]) -> list[Segment]:
    """Chains written by the ledger, which compares every prompt with the context again."""
    ledger = Ledger()
    for chain in found:
        before: CapturedCall | None = None
        for call in chain.calls:
            if before is None:
                ledger.open(call.prompt_ids, chain.fork_reason)
            else:
                seconds = max(0.0, call.started - before.finished)
                ledger.observe(call.prompt_ids, role=_role_between(before, call), seconds=seconds)
            ledger.sample(call.generation(), call.seconds)
            before = call
    return ledger.segments


def _require_distinct(calls: Sequence[CapturedCall]) -> None:
    known: set[str] = set()
    for call in calls:
        if call.call_id in known:
            raise LedgerError(f"two captured calls are called {call.call_id!r}")
        known.add(call.call_id)


def _role_between(before: CapturedCall, call: CapturedCall) -> str:
    """Role of the first message after the answer to `before`; `unknown` unless the messages show it."""
    start = len(before.roles)
    if not start or call.roles[:start] != before.roles or call.roles[start : start + 1] != ("assistant",):
        return UNKNOWN_ROLE
    return next((role for role in call.roles[start + 1 :] if role != "assistant"), UNKNOWN_ROLE)


class _Blocks:
    """Tokens as bytes, with one key for every beginning of whole blocks.

    Keys are hashes of 64 bits: equal ones are a reason to compare, never an answer.
    """

    __slots__ = ("data", "keys", "size")

    def __init__(self, ids: array[int], begun: _Blocks | None = None) -> None:
        """`begun`: the blocks of a beginning of `ids`; its keys are not computed again."""
        self.data = ids.tobytes()
        self.size = BLOCK_TOKENS * ids.itemsize
        self.keys: list[int] = [0] if begun is None else list(begun.keys)
        for start in range((len(self.keys) - 1) * self.size, len(self.data) - self.size + 1, self.size):
            self.keys.append(hash((self.keys[-1], self.data[start : start + self.size])))

    @property
    def rest(self) -> bytes:
        """What follows the last whole block."""
        return self.data[(len(self.keys) - 1) * self.size :]


@dataclass(slots=True)
class _Beginning:
    """Tokens that a later prompt may begin with: the prompt of some calls, or that and what they sampled."""

    length: int
    with_sampled: bool
    calls: list[tuple[float, float, str, CapturedCall, Chain]] = field(default_factory=list)
    """Of equal tokens; first finished, then first started, first."""

    def add(self, call: CapturedCall, chain: Chain) -> None:
        bisect.insort(self.calls, (call.finished, call.started, call.call_id, call, chain))

    def open_chain(self, call: CapturedCall) -> Chain | None:
        """The first chain that a call may continue here."""
        for finished, _, _, earlier, chain in self.calls:
            if finished > call.started:
                return None
            if chain.calls[-1] is earlier and _begins(call.prompt_ids, earlier, self.with_sampled):
                return chain
        return None

    @property
    def first_finished(self) -> float:
        return self.calls[0][0]

    @property
    def last_finished(self) -> float:
        return self.calls[-1][0]


def _begins(prompt_ids: array[int], call: CapturedCall, with_sampled: bool) -> bool:
    return first_difference(prompt_ids, call.prompt_ids, call.token_ids if with_sampled else _NOTHING) is None


class _Beginnings:
    """Finds what a prompt begins with."""

    def __init__(self, *, with_sampled: bool) -> None:
        self._with_sampled = with_sampled
        self._buckets: dict[int, dict[bytes, _Beginning]] = {}

    def add(self, blocks: _Blocks, call: CapturedCall, chain: Chain) -> None:
        bucket = self._buckets.setdefault(blocks.keys[-1], {})
        rest = blocks.rest
        if rest not in bucket:
            length = len(call.prompt_ids) + (len(call.token_ids) if self._with_sampled else 0)
            bucket[rest] = _Beginning(length, self._with_sampled)
        bucket[rest].add(call, chain)

    def of(self, seen: _Blocks) -> Iterator[_Beginning]:
        """What a prompt begins with, but for a collision of keys; longest first."""
        for index in range(len(seen.keys) - 1, -1, -1):
            bucket = self._buckets.get(seen.keys[index])
            if bucket is not None:
                start = index * seen.size
                fitting = [found for rest, found in bucket.items() if seen.data.startswith(rest, start)]
                yield from sorted(fitting, key=lambda found: -found.length)

    def longest(self, seen: _Blocks, prompt_ids: array[int]) -> _Beginning | None:
        for found in self.of(seen):
            if _begins(prompt_ids, found.calls[0][3], self._with_sampled):
                return found
        return None


class _History:
    """What earlier calls saw and sampled."""

    def __init__(self) -> None:
        self._prompts = _Beginnings(with_sampled=False)
        self._contexts = _Beginnings(with_sampled=True)

    def add(self, call: CapturedCall, seen: _Blocks, chain: Chain) -> None:
        self._prompts.add(seen, call, chain)
        self._contexts.add(_Blocks(call.prompt_ids + call.token_ids, begun=seen), call, chain)

    def claim(self, call: CapturedCall, seen: _Blocks) -> Chain | None:
        """The chain that a call continues; None if there is none."""
        for context in self._contexts.of(seen):
            chain = context.open_chain(call)
            if chain is not None:
                return chain
        return None

    def why(self, call: CapturedCall, seen: _Blocks) -> str:
        """Why a call continues no chain: the longest beginning that it shares with an earlier call tells."""
        prompt = self._prompts.longest(seen, call.prompt_ids)
        context = self._contexts.longest(seen, call.prompt_ids)
        prompt_length = prompt.length if prompt else 0
        if prompt and prompt_length == len(call.prompt_ids):
            return SENT_IN_PARALLEL if prompt.last_finished > call.started else SENT_AGAIN
        if context and context.length >= prompt_length:
            return CONTINUED_TWICE if context.first_finished <= call.started else NOT_FINISHED
        return REWRITTEN if prompt else NEW_BEGINNING
