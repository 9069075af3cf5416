"""Migrating: once, whoever starts together, and whole or not at all."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tortoise.exceptions import OperationalError

from app import db
from app.db import Database
from app.db.migrate import migrate, pending
from app.models import Staff
from tests.postgres import PostgresServer

ALL = ["m0001_initial"]

MIGRATE = """
import asyncio, sys
from app.db import Database
from app.db.migrate import migrate

async def main(url):
    database = await Database.open(url)
    print(*await migrate(database))
    await database.close()

asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
async def empty(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    """A database without tables."""
    if request.param == "sqlite":
        url, drop = f"sqlite://{tmp_path}/empty.db", None
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        drop = await server.create_empty_database()
        url = server.url(drop)
    database = await Database.open(url)
    try:
        with database.bind():
            yield database
    finally:
        await database.close()
        if drop is not None:
            await server.drop_database(drop)


async def test_migrating_twice_does_it_once(empty: Database) -> None:
    assert await pending(empty) == ALL
    assert await migrate(empty) == ALL
    assert await pending(empty) == []
    assert await migrate(empty) == []
    assert await Staff.all().count() == 0


async def test_processes_that_start_together(empty: Database) -> None:
    """All succeed; one of them did the work."""
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", MIGRATE, empty.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    outcomes = [await process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outcomes
    assert sorted(output.decode().strip() for output, _ in outcomes) == ["", "", *ALL]
    assert await pending(empty) == []


async def test_a_migration_that_fails_leaves_nothing(empty: Database) -> None:
    """Neither a table nor a record of it; when the cause is gone, it runs."""
    await db.execute("CREATE TABLE idempotency_record (id INTEGER)")
    with pytest.raises(OperationalError):
        await migrate(empty)
    if empty.dialect == "sqlite":
        tables = await db.fetch("SELECT name FROM sqlite_master")
    else:
        tables = await db.fetch("SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public'")
    assert tables == [{"name": "idempotency_record"}]
    assert await pending(empty) == ALL
    await db.execute("DROP TABLE idempotency_record")
    assert await migrate(empty) == ALL
