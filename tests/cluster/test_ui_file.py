"""The viewer over a file: the same answers as a cluster's, from what `rollout run` left."""

from __future__ import annotations

import random
from pathlib import Path

import httpx
import pytest

from actors.scheduler import Assignment
from cluster.ui_file import make_file_app
from rollout.errors import RecordError
from rollout.record import to_table
from rollout.tasks import Task
from rollout.trajectory import SessionKey, Trajectory
from rollout.trajectory_file import TrajectoryWriter
from tests.deployments.viewing import MODEL, made_up, tokenizer


def some(count: int) -> list[Trajectory]:
    tok = tokenizer()
    found = []
    for number in range(count):
        task = Task(task_id=f"q{number // 2}", messages=[{"role": "user", "content": f"What is {number // 2}?"}])
        key = SessionKey("demo", task.task_id, f"demo/{task.task_id}", number % 2)
        found.append(made_up(tok, Assignment(key, task, 1), 3, number))
    return found


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, list[Trajectory]]:
    made = some(40)
    with TrajectoryWriter(tmp_path / "out", {"model": str(MODEL)}) as writer:
        writer.write(to_table(made))
    return tmp_path / "out", made


def client(path: Path, model: str | None = None) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(make_file_app(path, model)), base_url="http://file")


async def test_a_file_is_looked_at_as_a_cluster_is(written: tuple[Path, list[Trajectory]]):
    path, made = written
    async with client(path) as http:
        (run,) = (await http.get("/v1/runs")).json()
        assert (run["run"], run["delivered"], run["submitted"], run["group_size"]) == ("demo", 20, 20, 2)
        assert run["tokens"] == sum(one.num_sampled for one in made) and run["sessions_done"] == 40
        assert (await http.get("/v1/weights")).json()["file"] == "out"
        page = (await http.get("/v1/runs/demo/trajectories?limit=200&descending=false")).json()
        told = [(item["trajectory_id"], item["reward"], item["sampled"], item["segments"]) for item in page["items"]]
        assert told == [(o.key.trajectory_id, o.reward, o.num_sampled, max(1, len(o.segments))) for o in made]
        assert {item["group"] for item in page["items"]} == {"delivered"}
        forked = next(one for one in made if len(one.segments) == 2)
        one = (await http.get(f"/v1/trajectories/{forked.key.trajectory_id}?segment=1")).json()
        assert one["tokens"]["ids"] == [*forked.segments[1].prompt_ids, *forked.segments[1].response_ids]
        assert "".join(one["tokens"]["text"]).startswith("<|im_start|>system")
        assert (await http.get("/v1/runs/demo/history")).json()["points"] == []
        assert (await http.get("/v1/runs/other")).status_code == 404
        assert (await http.get("/ui/")).status_code == 200


async def test_rows_in_any_order_belong_together(tmp_path: Path):
    made = some(12)
    rows = to_table(made)
    places = list(range(rows.num_rows))
    random.Random(1).shuffle(places)
    with TrajectoryWriter(tmp_path / "out") as writer:
        writer.write(rows.take(places))
    async with client(tmp_path / "out" / "trajectories.parquet") as http:
        for one in made:
            told = (await http.get("/v1/trajectories/by-id", params={"id": one.key.trajectory_id})).json()
            assert [segment["index"] for segment in told["segments"]] == list(range(max(1, len(one.segments))))
            assert told["summary"]["sampled"] == one.num_sampled
            assert told["tokens"]["text"] is None and "tokenizer" in told["tokens"]["problem"]


def test_what_is_no_trajectory_file(tmp_path: Path):
    (tmp_path / "x.parquet").write_text("no")
    for path in (tmp_path, tmp_path / "x.parquet", tmp_path / "nothing"):
        with pytest.raises(RecordError):
            make_file_app(path)
