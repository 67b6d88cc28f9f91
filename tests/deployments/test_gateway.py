"""The gateway's HTTP over a real run service, and the HTTP client against it, in one process without Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments import gateway
from deployments.gateway import GatewaySpec, build_gateway_app, make_app, say_if_open
from rollout import AsyncRolloutClient, Batch, NoBatch, Task
from rollout.access import AccessKey, AccessSettings, hash_key
from rollout.api import LeaseRequest, RunInfo
from rollout.errors import (
    ApiError,
    BusyError,
    ConflictError,
    NotFoundError,
    RefusedError,
    RolloutError,
    UnavailableError,
)
from rollout.http_backend import LEASE_HEADER, HttpBackend
from rollout.weights import ReplicaWeights, WeightReport
from tests.actors.service import Service, ids_of, tasks

MAX_BODY = 50_000


class Direct:
    """A backend over a service in this process, as RayBackend is over the controller."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.create_run, self.submit = service.runs.create, service.runs.submit
        self.cancel, self.forget, self.watch = service.runs.cancel, service.runs.forget, service.runs.watch
        self.pause = service.runs.pause
        self.lease, self.fetch = service.delivery.lease, service.delivery.fetch
        self.acknowledge, self.extend = service.delivery.acknowledge, service.delivery.extend
        self.release = service.delivery.release
        self.failures: list[Exception] = []
        self.replicas = {"a": {"health": "healthy", "version": 3, "reason": None}}

    async def run_info(self, run: str) -> RunInfo:
        if self.failures:
            raise self.failures.pop(0)
        return self.service.runs.info(run)

    async def runs(self) -> list[RunInfo]:
        return self.service.runs.runs()

    async def weights(self) -> dict[str, Any]:
        if self.failures:
            raise self.failures.pop(0)
        return {"version": 3, "replicas": self.replicas}

    async def update_weights(self, source: Any, version: int | None) -> WeightReport:
        if source.path == "/bad":
            raise RefusedError("the weights were refused", "source")
        return WeightReport(version or 4, 0.5, 20.0, [ReplicaWeights("a", version or 4)], {"b": "slow"})


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    made = Service(tmp_path / "journal.sqlite")
    yield made
    await made.close()


@pytest.fixture
def backend(service: Service) -> Direct:
    return Direct(service)


@pytest.fixture
def transport(backend: Direct) -> httpx.ASGITransport:
    return httpx.ASGITransport(make_app(lambda: backend, MAX_BODY), raise_app_exceptions=False)  # type: ignore[arg-type]


@pytest.fixture
async def http(transport: httpx.ASGITransport) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


@pytest.fixture
async def client(transport: httpx.ASGITransport) -> AsyncIterator[AsyncRolloutClient]:
    async with AsyncRolloutClient(HttpBackend("http://gateway", transport=transport, patience=2.0)) as made:
        yield made


# The client over HTTP


async def test_tasks_in_batches_out(client: AsyncRolloutClient, service: Service):
    run = (await client.create_run(name="r")).run
    assert (await client.submit(run, tasks(3))).accepted == 3
    assert (await client.submit(run, [task.model_dump() for task in tasks(4)])).duplicates == 3
    await service.work()
    batch = await client.lease(run, 2)
    assert isinstance(batch, Batch) and batch.groups == ["r/t0", "r/t1"]
    assert ids_of(batch.table) == ["r/t0/0", "r/t0/1", "r/t1/0", "r/t1/1"]
    assert (await client.fetch(batch.lease_id)).table.equals(batch.table)
    assert await client.extend(batch, 100) > 0
    assert (await client.acknowledge(batch)).groups == 2
    await client.release((await client.lease(run, 2)).lease_id)
    seen = [batch.groups async for batch in client.batches(run, 5)]
    assert seen == [["r/t2", "r/t3"]]
    assert (await client.run_info(run)).finished
    assert [info.run for info in await client.runs()] == ["r"]
    await client.forget(run)
    assert await client.runs() == []


async def test_a_block_that_raises_gives_the_batch_back(client: AsyncRolloutClient, service: Service):
    run = (await client.create_run()).run
    await client.submit(run, tasks(1))
    await service.work()
    batch = await client.lease(run, 1)
    assert isinstance(batch, Batch)
    with pytest.raises(ZeroDivisionError):
        async with client.using(batch):
            raise ZeroDivisionError
    async with client.using(await client.lease(run, 1)) as again:
        assert again.groups == batch.groups
    assert (await client.run_info(run)).delivered == 1


async def test_one_call_for_the_simple_case(client: AsyncRolloutClient, service: Service):
    heard: list[RunInfo] = []
    rolled = asyncio.create_task(client.rollout(tasks(3), on_progress=heard.append, group_size=4))
    while not rolled.done():
        await service.work()
        await asyncio.sleep(0.01)
    table = await rolled
    assert table.num_rows == 12 and heard[-1].finished
    assert service.runs.runs() == [], "the run is forgotten"
    with pytest.raises(RolloutError, match="no tasks"):
        await client.rollout([])


async def test_waiting_in_vain_says_for_what(client: AsyncRolloutClient):
    run = (await client.create_run(max_staleness=0, batch_groups=1)).run
    await client.submit(run, tasks(2))
    nothing = await client.lease(run, 1, timeout=0.05)
    assert isinstance(nothing, NoBatch) and not nothing.finished
    with pytest.raises(RolloutError, match=r"no batch of run .* within 0.05 s: .*2 waiting"):
        async for _ in client.batches(run, 1, timeout=0.05):
            raise AssertionError


async def test_errors_keep_their_kind_and_field(client: AsyncRolloutClient):
    with pytest.raises(NotFoundError, match="there is no run 'x'"):
        await client.run_info("x")
    run = (await client.create_run()).run
    await client.submit(run, tasks(1))
    with pytest.raises(ConflictError) as conflict:
        await client.submit(run, [Task(task_id="t0", messages=[{"role": "user", "content": "other"}])])
    assert conflict.value.field == "tasks.0.task_id"
    with pytest.raises(RefusedError, match="refused"):
        await client.update_weights("/bad")


async def test_weights(client: AsyncRolloutClient):
    report = await client.update_weights("/good", 9)
    assert (report.version, report.failed) == (9, {"b": "slow"})
    assert report.replicas[0] == ReplicaWeights("a", 9)
    assert (await client.weights())["version"] == 3


async def test_a_cluster_that_is_coming_back_is_waited_for(client: AsyncRolloutClient, backend: Direct):
    run = (await client.create_run()).run
    backend.failures = [UnavailableError("starting"), BusyError("full", 0.01)]
    assert (await client.run_info(run)).run == run
    backend.failures = [UnavailableError("starting")] * 100
    with pytest.raises(UnavailableError, match="starting"):
        await client.run_info(run)


async def test_nobody_at_the_address():
    async with AsyncRolloutClient(HttpBackend("http://127.0.0.1:9", patience=0.1)) as nobody:
        with pytest.raises(UnavailableError, match=r"does not answer.*is the cluster up"):
            await nobody.runs()


async def test_events_until_the_end(client: AsyncRolloutClient, service: Service):
    run = (await client.create_run()).run
    await client.submit(run, tasks(1))
    seen: list[RunInfo] = []

    async def listen() -> None:
        seen.extend([info async for info in client.events(run, 0.05)])

    listener = asyncio.create_task(listen())
    await service.work()
    async for _ in client.batches(run, 1):
        pass
    await asyncio.wait_for(listener, 5)
    assert seen[-1].finished


# The wire


async def test_a_bad_field_is_named(http: httpx.AsyncClient):
    told = await http.post("/v1/runs", json={"group_size": 0, "max_stalenes": 1})
    assert told.status_code == 422
    error = told.json()["error"]
    assert (error["type"], error["field"]) == ("invalid", "group_size")
    assert "max_stalenes: Extra inputs" in error["message"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b'{"tasks": []}', b'{"tasks": [{"task_id": 3}]}']
)
async def test_bodies_that_are_nothing_are_422(http: httpx.AsyncClient, content: bytes):
    await http.post("/v1/runs", json={"name": "r"})
    told = await http.post("/v1/runs/r/tasks", content=content)
    assert told.status_code == 422 and told.json()["error"]["message"]


async def test_bad_lines_are_named_and_nothing_is_taken(http: httpx.AsyncClient, service: Service):
    await http.post("/v1/runs", json={"name": "r"})
    lines = [tasks(1)[0].model_dump_json(), "{", '{"task_id": "b", "message": []}']
    told = await http.post(
        "/v1/runs/r/tasks", content="\n".join(lines), headers={"content-type": "application/x-ndjson"}
    )
    assert told.status_code == 422
    message = told.json()["error"]["message"]
    assert "line 2: not JSON" in message and "line 3:" in message and "message: unknown field" in message
    assert service.runs.info("r").submitted == 0
    good = "\n\n".join(task.model_dump_json() for task in tasks(3))
    told = await http.post("/v1/runs/r/tasks", content=good, headers={"content-type": "application/x-ndjson"})
    assert told.json() == {"accepted": 3, "duplicates": 0}


async def test_too_large_a_body_is_not_read(http: httpx.AsyncClient):
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1_000

    for content in (b"x" * (MAX_BODY + 1), pieces()):
        told = await http.post("/v1/runs/r/tasks", content=content)
        assert told.status_code == 413 and "gateway.max_body_mb" in told.json()["error"]["message"]


async def test_retry_after(http: httpx.AsyncClient, backend: Direct):
    backend.failures = [BusyError("full", 7.0)]
    told = await http.get("/v1/runs/r")
    assert (told.status_code, told.headers["retry-after"]) == (429, "7")
    backend.failures = [UnavailableError("starting")]
    assert (await http.get("/v1/runs/r")).headers["retry-after"] == "1"


async def test_what_is_unexpected_is_told_as_such(http: httpx.AsyncClient, backend: Direct):
    backend.failures = [KeyError("secret")]
    told = await http.get("/v1/runs/r")
    assert told.status_code == 500 and told.json()["error"]["type"] == "internal"
    assert "Traceback" not in told.text


async def test_a_lease_on_the_wire(http: httpx.AsyncClient, service: Service):
    await http.post("/v1/runs", json={"name": "r"})
    await http.post("/v1/runs/r/tasks", json={"tasks": [tasks(1)[0].model_dump()]})
    nothing = (await http.post("/v1/runs/r/leases", json={"groups": 1, "timeout": 0})).json()
    assert nothing["finished"] is False and nothing["waiting"] == 1 and nothing["reason"]
    await service.work()
    told = await http.post("/v1/runs/r/leases", json={"groups": 1, "timeout": 0})
    assert told.headers["content-type"].startswith("application/vnd.apache.arrow.stream")
    about = json.loads(told.headers[LEASE_HEADER])
    assert about["groups"] == ["r/t0"] and about["run"] == "r"
    assert (await http.post("/v1/runs/r/leases", json={"groups": 0})).status_code == 422
    assert (await http.post(f"/v1/leases/{about['lease_id']}/extend", json={"ttl": -1})).status_code == 422
    assert (await http.post(f"/v1/leases/{about['lease_id']}/acknowledge")).json()["groups"] == 1


async def test_server_sent_events(http: httpx.AsyncClient, service: Service):
    await http.post("/v1/runs", json={"name": "r"})
    await service.runs.submit("r", tasks(1))
    await service.work()
    batch = await service.delivery.lease("r", LeaseRequest(groups=1, timeout=0))
    await service.delivery.acknowledge(batch.lease_id)
    told = await http.get("/v1/runs/r/events")
    assert told.headers["content-type"].startswith("text/event-stream")
    first, *_, last = [part for part in told.text.split("\n\n") if part]
    assert first.startswith("event: run\ndata: ") and json.loads(first.split("data: ")[1])["delivered"] == 1
    assert last == "data: [DONE]"
    assert (await http.get("/v1/runs/x/events")).status_code == 404


async def test_health_and_document(http: httpx.AsyncClient):
    assert (await http.get("/health")).json() == {"status": "ok"}
    assert (await http.get("/ready")).json() == {"status": "ready", "policy_version": 3, "replicas": 1}
    document = (await http.get("/openapi.json")).json()
    assert "/v1/runs/{run}/leases" in document["paths"]
    assert "requestBody" in document["paths"]["/v1/runs"]["post"]


async def test_a_cluster_that_starts_is_not_ready_and_says_so(http: httpx.AsyncClient, backend: Direct):
    for path in ("/ready", "/v1/weights"):
        backend.failures = [UnavailableError("the cluster is starting")]
        told = await http.get(path)
        assert (told.status_code, told.headers["retry-after"]) == (503, "1")
        assert told.json()["error"]["message"] == "the cluster is starting"
    assert (await http.get("/health")).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("replicas", "reason"),
    [
        ({}, "none has answered yet"),
        ({"a": {"health": "suspect", "version": 3, "reason": "it does not answer"}}, "it does not answer"),
        ({"a": {"health": "stale", "version": 2, "reason": None}}, "none has answered yet"),
        ({"a": {"health": "stale", "version": None, "reason": None}}, "none has answered yet"),
    ],
)
async def test_a_cluster_without_an_engine_is_not_ready(
    http: httpx.AsyncClient, backend: Direct, replicas: dict[str, Any], reason: str
):
    backend.replicas = replicas
    told = await http.get("/ready")
    assert told.status_code == 503
    assert told.json()["error"]["message"] == f"no engine replica carries the current weights: {reason}"


async def test_engines_that_are_ahead_are_ready_and_others_do_not_count(http: httpx.AsyncClient, backend: Direct):
    backend.replicas = {
        "ahead": {"health": "stale", "version": 4, "reason": None},
        "behind": {"health": "stale", "version": 2, "reason": None},
    }
    assert (await http.get("/ready")).json() == {"status": "ready", "policy_version": 3, "replicas": 1}


async def test_a_controller_that_is_silent_is_not_ready(
    http: httpx.AsyncClient, backend: Direct, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gateway, "READY_SECONDS", 0.05)
    monkeypatch.setattr(backend, "weights", lambda: asyncio.sleep(60))
    told = await http.get("/ready")
    assert (told.status_code, told.headers["retry-after"]) == (503, "1")
    assert told.json()["error"]["message"] == "the controller did not answer within 0.05 s"


async def test_a_gateways_own_backend_does_not_wait_to_look(backend: Direct, monkeypatch: pytest.MonkeyPatch):
    from ray import serve

    made: list[Any] = []
    asked: dict[str, Any] = {}

    def connect(cluster: str, **options: Any) -> Direct:
        asked.update(options, cluster=cluster)
        return backend

    # Serve calls what `ingress` is given in the gateway's own process.
    monkeypatch.setattr(serve, "ingress", lambda make: lambda cls: made.append(make) or cls)
    monkeypatch.setattr(serve, "deployment", lambda **_: lambda cls: type("Bound", (), {"bind": lambda: cls}))
    monkeypatch.setattr(gateway, "RayBackend", connect)
    build_gateway_app(GatewaySpec("c", MAX_BODY, AccessSettings()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(made[0]()), base_url="http://gateway") as http:
        assert (await http.get("/ready")).status_code == 200
    assert asked["cluster"] == "c" and asked["looks_wait"] is False and asked["patience"] == gateway.PATIENCE_S


def test_statuses_have_their_errors():
    for kind in (NotFoundError, ConflictError, RefusedError, UnavailableError):
        assert issubclass(kind, ApiError)


def test_the_log_says_that_everybody_of_the_machine_may_come(caplog: pytest.LogCaptureFixture):
    say_if_open(GatewaySpec("c", MAX_BODY, AccessSettings(), engine="http://127.0.0.1:8800"))
    (line,) = caplog.messages
    assert caplog.records[0].levelname == "WARNING" and "\n" not in line
    assert line.startswith("http://127.0.0.1:8800 needs no key") and "every user" in line and "access.keys" in line
    caplog.clear()
    keys = (AccessKey("app", hash_key("k"), frozenset({"serve"})),)
    say_if_open(GatewaySpec("c", MAX_BODY, AccessSettings(keys=keys), engine="http://127.0.0.1:8800"))
    assert caplog.messages == []
