"""Sunset's processes, as its commands run them, to be measured from outside."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Server:
    pid: int
    port: int

    async def ready(self) -> None:
        for _ in range(300):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                await asyncio.sleep(0.1)
            else:
                writer.close()
                return
        raise RuntimeError("A server did not start within 30 seconds.")


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def serving(environ: dict[str, str]) -> Iterator[Server]:
    """The service: one process, requests logged."""
    port = free_port()
    with command("serve", environ | {"SUNSET_PORT": str(port)}) as pid:
        yield Server(pid=pid, port=port)


@contextmanager
def command(name: str, environ: dict[str, str]) -> Iterator[int]:
    """`sunset <name>`, until the end of the block: the process's id."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from app.cli import main; main()", name],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """What a process has used so far, in user and kernel mode, all threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
