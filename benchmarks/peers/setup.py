"""Virtual environments for the peers, one each under ``.bench/``, made with uv and kept until the pins change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENTS = REPOSITORY / ".bench"
INSTALL_DEADLINE_S = 900.0

# CUDA builds that some extras ask for and nothing here uses.
EXCLUDED = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Requirements:
    """What goes into one environment."""

    packages: tuple[str, ...]
    # Installed without what they depend on: a package that wants a GPU stack for the parts we do not use.
    bare_packages: tuple[str, ...] = ()
    excluded: tuple[str, ...] = field(default=EXCLUDED)

    def fingerprint(self) -> str:
        """Changes with the pins and with our interpreter."""
        return repr((self.packages, self.bare_packages, self.excluded, sys.version_info[:2]))


@dataclass(frozen=True)
class InstallFailure:
    """Why an environment could not be made."""

    reason: str


REQUIREMENTS = {
    "verifiers": Requirements(packages=("verifiers==0.4.0", "renderers==0.1.12", "transformers>=5.16.1,<5.20")),
    "skyrl": Requirements(
        # What its generator and its HTTP client import; the whole package wants CUDA, flash-attn and its own vLLM.
        packages=(
            "torch==2.13.0",
            "transformers>=5.6.1,<=5.8.0",
            "skyrl-gym==0.4.0",
            "aiohttp",
            "loguru",
            "numpy",
            "omegaconf",
            "pydantic",
            "pyyaml",
            "tqdm",
        ),
        bare_packages=("skyrl==0.3.0",),
    ),
}


def ensure_venv(name: str, requirements: Requirements) -> Path | InstallFailure:
    """The interpreter of the environment ``.bench/<name>``, which is made first when it is missing or out of date."""
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    marker = folder / ".installed"
    if python.exists() and marker.exists() and marker.read_text() == requirements.fingerprint():
        return python
    print(f"Making {folder.relative_to(REPOSITORY)} for {name} ...", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"  # local wheels of torch are for our version
    with tempfile.TemporaryDirectory() as scratch:
        overrides = Path(scratch) / "overrides.txt"
        overrides.write_text("".join(f"{package} ; sys_platform == 'never'\n" for package in requirements.excluded))
        pip = ["pip", "install", "--quiet", "--python", str(python)]
        steps = [
            ["venv", "--quiet", "--python", version, str(folder)],
            [*pip, "--overrides", str(overrides), *map(_cpu_build, requirements.packages)],
        ]
        if requirements.bare_packages:
            steps.append([*pip, "--no-deps", *requirements.bare_packages])
        for step in steps:
            failure = _uv(step)
            if failure is not None:
                return failure
    marker.write_text(requirements.fingerprint())
    return python


def _cpu_build(requirement: str) -> str:
    """Torch's CPU build by its local version where it comes from a directory of wheels."""
    is_torch = requirement.startswith("torch==")
    return f"{requirement}+cpu" if is_torch and os.environ.get("PIP_FIND_LINKS", "").strip() else requirement


def _uv(arguments: Sequence[str]) -> InstallFailure | None:
    """Run uv; the failure, or None."""
    executable = shutil.which("uv")
    command = [executable] if executable else [sys.executable, "-m", "uv"]
    environment = dict(os.environ)
    wheels = environment.get("PIP_FIND_LINKS", "").strip()
    if wheels:
        environment["UV_FIND_LINKS"] = wheels
    else:
        environment["UV_TORCH_BACKEND"] = "cpu"
    try:
        done = subprocess.run(
            [*command, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=INSTALL_DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return InstallFailure(f"uv {arguments[0]}: {error}")
    if done.returncode:
        return InstallFailure(f"uv {arguments[0]} failed: {_short(done.stderr)}")
    return None


def _short(text: str, limit: int = 600) -> str:
    """The start of an error message on one line."""
    return " ".join(text.split())[:limit]


def failure_of(result: Path | InstallFailure) -> str | None:
    """The reason when there is no interpreter."""
    return result.reason if isinstance(result, InstallFailure) else None


__all__ = ["REQUIREMENTS", "InstallFailure", "Requirements", "ensure_venv", "failure_of"]
