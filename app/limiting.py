"""How often the mutations that change a cancellation may be sent: by one caller, and about one account.

An allowance is a minute's number of attempts, which come back evenly (GCRA). One row tells all of it: the time at which
the allowance will be whole again. The database counts, so that all processes count together, and by its own clock: the
development clock gives nobody attempts back. What is stored of a caller is a hash.

An allowance belongs to who may act, so that nobody can lock anybody else out:

* each caller has one of their own, and so has each emailed link, beside that of the person whom it was sent to;
* an account has one for each relation that gives the right to act: members, its Customer Success Manager, the billing
  team, and the bearers of its links of each kind;
* who may not act is refused before anything is counted. It costs a read, as asking does.

It must not know the actions: each of them asks to be admitted before it does anything else.
"""

import hashlib
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from typing import Any
from uuid import UUID

from app import db, errors
from app.auth import Call, authorize
from app.lifecycle import RULES, Action, Relation
from app.tokens import Identity

_MINUTE = 60_000
"""Milliseconds."""


@dataclass(frozen=True, kw_only=True)
class _Allowance:
    key: str
    per_minute: int
    whose: str
    """For the refusal's message."""

    @property
    def interval(self) -> int:
        """Milliseconds in which one attempt comes back: whole ones, because that is how times are stored."""
        return -(-_MINUTE // self.per_minute)

    @property
    def slack(self) -> int:
        """How many milliseconds before it is whole again an allowance still has an attempt left."""
        return (self.per_minute - 1) * self.interval


async def admit(
    call: Call, action: Action, account_id: UUID | None, *, what: str = "account", request_id: UUID | None = None
) -> None:
    """Count one attempt at an action by somebody who may act. `account_id` and `request_id` as for `auth.act_on`.

    To be called before the action's transaction, so that attempts that are refused there count too: that it is too
    early, that a token is wrong. Raises what `auth.authorize` raises before anything is counted, and what `spend`
    raises.
    """
    if call.installation.rate_limit_caller or call.installation.rate_limit_account:
        acting = await authorize(call, action, account_id, what=what, request_id=request_id)
        rights = RULES[action].who & acting.actor.relations
        await spend(call, acting.account.id, next(relation for relation in Relation if relation in rights))


async def spend(call: Call, account_id: UUID | None = None, by: Relation | None = None) -> None:
    """Count one attempt of somebody who may make it: with an account, about it, by what gives them the right.

    Raises `RateLimited` when their own allowance or that of the relation is used up, and then uses neither.
    """
    own = _Allowance(key=_own_key(call.identity), per_minute=call.installation.rate_limit_caller, whose="you")
    await _use(own)
    if account_id is None or by is None:
        return
    shared = _Allowance(
        key=_shared_key(account_id, by), per_minute=call.installation.rate_limit_account, whose=_WHOSE[by]
    )
    try:
        await _use(shared)
    except errors.RateLimited:
        await _give_back(own)
        raise


_LINKS = "all who have such a link to this account together"
_WHOSE = {
    Relation.BILLING_MEMBER: "all who manage this account together",
    Relation.ACCOUNT_CSM: "all Customer Success Managers together, about this account",
    Relation.BILLING_TEAM: "all of the billing team together, about this account",
    Relation.CONFIRM_LINK: _LINKS,
    Relation.FEEDBACK_LINK: _LINKS,
    Relation.RESTART_LINK: _LINKS,
}
"""The relations that give a right to act."""


def caller_key(issuer: str, subject: str) -> str:
    """The same for all tokens of one person; it does not tell who that is."""
    return f"caller:{_hash(issuer, subject)}"


def _own_key(identity: Identity) -> str:
    """A link's goes by what it grants, and begins with its account's key, to be forgotten with it."""
    grant = identity.grant
    if grant is None:
        return caller_key(identity.issuer, identity.subject)
    granted = _hash(grant.purpose, str(grant.request_id), str(grant.generation), grant.issuer, grant.subject)
    return f"{_account_key(grant.account_id)}:{granted[:32]}"


def _shared_key(account_id: UUID, by: Relation) -> str:
    return _account_key(account_id) if by is Relation.BILLING_MEMBER else f"{_account_key(account_id)}:{by}"


def _account_key(account_id: UUID) -> str:
    return f"account:{account_id}"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


async def _use(allowance: _Allowance) -> None:
    """In one statement, which PostgreSQL carries out under the row's lock: of attempts at the same time, exactly as
    many get through as the allowance has left."""
    if allowance.per_minute == 0:
        return
    now, interval = db.database_now_sql(), allowance.interval
    async with _turn():
        used = await db.fetch_one(
            f"INSERT INTO rate_limit (key, whole_at) VALUES ($1, {_later(now, interval)}) ON CONFLICT (key) DO UPDATE "
            f"SET whole_at = {_later(_latest('rate_limit.whole_at', now), interval)} "
            f"WHERE rate_limit.whole_at <= {_later(now, allowance.slack)} RETURNING whole_at",
            allowance.key,
        )
    if used is not None:
        return
    row = await db.fetch_one(f"SELECT whole_at, {now} AS now FROM rate_limit WHERE key = $1", allowance.key)
    if row is None:  # The account was erased at this moment.
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
    """Remove an account's allowances, and those of its links, within the transaction that erases its data."""
    key = _account_key(account_id)
    await db.execute("DELETE FROM rate_limit WHERE key = $1 OR key LIKE $2", key, f"{key}:%")


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
