"""An ASGI application behind real sockets, in the test's own event loop, served as `sunset serve` does it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from starlette.types import ASGIApp

from app.changes import Changes
from app.server import Limits, Server


class _Server(Server):
    def __init__(self, app: ASGIApp, changes: Changes, limits: Limits | None) -> None:
        super().__init__(app, changes, limits=limits, lifespan="off", timeout_graceful_shutdown=10)
        self.ready = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are pytest's

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@dataclass
class Served:
    """Where an application is served, and how that ends."""

    port: int
    server: _Server
    serving: asyncio.Task[None]

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}/graphql"

    @property
    def websocket(self) -> str:
        return f"ws://127.0.0.1:{self.port}/graphql"

    async def stop(self) -> None:
        """As on SIGTERM: in order, and over when the last connection is."""
        self.server.should_exit = True
        await self.serving


@asynccontextmanager
async def serving(
    app: ASGIApp,
    changes: Changes,
    *,
    send_buffer: int | None = None,
    limits: Limits | None = None,
    listening: socket.socket | None = None,
) -> AsyncIterator[Served]:
    """`app` on a port of its own, on the test's bound database; its lifespan is whose it was. `send_buffer` is how
    many bytes the system keeps, about, of what a client does not read."""
    listening = listening or socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = _Server(app, changes, limits)
    # The test's own database is heard, too: on SQLite, hints do not leave the connection that they are given on.
    async with changes.listening():
        served = Served(listening.getsockname()[1], server, asyncio.create_task(server.serve([listening])))
        try:
            await server.ready.wait()
            yield served
        finally:
            await served.stop()
