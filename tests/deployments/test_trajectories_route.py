"""The routes of the viewer: lists, one trajectory, history; and the page's files with their headers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from deployments.gateway import make_app
from deployments.routes import ui
from deployments.token_text import TokenizerText
from rollout.access import AccessKey, AccessSettings, hash_key
from rollout.access_paths import needed_scope
from tests.actors.service import Service
from tests.deployments.viewing import LONG_TOKENS, MODEL, Shown, fill

KEY, SERVE = "k" * 40, "s" * 40
LONG_ID = "terminal-agent/nightly/../job/0"


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    made = Service(tmp_path / "journal.sqlite")
    await fill(made, tasks=8, group_size=2)
    yield made
    await made.close()


def http_of(service: Service, *, access: AccessSettings | None = None, text: bool = True) -> httpx.AsyncClient:
    app = make_app(
        lambda: Shown(service),  # type: ignore[arg-type, return-value]
        50_000,
        access,
        token_text=TokenizerText(str(MODEL)) if text else None,
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with http_of(service) as client:
        yield client


async def test_pages_of_a_run_and_of_all(http: httpx.AsyncClient):
    page = (await http.get("/v1/runs/calculator-grpo/trajectories", params={"limit": 3})).json()
    assert len(page["items"]) == 3 and page["matched"] == page["kept"] == 16
    assert {item["run"] for item in page["items"]} == {"calculator-grpo"}
    everything = (await http.get("/v1/trajectories", params={"limit": 200})).json()
    assert everything["kept"] == 17 and everything["items"][0]["trajectory_id"] == LONG_ID
    two = {"stop_reason": ["stop", "length"], "scored": "true", "limit": 200}
    assert {i["stop_reason"] for i in (await http.get("/v1/trajectories", params=two)).json()["items"]} <= {
        "stop",
        "length",
    }
    assert (await http.get("/v1/runs/nobody/trajectories")).status_code == 404


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1000", "sort=id", "stop_reason=no", "min_reward=nan", "min_reward=2&max_reward=1",
              "offset=-1", "text=" + "x" * 300, "unknown=1"]
)  # fmt: skip
async def test_bad_queries_are_422(http: httpx.AsyncClient, query: str):
    told = await http.get(f"/v1/trajectories?{query}")
    assert told.status_code == 422 and told.json()["error"]["message"]


async def test_one_with_its_tokens_as_text(http: httpx.AsyncClient):
    told = (await http.get("/v1/trajectories/by-id", params={"id": LONG_ID})).json()
    tokens = told["tokens"]
    assert len(tokens["ids"]) == len(tokens["text"]) == tokens["total"] > LONG_TOKENS
    assert sum(count for _, count in tokens["mask"]) == tokens["total"]
    assert len(tokens["logprobs"]) == sum(count for value, count in tokens["mask"] if value)
    text = "".join(tokens["text"])
    assert text.startswith("<|im_start|>system\nYou are an agent") and text.endswith("<|im_end|>")
    assert told["siblings"] == [{"trajectory_id": LONG_ID, "sample_index": 0, "stop_reason": "stop", "reward": 1.0}]
    assert told["summary"]["group"] == "ready" and len(told["message_turns"]) == len(told["messages"])
    part = (await http.get("/v1/trajectories/by-id", params={"id": LONG_ID, "start": 500, "limit": 20})).json()[
        "tokens"
    ]
    assert part["text"] == tokens["text"][500:520] and part["ids"] == tokens["ids"][500:520]
    bare = (await http.get("/v1/trajectories/by-id", params={"id": LONG_ID, "limit": 0})).json()
    assert bare["tokens"]["ids"] == [] and bare["messages"] == told["messages"]


async def test_ids_stand_in_the_path_too(http: httpx.AsyncClient):
    (item,) = (await http.get("/v1/runs/calculator-grpo/trajectories?limit=1&forks=true")).json()["items"]
    answer = await http.get(f"/v1/trajectories/{item['trajectory_id']}", params={"segment": 1})
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    assert answer.json()["tokens"]["segment"] == 1
    assert answer.json()["segments"][1]["fork_reason"]
    for params, field in (({"segment": 9}, "segment"), ({"id": "no/such/one"}, "trajectory_id")):
        told = await http.get("/v1/trajectories/by-id", params={"id": item["trajectory_id"], **params})
        assert told.status_code == 404 and told.json()["error"]["field"] == field
    assert (await http.get("/v1/trajectories/by-id")).status_code == 422
    assert (await http.get("/v1/trajectories/by-id", params={"id": LONG_ID, "limit": 10**6})).status_code == 422


async def test_without_a_tokenizer_there_are_numbers_and_a_reason(service: Service):
    async with http_of(service, text=False) as http:
        tokens = (await http.get("/v1/trajectories/by-id", params={"id": LONG_ID})).json()["tokens"]
    assert tokens["text"] is None and "tokenizer" in tokens["problem"] and tokens["ids"]


async def test_history(http: httpx.AsyncClient):
    told = (await http.get("/v1/runs/calculator-grpo/history")).json()
    assert sum(point["sessions"] for point in told["points"]) == 16 and told["now"] > told["points"][-1]["at"]
    assert (await http.get("/v1/runs/nobody/history")).status_code == 404


async def test_the_page_needs_no_key_and_its_data_does(service: Service):
    keys = (
        AccessKey("trainer", hash_key(KEY), frozenset({"trainer"})),
        AccessKey("app", hash_key(SERVE), frozenset({"serve"})),
    )
    async with http_of(service, access=AccessSettings(keys=keys)) as http:
        for path in ("/ui/", "/ui/app.js", "/ui/style.css", "/ui/icon.svg"):
            assert (await http.get(path)).status_code == 200
        for path in ("/v1/trajectories", f"/v1/trajectories/by-id?id={LONG_ID}", "/v1/runs/calculator-grpo/history"):
            assert (await http.get(path)).status_code == 401
            assert (await http.get(path, headers={"authorization": f"Bearer {SERVE}"})).status_code == 403
            assert (await http.get(path, headers={"authorization": f"Bearer {KEY}"})).status_code == 200


def test_only_reading_is_open():
    assert needed_scope("GET", "/ui") is None and needed_scope("HEAD", "/ui/app.js") is None
    assert needed_scope("POST", "/ui/app.js") == needed_scope("DELETE", "/v1/trajectories/r/t/0") == "admin"
    assert needed_scope("GET", "/ui/../v1/runs") != needed_scope("GET", "/ui/")


# The page's files


async def test_a_page_that_can_run_nothing_from_elsewhere(http: httpx.AsyncClient):
    there = await http.get("/ui")
    assert there.status_code == 307 and there.headers["location"] == "ui/"
    page = await http.get("/ui/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "connect-src 'self'" in policy
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert (await http.get("/ui/app.js")).headers["content-type"].startswith("text/javascript")


async def test_files_are_asked_about_and_sent_once(http: httpx.AsyncClient):
    first = await http.get("/ui/app.js")
    tag = first.headers["etag"]
    again = await http.get("/ui/app.js", headers={"if-none-match": f'W/"other", {tag}'})
    assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == tag
    assert (await http.get("/ui/app.js", headers={"if-none-match": '"old"'})).status_code == 200
    head = await http.head("/ui/app.js")
    assert (
        head.status_code == 200 and head.content == b"" and head.headers["content-length"] == str(len(first.content))
    )


@pytest.mark.parametrize(
    "path",
    [
        "/ui/nothing.js",
        "/ui/../gateway.py",
        "/ui/%2e%2e/gateway.py",
        "/ui/..%2f..%2fpyproject.toml",
        "/ui//etc/passwd",
    ],
)
async def test_nothing_else_is_served(http: httpx.AsyncClient, path: str):
    answer = await http.get(path)
    assert answer.status_code == 404 and b"import" not in answer.content


def test_the_files_refer_to_each_other_and_to_nothing_outside():
    texts = {path.name: path.read_text() for path in ui.FOLDER.iterdir()}
    for name, text in texts.items():
        outside = [word for word in ("https://", "innerHTML", "eval(", "insertAdjacentHTML") if word in text]
        assert outside == [], name
        assert len(text.splitlines()) <= 450
    scripts = {name for name in texts if name.endswith(".js")} - {"theme.js", "app.js"}
    loaded = {name for name in scripts if any(f'from "./{name}"' in text for text in texts.values())}
    assert scripts == loaded
    for name in ("style.css", "views.css", "tokens.css", "theme.js", "app.js", "icon.svg"):
        assert f'"{name}"' in texts["index.html"]
