"""The board of running replicas: listeners hear what is known and every change, of their deployment alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from actors.replica_board import BOARD, ReplicaBoard

A, AB, B = frozenset("a"), frozenset("ab"), frozenset("b")


def test_a_listener_hears_every_change():
    board = ReplicaBoard()
    heard: list[frozenset[str]] = []
    board.subscribe("engine", heard.append)
    assert heard == [], "nothing is known yet"
    for replicas in (A, AB, frozenset[str](), B):
        board.publish("engine", replicas)
    assert heard == [A, AB, frozenset(), B]


def test_a_late_listener_is_told_what_is_known():
    board = ReplicaBoard()
    board.publish("engine", A)
    board.publish("engine", AB)
    heard: list[frozenset[str]] = []
    board.subscribe("engine", heard.append)
    assert heard == [AB]


def test_that_no_replica_runs_is_known_too():
    board = ReplicaBoard()
    board.publish("engine", frozenset())
    heard: list[frozenset[str]] = []
    board.subscribe("engine", heard.append)
    assert heard == [frozenset()]


def test_deployments_and_listeners_are_apart():
    board = ReplicaBoard()
    first: list[frozenset[str]] = []
    second: list[frozenset[str]] = []
    other: list[frozenset[str]] = []
    board.subscribe("engine", first.append)
    board.subscribe("engine", second.append)
    board.subscribe("gateway", other.append)
    board.publish("engine", A)
    assert (first, second, other) == ([A], [A], [])


def test_a_listener_may_publish_and_subscribe():
    board = ReplicaBoard()
    heard: list[frozenset[str]] = []

    def listener(replicas: frozenset[str]) -> None:
        heard.append(replicas)
        if replicas == A:
            board.publish("gateway", B)
            board.subscribe("gateway", heard.append)

    board.subscribe("engine", listener)
    publisher = threading.Thread(target=board.publish, args=("engine", A), daemon=True)
    publisher.start()
    publisher.join(5)
    assert not publisher.is_alive(), "it deadlocked"
    assert heard == [A, B]


def test_publishing_from_many_threads_loses_nothing():
    board = ReplicaBoard()
    heard: list[frozenset[str]] = []
    board.subscribe("engine", heard.append)
    sets = [frozenset([str(n)]) for n in range(200)]
    threads = [
        threading.Thread(target=lambda part=part: [board.publish("engine", s) for s in part])
        for part in (sets[:100], sets[100:])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert sorted(heard, key=str) == sorted(sets, key=str)


class Hooked:
    """A lock that, when it is let go for the first time, lets another thread's `publish` in."""

    def __init__(self, lock: Any, after: Any) -> None:
        self.lock, self.after = lock, after

    def __enter__(self) -> None:
        self.lock.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.lock.__exit__(*error)
        after, self.after = self.after, None
        if after is not None:
            after()


@pytest.mark.parametrize("step", ["subscribe", "publish"])
def test_the_last_that_a_listener_hears_is_the_newest(step: str):
    board = ReplicaBoard()
    heard: list[frozenset[str]] = []
    if step == "subscribe":
        board.publish("engine", A)
        board._lock = Hooked(board._lock, lambda: board.publish("engine", AB))  # type: ignore[assignment]
        board.subscribe("engine", heard.append)
    else:
        board.subscribe("engine", heard.append)
        board._lock = Hooked(board._lock, lambda: board.publish("engine", AB))  # type: ignore[assignment]
        board.publish("engine", A)
    assert heard[-1] == AB


def test_a_process_has_one_board():
    assert isinstance(BOARD, ReplicaBoard)
