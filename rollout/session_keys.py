"""API keys of captured sessions and of remote rollouts: made from the session's or rollout's id and a secret, so that
nobody has to be asked.

Invariant: a key opens its own session alone, and cannot be made without the secret. So it is taken only where
somebody compares the session with the key's: at the engines (deployments.capture) and in routes.foreign.
"""

from __future__ import annotations

import hashlib
import hmac

PREFIX = "ses_"
SESSION_CALLER = "session:"
"""How callers with such a key are named, before the session's id."""
REMOTE_ROLLOUTS = "remote rollouts"
"""Purpose of the keys with which remote rollout servers call back; see derived_secret."""
_MAC_CHARS = 40  # 160 bits


def derived_secret(secret: bytes, purpose: str) -> bytes:
    """A secret for another kind of keys: they open nothing of the first kind. Empty if there is no secret."""
    return hmac.new(secret, purpose.encode(), hashlib.sha256).digest() if secret else b""


def session_key(secret: bytes, session_id: str) -> str:
    """The key of a session."""
    mac = hmac.new(secret, session_id.encode(), hashlib.sha256).hexdigest()[:_MAC_CHARS]
    return f"{PREFIX}{session_id}_{mac}"


def session_of(secret: bytes, key: str) -> str | None:
    """Whose key this is; None: nobody's, or there is no secret."""
    session_id, separator, _ = key.removeprefix(PREFIX).rpartition("_")
    if not secret or not key.startswith(PREFIX) or not separator:
        return None
    return session_id if hmac.compare_digest(key.encode(), session_key(secret, session_id).encode()) else None
