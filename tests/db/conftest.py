"""A database that no migration has been run on yet."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.db import Database
from tests.postgres import PostgresServer


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
async def empty(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    """A database without tables, bound to the test, on each engine."""
    if request.param == "sqlite":
        url, drop = f"sqlite://{tmp_path}/empty.db", None
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        drop = await server.create_empty_database()
        url = server.url(drop)
    database = await Database.open(url, development_clock=True)
    try:
        with database.bind():
            yield database
    finally:
        await database.close()
        if drop is not None:
            await server.drop_database(drop)
