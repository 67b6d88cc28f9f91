"""How far the engines have come with loading, in the words of one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rollout.loading import DOWNLOADING, LOADING, WARMING_UP, LoadingEvent

BAR_CHARS = 12
# Ranks that get a bar of their own; of more, the one furthest behind.
MAX_BARS = 4


def loading_text(events: Sequence[LoadingEvent]) -> str:
    """Bars of the ranks that load, or what comes before and after it; empty where nothing is known."""
    ranks = [event.data for event in events if event.data["stage"] == LOADING]
    stages = {event.data["stage"] for event in events}
    if DOWNLOADING in stages and not ranks:
        newest = next(event.data for event in reversed(events) if event.data["stage"] == DOWNLOADING)
        done, total = newest["bytes_downloaded"], newest["bytes_total"]
        return f"downloading {bar(done, total)} {_size(done)}{'' if total is None else f' of {_size(total)}'}"
    unfinished = [rank for rank in ranks if not _complete(rank)]
    if ranks and not unfinished:
        return f"{_size(sum(rank['bytes_total'] or 0 for rank in ranks) // len(ranks))} loaded, " + (
            "warming up" if WARMING_UP in stages else "starting the engine"
        )
    if not ranks:
        return "warming up" if WARMING_UP in stages else ""
    # Replicas have long names, and ranks of their own that are called the same.
    replicas = sorted({rank["replica"] for rank in ranks})
    if len(unfinished) > MAX_BARS:
        unfinished = [min(unfinished, key=_fraction)]
    return "  ".join(
        f"{_whose(rank, replicas)} {bar(rank['bytes_read'], rank['bytes_total'])} "
        f"{_layers(rank)}{rank['vram_mb'] or 0:,.0f} MB"
        for rank in sorted(unfinished, key=lambda rank: (rank["replica"], rank["rank"]))
    )


def bar(done: int | None, total: int | None) -> str:
    """A bar of text."""
    full = round(BAR_CHARS * min(1.0, (done or 0) / total)) if total else 0
    return "█" * full + "░" * (BAR_CHARS - full)


def _whose(rank: Mapping[str, Any], replicas: Sequence[str]) -> str:
    of = f"replica {replicas.index(rank['replica'])} " if len(replicas) > 1 else ""
    return f"{of}rank {rank['rank']}"


def _complete(rank: Mapping[str, Any]) -> bool:
    return bool(rank["bytes_total"]) and rank["bytes_read"] >= rank["bytes_total"]


def _fraction(rank: Mapping[str, Any]) -> float:
    """0 to 1; of an unknown total nothing is known to be read."""
    return (rank["bytes_read"] or 0) / rank["bytes_total"] if rank["bytes_total"] else 0.0


def _layers(rank: Mapping[str, Any]) -> str:
    return "" if rank["layers_total"] is None else f"{rank['layers_loaded']}/{rank['layers_total']} layers, "


def _size(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
