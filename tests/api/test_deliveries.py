"""What staff sees of the emails: which could not be delivered, why, and whose they were."""

from datetime import timedelta
from typing import Any

from app import db, outbox
from app.graphql import nodes
from tests.cast import ALICE, BILLING, CAROL, CSM, SUPPORT, Stage

FIELDS = """template state messageId attempts lastError createdAt dueAt deliveredAt deadAt droppedAt
  recipient { name email } account { reference name allowedActions { action allowed } }"""
DELIVERIES = f"""query($filter: DeliveryFilterInput, $first: Int, $after: String) {{
  deliveries(filter: $filter, first: $first, after: $after) {{
    edges {{ node {{ {FIELDS} }} }} pageInfo {{ hasNextPage endCursor }} }} }}"""


async def listed(house: Stage, who: str = SUPPORT, **variables: object) -> list[dict[str, Any]]:
    answer = await house.ask(who, DELIVERIES, **variables)
    return [edge["node"] for edge in answer["data"]["deliveries"]["edges"]]


async def test_a_dead_letter_is_found_with_its_reason_and_its_account(house: Stage) -> None:
    await house.cancel()
    for message in await outbox.claim(9):
        if message.recipient_address == ALICE:
            await outbox.failed(message, "mail.test answered 550 No such user", permanent=True)
        else:
            await outbox.delivered(message)
    (dead,) = await listed(house, filter={"states": ["DEAD"]})
    assert dead["template"] == "cancellation-confirmed"
    assert dead["recipient"] == {"name": "Alice Adams", "email": ALICE}
    assert dead["account"]["reference"] == "acme"
    assert (dead["attempts"], dead["lastError"]) == (1, "mail.test answered 550 No such user")
    assert dead["deadAt"] is not None
    assert (dead["dueAt"], dead["deliveredAt"], dead["droppedAt"]) == (None, None, None)
    (delivered,) = await listed(house, filter={"states": ["DELIVERED"]})
    assert (delivered["recipient"], delivered["lastError"]) == ({"name": "Carol Clark", "email": CAROL}, None)
    assert await listed(house, filter={"states": ["DUE", "CLAIMED", "WAITING", "DROPPED"]}) == []


async def test_what_an_account_allows_is_told_for_who_asks(house: Stage) -> None:
    """The account behind a delivery is the same as anywhere: it knows what its reader is to it."""
    await house.request_cancellation(CSM, "globex", note="They called.")

    async def can_withdraw(who: str) -> bool:
        account = (await listed(house, who))[0]["account"]
        return {"action": "WITHDRAW_CANCELLATION", "allowed": True} in account["allowedActions"]

    assert (await can_withdraw(CSM), await can_withdraw(SUPPORT)) == (True, False)


async def test_deliveries_are_paged_from_the_newest_back(house: Stage) -> None:
    await house.cancel()
    await house.do(BILLING, "restartAccount", accountId=await house.account_id("acme"))
    await house.request_cancellation(CSM, "globex", note="They called.")
    seen: list[str] = []
    after = None
    while True:
        answer = await house.ask(SUPPORT, DELIVERIES, first=2, after=after)
        page = answer["data"]["deliveries"]
        seen += [edge["node"]["messageId"] for edge in page["edges"]]
        after = page["pageInfo"]["endCursor"]
        if not page["pageInfo"]["hasNextPage"]:
            break
    stored = await db.fetch("SELECT message_id FROM outbox ORDER BY created_at DESC, id DESC")
    assert seen == [row["message_id"] for row in stored]
    assert len(seen) == 5


async def test_the_list_can_be_about_one_account_and_an_id_of_nothing_finds_nothing(house: Stage) -> None:
    await house.cancel()
    await house.request_cancellation(CSM, "globex", note="They called.")
    about = await listed(house, filter={"accountId": await house.account_id("globex")})
    assert [one["template"] for one in about] == ["confirmation-requested"]
    for nothing in ("", "x", nodes.encode(nodes.Kind.ACCOUNT, db.uuid7())):
        assert await listed(house, filter={"accountId": nothing}) == []
    assert await listed(house, filter={"states": []}) == []


async def test_of_a_deleted_account_only_the_last_email_is_left_and_nobody_in_it(house: Stage) -> None:
    await house.cancel()
    await house.letters()
    await db.advance_clock(timedelta(days=61))
    await house.letters()
    left = await listed(house)
    assert {(one["template"], one["state"]) for one in left} == {("account-deleted", "DELIVERED")}
    assert {one["recipient"] is None for one in left} == {True}
