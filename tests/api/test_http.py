"""The HTTP table of the endpoint, row by row, on a toy schema behind the real Starlette routing."""

import itertools
import json
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, NewType

import httpx2
import pytest
import strawberry
import structlog
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send
from strawberry.schema.config import StrawberryConfig
from structlog.testing import capture_logs

from app import errors
from app.graphql import scalars
from app.graphql.execution import Operations
from app.graphql.http import GraphQLEndpoint
from app.graphql.limits import Budget, Limits
from app.graphql.places import Places

JSON = "application/json"
GRAPHQL_JSON = "application/graphql-response+json"
DSN = "postgres://sunset:hunter2@db.internal/sunset"


class Refused(errors.Refusal):
    """A refusal that Strawberry's exception handlers turn into data."""


@dataclass
class Caller:
    """The context of the toy schema: who asks, and what was asked of it."""

    authorization: str
    gated: list[str] = field(default_factory=list)


@strawberry.interface
class Named:
    name: str


@strawberry.type
class Thing(Named):
    """With an interface, graphql-core checks what resolvers return, and complains with its repr."""


@strawberry.type
class RefusedError:
    message: str


class RefusedHandler(strawberry.ExceptionHandler[Refused, RefusedError]):
    """What the application's central mapping of refusals looks like to Strawberry."""

    def handle(self, exception: Refused, *, field: object, info: object) -> RefusedError:
        return RefusedError(message=exception.message)


def picky(value: str) -> str:
    """How scalars fail that write no words for clients."""
    raise ValueError(DSN) if value == "refused" else RuntimeError(DSN)


Picky = NewType("Picky", str)


@strawberry.input
class Filter:
    name: str
    nick: strawberry.Maybe[str]


@strawberry.input(one_of=True)
class Either:
    one: int | None = strawberry.UNSET
    other: int | None = strawberry.UNSET


@strawberry.type
class Query:
    @strawberry.field
    def filtered(self, filter: Filter) -> str:  # noqa: A002
        return filter.name

    @strawberry.field
    def either(self, which: Either) -> str:
        return "ok"

    @strawberry.field
    def picky(self, value: Picky) -> str:
        return value

    @strawberry.field
    def wrong_object(self) -> Thing | None:
        return DSN  # type: ignore[return-value]

    @strawberry.field
    def echo(self, text: str) -> str:
        return text

    @strawberry.field
    def required(self, first: int = 1) -> int:
        return first

    @strawberry.field
    def at(self, instant: datetime) -> datetime:
        return instant

    @strawberry.field
    def operation(self, info: strawberry.Info[Caller, None]) -> str:
        operation = info._raw_info.operation
        assert operation.name is not None
        return f"{operation.operation.value} {operation.name.value}"

    @strawberry.field
    def fails(self) -> str | None:
        raise RuntimeError(f"could not connect to {DSN}")

    @strawberry.field
    async def fails_async(self) -> str | None:
        raise RuntimeError(f"could not connect to {DSN}")

    @strawberry.field
    def fails_twice(self) -> list[Thing | None]:
        failure = RuntimeError(DSN)
        return [failure, failure]  # type: ignore[list-item]  # graphql-core raises what a resolver returns

    @strawberry.field
    def wrong_type(self) -> int:
        return DSN  # type: ignore[return-value]

    @strawberry.field
    def null(self) -> str:
        return None  # type: ignore[return-value]

    @strawberry.field
    def raw_error(self) -> str | None:
        raise strawberry.exceptions.StrawberryGraphQLError(DSN)

    @strawberry.field
    def forbidden(self) -> str | None:
        raise errors.Forbidden("Only the billing team sees this.", since=datetime(2026, 1, 2, tzinfo=UTC))

    @strawberry.field
    def unavailable(self) -> str | None:
        raise errors.Unavailable("The database cannot be reached.")


@strawberry.type
class Mutation:
    @strawberry.mutation
    def touch(self, name: str) -> Thing | RefusedError:
        if name == "no":
            raise Refused("Not this one.")
        return Thing(name=name)


schema = strawberry.Schema(
    Query,
    Mutation,
    config=StrawberryConfig(scalar_map={**scalars.SCALARS, Picky: strawberry.scalar(name="Picky", parse_value=picky)}),
    exception_handlers=[RefusedHandler()],
)


async def context(authorization: str) -> Caller:
    """Tokens are words here."""
    match authorization:
        case "" | "Bearer stale":
            raise errors.Unauthenticated("Send a valid token.")
        case "Bearer removed":
            raise errors.AccessRemoved("Canceled.", canceledAt=datetime(2026, 1, 2, 3, 4, 5, 678_999, tzinfo=UTC))
        case "Bearer offline":
            raise errors.Unavailable("The database cannot be reached.")
        case "Bearer broken":
            raise RuntimeError(DSN)
    return Caller(authorization)


async def gate(caller: Caller) -> None:
    if caller.authorization == "Bearer canceled":
        raise errors.AccessRemoved("Canceled.")


LIMITS = Limits(request=Budget(body_bytes=20_000, values=8_000))
PLACES = 3


@pytest.fixture
def endpoint() -> GraphQLEndpoint[Caller]:
    return GraphQLEndpoint(
        Operations(schema, gate=gate, limits=LIMITS),
        context=context,
        who=attrgetter("authorization"),
        streams=Places(PLACES, most_each=PLACES),
    )


def served(endpoint: GraphQLEndpoint[Caller]) -> Starlette:
    return Starlette(routes=[Route("/graphql", endpoint)])


@pytest.fixture
def client(endpoint: GraphQLEndpoint[Caller]) -> Iterator[TestClient]:
    with TestClient(served(endpoint), headers={"Authorization": "Bearer alice"}) as client:
        yield client


def ask(client: TestClient, query: str, *, accept: str = GRAPHQL_JSON, **more: Any) -> httpx2.Response:
    return client.post("/graphql", json={"query": query, **more}, headers={"Accept": accept})


def code(response: httpx2.Response) -> str:
    """The one error's code, after checking that the answer has GraphQL's error form."""
    [error] = errors_of(response)
    found = error["extensions"]["code"]
    assert isinstance(found, str)
    return found


def errors_of(response: httpx2.Response) -> list[dict[str, Any]]:
    body = response.json()
    assert body["errors"], body
    for error in body["errors"]:
        assert isinstance(error["message"], str)
        assert error["message"]
        assert error["extensions"]["code"].isupper()
    found: list[dict[str, Any]] = body["errors"]
    return found


class TestExecuted:
    @pytest.mark.parametrize(
        ("accept", "media_type"),
        [
            (GRAPHQL_JSON, GRAPHQL_JSON),
            (f"{GRAPHQL_JSON}, {JSON};q=0.9", GRAPHQL_JSON),
            (f"{GRAPHQL_JSON};charset=utf-8, {JSON}", GRAPHQL_JSON),
            (GRAPHQL_JSON.upper(), GRAPHQL_JSON),
            (f"text/event-stream, {GRAPHQL_JSON}", GRAPHQL_JSON),
            (f"{GRAPHQL_JSON};q=0, {JSON}", JSON),
            (f"{GRAPHQL_JSON};q=0.5, {JSON};q=0.6", JSON),
            (f"{GRAPHQL_JSON};q=nonsense", JSON),
            (JSON, JSON),
            ("*/*", JSON),
            ("", JSON),
        ],
    )
    def test_is_200_in_the_media_type_that_was_asked_for(
        self, client: TestClient, accept: str, media_type: str
    ) -> None:
        response = ask(client, '{ echo(text: "hé") }', accept=accept)

        assert (response.status_code, response.json()) == (200, {"data": {"echo": "hé"}})
        assert response.headers["content-type"] == f"{media_type}; charset=utf-8"

    def test_without_accept_is_plain_json(self, client: TestClient) -> None:
        del client.headers["accept"]

        response = client.post("/graphql", json={"query": "{ required }"})

        assert (response.status_code, response.headers["content-type"]) == (200, "application/json; charset=utf-8")

    @pytest.mark.parametrize("accept", [JSON, GRAPHQL_JSON])
    def test_with_a_failed_field_is_still_200(self, client: TestClient, accept: str) -> None:
        response = ask(client, "{ required forbidden }", accept=accept)

        assert response.status_code == 200
        assert response.json()["data"] == {"required": 1, "forbidden": None}

    def test_by_get_with_variables_and_name(self, client: TestClient) -> None:
        query = "query A($t: String!) { echo(text: $t) } query B { operation }"

        one = client.get("/graphql", params={"query": query, "variables": '{"t": "a+b é"}', "operationName": "A"})
        other = client.get("/graphql", params={"query": query, "operationName": "B"})

        assert one.json() == {"data": {"echo": "a+b é"}}
        assert other.json() == {"data": {"operation": "query B"}}

    def test_by_get_an_empty_operation_name_is_none(self, client: TestClient) -> None:
        response = client.get("/graphql", params={"query": "query Only { operation }", "operationName": ""})

        assert response.json() == {"data": {"operation": "query Only"}}

    def test_refusals_become_data_through_strawberrys_exception_handlers(self, client: TestClient) -> None:
        mutation = "mutation ($n: String!) { touch(name: $n) { __typename ... on RefusedError { message } } }"

        response = ask(client, mutation, variables={"n": "no"})

        assert response.json() == {"data": {"touch": {"__typename": "RefusedError", "message": "Not this one."}}}

    def test_times_are_read_and_shown_by_the_scalar(self, client: TestClient) -> None:
        response = ask(
            client, "query ($t: DateTime!) { at(instant: $t) }", variables={"t": "2026-01-02T03:04:05.678912+02:00"}
        )

        assert response.json() == {"data": {"at": "2026-01-02T01:04:05.678Z"}}

    def test_answers_are_not_stored_by_caches(self, client: TestClient) -> None:
        assert ask(client, "{ required }").headers["cache-control"] == "no-store"


class TestNotExecuted:
    """Parse, validation, coercion, unknown or ambiguous operation: 400, or 200 for `application/json`; never `data`."""

    CASES = (
        ({"query": "{ echo("}, "GRAPHQL_PARSE_FAILED"),
        ({"query": ""}, "GRAPHQL_PARSE_FAILED"),
        ({"query": "{ required { } }"}, "GRAPHQL_PARSE_FAILED"),
        ({"query": "{ unknown }"}, "GRAPHQL_VALIDATION_FAILED"),
        ({"query": "{ echo }"}, "GRAPHQL_VALIDATION_FAILED"),
        ({"query": '{ at(instant: "2026-01-02") }'}, "GRAPHQL_VALIDATION_FAILED"),
        ({"query": "subscription { x }"}, "GRAPHQL_VALIDATION_FAILED"),
        ({"query": "type A { b: Int }"}, "GRAPHQL_VALIDATION_FAILED"),
        ({"query": "query ($t: String!) { echo(text: $t) }"}, "BAD_USER_INPUT"),
        ({"query": "query ($t: String!) { echo(text: $t) }", "variables": {"t": 1}}, "BAD_USER_INPUT"),
        (
            {"query": "query ($t: DateTime!) { at(instant: $t) }", "variables": {"t": "2026-01-02T00:00:00"}},
            "BAD_USER_INPUT",
        ),
        ({"query": "query ($n: Int!) { required(first: $n) }", "variables": {"n": 2**80}}, "BAD_USER_INPUT"),
        ({"query": "{ required(first: " + "9" * 5000 + ") }"}, "GRAPHQL_VALIDATION_FAILED"),
        (
            {"query": "query ($f: Filter!) { filtered(filter: $f) }", "variables": {"f": {"nam": "x", "name": "y"}}},
            "BAD_USER_INPUT",
        ),
        ({"query": "query ($e: Either!) { either(which: $e) }", "variables": {"e": {}}}, "BAD_USER_INPUT"),
        ({"query": "query ($e: Either!) { either(which: $e) }", "variables": {"e": {"one": None}}}, "BAD_USER_INPUT"),
        ({"query": "{ either(which: {one: 1, other: 2}) }"}, "GRAPHQL_VALIDATION_FAILED"),
        ({"query": '{ picky(value: "refused") }'}, "GRAPHQL_VALIDATION_FAILED"),
        ({"query": '{ picky(value: "breaks") }'}, "GRAPHQL_VALIDATION_FAILED"),
        ({"query": "query ($v: Picky!) { picky(value: $v) }", "variables": {"v": "refused"}}, "BAD_USER_INPUT"),
        ({"query": "query ($v: Picky!) { picky(value: $v) }", "variables": {"v": "breaks"}}, "INTERNAL_SERVER_ERROR"),
        ({"query": "{ required }", "operationName": "X"}, "BAD_USER_INPUT"),
        ({"query": "query A { required } query B { required }"}, "BAD_USER_INPUT"),
        ({"query": "query A { required } query B { required }", "operationName": "C"}, "BAD_USER_INPUT"),
        ({"query": 'query { echo(text: "\\u0000") }'}, "BAD_USER_INPUT"),
        ({"query": 'query { echo(text: "\\ud800") }'}, "GRAPHQL_PARSE_FAILED"),
        ({"query": "fragment F on Query { required }"}, "GRAPHQL_VALIDATION_FAILED"),
    )

    @pytest.mark.parametrize(("body", "expected"), CASES)
    @pytest.mark.parametrize(("accept", "status"), [(GRAPHQL_JSON, 400), (JSON, 200)])
    def test_is_told_with_a_code_and_without_data(
        self, client: TestClient, body: dict[str, Any], expected: str, accept: str, status: int
    ) -> None:
        response = client.post("/graphql", json=body, headers={"Accept": accept})

        assert (response.status_code, code(response)) == (status, expected)
        assert "data" not in response.json()
        assert "hunter2" not in response.text

    def test_two_anonymous_operations_are_invalid_and_none_runs(self, client: TestClient) -> None:
        response = ask(client, 'mutation { touch(name: "a") { __typename } } { required }')

        assert response.status_code == 400
        assert {error["extensions"]["code"] for error in errors_of(response)} == {"GRAPHQL_VALIDATION_FAILED"}

    def test_at_most_five_validation_errors_are_told(self, client: TestClient) -> None:
        response = ask(client, "{" + " ".join(f"x{i}" for i in range(50)) + "}")

        assert len(errors_of(response)) == 5

    def test_at_most_five_coercion_errors_are_told(self, client: TestClient) -> None:
        declared = ", ".join(f"$v{i}: Int!" for i in range(20))
        used = " ".join(f"a{i}: required(first: $v{i})" for i in range(20))

        response = ask(client, f"query ({declared}) {{ {used} }}", variables={f"v{i}": "x" for i in range(20)})

        assert len(errors_of(response)) == 5

    @pytest.mark.parametrize(
        ("query", "variables"),
        [
            ("query ($f: Filter!) { filtered(filter: $f) }", {"f": {"nam": "x", "name": "y"}}),
            ("{ ech }", {}),
            ('{ echo(txt: 1, text: "") }', {}),
            ("query ($t: Strin!) { echo(text: $t) }", {"t": ""}),
            ("{ touch }", {}),
        ],
    )
    def test_nothing_is_suggested(self, client: TestClient, query: str, variables: dict[str, Any]) -> None:
        assert "did you mean" not in ask(client, query, variables=variables).text.lower()

    def test_a_null_for_an_argument_with_a_default_is_told_at_its_field(self, client: TestClient) -> None:
        response = ask(client, "query ($n: Int) { required(first: $n) }", variables={"n": None})

        assert response.status_code == 200
        assert code(response) == "BAD_USER_INPUT"
        assert errors_of(response)[0]["path"] == ["required"]

    def test_a_null_that_strawberry_refuses_is_told_without_python(self, client: TestClient) -> None:
        response = ask(client, '{ filtered(filter: {name: "x", nick: null}) }')

        assert code(response) == "BAD_USER_INPUT"
        assert "Maybe" not in response.text

    @pytest.mark.parametrize(("value", "logged"), [("refused", 0), ("breaks", 1)])
    def test_of_values_only_failures_of_ours_are_logged(self, client: TestClient, value: str, logged: int) -> None:
        with capture_logs() as logs:
            ask(client, "query ($v: Picky!) { picky(value: $v) }", variables={"v": value})
            by_variable = len(logs)
            ask(client, f'{{ picky(value: "{value}") }}')

        assert [by_variable, len(logs) - by_variable] == [logged, logged]


class TestMalformed:
    BODIES = (
        b"",
        b"{",
        b"nonsense",
        b'"{ required }"',
        b"1",
        b"null",
        b"true",
        b"[]",
        b'[{"query": "{ required }"}]',
        b"{}",
        b'{"query": null}',
        b'{"query": 1}',
        b'{"query": ["{ required }"]}',
        b'{"query": "{ required }", "operationName": 1}',
        b'{"query": "{ required }", "variables": []}',
        b'{"query": "{ required }", "variables": "{}"}',
        b'{"query": "{ required }", "extensions": 1}',
        b'{"query": "{ required }", "variables": {"a": NaN}}',
        b'{"query": "{ required }", "variables": {"a": 1e999}}',
        b'{"query": "{ \xff }"}',
        b'{"query": "{ \xed\xa0\x80 }"}',
        b'{"query": "\\ud800"}',
        b'{"query": "{ required }\\u0000"}',
        b'{"query": "{ required }", "operationName": "\\u0000"}',
        b'{"query": "{ required }", "variables": {"a": ["\\u0000"]}}',
        b'{"query": "{ required }", "variables": {"\\u0000": 1}}',
        b'{"query": "{ required }", "variables": {"a": ' + b"[" * 40 + b"]" * 40 + b"}}",
        b"[" * 9000 + b"]" * 9000,
        b'{"a":' * 3000 + b"1" + b"}" * 3000,
        '{"query": "{ required }"}'.encode("utf-16"),
        b'\xef\xbb\xbf{"query": "{ required }"}',
    )

    @pytest.mark.parametrize("body", BODIES)
    @pytest.mark.parametrize("accept", [GRAPHQL_JSON, JSON])
    def test_is_400_whatever_is_accepted(self, client: TestClient, body: bytes, accept: str) -> None:
        response = client.post("/graphql", content=body, headers={"Accept": accept, "Content-Type": JSON})

        assert (response.status_code, code(response)) == (400, "BAD_USER_INPUT")
        assert "data" not in response.json()

    @pytest.mark.parametrize(
        "query_string",
        [
            "",
            "query=%7Brequired%7D&variables=%7B",
            "query=%7Brequired%7D&variables=[]",
            "query=%7Brequired%7D&variables=",
            "query=%7Brequired%7D&variables=%22%22",
            "query=%7Brequired%7D&query=%7Brequired%7D",
            "query=%7Brequired%7D%00",
            "query=%7Brequired%7D%FF",
            "query=%7Brequired%7D%ED%A0%80",
            "query=%7Brequired%7D&variables=%7B%22a%22%3A%22%5Cu0000%22%7D",
            "&".join(f"a{i}=" for i in range(1000)),
        ],
    )
    def test_query_string_is_400(self, client: TestClient, query_string: str) -> None:
        response = client.get(f"/graphql?{query_string}")

        assert (response.status_code, code(response)) == (400, "BAD_USER_INPUT")
        assert "data" not in response.json()

    def test_an_escaped_backslash_before_u0000_is_only_text(self, client: TestClient) -> None:
        response = ask(client, "query ($t: String!) { echo(text: $t) }", variables={"t": "\\u0000"})

        assert response.json() == {"data": {"echo": "\\u0000"}}


class TestRefusedByHttp:
    """The same for every Accept."""

    @pytest.mark.parametrize("accept", [GRAPHQL_JSON, JSON])
    @pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
    def test_other_methods_are_405(self, client: TestClient, method: str, accept: str) -> None:
        response = client.request(method, "/graphql", headers={"Accept": accept})

        assert (response.status_code, code(response)) == (405, "BAD_USER_INPUT")
        assert response.headers["allow"] == "GET, POST"

    @pytest.mark.parametrize("accept", [GRAPHQL_JSON, JSON])
    def test_a_mutation_by_get_is_405_and_does_not_run(self, client: TestClient, accept: str) -> None:
        query = 'mutation A { touch(name: "a") { __typename } } query B { required }'

        mutation = client.get("/graphql", params={"query": query, "operationName": "A"}, headers={"Accept": accept})
        same_document = client.get("/graphql", params={"query": query, "operationName": "B"})

        assert (mutation.status_code, mutation.headers["allow"], code(mutation)) == (405, "POST", "BAD_USER_INPUT")
        assert same_document.json() == {"data": {"required": 1}}

    @pytest.mark.parametrize("accept", [GRAPHQL_JSON, JSON])
    @pytest.mark.parametrize(
        "content_type",
        [
            None,
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "application/graphql",
            "application/jsonp",
            "application/json; charset=utf-16",
            "application/json, text/plain",
        ],
    )
    def test_other_content_types_are_415(self, client: TestClient, content_type: str | None, accept: str) -> None:
        headers = {"Accept": accept} | ({"Content-Type": content_type} if content_type else {})

        response = client.post("/graphql", content=b'{"query": "{ required }"}', headers=headers)

        assert (response.status_code, code(response)) == (415, "BAD_USER_INPUT")

    def test_two_content_types_are_415(self, client: TestClient) -> None:
        headers = [("Content-Type", JSON), ("Content-Type", "text/plain")]

        assert client.post("/graphql", content=b'{"query": "{ required }"}', headers=headers).status_code == 415

    def test_compressed_bodies_are_415(self, client: TestClient) -> None:
        response = client.post("/graphql", json={"query": "{ required }"}, headers={"Content-Encoding": "gzip"})

        assert response.status_code == 415

    @pytest.mark.parametrize("content_type", ["application/json;charset=UTF-8", 'Application/JSON; charset="utf-8"'])
    def test_json_in_utf_8_is_accepted_however_it_is_written(self, client: TestClient, content_type: str) -> None:
        response = client.post("/graphql", content=b'{"query": "{ required }"}', headers={"Content-Type": content_type})

        assert response.json() == {"data": {"required": 1}}

    @pytest.mark.parametrize("accept", [GRAPHQL_JSON, JSON])
    @pytest.mark.parametrize("declared", ["20001", "9" * 5_000])
    def test_a_body_that_is_declared_too_large_is_413_unread(
        self, client: TestClient, accept: str, declared: str
    ) -> None:
        response = client.post(
            "/graphql", content=b"{}", headers={"Accept": accept, "Content-Type": JSON, "Content-Length": declared}
        )

        assert (response.status_code, code(response)) == (413, "PAYLOAD_TOO_LARGE")

    @pytest.mark.parametrize("declared", [{}, {"Content-Length": "10"}])
    async def test_reading_stops_at_the_limit_whatever_is_declared(
        self, endpoint: GraphQLEndpoint[Caller], declared: dict[str, str]
    ) -> None:
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 1000
                yield b" " * 1000

        headers = {"Authorization": "Bearer alice", "Content-Type": JSON, **declared}
        chunks = endless()
        async with calling(served(endpoint)) as client:
            response = await client.post("/graphql", content=chunks, headers=headers)

        assert (response.status_code, code(response)) == (413, "PAYLOAD_TOO_LARGE")
        assert sent <= LIMITS.request.body_bytes + 2000

    def test_a_query_string_over_the_limit_is_413(self, client: TestClient) -> None:
        response = client.get("/graphql?query=" + "x" * LIMITS.request.body_bytes)

        assert (response.status_code, code(response)) == (413, "PAYLOAD_TOO_LARGE")


class TestRefusedByTheContext:
    @pytest.mark.parametrize("accept", [GRAPHQL_JSON, JSON])
    def test_without_a_token_is_401_and_asks_for_one(self, client: TestClient, accept: str) -> None:
        del client.headers["authorization"]

        response = ask(client, "{ required }", accept=accept)

        assert (response.status_code, code(response)) == (401, "UNAUTHENTICATED")
        assert response.headers["www-authenticate"] == "Bearer"
        assert "data" not in response.json()

    @pytest.mark.parametrize("accept", [GRAPHQL_JSON, JSON])
    def test_with_a_bad_token_is_401_and_says_so(self, client: TestClient, accept: str) -> None:
        client.headers["authorization"] = "Bearer stale"

        response = ask(client, "{ required }", accept=accept)

        assert (response.status_code, code(response)) == (401, "UNAUTHENTICATED")
        assert response.headers["www-authenticate"] == 'Bearer error="invalid_token"'

    def test_nobody_learns_about_documents_without_a_token(self, client: TestClient) -> None:
        del client.headers["authorization"]

        assert ask(client, "{ unknown(").status_code == 401

    @pytest.mark.parametrize(("accept", "status"), [(GRAPHQL_JSON, 403), (JSON, 200)])
    def test_other_refusals_have_their_status(self, client: TestClient, accept: str, status: int) -> None:
        client.headers["authorization"] = "Bearer removed"

        response = ask(client, "{ required }", accept=accept)

        assert (response.status_code, code(response)) == (status, "ACCESS_REMOVED")
        assert "data" not in response.json()
        assert errors_of(response)[0]["extensions"]["canceledAt"] == "2026-01-02T03:04:05.678Z"

    @pytest.mark.parametrize("accept", [GRAPHQL_JSON, JSON])
    def test_without_its_database_is_503_with_retry_after(self, client: TestClient, accept: str) -> None:
        client.headers["authorization"] = "Bearer offline"

        response = ask(client, "{ required }", accept=accept)

        assert (response.status_code, code(response)) == (503, "SERVICE_UNAVAILABLE")
        assert int(response.headers["retry-after"]) > 0

    def test_a_failure_is_masked_and_logged(self, client: TestClient) -> None:
        client.headers["authorization"] = "Bearer broken"

        with capture_logs() as logs:
            response = ask(client, "{ required }")

        assert (response.status_code, code(response)) == (500, "INTERNAL_SERVER_ERROR")
        assert DSN not in response.text
        assert [str(entry["exc_info"]) for entry in logs] == [DSN]


class TestGate:
    """Operations that no resolver checks are checked before they run."""

    @pytest.mark.parametrize(
        "query",
        [
            "{ __typename }",
            "{ __schema { queryType { name } } }",
            '{ required __type(name: "Query") { name } }',
            "{ required @skip(if: true) }",
            "query ($no: Boolean = false) { ... @include(if: $no) { required } }",
            "{ ...F @skip(if: true) } fragment F on Query { required }",
            "{ ...F } fragment F on Query { __typename ... { __schema { description } } }",
            "mutation { __typename }",
        ],
    )
    @pytest.mark.parametrize(("accept", "status"), [(GRAPHQL_JSON, 403), (JSON, 200)])
    def test_refuses_what_no_resolver_would(self, client: TestClient, query: str, accept: str, status: int) -> None:
        client.headers["authorization"] = "Bearer canceled"

        response = ask(client, query, accept=accept)

        assert (response.status_code, code(response)) == (status, "ACCESS_REMOVED")
        assert "data" not in response.json()

    @pytest.mark.parametrize(
        "query", ["{ required }", "{ __typename ...F } fragment F on Query { ... { a: required } }"]
    )
    def test_is_not_asked_where_a_resolver_decides(self, client: TestClient, query: str) -> None:
        client.headers["authorization"] = "Bearer canceled"

        assert ask(client, query).status_code == 200

    def test_lets_others_introspect(self, client: TestClient) -> None:
        response = ask(client, "{ __schema { queryType { name } } }")

        assert response.json() == {"data": {"__schema": {"queryType": {"name": "Query"}}}}


HUGE_NUMBER = {"query": "{ required(first: " + "9" * 5_000 + ") }"}


class TestMasking:
    @pytest.mark.parametrize("query", ["fails", "failsAsync", "wrongType", "wrongObject", "null", "rawError"])
    def test_shows_no_failure_and_logs_it_whole_with_the_request_id(self, client: TestClient, query: str) -> None:
        with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
            response = ask(client, f"query Q {{ {query} {'{ name }' if query == 'wrongObject' else ''} }}")

        [error] = errors_of(response)
        assert error["extensions"] == {
            "code": "INTERNAL_SERVER_ERROR",
            "requestId": response.headers["x-request-id"],
        }
        assert error["path"] == [query]
        assert "hunter2" not in response.text
        [entry] = logs
        assert (entry["log_level"], entry["operation"]) == ("error", "Q")
        assert entry["request_id"] == response.headers["x-request-id"]
        assert isinstance(entry["exc_info"], Exception)

    def test_logs_one_failure_of_several_fields_once(self, client: TestClient) -> None:
        with capture_logs() as logs:
            response = ask(client, "{ failsTwice { name } }")

        assert len(errors_of(response)) == 2
        assert len(logs) == 1

    def test_shows_what_was_written_for_clients(self, client: TestClient) -> None:
        response = ask(client, "{ forbidden }")

        [error] = errors_of(response)
        assert error == {
            "message": "Only the billing team sees this.",
            "locations": [{"line": 1, "column": 3}],
            "path": ["forbidden"],
            "extensions": {"code": "FORBIDDEN", "since": "2026-01-02T00:00:00.000Z"},
        }

    @pytest.mark.parametrize("body", [{"query": "{"}, {"query": "{ x }"}, {"query": "{ forbidden }"}, {}, HUGE_NUMBER])
    def test_does_not_log_what_clients_do_wrong_as_errors(self, client: TestClient, body: dict[str, str]) -> None:
        with capture_logs() as logs:
            client.post("/graphql", json=body)

        assert [entry for entry in logs if entry["log_level"] in {"error", "critical"}] == []

    @pytest.mark.parametrize("accept", [GRAPHQL_JSON, JSON])
    def test_a_stopped_database_makes_the_whole_answer_503(self, client: TestClient, accept: str) -> None:
        response = ask(client, "{ required unavailable }", accept=accept)

        assert (response.status_code, code(response)) == (503, "SERVICE_UNAVAILABLE")
        assert "data" not in response.json()
        assert "retry-after" in response.headers


class TestRequestId:
    @pytest.mark.parametrize("given", ["abc-123", "0197_a.b:c", "x" * 64])
    def test_takes_over_a_usable_one(self, client: TestClient, given: str) -> None:
        response = client.post("/graphql", json={"query": "{ required }"}, headers={"X-Request-ID": given})

        assert response.headers["x-request-id"] == given

    @pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "<script>", "é"])
    def test_replaces_others(self, client: TestClient, given: str) -> None:
        headers = [(b"X-Request-ID", given.encode("latin-1")), (b"Content-Type", b"application/json")]

        response = client.post("/graphql", content=b'{"query": "{ required }"}', headers=headers)

        assert response.headers["x-request-id"] not in {given, ""}

    def test_is_on_every_answer(self, client: TestClient) -> None:
        assert client.put("/graphql").headers["x-request-id"]
        assert client.post("/graphql", content=b"{").headers["x-request-id"]


def test_a_schema_that_needs_more_than_this_endpoint_is_refused() -> None:
    """Extensions and operation directives would be skipped silently."""
    extended = strawberry.Schema(Mutation, extensions=[strawberry.extensions.SchemaExtension])

    with pytest.raises(ValueError, match="extensions"):
        Operations(extended, gate=gate)


def calling(app: ASGIApp) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://sunset.test")


class TestMutatedBodies:
    """Whatever bytes arrive: JSON in GraphQL's form, never a 5xx."""

    SEEDS = (
        b'{"query": "query A($t: String!, $n: Int) { echo(text: $t) required(first: $n) }", "variables": {"t": "x"}}',
        b'{"query": "{ echo(text: \\"\\\\u0041\\") at(instant: \\"2026-01-02T03:04:05Z\\") }", "operationName": null}',
        b'{"query": "mutation M { touch(name: \\"a\\") { ... on Thing { name } ...F } } fragment F on Thing { name }"}',
        b'{"query": "query A { required } query B @skip(if: true) { a: required(first: 1) }", "operationName": "B"}',
        '{"query": "{ echo(text: \\"\\"\\"blöck 🎈\\"\\"\\") # é\\n }", "extensions": {"a": [1.5e3, {}]}}'.encode(),
    )
    TOKENS = (
        *(b"{", b"}", b"[", b"]", b'"', b"\\", b":", b",", b"\\u0000", b"\\ud800", b"\\udc00", b"\x00", b"\xff"),
        *(
            b"\xed\xa0\x80",
            b"\xf0\x9f",
            b"null",
            b"true",
            b"1e999",
            b"-",
            b"9" * 400,
            b"NaN",
            b'"query"',
            b'"variables"',
        ),
        *(b"query", b"mutation", b"fragment", b"...F", b"on", b"@skip(if: $t)", b"$t", b"!", b"(", b")", b"__schema"),
        *(b"\\n", b"#", b'\\"', b'\\"\\"\\"', b"[" * 50, b"{" * 50, b"\\u{110000}", b"\\u{0}", b"{a:" * 20),
    )

    def mutated(self, chance: random.Random) -> bytes:
        body = bytearray(chance.choice(self.SEEDS))
        for _ in range(chance.choice((1, 1, 2, 3, 8))):
            at = chance.randrange(len(body) + 1)
            match chance.randrange(6):
                case 0:
                    body[at:at] = chance.choice(self.TOKENS)
                case 1:
                    body[at : at + chance.randrange(1, 20)] = chance.choice(self.TOKENS)
                case 2:
                    del body[at : at + chance.randrange(1, 12)]
                case 3:
                    body[at : at + 1] = chance.randbytes(1)
                case 4:
                    body[at:at] = body[at : at + chance.randrange(1, 60)] * chance.randrange(1, 5)
                case 5:
                    other = chance.choice(self.SEEDS)
                    body[at:] = other[chance.randrange(len(other)) :]
        return bytes(body)

    @pytest.mark.parametrize("seed", range(4))
    async def test_never_make_a_5xx(self, endpoint: GraphQLEndpoint[Caller], seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311
        seen = set()
        with capture_logs() as logs:
            async with calling(served(endpoint)) as client:
                for accept, _ in zip(itertools.cycle((GRAPHQL_JSON, JSON)), range(1000)):
                    body = self.mutated(chance)
                    response = await client.post(
                        "/graphql",
                        content=body,
                        headers={"Authorization": "Bearer alice", "Content-Type": JSON, "Accept": accept},
                    )
                    answer = json.loads(response.content)
                    assert response.status_code in {200, 400, 413}, body
                    assert "data" in answer or all(error["extensions"]["code"] for error in answer["errors"]), body
                    seen.add((response.status_code, "data" in answer))

        assert [entry for entry in logs if entry["log_level"] == "error"] == []
        assert seen >= {(200, True), (200, False), (400, False)}

    async def test_in_query_strings_never_make_a_5xx(self, endpoint: GraphQLEndpoint[Caller]) -> None:
        chance = random.Random(5)  # noqa: S311
        seed = b"query=query+A(%24t:String!)%7Becho(text:%24t)%7D&variables=%7B%22t%22:%22%C3%A9%22%7D&operationName=A"
        pieces = (
            b"%",
            b"%00",
            b"%FF",
            b"&",
            b"=",
            b"+",
            b"%7B",
            b"%5Cu0000",
            b"query=",
            b"variables=",
            b"\xe9",
            b"mutation",
        )
        app, raw = served(endpoint), bytearray()

        async def with_raw_query(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "query_string": bytes(raw)}, receive, send)

        async with calling(with_raw_query) as client:
            for _ in range(500):
                raw[:] = seed
                for _ in range(chance.randrange(1, 5)):
                    at = chance.randrange(len(raw))
                    raw[at : at + chance.randrange(6)] = chance.choice(pieces)
                response = await client.get("/graphql", headers={"Authorization": "Bearer alice"})
                assert response.status_code in {200, 400, 405}, bytes(raw)
                assert json.loads(response.content).keys() <= {"data", "errors"}
