"""Databases for the tests: each test gets its own, with the newest schema and no rows, on the engines it asks for."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from app import restores
from app.db import Database
from app.db.migrate import migrate
from tests import cast
from tests.postgres import PostgresServer


@pytest.fixture(autouse=True)
def time_may_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests put databases back as they were, which a service that looks at its own every few seconds would notice."""
    monkeypatch.setattr(restores, "CHECK_SECONDS", 3600.0)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server of this test process."""
    server = PostgresServer()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file without rows, to copy from."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"

    async def make() -> None:
        database = await Database.open(f"sqlite://{path}")
        try:
            await migrate(database)
        finally:
            await database.close()

    asyncio.run(make())
    return path


@pytest.fixture
async def sqlite_database(sqlite_template: Path, tmp_path: Path) -> AsyncIterator[Database]:
    """A migrated database in a file, bound to the test."""
    path = tmp_path / "sunset.db"
    shutil.copy(sqlite_template, path)
    database = await Database.open(f"sqlite://{path}", development_clock=True)
    try:
        with database.bind():
            yield database
    finally:
        await database.close()


@pytest.fixture
async def postgres_database(postgres_server: PostgresServer) -> AsyncIterator[Database]:
    """A migrated database on the test server, bound to the test."""
    name = await postgres_server.create_database()
    try:
        database = await Database.open(postgres_server.url(name), development_clock=True)
        try:
            with database.bind():
                yield database
        finally:
            await database.close()
    finally:
        await postgres_server.drop_database(name)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest) -> Database:
    """The test runs once on each engine."""
    fixture = {"sqlite": "sqlite_database", "postgresql": "postgres_database"}[request.param]
    opened: Database = request.getfixturevalue(fixture)
    return opened


@pytest.fixture
async def house(database: Database, tmp_path: Path) -> AsyncIterator[cast.Stage]:
    """The running service with the demo company, on each engine."""
    async with cast.stage(database, tmp_path) as running:
        yield running


@pytest.fixture
async def postgres_house(postgres_database: Database, tmp_path: Path) -> AsyncIterator[cast.Stage]:
    """The running service with the demo company, on PostgreSQL, where races are real."""
    async with cast.stage(postgres_database, tmp_path) as running:
        yield running
