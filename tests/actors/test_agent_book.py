"""Agents that are added, kept in the journal, and turns that every gateway finds."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actors import agent_book
from actors import journal_records as records
from actors.agent_book import AgentBook
from rollout.agents.held_turns import HeldCall, HeldTurn
from rollout.agents.spec import NamedAgent
from rollout.errors import ConflictError, JournalError, NotFoundError, RefusedError
from tests.actors.service import Service


def agent(name: str = "a", **fields: object) -> NamedAgent:
    return NamedAgent(name=name, environment="m:E", **fields)  # type: ignore[arg-type]


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    made = Service(tmp_path / "journal.sqlite")
    yield made
    await made.close()


@pytest.fixture
def book(service: Service) -> AgentBook:
    return AgentBook(service.store, [])


async def test_the_list_is_told_to_those_who_do_not_know_it(book: AgentBook):
    nothing = book.added(None)
    assert nothing is not None and nothing.agents == ()
    assert book.added(nothing.version) is None
    added = await book.add(agent())
    assert added.version > nothing.version and added.agents == (agent(),)
    assert book.added(nothing.version) == added and book.added(added.version) is None
    removed = await book.remove("a")
    assert removed.version > added.version and removed.agents == ()


async def test_the_same_again_changes_nothing_and_another_is_refused(book: AgentBook):
    first = await book.add(agent(args={"x": 1}))
    assert await book.add(agent(args={"x": 1})) == first
    with pytest.raises(ConflictError, match="already; remove it first"):
        await book.add(agent(args={"x": 2}))
    with pytest.raises(NotFoundError, match="'b'"):
        await book.remove("b")


async def test_agents_are_bounded_in_number(book: AgentBook, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agent_book, "MAX_AGENTS", 2)
    await asyncio.gather(book.add(agent("a")), book.add(agent("b")))
    with pytest.raises(RefusedError, match="2 added agents"):
        await book.add(agent("c"))
    assert len(book.added(None).agents) == 2  # type: ignore[union-attr]


async def test_they_survive_the_controller(service: Service, book: AgentBook):
    full = agent("b", scopes={"t": "owner"}, owners=["app"], hooks=["m:h", {"path": "m:H", "priority": 3}])
    await book.add(agent("a"))
    await book.add(full)
    await book.remove("a")
    found = records.recover(service.journal)
    assert found.agents == [full]
    again = AgentBook(service.store, found.agents)
    assert again.added(book.added(None).version) is not None, "a version of another life is not known"  # type: ignore[union-attr]


async def test_what_the_journal_does_not_have_is_told_to_nobody(
    service: Service, book: AgentBook, monkeypatch: pytest.MonkeyPatch
):
    before = book.added(None)

    async def fail(*_: object) -> None:
        raise JournalError("the disk is full")

    monkeypatch.setattr(service.store, "write", fail)
    with pytest.raises(JournalError):
        await book.add(agent())
    assert book.added(None) == before


async def test_a_turn_is_found_again_and_travels(book: AgentBook):
    key = "0" * 32
    turn = HeldTurn(key, "a", 0, ({"role": "assistant", "content": ""},), (HeldCall("e0", "add", None, "5"),))
    await book.hold(pickle.loads(pickle.dumps(turn)))
    assert await book.held(key) == turn
    assert await book.held("1" * 32) is None
