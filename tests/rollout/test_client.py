"""The trainer's client where the cluster is away for a while. (All that it does otherwise: see test_gateway.)"""

from __future__ import annotations

import asyncio
from typing import Any

import pyarrow as pa
import pytest

from rollout import client as client_module
from rollout.api import Acknowledged, Batch
from rollout.client import AsyncRolloutClient
from rollout.errors import ConflictError, RolloutError, UnavailableError

BATCH = Batch("lease", "r", pa.table({}), [], 0.2, 0)


class Away:
    """A TEST DOUBLE of a backend: extensions fail as said, one after the other, and then go well."""

    def __init__(self, *failures: RolloutError) -> None:
        self.failures = list(failures)
        self.extensions = 0

    async def extend(self, lease_id: str, ttl: float) -> float:
        self.extensions += 1
        if self.failures:
            raise self.failures.pop(0)
        return ttl

    async def acknowledge(self, lease_id: str) -> Acknowledged:
        return Acknowledged(lease_id, 1)


async def worked_on(backend: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "EXTEND_RETRY_S", 0.02)
    made: Any = AsyncRolloutClient(backend)  # type: ignore[arg-type]
    async with made.using(BATCH, ttl=0.1):
        await asyncio.sleep(0.4)


async def test_a_lease_is_extended_again_after_the_cluster_was_away(monkeypatch: pytest.MonkeyPatch):
    backend = Away(UnavailableError("the gateway is gone"), UnavailableError("still"))
    await worked_on(backend, monkeypatch)
    assert backend.extensions >= 5


async def test_a_lease_that_is_lost_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch):
    backend = Away(ConflictError("it is expired"))
    await worked_on(backend, monkeypatch)
    assert backend.extensions == 1
