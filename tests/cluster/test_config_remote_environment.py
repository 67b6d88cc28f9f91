"""A config whose environment is a rollout server somewhere else."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cluster.check import check_config
from cluster.config import ClusterConfig
from cluster.deploy import foreign_settings
from rollout.api import EnvironmentRef
from rollout.session_keys import derived_secret

REMOTE = {"remote": "http://127.0.0.1:9000/", "generation": "A1"}


def config(**sections: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"model": {"path": "org/tiny"}} | sections)


def test_runs_take_the_server_from_the_config():
    made = config(environment={**REMOTE, "key_env": "ROLLOUT_REMOTE_KEY"})
    assert made.run_defaults().environment == EnvironmentRef(
        remote="http://127.0.0.1:9000", generation="A1", key_env="ROLLOUT_REMOTE_KEY"
    )
    assert made.served_agents() == {}, "its tools are not ours"
    assert config(environment={**REMOTE, "path": "m:E"}).served_agents() == {}
    assert config(environment={"path": "m:Env"}).served_agents().keys() == {"env"}


def test_check_names_the_server_and_does_not_call_it():
    (found,) = [f for f in check_config(config(environment=REMOTE)) if f.what == "environment"]
    assert found.ok and "generation A1" in found.detail


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"environment": {"remote": "http://h"}}, "generation: is required"),
        ({"environment": {"remote": "h:9000", "generation": "A"}}, "must be http"),
        ({"environment": {**REMOTE, "args": {"x": 1}}}, "args are of the class"),
        ({"environment": {**REMOTE, "key_env": "SECRET"}}, "key_env"),
        ({"environment": {"path": "m:E", "generation": "A"}}, "give remote as well"),
        ({"environment": REMOTE, "gateway": {"enabled": False}}, "asks for its turns there"),
        ({"gateway": {"public_url": "example.com"}}, "must be http"),
    ],
)
def test_what_does_not_fit_together_is_refused(sections: dict[str, Any], problem: str):
    with pytest.raises(ValidationError, match=problem):
        config(**sections)


def test_what_workers_are_told():
    made = foreign_settings(config(environment=REMOTE), b"secret")
    assert made is not None
    assert (made.address, made.address_given) == ("http://127.0.0.1:8800", False)
    assert made.trusted == ("http://127.0.0.1:9000",), "what the config names needs no leave"
    assert made.secret == derived_secret(b"secret", "remote rollouts") and "secret" not in repr(made)
    made = foreign_settings(config(gateway={"public_url": "https://c.example/"}), b"secret")
    assert made is not None and (made.address, made.address_given) == ("https://c.example", True)
    assert made.trusted == ()
    assert foreign_settings(config(gateway={"enabled": False}), b"secret") is None
