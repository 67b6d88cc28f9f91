"""The journal: what must survive, in SQLite.

Invariant: `write` returns when its statements are on disk, all of them or none; statements take effect in the order
of the calls. One thread owns the connection and commits whatever has queued up meanwhile in one transaction, so that
a thousand small writes cost one sync to disk, and the event loop never waits for a disk.

WAL mode: a killed process loses nothing that was committed, and with `synchronous=FULL` a machine that loses its
power does not either (https://sqlite.org/wal.html).
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.errors import JournalError

SCHEMA_VERSION = 1
# A transaction takes in no more than this at once, so that the first of a long queue need not wait for the last.
MAX_BYTES_PER_COMMIT = 64 * 2**20
# Free pages are given back to the file system so many at a time (of 4 KiB), beside each commit that freed some.
VACUUM_PAGES = 2_000
# The write-ahead log is cut back to this size whenever it is empty.
WAL_LIMIT_BYTES = 64 * 2**20
CLOSE_SECONDS = 10.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (run TEXT PRIMARY KEY, spec TEXT NOT NULL, state TEXT NOT NULL, totals TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tasks (
  run TEXT NOT NULL, seq INTEGER NOT NULL, task_id TEXT NOT NULL, digest BLOB NOT NULL, body TEXT,
  generation INTEGER NOT NULL DEFAULT 0, outcome TEXT, PRIMARY KEY (run, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS blocks (block INTEGER PRIMARY KEY, summaries TEXT NOT NULL, rows BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS leases (
  lease_id TEXT PRIMARY KEY, run TEXT NOT NULL, lease TEXT NOT NULL, finished_at REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS weights (version INTEGER PRIMARY KEY, source TEXT, state TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS agents (name TEXT PRIMARY KEY, spec TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Statement:
    """One SQL statement with its parameters; `rows` makes it many."""

    sql: str
    parameters: Sequence[Any] = ()
    rows: Sequence[Sequence[Any]] | None = None
    size: int = 0
    """Bytes of what it carries, roughly."""


@dataclass(slots=True)
class _Write:
    statements: tuple[Statement, ...]
    done: asyncio.Future[None]
    loop: asyncio.AbstractEventLoop


class Journal:
    """A SQLite file with one writer thread."""

    def __init__(self, path: Path | str, *, sync: bool = True) -> None:
        """Open or create. `sync`: every commit reaches the disk itself. Raises JournalError."""
        self.path = Path(path)
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self.commits = 0
        self.writes = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Conversations are in it, and the keys that trainers are called back with. SQLite gives -wal and -shm the
            # same mode.
            self.path.touch(mode=0o600)
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._prepare(sync)
        except (OSError, sqlite3.Error) as failure:
            raise JournalError(f"{self.path} cannot be opened: {failure}; see `journal.path` in the config") from None
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    async def write(self, *statements: Statement) -> None:
        """Put statements on disk, in one transaction. Raises JournalError; then nothing of them is there."""
        loop = asyncio.get_running_loop()
        write = _Write(statements, loop.create_future(), loop)
        self._queue.put(write)
        await write.done

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of a query, on a connection of its own: for the start, before anything is written."""
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            return db.execute(sql, parameters).fetchall()

    def num_bytes(self) -> int:
        """Size on disk, the write-ahead log included."""
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def close(self) -> None:
        """Commit what is queued and close."""
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _prepare(self, sync: bool) -> None:
        db = self._db
        # Must come before the first table; lets the file shrink without being rewritten.
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {'FULL' if sync else 'NORMAL'}")
        db.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA_VERSION):
            raise sqlite3.DatabaseError(f"it is of schema {version}, this is software for schema {SCHEMA_VERSION}")
        db.executescript(_SCHEMA)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            writes, size, last = [first], _size(first), False
            while size < MAX_BYTES_PER_COMMIT and not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    last = True
                    break
                writes.append(more)
                size += _size(more)
            self._commit(writes)
            if last:
                break
        self._db.close()

    def _commit(self, writes: list[_Write]) -> None:
        try:
            self._run(writes)
        except (sqlite3.Error, ValueError, OverflowError) as failure:
            if len(writes) > 1:
                # One bad write must not take the others with it.
                for write in writes:
                    self._commit([write])
                return
            _resolve(writes, JournalError(f"{self.path}: {failure}"))
            return
        self.commits += 1
        self.writes += len(writes)
        _resolve(writes, None)
        with contextlib.suppress(sqlite3.Error):
            # As a script: `execute` would step once, and free one page.
            self._db.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")

    def _run(self, writes: list[_Write]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for write in writes:
                for statement in write.statements:
                    if statement.rows is not None:
                        self._db.executemany(statement.sql, statement.rows)
                    else:
                        self._db.execute(statement.sql, statement.parameters)
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise


def _size(write: _Write) -> int:
    return sum(statement.size for statement in write.statements)


def _resolve(writes: list[_Write], failure: JournalError | None) -> None:
    """Tell the waiting, in as few wake-ups of their loops as there are loops."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for write in writes:
        by_loop.setdefault(write.loop, []).append(write.done)

    def tell(futures: list[asyncio.Future[None]]) -> None:
        for future in futures:
            if future.done():
                continue
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)

    for loop, futures in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(tell, futures)
