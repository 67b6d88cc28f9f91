"""How old a group may be: the bound that keeps asynchronous training near on-policy.

With η = max_staleness, B = batch_groups and v the policy version since the run began:

- a group is started only while fewer than (η + v + 1)·B groups are started and not dropped. The k-th group that is
  delivered (from 0) is trained on at version ⌊k / B⌋ at the earliest, so a group that is started at v and is among
  the first (η + v + 1)·B is trained on at version η + v at the latest, if the trainer takes B groups a version (the
  capacity formula of AReaL, arXiv 2505.24298);
- whatever the trainer does, a group is delivered only while its oldest token is at most η versions behind. One that
  falls further behind is withdrawn, running or complete, and played again.

Invariant: v_delivered − v_oldest ≤ η. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StalenessBound:
    """The bound of one run. All versions are those of the cluster."""

    max_staleness: int | None = None
    """η; None: anything goes."""
    batch_groups: int | None = None
    """B; None: only the second rule holds."""
    first_version: int = 0
    """The version at which the run began."""

    def may_start(self, started: int, version: int) -> bool:
        """Whether one more group may start when `started` are started and not dropped."""
        if self.max_staleness is None or self.batch_groups is None:
            return True
        return started < (self.max_staleness + version - self.first_version + 1) * self.batch_groups

    def too_old(self, oldest: int | None, version: int) -> bool:
        """Whether a group whose oldest token is of version `oldest` may no longer be delivered at `version`.

        None is a group without sampled tokens, which does not age.
        """
        return self.max_staleness is not None and oldest is not None and version - oldest > self.max_staleness
