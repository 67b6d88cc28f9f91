"""The cluster as Ray Serve applications, for `serve deploy` and for KubeRay's serveConfigV2:

    applications:
    - {name: controller, route_prefix: null, import_path: "cluster.serve_app:controller", args: {config: FILE}}
    - {name: engine,     route_prefix: null, import_path: "cluster.serve_app:engine",     args: {config: FILE}}
    - {name: gateway,    route_prefix: /,    import_path: "cluster.serve_app:gateway",    args: {config: FILE}}

Invariant: the three agree without talking to each other, whichever node builds them and however often: all that they
share comes from the file and from one secret in the environment. Nothing is started while an application is built.

The application `controller` holds the supervisor, which starts the controller, its session workers and the front, and
whose end ends them; see deployments.supervisor.
"""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from cluster.config_file import load_config
from cluster.config_section import Section
from rollout.access import AccessSettings
from rollout.errors import ConfigError
from rollout.session_keys import derived_secret

if TYPE_CHECKING:
    from cluster.config import ClusterConfig

SECRET_VARIABLE = "ROLLOUT_CLUSTER_SECRET"
"""Holds what the keys between the cluster's own parts are made from, on every node the same."""
MIN_SECRET_CHARS = 32
# Where Serve's proxy listens unless serveConfigV2 says otherwise.
PROXY_PORT = 8000


class AppArgs(Section):
    """`args` of an application."""

    config: str = Field(min_length=1)
    """The cluster's YAML file, at the same path on every node."""
    overrides: list[str] = Field(default_factory=list, max_length=100)
    """As with `rollout up --set`, such as "engine.vllm.max_model_len=8192"."""
    proxy_port: int = Field(default=PROXY_PORT, ge=1, le=65535)
    """serveConfigV2's http_options.port."""
    revision: str | int | None = None
    """Means nothing. Serve builds an application anew when its args change, and not when the file does."""


@dataclass(frozen=True)
class _Read:
    """What the three applications are made from."""

    args: AppArgs
    config: ClusterConfig
    access: AccessSettings
    session_secret: bytes
    gateway_key: str


def controller(args: dict[str, Any]) -> Any:
    """The supervisor's application. Raises ConfigError."""
    from actors.front_config import FrontSettings
    from cluster.deploy import controller_settings, log_settings
    from deployments.supervisor import SupervisorSpec, build_supervisor_app

    read = _read(args)
    config = read.config
    front = None
    if config.gateway.enabled:
        gateway = f"127.0.0.1:{read.args.proxy_port}"
        front = FrontSettings(
            config.gateway.host, config.gateway.port, gateway, folder="", logging=log_settings(config)
        )
    settings = controller_settings(config, _journal(config), config.journal.sync, read.session_secret)
    return build_supervisor_app(SupervisorSpec(config.name, settings, config.engine.replicas, front))


def engine(args: dict[str, Any]) -> Any:
    """The engines' application. Raises ConfigError, and what Ray's LLMConfig raises."""
    from cluster.deploy import engine_spec
    from deployments.app import build_engine_app
    from deployments.node_engine import NodeEngine
    from deployments.openai_server import ServingSpec

    read = _read(args)
    # The host is each replica's own to find.
    serving = ServingSpec("", read.access) if read.config.gateway.enabled else None
    return build_engine_app(engine_spec(read.config, serving), NodeEngine)


def gateway(args: dict[str, Any]) -> Any:
    """The gateways' application. Raises ConfigError."""
    from cluster.deploy import gateway_address, gateway_spec
    from deployments.gateway import build_gateway_app

    read = _read(args)
    if not read.config.gateway.enabled:
        raise ConfigError(
            "gateway.enabled: is false; remove the application `gateway` from serveConfigV2, or the line"
        )
    spec = gateway_spec(read.config, read.access, read.gateway_key)
    # Gateways are on any node, and the front is on one.
    return build_gateway_app(replace(spec, engine=read.config.gateway.public_url or gateway_address(read.config)))


def _read(args: Mapping[str, Any], env: Mapping[str, str] = os.environ) -> _Read:
    from cluster.deploy import access_settings

    try:
        given = AppArgs.model_validate(dict(args))
    except ValidationError as error:
        # Never what was written in their place, which may be a secret.
        told = "; ".join(f"args.{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
        raise ConfigError(told) from None
    # vLLM is not asked about its arguments: this may be a node without a GPU. `rollout check` asks it.
    config = load_config(given.config, given.overrides, check_engine=False)
    _check_import_path(config)
    secret = _secret(env)
    session_secret = derived_secret(secret, "captured sessions")
    gateway_key = base64.urlsafe_b64encode(derived_secret(secret, "gateways to engines")).decode()
    return _Read(given, config, access_settings(config, session_secret, gateway_key), session_secret, gateway_key)


def _secret(env: Mapping[str, str]) -> bytes:
    value = env.get(SECRET_VARIABLE, "").strip()
    if len(value) < MIN_SECRET_CHARS:
        found = f"holds {len(value)} characters" if value else "is not set"
        raise ConfigError(
            f"the environment variable {SECRET_VARIABLE} {found}, and {MIN_SECRET_CHARS} random ones are needed, on "
            "every node the same; make it with `openssl rand -base64 48`"
        )
    return value.encode()


def _journal(config: ClusterConfig) -> str:
    if config.journal.path is None:
        raise ConfigError(
            "journal.path: is needed where Ray Serve brings the cluster up; name a file on a volume that outlives "
            "the head, such as /journal/rollout.sqlite"
        )
    return config.journal.path


def _check_import_path(config: ClusterConfig) -> None:
    """The processes of a Ray that runs already have their import path from their environment, not from the file."""
    known = {os.path.realpath(entry) for entry in sys.path if entry}
    missing = [entry for entry in config.pythonpath if os.path.realpath(entry) not in known]
    if missing:
        raise ConfigError(
            f"pythonpath: {', '.join(missing)} is not on the import path of this Ray's processes; put it into the "
            "nodes' PYTHONPATH, or install the package"
        )
