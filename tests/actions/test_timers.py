"""Looking for what is due costs what is due, however many accounts wait; and who holds one row holds up no other."""

import json
from typing import Any

import pytest
from tortoise.connection import get_connection

from app import db, deletion
from app.timers import TIMERS
from tests.cast import Stage
from tests.ending import StoppedClock, count, many_canceled

ACCOUNTS = 20_000
FEW_BLOCKS = 12
"""Of 8 KiB: the pages that lead to the first row of an index. Reading one whole takes many times as many."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StoppedClock:
    return StoppedClock(monkeypatch)


@pytest.mark.postgres
async def test_a_round_reads_the_same_few_blocks_however_many_are_not_due(
    postgres_house: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = postgres_house
    await db.execute("ALTER TABLE account DISABLE TRIGGER USER")
    await db.execute(
        "INSERT INTO account (id, reference, name, plan_code, status, epoch, last_sequence, created_at, canceled_at, "
        "restartable_until, deletion_scheduled_for, reminder_due_at) SELECT gen_random_uuid(), 'wait-' || number, 'W', "
        "'essentials', 'CANCELED', 1, 1, now(), now(), now() + interval '60 days', now() + interval '60 days', "
        "now() + interval '30 days' FROM generate_series(1, $1::int) number",
        ACCOUNTS,
    )
    await db.execute("ALTER TABLE account ENABLE TRIGGER USER")
    await db.execute("VACUUM ANALYZE")
    asked: list[tuple[str, tuple[Any, ...]]] = []
    fetch = db.fetch

    async def noted(sql: str, *args: Any) -> list[dict[str, Any]]:
        asked.append((sql, args))
        return await fetch(sql, *args)

    monkeypatch.setattr(db, "fetch", noted)
    timers = house.timers()
    assert await timers.run() == 0
    monkeypatch.undo()

    pages = [(sql, args) for sql, args in asked if "ORDER BY" in sql]
    assert len(pages) == len(TIMERS)
    for sql, args in pages:
        [row] = await db.fetch(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", *args)
        plan = json.loads(row["QUERY PLAN"])[0]["Plan"]
        assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] <= FEW_BLOCKS, sql


@pytest.mark.postgres
async def test_who_holds_a_row_of_one_account_holds_up_no_other(postgres_house: Stage, clock: StoppedClock) -> None:
    """The wait for it ends with what a database that is away ends with, too."""
    house = postgres_house
    ids = await many_canceled(house, 4, clock.now)
    assert len(await deletion.begin(house.installation, ids)) == 4
    client: Any = get_connection("postgresql")
    other = await client.connect()
    timers = house.timers()
    try:
        await other.execute("BEGIN")
        await other.execute("SELECT id FROM cancellation_request WHERE account_id = $1 FOR UPDATE", ids[0])
        assert await timers.run() == 3
        assert await count("account", "status = 'DELETED'") == 3
        assert await timers.run() == 0
    finally:
        await other.close()
    assert await house.timers().run() == 1
