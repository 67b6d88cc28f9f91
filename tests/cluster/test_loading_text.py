"""One line about loading: what it says at each stage, and of whom."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.loading_text import BAR_CHARS, bar, loading_text
from rollout.loading import LoadingEvent, LoadingState


def event(stage: str, replica: str = "r", **figures: Any) -> LoadingEvent:
    return LoadingEvent(1, {"stage": stage, "replica": replica, **figures})


def rank(number: int, read: int | None, total: int | None, replica: str = "r", **figures: Any) -> LoadingEvent:
    known = {"device": "cuda:0", "layers_loaded": 3, "layers_total": 28, "vram_mb": 1536.4}
    return event(
        "loading_to_vram", replica, **{"rank": number, "bytes_read": read, "bytes_total": total, **known, **figures}
    )


@pytest.mark.parametrize(
    ("done", "total", "full"),
    [(0, 10, 0), (5, 10, 6), (10, 10, 12), (20, 10, 12), (5, None, 0), (None, 10, 0), (0, 0, 0)],
)
def test_bars(done: int | None, total: int | None, full: int):
    text = bar(done, total)
    assert text == "█" * full + "░" * (BAR_CHARS - full)


def test_nothing_is_known():
    assert loading_text([]) == ""
    assert loading_text([event("ready")]) == ""


def test_downloading():
    text = loading_text(
        [event("downloading", bytes_downloaded=1_500_000_000, bytes_total=3_000_000_000, speed_mbps=9)]
    )
    assert text == "downloading ██████░░░░░░ 1.5 GB of 3.0 GB"
    text = loading_text([event("downloading", bytes_downloaded=1_500_000, bytes_total=None, speed_mbps=None)])
    assert text == "downloading ░░░░░░░░░░░░ 1.5 MB"


def test_the_newest_download_is_told():
    old = event("downloading", "a", bytes_downloaded=1_000_000, bytes_total=4_000_000, speed_mbps=1)
    new = event("downloading", "b", bytes_downloaded=2_000_000, bytes_total=4_000_000, speed_mbps=1)
    assert "2.0 MB of 4.0 MB" in loading_text([old, new])


def test_ranks_that_load_have_a_bar_each():
    text = loading_text([rank(1, 10, 40), rank(0, 20, 40)])
    assert text == "rank 0 ██████░░░░░░ 3/28 layers, 1,536 MB  rank 1 ███░░░░░░░░░ 3/28 layers, 1,536 MB"


def test_loading_is_told_and_not_the_download_before_it():
    before = event("downloading", bytes_downloaded=5, bytes_total=5, speed_mbps=1)
    assert loading_text([before, rank(0, 20, 40)]).startswith("rank 0 ")


def test_a_rank_that_has_finished_is_not_told():
    assert loading_text([rank(0, 40, 40), rank(1, 10, 40)]).startswith("rank 1 ")


def test_of_many_ranks_the_one_furthest_behind():
    ranks = [rank(number, 30, 40) for number in range(4)]
    assert loading_text([*ranks, rank(4, 10, 40)]).startswith("rank 4 ███░")
    assert "  " not in loading_text([*ranks, rank(4, 10, 40)])


def test_a_rank_of_an_unknown_total_is_furthest_behind():
    ranks = [rank(number, 30, 40) for number in range(4)]
    text = loading_text([*ranks, rank(4, 10**9, None, layers_loaded=None, layers_total=None, vram_mb=None)])
    assert text == "rank 4 ░░░░░░░░░░░░ 0 MB"


def test_ranks_of_several_replicas_are_told_apart():
    text = loading_text([rank(0, 10, 40, "engine#b"), rank(0, 20, 40, "engine#a")])
    first, second = text.split("  ")
    assert first.startswith("replica 0 rank 0 ██████░") and second.startswith("replica 1 rank 0 ███░")
    # The other one has finished, and this one is still called the same.
    assert loading_text([rank(0, 10, 40, "engine#b"), rank(0, 40, 40, "engine#a")]).startswith("replica 1 rank 0 ")


def test_what_comes_after_loading():
    ranks = [rank(0, 2_000_000_000, 2_000_000_000), rank(1, 2_000_000_000, 2_000_000_000)]
    assert loading_text(ranks) == "2.0 GB loaded, starting the engine"
    assert loading_text([*ranks, event("warming_up")]) == "2.0 GB loaded, warming up"


def test_warming_up_without_figures_of_loading():
    assert loading_text([event("warming_up")]) == "warming up"


def test_the_boards_own_events_can_be_told():
    state = LoadingState(1)
    figures = {
        "device": "cpu",
        "layers_loaded": 1,
        "layers_total": 2,
        "vram_mb": 8.0,
        "bytes_read": 1,
        "bytes_total": 4,
    }
    state.report("engine#a", [{"stage": "loading_to_vram", "rank": 0, **figures}])
    assert loading_text(state.snapshot().events) == "rank 0 ███░░░░░░░░░ 1/2 layers, 8 MB"
    state.report("engine#a", [{"stage": "ready"}])
    assert loading_text(state.snapshot().events).startswith("rank 0 ")
