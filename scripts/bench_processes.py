"""Sunset's processes, as its commands run them, to be measured from outside."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
