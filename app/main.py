"""The service: its routes, what it opens on starting and closes on stopping.

Several services can live in one process: each has its own database, bound for every request by a middleware.
"""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from email.utils import parseaddr
from operator import attrgetter
from pathlib import Path
from typing import Any
from uuid import uuid4

import structlog
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import alarms, db, errors, lifecycle, metrics, policy, restores, tracing
from app.auth import Call, Installation, KnownCallers
from app.db import Database
from app.db.migrate import pending
from app.delivery.email import mailer_from_settings
from app.graphql.context import Context
from app.graphql.execution import Operations
from app.graphql.http import GraphQLEndpoint
from app.graphql.places import Places
from app.graphql.refusals import HANDLERS
from app.graphql.schema import SCHEMA, printed
from app.graphql.websocket import WebSocketEndpoint
from app.observation import observe
from app.receivers import Receivers
from app.settings import Settings, SettingsError
from app.tokens import DEVELOPMENT_ISSUER, Tokens
from app.web import gate, graphiql, links, mailbox
from app.web.local import LocalPages, refuse_other_names
from app.worker import Worker

_log = structlog.stdlib.get_logger(__name__)


def installation(settings: Settings) -> Installation:
    """What the settings say that calls share. Raises `policy.PolicyError` for an unusable policy file."""
    return Installation(
        policy=policy.load(settings.policy_file) if settings.policy_file else policy.load(),
        tokens=Tokens.from_settings(settings),
        mail_domain=parseaddr(settings.mail_from)[1].rpartition("@")[2],
        member_issuer=settings.oidc_issuer or DEVELOPMENT_ISSUER,
        rate_limit_caller=settings.rate_limit_caller,
        rate_limit_account=settings.rate_limit_account,
        request_timeout=timedelta(seconds=settings.request_timeout),
        data_dir=settings.data_dir,
        receivers=Receivers(settings.webhook_allow),
    )


def worker(settings: Settings, shared: Installation) -> Worker:
    """A worker as the settings describe it."""
    return Worker(
        shared,
        mailer_from_settings(settings),
        sender=settings.mail_from,
        link_base=settings.link_url or f"{settings.public_url.rstrip('/')}/links",
        concurrency=settings.worker_concurrency,
        grace=timedelta(seconds=settings.grace_seconds),
    )


async def open_database(settings: Settings) -> Database:
    return await Database.open(
        settings.database_url,
        pool_size=settings.database_pool_size,
        development_clock=settings.clock == "development",
    )


async def check_clock(settings: Settings) -> None:
    """Refuse a database whose development clock was moved ahead, where the clock is to be the database's own: its
    accounts were canceled at times that have not come yet. In production, see to it that nobody moves it by mistake."""
    ahead = await db.clock_offset()
    if ahead and settings.clock == "system":
        raise SettingsError(
            [f"SUNSET_CLOCK is system, and this database's was moved {ahead} ahead: begin with a new database."]
        )
    if settings.environment == "production":
        await db.fix_clock()


async def check_plans(shared: Installation) -> None:
    """Refuse to serve accounts whose plan the policy does not know: every rule about them would be a guess."""
    rows = await db.fetch("SELECT DISTINCT plan_code FROM account WHERE status <> 'DELETED'")
    missing = shared.policy.missing_plans(row["plan_code"] for row in rows)
    if missing:
        raise policy.PolicyError(f"Accounts are on plans that the policy does not have: {', '.join(missing)}")


_READY_WITHIN = timedelta(seconds=2)
_DEEPLY_READY_WITHIN = timedelta(seconds=5)
_PROBES = frozenset({"/livez", "/readyz", "/metrics"})
"""Asked every few seconds: neither logged nor traced."""

_REFUSALS = frozenset(handler.error_type.__name__ for handler in HANDLERS)


class _Logged:
    """One line for each request: what, how it ended, how long it took, and about which account. No query string:
    an emailed link's token would be in it. None for the gate, which is asked all the time, by the host's own names of
    its accounts; it is counted instead."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in _PROBES or scope["path"].startswith("/gate/"):
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        answer: dict[str, Any] = {"status": None, "request_id": uuid4().hex}  # `/graphql` answers with its own
        structlog.contextvars.bind_contextvars(request_id=answer["request_id"])

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer["status"] = message["status"]
                answer["request_id"] = Headers(raw=message["headers"]).get("x-request-id", answer["request_id"])
            elif message["type"] == "websocket.close":
                answer["status"] = message["code"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            operation = scope.get("state", {}).get("operation")
            _log.info(
                "http.request" if scope["type"] == "http" else "websocket.closed",
                method=scope.get("method"),
                path=scope["path"],
                operation=operation and operation.name,
                milliseconds=round((time.perf_counter() - began) * 1000, 1),
                **answer,
            )


class _Traced:
    """One span for each request, where traces are wanted: continues the client's trace, if it sends one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not tracing.active() or scope["type"] != "http" or scope["path"] in _PROBES:
            await self._app(scope, receive, send)
            return
        with tracing.request(scope["method"], Headers(scope=scope).get("traceparent")) as span:

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.answered(message["status"])
                await send(message)

            try:
                await self._app(scope, receive, noted)
            finally:
                if isinstance(route := scope.get("route"), Route | Mount):
                    span.routed(route.path)
                if operation := scope.get("state", {}).get("operation"):
                    span.asked(operation.kind, set(operation.roots.values()))


class _Bound:
    """Binds the service's database to each request."""

    def __init__(self, app: ASGIApp, service: "_Service") -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._service.database is None:
            await self._app(scope, receive, send)
            return
        with self._service.database.bind():
            await self._app(scope, receive, send)


class _Service:
    """What one application holds while it runs."""

    def __init__(self, settings: Settings, shared: Installation) -> None:
        self.settings = settings
        self.installation = shared
        self.database: Database | None = None
        self._known_callers = KnownCallers()

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.database = await open_database(self.settings)
        try:
            with self.database.bind():
                if missing := await pending(self.database):
                    raise RuntimeError(f"The database needs migrations: {', '.join(missing)}. Run: sunset migrate")
                await check_clock(self.settings)
                await check_plans(self.installation)
                async with (
                    tracing.exporting(self.settings.otlp_endpoint),
                    restores.watching(self.installation),
                    self.installation.changes.listening(),
                    self._working(),
                ):
                    yield
        finally:
            await self.installation.tokens.close()
            await self.database.close()

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[None]:
        if not self.settings.worker:
            yield
            return
        own = worker(self.settings, self.installation)
        task = asyncio.create_task(own.run())
        try:
            yield
        finally:
            own.stop()
            await task

    async def context(self, authorization: str) -> Context:
        """Who asks, by the token in such a header: somebody known here. What they may do is read with the operation."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise errors.Unauthenticated("Send a token: `Authorization: Bearer ...`.")

        async def authenticate() -> Call:
            await self.installation.tokens.follow()
            identity = await self.installation.tokens.verify(token.strip())
            return Call(identity=identity, installation=self.installation)

        call = await authenticate()
        scopes = await self._known_callers.require(call)
        return Context(call, authenticate, sends_batches=lifecycle.Scope.PROVISION in scopes)

    async def ready(self, request: Request) -> Response:
        """Whether requests can be served now: the database answers. `?deep`, for who may look inside, says too what
        somebody should be called for, and refuses when a deletion is overdue."""
        deep = "deep" in request.query_params
        if deep and (refused := refuse_stranger(self.settings, request)):
            return refused
        try:
            async with db.deadline(_DEEPLY_READY_WITHIN if deep else _READY_WITHIN):
                if deep:
                    return await self._ready_deep()
                await db.now()
        except errors.Unavailable:
            return JSONResponse({"status": "unavailable", "database": "unreachable"}, 503, {"Retry-After": "5"})
        return JSONResponse({"status": "ready"})

    async def _ready_deep(self) -> Response:
        assert self.database is not None
        if missing := await pending(self.database):
            return JSONResponse({"status": "unavailable", "database": "not migrated", "migrations": missing}, 503)
        found = await alarms.current(self.installation)
        told = [
            {"name": one.name, "message": one.message, "since": one.since and one.since.isoformat()} for one in found
        ]
        if any(one.name is alarms.Name.DELETIONS_OVERDUE for one in found):
            return JSONResponse({"status": "alarm", "alarms": told}, 503)
        return JSONResponse({"status": "ready", "alarms": told})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus: what this process did, and how the installation is doing."""
        if refused := refuse_stranger(self.settings, request):
            return refused
        return Response(metrics.rendered(await observe(self.installation)), media_type=metrics.CONTENT_TYPE)

    def probes(self) -> list[BaseRoute]:
        return [
            Route("/livez", _live),
            Route("/readyz", self.ready),
            Route("/metrics", self.metrics),
        ]


def refuse_stranger(settings: Settings, request: Request) -> Response | None:
    """The answer to who may not look inside; None for who may. That is whoever has SUNSET_METRICS_TOKEN; without one,
    nobody in production, and in development everybody, under the names of this machine alone."""
    if not settings.metrics_token:
        if settings.environment == "development":
            return refuse_other_names(request.headers)
        return PlainTextResponse("Not Found", 404)
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), settings.metrics_token.encode()):
        return None
    return PlainTextResponse("Unauthorized", 401, {"WWW-Authenticate": "Bearer"})


async def _live(_: Request) -> JSONResponse:
    return JSONResponse({"status": "live"})


async def _left(_: Request, __: Exception) -> Response:
    """For the log alone: whoever sent half a body, and hung up or took too long, reads no answer of the application's,
    and it is no error of ours."""
    return Response(status_code=499)


def _application(routes: list[BaseRoute], service: _Service, **options: Any) -> Starlette:
    app = Starlette(routes=routes, exception_handlers={ClientDisconnect: _left}, **options)
    # Starlette would lead to an address made of the request's Host, over http, with the token that was in the query.
    app.router.redirect_slashes = False
    app.add_middleware(_Bound, service=service)
    if service.settings.environment == "development":
        app.add_middleware(LocalPages, paths=("/graphiql", "/mailbox"))
    app.add_middleware(_Logged)
    return app


def create_app(settings: Settings, shared: Installation | None = None) -> Starlette:
    """The ASGI application for these settings. Opens nothing until its lifespan begins. `shared` is what
    `installation` makes of the settings, where the caller has made it already."""
    service = _Service(settings, shared or installation(settings))
    operations = Operations(
        SCHEMA,
        gate=Context.require_caller,
        refusals=_REFUSALS,
        new_documents=settings.rate_limit_documents,
        timeout=service.installation.request_timeout,
    )
    streams = Places(settings.streams, most_each=max(settings.streams // 100, 1))
    who = attrgetter("caller")
    graphql = GraphQLEndpoint(
        operations, context=service.context, who=who, sends_batches=attrgetter("sends_batches"), streams=streams
    )
    websocket = WebSocketEndpoint(
        operations, context=service.context, who=who, lifetime=attrgetter("lifetime"), streams=streams
    )
    schema = printed()

    async def schema_file(_: Request) -> PlainTextResponse:
        return PlainTextResponse(schema, media_type="text/plain; charset=utf-8")

    routes: list[BaseRoute] = [
        Route("/graphql", graphql),
        WebSocketRoute("/graphql", websocket),
        Route("/schema.graphql", schema_file),
        *service.probes(),
        *links.routes(service.installation, settings.public_url),
        *gate.routes(service.installation),
        Mount("/static", StaticFiles(directory=Path(__file__).parent / "web" / "static")),
    ]
    if settings.graphiql:
        routes += graphiql.routes()
    if settings.mailbox:
        routes += mailbox.routes(settings.data_dir / "mailbox")
    app = _application(routes, service, lifespan=service.lifespan)
    app.add_middleware(_Traced)
    return app


def create_worker_app(settings: Settings, shared: Installation, database: Database) -> Starlette:
    """What `sunset worker` serves while it runs on that database: the probes, and nothing else."""
    service = _Service(settings, shared)
    service.database = database
    return _application(service.probes(), service)
