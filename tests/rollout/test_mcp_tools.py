"""MCP tools against real servers, over stdio and over HTTP."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from cluster.ports import free_ports
from rollout import mcp_connection, mcp_tools
from rollout.errors import ConfigError, ToolError
from rollout.mcp_config import McpServerConfig
from rollout.mcp_tools import McpServers
from rollout.tool_calls import ToolCall, ToolResult, ToolSet

SCRIPT = str(Path(__file__).with_name("mcp_server.py"))
NAMES = ["add", "echo", "slow", "fail", "die", "variable", "image", "structured"]


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if SCRIPT in " ".join(child.cmdline())]


async def invoke(tools: ToolSet, name: str, /, timeout: float = 10.0, **arguments: Any) -> ToolResult:
    call = ToolCall("1", name, arguments)
    return await tools.call(call, timeout=timeout, max_output_chars=10_000)


async def invoke_until_up(tools: ToolSet, name: str, /, **arguments: Any) -> ToolResult:
    """Calls fail at once between two attempts to connect."""
    deadline = time.monotonic() + 10
    while True:
        result = await invoke(tools, name, **arguments)
        if result.record.ok or time.monotonic() > deadline:
            return result
        await asyncio.sleep(0.1)


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCP_TEST_TOKEN", "sesame")


@pytest.fixture
async def stdio() -> AsyncIterator[McpServers]:
    env = {"GIVEN": "<${MCP_TEST_TOKEN}>"}
    servers = McpServers({"local": McpServerConfig(command=[sys.executable, SCRIPT], env=env)})
    yield servers
    await servers.close()
    assert children() == []


@contextmanager
def http_server(port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, SCRIPT, str(port), *options])
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def http_config(port: int, **fields: Any) -> McpServerConfig:
    headers = {"Authorization": "Bearer ${MCP_TEST_TOKEN}"}
    return McpServerConfig(url=f"http://127.0.0.1:{port}/mcp", **{"headers": headers, **fields})


def test_importing_does_not_import_mcp() -> None:
    code = "import sys, rollout.mcp_tools; sys.exit('mcp' in sys.modules or 'httpx2' in sys.modules)"
    root = Path(mcp_tools.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"command": ["a"], "url": "http://localhost"},
        {"command": []},
        {"url": "ftp://localhost/x"},
        {"url": "http://"},
        {"url": "http://localhost", "env": {"KEY": "hunter2"}},
        {"url": "http://localhost", "cwd": "/"},
        {"command": ["a"], "headers": {"Key": "hunter2"}},
        {"command": ["a"], "connect_seconds": 0},
        {"command": ["a"], "shell": True},
    ],
)
def test_config_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        McpServerConfig(**fields)
    assert "hunter2" not in str(caught.value)


def test_secrets_stay_out_of_repr() -> None:
    local = McpServerConfig(command=["a"], env={"KEY": "hunter2"})
    remote = McpServerConfig(url="https://example.com/mcp", headers={"Authorization": "hunter2"})
    assert "hunter2" not in f"{local!r} {local} {remote!r} {remote}"


async def test_stdio_calls(stdio: McpServers, capfd: pytest.CaptureFixture[str]) -> None:
    listed, again = await asyncio.gather(stdio.tools("local"), stdio.tools("local"))
    assert [item.name for item in listed] == [item.name for item in again] == NAMES
    assert len(children()) == 1
    assert listed[0].spec["function"] == {
        "name": "add",
        "description": "Add two integers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    }
    tools = ToolSet(listed)
    assert (await invoke(tools, "add", a=2, b=3)).content == "5"
    assert (await invoke(tools, "echo", text="zwölf\n€")).content == "zwölf\n€"
    assert (await invoke(tools, "image")).content == "[image image/png, 10 bytes]\na picture\na note"
    assert (await invoke(tools, "structured")).content == '{"answer": 42}'

    assert (await invoke(tools, "variable", name="GIVEN")).content == "<sesame>"
    assert (await invoke(tools, "variable", name="MCP_TEST_TOKEN")).content == "unset"
    assert "hello from stderr" not in "".join(capfd.readouterr())

    wrong = await invoke(tools, "add", a="two", b=3)
    assert wrong.outcome == "invalid_arguments" and "a: 'two' is not of type 'integer'" in wrong.content
    failed = await invoke(tools, "fail")
    assert failed.outcome == "exception" and "no such luck" in failed.content

    late = await invoke(tools, "slow", timeout=0.2, seconds=30)
    assert late.outcome == "timeout" and late.record.seconds < 5
    started = time.monotonic()
    results = await asyncio.gather(
        *(invoke(tools, "slow", seconds=0.5) for _ in range(8)),
        *(invoke(tools, "echo", text=str(number)) for number in range(30)),
    )
    assert [result.content for result in results] == ["done"] * 8 + [str(number) for number in range(30)]
    assert time.monotonic() - started < 4
    assert len(children()) == 1


async def test_stdio_server_dies_and_comes_back(stdio: McpServers, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = ToolSet(await stdio.tools("local"))
    waiting = [asyncio.create_task(invoke(tools, "slow", seconds=30)) for _ in range(3)]
    await asyncio.sleep(0.2)
    started = time.monotonic()
    children()[0].send_signal(signal.SIGKILL)
    for result in await asyncio.gather(*waiting):
        assert result.outcome == "exception" and "MCP server 'local' went away" in result.content
    assert time.monotonic() - started < 5
    assert (await invoke_until_up(tools, "add", a=2, b=3)).content == "5"

    # Its last words are in the error; until the next attempt is due, calls fail with the same error at once.
    monkeypatch.setattr(mcp_connection, "RECONNECT_SECONDS", 60)
    died = await invoke(tools, "die", last_words="out of cheese")
    refused = await invoke(tools, "add", a=2, b=3)
    assert "out of cheese" in died.content and died.content == refused.content
    assert refused.record.seconds < 1 and children() == []
    monkeypatch.setattr(mcp_connection, "RECONNECT_SECONDS", 0.2)
    assert (await invoke_until_up(tools, "add", a=2, b=3)).content == "5"

    # Killed while idle: noticed before the next call, which is not lost.
    children()[0].kill()
    await asyncio.sleep(mcp_connection.RECONNECT_SECONDS)
    assert (await invoke(tools, "add", a=2, b=3)).content == "5"


async def test_cancelling_the_first_user_and_closing(stdio: McpServers) -> None:
    first = asyncio.create_task(stdio.tools("local"))
    second = asyncio.create_task(stdio.tools("local"))
    await asyncio.sleep(0.1)
    first.cancel()
    tools = ToolSet(await second)
    waiting = asyncio.create_task(invoke(tools, "slow", seconds=30))
    await asyncio.sleep(0.1)
    await stdio.close()
    assert children() == []
    assert "it was closed" in (await waiting).content
    assert "was closed" in (await invoke(tools, "add", a=1, b=1)).content


async def test_unusable_configurations() -> None:
    servers = McpServers({"bad": McpServerConfig(command=[sys.executable], env={"KEY": "${MCP_TEST_ABSENT}"})})
    with pytest.raises(ConfigError, match=r"'bad': variable 'KEY' needs .* MCP_TEST_ABSENT, which is not set"):
        await servers.tools("bad")
    with pytest.raises(ConfigError, match="no MCP server called 'other'; the servers are: bad"):
        await servers.tools("other")


async def test_connect_failures() -> None:
    script = "import sys, time; sys.stderr.write('bad flag'); sys.stderr.flush(); "
    servers = McpServers(
        {
            "missing": McpServerConfig(command=["/no/such/program"]),
            "closed": McpServerConfig(url=f"http://127.0.0.1:{free_ports(1)[0]}/mcp"),
            "exits": McpServerConfig(command=[sys.executable, "-c", script]),
            "mute": McpServerConfig(command=[sys.executable, "-c", script + "time.sleep(60)"], connect_seconds=0.5),
        }
    )
    messages = {
        "missing": r"MCP server 'missing' could not be connected: FileNotFoundError: .*/no/such/program",
        "closed": r"MCP server 'closed' could not be connected: ConnectError: ",
        "exits": r"MCP server 'exits' could not be connected: .*bad flag",
        "mute": r"MCP server 'mute' could not be connected: no answer within 0.5 s",
    }
    # The library's first import is not what is measured here.
    import mcp  # noqa: F401

    for name, message in messages.items():
        started = time.monotonic()
        with pytest.raises(ToolError, match=message):
            await servers.tools(name)
        assert time.monotonic() - started < 5
    # A second attempt too soon is not made: the same error, at once.
    with pytest.raises(ToolError, match="no answer within"):
        await servers.tools("mute")
    stuck = psutil.Process().children()
    assert len(stuck) == 1
    await servers.close()
    assert not stuck[0].is_running()


def test_schemas() -> None:
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "x", "properties": {"title": {}}}
    assert mcp_tools._clean_schema(schema, "it") == {
        "type": "object",
        "properties": {"title": {}},
        "required": [],
    }
    tuples = {**schema, "properties": {"pair": {"items": [{"type": "string"}]}}}
    assert mcp_tools._clean_schema(tuples, "it")["$schema"] == schema["$schema"]
    with pytest.raises(ToolError, match="it has an input schema that is not valid"):
        mcp_tools._clean_schema({"properties": {"a": {"type": "text"}}}, "it")


@pytest.mark.parametrize("options", [(), ("legacy",)], ids=["stateless", "sessions"])
async def test_http(options: tuple[str, ...]) -> None:
    (port,) = free_ports(1)
    servers = McpServers(
        {
            "web": http_config(port),
            "stranger": http_config(port, headers={}),
            "forgetful": http_config(port, headers={"Authorization": "${MCP_TEST_ABSENT}"}),
        }
    )
    with http_server(port, *options):
        with pytest.raises(ToolError, match="'stranger' could not be connected: HTTP 401 Unauthorized"):
            await servers.tools("stranger")
        with pytest.raises(ConfigError, match=r"header 'Authorization' needs .* MCP_TEST_ABSENT"):
            await servers.tools("forgetful")
        tools = ToolSet(await servers.tools("web"))
        assert (await invoke(tools, "add", a=2, b=3)).content == "5"
        assert "no such luck" in (await invoke(tools, "fail")).content
        assert (await invoke(tools, "slow", timeout=0.2, seconds=30)).outcome == "timeout"
        results = await asyncio.gather(*(invoke(tools, "slow", seconds=0.3) for _ in range(20)))
        assert [result.content for result in results] == ["done"] * 20
        waiting = [asyncio.create_task(invoke(tools, "slow", seconds=30)) for _ in range(3)]
        await asyncio.sleep(0.3)
        started = time.monotonic()
    for result in await asyncio.gather(*waiting):
        assert result.outcome == "exception" and "MCP server 'web' went away" in result.content
    down = await invoke(tools, "add", a=2, b=3)
    assert down.outcome == "exception" and "MCP server 'web'" in down.content
    assert time.monotonic() - started < 5
    with http_server(port, *options):
        # A new process knows nothing of our session: the call is repeated on a new one, unseen.
        results = await asyncio.gather(*(invoke(tools, "add", a=2, b=3) for _ in range(5)))
        assert [result.content for result in results] == ["5"] * 5
        await servers.close()
