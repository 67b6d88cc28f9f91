"""vLLM's own OpenAI server as a subprocess: started on a free port, waited for, and stopped with all its children."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 256
START_DEADLINE_S = 300.0
STOP_DEADLINE_S = 20.0


def free_port() -> int:
    """A TCP port that is free right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def server_environment(tensor_parallel_size: int) -> dict[str, str]:
    """The variables that vLLM needs here; values set outside win."""
    wanted = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # Peers keep idle connections for longer than the default five seconds and would lose episodes to resets.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "300",
        # One list of cores per rank; without it the ranks of one NUMA node bind to the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(_core_lists(tensor_parallel_size)),
    }
    if tensor_parallel_size == 1:
        del wanted["VLLM_CPU_OMP_THREADS_BIND"]
    home = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    return {**wanted, **os.environ, "PYTHONPATH": path}


def _core_lists(ranks: int) -> list[str]:
    """The machine's cores dealt out to the ranks; more ranks than cores share them in turn."""
    cores = sorted(os.sched_getaffinity(0))
    if ranks > len(cores):
        return [str(cores[rank % len(cores)]) for rank in range(ranks)]
    share = len(cores) // ranks
    return [",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(ranks)]


def _command(model_dir: Path, port: int, tensor_parallel_size: int) -> list[str]:
    return [
        sys.executable,
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model_dir)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--tensor-parallel-size", str(tensor_parallel_size)),
        *("--dtype", "bfloat16", "--enforce-eager"),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)),
        "--enable-scale-out",  # brings /inference/v1/generate, the token-in token-out endpoint
        "--disable-uvicorn-access-log",
        # Asks for the AMX tiles, without which one rank alone dies on such CPUs (see deployments/rank_weights.py).
        *("--worker-extension-cls", "deployments.rank_weights.RankWeights"),
    ]


def _is_healthy(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def stop_group(process: subprocess.Popen[bytes], deadline: float = STOP_DEADLINE_S) -> None:
    """End a process that leads its own group, and whatever is left of the group."""
    for sign, patience in ((signal.SIGTERM, deadline), (signal.SIGKILL, deadline)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience)
    # The leader is gone; a child that survived it still has the group's id.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def vllm_server(model_dir: Path, *, tensor_parallel_size: int, log_file: Path) -> Iterator[str]:
    """Run the server for the duration of the block and yield its root address.

    Raises RuntimeError with the end of the log when it does not become healthy in time.
    """
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            _command(model_dir, port, tensor_parallel_size),
            env=server_environment(tensor_parallel_size),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own process group, so that its workers can be stopped with it
        )
        try:
            give_up_at = time.monotonic() + START_DEADLINE_S
            while not _is_healthy(base_url):
                if process.poll() is not None or time.monotonic() > give_up_at:
                    why = "ended" if process.poll() is not None else f"was not ready in {START_DEADLINE_S:.0f} s"
                    tail = log_file.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"vLLM's server {why}; the end of {log_file}:\n{tail}")
                time.sleep(0.5)
            yield base_url
        finally:
            stop_group(process)
