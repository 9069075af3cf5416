"""All deletions halted, until an operator has looked: by hand on any day, and by Sunset itself after a restore.

A halt stops what has not begun; a deletion that has begun goes on. There is one open halt of each cause at most. The
breaker, which counts deletions, is beside it and stays in force.

Knows no caller: operators act at the command line.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import structlog

from app import db, errors, outbox
from app.auth import Installation
from app.lifecycle import HaltCause, required_note
from app.messages import HaltBegan
from app.models import DeletionHalt

_log = structlog.stdlib.get_logger(__name__)

LOCK = "deletions"
"""Held by who begins deletions, or halts them, or lets them go on: when a halt has begun, no deletion begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HaltView:
    """A halt that lasts."""

    id: UUID
    cause: HaltCause
    evidence: str
    """What was found, or the operator's note."""
    as_of: datetime | None
    """The time that the database was restored to, where an operator has said it."""
    halted_at: datetime


async def current() -> list[HaltView]:
    """The halts that last, oldest first. None: deletions may begin, as far as the breaker lets them."""
    rows = await db.fetch("SELECT * FROM deletion_halt WHERE resumed_at IS NULL ORDER BY halted_at, id")
    return [_view(row) for row in rows]


def _view(row: Mapping[str, Any]) -> HaltView:
    return HaltView(
        id=db.as_uuid(row["id"]),
        cause=HaltCause(row["cause"]),
        evidence=row["evidence"],
        as_of=db.as_datetime(row["as_of"]),
        halted_at=db.as_datetime(row["halted_at"]),
    )


async def halt(installation: Installation, note: str) -> None:
    """Halt all deletions by hand. Repeating it changes nothing. Raises `InvalidInput` for an unusable note."""
    evidence = required_note(note)
    async with db.transaction():
        await begin(installation, HaltCause.OPERATOR, evidence)


async def begin(installation: Installation, cause: HaltCause, evidence: str, *, as_of: datetime | None = None) -> None:
    """Halt all deletions for that cause, within the open transaction, and email the operators; unless it is so
    already: then only what `as_of` says is noted."""
    await db.exclusively(LOCK)
    now = await db.now()
    open_id = next((one.id for one in await current() if one.cause is cause), None)
    if open_id is not None:
        await db.execute("UPDATE deletion_halt SET as_of = COALESCE($2, as_of) WHERE id = $1", open_id, as_of)
        return
    if cause is HaltCause.RESTORED:  # which says what the other only asked
        await db.execute(
            "UPDATE deletion_halt SET resumed_at = $1, resume_note = 'It was restored.' "
            f"WHERE cause = '{HaltCause.MOVED}' AND resumed_at IS NULL",
            now,
        )
    await DeletionHalt.create(id=db.uuid7(), cause=cause, evidence=evidence, as_of=as_of, halted_at=now)
    email = HaltBegan(halted_at=now, cause=cause, evidence=evidence)
    await outbox.put(
        [outbox.Addressed(to=installation.policy.operators, email=email)],
        account_id=None,
        now=now,
        mail_domain=installation.mail_domain,
    )
    db.on_commit(lambda: _log.error("deletions.halted", cause=cause.value))


async def resume(note: str, causes: Collection[HaltCause] | None = None) -> list[HaltView]:
    """End the halts of those causes, or the only one that lasts, and answer which: somebody has looked at them, and
    approves what is due.

    Raises `DeletionsNotHalted` where there is none, `InvalidInput` for an unusable note, and where several last of
    which none was named: one may have begun since somebody looked.
    """
    text = required_note(note)
    async with db.transaction():
        await db.exclusively(LOCK)
        lasting = await current()
        if causes is None and len(lasting) > 1:
            raise errors.InvalidInput(
                f"Several halts last, {', '.join(one.cause for one in lasting)}. Look at each, and say which end.",
                field="cause",
            )
        ended = [one for one in lasting if causes is None or one.cause in causes]
        if not ended:
            raise errors.DeletionsNotHalted("No such halt lasts; there is nothing to resume.")
        now = await db.now()
        for one in ended:
            await db.execute(
                "UPDATE deletion_halt SET resumed_at = $2, resume_note = $3 WHERE id = $1",
                one.id,
                max(now, one.halted_at),
                text,
            )
        db.on_commit(lambda: _log.warning("deletions.resumed", causes=[one.cause.value for one in ended]))
    return ended


async def ended(cause: HaltCause, as_of: datetime) -> bool:
    """Whether there was a halt of that cause with that time, which has ended."""
    row = await db.fetch_one(
        "SELECT 1 AS found FROM deletion_halt WHERE cause = $1 AND as_of = $2 AND resumed_at IS NOT NULL LIMIT 1",
        cause.value,
        as_of,
    )
    return row is not None
