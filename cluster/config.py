"""The one file that describes a cluster, as types: every field, its bounds, and how fields must fit together.

Invariant: a `ClusterConfig` that exists can be started as far as this machine can tell. What vLLM would refuse
minutes later is refused here, at once, with the field and the way out in the message. `config_file.load_config`
adds the file's line numbers and checks the vLLM arguments against vLLM itself.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.config_access import AccessConfig, check_exposure
from cluster.config_agents import AgentConfig, AgentName
from cluster.config_logging import LoggingConfig, TracingConfig
from cluster.config_metrics import MetricsConfig
from cluster.config_remote import RemoteRolloutConfig, remote_problem
from cluster.config_section import Section
from cluster.config_viewer import ViewerConfig
from cluster.yaml_places import FieldPath
from rollout.api import EnvironmentRef, RunRequest, plain_url
from rollout.errors import ConfigError
from rollout.limits import Limits
from rollout.mcp_config import McpServerConfig
from rollout.remote.wire import MAX_URL_CHARS, Generation
from rollout.sampling import Sampling

# The only mode in which a log-probability is of the distribution that was sampled from.
LOGPROBS_MODE = "processed_logprobs"
# GiB of keys and values on CPU: without a number the engine asks for 92 % of the machine's memory and dies.
CPU_KV_CACHE_GIB = 1
# Serve's replicas, the gateway and the controller each claim one logical CPU. On a laptop of two cores the third
# of them would wait for a CPU in silence, for ever; logical CPUs cost nothing.
MIN_LOGICAL_CPUS = 16

OMP_BINDING = "VLLM_CPU_OMP_THREADS_BIND"

# Where to set what the project passes to vLLM itself.
_OWN_ARGUMENTS = {
    "model": "is set by model.path",
    "served_model_name": "is set by model.name",
    "revision": "is set by model.revision",
    "worker_extension_cls": "is the project's: weights are loaded and read back by it",
    "distributed_executor_backend": "is chosen by the project: Ray on GPUs, processes on CPU; remove it",
}


class FieldProblems(ValueError):
    """Several problems found by one validator, each with the path of its field from that validator's model."""

    def __init__(self, problems: Sequence[tuple[FieldPath, str]]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(f"{'.'.join(map(str, path))}: {text}" for path, text in self.problems))


class ModelConfig(Section):
    """Which model is rolled out, and how its messages become tokens."""

    path: str = Field(min_length=1)
    """A local directory (`load_config` makes it absolute) or a hub name such as `Qwen/Qwen3-0.6B`."""
    name: str = Field(
        default_factory=lambda data: os.path.basename(str(data.get("path", "")).rstrip("/")), min_length=1
    )
    """The name under which it is served; default: the last component of the path."""
    renderer: str = Field(default="auto", min_length=1)
    """The chat format, by its name in the renderers package; `auto` chooses by the model."""
    renderer_options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the renderer, e.g. {enable_thinking: false, thinking_retention: all}."""
    revision: str | None = None
    """Commit, tag or branch of the hub repository."""

    @property
    def is_local(self) -> bool:
        """Whether the weights are a directory of this machine and no hub has to be asked."""
        return os.path.isabs(self.path)


class EngineConfig(Section):
    """The vLLM engines: how many, on what, with which of vLLM's own arguments."""

    device: Literal["cpu", "gpu"] = "gpu"
    replicas: int = Field(default=1, ge=1, le=1024)
    """Independent engines, each of tensor_parallel_size devices."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Any argument of vLLM's engine under vLLM's name. null means vLLM's default."""
    env: dict[str, str] = Field(default_factory=dict, repr=False)
    """Environment variables of the replicas; they win over those that the project sets."""
    accelerator_type: str | None = None
    """Ray's name of a GPU type, e.g. `H200`: replicas are placed on such nodes only."""
    start_seconds: float = Field(default=900.0, gt=0)
    """Deadline for all engines to be ready."""
    start_attempts: int = Field(default=2, ge=1, le=100)
    """The start is given up after so many failures for each of `replicas`, counted over all of them, before one is
    ready. A wrong model fails every time; a node that was lost does not. Serve takes 3 for each at most."""
    warmup: bool = True
    """Generate once on each replica before it counts as ready."""
    sticky_margin: int = Field(default=4, ge=0)
    """A session leaves the replica that holds its prefix when that one has this many more requests in flight
    than the least loaded."""

    @field_validator("env", mode="before")
    @classmethod
    def _numbers_are_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        problems: list[tuple[FieldPath, str]] = []
        env = {}
        for name, content in value.items():
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                # Whoever wrote NAME=value has the value in the name.
                problems.append(((str(name).partition("=")[0],), "is not a name of an environment variable"))
            elif isinstance(content, bool) or not isinstance(content, str | int | float):
                problems.append(((name,), "must be text or a number; put quotes around it"))
            else:
                env[name] = str(content)
        if problems:
            raise FieldProblems(problems)
        return env

    @field_validator("vllm")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        problems: list[tuple[FieldPath, str]] = [
            ((key,), reason) for key, reason in _OWN_ARGUMENTS.items() if value.get(key) is not None
        ]
        mode = value.get("logprobs_mode")
        if mode not in (None, LOGPROBS_MODE):
            problems.append(
                (
                    ("logprobs_mode",),
                    f"must be {LOGPROBS_MODE}: a trainer needs log-probabilities of the distribution that was "
                    "sampled from, after temperature and top-p; remove the line",
                )
            )
        problems += [
            ((key,), "must be a whole number of at least 1")
            for key in ("tensor_parallel_size", "pipeline_parallel_size")
            if value.get(key) is not None and not _whole(value[key])
        ]
        if problems:
            raise FieldProblems(problems)
        return value

    @model_validator(mode="after")
    def _gpu_type_needs_gpu(self) -> EngineConfig:
        if self.device == "cpu" and self.accelerator_type is not None:
            raise FieldProblems([(("accelerator_type",), "is of GPUs; remove it or set engine.device: gpu")])
        return self

    @property
    def tensor_parallel_size(self) -> int:
        """Devices that hold one replica's weights together."""
        return self.vllm.get("tensor_parallel_size") or 1

    @property
    def ranks(self) -> int:
        """Worker processes of one replica."""
        return self.tensor_parallel_size * (self.vllm.get("pipeline_parallel_size") or 1)


class WorkersConfig(Section):
    """The actors that run sessions."""

    count: int = Field(default=1, ge=1, le=4096)
    sessions: int = Field(default=256, ge=1, le=10_000)
    """Concurrent sessions of one worker, on one event loop."""


class EnvironmentConfig(Section):
    """What the model acts in: tools, replies and reward, as a class of yours; or a rollout server somewhere else."""

    path: str | None = None
    """`module:Class`; the module is found on the workers' import path (see `pythonpath`). Beside `remote` it only
    scores, and may be left out."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""
    remote: str | None = Field(default=None, max_length=MAX_URL_CHARS)
    """URL of a server that speaks the remote rollout protocol: it plays the sessions, and asks this cluster for every
    turn (see gateway.public_url)."""
    generation: Generation | None = None
    """Which generation of the protocol it speaks; needed with `remote`. A: `/rollout`, model calls at
    `/v1/completions`; A1: A with model calls at `/v1/chat/completions`; B: `/v1/rollout/init`."""
    key_env: str | None = None
    """Environment variable of the session workers that holds the server's API key: ROLLOUT_REMOTE_…"""

    @field_validator("path")
    @classmethod
    def _module_and_class(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value):
            raise ValueError("must be module:Class, such as examples.calculator.environment:Calculator")
        return value

    @model_validator(mode="after")
    def _one_place(self) -> EnvironmentConfig:
        if self.path is None and self.remote is None:
            raise FieldProblems([(("path",), "is required (or remote: the URL of a rollout server)")])
        if self.remote is not None and self.generation is None:
            raise FieldProblems([(("generation",), "is required with remote: A, A1 or B")])
        self.ref()
        return self

    def ref(self) -> EnvironmentRef:
        """The same, as runs name it. Raises ValueError."""
        try:
            return EnvironmentRef(**self.model_dump())
        except ValidationError as failure:
            found = failure.errors(include_url=False, include_input=False, include_context=False)
            problems = [(item["loc"], item["msg"].removeprefix("Value error, ")) for item in found]
            raise FieldProblems(problems) from None


class RunConfig(Section):
    """Defaults of a run. What a trainer gives with its run wins."""

    group_size: int = Field(default=8, ge=1, le=1024)
    """Sessions of one task: the samples that an advantage is computed over."""
    max_attempts: int = Field(default=3, ge=1, le=10)
    """Starts of one session, where the machines under it died."""
    max_concurrent_sessions: int | None = Field(default=None, ge=1)
    """None: as many as the workers hold."""


class JournalConfig(Section):
    """What must survive a death: tasks, leases, finished trajectories, the current weights."""

    path: str | None = None
    """SQLite file; None: one for each cluster name in the state directory (`rollout status` says where). On a disk
    that outlives the controller's node, if that may die."""
    sync: bool = True
    """Every commit reaches the disk itself, so that nothing is lost with the machine's power; false: nothing is lost
    when processes die."""


class GatewayConfig(Section):
    """The HTTP address of the cluster."""

    enabled: bool = True
    host: str = "127.0.0.1"
    """Another than loopback needs `access.keys`, `access.keys_file` or `access.jwt`."""
    port: int = Field(default=8800, ge=1, le=65535)
    max_body_mb: int = Field(default=64, ge=1, le=4096)
    """Largest request body."""
    public_url: str | None = Field(default=None, max_length=MAX_URL_CHARS)
    """Where others reach the gateway, such as https://rollouts.example.com: remote rollout servers are told so. None:
    http://host:port, which is right for servers on this machine."""

    @field_validator("public_url")
    @classmethod
    def _plain_url(cls, value: str | None) -> str | None:
        return None if value is None else plain_url(value)


class RayConfig(Section):
    """The Ray cluster to run on."""

    address: str | None = None
    """None: `rollout up` starts a local Ray of its own. Else that of a running one, e.g. `auto`."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of the local Ray; None: `logical_cpus` decides."""
    object_store_memory_mb: int = Field(default=512, ge=80)
    """Shared memory of the local Ray. 80 is the least that Ray takes."""

    @property
    def logical_cpus(self) -> int:
        """How many CPUs the local Ray claims to have."""
        return self.num_cpus or max(MIN_LOGICAL_CPUS, os.cpu_count() or 1)


class ClusterConfig(Section):
    """One cluster: a model on engines, workers that roll it out, and the defaults of its runs."""

    name: str = "rollout"
    """Names the cluster, its state file and its Ray namespace."""
    model: ModelConfig
    engine: EngineConfig = Field(default_factory=EngineConfig)
    workers: WorkersConfig = Field(default_factory=WorkersConfig)
    environment: EnvironmentConfig | None = None
    """Needed by `rollout run`; a cluster that only serves has none."""
    mcp_servers: dict[str, McpServerConfig] = Field(default_factory=dict, repr=False)
    """Servers whose tools every session gets, by a name of your choice."""
    sampling: Sampling = Field(default_factory=Sampling)
    limits: Limits = Field(default_factory=Limits)
    run: RunConfig = Field(default_factory=RunConfig)
    journal: JournalConfig = Field(default_factory=JournalConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    access: AccessConfig = Field(default_factory=AccessConfig)
    viewer: ViewerConfig = Field(default_factory=ViewerConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    remote_rollout: RemoteRolloutConfig = Field(default_factory=RemoteRolloutConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    tracing: TracingConfig = Field(default_factory=TracingConfig)
    agents: dict[AgentName, AgentConfig] | None = None
    """Agents by name. Left out: the environment is one, under the name of its class in lower case; {} means none."""
    ray: RayConfig = Field(default_factory=RayConfig)
    pythonpath: list[str] = Field(default_factory=list)
    """Directories put on the workers' import path (`load_config` makes them absolute)."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", value):
            raise ValueError(
                "must be 1 to 40 of a-z, 0-9 and '-', not beginning with '-' (it names files and Ray namespaces)"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> ClusterConfig:
        problems: list[tuple[FieldPath, str]] = []
        window = self.engine.vllm.get("max_model_len")
        if isinstance(window, int) and _whole(window) and self.sampling.max_tokens >= window:
            given = "max_tokens" in self.sampling.model_fields_set
            problems.append(
                (
                    ("sampling", "max_tokens") if given else ("engine", "vllm", "max_model_len"),
                    f"sampling.max_tokens ({self.sampling.max_tokens}{'' if given else ', the default'}) must be "
                    f"less than engine.vllm.max_model_len ({window}), or no prompt fits beside a turn; lower "
                    "sampling.max_tokens or raise engine.vllm.max_model_len",
                )
            )
        # With a Ray elsewhere the engines' machine is not this one, and its cores are unknown here.
        if self.ray.address is None and (problem := self._binding_problem()):
            problems.append((("engine", "vllm", "tensor_parallel_size"), problem))
        if self.environment is not None and self.environment.remote is not None and not self.gateway.enabled:
            problems.append((("gateway", "enabled"), "must be true: environment.remote asks for its turns there"))
        if self.gateway.enabled and (problem := check_exposure(self.gateway.host, self.access)):
            problems.append((("gateway", "host"), problem))
        if misfit := remote_problem(self):
            problems.append((("remote_rollout", misfit[0]), misfit[1]))
        if problems:
            raise FieldProblems(problems)
        return self

    def _binding_problem(self) -> str | None:
        cores = len(os.sched_getaffinity(0))
        if self.engine.device != "cpu" or OMP_BINDING in self.engine.env or self.engine.ranks <= cores:
            return None
        return (
            f"{self.engine.ranks} ranks on {cores} core(s) of this machine: lower engine.vllm.tensor_parallel_size, "
            f'or set engine.env.{OMP_BINDING} to one core list per rank, such as "0|1"'
        )

    def run_defaults(self) -> RunRequest:
        """What a run takes from this file where its request says nothing."""
        environment = self.environment
        return RunRequest(
            environment=None if environment is None else environment.ref(),
            sampling=self.sampling,
            limits=self.limits,
            group_size=self.run.group_size,
        )

    def served_agents(self) -> dict[str, AgentConfig]:
        """The agents that the gateway serves."""
        if self.agents is not None or self.environment is None:
            return self.agents or {}
        path = self.environment.path
        if path is None or self.environment.remote is not None:
            # Its tools and replies are the rollout server's.
            return {}
        return {path.rpartition(":")[2].lower(): AgentConfig(environment=path, args=self.environment.args)}

    def replica_env(self) -> dict[str, str]:
        """Environment variables of the engine replicas: the project's, and on top what the file gives.

        Raises ConfigError where more ranks than this machine has cores would have to be bound.
        """
        env = {"VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        if self.model.is_local:
            env["HF_HUB_OFFLINE"] = "1"
        if self.engine.device == "cpu":
            env["VLLM_CPU_KVCACHE_SPACE"] = str(CPU_KV_CACHE_GIB)
            if self.engine.ranks > 1 and OMP_BINDING not in self.engine.env:
                if problem := self._binding_problem():
                    raise ConfigError(f"engine.vllm.tensor_parallel_size: {problem}")
                env[OMP_BINDING] = bind_ranks(sorted(os.sched_getaffinity(0)), self.engine.ranks)
        return env | self.engine.env

    def llm_engine_kwargs(self) -> dict[str, Any]:
        """vLLM's arguments of one replica, without the model's path and name (those are Ray's to pass).

        They may hold arguments of vLLM's OpenAI front end (`tool_call_parser` …), which Ray's LLMConfig sorts out.
        """
        kwargs = {key: copy.deepcopy(value) for key, value in self.engine.vllm.items() if value is not None}
        kwargs["logprobs_mode"] = LOGPROBS_MODE
        kwargs.setdefault("enable_prefix_caching", True)
        if self.model.revision is not None:
            kwargs["revision"] = self.model.revision
        if self.engine.device == "cpu":
            kwargs.setdefault("dtype", "bfloat16")
            kwargs.setdefault("enforce_eager", True)
        return kwargs


def bind_ranks(cores: Sequence[int], ranks: int) -> str:
    """One list of cores per rank, as vLLM wants it: "0,1|2,3" for two ranks on four cores.

    vLLM would put all ranks of one NUMA node on the same cores. The lists are of one length, as ranks wait for the
    slowest; cores left over are free for everything else.
    """
    share = len(cores) // ranks
    if share == 0:
        raise ConfigError(f"{ranks} ranks cannot be bound to {len(cores)} core(s)")
    return "|".join(",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(ranks))


def _whole(value: object) -> bool:
    """Whether it is an integer of at least 1; True and False are no numbers in a file."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
