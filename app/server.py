"""How the service is served: uvicorn, with what it does not do by itself.

* Streams end when the server is to stop: they would last for as long as their clients please.
* A client that sends pings and reads nothing is cut off, instead of being answered into a buffer that grows.
* An application can tell what a request was for, byte by byte: `scope["state"]["target"]`. ASGI leaves out a fragment,
  and a question mark with nothing behind it.
* Who connects from where is not logged; the application logs what was asked.
"""

import logging
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from app.changes import Changes
from app.graphql.websocket import MAX_MESSAGE_BYTES

_log = logging.getLogger("uvicorn.websocket")
_log.setLevel(logging.WARNING)


class _WebSocket(WebSocketsSansIOProtocol):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _log

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.transport.abort()


class _Http(HttpToolsProtocol):
    def on_headers_complete(self) -> None:
        self.scope["state"]["target"] = self.url
        super().on_headers_complete()


class Server(uvicorn.Server):
    """One process that serves `app`, whose streams follow `changes`. `options` are uvicorn's."""

    def __init__(self, app: ASGIApp, changes: Changes, **options: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
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
        self._changes.end()
        await super().shutdown(sockets)
