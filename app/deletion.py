"""The deletion of an account's data: announced, held and released, begun, carried out, and what remains.

Beginning is the point of no return and one conditional update. What is left to do then are steps, one row for each
data system; Sunset's own comes last and leaves a bare row, a tombstone and the history. Each function re-checks under
the account's lock what made it due: a restart, a hold or another worker may have come first.
"""

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import structlog

from app import accounts, breaker, db, errors, history, idempotency, lifecycle, limiting, people, restores
from app.accounts import AccountView
from app.auth import Acting, Call, Installation, act_on
from app.lifecycle import (
    SYSTEM,
    AccountStatus,
    Action,
    FeedbackReason,
    LinkPurpose,
    RequestStatus,
    TransitionType,
    required_note,
)
from app.messages import AccountDeleted, DeletionReminder, DeletionRescheduled
from app.models import Account, CancellationRequest, DeletionStep, Tombstone
from app.models import DeletionHold as HoldRow
from app.models import DeletionReminder as ReminderRow

_log = structlog.stdlib.get_logger(__name__)

OWN_SYSTEM = "sunset"
"""The step that erases Sunset's own data."""

OVERDUE = timedelta(hours=1)
"""A deletion that has not begun, or not ended, this long after it should have is an alarm."""

_LISTED = 500
"""How many accounts a listing reads at a time."""

_WAIT_FOR_MESSAGES = timedelta(minutes=1)
_LONGEST_WAIT = timedelta(hours=1)

Forget = Callable[[Sequence[str]], Awaitable[None]]
"""Takes away the copies of messages that Sunset keeps outside of its database, by their Message-IDs."""

# ---------------------------------------------------------------------------------------------- hold and release


async def hold(
    call: Call, account_id: UUID | None, *, note: str | None, idempotency_key: str | None = None
) -> AccountView:
    """Suspend the deletion of a canceled account: it has no date until the hold is released. It does not make the
    time to restart any longer. Refused once the deletion has begun."""
    return await _act(call, Action.HOLD_DELETION, "holdDeletion", account_id, note, idempotency_key, _hold)


async def release(
    call: Call, account_id: UUID | None, *, note: str | None, idempotency_key: str | None = None
) -> AccountView:
    """End the hold. The deletion gets a date again, never nearer than the policy's minimum notice, and the members
    with the billing permission are told."""
    return await _act(call, Action.RELEASE_DELETION, "releaseDeletion", account_id, note, idempotency_key, _release)


async def _act(
    call: Call,
    action: Action,
    mutation: str,
    account_id: UUID | None,
    note: str | None,
    idempotency_key: str | None,
    change: Callable[[Installation, Acting, str], Awaitable[None]],
) -> AccountView:
    await limiting.admit(call, action, account_id)
    async with db.transaction():
        acting = await act_on(call, action, account_id)

        async def checked() -> dict[str, Any]:
            lifecycle.check(action, acting.actor, acting.facts, acting.now)
            await change(call.installation, acting, required_note(note))
            return {}

        values = {"account": account_id, "note": note}
        await idempotency.once(call.identity, mutation, idempotency_key, values, acting.account.id, checked)
        account = await accounts.load(acting.account.id)
    assert account is not None
    return account


async def _hold(_: Installation, acting: Acting, note: str) -> None:
    assert acting.actor.id is not None
    changed = await Account.filter(
        id=acting.account.id, status=AccountStatus.CANCELED, deletion_held_at__isnull=True
    ).update(deletion_held_at=acting.now, deletion_scheduled_for=None, reminder_due_at=None)
    assert changed == 1, f"account {acting.account.id} moved under its lock"
    await HoldRow.create(
        id=db.uuid7(), account_id=acting.account.id, note=note, held_at=acting.now, held_by_id=acting.actor.id
    )
    await _record(TransitionType.DELETION_HELD, acting)


async def _release(installation: Installation, acting: Acting, note: str) -> None:
    account, policy, now = acting.account, installation.policy, acting.now
    date = lifecycle.release(acting.facts, policy.minimum_notice, now)
    changed = await Account.filter(id=account.id, status=AccountStatus.CANCELED, deletion_held_at__isnull=False).update(
        deletion_held_at=None,
        deletion_scheduled_for=date,
        reminder_due_at=lifecycle.reminders(date, policy.reminder_days, (), now).next_at,
    )
    assert changed == 1, f"account {account.id} moved under its lock"
    await HoldRow.filter(account_id=account.id, released_at__isnull=True).update(
        released_at=now, released_by_id=acting.actor.id, release_note=note
    )
    await _record(TransitionType.DELETION_RELEASED, acting)
    await people.write(
        await people.with_billing_permission(account.id),
        lambda _: DeletionRescheduled(
            account_name=account.name,
            plan_name=account.plan(policy).name,
            deletion_scheduled_for=date,
            billing_contact=policy.billing_team,
        ),
        account_id=account.id,
        now=now,
        mail_domain=installation.mail_domain,
    )


async def _record(kind: TransitionType, acting: Acting) -> None:
    await history.append(
        kind,
        account_id=acting.account.id,
        status=acting.account.status,
        request_id=None,
        actor=acting.actor,
        now=acting.now,
    )


# ----------------------------------------------------------------------------------------------------- reminders


async def remind(installation: Installation, account_id: UUID) -> bool:
    """Send the reminder that is due, once for each date, and note when the next one is. True when that moved."""
    policy = installation.policy
    async with db.transaction():
        account = await accounts.lock_unless_busy(account_id)
        now = await db.now()
        if account is None or account.status is not AccountStatus.CANCELED or account.deletion_scheduled_for is None:
            return False
        row = await Account.get(id=account.id).only("reminder_due_at")
        if row.reminder_due_at is None or row.reminder_due_at > now:
            return False
        date = account.deletion_scheduled_for
        sent = await ReminderRow.filter(account_id=account.id, deletion_scheduled_for=date).values_list(
            "days", flat=True
        )
        due = lifecycle.reminders(date, policy.reminder_days, [int(str(days)) for days in sent], now)
        await Account.filter(id=account.id).update(reminder_due_at=due.next_at)
        if due.days is not None:
            await _send_reminder(installation, account, date, due.days, now)
        return True


async def _send_reminder(
    installation: Installation, account: AccountView, date: datetime, days: int, now: datetime
) -> None:
    policy, canceled_at, window_end = installation.policy, account.canceled_at, account.restartable_until
    assert canceled_at is not None
    assert window_end is not None
    await ReminderRow.create(id=db.uuid7(), account_id=account.id, deletion_scheduled_for=date, days=days, sent_at=now)
    request = await CancellationRequest.get(account_id=account.id, status=RequestStatus.EFFECTIVE)
    await history.append(
        TransitionType.DELETION_REMINDER,
        account_id=account.id,
        status=account.status,
        request_id=request.id,
        actor=SYSTEM,
        now=now,
    )
    await people.write(
        await people.with_billing_permission(account.id),
        lambda recipient: DeletionReminder(
            account_name=account.name,
            plan_name=account.plan(policy).name,
            canceled_at=canceled_at,
            deletion_scheduled_for=date,
            hours_left=round((date - now) / timedelta(hours=1)),  # it is sent a moment after its time
            restart_link=people.link(LinkPurpose.RESTART, recipient, account.id, request.id, now, window_end)
            if now < window_end
            else None,
            billing_contact=policy.billing_team,
        ),
        account_id=account.id,
        now=now,
        mail_domain=installation.mail_domain,
    )


# --------------------------------------------------------------------------------------------------------- begin


async def begin(installation: Installation, account_ids: Sequence[UUID]) -> list[UUID]:
    """Begin the deletions of those accounts that are still due, as many as the breaker lets, and answer which.

    All in one transaction, in which nobody else begins any. An account that a restart or a hold has locked is left
    alone: whoever commits first wins, and the other is told. None begins where the database went back in time since it
    was last looked at, and while deletions are halted.
    """
    await restores.check(installation)
    async with db.transaction():
        left = (await breaker.enter(installation)).left
        begun = [account_id for account_id in account_ids[:left] if await _begin(account_id)]
    for account_id in begun:
        _log.info("deletion.started", account_id=str(account_id))
    return begun


async def _begin(account_id: UUID) -> bool:
    account = await accounts.lock_unless_busy(account_id)
    if account is None:
        return False
    now = await db.now()
    # The point of no return. Only what this statement sees counts, by the database's clock.
    changed = await db.execute(
        f"UPDATE account SET status = 'DELETING', deletion_started_at = {db.now_sql()}, reminder_due_at = NULL "
        "WHERE id = $1 AND epoch = $2 AND status = 'CANCELED' AND deletion_held_at IS NULL "
        f"AND deletion_scheduled_for <= {db.now_sql()}",
        account.id,
        account.epoch,
    )
    if changed != 1:
        return False
    await DeletionStep.create(
        id=db.uuid7(), account_id=account.id, system=OWN_SYSTEM, epoch=account.epoch, created_at=now, due_at=now
    )
    await history.append(
        TransitionType.DELETION_STARTED,
        account_id=account.id,
        status=AccountStatus.DELETING,
        request_id=None,
        actor=SYSTEM,
        now=now,
    )
    return True


# --------------------------------------------------------------------------------------------------------- erase

ERASED = ("member", "feedback", "offer", "restart_request", "idempotency_record", "outbox", "webhook_delivery")
"""The tables whose rows about an account are deleted. What stays of the others holds no personal datum."""


async def would_erase(account_id: UUID) -> dict[str, int]:
    """How many rows of each table the deletion of the account would take away."""
    counts = ", ".join(f"(SELECT COUNT(*) FROM {table} WHERE account_id = $1) AS {table}" for table in ERASED)
    row = await db.fetch_one(f"SELECT {counts}", account_id)
    assert row is not None
    return {table: int(row[table]) for table in ERASED}


def tombstone_reference(reference: str) -> str:
    """What a deleted account's reference becomes: by it a host that still has the reference recognizes the account."""
    return "deleted:" + hashlib.sha256(reference.encode()).hexdigest()


async def erase(installation: Installation, forget: Forget, account_id: UUID) -> bool:
    """Sunset's own step: erase every personal datum of the account, leave the tombstone, promise the last email.

    Waits until every email and every event about the account is delivered or dead, which each is within a week, so that
    nothing that was promised goes untold; and until every other system's step is done. Repeating it does nothing.
    """
    try:
        return await _erase(installation, forget, account_id)
    except errors.Unavailable:
        raise
    except Exception as error:
        _log.exception("deletion.step_failed", account_id=str(account_id), system=OWN_SYSTEM)
        await _failed(account_id, f"{type(error).__name__}; see the log")
        return False


async def _failed(account_id: UUID, reason: str) -> None:
    async with db.transaction():
        await accounts.lock_row(account_id)
        step = await DeletionStep.get_or_none(account_id=account_id, system=OWN_SYSTEM, completed_at=None)
        if step is not None:
            wait: timedelta = min(timedelta(seconds=10) * 2 ** min(step.attempts, 20), _LONGEST_WAIT)
            step.attempts += 1
            step.last_error = reason
            step.due_at = await db.now() + wait
            await step.save()


async def _erase(installation: Installation, forget: Forget, account_id: UUID) -> bool:
    # Letters in a folder go first: they are found by the rows that go next. Whatever interrupts this is repeated. Once
    # the step is done there is only the last letter, which stays.
    messages = await db.fetch(
        "SELECT message_id FROM outbox WHERE account_id = $1 AND EXISTS (SELECT 1 FROM deletion_step "
        "WHERE account_id = $1 AND system = $2 AND completed_at IS NULL)",
        account_id,
        OWN_SYSTEM,
    )
    waits_for = await _waits_for(account_id)
    if waits_for is None:
        await forget([row["message_id"] for row in messages])
    async with db.transaction():
        account = await accounts.lock_unless_busy(account_id)
        now = await db.now()
        step = await DeletionStep.get_or_none(account_id=account_id, system=OWN_SYSTEM, completed_at=None)
        if account is None or account.status is not AccountStatus.DELETING or step is None or step.due_at > now:
            return False
        waits_for = waits_for or await _waits_for(account_id)
        if waits_for is not None:
            step.last_error = waits_for
            step.due_at = now + _WAIT_FOR_MESSAGES
            await step.save()
            return False
        await _erase_rows(installation, account, step, now)
    _log.info("deletion.done", account_id=str(account_id))
    await db.scrub()
    return True


async def _waits_for(account_id: UUID) -> str | None:
    row = await db.fetch_one(
        "SELECT (SELECT COUNT(*) FROM outbox WHERE account_id = $1 AND delivered_at IS NULL AND dead_at IS NULL "
        "AND dropped_at IS NULL) AS messages, (SELECT COUNT(*) FROM webhook_delivery WHERE account_id = $1 "
        "AND delivered_at IS NULL AND dead_at IS NULL) AS webhooks, (SELECT COUNT(*) FROM deletion_step "
        "WHERE account_id = $1 AND system <> $2 AND completed_at IS NULL) AS steps",
        account_id,
        OWN_SYSTEM,
    )
    assert row is not None
    for number, what in (
        (row["messages"], "message"),
        (row["webhooks"], "webhook delivery"),
        (row["steps"], "other system"),
    ):
        if number:
            many = what.removesuffix("y") + "ies" if what.endswith("y") else f"{what}s"
            return f"waits for {number} {what if number == 1 else many}"
    return None


async def _erase_rows(installation: Installation, account: AccountView, step: DeletionStep, now: datetime) -> None:
    policy = installation.policy
    assert account.canceled_at is not None
    assert account.deletion_started_at is not None
    recipients = await people.with_billing_permission(account.id)
    erased = await would_erase(account.id)
    reason = await db.fetch_one(
        "SELECT f.reason FROM feedback f JOIN cancellation_request r ON r.id = f.request_id "
        "WHERE f.account_id = $1 AND r.status = 'EFFECTIVE' ORDER BY f.submitted_at DESC, f.id DESC LIMIT 1",
        account.id,
    )
    for table in ERASED:
        await db.execute(f"DELETE FROM {table} WHERE account_id = $1", account.id)
    await db.execute(
        "UPDATE cancellation_request SET staff_note = NULL, confirmation_token_hash = NULL, "
        "confirmation_expires_at = NULL WHERE account_id = $1",
        account.id,
    )
    await db.execute("UPDATE deletion_hold SET note = NULL, release_note = NULL WHERE account_id = $1", account.id)
    await db.execute("UPDATE deletion_step SET last_error = NULL WHERE account_id = $1", account.id)
    await db.execute(
        "UPDATE account SET status = 'DELETED', deleted_at = $2, name = '', reference = $3, csm_id = NULL, "
        "current_period_end = NULL WHERE id = $1",
        account.id,
        now,
        tombstone_reference(account.reference),
    )
    await limiting.forget_account(account.id)
    step.completed_at = now
    step.last_error = None  # type: ignore[assignment]  # nullable, typed as if never null
    await step.save()
    await Tombstone.create(
        id=db.uuid7(),
        account_id=account.id,
        plan_code=account.plan_code,
        reason=FeedbackReason(reason["reason"]) if reason else None,
        canceled_at=account.canceled_at,
        deletion_started_at=account.deletion_started_at,
        deleted_at=now,
        members=erased["member"],
        feedback=erased["feedback"],
        offers=erased["offer"],
        restart_requests=erased["restart_request"],
        messages=erased["outbox"],
        idempotency_records=erased["idempotency_record"],
    )
    await history.append(
        TransitionType.DELETED,
        account_id=account.id,
        status=AccountStatus.DELETED,
        request_id=None,
        actor=SYSTEM,
        now=now,
        reference=account.reference,
    )
    canceled_at = account.canceled_at
    await people.write(
        recipients,
        lambda _: AccountDeleted(
            account_name=account.name,
            plan_name=account.plan(policy).name,
            canceled_at=canceled_at,
            deleted_at=now,
            billing_contact=policy.billing_team,
        ),
        account_id=account.id,
        now=now,
        mail_domain=installation.mail_domain,
    )


# ------------------------------------------------------------------------------------------------------- reading


class State(StrEnum):
    """Where the deletion of an account is, as staff sees it."""

    SCHEDULED = "SCHEDULED"
    HELD = "HELD"
    DUE = "DUE"
    OVERDUE = "OVERDUE"
    STARTED = "STARTED"
    STALLED = "STALLED"
    DELETED = "DELETED"


def state(account: AccountView, now: datetime) -> State | None:
    """None for an account that is not canceled."""
    if account.status is AccountStatus.DELETED:
        return State.DELETED
    if account.deletion_started_at is not None:
        return State.STALLED if account.deletion_started_at + OVERDUE <= now else State.STARTED
    if account.deletion_held_at is not None:
        return State.HELD
    if account.deletion_scheduled_for is None:
        return None
    if account.deletion_scheduled_for + OVERDUE <= now:
        return State.OVERDUE
    return State.DUE if account.deletion_scheduled_for <= now else State.SCHEDULED


_STATE_SQL: Mapping[State, str] = {
    State.SCHEDULED: "(a.status = 'CANCELED' AND a.deletion_scheduled_for > {now})",
    State.HELD: "a.deletion_held_at IS NOT NULL",
    State.DUE: "(a.status = 'CANCELED' AND a.deletion_scheduled_for <= {now} AND a.deletion_scheduled_for > {alarm})",
    State.OVERDUE: "(a.status = 'CANCELED' AND a.deletion_scheduled_for <= {alarm})",
    State.STARTED: "(a.status = 'DELETING' AND a.deletion_started_at > {alarm})",
    State.STALLED: "(a.status = 'DELETING' AND a.deletion_started_at <= {alarm})",
    State.DELETED: "a.status = 'DELETED'",
}


async def page(states: frozenset[State], *, after: tuple[Any, ...] | None, limit: int) -> list[AccountView]:
    """Up to `limit` accounts whose deletion is in one of those states, by the end of their retention window, behind
    the (restartable_until, id) `after`. One statement."""
    now = await db.now()
    moments = {"now": now, "alarm": now - OVERDUE}
    args: list[Any] = []

    def condition_of(state: State) -> str:
        """Only what it names is a parameter: PostgreSQL wants to know every one's type."""
        condition = _STATE_SQL[state]
        named = [name for name in moments if f"{{{name}}}" in condition]
        args.extend(moments[name] for name in named)
        first = len(args) - len(named) + 1
        return condition.format(**{name: f"${first + index}" for index, name in enumerate(named)})

    wanted = " OR ".join([condition_of(one) for one in sorted(states)]) or "1 = 0"
    condition = f"({wanted}) AND a.restartable_until IS NOT NULL"
    if after is not None:
        condition += f" AND (a.restartable_until, a.id) > (${len(args) + 1}, ${len(args) + 2})"
        args += after
    return await accounts.select(condition, args, order="a.restartable_until, a.id", limit=limit)


async def coming() -> AsyncIterator[AccountView]:
    """Every account whose deletion is not done, by the end of its retention window."""
    after: tuple[Any, ...] | None = None
    while found := await page(frozenset(State) - {State.DELETED}, after=after, limit=_LISTED):
        for account in found:
            yield account
        after = found[-1].restartable_until, found[-1].id


async def due_first() -> AsyncIterator[AccountView]:
    """Every account whose deletion is due, in the order in which they begin."""
    now = await db.now()
    condition = "a.status = 'CANCELED' AND a.deletion_scheduled_for <= $1"
    args: list[Any] = [now]
    while found := await accounts.select(condition, args, order="a.deletion_scheduled_for, a.id", limit=_LISTED):
        for account in found:
            yield account
        condition = (
            "a.status = 'CANCELED' AND a.deletion_scheduled_for <= $1 AND (a.deletion_scheduled_for, a.id) > ($2, $3)"
        )
        args = [now, found[-1].deletion_scheduled_for, found[-1].id]


async def overdue() -> int:
    """How many deletions have not begun, or not ended, an hour after they should have. An alarm."""
    row = await db.fetch_one(
        "SELECT (SELECT COUNT(*) FROM account WHERE status = 'CANCELED' AND deletion_scheduled_for <= $1) "
        "+ (SELECT COUNT(*) FROM account WHERE status = 'DELETING' AND deletion_started_at <= $1) AS overdue",
        await db.now() - OVERDUE,
    )
    assert row is not None
    return int(row["overdue"])


@dataclass(frozen=True, kw_only=True, slots=True)
class HoldView:
    note: str | None
    held_at: datetime
    held_by_id: UUID
    release_note: str | None
    released_at: datetime | None
    released_by_id: UUID | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReminderView:
    days: int
    deletion_scheduled_for: datetime
    sent_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class StepView:
    system: str
    attempts: int
    last_error: str | None
    due_at: datetime
    completed_at: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TombstoneView:
    plan_code: str
    reason: FeedbackReason | None
    canceled_at: datetime
    deletion_started_at: datetime
    deleted_at: datetime
    members: int
    feedback: int
    offers: int
    restart_requests: int
    messages: int
    idempotency_records: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Details:
    """What belongs to an account's deletion, oldest first."""

    holds: list[HoldView]
    reminders: list[ReminderView]
    steps: list[StepView]
    tombstone: TombstoneView | None


async def details(account_ids: Sequence[UUID]) -> dict[UUID, Details]:
    """What belongs to the deletions of those accounts. Four statements, however many they are."""
    found = {account_id: Details(holds=[], reminders=[], steps=[], tombstone=None) for account_id in account_ids}
    for row in await accounts.belonging_to("deletion_hold", account_ids, order="held_at, id"):
        found[db.as_uuid(row["account_id"])].holds.append(
            HoldView(
                note=row["note"],
                held_at=db.as_datetime(row["held_at"]),
                held_by_id=db.as_uuid(row["held_by_id"]),
                release_note=row["release_note"],
                released_at=db.as_datetime(row["released_at"]),
                released_by_id=db.as_uuid(row["released_by_id"]),
            )
        )
    for row in await accounts.belonging_to("deletion_reminder", account_ids, order="sent_at, id"):
        found[db.as_uuid(row["account_id"])].reminders.append(
            ReminderView(
                days=row["days"],
                deletion_scheduled_for=db.as_datetime(row["deletion_scheduled_for"]),
                sent_at=db.as_datetime(row["sent_at"]),
            )
        )
    for row in await accounts.belonging_to("deletion_step", account_ids, order="created_at, id"):
        found[db.as_uuid(row["account_id"])].steps.append(
            StepView(
                system=row["system"],
                attempts=row["attempts"],
                last_error=row["last_error"],
                due_at=db.as_datetime(row["due_at"]),
                completed_at=db.as_datetime(row["completed_at"]),
            )
        )
    for row in await accounts.belonging_to("tombstone", account_ids, order="id"):
        account_id = db.as_uuid(row["account_id"])
        found[account_id] = replace(found[account_id], tombstone=_tombstone(row))
    return found


def _tombstone(row: Mapping[str, Any]) -> TombstoneView:
    return TombstoneView(
        plan_code=row["plan_code"],
        reason=FeedbackReason(row["reason"]) if row["reason"] else None,
        canceled_at=db.as_datetime(row["canceled_at"]),
        deletion_started_at=db.as_datetime(row["deletion_started_at"]),
        deleted_at=db.as_datetime(row["deleted_at"]),
        members=row["members"],
        feedback=row["feedback"],
        offers=row["offers"],
        restart_requests=row["restart_requests"],
        messages=row["messages"],
        idempotency_records=row["idempotency_records"],
    )
