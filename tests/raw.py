"""HTTP as bytes, for what no client would send."""

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    status: int
    head: bytes
    body: bytes


def request(target: bytes, *headers: bytes, method: bytes = b"GET", body: bytes = b"") -> bytes:
    """A request with exactly this target, these header lines and what follows them; the connection is closed after
    the answer."""
    lines = [method + b" " + target + b" HTTP/1.1", b"Host: app.example", b"Connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def say(port: int, sent: bytes) -> Answer:
    """What is answered to exactly these bytes, until the other side closes."""
    return await _exchange(port, sent, to_the_end=True)


async def begin(port: int, sent: bytes) -> Answer:
    """The first head that is answered, where more of the request might come, and does not."""
    return await _exchange(port, sent, to_the_end=False)


async def _exchange(port: int, sent: bytes, *, to_the_end: bool) -> Answer:
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(sent)
            got = await reader.read() if to_the_end else await reader.readuntil(b"\r\n\r\n")
        finally:
            writer.close()
    head, _, body = got.partition(b"\r\n\r\n")
    return Answer(int(head.split(b" ", 2)[1]), head, body)
