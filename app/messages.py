"""The catalogue of emails: what each one needs to know, as frozen facts.

Facts are taken inside the transaction that they tell of and stored with the outbox row; the words are rendered
from them when the message is sent (`app.delivery`). So a message can be retried for days and still says what was
true when it was promised, and no secret is stored: a link is kept as what it grants (`Link`) and signed on sending.
Pure: the standard library alone.
"""

from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from app.errors import Contact
from app.lifecycle import HaltCause, LinkPurpose


@dataclass(frozen=True, kw_only=True)
class LinkGrant:
    """The one thing that an emailed link lets its bearer do, while their permission lasts."""

    purpose: LinkPurpose
    issuer: str
    """Of the person, not of the link."""
    subject: str
    account_id: UUID
    request_id: UUID
    generation: int = 0
    """Which of the confirmation tokens that the request has had; a later one makes the earlier useless."""


@dataclass(frozen=True, kw_only=True)
class Link(LinkGrant):
    """A link as an email has it: what it grants, and for how long."""

    issued_at: datetime
    expires_at: datetime


@dataclass(frozen=True, kw_only=True)
class LateAccount:
    """An account by its opaque id: a letter about many is not found when one of them is erased, and so it has none of
    their names."""

    id: str
    epoch: int


@dataclass(frozen=True, kw_only=True)
class LateSystem:
    """A system that has not acknowledged cancellations in time."""

    code: str
    name: str
    since: datetime
    late: int
    """How many accounts wait for it in vain."""
    news: int
    """How many of these no letter has told of before."""
    first: tuple[LateAccount, ...]
    """The first of the latter, by when they were due."""


@dataclass(frozen=True, kw_only=True)
class Email:
    """What every email knows. `template` names its folder of templates and stays stable: stored rows refer to it."""

    template: ClassVar[str]
    about: ClassVar[str]
    """When it is sent and to whom, for the documentation."""

    erased_when_settled: ClassVar[bool] = False
    """Whether nothing but the fact of its delivery is kept of it."""


@dataclass(frozen=True, kw_only=True)
class AccountEmail(Email):
    """About one account."""

    account_name: str
    plan_name: str


@dataclass(frozen=True, kw_only=True)
class CancellationReceived(AccountEmail):
    template = "cancellation-received"
    about = "To the member who asked to cancel an ASSISTED plan: received, and who will be in touch."

    requested_at: datetime
    csm: Contact
    response_hours: int


@dataclass(frozen=True, kw_only=True)
class AssistanceRequested(AccountEmail):
    template = "assistance-requested"
    about = "To the Customer Success Manager: a member of an ASSISTED plan asks to cancel."

    account_reference: str
    requested_at: datetime
    respond_by: datetime
    member: Contact


@dataclass(frozen=True, kw_only=True)
class ConfirmationRequested(AccountEmail):
    template = "confirmation-requested"
    about = "To the members with the billing permission: staff has opened the cancellation; the link to confirm it."

    opened_by: Contact
    expires_at: datetime
    link: Link


@dataclass(frozen=True, kw_only=True)
class CancellationConfirmed(AccountEmail):
    template = "cancellation-confirmed"
    about = "To the member who confirmed: the account is canceled, what stopped, and until when it can be restarted."

    canceled_at: datetime
    canceled_by: str
    restartable_until: datetime
    deletion_scheduled_for: datetime
    retention_hours: int
    billing_contact: Contact
    security_contact: Contact
    restart_link: Link
    feedback_link: Link


@dataclass(frozen=True, kw_only=True)
class CancellationNotice(CancellationConfirmed):
    template = "cancellation-notice"
    about = "To the other members with the billing permission: who canceled the account, and what to do about it."


@dataclass(frozen=True, kw_only=True)
class CancellationScheduled(AccountEmail):
    template = "cancellation-scheduled"
    about = "To the members with the billing permission: confirmed, takes effect at the end of the paid period."

    confirmed_at: datetime
    confirmed_by: str
    effective_at: datetime
    retention_hours: int
    security_contact: Contact


@dataclass(frozen=True, kw_only=True)
class CancellationWithdrawn(AccountEmail):
    template = "cancellation-withdrawn"
    about = "To the members with the billing permission: the cancellation was withdrawn; nothing changes."

    withdrawn_at: datetime
    withdrawn_by: str


@dataclass(frozen=True, kw_only=True)
class OfferAccepted(AccountEmail):
    template = "offer-accepted"
    about = "To the billing team: a member accepted an offer instead of canceling; it is to be carried out."

    account_reference: str
    accepted_at: datetime
    accepted_by: Contact
    offer_code: str
    offer_title: str


@dataclass(frozen=True, kw_only=True)
class RestartRequested(AccountEmail):
    template = "restart-requested"
    about = "To the billing team: a former member asks to restart a canceled account."

    account_reference: str
    requested_at: datetime
    requested_by: Contact
    note: str
    restartable_until: datetime


@dataclass(frozen=True, kw_only=True)
class AccountRestarted(AccountEmail):
    template = "account-restarted"
    about = "To the members with the billing permission: the account is active again."

    restarted_at: datetime
    billing_contact: Contact


@dataclass(frozen=True, kw_only=True)
class AssistanceReminder(AssistanceRequested):
    template = "assistance-reminder"
    about = "To the Customer Success Manager: the time to answer a request to cancel has passed."


@dataclass(frozen=True, kw_only=True)
class AssistanceEscalated(AssistanceRequested):
    template = "assistance-escalated"
    about = "To the billing team: the Customer Success Manager was reminded and has not answered."

    csm: Contact


@dataclass(frozen=True, kw_only=True)
class DeletionReminder(AccountEmail):
    template = "deletion-reminder"
    about = "To the members with the billing permission, on the policy's days before the deletion."

    canceled_at: datetime
    deletion_scheduled_for: datetime
    hours_left: int
    restart_link: Link | None
    """None when the time to restart is over, as after a long hold."""
    billing_contact: Contact


@dataclass(frozen=True, kw_only=True)
class DeletionRescheduled(AccountEmail):
    template = "deletion-rescheduled"
    about = "To the members with the billing permission: a hold was released, and the data has a new deletion date."

    deletion_scheduled_for: datetime
    billing_contact: Contact


@dataclass(frozen=True, kw_only=True)
class AccountDeleted(AccountEmail):
    template = "account-deleted"
    about = "To the members who had the billing permission: the data is gone. The last email about an account."
    erased_when_settled = True

    canceled_at: datetime
    deleted_at: datetime
    billing_contact: Contact


@dataclass(frozen=True, kw_only=True)
class DeletionsHalted(Email):
    template = "deletions-halted"
    about = "To the operators: more deletions fell due than the policy allows, and all have stopped."

    halted_at: datetime
    due: int
    allowed: int


@dataclass(frozen=True, kw_only=True)
class HaltBegan(Email):
    template = "halt-began"
    about = (
        "To the operators: no deletion begins until somebody has looked, after a restore or because one has halted all."
    )

    halted_at: datetime
    cause: HaltCause
    evidence: str


@dataclass(frozen=True, kw_only=True)
class EnforcementLate(Email):
    template = "enforcement-late"
    about = "To the operators: systems have not acknowledged cancellations in time. One for all, at most once an hour."

    systems: tuple[LateSystem, ...]
    """All that are late, those with nothing new among them."""


CATALOGUE: dict[str, type[Email]] = {
    email.template: email
    for email in (
        CancellationReceived,
        AssistanceRequested,
        ConfirmationRequested,
        CancellationConfirmed,
        CancellationNotice,
        CancellationScheduled,
        CancellationWithdrawn,
        OfferAccepted,
        RestartRequested,
        AccountRestarted,
        AssistanceReminder,
        AssistanceEscalated,
        DeletionReminder,
        DeletionRescheduled,
        AccountDeleted,
        DeletionsHalted,
        HaltBegan,
        EnforcementLate,
    )
}


def pack(email: Email) -> dict[str, Any]:
    """The facts as JSON values."""
    return {field.name: _pack(getattr(email, field.name)) for field in fields(email)}


def unpack(template: str, facts: dict[str, Any]) -> Email:
    """The email of a stored row. Raises KeyError for a template or a fact that this version does not know."""
    kind = CATALOGUE[template]
    return kind(**{field.name: _unpack(field.type, facts[field.name]) for field in fields(kind)})


def _pack(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, Contact | Link | LateSystem | LateAccount):
        return {field.name: _pack(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_pack(one) for one in value]
    return value


_LISTS: dict[Any, Any] = {tuple[LateSystem, ...]: LateSystem, tuple[LateAccount, ...]: LateAccount}


def _unpack(kind: Any, value: Any) -> Any:
    if kind is datetime:
        return datetime.fromisoformat(value)
    if kind in (UUID, LinkPurpose, HaltCause):
        return kind(value)
    if kind == Link | None:
        kind = Link
        if value is None:
            return None
    if kind in _LISTS:
        return tuple(_unpack(_LISTS[kind], one) for one in value)
    if kind in (Contact, Link, LateSystem, LateAccount):
        return kind(**{field.name: _unpack(field.type, value[field.name]) for field in fields(kind)})
    return value
