"""Webhooks: one HTTP exchange with somebody else's server, which may be slow, broken or hostile.

Signed as Standard Webhooks says. A receiver is looked up once and its addresses are checked; the connection goes to the
address that was checked, so that a name that answers differently the second time leads nowhere else. No redirect is
followed, no proxy of the environment asked, no cookie kept. There is one deadline for everything, and at most 64 KiB of
the answer is read; what the answer says beside its status and `Retry-After` is thrown away, and never logged.

This module knows no rows and no database: the worker gives it the address, the secrets, the body and the time.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from typing import Final
from urllib.parse import SplitResult

import httptools
import httpx2

from app.receivers import Receivers, Refused

DEADLINE: Final = timedelta(seconds=15)
"""For the whole exchange: looking up, connecting, sending, and reading the answer."""

MAX_READ: Final = 65_536

_CHUNK: Final = 8_192

_LOOKUPS: Final = 64
"""Names looked up at a time: the system's resolver can be waited for, and not interrupted."""


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
    """Sends webhooks. One per worker; `close` it."""

    def __init__(self, receivers: Receivers, *, deadline: timedelta = DEADLINE) -> None:
        self._receivers = receivers
        self._deadline = deadline
        self._resolver = ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="webhook-lookup")

    @cached_property
    def _trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        return context

    def close(self) -> None:
        self._resolver.shutdown(wait=False, cancel_futures=True)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, *, content_type: str) -> Answer:
        """Send it, and tell how that ended; every failure is an answer. Only a 2xx that is complete, or longer than
        what is read of it, within the deadline is success."""
        began = time.monotonic()
        exchange = _Exchange()
        error: str | None = None
        try:
            async with asyncio.timeout(self._deadline.total_seconds()):
                parts = self._receivers.check_url(url)
                exchange.prepare(httpx2.URL(url), {**headers, "content-type": content_type}, body)
                await self._connect(parts, exchange)
                if failure := await exchange.ended:
                    raise failure
                error = None if 200 <= (exchange.status or 0) <= 299 else f"answered {exchange.status}"
        except Refused as refused:
            error = str(refused)
        except TimeoutError:
            error = f"no complete answer within {self._deadline.total_seconds():g} seconds"
        except socket.gaierror:
            error = "its name cannot be resolved"
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

    async def _connect(self, parts: SplitResult, exchange: "_Exchange") -> None:
        """To the first of the name's addresses that can be connected to; all of them must be allowed."""
        loop = asyncio.get_running_loop()
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        found = await loop.run_in_executor(
            self._resolver, partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        )
        addresses = self._receivers.checked(
            parts, [ipaddress.ip_address(str(one[4][0]).partition("%")[0]) for one in found]
        )
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
