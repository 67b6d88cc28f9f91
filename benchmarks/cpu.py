"""CPU time by role: who takes the cores while a server is asked.

Invariant: only processes of the server, its cluster and this one are counted, and a process whose role is unknown is
counted as "rest", never left out.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable

import psutil

# The start of a process's title, or a part of its command line, by role. The first that fits decides.
TITLES = (
    ("VLLM::Worker", "ranks"),
    ("VLLM::EngineCore", "core"),
    ("ray::ServeReplica:engine", "server"),
    ("vllm.entrypoints.openai.api_server", "server"),
    ("haproxy -db", "proxy"),
)


def role_of(command: str) -> str:
    """The role of a process with this command line: "server" makes the chunks, "proxy" hands them on."""
    return next((role for title, role in TITLES if title in command), "rest")


def spent(processes: Iterable[psutil.Process]) -> dict[str, float]:
    """Seconds of CPU so far by role, and those of this process as "client". What has ended meanwhile has none."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for process in processes:
        try:
            times = process.cpu_times()
            seconds[role_of(" ".join(process.cmdline()))] += times.user + times.system
        except psutil.Error:
            continue
    own = os.times()
    seconds["client"] = own.user + own.system
    return seconds


def server_at(port: int) -> list[psutil.Process]:
    """Whoever listens at this port, and all its children. Raises LookupError where nobody does."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
            server = psutil.Process(connection.pid)
            return [server, *server.children(recursive=True)]
    raise LookupError(f"nobody listens at port {port}")
