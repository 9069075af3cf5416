"""The gate: may this account send, may its members sign in. Asked by the systems that send and sign in, at each call.

* `GET /gate/accounts/{reference}` answers in JSON, `POST /gate/accounts` for up to 1,000 references at once.
* `GET /gate/messages/{reference}` and `GET /gate/members/{reference}` answer 204 or 403 without a body, which is what
  nginx (`auth_request`), Envoy (`ext_authz`) and Traefik (`forwardAuth`) ask for. Where the address cannot name the
  account, the header `X-Account-Reference` does, and the rest of the path is not looked at.

The truth is read from the database with every call: the first call after a cancellation's commit says no, whichever
process answers. Whatever is not a clear yes is a no: an account that nobody knows, a caller who may not ask, a
database that is away.

The hottest path of the house: one prepared statement says whether the caller may ask and what the answer is, and
nothing but the answer is made of it.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from app import accounts, db, errors, metrics
from app.auth import Installation
from app.lifecycle import Scope

MAX_REFERENCES = 1_000
_MAX_BODY_BYTES = 512 * 1024
_MAX_REFERENCE_LENGTH = 200
_HEADERS = {"Cache-Control": "no-store"}
_REFERENCE_HEADER = "x-account-reference"


def routes(installation: Installation) -> list[BaseRoute]:
    gate = _Gate(installation)
    return [
        Route("/gate/accounts", gate.endpoint(gate.many), methods=["POST"]),
        Route("/gate/accounts/{reference:path}", gate.endpoint(gate.one), methods=["GET"]),
        Route("/gate/messages{reference:path}", gate.endpoint(gate.bare), methods=["GET"]),
        Route("/gate/members{reference:path}", gate.endpoint(gate.bare), methods=["GET"]),
    ]


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

    reference: str
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
                async with db.deadline(self._installation.request_timeout):
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
        return _json((await self._read(request, _reference(request.path_params["reference"]))).shown())

    async def bare(self, request: Request) -> Response:
        """204 for yes, 403 for no."""
        named = request.headers.get(_REFERENCE_HEADER)
        reference = _reference(request.path_params["reference"].removeprefix("/") if named is None else named)
        found = await self._read(request, reference)
        return Response(status_code=204 if found.is_open else 403, headers=_HEADERS)

    async def many(self, request: Request) -> Response:
        references = await _references(request)
        marks = ", ".join(f"(${index})" for index in range(3, 3 + len(references))) or "(NULL)"
        rows = await self._ask(request, f"SELECT column1 AS reference FROM (VALUES {marks}) named", references)
        found = {row["reference"]: _answer(row["reference"], row) for row in rows}
        return _json({"accounts": [found[reference].shown() for reference in references]})

    async def _read(self, request: Request, reference: str) -> _Answer:
        [row] = await self._ask(request, "SELECT CAST($3 AS VARCHAR(200)) AS reference", [reference])
        return _answer(reference, row)

    async def _ask(self, request: Request, named: str, references: Sequence[str]) -> list[dict[str, Any]]:
        """One statement: whether the caller may ask, and what holds for each account that was named."""
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


def _answer(reference: str, row: Mapping[str, Any]) -> _Answer:
    metrics.gate("yes" if row["is_open"] else "no")
    return _Answer(reference=reference, status=row["status"], epoch=row["epoch"], is_open=bool(row["is_open"]))


def _reference(text: str) -> str:
    if not 1 <= len(text) <= _MAX_REFERENCE_LENGTH or "\0" in text or any("\ud800" <= one <= "\udfff" for one in text):
        raise _Refused(400, f"A reference has 1 to {_MAX_REFERENCE_LENGTH} characters.")
    return text


async def _references(request: Request) -> list[str]:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise _Refused(413, f"The body is larger than {_MAX_BODY_BYTES:,} bytes.")
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError:
        given = None
    listed = given.get("references") if isinstance(given, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise _Refused(400, 'Send JSON: {"references": ["..."]}.')
    if not 1 <= len(listed) <= MAX_REFERENCES:
        raise _Refused(400, f"From 1 to {MAX_REFERENCES:,} references are answered at once.")
    return [_reference(one) for one in listed]


def _json(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, {**_HEADERS, **(headers or {})}, "application/json")
