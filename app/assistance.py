"""Plans that are canceled with a Customer Success Manager: asking them, reminding them, and asking somebody else."""

from uuid import UUID

from app import accounts, db, outbox
from app.accounts import AccountView, RequestView
from app.auth import Acting, Installation
from app.errors import Contact
from app.lifecycle import RequestStatus
from app.messages import AssistanceEscalated, AssistanceReminder, AssistanceRequested, CancellationReceived
from app.models import CancellationRequest
from app.policy import hours


async def ask(installation: Installation, acting: Acting) -> None:
    """Tell the Customer Success Manager, and the member that it was received. Within the request's transaction."""
    policy, account, member = installation.policy, acting.account, acting.caller.member
    assert member is not None
    asked_by = Contact(name=member.name, email=member.email)
    csm = acting.facts.csm
    plan = account.plan(policy)
    await outbox.put(
        [
            outbox.Addressed(
                to=csm,
                email=AssistanceRequested(
                    account_name=account.name,
                    plan_name=plan.name,
                    account_reference=account.reference,
                    requested_at=acting.now,
                    respond_by=acting.now + policy.assistance_response,
                    member=asked_by,
                ),
            ),
            outbox.Addressed(
                to=asked_by,
                email=CancellationReceived(
                    account_name=account.name,
                    plan_name=plan.name,
                    requested_at=acting.now,
                    csm=csm,
                    response_hours=hours(policy.assistance_response),
                ),
            ),
        ],
        account_id=account.id,
        now=acting.now,
        mail_domain=installation.mail_domain,
    )


async def remind(installation: Installation, account_id: UUID) -> bool:
    """Remind the Customer Success Manager once that a request still waits, when the time to answer has passed."""
    async with db.transaction():
        account = await accounts.lock_unless_busy(account_id)
        now = await db.now()
        request = _unanswered(account)
        if account is None or request is None or request.assistance_requested_at is None:
            return False
        due_at = request.assistance_requested_at + installation.policy.assistance_response
        if due_at > now:
            return False
        changed = await CancellationRequest.filter(id=request.id, assistance_reminded_at=None).update(
            assistance_reminded_at=now
        )
        if not changed:
            return False
        email = AssistanceReminder(
            account_name=account.name,
            plan_name=account.plan(installation.policy).name,
            account_reference=account.reference,
            requested_at=request.assistance_requested_at,
            respond_by=due_at,
            member=await _asked_by(request),
        )
        await outbox.put(
            [outbox.Addressed(to=account.csm or installation.policy.customer_success, email=email)],
            account_id=account.id,
            now=now,
            mail_domain=installation.mail_domain,
        )
        return True


async def escalate(installation: Installation, account_id: UUID) -> bool:
    """Tell the billing team once that a request still waits, although the Customer Success Manager was reminded."""
    async with db.transaction():
        account = await accounts.lock_unless_busy(account_id)
        now = await db.now()
        request = _unanswered(account)
        if account is None or request is None or request.assistance_requested_at is None:
            return False
        policy = installation.policy
        if request.assistance_requested_at + policy.assistance_escalation > now:
            return False
        changed = await CancellationRequest.filter(
            id=request.id, assistance_reminded_at__isnull=False, assistance_escalated_at=None
        ).update(assistance_escalated_at=now)
        if not changed:
            return False
        email = AssistanceEscalated(
            account_name=account.name,
            plan_name=account.plan(policy).name,
            account_reference=account.reference,
            requested_at=request.assistance_requested_at,
            respond_by=request.assistance_requested_at + policy.assistance_response,
            member=await _asked_by(request),
            csm=account.csm or policy.customer_success,
        )
        await outbox.put(
            [outbox.Addressed(to=policy.billing_team, email=email)],
            account_id=account.id,
            now=now,
            mail_domain=installation.mail_domain,
        )
        return True


def _unanswered(account: AccountView | None) -> RequestView | None:
    request = account.request if account is not None else None
    return request if request is not None and request.status is RequestStatus.PENDING_ASSISTANCE else None


async def _asked_by(request: RequestView) -> Contact:
    """Who asked to cancel; somebody nameless, when they are no member any more."""
    person = (await accounts.people([request.requested_by_id])).get(request.requested_by_id)
    return Contact(name=person.name, email=person.email or "") if person else Contact(name="A former member", email="")
