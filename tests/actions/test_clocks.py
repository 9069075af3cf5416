"""Processes whose own clocks are wrong by a day, in both directions: the database's clock alone counts.

The processes are real; only their dates are wrong, as on a machine that nobody has set. Whatever was to be judged by
a process's clock would be a day early in one of the two and a day late in the other.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email import policy as email_policy
from email.message import EmailMessage
from email.parser import BytesParser
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import pytest

from app import db, deletion, outbox
from app.graphql import nodes
from app.settings import Settings, SettingsError
from app.tokens import Tokens
from tests.actions.test_races import account, asked, canceled, raced, statuses
from tests.api.test_story import links
from tests.cast import ALICE, BILLING, Stage, subject
from tests.processes import Process, Processes

pytestmark = pytest.mark.postgres

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
WRONG = {"fast": DAY, "slow": -DAY}
GIVE_UP_SECONDS = 120


@pytest.fixture
def processes(postgres_house: Stage, tmp_path: Path) -> Processes:
    """More processes of the house's installation, with its keys."""
    return Processes(tmp_path, postgres_house.settings.database_url, SUNSET_DATA_DIR=str(tmp_path))


def shifted(process: Process) -> timedelta:
    """By how much the process's clock is wrong, as its log tells."""
    first = next(line for line in process.log.read_text().splitlines() if line.startswith("{"))
    return datetime.fromisoformat(json.loads(first)["timestamp"]) - datetime.now(UTC)


async def post(process: Process, token: str, document: str, **variables: Any) -> tuple[httpx2.Response, dict[str, Any]]:
    async with httpx2.AsyncClient(timeout=60) as http:
        response = await http.post(
            f"{process.url}/graphql",
            json={"query": document, "variables": variables},
            headers={"Authorization": f"Bearer {token}"},
        )
    return response, response.json()


async def do(house: Stage, process: Process, who: str, mutation: str, selection: str, **given: Any) -> dict[str, Any]:
    """What came of somebody's mutation, sent to one process."""
    kind = mutation[0].upper() + mutation[1:]
    document = f"mutation($input: {kind}Input!) {{ done: {mutation}(input: $input) {{ __typename {selection} }} }}"
    _, answer = await post(process, house.token(who), document, input=given)
    assert "errors" not in answer, answer
    done: dict[str, Any] = answer["data"]["done"]
    return done


@asynccontextmanager
async def by_the_database() -> AsyncIterator[Callable[[str], None]]:
    """Within the block, moments that lie in it by the database's clock, and nothing else, can be told of."""
    began = await db.now()
    told: list[str] = []
    yield told.append
    ended = await db.now()
    assert told
    for moment in told:
        assert began <= datetime.fromisoformat(moment) <= ended


# ------------------------------------------------------------------------------------------------------------- API


async def test_every_api_process_goes_by_the_databases_clock(postgres_house: Stage, processes: Processes) -> None:
    """Tokens, dates, the order of requests, and the end of the time to confirm, on two servers that are two days
    apart."""
    house = postgres_house
    acme = await house.account_id("acme")
    with processes:
        fast, slow = processes.serve(DAY), processes.serve(-DAY)
        await processes.ready(fast, slow)
        assert abs(shifted(fast) - DAY) < HOUR
        assert abs(shifted(slow) + DAY) < HOUR
        await tokens_are_judged_by_real_time(house, fast, slow)

        # The first request's id, made by the fast process, is larger than the second's.
        asking = "... on CancelAccountSuccess { confirmationToken request { id requestedAt } }"
        async with by_the_database() as tells:
            first = await do(house, fast, ALICE, "cancelAccount", asking, accountId=acme)
            tells(first["request"]["requestedAt"])
        await do(house, slow, ALICE, "withdrawCancellation", "", accountId=acme)
        second = await do(house, slow, ALICE, "cancelAccount", asking, accountId=acme)
        for process in (fast, slow):
            _, answer = await post(
                process,
                house.token(ALICE),
                "query($id: ID!) { account(id: $id) { openRequest { id } "
                "cancellationRequests { edges { node { id status } } } } }",
                id=acme,
            )
            found = answer["data"]["account"]
            assert found["openRequest"]["id"] == second["request"]["id"]
            assert [edge["node"] for edge in found["cancellationRequests"]["edges"]] == [
                {"id": second["request"]["id"], "status": "PENDING_CONFIRMATION"},
                {"id": first["request"]["id"], "status": "WITHDRAWN"},
            ]

        # One clock for all: what one process moved ahead, the other one goes by.
        confirming = (
            "... on ConfirmCancellationSuccess { account { canceledAt restartableUntil } } "
            "... on ConfirmationExpiredError { expiredAt }"
        )
        given = {
            "requestId": second["request"]["id"],
            "confirmationToken": second["confirmationToken"],
            "accountName": "Acme",
        }
        moving = "... on AdvanceClockSuccess { now }"
        async with by_the_database() as tells:
            tells((await do(house, fast, BILLING, "advanceClock", moving, by="72h"))["now"])
            tells((await do(house, slow, BILLING, "advanceClock", moving, by="1s"))["now"])
        late = await do(house, slow, ALICE, "confirmCancellation", confirming, **given)
        assert late["__typename"] == "ConfirmationExpiredError"
        lifetime = datetime.fromisoformat(late["expiredAt"]) - datetime.fromisoformat(second["request"]["requestedAt"])
        assert lifetime == timedelta(hours=72)

        third = await do(house, slow, ALICE, "cancelAccount", asking, accountId=acme)
        given |= {"requestId": third["request"]["id"], "confirmationToken": third["confirmationToken"]}
        await db.advance_clock(timedelta(hours=71, minutes=30))
        async with by_the_database() as tells:
            done = await do(house, fast, ALICE, "confirmCancellation", confirming, **given)
            tells(done["account"]["canceledAt"])
        window = [datetime.fromisoformat(done["account"][name]) for name in ("canceledAt", "restartableUntil")]
        assert window[1] - window[0] == timedelta(hours=1440)
        assert (await account(await house.account_key("acme")))["canceled_at"] == window[0]


async def tokens_are_judged_by_real_time(house: Stage, *wrong: Process) -> None:
    """A token that is valid is valid for both; one that has expired or is not valid yet is so for both."""
    now = datetime.now(UTC)

    def made(at: datetime) -> str:
        tokens = Tokens.from_settings(house.settings, clock=at.timestamp)
        return tokens.mint(subject(ALICE), HOUR)

    for process in wrong:
        for at, status in ((now, 200), (now - timedelta(minutes=59), 200), (now - 2 * HOUR, 401), (now + HOUR, 401)):
            response, answer = await post(process, made(at), "{ viewer { name } }")
            assert response.status_code == status, (at, answer)


async def test_the_tokens_that_a_server_prints_are_good_although_its_clock_is_wrong(
    postgres_house: Stage, processes: Processes
) -> None:
    # On a developer's machine: on a network none are printed.
    processes.environ |= {"SUNSET_PUBLIC_URL": "http://sunset.example", "SUNSET_DEVELOPMENT_ON_NETWORK": "false"}
    with processes:
        wrong = [processes.serve(clock) for clock in WRONG.values()]
        await processes.ready(*wrong)
        for process in wrong:
            printed = re.findall(r"^eyJ\S+$", process.log.read_text(), re.MULTILINE)
            assert printed
            for token in printed:
                await postgres_house.installation.tokens.verify(token)


# ---------------------------------------------------------------------------------------------------------- worker


@pytest.mark.parametrize("direction", WRONG)
async def test_a_worker_with_a_wrong_clock_does_nothing_early_and_nothing_late(
    postgres_house: Stage, processes: Processes, tmp_path: Path, direction: str
) -> None:
    """Requests expire, deletions happen and links end half an hour after they should be able to, and not half an hour
    before; with an API whose clock is wrong the other way round."""
    house = postgres_house
    with processes:
        worker, api = processes.worker(WRONG[direction]), processes.serve(-WRONG[direction])
        await processes.ready(worker, api)
        assert abs(shifted(worker) - WRONG[direction]) < HOUR

        early, late, held, expired, expires, confirmed = await raced(house, 6)
        await canceled(house, early)
        await advance(HOUR)
        for one in (late, held):
            await canceled(house, one)
        await deletion.hold(await house.call(BILLING), held, note="Wait")
        await advance(57 * DAY - HOUR)
        await asked(house, expired)
        await advance(HOUR)
        await asked(house, expires)
        to_confirm = await asked(house, confirmed)
        await until(all_delivered)
        granted = await check_letters(tmp_path, held)

        await advance(timedelta(days=2, hours=23, minutes=30))
        await until(lambda: has_status(early, "DELETED"))  # the last of the worker's rounds: all else was looked at
        assert await statuses(expired) == ["ACTIVE", "EXPIRED"]
        assert await statuses(expires) == ["ACTIVE", "PENDING_CONFIRMATION"]
        assert (await account(late))["status"] == "CANCELED"
        assert await open_link(api, granted["restart"], note="We need it") == 200
        async with by_the_database() as tells:
            done = await do(
                house,
                api,
                ALICE,
                "confirmCancellation",
                "... on ConfirmCancellationSuccess { account { canceledAt } }",
                requestId=nodes.encode(nodes.Kind.CANCELLATION_REQUEST, to_confirm.request_id),
                confirmationToken=to_confirm.confirmation_token,
                accountName=to_confirm.account.name,
            )
            tells(done["account"]["canceledAt"])
        await until(all_delivered)

        await advance(HOUR)
        await until(lambda: has_status(late, "DELETED"))
        assert await statuses(expires) == ["ACTIVE", "EXPIRED"]
        assert await open_link(api, granted["restart"]) == 401
        for one in (early, late):
            row = await account(one)
            assert row["restartable_until"] <= row["deletion_started_at"] <= row["deleted_at"] <= await db.now()


async def check_letters(folder: Path, account_id: UUID) -> dict[str, str]:
    """The email about the cancellation says when it was, by the database's clock; answers its links, by purpose."""
    row = await account(account_id)
    parser = BytesParser(policy=email_policy.default)
    letters: list[EmailMessage] = [parser.parsebytes(file.read_bytes()) for file in (folder / "mailbox").glob("*.eml")]
    (letter,) = (
        letter
        for letter in letters
        if letter["To"].addresses[0].addr_spec == ALICE
        and row["name"] in letter["Subject"]
        and "restart" in links(letter)
    )
    assert letter["Date"].datetime == row["canceled_at"].replace(microsecond=0)
    return links(letter)


async def open_link(api: Process, token: str, **form: str) -> int:
    """The status of the page behind an email's link, after sending its form."""
    async with httpx2.AsyncClient(timeout=60) as http:
        return (await http.post(f"{api.url}/links/restart", data={"token": token, **form})).status_code


async def advance(by: timedelta) -> None:
    await db.advance_clock(by)
    await db.notify(outbox.CHANNEL)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(GIVE_UP_SECONDS):
        while not await holds():  # noqa: ASYNC110  other processes: there is no event to wait on
            await asyncio.sleep(0.02)


async def all_delivered() -> bool:
    return not await db.fetch("SELECT 1 FROM outbox WHERE delivered_at IS NULL")


async def has_status(account_id: UUID, status: str) -> bool:
    return bool((await account(account_id))["status"] == status)


# ----------------------------------------------------------------------------------------------- the development clock


async def test_the_systems_clock_is_not_taken_for_a_database_whose_clock_was_moved(
    postgres_house: Stage, processes: Processes
) -> None:
    """Accounts there were canceled at times that have not come yet. A database whose clock was never moved is fine."""
    processes.environ["SUNSET_CLOCK"] = "system"
    with processes:
        fine = (processes.serve(), processes.worker())
        await processes.ready(*fine)
        for process in fine:
            assert processes.stop(process) == 0
        await db.advance_clock(timedelta(seconds=1))
        for process in (processes.serve(), processes.worker()):
            assert process.popen.wait(GIVE_UP_SECONDS) != 0
            said = process.log.read_text()
            assert "SUNSET_CLOCK" in said
            assert "0:00:01" in said
            assert "Traceback" not in said


def test_production_has_no_clock_that_can_be_moved(processes: Processes) -> None:
    with pytest.raises(SettingsError, match="SUNSET_CLOCK must be system in production"):
        Settings.load(processes.environ | {"SUNSET_ENVIRONMENT": "production"})
