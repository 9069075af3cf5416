"""The objects of the API.

Plain attributes where the row has the value, synchronous methods where it follows from the row, loaders where it
is somewhere else. What only the billing permission shows refuses others with FORBIDDEN, field by field.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cache, wraps
from inspect import iscoroutinefunction
from typing import Annotated, Any, Final, Generic, TypeVar
from uuid import UUID

import orjson
import strawberry

from app import breaker, deletion, enforcement, errors, events, halts, lifecycle, offers, outbox, webhooks
from app import policy as policies
from app.accounts import AccountView, FeedbackView, MemberView, OfferView, Person, RequestView
from app.auth import Caller
from app.graphql import enums, nodes
from app.graphql.context import Info
from app.graphql.nodes import Keyset, Kind
from app.history import TransitionView
from app.lifecycle import (
    AccountStatus,
    Action,
    Actor,
    ActorKind,
    CancellationTiming,
    Channel,
    FeedbackReason,
    HaltCause,
    MemberRole,
    OfferKind,
    OfferStatus,
    Permission,
    RequestStatus,
    TransitionType,
)
from app.policy import Policy, hours

T = TypeVar("T")


def describe(text: str) -> Any:
    """A field with a description."""
    return strawberry.field(description=text)


EPOCH: Final = (
    "Grows with each cancellation that takes effect and each restart, and by a million where the database was restored."
)


def for_staff(description: str) -> Callable[[Callable[..., Any]], Any]:
    """A field of what staff wrote for staff, or of who did. It is null for everybody else, by whatever path they came
    to its object: the object's `_eye` decides, and nobody on the way has to think of it."""

    def declare(resolver: Callable[..., Any]) -> Any:
        if iscoroutinefunction(resolver):

            @wraps(resolver)
            async def guarded(self: Any, *args: Any, **given: Any) -> Any:
                return await resolver(self, *args, **given) if self._eye.is_staff else None

        else:

            @wraps(resolver)
            def guarded(self: Any, *args: Any, **given: Any) -> Any:
                return resolver(self, *args, **given) if self._eye.is_staff else None

        return strawberry.field(resolver=guarded, description=f"{description} For staff; null for everybody else.")

    return declare


First = Annotated[int | None, strawberry.argument(description="How many: 1 to 100, 20 when left out.")]
After = Annotated[
    str | None, strawberry.argument(description="The `endCursor` of the page before; left out for the first page.")
]


@strawberry.interface(description="What has an id that is unique among all objects. Do not take ids apart.")
class Node:
    id: strawberry.ID = describe("Opaque, globally unique, and never changed.")


@strawberry.type(description="Where a page of a list ends.")
class PageInfo:
    has_next_page: bool = describe("Whether there is more behind this page.")
    has_previous_page: bool = describe("Whether this page began behind a cursor.")
    start_cursor: str | None = describe("The cursor of the first item; null on an empty page.")
    end_cursor: str | None = describe("What to give as `after` for the next page; null on an empty page.")


@strawberry.type(description="An item of a list, with its place.")
class Edge(Generic[T]):
    node: T = describe("The item.")
    cursor: str = describe("Its place in this list and this order; opaque.")


@strawberry.type(description="A page of a list.")
class Connection(Generic[T]):
    edges: list[Edge[T]] = describe("The items of the page, in order.")
    page_info: PageInfo = describe("Where the page ends.")


def connection(
    rows: Sequence[Any], size: int, after: str | None, cursor: Callable[[Any], str], node: Callable[[Any], T]
) -> Connection[T]:
    """A page of `size` from rows that hold one more when there is a next page."""
    shown = rows[:size]
    edges = [Edge(node=node(row), cursor=cursor(row)) for row in shown]
    return Connection(
        edges=edges,
        page_info=PageInfo(
            has_next_page=len(rows) > size,
            has_previous_page=after is not None,
            start_cursor=edges[0].cursor if edges else None,
            end_cursor=edges[-1].cursor if edges else None,
        ),
    )


@strawberry.type(description="Whom to turn to.")
class Contact:
    name: str = describe("A person's or a team's name.")
    email: str = describe("Their address.")

    @staticmethod
    def of(contact: errors.Contact) -> "Contact":
        return Contact(name=contact.name, email=contact.email)


@strawberry.type(description="What an account pays for, and how it is canceled: the policy in force.")
class Plan:
    code: str = describe("The plan's code, as the host names it.")
    name: str = describe("The plan's name, for people.")
    channel: Channel = describe("How the plan is canceled.")
    effective: CancellationTiming = describe("When a confirmed cancellation takes effect.")
    retention_hours: int = describe("From the cancellation to the deletion of the data, in hours.")
    confirmation_lifetime_hours: int = describe("How long a cancellation can be confirmed after it was asked for.")
    assistance_response_hours: int = describe("Within how many hours a Customer Success Manager answers.")
    reminder_days: list[int] = describe("How many days before the deletion a reminder is sent.")

    @staticmethod
    def of(plan: policies.Plan, policy: Policy) -> "Plan":
        return Plan(
            code=plan.code,
            name=plan.name,
            channel=plan.channel,
            effective=plan.effective,
            retention_hours=hours(plan.retention),
            confirmation_lifetime_hours=hours(policy.confirmation_lifetime),
            assistance_response_hours=hours(policy.assistance_response),
            reminder_days=list(policy.reminder_days),
        )


@strawberry.type(description="A reason to choose from, with the words shown to people.")
class FeedbackReasonLabel:
    reason: FeedbackReason = describe("The reason.")
    label: str = describe("What people read.")


@strawberry.type(description="Whether the caller can do something about an account now, and if not, why.")
class ActionAvailability:
    action: Action = describe("What could be done.")
    allowed: bool = describe("Whether the mutation of that name would be accepted now, given fitting input.")
    reason: str | None = describe(
        "The name of the error it would answer with, such as `AccountStateError`; null when allowed."
    )
    message: str | None = describe("That error's message, for people; null when allowed.")

    @staticmethod
    def of(one: lifecycle.Availability) -> "ActionAvailability":
        refusal = one.refusal
        return ActionAvailability(
            action=one.action,
            allowed=refusal is None,
            reason=None if refusal is None else refusal_name(type(refusal)),
            message=None if refusal is None else refusal.message,
        )


def refusal_name(kind: type[errors.Refusal]) -> str:
    """A refusal's name in the schema: `NotFound` is `NotFoundError`, `AccountStateRefused` is `AccountStateError`."""
    return kind.__name__.removesuffix("Refused") + "Error"


@strawberry.type(description="One person in one account.")
class Member(Node):
    name: str = describe("Their name.")
    email: str = describe("Their address.")
    role: MemberRole = describe("Their role.")
    permissions: list[Permission] = describe("What was granted to them; an ADMIN has every permission without.")
    has_billing_permission: bool = describe('Whether they have "Access billing & account info".')

    @staticmethod
    def of(view: MemberView) -> "Member":
        return Member(
            id=strawberry.ID(nodes.encode(Kind.MEMBER, view.id)),
            name=view.name,
            email=view.email,
            role=view.role,
            permissions=[Permission(code) for code in sorted(view.permissions)],
            has_billing_permission=view.has_billing_permission,
        )


@strawberry.type(description="Who did something, as far as they are still known.")
class ActorRef:
    kind: ActorKind = describe("What kind of actor.")
    name: str | None = describe("Their name; null when they are not known any more.")
    email: str | None = describe("Their address; null when they are not known any more.")

    @staticmethod
    def of(kind: ActorKind, person: Person | None) -> "ActorRef":
        return ActorRef(kind=kind, name=person.name if person else None, email=person.email if person else None)


@strawberry.type(description="Why a customer cancels, in their words. Appended, and never changed.")
class Feedback(Node):
    reason: FeedbackReason = describe("The reason they chose.")
    comment: str | None = describe("What they wrote, if anything.")
    submitted_at: datetime = describe("When.")

    @staticmethod
    def of(view: FeedbackView) -> "Feedback":
        return Feedback(
            id=strawberry.ID(nodes.encode(Kind.FEEDBACK, view.id)),
            reason=view.reason,
            comment=view.comment,
            submitted_at=view.submitted_at,
        )


@strawberry.type(description="An alternative to canceling, made within a request. Answering it is never needed.")
class Offer(Node):
    code: str = describe("The offer's code in the policy.")
    kind: OfferKind = describe("What kind of alternative.")
    title: str = describe("A heading for people.")
    description: str = describe("What is offered, for people.")
    status: OfferStatus = describe("Whether it was answered.")
    offered_at: datetime = describe("When it was made.")
    answered_at: datetime | None = describe("When it was answered; null while OPEN.")

    @staticmethod
    def of(view: OfferView) -> "Offer":
        return Offer(
            id=strawberry.ID(nodes.encode(Kind.OFFER, view.id)),
            code=view.code,
            kind=view.kind,
            title=view.title,
            description=view.description,
            status=view.status,
            offered_at=view.offered_at,
            answered_at=view.answered_at,
        )


@strawberry.type(description="An alternative that would be offered.")
class OfferPreview:
    code: str = describe("The offer's code in the policy.")
    kind: OfferKind = describe("What kind of alternative.")
    title: str = describe("A heading for people.")
    description: str = describe("What would be offered, for people.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Perspective:
    """Through whose eyes an account is shown, at which moment."""

    caller: Caller
    actor: Actor
    sees_billing: bool
    now: datetime
    policy: Policy
    sees_account: bool = True
    """Not the bearer of a link that is refused what it is for."""

    @staticmethod
    def of(caller: Caller, policy: Policy) -> "Perspective":
        return Perspective(
            caller=caller,
            actor=caller.actor(),
            sees_billing=caller.has_billing_permission(),
            now=caller.now,
            policy=policy,
        )

    @staticmethod
    def on(caller: Caller, policy: Policy, account: AccountView, member: MemberView | None = None) -> "Perspective":
        """The caller's on another account than the one that `caller` was read with."""
        return Perspective.of(replace(caller, account=account, member=member), policy)

    def toward(self, account: AccountView) -> "Perspective":
        """The same caller's, on an account that came up on the way: staff is something else to each."""
        seen = self.caller.account
        return self if seen is not None and seen.id == account.id else self.on(self.caller, self.policy, account)

    @property
    def is_staff(self) -> bool:
        return self.caller.is_staff

    def require_account(self) -> None:
        if not self.sees_account:
            raise errors.Forbidden("The bearer of an emailed link that is refused reads nothing of the account.")

    def require_staff(self) -> None:
        if not self.is_staff:
            raise errors.Forbidden("This is for staff.")

    def require_billing(self) -> None:
        if not self.sees_billing:
            raise errors.Forbidden(
                'This field needs the permission "Access billing & account info". An admin of the account can grant it.'
            )


REQUESTS = Keyset(name="requests:requested_at", types=(datetime, UUID))
REQUESTS_OLDEST_FIRST = Keyset(name="requests:requested_at:asc", types=(datetime, UUID))
MEMBERS = Keyset(name="members:created_at:desc", types=(datetime, UUID))
TRANSITIONS = Keyset(name="transitions:sequence:desc", types=(int, UUID))


@strawberry.type(description="One attempt to cancel an account.")
class CancellationRequest(Node):
    _view: strawberry.Private[RequestView]
    _eye: strawberry.Private[Perspective]
    status: RequestStatus = describe("Where it is.")
    channel: Channel = describe("How the plan was to be canceled when it was asked for.")
    plan_code: str = describe("The plan's code when it was asked for.")
    requested_at: datetime = describe("When it was asked for.")
    assistance_requested_at: datetime | None = describe("When the Customer Success Manager was asked.")
    opened_at: datetime | None = describe("When staff opened it for the members to confirm.")
    confirmation_expires_at: datetime | None = describe("Until when it can be confirmed.")
    confirmed_at: datetime | None = describe("When a member confirmed it.")
    effective_at: datetime | None = describe("When it takes, or was to take, effect.")
    took_effect_at: datetime | None = describe("When the account was canceled by it.")
    closed_at: datetime | None = describe("When it was withdrawn, saved, expired or reverted.")

    @staticmethod
    def of(view: RequestView, eye: Perspective) -> "CancellationRequest":
        return CancellationRequest(
            id=strawberry.ID(nodes.encode(Kind.CANCELLATION_REQUEST, view.id)),
            _view=view,
            _eye=eye,
            status=view.status,
            channel=view.channel,
            plan_code=view.plan_code,
            requested_at=view.requested_at,
            assistance_requested_at=view.assistance_requested_at,
            opened_at=view.opened_by_staff_at,
            confirmation_expires_at=view.confirmation_expires_at,
            confirmed_at=view.confirmed_at,
            effective_at=view.effective_at,
            took_effect_at=view.took_effect_at,
            closed_at=view.closed_at,
        )

    @strawberry.field(description="For how long it has been waiting, or waited until it was closed or took effect.")
    def age_seconds(self) -> int:
        until = self._view.closed_at or self._view.took_effect_at or self._eye.now
        return max(0, int((until - self._view.requested_at).total_seconds()))

    @strawberry.field(description="Until when the Customer Success Manager answers; null where none was asked.")
    def respond_by(self) -> datetime | None:
        asked = self._view.assistance_requested_at
        return asked and asked + self._eye.policy.assistance_response

    @for_staff("Why staff opened it.")
    def staff_note(self) -> str | None:
        return self._view.staff_note

    @strawberry.field(description="Who asked. Staff who opened it are named to members, as the email to them does.")
    async def requested_by(self, info: Info) -> ActorRef:
        if not self._eye.sees_billing:
            return ActorRef.of(self._view.requested_by_kind, None)
        person = await info.context.people.load(self._view.requested_by_id)
        return ActorRef.of(self._view.requested_by_kind, person)

    @strawberry.field(description="The account it is about. Forbidden to bearers of emailed links in refusals.")
    async def account(self, info: Info) -> "Account":
        self._eye.require_account()
        view = await info.context.accounts.load(self._view.account_id)
        assert view is not None, "an account outlives its requests"
        return Account.of(view, self._eye.toward(view))

    @strawberry.field(
        description="What the customer said, oldest first; 20 at most. None for bearers of emailed links."
    )
    async def feedback(self, info: Info) -> list[Feedback]:
        if not self._eye.sees_billing:
            return []
        return [Feedback.of(view) for view in await info.context.feedback.load(self._view.id)]

    @strawberry.field(
        description="The alternatives that were offered, as they were made. None for bearers of emailed links."
    )
    async def offers(self, info: Info) -> list[Offer]:
        if not self._eye.sees_billing:
            return []
        return [Offer.of(view) for view in await info.context.offers.load(self._view.id)]


@strawberry.type(description="One step of an account's history. Steps are appended, and never changed.")
class Transition:
    sequence: int = describe("Grows by one with each step of the account.")
    epoch: int = describe(EPOCH)
    type: TransitionType = describe("What happened.")
    account_status: AccountStatus = describe("The account's status after it.")
    actor_kind: ActorKind = describe("What kind of actor did it.")
    occurred_at: datetime = describe("When.")

    @staticmethod
    def of(view: TransitionView) -> "Transition":
        return Transition(
            sequence=view.sequence,
            epoch=view.epoch,
            type=view.type,
            account_status=view.account_status,
            actor_kind=view.actor_kind,
            occurred_at=view.occurred_at,
        )


@strawberry.type(description="A deletion that was suspended.")
class DeletionHold:
    _view: strawberry.Private[deletion.HoldView]
    _eye: strawberry.Private[Perspective]
    held_at: datetime = describe("Since when.")
    released_at: datetime | None = describe("When it ended; null while it lasts.")

    @staticmethod
    def of(view: deletion.HoldView, eye: Perspective) -> "DeletionHold":
        return DeletionHold(_view=view, _eye=eye, held_at=view.held_at, released_at=view.released_at)

    @for_staff("Why; null once the account's data is deleted.")
    def note(self) -> str | None:
        return self._view.note

    @for_staff("Why it ended; null when a restart ended it, and once the data is deleted.")
    def release_note(self) -> str | None:
        return self._view.release_note

    @for_staff("Who put it on hold.")
    async def held_by(self, info: Info) -> ActorRef | None:
        return ActorRef.of(ActorKind.STAFF, await info.context.people.load(self._view.held_by_id))

    @for_staff("Who released it; null while it lasts, and when a restart ended it.")
    async def released_by(self, info: Info) -> ActorRef | None:
        if self._view.released_by_id is None:
            return None
        return ActorRef.of(ActorKind.STAFF, await info.context.people.load(self._view.released_by_id))


@strawberry.type(description="A reminder of a deletion that was sent to the members.")
class DeletionReminder:
    days: int = describe("Which of the policy's reminders: how many days before the deletion.")
    deletion_scheduled_for: datetime = describe("The date that it told of.")
    sent_at: datetime = describe("When.")


@strawberry.type(description="The part of a deletion that one data system does.")
class DeletionStep:
    _view: strawberry.Private[deletion.StepView]
    _eye: strawberry.Private[Perspective]
    system: str = describe("The system; `sunset` is this one.")
    attempts: int = describe("How many tries have failed.")
    due_at: datetime = describe("When the next try may begin.")
    completed_at: datetime | None = describe("When it was done; null until then.")

    @staticmethod
    def of(view: deletion.StepView, eye: Perspective) -> "DeletionStep":
        return DeletionStep(
            _view=view,
            _eye=eye,
            system=view.system,
            attempts=view.attempts,
            due_at=view.due_at,
            completed_at=view.completed_at,
        )

    @for_staff("Why the last one failed, or what it waits for.")
    def last_error(self) -> str | None:
        return self._view.last_error


@strawberry.type(description="What remains of a deleted account, without personal data.")
class Tombstone:
    plan_code: str = describe("The plan that it was on.")
    reason: FeedbackReason | None = describe("Why it was canceled, where that was said.")
    canceled_at: datetime = describe("When it was canceled.")
    deletion_started_at: datetime = describe("When the deletion began.")
    deleted_at: datetime = describe("When the data was gone.")
    members: int = describe("How many members were erased.")
    feedback: int = describe("How many pieces of feedback were erased.")
    offers: int = describe("How many offers were erased.")
    restart_requests: int = describe("How many requests for a restart were erased.")
    messages: int = describe("How many messages were erased.")
    idempotency_records: int = describe("How many remembered answers were erased.")


@strawberry.type(description="The deletion of a canceled account's data: what is coming, what has begun, what remains.")
class Deletion:
    _id: strawberry.Private[UUID]
    _eye: strawberry.Private[Perspective]
    state: deletion.State = describe("Where it is.")
    scheduled_for: datetime | None = describe("When it begins; null while held.")
    held_at: datetime | None = describe("Since when it is on hold.")
    started_at: datetime | None = describe("When it began.")
    deleted_at: datetime | None = describe("When the data was gone.")

    @staticmethod
    def of(view: AccountView, eye: Perspective) -> "Deletion | None":
        state = deletion.state(view, eye.now)
        if state is None:
            return None
        return Deletion(
            _id=view.id,
            _eye=eye,
            state=state,
            scheduled_for=view.deletion_scheduled_for,
            held_at=view.deletion_held_at,
            started_at=view.deletion_started_at,
            deleted_at=view.deleted_at,
        )

    @strawberry.field(description="Its holds, oldest first; the last one may be open.")
    async def holds(self, info: Info) -> list[DeletionHold]:
        return [DeletionHold.of(view, self._eye) for view in (await info.context.deletions.load(self._id)).holds]

    @strawberry.field(description="The reminders that were sent, oldest first.")
    async def reminders(self, info: Info) -> list[DeletionReminder]:
        return [
            DeletionReminder(days=one.days, deletion_scheduled_for=one.deletion_scheduled_for, sent_at=one.sent_at)
            for one in (await info.context.deletions.load(self._id)).reminders
        ]

    @strawberry.field(description="Its steps, one for each data system; none before it has begun.")
    async def steps(self, info: Info) -> list[DeletionStep]:
        return [DeletionStep.of(view, self._eye) for view in (await info.context.deletions.load(self._id)).steps]

    @strawberry.field(description="What remains when it is done; null until then.")
    async def tombstone(self, info: Info) -> Tombstone | None:
        left = (await info.context.deletions.load(self._id)).tombstone
        return None if left is None else Tombstone(**asdict(left))


@strawberry.type(description="Stops all deletions when more fall due within 24 hours than the policy allows.")
class DeletionBreaker:
    _view: strawberry.Private[breaker.BreakerView]
    state: breaker.State = describe("Whether deletions may begin, unless `deletionHalts` has one that lasts.")
    waiting: int = describe(
        "How many are due now or within 24 hours and have not begun: what `approveDeletions` wants."
    )
    due: int = describe("How many fall due, or have begun, within 24 hours; more than `allowed` stops all.")
    started: int = describe("How many have begun in the last 24 hours, and since the last approval.")
    allowed: int = describe("How many may, by the policy or by approval.")
    halted_at: datetime | None = describe("Since when all have stopped.")
    first_approved_at: datetime | None = describe("When the first of two persons approved; good for 24 hours.")
    first_approved_count: int | None = describe("How many they approved; the second approves the same number.")
    approved_until: datetime | None = describe("How long an approval still holds.")

    @staticmethod
    def of(view: breaker.BreakerView, eye: Perspective) -> "DeletionBreaker":
        """For staff. Raises `Forbidden` for everybody else."""
        eye.require_staff()
        return DeletionBreaker(
            _view=view,
            state=view.state,
            waiting=view.waiting,
            due=view.due,
            started=view.started,
            allowed=view.allowed,
            halted_at=view.halted_at,
            first_approved_at=view.first_approved_at,
            first_approved_count=view.first_approved_count,
            approved_until=view.approved_until,
        )

    @strawberry.field(description="Who approved first; the second approval is of another person.")
    async def first_approved_by(self, info: Info) -> ActorRef | None:
        if self._view.first_approved_by_id is None:
            return None
        return ActorRef.of(ActorKind.STAFF, await info.context.people.load(self._view.first_approved_by_id))


@strawberry.type(description="All deletions stopped, until an operator lets them go on. The breaker is beside it.")
class DeletionHalt:
    cause: HaltCause = describe("Why no deletion begins.")
    evidence: str = describe("What was found, or the operator's note.")
    as_of: datetime | None = describe(
        "The time that the database was restored to; null where no operator has said one."
    )
    halted_at: datetime = describe("Since when.")

    @staticmethod
    def of(view: halts.HaltView, eye: Perspective) -> "DeletionHalt":
        """For staff. Raises `Forbidden` for everybody else."""
        eye.require_staff()
        return DeletionHalt(cause=view.cause, evidence=view.evidence, as_of=view.as_of, halted_at=view.halted_at)


@strawberry.type(description="What a cancellation asks of one system that the policy names, and whether it has obeyed.")
class Enforcement:
    _view: strawberry.Private[enforcement.EnforcementView]
    _eye: strawberry.Private[Perspective]
    system: str = describe("The system's code in the policy, and the name of the service that acknowledges for it.")
    name: str = describe("The system's name; its code when the policy does not name it any more.")
    epoch: int = describe("The account's epoch that the cancellation began: what is acknowledged.")
    status: enforcement.Status = describe("Whether it has obeyed.")
    asked_at: datetime = describe("When the cancellation took effect.")
    due_at: datetime = describe("From when on it is late.")
    enforced_at: datetime | None = describe("When it acknowledged; null while PENDING.")
    is_late: bool = describe("Whether it is PENDING and due, and the policy names the system still. An alarm.")

    @staticmethod
    def of(view: enforcement.EnforcementView, eye: Perspective) -> "Enforcement":
        return Enforcement(
            _view=view,
            _eye=eye,
            system=view.system,
            name=enforcement.name_of(view.system, eye.policy),
            epoch=view.epoch,
            status=view.status,
            asked_at=view.asked_at,
            due_at=view.due_at,
            enforced_at=view.enforced_at,
            is_late=view.is_late(eye.policy, eye.now),
        )

    @strawberry.field(description="The canceled account; null for services, which read no accounts.")
    async def account(self, info: Info) -> "Account | None":
        if not self._eye.sees_billing:
            return None
        view = await info.context.accounts.load(self._view.account_id)
        return None if view is None else Account.of(view, self._eye.toward(view))


@strawberry.type(description="A customer's account: a company's workspace, never one person.")
class Account(Node):
    _view: strawberry.Private[AccountView]
    _eye: strawberry.Private[Perspective]
    reference: str = describe(
        "The host's own name for the account. Of a deleted account, `deleted:` and the SHA-256 of it in hexadecimal."
    )
    name: str = describe("The account's name; it is typed to confirm a cancellation. Empty once it is deleted.")
    status: AccountStatus = describe("Where the account is in its life.")
    epoch: int = describe(EPOCH)
    can_send_messages: bool = describe("Whether messages may be sent for the account.")
    members_can_sign_in: bool = describe("Whether its members have access.")
    cancellation_effective_at: datetime | None = describe("When a scheduled cancellation takes effect.")
    canceled_at: datetime | None = describe("When it was canceled; null when it is not.")
    restartable_until: datetime | None = describe("Until when the billing team can restart it.")
    deletion_scheduled_for: datetime | None = describe("When its data is deleted; null while held, or not canceled.")
    deletion_held_at: datetime | None = describe("Since when its deletion is on hold.")
    deletion_started_at: datetime | None = describe("When its deletion began; from then on there is no way back.")
    deleted_at: datetime | None = describe("When its data was gone.")

    @staticmethod
    def of(view: AccountView, eye: Perspective) -> "Account":
        return Account(
            id=strawberry.ID(nodes.encode(Kind.ACCOUNT, view.id)),
            _view=view,
            _eye=eye,
            reference=view.reference,
            name=view.name,
            status=view.status,
            epoch=view.epoch,
            can_send_messages=view.has_access(eye.now),
            members_can_sign_in=view.has_access(eye.now),
            cancellation_effective_at=view.cancellation_effective_at,
            canceled_at=view.canceled_at,
            restartable_until=view.restartable_until,
            deletion_scheduled_for=view.deletion_scheduled_for,
            deletion_held_at=view.deletion_held_at,
            deletion_started_at=view.deletion_started_at,
            deleted_at=view.deleted_at,
        )

    @strawberry.field(
        description="Its plan, with the policy in force. Null for a deleted account on a plan that is no more."
    )
    def plan(self) -> Plan | None:
        plan = self._eye.policy.plans.get(self._view.plan_code)
        return None if plan is None else Plan.of(plan, self._eye.policy)

    @strawberry.field(
        description="The deletion of its data; null while it is not canceled. Needs the billing permission."
    )
    def deletion(self) -> Deletion | None:
        self._eye.require_billing()
        return Deletion.of(self._view, self._eye)

    @strawberry.field(
        description="Which of the policy's systems have obeyed the cancellation that stands, by code; empty while "
        "the account is not canceled. Needs the billing permission."
    )
    async def enforcement(self, info: Info) -> list[Enforcement] | None:
        self._eye.require_billing()
        return [Enforcement.of(view, self._eye) for view in await info.context.enforcement.load(self._view.id)]

    @strawberry.field(description="What the caller can do about its cancellation now, and why not where they cannot.")
    def allowed_actions(self) -> list[ActionAvailability]:
        facts = self._view.facts(self._eye.policy)
        return [ActionAvailability.of(one) for one in lifecycle.availability(self._eye.actor, facts, self._eye.now)]

    @strawberry.field(description="When the paid period ends. Needs the billing permission.")
    def current_period_end(self) -> datetime | None:
        self._eye.require_billing()
        return self._view.current_period_end

    @strawberry.field(
        description="Its Customer Success Manager, or who takes their place. Needs the billing permission."
    )
    def customer_success_manager(self) -> Contact | None:
        self._eye.require_billing()
        return Contact.of(self._view.csm or self._eye.policy.customer_success)

    @strawberry.field(description="The open request to cancel, if there is one. Needs the billing permission.")
    def open_request(self) -> CancellationRequest | None:
        self._eye.require_billing()
        request = self._view.request
        return None if request is None else CancellationRequest.of(request, self._eye)

    @strawberry.field(description="Every attempt to cancel, newest first. Needs the billing permission.")
    async def cancellation_requests(
        self, info: Info, first: First = None, after: After = None
    ) -> Connection[CancellationRequest] | None:
        self._eye.require_billing()
        size, position = nodes.page_size(first), REQUESTS.position(after)
        rows = await info.context.requests.load((self._view.id, position, size + 1))
        return connection(
            rows,
            size,
            after,
            lambda row: REQUESTS.cursor(row.requested_at, row.id),
            lambda row: CancellationRequest.of(row, self._eye),
        )

    @strawberry.field(description="Its members, newest first. Needs the billing permission.")
    async def members(self, info: Info, first: First = None, after: After = None) -> Connection[Member] | None:
        self._eye.require_billing()
        size, position = nodes.page_size(first), MEMBERS.position(after)
        rows = await info.context.members.load((self._view.id, position, size + 1))
        return connection(rows, size, after, lambda row: MEMBERS.cursor(row.created_at, row.id), Member.of)

    @strawberry.field(description="What happened to it, newest first. Needs the billing permission.")
    async def history(self, info: Info, first: First = None, after: After = None) -> Connection[Transition] | None:
        self._eye.require_billing()
        size, position = nodes.page_size(first), TRANSITIONS.position(after)
        rows = await info.context.transitions.load((self._view.id, position, size + 1))
        return connection(
            rows, size, after, lambda row: TRANSITIONS.cursor(row.sequence, row.account_id), Transition.of
        )

    @strawberry.field(
        description="When a former member asked the billing team to restart it, since it was canceled. "
        "Needs the billing permission."
    )
    async def restart_requested_at(self, info: Info) -> datetime | None:
        self._eye.require_billing()
        return await info.context.restart_requested_at.load(self._view.id)


@strawberry.type(description="An email that was promised to one person, and what became of it.")
class Delivery:
    _view: strawberry.Private[outbox.MessageView]
    _eye: strawberry.Private[Perspective]
    message_id: str = describe("Its Message-ID, the same for every try; `sunset deliveries` knows it by that.")
    template: str = describe("Which email.")
    state: outbox.State = describe("Where it is.")
    recipient: Contact | None = describe("To whom; null once their data is erased.")
    attempts: int = describe("How many tries have begun.")
    last_error: str | None = describe("Why the last one failed; null when none has, and once it is delivered.")
    created_at: datetime = describe("When it was promised.")
    due_at: datetime | None = describe("When the next try may begin; null when there is none to come.")
    delivered_at: datetime | None = describe("When the mail server accepted it.")
    dead_at: datetime | None = describe("When it became a dead letter.")
    dropped_at: datetime | None = describe("When an operator gave it up.")

    @staticmethod
    def of(view: outbox.MessageView, eye: Perspective) -> "Delivery":
        """For staff. Raises `Forbidden` for everybody else."""
        eye.require_staff()
        known = view.recipient_address != ""
        settled = view.delivered_at or view.dead_at or view.dropped_at
        return Delivery(
            _view=view,
            _eye=eye,
            message_id=view.message_id,
            template=view.template,
            state=view.state,
            recipient=Contact(name=view.recipient_name, email=view.recipient_address) if known else None,
            attempts=view.attempts,
            last_error=view.last_error,
            created_at=view.created_at,
            due_at=None if settled else view.due_at,
            delivered_at=view.delivered_at,
            dead_at=view.dead_at,
            dropped_at=view.dropped_at,
        )

    @strawberry.field(description="The account that it is about; null when it is about none.")
    async def account(self, info: Info) -> Account | None:
        if self._view.account_id is None:
            return None
        account = await info.context.accounts.load(self._view.account_id)
        return None if account is None else Account.of(account, self._eye.toward(account))


@strawberry.type(description="A type of event that webhook endpoints are told of.")
class WebhookEvent:
    type: str = describe("Its name, as in the event's `type`.")
    description: str = describe("What has happened, and what to do about it.")
    example: str = describe("The body of such an event, as JSON.")
    json_schema: str = describe("What every such body meets: a JSON Schema, as JSON.")

    @staticmethod
    @cache  # what is told of a type is the same for as long as the process runs, and takes a while to make
    def of(kind: TransitionType) -> "WebhookEvent":
        return WebhookEvent(
            type=kind.value,
            description=events.CATALOGUE[kind].description,
            example=orjson.dumps(events.example(kind)).decode(),
            json_schema=orjson.dumps(events.schema(kind)).decode(),
        )


@strawberry.type(description="Where another system hears of what happens to accounts. It is disabled, never deleted.")
class WebhookEndpoint(Node):
    url: str = describe("Where events are sent.")
    description: str = describe("What it is for.")
    event_types: list[str] = describe("The types of events that it is told of; empty: all.")
    created_at: datetime = describe("Since when it is told.")
    previous_secret_until: datetime | None = describe(
        "Until when the secret before the last rotation signs too; null when there was none. It may have passed."
    )
    disabled_at: datetime | None = describe("Since when it is told nothing; null while it is enabled.")
    disabled_reason: str | None = describe("Why; null while it is enabled.")
    failures: int = describe("How many exchanges have failed in a row.")
    paused_until: datetime | None = describe(
        "Its deliveries wait until then, because it has failed; null when it has not. It may have passed."
    )

    @staticmethod
    def of(view: webhooks.EndpointView) -> "WebhookEndpoint":
        return WebhookEndpoint(
            id=strawberry.ID(nodes.encode(Kind.WEBHOOK_ENDPOINT, view.id)),
            url=view.url,
            description=view.description,
            event_types=list(view.event_types),
            created_at=view.created_at,
            previous_secret_until=view.previous_secret_until,
            disabled_at=view.disabled_at,
            disabled_reason=view.disabled_reason,
            failures=view.failures,
            paused_until=view.paused_until,
        )


@strawberry.type(
    description="An event that was promised to an endpoint, and what became of it; its id is `webhook-id`."
)
class WebhookDelivery(Node):
    endpoint_id: strawberry.ID = describe("The endpoint's id.")
    account_id: strawberry.ID | None = describe("The id of the account that it is about; null for a ping.")
    type: str = describe("The event's type.")
    epoch: int | None = describe("The account's epoch; null for a ping.")
    sequence: int | None = describe("The event's place in the account's history; null for a ping.")
    state: webhooks.State = describe("Where it is.")
    created_at: datetime = describe("When it was promised.")
    attempts: int = describe("How many tries have begun.")
    next_attempt_at: datetime | None = describe(
        "When the next try may begin, unless the endpoint is paused or disabled; null when there is none to come."
    )
    last_attempt_at: datetime | None = describe("When the last try began; null before the first.")
    last_status: int | None = describe("The HTTP status of the last answer; null when there was none.")
    last_latency_ms: int | None = describe("How long the last exchange took, in milliseconds.")
    last_error: str | None = describe("Why the last try failed; null when it did not.")
    delivered_at: datetime | None = describe("When the receiver accepted it.")
    dead_at: datetime | None = describe("When it became a dead letter.")

    @staticmethod
    def of(view: webhooks.DeliveryView) -> "WebhookDelivery":
        pending = view.state is webhooks.State.PENDING
        return WebhookDelivery(
            id=strawberry.ID(nodes.encode(Kind.WEBHOOK_DELIVERY, view.id)),
            endpoint_id=strawberry.ID(nodes.encode(Kind.WEBHOOK_ENDPOINT, view.endpoint_id)),
            account_id=None if view.account_id is None else strawberry.ID(nodes.encode(Kind.ACCOUNT, view.account_id)),
            type=view.type,
            epoch=view.epoch,
            sequence=view.sequence,
            state=view.state,
            created_at=view.created_at,
            attempts=view.attempts,
            next_attempt_at=view.due_at if pending else None,
            last_attempt_at=view.last_attempt_at,
            last_status=view.last_status,
            last_latency_ms=view.last_latency_ms,
            last_error=view.last_error,
            delivered_at=view.delivered_at,
            dead_at=view.dead_at,
        )


@strawberry.type(description="What a cancellation confirmed now would do. Nothing is changed by looking.")
class CancellationPreview:
    _view: strawberry.Private[AccountView]
    _eye: strawberry.Private[Perspective]
    _reason: strawberry.Private[FeedbackReason | None]
    _members: strawberry.Private[int]

    @strawberry.field(description="How many members would lose access; `account.members` says who.")
    def members_losing_access(self) -> int:
        return self._members

    @strawberry.field(description="The account.")
    def account(self) -> Account:
        return Account.of(self._view, self._eye)

    @strawberry.field(description="When messages would stop and access would be removed.")
    def effective_at(self) -> datetime:
        return lifecycle.confirm(self._view.facts(self._eye.policy), self._eye.now).effective_at

    @strawberry.field(description="The last moment at which the billing team could restart the account.")
    def restartable_until(self) -> datetime:
        return self._window().restartable_until

    @strawberry.field(description="When the data would be deleted.")
    def deletion_scheduled_for(self) -> datetime:
        return self._window().deletion_scheduled_for

    def _window(self) -> lifecycle.RetentionWindow:
        plan = self._view.plan(self._eye.policy)
        effective = lifecycle.confirm(self._view.facts(self._eye.policy), self._eye.now).effective_at
        return lifecycle.retention_window(effective, plan.retention)

    @strawberry.field(description="The alternatives that would be offered.")
    async def offers(self) -> list[OfferPreview]:
        found = await offers.suitable(self._eye.policy, self._view, self._reason, self._eye.now)
        return [
            OfferPreview(code=one.code, kind=one.kind, title=one.title, description=one.description) for one in found
        ]


assert enums  # The enums above are described there.
