"""What the front's HAProxy is told: its configuration, and the commands that keep its lists of servers true.

Invariant: a request that is in a stream is never cut by a change of the lists. Servers sit in numbered slots; a slot
changes hands only after it was taken out of service. Pure: text in, text out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rollout.logs import LogSettings

# Slots for engines. HAProxy takes no more memory for them than a line each.
SLOTS = 64
# A stream may rest so long between two tokens: the longest prefill that anyone waits for.
STREAM_IDLE_SECONDS = 3600
CONNECT_SECONDS = 5
# A request's headers must have arrived by then.
REQUEST_SECONDS = 60
KEEP_ALIVE_SECONDS = 75
CHECK_MS = 1000
# Failed checks in a row until a server gets nothing more.
FALL = 2

# vLLM's own endpoints that are served to the outside, each with what follows it after a slash. Everything else that
# vLLM's application has (profiling, sleeping, loading of adapters …) stays inside.
ENGINE_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/models",
    "/tokenize",
    "/detokenize",
)

# Those of them whose clients read Anthropic's errors; the others read OpenAI's.
ANTHROPIC_PATH = "/v1/messages"
SESSION_HEADER = "x-rollout-session"
ID_HEADER = "x-correlation-id"
# The first of each header, as HAProxy looks it up; the second one counts where the first is no id.
_ID, _OTHER_ID = f"req.fhdr({ID_HEADER},1)", "req.fhdr(x-request-id,1)"
# What counts as an id: as rollout.correlation has it, or the front and who is behind it would choose different ones.
UUID_PATTERN = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"

# What HAProxy answers itself: message, then the error's type as OpenAI and as Anthropic call it. Nothing replaces the
# pages that its parser has of its own, for what it cannot read as a request (400) or waits for in vain (408).
_ERRORS = {
    400: ("the request's body is no HTTP", "invalid_request_error", "invalid_request_error"),
    404: (
        "a session serves the model's own paths only, such as /v1/chat/completions",
        "invalid_request_error",
        "not_found_error",
    ),
    408: ("the request's body did not arrive in time", "invalid_request_error", "timeout_error"),
    502: ("the connection to the server behind broke", "unavailable", "api_error"),
    503: ("no engine is ready", "unavailable", "overloaded_error"),
    504: ("the server behind did not answer in time", "unavailable", "timeout_error"),
}
# The beginning and the end of these bodies.
_OPENAI = ('{"error": {', ', "param": null, "code": null}}')
_ANTHROPIC = ('{"type": "error", "error": {', '}, "request_id": "%[var(txn.id)]"}')


@dataclass(frozen=True)
class FrontSettings:
    """Where the front listens and whom it hands requests to."""

    host: str
    port: int
    gateway: str
    """host:port of Serve's proxy, behind which the gateway is."""
    folder: str
    """For the configuration and the admin socket. Short: a socket's path may not exceed 107 characters."""
    max_connections: int = 4096
    logging: LogSettings | None = None
    """Of the front's process; HAProxy itself writes `front.log` in the folder."""


def config_text(settings: FrontSettings) -> str:
    """HAProxy's configuration. Every engine slot is empty at first.

    `noreuseport`, or two clusters could listen at one address, and each would get every second request.
    """
    paths = " ".join(ENGINE_PATHS)
    below = " ".join(f"{path}/" for path in ENGINE_PATHS)
    errors = "\n".join(f"    http-error status {status} {_error(status)}" for status in _ERRORS)
    return f"""global
    maxconn {settings.max_connections}
    nbthread 1
    noreuseport
    stats socket {settings.folder}/front.sock mode 600 level admin
    hard-stop-after 10s
defaults
    mode http
    timeout connect {CONNECT_SECONDS}s
    timeout http-request {REQUEST_SECONDS}s
    timeout http-keep-alive {KEEP_ALIVE_SECONDS}s
    timeout client {STREAM_IDLE_SECONDS}s
    timeout server {STREAM_IDLE_SECONDS}s
    timeout queue 30s
    option http-no-delay
    option abortonclose
    option redispatch 1
    retries 2
    retry-on conn-failure
    http-reuse safe
{errors}
frontend front
    bind {settings.host}:{settings.port}
    # One id for a request, whoever answers it: the caller's if it is one, else a new one.
    http-request set-var(txn.id) {_ID} if {{ {_ID} -m reg -i ^{UUID_PATTERN}$ }}
    acl has_id var(txn.id) -m found
    http-request set-var(txn.id) {_OTHER_ID} if !has_id {{ {_OTHER_ID} -m reg -i ^{UUID_PATTERN}$ }}
    http-request set-var(txn.id) uuid() if !has_id
    http-request set-header {ID_HEADER} %[var(txn.id)]
    http-after-response set-header {ID_HEADER} %[var(txn.id)] if !{{ res.hdr({ID_HEADER}) -m found }}
    # A captured session's address: what follows /api is the engine's path, and the header says whose it is.
    http-request del-header {SESSION_HEADER}
    http-request set-header {SESSION_HEADER} %[path,field(4,/)] if {{ path_reg ^/v1/sessions/[^/]+/api/ }}
    http-request replace-path ^/v1/sessions/[^/]+/api(/.*) \\1
    acl engine path {paths}
    acl engine path_beg {below}
    # How the errors below begin and end is the path's matter; which of their types is meant, each error's own.
    acl anthropic path {ANTHROPIC_PATH}
    acl anthropic path_beg {ANTHROPIC_PATH}/
    http-request set-var(txn.anthropic) bool(false)
    http-request set-var-fmt(txn.begin) {_quoted(_OPENAI[0])}
    http-request set-var-fmt(txn.end) {_quoted(_OPENAI[1])}
    http-request set-var(txn.anthropic) bool(true) if anthropic
    http-request set-var-fmt(txn.begin) {_quoted(_ANTHROPIC[0])} if anthropic
    http-request set-var-fmt(txn.end) {_quoted(_ANTHROPIC[1])} if anthropic
    http-request deny deny_status 404 if {{ req.hdr({SESSION_HEADER}) -m found }} !engine
    use_backend engines if engine
    default_backend gateway
backend engines
    balance leastconn
    option httpchk GET /health
    default-server inter {CHECK_MS}ms fastinter 250ms downinter 250ms fall {FALL} rise 1 init-addr none
    server-template engine 1-{SLOTS} 127.0.0.1:1 check disabled
backend gateway
    http-error status 503 {_error(503, "the gateway does not answer")}
    server gateway {settings.gateway}
"""


def _error(status: int, message: str = "") -> str:
    """What HAProxy says in place of its own page, in the form of the path's clients. `message`: another one."""
    usual, openai, anthropic = _ERRORS[status]
    kind = f"%[var(txn.anthropic),iif({anthropic},{openai})]"
    body = f'%[var(txn.begin)]"message": "{message or usual}", "type": "{kind}"%[var(txn.end)]'
    repeated = " hdr Retry-After 1" if status == 503 else ""
    return f"content-type application/json lf-string {_quoted(body)}{repeated}"


def _quoted(text: str) -> str:
    """One word of HAProxy's configuration."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


class Slots:
    """Which engine is in which slot."""

    def __init__(self, size: int = SLOTS) -> None:
        self._taken: dict[int, str] = {}
        self._size = size

    @property
    def addresses(self) -> Mapping[int, str]:
        """host:port by slot."""
        return self._taken

    def commands(self, addresses: Iterable[str]) -> list[str]:
        """What to tell HAProxy so that exactly these engines get requests, those gone first.

        Requests that are on their way to an engine that is taken out may end there. Raises ValueError for more
        engines than there are slots.
        """
        wanted = set(addresses)
        if len(wanted) > self._size:
            raise ValueError(f"{len(wanted)} engines for {self._size} slots of the front")
        told = []
        for slot, address in list(self._taken.items()):
            if address not in wanted:
                told.append(_clear(slot))
                del self._taken[slot]
        free = (slot for slot in range(1, self._size + 1) if slot not in self._taken)
        for address in sorted(wanted - set(self._taken.values())):
            slot = next(free)
            told += _fill(slot, address)
            self._taken[slot] = address
        return told

    def all_commands(self) -> list[str]:
        """Everything that HAProxy must know, for when it is not certain what it has been told.

        A slot whose change was lost gets its new address while it is in service; its streams stay where they are.
        """
        told = [_clear(slot) for slot in range(1, self._size + 1) if slot not in self._taken]
        for slot, address in self._taken.items():
            told += _fill(slot, address)
        return told


def _clear(slot: int) -> str:
    return f"set server engines/engine{slot} state maint"


def _fill(slot: int, address: str) -> list[str]:
    host, _, port = address.rpartition(":")
    return [
        f"set server engines/engine{slot} addr {host} port {port}",
        f"set server engines/engine{slot} state ready",
    ]
