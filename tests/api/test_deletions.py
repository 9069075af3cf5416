"""What the API says of deletions, to staff alone: what is coming, what stands still, what has begun, what is left."""

from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from app import db, deletion
from app.db import Database
from app.graphql import nodes
from app.graphql.nodes import Kind
from tests import cast
from tests.cast import ALICE, BILLING, BOB, CSM, FINANCE, HOST, SUPPORT, Stage, stage
from tests.ending import DAY, HOUR, MOMENT, WINDOW, StoppedClock, account, many_canceled

DELETION = """query($id: ID!) { account(id: $id) { name reference status deletion {
  state scheduledFor heldAt startedAt deletedAt
  holds { note heldAt heldBy { name } releasedAt releaseNote releasedBy { name } }
  reminders { days deletionScheduledFor sentAt }
  steps { system attempts lastError dueAt completedAt }
  tombstone { planCode reason members feedback offers restartRequests messages idempotencyRecords deletedAt }
} } }"""

BREAKER = "{ deletionBreaker { state due started allowed haltedAt approvedUntil firstApprovedBy { name } } }"
EVERY_STATE = ("SCHEDULED", "HELD", "DUE", "OVERDUE", "STARTED", "STALLED", "DELETED")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StoppedClock:
    return StoppedClock(monkeypatch)


def text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


async def shown(house: Stage, account_id: UUID | None = None, who: str = SUPPORT) -> Any:
    """An account, acme unless another, with its deletion."""
    key = nodes.encode(Kind.ACCOUNT, account_id) if account_id else await house.account_id("acme")
    return (await house.ask(who, DELETION, id=key))["data"]["account"]


async def listed(house: Stage, *states: str) -> list[str]:
    """The ids of the accounts whose deletion is in one of those states; in any but DELETED where none is named."""
    given = {"states": list(states)} if states else {}
    answer = await house.ask(
        SUPPORT, "query($states: [DeletionState!]) { deletions(states: $states) { edges { node { id } } } }", **given
    )
    return [edge["node"]["id"] for edge in answer["data"]["deletions"]["edges"]]


# ---------------------------------------------------------------------------------------------- one account's life


async def test_staff_sees_an_accounts_deletion_from_its_date_to_its_tombstone(
    house: Stage, clock: StoppedClock
) -> None:
    assert (await shown(house))["deletion"] is None
    done = await house.cancel()
    account_id, key = await house.account_key("acme"), done["account"]["id"]
    await house.letters()
    date = clock.now + WINDOW
    found = (await shown(house))["deletion"]
    assert (found["state"], found["scheduledFor"]) == ("SCHEDULED", text(date))
    assert [found[name] for name in ("holds", "reminders", "steps", "tombstone")] == [[], [], [], None]

    clock.forward(30 * DAY)
    await house.letters()
    reminded_at = clock.now
    answer = await house.do(
        BILLING,
        "holdDeletion",
        "... on HoldDeletionSuccess { account { deletion { state } } }",
        accountId=key,
        note="L",
    )
    assert answer["account"]["deletion"]["state"] == "HELD"
    found = (await shown(house))["deletion"]
    assert (found["scheduledFor"], found["heldAt"]) == (None, text(clock.now))
    assert found["reminders"] == [{"days": 30, "deletionScheduledFor": text(date), "sentAt": text(reminded_at)}]
    clock.forward(DAY)
    answer = await house.do(
        FINANCE,
        "releaseDeletion",
        "... on ReleaseDeletionSuccess { account { deletionScheduledFor deletion { state } } }",
        accountId=key,
        note="S",
    )
    assert answer["account"] == {"deletionScheduledFor": text(date), "deletion": {"state": "SCHEDULED"}}
    assert (await shown(house))["deletion"]["holds"] == [
        {
            "note": "L",
            "heldAt": text(reminded_at),
            "heldBy": {"name": "Billie Stone"},
            "releasedAt": text(clock.now),
            "releaseNote": "S",
            "releasedBy": {"name": "Fiona Marsh"},
        }
    ]

    await house.letters()
    for moment, state in (
        (-MOMENT, "SCHEDULED"),
        (timedelta(), "DUE"),
        (HOUR - MOMENT, "DUE"),
        (HOUR, "OVERDUE"),
    ):
        clock.put(date + moment)
        assert (await shown(house))["deletion"]["state"] == state
    started_at = clock.now
    assert await deletion.begin(house.installation, [account_id]) == [account_id]
    for moment, state in ((timedelta(), "STARTED"), (HOUR - MOMENT, "STARTED"), (HOUR, "STALLED")):
        clock.put(started_at + moment)
        found = await shown(house)
        assert (found["status"], found["deletion"]["state"]) == ("DELETING", state)
    assert found["deletion"]["startedAt"] == text(started_at)
    assert found["deletion"]["steps"] == [
        {"system": "sunset", "attempts": 0, "lastError": None, "dueAt": text(started_at), "completedAt": None}
    ]

    await house.letters()
    found = await shown(house, account_id)
    assert (found["name"], found["status"]) == ("", "DELETED")
    assert found["reference"] == deletion.tombstone_reference("acme")
    found = found["deletion"]
    assert (found["state"], found["deletedAt"]) == ("DELETED", text(clock.now))
    assert found["tombstone"]["planCode"] == "essentials"
    assert (found["tombstone"]["members"], found["tombstone"]["deletedAt"]) == (3, text(clock.now))
    assert [(one["note"], one["releaseNote"], one["heldBy"]) for one in found["holds"]] == [
        (None, None, {"name": "Billie Stone"})
    ]
    assert found["steps"][0]["completedAt"] == text(clock.now)


async def test_what_a_step_waits_for_and_why_it_failed_is_shown(house: Stage, clock: StoppedClock) -> None:
    await house.cancel()
    clock.forward(WINDOW)
    account_id = await house.account_key("acme")
    assert await deletion.begin(house.installation, [account_id]) == [account_id]

    async def full(_: Any) -> None:
        raise OSError("No space left")

    await deletion.erase(house.installation, full, account_id)
    (step,) = (await shown(house))["deletion"]["steps"]
    assert (step["attempts"], step["lastError"]) == (0, "waits for 2 messages")
    await house.letters()
    clock.forward(timedelta(minutes=1))
    await deletion.erase(house.installation, full, account_id)
    (step,) = (await shown(house))["deletion"]["steps"]
    assert (step["attempts"], step["lastError"]) == (1, "OSError; see the log")


async def test_a_member_learns_of_no_deletion(house: Stage) -> None:
    """While there is an account to look at there is no deletion; afterwards there is no access."""
    assert (await shown(house, who=ALICE))["deletion"] is None
    refused = await house.ask(BOB, DELETION, id=await house.account_id("acme"))
    assert refused["errors"][0]["extensions"]["code"] == "FORBIDDEN"
    await house.cancel()
    for document in (DELETION, "{ deletions { edges { node { name } } } }", BREAKER):
        variables = {"id": await house.account_id("acme")} if document is DELETION else {}
        for who in (ALICE, BOB):
            refused = await house.ask(who, document, **variables)
            assert refused["errors"][0]["extensions"]["code"] == "ACCESS_REMOVED"
    assert (await house.ask(HOST, DELETION, id=await house.account_id("acme")))["data"]["account"] is None


# --------------------------------------------------------------------------------------------------------- the list


async def test_each_state_lists_the_accounts_that_say_so_of_themselves(house: Stage, clock: StoppedClock) -> None:
    ids: dict[str, UUID] = {}
    for number, state in enumerate(("DELETED", "STALLED", "STARTED", "OVERDUE", "DUE", "HELD", "SCHEDULED")):
        (ids[state],) = await many_canceled(house, 1, clock.now - (20 - number) * DAY, state.lower())
    await deletion.hold(await house.call(BILLING), ids["HELD"], note="A lawyer asked.")
    for state in ("DELETED", "STALLED"):
        assert await deletion.begin(house.installation, [ids[state]]) == [ids[state]]
    assert await deletion.erase(house.installation, keep, ids["DELETED"])
    clock.forward(HOUR)
    assert await deletion.begin(house.installation, [ids["STARTED"]]) == [ids["STARTED"]]
    for state, date in (("OVERDUE", -HOUR), ("DUE", -HOUR + MOMENT), ("SCHEDULED", MOMENT)):
        await db.execute("UPDATE account SET deletion_scheduled_for = $2 WHERE id = $1", ids[state], clock.now + date)

    keys = {state: nodes.encode(Kind.ACCOUNT, account_id) for state, account_id in ids.items()}
    for state in EVERY_STATE:
        assert await listed(house, state) == [keys[state]]
        assert (await shown(house, ids[state]))["deletion"]["state"] == state
    assert await listed(house, *EVERY_STATE) == list(keys.values()), "by the end of their windows"
    assert await listed(house, "HELD", "DELETED") == [keys["DELETED"], keys["HELD"]]
    assert await listed(house) == [key for state, key in keys.items() if state != "DELETED"]
    none = await house.ask(SUPPORT, "{ deletions(states: []) { edges { node { id } } } }")
    assert none["data"]["deletions"]["edges"] == []
    assert await deletion.overdue() == 2, "OVERDUE and STALLED"


async def keep(_: Any) -> None:
    """There is no folder of letters."""


@pytest.mark.parametrize("states", [[], ["HELD"], ["SCHEDULED", "HELD"]])
async def test_the_list_is_read_in_pages(house: Stage, clock: StoppedClock, states: list[str]) -> None:
    """Also where several windows end at the same time."""
    ids = await many_canceled(house, 5, clock.now + DAY) + await many_canceled(house, 2, clock.now + 2 * DAY, "later")
    if states == ["HELD"]:
        for account_id in ids:
            await deletion.hold(await house.call(BILLING), account_id, note="A lawyer asked.")
    found: list[str] = []
    sizes, after = [], None
    for _ in range(4):
        answer = await house.ask(
            SUPPORT,
            "query($states: [DeletionState!], $after: String) { deletions(states: $states, first: 3, after: $after) "
            "{ edges { node { id } } pageInfo { hasNextPage endCursor } } }",
            states=states or None,
            after=after,
        )
        page = answer["data"]["deletions"]
        sizes.append(len(page["edges"]))
        found += [edge["node"]["id"] for edge in page["edges"]]
        after = page["pageInfo"]["endCursor"]
        if not page["pageInfo"]["hasNextPage"]:
            break
    assert sizes == [3, 3, 1]
    keys = [nodes.encode(Kind.ACCOUNT, account_id) for account_id in ids]
    assert sorted(found[:5]) == sorted(keys[:5])
    assert sorted(found[5:]) == sorted(keys[5:])


# ------------------------------------------------------------------------------------------------------ the breaker


async def test_two_persons_let_stopped_deletions_go_on(house: Stage, clock: StoppedClock) -> None:
    await many_canceled(house, 11, clock.now)

    async def breaker() -> Any:
        return (await house.ask(CSM, BREAKER))["data"]["deletionBreaker"]

    async def approve(who: str, count: int) -> dict[str, Any]:
        return await house.do(
            who,
            "approveDeletions",
            "... on ApproveDeletionsSuccess { breaker { state firstApprovedBy { name } } }"
            "... on InvalidInputError { field }",
            count=count,
            note="Looked at each.",
        )

    assert (await breaker())["state"] == "CLEAR"
    assert (await approve(BILLING, 11))["__typename"] == "DeletionsNotHaltedError"
    await house.timers().run()
    assert await breaker() == {
        "state": "HALTED",
        "due": 11,
        "started": 0,
        "allowed": 10,
        "haltedAt": text(clock.now),
        "approvedUntil": None,
        "firstApprovedBy": None,
    }
    assert (await approve(BILLING, 10))["field"] == "count"
    assert (await approve(SUPPORT, 11))["__typename"] == "PermissionDeniedError"
    first = await approve(BILLING, 11)
    assert first["breaker"] == {"state": "AWAITING_SECOND_APPROVAL", "firstApprovedBy": {"name": "Billie Stone"}}
    assert (await approve(BILLING, 11))["__typename"] == "PermissionDeniedError"
    assert (await approve(FINANCE, 11))["breaker"]["state"] == "APPROVED"
    assert (await breaker())["approvedUntil"] == text(clock.now + DAY)
    await house.timers().run()
    assert (await breaker())["started"] == 11


# -------------------------------------------------------------------------------------------------------- the clock


ADVANCE = "... on AdvanceClockSuccess { now } ... on InvalidInputError { field }"


async def test_sixty_days_are_played_by_moving_the_clock(house: Stage) -> None:
    """What an operator would see in two months, in the order in which it comes."""
    await house.cancel()
    account_id = await house.account_key("acme")
    seen = []
    for days in ("29d", "24h", "30d"):
        moved = await house.do(SUPPORT, "advanceClock", ADVANCE, by=days)
        assert moved["__typename"] == "AdvanceClockSuccess"
        letters = await house.letters()
        seen.append(((await shown(house, account_id))["deletion"]["state"], len(letters)))
    assert seen == [("SCHEDULED", 2), ("SCHEDULED", 4), ("DELETED", 2)], (
        "told, reminded, and all but the last taken away"
    )


async def test_the_clock_is_moved_once_for_each_key(house: Stage) -> None:
    before = await db.clock_offset()
    first = await house.do(SUPPORT, "advanceClock", ADVANCE, by="36h", idempotencyKey="k")
    assert await house.do(SUPPORT, "advanceClock", ADVANCE, by="36h", idempotencyKey="k") == first
    other = await house.do(SUPPORT, "advanceClock", ADVANCE, by="37h", idempotencyKey="k")
    assert other["__typename"] == "IdempotencyConflictError"
    assert await db.clock_offset() - before == timedelta(hours=36)


@pytest.mark.parametrize("by", ["", "60", "d", "-1d", "0s", "1w", "1.5h", "3661d", "9999999999d", "١d"])  # noqa: RUF001
async def test_the_clock_is_moved_ahead_by_a_duration(house: Stage, by: str) -> None:
    before = await db.clock_offset()
    refused = await house.do(SUPPORT, "advanceClock", ADVANCE, by=by)
    assert (refused["__typename"], refused["field"]) == ("InvalidInputError", "by")
    assert await db.clock_offset() == before


async def test_the_databases_own_clock_is_moved_by_nobody(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that goes by the database's clock neither moves it nor follows who does, in the same database."""
    monkeypatch.setattr(cast, "settings", partial(cast.settings, SUNSET_CLOCK="system"))
    async with stage(database, tmp_path) as house:
        for who in (SUPPORT, BILLING):
            refused = await house.do(who, "advanceClock", ADVANCE, by="1d")
            assert refused["__typename"] == "PermissionDeniedError"
        assert await db.clock_offset() == timedelta()
        await db.execute("UPDATE clock_offset SET offset_seconds = 86400")
        await house.cancel()
        row = await account(await house.account_key("acme"))
        assert row["canceled_at"] <= await db.database_now()
