"""Every manifest is what its schema says, raw and as kustomize builds it, and every folder is looked at."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.k8s.manifests import APPLIED, CLUSTERS, JOBS, K8S, amount, built, documents, of_kind, schema, the


def problems(found: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema(found["kind"]))
    return [f"{'.'.join(map(str, error.path))}: {error.message[:300]}" for error in validator.iter_errors(found)]


def raw_files() -> list[str]:
    """Files of whole objects; patches, settings and configurations are others."""
    found = []
    for path in sorted(K8S.rglob("*.yaml")):
        loaded = documents(path)
        kinds = {one.get("kind") if isinstance(one, dict) else None for one in loaded}
        if None not in kinds and not kinds & {"Kustomization", "Component"}:
            found.append(path.relative_to(K8S).as_posix())
    return found


def test_all_folders_are_looked_at():
    nodes = ("cpu-demo", "single-gpu-node", "multi-node", "two-nodes-72b", "one-node-gpt-oss-120b")
    assert {f"overlays/{name}" for name in nodes} == set(CLUSTERS)
    assert set(JOBS) == {"job/base", "job/cpu-demo"}
    assert {"base/rayservice.yaml", "base/network.yaml", "job/base/rayjob.yaml", "secret.example.yaml"} <= set(
        raw_files()
    )


@pytest.mark.parametrize("file", raw_files())
def test_a_file_of_objects_fits_their_schemas(file: str):
    for found in documents(K8S / file):
        assert problems(found) == [], f"{found['kind']} {found['metadata']['name']}"


@pytest.mark.parametrize("name", APPLIED)
def test_what_is_applied_fits_its_schemas(name: str):
    for found in built(name):
        assert problems(found) == [], f"{found['kind']} {found['metadata']['name']}"


def test_a_misspelt_field_would_be_seen():
    found = copy.deepcopy(documents(K8S / "base" / "rayservice.yaml")[0])
    assert problems(found) == []
    found["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["restartPolicies"] = "Never"
    found["spec"]["serveConfigV3"] = ""
    assert len(problems(found)) == 2


@pytest.mark.parametrize("name", APPLIED)
def test_everything_is_in_one_namespace(name: str):
    assert {found["metadata"].get("namespace") for found in built(name)} == {"rollout"}


@pytest.mark.parametrize("name", APPLIED)
def test_names_that_pods_use_are_there(name: str):
    """ConfigMaps and volumes that a pod mounts are made by the same folder; Secrets are the template's."""
    objects = built(name)
    made = {(found["kind"], found["metadata"]["name"]) for found in objects}
    secrets = {("Secret", one["metadata"]["name"]) for one in documents(K8S / "secret.example.yaml")}
    for kind, wanted in wants(objects):
        assert (kind, wanted) in made | secrets, f"{kind} {wanted} is used and nowhere made"


@pytest.mark.parametrize("name", [name for name in CLUSTERS if name != "overlays/cpu-demo"])
def test_the_download_can_be_applied_first_and_again(name: str):
    """`kubectl apply -l rollout-first=true` brings what it needs and no engine; an old one is no obstacle."""
    first = [one for one in built(name) if one["metadata"].get("labels", {}).get("rollout-first") == "true"]
    made = {(one["kind"], one["metadata"]["name"]) for one in first}
    job = the(first, "Job")
    assert wants(job) - {("Secret", "rollout-keys")} == made - {("Job", "rollout-pull")}
    assert 0 < job["spec"]["ttlSecondsAfterFinished"] <= 86400
    page = (K8S.parent / "docs" / "kubernetes.md").read_text()
    for command in (
        "-l rollout-first=true",
        "kubectl -n rollout wait --for=condition=complete job/rollout-pull",
        "kubectl -n rollout delete job rollout-pull --ignore-not-found",
    ):
        assert command in page, command


def wants(value: Any) -> set[tuple[str, str]]:
    """Kind and name of what is referred to, anywhere below a value."""
    found: set[tuple[str, str]] = set()
    if isinstance(value, dict):
        for key, inner in value.items():
            match key, inner:
                case "configMap", {"name": str(name)}:
                    found.add(("ConfigMap", name))
                case "persistentVolumeClaim", {"claimName": str(name)}:
                    found.add(("PersistentVolumeClaim", name))
                case "secretRef" | "secretKeyRef", {"name": str(name)}:
                    found.add(("Secret", name))
            found |= wants(inner)
    elif isinstance(value, list):
        for inner in value:
            found |= wants(inner)
    return found


def test_the_secret_template_holds_no_values():
    for found in documents(K8S / "secret.example.yaml"):
        assert set(found["stringData"].values()) == {""}


@pytest.mark.parametrize("name", APPLIED)
def test_images_are_pinned(name: str):
    for image in images(built(name)):
        tag = image.rpartition(":")[2]
        assert ":" in image and tag != "latest", image
        if image.startswith("rollout-cluster:"):
            assert tag.endswith("-cpu") == name.endswith("cpu-demo")


def images(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["image"]} if isinstance(value.get("image"), str) else set()
        return own.union(*(images(inner) for inner in value.values()))
    return set().union(*(images(inner) for inner in value)) if isinstance(value, list) else set()


@pytest.mark.parametrize("name", CLUSTERS)
def test_budgets_are_of_a_kind_that_kubernetes_counts(name: str):
    """Of pods that a custom resource made, only a whole `minAvailable` is enforced."""
    objects = built(name)
    found = of_kind(objects, "PodDisruptionBudget")
    assert "rollout-head" in {one["metadata"]["name"] for one in found}
    for one in found:
        assert isinstance(one["spec"].get("minAvailable"), int) and "maxUnavailable" not in one["spec"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_service_leads_to_the_head(name: str):
    objects = built(name)
    head = the(objects, "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
    (service,) = [one for one in of_kind(objects, "Service") if one["metadata"]["name"] == "rollout"]
    assert service["spec"]["selector"].items() <= head["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in head["spec"]["containers"][0]["ports"]}
    (port,) = service["spec"]["ports"]
    assert ports[port["targetPort"]] == port["port"] == 8800


def test_the_dockerfiles_pin_their_base():
    for file in ("Dockerfile", "Dockerfile.cpu"):
        text = (K8S / file).read_text()
        (base,) = [line.removeprefix("ARG BASE=") for line in text.splitlines() if line.startswith("ARG BASE=")]
        assert ":" in base and not base.endswith(":latest")
        assert "USER 1000:1000" in text
    version = (K8S.parent / "pyproject.toml").read_text().split('"vllm==')[1].split('"')[0]
    assert f"vllm/vllm-openai:v{version}" in (K8S / "Dockerfile").read_text()


def test_quantities_are_read():
    assert [amount(text) for text in ("500m", "2", "1Gi", 3)] == [0.5, 2.0, 2.0**30, 3.0]


def test_the_readme_names_every_folder():
    text = (K8S / "README.md").read_text()
    for name in APPLIED:
        assert name in text, name
    assert yaml.safe_load((Path(K8S) / "base" / "kustomization.yaml").read_text())["kind"] == "Kustomization"
