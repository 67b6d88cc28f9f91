"""Generated tokens per second of the whole session path against the raw engine, in the same run.

The session path is everything: controller → session worker (rendering, parsing, ledger, environment) → lanes →
engine → record → controller → driver. Rounds alternate between the two, as the machine drifts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.work import RENDERER_OPTIONS, REPLY, TOKENS_PER_TURN, TURNS, Talk, make_tasks, sampling_for

if TYPE_CHECKING:
    from rollout import Sampling

WORK = f"{Talk.__module__}:{Talk.__qualname__}"
# Episodes of a round: enough waves that its ramp-up and tail are small.
WAVES = {64: 4, 256: 2}
# Weight updates whose pause is measured.
UPDATES = 7


def measure(model: Path, *, tensor_parallel_size: int, concurrency: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Medians over rounds, by concurrency: tokens/s and episodes/s of both paths, and their ratio."""
    from rollout.rendering import load_renderer

    chat = load_renderer(str(model), "auto", RENDERER_OPTIONS)
    opening = chat.render(make_tasks(1)[0].messages, [])
    filler = [opening[0]] * TOKENS_PER_TURN
    extended = chat.extend(opening, filler, [REPLY], [])
    assert extended is not None, "the renderer must extend this conversation"
    between = extended[len(opening) + len(filler) :]

    sampling = sampling_for(model)
    found: dict[str, Any] = {"concurrency": {}}
    with _cluster(model, tensor_parallel_size, concurrency) as (engine, controllers):
        for concurrent in concurrency:
            episodes = WAVES.get(concurrent, 2) * concurrent
            raw, ours = [], []
            for number in range(rounds + 1):
                seconds = engine.raw_episodes.remote(
                    opening, between, sampling.to_vllm(), episodes, concurrent
                ).result(timeout_s=600)
                session_seconds = _play(controllers[concurrent], episodes, f"bench-{concurrent}-{number}", sampling)
                if number:  # the first round warms both up
                    raw.append(seconds)
                    ours.append(session_seconds)
            tokens = episodes * TURNS * TOKENS_PER_TURN
            ratios = [r / o for r, o in zip(raw, ours, strict=True)]
            found["concurrency"][concurrent] = {
                "raw_tokens_per_s": tokens / statistics.median(raw),
                "session_tokens_per_s": tokens / statistics.median(ours),
                "session_episodes_per_s": episodes / statistics.median(ours),
                "raw_episodes_per_s": episodes / statistics.median(raw),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
        found["update_pause_ms_p50"] = _update_pause(controllers[concurrency[0]], model, concurrency[0], sampling)
    return found


def _update_pause(controller: Any, model: Path, sessions: int, sampling: Sampling) -> float:
    """Milliseconds that the engine stands still for new weights, median of updates under load."""
    import ray

    from rollout.api import RunRequest
    from rollout.weights import CheckpointSource

    source = CheckpointSource(path=str(model.resolve()))
    request = RunRequest.model_validate(
        {"name": "pause", "environment": {"path": WORK}, "sampling": sampling, "group_size": 1}
    )
    ray.get(controller.create_run.remote(request))
    ray.get(controller.submit.remote("pause", make_tasks(20 * sessions)))
    time.sleep(1.0)
    reports = [ray.get(controller.update_weights.remote(source)) for _ in range(UPDATES)]
    ray.get(controller.forget.remote("pause"))
    return statistics.median(report.pause_ms for report in reports)


def _play(controller: Any, episodes: int, run: str, sampling: Sampling) -> float:
    import ray

    from rollout.api import LeaseRequest, RunRequest
    from rollout.limits import Limits

    limits = Limits(max_turns=TURNS, engine_seconds=300)
    request = RunRequest.model_validate(
        {"name": run, "environment": {"path": WORK}, "sampling": sampling, "limits": limits, "group_size": 1}
    )
    ray.get(controller.create_run.remote(request))
    tasks = make_tasks(episodes)
    started = time.perf_counter()
    ray.get(controller.submit.remote(run, tasks))
    batch = ray.get(controller.lease.remote(run, LeaseRequest(groups=episodes, timeout=300)))
    ray.get(controller.acknowledge.remote(batch.lease_id))
    seconds = time.perf_counter() - started
    info = ray.get(controller.run_info.remote(run))
    expected = episodes * TURNS * TOKENS_PER_TURN
    found = (batch.table.num_rows, info.tokens)
    errors = {error for error in batch.table["error"].to_pylist() if error is not None}
    assert found == (episodes, expected), f"{found[0]} rows, {found[1]} tokens, errors {errors}: {info}"
    ray.get(controller.forget.remote(run))
    return seconds


@contextmanager
def _cluster(
    model: Path, tensor_parallel_size: int, concurrency: tuple[int, ...]
) -> Iterator[tuple[Any, dict[int, Any]]]:
    """One engine, and for each concurrency a controller with one worker that holds so many sessions."""
    import ray
    from ray import serve

    from actors.controller import Controller
    from actors.messages import ControllerSettings, WorkerSettings
    from benchmarks.raw_engine import MeasuredEngine
    from cluster import launch
    from cluster.config import ClusterConfig
    from deployments.app import APP, DEPLOYMENT, EngineSpec, build_engine_app

    config = ClusterConfig.model_validate(
        {
            "name": "bench",
            "model": {"path": str(model.resolve())},
            "engine": {
                "device": "cpu",
                "vllm": {
                    "tensor_parallel_size": tensor_parallel_size,
                    "max_model_len": 2048,
                    "max_num_seqs": 256,
                    "max_num_batched_tokens": 4096,
                },
            },
        }
    )
    with launch.ray_node(config) as node, launch.connected(node, patience=launch.RAY_START_SECONDS):
        serve.start(proxy_location="Disabled")
        spec = EngineSpec(
            model=config.model.path,
            served_name=config.model.name,
            engine_kwargs=config.llm_engine_kwargs(),
            env=config.replica_env(),
            device="cpu",
        )
        serve.run(build_engine_app(spec, MeasuredEngine), name=APP, route_prefix=None)
        controllers = {}
        for concurrent in concurrency:
            worker = WorkerSettings(
                model=config.model.path,
                revision=None,
                renderer="auto",
                renderer_options=RENDERER_OPTIONS,
                app=APP,
                deployment=DEPLOYMENT,
                sticky_margin=config.engine.sticky_margin,
                mcp_servers={},
                max_sessions=concurrent,
            )
            journal = f"{node.temp_dir}/journal-{concurrent}.sqlite"
            settings = ControllerSettings(
                worker, 1, 1, None, 300.0, journal, True, config.run_defaults(), {"HF_HUB_OFFLINE": "1"}
            )
            controllers[concurrent] = ray.remote(Controller).options(max_concurrency=100).remote(settings)
            ray.get(controllers[concurrent].spawn_workers.remote())
            ray.get(controllers[concurrent].connect.remote())
        yield serve.get_deployment_handle(DEPLOYMENT, APP), controllers
