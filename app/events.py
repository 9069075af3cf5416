"""The catalogue of events: one for each transition of an account, in CloudEvents' shape.

Pure: what an event says, as plain values, what each is for, an example of each, and the JSON Schema that both meet. An
event tells ids, the host's own reference, states and times; of people it tells the words of their feedback and nothing
else. Who wants to know more asks the API, which knows who may.

Who hears of them, and how, is `app.webhooks`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from app import ids
from app.ids import Kind
from app.lifecycle import EPOCHS_OF_A_RESTORE, AccountStatus, FeedbackReason, TransitionType

SOURCE: Final = "urn:sunset"
CONTENT_TYPE: Final = "application/cloudevents+json"

PING: Final = "webhook.ping"
"""Sent on demand, about no account, to whatever endpoint: a receiver answers it like any other."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """Feedback, in the customer's words."""

    reason: FeedbackReason
    comment: str | None
    submitted_at: datetime


@dataclass(frozen=True, kw_only=True)
class Event:
    """One transition, with what may be told of it. Fields that its type has no use for are not told."""

    id: UUID
    """The transition's."""
    type: TransitionType
    account_id: UUID
    account_reference: str
    status: AccountStatus
    """The account's, after the transition."""
    epoch: int
    sequence: int
    request_id: UUID | None
    occurred_at: datetime
    effective_at: datetime | None = None
    canceled_at: datetime | None = None
    restartable_until: datetime | None = None
    deletion_scheduled_for: datetime | None = None
    offer_code: str | None = None
    feedback: Sequence[Said] = ()


@dataclass(frozen=True, kw_only=True)
class About:
    """What an event is for, and which fields its `data` has beside those of every event."""

    description: str
    more: tuple[str, ...] = ()
    nullable: bool = False
    """Whether these are null where the account's status has none."""


CATALOGUE: Final[Mapping[TransitionType, About]] = {
    TransitionType.CANCELLATION_REQUESTED: About(
        description="A cancellation was asked for and waits for a member to confirm it. The account is as before."
    ),
    TransitionType.CANCELLATION_ASSISTANCE_REQUESTED: About(
        description="A cancellation was asked for on an assisted plan; the Customer Success Manager was told."
    ),
    TransitionType.CANCELLATION_WITHDRAWN: About(
        description="The cancellation was taken back before it took effect. The account is active."
    ),
    TransitionType.CANCELLATION_EXPIRED: About(
        description="Nobody confirmed the cancellation in time. The account is active."
    ),
    TransitionType.OFFER_ACCEPTED: About(
        description="An alternative was accepted instead of canceling. Billing acts on it.", more=("offerCode",)
    ),
    TransitionType.OFFER_DECLINED: About(description="An alternative was declined.", more=("offerCode",)),
    TransitionType.CANCELLATION_SCHEDULED: About(
        description="The cancellation is confirmed and takes effect at `effectiveAt`. Everything works until then.",
        more=("effectiveAt",),
    ),
    TransitionType.CANCELED: About(
        description="The account is canceled: stop its messages and end its members' sessions now. With the feedback "
        "known so far.",
        more=("canceledAt", "restartableUntil", "deletionScheduledFor", "feedback"),
    ),
    TransitionType.FEEDBACK_SUBMITTED: About(
        description="A member said why. With that feedback alone.", more=("feedback",)
    ),
    TransitionType.RESTART_REQUESTED: About(
        description="A former member asks for the account to be restarted. Nothing is restarted by it.",
        more=("restartableUntil",),
    ),
    TransitionType.RESTARTED: About(
        description="The account is active again, with the members whom the host names by now. Let them in, send their "
        "messages, and sync the members if they were dropped."
    ),
    TransitionType.DELETION_REMINDER: About(
        description="The members were reminded that the account's data will be deleted.",
        more=("restartableUntil", "deletionScheduledFor"),
    ),
    TransitionType.DELETION_HELD: About(
        description="The deletion is suspended; there is no date until it is released.", more=("restartableUntil",)
    ),
    TransitionType.DELETION_RELEASED: About(
        description="The deletion has a date again.", more=("restartableUntil", "deletionScheduledFor")
    ),
    TransitionType.DELETION_STARTED: About(
        description="The deletion of the account's data has begun and cannot be undone."
    ),
    TransitionType.DELETED: About(
        description="The account's data is gone, in Sunset and in the other systems. The last event of the account, "
        "and the last time that its reference is told."
    ),
    TransitionType.STATUS: About(
        description="How the account stands, after a restore of Sunset's database: what you know of it may be from a "
        "time that is no more. Sent to every endpoint, whatever types it wants. Take it over.",
        more=("effectiveAt", "canceledAt", "restartableUntil", "deletionScheduledFor"),
        nullable=True,
    ),
}
"""In the order in which they happen; the last one at any time."""


def body(event: Event) -> dict[str, Any]:
    """The event as CloudEvents 1.0 writes it in JSON."""
    account = ids.encode(Kind.ACCOUNT, event.account_id)
    occurred_at = _instant(event.occurred_at)
    data: dict[str, Any] = {
        "accountId": account,
        "accountReference": event.account_reference,
        "status": event.status.value,
        "epoch": event.epoch,
        "sequence": event.sequence,
        "requestId": None if event.request_id is None else ids.encode(Kind.CANCELLATION_REQUEST, event.request_id),
        "occurredAt": occurred_at,
    }
    told = {
        "effectiveAt": _instant(event.effective_at),
        "canceledAt": _instant(event.canceled_at),
        "restartableUntil": _instant(event.restartable_until),
        "deletionScheduledFor": _instant(event.deletion_scheduled_for),
        "offerCode": event.offer_code,
        "feedback": [
            {"reason": one.reason.value, "comment": one.comment, "submittedAt": _instant(one.submitted_at)}
            for one in event.feedback
        ],
    }
    data |= {name: told[name] for name in CATALOGUE[event.type].more}
    return _envelope(str(event.id), event.type.value, occurred_at, data) | {"subject": account}


def ping(id_: UUID, now: datetime) -> dict[str, Any]:
    """What `pingWebhookEndpoint` sends."""
    return _envelope(str(id_), PING, _instant(now), {})


def _envelope(id_: str, kind: str, time: str | None, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": id_,
        "source": SOURCE,
        "type": kind,
        "time": time,
        "datacontenttype": "application/json",
        "data": data,
    }


def _instant(value: datetime | None) -> str | None:
    """As the API writes it: in UTC, with milliseconds."""
    if value is None:
        return None
    value = value.astimezone(UTC)
    return value.strftime("%Y-%m-%dT%H:%M:%S.") + f"{value.microsecond // 1000:03d}Z"


# ------------------------------------------------------------------------------------------ for who reads about them

_INSTANT: Final = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"}
_ID: Final = {"type": "string", "pattern": "^[A-Za-z0-9_-]{23}$"}
_FEEDBACK: Final = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "reason": {"enum": [reason.value for reason in FeedbackReason]},
            "comment": {"type": ["string", "null"]},
            "submittedAt": _INSTANT,
        },
        "required": ["reason", "comment", "submittedAt"],
        "additionalProperties": False,
    },
}
_MORE: Final[Mapping[str, Any]] = {
    "effectiveAt": _INSTANT,
    "canceledAt": _INSTANT,
    "restartableUntil": _INSTANT,
    "deletionScheduledFor": _INSTANT,
    "offerCode": {"type": "string", "minLength": 1},
    "feedback": _FEEDBACK,
}
_ALWAYS: Final[Mapping[str, Any]] = {
    "accountId": _ID,
    "accountReference": {"type": "string", "minLength": 1},
    "status": {"enum": [status.value for status in AccountStatus]},
    "epoch": {"type": "integer", "minimum": 0},
    "sequence": {"type": "integer", "minimum": 1},
    "requestId": {"anyOf": [_ID, {"type": "null"}]},
    "occurredAt": _INSTANT,
}


def schema(kind: TransitionType) -> dict[str, Any]:
    """The JSON Schema (2020-12) of an event's body. Receivers should let fields pass that they do not know."""
    about = CATALOGUE[kind]
    more = {name: {"anyOf": [_MORE[name], {"type": "null"}]} if about.nullable else _MORE[name] for name in about.more}
    data = {**_ALWAYS, **more}
    envelope: dict[str, Any] = {
        "specversion": {"const": "1.0"},
        "id": {"type": "string", "format": "uuid"},
        "source": {"const": SOURCE},
        "type": {"const": kind.value},
        "subject": _ID,
        "time": _INSTANT,
        "datacontenttype": {"const": "application/json"},
        "data": {"type": "object", "properties": data, "required": list(data), "additionalProperties": False},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind.value,
        "description": CATALOGUE[kind].description,
        "type": "object",
        "properties": envelope,
        "required": list(envelope),
        "additionalProperties": False,
    }


_STATUS: Final[Mapping[TransitionType, AccountStatus]] = {
    TransitionType.CANCELLATION_SCHEDULED: AccountStatus.CANCELLATION_SCHEDULED,
    TransitionType.CANCELED: AccountStatus.CANCELED,
    TransitionType.FEEDBACK_SUBMITTED: AccountStatus.CANCELED,
    TransitionType.RESTART_REQUESTED: AccountStatus.CANCELED,
    TransitionType.DELETION_REMINDER: AccountStatus.CANCELED,
    TransitionType.DELETION_HELD: AccountStatus.CANCELED,
    TransitionType.DELETION_RELEASED: AccountStatus.CANCELED,
    TransitionType.DELETION_STARTED: AccountStatus.DELETING,
    TransitionType.DELETED: AccountStatus.DELETED,
    TransitionType.STATUS: AccountStatus.CANCELED,
}


_OF_NO_REQUEST: Final = frozenset(
    {
        TransitionType.DELETION_HELD,
        TransitionType.DELETION_RELEASED,
        TransitionType.DELETION_STARTED,
        TransitionType.DELETED,
        TransitionType.STATUS,
    }
)
"""They are about the account alone."""


def _epoch(kind: TransitionType) -> int:
    """It grows when a cancellation takes effect, when an account is restarted and when the database is restored."""
    if kind is TransitionType.STATUS:
        return EPOCHS_OF_A_RESTORE + 1
    if kind is TransitionType.RESTARTED:
        return 2
    return int(_STATUS.get(kind) in {AccountStatus.CANCELED, AccountStatus.DELETING, AccountStatus.DELETED})


def example(kind: TransitionType) -> dict[str, Any]:
    """An event of that type, as a receiver may see it."""
    confirmed_at = datetime(2026, 11, 23, 9, 30, tzinfo=UTC)
    window_end = datetime(2027, 1, 22, 9, 30, tzinfo=UTC)
    number = list(TransitionType).index(kind) + 1
    return body(
        Event(
            id=UUID(int=0x019AB0C1_7E00_7000_8000_000000000100 + number),
            type=kind,
            account_id=UUID(int=0x019AB0C1_7E00_7000_8000_000000000001),
            account_reference="acme",
            status=_STATUS.get(kind, AccountStatus.ACTIVE),
            epoch=_epoch(kind),
            sequence=number,
            request_id=None if kind in _OF_NO_REQUEST else UUID(int=0x019AB0C1_7E00_7000_8000_000000000002),
            occurred_at=confirmed_at,
            effective_at=None if kind is TransitionType.STATUS else datetime(2026, 12, 1, tzinfo=UTC),
            canceled_at=confirmed_at,
            restartable_until=window_end,
            deletion_scheduled_for=window_end,
            offer_code="pause",
            feedback=[
                Said(
                    reason=FeedbackReason.MISSING_FEATURES,
                    comment="We need invoices in two languages.",
                    submitted_at=datetime(2026, 11, 23, 9, 25, tzinfo=UTC),
                )
            ],
        )
    )
