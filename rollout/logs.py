"""Structured logs of a cluster's processes: one line of JSON for each record, in a file of the process's own.

`rollout logs` merges the files of a cluster. Standard error gets the same records as JSON or as plain text, for those
who collect it there (Ray's own files, `kubectl logs`).

Invariant: a line is one record, bounded in size and without secrets; the files of a process are bounded, and so is
what dead processes left behind. Logging never raises and never ends a process: what could not be written is counted,
and said as soon as it can be.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import MemoryHandler, RotatingFileHandler
from pathlib import Path
from typing import Any, Literal, TextIO

from rollout.correlation import NO_ID, CorrelationFilter
from rollout.redaction import Redactor, digests, is_secret_name

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["json", "text"]

DIRECTORY_VARIABLE = "ROLLOUT_LOG_DIR"
"""Names a directory for the log files of processes whose settings name none."""
# Of one message, and of one exception with its stack. An exception is cut at its start: its end says what happened.
MAX_MESSAGE_CHARS = 8_192
MAX_EXCEPTION_CHARS = 16_384
# Read beyond a cut, so that a secret that lies across it is recognised.
_MARGIN_CHARS = 2_048
# What dead processes may leave, besides its size.
MAX_DEAD_FILES = 128
# Whether a process of another machine lives cannot be seen from here; its file was not written to for so long.
OTHER_HOST_SECONDS = 7 * 86_400.0
SUFFIX = ".jsonl"

# Libraries that say too much below a warning; what users' environments say is wanted.
_CHATTY = (
    "PIL", "anthropic", "anyio", "asyncio", "filelock", "fsspec", "httpcore", "httpx", "huggingface_hub",
    "matplotlib", "mcp", "multipart", "numba", "openai", "opentelemetry", "ray", "renderers", "sse_starlette",
    "torch", "transformers", "urllib3", "uvicorn", "vllm",
)  # fmt: skip
# These keep their records to themselves, so a handler of the root would not see them.
_APART = ("ray", "ray.serve", "uvicorn", "vllm")


@dataclass(frozen=True)
class LogSettings:
    """How the processes of a cluster log. Plain data: it goes to every process."""

    cluster: str
    level: Level = "info"
    """The least that is written; of chatty libraries, warnings at least."""
    format: Format = "json"
    """Of standard error. Files are always JSON."""
    directory: str | None = None
    """Where each process writes its file; None: where DIRECTORY_VARIABLE says. Without that, everything goes to
    standard error."""
    max_file_bytes: int = 32 * 2**20
    """A file that is larger is put aside; the one put aside before it is dropped. So a process has twice this."""
    max_dead_bytes: int = 256 * 2**20
    """Files of processes that have ended are dropped, oldest first, when they are more than this together."""
    secrets: frozenset[str] = field(default=frozenset(), repr=False)
    """SHA-256 hashes of words that are never written (rollout.redaction)."""


def install(settings: LogSettings | None, component: str, instance: str = "", stream: TextIO | None = None) -> None:
    """Log as `component` from now on; `instance` tells processes of one component apart. None: change nothing.

    Called again, it takes the place of the call before. A directory that cannot be written to is said on standard
    error, which then gets everything. `stream`: in place of standard error.
    """
    if settings is None:
        return
    uninstall()
    level = getattr(logging, settings.level.upper())
    redactor = Redactor(settings.secrets | _of_environment())
    structured = JsonFormatter(settings.cluster, component, instance, redactor)
    text = TextFormatter(settings.cluster, component, instance, redactor)
    # Not sys.stderr: Serve turns that into log records of its own.
    stderr = logging.StreamHandler(stream or sys.__stderr__ or sys.stderr)
    stderr.setFormatter(structured if settings.format == "json" else text)
    stderr.setLevel(level)
    handlers: list[logging.Handler] = [stderr]
    problem = None
    if directory := settings.directory or os.environ.get(DIRECTORY_VARIABLE):
        try:
            handlers.append(_file_handler(Path(directory), settings, component, instance, structured))
            # The file has everything; who reads only this one must not miss what is wrong.
            stderr.setLevel(max(level, logging.WARNING))
        except OSError as failure:
            problem = failure
    for handler in handlers:
        handler.addFilter(CorrelationFilter())
        handler.addFilter(_quiet)
    _installed.begin(handlers, level)
    if problem is not None:
        logging.getLogger(__name__).warning("logs go to standard error alone: %s", problem)


def uninstall() -> None:
    """Undo `install`. Does nothing if it was not called."""
    _installed.end()


@contextmanager
def kept_handlers(name: str) -> Iterator[None]:
    """The handlers of logger `name` that hand their records on to another still do so afterwards.

    `logging.config.dictConfig`, which vLLM calls when it makes an engine, closes all handlers of the process. A file
    opens again with its next record; a MemoryHandler has no target any more.
    """
    held = [(h, h.target) for h in logging.getLogger(name).handlers if isinstance(h, MemoryHandler)]
    try:
        yield
    finally:
        for handler, target in held:
            if handler.target is None:
                handler.setTarget(target)


def log_files(directory: Path | str) -> list[Path]:
    """The log files of a directory, those put aside included; [] where there is none."""
    try:
        return sorted(path for path in Path(directory).iterdir() if _FILE.fullmatch(path.name))
    except OSError:
        return []


def _of_environment() -> frozenset[str]:
    """What this process has in variables whose name says that it is a secret: `HF_TOKEN`, keys of MCP servers."""
    return digests(value for name, value in os.environ.items() if is_secret_name(name))


class _Installed:
    """What `install` changed in the process."""

    def __init__(self) -> None:
        self._handlers: list[logging.Handler] = []
        self._root_level = logging.WARNING
        self._quieted: list[logging.Logger] = []

    def begin(self, handlers: list[logging.Handler], level: int) -> None:
        root = logging.getLogger()
        self._handlers, self._root_level = handlers, root.level
        root.setLevel(level)
        for handler in handlers:
            root.addHandler(handler)
        for name in _CHATTY:
            library = logging.getLogger(name)
            if library.level == logging.NOTSET:
                # Said once here, so that a record that nobody wants is not even made.
                library.setLevel(max(level, logging.WARNING))
                self._quieted.append(library)
        for name in _APART:
            library = logging.getLogger(name)
            # To the file alone: on standard error they are already.
            if not library.propagate and len(handlers) > 1:
                library.addHandler(handlers[-1])

    def end(self) -> None:
        for handler in self.take_off():
            handler.close()

    def take_off(self) -> list[logging.Handler]:
        """Undo `begin`. Returns the handlers, which are still open."""
        handlers, self._handlers = self._handlers, []
        if not handlers:
            return []
        for name in (None, *_APART):
            for handler in handlers:
                logging.getLogger(name).removeHandler(handler)
        for library in self._quieted:
            library.setLevel(logging.NOTSET)
        self._quieted.clear()
        logging.getLogger().setLevel(self._root_level)
        return handlers


_installed = _Installed()
_of_parents: list[logging.Handler] = []


def _forked() -> None:
    """A forked child would write, and rotate, its parent's file.

    The file is not closed here: another thread of the parent may have held its lock in the moment of the fork.
    """
    _of_parents.extend(_installed.take_off())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _quiet(record: logging.LogRecord) -> bool:
    """Drops what a chatty library says below a warning, whatever level it gave itself."""
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] not in _CHATTY


# Records as lines


class JsonFormatter(logging.Formatter):
    """One line of JSON for each record. Fields that do not apply are left out."""

    def __init__(self, cluster: str, component: str, instance: str = "", redact: Redactor | None = None) -> None:
        super().__init__()
        self._cluster, self._component, self._instance = cluster, component, instance
        self._redact = redact or Redactor()

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        return json.dumps(self.fields(record), ensure_ascii=False)

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """The record as plain data, redacted and bounded."""
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "component": self._component,
            "instance": self._instance,
            "cluster": self._cluster,
            "pid": record.process,
            "logger": record.name,
            "message": self._bounded(_message(record), MAX_MESSAGE_CHARS),
            "correlation_id": _id(record, "correlation_id"),
            "trajectory_id": _id(record, "trajectory_id"),
            "run": _id(record, "run"),
            "exception": self._exception(record),
        }
        return {name: value for name, value in fields.items() if value not in (None, "")}

    def _bounded(self, text: str, most: int) -> str:
        # Redacted first: of a secret that is cut in two, nobody would recognise the half.
        clean = self._redact(text[: most + _MARGIN_CHARS])
        left_out = len(text) - most
        return clean if left_out <= 0 else f"{clean[:most]}… ({left_out} more characters)"

    def _exception(self, record: logging.LogRecord) -> str | None:
        if not record.exc_info or record.exc_info[1] is None:
            return None
        text = "".join(traceback.format_exception(record.exc_info[1])).strip()
        clean = self._redact(text[-MAX_EXCEPTION_CHARS - _MARGIN_CHARS :])
        return clean if len(clean) <= MAX_EXCEPTION_CHARS else f"…{clean[-MAX_EXCEPTION_CHARS:]}"


class TextFormatter(JsonFormatter):
    """The same record as text for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; an exception has its own, indented."""
        return as_text(self.fields(record))


def as_text(fields: dict[str, Any]) -> str:
    """A record's fields as a line of text for people, in their own time zone. Control characters are spelled out."""
    ids = " ".join(f"[{name} {fields[key]}]" for key, name in _SHOWN_IDS if fields.get(key))
    who = fields.get("instance") or fields.get("component") or "?"
    when, level = local_time(fields.get("time")), str(fields.get("level", "?"))
    line = f"{when} {level:7} {who}  {fields.get('message', '')} {ids}"
    lines = [line.rstrip(), *(f"    {part}" for part in str(fields.get("exception") or "").splitlines())]
    return "\n".join(map(printable, lines))


_SHOWN_IDS = (("trajectory_id", "trajectory"), ("correlation_id", "correlation"))


def local_time(stamp: object) -> str:
    """hh:mm:ss.mmm of a record's time, here; the stamp itself where it is none."""
    try:
        return datetime.fromisoformat(str(stamp)).astimezone().strftime("%H:%M:%S.%f")[:-3]
    except (ValueError, OverflowError):
        return str(stamp)[:12]


def printable(text: str) -> str:
    """Without characters that move a terminal's cursor or colour it: whoever sent the text may have meant to."""
    return _CONTROL.sub(_spelled, text)


def _spelled(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


# C0 without tab, DEL, C1, the line ends and directions of Unicode, and lone surrogates, which no output takes.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:
        # A wrong number of arguments is worth a line, too.
        return f"{record.msg} {record.args!r}"


def _id(record: logging.LogRecord, name: str) -> str | None:
    value = getattr(record, name, None)
    return None if value in (None, NO_ID) else str(value)


# Files

_FILE = re.compile(r"(?P<name>[A-Za-z0-9-]+)\.(?P<host>[A-Za-z0-9-]+)\.(?P<pid>\d+)\.jsonl(\.1)?")


class _BoundedFile(RotatingFileHandler):
    """A file and the one before it. Counts what it could not write."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        # Lone surrogates, which no UTF-8 has, become escapes that JSON knows.
        super().__init__(path, maxBytes=max_bytes, backupCount=1, encoding="utf-8", errors="backslashreplace")
        self._lost = 0

    def shouldRollover(self, record: logging.LogRecord) -> bool:  # type: ignore[override]
        """By the size now. The original formats each record a second time, to know it to the byte."""
        return self.stream is not None and self.stream.tell() >= self.maxBytes

    def emit(self, record: logging.LogRecord) -> None:
        """Write it, and a word about those that were lost before it."""
        lost = self._lost
        super().emit(record)
        if lost and self._lost == lost:
            self._lost = 0
            word = f"{lost} log records before this one could not be written"
            super().emit(logging.LogRecord(__name__, logging.WARNING, "", 0, word, None, None))
            if self._lost:
                self._lost = lost

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk: not a word for each record."""
        self._lost += 1


def _file_handler(
    directory: Path, settings: LogSettings, component: str, instance: str, formatter: logging.Formatter
) -> logging.Handler:
    # What sessions say may be nobody else's business.
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    prune(directory, settings.max_dead_bytes)
    name = _plain(instance) if instance else component
    if not name.startswith(component):
        name = f"{component}-{name}"
    path = directory / f"{name}.{_host()}.{os.getpid()}{SUFFIX}"
    os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    handler = _BoundedFile(path, settings.max_file_bytes)
    handler.setFormatter(formatter)
    return handler


def prune(directory: Path, max_bytes: int, now: float | None = None) -> int:
    """Drop files of dead processes, oldest first, until they are within their bounds. Returns how many went."""
    now = time.time() if now is None else now
    dead = []
    for path in log_files(directory):
        try:
            status = path.stat()
        except OSError:
            continue
        if _is_dead(path.name, now - status.st_mtime):
            dead.append((status.st_mtime, status.st_size, path))
    dead.sort(reverse=True)
    total = dropped = 0
    for count, (_, size, path) in enumerate(dead, start=1):
        total += size
        if total > max_bytes or count > MAX_DEAD_FILES:
            # Another process may be at the same work.
            path.unlink(missing_ok=True)
            dropped += 1
    return dropped


def _is_dead(name: str, age: float) -> bool:
    parts = _FILE.fullmatch(name)
    assert parts is not None
    if parts["host"] != _host():
        return age > OTHER_HOST_SECONDS
    try:
        os.kill(int(parts["pid"]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    # Alive, or a number that was given out again: then it goes when that one has ended.
    return False


def _host() -> str:
    return _plain(socket.gethostname()) or "host"


def _plain(text: str) -> str:
    """Letters, digits and hyphens."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", text)[:80].strip("-") or "unnamed"
