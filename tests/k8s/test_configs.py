"""serveConfigV2 and cluster.yaml of every folder: keys, import paths, the loader's word, and pods with the room."""

from __future__ import annotations

import importlib
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from cluster.config import ClusterConfig
from cluster.config_file import load_config
from cluster.serve_app import SECRET_VARIABLE, AppArgs
from rollout.rendering import load_renderer
from tests.conftest import ROOT
from tests.k8s.manifests import (
    APPLIED,
    CLUSTERS,
    HOME,
    JOBS,
    K8S,
    amount,
    built,
    cluster_file,
    documents,
    group,
    of_kind,
    pods,
    serve_config,
    the,
)

# The configuration that each folder brings to Kubernetes.
SOURCES = {
    "overlays/cpu-demo": "demo.yaml",
    "overlays/single-gpu-node": "qwen3-0.6b.yaml",
    "overlays/multi-node": "qwen3-8b.yaml",
    "overlays/two-nodes-72b": "qwen2.5-72b.yaml",
    "overlays/one-node-gpt-oss-120b": "gpt-oss-120b.yaml",
    "job/base": "qwen3-0.6b.yaml",
    "job/cpu-demo": "demo.yaml",
}


@pytest.fixture
def config(request: pytest.FixtureRequest, tmp_path: Path) -> ClusterConfig:
    """cluster.yaml of the folder in `name`, with the image's paths put here."""
    file = tmp_path / "cluster.yaml"
    file.write_text(cluster_file(built(request.getfixturevalue("name"))).replace(HOME, str(ROOT)))
    return load_config(file, check_engine=False)


# serveConfigV2


def unknown_keys(model: type[BaseModel], value: Any, place: str = "") -> list[str]:
    """Keys that a pydantic model has no field for, at any depth: Ray's own models take them without a word."""
    found: list[str] = []
    if not isinstance(value, dict):
        return found
    for key, inner in value.items():
        field = model.model_fields.get(key)
        if field is None:
            found.append(f"{place}{key}")
            continue
        nested = model_in(field.annotation)
        if nested is not None:
            for index, item in enumerate(inner if isinstance(inner, list) else [inner]):
                found += unknown_keys(nested, item, f"{place}{key}.{f'{index}.' if isinstance(inner, list) else ''}")
    return found


def model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        return next((m for part in typing.get_args(annotation) if (m := model_in(part)) is not None), None)
    return None


def test_misspelt_keys_would_be_seen():
    from ray.serve.schema import ServeDeploySchema

    wrong = {
        "proxy_locaton": "HeadOnly",
        "http_options": {"prot": 1},
        "applications": [{"name": "a", "import_path": "m:f", "deployments": [{"name": "d", "num_replica": 2}]}],
    }
    ServeDeploySchema.model_validate(wrong)
    assert unknown_keys(ServeDeploySchema, wrong) == [
        "proxy_locaton",
        "http_options.prot",
        "applications.0.deployments.0.num_replica",
    ]


@pytest.mark.parametrize("name", CLUSTERS)
def test_serve_config_is_rays_own_to_the_last_key(name: str):
    from ray.serve.schema import ServeDeploySchema

    given = serve_config(built(name))
    ServeDeploySchema.model_validate(given)
    assert unknown_keys(ServeDeploySchema, given) == []
    assert given["proxy_location"] == "HeadOnly" and given["http_options"] == {"host": "0.0.0.0", "port": 8000}


@pytest.mark.parametrize("name", CLUSTERS)
def test_applications_and_deployments_have_the_names_that_the_code_looks_for(name: str):
    from deployments.app import APP as ENGINE
    from deployments.app import DEPLOYMENT as ENGINES
    from deployments.gateway import APP as GATEWAY
    from deployments.supervisor import APP as CONTROLLER

    applications = {one["name"]: one for one in serve_config(built(name))["applications"]}
    assert set(applications) == {CONTROLLER, ENGINE, GATEWAY}
    assert {one: app["route_prefix"] for one, app in applications.items()} == {
        CONTROLLER: None,
        ENGINE: None,
        GATEWAY: "/",
    }
    named = {one: [d["name"] for d in app.get("deployments", [])] for one, app in applications.items()}
    assert named == {CONTROLLER: [], ENGINE: [ENGINES], GATEWAY: [GATEWAY]}


@pytest.mark.parametrize("name", CLUSTERS)
def test_import_paths_import_and_take_their_args(name: str):
    objects = built(name)
    for application in serve_config(objects)["applications"]:
        module, _, attribute = application["import_path"].partition(":")
        assert callable(getattr(importlib.import_module(module), attribute))
        args = AppArgs.model_validate(application["args"])
        for template in pods(objects).values():
            # Ray builds an application on any node.
            mounts = template["spec"]["containers"][0]["volumeMounts"]
            assert any(args.config.startswith(mount["mountPath"] + "/") for mount in mounts)
            assert template["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "rollout-keys"}}]


# cluster.yaml


def test_every_folder_has_its_source():
    assert set(SOURCES) == set(APPLIED)


@pytest.mark.parametrize("name", APPLIED)
def test_the_configuration_is_accepted(name: str, config: ClusterConfig):
    assert config.ray.address == "auto"


@pytest.mark.parametrize("name", APPLIED)
def test_vllm_takes_the_arguments(name: str, config: ClusterConfig):
    pytest.importorskip("vllm")
    from cluster.engine_args import check_engine_arguments

    assert check_engine_arguments(config.engine.vllm) == []


@pytest.mark.parametrize("name", APPLIED)
def test_it_is_the_configuration_that_the_repository_has(name: str, config: ClusterConfig):
    source = load_config(ROOT / "configs" / SOURCES[name], check_engine=False)
    for section in ("model", "sampling", "limits", "environment", "run"):
        assert getattr(config, section) == getattr(source, section), section
    assert config.engine.vllm == source.engine.vllm
    assert config.engine.device == source.engine.device


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_cluster_is_reachable_and_asks_for_keys(name: str, config: ClusterConfig):
    assert (config.gateway.host, config.gateway.port) == ("0.0.0.0", 8800)
    template = {one["metadata"]["name"]: one["stringData"] for one in documents(K8S / "secret.example.yaml")}
    assert {key.env for key in config.access.keys} | {SECRET_VARIABLE} == set(template["rollout-keys"])
    assert {scope for key in config.access.keys for scope in key.scopes} == {"serve", "trainer", "admin"}


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_journal_is_on_the_heads_volume(name: str, config: ClusterConfig):
    head = pods(built(name))["head"]["spec"]
    (mount,) = [one for one in head["containers"][0]["volumeMounts"] if one["name"] == "journal"]
    (volume,) = [one for one in head["volumes"] if one["name"] == "journal"]
    assert config.journal.path is not None and config.journal.path.startswith(mount["mountPath"] + "/")
    assert "persistentVolumeClaim" in volume and config.journal.sync


def of_volumes(name: str) -> bool:
    """Whether the models of a folder are on a volume; the demo's is in its image."""
    return not name.endswith("cpu-demo")


@pytest.mark.parametrize("name", APPLIED)
def test_every_pod_that_reads_the_file_sees_the_models(name: str):
    """Serve builds an application on any node, and a job's driver is on the head: `model.path` may be a directory."""
    for group_name, template in pods(built(name)).items():
        container = template["spec"]["containers"][0]
        mounts = {one["name"]: one for one in container["volumeMounts"]}
        variables = {one["name"]: one.get("value") for one in container["env"]}
        volumes = {one["name"]: one for one in template["spec"]["volumes"]}
        assert ("models" in mounts) == ("models" in volumes) == of_volumes(name)
        # What downloads must be able to write.
        writes = of_volumes(name) and group_name != "head"
        assert variables.get("HF_HOME") == ("/models" if writes else None)
        if of_volumes(name):
            assert mounts["models"] == {"name": "models", "mountPath": "/models"} | (
                {} if writes else {"readOnly": True}
            )
            assert set(volumes["models"]["persistentVolumeClaim"]) == {"claimName"}
            assert template["spec"]["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


@pytest.mark.parametrize("name", [name for name in APPLIED if of_volumes(name)])
def test_the_models_can_be_mounted_on_as_many_nodes_as_there_may_be(name: str):
    """A volume that is ReadWriteOnce keeps the pods of all other nodes waiting for ever."""
    (models,) = [
        one["spec"]["accessModes"]
        for one in of_kind(built(name), "PersistentVolumeClaim")
        if one["metadata"]["name"].endswith("-models")
    ]
    assert models == ["ReadWriteOnce" if name == "overlays/single-gpu-node" else "ReadWriteMany"]


@pytest.mark.parametrize("name", JOBS)
def test_the_job_has_its_files(name: str):
    words = the(built(name), "RayJob")["spec"]["entrypoint"].split()
    assert words[:3] == ["rollout", "run", "/etc/rollout/cluster.yaml"]
    tasks = words[words.index("--tasks") + 1]
    assert (ROOT / Path(tasks).relative_to(HOME)).is_file()


def test_the_demo_renders():
    text = yaml.safe_load(cluster_file(built("overlays/cpu-demo")).replace(HOME, str(ROOT)))
    assert load_renderer(text["model"]["path"]).name == "qwen3"


# Room


def engines_of(name: str, config: ClusterConfig) -> int:
    """How many engines are started."""
    if name in JOBS:
        return config.engine.replicas
    (engine,) = [one for one in serve_config(built(name))["applications"] if one["name"] == "engine"]
    return engine["deployments"][0]["num_replicas"]


def gateways_of(name: str) -> int:
    if name in JOBS:
        return 0
    (gateway,) = [one for one in serve_config(built(name))["applications"] if one["name"] == "gateway"]
    return gateway["deployments"][0]["num_replicas"]


def cpus_of_an_engine(config: ClusterConfig) -> int:
    """What Ray is asked for: one for the replica and, but with pipelines on GPUs, one for each rank."""
    pipelines = config.engine.device == "gpu" and config.engine.ranks > config.engine.tensor_parallel_size
    return 1 if pipelines else 1 + config.engine.ranks


@pytest.mark.parametrize("name", CLUSTERS)
def test_both_files_say_how_many_engines(name: str, config: ClusterConfig):
    assert engines_of(name, config) == config.engine.replicas


@pytest.mark.parametrize("name", APPLIED)
def test_the_engines_have_their_gpus(name: str, config: ClusterConfig):
    found = group(built(name), "engines")
    limits = found["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = int(limits.get("nvidia.com/gpu", 0))
    wanted = engines_of(name, config) * config.engine.ranks if config.engine.device == "gpu" else 0
    assert found["replicas"] * gpus == wanted, "no GPU idle, and none missing"
    if gpus:
        assert gpus % config.engine.tensor_parallel_size == 0, "a tensor-parallel group stays within one pod"


@pytest.mark.parametrize("name", APPLIED)
def test_the_engines_have_their_cpus_and_nobody_else_does(name: str, config: ClusterConfig):
    found = group(built(name), "engines")
    logical = int(found["rayStartParams"]["num-cpus"])
    if config.engine.ranks > config.engine.tensor_parallel_size:
        assert logical == 1, "each of its pods may be the one with the replica"
    else:
        assert found["replicas"] * logical == engines_of(name, config) * cpus_of_an_engine(config)
        assert logical % cpus_of_an_engine(config) == 0
    assert amount(found["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]) >= logical


@pytest.mark.parametrize("name", APPLIED)
def test_session_workers_and_gateways_have_their_cpus(name: str, config: ClusterConfig):
    found = group(built(name), "sessions")
    cpus = amount(found["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    # Without a supervisor the controller claims one too.
    wanted = config.workers.count + gateways_of(name) + (name in JOBS)
    assert found["minReplicas"] * cpus >= wanted


@pytest.mark.parametrize("name", APPLIED)
def test_the_engines_take_the_sessions_at_once(name: str, config: ClusterConfig):
    seats = engines_of(name, config) * config.engine.vllm["max_num_seqs"]
    assert config.workers.count * config.workers.sessions <= seats


def test_the_demo_has_a_core_of_its_own_for_no_rank():
    for name in ("overlays/cpu-demo", "job/cpu-demo"):
        text = yaml.safe_load(cluster_file(built(name)))
        assert text["engine"]["env"] == {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
