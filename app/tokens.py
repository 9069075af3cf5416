"""Who is asking: bearer tokens in, identities out; and the tokens that Sunset itself makes.

Three issuers, each with its own keys, audience and limits; a token is checked by the one that its `iss` names:

* the operator's OpenID provider, whose public keys are fetched and cached (`_ProviderKeys`);
* the development issuer, whose key derives from the installation's secret; there is none in production;
* the link issuer, for what emailed links carry. Such a token speaks for a person and for one purpose only:
  its identity has a `grant`, and whoever reads an identity must refuse a grant that it did not ask for.

An identity says who. What they may do is read from the database with each request and is no part of this
module, which knows no accounts, members or roles, and no HTTP request. Tokens, keys and secrets never get
into its messages or logs.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol
from urllib.parse import urlsplit
from uuid import UUID

import httpx2
import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from app import db
from app.errors import Unauthenticated, Unavailable
from app.lifecycle import LinkPurpose
from app.messages import LinkGrant
from app.settings import Settings, SettingsError, is_loopback

DEVELOPMENT_ISSUER: Final = "urn:sunset:development"
DEVELOPMENT_AUDIENCE: Final = "sunset"
LINK_ISSUER: Final = "urn:sunset:link"

MAX_LIFETIME: Final = timedelta(hours=24)
"""The longest that a token may live, from `iat` to `exp`. Links live as long as they are made to."""

_LEEWAY_SECONDS: Final = 30
"""How far an issuer's clock may be ahead of ours (`iat`, `nbf`). `exp` has none: an expired token is never honored."""
_MAX_TOKEN_LENGTH: Final = 8192
_MAX_NAME_LENGTH: Final = 255
"""For subjects and issuers; OpenID Connect allows a subject 255 characters."""

_CACHED_TOKENS: Final = 10_000
_RECHECK_SECONDS: Final = 600
"""A remembered token is checked again after this time, so that a key that its provider withdrew stops counting."""

_LINK_AUDIENCES: Final = {f"urn:sunset:link:{purpose}": purpose for purpose in LinkPurpose}

_PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who a verified token speaks for."""

    issuer: str
    subject: str
    expires_at: datetime
    grant: LinkGrant | None
    """None for a token that says who alone. Otherwise the bearer may do what the grant names and nothing else."""


class DatabaseClock:
    """Seconds since 1970 by the database's clock: measured once a minute, carried on by one that nobody sets.

    A process whose own clock is wrong would refuse everybody, or honor what has expired. Until the first measurement
    it is the process's."""

    _SECONDS = 60.0

    def __init__(self) -> None:
        self._base = time.time()
        self._measured = self._due = _elapsed()

    def __call__(self) -> float:
        return self._base + _elapsed() - self._measured

    async def follow(self) -> None:
        """Measure again, when the last time is a minute ago. While the database is away, it goes on as it was."""
        if _elapsed() < self._due:
            return
        self._due = _elapsed() + self._SECONDS
        with suppress(Unavailable):
            self._base, self._measured = (await db.database_now()).timestamp(), _elapsed()


def _elapsed() -> float:
    """Counts on while the machine sleeps, where the system knows such a clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Tokens:
    """Verifies every kind of token and makes Sunset's own. One per process."""

    def __init__(
        self,
        *,
        issuers: Mapping[str, "_Issuer"],
        development: Ed25519PrivateKey | None,
        link: Ed25519PrivateKey,
        confirmation_key: bytes,
        webhook_key: bytes,
        clock: Callable[[], float],
    ) -> None:
        self._issuers = issuers
        self._development = development
        self._link = link
        self._confirmation_key = confirmation_key
        self._webhook_key = webhook_key
        self._clock = clock
        self._verified: OrderedDict[bytes, tuple[float, Identity]] = OrderedDict()

    @classmethod
    def from_settings(cls, settings: Settings, *, clock: Callable[[], float] | None = None) -> "Tokens":
        """The issuers that the settings allow. `clock` answers seconds since 1970; left out: a `DatabaseClock`.

        Raises SettingsError for a development issuer in production, even if the settings should have let it through.
        """
        clock = clock or DatabaseClock()
        if settings.development_issuer and settings.environment == "production":
            raise SettingsError(["SUNSET_DEVELOPMENT_ISSUER must be false in production."])
        link = Ed25519PrivateKey.from_private_bytes(settings.derive_key("link tokens"))
        issuers = {LINK_ISSUER: _Issuer(keys=_OwnKey(link), audiences=tuple(_LINK_AUDIENCES), max_lifetime=None)}
        development = None
        if settings.development_issuer:
            development = Ed25519PrivateKey.from_private_bytes(settings.derive_key("development issuer"))
            issuers[DEVELOPMENT_ISSUER] = _Issuer(keys=_OwnKey(development), audiences=(DEVELOPMENT_AUDIENCE,))
        if settings.oidc_issuer:
            issuers[settings.oidc_issuer] = _Issuer(
                keys=_ProviderKeys(issuer=settings.oidc_issuer, jwks_url=settings.oidc_jwks_url, clock=clock),
                audiences=(settings.oidc_audience,),
            )
        return cls(
            issuers=issuers,
            development=development,
            link=link,
            confirmation_key=settings.derive_key("confirmation tokens"),
            webhook_key=settings.derive_key("webhook secrets"),
            clock=clock,
        )

    async def follow(self) -> None:
        """Set the clock by the bound database's, now and then. To be called before `verify`."""
        if isinstance(self._clock, DatabaseClock):
            await self._clock.follow()

    def lifetime_left(self, identity: Identity) -> timedelta:
        """How long a token that was verified is still good for."""
        return timedelta(seconds=identity.expires_at.timestamp() - self._clock())

    async def close(self) -> None:
        """Stops what is being fetched and closes its connections."""
        for issuer in self._issuers.values():
            await issuer.keys.close()

    async def verify(self, raw: str) -> Identity:
        """Whom the bearer token `raw` speaks for.

        Promises that an active issuer signed it for this service and that it is valid now; a link's `expires_at` is
        left to who reads the account, by whose clock it was set. Raises Unauthenticated with a message that tells the
        reason and never the token; Unavailable when there are no keys of the provider's that count.
        A token that was verified is remembered until it expires (at most ten minutes, and less by keys that are old);
        a refusal is never remembered.
        """
        if len(raw) > _MAX_TOKEN_LENGTH or not raw.isascii():
            raise Unauthenticated("The token is malformed.")
        digest = hashlib.sha256(raw.encode()).digest()
        remembered = self._verified.get(digest)
        if remembered is not None:
            if self._clock() < remembered[0]:
                self._verified.move_to_end(digest)
                return remembered[1]
            del self._verified[digest]
        identity, counts_for = await self._check(raw)
        until = min(identity.expires_at.timestamp(), self._clock() + counts_for)
        self._verified[digest] = until, identity
        if len(self._verified) > _CACHED_TOKENS:
            self._verified.popitem(last=False)
        return identity

    async def _check(self, raw: str) -> tuple[Identity, float]:
        """Whom it speaks for, and for how many seconds its key may be relied on."""
        try:
            unverified = jwt.decode_complete(raw, options={"verify_signature": False})
        except jwt.InvalidTokenError:
            raise Unauthenticated("The token is malformed.") from None
        header, claims = unverified["header"], unverified["payload"]
        name = claims.get("iss")
        issuer = self._issuers.get(name) if isinstance(name, str) else None
        if issuer is None:
            raise Unauthenticated("The token's issuer is not trusted here.")
        claims = await issuer.verified_claims(raw, header)
        subject = _name(claims, "sub")
        if name == LINK_ISSUER:
            grant = _grant(claims, subject)
            expires_at = datetime.fromtimestamp(_time(claims, "exp"), UTC)
            identity = Identity(issuer=grant.issuer, subject=subject, expires_at=expires_at, grant=grant)
            return identity, issuer.keys.counts_for
        expires_at = _checked_times(claims, now=self._clock(), max_lifetime=issuer.max_lifetime)
        return Identity(issuer=name, subject=subject, expires_at=expires_at, grant=None), issuer.keys.counts_for

    def mint(self, subject: str, lifetime: timedelta) -> str:
        """A development token for `subject`. SettingsError where there is no development issuer."""
        if self._development is None:
            raise SettingsError(
                ["SUNSET_DEVELOPMENT_ISSUER is off: in production your identity provider makes the tokens."]
            )
        if not timedelta() < lifetime <= MAX_LIFETIME:
            raise ValueError(f"a token's lifetime is more than nothing and at most {MAX_LIFETIME}, not {lifetime}")
        issued_at = int(self._clock())
        claims = {
            "iss": DEVELOPMENT_ISSUER,
            "aud": DEVELOPMENT_AUDIENCE,
            "sub": subject,
            "iat": issued_at,
            "exp": issued_at + math.ceil(lifetime.total_seconds()),
        }
        return jwt.encode(claims, self._development, algorithm="EdDSA")

    def mint_link(self, grant: LinkGrant, *, issued_at: datetime, expires_at: datetime) -> str:
        """The bearer token of an emailed link: the same for the same arguments, so that it need not be stored."""
        claims = {
            "iss": LINK_ISSUER,
            "aud": f"urn:sunset:link:{grant.purpose}",
            "sub": grant.subject,
            "subject_issuer": grant.issuer,
            "account": str(grant.account_id),
            "request": str(grant.request_id),
            "generation": grant.generation,
            "iat": int(issued_at.timestamp()),
            "exp": int(expires_at.timestamp()),
        }
        return jwt.encode(claims, self._link, algorithm="EdDSA")

    def confirmation_token(self, request_id: UUID, generation: int) -> str:
        """The one-time token that confirms a request: 256 bits that only this installation can tell, in base64url.

        The same for the same arguments, so that an email can be written again while the database holds the hash only.
        """
        message = f"{request_id}/{generation}".encode()
        return _base64url(hmac.digest(self._confirmation_key, message, hashlib.sha256))

    def webhook_secret(self, endpoint_id: UUID, generation: int) -> str:
        """The secret that signs what an endpoint is sent, as Standard Webhooks writes it: 256 bits that only this
        installation can tell, the same for the same arguments, so that it need not be stored."""
        secret = hmac.digest(self._webhook_key, f"{endpoint_id}/{generation}".encode(), hashlib.sha256)
        return "whsec_" + base64.b64encode(secret).decode()


def hash_confirmation_token(token: str) -> str:
    """What the database keeps of a confirmation token: SHA-256 in hexadecimal. Compare it with hmac.compare_digest."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def _base64url(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


# --- Claims: only ever read from a token whose signature, issuer and audience hold -----------------------------------


def _checked_times(claims: Mapping[str, Any], *, now: float, max_lifetime: timedelta | None) -> datetime:
    """When the token expires. Raises Unauthenticated unless it is valid `now` and lives no longer than allowed."""
    issued_at, expires_at = _time(claims, "iat"), _time(claims, "exp")
    not_before = _time(claims, "nbf") if "nbf" in claims else issued_at
    if max(issued_at, not_before) > now + _LEEWAY_SECONDS:
        raise Unauthenticated("The token is not valid yet.")
    if expires_at <= now:
        raise Unauthenticated("The token has expired.")
    if max_lifetime is not None and expires_at - issued_at > max_lifetime.total_seconds():
        raise Unauthenticated(
            f"The token lives too long: at most {max_lifetime // timedelta(hours=1)} hours are accepted."
        )
    return datetime.fromtimestamp(expires_at, UTC)


def _time(claims: Mapping[str, Any], claim: str) -> float:
    """A claim in seconds since 1970, of this era: neither infinite nor beyond what a datetime holds."""
    value = claims.get(claim)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e11:
        return float(value)
    raise Unauthenticated(f"The token's `{claim}` is missing or is no time.")


def _name(claims: Mapping[str, Any], claim: str) -> str:
    """A claim that is somebody's name: short, on one line, and text that a database can hold."""
    value = claims.get(claim)
    if isinstance(value, str) and 0 < len(value) <= _MAX_NAME_LENGTH and value.isprintable() and value.strip() == value:
        return value
    raise Unauthenticated(f"The token's `{claim}` is missing or cannot be used.")


def _grant(claims: Mapping[str, Any], subject: str) -> LinkGrant:
    """What a link token allows. Its claims are of our own making, as its signature proves."""
    return LinkGrant(
        purpose=_LINK_AUDIENCES[claims["aud"]],
        issuer=_name(claims, "subject_issuer"),
        subject=subject,
        account_id=UUID(claims["account"]),
        request_id=UUID(claims["request"]),
        generation=claims["generation"],
    )


# --- Signatures: an algorithm is only ever used with a key that is made for it ---------------------------------------


def _fits(algorithm: str, key: _PublicKey) -> bool:
    """Whether tokens may be signed with `algorithm` by the owner of `key`. False for everything not named here."""
    match algorithm:
        case "RS256" | "RS384" | "RS512" | "PS256" | "PS384" | "PS512":
            return isinstance(key, RSAPublicKey) and key.key_size >= 2048
        case "ES256":
            return isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1)
        case "ES384":
            return isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP384R1)
        case "EdDSA":
            return isinstance(key, Ed25519PublicKey)
        case _:
            return False


_ALGORITHMS: Final = frozenset(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"))


class _Keys(Protocol):
    """Where an issuer's public keys come from."""

    async def find(self, algorithm: str, key_id: str | None) -> _PublicKey | None:
        """The key that a token with this header must be signed by, if there is exactly one."""

    @property
    def counts_for(self) -> float:
        """Seconds for which what was found may be relied on."""

    async def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class _Issuer:
    """Whose tokens are accepted, for whom, and how long they may live."""

    keys: _Keys
    audiences: tuple[str, ...]
    max_lifetime: timedelta | None = MAX_LIFETIME

    async def verified_claims(self, raw: str, header: Mapping[str, Any]) -> dict[str, Any]:
        """The claims, once signature and audience are proven. That `iss` is this issuer is how the caller got here."""
        algorithm, key_id = header.get("alg"), header.get("kid")
        if not (isinstance(algorithm, str) and algorithm in _ALGORITHMS and isinstance(key_id, str | None)):
            raise Unauthenticated("The token's algorithm is not accepted.")
        key = await self.keys.find(algorithm, key_id)
        if key is None:
            raise Unauthenticated("The token is signed by an unknown key.")
        try:
            # Times are judged by the caller's clock, which PyJWT cannot be given.
            claims = jwt.decode(
                raw,
                key,
                algorithms=[algorithm],
                audience=self.audiences,
                options={
                    "require": ["exp", "iat", "sub", "aud"],
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                    "verify_sub": False,
                },
            )
        except jwt.InvalidAudienceError:
            raise Unauthenticated("The token is meant for another audience.") from None
        except jwt.MissingRequiredClaimError as error:
            raise Unauthenticated(f"The token lacks `{error.claim}`.") from None
        except jwt.InvalidTokenError:
            raise Unauthenticated("The token's signature is not valid.") from None
        return claims


class _OwnKey:
    """The public half of a key of our own."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._public = private.public_key()

    async def find(self, algorithm: str, key_id: str | None) -> _PublicKey | None:
        return self._public if key_id is None and _fits(algorithm, self._public) else None

    @property
    def counts_for(self) -> float:
        return _RECHECK_SECONDS

    async def close(self) -> None:
        pass


# --- The identity provider's keys ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _ProviderKey:
    key_id: str | None
    algorithm: str | None
    """The only algorithm for the key, if its provider says so."""
    public: _PublicKey


class _KeysUnavailable(Exception):
    """The provider did not answer with usable keys; the text says why, for the log."""


class _ProviderKeys:
    """An OpenID provider's published keys, kept in memory.

    However many requests want them at once, they are fetched once. Keys that are ten minutes old are fetched again,
    and until that is done they go on counting, for a day: nobody waits, also when the provider does not answer, which
    is then asked every five seconds. A request waits when there are no keys that count, which it is refused for as
    Unavailable if none come, and when it names a key that is unknown, but then at most every thirty seconds, since
    anybody can make up key names.
    """

    FRESH_SECONDS: Final = 600
    STALE_SECONDS: Final = 86_400
    UNKNOWN_KEY_SECONDS: Final = 30
    RETRY_SECONDS: Final = 5
    DEADLINE_SECONDS: Final = 5
    """For a whole fetch, discovery included."""
    MAX_BYTES: Final = 262_144
    MAX_KEYS: Final = 100

    def __init__(self, *, issuer: str, jwks_url: str, clock: Callable[[], float]) -> None:
        self._issuer = issuer
        self._jwks_url = jwks_url
        self._clock = clock
        self._keys: list[_ProviderKey] = []
        self._fetched_at = -math.inf
        self._tried_at = -math.inf
        self._fetching: asyncio.Task[None] | None = None

    async def find(self, algorithm: str, key_id: str | None) -> _PublicKey | None:
        if self._age() >= self.FRESH_SECONDS and self._may_try(self.RETRY_SECONDS):
            self._begin_fetch()
        if self._age() < self.STALE_SECONDS:
            key = self._match(algorithm, key_id)
            if key is None and self._may_try(self.UNKNOWN_KEY_SECONDS):
                await self._fetched()
                key = self._match(algorithm, key_id)
            return key
        if self._fetching is not None:
            await self._fetched()
        if self._age() >= self.STALE_SECONDS:
            raise Unavailable("The identity provider's keys cannot be fetched just now. Try again in a moment.")
        return self._match(algorithm, key_id)

    @property
    def counts_for(self) -> float:
        return _RECHECK_SECONDS if self._age() < self.FRESH_SECONDS else self.RETRY_SECONDS

    async def close(self) -> None:
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait([self._fetching])

    def _age(self) -> float:
        return self._clock() - self._fetched_at

    def _may_try(self, pause: int) -> bool:
        """Whether a fetch is under way to wait for, or the last one was long enough ago."""
        return self._fetching is not None or self._clock() - self._tried_at >= pause

    def _match(self, algorithm: str, key_id: str | None) -> _PublicKey | None:
        found = [
            key.public
            for key in self._keys
            if (key_id is None or key.key_id == key_id)
            and key.algorithm in (None, algorithm)
            and _fits(algorithm, key.public)
        ]
        return found[0] if len(found) == 1 else None

    def _begin_fetch(self) -> "asyncio.Task[None]":
        if self._fetching is None:
            # A context of its own: a request's database binding and log fields are not the fetch's.
            self._fetching = asyncio.create_task(self._fetch(), name="identity provider keys", context=Context())
            self._fetching.add_done_callback(self._forget_task)
        return self._fetching

    async def _fetched(self) -> None:
        # Shielded: one request that is cancelled must not take the keys from the others that wait.
        await asyncio.shield(self._begin_fetch())

    def _forget_task(self, _: asyncio.Task[None]) -> None:
        self._fetching = None

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(self.DEADLINE_SECONDS), self._client() as client:
                url = self._jwks_url or await self._discover(client)
                keys = _usable_keys(await self._get(client, url), limit=self.MAX_KEYS)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, _KeysUnavailable) as error:
            reason = str(error) if isinstance(error, _KeysUnavailable) else type(error).__name__
            _log.warning("identity_provider_keys_unavailable", issuer=self._issuer, reason=reason)
        except Exception as failure:  # nobody may be waiting who would tell of it
            _log.error("identity_provider_keys_failed", issuer=self._issuer, exc_info=failure)
        else:
            self._keys, self._fetched_at = keys, self._clock()
        finally:
            self._tried_at = self._clock()

    def _client(self) -> httpx2.AsyncClient:
        # Short-lived: fetches are minutes apart. What is on this machine is never asked for through a proxy.
        local = is_loopback(urlsplit(self._jwks_url or self._issuer).hostname or "")
        return httpx2.AsyncClient(
            follow_redirects=False,
            timeout=None,  # one deadline for the whole fetch, which a server that drips cannot stretch
            trust_env=not local,
            headers={"accept": "application/json", "accept-encoding": "identity"},
        )

    async def _discover(self, client: httpx2.AsyncClient) -> str:
        document = await self._get(client, self._issuer.rstrip("/") + "/.well-known/openid-configuration")
        if document.get("issuer") != self._issuer:
            raise _KeysUnavailable("the discovery document is of another issuer")
        url = document.get("jwks_uri")
        if not isinstance(url, str):
            raise _KeysUnavailable("the discovery document names no jwks_uri")
        parts = urlsplit(url)
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
            raise _KeysUnavailable("the jwks_uri is not https")
        return url

    async def _get(self, client: httpx2.AsyncClient, url: str) -> dict[str, Any]:
        """The JSON object at `url`: a plain 200 answer of bounded size, with no redirect followed."""
        async with client.stream("GET", url) as response:
            if response.status_code != 200:
                raise _KeysUnavailable(f"status {response.status_code}")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise _KeysUnavailable("a compressed answer")
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > self.MAX_BYTES:
                    raise _KeysUnavailable(f"more than {self.MAX_BYTES} bytes")
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            raise _KeysUnavailable("not JSON") from None
        if not isinstance(document, dict):
            raise _KeysUnavailable("not a JSON object")
        return document


def _usable_keys(document: Mapping[str, Any], *, limit: int) -> list[_ProviderKey]:
    """The signing keys of a JSON Web Key Set that we can use; others in it are passed over. Raises if there is none."""
    listed = document.get("keys")
    if not isinstance(listed, list) or len(listed) > limit:
        raise _KeysUnavailable(f"no list of at most {limit} keys")
    keys = [key for entry in listed if isinstance(entry, dict) and (key := _usable_key(entry)) is not None]
    if not keys:
        raise _KeysUnavailable("no usable signing key")
    return keys


def _usable_key(entry: Mapping[str, Any]) -> _ProviderKey | None:
    key_id, algorithm, operations = entry.get("kid"), entry.get("alg"), entry.get("key_ops", ["verify"])
    if entry.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        return None
    if not isinstance(key_id, str | None) or not isinstance(algorithm, str | None):
        return None
    # The public members alone: a private key published by mistake is not loaded, a symmetric one cannot be.
    public = {name: entry[name] for name in ("kty", "n", "e", "crv", "x", "y") if name in entry}
    try:
        key = jwt.PyJWK(public).key
    except jwt.PyJWTError:
        return None
    if not isinstance(key, RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey):
        return None
    return _ProviderKey(key_id=key_id, algorithm=algorithm, public=key)
