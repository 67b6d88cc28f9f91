"""What a turn costs the session worker's CPU, and a session its memory, from 100 to 10,000 concurrent sessions.

The engine is the scripted test double, which answers in microseconds, so that the figure is ours alone: rendering,
parsing, tools, ledger. Each point runs in a process of its own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

CONCURRENCY = (100, 1_000, 10_000)
# Sessions of a point, at least: a small point repeats until its figure means something.
SESSIONS = 4_000
# Simulated time of one generation: all sessions of a point are in flight together.
DELAY_S = 0.5


def measure(model: Path) -> dict[str, Any]:
    """By concurrency: CPU milliseconds per turn, kilobytes per session; and the growth from the first to the last."""
    points = {}
    for concurrent in CONCURRENCY:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.turn_cost", str(model), str(concurrent)],
            capture_output=True,
            text=True,
            check=True,
            timeout=900,
        )
        points[concurrent] = json.loads(done.stdout.splitlines()[-1])
    first, last = points[CONCURRENCY[0]], points[CONCURRENCY[-1]]
    return {
        "concurrency": points,
        "growth": last["cpu_ms_per_turn"] / first["cpu_ms_per_turn"],
        "memory_kb": last["memory_kb"],
    }


async def _point(model: Path, concurrent: int) -> dict[str, Any]:
    from actors.worker import GC_THRESHOLD
    from examples.calculator.environment import Calculator
    from rollout import Limits, Sampling, Task
    from rollout.rendering import load_renderer
    from rollout.session import Session
    from rollout.testing.scripted_engine import ScriptedEngine
    from rollout.token_model import TokenModel
    from rollout.trajectory import SessionKey

    chat = load_renderer(str(model))
    chat.warm_up()
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 47, "b": 182}}\n</tool_call><|im_end|>'
    turns = [f"<think>\nadd 47 and 182\n</think>\n\n{call}", call, "The answer is 229.<|im_end|>"]
    answers = [(chat.tokenizer.encode(text), "stop") for text in turns]
    engine = ScriptedEngine(lambda _prompt, _session, turn: answers[turn], delay=DELAY_S)
    engine.keep_prompts = False
    sampling, limits = Sampling(max_tokens=128), Limits(session_seconds=900)

    async def play(index: int) -> bool:
        # A message of its own for each session, so that nothing is remembered that would not be in real life.
        task = Task(
            task_id=f"t{index // 8}",
            messages=[{"role": "user", "content": f"What is 47 + 182? ({index // 8})"}],
            data={"answers": ["229"]},
        )
        key = SessionKey("bench", task.task_id, f"bench/{task.task_id}", index)
        model = TokenModel(key, engine, chat, sampling)
        session = Session(key, task, environment=Calculator, model=model, limits=limits)
        trajectory = await session.run()
        return trajectory.stop_reason == "stop" and trajectory.reward == 1.0

    async def wave(start: int) -> None:
        assert all(await asyncio.gather(*(play(start + index) for index in range(concurrent))))

    # A few sessions load what loads at first use; the memory of all later ones is theirs.
    assert all(await asyncio.gather(*(play(10**9 + index) for index in range(8))))
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    process = psutil.Process()
    before = peak = process.memory_info().rss

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, process.memory_info().rss)
            await asyncio.sleep(0.02)

    watcher = asyncio.create_task(watch())
    waves = max(1, SESSIONS // concurrent)
    started = time.process_time()
    for number in range(waves):
        await wave(number * concurrent)
    cpu = time.process_time() - started
    watcher.cancel()
    return {
        "cpu_ms_per_turn": 1000 * cpu / (waves * concurrent * len(turns)),
        "memory_kb": max(0, peak - before) / 1024 / concurrent,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_point(Path(sys.argv[1]), int(sys.argv[2])))))
