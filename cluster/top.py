"""`rollout top`: a live table of a cluster, asked over its gateway's HTTP like any other client.

Invariant: looking needs no Ray and changes nothing. Every question has a deadline, and one that fails is shown as a
line while the others go on: what is looked at is often the very thing that is in trouble.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
from rich.console import Console
from rich.live import Live

from cluster import state
from cluster.top_frame import Answers, Figures, Rates, Samples, frame, parse, view
from rollout.errors import RolloutError

KEY_VARIABLE = "ROLLOUT_API_KEY"
"""Holds the key for a gateway that wants one; a command's arguments can be seen by all users of a machine."""
# Of one question, its whole answer included. A cluster under load answers within milliseconds.
ASK_SECONDS = 5.0
# More than any list of runs, or a node's metrics.
MAX_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Target:
    """Which cluster is looked at."""

    name: str
    address: str
    """URL of its gateway."""
    ray_metrics: str = ""
    """URL of its Ray's metrics, which have the engines' load; empty: unknown."""


class _NoAnswer(Exception):
    """A question without an answer, and why."""


class Watcher:
    """Asks a cluster, round after round."""

    def __init__(
        self,
        target: Target,
        *,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`transport`: httpx's, for tests."""
        self._target = target
        self._clock = clock
        self._rates = Rates()
        options: dict[str, Any] = {"timeout": ASK_SECONDS, "transport": transport, "follow_redirects": False}
        self._gateway = httpx.AsyncClient(
            headers={"authorization": f"Bearer {api_key}"} if api_key else {}, **options
        )
        # Ray's address is not the gateway's, and is not told its key.
        self._ray = httpx.AsyncClient(**options)
        # An interrupt cancels what is under way at once, where threads would be waited for.
        self._runner = asyncio.Runner()

    def close(self) -> None:
        """Release connections."""
        with self._runner:
            self._runner.run(self._close())

    async def _close(self) -> None:
        await self._gateway.aclose()
        await self._ray.aclose()

    def look(self) -> Figures:
        """Ask everything at once, and put it together."""
        return self._runner.run(self._look())

    async def _look(self) -> Figures:
        target, problems = self._target, list[str]()
        gateway = target.address.rstrip("/")
        asked: dict[str, Coroutine[Any, Any, Any]] = {
            "runs": self._json(f"{gateway}/v1/runs", list),
            "weights": self._json(f"{gateway}/v1/weights", dict),
            "metrics": self._samples(self._gateway, f"{gateway}/metrics", "rollout_"),
        }
        if target.ray_metrics:
            asked["engines"] = self._samples(self._ray, target.ray_metrics, "ray_vllm_")
        heard: dict[str, Any] = {}
        for what, answer in zip(asked, await asyncio.gather(*asked.values(), return_exceptions=True), strict=True):
            if isinstance(answer, _NoAnswer):
                problems.append(str(answer))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                heard[what] = answer
        answers = Answers(self._clock(), problems=list(dict.fromkeys(problems)), **heard)
        return frame(target.name, target.address, answers, self._rates)

    async def _json(self, url: str, kind: type) -> Any:
        try:
            found = json.loads(await self._get(self._gateway, url))
        except (ValueError, RecursionError):
            raise _NoAnswer(f"{urlsplit(url).path}: the answer is no JSON; is this a gateway of ours?") from None
        if not isinstance(found, kind):
            raise _NoAnswer(f"{urlsplit(url).path}: the answer has another form; is this a gateway of ours?")
        return found

    async def _samples(self, client: httpx.AsyncClient, url: str, prefix: str) -> Samples:
        try:
            return parse((await self._get(client, url)).decode(errors="replace"), prefix)
        except ImportError:
            raise _NoAnswer("`pip install prometheus-client` for the figures of /metrics") from None
        except ValueError as failure:
            raise _NoAnswer(f"{urlsplit(url).path}: the metrics cannot be read: {failure}") from None

    async def _get(self, client: httpx.AsyncClient, url: str) -> bytes:
        path, body = urlsplit(url).path, bytearray()
        try:
            async with asyncio.timeout(ASK_SECONDS), client.stream("GET", url) as response:
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > MAX_BYTES:
                        raise _NoAnswer(f"{path}: the answer is larger than {MAX_BYTES // 2**20} MiB")
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as failure:
            raise _NoAnswer(f"{path}: no answer from {_origin(url)} ({type(failure).__name__})") from None
        if response.status_code in (401, 403):
            raise _NoAnswer(f"{path}: {response.status_code}; put a key with the scope `trainer` into {KEY_VARIABLE}")
        if response.status_code != 200:
            raise _NoAnswer(f"{path}: {response.status_code}")
        return bytes(body)


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"


def choose(name: str | None, address: str | None) -> Target:
    """A cluster by its gateway's address, by its name, or the only one there is. Raises RolloutError."""
    if address is not None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RolloutError(f"--address must be an http:// or https:// address, not {address!r}")
        return Target(name or parts.hostname, address)
    known = {cluster.name: cluster for cluster in state.load_all()}
    if name is None and len(known) != 1:
        names = f"several clusters are known ({', '.join(known)}): name one" if known else "no cluster is known"
        raise RolloutError(f"{names}, or give --address http://HOST:PORT")
    chosen = known.get(name) if name is not None else next(iter(known.values()))
    if chosen is None:
        raise RolloutError(f"no cluster is called {name!r}; known are: {', '.join(known) or 'none'}")
    if not chosen.gateway:
        raise RolloutError(f"{chosen.name} has no gateway to ask (gateway.enabled); see `rollout status`")
    return Target(chosen.name, chosen.gateway, chosen.ray_metrics)


def frames(watcher: Watcher, every: float, pause: Callable[[float], object] = time.sleep) -> Iterator[Figures]:
    """A frame every so many seconds, for as long as the caller listens."""
    while True:
        started = time.monotonic()
        yield watcher.look()
        pause(max(0.0, every - (time.monotonic() - started)))


def once(watcher: Watcher, every: float, pause: Callable[[float], object] = time.sleep) -> Figures:
    """One frame. It takes two looks, `every` seconds apart: a rate needs two."""
    watcher.look()
    pause(every)
    return watcher.look()


def live(watcher: Watcher, console: Console, every: float) -> None:
    """Show frames in place until the caller is interrupted. Raises KeyboardInterrupt then, the screen restored."""
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as shown:
        for figures in frames(watcher, every):
            shown.update(view(figures, console.width), refresh=True)


def key_from_environment() -> str | None:
    """The key for the gateway; None where there is none."""
    return os.environ.get(KEY_VARIABLE, "").strip() or None
