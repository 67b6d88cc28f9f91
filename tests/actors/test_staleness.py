"""The staleness bound, by example and against trainers that do as they please."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.groups import GroupBook, GroupState, Member
from actors.messages import Summary
from actors.staleness import StalenessBound
from rollout.api import RunRequest
from tests.actors.service import tasks


def test_without_a_bound_anything_goes():
    bound = StalenessBound()
    assert bound.may_start(10**9, 0) and not bound.too_old(0, 10**9)


def test_the_bound_alone_limits_age_and_not_starts():
    bound = StalenessBound(max_staleness=1)
    assert bound.may_start(10**9, 0)
    assert not bound.too_old(3, 4) and bound.too_old(3, 5)
    assert not bound.too_old(None, 99), "a group without tokens does not age"


@pytest.mark.parametrize(
    ("staleness", "version", "first", "most"), [(0, 0, 0, 4), (2, 0, 0, 12), (1, 3, 3, 8), (1, 5, 3, 16)]
)
def test_how_many_groups_may_be_started(staleness: int, version: int, first: int, most: int):
    bound = StalenessBound(staleness, batch_groups=4, first_version=first)
    assert bound.may_start(most - 1, version) and not bound.may_start(most, version)


def summary(group_id: str, version: int) -> Summary:
    return Summary("r", group_id, 0, 1, False, "stop", 1.0, 1, 1, 1, 0, 0, version, 0, 1)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 3), st.integers(1, 5), st.integers(0, 2**31), st.booleans())
def test_no_group_is_delivered_older_than_the_bound(staleness: int, batch: int, seed: int, orderly: bool):
    """An orderly trainer takes B groups a version and never has one played again; another does as it likes."""
    chance = random.Random(seed)
    book = GroupBook("r", 1, RunRequest(max_staleness=staleness, batch_groups=batch))
    waiting = [book.group_id(group) for group in book.submit(tasks(batch * 8))[0]]
    running: dict[str, int] = {}
    version = replaced = 0
    for _ in range(300):
        action = chance.choice(["start", "finish", "train"])
        if action == "start" and waiting and book.admit(waiting[0], version):
            running[waiting.pop(0)] = version
        elif action == "finish" and running:
            # In any order: the slowest may have begun many versions ago.
            group_id = chance.choice(list(running))
            group = book.add(group_id, Member(0, summary(group_id, running.pop(group_id))))
            assert group is not None and book.judge(group, version) is None
            book.accept(group)
        elif action == "train":
            ready = book.available()
            wanted = batch if orderly else chance.randint(0, batch + 1)
            if len(ready) < wanted:
                continue
            for group in ready[:wanted]:
                assert group.oldest_version is not None and version - group.oldest_version <= staleness
                book.lease([group], "l")
                book.deliver(group.seq)
            version += 1
            for group in book.too_old(version):
                running.pop(book.group_id(group), None)
                again, _ = book.replace(group, "stale")
                waiting.insert(0, book.group_id(again))
                replaced += 1
        book.audit()
    if orderly and book.request.order == "completed":
        # First come, first served may still overtake a slow group; but nobody who waits was started too early.
        assert book.count(GroupState.READY) + len(running) <= (staleness + 1) * batch
