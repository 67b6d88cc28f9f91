"""Every way a rollout can fail, in one place.

A failure becomes a value: the trajectory's `error` column holds "category: message", written by `describe`.
The categories are stable names that dashboards and trainers may group by.
"""

from __future__ import annotations

# Longest error text kept in a trajectory, in characters: enough for a message, not for a stack of frames.
MAX_ERROR_CHARS = 2_000


class RolloutError(Exception):
    """Base of all errors raised by this project."""

    category = "internal"
    # Whether a fresh attempt of the same session may succeed: true where infrastructure died under it.
    retryable = False


class ConfigError(RolloutError):
    """A configuration file that cannot be used. The message names file, line and field, and what to do."""

    category = "config"


class TaskFileError(RolloutError):
    """A task file with a bad line. The message names file and line number."""

    category = "tasks"


class LedgerError(RolloutError):
    """Tokens, log-probabilities or versions that do not fit together. Never repaired, always reported."""

    category = "ledger"


class PrefixError(LedgerError):
    """A new prompt that is not an extension of what the engine has seen and sampled."""

    category = "prefix"


class RecordError(RolloutError):
    """A trajectory row that breaks the record's invariant."""

    category = "record"


class RenderError(RolloutError):
    """Messages that could not be turned into tokens, or tokens into messages."""

    category = "render"


class ToolError(RolloutError):
    """A tool call that failed. The text goes to the model and into the trajectory."""

    category = "tool"


class EnvironmentError_(RolloutError):
    """The environment's own code failed (set-up, reply, reward)."""

    category = "environment"


class EngineError(RolloutError):
    """The engine answered a request with an error."""

    category = "engine"


class EngineRefused(EngineError):
    """The request itself is wrong for this engine (too long, bad parameter); a retry would be refused again."""

    category = "engine_refused"


class EngineTimeout(EngineError):
    """No answer within the deadline of one engine call."""

    category = "engine_timeout"


class EngineDied(EngineError):
    """The engine replica went away while it held the request, and no other could take it."""

    category = "engine_died"
    retryable = True


class SessionTimeout(RolloutError):
    """The whole session took longer than it may."""

    category = "session_timeout"


class WorkerDied(RolloutError):
    """The session worker went away while it held the session."""

    category = "worker_died"
    retryable = True


class RemoteError(RolloutError):
    """A remote rollout server refused a rollout, answered what is no answer, or reported that it failed."""

    category = "remote"


class RemoteDied(RemoteError):
    """A remote rollout server could not be reached, or went away or failed (5xx) while it held the rollout."""

    category = "remote_died"
    retryable = True


class ApiError(RolloutError):
    """A request of a trainer that cannot be served. `status` is its HTTP status, `field` what is wrong."""

    category = "api"
    status = 400

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message, field)
        self.message = message
        self.field = field

    def __str__(self) -> str:
        return self.message


class AccessError(ApiError):
    """No key, a wrong one, or one that may not do this."""

    category = "access"
    status = 403


class NotFoundError(ApiError):
    """There is no such run, lease or task."""

    category = "not_found"
    status = 404


class ConflictError(ApiError):
    """The request contradicts what is there: another task under the same id, a lease that has expired."""

    category = "conflict"
    status = 409


class RefusedError(ApiError):
    """The request is well-formed and cannot be done: a checkpoint of another shape, an unknown environment."""

    category = "refused"
    status = 422


class BusyError(ApiError):
    """Too much at once. The same request may succeed in `retry_after` seconds."""

    category = "busy"
    status = 429

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.args = (message, retry_after)
        self.retry_after = retry_after


class UnavailableError(ApiError):
    """A part of the cluster is not there at this moment; it is being started again."""

    category = "unavailable"
    status = 503


class JournalError(RolloutError):
    """The journal cannot be read or written. Nothing is acknowledged that is not on disk."""

    category = "journal"


class WeightsRefused(RolloutError):
    """New weights that do not fit the served model, or are not whole. Nothing was loaded."""

    category = "weights"


def describe(error: BaseException) -> str:
    """`category: message` for the trajectory's `error` column, bounded in length.

    Errors of other libraries get the category `internal` and their class name in the message.
    """
    if isinstance(error, RolloutError):
        text = f"{error.category}: {error}"
    else:
        text = f"internal: {type(error).__name__}: {error}"
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 1] + "…"
