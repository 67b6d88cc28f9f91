"""Who may do what: API keys and tokens, their scopes, and the decision on one request.

Invariant: a request is let in only by a key or token that has the scope its path needs; with nothing configured
everybody is let in. A refusal is a value, never an exception, and no message, repr or log line holds a secret.

Keys are kept as plain SHA-256 hashes. A slow hash (bcrypt, argon2) protects what people choose, by making every guess
expensive; a key is 128 random bits or more, which nobody guesses at any speed, and is checked with every request.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rollout.access_limits import UNBOUNDED, Bounds, Limiter
from rollout.access_paths import SCOPES, Need, Scope, error_form, needed_scope
from rollout.errors import ConfigError
from rollout.session_keys import SESSION_CALLER, session_of

Algorithm = Literal["HS256", "RS256", "ES256"]
Kind = Literal["unauthenticated", "forbidden", "too_large", "busy"]

# Clocks of two machines may differ by so much.
LEEWAY_S = 10
# The subject of a token becomes the caller's name, in messages and log lines.
MAX_SUBJECT_CHARS = 128
MIB = 2**20

STATUS: dict[Kind, int] = {"unauthenticated": 401, "forbidden": 403, "too_large": 413, "busy": 429}
# (type, code) in OpenAI's bodies and type in Anthropic's, as their own servers say.
_OPENAI: dict[Kind, tuple[str, str]] = {
    "unauthenticated": ("invalid_request_error", "invalid_api_key"),
    "forbidden": ("invalid_request_error", "insufficient_permissions"),
    "too_large": ("invalid_request_error", "request_too_large"),
    "busy": ("requests", "rate_limit_exceeded"),
}
_ANTHROPIC: dict[Kind, str] = {
    "unauthenticated": "authentication_error",
    "forbidden": "permission_error",
    "too_large": "request_too_large",
    "busy": "rate_limit_error",
}
# Word for word what rollout servers of the remote rollout protocol say; our own words stand beside it.
_NO_KEY = "Invalid or missing API key"


@dataclass(frozen=True, slots=True)
class AccessKey:
    """One API key, by the hash of it."""

    name: str
    """Names the caller in limits, messages and log lines."""
    sha256: str = field(repr=False)
    """Hexadecimal, lower case."""
    scopes: frozenset[Scope]
    limited: bool = True
    """False for the cluster's own parts, whose callers are limited where they come in."""


@dataclass(frozen=True, slots=True)
class JwtSettings:
    """Which tokens are believed."""

    algorithm: Algorithm
    """The only one; what a token says of itself is not asked."""
    issuer: str
    audience: str
    key: str = field(repr=False)
    """HS256: the secret. RS256, ES256: the public key as PEM."""


@dataclass(frozen=True, slots=True)
class AccessSettings:
    """What an application is protected with. May be pickled; the only secret in it is a token's."""

    keys: tuple[AccessKey, ...] = ()
    jwt: JwtSettings | None = None
    per_caller: Bounds = UNBOUNDED
    """Bounds of one caller: a key, a token's subject, or without keys a client's address."""
    total: Bounds = UNBOUNDED
    """Bounds of all callers together."""
    max_body_bytes: int | None = None
    cors_origins: tuple[str, ...] = ()
    public_paths: frozenset[str] = frozenset()
    """Paths that need some key, whichever, and here need none."""
    session_secret: bytes = field(default=b"", repr=False)
    """Makes the keys of captured sessions; empty: there are none."""
    session_keys: bool = False
    """Whether those keys are let in. Only where something behind the gate keeps each to its own session."""

    @property
    def protected(self) -> bool:
        """Whether anybody has to say who they are."""
        return bool(self.keys) or self.jwt is not None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and what they may do."""

    name: str
    scopes: frozenset[Scope]
    limited: bool = True
    """False where the path is open to everybody, such as /health: probes must not meet a limit."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not let in."""

    kind: Kind
    message: str
    retry_after: int | None = None
    """Whole seconds."""

    @property
    def status(self) -> int:
        """Its HTTP status."""
        return STATUS[self.kind]

    def headers(self) -> dict[str, str]:
        """What HTTP asks for beside the body."""
        if self.kind == "unauthenticated":
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self, path: str, correlation_id: str) -> dict[str, Any]:
        """The error as the clients of this path read it."""
        form = error_form(path)
        if form == "anthropic":
            error = {"type": _ANTHROPIC[self.kind], "message": self.message}
            return {"type": "error", "error": error, "request_id": correlation_id}
        if form == "openai":
            kind, code = _OPENAI[self.kind]
            return {"error": {"message": self.message, "type": kind, "param": None, "code": code}}
        ours = {"error": {"type": self.kind, "message": self.message, "field": None}}
        if form == "remote":
            return {"detail": _NO_KEY if self.kind == "unauthenticated" else self.message, **ours}
        return ours


def hash_key(key: str | bytes) -> str:
    """What the configuration holds of a key: its SHA-256 in hexadecimal."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()


def allows(scopes: frozenset[Scope], needed: Need | None) -> bool:
    """Whether these scopes are enough. `admin` implies the others."""
    if needed == "any":
        return bool(scopes)
    return needed is None or needed in scopes or "admin" in scopes


class Gate:
    """Decides on the requests of one process."""

    def __init__(self, settings: AccessSettings, limiter: Limiter | None = None) -> None:
        """Raises ConfigError where tokens are configured and PyJWT is not installed."""
        self.settings = settings
        bounded = settings.per_caller != UNBOUNDED or settings.total != UNBOUNDED
        # Without bounds nothing is counted.
        self.limiter = limiter or (Limiter(settings.per_caller, settings.total) if bounded else None)
        if settings.jwt is not None:
            require_jwt()

    def admit(self, method: str, path: str, headers: Mapping[bytes, bytes], address: str) -> Caller | Refusal:
        """Who sent this, if they may. `headers`: names in lower case. `address`: of the client's machine.

        Counts nothing yet; see `enter`.
        """
        needed = needed_scope(method, path)
        if needed is None or (needed == "any" and path in self.settings.public_paths):
            return Caller(address, frozenset(), limited=False)
        if not self.settings.protected:
            return Caller(address, frozenset(SCOPES))
        caller = self._identify(headers)
        if isinstance(caller, Refusal) or allows(caller.scopes, needed):
            return caller
        has = ", ".join(sorted(caller.scopes)) or "none"
        wanted = "one of the scopes" if needed == "any" else f"the scope {needed}"
        return Refusal("forbidden", f"this needs {wanted}; {caller.name} has: {has}")

    def too_large(self, length: int) -> Refusal | None:
        """Refuses a body of so many bytes, announced or received so far."""
        limit = self.settings.max_body_bytes
        if limit is None or length <= limit:
            return None
        return Refusal(
            "too_large", f"the body has more than {limit} bytes; send less at once, or raise access.max_body_mb"
        )

    def enter(self, caller: Caller) -> Refusal | None:
        """Counts a request in, to be counted out by `leave`; or says when to come again."""
        if self.limiter is None or not caller.limited:
            return None
        busy = self.limiter.enter(caller.name)
        if busy is None:
            return None
        return Refusal("busy", f"{busy.message}; try again in {busy.retry_after} s", busy.retry_after)

    def leave(self, caller: Caller) -> None:
        """Counts a request out that `enter` has let in."""
        if self.limiter is not None and caller.limited:
            self.limiter.leave(caller.name)

    def _identify(self, headers: Mapping[bytes, bytes]) -> Caller | Refusal:
        scheme, _, bearer = headers.get(b"authorization", b"").strip().partition(b" ")
        # Remote trainers may send the bare key. Of another scheme, such as Basic, nothing is one.
        authorization = bearer.strip() if scheme.lower() == b"bearer" else b"" if bearer else scheme
        # OpenAI's clients send the first, Anthropic's the second, and those told to send both do.
        offered = [authorization, headers.get(b"x-api-key", b"").strip()]
        offered = [key for key in offered if key]
        if not offered:
            return Refusal("unauthenticated", "no API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`")
        why = "the API key is not known"
        for key in offered:
            if (found := self._by_key(key)) is not None:
                return found
        for key in offered:
            if self.settings.jwt is not None and key.count(b".") == 2:
                token = read_token(self.settings.jwt, key)
                if isinstance(token, Caller):
                    return token
                why = token
        return Refusal("unauthenticated", why)

    def _by_key(self, key: bytes) -> Caller | Refusal | None:
        digest = hash_key(key)
        session = session_of(self.settings.session_secret, key.decode("latin-1"))
        if session is not None:
            if not self.settings.session_keys:
                return Refusal("forbidden", "this key is of one session; use it with that session's base_url")
            return Caller(f"{SESSION_CALLER}{session}", frozenset({"serve"}))
        found = None
        # All are compared, each in constant time: how long it takes tells nothing about which hash was near.
        for known in self.settings.keys:
            if hmac.compare_digest(digest, known.sha256):
                found = known
        return None if found is None else Caller(found.name, found.scopes, found.limited)


def require_jwt() -> Any:
    """The module of PyJWT. Raises ConfigError where it is not installed."""
    try:
        import jwt
    except ImportError:
        raise ConfigError(
            "access.jwt: needs PyJWT, which is not installed; `pip install 'pyjwt[crypto]'`, "
            "or install rollout-cluster with the extra [cpu] or [gpu]"
        ) from None
    return jwt


def read_token(settings: JwtSettings, token: bytes) -> Caller | str:
    """Who a JSON Web Token speaks for, or why it is not believed. The text says nothing of what is in the token."""
    jwt = require_jwt()
    try:
        claims = jwt.decode(
            token,
            settings.key,
            algorithms=[settings.algorithm],
            issuer=settings.issuer,
            audience=settings.audience,
            leeway=LEEWAY_S,
            options={"require": ["exp", "iss", "aud"]},
        )
    except jwt.ExpiredSignatureError:
        return "the token has expired"
    except jwt.InvalidIssuerError:
        return "the token is of another issuer than access.jwt.issuer"
    except jwt.InvalidAudienceError:
        return "the token is for another audience than access.jwt.audience"
    except jwt.MissingRequiredClaimError as missing:
        return f"the token has no claim {missing.claim}"
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        # The last are of JSON that no honest issuer writes.
        return "the token is not valid"
    given = claims.get("scope", "")
    names = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
    subject = claims.get("sub", "")
    if not isinstance(subject, str) or len(subject) > MAX_SUBJECT_CHARS or not subject.isprintable():
        return "the token's subject is not a short text"
    # Tokens carry scopes of other services too. Tokens without a subject share one name, and its limits.
    return Caller(f"jwt:{subject}", frozenset(scope for scope in SCOPES if scope in names))
