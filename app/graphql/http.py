"""The endpoint: HTTP in, one GraphQL operation, HTTP out.

It negotiates, reads, refuses, executes and shows, as GraphQL over HTTP says, and keeps three promises: every answer is
JSON in GraphQL's error form; nothing that a client sends makes a 5xx; and of an error only what was written for
clients is shown, everything else is logged whole and masked. It must not know the schema's fields, tokens or rows: who
asks is the business of the `context` that it is given.

Requests are executed by graphql-core on Strawberry's schema, without Strawberry's own `execute`: that one parses and
validates each time, builds extension runners and cannot tell a refused request from an executed one. What Strawberry
adds to resolvers, its exception handlers included, lives in the fields and works the same.
"""

import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from inspect import isawaitable
from typing import Any, Final, Generic, TypeVar, cast
from urllib.parse import parse_qsl
from uuid import uuid4

import orjson
import strawberry
import structlog
from graphql import ExecutionResult, GraphQLError
from graphql.language import ValueNode
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from strawberry.exceptions import StrawberryInputCoercionError
from strawberry.execution.is_awaitable import optimized_is_awaitable

from app import db, errors, metrics
from app.graphql import scalars
from app.graphql.documents import MAX_ERRORS, UNREADABLE, Document, Documents, Rejection, formatted, innermost
from app.graphql.executor import Executor
from app.graphql.limits import Limits

_log = structlog.stdlib.get_logger(__name__)

_JSON: Final = "application/json"
_GRAPHQL_JSON: Final = "application/graphql-response+json"
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}", re.ASCII)
_QUALITY: Final = re.compile(r"0(?:\.\d{0,3})?|1(?:\.0{0,3})?", re.ASCII)
_STATUS_FOR_BOTH: Final = frozenset({401, 405, 413, 415, 429, 503})
"""Statuses that are about HTTP itself; a client of `application/json` gets other refusals as 200, without data."""
_MASKED: Final = "Something went wrong on our side, and it is recorded. Please quote the request id if it persists."

Context = TypeVar("Context")


@dataclass(frozen=True, slots=True)
class _Parameters:
    """What a request asks to execute, well-formed, and not yet checked against the schema."""

    query: str
    operation_name: str | None
    variables: dict[str, Any] | None


class _Malformed(Exception):
    """The HTTP request itself is unusable. Answered with this status whatever the client accepts."""

    def __init__(self, message: str, *, status: int = 400, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.headers = headers or {}


class GraphQLEndpoint(Generic[Context]):
    """An ASGI application for the route `/graphql`: GET for queries, POST for queries and mutations.

    `context` makes what resolvers see as `info.context`. It is called once per request, before the body is read, and
    raises `errors.Unauthenticated` when nobody acceptable asks; other `RequestError`s refuse the request as they say.

    `gate` is awaited before operations that could answer something without any resolver having looked at the caller,
    such as introspection: it raises a `RequestError` for callers who may not use the endpoint at all.

    `refusals` are the names of the types that stand for an expected refusal; answers of one are counted as such.

    `timeout` bounds `context`, and again `gate` and the execution together: what takes longer is canceled and answered
    with 503, like a database that is away. The client's own slowness in sending does not count.

    `request.state.request_id` is set before `context` is called; `request.state.operation`, a `documents.Operation`,
    from `gate` on. Both are bound to structlog's context variables too (the operation as its name and kind).
    """

    def __init__(
        self,
        schema: strawberry.Schema,
        *,
        context: Callable[[Request], Awaitable[Context]],
        gate: Callable[[Context], Awaitable[None]],
        refusals: Collection[str] = frozenset(),
        limits: Limits | None = None,
        timeout: timedelta = timedelta(seconds=10),
    ) -> None:
        if schema.extensions or schema.directives or schema.subscription:
            raise ValueError("this endpoint runs no schema extensions, custom operation directives or subscriptions")
        self._schema = schema
        self._context = context
        self._gate = gate
        self._refusals = refusals
        self._limits = limits or Limits()
        self._timeout = timeout
        self.documents = Documents(schema._schema, self._limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        request = Request(scope, receive)
        request.state.executing = ()
        request.state.results = ()
        given = request.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
        request.state.request_id = request_id
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                response = await self._respond(request)
            except ClientDisconnect:
                return
        results: Sequence[tuple[str, str]] = request.state.results
        refused = [one for one in results if one[1] in self._refusals]
        metrics.answered(results, refused, time.perf_counter() - began)
        response.headers["X-Request-ID"] = request_id
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        """The answer, whatever happens."""
        media_type = _JSON
        try:
            media_type = _negotiate(", ".join(request.headers.getlist("accept")))
            return await self._execute(request, media_type)
        except _Malformed as refusal:
            _note(request, errors.BadUserInput.code)
            refused = [{"message": refusal.message, "extensions": {"code": errors.BadUserInput.code}}]
            return _response({"errors": refused}, media_type, refusal.status, refusal.headers)
        except errors.RequestError as refusal:
            _note(request, refusal.code)
            return _refused(refusal, request, media_type)
        except ClientDisconnect:
            raise
        except Exception as failure:
            _log.error("graphql.request_failed", exc_info=failure)
            extensions = _internal(request)
            _note(request, extensions["code"])
            return _response({"errors": [{"message": _MASKED, "extensions": extensions}]}, media_type, 500)

    async def _execute(self, request: Request, media_type: str) -> Response:
        if request.method not in {"GET", "POST"}:
            raise _Malformed("Use POST, or GET for queries.", status=405, headers={"Allow": "GET, POST"})
        async with db.deadline(self._timeout):
            context = await self._context(request)
        parameters = await self._parameters(request)
        prepared = self.documents.prepare(parameters.query)
        if isinstance(prepared, Rejection):
            _note(request, prepared.errors[0]["extensions"]["code"])
            return _not_executed(prepared.errors, media_type)
        operation = prepared.select(parameters.operation_name)
        if request.method == "GET" and operation.kind != "query":
            raise _Malformed("Mutations are sent with POST.", status=405, headers={"Allow": "POST"})
        request.state.operation = operation
        with structlog.contextvars.bound_contextvars(operation=operation.name, operation_kind=operation.kind):
            async with db.deadline(self._timeout):
                if operation.needs_gate:
                    await self._gate(context)
                return await self._run(prepared, parameters, context, request, media_type)

    async def _parameters(self, request: Request) -> _Parameters:
        limit = self._limits.body_bytes
        if request.method == "GET":
            raw: object = _query_string(request.scope["query_string"], limit)
            _refuse_deep_or_nul(raw, self._limits.json_depth)
        else:
            _require_json(request)
            body = await _body(request, limit)
            raw = _loads(body, "The request's body")
            # Only escapes can put a NUL into JSON, and only brackets make it deep: most bodies need no walk.
            if b"\\u0000" in body or body.count(b"[") + body.count(b"{") > self._limits.json_depth:
                _refuse_deep_or_nul(raw, self._limits.json_depth)
        return _checked(raw)

    async def _run(
        self, document: Document, parameters: _Parameters, context: Context, request: Request, media_type: str
    ) -> Response:
        executor = self._schema.execution_context_class.build(
            self._schema._schema,
            document.ast,
            context_value=context,
            raw_variable_values=parameters.variables,
            operation_name=parameters.operation_name,
            max_coercion_errors=MAX_ERRORS,
            is_awaitable=cast("Any", optimized_is_awaitable),  # the same test, quicker for what resolvers return
            hide_suggestions=True,
        )
        shown = _Shown(request)
        if isinstance(executor, list):
            unusable = [shown.of(error, coercion=True) for error in executor[:MAX_ERRORS]]
            _note(request, unusable[0]["extensions"]["code"])
            return _not_executed(unusable, media_type)
        roots = request.state.operation.roots
        request.state.executing = roots.values()
        result = executor.execute_operation()
        if isawaitable(result):
            result = await result
        assert isinstance(result, ExecutionResult)
        members = executor.members if isinstance(executor, Executor) else {}
        outcomes = {key: kind.name for key, kind in members.items() if kind.name in self._refusals}
        if not result.errors:
            request.state.results = _results(roots, result.data or {}, outcomes)
            return _response({"data": result.data}, media_type, 200)
        limited: dict[str | int, errors.RateLimited] = {}
        for error in result.errors:
            cause = innermost(error)
            # Without its database the service is down, and half an answer would hide it from clients and balancers.
            if isinstance(cause, errors.Unavailable):
                raise cause
            if isinstance(cause, errors.RateLimited) and error.path is not None:
                limited[error.path[0]] = cause
        told = list(map(shown.of, result.errors))
        outcomes |= {
            error.path[0]: one["extensions"]["code"]
            for error, one in zip(result.errors, told, strict=True)
            if error.path
        }
        request.state.results = _results(roots, outcomes if result.data is None else result.data, outcomes)
        body = {"errors": told, "data": result.data}
        if not limited:
            return _response(body, media_type, 200)
        # Repeating the document makes sense when all of its fields would be let through.
        headers = _retry_after(max(limited.values(), key=lambda refusal: refusal.retry_after))
        if result.data is None or limited.keys() < result.data.keys():
            return _response(body, media_type, 200, headers)
        return _response({"errors": body["errors"]}, media_type, errors.RateLimited.http_status, headers)


class _Shown:
    """What a client sees of errors: written messages, and a mask over everything else, which is logged once each."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._logged: list[BaseException] = []

    def of(self, error: GraphQLError, *, coercion: bool = False) -> dict[str, Any]:
        """`error` in GraphQL's form. `coercion` says that it comes from reading the variables' values."""
        cause = innermost(error)
        if isinstance(cause, errors.RequestError):
            return formatted(error, cause.extensions, cause.message)
        if isinstance(cause, GraphQLError) and (coercion or _is_coercion(cause)):
            return formatted(error, {"code": errors.BadUserInput.code})
        if isinstance(cause, StrawberryInputCoercionError) or (coercion and isinstance(cause, ValueError)):
            # The value is at fault, and the message was written for developers in Python.
            return formatted(error, {"code": errors.BadUserInput.code}, UNREADABLE)
        # One failure often breaks several fields, for example all that wait for the same batch.
        if not any(cause is logged for logged in self._logged):
            self._logged.append(cause)
            _log.error("graphql.field_failed", path=error.path, exc_info=cause)
        return formatted(error, _internal(self._request), _MASKED)


def _is_coercion(cause: GraphQLError) -> bool:
    """Whether graphql-core says that an argument's value is unusable; it shows that value and nothing else.

    graphql-core's other errors point to the field that failed, and show what a resolver returned.
    """
    return isinstance(next(iter(cause.nodes or ()), None), ValueNode)


def _results(
    roots: Mapping[str, str], answered: Iterable[str | int], outcomes: Mapping[str | int, str]
) -> list[tuple[str, str]]:
    """What came of each root field that was executed. `roots` has their names by their keys in the answer."""
    return [(roots[key], outcomes.get(key, metrics.OK)) for key in answered if isinstance(key, str) and key in roots]


def _note(request: Request, code: str) -> None:
    """The request as a whole ended so, with the root fields that were being executed."""
    request.state.results = [(name, code) for name in request.state.executing or (metrics.NOT_EXECUTED,)]


def _internal(request: Request) -> dict[str, Any]:
    return {"code": "INTERNAL_SERVER_ERROR", "requestId": request.state.request_id}


def _negotiate(accept: str) -> str:
    """The media type of the answer. Unless GraphQL's own is asked for, it is plain JSON: there is no other."""
    accept = accept.lower()
    if _GRAPHQL_JSON not in accept:
        return _JSON
    quality = {_GRAPHQL_JSON: 0.0, _JSON: 0.0}
    for entry in accept.split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        if name in quality:
            weights = [parameter[2:] for parameter in parameters if parameter.startswith("q=")]
            quality[name] = float(weights[0]) if weights and _QUALITY.fullmatch(weights[0]) else float(not weights)
    return _GRAPHQL_JSON if quality[_GRAPHQL_JSON] and quality[_GRAPHQL_JSON] >= quality[_JSON] else _JSON


def _require_json(request: Request) -> None:
    given = request.headers.getlist("content-type")
    media_type, *parameters = (part.strip().lower() for part in (given[0] if len(given) == 1 else "").split(";"))
    charsets = [parameter[8:].strip('"') for parameter in parameters if parameter.startswith("charset=")]
    if media_type != _JSON or any(charset != "utf-8" for charset in charsets):
        raise _Malformed("Send the request as `Content-Type: application/json` in UTF-8.", status=415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise _Malformed("Send the request's body without Content-Encoding.", status=415)


async def _body(request: Request, limit: int) -> bytes:
    """The whole body. Stops reading as soon as it is over `limit`, whatever Content-Length says."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> errors.PayloadTooLarge:
    return errors.PayloadTooLarge(f"The request is larger than the {limit} bytes allowed.", maximum=limit)


def _query_string(raw: bytes, limit: int) -> dict[str, object]:
    """The parameters of a GET. `variables` and `extensions` are JSON inside."""
    if len(raw) > limit:
        raise _too_large(limit)
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=50)
    except ValueError:
        raise _Malformed("The query string is not valid, or not in UTF-8.") from None
    parameters: dict[str, object] = {}
    for name, value in pairs:
        if name in parameters:
            raise _Malformed("A parameter of the query string is given twice.")
        parameters[name] = _loads(value, f"`{name}`") if name in {"variables", "extensions"} else value
    return parameters


def _loads(text: bytes | str, what: str) -> object:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise _Malformed(f"{what} is not valid JSON in UTF-8.") from None


def _refuse_deep_or_nul(value: object, depth: int) -> None:
    level = [value]
    while level:
        if depth < 0:
            raise _Malformed("The request nests lists and objects too deeply.")
        depth -= 1
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str) and "\0" in item:
                raise _Malformed("The request contains the character U+0000.")
        level = below


def _checked(raw: object) -> _Parameters:
    if not isinstance(raw, dict):
        raise _Malformed("The request must be one JSON object; batches are not served.")
    query, name, variables = raw.get("query"), raw.get("operationName"), raw.get("variables")
    if not isinstance(query, str):
        raise _Malformed("`query` must be given, as a string.")
    if not isinstance(name, str | None):
        raise _Malformed("`operationName` must be a string or null.")
    if not isinstance(variables, dict | None):
        raise _Malformed("`variables` must be an object or null.")
    if not isinstance(raw.get("extensions"), dict | None):
        raise _Malformed("`extensions` must be an object or null.")
    # An empty name is how a query string, and some clients, say that there is none.
    return _Parameters(query, name or None, variables)


def _not_executed(shown: Sequence[Mapping[str, Any]], media_type: str) -> Response:
    return _response({"errors": shown}, media_type, 400 if media_type == _GRAPHQL_JSON else 200)


def _refused(refusal: errors.RequestError, request: Request, media_type: str) -> Response:
    status = refusal.http_status if media_type == _GRAPHQL_JSON or refusal.http_status in _STATUS_FOR_BOTH else 200
    headers = _retry_after(refusal)
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer error="invalid_token"' if "authorization" in request.headers else "Bearer"
    return _response(
        {"errors": [{"message": refusal.message, "extensions": refusal.extensions}]}, media_type, status, headers
    )


def _retry_after(refusal: errors.RequestError) -> dict[str, str]:
    return {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}


def _response(
    body: Mapping[str, Any], media_type: str, status: int, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(
        orjson.dumps(body, _shown_value, orjson.OPT_PASSTHROUGH_DATETIME),
        status,
        {
            "Content-Type": f"{media_type}; charset=utf-8",
            "Cache-Control": "no-store",
            "Vary": "Accept, Authorization",
            **(headers or {}),
        },
    )


def _shown_value(value: object) -> str:
    """Times in the extensions of errors look like those in the data."""
    if isinstance(value, datetime):
        return scalars.format_instant(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
