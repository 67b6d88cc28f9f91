"""The section `viewer`: what the trajectory viewer keeps to look at."""

from __future__ import annotations

from pydantic import Field

from actors.gallery import MAX_BYTES, MAX_TRAJECTORIES
from cluster.config_section import Section


class ViewerConfig(Section):
    """The page at the gateway's `/ui`. It shows the most recent trajectories, delivered or not; both bounds hold."""

    max_trajectories: int = Field(default=MAX_TRAJECTORIES, ge=0, le=100_000)
    """0: none are kept, and the page shows the runs alone."""
    max_mb: int = Field(default=MAX_BYTES // 2**20, ge=0, le=16_384)
    """MiB of rows in the controller's memory. What is not yet delivered is in memory anyway and counts once."""
