"""Loading as it is followed: a real TP=2 load, a subscriber who comes late, and a checkpoint that is cut."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from cluster import state
from cluster.ports import free_ports
from tests.conftest import MODEL, ROOT
from tests.integration.guarded import CONFIG, UP_SECONDS, Guarded, Heard, Subscriber, up_and_listen

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600, func_only=True)]

LAYERS = 4
# What is cut off the checkpoint's end. Its header stays whole, so that the load begins.
CUT_BYTES = 200_000


def assert_in_order(heard: Heard) -> None:
    assert heard.failure is None and heard.done
    assert heard.ids == sorted(set(heard.ids)) and heard.ids[0] > 0
    assert [stage for stage in heard.stages if stage in ("ready", "error")] == heard.stages[-1:], "one end, the last"


@pytest.mark.parametrize("who", ["early", "late"])
def test_a_real_load_is_followed_to_its_end(guarded: Guarded, who: str):
    heard: Heard = getattr(guarded.up, who)
    assert_in_order(heard)
    assert heard.stages[-1] == "ready"
    assert "warming_up" in heard.stages, "weights that are there are not yet an engine that answers"
    ranks = heard.ranks()
    assert set(ranks) == {0, 1}, "both ranks of TP=2"
    for figures in ranks.values():
        read = [event["bytes_read"] for event in figures]
        assert read == sorted(read), "never back"
        last = figures[-1]
        assert last["layers_loaded"] == last["layers_total"] == LAYERS
        assert last["bytes_read"] == last["bytes_total"] > 3_000_000
        # Each rank holds its share of what both read.
        assert 0.5 < last["vram_mb"] < last["bytes_total"] / 2**20
        assert last["device"]


def test_who_comes_late_gets_the_state_first_and_the_same_end(guarded: Guarded):
    early, late = guarded.up.early, guarded.up.late
    assert late.ids[-1] == early.ids[-1] and late.events[-1] == early.events[-1]
    assert len(late.events) <= len(early.events), "the present state, not the past"
    last = {rank: figures[-1] for rank, figures in early.ranks().items()}
    assert {rank: figures[-1] for rank, figures in late.ranks().items()} == last


def test_the_command_shows_the_same_progress(guarded: Guarded):
    assert "guarded" in guarded.up.output


@pytest.fixture
def cut(tmp_path: Path) -> tuple[Path, str]:
    """A config whose model is cut off, and its address."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    weights = max(model.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - CUT_BYTES)
    (port,) = free_ports(1)
    config = yaml.safe_load(CONFIG.read_text())
    config |= {"name": "cut", "gateway": {"port": port}, "pythonpath": [str(ROOT)]}
    config["model"] = {"path": str(model)}
    config["engine"]["start_attempts"] = 1
    # The keys are no part of this.
    del config["access"]
    path = tmp_path / "cut.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, f"http://127.0.0.1:{port}"


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_an_error_to_everybody(cut: tuple[Path, str]):
    config, address = cut

    def under_way(early: Subscriber) -> None:
        early.any.wait(UP_SECONDS)

    up = up_and_listen(config, address, "none", under_way)
    for heard in (up.early, up.late):
        assert_in_order(heard)
        assert heard.stages[-1] == "error"
        assert "SafetensorError" in heard.events[-1]["message"], heard.events[-1]
    for figures in up.early.ranks().values():
        assert figures[-1]["bytes_read"] < figures[-1]["bytes_total"], "what was not read is not said to be"
    assert up.returncode == 1 and "the engines failed to start" in up.output.replace("\n", " ")
    assert state.load("cut") is None, "nothing of it is left"
