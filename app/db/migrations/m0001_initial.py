"""The first schema, and the rules that hold against hand-written SQL on both engines. `app.db.rules` has the words."""

from typing import Any

from tortoise import fields
from tortoise.migrations import Migration as TortoiseMigration
from tortoise.migrations import RunPython
from tortoise.migrations.schema_editor.base import BaseSchemaEditor

from app.db import UtcDatetimeField, rules
from app.db.rules import Check, Refusal, exactly, key, not_along, one_of, table, text, to

TABLES = [
    table(
        "Staff",
        "staff",
        [
            ("id", key()),
            ("issuer", text(255)),
            ("subject", text(255)),
            ("email", text(254)),
            ("name", text(200)),
            ("role", text(32)),
            ("created_at", UtcDatetimeField()),
            ("deactivated_at", UtcDatetimeField(null=True)),
        ],
    ),
    table(
        "Service",
        "service",
        [
            ("id", key()),
            ("issuer", text(255)),
            ("subject", text(255)),
            ("name", text(64)),
            ("scopes", text(255)),
            ("created_at", UtcDatetimeField()),
            ("deactivated_at", UtcDatetimeField(null=True)),
        ],
    ),
    table(
        "Account",
        "account",
        [
            ("id", key()),
            ("reference", text(200)),
            ("name", text(200)),
            ("plan_code", text(64)),
            ("status", text(32)),
            ("epoch", fields.IntField()),
            ("last_sequence", fields.IntField()),
            ("current_period_end", UtcDatetimeField(null=True)),
            ("csm", to("Staff", "accounts", null=True)),
            ("cancellation_effective_at", UtcDatetimeField(null=True)),
            ("canceled_at", UtcDatetimeField(null=True)),
            ("restartable_until", UtcDatetimeField(null=True)),
            ("deletion_scheduled_for", UtcDatetimeField(null=True)),
            ("deletion_held_at", UtcDatetimeField(null=True)),
            ("deletion_started_at", UtcDatetimeField(null=True)),
            ("deleted_at", UtcDatetimeField(null=True)),
            ("created_at", UtcDatetimeField()),
        ],
    ),
    table(
        "Member",
        "member",
        [
            ("id", key()),
            ("account", to("Account", "members")),
            ("issuer", text(255)),
            ("subject", text(255)),
            ("email", text(254)),
            ("name", text(200)),
            ("role", text(16)),
            ("permissions", text(255)),
            ("created_at", UtcDatetimeField()),
        ],
    ),
    table(
        "CancellationRequest",
        "cancellation_request",
        [
            ("id", key()),
            ("account", to("Account", "cancellation_requests")),
            ("status", text(32)),
            ("channel", text(16)),
            ("plan_code", text(64)),
            ("requested_at", UtcDatetimeField()),
            ("requested_by_kind", text(16)),
            ("requested_by_id", fields.UUIDField()),
            ("assistance_requested_at", UtcDatetimeField(null=True)),
            ("opened_by_staff_at", UtcDatetimeField(null=True)),
            ("opened_by_staff_id", fields.UUIDField(null=True)),
            ("staff_note", fields.TextField(null=True)),
            ("confirmation_token_hash", text(64, null=True)),
            ("confirmation_generation", fields.IntField()),
            ("confirmation_expires_at", UtcDatetimeField(null=True)),
            ("wrong_tries", fields.IntField()),
            ("confirmed_at", UtcDatetimeField(null=True)),
            ("confirmed_by_id", fields.UUIDField(null=True)),
            ("effective_at", UtcDatetimeField(null=True)),
            ("took_effect_at", UtcDatetimeField(null=True)),
            ("closed_at", UtcDatetimeField(null=True)),
        ],
    ),
    table(
        "Feedback",
        "feedback",
        [
            ("id", key()),
            ("account", to("Account", "feedback")),
            ("request", to("CancellationRequest", "feedback")),
            ("reason", text(32)),
            ("comment", fields.TextField(null=True)),
            ("submitted_by_id", fields.UUIDField()),
            ("submitted_at", UtcDatetimeField()),
        ],
    ),
    table(
        "Offer",
        "offer",
        [
            ("id", key()),
            ("account", to("Account", "offers")),
            ("request", to("CancellationRequest", "offers")),
            ("code", text(64)),
            ("kind", text(32)),
            ("title", text(200)),
            ("description", fields.TextField()),
            ("status", text(16)),
            ("offered_at", UtcDatetimeField()),
            ("answered_at", UtcDatetimeField(null=True)),
            ("answered_by_id", fields.UUIDField(null=True)),
        ],
    ),
    table(
        "RestartRequest",
        "restart_request",
        [
            ("id", key()),
            ("account", to("Account", "restart_requests")),
            ("request", to("CancellationRequest", "restart_requests")),
            ("requested_by_id", fields.UUIDField()),
            ("note", fields.TextField(null=True)),
            ("requested_at", UtcDatetimeField()),
        ],
    ),
    table(
        "Transition",
        "transition",
        [
            ("id", key()),
            ("account", to("Account", "transitions")),
            ("sequence", fields.IntField()),
            ("epoch", fields.IntField()),
            ("type", text(64)),
            ("request_id", fields.UUIDField(null=True)),
            ("actor_kind", text(16)),
            ("actor_id", fields.UUIDField(null=True)),
            ("account_status", text(32)),
            ("occurred_at", UtcDatetimeField()),
        ],
    ),
    table(
        "OutboxMessage",
        "outbox",
        [
            ("id", key()),
            ("account_id", fields.UUIDField(null=True)),
            ("template", text(64)),
            ("recipient_name", text(200)),
            ("recipient_address", text(254)),
            ("facts", fields.JSONField[dict[str, Any]]()),
            ("message_id", text(255)),
            ("created_at", UtcDatetimeField()),
            ("due_at", UtcDatetimeField()),
            ("lease", fields.UUIDField(null=True)),
            ("attempts", fields.IntField()),
            ("delivered_at", UtcDatetimeField(null=True)),
            ("dead_at", UtcDatetimeField(null=True)),
            ("last_error", fields.TextField(null=True)),
        ],
    ),
    table(
        "IdempotencyRecord",
        "idempotency_record",
        [
            ("id", key()),
            ("caller", text(64)),
            ("mutation", text(64)),
            ("key", text(255)),
            ("fingerprint", text(64)),
            ("account_id", fields.UUIDField(null=True)),
            ("answer", fields.JSONField[dict[str, Any]]()),
            ("created_at", UtcDatetimeField()),
        ],
    ),
]


ACCOUNT_STATUSES = "ACTIVE CANCELLATION_SCHEDULED CANCELED DELETING DELETED"
ACTOR_KINDS = "MEMBER STAFF SERVICE SYSTEM"


CHECKS = [
    Check("staff", "role", one_of("role", "BILLING_TEAM CUSTOMER_SUCCESS_MANAGER SUPPORT")),
    Check("account", "epoch", "NEW.epoch >= 0"),
    Check("account", "canceled_at", exactly("canceled_at", one_of("status", "CANCELED DELETING DELETED"))),
    Check("account", "restartable_until", exactly("restartable_until", one_of("status", "CANCELED DELETING DELETED"))),
    Check(
        "account",
        "deletion_scheduled_for",
        exactly(
            "deletion_scheduled_for",
            f"{one_of('status', 'DELETING DELETED')} OR (NEW.status = 'CANCELED' AND NEW.deletion_held_at IS NULL)",
        ),
    ),
    Check("account", "deletion_held_at", "NEW.deletion_held_at IS NULL OR NEW.status = 'CANCELED'"),
    Check("account", "window", "NEW.restartable_until > NEW.canceled_at"),
    Check("account", "deletion_after_window", "NEW.deletion_scheduled_for >= NEW.restartable_until"),
    Check(
        "account",
        "cancellation_effective_at",
        exactly("cancellation_effective_at", "NEW.status = 'CANCELLATION_SCHEDULED'"),
    ),
    Check("account", "deletion_started_at", exactly("deletion_started_at", one_of("status", "DELETING DELETED"))),
    Check("account", "deletion_not_early", "NEW.deletion_started_at >= NEW.restartable_until"),
    Check("account", "deleted_at", exactly("deleted_at", "NEW.status = 'DELETED'")),
    Check("member", "role", one_of("role", "ADMIN MEMBER")),
    Check(
        "cancellation_request",
        "status",
        one_of(
            "status",
            "PENDING_ASSISTANCE PENDING_CONFIRMATION CONFIRMED EFFECTIVE REVERTED WITHDRAWN SAVED EXPIRED",
        ),
    ),
    Check("cancellation_request", "channel", one_of("channel", "SELF_SERVE ASSISTED")),
    Check("cancellation_request", "requested_by_kind", one_of("requested_by_kind", ACTOR_KINDS)),
    Check(
        "cancellation_request",
        "confirmation",
        "(NEW.confirmation_token_hash IS NULL) = (NEW.confirmation_expires_at IS NULL) "
        "AND (NEW.confirmation_token_hash IS NOT NULL OR NEW.status <> 'PENDING_CONFIRMATION')",
    ),
    Check(
        "cancellation_request",
        "confirmed_at",
        f"{exactly('confirmed_at', one_of('status', 'CONFIRMED EFFECTIVE REVERTED'))} OR NEW.status = 'WITHDRAWN'",
    ),
    Check(
        "cancellation_request",
        "effective_at",
        "(NEW.effective_at IS NULL) = (NEW.confirmed_at IS NULL)",  # a scheduled one keeps both when it is withdrawn
    ),
    Check("cancellation_request", "effective_after_confirmed", "NEW.effective_at >= NEW.confirmed_at"),
    Check("cancellation_request", "took_effect_at", exactly("took_effect_at", one_of("status", "EFFECTIVE REVERTED"))),
    Check(
        "cancellation_request",
        "closed_at",
        exactly("closed_at", one_of("status", "WITHDRAWN SAVED EXPIRED REVERTED")),
    ),
    Check("cancellation_request", "wrong_tries", "NEW.wrong_tries BETWEEN 0 AND 5"),
    Check(
        "feedback",
        "reason",
        one_of(
            "reason",
            "TOO_EXPENSIVE MISSING_FEATURES SWITCHED_SERVICE UNUSED CUSTOMER_SERVICE LOW_QUALITY TOO_COMPLEX OTHER",
        ),
    ),
    Check("offer", "kind", one_of("kind", "DISCOUNT PAUSE PLAN_CHANGE TRIAL_EXTENSION CONTACT CUSTOM")),
    Check("offer", "status", one_of("status", "OPEN ACCEPTED DECLINED")),
    Check("offer", "answered_at", exactly("answered_at", "NEW.status <> 'OPEN'")),
    Check(
        "transition",
        "type",
        one_of(
            "type",
            "account.cancellation_requested account.cancellation_assistance_requested account.cancellation_withdrawn "
            "account.cancellation_expired account.offer_accepted account.offer_declined "
            "account.cancellation_scheduled account.canceled account.feedback_submitted account.restart_requested "
            "account.restarted",
        ),
    ),
    Check("transition", "actor_kind", one_of("actor_kind", ACTOR_KINDS)),
    Check("transition", "account_status", one_of("account_status", ACCOUNT_STATUSES)),
    Check("outbox", "settled_once", "NEW.delivered_at IS NULL OR NEW.dead_at IS NULL"),
    Check("outbox", "attempts", "NEW.attempts >= 0"),
]


REFUSALS = [
    Refusal("account", "account_begins_active", "INSERT", "NEW.status <> 'ACTIVE'"),
    Refusal(
        "account",
        "account_arrows",
        "UPDATE",
        not_along(
            "ACTIVE>CANCELLATION_SCHEDULED ACTIVE>CANCELED CANCELLATION_SCHEDULED>CANCELED CANCELED>DELETING "
            "DELETING>DELETED CANCELLATION_SCHEDULED>ACTIVE CANCELED>ACTIVE"
        ),
    ),
    Refusal(
        "account",
        "deleted_account_has_no_members",
        "UPDATE",
        "NEW.status = 'DELETED' AND EXISTS (SELECT 1 FROM member WHERE account_id = NEW.id)",
        subquery=True,
    ),
    *(
        Refusal(
            "member",
            f"no_member_of_deleted_account_{event.lower()}",
            event,
            "EXISTS (SELECT 1 FROM account WHERE id = NEW.account_id AND status = 'DELETED')",
            subquery=True,
            # Meets the row lock of an update of the account to DELETED, whichever of the two comes first.
            lock="PERFORM 1 FROM account WHERE id = NEW.account_id FOR SHARE",
        )
        for event in ("INSERT", "UPDATE")
    ),
    Refusal(
        "cancellation_request",
        "request_arrows",
        "UPDATE",
        not_along(
            "PENDING_ASSISTANCE>PENDING_CONFIRMATION PENDING_CONFIRMATION>PENDING_ASSISTANCE "
            "PENDING_CONFIRMATION>CONFIRMED CONFIRMED>EFFECTIVE EFFECTIVE>REVERTED "
            "PENDING_ASSISTANCE>WITHDRAWN PENDING_CONFIRMATION>WITHDRAWN CONFIRMED>WITHDRAWN "
            "PENDING_ASSISTANCE>SAVED PENDING_CONFIRMATION>SAVED "
            "PENDING_CONFIRMATION>EXPIRED"
        ),
    ),
    Refusal("feedback", "feedback_is_never_changed", "UPDATE", "true"),
    Refusal(
        "feedback",
        "feedback_is_kept",
        "DELETE",
        "NOT EXISTS (SELECT 1 FROM account WHERE id = OLD.account_id AND status IN ('DELETING', 'DELETED'))",
        subquery=True,
    ),
    Refusal("transition", "transition_is_never_changed", "UPDATE", "true"),
    Refusal("transition", "transition_is_kept", "DELETE", "true"),
]

APPEND_ONLY = {
    "feedback": "id = NEW.id",
    "transition": "id = NEW.id OR (account_id = NEW.account_id AND sequence = NEW.sequence)",
}
"""Their rows, found by each unique key: SQLite's REPLACE deletes the old row without asking its triggers.
On PostgreSQL it is TRUNCATE that asks no row's trigger."""

INDEXES = """
CREATE UNIQUE INDEX staff_identity ON staff (issuer, subject);
CREATE UNIQUE INDEX staff_email ON staff (email);
CREATE UNIQUE INDEX service_identity ON service (issuer, subject);
CREATE UNIQUE INDEX service_name ON service (name);
CREATE UNIQUE INDEX account_reference ON account (reference);
CREATE INDEX account_name ON account (name COLLATE {binary}, id);
CREATE INDEX account_created ON account (created_at, id);
CREATE INDEX account_csm ON account (csm_id);
CREATE INDEX account_status ON account (status, id);
CREATE INDEX account_takes_effect ON account (cancellation_effective_at) WHERE cancellation_effective_at IS NOT NULL;
CREATE INDEX account_deletion ON account (deletion_scheduled_for, id) WHERE deletion_scheduled_for IS NOT NULL;
CREATE UNIQUE INDEX member_identity_in_account ON member (account_id, issuer, subject);
CREATE INDEX member_identity ON member (issuer, subject);
CREATE INDEX request_account ON cancellation_request (account_id, id);
CREATE UNIQUE INDEX request_open ON cancellation_request (account_id)
    WHERE status IN ('PENDING_ASSISTANCE', 'PENDING_CONFIRMATION', 'CONFIRMED');
CREATE UNIQUE INDEX request_effective ON cancellation_request (account_id) WHERE status = 'EFFECTIVE';
CREATE INDEX request_expires ON cancellation_request (confirmation_expires_at) WHERE status = 'PENDING_CONFIRMATION';
CREATE INDEX request_queue ON cancellation_request (status, id);
CREATE INDEX feedback_account ON feedback (account_id, id);
CREATE INDEX feedback_request ON feedback (request_id, id);
CREATE INDEX offer_account ON offer (account_id, id);
CREATE UNIQUE INDEX offer_code ON offer (request_id, code);
CREATE UNIQUE INDEX offer_accepted ON offer (request_id) WHERE status = 'ACCEPTED';
CREATE INDEX restart_request_account ON restart_request (account_id, id);
CREATE UNIQUE INDEX restart_request_once ON restart_request (request_id);
CREATE UNIQUE INDEX transition_sequence ON transition (account_id, sequence);
CREATE UNIQUE INDEX outbox_message_id ON outbox (message_id);
CREATE INDEX outbox_due ON outbox (due_at) WHERE delivered_at IS NULL AND dead_at IS NULL;
CREATE INDEX outbox_account ON outbox (account_id);
CREATE UNIQUE INDEX idempotency_key ON idempotency_record (caller, mutation, key);
CREATE INDEX idempotency_age ON idempotency_record (created_at);
"""


async def _keep_the_rules(_apps: Any, schema_editor: BaseSchemaEditor) -> None:
    dialect: Any = schema_editor.DIALECT
    await schema_editor.client.execute_script(
        rules.indexes(INDEXES, dialect)
        + rules.columns_hold_their_types(TABLES, dialect)
        + rules.refusing(CHECKS, REFUSALS, APPEND_ONLY, dialect)
    )


class Migration(TortoiseMigration):
    initial = True
    operations = [*TABLES, RunPython(_keep_the_rules)]  # noqa: RUF012  Tortoise reads it from the class
