"""Trajectories for people: the list, finding one by its id, the coloured conversation, and JSON."""

from __future__ import annotations

import json
from array import array
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console
from rich.text import Text

from cluster.show import OBSERVED, SAMPLED, as_json, find, list_trajectories, show_trajectory
from rollout.errors import RecordError
from rollout.ledger import Segment, TurnSpan
from rollout.record import to_table
from rollout.tool_calls import ToolCallRecord
from rollout.trajectory import SessionKey, Timing, Trajectory


def two_turns(fork_reason: str | None = None, version: int = 0) -> Segment:
    """Sampled 10 11, then a tool's 20 21 22, then sampled 12."""
    return Segment(
        prompt_ids=array("i", [1, 2, 3]),
        response_ids=array("i", [10, 11, 20, 21, 22, 12]),
        response_mask=array("b", [1, 1, 0, 0, 0, 1]),
        logprobs=array("f", [-0.5, -1.0, 0, 0, 0, -2.0]),
        policy_versions=array("i", [version, version, -1, -1, -1, version]),
        turns=[TurnSpan("assistant", 0, 2, 0.5), TurnSpan("tool", 2, 5, 0.25), TurnSpan("assistant", 5, 6, 0.125)],
        fork_reason=fork_reason,
    )


MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Compute"},
    {"role": "assistant", "content": ""},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "3"},
]


def trajectory(task: str, index: int = 0, **fields: Any) -> Trajectory:
    fields = {
        "segments": [two_turns()],
        "stop_reason": "stop",
        "messages": MESSAGES,
        "tool_calls": [ToolCallRecord("add", True, 0.002)],
        "timing": Timing(0.1, 0.5, 0.25, 0.125, 1.5),
    } | fields
    return Trajectory(SessionKey("run", task, f"run/{task}", index), **fields)


def render(item: Any, width: int = 160) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(item)
    return capture.get()


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.fixture
def table() -> pa.Table:
    return to_table(
        [
            trajectory("a", 0, reward=1.0),
            trajectory(
                "a", 1, reward=None, stop_reason="error", error="engine: it broke", segments=[], tool_calls=[]
            ),
            trajectory("b", 0, reward=-0.25),
        ]
    )


def test_the_list_has_a_line_for_each(table: pa.Table):
    lines = [" ".join(line.split()) for line in render(list_trajectories(table)).splitlines()]
    assert lines == [
        "trajectory reward stop turns tokens sampled calls seconds error",
        "run/a/0 1 stop 2 6 3 1 1.50",
        "run/a/1 – error 0 0 0 0 1.50 engine: it broke",
        "run/b/0 -0.25 stop 2 6 3 1 1.50",
    ]


def test_the_list_can_be_cut(table: pa.Table):
    assert len(render(list_trajectories(table, limit=2)).splitlines()) == 3


def test_a_forked_trajectory_is_listed_with_all_its_segments():
    forked = to_table([trajectory("a", segments=[two_turns(), two_turns("history was rewritten")])])
    lines = render(list_trajectories(forked)).splitlines()
    assert len(lines) == 2
    assert " ".join(lines[1].split()) == "run/a/0 – stop 4 12 6 1 1.50"


# Finding one


@pytest.mark.parametrize("given", ["run/a/1", "a/1", "/a/1", "1"])
def test_an_id_may_be_any_unique_ending(table: pa.Table, given: str):
    assert [row["trajectory_id"] for row in find(table, given)] == ["run/a/1"]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("0", "2 trajectories of 3 match '0'; see `rollout show FILE --list`"),
        ("run/a", "no trajectory of 3 match 'run/a'"),
        ("zzz", "no trajectory of 3 match 'zzz'"),
    ],
)
def test_an_id_that_means_none_or_several_is_refused(table: pa.Table, given: str, problem: str):
    with pytest.raises(RecordError) as caught:
        find(table, given)
    assert str(caught.value).startswith(problem)


def test_a_whole_id_wins_over_endings():
    # "a/0" is both an id and an ending of another one.
    clash = to_table([trajectory("a"), trajectory("b")]).set_column(
        3, "trajectory_id", pa.array(["run/a/0", "a/0"], pa.string())
    )
    assert [row["trajectory_id"] for row in find(clash, "a/0")] == ["a/0"]


def test_segments_come_in_order():
    forked = to_table([trajectory("a", segments=[two_turns(), two_turns("x"), two_turns("y")]), trajectory("b")])
    shuffled = forked.take([3, 2, 0, 1])
    assert [row["fork_reason"] for row in find(shuffled, "a/0")] == [None, "x", "y"]


def test_an_empty_file_has_none():
    with pytest.raises(RecordError, match="the file holds no trajectories"):
        find(to_table([]), None)


def test_without_an_id_the_best_rewarded_with_most_turns_is_shown(table: pa.Table):
    assert find(table, None)[0]["trajectory_id"] == "run/a/0"
    short = Segment(array("i", [1]))
    rows = [trajectory("short", reward=1.0, segments=[short]), trajectory("long", reward=1.0), trajectory("low")]
    assert find(to_table(rows), None)[0]["trajectory_id"] == "run/long/0"


def test_without_an_id_there_is_one_to_show_however_low_the_rewards():
    low = to_table([trajectory("a", reward=-5.0), trajectory("b", reward=-2.0)])
    assert [row["trajectory_id"] for row in find(low, None)] == ["run/b/0"]


# Showing one


VOCABULARY = {1: "<u>", 2: "Compute", 3: "</u>", 10: "call", 11: "!", 20: "[", 21: "3", 22: "]", 12: "three"}


def decode(ids: list[int]) -> str:
    return "".join(VOCABULARY[i] for i in ids)


def test_a_conversation_with_its_calls_and_timing(table: pa.Table):
    text = words(render(show_trajectory(find(table, "a/0"), decode)))
    assert "run/a/0" in text
    assert "reward 1 stop stop total 1.50 s (engine 0.50, tools 0.250, environment 0.125)" in text
    assert "prompt <u>Compute</u> 3 tokens" in text
    assert "assistant call! -0.75 2 tokens, 0.500 s add ok, 2.0 ms" in text
    assert "tool [3] 3 tokens, 0.250 s" in text
    assert "assistant three -2.00 1 tokens, 0.125 s" in text
    assert "sampled, trained on (mask 1) seen, not trained on (mask 0)" in text
    assert "attempt" not in text and "weights" not in text and "segment" not in text


def test_without_a_tokenizer_ids_are_shown(table: pa.Table):
    text = words(render(show_trajectory(find(table, "a/0"))))
    assert "prompt 1 2 3 3 tokens" in text and "assistant 10 11 -0.75" in text and "tool 20 21 22" in text


def test_what_was_sampled_and_only_that_is_coloured_as_sampled(table: pa.Table):
    panel = show_trajectory(find(table, "a/0"), decode)
    styled: dict[str, set[str]] = {SAMPLED: set(), OBSERVED: set()}

    def walk(item: Any) -> None:
        if isinstance(item, Text):
            for span in item.spans:
                if span.style in styled:
                    styled[str(span.style)].add(item.plain[span.start : span.end])
            if item.style in styled:
                styled[str(item.style)].add(item.plain)
            return
        for part in getattr(item, "renderables", ()):
            walk(part)
        for column in getattr(item, "columns", ()):
            for cell in column.cells:
                walk(cell)

    walk(panel.renderable)  # type: ignore[attr-defined]
    legend = {"sampled, trained on (mask 1)", "seen, not trained on (mask 0)"}
    assert styled[SAMPLED] - legend == {"call!", "three"}
    assert styled[OBSERVED] - legend == {"<u>Compute</u>", "[3]"}


def test_tokens_of_a_turn_are_decoded_together(table: pa.Table):
    asked: list[list[int]] = []

    def spy(ids: list[int]) -> str:
        asked.append(ids)
        return "x"

    show_trajectory(find(table, "a/0"), spy)
    assert asked == [[1, 2, 3], [10, 11], [20, 21, 22], [12]]


def test_tokens_of_different_masks_are_apart_even_within_a_turn():
    segment = two_turns()
    segment.turns = [TurnSpan("assistant", 0, 6, 0.5)]
    asked: list[list[int]] = []
    show_trajectory(find(to_table([trajectory("a", segments=[segment])]), None), lambda ids: str(asked.append(ids)))
    assert asked == [[1, 2, 3], [10, 11], [20, 21, 22], [12]]


def test_forks_attempts_versions_and_errors_are_told():
    rows = to_table(
        [
            trajectory(
                "a",
                segments=[two_turns(), two_turns("history was rewritten", version=7)],
                attempts=3,
                stop_reason="error",
                error="engine_died: [all] of them",
            )
        ]
    )
    text = words(render(show_trajectory(find(rows, None))))
    assert "segment 1 of 2" in text and "segment 2 of 2: history was rewritten" in text
    assert "attempt 3" in text
    assert "engine_died: [all] of them" in text
    assert text.count("weights 7") == 2
    assert "reward – stop error" in text


def test_calls_stand_at_the_turn_that_made_them():
    messages = [
        {"role": "user", "content": "x"},
        # These two came with the task: they were not sampled, and their call is in no record.
        {"role": "assistant", "content": "old"},
        {"role": "tool", "content": "old"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "done"},
    ]
    calls = [ToolCallRecord("first", True, 0.001), ToolCallRecord("second", False, 0.003, "timeout: too slow")]
    rows = to_table([trajectory("a", messages=messages, tool_calls=calls)])
    line = words(render(show_trajectory(find(rows, None))))
    assert "assistant 10 11 -0.75 2 tokens, 0.500 s first ok, 1.0 ms second timeout: too slow, 3.0 ms tool 20" in line


def test_a_long_prompt_is_shortened_unless_all_is_wanted():
    long = two_turns()
    long.prompt_ids = array("i", range(100_000, 101_000))
    segments = find(to_table([trajectory("a", segments=[long])]), None)
    whole = len(" ".join(map(str, range(100_000, 101_000))))
    short = words(render(show_trajectory(segments)))
    assert f"… {whole - 600} characters …" in short.replace("\n", " ")
    assert "100500" not in short
    assert "100500" in words(render(show_trajectory(segments, full=True)))


@pytest.mark.parametrize("where", ["listed error", "call error", "call name", "title", "listed id"])
def test_brackets_in_texts_of_others_are_shown_as_they_are(where: str):
    odd = "no [bold] and [/x] here"
    failed = {"tool_calls": [ToolCallRecord(odd if where == "call name" else "f", False, 0.1, odd)]}
    if where == "listed error":
        shown = list_trajectories(to_table([trajectory("a", error=odd, stop_reason="error")]))
    elif where in ("call error", "call name"):
        shown = show_trajectory(find(to_table([trajectory("a", **failed)]), None))
    elif where == "title":
        shown = show_trajectory(find(to_table([trajectory(odd)]), None))
    else:
        shown = list_trajectories(to_table([trajectory(odd)]))
    assert odd in words(render(shown, width=240))


def test_json_opens_the_columns_that_are_json():
    rows = to_table([trajectory("é", metadata={"source": "x"}, reward=0.5, segments=[two_turns(), two_turns("f")])])
    first, second = json.loads(as_json(find(rows, None)))
    assert first["messages"] == MESSAGES and first["metadata"] == {"source": "x"}
    assert (first["trajectory_id"], first["reward"]) == ("run/é/0", 0.5)
    assert (first["response_ids"], first["logprobs"][0]) == ([10, 11, 20, 21, 22, 12], -0.5)
    assert second["fork_reason"] == "f"
    assert "é" in as_json(find(rows, None)), "readable, not escaped"
