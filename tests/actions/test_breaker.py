"""The breaker: too many deletions within a day stop all of them, until two persons or an operator have looked."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from app import breaker, db, deletion, errors, restart
from app.breaker import NEW_FOR, State
from app.db import Database
from tests.cast import ALICE, BILLING, CSM, FINANCE, SUPPORT, Stage, stage
from tests.ending import DAY, HOUR, MOMENT, StoppedClock, count, many, many_canceled

ALLOWED = 10
"""Of the shipped policy: with as few accounts as here, the share does not matter."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StoppedClock:
    return StoppedClock(monkeypatch)


async def approve(house: Stage, who: str, number: int, note: str = "Looked at each.", **more: Any) -> State:
    return (await breaker.approve(await house.call(who), count=number, note=note, **more)).state


async def approved(house: Stage, number: int) -> None:
    assert await approve(house, BILLING, number) is State.AWAITING_SECOND_APPROVAL
    assert await approve(house, FINANCE, number) is State.APPROVED


async def state(house: Stage) -> State:
    return (await breaker.read(house.installation.policy)).state


async def begun() -> int:
    return await count("account", "deletion_started_at IS NOT NULL")


async def told(house: Stage) -> list[str]:
    """Whom Sunset has told that the deletions have stopped."""
    rows = await db.fetch("SELECT recipient_address FROM outbox WHERE template = 'deletions-halted'")
    return [row["recipient_address"] for row in rows]


async def test_as_many_as_the_policy_allows_need_nobody(house: Stage, clock: StoppedClock) -> None:
    await many_canceled(house, ALLOWED, clock.now)
    await house.timers().run()
    assert await begun() == ALLOWED
    assert await count("deletion_breaker") == 0


async def test_one_more_stops_them_all(house: Stage, clock: StoppedClock) -> None:
    ids = await many_canceled(house, ALLOWED + 1, clock.now)
    for _ in range(3):
        assert await house.timers().run() == 0
        assert await deletion.begin(house.installation, ids[:1]) == []
    assert await begun() == 0
    view = await breaker.read(house.installation.policy)
    assert (view.state, view.due, view.allowed, view.left) == (State.HALTED, ALLOWED + 1, ALLOWED, 0)
    assert view.halted_at == clock.now
    assert await told(house) == ["operators@vendor.example"]
    assert await count("deletion_breaker") == 1


async def test_a_few_thousand_rows_that_somebody_has_aged_lose_nothing(house: Stage, clock: StoppedClock) -> None:
    """The wrong statement on a Friday: all canceled accounts are due."""
    await many_canceled(house, 2_000, clock.now + 30 * DAY)
    await db.execute(
        "UPDATE account SET canceled_at = $1, restartable_until = $2, deletion_scheduled_for = $2 "
        "WHERE status = 'CANCELED'",
        clock.now - 900 * DAY,
        clock.now - 800 * DAY,
    )
    await house.worker().drain()
    assert await begun() == 0
    assert await told(house) == ["operators@vendor.example"]


@asynccontextmanager
async def half_may_go(database: Database, directory: Path) -> AsyncIterator[Stage]:
    async with stage(database, directory, breaker_at_least=1, breaker_percent=50.0) as house:
        yield house


@pytest.mark.parametrize(("number", "goes"), [(4, 4), (5, 0)])
async def test_a_share_of_all_accounts_may_go(
    database: Database, tmp_path: Path, clock: StoppedClock, number: int, goes: int
) -> None:
    """Half of eight; of nine, half is rounded down."""
    async with half_may_go(database, tmp_path) as house:
        clock.forward(NEW_FOR)
        await many_canceled(house, number, clock.now)
        await house.timers().run()
        assert await begun() == goes


async def test_deleted_accounts_are_no_part_of_all_accounts(
    database: Database, tmp_path: Path, clock: StoppedClock
) -> None:
    async with half_may_go(database, tmp_path) as house:
        clock.forward(NEW_FOR)
        await many_canceled(house, 4, clock.now)
        await house.worker().drain()
        assert await count("account", "status = 'DELETED'") == 4
        clock.forward(2 * DAY)
        await many_canceled(house, 5, clock.now, "later")  # of nine that are left
        await house.timers().run()
        assert await begun() == 4


async def test_accounts_that_the_host_has_just_invented_raise_nothing(house: Stage, clock: StoppedClock) -> None:
    """Whoever has the secret of provisioning makes two thousand, of which one in a hundred would be twenty."""
    clock.forward(NEW_FOR)
    await many_canceled(house, ALLOWED + 1, clock.now)
    await many(house, 2_000, "invented")
    for _ in range(2):
        await house.timers().run()
        assert (await begun(), await state(house)) == (0, State.HALTED)
        assert (await breaker.read(house.installation.policy, exact=True)).allowed == ALLOWED
        clock.forward(NEW_FOR - MOMENT)
    clock.forward(MOMENT)
    assert (await breaker.read(house.installation.policy, exact=True)).allowed == 20


async def test_accounts_count_from_their_thirtieth_day_on(
    database: Database, tmp_path: Path, clock: StoppedClock
) -> None:
    """In its first days the number alone allows, however many an installation has begun with."""
    async with half_may_go(database, tmp_path) as house:
        await many(house, 4)
        for moved, allowed in ((NEW_FOR - MOMENT, 1), (MOMENT, 4)):
            clock.forward(moved)
            view = await breaker.read(house.installation.policy, exact=True)
            assert view.allowed == allowed


@pytest.mark.postgres
async def test_the_accounts_that_count_are_found_by_an_index(
    postgres_house: Stage, clock: StoppedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest first, and no more than it takes: not all that were made since, however many these are."""
    await many(postgres_house, 2_000, "invented")
    await many_canceled(postgres_house, ALLOWED + 1, clock.now)
    await db.execute("ANALYZE account")
    plans: list[str] = []
    fetch_one = db.fetch_one

    async def explained(sql: str, *args: Any) -> Any:
        if "created_at" in sql:
            plans.extend(str(row["QUERY PLAN"]) for row in await db.fetch(f"EXPLAIN {sql}", *args))
        return await fetch_one(sql, *args)

    monkeypatch.setattr(db, "fetch_one", explained)
    await breaker.read(postgres_house.installation.policy)
    assert any("account_created" in line for line in plans)
    assert not any("Seq Scan" in line for line in plans)


async def test_a_wave_is_seen_before_its_first_deletion(house: Stage, clock: StoppedClock) -> None:
    await many_canceled(house, 1, clock.now)
    await many_canceled(house, ALLOWED, clock.now + DAY, "wave")
    await house.timers().run()
    assert (await begun(), await state(house)) == (0, State.HALTED)


async def test_what_comes_later_than_in_a_day_is_no_part_of_a_wave(house: Stage, clock: StoppedClock) -> None:
    await many_canceled(house, 1, clock.now)
    await many_canceled(house, ALLOWED, clock.now + DAY + MOMENT, "wave")
    await house.timers().run()
    assert (await begun(), await state(house)) == (1, State.CLEAR)


@pytest.mark.parametrize(("later", "goes"), [(DAY - MOMENT, 0), (DAY, 1)])
async def test_no_more_begin_within_any_day_than_the_policy_allows(
    house: Stage, clock: StoppedClock, later: timedelta, goes: int
) -> None:
    """However small each portion is."""
    await many_canceled(house, ALLOWED, clock.now)
    await house.timers().run()
    await many_canceled(house, 1, clock.now + later, "later")
    clock.forward(later)
    await house.timers().run()
    assert await begun() == ALLOWED + goes
    assert await state(house) is (State.CLEAR if goes else State.HALTED)


async def test_held_and_restarted_accounts_are_not_counted(house: Stage, clock: StoppedClock) -> None:
    end = clock.now + HOUR
    held, restarted, *_ = await many_canceled(house, ALLOWED + 2, end)
    await deletion.hold(await house.call(BILLING), held, note="A lawyer asked.")
    await restart.restart(await house.call(BILLING), restarted)
    clock.put(end)
    await house.timers().run()
    assert await begun() == ALLOWED


async def test_what_has_stopped_stays_so_though_fewer_are_due(house: Stage, clock: StoppedClock) -> None:
    """Whoever stops a wave by hand has still to say that the rest may go."""
    ids = await many_canceled(house, ALLOWED + 5, clock.now)
    await house.timers().run()
    for account_id in ids[:10]:
        await deletion.hold(await house.call(BILLING), account_id, note="Not these.")
    clock.forward(30 * DAY)
    await house.timers().run()
    assert (await begun(), await state(house)) == (0, State.HALTED)
    await approved(house, 5)
    await house.timers().run()
    assert await begun() == 5


async def test_two_persons_of_the_billing_team_approve_what_they_saw(house: Stage, clock: StoppedClock) -> None:
    number = ALLOWED + 2
    await many_canceled(house, number, clock.now)
    with pytest.raises(errors.DeletionsNotHalted):
        await approve(house, BILLING, number)
    await house.timers().run()
    for who in (SUPPORT, CSM):
        with pytest.raises(errors.PermissionDenied, match="billing team"):
            await approve(house, who, number)
    with pytest.raises(errors.Forbidden):
        await approve(house, ALICE, number)
    for wrong in (number - 1, number + 1, 0, -1):
        with pytest.raises(errors.InvalidInput, match="12 deletions"):
            await approve(house, BILLING, wrong)
    for note in ("", " ", "x" * 2_001):
        with pytest.raises(errors.InvalidInput, match="note"):
            await approve(house, BILLING, number, note)
    assert await state(house) is State.HALTED

    assert await approve(house, BILLING, number) is State.AWAITING_SECOND_APPROVAL
    await house.timers().run()
    assert await begun() == 0, "one is not enough"
    with pytest.raises(errors.PermissionDenied, match="another person"):
        await approve(house, BILLING, number)
    with pytest.raises(errors.InvalidInput):
        await approve(house, FINANCE, number + 1)
    assert await approve(house, FINANCE, number) is State.APPROVED
    await house.timers().run()
    assert await begun() == number
    (row,) = await db.fetch("SELECT * FROM deletion_breaker")
    staff = await db.fetch("SELECT id FROM staff WHERE email IN ($1, $2) ORDER BY email", BILLING, FINANCE)
    assert [row["first_approved_by_id"], row["approved_by_id"]] == [one["id"] for one in staff]
    assert row["approved_count"] == number


async def test_two_persons_have_seen_the_same_number(house: Stage, clock: StoppedClock) -> None:
    """More fell due after the first looked: what the second sees, nobody else has."""
    await many_canceled(house, 11, clock.now)
    await house.timers().run()
    assert await approve(house, BILLING, 11) is State.AWAITING_SECOND_APPROVAL
    await many_canceled(house, 500, clock.now, "more")
    assert await approve(house, FINANCE, 511) is State.AWAITING_SECOND_APPROVAL
    await house.timers().run()
    assert await begun() == 0
    with pytest.raises(errors.PermissionDenied, match="another person"):
        await approve(house, FINANCE, 511)
    assert await approve(house, BILLING, 511) is State.APPROVED


async def test_a_first_approval_is_good_for_a_day(house: Stage, clock: StoppedClock) -> None:
    await many_canceled(house, 11, clock.now)
    await house.timers().run()
    await approve(house, BILLING, 11)
    clock.forward(DAY)
    assert await approve(house, FINANCE, 11) is State.AWAITING_SECOND_APPROVAL
    clock.forward(DAY - MOMENT)
    assert await approve(house, BILLING, 11) is State.APPROVED


async def test_what_was_approved_is_not_held_against_what_comes_after(house: Stage, clock: StoppedClock) -> None:
    """A wave that people have looked at ends with its approval; one more account a moment later is no new wave."""
    await many_canceled(house, 12, clock.now)
    await house.timers().run()
    await approved(house, 12)
    clock.forward(DAY - MOMENT)
    await house.timers().run()
    assert await begun() == 12
    clock.forward(MOMENT)
    await many_canceled(house, 1, clock.now, "more")
    await house.timers().run()
    assert (await begun(), await state(house)) == (13, State.CLEAR)


async def test_an_approval_lets_nothing_begin_that_nobody_approved(house: Stage, clock: StoppedClock) -> None:
    """One approval while another one lasts: when the first ends, the second has not become larger."""
    await many_canceled(house, 29, clock.now)
    await house.timers().run()
    await approved(house, 29)
    await house.timers().run()
    clock.forward(12 * HOUR)
    await many_canceled(house, 31, clock.now, "second")
    await house.timers().run()
    assert await state(house) is State.HALTED
    await approved(house, 31)
    await house.timers().run()
    assert await begun() == 60
    clock.forward(12 * HOUR + MOMENT)
    await many_canceled(house, 60, clock.now, "third")
    await house.timers().run()
    assert (await begun(), await state(house)) == (60, State.HALTED)


async def test_an_approval_that_is_repeated_with_its_key_is_one_persons(house: Stage, clock: StoppedClock) -> None:
    await many_canceled(house, ALLOWED + 1, clock.now)
    await house.timers().run()
    for _ in range(2):
        assert await approve(house, BILLING, 11, idempotency_key="k") is State.AWAITING_SECOND_APPROVAL
    assert await approve(house, FINANCE, 11, idempotency_key="k") is State.APPROVED
    assert await approve(house, BILLING, 11, idempotency_key="k") is State.APPROVED
    with pytest.raises(errors.IdempotencyConflict):
        await approve(house, BILLING, 12, idempotency_key="k")


async def test_an_operator_needs_nobody_else(house: Stage, clock: StoppedClock) -> None:
    await many_canceled(house, ALLOWED + 1, clock.now)
    with pytest.raises(errors.DeletionsNotHalted):
        await breaker.approve_as_operator(house.installation, count=11, note="Looked.")
    await house.timers().run()
    with pytest.raises(errors.InvalidInput):
        await breaker.approve_as_operator(house.installation, count=10, note="Looked.")
    with pytest.raises(errors.InvalidInput):
        await breaker.approve_as_operator(house.installation, count=11, note=" ")
    view = await breaker.approve_as_operator(house.installation, count=11, note="Looked.")
    assert (view.state, view.left) == (State.APPROVED, 11)
    await house.timers().run()
    assert await begun() == 11


async def test_an_approval_is_for_that_many(house: Stage, clock: StoppedClock) -> None:
    await many_canceled(house, 12, clock.now)
    await house.timers().run()
    await approved(house, 12)
    await house.timers().run()
    assert await begun() == 12
    clock.forward(DAY - MOMENT)
    await many_canceled(house, 1, clock.now, "more")
    await house.timers().run()
    assert (await begun(), await state(house)) == (12, State.HALTED)
    assert len(await told(house)) == 2


async def test_an_approval_lasts_a_day(house: Stage, clock: StoppedClock) -> None:
    await many_canceled(house, 12, clock.now + DAY)
    await many_canceled(house, 1, clock.now, "first")
    await house.timers().run()
    await approved(house, 13)
    approved_at = clock.now
    await house.timers().run()
    assert await begun() == 1
    view = await breaker.read(house.installation.policy)
    assert (view.approved_until, view.left) == (approved_at + DAY, 12)
    clock.forward(DAY)
    await house.timers().run()
    assert (await begun(), await state(house)) == (1, State.HALTED), "twelve are more than ten, approved or not"


async def test_more_than_a_page_goes_when_it_is_approved(house: Stage, clock: StoppedClock) -> None:
    await many_canceled(house, 120, clock.now)
    await house.worker().drain()
    await approved(house, 120)
    await house.worker().drain()
    assert await count("account", "status = 'DELETED'") == 120
    assert len(await told(house)) == 1


@pytest.mark.postgres
async def test_workers_that_see_a_wave_together_stop_it_once(postgres_house: Stage, clock: StoppedClock) -> None:
    ids = await many_canceled(postgres_house, 40, clock.now)
    await asyncio.gather(*(deletion.begin(postgres_house.installation, ids[index::4]) for index in range(4)))
    assert (await begun(), await count("deletion_breaker")) == (0, 1)
    assert len(await told(postgres_house)) == 1


@pytest.mark.postgres
async def test_workers_and_approvals_at_the_same_time_begin_what_was_approved(
    postgres_house: Stage, clock: StoppedClock
) -> None:
    """Each deletion once, and never more than were approved, wherever in the workers' rounds the approval lands."""
    house, number = postgres_house, 60
    ids = await many_canceled(house, number, clock.now)
    await house.timers().run()
    await approve(house, BILLING, number)
    rounds = [deletion.begin(house.installation, ids[index % 3 :: 3]) for index in range(6)]
    second, third, *moved = await asyncio.gather(
        approve(house, FINANCE, number), approve(house, FINANCE, number), *rounds, return_exceptions=True
    )
    (refused,) = [one for one in (second, third) if isinstance(one, BaseException)]
    assert isinstance(refused, errors.DeletionsNotHalted)
    together: list[UUID] = []
    for one in moved:
        assert isinstance(one, list)
        together += one
    assert len(together) == len(set(together))
    together += await deletion.begin(house.installation, ids)
    assert sorted(together) == sorted(ids)
    assert await begun() == await count("deletion_step") == number
    assert await count("transition", "type = 'account.deletion_started'") == number
    assert await count("deletion_breaker") == 1
