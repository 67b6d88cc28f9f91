"""A cluster with keys, and ears for its loading: started once for the tests of access and of loading together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from cluster import state
from tests.conftest import ROOT

CONFIG = Path(__file__).parent / "guarded.yaml"
KEYS = {name: f"{name}-key-of-the-tests-0123456789" for name in ("app", "other", "greedy", "trainer", "root")}
UP_SECONDS = 300.0
# 60 requests a minute is the limit of these keys.
ASK_AGAIN_S = 0.5


def environment() -> dict[str, str]:
    """What `rollout up` reads the keys from."""
    return {**os.environ, **{f"ROLLOUT_TEST_{name.upper()}": key for name, key in KEYS.items()}}


def bearer(name: str) -> dict[str, str]:
    """The header of a caller."""
    return {"authorization": f"Bearer {KEYS[name]}"}


@dataclass
class Heard:
    """A progress stream as one subscriber heard it."""

    events: list[dict[str, Any]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    done: bool = False
    """It ended with [DONE]."""
    failure: str | None = None

    @property
    def stages(self) -> list[str]:
        """In the order of events."""
        return [event["stage"] for event in self.events]

    def ranks(self) -> dict[int, list[dict[str, Any]]]:
        """The figures of each rank, in the order of events."""
        found: dict[int, list[dict[str, Any]]] = {}
        for event in self.events:
            if event["stage"] == "loading_to_vram":
                found.setdefault(event["rank"], []).append(event)
        return found


class Subscriber(threading.Thread):
    """Follows a cluster's loading from a thread, from the moment that there is something to follow."""

    def __init__(self, address: str, key: str, *, seconds: float = UP_SECONDS) -> None:
        super().__init__(daemon=True)
        self.heard = Heard()
        self.any = threading.Event()
        """Set at the first event."""
        self._address, self._key = address, key
        self._until = time.monotonic() + seconds
        self.start()

    def run(self) -> None:
        try:
            self._listen()
        except Exception as failure:
            self.heard.failure = repr(failure)
        finally:
            self.any.set()

    def _listen(self) -> None:
        while time.monotonic() < self._until:
            try:
                if self._follow():
                    return
            except httpx.TransportError as failure:
                # The address is not there yet; or it is gone, with the cluster.
                if self.heard.events:
                    self.heard.failure = repr(failure)
                    return
            time.sleep(ASK_AGAIN_S)
        self.heard.failure = "nothing to follow came in time"

    def result(self) -> Heard:
        """What it has heard, when the stream has ended."""
        self.join(max(1.0, self._until - time.monotonic()))
        assert not self.is_alive(), "the stream does not end"
        return self.heard

    def _follow(self) -> bool:
        headers = {"authorization": f"Bearer {self._key}"}
        with httpx.stream("GET", f"{self._address}/v1/loading/progress", headers=headers, timeout=60) as response:
            if response.status_code in (404, 429, 503):
                # There is no gateway yet, or nothing that loads; or it was asked for more often than this cluster's
                # limit allows.
                return False
            assert response.status_code == 200, response.read()
            number = 0
            for line in response.iter_lines():
                if line.startswith("id: "):
                    number = int(line.removeprefix("id: "))
                elif line == "data: [DONE]":
                    self.heard.done = True
                elif line.startswith("data: "):
                    self.heard.events.append(json.loads(line.removeprefix("data: ")))
                    self.heard.ids.append(number)
                    self.any.set()
        return True


@dataclass
class Up:
    """`rollout up`, with what two subscribers heard of it: one from the beginning, one that came later."""

    returncode: int
    output: str
    early: Heard
    late: Heard


def up_and_listen(
    config: Path, address: str, key: str, when: Callable[[Subscriber], None], timeout: float = UP_SECONDS
) -> Up:
    """Run `rollout up` and follow its loading. `when` returns as soon as the second subscriber is to come."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", "up", str(config)],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        early = Subscriber(address, key, seconds=timeout)
        when(early)
        late = Subscriber(address, key, seconds=60)
        output, _ = process.communicate(timeout=timeout)
    except BaseException:
        process.terminate()
        process.wait(60)
        raise
    return Up(process.returncode, output, early.result(), late.result())


class Guarded:
    """The cluster with keys."""

    address = "http://127.0.0.1:8942"

    def __init__(self) -> None:
        self.up = up_and_listen(CONFIG, self.address, KEYS["app"], lambda early: early.any.wait(UP_SECONDS) and None)
        assert self.up.returncode == 0, self.up.output
        self._running = True

    def client(self, name: str | None = None) -> httpx.Client:
        """HTTP with somebody's key, or without one."""
        headers = {} if name is None else bearer(name)
        return httpx.Client(base_url=self.address, headers=headers, timeout=60)

    def stop(self) -> None:
        """End it, once."""
        if not self._running:
            return
        self._running = False
        started = state.load("guarded")
        assert started is not None
        down = subprocess.run(
            [sys.executable, "-m", "cluster", "down", "guarded"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert down.returncode == 0, down.stdout + down.stderr
        assert list(state.processes(started)) == []
