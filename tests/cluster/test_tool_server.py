"""The cluster's tools over MCP: `rollout tools` as a real process, called by the project's own MCP client."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import pytest

from cluster import tool_server
from cluster.tool_server import ToolServerError, address_of, listen, make_server, parse_address
from rollout.builtin_tools import MAX_ECHO_CHARS, builtin_tools
from rollout.errors import ToolError
from rollout.mcp_config import McpServerConfig
from rollout.mcp_connection import McpServer
from rollout.mcp_tools import McpServers
from rollout.tool_calls import ToolCall, ToolResult, ToolSet
from rollout.tools import tool
from tests.conftest import ROOT

COMMAND = [sys.executable, "-m", "cluster", "tools"]
START_SECONDS = 60


@asynccontextmanager
async def tools_of(config: McpServerConfig) -> AsyncIterator[ToolSet]:
    servers = McpServers({"own": config})
    try:
        yield ToolSet(await servers.tools("own"))
    finally:
        await servers.close()


async def invoke(tools: ToolSet, name: str, /, **arguments: Any) -> ToolResult:
    return await tools.call(ToolCall("1", name, arguments), timeout=20, max_output_chars=16_384)


def stdio_config(*options: str) -> McpServerConfig:
    return McpServerConfig(command=[*COMMAND, *options], cwd=str(ROOT), connect_seconds=START_SECONDS)


@contextmanager
def http_process(address: str = "127.0.0.1:0") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command with --http, and the URL that it has printed."""
    process = subprocess.Popen([*COMMAND, "--http", address], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        # Ends with the process, and the process ends with the test's own time limit at the latest.
        line = process.stderr.readline()
        found = re.search(r"http://\S+/mcp", line)
        assert found, line
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


async def check_all(tools: ToolSet) -> None:
    """What both transports must do."""
    # The client writes `required` even where it is empty.
    own = [
        {"name": item.name, "description": item.description, "parameters": {"required": [], **item.parameters}}
        for item in builtin_tools()
    ]
    assert [spec["function"] for spec in tools.specs] == own, "the model is shown the same"
    assert (await invoke(tools, "echo", text="zwölf\n€")).content == "zwölf\n€"
    assert (await invoke(tools, "echo", text="x" * MAX_ECHO_CHARS)).content == "x" * MAX_ECHO_CHARS
    assert (await invoke(tools, "add", a=0.1, b=0.2)).content == "0.3"
    told = await invoke(tools, "get_time", zone="Asia/Kathmandu")
    assert told.record.ok and "+05:45 (" in told.content and told.content.endswith("Asia/Kathmandu)")

    unknown = await invoke(tools, "get_time", zone="Mars/Olympus")
    assert unknown.outcome == "exception"
    assert unknown.content == "Error: there is no time zone 'Mars/Olympus'; use an IANA name such as Europe/Berlin"
    huge = await invoke(tools, "multiply", a=1e300, b=1e300)
    assert huge.content.startswith("Error: invalid arguments for multiply: a: has more than 100 digits")
    assert (await invoke(tools, "divide", a=1, b=0)).content == "Error: division by zero"
    assert (await invoke(tools, "add", a="two", b=1)).outcome == "invalid_arguments"
    results = await asyncio.gather(*(invoke(tools, "add", a=number, b=1) for number in range(20)))
    assert [result.content for result in results] == [str(number + 1) for number in range(20)]


async def test_the_command_over_stdio() -> None:
    async with tools_of(stdio_config()) as tools:
        await check_all(tools)


async def test_the_command_over_http() -> None:
    with http_process() as (process, url):
        async with tools_of(McpServerConfig(url=url)) as tools:
            await check_all(tools)
        # A page of a stranger that has made its own name lead to this machine.
        async with httpx.AsyncClient() as client:
            answer = await client.post(url, json={}, headers={"host": "evil.example:80"})
            assert answer.status_code == 421
            large = await client.post(url, content=b"x" * (tool_server.MAX_BODY_BYTES + 1))
            assert large.status_code == 413
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 130


def test_over_stdio_a_signal_ends_it_although_the_client_says_nothing() -> None:
    process = subprocess.Popen(COMMAND, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdin is not None and process.stdout is not None
        ping = '{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n'
        process.stdin.write(ping)
        process.stdin.flush()
        assert '"id":1' in process.stdout.readline().replace(" ", "")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()


def test_over_stdio_it_ends_with_its_client() -> None:
    done = subprocess.run(COMMAND, cwd=ROOT, input="", capture_output=True, text=True, timeout=START_SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_address_that_is_taken_is_one_message() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        command = [*COMMAND, "--http", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=START_SECONDS)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error --http: cannot listen at 127.0.0.1:{port}: ")
    assert "choose another" in done.stderr and "Traceback" not in done.stderr


# In this process: a server of other tools, on a socket of ours


@asynccontextmanager
async def serving(server: Any, host: str = "127.0.0.1") -> AsyncIterator[str]:
    listening = listen(host, 0)
    http = tool_server.http_server(server, listening)
    task = asyncio.create_task(http.serve([listening]))
    try:
        yield address_of(listening)
    finally:
        http.should_exit = True
        await asyncio.wait_for(task, 20)
        listening.close()


async def test_every_failure_is_an_answer_in_a_sessions_own_words() -> None:
    @tool
    async def slow() -> str:
        """Take too long."""
        await asyncio.sleep(60)
        return "done"

    @tool
    def broken() -> str:
        """Raise."""
        raise KeyError("odd")

    @tool
    def large() -> str:
        """Say too much."""
        return "x" * 1_000

    @tool
    def refuses() -> str:
        """Raise a ToolError whose text begins as a session's does."""
        raise ToolError("Error: twice")

    server = make_server([slow, broken, large, refuses], call_seconds=0.3, max_output_chars=100)
    async with serving(server) as url, tools_of(McpServerConfig(url=url, connect_seconds=START_SECONDS)) as tools:
        started = time.monotonic()
        said = {name: (await invoke(tools, name)).content for name in ("slow", "broken", "large", "refuses")}
        assert said == {
            "slow": "Error: slow did not answer within 0.3 s",
            "broken": "Error: KeyError: 'odd'",
            "large": "Error: the result of large has 1000 characters, more than 100; ask for less",
            "refuses": "Error: Error: twice",
        }
        assert time.monotonic() - started < 10
        # A name that no client has checked: an answer as well, not a broken connection.
        raw = McpServer("raw", McpServerConfig(url=url, connect_seconds=START_SECONDS))
        try:
            result = await raw.call("nonsense", {})
        finally:
            await raw.close()
        assert result.is_error and "there is no tool called 'nonsense'" in result.content[0].text


async def test_it_answers_to_the_name_of_its_own_address() -> None:
    server = make_server(builtin_tools())
    async with serving(server, "127.0.0.2") as url, tools_of(McpServerConfig(url=url)) as tools:
        assert url.startswith("http://127.0.0.2:")
        assert (await invoke(tools, "add", a=2, b=3)).content == "5"


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two tools are called 'echo'"):
        make_server([*builtin_tools(), builtin_tools()[0]])


# Addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8900", ("127.0.0.1", 8900)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("tools.example:65535", ("tools.example", 65535)),
        ("[::1]:8900", ("::1", 8900)),
        (":8900", ("127.0.0.1", 8900)),
        ("8900", ("127.0.0.1", 8900)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "localhost", "localhost:", "h:http", "h:-1", "h:65536", "::1:8900", "h:8٣"])
def test_what_is_no_address_is_said(text: str) -> None:
    with pytest.raises(ToolServerError, match="--http"):
        parse_address(text)


def test_other_machines_are_let_in_only_when_asked_and_never_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[socket.socket] = []

    class StandsStill:
        async def serve(self, sockets: list[socket.socket]) -> None:
            served.extend(sockets)

    monkeypatch.setattr(tool_server, "http_server", lambda *_: StandsStill())
    for address, warned in (("0", False), ("localhost:0", False), ("0.0.0.0:0", True)):
        said: list[str] = []
        tool_server.serve(builtin_tools(), address, said.append)
        assert said[0].startswith("6 tools (echo, get_time, add, subtract, multiply, divide) at http://127.0.0.1:")
        assert [("nobody is asked for a key" in line) for line in said[1:]] == [True] * warned
    for listening in served:
        listening.close()


def test_stdio_says_nothing_to_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stands_still(_server: Any) -> None: ...

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(tool_server, "serve_stdio", stands_still)
    try:
        for terminal in (False, True):
            monkeypatch.setattr(os, "isatty", lambda _, terminal=terminal: terminal)
            said: list[str] = []
            tool_server.serve(builtin_tools(), None, said.append)
            assert len(said) == terminal
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
