"""Trajectories for people: a conversation whose tokens are coloured by mask, with calls and timing beside it.

What is coloured as sampled is exactly what a trainer trains on; everything else is dim.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rollout.errors import RecordError

SAMPLED, OBSERVED = "bold green", "grey58"
# Of a long prompt this many characters are printed, from both ends.
PROMPT_CHARS = 600
LISTED = 40

Decode = Any
"""Callable[[list[int]], str], or None where there is no tokenizer."""


def list_trajectories(table: pa.Table, limit: int = LISTED) -> Table:
    """One line a trajectory."""
    view = Table(box=None, header_style="bold")
    for name in ("trajectory", "reward", "stop", "turns", "tokens", "sampled", "calls", "seconds", "error"):
        view.add_column(name, justify="left" if name in ("trajectory", "stop", "error") else "right", no_wrap=True)
    for trajectory_id in list(dict.fromkeys(table["trajectory_id"].to_pylist()))[:limit]:
        segments = find(table, trajectory_id)
        first = segments[0]
        turns = [turn["role"] for segment in segments for turn in segment["turns"]]
        cells = (
            trajectory_id,
            _number(first["reward"]),
            first["stop_reason"],
            str(turns.count("assistant")),
            str(sum(len(segment["response_ids"]) for segment in segments)),
            str(sum(sum(segment["response_mask"]) for segment in segments)),
            str(len(first["tool_calls"])),
            f"{first['timing']['total_s']:.2f}",
            (first["error"] or "")[:60],
        )
        # As Text: ids and errors may hold brackets, which are no markup.
        view.add_row(*map(Text, cells))
    return view


def find(table: pa.Table, trajectory_id: str | None) -> list[dict[str, Any]]:
    """The segments of a trajectory, in order; of the most telling one if no id is given.

    An id may be shortened to any unique ending. Raises RecordError if none or several match.
    """
    if table.num_rows == 0:
        raise RecordError("the file holds no trajectories")
    ids = table["trajectory_id"].to_pylist()
    if trajectory_id is None:
        trajectory_id = _most_telling(table)
    elif trajectory_id not in ids:
        matches = sorted({name for name in ids if name.endswith(trajectory_id)})
        if len(matches) != 1:
            what = "no trajectory" if not matches else f"{len(matches)} trajectories"
            raise RecordError(f"{what} of {len(set(ids))} match {trajectory_id!r}; see `rollout show FILE --list`")
        trajectory_id = matches[0]
    rows = table.filter(pc.equal(table["trajectory_id"], trajectory_id)).to_pylist()
    return sorted(rows, key=lambda row: row["segment_index"])


def _most_telling(table: pa.Table) -> str:
    """One with many turns and calls that came out well: what a newcomer wants to see first."""
    best, score = "", (float("-inf"), -1, -1)
    for row in table.select(["trajectory_id", "reward", "turns", "tool_calls"]).slice(0, 512).to_pylist():
        this = (0.0 if row["reward"] is None else row["reward"], len(row["turns"]), len(row["tool_calls"]))
        if this > score:
            best, score = row["trajectory_id"], this
    return best


def show_trajectory(
    segments: Sequence[dict[str, Any]], decode: Decode = None, *, full: bool = False
) -> RenderableType:
    """A trajectory as a panel. Without `decode`, token ids are printed in place of text."""
    first = segments[0]
    parts: list[RenderableType] = [_headline(first)]
    calls = iter(_calls_by_turn(segments))
    for segment in segments:
        if len(segments) > 1:
            why = f": {segment['fork_reason']}" if segment["fork_reason"] else ""
            parts.append(Text(f"segment {segment['segment_index'] + 1} of {len(segments)}{why}", style="yellow"))
        parts.append(_tokens(segment, decode, calls, full))
    legend = Text.assemble(
        ("sampled, trained on (mask 1)", SAMPLED), "   ", ("seen, not trained on (mask 0)", OBSERVED)
    )
    parts.append(legend)
    return Panel(Group(*parts), title=Text(first["trajectory_id"]), border_style="cyan", padding=(0, 1))


def _headline(row: dict[str, Any]) -> Text:
    timing = row["timing"]
    text = Text.assemble(
        ("reward ", "dim"), (_number(row["reward"]), "bold"), ("   stop ", "dim"), (row["stop_reason"], "bold"),
        ("   total ", "dim"), f"{timing['total_s']:.2f} s",
        (" (engine ", "dim"), f"{timing['engine_s']:.2f}", (", tools ", "dim"), f"{timing['tool_s']:.3f}",
        (", environment ", "dim"), f"{timing['env_s']:.3f}", (")", "dim"),
    )  # fmt: skip
    if row["attempts"] > 1:
        text.append(f"   attempt {row['attempts']}", style="yellow")
    if row["error"]:
        text.append(f"\n{row['error']}", style="red")
    return text


def _tokens(segment: dict[str, Any], decode: Decode, calls: Any, full: bool) -> Table:
    view = Table(box=None, show_header=True, header_style="dim", padding=(0, 1), expand=True)
    view.add_column("turn", no_wrap=True)
    view.add_column("tokens", ratio=1, overflow="fold")
    view.add_column("log p", justify="right", no_wrap=True)
    view.add_column("calls and timing", overflow="fold", max_width=34)
    prompt = _text(segment["prompt_ids"], decode)
    if not full and len(prompt) > PROMPT_CHARS:
        half = PROMPT_CHARS // 2
        prompt = f"{prompt[:half]} … {len(prompt) - 2 * half} characters … {prompt[-half:]}"
    view.add_row("prompt", Text(prompt, style=OBSERVED), "", f"{len(segment['prompt_ids'])} tokens")
    for turn in segment["turns"]:
        start, end = turn["start"], turn["end"]
        notes = [f"{end - start} tokens, {turn['seconds']:.3f} s"]
        mean = ""
        if turn["role"] == "assistant":
            logprobs = segment["logprobs"][start:end]
            mean = f"{sum(logprobs) / len(logprobs):.2f}" if logprobs else ""
            versions = sorted(set(segment["policy_versions"][start:end]))
            if versions != [0]:
                notes.append(f"weights {', '.join(map(str, versions))}")
            notes += [_call(call) for call in next(calls, [])]
        view.add_row(Text(turn["role"]), _coloured(segment, start, end, decode), mean, Text("\n".join(notes)))
    return view


def _calls_by_turn(segments: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The calls of each sampled turn: as many as tool messages follow it in the conversation."""
    records = iter(segments[0]["tool_calls"])
    answered: list[int] = []
    for message in json.loads(segments[0]["messages"]):
        if message["role"] == "assistant":
            answered.append(0)
        elif message["role"] == "tool" and answered:
            answered[-1] += 1
    # Assistant messages that the task brought along were not sampled; they come first.
    sampled = sum(turn["role"] == "assistant" for segment in segments for turn in segment["turns"])
    return [[call for _, call in zip(range(count), records, strict=False)] for count in answered[-sampled:]]


def _call(call: dict[str, Any]) -> str:
    return f"{call['name'] or '?'} {'ok' if call['ok'] else call['error']}, {1000 * call['seconds']:.1f} ms"


def _coloured(segment: dict[str, Any], start: int, end: int, decode: Decode) -> Text:
    """Tokens of a turn; runs of equal mask are decoded together, so that characters of several tokens are whole."""
    text = Text()
    ids, mask = segment["response_ids"], segment["response_mask"]
    at = start
    while at < end:
        until = at
        while until < end and mask[until] == mask[at]:
            until += 1
        text.append(_text(ids[at:until], decode), style=SAMPLED if mask[at] else OBSERVED)
        at = until
    return text


def _text(ids: Sequence[int], decode: Decode) -> str:
    return decode(list(ids)) if decode is not None else " ".join(map(str, ids))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def as_json(segments: Sequence[dict[str, Any]]) -> str:
    """A trajectory as JSON, its nested JSON columns opened."""
    opened = [
        {**row, "messages": json.loads(row["messages"]), "metadata": json.loads(row["metadata"])} for row in segments
    ]
    return json.dumps(opened, ensure_ascii=False)
