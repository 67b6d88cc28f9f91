"""The manifests as the tests see them: raw files, and what kustomize makes of each folder that is applied."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

K8S = ROOT / "k8s"
SCHEMAS_VARIABLE = "ROLLOUT_K8S_SCHEMAS"
# What is applied as it is.
APPLIED = sorted(
    path.parent.relative_to(K8S).as_posix()
    for folder in ("overlays", "job")
    for path in (K8S / folder).glob("*/kustomization.yaml")
)
CLUSTERS = [name for name in APPLIED if name.startswith("overlays/")]
JOBS = [name for name in APPLIED if name.startswith("job/")]
# Where the image has the repository.
HOME = "/opt/rollout"
BUILD_SECONDS = 60


def documents(path: Path) -> list[dict[str, Any]]:
    """The objects in a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


@functools.cache
def built(name: str) -> list[dict[str, Any]]:
    """All objects of a folder, built by kustomize. Skips where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed; `kubectl kustomize` builds the overlays, without a cluster")
    done = subprocess.run(
        [kubectl, "kustomize", str(K8S / name)], capture_output=True, text=True, timeout=BUILD_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document is not None]


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Those of one kind."""
    return [found for found in objects if found["kind"] == kind]


def the(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The only one of a kind."""
    (found,) = of_kind(objects, kind)
    return found


def ray_cluster(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The RayCluster that a RayService or RayJob asks for."""
    for found in objects:
        if found["kind"] in ("RayService", "RayJob"):
            return found["spec"].get("rayClusterConfig") or found["spec"]["rayClusterSpec"]
    raise AssertionError("no RayService and no RayJob")


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pod templates of a Ray cluster by group; "head" is the head's."""
    cluster = ray_cluster(objects)
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


def group(objects: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """A worker group by its name."""
    (found,) = [group for group in ray_cluster(objects)["workerGroupSpecs"] if group["groupName"] == name]
    return found


def serve_config(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The serveConfigV2 of the only RayService."""
    return yaml.safe_load(the(objects, "RayService")["spec"]["serveConfigV2"])


def cluster_file(objects: list[dict[str, Any]]) -> str:
    """The text of cluster.yaml, as its ConfigMap has it."""
    held = [found["data"] for found in of_kind(objects, "ConfigMap")]
    (text,) = [data["cluster.yaml"] for data in held if "cluster.yaml" in data]
    return text


def amount(quantity: str | int | float) -> float:
    """A Kubernetes quantity as a number: CPUs, or bytes."""
    text = str(quantity)
    for suffix, factor in {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3}.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)


@functools.cache
def schema(kind: str) -> dict[str, Any]:
    """The JSON schema of a kind. Skips where the schemas are not at hand."""
    given = os.environ.get(SCHEMAS_VARIABLE)
    folder = Path(given) if given else ROOT.parent / "shared" / "data" / "k8s-schemas"
    if not folder.is_dir():
        pytest.skip(f"no schemas: {folder} does not exist; name a folder of them with {SCHEMAS_VARIABLE}")
    for path in (folder / f"{kind}.json", folder / "core" / f"{kind}.json"):
        if path.is_file():
            return json.loads(path.read_text())
    pytest.fail(f"{folder} has no schema of {kind}")
