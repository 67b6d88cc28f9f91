"""Token authentication of the Ray clusters that we start.

Invariant: a Ray of ours never listens without a token, as whoever reaches its port may run code. One token serves
all clusters of a user; it lives in the state directory, readable by that user alone, unless the environment
already names one (Ray's own variables: https://docs.ray.io/en/latest/ray-security/token-auth.html).
"""

from __future__ import annotations

import os
import secrets
import sys
from typing import Any

from cluster import state

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def use_token() -> None:
    """Let this process, and what it starts, use the user's token. An explicit RAY_AUTH_MODE is respected."""
    if MODE in os.environ and (os.environ[MODE] != "token" or TOKEN in os.environ or TOKEN_PATH in os.environ):
        return
    os.environ[MODE] = "token"
    if TOKEN not in os.environ and TOKEN_PATH not in os.environ:
        os.environ[TOKEN_PATH] = _token_file()
    if "ray" in sys.modules:
        # Ray reads its environment when it is imported, and caches the token that it found.
        from ray import _raylet

        native: Any = _raylet
        native.Config.initialize("")
        native.AuthenticationTokenLoader.instance().reset_cache()


def _token_file() -> str:
    path = state.state_dir() / "ray_token"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        pass
    return str(path)
