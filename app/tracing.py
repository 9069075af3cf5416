"""Traces, where the operator wants them: a request, its SQL, and the emails and webhooks it leads to are one trace.

    async with tracing.exporting(settings.otlp_endpoint):
        ...

Until then nothing of OpenTelemetry is imported, and everything here costs a comparison. Spans are sent in the
background; an endpoint that is away, slow or broken loses spans and delays nobody.

A span says what was done and how it ended: names of the schema, routes, SQL with placeholders, names of exceptions.
Never a value: no variable, argument, query string, header or message of an exception. What a client writes into its
own `tracestate` is not passed on.

Knows neither the schema nor the rows nor the engines. Attributes are named as OpenTelemetry's semantic conventions
have them.
"""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import uuid4

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanKind, Tracer

_FLUSH_SECONDS: Final = 3.0
"""How long the end of the process waits for the last spans to be sent."""
_EXPORT_SECONDS: Final = 10.0
_MAX_ATTRIBUTE_CHARACTERS: Final = 4_096

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})

_tracer: "Tracer | None" = None


@asynccontextmanager
async def exporting(endpoint: str) -> AsyncIterator[None]:
    """Within the block this process traces, and sends the spans to the OTLP receiver at `endpoint`; nothing happens
    where that is empty. The last spans are sent when the block ends, which takes a few seconds at most."""
    global _tracer  # noqa: PLW0603  one process, one way to trace
    if not endpoint:
        yield
        return
    provider = _provider(endpoint)
    before, _tracer = _tracer, provider.get_tracer("sunset", version("sunset"))
    try:
        yield
    finally:
        _tracer = before
        await _shut_down(provider)


def _provider(endpoint: str) -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(
        resource=Resource.create(
            {"service.name": "sunset", "service.version": version("sunset"), "service.instance.id": str(uuid4())}
        ),
        span_limits=SpanLimits(max_attribute_length=_MAX_ATTRIBUTE_CHARACTERS),
        shutdown_on_exit=False,  # it would wait for an endpoint that is away
    )
    exporter = OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces", timeout=_EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


async def _shut_down(provider: "TracerProvider") -> None:
    """Send what is left, and give up after a while: the thread that still tries ends with the process."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def shut_down() -> None:
        try:
            provider.shutdown()
        finally:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(done.set)

    threading.Thread(target=shut_down, name="sunset-last-spans", daemon=True).start()
    with suppress(TimeoutError):
        await asyncio.wait_for(done.wait(), _FLUSH_SECONDS)


def active() -> bool:
    return _tracer is not None


def traceparent() -> str | None:
    """The running span, as W3C Trace Context writes it; None where there is none."""
    if _tracer is None:
        return None
    from opentelemetry.trace import get_current_span

    here = get_current_span().get_span_context()
    if not here.is_valid:
        return None
    return f"00-{here.trace_id:032x}-{here.span_id:016x}-{here.trace_flags:02x}"


# ------------------------------------------------------------------------------------------------------- requests


class Request:
    """The span of a request. Until it is told what was asked, it is named after the method alone."""

    def __init__(self, method: str, span: "Span") -> None:
        self._method = method
        self._span = span

    def routed(self, route: str) -> None:
        """To the route of this pattern."""
        self._span.update_name(f"{self._method} {route}")
        self._span.set_attribute("http.route", route)

    def asked(self, kind: str, fields: Collection[str]) -> None:
        """A GraphQL operation, by its kind and the schema's names of its root fields. It is named after the field if
        there is one alone: how a client combines them, like its own name for it, is no name of ours."""
        self._span.update_name(f"{kind} {next(iter(fields))}" if len(fields) == 1 else kind)
        self._span.set_attribute("graphql.operation.type", kind)

    def answered(self, status: int) -> None:
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            _fail(self._span, str(status))


@contextmanager
def request(method: str, parent: str | None) -> Iterator[Request]:
    """The block answers a request; `parent` is its `traceparent`, if it has one. To be used where `active`."""
    from opentelemetry.trace import SpanKind

    method = method if method in _METHODS else "_OTHER"
    attributes = {"http.request.method": method}
    with _span(method, SpanKind.SERVER, attributes, _continuing(parent)) as span:
        yield Request(method, span)


# ------------------------------------------------------------------------------------------------------------ SQL


def statement(system: str, sql: str) -> AbstractContextManager[Any]:
    """The block has the database of that kind execute `sql`. Nothing is traced outside of a trace: workers ask
    whether something is due all the time."""
    if _tracer is None:
        return nullcontext()
    from opentelemetry.trace import SpanKind, get_current_span

    if not get_current_span().is_recording():
        return nullcontext()
    summary = _summary(sql)
    verb, _, table = summary.partition(" ")
    attributes = {
        "db.system.name": system,
        "db.query.text": sql,
        "db.query.summary": summary,
        "db.operation.name": verb,
    }
    if table:
        attributes["db.collection.name"] = table
    return _span(summary, SpanKind.CLIENT, attributes)


@lru_cache(maxsize=2048)
def _summary(sql: str) -> str:
    """What it does and to which table, as in `SELECT account`."""
    verb = (sql.split(maxsplit=1) or [""])[0].upper()
    table = re.search(r'\b(?:FROM|INTO|UPDATE)\s+"?([a-z_]+)"?', sql)
    return f"{verb} {table[1]}" if table else verb


class Statements:
    """Stands in for a driver's connection: each statement is a span, everything else is the connection's own."""

    _TRACED: Final = frozenset(
        {"fetch", "fetchrow", "execute", "executemany", "execute_fetchall", "execute_insert", "count", "script"}
    )

    def __init__(self, connection: Any, system: str) -> None:
        self._connection = connection
        self._system = system

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._connection, name)
        return self._traced(found) if name in self._TRACED else found

    def _traced(self, run: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def traced(sql: str, *args: Any) -> Any:
            with statement(self._system, sql):
                return await run(sql, *args)

        return traced


# ------------------------------------------------------------------------------------------------------ deliveries


@contextmanager
def delivery(
    what: str, *, channel: Literal["outbox", "webhooks"], message_id: str, attempt: int, parent: str | None
) -> Iterator[None]:
    """The block tries to deliver a message, which was promised in the trace of `parent`. `what`: its template, or the
    type of the event that it tells of."""
    if _tracer is None:
        yield
        return
    from opentelemetry.trace import SpanKind

    attributes: dict[str, str | int] = {
        "messaging.system": "sunset",
        "messaging.destination.name": channel,
        "messaging.operation.name": "deliver",
        "messaging.operation.type": "process",
        "messaging.message.id": message_id,
        "sunset.template" if channel == "outbox" else "sunset.event": what,
        "sunset.attempt": attempt,
    }
    with _span(f"deliver {what}", SpanKind.CONSUMER, attributes, _continuing(parent)):
        yield


def failed(kind: str) -> None:
    """What the running span is about did not succeed."""
    if _tracer is None:
        return
    from opentelemetry.trace import get_current_span

    _fail(get_current_span(), kind)


# ----------------------------------------------------------------------------------------------------------- spans


@contextmanager
def _span(
    name: str, kind: "SpanKind", attributes: Mapping[str, str | int], context: "Context | None" = None
) -> Iterator["Span"]:
    assert _tracer is not None
    with _tracer.start_as_current_span(
        name,
        context=context,
        kind=kind,
        attributes=attributes,
        record_exception=False,  # its message may quote values
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except BaseException as error:
            _fail(span, type(error).__name__)
            raise


def _fail(span: "Span", kind: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)


def _continuing(parent: str | None) -> "Context":
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {}, Context())
