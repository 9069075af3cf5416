"""PostgreSQL for Tortoise and for raw SQL, without the defects of Tortoise's own asyncpg backend.

Tortoise finds its parts by the module's name, which must contain `asyncpg`. Against its original:

* A transaction whose BEGIN fails or is canceled keeps no connection and leaves no trace (`app.db.transaction`).
* Connections come from `app.db.pool`; after a restart of the server the next use connects again.
* No reset query when a connection is given back. It would undo session state, and nothing here makes any: there
  is no SET, no LISTEN, no temporary table, no advisory lock and no cursor outside a transaction on these
  connections (LISTEN and the migration lock have connections of their own). An open transaction is the only
  state that can remain, after a failure or a cancellation, and exactly then `clean` rolls back.
* Time-outs on everything: connecting, waiting for a connection, for a lock, for a statement, for the client in a
  transaction, and, because a vanished host answers nothing, for the answer itself.
* A COMMIT that the server answers with ROLLBACK (an error inside was swallowed) is an error, not a success.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any

import asyncpg
from tortoise.backends.asyncpg.client import AsyncpgDBClient
from tortoise.backends.base.client import TransactionContext
from tortoise.exceptions import IntegrityError, OperationalError, TransactionManagementError

from app.db.listen import Tell
from app.db.pool import Pool
from app.db.transaction import Lease, block, current
from app.db.values import utc
from app.errors import Unavailable

Connection = Any  # asyncpg.Connection, whose stubs are generic in the record class

_CONNECT_SECONDS = 10.0
_ACQUIRE_SECONDS = 10.0
_ANSWER_GRACE_SECONDS = 5.0
_CLEAN_SECONDS = 10.0
_RECONNECT_SECONDS = 0.1
_RECONNECT_SECONDS_AT_MOST = 5.0
_HEARTBEAT_SECONDS = 15.0

_log = logging.getLogger(__name__)

_TRY_AGAIN = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shut down, starting up, statement time-out
    asyncpg.InsufficientResourcesError,  # too many connections
    asyncpg.LockNotAvailableError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.TransactionRollbackError,  # deadlock, serialization failure
)
_GONE = ("closed", "closing", "released")


def _translate(error: BaseException) -> Exception | None:
    if (
        isinstance(error, _TRY_AGAIN)
        or _was_never_sent(error)
        or (isinstance(error, asyncpg.InterfaceError) and any(word in str(error) for word in _GONE))
    ):
        return Unavailable("The database cannot be reached or is too busy just now. Try again in a moment.")
    if isinstance(error, asyncpg.IntegrityConstraintViolationError):
        return IntegrityError(error)
    if isinstance(error, asyncpg.SyntaxOrAccessError | asyncpg.DataError):
        return OperationalError(error)
    if isinstance(error, asyncpg.InvalidTransactionStateError):
        return TransactionManagementError(error)
    return None


def _was_never_sent(error: BaseException) -> bool:
    """Whether the connection refused to begin: the server ended it while it was idle, and only half of that, the
    message without the end of the stream, has been read yet. Such a statement can be repeated on another one."""
    return isinstance(error, asyncpg.InternalClientError) and "another operation" in str(error)


def _raise_translated(error: BaseException) -> None:
    if (translated := _translate(error)) is not None:
        raise translated from error


class PostgresClient(AsyncpgDBClient):
    """Tortoise's client for one PostgreSQL database, and the raw path beside it."""

    def __init__(
        self,
        dsn: str,
        pool_size: int,
        statement_seconds: float,
        lock_seconds: float,
        connection_name: str,
    ) -> None:
        super().__init__(connection_name=connection_name)
        self._dsn = dsn
        self._statement_seconds = statement_seconds
        self._lock_seconds = lock_seconds
        self._connections: Pool[Connection] = Pool(
            size=pool_size,
            wait_seconds=_ACQUIRE_SECONDS,
            connect=self.connect,
            is_usable=lambda connection: not connection.is_closed(),
            clean=self._clean,
            abandon=lambda connection: connection.terminate(),
            close=lambda connection: connection.close(timeout=_CLEAN_SECONDS),
        )

    async def create_connection(self, with_db: bool) -> None:
        """Connect once, so that a wrong address or password shows at the start."""
        await self._post_connect()
        self._connections.release(await self._connections.acquire())

    async def close(self) -> None:
        await self._connections.close()

    async def connect(self) -> Connection:
        """A new connection with the settings in force here. The caller closes it. `Unavailable` when refused."""
        try:
            return await asyncpg.connect(
                self._dsn,
                timeout=_CONNECT_SECONDS,
                # The server ends a statement first; this is for a server that no longer answers.
                command_timeout=self._statement_seconds + _ANSWER_GRACE_SECONDS,
                statement_cache_size=512,  # more than the application has statements: prepared once each
                server_settings={
                    "application_name": "sunset",
                    "timezone": "UTC",
                    "statement_timeout": f"{self._statement_seconds * 1000:.0f}",
                    "lock_timeout": f"{self._lock_seconds * 1000:.0f}",
                    "idle_in_transaction_session_timeout": f"{self._statement_seconds * 1000:.0f}",
                    "jit": "off",  # compiling costs more than these short statements
                    "max_parallel_workers_per_gather": "0",  # starting workers costs more, too
                    "plan_cache_mode": "force_generic_plan",  # plan once, not at every execution
                    "tcp_keepalives_idle": "60",
                },
            )
        except Exception as error:
            _raise_translated(error)
            raise

    async def _clean(self, connection: Connection) -> None:
        async with asyncio.timeout(_CLEAN_SECONDS):
            # Waits for the cancellation of a statement that was interrupted; outside a transaction it only warns.
            await connection.execute("ROLLBACK")

    # What app.db.transaction asks of a backend.

    async def check_out(self) -> Connection:
        return await self._connections.acquire()

    async def check_in(self, connection: Connection, *, failed: bool) -> None:
        if failed:
            await self._connections.recover(connection)
        else:
            self._connections.release(connection)

    async def begin(self) -> Connection:
        while True:
            connection = await self._connections.acquire()
            try:
                await connection.execute("BEGIN")
            except BaseException as error:
                await self._connections.recover(connection)
                if _was_never_sent(error):
                    continue  # recovering has dropped it, so this ends
                _raise_translated(error)
                raise
            return connection

    async def finish(self, connection: Connection, *, commit: bool) -> None:
        if not commit:
            await self._connections.recover(connection)
            return
        try:
            answer = await connection.execute("COMMIT")
        except BaseException as error:
            await self._connections.recover(connection)
            _raise_translated(error)
            raise
        self._connections.release(connection)
        if answer != "COMMIT":
            raise TransactionManagementError(
                "The transaction was rolled back: a statement in it had failed, and its error was swallowed."
            )

    async def savepoint(self, connection: Connection, statement: str) -> None:
        try:
            await connection.execute(statement)
        except Exception as error:
            _raise_translated(error)
            raise

    def translate(self, error: BaseException) -> Exception | None:
        return _translate(error)

    def tell(self, channel: str, payload: str) -> None:
        """Nothing: the server delivers on commit what `notify` has sent in the transaction."""

    # What Tortoise asks of a client.

    def acquire_connection(self) -> Any:
        return Lease(self)

    def _in_transaction(self) -> TransactionContext:
        return block(self)

    async def _translate_exceptions(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return await func(self, *args, **kwargs)  # the lease has translated

    async def execute_many(self, query: str, values: list[Any]) -> None:
        async with Lease(self) as connection:
            await connection.executemany(query, values)  # all or nothing by itself

    # The raw path.

    async def fetch(self, sql: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        values = [_argument(value) for value in args]
        while True:
            try:
                async with Lease(self) as connection:
                    return [dict(record) for record in await connection.fetch(sql, *values)]
            except Unavailable as error:
                if current(self) is None and error.__cause__ is not None and _was_never_sent(error.__cause__):
                    continue  # the lease has dropped that connection, so this ends
                raise

    async def execute(self, sql: str, args: tuple[Any, ...]) -> int:
        async with Lease(self) as connection:
            answer: str = await connection.execute(sql, *[_argument(value) for value in args])
        count = answer.rpartition(" ")[2]
        return int(count) if count.isdigit() else 0

    async def notify(self, channel: str, payload: str) -> None:
        await self.fetch("SELECT pg_notify($1, $2)", (channel, payload))

    @asynccontextmanager
    async def listen(self, channel: str, tell: Tell) -> AsyncIterator[None]:
        keeper = asyncio.create_task(self._keep_listening(channel, tell))
        try:
            yield
        finally:
            keeper.cancel()
            await asyncio.wait([keeper])

    async def _keep_listening(self, channel: str, tell: Tell) -> None:
        """LISTEN on a connection of its own, again and again: it stays open, what is lost is told and reconnects.

        Asked now and then whether it is still there: a server that has vanished ends no connection."""
        pause = _RECONNECT_SECONDS
        while True:
            lost = asyncio.Event()
            try:
                connection = await self.connect()
                try:
                    connection.add_termination_listener(lambda _, lost=lost: lost.set())
                    await connection.add_listener(channel, lambda *heard: tell(heard[-1]))
                    pause = _RECONNECT_SECONDS
                    tell(None)
                    try:
                        while not await _set_within(lost, _HEARTBEAT_SECONDS):
                            await connection.execute("SELECT 1")
                    finally:
                        tell(None)
                finally:
                    with suppress(Exception):  # a server that does not answer must not hide that the task was canceled
                        await connection.close(timeout=_CLEAN_SECONDS)
            except Exception as error:
                # Whatever it was, the listener's own time-out finds the work meanwhile.
                _log.warning("Listening to the database failed (%s); trying again.", type(error).__name__)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RECONNECT_SECONDS_AT_MOST)


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


def _argument(value: Any) -> Any:
    return utc(value) if isinstance(value, datetime) else value


client_class = PostgresClient
