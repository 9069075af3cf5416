"""All deletions halted, until an operator has looked: by hand on any day, and by Sunset itself after a restore.

A halt stops what has not begun; a deletion that has begun goes on. There is one open halt of each cause at most, and
`resume` ends all of them. The breaker, which counts deletions, is beside it and stays in force.

Knows no caller: operators act at the command line.
"""

from collections.abc import Mapping
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

_NAME = "deletion halts"


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
        await db.exclusively(_NAME)
        await begin(installation, HaltCause.OPERATOR, evidence)


async def begin(installation: Installation, cause: HaltCause, evidence: str, *, as_of: datetime | None = None) -> None:
    """Halt all deletions for that cause, within the open transaction, and email the operators; unless it is so
    already: then only what `as_of` says is noted."""
    now = await db.now()
    open_id = next((one.id for one in await current() if one.cause is cause), None)
    if open_id is not None:
        await db.execute("UPDATE deletion_halt SET as_of = COALESCE($2, as_of) WHERE id = $1", open_id, as_of)
        return
    await DeletionHalt.create(id=db.uuid7(), cause=cause, evidence=evidence, as_of=as_of, halted_at=now)
    operators = installation.policy.operators
    email = HaltBegan(halted_at=now, cause=cause, evidence=evidence)
    await outbox.put(
        [outbox.Addressed(name=operators.name, address=operators.email, email=email)],
        account_id=None,
        now=now,
        mail_domain=installation.mail_domain,
    )
    db.on_commit(lambda: _log.error("deletions.halted", cause=cause.value))


async def resume(note: str) -> None:
    """End every halt: somebody has looked, and approves what is due. Raises `DeletionsNotHalted` where there is none,
    `InvalidInput` for an unusable note."""
    text = required_note(note)
    async with db.transaction():
        await db.exclusively(_NAME)
        ended = await current()
        if not ended:
            raise errors.DeletionsNotHalted("No halt lasts; there is nothing to resume.")
        await db.execute(
            "UPDATE deletion_halt SET resumed_at = $1, resume_note = $2 WHERE resumed_at IS NULL",
            max(await db.now(), *(one.halted_at for one in ended)),
            text,
        )
        causes = [one.cause.value for one in ended]
        db.on_commit(lambda: _log.warning("deletions.resumed", causes=causes))
