"""The ledger's invariants, by example and by property."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.engine import Generation, VersionSpan
from rollout.errors import LedgerError, PrefixError
from rollout.ledger import NOT_SAMPLED, Ledger, expand_versions, first_difference


def generation(ids: list[int], *, versions: list[VersionSpan] | None = None, logprobs: list[float] | None = None):
    return Generation(
        token_ids=array("i", ids),
        logprobs=array("f", [-0.5] * len(ids) if logprobs is None else logprobs),
        versions=[VersionSpan(0, 0, len(ids))] if versions is None else versions,
        finish_reason="stop",
    )


def test_two_turns_with_a_tool_between():
    ledger = Ledger()
    ledger.open([1, 2, 3])
    ledger.sample(generation([10, 11]), seconds=1.0)
    added = ledger.observe([1, 2, 3, 10, 11, 20, 21], role="tool", seconds=0.5)
    ledger.sample(generation([12]), seconds=2.0)

    (segment,) = ledger.segments
    assert added == 2
    assert segment.prompt_ids.tolist() == [1, 2, 3]
    assert segment.response_ids.tolist() == [10, 11, 20, 21, 12]
    assert segment.response_mask.tolist() == [1, 1, 0, 0, 1]
    assert segment.logprobs.tolist() == [-0.5, -0.5, 0, 0, -0.5]
    assert segment.policy_versions.tolist() == [0, 0, NOT_SAMPLED, NOT_SAMPLED, 0]
    assert [(t.role, t.start, t.end, t.seconds) for t in segment.turns] == [
        ("assistant", 0, 2, 1.0),
        ("tool", 2, 4, 0.5),
        ("assistant", 4, 5, 2.0),
    ]
    assert segment.num_sampled == 3
    assert ledger.context().tolist() == [1, 2, 3, 10, 11, 20, 21, 12]


def test_a_prompt_of_the_same_length_that_differs_in_one_token_is_refused():
    ledger = Ledger()
    ledger.open([1, 2, 3])
    ledger.sample(generation([10, 11]), 0)
    with pytest.raises(PrefixError, match="position 4"):
        ledger.observe([1, 2, 3, 10, 99, 20], role="tool")
    with pytest.raises(PrefixError, match="position 0"):
        ledger.observe([9, 2, 3, 10, 11, 20], role="tool")
    with pytest.raises(PrefixError, match="position 4"):
        ledger.observe([1, 2, 3, 10], role="tool")
    assert ledger.segments[0].response_ids.tolist() == [10, 11], "a refused prompt leaves no trace"


def test_a_fork_starts_a_segment_and_keeps_the_old_one():
    ledger = Ledger()
    ledger.open([1])
    ledger.sample(generation([10]), 0)
    ledger.open([1, 5, 6], fork_reason="history was rewritten")
    ledger.sample(generation([11, 12]), 0)
    first, second = ledger.segments
    assert (first.response_ids.tolist(), first.fork_reason) == ([10], None)
    assert (second.prompt_ids.tolist(), second.fork_reason) == ([1, 5, 6], "history was rewritten")
    assert ledger.num_response_tokens == 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (generation([10, 11], logprobs=[-0.1]), "2 sampled tokens came with 1 log-probabilities"),
        (generation([10], logprobs=[float("nan")]), "nan is not a log-probability"),
        (generation([10], logprobs=[0.5]), "0.5 is not a log-probability"),
        (generation([10], logprobs=[-float("inf")]), "-inf is not a log-probability"),
        (generation([10, 11], versions=[VersionSpan(0, 0, 1)]), "2 sampled tokens came with versions for 1"),
        (generation([10, 11], versions=[]), "2 sampled tokens came with versions for 0"),
        (generation([10, 11], versions=[VersionSpan(0, 0, 1), VersionSpan(1, 0, 2)]), "does not follow token 1"),
        (generation([10], versions=[VersionSpan(-1, 0, 1)]), "cannot carry version -1"),
    ],
)
def test_what_does_not_fit_together_is_refused(bad: Generation, message: str):
    ledger = Ledger()
    ledger.open([1])
    with pytest.raises(LedgerError, match=message):
        ledger.sample(bad, 0)
    assert len(ledger.segments[0].response_ids) == 0


def test_the_order_of_writes_is_enforced():
    ledger = Ledger()
    with pytest.raises(LedgerError, match="no segment is open"):
        ledger.sample(generation([1]), 0)
    with pytest.raises(LedgerError, match="at least one token"):
        ledger.open([])
    with pytest.raises(LedgerError, match="no fork reason"):
        ledger.open([1], fork_reason="but there is nothing to fork from")
    ledger.open([1])
    with pytest.raises(LedgerError, match="no fork reason, every later one has one"):
        ledger.open([1])
    with pytest.raises(LedgerError, match="two prompts in a row"):
        ledger.observe([1, 2], role="user")
    ledger.sample(generation([2]), 0)
    with pytest.raises(LedgerError, match="two generations in a row"):
        ledger.sample(generation([3]), 0)


def test_versions_of_a_generation_that_lived_through_a_weight_update():
    spans = [VersionSpan(6, 0, 2), VersionSpan(7, 2, 5)]
    assert expand_versions(spans, 5).tolist() == [6, 6, 7, 7, 7]


tokens = st.lists(st.integers(0, 2**31 - 1), max_size=12)
turn = st.tuples(tokens, tokens, st.integers(0, 3), st.booleans())


@given(prompt=tokens.filter(bool), turns=st.lists(turn, min_size=1, max_size=6))
def test_any_course_of_turns_keeps_the_invariants(prompt, turns):
    """Sampled and observed tokens come back exactly, whatever their values, lengths and forks."""
    ledger = Ledger()
    ledger.open(prompt)
    sampled_in, expected = [], []
    context = list(prompt)
    for index, (sampled, observed, version, fork) in enumerate(turns):
        ledger.sample(generation(sampled, versions=[VersionSpan(version, 0, len(sampled))]), 0)
        context += sampled
        sampled_in += sampled
        expected += [(token, 1, version) for token in sampled]
        assert ledger.context().tolist() == context
        if index == len(turns) - 1:
            break
        if fork:
            context = [7, *observed]
            ledger.open(context, fork_reason="test")
        else:
            context += observed
            assert ledger.extends(context)
            assert ledger.observe(context, role="tool") == len(observed)
            expected += [(token, 0, NOT_SAMPLED) for token in observed]
        context = list(context)

    segments = ledger.segments
    got = []
    for segment in segments:
        count = len(segment.response_ids)
        assert len(segment.response_mask) == len(segment.logprobs) == len(segment.policy_versions) == count
        got += zip(segment.response_ids, segment.response_mask, segment.policy_versions, strict=True)
        for mask, version, logprob in zip(
            segment.response_mask, segment.policy_versions, segment.logprobs, strict=True
        ):
            assert (mask == 1) == (version >= 0)
            assert mask == 1 or logprob == 0
        covered = [index for span in segment.turns for index in range(span.start, span.end)]
        assert covered == list(range(count)), "turns tile the response"
    assert got == expected
    assert [token for token, mask, _ in got if mask] == sampled_in, "each sampled token is there exactly once"


@given(prefix=tokens, rest=tokens, more=tokens, position=st.integers(0, 30), delta=st.integers(1, 5))
def test_first_difference_finds_the_first_changed_token(prefix, rest, more, position, delta):
    context = prefix + rest
    as_arrays = (array("i", prefix), array("i", rest))
    assert first_difference(array("i", context + more), *as_arrays) is None
    if position < len(context):
        changed = list(context) + more
        changed[position] = (changed[position] + delta) % 2**31
        assert first_difference(array("i", changed), *as_arrays) == position
        assert first_difference(array("i", context[:position]), *as_arrays) == position
