"""Wake-ups: after the commit, from other connections, and again after a connection was lost."""

import asyncio

import pytest

from app import db
from app.db import Database, asyncpg_backend
from tests.postgres import PostgresServer

LONG = 30.0
"""Ends a test that would hang; no test waits for it."""


async def test_beginning_to_listen_is_a_wake_up(database: Database) -> None:
    """What was sent before cannot be known, so it is looked for."""
    async with db.listen("outbox") as wakeups:
        assert await wakeups.wait(LONG)
        assert not await wakeups.wait(0)


async def test_a_notification_wakes_after_the_commit(database: Database) -> None:
    async with db.listen("outbox") as wakeups, db.listen("other") as others:
        assert await wakeups.wait(LONG)
        assert await others.wait(LONG)
        async with db.transaction():
            await db.notify("outbox")
            assert not await wakeups.wait(0)
        assert await wakeups.wait(LONG)
        await db.notify("outbox")
        assert await wakeups.wait(LONG)
        assert not await others.wait(0)


async def test_a_notification_carries_what_it_was_given(database: Database) -> None:
    """After the commit and not before; None says that some may have been missed, as at the beginning."""
    heard: asyncio.Queue[str | None] = asyncio.Queue()
    async with db.hear("changed", heard.put_nowait), asyncio.timeout(LONG):
        assert await heard.get() is None
        async with db.transaction():
            await db.notify("changed", "one")
            await db.notify("changed", "one")
            await db.notify("changed", "two")
            assert heard.empty()
        assert {await heard.get(), await heard.get()} == {"one", "two"}
        await db.notify("changed", "three")
        assert await heard.get() == "three"


async def test_all_listeners_wake(database: Database) -> None:
    async with db.listen("outbox") as first, db.listen("outbox") as second:
        assert await first.wait(LONG)
        assert await second.wait(LONG)
        await db.notify("outbox")
        assert await first.wait(LONG)
        assert await second.wait(LONG)


@pytest.mark.postgres
async def test_a_notification_reaches_other_processes(postgres_database: Database) -> None:
    """Another `Database` stands for them: nothing but the server connects the two."""
    other = await Database.open(postgres_database.url, pool_size=1)
    try:
        async with db.listen("outbox") as wakeups:
            assert await wakeups.wait(LONG)
            with other.bind():
                await db.notify("outbox")
            assert await wakeups.wait(LONG)
    finally:
        await other.close()


@pytest.mark.postgres
async def test_a_lost_connection_wakes_and_listens_again(postgres_database: Database) -> None:
    terminate = "SELECT count(pg_terminate_backend(pid)) AS n FROM pg_stat_activity WHERE query LIKE 'LISTEN %'"
    async with db.listen("outbox") as wakeups:
        assert await wakeups.wait(LONG)
        assert await db.fetch(terminate) == [{"n": 1}]
        assert await wakeups.wait(LONG)
        listening = "SELECT count(*) AS n FROM pg_stat_activity WHERE query LIKE 'LISTEN %' AND datname = $1"
        async with asyncio.timeout(LONG):
            name = (await db.fetch("SELECT current_database() AS name"))[0]["name"]
            while await db.fetch(listening, name) != [{"n": 1}]:
                await wakeups.wait(0.05)
        while await wakeups.wait(0.2):
            pass
        await db.notify("outbox")
        assert await wakeups.wait(LONG)


@pytest.mark.postgres
async def test_listening_survives_a_restart_of_the_server(postgres_server: PostgresServer) -> None:
    """Begun while the server is away, too."""
    if not postgres_server.can_restart:
        pytest.skip("the given server is not ours to restart")
    name = await postgres_server.create_database()
    database = await Database.open(postgres_server.url(name))
    try:
        with database.bind():
            await asyncio.to_thread(postgres_server.stop)
            async with db.listen("outbox") as wakeups:
                assert not await wakeups.wait(0)
                await asyncio.to_thread(postgres_server.start)
                assert await wakeups.wait(LONG)
                await db.notify("outbox")
                assert await wakeups.wait(LONG)
    finally:
        await database.close()
        await postgres_server.drop_database(name)


@pytest.mark.postgres
async def test_a_server_that_answers_no_more_is_noticed(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that vanishes ends no connection: only asking tells."""
    if not postgres_server.can_restart:
        pytest.skip("the given server is not ours to pause")
    monkeypatch.setattr(asyncpg_backend, "_HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(asyncpg_backend, "_ANSWER_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(asyncpg_backend, "_CLEAN_SECONDS", 0.1)
    name = await postgres_server.create_database()
    database = await Database.open(postgres_server.url(name), statement_seconds=0.5)
    heard: asyncio.Queue[str | None] = asyncio.Queue()
    try:
        with database.bind():
            async with db.hear("changed", heard.put_nowait), asyncio.timeout(LONG):
                assert await heard.get() is None
                postgres_server.pause()
                try:
                    assert await heard.get() is None
                finally:
                    postgres_server.resume()
                assert await heard.get() is None
                await db.notify("changed", "again")
                assert await heard.get() == "again"
    finally:
        await database.close()
        await postgres_server.drop_database(name)
