"""Leases: who has been given which groups, and until when.

Invariant: a group is in at most one active lease. A lease is active, and then exactly one of acknowledged, expired
or released. An acknowledgement counts once; after expiry it counts only while nobody else has been given the groups.
Pure: the caller brings the time (seconds since the epoch, as leases outlive processes).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rollout.errors import ConflictError, NotFoundError

LeaseState = Literal["active", "acknowledged", "expired", "released"]
# So many finished leases are remembered, so that a repeated acknowledgement gets its answer.
MAX_FINISHED = 10_000


@dataclass(slots=True)
class Lease:
    """A promise: these groups go to nobody else until `expires_at`."""

    lease_id: str
    run: str
    groups: list[int]
    """Positions (`Group.seq`)."""
    expires_at: float
    version: int
    """Policy version when it was granted."""
    request_id: str | None = None
    state: LeaseState = "active"


class LeaseBook:
    """All leases of a cluster."""

    def __init__(self) -> None:
        self._active: dict[str, Lease] = {}
        self._finished: dict[str, Lease] = {}
        self._by_request: dict[tuple[str, str], str] = {}

    def grant(
        self, run: str, groups: Iterable[int], *, now: float, ttl: float, version: int, request_id: str | None = None
    ) -> Lease:
        """A new lease of `ttl` seconds."""
        lease = Lease(uuid.uuid4().hex, run, list(groups), now + ttl, version, request_id)
        self.restore(lease)
        return lease

    def restore(self, lease: Lease) -> None:
        """Take in a lease, as granted or as the journal has it."""
        if lease.state == "active":
            self._active[lease.lease_id] = lease
        else:
            self._remember(lease)
        if lease.request_id is not None:
            self._by_request[lease.run, lease.request_id] = lease.lease_id

    def of_request(self, run: str, request_id: str | None) -> Lease | None:
        """The active lease that a request was given before."""
        lease_id = self._by_request.get((run, request_id)) if request_id is not None else None
        return self._active.get(lease_id) if lease_id is not None else None

    def get(self, lease_id: str) -> Lease:
        """Raises NotFoundError."""
        lease = self._active.get(lease_id) or self._finished.get(lease_id)
        if lease is None:
            raise NotFoundError(f"there is no lease {lease_id!r}", "lease_id")
        return lease

    def active(self, lease_id: str) -> Lease:
        """Raises NotFoundError, or ConflictError for a lease that is no longer active."""
        lease = self.get(lease_id)
        if lease.state != "active":
            raise ConflictError(f"lease {lease_id!r} is {lease.state}", "lease_id")
        return lease

    def extend(self, lease_id: str, *, now: float, ttl: float) -> Lease:
        """Let an active lease last until `now + ttl`. Raises NotFoundError or ConflictError."""
        lease = self.active(lease_id)
        lease.expires_at = now + ttl
        return lease

    def finish(self, lease: Lease, state: LeaseState) -> None:
        """End a lease."""
        self._active.pop(lease.lease_id, None)
        lease.state = state
        self._remember(lease)

    def expired(self, now: float) -> list[Lease]:
        """Active leases whose time is over."""
        return [lease for lease in self._active.values() if lease.expires_at <= now]

    @property
    def num_active(self) -> int:
        """Leases that neither ended nor expired."""
        return len(self._active)

    def of_run(self, run: str) -> list[Lease]:
        """Active leases of a run."""
        return [lease for lease in self._active.values() if lease.run == run]

    def forget_run(self, run: str) -> None:
        """Drop all that is known of a run's leases."""
        for book in (self._active, self._finished):
            for lease_id in [key for key, lease in book.items() if lease.run == run]:
                del book[lease_id]
        for key in [key for key in self._by_request if key[0] == run]:
            del self._by_request[key]

    def audit(self) -> None:
        """Check the invariant. Raises AssertionError."""
        held = [(lease.run, seq) for lease in self._active.values() for seq in lease.groups]
        assert len(held) == len(set(held)), "a group is leased twice"
        assert all(lease.state == "active" for lease in self._active.values())
        assert all(lease.state != "active" for lease in self._finished.values())

    def _remember(self, lease: Lease) -> None:
        self._finished[lease.lease_id] = lease
        while len(self._finished) > MAX_FINISHED:
            oldest = self._finished.pop(next(iter(self._finished)))
            if oldest.request_id is not None:
                self._by_request.pop((oldest.run, oldest.request_id), None)
