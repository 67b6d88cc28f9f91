"""The front where Serve brings the cluster up: whom it asks, and how many engines it takes."""

from __future__ import annotations

from typing import Any

import ray

from actors.front_config import SLOTS, FrontSettings
from deployments.serve_front import ServeFront

SETTINGS = FrontSettings("127.0.0.1", 8800, "127.0.0.1:8000", "/nowhere")


def front_of(addresses: list[str], monkeypatch: Any) -> tuple[ServeFront, list[tuple[str, str]]]:
    """A front whose controller knows these engines, and whom it asked for."""
    asked: list[tuple[str, str]] = []

    class Serving:
        """A TEST DOUBLE of the controller's method."""

        async def remote(self) -> list[str]:
            return addresses

    def get_actor(name: str, namespace: str) -> Any:
        asked.append((name, namespace))
        return type("Handle", (), {"serving": Serving()})

    context = type("Context", (), {"was_current_actor_reconstructed": False})
    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    return ServeFront(SETTINGS, "controller", "demo"), asked


async def test_it_asks_the_controller_of_its_own_cluster(monkeypatch):
    front, asked = front_of(["10.0.0.2:1", "10.0.0.1:1"], monkeypatch)
    assert await front._ask() == ["10.0.0.1:1", "10.0.0.2:1"]
    assert asked == [("controller", "demo")]


async def test_more_engines_than_places_are_no_failure(monkeypatch):
    addresses = [f"10.0.{number // 256}.{number % 256}:1" for number in range(SLOTS + 100)]
    front, _ = front_of(addresses, monkeypatch)
    found = await front._ask()
    assert len(found) == SLOTS and found == await front._ask(), "and always the same ones"
