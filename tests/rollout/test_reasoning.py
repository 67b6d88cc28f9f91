"""Reasoning spans: found by tokens in what was sampled, in every chat format whose markers are known."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.ledger import Segment, TurnSpan
from rollout.reasoning import ReasoningMarkers, find_markers, mark_reasoning, reasoning_spans
from tests.rollout.harmony import HarmonyTokenizer

OPEN, CLOSE, STOP = 900, 901, 902
THINK = ReasoningMarkers((OPEN,), frozenset({CLOSE, STOP}))
NEXT = (3, 4, 5)
"""What is rendered between two turns."""


def segment(prompt: Sequence[int], *turns: Sequence[int]) -> Segment:
    """Assistant turns with NEXT between them."""
    response: list[int] = []
    mask: list[int] = []
    spans = []
    for number, turn in enumerate(turns):
        if number:
            spans.append(TurnSpan("tool", len(response), len(response) + len(NEXT), 0.0))
            response += NEXT
            mask += [0] * len(NEXT)
        spans.append(TurnSpan("assistant", len(response), len(response) + len(turn), 0.0))
        response += turn
        mask += [1] * len(turn)
    return Segment(
        array("i", prompt),
        array("i", response),
        array("b", mask),
        array("f", [0.0] * len(response)),
        array("i", [0 if m else -1 for m in mask]),
        spans,
    )


@pytest.mark.parametrize(
    ("turn", "spans"),
    [
        ([OPEN, 7, 8, CLOSE, 9, STOP], [(1, 3)]),
        ([7, 8, STOP], []),
        ([OPEN, CLOSE, 9, STOP], []),
        ([OPEN, 7, CLOSE, 9, OPEN, 8, CLOSE, STOP], [(1, 2), (5, 6)]),
        # Cut inside its reasoning, by length or by its own end of turn.
        ([OPEN, 7, 8], [(1, 3)]),
        ([OPEN, 7, STOP], [(1, 2)]),
        # A close without an open closes nothing, an open inside is text.
        ([7, CLOSE, 8], []),
        ([OPEN, 7, OPEN, 8, CLOSE, 9], [(1, 4)]),
        ([OPEN], []),
    ],
)
def test_one_turn(turn: list[int], spans: list[tuple[int, int]]):
    assert reasoning_spans(segment([1, 2], turn), THINK) == spans


def test_a_prompt_may_open_the_reasoning():
    """Many templates end the prompt with the opening marker, so that the model never samples it."""
    assert reasoning_spans(segment([1, STOP, 2, OPEN, 6], [7, 8, CLOSE, 9, STOP]), THINK) == [(0, 2)]
    assert reasoning_spans(segment([1, STOP, 2, OPEN, 6, CLOSE, 6], [7, 8]), THINK) == []


def test_what_somebody_else_wrote_opens_nothing():
    """A user may write the marker; the end of their message ends it."""
    assert reasoning_spans(segment([1, OPEN, 5, STOP, 2], [7, 8, STOP]), THINK) == []


def test_turns_are_counted_in_the_response():
    spans = reasoning_spans(segment([1], [OPEN, 7, CLOSE, STOP], [8, OPEN, 9, CLOSE, STOP]), THINK)
    # The second turn begins behind four tokens and NEXT.
    assert spans == [(1, 2), (9, 10)]


def test_a_stretch_that_nothing_ends_is_cut_at_the_turns():
    assert reasoning_spans(segment([1], [OPEN, 7], [8, 9]), THINK) == [(1, 2), (5, 7)]


def test_no_sampled_turn_no_spans():
    bare = Segment(array("i", [OPEN, 1, 2]))
    assert reasoning_spans(bare, THINK) == []


def test_bytes_that_look_like_a_marker_are_none():
    """900 is 0x384: its bytes also appear across two tokens."""
    shifted = [0x38400, 0x0, 0x84000003, 0x3]
    ids = [value if value < 2**31 else value - 2**32 for value in shifted]
    assert reasoning_spans(segment([1], [*ids, 7]), THINK) == []


tokens = st.sampled_from([1, 7, OPEN, CLOSE, STOP])


@given(st.lists(tokens, min_size=1, max_size=12), st.lists(st.lists(tokens, max_size=12), min_size=1, max_size=4))
def test_spans_are_sampled_apart_and_without_markers(prompt: list[int], turns: list[list[int]]):
    made = segment(prompt, *turns)
    spans = reasoning_spans(made, THINK)
    last = 0
    for start, end in spans:
        assert last <= start < end
        assert set(made.response_mask[start:end]) == {1}
        assert not {CLOSE, STOP} & set(made.response_ids[start:end])
        last = end


def test_unknown_markers_are_null_and_not_empty():
    known, unknown = segment([1], [OPEN, 7]), segment([1], [OPEN, 7])
    mark_reasoning([known], THINK)
    mark_reasoning([unknown], None)
    assert (known.reasoning_spans, unknown.reasoning_spans) == ([(1, 2)], None)


# Finding the markers


class Vocabulary:
    """Words of a list are one token each; anything else is its characters."""

    def __init__(self, *words: str) -> None:
        self.words = list(words)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [self.words.index(text)] if text in self.words else [1000 + ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] if i < 1000 else chr(i - 1000) for i in ids)


def test_markers_of_a_think_model():
    found = find_markers(Vocabulary("<end>", "<think>", "</think>"), [0])
    assert found == ReasoningMarkers((1,), frozenset({0, 2}))


def test_no_markers_where_they_are_not_tokens_of_their_own():
    assert find_markers(Vocabulary("<end>"), [0]) is None
    assert find_markers(Vocabulary("<end>", "<think>"), [0]) is None
    assert find_markers(Vocabulary("<think>", "</think>", "[THINK]", "[/THINK]"), [0]) is None, "which of them?"


def test_a_token_for_everything_unknown_is_no_marker():
    class Unknown(Vocabulary):
        def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
            return [0]

    assert find_markers(Unknown("<unk>"), [0]) is None


def test_the_demo_model_reasons_between_its_markers(chat):
    markers = find_markers(chat.tokenizer, chat.stop_token_ids)
    assert markers is not None
    said = chat.tokenizer.encode("<think>\nI add.\n</think>\n\n5<|im_end|>")
    made = segment(chat.render([{"role": "user", "content": "2+3?"}], []), said)
    ((start, end),) = reasoning_spans(made, markers)
    assert chat.decode(made.response_ids[start:end]) == "\nI add.\n"


@pytest.mark.parametrize("opened", [True, False])
def test_harmonys_analysis_channel(opened: bool):
    """The renderer's prompt opens the channel; vLLM's leaves it to the model."""
    tokenizer = HarmonyTokenizer()
    markers = find_markers(tokenizer, [200002, 200012])
    assert markers is not None
    header = "<|channel|>analysis<|message|>"
    prompt = "<|start|>user<|message|>2+3?<|end|><|start|>assistant" + (header if opened else "")
    said = ("" if opened else header) + (
        "I should add.<|end|><|start|>assistant<|channel|>analysis to=python code<|message|>1+1<|call|>"
        "<|start|>assistant<|channel|>final<|message|>5<|return|>"
    )
    made = segment(tokenizer.encode(prompt), tokenizer.encode(said))
    spans = reasoning_spans(made, markers)
    assert [tokenizer.decode(made.response_ids[start:end]) for start, end in spans] == ["I should add."]
