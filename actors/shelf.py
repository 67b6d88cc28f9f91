"""Finished trajectories in memory, as the blocks of rows in which they arrived.

Invariant: a block is kept exactly as long as one of its trajectories may still be delivered. Rows are never copied
until a batch is put together. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa

from actors.groups import Group, Member
from rollout.record import upgraded


class Shelf:
    """Blocks by number, with how many of their trajectories are still wanted."""

    def __init__(self) -> None:
        self._tables: dict[int, pa.Table] = {}
        self._wanted: dict[int, int] = {}
        self.num_bytes = 0

    def put(self, block: int, rows: bytes, trajectories: int) -> None:
        """Keep a block (an Arrow IPC stream) of which `trajectories` are wanted."""
        # A journal may be older than this software.
        table = upgraded(pa.ipc.open_stream(pa.py_buffer(rows)).read_all())
        self._tables[block] = table
        self._wanted[block] = trajectories
        self.num_bytes += table.nbytes

    def release(self, members: Iterable[Member]) -> list[int]:
        """These trajectories are no longer wanted. Returns the blocks that nobody wants now; they are gone."""
        empty = []
        for member in members:
            self._wanted[member.block] -= 1
            if not self._wanted[member.block]:
                del self._wanted[member.block]
                self.num_bytes -= self._tables.pop(member.block).nbytes
                empty.append(member.block)
        return empty

    def table(self, groups: Sequence[Group]) -> pa.Table:
        """Rows of complete groups: in their order, members by index. One contiguous copy."""
        pieces = []
        for group in groups:
            for index in sorted(group.members):
                member = group.members[index]
                rows = self._tables[member.block]
                pieces.append(rows.slice(member.summary.first_row, member.summary.num_rows))
        # Thousands of slices would travel as thousands of record batches.
        return pa.concat_tables(pieces).combine_chunks()
