"""Bring a database to the newest schema: Tortoise's migrations, one runner at a time, all or nothing.

The migrations are hand-written (`app/db/migrations`), because on SQLite Tortoise's table-remaking operations drop
indexes, constraints and, through cascades, rows. Around Tortoise's executor this module adds what it lacks: a lock,
so that processes that start together do not collide, and one transaction around schema and record, so that a crash
leaves neither a half-made schema nor a schema that is not recorded.

A migration is therefore written for a transaction: no CREATE INDEX CONCURRENTLY, no `atomic = False`.
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from tortoise.connection import get_connection
from tortoise.migrations.executor import MigrationExecutor

from app import db
from app.db import Database, sqlite_path
from app.errors import Unavailable

_LOCK_WAIT_SECONDS = 300.0
_LOCK_POLL_SECONDS = 0.05
_STATEMENT_SECONDS = 900.0
_ADVISORY_LOCK = 0x73756E736574  # "sunset"
_APPS: dict[str, dict[str, Any]] = {"models": {"models": ["app.models"], "migrations": "app.db.migrations"}}


async def migrate(database: Database) -> list[str]:
    """Apply what is pending and return the names, oldest first. Waits for another runner, then finds its work done.

    Runs on connections of its own, with time-outs that suit a large table. A table that others keep locked ends it
    with `Unavailable`, and nothing is changed.
    """
    own = await Database.open(database.url, pool_size=2, statement_seconds=_STATEMENT_SECONDS)
    try:
        with own.bind():
            async with _advisory_lock() if own.dialect == "postgresql" else _file_lock(sqlite_path(own.url)):
                names = await _pending()
                if names:
                    async with db.transaction():
                        executor = _executor()
                        # It reads its record before it makes the table for it, and an error ends the transaction.
                        await executor.recorder.ensure_schema(executor._schema_editor(atomic=False))
                        await executor.migrate(direction="forward")
                return names
    finally:
        await own.close()


async def pending(database: Database) -> list[str]:
    """The names of the migrations that this version has and the database has not, oldest first."""
    with database.bind():
        return await _pending()


async def unknown(database: Database) -> list[str]:
    """The names of the migrations that the database has and this version has not, oldest first: a newer version has
    been here."""
    with database.bind():
        applied, known = await _applied(), _known()
    return sorted(applied - known)


async def _pending() -> list[str]:
    return sorted(_known() - await _applied())


def _known() -> set[str]:
    loader = _executor().loader
    loader.load_disk()
    return {key.name for key in loader.disk_migrations}


async def _applied() -> set[str]:
    # Tortoise's own reader takes every error for an empty record; this one asks for the table and lets errors out.
    if db.dialect() == "sqlite":
        recorded = "SELECT 1 AS found FROM sqlite_master WHERE type = 'table' AND name = 'tortoise_migrations'"
    else:
        recorded = "SELECT 1 AS found WHERE to_regclass('tortoise_migrations') IS NOT NULL"
    if not await db.fetch(recorded):
        return set()
    return {row["name"] for row in await db.fetch("SELECT name FROM tortoise_migrations")}


def _executor() -> MigrationExecutor:
    dialect = db.dialect()
    apps = {label: {**app, "default_connection": dialect} for label, app in _APPS.items()}
    return MigrationExecutor(get_connection(dialect), apps)


@asynccontextmanager
async def _advisory_lock() -> AsyncIterator[None]:
    client: Any = get_connection("postgresql")
    connection = await client.connect()
    try:

        async def taken() -> bool:
            held: bool = await connection.fetchval("SELECT pg_try_advisory_lock($1)", _ADVISORY_LOCK)
            return held

        await _wait_until(taken)
        yield
    finally:
        await connection.close()  # which gives the lock back


@asynccontextmanager
async def _file_lock(path: str) -> AsyncIterator[None]:
    descriptor = os.open(f"{path}.migrate.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:

        async def taken() -> bool:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        await _wait_until(taken)
        yield
    finally:
        os.close(descriptor)  # which gives the lock back, as the end of the process does


async def _wait_until(taken: Callable[[], Any]) -> None:
    try:
        async with asyncio.timeout(_LOCK_WAIT_SECONDS):
            while not await taken():  # noqa: ASYNC110  another process has it: there is nothing to wait on
                await asyncio.sleep(_LOCK_POLL_SECONDS)
    except TimeoutError:
        raise Unavailable("Another process has been migrating the database for too long.") from None
