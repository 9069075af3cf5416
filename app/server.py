"""How the service is served: uvicorn, with what it does not do by itself.

* Nobody costs more than a little before it is known who they are: a request's head is bounded in bytes, headers and
  time, its body in time, what a client has sent ahead is not kept, and one address has so many connections at most.
* A client that does not read is cut off, instead of being held for as long as it pleases.
* Streams end when the server is to stop: they would last for as long as their clients please.
* An application can tell what a request was for, byte by byte: `scope["state"]["target"]`. ASGI leaves out a fragment,
  and a question mark with nothing behind it.
* Who connects from where is not logged; the application logs what was asked, and what the server itself refuses is
  counted.

How large a body may be is said by who reads it. How long an answer takes is not bounded here: streams are answers.
"""

import asyncio
import codecs
import http
import ipaddress
import logging
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, cast

import httptools
import orjson
import structlog
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from app import errors, metrics
from app.changes import Changes
from app.graphql.places import Places
from app.graphql.websocket import MAX_MESSAGE_BYTES

_PIECE_BYTES: Final = 8 * 1024
"""As much as the parser is given at a time: what it keeps to itself of a head is not counted before."""
_LINGER_SECONDS: Final = 2.0
"""A client that was refused while it sends gets so long to read why."""
_READ_AT_LEAST: Final = 64 * 1024
"""Bytes that a client reads in `Limits.reading_seconds`, as long as there are so many for it."""
_MAX_FRAGMENTS: Final = 1_000
"""Of one message over a WebSocket. They may be empty, so that its size does not bound them."""
_TOLD_EVERY_SECONDS: Final = 60.0

_log = structlog.stdlib.get_logger(__name__)
_websocket_log = logging.getLogger("uvicorn.websocket")
_websocket_log.setLevel(logging.WARNING)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client gets without a token."""

    headers: int = 100
    """Of one request, with the trailers of its body."""
    head_bytes: int = 32 * 1024
    """Of the request line and all headers and trailers. Also: as much as may come of a body that is none of it."""
    head_seconds: float = 10.0
    """From the connection, or a later request's first byte, to the end of the head."""
    body_seconds: float = 30.0
    """From there to the end of the body."""
    reading_seconds: float = 30.0
    """For as long may a client read nothing, while there is something for it."""
    connections_per_address: int = 0
    """0: any number. An address is an IPv4 address, or the first 64 bits of one of IPv6."""


_Reason = Literal[
    "address", "silent", "head_timeout", "body_timeout", "head_too_large", "url_too_long", "malformed", "unread"
]
"""Why a connection was ended by the server."""

_ANSWERS: Final[dict[_Reason, tuple[http.HTTPStatus, str, str]]] = {
    "address": (
        http.HTTPStatus.SERVICE_UNAVAILABLE,
        errors.Unavailable.code,
        "Your address has too many connections open. Try again in a moment.",
    ),
    "head_timeout": (
        http.HTTPStatus.REQUEST_TIMEOUT,
        errors.BadUserInput.code,
        "The request's headers did not come in time.",
    ),
    "body_timeout": (
        http.HTTPStatus.REQUEST_TIMEOUT,
        errors.BadUserInput.code,
        "The request's body did not come in time.",
    ),
    "head_too_large": (
        http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        errors.BadUserInput.code,
        "The request's headers are too many or too large.",
    ),
    "url_too_long": (
        http.HTTPStatus.REQUEST_URI_TOO_LONG,
        errors.BadUserInput.code,
        "The request's address is too long.",
    ),
    "malformed": (http.HTTPStatus.BAD_REQUEST, errors.BadUserInput.code, "This is no valid HTTP request."),
}


class _Config(uvicorn.Config):
    """Uvicorn's, with the limits of this server and who is connected to it."""

    def __init__(self, app: ASGIApp, limits: Limits, **options: Any) -> None:
        super().__init__(app, **options)
        self.limits = limits
        self._addresses = Places(sys.maxsize, most_each=limits.connections_per_address or sys.maxsize)
        self._told = -_TOLD_EVERY_SECONDS

    def admit(self, client: tuple[str, int] | None) -> ExitStack | None:
        """A connection of one more from there, until the stack is closed; None when there are too many."""
        place = ExitStack()
        if client is None or not self.limits.connections_per_address:  # None: a socket of this machine
            return place
        try:
            place.enter_context(self._addresses.taken(_address(client[0])))
        except errors.RateLimited:
            if (now := time.monotonic()) - self._told >= _TOLD_EVERY_SECONDS:
                self._told = now
                _log.warning(
                    "server.connections_refused",
                    reason="one address has SUNSET_CONNECTIONS_PER_ADDRESS",
                    limit=self.limits.connections_per_address,
                )
            return None
        return place


def _address(host: str) -> str:
    """Whom connections from there are counted for: whoever has one address of IPv6 has all that begin alike."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return address.packed[:8].hex()


class _ReadOrLeave(asyncio.Protocol):
    """Cuts off a client that does not read what it is sent."""

    config: _Config
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    place: ExitStack = ExitStack()
    _unread: tuple[int, asyncio.TimerHandle] | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self.expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_expecting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        self.place.close()
        super().connection_lost(exc)

    def expect_reading(self) -> None:
        """What is to be written now must go, also where the connection ends when it has gone."""
        self._stop_expecting()
        timer = self.loop.call_later(self.config.limits.reading_seconds, self._look_whether_it_reads)
        self._unread = self.transport.get_write_buffer_size(), timer

    def _stop_expecting(self) -> None:
        if self._unread is not None:
            self._unread[1].cancel()
            self._unread = None

    def _look_whether_it_reads(self) -> None:
        assert self._unread is not None
        if self.transport.get_write_buffer_size() > self._unread[0] - _READ_AT_LEAST:
            metrics.connection_ended("unread")
            self.transport.abort()
        else:
            self.expect_reading()


class _NoFurther(Exception):
    """Ends the parser, whatever it has come to."""


class _Http(_ReadOrLeave, HttpToolsProtocol):
    """A connection. It has one request at a time: what comes before the answer to it is complete is not read, and the
    connection ends with that answer, so that whoever sent it sends it again."""

    config: _Config

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most_fields = self.config.limits.headers
        self._most_bytes = self.config.limits.head_bytes
        self._part: Literal["", "head", "body"] = ""
        """Of a request, that is being received."""
        self._deadline: asyncio.TimerHandle | None = None
        self._has_deadline = False
        """Whether it is that of this part."""
        self._is_over = False
        """Nothing more is read."""
        self._too_large: _Reason = "malformed"
        self._fields = 0
        self._size = 0
        """As far as it is known, of the head and the trailers."""
        self._led_somewhere = False
        self._bytes_to_nowhere = 0
        """That the parser has taken since it has last come to a new part of the request, or to some of its body."""

    # ------------------------------------------------------------------------------------------- what comes, and when

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        place = self.config.admit(self.client)
        if place is None:
            self._end("address", linger=0)
            return
        self.place = place
        self._deadline = self.loop.call_later(self.config.limits.head_seconds, self._end, "silent")

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over = True
        self._drop_deadline()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._is_over:
            return
        if not self._part:
            self._part, self._has_deadline = "head", False
        self._read(data)
        if not self._has_deadline and not self._is_over:
            self._drop_deadline()
            self._has_deadline = True
            limits = self.config.limits
            if self._part == "head":
                self._deadline = self.loop.call_later(limits.head_seconds, self._end, "head_timeout")
            elif self._part == "body":
                self._deadline = self.loop.call_later(limits.body_seconds, self._end, "body_timeout")

    def _read(self, data: bytes) -> None:
        for begin in range(0, len(data), _PIECE_BYTES):
            piece = data[begin : begin + _PIECE_BYTES] if begin or len(data) > _PIECE_BYTES else data
            self._led_somewhere = False
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                if self._should_upgrade():
                    self._upgrade()
                else:
                    self._read_as_if_not_upgrading(data[begin + upgrade.args[0] :])
                return
            except httptools.HttpParserError:
                if not self._is_over:
                    self._end(self._too_large)
                return
            self._bytes_to_nowhere = 0 if self._led_somewhere else self._bytes_to_nowhere + len(piece)
            if self._bytes_to_nowhere > self._most_bytes:
                self._end("head_too_large")
                return

    def _drop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    # ----------------------------------------------------------------------------------------- what the parser tells

    def on_message_begin(self) -> None:
        if self._is_answering() and not _is_whole(self.cycle):
            self.cycle.keep_alive = False
            self._is_over = True
            self._drop_deadline()
            raise _NoFurther
        super().on_message_begin()
        if self._part != "head":
            self._part, self._has_deadline = "head", False
        self._fields = self._size = 0
        self._led_somewhere = True

    def on_url(self, url: bytes) -> None:
        self._size += len(url)
        if self._size > self._most_bytes:
            self._too_large = "url_too_long"
            raise _NoFurther
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        self._size += len(name) + len(value) + 4
        if self._fields > self._most_fields or self._size > self._most_bytes:
            self._too_large = "head_too_large"
            raise _NoFurther
        if self._part == "head":  # a trailer is no header: whoever let the headers pass has not seen it
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            raise _NoFurther
        if self.parser.should_upgrade() and not self._should_upgrade():
            return
        self.scope["state"]["target"] = self.url
        super().on_headers_complete()
        self._part, self._has_deadline = "body", False
        self._led_somewhere = True

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._led_somewhere = True

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._part, self._has_deadline = "", False
        self._led_somewhere = True

    # -------------------------------------------------------------------------------------------------- other protocols

    def _upgrade(self) -> None:
        self._is_over = True
        self._drop_deadline()
        self.handle_websocket_upgrade()
        socket_ = cast("_WebSocket", self.transport.get_protocol())
        socket_.place = self.place
        if self.transport.is_closing():
            socket_.expect_reading()
        elif not socket_.handshake_initiated:  # it says nothing of a request that it cannot read, and waits
            self._write_refusal("malformed")
            self.transport.close()
            socket_.expect_reading()

    def _read_as_if_not_upgrading(self, rest: bytes) -> None:
        """The request was about to turn to a protocol that is not spoken here, as every client of Java's asks for
        HTTP/2. That may be ignored, but not by this parser, which then leaves the body for another to read."""
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%b: %b" % (name, value) for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self._read(b"\r\n".join([*lines, b"", rest]))

    # ---------------------------------------------------------------------------------------------------------- answers

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, partial(self._answer, cycle, app))

    async def _answer(
        self, cycle: RequestResponseCycle, app: ASGIApp, scope: Scope, receive: Receive, send: Send
    ) -> None:
        async def noted(message: Message) -> None:
            if cycle.waiting_for_100_continue:  # refused unread: whether the body comes now, the client decides
                cycle.keep_alive = False
            await send(message)

        await app(scope, receive, noted if cycle.waiting_for_100_continue else send)
        if cycle.response_started and not cycle.response_complete and not cycle.disconnected:
            cycle.disconnected = True  # a stream that its client does not read: not to be logged as an error
            self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self.expect_reading()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.expect_reading()

    # -------------------------------------------------------------------------------------------------------- the end

    def _end(self, reason: _Reason, linger: float = _LINGER_SECONDS) -> None:
        """Read nothing more. Whoever still awaits the request that is being received is told that the client has left;
        the client is told why, unless it was answered something else already."""
        metrics.connection_ended(reason)
        self._is_over = True
        self._drop_deadline()
        self._unset_keepalive_if_required()
        if self._is_answering() and self._part != "body":
            self.cycle.keep_alive = False  # an earlier request: its answer is the last
            return
        is_answered = self._part == "body" and self.cycle.response_started
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if is_answered or reason == "silent" or self.transport.is_closing():
            self.transport.close()
            self.expect_reading()
            return
        self._write_refusal(reason)
        if not linger:
            self.transport.close()
            self.expect_reading()
            return
        # To close now, with something unread, would be a reset, which takes the answer from the client.
        self.flow.resume_reading()
        self.transport.write_eof()
        self._deadline = self.loop.call_later(linger, self.transport.abort)

    def _write_refusal(self, reason: _Reason) -> None:
        """In GraphQL's error form, whatever was asked: every answer of `/graphql` has it."""
        status, code, message = _ANSWERS[reason]
        body = orjson.dumps({"errors": [{"message": message, "extensions": {"code": code}}]})
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            (b"connection", b"close"),
        ]
        if status is http.HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append((b"retry-after", b"1"))
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[status], lines, body))


def _is_whole(cycle: RequestResponseCycle) -> bool:
    """Whether the client has all of the answer, by its length, though the application has not said that this is it."""
    return cycle.response_started and cycle.chunked_encoding is False and not cycle.expected_content_length


class _WebSocket(_ReadOrLeave, WebSocketsSansIOProtocol):
    config: _Config

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _websocket_log

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.transport.abort()

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) < _MAX_FRAGMENTS:
            super().handle_cont(event)
        else:
            self.transport.abort()

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text" and not _is_text(b"".join(self.frames)):  # uvicorn logs it as our error
            self.frames = []
            self.conn.send_close(1007)
            self.handle_parser_exception()
            return
        super().send_receive_event_to_app()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        if not self.disconnected:
            self.expect_reading()


def _is_text(data: bytes) -> bool:
    try:
        codecs.utf_8_decode(data, "strict", True)
    except UnicodeDecodeError:
        return False
    return True


class Server(uvicorn.Server):
    """One process that serves `app`, whose streams, if it has any, follow `changes`. `options` are uvicorn's."""

    def __init__(self, app: ASGIApp, changes: Changes | None, *, limits: Limits | None = None, **options: Any) -> None:
        super().__init__(
            _Config(
                app,
                limits or Limits(),
                http=_Http,
                ws=_WebSocket,
                ws_max_size=MAX_MESSAGE_BYTES,
                ws_per_message_deflate=False,  # the messages are small, and each socket would hold its tables
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                **options,
            )
        )
        self._changes = changes

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._changes is not None:
            self._changes.end()
        await super().shutdown(sockets)
