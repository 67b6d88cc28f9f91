"""The batch rollout API as types: what a trainer says and hears, over HTTP and over Ray alike.

Invariant: gateway, controller and clients all speak these; nothing else crosses between them. Unknown fields are
refused, sizes are bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rollout.limits import Limits
from rollout.remote.wire import MAX_URL_CHARS, Generation
from rollout.sampling import Sampling

# Tasks of one submission, and groups of one lease.
MAX_TASKS_PER_CALL = 10_000
MAX_GROUPS_PER_LEASE = 16_384
# Seconds that one call may wait for a batch; a client that wants to wait longer asks again.
MAX_WAIT_S = 300.0
MAX_LEASE_S = 24 * 3600.0
DEFAULT_LEASE_S = 600.0

RunState = Literal["running", "paused", "cancelled"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def plain_url(value: str) -> str:
    """A rollout server's URL without a slash at its end. Raises ValueError for what is not scheme://host[:port][/path]."""
    try:
        parts = urlsplit(value.strip())
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or not value.strip().isprintable() or " " in value.strip():
        raise ValueError("must be http://host[:port][/path] or https://…")
    if "@" in parts.netloc:
        raise ValueError("must not hold a user or password; name the key's variable in key_env")
    if parts.query or parts.fragment:
        raise ValueError("must end with its path, without ? and #")
    return value.strip().rstrip("/")


class EnvironmentRef(_Message):
    """Which environment a run is played in: a class of yours, or a rollout server somewhere else."""

    path: str | None = Field(default=None, min_length=3, max_length=512)
    """`module:Class` on the workers' import path. Beside `remote` it only scores, and may be left out."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""
    remote: str | None = Field(default=None, max_length=MAX_URL_CHARS)
    """URL of a rollout server, which plays the sessions and asks us for every turn."""
    generation: Generation | None = None
    """What it speaks of the remote rollout protocol: A (/rollout, model calls at /v1/completions), A1 (A with model
    calls at /v1/chat/completions), B (/v1/rollout/init). Needed with `remote`."""
    key_env: str | None = Field(default=None, pattern=r"^ROLLOUT_REMOTE_[A-Z0-9_]{1,64}$")
    """Environment variable of the session workers that holds the rollout server's key, if it wants one."""

    @field_validator("remote")
    @classmethod
    def _plain_url(cls, value: str | None) -> str | None:
        return None if value is None else plain_url(value)

    @model_validator(mode="after")
    def _one_place(self) -> EnvironmentRef:
        if self.remote is None:
            if self.path is None:
                raise ValueError("needs path (module:Class), or remote (the URL of a rollout server)")
            if self.generation is not None or self.key_env is not None:
                raise ValueError("generation and key_env are of a rollout server: give remote as well, or neither")
        elif self.generation is None:
            raise ValueError("remote needs generation: A, A1 or B, as the rollout server speaks it")
        elif self.path is None and self.args:
            raise ValueError("args are of the class at path, and there is none")
        return self

    @property
    def name(self) -> str:
        """The environment in a word, for people."""
        return self.remote or self.path or ""


class Filters(_Message):
    """Which complete groups are worth training on. What is dropped is counted by reason, never delivered."""

    drop_zero_variance: bool = False
    """Groups whose rewards are all equal: their advantages are all zero."""
    max_truncated: float | None = Field(default=None, ge=0.0, le=1.0)
    """Drop groups with a larger share of trajectories cut by length, tokens, turns or time."""
    function: str | None = Field(default=None, max_length=512)
    """`module:function` of yours, on the controller's import path: gets the group's rows as an Arrow table, returns
    True to keep it, or False or a reason to drop it."""


class RunRequest(_Message):
    """A new run. What is None comes from the cluster's config."""

    name: str | None = Field(default=None, max_length=128)
    """Unique; None: one is made up. Creating the same run twice is one run."""
    environment: EnvironmentRef | None = None
    sampling: Sampling | None = None
    limits: Limits | None = None
    group_size: int | None = Field(default=None, ge=1, le=1024)
    share: float = Field(default=1.0, ge=0.001, le=1000.0)
    """Weight of this run when several want the same session workers."""
    order: Literal["completed", "submitted"] = "completed"
    """Groups are delivered as they complete, or strictly as submitted (then the slowest holds back the rest)."""
    failed: Literal["deliver", "drop"] = "deliver"
    """A group with `error` or `cancelled` members: delivered with them marked, or dropped and played again."""
    max_replacements: int = Field(default=2, ge=0, le=100)
    """With `failed: drop`: so often a group is played again before it is dropped for good."""
    filters: Filters = Field(default_factory=Filters)
    target_groups: int | None = Field(default=None, ge=1)
    """Over-sampling: with so many groups accepted, the rest is cancelled and counted as `surplus`."""
    max_staleness: int | None = Field(default=None, ge=0)
    """A delivered group's oldest token is at most so many policy versions behind. None: no bound."""
    batch_groups: int | None = Field(default=None, ge=1, le=MAX_GROUPS_PER_LEASE)
    """Groups that the trainer takes per version. With a staleness bound, no group is started that would be too old
    when its turn comes."""

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError("may hold letters, digits, '.', '_' and '-', and begins with a letter or digit")
        return value

    @model_validator(mode="after")
    def _bound_needs_batch(self) -> RunRequest:
        if self.batch_groups is not None and self.max_staleness is None:
            raise ValueError("batch_groups is for the staleness bound: give max_staleness as well, or leave both out")
        return self


class LeaseRequest(_Message):
    """Wait for a batch."""

    groups: int = Field(ge=1, le=MAX_GROUPS_PER_LEASE)
    min_groups: int | None = Field(default=None, ge=1)
    """Fewer are handed out after `timeout`, if there are so many. None: all of `groups`. When nothing more is under
    way, what is left is handed out at once, however little."""
    timeout: float = Field(default=30.0, ge=0.0, le=MAX_WAIT_S)
    """Seconds to wait."""
    ttl: float = Field(default=DEFAULT_LEASE_S, gt=0.0, le=MAX_LEASE_S)
    """Seconds until the groups are delivered again, if they are neither acknowledged nor extended."""
    request_id: str | None = Field(default=None, max_length=128)
    """The same id gets the same lease: a call whose answer was lost may be repeated."""


class Extension(_Message):
    """More time for a lease."""

    ttl: float = Field(default=DEFAULT_LEASE_S, gt=0.0, le=MAX_LEASE_S)


@dataclass(slots=True)
class Submitted:
    """What became of a submission."""

    accepted: int
    duplicates: int
    """Tasks that the run knew already, word for word; they are not played twice."""


@dataclass(slots=True)
class Batch:
    """Complete groups under a lease. The trainer acknowledges it when it has trained on it."""

    lease_id: str
    run: str
    table: pa.Table
    """Rows of the record, groups in delivery order, members by sample_index, segments by segment_index."""
    groups: list[str]
    expires_in: float
    """Seconds from the answer on."""
    policy_version: int
    """Version of the weights when it was handed out."""


@dataclass(slots=True)
class NoBatch:
    """Why there is none."""

    finished: bool
    """Nothing of the run is waiting, running or leased: there will never be one, unless tasks are submitted."""
    ready: int
    waiting: int
    running: int
    leased: int
    reason: str


@dataclass(slots=True)
class Acknowledged:
    """An acknowledgement took effect, now or before."""

    lease_id: str
    groups: int
    repeated: bool = False
    late: bool = False
    """The lease had expired, but nobody else had been given its groups."""


@dataclass(slots=True)
class RunInfo:
    """A run at this moment. Counts of groups, unless named otherwise."""

    run: str
    state: RunState
    environment: str
    group_size: int
    submitted: int = 0
    waiting: int = 0
    running: int = 0
    ready: int = 0
    leased: int = 0
    delivered: int = 0
    """Acknowledged."""
    dropped: dict[str, int] = field(default_factory=dict)
    """By reason; these are done and will not be delivered."""
    replaced: dict[str, int] = field(default_factory=dict)
    """By reason: played again from the start."""
    sessions_running: int = 0
    sessions_done: int = 0
    sessions_retried: int = 0
    tokens: int = 0
    """Sampled, of finished trajectories."""
    turns: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    forks: int = 0
    scored: int = 0
    reward_sum: float = 0.0
    stop_reasons: dict[str, int] = field(default_factory=dict)
    leases_expired: int = 0
    staleness_sum: int = 0
    """Of delivered groups: versions between the oldest token and the lease."""
    staleness_max: int = 0
    held_by: str | None = None
    """What keeps waiting groups from starting although workers are free: `staleness` (a weight update frees them),
    `memory` (finished trajectories that nobody takes), `paused`; None: nothing."""
    policy_version: int = 0
    filter_error: str | None = None
    """The last failure of the user's filter; groups that it failed on were kept."""
    workers_lost: int = 0

    @property
    def mean_reward(self) -> float | None:
        """Mean over scored trajectories; None before the first."""
        return self.reward_sum / self.scored if self.scored else None

    @property
    def failures(self) -> int:
        """Trajectories that ended as `error`."""
        return self.stop_reasons.get("error", 0)

    @property
    def done(self) -> int:
        """Groups with nothing left to do."""
        return self.delivered + sum(self.dropped.values())

    @property
    def finished(self) -> bool:
        """It had tasks, and nothing is waiting, running, ready or leased."""
        return 0 < self.submitted == self.done


@dataclass(slots=True)
class OpenedSession:
    """A captured session, and how an agent reaches it."""

    session_id: str
    trajectory_id: str
    api_key: str
    """For this session alone."""
    base_url: str = ""
    """For OpenAI's clients."""
    anthropic_base_url: str = ""
    """For Anthropic's, which add /v1 themselves."""

    def at(self, address: str) -> OpenedSession:
        """The same with its addresses, as seen from where `address` is the cluster's."""
        api = f"{address.rstrip('/')}/v1/sessions/{self.session_id}/api"
        return replace(self, base_url=f"{api}/v1", anthropic_base_url=api)


@dataclass(slots=True)
class CapturedSession:
    """A captured session at a moment. What is null is known when it is closed."""

    session_id: str
    trajectory_id: str
    state: str
    """open, rewarded or closed"""
    calls: list[str]
    """Ids of the generations so far."""
    tokens: int
    """Sampled so far."""
    segments: int | None
    stop_reason: str | None
    reward: float | None
    error: str | None
