"""`rollout pull`: brings a model to this machine before a cluster is started, so that the start does not wait for it.

Invariant: the files come to where the engines look for them, and what is printed as there is there: a pull that fails
or is interrupted says so, keeps what has come, and goes on from there the next time.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from deployments.download import DownloadProgress, download
from rollout.errors import ConfigError

# Where the output is no terminal, a line is printed this often instead of a moving bar, in seconds.
PLAIN_SECONDS = 5.0
# How long a Ctrl-C may go unnoticed.
WAKE_S = 0.25
CONFIG_ENDINGS = (".yaml", ".yml")

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """What to pull."""

    model: str
    """A directory of this machine, or a hub name."""
    revision: str | None = None
    config: Path | None = None
    """The config that names it; None: it was named itself."""
    env: Mapping[str, str] | None = None
    """The environment variables of the engines, which may say where models are kept (HF_HOME)."""
    elsewhere: bool = False
    """Whether the engines may run on other machines."""


@dataclass(frozen=True)
class Pulled:
    """A model that is on this machine."""

    directory: Path
    fetched: bool
    """False: a local directory; there was nothing to do."""
    size: int | None = None
    """Bytes of its files; None for a local directory."""


def resolve(target: str, revision: str | None, load: Callable[[Path], Any]) -> Wanted:
    """What `target` means: a config (a file, or what is called .yaml), a directory, or the name of a hub model.

    `load` reads a config. Raises ConfigError for what cannot be meant, and what `load` raises.
    """
    if not target:
        raise ConfigError("the target is empty; name a config or a hub model")
    path = Path(target).expanduser()
    if os.path.isdir(path):
        _refuse_revision(revision, f"{target} is a directory of this machine")
        if not os.path.isfile(path / "config.json"):
            raise ConfigError(f"{target} has no config.json, so it is no model directory")
        return Wanted(str(path.resolve()))
    if os.path.isfile(path) or target.endswith(CONFIG_ENDINGS):
        _refuse_revision(revision, f"{target} is a config; write model.revision in it")
        config = load(path)
        return Wanted(
            config.model.path, config.model.revision, path, config.engine.env, config.ray.address is not None
        )
    if target[0] in "./~":
        raise ConfigError(f"{target}: no such directory or config; a hub model is owner/name")
    return Wanted(target, revision)


def _refuse_revision(revision: str | None, why: str) -> None:
    if revision is not None:
        raise ConfigError(f"--revision is for a model of the hub, and {why}")


def pull(
    wanted: Wanted,
    progress: Callable[[DownloadProgress], object],
    snapshot_download: Callable[..., Any] | None = None,
) -> Pulled:
    """Bring it here; nothing is fetched twice. Raises DownloadError; KeyboardInterrupt is raised at once.

    `progress` is told from threads, one at a time. `snapshot_download`: huggingface_hub's, or a double of it.
    """
    if os.path.isdir(wanted.model):
        return Pulled(Path(wanted.model), fetched=False)
    if snapshot_download is None:
        import huggingface_hub

        snapshot_download = huggingface_hub.snapshot_download
    last: list[DownloadProgress] = []

    def told(far: DownloadProgress) -> None:
        last[:] = [far]
        progress(far)

    env = wanted.env or {}
    fetch = functools.partial(snapshot_download, **_hub_options(env))
    directory = _interruptible(
        lambda: download(
            wanted.model,
            told,
            revision=wanted.revision,
            token=env.get("HF_TOKEN"),
            snapshot_download=fetch,
        )
    )
    return Pulled(directory, fetched=True, size=last[0].bytes_downloaded)


def _hub_options(env: Mapping[str, str]) -> dict[str, str]:
    """Where the engines of a config look for models, in the words of huggingface_hub's function."""
    cache = env.get("HF_HUB_CACHE") or (os.path.join(env["HF_HOME"], "hub") if env.get("HF_HOME") else None)
    found = {"cache_dir": cache and os.path.expanduser(cache), "endpoint": env.get("HF_ENDPOINT")}
    return {name: value for name, value in found.items() if value}


def _interruptible(work: Callable[[], T]) -> T:
    """`work()` in a thread of its own: the hub's client has threads that it waits for, deaf to Ctrl-C."""
    future: Future[T] = Future()

    def body() -> None:
        try:
            future.set_result(work())
        except BaseException as failure:
            future.set_exception(failure)

    threading.Thread(target=body, daemon=True, name="pull").start()
    while not future.done():
        # A signal that comes just before Python begins to wait is handled after the wait: without an end, never.
        futures.wait([future], timeout=WAKE_S)
    return future.result()


def leave(code: int) -> None:
    """End this process without waiting for the threads of an interrupted download."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def view(console: Console, model: str) -> Iterator[Callable[[DownloadProgress], None]]:
    """A bar with bytes and speed; lines now and then where the output is no terminal."""
    if not console.is_terminal:
        yield _plain(console, model)
        return
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[speed]}", style="dim"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task(model, total=None, speed="asking the hub")

        def show(far: DownloadProgress) -> None:
            bar.update(task, completed=far.bytes_downloaded, total=far.bytes_total, speed=speed(far))

        yield show


def _plain(console: Console, model: str) -> Callable[[DownloadProgress], None]:
    last = float("-inf")
    whole = False

    def show(far: DownloadProgress) -> None:
        nonlocal last, whole
        # The end is told by the last byte and once more by the download's own end.
        if whole or (far.bytes_downloaded != far.bytes_total and time.monotonic() - last < PLAIN_SECONDS):
            return
        last, whole = time.monotonic(), far.bytes_downloaded == far.bytes_total
        total = "of an unknown size" if far.bytes_total is None else f"of {in_bytes(far.bytes_total)}"
        line = f"{model}  {in_bytes(far.bytes_downloaded)} {total}, {speed(far)}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    return show


def speed(far: DownloadProgress) -> str:
    """Bytes a second, as people read it beside bytes."""
    return f"{in_bytes(round(far.speed_mbps * 1e6 / 8))}/s"


def in_bytes(count: int) -> str:
    """Bytes in decimal units: "999 bytes", "1.5 GB"."""
    if count < 1000:
        return f"{count} bytes"
    amount = float(count)
    for unit in ("kB", "MB", "GB"):
        amount /= 1000
        if amount < 999.95:
            return f"{amount:.1f} {unit}"
    return f"{amount / 1000:.1f} TB"


def closing_words(wanted: Wanted, pulled: Pulled) -> tuple[str, str]:
    """What happened, and what to do next."""
    if pulled.fetched:
        of = "" if wanted.revision is None else f" at revision {wanted.revision}"
        happened = f"{wanted.model}{of} is on this machine: {in_bytes(pulled.size or 0)} in {pulled.directory}"
    else:
        happened = f"{pulled.directory} is a directory of this machine; there is nothing to download"
    if wanted.config is not None:
        following = f"start it:  rollout up {wanted.config}"
        if pulled.fetched and wanted.elsewhere:
            following += (
                "\nother machines of the Ray cluster do not have it: pull it there too, or keep it on a disk that "
                "all share (HF_HOME in engine.env)"
            )
    else:
        revision = f", revision: {wanted.revision}" if wanted.revision is not None else ""
        name = str(pulled.directory) if not pulled.fetched else wanted.model
        following = f"name it in a config:  model: {{path: {name}{revision}}}\nprove that:  rollout check CONFIG"
    return happened, following
