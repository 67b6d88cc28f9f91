"""The section `remote_rollout`: this cluster as a rollout server that foreign trainers drive.

Invariant: what it allows is written here by whoever runs the cluster, and nothing of it can be widened by a request:
where calls may go, which tokenizers there are, how much runs and waits at once.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from cluster.config_section import Section
from rollout.remote.hosts import AllowedHosts

if TYPE_CHECKING:
    from actors.remote_settings import RemoteSettings
    from cluster.config import ClusterConfig

MAX_SECONDS = 7 * 24 * 3600.0


class RemoteTokenizerConfig(Section):
    """A tokenizer that a trainer may name in its requests."""

    path: str = Field(min_length=1, max_length=1024)
    """A model directory, the same on every node, or a hub name. No code of it is run."""
    revision: str | None = Field(default=None, max_length=256)
    """Commit, tag or branch of the hub repository."""
    renderer: str = Field(default="auto", min_length=1, max_length=100)
    """As model.renderer."""
    renderer_options: dict[str, Any] = Field(default_factory=dict)
    """As model.renderer_options."""


class RemoteRolloutConfig(Section):
    """Rollouts that are played here and sampled by a trainer somewhere else. Its keys need the scope `trainer`."""

    enabled: bool = False
    environment: str | None = None
    """`module:Class` that all rollouts are played in; None: environment.path."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class; where `environment` is left out, environment.args count."""
    allowed_hosts: list[str] = Field(default_factory=list, max_length=1000)
    """Where trainers may be, beside this machine: `host`, `host:port`, `*.suffix`, an address, or a network such as
    10.0.0.0/8. A host name that leads to a private address needs that network in the list as well."""
    tokenizers: dict[str, RemoteTokenizerConfig] = Field(default_factory=dict)
    """By the names that trainers write into their requests. model.path and model.name are known without it."""
    max_concurrent: int = Field(default=64, ge=1, le=10_000)
    """Rollouts that play at once, in all workers together."""
    max_queued: int = Field(default=256, ge=0, le=100_000)
    """Rollouts that wait for a place; one more is a 429."""
    queue_seconds: float = Field(default=600.0, gt=0, le=MAX_SECONDS)
    """A rollout that has not begun by then ends as an error. This time is not the rollout's own."""
    rollout_seconds: float = Field(default=1800.0, gt=0, le=MAX_SECONDS)
    """Deadline of one rollout, from its start on."""
    keep_seconds: float = Field(default=3600.0, ge=1, le=MAX_SECONDS)
    """A request that is repeated gets the stored answer for so long after the rollout's end."""
    report_seconds: float = Field(default=3600.0, ge=0, le=MAX_SECONDS)
    """A trainer that cannot be reached is told again for so long how its rollout ended."""

    @field_validator("environment")
    @classmethod
    def _module_and_class(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value):
            raise ValueError("must be module:Class, such as examples.calculator.environment:Calculator")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _known_form(cls, hosts: list[str]) -> list[str]:
        AllowedHosts(hosts)
        return hosts


def remote_problem(config: ClusterConfig) -> tuple[str, str] | None:
    """The field of this section that does not fit the rest of the file, and why."""
    remote = config.remote_rollout
    if not remote.enabled:
        return None
    if remote.environment is None and (config.environment is None or config.environment.path is None):
        return "environment", "is required: module:Class of what rollouts are played in (or environment.path)"
    if remote.environment is None and remote.args:
        return "args", "belong to remote_rollout.environment, which is not there; write them into environment.args"
    if not config.gateway.enabled:
        return "enabled", "needs the gateway, where trainers ask for rollouts; set gateway.enabled: true"
    return None


def remote_settings(config: ClusterConfig) -> RemoteSettings | None:
    """What controller and workers must know of it; None: the cluster is no rollout server."""
    from actors.remote_settings import RemoteSettings
    from rollout.remote.tokenizers import TokenizerSpec

    remote = config.remote_rollout
    if not remote.enabled:
        return None
    environment, arguments = remote.environment, remote.args
    if environment is None:
        assert config.environment is not None and config.environment.path is not None, "remote_problem says so"
        environment, arguments = config.environment.path, config.environment.args
    revision = config.model.revision
    return RemoteSettings(
        environment=environment,
        environment_args=arguments,
        limits=config.limits.model_copy(update={"session_seconds": remote.rollout_seconds}),
        allowed_hosts=tuple(remote.allowed_hosts),
        model_names={config.model.path: revision, config.model.name: revision},
        tokenizers={name: TokenizerSpec(**spec.model_dump()) for name, spec in remote.tokenizers.items()},
        max_concurrent=remote.max_concurrent,
        max_queued=remote.max_queued,
        queue_seconds=remote.queue_seconds,
        keep_seconds=remote.keep_seconds,
        report_seconds=remote.report_seconds,
    )
