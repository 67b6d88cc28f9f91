"""The journal: together on disk or not at all, one sync for many writes, and a bounded file."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from actors.journal import Journal, Statement
from rollout.errors import JournalError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "journal.sqlite"


def block(number: int, size: int = 10) -> Statement:
    return Statement("INSERT INTO blocks VALUES (?, '[]', ?)", (number, b"x" * size), size=size)


def blocks(journal: Journal) -> list[int]:
    return [number for (number,) in journal.read("SELECT block FROM blocks ORDER BY block")]


async def test_what_was_written_is_there_after_reopening(path: Path):
    journal = Journal(path)
    await journal.write(block(1), block(2))
    journal.close()
    assert blocks(Journal(path)) == [1, 2]


async def test_what_was_written_is_there_although_nobody_closed(path: Path):
    journal = Journal(path)
    await journal.write(block(1))
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT count(*) FROM blocks").fetchone() == (1,)


async def test_many_small_writes_share_commits(path: Path):
    journal = Journal(path)
    await asyncio.gather(*(journal.write(block(number)) for number in range(500)))
    assert len(blocks(journal)) == 500
    assert journal.writes == 500 and journal.commits < 100


async def test_writes_take_effect_in_order(path: Path):
    journal = Journal(path)
    first = journal.write(Statement("INSERT INTO weights VALUES (1, NULL, 'pending')"))
    second = journal.write(Statement("UPDATE weights SET state = 'current'"))
    await asyncio.gather(first, second)
    assert journal.read("SELECT state FROM weights") == [("current",)]


async def test_one_bad_write_fails_alone_and_whole(path: Path):
    journal = Journal(path)
    results = await asyncio.gather(
        journal.write(block(1)),
        journal.write(block(2), Statement("INSERT INTO nowhere VALUES (1)")),
        journal.write(block(3)),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None), JournalError, type(None)]
    assert "nowhere" in str(results[1])
    assert blocks(journal) == [1, 3]


async def test_the_file_shrinks_when_blocks_go(path: Path):
    journal = Journal(path)
    for number in range(40):
        await journal.write(block(number, 500_000))
    await journal.write(Statement("DELETE FROM blocks"))
    for _ in range(10):
        await journal.write(Statement("DELETE FROM leases"))
    journal.close()
    assert path.stat().st_size < 3_000_000


def test_a_path_that_cannot_be_a_journal(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(JournalError, match="cannot be opened"):
        Journal(tmp_path / "file" / "journal.sqlite")


def test_something_else_than_a_journal(path: Path):
    path.parent.mkdir()
    path.write_text("this is not a database, and longer than a header of sqlite would be" * 10)
    with pytest.raises(JournalError, match=r"cannot be opened.*journal\.path"):
        Journal(path)


def test_a_journal_of_other_software(path: Path):
    Journal(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(JournalError, match="schema 99"):
        Journal(path)


def test_only_its_owner_reads_a_journal(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    try:
        modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
        assert set(modes.values()) == {0o600}, modes
    finally:
        journal.close()
