"""An ASGI application behind real sockets, in the test's own event loop, served as `sunset serve` does it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from app.changes import Changes
from app.graphql.websocket import MAX_MESSAGE_BYTES


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, changes: Changes) -> None:
        super().__init__(config)
        self.changes = changes
        self.ready = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are pytest's

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.changes.end()
        await super().shutdown(sockets)


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
async def serving(app: ASGIApp, changes: Changes, *, send_buffer: int | None = None) -> AsyncIterator[Served]:
    """`app` on a port of its own, on the test's bound database; its lifespan is whose it was. `send_buffer` is how
    many bytes the system keeps, about, of what a client does not read."""
    listening = socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = _Server(
        uvicorn.Config(
            app,
            http="httptools",
            ws="websockets-sansio",
            ws_max_size=MAX_MESSAGE_BYTES,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=10,
        ),
        changes,
    )
    # The test's own database is heard, too: on SQLite, hints do not leave the connection that they are given on.
    async with changes.listening():
        served = Served(listening.getsockname()[1], server, asyncio.create_task(server.serve([listening])))
        try:
            await server.ready.wait()
            yield served
        finally:
            await served.stop()
