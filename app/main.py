"""The service: its routes, what it opens on starting and closes on stopping.

Several services can live in one process: each has its own database, bound for every request by a middleware.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from email.utils import parseaddr
from pathlib import Path
from typing import Any
from uuid import uuid4

import structlog
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import db, errors, policy
from app.auth import Call, Installation
from app.db import Database
from app.db.migrate import pending
from app.delivery.email import mailer_from_settings
from app.graphql.context import Context
from app.graphql.http import GraphQLEndpoint
from app.graphql.schema import SCHEMA, printed
from app.settings import Settings
from app.tokens import DEVELOPMENT_ISSUER, Tokens
from app.web import graphiql, links, mailbox
from app.worker import Worker

_log = structlog.stdlib.get_logger(__name__)


def installation(settings: Settings) -> Installation:
    """What the settings say that calls share. Raises `policy.PolicyError` for an unusable policy file."""
    return Installation(
        policy=policy.load(settings.policy_file) if settings.policy_file else policy.load(),
        tokens=Tokens.from_settings(settings),
        mail_domain=parseaddr(settings.mail_from)[1].rpartition("@")[2],
        member_issuer=settings.oidc_issuer or DEVELOPMENT_ISSUER,
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
    return await Database.open(settings.database_url, pool_size=settings.database_pool_size)


async def check_plans(shared: Installation) -> None:
    """Refuse to serve accounts whose plan the policy does not know: every rule about them would be a guess."""
    rows = await db.fetch("SELECT DISTINCT plan_code FROM account WHERE status <> 'DELETED'")
    missing = shared.policy.missing_plans(row["plan_code"] for row in rows)
    if missing:
        raise policy.PolicyError(f"Accounts are on plans that the policy does not have: {', '.join(missing)}")


_UNLOGGED = frozenset({"/livez", "/readyz"})


class _Logged:
    """One line for each request: what, how it ended, how long it took, and about which account. No query string:
    an emailed link's token would be in it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _UNLOGGED:
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        answer: dict[str, Any] = {"status": None, "request_id": uuid4().hex}  # `/graphql` answers with its own
        structlog.contextvars.bind_contextvars(request_id=answer["request_id"])

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer["status"] = message["status"]
                answer["request_id"] = Headers(raw=message["headers"]).get("x-request-id", answer["request_id"])
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            operation = scope.get("state", {}).get("operation")
            _log.info(
                "http.request",
                method=scope["method"],
                path=scope["path"],
                operation=operation and operation.name,
                milliseconds=round((time.perf_counter() - began) * 1000, 1),
                **answer,
            )


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

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.database = await open_database(self.settings)
        try:
            with self.database.bind():
                if missing := await pending(self.database):
                    raise RuntimeError(f"The database needs migrations: {', '.join(missing)}. Run: sunset migrate")
                await check_plans(self.installation)
                async with self._working():
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

    async def context(self, request: Request) -> Context:
        """Who asks, by their token. What they may do is read with the operation."""
        header = request.headers.get("authorization", "")
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise errors.Unauthenticated("Send a token: `Authorization: Bearer ...`.")
        identity = await self.installation.tokens.verify(token.strip())
        return Context(Call(identity=identity, installation=self.installation))

    async def ready(self, _: Request) -> JSONResponse:
        """Whether requests can be served now: the database answers."""
        try:
            await db.now()
        except errors.Unavailable:
            return JSONResponse({"status": "unavailable", "database": "unreachable"}, 503, {"Retry-After": "5"})
        return JSONResponse({"status": "ready"})


async def _live(_: Request) -> JSONResponse:
    return JSONResponse({"status": "live"})


def create_app(settings: Settings, shared: Installation | None = None) -> Starlette:
    """The ASGI application for these settings. Opens nothing until its lifespan begins. `shared` is what
    `installation` makes of the settings, where the caller has made it already."""
    service = _Service(settings, shared or installation(settings))
    endpoint = GraphQLEndpoint(SCHEMA, context=service.context, gate=Context.require_caller)
    schema = printed()

    async def schema_file(_: Request) -> PlainTextResponse:
        return PlainTextResponse(schema, media_type="text/plain; charset=utf-8")

    routes: list[BaseRoute] = [
        Route("/graphql", endpoint),
        Route("/schema.graphql", schema_file),
        Route("/livez", _live),
        Route("/readyz", service.ready),
        *links.routes(service.installation),
        Mount("/static", StaticFiles(directory=Path(__file__).parent / "web" / "static")),
    ]
    if settings.graphiql:
        routes += graphiql.routes()
    if settings.mailbox:
        routes += mailbox.routes(settings.data_dir / "mailbox")
    app = Starlette(routes=routes, lifespan=service.lifespan)
    app.add_middleware(_Bound, service=service)
    app.add_middleware(_Logged)
    return app
