"""What subscribers cost who wait, and how soon they hear, beside no others and beside ten thousand that are idle.

One `sunset serve` on PostgreSQL. Members subscribe to the status of an account of their own, each over a connection of
their own, first over WebSockets and then as event streams: the memory that the process has taken is divided by their
number. Then, while they wait, the CPU that it uses is measured, and for changes of single accounts, made by another
process, the time from the commit to when the subscriber has heard.
"""

import asyncio
import base64
import os
import resource
import statistics
import struct
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import cast
from uuid import UUID

import orjson
from bench_processes import Server, cpu_seconds, serving

from app import cancellation, main, provisioning
from app.auth import Call, Installation
from app.db import Database
from app.db.migrate import migrate
from app.graphql import nodes
from app.graphql.nodes import Kind
from app.graphql.websocket import PROTOCOL
from app.lifecycle import MemberRole
from app.provisioning import AccountItem, MemberItem
from app.settings import Settings
from app.tokens import DEVELOPMENT_ISSUER
from tests.postgres import PostgresServer

_SUBSCRIPTION = "subscription($ids: [ID!]!) { accountStatusChanged(accountIds: $ids) { accountId status sequence } }"
_CHANGE = b'"accountStatusChanged"'
_WARM_UP = 20
_AT_ONCE = 100
"""Connections that are being opened at a time."""
_IDLE_SECONDS = 30.0
_LONGEST_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Subscriber:
    account_id: UUID
    token: str
    installation: Installation

    def asks(self) -> dict[str, object]:
        return {"query": _SUBSCRIPTION, "variables": {"ids": [nodes.encode(Kind.ACCOUNT, self.account_id)]}}

    async def call(self) -> Call:
        identity = await self.installation.tokens.verify(self.token)
        return Call(identity=identity, installation=self.installation)


class Stream(asyncio.Protocol):
    """A subscriber's connection: a client that holds little itself, and answers pings."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self._text = b""
        self._wanted = b""
        self._found: asyncio.Future[float] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if data[0] == _PING:
            self.transport.write(bytes([_PONG, 0x80 | data[1]]) + bytes(4) + data[2:])
        if self._found is not None:
            self._text += data
            if self._wanted in self._text and not self._found.done():
                self._found.set_result(time.perf_counter())

    async def until(self, text: bytes, sending: bytes = b"") -> float:
        """When the text has come, after `sending` that."""
        self._text, self._wanted, self._found = b"", text, asyncio.get_running_loop().create_future()
        self.transport.write(sending)
        async with asyncio.timeout(_LONGEST_SECONDS):
            moment = await self._found
        self._found = None
        return moment


_PING, _PONG = 0x89, 0x8A


async def _connected(port: int) -> Stream:
    _, stream = await asyncio.get_running_loop().create_connection(Stream, "127.0.0.1", port)
    return stream


async def _socket(port: int, subscriber: Subscriber) -> Stream:
    stream = await _connected(port)
    key = base64.b64encode(os.urandom(16)).decode()
    upgrade = (
        f"GET /graphql HTTP/1.1\r\nHost: bench\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: {PROTOCOL}\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    )
    await stream.until(b"\r\n\r\n", upgrade.encode())
    init = _frame({"type": "connection_init", "payload": {"Authorization": f"Bearer {subscriber.token}"}})
    await stream.until(b"connection_ack", init)
    await stream.until(_CHANGE, _frame({"type": "subscribe", "id": "1", "payload": subscriber.asks()}))
    return stream


def _frame(message: dict[str, object]) -> bytes:
    """One text frame of a client, masked with zeros."""
    body = orjson.dumps(message)
    size = bytes([0x80 | len(body)]) if len(body) < 126 else b"\xfe" + struct.pack("!H", len(body))
    return b"\x81" + size + bytes(4) + body


async def _events(port: int, subscriber: Subscriber) -> Stream:
    stream = await _connected(port)
    body = orjson.dumps(subscriber.asks())
    head = (
        f"POST /graphql HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {subscriber.token}\r\n"
        f"Content-Type: application/json\r\nAccept: text/event-stream\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    await stream.until(_CHANGE, head.encode() + body)
    return stream


_OPEN = {"WebSocket": _socket, "event stream": _events}


async def _subscribe(transport: str, port: int, subscribers: Sequence[Subscriber]) -> list[Stream]:
    turns = asyncio.Semaphore(_AT_ONCE)

    async def one(subscriber: Subscriber) -> Stream:
        async with turns:
            return await _OPEN[transport](port, subscriber)

    return await asyncio.gather(*map(one, subscribers))


async def _latency(stream: Stream, subscriber: Subscriber, changes: int) -> list[float]:
    """Seconds from each commit to when the subscriber has heard."""
    late = []
    for turn in range(changes):
        waiting = asyncio.create_task(stream.until(_CHANGE))
        call = await subscriber.call()
        await (cancellation.withdraw if turn % 2 else cancellation.cancel)(call, subscriber.account_id)
        committed = time.perf_counter()
        late.append(await waiting - committed)
    return late


def _memory(pid: int) -> int:
    """The bytes that a process holds in memory."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


async def _subscribers(installation: Installation, number: int) -> list[Subscriber]:
    made = []
    for begin in range(0, number, provisioning.MAX_ITEMS):
        names = [f"bench-{index}" for index in range(begin, min(begin + provisioning.MAX_ITEMS, number))]
        results = await provisioning.sync(installation, [_item(name) for name in names])
        for name, result in zip(names, results, strict=True):
            assert result.account_id is not None
            token = installation.tokens.mint(name, timedelta(hours=6))
            made.append(Subscriber(account_id=result.account_id, token=token, installation=installation))
    return made


def _item(name: str) -> AccountItem:
    member = MemberItem(
        subject=name,
        email=f"{name}@example.com",
        name="Bench",
        role=MemberRole.ADMIN,
        permissions=frozenset(),
        issuer=DEVELOPMENT_ISSUER,
    )
    return AccountItem(
        reference=name, name="Bench", plan_code="essentials", current_period_end=None, csm_email=None, members=[member]
    )


async def bench(server: PostgresServer, environ: dict[str, str], *, number: int, changes: int) -> None:
    """Measure and print everything, on a database of its own."""
    wanted = number + 1_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(f"The bench and the service need {wanted:,} file descriptors each; {hard:,} are allowed.")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    name = await server.create_empty_database()
    environ = environ | {"SUNSET_DATABASE_URL": server.url(name)}
    settings = Settings.load({name: value for name, value in environ.items() if name.startswith("SUNSET_")})
    installation = main.installation(settings)
    database = await Database.open(settings.database_url, pool_size=2)
    try:
        await migrate(database)
        with database.bind():
            subscribers = await _subscribers(installation, number)
            print(f"\n{number:,} subscribers on one process\n")
            print(f"{'':<15} {'KiB of memory':>14} {'CPU, idle':>10} {'ms from commit to heard, median':>33}")
            print(f"{'':<15} {'for each':>14} {'% of one':>10} {'alone':>12} {'beside all':>11} {'ratio':>8}")
            for transport in _OPEN:
                with serving(environ) as service:
                    await service.ready()
                    await _one(transport, service, subscribers, changes)
    finally:
        await database.close()
    await server.drop_database(name)


async def _one(transport: str, service: Server, subscribers: Sequence[Subscriber], changes: int) -> None:
    first, others = subscribers[0], subscribers[1:]
    async with AsyncExitStack() as stack:
        for stream in await _subscribe(transport, service.port, others[:_WARM_UP]):
            stream.transport.close()  # what the first ones make the process load is nobody's share
        [watched] = await _subscribe(transport, service.port, [first])
        stack.enter_context(closing(watched.transport))
        alone = await _latency(watched, first, changes)
        before = _memory(service.pid)
        for stream in await _subscribe(transport, service.port, others):
            stack.enter_context(closing(stream.transport))
        taken = (_memory(service.pid) - before) / len(others)
        began, used = time.perf_counter(), cpu_seconds(service.pid)
        await asyncio.sleep(_IDLE_SECONDS)
        share = (cpu_seconds(service.pid) - used) / (time.perf_counter() - began)
        beside = await _latency(watched, first, changes)
    one, other = 1000 * statistics.median(alone), 1000 * statistics.median(beside)
    print(f"{transport:<15} {taken / 1024:>14.1f} {100 * share:>10.1f} {one:>12.1f} {other:>11.1f} {other / one:>8.2f}")
