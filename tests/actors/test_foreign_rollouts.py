"""The rollouts of a worker: who finds whose session, what a stalling server holds, and where runs may be played."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from actors import foreign_rollouts
from actors.foreign_rollouts import ForeignRollouts, check_remote, outcome_of
from actors.messages import ForeignNews, ForeignSettings, RunSpec, WorkerSettings
from actors.run_service import RunService
from actors.scheduler import Assignment, QueuedGroup, Scheduler
from actors.worker import SessionWorker
from rollout.api import EnvironmentRef, RunRequest
from rollout.errors import (
    ConflictError,
    EngineError,
    NotFoundError,
    RefusedError,
    RemoteDied,
    RemoteError,
    UnavailableError,
    describe,
)
from rollout.limits import Limits
from rollout.metrics_catalogue import LABELS
from rollout.remote.foreign_client import RemoteSpec
from rollout.remote.wire import CompletionRequest, RolloutResponse
from rollout.sampling import Sampling
from rollout.session_keys import derived_secret, session_key, session_of
from rollout.tasks import Task
from rollout.trajectory import SessionKey, Trajectory
from tests.actors.service import DEFAULTS, Service
from tests.conftest import MODEL
from tests.rollout.remote.foreign_peer import SECRET, Peer
from tests.rollout.sessions import IM_END, call, scripted

TURNS = (call("add", '{"a": 2, "b": 3}') + IM_END, f"5{IM_END}")
FOREIGN = ForeignSettings("http://127.0.0.1:8800", SECRET)


def settings(**fields: Any) -> WorkerSettings:
    given = {"max_sessions": 4, "foreign": FOREIGN, **fields}
    return WorkerSettings("org/m", None, "auto", {}, "app", "engine", 4, {}, **given)


def spec(run: str = "r", generation: Any = "A") -> RunSpec:
    remote = RemoteSpec("http://127.0.0.1:9000", generation)
    return RunSpec(run, "", {}, Sampling(max_tokens=64), Limits(), remote)


def assignment(task_id: str = "t") -> Assignment:
    task = Task(task_id=task_id, messages=[{"role": "user", "content": "2+3?"}])
    return Assignment(SessionKey("r", task_id, f"r/{task_id}", 0), task, 1)


def ask(rollout_id: str, **fields: Any) -> CompletionRequest:
    return CompletionRequest(rollout_id=rollout_id, messages=[{"role": "user", "content": "2+3?"}], **fields)


@pytest.mark.parametrize("generation", ["A", "B"])
async def test_a_session_is_found_while_it_plays_and_known_as_ended(chat, generation: Any):
    peer = Peer(generation, chat)
    rollouts = ForeignRollouts("worker-3", settings(), transport=peer.transport)
    session = rollouts.session(spec(generation=generation), assignment(), scripted(chat, *TURNS), chat, None)
    peer.sessions[session.rollout_id] = session
    trajectory = await session.run()
    assert trajectory.stop_reason == "stop"
    assert peer.bodies[0]["server_url"] == "http://127.0.0.1:8800/remote/worker-3"
    with pytest.raises(ConflictError, match="has ended"):
        await rollouts.complete(session.rollout_id, ask(session.rollout_id))
    await rollouts.completed(session.rollout_id, RolloutResponse(rollout_id=session.rollout_id, status="COMPLETED"))
    with pytest.raises(NotFoundError):
        await rollouts.complete("nobody", ask("nobody"))
    with pytest.raises(NotFoundError):
        await rollouts.completed("nobody", RolloutResponse(rollout_id="nobody", status="COMPLETED"))
    await rollouts.close()


async def test_what_becomes_of_sessions_and_calls_is_told_once(chat):
    peer = Peer("A", chat)
    rollouts = ForeignRollouts("w", settings(), transport=peer.transport)
    session = rollouts.session(spec(), assignment(), scripted(chat, *TURNS), chat, None)
    peer.sessions[session.rollout_id] = session
    assert rollouts.playing == 1
    rollouts.ended(await session.run())
    assert rollouts.playing == 0
    for rollout_id in (session.rollout_id, "nobody", "nobody"):
        with pytest.raises((ConflictError, NotFoundError)):
            await rollouts.complete(rollout_id, ask(rollout_id))
    told = rollouts.news()
    ((outcome, seconds),) = told.ended
    assert outcome == "completed" and seconds > 0
    assert told.refused == {"conflict": 1, "not_found": 2}
    assert rollouts.news() == ForeignNews()
    await rollouts.close()


@pytest.mark.parametrize(
    ("stop", "error", "outcome"),
    [
        *((stop, None, "completed") for stop in ("stop", "length", "max_turns", "max_tokens")),
        ("deadline", "session_timeout: the session took longer than 5 s", "deadline"),
        ("cancelled", None, "cancelled"),
        ("error", describe(RemoteError("it answered 400")), "remote"),
        ("error", describe(RemoteDied("it went away")), "remote_died"),
        ("error", describe(EngineError("remote: not at all")), "error"),
        ("error", describe(RuntimeError("a bug")), "error"),
        ("error", None, "error"),
    ],
)
def test_an_outcome_says_whose_failure_it_was(stop: Any, error: str | None, outcome: str):
    assert outcome_of(Trajectory(SessionKey("r", "t", "r/t", 0), [], stop, [], error=error)) == outcome
    assert outcome in LABELS["foreign_outcome"].values


def test_every_refusal_has_its_series():
    assert {refusal.category for refusal in foreign_rollouts._REFUSALS} == set(LABELS["foreign_refusal"].values)


async def test_a_worker_hands_in_what_became_of_its_sessions_at_servers_and_of_no_others():
    made = SessionWorker("w", replace(settings(foreign=None), model=str(MODEL)))
    made._engine = SimpleNamespace(forget=lambda _: None, close=lambda: None, resends=0, replicas={})
    here = replace(spec(), remote=None, environment="no_such_module:Environment")
    for played, told in ((here, []), (spec(), [("error", 0.0)])):
        await made.start(played, [assignment()])
        collected = await made.collect(10.0)
        assert (len(collected.summaries), collected.foreign.ended, collected.stats.foreign) == (1, told, 0)
    assert (await made.collect(0.0)).foreign == ForeignNews()
    await made.close()


async def test_a_cluster_without_a_gateway_plays_nothing_elsewhere(chat):
    rollouts = ForeignRollouts("w", settings(foreign=None))
    with pytest.raises(RefusedError, match=r"gateway\.enabled"):
        rollouts.session(spec(), assignment(), scripted(chat), chat, None)


async def test_a_worker_keeps_room_for_its_controller(chat):
    peer = Peer("A", chat)
    made = settings(max_sessions=1)
    rollouts = ForeignRollouts("w", made, transport=peer.transport)
    engine = scripted(chat, *TURNS, delay=0.2)
    sessions = [rollouts.session(spec(), assignment(f"t{n}"), engine, chat, None) for n in range(5)]
    for session in sessions:
        session._tools.set_result([])
        session._deadline = asyncio.get_running_loop().time() + 60
    calls = [asyncio.create_task(rollouts.complete(s.rollout_id, ask(s.rollout_id))) for s in sessions]
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(answer, UnavailableError) for answer in found) == 5 - made.foreign_calls
    assert rollouts.news().refused["unavailable"] == 5 - made.foreign_calls
    for session in sessions:
        session._close()


async def test_a_stalled_run_holds_its_own_connections_alone(chat):
    peers = {"stalled": Peer("A", chat), "other": Peer("A", chat)}

    async def never(*_: Any) -> Any:
        await asyncio.sleep(60)

    peers["stalled"].play = never
    rollouts = ForeignRollouts("w", settings())
    running = []
    for number in range(8):
        rollouts._transport = peers["stalled"].transport
        session = rollouts.session(spec("stalled"), assignment(f"t{number}"), scripted(chat), chat, None)
        running.append(asyncio.create_task(session.run()))
    await asyncio.sleep(0.05)
    rollouts._transport = peers["other"].transport
    session = rollouts.session(spec("other"), assignment(), scripted(chat, *TURNS), chat, None)
    peers["other"].sessions[session.rollout_id] = session
    async with asyncio.timeout(10):
        assert (await session.run()).stop_reason == "stop"
    assert rollouts.slots("stalled") is not rollouts.slots("other")
    for task in running:
        task.cancel()
    assert {t.stop_reason for t in await asyncio.gather(*running)} == {"cancelled"}
    await rollouts.close()


def test_a_rollouts_key_opens_nothing_else():
    secret = derived_secret(b"secret", "remote rollouts")
    key = session_key(secret, "abc")
    assert session_of(secret, key) == "abc" and session_of(b"secret", key) is None
    assert derived_secret(b"", "remote rollouts") == b""


# Runs


@pytest.mark.parametrize(
    ("url", "foreign", "problem"),
    [
        ("http://127.0.0.1:9000", FOREIGN, None),
        ("http://127.0.0.1:9000", None, r"gateway\.enabled"),
        ("http://10.1.2.3:9000", FOREIGN, r"remote_rollout\.allowed_hosts"),
        ("http://169.254.169.254", FOREIGN, r"remote_rollout\.allowed_hosts"),
        ("http://10.1.2.3", ForeignSettings("http://c", SECRET, True, ("10.0.0.0/8",)), None),
        ("http://10.1.2.3", ForeignSettings("http://10.1.1.1", SECRET, False, ("10.0.0.0/8",)), None),
        ("http://10.1.2.3", ForeignSettings("http://127.0.0.1", SECRET, False, ("10.0.0.0/8",)), r"public_url"),
        ("http://10.1.2.3", ForeignSettings("http://127.0.0.1", SECRET, True, (), ("http://10.1.2.3",)), None),
    ],
)
def test_where_a_run_may_be_played(url: str, foreign: ForeignSettings | None, problem: str | None):
    where = EnvironmentRef(remote=url, generation="A")
    if problem is None:
        check_remote(where, foreign)
    else:
        with pytest.raises(RefusedError, match=problem):
            check_remote(where, foreign)


def test_an_ordinary_run_needs_no_leave():
    check_remote(EnvironmentRef(path="m:E"), None)


async def test_a_run_at_a_server_is_journaled_and_comes_back(tmp_path):
    service = Service(tmp_path / "j")
    service.runs = RunService(service.store, DEFAULTS, FOREIGN)
    where = EnvironmentRef(remote="http://127.0.0.1:9000/", generation="A1", path="m:E", args={"x": 1})
    info = await service.runs.create(RunRequest(name="r", environment=where))
    assert info.environment == "http://127.0.0.1:9000"
    before = service.runs.spec("r")
    assert before.remote == RemoteSpec("http://127.0.0.1:9000", "A1") and before.environment == "m:E"
    await service.close()
    again = Service(tmp_path / "j")
    assert again.runs.spec("r") == before
    await again.close()


async def test_a_run_at_a_forbidden_address_is_refused_before_anything_is_written(tmp_path):
    service = Service(tmp_path / "j")
    service.runs = RunService(service.store, DEFAULTS, FOREIGN)
    with pytest.raises(RefusedError):
        await service.runs.create(
            RunRequest(name="r", environment=EnvironmentRef(remote="http://10.0.0.1", generation="B"))
        )
    assert service.runs.runs() == []
    await service.close()


# Guests among the scheduler's runs


def group(run: str, size: int, task_id: str = "t") -> QueuedGroup:
    task = Task(task_id=task_id, messages=[{"role": "user", "content": "x"}])
    return QueuedGroup(f"{run}/{task_id}", task, range(size), 0.0)


def guests(*names: str, capacity: int = 300) -> Scheduler:
    made = Scheduler(1)
    made.add_worker("w", capacity)
    for name in names:
        made.add_run(name, guest=True)
        made.queue(name, group(name, 400))
        made.assign()
    return made


def test_stalled_guests_leave_places_to_every_other_run():
    made = guests()
    made.add_run("own")
    made.queue("own", group("own", 1))
    made.assign()
    for name in "abc":
        made.add_run(name, guest=True)
        made.queue(name, group(name, 400))
        made.assign()
    held = [made.counts(name).running for name in "abc"]
    assert held == [160, 32, 7]
    made.queue("own", group("own", 400, "more"))
    made.assign()
    assert made.counts("own").running == 300 - sum(held)
    made.audit()


def test_an_only_guest_has_nearly_all_places_of_guests_and_keeps_some_for_the_next():
    made = guests("a", "b", "c")
    held = [made.counts(name).running for name in "abc"]
    assert held == [191, 8, 1]
    made.add_run("own")
    made.queue("own", group("own", 400))
    made.assign()
    assert made.counts("own").running == 300 - sum(held)
    made.audit()


def test_an_only_guest_is_as_many_sessions_as_a_worker_plays():
    settings = WorkerSettings(str(MODEL), None, "auto", {}, "app", "engine", 4, {}, 256)
    made = guests("a", capacity=settings.capacity)
    assert 0.95 * settings.max_sessions <= made.counts("a").running <= settings.max_sessions


def test_a_guest_that_is_no_longer_alone_gives_back_what_is_over_its_part():
    made = guests("a")
    made.queue("a", group("a", 400, "more"))
    made.add_run("own")
    made.queue("own", group("own", 400))
    made.assign()
    assert (made.counts("a").running, made.counts("own").running) == (191, 109)
    for index in range(191):
        made.finished("w", f"a/t/{index}", 1, retryable=False)
        made.assign()
    assert (made.counts("a").running, made.counts("own").running) == (150, 150), "their shares"
    made.audit()


def test_runs_that_have_nothing_to_play_hold_no_guest_back():
    made = Scheduler(1)
    made.add_worker("w", 300)
    for name in ("idle", "paused", "done"):
        made.add_run(name)
    made.queue("paused", group("paused", 10))
    made.pause("paused", True)
    made.queue("done", group("done", 1))
    made.assign()
    made.finished("w", "done/t/0", 1, retryable=False)
    made.add_run("a", guest=True)
    made.queue("a", group("a", 400))
    made.assign()
    assert made.counts("a").running == 191
    made.audit()


@pytest.mark.parametrize("capacity", [2, 3, 4, 10, 15, 20, 40])
def test_guests_leave_a_third_to_the_others_however_few_places_there_are(capacity: int):
    made = guests("a", "b", capacity=capacity)
    first, second = (made.counts(name).running for name in "ab")
    assert first > 0 and first + second <= 2 * capacity / 3
    assert second > 0 or capacity < 10, "one place is kept for a guest to come"
    made.audit()


def test_a_single_guest_always_gets_a_place():
    made = guests("a", capacity=1)
    assert made.counts("a").running == 1
    made.audit()


# The request


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "needs path"),
        ({"remote": "http://h"}, "needs generation"),
        ({"remote": "http://h", "generation": "C"}, "generation"),
        ({"remote": "ftp://h", "generation": "A"}, "must be http"),
        ({"remote": "http://u:p@h", "generation": "A"}, "user or password"),
        ({"remote": "http://h?x=1", "generation": "A"}, "without"),
        ({"remote": "http://h:99999", "generation": "A"}, "must be http"),
        ({"remote": "http://h\n", "generation": "A", "args": {"x": 1}}, "args are of"),
        ({"remote": "http://h", "generation": "A", "key_env": "HOME"}, "key_env"),
        ({"path": "m:E", "generation": "A"}, "give remote as well"),
        ({"path": "m:E", "key_env": "ROLLOUT_REMOTE_K"}, "give remote as well"),
    ],
)
def test_environments_that_make_no_sense_are_refused(fields: dict[str, Any], problem: str):
    with pytest.raises(ValidationError, match=problem):
        EnvironmentRef(**fields)


def test_environments_that_make_sense():
    assert EnvironmentRef(path="m:E").name == "m:E"
    made = EnvironmentRef(remote="https://h:1/x/", generation="B", key_env="ROLLOUT_REMOTE_K")
    assert made.remote == made.name == "https://h:1/x"
    assert EnvironmentRef.model_validate_json(made.model_dump_json()) == made
