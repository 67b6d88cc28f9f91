"""A request's correlation id in the gateway's log, beside what it asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.gateway import make_app
from rollout import logs
from rollout.access import AccessKey, AccessSettings, hash_key
from rollout.api import Submitted
from rollout.logs import LogSettings, log_files
from rollout.tasks import Task

ID = "f81d4fae-7dec-11d0-a765-00a0c91e6bf6"
KEY = "q8Zr-3xT_wPl0mN5vYc7Bd2Kf9Hs4Jg1"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    logs.uninstall()


class Backend:
    """Takes tasks."""

    async def submit(self, run: str, tasks: Sequence[Task]) -> Submitted:
        return Submitted(len(tasks), 0)


async def test_submitted_tasks_lead_to_their_request_and_a_refused_key_to_nothing(tmp_path: Path):
    access = AccessSettings(keys=(AccessKey("ann", hash_key(KEY), frozenset({"trainer"})),))
    settings = LogSettings("demo", directory=str(tmp_path), secrets=frozenset({hash_key(KEY)}))
    logs.install(settings, "gateway", "g1")
    app: Any = make_app(lambda: Backend(), 10_000, access)  # type: ignore[arg-type, return-value]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        tasks = [{"task_id": name, "messages": [{"role": "user", "content": "x"}]} for name in ("a\n", "b")]
        headers = {"authorization": f"Bearer {KEY}", "x-correlation-id": ID}
        assert (await http.post("/v1/runs/r/tasks", json={"tasks": tasks}, headers=headers)).status_code == 200
        assert (await http.get(f"/v1/models/{KEY}?key={KEY}", headers={"x-correlation-id": ID})).status_code == 401
    text = "".join(path.read_text() for path in log_files(tmp_path))
    assert KEY not in text
    submitted, refused = (json.loads(line) for line in text.splitlines())
    assert submitted["message"] == "run r got 2 new tasks, from 'a\\n' to 'b'"
    assert (submitted["correlation_id"], submitted["run"], submitted["component"]) == (ID, "r", "gateway")
    assert refused["correlation_id"] == ID and "401" in refused["message"]
