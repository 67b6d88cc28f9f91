"""The fast tokenizer gives exactly transformers' ids, and says that it has no offsets."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rollout.fast_tokenizer import REMEMBERED_CHARS, FastTokenizer
from tests.conftest import MODEL

SLOW = AutoTokenizer.from_pretrained(MODEL)
FAST = FastTokenizer(SLOW)
SPECIALS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "\n", " ", "é", "日本"]

texts = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(SPECIALS))).map("".join)


@given(texts)
def test_the_ids_are_those_of_transformers(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    expected = SLOW.encode(text, add_special_tokens=False)
    assert FAST.encode(text) == expected
    assert FAST.encode(text) == expected, "and again, from memory"
    assert FAST.decode(expected, skip_special_tokens=False) == SLOW.decode(expected, skip_special_tokens=False)


def test_what_is_remembered_cannot_be_spoilt():
    first = FAST.encode("assistant\n")
    first.append(0)
    assert FAST.encode("assistant\n") == SLOW.encode("assistant\n", add_special_tokens=False)


def test_long_texts_are_not_remembered():
    FAST.encode("x" * (REMEMBERED_CHARS + 1))
    before = FAST._short.cache_info().currsize
    FAST.encode("y" * (REMEMBERED_CHARS + 1))
    assert FAST._short.cache_info().currsize == before


def test_it_offers_no_call_and_so_no_offsets():
    with pytest.raises(AttributeError):
        _ = FAST.__call__
    assert FAST.vocab_size == SLOW.vocab_size, "the rest is transformers'"


def test_a_copy_for_another_thread_is_independent():
    twin = copy.deepcopy(FAST)
    assert twin.transformers is not SLOW
    assert twin.encode("What is 1 + 2?") == FAST.encode("What is 1 + 2?")
