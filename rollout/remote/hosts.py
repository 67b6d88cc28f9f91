"""Where a rollout server may send its calls: a list, because the address comes from whoever asks for a rollout.

Invariant: a call goes only to an address that the list allows, and to the very address that was checked: a name is
looked up once, each answer is checked, and the connection is made to one of what was found. A name stands in the list
or is refused; what a name leads to is trusted only as far as the list says so too. Without a list: this machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

from rollout.remote.failures import RemoteFailure

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Addresses of a host name, for a port. Raises OSError."""

LOOKUP_SECONDS = 5.0
# A checked answer is used so long before the name is looked up again.
REMEMBER_S = 30.0
MAX_REMEMBERED = 1_024
# Of one name. All are checked; the first so many are tried.
MAX_ADDRESSES = 8
MAX_URL_CHARS = 2_048
DEFAULT_PORTS = {"http": 80, "https": 443}
LOCALHOST = "localhost"
LOOPBACK: tuple[Network, ...] = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
# IPv6 addresses that a gateway takes apart: behind them is the IPv4 address at this place (bits from the right).
_CARRIERS: tuple[tuple[ipaddress.IPv6Network, int], ...] = (
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4
)
# Never public, whatever Python's tables say: IPv4-compatible, NAT64 within a site, Teredo, site-local.
_INSIDE = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b:1::/48", "2001::/32", "fec0::/10")))

_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*\.?")


class HostRefused(RemoteFailure):
    """The URL is not one that this server may call. The message names what to change."""

    def __init__(self, message: str) -> None:
        super().__init__("validation_error", message)


class HostUnknown(RemoteFailure):
    """The name could not be looked up this time."""

    def __init__(self, message: str) -> None:
        super().__init__("network_error", message)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A checked URL, ready to be called."""

    urls: tuple[str, ...]
    """With an address in the host's place, the one to begin with first."""
    host: str
    """For the Host header: host and port as they were written."""
    name: str
    """For TLS: whose certificate it must be."""
    addresses: tuple[Address, ...]
    """Those of `urls`."""

    @property
    def url(self) -> str:
        """The first of them."""
        return self.urls[0]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of the list."""

    name: str | None
    """A host name; with a dot at its beginning, everything below it."""
    network: Network | None
    port: int | None
    """None: every port."""

    def names(self, host: str, port: int) -> bool:
        if self.name is None or self.port not in (None, port):
            return False
        return host.endswith(self.name) if self.name.startswith(".") else host == self.name

    def holds(self, address: Address, port: int) -> bool:
        if self.network is None or self.port not in (None, port):
            return False
        return address.version == self.network.version and address in self.network


class AllowedHosts:
    """The list, and the looking up of names."""

    def __init__(self, patterns: Sequence[str] = (), *, resolve: Resolver | None = None) -> None:
        """`patterns`: `host`, `host:port`, `*.suffix`, an address, or a network such as 10.0.0.0/8 or fd00::/8.

        Raises ValueError, which repeats the pattern that is none of these.
        """
        self._entries = [_entry(pattern) for pattern in patterns]
        self._resolve = resolve or _look_up
        self._known: dict[tuple[str, int], tuple[float, tuple[Address, ...]]] = {}

    def check_listed(self, url: str) -> None:
        """Whether the URL's host is allowed as it is written, without looking it up. Raises HostRefused."""
        self._listed(url)

    async def check_url(self, url: str) -> Endpoint:
        """Check a URL, and look up the name in it.

        Raises HostRefused, and HostUnknown where the name service has no answer.
        """
        parts, host, port = self._listed(url)
        literal = _literal(host)
        addresses = await self._checked(host, port) if literal is None else (literal,)
        return Endpoint(
            urls=tuple(parts._replace(netloc=f"{_shown(address)}:{port}").geturl() for address in addresses),
            host=parts.netloc,
            name=host,
            addresses=addresses,
        )

    async def send(self, http: httpx.AsyncClient, method: str, url: str, **options: Any) -> httpx.Response:
        """Check a URL and send a request to it: to the first of its addresses that takes a connection.

        `options`: those of httpx's build_request. The response is not read yet; close it. Raises as check_url and
        httpx do; a connection error is of the last address.
        """
        endpoint = await self.check_url(url)
        headers = {**options.pop("headers", {}), "host": endpoint.host}
        # The address was checked, so the connection is made to it; the certificate must be the name's.
        extensions = {"sni_hostname": endpoint.name}
        for number, address in enumerate(endpoint.urls):
            request = http.build_request(method, address, headers=headers, extensions=extensions, **options)
            try:
                response = await http.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                # Nothing was sent. A name may have addresses that are dead, or of a protocol that is not spoken here.
                if number + 1 == len(endpoint.urls):
                    raise
            else:
                if number:
                    self._prefer(url, endpoint.addresses[number])
                return response
        raise AssertionError("the last address returns or raises")

    def _prefer(self, url: str, address: Address) -> None:
        """Begin with this address the next time: a dead one before it costs its timeout with every call."""
        _, host, port = _split(url)
        if (known := self._known.get((host, port))) is not None:
            self._known[host, port] = known[0], _first(address, known[1])

    def _listed(self, url: str) -> tuple[SplitResult, str, int]:
        parts, host, port = _split(url)
        address = _literal(host)
        if address is not None:
            loopback = any(address.version == net.version and address in net for net in LOOPBACK)
            if loopback or any(entry.holds(address, port) for entry in self._entries):
                return parts, host, port
        elif host == LOCALHOST or any(entry.names(host, port) for entry in self._entries):
            return parts, host, port
        raise HostRefused(
            f"server_url: {host}:{port} is no address that this rollout server calls; whoever runs it can add it to "
            "remote_rollout.allowed_hosts"
        )

    async def _checked(self, host: str, port: int) -> tuple[Address, ...]:
        known = self._known.get((host, port))
        if known is not None and known[0] > time.monotonic():
            return known[1]
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                found = [ipaddress.ip_address(item.partition("%")[0]) for item in await self._resolve(host, port)]
        except TimeoutError:
            raise HostUnknown(f"server_url: {host} could not be looked up within {LOOKUP_SECONDS:g} s") from None
        except (OSError, ValueError, UnicodeError):
            raise HostUnknown(f"server_url: {host} is not known to the name service") from None
        if not found:
            raise HostUnknown(f"server_url: {host} has no address")
        # Twice is once, and what has worked before comes first.
        addresses = tuple(dict.fromkeys(map(_plain, found)))
        for address in addresses:
            if not self._reachable(host, address, port):
                # All, not the first: which one is taken must not be for the name's owner to choose.
                raise HostRefused(
                    f"server_url: {host} leads to {address}, which is not a public address; list its network in "
                    "remote_rollout.allowed_hosts as well if that is meant"
                )
        addresses = _first(known[1][0], addresses) if known is not None else addresses
        addresses = addresses[:MAX_ADDRESSES]
        if len(self._known) >= MAX_REMEMBERED:
            self._known.clear()
        self._known[host, port] = (time.monotonic() + REMEMBER_S, addresses)
        return addresses

    def _reachable(self, host: str, address: Address, port: int) -> bool:
        if host == LOCALHOST:
            return address.is_loopback
        if any(entry.holds(address, port) for entry in self._entries):
            return True
        if address.version == 6 and any(address in network for network in _INSIDE):
            return False
        carried = _carried(address)
        if carried is not None and not self._reachable(host, carried, port):
            return False
        return address.is_global and not address.is_multicast


def _entry(pattern: str) -> _Entry:
    text = pattern.strip().lower()
    try:
        return _Entry(None, ipaddress.ip_network(text, strict=False), None)
    except ValueError:
        pass
    host, separator, number = text.rpartition(":")
    if not separator:
        host, number = text, ""
    if separator and not (number.isascii() and number.isdigit() and 0 < int(number) < 65536):
        raise ValueError(f"{pattern!r}: what follows the colon must be a port from 1 to 65535")
    port = int(number) if number else None
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    address = _literal(host)
    if address is not None:
        return _Entry(None, ipaddress.ip_network(address), port)
    below = host.removeprefix("*.")
    if not _NAME.fullmatch(below) or below.replace(".", "").isdigit():
        raise ValueError(
            f"{pattern!r} is none of host, host:port, *.suffix, address and network (such as 10.0.0.0/8)"
        )
    below = below.rstrip(".")
    return _Entry(below if below == host.rstrip(".") else f".{below}", None, port)


def _split(url: str) -> tuple[SplitResult, str, int]:
    if len(url) > MAX_URL_CHARS or not url.isprintable() or " " in url or "\\" in url:
        raise HostRefused("server_url: is too long or holds characters that no URL has")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise HostRefused("server_url: is not a URL") from None
    if parts.scheme not in DEFAULT_PORTS:
        raise HostRefused("server_url: only http and https are called")
    if parts.username is not None or parts.password is not None:
        raise HostRefused("server_url: must not hold a user or password; send the key as the request's api key")
    if parts.query or parts.fragment:
        raise HostRefused("server_url: must end with its path, without ? and #")
    host = host.rstrip(".")
    if not host or (_literal(host) is None and not _NAME.fullmatch(host)):
        raise HostRefused("server_url: names no host, or one in a spelling that is not taken")
    return parts, host, DEFAULT_PORTS[parts.scheme] if port is None else port


def _literal(host: str) -> Address | None:
    """The address that a host is written as. Only the plain spelling: 0x7f.1 and 2130706433 are names to us."""
    try:
        return _plain(ipaddress.ip_address(host))
    except ValueError:
        return None


def _plain(address: Address) -> Address:
    """An IPv4 address in an IPv6 one's clothes is the IPv4 address."""
    mapped = getattr(address, "ipv4_mapped", None)
    return address if mapped is None else mapped


def _first(address: Address, addresses: tuple[Address, ...]) -> tuple[Address, ...]:
    """The same with this one, if it is among them, in front."""
    return tuple(sorted(addresses, key=lambda other: other != address))


def _shown(address: Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)


def _carried(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a gateway makes of an IPv6 one. The connection is made to the latter all the same."""
    for network, shift in _CARRIERS:
        if address in network:
            return ipaddress.IPv4Address(int(address) >> shift & 0xFFFF_FFFF)
    return None


async def _look_up(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(item[4][0]) for item in found]
