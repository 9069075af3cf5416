"""Bearer tokens: what is believed, what is refused, and how the identity provider's keys are got."""

import asyncio
import base64
import hashlib
import hmac
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import hypothesis
import jwt
import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

import app.tokens
from app.errors import Unauthenticated, Unavailable
from app.lifecycle import LinkPurpose
from app.messages import LinkGrant
from app.settings import Settings, SettingsError
from app.tokens import Identity, Tokens, hash_confirmation_token

AUDIENCE = "sunset-api"
ACCOUNT, REQUEST = UUID(int=1), UUID(int=2)

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | Ed25519PrivateKey

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
P256 = ec.generate_private_key(ec.SECP256R1())
P384 = ec.generate_private_key(ec.SECP384R1())
ED25519 = Ed25519PrivateKey.generate()


class Clock:
    """A time that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def datetime(self, **later: float) -> datetime:
        return datetime.fromtimestamp(self.now, UTC) + timedelta(**later)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@dataclass
class Provider:
    """An OpenID provider on the loopback interface that counts what it is asked and answers as it is told."""

    url: str = ""
    keys: list[dict[str, Any]] = field(default_factory=list)
    hits: Counter[str] = field(default_factory=Counter)
    answers: dict[str, bytes] = field(default_factory=dict)
    """Whole HTTP answers by path, in place of the right ones."""
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)

    def answer(self, path: str) -> bytes:
        if path in self.answers:
            return self.answers[path]
        if path == "/keys":
            return http(json.dumps({"keys": self.keys}))
        if path == "/.well-known/openid-configuration":
            return http(json.dumps({"issuer": self.url, "jwks_uri": f"{self.url}/keys"}))
        return http("", "404 Not Found")

    def break_down(self) -> None:
        self.answers["/keys"] = http("", "500 Internal Server Error")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                path = request.split()[1].decode()
                self.hits[path] += 1
                self.asked.set()
                await self.may_answer.wait()
                compressed = b"gzip" in request  # like most servers, whenever they may
                writer.write(http("", headers="Content-Encoding: gzip\r\n") if compressed else self.answer(path))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def http(body: str, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n{body}".encode()


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    provider = Provider(keys=[jwk(RSA, "one")])
    provider.may_answer.set()
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0)
    provider.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield provider
    provider.may_answer.set()
    server.close()


def jwk(key: PrivateKey, key_id: str | None, **members: Any) -> dict[str, Any]:
    public: dict[str, Any]
    if isinstance(key, rsa.RSAPrivateKey):
        public = RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    elif isinstance(key, Ed25519PrivateKey):
        public = OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    else:
        public = ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    public.pop("key_ops", None)
    return {**public, **({} if key_id is None else {"kid": key_id}), **members}


@asynccontextmanager
async def opened(settings: Settings, clock: Clock) -> AsyncIterator[Tokens]:
    tokens = Tokens.from_settings(settings, clock=clock)
    try:
        yield tokens
    finally:
        await tokens.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.load({"SUNSET_DATA_DIR": str(tmp_path)})


@pytest.fixture
def tokens(settings: Settings, clock: Clock) -> Tokens:
    """With the development issuer and that of links."""
    return Tokens.from_settings(settings, clock=clock)


def with_provider(settings: Settings, provider: Provider, **more: str) -> Settings:
    return Settings.load(
        {
            "SUNSET_DATA_DIR": str(settings.data_dir),
            "SUNSET_OIDC_ISSUER": provider.url,
            "SUNSET_OIDC_AUDIENCE": AUDIENCE,
            "SUNSET_DEVELOPMENT_ON_NETWORK": "true",
            **more,
        }
    )


@pytest.fixture
async def oidc(settings: Settings, provider: Provider, clock: Clock) -> AsyncIterator[Tokens]:
    """With the OpenID provider as well; its keys are at a URL that is set."""
    async with opened(with_provider(settings, provider, SUNSET_OIDC_JWKS_URL=f"{provider.url}/keys"), clock) as tokens:
        yield tokens


def issue(
    provider: Provider,
    clock: Clock,
    *,
    key: PrivateKey = RSA,
    algorithm: str = "RS256",
    key_id: str | None = "one",
    without: str = "",
    **changed: Any,
) -> str:
    """A token as the provider makes it, with claims changed or left out."""
    claims = {
        "iss": provider.url,
        "aud": AUDIENCE,
        "sub": "alice",
        "iat": int(clock.now),
        "exp": int(clock.now) + 3600,
        **changed,
    }
    claims.pop(without, None)
    return jwt.encode(claims, key, algorithm=algorithm, headers=None if key_id is None else {"kid": key_id})


def encode(part: dict[str, Any] | bytes) -> str:
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


async def refusal(tokens: Tokens, raw: str) -> str:
    """The message that the token is refused with; it never has a part of the token in it."""
    with pytest.raises(Unauthenticated) as caught:
        await tokens.verify(raw)
    assert caught.value.extensions == {"code": "UNAUTHENTICATED"}
    for part in raw.split("."):
        assert len(part) < 8 or part not in caught.value.message
    return caught.value.message


# --- Who is believed -------------------------------------------------------------------------------------------------


async def test_a_development_token_says_who(tokens: Tokens, clock: Clock) -> None:
    identity = await tokens.verify(tokens.mint("alice@acme.example", timedelta(hours=1)))

    assert identity == Identity(
        issuer="urn:sunset:development",
        subject="alice@acme.example",
        expires_at=clock.datetime(hours=1),
        grant=None,
    )


async def test_a_providers_token_says_who(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    identity = await oidc.verify(issue(provider, clock))

    assert identity == Identity(issuer=provider.url, subject="alice", expires_at=clock.datetime(hours=1), grant=None)


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        *((RSA, algorithm) for algorithm in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
        (P256, "ES256"),
        (P384, "ES384"),
        (ED25519, "EdDSA"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_these_algorithms_are_accepted(
    oidc: Tokens, provider: Provider, clock: Clock, key: PrivateKey, algorithm: str
) -> None:
    provider.keys = [jwk(key, "one")]

    assert (await oidc.verify(issue(provider, clock, key=key, algorithm=algorithm))).subject == "alice"


async def test_tokens_outlive_a_restart(settings: Settings, tokens: Tokens, clock: Clock) -> None:
    """The development key is the installation's: every process of it accepts what another minted."""
    raw = tokens.mint("alice", timedelta(hours=1))

    assert (await Tokens.from_settings(settings, clock=clock).verify(raw)).subject == "alice"


async def test_another_installation_is_not_believed(tokens: Tokens, clock: Clock, tmp_path: Path) -> None:
    other = Tokens.from_settings(Settings.load({"SUNSET_DATA_DIR": str(tmp_path / "other")}), clock=clock)

    assert await refusal(tokens, other.mint("alice", timedelta(hours=1))) == "The token's signature is not valid."


# --- Who is not ------------------------------------------------------------------------------------------------------


async def test_an_unsigned_token_is_refused(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    """`alg: none`, in every spelling, with and without a signature."""
    payload = issue(provider, clock).split(".")[1]

    for algorithm in ("none", "None", "NONE", "", None, 1, ["RS256"]):
        header = encode({"alg": algorithm, "kid": "one"})
        for signature in ("", "AAAA"):
            await refusal(oidc, f"{header}.{payload}.{signature}")


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
async def test_a_public_key_is_no_shared_secret(oidc: Tokens, provider: Provider, clock: Clock, algorithm: str) -> None:
    """Key confusion: everybody has the public key, so a MAC that is made with it proves nothing."""
    signed = f"{encode({'alg': algorithm, 'kid': 'one'})}.{issue(provider, clock).split('.')[1]}"
    public = RSA.public_key()
    for secret in (
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.PEM, PublicFormat.PKCS1),
    ):
        mac = hmac.digest(secret, signed.encode(), "sha" + algorithm[2:])
        assert await refusal(oidc, f"{signed}.{encode(mac)}") == "The token's algorithm is not accepted."


async def test_a_shared_secret_among_the_keys_is_not_used(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    provider.keys = [{"kty": "oct", "kid": "one", "k": encode(b"k" * 64)}, jwk(RSA, "two")]
    signed = f"{encode({'alg': 'HS256', 'kid': 'one'})}.{issue(provider, clock).split('.')[1]}"

    await refusal(oidc, f"{signed}.{encode(hmac.digest(b'k' * 64, signed.encode(), 'sha256'))}")


@pytest.mark.parametrize(
    ("key", "claimed"),
    [(RSA, "ES256"), (RSA, "EdDSA"), (P256, "RS256"), (P256, "ES384"), (P384, "ES256"), (ED25519, "RS256")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
async def test_an_algorithm_is_bound_to_its_kind_of_key(
    oidc: Tokens, provider: Provider, clock: Clock, key: PrivateKey, claimed: str
) -> None:
    provider.keys = [jwk(key, "one")]
    header, payload = encode({"alg": claimed, "kid": "one"}), issue(provider, clock).split(".")[1]

    assert await refusal(oidc, f"{header}.{payload}.{'A' * 86}") == "The token is signed by an unknown key."


async def test_a_key_that_names_its_algorithm_is_bound_to_it(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    provider.keys = [jwk(RSA, "one", alg="PS256")]

    assert await refusal(oidc, issue(provider, clock)) == "The token is signed by an unknown key."
    await oidc.verify(issue(provider, clock, algorithm="PS256"))


@pytest.mark.parametrize("members", [{"use": "enc"}, {"key_ops": ["encrypt"]}, {"alg": "RSA-OAEP"}])
async def test_a_key_for_encryption_signs_nothing(
    oidc: Tokens, provider: Provider, clock: Clock, members: dict[str, Any]
) -> None:
    provider.keys = [jwk(RSA, "one", **members), jwk(P256, "two")]

    assert await refusal(oidc, issue(provider, clock)) == "The token is signed by an unknown key."


async def test_a_short_rsa_key_is_not_used(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    short = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 -- that is the point
    provider.keys = [jwk(short, "one")]
    header, payload = encode({"alg": "RS256", "kid": "one"}), issue(provider, clock).split(".")[1]

    assert await refusal(oidc, f"{header}.{payload}.AAAA") == "The token is signed by an unknown key."


async def test_a_token_without_key_id_needs_an_only_key(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    """One RSA key beside one of another kind is no doubt; two are."""
    provider.keys = [jwk(RSA, "one"), jwk(P256, "two")]
    await oidc.verify(issue(provider, clock, key_id=None))

    provider.keys.append(jwk(rsa.generate_private_key(public_exponent=65537, key_size=2048), "three"))
    clock.now += 600
    await oidc.verify(issue(provider, clock, key_id="one"))
    await fetched(provider, 2)
    assert await refusal(oidc, issue(provider, clock, key_id=None)) == "The token is signed by an unknown key."


@pytest.mark.parametrize("key_id", [1, {"a": 1}, ["one"], True])
async def test_a_key_id_that_is_no_text_is_refused(oidc: Tokens, provider: Provider, clock: Clock, key_id: Any) -> None:
    _, payload, signature = issue(provider, clock).split(".")
    await refusal(oidc, f"{encode({'alg': 'RS256', 'kid': key_id})}.{payload}.{signature}")


async def test_a_changed_token_is_refused(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    """Somebody else's claims under one's own signature."""
    header, _, signature = issue(provider, clock).split(".")
    payload = issue(provider, clock, sub="bob").split(".")[1]

    assert await refusal(oidc, f"{header}.{payload}.{signature}") == "The token's signature is not valid."


async def test_an_issuers_key_signs_for_that_issuer_alone(
    oidc: Tokens, provider: Provider, clock: Clock, settings: Settings
) -> None:
    """A token that names one issuer and is signed by another, both of them trusted."""
    await refusal(oidc, issue(provider, clock, iss="urn:sunset:development"))
    await refusal(oidc, issue(provider, clock, iss="urn:sunset:link", aud="urn:sunset:link:confirm"))
    development = Ed25519PrivateKey.from_private_bytes(settings.derive_key("development issuer"))
    await refusal(oidc, issue(provider, clock, key=development, algorithm="EdDSA"))


@pytest.mark.parametrize("issuer", ["https://id.example.com", "", None, 1, ["x"], {}])
async def test_an_unknown_issuer_is_refused(oidc: Tokens, provider: Provider, clock: Clock, issuer: Any) -> None:
    payload = encode({"iss": issuer, "aud": AUDIENCE, "sub": "alice", "iat": clock.now, "exp": clock.now + 1})
    header, _, signature = issue(provider, clock).split(".")

    assert await refusal(oidc, f"{header}.{payload}.{signature}") == "The token's issuer is not trusted here."
    assert not provider.hits, "an unknown issuer's token makes nobody fetch keys"


async def test_an_issuer_with_a_slash_more_is_another(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    assert (
        await refusal(oidc, issue(provider, clock, iss=provider.url + "/")) == "The token's issuer is not trusted here."
    )


@pytest.mark.parametrize("audience", ["other", AUDIENCE + "x", ["other"], "sunset"])
async def test_a_token_for_somebody_else_is_refused(
    oidc: Tokens, provider: Provider, clock: Clock, audience: Any
) -> None:
    assert "audience" in await refusal(oidc, issue(provider, clock, aud=audience))


async def test_a_token_for_several_is_accepted_when_we_are_one(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    await oidc.verify(issue(provider, clock, aud=["other", AUDIENCE]))


@pytest.mark.parametrize("claim", ["exp", "iat", "sub", "aud"])
async def test_a_claim_that_is_needed_is_missing(oidc: Tokens, provider: Provider, clock: Clock, claim: str) -> None:
    assert await refusal(oidc, issue(provider, clock, without=claim)) == f"The token lacks `{claim}`."


@pytest.mark.parametrize("subject", ["", " ", "x" * 256, "a\nb", "a\0b", "\ud800", " alice", 1, ["alice"], True])
async def test_a_subject_that_cannot_be_kept_is_refused(
    oidc: Tokens, provider: Provider, clock: Clock, subject: Any
) -> None:
    """Too long for its column, not text that a database holds, or easily taken for another."""
    assert await refusal(oidc, sign(provider, clock, sub=subject)) == "The token's `sub` is missing or cannot be used."


def sign(provider: Provider, clock: Clock, **changed: Any) -> str:
    """Like `issue`, for claims that PyJWT refuses to encode."""
    claims = {
        "iss": provider.url, "aud": AUDIENCE, "sub": "alice", "iat": clock.now, "exp": clock.now + 3600, **changed,
    }  # fmt: skip
    return jwt.api_jws.encode(json.dumps(claims).encode(), RSA, algorithm="RS256", headers={"kid": "one"})


async def test_a_subject_may_be_as_long_as_openid_allows(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    assert (await oidc.verify(issue(provider, clock, sub="x" * 255))).subject == "x" * 255


# --- When ------------------------------------------------------------------------------------------------------------


async def test_an_expired_token_is_refused_to_the_second(tokens: Tokens, clock: Clock) -> None:
    raw = tokens.mint("alice", timedelta(hours=1))

    clock.now += 3599
    await tokens.verify(raw)
    clock.now += 1
    assert await refusal(tokens, raw) == "The token has expired."


async def test_a_token_that_is_not_valid_yet_is_refused(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    """Half a minute is allowed for clocks that differ."""
    for claim in ("iat", "nbf"):
        await oidc.verify(sign(provider, clock, **{claim: clock.now + 30}))
        assert await refusal(oidc, sign(provider, clock, **{claim: clock.now + 31})) == "The token is not valid yet."


async def test_a_token_that_lives_too_long_is_refused(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    day = 24 * 3600
    await oidc.verify(issue(provider, clock, exp=int(clock.now) + day))

    message = await refusal(oidc, issue(provider, clock, exp=int(clock.now) + day + 1))

    assert message == "The token lives too long: at most 24 hours are accepted."


@pytest.mark.parametrize("value", ["1800003600", True, -1, float("inf"), float("nan"), 10**400, 1e300, [], {}])
@pytest.mark.parametrize("claim", ["exp", "iat", "nbf"])
async def test_a_time_that_is_none_is_refused(
    oidc: Tokens, provider: Provider, clock: Clock, claim: str, value: Any
) -> None:
    raw = sign(provider, clock, **{claim: value})
    assert await refusal(oidc, raw) == f"The token's `{claim}` is missing or is no time."


# --- What is no token ------------------------------------------------------------------------------------------------


NOT_TOKENS = ["", ".", "..", "...", "a.b.c", "é", "\ud800", "\0", "x" * 8193, f"{encode(b'[]')}.e30.", "ew.e30."]


@pytest.mark.parametrize("raw", NOT_TOKENS, ids=range(len(NOT_TOKENS)))
async def test_what_is_no_token_is_refused(tokens: Tokens, raw: str) -> None:
    assert await refusal(tokens, raw) == "The token is malformed."


async def test_a_token_that_is_too_long_is_refused_unread(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    assert await refusal(oidc, issue(provider, clock, more="x" * 8000)) == "The token is malformed."
    assert not provider.hits


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    header=st.fixed_dictionaries({"alg": st.just("EdDSA") | JSON}, optional={"kid": JSON, "crit": JSON, "b64": JSON}),
    claims=st.dictionaries(st.sampled_from(["iss", "aud", "sub", "iat", "exp", "nbf"]), JSON),
    junk=st.binary(max_size=20) | st.text(max_size=20),
)
def test_whatever_is_sent_is_refused_as_unauthenticated(
    header: dict[str, Any], claims: dict[str, Any], junk: bytes | str, shared: Tokens
) -> None:
    """No input makes anything but the one refusal: no other exception, so never a 5xx."""
    claims = {"iss": "urn:sunset:development", **claims}
    tail = junk if isinstance(junk, str) else encode(junk)

    async def check() -> None:
        for raw in (tail, f"{encode(header)}.{encode(claims)}.{tail}", f"{encode(header)}.{tail}.{tail}"):
            with pytest.raises(Unauthenticated):
                await shared.verify(raw)

    asyncio.run(check())


@hypothesis.settings(deadline=None)
@hypothesis.given(claims=st.dictionaries(st.sampled_from(["aud", "sub", "iat", "exp", "nbf", "jti"]), JSON))
def test_a_trusted_issuers_mistakes_are_refused_as_unauthenticated(
    claims: dict[str, Any], shared_settings: Settings, shared: Tokens
) -> None:
    """Claims of any shape under a valid signature."""
    key = Ed25519PrivateKey.from_private_bytes(shared_settings.derive_key("development issuer"))
    payload = json.dumps({**claims, "iss": "urn:sunset:development"}).encode()

    with pytest.raises(Unauthenticated):
        asyncio.run(shared.verify(jwt.api_jws.encode(payload, key, algorithm="EdDSA")))


@pytest.fixture(scope="module")
def shared_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings.load({"SUNSET_DATA_DIR": str(tmp_path_factory.mktemp("var"))})


@pytest.fixture(scope="module")
def shared(shared_settings: Settings) -> Tokens:
    """One for all examples of a property; what is refused leaves nothing behind in it."""
    return Tokens.from_settings(shared_settings, clock=Clock())


# --- The development issuer ------------------------------------------------------------------------------------------

PRODUCTION = {
    "SUNSET_ENVIRONMENT": "production",
    "SUNSET_PUBLIC_URL": "https://cancel.example.com",
    "SUNSET_SECRET_KEY": "1f0c5b7a9d3e8264" * 4,
    "SUNSET_OIDC_ISSUER": "https://id.example.com",
    "SUNSET_OIDC_AUDIENCE": AUDIENCE,
    "SUNSET_SMTP_URL": "smtp://localhost",
}


async def test_production_has_no_development_issuer(clock: Clock) -> None:
    """Not even with the same secret: nothing is minted, and what was minted elsewhere is refused."""
    development = Settings.load({"SUNSET_SECRET_KEY": PRODUCTION["SUNSET_SECRET_KEY"]})
    minted = Tokens.from_settings(development, clock=clock).mint("alice", timedelta(hours=1))
    tokens = Tokens.from_settings(Settings.load(PRODUCTION), clock=clock)

    assert await refusal(tokens, minted) == "The token's issuer is not trusted here."
    with pytest.raises(SettingsError, match="SUNSET_DEVELOPMENT_ISSUER"):
        tokens.mint("alice", timedelta(hours=1))


def test_a_development_issuer_refuses_to_be_in_production() -> None:
    """Also for settings that were put together past the check."""
    with pytest.raises(SettingsError, match="SUNSET_DEVELOPMENT_ISSUER"):
        Tokens.from_settings(replace(Settings.load(PRODUCTION), development_issuer=True))


@pytest.mark.parametrize("lifetime", [timedelta(), timedelta(seconds=-1), timedelta(hours=24, seconds=1)])
def test_minted_tokens_are_short_lived(tokens: Tokens, lifetime: timedelta) -> None:
    with pytest.raises(ValueError, match="lifetime"):
        tokens.mint("alice", lifetime)


# --- Emailed links ---------------------------------------------------------------------------------------------------

GRANT = LinkGrant(
    purpose=LinkPurpose.CONFIRM,
    issuer="https://id.example.com",
    subject="alice",
    account_id=ACCOUNT,
    request_id=REQUEST,
    generation=3,
)


async def test_a_link_speaks_for_its_person_and_one_purpose(tokens: Tokens, clock: Clock) -> None:
    """It lives as long as it was made to, longer than any other token."""
    for purpose in LinkPurpose:
        grant = replace(GRANT, purpose=purpose)
        raw = tokens.mint_link(grant, issued_at=clock.datetime(), expires_at=clock.datetime(days=60))

        assert await tokens.verify(raw) == Identity(
            issuer=GRANT.issuer, subject=GRANT.subject, expires_at=clock.datetime(days=60), grant=grant
        )


async def test_a_link_says_when_it_expires(tokens: Tokens, clock: Clock) -> None:
    """By the installation's clock, which is not this one: who reads the account refuses it."""
    raw = tokens.mint_link(GRANT, issued_at=clock.datetime(), expires_at=clock.datetime(hours=1))

    clock.now += 7200

    assert (await tokens.verify(raw)).expires_at == clock.datetime(hours=-1).replace(microsecond=0)


async def test_a_link_cannot_be_turned_to_another_use(settings: Settings, tokens: Tokens, clock: Clock) -> None:
    """Its claims under another issuer's name, or another's under its own, find no key that signed them."""
    link = Ed25519PrivateKey.from_private_bytes(settings.derive_key("link tokens"))
    development = Ed25519PrivateKey.from_private_bytes(settings.derive_key("development issuer"))
    raw = tokens.mint_link(GRANT, issued_at=clock.datetime(), expires_at=clock.datetime(hours=1))
    claims = jwt.decode(raw, options={"verify_signature": False})

    as_development = {**claims, "iss": "urn:sunset:development", "aud": "sunset"}
    assert "signature" in await refusal(tokens, jwt.encode(as_development, link, algorithm="EdDSA"))
    assert "signature" in await refusal(tokens, jwt.encode(claims, development, algorithm="EdDSA"))
    for audience in ("sunset", "urn:sunset:link", "urn:sunset:link:delete"):
        other = jwt.encode({**claims, "aud": audience}, link, algorithm="EdDSA")
        assert "audience" in await refusal(tokens, other)


def test_a_link_is_the_same_each_time_it_is_written(settings: Settings, tokens: Tokens, clock: Clock) -> None:
    """So it need not be stored, and an email that is sent twice has the same link twice."""
    again = Tokens.from_settings(settings, clock=Clock())
    times = {"issued_at": clock.datetime(), "expires_at": clock.datetime(days=3)}
    clock.now += 1000

    assert tokens.mint_link(GRANT, **times) == again.mint_link(GRANT, **times)


@pytest.mark.parametrize(
    "change", [{"account_id": UUID(int=9)}, {"request_id": UUID(int=9)}, {"generation": 4}, {"subject": "bob"}]
)
async def test_a_link_is_bound_to_all_that_it_names(tokens: Tokens, clock: Clock, change: dict[str, Any]) -> None:
    other = replace(GRANT, **change)
    raw = tokens.mint_link(other, issued_at=clock.datetime(), expires_at=clock.datetime(hours=1))

    assert (await tokens.verify(raw)).grant == other


def test_a_confirmation_token_is_told_by_its_installation_alone(tokens: Tokens, tmp_path: Path) -> None:
    """256 bits; another request, a later generation and another installation have others."""
    other = Tokens.from_settings(Settings.load({"SUNSET_DATA_DIR": str(tmp_path / "other")}))
    token = tokens.confirmation_token(REQUEST, 1)

    assert tokens.confirmation_token(REQUEST, 1) == token
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", token)
    others = {
        tokens.confirmation_token(REQUEST, 2),
        tokens.confirmation_token(ACCOUNT, 1),
        other.confirmation_token(REQUEST, 1),
    }
    assert len({token, *others}) == 4


def test_what_is_kept_of_a_confirmation_token_is_its_hash() -> None:
    assert hash_confirmation_token("abc") == hashlib.sha256(b"abc").hexdigest()
    assert len(hash_confirmation_token("\ud800")) == 64, "text that is no UTF-8 is a wrong token, not an error"


# --- What was verified is remembered ---------------------------------------------------------------------------------


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tokens whose signature was checked."""
    seen: list[str] = []
    decode = jwt.decode

    def counted(raw: str, *args: Any, **options: Any) -> Any:
        seen.append(raw)
        return decode(raw, *args, **options)

    monkeypatch.setattr(jwt, "decode", counted)
    return seen


async def test_a_verified_token_is_remembered(tokens: Tokens, decodings: list[str]) -> None:
    raw = tokens.mint("alice", timedelta(hours=1))

    assert await tokens.verify(raw) is await tokens.verify(raw)
    assert decodings == [raw]


async def test_a_remembered_token_is_checked_again_in_time(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    """When a provider withdraws a key, tokens signed by it stop working within ten minutes, remembered or not: as soon
    as the keys are there that somebody has asked for."""
    raw = issue(provider, clock)
    await oidc.verify(raw)
    provider.keys = [jwk(P256, "new")]

    clock.now += 599
    await oidc.verify(raw)
    assert provider.hits["/keys"] == 1
    clock.now += 1
    await oidc.verify(raw)
    await fetched(provider, 2)
    clock.now += 5
    assert await refusal(oidc, raw) == "The token is signed by an unknown key."


async def test_a_refusal_is_not_remembered(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    raw = issue(provider, clock, iat=int(clock.now) + 60)
    await refusal(oidc, raw)

    clock.now += 60

    await oidc.verify(raw)


async def test_few_tokens_are_remembered(tokens: Tokens, decodings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was not asked about for longest makes room."""
    monkeypatch.setattr(app.tokens, "_CACHED_TOKENS", 2)
    first, second, third = (tokens.mint(name, timedelta(hours=1)) for name in ("a", "b", "c"))

    for raw in (first, second, first, third, first, second):
        await tokens.verify(raw)

    assert decodings == [first, second, third, second]


# --- The provider's keys ---------------------------------------------------------------------------------------------


async def test_keys_are_found_by_discovery(settings: Settings, provider: Provider, clock: Clock) -> None:
    async with opened(with_provider(settings, provider), clock) as tokens:
        await tokens.verify(issue(provider, clock))

    assert provider.hits == {"/.well-known/openid-configuration": 1, "/keys": 1}


@pytest.mark.parametrize(
    "document",
    [
        {"issuer": "https://evil.example", "jwks_uri": "KEYS"},
        {"jwks_uri": "KEYS"},
        {"issuer": "ISSUER"},
        {"issuer": "ISSUER", "jwks_uri": 1},
        {"issuer": "ISSUER", "jwks_uri": "NOT-LOCAL/keys"},
        {"issuer": "ISSUER", "jwks_uri": "file:///etc/passwd"},
        {"issuer": "ISSUER", "jwks_uri": "http://[/"},
        ["KEYS"],
    ],
    ids=range(8),
)
async def test_a_discovery_that_leads_elsewhere_is_not_followed(
    settings: Settings, provider: Provider, clock: Clock, document: Any
) -> None:
    text = json.dumps(document).replace("ISSUER", provider.url).replace("KEYS", f"{provider.url}/keys")
    # Leads here as well, by a name that is not known for it.
    text = text.replace("NOT-LOCAL", provider.url.replace("127.0.0.1", "127.1"))
    provider.answers["/.well-known/openid-configuration"] = http(text)

    async with opened(with_provider(settings, provider), clock) as tokens:
        with pytest.raises(Unavailable):
            await tokens.verify(issue(provider, clock))

    assert provider.hits["/keys"] == 0


async def test_keys_are_fetched_once_for_all_who_wait(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    """A hundred requests at once, with nothing fetched yet, and again when the keys are due."""
    for times in (1, 2):
        provider.asked.clear()
        provider.may_answer.clear()
        subjects = [f"{times}.{n}" for n in range(100)]
        waiting = [asyncio.create_task(oidc.verify(issue(provider, clock, sub=subject))) for subject in subjects]
        await provider.asked.wait()
        provider.may_answer.set()

        assert [identity.subject for identity in await asyncio.gather(*waiting)] == subjects
        assert provider.hits["/keys"] == times
        clock.now += 600


async def test_a_request_that_goes_away_does_not_take_the_keys_from_others(
    oidc: Tokens, provider: Provider, clock: Clock
) -> None:
    provider.may_answer.clear()
    first = asyncio.create_task(oidc.verify(issue(provider, clock, sub="first")))
    second = asyncio.create_task(oidc.verify(issue(provider, clock, sub="second")))
    await provider.asked.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first

    provider.may_answer.set()

    assert (await second).subject == "second"
    assert provider.hits["/keys"] == 1


async def test_a_new_key_is_found_when_it_is_first_used(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    await oidc.verify(issue(provider, clock))
    provider.keys.append(jwk(P256, "new"))

    clock.now += 30

    await oidc.verify(issue(provider, clock, key=P256, algorithm="ES256", key_id="new"))
    assert provider.hits["/keys"] == 2


async def test_made_up_keys_do_not_make_us_ask_again_and_again(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    """Anybody can write any key's name into a token: the provider is asked once in thirty seconds at most."""
    await oidc.verify(issue(provider, clock))
    for n in range(50):
        assert await refusal(oidc, issue(provider, clock, key_id=f"x{n}")) == "The token is signed by an unknown key."
    assert provider.hits["/keys"] == 1

    clock.now += 30
    for n in range(50):
        await refusal(oidc, issue(provider, clock, key_id=f"y{n}"))
    assert provider.hits["/keys"] == 2


async def fetched(provider: Provider, times: int) -> None:
    """Wait until the keys were asked for so many times, and what came of it is known."""
    async with asyncio.timeout(60):
        while provider.hits["/keys"] < times:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.01)
        while any(task.get_name() == "identity provider keys" for task in asyncio.all_tasks()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert provider.hits["/keys"] == times


async def test_keys_last_got_count_while_the_provider_is_down(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    """Stale if error, for a day; while it lasts the provider is asked every five seconds, not at every request."""
    await oidc.verify(issue(provider, clock))
    provider.break_down()

    clock.now += 600
    for n in range(10):
        await oidc.verify(issue(provider, clock, sub=f"a{n}"))
    await fetched(provider, 2)
    for n in range(10):
        await oidc.verify(issue(provider, clock, sub=f"b{n}"))
    assert provider.hits["/keys"] == 2
    clock.now += 5
    for n in range(10):
        await oidc.verify(issue(provider, clock, sub=f"c{n}"))
    await fetched(provider, 3)

    clock.now += 86_400
    with pytest.raises(Unavailable):
        await oidc.verify(issue(provider, clock))


@pytest.mark.parametrize("seconds", [600, 86_399])
async def test_nobody_waits_for_a_provider_that_hangs_while_the_keys_are_good(
    oidc: Tokens, provider: Provider, clock: Clock, seconds: int
) -> None:
    """It accepts and never answers. Keys that are due to be fetched again still count, for a day."""
    await oidc.verify(issue(provider, clock))
    provider.may_answer.clear()
    provider.asked.clear()

    clock.now += seconds
    for n in range(10):
        assert not await _waits(oidc.verify(issue(provider, clock, sub=f"a{n}")))
    await provider.asked.wait()
    for n in range(10):
        assert not await _waits(oidc.verify(issue(provider, clock, sub=f"b{n}")))
    assert provider.hits["/keys"] == 2


async def _waits(verifying: Coroutine[Any, Any, Identity]) -> bool:
    """Whether it is still not done when everything that can be done at once has been."""
    task = asyncio.create_task(verifying)
    for _ in range(5):
        await asyncio.sleep(0)
    if task.done():
        task.result()
        return False
    task.cancel()
    return True


async def test_keys_that_are_a_day_old_are_waited_for(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    await oidc.verify(issue(provider, clock))
    provider.keys = [jwk(P256, "new")]
    provider.may_answer.clear()

    clock.now += 86_400
    waiting = asyncio.create_task(oidc.verify(issue(provider, clock, key=P256, algorithm="ES256", key_id="new")))
    assert await _waits(oidc.verify(issue(provider, clock)))
    provider.may_answer.set()

    assert (await waiting).subject == "alice"


async def test_a_made_up_key_is_waited_for_by_who_has_made_it_up_alone(
    oidc: Tokens, provider: Provider, clock: Clock
) -> None:
    await oidc.verify(issue(provider, clock))
    provider.may_answer.clear()
    clock.now += 30

    assert await _waits(oidc.verify(issue(provider, clock, key_id="x")))
    assert not await _waits(oidc.verify(issue(provider, clock, sub="bob")))


async def test_a_key_that_was_withdrawn_while_nobody_asked_is_not_remembered(
    oidc: Tokens, provider: Provider, clock: Clock
) -> None:
    """Who comes first after a silence is let in by the old keys, until the new ones are there: no ten minutes more."""
    await oidc.verify(issue(provider, clock))
    provider.keys = [jwk(P256, "new")]
    clock.now += 36_000
    raw = issue(provider, clock)

    await oidc.verify(raw)
    await fetched(provider, 2)
    clock.now += 5

    assert await refusal(oidc, raw) == "The token is signed by an unknown key."


async def test_new_keys_that_were_fetched_behind_are_used(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    await oidc.verify(issue(provider, clock))
    provider.keys = [jwk(P256, "new")]
    clock.now += 600
    await oidc.verify(issue(provider, clock))
    await fetched(provider, 2)

    await oidc.verify(issue(provider, clock, key=P256, algorithm="ES256", key_id="new"))
    assert await refusal(oidc, issue(provider, clock, sub="bob")) == "The token is signed by an unknown key."
    assert provider.hits["/keys"] == 2


async def test_a_provider_that_was_down_is_believed_when_it_is_back(
    oidc: Tokens, provider: Provider, clock: Clock
) -> None:
    """With no keys ever got, a token is neither believed nor called bad: the answer is to try again."""
    provider.break_down()
    for _ in range(10):
        with pytest.raises(Unavailable):
            await oidc.verify(issue(provider, clock))
    assert provider.hits["/keys"] == 1

    provider.answers.clear()
    clock.now += 5

    assert (await oidc.verify(issue(provider, clock))).subject == "alice"


KEYS = json.dumps({"keys": [jwk(RSA, "one")]})


@pytest.mark.parametrize(
    "answer",
    [
        http("", "302 Found", "Location: /moved\r\n"),
        http("", "307 Temporary Redirect", "Location: /moved\r\n"),
        http("", "204 No Content"),
        http(KEYS, "201 Created"),
        http(KEYS + " " * 262_144),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"ffff\r\n" + b" " * 0xFFFF + b"\r\n") * 5,
        http(KEYS, headers="Content-Encoding: gzip\r\n"),
        http("not JSON"),
        http("[" * 100_000),
        http("[]"),
        http('{"keys": {}}'),
        http('{"keys": []}'),
        http('{"keys": [1, null, {"kty": "RSA", "kid": "one"}, {"kty": "RSA", "n": 1, "e": {}}, {"kty": 5}]}'),
        http(json.dumps({"keys": [jwk(RSA, "one")] * 101})),
        b"garbage\r\n\r\n",
    ],
    ids=range(15),
)
async def test_an_answer_that_is_no_key_set_is_not_used(
    oidc: Tokens, provider: Provider, clock: Clock, answer: bytes
) -> None:
    """Redirects, other statuses, too much, compressed, not JSON, not keys: as if the provider had not answered."""
    provider.answers["/keys"] = answer
    provider.answers["/moved"] = http(KEYS)

    with pytest.raises(Unavailable):
        await oidc.verify(issue(provider, clock))

    assert provider.hits == {"/keys": 1}


async def test_keys_that_cannot_be_used_do_not_spoil_those_that_can(
    oidc: Tokens, provider: Provider, clock: Clock
) -> None:
    provider.keys = [
        {"kty": "RSA", "kid": "one"},
        {"kty": ["RSA"]},
        {"kty": "RSA", "n": "AQ", "e": {}},
        {"kty": "EC", "crv": "P-256", "x": "A" * 43, "y": "B" * 43},
        {"kty": "OKP", "crv": "Ed25519", "x": None},
        {"kty": "OKP", "crv": "X25519", "x": "A" * 43},
        jwk(RSA, "two", alg=[]),
        jwk(RSA, "three", use=[]),
        jwk(RSA, "one"),
    ]

    await oidc.verify(issue(provider, clock))


async def test_a_private_key_among_the_keys_is_not_loaded(oidc: Tokens, provider: Provider, clock: Clock) -> None:
    """A provider's mistake: its public half is all that is used."""
    provider.keys = [{**RSAAlgorithm.to_jwk(RSA, as_dict=True), "key_ops": ["sign", "verify"], "kid": "one"}]

    await oidc.verify(issue(provider, clock))


async def test_a_provider_that_does_not_answer_is_given_up(
    oidc: Tokens, provider: Provider, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.tokens._ProviderKeys, "DEADLINE_SECONDS", 0.05)
    provider.may_answer.clear()

    with pytest.raises(Unavailable):
        await asyncio.wait_for(oidc.verify(issue(provider, clock)), timeout=10)


async def test_a_failed_fetch_is_logged_without_the_request_that_began_it(
    oidc: Tokens, provider: Provider, clock: Clock
) -> None:
    """Many requests wait for one fetch: what it logs, and what it might touch, is none of theirs."""
    provider.break_down()
    with (
        structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logged,
        structlog.contextvars.bound_contextvars(request_id="of-the-first"),
        pytest.raises(Unavailable),
    ):
        await oidc.verify(issue(provider, clock))

    [entry] = logged
    assert entry["event"] == "identity_provider_keys_unavailable"
    assert entry["reason"] == "status 500"
    assert "request_id" not in entry


async def test_closing_gives_up_what_is_being_fetched(settings: Settings, provider: Provider, clock: Clock) -> None:
    """A process that stops does not wait for a provider that does not answer."""
    provider.may_answer.clear()
    async with opened(with_provider(settings, provider), clock) as tokens:
        waiting = asyncio.create_task(tokens.verify(issue(provider, clock)))
        await provider.asked.wait()

    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_closing_gives_up_what_is_being_fetched_behind(
    settings: Settings, provider: Provider, clock: Clock
) -> None:
    async with opened(with_provider(settings, provider), clock) as tokens:
        await tokens.verify(issue(provider, clock))
        provider.may_answer.clear()
        provider.asked.clear()
        clock.now += 600
        await tokens.verify(issue(provider, clock, sub="bob"))
        await provider.asked.wait()

    assert [task for task in asyncio.all_tasks() if "keys" in task.get_name()] == []


async def test_a_fetch_that_fails_unexpectedly_is_logged_whole_and_is_a_failed_fetch(
    oidc: Tokens, provider: Provider, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when nobody waits for it."""
    await oidc.verify(issue(provider, clock))
    monkeypatch.setattr(app.tokens, "_usable_keys", lambda *_, **__: 1 / 0)
    clock.now += 600
    with structlog.testing.capture_logs() as logged:
        await oidc.verify(issue(provider, clock, sub="bob"))
        await fetched(provider, 2)

    [entry] = logged
    assert (entry["event"], entry["log_level"]) == ("identity_provider_keys_failed", "error")
    assert isinstance(entry["exc_info"], ZeroDivisionError)
    await oidc.verify(issue(provider, clock))


async def test_where_there_is_no_provider_nothing_is_fetched(tokens: Tokens, provider: Provider, clock: Clock) -> None:
    assert await refusal(tokens, issue(provider, clock)) == "The token's issuer is not trusted here."
    assert not provider.hits
