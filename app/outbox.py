"""The outbox: messages that are rows of the transaction they tell of, delivered at least once.

The only owner of its table. `put` joins the caller's transaction. A worker claims what is due, with a lease: the
claim pushes `due_at` to the lease's end, so a worker that dies gives its messages back by doing nothing. `settle`
is fenced: only the holder of the lease can mark a message, so a worker that was thought dead cannot undo what
another one did since. Copies of one message share its Message-ID. What cannot be delivered ends as a dead letter,
which stays visible.

Knows rows and times, and neither SMTP nor templates.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import orjson

from app import db
from app.messages import CATALOGUE, Email, pack, unpack
from app.models import OutboxMessage

CHANNEL = "sunset_outbox"
"""Woken, after the commit, by each transaction that puts a message."""

LEASE = timedelta(minutes=5)
"""Longer than a delivery may take; a delivery has a deadline of its own."""

MAX_ATTEMPTS = 30
"""With the waits below: tried for three days at least, whatever chance makes of them."""

_FIRST_WAIT = timedelta(seconds=10)
_LONGEST_WAIT = timedelta(hours=8)


@dataclass(frozen=True, kw_only=True)
class Addressed:
    """An email and the one person it goes to."""

    name: str
    address: str
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

    def email(self) -> Email:
        """What it says. Raises KeyError or ValueError for a row of a version that this one cannot read."""
        return unpack(self.template, self.facts)


async def put(messages: Iterable[Addressed], *, account_id: UUID, now: datetime, mail_domain: str) -> None:
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
                recipient_name=message.name,
                recipient_address=message.address,
                facts=pack(message.email),
                message_id=f"<{id_.hex}@{mail_domain}>",
                created_at=now,
                due_at=now,
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
            "SELECT id FROM outbox WHERE delivered_at IS NULL AND dead_at IS NULL AND due_at <= $3 "
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
        )
        for row in sorted(rows, key=lambda row: str(row["id"]))
    ]


async def delivered(message: Claimed) -> bool:
    """Mark it delivered. False when the lease was lost meanwhile: somebody else has it."""
    return await _settle(message, "delivered_at = $3, last_error = NULL", await db.now())


async def failed(message: Claimed, error: str, *, permanent: bool) -> bool:
    """Note the failure: another try after a wait, or a dead letter. False when the lease was lost meanwhile."""
    now = await db.now()
    if permanent or message.attempt >= MAX_ATTEMPTS:
        return await _settle(message, "dead_at = $3, last_error = $4", now, error)
    return await _settle(message, "due_at = $3, last_error = $4", now + backoff(message.attempt), error)


async def release(message: Claimed) -> bool:
    """Give it back untried, for another worker to take at once: for a worker that is stopping."""
    return await _settle(message, "due_at = $3, attempts = attempts - 1", await db.now())


async def _settle(message: Claimed, assignments: str, *args: Any) -> bool:
    changed = await db.execute(
        f"UPDATE outbox SET lease = NULL, {assignments} "
        "WHERE id = $1 AND lease = $2 AND delivered_at IS NULL AND dead_at IS NULL",
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


async def next_due() -> datetime | None:
    """When the next message is due; None when there is none."""
    row = await db.fetch_one("SELECT MIN(due_at) AS due_at FROM outbox WHERE delivered_at IS NULL AND dead_at IS NULL")
    return db.as_datetime(row["due_at"]) if row else None
