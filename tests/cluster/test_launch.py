"""What a launch remembers of a Ray that is not its own."""

from __future__ import annotations

import time

import pytest
import ray

from cluster import launch
from cluster.state import ClusterState


def state_at(address: str, owns_ray: bool) -> ClusterState:
    return ClusterState("demo", "id", address, "", "", "", time.time(), owns_ray=owns_ray)


@pytest.fixture(autouse=True)
def connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process were a driver of a Ray."""
    context = type("Context", (), {"gcs_address": "10.0.0.7:6379"})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)


def test_auto_becomes_an_address_by_which_it_is_found_again():
    found = launch._with_address(state_at("auto", owns_ray=False))
    assert found.address == "10.0.0.7:6379" and found.name == "demo"


@pytest.mark.parametrize("address", ["10.1.1.1:6379", "ray://host:10001"])
def test_an_address_that_was_given_stays(address: str):
    assert launch._with_address(state_at(address, owns_ray=False)).address == address


def test_the_own_one_stays():
    assert launch._with_address(state_at("127.0.0.1:1", owns_ray=True)).address == "127.0.0.1:1"


def test_auto_alone_is_not_taken_for_a_living_ray():
    assert not launch.is_alive(state_at("auto", owns_ray=False))
