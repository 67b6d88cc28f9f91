"""Batches: leased, acknowledged, extended, given back, expired.

Invariant: a group is in one batch at a time; an acknowledged group is never delivered again, an expired one is. A
lease is in the journal before the trainer hears of it, an acknowledgement before it is confirmed. Trainers that wait
for the same run are served in the order in which they came.
"""

from __future__ import annotations

import asyncio
import logging
import time

from actors import journal_records as records
from actors.groups import Group, GroupState
from actors.leases import Lease, LeaseState
from actors.run_service import RunService
from actors.run_store import Run, RunStore
from rollout.api import Acknowledged, Batch, LeaseRequest, NoBatch
from rollout.errors import ConflictError, NotFoundError

logger = logging.getLogger(__name__)


class Delivery:
    """The operations on leases."""

    def __init__(self, store: RunStore, service: RunService) -> None:
        self._store = store
        self._service = service

    async def lease(self, run_name: str, request: LeaseRequest) -> Batch | NoBatch:
        """The next complete groups, as soon as there are enough; see LeaseRequest. Raises NotFoundError."""
        self._store.check()
        run = self._store.run(run_name)
        if (known := self._store.leases.of_request(run_name, request.request_id)) is not None:
            return await self._batch(run, known)
        deadline = asyncio.get_running_loop().time() + request.timeout
        try:
            async with asyncio.timeout_at(deadline):
                await run.turn.acquire()
        except TimeoutError:
            return self._no_batch(run_name, "another trainer waits for the next batch of this run")
        try:
            if (known := self._store.leases.of_request(run_name, request.request_id)) is not None:
                # This request was repeated while its first call, which nobody hears any more, held the turn.
                return await self._batch(run, known)
            groups = await self._await_groups(run_name, run, request, deadline)
            if not groups:
                return self._no_batch(run_name, "not enough groups were complete in time")
            lease = self._grant(run, groups, request)
        finally:
            run.turn.release()
        await self._store.write(*records.put_lease(lease))
        self._store.metrics.leased()
        return await self._batch(run, lease)

    async def fetch(self, lease_id: str) -> Batch:
        """The batch of an active lease once more: for a trainer whose stream broke."""
        self._store.check()
        lease = self._store.leases.active(lease_id)
        return await self._batch(self._store.run(lease.run), lease)

    async def acknowledge(self, lease_id: str) -> Acknowledged:
        """The groups of a lease are trained on. Raises NotFoundError, or ConflictError where they went elsewhere."""
        self._store.check()
        lease = self._store.leases.get(lease_id)
        if lease.state == "acknowledged":
            await self._store.write()
            return Acknowledged(lease_id, len(lease.groups), repeated=True)
        run = self._store.run(lease.run)
        late = lease.state != "active"
        if late and not self._untouched(run, lease):
            raise ConflictError(
                f"lease {lease_id!r} is {lease.state}, and its groups were given out again; what was trained on them "
                "will be trained on twice. Ask for a longer ttl, or extend leases in time",
                "lease_id",
            )
        self._store.leases.finish(lease, "acknowledged")
        members = [member for seq in lease.groups for member in run.book.deliver(seq)]
        blocks = self._store.shelf.release(members)
        await self._store.write(
            *records.finish_groups(lease.run, lease.groups, records.DELIVERED, run.book.settled),
            *records.put_lease(lease),
            records.remove_blocks(blocks),
        )
        self._store.metrics.lease_ended("acknowledged")
        self._store.metrics.delivered(
            lease.run, len(lease.groups), [member.summary for member in members], lease.version
        )
        run.changed()
        self._store.dispatch()
        return Acknowledged(lease_id, len(lease.groups), late=late)

    async def extend(self, lease_id: str, ttl: float) -> float:
        """More time for a lease; returns when it expires (seconds since the epoch)."""
        self._store.check()
        lease = self._store.leases.extend(lease_id, now=time.time(), ttl=ttl)
        await self._store.write(*records.put_lease(lease))
        return lease.expires_at

    async def release(self, lease_id: str) -> None:
        """Give a batch back at once, for somebody else to train on."""
        self._store.check()
        lease = self._store.leases.active(lease_id)
        self._return(lease, "released")
        await self._store.write(*records.put_lease(lease))

    def expire(self, now: float) -> None:
        """End leases whose time is over; their groups are delivered again. Called every second or so."""
        for lease in self._store.leases.expired(now):
            logger.warning("lease %s of run %s expired with %d groups", lease.lease_id, lease.run, len(lease.groups))
            self._store.run(lease.run).leases_expired += 1
            self._return(lease, "expired")
            self._store.write_later(*records.put_lease(lease))

    async def _await_groups(self, name: str, run: Run, request: LeaseRequest, deadline: float) -> list[Group]:
        least = min(request.min_groups or request.groups, request.groups)
        while self._store.runs.get(name) is run:
            available = run.book.available()
            idle = run.book.idle
            if len(available) >= request.groups or (available and idle):
                return available[: request.groups]
            if run.book.submitted and idle and not available and not run.book.count(GroupState.LEASED):
                return []
            news = run.news
            try:
                async with asyncio.timeout_at(deadline):
                    await news.wait()
            except TimeoutError:
                return available if len(available) >= least else []
            self._store.check()
        raise NotFoundError(f"run {name!r} was forgotten meanwhile", "run")

    def _grant(self, run: Run, groups: list[Group], request: LeaseRequest) -> Lease:
        lease = self._store.leases.grant(
            run.book.run,
            [group.seq for group in groups],
            now=time.time(),
            ttl=request.ttl,
            version=self._store.version,
            request_id=request.request_id,
        )
        for group in groups:
            if (oldest := group.oldest_version) is not None:
                run.staleness_sum += self._store.version - oldest
                run.staleness_max = max(run.staleness_max, self._store.version - oldest)
        run.book.lease(groups, lease.lease_id)
        return lease

    async def _batch(self, run: Run, lease: Lease) -> Batch:
        groups = [group for seq in lease.groups if (group := run.book.get(seq)) is not None]
        # Off the event loop: a large batch is hundreds of megabytes.
        table = await asyncio.to_thread(self._store.shelf.table, groups)
        return Batch(
            lease_id=lease.lease_id,
            run=lease.run,
            table=table,
            groups=[run.book.group_id(group) for group in groups],
            expires_in=max(0.0, lease.expires_at - time.time()),
            policy_version=lease.version,
        )

    def _no_batch(self, run_name: str, reason: str) -> NoBatch:
        info = self._service.info(run_name)
        finished = info.finished
        if finished:
            reason = "every task of the run is delivered or dropped"
        elif not info.submitted:
            reason = "the run has no tasks yet"
        elif info.held_by is not None and not info.running:
            reason = f"nothing more is started: held by {info.held_by}"
        return NoBatch(finished, info.ready, info.waiting, info.running, info.leased, reason)

    def _untouched(self, run: Run, lease: Lease) -> bool:
        groups = [run.book.get(seq) for seq in lease.groups]
        return all(g is not None and g.state is GroupState.READY and g.lease_id == lease.lease_id for g in groups)

    def _return(self, lease: Lease, state: LeaseState) -> None:
        self._store.leases.finish(lease, state)
        self._store.metrics.lease_ended(state)
        run = self._store.run(lease.run)
        # In reverse, as each goes to the front.
        for seq in reversed(lease.groups):
            group = run.book.give_back(seq, lease.lease_id)
            if group is not None and run.book.bound.too_old(group.oldest_version, self._store.version):
                self._store.settle(run, group, "stale")
        run.changed()
