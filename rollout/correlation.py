"""For whom this code runs: the request's correlation id, and the session's run and trajectory id.

Invariant: a correlation id is a UUID, so whatever a client sends, nothing but hexadecimal digits and hyphens reaches
a log line or a header. Tasks and threads started meanwhile inherit all three (they are context variables).
"""

from __future__ import annotations

import contextvars
import logging
import re
import uuid

# In what a log line has where no request is being served.
NO_ID = "-"

correlation_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("correlation_id", default=None)
trajectory_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("trajectory_id", default=None)
session_run: contextvars.ContextVar[str | None] = contextvars.ContextVar("session_run", default=None)

# The usual form alone: uuid.UUID() would take braces, a prefix and digits without hyphens as well.
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)


def choose_id(*offered: str | None) -> str:
    """The first of the offered ids that is a UUID, as it was written; a new UUID4 if none is."""
    for text in offered:
        if text is not None and _UUID.fullmatch(text):
            return text
    return str(uuid.uuid4())


def enter_session(run: str, trajectory: str) -> None:
    """What this task and those that it starts do from now on is done for a session. For the session's own task."""
    session_run.set(run)
    trajectory_id.set(trajectory)


class CorrelationFilter(logging.Filter):
    """Adds `correlation_id`, `trajectory_id` and `run` to every record, for formats such as "%(run)s %(message)s".

    It belongs on a handler: filters of a logger do not see the records of loggers below it. Drops nothing.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """True always. An id that the record has already is kept."""
        for name, variable in _FIELDS:
            if not hasattr(record, name):
                setattr(record, name, variable.get() or NO_ID)
        return True


_FIELDS = (("correlation_id", correlation_id), ("trajectory_id", trajectory_id), ("run", session_run))
