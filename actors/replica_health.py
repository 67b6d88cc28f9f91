"""What is known of each engine replica's weights, and what is to be done about it.

    HEALTHY ⇄ SUSPECT → (Serve replaces it) → STALE → HEALTHY

Invariant: a replica is HEALTHY only if it said itself, after its last load, that it carries the current version; a
STALE one gets the current weights before anything else, and no sessions meanwhile (they go to the newest version).
Pure: no Ray, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

# A replica that could not be brought to the current weights so often in a row is given up: it is made to fail its
# health check, and Serve starts another.
MAX_FAILURES = 3


class Health(Enum):
    """State of a replica's weights."""

    HEALTHY = "healthy"
    STALE = "stale"
    """It lives, with other weights than the current ones."""
    SUSPECT = "suspect"
    """It did not answer, could not load, or carries other weights than it says; it is asked again."""


@dataclass(slots=True)
class ReplicaState:
    """One replica."""

    version: int | None = None
    """As it last said itself; None: it has said nothing yet."""
    address: str = ""
    """host:port of its own HTTP server."""
    failures: int = 0
    """In a row."""
    reason: str | None = None
    """Of the last failure."""
    reload: bool = False
    """What it says of its version is not to be trusted until it has loaded the current weights once more."""


class ReplicaTable:
    """All replicas that Serve lists."""

    def __init__(self) -> None:
        self.current = 0
        """The version that they should carry."""
        self._states: dict[str, ReplicaState] = {}

    def listed(self, names: Iterable[str]) -> None:
        """Serve lists these now; others are gone."""
        self._states = {name: self._states.get(name, ReplicaState()) for name in names}

    def answered(self, name: str, version: int, address: str | None = None) -> None:
        """A replica said what it carries; `address` None: where it always was."""
        if (state := self._states.get(name)) is not None:
            self._states[name] = ReplicaState(version, state.address if address is None else address)

    def doubted(self, name: str) -> None:
        """A replica may carry other weights than it says: whatever it answers, it must load the current ones."""
        if (state := self._states.get(name)) is not None:
            state.reload = True

    def doubtful(self) -> frozenset[str]:
        """Replicas that must not be used although they say that they carry the current version."""
        return frozenset(name for name, state in self._states.items() if state.reload)

    def failed(self, name: str, reason: str) -> None:
        """A replica did not answer, or could not load."""
        if (state := self._states.get(name)) is not None:
            state.failures += 1
            state.reason = reason

    def health(self, name: str) -> Health:
        """State of a replica. Raises KeyError."""
        state = self._states[name]
        if state.failures or state.reload:
            return Health.SUSPECT
        return Health.HEALTHY if state.version == self.current else Health.STALE

    def to_update(self) -> list[str]:
        """Replicas that should be asked, and brought to the current version if they say another."""
        return [name for name in self._states if self.health(name) is not Health.HEALTHY]

    def to_give_up(self) -> list[str]:
        """Replicas that failed too often."""
        return [name for name, state in self._states.items() if state.failures >= MAX_FAILURES]

    def serving(self) -> list[str]:
        """Addresses of the servers whose replicas carry the current version, or one that is about to become it."""
        states = self._states.values()
        fit = (
            s for s in states if not (s.failures or s.reload) and s.version is not None and s.version >= self.current
        )
        return sorted(state.address for state in fit if state.address)

    def names(self) -> list[str]:
        """All that Serve lists."""
        return list(self._states)

    def versions(self) -> dict[str, int | None]:
        """What each replica last said that it carries."""
        return {name: state.version for name, state in self._states.items()}

    def status(self) -> dict[str, dict[str, object]]:
        """Plain data for people."""
        return {
            name: {"health": self.health(name).value, "version": state.version, "reason": state.reason}
            for name, state in self._states.items()
        }
