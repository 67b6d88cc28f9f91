"""Brings a model of the Hugging Face hub to this machine, and says how far it is.

Invariant: the bytes that are reported were written to this disk, now or by an earlier download; the total is what the
hub says of all files before the first is fetched, and null where it does not say. Figures never go back.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.errors import RolloutError

# How often progress is told, in seconds; a hub writes many small pieces.
TELL_EVERY_S = 0.1
# The speed is of the last so many seconds: shorter jumps about, longer hides that it stands still.
SPEED_WINDOW_S = 5.0
# What vLLM needs of a repository. Other weights (pickles, GGUF, ONNX) would double the download for nothing.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
# Some publishers ship the same weights once more beside the Hugging Face files. Of these two, the first is read by
# nobody here; the second is what vLLM reads in its place, unless it is told to read the others.
_ORIGINAL, _CONSOLIDATED = "original/*", "consolidated*.safetensors"
# vLLM's formats that read safetensors of the hub. What another one needs is vLLM's to fetch.
_FORMATS = frozenset({"auto", "hf", "safetensors", "mistral"})
_CONSOLIDATED_FORMATS = frozenset({"auto", "mistral"})


class DownloadError(RolloutError):
    """A model that could not be brought to this machine. The message names it, why, and what to do."""

    category = "download"


class NoSafetensors(DownloadError):
    """The model is on this machine, and its weights are in other files."""


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """How far a download is."""

    bytes_downloaded: int
    """On this disk, those of an earlier download included."""
    bytes_total: int | None
    """Of all files; None: the hub does not say."""
    speed_mbps: float
    """Megabits (10^6) per second over the last seconds."""


Progress = Callable[[DownloadProgress], object]


def download(
    model: str,
    progress: Progress,
    *,
    revision: str | None = None,
    load_format: str = "auto",
    token: str | None = None,
    snapshot_download: Callable[..., Any] | None = None,
) -> Path:
    """The directory of a hub model on this machine, downloaded where it is not there yet. Blocks.

    `progress` is told at most every TELL_EVERY_S, from several threads but one at a time, and once at the end.
    `load_format`: vLLM's, which decides between two copies of the weights. `snapshot_download`: huggingface_hub's, or
    a double of it. Raises DownloadError.
    """
    fetch = snapshot_download or _snapshot_download()
    wanted: dict[str, Any] = {"revision": revision, "token": token}
    try:
        files = _files(fetch, model, wanted)
        wanted |= _patterns(files, load_format)
        meter = _Meter(progress, *_sizes(files, wanted))
        directory = Path(fetch(model, **wanted, tqdm_class=meter.bar_class()))
    except Exception as failure:
        raise DownloadError(_reason(model, revision, failure)) from failure
    if not any(directory.glob("*.safetensors")):
        raise NoSafetensors(f"{model} holds no safetensors files, which the engines need; choose another model")
    meter.finish(directory)
    return directory


def engine_download(
    model: str, engine_kwargs: Mapping[str, Any], snapshot_download: Callable[..., Any] | None = None
) -> Callable[[Progress], Path] | None:
    """The download that vLLM would make in silence with these engine arguments, to where vLLM looks; see `download`.

    None: the model is on this machine, or vLLM fetches it otherwise (object storage, ModelScope, GGUF, pickles).
    """
    chosen = engine_kwargs.get("load_format") or "auto"
    modelscope = os.environ.get("VLLM_USE_MODELSCOPE", "").lower() == "true"
    if os.path.exists(model) or ":" in model or chosen not in _FORMATS or modelscope:
        return None
    fetch = snapshot_download or _snapshot_download()
    if folder := engine_kwargs.get("download_dir"):
        fetch = functools.partial(fetch, cache_dir=folder)
    token = engine_kwargs.get("hf_token")
    return functools.partial(
        download,
        model,
        revision=engine_kwargs.get("revision"),
        load_format=chosen,
        # vLLM takes true for "the one of this machine", which is huggingface_hub's own default.
        token=token if isinstance(token, str) else None,
        snapshot_download=fetch,
    )


def _snapshot_download() -> Callable[..., Any]:
    from huggingface_hub import snapshot_download

    return snapshot_download


def _files(fetch: Callable[..., Any], model: str, wanted: Mapping[str, Any]) -> list[Any] | None:
    """What the repository has of PATTERNS, as huggingface_hub's DryRunFileInfo; None: the hub cannot be asked."""
    options = {**wanted, "allow_patterns": list(PATTERNS), "ignore_patterns": [_ORIGINAL]}
    try:
        return list(fetch(model, **options, dry_run=True, tqdm_class=_bar_class(lambda _: None)))
    except OSError:
        # Without the hub a whole copy on this disk will do; if there is none, the real call says so.
        return None


def _patterns(files: list[Any] | None, load_format: str) -> dict[str, list[str]]:
    """Which files to fetch: one copy of the weights, that which vLLM will read, and all else of PATTERNS."""
    shipped = any(fnmatch.fnmatch(file.filename, _CONSOLIDATED) for file in files or ())
    if shipped and load_format in _CONSOLIDATED_FORMATS:
        allowed = [_CONSOLIDATED if pattern == "*.safetensors" else pattern for pattern in PATTERNS]
        return {"allow_patterns": allowed, "ignore_patterns": [_ORIGINAL]}
    return {"allow_patterns": list(PATTERNS), "ignore_patterns": [_ORIGINAL, _CONSOLIDATED]}


def _sizes(files: list[Any] | None, wanted: Mapping[str, Any]) -> tuple[int, int | None]:
    """Bytes that are here already, and bytes in all (None: not known)."""
    from huggingface_hub.utils import filter_repo_objects

    if files is None:
        return 0, None
    patterns = {name: wanted[name] for name in ("allow_patterns", "ignore_patterns")}
    taken = list(filter_repo_objects(files, **patterns, key=lambda file: file.filename))
    sizes = [file.file_size for file in taken]
    here = sum(file.file_size or 0 for file in taken if not file.will_download)
    return here, None if None in sizes else sum(sizes)


class _Meter:
    """Adds up what huggingface_hub's progress bars are told."""

    def __init__(self, progress: Progress, here: int, total: int | None) -> None:
        self._progress = progress
        self._total = total
        self._lock = threading.Lock()
        self._bytes = here
        self._shown = here
        self._told_at = float("-inf")
        # (when, bytes) of the last seconds.
        self._past: deque[tuple[float, int]] = deque([(time.monotonic(), here)])

    def add(self, count: int) -> None:
        """So many more bytes are on this disk; negative where a file is begun anew."""
        with self._lock:
            self._bytes += count
            if time.monotonic() - self._told_at >= TELL_EVERY_S:
                self._tell()

    def finish(self, directory: Path) -> None:
        """All is here. Where the hub did not say how much it is, the disk does."""
        with self._lock:
            if self._total is None:
                self._total = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
            self._bytes = self._total
            self._tell()

    def bar_class(self) -> type:
        """A progress bar for snapshot_download that draws nothing and tells this meter.

        huggingface_hub makes three of them: bytes from the network, bytes on the disk, and files. Only the second
        counts: what the network brings may be compressed, or be less than the file where parts are known already.
        """
        return _bar_class(self.add)

    def _tell(self) -> None:
        now = time.monotonic()
        self._told_at = now
        self._shown = max(self._shown, self._bytes)
        self._past.append((now, self._shown))
        while len(self._past) > 2 and now - self._past[1][0] >= SPEED_WINDOW_S:
            self._past.popleft()
        since, before = self._past[0]
        speed = (self._shown - before) * 8 / 1e6 / (now - since) if now > since else 0.0
        self._progress(DownloadProgress(self._shown, self._total, round(speed, 3)))


def _bar_class(add: Callable[[int], None]) -> type:
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        """huggingface_hub's own bar, so that it has all that is asked of it; never drawn."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            name = str(options.get("name") or "")
            self._counts = options.get("unit") == "B" and not name.endswith(".transfer")
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts:
                add(int(n or 0))

    return Bar


def _reason(model: str, revision: str | None, failure: Exception) -> str:
    """What went wrong and what to do, for the errors of huggingface_hub and of the disk."""
    from huggingface_hub import errors

    name = model if revision is None else f"{model} at revision {revision}"
    if isinstance(failure, errors.GatedRepoError):
        return f"{name} is gated; accept its terms on the hub, and set HF_TOKEN to a token of that account"
    if isinstance(failure, errors.RepositoryNotFoundError):
        return f"the hub has no model {model}, or it is private; check the name, or set HF_TOKEN"
    if isinstance(failure, errors.RevisionNotFoundError):
        return f"the hub has {model}, and no revision {revision} of it"
    if isinstance(failure, errors.HFValidationError):
        return f"{model!r} is no name of a hub model; write owner/name, or give a directory"
    if isinstance(failure, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"{name} is not (or not wholly) on this machine, and the hub cannot be reached; check the network and "
            "HF_HUB_OFFLINE, or give the directory of a copy"
        )
    if isinstance(failure, OSError) and failure.errno is not None:
        return f"{name} could not be written to this disk: {failure}; HF_HOME says where models are kept"
    return f"{name} could not be downloaded: {type(failure).__name__}: {failure}"
