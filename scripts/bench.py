"""Requests per second of the service on PostgreSQL, each as a ratio to a bare endpoint that runs the same SQL.

Starts a PostgreSQL of its own with some thousand accounts, the service as `sunset serve` runs it (one process, no
worker) and the bare endpoint (`bench_bare.py`). The statements that the bare endpoint runs are those that the service
sends: they are recorded from it, request by request, before the measuring begins. Then both are loaded in turn by the
same client, round by round, so that whatever else the machine does meets both alike.

The ratio of CPU time per request is the one to watch: it holds still where requests per second depend on what the
machine's other processes do. It counts the serving process alone, without PostgreSQL and without the client.
"""

import argparse
import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import bench_streams
import bench_timers
import bench_webhooks
import httpx2
import orjson
import uvloop
from bench_bare import Replay, Slot, Statement, serve
from bench_processes import Server, cpu_seconds, free_port, serving

from app import db, limiting, logs, main, provisioning
from app.auth import Installation
from app.db import Database
from app.db.migrate import migrate
from app.graphql import nodes
from app.graphql.nodes import Kind
from app.lifecycle import MemberRole, Permission, Scope, StaffRole
from app.provisioning import AccountItem, MemberItem
from app.settings import Settings
from app.tokens import DEVELOPMENT_ISSUER
from tests.postgres import PostgresServer

STATUS = """query Status($id: ID!) {
  account(id: $id) {
    id name status canSendMessages membersCanSignIn canceledAt restartableUntil deletionScheduledFor
    plan { code name channel effective retentionHours }
    allowedActions { action allowed reason message }
    openRequest { id status requestedAt confirmationExpiresAt }
  }
}"""
ACCOUNTS = """query Accounts {
  accounts(first: 50) {
    edges { cursor node { id reference name status canceledAt deletionScheduledFor plan { code name } } }
    pageInfo { hasNextPage endCursor }
  }
}"""
CANCEL = """mutation Cancel($input: CancelAccountInput!) {
  done: cancelAccount(input: $input) {
    __typename
    ... on CancelAccountSuccess { confirmationToken request { id status } account { id status } }
  }
}"""
CONFIRM = """mutation Confirm($input: ConfirmCancellationInput!) {
  done: confirmCancellation(input: $input) {
    __typename
    ... on ConfirmCancellationSuccess { account { id status canceledAt restartableUntil deletionScheduledFor } }
  }
}"""

STAFF = "staff"
GATEKEEPER = "gatekeeper"
READERS = 50
"""Members who ask for the status, each with a token that is verified once."""

Exchange = Generator[bytes, bytes, None]
"""What one client says to a server: yields each request's bytes, and is sent the answer's body."""


@dataclass(frozen=True, kw_only=True)
class Customer:
    """An account, and its member who cancels it."""

    id: UUID
    reference: str
    name: str
    subject: str


# ---------------------------------------------------------------------------------------------------------- client


class _Connection(asyncio.Protocol):
    """One connection that is kept: an exchange after the other, each request sent when the last one is answered."""

    def __init__(self, exchanges: Iterator[Exchange]) -> None:
        self._exchanges = exchanges
        self._exchange: Exchange | None = None
        self._transport: Any = None
        self._received = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._begin()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        self._received = b""
        try:
            if not head.startswith(b"HTTP/1.1 200 ") or b'"errors"' in body:
                raise RuntimeError(f"The server answered {head.decode()}\n{body.decode()}")
            assert self._exchange is not None
            self._transport.write(self._exchange.send(body))
        except StopIteration:
            self._begin()
        except Exception as error:
            self.connection_lost(error)

    def _begin(self) -> None:
        self._exchange = next(self._exchanges, None)
        if self._exchange is None:
            self.connection_lost(None)
        else:
            self._transport.write(next(self._exchange))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            if exc is None and self._exchange is not None:
                exc = ConnectionError("The server closed the connection.")
            self.done.set_exception(exc) if exc else self.done.set_result(None)
            self._transport.close()


async def _load(port: int, exchanges: Iterable[Exchange], connections: int) -> None:
    """Hold all exchanges, as many at a time as there are connections."""
    loop, waiting = asyncio.get_running_loop(), iter(exchanges)
    opened = [
        (await loop.create_connection(lambda: _Connection(waiting), "127.0.0.1", port))[1] for _ in range(connections)
    ]
    await asyncio.gather(*(connection.done for connection in opened))


def _post(path: str, body: object, token: str = "") -> bytes:
    sent = orjson.dumps(body)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}\r\n"
    )
    if token:
        head += f"Authorization: Bearer {token}\r\n"
    return head.encode() + b"\r\n" + sent


def _get(path: str, token: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()


def _operation(query: str, token: str, **variables: object) -> bytes:
    return _post("/graphql", {"query": query, "variables": variables}, token)


def _once(request: bytes) -> Exchange:
    yield request


# ------------------------------------------------------------------------------------------------------- recording


@dataclass
class _Recorder:
    """What the service's own connections send."""

    queries: list[asyncpg.connection.LoggedQuery] = field(default_factory=list)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, new connections of this process are listened to."""
        connect = asyncpg.connect

        async def listened(*args: Any, **options: Any) -> Any:
            connection = await connect(*args, **options)
            connection.add_query_logger(self.queries.append)
            return connection

        asyncpg.connect = listened
        try:
            yield
        finally:
            asyncpg.connect = connect


@dataclass(frozen=True)
class Recording:
    """A request's statements, and what the values in its slots were when it was recorded."""

    replay: Replay
    recorded: tuple[str, ...]

    @staticmethod
    def of(queries: Sequence[Any], varying: frozenset[str]) -> "Recording":
        """Arguments in which a text of `varying` occurs become slots."""
        recorded: list[str] = []

        def arg(value: Any) -> Any:
            if not isinstance(value, str | UUID) or not any(text in str(value) for text in varying):
                return value
            recorded.append(str(value))
            return Slot(len(recorded) - 1)

        statements = []
        for query in queries:
            many = isinstance(query.args, list)  # asyncpg's `executemany` is given a list of rows
            args = tuple(tuple(map(arg, row)) for row in query.args) if many else tuple(map(arg, query.args))
            statements.append(Statement(query.query, args, many))
        return Recording(tuple(statements), tuple(recorded))

    def values(self, changes: dict[str, str]) -> list[str]:
        """The slots' values with other texts in place of those that were recorded."""
        found = []
        for value in self.recorded:
            for old, new in changes.items():
                value = value.replace(old, new)  # noqa: PLW2901
            found.append(value)
        return found


def _texts(id_: UUID) -> tuple[str, str]:
    return str(id_), id_.hex


def _names(customer: Customer) -> tuple[str, ...]:
    """How statements name the account and its member."""
    caller = limiting.caller_key(DEVELOPMENT_ISSUER, customer.subject)
    return customer.subject, customer.reference, caller, *_texts(customer.id)


def _new_ids(queries: Sequence[Any], known: UUID) -> list[UUID]:
    """The ids in the statements other than `known`: of rows that the request made, or that only it is about."""
    rows = [row for query in queries for row in (query.args if isinstance(query.args, list) else [query.args])]
    return sorted({id_ for row in rows for value in row if (id_ := _id(value)) is not None} - {known})


def _id(value: Any) -> UUID | None:
    """The id that an argument is; the ORM sends some as text."""
    try:
        return UUID(str(value)) if isinstance(value, str | UUID) and len(str(value)) == 36 else None
    except ValueError:
        return None


class Recordings:
    """What the service does for each kind of request, recorded on accounts of its own."""

    def __init__(self) -> None:
        self._of: dict[str, Recording] = {}
        self._customer: Customer
        self._ids: list[UUID] = []

    @property
    def replays(self) -> dict[str, Replay]:
        return {name: recording.replay for name, recording in self._of.items()}

    async def record(self, world: "World", settings: Settings, first: Customer, second: Customer) -> None:
        """Everything is done twice, and recorded the second time: the first prepares what is prepared once."""
        recorder = _Recorder()
        app = main.create_app(settings, world.installation)
        queries: dict[str, list[Any]] = {}

        async def send(name: str, query: str, token: str, **variables: object) -> Any:
            await asyncio.sleep(0)
            recorder.queries.clear()
            headers = {"Authorization": f"Bearer {token}"}
            answer = (
                await client.post("/graphql", json={"query": query, "variables": variables}, headers=headers)
            ).json()
            await asyncio.sleep(0)  # asyncpg tells its loggers in the loop's next turn
            queries[name] = list(recorder.queries)
            assert "errors" not in answer, answer
            return answer["data"]

        transport = httpx2.ASGITransport(app=app)
        with recorder.listening():
            async with (
                app.router.lifespan_context(app),
                httpx2.AsyncClient(transport=transport, base_url="http://bench") as client,
            ):
                for customer in (first, second):
                    recorder.queries.clear()
                    asked = await client.get(
                        f"/gate/accounts/{customer.reference}",
                        headers={"Authorization": f"Bearer {world.token(GATEKEEPER)}"},
                    )
                    assert asked.json()["canSendMessages"] is True
                    await asyncio.sleep(0)
                    queries["gate"] = list(recorder.queries)
                    token, id_ = world.token(customer.subject), nodes.encode(Kind.ACCOUNT, customer.id)
                    await send("accounts", ACCOUNTS, world.token(STAFF))
                    await send("status", STATUS, token, id=id_)
                    asked = (await send("cancel", CANCEL, token, input={"accountId": id_}))["done"]
                    await send("confirm", CONFIRM, token, input=_confirmation(asked, customer))
        self._customer = second
        self._ids = _new_ids(queries["cancel"] + queries["confirm"], second.id)
        varying = frozenset({*_names(second), *(text for id_ in self._ids for text in _texts(id_))})
        self._of = {name: Recording.of(sent, varying) for name, sent in queries.items()}

    def _request(self, name: str, changes: dict[str, str]) -> bytes:
        return _post(f"/{name}", self._of[name].values(changes))

    def _changes(self, customer: Customer) -> dict[str, str]:
        return dict(zip(_names(self._customer), _names(customer), strict=True))

    def accounts(self) -> Exchange:
        return _once(self._request("accounts", {}))

    def gate(self, customer: Customer) -> Exchange:
        return _once(self._request("gate", self._changes(customer)))

    def empty(self) -> Exchange:
        return _once(_post("/empty", []))

    def status(self, customer: Customer) -> Exchange:
        return _once(self._request("status", self._changes(customer)))

    def cancellation(self, customer: Customer) -> Exchange:
        changes = self._changes(customer)
        for old in self._ids:
            changes.update(zip(_texts(old), _texts(db.uuid7()), strict=True))
        yield self._request("cancel", changes)
        yield self._request("confirm", changes)


def _confirmation(asked: dict[str, Any], customer: Customer) -> dict[str, str]:
    return {
        "requestId": asked["request"]["id"],
        "confirmationToken": asked["confirmationToken"],
        "accountName": customer.name,
    }


# ----------------------------------------------------------------------------------------------------------- world


class World:
    """The database's content, and how its people ask the service."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.customers: list[Customer] = []
        self._tokens: dict[str, str] = {}

    def token(self, subject: str) -> str:
        if subject not in self._tokens:
            self._tokens[subject] = self.installation.tokens.mint(subject, timedelta(hours=6))
        return self._tokens[subject]

    async def fill(self, number: int) -> None:
        """Accounts with three members each, and one of the staff."""
        await provisioning.add_staff(
            email="support@vendor.example",
            name="Sam Porter",
            role=StaffRole.SUPPORT,
            issuer=DEVELOPMENT_ISSUER,
            subject=STAFF,
        )
        await provisioning.add_service(
            name=GATEKEEPER, scopes=frozenset({Scope.GATE}), issuer=DEVELOPMENT_ISSUER, subject=GATEKEEPER
        )
        items = [_item(index) for index in range(number)]
        for begin in range(0, number, provisioning.MAX_ITEMS):
            batch = items[begin : begin + provisioning.MAX_ITEMS]
            for item, result in zip(batch, await provisioning.sync(self.installation, batch), strict=True):
                assert result.account_id is not None, result.refusal
                assert item.members
                self.customers.append(
                    Customer(
                        id=result.account_id,
                        reference=item.reference,
                        name=item.name,
                        subject=item.members[0].subject,
                    )
                )
        await db.execute("ANALYZE")

    def gate(self, customer: Customer) -> Exchange:
        return _once(_get(f"/gate/accounts/{customer.reference}", self.token(GATEKEEPER)))

    def accounts(self) -> Exchange:
        return _once(_operation(ACCOUNTS, self.token(STAFF)))

    def status(self, customer: Customer) -> Exchange:
        return _once(_operation(STATUS, self.token(customer.subject), id=nodes.encode(Kind.ACCOUNT, customer.id)))

    def cancellation(self, customer: Customer) -> Exchange:
        token = self.token(customer.subject)
        body = yield _operation(CANCEL, token, input={"accountId": nodes.encode(Kind.ACCOUNT, customer.id)})
        body = yield _operation(CONFIRM, token, input=_confirmation(orjson.loads(body)["data"]["done"], customer))
        assert orjson.loads(body)["data"]["done"]["__typename"] == "ConfirmCancellationSuccess", body


def _item(index: int) -> AccountItem:
    granted = frozenset({Permission.ACCESS_BILLING_AND_ACCOUNT_INFO})
    people: list[tuple[str, MemberRole, frozenset[Permission]]] = [
        ("admin", MemberRole.ADMIN, frozenset()),
        ("billing", MemberRole.MEMBER, granted),
        ("plain", MemberRole.MEMBER, frozenset()),
    ]
    return AccountItem(
        reference=f"customer-{index:05}",
        name=f"Customer {index:05}",
        plan_code="essentials",
        members=[
            MemberItem(
                subject=f"{who}-of-{index:05}",
                email=f"{who}@customer-{index:05}.example",
                name=f"{who.title()} {index:05}",
                role=role,
                permissions=permissions,
            )
            for who, role, permissions in people
        ],
    )


# --------------------------------------------------------------------------------------------------------- servers


@contextmanager
def _bare(settings: Settings, replays: dict[str, Replay]) -> Iterator[Server]:
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(port, settings.database_url, settings.database_pool_size, replays)
    )
    process.start()
    assert process.pid is not None
    try:
        yield Server(pid=process.pid, port=port)
    finally:
        process.terminate()
        process.join()


# ------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is asked in each round. `service` and `bare` give as many exchanges as they are asked for."""

    title: str
    exchanges: int
    requests: int
    """In each exchange."""
    service: Callable[[int], Iterable[Exchange]]
    bare: Callable[[int], Iterable[Exchange]]


@dataclass
class Figures:
    """One server's, in one scenario."""

    per_second: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    requests: int = 0

    async def measure(self, server: Server, exchanges: list[Exchange], requests: int, connections: int) -> None:
        began, used = time.perf_counter(), cpu_seconds(server.pid)
        await _load(server.port, exchanges, connections)
        self.per_second.append(requests / (time.perf_counter() - began))
        self.cpu_seconds += cpu_seconds(server.pid) - used
        self.requests += requests

    @property
    def rate(self) -> float:
        return statistics.median(self.per_second)

    @property
    def cpu_milliseconds(self) -> float:
        return 1000 * self.cpu_seconds / self.requests


def _scenarios(world: World, recordings: Recordings, quick: bool) -> list[Scenario]:
    share = 4 if quick else 1
    readers, cancelers = world.customers[2 : 2 + READERS], iter(world.customers[2 + READERS :])

    def turns(count: int) -> Iterator[Customer]:
        return (readers[index % READERS] for index in range(count))

    def distinct(count: int) -> Iterator[Customer]:
        return (next(cancelers) for _ in range(count))

    return [
        Scenario(
            title="gate",
            exchanges=4_000 // share,
            requests=1,
            service=lambda count: map(world.gate, turns(count)),
            bare=lambda count: map(recordings.gate, turns(count)),
        ),
        Scenario(
            title="gate / empty endpoint",
            exchanges=4_000 // share,
            requests=1,
            service=lambda count: map(world.gate, turns(count)),
            bare=lambda count: (recordings.empty() for _ in range(count)),
        ),
        Scenario(
            title="status query",
            exchanges=3_000 // share,
            requests=1,
            service=lambda count: map(world.status, turns(count)),
            bare=lambda count: map(recordings.status, turns(count)),
        ),
        Scenario(
            title="list of 50 accounts",
            exchanges=400 // share,
            requests=1,
            service=lambda count: (world.accounts() for _ in range(count)),
            bare=lambda count: (recordings.accounts() for _ in range(count)),
        ),
        Scenario(
            title="cancel + confirm",
            exchanges=160 // share,
            requests=2,
            service=lambda count: map(world.cancellation, distinct(count)),
            bare=lambda count: map(recordings.cancellation, distinct(count)),
        ),
    ]


async def _measure(scenario: Scenario, service: Server, bare: Server, rounds: int, connections: int) -> None:
    ours, theirs = Figures(), Figures()
    requests = scenario.exchanges * scenario.requests
    for number in range(rounds + 1):
        if number == 1:  # the first round was for warming up
            ours, theirs = Figures(), Figures()
        await ours.measure(service, list(scenario.service(scenario.exchanges)), requests, connections)
        await theirs.measure(bare, list(scenario.bare(scenario.exchanges)), requests, connections)
    print(
        f"{scenario.title:<22} {ours.rate:>9,.0f} {theirs.rate:>9,.0f} {ours.rate / theirs.rate:>7.2f}  "
        f"{ours.cpu_milliseconds:>9.3f} {theirs.cpu_milliseconds:>9.3f} "
        f"{ours.cpu_milliseconds / theirs.cpu_milliseconds:>7.2f}",
        flush=True,
    )


@asynccontextmanager
async def _filled(settings: Settings, accounts: int) -> AsyncIterator[World]:
    world = World(main.installation(settings))
    database = await Database.open(settings.database_url, pool_size=2)
    try:
        await migrate(database)
        with database.bind():
            await world.fill(accounts)
            yield world
    finally:
        await database.close()


async def bench(environ: dict[str, str], *, quick: bool, connections: int) -> None:
    """Measure and print everything, on an empty database."""
    settings = Settings.load({name: value for name, value in environ.items() if name.startswith("SUNSET_")})
    logs.configure(format="json", level="error")  # here the service runs to be recorded; it logs where it is measured
    rounds = 2 if quick else 5
    async with _filled(settings, 500 if quick else 2_000) as world:
        recordings = Recordings()
        await recordings.record(world, settings, *world.customers[:2])
        with ExitStack() as stack:
            service = stack.enter_context(serving(environ))
            bare = stack.enter_context(_bare(settings, {**recordings.replays, "empty": ()}))
            await service.ready()
            await bare.ready()
            print(f"{len(world.customers):,} accounts, {connections} connections, one process each, {rounds} rounds\n")
            print(f"{'':<22} {'requests per second':^28} {'CPU ms per request':^28}")
            print(f"{'':<22} {'service':>9} {'bare':>9} {'ratio':>7}  {'service':>9} {'bare':>9} {'ratio':>7}")
            for scenario in _scenarios(world, recordings, quick):
                await _measure(scenario, service, bare, rounds, connections)
                if scenario.requests == 2:
                    canceled = 2 + 2 * scenario.exchanges * (rounds + 1)
                    row = await db.fetch_one("SELECT COUNT(*) AS number FROM account WHERE status = 'CANCELED'")
                    assert row == {"number": canceled}, f"{row} accounts are canceled, and should be {canceled}"


def _main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a short run, whose figures are rough")
    parser.add_argument("--only", choices=["requests", "timers", "webhooks", "streams"], help="one of the parts")
    parser.add_argument(
        "--accounts", type=int, default=1_000_000, help="canceled ones for the timers, default %(default)s"
    )
    parser.add_argument("--connections", type=int, default=16, help="of the client, default %(default)s")
    options = parser.parse_args()
    server = PostgresServer()
    try:
        with tempfile.TemporaryDirectory(prefix="sunset-bench-") as directory:
            environ = {name: value for name, value in os.environ.items() if not name.startswith("SUNSET_")}
            environ |= {
                "SUNSET_DATA_DIR": directory,
                "SUNSET_WORKER": "false",
                "SUNSET_DEMO": "false",
                "SUNSET_LOG_FORMAT": "json",
                "SUNSET_LOG_LEVEL": "info",
                # Counted, as in production, and never reached.
                "SUNSET_RATE_LIMIT_CALLER": "100000",
                "SUNSET_RATE_LIMIT_ACCOUNT": "100000",
            }
            if options.only in {None, "requests"}:
                environ["SUNSET_DATABASE_URL"] = server.url(asyncio.run(server.create_empty_database()))
                uvloop.run(bench(environ, quick=options.quick, connections=options.connections))
            if options.only in {None, "timers"}:
                many = options.accounts // (20 if options.quick else 1)
                uvloop.run(bench_timers.bench(server, environ, many=many, due=50 if options.quick else 200))
            if options.only in {None, "webhooks"}:
                number, rounds = (200, 3) if options.quick else (1_000, 10)
                uvloop.run(bench_webhooks.bench(server, environ, number=number, rounds=rounds))
            if options.only in {None, "streams"}:
                number, changes = (1_000, 20) if options.quick else (10_000, 100)
                uvloop.run(bench_streams.bench(server, environ, number=number, changes=changes))
    finally:
        server.close()


if __name__ == "__main__":
    _main()
