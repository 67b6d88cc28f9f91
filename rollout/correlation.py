"""The correlation id of the request that this code runs for.

Invariant: an id is a UUID, so whatever a client sends, nothing but hexadecimal digits and hyphens reaches a log line
or a header. Tasks started while a request is served inherit its id (it is a context variable).
"""

from __future__ import annotations

import contextvars
import logging
import re
import uuid

# In what a log line has where no request is being served.
NO_ID = "-"

correlation_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("correlation_id", default=None)

# The usual form alone: uuid.UUID() would take braces, a prefix and digits without hyphens as well.
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)


def choose_id(*offered: str | None) -> str:
    """The first of the offered ids that is a UUID, as it was written; a new UUID4 if none is."""
    for text in offered:
        if text is not None and _UUID.fullmatch(text):
            return text
    return str(uuid.uuid4())


class CorrelationFilter(logging.Filter):
    """Adds `correlation_id` to every record, for formats such as "%(correlation_id)s %(message)s".

    It belongs on a handler: filters of a logger do not see the records of loggers below it. Drops nothing.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """True always. An id that the record has already is kept."""
        if not hasattr(record, "correlation_id"):
            record.correlation_id = correlation_id.get() or NO_ID
        return True
