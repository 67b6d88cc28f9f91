"""The sections `logging` and `tracing`: what they become, and what they refuse."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import ClusterConfig
from cluster.config_logging import LoggingConfig, TracingConfig
from cluster.deploy import controller_settings, engine_spec, gateway_spec, log_settings
from rollout.access import AccessKey, AccessSettings
from rollout.errors import ConfigError
from rollout.logs import LogSettings
from rollout.redaction import digest, digests
from rollout.tracing import TraceSettings

SECRET = "secret-of-a-server-0123456789"


def config(**fields: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"name": "unit", "model": {"path": "org/tiny"}} | fields)


def test_defaults():
    assert LoggingConfig().resolve("unit") == LogSettings("unit", max_file_bytes=32 * 2**20, max_dead_bytes=2**28)
    assert TracingConfig().resolve("unit") is None


@pytest.mark.parametrize(
    "fields",
    [
        {"level": "loud"}, {"format": "xml"}, {"directory": "logs"}, {"directory": ""}, {"max_file_mb": 0},
        {"max_dead_mb": 10**9}, {"surprise": 1},
    ],
)  # fmt: skip
def test_what_logging_refuses(fields: dict[str, Any]):
    with pytest.raises(ValidationError):
        LoggingConfig(**fields)


@pytest.mark.parametrize(
    "endpoint, url",
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("https://otel.example.com/", "https://otel.example.com/v1/traces"),
        ("http://host:4318/v1/traces", "http://host:4318/v1/traces"),
        ("https://host/tenant/otlp", "https://host/tenant/otlp"),
    ],
)
def test_the_collectors_address(endpoint: str, url: str):
    assert TracingConfig(endpoint=endpoint).endpoint == url


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4317", "grpc://h:4317", "http://", "http://h:99999", "http://u:p@h"])
def test_addresses_that_are_refused_without_repeating_them(endpoint: str):
    with pytest.raises(ValidationError) as failure:
        TracingConfig(endpoint=endpoint)
    assert "u:p" not in str(failure.value)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), "all"])
def test_shares_that_are_none(ratio: Any):
    with pytest.raises(ValidationError):
        TracingConfig(sample_ratio=ratio)


def test_traces_reach_the_session_workers_alone():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    found = config(tracing={"endpoint": "http://h:4318", "sample_ratio": 0.25})
    settings = controller_settings(found, "/j", True, b"s")
    assert settings.worker.tracing == TraceSettings("unit", "http://h:4318/v1/traces", 0.25)
    assert controller_settings(config(), "/j", True, b"s").worker.tracing is None


def test_a_missing_package_ends_the_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"tracing\.endpoint"):
        controller_settings(config(tracing={"endpoint": "http://h:4318"}), "/j", True, b"s")


def test_every_process_gets_the_settings_and_knows_the_secrets_that_it_may_meet():
    found = config(
        logging={"level": "debug", "format": "text", "directory": "/var/log/rollout"},
        engine={"env": {"HF_TOKEN": SECRET, "NOT_ONE": "a value of an engine's variable"}},
        mcp_servers={"s": {"url": "http://h/mcp", "headers": {"Authorization": f"Bearer {SECRET}2"}}},
    )
    access = AccessSettings(keys=(AccessKey("ann", digest("key of ann"), frozenset({"serve"})),))
    everybody = log_settings(found)
    assert (everybody.level, everybody.format, everybody.directory) == ("debug", "text", "/var/log/rollout")
    assert everybody.secrets == digests([SECRET, f"Bearer {SECRET}2"])
    assert digest(f"{SECRET}2") in everybody.secrets
    assert controller_settings(found, "/j", True, b"s").worker.logging == everybody
    assert engine_spec(found, None).logging == everybody
    served = gateway_spec(found, access, "key").logging
    assert served is not None and served.secrets == everybody.secrets | {digest("key of ann")}
    assert SECRET not in repr(served) and digest(SECRET) not in repr(served)
