"""When do healthy receivers hear of a transition, beside receivers that accept the connection and never answer?

Two databases on one PostgreSQL, each with the same number of endpoints and one `sunset worker`. In one every receiver
answers; in the other a tenth hangs. In turn, a member's request to cancel is committed in each, and withdrawn in the
next round, and it is noted when each healthy receiver has heard: over TLS, on loopback, from the commit on. The first
rounds meet hanging receivers of which nothing is known yet, and the following come while these are still held on to.
"""

import asyncio
import ssl
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from bench_processes import command, cpu_seconds

from app import accounts, cancellation, demo, endpoints, main
from app.auth import Call
from app.db import Database
from app.db.migrate import migrate
from app.settings import Settings
from tests.cast import ALICE, subject
from tests.delivery.certificates import Authority
from tests.postgres import PostgresServer

_LONGEST_SECONDS = 300.0
"""A round that takes longer has failed."""


class Receivers:
    """All of them, in this process: told apart by the path. Those of `/hangs` never answer."""

    def __init__(self) -> None:
        self.port = 0
        self._heard: dict[str, float] = {}
        self._wanted = 0
        self._all_heard = asyncio.Event()
        self._open: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self, certificate: ssl.SSLContext) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=certificate, backlog=2_048)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for task in self._open:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)

    def url(self, side: str, number: int, *, hangs: bool) -> str:
        return f"https://127.0.0.1:{self.port}/{'hangs' if hangs else 'answers'}/{side}/{number}"

    def expect(self, number: int) -> None:
        """From now on, so many different healthy receivers are waited for."""
        self._heard.clear()
        self._wanted = number
        self._all_heard.clear()

    async def heard(self) -> list[float]:
        """When each of them first heard, in the order in which they did."""
        async with asyncio.timeout(_LONGEST_SECONDS):
            await self._all_heard.wait()
        return sorted(self._heard.values())

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode()
            if path.startswith("/hangs/"):
                await reader.read()  # until the other side has had enough
                return
            _, _, length = head.lower().partition(b"\r\ncontent-length: ")
            await reader.readexactly(int(length.partition(b"\r\n")[0]))
            self._heard.setdefault(path, time.perf_counter())
            if len(self._heard) == self._wanted:
                self._all_heard.set()
            writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the worker was ended
        finally:
            writer.close()


@dataclass(kw_only=True)
class Side:
    """One of the two databases, and what was measured there. Seconds from the commit."""

    healthy: int
    database: Database
    call: Call
    account_id: UUID
    """Of the account whose transitions they are."""
    worker: int
    """The process."""
    cpu_seconds: float = 0.0
    """The worker's, in all rounds together."""
    rounds: list[list[float]] = field(default_factory=list)
    transitions: list[float] = field(default_factory=list)
    """How long each transition itself took, which promises everything to everybody."""

    async def measure(self, receivers: Receivers) -> None:
        """One transition of an account, and when all have heard of it."""
        receivers.expect(self.healthy)
        used = cpu_seconds(self.worker)
        with self.database.bind():
            began = time.perf_counter()
            if len(self.rounds) % 2:
                await cancellation.withdraw(self.call, self.account_id)
            else:
                await cancellation.cancel(self.call, self.account_id)
            committed = time.perf_counter()
        self.transitions.append(committed - began)
        self.rounds.append([moment - committed for moment in await receivers.heard()])
        self.cpu_seconds += cpu_seconds(self.worker) - used


@asynccontextmanager
async def _side(
    server: PostgresServer, environ: dict[str, str], receivers: Receivers, trusted: Path, *, number: int, hanging: int
) -> AsyncIterator[Side]:
    """A database with so many endpoints, the hanging ones among them, and its worker."""
    name = await server.create_empty_database()
    with tempfile.TemporaryDirectory(prefix="sunset-bench-") as directory:
        environ = environ | {
            "SUNSET_DATABASE_URL": server.url(name),
            "SUNSET_DATA_DIR": directory,
            "SUNSET_CLOCK": "system",
            "SUNSET_WEBHOOK_ALLOW": "127.0.0.0/8",
        }
        settings = Settings.load({name: value for name, value in environ.items() if name.startswith("SUNSET_")})
        installation = main.installation(settings)
        database = await Database.open(settings.database_url, pool_size=2)
        try:
            await migrate(database)
            with database.bind():
                await demo.make(installation)
                made = [
                    await endpoints.create(
                        None,
                        installation.receivers,
                        url=receivers.url(name, place, hangs=place % (number // hanging) == 0 if hanging else False),
                        description=None,
                        event_types=None,
                    )
                    for place in range(number)
                ]
                account_id = await accounts.find("acme")
                assert account_id is not None
            identity = await installation.tokens.verify(installation.tokens.mint(subject(ALICE), timedelta(hours=6)))
            with command("worker", environ | {"SSL_CERT_FILE": str(trusted)}) as pid:
                receivers.expect(1)
                with database.bind():
                    await endpoints.ping(None, made[-1].endpoint.id)
                await receivers.heard()  # so that the worker's start is not measured
                yield Side(
                    healthy=number - hanging,
                    database=database,
                    call=Call(identity=identity, installation=installation),
                    account_id=account_id,
                    worker=pid,
                )
        finally:
            await database.close()
    await server.drop_database(name)


async def bench(server: PostgresServer, environ: dict[str, str], *, number: int, rounds: int) -> None:
    """Measure and print everything, on databases of its own."""
    hanging = number // 10
    receivers = Receivers()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sunset-bench-")))
        authority = Authority(folder)
        await stack.enter_async_context(receivers.listening(authority.server("127.0.0.1")))
        sides = [
            await stack.enter_async_context(
                _side(server, environ, receivers, authority.certificate, number=number, hanging=hangs)
            )
            for hangs in (0, hanging)
        ]
        for _ in range(rounds):
            for side in sides:  # in turn, so that whatever else the machine does meets both alike
                await side.measure(receivers)
    all_answer, some_hang = sides
    print(f"\n{number:,} endpoints, {rounds} transitions, one worker; milliseconds, from the commit on\n")
    print(f"{'of them hang':<38} {0:>11,} {hanging:>11,} {'ratio':>7}")
    figures: list[tuple[str, Callable[[Side], float]]] = [
        ("the transition itself, median", lambda side: statistics.median(side.transitions)),
        ("a healthy one has heard, median", lambda side: _share(side.rounds, 0.5)),
        ("a healthy one has heard, 95 %", lambda side: _share(side.rounds, 0.95)),
        ("the last has heard, median round", lambda side: statistics.median(one[-1] for one in side.rounds)),
        ("the last has heard, slowest round", lambda side: max(one[-1] for one in side.rounds)),
        ("CPU of the worker for each that heard", lambda side: side.cpu_seconds / rounds / side.healthy),
    ]
    for title, figure in figures:
        one, other = 1000 * figure(all_answer), 1000 * figure(some_hang)
        print(f"{title:<38} {one:>11,.1f} {other:>11,.1f} {other / one:>7.2f}")


def _share(rounds: Sequence[Sequence[float]], share: float) -> float:
    """The time by which that share of all has heard."""
    times = sorted(moment for one in rounds for moment in one)
    return times[int(len(times) * share) - 1]
