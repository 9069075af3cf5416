"""Enforcement: which systems have obeyed a cancellation, and when."""

from typing import Any

from tortoise import fields
from tortoise.migrations import Migration as TortoiseMigration
from tortoise.migrations import RunPython
from tortoise.migrations.schema_editor.base import BaseSchemaEditor

from app.db import UtcDatetimeField, rules
from app.db.rules import Check, Refusal, key, table, text, to, together

TABLES = [
    table(
        "Enforcement",
        "enforcement",
        [
            ("id", key()),
            ("account", to("Account", "enforcements")),
            ("epoch", fields.IntField()),
            ("system", text(64)),
            ("asked_at", UtcDatetimeField()),
            ("due_at", UtcDatetimeField()),
            ("enforced_at", UtcDatetimeField(null=True)),
            ("enforced_by_id", fields.UUIDField(null=True)),
            ("lifted_at", UtcDatetimeField(null=True)),
            ("report_at", UtcDatetimeField(null=True)),
            ("reported_at", UtcDatetimeField(null=True)),
        ],
    ),
]

CHECKS = [
    Check("enforcement", "epoch", "NEW.epoch >= 1"),
    Check("enforcement", "due_after_asked", "NEW.due_at > NEW.asked_at"),
    Check("enforcement", "enforced_by", together("enforced_at", "enforced_by_id")),
    Check("enforcement", "enforced_after_asked", "NEW.enforced_at IS NULL OR NEW.enforced_at >= NEW.asked_at"),
    Check("enforcement", "lifted_after_asked", "NEW.lifted_at IS NULL OR NEW.lifted_at >= NEW.asked_at"),
    Check(
        "enforcement",
        "enforced_before_lifted",
        "NEW.enforced_at IS NULL OR NEW.lifted_at IS NULL OR NEW.enforced_at <= NEW.lifted_at",
    ),
    Check("enforcement", "report_when_late", "NEW.report_at IS NULL OR NEW.report_at >= NEW.due_at"),
    Check("enforcement", "reported_when_late", "NEW.reported_at IS NULL OR NEW.reported_at >= NEW.due_at"),
    Check("enforcement", "reported_once", "NEW.report_at IS NULL OR NEW.reported_at IS NULL"),
]

REFUSALS = [
    Refusal(
        "enforcement",
        "enforcement_stays",
        "UPDATE",
        "OLD.enforced_at IS NOT NULL AND (NEW.enforced_at IS NULL OR NEW.enforced_at <> OLD.enforced_at)",
    ),
]

APPEND_ONLY: dict[str, str] = {}

INDEXES = """
CREATE UNIQUE INDEX enforcement_once ON enforcement (account_id, epoch, system);
CREATE UNIQUE INDEX enforcement_current ON enforcement (account_id, system) WHERE lifted_at IS NULL;
CREATE INDEX enforcement_pending ON enforcement (system, due_at) WHERE enforced_at IS NULL AND lifted_at IS NULL;
CREATE INDEX enforcement_unreported ON enforcement (report_at, account_id)
    WHERE enforced_at IS NULL AND lifted_at IS NULL AND report_at IS NOT NULL;
CREATE INDEX enforcement_reported ON enforcement (reported_at) WHERE reported_at IS NOT NULL;
CREATE INDEX enforcement_listed ON enforcement (due_at, id) WHERE lifted_at IS NULL;
"""


async def _keep_the_rules(_apps: Any, schema_editor: BaseSchemaEditor) -> None:
    dialect: Any = schema_editor.DIALECT
    await schema_editor.client.execute_script(
        rules.columns_hold_their_types(TABLES, dialect)
        + rules.refusing(CHECKS, REFUSALS, APPEND_ONLY, dialect)
        + rules.indexes(INDEXES, dialect)
    )


class Migration(TortoiseMigration):
    dependencies = [("models", "m0003_webhooks")]  # noqa: RUF012  Tortoise reads it from the class
    operations = [*TABLES, RunPython(_keep_the_rules)]  # noqa: RUF012
