"""A captured session from its opening to its trajectory: states, limits, deadlines, rewards, its account."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.capture.session_book import (
    MAX_CORRELATION_CHARS,
    MAX_CORRELATION_IDS,
    CaptureLimits,
    CaptureSession,
    busy_seconds,
    overdue,
)
from rollout.errors import ApiError, ConflictError, RefusedError
from rollout.record import check, to_table
from rollout.trajectory import SessionKey, Trajectory
from tests.rollout.capture.made_calls import made

KEY = SessionKey("run", "task", "run/task", 2)


def opened(metadata: dict[str, Any] | None = None, **limits: Any) -> CaptureSession:
    return CaptureSession(KEY, limits=CaptureLimits(**limits), opened=0.0, metadata=metadata)


def rows(trajectory: Trajectory) -> list[dict[str, Any]]:
    table = to_table([trajectory])
    check(table)
    return table.to_pylist()


def test_a_session_from_its_opening_to_its_rows():
    question = {"role": "user", "content": "2 + 2?"}
    answer = {"role": "assistant", "content": "let me see"}
    result = {"role": "tool", "content": "4"}
    last = {"role": "assistant", "content": "4"}
    session = opened({"level": 2})
    assert session.state == "open"
    first = made([1, 2], [10, 11], 1.0, 2.0, call_id="a", messages=[question], answer=answer)
    assert session.add(first, now=2.0)
    second = made(
        [1, 2, 10, 11, 5],
        [12],
        4.0,
        4.5,
        call_id="b",
        messages=[question, answer, result],
        answer=last,
        api="messages",
    )
    assert session.add(second, now=4.5)
    side = made([8], [9], 2.5, 3.5, call_id="c", finish_reason="length")
    assert session.add(side, now=4.6)
    session.reward(1, turn_rewards={"b": 0.5}, now=5.0)
    assert session.state == "rewarded"
    trajectory = session.close(now=6.0)
    assert session.state == "closed"

    main, fork = rows(trajectory)
    assert (main["run"], main["task_id"], main["trajectory_id"]) == ("run", "task", "run/task/2")
    assert (main["segment_index"], fork["segment_index"], fork["num_segments"]) == (0, 1, 2)
    assert (main["prompt_ids"], main["response_ids"], main["response_mask"]) == (
        [1, 2],
        [10, 11, 5, 12],
        [1, 1, 0, 1],
    )
    assert [(turn["role"], turn["seconds"]) for turn in main["turns"]] == [
        ("assistant", 1.0),
        ("tool", 2.0),
        ("assistant", 0.5),
    ]
    assert (main["fork_reason"], fork["fork_reason"]) == (None, "the prompt begins with no earlier one")
    assert (main["stop_reason"], main["error"], main["reward"]) == ("stop", None, 1.0)
    assert main["turn_rewards"] == [None, 0.5, None], "one a turn of the policy, in the order of the segments"
    assert json.loads(main["messages"]) == [question, answer, result, last]
    assert main["timing"] == {"queue_s": 0.0, "engine_s": 2.5, "tool_s": 0.0, "env_s": 3.5, "total_s": 6.0}
    assert json.loads(main["metadata"]) == {
        "level": 2,
        "capture": {"calls": 3, "apis": {"chat": 2, "messages": 1}},
    }
    assert (main["tool_calls"], main["attempts"]) == ([], 1)


def test_closing_again_gives_the_same_trajectory():
    session = opened()
    session.add(made([1], [2]), now=1.0)
    trajectory = session.close(now=2.0)
    assert session.close(now=9.0) is trajectory
    assert session.cancel(now=9.0, why="too late") is trajectory
    assert session.expire(now=1e9) is None
    assert session.overdue(now=1e9) is None
    assert session.trajectory is trajectory
    assert trajectory.timing.total_s == 2.0


def test_what_comes_after_the_close_is_refused_and_what_is_repeated_is_not():
    session = opened()
    call = made([1], [2], call_id="a")
    session.add(call, now=1.0)
    session.reward(0.5, turn_rewards={"a": 0.25}, now=1.0)
    session.close(now=2.0)
    with pytest.raises(ConflictError, match="session 'run/task/2' is closed"):
        session.add(made([1], [2]), now=3.0)
    with pytest.raises(ConflictError, match="closed"):
        session.begin("b", now=3.0)
    assert session.add(call, now=3.0) is False
    session.reward(0.5, turn_rewards={"a": 0.25}, now=3.0)
    with pytest.raises(ConflictError, match=r"rewarded with 0\.5 before"):
        session.reward(1.0, now=3.0)
    assert session.close(now=4.0).reward == 0.5

    unscored = opened()
    unscored.add(made([1], [2]), now=1.0)
    assert unscored.close(now=2.0).reward is None
    with pytest.raises(ConflictError, match="closed"):
        unscored.reward(1.0, now=3.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "reward is nan; a reward is finite"),
        (float("inf"), "reward is inf"),
        (-float("inf"), "reward is -inf"),
        (1e39, r"reward is 1e\+39; a reward is finite and fits a float32"),
        (10**400, "reward is too large"),
        ("1.0", "reward is str, not a number"),
        ([1.0], "reward is list, not a number"),
    ],
)
def test_a_reward_that_is_no_finite_number_is_refused(value: Any, message: str):
    session = opened()
    session.add(made([1], [2], call_id="a"), now=1.0)
    with pytest.raises(ApiError, match=message) as whole:
        session.reward(value, now=1.0)
    assert whole.value.field == "reward"
    with pytest.raises(ApiError, match=r"turn_rewards\.a") as single:
        session.reward(0.5, turn_rewards={"a": value}, now=1.0)
    assert single.value.field == "turn_rewards.a"
    assert session.state == "open", "nothing is kept of a refused reward"
    assert session.close(now=2.0).reward is None


def test_rewards_come_in_parts_and_do_not_change():
    session = opened()
    for name in "abc":
        session.add(made([ord(name)], [2], call_id=name), now=1.0)
    session.reward(turn_rewards={"a": 1.0}, now=1.0)
    assert session.state == "rewarded"
    session.reward(turn_rewards={"a": 1.0, "c": -1}, now=1.0)
    with pytest.raises(ConflictError, match="call 'a' was rewarded with 1 before"):
        session.reward(turn_rewards={"b": 2.0, "a": 0.0}, now=1.0)
    with pytest.raises(RefusedError, match="no call 'd'") as unknown:
        session.reward(turn_rewards={"b": 2.0, "d": 0.0}, now=1.0)
    assert unknown.value.field == "turn_rewards.d"
    with pytest.raises(ApiError, match="give a reward, turn_rewards, or both"):
        session.reward(now=1.0)
    trajectory = session.close(now=2.0)
    assert trajectory.reward is None, "the sum of the turns is not what was said"
    assert trajectory.turn_rewards == [1.0, None, -1.0]


def test_a_reward_for_a_call_that_left_no_turn_is_accounted_for():
    session = opened()
    session.add(made([1], [2], call_id="a"), now=1.0)
    session.add(made([1], [], call_id="nothing", finish_reason="abort"), now=1.0)
    session.begin("late", now=1.0)
    session.begin("dead", now=1.0)
    session.reward(turn_rewards={"late": 1.0, "nothing": 2.0}, now=1.0)
    session.lose("dead", now=1.5)
    assert session.in_flight == {"late"}
    trajectory = session.close(now=2.0)
    assert trajectory.turn_rewards is None
    assert trajectory.metadata["capture"] == {
        "calls": 2,
        "apis": {"chat": 2},
        "calls_that_sampled_nothing": 1,
        "calls_not_reported": 2,
        "rewards_without_turn": {"late": 1.0, "nothing": 2.0},
    }


@pytest.mark.parametrize(("finish", "ending"), [("stop", "stop"), ("length", "length"), ("abort", "length")])
def test_the_ending_is_that_of_the_call_that_finished_last(finish: Any, ending: str):
    session = opened()
    session.add(made([1], [2], 1.0, 8.0, finish_reason=finish), now=8.0)
    session.add(made([5], [2], 2.0, 7.0, finish_reason="stop" if ending == "length" else "length"), now=8.0)
    session.reward(1.0, now=9.0)
    trajectory = session.close(now=9.0)
    assert (trajectory.stop_reason, trajectory.error, trajectory.reward) == (ending, None, 1.0)


def test_cut_turns_are_marked():
    session = opened()
    session.add(made([1], [2], call_id="a"), now=1.0)
    session.add(made([1, 2, 3], [4], call_id="b", finish_reason="abort"), now=1.0)
    session.add(made([1, 2, 3], [5], call_id="c", finish_reason="abort"), now=1.0)
    trajectory = session.close(now=2.0)
    assert trajectory.metadata["capture"]["cut_turns"] == [[0, 1], [1, 0]]
    assert trajectory.num_sampled == 3, "what was sampled is kept"


def test_a_session_without_a_token_is_an_error():
    silent = opened()
    silent.reward(1.0, now=1.0)
    trajectory = silent.close(now=1.0)
    assert trajectory.stop_reason == "error"
    assert trajectory.error == (
        "environment: the agent closed its session without a call; check that its base URL is the session's"
    )
    assert trajectory.reward is None
    assert len(rows(trajectory)) == 1

    speechless = opened()
    speechless.add(made([1], [], finish_reason="abort"), now=1.0)
    assert "none of its 1 calls sampled a token" in str(speechless.close(now=2.0).error)


def test_deadlines_are_values():
    limits = CaptureLimits(idle_seconds=10, session_seconds=100)
    times = {"opened": 0.0, "last_active": 50.0}
    assert overdue(limits, **times, in_flight=0, now=59.9) is None
    assert "no call for 10 s" in str(overdue(limits, **times, in_flight=0, now=60.0))
    assert overdue(limits, **times, in_flight=1, now=99.9) is None
    assert "within 100 s" in str(overdue(limits, **times, in_flight=1, now=100.0))
    assert overdue(limits, **times, in_flight=0, now=-5.0) is None


def test_a_client_that_never_closes_ends_by_a_deadline_with_what_it_left():
    session = opened(idle_seconds=10, session_seconds=100)
    session.begin("a", now=5.0)
    assert session.expire(now=80.0) is None, "a call is under way"
    session.add(made([1], [2], 5.0, 80.0, call_id="a"), now=80.0)
    session.reward(0.5, now=85.0)
    assert session.expire(now=94.9) is None
    trajectory = session.expire(now=95.0)
    assert trajectory is not None and session.state == "closed"
    assert (trajectory.stop_reason, trajectory.reward) == ("deadline", 0.5)
    assert trajectory.error == ("session_timeout: the client made no call for 10 s and did not close its session")
    assert session.close(now=96.0) is trajectory
    rows(trajectory)

    unscored = opened(idle_seconds=10, session_seconds=12)
    unscored.begin("lost", now=1.0)
    late = unscored.expire(now=12.0)
    assert late is not None
    assert (late.stop_reason, late.reward, late.segments) == ("deadline", None, [])
    assert late.metadata["capture"] == {"calls": 0, "calls_not_reported": 1}


def test_a_clock_that_is_set_back_shortens_no_deadline():
    session = opened(idle_seconds=10)
    session.add(made([1], [2]), now=50.0)
    session.add(made([1], [3]), now=20.0)
    assert session.overdue(now=55.0) is None
    assert session.overdue(now=60.0) is not None


def test_a_cancelled_session_keeps_its_tokens_and_is_not_scored():
    session = opened()
    session.add(made([1], [2]), now=1.0)
    session.reward(1.0, now=1.0)
    trajectory = session.cancel(now=2.0, why="the run was cancelled")
    assert (trajectory.stop_reason, trajectory.reward) == ("cancelled", None)
    assert trajectory.error == "cancelled: the run was cancelled"
    assert trajectory.num_sampled == 1
    rows(trajectory)


def test_calls_and_tokens_are_limited():
    session = opened(max_calls=2, max_tokens=10)
    session.begin("a", now=1.0)
    session.begin("a", now=1.0)
    session.begin("b", now=1.0)
    with pytest.raises(RefusedError, match=r"had its 2 calls \(max_calls\)"):
        session.begin("c", now=1.0)
    session.add(made([1] * 6, [2], call_id="a"), now=1.0)
    with pytest.raises(RefusedError, match=r"4 tokens would bring the session from 7 over its 10 \(max_tokens\)"):
        session.add(made([1] * 3, [2], call_id="b"), now=1.0)
    session.add(made([1] * 2, [2], call_id="c"), now=1.0)
    with pytest.raises(RefusedError, match=r"holds 2 calls \(max_calls\)"):
        session.add(made([1], [], call_id="d", finish_reason="abort"), now=1.0)
    assert session.num_tokens == 10
    assert [call.call_id for call in session.calls] == ["a", "c"]
    assert session.close(now=2.0).metadata["capture"]["calls_over_limits"] == 2

    full = opened(max_tokens=2)
    full.add(made([1], [2]), now=1.0)
    with pytest.raises(RefusedError, match=r"had its 2 tokens \(max_tokens\)"):
        full.begin("next", now=1.0)


def test_a_report_that_is_repeated_counts_once_and_another_call_of_its_id_is_refused():
    session = opened()
    assert session.add(made([1], [2], call_id="a"), now=1.0) is True
    assert session.add(made([1], [2], call_id="a"), now=1.0) is False
    with pytest.raises(ConflictError, match="another call was recorded as 'a'"):
        session.add(made([1], [3], call_id="a"), now=1.0)
    with pytest.raises(ConflictError, match="has had a call 'a'"):
        session.begin("a", now=1.0)
    assert session.num_tokens == 2


def test_texts_are_kept_of_the_newest_conversation_only():
    session = opened()
    new = made([1], [2], 5.0, 6.0, messages=[{"role": "user", "content": "new"}])
    old = made([3], [4], 1.0, 2.0, messages=[{"role": "user", "content": "old"}])
    bare = made([5], [6], 7.0, 8.0)
    for call in (new, old, bare):
        session.add(call, now=8.0)
    assert all(call.messages is None for call in session.calls)
    assert session.close(now=9.0).messages == [{"role": "user", "content": "new"}]


def test_metadata_does_not_clash():
    with pytest.raises(ApiError, match="may not have a key 'capture'") as refused:
        opened({"capture": 1})
    assert refused.value.field == "metadata"


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([], 0.0),
        ([(1, 2), (4, 6)], 3.0),
        ([(1, 4), (2, 3), (3, 6)], 5.0),
        ([(1, 9), (2, 3), (5, 6)], 8.0),
        ([(1, 2), (2, 3)], 2.0),
    ],
)
def test_parallel_calls_are_busy_once(spans: list[tuple[float, float]], seconds: float):
    assert busy_seconds([made([1], [2], *span) for span in spans]) == seconds


bits = st.integers(0, 1)
moment = st.tuples(st.integers(0, 6), st.integers(0, 3))


@settings(deadline=None, max_examples=60)
@given(
    calls=st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), min_size=1, max_size=4), st.lists(st.integers(0, 1), max_size=3), moment
        ),
        max_size=8,
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_trajectory_does_not_depend_on_the_order_of_reports(calls: list[Any], seed: int):
    reported = [
        made(
            prompt,
            sampled,
            start,
            start + seconds,
            call_id=str(number),
            finish_reason="stop" if sampled else "abort",
            messages=[{"role": "user", "content": str(number)}] if number % 3 else None,
        )
        for number, (prompt, sampled, (start, seconds)) in enumerate(calls)
    ]
    shuffled = list(reported)
    random.Random(seed).shuffle(shuffled)
    left, right = opened(), opened()
    for session, order in ((left, reported), (right, shuffled)):
        for call in order:
            session.add(call, now=10.0)
        session.reward(
            turn_rewards={call.call_id: float(call.call_id) for call in order}, now=10.0
        ) if order else None
    assert left.close(now=11.0) == right.close(now=11.0)
    assert to_table([left.close(now=11.0)]).equals(to_table([right.close(now=11.0)]))


def test_the_requests_of_a_session_can_be_found_from_its_trajectory():
    session = opened()
    for number, correlation in enumerate(["one", "two", "one", ""]):
        session.add(made([1, number], [2], 10.0 - number, 11.0 - number, correlation_id=correlation), now=12.0)
    assert session.close(now=13.0).metadata["capture"]["correlation_ids"] == ["one", "two"]

    crowded = opened()
    for number in range(MAX_CORRELATION_IDS + 5):
        crowded.add(made([1], [2], correlation_id=f"{number:03}" + "x" * 500), now=1.0)
    ids = crowded.close(now=13.0).metadata["capture"]["correlation_ids"]
    assert [text[:3] for text in ids] == [f"{number:03}" for number in range(MAX_CORRELATION_IDS)]
    assert {len(text) for text in ids} == {MAX_CORRELATION_CHARS}
