"""What one request may cost before it is known to be worth it: by whom, how large, and how much of it is new."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest

from app import auth, db, errors, events, main, provisioning
from app.db import Database
from app.graphql import documents, nodes
from app.graphql.allowance import Allowance
from app.lifecycle import LinkPurpose, Permission, StaffRole
from app.messages import LinkGrant
from tests import cast
from tests.api.test_websocket import ME, Socket, begun, opened
from tests.cast import ALICE, BILLING, CAROL, GATEKEEPER, HOST, SUPPORT, Stage, subject
from tests.serving import Served, serving

JSON = "application/json"
GRAPHQL_JSON = "application/graphql-response+json"
NOBODY = "nobody@acme.example"
SYNC = "mutation($input: SyncAccountsInput!) { syncAccounts(input: $input) { __typename } }"
SEARCH = "query($filter: AccountFilterInput) { accounts(filter: $filter) { pageInfo { hasNextPage } } }"


@pytest.fixture
async def one_house(sqlite_database: Database, tmp_path: Path) -> AsyncIterator[Stage]:
    """The service where the engine makes no difference."""
    async with cast.stage(sqlite_database, tmp_path) as running:
        yield running


@asynccontextmanager
async def limited(house: Stage, new_documents: int) -> AsyncIterator[Stage]:
    """The service of that house again, where a caller may send so many new documents in a minute."""
    settings = replace(house.settings, rate_limit_documents=new_documents)
    app = main.create_app(settings, house.installation)
    transport = httpx2.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://sunset.test") as client,
    ):
        yield replace(house, app=app, settings=settings, client=client)


async def send(house: Stage, token: str, body: bytes | AsyncIterator[bytes], *, accept: str = JSON) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": JSON, "Accept": accept}
    return await house.client.post("/graphql", content=body, headers=headers)


def refusal(response: httpx2.Response) -> dict[str, Any]:
    """The extensions of the one error of a request that was refused as a whole."""
    answer = response.json()
    assert answer.keys() == {"errors"}, answer
    [error] = answer["errors"]
    extensions: dict[str, Any] = error["extensions"]
    return extensions


def body(query: str, **variables: Any) -> bytes:
    return orjson.dumps({"query": query, "variables": variables})


def padded(query: str, size: int) -> bytes:
    """A request of exactly so many bytes."""
    short = body(query, unused="")
    return body(query, unused="x" * (size - len(short)))


# ------------------------------------------------------------------------------------------------------ known callers


@pytest.mark.parametrize(("accept", "status"), [(GRAPHQL_JSON, 403), (JSON, 200)])
async def test_of_somebody_unknown_nothing_is_read(house: Stage, accept: str, status: int) -> None:
    """Their token is good: the identity provider knows them, and nobody here does."""
    read = 0

    async def large() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield b" " * 1_000

    response = await send(house, house.token(NOBODY), large(), accept=accept)
    assert (response.status_code, refusal(response)) == (status, {"code": "FORBIDDEN"})
    assert "nobody here goes by it" in response.json()["errors"][0]["message"]
    assert read == 0


@pytest.mark.parametrize("query", ["{ viewer { __typename } }", "{ nonsense", "{ __typename }", "query A { a } " * 11])
async def test_of_somebody_unknown_no_document_is_prepared(
    house: Stage, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "parse", None)
    for response in (
        await house.post(query, token=house.token(NOBODY)),
        await house.client.get(
            "/graphql", params={"query": query}, headers={"Authorization": f"Bearer {house.token(NOBODY)}"}
        ),
    ):
        assert refusal(response) == {"code": "FORBIDDEN"}


async def test_somebody_who_is_added_is_known_at_once(house: Stage) -> None:
    """Nothing is remembered of those who are not known."""
    who = "new@vendor.example"
    assert "errors" in await house.ask(who, ME)
    known = {"email": who, "subject": subject(who), "issuer": house.installation.member_issuer}
    await provisioning.add_staff(name="New", role=StaffRole.SUPPORT, **known)
    assert await house.ask(who, ME) == {"data": {"viewer": {"__typename": "Viewer"}}}


async def test_that_somebody_was_known_a_moment_ago_permits_nothing(house: Stage) -> None:
    """They are refused by what their request asks for, as always."""
    for who in (SUPPORT, CAROL):
        assert "errors" not in await house.ask(who, ME)
    await provisioning.deactivate_staff(SUPPORT)
    await db.execute("DELETE FROM member WHERE email = $1", CAROL)
    for who in (SUPPORT, CAROL):
        for query in (ME, "{ plans { code } }", "{ __schema { queryType { name } } }"):
            answer = await house.ask(who, query)
            assert not any((answer.get("data") or {}).values()), answer
            assert [error["extensions"]["code"] for error in answer["errors"]] == ["FORBIDDEN"]


async def test_a_member_whose_access_is_removed_is_known_and_told_so(house: Stage) -> None:
    await house.cancel()
    async with limited(house, 0) as other:  # a process that has met nobody yet
        answer = await other.ask(ALICE, ME)
    assert [error["extensions"]["code"] for error in answer["errors"]] == ["ACCESS_REMOVED"]


async def link(house: Stage, who: str, reference: str, purpose: LinkPurpose = LinkPurpose.CONFIRM) -> str:
    """The token of a link for that person. Each is another link."""
    now = await db.database_now()
    grant = LinkGrant(
        purpose=purpose,
        issuer=house.installation.member_issuer,
        subject=subject(who),
        account_id=await house.account_key(reference),
        request_id=db.uuid7(),
    )
    return house.installation.tokens.mint_link(grant, issued_at=now, expires_at=now + timedelta(days=1))


async def test_the_bearer_of_a_link_is_known_by_whom_it_was_sent_to(house: Stage) -> None:
    confirm = "mutation($input: ConfirmCancellationInput!) { confirmCancellation(input: $input) { __typename } }"
    given = {"requestId": nodes.encode(nodes.Kind.CANCELLATION_REQUEST, db.uuid7()), "accountName": "Acme"}
    of_alice = await link(house, ALICE, "acme")
    known = await house.post(confirm, {"input": given}, token=of_alice)
    assert known.json()["data"] == {"confirmCancellation": {"__typename": "NotFoundError"}}
    unknown = await house.post(confirm, {"input": given}, token=await link(house, NOBODY, "acme"))
    assert refusal(unknown) == {"code": "FORBIDDEN"}


async def test_who_is_known_is_looked_for_once_and_who_is_not_each_time(
    house: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known caller's operation finds out for itself who they are; nothing else does, most of the time."""
    read, fetch_one = [], db.fetch_one

    async def counted(sql: str, *args: Any) -> Any:
        if "LEFT JOIN staff" in sql:
            read.append(args[1])
        return await fetch_one(sql, *args)

    monkeypatch.setattr(db, "fetch_one", counted)
    for _ in range(5):
        await house.ask(ALICE, "{ plans { code } }")
        await house.ask(NOBODY, "{ plans { code } }")
    assert read.count(subject(ALICE)) == 5 + 1
    assert read.count(subject(NOBODY)) == 5


async def test_a_minute_later_the_database_is_asked_again(one_house: Stage) -> None:
    now = 0.0
    known = auth.KnownCallers(lambda: now)
    call = await one_house.call(SUPPORT)
    await known.require(call)
    await provisioning.deactivate_staff(SUPPORT)
    now = 59.0
    await known.require(call)
    now = 61.0
    with pytest.raises(errors.Forbidden):
        await known.require(call)


async def test_a_socket_of_somebody_unknown_is_closed_before_anything_is_asked(
    one_house: Stage, one_served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "parse", None)
    async with opened(one_served) as socket:
        await socket.say("connection_init", payload={"Authorization": f"Bearer {one_house.token(NOBODY)}"})
        await socket.subscribe("1", "{ nonsense")
        code, reason = await socket.ended()
    assert code == 4403
    assert reason.startswith("Forbidden: The token is valid, and nobody here goes by it")


@pytest.mark.parametrize("query", ["{ viewer { __typename } }", "{ nonsense", "subscription { nothing }"])
async def test_an_open_socket_of_somebody_who_is_forgotten_is_closed_before_anything_is_read(
    one_house: Stage, one_served: Served, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if they had just come."""
    monkeypatch.setattr(auth.KnownCallers, "SECONDS", 0.0)
    async with begun(one_served, one_house.token(SUPPORT)) as socket:
        await provisioning.deactivate_staff(SUPPORT)
        monkeypatch.setattr(documents, "parse", None)
        await socket.subscribe("1", query)
        code, reason = await socket.ended()
    assert code == 4403
    assert reason.startswith("Forbidden: The token is valid, and nobody here goes by it")


async def test_a_refusal_of_what_is_asked_for_ends_its_operation_alone(one_house: Stage, one_served: Served) -> None:
    """Also for somebody who was known a moment ago."""
    watch = "subscription($ids: [ID!]!) { accountStatusChanged(accountIds: $ids) { status } }"
    async with begun(one_served, one_house.token(SUPPORT)) as socket:
        await provisioning.deactivate_staff(SUPPORT)
        await socket.subscribe("1", watch, ids=[await one_house.account_id("acme")])
        assert (await socket.error())["extensions"] == {"code": "FORBIDDEN"}
        await socket.subscribe("1", "{ __schema { queryType { name } } }")
        assert (await socket.error())["extensions"] == {"code": "FORBIDDEN"}
        await socket.say("ping")
        assert (await socket.hear())["type"] == "pong"


@pytest.fixture
async def one_served(one_house: Stage) -> AsyncIterator[Served]:
    async with serving(one_house.app, one_house.installation.changes) as running:
        yield running


# -------------------------------------------------------------------------------------------------------- small bodies


@pytest.mark.parametrize("who", [ALICE, BILLING, GATEKEEPER])
async def test_a_request_has_128_kib(one_house: Stage, who: str) -> None:
    token = one_house.token(who)
    largest = await send(one_house, token, padded("{ plans { code } }", 128 * 1024))
    larger = await send(one_house, token, padded("{ plans { code } }", 128 * 1024 + 1))
    assert "errors" not in largest.json()
    assert (larger.status_code, refusal(larger)) == (413, {"code": "PAYLOAD_TOO_LARGE", "maximum": 128 * 1024})


async def test_who_provisions_sends_batches_of_2_mib(one_house: Stage) -> None:
    token = one_house.token(HOST)
    largest = await send(one_house, token, padded("{ plans { code } }", 2 * 1024 * 1024))
    larger = await send(one_house, token, padded("{ plans { code } }", 2 * 1024 * 1024 + 1))
    assert "errors" not in largest.json()
    assert (larger.status_code, refusal(larger)) == (413, {"code": "PAYLOAD_TOO_LARGE", "maximum": 2 * 1024 * 1024})


async def test_the_largest_batch_is_within_the_budget(one_house: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 accounts with 10,000 members, everything said of each that can be. What becomes of it is tried elsewhere."""
    taken: list[int] = []

    async def sync(_: object, items: Any) -> None:
        taken.append(sum(len(item.members) for item in items))
        raise errors.PermissionDenied("That is all.")

    monkeypatch.setattr(provisioning, "sync", sync)
    member = {
        "issuer": "https://i.d",
        "subject": "00u1234567890abcdefg",
        "email": "someone@example.com",
        "name": "Some One",
        "role": "MEMBER",
        "permissions": list(Permission),
    }
    account = {
        "name": "An Account",
        "planCode": "premium",
        "currentPeriodEnd": "2027-01-31T00:00:00Z",
        "csmEmail": cast.CSM,
        "members": [member] * 20,
    }
    batch = body(SYNC, input={"accounts": [{"reference": f"account-{number}", **account} for number in range(500)]})
    answer = (await send(one_house, one_house.token(HOST), batch)).json()
    assert answer == {"data": {"syncAccounts": {"__typename": "PermissionDeniedError"}}}, len(batch)
    assert taken == [10_000]


# ----------------------------------------------------------------------------------------- values, before they are read


def commas(text: str, number: int) -> bytes:
    return b'{"query": "{ plans { code } }", "variables": {"x": [' + ",".join([text] * number).encode() + b"]}}"


@pytest.mark.parametrize("text", ["1", "[]", "{}", '""', '{"a":[]}', "null"])
@pytest.mark.parametrize("who", [ALICE, HOST])
async def test_more_values_than_a_request_can_use_are_not_even_parsed(
    one_house: Stage, who: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (2 * 1024 * 1024 if who == HOST else 128 * 1024) // (len(text) + 1) - 100
    request = commas(text, size)
    monkeypatch.setattr(orjson, "loads", None)
    response = await send(one_house, one_house.token(who), request)
    assert (response.status_code, refusal(response)) == (400, {"code": "BAD_USER_INPUT"})


async def test_a_socket_that_sends_more_values_than_a_request_can_use_is_closed(
    one_house: Stage, one_served: Served
) -> None:
    async with begun(one_served, one_house.token(ALICE)) as socket:
        message = {"id": "1", "type": "subscribe", "payload": {"query": ME, "variables": {"x": [[]] * 30_000}}}
        await socket.connection.send(json.dumps(message, separators=(",", ":")))
        assert (await socket.ended())[0] == 4400


@pytest.mark.parametrize(
    ("query", "variables"),
    [
        (SEARCH, {"filter": {"planCodes": ["x"] * 1_001}}),
        (SEARCH, {"filter": {"statuses": ["ACTIVE"] * 1_001}}),
        (SEARCH, {"filter": [[None] * 1_001]}),
        (SEARCH, {"filter": {"nothing": {"such": [{}] * 1_001}}}),
        (SYNC, {"filter": {"accounts": [{}] * 1_001}}),
        ("{ plans { code } }", {"filter": [1] * 1_001}),
    ],
)
async def test_a_list_that_is_too_long_for_everything_is_refused_before_its_items_are_read_as_their_type(
    one_house: Stage, query: str, variables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphql.execution.values.coerce_variable_values", None)
    response = await one_house.post(query, variables, token=one_house.token(BILLING))
    assert refusal(response) == {"code": "BAD_USER_INPUT"}
    assert "`$filter`" in response.json()["errors"][0]["message"]
    assert "1000" in response.json()["errors"][0]["message"]


async def test_on_a_socket_a_list_that_is_too_long_ends_its_operation_alone(
    one_house: Stage, one_served: Served
) -> None:
    watch = "subscription($ids: [ID!]!) { accountStatusChanged(accountIds: $ids) { status } }"
    async with begun(one_served, one_house.token(BILLING)) as socket:
        await socket.subscribe("1", watch, ids=["x"] * 1_001)
        error = await socket.error()
        assert (error["extensions"]["code"], "`$ids`" in error["message"]) == ("BAD_USER_INPUT", True)
        await socket.subscribe("1", ME)
        assert (await socket.hear())["type"] == "next"


async def test_lists_as_long_as_any_action_takes_are_read(one_house: Stage) -> None:
    members = [{"subject": str(n), "email": f"{n}@acme.example", "name": "N", "role": "MEMBER"} for n in range(1_000)]
    account = {"reference": "large", "name": "Large", "planCode": "premium", "members": members}
    done = await one_house.do(HOST, "syncAccounts", accounts=[account])
    assert done["__typename"] == "SyncAccountsSuccess"


# ------------------------------------------------------------------------------------------------------ new documents


def numbered(number: int, size: int = 0) -> str:
    return f"query Q{number} {{ plans {{ code }} }}".ljust(size)


async def test_documents_that_are_new_are_limited_and_those_that_are_known_are_not(one_house: Stage) -> None:
    async with limited(one_house, 3) as house:
        token = house.token(ALICE)
        known = [await house.post(numbered(number), token=token) for number in range(3)]
        refused = await house.post(numbered(3), token=token)
        again = [await house.post(numbered(number), token=token) for number in range(3)]
        other = await house.post(numbered(3), token=house.token(CAROL))
        by_now = await house.post(numbered(3), token=token)
    assert [one.json() for one in known] == [one.json() for one in again]
    assert ["errors" in one.json() for one in (*known, *again, other, by_now)] == [False] * 8
    assert refused.status_code == 429
    seconds = int(refused.headers["retry-after"])
    assert refusal(refused) == {"code": "RATE_LIMITED", "retryAfter": seconds}
    assert 0 < seconds <= 20
    assert f"{seconds} second" in refused.json()["errors"][0]["message"]


@pytest.mark.parametrize("query", ["{ unknown%d }", "{ syntax%d", "query Q%d { plans(a: [}"])
async def test_documents_that_are_invalid_count_as_well(one_house: Stage, query: str) -> None:
    async with limited(one_house, 2) as house:
        answers = [await house.post(query % number, token=house.token(ALICE)) for number in (0, 1, 1, 2, 0)]
    assert [refusal(answer)["code"] == "RATE_LIMITED" for answer in answers] == [False, False, False, True, False]


async def test_a_document_that_is_refused_is_not_prepared(one_house: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async with limited(one_house, 1) as house:
        await house.post(numbered(0), token=house.token(ALICE))
        monkeypatch.setattr(documents, "parse", None)
        refused = await house.post(numbered(1), token=house.token(ALICE))
    assert refused.status_code == 429


@pytest.mark.parametrize(
    "query",
    [
        "{ __schema { queryType { name } } }",
        '{ plans { code } ...F } fragment F on Query { ... { x: __type(name: "A") { name } } }',
    ],
)
async def test_what_asks_for_the_schema_counts_each_time(one_house: Stage, query: str) -> None:
    """It takes long to execute, and not to read."""
    async with limited(one_house, 3) as house:
        token = house.token(ALICE)
        answers = [await house.post(query, token=token) for _ in range(4)]
        await house.post(numbered(0), token=house.token(CAROL))
        other = await house.post(numbered(0), token=token)
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert refusal(answers[-1])["code"] == "RATE_LIMITED"
    assert (other.status_code, "errors" in other.json()) == (200, False), "what does not ask for it is served"


async def test_what_is_told_of_the_types_of_events_is_made_once(
    one_house: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = "{" + " ".join(f"a{n}: eventTypes {{ type description example jsonSchema }}" for n in range(50)) + "}"
    first = await one_house.ask(ALICE, query)
    for name in ("example", "schema"):
        monkeypatch.setattr(events, name, None)
    assert await one_house.ask(ALICE, query) == first
    told = list(first["data"].values())
    assert "errors" not in first
    assert all(one == told[0] for one in told)


# ------------------------------------------------------------------------------------------------- what errors repeat


@pytest.mark.parametrize(
    "query",
    [
        "{ " + "x" * 40_000 + " }",
        "{ accounts(filter: {planCodes: " + "x" * 40_000 + "}) { edges { cursor } } }",
        "{ accounts(filter: {a: 1 b: 1 c: 1 d: 1 e: 1 f: "
        + "[" * 8
        + "1 " * 1_800
        + "]" * 8
        + "}) { edges { cursor } } }",
        '{ accounts(filter: {a: 1 b: 1 c: "' + "x" * 40_000 + '"}) { edges { cursor } } }',
        "{ plans { code @skip(if: [" + "1 " * 1_900 + "]) } }",
        "{ " + "x" * 20_000 + ": plans { code } " + "x" * 20_000 + ": viewer { __typename } }",
    ],
)
async def test_errors_repeat_little_of_a_document(one_house: Stage, query: str) -> None:
    answer = await one_house.post(query, token=one_house.token(ALICE))
    told = answer.json()["errors"]
    assert {error["extensions"]["code"] for error in told} == {"GRAPHQL_VALIDATION_FAILED"}
    assert all(len(error["message"]) <= 500 for error in told)
    assert len(answer.content) < 5_000


async def test_errors_repeat_little_of_variables(one_house: Stage) -> None:
    long = "x" * 100_000
    given: list[Any] = [long, {"statuses": [long]}, {long: 1}, {"statuses": {long: []}}]
    for value in given:
        answer = await one_house.post(SEARCH, {"filter": value}, token=one_house.token(BILLING))
        assert answer.json()["errors"][0]["extensions"]["code"] == "BAD_USER_INPUT"
        assert len(answer.content) < 5_000


async def test_long_documents_count_for_several(one_house: Stage) -> None:
    async with limited(one_house, 10) as house:
        token = house.token(ALICE)
        first = await house.post(numbered(0, 5_999), token=token)
        second = await house.post(numbered(1, 5_999), token=token)
        third = await house.post(numbered(2, 3_999), token=token)
        huge = await house.post(numbered(3, 49_000), token=house.token(CAROL))
    assert [answer.status_code for answer in (first, second, third, huge)] == [200, 429, 200, 200]


async def test_each_link_has_an_allowance_of_its_own(one_house: Stage) -> None:
    """Who has got hold of one of her links cannot keep Alice, or her other links, from being served."""
    async with limited(one_house, 1) as house:
        links = [await link(house, ALICE, "acme") for _ in range(2)]
        tokens = [links[0], links[0], links[1], house.token(ALICE)]
        answers = [await house.post(numbered(number), token=token) for number, token in enumerate(tokens)]
    assert [answer.status_code for answer in answers] == [200, 429, 200, 200]


async def test_on_a_socket_a_new_document_too_many_ends_its_operation_alone(one_house: Stage) -> None:
    async with limited(one_house, 1) as house, serving(house.app, house.installation.changes) as served:
        async with begun(served, house.token(ALICE)) as socket:
            await _answered(socket, numbered(0))
            await socket.subscribe("1", numbered(1))
            error = await socket.error()
            assert error["extensions"].keys() == {"code", "retryAfter"}
            assert error["extensions"]["code"] == "RATE_LIMITED"
            await _answered(socket, numbered(0))
        refused = await house.post(numbered(2), token=house.token(ALICE))
    assert refused.status_code == 429, "it is the same allowance, however they come"


async def _answered(socket: Socket, query: str) -> None:
    await socket.subscribe("1", query)
    assert [(await socket.hear())["type"] for _ in range(2)] == ["next", "complete"]


class TestAllowance:
    """By a clock of the test's own."""

    def allowance(self, per_minute: int) -> Allowance:
        self.now = 1_000.0
        return Allowance(per_minute, lambda: self.now)

    def spent(self, allowance: Allowance, units: int = 1, caller: str = "a") -> bool:
        try:
            allowance.spend(caller, units)
        except errors.RateLimited:
            return False
        return True

    @pytest.mark.parametrize("per_minute", [1, 3, 7, 59, 61, 120])
    def test_a_minutes_number_at_once_and_then_one_by_one(self, per_minute: int) -> None:
        allowance = self.allowance(per_minute)
        assert [self.spent(allowance) for _ in range(per_minute + 2)] == [True] * per_minute + [False] * 2
        self.now += 60 / per_minute
        assert [self.spent(allowance), self.spent(allowance)] == [True, False]
        self.now += 60
        assert [self.spent(allowance) for _ in range(per_minute + 1)] == [True] * per_minute + [False]

    def test_after_the_seconds_that_are_told_it_is_let_through(self) -> None:
        allowance = self.allowance(10)
        assert self.spent(allowance, 9)
        with pytest.raises(errors.RateLimited) as refused:
            allowance.spend("a", 4)
        assert refused.value.retry_after == 18
        self.now += 18
        assert self.spent(allowance, 4)

    def test_what_is_refused_uses_nothing_and_what_is_more_than_everything_costs_everything(self) -> None:
        allowance = self.allowance(5)
        assert self.spent(allowance, 3)
        assert not self.spent(allowance, 1_000)
        assert self.spent(allowance, 2)
        self.now += 60
        assert self.spent(allowance, 1_000)
        assert not self.spent(allowance, 1)

    def test_callers_have_their_own_and_the_longest_idle_are_forgotten(self) -> None:
        allowance = self.allowance(1)
        for number in range(30_000):
            assert self.spent(allowance, caller=f"caller {number}")
        assert not self.spent(allowance, caller="caller 29999")
        assert not self.spent(allowance, caller="caller 25000")
        assert self.spent(allowance, caller="caller 0")

    def test_none_is_no_limit(self) -> None:
        allowance = self.allowance(0)
        assert all(self.spent(allowance) for _ in range(1_000))
