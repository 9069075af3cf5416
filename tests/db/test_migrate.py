"""Migrating: once, whoever starts together, and whole or not at all."""

import asyncio
import hashlib
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
from tortoise.exceptions import OperationalError

from app import db
from app.db import Database
from app.db.migrate import migrate, pending
from app.models import Staff

ALL = ["m0001_initial", "m0002_time", "m0003_webhooks", "m0004_enforcement", "m0005_webhook_trace", "m0006_restores"]

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


class Script:
    """Stands where a migration expects the database, and keeps the SQL instead."""

    def __init__(self) -> None:
        self.sql = ""

    async def execute_script(self, sql: str) -> None:
        self.sql += sql


LANDED = {
    ("m0001_initial", "sqlite"): "899f6529c922aef7b5c5a1fbeb7de86aa04805cd005b3d4dee8551cb5d53256a",
    ("m0001_initial", "postgres"): "4f2bdca6e095c2e727dfafb5babc4c1cfb1ca9bc4390caf8b1748a2f7d42ee78",
}
"""Digests of the rules that each migration makes. Installations have run them: whoever changes a line that makes them
has made two schemas of one name. A new migration is added here when it is released."""


@pytest.mark.parametrize(("name", "dialect"), LANDED)
async def test_what_a_landed_migration_makes_does_not_change(name: str, dialect: str) -> None:
    script = Script()
    module = import_module(f"app.db.migrations.{name}")
    await module._keep_the_rules(None, SimpleNamespace(DIALECT=dialect, client=script))
    assert hashlib.sha256(script.sql.encode()).hexdigest() == LANDED[name, dialect]


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
    assert sorted(output.decode().strip() for output, _ in outcomes) == ["", "", " ".join(ALL)]
    assert await pending(empty) == []


@pytest.mark.parametrize("table", ["idempotency_record", "rate_limit"], ids=["the first", "the newest"])
async def test_a_migration_that_fails_leaves_nothing(empty: Database, table: str) -> None:
    """Neither a table nor a record, of it and of those before it; when the cause is gone, they run."""
    await db.execute(f"CREATE TABLE {table} (id INTEGER)")
    with pytest.raises(OperationalError):
        await migrate(empty)
    if empty.dialect == "sqlite":
        tables = await db.fetch("SELECT name FROM sqlite_master")
    else:
        tables = await db.fetch("SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public'")
    assert tables == [{"name": table}]
    assert await pending(empty) == ALL
    await db.execute(f"DROP TABLE {table}")
    assert await migrate(empty) == ALL
