"""Opening, raw statements, values and clocks: the same on both engines."""

import asyncio
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from app import db
from app.db import Database
from app.errors import Unavailable
from app.lifecycle import StaffRole
from app.models import Staff

WHOLE_SECOND = datetime(2026, 3, 29, 1, 0, 0, tzinfo=UTC)
BERLIN_SUMMER = timezone(timedelta(hours=2))


async def create(subject: str, created_at: datetime) -> Staff:
    return await Staff.create(
        issuer="i", subject=subject, email=subject, name="N", role=StaffRole.SUPPORT, created_at=created_at
    )


async def test_raw_rows_and_models_see_the_same_values(database: Database) -> None:
    """What one writes the other reads, ids and times included."""
    one = await create("orm", WHOLE_SECOND)
    row = await db.fetch_one("SELECT id, created_at, deactivated_at FROM staff WHERE id = $1", one.id)
    assert row is not None
    assert db.as_uuid(row["id"]) == one.id
    assert db.as_datetime(row["created_at"]) == WHOLE_SECOND
    assert db.as_datetime(row["deactivated_at"]) is None
    raw_id = db.uuid7()
    changed = await db.execute(
        "INSERT INTO staff (id, issuer, subject, email, name, role, created_at) "
        "VALUES ($3, $1, $2, $2, $1, 'SUPPORT', $4)",
        "it's $1",
        "raw",
        raw_id,
        WHOLE_SECOND.astimezone(BERLIN_SUMMER),
    )
    assert changed == 1
    other = await Staff.get(id=raw_id)
    assert (other.issuer, other.subject, other.created_at) == ("it's $1", "raw", WHOLE_SECOND)
    assert other.created_at.tzinfo is UTC


async def test_times_compare_as_times(database: Database) -> None:
    """With and without a fraction of a second, whatever zone the argument has."""
    moments = [WHOLE_SECOND + timedelta(microseconds=1) * offset for offset in (-1, 0, 1, 500_000, 1_000_000)]
    for number, moment in enumerate(moments):
        await create(str(number), moment)
    for boundary in moments:
        expected = sum(moment <= boundary for moment in moments)
        argument = boundary.astimezone(BERLIN_SUMMER)
        assert await Staff.filter(created_at__lte=argument).count() == expected
        row = await db.fetch_one("SELECT count(*) AS n FROM staff WHERE created_at <= $1", argument)
        assert row == {"n": expected}
    assert [one.created_at for one in await Staff.all().order_by("created_at")] == moments


async def test_naive_times_are_refused(database: Database) -> None:
    naive = datetime(2026, 3, 29, 2, 30)  # noqa: DTZ001
    one = await create("s", WHOLE_SECOND)
    with pytest.raises(ValueError, match="without a zone"):
        await create("t", naive)
    with pytest.raises(ValueError, match="without a zone"):
        await Staff.filter(created_at__lte=naive).count()
    with pytest.raises(ValueError, match="without a zone"):
        await Staff.filter(id=one.id).update(created_at=naive)
    with pytest.raises(ValueError, match="without a zone"):
        await db.fetch("SELECT 1 AS one FROM staff WHERE created_at <= $1", naive)
    with pytest.raises(ValueError, match="without a zone"):
        await db.execute("UPDATE staff SET created_at = $1", naive)
    one.created_at = naive
    with pytest.raises(ValueError, match="without a zone"):
        await one.save()


@pytest.mark.parametrize(
    ("sql", "count"),
    [
        ("UPDATE staff SET name = 'M' WHERE subject <> 'a'", 2),
        ("UPDATE staff SET name = 'M' WHERE subject = 'nobody'", 0),
        ("DELETE FROM staff", 3),
        ("WITH one AS (SELECT 'a' AS s) UPDATE staff SET name = 'M' WHERE subject IN (SELECT s FROM one)", 1),
        ("WITH one AS (SELECT 'z' AS s) UPDATE staff SET name = 'M' WHERE subject IN (SELECT s FROM one)", 0),
        ("UPDATE staff SET name = 'M' WHERE subject = 'a' RETURNING id", 1),
    ],
)
async def test_execute_counts_changed_rows(database: Database, sql: str, count: int) -> None:
    for subject in "abc":
        await create(subject, WHOLE_SECOND)
    assert await db.execute(sql) == count


async def test_returning_gives_rows(database: Database) -> None:
    await create("a", WHOLE_SECOND)
    assert await db.fetch("UPDATE staff SET name = $1 WHERE subject = 'a' RETURNING name", "M") == [{"name": "M"}]
    assert await db.fetch_one("SELECT name FROM staff WHERE subject = 'b'") is None


async def test_a_broken_rule_is_an_integrity_error(database: Database) -> None:
    """From raw SQL and from models the same class, and the connection goes on."""
    one = await create("a", WHOLE_SECOND)
    with pytest.raises(db.IntegrityError):
        await create("a", WHOLE_SECOND)
    with pytest.raises(db.IntegrityError):
        await db.execute("UPDATE staff SET role = 'CEO' WHERE id = $1", one.id)
    assert await db.execute("UPDATE staff SET role = 'SUPPORT' WHERE id = $1", one.id) == 1


async def test_the_clock_is_utc_in_milliseconds(database: Database) -> None:
    """And moves on within a transaction."""
    async with db.transaction():
        first = await db.now()
        while await db.now() == first:
            pass
    assert first.tzinfo is UTC
    assert first.microsecond % 1000 == 0
    assert abs(first - datetime.now(UTC)) < timedelta(minutes=1)


@pytest.mark.postgres
async def test_settings_of_a_postgresql_connection(postgres_database: Database) -> None:
    """The server of these tests lives in a zone with summer time and knows none of these."""
    wanted = {
        "timezone": "UTC",
        "jit": "off",
        "plan_cache_mode": "force_generic_plan",
        "statement_timeout": "15s",
        "lock_timeout": "5s",
        "idle_in_transaction_session_timeout": "15s",
        "application_name": "sunset",
    }
    found = {name: (await db.fetch(f"SELECT current_setting('{name}') AS value"))[0]["value"] for name in wanted}
    assert found == wanted


async def test_settings_of_a_sqlite_connection(sqlite_database: Database) -> None:
    wanted = {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 15000, "synchronous": 2}
    found = {name: next(iter((await db.fetch(f"PRAGMA {name}"))[0].values())) for name in wanted}
    assert found == wanted


async def test_foreign_keys_hold(database: Database) -> None:
    with pytest.raises(db.IntegrityError):
        await db.execute(
            "INSERT INTO member (id, account_id, issuer, subject, email, name, role, permissions, created_at) "
            "VALUES ($1, $1, 'i', 's', 'e', 'n', 'ADMIN', '', $2)",
            db.uuid7(),
            WHOLE_SECOND,
        )


@pytest.mark.parametrize(
    "url",
    ["mysql://localhost/x", "sqlite://relative.db", "sqlite://:memory:", "sqlite:///", "sqlite:///a.db?mode=ro", ""],
)
async def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        await Database.open(url)


@pytest.mark.parametrize(
    "url", ["sqlite:///nowhere/at/all/sunset.db", "postgresql://sunset@/sunset?host=/nowhere/at/all"]
)
async def test_a_database_that_is_away_is_unavailable(url: str) -> None:
    with pytest.raises(Unavailable):
        await Database.open(url)


def test_a_failed_opening_leaves_no_thread_behind(capfd: pytest.CaptureFixture[str]) -> None:
    """The driver's thread ends in peace when the event loop is gone before it."""

    async def fail() -> None:
        with pytest.raises(Unavailable):
            await Database.open("sqlite:///nowhere/at/all/sunset.db")

    before = threading.enumerate()
    for _ in range(50):
        asyncio.run(fail())
    for thread in set(threading.enumerate()) - set(before):
        thread.join(timeout=30)
    assert threading.enumerate() == before
    assert "Exception in thread" not in capfd.readouterr().err


async def test_opening_creates_no_table(tmp_path: Path) -> None:
    database = await Database.open(f"sqlite://{tmp_path}/a%20b.db")
    try:
        with database.bind():
            assert await db.fetch("SELECT name FROM sqlite_master") == []
    finally:
        await database.close()
    assert (tmp_path / "a b.db").exists()


async def test_several_databases_in_one_process(database: Database, tmp_path: Path) -> None:
    """Each binding sees its own; the other engine is refused while this one is open."""
    with pytest.raises(RuntimeError, match="at the same time"):
        await Database.open(f"sqlite://{tmp_path}/x.db" if database.dialect == "postgresql" else "postgresql:///x")
    await create("s", WHOLE_SECOND)
    second = await Database.open(database.url)
    try:
        with second.bind():
            assert db.bound() is second
            assert await Staff.all().count() == 1
        assert db.bound() is database
    finally:
        await second.close()
    with second.bind(), pytest.raises(Unavailable):
        await db.fetch("SELECT 1 AS one")
    assert await Staff.all().count() == 1


def test_uuid7_is_ordered_and_well_formed() -> None:
    """Strictly growing, also within a millisecond; version and variant of RFC 9562; the time in front."""
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    ids = [db.uuid7() for _ in range(20_000)]
    assert ids == sorted(set(ids))
    assert {(one.version, one.variant) for one in ids} == {(7, uuid4().variant)}
    stamp = datetime.fromtimestamp((ids[0].int >> 80) / 1000, UTC)
    assert before <= stamp <= datetime.now(UTC) + timedelta(milliseconds=1)


def test_uuid7_grows_when_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = db.uuid7()
    monkeypatch.setattr("app.db.values.time.time_ns", lambda: 1)
    assert newest < db.uuid7() < db.uuid7()


def test_values_of_both_engines_are_read() -> None:
    one = UUID("01890a5d-ac96-774b-bcce-b302099a8057")
    assert db.as_uuid(str(one)) == db.as_uuid(one) == one
    assert db.as_uuid(None) is None
    assert db.as_datetime("2026-03-29 01:00:00.000000+00:00") == WHOLE_SECOND
    assert db.as_datetime(WHOLE_SECOND.astimezone(BERLIN_SUMMER)).tzinfo is UTC
    with pytest.raises(ValueError, match="without a zone"):
        db.as_datetime("2026-03-29 01:00:00")


async def test_the_databases_own_clock_is_not_moved(database: Database) -> None:

    assert await db.advance_clock(timedelta(days=1)) is not None
    other = await Database.open(database.url, development_clock=False)
    try:
        with other.bind():
            assert await db.advance_clock(timedelta(days=1)) is None
    finally:
        await other.close()
    assert await db.clock_offset() == timedelta(days=1)


async def test_a_clock_that_was_fixed_is_moved_by_nobody(database: Database) -> None:
    """What production has used, nobody moves by mistake, whatever the settings of their own process say."""
    await db.fix_clock()
    await db.fix_clock()
    assert await db.advance_clock(timedelta(days=1)) is None
    assert await db.clock_offset() == timedelta()
