"""Webhooks: the endpoints of other systems, and what is delivered to each."""

from typing import Any

from tortoise import fields
from tortoise.migrations import Migration as TortoiseMigration
from tortoise.migrations import RunPython
from tortoise.migrations.schema_editor.base import BaseSchemaEditor

from app.db import UtcDatetimeField, rules
from app.db.rules import Check, Refusal, key, table, text, to, together

TABLES = [
    table(
        "WebhookEndpoint",
        "webhook_endpoint",
        [
            ("id", key()),
            ("url", fields.TextField()),
            ("description", fields.TextField()),
            ("event_types", fields.TextField()),
            ("secret_generation", fields.IntField()),
            ("previous_secret_until", UtcDatetimeField(null=True)),
            ("created_at", UtcDatetimeField()),
            ("disabled_at", UtcDatetimeField(null=True)),
            ("disabled_reason", fields.TextField(null=True)),
            ("failures", fields.IntField()),
            ("paused_until", UtcDatetimeField(null=True)),
        ],
    ),
    table(
        "WebhookDelivery",
        "webhook_delivery",
        [
            ("id", key()),
            ("endpoint", to("WebhookEndpoint", "deliveries")),
            ("account_id", fields.UUIDField(null=True)),
            ("sequence", fields.IntField(null=True)),
            ("epoch", fields.IntField(null=True)),
            ("type", text(64)),
            ("payload", fields.TextField()),
            ("created_at", UtcDatetimeField()),
            ("queued_at", UtcDatetimeField()),
            ("due_at", UtcDatetimeField()),
            ("lease", fields.UUIDField(null=True)),
            ("attempts", fields.IntField()),
            ("last_attempt_at", UtcDatetimeField(null=True)),
            ("last_status", fields.IntField(null=True)),
            ("last_latency_ms", fields.IntField(null=True)),
            ("last_error", fields.TextField(null=True)),
            ("delivered_at", UtcDatetimeField(null=True)),
            ("dead_at", UtcDatetimeField(null=True)),
        ],
    ),
]

CHECKS = [
    Check("webhook_endpoint", "generation", "NEW.secret_generation >= 0"),
    Check("webhook_endpoint", "failures", "NEW.failures >= 0"),
    Check("webhook_endpoint", "disabled", together("disabled_at", "disabled_reason")),
    Check("webhook_delivery", "attempts", "NEW.attempts >= 0"),
    Check("webhook_delivery", "settled_once", "NEW.delivered_at IS NULL OR NEW.dead_at IS NULL"),
    Check("webhook_delivery", "about", together("account_id", "sequence", "epoch")),
    Check(
        "webhook_delivery",
        "settled_is_nobodys",
        "NEW.lease IS NULL OR (NEW.delivered_at IS NULL AND NEW.dead_at IS NULL)",
    ),
]

REFUSALS: list[Refusal] = []

APPEND_ONLY: dict[str, str] = {}

INDEXES = """
CREATE UNIQUE INDEX webhook_delivery_once ON webhook_delivery (endpoint_id, account_id, sequence);
CREATE INDEX webhook_delivery_due ON webhook_delivery (endpoint_id, due_at, id)
    WHERE delivered_at IS NULL AND dead_at IS NULL;
CREATE INDEX webhook_delivery_next ON webhook_delivery (due_at) WHERE delivered_at IS NULL AND dead_at IS NULL;
CREATE INDEX webhook_delivery_queued ON webhook_delivery (queued_at) WHERE delivered_at IS NULL AND dead_at IS NULL;
CREATE INDEX webhook_delivery_claimed ON webhook_delivery (endpoint_id) WHERE lease IS NOT NULL;
CREATE INDEX webhook_delivery_account ON webhook_delivery (account_id);
CREATE INDEX webhook_delivery_created ON webhook_delivery (created_at, id);
CREATE INDEX webhook_delivery_endpoint ON webhook_delivery (endpoint_id, created_at, id);
CREATE INDEX webhook_endpoint_created ON webhook_endpoint (created_at, id);
"""


async def _keep_the_rules(_apps: Any, schema_editor: BaseSchemaEditor) -> None:
    dialect: Any = schema_editor.DIALECT
    await schema_editor.client.execute_script(
        rules.columns_hold_their_types(TABLES, dialect)
        + rules.refusing(CHECKS, REFUSALS, APPEND_ONLY, dialect)
        + rules.indexes(INDEXES, dialect)
    )


class Migration(TortoiseMigration):
    dependencies = [("models", "m0002_time")]  # noqa: RUF012  Tortoise reads it from the class
    operations = [*TABLES, RunPython(_keep_the_rules)]  # noqa: RUF012
