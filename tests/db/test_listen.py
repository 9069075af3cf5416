"""Wake-ups: after the commit, from other connections, and again after a connection was lost."""

import asyncio

import pytest

from app import db
from app.db import Database
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
