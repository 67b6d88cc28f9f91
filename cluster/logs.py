"""`rollout logs`: the log files of a cluster's processes as one, in the order of time.

Invariant: reading takes as much memory as there are files, however large they are; a file that is being written,
rotated or removed meanwhile harms nothing, and what is no record is counted, not hidden. Log text is shown as text:
it can neither move the terminal's cursor nor colour it.
"""

from __future__ import annotations

import heapq
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_args

from rich.text import Text

from cluster import state
from rollout.errors import RolloutError
from rollout.logs import Level, local_time, log_files, printable

Entry = dict[str, Any]
Key = tuple[int, int]
"""A file, whatever it is called: device and inode."""

LEVELS: tuple[str, ...] = (*get_args(Level), "critical")
# How often files are looked at again while following.
FOLLOW_SECONDS = 0.25
# A record is bounded by the writer; whatever is longer is no record of ours.
MAX_LINE_BYTES = 2**20
_STYLES = {"debug": "dim", "info": "green", "warning": "yellow", "error": "bold red", "critical": "bold white on red"}
_SHOWN = (("run", "run"), ("trajectory_id", "trajectory"), ("correlation_id", "correlation"))


@dataclass(frozen=True)
class Wanted:
    """Which records; what is empty asks for nothing."""

    level: str = "debug"
    """And everything more severe."""
    components: tuple[str, ...] = ()
    """Such as `worker`, or one of them, such as `worker-3`."""
    trajectory: str = ""
    """A trajectory's id, or its ending."""
    correlation: str = ""
    """A correlation id, or its beginning."""

    def accepts(self, entry: Entry) -> bool:
        """Whether a record is wanted. One of an unknown level always is."""
        level = entry.get("level")
        if level in LEVELS and LEVELS.index(level) < LEVELS.index(self.level):
            return False
        if self.components and not {entry.get("component"), entry.get("instance")} & set(self.components):
            return False
        if not str(entry.get("trajectory_id", "")).endswith(self.trajectory):
            return False
        return str(entry.get("correlation_id", "")).startswith(self.correlation)

    def needles(self) -> list[bytes]:
        """What a line must hold to be worth parsing."""
        # As JSON writes them, without the quotes.
        asked = (self.trajectory, self.correlation)
        return [json.dumps(text, ensure_ascii=False)[1:-1].encode(errors="replace") for text in asked if text]


class LogReader:
    """Reads the files of a directory, each line once."""

    def __init__(self, directory: Path | str, wanted: Wanted) -> None:
        self._directory = Path(directory)
        self._wanted = wanted
        self._needles = wanted.needles()
        self._read: dict[Key, int] = {}
        self.damaged = 0
        """Lines that were no records."""

    def poll(self) -> Iterator[Entry]:
        """What was written since the last call, in the order of time, up to the last whole line of each file.

        The iterator must be read to its end before the next call.
        """
        with _Opened() as opened:
            found = [file for path in log_files(self._directory) if (file := opened.open(path)) is not None]
            # A file that is smaller than what was read of it is another, which was given the number of one that is
            # gone; so it happens when files are rotated.
            done = {file.key: self._read.get(file.key, 0) for file in found}
            self._read = {file.key: done[file.key] if done[file.key] <= file.size else 0 for file in found}
            grown = [file for file in found if file.size > self._read[file.key]]
            yield from heapq.merge(*map(self._entries, grown), key=_time)

    def _entries(self, opened: _File) -> Iterator[Entry]:
        at = self._read[opened.key]
        opened.file.seek(at)
        while at < opened.size:
            line = opened.file.readline(MAX_LINE_BYTES)
            if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                # It is being written. The next call reads it from its start.
                break
            at += len(line)
            self._read[opened.key] = at
            if all(needle in line for needle in self._needles):
                entry = _parsed(line)
                if entry is None:
                    self.damaged += 1
                elif self._wanted.accepts(entry):
                    yield entry


@dataclass(slots=True)
class _File:
    file: BinaryIO
    key: Key
    size: int


class _Opened:
    """Files that are open at once, and closed together."""

    def __init__(self) -> None:
        self._files: dict[Key, _File] = {}

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self._files.values():
            opened.file.close()

    def open(self, path: Path) -> _File | None:
        """A file, unless it is gone, or is open already: one that was put aside meanwhile is met under both names."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RolloutError(f"{path} cannot be read: {error.strerror}") from None
        status = os.fstat(file.fileno())
        key = (status.st_dev, status.st_ino)
        if key in self._files:
            file.close()
            return None
        self._files[key] = _File(file, key, status.st_size)
        return self._files[key]


def _parsed(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("time"), str) else None


def _time(entry: Entry) -> str:
    # One form and one time zone, so that text sorts as time does.
    return entry["time"]


def read(reader: LogReader, last: int | None) -> list[Entry] | Iterator[Entry]:
    """The newest `last` records that are wanted; None: all of them, as they are read."""
    return reader.poll() if last is None else list(deque(reader.poll(), maxlen=last))


def follow(
    reader: LogReader,
    until: Callable[[], bool] = lambda: False,
    pause: Callable[[float], object] = time.sleep,
) -> Iterator[Entry]:
    """What is written from now on, for as long as the caller listens, or `until` says so."""
    while not until():
        yield from reader.poll()
        pause(FOLLOW_SECONDS)


def directory_of(name: str) -> Path:
    """Where a cluster's logs are on this machine, whether it is up or not. Raises RolloutError if there are none."""
    known = state.load(name)
    directory = Path(known.logs) if known is not None and known.logs else default_directory(name)
    if log_files(directory):
        return directory
    hint = ""
    if known is not None and not known.owns_ray:
        hint = (
            ": its Ray runs elsewhere, where the processes write to standard error (`ray logs`, `kubectl logs`); "
            "with logging.directory on a volume that this machine has, give --dir"
        )
    raise RolloutError(f"there are no logs of {name!r} in {directory}{hint}")


def default_directory(name: str) -> Path:
    """Where a cluster that `rollout up` starts has its logs. They stay when it ends."""
    return state.state_dir() / "logs" / name


def known_names() -> list[str]:
    """Clusters that are known, or that left logs."""
    folder = state.state_dir() / "logs"
    left = [path.name for path in folder.iterdir() if log_files(path)] if folder.is_dir() else []
    return sorted({*left, *(cluster.name for cluster in state.load_all())})


def choose(name: str | None) -> str:
    """The named cluster, or the only one there is. Raises RolloutError."""
    if name is not None:
        return name
    alive = [cluster.name for cluster in state.load_all()]
    found = alive if len(alive) == 1 else known_names()
    if len(found) == 1:
        return found[0]
    if not found:
        raise RolloutError("no cluster is known and none has left logs; start one with `rollout up CONFIG`")
    raise RolloutError(f"several clusters have logs ({', '.join(found)}): name one")


def rendered(entry: Entry) -> Text:
    """A record as a person reads it."""
    level = str(entry.get("level", "?"))
    who = str(entry.get("instance") or entry.get("component") or "?")
    text = Text(no_wrap=False)
    text.append(f"{local_time(entry['time'])} ", style="dim")
    text.append(f"{printable(level)[:8]:8} ", style=_STYLES.get(level, ""))
    text.append(f"{printable(who)}  ", style="cyan")
    text.append(printable(str(entry.get("message", ""))), style="" if level != "debug" else "dim")
    for key, name in _SHOWN:
        if entry.get(key):
            text.append(f"  {name} {printable(str(entry[key]))}", style="dim")
    for line in str(entry.get("exception") or "").splitlines():
        text.append(f"\n    {printable(line)}", style="red" if LEVELS.index("error") <= _severity(level) else "dim")
    return text


def _severity(level: str) -> int:
    return LEVELS.index(level) if level in LEVELS else len(LEVELS)
