"""The house's four storeys: imports go only downwards, the ground floor is light, and rooms stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up: each may import itself and those before it.
STOREYS = ["rollout", "actors", "deployments", "cluster"]
MAX_LINES = 450
HEAVY = ["ray", "vllm", "torch", "renderers", "transformers", "mcp"]
FILES = {
    path.relative_to(ROOT).as_posix(): path for storey in STOREYS for path in sorted((ROOT / storey).rglob("*.py"))
}


def modules(storey: str) -> list[str]:
    names = []
    for file in FILES:
        if file.startswith(f"{storey}/"):
            parts = file.removesuffix(".py").split("/")
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(names)


def imported(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, inside functions and TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                outer = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*outer, *([node.module] if node.module else [])])
            yield node.lineno, base


def test_all_storeys_are_looked_at():
    assert {file.split("/")[0] for file in FILES} == set(STOREYS)
    assert len(FILES) > 40
    assert {"rollout.session", "rollout", "rollout.testing.scripted_engine"} <= set(modules("rollout"))


def test_the_walk_sees_every_kind_of_import(tmp_path: Path):
    path = tmp_path / "m.py"
    path.write_text(
        "import ray.serve as s, os\n"
        "from cluster.state import load\n"
        "from . import near\n"
        "from ..up import thing\n"
        "def f():\n    from deployments import app\n"
    )
    assert list(imported(path, "rollout.testing")) == [
        (1, "ray.serve"),
        (1, "os"),
        (2, "cluster.state"),
        (3, "rollout.testing"),
        (4, "rollout.up"),
        (6, "deployments"),
    ]


@pytest.mark.parametrize("file", FILES)
def test_imports_go_only_downwards(file: str):
    package = ".".join(file.split("/")[:-1])
    above = STOREYS[STOREYS.index(file.split("/")[0]) + 1 :]
    upwards = [
        f"{file}:{line}: {name}" for line, name in imported(FILES[file], package) if name.split(".")[0] in above
    ]
    assert upwards == []


@pytest.mark.parametrize("file", FILES)
def test_product_code_imports_no_tests_examples_or_benchmarks(file: str):
    outside = {"tests", "examples", "benchmarks", "pytest", "hypothesis"}
    found = [f"{file}:{line}: {name}" for line, name in imported(FILES[file], "") if name.split(".")[0] in outside]
    assert found == []


def test_nothing_in_the_product_uses_the_test_doubles():
    users = [
        file
        for file, path in FILES.items()
        if not file.startswith("rollout/testing/")
        and any(name.startswith("rollout.testing") for _, name in imported(path, ".".join(file.split("/")[:-1])))
    ]
    assert users == []


def loaded_by(statements: str) -> set[str]:
    """Which of the heavy packages a fresh process has loaded after some statements."""
    code = f"import sys\n{statements}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_ground_floor_loads_nothing_heavy():
    assert loaded_by("\n".join(f"import {name}" for name in modules("rollout"))) == set()


def test_loading_something_heavy_would_be_seen():
    assert loaded_by("import sys, types\nsys.modules['torch'] = types.ModuleType('torch')") == {"torch"}


@pytest.mark.parametrize("file", FILES)
def test_no_room_is_too_large(file: str):
    assert len(FILES[file].read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("file", FILES)
def test_every_room_says_what_it_is(file: str):
    doc = ast.get_docstring(ast.parse(FILES[file].read_text()))
    assert doc is not None and len(doc.split()) >= 3
