"""Fixtures for all tests. The suite never touches the network, and keeps its state files to itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "calculator" / "model"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# What a shell starts in the background ignores Ctrl-C, and so would every command that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A lone surrogate in what was captured could not be sent from one process to another."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session", autouse=True)
def _own_state_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Clusters of the tests are not the user's clusters."""
    before = os.environ.get("ROLLOUT_STATE_DIR")
    os.environ["ROLLOUT_STATE_DIR"] = str(tmp_path_factory.mktemp("state"))
    yield
    if before is None:
        del os.environ["ROLLOUT_STATE_DIR"]
    else:
        os.environ["ROLLOUT_STATE_DIR"] = before


@pytest.fixture(scope="session")
def chat():
    """The demo model's renderer, chosen as `auto` chooses it."""
    from rollout.rendering import load_renderer

    return load_renderer(str(MODEL))
