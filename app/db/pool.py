"""A bounded pool of connections that loses none, whatever is canceled or breaks and whenever.

One pool for both engines, because the rules are the same and each of them was once a defect of a library:

* a slot is free again after every outcome of every await, cancellation included;
* a connection on which anything went wrong is cleaned (or replaced) by a task of its own, so that a second
  cancellation cannot stop the cleaning half-way;
* waiting for a slot ends with `Unavailable`, never in a hang;
* a connection that the server dropped while it was idle is noticed and replaced when it is wanted.

It knows neither SQL nor an engine. The way out of the good path is a plain call: no await, no task, no query.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Generic, TypeVar

from app.errors import Unavailable

C = TypeVar("C")


class Pool(Generic[C]):
    """At most `size` connections, made when they are wanted and kept until `close()`.

    `connect` opens one; `is_usable` says without I/O whether an idle one still lives; `clean` ends whatever an
    interrupted user left running on it, or raises; `abandon` drops it without waiting; `close` ends it in order.
    """

    def __init__(
        self,
        *,
        size: int,
        wait_seconds: float,
        connect: Callable[[], Awaitable[C]],
        is_usable: Callable[[C], bool],
        clean: Callable[[C], Awaitable[None]],
        abandon: Callable[[C], None],
        close: Callable[[C], Awaitable[None]],
    ) -> None:
        self._slots = asyncio.Semaphore(size)
        self._wait_seconds = wait_seconds
        self._connect = connect
        self._is_usable = is_usable
        self._clean = clean
        self._abandon = abandon
        self._close = close
        self._idle: list[C] = []
        self._recovering: set[asyncio.Task[None]] = set()
        self._closed = False

    async def acquire(self) -> C:
        """A connection that is the caller's until `release` or `recover`. Refuses with `Unavailable` when none is
        free within the pool's waiting time, or when the pool is closed."""
        if self._closed:
            raise Unavailable("The database connection is closed.")
        if self._slots.locked():
            try:
                async with asyncio.timeout(self._wait_seconds):
                    await self._slots.acquire()
            except TimeoutError:
                raise Unavailable("All database connections are busy. Try again in a moment.") from None
        else:
            await self._slots.acquire()
        try:
            while self._idle:
                connection = self._idle.pop()  # the one used last: its caches are warm
                if self._is_usable(connection):
                    return connection
                self._abandon(connection)
            return await self._connect()
        except BaseException:
            self._slots.release()
            raise

    def release(self, connection: C) -> None:
        """Give back a connection on which everything went well."""
        if self._closed or not self._is_usable(connection):
            self._abandon(connection)
        else:
            self._idle.append(connection)
        self._slots.release()

    async def recover(self, connection: C) -> None:
        """Give back a connection on which something failed or was canceled; its slot is free once it is clean. Who was
        canceled does not wait for that: a server that no longer answers must not keep them."""
        task = asyncio.create_task(self._recover(connection))
        self._recovering.add(task)
        task.add_done_callback(self._recovering.discard)
        user = asyncio.current_task()
        if user is None or not user.cancelling():
            await asyncio.shield(task)

    async def _recover(self, connection: C) -> None:
        usable = False
        try:
            # What cannot be cleaned is replaced: the caller is told of the first failure, not of this one.
            with suppress(Exception):
                await self._clean(connection)
                usable = True
        finally:
            if usable:
                self.release(connection)
            else:
                self._abandon(connection)
                self._slots.release()

    async def close(self) -> None:
        """Close what is idle, after what is being cleaned. What is still in use closes when it comes back."""
        self._closed = True
        if self._recovering:
            await asyncio.gather(*self._recovering, return_exceptions=True)
        while self._idle:
            await self._close(self._idle.pop())
