"""The gate: may this account send, may its members sign in. Asked by the systems that send and sign in, at each call.

* `GET /gate/accounts/{reference}` answers in JSON, `POST /gate/accounts` for up to 1,000 references at once.
* `/gate/messages/{reference}` and `/gate/members/{reference}` answer 204 or 403 without a body, which is what nginx
  (`auth_request`) asks for. The path alone names the account.
* `/gate/messages-by-header` and `/gate/members-by-header` answer 200 or 403 without a body, which is what Envoy
  (`ext_authz`, to which nothing but 200 is a yes) and Traefik (`forwardAuth`) ask for. The header
  `X-Account-Reference` alone names the account; what follows in the path, and the method, are the visitor's.

Each route has one source for the account, because a visitor controls whatever the proxy passes on and does not
overwrite: a second source, or one that can be read in two ways, is a no. Such a no is a 403, never another 4xx, of
which proxies make failures of their own.

The truth is read from the database with every call: the first call after a cancellation's commit says no, whichever
process answers. Whatever is not a clear yes is a no: an account that nobody knows, a caller who may not ask, a
database that is away. Who may not ask learns that first, and is not listened to any further.

The hottest path of the house: one prepared statement says whether the caller may ask and what the answer is, and
nothing but the answer is made of it.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from app import accounts, db, errors, metrics
from app.auth import Installation
from app.lifecycle import Scope

MAX_REFERENCES = 1_000
MAX_BODY_BYTES = 512 * 1024
"""For each reference of a full list 512 bytes, which is twice what 200 ASCII characters take."""
_MAX_REFERENCE_LENGTH = 200
_HEADERS = {"Cache-Control": "no-store"}
_REFERENCE_HEADER = "x-account-reference"

_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")
"""In no account's reference, see `app.provisioning`."""
_MISLEADING = re.compile(
    rb"[/\\]|%(?:2[3F]|3F|5C)"  # somebody on the way may end the name here: / \ and # ? when encoded
    rb"|%25|%(?![0-9A-F]{2})"  # and decode it once more
    rb"|%(?:2[DE]|3[0-9]|[46][1-9A-F]|[57][0-9A]|5F|7E)",  # encoded without need: each name has one spelling
    re.IGNORECASE,
)

_NOBODY = "SELECT CAST(NULL AS VARCHAR(200)) AS reference"


def routes(installation: Installation) -> list[BaseRoute]:
    gate = _Gate(installation)
    by_header, by_path = gate.endpoint(gate.bare_by_header), gate.endpoint(gate.bare_by_path)
    return [
        Route("/gate/accounts", gate.endpoint(gate.many), methods=["POST"]),
        _Below("/gate/accounts/", gate.endpoint(gate.one), methods=["GET"]),
        _Below("/gate/messages-by-header", by_header),
        _Below("/gate/members-by-header", by_header),
        _Below("/gate/messages", by_path),
        _Below("/gate/members", by_path),
    ]


class _Below(Route):
    """A path with all that begins with it, line breaks and empty segments too; by any method, where none is named."""

    def __init__(
        self, path: str, endpoint: Callable[[Request], Awaitable[Response]], methods: Sequence[str] | None = None
    ) -> None:
        super().__init__(path, endpoint, methods=methods)
        self.path_regex = re.compile(re.escape(path))
        if methods is None:
            self.methods = None


class _Refused(Exception):
    """The request cannot be answered with yes or no; said in JSON, with this status."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """What holds for one account. There is one truth for both questions: access ends when messages stop."""

    reference: str | None
    """None: what was named can be no account's."""
    status: str | None
    epoch: int | None
    is_open: bool

    def shown(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "status": self.status,
            "epoch": self.epoch,
            "canSendMessages": self.is_open,
            "membersCanSignIn": self.is_open,
        }


class _Gate:
    def __init__(self, installation: Installation) -> None:
        self._installation = installation

    def endpoint(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """What is refused or cannot be known is no answer, and never a yes."""

        async def answered(request: Request) -> Response:
            try:
                return await answer(request)
            except _Refused as refusal:
                metrics.gate("refused")
                return _json({"error": refusal.message}, refusal.status, refusal.headers)
            except errors.Unauthenticated as refusal:
                metrics.gate("refused")
                return _json({"error": refusal.message}, 401, {"WWW-Authenticate": "Bearer"})
            except errors.Unavailable as refusal:
                metrics.gate("unavailable")
                return _json({"error": refusal.message}, 503, {"Retry-After": str(refusal.retry_after)})

        return answered

    async def one(self, request: Request) -> Response:
        reference = _reference(unquote_to_bytes(_in_path(request)))
        if reference is None:
            await self._ask(request, _NOBODY, [])
            raise _unusable()
        return _json((await self._read(request, reference)).shown())

    async def bare_by_path(self, request: Request) -> Response:
        """204 for yes, 403 for no."""
        found = await self._read(request, _alone_in_path(request))
        return Response(status_code=204 if found.is_open else 403, headers=_HEADERS)

    async def bare_by_header(self, request: Request) -> Response:
        """200 for yes, 403 for no."""
        found = await self._read(request, _in_header(request))
        return Response(status_code=200 if found.is_open else 403, headers=_HEADERS)

    async def many(self, request: Request) -> Response:
        await self._ask(request, _NOBODY, [])
        references = await _references(request)
        marks = ", ".join(f"(${index})" for index in range(3, 3 + len(references)))
        rows = await self._ask(request, f"SELECT column1 AS reference FROM (VALUES {marks}) named", references)
        found = {row["reference"]: _answer(row["reference"], row) for row in rows}
        return _json({"accounts": [found[reference].shown() for reference in references]})

    async def _read(self, request: Request, reference: str | None) -> _Answer:
        [row] = await self._ask(request, "SELECT CAST($3 AS VARCHAR(200)) AS reference", [reference])
        return _answer(reference, row)

    async def _ask(self, request: Request, named: str, references: Sequence[str | None]) -> list[dict[str, Any]]:
        """One statement: whether the caller may ask, and what holds for each account that was named."""
        async with db.deadline(self._installation.request_timeout):
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not token:
                raise errors.Unauthenticated("Send a service's token: `Authorization: Bearer ...`.")
            tokens = self._installation.tokens
            await tokens.follow()
            identity = await tokens.verify(token.strip())
            rows = await db.fetch(
                f"SELECT q.reference, a.status, a.epoch, {accounts.has_access_sql('a')} AS is_open, "
                "EXISTS (SELECT 1 FROM service v WHERE v.issuer = $1 AND v.subject = $2 AND v.deactivated_at IS NULL "
                f"AND ' ' || v.scopes || ' ' LIKE '% {Scope.GATE} %') AS may_ask "
                f"FROM ({named}) q LEFT JOIN account a ON a.reference = q.reference",
                identity.issuer,
                identity.subject,
                *references,
            )
        if identity.grant is not None or not all(row["may_ask"] for row in rows):
            raise _Refused(403, f"This needs the token of a service with the scope `{Scope.GATE}`.")
        return rows


def _answer(reference: str | None, row: Mapping[str, Any]) -> _Answer:
    metrics.gate("yes" if row["is_open"] else "no")
    return _Answer(reference=reference, status=row["status"], epoch=row["epoch"], is_open=bool(row["is_open"]))


def _in_path(request: Request) -> bytes:
    """What follows the route in the path, as it was sent. Empty, too, where the route itself was sent encoded."""
    before = (request.scope.get("root_path", "") + request.scope["route"].path.rstrip("/") + "/").encode()
    raw: bytes = request.scope["raw_path"]
    return raw[len(before) :] if raw.startswith(before) else b""


def _alone_in_path(request: Request) -> str | None:
    """The reference in the path. None where something else may name an account, or where somebody on the way may read
    another name."""
    name = _in_path(request)
    target: bytes = request.scope.get("state", {}).get("target", b"")
    if request.scope["query_string"] or b"?" in target or b"#" in target:
        return None
    if _MISLEADING.search(name) or name in {b".", b".."} or request.headers.getlist(_REFERENCE_HEADER):
        return None
    return _reference(unquote_to_bytes(name))


def _in_header(request: Request) -> str | None:
    """What the header says, in UTF-8 and as it stands there. None where it is missing, or given twice: also when
    somebody on the way has joined the two with a comma."""
    given = [value for name, value in request.scope["headers"] if name == _REFERENCE_HEADER.encode()]
    return _reference(given[0].strip(b" \t")) if len(given) == 1 and b"," not in given[0] else None


def _reference(name: bytes) -> str | None:
    """The name, where it can be an account's."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return None
    return None if _CONTROL.search(text) or not _can_be_looked_up(text) else text


def _can_be_looked_up(text: str) -> bool:
    """Of what is longer, or is no text to a database, it cannot even be asked whether an account has it."""
    has_half = any("\ud800" <= one <= "\udfff" for one in text)
    return 1 <= len(text) <= _MAX_REFERENCE_LENGTH and "\0" not in text and not has_half


def _unusable() -> _Refused:
    return _Refused(400, f"A reference has 1 to {_MAX_REFERENCE_LENGTH} characters, and no control characters.")


async def _references(request: Request) -> list[str]:
    too_large = _Refused(413, f"The body is larger than {MAX_BODY_BYTES:,} bytes.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise too_large
    except ClientDisconnect:
        raise _Refused(400, "The body has not come whole.") from None
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError:
        given = None
    listed = given.get("references") if isinstance(given, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise _Refused(400, 'Send JSON: {"references": ["..."]}.')
    if not 1 <= len(listed) <= MAX_REFERENCES:
        raise _Refused(400, f"From 1 to {MAX_REFERENCES:,} references are answered at once.")
    if not all(_can_be_looked_up(one) for one in listed):
        raise _unusable()
    return listed


def _json(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, {**_HEADERS, **(headers or {})}, "application/json")
