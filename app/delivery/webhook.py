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
import socket
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from typing import Final

import httpx2

from app.receivers import Receivers, Refused

DEADLINE: Final = timedelta(seconds=15)
"""For the whole exchange: looking up, connecting, sending, and reading the answer."""

MAX_READ: Final = 65_536

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
    def _transport(self) -> httpx2.AsyncHTTPTransport:
        """The bare transport: a client would keep cookies. Each exchange has a connection of its own."""
        return httpx2.AsyncHTTPTransport(
            verify=ssl.create_default_context(),
            trust_env=False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def close(self) -> None:
        self._resolver.shutdown(wait=False, cancel_futures=True)
        if "_transport" in self.__dict__:
            await self._transport.aclose()

    async def post(self, url: str, headers: dict[str, str], body: bytes, *, content_type: str) -> Answer:
        """Send it, and tell how that ended; every failure is an answer. Only a 2xx that is complete, or longer than
        what is read of it, within the deadline is success."""
        began = time.monotonic()
        status: int | None = None
        error: str | None = None
        retry_after: timedelta | None = None
        try:
            async with asyncio.timeout(self._deadline.total_seconds()):
                request = await self._request(url, headers | {"content-type": content_type}, body)
                response = await self._transport.handle_async_request(request)
                try:
                    status = response.status_code
                    retry_after = _retry_after(response.headers.get("retry-after"))
                    error = None if 200 <= status <= 299 else f"answered {status}"
                    read = 0
                    async for chunk in response.aiter_raw():
                        read += len(chunk)
                        if read >= MAX_READ:
                            break
                finally:
                    await response.aclose()
        except Refused as refused:
            error = str(refused)
        except TimeoutError:
            error = f"no complete answer within {self._deadline.total_seconds():g} seconds"
        except socket.gaierror:
            error = "its name cannot be resolved"
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as failed:
            error = f"no usable answer: {type(failed).__name__}"
        latency = timedelta(seconds=time.monotonic() - began)
        return Answer(status=status, latency=latency, error=error, retry_after=retry_after)

    async def _request(self, url: str, headers: dict[str, str], body: bytes) -> httpx2.Request:
        parts = self._receivers.check_url(url)
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        found = await asyncio.get_running_loop().run_in_executor(
            self._resolver, partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        )
        address = self._receivers.checked(
            parts, [ipaddress.ip_address(str(one[4][0]).partition("%")[0]) for one in found]
        )
        named = httpx2.URL(url)
        return httpx2.Request(
            "POST",
            named.copy_with(host=str(address)),
            headers={
                "host": named.netloc.decode(),
                "user-agent": "Sunset-Webhooks",
                "accept": "*/*",
                "accept-encoding": "identity",
                "connection": "close",
                **headers,
            },
            content=body,
            extensions={"sni_hostname": named.raw_host.decode()},
        )


def _retry_after(value: str | None) -> timedelta | None:
    """In seconds or as a date; None for everything else."""
    if value is None or len(value) > 64:
        return None
    if value.isascii() and value.isdigit():
        return timedelta(seconds=min(int(value), 10_000_000))
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(moment - datetime.now(UTC), timedelta())
