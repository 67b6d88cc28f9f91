"""The scheduler: by example, and by a state machine that tries to lose, repeat or overspend samples."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from actors.scheduler import Assignment, Counts, Scheduler
from rollout.tasks import Task


def tasks(*ids: str) -> list[Task]:
    return [Task(task_id=task_id, messages=[{"role": "user", "content": "x"}]) for task_id in ids]


def names(assignments: list[Assignment]) -> list[tuple[str, int]]:
    return [(a.key.trajectory_id, a.attempt) for a in assignments]


def scheduler(*task_ids: str, group_size: int = 1, max_attempts: int = 2, limit: int | None = None) -> Scheduler:
    made = Scheduler(max_attempts, limit)
    made.submit("r", tasks(*task_ids), group_size)
    return made


def test_groups_are_queued_whole_and_in_order():
    made = Scheduler(1)
    keys = made.submit("r", tasks("a", "b"), 2)
    assert [(k.trajectory_id, k.group_id, k.task_id, k.sample_index) for k in keys] == [
        ("r/a/0", "r/a", "a", 0),
        ("r/a/1", "r/a", "a", 1),
        ("r/b/0", "r/b", "b", 0),
        ("r/b/1", "r/b", "b", 1),
    ]
    assert made.counts("r") == Counts(total=4, queued=4)
    made.add_worker("w", 3)
    assert {w: names(a) for w, a in made.assign().items()} == {"w": [("r/a/0", 1), ("r/a/1", 1), ("r/b/0", 1)]}
    assert made.counts("r") == Counts(total=4, queued=1, running=3)
    assert made.assign() == {}
    assert made.run_of("r/b/1") == "r"
    made.audit()


def test_a_group_is_submitted_once():
    made = scheduler("a")
    with pytest.raises(ValueError, match="task_id 'a' was already submitted to run 'r'"):
        made.submit("r", tasks("a"), 1)
    made.submit("other", tasks("a"), 1)
    assert made.counts("r") == Counts(total=1, queued=1)
    made.audit()


@pytest.mark.parametrize("second", [("b", "a"), ("b", "c", "b")], ids=["seen before", "twice in one call"])
def test_a_refused_submission_leaves_nothing_behind(second: tuple[str, ...]):
    made = scheduler("a")
    with pytest.raises(ValueError):
        made.submit("r", tasks(*second), 2)
    assert made.counts("r") == Counts(total=1, queued=1)


def test_the_least_loaded_worker_comes_first():
    made = scheduler(*"abcdef")
    made.add_worker("small", 2)
    made.add_worker("large", 4)
    assert {w: len(a) for w, a in made.assign().items()} == {"small": 2, "large": 4}
    made = scheduler(*"abcd")
    made.add_worker("small", 2)
    made.add_worker("large", 4)
    assert {w: len(a) for w, a in made.assign().items()} == {"small": 1, "large": 3}


def test_no_more_run_at_once_than_allowed():
    made = scheduler(*"abcde", limit=2)
    made.add_worker("w", 100)
    assert [names(a) for a in made.assign().values()] == [[("r/a/0", 1), ("r/b/0", 1)]]
    assert made.assign() == {}
    assert made.finished("r/a/0", 1, retryable=False) is True
    assert [names(a) for a in made.assign().values()] == [[("r/c/0", 1)]]


def test_without_workers_everything_waits():
    made = scheduler("a")
    assert made.assign() == {}
    made.add_worker("full", 0)
    assert made.assign() == {}
    assert made.counts("r") == Counts(total=1, queued=1)


def test_a_retryable_end_runs_again_before_others_until_attempts_run_out():
    made = scheduler("a", "b", max_attempts=2)
    made.add_worker("w", 1)
    made.assign()
    assert made.finished("r/a/0", 1, retryable=True) is False
    assert made.counts("r") == Counts(total=2, queued=2, retried=1)
    assert names(made.assign()["w"]) == [("r/a/0", 2)]
    assert made.finished("r/a/0", 2, retryable=True) is True, "the last attempt is kept, whatever it was"
    assert made.counts("r") == Counts(total=2, queued=1, done=1, retried=1)
    made.audit()


def test_answers_that_are_stale_unknown_or_repeated_are_ignored():
    made = scheduler("a", max_attempts=3)
    assert made.finished("r/a/0", 0, retryable=False) is False, "it was never started"
    made.add_worker("w1", 1)
    made.assign()
    made.worker_lost("w1")
    assert made.finished("r/a/0", 1, retryable=False) is False, "queued again: the old attempt is void"
    made.add_worker("w2", 1)
    assert names(made.assign()["w2"]) == [("r/a/0", 2)]
    assert made.finished("r/a/0", 1, retryable=False) is False
    assert made.finished("r/a/0", 2, retryable=False) is True
    assert made.finished("r/a/0", 2, retryable=False) is False
    assert made.finished("r/zzz/0", 1, retryable=False) is False
    assert made.counts("r") == Counts(total=1, done=1, retried=1)


def test_a_lost_worker_gives_back_what_it_held_and_gives_up_what_has_no_attempts_left():
    made = scheduler("a", "b", max_attempts=2)
    made.add_worker("w1", 2)
    made.assign()
    assert made.worker_lost("w1") == []
    assert made.counts("r") == Counts(total=2, queued=2, retried=2)
    made.add_worker("w2", 1)
    (again,) = made.assign()["w2"]
    assert again.attempt == 2
    given_up = made.worker_lost("w2")
    assert names(given_up) == [(again.key.trajectory_id, 2)] and given_up[0].task == again.task
    assert made.counts("r") == Counts(total=2, queued=1, done=1, retried=2)
    assert made.worker_lost("w2") == [] and made.worker_lost("never there") == []
    made.audit()


def test_cancelling_takes_the_queued_of_one_run():
    made = scheduler("a", "b", max_attempts=2)
    made.submit("other", tasks("a"), 1)
    made.add_worker("w", 1)
    made.assign()
    made.worker_lost("w")  # r/a/0 is queued again, for its second attempt
    made.add_worker("w", 1)
    made.assign()
    made.worker_lost("w")
    assert made.counts("r") == Counts(total=2, queued=1, done=1, retried=1)
    assert names(made.cancel_queued("r")) == [("r/b/0", 1)]
    assert made.counts("r") == Counts(total=2, done=2, retried=1)
    assert made.counts("other") == Counts(total=1, queued=1)
    assert made.cancel_queued("r") == [] and made.cancel_queued("unknown") == []
    made.add_worker("w", 5)
    assert names(made.assign()["w"]) == [("other/a/0", 1)]
    assert made.running_of("other") == {"w": ["other/a/0"]} and made.running_of("r") == {}
    made.audit()


def test_a_run_is_forgotten_only_when_it_is_finished():
    made = scheduler("a")
    with pytest.raises(ValueError, match="run 'r' is not finished"):
        made.forget("r")
    made.add_worker("w", 1)
    made.assign()
    with pytest.raises(ValueError, match="run 'r' is not finished"):
        made.forget("r")
    made.finished("r/a/0", 1, retryable=False)
    made.forget("r")
    assert made.counts("r") == Counts()
    assert made.finished("r/a/0", 1, retryable=False) is False
    with pytest.raises(KeyError):
        made.run_of("r/a/0")
    made.submit("r", tasks("a"), 1)
    assert made.counts("r") == Counts(total=1, queued=1)
    made.audit()


def test_counts_are_a_copy():
    made = scheduler("a")
    made.counts("r").done = 99
    assert made.counts("r").done == 0


def test_audit_notices_a_lost_sample():
    made = scheduler("a", "b")
    made._queue.pop()
    with pytest.raises(AssertionError, match="r/b/0 is in 0 places"):
        made.audit()


MAX_ATTEMPTS = 2
MAX_CONCURRENT = 6


class Cluster(RuleBasedStateMachine):
    """Anything may happen in any order; each sample must reach done once, within its attempts.

    The model beside the scheduler: who was told to run what, and what was done with it.
    """

    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(MAX_ATTEMPTS, MAX_CONCURRENT)
        self.serial = 0
        self.workers: dict[str, int] = {}
        self.submitted: dict[str, set[str]] = {"r": set(), "s": set()}
        self.running: dict[tuple[str, int], str] = {}
        """(sample, attempt) → worker, of attempts that are valid."""
        self.started: dict[str, int] = {}
        self.done: list[str] = []
        self.cancelled: set[str] = set()

    def may_run_again(self, sample: str, attempt: int) -> bool:
        return attempt < MAX_ATTEMPTS and sample.split("/")[0] not in self.cancelled

    def next_name(self, prefix: str) -> str:
        self.serial += 1
        return f"{prefix}{self.serial}"

    @rule(run=st.sampled_from("rs"), count=st.integers(1, 3), group_size=st.integers(1, 3))
    def submit(self, run: str, count: int, group_size: int) -> None:
        keys = self.scheduler.submit(run, tasks(*(self.next_name("t") for _ in range(count))), group_size)
        assert len(keys) == count * group_size
        self.submitted[run] |= {key.trajectory_id for key in keys}

    @rule(capacity=st.integers(0, 4))
    def add_worker(self, capacity: int) -> None:
        name = self.next_name("w")
        self.workers[name] = capacity
        self.scheduler.add_worker(name, capacity)

    @rule(target=attempts)
    def assign(self):  # type: ignore[no-untyped-def]
        given = []
        for worker, assignments in self.scheduler.assign().items():
            for a in assignments:
                sample = a.key.trajectory_id
                self.started[sample] = self.started.get(sample, 0) + 1
                assert a.attempt == self.started[sample] <= MAX_ATTEMPTS
                assert sample not in self.done, "what is done does not run again"
                assert all(held != sample for held, _ in self.running), "no sample runs twice at once"
                self.running[sample, a.attempt] = worker
                given.append((sample, a.attempt))
        return multiple(*given)

    def end(self, sample: str, attempt: int, retryable: bool) -> None:
        valid = self.running.pop((sample, attempt), None) is not None
        kept = self.scheduler.finished(sample, attempt, retryable=retryable)
        assert kept == (valid and not (retryable and self.may_run_again(sample, attempt)))
        if kept:
            self.done.append(sample)

    @rule(attempt=consumes(attempts), retryable=st.booleans())
    def finish(self, attempt: tuple[str, int], retryable: bool) -> None:
        self.end(*attempt, retryable)

    @rule(attempt=attempts, retryable=st.booleans(), shift=st.integers(-1, 1))
    def finish_stale_early_or_twice(self, attempt: tuple[str, int], retryable: bool, shift: int) -> None:
        self.end(attempt[0], attempt[1] + shift, retryable)
        self.end(attempt[0], attempt[1] + shift, retryable)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def lose_a_worker(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.workers)))
        del self.workers[worker]
        held = {attempt for attempt, name in self.running.items() if name == worker}
        given_up = {(a.key.trajectory_id, a.attempt) for a in self.scheduler.worker_lost(worker)}
        assert given_up == {attempt for attempt in held if not self.may_run_again(*attempt)}
        for attempt in held:
            del self.running[attempt]
        self.done += [sample for sample, _ in given_up]

    @rule(run=st.sampled_from("rs"))
    def cancel(self, run: str) -> None:
        queued = self.submitted[run] - set(self.done) - {sample for sample, _ in self.running}
        taken = [a.key.trajectory_id for a in self.scheduler.cancel_queued(run)]
        self.cancelled.add(run)
        assert sorted(taken) == sorted(queued)
        self.done += taken

    @rule(run=st.sampled_from("rs"))
    def forget(self, run: str) -> None:
        finished = self.submitted[run] <= set(self.done)
        try:
            self.scheduler.forget(run)
            assert finished
            self.done = [sample for sample in self.done if sample not in self.submitted[run]]
            self.submitted[run] = set()
            self.cancelled.discard(run)
        except ValueError:
            assert not finished

    @invariant()
    def nothing_is_lost_repeated_or_overspent(self) -> None:
        self.scheduler.audit()
        assert len(self.done) == len(set(self.done)), "done exactly once"
        assert len(self.running) <= MAX_CONCURRENT
        for worker, capacity in self.workers.items():
            assert sum(name == worker for name in self.running.values()) <= capacity
        for run, submitted in self.submitted.items():
            counts = self.scheduler.counts(run)
            running = {sample for sample, _ in self.running} & submitted
            done = set(self.done) & submitted
            assert (counts.total, counts.running, counts.done) == (len(submitted), len(running), len(done))
            held = {t for ids in self.scheduler.running_of(run).values() for t in ids}
            assert held == running

    def teardown(self) -> None:
        """Whatever happened: with a worker that lives, every sample comes to its end."""
        self.scheduler.add_worker("last", 1000)
        for _ in range(10_000):
            for sample, attempt in list(self.running):
                self.end(sample, attempt, retryable=False)
            for assignments in self.scheduler.assign().values():
                for a in assignments:
                    self.running[a.key.trajectory_id, a.attempt] = "last"
            if not self.running:
                break
        self.nothing_is_lost_repeated_or_overspent()
        assert set(self.done) == self.submitted["r"] | self.submitted["s"]


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
