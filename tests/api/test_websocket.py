"""Live status over WebSockets, with real sockets: what is told, what is refused, what a hostile client cannot do."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from gql import Client, gql
from gql.client import AsyncClientSession
from gql.transport.exceptions import TransportQueryError
from gql.transport.websockets import WebsocketsTransport
from prometheus_client.parser import text_string_to_metric_families
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from app import main, provisioning
from app.db import Database
from app.graphql import nodes, types, websocket
from app.graphql.execution import Operations, dumps
from app.graphql.websocket import MAX_MESSAGE_BYTES, MAX_OPERATIONS, PROTOCOL
from app.lifecycle import AccountStatus
from tests import cast
from tests.actions.test_limiting import link
from tests.cast import ALICE, BILLING, BOB, CAROL, GATEKEEPER, GINA, HOST, SUPPORT, Stage
from tests.ending import log_in_memory
from tests.serving import Served, serving

WATCH = """subscription Watch($ids: [ID!]!) { accountStatusChanged(accountIds: $ids) {
    accountId reference status epoch sequence occurredAt canSendMessages membersCanSignIn account { name status } } }"""
ME = "{ viewer { __typename } }"

_PATIENCE = 60
"""Seconds after which a test that waits in vain fails."""


class Socket:
    """A client's end of a connection."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    async def say(self, type_: str, **more: Any) -> None:
        await self.connection.send(json.dumps({"type": type_, **more}))

    async def hear(self) -> dict[str, Any]:
        async with asyncio.timeout(_PATIENCE):
            heard: dict[str, Any] = json.loads(await self.connection.recv())
        return heard

    async def begin(self, token: str | None) -> "Socket":
        await self.say("connection_init", payload={"Authorization": f"Bearer {token}"})
        assert await self.hear() == {"type": "connection_ack"}
        return self

    async def subscribe(self, id_: str, query: str, **variables: Any) -> None:
        await self.say("subscribe", id=id_, payload={"query": query, "variables": variables})

    async def watch(self, *account_ids: str, id_: str = "1") -> dict[str, Any]:
        """Subscribe, and answer the first that is told."""
        await self.subscribe(id_, WATCH, ids=account_ids)
        return await self.told(id_)

    async def told(self, id_: str = "1") -> dict[str, Any]:
        """The next change that the subscription is told of."""
        heard = await self.hear()
        assert (heard["type"], heard["id"], "errors" in heard["payload"]) == ("next", id_, False), heard
        change: dict[str, Any] = heard["payload"]["data"]["accountStatusChanged"]
        return change

    async def error(self, id_: str = "1") -> dict[str, Any]:
        """The error that the operation has ended with."""
        heard = await self.hear()
        assert (heard["type"], heard["id"]) == ("error", id_), heard
        (error,) = heard["payload"]
        assert isinstance(error, dict)
        return error

    async def ended(self) -> tuple[int, str]:
        """The code and the reason that the server has closed it with."""
        async with asyncio.timeout(_PATIENCE):
            with suppress(ConnectionClosed):
                while True:
                    await self.connection.recv()
        assert self.connection.protocol.close_rcvd is not None, "the connection was lost without a word"
        return self.connection.protocol.close_rcvd.code, self.connection.protocol.close_rcvd.reason


def opened(served: Served, protocol: str | None = PROTOCOL, **options: Any) -> AbstractAsyncContextManager[Socket]:
    """A connection, before anything was said on it."""

    @asynccontextmanager
    async def open_() -> AsyncIterator[Socket]:
        protocols = None if protocol is None else [Subprotocol(protocol)]
        async with connect(served.websocket, subprotocols=protocols, compression=None, proxy=None, **options) as made:
            yield Socket(made)

    return open_()


@asynccontextmanager
async def begun(served: Served, token: str, **options: Any) -> AsyncIterator[Socket]:
    """A connection of whoever has the token."""
    async with opened(served, **options) as socket_:
        yield await socket_.begin(token)


@pytest.fixture
async def served(house: Stage) -> AsyncIterator[Served]:
    """The running service behind a port, on each engine."""
    async with serving(house.app, house.installation.changes) as running:
        yield running


@pytest.fixture
async def one_house(sqlite_database: Database, tmp_path: Path) -> AsyncIterator[Stage]:
    """The service where the engine makes no difference."""
    async with cast.stage(sqlite_database, tmp_path) as running:
        yield running


@pytest.fixture
async def one_served(one_house: Stage) -> AsyncIterator[Served]:
    async with serving(one_house.app, one_house.installation.changes) as running:
        yield running


@asynccontextmanager
async def small(house: Stage, streams: int) -> AsyncIterator[Served]:
    """The service of that house again, with so many places."""
    app = main.create_app(replace(house.settings, streams=streams), house.installation)
    async with app.router.lifespan_context(app), serving(app, house.installation.changes) as running:
        yield running


async def until(reached: Callable[[], bool]) -> None:
    """Wait for what happens on the server's side of a connection."""
    async with asyncio.timeout(_PATIENCE):
        while not reached():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.005)


@asynccontextmanager
async def undisturbed(house: Stage, served: Served) -> AsyncIterator[None]:
    """Whatever happens in the block, who was connected before hears the next change, and no error is logged."""
    with log_in_memory() as log:
        async with begun(served, house.token(BILLING)) as socket_:
            await socket_.watch(await house.account_id("acme"))
            yield
            await house.request_cancellation()
            assert (await socket_.told())["sequence"] == 1
            await socket_.say("ping")
            assert await socket_.hear() == {"type": "pong"}
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert any(line["event"] == "websocket.closed" for line in lines)
    assert [line for line in lines if line["level"] in {"warning", "error", "critical"}] == []


# ------------------------------------------------------------------------------------------------------ what is told


async def test_first_the_status_is_told_and_then_each_change_in_order(house: Stage, served: Served) -> None:
    acme = await house.account_id("acme")
    async with begun(served, house.token(BILLING)) as socket_:
        assert await socket_.watch(acme) == {
            "accountId": acme,
            "reference": "acme",
            "status": "ACTIVE",
            "epoch": 0,
            "sequence": 0,
            "occurredAt": None,
            "canSendMessages": True,
            "membersCanSignIn": True,
            "account": {"name": "Acme", "status": "ACTIVE"},
        }
        done = await house.cancel()
        requested, canceled = await socket_.told(), await socket_.told()
        await house.do(BILLING, "restartAccount", accountId=acme)
        restarted = await socket_.told()
    assert [(one["status"], one["epoch"], one["sequence"]) for one in (requested, canceled, restarted)] == [
        ("ACTIVE", 0, 1),
        ("CANCELED", 1, 2),
        ("ACTIVE", 2, 3),
    ]
    assert canceled["occurredAt"] == done["account"]["canceledAt"]
    assert (canceled["canSendMessages"], canceled["membersCanSignIn"]) == (False, False)
    assert (restarted["canSendMessages"], restarted["membersCanSignIn"]) == (True, True)


async def test_one_subscription_watches_several_accounts_and_a_later_one_begins_where_it_stands(
    house: Stage, served: Served
) -> None:
    acme, globex = await house.account_id("acme"), await house.account_id("globex")
    async with begun(served, house.token(SUPPORT)) as socket_:
        first = await socket_.watch(acme, globex, acme)
        assert [first["reference"], (await socket_.told())["reference"]] == ["acme", "globex"]
        await house.cancel()
        assert [(await socket_.told())["sequence"] for _ in range(2)] == [1, 2]
        later = await socket_.watch(acme, id_="2")
    assert (later["status"], later["sequence"], later["occurredAt"]) == ("CANCELED", 2, None)


async def test_a_service_is_told_the_status_and_nothing_of_the_account(house: Stage, served: Served) -> None:
    async with begun(served, house.token(GATEKEEPER)) as socket_:
        first = await socket_.watch(await house.account_id("acme"))
        await house.cancel()
        requested, canceled = await socket_.told(), await socket_.told()
    assert (first["status"], first["account"]) == ("ACTIVE", None)
    assert (requested["account"], canceled["account"]) == (None, None)
    assert (canceled["status"], canceled["canSendMessages"]) == ("CANCELED", False)


async def test_queries_and_mutations_are_answered_on_the_socket(house: Stage, served: Served) -> None:
    acme = await house.account_id("acme")
    async with begun(served, house.token(ALICE)) as socket_:
        await socket_.subscribe("q", "query($id: ID!) { account(id: $id) { name } }", id=acme)
        assert await socket_.hear() == {"id": "q", "type": "next", "payload": {"data": {"account": {"name": "Acme"}}}}
        assert await socket_.hear() == {"id": "q", "type": "complete"}
        cancel = "mutation($input: CancelAccountInput!) { cancelAccount(input: $input) { __typename } }"
        await socket_.subscribe("q", cancel, input={"accountId": acme})
        assert (await socket_.hear())["payload"] == {"data": {"cancelAccount": {"__typename": "CancelAccountSuccess"}}}
        assert await socket_.hear() == {"id": "q", "type": "complete"}


async def test_a_ping_is_answered_at_any_time_with_its_payload(one_house: Stage, one_served: Served) -> None:
    async with opened(one_served) as socket_:
        await socket_.say("ping", payload={"at": 1})
        assert await socket_.hear() == {"type": "pong", "payload": {"at": 1}}
        await socket_.begin(one_house.token(ALICE))
        await socket_.say("pong")
        await socket_.say("ping")
        assert await socket_.hear() == {"type": "pong"}


async def test_complete_stops_a_subscription_and_frees_its_id(house: Stage, served: Served) -> None:
    acme, globex = await house.account_id("acme"), await house.account_id("globex")
    async with begun(served, house.token(BILLING)) as socket_:
        await socket_.watch(acme)
        await socket_.say("complete", id="1")
        await socket_.say("complete", id="1")  # a client may be late
        assert (await socket_.watch(globex))["reference"] == "globex"
        await house.cancel()
        await house.request_cancellation(GINA, "globex")
        assert (await socket_.told())["reference"] == "globex"


# --------------------------------------------------------------------------------------------------- errors of one


@pytest.mark.parametrize(
    ("query", "variables", "code"),
    [
        ("subscription {", {}, "GRAPHQL_PARSE_FAILED"),
        ("subscription { nothing }", {}, "GRAPHQL_VALIDATION_FAILED"),
        (WATCH, {}, "BAD_USER_INPUT"),
        (WATCH, {"ids": []}, "BAD_USER_INPUT"),
        (WATCH, {"ids": [f"acct-{number}" for number in range(101)]}, "BAD_USER_INPUT"),
        (
            "{ " + " ".join(f"a{number}: me {{ __typename }}" for number in range(60)) + " }",
            {},
            "OPERATION_TOO_COMPLEX",
        ),
    ],
)
async def test_a_refused_operation_gets_an_error_and_its_id_is_free(
    one_house: Stage, one_served: Served, query: str, variables: dict[str, Any], code: str
) -> None:
    acme = await one_house.account_id("acme")
    async with begun(one_served, one_house.token(BILLING)) as socket_:
        for _ in range(2):
            await socket_.subscribe("1", query, **variables)
            assert (await socket_.error())["extensions"]["code"] == code
        assert (await socket_.watch(acme))["reference"] == "acme"


async def test_a_refused_subscription_is_counted_as_refused(one_house: Stage, one_served: Served) -> None:
    """Not as left by its client."""

    async def ended() -> dict[str, float]:
        families = text_string_to_metric_families((await one_house.client.get("/metrics")).text)
        samples = [one for family in families for one in family.samples]
        return {one.labels["reason"]: one.value for one in samples if one.name == "sunset_subscriptions_ended_total"}

    before = await ended()
    async with begun(one_served, one_house.token(BILLING)) as socket_:
        for variables in ({}, {"ids": ["no such id"]}):
            await socket_.subscribe("1", WATCH, **variables)
            await socket_.error()
        await socket_.watch(await one_house.account_id("acme"))  # what came before it was counted
        after = await ended()
    grown = {reason: value - before.get(reason, 0) for reason, value in after.items()}
    assert {reason: value for reason, value in grown.items() if value} == {"BAD_USER_INPUT": 1, "FORBIDDEN": 1}


async def test_unknown_malformed_and_foreign_accounts_are_refused_in_the_same_words(
    house: Stage, served: Served
) -> None:
    unknown = nodes.encode(nodes.Kind.ACCOUNT, UUID(int=7))
    foreign, own = await house.account_id("globex"), await house.account_id("acme")
    told = []
    async with begun(served, house.token(ALICE)) as socket_:
        for account_id in (unknown, "no such id", foreign):
            await socket_.subscribe("1", WATCH, ids=[account_id])
            told.append(await socket_.error())
        assert (await socket_.watch(own))["reference"] == "acme"
    assert told[0]["extensions"] == {"code": "FORBIDDEN"}
    assert told == [told[0]] * 3


async def test_a_failure_is_masked_logged_and_can_be_asked_about(
    one_house: Stage, one_served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("the database's password is hunter2")

    monkeypatch.setattr(types.Account, "of", broken)
    with log_in_memory() as log:
        async with begun(one_served, one_house.token(BILLING)) as socket_:
            await socket_.subscribe("1", WATCH, ids=[await one_house.account_id("acme")])
            error = await socket_.error()
            assert (await socket_.connection.ping()) is not None
    assert error["extensions"]["code"] == "INTERNAL_SERVER_ERROR"
    assert "hunter2" not in json.dumps(error)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    (failure,) = [line for line in lines if line["level"] == "error"]
    assert failure["request_id"] == error["extensions"]["requestId"]


# ------------------------------------------------------------------------------------------------------- who may


@pytest.mark.parametrize("key", ["Authorization", "authorization", "AUTHORIZATION"])
async def test_the_token_is_in_the_payload_in_any_case(one_house: Stage, one_served: Served, key: str) -> None:
    async with opened(one_served) as socket_:
        await socket_.say("connection_init", payload={key: f"Bearer {one_house.token(ALICE)}"})
        assert await socket_.hear() == {"type": "connection_ack"}


@pytest.mark.parametrize("payload", [{}, {"payload": None}, {"payload": {}}])
async def test_the_token_is_in_the_header_where_the_payload_has_none(
    one_house: Stage, one_served: Served, payload: dict[str, Any]
) -> None:
    header = {"Authorization": f"Bearer {one_house.token(ALICE)}"}
    async with opened(one_served, additional_headers=header) as socket_:
        await socket_.say("connection_init", **payload)
        assert await socket_.hear() == {"type": "connection_ack"}


@pytest.mark.parametrize(
    "payload", [None, {}, {"Authorization": "Bearer nonsense"}, {"Authorization": 7}, {"Authorization": "Basic YTpi"}]
)
async def test_without_a_token_that_holds_the_socket_is_closed(
    one_house: Stage, one_served: Served, payload: dict[str, Any] | None
) -> None:
    async with undisturbed(one_house, one_served), opened(one_served) as socket_:
        await socket_.say("connection_init", payload=payload)
        code, reason = await socket_.ended()
        assert (code, reason.partition(":")[0]) == (4403, "Forbidden")


async def test_an_expired_token_does_not_begin(
    one_house: Stage, one_served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = one_house.token(ALICE, timedelta(minutes=1))
    later = datetime.now(UTC).timestamp() + 3600
    monkeypatch.setattr(one_house.installation.tokens, "_clock", lambda: later)
    async with opened(one_served) as socket_:
        await socket_.say("connection_init", payload={"authorization": f"Bearer {token}"})
        assert await socket_.ended() == (4403, "Forbidden: The token has expired.")


async def test_a_token_that_expires_ends_the_socket_and_tells_no_further_change(
    house: Stage, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, now = house.installation.tokens, datetime.now(UTC).timestamp()
    async with begun(served, house.token(BILLING, timedelta(minutes=1))) as socket_:
        await socket_.watch(await house.account_id("acme"))
        monkeypatch.setattr(tokens, "_clock", lambda: now + 61)
        await house.request_cancellation()
        with pytest.raises(ConnectionClosed):
            await socket_.hear()
        assert await socket_.ended() == (4403, "Forbidden: The token has expired.")


async def test_a_token_expires_in_silence_too(
    one_house: Stage, one_served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing happens to the account: only the time passes, from the moment that the first was told."""
    now, loop = float(int(datetime.now(UTC).timestamp())), asyncio.get_running_loop()
    told_at: list[float] = []

    def clock() -> float:
        return now + 3_599.9 + (loop.time() - told_at[0] if told_at else 0.0)

    monkeypatch.setattr(one_house.installation.tokens, "_clock", lambda: now)
    token = one_house.token(BILLING, timedelta(hours=1))
    async with begun(one_served, token) as socket_:  # for an hour, as far as the socket knows
        monkeypatch.setattr(one_house.installation.tokens, "_clock", clock)
        await socket_.watch(await one_house.account_id("acme"))
        told_at.append(loop.time())
        assert await socket_.ended() == (4403, "Forbidden: The token has expired.")


async def test_a_member_loses_sight_when_the_account_is_canceled(house: Stage, served: Served) -> None:
    async with begun(served, house.token(BOB)) as socket_:
        await socket_.watch(await house.account_id("acme"))
        canceled = (await house.cancel())["account"]
        seen = [heard := await socket_.hear()]
        while heard["type"] == "next":
            seen.append(heard := await socket_.hear())
        error = heard["payload"][0]
        await socket_.subscribe("1", ME)  # the socket and the id are still good for what it may ask
        assert (await socket_.hear())["id"] == "1"
    assert (heard["type"], error["extensions"]["code"]) == ("error", "ACCESS_REMOVED")
    for time in ("canceledAt", "restartableUntil", "deletionScheduledFor"):
        assert error["extensions"][time] == canceled[time]
    told = [one["payload"]["data"]["accountStatusChanged"] for one in seen[:-1]]
    assert all(change["status"] == AccountStatus.ACTIVE for change in told)


async def test_who_is_removed_from_an_account_is_told_nothing_more(house: Stage, served: Served) -> None:
    acme = await house.account_id("acme")
    members = [
        {"subject": cast.subject(who), "email": who, "name": who, "role": "ADMIN", "permissions": []}
        for who in (ALICE, CAROL)
    ]
    async with begun(served, house.token(BOB)) as bob, begun(served, house.token(ALICE)) as alice:
        await bob.watch(acme)
        await alice.watch(acme)
        account = {"reference": "acme", "name": "Acme", "planCode": "essentials", "members": members}
        await house.do(HOST, "syncAccounts", "... on SyncAccountsSuccess { results { outcome } }", accounts=[account])
        assert (await bob.error())["extensions"] == {"code": "FORBIDDEN"}
        await house.request_cancellation()
        assert (await alice.told())["sequence"] == 1


async def test_staff_who_leave_are_told_nothing_more(house: Stage, served: Served) -> None:
    acme = await house.account_id("acme")
    async with begun(served, house.token(SUPPORT)) as support, begun(served, house.token(BILLING)) as billing:
        await support.watch(acme)
        await billing.watch(acme)
        await provisioning.deactivate_staff(SUPPORT)
        assert (await support.error())["extensions"] == {"code": "FORBIDDEN"}
        await house.request_cancellation()
        assert (await billing.told())["sequence"] == 1


# ------------------------------------------------------------------------------------------------- hostile clients


@pytest.mark.parametrize("protocol", [None, "graphql-ws", "soap"])
async def test_another_subprotocol_is_not_spoken(one_house: Stage, one_served: Served, protocol: str | None) -> None:
    async with undisturbed(one_house, one_served), opened(one_served, protocol) as socket_:
        assert socket_.connection.subprotocol is None
        assert (await socket_.ended())[0] == 4406


@pytest.mark.parametrize("type_", ["subscribe", "complete"])
async def test_nothing_is_served_before_the_beginning(one_house: Stage, one_served: Served, type_: str) -> None:
    async with undisturbed(one_house, one_served), opened(one_served) as socket_:
        await socket_.say(type_, id="1", payload={"query": ME})
        assert (await socket_.ended())[0] == 4401


async def test_who_does_not_begin_in_time_is_shown_out(
    one_house: Stage, one_served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with undisturbed(one_house, one_served):
        monkeypatch.setattr(websocket, "_INIT_SECONDS", 0.01)
        async with opened(one_served) as socket_:
            assert (await socket_.ended())[0] == 4408


async def test_who_begins_twice_loses_the_socket(one_house: Stage, one_served: Served) -> None:
    async with undisturbed(one_house, one_served), begun(one_served, one_house.token(ALICE)) as socket_:
        await socket_.say("connection_init")
        assert (await socket_.ended())[0] == 4429


async def test_an_id_that_is_in_use_is_not_given_again(one_house: Stage, one_served: Served) -> None:
    async with undisturbed(one_house, one_served), begun(one_served, one_house.token(ALICE)) as socket_:
        await socket_.watch(await one_house.account_id("acme"))
        await socket_.subscribe("1", ME)
        assert await socket_.ended() == (4409, "Subscriber for 1 already exists")


def _frame(type_: str = "subscribe", **more: Any) -> str:
    return json.dumps({"type": type_, **more})


FRAMES: dict[str, str | bytes] = {
    "array": "[]",
    "array of a good one": f"[{_frame(id='1', payload={'query': ME})}]",
    "number": "7",
    "string": '"subscribe"',
    "null": "null",
    "true": "true",
    "empty": "",
    "invalid JSON": '{"type": ',
    "NaN": '{"type": "ping", "payload": {"a": NaN}}',
    "half a character": '{"type": "ping", "payload": {"a": "\\ud800"}}',
    "binary": _frame(id="1", payload={"query": ME}).encode(),
    "without type": '{"id": "1"}',
    "type null": '{"type": null}',
    "type that is an object": '{"type": {}}',
    "unknown type": _frame("start", id="1", payload={"query": ME}),
    "a server's word": _frame("next", id="1", payload={}),
    "ping with a number": _frame("ping", payload=7),
    "missing id": _frame(payload={"query": ME}),
    "empty id": _frame(id="", payload={"query": ME}),
    "number as id": _frame(id=1, payload={"query": ME}),
    "overlong id": _frame(id="i" * 129, payload={"query": ME}),
    "complete without id": _frame("complete"),
    "complete with a list": _frame("complete", id=["1"]),
    "no payload": _frame(id="1"),
    "payload that is a list": _frame(id="1", payload=[]),
    "no query": _frame(id="1", payload={}),
    "query that is a number": _frame(id="1", payload={"query": 7}),
    "operationName that is a list": _frame(id="1", payload={"query": ME, "operationName": []}),
    "variables that are a list": _frame(id="1", payload={"query": ME, "variables": []}),
    "extensions that are a string": _frame(id="1", payload={"query": ME, "extensions": "no"}),
    "deep variables": _frame(id="1", payload={"query": ME, "variables": {"a": "DEEP"}}).replace(
        '"DEEP"', "[" * 100 + "]" * 100
    ),
    "abysmal ping": '{"type": "ping", "payload": {"a": ' + "[" * 50_000 + "]" * 50_000 + "}}",
    "U+0000": _frame(id="1", payload={"query": ME, "variables": {"a": "\0"}}),
    "U+0000 in the id": _frame(id="\0", payload={"query": ME}),
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
async def test_a_hostile_frame_ends_its_own_socket(one_house: Stage, one_served: Served, frame: str | bytes) -> None:
    async with undisturbed(one_house, one_served), begun(one_served, one_house.token(ALICE)) as socket_:
        await socket_.watch(await one_house.account_id("acme"), id_="own")
        await socket_.connection.send(frame)
        code, reason = await socket_.ended()
        assert code == 4400
        assert reason


@pytest.mark.parametrize("frame", ["[]", "null", _frame("connection_init", payload=[]), b"\0", "{}", "[" * 100_000])
async def test_a_hostile_frame_at_the_beginning_ends_its_own_socket(
    one_house: Stage, one_served: Served, frame: str | bytes
) -> None:
    async with undisturbed(one_house, one_served), opened(one_served) as socket_:
        await socket_.connection.send(frame)
        assert (await socket_.ended())[0] == 4400


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("fragments", [1, 16])
async def test_a_message_of_a_megabyte_is_not_taken(
    one_house: Stage, one_served: Served, begins: bool, fragments: int
) -> None:
    message = _frame("ping", payload={"a": "a" * 1024 * 1024})
    size = len(message) // fragments + 1
    parts = [message[at : at + size] for at in range(0, len(message), size)]
    async with undisturbed(one_house, one_served), opened(one_served) as socket_:
        if begins:
            await socket_.begin(one_house.token(ALICE))
        with suppress(ConnectionClosed):  # before it was all sent
            await socket_.connection.send(message if fragments == 1 else parts)
        assert (await socket_.ended())[0] == 1009


async def test_a_message_of_the_greatest_size_is_taken(one_house: Stage, one_served: Served) -> None:
    around = len(_frame("ping", payload={"a": ""}))
    message = _frame("ping", payload={"a": "a" * (MAX_MESSAGE_BYTES - around)})
    assert len(message) == MAX_MESSAGE_BYTES
    async with begun(one_served, one_house.token(ALICE)) as socket_:
        await socket_.connection.send(message)
        assert (await socket_.hear())["type"] == "pong"


async def test_only_so_many_operations_are_under_way_on_a_socket(one_house: Stage, one_served: Served) -> None:
    acme = await one_house.account_id("acme")
    async with undisturbed(one_house, one_served), begun(one_served, one_house.token(ALICE)) as socket_:
        for number in range(MAX_OPERATIONS):
            await socket_.watch(acme, id_=str(number))
        await socket_.say("complete", id="0")
        await socket_.watch(acme, id_="another")
        await socket_.subscribe("too many", ME)
        assert (await socket_.ended())[0] == 1008


async def test_ten_thousand_operations_at_once_end_their_own_socket(one_house: Stage, one_served: Served) -> None:
    acme = await one_house.account_id("acme")
    async with undisturbed(one_house, one_served), begun(one_served, one_house.token(ALICE)) as socket_:

        async def flood() -> None:
            for number in range(10_000):
                await socket_.subscribe(str(number), WATCH, ids=[acme])

        flooding = asyncio.create_task(flood())
        assert (await socket_.ended())[0] == 1008
        with suppress(ConnectionClosed):
            await flooding


async def test_who_leaves_without_a_word_leaves_nothing_behind(one_house: Stage, one_served: Served) -> None:
    acme = await one_house.account_id("acme")
    async with undisturbed(one_house, one_served), opened(one_served) as socket_:
        await socket_.begin(one_house.token(ALICE))
        await socket_.watch(acme)
        before = len(one_served.server.server_state.tasks)
        socket_.connection.transport.abort()
        await until(lambda: len(one_served.server.server_state.tasks) == before - 1)


# ----------------------------------------------------------------------------------------------- places, slow, stop


async def init(socket_: Socket, token: str) -> None:
    await socket_.say("connection_init", payload={"authorization": f"Bearer {token}"})


async def test_when_all_places_are_taken_clients_are_told_to_come_again(one_house: Stage) -> None:
    async with small(one_house, 1) as served:
        async with begun(served, one_house.token(ALICE)), opened(served) as second:
            await init(second, one_house.token(BILLING))
            assert await second.ended() == (1013, "All places are taken. Try again in a moment.")
        await until(lambda: not served.server.server_state.tasks)
        async with begun(served, one_house.token(BILLING)):
            pass


async def test_one_caller_has_a_share_of_the_sockets(one_house: Stage) -> None:
    """Who has as many as one may have is not told to come again: clients would try for ever."""
    token = one_house.token(ALICE)
    async with small(one_house, 200) as served, begun(served, token), begun(served, token), opened(served) as third:
        await init(third, token)
        code, reason = await third.ended()
        assert (code, reason.partition(".")[0]) == (1008, "One caller has at most 2 open at a time")
        async with begun(served, one_house.token(BOB)):
            pass


async def test_who_has_a_persons_link_takes_none_of_the_persons_places(one_house: Stage) -> None:
    """Links are forwarded, and read by scanners."""
    given = await link(one_house, ALICE)
    async with small(one_house, 200) as served, begun(served, given), begun(served, given), opened(served) as third:
        await init(third, given)
        assert (await third.ended())[0] == 1008
        async with begun(served, one_house.token(ALICE)), begun(served, one_house.token(ALICE)):
            pass


async def test_one_caller_has_a_share_of_the_subscriptions_on_however_few_sockets(one_house: Stage) -> None:
    acme = await one_house.account_id("acme")
    async with small(one_house, 200) as served, begun(served, one_house.token(ALICE)) as socket_:
        for id_ in ("1", "2"):
            await socket_.watch(acme, id_=id_)
        await socket_.subscribe("3", WATCH, ids=[acme])
        refused = await socket_.hear()
        assert (refused["type"], refused["id"]) == ("error", "3")
        assert refused["payload"][0]["extensions"]["code"] == "RATE_LIMITED"
        await socket_.say("complete", id="1")
        await socket_.watch(acme, id_="4")


async def test_those_who_have_not_said_who_they_are_take_nobodys_place(one_house: Stage) -> None:
    async with small(one_house, 2) as served, opened(served) as first, opened(served), opened(served) as third:
        assert (await third.ended())[0] == 1013
        await first.begin(one_house.token(ALICE))
        async with begun(served, one_house.token(BOB)):
            pass


async def test_a_socket_ends_with_its_token_whatever_is_under_way(one_house: Stage, one_served: Served) -> None:
    async with opened(one_served) as socket_:
        await socket_.begin(one_house.token(SUPPORT, timedelta(seconds=1)))
        assert await socket_.ended() == (4403, "Forbidden: The token has expired.")


async def test_who_sends_pings_and_reads_nothing_is_cut_off(one_house: Stage) -> None:
    """Before anybody has asked who they are: their answers would fill the server."""
    async with serving(one_house.app, one_house.installation.changes, send_buffer=16_384) as served:
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        plain.connect(("127.0.0.1", served.port))
        async with opened(served, sock=plain, max_queue=1, ping_interval=None, close_timeout=0.1) as client:
            client.connection.transport.pause_reading()
            ping = bytes([0x89, 0x80 | 125]) + bytes(4 + 125)
            await until(lambda: len(served.server.server_state.connections) == 1)
            with suppress(OSError):
                for _ in range(2_000):  # some 25 MB, of which the answers are as large
                    if not served.server.server_state.connections:
                        break
                    client.connection.transport.write(ping * 100)
                    await asyncio.sleep(0)
            assert not served.server.server_state.connections


@asynccontextmanager
async def deaf(house: Stage) -> AsyncIterator[tuple[Socket, WebSocketsSansIOProtocol, int]]:
    """A client that subscribes and then reads no further, so that the server cannot say any more; the server's end of
    its connection; and how many changes there were until then.

    Long names for fields make long answers, which soon fill all that the system keeps of what is not read."""
    fields = " ".join(f"{'long' * 80}{number}: name" for number in range(45))
    query = WATCH.replace("name status", fields)
    async with serving(house.app, house.installation.changes, send_buffer=16_384) as served:
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        plain.connect(("127.0.0.1", served.port))
        async with begun(served, house.token(BILLING), sock=plain, max_queue=1, close_timeout=0.1) as client:
            await client.subscribe("1", query, ids=[await house.account_id("acme")])
            assert (await client.told())["sequence"] == 0
            (connection,) = served.server.server_state.connections
            assert isinstance(connection, WebSocketsSansIOProtocol)
            changes = 0
            while connection.writable.is_set():
                changes += await _round(house)
            yield client, connection, changes


async def _round(house: Stage) -> int:
    """An account is canceled and restarted; answers how many changes that were."""
    canceled = await house.cancel()
    await house.do(BILLING, "restartAccount", accountId=canceled["account"]["id"])
    return 3


async def test_a_reader_who_is_slow_is_told_everything_later_and_nothing_is_kept_for_it(house: Stage) -> None:
    async with deaf(house) as (client, connection, changes):
        for _ in range(5):
            await _round(house)
        last = changes + 15
        # What a transport takes before it is full, 64 KiB, and an answer.
        assert connection.transport.get_write_buffer_size() < 100_000
        assert [(await client.told())["sequence"] for _ in range(last)] == list(range(1, last + 1))


async def test_who_does_not_read_for_too_long_is_left(one_house: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place is free again, and nothing is done for it any more."""
    monkeypatch.setattr(websocket, "SLOWEST_SECONDS", 0.2)
    async with deaf(one_house) as (_, connection, _):
        await until(lambda: not connection.tasks)


async def test_who_does_not_read_has_no_more_operations_under_way_than_others(one_house: Stage) -> None:
    """What is refused is under way until that was said."""
    async with deaf(one_house) as (client, _, _):
        before = len(asyncio.all_tasks())
        for number in range(1, MAX_OPERATIONS):
            await client.subscribe(f"refused {number}", "{ nothing }")
            await until(lambda: len(asyncio.all_tasks()) == before + number)  # noqa: B023  asked at once
        await client.subscribe("too many", "{ nothing }")
        await client.say("ping")
        heard = ""
        with suppress(ConnectionClosed):
            while heard != "pong":
                heard = (await client.hear())["type"]
        assert heard != "pong"
        assert (await client.ended())[0] == 1008


@pytest.mark.parametrize("query", ["{ me: viewer { __typename } }", "{ nothing }", "mutation { nothing }"])
async def test_for_who_does_not_read_one_answer_is_made_however_many_they_ask_for(
    one_house: Stage, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither executed nor written, so that they do not fill the server; once they read, all are answered. Beside it
    there is one event."""
    made = said = most = executed = 0
    say, execute = websocket._Socket._say, Operations.execute

    async def counted_say(*args: Any) -> None:
        nonlocal said
        await say(*args)
        said += 1

    def counted_dumps(body: Any) -> bytes:
        nonlocal made, most
        made += 1
        most = max(most, made - said)
        return dumps(body)

    async def counted_execute(*args: Any) -> Any:
        nonlocal executed
        executed += 1
        return await execute(*args)

    async with deaf(one_house) as (client, connection, _):
        await until(lambda: len(connection.tasks) >= 1)
        monkeypatch.setattr(websocket._Socket, "_say", counted_say)
        monkeypatch.setattr("app.graphql.websocket.dumps", counted_dumps)
        monkeypatch.setattr(Operations, "execute", counted_execute)
        before = len(asyncio.all_tasks())
        asked = {str(number) for number in range(10, 40)}
        for id_ in asked:
            await client.subscribe(id_, query)
        await until(lambda: made > 0 and len(asyncio.all_tasks()) >= before + len(asked))
        assert executed <= 1
        await client.say("complete", id="10")
        asked.remove("10")
        while asked:
            heard = await client.hear()
            if heard["type"] in {"complete", "error"}:
                asked.discard(heard["id"])
    assert most <= 2


async def test_an_event_is_answered_when_it_can_be_told(one_house: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subscriptions of one socket, too, hold one answer of a client that does not read."""
    answered = said = most = 0
    say, of = websocket._Socket._say, Operations._run

    async def counted_say(self: Any, message: dict[str, Any]) -> None:
        nonlocal said
        await say(self, message)
        said += message["type"] == "next"

    async def counted_run(*args: Any) -> Any:
        nonlocal answered, most
        answer = await of(*args)
        if args[2].kind == "subscription":
            answered += 1
            most = max(most, answered - said)
        return answer

    monkeypatch.setattr(websocket._Socket, "_say", counted_say)
    monkeypatch.setattr(Operations, "_run", counted_run)
    acme = await one_house.account_id("acme")
    async with deaf(one_house) as (client, _, changes):
        for number in range(5):
            await client.subscribe(f"another {number}", WATCH, ids=[acme])
        await _round(one_house)
        told: set[str] = set()
        missed = changes
        while len(told) < 5 or missed > 0:
            heard = await client.hear()
            told |= {heard["id"]} - {"1"}
            missed -= heard["id"] == "1"
    assert most == 1


async def test_while_an_operation_waits_for_its_turn_others_are_stopped_and_pings_answered(
    one_house: Stage, one_served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, held, going = Operations.execute, asyncio.Event(), asyncio.Event()

    async def slow(*args: Any) -> Any:
        held.set()
        await going.wait()
        return await execute(*args)

    monkeypatch.setattr(Operations, "execute", slow)
    acme = await one_house.account_id("acme")
    async with begun(one_served, one_house.token(BILLING)) as socket_:
        await socket_.watch(acme, id_="watch")
        for id_ in ("first", "second", "third"):
            await socket_.subscribe(id_, ME)
        await held.wait()
        await socket_.say("complete", id="second")
        await socket_.say("ping")
        assert await socket_.hear() == {"type": "pong"}
        going.set()
        heard = [await socket_.hear() for _ in range(4)]
    assert [(one["id"], one["type"]) for one in heard] == [
        (id_, type_) for id_ in ("first", "third") for type_ in ("next", "complete")
    ]


async def test_a_stop_ends_sockets_with_the_code_that_clients_come_again_after(house: Stage, served: Served) -> None:
    acme = await house.account_id("acme")
    with log_in_memory() as log:
        async with begun(served, house.token(BILLING)) as billing, begun(served, house.token(ALICE)) as alice:
            await billing.watch(acme)
            await served.stop()
            assert (await billing.ended())[0] == 1012
            assert (await alice.ended())[0] == 1012
    levels = {json.loads(line)["level"] for line in log.getvalue().splitlines()}
    assert levels <= {"debug", "info"}


# ---------------------------------------------------------------------------------------------------- a real client


async def test_the_client_of_python_gql_follows_an_account_to_its_end(house: Stage, served: Served) -> None:
    transport = WebsocketsTransport(
        url=served.websocket,
        init_payload={"Authorization": f"Bearer {house.token(ALICE)}"},
        subprotocols=[Subprotocol(PROTOCOL)],
    )
    request = gql(WATCH)
    request.variable_values = {"ids": [await house.account_id("acme")]}
    told: list[tuple[str, int]] = []

    async def follow(session: AsyncClientSession) -> None:
        async for answer in session.subscribe(request):
            change = answer["accountStatusChanged"]
            told.append((change["status"], change["sequence"]))
            if change["sequence"] == 0:
                asked.update(await house.request_cancellation())
            else:
                confirmed = {"requestId": asked["request"]["id"], "confirmationToken": asked["confirmationToken"]}
                await house.do(ALICE, "confirmCancellation", accountName="Acme", **confirmed)

    asked: dict[str, Any] = {}
    async with asyncio.timeout(_PATIENCE), Client(transport=transport) as session:
        with pytest.raises(TransportQueryError) as ended:
            await follow(session)
    assert told == [("ACTIVE", 0), ("ACTIVE", 1)]
    assert ended.value.errors is not None
    assert ended.value.errors[0]["extensions"]["code"] == "ACCESS_REMOVED"
