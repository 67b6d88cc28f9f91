"""What controller and session workers must know to play rollouts for foreign trainers. Plain data, pickled by Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollout.limits import Limits
from rollout.remote.tokenizers import LOAD_SECONDS, TokenizerSpec


@dataclass(frozen=True)
class RemoteSettings:
    """The rollout server's side of the remote rollout protocol; None in its place: this cluster is none."""

    environment: str
    """`module:Class`: what all rollouts are played in."""
    environment_args: dict[str, Any] = field(default_factory=dict, repr=False)
    limits: Limits = field(default_factory=Limits)
    """Those of tools, environment and time; `session_seconds` is a rollout's time from its start on."""
    allowed_hosts: tuple[str, ...] = ()
    """See rollout.remote.hosts.AllowedHosts."""
    model_names: Mapping[str, str | None] = field(default_factory=dict)
    """Names of the cluster's own model, with the revision of each."""
    tokenizers: Mapping[str, TokenizerSpec] = field(default_factory=dict)
    max_concurrent: int = 64
    """Rollouts that play at once, in all workers together."""
    max_queued: int = 256
    queue_seconds: float = 600.0
    """A rollout that has not begun by then ends as an error."""
    keep_seconds: float = 3600.0
    """So long a repeated request gets the stored answer."""
    report_seconds: float = 3600.0
    """So long a trainer that does not answer is told again how its rollout ended."""

    @property
    def rollout_seconds(self) -> float:
        """Deadline of one rollout, from its start in a worker."""
        return self.limits.session_seconds

    @property
    def worker_seconds(self) -> float:
        """The most that a worker takes for a rollout: beside the session's own deadline a tokenizer may have to be
        loaded before it, and the environment scores and closes after it."""
        return self.rollout_seconds + LOAD_SECONDS + 2 * self.limits.environment_seconds

    @property
    def agent_loop(self) -> str:
        """How /health calls what is played."""
        return self.environment.rpartition(":")[2] or self.environment
