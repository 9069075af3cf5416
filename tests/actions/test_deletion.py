"""The deletion of one account: when it may begin, what stops it, and how it goes on whatever breaks it off."""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from app import cancellation, db, deletion, errors, outbox, people, policy, provisioning, restart
from app.db import Database
from app.delivery.email import DeliveryError, FolderMailer
from app.lifecycle import ActorKind, CancellationTiming, FeedbackReason
from app.models import DeletionStep
from app.provisioning import AccountItem, Outcome
from app.worker import Worker
from tests.cast import ALICE, BILLING, CAROL, FINANCE, Stage, stage
from tests.ending import (
    DAY,
    HOUR,
    MOMENT,
    NOTICE,
    WINDOW,
    StoppedClock,
    account,
    count,
    own_step,
    promised,
    steps,
)

ACME = AccountItem(reference="acme", name="Acme", plan_code="essentials")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StoppedClock:
    return StoppedClock(monkeypatch)


async def canceled(house: Stage) -> UUID:
    """Acme, canceled by Alice, its letters delivered."""
    await house.cancel()
    await house.letters()
    return await house.account_key("acme")


async def begun(house: Stage, clock: StoppedClock) -> UUID:
    """Acme at the point of no return, and nothing erased yet."""
    account_id = await canceled(house)
    clock.forward(WINDOW)
    assert await deletion.begin(house.installation, [account_id]) == [account_id]
    return account_id


async def hold(house: Stage, account_id: UUID, note: str = "A lawyer asked.", **more: Any) -> None:
    await deletion.hold(await house.call(BILLING), account_id, note=note, **more)


async def release(house: Stage, account_id: UUID, note: str = "Settled.", **more: Any) -> None:
    await deletion.release(await house.call(BILLING), account_id, note=note, **more)


# ---------------------------------------------------------------------------------------------------------- begin


async def test_a_deletion_begins_at_its_time_and_not_a_moment_before(house: Stage, clock: StoppedClock) -> None:
    account_id = await canceled(house)
    end = clock.now + WINDOW
    clock.put(end - MOMENT)
    assert await deletion.begin(house.installation, [account_id]) == []
    await house.timers().run()
    assert (await account(account_id))["status"] == "CANCELED"
    clock.put(end)
    assert await deletion.begin(house.installation, [account_id]) == [account_id]
    row = await account(account_id)
    assert (row["status"], row["deletion_started_at"], row["reminder_due_at"]) == ("DELETING", end, None)
    assert (await steps(account_id))[-1] == "deletion_started"
    assert (await own_step(account_id))["epoch"] == row["epoch"] == 1
    assert await deletion.begin(house.installation, [account_id]) == [], "it has begun"


async def test_only_an_account_that_is_canceled_and_not_held_is_deleted(house: Stage, clock: StoppedClock) -> None:
    """Whoever says that it is due: what it is now is looked at again."""
    held, restarted, active = (
        await canceled(house),
        await house.account_key("initech"),
        await house.account_key("globex"),
    )
    await house.cancel("ingrid@initech.example", "initech", "Initech")
    await hold(house, held)
    await restart.restart(await house.call(BILLING), restarted)
    clock.forward(400 * DAY)
    assert await deletion.begin(house.installation, [held, restarted, active, db.uuid7()]) == []
    assert await house.timers().run() == 0
    assert [(await account(one))["status"] for one in (held, restarted, active)] == ["CANCELED", "ACTIVE", "ACTIVE"]
    assert await count("deletion_step") == 0


async def test_a_scheduled_cancellation_is_no_deletion(database: Database, tmp_path: Path, clock: StoppedClock) -> None:
    plans = dict(policy.load().plans)
    plans["essentials"] = replace(plans["essentials"], effective=CancellationTiming.PERIOD_END)
    async with stage(database, tmp_path, plans=plans) as house:
        await house.cancel()
        account_id = await house.account_key("acme")
        clock.forward(20 * DAY)
        assert await deletion.begin(house.installation, [account_id]) == []
        assert (await account(account_id))["status"] == "CANCELLATION_SCHEDULED"


async def test_the_window_is_counted_in_hours(database: Database, tmp_path: Path, clock: StoppedClock) -> None:
    plans = dict(policy.load().plans)
    plans["essentials"] = replace(plans["essentials"], retention=timedelta(hours=37))
    async with stage(database, tmp_path, plans=plans, reminder_days=(1,)) as house:
        account_id = await canceled(house)
        clock.forward(timedelta(hours=37) - MOMENT)
        assert await deletion.begin(house.installation, [account_id]) == []
        clock.forward(MOMENT)
        assert await deletion.begin(house.installation, [account_id]) == [account_id]


@pytest.mark.parametrize(
    ("canceled_at", "end"),
    [
        (datetime(2028, 1, 15, 12, tzinfo=UTC), datetime(2028, 3, 15, 12, tzinfo=UTC)),  # across a leap day
        (datetime(2027, 12, 31, 23, 59, tzinfo=UTC), datetime(2028, 2, 29, 23, 59, tzinfo=UTC)),  # onto one
        (datetime(2028, 2, 29, 0, 0, tzinfo=UTC), datetime(2028, 4, 29, 0, 0, tzinfo=UTC)),  # from one
    ],
)
async def test_a_leap_day_is_a_day(house: Stage, clock: StoppedClock, canceled_at: datetime, end: datetime) -> None:
    clock.put(canceled_at)
    account_id = await canceled(house)
    assert (await account(account_id))["deletion_scheduled_for"] == end
    clock.put(end - MOMENT)
    assert await deletion.begin(house.installation, [account_id]) == []
    clock.put(end)
    assert await deletion.begin(house.installation, [account_id]) == [account_id]


@pytest.fixture
def in_new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process's own zone: summer time from 12 March to 5 November 2028."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@asynccontextmanager
async def in_zone(database: Database, zone: str) -> AsyncIterator[Database]:
    """The same database, which gives its sessions a zone of its own; SQLite has none."""
    if database.dialect == "postgresql":
        found = await db.fetch_one("SELECT current_database() AS name")
        assert found is not None
        await db.execute(f"ALTER DATABASE \"{found['name']}\" SET timezone TO '{zone}'")
        session = await asyncpg.connect(database.url)
        assert await session.fetchval("SHOW timezone") == zone
        await session.close()
    zoned = await Database.open(database.url, development_clock=True)
    try:
        with zoned.bind():
            yield zoned
    finally:
        await zoned.close()


@pytest.mark.parametrize("month", [3, 10])
async def test_summer_time_neither_shortens_nor_prolongs_the_window(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_new_york: None, month: int
) -> None:
    """The clocks go forward in the one window, and back in the other. The zones are the process's and the server's."""
    assert time.localtime(1_845_000_000).tm_gmtoff != time.localtime(1_860_000_000).tm_gmtoff
    async with in_zone(database, "America/New_York") as zoned, stage(zoned, tmp_path) as house:
        clock = StoppedClock(monkeypatch, datetime(2028, month, 1, 6, 30, tzinfo=UTC))
        account_id = await canceled(house)
        clock.forward(WINDOW - MOMENT)
        assert await deletion.begin(house.installation, [account_id]) == []
        clock.forward(MOMENT)
        assert await deletion.begin(house.installation, [account_id]) == [account_id]


async def test_one_that_cannot_begin_holds_up_no_other(house: Stage, clock: StoppedClock) -> None:
    """Its history was tampered with: what comes next stands there already."""
    broken, sound = await canceled(house), await house.account_key("initech")
    await house.cancel("ingrid@initech.example", "initech", "Initech")
    await house.letters()
    await db.execute(
        "INSERT INTO transition (id, account_id, sequence, epoch, type, actor_kind, account_status, occurred_at) "
        "SELECT $1, id, last_sequence + 1, epoch, 'account.canceled', 'SYSTEM', status, canceled_at FROM account "
        "WHERE id = $2",
        db.uuid7(),
        broken,
    )
    clock.forward(WINDOW)
    await house.timers().run()
    assert (await account(broken))["status"] == "CANCELED"
    assert (await account(sound))["status"] == "DELETED"


# ------------------------------------------------------------------------------------------------ hold and release


async def test_a_hold_takes_the_date_away_and_leaves_the_window_as_it_was(house: Stage, clock: StoppedClock) -> None:
    account_id = await canceled(house)
    end = clock.now + WINDOW
    clock.forward(DAY)
    await hold(house, account_id, "A lawyer asked.  ")
    row = await account(account_id)
    assert (row["deletion_held_at"], row["deletion_scheduled_for"], row["reminder_due_at"]) == (clock.now, None, None)
    assert row["restartable_until"] == end
    (kept,) = await db.fetch("SELECT note, released_at FROM deletion_hold WHERE account_id = $1", account_id)
    assert kept == {"note": "A lawyer asked.", "released_at": None}
    clock.put(end)
    with pytest.raises(errors.RestartWindowClosed):
        await restart.restart(await house.call(BILLING), account_id)
    assert (await steps(account_id))[-1] == "deletion_held"


async def test_a_hold_beats_a_deletion_that_is_overdue_and_not_begun(house: Stage, clock: StoppedClock) -> None:
    account_id = await canceled(house)
    clock.forward(WINDOW + 3 * DAY)
    await hold(house, account_id)
    assert await house.timers().run() == 0
    assert (await account(account_id))["status"] == "CANCELED"


async def test_nothing_holds_a_deletion_that_has_begun(house: Stage, clock: StoppedClock) -> None:
    account_id = await begun(house, clock)
    for action in (hold, release):
        with pytest.raises(errors.AccountStateRefused, match="being deleted"):
            await action(house, account_id)
    await house.letters()
    with pytest.raises(errors.AccountStateRefused, match="has been deleted"):
        await hold(house, account_id)
    assert await count("deletion_hold") == 0


async def test_what_is_held_is_not_held_again_and_what_is_not_held_is_not_released(
    house: Stage, clock: StoppedClock
) -> None:
    account_id = await canceled(house)
    with pytest.raises(errors.AccountStateRefused):
        await release(house, account_id)
    await hold(house, account_id)
    with pytest.raises(errors.AccountStateRefused):
        await hold(house, account_id)
    assert await count("deletion_hold") == 1


@pytest.mark.parametrize("note", ["", "  \n", "x" * 2_001])
async def test_why_is_to_be_said(house: Stage, note: str) -> None:
    account_id = await canceled(house)
    with pytest.raises(errors.InvalidInput):
        await hold(house, account_id, note)
    await hold(house, account_id, "x" * 2_000)
    with pytest.raises(errors.InvalidInput):
        await release(house, account_id, note)
    assert (await account(account_id))["deletion_held_at"] is not None


@pytest.mark.parametrize(
    ("held_for", "date"),
    [
        (10 * DAY, WINDOW),  # long before the end of the window: then
        (WINDOW - NOTICE, WINDOW),
        (WINDOW - NOTICE + HOUR, WINDOW + HOUR),  # too near to it
        (WINDOW, WINDOW + NOTICE),
        (WINDOW + 300 * DAY, WINDOW + 300 * DAY + NOTICE),
    ],
)
async def test_a_released_deletion_is_neither_inside_the_window_nor_nearer_than_the_notice(
    house: Stage, clock: StoppedClock, held_for: timedelta, date: timedelta
) -> None:
    account_id = await canceled(house)
    canceled_at = clock.now
    await hold(house, account_id)
    clock.forward(held_for)
    await release(house, account_id)
    row = await account(account_id)
    assert (row["deletion_scheduled_for"], row["deletion_held_at"]) == (canceled_at + date, None)
    assert (await steps(account_id))[-1] == "deletion_released"
    (kept,) = await db.fetch("SELECT note, release_note FROM deletion_hold WHERE account_id = $1", account_id)
    assert kept == {"note": "A lawyer asked.", "release_note": "Settled."}
    await house.letters()
    assert await promised(account_id, "deletion-rescheduled") == {ALICE: 1, CAROL: 1}
    clock.put(canceled_at + date - MOMENT)
    assert await deletion.begin(house.installation, [account_id]) == []
    clock.put(canceled_at + date)
    assert await deletion.begin(house.installation, [account_id]) == [account_id]


async def test_a_hold_and_its_release_are_done_once_for_each_key(house: Stage, clock: StoppedClock) -> None:
    account_id = await canceled(house)
    for _ in range(2):
        await hold(house, account_id, idempotency_key="h")
    with pytest.raises(errors.IdempotencyConflict):
        await hold(house, account_id, "Something else.", idempotency_key="h")
    for _ in range(2):
        await release(house, account_id, idempotency_key="r")
    await hold(house, account_id, idempotency_key="h")
    assert (await account(account_id))["deletion_held_at"] is None, "a repeated call holds nothing anew"
    assert (await steps(account_id))[-2:] == ["deletion_held", "deletion_released"]
    assert await promised(account_id, "deletion-rescheduled") == {ALICE: 1, CAROL: 1}


# -------------------------------------------------------------------------------------------------------- restart


async def test_a_restart_has_the_whole_window_and_not_a_moment_more(house: Stage, clock: StoppedClock) -> None:
    account_id = await canceled(house)
    end = clock.now + WINDOW
    clock.put(end)
    with pytest.raises(errors.RestartWindowClosed):
        await restart.restart(await house.call(BILLING), account_id)
    assert (await account(account_id))["status"] == "CANCELED"
    clock.put(end - MOMENT)
    await restart.restart(await house.call(BILLING), account_id)
    clock.put(end + DAY)
    assert await deletion.begin(house.installation, [account_id]) == []
    assert (await account(account_id))["status"] == "ACTIVE"


async def test_a_restart_is_refused_once_the_deletion_has_begun(house: Stage, clock: StoppedClock) -> None:
    account_id = await begun(house, clock)
    with pytest.raises(errors.RestartWindowClosed):
        await restart.restart(await house.call(BILLING), account_id)
    await house.letters()
    with pytest.raises(errors.RestartWindowClosed):
        await restart.restart(await house.call(BILLING), account_id)
    assert (await account(account_id))["status"] == "DELETED"


async def test_a_restart_takes_the_date_the_reminders_and_the_hold_away(house: Stage, clock: StoppedClock) -> None:
    account_id = await canceled(house)
    clock.forward(30 * DAY)
    await house.letters()
    assert await count("deletion_reminder") == 1
    await hold(house, account_id)
    await restart.restart(await house.call(BILLING), account_id)
    row = await account(account_id)
    gone = ("canceled_at", "restartable_until", "deletion_scheduled_for", "deletion_held_at", "reminder_due_at")
    assert [row[name] for name in gone] == [None] * 5
    assert await count("deletion_reminder") == 0
    (kept,) = await db.fetch("SELECT released_at, released_by_id FROM deletion_hold")
    assert (db.as_datetime(kept["released_at"]), kept["released_by_id"]) == (clock.now, None)
    await house.cancel()
    clock.forward(30 * DAY)
    await house.letters()
    assert await promised(account_id, "deletion-reminder") == {ALICE: 2, CAROL: 2}, "the new date has its own"
    await hold(house, account_id)
    assert await count("deletion_hold") == 2


# ---------------------------------------------------------------------------------------------------------- erase


async def test_a_deletion_leaves_a_bare_row_its_history_and_a_tombstone(house: Stage, clock: StoppedClock) -> None:
    asked = await house.request_cancellation(reason="UNUSED", idempotencyKey="k")
    for reason in ("OTHER", "TOO_COMPLEX"):
        await house.do(ALICE, "submitFeedback", requestId=asked["request"]["id"], reason=reason, comment="Well.")
        clock.forward(MOMENT)
    account_id = await canceled(house)
    canceled_at, reference = clock.now, "acme"
    made = {name: await count(name, "account_id = $1", account_id) for name in ("offer", "outbox", "member")}
    before = await steps(account_id)
    clock.forward(WINDOW + 5 * HOUR)
    await house.letters()
    row = await account(account_id)
    assert (row["status"], row["deleted_at"]) == ("DELETED", clock.now)
    assert (row["name"], row["csm_id"], row["current_period_end"]) == ("", None, None)
    assert row["reference"] == deletion.tombstone_reference(reference)
    (stone,) = await db.fetch("SELECT * FROM tombstone")
    times = {name: db.as_datetime(stone[name]) for name in ("canceled_at", "deletion_started_at", "deleted_at")}
    assert times == {"canceled_at": canceled_at, "deletion_started_at": clock.now, "deleted_at": clock.now}
    assert (db.as_uuid(stone["account_id"]), stone["plan_code"]) == (account_id, "essentials")
    assert stone["reason"] == "TOO_COMPLEX", "what was said last"
    counts = ("members", "feedback", "offers", "restart_requests", "messages", "idempotency_records")
    assert [stone[name] for name in counts] == [made["member"], 2, made["offer"], 0, made["outbox"], 1]
    assert await steps(account_id) == [*before, "deletion_started", "deleted"]
    assert (await own_step(account_id))["completed_at"] == clock.now
    last = await db.fetch(
        "SELECT actor_kind FROM transition WHERE type IN ('account.deletion_started', 'account.deleted')"
    )
    assert [one["actor_kind"] for one in last] == [ActorKind.SYSTEM] * 2


async def hold_back(who: str) -> None:
    """A message that some worker has and does not settle."""
    changed = await db.execute(
        "UPDATE outbox SET delivered_at = NULL, lease = $1, due_at = $2 WHERE recipient_address = $3",
        db.uuid7(),
        await db.now() + 300 * DAY,
        who,
    )
    assert changed == 1


@pytest.mark.parametrize("settled", ["delivered_at", "dead_at", "dropped_at"])
async def test_the_erasure_waits_until_every_message_is_settled(
    house: Stage, clock: StoppedClock, settled: str
) -> None:
    account_id = await canceled(house)
    await hold_back(CAROL)
    clock.forward(WINDOW)
    await house.letters()
    assert (await account(account_id))["status"] == "DELETING"
    step = await own_step(account_id)
    assert "1 message" in step["last_error"]
    assert (step["attempts"], step["due_at"]) == (0, clock.now + timedelta(minutes=1))
    assert await count("member", "account_id = $1", account_id) == 3
    assert len(list(house.mail.glob("*.eml"))) == 2, "no letter is taken away before its time"
    await db.execute(f"UPDATE outbox SET lease = NULL, {settled} = created_at WHERE recipient_address = $1", CAROL)
    await house.letters()
    assert (await account(account_id))["status"] == "DELETING", "it looks again in a minute"
    clock.forward(timedelta(minutes=1))
    await house.letters()
    assert (await account(account_id))["status"] == "DELETED"
    step = await own_step(account_id)
    assert (step["last_error"], step["completed_at"]) == (None, clock.now)


async def test_the_erasure_waits_for_the_other_systems(house: Stage, clock: StoppedClock) -> None:
    account_id = await begun(house, clock)
    other = await DeletionStep.create(
        id=db.uuid7(), account_id=account_id, system="warehouse", epoch=1, created_at=clock.now, due_at=clock.now
    )
    await house.letters()
    assert (await own_step(account_id))["last_error"] == "waits for 1 other system"
    await DeletionStep.filter(id=other.id).update(completed_at=clock.now)
    clock.forward(timedelta(minutes=1))
    await house.letters()
    assert (await account(account_id))["status"] == "DELETED"


async def test_a_step_that_fails_counts_and_waits_longer_each_time(house: Stage, clock: StoppedClock) -> None:
    account_id = await begun(house, clock)

    async def full(_: Sequence[str]) -> None:
        raise OSError("No space left for alice@acme.example")

    waits = []
    for attempt in range(1, 13):
        assert await deletion.erase(house.installation, full, account_id) is False
        step = await own_step(account_id)
        assert (step["attempts"], step["last_error"]) == (attempt, "OSError; see the log")
        waits.append((step["due_at"] - clock.now).total_seconds())
        clock.put(step["due_at"] - MOMENT)
        assert await house.timers().run() == 0, "it waits"
        clock.put(step["due_at"])
    assert waits == [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600, 3600, 3600]
    assert await count("member", "account_id = $1", account_id) == 3
    assert await house.timers().run() == 1
    assert (await account(account_id))["status"] == "DELETED"


class Killed(BaseException):
    """The worker's process is gone: nothing after this runs, and nothing is noted."""


async def kill(*_: Any, **__: Any) -> None:
    raise Killed


def in_forget(_: pytest.MonkeyPatch) -> Callable[[Sequence[str]], Any]:
    return kill


def before_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(people, "write", kill)


def after_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "scrub", kill)


@pytest.mark.parametrize("moment", [in_forget, before_the_commit, after_the_commit])
async def test_a_worker_killed_at_any_moment_is_taken_over(
    house: Stage, clock: StoppedClock, moment: Callable[[pytest.MonkeyPatch], Any]
) -> None:
    """Also between the beginning and the first step: there is nothing but the row that the next one finds."""
    account_id = await begun(house, clock)
    with pytest.MonkeyPatch.context() as patched:
        forget = moment(patched) or FolderMailer(house.mail).forget
        with pytest.raises(Killed):
            await deletion.erase(house.installation, forget, account_id)
    letters = await house.letters()
    assert (await account(account_id))["status"] == "DELETED"
    assert (await steps(account_id))[-2:] == ["deletion_started", "deleted"]
    assert await count("tombstone") == 1
    assert sorted(one["To"].addresses[0].addr_spec for one in letters) == [ALICE, CAROL], "the last, each once"


async def test_an_erasure_that_is_repeated_takes_nothing_more_away(house: Stage, clock: StoppedClock) -> None:
    """By a worker that was as slow as that: the last letter is delivered, and stays."""
    account_id = await begun(house, clock)
    await house.letters()
    last = {file: file.read_bytes() for file in house.mail.iterdir()}
    assert len(last) == 2
    assert await deletion.erase(house.installation, FolderMailer(house.mail).forget, account_id) is False
    assert {file: file.read_bytes() for file in house.mail.iterdir()} == last
    assert await count("tombstone") == 1
    assert (await steps(account_id))[-2:] == ["deletion_started", "deleted"]


# ------------------------------------------------------------------------------------------------- the last email


async def test_the_last_email_goes_to_the_addresses_that_are_gone_and_is_then_forgotten(
    house: Stage, clock: StoppedClock
) -> None:
    account_id = await begun(house, clock)
    assert await house.timers().run() == 1
    assert await count("member", "account_id = $1", account_id) == 0
    rows = await db.fetch("SELECT recipient_address FROM outbox WHERE account_id = $1 ORDER BY id", account_id)
    assert [row["recipient_address"] for row in rows] == [ALICE, CAROL], "until it is delivered"
    letters = await house.letters()
    assert {one["To"].addresses[0].addr_spec for one in letters} == {ALICE, CAROL}
    assert all("Acme" in one["Subject"] for one in letters)
    for row in await db.fetch("SELECT * FROM outbox WHERE account_id = $1", account_id):
        assert (row["recipient_name"], row["recipient_address"], row["facts"]) == ("", "", "{}")
        assert row["delivered_at"] is not None


class RefusingMailer(FolderMailer):
    async def send(self, message: EmailMessage) -> None:
        raise DeliveryError("mail.example answered 550 No such user", permanent=True)


async def test_the_address_is_forgotten_also_when_the_last_email_cannot_be_delivered(
    house: Stage, clock: StoppedClock
) -> None:
    account_id = await begun(house, clock)
    worker = Worker(
        house.installation,
        RefusingMailer(house.mail),
        sender="Sunset <no-reply@vendor.example>",
        link_base="https://sunset.example/links",
        concurrency=4,
        grace=timedelta(seconds=5),
    )
    await worker.drain()
    rows = await db.fetch("SELECT * FROM outbox WHERE account_id = $1", account_id)
    assert len(rows) == 2
    for row in rows:
        assert (row["recipient_name"], row["recipient_address"], row["facts"]) == ("", "", "{}")
        assert row["dead_at"] is not None
        assert row["last_error"] == "It was not delivered, and is erased."
        with pytest.raises(errors.Refusal):
            await outbox.retry(db.as_uuid(row["id"]))


async def test_an_account_of_which_nobody_is_left_is_deleted_without_an_email(
    house: Stage, clock: StoppedClock
) -> None:
    account_id = await begun(house, clock)
    await db.execute("DELETE FROM member WHERE account_id = $1", account_id)
    assert await house.letters() == []
    assert (await account(account_id))["status"] == "DELETED"
    assert await count("outbox", "account_id = $1", account_id) == 0


# ---------------------------------------------------------------------------------------- the host lists it still


async def test_a_deleted_account_does_not_come_back_by_a_sync(house: Stage, clock: StoppedClock) -> None:
    """Neither while it is deleted nor after, and the others of the batch are none the worse for it."""
    account_id = await begun(house, clock)
    other = AccountItem(reference="hooli", name="Hooli", plan_code="startup")
    outcomes = []
    for batch in ([ACME], [other, ACME], [ACME, other]):
        results = await provisioning.sync(house.installation, batch)
        outcomes.append([(one.reference, one.outcome) for one in results])
        assert all(one.refusal and one.refusal.field == "reference" for one in results if one.reference == "acme")
        await house.letters()  # deleted from here on
        assert (await account(account_id))["status"] == "DELETED"
    refused = ("acme", Outcome.REFUSED)
    assert outcomes == [
        [refused],
        [("hooli", Outcome.CREATED), refused],
        [refused, ("hooli", Outcome.UNCHANGED)],
    ]
    assert await count("account", "reference = 'acme'") == 0
    assert await count("member", "account_id = $1", account_id) == 0


async def test_no_account_takes_the_reference_of_a_deleted_one(house: Stage, clock: StoppedClock) -> None:
    await begun(house, clock)
    await house.letters()
    forged = replace(ACME, reference=deletion.tombstone_reference("acme"))
    (result,) = await provisioning.sync(house.installation, [forged])
    assert result.outcome is Outcome.REFUSED


# ------------------------------------------------------------------------------------------------------ who is told


async def test_members_of_a_deleted_account_are_nobody_and_staff_is_told(house: Stage, clock: StoppedClock) -> None:
    account_id = await begun(house, clock)
    with pytest.raises(errors.AccessRemoved):
        await cancellation.cancel(await house.call(ALICE), account_id, reason=FeedbackReason.OTHER)
    await house.letters()
    with pytest.raises(errors.Forbidden):
        await cancellation.cancel(await house.call(ALICE), account_id, reason=FeedbackReason.OTHER)
    with pytest.raises(errors.AccountStateRefused, match="has been deleted"):
        await deletion.hold(await house.call(FINANCE), account_id, note="Too late.")
