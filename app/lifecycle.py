"""The life of an account: states, who may do what in which of them, and what follows.

Pure rules. This module knows no database, no clock and no network: `now` is an argument, facts come in as
frozen values, and what comes back is the next step or a `Refusal` from `app.errors`. The rules are the table
`RULES`; everything else reads it. Actions ask it under the row lock, the API asks it for `allowedActions`, so
the two cannot disagree.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NamedTuple
from uuid import UUID

from app import errors
from app.errors import Contact

MAX_WRONG_TRIES = 5
"""A confirmation token is void after this many wrong tries, counted in the database."""

MAX_FEEDBACK_PER_REQUEST = 20
MAX_COMMENT_LENGTH = 5_000
MAX_NOTE_LENGTH = 2_000


class AccountStatus(StrEnum):
    ACTIVE = "ACTIVE"
    CANCELLATION_SCHEDULED = "CANCELLATION_SCHEDULED"
    CANCELED = "CANCELED"
    DELETING = "DELETING"
    DELETED = "DELETED"


class RequestStatus(StrEnum):
    PENDING_ASSISTANCE = "PENDING_ASSISTANCE"
    PENDING_CONFIRMATION = "PENDING_CONFIRMATION"
    CONFIRMED = "CONFIRMED"
    EFFECTIVE = "EFFECTIVE"
    REVERTED = "REVERTED"
    WITHDRAWN = "WITHDRAWN"
    SAVED = "SAVED"
    EXPIRED = "EXPIRED"


OPEN_REQUEST = frozenset(
    {RequestStatus.PENDING_ASSISTANCE, RequestStatus.PENDING_CONFIRMATION, RequestStatus.CONFIRMED}
)
"""An account has at most one request in these statuses."""


class Channel(StrEnum):
    """How a plan is canceled."""

    SELF_SERVE = "SELF_SERVE"
    ASSISTED = "ASSISTED"


class CancellationTiming(StrEnum):
    """When a confirmed cancellation takes effect."""

    IMMEDIATE = "IMMEDIATE"
    PERIOD_END = "PERIOD_END"


class MemberRole(StrEnum):
    ADMIN = "ADMIN"
    MEMBER = "MEMBER"


class Permission(StrEnum):
    ACCESS_BILLING_AND_ACCOUNT_INFO = "ACCESS_BILLING_AND_ACCOUNT_INFO"


class StaffRole(StrEnum):
    BILLING_TEAM = "BILLING_TEAM"
    CUSTOMER_SUCCESS_MANAGER = "CUSTOMER_SUCCESS_MANAGER"
    SUPPORT = "SUPPORT"


class Scope(StrEnum):
    """What another system may do."""

    PROVISION = "provision"
    GATE = "gate"
    DELETION = "deletion"
    WEBHOOKS = "webhooks"
    ENFORCEMENT = "enforcement"


class FeedbackReason(StrEnum):
    TOO_EXPENSIVE = "TOO_EXPENSIVE"
    MISSING_FEATURES = "MISSING_FEATURES"
    SWITCHED_SERVICE = "SWITCHED_SERVICE"
    UNUSED = "UNUSED"
    CUSTOMER_SERVICE = "CUSTOMER_SERVICE"
    LOW_QUALITY = "LOW_QUALITY"
    TOO_COMPLEX = "TOO_COMPLEX"
    OTHER = "OTHER"


class OfferKind(StrEnum):
    DISCOUNT = "DISCOUNT"
    PAUSE = "PAUSE"
    PLAN_CHANGE = "PLAN_CHANGE"
    TRIAL_EXTENSION = "TRIAL_EXTENSION"
    CONTACT = "CONTACT"
    CUSTOM = "CUSTOM"


class OfferStatus(StrEnum):
    OPEN = "OPEN"
    ACCEPTED = "ACCEPTED"
    DECLINED = "DECLINED"


class ActorKind(StrEnum):
    MEMBER = "MEMBER"
    STAFF = "STAFF"
    SERVICE = "SERVICE"
    SYSTEM = "SYSTEM"


class LinkPurpose(StrEnum):
    """The one thing that an emailed link is good for."""

    CONFIRM = "confirm"
    FEEDBACK = "feedback"
    RESTART = "restart"


class Action(StrEnum):
    CANCEL_ACCOUNT = "CANCEL_ACCOUNT"
    SUBMIT_FEEDBACK = "SUBMIT_FEEDBACK"
    ACCEPT_OFFER = "ACCEPT_OFFER"
    DECLINE_OFFER = "DECLINE_OFFER"
    WITHDRAW_CANCELLATION = "WITHDRAW_CANCELLATION"
    CONFIRM_CANCELLATION = "CONFIRM_CANCELLATION"
    RESTART_ACCOUNT = "RESTART_ACCOUNT"
    REQUEST_RESTART = "REQUEST_RESTART"
    HOLD_DELETION = "HOLD_DELETION"
    RELEASE_DELETION = "RELEASE_DELETION"


class TransitionType(StrEnum):
    """What happened to an account, one row of its history each. The names are those of the events that tell of it."""

    CANCELLATION_REQUESTED = "account.cancellation_requested"
    CANCELLATION_ASSISTANCE_REQUESTED = "account.cancellation_assistance_requested"
    CANCELLATION_WITHDRAWN = "account.cancellation_withdrawn"
    CANCELLATION_EXPIRED = "account.cancellation_expired"
    OFFER_ACCEPTED = "account.offer_accepted"
    OFFER_DECLINED = "account.offer_declined"
    CANCELLATION_SCHEDULED = "account.cancellation_scheduled"
    CANCELED = "account.canceled"
    FEEDBACK_SUBMITTED = "account.feedback_submitted"
    RESTART_REQUESTED = "account.restart_requested"
    RESTARTED = "account.restarted"
    DELETION_REMINDER = "account.deletion_reminder"
    DELETION_HELD = "account.deletion_held"
    DELETION_RELEASED = "account.deletion_released"
    DELETION_STARTED = "account.deletion_started"
    DELETED = "account.deleted"
    STATUS = "account.status"


EPOCHS_OF_A_RESTORE = 1_000_000
"""How far a restore of the database puts every account's epoch ahead of all that were told before it. An epoch divided
by it says how many restores the account has behind it."""


class HaltCause(StrEnum):
    """Why no deletion begins until somebody has looked."""

    OPERATOR = "OPERATOR"
    RESTORED = "RESTORED"
    MOVED = "MOVED"


class Phase(StrEnum):
    """An account and its open request in one word: the columns of the rule table."""

    ACTIVE = "ACTIVE"
    ASSISTANCE_PENDING = "ASSISTANCE_PENDING"
    CONFIRMATION_PENDING = "CONFIRMATION_PENDING"
    SCHEDULED = "SCHEDULED"
    CANCELED = "CANCELED"
    HELD = "HELD"
    DELETING = "DELETING"
    DELETED = "DELETED"


class Relation(StrEnum):
    """What an actor is to one account."""

    BILLING_MEMBER = "BILLING_MEMBER"
    MEMBER = "MEMBER"
    CONFIRM_LINK = "CONFIRM_LINK"
    FEEDBACK_LINK = "FEEDBACK_LINK"
    RESTART_LINK = "RESTART_LINK"
    ACCOUNT_CSM = "ACCOUNT_CSM"
    BILLING_TEAM = "BILLING_TEAM"
    STAFF = "STAFF"
    SERVICE = "SERVICE"


@dataclass(frozen=True, kw_only=True)
class Actor:
    """Who acts, with what they are to the account in question, read from the database for this request."""

    kind: ActorKind
    id: UUID | None
    name: str
    relations: frozenset[Relation]


SYSTEM = Actor(kind=ActorKind.SYSTEM, id=None, name="Sunset", relations=frozenset())


@dataclass(frozen=True, kw_only=True)
class RequestFacts:
    """What the rules need to know of an open cancellation request."""

    id: UUID
    status: RequestStatus
    requested_by_id: UUID | None
    opened_by_staff_at: datetime | None
    confirmation_expires_at: datetime | None
    wrong_tries: int


@dataclass(frozen=True, kw_only=True)
class AccountFacts:
    """What the rules need to know of an account, its plan, and its open request."""

    id: UUID
    name: str
    status: AccountStatus
    channel: Channel
    effective: CancellationTiming
    current_period_end: datetime | None
    cancellation_effective_at: datetime | None
    restartable_until: datetime | None
    deletion_scheduled_for: datetime | None
    deletion_held_at: datetime | None
    csm: Contact
    billing_contact: Contact
    request: RequestFacts | None

    def phase(self, now: datetime) -> Phase:
        """The column of the rule table. A request whose confirmation time has passed no longer counts as open."""
        if self.status is AccountStatus.CANCELLATION_SCHEDULED:
            return Phase.SCHEDULED
        if self.deletion_held_at is not None:
            return Phase.HELD
        if self.status is not AccountStatus.ACTIVE:
            return Phase(self.status.value)
        if self.request is None or has_expired(self.request, now):
            return Phase.ACTIVE
        if self.request.status is RequestStatus.PENDING_ASSISTANCE:
            return Phase.ASSISTANCE_PENDING
        return Phase.CONFIRMATION_PENDING


def has_expired(request: RequestFacts, now: datetime) -> bool:
    """Whether the time to confirm has passed. A request that waits for assistance does not expire."""
    return (
        request.status is RequestStatus.PENDING_CONFIRMATION
        and request.confirmation_expires_at is not None
        and request.confirmation_expires_at <= now
    )


class Rule(NamedTuple):
    who: frozenset[Relation]
    phases: frozenset[Phase]


_IN_WINDOW = frozenset({Phase.CANCELED, Phase.HELD})
_PENDING = frozenset({Phase.ASSISTANCE_PENDING, Phase.CONFIRMATION_PENDING})
_BILLING_MEMBER = frozenset({Relation.BILLING_MEMBER})

RULES: Mapping[Action, Rule] = {
    Action.CANCEL_ACCOUNT: Rule(
        _BILLING_MEMBER | {Relation.ACCOUNT_CSM, Relation.BILLING_TEAM}, _PENDING | {Phase.ACTIVE}
    ),
    Action.SUBMIT_FEEDBACK: Rule(
        _BILLING_MEMBER | {Relation.FEEDBACK_LINK},
        _PENDING | _IN_WINDOW | {Phase.ACTIVE, Phase.SCHEDULED},
    ),
    Action.ACCEPT_OFFER: Rule(_BILLING_MEMBER, _PENDING),
    Action.DECLINE_OFFER: Rule(_BILLING_MEMBER, _PENDING),
    Action.WITHDRAW_CANCELLATION: Rule(_BILLING_MEMBER | {Relation.ACCOUNT_CSM}, _PENDING | {Phase.SCHEDULED}),
    Action.CONFIRM_CANCELLATION: Rule(
        _BILLING_MEMBER | {Relation.CONFIRM_LINK}, frozenset({Phase.CONFIRMATION_PENDING})
    ),
    Action.RESTART_ACCOUNT: Rule(frozenset({Relation.BILLING_TEAM}), _IN_WINDOW),
    Action.REQUEST_RESTART: Rule(frozenset({Relation.RESTART_LINK}), _IN_WINDOW),
    Action.HOLD_DELETION: Rule(frozenset({Relation.BILLING_TEAM}), frozenset({Phase.CANCELED})),
    Action.RELEASE_DELETION: Rule(frozenset({Relation.BILLING_TEAM}), frozenset({Phase.HELD})),
}
"""Who may do what, when. Whatever is not here is refused."""

_STATE_MESSAGES: Mapping[Phase, str] = {
    Phase.ACTIVE: "The account is active and has no open cancellation request.",
    Phase.ASSISTANCE_PENDING: "The cancellation request waits for the Customer Success Manager.",
    Phase.CONFIRMATION_PENDING: "The cancellation request waits for a member's confirmation.",
    Phase.SCHEDULED: "The cancellation is confirmed and scheduled. It can be withdrawn until it takes effect.",
    Phase.CANCELED: "The account is canceled.",
    Phase.HELD: "The account is canceled, and its deletion is on hold.",
    Phase.DELETING: "The account's data is being deleted; this cannot be undone. A new account must be set up.",
    Phase.DELETED: "The account's data has been deleted; this cannot be undone. A new account must be set up.",
}

_PERMISSION_MESSAGES: Mapping[Action, str] = {
    Action.RESTART_ACCOUNT: "Only the billing team restarts an account.",
    Action.HOLD_DELETION: "Only the billing team holds a deletion.",
    Action.RELEASE_DELETION: "Only the billing team releases a deletion.",
    Action.REQUEST_RESTART: "A restart is asked for with the link in the cancellation email.",
    Action.CONFIRM_CANCELLATION: (
        'Only a member with the permission "Access billing & account info" confirms a cancellation; staff never does.'
    ),
}
_DEFAULT_PERMISSION_MESSAGE = (
    'This needs the permission "Access billing & account info". An admin of the account has it and can grant it.'
)


def permit(action: Action, actor: Actor) -> None:
    """Refuse `action` with `PermissionDenied` unless the table allows it to this actor in some phase."""
    if not actor.relations & RULES[action].who:
        raise errors.PermissionDenied(_PERMISSION_MESSAGES.get(action, _DEFAULT_PERMISSION_MESSAGE))


def check(action: Action, actor: Actor, account: AccountFacts, now: datetime) -> None:
    """Refuse `action` unless the table allows it to this actor in this phase.

    Permission is looked at before state, so that a caller without the permission learns nothing of the state.
    Raises `PermissionDenied`, `RestartWindowClosed`, `ConfirmationExpired`, `AssistedPlan` or `AccountStateRefused`.
    """
    permit(action, actor)
    phase = account.phase(now)
    if action in {Action.RESTART_ACCOUNT, Action.REQUEST_RESTART} and (
        phase in {Phase.DELETING, Phase.DELETED} or (phase in _IN_WINDOW and not _in_window(account, now))
    ):
        raise _window_closed(account)
    if phase not in RULES[action].phases:
        if action is Action.CONFIRM_CANCELLATION and account.request and has_expired(account.request, now):
            assert account.request.confirmation_expires_at is not None
            raise errors.ConfirmationExpired(
                "The time to confirm has passed. Ask to cancel again to get a new confirmation.",
                expired_at=account.request.confirmation_expires_at,
            )
        raise errors.AccountStateRefused(_STATE_MESSAGES[phase], account_id=account.id)
    if action is Action.SUBMIT_FEEDBACK and Relation.FEEDBACK_LINK in actor.relations and phase not in _IN_WINDOW:
        raise errors.AccountStateRefused(
            f"The cancellation that the link is about is over. {_STATE_MESSAGES[phase]}", account_id=account.id
        )
    effective_at = account.cancellation_effective_at
    if action is Action.WITHDRAW_CANCELLATION and effective_at is not None and effective_at <= now:
        raise errors.AccountStateRefused("The cancellation is just taking effect.", account_id=account.id)
    if action is Action.CONFIRM_CANCELLATION and account.request and _needs_assistance(account, account.request):
        raise assisted_plan(account)


def check_link(action: Action, request_id: UUID, status: RequestStatus | None) -> None:
    """Refuse with `RequestStateRefused` what an emailed link is for, unless the request that it is about stands: what
    has been restarted, or withdrawn, is not taken up again by a link to it. To be asked after `check`."""
    if status is not _LINKED_REQUEST[action]:
        raise errors.RequestStateRefused(
            "The link is about an earlier cancellation. Use the link in the newest email.", request_id=request_id
        )


_LINKED_REQUEST: Mapping[Action, RequestStatus] = {
    Action.CONFIRM_CANCELLATION: RequestStatus.PENDING_CONFIRMATION,
    Action.SUBMIT_FEEDBACK: RequestStatus.EFFECTIVE,
    Action.REQUEST_RESTART: RequestStatus.EFFECTIVE,
}


def _in_window(account: AccountFacts, now: datetime) -> bool:
    return account.restartable_until is not None and now < account.restartable_until


def _window_closed(account: AccountFacts) -> errors.RestartWindowClosed:
    closed_at = account.restartable_until
    if closed_at is None:  # The schema's checks give every canceled account the date.
        raise ValueError(f"account {account.id} is {account.status} and has no restartable_until")
    return errors.RestartWindowClosed(
        f"The time to restart this account ended at {closed_at.isoformat(timespec='seconds')}. "
        "It cannot be recovered; a new account must be set up.",
        closed_at=closed_at,
        contact=account.billing_contact,
    )


def _needs_assistance(account: AccountFacts, request: RequestFacts) -> bool:
    """The channel that holds now decides, also when the plan was changed after the request."""
    return account.channel is Channel.ASSISTED and request.opened_by_staff_at is None


def assisted_plan(account: AccountFacts) -> errors.AssistedPlan:
    return errors.AssistedPlan(
        f"This plan is canceled together with a Customer Success Manager. Please contact {account.csm.name} "
        f"({account.csm.email}), or call cancelAccount to have them contact you.",
        contact=account.csm,
    )


@dataclass(frozen=True, kw_only=True)
class Availability:
    """Whether an action is open to the caller now, and if not, why: the refusal it would meet."""

    action: Action
    refusal: errors.Refusal | None


def availability(actor: Actor, account: AccountFacts, now: datetime) -> list[Availability]:
    """Every action, with the refusal that it would meet now; what a client shows or hides its buttons by."""
    result = []
    for action in Action:
        refusal: errors.Refusal | None = None
        try:
            check(action, actor, account, now)
            if action is Action.CANCEL_ACCOUNT:
                cancel(actor, account, now)
        except errors.Refusal as caught:
            refusal = caught
        result.append(Availability(action=action, refusal=refusal))
    return result


class CancelStep(StrEnum):
    """What `cancelAccount` does next."""

    REQUEST = "a new request, to be confirmed by a member"
    REQUEST_ASSISTANCE = "a new request, handed to the Customer Success Manager"
    HAND_OVER = "the member's request waits for confirmation, and now the plan needs the Customer Success Manager"
    OPEN = "the Customer Success Manager lets the waiting request be confirmed"
    CONFIRM_ALONE = "the member's request waits for assistance, and now the plan needs none"
    OPEN_NEW = "staff opens a request by itself; the members are asked to confirm"
    RETURN = "the open request is returned as it is"


def cancel(actor: Actor, account: AccountFacts, now: datetime) -> CancelStep:
    """The next step of `cancelAccount`. Raises what `check` raises, and `CancellationAlreadyRequested`.

    A member gets back their own open request, and any that staff has opened for the members to confirm. A
    colleague's is refused: it can be withdrawn first, so that nobody confirms what somebody else began unseen.
    """
    check(Action.CANCEL_ACCOUNT, actor, account, now)
    request = None if account.request is None or has_expired(account.request, now) else account.request
    by_member = Relation.BILLING_MEMBER in actor.relations
    if request is None:
        if not by_member:
            return CancelStep.OPEN_NEW
        return CancelStep.REQUEST_ASSISTANCE if account.channel is Channel.ASSISTED else CancelStep.REQUEST
    if not by_member and request.status is RequestStatus.PENDING_ASSISTANCE:
        return CancelStep.OPEN
    own = actor.id is not None and request.requested_by_id == actor.id
    if (
        by_member
        and own
        and request.status is RequestStatus.PENDING_CONFIRMATION
        and _needs_assistance(account, request)
    ):
        return CancelStep.HAND_OVER
    waits_for_csm = request.status is RequestStatus.PENDING_ASSISTANCE
    if by_member and own and waits_for_csm and account.channel is Channel.SELF_SERVE:
        return CancelStep.CONFIRM_ALONE
    if own or request.opened_by_staff_at is not None:
        return CancelStep.RETURN
    raise errors.CancellationAlreadyRequested(
        "Somebody else has already asked to cancel this account. They can confirm it, or it can be withdrawn first.",
        request_id=request.id,
    )


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """When the cancellation takes effect; `at_once` when that is now."""

    effective_at: datetime
    at_once: bool


def confirm(account: AccountFacts, now: datetime) -> Confirmed:
    """When a cancellation confirmed now takes effect. A period that has ended, or none, means now."""
    period_end = account.current_period_end
    if account.effective is CancellationTiming.PERIOD_END and period_end is not None and period_end > now:
        return Confirmed(effective_at=period_end, at_once=False)
    return Confirmed(effective_at=now, at_once=True)


@dataclass(frozen=True, kw_only=True)
class RetentionWindow:
    canceled_at: datetime
    restartable_until: datetime
    deletion_scheduled_for: datetime


def retention_window(canceled_at: datetime, retention: timedelta) -> RetentionWindow:
    """From the cancellation to the scheduled deletion: exact hours of UTC, so summer time cannot shorten it."""
    end = canceled_at + retention
    return RetentionWindow(canceled_at=canceled_at, restartable_until=end, deletion_scheduled_for=end)


def release(account: AccountFacts, minimum_notice: timedelta, now: datetime) -> datetime:
    """When a deletion that is released now is due: never inside the window, and never sooner than the notice."""
    assert account.restartable_until is not None, "a held account is canceled"
    return max(account.restartable_until, now + minimum_notice)


@dataclass(frozen=True, kw_only=True)
class Reminders:
    """Which reminder of a deletion is to be sent now, if any, and when to look again."""

    days: int | None
    next_at: datetime | None


def reminders(deletion_scheduled_for: datetime, days: Iterable[int], sent: Collection[int], now: datetime) -> Reminders:
    """What is due of the reminders that many days before a deletion, `sent` being those that went out for this date.

    Of several that are overdue the nearest is sent, and the ones before it never: they would say what is no longer
    so. When the date itself has come, none is.
    """
    if now >= deletion_scheduled_for:
        return Reminders(days=None, next_at=None)
    moments = {day: deletion_scheduled_for - timedelta(days=day) for day in days}
    overdue = [day for day, moment in moments.items() if moment <= now]
    nearest = min(overdue, default=None)
    return Reminders(
        days=None if nearest in sent else nearest,
        next_at=min((moment for moment in moments.values() if moment > now), default=None),
    )


def deletions_allowed(accounts: int, at_least: int, percent: float) -> int:
    """How many deletions may fall due within 24 hours before all of them are stopped. `accounts`: those that count,
    which new ones do not."""
    return max(at_least, math.floor(accounts * percent / 100))


def has_access(status: AccountStatus, cancellation_effective_at: datetime | None, now: datetime) -> bool:
    """Whether the account's members have access and messages may be sent for it: until the cancellation takes effect,
    which is its time, also when nobody has been there to carry it out."""
    if status is AccountStatus.CANCELLATION_SCHEDULED:
        return cancellation_effective_at is None or now < cancellation_effective_at
    return status is AccountStatus.ACTIVE


# ------------------------------------------------------------------------------------------------------------ notes


def required_note(given: str | None, *, ask: str = "Say why") -> str:
    """Why staff does something, without white space around it. Raises `InvalidInput` for none and for a long one."""
    note = (given or "").strip()
    if not 1 <= len(note) <= MAX_NOTE_LENGTH:
        raise errors.InvalidInput(f"{ask}: a note of 1 to {MAX_NOTE_LENGTH:,} characters is needed.", field="note")
    return note
