"""Webhooks: the trace in which each delivery was promised, and indexes that are not mistaken for one another."""

from typing import Any

from tortoise.migrations import AddField, RunPython
from tortoise.migrations import Migration as TortoiseMigration
from tortoise.migrations.schema_editor.base import BaseSchemaEditor

from app.db import rules
from app.db.rules import text

ADDED = [AddField("WebhookDelivery", "traceparent", text(64, null=True))]
_TABLE_OF = {"WebhookDelivery": "webhook_delivery"}

# Nearly always nothing is open, and so PostgreSQL takes an index of what is open for empty and any of them for as good
# as the one that a statement is meant for. One transition later it reads a thousand rows for each of a thousand
# endpoints. An index with a condition more serves those statements alone that have it, too.
INDEXES = """
DROP INDEX webhook_delivery_next;
CREATE INDEX webhook_delivery_next ON webhook_delivery (due_at)
    WHERE delivered_at IS NULL AND dead_at IS NULL AND attempts >= 0;
DROP INDEX webhook_delivery_queued;
CREATE INDEX webhook_delivery_queued ON webhook_delivery (queued_at)
    WHERE delivered_at IS NULL AND dead_at IS NULL AND attempts >= 0;
CREATE INDEX webhook_delivery_dead ON webhook_delivery (dead_at) WHERE dead_at IS NOT NULL;
"""


async def _keep_the_rules(_apps: Any, schema_editor: BaseSchemaEditor) -> None:
    dialect: Any = schema_editor.DIALECT
    await schema_editor.client.execute_script(
        rules.added_columns_hold_their_types(_TABLE_OF, ADDED, dialect) + rules.indexes(INDEXES, dialect)
    )


class Migration(TortoiseMigration):
    dependencies = [("models", "m0004_enforcement")]  # noqa: RUF012  Tortoise reads it from the class
    operations = [*ADDED, RunPython(_keep_the_rules)]  # noqa: RUF012
