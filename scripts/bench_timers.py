"""How late is what falls due, and what does looking for it cost, with few and with very many canceled accounts.

Two databases on one PostgreSQL: in one some thousand canceled accounts, in the other a million, none of them due. In
each, the same number of accounts then falls due for a reminder, moment by moment, while one `sunset worker` runs; then
the same number for deletion, all at once. The ratios say what the million costs.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from bench_processes import command

from app import db, main, policy
from app.auth import Installation
from app.db import Database
from app.db.migrate import migrate
from app.settings import Settings
from app.timers import Timers
from tests.postgres import PostgresServer

FEW = 1_000
LEAD_SECONDS = 6
"""More than a worker sleeps: what is due by then is known to it, as it is in life."""
SPREAD_SECONDS = 10
"""The reminders fall due over this long a time."""

_ACCOUNTS = """
INSERT INTO account (id, reference, name, plan_code, status, epoch, last_sequence, created_at, canceled_at,
                     restartable_until, deletion_scheduled_for, reminder_due_at)
SELECT ('00000000-0000-7000-8000-' || lpad((number + $1)::text, 12, '0'))::uuid, 'customer-' || (number + $1),
       'Customer', 'essentials', 'CANCELED', 1, 1, moment, moment, moment + interval '1440 hours',
       moment + interval '1440 hours', moment + interval '720 hours'
FROM (SELECT number, date_trunc('milliseconds', clock_timestamp() - number % 600 * interval '1 hour') AS moment
      FROM generate_series(1, $2::int) number) made
"""
_REQUESTS = """
INSERT INTO cancellation_request (id, account_id, status, channel, plan_code, requested_at, requested_by_kind,
                                  requested_by_id, confirmation_generation, wrong_tries, confirmed_at, effective_at,
                                  took_effect_at)
SELECT gen_random_uuid(), id, 'EFFECTIVE', 'SELF_SERVE', plan_code, canceled_at, 'MEMBER', id, 0, 0, canceled_at,
       canceled_at, canceled_at FROM account WHERE id > $1
"""
_MEMBERS = """
INSERT INTO member (id, account_id, issuer, subject, email, name, role, permissions, created_at)
SELECT gen_random_uuid(), id, 'bench', reference, 'admin@example.com', 'Admin', 'ADMIN', '', created_at
FROM account WHERE id > $1
"""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One database's. Times in milliseconds."""

    reminders: Sequence[float]
    begun: Sequence[float]
    done: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two databases."""

    accounts: int
    database: Database
    installation: Installation
    environ: dict[str, str]


def _key(number: int) -> str:
    return f"00000000-0000-7000-8000-{number:012}"


async def _fill(accounts: int, due: int) -> None:
    for table in ("account", "cancellation_request", "member"):
        await db.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")  # they want a life from its beginning
    step = 100_000
    for begin in range(0, accounts, step):
        await db.execute(_ACCOUNTS, begin, min(step, accounts - begin))
    await db.execute(_ACCOUNTS, accounts, 2 * due)
    await db.execute(_REQUESTS, db.as_uuid(_key(accounts)))
    await db.execute(_MEMBERS, db.as_uuid(_key(accounts)))
    for table in ("account", "cancellation_request", "member"):
        await db.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER")
    await db.execute("VACUUM ANALYZE")


async def _idle_rounds(side: Side, rounds: int) -> list[float]:
    """What looking for due work costs when there is none."""
    timers, taken = Timers(side.installation, forget=_nothing), []
    with side.database.bind():
        for _ in range(rounds):
            began = time.perf_counter()
            assert await timers.run() == 0
            await timers.next_due()
            taken.append(1000 * (time.perf_counter() - began))
    return taken


async def _nothing(_: Sequence[str]) -> None:
    """There are no letters."""


async def _measure(environ: dict[str, str], accounts: int, due: int) -> Figures:
    """The rows tell how late each was: they hold when it was due, and the time at which the worker had its lock."""
    first, middle, last = (db.as_uuid(_key(accounts + number)) for number in (0, due, 2 * due))
    with command("worker", environ):
        await db.execute(
            "UPDATE account SET reminder_due_at = moment, canceled_at = moment - interval '720 hours', "
            "restartable_until = moment + interval '720 hours', deletion_scheduled_for = moment + interval '720 hours' "
            "FROM (SELECT id, date_trunc('milliseconds', clock_timestamp() + $3 * interval '1 s' "
            "+ random() * $4 * interval '1 s') AS moment FROM account WHERE id > $1 AND id <= $2) due "
            "WHERE account.id = due.id",
            *(first, middle, float(LEAD_SECONDS), float(SPREAD_SECONDS)),
        )
        await db.execute("CREATE TABLE bench_due AS SELECT id, reminder_due_at FROM account WHERE id > $1", first)
        await _until("SELECT COUNT(*) AS done FROM deletion_reminder", due)
        await db.execute(
            "UPDATE account SET canceled_at = moment - interval '1440 hours', restartable_until = moment, "
            "deletion_scheduled_for = moment, reminder_due_at = NULL FROM (SELECT date_trunc('milliseconds', "
            "clock_timestamp() + $3 * interval '1 s') AS moment) at WHERE id > $1 AND id <= $2",
            *(middle, last, float(LEAD_SECONDS)),
        )
        await _until("SELECT COUNT(*) AS done FROM tombstone", due)
    return Figures(
        reminders=await _late(
            "SELECT r.sent_at - d.reminder_due_at AS late "
            "FROM deletion_reminder r JOIN bench_due d ON d.id = r.account_id"
        ),
        begun=await _late(
            "SELECT deletion_started_at - deletion_scheduled_for AS late FROM account WHERE status = 'DELETED'"
        ),
        done=await _late("SELECT deleted_at - deletion_scheduled_for AS late FROM account WHERE status = 'DELETED'"),
    )


async def _late(sql: str) -> list[float]:
    return sorted(row["late"] / timedelta(milliseconds=1) for row in await db.fetch(sql))


async def _until(sql: str, number: int) -> None:
    async with asyncio.timeout(600):
        while (await db.fetch(sql))[0]["done"] < number:  # noqa: ASYNC110  another process does it
            await asyncio.sleep(0.1)


@asynccontextmanager
async def _side(server: PostgresServer, environ: dict[str, str], accounts: int, due: int) -> AsyncIterator[Side]:
    name = await server.create_empty_database()
    with tempfile.TemporaryDirectory(prefix="sunset-bench-") as directory:
        environ = environ | {
            "SUNSET_DATABASE_URL": server.url(name),
            "SUNSET_DATA_DIR": directory,
            "SUNSET_POLICY_FILE": str(_policy(Path(directory), due)),
            "SUNSET_CLOCK": "system",
        }
        settings = Settings.load({name: value for name, value in environ.items() if name.startswith("SUNSET_")})
        database = await Database.open(settings.database_url, pool_size=2, statement_seconds=900)
        try:
            await migrate(database)
            with database.bind():
                await _fill(accounts, due)
            yield Side(accounts=accounts, database=database, installation=main.installation(settings), environ=environ)
        finally:
            await database.close()
    await server.drop_database(name)


async def bench(server: PostgresServer, environ: dict[str, str], *, many: int, due: int) -> None:
    """Measure and print everything, on databases of its own."""
    async with _side(server, environ, FEW, due) as few, _side(server, environ, many, due) as much:
        idle: dict[int, list[float]] = {FEW: [], many: []}
        for _ in range(20):  # in turn, so that whatever else the machine does meets both alike
            for side in (few, much):
                idle[side.accounts] += await _idle_rounds(side, 10)
        figures = []
        for side in (few, much):
            with side.database.bind():
                figures.append(await _measure(side.environ, side.accounts, due))
    ours, theirs = figures
    print(f"\n{due:,} reminders over {SPREAD_SECONDS} s, then {due:,} deletions at once; one worker; milliseconds\n")
    print(f"{'canceled accounts, not due':<36} {FEW:>11,} {many:>11,} {'ratio':>7}")
    for title, one, other in (
        ("a round with nothing due, median", *map(statistics.median, (idle[FEW], idle[many]))),
        ("reminder: due to done, median", *map(statistics.median, (ours.reminders, theirs.reminders))),
        ("reminder: due to done, 95 %", *map(_most, (ours.reminders, theirs.reminders))),
        ("deletion: due to begun, median", *map(statistics.median, (ours.begun, theirs.begun))),
        ("deletion: due to erased, median", *map(statistics.median, (ours.done, theirs.done))),
        ("deletion: due to erased, last", ours.done[-1], theirs.done[-1]),
    ):
        print(f"{title:<36} {one:>11,.1f} {other:>11,.1f} {other / one:>7.2f}")


def _most(values: Sequence[float]) -> float:
    return values[int(len(values) * 0.95) - 1]


def _policy(directory: Path, due: int) -> Path:
    """The shipped policy, with a breaker that lets these deletions pass."""
    text = policy.DEFAULT_FILE.read_text(encoding="utf-8")
    changed = text.replace("breaker_at_least = 10", f"breaker_at_least = {due}")
    assert changed != text
    file = directory / "policy.toml"
    file.write_text(changed, encoding="utf-8")
    return file
