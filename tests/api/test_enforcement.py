"""Who has obeyed, as staff asks for it over all accounts, and as a system meets it that was told by webhook."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app import db, endpoints
from app.db import Database
from tests.cast import ALICE, BILLING, SUPPORT, Stage
from tests.delivery.webhook_server import receiving
from tests.ending import many
from tests.enforcing import LOGIN, MAILER, MINUTE, acknowledge, obeyed, shown, statuses


@pytest.fixture
async def house(database: Database, tmp_path: Path) -> AsyncIterator[Stage]:
    async with obeyed(database, tmp_path) as running:
        yield running


async def listed(house: Stage, **wanted: Any) -> list[str]:
    """Account and system of each, in the order of the list; everything that staff may ask about them is asked."""
    answer = await house.ask(
        SUPPORT,
        "query($filter: EnforcementFilterInput) { enforcements(filter: $filter) { edges { node { system name epoch "
        "status askedAt dueAt enforcedAt isLate account { reference canceledAt } } } } }",
        filter=wanted or None,
    )
    found = [edge["node"] for edge in answer["data"]["enforcements"]["edges"]]
    assert all(one["askedAt"] == one["account"]["canceledAt"] for one in found)
    return [f"{one['account']['reference']} {one['system']}" for one in found]


async def test_a_system_acknowledges_what_it_was_told_letter_for_letter(house: Stage) -> None:
    """The event's account and epoch are what the mutation wants."""
    async with receiving() as receiver:
        await endpoints.create(
            None, house.installation.receivers, url=receiver.url, description=None, event_types=["account.canceled"]
        )
        for epoch in (1, 3):
            await house.cancel()
            await house.letters()
            data = receiver.requests[-1].event["data"]
            assert isinstance(data, dict)
            assert data["epoch"] == epoch
            done = await house.do(
                MAILER,
                "acknowledgeEnforcement",
                "... on AcknowledgeEnforcementSuccess { enforcement { status } }",
                accountId=data["accountId"],
                epoch=data["epoch"],
            )
            assert done["enforcement"] == {"status": "ENFORCED"}
            assert await statuses(house) == {"login": "PENDING", "mailer": "ENFORCED"}
            await house.do(BILLING, "restartAccount", accountId=data["accountId"])


async def test_staff_finds_those_that_have_not_obeyed(house: Stage) -> None:
    await many(house, 1, "hooli")
    await house.cancel()
    await db.advance_clock(5 * MINUTE)
    await house.cancel(ALICE, "hooli-0", "Of 0")
    await acknowledge(house, MAILER, 1, "hooli-0")
    await db.advance_clock(26 * MINUTE)
    by_due = ["acme mailer", "hooli-0 mailer", "acme login", "hooli-0 login"]
    pending = ["acme mailer", "acme login", "hooli-0 login"]
    assert await listed(house) == pending
    assert await listed(house, statuses=["PENDING", "ENFORCED"]) == by_due
    assert await listed(house, statuses=["ENFORCED"]) == ["hooli-0 mailer"]
    assert await listed(house, statuses=[]) == []
    assert await listed(house, late=True) == ["acme mailer", "acme login"]
    assert await listed(house, late=False) == ["hooli-0 login"]
    assert await listed(house, late=False, statuses=["PENDING", "ENFORCED"]) == ["hooli-0 mailer", "hooli-0 login"]
    assert await listed(house, late=True, statuses=["ENFORCED"]) == []
    assert await listed(house, system="login") == ["acme login", "hooli-0 login"]
    assert await listed(house, system="nobody") == []
    await house.do(BILLING, "restartAccount", accountId=await house.account_id("acme"))
    assert await listed(house, statuses=["PENDING", "ENFORCED"]) == ["hooli-0 mailer", "hooli-0 login"], "that stand"


async def test_the_list_is_read_in_pages(house: Stage) -> None:
    """Also where several are due at the same time."""
    for number in range(2):
        await many(house, 2, "hooli")
        await house.cancel(ALICE, f"hooli-{number}", f"Of {number}")
    await db.execute(
        "UPDATE enforcement SET due_at = latest, report_at = latest "
        "FROM (SELECT MAX(due_at) AS latest FROM enforcement) found"
    )
    found: list[str] = []
    after = None
    for size in (3, 1):
        answer = await house.ask(
            SUPPORT,
            "query($after: String) { enforcements(first: 3, after: $after) { edges { node { system account "
            "{ reference } } } pageInfo { hasNextPage endCursor } } }",
            after=after,
        )
        page = answer["data"]["enforcements"]
        assert len(page["edges"]) == size
        found += [edge["node"]["account"]["reference"] + edge["node"]["system"] for edge in page["edges"]]
        after = page["pageInfo"]["endCursor"]
        assert page["pageInfo"]["hasNextPage"] is (size == 3)
    assert sorted(found) == ["hooli-0login", "hooli-0mailer", "hooli-1login", "hooli-1mailer"]


async def test_members_learn_nothing_of_it(house: Stage) -> None:
    """While there is an account to look at there is nothing to enforce; afterwards there is no access."""
    assert await shown(house, who=ALICE) == []
    await house.cancel()
    for document in ("{ enforcements { edges { cursor } } }", '{ account(id: "x") { enforcement { system } } }'):
        refused = await house.ask(ALICE, document)
        assert refused["errors"][0]["extensions"]["code"] == "ACCESS_REMOVED"


async def test_a_system_reads_no_account(house: Stage) -> None:
    await house.cancel()
    for who in (MAILER, LOGIN):
        answer = await house.ask(
            who, "query($id: ID!) { account(id: $id) { name } }", id=await house.account_id("acme")
        )
        assert answer == {"data": {"account": None}}
        refused = await house.ask(who, "{ enforcements { edges { node { system } } } }")
        assert refused["errors"][0]["extensions"]["code"] == "FORBIDDEN"
