"""Webhooks: one HTTP exchange with somebody else's server, which may be slow, broken or hostile.

Signed as Standard Webhooks says. A receiver is looked up once and its addresses are checked; the connection goes to the
address that was checked, so that a name that answers differently the second time leads nowhere else. No redirect is
followed, no proxy of the environment asked, no cookie kept. There is one deadline for everything, which begins with the
lookup: waiting behind other names is no fault of the receiver. At most 64 KiB of the answer are read; what it says
beside its status and `Retry-After` is thrown away, and never logged.

This module knows no rows and no database: the worker gives it the address, the secrets, the body and the time.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Final
from urllib.parse import SplitResult

import httptools
import httpx2

from app.receivers import Receivers, Refused

DEADLINE: Final = timedelta(seconds=15)
"""For the whole exchange: looking up, connecting, sending, and reading the answer."""

MAX_READ: Final = 65_536

_CHUNK: Final = 8_192

PATIENCE: Final = timedelta(seconds=20)
"""How long a delivery waits until its name can be looked up. Together with the deadline it is shorter than a lease."""

_SLOW_REMEMBERED: Final = 10_000

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class NotTried(Exception):
    """Too many names are being looked up: nothing was sent, and nothing is known of the receiver."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How an exchange ended. `status` is None when there was no answer; `error` is None when it was accepted."""

    status: int | None
    latency: timedelta
    error: str | None
    retry_after: timedelta | None = None


def signed(secrets: Sequence[str], webhook_id: str, at: datetime, body: bytes) -> dict[str, str]:
    """The three headers of Standard Webhooks, with a signature by each secret (`whsec_...`)."""
    timestamp = str(int(at.timestamp()))
    content = b".".join((webhook_id.encode(), timestamp.encode(), body))
    signatures = (
        hmac.digest(base64.b64decode(secret.removeprefix("whsec_")), content, hashlib.sha256) for secret in secrets
    )
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{base64.b64encode(one).decode()}" for one in signatures),
    }


class Poster:
    """Sends webhooks. One per worker."""

    def __init__(
        self, receivers: Receivers, *, lookups: int, deadline: timedelta = DEADLINE, patience: timedelta = PATIENCE
    ) -> None:
        """`lookups`: of names, at a time."""
        self._receivers = receivers
        self._deadline = deadline
        self._names = _Names(lookups, deadline, patience)

    @cached_property
    def _trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        return context

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, *, content_type: str) -> Answer:
        """Send it, and tell how that ended; every failure is an answer. Only a 2xx that is complete, or longer than
        what is read of it, within the deadline is success. `NotTried` when it could not begin."""
        began = time.monotonic()
        exchange = _Exchange()
        error: str | None = None
        try:
            parts = self._receivers.check_url(url)
            exchange.prepare(httpx2.URL(url), {**headers, "content-type": content_type}, body)
            found = await self._names.look_up(parts.hostname or "")
            began = time.monotonic()
            async with asyncio.timeout(self._deadline.total_seconds()):
                await self._connect(parts, await asyncio.shield(found), exchange)
                if failure := await exchange.ended:
                    raise failure
                error = None if 200 <= (exchange.status or 0) <= 299 else f"answered {exchange.status}"
        except Refused as refused:
            error = str(refused)
        except TimeoutError:
            error = f"no complete answer within {self._deadline.total_seconds():g} seconds"
        except socket.gaierror:
            error = "its name cannot be resolved"
        except _Hangs:
            error = "its name cannot be resolved: the lookup before has not ended"
        except ssl.SSLCertVerificationError as failed:
            error = f"its certificate is refused: {failed.verify_message}"
        except ssl.SSLError as failed:
            error = f"no TLS connection: {failed.reason}"
        except (OSError, ValueError, httpx2.InvalidURL) as failed:
            error = f"no usable answer: {_in_words(failed)}"
        finally:
            exchange.abort()
        latency = timedelta(seconds=time.monotonic() - began)
        return Answer(status=exchange.status, latency=latency, error=error, retry_after=exchange.retry_after)

    async def _connect(self, parts: SplitResult, found: Sequence[_Address], exchange: "_Exchange") -> None:
        """To the first of the name's addresses that can be connected to; all of them must be allowed."""
        loop = asyncio.get_running_loop()
        port = parts.port or (443 if parts.scheme == "https" else 80)
        addresses = self._receivers.checked(parts, found)
        secure = parts.scheme == "https"
        for address in addresses:
            try:
                await loop.create_connection(
                    lambda: exchange,
                    str(address),
                    port,
                    ssl=self._trust if secure else None,
                    server_hostname=exchange.host if secure else None,
                )
            except ssl.SSLError:
                raise
            except OSError:
                if address == addresses[-1]:
                    raise
            else:
                return


class _Hangs(OSError):
    """The name is still being looked up for somebody who has given up."""


class _Names:
    """Looks names up. The system's resolver can be waited for and not interrupted, so each lookup has a thread, for as
    long as it takes; each name is looked up once at a time, for all who ask.

    A name whose lookup has taken longer than an exchange may is slow from then on, until one is quick: the slow have
    few threads of their own, and hold none of the others'.
    """

    def __init__(self, lookups: int, longest: timedelta, patience: timedelta) -> None:
        self._longest = longest.total_seconds()
        self._patience = patience.total_seconds()
        self._places = asyncio.Semaphore(lookups)
        self._places_of_slow = asyncio.Semaphore(max(lookups // 8, 1))
        self._slow: dict[str, None] = {}
        """The names, in the order in which they were found to be."""
        self._under_way: dict[str, _Lookup] = {}

    async def look_up(self, host: str) -> asyncio.Future[list[_Address]]:
        """Returns when the lookup has begun: its answer, to be shielded, since others may wait for it. `_Hangs` for a
        name that another has waited for in vain, and `NotTried` when no thread becomes free."""
        with contextlib.suppress(ValueError):
            return _known(_address(host))
        if host not in self._under_way:
            places = self._places_of_slow if host in self._slow else self._places
            try:
                async with asyncio.timeout(self._patience):
                    await places.acquire()
            except TimeoutError:
                raise NotTried from None
            if host in self._under_way:  # another had a turn before
                places.release()
            else:
                self._begin(host, places)
        lookup = self._under_way[host]
        if lookup.age() >= self._longest:
            raise _Hangs
        return lookup.answer

    def _begin(self, host: str, places: asyncio.Semaphore) -> None:
        loop, lookup = asyncio.get_running_loop(), _Lookup(host)

        def look_up() -> None:
            found: list[_Address] | Exception
            try:
                rows = socket.getaddrinfo(lookup.host, None, type=socket.SOCK_STREAM)
                found = [_address(str(row[4][0])) for row in rows]
            except Exception as failed:
                found = failed
            with contextlib.suppress(RuntimeError):  # nobody is there any more
                loop.call_soon_threadsafe(self._end, lookup, places, found)

        # Not of a pool: the process must not wait for it to end, either.
        try:
            threading.Thread(target=look_up, name="webhook-lookup", daemon=True).start()
        except RuntimeError:  # the system gives no more
            places.release()
            raise NotTried from None
        self._under_way[host] = lookup

    def _end(self, lookup: "_Lookup", places: asyncio.Semaphore, found: list[_Address] | Exception) -> None:
        places.release()
        del self._under_way[lookup.host]
        self._slow.pop(lookup.host, None)
        if lookup.age() >= self._longest:
            self._slow[lookup.host] = None
            if len(self._slow) > _SLOW_REMEMBERED:
                del self._slow[next(iter(self._slow))]
        if isinstance(found, Exception):
            lookup.answer.set_exception(found)
            lookup.answer.exception()  # perhaps nobody waits for it any more
        else:
            lookup.answer.set_result(found)


class _Lookup:
    def __init__(self, host: str) -> None:
        self.host = host
        self.answer: asyncio.Future[list[_Address]] = asyncio.get_running_loop().create_future()
        self._began = time.monotonic()

    def age(self) -> float:
        return time.monotonic() - self._began


def _known(address: _Address) -> asyncio.Future[list[_Address]]:
    answer: asyncio.Future[list[_Address]] = asyncio.get_running_loop().create_future()
    answer.set_result([address])
    return answer


def _address(text: str) -> _Address:
    return ipaddress.ip_address(text.partition("%")[0])


def _in_words(error: Exception) -> str:
    """Written by the operating system or by us: what the other side said is never among it."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) if isinstance(error, _Unusable) else type(error).__name__


class _Unusable(OSError):
    """What came was no answer."""


class _Exchange(asyncio.BufferedProtocol):
    """One request, and its answer, on a connection of their own."""

    def __init__(self) -> None:
        self.host = ""
        """Whom the other side must prove to be."""
        self.status: int | None = None
        self.retry_after: timedelta | None = None
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        """When the answer is complete, or enough of it is read, or with what came instead."""
        self._request = b""
        self._transport: asyncio.BaseTransport | None = None
        self._buffer = bytearray(_CHUNK)
        self._left = MAX_READ
        self._parser = httptools.HttpResponseParser(self)
        self._length_is_told = False

    def prepare(self, url: httpx2.URL, headers: Mapping[str, str], body: bytes) -> None:
        self.host = url.raw_host.decode()
        fields = {
            "host": url.netloc.decode(),
            "user-agent": "Sunset-Webhooks",
            "accept": "*/*",
            "accept-encoding": "identity",
            "connection": "close",
            "content-length": str(len(body)),
            **headers,
        }
        lines = (f"{name}: {value}\r\n" for name, value in fields.items())
        self._request = b"POST %b HTTP/1.1\r\n%b\r\n%b" % (url.raw_path, "".join(lines).encode(), body)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()  # type: ignore[attr-defined]
        self.ended.cancel()

    # The connection calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        transport.write(self._request)  # type: ignore[attr-defined]

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        nbytes = min(nbytes, self._left)
        self._left -= nbytes
        try:
            self._parser.feed_data(memoryview(self._buffer)[:nbytes])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._end(_Unusable("it is not HTTP"))
        if not self._left:
            self._end(None if self.status is not None else _Unusable("its headers do not end"))

    def eof_received(self) -> None:
        self._end(
            None
            if self.status is not None and not self._length_is_told
            else _Unusable("the connection was closed before the answer was complete")
        )

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None:
            self.eof_received()
        else:
            self._end(exc)

    def _end(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)

    # The parser calls these.

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.status is not None:  # it stands behind the answer
            return
        match name.lower():
            case b"retry-after":
                self.retry_after = _retry_after(value.decode("latin-1"))
            case b"content-length" | b"transfer-encoding":
                self._length_is_told = True

    def on_headers_complete(self) -> None:
        if self.status is not None:
            return
        status = self._parser.get_status_code()
        if status >= 200:
            self.status = status
        else:  # it announces the answer, and its headers say nothing about that
            self._length_is_told = False
        if status <= 299:  # nothing is to be tried again
            self.retry_after = None

    def on_message_complete(self) -> None:
        if self.status is not None:
            self._end(None)


def _retry_after(value: str | None) -> timedelta | None:
    """In seconds or as a date; None for everything else."""
    if value is None or len(value) > 64:
        return None
    if value.isascii() and value.isdigit():
        return timedelta(seconds=min(int(value), 10_000_000))
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(moment - datetime.now(UTC), timedelta())
