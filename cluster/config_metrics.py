"""The section `metrics`: who may scrape, and where Ray exports what is its own."""

from __future__ import annotations

from pydantic import Field

from cluster.config_section import Section


class MetricsConfig(Section):
    """What Prometheus reads: the gateway's `/metrics`, and a port of Ray's for engines and nodes."""

    public: bool = False
    """The gateway's `/metrics` needs no key although the rest of it does. It names runs and tools, and holds nothing
    that was said in them. Without keys everybody may read it anyway."""
    ray_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the local Ray's own metrics (`ray_*`: vLLM's, Serve's, the node's), on loopback; None: a free one,
    which `rollout status --json` names. A Ray that runs elsewhere has its own."""
