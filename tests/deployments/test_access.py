"""The middleware over a small application, over the gateway, and behind a real server."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette._utils import get_route_path
from starlette.middleware.cors import CORSMiddleware

from deployments.access import AccessMiddleware, install, route_path
from deployments.gateway import make_app
from deployments.routes import errors
from rollout.access import AccessKey, AccessSettings, Gate, hash_key
from rollout.access_limits import Bounds
from rollout.access_paths import needed_scope
from rollout.correlation import correlation_id

SERVE, ADMIN = "k" * 40 + "-serve", "k" * 40 + "-admin"
KEYS = (
    AccessKey("ui", hash_key(SERVE), frozenset(["serve"])),
    AccessKey("ops", hash_key(ADMIN), frozenset(["admin"])),
)
AS_SERVE, AS_ADMIN = {"authorization": f"Bearer {SERVE}"}, {"x-api-key": ADMIN}
ORIGIN = "https://ui.example.com"
DEADLINE_S = 5.0


class Small:
    """An application with routes under paths of the table, and what it has seen."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.waiting = asyncio.Event()
        self.go_on = asyncio.Event()
        self.app = FastAPI()
        errors.install(self.app)

        @self.app.get("/health")
        async def health() -> str:
            return "ok"

        @self.app.get("/v1/models")
        async def models(request: Request) -> str:
            self.seen.append({**request.scope["state"], "var": correlation_id.get()})
            return "models"

        @self.app.post("/v1/chat/completions")
        async def chat(request: Request) -> int:
            return len(await request.body())

        @self.app.post("/v1/completions")
        async def typed(body: dict[str, Any]) -> int:
            return len(body)

        @self.app.post("/v1/messages")
        async def stream() -> StreamingResponse:
            async def pieces() -> AsyncIterator[bytes]:
                yield b"first,"
                self.waiting.set()
                await self.go_on.wait()
                yield b"last"

            return StreamingResponse(pieces())

        @self.app.get("/v1/responses/broken")
        async def broken() -> None:
            raise KeyError("unexpected")

    def http(self, **settings: Any) -> httpx.AsyncClient:
        install(self.app, AccessSettings(**settings))
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False, client=("10.0.0.9", 1))
        return httpx.AsyncClient(transport=transport, base_url="http://small")


@pytest.fixture
def small() -> Small:
    return Small()


# Keys


async def test_keys_scopes_and_what_the_application_learns(small: Small):
    http = small.http(keys=KEYS)
    refused = await http.get("/v1/models")
    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert (await http.get("/v1/models", headers={"x-api-key": "wrong"})).status_code == 401
    assert small.seen == []
    assert (await http.get("/v1/models", headers=AS_SERVE)).text == '"models"'
    assert (await http.get("/v1/models", headers=AS_ADMIN)).status_code == 200
    assert [(state["caller"], state["scopes"]) for state in small.seen] == [("ui", {"serve"}), ("ops", {"admin"})]
    refused = await http.get("/v1/runs", headers=AS_SERVE)
    assert refused.status_code == 403 and "www-authenticate" not in refused.headers
    assert refused.json()["error"] == {
        "type": "forbidden",
        "message": "this needs the scope trainer; ui has: serve",
        "field": None,
    }
    refused = await http.post("/v1/messages")
    assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
    assert refused.json()["request_id"] == refused.headers["x-correlation-id"]
    assert (await http.get("/health")).status_code == 200
    for path in ("/docs", "/openapi.json"):
        assert (await http.get(path)).status_code == 401
        assert (await http.get(path, headers=AS_SERVE)).status_code == 200
    for path in ("/nothing", "/metrics/part"):
        assert (await http.get(path, headers=AS_SERVE)).status_code == 403
        assert (await http.get(path, headers=AS_ADMIN)).status_code == 404


async def test_without_keys_everybody_is_let_in_under_their_address(small: Small):
    http = small.http()
    assert (await http.get("/v1/models")).status_code == 200
    assert small.seen[0]["caller"] == "10.0.0.9" and "admin" in small.seen[0]["scopes"]


def test_the_gateways_routes_need_what_they_should():
    document = make_app(lambda: None, 1).openapi()["paths"]  # type: ignore[arg-type, return-value]
    scopes = {
        (method.upper(), path): needed_scope(method.upper(), path.replace("{", "").replace("}", ""))
        for path, methods in document.items()
        for method in methods
    }
    # The last look at the key of one rollout themselves (test_foreign_route).
    calls = ("completions", "chat/completions", "rollout/completed")
    remote = {("POST", f"/remote/{{worker}}/v1/{name}") for name in calls}
    opened = {route for route, scope in scopes.items() if scope is None}
    assert opened == {("GET", "/health"), ("GET", "/ready")} | remote
    assert scopes["POST", "/v1/weights"] == "admin" and scopes["GET", "/v1/weights"] == "trainer"
    trainers = {path: scope for (_, path), scope in scopes.items() if path.startswith(("/v1/runs", "/v1/leases"))}
    assert len(trainers) > 5 and set(trainers.values()) == {"trainer"}


@pytest.mark.parametrize(("path", "root"), [("/a/b", ""), ("/a/b", "/a"), ("/a", "/a"), ("/ab", "/a"), ("/b", "/a")])
def test_the_path_is_that_of_the_routers(path: str, root: str):
    assert route_path({"path": path, "root_path": root}) == get_route_path({"path": path, "root_path": root})


async def test_keys_are_in_no_log(small: Small, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    http = small.http(keys=KEYS)
    await http.get("/v1/models", headers={"x-api-key": "sk-wrong"})
    await http.get("/v1/runs%0Aforged", headers=AS_SERVE)
    assert "refused: 401" in caplog.text and "ui" in caplog.text
    assert "sk-wrong" not in caplog.text and SERVE not in caplog.text and "\nforged" not in caplog.text


# Correlation


async def test_every_response_has_the_id(small: Small):
    http = small.http(keys=KEYS, max_body_bytes=10, cors_origins=(ORIGIN,))
    mine, other = str(uuid.uuid4()), str(uuid.uuid4())
    preflight = {"origin": ORIGIN, "access-control-request-method": "POST"}
    requests: list[tuple[int, str, str, dict[str, Any]]] = [
        (200, "GET", "/v1/models", {"headers": AS_SERVE}),
        (200, "GET", "/health", {}),
        (401, "GET", "/v1/models", {}),
        (403, "GET", "/v1/runs", {"headers": AS_SERVE}),
        (404, "GET", "/v1/responses/a/b", {"headers": AS_ADMIN}),
        (413, "POST", "/v1/chat/completions", {"headers": AS_SERVE, "content": b"x" * 11}),
        (500, "GET", "/v1/responses/broken", {"headers": AS_SERVE}),
        (200, "OPTIONS", "/v1/models", {"headers": preflight}),
    ]
    for status, method, path, more in requests:
        headers = more.pop("headers", {})
        told = await http.request(method, path, headers={**headers, "X-Correlation-ID": mine}, **more)
        assert (told.status_code, told.headers.get_list("x-correlation-id")) == (status, [mine]), path
        told = await http.request(method, path, headers={**headers, "X-Request-Id": other}, **more)
        assert told.headers["x-correlation-id"] == other
        told = await http.request(method, path, headers={**headers, "X-Correlation-ID": "<script>"}, **more)
        assert uuid.UUID(told.headers["x-correlation-id"]).version == 4
    assert [state["correlation_id"] for state in small.seen][:2] == [mine, other]
    assert all(state["correlation_id"] == state["var"] for state in small.seen)
    assert correlation_id.get() is None, "it is reset after the request"


# Limits


async def test_too_many_requests_a_minute(small: Small):
    http = small.http(keys=KEYS, per_caller=Bounds(requests_per_minute=2))
    for _ in range(2):
        assert (await http.get("/v1/models", headers=AS_SERVE)).status_code == 200
    refused = await http.get("/v1/models", headers=AS_SERVE)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "30")
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert (await http.get("/v1/models", headers=AS_ADMIN)).status_code == 200
    assert (await http.get("/v1/models")).status_code == 401
    assert (await http.get("/health")).status_code == 200


async def test_a_stream_counts_until_its_end(small: Small):
    http = small.http(keys=KEYS, per_caller=Bounds(max_concurrent=1))
    first = asyncio.create_task(http.post("/v1/messages", headers=AS_SERVE))
    await asyncio.wait_for(small.waiting.wait(), DEADLINE_S)
    refused = await http.post("/v1/messages", headers=AS_SERVE)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    small.go_on.set()
    assert (await asyncio.wait_for(first, DEADLINE_S)).text == "first,last"
    assert (await http.post("/v1/messages", headers=AS_SERVE)).status_code == 200


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_request_that_fails_gives_its_place_back(small: Small, cancelled: bool):
    http = small.http(total=Bounds(max_concurrent=1))
    if cancelled:
        task = asyncio.create_task(http.post("/v1/messages"))
        await asyncio.wait_for(small.waiting.wait(), DEADLINE_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        assert (await http.get("/v1/responses/broken")).status_code == 500
    assert (await http.get("/v1/models")).status_code == 200


# Bodies


async def pieces(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * 10


async def test_an_announced_body_is_refused_before_it_is_received(small: Small):
    install(small.app, AccessSettings(max_body_bytes=100))
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("nothing is received")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b""}
    await small.app({**scope, "headers": [(b"content-length", b"101")]}, receive, send)
    assert sent[0]["status"] == 413 and json.loads(sent[1]["body"])["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_body_without_a_length_is_counted(small: Small, path: str, caplog: pytest.LogCaptureFixture):
    http = small.http(max_body_bytes=100)
    refused = await http.post(path, content=pieces(11))
    assert refused.status_code == 413 and refused.json()["error"]["code"] == "request_too_large"
    assert refused.headers["x-correlation-id"]
    assert "Traceback" not in caplog.text
    assert (await http.post("/v1/chat/completions", content=pieces(10))).text == "100"
    assert (await http.post("/v1/chat/completions", content=b"x" * 100)).text == "100"
    assert (await http.post("/v1/chat/completions")).text == "0"


@pytest.mark.parametrize("lie", [{"content-length": "1"}, {"content-length": "9" * 5000}, {"content-length": "-1"}])
async def test_an_announcement_beside_chunks_is_not_believed(small: Small, lie: dict[str, str]):
    http = small.http(max_body_bytes=100)
    headers = {"transfer-encoding": "chunked", **lie}
    assert (await http.post("/v1/chat/completions", content=pieces(11), headers=headers)).status_code == 413
    assert (await http.post("/v1/chat/completions", content=pieces(1), headers=headers)).text == "10"


@pytest.mark.parametrize("length", ["9" * 5000, "1e9", "-1", ""])
async def test_a_length_that_is_none_is_not_believed(small: Small, length: str):
    http = small.http(max_body_bytes=100)
    headers = {"content-length": length}
    assert (await http.post("/v1/chat/completions", content=b"x" * 101, headers=headers)).status_code == 413
    assert (await http.post("/v1/chat/completions", content=b"x" * 100, headers=headers)).text == "100"


async def test_an_application_that_fails_over_a_large_body_is_not_heard():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            while True:
                await receive()
        except Exception as error:
            raise RuntimeError("lost") from error

    async def answering(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await receive()

    async def call(application: Any) -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"x" * 60, "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        guarded = AccessMiddleware(application, Gate(AccessSettings(max_body_bytes=100)))
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        await guarded(scope, receive, send)
        return sent

    assert [message.get("status") for message in await call(app)] == [413, None]
    with pytest.raises(Exception, match="more than 100 bytes"):
        await call(answering)


# What passes through


async def _nothing() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


async def test_pieces_of_a_body_are_handed_to_the_servers_own_send():
    pieces_sent = [{"type": "http.response.body", "body": b"x", "more_body": True} for _ in range(3)]
    handed: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Correlation-ID", b"the app's")]})
        for piece in pieces_sent:
            awaitable = send(piece)
            assert awaitable is handed[-1][1], "no coroutine stands between"
            await awaitable

    def send(message: Any) -> Any:
        awaitable = asyncio.get_running_loop().create_future()
        awaitable.set_result(None)
        handed.append((message, awaitable))
        return awaitable

    guarded = AccessMiddleware(app, Gate(AccessSettings(keys=KEYS, per_caller=Bounds(5, 5), max_body_bytes=100)))
    headers = [(b"x-api-key", SERVE.encode()), (b"content-length", b"0")]
    await guarded({"type": "http", "method": "GET", "path": "/v1/models", "headers": headers}, _nothing, send)
    start, *rest = [message for message, _ in handed]
    assert all(got is piece for got, piece in zip(rest, pieces_sent, strict=True))
    ids = [value for name, value in start["headers"] if name.lower() == b"x-correlation-id"]
    assert len(ids) == 1 and ids != [b"the app's"]


async def test_lifespan_passes_and_websockets_do_not():
    heard: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.append(scope["type"])

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    guarded = AccessMiddleware(app, Gate(AccessSettings(keys=KEYS)))
    await guarded({"type": "lifespan"}, _nothing, send)
    await guarded({"type": "websocket", "path": "/v1/realtime", "headers": []}, _nothing, send)
    assert heard == ["lifespan"] and sent == [{"type": "websocket.close", "code": 1008}]
    with pytest.raises(ValueError, match="telnet"):
        await guarded({"type": "telnet"}, _nothing, send)


async def test_the_servers_own_state_is_kept_and_not_written_to():
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["state"])
        await send({"type": "http.response.start", "status": 204, "headers": []})

    async def send(message: Any) -> None: ...

    shared = {"pool": 1}
    scope = {"type": "http", "method": "GET", "path": "/health", "headers": [], "state": shared}
    await AccessMiddleware(app, Gate(AccessSettings()))(scope, _nothing, send)
    assert seen[0]["pool"] == 1 and "caller" in seen[0] and shared == {"pool": 1}


# CORS


async def test_browsers_are_let_in_from_the_origins_given_alone(small: Small):
    http = small.http(keys=KEYS, cors_origins=(ORIGIN,))
    asked = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-stainless-os",
    }
    told = await http.options("/v1/chat/completions", headers=asked)
    assert told.status_code == 200 and told.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-os" in told.headers["access-control-allow-headers"]
    told = await http.options("/v1/models", headers={**asked, "origin": "https://evil.example.com"})
    assert told.status_code == 400 and "access-control-allow-origin" not in told.headers
    told = await http.get("/v1/models", headers={"origin": ORIGIN})
    assert told.status_code == 401 and told.headers["access-control-allow-origin"] == ORIGIN
    assert "X-Correlation-ID" in told.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in told.headers


async def test_an_applications_own_openness_is_taken_away(small: Small):
    small.app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"])
    http = small.http(keys=KEYS)
    told = await http.get("/v1/models", headers={"origin": ORIGIN, **AS_SERVE})
    assert told.status_code == 200 and "access-control-allow-origin" not in told.headers
    asked = {"origin": ORIGIN, "access-control-request-method": "POST"}
    assert (await http.options("/v1/models", headers=asked)).status_code == 401


async def test_it_must_be_installed_before_the_first_request(small: Small):
    http = small.http(keys=KEYS)
    await http.get("/health")
    with pytest.raises(RuntimeError, match="before"):
        install(small.app, AccessSettings())


# Behind a server


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Any]]:
    uvicorn = pytest.importorskip("uvicorn")
    running: list[tuple[Any, asyncio.Task[None]]] = []

    async def start(app: Any, **options: Any) -> str:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, **options))
        # Signals belong to the test runner.
        task = asyncio.create_task(server._serve())
        running.append((server, task))
        async with asyncio.timeout(DEADLINE_S):
            while not server.started:
                await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    yield start
    for server, task in running:
        server.should_exit = True
        await asyncio.wait_for(task, DEADLINE_S)


async def test_behind_a_real_server(small: Small, serve: Any):
    install(small.app, AccessSettings(keys=KEYS, max_body_bytes=1000))
    async with httpx.AsyncClient(base_url=await serve(small.app), headers=AS_SERVE, timeout=DEADLINE_S) as http:
        assert (await http.get("/v1/models")).status_code == 200
        for content in (b"x" * 500_000, pieces(1000)):
            assert (await http.post("/v1/chat/completions", content=content)).status_code == 413
        assert (await http.post("/v1/chat/completions", content=pieces(100))).text == "1000"
        small.go_on.set()
        assert (await http.post("/v1/messages")).text == "first,last"
        # As they stand on the wire: httpx would make them plain.
        for raw in (b"/v1/%72uns", b"/v1//models", b"/v1/models/%2e%2e/weights", b"/health/..%2fv1/models"):
            url = httpx.URL(http.base_url).copy_with(raw_path=raw)
            assert (await http.get(url)).status_code == 403, raw
        url = httpx.URL(http.base_url).copy_with(raw_path=b"/v1/%6dodels")
        assert (await http.get(url)).status_code == 200
