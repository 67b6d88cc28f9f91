"""docs/serving.md is run: its curl commands and its Python, against the cluster, in the order of the page.

A block is named by its heading and its place below it. What cannot run here stands in ELSEWHERE with the reason.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cluster.config import ClusterConfig
from tests.conftest import MODEL, ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300, func_only=True)]

PAGE = ROOT / "docs" / "serving.md"
ADDRESS = "http://127.0.0.1:8800"
SECONDS = 60

ELSEWHERE = {
    "Serving, shell 1": "needs the hub, and starts a cluster; tests/cluster/test_pull.py has a hub's double",
}
# What an answer must say, beside being no error.
SAYS = {
    "OpenAI and Anthropic, curl 1": [r'"object":"chat.completion.chunk"', r"data: \[DONE\]\s*$"],
    "Plain inference, curl 1": [r'"event": "started"', r'"event": "end"', r"data: \[DONE\]\s*$"],
    "Agents, curl 1": [r'"name":\s*"sums"'],
    "Captured sessions, curl 1": [r'"base_url":\s*"http', r'"api_key":\s*"'],
    "Loading, curl 1": [r'"stage": "loading_to_vram"', r'"stage": "ready"', r"data: \[DONE\]\s*$"],
}


@dataclass(frozen=True)
class Block:
    """A block of the page."""

    name: str
    language: str
    line: int
    """Of the page, from 1: where its text begins."""
    text: str


def blocks() -> list[Block]:
    """All of the page's blocks; one without a language that begins with `curl` or `rollout` is a shell's."""
    found: list[Block] = []
    heading, counted = "", dict[str, int]()
    opened: tuple[str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(PAGE.read_text().splitlines(), 1):
        if opened is None and line.startswith("```"):
            opened, lines = (line.removeprefix("```").strip(), number + 1), []
        elif opened is None:
            if line.startswith("#"):
                heading, counted = line.lstrip("# "), {}
        elif line == "```":
            begins = lines[0].partition(" ")[0]
            language = opened[0] or {"curl": "curl", "rollout": "shell"}.get(begins, "picture")
            counted[language] = counted.get(language, 0) + 1
            name = f"{heading}, {language} {counted[language]}"
            found.append(Block(name, language, opened[1], "\n".join(lines) + "\n"))
            opened = None
        else:
            lines.append(line)
    assert opened is None, f"the block of line {opened} is not closed"
    return found


BLOCKS = {block.name: block for block in blocks()}
CURL = [name for name, block in BLOCKS.items() if block.language == "curl" and name not in ELSEWHERE]
PYTHON = [name for name, block in BLOCKS.items() if block.language == "python" and name not in ELSEWHERE]


def test_the_lists_name_blocks_of_the_page():
    assert ELSEWHERE.keys() | SAYS.keys() <= BLOCKS.keys()
    rest = {name for name, block in BLOCKS.items() if block.language not in ("curl", "python", "yaml", "picture")}
    assert rest == ELSEWHERE.keys(), "what is not run is listed, with the reason"
    assert len(CURL) >= 5 and len(PYTHON) >= 4, "the page's blocks are not found any more"
    assert all(ADDRESS in BLOCKS[name].text for name in CURL)


@pytest.mark.parametrize("name", CURL)
def test_curl(address: str, name: str):
    # A status from 400 on is a failure, and what the server said is shown.
    script = re.sub(r"\bcurl ", f"curl -sS --fail-with-body --max-time {SECONDS} ", BLOCKS[name].text)
    done = subprocess.run(
        ["bash", "-euc", script.replace(ADDRESS, address)], capture_output=True, text=True, timeout=2 * SECONDS
    )
    assert done.returncode == 0, f"line {BLOCKS[name].line}: {done.stdout}{done.stderr}"
    for wanted in SAYS.get(name, []):
        assert re.search(wanted, done.stdout), f"line {BLOCKS[name].line}: no {wanted} in {done.stdout}"


def test_python(address: str, tmp_path: Path):
    """One script, as a reader goes down the page. Its lines have the page's numbers, so a stack leads there."""
    lines: list[str] = []
    for name in PYTHON:
        lines += [""] * (BLOCKS[name].line - 1 - len(lines))
        lines += BLOCKS[name].text.splitlines()
    # The page's run is not left to the other tests, and its token is read as a cluster with its `access.jwt` would.
    lines += ["client.forget(run)", "from rollout.access import JwtSettings, read_token"]
    lines += [f"settings = JwtSettings(**{_jwt_of_the_page()!r}, key=os.environ['JWT_SECRET'])"]
    lines += ["print(read_token(settings, token.encode()))"]
    script = tmp_path / "serving.py"
    script.write_text("\n".join(lines).replace(ADDRESS, address))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=2 * SECONDS, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JWT_SECRET": "s" * 32},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # The demo model is hasty and may answer without its calculator: what it says is not this page's promise.
    assert re.search(r"^ChatCompletion\(.*finish_reason='stop'", done.stdout, re.MULTILINE), (
        f"the agent: {done.stdout}"
    )
    assert re.search(r"^\['[0-9a-f]{32}'\]$", done.stdout, re.MULTILINE), f"the session's call: {done.stdout}"
    assert re.search(r"^Caller\(name='jwt:ann', scopes=frozenset\(\{'serve'\}\)", done.stdout, re.MULTILINE), (
        done.stdout
    )


def _jwt_of_the_page() -> dict[str, str]:
    (text,) = (block.text for block in BLOCKS.values() if block.language == "yaml" and "\n  jwt:" in block.text)
    given = yaml.safe_load(text)["access"]["jwt"]
    assert given.pop("secret_env") == "JWT_SECRET"
    return given


@pytest.mark.parametrize("name", [name for name, block in BLOCKS.items() if block.language == "yaml"])
def test_yaml_is_of_a_config(name: str):
    given = yaml.safe_load(BLOCKS[name].text)
    ClusterConfig.model_validate({"name": "page", "model": {"path": str(MODEL)}, **given})
