"""API keys of captured sessions: made from the session's id and the cluster's secret, so that nobody has to be asked.

Invariant: a key opens its own session alone, and cannot be made without the secret.
"""

from __future__ import annotations

import hashlib
import hmac

PREFIX = "ses_"
SESSION_CALLER = "session:"
"""How callers with such a key are named, before the session's id."""
_MAC_CHARS = 40  # 160 bits


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
