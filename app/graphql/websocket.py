"""GraphQL over a WebSocket: the protocol `graphql-transport-ws`, and no other.

One socket carries many operations, each under an id of the client's. The caller is known by the token that they send
when the connection begins, in `connection_init`'s payload or in the header of the request, and is verified again for
every operation, before its document is read, and for every event. A client that breaks the protocol, or asks for too
much at once, loses this socket and nothing else is disturbed.

A token in a payload, unlike a cookie, is not sent by browsers on their own: where a page comes from does not matter.

The codes that sockets are closed with are the protocol's own where it has one. Clients connect again after 1012, 1013,
4403 and 4408, and give up after the others.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import timedelta
from typing import Any, Final, Generic, TypeVar
from uuid import uuid4

import structlog
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from app import db, errors
from app.graphql.documents import Operation
from app.graphql.execution import (
    SLOWEST_SECONDS,
    Answer,
    Malformed,
    Operations,
    Parameters,
    Prepared,
    checked,
    dumps,
    failed,
    loads,
    refused,
)
from app.graphql.places import Places

PROTOCOL: Final = "graphql-transport-ws"
MAX_MESSAGE_BYTES: Final = 128 * 1024
"""Of one message of a client. The server is to be told, too, so that a longer one is never held."""
MAX_OPERATIONS: Final = 100
"""Under way on one socket at a time."""
_MAX_ID_CHARACTERS: Final = 128
_INIT_SECONDS: Final = 10.0
_MAX_REASON_BYTES: Final = 123

_log = structlog.stdlib.get_logger(__name__)

Context = TypeVar("Context")


class _Close(Exception):
    """The socket is to be closed with this code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class _Left(Exception):
    """The client has closed the socket, or it was lost."""


class WebSocketEndpoint(Generic[Context]):
    """An ASGI application for sockets at `/graphql`.

    `context` makes what resolvers see as `info.context` of an `Authorization` header's value, at the beginning and for
    each operation. It raises `errors.Unauthenticated` and `errors.Forbidden` when nobody acceptable asks; `lifetime`
    says for how long it will not raise the first.

    `streams` bounds how many subscriptions are open at a time, in all and of one caller, which is what `who` makes of a
    context. There are as many sockets at most, and as many more that have not said yet who they are.
    """

    def __init__(
        self,
        operations: Operations[Context],
        *,
        context: Callable[[str], Awaitable[Context]],
        who: Callable[[Context], Hashable],
        lifetime: Callable[[Context], timedelta],
        streams: Places,
    ) -> None:
        self.operations = operations
        self.context = context
        self.who = who
        self.lifetime = lifetime
        self.streams = streams
        self._sockets = Places(streams.most, most_each=streams.most_each)
        self._beginners = Places(streams.most, most_each=streams.most)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        spoken = PROTOCOL in scope["subprotocols"]
        await send({"type": "websocket.accept", "subprotocol": PROTOCOL if spoken else None})
        code, reason = 4406, f"Subprotocol not acceptable: speak {PROTOCOL}"
        if spoken:
            try:
                await self._serve(_Socket(self, scope, receive, send))
            except _Left:
                return
            except _Close as close:
                code, reason = close.code, close.reason
            except (errors.Unauthenticated, errors.Forbidden) as refusal:
                code, reason = 4403, f"Forbidden: {refusal.message}"
            except errors.Unavailable as refusal:
                code, reason = 1013, refusal.message
            except errors.RateLimited as refusal:
                code, reason = 1008, refusal.message
            except Exception as failure:
                _log.error("websocket.failed", exc_info=failure)
                code, reason = 4500, "Internal server error"
        with suppress(*_CLOSED):
            await send({"type": "websocket.close", "code": code, "reason": _cut(reason)})

    async def _serve(self, socket: "_Socket[Context]") -> None:
        with self._beginners.taken(None):
            context = await socket.begin()
        with self._sockets.taken(self.who(context)):
            await socket.serve(self.lifetime(context))


class _Socket(Generic[Context]):
    """One connection, from its first message to its last."""

    def __init__(self, endpoint: WebSocketEndpoint[Context], scope: Scope, receive: Receive, send: Send) -> None:
        self._endpoint = endpoint
        self._authorization = Headers(scope=scope).get("authorization", "")
        self._receive = receive
        self._send = send
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()
        self._events_turn = asyncio.Lock()

    async def serve(self, lifetime: timedelta) -> None:
        """Until somebody closes, for so long at most. Raises `_Left` and `_Close`, and `Unauthenticated`,
        `Forbidden` and `Unavailable` for who had better come again."""
        await self._say({"type": "connection_ack"})
        try:
            async with asyncio.timeout(lifetime.total_seconds()), asyncio.TaskGroup() as tasks:
                while True:
                    await self._take(await self._message(), tasks)
        except BaseExceptionGroup as together:
            raise together.exceptions[0] from None  # the rest was canceled because of it
        except TimeoutError:
            raise errors.Unauthenticated("The token has expired.") from None

    async def begin(self) -> Context:
        """Who they are. Raises as `serve` does."""
        try:
            async with asyncio.timeout(_INIT_SECONDS):
                while (message := await self._message())["type"] != "connection_init":
                    if message["type"] in {"subscribe", "complete"}:
                        raise _Close(4401, "Unauthorized: begin with connection_init")
                    await self._take_ping(message)
        except TimeoutError:
            raise _Close(4408, "Connection initialisation timeout") from None
        payload = message.get("payload")
        if not isinstance(payload, dict | None):
            raise _Close(4400, "The payload of connection_init is an object or null")
        self._authorization = _authorization(payload or {}) or self._authorization
        return await self._context()

    async def _context(self) -> Context:
        """Anew for each operation: whose socket it was at first is not asked."""
        async with db.deadline(self._endpoint.operations.timeout):
            return await self._endpoint.context(self._authorization)

    async def _message(self) -> dict[str, Any]:
        """The next message, with a `type`."""
        received: Message = await self._receive()
        if received["type"] == "websocket.disconnect":
            raise _Left
        text = received.get("text")
        if text is None:
            raise _Close(4400, "Messages are JSON in text frames")
        if len(text) > MAX_MESSAGE_BYTES:
            raise _Close(1009, f"A message has at most {MAX_MESSAGE_BYTES} bytes")
        try:
            limits = self._endpoint.operations.limits
            message = loads(text, "The message", limits.request, depth=limits.json_depth)
        except Malformed as refusal:
            raise _Close(4400, refusal.message) from None
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise _Close(4400, "A message is an object with a type")
        return message

    async def _take(self, message: dict[str, Any], tasks: asyncio.TaskGroup) -> None:
        match message["type"]:
            case "subscribe":
                self._start(_id(message), message.get("payload"), tasks)
            case "complete":
                if (task := self._under_way.pop(_id(message), None)) is not None:
                    task.cancel()
            case "connection_init":
                raise _Close(4429, "Too many initialisation requests")
            case _:
                await self._take_ping(message)

    async def _take_ping(self, message: dict[str, Any]) -> None:
        if message["type"] not in {"ping", "pong"} or not isinstance(message.get("payload"), dict | None):
            raise _Close(4400, "No such message")
        if message["type"] == "ping":
            await self._say({**message, "type": "pong"})

    def _start(self, id_: str, payload: object, tasks: asyncio.TaskGroup) -> None:
        if id_ in self._under_way:
            raise _Close(4409, f"Subscriber for {id_} already exists")
        if len(self._under_way) >= MAX_OPERATIONS:
            raise _Close(1008, f"At most {MAX_OPERATIONS} operations are under way on one socket")
        try:
            parameters = checked(payload)
        except Malformed as refusal:
            raise _Close(4400, refusal.message) from None
        self._under_way[id_] = tasks.create_task(self._operate(id_, parameters))

    async def _operate(self, id_: str, parameters: Parameters) -> None:
        """Execute one operation and tell what becomes of it.

        Whatever is not a subscription is prepared, executed and told in its turn, one at a time: who does not read
        makes the server hold one answer, however many they ask for. Raises `Unauthenticated` and `Forbidden` when
        nobody acceptable asks by now, and `Unavailable` when that cannot be said or a subscription had better be begun
        anew."""
        began = time.perf_counter()
        request_id = uuid4().hex
        structlog.contextvars.bind_contextvars(request_id=request_id)
        operation: Operation | None = None
        results: Sequence[tuple[str, str]] = ()
        ended = "left"
        try:
            async with self._turn:
                began = time.perf_counter()
                context = await self._context()
                prepared = self._prepared(parameters, context)
                if isinstance(prepared, Prepared):
                    operation = prepared.operation
                if not isinstance(prepared, Prepared) or prepared.operation.kind != "subscription":
                    answer = await self._answer(prepared, context, request_id)
                    results = answer.results
                    ended = await self._tell(id_, answer)
                    if answer.executed:
                        ended = await self._complete(id_)
                    return
            async with aclosing(self._events(prepared, context, request_id)) as answers:
                async for answer in answers:
                    ended = await self._tell(id_, answer)
                    if not answer.executed:
                        return
            ended = await self._complete(id_)
        except (errors.Unauthenticated, errors.Forbidden, errors.Unavailable) as refusal:
            ended = refusal.code
            raise
        finally:
            seconds = time.perf_counter() - began
            self._endpoint.operations.count(results, seconds)
            _log.info(
                "websocket.operation",
                operation=operation and operation.name,
                operation_kind=operation and operation.kind,
                ended=ended,
                milliseconds=round(seconds * 1000, 1),
            )

    def _prepared(self, parameters: Parameters, context: Context) -> Prepared | Answer:
        """Only of who is known by now: reading a document costs the others' time."""
        try:
            return self._endpoint.operations.prepare(parameters, self._endpoint.who(context))
        except errors.RateLimited as refusal:
            return refused(refusal)

    async def _answer(self, prepared: Prepared | Answer, context: Context, request_id: str) -> Answer:
        """What a query or a mutation is answered. Raises `Unauthenticated`."""
        if isinstance(prepared, Answer):
            return prepared
        try:
            return await self._endpoint.operations.execute(prepared, context, request_id)
        except errors.Unauthenticated:
            raise
        except errors.RequestError as refusal:
            return refused(refusal)
        except Exception as failure:
            _log.error("graphql.request_failed", exc_info=failure)
            return failed(request_id)

    async def _events(self, prepared: Prepared, context: Context, request_id: str) -> AsyncGenerator[Answer, None]:
        """What a subscription is answered. Raises `Unauthenticated` and `Unavailable`."""
        try:
            with self._endpoint.streams.taken(self._endpoint.who(context)):
                events = self._endpoint.operations.subscribe(prepared, context, request_id, turn=self._turn_of_event)
                async with aclosing(events) as answers:
                    async for answer in answers:
                        yield answer
        except errors.RateLimited as refusal:
            yield refused(refusal)

    @asynccontextmanager
    async def _turn_of_event(self) -> AsyncGenerator[None, None]:
        """One event of all the socket's subscriptions at a time, in turns of their own: what changes is not told later
        because a query takes long. Who may be told was asked before, and does not hold for ever: it raises
        `Unavailable` when the others take too long."""
        try:
            async with asyncio.timeout(SLOWEST_SECONDS):
                await self._events_turn.acquire()
        except TimeoutError:
            raise errors.Unavailable("What is told on this socket is not read in time.") from None
        try:
            yield
        finally:
            self._events_turn.release()

    async def _tell(self, id_: str, answer: Answer) -> str:
        """Say it, and answer how the operation has ended if it was the last that there was to say."""
        if not answer.executed:
            await self._end(id_, {"type": "error", "payload": answer.errors})
            return answer.code
        await self._say({"id": id_, "type": "next", "payload": answer.body()})
        return "left"

    async def _complete(self, id_: str) -> str:
        await self._end(id_, {"type": "complete"})
        return "complete"

    async def _end(self, id_: str, message: dict[str, Any]) -> None:
        """The last word on an operation. Until it is said the operation is under way, and counts; then its id may be
        used again."""
        await self._say({"id": id_, **message})
        if self._under_way.get(id_) is asyncio.current_task():
            del self._under_way[id_]

    async def _say(self, message: dict[str, Any]) -> None:
        """Waits while the client does not read, and for so long."""
        try:
            async with asyncio.timeout(SLOWEST_SECONDS):
                await self._send({"type": "websocket.send", "text": dumps(message).decode()})
        except (*_CLOSED, TimeoutError):
            raise _Left from None


_CLOSED: Final = (OSError, RuntimeError)
"""What servers raise when something is said on a socket that is closed already."""


def _id(message: dict[str, Any]) -> str:
    id_ = message.get("id")
    if not isinstance(id_, str) or not 1 <= len(id_) <= _MAX_ID_CHARACTERS:
        raise _Close(4400, f"A message about an operation has its id, of 1 to {_MAX_ID_CHARACTERS} characters")
    return id_


def _authorization(payload: dict[str, Any]) -> str | None:
    """The token that is sent with the beginning, as it would be in a header."""
    for name, value in payload.items():
        if name.lower() == "authorization" and isinstance(value, str):
            return value
    return None


def _cut(reason: str) -> str:
    """As much of it as a close frame holds."""
    return reason.encode()[:_MAX_REASON_BYTES].decode(errors="ignore")
