"""A restore harms nobody: the installation finds out that time went back, halts deletions, and has everybody notified.

Back-ups are real: `pg_dump` and the server's files on PostgreSQL, SQLite's own copy on SQLite.
"""

import asyncio
import contextlib
import re
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import pytest
from tortoise.connection import get_connection

from app import (
    db,
    deletion,
    doctor,
    endpoints,
    errors,
    halts,
    history,
    ids,
    invariants,
    lost_transitions,
    policy,
    restores,
)
from app.breaker import read as breaker
from app.db import Database
from app.db.origin import origin
from app.ids import Kind
from app.lifecycle import (
    EPOCHS_OF_A_RESTORE,
    SYSTEM,
    AccountStatus,
    ActorKind,
    CancellationTiming,
    HaltCause,
    TransitionType,
)
from app.lost_transitions import Lost
from tests.actions.test_live import follow, next_of
from tests.cast import ALICE, BILLING, CSM, SUPPORT, Stage, stage
from tests.delivery.webhook_server import receiving
from tests.ending import DAY, HOUR, account, count, log_in_memory, many, many_canceled, promised
from tests.enforcing import LOGIN, MAILER, acknowledge, obeyed, statuses
from tests.postgres import PostgresServer
from tests.serving import serving
from tests.test_receiver import Reference, endpoint_at, port, reference, truth

__all__ = ["port", "reference"]

INGRID = "ingrid@initech.example"


def forget() -> None:
    """What a process knows of the database, as if it had been started anew."""
    restores._seen.clear()
    history.forget_committed(history.newest_committed())


def forget_everything(directory: Path) -> None:
    """What a process and its data folder know of the database, as on a new machine."""
    forget()
    for file in directory.glob("last-seen-*"):
        file.unlink()


async def causes() -> list[HaltCause]:
    return [one.cause for one in await halts.current()]


async def emailed() -> int:
    return await count("outbox", "template = 'halt-began'")


async def declared(house: Stage, as_of: datetime | None = None) -> None:
    await restores.declare(house.installation, as_of=as_of or await db.now())


async def begun() -> set[UUID]:
    return {db.as_uuid(row["id"]) for row in await db.fetch("SELECT id FROM account WHERE status <> 'CANCELED'")}


class BackUp:
    """Of a SQLite file, while it is in use, and back into it: the file stays the same one."""

    def __init__(self, database: Database) -> None:
        self._path = database.url.removeprefix("sqlite://")
        self._copy = f"{self._path}.back-up"
        self._put(self._path, self._copy)

    def restore(self) -> None:
        self._put(self._copy, self._path)

    @staticmethod
    def _put(source: str, target: str) -> None:
        with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as other:
            one.backup(other)


# -------------------------------------------------------------------------------------------------------- on PostgreSQL


@asynccontextmanager
async def opened(url: str, directory: Path) -> AsyncIterator[Stage]:
    """The installation's processes, started on its database and its data folder."""
    database = await Database.open(url, development_clock=True)
    try:
        with database.bind():
            async with stage(database, directory) as house:
                yield house
    finally:
        await database.close()


def logged(stream: str) -> list[bytes]:
    return stream.encode().splitlines(keepends=True)


def run(commands: Iterable[str], **tokens: str) -> list[dict[str, Any]]:
    """What the shell prints of the commands, one answer of the API a line."""
    done = subprocess.run(
        ["bash", "-eu"],
        input="\n".join(commands),
        env={"PATH": "/usr/bin:/bin", **tokens},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [orjson.loads(line)["data"] for line in done.stdout.splitlines() if line]


@pytest.mark.postgres
async def test_restarted_and_held_accounts_are_not_deleted_after_a_restore(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    """Nine are due in an hour; four are restarted and one is held after the dump, which is then loaded."""
    name = await postgres_server.create_database()
    url, file = postgres_server.url(name), tmp_path / "dump"
    with log_in_memory() as log:
        async with opened(url, tmp_path) as house:
            gone = await many_canceled(house, 9, await db.now() + HOUR)
            restarted, held = gone[:4], gone[4]
            as_of = await db.now()
            await asyncio.to_thread(postgres_server.dump, name, file)
            for one in restarted:
                account_id = ids.encode(Kind.ACCOUNT, one)
                assert (await house.do(BILLING, "restartAccount", accountId=account_id))["__typename"] == (
                    "RestartAccountSuccess"
                )
            await house.do(BILLING, "holdDeletion", accountId=ids.encode(Kind.ACCOUNT, held), note="A court order.")
            await restores.check(house.installation)
        lines = logged(log.getvalue())
    await asyncio.to_thread(postgres_server.load, name, file)
    database = await Database.open(url, development_clock=True)
    with database.bind():
        await db.advance_clock(2 * HOUR)
        sick = {check.name: check.verdict for check in await doctor.examine(environ(url, tmp_path))}
        assert sick["restores"] is doctor.Verdict.FAIL, "before any process has been there"
    await database.close()

    async with opened(url, tmp_path) as house:
        await house.worker().drain()
        assert await begun() & {*gone} == set(), "no deletion has begun"
        assert await causes() == [HaltCause.RESTORED]
        await declared(house, as_of)
        assert await emailed() == 1
        lost = await lost_transitions.find(lost_transitions.read(lines))
        assert {one.account_id for one in lost} == {*restarted, held}
        async with serving(house.app, house.installation.changes) as served:
            commands = list(lost_transitions.script(lost, served.http.removesuffix("/graphql")))
            answers = await asyncio.to_thread(run, commands, BILLING=house.token(BILLING))
        told = [answer["__typename"] for data in answers for answer in data.values()]
        assert sorted(told) == ["HoldDeletionSuccess", *["RestartAccountSuccess"] * 4]
        await halts.resume("Looked at, and done again.")
        await db.advance_clock(8 * DAY)
        await house.worker().drain()
        rows = {db.as_uuid(row["id"]): row["status"] for row in await db.fetch("SELECT id, status FROM account")}
        assert [rows[one] for one in gone] == [*["ACTIVE"] * 4, "CANCELED", *["DELETED"] * 4]
        assert (await account(held))["deletion_held_at"] is not None
        assert (await lost_transitions.find(lost_transitions.read(lines))) != [], "what is lost stays so"
    await postgres_server.drop_database(name)


@pytest.mark.postgres
async def test_receivers_follow_after_a_restore(
    postgres_server: PostgresServer, tmp_path: Path, reference: Reference
) -> None:
    """The receiver of the README has seen epochs that come again; an account canceled since the back-up is active."""
    name = await postgres_server.create_database()
    url, file = postgres_server.url(name), tmp_path / "dump"
    async with receiving() as network:

        async def delivered(house: Stage) -> None:
            """What the worker sends, the receiver gets."""
            await house.worker().drain()
            while network.requests:
                assert await reference.receive(network.requests.pop(0)) == 204

        async with opened(url, tmp_path) as house:
            endpoint = await endpoint_at(house, network)
            reference.start(house.installation.tokens.webhook_secret(endpoint.id, 0))
            acme = await house.account_id("acme")
            await delivered(house)
            await asyncio.to_thread(postgres_server.dump, name, file)
            await house.cancel()
            await house.do(BILLING, "restartAccount", accountId=acme)
            await house.cancel(INGRID, "initech", "Initech")
            await delivered(house)
            initech = await house.account_id("initech")
            assert reference.accounts() == {acme: ("ACTIVE", 2), initech: ("CANCELED", 1)}
        await asyncio.to_thread(postgres_server.load, name, file)
        async with opened(url, tmp_path) as house:
            assert await causes() == [HaltCause.RESTORED], "found by what the data folder knows"
            await house.cancel()  # before any account's status is sent
            await delivered(house)
            kept = reference.accounts()
            assert kept[acme] == ("CANCELED", EPOCHS_OF_A_RESTORE + 1)
            assert kept[initech] == ("ACTIVE", EPOCHS_OF_A_RESTORE)
            assert kept == await truth()
    await postgres_server.drop_database(name)


@pytest.mark.postgres
@pytest.mark.parametrize("in_place", [True, False])
async def test_a_copy_is_known_by_itself_without_a_data_folder(
    postgres_server: PostgresServer, tmp_path: Path, in_place: bool
) -> None:
    """Whether it was restored is for people to say; until then nothing is sent to anybody."""
    name = await postgres_server.create_database()
    url, file = postgres_server.url(name), tmp_path / "dump"
    async with opened(url, tmp_path / "one") as house:
        await house.cancel()
        for statement in ("VACUUM FREEZE installation", "VACUUM FULL installation"):
            await db.execute(statement)
        await restores.check(house.installation)
        assert await causes() == []
        await asyncio.to_thread(postgres_server.dump, name, file)
    await asyncio.to_thread(postgres_server.load, name, file, in_place=in_place)
    async with opened(url, tmp_path / "other") as house:
        assert await causes() == [HaltCause.MOVED]
        assert (await restores.restatement()).restores == 0
        await halts.resume("A planned move to the new server.")
        await restores.check(house.installation)
        assert await causes() == [], "one command was enough"
    await postgres_server.drop_database(name)


@pytest.mark.postgres
async def test_a_fail_over_that_loses_nothing_is_told_apart(postgres_server: PostgresServer, tmp_path: Path) -> None:
    if not postgres_server.can_restart:
        pytest.skip("the server is somebody else's")
    name = await postgres_server.create_database()
    async with opened(postgres_server.url(name), tmp_path) as house:
        await house.cancel()
        await restores.check(house.installation)
        before = (await origin()).timeline
        await asyncio.to_thread(postgres_server.promote)
        await when_it_is_back(house)
        assert (await origin()).timeline != before
        assert await causes() == [], "the process that ran through it finds all that it has seen"
    async with opened(postgres_server.url(name), tmp_path):
        assert await causes() == []
    await asyncio.to_thread(postgres_server.promote)
    async with opened(postgres_server.url(name), tmp_path):
        assert await causes() == [HaltCause.MOVED], "who was not there asks"
    await postgres_server.drop_database(name)


@pytest.mark.postgres
async def test_a_standby_is_left_alone_until_it_is_promoted(postgres_server: PostgresServer, tmp_path: Path) -> None:
    if not postgres_server.can_restart:
        pytest.skip("the server is somebody else's")
    name = await postgres_server.create_database()
    async with opened(postgres_server.url(name), tmp_path) as house:
        await house.cancel()
        await restores.check(house.installation)
        await asyncio.to_thread(postgres_server.stand_by)
        await when_it_is_back(house)
        assert (await origin()).is_standby
        await asyncio.to_thread(postgres_server.promote)
        await when_it_is_back(house)
        assert await causes() == []
    await postgres_server.drop_database(name)


async def when_it_is_back(house: Stage) -> None:
    """Look, as soon as the server answers."""
    while True:
        with contextlib.suppress(errors.Unavailable):
            return await restores.check(house.installation)


@pytest.mark.postgres
async def test_a_halt_that_has_begun_is_behind_all_deletions_that_have(postgres_house: Stage) -> None:
    """It waits for who is just beginning some."""
    client: Any = get_connection("postgresql")
    beginning = await client.connect()
    try:
        await beginning.execute("BEGIN")
        await beginning.execute(f"SELECT pg_advisory_xact_lock(hashtextextended('{halts.LOCK}', 0))")
        halting = asyncio.create_task(halts.halt(postgres_house.installation, "Wait."))
        async with asyncio.timeout(30):
            while not await beginning.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                pass
        assert not halting.done()
        await beginning.execute("COMMIT")
        await halting
    finally:
        await beginning.close()
    assert await causes() == [HaltCause.OPERATOR]


@pytest.mark.postgres
async def test_an_account_that_somebody_has_locked_delays_itself_alone(postgres_house: Stage) -> None:
    """Neither does it keep timers waiting; when it is free, the others follow."""
    house = postgres_house
    await declared(house)
    first, *others = await db.fetch("SELECT id FROM account ORDER BY id")
    client: Any = get_connection("postgresql")
    somebody = await client.connect()
    try:
        await somebody.execute("BEGIN")
        await somebody.execute("SELECT 1 FROM account WHERE id = $1 FOR UPDATE", others[0]["id"])
        assert await restores.restate(house.installation) == 1
        assert await restores.restate(house.installation) == 0
        assert (await restores.restatement()).left == len(others)
        await somebody.execute("COMMIT")
    finally:
        await somebody.close()
    await house.worker().drain()
    assert (await restores.restatement()).left == 0
    assert await count("transition", "type = 'account.status'") == len([first, *others])


@pytest.mark.postgres
async def test_files_that_are_put_back_are_found_by_what_was_seen(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    """Neither the rows nor the timeline tell; a process that goes on running does."""
    if not postgres_server.can_restart:
        pytest.skip("the server is somebody else's")
    name = await postgres_server.create_database()
    async with opened(postgres_server.url(name), tmp_path) as house:
        snapshot = await asyncio.to_thread(postgres_server.snapshot)
        while True:
            with contextlib.suppress(errors.Unavailable):
                await house.cancel()
                break
        await asyncio.to_thread(postgres_server.put_back, snapshot)
        await when_it_is_back(house)
        assert await causes() == [HaltCause.RESTORED], "though the cancellation was in no file yet"
    await postgres_server.drop_database(name)


def environ(url: str, directory: Path) -> dict[str, str]:
    return {"SUNSET_DATABASE_URL": url, "SUNSET_DATA_DIR": str(directory), "SUNSET_CLOCK": "development"}


# ---------------------------------------------------------------------------------------------------- on both engines


async def test_a_restored_file_is_found_by_a_process_that_goes_on(sqlite_database: Database, tmp_path: Path) -> None:
    async with stage(sqlite_database, tmp_path) as house:
        await house.request_cancellation()
        back_up = BackUp(sqlite_database)
        await restores.check(house.installation)
        assert await restores.examine(house.installation) is None
        await house.cancel(INGRID, "initech", "Initech")
        back_up.restore()
        found = await restores.examine(house.installation)
        assert found is not None
        assert found.cause is HaltCause.RESTORED
        assert await causes() == [], "who only looks, changes nothing"
        for _ in range(2):
            await restores.check(house.installation)
        assert await causes() == [HaltCause.RESTORED]
        assert await count("deletion_halt") == await emailed() == 1
        assert await restores.restatement() == restores.Restatement(restores=1, left=await count("account"))


async def test_no_deletion_begins_between_a_restore_and_the_next_look(
    sqlite_database: Database, tmp_path: Path
) -> None:
    """Whoever begins deletions looks first, and does not rely on a look of some seconds ago."""
    async with stage(sqlite_database, tmp_path) as house:
        [restarted, due] = await many_canceled(house, 2, await db.now() + HOUR)
        back_up = BackUp(sqlite_database)
        await house.do(BILLING, "restartAccount", accountId=ids.encode(Kind.ACCOUNT, restarted))
        back_up.restore()
        await db.advance_clock(2 * HOUR)
        assert await deletion.begin(house.installation, [restarted, due]) == []
        assert await causes() == [HaltCause.RESTORED]


async def test_a_running_process_looks_by_itself(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every few seconds, whether or not there is anything to delete."""
    monkeypatch.setattr(restores, "CHECK_SECONDS", 0.01)
    async with stage(sqlite_database, tmp_path) as house:
        back_up = BackUp(sqlite_database)
        await house.cancel()
        back_up.restore()
        async with asyncio.timeout(60):
            while not await causes():  # noqa: ASYNC110  another task's: there is no event to wait on
                await asyncio.sleep(0.01)
        assert await causes() == [HaltCause.RESTORED]


async def test_a_file_in_the_place_of_another_is_found(sqlite_database: Database, tmp_path: Path) -> None:
    async with stage(sqlite_database, tmp_path) as house:
        await db.execute("UPDATE installation SET database = 'file 1'")
        await restores.check(house.installation)
        assert await causes() == [HaltCause.MOVED]


async def test_a_process_that_was_there_is_certain_whatever_has_happened_since(
    sqlite_database: Database, tmp_path: Path
) -> None:
    """A request that came between the restore and the next look does not make another history of it."""
    async with stage(sqlite_database, tmp_path) as house:
        back_up = BackUp(sqlite_database)
        await house.cancel()
        await restores.check(house.installation)
        back_up.restore()
        await house.request_cancellation(INGRID, "initech")
        await restores.check(house.installation)
        assert await causes() == [HaltCause.RESTORED]


async def test_who_is_certain_is_heard_behind_who_is_not(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has just started finds a copy, while another one has found that it was restored."""
    async with stage(sqlite_database, tmp_path) as house:
        back_up = BackUp(sqlite_database)
        await house.cancel()
        await restores.check(house.installation)
        back_up.restore()
        act, copied = restores._act, restores.Finding(cause=HaltCause.MOVED, evidence="A copy.")

        async def behind(installation: Any, finding: Any, incidents: int, where: Any) -> bool:
            monkeypatch.setattr(restores, "_act", act)
            assert await act(installation, copied, incidents, where)
            return await act(installation, finding, incidents, where)

        monkeypatch.setattr(restores, "_act", behind)
        await restores.check(house.installation)
        assert await causes() == [HaltCause.RESTORED], "which says what the other only asked"
        assert (await restores.restatement()).restores == 1


async def test_who_knows_less_does_not_hide_what_the_data_folder_knows(
    sqlite_database: Database, tmp_path: Path
) -> None:
    async with stage(sqlite_database, tmp_path) as house:
        await restores.check(house.installation)
        knows_less = restores._seen[db.bound()]
        back_up = BackUp(sqlite_database)
        await house.cancel()
        await restores.check(house.installation)  # as another process does, that shares the folder
        back_up.restore()
        restores._seen[db.bound()] = knows_less
        await restores.check(house.installation)
        assert await causes() == [HaltCause.RESTORED]


async def test_what_was_committed_is_remembered_though_a_look_breaks_off(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(sqlite_database, tmp_path) as house:
        back_up = BackUp(sqlite_database)
        await house.cancel()

        async def away() -> None:
            raise errors.Unavailable("The database is away.")

        with monkeypatch.context() as patch, contextlib.suppress(errors.Unavailable):
            patch.setattr(history, "newest", away)
            await restores.check(house.installation)
        back_up.restore()
        await restores.check(house.installation)
        assert await causes() == [HaltCause.RESTORED]


async def test_a_halt_that_came_with_the_back_up_is_not_this_ones(sqlite_database: Database, tmp_path: Path) -> None:
    """The nightly back-up was made while an earlier halt lasted; epochs do not come again."""
    async with stage(sqlite_database, tmp_path) as house:
        await house.cancel()
        await restores.check(house.installation)
        await restores._act(
            house.installation,
            restores.Finding(cause=HaltCause.RESTORED, evidence="Found by a process."),
            0,
            await origin(),
        )
        await house.worker().drain()
        back_up, as_of = BackUp(sqlite_database), await db.now()
        await house.cancel(INGRID, "initech", "Initech")
        key = await house.account_key("initech")
        told = (await account(key))["epoch"]
        back_up.restore()
        forget_everything(tmp_path)
        await declared(house, as_of)
        await house.cancel(INGRID, "initech", "Initech")
        assert (await account(key))["epoch"] > told


async def test_restored_twice_the_data_folder_knows_of_the_first_time(
    sqlite_database: Database, tmp_path: Path
) -> None:
    """Neither the database nor the process does, and no epoch comes again."""
    async with stage(sqlite_database, tmp_path) as house:
        await house.cancel()
        back_up, as_of = BackUp(sqlite_database), await db.now()
        for times in (1, 2):
            back_up.restore()
            forget()
            await declared(house, as_of)
            assert (await restores.restatement()).restores == times


async def test_what_two_find_at_once_is_one_restore(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(sqlite_database, tmp_path) as house:
        await restores.check(house.installation)
        back_up = BackUp(sqlite_database)
        await house.cancel()
        await restores.check(house.installation)
        back_up.restore()
        act, both = restores._act, asyncio.Barrier(2)
        acted: list[bool] = []

        async def act_together(*found: Any) -> bool:
            await both.wait()
            acted.append(await act(*found))
            return acted[-1]

        monkeypatch.setattr(restores, "_act", act_together)
        await asyncio.gather(*(restores.check(house.installation) for _ in range(2)))
        assert sorted(acted) == [False, True]
        assert (await restores.restatement()).restores == 1
        assert await causes() == [HaltCause.RESTORED]


async def test_another_history_is_not_taken_for_a_restore(house: Stage) -> None:
    """A copy for testing that is made anew each night has what the last one never had, and later than what is gone."""
    await house.cancel()
    await restores.check(house.installation)
    [file] = house.installation.data_dir.glob("last-seen-*.json")
    kept = orjson.loads(file.read_bytes())
    kept["landmark"] = {"id": str(db.uuid7()), "occurred_at": (await db.now() - DAY).isoformat()}
    file.write_bytes(orjson.dumps(kept))
    restores._seen.clear()
    await restores.check(house.installation)
    assert await causes() == [HaltCause.MOVED]
    assert (await restores.restatement()).restores == 0


async def test_a_file_in_the_data_folder_that_cannot_be_read_harms_nobody(house: Stage) -> None:
    """The folder is best effort; without what it knows, the database and the processes remain."""
    await house.cancel()
    for file in house.installation.data_dir.glob("last-seen-*.json"):
        file.write_text("not JSON")
    restores._seen.clear()
    await restores.check(house.installation)
    assert await causes() == []


async def test_after_a_restore_every_epoch_is_ahead_and_everybody_is_notified(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endpoints of whatever types, subscribers, and systems, which acknowledge anew; interrupted, it goes on."""
    monkeypatch.setattr(restores, "_PAGE", 2)
    async with receiving() as receiver, obeyed(database, tmp_path) as house, AsyncExitStack() as stack:
        await endpoints.create(
            None,
            house.installation.receivers,
            url=receiver.url,
            description="Of few words",
            event_types=["account.deleted"],
        )
        await house.cancel()
        await acknowledge(house, MAILER, 1)
        await house.request_cancellation(INGRID, "initech")
        before = await house.account_key("acme")
        subscribed = await stack.enter_async_context(aclosing(follow(house, SUPPORT, before)))
        assert (await next_of(subscribed)).epoch == 1
        await declared(house)
        assert (await account(before))["epoch"] == 1
        assert await restores.restate(house.installation) == 2
        left = (await restores.restatement()).left
        assert left == await count("account") - 2
        await house.worker().drain()
        assert (await restores.restatement()).left == 0
        assert await count("account", f"epoch < {EPOCHS_OF_A_RESTORE}") == 0
        change = await next_of(subscribed)
        assert (change.status, change.epoch) == (AccountStatus.CANCELED, EPOCHS_OF_A_RESTORE + 1)
        assert set(receiver.types) == {"account.status"}
        bodies: list[Any] = [event["data"] for event in receiver.events]
        told = {body["accountReference"]: body for body in bodies}
        assert len(told) == len(receiver.events) == await count("account")
        assert (told["acme"]["status"], told["acme"]["epoch"]) == ("CANCELED", EPOCHS_OF_A_RESTORE + 1)
        assert told["acme"]["deletionScheduledFor"] is not None
        assert (told["initech"]["status"], told["initech"]["epoch"]) == ("ACTIVE", EPOCHS_OF_A_RESTORE)
        assert told["initech"]["deletionScheduledFor"] is None
        assert await statuses(house) == {MAILER: "PENDING", LOGIN: "PENDING"}
        assert (await acknowledge(house, MAILER, 1))["__typename"] == "EnforcementNotAwaitedError"
        answer = await acknowledge(house, MAILER, EPOCHS_OF_A_RESTORE + 1)
        assert answer["__typename"] == "AcknowledgeEnforcementSuccess"
        assert await invariants.check() == []
        await house.do(BILLING, "restartAccount", accountId=await house.account_id("acme"))
        assert (await account(before))["epoch"] == EPOCHS_OF_A_RESTORE + 2
        assert await invariants.check() == []


async def test_the_first_transition_after_a_restore_is_ahead_already(house: Stage) -> None:
    await house.cancel()
    await declared(house)
    key = await house.account_key("acme")
    await house.do(BILLING, "holdDeletion", accountId=await house.account_id("acme"), note="Wait.")
    assert (await account(key))["epoch"] == EPOCHS_OF_A_RESTORE + 1
    assert await invariants.check() == []
    await house.worker().drain()
    assert (await account(key))["epoch"] == EPOCHS_OF_A_RESTORE + 1
    assert await invariants.check() == []


async def test_an_account_that_comes_after_a_restore_is_ahead_of_one_that_was_lost(house: Stage) -> None:
    await declared(house)
    [new] = await many(house, 1, "again")
    assert (await account(new))["epoch"] == EPOCHS_OF_A_RESTORE
    assert await invariants.check() == []


async def test_what_has_begun_goes_on_and_what_is_deleted_stays_so(house: Stage) -> None:
    await many_canceled(house, 2, await db.now() - HOUR)
    assert len(await deletion.begin(house.installation, [one async for one in due()])) == 2
    await declared(house)
    await house.worker().drain()
    assert await count("account", "status = 'DELETED'") == 2


async def due() -> AsyncIterator[UUID]:
    async for one in deletion.due_first():
        yield one.id


async def test_a_restore_is_said_once_and_its_time_is_noted(house: Stage) -> None:
    as_of = await db.now()
    for _ in range(2):
        await declared(house, as_of)
    assert (await restores.restatement()).restores == 1
    assert [one.as_of for one in await halts.current()] == [as_of]
    await declared(house, as_of - DAY)
    assert (await restores.restatement()).restores == 2, "another time is another restore"
    await halts.resume("Looked at.")
    await declared(house, as_of - DAY)
    assert (await restores.restatement()).restores == 2
    assert await causes() == [], "who only reads another log halts nothing"
    await restores.declare(house.installation, as_of=as_of - 2 * DAY, at_least=7)
    assert (await restores.restatement()).restores == 8, "the logs know of earlier ones, though the database does not"
    with pytest.raises(errors.InvalidInput):
        await declared(house, await db.now() + DAY)


async def test_a_canceled_account_can_be_restarted_for_the_minimum_notice_after_a_restore(house: Stage) -> None:
    """It may have been restarted since the back-up, and its window be over by now."""
    [gone, _] = await many_canceled(house, 2, await db.now() - HOUR)
    account_id = ids.encode(Kind.ACCOUNT, gone)
    assert (await house.do(BILLING, "restartAccount", accountId=account_id))["__typename"] == "RestartWindowClosedError"
    await declared(house)
    row = await account(gone)
    notice = house.installation.policy.minimum_notice
    assert row["restartable_until"] == row["deletion_scheduled_for"] > await db.now() + notice - HOUR
    assert row["reminder_due_at"] is not None
    assert (await house.do(BILLING, "restartAccount", accountId=account_id))["__typename"] == "RestartAccountSuccess"


async def test_the_time_to_restart_does_not_run_out_while_nobody_has_looked(house: Stage) -> None:
    [gone, _] = await many_canceled(house, 2, await db.now() - HOUR)
    await declared(house)
    for _ in range(5):
        await db.advance_clock(house.installation.policy.minimum_notice * 0.6)
        await restores.check(house.installation)
    restarted = await house.do(BILLING, "restartAccount", accountId=ids.encode(Kind.ACCOUNT, gone))
    assert restarted["__typename"] == "RestartAccountSuccess"


# ------------------------------------------------------------------------------------------------------ halts by hand


async def test_a_halt_that_nobody_has_looked_at_does_not_end_with_another(house: Stage) -> None:
    await halts.halt(house.installation, "A fault in the import.")
    await declared(house)
    with pytest.raises(errors.InvalidInput, match="OPERATOR, RESTORED"):
        await halts.resume("Mended.")
    ended = await halts.resume("Mended.", [HaltCause.OPERATOR])
    assert [one.evidence for one in ended] == ["A fault in the import."]
    assert await causes() == [HaltCause.RESTORED]


async def test_halted_by_hand_nothing_begins_until_it_is_resumed(house: Stage) -> None:
    await many_canceled(house, 2, await db.now() - HOUR)
    await halts.halt(house.installation, "A fault in the import.")
    await halts.halt(house.installation, "The same again.")
    assert await house.timers().run() == 0
    assert await emailed() == 1
    shown = await house.ask(
        SUPPORT, "{ deletionHalts { cause evidence asOf haltedAt } deletionBreaker { state waiting } }"
    )
    [halt] = shown["data"]["deletionHalts"]
    assert (halt["cause"], halt["evidence"], halt["asOf"]) == ("OPERATOR", "A fault in the import.", None)
    assert (await house.ask(ALICE, "{ deletionHalts { evidence } }"))["errors"][0]["extensions"]["code"] == "FORBIDDEN"
    assert (await breaker(house.installation.policy)).left == 0
    await halts.resume("Mended.")
    assert await causes() == []
    await house.timers().run()
    assert await count("account", "deletion_started_at IS NOT NULL") == 2
    with pytest.raises(errors.DeletionsNotHalted):
        await halts.resume("Again.")
    with pytest.raises(errors.InvalidInput):
        await halts.halt(house.installation, " ")


async def test_too_many_that_fall_due_meanwhile_stop_at_the_breaker(house: Stage) -> None:
    await halts.halt(house.installation, "A fault in the import.")
    await many_canceled(house, 11, await db.now() - HOUR)
    assert await house.timers().run() == 0
    assert await count("deletion_breaker") == 0, "nobody needs to be told twice"
    await halts.resume("Mended.")
    assert await house.timers().run() == 0
    assert await count("deletion_breaker") == 1


# ------------------------------------------------------------------------------------------- what is lost, by the log


async def test_each_transition_is_in_the_log(house: Stage) -> None:
    """At whatever level, once it is committed, with what tells it from others and no name."""
    with log_in_memory() as stream:
        await house.cancel()
        with contextlib.suppress(ZeroDivisionError):
            async with db.transaction():
                await history.append(
                    TransitionType.STATUS,
                    account_id=await house.account_key("globex"),
                    status=AccountStatus.ACTIVE,
                    request_id=None,
                    actor=SYSTEM,
                    now=await db.now(),
                )
                raise ZeroDivisionError
        text = stream.getvalue()
    lines = [orjson.loads(line) for line in text.splitlines() if history.LOGGED in line]
    rows = await db.fetch("SELECT * FROM transition ORDER BY sequence")
    assert [(one["type"], one["sequence"], one["epoch"], one["account_id"]) for one in lines] == [
        (row["type"], row["sequence"], row["epoch"], str(row["account_id"])) for row in rows
    ]
    assert {one["actor_kind"] for one in lines} == {"MEMBER"}
    assert re.findall(r"Acme|Alice|@", "".join(str(one) for one in lines)) == []
    assert len(list(lost_transitions.read(logged(text)))) == len(rows)


@pytest.mark.parametrize(
    "log", [b"", b"plain text\n", b"[1, 2]\n", b'{"event": "http.request"}\n2026 [info] account.transition id=1\n']
)
def test_a_log_that_cannot_be_read_is_refused(log: bytes) -> None:
    """What is not read would be taken for nothing lost."""
    with pytest.raises(errors.InvalidInput):
        list(lost_transitions.read(log.splitlines()))


def test_a_line_that_a_container_has_prefixed_is_read_and_a_broken_one_refused() -> None:
    line = (
        b'api-1 | {"event": "account.transition", "transition_id": "019ab0c1-7e00-7000-8000-000000000101", '
        b'"account_id": "019ab0c1-7e00-7000-8000-000000000001", "type": "account.restarted", '
        b'"status": "ACTIVE", "epoch": 2, "sequence": 4, "actor_kind": "STAFF", '
        b'"occurred_at": "2026-11-23T09:30:00+00:00"}\n'
    )
    in_a_container = orjson.dumps({"log": line.partition(b"| ")[2].decode(), "stream": "stderr"})
    of_a_query = b'2026-11-23 {app="sunset"} ' + line.partition(b"| ")[2]
    [one, *others] = lost_transitions.read([b'{"event": "http.request"}\n', line, in_a_container, of_a_query])
    assert one.occurred_at == datetime(2026, 11, 23, 9, 30, tzinfo=UTC)
    assert others == [one, one]
    with pytest.raises(errors.InvalidInput):
        list(lost_transitions.read([line.replace(b"STAFF", b"NOBODY")]))


async def mutations(house: Stage, lines: list[bytes]) -> list[str]:
    """Of the commands for what is lost."""
    lost = await lost_transitions.find(lost_transitions.read(lines))
    commands = "\n".join(lost_transitions.script(lost, "https://sunset.example"))
    return re.findall(r"\{ (\w+)\(input", commands)


@pytest.mark.parametrize(
    ("lost", "again"),
    [
        ("restart", ["restartAccount"]),
        ("hold", ["holdDeletion"]),
        ("hold release", []),
        ("hold restart", ["restartAccount"]),
        ("restart cancel", ["holdDeletion"]),
        ("restart cancel restart", ["restartAccount"]),
    ],
)
async def test_what_a_canceled_account_has_lost_is_done_again(
    sqlite_database: Database, tmp_path: Path, lost: str, again: list[str]
) -> None:
    async with stage(sqlite_database, tmp_path) as house:
        acme = await house.account_id("acme")
        await house.cancel()
        back_up = BackUp(sqlite_database)
        with log_in_memory() as stream:
            for step in lost.split():
                if step == "cancel":
                    await house.cancel()
                else:
                    mutation = {"restart": "restartAccount", "hold": "holdDeletion", "release": "releaseDeletion"}[step]
                    note = {} if step == "restart" else {"note": "Because."}
                    assert "message" not in await house.do(BILLING, mutation, accountId=acme, **note)
        back_up.restore()
        assert await mutations(house, logged(stream.getvalue())) == again


async def test_what_an_active_account_has_lost_is_done_again(sqlite_database: Database, tmp_path: Path) -> None:
    """Staff opens a lost cancellation; nobody confirms it for a member. A lost withdrawal is the manager's."""
    async with stage(sqlite_database, tmp_path) as house:
        await house.request_cancellation(INGRID, "initech")
        back_up = BackUp(sqlite_database)
        with log_in_memory() as stream:
            await house.cancel()
            await house.do(INGRID, "withdrawCancellation", accountId=await house.account_id("initech"))
        back_up.restore()
        lines = logged(stream.getvalue())
        assert sorted(await mutations(house, lines)) == ["cancelAccount", "withdrawCancellation"]
        lost = await lost_transitions.find(lost_transitions.read(lines))
        async with serving(house.app, house.installation.changes) as served:
            commands = list(lost_transitions.script(lost, served.http.removesuffix("/graphql")))
            assert commands == list(lost_transitions.script(lost, served.http.removesuffix("/graphql")))
            tokens = {"BILLING": house.token(BILLING), "CSM_1": house.token(CSM)}
            answers = await asyncio.to_thread(run, commands, **tokens)
            again = await asyncio.to_thread(run, commands, **tokens)
        told = sorted(answer["__typename"] for data in answers for answer in data.values())
        assert told == ["CancelAccountSuccess", "WithdrawCancellationSuccess"]
        assert answers == again, "repeating them has no second effect"
        assert await promised(await house.account_key("acme"), "confirmation-requested")


async def test_a_lost_confirmation_of_an_open_request_is_asked_for_again(
    sqlite_database: Database, tmp_path: Path
) -> None:
    """The member's own request is open still: it makes room for one whose link the members are sent."""
    async with stage(sqlite_database, tmp_path) as house:
        await house.request_cancellation()
        back_up = BackUp(sqlite_database)
        with log_in_memory() as stream:
            await house.cancel()
        back_up.restore()
        lost = await lost_transitions.find(lost_transitions.read(logged(stream.getvalue())))
        async with serving(house.app, house.installation.changes) as served:
            commands = list(lost_transitions.script(lost, served.http.removesuffix("/graphql")))
            answers = await asyncio.to_thread(run, commands, BILLING=house.token(BILLING), CSM_1=house.token(CSM))
        told = [answer["__typename"] for data in answers for answer in data.values()]
        assert told == ["WithdrawCancellationSuccess", "CancelAccountSuccess"]
        assert await promised(await house.account_key("acme"), "confirmation-requested")


async def test_a_withdrawal_that_is_lost_is_done_again_before_and_after_the_effect(
    sqlite_database: Database, tmp_path: Path
) -> None:
    plans = dict(policy.load().plans)
    plans["essentials"] = replace(plans["essentials"], effective=CancellationTiming.PERIOD_END)
    async with stage(sqlite_database, tmp_path, plans=plans) as house:
        end = await db.now() + DAY
        await db.execute("UPDATE account SET current_period_end = $1", end)
        await house.cancel()
        back_up = BackUp(sqlite_database)
        with log_in_memory() as stream:
            await house.do(ALICE, "withdrawCancellation", accountId=await house.account_id("acme"))
        back_up.restore()
        assert await mutations(house, logged(stream.getvalue())) == ["withdrawCancellation", "restartAccount"]


async def test_of_an_account_that_has_gone_on_people_decide(sqlite_database: Database, tmp_path: Path) -> None:
    """A restart is lost, done again by hand, and the customer cancels again: the log does not undo that."""
    async with stage(sqlite_database, tmp_path) as house:
        acme = await house.account_id("acme")
        await house.cancel()
        back_up = BackUp(sqlite_database)
        with log_in_memory() as stream:
            await house.do(BILLING, "restartAccount", accountId=acme)
        back_up.restore()
        lines = logged(stream.getvalue())
        await declared(house)
        await house.worker().drain()
        assert await mutations(house, lines) == ["restartAccount"], "a status that was sent is nothing that happened"
        await house.do(BILLING, "restartAccount", accountId=acme)
        await house.cancel()
        assert await mutations(house, lines) == []


async def test_each_manager_has_a_variable_of_their_own(sqlite_database: Database, tmp_path: Path) -> None:
    async with stage(sqlite_database, tmp_path) as house:
        [row] = await db.fetch("SELECT id FROM staff WHERE email = $1", CSM)
        await db.execute("UPDATE account SET csm_id = $1 WHERE reference = 'acme'", row["id"])
        await db.execute("UPDATE account SET csm_id = NULL WHERE reference = 'initech'")
        await house.request_cancellation()
        await house.request_cancellation(INGRID, "initech")
        back_up = BackUp(sqlite_database)
        with log_in_memory() as stream:
            for who, reference in ((ALICE, "acme"), (INGRID, "initech")):
                await house.do(who, "withdrawCancellation", accountId=await house.account_id(reference))
        back_up.restore()
        lost = await lost_transitions.find(lost_transitions.read(logged(stream.getvalue())))
        text = "\n".join(lost_transitions.script(lost, "https://sunset.example"))
        assert f"# CSM_1: a token of {CSM}." in text
        assert "# CSM_2: a token of any Customer Success Manager." in text
        assert re.findall(r"Bearer \$(\w+)", text) == ["CSM_1", "CSM_2"]


async def test_an_account_that_is_lost_itself_is_told_of(sqlite_database: Database, tmp_path: Path) -> None:
    async with stage(sqlite_database, tmp_path):
        unknown = lost_transitions.Logged(
            id=db.uuid7(),
            account_id=db.uuid7(),
            type=TransitionType.CANCELED,
            status=AccountStatus.CANCELED,
            epoch=1,
            sequence=3,
            actor_kind=ActorKind.MEMBER,
            occurred_at=await db.now(),
        )
        [lost] = await lost_transitions.find([unknown, unknown])
        assert lost == Lost(account_id=unknown.account_id, account=None, transitions=[unknown], has_gone_on=False)
        assert "next sync" in "\n".join(lost_transitions.script([lost], "https://sunset.example"))
