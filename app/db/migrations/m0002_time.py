"""Time: reminders, holds, the deletion and its breaker, tombstones, the development clock, and rate limits."""

from typing import Any

from tortoise import fields
from tortoise.migrations import AddField, RunPython
from tortoise.migrations import Migration as TortoiseMigration
from tortoise.migrations.schema_editor.base import BaseSchemaEditor

from app.db import UtcDatetimeField, rules
from app.db.migrations import m0001_initial as before
from app.db.rules import Check, Refusal, key, one_of, table, text, to, together

ADDED = [
    AddField("Account", "reminder_due_at", UtcDatetimeField(null=True)),
    AddField("CancellationRequest", "assistance_reminded_at", UtcDatetimeField(null=True)),
    AddField("CancellationRequest", "assistance_escalated_at", UtcDatetimeField(null=True)),
    AddField("OutboxMessage", "dropped_at", UtcDatetimeField(null=True)),
    AddField("OutboxMessage", "traceparent", text(64, null=True)),
]
_TABLE_OF = {"Account": "account", "CancellationRequest": "cancellation_request", "OutboxMessage": "outbox"}

TABLES = [
    table(
        "DeletionHold",
        "deletion_hold",
        [
            ("id", key()),
            ("account", to("Account", "deletion_holds")),
            ("note", fields.TextField(null=True)),
            ("held_at", UtcDatetimeField()),
            ("held_by_id", fields.UUIDField()),
            ("release_note", fields.TextField(null=True)),
            ("released_at", UtcDatetimeField(null=True)),
            ("released_by_id", fields.UUIDField(null=True)),
        ],
    ),
    table(
        "DeletionReminder",
        "deletion_reminder",
        [
            ("id", key()),
            ("account", to("Account", "deletion_reminders")),
            ("deletion_scheduled_for", UtcDatetimeField()),
            ("days", fields.IntField()),
            ("sent_at", UtcDatetimeField()),
        ],
    ),
    table(
        "DeletionStep",
        "deletion_step",
        [
            ("id", key()),
            ("account", to("Account", "deletion_steps")),
            ("system", text(64)),
            ("epoch", fields.IntField()),
            ("created_at", UtcDatetimeField()),
            ("due_at", UtcDatetimeField()),
            ("attempts", fields.IntField()),
            ("last_error", fields.TextField(null=True)),
            ("completed_at", UtcDatetimeField(null=True)),
        ],
    ),
    table(
        "DeletionBreaker",
        "deletion_breaker",
        [
            ("id", key()),
            ("tripped_at", UtcDatetimeField()),
            ("due", fields.IntField()),
            ("allowed", fields.IntField()),
            ("first_approved_at", UtcDatetimeField(null=True)),
            ("first_approved_by_id", fields.UUIDField(null=True)),
            ("first_approved_count", fields.IntField(null=True)),
            ("first_note", fields.TextField(null=True)),
            ("approved_at", UtcDatetimeField(null=True)),
            ("approved_by_id", fields.UUIDField(null=True)),
            ("note", fields.TextField(null=True)),
            ("approved_count", fields.IntField(null=True)),
            ("approved_until", UtcDatetimeField(null=True)),
        ],
    ),
    table(
        "Tombstone",
        "tombstone",
        [
            ("id", key()),
            ("account", to("Account", "tombstones")),
            ("plan_code", text(64)),
            ("reason", text(32, null=True)),
            ("canceled_at", UtcDatetimeField()),
            ("deletion_started_at", UtcDatetimeField()),
            ("deleted_at", UtcDatetimeField()),
            ("members", fields.IntField()),
            ("feedback", fields.IntField()),
            ("offers", fields.IntField()),
            ("restart_requests", fields.IntField()),
            ("messages", fields.IntField()),
            ("idempotency_records", fields.IntField()),
        ],
    ),
    table(
        "ClockOffset",
        "clock_offset",
        [
            ("id", fields.IntField(primary_key=True, generated=False)),
            ("offset_seconds", fields.BigIntField()),
            ("fixed_at", UtcDatetimeField(null=True)),
        ],
    ),
    table(
        "RateLimit",
        "rate_limit",
        [("key", fields.CharField(max_length=96, primary_key=True)), ("whole_at", UtcDatetimeField())],
    ),
]

REPLACED = [
    check
    for check in before.CHECKS
    if (check.table, check.name) in {("transition", "type"), ("outbox", "settled_once")}
]

CHECKS = [
    Check(
        "transition",
        "type",
        one_of(
            "type",
            "account.cancellation_requested account.cancellation_assistance_requested account.cancellation_withdrawn "
            "account.cancellation_expired account.offer_accepted account.offer_declined "
            "account.cancellation_scheduled account.canceled account.feedback_submitted account.restart_requested "
            "account.restarted account.deletion_reminder account.deletion_held account.deletion_released "
            "account.deletion_started account.deleted",
        ),
    ),
    Check(
        "outbox",
        "settled_once",
        "(NEW.delivered_at IS NULL OR NEW.dead_at IS NULL) AND (NEW.delivered_at IS NULL OR NEW.dropped_at IS NULL) "
        "AND (NEW.dead_at IS NULL OR NEW.dropped_at IS NULL)",
    ),
    Check(
        "account",
        "reminder_due_at",
        "NEW.reminder_due_at IS NULL OR (NEW.status = 'CANCELED' AND NEW.deletion_scheduled_for IS NOT NULL "
        "AND NEW.reminder_due_at < NEW.deletion_scheduled_for)",  # a comparison with NULL would let it pass
    ),
    Check(
        "cancellation_request",
        "assistance",
        "NEW.assistance_requested_at IS NOT NULL "
        "OR (NEW.assistance_reminded_at IS NULL AND NEW.assistance_escalated_at IS NULL)",
    ),
    Check("deletion_hold", "released_after_held", "NEW.released_at >= NEW.held_at"),
    Check("deletion_reminder", "sent_before", "NEW.sent_at < NEW.deletion_scheduled_for"),
    Check("deletion_step", "attempts", "NEW.attempts >= 0"),
    Check(
        "deletion_breaker",
        "first_approval",
        together("first_approved_at", "first_approved_by_id", "first_approved_count"),
    ),
    Check("deletion_breaker", "approval", together("approved_at", "approved_count", "approved_until")),
    Check(
        "deletion_breaker",
        "two_persons",
        "NEW.approved_by_id IS NULL "
        "OR (NEW.first_approved_by_id IS NOT NULL AND NEW.approved_by_id <> NEW.first_approved_by_id "
        "AND NEW.approved_count = NEW.first_approved_count)",
    ),
    Check(
        "tombstone",
        "reason",
        "NEW.reason IS NULL OR "
        + one_of(
            "reason",
            "TOO_EXPENSIVE MISSING_FEATURES SWITCHED_SERVICE UNUSED CUSTOMER_SERVICE LOW_QUALITY TOO_COMPLEX OTHER",
        ),
    ),
    Check("clock_offset", "one", "NEW.id = 1 AND NEW.offset_seconds >= 0"),
    Check("clock_offset", "fixed", "NEW.fixed_at IS NULL OR NEW.offset_seconds = 0"),
]

REFUSALS = [
    Refusal("tombstone", "tombstone_is_never_changed", "UPDATE", "true"),
    Refusal("tombstone", "tombstone_is_kept", "DELETE", "true"),
    Refusal("clock_offset", "clock_never_goes_back", "UPDATE", "NEW.offset_seconds < OLD.offset_seconds"),
    Refusal("clock_offset", "clock_is_kept", "DELETE", "true"),
    Refusal(
        "deletion_step",
        "step_of_a_begun_deletion",
        "INSERT",
        "NOT EXISTS (SELECT 1 FROM account WHERE id = NEW.account_id AND status = 'DELETING')",
        subquery=True,
    ),
]

APPEND_ONLY = {"tombstone": "id = NEW.id OR account_id = NEW.account_id", "clock_offset": "id = NEW.id"}

INDEXES = """
CREATE INDEX account_reminder ON account (reminder_due_at) WHERE reminder_due_at IS NOT NULL;
CREATE INDEX account_deletion_due ON account ({leading_status}deletion_scheduled_for, id) WHERE status = 'CANCELED';
CREATE INDEX account_deletion_started ON account (deletion_started_at) WHERE deletion_started_at IS NOT NULL;
CREATE INDEX account_held ON account (deletion_held_at) WHERE deletion_held_at IS NOT NULL;
CREATE INDEX account_window ON account (restartable_until, id) WHERE restartable_until IS NOT NULL;
CREATE INDEX request_unanswered ON cancellation_request (assistance_requested_at)
    WHERE status = 'PENDING_ASSISTANCE' AND assistance_reminded_at IS NULL;
CREATE INDEX request_unescalated ON cancellation_request (assistance_requested_at)
    WHERE status = 'PENDING_ASSISTANCE' AND assistance_escalated_at IS NULL;
CREATE INDEX request_open_oldest ON cancellation_request (requested_at, id)
    WHERE status IN ('PENDING_ASSISTANCE', 'PENDING_CONFIRMATION', 'CONFIRMED');
DROP INDEX outbox_due;
CREATE INDEX outbox_due ON outbox (due_at) WHERE delivered_at IS NULL AND dead_at IS NULL AND dropped_at IS NULL;
CREATE INDEX outbox_dead ON outbox (dead_at) WHERE dead_at IS NOT NULL;
CREATE INDEX outbox_created ON outbox (created_at, id);
CREATE INDEX idempotency_account ON idempotency_record (account_id);
CREATE UNIQUE INDEX deletion_hold_open ON deletion_hold (account_id) WHERE released_at IS NULL;
CREATE INDEX deletion_hold_account ON deletion_hold (account_id, held_at);
CREATE UNIQUE INDEX deletion_reminder_once ON deletion_reminder (account_id, deletion_scheduled_for, days);
CREATE UNIQUE INDEX deletion_step_system ON deletion_step (account_id, system);
CREATE INDEX deletion_step_due ON deletion_step (due_at) WHERE completed_at IS NULL;
CREATE UNIQUE INDEX deletion_breaker_open ON deletion_breaker ((approved_at IS NULL)) WHERE approved_at IS NULL;
CREATE INDEX deletion_breaker_tripped ON deletion_breaker (tripped_at);
CREATE UNIQUE INDEX tombstone_account ON tombstone (account_id);
CREATE INDEX rate_limit_whole ON rate_limit (whole_at);
INSERT INTO clock_offset (id, offset_seconds) VALUES (1, 0);
"""

# Accounts that were canceled by an earlier version: the worker works out at once which reminders are still to come.
REMINDERS = """
UPDATE account SET reminder_due_at = canceled_at WHERE status = 'CANCELED' AND deletion_scheduled_for IS NOT NULL;
"""


async def _keep_the_rules(_apps: Any, schema_editor: BaseSchemaEditor) -> None:
    dialect: Any = schema_editor.DIALECT
    await schema_editor.client.execute_script(
        rules.no_longer(REPLACED, dialect)
        + rules.added_columns_hold_their_types(_TABLE_OF, ADDED, dialect)
        + rules.columns_hold_their_types(TABLES, dialect)
        + rules.refusing(CHECKS, REFUSALS, APPEND_ONLY, dialect)
        + rules.indexes(INDEXES, dialect)
        + REMINDERS
    )


class Migration(TortoiseMigration):
    dependencies = [("models", "m0001_initial")]  # noqa: RUF012  Tortoise reads it from the class
    operations = [*ADDED, *TABLES, RunPython(_keep_the_rules)]  # noqa: RUF012
