"""What is kept for viewing, and the viewer over a real run service."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actors.gallery import Gallery
from actors.rows import to_rows
from actors.scheduler import Assignment
from actors.viewer import Viewer
from rollout.api import LeaseRequest, RunRequest
from rollout.errors import NotFoundError
from rollout.ledger import Segment
from rollout.record import check
from rollout.tasks import Task
from rollout.tool_calls import ToolCallRecord
from rollout.trajectory import SessionKey, Timing, Trajectory
from rollout.viewing import TrajectoryQuery
from tests.actors.service import Service, play, tasks


def trajectory(
    task: str = "t",
    index: int = 0,
    *,
    run: str = "r",
    version: int = 0,
    tokens: int = 3,
    segments: int = 1,
    **fields: object,
) -> Trajectory:
    parts = [
        Segment(
            array("i", [1, 2]),
            array("i", range(tokens)),
            array("b", [1] * tokens),
            array("f", [-0.1] * tokens),
            array("i", [version] * tokens),
            fork_reason="because" if number else None,
        )
        for number in range(segments)
    ]
    messages = fields.pop("messages", [{"role": "user", "content": f"What is {task}?"}])
    return Trajectory(SessionKey(run, task, f"{run}/{task}", index), parts, "stop", messages, **fields)  # type: ignore[arg-type]


def block(*made: Trajectory) -> tuple[bytes, list]:
    return to_rows(list(made))


# Bounds


def test_the_newest_are_kept():
    gallery = Gallery(max_trajectories=3)
    for number in range(5):
        rows, summaries = block(trajectory(f"t{number}"))
        gallery.put(rows, summaries, 0, float(number))
    assert [entry.summary.trajectory_id for entry in gallery.entries(None)] == ["r/t2/0", "r/t3/0", "r/t4/0"]
    assert gallery.newest == 5
    assert gallery.num_bytes == 3 * len(rows)
    assert gallery.get("r/t1/0") is None and gallery.group("r/t1") == []


def test_bytes_are_bounded_and_shared_by_a_block():
    rows, summaries = block(trajectory("a"), trajectory("b"))
    gallery = Gallery(max_bytes=2 * len(rows))
    for _ in range(4):
        gallery.put(rows, summaries, 0, 0.0)
        assert gallery.num_bytes <= 2 * len(rows)
    assert len(gallery) == 2
    gallery.put(*block(trajectory("c", tokens=100_000)), 0, 0.0)
    assert len(gallery) == 2, "a block above the bound is not kept, and drives nothing out"


@pytest.mark.parametrize("bounds", [{"max_trajectories": 0}, {"max_bytes": 0}])
def test_nothing_is_kept_where_nothing_may_be(bounds: dict[str, int]):
    gallery = Gallery(**bounds)
    gallery.put(*block(trajectory()), 0, 0.0)
    assert len(gallery) == 0 and gallery.num_bytes == 0


def test_the_same_again_takes_the_place_of_the_first():
    gallery = Gallery()
    gallery.put(*block(trajectory(reward=0.0)), 0, 0.0)
    gallery.put(*block(trajectory(reward=1.0)), 0, 0.0)
    assert [entry.summary.reward for entry in gallery.entries("r")] == [1.0]
    assert len(gallery.group("r/t")) == 1


def test_a_forgotten_run_leaves_nothing():
    gallery = Gallery()
    gallery.put(*block(trajectory(), trajectory(run="other")), 0, 0.0)
    gallery.forget("r")
    assert [entry.summary.run for entry in gallery.entries(None)] == ["other"]
    gallery.forget("other")
    assert gallery.num_bytes == 0


# Looking, over a service


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    made = Service(tmp_path / "journal.sqlite")
    yield made
    await made.close()


@pytest.fixture
def viewer(service: Service) -> Viewer:
    return Viewer(service.store)


async def put(service: Service, *made: Trajectory, **request: object) -> None:
    """A run `r` whose tasks' single samples are these."""
    await service.runs.create(RunRequest.model_validate({"name": "r", "group_size": 1, **request}))
    names = [one.key.task_id for one in made]
    await service.runs.submit(
        "r", [Task(task_id=name, messages=[{"role": "user", "content": name}]) for name in names]
    )
    begun = {assignment.key.task_id: assignment for assignment in service.start()}
    by_name = {one.key.task_id: one for one in made}
    for name in names:
        await service.finish([begun[name]], lambda a: by_name[a.key.task_id])


async def ids(viewer: Viewer, run: str | None = "r", **query: object) -> list[str]:
    page = await viewer.trajectories(run, TrajectoryQuery.model_validate(query))
    return [item.task_id for item in page.items]


async def test_filters_and_orders(service: Service, viewer: Viewer):
    failed = [ToolCallRecord("add", True, 0.1), ToolCallRecord("add", False, 0.1, "timeout: too long")]
    await put(
        service,
        trajectory("a", reward=0.0, tokens=5, timing=Timing(total_s=3.0)),
        trajectory("b", reward=1.0, tokens=9, version=2, timing=Timing(total_s=1.0)),
        trajectory("c", reward=None, segments=2, timing=Timing(total_s=2.0)),
        trajectory("d", reward=0.5, tool_calls=failed),
        Trajectory(SessionKey("r", "e", "r/e", 0), [], "error", [], error="engine_died: gone"),
    )
    assert await ids(viewer) == ["e", "d", "c", "b", "a"]
    assert await ids(viewer, descending=False) == ["a", "b", "c", "d", "e"]
    assert await ids(viewer, stop_reason=["error"]) == ["e"]
    assert await ids(viewer, min_reward=0.5) == ["d", "b"]
    assert await ids(viewer, max_reward=0.5) == ["d", "a"]
    assert await ids(viewer, scored=False) == ["e", "c"]
    assert await ids(viewer, forks=True) == ["c"]
    assert await ids(viewer, tool_errors=True) == ["d"]
    assert await ids(viewer, version=2) == ["b"]
    assert await ids(viewer, version=7) == []
    assert await ids(viewer, sort="reward") == ["b", "d", "a", "e", "c"], "those without a reward come last"
    assert await ids(viewer, sort="reward", descending=False) == ["a", "d", "b", "e", "c"]
    assert await ids(viewer, sort="tokens", limit=1) == ["b"]
    assert await ids(viewer, sort="seconds", limit=3) == ["a", "c", "b"]
    assert await ids(viewer, sort="staleness", limit=1) == ["d"]
    with pytest.raises(ValueError, match="nothing can match"):
        TrajectoryQuery(min_reward=1, max_reward=0)


async def test_text_is_found_as_people_write_it(service: Service, viewer: Viewer):
    await put(
        service,
        trajectory("a", messages=[{"role": "user", "content": 'He said "Größe"\nand left.'}]),
        trajectory("b", messages=[{"role": "user", "content": "100% (sure)? [x] \\d+"}]),
        trajectory("c", messages=[{"role": "assistant", "content": "nothing"}]),
        Trajectory(SessionKey("r", "e", "r/e", 0), [], "error", [], error="engine_died: the replica is gone"),
    )
    assert await ids(viewer, text="grösse") == []
    assert await ids(viewer, text="GRÖSSE") == []
    assert await ids(viewer, text="GRößE") == ["a"]
    assert await ids(viewer, text='"Größe"\nand') == ["a"]
    assert await ids(viewer, text="(sure)? [x] \\d+") == ["b"], "no pattern, but text"
    assert await ids(viewer, text="REPLICA") == ["e"]
    assert await ids(viewer, text="r/c/") == ["c"]
    assert await ids(viewer, text="nowhere") == []


async def test_pages_do_not_move_while_others_finish(service: Service, viewer: Viewer):
    await put(service, *(trajectory(f"t{number}") for number in range(5)))
    first = await viewer.trajectories("r", TrajectoryQuery(limit=2))
    assert [item.task_id for item in first.items] == ["t4", "t3"]
    assert (first.matched, first.kept) == (5, 5)
    await service.runs.submit("r", [Task(task_id="later", messages=[{"role": "user", "content": "?"}])])
    await service.work()
    assert await ids(viewer, limit=2, offset=2, upto=first.newest) == ["t2", "t1"]
    assert await ids(viewer, limit=2) == ["later", "t4"]


async def test_a_line_tells_how_it_began_and_what_became_of_it(service: Service, viewer: Viewer):
    long = "word " * 200
    await put(
        service,
        trajectory(
            "a", messages=[{"role": "system", "content": "s"}, {"role": "user", "content": 'Is "x"\t so?\\n'}]
        ),
        trajectory("b", messages=[{"role": "user", "content": long}], error="environment: close failed"),
        trajectory("c", messages=[{"content": "no role"}]),
        trajectory("d", messages=[{"role": "user", "content": [{"type": "text", "text": "parts"}]}]),
    )
    page = await viewer.trajectories("r", TrajectoryQuery(descending=False))
    assert [item.opening for item in page.items] == ['Is "x"\t so?\\n', long[:240], None, None]
    assert page.items[1].error == "environment: close failed"
    assert [item.group for item in page.items] == ["ready"] * 4
    lease = await service.delivery.lease("r", LeaseRequest(groups=2, timeout=0))
    assert [i.group for i in (await viewer.trajectories("r", TrajectoryQuery(descending=False))).items] == [
        "leased", "leased", "ready", "ready",
    ]  # fmt: skip
    await service.delivery.acknowledge(lease.lease_id)
    assert await ids(viewer, group=["delivered"]) == ["b", "a"], "delivered ones can still be looked at"
    one = await viewer.trajectory("r/a/0")
    check(one.table)
    assert one.summary.group == "delivered" and one.table["trajectory_id"].to_pylist() == ["r/a/0"]


async def test_dropped_and_replaced_groups_say_why(service: Service, viewer: Viewer):
    await service.runs.create(RunRequest(name="r", group_size=2, filters={"drop_zero_variance": True}))
    await service.runs.submit("r", tasks(1))
    await service.work()
    items = (await viewer.trajectories("r", TrajectoryQuery())).items
    assert [(item.group, item.group_reason) for item in items] == [("dropped", "zero_variance")] * 2
    await service.runs.create(RunRequest(name="s", group_size=1, max_staleness=0, batch_groups=4))
    await service.runs.submit("s", tasks(1))
    await service.work()
    service.runs.set_version(1)
    items = (await viewer.trajectories("s", TrajectoryQuery())).items
    assert [(item.group, item.group_reason) for item in items] == [("replaced", "stale")]
    await service.work(lambda assignment: play(assignment, version=1))
    assert await ids(viewer, "s", group=["ready"]) == ["t0"]


async def test_one_comes_with_its_group_and_its_rows_alone(service: Service, viewer: Viewer):
    await service.runs.create(RunRequest(name="r", group_size=3))
    await service.runs.submit("r", tasks(2))

    def make(assignment: Assignment) -> Trajectory:
        key = assignment.key
        return trajectory(key.task_id, key.sample_index, segments=2, reward=key.sample_index / 2)

    await service.work(make)
    one = await viewer.trajectory("r/t1/1")
    check(one.table)
    assert one.table["segment_index"].to_pylist() == [0, 1]
    assert one.table.nbytes < 2_000, "the other trajectories of its block are not sent along"
    assert [(s.sample_index, s.reward) for s in one.siblings] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    with pytest.raises(NotFoundError, match="not among those kept"):
        await viewer.trajectory("r/t1/9")
    with pytest.raises(NotFoundError, match="no run"):
        await viewer.trajectories("nobody", TrajectoryQuery())
    with pytest.raises(NotFoundError, match="no run"):
        await viewer.history("nobody")


async def test_all_runs_together(service: Service, viewer: Viewer):
    for run in ("a", "b"):
        await service.runs.create(RunRequest(name=run))
        await service.runs.submit(run, tasks(1))
        await service.work()
    page = await viewer.trajectories(None, TrajectoryQuery())
    assert [item.run for item in page.items] == ["b", "b", "a", "a"] and page.versions == [0]
    history = await viewer.history("a")
    assert sum(point.sessions for point in history.points) == 2 and history.points[0].reward_sum == 2.0


async def test_after_a_restart_what_was_not_delivered_is_there(tmp_path: Path):
    first = Service(tmp_path / "again.sqlite")
    await first.runs.create(RunRequest(name="r"))
    await first.runs.submit("r", tasks(2))
    await first.work()
    await first.close()
    second = Service(tmp_path / "again.sqlite")
    page = await Viewer(second.store).trajectories("r", TrajectoryQuery())
    assert page.kept == 4 and {item.finished_at for item in page.items} == {None}
    assert {item.group for item in page.items} == {"ready"}
    await second.close()
