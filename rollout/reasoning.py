"""Where a model reasoned, found in its tokens: spans for the record, without text and without a tokenizer.

A chat format marks reasoning with tokens of its own (`<think>` and `</think>`, harmony's analysis channel). They are
looked for in the exact ids that the engine saw and sampled. A prompt may open the reasoning of the turn that follows
it, as many templates do; a turn that was cut inside its reasoning ends it.

Invariant: spans hold sampled tokens alone, lie inside assistant turns, and leave the markers out. A format whose
markers are not known, or are not tokens of their own, has no spans at all (None); nothing is guessed from text.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.ledger import IDS, Segment

Span = tuple[int, int]
"""Tokens `[start, end)` of a segment's response."""

# Opening and closing token, as they are written in the chat templates of open models.
_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
)
_HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
_HARMONY_CHANNEL = "analysis"


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The tokens around reasoning in one chat format."""

    begin: tuple[int, ...]
    """These tokens in a row begin it."""
    ends: frozenset[int]
    """Each of these ends it; those that end a turn or message are among them."""


def find_markers(tokenizer: Any, stop_token_ids: Iterable[int]) -> ReasoningMarkers | None:
    """The markers of a model, by its tokenizer (`encode`, `decode`); None where it has none that are known.

    `stop_token_ids`: what ends a turn. None as well where two kinds of markers are there: which is used is not known.
    """
    stops = frozenset(stop_token_ids)
    harmony = [_token(tokenizer, text) for text in _HARMONY]
    if None not in harmony:
        start, channel, message, *ends = (token for token in harmony if token is not None)
        name = _ids(tokenizer, _HARMONY_CHANNEL)
        # A header with a recipient (`analysis to=...`) is a call, and does not fit.
        return ReasoningMarkers((channel, *name, message), stops | {start, channel, *ends})
    pairs = [(_token(tokenizer, begin), _token(tokenizer, end)) for begin, end in _PAIRS]
    found = [(begin, end) for begin, end in pairs if begin is not None and end is not None]
    if len(found) != 1:
        return None
    ((begin, end),) = found
    return ReasoningMarkers((begin,), stops | {end})


def reasoning_spans(segment: Segment, markers: ReasoningMarkers) -> list[Span]:
    """The reasoning in a segment's assistant turns, ascending and apart; empty where nothing was reasoned."""
    spans: list[Span] = []
    offset = len(segment.prompt_ids)
    turns = [turn for turn in segment.turns if turn.role == "assistant"]
    if not turns:
        return spans
    number = 0
    for start, end in _stretches(segment.prompt_ids + segment.response_ids, markers):
        start, end = start - offset, end - offset
        while number < len(turns) and turns[number].end <= start:
            number += 1
        # A stretch that nothing ended may go on into the next turns; each has its own part of it.
        for turn in turns[number:]:
            if turn.start >= end:
                break
            inside = max(start, turn.start), min(end, turn.end)
            if inside[0] < inside[1]:
                spans.append(inside)
    return spans


def mark_reasoning(segments: Iterable[Segment], markers: ReasoningMarkers | None) -> None:
    """Write the spans into segments; None where the markers are not known."""
    for segment in segments:
        segment.reasoning_spans = None if markers is None else reasoning_spans(segment, markers)


def _stretches(context: array[int], markers: ReasoningMarkers) -> list[Span]:
    """From behind every beginning to the end that follows it, or to the end of all."""
    data, size = context.tobytes(), context.itemsize
    # At one position a beginning counts before an end: reasoning may be empty.
    events = [(at + len(markers.begin), 0) for at in _positions(data, markers.begin, size)]
    for token in markers.ends:
        events += [(at, 1) for at in _positions(data, (token,), size)]
    found: list[Span] = []
    begun: int | None = None
    for at, is_end in sorted(events):
        if not is_end:
            begun = at if begun is None else begun
        elif begun is not None:
            found.append((begun, at))
            begun = None
    if begun is not None:
        found.append((begun, len(context)))
    return found


def _positions(data: bytes, tokens: Sequence[int], size: int) -> list[int]:
    """Where tokens stand in a row. Searched as bytes, as a comparison of numbers one by one takes milliseconds."""
    wanted = array(IDS, tokens).tobytes()
    found = []
    at = data.find(wanted)
    while at >= 0:
        if at % size == 0:
            found.append(at // size)
        at = data.find(wanted, at + 1)
    return found


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _token(tokenizer: Any, text: str) -> int | None:
    """The one token that a text is; None where it is several, or none of this vocabulary's."""
    ids = _ids(tokenizer, text)
    # A vocabulary without it may have one token for everything that it does not know.
    return ids[0] if len(ids) == 1 and tokenizer.decode(ids) == text else None
