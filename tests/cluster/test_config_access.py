"""The section `access`: bounds, files, variables, and that no secret is ever shown."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config_access import AccessConfig, check_exposure
from rollout.access import AccessSettings, Gate, hash_key
from rollout.access_limits import UNBOUNDED, Bounds
from rollout.errors import ConfigError

KEY = "rk-0123456789abcdefghijklmn"
HASH = hash_key(KEY)
UI = {"name": "ui", "sha256": HASH, "scopes": ["serve"]}
OPS = {"name": "ops", "env": "OPS_KEY", "scopes": ["admin"]}


def access(**fields: Any) -> AccessConfig:
    return AccessConfig.model_validate(fields, strict=True)


def refusal(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        access(**fields)
    return str(caught.value)


def unresolved(env: dict[str, str] | None = None, **fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        access(**fields).resolve(env or {})
    return str(caught.value)


def written(tmp_path: Path, text: str, mode: int = 0o600) -> str:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_nothing_configured_is_open_and_bounded_only_in_bodies() -> None:
    assert not access().protected
    assert access().resolve({}) == AccessSettings(max_body_bytes=64 * 2**20)
    assert access().resolve({}, gateway_body_mb=2).max_body_bytes == 2 * 2**20
    assert access(max_body_mb=1).resolve({}, gateway_body_mb=2).max_body_bytes == 2**20
    assert access(keys=None, jwt=None, cors_origins=None) == access()


def test_keys_by_hash_and_by_variable() -> None:
    settings = access(keys=[UI, OPS]).resolve({"OPS_KEY": KEY + "-ops\n"})
    assert [(key.name, key.sha256, key.scopes) for key in settings.keys] == [
        ("ui", HASH, {"serve"}),
        ("ops", hash_key(KEY + "-ops"), {"admin"}),
    ]
    assert access(keys=[UI | {"sha256": HASH.upper()}]).resolve({}).keys[0].sha256 == HASH
    assert pickle.loads(pickle.dumps(settings)) == settings and hash(settings)


def test_limits_are_handed_on() -> None:
    settings = access(requests_per_minute=5, total_max_concurrent=7, cors_origins=["*"]).resolve({})
    assert (settings.per_caller, settings.total) == (Bounds(5, None), Bounds(None, 7))
    assert settings.cors_origins == ("*",)
    assert access().resolve({}).per_caller == UNBOUNDED


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ({"sha256": None}, "exactly one of `sha256`"),
        ({"env": "A"}, "exactly one of `sha256`"),
        ({"sha256": HASH[:-1]}, "pattern"),
        ({"sha256": KEY}, "pattern"),
        ({"sha256": None, "env": KEY}, "pattern"),
        ({"key": KEY}, "Extra inputs"),
        ({"scopes": []}, "at least 1"),
        ({"scopes": [KEY]}, "'serve', 'trainer' or 'admin'"),
        ({"name": ""}, "pattern"),
        ({"name": "jwt:alice"}, "pattern"),
        ({"name": "a\n"}, "pattern"),
    ],
)
def test_a_bad_key_is_refused_and_not_shown(key: dict[str, Any], problem: str) -> None:
    text = refusal(keys=[UI | key])
    assert problem in text and "keys.0" in text and KEY not in text


def test_names_and_keys_are_distinct(tmp_path: Path) -> None:
    assert "two keys are called ui" in refusal(keys=[UI, UI])
    assert "ui and ops are the same key" in unresolved({"OPS_KEY": KEY}, keys=[UI, OPS])
    file = written(tmp_path, json.dumps([UI]))
    assert "two keys are called ui" in unresolved(keys=[UI], keys_file=file)


def test_a_missing_variable_is_named_with_its_field() -> None:
    text = unresolved(keys=[UI, OPS])
    assert text == "access.keys.1.env: the environment variable OPS_KEY is not set; export it first"
    assert "OPS_KEY is not set" in unresolved({"OPS_KEY": " "}, keys=[OPS])


def test_a_short_key_is_no_random_one() -> None:
    text = unresolved({"OPS_KEY": "hunter2hunter2"}, keys=[OPS])
    assert "holds 14 characters" in text and "hunter2" not in text


# Files


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_file_of_keys(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    text = json.dumps([UI, OPS]) if form == "json" else f"- name: ui\n  sha256: {HASH}\n  scopes: [serve]\n"
    config = access(keys_file=written(tmp_path, text))
    assert config.protected
    assert config.resolve({"OPS_KEY": KEY + "x"}).keys[0].name == "ui"
    assert caplog.text == ""
    assert "item 1.env" in unresolved(keys_file=config.keys_file) if form == "json" else True


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_may_use_is_told(tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    access(keys_file=written(tmp_path, json.dumps([UI]), mode)).resolve({})
    assert f"mode {mode:o}" in caplog.text and "chmod 600" in caplog.text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "valid list"),
        ("[]", "holds no keys"),
        (f"key: {KEY}", "valid list"),
        (f"- {KEY}", "0: "),
        (f"- name: ui\n  sha256: {KEY}\n  scopes: [serve]\n", "0.sha256: "),
        (f"- name: ui\n  key: {KEY}\n  scopes: [serve]\n", "0.key: Extra inputs"),
        (f"- {KEY}: serve", "0.?: Extra inputs"),
        (f"a: [\n{KEY}: *{KEY}", "is neither YAML nor JSON"),
        (f"!!python/object:{KEY} {{}}", "is neither YAML nor JSON"),
        ("\x00", "is neither YAML nor JSON"),
        ("#" * 2**20 + "#", "is larger than 1024 KiB"),
    ],
)
def test_a_bad_file_is_refused_and_not_shown(tmp_path: Path, text: str, problem: str) -> None:
    file = written(tmp_path, text)
    told = unresolved(keys_file=file)
    assert told.startswith(f"access.keys_file: {file}") and problem in told and KEY not in told


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in unresolved(keys_file=str(tmp_path / "none"))
    assert "directory" in unresolved(keys_file=str(tmp_path))
    (tmp_path / "bytes").write_bytes(b"\xff")
    assert "not UTF-8" in unresolved(keys_file=str(tmp_path / "bytes"))


# Tokens

ISSUED = {"issuer": "https://issuer", "audience": "rollout"}


@pytest.mark.parametrize(
    ("jwt", "problem"),
    [
        ({"algorithm": "none", "secret_env": "S"}, "'HS256', 'RS256' or 'ES256'"),
        ({"algorithm": "HS256"}, "HS256 needs `secret_env`, and no `public_key_file`"),
        ({"algorithm": "HS256", "public_key_file": "k"}, "HS256 needs `secret_env`"),
        ({"algorithm": "HS256", "secret_env": "S", "public_key_file": "k"}, "and no `public_key_file`"),
        ({"algorithm": "RS256", "secret_env": "S"}, "RS256 needs `public_key_file`, and no `secret_env`"),
        ({"algorithm": "HS256", "secret_env": KEY}, "pattern"),
        ({"algorithm": "HS256", "secret_env": "S", "audience": None}, "audience"),
        ({"algorithm": "HS256", "secret_env": "S", "issuer": ""}, "issuer"),
    ],
)
def test_tokens_that_fit_together(jwt: dict[str, Any], problem: str) -> None:
    text = refusal(jwt=ISSUED | jwt)
    assert problem in text and KEY not in text


def test_a_secret_of_tokens() -> None:
    pytest.importorskip("jwt")
    jwt = ISSUED | {"algorithm": "HS256", "secret_env": "JWT_SECRET"}
    assert "access.jwt.secret_env" in unresolved(jwt=jwt) and "JWT_SECRET is not set" in unresolved(jwt=jwt)
    short = unresolved({"JWT_SECRET": "pass" * 4}, jwt=jwt)
    assert "holds 16 bytes, and at least 32" in short and "passpass" not in short
    settings = access(jwt=jwt).resolve({"JWT_SECRET": "p" * 32})
    assert settings.jwt is not None and settings.jwt.key == "p" * 32
    assert settings.protected and "pppp" not in repr(settings)
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_a_public_key_of_tokens(tmp_path: Path) -> None:
    pytest.importorskip("jwt")
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    secret = private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
    path = tmp_path / "key.pem"
    jwt = ISSUED | {"algorithm": "ES256", "public_key_file": str(path)}
    assert "No such file" in unresolved(jwt=jwt)
    path.write_text(public)
    assert access(jwt=jwt).resolve({}).jwt.key == public  # type: ignore[union-attr]
    assert "is no public key for RS256" in unresolved(jwt=jwt | {"algorithm": "RS256"})
    path.write_text(secret)
    told = unresolved(jwt=jwt)
    assert "is a private key" in told and secret[40:60] not in told
    path.write_text("hello")
    assert "is no public key for ES256" in unresolved(jwt=jwt)


def test_without_pyjwt_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jwt", None)
    jwt = ISSUED | {"algorithm": "HS256", "secret_env": "JWT_SECRET"}
    assert "pip install 'pyjwt[crypto]'" in unresolved({"JWT_SECRET": "p" * 32}, jwt=jwt)
    assert Gate(access(keys=[UI]).resolve({})).settings.protected, "keys do without"


# Where it listens


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "LOCALHOST"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert check_exposure(host, access()) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "node.example.com", "127.0.0.1.example.com"])
def test_anything_else_needs_keys(host: str) -> None:
    told = check_exposure(host, access(max_concurrent=1))
    assert told is not None and "access.keys" in told and "gateway.host: 127.0.0.1" in told
    assert check_exposure(host, access(keys=[UI])) is None
    assert check_exposure(host, access(keys_file="/keys")) is None
    assert check_exposure(host, access(jwt=ISSUED | {"algorithm": "HS256", "secret_env": "S"})) is None


@pytest.mark.parametrize(
    "origin",
    [
        "https://ui.example.com/",
        "ui.example.com",
        "https://",
        "ftp://a",
        "https://u@a",
        "null",
        "",
        "*.a",
        "http://[1",
    ],
)
def test_origins_are_origins(origin: str) -> None:
    assert "item 1 must be" in refusal(cors_origins=["https://ui.example.com:8443", origin])


def test_secrets_are_in_no_repr() -> None:
    config = access(keys=[UI])
    assert HASH not in repr(config) and HASH not in str(config) and "ui" in repr(config)
    assert HASH not in repr(config.resolve({}))
