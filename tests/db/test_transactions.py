"""Transactions that survive cancellation, a restarted server, a second process and their own misuse."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tortoise.exceptions import TransactionManagementError

from app import db
from app.db import Database, asyncpg_backend, sqlite_backend
from app.errors import Unavailable
from app.lifecycle import StaffRole
from app.models import Staff
from tests.postgres import PostgresServer

INSERT = (
    "INSERT INTO staff (id, issuer, subject, email, name, role, created_at) "
    "VALUES ($1, 'i', $2, $2, 'N', 'SUPPORT', $3)"
)


async def insert(subject: str) -> None:
    await db.execute(INSERT, db.uuid7(), subject, await db.now())


async def subjects() -> set[str]:
    return {row["subject"] for row in await db.fetch("SELECT subject FROM staff")}


class CanceledAt:
    """Awaits `work`, and cancels the task at the given suspensions (1 is the first) of it."""

    def __init__(self, work: Awaitable[None], *steps: int) -> None:
        self._work = work
        self._steps = steps
        self.reached = 0

    def __await__(self) -> Generator[Any, Any, None]:
        task = asyncio.current_task()
        assert task is not None
        inner = self._work.__await__()
        send: Callable[[], Any] = lambda: inner.send(None)  # noqa: E731
        while True:
            try:
                waited_for = send()
            except StopIteration:
                return
            self.reached += 1
            if self.reached in self._steps:
                task.cancel()
            try:
                yield waited_for
            except BaseException as error:  # handed on, as `yield from` does

                def send(error: BaseException = error) -> Any:
                    return inner.throw(error)
            else:

                def send() -> Any:
                    return inner.send(None)


@pytest.fixture
async def narrow(database: Database) -> AsyncIterator[Database]:
    """The same database through as few connections as it opens: one lost connection is one too many."""
    second = await Database.open(database.url, pool_size=1)
    try:
        with second.bind():
            yield second
    finally:
        await second.close()


@pytest.mark.parametrize("twice", [False, True], ids=["once", "and once more while cleaning up"])
async def test_a_task_canceled_at_any_await_loses_nothing(narrow: Database, twice: bool) -> None:
    """At every suspension of BEGIN, the statement and COMMIT in turn. The connections are all there afterwards."""

    async def work(name: str) -> None:
        async with db.transaction():
            await insert(name)

    step, finished = 0, False
    while not finished:
        step += 1
        canceled = CanceledAt(work(f"s{step}"), step, *([step + 1] if twice else []))

        async def run(canceled: CanceledAt = canceled) -> None:
            await canceled

        with suppress(asyncio.CancelledError):
            await asyncio.create_task(run())
        finished = canceled.reached < step
        async with db.transaction():  # would wait for ever, or find a foreign transaction open
            await insert(f"after {step}")
            assert f"after {step}" in await subjects()
    assert step > 3
    after = {name for name in await subjects() if name.startswith("after")}
    assert after == {f"after {number}" for number in range(1, step + 1)}
    # What was canceled before COMMIT was sent is not there; what finished is.
    assert "s1" not in await subjects()
    assert f"s{step}" in await subjects()


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_a_task_canceled_from_outside_loses_nothing(narrow: Database, turns: int) -> None:
    """As above, after so many turns of the event loop: the answer may already be on its way."""

    async def work() -> None:
        async with db.transaction():
            await insert("s")

    task = asyncio.create_task(work())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    async with db.transaction():
        await insert("after")
    assert "after" in await subjects()


async def test_a_canceled_statement_leaves_the_connection_usable(narrow: Database) -> None:
    """Outside of transactions too; a canceled insert is there or not, and nothing stays open behind it."""
    for step in range(1, 4):
        canceled = CanceledAt(insert(f"s{step}"), step)

        async def run(canceled: CanceledAt = canceled) -> None:
            await canceled

        with suppress(asyncio.CancelledError):
            await asyncio.create_task(run())
        await insert(f"after {step}")
    assert {"after 1", "after 2", "after 3"} <= await subjects()


async def test_an_error_rolls_back(database: Database) -> None:
    """Raw SQL and models alike."""

    async def fail() -> None:
        async with db.transaction():
            await insert("raw")
            await Staff.create(
                issuer="i", subject="orm", email="orm", name="N", role=StaffRole.SUPPORT, created_at=await db.now()
            )
            assert await subjects() == {"raw", "orm"}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await subjects() == set()


async def test_models_share_the_transaction_of_raw_sql(database: Database) -> None:
    async with db.transaction():
        await insert("s")
        assert (await Staff.get(subject="s")).email == "s"
        assert await Staff.filter(subject="s").update(name="Other") == 1
        found, created = await Staff.get_or_create(  # which opens a savepoint of its own
            subject="t",
            defaults={"issuer": "i", "email": "t", "name": "N", "role": "SUPPORT", "created_at": await db.now()},
        )
        assert created
    assert await subjects() == {"s", "t"}
    assert (await Staff.get(id=found.id)).subject == "t"


@pytest.mark.postgres
async def test_a_swallowed_error_does_not_look_committed(postgres_database: Database) -> None:
    """PostgreSQL answers COMMIT of a failed transaction with ROLLBACK and no error."""

    async def swallow() -> None:
        async with db.transaction():
            await insert("s")
            with suppress(db.IntegrityError):
                await insert("s")

    with pytest.raises(TransactionManagementError):
        await swallow()
    assert await subjects() == set()


async def test_one_action_is_one_transaction(database: Database) -> None:
    async with db.transaction():
        with pytest.raises(RuntimeError, match="inside a database transaction"):
            db.transaction()
        with pytest.raises(RuntimeError, match="inside a database transaction"):
            db.listen("outbox")
        with pytest.raises(RuntimeError, match="inside a database transaction"), database.bind():
            pass
        await insert("s")
    assert await subjects() == {"s"}


async def test_a_task_started_inside_does_not_join(database: Database) -> None:
    """Neither with raw SQL nor with models, neither while the transaction is open nor later."""
    later = asyncio.Event()

    async def wait_then_read() -> None:
        await later.wait()
        await subjects()

    async with db.transaction():
        await insert("s")
        straggler = asyncio.create_task(wait_then_read())
        for work in (subjects(), insert("t"), Staff.all().count()):
            with pytest.raises(RuntimeError, match="started inside a database transaction"):
                await asyncio.gather(work)
    later.set()
    with pytest.raises(RuntimeError, match="started inside a database transaction"):
        await straggler
    assert await subjects() == {"s"}


async def test_a_task_that_binds_for_itself_begins_outside(database: Database) -> None:
    async def read() -> set[str]:
        with database.bind():
            return await subjects()

    async with db.transaction():
        await insert("s")
        seen = await asyncio.create_task(read())
    assert seen == set()


async def test_transactions_in_parallel(database: Database) -> None:
    """More of them than connections: each waits its turn, none is lost, reads go on meanwhile."""

    async def work(number: int) -> None:
        async with db.transaction():
            await insert(f"s{number}")
        await subjects()

    await asyncio.gather(*(work(number) for number in range(50)))
    assert len(await subjects()) == 50


async def test_waiting_for_a_connection_ends(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """All connections busy: `Unavailable`, not a hang; and none is lost by it."""
    monkeypatch.setattr(asyncpg_backend, "_ACQUIRE_SECONDS", 0.05)
    monkeypatch.setattr(sqlite_backend, "_ACQUIRE_SECONDS", 0.05)
    narrow = await Database.open(database.url, pool_size=1)
    try:
        with narrow.bind():
            entered, leave = asyncio.Event(), asyncio.Event()

            async def hold() -> None:
                async with db.transaction():
                    entered.set()
                    await leave.wait()

            holder = asyncio.create_task(hold())
            await entered.wait()
            with pytest.raises(Unavailable):
                async with asyncio.timeout(30), db.transaction():
                    raise AssertionError
            leave.set()
            await holder
            async with db.transaction():
                await insert("s")
            assert await subjects() == {"s"}
    finally:
        await narrow.close()


@pytest.mark.postgres
async def test_connections_that_died_idle_are_replaced_unnoticed(postgres_database: Database) -> None:
    """Nobody has to be told `Unavailable` for each of them."""
    await asyncio.gather(*(db.fetch("SELECT pg_sleep(0.01)") for _ in range(5)))
    other = await Database.open(postgres_database.url, pool_size=1)
    try:
        with other.bind():
            others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            ended = await db.fetch_one(f"SELECT count(pg_terminate_backend(pid)) AS n {others}")
            assert ended is not None
            assert ended["n"] > 1
            while await db.fetch_one(f"SELECT 1 AS one {others}"):
                pass
    finally:
        await other.close()
    async with db.transaction():
        await insert("s")
    await asyncio.gather(*(subjects() for _ in range(5)))


@pytest.mark.postgres
async def test_a_restarted_server_is_found_again(postgres_server: PostgresServer) -> None:
    """Killed under a loop of transactions: `Unavailable` while it is away, then on again without reopening; what
    was acknowledged is there."""
    if not postgres_server.can_restart:
        pytest.skip("the given server is not ours to restart")
    name = await postgres_server.create_database()
    database = await Database.open(postgres_server.url(name), pool_size=3)
    try:
        with database.bind():
            acknowledged: set[str] = set()
            refused = asyncio.Event()
            again = asyncio.Event()
            stop = False

            async def worker(which: int) -> None:
                number = 0
                while not stop:
                    number += 1
                    try:
                        async with db.transaction():
                            await insert(f"{which}-{number}")
                            await Staff.filter(subject="nobody").count()
                    except Unavailable:
                        refused.set()
                        await asyncio.sleep(0.01)
                    else:
                        acknowledged.add(f"{which}-{number}")
                        if refused.is_set():
                            again.set()

            workers = [asyncio.create_task(worker(which)) for which in range(4)]
            try:
                for _ in range(2):
                    refused.clear()
                    again.clear()
                    await asyncio.to_thread(postgres_server.stop, "immediate")
                    async with asyncio.timeout(30):
                        await refused.wait()
                    await asyncio.to_thread(postgres_server.start)
                    async with asyncio.timeout(30):
                        await again.wait()
            finally:
                stop = True
                await asyncio.gather(*workers)
            assert acknowledged <= await subjects()
    finally:
        await database.close()
        await postgres_server.drop_database(name)


@pytest.mark.postgres
async def test_what_takes_too_long_is_unavailable(postgres_database: Database) -> None:
    """A statement, and a lock that somebody keeps."""
    hasty = await Database.open(postgres_database.url, statement_seconds=0.3, lock_seconds=0.1)
    try:
        await insert("s")
        async with db.transaction():
            await db.execute("UPDATE staff SET name = 'kept'")

            async def hurry() -> None:
                with hasty.bind():
                    with pytest.raises(Unavailable):
                        await db.fetch("SELECT pg_sleep(20)")
                    with pytest.raises(Unavailable):
                        async with db.transaction():
                            await db.execute("UPDATE staff SET name = 'wanted'")
                    assert await subjects() == {"s"}

            await asyncio.create_task(hurry())
    finally:
        await hasty.close()


COUNT_UP = """
import asyncio, sys
from app import db
from app.db import Database

async def main(url, times):
    database = await Database.open(url)
    with database.bind():
        for _ in range(int(times)):
            async with db.transaction():
                row = await db.fetch_one("SELECT epoch FROM account")
                await db.execute("UPDATE account SET epoch = $1", row["epoch"] + 1)
    await database.close()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_two_processes_on_one_sqlite_file(sqlite_database: Database) -> None:
    """Each reads, then writes: with deferred transactions most of these fail with "database is locked"."""
    await db.execute(
        "INSERT INTO account (id, reference, name, plan_code, status, epoch, last_sequence, created_at) "
        "VALUES ($1, 'r', 'n', 'p', 'ACTIVE', 0, 0, $2)",
        db.uuid7(),
        await db.now(),
    )
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", COUNT_UP, sqlite_database.url, "200", stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    outcomes = [await process.communicate() for process in processes]
    assert [(process.returncode, errors) for process, (_, errors) in zip(processes, outcomes, strict=True)] == [
        (0, b""),
        (0, b""),
    ]
    row = await db.fetch_one("SELECT epoch FROM account")
    assert row == {"epoch": 400}


def test_a_process_that_forgets_to_close_ends(tmp_path: Path) -> None:
    """The driver's thread does not keep it alive."""
    program = (
        "import asyncio\nfrom app.db import Database\n"
        f"database = asyncio.run(Database.open('sqlite://{tmp_path}/sunset.db'))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
