"""Commands run in this process, as somebody at a terminal runs them."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from app import cli
from app.db import Database
from tests.cast import Stage, stage


class Result(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's own settings; data in the test's folder; help in one width."""
    for name in [name for name in os.environ if name.startswith("SUNSET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SUNSET_DATA_DIR", str(tmp_path / "var"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def sunset(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process."""

    def run(*arguments: str) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        out, err = capfd.readouterr()
        status = ended.value.code
        assert isinstance(status, int)
        return Result(status, out, err)

    return run


@pytest.fixture
def migrated(sunset: Run) -> Run:
    assert sunset("migrate").status == 0
    return sunset


Play = Callable[[Callable[[Stage], Awaitable[None]]], None]


@pytest.fixture
def play(migrated: Run, tmp_path: Path) -> Play:
    """Lets something happen in the installation that the commands are about, with its demo company."""

    async def within(scene: Callable[[Stage], Awaitable[None]]) -> None:
        directory = tmp_path / "var"
        database = await Database.open(f"sqlite://{directory / 'sunset.db'}", development_clock=True)
        try:
            with database.bind():
                async with stage(database, directory) as house:
                    await scene(house)
        finally:
            await database.close()

    return lambda scene: asyncio.run(within(scene))
