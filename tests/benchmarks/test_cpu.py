"""CPU time by role."""

from __future__ import annotations

import os
import socket
import time

import psutil
import pytest

from benchmarks.cpu import role_of, server_at, spent


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("VLLM::Worker_TP1", "ranks"),
        ("VLLM::EngineCore", "core"),
        ("ray::ServeReplica:engine:engine", "server"),
        ("python -m vllm.entrypoints.openai.api_server --model m", "server"),
        ("/lib/haproxy -db -f /tmp/haproxy.cfg", "proxy"),
        ("ray::ServeReplica:gateway:gateway", "rest"),
        ("ray::Controller", "rest"),
        ("", "rest"),
    ],
)
def test_roles(command: str, role: str):
    assert role_of(command) == role


def test_what_is_spent_is_seen():
    before, until = spent([]), time.process_time() + 0.2
    while time.process_time() < until:
        pass
    assert 0.15 < spent([])["client"] - before["client"] < 2


def test_a_process_that_has_ended_counts_nothing():
    class Ended(psutil.Process):
        """A TEST DOUBLE: a process that is gone when it is asked."""

        def cpu_times(self):
            raise psutil.NoSuchProcess(self.pid)

    assert set(spent([Ended(os.getpid())])) == {"client"}


def test_the_server_at_a_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert server_at(port)[0].pid == os.getpid()
    with pytest.raises(LookupError, match=str(port)):
        server_at(port)
