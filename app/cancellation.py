"""Canceling an account: ask, withdraw, confirm, take effect.

One function per action, one transaction each: lock the account's row, read who asks, ask the rules, save, put the
messages. The rules are `app.lifecycle`'s; nothing is decided here.
"""

import hmac
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import structlog

from app import (
    accounts,
    assistance,
    db,
    enforcement,
    errors,
    history,
    idempotency,
    lifecycle,
    limiting,
    offers,
    people,
)
from app.accounts import AccountView, RequestView
from app.auth import Acting, Call, Installation, act_on, check, check_confirmed
from app.errors import Contact
from app.lifecycle import (
    MAX_WRONG_TRIES,
    SYSTEM,
    AccountStatus,
    Action,
    Actor,
    CancelStep,
    FeedbackReason,
    LinkPurpose,
    Relation,
    RequestStatus,
    TransitionType,
    required_note,
)
from app.messages import (
    CancellationConfirmed,
    CancellationNotice,
    CancellationScheduled,
    CancellationWithdrawn,
    ConfirmationRequested,
)
from app.models import Account, CancellationRequest
from app.policy import hours
from app.tokens import hash_confirmation_token

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Requested:
    """What `cancel` did. `confirmation_token` is for a member whose confirmation is now awaited; staff gets none."""

    account: AccountView
    request_id: UUID
    confirmation_token: str | None


async def cancel(
    call: Call,
    account_id: UUID | None,
    *,
    reason: FeedbackReason | None = None,
    note: str | None = None,
    idempotency_key: str | None = None,
) -> Requested:
    """Ask to cancel, or, as staff, open the request that the members are then asked to confirm.

    `reason` chooses which offers are made; it is not stored as feedback. `note` says, for staff, why. Repeating it
    returns the open request and, unless that was used up by wrong tries, the same token. Refuses as
    `lifecycle.cancel` does.
    """
    values = {"account": account_id, "reason": reason, "note": note}
    await limiting.admit(call, Action.CANCEL_ACCOUNT, account_id)
    async with db.transaction():
        acting = await act_on(call, Action.CANCEL_ACCOUNT, account_id)
        answer = await idempotency.once(
            call.identity,
            "cancelAccount",
            idempotency_key,
            values,
            acting.account.id,
            lambda: _cancel(call.installation, acting, reason, note),
        )
        account = await accounts.load(acting.account.id)
    assert account is not None
    request_id, generation = UUID(answer["request"]), answer["generation"]
    token = None if generation is None else call.installation.tokens.confirmation_token(request_id, generation)
    return Requested(account=account, request_id=request_id, confirmation_token=token)


async def _cancel(
    installation: Installation, acting: Acting, reason: FeedbackReason | None, note: str | None
) -> dict[str, Any]:
    step = lifecycle.cancel(acting.actor, acting.facts, acting.now)
    by_member = Relation.BILLING_MEMBER in acting.actor.relations
    if by_member and note is not None:
        raise errors.InvalidInput("A note is for staff; members give feedback with submitFeedback.", field="note")
    note = None if by_member else required_note(note, ask="Staff says why")
    open_request = acting.account.request
    if open_request is not None and lifecycle.has_expired(open_request.facts(), acting.now):
        await _expire(acting.account, open_request, acting.now)
        open_request = None
    replaced = False
    if open_request is None:
        request = await _create(installation, acting, step, note)
    else:
        request = await CancellationRequest.get(id=open_request.id)
        generation = request.confirmation_generation
        await _advance(installation, acting, step, request, note)
        replaced = request.confirmation_generation != generation
    await offers.make(installation.policy, acting.account, request.id, reason, acting.now)
    if request.status is RequestStatus.PENDING_CONFIRMATION and (
        step in {CancelStep.OPEN, CancelStep.OPEN_NEW} or (replaced and request.opened_by_staff_at is not None)
    ):
        await _ask_members_to_confirm(installation, acting, request)
    if step in {CancelStep.REQUEST_ASSISTANCE, CancelStep.HAND_OVER}:
        await assistance.ask(installation, acting)
    shows_token = by_member and request.status is RequestStatus.PENDING_CONFIRMATION
    return {"request": str(request.id), "generation": request.confirmation_generation if shows_token else None}


async def _create(
    installation: Installation, acting: Acting, step: CancelStep, note: str | None
) -> CancellationRequest:
    assert acting.actor.id is not None
    request = CancellationRequest(
        id=db.uuid7(),
        account_id=acting.account.id,
        status=RequestStatus.PENDING_ASSISTANCE,
        channel=acting.facts.channel,
        plan_code=acting.account.plan_code,
        requested_at=acting.now,
        requested_by_kind=acting.actor.kind,
        requested_by_id=acting.actor.id,
    )
    if step is CancelStep.REQUEST_ASSISTANCE:
        request.assistance_requested_at = acting.now
    else:
        _await_confirmation(installation, request, acting.now)
    if step is CancelStep.OPEN_NEW:
        _opened_by_staff(request, acting, note)
    await request.save(force_create=True)
    await _record(TransitionType.CANCELLATION_REQUESTED, acting.account, request.id, acting.actor, acting.now)
    if step is CancelStep.REQUEST_ASSISTANCE:
        await _record(
            TransitionType.CANCELLATION_ASSISTANCE_REQUESTED, acting.account, request.id, acting.actor, acting.now
        )
    return request


async def _advance(
    installation: Installation, acting: Acting, step: CancelStep, request: CancellationRequest, note: str | None
) -> None:
    """What happens to a request that is open already."""
    if step is CancelStep.OPEN:
        _opened_by_staff(request, acting, note)
        _await_confirmation(installation, request, acting.now)
        kind = TransitionType.CANCELLATION_REQUESTED
    elif step is CancelStep.HAND_OVER:
        request.status = RequestStatus.PENDING_ASSISTANCE
        request.channel = acting.facts.channel
        request.plan_code = acting.account.plan_code
        request.assistance_requested_at = acting.now
        request.assistance_reminded_at = None
        request.assistance_escalated_at = None
        request.confirmation_token_hash = None
        request.confirmation_expires_at = None
        request.confirmation_generation += 1
        request.wrong_tries = 0
        kind = TransitionType.CANCELLATION_ASSISTANCE_REQUESTED
    elif step is CancelStep.CONFIRM_ALONE:
        request.channel = acting.facts.channel
        request.plan_code = acting.account.plan_code
        _await_confirmation(installation, request, acting.now)
        kind = TransitionType.CANCELLATION_REQUESTED
    elif request.status is RequestStatus.PENDING_CONFIRMATION and request.wrong_tries >= MAX_WRONG_TRIES:
        request.confirmation_generation += 1
        request.confirmation_token_hash = _token_hash(installation, request)
        request.wrong_tries = 0
        await request.save()
        return
    else:
        return
    await request.save()
    await _record(kind, acting.account, request.id, acting.actor, acting.now)


def _opened_by_staff(request: CancellationRequest, acting: Acting, note: str | None) -> None:
    request.opened_by_staff_at = acting.now
    request.opened_by_staff_id = acting.actor.id
    request.staff_note = note  # type: ignore[assignment]  # a TextField is typed as if never null


def _await_confirmation(installation: Installation, request: CancellationRequest, now: datetime) -> None:
    request.status = RequestStatus.PENDING_CONFIRMATION
    request.confirmation_token_hash = _token_hash(installation, request)
    request.confirmation_expires_at = now + installation.policy.confirmation_lifetime


def _token_hash(installation: Installation, request: CancellationRequest) -> str:
    token = installation.tokens.confirmation_token(request.id, request.confirmation_generation)
    return hash_confirmation_token(token)


async def _ask_members_to_confirm(installation: Installation, acting: Acting, request: CancellationRequest) -> None:
    assert request.opened_by_staff_id is not None
    expires_at = request.confirmation_expires_at
    assert expires_at is not None
    staff = (await accounts.people([request.opened_by_staff_id]))[request.opened_by_staff_id]
    await people.write(
        await people.with_billing_permission(acting.account.id),
        lambda recipient: ConfirmationRequested(
            account_name=acting.account.name,
            plan_name=acting.account.plan(installation.policy).name,
            opened_by=Contact(name=staff.name, email=staff.email or ""),
            expires_at=expires_at,
            link=people.link(
                LinkPurpose.CONFIRM,
                recipient,
                acting.account.id,
                request.id,
                acting.now,
                expires_at,
                generation=request.confirmation_generation,
            ),
        ),
        account_id=acting.account.id,
        now=acting.now,
        mail_domain=installation.mail_domain,
    )


async def _record(kind: TransitionType, account: AccountView, request_id: UUID, actor: Actor, now: datetime) -> None:
    """A transition that leaves the account's status as it is."""
    await history.append(
        kind, account_id=account.id, status=account.status, request_id=request_id, actor=actor, now=now
    )


# ------------------------------------------------------------------------------------------------------ withdraw


async def withdraw(call: Call, account_id: UUID | None, *, idempotency_key: str | None = None) -> AccountView:
    """Take the open request back before it takes effect; the account is ACTIVE again, its feedback stays."""
    await limiting.admit(call, Action.WITHDRAW_CANCELLATION, account_id)
    async with db.transaction():
        acting = await act_on(call, Action.WITHDRAW_CANCELLATION, account_id)
        await idempotency.once(
            call.identity,
            "withdrawCancellation",
            idempotency_key,
            {"account": account_id},
            acting.account.id,
            lambda: _withdraw(call.installation, acting),
        )
        account = await accounts.load(acting.account.id)
    assert account is not None
    return account


async def _withdraw(installation: Installation, acting: Acting) -> dict[str, Any]:
    lifecycle.check(Action.WITHDRAW_CANCELLATION, acting.actor, acting.facts, acting.now)
    account, request = acting.account, acting.account.request
    assert request is not None
    await _close(request, RequestStatus.WITHDRAWN, acting.now)
    if account.status is AccountStatus.CANCELLATION_SCHEDULED:
        await Account.filter(id=account.id, status=account.status).update(
            status=AccountStatus.ACTIVE, cancellation_effective_at=None
        )
    await history.append(
        TransitionType.CANCELLATION_WITHDRAWN,
        account_id=account.id,
        status=AccountStatus.ACTIVE,
        request_id=request.id,
        actor=acting.actor,
        now=acting.now,
    )
    await people.write(
        await people.with_billing_permission(account.id),
        lambda recipient: CancellationWithdrawn(
            account_name=account.name,
            plan_name=account.plan(installation.policy).name,
            withdrawn_at=acting.now,
            withdrawn_by=acting.actor.name,
        ),
        account_id=account.id,
        now=acting.now,
        mail_domain=installation.mail_domain,
    )
    return {}


async def _close(request: RequestView, status: RequestStatus, now: datetime) -> None:
    changed = await CancellationRequest.filter(id=request.id, status=request.status).update(
        status=status, closed_at=now
    )
    assert changed == 1, f"request {request.id} moved under its account's lock"


async def _expire(account: AccountView, request: RequestView, now: datetime) -> None:
    await _close(request, RequestStatus.EXPIRED, now)
    await _record(TransitionType.CANCELLATION_EXPIRED, account, request.id, SYSTEM, now)


# ------------------------------------------------------------------------------------------------------- confirm


async def confirm(
    call: Call,
    request_id: UUID | None,
    *,
    confirmation_token: str | None,
    account_name: str,
    idempotency_key: str | None = None,
) -> AccountView:
    """Confirm the cancellation: at once, or for the end of the paid period where the plan says so.

    `account_name` is the account's name as the member typed it; spaces around it do not count. The token may be left
    out by the bearer of an emailed link, which carries it. A wrong token is counted, and the count is kept although
    the call is refused: after five the token is void, whoever tried, in however many calls.
    """
    grant = call.identity.grant
    values = {
        "request": request_id,
        "name": account_name,
        "token": confirmation_token and hash_confirmation_token(confirmation_token),
    }
    found = None if request_id is None else await accounts.load_request(request_id)
    action, account_id, what = Action.CONFIRM_CANCELLATION, found.account_id if found else None, "cancellation request"
    await limiting.admit(call, action, account_id, what=what, request_id=request_id)
    wrong_try: errors.ConfirmationTokenInvalid | None = None
    async with db.transaction():
        acting = await act_on(call, action, account_id, what=what, request_id=request_id)
        assert found is not None
        if grant is not None:
            confirmation_token = call.installation.tokens.confirmation_token(grant.request_id, grant.generation)
        if confirmation_token is None:
            raise errors.InvalidInput(
                "The confirmation token is needed; cancelAccount gives it.", field="confirmationToken"
            )
        token = confirmation_token
        try:
            await idempotency.once(
                call.identity,
                "confirmCancellation",
                idempotency_key,
                values,
                acting.account.id,
                lambda: _confirm(call.installation, acting, found.id, token, account_name, counted=grant is None),
            )
        except errors.ConfirmationTokenInvalid as refusal:
            wrong_try = refusal  # Raised after the commit, which keeps the count.
        else:
            if grant is not None:
                await check_confirmed(grant)  # an idempotency key gives its answer again, whatever came after
        account = await accounts.load(acting.account.id)
    if wrong_try is not None:
        raise wrong_try
    assert account is not None
    return account


async def _confirm(
    installation: Installation, acting: Acting, request_id: UUID, token: str, account_name: str, *, counted: bool
) -> dict[str, Any]:
    account = acting.account
    await check(Action.CONFIRM_CANCELLATION, acting.caller, acting.facts)
    if account.request is None or account.request.id != request_id:
        raise errors.RequestStateRefused(
            "This cancellation request is closed, and the account has a newer one.", request_id=request_id
        )
    await _check_token(request_id, token, counted=counted)
    if account_name.strip() != account.name:
        raise errors.AccountNameMismatch(f"Type the account's name exactly as it is written: {account.name}")
    assert acting.actor.id is not None
    confirmed = lifecycle.confirm(acting.facts, acting.now)
    changed = await CancellationRequest.filter(id=request_id, status=RequestStatus.PENDING_CONFIRMATION).update(
        status=RequestStatus.CONFIRMED,
        confirmed_at=acting.now,
        confirmed_by_id=acting.actor.id,
        effective_at=confirmed.effective_at,
    )
    assert changed == 1, f"request {request_id} moved under its account's lock"
    if confirmed.at_once:
        await _take_effect(installation, account, request_id, acting.actor, acting.actor.id, acting.now)
    else:
        await _schedule(installation, acting, request_id, confirmed.effective_at)
    return {}


async def _check_token(request_id: UUID, token: str, *, counted: bool) -> None:
    """Raises `ConfirmationTokenInvalid`, after counting a wrong try. The token of an emailed link is signed by us: a
    wrong one is an old one and no guess, and is not counted."""
    request = await CancellationRequest.get(id=request_id).only("wrong_tries", "confirmation_token_hash")
    left = MAX_WRONG_TRIES - request.wrong_tries
    right = hmac.compare_digest(hash_confirmation_token(token), request.confirmation_token_hash or "")
    if right and left > 0:
        return
    if not counted:
        raise errors.ConfirmationTokenInvalid(
            "This link has been replaced by a newer one. Use the newest email.", attempts_left=left
        )
    if left > 0:
        left -= 1
        await CancellationRequest.filter(id=request_id).update(wrong_tries=MAX_WRONG_TRIES - left)
    if left > 0:
        message = f"The confirmation token is wrong. {left} more {'try is' if left == 1 else 'tries are'} possible."
    else:
        message = "The confirmation token is void after too many wrong tries. Call cancelAccount for a new one."
    raise errors.ConfirmationTokenInvalid(message, attempts_left=left)


async def _schedule(installation: Installation, acting: Acting, request_id: UUID, effective_at: datetime) -> None:
    account, plan = acting.account, acting.account.plan(installation.policy)
    await Account.filter(id=account.id, status=AccountStatus.ACTIVE).update(
        status=AccountStatus.CANCELLATION_SCHEDULED, cancellation_effective_at=effective_at
    )
    await history.append(
        TransitionType.CANCELLATION_SCHEDULED,
        account_id=account.id,
        status=AccountStatus.CANCELLATION_SCHEDULED,
        request_id=request_id,
        actor=acting.actor,
        now=acting.now,
    )
    await people.write(
        await people.with_billing_permission(account.id),
        lambda recipient: CancellationScheduled(
            account_name=account.name,
            plan_name=plan.name,
            confirmed_at=acting.now,
            confirmed_by=acting.actor.name,
            effective_at=effective_at,
            retention_hours=hours(plan.retention),
            security_contact=installation.policy.security,
        ),
        account_id=account.id,
        now=acting.now,
        mail_domain=installation.mail_domain,
    )


async def _take_effect(
    installation: Installation,
    account: AccountView,
    request_id: UUID,
    actor: Actor,
    confirmed_by_id: UUID | None,
    now: datetime,
) -> None:
    """From this commit on messages stop and members have no access; the window to restart begins."""
    plan = account.plan(installation.policy)
    window = lifecycle.retention_window(now, plan.retention)
    changed = await Account.filter(id=account.id, status=account.status).update(
        status=AccountStatus.CANCELED,
        cancellation_effective_at=None,
        canceled_at=window.canceled_at,
        restartable_until=window.restartable_until,
        deletion_scheduled_for=window.deletion_scheduled_for,
        reminder_due_at=lifecycle.reminders(
            window.deletion_scheduled_for, installation.policy.reminder_days, (), now
        ).next_at,
    )
    assert changed == 1, f"account {account.id} moved under its lock"
    await CancellationRequest.filter(id=request_id, status=RequestStatus.CONFIRMED).update(
        status=RequestStatus.EFFECTIVE, took_effect_at=now
    )
    await history.append(
        TransitionType.CANCELED,
        account_id=account.id,
        status=AccountStatus.CANCELED,
        request_id=request_id,
        actor=actor,
        now=now,
        new_epoch=True,
    )
    await enforcement.ask(installation.policy, account.id, now)
    recipients = await people.with_billing_permission(account.id)
    confirmer = next((one for one in recipients if one.member_id == confirmed_by_id), None)
    if confirmer is None and (confirmer := await people.member(confirmed_by_id)) is not None:
        recipients = [*recipients, confirmer]  # The permission was taken away before the cancellation took effect.
    name = confirmer.contact.name if confirmer else "a former member"
    await people.write(
        recipients,
        lambda recipient: (CancellationConfirmed if recipient is confirmer else CancellationNotice)(
            account_name=account.name,
            plan_name=plan.name,
            canceled_at=window.canceled_at,
            canceled_by=name,
            restartable_until=window.restartable_until,
            deletion_scheduled_for=window.deletion_scheduled_for,
            retention_hours=hours(plan.retention),
            billing_contact=installation.policy.billing_team,
            security_contact=installation.policy.security,
            restart_link=people.link(
                LinkPurpose.RESTART, recipient, account.id, request_id, now, window.restartable_until
            ),
            feedback_link=people.link(
                LinkPurpose.FEEDBACK, recipient, account.id, request_id, now, window.restartable_until
            ),
        ),
        account_id=account.id,
        now=now,
        mail_domain=installation.mail_domain,
    )


# -------------------------------------------------------------------------------------------------------- timers


async def expire(_: Installation, account_id: UUID) -> bool:
    """Close an account's request whose time to be confirmed has passed."""
    async with db.transaction():
        account = await accounts.lock_unless_busy(account_id)
        now = await db.now()
        if account is None or account.request is None or not lifecycle.has_expired(account.request.facts(), now):
            return False
        await _expire(account, account.request, now)
        return True


async def take_effect(installation: Installation, account_id: UUID) -> bool:
    """Carry out a scheduled cancellation whose time has come."""
    async with db.transaction():
        account = await accounts.lock_unless_busy(account_id)
        now = await db.now()
        if (
            account is None
            or account.request is None
            or account.status is not AccountStatus.CANCELLATION_SCHEDULED
            or account.cancellation_effective_at is None
            or account.cancellation_effective_at > now
        ):
            return False
        request = await CancellationRequest.get(id=account.request.id)
        await _take_effect(installation, account, request.id, SYSTEM, request.confirmed_by_id, now)
        return True
