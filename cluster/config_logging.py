"""The sections `logging` and `tracing`: what the cluster's processes say of themselves, and to whom."""

from __future__ import annotations

import os
from collections.abc import Iterable
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from cluster.config_section import Section
from rollout.logs import Format, Level, LogSettings
from rollout.redaction import digests
from rollout.tracing import TraceSettings, require

MIB = 2**20
# Where collectors take OTLP over HTTP, unless an address has a path of its own.
TRACES_PATH = "/v1/traces"


class LoggingConfig(Section):
    """Logs of controller, session workers, engine replicas, gateways and front: one line of JSON for each record."""

    level: Level = "info"
    """The least that is written. Of chatty libraries, only warnings ever are."""
    format: Format = "json"
    """Of standard error, which Ray and Kubernetes collect; `text` for people. Files are JSON always."""
    directory: str | None = Field(default=None, min_length=1, max_length=1000)
    """Where each process writes a file of its own; None: `logs/NAME` in the state directory for a cluster that
    `rollout up` starts, else what ROLLOUT_LOG_DIR names, and without that only standard error."""
    max_file_mb: int = Field(default=32, ge=1, le=4096)
    """Size of one file, in MiB. A process keeps two: the one that it writes, and the one before."""
    max_dead_mb: int = Field(default=256, ge=1, le=65_536)
    """All files of processes that have ended, in MiB; the oldest are removed."""

    @field_validator("directory")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not os.path.isabs(value):
            raise ValueError("must be an absolute path: each process has a working directory of its own")
        return value

    def resolve(self, cluster: str, hashes: Iterable[str] = (), values: Iterable[str] = ()) -> LogSettings:
        """What processes need. Never written are secrets with these SHA-256 `hashes`, and these `values`."""
        return LogSettings(
            cluster=cluster,
            level=self.level,
            format=self.format,
            directory=self.directory,
            max_file_bytes=self.max_file_mb * MIB,
            max_dead_bytes=self.max_dead_mb * MIB,
            secrets=frozenset(hashes) | digests(values),
        )


class TracingConfig(Section):
    """OpenTelemetry traces of sessions: their turns, engine calls, tool calls and environment. Off by default."""

    endpoint: str | None = Field(default=None, max_length=1000)
    """URL of a collector that takes OTLP over HTTP, such as http://127.0.0.1:4318; without a path, /v1/traces is
    added. Headers for it: the variable OTEL_EXPORTER_OTLP_HEADERS of the session workers. None: no traces."""
    sample_ratio: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the sessions that are traced, each whole or not at all."""

    @field_validator("endpoint")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise ValueError("must be an http:// or https:// address, such as http://127.0.0.1:4318")
        if parts.username is not None:
            raise ValueError("must hold no user and password; give headers in OTEL_EXPORTER_OTLP_HEADERS")
        return value if parts.path.strip("/") or parts.query else value.rstrip("/") + TRACES_PATH

    def resolve(self, cluster: str) -> TraceSettings | None:
        """What session workers need; None: no traces. Raises ConfigError where OpenTelemetry is not installed."""
        if self.endpoint is None:
            return None
        require()
        return TraceSettings(cluster, self.endpoint, self.sample_ratio)
