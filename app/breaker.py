"""The breaker: when more deletions fall due within 24 hours than the policy allows, all of them stop.

Whatever makes too many accounts due at once (a wrong default, a bad import, a script) is stopped here, before
anything irreversible. It stays so until two persons of the billing team, or an operator at the command line, approve
a number of deletions for the next 24 hours.

Two spans of 24 hours are looked at: the one that begins now, so that a wave is seen before its first deletion; and
the one that ends now, so that no trick of the calendar lets more than the allowed number begin within a day.

What the policy allows is a number, or a share of the accounts, of which those that are new (`NEW_FOR`) do not count:
however many are invented today raise it by nothing. In an installation's first days the number alone allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from math import ceil
from typing import Any
from uuid import UUID

import structlog

from app import db, errors, halts, idempotency, lifecycle, limiting, outbox
from app.auth import Call, Installation, StaffFacts, require_staff
from app.halts import HaltView
from app.lifecycle import StaffRole, required_note
from app.messages import DeletionsHalted
from app.models import DeletionBreaker
from app.policy import Policy

_log = structlog.stdlib.get_logger(__name__)

SPAN = timedelta(hours=24)
NEW_FOR = timedelta(days=30)
"""For so long an account is new, by the installation's clock."""


class State(StrEnum):
    CLEAR = "CLEAR"
    APPROVED = "APPROVED"
    HALTED = "HALTED"
    AWAITING_SECOND_APPROVAL = "AWAITING_SECOND_APPROVAL"


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakerView:
    """Where the breaker stands at `now`."""

    now: datetime
    waiting: int
    """Deletions that are due now or within 24 hours and have not begun: what people approve."""
    due: int
    """Deletions within 24 hours: the larger number of the two spans."""
    started: int
    """Deletions that began in the last 24 hours, and since people last approved some."""
    allowed: int
    """What the policy allows, or what was approved, whichever is more."""
    halted_at: datetime | None
    first_approved_at: datetime | None
    first_approved_by_id: UUID | None
    first_approved_count: int | None
    approved_until: datetime | None
    halts: Sequence[HaltView] = ()
    """What else lets no deletion begin."""

    @property
    def state(self) -> State:
        if self.halted_at is not None:
            return State.HALTED if self.first_approved_at is None else State.AWAITING_SECOND_APPROVAL
        return State.CLEAR if self.approved_until is None else State.APPROVED

    @property
    def would_halt(self) -> bool:
        """Whether the next deletion would trip the breaker instead of beginning."""
        return self.halted_at is None and self.due > self.allowed

    @property
    def left(self) -> int:
        """How many more may begin now."""
        return 0 if self.halts or self.halted_at is not None or self.would_halt else max(0, self.allowed - self.started)


async def read(policy: Policy, *, exact: bool = False) -> BreakerView:
    """Where the breaker stands. It changes nothing: only the worker trips it.

    `allowed` is what decides; unless it is to be `exact`, accounts are counted only as far as that takes, so that
    looking costs what is due, and a policy that allows much more than is due is told as one that allows a little more.
    """
    now = await db.now()
    row = await db.fetch_one(
        "SELECT * FROM deletion_breaker WHERE approved_at IS NULL OR approved_until > $1 "
        "ORDER BY approved_at IS NULL DESC, approved_at DESC LIMIT 1",
        now,
    )
    halted = row is not None and row["approved_at"] is None
    approval = None if halted else row
    counted = await db.fetch_one(
        "SELECT (SELECT COUNT(*) FROM account WHERE status = 'CANCELED' AND deletion_scheduled_for <= $1) AS coming, "
        "(SELECT COUNT(*) FROM account WHERE status = 'CANCELED' AND deletion_scheduled_for <= $2) AS overdue, "
        "(SELECT COUNT(*) FROM account WHERE deletion_started_at >= $3) AS started",
        now + SPAN,
        now,
        db.as_datetime(approval["approved_at"]) if approval is not None else await _settled_until(now),
    )
    assert counted is not None
    due = max(counted["coming"], counted["started"] + counted["overdue"])
    return BreakerView(
        now=now,
        waiting=counted["coming"],
        due=due,
        started=counted["started"],
        allowed=max(
            await _allowed(policy, due, now, exact=exact), approval["approved_count"] if approval is not None else 0
        ),
        halted_at=db.as_datetime(row["tripped_at"]) if row is not None and halted else None,
        first_approved_at=db.as_datetime(row["first_approved_at"]) if row is not None and halted else None,
        first_approved_by_id=db.as_uuid(row["first_approved_by_id"]) if row is not None and halted else None,
        first_approved_count=row["first_approved_count"] if row is not None and halted else None,
        approved_until=db.as_datetime(approval["approved_until"]) if approval is not None else None,
        halts=await halts.current(),
    )


async def _settled_until(now: datetime) -> datetime:
    """From when on beginnings count: for less than 24 hours. What began under an approval that has ended was looked at
    by people, and is not held against what comes after."""
    row = await db.fetch_one(
        "SELECT MAX(approved_until) AS until FROM deletion_breaker WHERE approved_until <= $1", now
    )
    assert row is not None
    ended = db.as_datetime(row["until"])
    since = now - SPAN + timedelta(milliseconds=1)
    return since if ended is None else max(since, ended)


async def _allowed(policy: Policy, due: int, now: datetime, *, exact: bool) -> int:
    """What the policy allows."""
    enough = ceil((due + 1) * 100 / policy.breaker_percent) if policy.breaker_percent else 0
    if not enough or (due < policy.breaker_at_least and not exact):
        return policy.breaker_at_least
    limit = "" if exact else f"ORDER BY created_at LIMIT {enough}"  # the oldest first, by their index
    row = await db.fetch_one(
        "SELECT COUNT(*) AS accounts FROM (SELECT 1 FROM account WHERE status <> 'DELETED' AND created_at <= $1 "
        f"{limit}) counted",
        now - NEW_FOR,
    )
    assert row is not None
    return lifecycle.deletions_allowed(row["accounts"], policy.breaker_at_least, policy.breaker_percent)


async def enter(installation: Installation) -> BreakerView:
    """Where the breaker stands, for who is about to begin deletions in the open transaction: nobody else does, until
    it ends. Trips the breaker when there is reason to; that is then part of the transaction, and to be committed."""
    await db.exclusively(halts.LOCK)
    found = await read(installation.policy)
    if found.halts or not found.would_halt:
        return found
    await DeletionBreaker.create(id=db.uuid7(), tripped_at=found.now, due=found.due, allowed=found.allowed)
    email = DeletionsHalted(halted_at=found.now, due=found.due, allowed=found.allowed)
    await outbox.put(
        [outbox.Addressed(to=installation.policy.operators, email=email)],
        account_id=None,
        now=found.now,
        mail_domain=installation.mail_domain,
    )
    db.on_commit(lambda: _log.error("deletions.halted", due=found.due, allowed=found.allowed))
    return await read(installation.policy)


async def approve(call: Call, *, count: int, note: str | None, idempotency_key: str | None = None) -> BreakerView:
    """Approve `count` deletions within the next 24 hours, which must be how many are waiting. The first approval of a
    person of the billing team waits for that of another one; with it, the deletions go on. Both have seen the same
    number, and within 24 hours: otherwise the later approval is a first one again.

    Raises `PermissionDenied` for others and for the same person again, `DeletionsNotHalted`, `InvalidInput`.
    """
    values = {"count": count, "note": note}
    await _require_billing_team(call)
    await limiting.spend(call)
    async with db.transaction():
        await db.exclusively(halts.LOCK)
        staff = await _require_billing_team(call)
        await idempotency.once(
            call.identity,
            "approveDeletions",
            idempotency_key,
            values,
            None,
            lambda: _approve(call.policy, staff, count, note),
        )
        return await read(call.policy, exact=True)


async def _require_billing_team(call: Call) -> StaffFacts:
    staff = (await require_staff(call)).staff
    if staff is None or staff.role is not StaffRole.BILLING_TEAM:
        raise errors.PermissionDenied("Only the billing team approves deletions.")
    return staff


async def _approve(policy: Policy, staff: StaffFacts, count: int, note: str | None) -> dict[str, Any]:
    found, text = await read(policy), required_note(note)
    row = await _halted(found, count)
    seen = row.first_approved_count == count
    if row.first_approved_at is None or not seen or row.first_approved_at + SPAN <= found.now:
        row.first_approved_at, row.first_approved_by_id, row.first_note = found.now, staff.id, text
        row.first_approved_count = count
        await row.save()
        db.on_commit(lambda: _log.warning("deletions.first_approval", count=count, staff_id=str(staff.id)))
        return {}
    if row.first_approved_by_id == staff.id:
        raise errors.PermissionDenied(
            "You have given the first approval. The second one is given by another person of the billing team."
        )
    await _clear(row, found, count, staff.id, text)
    return {}


async def approve_as_operator(installation: Installation, *, count: int, note: str) -> BreakerView:
    """The same by who runs Sunset, at the command line: one approval is enough."""
    async with db.transaction():
        await db.exclusively(halts.LOCK)
        found, text = await read(installation.policy), required_note(note)
        await _clear(await _halted(found, count), found, count, None, text)
        return await read(installation.policy, exact=True)


async def _halted(found: BreakerView, count: int) -> DeletionBreaker:
    if found.halted_at is None:
        raise errors.DeletionsNotHalted("The deletions have not stopped; there is nothing to approve.")
    if count != found.waiting:
        raise errors.InvalidInput(
            f"{found.waiting} deletions wait to begin within 24 hours, not {count}. Approve what you saw.",
            field="count",
        )
    return await DeletionBreaker.get(approved_at=None)


async def _clear(row: DeletionBreaker, found: BreakerView, count: int, staff_id: UUID | None, note: str) -> None:
    row.approved_at, row.approved_until, row.approved_count = found.now, found.now + SPAN, count
    row.approved_by_id, row.note = staff_id, note
    await row.save()
    db.on_commit(lambda: _log.warning("deletions.approved", count=count, staff_id=staff_id and str(staff_id)))
