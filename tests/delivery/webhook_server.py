"""A receiver of webhooks on loopback, as well or as badly behaved as a test wants."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import orjson


@dataclass(frozen=True)
class Request:
    """What was received. Header names are in small letters."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, object]:
        event: dict[str, object] = orjson.loads(self.body)
        return event


Answer = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


def says(status: str, *headers: str, body: bytes = b"") -> Answer:
    """Answers with that status line at once."""

    async def answer(_: Request, writer: asyncio.StreamWriter) -> None:
        head = "\r\n".join([f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""])
        writer.write(head.encode() + body)

    return answer


@dataclass
class Receiver:
    """A running receiver. `answer` may be changed at any time."""

    port: int
    scheme: str = "http"
    answer: Answer = field(default_factory=lambda: says("204 No Content"))
    requests: list[Request] = field(default_factory=list)
    open: int = 0
    """Exchanges under way."""
    most_open: int = 0
    came: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def has(self, number: int) -> None:
        """Wait until so many requests have come."""
        async with asyncio.timeout(60), self.came:
            await self.came.wait_for(lambda: len(self.requests) >= number)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/hooks"

    @property
    def events(self) -> list[dict[str, object]]:
        return [request.event for request in self.requests]

    @property
    def types(self) -> list[object]:
        return [event["type"] for event in self.events]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            line, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
            request = Request(line, headers, await reader.readexactly(int(headers.get("content-length", "0"))))
            self.requests.append(request)
            async with self.came:
                self.came.notify_all()
            await self.answer(request, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the sender has had enough
        finally:
            self.open -= 1
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@asynccontextmanager
async def receiving(answer: Answer | None = None, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """A receiver, until the end of the block; with `tls`, one that proves who it is."""
    receiver = Receiver(port=0, scheme="https" if tls else "http")
    tasks: set[asyncio.Task[None]] = set()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(receiver._serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    if answer is not None:
        receiver.answer = answer
    try:
        yield receiver
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
