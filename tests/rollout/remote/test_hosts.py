"""Which addresses a rollout server may call."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx
import pytest

from rollout.remote import hosts as module
from rollout.remote.hosts import AllowedHosts, HostRefused, HostUnknown


def allowed(*patterns: str, **names: str | list[str]) -> AllowedHosts:
    """Names with `_` for dots, and what they lead to."""
    known = {name.replace("_", "."): found for name, found in names.items()}

    async def resolve(host: str, port: int) -> Sequence[str]:
        if host not in known:
            raise OSError("no such name")
        found = known[host]
        return [found] if isinstance(found, str) else found

    return AllowedHosts(patterns, resolve=resolve)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9000", "https://127.8.9.1/x", "http://[::1]:80/v1"])
async def test_this_machine_needs_no_list(url: str):
    await allowed().check_url(url)


async def test_localhost_leads_to_this_machine_or_nowhere():
    endpoint = await allowed(localhost="127.0.0.1").check_url("http://localhost:9000/v1/x")
    assert (endpoint.url, endpoint.host, endpoint.name) == (
        "http://127.0.0.1:9000/v1/x",
        "localhost:9000",
        "localhost",
    )
    with pytest.raises(HostRefused, match=r"leads to 10\.0\.0\.1"):
        await allowed("10.0.0.0/8", localhost="10.0.0.1").check_url("http://localhost:9000")


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1",
        "http://169.254.169.254/latest",
        "http://trainer.example",
        "http://[fe80::1]/",
        "http://[::ffff:10.0.0.1]/",
        "http://0.0.0.0:80",
        # Other spellings of 127.0.0.1, which an operating system would take.
        "http://2130706433",
        "http://0x7f.1",
        "http://127.1",
        "http://localhost.example",
        "ftp://127.0.0.1",
        "file:///etc/passwd",
        "http://user@127.0.0.1",
        "http://user:pw@127.0.0.1",
        "http://127.0.0.1:99999",
        "http://127.0.0.1\\@10.0.0.1",
        "http://127.0.0.1/?x=1",
        "http://127.0.0.1/#x",
        "http:///x",
        "http://127.0.0.1 /",
        "http://exa mple",
        "http://" + "a" * 3000,
    ],
)
async def test_everything_else_is_refused(url: str):
    with pytest.raises(HostRefused):
        allowed().check_listed(url)
    with pytest.raises(HostRefused):
        await allowed(trainer_example="8.8.8.8").check_url(url)


@pytest.mark.parametrize(
    ("pattern", "passes", "refused"),
    [
        ("10.1.0.0/16", "http://10.1.2.3:1", "http://10.2.0.1:1"),
        ("10.1.2.3", "http://10.1.2.3:77", "http://10.1.2.4:77"),
        ("10.1.2.3:77", "http://10.1.2.3:77", "http://10.1.2.3:78"),
        ("fd00::/8", "http://[fd00::5]:1", "http://[fe80::5]:1"),
        ("[fd00::5]:77", "http://[fd00::5]:77", "http://[fd00::5]:78"),
        ("trainer.example", "http://trainer.example", "http://x.trainer.example"),
        ("trainer.example", "http://TRAINER.example./", "http://trainer.example.evil"),
        ("trainer.example:80", "http://trainer.example", "https://trainer.example"),
        ("*.example", "http://a.b.example", "http://example"),
        ("*.example", "http://a.example", "http://badexample"),
    ],
)
def test_patterns(pattern: str, passes: str, refused: str):
    hosts = allowed(pattern)
    hosts.check_listed(passes)
    with pytest.raises(HostRefused, match="allowed_hosts"):
        hosts.check_listed(refused)


@pytest.mark.parametrize("pattern", ["", "http://x", "a b", "host:port", "host:0", "*", "*.", "1.2.3.4.5", "a/b"])
def test_patterns_that_are_none(pattern: str):
    with pytest.raises(ValueError, match=r"port|none of"):
        AllowedHosts([pattern])


@pytest.mark.parametrize(
    "address",
    [
        *("10.0.0.1", "127.0.0.1", "169.254.169.254", "::1", "fd00::1", "100.64.0.1", "224.0.0.1", "0.0.0.0"),
        # IPv4 in IPv6: mapped, compatible, NAT64, NAT64 within a site, 6to4, Teredo; and the old site-local.
        *("::ffff:10.0.0.1", "::10.0.0.1", "::8.8.8.8", "64:ff9b::a00:1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1"),
        *("2002:a00:1::", "2002:7f00:1::1", "2001:0:808:808::1", "fec0::1"),
    ],
)
async def test_a_listed_name_must_not_lead_inside(address: str):
    with pytest.raises(HostRefused, match="not a public address"):
        await allowed("trainer.example", trainer_example=address).check_url("http://trainer.example:9")
    # One bad answer among good ones is enough.
    with pytest.raises(HostRefused):
        await allowed("t.example", t_example=["8.8.8.8", address]).check_url("http://t.example")


async def test_an_ipv4_address_behind_a_gateway_counts_as_itself():
    for address in ("64:ff9b::808:808", "2002:808:808::1"):
        endpoint = await allowed("t.example", t_example=address).check_url("http://t.example")
        assert endpoint.url == f"http://[{address}]:80", "the connection goes through the gateway all the same"
    inside = {"t_example": "64:ff9b::a00:1"}
    await allowed("t.example", "10.0.0.0/8", **inside).check_url("http://t.example")
    await allowed("t.example", "64:ff9b::/96", **inside).check_url("http://t.example")


async def test_a_listed_name_may_lead_into_a_listed_network():
    hosts = allowed("trainer.internal", "10.0.0.0/8", trainer_internal="10.0.0.1")
    endpoint = await hosts.check_url("https://trainer.internal/v1")
    assert endpoint.url == "https://10.0.0.1:443/v1"
    assert (endpoint.host, endpoint.name) == ("trainer.internal", "trainer.internal")
    with pytest.raises(HostRefused, match="allowed_hosts"):
        allowed("10.0.0.0/8").check_listed("http://trainer.internal")


async def test_the_answer_is_remembered_so_that_it_cannot_change_under_a_rollout():
    answers = ["8.8.8.8", "10.0.0.1"]

    async def resolve(host: str, port: int) -> list[str]:
        return [answers.pop(0)]

    hosts = AllowedHosts(["t.example"], resolve=resolve)
    for _ in range(3):
        assert (await hosts.check_url("http://t.example")).url.startswith("http://8.8.8.8")
    assert len(answers) == 1


class Net:
    """Machines of which some take no connection."""

    def __init__(self, *dead: str, error: type[Exception] = httpx.ConnectError) -> None:
        self.dead, self.error = set(dead), error
        self.tried: list[str] = []
        self.http = httpx.AsyncClient(transport=httpx.MockTransport(self._handle))

    def _handle(self, request: httpx.Request) -> httpx.Response:
        assert (request.headers["host"], request.extensions["sni_hostname"]) == ("t.example:9", "t.example")
        self.tried.append(request.url.host)
        if request.url.host in self.dead:
            raise self.error("")
        return httpx.Response(200)


DEAD, ALIVE = "2001:4860:4860::8888", "8.8.8.8"


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ConnectTimeout])
async def test_an_address_that_takes_no_connection_leaves_it_to_the_next(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    net = Net(DEAD, error=error)
    hosts = allowed("t.example", t_example=[DEAD, DEAD, ALIVE])
    for _ in range(2):
        assert (await hosts.send(net.http, "POST", "http://t.example:9/x", content=b"")).status_code == 200
    assert net.tried == [DEAD, ALIVE, ALIVE], "what has worked comes first"
    monkeypatch.setattr(module, "REMEMBER_S", -1.0)
    hosts._known["t.example", 9] = (0.0, hosts._known["t.example", 9][1])
    await hosts.send(net.http, "POST", "http://t.example:9/x")
    assert net.tried[3:] == [ALIVE], "also after the name was looked up again"


async def test_only_connections_are_tried_elsewhere_and_the_last_failure_is_told():
    net = Net(DEAD, ALIVE)
    hosts = allowed("t.example", t_example=[DEAD, ALIVE])
    with pytest.raises(httpx.ConnectError):
        await hosts.send(net.http, "GET", "http://t.example:9")
    assert net.tried == [DEAD, ALIVE]
    net = Net(DEAD, error=httpx.ReadError)
    with pytest.raises(httpx.ReadError):
        await hosts.send(net.http, "GET", "http://t.example:9")
    assert net.tried == [DEAD], "something may have been sent"


async def test_so_many_addresses_are_tried_and_no_more():
    found = [f"8.8.8.{number}" for number in range(1, 100)]
    endpoint = await allowed("t.example", t_example=found).check_url("http://t.example")
    assert len(endpoint.urls) == module.MAX_ADDRESSES
    with pytest.raises(HostRefused):
        await allowed("t.example", t_example=[*found, "10.0.0.1"]).check_url("http://t.example")


async def test_a_name_service_that_fails_or_hangs_is_no_refusal(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(HostUnknown):
        await allowed("t.example").check_url("http://t.example")
    monkeypatch.setattr(module, "LOOKUP_SECONDS", 0.01)

    async def hang(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    with pytest.raises(HostUnknown, match="within"):
        await AllowedHosts(["t.example"], resolve=hang).check_url("http://t.example")
