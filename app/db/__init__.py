"""The database floor: one `Database` per installation, and short functions on the one that is bound.

    database = await Database.open("sqlite:///var/lib/sunset/sunset.db")
    with database.bind():
        async with db.transaction():
            row = await db.fetch_one("SELECT status FROM account WHERE id = $1", account_id)

Works alike on SQLite and PostgreSQL: `$1` placeholders, UUID and aware `datetime` arguments, `IntegrityError` for a
broken constraint, `app.errors.Unavailable` for a database that is away or too busy. What differs is the form of
values in raw rows (`as_uuid`, `as_datetime`; SQLite's truths are 0 and 1; JSON is text on both).

Nothing here creates tables (`app.db.migrate` does) or knows the domain: models are named, never imported.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import Any, ClassVar, Literal, Self
from urllib.parse import unquote, urlsplit

from tortoise.context import TortoiseContext
from tortoise.context import _current_context as _tortoise_context
from tortoise.exceptions import IntegrityError

from app.db.listen import Tell, Wakeups
from app.db.transaction import TransactionBlock, detached, on_commit, refuse_inside_transaction
from app.db.values import UtcDatetimeField, as_datetime, as_uuid, uuid7
from app.errors import Unavailable

__all__ = [
    "Database",
    "Dialect",
    "IntegrityError",
    "UtcDatetimeField",
    "Wakeups",
    "advance_clock",
    "as_datetime",
    "as_uuid",
    "bound",
    "clock_offset",
    "database_now",
    "database_now_sql",
    "deadline",
    "dialect",
    "exclusively",
    "execute",
    "fetch",
    "fetch_one",
    "fix_clock",
    "for_update",
    "hear",
    "listen",
    "notify",
    "now",
    "now_sql",
    "on_commit",
    "random_uuid_sql",
    "scrub",
    "transaction",
    "uuid7",
]

Dialect = Literal["sqlite", "postgresql"]


class Database:
    """The connections to one database. Open it in the event loop that uses it, and close it there.

    A process may hold several at a time on one engine, not on two: Tortoise keeps each model's SQL per class.
    """

    _open_dialects: ClassVar[list[Dialect]] = []

    def __init__(
        self, url: str, dialect: Dialect, context: TortoiseContext, client: Any, *, development_clock: bool
    ) -> None:
        self.url = url
        self.dialect = dialect
        self.development_clock = development_clock
        self._context = context
        self._client = client

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        pool_size: int = 10,
        statement_seconds: float = 15.0,
        lock_seconds: float = 5.0,
        development_clock: bool = False,
    ) -> Self:
        """Connect to `sqlite:///absolute/path` or `postgres://...`. Creates no table.

        `statement_seconds` and `lock_seconds` bound each statement on PostgreSQL. `development_clock`: the time is the
        database's and what `advance_clock` has added to it. Refuses with ValueError a URL of another kind, with
        `Unavailable` a database that cannot be reached.
        """
        scheme = urlsplit(url).scheme
        dialect: Dialect
        if scheme == "sqlite":
            dialect, engine = "sqlite", "app.db.sqlite_backend"
            credentials: dict[str, Any] = {"file_path": sqlite_path(url), "pool_size": pool_size}
        elif scheme in {"postgres", "postgresql"}:
            dialect, engine = "postgresql", "app.db.asyncpg_backend"
            credentials = {
                "dsn": url,
                "pool_size": pool_size,
                "statement_seconds": statement_seconds,
                "lock_seconds": lock_seconds,
            }
        else:
            raise ValueError("A database URL begins with sqlite:/// or postgres://")
        if any(other != dialect for other in cls._open_dialects):
            raise RuntimeError("A process cannot use SQLite and PostgreSQL at the same time.")
        context = TortoiseContext()
        token = _tortoise_context.set(context)  # `init` looks itself up
        try:
            # The connection is named after its engine, because Tortoise caches SQL per connection name.
            await context.init(
                {
                    "connections": {dialect: {"engine": engine, "credentials": credentials}},
                    "apps": {
                        "models": {
                            "models": ["app.models"],
                            "default_connection": dialect,
                            "migrations": "app.db.migrations",
                        }
                    },
                    "use_tz": True,
                    "timezone": "UTC",
                }
            )
        finally:
            _tortoise_context.reset(token)
        client: Any = context.connections.get(dialect)
        try:
            await client.create_connection(with_db=True)
        except BaseException:
            await client.close()
            raise
        cls._open_dialects.append(dialect)
        return cls(url, dialect, context, client, development_clock=development_clock)

    async def close(self) -> None:
        """Close the connections. What still runs on one ends with `Unavailable`."""
        await self._client.close()
        if self.dialect in self._open_dialects:
            self._open_dialects.remove(self.dialect)

    @contextmanager
    def bind(self) -> Iterator[None]:
        """Within the block, models and this module's functions use this database, and no transaction is open.

        Tasks started in the block inherit it. RuntimeError inside a transaction of the same task.
        """
        with detached():
            bound_token = _bound.set(self)
            tortoise_token = _tortoise_context.set(self._context)
            try:
                yield
            finally:
                _tortoise_context.reset(tortoise_token)
                _bound.reset(bound_token)


_bound: ContextVar[Database] = ContextVar("sunset_database")


def bound() -> Database:
    """The database that the running task uses. LookupError outside of `Database.bind`."""
    return _bound.get()


def dialect() -> Dialect:
    """The bound database's engine, where one SQL cannot serve both."""
    return _bound.get().dialect


@asynccontextmanager
async def deadline(longest: timedelta) -> AsyncIterator[None]:
    """`async with`: what takes longer than `longest` is canceled and ends with `Unavailable`, without waiting for the
    connection that it used to be cleaned. A commit that was on its way may still be carried out."""
    try:
        async with asyncio.timeout(longest.total_seconds()) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise Unavailable(
            "The database did not answer in time. What was asked for may have been done or not: to be sure, send it "
            "again, a mutation with the same idempotency key."
        ) from None


def transaction() -> AbstractAsyncContextManager[Any]:
    """`async with` one transaction: committed when the block ends, rolled back when it raises or is canceled.

    One action, one transaction: RuntimeError inside another one. No task may be started inside (see
    `app.db.transaction`), and nothing but the database awaited. `Unavailable` when it cannot begin or commit.
    """
    refuse_inside_transaction("Opening a transaction")
    return TransactionBlock(_bound.get()._client)


async def fetch(sql: str, *args: Any) -> list[dict[str, Any]]:
    """All rows of one statement, as raw values, in the task's transaction if it has one."""
    rows: list[dict[str, Any]] = await _bound.get()._client.fetch(sql, args)
    return rows


async def fetch_one(sql: str, *args: Any) -> dict[str, Any] | None:
    """The first row of one statement, or None."""
    rows: list[dict[str, Any]] = await _bound.get()._client.fetch(sql, args)
    return rows[0] if rows else None


async def execute(sql: str, *args: Any) -> int:
    """Run one statement and return how many rows it changed."""
    changed: int = await _bound.get()._client.execute(sql, args)
    return changed


async def now() -> datetime:
    """The time of the installation, in UTC, cut to milliseconds. It moves on within a transaction.

    It is the database's clock; with the development clock, ahead of it by what `advance_clock` has added."""
    return await _moment(now_sql())


def now_sql() -> str:
    """What `now` asks, as an SQL expression, for statements that ask something else too."""
    if not _bound.get().development_clock:
        return database_now_sql()
    if dialect() == "postgresql":
        return (
            "date_trunc('milliseconds', clock_timestamp() "
            "+ (SELECT offset_seconds FROM clock_offset) * interval '1 second')"
        )
    return (
        "strftime('%Y-%m-%d %H:%M:%f', 'now', (SELECT offset_seconds || ' seconds' FROM clock_offset)) || '000+00:00'"
    )


async def database_now() -> datetime:
    """The time by the database's own clock, whatever was added to it."""
    return await _moment(database_now_sql())


def database_now_sql() -> str:
    if dialect() == "postgresql":
        return "date_trunc('milliseconds', clock_timestamp())"
    return "strftime('%Y-%m-%d %H:%M:%f', 'now') || '000+00:00'"


async def _moment(expression: str) -> datetime:
    row = await fetch_one(f"SELECT {expression} AS now")
    assert row is not None
    moment: datetime = as_datetime(row["now"])
    return moment


async def clock_offset() -> timedelta:
    """How far the development clock of this database was moved ahead; nothing, unless somebody did."""
    row = await fetch_one("SELECT offset_seconds FROM clock_offset")
    return timedelta(seconds=row["offset_seconds"] if row else 0)


async def advance_clock(by: timedelta) -> datetime | None:
    """Move the development clock ahead, for every process of the installation, and answer the time. It never goes
    back. None, and nothing is done, where the clock is the database's own, or was fixed."""
    if not _bound.get().development_clock:
        return None
    moved = await execute(
        "UPDATE clock_offset SET offset_seconds = offset_seconds + $1 WHERE fixed_at IS NULL", int(by.total_seconds())
    )
    return await now() if moved else None


async def fix_clock() -> None:
    """Let nobody move the clock of this database any more, whatever their own settings say."""
    await execute(f"UPDATE clock_offset SET fixed_at = {database_now_sql()} WHERE fixed_at IS NULL")


async def scrub() -> None:
    """What was deleted and committed is not to be found in the database's files either, as far as the engine has that
    in hand: SQLite's log keeps old pages until they are written over. PostgreSQL's files are its server's matter."""
    if dialect() == "sqlite":
        with suppress(Unavailable):  # Readers are in the way: the next time takes this one's pages too.
            await _bound.get()._client.scrub()


async def exclusively(name: str) -> None:
    """Wait until no other transaction holds `name`, and hold it until this one ends. SQLite has one at a time."""
    if dialect() == "postgresql":
        await fetch("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", name)


def for_update(*, skip_locked: bool = False, key: bool = True) -> str:
    """The end of a SELECT that locks its rows. Nothing on SQLite, where a transaction has the database to itself.
    With `key` false, others may go on adding rows that refer to them."""
    if dialect() == "sqlite":
        return ""
    return f" FOR {'UPDATE' if key else 'NO KEY UPDATE'}{' SKIP LOCKED' if skip_locked else ''}"


def random_uuid_sql() -> str:
    """SQL for a new random UUID, one for each row."""
    if dialect() == "postgresql":
        return "gen_random_uuid()"
    parts = " || '-' || ".join(f"hex(randomblob({size}))" for size in (4, 2, 2, 2, 6))
    return f"lower({parts})"


async def notify(channel: str, payload: str = "") -> None:
    """Tell who listens to `channel`: after the commit, when the task has a transaction open, otherwise now."""
    await _bound.get()._client.notify(channel, payload)


def hear(channel: str, tell: Tell) -> AbstractAsyncContextManager[None]:
    """Within the block, `tell` is called with the payload of each notification to `channel`, and with None when some
    may have been missed: when listening begins, begins again, and when the connection was lost.

    Notifications are hints, and may come too often or, on another host's failure, never. They reach all processes on
    PostgreSQL, this process on SQLite. RuntimeError inside a transaction.
    """
    refuse_inside_transaction("Listening")
    listening: AbstractAsyncContextManager[None] = _bound.get()._client.listen(channel, tell)
    return listening


def listen(channel: str) -> AbstractAsyncContextManager[Wakeups]:
    """`hear`, for who only waits until there may be something to do."""
    wakeups = Wakeups()
    hearing = hear(channel, lambda _: wakeups.wake())

    @asynccontextmanager
    async def listening() -> AsyncIterator[Wakeups]:
        async with hearing:
            yield wakeups

    return listening()


def sqlite_path(url: str) -> str:
    """The file of a `sqlite:///` URL. Refuses with ValueError a relative one and a database in memory."""
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc or not path.startswith("/") or path == "/" or parts.query or parts.fragment:
        raise ValueError("A SQLite URL is sqlite:/// and the absolute path of a file, as in sqlite:///var/sunset.db")
    return path
