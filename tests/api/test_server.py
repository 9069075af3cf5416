"""The front door: what a client gets before anybody knows who it is, with real sockets and hostile bytes."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import httptools
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http import httptools_impl
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from app.db import Database
from app.graphql import http
from app.graphql.websocket import PROTOCOL
from app.server import Limits
from tests import cast
from tests.cast import ALICE, BILLING, GATEKEEPER, Stage
from tests.ending import log_in_memory
from tests.processes import Processes
from tests.serving import Served, serving

_PATIENCE = 60
"""Seconds after which a test that waits in vain fails."""
SOON = 0.2
"""A time limit, in seconds, of servers whose clients exceed it."""
EVER = 3_600.0
HALF_A_BODY = b"Host: sunset.test\r\nContent-Length: 100\r\n\r\n{"


class Client:
    """A connection that says what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def say(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    async def answer(self) -> "Answer":
        """The next answer, of a length that it says itself."""
        async with asyncio.timeout(_PATIENCE):
            head = await self.reader.readuntil(b"\r\n\r\n")
            status, *lines = head.decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(int(status.split()[1]), headers, body)

    async def end(self) -> bytes:
        """What still comes until the server closes."""
        async with asyncio.timeout(_PATIENCE):
            return await self.reader.read()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """Of its error, in GraphQL's form."""
        (error,) = json.loads(self.body)["errors"]
        assert isinstance(error["message"], str)
        return str(error["extensions"]["code"])


@asynccontextmanager
async def connected(served: Served | int, local: str | None = None) -> AsyncIterator[Client]:
    port = served if isinstance(served, int) else served.port
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=local and (local, 0))
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(_PATIENCE):
        while not condition():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.01)


@pytest.fixture
async def house(sqlite_database: Database, tmp_path: Path) -> AsyncIterator[Stage]:
    """The service; the engine makes no difference here."""
    async with cast.stage(sqlite_database, tmp_path) as running:
        yield running


@asynccontextmanager
async def limited(house: Stage, app: ASGIApp | None = None, **limits: Any) -> AsyncIterator[Served]:
    """The service, or `app`, behind a port. What is not limited by the test has time."""
    limits = {"head_seconds": EVER, "body_seconds": EVER, "reading_seconds": EVER, **limits}
    async with serving(app or house.app, house.installation.changes, limits=Limits(**limits)) as running:
        yield running


@pytest.fixture
async def served(house: Stage) -> AsyncIterator[Served]:
    async with limited(house) as running:
        yield running


async def counted(house: Stage, reason: str) -> float:
    """How many connections were ended because of that."""
    families = text_string_to_metric_families((await house.client.get("/metrics")).text)
    samples = (sample for family in families for sample in family.samples)
    name = "sunset_connections_ended_total"
    return sum(one.value for one in samples if (one.name, one.labels) == (name, {"reason": reason}))


@contextmanager
def quiet() -> Iterator[list[dict[str, Any]]]:
    """Within the block nothing is logged that somebody should look into. After it, the list is what was."""
    lines: list[dict[str, Any]] = []
    with log_in_memory() as log:
        yield lines
    lines += map(json.loads, log.getvalue().splitlines())
    assert [line for line in lines if line["level"] not in {"debug", "info"}] == []


class Echo:
    """An application that answers with what it was asked, and counts."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        headers = [[name.decode(), value.decode()] for name, value in scope["headers"]]
        told = json.dumps({"method": scope["method"], "headers": headers, "body": body.decode()}).encode()
        start = [(b"content-length", str(len(told)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": start})
        await send({"type": "http.response.body", "body": told})


# ------------------------------------------------------------------------------------------------------------- heads


@dataclass
class Taken:
    """What the server has taken of what was sent."""

    bytes: int = 0
    headers: int = 0


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    taken, Parser = Taken(), httptools.HttpRequestParser  # noqa: N806
    on_header = httptools_impl.HttpToolsProtocol.on_header

    class Counting:
        def __init__(self, protocol: Any) -> None:
            self._parser = Parser(protocol)

        def feed_data(self, data: bytes) -> None:
            taken.bytes += len(data)
            self._parser.feed_data(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._parser, name)

    def counting(self: httptools_impl.HttpToolsProtocol, name: bytes, value: bytes) -> None:
        taken.headers += 1
        on_header(self, name, value)

    monkeypatch.setattr(httptools, "HttpRequestParser", Counting)
    monkeypatch.setattr(httptools_impl.HttpToolsProtocol, "on_header", counting)
    return taken


GET = b"GET /livez HTTP/1.1\r\nHost: sunset.test\r\n"
CHUNKED = b"POST /links/confirm HTTP/1.1\r\nHost: sunset.test\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "headers": (GET, b"a:b\r\n", 431),
    "header": (GET + b"a: ", b"b" * 1_000, 431),
    "name of a header": (GET, b"a" * 1_000, 431),
    "white space in a header": (GET + b"a:", b" " * 1_000, 431),
    "address": (b"GET /livez?", b"a" * 1_000, 414),
    "method": (b"", b"G" * 1_000, 400),
    "empty lines": (b"", b"\r\n", 431),
    "trailers": (CHUNKED + b"0\r\n", b"a:b\r\n", 431),
    "trailer": (CHUNKED + b"0\r\na: ", b"b" * 1_000, 431),
    "extension of a chunk": (CHUNKED + b"3;", b"a" * 1_000, 431),
    "size of a chunk": (CHUNKED, b"0" * 1_000, 431),
}


@pytest.mark.parametrize(("begin", "again", "status"), ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
async def test_ten_megabytes_of_a_head_are_cut_off_early(
    house: Stage, served: Served, taken: Taken, begin: bytes, again: bytes, status: int, later: bool
) -> None:
    with quiet():
        async with connected(served) as client:
            if later:
                client.say(GET, b"\r\n")
                assert (await client.answer()).status == 200
            client.say(begin, again * (10_000_000 // len(again)))
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"], answer.code) == (status, "close", "BAD_USER_INPUT")
            assert await client.end() == b""
        await until(lambda: not served.server.server_state.connections)
        await until(lambda: not served.server.server_state.tasks)
    assert taken.bytes < 64 * 1_024
    assert taken.headers <= 102


def _head(headers: int, size: int) -> bytes:
    """Of a request with so many headers, of so many bytes."""
    lines = [b"GET /livez HTTP/1.1\r\n", *(b"a%02d: b\r\n" % number for number in range(headers - 1)), b"last: "]
    head = b"".join(lines)
    return head + b"c" * (size - len(head) - 4) + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("headers", "size", "status"),
    [(100, 1_000, 200), (101, 1_000, 431), (100, 32_768, 200), (10, 32_768, 200), (10, 32_800, 431), (1, 40_000, 431)],
)
@pytest.mark.parametrize("pieces", [1, 400])
async def test_a_head_has_a_hundred_headers_and_32_kib(
    served: Served, headers: int, size: int, status: int, pieces: int
) -> None:
    """However it is cut into pieces on its way."""
    head = _head(headers, size)
    step = -(-len(head) // pieces)
    async with connected(served) as client:
        for begin in range(0, len(head), step):
            client.say(head[begin : begin + step])
            await asyncio.sleep(0)
        assert (await client.answer()).status == status


async def test_trailers_are_no_headers(house: Stage) -> None:
    """What a proxy has checked, or set, is before the body."""
    async with limited(house, Echo()) as served, connected(served) as client:
        client.say(CHUNKED, b"3\r\nabc\r\n0\r\nX-Account-Reference: acme\r\nAuthorization: Bearer x\r\n\r\n")
        told = json.loads((await client.answer()).body)
        assert told["body"] == "abc"
        assert [name for name, _ in told["headers"]] == ["host", "transfer-encoding"]
        client.say(GET, b"\r\n")
        assert json.loads((await client.answer()).body)["headers"] == [["host", "sunset.test"]]


POST = b"POST / HTTP/1.1\r\nHost: sunset.test\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        POST + b"Content-Length: +3\r\n\r\nabc",
        POST + b"Content-Length: 3, 3\r\n\r\nabc",
        POST + b"Transfer-Encoding: x\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked, x\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nz\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        POST + b"A: b\r\n c\r\n\r\n",
        POST + b"A: b\nC: d\r\n\r\n",
        POST + b"A: b\0c\r\n\r\n",
        POST + b"A\r\n\r\n",
        b"GET / HTTP/1.1\nHost: sunset.test\n\n",
        b"GET /\xff HTTP/1.1\r\nHost: sunset.test\r\n\r\n",
        b"GET / HTTP/3.7\r\nHost: sunset.test\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT sunset.test:443 HTTP/1.1\r\nHost: sunset.test\r\n\r\n",
        b"CONNECT / HTTP/1.1\r\nHost: sunset.test\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
        b"SUNSET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
    ],
    ids=range(23),
)
async def test_what_could_be_read_in_two_ways_is_refused_and_nothing_after_it_is_read(
    house: Stage, request_: bytes
) -> None:
    echo = Echo()
    with quiet():
        async with limited(house, echo) as served, connected(served) as client:
            client.say(request_, GET, b"\r\n")
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"], answer.code) == (400, "close", "BAD_USER_INPUT")
            assert await client.end() == b""
    assert echo.asked <= 1


@pytest.mark.parametrize("requests", [2, 1_000])
async def test_what_is_sent_ahead_is_neither_read_nor_kept(house: Stage, requests: int) -> None:
    """The connection ends with the answer to the first, and who has sent more sends it again."""
    echo = Echo()
    async with limited(house, echo) as served, connected(served) as client:
        client.say((GET + b"\r\n") * requests)
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await client.end() == b""
    assert echo.asked == 1


async def test_an_answer_that_is_whole_to_the_client_may_be_followed_by_a_request(house: Stage) -> None:
    """An application may say later that there is no more, as one that sends a file in pieces does."""

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok", "more_body": True})
        await ends.wait()
        await send({"type": "http.response.body"})

    ends = asyncio.Event()
    async with limited(house, app) as served, connected(served) as client:
        client.say(GET, b"\r\n")
        assert (await client.answer()).body == b"ok"
        (connection,) = served.server.server_state.connections
        assert isinstance(connection, httptools_impl.HttpToolsProtocol)
        client.say(GET, b"\r\n")
        await until(lambda: connection.pipeline)
        ends.set()
        assert (await client.answer()).body == b"ok"


# --------------------------------------------------------------------------------------------------------------- times


async def test_who_says_nothing_is_shown_out_without_a_word(house: Stage) -> None:
    before = await counted(house, "silent")
    async with limited(house, head_seconds=SOON) as served, connected(served) as client:
        assert await client.end() == b""
    assert await counted(house, "silent") == before + 1


@pytest.mark.parametrize("begin", [b"G", GET, b"\r\n"])
@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
async def test_half_a_head_is_not_waited_for(house: Stage, begin: bytes, later: bool) -> None:
    before = await counted(house, "head_timeout")
    async with limited(house, head_seconds=SOON) as served, connected(served) as client:
        if later:
            client.say(GET, b"\r\n")
            assert (await client.answer()).status == 200
        client.say(begin)
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"], answer.code) == (408, "close", "BAD_USER_INPUT")
        assert await client.end() == b""
    assert await counted(house, "head_timeout") == before + 1


async def test_a_head_that_drips_counts_from_its_first_byte(house: Stage) -> None:
    async with limited(house, head_seconds=SOON) as served, connected(served) as client:
        dripping = asyncio.create_task(_drip(client, chain(GET, repeat(ord("a")))))
        assert (await client.answer()).status == 408
        dripping.cancel()


async def _drip(client: Client, data: Iterator[int] | Any) -> None:
    for byte in data:
        client.say(bytes([byte]))
        await asyncio.sleep(0.01)


READERS = ["/links/confirm", "/links/feedback", "/links/restart", "/graphql", "/gate/accounts"]


def _post(house: Stage, path: str, who: str | None = BILLING) -> bytes:
    """The head of a request whose body is read, but for its length."""
    who = GATEKEEPER if who and path.startswith("/gate") else who
    token = b"" if who is None else b"Authorization: Bearer %b\r\n" % house.token(who).encode()
    return b"POST %b HTTP/1.1\r\nContent-Type: application/json\r\n%b" % (path.encode(), token)


@pytest.mark.parametrize("path", READERS)
@pytest.mark.parametrize("drips", [False, True])
async def test_half_a_body_is_not_waited_for(house: Stage, path: str, drips: bool) -> None:
    before = await counted(house, "body_timeout")
    with quiet():
        async with limited(house, body_seconds=SOON) as served, connected(served) as client:
            client.say(_post(house, path), b"Transfer-Encoding: chunked\r\n\r\n1\r\n \r\n")
            dripping = asyncio.create_task(_drip(client, b"1\r\n \r\n" * 10_000 if drips else b""))
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"], answer.code) == (408, "close", "BAD_USER_INPUT")
            assert await client.end() == b""
            dripping.cancel()
            await until(lambda: not served.server.server_state.tasks)
    assert await counted(house, "body_timeout") == before + 1


@pytest.mark.parametrize(("path", "status"), [("/graphql", 401), ("/livez", 405), ("/nothing", 404)])
async def test_the_rest_of_a_body_that_was_answered_unread_is_not_waited_for(
    house: Stage, path: str, status: int
) -> None:
    """It goes on and on, so that no silence ends it; nothing is said after the answer."""
    with quiet():
        async with limited(house, body_seconds=SOON) as served, connected(served) as client:
            client.say(_post(house, path, None), b"Content-Length: 1000000\r\n\r\n")
            assert (await client.answer()).status == status
            dripping = asyncio.create_task(_drip(client, repeat(32)))
            with suppress(ConnectionResetError):  # what it sends at that moment is not read any more
                assert await client.end() == b""
            dripping.cancel()
            await until(lambda: not served.server.server_state.connections)


async def test_a_body_that_nobody_reads_is_not_kept(house: Stage) -> None:
    """An application that waits for something else: the client waits, too, and is told in time."""

    async def app(_: Scope, receive: Receive, __: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            await unread.wait()

    unread = asyncio.Event()
    with quiet():
        async with limited(house, app, body_seconds=SOON) as served, connected(served) as client:
            client.say(POST, b"Content-Length: 20000000\r\n\r\n", b"a" * 10_000_000)
            await until(lambda: served.server.server_state.connections)
            (connection,) = served.server.server_state.connections
            assert isinstance(connection, httptools_impl.HttpToolsProtocol)
            assert (await client.answer()).status == 408
            assert len(connection.cycle.body) < 1_000_000
            unread.set()
            await until(lambda: not served.server.server_state.tasks)


def _passing(seconds: float) -> Callable[[], bool]:
    """Says whether so much time has passed since."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    return lambda: loop.time() >= end


WATCH = "subscription W($ids: [ID!]!) { accountStatusChanged(accountIds: $ids) { sequence } }"


async def test_an_event_stream_outlives_the_times_for_heads_and_bodies(
    house: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_KEEPALIVE_SECONDS", 0.01)
    body = json.dumps({"query": WATCH, "variables": {"ids": [await house.account_id("acme")]}}).encode()
    async with (
        limited(house, head_seconds=SOON, body_seconds=SOON, reading_seconds=SOON) as served,
        connected(served) as client,
        asyncio.timeout(_PATIENCE),
    ):
        client.say(_post(house, "/graphql"), b"Accept: text/event-stream\r\n")
        client.say(b"Content-Length: %d\r\n\r\n" % len(body), body)
        passed = _passing(5 * SOON)
        while not passed():
            await client.reader.readuntil(b":\n\n")
        await house.request_cancellation()
        await client.reader.readuntil(b'"sequence":1')


async def test_a_websocket_outlives_the_times_for_heads_and_bodies(house: Stage) -> None:
    begin = {"type": "connection_init", "payload": {"Authorization": f"Bearer {house.token(ALICE)}"}}
    async with (
        limited(house, head_seconds=SOON, body_seconds=SOON, reading_seconds=SOON) as served,
        connect(served.websocket, subprotocols=[Subprotocol(PROTOCOL)], compression=None, proxy=None) as client,
        asyncio.timeout(_PATIENCE),
    ):
        await client.send(json.dumps(begin))
        assert json.loads(await client.recv())["type"] == "connection_ack"
        passed = _passing(5 * SOON)
        while not passed():
            await client.send('{"type":"ping"}')
            assert json.loads(await client.recv())["type"] == "pong"


# --------------------------------------------------------------------------------------------- who hangs up, or is deaf


@pytest.mark.parametrize("path", READERS)
@pytest.mark.parametrize("who", [BILLING, GATEKEEPER, None])
async def test_who_hangs_up_within_a_body_is_no_error_of_ours(house: Stage, path: str, who: str | None) -> None:
    with quiet() as lines:
        async with limited(house) as served:
            async with connected(served) as client:
                client.say(_post(house, path, who), HALF_A_BODY)
                await until(lambda: served.server.server_state.total_requests or served.server.server_state.tasks)
            await until(lambda: not served.server.server_state.connections)
            await until(lambda: not served.server.server_state.tasks)
    told = [line["status"] for line in lines if line["event"] == "http.request"]
    if path == "/gate/accounts":  # it is counted, not logged
        assert told == []
    else:
        assert told == [401 if (path, who) == ("/graphql", None) else 499]


async def test_who_hangs_up_within_the_answer_is_no_error_of_ours(house: Stage) -> None:
    with quiet():
        async with limited(house) as served:
            for path in (b"/schema.graphql", b"/static/graphiql/graphiql.min.js"):
                async with connected(served) as client:
                    client.say(b"GET %b HTTP/1.1\r\n\r\n" % path)
                    await client.reader.readexactly(100)
            await until(lambda: not served.server.server_state.connections)
            await until(lambda: not served.server.server_state.tasks)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _endless(piece: bytes) -> ASGIApp:
    async def app(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        leaving = asyncio.create_task(_left(receive))
        while not leaving.done():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)

    return app


async def test_who_does_not_read_the_answer_is_cut_off(house: Stage) -> None:
    before = await counted(house, "unread")
    with quiet():
        async with limited(house, _endless(b"a" * 65_536), reading_seconds=SOON) as served, connected(served) as client:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport that reads, too
            client.say(GET, b"\r\n")
            await until(lambda: served.server.server_state.tasks)
            await until(lambda: not served.server.server_state.connections)
            await until(lambda: not served.server.server_state.tasks)
    assert await counted(house, "unread") == before + 1


async def test_who_does_not_read_the_end_of_the_answer_is_cut_off(house: Stage) -> None:
    """What is answered whole leaves nobody who waits but the server's end of the connection."""

    async def app(_: Scope, __: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"50000000")]}
        await send(start)
        await send({"type": "http.response.body", "body": b"a" * 50_000_000})

    async with limited(house, app, reading_seconds=SOON) as served, connected(served) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport that reads, too
        client.say(GET, b"Connection: close\r\n\r\n")
        await until(lambda: served.server.server_state.total_requests)
        await until(lambda: not served.server.server_state.connections)


async def test_a_stream_that_is_left_unfinished_is_cut_off_and_no_error(house: Stage) -> None:
    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"event", "more_body": True})

    with quiet():
        async with limited(house, app) as served, connected(served) as client:
            client.say(GET, b"\r\n")
            await until(lambda: served.server.server_state.connections)
            await until(lambda: not served.server.server_state.connections)


# ---------------------------------------------------------------------------------------------------- other protocols


@pytest.mark.parametrize(
    "body", [b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("pieces", [False, True])
async def test_who_offers_another_version_of_http_is_answered_in_this_one(
    house: Stage, body: bytes, pieces: bool
) -> None:
    """As Java's client does by default. The body belongs to the request, and the next request is one."""
    request = POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n" + body
    echo = Echo()
    with quiet():
        async with limited(house, echo) as served, connected(served) as client:
            for _ in range(2):
                for piece in [bytes([one]) for one in request] if pieces else [request]:
                    client.say(piece)
                    await asyncio.sleep(0)
                told = json.loads((await client.answer()).body)
                assert (told["method"], told["body"]) == ("POST", "abc")
    assert echo.asked == 2


HANDSHAKE = (
    b"Host: sunset.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: graphql-transport-ws\r\n"
)


@pytest.mark.parametrize(
    "request_",
    [
        b"POST /graphql HTTP/1.1\r\n" + HANDSHAKE + b"\r\n",
        b"GET /graphql HTTP/1.1\r\n" + HANDSHAKE + b"A: " + b"a" * 9_000 + b"\r\n\r\n",
        b"GET /graphql?" + b"a" * 9_000 + b" HTTP/1.1\r\n" + HANDSHAKE + b"\r\n",
        b"GET /graphql HTTP/1.1\r\n" + HANDSHAKE.replace(b"Key", b"Kex") + b"\r\n",
    ],
    ids=["posted", "a long header", "a long address", "no key"],
)
async def test_a_websocket_that_does_not_begin_as_one_is_refused_at_once(served: Served, request_: bytes) -> None:
    with quiet():
        async with connected(served) as client:
            client.say(request_)
            assert (await client.answer()).status == 400
            assert await client.end() == b""
        await until(lambda: not served.server.server_state.connections)


async def test_a_websocket_has_no_more_headers_than_others(served: Served) -> None:
    async with connected(served) as client:
        client.say(b"GET /graphql HTTP/1.1\r\n", HANDSHAKE, b"a:b\r\n" * 100)
        assert (await client.answer()).status == 431


@asynccontextmanager
async def socket_of(served: Served) -> AsyncIterator[Client]:
    """A WebSocket that is accepted, as bytes."""
    async with connected(served) as client:
        client.say(b"GET /graphql HTTP/1.1\r\n", HANDSHAKE, b"\r\n")
        assert (await client.answer()).status == 101
        yield client


async def test_text_over_a_websocket_that_is_none_is_no_error_of_ours(served: Served) -> None:
    with quiet():
        async with socket_of(served) as client:
            client.say(b"\x81\x82\0\0\0\0\xff\xff")
            assert (await client.reader.readexactly(4))[2:] == (1007).to_bytes(2, "big")
        await until(lambda: not served.server.server_state.connections)


async def test_a_message_over_a_websocket_has_not_any_number_of_fragments(served: Served) -> None:
    with quiet():
        async with socket_of(served) as client:
            client.say(b"\x01\x80\0\0\0\0", b"\x00\x80\0\0\0\0" * 1_100)
            await until(lambda: not served.server.server_state.connections)


async def test_a_body_that_is_refused_before_it_is_sent_ends_the_connection(house: Stage, served: Served) -> None:
    """Whether it comes all the same is for the client to say: what follows could be taken for one or the other."""
    async with connected(served) as client:
        client.say(_post(house, "/graphql", None), b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n")
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (401, "close")
        assert await client.end() == b""
    async with connected(served) as client:
        client.say(_post(house, "/graphql"), b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n")
        assert (await client.answer()).status == 100
        client.say(b'{"query": ')
        assert (await client.answer()).status == 400
        client.say(GET, b"\r\n")
        assert (await client.answer()).status == 200


# ----------------------------------------------------------------------------------------------------- many connections


async def test_one_address_has_so_many_connections(house: Stage) -> None:
    before = await counted(house, "address")
    with log_in_memory() as log:
        async with limited(house, connections_per_address=2) as served, connected(served) as first:
            async with socket_of(served):
                for _ in range(5):
                    async with connected(served) as refused:
                        answer = await refused.answer()
                        assert (answer.status, answer.headers["connection"]) == (503, "close")
                        assert (answer.headers["retry-after"], answer.code) == ("1", "SERVICE_UNAVAILABLE")
                        assert await refused.end() == b""
                async with connected(served, local="127.0.0.2") as other:
                    other.say(GET, b"\r\n")
                    assert (await other.answer()).status == 200
                first.say(GET, b"\r\n")
                assert (await first.answer()).status == 200
            await until(lambda: len(served.server.server_state.connections) == 1)
            async with connected(served) as again:
                again.say(GET, b"\r\n")
                assert (await again.answer()).status == 200
    assert await counted(house, "address") == before + 5
    (warning,) = [line for line in map(json.loads, log.getvalue().splitlines()) if line["level"] == "warning"]
    assert (warning["event"], warning["limit"]) == ("server.connections_refused", 2)
    assert "127.0.0" not in log.getvalue()


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.1", True),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("192.0.2.1", "192.0.2.2", False),
    ],
)
async def test_whoever_has_one_address_of_ipv6_has_those_beside_it(
    house: Stage, monkeypatch: pytest.MonkeyPatch, first: str, second: str, together: bool
) -> None:
    come_from = iter([(first, 1), (second, 2)])
    monkeypatch.setattr(httptools_impl, "get_remote_addr", lambda _: next(come_from))
    async with limited(house, connections_per_address=1) as served, connected(served) as one:
        one.say(GET, b"\r\n")
        assert (await one.answer()).status == 200
        async with connected(served) as other:
            other.say(GET, b"\r\n")
            assert (await other.answer()).status == (503 if together else 200)


async def test_connections_without_an_address_are_not_limited(house: Stage, tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    limits = Limits(connections_per_address=1)
    async with serving(house.app, house.installation.changes, limits=limits, listening=listening):
        for _ in range(3):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
            client = Client(reader, writer)
            client.say(GET, b"\r\n")
            assert (await client.answer()).status == 200
            writer.transport.abort()


async def test_the_processes_have_these_limits(sqlite_database: Database, tmp_path: Path) -> None:
    """`sunset serve`, and `sunset worker` with a port for its probes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        probes = free.getsockname()[1]
    settings = {"SUNSET_CONNECTIONS_PER_ADDRESS": "2", "SUNSET_WORKER_PORT": str(probes)}
    with Processes(tmp_path, sqlite_database.url, **settings) as processes:
        api, worker = processes.serve(), processes.worker()
        await processes.ready(api, worker)
        assert api.port is not None
        for port in (api.port, probes):
            async with connected(port) as client:
                client.say(GET)
                # The connection that has asked whether it is ready may still be counted: then the second is too many.
                async with connected(port) as second, connected(port) as third:
                    answers = {asyncio.create_task(one.answer()) for one in (second, third)}
                    done, waiting = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
                    assert done.pop().result().status == 503
                    for one in waiting:
                        one.cancel()
                client.say(b"a:b\r\n" * 100, b"\r\n")
                assert (await client.answer()).status == 431


# ------------------------------------------------------------------------------------------------------------ redirects


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
async def test_no_path_leads_elsewhere(house: Stage, method: str) -> None:
    """A redirect to a path with or without its slash would name the request's own Host, in clear, with the token."""
    known = [str(getattr(route, "path", "")) for route in house.app.routes]
    assert {"/graphql", "/links/confirm", "/static", "/graphiql", "/gate/accounts"} <= set(known)
    paths = {path.split("{")[0].rstrip("/") for path in known} | {"/gate/accounts/acme", "/mailbox/x", "/static/x", ""}
    for path in sorted(chain.from_iterable((path, f"{path}/", f"/{path}/", f"{path}//") for path in paths)):
        for host in ("sunset.test", "evil.example"):
            answer = await house.client.request(
                method, f"http://sunset.test{path}?token=secret", headers={"Host": host}, follow_redirects=False
            )
            assert not answer.is_redirect, path
            assert "location" not in answer.headers, path


@pytest.mark.parametrize("path", ["/graphql/", "/links/confirm/", "/gate/accounts/", "/static", "/livez/"])
async def test_a_path_with_another_slash_is_not_there(house: Stage, path: str) -> None:
    assert (await house.client.post(path)).status_code in {404, 405}
    assert (await house.client.get(path)).status_code in {404, 401}
