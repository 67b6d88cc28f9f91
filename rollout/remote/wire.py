"""The remote rollout protocol's bodies, both generations, both directions.

Invariant: a body that these models take keeps the protocol's bounds; whatever else a peer wrote beside the known
fields is dropped, except in messages, which stay exactly as they came. What comes back to a peer (messages, metadata,
sampling parameters) can be written as JSON that every reader takes. What we write has no field that the protocol does
not know.

Generation A is synchronous with a response mask, A1 is A with the other callback path, B is asynchronous.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rollout.strict_json import problems
from rollout.tasks import Message

Generation = Literal["A", "A1", "B"]
FinishReason = Literal["stop", "max_turns", "max_tokens", "error", "custom"]
Status = Literal["COMPLETED", "ERROR"]
ErrorCategory = Literal[
    "rate_limited",
    "trainer_server_error",
    "trainer_client_error",
    "trainer_error",
    "network_error",
    "tokenizer_error",
    "tool_error",
    "validation_error",
    "internal_error",
]
ERROR_CATEGORIES: tuple[str, ...] = get_args(ErrorCategory)

MAX_ID_CHARS = 256
MAX_URL_CHARS = 2_048
MAX_KEY_CHARS = 4_096
MAX_NAME_CHARS = 512
# Metadata of generation B, as JSON.
MAX_METADATA_BYTES = 2**20
# Tokens of one rollout; no array of tokens or of a mask is longer.
MAX_TOKENS = 1_000_000
# Generation B names no bound; this one is what a session takes.
MAX_TURNS_B = 1_000
ROLES = ("system", "user", "assistant", "tool", "function")
# Generation B bounds no roles. This one is what newer models call the system.
ROLES_B = (*ROLES, "developer")

COMPLETION_PATHS: dict[str, str] = {"A": "/v1/completions", "A1": "/v1/chat/completions", "B": "/v1/chat/completions"}
"""Where a trainer of each generation takes model calls, after its server_url."""
COMPLETED_PATH = "/v1/rollout/completed"
ROLLOUT_PATH = "/rollout"
INIT_PATH = "/v1/rollout/init"
TOOLS_PATH = "/tools"
HEALTH_PATH = "/health"


def _strict(value: Any) -> Any:
    # Pydantic's allow_inf_nan looks at declared numbers alone, and not into what is free.
    problem = next(problems(value), None)
    if problem is not None:
        raise ValueError(f"{problem.where}: {problem.what}" if problem.where else problem.what)
    return value


def _messages(messages: list[Message], roles: tuple[str, ...]) -> list[Message]:
    _strict(messages)
    for index, message in enumerate(messages):
        if message.get("role") not in roles:
            raise ValueError(f"item {index}: role is {message.get('role')!r}; use one of {', '.join(roles)}")
        if not isinstance(message.get("content"), str | list | None):
            raise ValueError(f"item {index}: content must be text, a list of parts or null")
    return messages


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be blank")
    return value


def _url(value: str) -> str:
    scheme, separator, rest = value.strip().partition("://")
    if scheme.lower() not in ("http", "https") or not separator or not rest.strip("/"):
        raise ValueError("must be a URL that begins with http:// or https:// and names a host")
    if not value.strip().isprintable() or " " in value.strip():
        raise ValueError("holds blanks or control characters")
    return value.strip().rstrip("/")


def _key(value: str) -> str:
    # It becomes a header's value.
    if not value.isascii() or not value.isprintable():
        raise ValueError("must be printable ASCII")
    return value


def _small(value: dict[str, Any]) -> dict[str, Any]:
    try:
        size = len(json.dumps(value, separators=(",", ":")).encode())
    except (TypeError, ValueError, RecursionError):
        raise ValueError("must be plain JSON") from None
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"has {size} bytes as JSON; at most {MAX_METADATA_BYTES} are taken")
    return value


RolloutId = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
Url = Annotated[str, Field(max_length=MAX_URL_CHARS), AfterValidator(_url)]
Key = Annotated[str, Field(max_length=MAX_KEY_CHARS), AfterValidator(_key)]
Messages = Annotated[list[Message], AfterValidator(lambda value: _messages(value, ROLES))]
MessagesB = Annotated[list[Message], AfterValidator(lambda value: _messages(value, ROLES_B))]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MAX_TOKENS)]
# Peers write null for an empty object.
Free = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]
Metadata = Annotated[Free, AfterValidator(_strict)]


class _Body(BaseModel):
    # Unknown fields are ignored, not refused: peers of the same generation differ in what they add.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


# To the rollout server


class SamplingParams(_Body):
    """How generation A's trainer wants its model sampled. It comes back to the trainer in every call."""

    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, ge=0.0, le=1.0)
    max_tokens: int = Field(default=512, ge=1, le=32_768)
    """Most tokens of one call."""
    stop: list[str] | None = None
    logprobs: bool | int = True
    """Every call asks for them all the same: generation A's answer must have them."""


class RolloutRequest(_Body):
    """`POST /rollout`, generation A: play this and answer when it has ended."""

    rollout_id: RolloutId
    server_url: Url
    """The trainer's, without a trailing slash."""
    messages: Messages = Field(min_length=1)
    sampling_params: SamplingParams = Field(default_factory=SamplingParams)
    tool_server_url: str | None = Field(default=None, max_length=MAX_URL_CHARS)
    max_turns: int = Field(default=10, ge=1, le=100)
    max_tokens_total: int = Field(default=8_192, ge=1, le=MAX_TOKENS)
    metadata: Metadata = Field(default_factory=dict)
    callback_api_key: Key | None = Field(default=None, repr=False)
    """Sent back as `Authorization: Bearer …`."""
    tokenizer_name: str | None = Field(default=None, max_length=MAX_NAME_CHARS)
    tokenizer_revision: str | None = Field(default=None, max_length=MAX_NAME_CHARS)


class InitRequest(_Body):
    """`POST /v1/rollout/init`, generation B: play this and tell the trainer when it has ended."""

    rollout_id: Annotated[RolloutId, AfterValidator(_not_blank)]
    server_url: Url
    messages: MessagesB = Field(min_length=1)
    completion_params: Annotated[dict[str, Any], AfterValidator(_strict)]
    """Free; what it has goes into every call to the trainer."""
    tool_server_url: str | None = Field(default=None, max_length=MAX_URL_CHARS)
    max_turns: int = Field(default=10, ge=1, le=MAX_TURNS_B)
    max_tokens_total: int = Field(default=8_192, ge=1, le=MAX_TOKENS)
    metadata: Annotated[Metadata, AfterValidator(_small)] = Field(default_factory=dict)
    """At most MAX_METADATA_BYTES as JSON."""
    api_key: Key | None = Field(default=None, repr=False)
    """Bearer of the calls to the trainer."""
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=MAX_ID_CHARS)

    @property
    def key(self) -> str:
        """By which a repeated request is known."""
        return self.idempotency_key or self.rollout_id


class InitResponse(_Body):
    """202 to an InitRequest."""

    rollout_id: RolloutId
    tools: list[dict[str, Any]] = Field(default_factory=list)
    """In OpenAI's form."""


class ToolsResponse(_Body):
    """`GET /tools`."""

    tools: list[dict[str, Any]] = Field(default_factory=list)


# To the trainer


class CompletionRequest(_Body):
    """A model call of the rollout server: `/v1/completions` (A) or `/v1/chat/completions` (A1, B)."""

    model: str = Field(default="default", max_length=MAX_NAME_CHARS)
    messages: MessagesB = Field(min_length=1)
    """The whole history so far."""
    rollout_id: RolloutId
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, ge=0.0, le=1.0)
    max_tokens: int = Field(default=512, ge=1, le=MAX_TOKENS)
    stop: list[str] | None = None
    logprobs: bool | int = True
    response_mask: list[int] | None = Field(default=None, max_length=MAX_TOKENS)
    """Generation A; see rollout.remote.mask, which also looks at the values."""

    def body(self, generation: Generation, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """As JSON data. A has every field, nulls too; B has no mask and no nulls, and of `extra` what is new."""
        data = self.model_dump()
        data["logprobs"] = bool(self.logprobs)
        if generation != "B":
            return data
        del data["response_mask"]
        return {**(extra or {}), **{name: value for name, value in data.items() if value is not None}}


class Choice(_Body):
    """One answer of the model."""

    index: int = Field(default=0, ge=0)
    message: Message
    finish_reason: str | None = Field(default=None, max_length=64)

    @model_validator(mode="after")
    def _assistant(self) -> Choice:
        if self.message.get("role", "assistant") != "assistant":
            raise ValueError(f"message.role is {self.message['role']!r}, not assistant")
        if not isinstance(self.message.get("content"), str | list | None):
            raise ValueError("message.content must be text, a list of parts or null")
        # It comes back in the next call, and at the end.
        _strict(self.message)
        return self


class Usage(_Body):
    """Tokens of one call."""

    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)
    total_tokens: int = Field(default=0, ge=0)


class CompletionResponse(_Body):
    """The trainer's answer to a CompletionRequest. The token arrays are required in A, optional in B."""

    id: str = Field(max_length=MAX_NAME_CHARS)
    object: str = Field(default="chat.completion", max_length=64)
    created: int = 0
    """Seconds since 1970."""
    model: str = Field(default="default", max_length=MAX_NAME_CHARS)
    choices: list[Choice] = Field(min_length=1, max_length=16)
    """We look at the first."""
    token_ids: TokenIds | None = None
    """Sampled tokens."""
    logprobs: list[float] | None = Field(default=None, max_length=MAX_TOKENS)
    """One for each of token_ids."""
    prompt_token_ids: TokenIds | None = None
    """The whole prompt, as the trainer's engine saw it."""
    usage: Usage | None = None

    @property
    def has_tokens(self) -> bool:
        """Whether all three arrays came."""
        return self.token_ids is not None and self.logprobs is not None and self.prompt_token_ids is not None

    def body(self) -> dict[str, Any]:
        """As JSON data, without what is not there."""
        return self.model_dump(exclude_none=True)


# The end


class Metrics(_Body):
    """What a rollout cost. Times in milliseconds."""

    total_latency_ms: float = Field(default=0.0, ge=0.0)
    llm_latency_ms: float = Field(default=0.0, ge=0.0)
    tool_latency_ms: float = Field(default=0.0, ge=0.0)
    num_llm_calls: int = Field(default=0, ge=0)
    num_tool_calls: int = Field(default=0, ge=0)
    prompt_tokens: int = Field(default=0, ge=0)
    response_tokens: int = Field(default=0, ge=0)
    max_context_tokens: int = Field(default=0, ge=0)


class RolloutResponse(_Body):
    """How a rollout ended: the answer to a RolloutRequest (A), or the body of the completed callback (B)."""

    rollout_id: RolloutId
    status: Status
    final_messages: Annotated[list[Message], BeforeValidator(lambda value: [] if value is None else value)] = Field(
        default_factory=list
    )
    finish_reason: FinishReason | None = None
    error_message: str | None = None
    reward: float | None = None
    """Generation B alone has it."""
    metrics: Metrics | None = None
    extra_fields: Free = Field(default_factory=dict)
    """`error_category` is one of ERROR_CATEGORIES."""

    def body(self, generation: Generation) -> dict[str, Any]:
        """As JSON data. A knows no reward, and no finish reasons beside stop, max_turns and max_tokens."""
        data = self.model_dump()
        if generation != "B":
            del data["reward"]
            if self.finish_reason in ("error", "custom"):
                data["finish_reason"] = None
        return data
