"""Which call continues which: by example, against a plain search, and by property over random trees of calls."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.capture import segments as room
from rollout.capture.calls import CapturedCall
from rollout.capture.segments import (
    CONTINUED_TWICE,
    FORK_REASONS,
    NEW_BEGINNING,
    NOT_FINISHED,
    REWRITTEN,
    SENT_AGAIN,
    SENT_IN_PARALLEL,
    Chain,
    chains,
    segments,
    to_segments,
)
from rollout.errors import LedgerError
from rollout.ledger import NOT_SAMPLED, Segment
from rollout.record import check, to_table
from rollout.trajectory import SessionKey, Trajectory
from tests.rollout.capture.made_calls import made


def shape(calls: list[CapturedCall]) -> list[tuple[list[str], str | None]]:
    return [([call.call_id for call in chain.calls], chain.fork_reason) for chain in chains(calls)]


def test_a_conversation_is_one_segment_with_masked_observations():
    calls = [
        made([1, 2], [10, 11], 0.0, 1.0, version=4),
        made([1, 2, 10, 11, 20, 21], [12], 3.0, 3.5, version=5),
        made([1, 2, 10, 11, 20, 21, 12], [13], 4.0, 5.0, version=5),
    ]
    (segment,) = segments(calls)
    assert segment.fork_reason is None
    assert segment.prompt_ids.tolist() == [1, 2]
    assert segment.response_ids.tolist() == [10, 11, 20, 21, 12, 13]
    assert segment.response_mask.tolist() == [1, 1, 0, 0, 1, 1]
    assert segment.logprobs.tolist() == [-0.5, -0.5, 0, 0, -0.5, -0.5]
    assert segment.policy_versions.tolist() == [4, 4, NOT_SAMPLED, NOT_SAMPLED, 5, 5]
    assert [(t.role, t.start, t.end, t.seconds) for t in segment.turns] == [
        ("assistant", 0, 2, 1.0),
        ("unknown", 2, 4, 2.0),
        ("assistant", 4, 5, 0.5),
        ("assistant", 5, 6, 1.0),
    ]


def test_no_calls_no_segments():
    assert segments([]) == []


def test_a_retry_forks_with_its_whole_prompt():
    first, again = made([1, 2], [10]), made([1, 2], [11])
    assert shape([first, again]) == [([first.call_id], None), ([again.call_id], SENT_AGAIN)]
    assert segments([first, again])[1].prompt_ids.tolist() == [1, 2]


def test_parallel_samples_of_one_prompt_fork_and_each_goes_on_by_itself():
    one, two = made([1], [10], 0, 2), made([1], [11], 0, 3)
    after_two, after_one = made([1, 11, 5], [12], 4, 5), made([1, 10, 5], [13], 4, 6)
    assert shape([one, two, after_two, after_one]) == [
        ([one.call_id, after_one.call_id], None),
        ([two.call_id, after_two.call_id], SENT_IN_PARALLEL),
    ]


def test_a_context_is_continued_by_one_call_and_the_other_forks():
    root = made([1], [10])
    left, right = made([1, 10, 5], [11]), made([1, 10, 6], [12])
    assert shape([root, left, right]) == [
        ([root.call_id, left.call_id], None),
        ([right.call_id], CONTINUED_TWICE),
    ]
    second = segments([root, left, right])[1]
    assert second.prompt_ids.tolist() == [1, 10, 6], "what the first segment trains on is prompt here"
    assert second.response_mask.tolist() == [1]


def test_a_call_that_began_before_the_other_had_finished_does_not_continue_it():
    early, late = made([1], [10], 0.0, 5.0), made([1, 10, 7], [11], 4.0, 6.0)
    assert shape([early, late])[1] == ([late.call_id], NOT_FINISHED)
    just_in_time = made([1, 10, 7], [11], 5.0, 6.0)
    assert len(shape([early, just_in_time])) == 1


def test_a_rewritten_history_forks():
    """As where a template drops the thinking of an earlier turn."""
    first = made([1, 2], [90, 91, 10])
    stripped = made([1, 2, 10, 3], [11])
    assert shape([first, stripped])[1] == ([stripped.call_id], REWRITTEN)


def test_a_sub_agent_forks_and_the_main_conversation_goes_on():
    main = made([1, 2], [10])
    helper, helper_on = made([7, 8], [11]), made([7, 8, 11, 9], [12])
    back = made([1, 2, 10, 12], [13])
    assert shape([main, helper, helper_on, back]) == [
        ([main.call_id, back.call_id], None),
        ([helper.call_id, helper_on.call_id], NEW_BEGINNING),
    ]


def test_the_longest_chain_is_continued():
    """The second call could have continued the first by its tokens, but began too early; the third continues it."""
    short, long = made([1], [10], 0, 5), made([1, 10], [11], 1, 5)
    onward = made([1, 10, 11, 2], [12], 6, 7)
    assert shape([short, long, onward]) == [
        ([short.call_id], None),
        ([long.call_id, onward.call_id], NOT_FINISHED),
    ]


def test_of_equal_contexts_the_one_that_finished_first_is_continued():
    slow, fast = made([1], [10], 0, 4, call_id="a"), made([1], [10], 1, 3, call_id="b")
    onward, other = made([1, 10, 2], [11], 5, 6, call_id="c"), made([1, 10, 2], [12], 5, 7, call_id="d")
    assert shape([other, onward, slow, fast]) == [(["a", "d"], None), (["b", "c"], SENT_IN_PARALLEL)]


def test_a_call_that_sampled_nothing_is_no_turn_and_stands_in_nobodys_way():
    root = made([1], [10])
    nothing = made([1, 10, 5], [], finish_reason="abort")
    retry = made([1, 10, 5], [11])
    assert shape([root, nothing, retry]) == [([root.call_id, retry.call_id], None)]
    assert segments([nothing]) == []


def test_a_call_that_was_cut_off_can_be_continued():
    cut = made([1], [10, 11], finish_reason="abort")
    onward = made([1, 10, 11, 4], [12])
    assert [s.response_mask.tolist() for s in segments([cut, onward])] == [[1, 1, 0, 1]]


def test_calls_of_one_moment_are_ordered_by_what_extends_what():
    root, onward = made([1], [10], 1, 1, call_id="z"), made([1, 10, 2], [11], 1, 1, call_id="a")
    assert shape([onward, root]) == [(["z", "a"], None)]


def test_two_calls_of_one_id_are_refused():
    with pytest.raises(LedgerError, match="two captured calls are called 'x'"):
        chains([made([1], [2], call_id="x"), made([1], [2], call_id="x")])


def roles_of(*messages: dict[str, Any]) -> list[str]:
    """The role of what a second call adds, whose messages begin with the first call's."""
    first = made([1], [10], messages=[{"role": "user", "content": "q"}])
    second = made([1, 10, 5, 6], [11], messages=[{"role": "user", "content": "q"}, *messages])
    return [turn.role for turn in segments([first.without_messages(), second])[0].turns]


def test_observed_tokens_carry_the_role_of_the_first_new_message():
    answer = {"role": "assistant", "content": "a"}
    assert roles_of(answer, {"role": "tool"}, {"role": "user"}) == ["assistant", "tool", "assistant"]
    assert roles_of(answer, answer, {"role": "user"}) == ["assistant", "user", "assistant"]


def test_a_role_that_the_messages_do_not_show_is_unknown():
    for messages in [(), ({"role": "user"},), ({"role": "assistant"},), ({"type": "function_call_output"},)]:
        assert roles_of(*messages) == ["assistant", "unknown", "assistant"]


# Random trees of calls. Three tokens only, so that equal prompts and contexts also come about by chance.
token = st.integers(0, 2)
few = st.lists(token, max_size=4)
step = st.tuples(
    st.sampled_from(["extend", "again", "branch", "new", "rewrite", "swallow"]),
    st.integers(0, 30),  # which earlier call
    few,  # observed
    few,  # sampled
    st.integers(0, 3),  # start, after the earlier call's end; negative values overlap
    st.integers(0, 3),  # how long
    st.sampled_from(["stop", "stop", "length", "abort"]),
    st.integers(0, 2),  # version
)


def grown(steps: list[Any]) -> list[CapturedCall]:
    """Calls as an agent may make them. Each sampled token has a log-probability of its own: its name."""
    calls: list[CapturedCall] = []
    named = 0
    for number, (kind, which, observed, sampled, start, seconds, finish, version) in enumerate(steps):
        prompt, before = [1, *observed], 0.0
        if calls and kind != "new":
            parent = calls[which % len(calls)]
            asked, got = parent.prompt_ids.tolist(), parent.token_ids.tolist()
            prompt, before = asked + got + observed, parent.finished
            if kind == "again":
                prompt = asked
            elif kind == "branch":
                # While the parent may still be at work.
                before = parent.started
            elif kind == "rewrite":
                prompt = asked + got[1:] + observed
            elif kind == "swallow":
                prompt = prompt[which % len(prompt) :] or [0]
        if finish != "abort":
            sampled = sampled or [0]
        names = [-(named + index + 1) / 64 for index in range(len(sampled))]
        named += len(sampled)
        started = before + start
        calls.append(
            made(
                prompt,
                sampled,
                started,
                started + seconds,
                logprobs=names,
                version=version,
                finish_reason=finish,
                call_id=f"{number:02}",
            )
        )
    return calls


trees = st.lists(step, min_size=1, max_size=14).map(grown)


def plain_chains(calls: list[CapturedCall]) -> list[list[str]]:
    """The rule as it is written, each call compared with each."""
    found: list[list[CapturedCall]] = []
    for call in sorted((c for c in calls if len(c.token_ids)), key=lambda c: c.order):
        prompt = call.prompt_ids.tolist()
        fitting = []
        for chain in found:
            last = chain[-1]
            context = (last.prompt_ids + last.token_ids).tolist()
            if last.finished <= call.started and prompt[: len(context)] == context:
                fitting.append((-len(context), last.finished, last.started, last.call_id, chain))
        if fitting:
            min(fitting)[-1].append(call)
        else:
            found.append([call])
    return [[call.call_id for call in chain] for chain in found]


def spelled(found: list[Segment]) -> list[Any]:
    return [
        (s.prompt_ids, s.response_ids, s.response_mask, s.logprobs, s.policy_versions, s.turns, s.fork_reason)
        for s in found
    ]


def plain_reason(call: CapturedCall, earlier: list[CapturedCall]) -> str:
    prompt = call.prompt_ids.tolist()

    def begins(beginning: list[int]) -> bool:
        return prompt[: len(beginning)] == beginning

    same = [c for c in earlier if c.prompt_ids == call.prompt_ids]
    if same:
        return SENT_IN_PARALLEL if any(c.finished > call.started for c in same) else SENT_AGAIN
    asked = max((len(c.prompt_ids) for c in earlier if begins(c.prompt_ids.tolist())), default=0)
    contexts = [c for c in earlier if begins((c.prompt_ids + c.token_ids).tolist())]
    seen = max((c.num_tokens for c in contexts), default=0)
    if seen and seen >= asked:
        done = any(c.num_tokens == seen and c.finished <= call.started for c in contexts)
        return CONTINUED_TWICE if done else NOT_FINISHED
    return REWRITTEN if asked else NEW_BEGINNING


@pytest.mark.parametrize("block", [1, 2, 3, 64])
def test_any_tree_of_calls_is_trained_on_exactly_once(block: int):
    @settings(deadline=None, max_examples=120)
    @given(calls=trees, seed=st.integers(0, 2**32 - 1))
    def holds(calls: list[CapturedCall], seed: int) -> None:
        found = chains(calls)
        made_of = to_segments(found)

        trained = Counter(
            logprob
            for segment in made_of
            for logprob, mask in zip(segment.logprobs, segment.response_mask, strict=True)
            if mask
        )
        assert trained == Counter(logprob for call in calls for logprob in call.logprobs)
        assert all(count == 1 for count in trained.values())

        for chain, segment in zip(found, made_of, strict=True):
            last = chain.calls[-1]
            assert segment.prompt_ids == chain.calls[0].prompt_ids
            assert segment.prompt_ids + segment.response_ids == last.prompt_ids + last.token_ids
            position = 0
            for call in chain.calls:
                # Where the call's tokens lie in the segment: right behind its own prompt.
                position = len(call.prompt_ids) - len(segment.prompt_ids)
                end = position + len(call.token_ids)
                assert segment.response_ids[position:end] == call.token_ids
                assert segment.logprobs[position:end] == call.logprobs
                assert set(segment.policy_versions[position:end]) == {call.versions[0].version}
            for before, after in zip(chain.calls, chain.calls[1:], strict=False):
                assert before.finished <= after.started
            covered = [index for span in segment.turns for index in range(span.start, span.end)]
            assert covered == list(range(len(segment.response_ids)))
            assert sum(span.role == "assistant" for span in segment.turns) == len(chain.calls)

        assert [chain.fork_reason is None for chain in found] == [index == 0 for index in range(len(found))]
        assert {chain.fork_reason for chain in found[1:]} <= set(FORK_REASONS)
        check(to_table([Trajectory(SessionKey("r", "t", "r/t", 0), made_of, "stop", [])]))

        assert [[call.call_id for call in chain.calls] for chain in found] == plain_chains(calls)
        ordered = sorted((c for c in calls if len(c.token_ids)), key=lambda c: c.order)
        for chain in found[1:]:
            first = chain.calls[0]
            assert chain.fork_reason == plain_reason(first, ordered[: ordered.index(first)])

        shuffled = list(calls)
        random.Random(seed).shuffle(shuffled)
        assert spelled(segments(shuffled)) == spelled(made_of)

    with mock.patch.object(room, "BLOCK_TOKENS", block):
        holds()


def test_equal_keys_of_unequal_tokens_are_told_apart():
    """Keys are hashes; with all of them equal, the comparison of tokens still decides."""
    calls = [made([1, 2, 3, 4], [5, 6]), made([9, 2, 3, 4, 5, 6], [7]), made([1, 2, 3, 4, 5, 6], [8])]
    expected = plain_chains(calls)
    assert expected == [[calls[0].call_id, calls[2].call_id], [calls[1].call_id]]
    with (
        mock.patch.object(room, "BLOCK_TOKENS", 2),
        mock.patch.object(room, "hash", lambda value: 0, create=True),
    ):
        assert [[call.call_id for call in chain.calls] for chain in chains(calls)] == expected


@pytest.mark.parametrize("kind", ["conversation", "star", "equal star", "strangers"])
def test_prompts_are_compared_in_full_a_few_times_each_however_many_there_are(kind: str):
    count, base = 300, list(range(2_000))
    calls: list[CapturedCall] = []
    for number in range(count):
        prompt = {
            "conversation": [*base, *([7] * number)],
            "star": base,
            "equal star": base,
            "strangers": [number, *base],
        }[kind]
        calls.append(made(prompt, [7 if kind in ("conversation", "equal star") else number]))
    follow_ups = [made([*call.prompt_ids, *call.token_ids, 8], [9]) for call in calls[:count]]
    if kind != "conversation":
        calls += follow_ups
    with mock.patch.object(room, "first_difference", wraps=room.first_difference) as compared:
        found = chains(calls)
    assert compared.call_count <= 3 * len(calls)
    assert len(found) == (1 if kind == "conversation" else count)
    assert all(isinstance(chain, Chain) for chain in found)
