"""Races on PostgreSQL, where they are real: whatever happens at the same time, one effect, and every loser is told.

Two kinds of test. The free ones start actions together and accept any legal order. The arranged ones hold the
account's row, see the action wait for it, change something, and let go: what was true before the lock must not count.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast
from uuid import UUID

import asyncpg
import pytest

from app import cancellation, db, demo, errors, offers, provisioning, restart
from app.cancellation import Requested
from app.lifecycle import FeedbackReason, MemberRole, Permission, StaffRole
from app.provisioning import AccountItem, MemberItem, Outcome
from app.tokens import DEVELOPMENT_ISSUER
from tests.cast import ALICE, BILLING, CAROL, Stage, subject

pytestmark = pytest.mark.postgres

ROUNDS = 8
"""Accounts that a free race is run on, at the same time."""

Refused = errors.Refusal | errors.RequestError


async def together(*actions: Awaitable[Any]) -> list[Any]:
    """What came of actions started together: an answer or a refusal. Anything else is an error of the test."""
    results = await asyncio.gather(*actions, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Refused):
            raise result
        assert not isinstance(result, errors.Unavailable), "nobody waits so long that they are sent away"
    return results


def split(results: list[Any]) -> tuple[list[Any], list[type[BaseException]]]:
    """The answers, and the kinds of the refusals."""
    refused = [type(result) for result in results if isinstance(result, BaseException)]
    return [result for result in results if not isinstance(result, BaseException)], refused


def described(
    number: int, plan: str = "essentials", carol: frozenset[Permission] = frozenset(Permission)
) -> AccountItem:
    """One of the raced accounts as the host knows it: Alice an admin, Carol a member with the permission."""
    return AccountItem(
        reference=f"raced-{number}",
        name=f"Raced {number}",
        plan_code=plan,
        members=[
            MemberItem(subject=demo.member_subject(ALICE), email=ALICE, name="Alice Adams", role=MemberRole.ADMIN),
            MemberItem(
                subject=demo.member_subject(CAROL),
                email=CAROL,
                name="Carol Clark",
                role=MemberRole.MEMBER,
                permissions=carol,
            ),
        ],
    )


async def raced(house: Stage, count: int = ROUNDS) -> list[UUID]:
    results = await provisioning.sync(house.installation, [described(number) for number in range(count)])
    assert {result.outcome for result in results} == {Outcome.CREATED}
    return [cast("UUID", result.account_id) for result in results]


async def asked(house: Stage, account_id: UUID, who: str = ALICE) -> Requested:
    return await cancellation.cancel(await house.call(who), account_id, reason=FeedbackReason.TOO_EXPENSIVE)


async def confirm(house: Stage, request: Requested, who: str = ALICE, token: str | None = None) -> Any:
    return await cancellation.confirm(
        await house.call(who),
        request.request_id,
        confirmation_token=token or request.confirmation_token,
        account_name=request.account.name,
    )


async def canceled(house: Stage, account_id: UUID) -> Requested:
    request = await asked(house, account_id)
    await confirm(house, request)
    return request


async def account(account_id: UUID) -> dict[str, Any]:
    row = await db.fetch_one("SELECT * FROM account WHERE id = $1", account_id)
    assert row is not None
    return row


async def statuses(account_id: UUID) -> list[str]:
    """The account's, and those of its requests in their order."""
    rows = await db.fetch("SELECT status FROM cancellation_request WHERE account_id = $1 ORDER BY id", account_id)
    return [(await account(account_id))["status"], *(row["status"] for row in rows)]


async def steps(account_id: UUID) -> list[str]:
    """The account's history, which has no gap and no double."""
    rows = await db.fetch("SELECT sequence, type FROM transition WHERE account_id = $1 ORDER BY sequence", account_id)
    assert [row["sequence"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["type"].removeprefix("account.") for row in rows]


async def told(account_id: UUID) -> Counter[tuple[str, str]]:
    """How many emails of which kind each person was promised."""
    rows = await db.fetch("SELECT template, recipient_address FROM outbox WHERE account_id = $1", account_id)
    return Counter((row["template"], row["recipient_address"]) for row in rows)


@asynccontextmanager
async def held(account_id: UUID) -> AsyncIterator[Any]:
    """Somebody else's transaction that has the account's row, committed when the block ends."""
    connection = await asyncpg.connect(db.bound().url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT 1 FROM account WHERE id = $1 FOR UPDATE", account_id)
            yield connection
    finally:
        await connection.close()


async def waiting(count: int = 1) -> None:
    """Return as soon as so many of this database's sessions wait for a lock."""
    async with asyncio.timeout(10):
        while True:
            row = await db.fetch_one(
                "SELECT count(*) AS waiting FROM pg_stat_activity "
                "WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            assert row is not None
            if row["waiting"] >= count:
                return


# ------------------------------------------------------------------------------------------------------ free races


async def test_the_same_member_asks_twice_and_gets_one_request(postgres_house: Stage) -> None:
    for account_id in await raced(postgres_house):
        first, second = await together(*(asked(postgres_house, account_id) for _ in range(2)))
        assert (first.request_id, first.confirmation_token) == (second.request_id, second.confirmation_token)
        assert await statuses(account_id) == ["ACTIVE", "PENDING_CONFIRMATION"]
        assert await steps(account_id) == ["cancellation_requested"]


async def test_of_two_members_who_ask_one_is_told_of_the_other(postgres_house: Stage) -> None:
    for account_id in await raced(postgres_house):
        answers, refused = split(await together(*(asked(postgres_house, account_id, who) for who in (ALICE, CAROL))))
        assert refused == [errors.CancellationAlreadyRequested]
        assert len(answers) == 1
        assert await statuses(account_id) == ["ACTIVE", "PENDING_CONFIRMATION"]


async def test_two_members_confirm_and_it_takes_effect_once(postgres_house: Stage) -> None:
    for account_id in await raced(postgres_house):
        request = await asked(postgres_house, account_id)
        answers, refused = split(
            await together(*(confirm(postgres_house, request, who) for who in (ALICE, CAROL, ALICE, CAROL)))
        )
        assert len(answers) == 1
        assert set(refused) == {errors.AccessRemoved}
        assert await statuses(account_id) == ["CANCELED", "EFFECTIVE"]
        assert await steps(account_id) == ["cancellation_requested", "canceled"]


async def test_a_hundred_confirms_with_one_token_have_one_effect(postgres_house: Stage) -> None:
    (account_id,) = await raced(postgres_house, 1)
    request = await asked(postgres_house, account_id)
    answers, refused = split(await together(*(confirm(postgres_house, request) for _ in range(100))))
    assert len(answers) == 1
    assert Counter(refused) == {errors.AccessRemoved: 99}
    assert await steps(account_id) == ["cancellation_requested", "canceled"]
    assert (await account(account_id))["epoch"] == 1
    assert await told(account_id) == {("cancellation-confirmed", ALICE): 1, ("cancellation-notice", CAROL): 1}


async def test_a_confirm_and_a_withdrawal_are_never_both_done(postgres_house: Stage) -> None:
    for account_id in await raced(postgres_house):
        request = await asked(postgres_house, account_id)
        confirmed, withdrawn = await together(
            confirm(postgres_house, request), cancellation.withdraw(await postgres_house.call(CAROL), account_id)
        )
        if isinstance(confirmed, BaseException):
            assert isinstance(confirmed, errors.AccountStateRefused)
            assert withdrawn.id == account_id
            assert await statuses(account_id) == ["ACTIVE", "WITHDRAWN"]
            assert await steps(account_id) == ["cancellation_requested", "cancellation_withdrawn"]
        else:
            assert isinstance(withdrawn, errors.AccessRemoved)
            assert await statuses(account_id) == ["CANCELED", "EFFECTIVE"]
            assert await steps(account_id) == ["cancellation_requested", "canceled"]


async def test_a_confirm_and_an_accepted_offer_are_never_both_done(postgres_house: Stage) -> None:
    for account_id in await raced(postgres_house):
        request = await asked(postgres_house, account_id)
        offer = await db.fetch_one("SELECT id FROM offer WHERE request_id = $1 ORDER BY id", request.request_id)
        assert offer is not None
        confirmed, accepted = await together(
            confirm(postgres_house, request), offers.accept(await postgres_house.call(CAROL), offer["id"])
        )
        status = await db.fetch_one("SELECT status FROM offer WHERE id = $1", offer["id"])
        assert status is not None
        if isinstance(confirmed, BaseException):
            assert isinstance(confirmed, errors.AccountStateRefused)
            assert accepted[0].status == status["status"] == "ACCEPTED"
            assert await statuses(account_id) == ["ACTIVE", "SAVED"]
        else:
            assert isinstance(accepted, errors.AccessRemoved)
            assert status["status"] == "OPEN"
            assert await statuses(account_id) == ["CANCELED", "EFFECTIVE"]


async def test_one_offer_is_accepted_once(postgres_house: Stage) -> None:
    for account_id in await raced(postgres_house):
        request = await asked(postgres_house, account_id)
        made = await db.fetch("SELECT id FROM offer WHERE request_id = $1", request.request_id)
        assert len(made) > 1
        calls = [await postgres_house.call(who) for who in (ALICE, CAROL)]
        answers, _ = split(await together(*(offers.accept(call, offer["id"]) for call in calls for offer in made)))
        assert len(answers) == 1
        assert await told(account_id) == {("offer-accepted", BILLING): 1}


async def test_of_two_restarts_one_is_told_that_the_account_is_active(postgres_house: Stage) -> None:
    for account_id in await raced(postgres_house):
        await canceled(postgres_house, account_id)
        call = await postgres_house.call(BILLING)
        answers, refused = split(await together(*(restart.restart(call, account_id) for _ in range(3))))
        assert len(answers) == 1
        assert refused == [errors.AccountStateRefused] * 2
        assert await statuses(account_id) == ["ACTIVE", "REVERTED"]
        assert (await account(account_id))["epoch"] == 2
        counted = await told(account_id)
        assert [counted["account-restarted", who] for who in (ALICE, CAROL)] == [1, 1]


async def test_wrong_tokens_at_the_same_time_are_all_counted(postgres_house: Stage) -> None:
    (account_id,) = await raced(postgres_house, 1)
    request = await asked(postgres_house, account_id)
    refused = await together(
        *(confirm(postgres_house, request, (ALICE, CAROL)[number % 2], f"wrong-{number}") for number in range(20))
    )
    assert all(isinstance(refusal, errors.ConfirmationTokenInvalid) for refusal in refused)
    left = sorted((refusal.attempts_left for refusal in refused), reverse=True)
    assert left == [4, 3, 2, 1, *[0] * 16]
    with pytest.raises(errors.ConfirmationTokenInvalid, match="void"):
        await confirm(postgres_house, request)
    assert await statuses(account_id) == ["ACTIVE", "PENDING_CONFIRMATION"]


async def test_the_right_token_among_wrong_ones_counts_only_while_it_is_not_void(postgres_house: Stage) -> None:
    for account_id in await raced(postgres_house):
        request = await asked(postgres_house, account_id)
        tokens = [*(f"wrong-{number}" for number in range(6)), request.confirmation_token]
        *_, right = await together(*(confirm(postgres_house, request, token=token) for token in tokens))
        row = await db.fetch_one("SELECT wrong_tries FROM cancellation_request WHERE id = $1", request.request_id)
        assert row is not None
        if isinstance(right, BaseException):
            assert isinstance(right, errors.ConfirmationTokenInvalid)
            assert row["wrong_tries"] == 5
            assert await statuses(account_id) == ["ACTIVE", "PENDING_CONFIRMATION"]
        else:
            assert row["wrong_tries"] < 5
            assert await statuses(account_id) == ["CANCELED", "EFFECTIVE"]


async def test_a_sync_that_takes_the_permission_away_and_a_confirm_have_an_order(postgres_house: Stage) -> None:
    for number, account_id in enumerate(await raced(postgres_house)):
        request = await asked(postgres_house, account_id, CAROL)
        synced, confirmed = await together(
            provisioning.sync(postgres_house.installation, [described(number, carol=frozenset())]),
            confirm(postgres_house, request, CAROL),
        )
        assert [result.outcome for result in synced] == [Outcome.UPDATED]
        if isinstance(confirmed, BaseException):
            assert isinstance(confirmed, errors.PermissionDenied)
            assert await statuses(account_id) == ["ACTIVE", "PENDING_CONFIRMATION"]
        else:
            assert await statuses(account_id) == ["CANCELED", "EFFECTIVE"]


async def test_a_sync_that_removes_a_member_and_a_restart_have_an_order(postgres_house: Stage) -> None:
    """Whichever is first: who was removed is no member afterwards, and the restart tells whom it has let in."""
    for number, account_id in enumerate(await raced(postgres_house)):
        await canceled(postgres_house, account_id)
        alice, carol = described(number).members or ()
        synced, restarted = await together(
            provisioning.sync(postgres_house.installation, [replace(described(number), members=[carol])]),
            restart.restart(await postgres_house.call(BILLING), account_id),
        )
        assert [(result.outcome, result.members_removed) for result in synced] == [(Outcome.UPDATED, 1)]
        assert restarted.members == 1 + (await told(account_id))["account-restarted", alice.email]
        with pytest.raises((errors.Forbidden, errors.NotFound)):
            await asked(postgres_house, account_id)
        assert (await asked(postgres_house, account_id, CAROL)).confirmation_token is not None


async def test_a_sync_that_names_members_and_the_erasure_have_an_order(postgres_house: Stage) -> None:
    """No deleted account has members, and none is named to one that is being deleted."""
    ids = await raced(postgres_house, 4)
    for account_id in ids:
        await canceled(postgres_house, account_id)
    await postgres_house.worker().drain()
    await db.execute(
        "UPDATE account SET canceled_at = canceled_at - interval '61 days', reminder_due_at = NULL, "
        "restartable_until = restartable_until - interval '61 days', "
        "deletion_scheduled_for = deletion_scheduled_for - interval '61 days' WHERE status = 'CANCELED'"
    )
    for turn in range(4):
        items = [described(number, carol=frozenset(Permission) if turn % 2 else frozenset()) for number in range(4)]
        _, synced = await together(postgres_house.timers().run(), provisioning.sync(postgres_house.installation, items))
        assert {result.outcome for result in synced} <= {Outcome.UPDATED, Outcome.REFUSED}
        await postgres_house.worker().drain()
    for account_id in ids:
        assert (await account(account_id))["status"] == "DELETED"
        assert await db.fetch("SELECT 1 FROM member WHERE account_id = $1", account_id) == []


async def test_a_sync_and_a_hiring_of_the_same_person_leave_nobody_on_both_sides(postgres_house: Stage) -> None:
    """Listed or left out, whichever is first: staff has no member's relation."""
    for number, account_id in enumerate(await raced(postgres_house)):
        who, item = f"hired-{number}@vendor.example", described(number)
        insider = MemberItem(subject=subject(who), email=who, name="Hired", role=MemberRole.ADMIN)
        synced, hired = await together(
            provisioning.sync(postgres_house.installation, [replace(item, members=[*(item.members or ()), insider])]),
            provisioning.add_staff(
                email=who,
                name="Hired",
                role=StaffRole.CUSTOMER_SUCCESS_MANAGER,
                issuer=DEVELOPMENT_ISSUER,
                subject=subject(who),
            ),
        )
        assert hired.email == who
        (result,) = synced
        left_out = ["members[2].subject"] if result.outcome is Outcome.UNCHANGED else []
        assert [refused.field for refused in result.members_refused] == left_out
        assert result.members_added == 1 - len(left_out)
        request = await asked(postgres_house, account_id)
        with pytest.raises(errors.PermissionDenied, match="staff never does"):
            await confirm(postgres_house, request, who)


# -------------------------------------------------------------------------------------------------- arranged races


async def test_a_restart_that_waited_for_a_sync_counts_who_is_left(postgres_house: Stage) -> None:
    (account_id,) = await raced(postgres_house, 1)
    await canceled(postgres_house, account_id)
    async with held(account_id) as other:
        await other.execute("DELETE FROM member WHERE account_id = $1 AND email = $2", account_id, ALICE)
        late = asyncio.create_task(restart.restart(await postgres_house.call(BILLING), account_id))
        await waiting()
    assert (await late).members == 1
    assert (await told(account_id))["account-restarted", ALICE] == 0


async def test_a_confirm_that_waited_sees_that_the_member_has_become_staff(postgres_house: Stage) -> None:
    (account_id,) = await raced(postgres_house, 1)
    request = await asked(postgres_house, account_id)
    async with held(account_id):
        late = asyncio.create_task(confirm(postgres_house, request))
        await waiting()
        await provisioning.add_staff(
            email="alice@vendor.example",
            name="Alice Adams",
            role=StaffRole.CUSTOMER_SUCCESS_MANAGER,
            issuer=DEVELOPMENT_ISSUER,
            subject=subject(ALICE),
        )
    with pytest.raises(errors.PermissionDenied):
        await late
    assert await statuses(account_id) == ["ACTIVE", "PENDING_CONFIRMATION"]


async def test_a_confirm_that_waited_sees_that_the_permission_is_gone(postgres_house: Stage) -> None:
    (account_id,) = await raced(postgres_house, 1)
    request = await asked(postgres_house, account_id, CAROL)
    async with held(account_id) as other:
        await other.execute(
            "UPDATE member SET permissions = '' WHERE account_id = $1 AND email = $2", account_id, CAROL
        )
        late = asyncio.create_task(confirm(postgres_house, request, CAROL))
        await waiting()
    with pytest.raises(errors.PermissionDenied):
        await late
    assert await statuses(account_id) == ["ACTIVE", "PENDING_CONFIRMATION"]


async def test_a_sync_waits_for_the_confirm_that_came_first(postgres_house: Stage) -> None:
    """So that after the sync's answer nobody without the permission can be about to confirm."""
    (account_id,) = await raced(postgres_house, 1)
    async with held(account_id):
        removal = asyncio.create_task(provisioning.sync(postgres_house.installation, [described(0, carol=frozenset())]))
        await waiting()
        assert not removal.done()
    assert [result.outcome for result in await removal] == [Outcome.UPDATED]


async def test_a_confirm_that_waited_sees_the_new_plan(postgres_house: Stage) -> None:
    (account_id,) = await raced(postgres_house, 1)
    request = await asked(postgres_house, account_id)
    async with held(account_id) as other:
        await other.execute("UPDATE account SET plan_code = 'premium' WHERE id = $1", account_id)
        late = asyncio.create_task(confirm(postgres_house, request))
        await waiting()
    with pytest.raises(errors.AssistedPlan):
        await late
    assert await statuses(account_id) == ["ACTIVE", "PENDING_CONFIRMATION"]


async def test_a_plan_change_and_a_confirm_have_an_order(postgres_house: Stage) -> None:
    for number, account_id in enumerate(await raced(postgres_house)):
        request = await asked(postgres_house, account_id)
        synced, confirmed = await together(
            provisioning.sync(postgres_house.installation, [described(number, plan="premium")]),
            confirm(postgres_house, request),
        )
        assert [result.outcome for result in synced] == [Outcome.UPDATED]
        if isinstance(confirmed, BaseException):
            assert isinstance(confirmed, errors.AssistedPlan)
            assert await statuses(account_id) == ["ACTIVE", "PENDING_CONFIRMATION"]
        else:
            assert await statuses(account_id) == ["CANCELED", "EFFECTIVE"]


async def test_due_work_is_left_alone_while_somebody_has_its_row_and_done_once(postgres_house: Stage) -> None:
    """Two workers and a longer time to confirm: what was due without the lock is looked at again with it."""
    (account_id,) = await raced(postgres_house, 1)
    await asked(postgres_house, account_id)
    await db.execute("UPDATE cancellation_request SET confirmation_expires_at = requested_at")
    async with held(account_id) as other:
        await other.execute(
            "UPDATE cancellation_request SET confirmation_expires_at = clock_timestamp() + interval '1 hour'"
        )
        assert await postgres_house.timers().run() == 0  # the row is somebody's: it is left for the next round
    assert await postgres_house.timers().run() == 0
    await db.execute("UPDATE cancellation_request SET confirmation_expires_at = requested_at")
    assert sum(await together(*(postgres_house.timers().run() for _ in range(4)))) == 1
    assert await statuses(account_id) == ["ACTIVE", "EXPIRED"]
    assert await steps(account_id) == ["cancellation_requested", "cancellation_expired"]
