"""Restores: who this installation is and what its database was, halted deletions, and events of the present status."""

from typing import Any

from tortoise import fields
from tortoise.migrations import Migration as TortoiseMigration
from tortoise.migrations import RunPython
from tortoise.migrations.schema_editor.base import BaseSchemaEditor

from app.db import UtcDatetimeField, rules
from app.db.migrations import m0002_time as before
from app.db.rules import Check, Refusal, key, one_of, table, text, together

TABLES = [
    table(
        "InstallationRecord",
        "installation",
        [
            ("id", fields.IntField(primary_key=True, generated=False)),
            ("identity", fields.UUIDField()),
            ("database", text(100, null=True)),
            ("timeline", fields.BigIntField(null=True)),
            ("written_by", fields.BigIntField(null=True)),
            ("incidents", fields.IntField()),
            ("restores", fields.IntField()),
            ("restated_behind", fields.UUIDField(null=True)),
            ("restated_at", UtcDatetimeField(null=True)),
            ("created_at", UtcDatetimeField()),
        ],
    ),
    table(
        "DeletionHalt",
        "deletion_halt",
        [
            ("id", key()),
            ("cause", text(16)),
            ("evidence", fields.TextField()),
            ("as_of", UtcDatetimeField(null=True)),
            ("halted_at", UtcDatetimeField()),
            ("resumed_at", UtcDatetimeField(null=True)),
            ("resume_note", fields.TextField(null=True)),
        ],
    ),
]

REPLACED = [check for check in before.CHECKS if (check.table, check.name) == ("transition", "type")]

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
            "account.deletion_started account.deleted account.status",
        ),
    ),
    Check("installation", "one", "NEW.id = 1"),
    Check("installation", "counts", "NEW.incidents >= NEW.restores AND NEW.restores BETWEEN 0 AND 2000"),
    Check("deletion_halt", "cause", one_of("cause", "OPERATOR RESTORED MOVED")),
    Check("deletion_halt", "resumed", together("resumed_at", "resume_note")),
    Check("deletion_halt", "resumed_after_halted", "NEW.resumed_at >= NEW.halted_at"),
]

REFUSALS = [
    Refusal(
        "installation",
        "restores_never_go_back",
        "UPDATE",
        "NEW.restores < OLD.restores OR NEW.incidents < OLD.incidents OR NEW.identity <> OLD.identity",
    ),
    Refusal("installation", "installation_is_kept", "DELETE", "true"),
]

APPEND_ONLY = {"installation": "id = NEW.id"}

INDEXES = """
CREATE INDEX transition_newest ON transition (occurred_at, id);
CREATE UNIQUE INDEX deletion_halt_open ON deletion_halt (cause) WHERE resumed_at IS NULL;
"""


async def _keep_the_rules(_apps: Any, schema_editor: BaseSchemaEditor) -> None:
    dialect: Any = schema_editor.DIALECT
    await schema_editor.client.execute_script(
        rules.no_longer(REPLACED, dialect)
        + rules.columns_hold_their_types(TABLES, dialect)
        + rules.refusing(CHECKS, REFUSALS, APPEND_ONLY, dialect)
        + rules.indexes(INDEXES, dialect)
    )


class Migration(TortoiseMigration):
    dependencies = [("models", "m0005_webhook_trace")]  # noqa: RUF012  Tortoise reads it from the class
    operations = [*TABLES, RunPython(_keep_the_rules)]  # noqa: RUF012
