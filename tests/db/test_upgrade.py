"""A populated database goes to a newer schema, loses nothing on the way, and the application works on it."""

import sys
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tortoise.migrations.executor import MigrationTarget

import app.db.migrations
from app import db, demo
from app.db import Database, IntegrityError
from app.db.migrate import _executor, migrate, pending
from app.tokens import DEVELOPMENT_ISSUER
from tests.cast import ALICE, BILLING, CAROL, Stage, stage
from tests.db.test_migrate import ALL
from tests.db.test_schema import (
    CANCELED,
    CONFIRMED,
    DELETED,
    EFFECTIVE_COLUMNS,
    HELD,
    REQUEST,
    SCHEDULED,
    WORLD,
    WORLD_OF_THE_FIRST_MIGRATION,
    account,
    change_account,
    key,
    member,
    request,
    staff,
)

NEXT = """
from tortoise.migrations import Migration as TortoiseMigration
from tortoise.migrations import RunPython


async def _grow(_apps, schema_editor):
    await schema_editor.client.execute_script(
        "ALTER TABLE account ADD COLUMN probe INTEGER; CREATE INDEX account_probe ON account (probe, id);"
    )


class Migration(TortoiseMigration):
    dependencies = [("models", "m0006_restores")]
    operations = [RunPython(_grow)]
"""

OBJECTS = {
    "sqlite": "SELECT type || ' ' || name AS name, sql AS definition FROM sqlite_master "
    "WHERE tbl_name <> 'tortoise_migrations'",
    "postgresql": """
        SELECT 'index ' || indexname AS name, indexdef AS definition FROM pg_indexes
            WHERE schemaname = 'public' AND tablename <> 'tortoise_migrations'
        UNION ALL SELECT 'constraint ' || conrelid::regclass || ' ' || conname, pg_get_constraintdef(oid)
            FROM pg_constraint
            WHERE connamespace = 'public'::regnamespace AND conrelid <> 'tortoise_migrations'::regclass
        UNION ALL SELECT 'trigger ' || tgrelid::regclass || ' ' || tgname, pg_get_triggerdef(oid)
            FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL SELECT 'function ' || proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    """,
}
TABLES = [
    *("account", "cancellation_request", "feedback", "idempotency_record", "member", "offer", "outbox"),
    *("restart_request", "service", "staff", "transition"),
]
NEW_TABLES = [
    *("clock_offset", "deletion_breaker", "deletion_halt", "deletion_hold", "deletion_reminder", "deletion_step"),
    *("enforcement", "installation", "rate_limit", "tombstone", "webhook_delivery", "webhook_endpoint"),
]

REPLACED_BY_TIME = {
    "sqlite": {
        "trigger transition_type_insert",
        "trigger transition_type_update",
        "trigger outbox_settled_once_insert",
        "trigger outbox_settled_once_update",
        "index outbox_due",
        # The statements by which SQLite remembers the tables that have grown.
        "table account",
        "table cancellation_request",
        "table outbox",
    },
    "postgresql": {
        "constraint transition transition_type",
        "constraint outbox outbox_settled_once",
        "index outbox_due",
    },
}
"""What m0002_time puts something else in the place of, under the same name."""

REMINDED, WARNED = key(101), key(102)
"""Canceled 10 and 35 days before the upgrade, so that reminders are still to come."""


async def objects() -> dict[str, str]:
    return {row["name"]: row["definition"] for row in await db.fetch(OBJECTS[db.dialect()])}


async def rows(tables: list[str], columns: dict[str, list[str]] | None = None) -> Counter[Any]:
    """Every row of the tables; of those columns, where they are named."""
    found: Counter[Any] = Counter()
    for table in tables:
        for row in await db.fetch(f"SELECT * FROM {table}"):
            kept = columns[table] if columns else list(row)
            found[table, tuple((name, str(row[name])) for name in kept)] += 1
    return found


async def columns_of(tables: list[str]) -> dict[str, list[str]]:
    return {table: list((await db.fetch(f"SELECT * FROM {table} LIMIT 1"))[0]) for table in tables}


def at(moment: datetime) -> str:
    return f"'{moment:%Y-%m-%d %H:%M:%S.000000}+00:00'"


async def canceled(id_: str, name: str, moment: datetime, who: str) -> None:
    """An account as the first version left it when it was canceled, with one member who manages its billing."""
    number = int(id_[-5:-1])
    end = at(moment + timedelta(days=60))
    for statement in (
        account(id=id_, reference=f"'{name.lower()}'", name=f"'{name}'", epoch=1),
        change_account(
            f"status = 'CANCELED', canceled_at = {at(moment)}, restartable_until = {end}, "
            f"deletion_scheduled_for = {end}",
            id_,
        ),
        member(
            id=key(number + 10),
            account_id=id_,
            issuer=f"'{DEVELOPMENT_ISSUER}'",
            subject=f"'{demo.member_subject(who)}'",
            email=f"'{who}'",
        ),
        request(
            id=key(number + 20),
            account_id=id_,
            **EFFECTIVE_COLUMNS
            | dict.fromkeys(("requested_at", "confirmed_at", "effective_at", "took_effect_at"), at(moment)),
        ),
    ):
        await db.execute(statement)


@pytest.fixture
async def first(empty: Database) -> Database:
    """A database as the first migration made it, in use for some time."""
    async with db.transaction():
        executor = _executor()
        await executor.recorder.ensure_schema(executor._schema_editor(atomic=False))
        await executor.migrate([MigrationTarget("models", "m0001_initial")], direction="forward")
    async with db.transaction():
        for statement in WORLD_OF_THE_FIRST_MIGRATION:
            await db.execute(statement)
        now = await db.database_now()
        await canceled(REMINDED, "Initech", now - timedelta(days=10), ALICE)
        await canceled(WARNED, "Hooli", now - timedelta(days=35), CAROL)
        await db.execute(
            staff(
                id=key(103),
                issuer=f"'{DEVELOPMENT_ISSUER}'",
                subject=f"'{demo.staff_subject(BILLING)}'",
                email=f"'{BILLING}'",
                role="'BILLING_TEAM'",
            )
        )
    return empty


async def test_from_the_first_migration_nothing_is_lost(first: Database) -> None:
    """Neither a row nor an index, constraint, trigger or function; what is replaced is replaced, nothing else."""
    columns = await columns_of(TABLES)
    had, held = await rows(TABLES), await objects()
    assert {table for table, _ in had} == set(TABLES)

    assert await migrate(first) == ALL[1:]
    assert await pending(first) == []

    assert await rows(TABLES, columns) == had
    has = await objects()
    assert held.keys() <= has.keys()
    assert {name for name in held if has[name] != held[name]} == REPLACED_BY_TIME[first.dialect]
    for table, condition in (("account", "deletion_scheduled_for = created_at"), ("outbox", "attempts = -1")):
        with pytest.raises(IntegrityError):
            await db.execute(f"UPDATE {table} SET {condition}")


async def test_what_is_new_has_the_right_values(first: Database) -> None:
    """Reminders are looked for at once where an account waits for its deletion, and nowhere else."""
    columns = await columns_of(TABLES)
    await migrate(first)
    waiting = await db.fetch("SELECT id FROM account WHERE status = 'CANCELED' AND deletion_scheduled_for IS NOT NULL")
    assert {f"'{row['id']}'" for row in waiting} == {CANCELED, REMINDED, WARNED}
    for row in await db.fetch("SELECT status, canceled_at, deletion_held_at, reminder_due_at FROM account"):
        waits = row["status"] == "CANCELED" and row["deletion_held_at"] is None
        assert row["reminder_due_at"] == (row["canceled_at"] if waits else None)
    for table in TABLES:
        for row in await db.fetch(f"SELECT * FROM {table}"):
            new = {name: value for name, value in row.items() if name not in columns[table]}
            new.pop("reminder_due_at", None)
            assert set(new.values()) <= {None}, (table, new)
    assert await rows(NEW_TABLES) == Counter(
        [("clock_offset", (("id", "1"), ("offset_seconds", "0"), ("fixed_at", "None")))]
    )


async def test_the_application_goes_on_with_what_the_first_version_began(first: Database, tmp_path: Path) -> None:
    """Reminders that are still to come are sent, deletions happen, and what was due meanwhile is made up for."""
    await migrate(first)
    async with stage(first, tmp_path) as house:
        # 10 and 35 days of 60 are over: of the second one's reminders, that of 30 days is late and makes sense.
        assert await new_letters(house) == {(CAROL, "The data of Hooli will be deleted")}
        assert await reminded(WARNED) == [30]
        assert await status(REQUEST, "cancellation_request") == "EXPIRED"
        assert await status(CONFIRMED, "cancellation_request") == "EFFECTIVE"
        assert await status(SCHEDULED) == "CANCELED"
        assert await status(CANCELED) == "DELETED"
        assert await status(HELD) == "CANCELED"

        await db.advance_clock(timedelta(days=21))
        assert await new_letters(house) == {
            (ALICE, "The data of Initech will be deleted"),
            (CAROL, "The data of Hooli will be deleted"),
        }
        assert [await reminded(one) for one in (REMINDED, WARNED)] == [[30], [30, 7]]
        held = await house.do(
            BILLING,
            "holdDeletion",
            "... on HoldDeletionSuccess { account { deletionScheduledFor } }",
            accountId=await house.account_id("initech"),
            note="They pay after all.",
        )
        assert held == {"__typename": "HoldDeletionSuccess", "account": {"deletionScheduledFor": None}}

        await db.advance_clock(timedelta(days=40))
        assert await new_letters(house) == {(CAROL, "The data of Hooli has been deleted")}
        assert [await status(one) for one in (REMINDED, WARNED, DELETED)] == ["CANCELED", "DELETED", "DELETED"]


async def new_letters(house: Stage) -> set[tuple[str, str]]:
    """To whom, and about what, since the last time."""
    letters = {
        (letter["To"].addresses[0].addr_spec, letter["Subject"].partition(" in ")[0])
        for letter in await house.letters()
    }
    for file in house.mail.glob("*.eml"):
        file.unlink()
    return letters


async def reminded(id_: str) -> list[int]:
    rows = await db.fetch(f"SELECT days FROM deletion_reminder WHERE account_id = {id_} ORDER BY sent_at")
    return [row["days"] for row in rows]


async def status(id_: str, table: str = "account") -> str:
    row = await db.fetch_one(f"SELECT status FROM {table} WHERE id = {id_}")
    assert row is not None
    return str(row["status"])


async def test_the_next_migration_will_lose_nothing_either(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the newest schema on, with rows in every table."""
    async with db.transaction():
        for statement in WORLD:
            await db.execute(statement)
    (tmp_path / "m0099_probe.py").write_text(NEXT)
    monkeypatch.setattr(app.db.migrations, "__path__", [*app.db.migrations.__path__, str(tmp_path)])
    monkeypatch.setattr("tortoise.migrations.loader.reload", lambda module: module)  # it would forget the path again
    tables = TABLES + NEW_TABLES
    columns = await columns_of(tables)
    had, held = await rows(tables), await objects()
    try:
        assert await pending(database) == ["m0099_probe"]
        assert await migrate(database) == ["m0099_probe"]
        assert await pending(database) == []
    finally:
        sys.modules.pop("app.db.migrations.m0099_probe", None)
    assert await rows(tables, columns) == had
    has = await objects()
    assert has.keys() - held.keys() == {"index account_probe"}
    assert {name for name in held if has[name] != held[name]} <= {"table account"}
    with pytest.raises(IntegrityError):
        await db.execute("UPDATE account SET deletion_scheduled_for = created_at WHERE status = 'ACTIVE'")
