"""The rollouts of foreign trainers in the journal: accepted, running, finished, reported.

Invariant: an order is here before its trainer hears that it was taken, marked as running before its trainer hears of
its first call, and its answer is here before anybody hears of that. So after a restart what waited is played, what
was played is known to be lost, and what was not reported is.

The key of a trainer's callbacks is here as well, for as long as it is needed: the journal's file is for its owner.
"""

from __future__ import annotations

import json
import math

from actors.journal import Journal, Statement
from actors.remote_book import Entry
from rollout.errors import JournalError
from rollout.remote.order import RolloutOrder
from rollout.remote.wire import RolloutResponse

# A table of its own, made when it is first needed: journals of before this table stay readable.
_CREATE = """
CREATE TABLE IF NOT EXISTS remote_rollouts (
  rollout_id TEXT PRIMARY KEY, digest TEXT NOT NULL, state TEXT NOT NULL, body TEXT NOT NULL, response TEXT,
  times TEXT NOT NULL) WITHOUT ROWID
"""


def create() -> Statement:
    """The table, before anything else is written."""
    return Statement(_CREATE)


def put(entry: Entry) -> Statement:
    """A rollout as it is now, whole."""
    body = entry.order.model_dump_json()
    response = None if entry.response is None else entry.response.model_dump_json()
    return Statement(
        "INSERT OR REPLACE INTO remote_rollouts VALUES (?, ?, ?, ?, ?, ?)",
        (entry.rollout_id, entry.digest, entry.state, body, response, _times(entry)),
        size=len(body) + len(response or ""),
    )


def mark(entry: Entry) -> Statement:
    """Only its state and times have changed."""
    return Statement(
        "UPDATE remote_rollouts SET state = ?, times = ? WHERE rollout_id = ?",
        (entry.state, _times(entry), entry.rollout_id),
    )


def remove(rollout_ids: list[str]) -> Statement:
    """Rollouts that are forgotten."""
    return Statement("DELETE FROM remote_rollouts WHERE rollout_id = ?", rows=[(name,) for name in rollout_ids])


def recover(journal: Journal) -> list[Entry]:
    """All that are in the journal. Raises JournalError for content that is not ours."""
    if not journal.read("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'remote_rollouts'"):
        return []
    try:
        return [
            _entry(digest, state, body, response, times)
            for digest, state, body, response, times in journal.read(
                "SELECT digest, state, body, response, times FROM remote_rollouts"
            )
        ]
    except (ValueError, TypeError, KeyError) as failure:
        raise JournalError(
            f"{journal.path} holds a remote rollout that cannot be read ({type(failure).__name__}); move it away to "
            "begin anew"
        ) from None


def _times(entry: Entry) -> str:
    return json.dumps(
        {
            "accepted_at": entry.accepted_at,
            "started_at": entry.started_at,
            "ended_at": entry.ended_at,
            "reported_at": entry.reported_at,
            "report_error": entry.report_error,
            "reports": entry.reports,
        }
    )


def _entry(digest: str, state: str, body: str, response: str | None, times: str) -> Entry:
    if state not in ("queued", "running", "finished", "reported"):
        raise ValueError(state)
    return Entry(
        order=RolloutOrder.model_validate_json(body),
        digest=digest,
        state=state,  # type: ignore[arg-type]
        response=None if response is None else RolloutResponse.model_validate_json(response),
        due_at=math.inf,
        **json.loads(times),
    )
