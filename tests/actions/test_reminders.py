"""What is due by the clock before anything is deleted: reminders, expiry and scheduled effect, each once, at its time,
also when no worker was there for months."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest

from app import assistance, db, deletion, policy, restart
from app.db import Database
from app.lifecycle import ActorKind, CancellationTiming, Channel, RequestStatus
from app.models import CancellationRequest
from tests.cast import ALICE, BILLING, CAROL, CSM, GINA, Stage, stage
from tests.ending import (
    DAY,
    HOUR,
    MOMENT,
    WINDOW,
    StoppedClock,
    account,
    count,
    log_in_memory,
    many,
    many_canceled,
    promised,
    steps,
)

RESPONSE, ESCALATION, CONFIRMATION = 24 * HOUR, 72 * HOUR, 72 * HOUR
"""Of the shipped policy."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StoppedClock:
    return StoppedClock(monkeypatch)


async def canceled(house: Stage) -> UUID:
    await house.cancel()
    await house.letters()
    return await house.account_key("acme")


async def reminded(account_id: UUID) -> list[int]:
    """Which reminders of the deletion were sent, in their order; each is in the history, and as many letters went to
    each person."""
    rows = await db.fetch("SELECT days FROM deletion_reminder WHERE account_id = $1 ORDER BY sent_at, id", account_id)
    assert (await steps(account_id)).count("deletion_reminder") == len(rows)
    sent = await promised(account_id, "deletion-reminder")
    assert set(sent.values()) <= {len(rows)}
    return [row["days"] for row in rows]


# -------------------------------------------------------------------------------------- reminders of the deletion


async def test_members_are_reminded_on_each_of_the_policys_days_once(house: Stage, clock: StoppedClock) -> None:
    account_id = await canceled(house)
    date = clock.now + WINDOW
    expected: list[int] = []
    for days in (30, 7, 2):
        clock.put(date - days * DAY - MOMENT)
        assert await house.timers().run() == 0
        clock.put(date - days * DAY)
        assert [await house.timers().run() for _ in range(3)] == [1, 0, 0]
        expected.append(days)
        assert await reminded(account_id) == expected
    assert await promised(account_id, "deletion-reminder") == {ALICE: 3, CAROL: 3}
    assert (await account(account_id))["reminder_due_at"] is None


@pytest.mark.parametrize(("left", "sent"), [(29 * DAY, [30, 7, 2]), (5 * DAY, [7, 2]), (2 * DAY, [2]), (MOMENT, [2])])
async def test_after_months_without_a_worker_only_the_nearest_reminder_is_sent(
    house: Stage, clock: StoppedClock, left: timedelta, sent: list[int]
) -> None:
    """What the earlier ones say is no longer so."""
    account_id = await canceled(house)
    date = clock.now + WINDOW
    clock.put(date - left)
    await house.timers().run()
    assert await reminded(account_id) == sent[:1]
    for days in sent[1:]:
        clock.put(date - days * DAY)
        await house.timers().run()
    assert await reminded(account_id) == sent


async def test_once_the_date_has_come_nobody_is_reminded_of_it(house: Stage, clock: StoppedClock) -> None:
    account_id = await canceled(house)
    clock.forward(WINDOW)
    await house.timers().run()
    assert await reminded(account_id) == []
    assert (await account(account_id))["status"] != "CANCELED"


async def test_a_stopped_deletion_is_not_reminded_of_once_its_date_has_come(house: Stage, clock: StoppedClock) -> None:
    """The breaker keeps the account canceled beyond its date."""
    ids = await many_canceled(house, 11, clock.now + DAY)
    await db.execute("UPDATE account SET reminder_due_at = canceled_at WHERE status = 'CANCELED'")
    clock.forward(DAY)
    await house.worker().drain()
    assert await count("deletion_reminder") == 0
    row = await account(ids[0])
    assert (row["status"], row["reminder_due_at"]) == ("CANCELED", None)


async def test_nobody_is_reminded_while_it_is_held_or_after_a_restart(house: Stage, clock: StoppedClock) -> None:
    held, restarted = await canceled(house), await house.account_key("initech")
    await house.cancel("ingrid@initech.example", "initech", "Initech")
    await deletion.hold(await house.call(BILLING), held, note="A lawyer asked.")
    await restart.restart(await house.call(BILLING), restarted)
    clock.forward(59 * DAY)
    await house.timers().run()
    assert await count("deletion_reminder") == 0


async def test_a_new_date_has_reminders_of_its_own(house: Stage, clock: StoppedClock) -> None:
    account_id = await canceled(house)
    clock.forward(WINDOW - DAY)
    await house.letters()
    assert await reminded(account_id) == [2]
    call = await house.call(BILLING)
    await deletion.hold(call, account_id, note="A lawyer asked.")
    clock.forward(4 * DAY)
    await deletion.release(call, account_id, note="Settled.")
    before = {letter["Message-ID"] for letter in await house.letters()}
    clock.forward(5 * DAY)
    new = [letter for letter in await house.letters() if letter["Message-ID"] not in before]
    assert await reminded(account_id) == [2, 2]
    assert {letter["To"].addresses[0].addr_spec for letter in new} == {ALICE, CAROL}
    assert all("/links/restart" not in letter.as_string() for letter in new), "the time to restart is over"


async def test_a_reminder_says_how_to_come_back_and_goes_to_who_has_the_permission_now(
    house: Stage, clock: StoppedClock
) -> None:
    account_id = await canceled(house)
    await db.execute("UPDATE member SET permissions = '' WHERE email = $1", CAROL)
    before = {letter["Message-ID"] for letter in await house.letters()}
    clock.forward(30 * DAY)
    (letter,) = [letter for letter in await house.letters() if letter["Message-ID"] not in before]
    assert letter["To"].addresses[0].addr_spec == ALICE
    body = letter.get_body(("plain",))
    assert body is not None
    assert "/links/restart?token=" in body.get_content()
    assert "30 days" in body.get_content()
    assert await reminded(account_id) == [30]


@pytest.mark.postgres
async def test_many_workers_send_one_reminder(postgres_house: Stage, clock: StoppedClock) -> None:
    account_id = await canceled(postgres_house)
    clock.forward(30 * DAY)
    moved = await asyncio.gather(*(deletion.remind(postgres_house.installation, account_id) for _ in range(6)))
    assert sum(moved) == 1
    assert await reminded(account_id) == [30]


# ----------------------------------------------------------------------------- the Customer Success Manager's answer


async def asked(house: Stage) -> UUID:
    await house.request_cancellation(GINA, "globex")
    return await house.account_key("globex")


async def nudged(account_id: UUID) -> dict[str, dict[str, int]]:
    """Who was reminded, and whom it was escalated to."""
    templates = ("assistance-reminder", "assistance-escalated")
    return {template: dict(await promised(account_id, template)) for template in templates}


NOBODY: dict[str, dict[str, int]] = {"assistance-reminder": {}, "assistance-escalated": {}}
THE_MANAGER = {"assistance-reminder": {CSM: 1}, "assistance-escalated": {}}
BOTH = {"assistance-reminder": {CSM: 1}, "assistance-escalated": {BILLING: 1}}


async def test_a_manager_who_does_not_answer_is_reminded_once_and_then_the_billing_team_is_told_once(
    house: Stage, clock: StoppedClock
) -> None:
    account_id = await asked(house)
    asked_at = clock.now
    for moment, expected in (
        (RESPONSE - MOMENT, NOBODY),
        (RESPONSE, THE_MANAGER),
        (RESPONSE + HOUR, THE_MANAGER),
        (ESCALATION - MOMENT, THE_MANAGER),
        (ESCALATION, BOTH),
        (ESCALATION + 90 * DAY, BOTH),
    ):
        clock.put(asked_at + moment)
        await house.letters()
        assert await nudged(account_id) == expected
    assert (await account(account_id))["status"] == "ACTIVE"


async def test_a_worker_that_was_away_for_months_tells_each_once(house: Stage, clock: StoppedClock) -> None:
    account_id = await asked(house)
    clock.forward(90 * DAY)
    await house.letters()
    assert await nudged(account_id) == BOTH


@pytest.mark.parametrize("answer", ["opened", "withdrawn"])
async def test_whoever_has_an_answer_is_not_reminded(house: Stage, clock: StoppedClock, answer: str) -> None:
    account_id = await asked(house)
    clock.forward(RESPONSE - MOMENT)
    if answer == "opened":
        await house.request_cancellation(CSM, "globex", note="They are sure.")
    else:
        await house.do(GINA, "withdrawCancellation", accountId=await house.account_id("globex"))
    clock.forward(90 * DAY)
    await house.letters()
    assert await nudged(account_id) == NOBODY


async def test_an_answer_after_the_reminder_spares_the_billing_team(house: Stage, clock: StoppedClock) -> None:
    account_id = await asked(house)
    clock.forward(RESPONSE)
    await house.letters()
    await house.request_cancellation(CSM, "globex", note="They are sure.")
    clock.forward(90 * DAY)
    await house.letters()
    assert await nudged(account_id) == THE_MANAGER


async def test_a_request_that_is_handed_over_again_waits_anew(house: Stage, clock: StoppedClock) -> None:
    account_id = await asked(house)
    clock.forward(RESPONSE)
    await house.letters()
    assert await nudged(account_id) == THE_MANAGER
    for plan in ("essentials", "premium"):  # confirmed alone, and then not any more
        await db.execute("UPDATE account SET plan_code = $2 WHERE id = $1", account_id, plan)
        await house.request_cancellation(GINA, "globex")
    handed_over = clock.now
    clock.put(handed_over + RESPONSE - MOMENT)
    await house.letters()
    assert await nudged(account_id) == THE_MANAGER
    clock.put(handed_over + RESPONSE)
    await house.letters()
    assert (await nudged(account_id))["assistance-reminder"] == {CSM: 2}
    clock.put(handed_over + ESCALATION - MOMENT)
    await house.letters()
    assert (await nudged(account_id))["assistance-escalated"] == {}
    clock.put(handed_over + ESCALATION)
    await house.letters()
    assert (await nudged(account_id))["assistance-escalated"] == {BILLING: 1}


async def test_of_a_manager_who_left_the_team_is_reminded(house: Stage, clock: StoppedClock) -> None:
    account_id = await asked(house)
    await db.execute("UPDATE staff SET deactivated_at = created_at WHERE email = $1", CSM)
    clock.forward(RESPONSE)
    await house.letters()
    assert (await nudged(account_id))["assistance-reminder"] == {"success@vendor.example": 1}


async def test_what_is_said_to_be_due_is_looked_at_again(house: Stage, clock: StoppedClock) -> None:
    """By a worker that read too early, or once more: what holds under the lock counts."""
    shared, account_id = house.installation, await asked(house)
    asked_at = clock.now
    clock.put(asked_at + RESPONSE - MOMENT)
    assert await assistance.remind(shared, account_id) is False
    clock.put(asked_at + ESCALATION)
    assert await assistance.escalate(shared, account_id) is False, "the manager comes first"
    assert await nudged(account_id) == NOBODY
    clock.put(asked_at + ESCALATION - MOMENT)
    assert [await assistance.remind(shared, account_id) for _ in range(2)] == [True, False]
    assert await assistance.escalate(shared, account_id) is False
    assert await nudged(account_id) == THE_MANAGER
    clock.put(asked_at + ESCALATION)
    assert [await assistance.escalate(shared, account_id) for _ in range(2)] == [True, False]
    assert await nudged(account_id) == BOTH
    deleted_later = await canceled(house)
    clock.forward(30 * DAY - MOMENT)
    assert await deletion.remind(shared, deleted_later) is False
    clock.forward(MOMENT)
    assert [await deletion.remind(shared, deleted_later) for _ in range(2)] == [True, False]
    assert await reminded(deleted_later) == [30]


# ----------------------------------------------------------------------------------------- expiry, scheduled effect


async def test_a_request_expires_at_its_time(house: Stage, clock: StoppedClock) -> None:
    await house.request_cancellation()
    account_id = await house.account_key("acme")
    clock.forward(CONFIRMATION - MOMENT)
    assert await house.timers().run() == 0
    clock.forward(MOMENT)
    assert [await house.timers().run() for _ in range(2)] == [1, 0]
    assert await count("cancellation_request", "status = 'EXPIRED'") == 1
    assert (await steps(account_id))[-1] == "cancellation_expired"


@pytest.mark.parametrize("late", [timedelta(), 100 * DAY])
async def test_a_scheduled_cancellation_takes_effect_and_its_window_begins_when_it_does(
    database: Database, tmp_path: Path, clock: StoppedClock, late: timedelta
) -> None:
    """Also when no worker was there: nobody's window is shorter for it."""
    plans = dict(policy.load().plans)
    plans["essentials"] = replace(plans["essentials"], effective=CancellationTiming.PERIOD_END)
    async with stage(database, tmp_path, plans=plans) as house:
        period_end = clock.now + 10 * DAY
        await db.execute("UPDATE account SET current_period_end = $1 WHERE reference = 'acme'", period_end)
        account_id = await canceled(house)
        clock.put(period_end - MOMENT)
        assert await house.timers().run() == 0
        assert (await account(account_id))["status"] == "CANCELLATION_SCHEDULED"
        clock.put(period_end + late)
        await house.letters()
        row = await account(account_id)
        assert (row["status"], row["canceled_at"]) == ("CANCELED", clock.now)
        assert row["deletion_scheduled_for"] == row["restartable_until"] == clock.now + WINDOW
        assert row["reminder_due_at"] == clock.now + WINDOW - 30 * DAY


# -------------------------------------------------------------------------------------- what cannot be moved, waits


async def rounds(house: Stage) -> None:
    """As many as a worker makes within a minute."""
    timers = house.timers()
    with log_in_memory() as log:
        for _ in range(6):
            await timers.run()
    assert "timer.failed" in log.getvalue()


async def test_a_hundred_rows_that_fail_hold_up_no_reminder_of_a_deletion(house: Stage, clock: StoppedClock) -> None:
    await many_canceled(house, 130, clock.now + 20 * DAY)
    await db.execute("UPDATE account SET plan_code = 'gone', reminder_due_at = canceled_at WHERE status = 'CANCELED'")
    (sound,) = await many_canceled(house, 1, clock.now + 21 * DAY, "sound")
    await db.execute("UPDATE account SET reminder_due_at = $2 WHERE id = $1", sound, clock.now)
    await rounds(house)
    assert await reminded(sound) == [30]
    assert await count("deletion_reminder") == 1


async def test_a_hundred_requests_that_fail_hold_up_no_other(house: Stage, clock: StoppedClock) -> None:
    ids = await many(house, 131)
    await CancellationRequest.bulk_create(
        [
            CancellationRequest(
                id=db.uuid7(),
                account_id=account_id,
                status=RequestStatus.PENDING_ASSISTANCE,
                channel=Channel.ASSISTED,
                plan_code="premium",
                requested_at=clock.now,
                requested_by_kind=ActorKind.MEMBER,
                requested_by_id=db.uuid7(),
                assistance_requested_at=clock.now + timedelta(seconds=number),
            )
            for number, account_id in enumerate(ids)
        ]
    )
    sound = ids[-1]
    await db.execute("UPDATE account SET plan_code = 'gone' WHERE reference LIKE 'many-%' AND id <> $1", sound)
    clock.forward(ESCALATION + HOUR)
    await rounds(house)
    assert await nudged(sound) == {
        "assistance-reminder": {"success@vendor.example": 1},
        "assistance-escalated": {BILLING: 1},
    }
    assert await count("outbox") == 2
