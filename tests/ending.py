"""What tests of an account's end share: a clock that stands where it is put, and accounts that were canceled."""

import io
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import pytest
import structlog

from app import db, demo, logs, provisioning
from app.lifecycle import ActorKind, Channel, MemberRole, RequestStatus
from app.models import CancellationRequest
from app.provisioning import AccountItem, MemberItem
from tests.cast import ALICE, Stage

DAY, HOUR, MOMENT = timedelta(days=1), timedelta(hours=1), timedelta(milliseconds=1)
"""MOMENT: the least that Sunset's clock tells apart."""
WINDOW = timedelta(hours=1_440)

NOTICE = timedelta(hours=168)
"""The shipped policy's minimum notice."""


class StoppedClock:
    """The installation's clock, standing: what lies a moment apart is told apart on the slowest machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: datetime = datetime(2031, 5, 5, 12, tzinfo=UTC)) -> None:
        self.now = now
        monkeypatch.setattr(db, "now_sql", self._sql)

    def _sql(self) -> str:
        text = self.now.strftime("%Y-%m-%d %H:%M:%S.%f+00:00")
        return f"TIMESTAMPTZ '{text}'" if db.dialect() == "postgresql" else f"'{text}'"

    def put(self, now: datetime) -> None:
        self.now = now

    def forward(self, by: timedelta) -> None:
        self.now += by


@contextmanager
def log_in_memory() -> Iterator[io.StringIO]:
    """All that a process of Sunset logs at its most talkative; afterwards everything is as before."""
    root, app = logging.root, logging.getLogger("app")
    handlers, levels = root.handlers[:], (root.level, app.level)
    stream = io.StringIO()
    logs.configure(format="json", level="debug", stream=stream)
    try:
        yield stream
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        app.setLevel(levels[1])
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()


async def account(account_id: UUID) -> dict[str, Any]:
    """The account's row, its times as such."""
    row = await db.fetch_one("SELECT * FROM account WHERE id = $1", account_id)
    assert row is not None
    times = ("canceled_at", "restartable_until", "deletion_scheduled_for", "deletion_held_at", "deletion_started_at")
    return row | {name: db.as_datetime(row[name]) for name in (*times, "deleted_at", "reminder_due_at")}


async def steps(account_id: UUID) -> list[str]:
    """The account's history, which has no gap and no double."""
    rows = await db.fetch("SELECT sequence, type FROM transition WHERE account_id = $1 ORDER BY sequence", account_id)
    assert [row["sequence"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["type"].removeprefix("account.") for row in rows]


async def own_step(account_id: UUID) -> dict[str, Any]:
    """Sunset's own step of the account's deletion."""
    row = await db.fetch_one("SELECT * FROM deletion_step WHERE account_id = $1 AND system = 'sunset'", account_id)
    assert row is not None
    return row | {name: db.as_datetime(row[name]) for name in ("created_at", "due_at", "completed_at")}


async def promised(account_id: UUID, template: str) -> Counter[str]:
    """How many emails of a kind about an account each address was promised."""
    rows = await db.fetch(
        "SELECT recipient_address FROM outbox WHERE account_id = $1 AND template = $2", account_id, template
    )
    return Counter(row["recipient_address"] for row in rows)


async def count(table: str, condition: str = "1 = 1", *args: Any) -> int:
    row = await db.fetch_one(f"SELECT COUNT(*) AS count FROM {table} WHERE {condition}", *args)
    assert row is not None
    return int(row["count"])


async def many(house: Stage, number: int, prefix: str = "many") -> list[UUID]:
    """So many accounts, active, each with Alice as its admin."""
    alice = MemberItem(
        subject=demo.member_subject(ALICE),
        email=ALICE,
        name="Alice Adams",
        role=MemberRole.ADMIN,
        permissions=frozenset(),
    )
    ids: list[UUID] = []
    for start in range(0, number, provisioning.MAX_ITEMS):
        results = await provisioning.sync(
            house.installation,
            [
                AccountItem(reference=f"{prefix}-{index}", name=f"Of {index}", plan_code="essentials", members=[alice])
                for index in range(start, min(start + provisioning.MAX_ITEMS, number))
            ],
        )
        ids += [cast("UUID", result.account_id) for result in results]
    return ids


async def many_canceled(house: Stage, number: int, end: datetime, prefix: str = "gone") -> list[UUID]:
    """So many accounts whose retention window ends then, as if each had been canceled by a member of its own."""
    ids = await many(house, number, prefix)
    canceled_at = end - WINDOW
    await CancellationRequest.bulk_create(
        [
            CancellationRequest(
                id=db.uuid7(),
                account_id=account_id,
                status=RequestStatus.EFFECTIVE,
                channel=Channel.SELF_SERVE,
                plan_code="essentials",
                requested_at=canceled_at,
                requested_by_kind=ActorKind.MEMBER,
                requested_by_id=db.uuid7(),
                confirmed_at=canceled_at,
                effective_at=canceled_at,
                took_effect_at=canceled_at,
            )
            for account_id in ids
        ]
    )
    await db.execute(
        "UPDATE account SET status = 'CANCELED', epoch = 1, created_at = $1, canceled_at = $1, restartable_until = $2, "
        "deletion_scheduled_for = $2 WHERE reference LIKE $3",
        canceled_at,
        end,
        f"{prefix}-%",
    )
    return ids
