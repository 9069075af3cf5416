"""A populated database goes to a newer schema, and loses nothing on the way."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import app.db.migrations
from app import db
from app.db import Database, IntegrityError
from app.db.migrate import migrate, pending
from tests.db.test_schema import WORLD

NEXT = """
from tortoise.migrations import Migration as TortoiseMigration
from tortoise.migrations import RunPython


async def _grow(_apps, schema_editor):
    await schema_editor.client.execute_script(
        "ALTER TABLE account ADD COLUMN probe INTEGER; CREATE INDEX account_probe ON account (probe, id);"
    )


class Migration(TortoiseMigration):
    dependencies = [("models", "m0001_initial")]
    operations = [RunPython(_grow)]
"""

OBJECTS = {
    "sqlite": "SELECT type || ' ' || name AS name FROM sqlite_master",
    "postgresql": """
        SELECT 'index ' || indexname AS name FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL SELECT 'constraint ' || conrelid::regclass || ' ' || conname FROM pg_constraint
            WHERE connamespace = 'public'::regnamespace
        UNION ALL SELECT 'trigger ' || tgrelid::regclass || ' ' || tgname FROM pg_trigger WHERE NOT tgisinternal
    """,
}
TABLES = (
    "account cancellation_request feedback idempotency_record member offer outbox restart_request "
    "service staff transition"
)


async def objects() -> set[str]:
    return {row["name"] for row in await db.fetch(OBJECTS[db.dialect()])}


async def rows() -> Counter[Any]:
    found: Counter[Any] = Counter()
    for table in TABLES.split():
        for row in await db.fetch(f"SELECT * FROM {table}"):
            row.pop("probe", None)
            found[table, tuple((name, str(value)) for name, value in row.items())] += 1
    return found


async def test_no_row_index_constraint_or_trigger_is_lost(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with db.transaction():
        for statement in WORLD:
            await db.execute(statement)
    (tmp_path / "m0002_probe.py").write_text(NEXT)
    monkeypatch.setattr(app.db.migrations, "__path__", [*app.db.migrations.__path__, str(tmp_path)])
    monkeypatch.setattr("tortoise.migrations.loader.reload", lambda module: module)  # it would forget the path again
    had, held = await rows(), await objects()
    assert {table for table, _ in had} == set(TABLES.split())
    try:
        assert await pending(database) == ["m0002_probe"]
        assert await migrate(database) == ["m0002_probe"]
        assert await pending(database) == []
    finally:
        sys.modules.pop("app.db.migrations.m0002_probe", None)
    assert await rows() == had
    assert await objects() > held
    with pytest.raises(IntegrityError):
        await db.execute("UPDATE account SET deletion_scheduled_for = created_at WHERE status = 'ACTIVE'")
