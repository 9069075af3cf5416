"""Deletions and those who would stop them, at the same time on PostgreSQL: one winner, and every loser is told.

What a restart may do ends at the moment at which a deletion may begin, so the two can only meet around it: a restart
that has the account's row before the end of its window and commits after it. The clock here runs.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from app import db, deletion, errors, provisioning, restart
from app.db import Database
from app.provisioning import AccountItem, ItemResult, Outcome
from tests.actions.test_races import held, together, waiting
from tests.cast import BILLING, Stage, stage
from tests.ending import HOUR, StoppedClock, account, count, many_canceled, own_step, steps

pytestmark = pytest.mark.postgres

ACCOUNTS = 500
WORKERS = 4


@asynccontextmanager
async def without_a_breaker(database: Database, directory: Path) -> AsyncIterator[Stage]:
    async with stage(database, directory, breaker_at_least=1_000_000) as house:
        yield house


async def end_windows(ids: list[UUID], pause: timedelta) -> None:
    """One after the other, each that much after the one before; the first tenth is over, the last has an hour."""
    now, tenth = await db.now(), len(ids) // 10
    for number, account_id in enumerate(ids):
        end = now + (number - tenth) * pause
        if number < tenth:
            end = now - HOUR
        elif number >= len(ids) - tenth:
            end = now + HOUR
        await db.execute(
            "UPDATE account SET canceled_at = $2, restartable_until = $3, deletion_scheduled_for = $3 WHERE id = $1",
            account_id,
            end - timedelta(hours=1_440),
            end,
        )


async def test_of_500_restarts_and_deletions_each_has_one_winner(postgres_database: Database, tmp_path: Path) -> None:
    async with without_a_breaker(postgres_database, tmp_path) as house:
        ids = await many_canceled(house, ACCOUNTS, await db.now() + HOUR)
        await end_windows(ids, timedelta(milliseconds=12))
        call = await house.call(BILLING)
        over = asyncio.Event()

        async def bring_back(account_id: UUID) -> Any:
            """As near to the end as it can be met: when a worker may come to the account at any moment."""
            left = (await account(account_id))["restartable_until"] - await db.now() - timedelta(milliseconds=10)
            if left < HOUR / 2:
                await asyncio.sleep(max(0, left.total_seconds()))
            return await restart.restart(call, account_id)

        async def work() -> list[UUID]:
            begun: list[UUID] = []
            while not over.is_set():
                due = await db.fetch(
                    "SELECT id FROM account WHERE status = 'CANCELED' AND deletion_scheduled_for <= $1", await db.now()
                )
                begun += await deletion.begin(house.installation, [db.as_uuid(row["id"]) for row in due])
            return begun

        workers = [asyncio.create_task(work()) for _ in range(WORKERS)]
        restarted = dict(zip(ids, await together(*map(bring_back, ids)), strict=True))
        over.set()
        found = [*await asyncio.gather(*workers), await deletion.begin(house.installation, ids)]
        begun = Counter(account_id for one in found for account_id in one)

        outcomes: Counter[str] = Counter()
        for account_id, answer in restarted.items():
            row = await account(account_id)
            outcomes[row["status"]] += 1
            if row["status"] == "ACTIVE":
                assert answer.account.id == account_id
                assert await steps(account_id) == ["restarted"]
                assert (begun[account_id], row["epoch"]) == (0, 2)
            else:
                assert row["status"] == "DELETING"
                assert isinstance(answer, errors.RestartWindowClosed)
                assert await steps(account_id) == ["deletion_started"]
                assert (begun[account_id], row["epoch"]) == (1, 1)
                assert row["deletion_started_at"] >= row["restartable_until"]
                assert (await own_step(account_id))["epoch"] == 1
        assert await count("deletion_step") == outcomes["DELETING"]
        assert await count("cancellation_request", "status = 'REVERTED'") == outcomes["ACTIVE"]
        assert min(outcomes["ACTIVE"], outcomes["DELETING"]) >= ACCOUNTS // 10
        assert sum(outcomes.values()) == ACCOUNTS


async def test_of_holds_and_deletions_each_has_one_winner(postgres_database: Database, tmp_path: Path) -> None:
    """Every account is due, and everybody comes at once."""
    async with without_a_breaker(postgres_database, tmp_path) as house:
        ids = await many_canceled(house, 60, await db.now() - HOUR)
        call = await house.call(BILLING)
        pages = [ids[start::3] for start in range(3)]
        results = await together(
            *(deletion.hold(call, account_id, note="A lawyer asked.") for account_id in ids),
            *(deletion.begin(house.installation, page) for page in pages),
        )
        await deletion.begin(house.installation, ids)
        for account_id, answer in zip(ids, results[: len(ids)], strict=True):
            row = await account(account_id)
            if isinstance(answer, BaseException):
                assert isinstance(answer, errors.AccountStateRefused)
                assert (row["status"], await steps(account_id)) == ("DELETING", ["deletion_started"])
            else:
                assert (row["status"], await steps(account_id)) == ("CANCELED", ["deletion_held"])
                assert row["deletion_held_at"] is not None
        assert await count("deletion_hold") + await count("deletion_step") == len(ids)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StoppedClock:
    return StoppedClock(monkeypatch)


async def test_a_restart_before_the_end_wins_though_it_commits_after_it(
    postgres_house: Stage, clock: StoppedClock
) -> None:
    """Who had the row first: the deletion does not wait for it, and finds it gone."""
    (account_id,) = await many_canceled(postgres_house, 1, clock.now)
    async with held(account_id) as other:
        assert await deletion.begin(postgres_house.installation, [account_id]) == [], "it is somebody's"
        await other.execute(
            "UPDATE account SET status = 'ACTIVE', canceled_at = NULL, restartable_until = NULL, "
            "deletion_scheduled_for = NULL WHERE id = $1",
            account_id,
        )
    assert await deletion.begin(postgres_house.installation, [account_id]) == []
    assert (await account(account_id))["status"] == "ACTIVE"


@pytest.mark.parametrize("action", ["restart", "hold"])
async def test_who_waits_for_a_deletion_that_begins_is_told(
    postgres_house: Stage, clock: StoppedClock, action: str
) -> None:
    (account_id,) = await many_canceled(postgres_house, 1, clock.now)
    call = await postgres_house.call(BILLING)
    async with held(account_id) as other:
        await other.execute(
            "UPDATE account SET status = 'DELETING', deletion_started_at = restartable_until WHERE id = $1", account_id
        )
        late = asyncio.create_task(
            restart.restart(call, account_id) if action == "restart" else deletion.hold(call, account_id, note="Wait.")
        )
        await waiting()
    with pytest.raises(errors.RestartWindowClosed if action == "restart" else errors.AccountStateRefused):
        await late
    assert (await account(account_id))["status"] == "DELETING"


async def test_an_erasure_is_done_once_by_however_many_workers(postgres_house: Stage, clock: StoppedClock) -> None:
    (account_id,) = await many_canceled(postgres_house, 1, clock.now)
    await deletion.begin(postgres_house.installation, [account_id])

    async def forget(_: Any) -> None:
        await asyncio.sleep(0)

    done = await asyncio.gather(*(deletion.erase(postgres_house.installation, forget, account_id) for _ in range(6)))
    assert sum(done) == 1
    assert await steps(account_id) == ["deletion_started", "deleted"]
    assert await count("tombstone") == await count("outbox", "account_id = $1", account_id) == 1
    assert (await own_step(account_id))["attempts"] == 0


async def test_a_sync_and_an_erasure_at_the_same_time_bring_nobody_back(
    postgres_house: Stage, clock: StoppedClock
) -> None:
    ids = await many_canceled(postgres_house, 8, clock.now)
    other = AccountItem(reference="hooli", name="Hooli", plan_code="startup")
    await deletion.begin(postgres_house.installation, ids)

    async def forget(_: Any) -> None:
        """Nothing is kept."""

    for number, account_id in enumerate(ids):
        gone = AccountItem(reference=f"gone-{number}", name="Back", plan_code="essentials")
        (found, *rest), _ = await together(
            provisioning.sync(postgres_house.installation, [gone, other]),
            deletion.erase(postgres_house.installation, forget, account_id),
        )
        assert (found.outcome, len(rest)) == (Outcome.REFUSED, 1)
        await deletion.erase(postgres_house.installation, forget, account_id)
        assert (await account(account_id))["status"] == "DELETED"
        assert await count("account", "reference = $1", f"gone-{number}") == 0


async def test_a_sync_that_waited_for_an_erasure_is_refused(postgres_house: Stage, clock: StoppedClock) -> None:
    """The row that it waits for has another reference when it gets it."""
    (account_id,) = await many_canceled(postgres_house, 1, clock.now)
    await deletion.begin(postgres_house.installation, [account_id])
    items = [
        AccountItem(reference="gone-0", name="Back", plan_code="essentials"),
        AccountItem(reference="hooli", name="Hooli", plan_code="startup"),
    ]
    locked, go_on = asyncio.Event(), asyncio.Event()

    async def erased() -> None:
        async with held(account_id) as other:
            locked.set()
            await go_on.wait()
            await other.execute("DELETE FROM member WHERE account_id = $1", account_id)
            await other.execute(
                "UPDATE account SET status = 'DELETED', deleted_at = deletion_started_at, name = '', reference = $2 "
                "WHERE id = $1",
                account_id,
                deletion.tombstone_reference("gone-0"),
            )

    erasing = asyncio.create_task(erased())
    await locked.wait()
    syncing: asyncio.Task[list[ItemResult]] = asyncio.create_task(provisioning.sync(postgres_house.installation, items))
    await waiting()
    go_on.set()
    await erasing
    results = await syncing
    assert [one.outcome for one in results] == [Outcome.REFUSED, Outcome.CREATED]
    assert await count("account", "reference = 'gone-0'") == 0
