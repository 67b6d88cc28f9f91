"""The running replicas of each deployment, as this process last heard from Serve.

Serve keeps the request router of every handle informed by long poll; the router (lane_router) publishes here, and
the engine client of the same process listens. No registry of our own has to be kept true.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

Listener = Callable[[frozenset[str]], None]


class ReplicaBoard:
    """The running replicas of each deployment as this process last heard. Thread-safe: routers have own threads."""

    def __init__(self) -> None:
        # Held while listeners are called, or an older list could arrive after a newer one.
        self._lock = threading.RLock()
        self._replicas: dict[str, frozenset[str]] = {}
        self._listeners: dict[str, list[Listener]] = {}

    def publish(self, deployment: str, replicas: frozenset[str]) -> None:
        """Replace the list of a deployment and tell its listeners."""
        with self._lock:
            self._replicas[deployment] = replicas
            for listener in list(self._listeners.get(deployment, ())):
                listener(replicas)

    def subscribe(self, deployment: str, listener: Listener) -> None:
        """Call `listener` now with what is known, if anything is, and at every change; from any thread."""
        with self._lock:
            self._listeners.setdefault(deployment, []).append(listener)
            known = self._replicas.get(deployment)
            if known is not None:
                listener(known)

    def unsubscribe(self, deployment: str, listener: Listener) -> None:
        """Call `listener` no more."""
        with self._lock:
            listeners = self._listeners.get(deployment, [])
            if listener in listeners:
                listeners.remove(listener)


BOARD = ReplicaBoard()
"""This process's board."""
