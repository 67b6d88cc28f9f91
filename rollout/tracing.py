"""OpenTelemetry spans of sessions: session → turn → engine call, tool call, environment.

    with tracing.span("tool", name=call.name) as span:
        ...
        span.set(outcome="ok")

Invariant: tracing changes nothing but the traces. While it is off, `span` gives one object that does nothing (well
below a microsecond) and OpenTelemetry is not imported; what goes wrong with spans or with their collector never
reaches a session. No prompt, answer, argument or result is in a span: only names, numbers and ids.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from rollout.correlation import correlation_id, session_run, trajectory_id
from rollout.errors import ConfigError
from rollout.redaction import Redactor

logger = logging.getLogger(__name__)

Value = str | bool | int | float | None

# Tool names may be the model's own invention, and errors hold what a tool said.
MAX_TEXT_CHARS = 256
# Of one batch of spans to the collector.
EXPORT_SECONDS = 5.0
# What may wait for the collector; beyond it, spans are dropped (and counted by OpenTelemetry), never waited for.
MAX_QUEUE = 4096
FLUSH_SECONDS = 2.0
# Those for which OpenTelemetry has a name. All others get PREFIX.
_NAMES = {
    "input_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "tool": "gen_ai.tool.name",
}
PREFIX = "rollout."


@dataclass(frozen=True)
class TraceSettings:
    """Where traces go. Plain data: it goes to every session worker."""

    cluster: str
    endpoint: str
    """Full URL of an OTLP/HTTP collector's traces."""
    sample_ratio: float = 1.0
    """Share of sessions that are traced."""


class Span(Protocol):
    """A span that is open."""

    def set(self, **attributes: Value) -> None:
        """Add what is known now. None is left out."""


class _Off:
    """The span while tracing is off."""

    __slots__ = ()

    def __enter__(self) -> _Off:
        return self

    def __exit__(self, _: object, __: object, ___: object) -> None:
        return None

    def set(self, **attributes: Value) -> None:
        """Nothing."""


_OFF = _Off()
_tracer: Any = None
_provider: Any = None


def span(kind: str, **attributes: Value) -> AbstractContextManager[Span]:
    """A span around a block, below the one that this task is in. An exception marks it as failed and goes on.

    `kind` is its name, one of few; what tells it from others belongs into the attributes.
    """
    if _tracer is None:
        return _OFF
    return _On(_tracer, kind, attributes)


def enabled() -> bool:
    """Whether spans are written, for who would have to work out what they tell."""
    return _tracer is not None


class _On:
    """A span of OpenTelemetry. What it raises is logged and goes no further."""

    __slots__ = ("_attributes", "_kind", "_span", "_token", "_tracer")

    def __init__(self, tracer: Any, kind: str, attributes: dict[str, Value]) -> None:
        self._tracer, self._kind, self._attributes = tracer, kind, attributes
        self._span: Any = None
        self._token: Any = None

    def __enter__(self) -> _On:
        try:
            from opentelemetry import context, trace

            attributes = {
                **self._attributes,
                "run": session_run.get(),
                "trajectory_id": trajectory_id.get(),
                "correlation_id": correlation_id.get(),
            }
            self._span = self._tracer.start_span(self._kind, attributes=_written(attributes))
            self._token = context.attach(trace.set_span_in_context(self._span))
        except Exception:
            _complain()
        return self

    def __exit__(self, _: object, failure: BaseException | None, __: object) -> None:
        try:
            from opentelemetry import context

            if self._token is not None:
                context.detach(self._token)
            if self._span is not None:
                if failure is not None:
                    self._fail(failure)
                self._span.end()
        except Exception:
            _complain()

    def set(self, **attributes: Value) -> None:
        """See Span. `error` marks the span as failed."""
        try:
            if self._span is not None and self._span.is_recording():
                self._span.set_attributes(_written(attributes))
                if attributes.get("error") is not None:
                    self._mark(_text(str(attributes["error"])))
        except Exception:
            _complain()

    def _fail(self, failure: BaseException) -> None:
        self._span.set_attribute("error.type", type(failure).__name__)
        self._mark(_text(f"{type(failure).__name__}: {failure}"))

    def _mark(self, description: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_status(Status(StatusCode.ERROR, description))


def install(settings: TraceSettings | None, component: str, instance: str = "", exporter: Any = None) -> None:
    """Trace from now on, in this process. None: change nothing. Raises ConfigError without OpenTelemetry.

    `exporter`: a SpanExporter in place of the one that sends to `settings.endpoint`.
    """
    global _tracer, _provider
    if settings is None:
        return
    uninstall()
    make_exporter = require()
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    named = {
        "service.name": "rollout-cluster",
        "service.namespace": settings.cluster,
        "service.instance.id": instance or component,
        "rollout.component": component,
    }
    # Not the process's global provider: that is for vLLM, and for what users set up themselves.
    provider = TracerProvider(
        resource=Resource.create(named),
        sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
        shutdown_on_exit=False,
    )
    exporter = exporter or make_exporter(endpoint=settings.endpoint, timeout=EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=MAX_QUEUE))
    _provider, _tracer = provider, provider.get_tracer("rollout")


def uninstall() -> None:
    """Trace no more, and send what is left. May take some seconds where the collector does not answer."""
    global _tracer, _provider
    provider, _provider, _tracer = _provider, None, None
    if provider is None:
        return
    try:
        provider.force_flush(int(1000 * FLUSH_SECONDS))
        provider.shutdown()
    except Exception:
        _complain()


def require() -> Any:
    """The class of OpenTelemetry's OTLP/HTTP exporter. Raises ConfigError where it is not installed."""
    try:
        import opentelemetry.sdk.trace  # noqa: F401
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"tracing.endpoint: needs OpenTelemetry's SDK and its OTLP exporter, which are not installed ({error}); "
            "`pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http`, or remove the line"
        ) from None
    return OTLPSpanExporter


_redact = Redactor()


def _written(attributes: dict[str, Value]) -> dict[str, Any]:
    return {
        _NAMES.get(name) or PREFIX + name: _text(value) if isinstance(value, str) else value
        for name, value in attributes.items()
        if value is not None
    }


def _text(value: str) -> str:
    return _redact(value[: 4 * MAX_TEXT_CHARS])[:MAX_TEXT_CHARS]


def _complain() -> None:
    logger.debug("a span could not be written", exc_info=True)
