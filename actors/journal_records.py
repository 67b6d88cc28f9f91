"""What the journal holds, as statements to write and as objects read back.

Invariant: whatever `recover` returns was acknowledged to somebody, and whatever was acknowledged is in it: tasks that
were submitted, trajectories that were counted, leases that were granted, weights that became current, agents that
were added.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from actors.groups import Group, Totals, task_digest
from actors.journal import Journal, Statement
from actors.leases import Lease
from actors.messages import Summary
from rollout.agents.spec import NamedAgent
from rollout.api import RunRequest, RunState
from rollout.errors import JournalError
from rollout.tasks import Task
from rollout.weights import WeightSource

# Outcome of a task that was delivered; a dropped one has its reason there.
DELIVERED = "delivered"
# Finished leases are kept so long, for trainers that acknowledge twice.
LEASE_MEMORY_S = 24 * 3600.0

_SOURCE: TypeAdapter[Any] = TypeAdapter(WeightSource)


# Writing


def add_run(run: str, request: RunRequest, first_version: int) -> Statement:
    """A new run. `request` is complete: nothing of it depends on the config any more."""
    spec = json.dumps({"request": request.model_dump(mode="json"), "first_version": first_version})
    return Statement("INSERT INTO runs VALUES (?, ?, 'running', '{}')", (run, spec))


def set_run_state(run: str, state: RunState) -> Statement:
    """Paused, resumed, cancelled."""
    return Statement("UPDATE runs SET state = ? WHERE run = ?", (state, run))


def remove_run(run: str) -> list[Statement]:
    """All of a run but its blocks, which may hold rows of others."""
    return [Statement(f"DELETE FROM {table} WHERE run = ?", (run,)) for table in ("runs", "tasks", "leases")]


def add_tasks(run: str, groups: Iterable[Group]) -> Statement:
    """New tasks."""
    rows = [(run, g.seq, g.task.task_id, task_digest(g.task), g.task.model_dump_json()) for g in groups]
    sql = "INSERT INTO tasks (run, seq, task_id, digest, body) VALUES (?, ?, ?, ?, ?)"
    return Statement(sql, rows=rows, size=sum(len(row[4]) for row in rows))


def add_block(block: int, summaries: Sequence[Summary], rows: bytes) -> Statement:
    """Finished trajectories."""
    text = json.dumps([asdict(summary) for summary in summaries])
    return Statement("INSERT INTO blocks VALUES (?, ?, ?)", (block, text, rows), size=len(rows))


def finish_groups(run: str, seqs: Sequence[int], outcome: str, totals: Totals) -> list[Statement]:
    """Groups that are done: DELIVERED, or dropped for a reason. Their bodies are needed no more."""
    return [
        Statement(
            "UPDATE tasks SET outcome = ?, body = NULL WHERE run = ? AND seq = ?",
            rows=[(outcome, run, seq) for seq in seqs],
        ),
        Statement("UPDATE runs SET totals = ? WHERE run = ?", (json.dumps(asdict(totals)), run)),
    ]


def replace_group(run: str, group: Group) -> Statement:
    """A group is played again, under a new generation."""
    return Statement("UPDATE tasks SET generation = ? WHERE run = ? AND seq = ?", (group.generation, run, group.seq))


def remove_blocks(blocks: Iterable[int]) -> Statement:
    """Blocks of which nothing is wanted."""
    return Statement("DELETE FROM blocks WHERE block = ?", rows=[(block,) for block in blocks])


def put_lease(lease: Lease) -> list[Statement]:
    """A lease as it is now; old finished ones go."""
    now = time.time()
    finished = None if lease.state == "active" else now
    return [
        Statement(
            "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)",
            (lease.lease_id, lease.run, json.dumps(asdict(lease)), finished),
        ),
        Statement("DELETE FROM leases WHERE finished_at < ?", (now - LEASE_MEMORY_S,)),
    ]


def put_weights(version: int, source: WeightSource, state: str) -> Statement:
    """An update: `pending` before it begins, then `current` or `failed`."""
    return Statement("INSERT OR REPLACE INTO weights VALUES (?, ?, ?)", (version, source.model_dump_json(), state))


def add_agent(agent: NamedAgent) -> Statement:
    """An agent that was added while the cluster runs."""
    text = agent.model_dump_json()
    return Statement("INSERT OR REPLACE INTO agents VALUES (?, ?)", (agent.name, text), size=len(text))


def remove_agent(name: str) -> Statement:
    """It is gone."""
    return Statement("DELETE FROM agents WHERE name = ?", (name,))


# Reading back


@dataclass(slots=True)
class RecoveredRun:
    """A run as it was when the journal was last written."""

    run: str
    request: RunRequest
    first_version: int
    state: RunState
    totals: Totals
    """Of groups that are done."""
    unfinished: list[tuple[Task, int, int]] = field(default_factory=list)
    """Task, seq, generation."""
    done: list[tuple[str, bytes, str]] = field(default_factory=list)
    """task_id, digest, outcome."""


@dataclass(slots=True)
class Recovered:
    """All that the journal holds."""

    runs: dict[str, RecoveredRun]
    blocks: list[tuple[int, list[Summary], bytes]]
    leases: list[Lease]
    version: int
    """Of the current weights."""
    source: WeightSource | None
    last_version: int
    """The highest number ever given, to updates that failed as well."""
    agents: list[NamedAgent] = field(default_factory=list)
    """Those that were added while the cluster ran."""


def recover(journal: Journal) -> Recovered:
    """Read everything back. Raises JournalError for content that is not ours."""
    try:
        return _recover(journal)
    except (ValueError, TypeError, KeyError) as failure:
        raise JournalError(
            f"{journal.path} holds something that cannot be read ({failure}); move it away to begin anew"
        ) from failure


def _recover(journal: Journal) -> Recovered:
    runs: dict[str, RecoveredRun] = {}
    for name, text, state, totals in journal.read("SELECT run, spec, state, totals FROM runs ORDER BY rowid"):
        spec = json.loads(text)
        runs[name] = RecoveredRun(
            name,
            RunRequest.model_validate(spec["request"]),
            spec["first_version"],
            state,
            Totals(**json.loads(totals)),
        )
    columns = "run, seq, task_id, digest, body, generation, outcome"
    for run, seq, task_id, digest, body, generation, outcome in journal.read(
        f"SELECT {columns} FROM tasks ORDER BY run, seq"
    ):
        if outcome is None:
            runs[run].unfinished.append((Task.model_validate_json(body), seq, generation))
        else:
            runs[run].done.append((task_id, digest, outcome))
    blocks = [
        (block, [Summary(**summary) for summary in json.loads(text)], rows)
        for block, text, rows in journal.read("SELECT block, summaries, rows FROM blocks ORDER BY block")
    ]
    leases = [Lease(**json.loads(text)) for (text,) in journal.read("SELECT lease FROM leases ORDER BY finished_at")]
    version, source, last = 0, None, 0
    for number, text, state in journal.read("SELECT version, source, state FROM weights ORDER BY version"):
        last = number
        if state == "current":
            version, source = number, _SOURCE.validate_json(text)
    agents = journal.read("SELECT spec FROM agents ORDER BY rowid")
    added = [NamedAgent.model_validate_json(text) for (text,) in agents]
    return Recovered(runs, blocks, leases, version, source, last, added)
