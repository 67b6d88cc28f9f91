"""A Ray of ours never listens without a token, and no token of the user's is overridden."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import ROOT

SCRIPT = """
import os
from cluster.ray_auth import use_token
use_token(); use_token()
print(os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN_PATH"), os.environ.get("RAY_AUTH_TOKEN"))
"""


def run(state_dir: object, **environment: str) -> list[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**clean, "ROLLOUT_STATE_DIR": str(state_dir), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_a_token_is_made_once_and_only_its_owner_may_read_it(tmp_path):
    path = tmp_path / "ray_token"
    assert run(tmp_path) == ["token", str(path), "None"]
    token = path.read_text()
    assert len(token) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    run(tmp_path)
    assert path.read_text() == token


def test_the_users_own_token_and_mode_are_respected(tmp_path):
    assert run(tmp_path, RAY_AUTH_TOKEN="mine") == ["token", "None", "mine"]
    assert run(tmp_path, RAY_AUTH_MODE="disabled") == ["disabled", "None", "None"]
    assert not (tmp_path / "ray_token").exists()
