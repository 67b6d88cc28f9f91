"""Tells the loading board how far a replica is, from a thread, while the replica's constructor is at work.

The ranks write their figures into files of a directory that this replica made for them (`deployments.rank_loading`).

Invariant: every report says all that the replica has to say, so a lost one costs nothing and a board that was started
anew is soon as wise as the old one. Nothing that fails in here reaches the replica. Files are read until the replica
is ready or has failed; after that a ready one only says that it lives, and one that has failed is silent.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rollout.loading import DOWNLOADING, ERROR, LOADING, READY, STARTING, WARMING_UP

logger = logging.getLogger(__name__)

# How often the ranks' files are looked at: what a person sees as moving.
POLL_S = 0.1
# How often a replica says that it lives, whether or not there is news. The board forgets one after a minute.
ALIVE_S = 5.0
# Deadline of joining the thread; it does nothing that takes long.
JOIN_SECONDS = 2.0
# Of what ranks say of their failures, so much is told on.
MAX_CAUSE_CHARS = 1_000
MAX_CAUSES = 4
# vLLM's formats that our loader stands in for; another one is the user's choice, and is left alone.
_READ_AS_FILES = frozenset({"auto", "hf", "safetensors", "mistral", "pt"})
_LOAD_FORMAT = "progress"

Report = Callable[[str, list[dict[str, Any]]], object]
"""Takes a replica's name and what it says; must not wait for anybody."""


class ReplicaLoading:
    """The reporter of one replica. Make it, `start` it, load, then say `ready` or `error`; `close` when all is over.

    Its methods may be called from any thread.
    """

    def __init__(self, replica: str, report: Report, *, ranks: int = 1, directory: Path | None = None) -> None:
        """`ranks`: processes of this engine that load. `directory`: None: a new one."""
        self.directory = directory or _new_directory()
        """Where the ranks write; None: there is no room for it, and only what is said here is reported."""
        self._replica = replica
        self._report = report
        self._ranks = ranks
        self._lock = threading.Lock()
        self._figures: dict[int, dict[str, Any]] = {}
        self._download: dict[str, Any] | None = None
        self._warming = False
        self._outcome: dict[str, Any] | None = None
        self._over = threading.Event()
        self._told_at = float("-inf")
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="loading-progress", daemon=True)

    def start(self) -> None:
        """Say that loading begins, and follow the ranks' files from now on."""
        with self._lock:
            self._send([{"stage": STARTING}])
        self._thread.start()

    def downloading(self, bytes_downloaded: int, bytes_total: int | None, speed_mbps: float) -> None:
        """The model is on its way to this machine (see deployments.download)."""
        with self._lock:
            self._download = {
                "stage": DOWNLOADING,
                "bytes_downloaded": bytes_downloaded,
                "bytes_total": bytes_total,
                "speed_mbps": speed_mbps,
            }
            self._tell()

    def ready(self) -> None:
        """The replica can serve: after warm-up, not after the weights."""
        self._end({"stage": READY})

    def error(self, failure: BaseException | str) -> None:
        """The replica will not come to be."""
        text = failure if isinstance(failure, str) else f"{type(failure).__name__}: {failure}"
        self._end({"stage": ERROR, "message": "; ".join([*self._causes(), text])})
        self._over.set()

    def close(self) -> None:
        """Stop giving signs of life, and remove the ranks' files."""
        self._over.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)
        self._remove()

    def _end(self, outcome: dict[str, Any]) -> None:
        with self._lock:
            if self._outcome is not None:
                return
            # What the ranks wrote last, for it may not have been seen yet.
            self._look()
            self._outcome = outcome
            self._tell()
        self._remove()

    def _run(self) -> None:
        while not self._over.wait(POLL_S if self._outcome is None else ALIVE_S):
            with self._lock:
                news = self._outcome is None and self._look()
                if news or time.monotonic() - self._told_at >= ALIVE_S:
                    self._tell()

    def _look(self) -> bool:
        """Read the ranks' files. True if they say something new."""
        news = False
        for file in self._files():
            figures = _read(file)
            # Weights that are loaded over others are no part of the start.
            if figures is not None and not figures["reload"] and self._figures.get(figures["rank"]) != figures:
                self._figures[figures["rank"]] = figures
                news = True
        loaded = len(self._figures) >= self._ranks and all(figures["done"] for figures in self._figures.values())
        news |= loaded and not self._warming
        self._warming |= loaded
        return news

    def _files(self) -> list[Path]:
        try:
            return sorted(self.directory.glob("rank-*.json")) if self.directory is not None else []
        except OSError:
            return []

    def _causes(self) -> list[str]:
        """What the ranks say of their failures; the same of several once. The engine only knows that they died."""
        causes: dict[str, list[str]] = {}
        try:
            for file in sorted(self.directory.glob("rank-*.error")) if self.directory is not None else []:
                with file.open(errors="replace") as opened:
                    said = opened.read(MAX_CAUSE_CHARS)
                causes.setdefault(said, []).append(file.stem.removeprefix("rank-"))
        except OSError:
            # Of no more use than none.
            return []
        return [f"rank {', '.join(ranks)}: {said}" for said, ranks in causes.items()][:MAX_CAUSES]

    def _tell(self) -> None:
        """Report everything: what is known already costs the board a comparison."""
        events = [] if self._download is None else [self._download]
        for _, figures in sorted(self._figures.items()):
            shown = {name: value for name, value in figures.items() if name not in ("done", "reload")}
            events.append({"stage": LOADING, **shown})
        if self._warming:
            events.append({"stage": WARMING_UP})
        if self._outcome is not None:
            events.append(self._outcome)
        self._send(events)

    def _send(self, events: list[dict[str, Any]]) -> None:
        self._told_at = time.monotonic()
        try:
            self._report(self._replica, events)
        except Exception as failure:
            if not self._complained:
                logger.warning("loading progress is not reported: %s: %s", type(failure).__name__, failure)
            self._complained = True

    def _remove(self) -> None:
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)


def with_progress(engine_kwargs: Mapping[str, Any], model: str, directory: Path | None) -> dict[str, Any]:
    """vLLM's engine arguments with our loader in them, writing into a directory.

    Unchanged where the user has chosen a format that reads no files, or the model is in object storage: such a
    replica reports no figures, and still when it is ready.
    """
    chosen = engine_kwargs.get("load_format") or "auto"
    extra = engine_kwargs.get("model_loader_extra_config") or {}
    if directory is None or chosen not in _READ_AS_FILES or "://" in model or not isinstance(extra, Mapping):
        return dict(engine_kwargs)
    ours = {"progress_dir": str(directory), "progress_load_format": chosen}
    return {**engine_kwargs, "load_format": _LOAD_FORMAT, "model_loader_extra_config": {**extra, **ours}}


def _new_directory() -> Path | None:
    try:
        return Path(tempfile.mkdtemp(prefix="rollout-loading-"))
    except OSError as failure:
        logger.warning("loading will show no figures, there is no room for the ranks' files: %s", failure)
        return None


def _read(file: Path) -> dict[str, Any] | None:
    """A rank's figures; None: the file is gone, or is none of ours."""
    try:
        figures = json.loads(file.read_text())
        return figures if {"rank", "done", "reload", "bytes_read"} <= figures.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
