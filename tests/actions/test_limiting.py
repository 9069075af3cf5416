"""Rate limits: an allowance for each caller and each account, counted by the database for all processes together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import httpx2
import pytest
from graphql import GraphQLEnumType, GraphQLInputObjectType, GraphQLNonNull, get_named_type, get_nullable_type

from app import cancellation, db, errors, feedback, limiting, main
from app.auth import Call
from app.graphql.schema import SCHEMA
from app.lifecycle import FeedbackReason, LinkPurpose, Relation
from app.messages import LinkGrant
from app.models import RateLimit
from tests.cast import ALICE, BILLING, BOB, CAROL, CSM, FINANCE, GINA, HOST, SUPPORT, Stage, subject

MINUTE = timedelta(minutes=1)
UNLIMITED_MUTATIONS = {"syncAccounts", "acknowledgeEnforcement", "advanceClock"}
"""The host's provisioning, which has to keep up with the host; acknowledgements, which have to keep up with a wave of
cancellations; and the clock of development."""

GRAPHQL_JSON = "application/graphql-response+json"
WITHDRAW = "withdrawCancellation(input: {accountId: $id}) { __typename }"


@asynccontextmanager
async def service(house: Stage, *, caller: int = 0, account: int = 0) -> AsyncIterator[Stage]:
    """Another service on the house's database, with connections of its own and these limits."""
    installation = replace(house.installation, rate_limit_caller=caller, rate_limit_account=account)
    app = main.create_app(house.settings, installation)
    transport = httpx2.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://sunset.test") as client,
    ):
        yield replace(house, app=app, installation=installation, client=client)


async def attempt(call: Call, reference: str = "acme", *, house: Stage) -> str:
    """What came of trying to withdraw a cancellation that nobody has asked for: refused, and counted all the same."""
    try:
        await cancellation.withdraw(call, await house.account_key(reference))
    except (errors.Refusal, errors.RequestError) as refusal:
        return type(refusal).__name__
    raise AssertionError("there is nothing to withdraw")


def what(answer: dict[str, Any]) -> str:
    """The name of what a mutation was answered with."""
    return str(answer.get("__typename") or answer["extensions"]["code"])


async def attempts(count: int, who: str, reference: str = "acme", *, house: Stage) -> list[str]:
    call = await house.call(who)
    return [await attempt(call, reference, house=house) for _ in range(count)]


async def is_let_through(call: Call) -> bool:
    try:
        await limiting.spend(call)
    except errors.RateLimited:
        return False
    return True


async def pass_by(time: timedelta) -> None:
    """As if the time had passed: all allowances are whole again so much earlier."""
    for row in await RateLimit.all():
        await RateLimit.filter(key=row.key).update(whole_at=row.whole_at - time)


async def test_attempts_that_the_action_refuses_count_and_come_back_one_by_one(house: Stage) -> None:
    house.installation = replace(house.installation, rate_limit_caller=3)
    done, limited = "AccountStateRefused", "RateLimited"
    assert await attempts(5, ALICE, house=house) == [done, done, done, limited, limited]
    await pass_by(MINUTE / 3)
    assert await attempts(2, ALICE, house=house) == [done, limited]
    await pass_by(MINUTE)
    assert await attempts(4, ALICE, house=house) == [done, done, done, limited]


async def test_a_refused_attempt_uses_nothing_and_says_how_long_to_wait(house: Stage) -> None:
    house.installation = replace(house.installation, rate_limit_caller=1)
    await attempts(1, ALICE, house=house)
    before = await RateLimit.all().values("key", "whole_at")
    waits = []
    for _ in range(5):
        with pytest.raises(errors.RateLimited) as refused:
            await limiting.spend(await house.call(ALICE))
        assert refused.value.extensions == {"code": "RATE_LIMITED", "retryAfter": refused.value.retry_after}
        assert f"{refused.value.retry_after} second" in refused.value.message
        waits.append(refused.value.retry_after)
    assert await RateLimit.all().values("key", "whole_at") == before
    assert 0 < min(waits) <= max(waits) <= 60
    await pass_by(timedelta(seconds=max(waits)))
    await limiting.spend(await house.call(ALICE))


@pytest.mark.parametrize("per_minute", [1, 7, 59, 61, 997])
async def test_the_allowance_is_a_minutes_number_whatever_the_number(house: Stage, per_minute: int) -> None:
    """Also where a minute is no multiple of it: never one more at once, and never more in a minute than that."""
    house.installation = replace(house.installation, rate_limit_caller=per_minute)
    call, used = await house.call(ALICE), 0
    began = await db.database_now()
    while await is_let_through(call):
        used += 1
    passed = await db.database_now() - began
    assert per_minute <= used <= per_minute + passed / (MINUTE / per_minute)


async def test_the_limits_are_off_when_they_are_zero(house: Stage) -> None:
    assert set(await attempts(30, ALICE, house=house)) == {"AccountStateRefused"}
    assert await RateLimit.all().count() == 0


async def test_of_many_at_the_same_time_exactly_the_allowance_gets_through(house: Stage) -> None:
    """200 callers' tasks of one caller. What comes back while they run counts with them."""
    house.installation = replace(house.installation, rate_limit_caller=5, rate_limit_account=0)
    call = await house.call(ALICE)
    began = await db.database_now()
    outcomes = await asyncio.gather(*(limiting.spend(call) for _ in range(200)), return_exceptions=True)
    passed = await db.database_now() - began
    through = sum(one is None for one in outcomes)
    assert {type(one) for one in outcomes} == {type(None), errors.RateLimited}
    assert 5 <= through <= 5 + passed / (MINUTE / 5)


async def test_of_many_people_at_the_same_time_exactly_the_accounts_allowance_gets_through(house: Stage) -> None:
    """And to those who were refused for the account's sake, their own allowance is given back."""
    house.installation = replace(house.installation, rate_limit_caller=100, rate_limit_account=6)
    account_id, people = await house.account_key("acme"), [await house.call(who) for who in (ALICE, CAROL)]
    began = await db.database_now()
    outcomes = await asyncio.gather(
        *(limiting.spend(people[number % 2], account_id, Relation.BILLING_MEMBER) for number in range(60)),
        return_exceptions=True,
    )
    now = await db.database_now()
    through = sum(one is None for one in outcomes)
    assert 6 <= through <= 6 + (now - began) / (MINUTE / 6)
    used = timedelta()
    for person in people:
        row = await RateLimit.get_or_none(key=limiting.caller_key(person.identity.issuer, person.identity.subject))
        used += max(row.whole_at - began, timedelta()) if row else timedelta()
    assert used <= through * MINUTE / 100 + 2 * (now - began)


async def test_two_services_count_together(house: Stage) -> None:
    async with service(house, caller=4) as one, service(house, caller=4) as other:
        variables = {"id": await house.account_id("acme")}
        document = f"mutation($id: ID!) {{ {WITHDRAW} }}"
        statuses = [
            (await stage.post(document, variables, token=house.token(ALICE))).status_code
            for stage in (one, other, one, other, one, other)
        ]
    assert statuses == [200, 200, 200, 200, 429, 429]


@pytest.mark.postgres
async def test_two_services_count_together_at_the_same_time(postgres_house: Stage) -> None:
    """Each through connections of its own, as processes do: what was counted in memory would let twice as many by."""
    house = postgres_house
    async with service(house, account=8) as one, service(house, account=8) as other:
        variables = {"id": await house.account_id("acme")}
        document = f"mutation($id: ID!) {{ {WITHDRAW} }}"
        people = (ALICE, CAROL)
        began = await db.database_now()
        answers = await asyncio.gather(
            *(
                stage.post(document, variables, token=house.token(people[number % 2]))
                for number in range(50)
                for stage in (one, other)
            )
        )
        passed = await db.database_now() - began
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert 8 <= statuses.count(200) <= 8 + passed / (MINUTE / 8)


async def test_everybody_who_manages_an_account_uses_its_allowance_and_nobody_elses(house: Stage) -> None:
    house.installation = replace(house.installation, rate_limit_account=2)
    for who in (ALICE, CAROL):
        assert await attempts(1, who, house=house) == ["AccountStateRefused"]
    for who in (ALICE, CAROL):
        assert await attempts(1, who, house=house) == ["RateLimited"]
    assert await attempts(1, GINA, "globex", house=house) == ["AccountStateRefused"]


async def test_a_member_without_a_say_uses_up_nothing_of_the_accounts(house: Stage) -> None:
    house.installation = replace(house.installation, rate_limit_account=1)
    assert await attempts(5, BOB, house=house) == ["PermissionDenied"] * 5
    assert await attempts(2, ALICE, house=house) == ["AccountStateRefused", "RateLimited"]


async def test_staff_who_is_listed_as_a_member_uses_up_nothing_of_the_members(house: Stage) -> None:
    """The host lists who they please; staff has no member's relation, and is refused before anything is counted."""
    house.installation = replace(house.installation, rate_limit_account=1)
    await db.execute("UPDATE member SET subject = $1 WHERE email = $2", subject(SUPPORT), CAROL)
    assert await attempts(3, SUPPORT, house=house) == ["PermissionDenied"] * 3
    assert await attempts(2, ALICE, house=house) == ["AccountStateRefused", "RateLimited"]


async def test_members_cannot_lock_the_billing_team_out(house: Stage) -> None:
    """Nor former ones, whose tokens live on."""
    house.installation = replace(house.installation, rate_limit_account=2)
    assert await attempts(3, ALICE, house=house) == ["AccountStateRefused", "AccountStateRefused", "RateLimited"]
    done = await house.cancel()
    assert await attempts(3, ALICE, house=house) == ["AccessRemoved"] * 3
    restarted = await house.do(BILLING, "restartAccount", accountId=done["account"]["id"])
    assert restarted["__typename"] == "RestartAccountSuccess"


async def test_who_may_not_hold_a_deletion_cannot_lock_the_billing_team_out(house: Stage) -> None:
    """SUPPORT may do nothing, and what Customer Success Managers may is counted for them alone."""
    done = await house.cancel()
    async with service(house, account=2) as limited:
        for who, withdrawn in ((SUPPORT, "PermissionDeniedError"), (CSM, "AccountStateError")):
            for given in (1, 2, 3):
                held = await limited.do(who, "holdDeletion", accountId=done["account"]["id"], note="Mine.")
                assert held["__typename"] == "PermissionDeniedError"
                tried = await limited.do(who, "withdrawCancellation", accountId=done["account"]["id"])
                limited_now = who == CSM and given == 3
                assert what(tried) == ("RATE_LIMITED" if limited_now else withdrawn)
        held = await limited.do(BILLING, "holdDeletion", accountId=done["account"]["id"], note="They called.")
    assert held["__typename"] == "HoldDeletionSuccess"


async def test_what_one_of_the_staff_may_do_is_counted_for_those_who_may_by_the_same_right(house: Stage) -> None:
    house.installation = replace(house.installation, rate_limit_account=1)
    await house.request_cancellation(ALICE)
    account_id = await house.account_key("acme")

    async def tried(who: str) -> str:
        try:
            await cancellation.cancel(await house.call(who), account_id, note="They called.")
        except (errors.Refusal, errors.RateLimited) as refusal:
            return type(refusal).__name__
        return "done"

    assert [await tried(who) for who in (CSM, CSM, BILLING, FINANCE, ALICE, CAROL)] == [
        "CancellationAlreadyRequested",
        "RateLimited",
        "CancellationAlreadyRequested",
        "RateLimited",
        "InvalidInput",  # members give no note
        "RateLimited",
    ]
    assert sorted(row.key for row in await RateLimit.all()) == [
        f"account:{account_id}",
        f"account:{account_id}:ACCOUNT_CSM",
        f"account:{account_id}:BILLING_TEAM",
    ]


@pytest.mark.parametrize("stranger", [GINA, HOST, "nobody@acme.example", SUPPORT])
async def test_a_stranger_who_knows_the_id_can_neither_use_an_allowance_nor_see_that_it_is_used_up(
    house: Stage, stranger: str
) -> None:
    """Members of other accounts, services, people nobody knows, and staff who have left."""
    house.installation = replace(house.installation, rate_limit_account=2)
    await db.execute("UPDATE staff SET deactivated_at = $1 WHERE email = $2", await db.now(), SUPPORT)
    first = await attempts(5, stranger, house=house)
    assert await RateLimit.all().count() == 0
    assert await attempts(3, ALICE, house=house) == ["AccountStateRefused", "AccountStateRefused", "RateLimited"]
    assert await attempts(5, stranger, house=house) == first
    assert set(first) <= {"NotFound", "Forbidden"}


async def test_ids_of_nothing_count_for_nobody(house: Stage) -> None:
    """Staff may ask about any account; an id that is none leaves nothing behind."""
    house.installation = replace(house.installation, rate_limit_account=5, rate_limit_caller=2)
    call = await house.call(CSM)
    for account_id in (db.uuid7(), None) * 3:
        with pytest.raises(errors.NotFound):
            await cancellation.withdraw(call, account_id)
    assert await RateLimit.all().count() == 0
    assert await attempts(3, CSM, house=house) == ["AccountStateRefused", "AccountStateRefused", "RateLimited"]


async def link(
    house: Stage,
    who: str,
    reference: str = "acme",
    purpose: LinkPurpose = LinkPurpose.CONFIRM,
    *,
    generation: int = 0,
    expires_in: timedelta = timedelta(days=1),
) -> str:
    """The token of a link about the newest request to cancel the account."""
    account_id, now = await house.account_key(reference), await db.database_now()
    row = await db.fetch_one(
        "SELECT id FROM cancellation_request WHERE account_id = $1 ORDER BY id DESC LIMIT 1", account_id
    )
    grant = LinkGrant(
        purpose=purpose,
        issuer=house.installation.member_issuer,
        subject=subject(who),
        account_id=account_id,
        request_id=db.as_uuid(row["id"]) if row else db.uuid7(),
        generation=generation,
    )
    return house.installation.tokens.mint_link(grant, issued_at=now - timedelta(days=2), expires_at=now + expires_in)


async def by_link(house: Stage, who: str, reference: str = "acme", **more: Any) -> Call:
    """The call of whoever has such a link."""
    identity = await house.installation.tokens.verify(await link(house, who, reference, **more))
    return Call(identity=identity, installation=house.installation)


TOO_EARLY = "AccountStateRefused"
"""Of feedback by link, before the account is canceled: refused, and counted all the same."""


async def say(call: Call) -> str:
    """What came of saying why."""
    assert call.identity.grant is not None
    request_id = call.identity.grant.request_id
    try:
        await feedback.submit(call, request_id, reason=FeedbackReason.OTHER)
    except (errors.Refusal, errors.RequestError) as refusal:
        return type(refusal).__name__
    raise AssertionError("the account is not canceled")


async def test_a_link_has_an_allowance_of_its_own_and_uses_nothing_of_the_persons(house: Stage) -> None:
    house.installation = replace(house.installation, rate_limit_caller=2)
    await house.request_cancellation(ALICE)
    links = [await by_link(house, ALICE, purpose=LinkPurpose.FEEDBACK, generation=number) for number in range(3)]
    for one in links:
        assert [await say(one) for _ in range(3)] == [TOO_EARLY, TOO_EARLY, "RateLimited"]
    again = await by_link(house, ALICE, purpose=LinkPurpose.FEEDBACK, expires_in=timedelta(days=2))
    assert await say(again) == "RateLimited", "an email of another day with the same link"
    assert await say(await by_link(house, CAROL, purpose=LinkPurpose.FEEDBACK)) == TOO_EARLY
    await cancellation.withdraw(await house.call(ALICE), await house.account_key("acme"))


async def test_the_links_of_one_kind_share_an_allowance_which_is_nobody_elses(house: Stage) -> None:
    """However many of them are in strangers' hands, members act, and the links for something else work."""
    house.installation = replace(house.installation, rate_limit_account=3)
    await house.request_cancellation(ALICE)
    links = [await by_link(house, who, purpose=LinkPurpose.FEEDBACK) for who in (ALICE, CAROL)]
    said = [await say(links[number % 2]) for number in range(6)]
    assert said == [TOO_EARLY] * 3 + ["RateLimited"] * 3
    confirming = await by_link(house, ALICE)
    assert confirming.identity.grant is not None
    with pytest.raises(errors.AccountNameMismatch):
        await cancellation.confirm(
            confirming, confirming.identity.grant.request_id, confirmation_token=None, account_name="Another"
        )
    await cancellation.withdraw(await house.call(CAROL), await house.account_key("acme"))


async def test_an_expired_link_uses_up_nobodys_allowance(house: Stage) -> None:
    """Ten times in one document, and then the person comes."""
    asked = await house.request_cancellation(ALICE)
    expired = await link(house, ALICE, purpose=LinkPurpose.FEEDBACK, expires_in=-timedelta(seconds=1))
    feedback_ = f'submitFeedback(input: {{requestId: "{asked["request"]["id"]}", reason: OTHER}}) {{ __typename }}'
    document = " ".join(f"a{number}: {feedback_}" for number in range(10))
    async with service(house, caller=10, account=10) as limited:
        for _ in range(2):
            answer = (await limited.post(f"mutation {{ {document} }}", token=expired)).json()
            assert {error["extensions"]["code"] for error in answer["errors"]} == {"UNAUTHENTICATED"}
            page = await limited.client.post("/links/feedback", data={"token": expired, "reason": "OTHER"})
            assert page.status_code == 401
        assert await RateLimit.all().count() == 0
        withdrawn = await limited.do(ALICE, "withdrawCancellation", accountId=await house.account_id("acme"))
    assert withdrawn["__typename"] == "WithdrawCancellationSuccess"


async def test_a_link_to_another_account_or_of_who_has_left_uses_no_accounts_allowance(house: Stage) -> None:
    house.installation = replace(house.installation, rate_limit_account=1)
    foreign, former = await by_link(house, ALICE, "globex"), await by_link(house, CAROL, "acme")
    await db.execute("DELETE FROM member WHERE email = $1", CAROL)
    for _ in range(3):
        assert await attempt(foreign, "acme", house=house) == "NotFound"
        assert await attempt(foreign, "globex", house=house) == "NotFound"
        assert await attempt(former, "acme", house=house) in {"NotFound", "Forbidden"}
    assert await RateLimit.all().count() == 0


async def test_what_is_kept_of_an_accounts_attempts_goes_with_its_data(house: Stage) -> None:
    """Its links' among it; the neighbors' and people's own stay."""
    house.installation = replace(house.installation, rate_limit_account=5, rate_limit_caller=5)
    for who, reference in ((ALICE, "acme"), (GINA, "globex")):
        await attempts(1, who, reference, house=house)
        await attempts(1, CSM, reference, house=house)
        await house.request_cancellation(who, reference)
        await say(await by_link(house, who, reference, purpose=LinkPurpose.FEEDBACK))
    acme, globex = await house.account_key("acme"), await house.account_key("globex")
    keys = [row.key for row in await RateLimit.all()]
    assert [sum(str(one) in key for key in keys) for one in (acme, globex)] == [4, 4]
    await limiting.forget_account(acme)
    assert {row.key for row in await RateLimit.all()} == {key for key in keys if str(acme) not in key}


async def test_the_development_clock_gives_no_attempts_back(house: Stage) -> None:
    house.installation = replace(house.installation, rate_limit_caller=1)
    await attempts(1, ALICE, house=house)
    await db.advance_clock(timedelta(days=60))
    assert await attempts(1, ALICE, house=house) == ["RateLimited"]


async def test_what_is_stored_tells_nobodys_name(house: Stage) -> None:
    house.installation = replace(house.installation, rate_limit_caller=5, rate_limit_account=5)
    await attempts(1, ALICE, house=house)
    account_id = await house.account_key("acme")
    keys = sorted(row.key for row in await RateLimit.all())
    assert keys[0] == f"account:{account_id}"
    assert subject(ALICE) not in keys[1]
    assert len(keys) == 2


async def test_allowances_that_are_whole_are_forgotten_and_no_others(house: Stage) -> None:
    house.installation = replace(house.installation, rate_limit_caller=1)
    for who in (ALICE, CAROL, CSM):
        await attempts(1, who, house=house)
    await pass_by(2 * MINUTE)
    await attempts(1, GINA, "globex", house=house)
    assert [await limiting.forget(limit=2), await limiting.forget(limit=2), await limiting.forget()] == [2, 1, 0]
    assert await attempts(1, GINA, "globex", house=house) == ["RateLimited"]
    assert await attempts(1, ALICE, house=house) == ["AccountStateRefused"]


# ------------------------------------------------------------------------------------------------------- over HTTP


def value(kind: Any) -> Any:
    """Some value of an input type, as JSON: enough of it to be accepted by the schema."""
    kind = get_nullable_type(kind)
    if isinstance(kind, GraphQLInputObjectType):
        return {name: value(one.type) for name, one in kind.fields.items() if isinstance(one.type, GraphQLNonNull)}
    if isinstance(kind, GraphQLEnumType):
        return next(iter(kind.values))
    return {"Int": 1}.get(get_named_type(kind).name, "x")


def mutations() -> dict[str, Any]:
    kind = SCHEMA._schema.mutation_type
    assert kind is not None
    return {name: field.args["input"].type for name, field in kind.fields.items()}


WHO_MAY = {
    "cancelAccount": ALICE,
    "submitFeedback": ALICE,
    "acceptOffer": ALICE,
    "declineOffer": ALICE,
    "withdrawCancellation": ALICE,
    "confirmCancellation": ALICE,
    "restartAccount": BILLING,
    "holdDeletion": BILLING,
    "releaseDeletion": BILLING,
}
"""Everybody else is refused first, and not counted. What is not about an account is the billing team's; to ask for a
restart takes a link."""


@pytest.mark.parametrize("mutation", sorted(mutations().keys() - UNLIMITED_MUTATIONS))
async def test_every_mutation_about_a_cancellation_is_limited(house: Stage, mutation: str) -> None:
    """A new mutation is limited, or says above why not."""
    asked = await house.request_cancellation(ALICE)
    named = {
        "accountId": await house.account_id("acme"),
        "requestId": asked["request"]["id"],
        "offerId": asked["request"]["offers"][0]["id"],
    }
    kind = mutations()[mutation]
    document = f"mutation($input: {kind}) {{ {mutation}(input: $input) {{ __typename }} }}"
    given = value(kind)
    given |= {name: id_ for name, id_ in named.items() if name in given}
    token = house.token(WHO_MAY.get(mutation, BILLING))
    if mutation == "requestRestart":
        token = await link(house, ALICE, purpose=LinkPurpose.RESTART)
    async with service(house, caller=1) as limited:
        first, second = [await limited.post(document, {"input": given}, token=token) for _ in range(2)]
    assert first.status_code == 200
    assert "errors" not in first.json()
    assert (second.status_code, second.json()["errors"][0]["extensions"]["code"]) == (429, "RATE_LIMITED")


@pytest.mark.parametrize("accept", ["application/json", GRAPHQL_JSON])
async def test_a_document_that_is_refused_as_a_whole_is_429(house: Stage, accept: str) -> None:
    document = f"mutation($id: ID!) {{ a: {WITHDRAW} b: {WITHDRAW} }}"
    async with service(house, caller=2) as limited:
        headers = {"Authorization": f"Bearer {house.token(ALICE)}", "Accept": accept}
        body = {"query": document, "variables": {"id": await house.account_id("acme")}}
        executed = await limited.client.post("/graphql", json=body, headers=headers)
        refused = await limited.client.post("/graphql", json=body, headers=headers)
        asked = await limited.ask(ALICE, "{ viewer { __typename } }")
    assert executed.status_code == 200
    assert "retry-after" not in executed.headers
    assert refused.status_code == 429
    assert refused.headers["content-type"].startswith(accept)
    answer = refused.json()
    assert [error["path"] for error in answer.pop("errors")] == [["a"], ["b"]]
    assert answer == {}
    shown = refused.json()["errors"]
    assert {error["extensions"]["code"] for error in shown} == {"RATE_LIMITED"}
    assert int(refused.headers["retry-after"]) == max(error["extensions"]["retryAfter"] for error in shown)
    assert "errors" not in asked, "queries are not limited"


@pytest.mark.parametrize("accept", ["application/json", GRAPHQL_JSON])
async def test_each_alias_counts_and_what_was_done_before_the_limit_is_told(house: Stage, accept: str) -> None:
    aliases = " ".join(f"a{number}: {WITHDRAW}" for number in range(4))
    async with service(house, caller=2) as limited:
        answer = await limited.client.post(
            "/graphql",
            json={"query": f"mutation($id: ID!) {{ {aliases} }}", "variables": {"id": await house.account_id("acme")}},
            headers={"Authorization": f"Bearer {house.token(ALICE)}", "Accept": accept},
        )
    body = cast("dict[str, Any]", answer.json())
    assert answer.status_code == 200
    assert [key for key, done in body["data"].items() if done is not None] == ["a0", "a1"]
    assert [error["path"] for error in body["errors"]] == [["a2"], ["a3"]]
    assert 0 < int(answer.headers["retry-after"]) <= 60


async def test_the_pages_behind_links_are_limited_too(house: Stage) -> None:
    async with service(house, caller=1) as limited:
        await house.cancel()
        token = await link(house, ALICE, purpose=LinkPurpose.FEEDBACK)
        form = {"token": token, "reason": "TOO_EXPENSIVE", "comment": ""}
        first, second = [await limited.client.post("/links/feedback", data=form) for _ in range(2)]
        page = await limited.client.get("/links/feedback", params={"token": token}, follow_redirects=True)
    assert (first.status_code, second.status_code, page.status_code) == (200, 429, 200)
    assert 0 < int(second.headers["retry-after"]) <= 60
    assert "Try again in" in second.text
