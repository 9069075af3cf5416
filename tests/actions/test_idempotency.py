"""Idempotency keys: the same key and input, from the same caller for the same mutation, one effect and one answer."""

import asyncio
from typing import Any

import pytest

from app import cancellation, db, errors, feedback, restart
from app.cancellation import Requested
from app.lifecycle import FeedbackReason
from tests.cast import ALICE, BILLING, CAROL, GINA, Stage

IDENTICAL = 50


async def asked(house: Stage, who: str = ALICE, reference: str = "acme", key: str | None = None) -> Requested:
    return await cancellation.cancel(await house.call(who), await house.account_key(reference), idempotency_key=key)


async def count(table: str) -> int:
    row = await db.fetch_one(f"SELECT count(*) AS count FROM {table}")
    assert row is not None
    return int(row["count"])


async def confirm(house: Stage, request: Requested, token: str | None = None, key: str | None = None) -> Any:
    return await cancellation.confirm(
        await house.call(ALICE),
        request.request_id,
        confirmation_token=token or request.confirmation_token,
        account_name="Acme",
        idempotency_key=key,
    )


async def test_identical_calls_at_the_same_time_have_one_effect_and_one_answer(house: Stage) -> None:
    request = await asked(house)
    call = await house.call(ALICE)
    given = await asyncio.gather(
        *(
            feedback.submit(call, request.request_id, reason=FeedbackReason.OTHER, comment="x", idempotency_key="k")
            for _ in range(IDENTICAL)
        )
    )
    assert len({one.id for one in given}) == 1
    assert await count("feedback") == 1


async def test_a_restart_that_is_repeated_with_its_key_succeeds_every_time_and_happens_once(house: Stage) -> None:
    await confirm(house, await asked(house))
    call, account_id = await house.call(BILLING), await house.account_key("acme")
    answers = await asyncio.gather(*(restart.restart(call, account_id, idempotency_key="k") for _ in range(IDENTICAL)))
    assert {answer.account.status for answer in answers} == {"ACTIVE"}
    restarts = await db.fetch("SELECT epoch FROM transition WHERE type = 'account.restarted'")
    assert [row["epoch"] for row in restarts] == [2]
    with pytest.raises(errors.AccountStateRefused):
        await restart.restart(call, account_id, idempotency_key="another")


async def test_a_key_is_its_callers_own(house: Stage) -> None:
    """Two tenants with one key, at the same time, do not hear of each other."""
    acme, globex = await asyncio.gather(asked(house, key="k"), asked(house, GINA, "globex", key="k"))
    assert acme.request_id != globex.request_id
    assert await count("idempotency_record") == 2


async def test_a_colleague_with_the_same_key_does_not_get_the_answer(house: Stage) -> None:
    await asked(house, ALICE, key="k")
    with pytest.raises(errors.CancellationAlreadyRequested):
        await asked(house, CAROL, key="k")


async def test_one_key_on_two_accounts_at_the_same_time_has_one_effect(house: Stage) -> None:
    """Neither waits for the other's row, so only the stored key tells; the loser's effect is taken back."""
    dana = "dana@advisors.example"
    results = await asyncio.gather(
        *(asked(house, dana, reference, key="k") for reference in ("initech", "umbrella")), return_exceptions=True
    )
    (done,) = [result for result in results if isinstance(result, Requested)]
    (refused,) = [result for result in results if not isinstance(result, Requested)]
    assert isinstance(refused, errors.IdempotencyConflict)
    rows = await db.fetch("SELECT id FROM cancellation_request")
    assert [db.as_uuid(row["id"]) for row in rows] == [done.request_id]
    assert await count("transition") == 1 + (done.account.reference == "umbrella")


async def test_other_input_under_the_key_is_refused_and_changes_nothing(house: Stage) -> None:
    await asked(house, key="k")
    with pytest.raises(errors.IdempotencyConflict):
        await cancellation.cancel(
            await house.call(ALICE),
            await house.account_key("acme"),
            reason=FeedbackReason.TOO_EXPENSIVE,
            idempotency_key="k",
        )
    offers = await db.fetch("SELECT code FROM offer")
    assert "discount-3-months" not in {offer["code"] for offer in offers}


async def test_a_key_gives_nobody_an_answer_that_their_token_no_longer_would(house: Stage) -> None:
    await asked(house, CAROL, key="k")
    await db.execute("UPDATE member SET permissions = '' WHERE email = $1", CAROL)
    with pytest.raises(errors.PermissionDenied):
        await asked(house, CAROL, key="k")


async def test_a_refused_attempt_is_not_remembered(house: Stage) -> None:
    call, account_id = await house.call(BILLING), await house.account_key("acme")
    with pytest.raises(errors.AccountStateRefused):
        await restart.restart(call, account_id, idempotency_key="k")
    await confirm(house, await asked(house))
    assert (await restart.restart(call, account_id, idempotency_key="k")).account.status == "ACTIVE"


async def test_a_key_does_not_make_guessing_free(house: Stage) -> None:
    request = await asked(house)
    left = []
    for _ in range(5):
        with pytest.raises(errors.ConfirmationTokenInvalid) as caught:
            await confirm(house, request, token="guess", key="k")
        left.append(caught.value.attempts_left)
    assert left == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_a_key_that_cannot_be_stored_is_refused(house: Stage, key: str) -> None:
    with pytest.raises(errors.InvalidInput) as caught:
        await asked(house, key=key)
    assert caught.value.field == "idempotencyKey"
    assert await count("cancellation_request") == 0
