"""The rows of Sunset. Tortoise models: columns and relations, no behavior.

The rules that the database itself keeps, also against hand-written SQL and on both engines, are declared in the
migration (`app/db/migrations`) because Tortoise does not create constraints from `Meta`. Each model's docstring
names its own under "Kept by the database".

Actors are named by kind and id, without a foreign key: history outlives the people in it.
"""

from typing import Any
from uuid import UUID

from tortoise import fields
from tortoise.models import Model

from app.db import UtcDatetimeField, uuid7
from app.lifecycle import (
    AccountStatus,
    ActorKind,
    Channel,
    FeedbackReason,
    HaltCause,
    MemberRole,
    OfferKind,
    OfferStatus,
    RequestStatus,
    StaffRole,
    TransitionType,
)


class CodeSetField(fields.Field[frozenset[str]], frozenset):  # type: ignore[type-arg]
    """A small set of codes in one text column: sorted, separated by spaces, as OAuth writes scopes."""

    SQL_TYPE = "VARCHAR(255)"
    field_type = frozenset

    def to_db_value(self, value: Any, instance: Any) -> str:
        return " ".join(sorted(value))

    def to_python_value(self, value: Any) -> frozenset[str]:
        return frozenset(value.split()) if isinstance(value, str) else frozenset(value)


class Staff(Model):
    """A person of the company that runs the SaaS.

    Kept by the database: role is a StaffRole; (issuer, subject) unique; email unique.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    issuer = fields.CharField(max_length=255)
    subject = fields.CharField(max_length=255)
    email = fields.CharField(max_length=254)
    name = fields.CharField(max_length=200)
    role = fields.CharEnumField(StaffRole, max_length=32)
    created_at = UtcDatetimeField()
    deactivated_at = UtcDatetimeField(null=True)

    class Meta:
        table = "staff"


class Service(Model):
    """Another system of that company.

    Kept by the database: (issuer, subject) unique; name unique.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    issuer = fields.CharField(max_length=255)
    subject = fields.CharField(max_length=255)
    name = fields.CharField(max_length=64)
    scopes = CodeSetField()
    created_at = UtcDatetimeField()
    deactivated_at = UtcDatetimeField(null=True)

    class Meta:
        table = "service"


class Account(Model):
    """The customer's tenant.

    Kept by the database:
    - status is an AccountStatus; reference unique; epoch >= 0
    - canceled_at and restartable_until are set exactly in CANCELED, DELETING and DELETED
    - deletion_scheduled_for is set exactly in CANCELED without a hold, and in DELETING and DELETED
    - deletion_held_at only in CANCELED
    - restartable_until > canceled_at; deletion_scheduled_for >= restartable_until
    - cancellation_effective_at is set exactly in CANCELLATION_SCHEDULED
    - deletion_started_at is set exactly in DELETING and DELETED and is never before restartable_until
    - reminder_due_at only in CANCELED without a hold, and before deletion_scheduled_for
    - deleted_at is set exactly in DELETED
    - status moves only along lifecycle.md's arrows; a DELETED account never changes status;
      a row is inserted as ACTIVE only
    - a DELETED account has no members (no update to DELETED while members exist, no member inserted then)
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    reference = fields.CharField(max_length=200)
    """The host's own name for the account."""
    name = fields.CharField(max_length=200)
    plan_code = fields.CharField(max_length=64)
    status = fields.CharEnumField(AccountStatus, max_length=32, default=AccountStatus.ACTIVE)
    epoch = fields.IntField(default=0)
    """Grows with each cancellation that takes effect and each restart."""
    last_sequence = fields.IntField(default=0)
    """The sequence of the account's newest transition."""
    current_period_end = UtcDatetimeField(null=True)
    csm: fields.ForeignKeyNullableRelation[Staff] = fields.ForeignKeyField(
        "models.Staff", null=True, on_delete=fields.RESTRICT, related_name="accounts"
    )
    csm_id: UUID | None
    cancellation_effective_at = UtcDatetimeField(null=True)
    canceled_at = UtcDatetimeField(null=True)
    restartable_until = UtcDatetimeField(null=True)
    deletion_scheduled_for = UtcDatetimeField(null=True)
    deletion_held_at = UtcDatetimeField(null=True)
    deletion_started_at = UtcDatetimeField(null=True)
    deleted_at = UtcDatetimeField(null=True)
    created_at = UtcDatetimeField()
    reminder_due_at = UtcDatetimeField(null=True)
    """When the next reminder of the deletion is due; None when there is none to come."""

    class Meta:
        table = "account"


class Member(Model):
    """One person in one account, as the host has listed them; no member of it while they are staff or a service
    (`accounts.is_member_sql`).

    Kept by the database: role is a MemberRole; (account, issuer, subject) unique; index on (issuer, subject).
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    account: fields.ForeignKeyRelation[Account] = fields.ForeignKeyField(
        "models.Account", on_delete=fields.RESTRICT, related_name="members"
    )
    account_id: UUID
    issuer = fields.CharField(max_length=255)
    subject = fields.CharField(max_length=255)
    email = fields.CharField(max_length=254)
    name = fields.CharField(max_length=200)
    role = fields.CharEnumField(MemberRole, max_length=16)
    permissions = CodeSetField()
    created_at = UtcDatetimeField()

    class Meta:
        table = "member"


class CancellationRequest(Model):
    """One attempt to cancel.

    Kept by the database:
    - status is a RequestStatus, channel a Channel
    - one open request (PENDING_ASSISTANCE, PENDING_CONFIRMATION, CONFIRMED) per account: partial unique index;
      one EFFECTIVE request per account: partial unique index
    - confirmation_token_hash and confirmation_expires_at are set together, and always in PENDING_CONFIRMATION
    - confirmed_at and effective_at are set together: always in CONFIRMED, EFFECTIVE and REVERTED, and in WITHDRAWN
      where a scheduled cancellation was withdrawn; effective_at is never before confirmed_at
    - took_effect_at set exactly in EFFECTIVE and REVERTED
    - closed_at set exactly in WITHDRAWN, SAVED, EXPIRED and REVERTED
    - wrong_tries between 0 and 5
    - assistance_reminded_at and assistance_escalated_at only where assistance was asked for
    - a closed request (WITHDRAWN, SAVED, EXPIRED, REVERTED) never changes status; status moves only along the arrows
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    account: fields.ForeignKeyRelation[Account] = fields.ForeignKeyField(
        "models.Account", on_delete=fields.RESTRICT, related_name="cancellation_requests"
    )
    account_id: UUID
    status = fields.CharEnumField(RequestStatus, max_length=32)
    channel = fields.CharEnumField(Channel, max_length=16)
    plan_code = fields.CharField(max_length=64)
    requested_at = UtcDatetimeField()
    requested_by_kind = fields.CharEnumField(ActorKind, max_length=16)
    requested_by_id = fields.UUIDField()
    assistance_requested_at = UtcDatetimeField(null=True)
    opened_by_staff_at = UtcDatetimeField(null=True)
    opened_by_staff_id = fields.UUIDField(null=True)
    staff_note = fields.TextField(null=True)
    confirmation_token_hash = fields.CharField(max_length=64, null=True)
    confirmation_generation = fields.IntField(default=0)
    """Grows when a used-up token is replaced; part of what the token is derived from."""
    confirmation_expires_at = UtcDatetimeField(null=True)
    wrong_tries = fields.IntField(default=0)
    confirmed_at = UtcDatetimeField(null=True)
    confirmed_by_id = fields.UUIDField(null=True)
    effective_at = UtcDatetimeField(null=True)
    took_effect_at = UtcDatetimeField(null=True)
    closed_at = UtcDatetimeField(null=True)
    assistance_reminded_at = UtcDatetimeField(null=True)
    assistance_escalated_at = UtcDatetimeField(null=True)

    class Meta:
        table = "cancellation_request"


class Feedback(Model):
    """Why, in the customer's words.

    Kept by the database: reason is a FeedbackReason; rows are never updated, and deleted only while their account
    is DELETING or DELETED.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    account: fields.ForeignKeyRelation[Account] = fields.ForeignKeyField(
        "models.Account", on_delete=fields.RESTRICT, related_name="feedback"
    )
    account_id: UUID
    request: fields.ForeignKeyRelation[CancellationRequest] = fields.ForeignKeyField(
        "models.CancellationRequest", on_delete=fields.RESTRICT, related_name="feedback"
    )
    request_id: UUID
    reason = fields.CharEnumField(FeedbackReason, max_length=32)
    comment = fields.TextField(null=True)
    submitted_by_id = fields.UUIDField()
    submitted_at = UtcDatetimeField()

    class Meta:
        table = "feedback"


class Offer(Model):
    """An alternative solution made to an account within a request; what it said is kept as it was made.

    Kept by the database: kind is an OfferKind, status an OfferStatus; (request, code) unique; answered_at set
    exactly when status is not OPEN; one ACCEPTED offer per request at most.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    account: fields.ForeignKeyRelation[Account] = fields.ForeignKeyField(
        "models.Account", on_delete=fields.RESTRICT, related_name="offers"
    )
    account_id: UUID
    request: fields.ForeignKeyRelation[CancellationRequest] = fields.ForeignKeyField(
        "models.CancellationRequest", on_delete=fields.RESTRICT, related_name="offers"
    )
    request_id: UUID
    code = fields.CharField(max_length=64)
    kind = fields.CharEnumField(OfferKind, max_length=32)
    title = fields.CharField(max_length=200)
    description = fields.TextField()
    status = fields.CharEnumField(OfferStatus, max_length=16, default=OfferStatus.OPEN)
    offered_at = UtcDatetimeField()
    answered_at = UtcDatetimeField(null=True)
    answered_by_id = fields.UUIDField(null=True)

    class Meta:
        table = "offer"


class RestartRequest(Model):
    """A former member asks for a restart. It restarts nothing; the billing team sees it.

    Kept by the database: one per request of an account: unique (request).
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    account: fields.ForeignKeyRelation[Account] = fields.ForeignKeyField(
        "models.Account", on_delete=fields.RESTRICT, related_name="restart_requests"
    )
    account_id: UUID
    request: fields.ForeignKeyRelation[CancellationRequest] = fields.ForeignKeyField(
        "models.CancellationRequest", on_delete=fields.RESTRICT, related_name="restart_requests"
    )
    request_id: UUID
    requested_by_id = fields.UUIDField()
    note = fields.TextField(null=True)
    requested_at = UtcDatetimeField()

    class Meta:
        table = "restart_request"


class Transition(Model):
    """One step of an account's history, without personal data.

    Kept by the database: type is known (TransitionType); (account, sequence) unique; rows are never updated and
    never deleted.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    account: fields.ForeignKeyRelation[Account] = fields.ForeignKeyField(
        "models.Account", on_delete=fields.RESTRICT, related_name="transitions"
    )
    account_id: UUID
    sequence = fields.IntField()
    """Grows by one with each transition of the account."""
    epoch = fields.IntField()
    type = fields.CharEnumField(TransitionType, max_length=64)
    request_id = fields.UUIDField(null=True)
    actor_kind = fields.CharEnumField(ActorKind, max_length=16)
    actor_id = fields.UUIDField(null=True)
    account_status = fields.CharEnumField(AccountStatus, max_length=32)
    occurred_at = UtcDatetimeField()

    class Meta:
        table = "transition"


class OutboxMessage(Model):
    """A message that the database has promised to send. `app.outbox` alone writes this table.

    Kept by the database: message_id unique; at most one of delivered_at, dead_at and dropped_at; attempts >= 0; partial
    index on due_at where none is set; index on account_id.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    account_id = fields.UUIDField(null=True)
    template = fields.CharField(max_length=64)
    recipient_name = fields.CharField(max_length=200)
    recipient_address = fields.CharField(max_length=254)
    facts = fields.JSONField[dict[str, Any]]()
    message_id = fields.CharField(max_length=255)
    created_at = UtcDatetimeField()
    due_at = UtcDatetimeField()
    """When the next try may begin. A claim pushes it to the end of its lease."""
    lease = fields.UUIDField(null=True)
    attempts = fields.IntField(default=0)
    delivered_at = UtcDatetimeField(null=True)
    dead_at = UtcDatetimeField(null=True)
    last_error = fields.TextField(null=True)
    dropped_at = UtcDatetimeField(null=True)
    """When an operator gave it up."""
    traceparent = fields.CharField(max_length=64, null=True)
    """The trace that it belongs to, as W3C Trace Context writes it."""

    class Meta:
        table = "outbox"


class IdempotencyRecord(Model):
    """The answer that a mutation gave, to give it again.

    Kept by the database: (caller, mutation, key) unique; index on created_at.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    caller = fields.CharField(max_length=64)
    """SHA-256 of issuer and subject."""
    mutation = fields.CharField(max_length=64)
    key = fields.CharField(max_length=255)
    fingerprint = fields.CharField(max_length=64)
    account_id = fields.UUIDField(null=True)
    answer = fields.JSONField[dict[str, Any]]()
    created_at = UtcDatetimeField()

    class Meta:
        table = "idempotency_record"


class DeletionHold(Model):
    """A deletion suspended, with who and why. The note goes with the account's data, the row stays.

    Kept by the database: one that is not released per account: partial unique index; released_at is never before
    held_at.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    account: fields.ForeignKeyRelation[Account] = fields.ForeignKeyField(
        "models.Account", on_delete=fields.RESTRICT, related_name="deletion_holds"
    )
    account_id: UUID
    note = fields.TextField(null=True)
    held_at = UtcDatetimeField()
    held_by_id = fields.UUIDField()
    release_note = fields.TextField(null=True)
    released_at = UtcDatetimeField(null=True)
    released_by_id = fields.UUIDField(null=True)
    """None where a restart ended it."""

    class Meta:
        table = "deletion_hold"


class DeletionReminder(Model):
    """A reminder that was sent. A restart takes them away, since their date is gone.

    Kept by the database: (account, deletion_scheduled_for, days) unique: once for each date.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    account: fields.ForeignKeyRelation[Account] = fields.ForeignKeyField(
        "models.Account", on_delete=fields.RESTRICT, related_name="deletion_reminders"
    )
    account_id: UUID
    deletion_scheduled_for = UtcDatetimeField()
    days = fields.IntField()
    """Which of the policy's reminders."""
    sent_at = UtcDatetimeField()

    class Meta:
        table = "deletion_reminder"


class DeletionStep(Model):
    """The part of a deletion that one data system does.

    Kept by the database: (account, system) unique; attempts >= 0; only for an account whose deletion has begun.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    account: fields.ForeignKeyRelation[Account] = fields.ForeignKeyField(
        "models.Account", on_delete=fields.RESTRICT, related_name="deletion_steps"
    )
    account_id: UUID
    system = fields.CharField(max_length=64)
    epoch = fields.IntField()
    """The account's when the deletion began."""
    created_at = UtcDatetimeField()
    due_at = UtcDatetimeField()
    """When the next try may begin."""
    attempts = fields.IntField(default=0)
    last_error = fields.TextField(null=True)
    completed_at = UtcDatetimeField(null=True)

    class Meta:
        table = "deletion_step"


class DeletionBreaker(Model):
    """All deletions stopped, because more than the policy allows fell due within 24 hours, until two persons of the
    staff or an operator approve.

    Kept by the database: one without approved_at; the second approval is of another person than the first, and of the
    same number.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    tripped_at = UtcDatetimeField()
    due = fields.IntField()
    """How many were due within 24 hours when it tripped."""
    allowed = fields.IntField()
    """How many the policy allowed then."""
    first_approved_at = UtcDatetimeField(null=True)
    first_approved_by_id = fields.UUIDField(null=True)
    first_approved_count = fields.IntField(null=True)
    first_note = fields.TextField(null=True)
    approved_at = UtcDatetimeField(null=True)
    approved_by_id = fields.UUIDField(null=True)
    """None for an operator at the command line."""
    note = fields.TextField(null=True)
    approved_count = fields.IntField(null=True)
    """How many deletions within 24 hours were approved."""
    approved_until = UtcDatetimeField(null=True)

    class Meta:
        table = "deletion_breaker"


class Tombstone(Model):
    """What remains of a deleted account beside its bare row and its history: no personal data.

    Kept by the database: one per account; rows are never updated and never deleted.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    account: fields.ForeignKeyRelation[Account] = fields.ForeignKeyField(
        "models.Account", on_delete=fields.RESTRICT, related_name="tombstones"
    )
    account_id: UUID
    plan_code = fields.CharField(max_length=64)
    reason = fields.CharEnumField(FeedbackReason, max_length=32, null=True)
    """Of the newest feedback on the cancellation that took effect."""
    canceled_at = UtcDatetimeField()
    deletion_started_at = UtcDatetimeField()
    deleted_at = UtcDatetimeField()
    members = fields.IntField()
    feedback = fields.IntField()
    offers = fields.IntField()
    restart_requests = fields.IntField()
    messages = fields.IntField()
    idempotency_records = fields.IntField()

    class Meta:
        table = "tombstone"


class ClockOffset(Model):
    """How far the development clock is ahead of the database's. One row; 0 unless it was moved.

    Kept by the database: id is 1; offset_seconds >= 0 and never goes back, and is 0 once it is fixed.
    """

    id = fields.IntField(primary_key=True, generated=False)
    offset_seconds = fields.BigIntField()
    fixed_at = UtcDatetimeField(null=True)
    """Since when it cannot be moved: a production process has used the database."""

    class Meta:
        table = "clock_offset"


class RateLimit(Model):
    """How much of its allowance somebody has used: the time at which it will be whole again.

    The key is a hash or an id of what is limited, and never a name.
    """

    key = fields.CharField(max_length=96, primary_key=True)
    whole_at = UtcDatetimeField()

    class Meta:
        table = "rate_limit"


class InstallationRecord(Model):
    """Who this installation is, and what the database was when it was last known to be its own. One row, made by the
    first process that uses the database. `app.restores` alone writes it.

    Kept by the database: id is 1; identity is never changed; incidents and restores never go back, and there are at
    least as many incidents as restores.
    """

    id = fields.IntField(primary_key=True, generated=False)
    identity = fields.UUIDField()
    database = fields.CharField(max_length=100, null=True)
    """What tells this database from a copy of it: the server's and the database's number, or the file's."""
    timeline = fields.BigIntField(null=True)
    """PostgreSQL's: a promoted standby and a point-in-time recovery begin a new one."""
    written_by = fields.BigIntField(null=True)
    """The number of the transaction that wrote this row. In a copy that was dumped and loaded, it is not what wrote
    it."""
    incidents = fields.IntField()
    """How often the database was found, or said, to have been restored or moved."""
    restores = fields.IntField()
    """How many of these were restores: accounts' epochs are ahead by as many millions."""
    restated_behind = fields.UUIDField(null=True)
    """Up to which account the present status was enqueued, since the last restore."""
    restated_at = UtcDatetimeField(null=True)
    """When that of the last account was; None while it is under way, and before the first restore."""
    created_at = UtcDatetimeField()

    class Meta:
        table = "installation"


class DeletionHalt(Model):
    """All deletions stopped, until an operator lets them go on. Beside the breaker, which counts.

    Kept by the database: cause is a HaltCause; one of each cause without resumed_at; resumed_at and resume_note
    together.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    cause = fields.CharEnumField(HaltCause, max_length=16)
    evidence = fields.TextField()
    """An operator's note, or what was found."""
    as_of = UtcDatetimeField(null=True)
    """The time that the database was restored to, where it was said."""
    halted_at = UtcDatetimeField()
    resumed_at = UtcDatetimeField(null=True)
    resume_note = fields.TextField(null=True)

    class Meta:
        table = "deletion_halt"


class WebhookEndpoint(Model):
    """Where another system hears of what happens. About nobody's account; never deleted, only disabled.

    Kept by the database: secret_generation and failures >= 0; disabled_at and disabled_reason together.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    url = fields.TextField()
    description = fields.TextField()
    event_types = fields.TextField()
    """Those that it wants, separated by spaces; empty: all."""
    secret_generation = fields.IntField()
    """Its secret derives from this and the installation's; no secret is stored."""
    previous_secret_until = UtcDatetimeField(null=True)
    """Until when the secret of the generation before signs too."""
    created_at = UtcDatetimeField()
    disabled_at = UtcDatetimeField(null=True)
    disabled_reason = fields.TextField(null=True)
    failures = fields.IntField()
    """In a row."""
    paused_until = UtcDatetimeField(null=True)
    """Its deliveries wait until then, because it has failed."""

    class Meta:
        table = "webhook_endpoint"


class WebhookDelivery(Model):
    """An event that the database has promised to an endpoint; its id is the `webhook-id`. `app.webhooks` alone writes
    this table.

    Kept by the database: (endpoint, account, sequence) unique; at most one of delivered_at and dead_at, and no lease
    then; account_id, sequence and epoch together; attempts >= 0.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    endpoint: fields.ForeignKeyRelation[WebhookEndpoint] = fields.ForeignKeyField(
        "models.WebhookEndpoint", on_delete=fields.RESTRICT, related_name="deliveries"
    )
    endpoint_id: UUID
    account_id = fields.UUIDField(null=True)
    """None for a ping."""
    sequence = fields.IntField(null=True)
    epoch = fields.IntField(null=True)
    type = fields.CharField(max_length=64)
    payload = fields.TextField()
    """The body, letter for letter; empty once the account's data is gone and this is settled."""
    created_at = UtcDatetimeField()
    queued_at = UtcDatetimeField()
    """Since when it is tried: its creation, or when it was last asked to be delivered again."""
    due_at = UtcDatetimeField()
    """When the next try may begin. A claim pushes it to the end of its lease."""
    lease = fields.UUIDField(null=True)
    attempts = fields.IntField()
    last_attempt_at = UtcDatetimeField(null=True)
    last_status = fields.IntField(null=True)
    last_latency_ms = fields.IntField(null=True)
    last_error = fields.TextField(null=True)
    delivered_at = UtcDatetimeField(null=True)
    dead_at = UtcDatetimeField(null=True)
    traceparent = fields.CharField(max_length=64, null=True)
    """The trace in which it was promised, as W3C Trace Context writes it."""

    class Meta:
        table = "webhook_delivery"


class Enforcement(Model):
    """What an enforcing system was asked by one cancellation, and when it said that it has obeyed. Without personal
    data: it stays when the account's data goes. `app.enforcement` alone writes this table.

    Kept by the database: (account, epoch, system) unique, and (account, system) among those that are not lifted;
    due_at after asked_at; enforced_at and enforced_by_id together, not before asked_at nor after lifted_at; an
    enforced_at is never changed; report_at and reported_at not before due_at, and at most one of them; partial indexes
    where neither enforced_at nor lifted_at is set, and where reported_at is.
    """

    id = fields.UUIDField(primary_key=True, default=uuid7)
    account: fields.ForeignKeyRelation[Account] = fields.ForeignKeyField(
        "models.Account", on_delete=fields.RESTRICT, related_name="enforcements"
    )
    account_id: UUID
    epoch = fields.IntField()
    """The one that the cancellation began."""
    system = fields.CharField(max_length=64)
    """Its code in the policy, and the name of the service that it speaks as."""
    asked_at = UtcDatetimeField()
    """When the cancellation took effect."""
    due_at = UtcDatetimeField()
    enforced_at = UtcDatetimeField(null=True)
    enforced_by_id = fields.UUIDField(null=True)
    """The service."""
    lifted_at = UtcDatetimeField(null=True)
    """When a restart ended the cancellation: nothing is waited for any more."""
    report_at = UtcDatetimeField(null=True)
    """When the operators are to be told, if it is late then. None when there is nothing to tell any more."""
    reported_at = UtcDatetimeField(null=True)
    """When a letter to the operators has counted it."""

    class Meta:
        table = "enforcement"
