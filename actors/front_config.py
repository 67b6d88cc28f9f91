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


SESSION_HEADER = "x-rollout-session"


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
    http-error status 404 {_error("a session serves the model's own paths only, such as /v1/chat/completions")}
    http-error status 502 {_error("the connection to the server behind broke")}
    http-error status 503 {_error("no engine is ready")} hdr Retry-After 1
    http-error status 504 {_error("the server behind did not answer in time")}
frontend front
    bind {settings.host}:{settings.port}
    # A captured session's address: what follows /api is the engine's path, and the header says whose it is.
    http-request del-header {SESSION_HEADER}
    http-request set-header {SESSION_HEADER} %[path,field(4,/)] if {{ path_reg ^/v1/sessions/[^/]+/api/ }}
    http-request replace-path ^/v1/sessions/[^/]+/api(/.*) \\1
    acl engine path {paths}
    acl engine path_beg {below}
    http-request deny deny_status 404 if {{ req.hdr({SESSION_HEADER}) -m found }} !engine
    use_backend engines if engine
    default_backend gateway
backend engines
    balance leastconn
    option httpchk GET /health
    default-server inter {CHECK_MS}ms fastinter 250ms downinter 250ms fall {FALL} rise 1 init-addr none
    server-template engine 1-{SLOTS} 127.0.0.1:1 check disabled
backend gateway
    http-error status 503 {_error("the gateway does not answer")} hdr Retry-After 1
    server gateway {settings.gateway}
"""


def _error(message: str) -> str:
    """A body in OpenAI's form of an error, as HAProxy's configuration wants it."""
    body = f'{{"error": {{"message": "{message}", "type": "unavailable", "param": null, "code": null}}}}'
    quoted = body.replace("\\", "\\\\").replace('"', '\\"')
    return f'content-type application/json string "{quoted}"'


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
