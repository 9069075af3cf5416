"""Who is a member: the host's last word, also while the account is canceled; and never somebody who is staff."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app import db, policy, provisioning
from app.db import Database
from app.graphql import nodes
from app.graphql.nodes import Kind
from app.lifecycle import CancellationTiming, MemberRole, Permission, Scope, StaffRole
from app.models import Account, CancellationRequest, Member
from app.tokens import DEVELOPMENT_ISSUER
from tests.api.test_story import links
from tests.cast import ALICE, BILLING, BOB, CAROL, CSM, GATEKEEPER, HOST, SUPPORT, Stage, stage, subject
from tests.ending import DAY, StoppedClock, promised, steps

BILLING_PERMISSION = Permission.ACCESS_BILLING_AND_ACCOUNT_INFO.value
MEMBERS: dict[str, dict[str, Any]] = {
    ALICE: {"subject": subject(ALICE), "email": ALICE, "name": "Alice Adams", "role": "ADMIN"},
    CAROL: {
        "subject": subject(CAROL),
        "email": CAROL,
        "name": "Carol Clark",
        "role": "MEMBER",
        "permissions": [BILLING_PERMISSION],
    },
    BOB: {"subject": subject(BOB), "email": BOB, "name": "Bob Brandt", "role": "MEMBER"},
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StoppedClock:
    return StoppedClock(monkeypatch)


async def name_members(house: Stage, *members: str | dict[str, Any], reference: str = "acme") -> dict[str, Any]:
    """The host says who Acme's members are; what it is answered."""
    account = await Account.get(reference=reference)
    given = [{"issuer": DEVELOPMENT_ISSUER, **(MEMBERS[one] if isinstance(one, str) else one)} for one in members]
    answer = await house.do(
        HOST,
        "syncAccounts",
        "... on SyncAccountsSuccess { results { outcome membersAdded membersChanged membersRemoved "
        "error { field message } membersRefused { field message } } }",
        accounts=[
            {
                "reference": reference,
                "name": account.name,
                "planCode": account.plan_code,
                "currentPeriodEnd": account.current_period_end and account.current_period_end.isoformat(),
                "members": given,
            }
        ],
    )
    (result,) = answer["results"]
    return dict(result)


def outcome(kind: str, *, added: int = 0, changed: int = 0, removed: int = 0) -> dict[str, Any]:
    return {
        "outcome": kind,
        "membersAdded": added,
        "membersChanged": changed,
        "membersRemoved": removed,
        "error": None,
        "membersRefused": [],
    }


async def listed(reference: str) -> set[str]:
    """The addresses of the rows, whomever they make a member."""
    return {member.email for member in await Member.filter(account__reference=reference)}


async def restart(house: Stage) -> dict[str, Any]:
    return await house.do(
        BILLING,
        "restartAccount",
        "... on RestartAccountSuccess { account { status } membersRegainingAccess }",
        accountId=await house.account_id("acme"),
    )


async def code(house: Stage, who: str, document: str = "{ viewer { name } }") -> str | None:
    """The error that somebody's question is answered with."""
    answer = await house.ask(who, document)
    return answer["errors"][0]["extensions"]["code"] if "errors" in answer else None


async def by_link(house: Stage, token: str, purpose: str) -> str:
    """What comes of doing what a link of an email is for."""
    if purpose == "restart":
        answer = await house.do_as(token, "requestRestart")
    else:
        request = await CancellationRequest.get(account__reference="acme")
        request_id = nodes.encode(Kind.CANCELLATION_REQUEST, request.id)
        answer = await house.do_as(token, "submitFeedback", requestId=request_id, reason="UNUSED")
    return str(answer["__typename"] if "__typename" in answer else answer["extensions"]["code"])


# ---------------------------------------------------------------------------------- the host's word, in the window


async def test_a_member_whom_the_host_removes_in_the_window_does_not_return_with_a_restart(house: Stage) -> None:
    """With the token of before the cancellation, which is still good."""
    before = house.token(ALICE)
    await house.cancel()
    assert await name_members(house, CAROL, BOB) == outcome("UPDATED", removed=1)
    assert await name_members(house, CAROL, BOB) == outcome("UNCHANGED")
    done = await restart(house)
    assert done == {
        "__typename": "RestartAccountSuccess",
        "account": {"status": "ACTIVE"},
        "membersRegainingAccess": 2,
    }
    answer = await house.do_as(before, "cancelAccount", accountId=await house.account_id("acme"))
    assert answer["extensions"]["code"] == "FORBIDDEN"
    assert [await code(house, who) for who in (ALICE, CAROL, BOB)] == ["FORBIDDEN", None, None]


async def test_the_links_of_a_member_who_is_removed_in_the_window_are_dead_at_once(house: Stage) -> None:
    await house.cancel()
    mailed = {letter["To"].addresses[0].addr_spec: links(letter) for letter in await house.letters()}
    assert set(mailed) == {ALICE, CAROL}
    await name_members(house, CAROL, BOB)
    for purpose in ("feedback", "restart"):
        assert await by_link(house, mailed[ALICE][purpose], purpose) == "FORBIDDEN"
        page = await house.client.get(
            f"/links/{purpose}", params={"token": mailed[ALICE][purpose]}, follow_redirects=True
        )
        assert page.status_code == 403
        assert "Acme" not in page.text
        page = await house.client.get(
            f"/links/{purpose}", params={"token": mailed[CAROL][purpose]}, follow_redirects=True
        )
        assert page.status_code == 200
    assert await by_link(house, mailed[CAROL]["feedback"], "feedback") == "SubmitFeedbackSuccess"
    assert await by_link(house, mailed[CAROL]["restart"], "restart") == "RequestRestartSuccess"


async def test_emails_of_the_window_go_to_whom_the_host_names_by_then(house: Stage, clock: StoppedClock) -> None:
    """To the address that it names, with the permission that it grants."""
    await house.cancel()
    account_id = await house.account_key("acme")
    moved = MEMBERS[CAROL] | {"email": "carol@new.example"}
    promoted = MEMBERS[BOB] | {"role": "ADMIN"}
    newcomer = {"subject": "member:nora@acme.example", "email": "nora@acme.example", "name": "Nora", "role": "ADMIN"}
    told = await name_members(house, moved, promoted, newcomer)
    assert told == outcome("UPDATED", added=1, changed=2, removed=1)
    clock.forward(58 * DAY)
    await house.worker().drain()
    named = {"carol@new.example": 1, BOB: 1, "nora@acme.example": 1}
    assert await promised(account_id, "deletion-reminder") == named
    assert (await restart(house))["membersRegainingAccess"] == 3
    assert await promised(account_id, "account-restarted") == named


async def test_a_member_whom_the_host_names_again_is_back_with_the_restart_or_after_it(house: Stage) -> None:
    await house.cancel()
    assert await name_members(house) == outcome("UPDATED", removed=3)
    assert await name_members(house, ALICE) == outcome("UPDATED", added=1)
    assert (await restart(house))["membersRegainingAccess"] == 1
    assert [await code(house, who) for who in (ALICE, CAROL)] == [None, "FORBIDDEN"]
    assert await name_members(house, ALICE, CAROL) == outcome("UPDATED", added=1)
    assert [await code(house, who) for who in (ALICE, CAROL)] == [None, None]


async def test_an_account_without_members_is_reminded_of_by_event_alone_and_can_be_restarted(
    house: Stage, clock: StoppedClock
) -> None:
    """A host that drops everybody with the cancellation: the systems are told, no person is; what was promised before,
    the confirmation of the cancellation, is delivered."""
    await house.cancel()
    account_id = await house.account_key("acme")
    assert await name_members(house) == outcome("UPDATED", removed=3)
    assert {letter["To"].addresses[0].addr_spec for letter in await house.letters()} == {ALICE, CAROL}
    clock.forward(58 * DAY)
    await house.worker().drain()
    assert await promised(account_id, "deletion-reminder") == {}
    assert (await steps(account_id))[-1] == "deletion_reminder"
    assert (await restart(house))["membersRegainingAccess"] == 0
    assert await code(house, ALICE) == "FORBIDDEN"


async def test_an_account_whose_members_were_removed_is_deleted_like_any_other(
    house: Stage, clock: StoppedClock
) -> None:
    await house.cancel()
    account_id = await house.account_key("acme")
    await name_members(house, BOB)
    clock.forward(61 * DAY)
    await house.worker().drain()
    clock.forward(DAY)
    await house.worker().drain()
    assert (await steps(account_id))[-1] == "deleted"
    assert await promised(account_id, "account-deleted") == {}, "Bob never had the permission"


async def test_members_that_a_sync_does_not_list_stay(house: Stage) -> None:
    await house.cancel()
    answer = await house.do(
        HOST,
        "syncAccounts",
        "... on SyncAccountsSuccess { results { outcome membersRemoved } }",
        accounts=[{"reference": "acme", "name": "Acme", "planCode": "startup"}],
    )
    assert answer["results"] == [{"outcome": "UPDATED", "membersRemoved": 0}]
    assert (await restart(house))["membersRegainingAccess"] == 3


async def test_a_restart_that_is_repeated_with_its_key_tells_what_it_did(house: Stage) -> None:
    await house.cancel()
    given = {"accountId": await house.account_id("acme"), "idempotencyKey": "k"}
    selection = "... on RestartAccountSuccess { membersRegainingAccess }"
    first = await house.do(BILLING, "restartAccount", selection, **given)
    await name_members(house, ALICE)
    assert await house.do(BILLING, "restartAccount", selection, **given) == first
    assert first["membersRegainingAccess"] == 3
    await db.execute("UPDATE idempotency_record SET answer = '{}'")  # of a version that did not remember it
    assert (await house.do(BILLING, "restartAccount", selection, **given))["membersRegainingAccess"] == 1


async def test_who_confirmed_and_was_removed_before_it_takes_effect_is_told_nothing_more(
    database: Database, tmp_path: Path, clock: StoppedClock
) -> None:
    plans = dict(policy.load().plans)
    plans["essentials"] = replace(plans["essentials"], effective=CancellationTiming.PERIOD_END)
    async with stage(database, tmp_path, plans=plans) as house:
        await Account.filter(reference="acme").update(current_period_end=clock.now + 10 * DAY)
        assert (await house.cancel())["account"]["status"] == "CANCELLATION_SCHEDULED"
        account_id = await house.account_key("acme")
        await name_members(house, CAROL, BOB)
        clock.forward(11 * DAY)
        await house.worker().drain()
        assert await promised(account_id, "cancellation-confirmed") == {}
        assert await promised(account_id, "cancellation-notice") == {CAROL: 1}


# -------------------------------------------------------------------------------------- staff and services are none


@pytest.mark.parametrize("who", [CSM, SUPPORT, BILLING, HOST, GATEKEEPER])
async def test_staff_and_services_cannot_be_named_as_members(house: Stage, who: str) -> None:
    """Else the host's own secret could name itself an admin and cancel, or make a manager confirm."""
    insider = {"subject": subject(who), "email": "insider@vendor.example", "name": "Insider", "role": "ADMIN"}
    told = await name_members(house, ALICE, insider, BOB)
    (refused,) = told.pop("membersRefused")
    assert refused["field"] == "members[1].subject"
    assert ("belongs to a service" if who in {HOST, GATEKEEPER} else "belongs to staff") in refused["message"]
    assert told | {"membersRefused": []} == outcome("UPDATED", removed=1)
    assert await listed("acme") == {ALICE, BOB}
    answer = await house.do(who, "cancelAccount", accountId=await house.account_id("acme"))
    assert answer["__typename"] in {"NotFoundError", "PermissionDeniedError", "InvalidInputError"}


@pytest.mark.parametrize("becomes", ["staff", "a service"])
async def test_the_hosts_word_about_the_others_holds_when_somebody_it_lists_became_one(
    house: Stage, becomes: str
) -> None:
    """Carol was fired. That Bob, who is listed as always, works for the company now must not keep her in."""
    asked = await house.request_cancellation(CAROL)
    if becomes == "staff":
        await hire(BOB, StaffRole.SUPPORT)
    else:
        await provisioning.add_service(
            name="bot", scopes=frozenset({Scope.GATE}), issuer=DEVELOPMENT_ISSUER, subject=subject(BOB)
        )
    newcomer = {"subject": "member:nora@acme.example", "email": "nora@acme.example", "name": "Nora", "role": "MEMBER"}
    given = (BOB, MEMBERS[ALICE] | {"name": "Alice Ames"}, newcomer)
    told = await name_members(house, *given)
    (refused,) = told.pop("membersRefused")
    assert (refused["field"], f"belongs to {becomes}" in refused["message"]) == ("members[0].subject", True)
    assert told | {"membersRefused": []} == outcome("UPDATED", added=1, changed=1, removed=2)
    assert await listed("acme") == {ALICE, "nora@acme.example"}
    assert await code(house, CAROL) == "FORBIDDEN"
    answer = await house.do_as(
        house.token(CAROL),
        "confirmCancellation",
        requestId=asked["request"]["id"],
        confirmationToken=asked["confirmationToken"],
        accountName="Acme",
    )
    assert answer["extensions"]["code"] == "FORBIDDEN"
    assert await name_members(house, *given) == outcome("UNCHANGED") | {"membersRefused": [refused]}
    told = await name_members(house, BOB, newcomer)
    assert told == outcome("UPDATED", removed=1) | {"membersRefused": [refused]}, "nothing is frozen"

    if becomes == "staff":
        await provisioning.deactivate_staff("hired@vendor.example")
    else:
        await provisioning.deactivate_service("bot")
    assert await code(house, BOB) == "FORBIDDEN", "nobody comes back but by the host's word"
    assert await name_members(house, BOB, newcomer) == outcome("UPDATED", added=1)
    assert await code(house, BOB) is None


async def test_it_holds_in_the_window_too(house: Stage) -> None:
    await house.cancel()
    await hire(BOB, StaffRole.SUPPORT)
    told = await name_members(house, ALICE, BOB)
    assert (told["outcome"], told["membersRemoved"], len(told["membersRefused"])) == ("UPDATED", 2, 1)
    assert (await restart(house))["membersRegainingAccess"] == 1
    assert [await code(house, who) for who in (ALICE, CAROL)] == [None, "FORBIDDEN"]


async def test_a_list_of_nobody_else_removes_everybody(house: Stage) -> None:
    await hire(BOB, StaffRole.SUPPORT)
    told = await name_members(house, BOB)
    assert (told["outcome"], told["membersRemoved"], len(told["membersRefused"])) == ("UPDATED", 3, 1)
    assert await listed("acme") == set()


async def test_the_subject_of_staff_at_another_issuer_is_somebody_else(house: Stage) -> None:
    other = {
        "issuer": "https://other.example/",
        "subject": subject(CSM),
        "email": "x@acme.example",
        "name": "X",
        "role": "ADMIN",
    }
    assert (await name_members(house, ALICE, other))["outcome"] == "UPDATED"


async def test_staff_who_has_left_can_be_a_member(house: Stage) -> None:
    await provisioning.deactivate_staff(SUPPORT)
    await provisioning.deactivate_service(GATEKEEPER)
    people = [
        {"subject": subject(who), "email": f"{who[:4]}@acme.example", "name": who, "role": "ADMIN"}
        for who in (SUPPORT, GATEKEEPER)
    ]
    assert await name_members(house, ALICE, *people) == outcome("UPDATED", added=2, removed=2)
    assert await code(house, SUPPORT) is None


async def hire(who: str, role: StaffRole = StaffRole.CUSTOMER_SUCCESS_MANAGER) -> None:
    """A member becomes staff."""
    await provisioning.add_staff(
        email="hired@vendor.example", name="Hired", role=role, issuer=DEVELOPMENT_ISSUER, subject=subject(who)
    )


VIEWER = "{ viewer { staffRole memberships { edges { node { account { reference } } } } } }"


@pytest.mark.parametrize("role", StaffRole)
async def test_a_member_who_becomes_staff_is_no_member_while_they_are(house: Stage, role: StaffRole) -> None:
    asked = await house.request_cancellation(CAROL)
    await hire(CAROL, role)
    confirmation = {
        "requestId": asked["request"]["id"],
        "confirmationToken": asked["confirmationToken"],
        "accountName": "Acme",
    }
    refused = await house.do(CAROL, "confirmCancellation", **confirmation)
    assert refused["__typename"] == "PermissionDeniedError"
    assert "staff never does" in refused["message"]
    offer = asked["request"]["offers"][0]["id"]
    for mutation, given in (
        ("acceptOffer", {"offerId": offer}),
        ("declineOffer", {"offerId": offer}),
        ("submitFeedback", {"requestId": asked["request"]["id"], "reason": "UNUSED"}),
    ):
        assert (await house.do(CAROL, mutation, **given))["__typename"] == "PermissionDeniedError"
    viewer = (await house.ask(CAROL, VIEWER))["data"]["viewer"]
    assert viewer == {"staffRole": role.value, "memberships": {"edges": []}}

    await provisioning.deactivate_staff("hired@vendor.example")
    viewer = (await house.ask(CAROL, VIEWER))["data"]["viewer"]
    assert viewer["memberships"]["edges"] == [{"node": {"account": {"reference": "acme"}}}]
    assert (await house.do(CAROL, "confirmCancellation", **confirmation))["__typename"] == "ConfirmCancellationSuccess"


async def test_what_such_staff_does_is_done_as_staff(house: Stage) -> None:
    """The history names them so, and a note is wanted."""
    await hire(ALICE, StaffRole.BILLING_TEAM)
    account_id = await house.account_id("acme")
    refused = await house.do(ALICE, "cancelAccount", accountId=account_id)
    assert refused["__typename"] == "InvalidInputError"
    opened = await house.do(
        ALICE,
        "cancelAccount",
        "... on CancelAccountSuccess { confirmationToken request { requestedBy { kind } } "
        "preview { membersLosingAccess } }",
        accountId=account_id,
        note="They called.",
    )
    assert opened["confirmationToken"] is None
    assert opened["request"]["requestedBy"]["kind"] == "STAFF"
    assert opened["preview"]["membersLosingAccess"] == 2
    asked = [letter["To"].addresses[0].addr_spec for letter in await house.letters()]
    assert asked == [CAROL], "who may confirm is asked to"


async def test_the_links_of_a_member_who_became_staff_are_dead_while_they_are(house: Stage) -> None:
    await house.cancel()
    mailed = {letter["To"].addresses[0].addr_spec: links(letter) for letter in await house.letters()}
    await hire(CAROL, StaffRole.SUPPORT)
    for purpose in ("feedback", "restart"):
        assert await by_link(house, mailed[CAROL][purpose], purpose) == "NotFoundError"
    await provisioning.deactivate_staff("hired@vendor.example")
    assert await by_link(house, mailed[CAROL]["restart"], "restart") == "RequestRestartSuccess"


async def test_members_who_are_staff_are_not_written_to_as_members(house: Stage, clock: StoppedClock) -> None:
    await house.cancel()
    account_id = await house.account_key("acme")
    await hire(CAROL)
    clock.forward(58 * DAY)
    await house.worker().drain()
    assert await promised(account_id, "deletion-reminder") == {ALICE: 1}
    assert (await restart(house))["membersRegainingAccess"] == 2


async def test_a_service_that_is_listed_as_a_member_is_none(house: Stage) -> None:
    """Whatever came first: a service that is added for somebody who is listed already."""
    await Member.create(
        id=db.uuid7(),
        account_id=await house.account_key("acme"),
        issuer=DEVELOPMENT_ISSUER,
        subject=subject(HOST),
        email="host@vendor.example",
        name="Host",
        role=MemberRole.ADMIN,
        permissions=frozenset(),
        created_at=await db.now(),
    )
    account_id = await house.account_id("acme")
    assert (await house.ask(HOST, f'{{ account(id: "{account_id}") {{ name }} }}'))["data"] == {"account": None}
    assert (await house.do(HOST, "cancelAccount", accountId=account_id))["__typename"] == "NotFoundError"
    listed = await house.ask(
        BILLING, f'{{ account(id: "{account_id}") {{ members {{ edges {{ node {{ email }} }} }} }} }}'
    )
    emails = {edge["node"]["email"] for edge in listed["data"]["account"]["members"]["edges"]}
    assert emails == {ALICE, CAROL, BOB}
