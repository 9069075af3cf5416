"""SQLite for Tortoise and for raw SQL, without the defects of Tortoise's own backend.

Tortoise finds its parts by the module's name, which must contain `sqlite`. Against its original:

* BEGIN IMMEDIATE: a deferred transaction that reads and then writes fails with "database is locked" as soon as a
  second process does the same, whatever the busy time-out. With WAL and a busy time-out it waits its turn.
* One transaction at a time within the process, first come first served, and a few connections, so that reads do
  not wait for writers. Waiting ends with `Unavailable`.
* A BEGIN that is canceled may still run in the driver's thread: the connection is rolled back behind it before
  anybody gets it, and only then does the next transaction begin.
* Scripts run statement by statement: Python's `executescript` commits an open transaction first.
* The driver's threads are daemons: a process that forgets to close still ends.
* Times are stored in UTC with a fixed width; naive ones are refused by the driver itself, hence in any SQL.
* `synchronous` stays FULL: what was acknowledged survives a power cut.
* The file, and those beside it, are their owner's alone.
* What is deleted is overwritten in the file (`secure_delete`, in which builds of SQLite differ), and `scrub` empties
  the write-ahead log, which keeps pages as they were.
"""

import asyncio
import os
import re
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import UUID

import aiosqlite
from aiosqlite.core import _STOP_RUNNING_SENTINEL
from tortoise.backends.base.client import TransactionContext
from tortoise.backends.sqlite.client import SqliteClient as TortoiseSqliteClient
from tortoise.exceptions import IntegrityError, OperationalError

from app.db.listen import Tell
from app.db.pool import Pool
from app.db.transaction import Lease, block, current
from app.db.values import sqlite_text
from app.errors import Unavailable

_BUSY_SECONDS = 15.0
_ACQUIRE_SECONDS = 15.0
_CLEAN_SECONDS = 2 * _BUSY_SECONDS  # a canceled BEGIN waits out its busy time-out first
_MOST_CONNECTIONS = 4

# Process-wide, like the adapters of Tortoise's backend (imported above) that they replace: whatever reaches SQLite
# as a time is stored in the one form that compares rightly as text.
sqlite3.register_adapter(datetime, sqlite_text)
sqlite3.register_adapter(UUID, str)

_TRY_AGAIN = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR", "SQLITE_FULL", "SQLITE_CANTOPEN")


def _translate(error: BaseException) -> Exception | None:
    if isinstance(error, sqlite3.OperationalError):
        if getattr(error, "sqlite_errorname", "").startswith(_TRY_AGAIN):
            return Unavailable("The database is too busy just now. Try again in a moment.")
        return OperationalError(error)
    if isinstance(error, sqlite3.IntegrityError):
        return IntegrityError(error)
    return None


class _Connection(aiosqlite.Connection):
    """One SQLite connection in a thread of its own."""

    def __init__(self, file_path: str) -> None:
        super().__init__(lambda: _connect(file_path), iter_chunk_size=64)
        self._thread.daemon = True

    def stop(self) -> None:
        """End the thread behind what it is doing. The original answers into the event loop, which after a failed
        opening may be closed before the thread gets there."""
        self._running = False
        self._tx.put_nowait((None, self._close_and_stop))

    def _close_and_stop(self) -> object:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        return _STOP_RUNNING_SENTINEL

    async def count(self, sql: str, args: tuple[Any, ...]) -> int:
        """Run one statement and count the rows it changed; triggers and cascades do not count."""
        return await self._execute(self._count, sql, args)  # type: ignore[no-any-return, no-untyped-call]

    def _count(self, sql: str, args: tuple[Any, ...]) -> int:
        before = self._conn.total_changes
        cursor = self._conn.execute(sql, args)
        cursor.fetchall()
        changed = cursor.rowcount
        if changed < 0:  # not counted by the driver: no change, or a change in a common table expression
            changed = 0
            if self._conn.total_changes != before:
                changed = self._conn.execute("SELECT changes()").fetchone()[0]
        return changed

    async def script(self, sql: str) -> None:
        """Run several statements inside whatever transaction is open."""
        await self._execute(self._script, sql)  # type: ignore[no-untyped-call]

    def _script(self, sql: str) -> None:
        statement = ""
        for piece in re.split(r"(;)", sql):
            statement += piece
            if piece == ";" and sqlite3.complete_statement(statement):
                self._conn.execute(statement)
                statement = ""
        if statement.strip():
            self._conn.execute(statement)


def _lower(text: str | None) -> str | None:
    """SQLite's own knows ASCII alone, and would find neither "école" nor "École" as the other."""
    return None if text is None else text.lower()


def _keep_private(file_path: str) -> None:
    """A new file is made before SQLite makes it, for the owner alone; SQLite gives those beside it the same mode. One
    that everybody may read, as earlier versions made it, is closed. A group that was let in, and nobody else, is meant.
    """
    file = Path(os.path.realpath(file_path))  # where SQLite puts what is beside it
    with suppress(OSError):  # It is there, or cannot be made: SQLite tells why.
        # Never opened when it is there: closing it again would end the locks of this process's connections.
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    for end in ("", "-wal", "-shm", "-journal"):
        with suppress(OSError):  # It is not there.
            beside = file.with_name(file.name + end)
            found = beside.stat()
            if found.st_mode & 0o007 and found.st_uid == os.geteuid():
                beside.chmod(0o600)


def _connect(file_path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(file_path, timeout=_BUSY_SECONDS, isolation_level=None, cached_statements=512)
    try:
        connection.row_factory = sqlite3.Row
        connection.create_function("lower", 1, _lower, deterministic=True)
        deadline = time.monotonic() + _BUSY_SECONDS
        while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            try:
                connection.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError:  # another process is switching: this lock has no busy time-out
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA journal_size_limit=67108864")
        connection.execute("PRAGMA secure_delete=ON")
    except BaseException:
        connection.close()
        raise
    return connection


@lru_cache(maxsize=1024)
def _placeholders(sql: str) -> str:
    """`$1` as SQLite's `?1`, outside of string literals."""
    return re.sub(r"'(?:[^']|'')*'|\$(\d+)", lambda found: f"?{found[1]}" if found[1] else found[0], sql)


class SqliteClient(TortoiseSqliteClient):
    """Tortoise's client for one SQLite file, and the raw path beside it."""

    def __init__(self, file_path: str, pool_size: int, connection_name: str) -> None:
        super().__init__(file_path, connection_name=connection_name)
        self._write_turn = asyncio.Lock()
        self._writer: _Connection | None = None
        self._listeners: dict[str, list[Tell]] = {}
        self._connections: Pool[_Connection] = Pool(
            size=max(2, min(pool_size, _MOST_CONNECTIONS)),
            wait_seconds=_ACQUIRE_SECONDS,
            connect=self._open,
            is_usable=lambda _: True,  # nothing outside of this process can end one
            clean=self._clean,
            abandon=self._abandon,
            close=lambda connection: connection.close(),
        )

    async def create_connection(self, with_db: bool) -> None:
        """Open the file once, so that a wrong path shows at the start."""
        await self._post_connect()
        await asyncio.to_thread(_keep_private, self.filename)
        self._connections.release(await self._connections.acquire())

    async def close(self) -> None:
        await self._connections.close()

    async def _open(self) -> _Connection:
        connection = _Connection(self.filename)
        try:
            await connection
        except Exception as error:
            _raise_translated(error)
            raise
        return connection

    async def _clean(self, connection: _Connection) -> None:
        try:
            async with asyncio.timeout(_CLEAN_SECONDS):
                await connection.rollback()  # queued behind what the thread is still doing
        finally:
            self._end_turn(connection)

    def _abandon(self, connection: _Connection) -> None:
        connection.stop()  # its thread closes it after what it is doing

    def _end_turn(self, connection: _Connection) -> None:
        if self._writer is connection:
            self._writer = None
            self._write_turn.release()

    # What app.db.transaction asks of a backend.

    async def check_out(self) -> _Connection:
        return await self._connections.acquire()

    async def check_in(self, connection: _Connection, *, failed: bool) -> None:
        if failed:
            await self._connections.recover(connection)
        else:
            self._connections.release(connection)

    async def begin(self) -> _Connection:
        # The turn first: transactions that wait for it must not hold the connections that readers need.
        try:
            async with asyncio.timeout(_ACQUIRE_SECONDS):
                await self._write_turn.acquire()
        except TimeoutError:
            raise Unavailable("The database is too busy just now. Try again in a moment.") from None
        try:
            connection = await self._connections.acquire()
        except BaseException:
            self._write_turn.release()
            raise
        self._writer = connection
        try:
            await connection.execute_fetchall("BEGIN IMMEDIATE")
        except BaseException as error:
            await self._connections.recover(connection)
            _raise_translated(error)
            raise
        return connection

    async def finish(self, connection: _Connection, *, commit: bool) -> None:
        if not commit:
            await self._connections.recover(connection)
            return
        try:
            await connection.execute_fetchall("COMMIT")
        except BaseException as error:
            await self._connections.recover(connection)
            _raise_translated(error)
            raise
        self._end_turn(connection)
        self._connections.release(connection)

    async def savepoint(self, connection: _Connection, statement: str) -> None:
        try:
            await connection.execute_fetchall(statement)
        except Exception as error:
            _raise_translated(error)
            raise

    def translate(self, error: BaseException) -> Exception | None:
        return _translate(error)

    def tell(self, channel: str, payload: str) -> None:
        for tell in self._listeners.get(channel, ()):
            tell(payload)

    # What Tortoise asks of a client.

    def acquire_connection(self) -> Any:
        return Lease(self)

    def _in_transaction(self) -> TransactionContext:
        return block(self)

    async def execute_many(self, query: str, values: list[Any]) -> None:
        async with block(self), Lease(self) as connection:
            await connection.executemany(query, values)

    async def execute_script(self, query: str) -> None:
        async with Lease(self) as connection:
            await connection.script(query)

    # The raw path.

    async def fetch(self, sql: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        async with Lease(self) as connection:
            return [dict(row) for row in await connection.execute_fetchall(_placeholders(sql), args)]

    async def execute(self, sql: str, args: tuple[Any, ...]) -> int:
        async with Lease(self) as connection:
            changed: int = await connection.count(_placeholders(sql), args)
            return changed

    async def scrub(self) -> None:
        """Write the log back and empty it. Left for another time while a reader still needs it."""
        async with Lease(self) as connection:
            await connection.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")

    async def notify(self, channel: str, payload: str) -> None:
        transaction = current(self)
        if transaction is None:
            self.tell(channel, payload)
        else:
            transaction.hints.add((channel, payload))

    @asynccontextmanager
    async def listen(self, channel: str, tell: Tell) -> AsyncIterator[None]:
        tell(None)
        listeners = self._listeners.setdefault(channel, [])
        listeners.append(tell)
        try:
            yield
        finally:
            listeners.remove(tell)


def _raise_translated(error: BaseException) -> None:
    if (translated := _translate(error)) is not None:
        raise translated from error


client_class = SqliteClient
