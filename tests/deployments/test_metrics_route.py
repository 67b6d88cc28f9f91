"""The gateway's /metrics: the controller's text, for any key, or for everybody where the config says so."""

from __future__ import annotations

import httpx
import pytest

from actors.metrics import CONTENT_TYPE
from deployments.gateway import make_app
from rollout.access import AccessKey, AccessSettings, hash_key
from rollout.access_paths import SCOPES
from rollout.errors import UnavailableError
from rollout.http_backend import HttpBackend

KEYS = tuple(AccessKey(scope, hash_key(f"key-of-{scope}"), frozenset({scope})) for scope in SCOPES)
TEXT = b"# HELP rollout_workers Session workers that answer.\n"


class Backend:
    """A TEST DOUBLE of the controller."""

    def __init__(self) -> None:
        self.failure: Exception | None = None

    async def metrics_text(self) -> bytes:
        if self.failure is not None:
            raise self.failure
        return TEXT


@pytest.fixture
def backend() -> Backend:
    return Backend()


def transport(backend: Backend, **access: object) -> httpx.ASGITransport:
    settings = AccessSettings(**access)  # type: ignore[arg-type]
    return httpx.ASGITransport(make_app(lambda: backend, 1000, settings), raise_app_exceptions=False)  # type: ignore[arg-type, return-value]


def client(backend: Backend, **access: object) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=transport(backend, **access), base_url="http://gateway")


async def test_the_text_is_the_controllers(backend: Backend):
    answer = await client(backend).get("/metrics")
    assert answer.status_code == 200 and answer.content == TEXT
    assert answer.headers["content-type"] == CONTENT_TYPE and answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("scope", ["serve", "trainer", "admin"])
async def test_any_key_may_read_it(backend: Backend, scope: str):
    http = client(backend, keys=KEYS)
    assert (await http.get("/metrics", headers={"x-api-key": f"key-of-{scope}"})).status_code == 200
    assert (await http.get("/metrics", headers={"x-api-key": "wrong"})).status_code == 401
    assert (await http.get("/metrics")).status_code == 401


async def test_made_public_it_needs_no_key_and_nothing_else_is_public(backend: Backend):
    http = client(backend, keys=KEYS, public_paths=frozenset({"/metrics"}))
    assert (await http.get("/metrics")).status_code == 200
    assert (await http.post("/metrics")).status_code == 401
    for path in ("/metrics/x", "//metrics", "/metrics/../v1/runs", "/%256detrics", "/v1/runs"):
        assert (await http.get(path)).status_code == 401, path


async def test_a_controller_that_is_away_is_a_503(backend: Backend):
    backend.failure = UnavailableError("the controller is gone")
    assert (await client(backend).get("/metrics")).status_code == 503


async def test_the_http_client_reads_it(backend: Backend):
    over_http = HttpBackend("http://gateway", transport=transport(backend))
    assert await over_http.metrics_text() == TEXT
    await over_http.close()
