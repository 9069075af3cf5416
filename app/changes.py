"""Hints that an account has changed, from whoever changes one to whoever watches it, in every process.

A hint says "look again" and never what there is to see: that is in the database, and who may see it is asked there.
A hint may come too often, and one that is lost is made good: every loss that can be noticed is a hint about everything.

Knows accounts' ids and nothing else of them.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from uuid import UUID

from app import db, errors

CHANNEL = "account_changed"

_NAMED_AT_ONCE = 200
"""As many accounts as one notification holds, in PostgreSQL's 8,000 bytes."""


async def announce(account_ids: Iterable[UUID]) -> None:
    """Something about these accounts, or about who may see them, has changed; told when the transaction commits."""
    names = list(map(str, account_ids))
    for begin in range(0, len(names), _NAMED_AT_ONCE):
        await db.notify(CHANNEL, " ".join(names[begin : begin + _NAMED_AT_ONCE]))


async def announce_all() -> None:
    """Anything may have changed."""
    await db.notify(CHANNEL)


class Watch:
    """What one watcher has to look at again. Hints are kept as a set of accounts: it grows no further."""

    __slots__ = ("_changed", "_ids", "_is_over", "_looking", "_woken")

    def __init__(self, account_ids: Collection[UUID]) -> None:
        self._ids = frozenset(account_ids)
        self._changed: set[UUID] = set()
        self._woken = asyncio.Event()
        self._looking: asyncio.Timeout | None = None
        self._is_over = False

    def hint(self, account_id: UUID) -> None:
        self._changed.add(account_id)
        self._woken.set()

    def end(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        if self._looking is not None:
            self._looking.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def until_the_end(self) -> AsyncIterator[None]:
        """`async with`: whatever is waited for in the block, `Unavailable` ends it when the service is stopping."""
        try:
            async with asyncio.timeout(0 if self._is_over else None) as self._looking:
                yield
        except TimeoutError:
            raise errors.Unavailable("The service is stopping. Connect again in a moment.") from None
        finally:
            self._looking = None

    async def wait(self, seconds: float) -> Collection[UUID]:
        """The accounts that there were hints about since the last time, as soon as there is one; after `seconds`
        without, all of them."""
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return self._ids
        self._woken.clear()
        changed, self._changed = self._changed, set()
        return changed


class Changes:
    """All watchers of one process. They are told while `listening` lasts, and of nothing before."""

    def __init__(self) -> None:
        self._watches: dict[UUID, set[Watch]] = {}
        self._is_over = False
        self.turns = asyncio.Semaphore(4)
        """For watchers that look at the database: however many have to, they leave connections for everybody else."""

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Tell watchers what other processes, and this one, announce in the bound database. Ends them afterwards."""
        self._is_over = False
        async with db.hear(CHANNEL, self._tell):
            try:
                yield
            finally:
                self.end()

    @contextmanager
    def watch(self, account_ids: Collection[UUID]) -> Iterator[Watch]:
        """Hints about these accounts are kept from now on, for as long as the block lasts."""
        watch = Watch(account_ids)
        for account_id in account_ids:
            self._watches.setdefault(account_id, set()).add(watch)
        if self._is_over:
            watch.end()
        try:
            yield watch
        finally:
            for account_id in account_ids:
                others = self._watches[account_id]
                others.discard(watch)
                if not others:
                    del self._watches[account_id]

    def end(self) -> None:
        """Nobody watches any more: the service is stopping. To be repeated as one likes."""
        self._is_over = True
        for watches in self._watches.values():
            for watch in watches:
                watch.end()

    def hint(self, account_id: UUID) -> None:
        """Let who watches this account look again."""
        for watch in self._watches.get(account_id, ()):
            watch.hint(account_id)

    def hint_all(self) -> None:
        """Let everybody look again at everything that they watch."""
        for account_id in self._watches:
            self.hint(account_id)

    def __len__(self) -> int:
        """How many accounts are watched."""
        return len(self._watches)

    def _tell(self, payload: str | None) -> None:
        if payload:
            for account_id in payload.split():
                self.hint(UUID(account_id))
        else:
            self.hint_all()
