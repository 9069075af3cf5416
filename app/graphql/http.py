"""The endpoint: HTTP in, one GraphQL operation, HTTP out.

It negotiates, reads, refuses, executes and shows, as GraphQL over HTTP says, and keeps three promises: every answer is
JSON in GraphQL's error form; nothing that a client sends makes a 5xx; and of an error only what was written for
clients is shown, everything else is logged whole and masked. It must not know the schema's fields, tokens or rows: who
asks is the business of the `context` that it is given.

To who accepts nothing but `text/event-stream`, and for subscriptions, the answer is a stream of events, as the protocol
of `graphql-sse` says of distinct connections: what is refused before it begins is refused in JSON, everything after
that is an event.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Mapping
from contextlib import AbstractContextManager, ExitStack, aclosing, nullcontext
from typing import Any, Final, Generic, NamedTuple, TypeVar
from urllib.parse import parse_qsl
from uuid import uuid4

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app import db, errors, metrics
from app.graphql.execution import (
    SLOWEST_SECONDS,
    Answer,
    Malformed,
    Operations,
    Parameters,
    checked,
    dumps,
    failed,
    loads,
    parsed,
    refuse_deep_or_nul,
    refused,
)
from app.graphql.limits import Budget
from app.graphql.places import Places

_log = structlog.stdlib.get_logger(__name__)

_JSON: Final = "application/json"
_GRAPHQL_JSON: Final = "application/graphql-response+json"
_EVENTS: Final = "text/event-stream"
_KEEPALIVE_SECONDS: Final = 20.0
"""Silence after which a stream sends a comment, so that nothing on the way takes it for dead."""
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}", re.ASCII)
_QUALITY: Final = re.compile(r"0(?:\.\d{0,3})?|1(?:\.0{0,3})?", re.ASCII)
_STATUS_FOR_BOTH: Final = frozenset({401, 405, 413, 415, 429, 503})
"""Statuses that are about HTTP itself; a client of `application/json` gets other refusals as 200, without data."""
_HEADERS: Final = {"Cache-Control": "no-store", "Vary": "Accept, Authorization"}

Context = TypeVar("Context")


class _Unacceptable(Malformed):
    """The HTTP request itself is unusable. Answered with this status whatever the client accepts."""

    def __init__(self, message: str, *, status: int, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class GraphQLEndpoint(Generic[Context]):
    """An ASGI application for the route `/graphql`: GET for queries and subscriptions, POST for mutations, too.

    `context` makes what resolvers see as `info.context` of the `Authorization` header's value, "" where there is none.
    It is called once per request, before the body is read, and raises `errors.Unauthenticated` when nobody acceptable
    asks; other `RequestError`s refuse the request as they say. It is bounded by the operations' time limit, as the
    execution is; the client's own slowness in sending is not. `sends_batches` says of a context whether its requests
    may be as large as a batch is.

    `streams` bounds how many subscriptions are open at a time, in all and of one caller, which is what `who` makes of a
    context.

    `request.state.request_id` is set before `context` is called; `request.state.operation`, a `documents.Operation`,
    before the operation is executed. Both are bound to structlog's context variables too (the operation as its name
    and kind).
    """

    def __init__(
        self,
        operations: Operations[Context],
        *,
        context: Callable[[str], Awaitable[Context]],
        who: Callable[[Context], Hashable],
        sends_batches: Callable[[Context], bool] = lambda _: False,
        streams: Places,
    ) -> None:
        self._operations = operations
        self._context = context
        self._who = who
        self._sends_batches = sends_batches
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        request = Request(scope, receive)
        request.state.results = ()
        given = request.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
        request.state.request_id = request_id
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            response = await self._respond(request)
            response.headers["X-Request-ID"] = request_id
            self._operations.count(request.state.results, time.perf_counter() - began)
            await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        """The answer, whatever happens. Raises `ClientDisconnect` when nobody is there to read it."""
        media_type = _JSON
        try:
            accepted = _negotiate(", ".join(request.headers.getlist("accept")))
            media_type = accepted.media_type
            return await self._answer(request, accepted)
        except Malformed as refusal:
            _note(request, errors.BadUserInput.code)
            told = [{"message": refusal.message, "extensions": {"code": errors.BadUserInput.code}}]
            status, headers = (refusal.status, refusal.headers) if isinstance(refusal, _Unacceptable) else (400, {})
            return _response({"errors": told}, media_type, status, headers)
        except errors.RequestError as refusal:
            _note(request, refusal.code, executing=isinstance(refusal, errors.Unavailable))
            return _refused(refusal, request, media_type)
        except ClientDisconnect:
            raise
        except Exception as failure:
            _log.error("graphql.request_failed", exc_info=failure)
            answer = failed(request.state.request_id)
            _note(request, answer.code, executing=True)
            return _response(answer.body(), media_type, 500)

    async def _answer(self, request: Request, accepted: "_Accepted") -> Response:
        if request.method not in {"GET", "POST"}:
            raise _Unacceptable("Use POST, or GET for queries.", status=405, headers={"Allow": "GET, POST"})
        async with db.deadline(self._operations.timeout):
            context = await self._context(request.headers.get("authorization", ""))
        limits = self._operations.limits
        budget = limits.batch if self._sends_batches(context) else limits.request
        parameters = await self._parameters(request, budget)
        prepared = self._operations.prepare(parameters, self._who(context))
        if isinstance(prepared, Answer):
            request.state.results = prepared.results
            return accepted.shown(prepared)
        kind = prepared.operation.kind
        if request.method == "GET" and kind == "mutation":
            raise _Unacceptable("Mutations are sent with POST.", status=405, headers={"Allow": "POST"})
        request.state.operation = prepared.operation
        if kind == "subscription":
            if not accepted.takes_events:
                raise _Unacceptable(
                    f"Ask for a subscription with `Accept: {_EVENTS}`, or over a WebSocket.", status=406
                )
            with ExitStack() as place:
                place.enter_context(self._streams.taken(self._who(context)))
                answers = self._operations.subscribe(prepared, context, request.state.request_id)
                return _EventStream(answers, place.pop_all())
        with structlog.contextvars.bound_contextvars(operation=prepared.operation.name, operation_kind=kind):
            answer = await self._operations.execute(prepared, context, request.state.request_id)
        request.state.results = answer.results
        return accepted.shown(answer)

    async def _parameters(self, request: Request, budget: Budget) -> Parameters:
        depth = self._operations.limits.json_depth
        if request.method == "GET":
            raw: object = _query_string(request.scope["query_string"], budget)
            refuse_deep_or_nul(raw, depth)
        else:
            _require_json(request)
            raw = loads(await _body(request, budget.body_bytes), "The request's body", budget, depth=depth)
        return checked(raw)


def _note(request: Request, code: str, *, executing: bool = False) -> None:
    """The request as a whole ended so; `executing`: with the root fields of its operation, if it got so far."""
    operation = getattr(request.state, "operation", None) if executing else None
    request.state.results = [
        (name, code) for name in (operation.roots.values() if operation else (metrics.NOT_EXECUTED,))
    ]


class _Accepted(NamedTuple):
    """What the client takes for an answer."""

    media_type: str
    takes_events: bool
    only_events: bool

    def shown(self, answer: Answer) -> Response:
        """The whole answer to one operation."""
        return _EventStream(_only(answer)) if self.only_events else _shown(answer, self.media_type)


def _negotiate(accept: str) -> _Accepted:
    """Unless GraphQL's own media type is asked for, an answer is plain JSON: there is no other for what is one
    answer, except to who takes events and nothing else."""
    accept = accept.lower()
    if _GRAPHQL_JSON not in accept and _EVENTS not in accept:
        return _Accepted(_JSON, takes_events=False, only_events=False)
    quality: dict[str, float] = {}
    for entry in accept.split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        weights = [parameter[2:] for parameter in parameters if parameter.startswith("q=")]
        quality[name] = float(weights[0]) if weights and _QUALITY.fullmatch(weights[0]) else float(not weights)
    graphql, json = quality.get(_GRAPHQL_JSON, 0.0), quality.get(_JSON, 0.0)
    takes_events = quality.get(_EVENTS, 0.0) > 0
    takes_json = any(quality.get(name, 0.0) > 0 for name in (_GRAPHQL_JSON, _JSON, "application/*", "*/*"))
    return _Accepted(
        _GRAPHQL_JSON if graphql and graphql >= json else _JSON,
        takes_events=takes_events,
        only_events=takes_events and not takes_json,
    )


def _require_json(request: Request) -> None:
    given = request.headers.getlist("content-type")
    media_type, *parameters = (part.strip().lower() for part in (given[0] if len(given) == 1 else "").split(";"))
    charsets = [parameter[8:].strip('"') for parameter in parameters if parameter.startswith("charset=")]
    if media_type != _JSON or any(charset != "utf-8" for charset in charsets):
        raise _Unacceptable("Send the request as `Content-Type: application/json` in UTF-8.", status=415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise _Unacceptable("Send the request's body without Content-Encoding.", status=415)


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


def _query_string(raw: bytes, budget: Budget) -> dict[str, object]:
    """The parameters of a GET. `variables` and `extensions` are JSON inside."""
    if len(raw) > budget.body_bytes:
        raise _too_large(budget.body_bytes)
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=50)
    except ValueError:
        raise Malformed("The query string is not valid, or not in UTF-8.") from None
    parameters: dict[str, object] = {}
    for name, value in pairs:
        if name in parameters:
            raise Malformed("A parameter of the query string is given twice.")
        parameters[name] = parsed(value, f"`{name}`", budget) if name in {"variables", "extensions"} else value
    return parameters


def _shown(answer: Answer, media_type: str) -> Response:
    if not answer.executed:
        return _response(answer.body(), media_type, 400 if media_type == _GRAPHQL_JSON else 200)
    if not answer.limited:
        return _response(answer.body(), media_type, 200)
    # Repeating the document makes sense when all of its fields would be let through.
    headers = _retry_after(max(answer.limited.values(), key=lambda refusal: refusal.retry_after))
    if answer.data is None or answer.limited.keys() < answer.data.keys():
        return _response(answer.body(), media_type, 200, headers)
    return _response({"errors": answer.errors}, media_type, errors.RateLimited.http_status, headers)


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
        dumps(body), status, {"Content-Type": f"{media_type}; charset=utf-8", **_HEADERS, **(headers or {})}
    )


async def _only(answer: Answer) -> AsyncGenerator[Answer, None]:
    yield answer


class _EventStream(Response):
    """Answers, one event each, and one that says that there are no more.

    A stream that ends without that one was cut off, and clients connect again: because the service stops, because the
    database went away, and, after an event that says so, because the token has expired and they have another.
    """

    def __init__(self, answers: AsyncGenerator[Answer, None], place: AbstractContextManager[Any] | None = None) -> None:
        super().__init__(
            None, 200, {"Content-Type": f"{_EVENTS}; charset=utf-8", "X-Accel-Buffering": "no", **_HEADERS}
        )
        del self.headers["content-length"]
        self._answers = answers
        self._place = place or nullcontext()
        self._turn = asyncio.Lock()
        self._is_over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            telling = asyncio.create_task(self._tell(send))
            leaving = asyncio.create_task(_left(receive))
            try:
                while not await _first_done({telling, leaving}, within=_KEEPALIVE_SECONDS):
                    await self._say(send, b":\n\n")
                if telling.done():
                    telling.result()
            except TimeoutError:
                pass  # the client does not read; the server ends what is left unfinished
            finally:
                telling.cancel()
                leaving.cancel()
                await asyncio.wait({telling, leaving})

    async def _tell(self, send: Send) -> None:
        await self._say(send, b":\n\n")  # headers travel with the first words
        async with aclosing(self._answers):
            try:
                async for answer in self._answers:
                    await self._say(send, _event(answer))
                await self._say(send, b"event: complete\ndata: \n\n")
            except errors.Unauthenticated as refusal:
                await self._say(send, _event(refused(refusal)))
            except errors.Unavailable:
                pass
        await self._say(send, b"", more=False)

    async def _say(self, send: Send, text: bytes, *, more: bool = True) -> None:
        """One thing at a time, and nothing after the last. Waits while the client does not read; TimeoutError when it
        goes on for too long."""
        async with asyncio.timeout(SLOWEST_SECONDS), self._turn:
            if not self._is_over:
                self._is_over = not more
                await send({"type": "http.response.body", "body": text, "more_body": more})


def _event(answer: Answer) -> bytes:
    return b"event: next\ndata: %b\n\n" % dumps(answer.body())


async def _first_done(tasks: set[asyncio.Task[None]], *, within: float) -> bool:
    done, _ = await asyncio.wait(tasks, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
