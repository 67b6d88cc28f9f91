"""Evaluation: the estimator against its definition, the interval against simulation, and who is counted where."""

from __future__ import annotations

import itertools
import json
import random
from array import array
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import RecordError, RolloutError
from rollout.evaluation import (
    CONFIDENCE,
    Evaluation,
    Line,
    default_ks,
    evaluate,
    mean_interval,
    metadata_tags,
    pass_at_k,
)
from rollout.ledger import Segment, TurnSpan
from rollout.record import SCHEMA, to_table
from rollout.trajectory import SessionKey, Trajectory


def segment(tokens: int = 2, turns: int = 1, fork_reason: str | None = None) -> Segment:
    """`turns` sampled turns and, after each, one of a tool that adds no token."""
    spans = [TurnSpan(role, 0, tokens, 0.1) for _ in range(turns) for role in ("assistant", "tool")]
    return Segment(
        prompt_ids=array("i", [1, 2, 3]),
        response_ids=array("i", range(tokens)),
        response_mask=array("b", [1] * tokens),
        logprobs=array("f", [-0.5] * tokens),
        policy_versions=array("i", [0] * tokens),
        turns=spans,
        fork_reason=fork_reason,
    )


def attempt(task: str, index: int, reward: float | None, **fields: Any) -> Trajectory:
    fields = {"segments": [segment()], "stop_reason": "stop", "messages": [], "reward": reward} | fields
    return Trajectory(SessionKey("run", task, f"run/{task}", index), **fields)


def attempts(rewards: dict[str, list[float | None]], **fields: Any) -> list[Trajectory]:
    return [
        attempt(task, i, reward, **fields) for task, of_task in rewards.items() for i, reward in enumerate(of_task)
    ]


def scores(line: Line) -> dict[int, float | None]:
    return {k: None if found is None else pytest.approx(found.value) for k, found in line.pass_at.items()}


# The estimator


@st.composite
def counts(draw: st.DrawFn, most: int) -> tuple[int, int, int]:
    n = draw(st.integers(1, most))
    return n, draw(st.integers(0, n)), draw(st.integers(1, n))


@given(counts(9))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_pass(of: tuple[int, int, int]):
    n, c, k = of
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == sum(map(any, subsets)) / len(subsets)


@given(counts(1024))
@settings(max_examples=50)
def test_pass_at_k_agrees_with_the_product_form_for_many_attempts(of: tuple[int, int, int]):
    n, c, k = of
    missed = 1.0
    for i in range(n - c + 1, n + 1):
        missed *= max(0.0, 1.0 - k / i)
    assert pass_at_k(n, c, k) == pytest.approx(1.0 - missed, abs=1e-12)
    assert 0.0 <= pass_at_k(n, c, k) <= 1.0


def test_pass_at_k_is_exact_where_subtraction_from_one_is_not():
    assert pass_at_k(1000, 1, 1) == 0.001 != 1.0 - 0.999
    assert pass_at_k(1000, 1, 500) == 0.5
    assert pass_at_k(5, 5, 5) == pass_at_k(5, 1, 5) == 1.0
    assert pass_at_k(5, 0, 5) == 0.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_of_impossible_counts_is_refused(n: int, c: int, k: int):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_the_ks_are_powers_of_two_up_to_n():
    assert [default_ks(n) for n in (0, 1, 2, 7, 8)] == [(), (1,), (1, 2), (1, 2, 4), (1, 2, 4, 8)]


# The interval


def test_the_interval_covers_the_truth_as_often_as_it_says_although_attempts_of_a_task_agree():
    source = random.Random(7)
    covered, rounds = 0, 200
    for _ in range(rounds):
        # Tasks that are easy or hard: eight attempts at one tell little more than one does. An interval that took
        # the 320 attempts for independent would be 2.6 times too narrow and would cover in half of the rounds.
        means = []
        for _ in range(40):
            chance = source.choice([0.05, 0.95])
            means.append(sum(source.random() < chance for _ in range(8)) / 8)
        low, high = mean_interval(means) or (1.0, 0.0)
        covered += low <= 0.5 <= high
    assert 0.89 <= covered / rounds <= 0.99
    assert CONFIDENCE == 0.95


def test_the_interval_is_as_wide_as_the_normal_one_where_there_are_many_tasks():
    source = random.Random(3)
    values = [source.random() for _ in range(400)]
    mean = sum(values) / 400
    error = (sum((value - mean) ** 2 for value in values) / 400) ** 0.5 / 20
    low, high = mean_interval(values) or (0.0, 0.0)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_the_interval_is_the_same_every_time_and_none_for_one_task():
    assert mean_interval([0.0, 0.5, 1.0]) == mean_interval([0.0, 0.5, 1.0])
    assert mean_interval([0.1, 0.1, 0.1]) == (0.1, 0.1)
    assert mean_interval([0.0, 1.0]) == (0.0, 1.0)
    assert mean_interval([0.5]) is None and mean_interval([]) is None


# Scores of a table


def test_scores_are_means_over_tasks_of_means_over_attempts():
    found = evaluate(to_table(attempts({"a": [1, 1, 0, 0], "b": [0, 0, 0, 1], "c": [0, 0, 0, 0]})))
    assert (found.n, found.ks, found.tags, found.warnings) == (4, (1, 2, 4), (), ())
    line = found.overall
    assert (line.tag, line.tasks, line.trajectories, line.scored, line.unscored) == (None, 3, 12, 12, {})
    assert scores(line) == {1: 0.25, 2: (5 / 6 + 1 / 2) / 3, 4: 2 / 3}
    assert line.reward is not None and line.reward.value == pytest.approx(0.25) and line.reward.tasks == 3
    assert (line.reward.low, line.reward.high) == mean_interval([0.5, 0.25, 0.0])


def test_a_task_counts_as_one_however_many_attempts_it_has():
    found = evaluate(to_table(attempts({"a": [1.0], "b": [0.0] * 9})), ks=[1])
    assert found.overall.reward is not None and found.overall.reward.value == 0.5
    assert scores(found.overall) == {1: 0.5}
    assert found.warnings == ("1 of 2 tasks have fewer than 9 trajectories",)


def test_rows_of_several_runs_are_pooled_by_task():
    first = attempts({"a": [1.0]})
    second = [Trajectory(SessionKey("other", "a", "other/a", 0), [segment()], "stop", [], reward=0.0)]
    found = evaluate(to_table(first + second))
    assert (found.n, found.overall.tasks, scores(found.overall)) == (2, 1, {1: 0.5, 2: 1.0})


def test_the_threshold_is_met_as_the_record_stores_rewards():
    table = to_table(attempts({"a": [0.9, 0.89], "b": [1.5, -1.0]}))
    assert table["reward"][0].as_py() < 0.9, "float32"
    assert scores(evaluate(table, pass_threshold=0.9).overall) == {1: 0.5, 2: 1.0}
    assert scores(evaluate(table, pass_threshold=1.0).overall) == {1: 0.25, 2: 0.5}
    assert scores(evaluate(table, pass_threshold=-1.0).overall) == {1: 1.0, 2: 1.0}


@pytest.mark.parametrize("threshold", [float("nan"), float("inf")])
def test_a_threshold_that_is_no_number_is_refused(threshold: float):
    with pytest.raises(RolloutError, match="pass threshold"):
        evaluate(to_table(attempts({"a": [1.0]})), pass_threshold=threshold)


def test_segments_of_a_trajectory_count_once():
    forked = [segment(tokens=5, turns=2), segment(tokens=3, turns=1, fork_reason="history was rewritten")]
    table = to_table([attempt("a", 0, 1.0, segments=forked), attempt("a", 1, 0.0)])
    assert table.num_rows == 3
    line = evaluate(table).overall
    assert (line.trajectories, line.scored, scores(line)) == (2, 2, {1: 0.5, 2: 1.0})
    assert line.stop_reasons == {"stop": 2}
    assert (line.mean_turns, line.mean_response_tokens) == ((3 + 1) / 2, (8 + 2) / 2)


def test_rows_may_come_in_chunks_and_in_any_order():
    forked = [segment(tokens=5, turns=2), segment(tokens=3, fork_reason="x")]
    table = to_table([attempt("a", 0, 1.0, segments=forked), attempt("b", 0, 0.0), attempt("a", 1, None)])
    shuffled = pa.concat_tables([table.slice(2), table.slice(0, 2)])
    # All but the order of equal counts, which no figure depends on.
    assert evaluate(shuffled).to_json() == evaluate(table).to_json()


@pytest.mark.parametrize("rows", [[0], [1, 2], [0, 1, 2, 2], [0, 1, 1, 2]])
def test_a_table_with_parts_of_a_trajectory_is_refused(rows: list[int]):
    table = to_table([attempt("a", 0, 1.0, segments=[segment(), segment(fork_reason="x")]), attempt("a", 1, 1.0)])
    with pytest.raises(RecordError, match="segments are missing or repeated in trajectory 'run/a/"):
        evaluate(table.take(rows))


def test_a_table_of_another_kind_is_refused():
    with pytest.raises(RecordError, match="schema is not the record's"):
        evaluate(pa.table({"task_id": ["a"]}))


def test_a_reward_that_is_not_finite_is_refused():
    with pytest.raises(RecordError, match="'run/a/1' is nan"):
        evaluate(to_table(attempts({"a": [1.0, float("nan")]})))


# What has no score


def test_an_attempt_without_a_reward_is_neither_passed_nor_failed():
    with_nulls = evaluate(to_table(attempts({"a": [1.0, None, 0.0, None], "b": [1.0, 1.0, 1.0, 1.0]})), ks=[1, 2])
    assert scores(with_nulls.overall) == {1: 0.75, 2: 1.0}
    assert with_nulls.overall.reward is not None and with_nulls.overall.reward.value == 0.75
    assert (with_nulls.overall.scored, with_nulls.overall.num_unscored) == (6, 2)
    assert with_nulls.overall.unscored == {"stop": 2} and with_nulls.overall.errors == {}
    assert with_nulls.warnings == ("2 of 8 trajectories are not scored and in no score (ended by: 2 stop)",)


def test_an_error_is_unscored_even_with_a_reward_and_is_reported_by_its_category():
    table = to_table(
        [
            attempt("a", 0, 1.0),
            attempt("a", 1, 0.0, stop_reason="error", error="engine_died: replica 3: gone", segments=[]),
            attempt("a", 2, None, stop_reason="error", segments=[]),
            attempt("a", 3, 0.0, stop_reason="cancelled"),
        ]
    )
    found = evaluate(table, ks=[1])
    line = found.overall
    assert line.reward is not None and line.reward.value == 1.0
    assert scores(line) == {1: 1.0}
    assert line.unscored == {"error": 2, "cancelled": 1}
    assert line.errors == {"engine_died": 1, "unknown": 1}
    assert found.warnings == (
        "3 of 4 trajectories are not scored and in no score "
        "(ended by: 2 error, 1 cancelled; errors: 1 engine_died, 1 unknown)",
    )
    assert (line.mean_turns, line.mean_response_tokens) == (1.0, 2.0), "of those that were played"


def test_a_task_with_fewer_scored_attempts_than_k_is_left_out_of_pass_at_k_and_named():
    found = evaluate(to_table(attempts({"a": [0.0, 0.0], "b": [1.0, None], "c": [None, None]})))
    one, two = found.overall.pass_at[1], found.overall.pass_at[2]
    assert one is not None and two is not None
    assert (one.value, one.tasks, two.value, two.tasks) == (0.5, 2, 0.0, 1)
    assert (two.low, two.high) == (None, None)
    assert found.warnings[1:] == (
        "the mean reward is over 2 of 3 tasks",
        "pass@1 is over 2 of 3 tasks: the others have fewer than 1 scored attempts",
        "pass@2 is over 1 of 3 tasks: the others have fewer than 2 scored attempts",
    )


def test_nothing_scored_gives_no_scores_and_says_so():
    found = evaluate(to_table(attempts({"a": [None, None]}, stop_reason="error", error="engine: no")))
    line = found.overall
    assert (line.reward, line.pass_at, line.scored) == (None, {1: None, 2: None}, 0)
    assert (line.truncated_share, line.mean_turns, line.mean_response_tokens) == (None, None, None)
    assert found.warnings[-1] == "no trajectory was scored, so there are no scores"


@pytest.mark.parametrize("ks", [None, [1, 4]])
def test_an_empty_table_has_no_figures(ks: list[int] | None):
    found = evaluate(to_table([]), ks=ks)
    assert (found.n, found.ks, found.tags) == (0, tuple(ks or ()), ())
    assert found.overall.reward is None and found.overall.pass_at == dict.fromkeys(ks or ())
    assert (found.overall.tasks, found.overall.trajectories, found.overall.mean_turns) == (0, 0, None)
    assert found.warnings == ("there are no trajectories",)


@pytest.mark.parametrize(("ks", "bad"), [([1, 3], 3), ([0], 0), ([-1, 1], -1)])
def test_a_k_outside_the_attempts_is_refused(ks: list[int], bad: int):
    with pytest.raises(RolloutError, match=f"k = {bad} is outside 1 … 2"):
        evaluate(to_table(attempts({"a": [1.0, 0.0]})), ks=ks)


def test_no_k_is_refused():
    with pytest.raises(RolloutError, match="no k is given"):
        evaluate(to_table(attempts({"a": [1.0]})), ks=[])


def test_ks_come_in_order_and_once():
    assert evaluate(to_table(attempts({"a": [1.0, 0.0]})), ks=[2, 1, 2]).ks == (1, 2)


def test_with_the_attempts_that_were_asked_for_a_k_may_be_larger_than_what_came():
    found = evaluate(to_table(attempts({"a": [1.0, 0.0]})), ks=[1, 4], n=4)
    assert (found.n, found.overall.pass_at[4]) == (4, None)
    assert found.warnings == (
        "1 of 1 tasks have fewer than 4 trajectories",
        "pass@4 is over 0 of 1 tasks: the others have fewer than 4 scored attempts",
    )


# How attempts went


def test_limits_that_cut_the_policy_are_counted_over_what_was_played():
    ended = ["stop", "length", "max_turns", "max_tokens", "deadline", "tool_error", "error", "cancelled"]
    table = to_table([attempt("a", i, 0.0, stop_reason=reason) for i, reason in enumerate(ended)])
    line = evaluate(table, ks=[1]).overall
    assert line.truncated_share == pytest.approx(4 / 6)
    assert line.stop_reasons == dict.fromkeys(ended, 1)


# Tags


def tagged() -> Evaluation:
    return evaluate(
        to_table(
            attempts({"a": [1.0, 1.0]}, metadata={"tags": ["math", "easy"]})
            + attempts({"b": [0.0, 1.0]}, metadata={"tag": "math", "tags": ["hard"]})
            + attempts({"c": [0.0, None]}, metadata={"tag": "code"})
            + attempts({"d": [1.0, 1.0]}, metadata={"source": "x"})
        ),
        ks=[1],
    )


def test_there_is_a_line_for_each_tag_and_one_for_all():
    found = tagged()
    assert found.overall.tasks == 4 and scores(found.overall) == {1: (1 + 0.5 + 0 + 1) / 4}
    lines = {line.tag: (line.tasks, line.trajectories, line.num_unscored, scores(line)[1]) for line in found.tags}
    assert lines == {
        "code": (1, 2, 1, 0.0),
        "easy": (1, 2, 0, 1.0),
        "hard": (1, 2, 0, 0.5),
        "math": (2, 4, 0, 0.75),
    }
    assert list(lines) == sorted(lines)  # type: ignore[type-var]


def test_an_attempt_that_lost_its_metadata_keeps_its_tasks_tags():
    lost = attempt("a", 0, None, stop_reason="error", segments=[])
    (line,) = evaluate(to_table([lost, attempt("a", 1, 1.0, metadata={"tag": "math"})])).tags
    assert (line.tag, line.trajectories, line.num_unscored) == ("math", 2, 1)


def test_tags_may_come_from_elsewhere_in_the_metadata():
    table = to_table(attempts({"a": [1.0]}, metadata={"level": 3, "tags": 7}))
    assert [line.tag for line in evaluate(table, tags_of=lambda metadata: [f"level {metadata['level']}"]).tags] == [
        "level 3"
    ]


def test_metadata_that_was_lost_is_not_asked_for_tags():
    table = to_table([attempt("a", 0, None, stop_reason="error"), attempt("a", 1, 1.0, metadata={"source": "x"})])
    (line,) = evaluate(table, tags_of=lambda metadata: [metadata["source"]]).tags
    assert (line.tag, line.trajectories) == ("x", 2)


def test_tags_of_that_fails_or_gives_letters_is_refused():
    table = to_table(attempts({"a": [1.0]}, metadata={"source": "web"}))
    with pytest.raises(RecordError, match="task 'a' cannot be read: KeyError: 'level'"):
        evaluate(table, tags_of=lambda metadata: [metadata["level"]])
    with pytest.raises(RecordError, match="tags_of gave the text 'web'"):
        evaluate(table, tags_of=lambda metadata: metadata["source"])


def test_tags_are_read_from_both_fields():
    assert metadata_tags({}) == [] and metadata_tags({"tags": None, "tag": None}) == []
    assert metadata_tags({"tags": ["a", "b"], "tag": "c"}) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"tags": "math"}, "metadata.tags must be a list of texts, not 'math'"),
        ({"tags": ["math", 3]}, "metadata.tags must be a list of texts"),
        ({"tags": [""]}, "metadata.tags must be a list of texts"),
        ({"tags": {"math": 1}}, "metadata.tags must be a list of texts"),
        ({"tag": ["math"]}, "metadata.tag must be a text"),
        ({"tag": ""}, "metadata.tag must be a text"),
    ],
)
def test_tags_of_another_form_are_refused_and_the_task_named(metadata: dict[str, Any], problem: str):
    with pytest.raises(RecordError, match="the tags of task 'a' cannot be read: ") as caught:
        evaluate(to_table(attempts({"a": [1.0]}, metadata=metadata)))
    assert problem in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "null", "{"])
def test_metadata_that_is_no_object_is_refused(text: str):
    table = to_table(attempts({"a": [1.0]}))
    at = SCHEMA.get_field_index("metadata")
    table = table.set_column(at, SCHEMA.field(at), pa.array([text]))
    with pytest.raises(RecordError, match="the tags of task 'a' cannot be read"):
        evaluate(table)


# JSON


def test_an_evaluation_is_plain_data():
    told = tagged().to_json()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["overall"]["pass_at"]["1"]["value"] == pytest.approx(0.625)
    assert told["overall"]["pass_at"]["1"]["tasks"] == 4
    assert list(told["tags"]) == ["code", "easy", "hard", "math"]
    assert told["tags"]["code"] == {
        "tasks": 1,
        "trajectories": 2,
        "scored": 1,
        "unscored": 1,
        "unscored_by_stop_reason": {"stop": 1},
        "errors": {},
        "mean_reward": {"value": 0.0, "low": None, "high": None, "tasks": 1},
        "pass_at": {"1": {"value": 0.0, "low": None, "high": None, "tasks": 1}},
        "truncated_share": 0.0,
        "mean_turns": 1.0,
        "mean_response_tokens": 2.0,
        "stop_reasons": {"stop": 2},
    }
    assert told["interval"]["confidence"] == CONFIDENCE
