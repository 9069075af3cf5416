"""Which connection a task must use: the one of its open transaction, or one of the pool.

Tortoise keeps the connection of a transaction in a context variable of its own, which every task started inside
inherits (and silently joins), and which keeps pointing at a transaction whose BEGIN failed. Here the variable is
set after BEGIN has succeeded, is emptied before the connection goes back, and names the task that may use it:

* the task that opened the transaction works in it, through the ORM and through raw SQL alike;
* a task that was started inside is refused with RuntimeError, during the transaction and after it. Joining would
  interleave two tasks on one connection; a connection of its own would neither see the transaction's rows nor be
  rolled back with it, and on SQLite would wait for its own parent. Long-lived tasks start outside, or bind the
  database for themselves (`Database.bind` begins without a transaction).
  `asyncio.wait_for` and `asyncio.gather` start tasks too; `asyncio.timeout` does not.

This module knows no engine; the two backends are its clients.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from tortoise.backends.base.client import TransactionContext

from app import tracing


class Backend(Protocol):
    """What a backend promises to the blocks below."""

    connection_name: str

    async def check_out(self) -> Any:
        """A connection outside any transaction."""

    async def check_in(self, connection: Any, *, failed: bool) -> None:
        """Take it back; after a failure, clean it first, also when the caller is canceled again."""

    async def begin(self) -> Any:
        """A connection with an open transaction. Keeps nothing when it fails or is canceled."""

    async def finish(self, connection: Any, *, commit: bool) -> None:
        """Commit or roll back, and take the connection back, whatever happens."""

    async def savepoint(self, connection: Any, statement: str) -> None: ...

    def translate(self, error: BaseException) -> Exception | None:
        """The exception that callers should see instead of the driver's, if there is one."""

    def tell(self, channel: str, payload: str) -> None: ...


class OpenTransaction:
    """A transaction after BEGIN. `hints`, channels with what they are told, go out when it is over (engines that
    notify in process); `committed` is called when it was committed."""

    __slots__ = ("backend", "committed", "connection", "hints", "savepoints", "task")

    def __init__(self, backend: Backend, connection: Any) -> None:
        self.backend = backend
        self.connection = connection
        self.task = asyncio.current_task()
        self.hints: set[tuple[str, str]] = set()
        self.committed: list[Callable[[], None]] = []
        self.savepoints = 0


_open: ContextVar[OpenTransaction | None] = ContextVar("sunset_transaction", default=None)


def current(backend: Backend) -> OpenTransaction | None:
    """The transaction that the running task has opened on `backend`. Refuses tasks started inside one."""
    transaction = _open.get()
    if transaction is None:
        return None
    if transaction.task is not asyncio.current_task():
        raise RuntimeError(
            "This task was started inside a database transaction and must not use the database. "
            "Start it outside the transaction, or let it bind the database itself."
        )
    return transaction if transaction.backend is backend else None


def refuse_inside_transaction(what: str) -> None:
    """RuntimeError when the running task, or the one that started it, has a transaction open on any database."""
    if _open.get() is not None:
        raise RuntimeError(f"{what} inside a database transaction is refused.")


def on_commit(callback: Callable[[], None]) -> None:
    """Call it when the task's transaction was committed; at once where there is none. It must not raise or wait."""
    transaction = _open.get()
    if transaction is None:
        callback()
    else:
        transaction.committed.append(callback)


@contextmanager
def detached() -> Iterator[None]:
    """Within the block the task is in no transaction: it does not inherit its starter's. Refused inside its own."""
    transaction = _open.get()
    if transaction is not None and transaction.task is asyncio.current_task():
        raise RuntimeError("Binding a database inside a database transaction is refused.")
    token = _open.set(None)
    try:
        yield
    finally:
        _open.reset(token)


class TransactionBlock(TransactionContext):
    """One transaction from BEGIN to COMMIT, or ROLLBACK when the block raises or is canceled."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.connection_name = backend.connection_name

    async def __aenter__(self) -> Any:
        refuse_inside_transaction("Opening a transaction")
        with tracing.statement(self.connection_name, "BEGIN"):
            connection = await self._backend.begin()
        self._transaction = OpenTransaction(self._backend, connection)
        _open.set(self._transaction)
        return self._backend

    async def __aexit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        transaction = self._transaction
        _open.set(None)
        try:
            with tracing.statement(self.connection_name, "COMMIT" if exc_type is None else "ROLLBACK"):
                await self._backend.finish(transaction.connection, commit=exc_type is None)
            if exc_type is None:
                for callback in transaction.committed:
                    callback()
        finally:
            # Also when the commit failed or was canceled, since it may have succeeded: a hint too many is harmless.
            for channel, payload in transaction.hints:
                self._backend.tell(channel, payload)


class SavepointBlock(TransactionContext):
    """What Tortoise opens for itself inside a transaction, `get_or_create` for example."""

    def __init__(self, backend: Backend, transaction: OpenTransaction) -> None:
        self._backend = backend
        self._transaction = transaction
        self.connection_name = backend.connection_name

    async def __aenter__(self) -> Any:
        self._transaction.savepoints += 1
        self._name = f"sunset_{self._transaction.savepoints}"
        await self._backend.savepoint(self._transaction.connection, f"SAVEPOINT {self._name}")
        return self._backend

    async def __aexit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        if exc_type is not None:
            await self._backend.savepoint(self._transaction.connection, f"ROLLBACK TO SAVEPOINT {self._name}")
        await self._backend.savepoint(self._transaction.connection, f"RELEASE SAVEPOINT {self._name}")


def block(backend: Backend) -> TransactionContext:
    """What Tortoise's `in_transaction` opens: a transaction, or a savepoint inside the task's own."""
    transaction = current(backend)
    return TransactionBlock(backend) if transaction is None else SavepointBlock(backend, transaction)


class Lease:
    """`async with` a connection for one statement: the transaction's own, or one of the pool.

    The driver's connection errors leave it as `Unavailable`, constraint violations as `IntegrityError`."""

    __slots__ = ("_backend", "_borrowed", "_connection")

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def __aenter__(self) -> Any:
        transaction = current(self._backend)
        self._borrowed = transaction is None
        self._connection = await self._backend.check_out() if transaction is None else transaction.connection
        if tracing.active():
            return tracing.Statements(self._connection, self._backend.connection_name)
        return self._connection

    async def __aexit__(self, exc_type: Any, exc_val: BaseException | None, exc_tb: Any) -> None:
        if self._borrowed:
            await self._backend.check_in(self._connection, failed=exc_val is not None)
        if exc_val is not None and (translated := self._backend.translate(exc_val)) is not None:
            raise translated from exc_val
