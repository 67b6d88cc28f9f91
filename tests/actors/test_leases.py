"""Leases: granted, extended, ended once, remembered."""

from __future__ import annotations

import pytest

from actors import leases as leases_module
from actors.leases import LeaseBook
from rollout.errors import ConflictError, NotFoundError


@pytest.fixture
def book() -> LeaseBook:
    return LeaseBook()


def test_a_lease_expires_at_its_time(book: LeaseBook):
    lease = book.grant("r", [1, 2], now=100.0, ttl=10.0, version=0)
    assert book.expired(109.9) == []
    assert book.expired(110.0) == [lease]
    book.finish(lease, "expired")
    assert book.expired(999.0) == [] and book.get(lease.lease_id).state == "expired"
    book.audit()


def test_an_extension_counts_from_now(book: LeaseBook):
    lease = book.grant("r", [1], now=0.0, ttl=10.0, version=0)
    assert book.extend(lease.lease_id, now=8.0, ttl=10.0).expires_at == 18.0
    book.finish(lease, "acknowledged")
    with pytest.raises(ConflictError, match="is acknowledged"):
        book.extend(lease.lease_id, now=9.0, ttl=10.0)


def test_an_unknown_lease(book: LeaseBook):
    with pytest.raises(NotFoundError, match="there is no lease 'x'"):
        book.get("x")


def test_the_same_request_has_the_same_lease_while_it_is_active(book: LeaseBook):
    lease = book.grant("r", [1], now=0.0, ttl=1.0, version=0, request_id="q")
    assert book.of_request("r", "q") is lease
    assert book.of_request("other", "q") is None and book.of_request("r", None) is None
    book.finish(lease, "released")
    assert book.of_request("r", "q") is None


def test_audit_notices_a_group_in_two_leases(book: LeaseBook):
    book.grant("r", [1], now=0.0, ttl=1.0, version=0)
    book.grant("other", [1], now=0.0, ttl=1.0, version=0)
    book.audit()
    book.grant("r", [1, 2], now=0.0, ttl=1.0, version=0)
    with pytest.raises(AssertionError, match="leased twice"):
        book.audit()


def test_finished_leases_are_not_remembered_for_ever(book: LeaseBook, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leases_module, "MAX_FINISHED", 3)
    granted = [book.grant("r", [n], now=0.0, ttl=1.0, version=0, request_id=str(n)) for n in range(5)]
    for lease in granted:
        book.finish(lease, "acknowledged")
    with pytest.raises(NotFoundError):
        book.get(granted[0].lease_id)
    assert book.get(granted[4].lease_id).state == "acknowledged"


def test_a_forgotten_run_takes_its_leases_along(book: LeaseBook):
    active = book.grant("r", [1], now=0.0, ttl=1.0, version=0, request_id="q")
    kept = book.grant("s", [1], now=0.0, ttl=1.0, version=0)
    book.forget_run("r")
    assert book.of_request("r", "q") is None and book.of_run("r") == []
    with pytest.raises(NotFoundError):
        book.get(active.lease_id)
    assert book.of_run("s") == [kept]
