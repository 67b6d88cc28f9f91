"""The section `remote_rollout`: bounds, hosts, and what of it reaches controller and workers."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import ClusterConfig
from cluster.config_remote import remote_settings


def config(remote: dict[str, Any], **fields: Any) -> ClusterConfig:
    base: dict[str, Any] = {"model": {"path": "/models/demo", "name": "demo"}, "remote_rollout": remote, **fields}
    base.setdefault("environment", {"path": "m:E", "args": {"x": 1}})
    return ClusterConfig.model_validate(base)


def refusal(remote: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        config(remote, **fields)
    return str(caught.value)


def test_by_default_a_cluster_is_no_rollout_server():
    assert remote_settings(config({})) is None


def test_the_environment_is_the_configs_unless_it_has_its_own():
    settings = remote_settings(config({"enabled": True, "rollout_seconds": 77, "max_queued": 0}))
    assert settings is not None
    assert (settings.environment, settings.environment_args, settings.agent_loop) == ("m:E", {"x": 1}, "E")
    assert settings.rollout_seconds == 77 and settings.max_queued == 0
    assert settings.model_names == {"/models/demo": None, "demo": None}
    own = {"enabled": True, "environment": "n:F", "args": {"y": 2}}
    settings = remote_settings(config(own, environment=None))
    assert settings is not None and (settings.environment, settings.environment_args) == ("n:F", {"y": 2})


def test_limits_and_tokenizers_reach_the_workers():
    tokenizers = {"big": {"path": "/models/big", "revision": "v1", "renderer_options": {"a": 1}}}
    settings = remote_settings(
        config(
            {"enabled": True, "tokenizers": tokenizers, "allowed_hosts": ["t.example"]}, limits={"tool_seconds": 3}
        )
    )
    assert settings is not None
    assert settings.limits.tool_seconds == 3 and settings.limits.session_seconds == 1800
    spec = settings.tokenizers["big"]
    assert (spec.path, spec.revision, spec.renderer, spec.renderer_options) == ("/models/big", "v1", "auto", {"a": 1})
    assert settings.allowed_hosts == ("t.example",)


@pytest.mark.parametrize(
    ("remote", "fields", "told"),
    [
        ({"enabled": True}, {"environment": None}, "remote_rollout.environment"),
        ({"enabled": True, "args": {"x": 1}}, {}, "remote_rollout.args"),
        ({"enabled": True}, {"gateway": {"enabled": False}}, "gateway.enabled"),
        ({"environment": "not a path"}, {}, "module:Class"),
        ({"allowed_hosts": ["http://x"]}, {}, "allowed_hosts"),
        ({"max_concurrent": 0}, {}, "max_concurrent"),
        ({"rollout_seconds": 0}, {}, "rollout_seconds"),
        ({"tokenizers": {"a": {}}}, {}, "path"),
        ({"shiny": 1}, {}, "shiny"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_field(remote: dict[str, Any], fields: dict[str, Any], told: str):
    assert told in refusal(remote, **fields)
