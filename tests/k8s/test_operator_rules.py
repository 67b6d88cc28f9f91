"""What KubeRay's operator checks in code, and what its users learnt the hard way: no schema holds it."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import pytest

from rollout.logs import DIRECTORY_VARIABLE
from tests.k8s.manifests import APPLIED, CLUSTERS, amount, built, group, pods, ray_cluster, the

DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
# Names of what the operator derives from ours must still fit into 63 characters.
LONGEST = {"RayService": 47, "RayJob": 47, "RayCluster": 53}
STRATEGIES = {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"}
REDIS_VARIABLES = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_external_storage_namespace"}


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    return template["spec"]["containers"]


def variables(template: dict[str, Any]) -> dict[str, Any]:
    return {one["name"]: one.get("value") for container in containers(template) for one in container.get("env", [])}


def start_params(objects: list[dict[str, Any]]) -> list[dict[str, str]]:
    cluster = ray_cluster(objects)
    return [one["rayStartParams"] for one in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("name", APPLIED)
def test_names_are_short_and_dns_1035(name: str):
    for found in built(name):
        if (longest := LONGEST.get(found["kind"])) is not None:
            own = found["metadata"]["name"]
            assert DNS_1035.fullmatch(own) and len(own) <= longest
    groups = [one["groupName"] for one in ray_cluster(built(name))["workerGroupSpecs"]]
    assert len(set(groups)) == len(groups)
    assert all(DNS_1035.fullmatch(one) for one in groups)


@pytest.mark.parametrize("name", CLUSTERS)
def test_an_upgrade_never_needs_the_gpus_twice(name: str):
    kind = the(built(name), "RayService")["spec"]["upgradeStrategy"]["type"]
    assert kind in STRATEGIES
    assert kind == "None", "a second cluster would also mount the journal"


@pytest.mark.parametrize("name", APPLIED)
def test_the_ray_version_is_that_of_the_image(name: str):
    """Probes and token authentication depend on it."""
    cluster = ray_cluster(built(name))
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    major, minor, _ = map(int, cluster["rayVersion"].split("."))
    assert (major, minor) >= (2, 53)


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_second_autoscaler_and_its_restart_policy(name: str):
    cluster = ray_cluster(built(name))
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for template in pods(built(name)).values():
        assert template["spec"].get("restartPolicy", "Never") == "Never"
    for one in cluster["workerGroupSpecs"]:
        assert one["minReplicas"] <= one["replicas"] <= one["maxReplicas"]
        assert one["numOfHosts"] == 1


@pytest.mark.parametrize("name", APPLIED)
def test_redis_is_named_in_one_place_alone(name: str):
    objects = built(name)
    for template in pods(objects).values():
        assert not variables(template).keys() & REDIS_VARIABLES
    for params in start_params(objects):
        assert not params.keys() & {"redis-password", "redis-username"}
    options = ray_cluster(objects).get("gcsFaultToleranceOptions")
    if options is not None:
        assert "externalStorageNamespace" not in options
        assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "rollout-redis", "key": "password"}
        host, _, port = options["redisAddress"].partition(":")
        assert (host, port) == ("rollout-redis", "6379")
        assert [one for one in objects if one["kind"] == "StatefulSet" and one["metadata"]["name"] == host]
        annotations = the(objects, "RayService")["metadata"].get("annotations", {})
        assert "ray.io/ft-enabled" not in annotations


def test_clusters_of_several_nodes_outlive_their_head():
    for name in ("overlays/multi-node", "overlays/two-nodes-72b"):
        assert "gcsFaultToleranceOptions" in ray_cluster(built(name))


@pytest.mark.parametrize("name", APPLIED)
def test_nothing_is_scheduled_on_the_head(name: str):
    objects = built(name)
    params = ray_cluster(objects)["headGroupSpec"]["rayStartParams"]
    assert params["num-cpus"] == params["num-gpus"] == "0"
    ports = {port["containerPort"] for port in containers(pods(objects)["head"])[0]["ports"]}
    assert {6379, 8265, 10001, 8080} <= ports
    for parameters in start_params(objects):
        assert all(isinstance(value, str) for value in parameters.values())


@pytest.mark.parametrize("name", CLUSTERS)
def test_workers_are_ready_without_a_serve_proxy(name: str):
    """The operator's own probe asks for one, and session workers' pods have none."""
    for one, template in pods(built(name)).items():
        container = containers(template)[0]
        if one == "head":
            # Left to the operator, which waits for it before it deploys: a probe of the cluster would never end.
            assert "readinessProbe" not in container
            continue
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/local_raylet_healthz", "port": 52365}


@pytest.mark.parametrize("name", CLUSTERS)
def test_pods_have_time_to_drain(name: str):
    for template in pods(built(name)).values():
        drain = float(variables(template)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 0 < drain < template["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", APPLIED)
def test_what_processes_say_reaches_kubectl_logs(name: str):
    """Ray's nodes and workers redirect their output into files of the pod unless they find this, and exactly "1"."""
    from ray._private.ray_constants import LOGGING_REDIRECT_STDERR_ENVIRONMENT_VARIABLE as REDIRECTION

    for template in pods(built(name)).values():
        assert variables(template)[REDIRECTION] == "1"
        # A directory of the pod would take all but warnings away from standard error, and would end with it.
        assert DIRECTORY_VARIABLE not in variables(template)


@pytest.mark.parametrize("name", APPLIED)
def test_pods_run_as_nobody_special(name: str):
    for template in pods(built(name)).values():
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True and security["fsGroup"] == 1000
        for container in containers(template):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


@pytest.mark.parametrize("name", APPLIED)
def test_gpu_pods_are_whole(name: str):
    """Limits are requests, other pods keep away, and NCCL has shared memory that fits into the pod's."""
    template = pods(built(name))["engines"]
    resources = containers(template)[0]["resources"]
    gpus = resources["limits"].get("nvidia.com/gpu")
    if gpus is None:
        assert name.endswith("cpu-demo")
        return
    assert resources["requests"] == resources["limits"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in template["spec"]["tolerations"]
    assert any(key.startswith("nvidia.com/gpu") for key in template["spec"]["nodeSelector"])
    (shm,) = [one["emptyDir"] for one in template["spec"]["volumes"] if one["name"] == "shm"]
    assert shm["medium"] == "Memory"
    assert 2**33 <= amount(shm["sizeLimit"]) <= amount(resources["limits"]["memory"]) / 4
    assert {"name": "shm", "mountPath": "/dev/shm"} in containers(template)[0]["volumeMounts"]
    assert group(built(name), "engines")["rayStartParams"]["num-gpus"] == gpus


@pytest.mark.parametrize("name", APPLIED)
def test_no_threshold_that_does_nothing(name: str):
    for found in built(name):
        if found["kind"] == "RayService":
            dead = {"serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold"}
            assert not dead & found["spec"].keys()


def test_a_job_ends_with_its_file_in_a_volume():
    job = the(built("job/base"), "RayJob")["spec"]
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    words = job["entrypoint"].split()
    out = words[words.index("--out") + 1]
    (mount,) = [one for one in head["containers"][0]["volumeMounts"] if out.startswith(one["mountPath"] + "/")]
    (volume,) = [one for one in head["volumes"] if one["name"] == mount["name"]]
    assert "persistentVolumeClaim" in volume
    assert job["shutdownAfterJobFinishes"] is True and job["ttlSecondsAfterFinished"] > 0
    assert job["backoffLimit"] == 0 and job["submissionMode"] == "K8sJobMode"
