"""The outbox: messages that are rows of the transaction they tell of, delivered at least once.

The only owner of its table. `put` joins the caller's transaction. A worker claims what is due, with a lease: the
claim pushes `due_at` to the lease's end, so a worker that dies gives its messages back by doing nothing. `settle`
is fenced: only the holder of the lease can mark a message, so a worker that was thought dead cannot undo what
another one did since. Copies of one message share its Message-ID. What cannot be delivered ends as a dead letter,
which stays visible.

Knows rows and times, and neither SMTP nor templates.
"""

import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Self
from uuid import UUID

import orjson

from app import accounts, db, errors, tracing
from app.errors import Contact
from app.messages import CATALOGUE, Email, pack, unpack
from app.models import OutboxMessage

CHANNEL = "sunset_outbox"
"""Woken, after the commit, by each transaction that puts a message."""

LEASE = timedelta(minutes=5)
"""Longer than a delivery may take; a delivery has a deadline of its own."""

MAX_ATTEMPTS = 30
"""With the waits below: tried for three days at least, whatever chance makes of them."""

KEPT = timedelta(days=180)
"""How long a message that was delivered can be looked up."""

_OPEN = "delivered_at IS NULL AND dead_at IS NULL AND dropped_at IS NULL"
"""Not settled."""

_COUNTED = 100_000

_FIRST_WAIT = timedelta(seconds=10)
_LONGEST_WAIT = timedelta(hours=8)


@dataclass(frozen=True, kw_only=True)
class Addressed:
    """An email and the one person it goes to."""

    to: Contact
    email: Email


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """A message that this worker alone may deliver until its lease ends. `attempt` counts from 1."""

    id: UUID
    lease: UUID
    account_id: UUID | None
    template: str
    facts: dict[str, Any]
    recipient_name: str
    recipient_address: str
    message_id: str
    created_at: datetime
    attempt: int
    traceparent: str | None
    """The trace in which it was promised."""

    def email(self) -> Email:
        """What it says. Raises KeyError or ValueError for a row of a version that this one cannot read."""
        return unpack(self.template, self.facts)


async def put(messages: Iterable[Addressed], *, account_id: UUID | None, now: datetime, mail_domain: str) -> None:
    """Promise the messages within the open transaction, each with its Message-ID, due at once."""
    rows = []
    for message in messages:
        assert message.email.template in CATALOGUE
        id_ = db.uuid7()
        rows.append(
            OutboxMessage(
                id=id_,
                account_id=account_id,
                template=message.email.template,
                recipient_name=message.to.name,
                recipient_address=message.to.email,
                facts=pack(message.email),
                message_id=f"<{id_.hex}@{mail_domain}>",
                created_at=now,
                due_at=now,
                traceparent=tracing.traceparent(),
            )
        )
    if rows:
        await OutboxMessage.bulk_create(rows)
        await db.notify(CHANNEL)


async def claim(limit: int) -> list[Claimed]:
    """Take up to `limit` due messages, oldest first. No two workers get the same one while its lease lasts."""
    lease = db.uuid7()
    async with db.transaction():
        now = await db.now()
        rows = await db.fetch(
            "UPDATE outbox SET lease = $1, due_at = $2, attempts = attempts + 1 WHERE id IN ("
            f"SELECT id FROM outbox WHERE {_OPEN} AND due_at <= $3 "
            f"ORDER BY due_at LIMIT {int(limit)}{db.for_update(skip_locked=True)}) RETURNING *",
            lease,
            now + LEASE,
            now,
        )
    return [
        Claimed(
            id=db.as_uuid(row["id"]),
            lease=lease,
            account_id=db.as_uuid(row["account_id"]),
            template=row["template"],
            facts=orjson.loads(row["facts"]),
            recipient_name=row["recipient_name"],
            recipient_address=row["recipient_address"],
            message_id=row["message_id"],
            created_at=db.as_datetime(row["created_at"]),
            attempt=row["attempts"],
            traceparent=row["traceparent"],
        )
        for row in sorted(rows, key=lambda row: str(row["id"]))
    ]


async def delivered(message: Claimed) -> bool:
    """Mark it delivered. False when the lease was lost meanwhile: somebody else has it."""
    kept = await _settle(message, f"delivered_at = $3, last_error = NULL{_erased(message.template)}", await db.now())
    await _scrub(message.template)
    return kept


async def failed(message: Claimed, error: str, *, permanent: bool) -> bool:
    """Note the failure: another try after a wait, or a dead letter. False when the lease was lost meanwhile."""
    now = await db.now()
    if is_last(message, permanent=permanent):
        # A server's words may name the recipient.
        said = "It was not delivered, and is erased." if _erased(message.template) else error
        kept = await _settle(message, f"dead_at = $3, last_error = $4{_erased(message.template)}", now, said)
        await _scrub(message.template)
        return kept
    return await _settle(message, "due_at = $3, last_error = $4", now + backoff(message.attempt), error)


def is_last(message: Claimed, *, permanent: bool) -> bool:
    """Whether a failure of this try makes it a dead letter."""
    return permanent or message.attempt >= MAX_ATTEMPTS


async def release(message: Claimed) -> bool:
    """Give it back untried, for another worker to take at once: for a worker that is stopping."""
    return await _settle(message, "due_at = $3, attempts = attempts - 1", await db.now())


def _erased(template: str) -> str:
    """Of a message to somebody whose data is gone, nothing is kept but what became of it."""
    kind = CATALOGUE.get(template)
    if kind is None or not kind.erased_when_settled:
        return ""
    return ", recipient_name = '', recipient_address = '', facts = '{}'"


async def _scrub(template: str) -> None:
    if _erased(template):
        await db.scrub()


async def _settle(message: Claimed, assignments: str, *args: Any) -> bool:
    changed = await db.execute(
        f"UPDATE outbox SET lease = NULL, {assignments} WHERE id = $1 AND lease = $2 AND {_OPEN}",
        message.id,
        message.lease,
        *args,
    )
    return changed == 1


def backoff(attempt: int) -> timedelta:
    """The wait after that many failed tries: doubling from ten seconds to eight hours, half of it at random, so
    that what failed together does not come back together."""
    longest: timedelta = min(_FIRST_WAIT * 2 ** min(attempt - 1, 20), _LONGEST_WAIT)
    return longest * (0.5 + random.random() / 2)  # noqa: S311  spreads load; not a secret


async def forget(copies: Callable[[Sequence[str]], Awaitable[None]], *, limit: int = 1_000) -> int:
    """Delete settled messages that are older than `KEPT`, up to `limit`; dead letters stay until they are dropped.
    `copies` takes away, first, what is kept of them outside of the database: it is found by these rows alone. Returns
    how many."""
    rows = await db.fetch(
        "SELECT id, message_id FROM outbox WHERE created_at < $1 "
        f"AND (delivered_at IS NOT NULL OR dropped_at IS NOT NULL) ORDER BY created_at LIMIT {int(limit)}",
        await db.now() - KEPT,
    )
    if not rows:
        return 0
    await copies([row["message_id"] for row in rows])
    marks = ", ".join(f"${index}" for index in range(1, len(rows) + 1))
    return await db.execute(f"DELETE FROM outbox WHERE id IN ({marks})", *(db.as_uuid(row["id"]) for row in rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class Depth:
    """How many messages are not delivered, at `now`, and since when."""

    now: datetime
    due: int
    waiting: int
    """For the time of their next try."""
    claimed: int
    """By workers, which deliver them just now."""
    oldest_at: datetime | None
    """When the oldest of these was promised."""
    dead: int
    oldest_dead_at: datetime | None


async def depth() -> Depth:
    """How full it is. Of more than 100,000 messages that are not settled, the first to be due are counted."""
    now = await db.now()
    row = await db.fetch_one(
        "SELECT COUNT(CASE WHEN due_at <= $1 THEN 1 END) AS due, "
        "COUNT(CASE WHEN due_at > $1 AND lease IS NULL THEN 1 END) AS waiting, "
        "COUNT(CASE WHEN due_at > $1 AND lease IS NOT NULL THEN 1 END) AS claimed, MIN(created_at) AS oldest_at, "
        "(SELECT COUNT(*) FROM outbox WHERE dead_at IS NOT NULL) AS dead, "
        "(SELECT MIN(dead_at) FROM outbox WHERE dead_at IS NOT NULL) AS oldest_dead_at "
        f"FROM (SELECT due_at, lease, created_at FROM outbox WHERE {_OPEN} ORDER BY due_at LIMIT {_COUNTED}) counted",
        now,
    )
    assert row is not None
    return Depth(
        now=now,
        due=row["due"],
        waiting=row["waiting"],
        claimed=row["claimed"],
        oldest_at=db.as_datetime(row["oldest_at"]),
        dead=row["dead"],
        oldest_dead_at=db.as_datetime(row["oldest_dead_at"]),
    )


async def next_due() -> datetime | None:
    """When the next message is due; None when there is none."""
    row = await db.fetch_one(f"SELECT MIN(due_at) AS due_at FROM outbox WHERE {_OPEN}")
    return db.as_datetime(row["due_at"]) if row else None


# ------------------------------------------------------------------------------------- what operators see and do


class State(StrEnum):
    """Where a message is."""

    WAITING = "WAITING"
    DUE = "DUE"
    CLAIMED = "CLAIMED"
    DELIVERED = "DELIVERED"
    DEAD = "DEAD"
    DROPPED = "DROPPED"


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageView:
    """A message as it is stored, and its state when it was read."""

    id: UUID
    account_id: UUID | None
    template: str
    state: State
    recipient_name: str
    recipient_address: str
    """Empty when the recipient's data was erased: nothing can be sent to them any more."""
    facts: dict[str, Any]
    message_id: str
    created_at: datetime
    due_at: datetime
    attempts: int
    last_error: str | None
    delivered_at: datetime | None
    dead_at: datetime | None
    dropped_at: datetime | None

    @classmethod
    def of(cls, row: dict[str, Any]) -> Self:
        return cls(
            id=db.as_uuid(row["id"]),
            account_id=db.as_uuid(row["account_id"]),
            template=row["template"],
            state=State(row["state"]),
            recipient_name=row["recipient_name"],
            recipient_address=row["recipient_address"],
            facts=orjson.loads(row["facts"]),
            message_id=row["message_id"],
            created_at=db.as_datetime(row["created_at"]),
            due_at=db.as_datetime(row["due_at"]),
            attempts=row["attempts"],
            last_error=row["last_error"],
            delivered_at=db.as_datetime(row["delivered_at"]),
            dead_at=db.as_datetime(row["dead_at"]),
            dropped_at=db.as_datetime(row["dropped_at"]),
        )


_STATE = (
    "CASE WHEN delivered_at IS NOT NULL THEN 'DELIVERED' WHEN dead_at IS NOT NULL THEN 'DEAD' "
    "WHEN dropped_at IS NOT NULL THEN 'DROPPED' WHEN due_at <= $1 THEN 'DUE' "
    "WHEN lease IS NOT NULL THEN 'CLAIMED' ELSE 'WAITING' END"
)
"""At the time $1. A lease that has lapsed claims nothing."""

_IN_STATE: Mapping[State, str] = {
    State.WAITING: f"({_OPEN} AND due_at > $1 AND lease IS NULL)",
    State.DUE: f"({_OPEN} AND due_at <= $1)",
    State.CLAIMED: f"({_OPEN} AND due_at > $1 AND lease IS NOT NULL)",
    State.DELIVERED: "delivered_at IS NOT NULL",
    State.DEAD: "dead_at IS NOT NULL",
    State.DROPPED: "dropped_at IS NOT NULL",
}
"""The same as conditions that an index serves."""

_IN_HAND = f"(dead_at IS NOT NULL OR ({_OPEN} AND (lease IS NULL OR due_at <= $1)))"
"""Not delivered, not dropped, and no worker's at the time $1."""


async def page(
    states: frozenset[State] | None = None,
    *,
    account_id: UUID | None = None,
    after: tuple[Any, ...] | None = None,
    limit: int,
) -> list[MessageView]:
    """Up to `limit` messages in one of those states (None: in any), about that account (None: about any), newest
    first, behind the (created_at, id) `after`. One statement."""
    args: list[Any] = [await db.now()]
    conditions = []
    if states is not None:
        conditions.append("(" + (" OR ".join(_IN_STATE[state] for state in sorted(states)) or "1 = 0") + ")")
    if account_id is not None:
        args.append(account_id)
        conditions.append(f"account_id = ${len(args)}")
    if after is not None:
        args += after
        conditions.append(f"(created_at, id) < (${len(args) - 1}, ${len(args)})")
    rows = await db.fetch(
        f"SELECT *, {_STATE} AS state FROM outbox WHERE {' AND '.join(conditions) or '1 = 1'} "
        f"ORDER BY created_at DESC, id DESC LIMIT {int(limit)}",
        *args,
    )
    return [MessageView.of(row) for row in rows]


async def find(id_: UUID) -> MessageView | None:
    row = await db.fetch_one(f"SELECT *, {_STATE} AS state FROM outbox WHERE id = $2", await db.now(), id_)
    return MessageView.of(row) if row else None


async def retry(id_: UUID) -> None:
    """Make a message due now that is dead, or waits after a failure, with all its tries before it; it stays the same
    message, with its Message-ID. `Refusal` when it was delivered or dropped, while a worker has it, and when its
    recipient's data is gone."""
    async with db.transaction():
        message = await find(id_)
        if message is not None and message.account_id is not None:
            # A deletion erases what it has found settled, under this lock: nothing becomes due behind its back.
            await accounts.lock_row(message.account_id)
        changed = await db.execute(
            "UPDATE outbox SET due_at = $1, attempts = 0, lease = NULL, dead_at = NULL "
            f"WHERE id = $2 AND recipient_address <> '' AND {_IN_HAND}",
            await db.now(),
            id_,
        )
        if changed != 1:
            raise errors.Refusal(await _why_not(id_, "retried"))
        await db.notify(CHANNEL)


async def retry_dead() -> int:
    """The same for every dead letter whose recipient is still known. Returns how many."""
    rows = await db.fetch(
        "SELECT id FROM outbox WHERE dead_at IS NOT NULL AND recipient_address <> '' ORDER BY dead_at"
    )
    retried = 0
    for row in rows:
        with suppress(errors.Refusal):  # somebody else has settled it since
            await retry(db.as_uuid(row["id"]))
            retried += 1
    return retried


async def drop(id_: UUID) -> None:
    """Give a message up that was not delivered: it is never sent, and stays visible. `Refusal` when it was delivered
    or dropped, and while a worker has it."""
    async with db.transaction():
        dropped = await db.fetch_one(
            "UPDATE outbox SET dropped_at = $1, lease = NULL, dead_at = NULL "
            f"WHERE id = $2 AND {_IN_HAND} RETURNING template",
            await db.now(),
            id_,
        )
        if dropped is None:
            raise errors.Refusal(await _why_not(id_, "dropped"))
        if erased := _erased(dropped["template"]):
            await db.execute(f"UPDATE outbox SET last_error = NULL{erased} WHERE id = $1", id_)
    await _scrub(dropped["template"])


async def _why_not(id_: UUID, done: str) -> str:
    message = await find(id_)
    if message is None:
        return f"There is no message {id_}."
    if message.state is State.DELIVERED:
        return f"Message {id_} was delivered at {message.delivered_at:%Y-%m-%d %H:%M} UTC and cannot be {done}."
    if message.state is State.DROPPED:
        return f"Message {id_} was dropped at {message.dropped_at:%Y-%m-%d %H:%M} UTC and cannot be {done}."
    if message.state is State.CLAIMED:
        return f"Message {id_} is being delivered; a worker has it until {message.due_at:%H:%M:%S} UTC at most."
    return f"Message {id_} cannot be {done}: its recipient's data was erased. It can be dropped."
