"""How much a request may ask for, and what is remembered of it."""

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import strawberry
from graphql import GraphQLSchema, get_introspection_query
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from app.graphql import documents, limits
from app.graphql.documents import Document, Documents, Recent, Rejection
from app.graphql.execution import Operations
from app.graphql.http import GraphQLEndpoint
from app.graphql.limits import Budget, Limits
from app.graphql.places import Places
from app.graphql.schema import SCHEMA

confirmed: list[str] = []


@strawberry.type
class Item:
    name: str = "item"

    @strawberry.field
    def parent(self) -> "Item":
        return Item()

    @strawberry.field
    def items(self, first: int | None = None) -> "list[Item]":
        return [Item()]


@strawberry.type
class Query:
    @strawberry.field
    def item(self) -> Item:
        return Item()

    @strawberry.field
    def items(self, first: int | None = None) -> list[Item]:
        return [Item()]


@strawberry.type
class Mutation:
    @strawberry.mutation
    def confirm(self, token: str) -> bool:
        confirmed.append(token)
        return True


schema = strawberry.Schema(Query, Mutation)
graphql_schema = schema._schema
LIMITS = Limits(
    request=Budget(body_bytes=200_000, values=8_000),
    tokens=12_000,
    query_characters=150_000,
    depth=6,
    fields=60,
    aliases=10,
    directives=4,
    root_mutations=3,
    rows=5_000,
    introspection=1_000,
    overlaps=500,
    spreads=1_900,
)


async def anyone(authorization: str) -> str:
    return authorization


async def allowed(_: str) -> None:
    return None


@pytest.fixture
def client() -> Iterator[TestClient]:
    operations = Operations(schema, gate=allowed, limits=LIMITS)
    endpoint = GraphQLEndpoint(operations, context=anyone, who=str, streams=Places(1, most_each=1))
    with TestClient(Starlette(routes=[Route("/graphql", endpoint)])) as client:
        yield client


def ask(client: TestClient, query: str) -> httpx2.Response:
    return client.post("/graphql", json={"query": query}, headers={"Accept": "application/graphql-response+json"})


def refused_by(response: httpx2.Response) -> str:
    """The limit that the answer names."""
    assert response.status_code == 400
    assert "data" not in response.json()
    [error] = response.json()["errors"]
    assert error["extensions"]["code"] == "OPERATION_TOO_COMPLEX"
    assert str(error["extensions"]["maximum"]) in error["message"]
    limit = error["extensions"]["limit"]
    assert isinstance(limit, str)
    return limit


def bomb(levels: int, spreads: int = 2) -> str:
    """Fragments that each spread the next one several times: the fields grow exponentially with the text."""
    fragments = "".join(f"fragment F{i} on Item{{{f'...F{i + 1} ' * spreads}}}" for i in range(levels))
    return f"{{item{{...F0}}}}{fragments}fragment F{levels} on Item{{name}}"


def spread_side_by_side(number: int) -> str:
    """Fragments in one place, each with a field of its own: the standard rules compare each with each other."""
    fragments = "".join(f"fragment F{i} on Item{{f{i}}}" for i in range(number))
    return f"{{item{{{' '.join(f'...F{i}' for i in range(number))}}}}}{fragments}"


SCHEMA_TYPES = "__schema { types { name fields { name args { name } type { name } } } } "


@pytest.mark.parametrize(
    ("query", "limit"),
    [
        ("{ item " + "{ parent " * 6 + "{ name }" + " }" * 6 + " }", "depth"),
        ("{ item { " + "name " * 60 + "} }", "fields"),
        ("{ item(a: " + "[" * 11 + "1" + "]" * 11 + ") { name } }", "literal_depth"),
        ("{ item(a: " + "{a:[" * 6 + "1" + "]}" * 6 + ") { name } }", "literal_depth"),
        ("query ($a: Int = " + "[" * 11 + "1" + "]" * 11 + ") { item { name } }", "literal_depth"),
        ("query ($a: Int @skip(if: " + "[" * 11 + "]" * 11 + ")) { item { name } }", "literal_depth"),
        ("{ item { ... @skip(if: " + "{a:" * 11 + "1" + "}" * 11 + ") { name } } }", "literal_depth"),
        ("{ item { name } } fragment F on Item { name(a: " + "[" * 11 + "]" * 11 + ") } fragment F on Item { name }",
         "literal_depth"),
        ("{ item { ...F ...F ...F ...F } } fragment F on Item { " + "name " * 16 + "}", "fields"),
        ("{" + " ".join(f"a{i}: item {{ name }}" for i in range(11)) + "}", "aliases"),
        ("{ item { ...F ...F } } fragment F on Item {" + " ".join(f"a{i}: name" for i in range(6)) + "}", "aliases"),
        ("{ item { name" + " @skip(if: false)" * 5 + " } }", "directives"),
        ("query " + "@skip(if: false) " * 5 + "{ item { name } }", "directives"),
        ("{ item { ...F ...F ...F } } fragment F on Item { name @skip(if: false) @include(if: true) }", "directives"),
        ("{ items(first: 100) { items(first: 50) { name } } }", "rows"),
        ("{ items(first: 100) { items { items { name } } } }", "rows"),
        ("query ($n: Int) { items(first: $n) { items(first: $n) { name } } }", "rows"),
        ("query ($n: Int) { items(first: $n) { ...F } } fragment F on Item { items(first: 100000) { name } }", "rows"),
        ("query ($n: Int) { items(first: $n) { ... { items(first: $n) { name } } } }", "rows"),
        ("{" + "item { name } " * 25 + "}", "overlaps"),
        ("{" + "...F " * 25 + "} fragment F on Query { item { name } }", "overlaps"),
        ("{ item { name } } fragment F on Query {" + "item { name } " * 25 + "}", "overlaps"),
        (bomb(30).replace("{name}", "{...F0}"), "fields"),
        ("mutation {" + " ".join(f'confirm(token: "{i}")' for i in range(4)) + "}", "root_mutations"),
        ("mutation { ...F ...F } fragment F on Mutation { ... { a: __typename b: __typename } }", "root_mutations"),
        ("{ item { name } " + " " * 150_000 + "}", "tokens"),
        ("{ item { name } } " + "# \n" * 13_000, "tokens"),
        ("{ item { name } }" + "fragment F on Item { name }" * 2_000, "tokens"),
        ("{ item(a: " + "[" * 300 + "]" * 300 + ") }", "tokens"),
        ("\n" * 12_000 + "{ item { name } }", "tokens"),
        ("{ item { name } }" + "\r\n" * 6_000, "tokens"),
        ("query A { item { name } }" + "".join(f"query Q{i} {{ item {{ name }} }}" for i in range(10)), "operations"),
        ("{a}" * 440, "operations"),
        ("query A { item }" + "subscription { a }" * 10, "operations"),
        ("{ item {" + "...F " * 63 + "} } fragment F on Item { ...F }", "spreads"),
        ("{ item {" + " ".join(f"...F{i}" for i in range(63)) + "} }", "spreads"),
        ("{ item {" + "...F " * 32 + "} item {" + "...G " * 31 + "} }", "spreads"),
        ("{" + " ".join(f"a{i}: __schema {{ types {{ fields {{ name type {{ name }} }} }} }}" for i in range(9)) + "}",
         "introspection"),
        ("{ __schema { types {" + " ".join(f"a{i}: fields {{ name type {{ name }} }}" for i in range(9)) + "} } }",
         "introspection"),
        ("{ ...F ... { ...F } } fragment F on Query { " + SCHEMA_TYPES * 2 + "}", "introspection"),
        ("{" + " ".join(f'a{i}: __type(name: "Query") {{ name }}' for i in range(2)) + "}", "introspection"),
    ],
)  # fmt: skip
def test_each_limit_refuses_what_exceeds_it(client: TestClient, query: str, limit: str) -> None:
    assert refused_by(ask(client, query)) == limit


@pytest.mark.parametrize(
    "query",
    [
        "{ item { parent { parent { parent { parent { name } } } } } }",
        "{ item { " + "name parent { name } items { name } " * 11 + "__typename " * 4 + "} }",
        "{" + " ".join(f"a{i}: item {{ name }}" for i in range(10)) + "}",
        "{ items(first: 100) { items(first: 40) { name } } }",
        "{ items(first: null) { items { name } } }",
        "query ($a: Boolean = true) { item { name @skip(if: $a) } }",
        'mutation { a: confirm(token: "") b: confirm(token: "") c: confirm(token: "") }',
        "{ item { name } }" + "\n" * 11_999,
        "{ item {" + "...F " * 30 + "} } fragment F on Item { name }",
        '{ __type(name: "Item") { name } }',
        "{" + SCHEMA_TYPES + "}",
    ],
)
def test_what_is_just_within_runs(client: TestClient, query: str) -> None:
    response = ask(client, query)

    assert response.status_code == 200
    assert "errors" not in response.json()


def test_5000_aliased_mutations_are_refused_and_none_runs(client: TestClient) -> None:
    """Even where the document may be as long as it wants."""
    confirmed.clear()
    query = "mutation {" + "".join(f'a{i}:confirm(token:"x")' for i in range(5_000)) + "}"
    patient = Limits(tokens=100_000, query_characters=1_000_000)

    by_default = ask(client, query)
    measured = Documents(graphql_schema, patient).prepare(query)

    assert refused_by(by_default) == "tokens"
    assert isinstance(measured, Rejection)
    assert measured.errors[0]["extensions"]["limit"] == "root_mutations"
    assert confirmed == []


def test_the_nested_fragments_bomb_of_859_characters_is_measured_in_linear_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has 2**24 fields; each of its selection sets is looked at once, and no validation rule sees it."""
    query = next(text for text in map(bomb, range(100)) if len(text) >= 859)
    looked_at = 0
    measured = limits._Ruler._selections

    def counted(*arguments: Any) -> Any:
        nonlocal looked_at
        looked_at += 1
        return measured(*arguments)

    monkeypatch.setattr(limits._Ruler, "_selections", counted)
    monkeypatch.setattr(documents, "validate", None)

    prepared = Documents(graphql_schema, Limits()).prepare(query)

    assert isinstance(prepared, Rejection)
    assert prepared.errors[0]["extensions"]["limit"] == "fields"
    assert looked_at == query.count("{")


def test_a_number_of_fields_too_large_for_json_is_refused(client: TestClient) -> None:
    assert refused_by(ask(client, bomb(90, spreads=20))) == "fields"


def test_a_long_chain_of_fragments_is_refused_as_too_deep(client: TestClient) -> None:
    """It selects a single field; following the chain must not exhaust the stack."""
    assert refused_by(ask(client, bomb(900, spreads=1))) == "depth"


@pytest.mark.parametrize(
    "query",
    [
        "{ item { ...A } } fragment A on Item { ...A }",
        "{ item { ...A } } fragment A on Item { parent { ...B } } fragment B on Item { parent { ...A name } }",
        "{ item { ...A } } fragment A on Item { ...B ...C } fragment B on Item { ...C } fragment C on Item { ...B }",
        "query { ...A } fragment A on Query { ...A ...A ...A }",
        "{ item { ...Unknown } }",
        "{ item { ... on Unknown { name } } }",
        "{ nowhere(first: 3) { nothing } }",
    ],
)
def test_what_is_invalid_is_left_to_the_standard_rules(client: TestClient, query: str) -> None:
    response = ask(client, query)

    assert response.status_code == 400
    assert {error["extensions"]["code"] for error in response.json()["errors"]} == {"GRAPHQL_VALIDATION_FAILED"}


def test_a_document_has_ten_operations_and_runs_one(client: TestClient) -> None:
    query = "".join(f"query Q{i} {{ item {{ name }} }}" for i in range(10))
    response = client.post("/graphql", json={"query": query, "operationName": "Q7"})
    assert response.json() == {"data": {"item": {"name": "item"}}}


@pytest.mark.parametrize(
    "query",
    [
        "query A{__typename}" * 100,
        "".join(f"query Q{i}{{__typename}}" for i in range(250)),
        spread_side_by_side(200),
        "{item{" + "...F " * 900 + "}}fragment F on Item{name}",
        "\n" * 45_000 + "{a b c d e f}",
        "{accounts(filter:{a:1 b:1 c:1 d:1 e:1 f:" + "[" * 60 + "1 " * 1_500 + "]" * 60 + "}){edges{cursor}}}",
    ],
)
def test_what_the_standard_rules_would_be_slow_at_does_not_reach_them(
    query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "validate", None)
    prepared = Documents(SCHEMA._schema, Limits()).prepare(query)
    assert isinstance(prepared, Rejection)
    assert prepared.errors[0]["extensions"]["code"] == "OPERATION_TOO_COMPLEX"


@pytest.mark.parametrize("served", [graphql_schema, SCHEMA._schema], ids=["toy", "Sunset"])
def test_the_default_limits_admit_the_introspection_of_clients(served: GraphQLSchema) -> None:
    everything = get_introspection_query(
        specified_by_url=True,
        directive_is_repeatable=True,
        schema_description=True,
        input_value_deprecation=True,
    )

    assert isinstance(Documents(served, Limits()).prepare(everything), Document)


class TestRemembered:
    @pytest.mark.parametrize("query", ["{ item { name } }", "{ unknown }", "{"])
    def test_a_document_is_prepared_once(self, query: str, monkeypatch: pytest.MonkeyPatch) -> None:
        prepared_before = Documents(graphql_schema, Limits())
        first = prepared_before.prepare(query)
        monkeypatch.setattr(documents, "parse", None)

        assert prepared_before.prepare(query) is first

    def test_invalid_documents_cannot_push_out_valid_ones(self) -> None:
        prepared_before = Documents(graphql_schema, Limits())
        valid = prepared_before.prepare("{ item { name } }")

        for number in range(500):
            prepared_before.prepare(f"{{ unknown{number} }}")

        assert prepared_before.prepare("{ item { name } }") is valid
        assert len(prepared_before.invalid) == 200

    def test_a_flood_of_valid_documents_stays_bounded(self) -> None:
        prepared_before = Documents(graphql_schema, Limits())

        for number in range(1_500):
            prepared_before.prepare(f"query Q{number} {{ item {{ name }} }}")

        assert len(prepared_before.valid) == 1_000

    def test_the_longest_unused_is_forgotten_first(self) -> None:
        recent: Recent[str] = Recent(entries=2, characters=1_000)
        recent.put("a", "A")
        recent.put("b", "B")
        recent.get("a")

        recent.put("c", "C")

        assert [recent.get(text) for text in "abc"] == ["A", None, "C"]

    def test_the_text_that_is_held_is_bounded(self) -> None:
        recent: Recent[int] = Recent(entries=1_000, characters=1_000)

        for number in range(50):
            recent.put(f"{number:0>100}", number)

        assert len(recent) == 10

    def test_a_text_that_takes_a_tenth_of_the_room_is_not_kept(self) -> None:
        recent: Recent[str] = Recent(entries=10, characters=1_000)

        recent.put("x" * 101, "long")

        assert len(recent) == 0
