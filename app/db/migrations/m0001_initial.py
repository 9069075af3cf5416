"""The first schema, and the rules that hold against hand-written SQL on both engines.

Tables and columns come from `CreateModel`, with plain columns: codes are text, because the enums in `app.lifecycle`
move on and this file does not. Everything else is one operation of SQL, generated below for both engines from the
same conditions, in which NEW and OLD are the row:

* CHECKS: conditions on one row. CHECK constraints on PostgreSQL, triggers on SQLite (which adds checks to a table
  only by remaking it).
* REFUSALS: conditions on a change (status arrows, append-only rows, a canceled account's members). Triggers on both.
* On SQLite also the types: its columns take anything, and times and ids are compared as text there.

What is refused raises an integrity error that names the rule.
"""

from typing import Any, NamedTuple

from tortoise import fields
from tortoise.fields.base import Field, OnDelete
from tortoise.migrations import CreateModel, RunPython
from tortoise.migrations import Migration as TortoiseMigration
from tortoise.migrations.schema_editor.base import BaseSchemaEditor

from app.db import UtcDatetimeField


def _key() -> Any:
    return fields.UUIDField(primary_key=True)


def _to(model: str, related_name: str, *, null: bool = False) -> Any:
    options: dict[str, Any] = {"null": null, "on_delete": OnDelete.RESTRICT}
    return fields.ForeignKeyField(f"models.{model}", related_name=related_name, **options)


def _text(length: int, *, null: bool = False) -> Any:
    options: dict[str, Any] = {"null": null}
    return fields.CharField(max_length=length, **options)


def _table(model: str, table: str, columns: list[tuple[str, Any]]) -> CreateModel:
    return CreateModel(name=model, fields=columns, options={"table": table, "app": "models"})


TABLES = [
    _table(
        "Staff",
        "staff",
        [
            ("id", _key()),
            ("issuer", _text(255)),
            ("subject", _text(255)),
            ("email", _text(254)),
            ("name", _text(200)),
            ("role", _text(32)),
            ("created_at", UtcDatetimeField()),
            ("deactivated_at", UtcDatetimeField(null=True)),
        ],
    ),
    _table(
        "Service",
        "service",
        [
            ("id", _key()),
            ("issuer", _text(255)),
            ("subject", _text(255)),
            ("name", _text(64)),
            ("scopes", _text(255)),
            ("created_at", UtcDatetimeField()),
            ("deactivated_at", UtcDatetimeField(null=True)),
        ],
    ),
    _table(
        "Account",
        "account",
        [
            ("id", _key()),
            ("reference", _text(200)),
            ("name", _text(200)),
            ("plan_code", _text(64)),
            ("status", _text(32)),
            ("epoch", fields.IntField()),
            ("last_sequence", fields.IntField()),
            ("current_period_end", UtcDatetimeField(null=True)),
            ("csm", _to("Staff", "accounts", null=True)),
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
    _table(
        "Member",
        "member",
        [
            ("id", _key()),
            ("account", _to("Account", "members")),
            ("issuer", _text(255)),
            ("subject", _text(255)),
            ("email", _text(254)),
            ("name", _text(200)),
            ("role", _text(16)),
            ("permissions", _text(255)),
            ("created_at", UtcDatetimeField()),
        ],
    ),
    _table(
        "CancellationRequest",
        "cancellation_request",
        [
            ("id", _key()),
            ("account", _to("Account", "cancellation_requests")),
            ("status", _text(32)),
            ("channel", _text(16)),
            ("plan_code", _text(64)),
            ("requested_at", UtcDatetimeField()),
            ("requested_by_kind", _text(16)),
            ("requested_by_id", fields.UUIDField()),
            ("assistance_requested_at", UtcDatetimeField(null=True)),
            ("opened_by_staff_at", UtcDatetimeField(null=True)),
            ("opened_by_staff_id", fields.UUIDField(null=True)),
            ("staff_note", fields.TextField(null=True)),
            ("confirmation_token_hash", _text(64, null=True)),
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
    _table(
        "Feedback",
        "feedback",
        [
            ("id", _key()),
            ("account", _to("Account", "feedback")),
            ("request", _to("CancellationRequest", "feedback")),
            ("reason", _text(32)),
            ("comment", fields.TextField(null=True)),
            ("submitted_by_id", fields.UUIDField()),
            ("submitted_at", UtcDatetimeField()),
        ],
    ),
    _table(
        "Offer",
        "offer",
        [
            ("id", _key()),
            ("account", _to("Account", "offers")),
            ("request", _to("CancellationRequest", "offers")),
            ("code", _text(64)),
            ("kind", _text(32)),
            ("title", _text(200)),
            ("description", fields.TextField()),
            ("status", _text(16)),
            ("offered_at", UtcDatetimeField()),
            ("answered_at", UtcDatetimeField(null=True)),
            ("answered_by_id", fields.UUIDField(null=True)),
        ],
    ),
    _table(
        "RestartRequest",
        "restart_request",
        [
            ("id", _key()),
            ("account", _to("Account", "restart_requests")),
            ("request", _to("CancellationRequest", "restart_requests")),
            ("requested_by_id", fields.UUIDField()),
            ("note", fields.TextField(null=True)),
            ("requested_at", UtcDatetimeField()),
        ],
    ),
    _table(
        "Transition",
        "transition",
        [
            ("id", _key()),
            ("account", _to("Account", "transitions")),
            ("sequence", fields.IntField()),
            ("epoch", fields.IntField()),
            ("type", _text(64)),
            ("request_id", fields.UUIDField(null=True)),
            ("actor_kind", _text(16)),
            ("actor_id", fields.UUIDField(null=True)),
            ("account_status", _text(32)),
            ("occurred_at", UtcDatetimeField()),
        ],
    ),
    _table(
        "OutboxMessage",
        "outbox",
        [
            ("id", _key()),
            ("account_id", fields.UUIDField(null=True)),
            ("template", _text(64)),
            ("recipient_name", _text(200)),
            ("recipient_address", _text(254)),
            ("facts", fields.JSONField[dict[str, Any]]()),
            ("message_id", _text(255)),
            ("created_at", UtcDatetimeField()),
            ("due_at", UtcDatetimeField()),
            ("lease", fields.UUIDField(null=True)),
            ("attempts", fields.IntField()),
            ("delivered_at", UtcDatetimeField(null=True)),
            ("dead_at", UtcDatetimeField(null=True)),
            ("last_error", fields.TextField(null=True)),
        ],
    ),
    _table(
        "IdempotencyRecord",
        "idempotency_record",
        [
            ("id", _key()),
            ("caller", _text(64)),
            ("mutation", _text(64)),
            ("key", _text(255)),
            ("fingerprint", _text(64)),
            ("account_id", fields.UUIDField(null=True)),
            ("answer", fields.JSONField[dict[str, Any]]()),
            ("created_at", UtcDatetimeField()),
        ],
    ),
]


def _one_of(column: str, codes: str) -> str:
    return f"NEW.{column} IN ({', '.join(repr(code) for code in codes.split())})"


def _exactly(column: str, condition: str) -> str:
    return f"(NEW.{column} IS NOT NULL) = ({condition})"


ACCOUNT_STATUSES = "ACTIVE CANCELLATION_SCHEDULED CANCELED DELETING DELETED"
ACTOR_KINDS = "MEMBER STAFF SERVICE SYSTEM"


class Check(NamedTuple):
    """A condition that every row of `table` meets."""

    table: str
    name: str
    condition: str


CHECKS = [
    Check("staff", "role", _one_of("role", "BILLING_TEAM CUSTOMER_SUCCESS_MANAGER SUPPORT")),
    Check("account", "epoch", "NEW.epoch >= 0"),
    Check("account", "canceled_at", _exactly("canceled_at", _one_of("status", "CANCELED DELETING DELETED"))),
    Check(
        "account", "restartable_until", _exactly("restartable_until", _one_of("status", "CANCELED DELETING DELETED"))
    ),
    Check(
        "account",
        "deletion_scheduled_for",
        _exactly(
            "deletion_scheduled_for",
            f"{_one_of('status', 'DELETING DELETED')} OR (NEW.status = 'CANCELED' AND NEW.deletion_held_at IS NULL)",
        ),
    ),
    Check("account", "deletion_held_at", "NEW.deletion_held_at IS NULL OR NEW.status = 'CANCELED'"),
    Check("account", "window", "NEW.restartable_until > NEW.canceled_at"),
    Check("account", "deletion_after_window", "NEW.deletion_scheduled_for >= NEW.restartable_until"),
    Check(
        "account",
        "cancellation_effective_at",
        _exactly("cancellation_effective_at", "NEW.status = 'CANCELLATION_SCHEDULED'"),
    ),
    Check("account", "deletion_started_at", _exactly("deletion_started_at", _one_of("status", "DELETING DELETED"))),
    Check("account", "deletion_not_early", "NEW.deletion_started_at >= NEW.restartable_until"),
    Check("account", "deleted_at", _exactly("deleted_at", "NEW.status = 'DELETED'")),
    Check("member", "role", _one_of("role", "ADMIN MEMBER")),
    Check(
        "cancellation_request",
        "status",
        _one_of(
            "status",
            "PENDING_ASSISTANCE PENDING_CONFIRMATION CONFIRMED EFFECTIVE REVERTED WITHDRAWN SAVED EXPIRED",
        ),
    ),
    Check("cancellation_request", "channel", _one_of("channel", "SELF_SERVE ASSISTED")),
    Check("cancellation_request", "requested_by_kind", _one_of("requested_by_kind", ACTOR_KINDS)),
    Check(
        "cancellation_request",
        "confirmation",
        "(NEW.confirmation_token_hash IS NULL) = (NEW.confirmation_expires_at IS NULL) "
        "AND (NEW.confirmation_token_hash IS NOT NULL OR NEW.status <> 'PENDING_CONFIRMATION')",
    ),
    Check(
        "cancellation_request",
        "confirmed_at",
        f"{_exactly('confirmed_at', _one_of('status', 'CONFIRMED EFFECTIVE REVERTED'))} OR NEW.status = 'WITHDRAWN'",
    ),
    Check(
        "cancellation_request",
        "effective_at",
        "(NEW.effective_at IS NULL) = (NEW.confirmed_at IS NULL)",  # a scheduled one keeps both when it is withdrawn
    ),
    Check("cancellation_request", "effective_after_confirmed", "NEW.effective_at >= NEW.confirmed_at"),
    Check(
        "cancellation_request", "took_effect_at", _exactly("took_effect_at", _one_of("status", "EFFECTIVE REVERTED"))
    ),
    Check(
        "cancellation_request",
        "closed_at",
        _exactly("closed_at", _one_of("status", "WITHDRAWN SAVED EXPIRED REVERTED")),
    ),
    Check("cancellation_request", "wrong_tries", "NEW.wrong_tries BETWEEN 0 AND 5"),
    Check(
        "feedback",
        "reason",
        _one_of(
            "reason",
            "TOO_EXPENSIVE MISSING_FEATURES SWITCHED_SERVICE UNUSED CUSTOMER_SERVICE LOW_QUALITY TOO_COMPLEX OTHER",
        ),
    ),
    Check("offer", "kind", _one_of("kind", "DISCOUNT PAUSE PLAN_CHANGE TRIAL_EXTENSION CONTACT CUSTOM")),
    Check("offer", "status", _one_of("status", "OPEN ACCEPTED DECLINED")),
    Check("offer", "answered_at", _exactly("answered_at", "NEW.status <> 'OPEN'")),
    Check(
        "transition",
        "type",
        _one_of(
            "type",
            "account.cancellation_requested account.cancellation_assistance_requested account.cancellation_withdrawn "
            "account.cancellation_expired account.offer_accepted account.offer_declined "
            "account.cancellation_scheduled account.canceled account.feedback_submitted account.restart_requested "
            "account.restarted",
        ),
    ),
    Check("transition", "actor_kind", _one_of("actor_kind", ACTOR_KINDS)),
    Check("transition", "account_status", _one_of("account_status", ACCOUNT_STATUSES)),
    Check("outbox", "settled_once", "NEW.delivered_at IS NULL OR NEW.dead_at IS NULL"),
    Check("outbox", "attempts", "NEW.attempts >= 0"),
]


def _not_along(arrows: str) -> str:
    allowed = ", ".join(repr(arrow) for arrow in arrows.split())
    return f"OLD.status <> NEW.status AND (OLD.status || '>' || NEW.status) NOT IN ({allowed})"


class Refusal(NamedTuple):
    """A change (`event`) of a row of `table` that is refused when `condition` holds.

    `subquery`: the condition looks at other rows, which PostgreSQL wants inside the trigger's function. `lock`: a
    statement that runs there first, so that two transactions cannot each miss the other's change."""

    table: str
    name: str
    event: str
    condition: str
    subquery: bool = False
    lock: str = ""


REFUSALS = [
    Refusal("account", "account_begins_active", "INSERT", "NEW.status <> 'ACTIVE'"),
    Refusal(
        "account",
        "account_arrows",
        "UPDATE",
        _not_along(
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
        _not_along(
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


def _postgresql() -> str:
    statements = [
        f'ALTER TABLE "{check.table}" ADD CONSTRAINT "{check.table}_{check.name}" '
        f"CHECK ({check.condition.replace('NEW.', '')});"
        for check in CHECKS
    ]
    refuse = "RAISE EXCEPTION '%', TG_NAME USING ERRCODE = 'integrity_constraint_violation';"
    statements.append(f"CREATE FUNCTION sunset_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {refuse} END $$;")
    for rule in REFUSALS:
        function, when = "sunset_refuse", f"WHEN ({rule.condition}) "
        if rule.subquery:
            function, when, lock = f"sunset_{rule.name}", "", f"{rule.lock};" if rule.lock else ""
            row = "OLD" if rule.event == "DELETE" else "NEW"
            statements.append(
                f"CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                f"{lock} IF {rule.condition} THEN {refuse} END IF; RETURN {row}; END $$;"
            )
        statements.append(
            f'CREATE TRIGGER "{rule.name}" BEFORE {rule.event} ON "{rule.table}" '
            f"FOR EACH ROW {when}EXECUTE FUNCTION {function}();"
        )
    statements += [
        f'CREATE TRIGGER "{table}_is_not_truncated" BEFORE TRUNCATE ON "{table}" EXECUTE FUNCTION sunset_refuse();'
        for table in APPEND_ONLY
    ]
    return "\n".join(statements)


def _sqlite() -> str:
    conditions = [(check.table, f"{check.table}_{check.name}", check.condition) for check in CHECKS]
    for create in TABLES:
        table: str = create.model._meta.db_table
        for name, field in create.model._meta.fields_map.items():
            if (holds := _sqlite_type(field)) is not None:
                column = f'NEW."{create.model._meta.fields_db_projection[name]}"'
                holds = f"NEW IS NULL OR ({holds})".replace("NEW", column)
                conditions.append((table, f"{table}_{name}_type", holds))
    statements = [
        _sqlite_trigger(f"{name}_{event.lower()}", name, event, table, f"NOT ({condition})")
        for table, name, condition in conditions
        for event in ("INSERT", "UPDATE")
    ]
    statements += [_sqlite_trigger(rule.name, rule.name, rule.event, rule.table, rule.condition) for rule in REFUSALS]
    statements += [
        _sqlite_trigger(
            f"{table}_is_not_replaced",
            f"{table}_is_not_replaced",
            "INSERT",
            table,
            f'EXISTS (SELECT 1 FROM "{table}" WHERE {same})',
        )
        for table, same in APPEND_ONLY.items()
    ]
    return "\n".join(statements)


def _sqlite_trigger(name: str, rule: str, event: str, table: str, condition: str) -> str:
    return (
        f'CREATE TRIGGER "{name}" BEFORE {event} ON "{table}" FOR EACH ROW WHEN {condition} '
        f"BEGIN SELECT RAISE(ABORT, '{rule}'); END;"
    )


def _sqlite_type(field: Field[Any]) -> str | None:
    """The condition on a value, NEW, by which an SQLite column holds what the field says."""
    if isinstance(field, UtcDatetimeField):
        return "length(NEW) = 32 AND NEW GLOB '????-??-?? ??:??:??.??????+00:00' AND julianday(NEW) IS NOT NULL"
    if isinstance(field, fields.UUIDField):
        return "length(NEW) = 36 AND NEW NOT GLOB '*[^0-9a-f-]*' AND NEW GLOB '????????-????-????-????-????????????'"
    if isinstance(field, fields.CharField):
        return f"typeof(NEW) = 'text' AND length(NEW) <= {field.max_length}"
    if isinstance(field, fields.TextField):
        return "typeof(NEW) = 'text'"
    if isinstance(field, fields.IntField):
        return "typeof(NEW) = 'integer'"
    if isinstance(field, fields.JSONField):
        return "json_valid(NEW)"
    return None


async def _keep_the_rules(_apps: Any, schema_editor: BaseSchemaEditor) -> None:
    is_sqlite = schema_editor.DIALECT == "sqlite"
    indexes = INDEXES.format(binary="BINARY" if is_sqlite else '"C"')  # `accounts.page` sorts names by code points
    await schema_editor.client.execute_script(indexes + (_sqlite() if is_sqlite else _postgresql()))


class Migration(TortoiseMigration):
    initial = True
    operations = [*TABLES, RunPython(_keep_the_rules)]  # noqa: RUF012  Tortoise reads it from the class
