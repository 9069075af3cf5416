"""An account's status as it changes, for who may see it: first as it is, then each change, in order, without gaps.

Every change is read from the account's history, one at a time and each for a caller who is asked for anew: hints
(`app.changes`) only say when to look. So nothing has to be kept for a reader who is slow, nothing is lost with a lost
connection to the database, and whoever loses access is told nothing more.

Knows no transport and no GraphQL.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from app import auth, db, errors, history
from app.accounts import AccountView
from app.auth import Call, Caller, Installation
from app.changes import Watch
from app.lifecycle import AccountStatus

LOOK_AGAIN: Final = timedelta(minutes=5)
"""What no hint tells of, a row that an operator has changed by hand, is seen within this time."""

_RETRY_SECONDS: Final = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change, or at first none, and the account as it is by now."""

    caller: Caller
    account: AccountView
    status: AccountStatus
    """After the change."""
    epoch: int
    sequence: int
    occurred_at: datetime | None
    """None at first."""


async def follow(
    authenticate: Callable[[], Awaitable[Call]], account_ids: Sequence[UUID | None], installation: Installation
) -> AsyncGenerator[Change, None]:
    """Each account's status now, then each change of one of them.

    `authenticate` answers whose call it still is, before anything is told. Ends with what it raises, with
    `AccessRemoved` for a member whose account is canceled, with `Forbidden` for who may not see one of the accounts, or
    may not any more, and with `Unavailable` when the service is stopping. While the database is away it waits. An id is
    None where it is malformed: that answers like an unknown one.
    """
    with installation.changes.watch([one for one in account_ids if one is not None]) as watch:
        follower = _Follower(authenticate, installation, watch)
        changed = account_ids
        while True:
            for account_id in changed:
                while (change := await follower.next_of(account_id)) is not None:
                    yield change
                    if change.sequence == change.account.sequence:
                        break  # what was committed since is hinted at
            hinted = await follower.wait()
            changed = [account_id for account_id in account_ids if account_id in hinted]


class _Follower:
    """How far one caller was told of each account, and how long that may stand without looking again."""

    def __init__(self, authenticate: Callable[[], Awaitable[Call]], installation: Installation, watch: Watch) -> None:
        self._authenticate = authenticate
        self._installation = installation
        self._watch = watch
        self._told: dict[UUID, int] = {}
        self._stands_until: dict[UUID, float] = {}
        """By the event loop's clock."""

    async def wait(self) -> Collection[UUID]:
        """Until there is a hint, or what was told may not stand any more: which accounts to look at again."""
        left = min(self._stands_until.values()) - asyncio.get_running_loop().time()
        async with self._watch.until_the_end():
            return await self._watch.wait(max(left, _RETRY_SECONDS / 10))

    async def next_of(self, account_id: UUID | None) -> Change | None:
        """The next thing to tell of the account, if there is one."""
        async with self._watch.until_the_end():
            while True:
                try:
                    async with self._installation.changes.turns, db.deadline(self._installation.request_timeout):
                        return await self._look(account_id)
                except errors.Unavailable:
                    await asyncio.sleep(_RETRY_SECONDS)

    async def _look(self, account_id: UUID | None) -> Change | None:
        call = await self._authenticate()
        caller = await auth.identify(call, account_id)
        account = caller.see_status()
        if account is None:
            raise errors.Forbidden(
                "One of the accounts does not exist, or you may not see it; the two are not told apart."
            )
        self._note_until_when(caller, account)
        told = self._told.get(account.id)
        if told == account.sequence:
            return None
        step = None if told is None else await history.next_after(account.id, told)
        change = Change(
            caller=caller,
            account=account,
            status=step.account_status if step else account.status,
            epoch=step.epoch if step else account.epoch,
            sequence=step.sequence if step else account.sequence,
            occurred_at=step.occurred_at if step else None,
        )
        self._told[account.id] = change.sequence
        return change

    def _note_until_when(self, caller: Caller, account: AccountView) -> None:
        """A token expires, and a scheduled cancellation takes effect, without a hint."""
        ends = [LOOK_AGAIN, self._installation.tokens.lifetime_left(caller.identity)]
        if account.cancellation_effective_at is not None and account.cancellation_effective_at > caller.now:
            ends.append(account.cancellation_effective_at - caller.now)
        self._stands_until[account.id] = asyncio.get_running_loop().time() + min(ends).total_seconds()
