"""Live status as server-sent events, with real sockets: the bytes, what is negotiated, and how a stream ends."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import main
from app.db import Database
from app.graphql import http
from tests import cast
from tests.cast import ALICE, BILLING, BOB, GATEKEEPER, Stage
from tests.ending import log_in_memory
from tests.serving import Served, serving

WATCH = "subscription W($ids: [ID!]!) { accountStatusChanged(accountIds: $ids) { reference status epoch sequence } }"
ME = "{ viewer { __typename } }"
EVENTS = "text/event-stream"
URQL_SUBSCRIPTION = "text/event-stream, multipart/mixed"
URQL = (
    "application/graphql-response+json, application/graphql+json, application/json, text/event-stream, multipart/mixed"
)
"""What urql accepts as the answer to a query or a mutation."""

_PATIENCE = 60
"""Seconds after which a test that waits in vain fails."""


class Stream:
    """An answer as it comes."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self._chunks = response.aiter_raw()
        self._rest = b""

    async def block(self) -> bytes:
        """The bytes up to the next empty line; empty where there are no more."""
        async with asyncio.timeout(_PATIENCE):
            while b"\n\n" not in self._rest:
                try:
                    self._rest += await anext(self._chunks)
                except StopAsyncIteration:
                    assert self._rest == b""
                    return b""
        block, _, self._rest = self._rest.partition(b"\n\n")
        return block + b"\n\n"

    async def answer(self) -> dict[str, Any]:
        """The next event's payload, comments left out."""
        while (block := await self.block()).startswith(b":"):
            pass
        event, data, *rest = block.decode().split("\n")
        assert (event, data[:6], rest) == ("event: next", "data: ", ["", ""]), block
        payload: dict[str, Any] = json.loads(data[6:])
        return payload

    async def change(self) -> tuple[str, str, int]:
        """The next change."""
        told = (await self.answer())["data"]["accountStatusChanged"]
        return told["reference"], told["status"], told["sequence"]


def _headers(token: str | None, accept: str | None) -> dict[str, str]:
    return ({"Authorization": f"Bearer {token}"} if token else {}) | ({"Accept": accept} if accept else {})


async def post(
    served: Served, token: str | None, query: str, accept: str | None = EVENTS, **variables: Any
) -> httpx2.Response:
    """A whole answer."""
    async with httpx2.AsyncClient(timeout=_PATIENCE) as client:
        body = {"query": query, "variables": variables}
        return await client.post(served.http, json=body, headers=_headers(token, accept))


@asynccontextmanager
async def streaming(
    served: Served, token: str, *account_ids: str, accept: str = EVENTS, get: bool = False
) -> AsyncIterator[Stream]:
    """A subscription whose answer has begun."""
    headers = _headers(token, accept)
    async with httpx2.AsyncClient(timeout=_PATIENCE) as client:
        if get:
            parameters = {"query": WATCH, "variables": json.dumps({"ids": account_ids})}
            request = client.stream("GET", served.http, params=parameters, headers=headers)
        else:
            body = {"query": WATCH, "variables": {"ids": account_ids}}
            request = client.stream("POST", served.http, json=body, headers=headers)
        async with request as response:
            yield Stream(response)


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


async def counted(house: Stage, name: str, **labels: str) -> float:
    families = text_string_to_metric_families((await house.client.get("/metrics")).text)
    found = [one.value for family in families for one in family.samples if (one.name, one.labels) == (name, labels)]
    return sum(found)


async def open_subscriptions(house: Stage, number: float) -> None:
    """Wait until so many are open."""
    async with asyncio.timeout(_PATIENCE):
        while await counted(house, "sunset_subscriptions") != number:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.01)


# ------------------------------------------------------------------------------------------------------ what is told


async def test_the_bytes_are_those_of_the_protocol(house: Stage, served: Served) -> None:
    async with streaming(served, house.token(BILLING), await house.account_id("acme")) as stream:
        headers: Mapping[str, str] = stream.response.headers
        assert stream.response.status_code == 200
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-store", "no")
        assert headers["vary"] == "Accept, Authorization"
        assert headers["x-request-id"]
        assert "content-length" not in headers
        assert await stream.block() == b":\n\n"
        assert await stream.block() == (
            b'event: next\ndata: {"data":{"accountStatusChanged":'
            b'{"reference":"acme","status":"ACTIVE","epoch":0,"sequence":0}}}\n\n'
        )
        await house.cancel()
        assert [await stream.change() for _ in range(2)] == [("acme", "ACTIVE", 1), ("acme", "CANCELED", 2)]


async def test_a_member_whose_account_is_canceled_is_told_so_and_the_stream_is_complete(
    house: Stage, served: Served
) -> None:
    async with streaming(served, house.token(BOB), await house.account_id("acme")) as stream:
        assert await stream.change() == ("acme", "ACTIVE", 0)
        canceled = (await house.cancel())["account"]
        while "errors" not in (answer := await stream.answer()):
            assert answer["data"]["accountStatusChanged"]["status"] == "ACTIVE"
        assert await stream.block() == b"event: complete\ndata: \n\n"
        assert await stream.block() == b""
    assert "data" not in answer
    (error,) = answer["errors"]
    assert error["extensions"]["code"] == "ACCESS_REMOVED"
    assert error["extensions"]["restartableUntil"] == canceled["restartableUntil"]


async def test_an_account_that_cannot_be_seen_is_an_event_and_the_end(house: Stage, served: Served) -> None:
    answer = await post(served, house.token(ALICE), WATCH, ids=[await house.account_id("globex")])
    comment, event, complete, rest = answer.content.split(b"\n\n")
    assert (comment, complete, rest) == (b":", b"event: complete\ndata: ", b"")
    assert json.loads(event.removeprefix(b"event: next\ndata: "))["errors"][0]["extensions"] == {"code": "FORBIDDEN"}


@pytest.mark.parametrize("accept", [EVENTS, URQL_SUBSCRIPTION, URQL, f"{EVENTS};q=0.1, */*", "Text/Event-Stream"])
async def test_a_subscription_is_streamed_to_who_takes_events_at_all(
    one_house: Stage, one_served: Served, accept: str
) -> None:
    acme = await one_house.account_id("acme")
    async with streaming(one_served, one_house.token(GATEKEEPER), acme, accept=accept) as stream:
        assert stream.response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert await stream.change() == ("acme", "ACTIVE", 0)


async def test_a_subscription_may_be_asked_for_with_get(house: Stage, served: Served) -> None:
    async with streaming(served, house.token(BILLING), await house.account_id("acme"), get=True) as stream:
        assert await stream.change() == ("acme", "ACTIVE", 0)
        await house.request_cancellation()
        assert await stream.change() == ("acme", "ACTIVE", 1)


# --------------------------------------------------------------------------------------------------- negotiation


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (None, "application/json"),
        ("application/json", "application/json"),
        ("*/*", "application/json"),
        (f"{EVENTS};q=0", "application/json"),
        (f"{EVENTS};q=0, application/graphql-response+json", "application/graphql-response+json"),
    ],
)
async def test_a_subscription_is_not_acceptable_to_who_takes_no_events(
    one_house: Stage, one_served: Served, accept: str | None, media_type: str
) -> None:
    acme = await one_house.account_id("acme")
    answer = await post(one_served, one_house.token(BILLING), WATCH, accept, ids=[acme])
    assert answer.status_code == 406
    assert answer.headers["content-type"] == f"{media_type}; charset=utf-8"
    (error,) = answer.json()["errors"]
    assert error["extensions"] == {"code": "BAD_USER_INPUT"}
    assert EVENTS in error["message"]


async def test_a_query_is_answered_in_json_to_who_takes_json_too(one_house: Stage, one_served: Served) -> None:
    answer = await post(one_served, one_house.token(ALICE), ME, URQL)
    assert answer.headers["content-type"] == "application/graphql-response+json; charset=utf-8"
    assert "errors" not in answer.json()
    refused = await post(one_served, one_house.token(ALICE), "{ nothing }", URQL)
    assert (refused.status_code, refused.headers["content-type"]) == (
        400,
        "application/graphql-response+json; charset=utf-8",
    )


@pytest.mark.parametrize(
    ("query", "begins"),
    [
        (ME, b'event: next\ndata: {"data":{"viewer":'),
        ("{ nothing }", b'event: next\ndata: {"errors":[{'),
        ("{", b'event: next\ndata: {"errors":[{'),
    ],
)
async def test_who_takes_nothing_but_events_gets_one_event(
    one_house: Stage, one_served: Served, query: str, begins: bytes
) -> None:
    answer = await post(one_served, one_house.token(ALICE), query)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    comment, event, complete, rest = answer.content.split(b"\n\n")
    assert (comment, complete, rest) == (b":", b"event: complete\ndata: ", b"")
    assert event.startswith(begins)
    json.loads(event.removeprefix(b"event: next\ndata: "))


async def test_a_mutation_is_not_sent_with_get_even_for_events(one_house: Stage, one_served: Served) -> None:
    mutation = 'mutation { withdrawCancellation(input: {accountId: "x"}) { __typename } }'
    async with httpx2.AsyncClient(timeout=_PATIENCE) as client:
        headers = _headers(one_house.token(ALICE), EVENTS)
        answer = await client.get(one_served.http, params={"query": mutation}, headers=headers)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.headers["content-type"].startswith("application/json")


@pytest.mark.parametrize("token", [None, "nonsense"])
async def test_who_is_not_known_gets_no_stream(one_house: Stage, one_served: Served, token: str | None) -> None:
    answer = await post(one_served, token, WATCH, ids=[await one_house.account_id("acme")])
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.json()["errors"][0]["extensions"] == {"code": "UNAUTHENTICATED"}


# -------------------------------------------------------------------------------------------- places, and the end


async def test_when_the_places_are_taken_clients_are_told_to_come_again(one_house: Stage) -> None:
    app = main.create_app(replace(one_house.settings, streams=1), one_house.installation)
    acme, token = await one_house.account_id("acme"), one_house.token(BILLING)
    async with app.router.lifespan_context(app), serving(app, one_house.installation.changes) as served:
        async with streaming(served, token, acme) as stream:
            assert await stream.change() == ("acme", "ACTIVE", 0)
            refused = await post(served, one_house.token(ALICE), WATCH, ids=[acme])
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.headers["content-type"] == "application/json; charset=utf-8"
            assert refused.json()["errors"][0]["extensions"] == {"code": "SERVICE_UNAVAILABLE"}
            assert (await post(served, token, ME)).status_code == 200  # what is not a stream needs no place
        await open_subscriptions(one_house, 0)
        async with streaming(served, token, acme) as stream:
            assert stream.response.status_code == 200


async def test_one_caller_has_a_share_of_the_places(one_house: Stage) -> None:
    app = main.create_app(replace(one_house.settings, streams=100), one_house.installation)
    acme, token = await one_house.account_id("acme"), one_house.token(BILLING)
    async with (
        app.router.lifespan_context(app),
        serving(app, one_house.installation.changes) as served,
        streaming(served, token, acme),
    ):
        refused = await post(served, token, WATCH, ids=[acme])
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
        async with streaming(served, one_house.token(ALICE), acme) as other:
            assert await other.change() == ("acme", "ACTIVE", 0)


async def test_a_client_that_leaves_ends_its_subscription(house: Stage, served: Served) -> None:
    left = await counted(house, "sunset_subscriptions_ended_total", reason="left")
    with log_in_memory() as log:
        async with streaming(served, house.token(BILLING), await house.account_id("acme")) as stream:
            await stream.change()
            await open_subscriptions(house, 1)
        await open_subscriptions(house, 0)
    assert await counted(house, "sunset_subscriptions_ended_total", reason="left") == left + 1
    assert {json.loads(line)["level"] for line in log.getvalue().splitlines()} <= {"debug", "info"}


async def test_a_stop_ends_the_stream_without_saying_that_it_is_complete(house: Stage, served: Served) -> None:
    with log_in_memory() as log:
        async with streaming(served, house.token(BILLING), await house.account_id("acme")) as stream:
            await stream.change()
            stopping = asyncio.create_task(served.stop())
            assert await stream.block() == b""
            await stopping
    assert {json.loads(line)["level"] for line in log.getvalue().splitlines()} <= {"debug", "info"}


async def test_an_expired_token_is_told_and_ends_the_stream_without_saying_that_it_is_complete(
    house: Stage, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(UTC).timestamp()
    token = house.token(BILLING, timedelta(minutes=1))
    async with streaming(served, token, await house.account_id("acme")) as stream:
        await stream.change()
        monkeypatch.setattr(house.installation.tokens, "_clock", lambda: now + 61)
        await house.request_cancellation()
        told = await stream.answer()
        assert await stream.block() == b""
    assert told == {"errors": [{"message": "The token has expired.", "extensions": {"code": "UNAUTHENTICATED"}}]}


async def test_silence_is_filled_with_comments(
    one_house: Stage, one_served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_KEEPALIVE_SECONDS", 0.01)
    async with streaming(one_served, one_house.token(BILLING), await one_house.account_id("acme")) as stream:
        await stream.change()
        assert [await stream.block() for _ in range(3)] == [b":\n\n"] * 3
        await one_house.request_cancellation()
        assert await stream.change() == ("acme", "ACTIVE", 1)
