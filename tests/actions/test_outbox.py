"""The outbox: committed means promised, one worker at a time, and an end that everybody can see."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID

import orjson
import pytest

from app import accounts, cancellation, db, outbox
from app.db import Database
from app.delivery.email import FolderMailer
from app.errors import Contact, Refusal
from app.messages import AccountDeleted, AccountRestarted
from app.outbox import Addressed, Claimed, MessageView, State
from tests.cast import ALICE, CSM, GINA, Stage

MOMENT = datetime.fromisoformat("2026-11-23T11:00:00+00:00")


def restarted(number: int) -> Addressed:
    email = AccountRestarted(
        account_name="Acme",
        plan_name="Essentials",
        restarted_at=MOMENT,
        billing_contact=Contact(name="Billing Team", email="billing@vendor.example"),
    )
    return Addressed(to=Contact(name=f"Person {number}", email=f"person{number}@acme.example"), email=email)


async def promise(count: int = 1) -> None:
    async with db.transaction():
        now = await db.now()
        await outbox.put(map(restarted, range(count)), account_id=db.uuid7(), now=now, mail_domain="vendor.example")


async def rows() -> list[dict[str, Any]]:
    return await db.fetch("SELECT * FROM outbox ORDER BY id")


async def only() -> dict[str, Any]:
    (row,) = await rows()
    return row


async def lapse() -> None:
    """Every lease ends, and every wait."""
    await db.execute("UPDATE outbox SET due_at = created_at")


async def claim_one() -> Claimed:
    (message,) = await outbox.claim(1)
    return message


async def test_a_message_is_promised_with_the_commit_and_not_without(database: Database) -> None:
    async def fail() -> None:
        async with db.transaction():
            await outbox.put([restarted(0)], account_id=db.uuid7(), now=MOMENT, mail_domain="vendor.example")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await rows() == []
    await promise(2)
    assert [row["recipient_address"] for row in await rows()] == ["person0@acme.example", "person1@acme.example"]
    assert len({row["message_id"] for row in await rows()}) == 2


async def test_a_claim_gives_the_facts_back(database: Database) -> None:
    await promise()
    message = await claim_one()
    assert message.email() == restarted(0).email
    assert (message.recipient_name, message.recipient_address) == ("Person 0", "person0@acme.example")
    assert message.message_id == f"<{message.id.hex}@vendor.example>"
    assert message.attempt == 1


async def test_a_claim_takes_what_is_due_and_no_more_than_asked(database: Database) -> None:
    await promise(5)
    await db.execute("UPDATE outbox SET due_at = $1 WHERE recipient_name = 'Person 1'", MOMENT + timedelta(days=99_999))
    await db.execute("UPDATE outbox SET due_at = $1 WHERE recipient_name = 'Person 4'", MOMENT - timedelta(days=1))
    assert [message.recipient_name for message in await outbox.claim(1)] == ["Person 4"]
    assert {message.recipient_name for message in await outbox.claim(9)} == {"Person 0", "Person 2", "Person 3"}


async def test_workers_that_claim_at_the_same_time_share_without_overlap(database: Database) -> None:
    await promise(40)
    shares = await asyncio.gather(*(outbox.claim(7) for _ in range(8)))
    assert all(len(share) <= 7 for share in shares)
    claimed = [message.id for share in shares for message in share]
    assert len(claimed) == len(set(claimed))
    while left := await outbox.claim(7):
        claimed += [message.id for message in left]
    assert sorted(claimed) == [db.as_uuid(row["id"]) for row in await rows()]
    assert {row["attempts"] for row in await rows()} == {1}


@pytest.mark.postgres
async def test_a_claim_does_not_wait_for_a_row_that_another_is_claiming(postgres_database: Database) -> None:
    await promise(2)
    locked = asyncio.Event()
    let_go = asyncio.Event()

    async def other() -> None:
        async with db.transaction():
            await db.fetch("SELECT id FROM outbox WHERE recipient_name = 'Person 0' FOR UPDATE")
            locked.set()
            await let_go.wait()

    task = asyncio.create_task(other())
    await locked.wait()
    try:
        assert [message.recipient_name for message in await outbox.claim(9)] == ["Person 1"]
    finally:
        let_go.set()
        await task


async def test_a_lease_keeps_others_away_until_it_lapses(database: Database) -> None:
    await promise()
    first = await claim_one()
    assert await outbox.claim(1) == []
    lease_ends = db.as_datetime((await only())["due_at"])
    assert lease_ends - outbox.LEASE <= await db.now() < lease_ends
    await lapse()
    second = await claim_one()
    assert (second.id, second.message_id, second.attempt) == (first.id, first.message_id, 2)
    assert second.lease != first.lease


async def test_who_lost_the_lease_settles_nothing(database: Database) -> None:
    await promise()
    stale = await claim_one()
    await lapse()
    holder = await claim_one()
    before = await only()
    assert not await outbox.delivered(stale)
    assert not await outbox.failed(stale, "no such user", permanent=True)
    assert not await outbox.failed(stale, "try later", permanent=False)
    assert not await outbox.release(stale)
    assert await only() == before
    assert await outbox.delivered(holder)


async def test_what_is_settled_stays_settled(database: Database) -> None:
    await promise()
    message = await claim_one()
    assert await outbox.delivered(message)
    settled = await only()
    assert settled["delivered_at"] is not None
    assert settled["lease"] is None
    assert not await outbox.failed(message, "late news", permanent=True)
    assert await only() == settled
    await lapse()
    assert await outbox.claim(1) == []
    assert await outbox.next_due() is None


async def test_a_permanent_failure_is_a_dead_letter_that_says_why(database: Database) -> None:
    await promise()
    assert await outbox.failed(await claim_one(), "550 no such user", permanent=True)
    row = await only()
    assert row["dead_at"] is not None
    assert (row["delivered_at"], row["last_error"]) == (None, "550 no such user")
    await lapse()
    assert await outbox.claim(1) == []


async def test_a_temporary_failure_is_tried_again_until_the_last_try(database: Database) -> None:
    await promise()
    ids = set()
    for attempt in range(1, outbox.MAX_ATTEMPTS + 1):
        assert (await only())["dead_at"] is None
        message = await claim_one()
        assert message.attempt == attempt
        ids.add(message.message_id)
        before = await db.now()
        assert await outbox.failed(message, f"451 at {attempt}", permanent=False)
        if attempt < outbox.MAX_ATTEMPTS:
            assert await outbox.claim(1) == [], "it waits first"
            wait = db.as_datetime((await only())["due_at"]) - before
            assert wait >= min(timedelta(seconds=10) * 2 ** (attempt - 1), timedelta(hours=8)) / 2
            await lapse()
    row = await only()
    assert row["dead_at"] is not None
    assert row["last_error"] == f"451 at {outbox.MAX_ATTEMPTS}"
    assert len(ids) == 1, "copies share the Message-ID"
    await lapse()
    assert await outbox.claim(1) == []


async def test_a_success_after_failures_leaves_no_error_behind(database: Database) -> None:
    await promise()
    await outbox.failed(await claim_one(), "451", permanent=False)
    await lapse()
    assert await outbox.delivered(await claim_one())
    assert (await only())["last_error"] is None


async def test_what_is_released_is_due_at_once_and_counts_as_untried(database: Database) -> None:
    await promise()
    assert await outbox.release(await claim_one())
    assert (await claim_one()).attempt == 1


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.999])
def test_waits_double_up_to_eight_hours_and_chance_takes_at_most_half(
    chance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "random", lambda: chance)
    waits = [outbox.backoff(attempt) for attempt in range(1, outbox.MAX_ATTEMPTS)]
    longest = [min(timedelta(seconds=10) * 2**tries, timedelta(hours=8)) for tries in range(len(waits))]
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, longest, strict=True))
    assert all(earlier <= later for earlier, later in pairwise(waits))
    assert sum(waits, timedelta()) > timedelta(days=3)
    assert outbox.backoff(10_000) <= timedelta(hours=8)


def test_what_failed_together_does_not_come_back_together() -> None:
    assert len({outbox.backoff(5) for _ in range(50)}) > 25


async def test_the_next_due_message_is_the_earliest_that_is_not_settled(database: Database) -> None:
    assert await outbox.next_due() is None
    await promise(3)
    await db.execute("UPDATE outbox SET due_at = $1", MOMENT + timedelta(hours=2))
    await db.execute("UPDATE outbox SET due_at = $1 WHERE recipient_name = 'Person 1'", MOMENT + timedelta(hours=1))
    await db.execute(
        "UPDATE outbox SET due_at = $1, dead_at = $1 WHERE recipient_name = 'Person 2'", MOMENT - timedelta(hours=1)
    )
    assert await outbox.next_due() == MOMENT + timedelta(hours=1)


async def test_waiting_workers_are_woken_by_the_commit(database: Database) -> None:
    async with db.listen(outbox.CHANNEL) as wakeups:
        assert await wakeups.wait(10)  # that listening has begun
        while await wakeups.wait(0.05):
            pass
        waiting = asyncio.create_task(wakeups.wait(30))
        await promise()
        assert await waiting


# --------------------------------------------------------------------------------------------- what operators do


async def state() -> State:
    (message,) = await outbox.page(limit=2)
    assert [message] == await outbox.page(frozenset({message.state}), limit=2), "what is listed is what is found"
    assert await outbox.page(frozenset(State) - {message.state}, limit=2) == []
    return message.state


async def test_a_message_is_in_one_state_at_a_time(database: Database) -> None:
    await promise()
    assert await state() is State.DUE
    message = await claim_one()
    assert await state() is State.CLAIMED
    await outbox.failed(message, "451", permanent=False)
    assert await state() is State.WAITING
    await lapse()
    assert await state() is State.DUE
    await claim_one()
    await lapse()
    assert await state() is State.DUE, "a lease that has lapsed claims nothing"
    await outbox.failed(await claim_one(), "550", permanent=True)
    assert await state() is State.DEAD
    await outbox.retry(message.id)
    await outbox.delivered(await claim_one())
    assert await state() is State.DELIVERED
    await db.execute("DELETE FROM outbox")
    await promise()
    await outbox.drop(db.as_uuid((await only())["id"]))
    assert await state() is State.DROPPED


async def test_pages_go_from_the_newest_back_and_can_be_about_one_account(database: Database) -> None:
    for _ in range(3):
        await promise(2)
    listed: list[MessageView] = []
    for _ in range(3):
        listed += await outbox.page(after=(listed[-1].created_at, listed[-1].id) if listed else None, limit=2)
    assert [one.id for one in listed] == [db.as_uuid(row["id"]) for row in reversed(await rows())]
    about = listed[2].account_id
    assert {one.id for one in await outbox.page(account_id=about, limit=9)} == {
        one.id for one in listed if one.account_id == about
    }
    assert await outbox.page(frozenset(), limit=9) == []


async def test_a_dead_letter_is_retried_as_the_same_message_with_all_its_tries(database: Database) -> None:
    await promise()
    dead = await claim_one()
    await outbox.failed(dead, "550 no such user", permanent=True)
    await outbox.retry(dead.id)
    assert (await only())["last_error"] == "550 no such user", "why it is tried again can still be read"
    again = await claim_one()
    assert (again.id, again.message_id, again.attempt) == (dead.id, dead.message_id, 1)
    assert again.email() == restarted(0).email
    assert await outbox.delivered(again)


async def test_a_message_that_waits_is_due_at_once_when_it_is_retried(database: Database) -> None:
    await promise()
    message = await claim_one()
    await outbox.failed(message, "451", permanent=False)
    async with db.listen(outbox.CHANNEL) as wakeups:
        assert await wakeups.wait(10)  # that listening has begun
        while await wakeups.wait(0.05):
            pass
        waiting = asyncio.create_task(wakeups.wait(30))
        await outbox.retry(message.id)
        assert await waiting, "workers are woken"
    assert (await claim_one()).attempt == 1


@pytest.mark.parametrize("act", [outbox.retry, outbox.drop], ids=["retry", "drop"])
async def test_what_is_settled_claimed_or_unknown_is_left_alone(
    database: Database, act: Callable[[UUID], Awaitable[None]]
) -> None:
    async def refused(why: str) -> None:
        before = await rows()
        with pytest.raises(Refusal, match=why):
            await act(db.as_uuid(before[0]["id"]) if before else db.uuid7())
        assert await rows() == before

    await refused("There is no message")
    await promise()
    message = await claim_one()
    await refused("is being delivered")
    await outbox.delivered(message)
    await refused("was delivered at")
    await db.execute("DELETE FROM outbox")
    await promise()
    await outbox.drop(db.as_uuid((await only())["id"]))
    await refused("was dropped at")


async def test_what_was_dropped_is_never_sent(database: Database) -> None:
    """Also by a worker that lost its lease and comes back."""
    await promise()
    late = await claim_one()
    await lapse()
    await outbox.drop(late.id)
    assert not await outbox.delivered(late)
    assert not await outbox.failed(late, "451", permanent=False)
    await lapse()
    assert await outbox.claim(9) == []
    row = await only()
    assert (row["dropped_at"] is not None, row["delivered_at"], row["dead_at"]) == (True, None, None)
    assert row["lease"] is None, "it is nobody's any more"
    assert row["recipient_address"] == "person0@acme.example", "it stays visible"


async def test_a_dead_letter_can_be_dropped(database: Database) -> None:
    await promise()
    dead = await claim_one()
    await outbox.failed(dead, "550 no such user", permanent=True)
    await outbox.drop(dead.id)
    assert await state() is State.DROPPED
    assert await outbox.retry_dead() == 0


async def test_the_last_email_is_erased_when_it_is_dropped_and_cannot_be_retried_when_it_is_dead(
    database: Database,
) -> None:
    last = AccountDeleted(
        account_name="Acme",
        plan_name="Essentials",
        canceled_at=MOMENT,
        deleted_at=MOMENT,
        billing_contact=Contact(name="Billing Team", email="billing@vendor.example"),
    )
    async with db.transaction():
        gone = [Addressed(to=Contact(name="Alice", email="alice@acme.example"), email=last) for _ in range(2)]
        await outbox.put(gone, account_id=db.uuid7(), now=await db.now(), mail_domain="vendor.example")
    dead = await claim_one()
    await outbox.failed(dead, "550 no such user", permanent=True)
    with pytest.raises(Refusal, match="erased"):
        await outbox.retry(dead.id)
    assert await outbox.retry_dead() == 0
    (other,) = await outbox.page(frozenset({State.DUE}), limit=9)
    for id_ in (dead.id, other.id):
        await outbox.drop(id_)
    assert {(row["recipient_name"], row["recipient_address"], row["facts"]) for row in await rows()} == {("", "", "{}")}


async def test_all_dead_letters_are_retried_and_nothing_else(database: Database) -> None:
    await promise(4)
    one, other, waiting, _ = await outbox.claim(4)
    await outbox.failed(one, "550", permanent=True)
    await outbox.failed(other, "550", permanent=True)
    await outbox.failed(waiting, "451", permanent=False)
    assert await outbox.retry_dead() == 2
    assert {message.id for message in await outbox.claim(9)} == {one.id, other.id}


@pytest.mark.postgres
async def test_nothing_becomes_due_behind_the_back_of_a_deletion(postgres_house: Stage) -> None:
    """A dead letter that is retried while the account is being erased goes with it, and is not sent any more."""
    await postgres_house.cancel()
    message, _ = await outbox.claim(9)
    await outbox.failed(message, "550 no such user", permanent=True)
    account_id, dead = message.account_id, message.id
    assert account_id is not None
    locked, go_on = asyncio.Event(), asyncio.Event()

    async def erase() -> None:
        async with db.transaction():
            await accounts.lock_row(account_id)
            locked.set()
            await go_on.wait()
            await db.execute("DELETE FROM outbox WHERE account_id = $1", account_id)

    erasing = asyncio.create_task(erase())
    await locked.wait()
    retrying = asyncio.create_task(outbox.retry(dead))
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    while not retrying.done() and not await db.fetch(waiting):  # noqa: ASYNC110  the server has no event to wait for
        await asyncio.sleep(0.01)
    assert await outbox.claim(9) == []
    go_on.set()
    await erasing
    with pytest.raises(Refusal, match="There is no message"):
        await retrying


@pytest.mark.postgres
async def test_a_message_is_claimed_or_dropped_and_never_both(postgres_database: Database) -> None:
    """Operators and workers at the same time: what was dropped no worker has, and what one has was not dropped."""
    await promise(60)
    ids = [db.as_uuid(row["id"]) for row in await rows()]

    async def drop(id_: UUID) -> UUID | None:
        try:
            await outbox.drop(id_)
        except Refusal:
            return None
        return id_

    dropped, claimed = await asyncio.gather(
        asyncio.gather(*map(drop, ids)), asyncio.gather(*(outbox.claim(5) for _ in range(12)))
    )
    theirs = {message.id for share in claimed for message in share}
    assert theirs.isdisjoint(dropped)
    assert theirs | set(dropped) - {None} <= set(ids)
    assert all([await outbox.delivered(message) for share in claimed for message in share])
    assert len(theirs) + len(set(dropped) - {None}) + len(await outbox.claim(60)) == 60


async def test_the_rows_of_the_database_hold_no_secret(house: Stage) -> None:
    """Neither a confirmation token nor a signed link is in any row, whatever the outbox promises to send."""
    asked = await cancellation.cancel(await house.call(ALICE), await house.account_key("acme"), idempotency_key="k")
    await cancellation.cancel(await house.call(GINA), await house.account_key("globex"))
    opened = await cancellation.cancel(await house.call(CSM), await house.account_key("globex"), note="She is sure.")
    await cancellation.confirm(
        await house.call(ALICE),
        asked.request_id,
        confirmation_token=asked.confirmation_token,
        account_name="Acme",
        idempotency_key="k",
    )
    assert {row["template"] for row in await rows()} >= {"confirmation-requested", "cancellation-confirmed"}
    letters = "".join(str(letter.get_body(("plain",))) for letter in await house.letters())
    assert "/links/confirm?token=" in letters, "a letter has what the row has not"

    assert asked.confirmation_token is not None
    secrets = [asked.confirmation_token, house.installation.tokens.confirmation_token(opened.request_id, 0)]
    tables = ("outbox", "cancellation_request", "transition", "idempotency_record", "account")
    stored = [await db.fetch(f"SELECT * FROM {table}") for table in tables]
    text = orjson.dumps(stored, default=str).decode()
    assert all(secret not in text for secret in secrets)
    assert "eyJ" not in text, "no signed token"


async def test_what_is_old_is_thrown_away_with_its_copy_in_the_folder(house: Stage) -> None:
    """Once the row is gone, nothing would find the letter any more: not even the erasure of the account."""
    await house.cancel()
    assert len(await house.letters()) == 2
    folder = FolderMailer(house.mail)
    await db.advance_clock(outbox.KEPT - timedelta(minutes=1))
    assert await outbox.forget(folder.forget) == 0
    await db.advance_clock(timedelta(minutes=2))
    assert await outbox.forget(folder.forget) == 2
    assert list(house.mail.glob("*.eml")) == []
    assert await db.fetch("SELECT id FROM outbox") == []
