"""Real processes of one installation: `sunset serve` and `sunset worker`, each with its own clock, killed at will.

    with Processes(tmp_path, database.url) as processes:
        api = processes.serve(clock=timedelta(days=-1))
        await processes.ready(api)

They share a data folder and so the development key. Each ends with the tests, also when those are killed.
"""

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn, Self

import httpx2

_ROOT = Path(__file__).parents[1]
_READY_SECONDS = 120.0
_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Process:
    command: Literal["serve", "worker"]
    popen: "subprocess.Popen[bytes]"
    log: Path
    port: int | None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def runs(self) -> bool:
        return self.popen.poll() is None


def said(process: Process) -> str:
    """What it logged beside the requests, and what it printed beside the introduction with its tokens."""
    lines = process.log.read_text().splitlines()
    return "\n".join(line for line in lines if '"http.request"' not in line and not line.startswith("eyJ"))


class Processes:
    """Starts and ends the processes. Leaving the block kills those that are left."""

    def __init__(self, directory: Path, database_url: str, **environ: str) -> None:
        self.environ = {
            "SUNSET_DATA_DIR": str(directory / "data"),
            "SUNSET_DATABASE_URL": database_url,
            "SUNSET_DATABASE_POOL_SIZE": "4",
            "SUNSET_CLOCK": "development",
            "SUNSET_DEMO": "false",
            "SUNSET_WORKER": "false",
            "SUNSET_RATE_LIMIT_CALLER": "0",
            "SUNSET_RATE_LIMIT_ACCOUNT": "0",
            "SUNSET_RATE_LIMIT_DOCUMENTS": "0",
            "SUNSET_LOG_FORMAT": "json",
            "SUNSET_PUBLIC_URL": "https://sunset.example",
            "SUNSET_DEVELOPMENT_ON_NETWORK": "true",
            **environ,
        }
        self._directory = directory
        self.all: list[Process] = []
        """Every process that was started, the dead ones too."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.all:
            self.kill(process)
        if error is not None:
            for process in self.all:
                print(f"--- {process.log.name}\n{said(process)[-4_000:]}")

    def serve(self, clock: timedelta = timedelta()) -> Process:
        """A server of the API on a free port, whose own clock is wrong by `clock`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return self._start("serve", port, clock)

    def worker(self, clock: timedelta = timedelta()) -> Process:
        return self._start("worker", None, clock)

    def _start(self, command: Literal["serve", "worker"], port: int | None, clock: timedelta) -> Process:
        own = {name: value for name, value in os.environ.items() if not name.startswith("SUNSET_")} | self.environ
        if port is not None:
            own["SUNSET_PORT"] = str(port)
        log = self._directory / f"{len(self.all):02}-{command}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [sys.executable, "-m", "tests.processes", str(clock.total_seconds()), command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=_ROOT,
                env=own,
            )
        process = Process(command=command, popen=popen, log=log, port=port)
        self.all.append(process)
        return process

    @property
    def running(self) -> list[Process]:
        return [process for process in self.all if process.runs]

    async def ready(self, *processes: Process) -> None:
        """Return when each serves, or works. AssertionError, with what it said, when one ends instead."""
        async with asyncio.timeout(_READY_SECONDS), httpx2.AsyncClient() as client:
            for process in processes:
                while not await self._is_ready(process, client):  # noqa: ASYNC110  another process: no event to wait on
                    await asyncio.sleep(_POLL_SECONDS)

    async def _is_ready(self, process: Process, client: httpx2.AsyncClient) -> bool:
        assert process.runs, f"{process.log.name} has ended:\n{said(process)[-4_000:]}"
        if process.command == "worker":
            return "worker.started" in process.log.read_text()
        try:
            return (await client.get(f"{process.url}/readyz")).status_code == 200
        except httpx2.TransportError:
            return False

    def kill(self, process: Process) -> None:
        """End it as a machine does that loses its power."""
        process.popen.kill()
        process.popen.wait()

    def stop(self, process: Process) -> int:
        """End it in order; its exit status."""
        process.popen.send_signal(signal.SIGTERM)
        return process.popen.wait(_READY_SECONDS)


def _launch(clock: str, command: str) -> NoReturn:
    """What runs in the process: the command, on a clock that is wrong by so many seconds and goes on from there."""
    import time_machine

    from app import cli

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if wrong_by := float(clock):
        # Every clock of Python that tells the date; not those that count on (monotonic, CLOCK_BOOTTIME), which have
        # no date to be wrong about.
        time_machine.travel(datetime.now(UTC) + timedelta(seconds=wrong_by), tick=True).start()
    cli.main([command])


if __name__ == "__main__":
    _launch(*sys.argv[1:])
