"""The most recent trajectories, kept for people to look at, delivered or not.

Invariant: it holds at most `max_trajectories` and `max_bytes` of rows, the newest; beyond that the oldest block goes.
Rows are the very bytes that the journal was given, so that what still waits for delivery is held once. Taking in
costs microseconds; what reads rows (`find`, `lines`, `rows_of`) is for another thread than the event loop's.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from actors.messages import Summary
from rollout.viewing import GroupFate, TrajectoryQuery

MAX_TRAJECTORIES = 2_000
MAX_BYTES = 64 * 2**20
# Of what a user said first, in a list.
OPENING_CHARS = 240

# The first thing that a user said, out of the JSON of a conversation, without parsing all of it. Not bounded here: a
# pattern that counts to 240 takes a hundred times as long.
_OPENING = r'"role": ?"user", ?"content": ?"(?P<text>(?:[^"\\]|\\.)+)'
# The longest escape in JSON is \\uXXXX.
_ESCAPE_CHARS = 6


@dataclass(slots=True)
class Block:
    """Rows as they arrived: an Arrow IPC stream."""

    rows: bytes
    shown: int = 0
    """How many of its trajectories are kept."""

    def table(self) -> pa.Table:
        """Read, without a copy."""
        return pa.ipc.open_stream(pa.py_buffer(self.rows)).read_all()


@dataclass(slots=True)
class Entry:
    """One trajectory."""

    number: int
    block: Block
    summary: Summary
    finished_at: float | None
    staleness: int | None
    fate: GroupFate | None = None
    """Of its group, where that is settled otherwise than by delivery."""
    reason: str | None = None


@dataclass(slots=True)
class Line:
    """What a list shows of a trajectory beside its summary."""

    seconds: float | None
    opening: str | None
    error: str | None


class Gallery:
    """Lives on one event loop."""

    def __init__(self, max_trajectories: int = MAX_TRAJECTORIES, max_bytes: int = MAX_BYTES) -> None:
        """0 of either: nothing is kept."""
        self._max_trajectories, self._max_bytes = max_trajectories, max_bytes
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._groups: dict[str, dict[int, Entry]] = {}
        self._next = 1
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def newest(self) -> int:
        """The highest number that was given; 0 before the first."""
        return self._next - 1

    def put(self, rows: bytes, summaries: Sequence[Summary], version: int, finished_at: float | None) -> None:
        """Keep the trajectories of a block. `version`: of the weights now. A block above the bound is not kept."""
        if not summaries or len(rows) > self._max_bytes or self._max_trajectories < 1:
            return
        block = Block(rows)
        self.num_bytes += len(rows)
        for summary in summaries:
            self._drop(summary.trajectory_id)
            oldest = summary.oldest_version
            staleness = None if oldest is None else max(0, version - oldest)
            entry = Entry(self._next, block, summary, finished_at, staleness)
            self._next += 1
            block.shown += 1
            self._entries[summary.trajectory_id] = entry
            self._groups.setdefault(summary.group_id, {})[summary.sample_index] = entry
        while len(self._entries) > self._max_trajectories or self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def settle(self, group_id: str, fate: GroupFate, reason: str) -> None:
        """A group will not be delivered."""
        for entry in self._groups.get(group_id, {}).values():
            entry.fate, entry.reason = fate, reason

    def forget(self, run: str) -> None:
        """A run is gone, and what is kept of it."""
        for name in [name for name, entry in self._entries.items() if entry.summary.run == run]:
            self._drop(name)

    def entries(self, run: str | None) -> list[Entry]:
        """All that are kept of a run (None: of all), oldest first."""
        return [entry for entry in self._entries.values() if run is None or entry.summary.run == run]

    def get(self, trajectory_id: str) -> Entry | None:
        """One by its id."""
        return self._entries.get(trajectory_id)

    def group(self, group_id: str) -> list[Entry]:
        """All that are kept of a group, by sample_index."""
        found = self._groups.get(group_id, {})
        return [found[index] for index in sorted(found)]

    def _drop(self, trajectory_id: str) -> None:
        entry = self._entries.pop(trajectory_id, None)
        if entry is None:
            return
        group = self._groups[entry.summary.group_id]
        del group[entry.summary.sample_index]
        if not group:
            del self._groups[entry.summary.group_id]
        entry.block.shown -= 1
        if not entry.block.shown:
            self.num_bytes -= len(entry.block.rows)


def find(entries: Iterable[tuple[Entry, GroupFate]], query: TrajectoryQuery) -> list[Entry]:
    """Those that fit a query, in its order. Not for the event loop: text is searched in the rows."""
    found = [entry for entry, fate in entries if _fits(entry, fate, query)]
    if query.text:
        found = _containing(found, query.text)
    if query.sort == "finished":
        return found[::-1] if query.descending else found
    if query.sort == "seconds":
        seconds = {entry.number: line.seconds for entry, line in zip(found, lines(found, brief=True), strict=True)}
        keyed = [(seconds[entry.number], entry) for entry in found]
    else:
        keyed = [(_value(entry, query.sort), entry) for entry in found]
    # What has no value comes last whichever way; among equals the newest is first.
    known = [(value, entry) for value, entry in keyed if value is not None]
    known.sort(key=lambda item: (-item[0] if query.descending else item[0], -item[1].number))
    return [entry for _, entry in known] + [entry for value, entry in reversed(keyed) if value is None]


def lines(entries: Sequence[Entry], *, brief: bool = False) -> list[Line]:
    """What lists show of trajectories. `brief`: their seconds alone. Not for the event loop."""
    found: dict[int, Line] = {}
    columns = ["timing"] if brief else ["timing", "messages", "error"]
    for block, mine in _by_block(entries):
        rows = block.table().select(columns).take(pa.array([entry.summary.first_row for entry in mine]))
        seconds = pc.struct_field(rows["timing"], "total_s").to_pylist()
        blank: list[str | None] = [None] * len(mine)
        openings, errors = (blank, blank) if brief else (_openings(rows["messages"]), rows["error"].to_pylist())
        for entry, *values in zip(mine, seconds, openings, errors, strict=True):
            found[entry.number] = Line(*values)
    return [found[entry.number] for entry in entries]


def rows_of(entry: Entry) -> pa.Table:
    """A trajectory's rows alone, copied out of their block. Not for the event loop."""
    piece = entry.block.table().slice(entry.summary.first_row, entry.summary.num_rows)
    # A slice would be sent with all of its block.
    return piece.take(pa.array(range(piece.num_rows), pa.int64())).combine_chunks()


def _fits(entry: Entry, fate: GroupFate, query: TrajectoryQuery) -> bool:
    summary, reward = entry.summary, entry.summary.reward
    return not (
        (query.upto is not None and entry.number > query.upto)
        or (query.stop_reason and summary.stop_reason not in query.stop_reason)
        or (query.group and fate not in query.group)
        or (query.scored is not None and (reward is not None) != query.scored)
        or (query.min_reward is not None and (reward is None or reward < query.min_reward))
        or (query.max_reward is not None and (reward is None or reward > query.max_reward))
        or (query.forks is not None and (summary.num_segments > 1) != query.forks)
        or (query.tool_errors is not None and (summary.tool_errors > 0) != query.tool_errors)
        or (query.version is not None and all(version != query.version for version, _ in summary.version_tokens))
    )


def _value(entry: Entry, key: str) -> float | None:
    summary = entry.summary
    if key == "reward":
        return summary.reward
    if key == "staleness":
        return entry.staleness
    return summary.num_sampled if key == "tokens" else summary.num_turns


def _containing(entries: list[Entry], text: str) -> list[Entry]:
    # Messages are kept as JSON, where quotes and line breaks are written otherwise.
    spellings = {"messages": json.dumps(text, ensure_ascii=False)[1:-1], "trajectory_id": text, "error": text}
    found: set[int] = set()
    for block, mine in _by_block(entries):
        table = block.table()
        first = pa.array([entry.summary.first_row for entry in mine])
        hits = [
            pc.fill_null(pc.match_substring(table[column].take(first), spelling, ignore_case=True), False).to_pylist()
            for column, spelling in spellings.items()
        ]
        found.update(entry.number for entry, *where in zip(mine, *hits, strict=True) if any(where))
    return [entry for entry in entries if entry.number in found]


def _openings(messages: pa.ChunkedArray) -> list[str | None]:
    # In C++, without the interpreter's lock.
    texts = pc.struct_field(pc.extract_regex(messages, _OPENING), "text")
    return [_unescaped(text) for text in pc.utf8_slice_codeunits(texts, 0, OPENING_CHARS)]


def _unescaped(scalar: pa.StringScalar) -> str | None:
    text: str | None = scalar.as_py()
    if text is None:
        return None
    # It may be cut in the middle of an escape.
    for end in range(len(text), max(0, len(text) - _ESCAPE_CHARS), -1):
        try:
            return str(json.loads(f'"{text[:end]}"', strict=False))
        except ValueError:
            continue
    return text


def _by_block(entries: Sequence[Entry]) -> Iterable[tuple[Block, list[Entry]]]:
    grouped: dict[int, tuple[Block, list[Entry]]] = {}
    for entry in entries:
        grouped.setdefault(id(entry.block), (entry.block, []))[1].append(entry)
    return grouped.values()
