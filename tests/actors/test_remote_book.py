"""Remote rollouts as a state machine: one run, one answer, what is kept and what is told again."""

from __future__ import annotations

from typing import Any

import pytest

from actors import remote_book as module
from actors.remote_book import FIRST_PAUSE_S, MAX_PAUSE_S, Entry, RemoteBook
from rollout.errors import BusyError, ConflictError, NotFoundError
from rollout.remote.order import RolloutOrder
from rollout.remote.wire import InitRequest, RolloutRequest, RolloutResponse

NOW = 1_000.0


def book(**options: Any) -> RemoteBook:
    given: dict[str, Any] = {"max_concurrent": 2, "max_queued": 3, "queue_s": 100, "keep_s": 50, "report_s": 500}
    return RemoteBook(**{**given, **options})


def order(rollout_id: str = "r", generation: str = "A", text: str = "2+3?", **fields: Any) -> RolloutOrder:
    body = {
        "rollout_id": rollout_id,
        "server_url": "http://t",
        "messages": [{"role": "user", "content": text}],
        **fields,
    }
    if generation == "B":
        return RolloutOrder.of(InitRequest.model_validate({"completion_params": {}, "api_key": "k", **body}))
    return RolloutOrder.of(RolloutRequest.model_validate(body))


def answer(rollout_id: str = "r", text: str = "5") -> RolloutResponse:
    messages = [{"role": "assistant", "content": text}]
    return RolloutResponse(rollout_id=rollout_id, status="COMPLETED", final_messages=messages)


def ended(made: RemoteBook, rollout_id: str = "r", generation: str = "A", now: float = NOW) -> Entry:
    entry, _ = made.accept(order(rollout_id, generation), now)
    made.start(rollout_id, now)
    made.finish(rollout_id, answer(rollout_id), now)
    return entry


def test_orders_are_played_in_turn_and_only_so_many_at_once():
    made = book()
    for name in ("a", "b", "c"):
        assert made.accept(order(name), NOW)[1]
    started = []
    while (entry := made.next_to_start()) is not None:
        started.append(made.start(entry.rollout_id, NOW).rollout_id)
    assert started == ["a", "b"]
    made.finish("b", answer("b"), NOW)
    assert made.next_to_start() is made.get("c")


def test_the_same_again_joins_and_another_is_a_conflict():
    made = book()
    entry, _ = made.accept(order(), NOW)
    assert made.accept(order(), NOW) == (entry, False)
    with pytest.raises(ConflictError, match="another body"):
        made.accept(order(text="other"), NOW)
    made.start("r", NOW)
    made.finish("r", answer(), NOW)
    assert made.accept(order(), NOW) == (entry, False), "what it asked for is still known by its digest"
    with pytest.raises(ConflictError):
        made.accept(order(text="other"), NOW)


def test_an_idempotency_key_is_a_name_of_its_own():
    made = book()
    first, _ = made.accept(order("r1", "B", idempotency_key="k"), NOW)
    assert made.accept(order("r1", "B", idempotency_key="k"), NOW) == (first, False)
    assert made.accept(order("r2", "B", idempotency_key="k"), NOW) == (first, False), "the key decides"
    with pytest.raises(ConflictError):
        made.accept(order("r3", "B", text="other", idempotency_key="k"), NOW)
    assert made.accept(order("k", "B"), NOW)[1], "an id that is somebody's key is another rollout"
    assert made.accept(order("r1", "B"), NOW) == (first, False)


def test_a_full_queue_says_when_to_come_again():
    made = book()
    for name in "abcde":
        made.accept(order(name), NOW)
    with pytest.raises(BusyError) as caught:
        made.accept(order("f"), NOW)
    assert caught.value.retry_after == module.DEFAULT_RETRY_AFTER_S
    assert not made.accept(order("a"), NOW)[1], "who repeats is no newcomer"
    made.start("a", NOW)
    made.finish("a", answer("a"), NOW + 9)
    made.accept(order("f"), NOW)
    with pytest.raises(BusyError) as caught:
        made.accept(order("g"), NOW)
    assert caught.value.retry_after == 5.0, "9 s over two places, in whole seconds"


def test_an_answer_never_changes():
    made = book()
    entry = ended(made)
    assert not made.finish("r", answer(text="6"), NOW)
    assert entry.response is not None and entry.response.final_messages[0]["content"] == "5"
    assert (entry.state, entry.order.messages) == ("reported", [])


def test_the_key_of_a_that_nobody_calls_any_more_is_not_kept():
    made = book()
    made.accept(order(callback_api_key="k"), NOW)
    made.start("r", NOW)
    assert made.get("r").order.api_key == "k"
    made.finish("r", answer(), NOW)
    assert made.get("r").order.api_key is None


def test_a_repeated_request_may_bring_a_new_key():
    made = book()
    for name, generation in (("a", "A"), ("b", "B")):
        made.accept(order(name, generation), NOW)
        new = {"callback_api_key": "new"} if generation == "A" else {"api_key": "new"}
        assert not made.accept(order(name, generation, **new), NOW)[1]
        assert made.renew(name, "new") and made.get(name).order.api_key == "new"
        assert not made.renew(name, "new") and not made.renew(name, None)
        made.start(name, NOW)
        assert made.renew(name, "newer") == (generation == "B"), "of A no call is to come that does not have its key"
        made.finish(name, answer(name), NOW)
    assert made.renew("b", "newest") and made.get("b").order.api_key == "newest", "for the next report"
    made.reported("b", NOW)
    assert not made.renew("b", "late") and not made.renew("a", "late")


def at(host: str, name: str, generation: str = "A") -> RolloutOrder:
    return order(name, generation, server_url=f"http://{host}:{9000 + len(name)}")


def test_the_host_with_the_fewest_places_is_next_and_none_has_all():
    made = book(max_concurrent=16, max_queued=100)
    for index in range(30):
        made.accept(at("stalls", f"s{index}"), NOW + index)

    def start() -> list[str]:
        started = []
        while (entry := made.next_to_start()) is not None:
            started.append(made.start(entry.rollout_id, NOW).rollout_id)
        return started

    assert start() == [f"s{index}" for index in range(14)], "two of sixteen places are left"
    for index in range(3):
        made.accept(at("other", f"o{index}"), NOW + 90 + index)
    assert start() == ["o0", "o1"]
    made.finish("s3", answer("s3"), NOW)
    assert start() == ["o2"], "others were there before, but their host has more"
    made.finish("o0", answer("o0"), NOW)
    assert start() == ["s14"]
    made.withdraw("s15")
    made.finish("o1", answer("o1"), NOW)
    assert start() == [], "fourteen again"
    made.finish("s0", answer("s0"), NOW)
    assert start() == ["s16"]


def test_who_has_waited_longest_is_told_first():
    made = book(max_concurrent=9)
    for index, name in enumerate("abc"):
        ended(made, name, "B", NOW + index)
    assert [entry.rollout_id for entry in made.due(NOW + 9)] == ["a", "b", "c"]
    made.unreported("a", NOW, "busy", 20.0)
    made.unreported("b", NOW, "down")
    assert [entry.due_at - NOW for entry in map(made.get, "ab")] == [20.0, FIRST_PAUSE_S], "as long as it asked for"
    made.unreported("c", NOW, "busy", 9e9)
    assert made.get("c").due_at == NOW + MAX_PAUSE_S
    assert [entry.rollout_id for entry in made.due(NOW + 900)] == ["b", "a", "c"]


def test_who_was_being_told_is_due_when_that_was_interrupted():
    made = book(max_concurrent=9)
    for name in "abc":
        ended(made, name, "B")
    made.reporting("a")
    made.reporting("b")
    made.reported("b", NOW)
    made.unreported("c", NOW, "down")
    made.interrupted()
    assert [entry.rollout_id for entry in made.due(NOW)] == ["a"]


def test_b_is_told_until_it_knows_with_growing_pauses():
    made = book(report_s=1e9)
    entry = ended(made, generation="B")
    assert entry.state == "finished" and made.due(NOW) == [entry]
    made.reporting("r")
    assert made.due(NOW + 1e6) == []
    pauses = []
    now = NOW
    for _ in range(9):
        assert made.unreported("r", now, "down")
        pauses.append(entry.due_at - now)
        assert made.due(entry.due_at - 0.1) == [] and made.due(entry.due_at) == [entry]
        now = entry.due_at
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S] and pauses[-1] == MAX_PAUSE_S
    assert entry.order.api_key == "k"
    made.reported("r", now)
    assert entry.state == "reported" and made.due(1e12) == []
    assert entry.order.api_key is None, "a key that is needed no more is not kept"


def test_nobody_is_told_for_ever():
    made = book(report_s=500)
    ended(made, generation="B")
    assert made.unreported("r", NOW + 499, "down")
    assert not made.unreported("r", NOW + 500, "down")


def test_what_waits_too_long_is_ended_as_such():
    made = book()
    made.accept(order("a"), NOW)
    made.accept(order("b"), NOW + 60)
    assert made.stale(NOW + 99) == []
    (entry,) = made.stale(NOW + 100)
    response = made.overdue(entry)
    assert response.status == "ERROR" and response.extra_fields["error_category"] == "rate_limited"
    made.finish("a", response, NOW + 100)
    assert made.next_to_start() is made.get("b")


def test_what_is_reported_and_old_is_forgotten():
    made = book(keep_s=50)
    ended(made, "a")
    ended(made, "b", "B")
    assert made.forgotten(NOW + 49) == []
    assert made.forgotten(NOW + 50) == ["a"], "b's trainer does not know yet"
    with pytest.raises(NotFoundError, match="50 s"):
        made.get("a")
    assert made.accept(order("a"), NOW + 51)[1]
    made.reported("b", NOW + 52)
    assert made.forgotten(NOW + 53) == ["b"]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_REMEMBERED", 2)
    made = book()
    for name in "abcd":
        ended(made, name)
    assert made.forgotten(NOW) == ["a", "b"]
    monkeypatch.setattr(module, "MAX_REMEMBERED_CHARS", made.get("d").size)
    assert made.forgotten(NOW) == ["c"]
    assert made.forgotten(NOW) == []


def test_after_a_restart_what_waited_waits_and_what_was_played_is_lost():
    before = book(max_concurrent=5)
    entries = [before.accept(order(name, "B"), NOW + index)[0] for index, name in enumerate("abcd")]
    before.start("a", NOW)
    for name in "bc":
        before.start(name, NOW)
        before.finish(name, answer(name), NOW)
    before.reported("c", NOW)
    made = book(max_concurrent=5)
    assert [entry.rollout_id for entry in made.restore(list(reversed(entries)), NOW + 9)] == ["a"]
    assert made.next_to_start() is made.get("d")
    assert [entry.rollout_id for entry in made.due(NOW + 9)] == ["b"]
    assert not made.accept(order("c", "B"), NOW)[1]
    counts = made.counts()
    assert (counts.queued, counts.running, counts.unreported) == (1, 1, 1)


def test_an_order_that_could_not_be_written_down_is_as_if_it_never_came():
    made = book()
    made.accept(order(), NOW)
    made.withdraw("r")
    assert made.next_to_start() is None
    assert made.accept(order(text="other"), NOW)[1]


def test_without_a_queue_as_many_are_taken_as_may_run():
    made = book(max_queued=0)
    made.accept(order("a"), NOW)
    made.accept(order("b"), NOW)
    with pytest.raises(BusyError):
        made.accept(order("c"), NOW)


def test_counts():
    made = book()
    ended(made, "a")
    made.accept(order("b"), NOW)
    made.finish("b", made.overdue(made.get("b")), NOW)
    counts = made.counts()
    assert (counts.completed, counts.failed, counts.queued, counts.running) == (2, 1, 0, 0)
