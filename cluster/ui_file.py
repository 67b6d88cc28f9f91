"""The trajectory viewer over a file: the cluster's own page, without a cluster.

    rollout ui out/demo --model examples/calculator/model

Invariant: the file is read once and never written; the page listens on this machine alone.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actors.gallery import Gallery
from actors.history import Histories
from actors.messages import Summary
from actors.viewer import Viewer
from cluster.ports import free_ports
from rollout.api import RunInfo
from rollout.errors import NotFoundError
from rollout.trajectory_file import read_trajectories

# Trajectories of one block: a search reads whole blocks, a look at one trajectory reads one.
BLOCK = 256
MAX_BODY_BYTES = 1_000
_LIGHT = ("run", "group_id", "trajectory_id", "sample_index", "segment_index", "num_segments", "reward",
          "stop_reason", "turns", "tool_calls", "attempts")  # fmt: skip


class FileStore:
    """A file's trajectories, as the viewer looks at a cluster's."""

    def __init__(self, table: pa.Table, name: str) -> None:
        """`table`: of the record. `name`: for people."""
        self.name = name
        self.runs: Mapping[str, Any] = {}
        """None of them is live: every group counts as delivered."""
        self.infos: dict[str, RunInfo] = {}
        self.gallery = Gallery(max_trajectories=sys.maxsize, max_bytes=sys.maxsize)
        self.histories = Histories()
        groups: dict[str, set[str]] = {}
        for piece, summaries in _blocks(table):
            newest = max((version for s in summaries for version, _ in s.version_tokens), default=0)
            self.gallery.put(piece, summaries, newest, None)
            for summary in summaries:
                groups.setdefault(summary.run, set()).add(summary.group_id)
                _count(self.infos.setdefault(summary.run, RunInfo(summary.run, "running", "file", 1)), summary)
        for run, info in self.infos.items():
            info.submitted = info.delivered = len(groups[run])

    def run(self, name: str) -> RunInfo:
        """A run's figures. Raises NotFoundError."""
        if name not in self.infos:
            raise NotFoundError(f"the file has no run {name!r}", "run")
        return self.infos[name]


class FileBackend:
    """What the page asks of a gateway's backend."""

    def __init__(self, store: FileStore) -> None:
        self._store = store
        viewer = Viewer(store)
        self.trajectories, self.trajectory, self.history = viewer.trajectories, viewer.trajectory, viewer.history

    async def runs(self) -> list[RunInfo]:
        """All runs of the file."""
        return list(self._store.infos.values())

    async def run_info(self, run: str) -> RunInfo:
        """One of them."""
        return self._store.run(run)

    async def weights(self) -> dict[str, Any]:
        """There are none; the page shows the file's name in their place."""
        newest = max((info.policy_version for info in self._store.infos.values()), default=0)
        return {"version": newest, "source": None, "replicas": {}, "last_update": None, "file": self._store.name}


def make_file_app(path: Path | str, model: str | None = None) -> Any:
    """The application over a file or a directory of `rollout run`.

    `model`: whose tokenizer gives the text of tokens; None: the one that the file names. Raises RecordError.
    """
    from deployments.gateway import make_app
    from deployments.token_text import TokenizerText

    table, about = read_trajectories(path)
    backend = FileBackend(FileStore(table, Path(path).name))
    named = model or about.get("model")
    text = TokenizerText(str(named)) if named else None
    return make_app(lambda: backend, MAX_BODY_BYTES, token_text=text)  # type: ignore[arg-type, return-value]


def _blocks(table: pa.Table) -> Iterator[tuple[bytes, list[Summary]]]:
    """The rows as the gallery keeps them, whole trajectories together."""
    rows = table.select(_LIGHT).to_pylist()
    found: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(row["trajectory_id"], []).append(index)
    for places in found.values():
        places.sort(key=lambda index: rows[index]["segment_index"])
    trajectories = list(found.values())
    for start in range(0, len(trajectories), BLOCK):
        mine = trajectories[start : start + BLOCK]
        piece = table.take(pa.array([index for places in mine for index in places]))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, piece.schema) as writer:
            writer.write_table(piece)
        summaries, first = [], 0
        for places in mine:
            summaries.append(replace(_summary(table, rows, places), first_row=first))
            first += len(places)
        yield sink.getvalue().to_pybytes(), summaries


def _summary(table: pa.Table, rows: Sequence[dict[str, Any]], places: Sequence[int]) -> Summary:
    row = rows[places[0]]
    arrays = [table["policy_versions"][index].values.to_numpy(zero_copy_only=False) for index in places]
    joined = np.concatenate(arrays)
    versions, counts = np.unique(joined[joined >= 0], return_counts=True)
    return Summary(
        run=row["run"],
        group_id=row["group_id"],
        sample_index=row["sample_index"],
        attempt=row["attempts"],
        retryable=False,
        stop_reason=row["stop_reason"],
        reward=row["reward"],
        num_sampled=int(counts.sum()),
        num_turns=sum(turn["role"] == "assistant" for index in places for turn in rows[index]["turns"]),
        num_segments=row["num_segments"],
        tool_calls=len(row["tool_calls"]),
        tool_errors=sum(not call["ok"] for call in row["tool_calls"]),
        oldest_version=int(versions[0]) if len(versions) else None,
        first_row=0,
        num_rows=len(places),
        version_tokens=[[int(version), int(count)] for version, count in zip(versions, counts, strict=True)],
    )


def _count(info: RunInfo, summary: Summary) -> None:
    info.group_size = max(info.group_size, summary.sample_index + 1)
    info.sessions_done += 1
    info.tokens += summary.num_sampled
    info.turns += summary.num_turns
    info.tool_calls += summary.tool_calls
    info.tool_errors += summary.tool_errors
    info.forks += summary.num_segments - 1
    info.stop_reasons[summary.stop_reason] = info.stop_reasons.get(summary.stop_reason, 0) + 1
    if summary.reward is not None:
        info.scored += 1
        info.reward_sum += summary.reward
    if summary.version_tokens:
        info.policy_version = max(info.policy_version, summary.version_tokens[-1][0])


def serve(path: Path | str, model: str | None = None, port: int | None = None) -> None:
    """Show a file until ctrl-C. Prints the address. Raises RecordError for what is no trajectory file."""
    import uvicorn

    app = make_file_app(path, model)
    chosen = port or free_ports(1)[0]
    print(f"http://127.0.0.1:{chosen}/ui/   (ctrl-C ends it)", flush=True)
    asyncio.run(uvicorn.Server(uvicorn.Config(app, port=chosen, log_level="warning")).serve())
