"""The section `access`: who may use the cluster's HTTP, and how much.

Invariant: no secret stands in the configuration. Keys are there as hashes or as names of environment variables, and
neither a repr nor an error shows what was written in their place. `resolve` turns it into what applications need.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from cluster.config_section import Section
from rollout.access import MIB, AccessKey, AccessSettings, Algorithm, JwtSettings, hash_key, require_jwt
from rollout.access_limits import Bounds
from rollout.access_paths import Scope
from rollout.errors import ConfigError

logger = logging.getLogger(__name__)

# 24 characters of base64 are 144 random bits; less is no random key, and would need a slow hash.
MIN_KEY_CHARS = 24
# RFC 7518, 3.2: a secret of HS256 is at least as long as its hash.
MIN_SECRET_BYTES = 32
# A key of 5000 lines, or another file.
MAX_KEYS_FILE_BYTES = 2**20
# The default of gateway.max_body_mb.
GATEWAY_BODY_MB = 64

# Upper case alone, so that a key written here by mistake is refused, and never repeated in a message.
VariableName = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$", max_length=100)]


class KeyConfig(Section):
    """One API key."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    """Whose it is, as limits, messages and log lines say."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$", repr=False)
    """SHA-256 of the key in hexadecimal: `printf %s "$KEY" | sha256sum`. The key: long and random, such as
    `python -c 'import secrets; print(secrets.token_urlsafe(32))'`."""
    env: VariableName | None = None
    """The environment variable that holds the key itself, in its place."""
    scopes: list[Scope] = Field(min_length=1, max_length=3)
    """`serve` for inference, `trainer` for runs and batches, `admin` for everything."""

    @model_validator(mode="after")
    def _one_source(self) -> KeyConfig:
        if (self.sha256 is None) == (self.env is None):
            raise ValueError("needs exactly one of `sha256` (the key's hash) and `env` (a variable that holds it)")
        return self


class JwtConfig(Section):
    """JSON Web Tokens of your identity provider, beside keys. Their claim `scope` holds the scopes."""

    algorithm: Algorithm
    """The only one that is accepted."""
    issuer: str = Field(min_length=1)
    """What the claim `iss` must be."""
    audience: str = Field(min_length=1)
    """What the claim `aud` must be or hold."""
    secret_env: VariableName | None = None
    """HS256: the environment variable that holds the secret, of 32 bytes or more."""
    public_key_file: str | None = Field(default=None, min_length=1)
    """RS256 and ES256: the public key, as PEM."""

    @model_validator(mode="after")
    def _key_fits(self) -> JwtConfig:
        wanted, other = ("secret_env", "public_key_file")
        if self.algorithm != "HS256":
            wanted, other = other, wanted
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            raise ValueError(f"{self.algorithm} needs `{wanted}`, and no `{other}`")
        return self


class AccessConfig(Section):
    """Who may use the cluster's HTTP, and how much. Limits count in each process: gateways and engine replicas
    do not tell each other."""

    keys: list[KeyConfig] = Field(default_factory=list, max_length=1000)
    keys_file: str | None = Field(default=None, min_length=1)
    """YAML or JSON file with more keys, a list like `keys`."""
    jwt: JwtConfig | None = None
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Of one caller: a key, or without keys a client's address. So many may also come at once."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Requests of one caller that run at once, streams and long polls included."""
    total_requests_per_minute: int | None = Field(default=None, ge=1)
    """Of all callers together."""
    total_max_concurrent: int | None = Field(default=None, ge=1)
    """Of all callers together."""
    max_body_mb: int | None = Field(default=None, ge=1, le=4096)
    """Largest request body, in MiB, of the engines' API too; None: as gateway.max_body_mb."""
    cors_origins: list[str] = Field(default_factory=list)
    """Web pages that may call the cluster from a browser, such as https://ui.example.com; "*" for all. None: none."""

    @field_validator("keys")
    @classmethod
    def _distinct(cls, keys: list[KeyConfig]) -> list[KeyConfig]:
        if twice := _repeated([key.name for key in keys]):
            raise ValueError(f"two keys are called {twice}")
        return keys

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        for index, origin in enumerate(origins):
            try:
                parts = urlsplit(origin)
                plain = bool(parts.hostname) and f"{parts.scheme}://{parts.netloc}" == origin and "@" not in origin
            except ValueError:
                plain = False
            if origin != "*" and not (plain and parts.scheme in ("http", "https")):
                raise ValueError(f'item {index} must be "*" or scheme://host[:port] without a path')
        return origins

    @property
    def protected(self) -> bool:
        """Whether anybody has to say who they are."""
        return bool(self.keys) or self.keys_file is not None or self.jwt is not None

    def resolve(self, env: Mapping[str, str], gateway_body_mb: int = GATEWAY_BODY_MB) -> AccessSettings:
        """What applications need, with the files read and the variables of `env` looked up.

        `gateway_body_mb`: gateway.max_body_mb, for where this section has no bound of its own.
        Raises ConfigError, which names the field and what is missing.
        """
        found = [(f"access.keys.{index}", key) for index, key in enumerate(self.keys)]
        if self.keys_file is not None:
            listed = _read_keys(self.keys_file)
            found += [(f"access.keys_file: {self.keys_file}: item {index}", key) for index, key in enumerate(listed)]
        keys = [_resolved(place, key, env) for place, key in found]
        if twice := _repeated([key.name for key in keys]):
            raise ConfigError(f"access.keys_file: {self.keys_file}: two keys are called {twice}")
        by_hash: dict[str, str] = {}
        for key in keys:
            if (other := by_hash.setdefault(key.sha256, key.name)) != key.name:
                raise ConfigError(f"access.keys: {other} and {key.name} are the same key; give each caller its own")
        return AccessSettings(
            keys=tuple(keys),
            jwt=None if self.jwt is None else _jwt(self.jwt, env),
            per_caller=Bounds(self.requests_per_minute, self.max_concurrent),
            total=Bounds(self.total_requests_per_minute, self.total_max_concurrent),
            max_body_bytes=(self.max_body_mb or gateway_body_mb) * MIB,
            cors_origins=tuple(self.cors_origins),
        )


def check_exposure(host: str, access: AccessConfig) -> str | None:
    """What is wrong with listening on `host`: anything but loopback needs keys. None if it is fine."""
    if access.protected or _is_loopback(host):
        return None
    return (
        f"{host or 'an empty host'} can be reached from other machines, and whoever reaches it may do everything: "
        "there are no keys; add access.keys, access.keys_file or access.jwt, or set gateway.host: 127.0.0.1"
    )


def _is_loopback(host: str) -> bool:
    bare = host.removeprefix("[").removesuffix("]")
    if bare.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        # A name may lead anywhere, and elsewhere tomorrow.
        return False


def _repeated(names: list[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def _variable(place: str, name: str, env: Mapping[str, str], least: int, unit: Literal["characters", "bytes"]) -> str:
    value = env.get(name, "").strip()
    if not value:
        raise ConfigError(f"{place}: the environment variable {name} is not set; export it first")
    size = len(value.encode()) if unit == "bytes" else len(value)
    if size < least:
        raise ConfigError(
            f"{place}: the environment variable {name} holds {size} {unit}, and at least {least} random ones are "
            "needed; make one with `python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
        )
    return value


def _resolved(place: str, key: KeyConfig, env: Mapping[str, str]) -> AccessKey:
    if key.sha256 is not None:
        digest = key.sha256.lower()
    else:
        assert key.env is not None
        digest = hash_key(_variable(f"{place}.env", key.env, env, MIN_KEY_CHARS, "characters"))
    return AccessKey(key.name, digest, frozenset(key.scopes))


def _read_keys(path: str) -> list[KeyConfig]:
    """The keys of a file. Messages name places in it and never its text, which may hold a key by mistake."""
    place = f"access.keys_file: {path}"
    text, mode = _read(place, path)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("%s can be used by other users (mode %o); `chmod 600` it", place, mode)
    try:
        # JSON is YAML.
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise ConfigError(f"{place}{line}: is neither YAML nor JSON") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{place}: is neither YAML nor JSON") from None
    try:
        keys = TypeAdapter(list[KeyConfig]).validate_python(data, strict=True)
    except ValidationError as error:
        problems = [
            ".".join(map(_shown, found["loc"])) + ": " + found["msg"].removeprefix("Value error, ")
            for found in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        raise ConfigError(f"{place}: {'; '.join(problem.removeprefix(': ') for problem in problems)}") from None
    if not keys:
        raise ConfigError(f"{place}: holds no keys; write a list of {{name, sha256, scopes}}")
    return keys


def _shown(part: str | int) -> str:
    """A part of a place. The name of a field that there is not may be a key, written without its field."""
    text = str(part)
    return text if re.fullmatch(r"[a-z0-9_]{1,16}", text) else "?"


def _read(place: str, path: str) -> tuple[str, int]:
    """A small text file and its permission bits."""
    try:
        with Path(path).expanduser().open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            raw = file.read(MAX_KEYS_FILE_BYTES + 1)
        if len(raw) > MAX_KEYS_FILE_BYTES:
            raise ConfigError(f"{place}: is larger than {MAX_KEYS_FILE_BYTES // 1024} KiB")
        return raw.decode("utf-8-sig"), mode
    except UnicodeDecodeError:
        raise ConfigError(f"{place}: is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no path"
        raise ConfigError(f"{place}: cannot be read: {reason}") from None


def _jwt(config: JwtConfig, env: Mapping[str, str]) -> JwtSettings:
    jwt = require_jwt()
    if config.secret_env is not None:
        key = _variable("access.jwt.secret_env", config.secret_env, env, MIN_SECRET_BYTES, "bytes")
    else:
        assert config.public_key_file is not None
        place = f"access.jwt.public_key_file: {config.public_key_file}"
        key, _ = _read(place, config.public_key_file)
        if "PRIVATE KEY" in key:
            raise ConfigError(f"{place}: is a private key; only the issuer may have it. Give the public one")
        try:
            jwt.get_algorithm_by_name(config.algorithm).prepare_key(key)
        except NotImplementedError:
            raise ConfigError(
                f"access.jwt.algorithm: {config.algorithm} needs cryptography; `pip install 'pyjwt[crypto]'`"
            ) from None
        except (jwt.PyJWTError, ValueError, TypeError):
            raise ConfigError(f"{place}: is no public key for {config.algorithm}, as PEM") from None
    return JwtSettings(config.algorithm, config.issuer, config.audience, key)
