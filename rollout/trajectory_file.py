"""Writing trajectories to a directory, so that what has finished is never lost.

Invariant: every table given to `write` is on disk, complete and readable, when `flush` returns; a process that is
killed leaves `parts/`, each part a valid Parquet file, and `close` joins them into one `trajectories.parquet`.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.errors import RecordError
from rollout.record import SCHEMA, check, read_parquet

FILE_NAME = "trajectories.parquet"
PARTS = "parts"
# A part is written at the latest when it has this many rows or its first row has waited this long.
PART_ROWS = 2_048
PART_SECONDS = 5.0
# Where a file keeps what its readers want to know of the run (JSON: model, renderer, run).
INFO_KEY = b"rollout_info"


class TrajectoryWriter:
    """Writes one directory. Use as a context manager; leaving the block closes it, after errors too."""

    def __init__(self, directory: Path | str, info: dict[str, Any] | None = None, *, overwrite: bool = False) -> None:
        """Raises RecordError where the directory already holds trajectories and `overwrite` is not given."""
        self.directory = Path(directory)
        self.path = self.directory / FILE_NAME
        self._parts = self.directory / PARTS
        if overwrite:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self._parts, ignore_errors=True)
        elif self.path.exists() or self._parts.exists():
            raise RecordError(f"{self.directory} already holds trajectories; choose another directory or --overwrite")
        try:
            self._parts.mkdir(parents=True)
        except OSError as error:
            raise RecordError(f"{self.directory} cannot hold trajectories: {error.strerror or error}") from None
        self._schema = SCHEMA.with_metadata({**(SCHEMA.metadata or {}), INFO_KEY: json.dumps(info or {}).encode()})
        self._pending: list[pa.Table] = []
        self._since = 0.0
        self._num_parts = 0
        self.num_rows = 0

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, table: pa.Table) -> None:
        """Add rows of the record. Raises RecordError for a table that is not one."""
        check(table)
        if not self._pending:
            self._since = time.monotonic()
        self._pending.append(table)
        self.num_rows += table.num_rows
        rows = sum(item.num_rows for item in self._pending)
        if rows >= PART_ROWS or time.monotonic() - self._since >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Put everything on disk."""
        if not self._pending:
            return
        path = self._parts / f"part-{self._num_parts:06d}.parquet"
        partial = path.with_suffix(".partial")
        pq.write_table(pa.concat_tables(self._pending), partial, compression="zstd")
        partial.replace(path)
        self._num_parts += 1
        self._pending = []

    def close(self) -> Path:
        """Join the parts. Returns the path of the file; closing twice does nothing more."""
        if self._parts.exists():
            self.flush()
            partial = self.path.with_suffix(".partial")
            with pq.ParquetWriter(partial, self._schema, compression="zstd") as writer:
                for part in sorted(self._parts.glob("part-*.parquet")):
                    writer.write_table(pq.read_table(part).replace_schema_metadata(self._schema.metadata))
            partial.replace(self.path)
            shutil.rmtree(self._parts)
        return self.path


def read_trajectories(path: Path | str) -> tuple[pa.Table, dict[str, Any]]:
    """A file, or a directory that a writer left (its parts, if it was killed), with the info of its run.

    Raises RecordError where there is nothing to read.
    """
    path = Path(path)
    if path.is_dir():
        parts = sorted((path / PARTS).glob("part-*.parquet"))
        if (path / FILE_NAME).exists():
            path = path / FILE_NAME
        elif parts:
            return pa.concat_tables([read_parquet(part) for part in parts]), {}
        else:
            raise RecordError(f"{path} holds no {FILE_NAME}")
    table = read_parquet(path)
    metadata = pq.read_schema(path).metadata or {}
    try:
        return table, json.loads(metadata.get(INFO_KEY, b"{}"))
    except ValueError:
        return table, {}
