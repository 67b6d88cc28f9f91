"""Response masks: the worked example, and every way to get one wrong."""

from __future__ import annotations

import re

import pytest

from rollout.errors import PrefixError
from rollout.remote.mask import MaskBook, MaskHints, check_mask, expect_mask

P1 = list(range(10))
G1 = [100, 101, 102, 103, 104, 105]
ADDED = list(range(200, 212))
G2 = [300, 301, 302, 303, 304]


def test_the_worked_example():
    book = MaskBook()
    assert book.prompt(P1) is None
    book.answer(G1)
    assert book.last == 16
    assert book.prompt(P1 + G1 + ADDED) == [0] * 12
    book.answer(G2)
    assert book.response_ids.tolist() == G1 + ADDED + G2
    assert book.response_mask.tolist() == [1] * 6 + [0] * 12 + [1] * 5


def test_an_end_of_turn_that_was_not_sampled_is_the_first_zero():
    book = MaskBook()
    book.prompt(P1)
    book.answer(G1[:-1])
    assert book.prompt(P1 + G1 + ADDED) == [0] * 13


def test_a_third_call_counts_from_the_second_answer():
    book = MaskBook()
    context = list(P1)
    for size in (12, 7, 3):
        book.prompt(context)
        book.answer(G2)
        context = context + G2 + ADDED[:size]
    assert book.prompt(context) == [0] * 3
    assert len(book.response_mask) == len(book.response_ids) == 3 * 5 + 12 + 7 + 3


def test_nothing_added_is_no_mask():
    book = MaskBook()
    book.prompt(P1)
    book.answer(G1)
    assert book.prompt(P1 + G1) is None


@pytest.mark.parametrize(
    ("prompt", "position"),
    [
        (P1 + G1[:3], "position 13"),
        ([*P1[:9], 99, *G1, *ADDED], "position 9"),
        ([*P1, *G1[:5], 99, *ADDED], "position 15"),
    ],
)
def test_a_past_that_changes_is_an_error_even_at_the_same_length(prompt: list[int], position: str):
    book = MaskBook()
    book.prompt(P1)
    book.answer(G1)
    with pytest.raises(PrefixError, match=position):
        book.prompt(prompt)
    assert book.response_ids.tolist() == G1
    assert book.prompt(P1 + G1 + ADDED) == [0] * 12


def test_prompts_and_answers_alternate():
    book = MaskBook()
    with pytest.raises(PrefixError, match="without a prompt"):
        book.answer(G1)
    book.prompt(P1)
    with pytest.raises(PrefixError, match="two prompts"):
        book.prompt(P1)


def test_the_one_right_mask():
    assert expect_mask(12, first=True) is None
    assert expect_mask(0, first=False) is None
    assert expect_mask(3, first=False) == [0, 0, 0]
    with pytest.raises(PrefixError, match="2 tokens less"):
        expect_mask(-2, first=False)


@pytest.mark.parametrize("given", [None, []])
def test_right_masks_pass(given: list[int] | None):
    assert check_mask(given, 0, first=True) is None
    assert check_mask(given, 55, first=True) is None
    assert check_mask(given, 0, first=False) is None
    assert check_mask([0] * 12, 12, first=False) is None


HINTS = MaskHints(prompt=28, answer=6, text=4)


@pytest.mark.parametrize(
    ("given", "added", "first", "told"),
    [
        ([0] * 10, 10, True, "first call"),
        (None, 12, False, "missing.*12 zeros"),
        ([], 12, False, "missing"),
        ([0] * 4, 12, False, "text alone"),
        ([0] * 28, 12, False, "whole prompt"),
        ([0] * 18, 12, False, "6 more.*answer before"),
        ([0] * 13, 12, False, "one more.*end-of-turn"),
        ([0] * 11, 12, False, "one less.*end-of-turn"),
        ([0] * 9, 12, False, "9 values, but 12.*tokenizer"),
        ([0] * 12, 0, False, "12 values, but 0"),
        ([0, 2, 0], 3, False, r"\[1\] is 2"),
        ([0, 1, 1], 3, False, r"\[1\] is 1 \(2 of 3"),
        (None, -3, False, "shorter by 3"),
        ([0] * 3, -3, False, "shorter by 3"),
    ],
)
def test_every_pitfall_is_named(given: list[int] | None, added: int, first: bool, told: str):
    problem = check_mask(given, added, first=first, hints=HINTS)
    assert problem is not None
    assert re.search(told, problem), problem


def test_what_is_known_of_the_end_of_turn_is_said():
    sampled = check_mask([0] * 13, 12, first=False, hints=MaskHints(end_of_turn_sampled=True))
    missing = check_mask([0] * 11, 12, first=False, hints=MaskHints(end_of_turn_sampled=False))
    assert sampled is not None and "here it did" in sampled
    assert missing is not None and "here it does not" in missing
