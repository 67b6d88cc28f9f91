"""The batch rollout API over HTTP, as a client.

Invariant: a call whose answer was lost (connection reset, gateway restarted, 429, 503) is repeated until `patience`
is over, and every call that is repeated is idempotent on the other side. A batch that breaks off in the middle of its
stream is never handed out in part: the repeated call gets the same lease, and its batch from the start.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any

import httpx
import pyarrow as pa
from pydantic import TypeAdapter

from rollout.api import (
    Acknowledged,
    Batch,
    CapturedSession,
    Extension,
    LeaseRequest,
    NoBatch,
    OpenedSession,
    RunInfo,
    RunRequest,
    Submitted,
)
from rollout.capture.session_book import CaptureLimits
from rollout.errors import (
    AccessError,
    ApiError,
    BusyError,
    ConflictError,
    NotFoundError,
    RefusedError,
    RolloutError,
    UnavailableError,
)
from rollout.tasks import Task
from rollout.weights import WeightReport, WeightSource

ARROW = "application/vnd.apache.arrow.stream"
# Carries a batch's lease as JSON beside the Arrow stream in the body.
LEASE_HEADER = "x-rollout-lease"
# Seconds that a call goes on trying while nobody answers: a controller or gateway is back within about 30.
PATIENCE_S = 120.0
# Pause before a repetition: doubled each time, up to a limit, and jittered so that trainers do not come in step.
FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 3.0
# Beyond the time that the call itself may take.
READ_MARGIN_S = 60.0
WEIGHTS_SECONDS = 1200.0

_BY_STATUS: dict[int, type[ApiError]] = {
    401: AccessError,
    403: AccessError,
    404: NotFoundError,
    409: ConflictError,
    422: RefusedError,
    503: UnavailableError,
}
_INFO, _INFOS = TypeAdapter(RunInfo), TypeAdapter(list[RunInfo])
_REPORT = TypeAdapter(WeightReport)


class HttpBackend:
    """Implements rollout.backend.Backend over a gateway's address."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        patience: float = PATIENCE_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`address`: such as http://127.0.0.1:8800. `transport`: httpx's, for tests in one process."""
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._patience = patience
        self._http = httpx.AsyncClient(
            base_url=address.rstrip("/"),
            headers=headers,
            transport=transport,
            timeout=httpx.Timeout(READ_MARGIN_S, connect=5.0),
            # Shorter than the server's keep-alive, or a request meets a connection that is just being closed.
            limits=httpx.Limits(max_connections=64, keepalive_expiry=2.0),
        )

    async def create_run(self, request: RunRequest) -> RunInfo:
        """See Backend."""
        return _INFO.validate_python(await self._json("POST", "/v1/runs", request.model_dump(mode="json")))

    async def submit(self, run: str, tasks: Sequence[Task]) -> Submitted:
        """See Backend."""
        body = {"tasks": [task.model_dump(mode="json", exclude_defaults=True) for task in tasks]}
        # Tens of megabytes of JSON are written off the event loop.
        content = await asyncio.to_thread(lambda: json.dumps(body).encode())
        return Submitted(**await self._json("POST", f"/v1/runs/{run}/tasks", content=content))

    async def lease(self, run: str, request: LeaseRequest) -> Batch | NoBatch:
        """See Backend."""
        body = request.model_dump(mode="json")
        response = await self._call("POST", f"/v1/runs/{run}/leases", body, seconds=request.timeout + READ_MARGIN_S)
        if response.headers["content-type"].startswith(ARROW):
            return await self._batch(response)
        return NoBatch(**response.json())

    async def fetch(self, lease_id: str) -> Batch:
        """See Backend."""
        return await self._batch(await self._call("GET", f"/v1/leases/{lease_id}"))

    async def acknowledge(self, lease_id: str) -> Acknowledged:
        """See Backend."""
        return Acknowledged(**await self._json("POST", f"/v1/leases/{lease_id}/acknowledge"))

    async def extend(self, lease_id: str, ttl: float) -> float:
        """See Backend."""
        body = Extension(ttl=ttl).model_dump()
        return float((await self._json("POST", f"/v1/leases/{lease_id}/extend", body))["expires_at"])

    async def release(self, lease_id: str) -> None:
        """See Backend."""
        await self._json("POST", f"/v1/leases/{lease_id}/release")

    async def pause(self, run: str, paused: bool) -> RunInfo:
        """See Backend."""
        verb = "pause" if paused else "resume"
        return _INFO.validate_python(await self._json("POST", f"/v1/runs/{run}/{verb}"))

    async def cancel(self, run: str) -> RunInfo:
        """See Backend."""
        return _INFO.validate_python(await self._json("POST", f"/v1/runs/{run}/cancel"))

    async def forget(self, run: str) -> None:
        """See Backend."""
        await self._json("DELETE", f"/v1/runs/{run}")

    async def run_info(self, run: str) -> RunInfo:
        """See Backend."""
        return _INFO.validate_python(await self._json("GET", f"/v1/runs/{run}"))

    async def runs(self) -> list[RunInfo]:
        """See Backend."""
        return _INFOS.validate_python(await self._json("GET", "/v1/runs"))

    async def watch(self, run: str, timeout: float) -> RunInfo:
        """See Backend."""
        path = f"/v1/runs/{run}?wait={timeout:g}"
        return _INFO.validate_python(await self._json("GET", path, seconds=timeout + READ_MARGIN_S))

    async def update_weights(self, source: WeightSource, version: int | None) -> WeightReport:
        """See Backend."""
        body = {"source": source.model_dump(mode="json"), "version": version}
        response = await self._call("POST", "/v1/weights", body, seconds=WEIGHTS_SECONDS, repeat=version is not None)
        return _REPORT.validate_python(response.json())

    async def weights(self) -> dict[str, Any]:
        """See Backend."""
        return dict(await self._json("GET", "/v1/weights"))

    async def metrics_text(self) -> bytes:
        """See Backend."""
        return (await self._call("GET", "/metrics")).content

    async def open_session(self, run: str, task: Task | None, limits: CaptureLimits | None) -> OpenedSession:
        """See Backend."""
        body = {
            "run": run,
            "task": None if task is None else task.model_dump(mode="json"),
            "limits": None if limits is None else limits.model_dump(mode="json"),
        }
        return OpenedSession(**await self._json("POST", "/v1/sessions", body, repeat=False))

    async def session_info(self, session: str) -> CapturedSession:
        """See Backend."""
        return CapturedSession(**await self._json("GET", f"/v1/sessions/{session}"))

    async def reward_session(
        self, session: str, reward: float | None, turn_rewards: dict[str, float] | None
    ) -> CapturedSession:
        """See Backend."""
        body = {"reward": reward, "turn_rewards": turn_rewards}
        return CapturedSession(**await self._json("POST", f"/v1/sessions/{session}/reward", body))

    async def close_session(self, session: str, cancel: bool) -> CapturedSession:
        """See Backend."""
        return CapturedSession(**await self._json("POST", f"/v1/sessions/{session}/close", {"cancel": cancel}))

    async def close(self) -> None:
        """See Backend."""
        await self._http.aclose()

    async def _json(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        response = await self._call(method, path, body, **options)
        return response.json() if response.content else None

    async def _batch(self, response: httpx.Response) -> Batch:
        about = json.loads(response.headers[LEASE_HEADER])
        try:
            table = await asyncio.to_thread(_read_arrow, response.content)
        except pa.ArrowInvalid as failure:
            raise UnavailableError(f"the batch of lease {about['lease_id']} arrived broken: {failure}") from None
        return Batch(table=table, **about)

    async def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content: bytes | None = None,
        seconds: float = READ_MARGIN_S,
        repeat: bool = True,
    ) -> httpx.Response:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        pause = FIRST_PAUSE_S
        while True:
            try:
                response = await self._http.request(
                    method,
                    path,
                    json=body if content is None else None,
                    content=content,
                    headers={"content-type": "application/json"} if content is not None else None,
                    timeout=httpx.Timeout(seconds, connect=5.0),
                )
                if response.status_code < 400:
                    return response
                failure: RolloutError = _error(response)
                if not isinstance(failure, BusyError | UnavailableError):
                    raise failure
                pause = max(pause, getattr(failure, "retry_after", 0.0))
            except httpx.TransportError as lost:
                failure = UnavailableError(
                    f"{self._http.base_url} does not answer ({type(lost).__name__}: {lost}); is the cluster up? "
                    "`rollout status` says where its gateway is"
                )
            left = deadline - loop.time()
            if not repeat or left <= 0:
                raise failure
            await asyncio.sleep(min(left, pause * random.uniform(0.5, 1.0)))
            pause = min(2 * pause, MAX_PAUSE_S)


def _read_arrow(content: bytes) -> pa.Table:
    with pa.ipc.open_stream(pa.py_buffer(content)) as reader:
        return reader.read_all()


def _error(response: httpx.Response) -> ApiError:
    """The error that a response tells of."""
    status = response.status_code
    try:
        told = response.json()["error"]
        message, field = str(told["message"]), told.get("field")
    except (ValueError, KeyError, TypeError):
        message, field = f"HTTP {status}: {response.text[:300]}", None
    if status == 429:
        return BusyError(message, float(response.headers.get("retry-after", 1.0)))
    kind = _BY_STATUS.get(status, UnavailableError if status >= 500 else ApiError)
    return kind(message, field)
