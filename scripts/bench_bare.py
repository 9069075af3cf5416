"""The bare endpoint that `scripts/bench` compares the service with: ASGI, asyncpg and orjson, and nothing between.

It runs the statements that the service itself was seen to send, one request after the other's values, and answers with
the last rows as JSON. No GraphQL, no token, no rule and no log: what this costs, no service of ours can go below.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import uvicorn

from app.db.asyncpg_backend import PostgresClient

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Slot:
    """An argument that each request gives anew, by its place among the request's values."""

    place: int


@dataclass(frozen=True)
class Statement:
    """One statement with its arguments, some of them slots. `many`: the arguments are rows, sent in one batch."""

    sql: str
    args: tuple[Any, ...]
    many: bool

    @property
    def is_bracket(self) -> bool:
        """Whether it opens or ends a transaction, which needs no plan."""
        return self.sql in {"BEGIN", "COMMIT"}


Replay = Sequence[Statement]
"""All statements of one request, in order; BEGIN and COMMIT are among them."""


def serve(port: int, database_url: str, pool_size: int, replays: dict[str, Replay]) -> None:
    """Answer `POST /<name of a replay>` with a JSON list of values, until the process is ended."""
    os.environ.clear()  # uvicorn reads it
    uvicorn.run(
        _Bare(database_url, pool_size, replays),
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )


class _Bare:
    def __init__(self, database_url: str, pool_size: int, replays: dict[str, Replay]) -> None:
        # Only for its connections: they have the service's own settings.
        self._connector = PostgresClient(database_url, pool_size, 15.0, 5.0, "bench")
        self._pool_size = pool_size
        self._replays = {f"/{name}": replay for name, replay in replays.items()}
        self._idle: asyncio.LifoQueue[Any] = asyncio.LifoQueue()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._open(receive, send)
            return
        body = b""
        more = True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        connection = await self._idle.get()
        try:
            rows = await _replay(connection, self._replays[scope["path"]], orjson.loads(body))
        finally:
            self._idle.put_nowait(connection)
        answer = orjson.dumps({"data": [dict(row) for row in rows]}, default=str)
        length = str(len(answer)).encode()
        headers = [(b"content-type", b"application/json; charset=utf-8"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _open(self, receive: Receive, send: Send) -> None:
        await receive()
        for _ in range(self._pool_size):
            self._idle.put_nowait(await self._connector.connect())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})


async def _replay(connection: Any, replay: Replay, values: Sequence[str]) -> Sequence[Any]:
    """Run the statements with the request's values. Returns the last rows that one of them gave."""
    found: Sequence[Any] = ()
    for statement in replay:
        if statement.many:
            await connection.executemany(statement.sql, [_filled(row, values) for row in statement.args])
        elif statement.is_bracket:
            await connection.execute(statement.sql)
        else:
            found = await connection.fetch(statement.sql, *_filled(statement.args, values)) or found
    return found


def _filled(args: Sequence[Any], values: Sequence[str]) -> list[Any]:
    return [values[arg.place] if type(arg) is Slot else arg for arg in args]
