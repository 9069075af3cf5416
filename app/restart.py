"""Restarting a canceled account inside its retention window, and asking the billing team for it."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from app import accounts, db, enforcement, errors, history, idempotency, lifecycle, limiting, outbox, people
from app.accounts import AccountView
from app.auth import Acting, Call, Installation, act_on, check
from app.errors import Contact
from app.lifecycle import MAX_NOTE_LENGTH, AccountStatus, Action, RequestStatus, TransitionType
from app.messages import AccountRestarted, RestartRequested
from app.models import Account, CancellationRequest, DeletionHold, DeletionReminder, RestartRequest


@dataclass(frozen=True, kw_only=True)
class Restarted:
    """What `restart` did. `members`: how many of them have access again."""

    account: AccountView
    members: int


async def restart(call: Call, account_id: UUID | None, *, idempotency_key: str | None = None) -> Restarted:
    """Bring a canceled account back: ACTIVE, without a deletion date or a hold. Its members are those whom the host
    names by now: who was removed meanwhile does not return. The cancellation, its feedback and its history stay.
    Refuses with `RestartWindowClosed` when the window has ended."""
    await limiting.admit(call, Action.RESTART_ACCOUNT, account_id)
    async with db.transaction():
        acting = await act_on(call, Action.RESTART_ACCOUNT, account_id)
        answer = await idempotency.once(
            call.identity,
            "restartAccount",
            idempotency_key,
            {"account": account_id},
            acting.account.id,
            lambda: _restart(call.installation, acting),
        )
        account = await accounts.load(acting.account.id)
        # A record of before an upgrade does not have the number.
        members = answer["members"] if "members" in answer else await accounts.member_count(acting.account.id)
    assert account is not None
    return Restarted(account=account, members=members)


async def _restart(installation: Installation, acting: Acting) -> dict[str, Any]:
    lifecycle.check(Action.RESTART_ACCOUNT, acting.actor, acting.facts, acting.now)
    account, now = acting.account, acting.now
    changed = await Account.filter(
        id=account.id, status=AccountStatus.CANCELED, restartable_until__gt=now, deletion_started_at__isnull=True
    ).update(
        status=AccountStatus.ACTIVE,
        canceled_at=None,
        restartable_until=None,
        deletion_scheduled_for=None,
        deletion_held_at=None,
        reminder_due_at=None,
    )
    assert changed == 1, f"account {account.id} moved under its lock"
    await DeletionReminder.filter(account_id=account.id).delete()
    await DeletionHold.filter(account_id=account.id, released_at__isnull=True).update(released_at=now)
    request = await CancellationRequest.get(account_id=account.id, status=RequestStatus.EFFECTIVE)
    await CancellationRequest.filter(id=request.id).update(status=RequestStatus.REVERTED, closed_at=now)
    await history.append(
        TransitionType.RESTARTED,
        account_id=account.id,
        status=AccountStatus.ACTIVE,
        request_id=request.id,
        actor=acting.actor,
        now=now,
        new_epoch=True,
    )
    await enforcement.lift(account.id, now)
    await people.write(
        await people.with_billing_permission(account.id),
        lambda recipient: AccountRestarted(
            account_name=account.name,
            plan_name=account.plan(installation.policy).name,
            restarted_at=now,
            billing_contact=installation.policy.billing_team,
        ),
        account_id=account.id,
        now=now,
        mail_domain=installation.mail_domain,
    )
    return {"members": await accounts.member_count(account.id)}


async def request_restart(call: Call, *, note: str | None = None) -> AccountView:
    """Ask the billing team to restart the account that the caller's emailed link is about. It restarts nothing.

    Repeating it changes nothing: a cancellation has one restart request. The note has at most 2,000 characters.
    """
    grant = call.identity.grant
    account_id = grant.account_id if grant else None
    await limiting.admit(call, Action.REQUEST_RESTART, account_id)
    async with db.transaction():
        acting = await act_on(call, Action.REQUEST_RESTART, account_id)
        await check(Action.REQUEST_RESTART, acting.caller, acting.facts)
        assert grant is not None
        note = (note or "").strip() or None
        if note is not None and len(note) > MAX_NOTE_LENGTH:
            raise errors.InvalidInput(f"A note has at most {MAX_NOTE_LENGTH:,} characters.", field="note")
        if not await RestartRequest.filter(request_id=grant.request_id).exists():
            await _record_request(call.installation, acting, grant.request_id, note)
        account = await accounts.load(acting.account.id)
    assert account is not None
    return account


async def _record_request(installation: Installation, acting: Acting, request_id: UUID, note: str | None) -> None:
    account, member = acting.account, acting.caller.member
    assert member is not None
    assert account.restartable_until is not None
    await RestartRequest.create(
        id=db.uuid7(),
        account_id=account.id,
        request_id=request_id,
        requested_by_id=member.id,
        note=note,
        requested_at=acting.now,
    )
    await history.append(
        TransitionType.RESTART_REQUESTED,
        account_id=account.id,
        status=account.status,
        request_id=request_id,
        actor=acting.actor,
        now=acting.now,
    )
    await outbox.put(
        [
            outbox.Addressed(
                to=installation.policy.billing_team,
                email=RestartRequested(
                    account_name=account.name,
                    plan_name=account.plan(installation.policy).name,
                    account_reference=account.reference,
                    requested_at=acting.now,
                    requested_by=Contact(name=member.name, email=member.email),
                    note=note or "",
                    restartable_until=account.restartable_until,
                ),
            )
        ],
        account_id=account.id,
        now=acting.now,
        mail_domain=installation.mail_domain,
    )
