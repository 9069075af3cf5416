"""How often the mutations that change a cancellation may be sent: by one caller, and about one account.

An allowance is a minute's number of attempts, which come back evenly (GCRA). One row tells all of it: the time at which
the allowance will be whole again. The database counts, so that all processes count together, and by its own clock: the
development clock gives nobody attempts back. What is stored of a caller is a hash.

It must not know the actions: each of them spends an attempt before it does anything else.
"""

import hashlib
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from typing import Any
from uuid import UUID

from app import accounts, db, errors
from app.auth import Call

_MINUTE = 60_000
"""Milliseconds."""


@dataclass(frozen=True, kw_only=True)
class _Allowance:
    key: str
    per_minute: int
    whose: str
    """For the refusal's message."""
    condition: str = "1 = 1"
    """Whether the caller may touch it, in SQL: `$1` is the key, `args` follow."""
    args: tuple[Any, ...] = ()

    @property
    def interval(self) -> int:
        """Milliseconds in which one attempt comes back: whole ones, because that is how times are stored."""
        return -(-_MINUTE // self.per_minute)

    @property
    def slack(self) -> int:
        """How many milliseconds before it is whole again an allowance still has an attempt left."""
        return (self.per_minute - 1) * self.interval


async def spend(call: Call, account_id: UUID | None) -> None:
    """Count one attempt of the caller's to change the cancellation of the account. `account_id` is None for an id that
    is malformed or unknown, which counts for the caller alone.

    To be called before the action's transaction, so that attempts that are refused there count too. Raises
    `RateLimited` when the caller's or the account's allowance is used up, and then uses neither. Those who may manage
    its billing, and the bearers of its links, share an account's; staff shares another one. So who merely knows the id,
    or is a member without a say, can lock nobody out, and members cannot lock out the billing team.
    """
    key = caller_key(call.identity.issuer, call.identity.subject)
    callers = _Allowance(key=key, per_minute=call.installation.rate_limit_caller, whose="you")
    await _use(callers)
    try:
        for shared in _of_account(call, account_id):
            await _use(shared)
    except errors.RateLimited:
        await _give_back(callers)
        raise


def caller_key(issuer: str, subject: str) -> str:
    """The same for all tokens and links of one person; it does not tell who that is."""
    return "caller:" + hashlib.sha256(f"{issuer}\0{subject}".encode()).hexdigest()


_MAY_MANAGE = (
    "EXISTS (SELECT 1 FROM member m WHERE m.account_id = $2 AND m.issuer = $3 AND m.subject = $4 "
    f"AND {accounts.has_billing_permission_sql('m')})"
)
_IS_STAFF = (
    "EXISTS (SELECT 1 FROM account a, staff s "
    "WHERE a.id = $2 AND s.issuer = $3 AND s.subject = $4 AND s.deactivated_at IS NULL)"
)


def _of_account(call: Call, account_id: UUID | None) -> list[_Allowance]:
    """The account's allowances that the caller may have a share in."""
    identity, grant = call.identity, call.identity.grant
    if account_id is None or (grant is not None and grant.account_id != account_id):
        return []

    def shared(key: str, whose: str, condition: str) -> _Allowance:
        return _Allowance(
            key=key,
            per_minute=call.installation.rate_limit_account,
            whose=whose,
            condition=condition,
            args=(account_id, identity.issuer, identity.subject),
        )

    members, staff = _account_keys(account_id)
    found = [shared(members, "all who manage this account together", _MAY_MANAGE)]
    if grant is None:
        found.append(shared(staff, "all of the staff together, about this account", _IS_STAFF))
    return found


def _account_keys(account_id: UUID) -> tuple[str, str]:
    return f"account:{account_id}", f"account:{account_id}:staff"


async def _use(allowance: _Allowance) -> None:
    """In one statement, which PostgreSQL carries out under the row's lock: of attempts at the same time, exactly as
    many get through as the allowance has left."""
    if allowance.per_minute == 0:
        return
    now, interval = db.database_now_sql(), allowance.interval
    async with _turn():
        used = await db.fetch_one(
            f"INSERT INTO rate_limit (key, whole_at) SELECT CAST($1 AS VARCHAR), {_later(now, interval)} "
            f"WHERE {allowance.condition} ON CONFLICT (key) DO UPDATE "
            f"SET whole_at = {_later(_latest('rate_limit.whole_at', now), interval)} "
            f"WHERE rate_limit.whole_at <= {_later(now, allowance.slack)} RETURNING whole_at",
            allowance.key,
            *allowance.args,
        )
    if used is not None:
        return
    row = await db.fetch_one(
        f"SELECT whole_at, {now} AS now FROM rate_limit WHERE key = $1 AND {allowance.condition}",
        allowance.key,
        *allowance.args,
    )
    if row is None:  # Not the caller's to use.
        return
    wait = db.as_datetime(row["whole_at"]) - db.as_datetime(row["now"]) - timedelta(milliseconds=allowance.slack)
    seconds = max(1, ceil(wait.total_seconds()))
    raise errors.RateLimited(
        f"Too many attempts in a short time, by {allowance.whose}. Nothing was done. "
        f"Try again in {seconds} second{'' if seconds == 1 else 's'}.",
        retry_after=seconds,
    )


async def _give_back(allowance: _Allowance) -> None:
    if allowance.per_minute == 0:
        return
    async with _turn():
        await db.execute(
            f"UPDATE rate_limit SET whole_at = {_later('whole_at', -allowance.interval)} WHERE key = $1", allowance.key
        )


async def forget_account(account_id: UUID) -> None:
    """Remove an account's allowance, within the transaction that erases its data."""
    await db.execute("DELETE FROM rate_limit WHERE key IN ($1, $2)", *_account_keys(account_id))


async def forget(*, limit: int = 1_000) -> int:
    """Remove allowances that are whole again, which changes nothing for anybody. Up to `limit`; returns how many."""
    now = db.database_now_sql()
    async with _turn():
        return await db.execute(
            f"DELETE FROM rate_limit WHERE whole_at <= {now} AND key IN (SELECT key FROM rate_limit "
            f"WHERE whole_at <= {now} ORDER BY whole_at LIMIT {limit:d}{db.for_update(skip_locked=True)})"
        )


def _turn() -> AbstractAsyncContextManager[Any]:
    """Around one statement that writes. On SQLite it takes its turn among the transactions; on PostgreSQL, where it
    waits for its row alone, it is a transaction by itself."""
    return db.transaction() if db.dialect() == "sqlite" else nullcontext()


def _later(moment: str, milliseconds: int) -> str:
    if db.dialect() == "postgresql":
        return f"{moment} + interval '{milliseconds} milliseconds'"
    return f"strftime('%Y-%m-%d %H:%M:%f', {moment}, '{milliseconds / 1000:+.3f} seconds') || '000+00:00'"


def _latest(one: str, other: str) -> str:
    return f"{'greatest' if db.dialect() == 'postgresql' else 'max'}({one}, {other})"
