"""The story, end to end, through the real application: cancel, confirm, be told, restart."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from app import db, policy
from app.db import Database
from app.lifecycle import CancellationTiming, Channel
from tests.cast import ALICE, BILLING, BOB, CAROL, CSM, GINA, SUPPORT, Stage, stage

STATUS = """query($id: ID!) { account(id: $id) { name status canSendMessages membersCanSignIn
  plan { code channel retentionHours } allowedActions { action allowed reason }
  openRequest { status } canceledAt restartableUntil deletionScheduledFor } }"""


def links(letter: EmailMessage) -> dict[str, str]:
    """The links of an email, by purpose."""
    part = letter.get_body(("plain",))
    assert part is not None
    body = part.get_content()
    urls = [word for word in body.split() if word.startswith("https://sunset.example/links/")]
    return {urlsplit(url).path.rpartition("/")[2]: parse_qs(urlsplit(url).query)["token"][0] for url in urls}


async def test_a_member_cancels_confirms_and_is_told_and_billing_restarts(house: Stage) -> None:
    asked = await house.request_cancellation()
    assert asked["__typename"] == "CancelAccountSuccess"
    assert asked["preview"]["membersLosingAccess"] == 3

    done = await house.do(
        ALICE,
        "confirmCancellation",
        "... on ConfirmCancellationSuccess { account { id status canSendMessages membersCanSignIn canceledAt "
        "restartableUntil deletionScheduledFor } request { status } }",
        requestId=asked["request"]["id"],
        confirmationToken=asked["confirmationToken"],
        accountName=" Acme ",
    )
    account = done["account"]
    assert (account["status"], account["canSendMessages"], account["membersCanSignIn"]) == ("CANCELED", False, False)
    assert done["request"]["status"] == "EFFECTIVE"
    canceled, until = datetime.fromisoformat(account["canceledAt"]), datetime.fromisoformat(account["restartableUntil"])
    assert until - canceled == timedelta(hours=1440)
    assert account["deletionScheduledFor"] == account["restartableUntil"]

    for who in (ALICE, CAROL, BOB):
        for document in ("{ viewer { name } }", "{ __typename }", "{ plans { code } }"):
            refused = (await house.ask(who, document))["errors"][0]["extensions"]
            assert refused["code"] == "ACCESS_REMOVED"
            assert refused["canceledAt"] == account["canceledAt"]
            assert refused["contact"]["email"] == BILLING

    letters = {letter["To"].addresses[0].addr_spec: letter for letter in await house.letters()}
    assert set(letters) == {ALICE, CAROL}

    restarted = await house.do(
        BILLING,
        "restartAccount",
        "... on RestartAccountSuccess { account { status canceledAt deletionScheduledFor } }",
        accountId=account["id"],
    )
    assert restarted["account"] == {"status": "ACTIVE", "canceledAt": None, "deletionScheduledFor": None}
    status = (await house.ask(BOB, STATUS, id=account["id"]))["data"]["account"]
    assert status["canSendMessages"] is True
    history = await house.ask(
        SUPPORT,
        "query($id: ID!) { account(id: $id) { history { edges { node { type sequence epoch } } } "
        "cancellationRequests { edges { node { status } } } } }",
        id=account["id"],
    )
    steps = [edge["node"] for edge in history["data"]["account"]["history"]["edges"]]
    assert [(one["type"], one["sequence"], one["epoch"]) for one in steps] == [
        ("RESTARTED", 3, 2),
        ("CANCELED", 2, 1),
        ("CANCELLATION_REQUESTED", 1, 0),
    ]
    assert history["data"]["account"]["cancellationRequests"]["edges"] == [{"node": {"status": "REVERTED"}}]
    assert len(await house.letters()) == 4


async def test_an_assisted_plan_goes_to_its_manager_and_a_member_confirms_by_the_link(house: Stage) -> None:
    asked = await house.request_cancellation(GINA, "globex")
    assert asked["__typename"] == "CancellationAssistanceRequested"
    assert asked["customerSuccessManager"]["email"] == CSM
    assert {letter["To"].addresses[0].addr_spec for letter in await house.letters()} == {CSM, GINA}

    queue = await house.ask(CSM, "{ cancellationRequests { edges { node { id ageSeconds respondBy } } } }")
    assert [edge["node"]["id"] for edge in queue["data"]["cancellationRequests"]["edges"]] == [asked["request"]["id"]]

    without_note = await house.request_cancellation(CSM, "globex")
    assert without_note["__typename"] == "InvalidInputError"
    opened = await house.request_cancellation(CSM, "globex", note="Talked to Gina; she is sure.")
    assert opened["__typename"] == "CancelAccountSuccess"
    assert opened["confirmationToken"] is None
    assert opened["request"] == {
        "id": asked["request"]["id"],
        "status": "PENDING_CONFIRMATION",
        "offers": opened["request"]["offers"],
    }

    token = links((await house.letters())[-1])["confirm"]
    page = await house.client.get("/links/confirm", params={"token": token}, follow_redirects=True)
    assert page.status_code == 200
    assert (await house.ask(SUPPORT, STATUS, id=opened["account"]["id"]))["data"]["account"]["status"] == "ACTIVE"
    elsewhere = await house.post("{ viewer { name } }", token=token)
    assert elsewhere.json()["errors"][0]["extensions"]["code"] == "FORBIDDEN"
    wrong = await house.client.post("/links/confirm", data={"token": token, "accountName": "Acme"})
    assert wrong.status_code == 422
    right = await house.client.post("/links/confirm", data={"token": token, "accountName": "Globex"})
    assert right.status_code == 200
    assert (await house.ask(SUPPORT, STATUS, id=opened["account"]["id"]))["data"]["account"]["status"] == "CANCELED"


async def test_a_former_member_asks_for_a_restart_and_says_why_by_the_emailed_links(house: Stage) -> None:
    await house.cancel()
    letter = next(one for one in await house.letters() if one["To"].addresses[0].addr_spec == ALICE)
    granted = links(letter)
    for _ in range(2):
        page = await house.client.post("/links/restart", data={"token": granted["restart"], "note": "We need it"})
        assert page.status_code == 200
    said = await house.client.post(
        "/links/feedback", data={"token": granted["feedback"], "reason": "UNUSED", "comment": "Too quiet"}
    )
    assert said.status_code == 200
    swapped = await house.client.post("/links/restart", data={"token": granted["feedback"]})
    assert swapped.status_code == 401
    found = await house.ask(
        BILLING,
        "{ accounts(filter: {restartRequested: true}) { edges { node { reference status restartRequestedAt "
        "cancellationRequests { edges { node { feedback { reason comment } } } } } } } }",
    )
    (edge,) = found["data"]["accounts"]["edges"]
    assert edge["node"]["reference"] == "acme"
    assert edge["node"]["status"] == "CANCELED"
    assert edge["node"]["cancellationRequests"]["edges"][0]["node"]["feedback"] == [
        {"reason": "UNUSED", "comment": "Too quiet"}
    ]
    to_billing = [one for one in await house.letters() if one["To"].addresses[0].addr_spec == BILLING]
    assert len(to_billing) == 1


async def test_a_link_is_worth_nothing_once_the_permission_is_gone(house: Stage) -> None:
    await house.cancel()
    letter = next(one for one in await house.letters() if one["To"].addresses[0].addr_spec == CAROL)
    await db.execute("UPDATE member SET permissions = '' WHERE email = $1", CAROL)
    page = await house.client.post("/links/restart", data={"token": links(letter)["restart"]})
    assert page.status_code in {404, 409}
    assert not [one for one in await house.letters() if one["To"].addresses[0].addr_spec == BILLING]


async def test_five_wrong_tokens_void_it_however_they_are_batched(house: Stage) -> None:
    asked = await house.request_cancellation()
    wrong = " ".join(
        f'a{index}: confirmCancellation(input: {{requestId: "{asked["request"]["id"]}", confirmationToken: "{index}", '
        f'accountName: "Acme"}}) {{ ... on ConfirmationTokenInvalidError {{ attemptsLeft }} }}'
        for index in range(6)
    )
    answer = await house.ask(ALICE, f"mutation {{ {wrong} }}")
    assert [answer["data"][f"a{index}"]["attemptsLeft"] for index in range(6)] == [4, 3, 2, 1, 0, 0]
    right = {"requestId": asked["request"]["id"], "accountName": "Acme"}
    refused = await house.do(ALICE, "confirmCancellation", confirmationToken=asked["confirmationToken"], **right)
    assert refused["__typename"] == "ConfirmationTokenInvalidError"
    again = await house.request_cancellation()
    assert again["request"]["id"] == asked["request"]["id"]
    assert again["confirmationToken"] != asked["confirmationToken"]
    done = await house.do(ALICE, "confirmCancellation", confirmationToken=again["confirmationToken"], **right)
    assert done["__typename"] == "ConfirmCancellationSuccess"


async def test_an_accepted_offer_saves_the_account_and_is_not_made_again_within_its_cooldown(house: Stage) -> None:
    asked = await house.request_cancellation(reason="TOO_EXPENSIVE")
    offers = {offer["code"]: offer["id"] for offer in asked["request"]["offers"]}
    assert "discount-3-months" in offers
    taken = await house.do(
        ALICE,
        "acceptOffer",
        "... on AcceptOfferSuccess { offer { status } account { status openRequest { id } } }",
        offerId=offers["discount-3-months"],
    )
    assert taken["offer"]["status"] == "ACCEPTED"
    assert taken["account"] == {"status": "ACTIVE", "openRequest": None}
    assert [one["To"].addresses[0].addr_spec for one in await house.letters()] == [BILLING]
    again = await house.request_cancellation(reason="TOO_EXPENSIVE")
    assert "discount-3-months" not in {offer["code"] for offer in again["request"]["offers"]}


async def test_feedback_and_offers_never_stand_in_the_way(house: Stage) -> None:
    asked = await house.request_cancellation(reason="UNUSED")
    done = await house.do(
        ALICE,
        "confirmCancellation",
        requestId=asked["request"]["id"],
        confirmationToken=asked["confirmationToken"],
        accountName="Acme",
    )
    assert done["__typename"] == "ConfirmCancellationSuccess"


async def test_a_colleague_withdraws_and_asks_anew(house: Stage) -> None:
    asked = await house.request_cancellation()
    other = await house.request_cancellation(CAROL)
    assert other["__typename"] == "CancellationAlreadyRequestedError"
    withdrawn = await house.do(
        CAROL,
        "withdrawCancellation",
        "... on WithdrawCancellationSuccess { account { openRequest { id } } }",
        accountId=asked["account"]["id"],
    )
    assert withdrawn["account"]["openRequest"] is None
    assert (await house.request_cancellation(CAROL))["__typename"] == "CancelAccountSuccess"


async def test_a_plan_that_became_assisted_is_not_confirmed_alone(house: Stage) -> None:
    asked = await house.request_cancellation()
    await db.execute("UPDATE account SET plan_code = 'premium' WHERE reference = 'acme'")
    refused = await house.do(
        ALICE,
        "confirmCancellation",
        "... on AssistedPlanError { customerSuccessManager { email } }",
        requestId=asked["request"]["id"],
        confirmationToken=asked["confirmationToken"],
        accountName="Acme",
    )
    assert refused["__typename"] == "AssistedPlanError"
    handed = await house.request_cancellation()
    assert handed["__typename"] == "CancellationAssistanceRequested"
    assert handed["request"]["id"] == asked["request"]["id"]


async def test_the_same_key_has_one_effect_and_other_input_is_refused(house: Stage) -> None:
    first = await house.request_cancellation(idempotencyKey="k1")
    again = await house.request_cancellation(idempotencyKey="k1")
    assert again == first
    other = await house.request_cancellation(idempotencyKey="k1", reason="UNUSED")
    assert other["__typename"] == "IdempotencyConflictError"
    stranger = await house.request_cancellation(GINA, "globex", idempotencyKey="k1")
    assert stranger["__typename"] == "CancellationAssistanceRequested"


async def test_a_request_not_confirmed_in_time_expires(house: Stage) -> None:
    asked = await house.request_cancellation()
    await db.execute("UPDATE cancellation_request SET confirmation_expires_at = requested_at")
    confirm = {
        "requestId": asked["request"]["id"],
        "confirmationToken": asked["confirmationToken"],
        "accountName": "Acme",
    }
    late = await house.do(ALICE, "confirmCancellation", **confirm)
    assert late["__typename"] == "ConfirmationExpiredError"
    assert await house.timers().run() == 1
    assert await house.timers().run() == 0
    fresh = await house.request_cancellation()
    assert fresh["request"]["id"] != asked["request"]["id"]


async def test_a_period_end_plan_is_scheduled_can_be_withdrawn_and_takes_effect_when_due(
    database: Database, tmp_path: Path
) -> None:
    plans = dict(policy.load().plans)
    plans["essentials"] = replace(
        plans["essentials"], effective=CancellationTiming.PERIOD_END, channel=Channel.SELF_SERVE
    )
    async with stage(database, tmp_path, plans=plans) as house:
        end = datetime.now(UTC) + timedelta(days=10)
        await db.execute("UPDATE account SET current_period_end = $1 WHERE reference = 'acme'", end)
        done = await house.cancel()
        assert done["account"]["status"] == "CANCELLATION_SCHEDULED"
        assert done["account"]["canSendMessages"] is True
        withdrawn = await house.do(ALICE, "withdrawCancellation", accountId=done["account"]["id"])
        assert withdrawn["__typename"] == "WithdrawCancellationSuccess"
        await house.cancel()
        assert await house.timers().run() == 0
        await db.execute(
            "UPDATE cancellation_request SET confirmed_at = requested_at, effective_at = requested_at "
            "WHERE status = 'CONFIRMED'"
        )
        await db.execute("UPDATE account SET cancellation_effective_at = created_at WHERE reference = 'acme'")
        assert await house.timers().run() == 1
        refused = await house.ask(BOB, "{ viewer { name } }")
        assert refused["errors"][0]["extensions"]["code"] == "ACCESS_REMOVED"


async def test_after_the_window_a_restart_says_to_set_up_a_new_account(house: Stage) -> None:
    done = await house.cancel()
    past = datetime.now(UTC) - timedelta(minutes=1)
    await db.execute(
        "UPDATE account SET canceled_at = $1, restartable_until = $2, deletion_scheduled_for = $2, "
        "reminder_due_at = NULL WHERE reference = 'acme'",
        past - timedelta(days=60),
        past,
    )
    refused = await house.do(
        BILLING,
        "restartAccount",
        "... on RestartWindowClosedError { closedAt contact { email } }",
        accountId=done["account"]["id"],
    )
    assert refused["__typename"] == "RestartWindowClosedError"
    assert "new account" in refused["message"]


@pytest.mark.parametrize("who", [ALICE, BOB, SUPPORT, CSM])
async def test_only_the_billing_team_restarts(house: Stage, who: str) -> None:
    account = await house.account_id("globex")
    refused = await house.do(who, "restartAccount", accountId=account)
    assert refused["__typename"] == ("NotFoundError" if who in {ALICE, BOB} else "PermissionDeniedError")


async def test_a_manager_who_left_is_asked_nothing(house: Stage) -> None:
    """The request goes to the team, and to every manager's queue."""
    await db.execute("UPDATE staff SET deactivated_at = created_at WHERE email = $1", CSM)
    asked = await house.request_cancellation(GINA, "globex")
    assert asked["customerSuccessManager"]["email"] == "success@vendor.example"
    assert {letter["To"].addresses[0].addr_spec for letter in await house.letters()} == {"success@vendor.example", GINA}


async def test_a_used_up_token_of_an_opened_request_is_mailed_anew_and_old_links_burn_nothing(house: Stage) -> None:
    opened = await house.request_cancellation(CSM, "globex", note="They are sure.")
    old = links((await house.letters())[-1])["confirm"]
    await db.execute("UPDATE cancellation_request SET wrong_tries = 5")
    await house.request_cancellation(CSM, "globex", note="Again.")
    new = links((await house.letters())[-1])["confirm"]
    assert new != old
    for _ in range(6):
        refused = await house.do_as(old, "confirmCancellation", requestId=opened["request"]["id"], accountName="Globex")
        assert refused["__typename"] == "ConfirmationTokenInvalidError"
    done = await house.do_as(new, "confirmCancellation", requestId=opened["request"]["id"], accountName="Globex")
    assert done["__typename"] == "ConfirmCancellationSuccess"


async def test_a_plan_that_became_self_served_is_confirmed_alone(house: Stage) -> None:
    asked = await house.request_cancellation(GINA, "globex")
    await db.execute("UPDATE account SET plan_code = 'essentials' WHERE reference = 'globex'")
    again = await house.request_cancellation(GINA, "globex")
    assert again["__typename"] == "CancelAccountSuccess"
    assert again["request"]["id"] == asked["request"]["id"]
    assert again["confirmationToken"]


async def test_mutations_of_one_document_see_what_those_before_them_did(house: Stage) -> None:
    asked = await house.request_cancellation()
    said = "submitFeedback(input: {requestId: %s, reason: %s}) { ... on SubmitFeedbackSuccess { offers { code } } }"
    request = f'"{asked["request"]["id"]}"'
    both = f"mutation {{ a: {said % (request, 'OTHER')} b: {said % (request, 'TOO_EXPENSIVE')} }}"
    answer = (await house.ask(ALICE, both))["data"]
    assert "discount-3-months" not in {offer["code"] for offer in answer["a"]["offers"]}
    assert "discount-3-months" in {offer["code"] for offer in answer["b"]["offers"]}


async def test_everybody_learns_who_they_are(house: Stage) -> None:
    answer = await house.ask(BOB, "{ viewer { memberships { edges { node { member { name email } } } } } }")
    assert answer["data"]["viewer"]["memberships"]["edges"][0]["node"]["member"]["email"] == BOB
