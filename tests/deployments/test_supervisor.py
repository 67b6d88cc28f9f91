"""The supervisor over doubles of Ray's actors: order, failures, names that are taken, and what it takes for dead."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.serve.schema import DeploymentDetails, ServeInstanceDetails

from actors.front_config import FrontSettings
from actors.messages import ControllerSettings, WorkerSettings
from deployments import supervisor
from deployments.supervisor import Supervisor, SupervisorSpec
from rollout.api import RunRequest
from rollout.errors import EngineTimeout, RolloutError, UnavailableError

WORKER = WorkerSettings("model", None, "auto", {}, "engine", "engine", 4, {}, 8)
SETTINGS = ControllerSettings(WORKER, 1, 3, None, 5.0, "/nowhere/journal.sqlite", True, RunRequest())
FRONT = FrontSettings("127.0.0.1", 8800, "127.0.0.1:8000", "")
SERVE_TARGET = supervisor.serve_target


class FakeRay:
    """A TEST DOUBLE of Ray: actors that write down what they are told. `answers`: what a method gives or raises."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.options: dict[str, dict[str, Any]] = {}
        self.arguments: dict[str, tuple[Any, ...]] = {}
        self.alive: dict[str, Any] = {}
        self.taken: set[str] = set()
        self.answers: dict[str, Any] = {"Controller.status": {"ready": True}}

    def remote(self, cls: type) -> Any:
        fake = self

        class Maker:
            def options(self, **options: Any) -> Any:
                self.kept = options
                return self

            def remote(self, *arguments: Any) -> Any:
                actor = FakeActor(fake, cls.__name__)
                fake.said.append(cls.__name__)
                fake.options[cls.__name__], fake.arguments[cls.__name__] = self.kept, arguments
                fake.alive[cls.__name__] = actor
                return actor

        return Maker()

    def get_actor(self, name: str, namespace: str) -> Any:
        assert namespace == "demo"
        if name not in self.taken:
            raise ValueError(name)
        return object()

    def kill(self, actor: Any) -> None:
        self.said.append(f"kill {actor.name}")
        del self.alive[actor.name]


class FakeActor:
    """A TEST DOUBLE of an actor handle."""

    def __init__(self, fake: FakeRay, name: str) -> None:
        self.fake, self.name = fake, name

    def __getattr__(self, method: str) -> Any:
        async def call(*arguments: Any) -> Any:
            self.fake.said.append(f"{self.name}.{method}")
            self.fake.arguments[f"{self.name}.{method}"] = arguments
            answer = self.fake.answers.get(f"{self.name}.{method}")
            if isinstance(answer, BaseException):
                raise answer
            if answer == "silence":
                await asyncio.sleep(3600)
            return answer

        return type("Method", (), {"remote": staticmethod(call)})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    made = FakeRay()
    for name in ("remote", "get_actor", "kill"):
        monkeypatch.setattr(ray, name, getattr(made, name))
    monkeypatch.setattr("actors.front.make_folder", lambda: "/tmp/folder")

    async def unknown(app: str, deployment: str) -> None:
        return None

    monkeypatch.setattr(supervisor, "serve_target", unknown)
    yield made


async def started(front: FrontSettings | None = FRONT) -> Supervisor:
    made = Supervisor.__new__(Supervisor)
    await made.__init__(SupervisorSpec("demo", SETTINGS, 2, front))  # type: ignore[misc]
    return made


async def ended(made: Supervisor) -> None:
    await made.close()
    # The coroutine of Serve's destructor is for Serve alone.
    made.__class__ = type("Ended", (), {})


async def test_it_starts_everything_on_the_head_and_waits_for_the_engines_last(fake: FakeRay):
    made = await started()
    assert fake.said == [
        "LoadingBoard",
        "Controller",
        "Front",
        "Front.start",
        "Controller.spawn_workers",
        "Controller.connect",
    ]
    for name, options in fake.options.items():
        assert options["namespace"] == "demo" and options["num_cpus"] == 0, name
        assert options["resources"] == {"node:__internal_head__": 0.001}
        assert options["max_restarts"] == -1
        assert "lifetime" not in options, "what is detached outlives its owner"
    assert fake.options["Controller"]["max_concurrency"] == supervisor.CALLS
    assert fake.options["LoadingBoard"]["max_concurrency"] > 1000
    assert fake.arguments["LoadingBoard"] == (2,) and fake.arguments["Controller"] == (SETTINGS,)
    settings, controller, namespace = fake.arguments["Front"]
    assert (settings.folder, settings.gateway, controller, namespace) == (
        "/tmp/folder",
        "127.0.0.1:8000",
        "controller",
        "demo",
    )
    await ended(made)


async def test_the_board_hears_how_many_engines_serve_is_to_run_whatever_fails_in_between(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    targets: list[Any] = [8, UnavailableError("no controller"), UnavailableError("no controller"), None, 0, 16, 16]
    asked: list[tuple[str, str]] = []
    heard: list[int] = []

    async def target(app: str, deployment: str) -> Any:
        asked.append((app, deployment))
        if len(asked) > 1 and "LoadingBoard.expect" in fake.arguments:
            heard.extend(fake.arguments.pop("LoadingBoard.expect"))
        if not targets:
            await asyncio.sleep(3600)
        answer = targets.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(supervisor, "serve_target", target)
    monkeypatch.setattr(supervisor, "TARGET_PERIOD_SECONDS", 0.0)
    made = await started()
    async with asyncio.timeout(5):
        while len(asked) < 8:
            await asyncio.sleep(0.001)
    assert heard == [8, 16, 16], "also what is no news: Ray may have started the board anew"
    assert set(asked) == {("engine", "engine")}
    assert caplog.text.count("no controller") == 1, "once for each time that it fails"
    following = made._following
    await ended(made)
    await asyncio.sleep(0)
    assert following is not None and following.cancelled()


async def test_serves_own_answer_is_read(fake: FakeRay, monkeypatch: pytest.MonkeyPatch):
    details = {"applications": {"engine": {"deployments": {"engine": {"target_num_replicas": 4, "replicas": []}}}}}
    fake.answers["ServeController.get_serve_instance_details"] = details
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: FakeActor(fake, "ServeController"))
    assert await SERVE_TARGET("engine", "engine") == 4
    assert await SERVE_TARGET("engine", "other") is None and await SERVE_TARGET("other", "engine") is None


def test_serve_still_names_the_field_that_is_read():
    assert "target_num_replicas" in DeploymentDetails.model_fields
    assert "applications" in ServeInstanceDetails.model_fields


async def test_without_a_gateway_there_is_no_front(fake: FakeRay):
    made = await started(None)
    assert "Front" not in fake.said
    await ended(made)


async def test_a_failed_start_leaves_nothing_and_says_why(fake: FakeRay):
    fake.answers["Controller.connect"] = EngineTimeout("no engine replica became ready within 5 s")
    with pytest.raises(EngineTimeout, match="no engine replica became ready"):
        await started()
    assert fake.alive == {}


async def test_a_failure_inside_rays_wrapping_is_unwrapped(fake: FakeRay):
    class Wrapped(Exception):
        cause = RolloutError("the front cannot listen at 127.0.0.1:8800; is the port taken?")

    fake.answers["Front.start"] = Wrapped("a long stack")
    with pytest.raises(RolloutError, match="is the port taken"):
        await started()
    assert fake.alive == {}


async def test_a_start_that_hangs_ends_in_time(fake: FakeRay, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "FRONT_SECONDS", 0.05)
    fake.answers["Front.start"] = "silence"
    with pytest.raises(UnavailableError, match=r"the front did not start within 0\.05 s"):
        await started()
    assert fake.alive == {}


async def test_it_waits_for_the_end_of_the_last_one(fake: FakeRay):
    fake.taken = {"controller", "loading-board"}
    asyncio.get_running_loop().call_later(0.6, fake.taken.clear)
    made = await started()
    assert "Controller.connect" in fake.said
    await ended(made)


async def test_a_cluster_of_somebody_else_is_not_touched(fake: FakeRay, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "FREE_SECONDS", 0.05)
    fake.taken = {"controller"}
    with pytest.raises(UnavailableError, match=r"has a controller already; .*rollout down"):
        await started()
    assert fake.said == []


async def test_health_is_the_controllers(fake: FakeRay, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "ASK_SECONDS", 0.05)
    made = await started()
    await made.check_health()
    fake.answers["Controller.status"] = "silence"
    await made.check_health()
    monkeypatch.setattr(supervisor, "SILENT_SECONDS", 0.05)
    with pytest.raises(UnavailableError, match="has not answered for"):
        await made.check_health()
    # It comes back: Ray started it again.
    fake.answers["Controller.status"] = {"ready": True}
    await made.check_health()
    await ended(made)


@pytest.mark.parametrize("answer", ["unready", "broken"])
async def test_a_controller_that_answers_and_never_becomes_ready_is_dead(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch, answer: str
):
    made = await started()
    if answer == "unready":
        fake.answers["Controller.status"] = {"ready": False}
    else:
        fake.answers["Controller.weights"] = RolloutError("the controller failed: a loop of it")
    await made.check_health()
    made._ready -= SETTINGS.start_timeout + supervisor.SILENT_SECONDS
    with pytest.raises(UnavailableError, match="has not been ready for"):
        await made.check_health()
    await ended(made)


async def test_the_end_is_orderly_and_never_hangs(fake: FakeRay, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.05)
    made = await started()
    fake.said.clear()
    fake.answers["Front.stop"] = "silence"
    fake.answers["Controller.stop"] = RuntimeError("it is gone")
    await made.close()
    assert fake.said == [
        "Front.stop",
        "Controller.stop",
        "kill LoadingBoard",
        "kill Controller",
        "kill Front",
    ]
    await made.close()
    assert fake.alive == {}
    await ended(made)


def test_the_application_is_one_replica_on_the_head():
    app = supervisor.build_supervisor_app(SupervisorSpec("demo", SETTINGS, 1, FRONT))
    deployment = app._bound_deployment
    assert deployment.name == "supervisor"
    assert deployment.num_replicas == 1
    assert deployment.ray_actor_options["num_cpus"] == 0
    assert deployment.ray_actor_options["resources"] == {"node:__internal_head__": 0.001}


def test_secrets_are_not_in_its_repr():
    spec = SupervisorSpec("demo", SETTINGS, 1)
    assert "journal.sqlite" not in repr(spec)
