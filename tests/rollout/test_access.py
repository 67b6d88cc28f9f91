"""Keys, tokens, scopes of paths, limits and the decision on a request, without any HTTP."""

from __future__ import annotations

import asyncio
import logging
import pickle
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout import access_limits
from rollout.access import AccessKey, AccessSettings, Caller, Gate, JwtSettings, Refusal, allows, hash_key
from rollout.access_limits import Bounds, Bucket, Limiter
from rollout.access_paths import MAX_PATH_CHARS, SCOPES, Need, Scope, error_form, needed_scope, normalised
from rollout.correlation import CorrelationFilter, choose_id, correlation_id
from rollout.session_keys import session_key

SERVE, TRAINER, ADMIN = "k" * 40 + "-serve", "k" * 40 + "-trainer", "k" * 40 + "-admin"
KEYS = tuple(
    AccessKey(name, hash_key(key), frozenset([scope]))
    for name, key, scope in (("ui", SERVE, "serve"), ("grpo", TRAINER, "trainer"), ("ops", ADMIN, "admin"))
)
SECRET = "s" * 64 + "-signs-every-token-here"
JWT = JwtSettings("HS256", "https://issuer", "rollout", SECRET)


def admitted(headers: dict[str, str], path: str = "/v1/models", method: str = "GET", **settings: Any) -> Any:
    gate = Gate(AccessSettings(**({"keys": KEYS} | settings)))
    return gate.admit(method, path, {name.encode(): value.encode() for name, value in headers.items()}, "10.0.0.9")


# Paths


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/health", None),
        ("GET", "/ready", None),
        ("POST", "/remote/worker-0/v1/completions", None),
        ("POST", "/remote/worker-0/v1/chat/completions", None),
        ("POST", "/remote/worker-0/v1/rollout/completed", None),
        ("GET", "/remote/worker-0/v1/completions", "admin"),
        ("POST", "/remote/a/b/v1/completions", "admin"),
        ("POST", "/health", "admin"),
        ("POST", "/v1/chat/completions", "serve"),
        ("POST", "/v1/completions", "serve"),
        ("POST", "/v1/responses", "serve"),
        ("GET", "/v1/responses/resp_1", "serve"),
        ("POST", "/v1/responses/resp_1/cancel", "serve"),
        ("POST", "/v1/messages", "serve"),
        ("POST", "/v1/messages/count_tokens", "serve"),
        ("GET", "/v1/models", "serve"),
        ("HEAD", "/v1/models", "serve"),
        ("GET", "/v1/models/org/name", "serve"),
        ("POST", "/tokenize", "serve"),
        ("POST", "/detokenize", "serve"),
        ("POST", "/v1/inference", "serve"),
        ("GET", "/metrics", "any"),
        ("POST", "/metrics", "admin"),
        ("GET", "/v1/loading/progress", "serve"),
        ("GET", "/docs", "serve"),
        ("GET", "/openapi.json", "serve"),
        ("GET", "/agents", "serve"),
        ("GET", "/agents/a", "serve"),
        ("POST", "/agents/a/v1/chat/completions", "serve"),
        ("POST", "/agents", "admin"),
        ("POST", "/agents/a", "admin"),
        ("DELETE", "/agents/a", "admin"),
        ("DELETE", "/agents/a/v1/chat/completions", "admin"),
        ("POST", "/v1/runs", "trainer"),
        ("DELETE", "/v1/runs/r", "trainer"),
        ("POST", "/v1/runs/r/leases", "trainer"),
        ("POST", "/v1/leases/x/acknowledge", "trainer"),
        ("GET", "/v1/batches/b", "trainer"),
        ("POST", "/v1/rollout/start", "trainer"),
        ("POST", "/v1/sessions", "trainer"),
        ("GET", "/v1/weights", "trainer"),
        ("POST", "/v1/weights", "admin"),
        ("GET", "/", "admin"),
        ("GET", "", "admin"),
        ("GET", "v1/models", "admin"),
        ("OPTIONS", "/v1/models", "admin"),
        ("POST", "/v1/load_lora_adapter", "admin"),
        ("POST", "/collective_rpc", "admin"),
        ("POST", "/update_weights", "admin"),
        ("GET", "/v1/runsx", "admin"),
        ("GET", "/V1/models", "admin"),
        ("GET", "/healthz", "admin"),
    ],
)
def test_every_path_has_its_scope(method: str, path: str, scope: Scope | None):
    assert needed_scope(method, path) == scope
    if path not in ("", "/"):
        assert needed_scope(method, path + "/") == scope


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("/v1/models", "/v1/models"),
        ("//v1///models//", "/v1/models"),
        ("/v1/./runs/../models", "/v1/models"),
        ("/../../v1/models", "/v1/models"),
        ("/v1/%6dodels", "/v1/models"),
        ("/v1/%256dodels", "/v1/models"),
        ("/v1%2fmodels", "/v1/models"),
        ("/health/%2e%2e/v1/weights", "/v1/weights"),
        ("/health\\..\\v1/weights", "/v1/weights"),
        ("", "/"),
        ("%", "/%"),
    ],
)
def test_a_path_in_its_plain_spelling(path: str, plain: str):
    assert normalised(path) == plain


@pytest.mark.parametrize(
    ("method", "path"),
    [
        # What a proxy or router makes plain is for admins, whatever stands before it.
        ("POST", "/v1/runs/../weights"),
        ("POST", "/v1/runs/..%2fweights"),
        ("POST", "//v1//weights"),
        ("POST", "/v1/weights/"),
        ("POST", "/v1/%77eights"),
        ("DELETE", "/v1/runs/../../agents/a"),
        # A mounted application of vLLM's, such as /metrics, matches by its beginning alone.
        ("GET", "/metrics/../health"),
        ("GET", "/metrics/..%2f..%2fhealth"),
        ("GET", "/metrics/%252e%252e/v1/models"),
        ("GET", "/server_info\\..\\health"),
        ("GET", "/agents/../v1/weights"),
        ("GET", "/health" + "/" * MAX_PATH_CHARS),
    ],
)
def test_no_spelling_gets_around_a_scope(method: str, path: str):
    assert needed_scope(method, path) == "admin"


RANK: dict[Need | None, float] = {None: 0, "any": 0.5, "serve": 1, "trainer": 1, "admin": 2}
PIECES = st.sampled_from(
    [
        "/",
        "//",
        "/./",
        "/../",
        "/%2e%2e/",
        "%2f",
        "\\",
        "v1",
        "runs",
        "weights",
        "health",
        "metrics",
        "agents",
        "models",
    ]
)


@given(st.lists(PIECES, max_size=8).map("".join), st.sampled_from(["GET", "POST", "DELETE"]))
def test_a_spelling_needs_at_least_what_its_plain_form_needs(path: str, method: str):
    spelled, plain = needed_scope(method, path), needed_scope(method, normalised(path))
    assert RANK[spelled] >= RANK[plain]
    assert spelled == "admin" or plain is None or spelled == plain


def test_admin_implies_all_and_nothing_else_implies_anything():
    for have in SCOPES:
        for needed in SCOPES:
            assert allows(frozenset([have]), needed) == (have in (needed, "admin"))
        assert allows(frozenset([have]), None)
        assert allows(frozenset([have]), "any")
    assert not allows(frozenset(), "serve") and allows(frozenset(), None)
    assert not allows(frozenset(), "any")


# Keys


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {SERVE}"},
        {"authorization": f"bearer   {SERVE} "},
        {"x-api-key": SERVE},
        {"authorization": SERVE},
        {"x-api-key": SERVE, "authorization": "Bearer unused"},
        {"x-api-key": "unused", "authorization": f"Bearer {SERVE}"},
    ],
)
def test_both_headers_carry_a_key(headers: dict[str, str]):
    assert admitted(headers) == Caller("ui", frozenset({"serve"}))


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "no API key"),
        ({"authorization": ""}, "no API key"),
        ({"authorization": "Bearer"}, "no API key"),
        ({"authorization": "Bearer  "}, "no API key"),
        ({"authorization": f"Basic {SERVE}"}, "no API key"),
        ({"x-api-key": " "}, "no API key"),
        ({"x-api-key": SERVE[:-1]}, "not known"),
        ({"authorization": SERVE[:-1]}, "not known"),
        ({"x-api-key": SERVE + "x"}, "not known"),
        ({"x-api-key": hash_key(SERVE)}, "not known"),
        ({"x-api-key": "a.b.c"}, "not known"),
    ],
)
def test_without_a_good_key_it_is_401(headers: dict[str, str], message: str):
    refused = admitted(headers)
    assert isinstance(refused, Refusal) and refused.status == 401 and message in refused.message
    assert refused.headers() == {"WWW-Authenticate": "Bearer"}


def test_a_wrong_scope_is_403_and_says_which_is_wanted():
    refused = admitted({"x-api-key": SERVE}, "/v1/runs", "POST")
    assert isinstance(refused, Refusal) and refused.status == 403
    assert refused.message == "this needs the scope trainer; ui has: serve"
    assert isinstance(admitted({"x-api-key": TRAINER}, "/v1/chat/completions", "POST"), Refusal)
    assert isinstance(admitted({"x-api-key": TRAINER}, "/v1/weights", "POST"), Refusal)
    for method, path in (("POST", "/v1/runs"), ("POST", "/v1/weights"), ("GET", "/v1/models"), ("GET", "/x")):
        assert isinstance(admitted({"x-api-key": ADMIN}, path, method), Caller)


def test_a_sessions_key_is_let_in_only_where_something_keeps_it_to_its_session():
    key = session_key(b"secret", "s1")
    let_in = admitted({"x-api-key": key}, session_secret=b"secret", session_keys=True)
    assert let_in == Caller("session:s1", frozenset({"serve"}))
    for path in ("/v1/models", "/v1/runs"):
        refused = admitted({"x-api-key": key}, path, session_secret=b"secret")
        assert isinstance(refused, Refusal) and refused.status == 403 and key not in refused.message
    unknown = admitted({"x-api-key": key}, session_secret=b"another", session_keys=True)
    assert isinstance(unknown, Refusal) and unknown.status == 401


def test_without_keys_everybody_may_everything():
    for path in ("/v1/models", "/v1/weights", "/whatever"):
        assert admitted({"x-api-key": "?"}, path, keys=()) == Caller("10.0.0.9", frozenset(SCOPES))


def test_health_needs_no_key_and_counts_nowhere():
    gate = Gate(AccessSettings(keys=KEYS, per_caller=Bounds(1, 1), total=Bounds(1, 1)))
    for _ in range(5):
        caller = gate.admit("GET", "/health", {}, "10.0.0.9")
        assert isinstance(caller, Caller) and not caller.scopes
        assert gate.enter(caller) is None


def test_secrets_are_in_no_repr_and_no_message():
    settings = AccessSettings(keys=KEYS, jwt=JWT)
    assert SECRET not in repr(settings) and KEYS[0].sha256 not in repr(settings) and "ui" in repr(settings)
    assert pickle.loads(pickle.dumps(settings)) == settings
    refused = admitted({"x-api-key": "sk-not-to-be-told"})
    assert "sk-not" not in repr(refused) and "sk-not" not in str(refused.body("/v1/runs", "id"))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            {
                "error": {
                    "message": "m",
                    "type": "invalid_request_error",
                    "param": None,
                    "code": "insufficient_permissions",
                }
            },
        ),
        (
            "/v1/messages",
            {"type": "error", "error": {"type": "permission_error", "message": "m"}, "request_id": "id"},
        ),
        ("/v1/runs", {"error": {"type": "forbidden", "message": "m", "field": None}}),
        ("/rollout", {"detail": "m", "error": {"type": "forbidden", "message": "m", "field": None}}),
    ],
)
def test_errors_have_the_form_that_the_paths_clients_read(path: str, body: dict[str, Any]):
    assert Refusal("forbidden", "m").body(path, "id") == body


def test_forms_of_whole_families():
    assert error_form("//v1/messages/render") == "anthropic"
    assert [error_form(path) for path in ("/v1/models/a", "/tokenize", "/agents/a/v1/models")] == ["openai"] * 3
    assert [error_form(path) for path in ("/v1/messagesx", "/", "/v1/runs/r")] == ["ours"] * 3
    remote = ("/v1/rollout/init", "/rollout", "/tools", "/platform/health")
    assert [error_form(path) for path in remote] == ["remote"] * 4


# Tokens


def token(algorithm: str = "HS256", key: Any = SECRET, drop: str | None = None, **claims: Any) -> str:
    jwt = pytest.importorskip("jwt")
    now = 4_000_000_000
    given = {"iss": JWT.issuer, "aud": JWT.audience, "exp": now, "sub": "alice", "scope": "openid serve"} | claims
    given.pop(drop or "", None)
    return str(jwt.encode(given, key, algorithm=algorithm))


def with_token(text: str, path: str = "/v1/models", jwt: JwtSettings = JWT) -> Any:
    return admitted({"authorization": f"Bearer {text}"}, path, keys=(), jwt=jwt)


def test_a_good_token_lets_in():
    assert with_token(token()) == Caller("jwt:alice", frozenset({"serve"}))
    assert with_token(token(scope=["trainer", "serve", 3])).scopes == {"serve", "trainer"}
    assert with_token(token(aud=["other", "rollout"])).name == "jwt:alice"
    assert with_token(token(drop="sub")).name == "jwt:"
    assert admitted({"x-api-key": SERVE}, jwt=JWT).name == "ui", "keys go on being good"


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"exp": 1_000_000_000}, "expired"),
        ({"drop": "exp"}, "no claim exp"),
        ({"drop": "iss"}, "no claim iss"),
        ({"drop": "aud"}, "no claim aud"),
        ({"iss": "https://issue"}, "another issuer"),
        ({"iss": "https://issuer/evil"}, "another issuer"),
        ({"aud": "other"}, "another audience"),
        ({"nbf": 3_999_999_999}, "not valid"),
        ({"key": SECRET + "x"}, "not valid"),
        ({"algorithm": "HS384"}, "not valid"),
        ({"algorithm": "HS512"}, "not valid"),
        ({"algorithm": "none", "key": None}, "not valid"),
        ({"sub": "a\nb"}, "subject"),
        ({"sub": "a" * 500}, "subject"),
    ],
)
def test_a_bad_token_is_401_and_says_why(claims: dict[str, Any], message: str):
    refused = with_token(token(**claims))
    assert isinstance(refused, Refusal) and refused.status == 401 and message in refused.message


@pytest.mark.parametrize("text", ["..", "a.b.c", "eyJhbGciOiJub25lIn0..", "é.é.é"])
def test_what_is_no_token_is_401(text: str):
    pytest.importorskip("jwt")
    refused = with_token(text)
    assert isinstance(refused, Refusal) and refused.status == 401


def test_json_nested_without_end_is_a_bad_token():
    import base64

    pytest.importorskip("jwt")
    header = base64.urlsafe_b64encode(b'{"a":' + b"[" * 40_000).decode().rstrip("=")
    assert with_token(f"{header}.e30.AA").status == 401


def test_a_token_without_our_scopes_may_nothing():
    for scope in ("", "openid", None, 3, {"serve": 1}):
        refused = with_token(token(scope=scope))
        assert isinstance(refused, Refusal) and refused.status == 403 and "has: none" in refused.message
    assert with_token(token(drop="scope")).status == 403


def test_a_public_key_is_no_secret():
    """A token that was signed with the public key as an HS256 secret: the oldest trick."""
    pytest.importorskip("jwt")
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    public = private.public_key().public_bytes(*form).decode()
    settings = JwtSettings("ES256", JWT.issuer, JWT.audience, public)
    assert with_token(token("ES256", private), jwt=settings).name == "jwt:alice"
    assert with_token(token("HS256", SECRET), jwt=settings).status == 401
    import base64
    import hashlib
    import hmac

    head, body, _ = token().split(".")
    signature = hmac.digest(public.encode(), f"{head}.{body}".encode(), hashlib.sha256)
    forged = f"{head}.{body}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"
    assert with_token(forged, jwt=settings).status == 401


# Limits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_bucket_gives_a_minutes_worth_and_then_a_steady_rate():
    bucket = Bucket(30, 0.0)
    for _ in range(30):
        assert bucket.wait(0.0) == 0.0
        bucket.take()
    assert bucket.wait(0.0) == pytest.approx(2.0)
    assert bucket.wait(0.5) == pytest.approx(1.5)
    assert bucket.wait(2.0) == 0.0
    bucket.take()
    assert bucket.wait(1.0) > 0, "a clock that goes back gives nothing"
    for _ in range(30):
        assert bucket.wait(1e6) == 0.0
        bucket.take()
    assert bucket.wait(1e6) == pytest.approx(2.0), "a long rest saves up no more than a minute's worth"


def test_callers_have_their_own_rate_and_share_one(clock: Clock):
    limiter = Limiter(Bounds(2), Bounds(3), clock)
    assert limiter.enter("a") is None and limiter.enter("a") is None
    busy = limiter.enter("a")
    assert busy is not None and busy.retry_after == 30 and "a may send 2 requests a minute" in busy.message
    assert limiter.enter("b") is None
    busy = limiter.enter("b")
    assert busy is not None and busy.retry_after == 20 and "all callers" in busy.message
    clock.now += 20
    assert limiter.enter("b") is None, "what was refused has taken nothing"


def test_waits_are_told_in_whole_seconds_rounded_up(clock: Clock):
    limiter = Limiter(Bounds(50), Bounds(), clock)
    for _ in range(50):
        limiter.enter("a")
    assert limiter.enter("a").retry_after == 2  # type: ignore[union-attr]
    clock.now += 0.5
    assert limiter.enter("a").retry_after == 1  # type: ignore[union-attr]


def test_running_requests_are_bounded_for_each_and_for_all(clock: Clock):
    limiter = Limiter(Bounds(max_concurrent=2), Bounds(max_concurrent=3), clock)
    assert [limiter.enter(name) for name in "aab"] == [None] * 3
    assert "2 requests of a" not in str(limiter.enter("a")), "the bound of all comes first"
    limiter.leave("b")
    assert "2 requests of a" in str(limiter.enter("a"))
    limiter.leave("a")
    assert limiter.enter("a") is None
    for name in "aa":
        limiter.leave(name)
    assert len(limiter) == 0, "who has nothing running is forgotten"


def test_who_is_quiet_for_a_minute_is_forgotten(clock: Clock):
    limiter = Limiter(Bounds(10), Bounds(), clock)
    for index in range(100):
        limiter.enter(f"old{index}")
        limiter.leave(f"old{index}")
    clock.now += 30
    limiter.enter("old0")
    clock.now += 31
    limiter.enter("new")
    assert len(limiter) == 2


def test_memory_is_bounded_whoever_comes(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(access_limits, "MAX_BUCKETS", 50)
    limiter = Limiter(Bounds(1), Bounds(), clock)
    for index in range(1000):
        limiter.enter(str(index))
        limiter.leave(str(index))
        clock.now += 0.001
    assert len(limiter) == 50
    assert limiter.enter("999") is not None, "the latest are remembered"


def test_a_gate_without_bounds_counts_nothing():
    assert Gate(AccessSettings(keys=KEYS)).limiter is None
    gate = Gate(AccessSettings(keys=KEYS, total=Bounds(max_concurrent=1)))
    caller = Caller("ui", frozenset({"serve"}))
    assert gate.enter(caller) is None
    refused = gate.enter(caller)
    assert refused is not None and refused.status == 429 and refused.headers() == {"Retry-After": "1"}
    gate.leave(caller)
    assert gate.enter(caller) is None


def test_bodies_have_a_bound():
    gate = Gate(AccessSettings(max_body_bytes=10))
    assert gate.too_large(10) is None and Gate(AccessSettings()).too_large(10**12) is None
    refused = gate.too_large(11)
    assert refused is not None and refused.status == 413 and "access.max_body_mb" in refused.message


# Correlation


def test_the_first_uuid_is_kept_as_it_is():
    one, two = str(uuid.uuid4()).upper(), str(uuid.uuid1())
    assert choose_id(one, two) == one and choose_id("x", two) == two and choose_id(None, two) == two
    for bad in (None, "", "x", "{" + two + "}", two.replace("-", ""), f"urn:uuid:{two}", two + "\n", two + two):
        made = choose_id(bad)
        assert made != bad and uuid.UUID(made).version == 4
    assert choose_id() != choose_id()


async def test_log_records_carry_the_id_of_their_request():
    async def line(chosen: str | None) -> Any:
        correlation_id.set(chosen)
        await asyncio.sleep(0)
        record = logging.makeLogRecord({"msg": "m"})
        assert CorrelationFilter().filter(record)
        return record.correlation_id  # type: ignore[attr-defined]

    assert await asyncio.gather(line("a"), line("b"), line(None)) == ["a", "b", "-"]
    record = logging.makeLogRecord({"correlation_id": "kept"})
    assert CorrelationFilter().filter(record) and record.correlation_id == "kept"  # type: ignore[attr-defined]
