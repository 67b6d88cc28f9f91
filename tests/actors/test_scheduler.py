"""The scheduler: by example, and by a state machine that tries to lose, repeat or overspend samples."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actors.scheduler import Assignment, Counts, QueuedGroup, Scheduler
from rollout.tasks import Task


def group(run: str, task_id: str, size: int = 2) -> QueuedGroup:
    task = Task(task_id=task_id, messages=[{"role": "user", "content": "x"}])
    return QueuedGroup(f"{run}/{task_id}", task, range(size), 5.0)


def names(assignments: list[Assignment]) -> list[tuple[str, int]]:
    return [(a.key.trajectory_id, a.attempt) for a in assignments]


def scheduler(*task_ids: str, size: int = 1, max_attempts: int = 2, limit: int | None = None) -> Scheduler:
    made = Scheduler(max_attempts, limit)
    made.add_run("r")
    for task_id in task_ids:
        made.queue("r", group("r", task_id, size))
    return made


def test_groups_start_whole_and_in_order():
    made = scheduler("a", "b", size=2)
    assert made.counts("r") == Counts(queued=4)
    made.add_worker("w", 3)
    assert {w: names(a) for w, a in made.assign().items()} == {"w": [("r/a/0", 1), ("r/a/1", 1), ("r/b/0", 1)]}
    assert made.counts("r") == Counts(queued=1, running=3)
    assert made.assign() == {}
    made.audit()


def test_an_assignment_says_since_when_it_waited():
    made = scheduler("a")
    made.add_worker("w", 1)
    assert made.assign()["w"][0].queued_at == 5.0


def test_a_group_starts_only_when_it_is_admitted():
    made = scheduler("a", "b", size=2)
    made.add_worker("w", 9)
    asked = []
    assert names(made.assign(lambda run, g: asked.append(g) or g.endswith("a"))["w"]) == [("r/a/0", 1), ("r/a/1", 1)]
    assert asked == ["r/a", "r/b"], "once each, in order"
    assert names(made.assign()["w"]) == [("r/b/0", 1), ("r/b/1", 1)]


def test_some_samples_of_a_group_only():
    made = Scheduler(1)
    made.add_run("r")
    task = Task(task_id="a", messages=[{"role": "user", "content": "x"}])
    made.queue("r", QueuedGroup("r/a", task, [1, 3]))
    made.add_worker("w", 9)
    assert names(made.assign()["w"]) == [("r/a/1", 1), ("r/a/3", 1)]


def test_the_least_loaded_worker_comes_first():
    made = scheduler("a", "b", "c", "d")
    made.add_worker("small", 1)
    made.add_worker("large", 3)
    given = made.assign()
    assert {name: len(a) for name, a in given.items()} == {"large": 3, "small": 1}
    assert names(given["large"])[0] == ("r/a/0", 1)


def test_no_more_run_at_once_than_allowed():
    made = scheduler("a", "b", "c", limit=2)
    made.add_worker("w", 9)
    assert len(made.assign()["w"]) == 2
    assert made.finished("w", "r/a/0", 1, retryable=False)
    assert len(made.assign()["w"]) == 1


def test_runs_share_workers_by_their_shares():
    made = Scheduler(1)
    for run, share in (("one", 1.0), ("three", 3.0)):
        made.add_run(run, share)
        for number in range(40):
            made.queue(run, group(run, f"t{number}", 1))
    made.add_worker("w", 16)
    given = Counter(a.key.run for a in made.assign()["w"])
    assert given == {"one": 4, "three": 12}


def test_a_run_that_is_held_back_does_not_hold_back_others():
    made = Scheduler(1)
    for run in ("a", "b"):
        made.add_run(run)
        made.queue(run, group(run, "t", 1))
    made.add_worker("w", 4)
    assert names(made.assign(lambda run, _: run == "b")["w"]) == [("b/t/0", 1)]


def test_a_paused_run_starts_nothing_and_goes_on_later():
    made = scheduler("a", size=2)
    made.add_worker("w", 1)
    made.assign()
    made.pause("r", True)
    assert made.finished("w", "r/a/0", 1, retryable=False)
    assert made.assign() == {}
    made.pause("r", False)
    assert names(made.assign()["w"]) == [("r/a/1", 1)]


def test_a_retryable_end_runs_again_before_others_until_attempts_run_out():
    made = scheduler("a", "b", max_attempts=2)
    made.add_worker("w", 1)
    made.assign()
    assert not made.finished("w", "r/a/0", 1, retryable=True)
    assert made.counts("r") == Counts(queued=2, retried=1)
    assert names(made.assign()["w"]) == [("r/a/0", 2)]
    assert made.finished("w", "r/a/0", 2, retryable=True), "there is no third attempt: its trajectory is kept"
    made.audit()


def test_answers_that_are_stale_unknown_or_repeated_are_ignored():
    made = scheduler("a")
    made.add_worker("w", 1)
    made.add_worker("v", 1)
    ((name, _),) = made.assign().items()
    other = {"w": "v", "v": "w"}[name]
    assert not made.finished(other, "r/a/0", 1, retryable=False), "another worker's"
    assert not made.finished(name, "r/a/0", 2, retryable=False), "another attempt's"
    assert not made.finished(name, "r/z/0", 1, retryable=False)
    assert made.finished(name, "r/a/0", 1, retryable=False)
    assert not made.finished(name, "r/a/0", 1, retryable=False)
    assert made.counts("r") == Counts(done=1)


def test_a_lost_worker_gives_back_what_it_held_in_order_and_gives_up_what_has_no_attempts_left():
    made = scheduler("a", "b", "c", max_attempts=2)
    made.add_worker("w", 2)
    made.assign()
    assert made.worker_lost("w") == []
    made.add_worker("v", 3)
    assert names(made.assign()["v"]) == [("r/a/0", 2), ("r/b/0", 2), ("r/c/0", 1)]
    assert names(made.worker_lost("v")) == [("r/a/0", 2), ("r/b/0", 2)]
    assert made.counts("r") == Counts(queued=1, done=2, retried=3)
    assert made.worker_lost("v") == []
    made.audit()


def test_a_withdrawn_group_frees_its_places_when_its_sessions_have_ended():
    made = scheduler("a", "b", size=3)
    made.add_worker("w", 2)
    made.assign()
    assert made.withdraw("r", "r/a") == {"w": ["r/a/0", "r/a/1"]}
    assert made.counts("r") == Counts(queued=3)
    assert made.assign() == {}, "the worker still holds them"
    assert not made.finished("w", "r/a/0", 1, retryable=False)
    assert names(made.assign()["w"]) == [("r/b/0", 1)]
    assert made.withdraw("r", "r/b") == {"w": ["r/b/0"]}
    assert made.withdraw("r", "r/b") == {}
    made.audit()


def test_a_waiting_group_is_withdrawn_without_a_trace():
    made = scheduler("a", "b")
    assert made.withdraw("r", "r/a") == {}
    assert made.counts("r") == Counts(queued=1)
    made.add_worker("w", 5)
    assert names(made.assign()["w"]) == [("r/b/0", 1)]


def test_a_group_can_be_put_first():
    made = scheduler("a")
    made.queue("r", group("r", "urgent", 1), first=True)
    made.add_worker("w", 1)
    assert names(made.assign()["w"]) == [("r/urgent/0", 1)]


def test_ending_a_run_sorts_what_it_had():
    made = scheduler("a", "b", "c", size=2)
    made.add_worker("w", 3)
    made.assign()
    groups, unplayed, running = made.end_run("r")
    assert [g.group_id for g in groups] == ["r/c"]
    assert names(unplayed) == [("r/b/1", 1)]
    assert running == {"w": ["r/a/0", "r/a/1", "r/b/0"]}
    assert made.finished("w", "r/a/0", 1, retryable=True), "nothing is tried again"
    assert made.worker_lost("w") != []
    assert made.counts("r") == Counts(done=4)
    made.audit()


def test_a_removed_run_leaves_nothing():
    made = scheduler("a", "b", size=2)
    made.add_worker("w", 3)
    made.assign()
    assert {w: sorted(ids) for w, ids in made.remove_run("r").items()} == {"w": ["r/a/0", "r/a/1", "r/b/0"]}
    assert not made.has_run("r") and made.counts("r") == Counts()
    made.audit()


def test_audit_notices_a_lost_sample():
    made = scheduler("a")
    made.add_worker("w", 1)
    made.assign()
    made._workers["w"].running.clear()
    with pytest.raises(AssertionError):
        made.audit()


class Machine(RuleBasedStateMachine):
    """Random workers, runs, deaths and answers; every sample that is not withdrawn ends exactly once."""

    def __init__(self) -> None:
        super().__init__()
        self.made = Scheduler(3, 7)
        self.runs = ["x", "y"]
        for run, share in zip(self.runs, (1.0, 2.5), strict=True):
            self.made.add_run(run, share, guest=run == "y")
        self.groups = 0
        self.workers: list[str] = []
        self.serial = 0
        self.held: dict[str, tuple[str, int]] = {}
        self.wanted: set[str] = set()
        self.ended: Counter[str] = Counter()

    @rule(run=st.sampled_from(["x", "y"]), size=st.integers(1, 4), first=st.booleans())
    def queue(self, run: str, size: int, first: bool) -> None:
        queued = group(run, f"t{self.groups}", size)
        self.groups += 1
        self.made.queue(run, queued, first=first)
        self.wanted |= {f"{queued.group_id}/{index}" for index in range(size)}

    @precondition(lambda self: len(self.workers) < 4)
    @rule(capacity=st.integers(1, 4))
    def add_worker(self, capacity: int) -> None:
        self.serial += 1
        self.workers.append(f"w{self.serial}")
        self.made.add_worker(self.workers[-1], capacity)

    @rule(refuse=st.sampled_from(["", "x", "y"]))
    def assign(self, refuse: str) -> None:
        for worker, assignments in self.made.assign(lambda run, _: run != refuse).items():
            for assignment in assignments:
                trajectory_id = assignment.key.trajectory_id
                assert trajectory_id not in self.held, "one sample, one session"
                self.held[trajectory_id] = (worker, assignment.attempt)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), retryable=st.booleans())
    def finish(self, data: st.DataObject, retryable: bool) -> None:
        trajectory_id = data.draw(st.sampled_from(sorted(self.held)))
        worker, attempt = self.held.pop(trajectory_id)
        if self.made.finished(worker, trajectory_id, attempt, retryable=retryable):
            self.ended[trajectory_id] += 1

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def lose_worker(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        self.workers.remove(worker)
        for assignment in self.made.worker_lost(worker):
            self.ended[assignment.key.trajectory_id] += 1
        self.held = {t: place for t, place in self.held.items() if place[0] != worker}

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, self.groups - 1))
        for run in self.runs:
            self.made.withdraw(run, f"{run}/t{number}")
            mine = {t for t in self.wanted if t.startswith(f"{run}/t{number}/")}
            self.wanted -= mine - self.ended.keys()

    @rule(run=st.sampled_from(["x", "y"]), paused=st.booleans())
    def pause(self, run: str, paused: bool) -> None:
        self.made.pause(run, paused)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.made.audit()
        assert max(self.ended.values(), default=0) <= 1
        assert len(self.held) <= 7

    def teardown(self) -> None:
        for run in self.runs:
            self.made.pause(run, False)
        self.made.add_worker("last", 50)
        self.workers.append("last")
        for _ in range(1000):
            self.assign("")
            if not self.held:
                break
            for trajectory_id in list(self.held):
                worker, attempt = self.held.pop(trajectory_id)
                if self.made.finished(worker, trajectory_id, attempt, retryable=False):
                    self.ended[trajectory_id] += 1
        assert set(self.ended) >= self.wanted
        assert max(self.ended.values(), default=0) <= 1


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
