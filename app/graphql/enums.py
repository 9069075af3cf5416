"""The enums of the API: the vocabulary of `app.lifecycle`, with the words that a client's developer reads.

Every value has a description; one that is missing here fails when the schema is built.
"""

from collections.abc import Mapping
from enum import Enum, StrEnum

import strawberry

from app import accounts, breaker, deletion, enforcement, lifecycle, outbox, webhooks


class SortDirection(StrEnum):
    ASC = "ASC"
    DESC = "DESC"


def describe_enum(kind: type[Enum], name: str, about: str, values: Mapping[Enum, str]) -> None:
    """Make an enum part of the API, with words for each of its values."""
    strawberry.enum(kind, name=name, description=about)
    for value in kind.__strawberry_definition__.values:  # type: ignore[attr-defined]
        value.description = values[kind[value.name]]


describe_enum(
    lifecycle.AccountStatus,
    "AccountStatus",
    "Where an account is in its life.",
    {
        lifecycle.AccountStatus.ACTIVE: "In use. A cancellation may have been asked for; see `openRequest`.",
        lifecycle.AccountStatus.CANCELLATION_SCHEDULED: (
            "Confirmed, and takes effect at the end of the paid period. Everything works until then."
        ),
        lifecycle.AccountStatus.CANCELED: (
            "Messages have stopped and members have no access. The billing team can restart it until "
            "`restartableUntil`; its data is kept until `deletionScheduledFor`."
        ),
        lifecycle.AccountStatus.DELETING: "The deletion of its data has begun and cannot be undone.",
        lifecycle.AccountStatus.DELETED: "Its data is gone.",
    },
)
describe_enum(
    lifecycle.RequestStatus,
    "CancellationRequestStatus",
    "Where one attempt to cancel is.",
    {
        lifecycle.RequestStatus.PENDING_ASSISTANCE: "Waits for the Customer Success Manager. Open.",
        lifecycle.RequestStatus.PENDING_CONFIRMATION: "Waits for a member to confirm. Open.",
        lifecycle.RequestStatus.CONFIRMED: "Confirmed, and takes effect at `effectiveAt`. Open.",
        lifecycle.RequestStatus.EFFECTIVE: "The account was canceled by it.",
        lifecycle.RequestStatus.REVERTED: "It had canceled the account, which was restarted since.",
        lifecycle.RequestStatus.WITHDRAWN: "Taken back before it took effect.",
        lifecycle.RequestStatus.SAVED: "An offer was accepted instead.",
        lifecycle.RequestStatus.EXPIRED: "Not confirmed in time.",
    },
)
describe_enum(
    lifecycle.Channel,
    "CancellationChannel",
    "How a plan is canceled.",
    {
        lifecycle.Channel.SELF_SERVE: "A member asks and confirms.",
        lifecycle.Channel.ASSISTED: "A member asks, a Customer Success Manager opens it, a member confirms.",
    },
)
describe_enum(
    lifecycle.CancellationTiming,
    "CancellationTiming",
    "When a confirmed cancellation takes effect.",
    {
        lifecycle.CancellationTiming.IMMEDIATE: "With the confirmation.",
        lifecycle.CancellationTiming.PERIOD_END: "At the end of the paid period; at once where there is none.",
    },
)
describe_enum(
    lifecycle.MemberRole,
    "MemberRole",
    "A member's role in one account.",
    {
        lifecycle.MemberRole.ADMIN: "Has every permission.",
        lifecycle.MemberRole.MEMBER: "Has the permissions that were granted.",
    },
)
describe_enum(
    lifecycle.Permission,
    "MemberPermission",
    "What can be granted to a member.",
    {lifecycle.Permission.ACCESS_BILLING_AND_ACCOUNT_INFO: 'Shown to people as "Access billing & account info".'},
)
describe_enum(
    lifecycle.StaffRole,
    "StaffRole",
    "The role of a person of the company that runs the service.",
    {
        lifecycle.StaffRole.BILLING_TEAM: "Restarts accounts, and opens cancellations.",
        lifecycle.StaffRole.CUSTOMER_SUCCESS_MANAGER: (
            "Opens cancellations of their accounts, and of those that name none."
        ),
        lifecycle.StaffRole.SUPPORT: "Reads.",
    },
)
describe_enum(
    lifecycle.Scope,
    "ServiceScope",
    "What another system may do.",
    {
        lifecycle.Scope.PROVISION: "Create and update accounts.",
        lifecycle.Scope.GATE: "Ask whether an account may send and its members may sign in.",
        lifecycle.Scope.DELETION: "Take part in deletions.",
        lifecycle.Scope.WEBHOOKS: "Manage the webhook endpoints, and see what was delivered to them.",
        lifecycle.Scope.ENFORCEMENT: "Acknowledge cancellations, for the enforcing system of the service's name.",
    },
)
describe_enum(
    lifecycle.FeedbackReason,
    "FeedbackReason",
    "Why a customer cancels. What is shown to people is in `feedbackReasons`.",
    {
        lifecycle.FeedbackReason.TOO_EXPENSIVE: "It costs too much.",
        lifecycle.FeedbackReason.MISSING_FEATURES: "It lacks something.",
        lifecycle.FeedbackReason.SWITCHED_SERVICE: "Another service took its place.",
        lifecycle.FeedbackReason.UNUSED: "It is not used.",
        lifecycle.FeedbackReason.CUSTOMER_SERVICE: "The support was not good enough.",
        lifecycle.FeedbackReason.LOW_QUALITY: "It did not work well enough.",
        lifecycle.FeedbackReason.TOO_COMPLEX: "It is too hard to use.",
        lifecycle.FeedbackReason.OTHER: "Something else.",
    },
)
describe_enum(
    lifecycle.OfferKind,
    "OfferKind",
    "What kind of alternative an offer is.",
    {
        lifecycle.OfferKind.DISCOUNT: "A lower price for a time.",
        lifecycle.OfferKind.PAUSE: "A pause instead of an end.",
        lifecycle.OfferKind.PLAN_CHANGE: "Another plan.",
        lifecycle.OfferKind.TRIAL_EXTENSION: "More time to try.",
        lifecycle.OfferKind.CONTACT: "A conversation with somebody who can help.",
        lifecycle.OfferKind.CUSTOM: "Something else; see its description.",
    },
)
describe_enum(
    lifecycle.OfferStatus,
    "OfferStatus",
    "Whether an offer was answered.",
    {
        lifecycle.OfferStatus.OPEN: "Not answered. Nobody has to.",
        lifecycle.OfferStatus.ACCEPTED: "Accepted; the request is SAVED.",
        lifecycle.OfferStatus.DECLINED: "Declined.",
    },
)
describe_enum(
    lifecycle.ActorKind,
    "ActorKind",
    "What kind of actor did something.",
    {
        lifecycle.ActorKind.MEMBER: "A member of the account.",
        lifecycle.ActorKind.STAFF: "A person of the company that runs the service.",
        lifecycle.ActorKind.SERVICE: "Another system of that company.",
        lifecycle.ActorKind.SYSTEM: "Sunset itself, when something was due.",
    },
)
describe_enum(
    lifecycle.Action,
    "AccountAction",
    "What can be done about an account's cancellation; each is the mutation of that name.",
    {
        lifecycle.Action.CANCEL_ACCOUNT: "`cancelAccount`",
        lifecycle.Action.SUBMIT_FEEDBACK: "`submitFeedback`",
        lifecycle.Action.ACCEPT_OFFER: "`acceptOffer`",
        lifecycle.Action.DECLINE_OFFER: "`declineOffer`",
        lifecycle.Action.WITHDRAW_CANCELLATION: "`withdrawCancellation`",
        lifecycle.Action.CONFIRM_CANCELLATION: "`confirmCancellation`",
        lifecycle.Action.RESTART_ACCOUNT: "`restartAccount`",
        lifecycle.Action.REQUEST_RESTART: "`requestRestart`",
        lifecycle.Action.HOLD_DELETION: "`holdDeletion`",
        lifecycle.Action.RELEASE_DELETION: "`releaseDeletion`",
    },
)
describe_enum(
    lifecycle.TransitionType,
    "TransitionType",
    "What happened to an account.",
    {
        lifecycle.TransitionType.CANCELLATION_REQUESTED: "A cancellation was asked for, or opened by staff.",
        lifecycle.TransitionType.CANCELLATION_ASSISTANCE_REQUESTED: "It was handed to a Customer Success Manager.",
        lifecycle.TransitionType.CANCELLATION_WITHDRAWN: "The cancellation was taken back.",
        lifecycle.TransitionType.CANCELLATION_EXPIRED: "The cancellation was not confirmed in time.",
        lifecycle.TransitionType.OFFER_ACCEPTED: "An offer was accepted instead.",
        lifecycle.TransitionType.OFFER_DECLINED: "An offer was declined.",
        lifecycle.TransitionType.CANCELLATION_SCHEDULED: "The cancellation was confirmed for a later time.",
        lifecycle.TransitionType.CANCELED: "The account was canceled.",
        lifecycle.TransitionType.FEEDBACK_SUBMITTED: "Feedback was given.",
        lifecycle.TransitionType.RESTART_REQUESTED: "A former member asked for a restart.",
        lifecycle.TransitionType.RESTARTED: "The account was restarted.",
        lifecycle.TransitionType.DELETION_REMINDER: "The members were reminded of the deletion.",
        lifecycle.TransitionType.DELETION_HELD: "The deletion was put on hold.",
        lifecycle.TransitionType.DELETION_RELEASED: "The hold was released; the deletion has a date again.",
        lifecycle.TransitionType.DELETION_STARTED: "The deletion has begun, and cannot be undone.",
        lifecycle.TransitionType.DELETED: "Its data is gone.",
        lifecycle.TransitionType.STATUS: "The database was restored, and how the account stands was sent to everybody.",
    },
)
describe_enum(
    lifecycle.HaltCause,
    "DeletionHaltCause",
    "Why no deletion begins.",
    {
        lifecycle.HaltCause.OPERATOR: "An operator has halted them.",
        lifecycle.HaltCause.RESTORED: "The database was restored from a back-up: what happened since is not in it.",
        lifecycle.HaltCause.MOVED: "The database is a copy, or has moved; whether it was restored is not known.",
    },
)
describe_enum(
    accounts.AccountSort,
    "AccountSortField",
    "What a list of accounts can be sorted by.",
    {
        accounts.AccountSort.NAME: "Name, by code points.",
        accounts.AccountSort.CREATED_AT: "When Sunset first knew it.",
        accounts.AccountSort.DELETION_SCHEDULED_FOR: "Deletion date; accounts that have none are left out.",
    },
)
describe_enum(
    SortDirection,
    "SortDirection",
    "Which end comes first.",
    {SortDirection.ASC: "Smallest, or earliest, first.", SortDirection.DESC: "Largest, or latest, first."},
)
describe_enum(
    deletion.State,
    "DeletionState",
    "Where the deletion of an account's data is.",
    {
        deletion.State.SCHEDULED: "It has a date, which has not come.",
        deletion.State.HELD: "It is on hold, and has no date.",
        deletion.State.DUE: "Its date has come; it begins with the worker's next round.",
        deletion.State.OVERDUE: "It should have begun more than an hour ago. An alarm.",
        deletion.State.STARTED: "It has begun, and cannot be undone.",
        deletion.State.STALLED: "It began more than an hour ago and is not done. An alarm; see `steps`.",
        deletion.State.DELETED: "It is done.",
    },
)
describe_enum(
    breaker.State,
    "DeletionBreakerState",
    "Whether deletions may begin.",
    {
        breaker.State.CLEAR: "They may.",
        breaker.State.APPROVED: "They may, as many as were approved.",
        breaker.State.HALTED: "All have stopped, because too many fell due within 24 hours.",
        breaker.State.AWAITING_SECOND_APPROVAL: "All have stopped; one person has approved, another one is needed.",
    },
)
describe_enum(
    outbox.State,
    "DeliveryState",
    "Where the delivery of a message is.",
    {
        outbox.State.WAITING: "It waits for the time of its next try.",
        outbox.State.DUE: "A worker takes it next.",
        outbox.State.CLAIMED: "A worker is delivering it.",
        outbox.State.DELIVERED: "The mail server has accepted it.",
        outbox.State.DEAD: "It could not be delivered and is not tried any more: a dead letter.",
        outbox.State.DROPPED: "An operator has given it up.",
    },
)
describe_enum(
    webhooks.State,
    "WebhookDeliveryState",
    "Where the delivery of an event to an endpoint is.",
    {
        webhooks.State.PENDING: "It is due, under way, or waits for its next try.",
        webhooks.State.DELIVERED: "The receiver has accepted it.",
        webhooks.State.DEAD: "It could not be delivered in three days, or the receiver is gone: a dead letter.",
    },
)
describe_enum(
    enforcement.Status,
    "EnforcementStatus",
    "Whether an enforcing system has obeyed a cancellation.",
    {
        enforcement.Status.PENDING: "It has not said so.",
        enforcement.Status.ENFORCED: "It has acknowledged the cancellation.",
    },
)
