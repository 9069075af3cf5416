"""The schema as clients see it: current, described, uniform, and without what breaks their tools."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import graphql
import pytest
from graphql import (
    GraphQLArgument,
    GraphQLEnumType,
    GraphQLField,
    GraphQLInputField,
    GraphQLInputObjectType,
    GraphQLInterfaceType,
    GraphQLNamedType,
    GraphQLNonNull,
    GraphQLObjectType,
    GraphQLUnionType,
    Undefined,
)

from app import errors
from app.graphql.access import Access, require_statements, root
from app.graphql.nodes import Kind
from app.graphql.schema import printed
from app.graphql.types import refusal_name

FILE = Path(__file__).parents[2] / "schema.graphql"
SCHEMA = graphql.build_schema(FILE.read_text(encoding="utf-8"))
"""Built from the file alone: what an integrator has."""

TYPES = [
    kind for name, kind in SCHEMA.type_map.items() if not graphql.is_specified_scalar_type(kind) and name[0] != "_"
]
OUTPUTS = [kind for kind in TYPES if isinstance(kind, GraphQLObjectType | GraphQLInterfaceType)]
INPUTS = [kind for kind in TYPES if isinstance(kind, GraphQLInputObjectType)]
ENUMS = [kind for kind in TYPES if isinstance(kind, GraphQLEnumType)]
UNIONS = [kind for kind in TYPES if isinstance(kind, GraphQLUnionType)]
assert SCHEMA.query_type is not None
assert SCHEMA.mutation_type is not None
QUERIES, MUTATIONS = SCHEMA.query_type.fields, SCHEMA.mutation_type.fields


def fields() -> Iterator[tuple[str, GraphQLField]]:
    for kind in OUTPUTS:
        for name, field in kind.fields.items():
            yield f"{kind.name}.{name}", field


def values() -> Iterator[tuple[str, GraphQLArgument | GraphQLInputField]]:
    """Everything that a client can give."""
    for path, field in fields():
        for name, argument in field.args.items():
            yield f"{path}({name})", argument
    for kind in INPUTS:
        for name, given in kind.fields.items():
            yield f"{kind.name}.{name}", given


def all_refusals(kind: type[errors.Refusal] = errors.Refusal) -> Iterator[type[errors.Refusal]]:
    for one in kind.__subclasses__():
        if one.__module__ != errors.__name__:  # another test's own
            continue
        yield one
        yield from all_refusals(one)


REFUSALS = list(all_refusals())


def test_the_file_is_what_the_code_serves() -> None:
    assert FILE.read_text(encoding="utf-8") == printed()


def test_everything_has_a_description() -> None:
    described: list[tuple[str, str | None]] = [(kind.name, kind.description) for kind in TYPES]
    described += [(path, field.description) for path, field in fields()]
    described += [(path, value.description) for path, value in values()]
    described += [(f"{kind.name}.{name}", one.description) for kind in ENUMS for name, one in kind.values.items()]
    # The one argument of a mutation is its input type, which says what it is.
    without = {path for path, text in described if not (text or "").strip()}
    assert without == {f"Mutation.{name}(input)" for name in MUTATIONS}


def test_root_fields_are_nullable_so_that_one_failure_leaves_the_others() -> None:
    assert [name for name, field in {**QUERIES, **MUTATIONS}.items() if isinstance(field.type, GraphQLNonNull)] == []


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_takes_one_input_and_answers_with_its_own_union(mutation: str) -> None:
    name = mutation[0].upper() + mutation[1:]
    field = MUTATIONS[mutation]
    assert {key: str(value.type) for key, value in field.args.items()} == {"input": f"{name}Input!"}
    union = field.type
    assert isinstance(union, GraphQLUnionType)
    assert union.name == f"{name}Result"
    assert f"{name}Success" in {member.name for member in union.types}
    for member in union.types:
        is_error = "UserError" in {interface.name for interface in member.interfaces}
        assert is_error == member.name.endswith("Error")


@pytest.mark.parametrize("union", UNIONS, ids=lambda union: union.name)
def test_members_of_a_union_never_give_one_field_two_types(union: GraphQLUnionType) -> None:
    seen: defaultdict[str, set[str]] = defaultdict(set)
    for member in union.types:
        for name, field in member.fields.items():
            seen[name].add(str(field.type))
    assert {name: kinds for name, kinds in seen.items() if len(kinds) > 1} == {}


def test_every_mutation_can_be_repeated_safely() -> None:
    """With a key, or because repeating it changes nothing."""
    with_key = {name for name in MUTATIONS if "idempotencyKey" in input_of(name).fields}
    assert set(MUTATIONS) - with_key == {
        *("requestRestart", "syncAccounts"),
        *("updateWebhookEndpoint", "disableWebhookEndpoint", "enableWebhookEndpoint"),
        "acknowledgeEnforcement",  # the first time stays
    }
    conflict = {name for name in MUTATIONS if "IdempotencyConflictError" in str(members_of(name))}
    assert conflict == with_key


def input_of(mutation: str) -> GraphQLInputObjectType:
    kind = graphql.get_named_type(MUTATIONS[mutation].args["input"].type)
    assert isinstance(kind, GraphQLInputObjectType)
    return kind


def members_of(mutation: str) -> list[str]:
    union = MUTATIONS[mutation].type
    assert isinstance(union, GraphQLUnionType)
    return [member.name for member in union.types]


def test_ids_are_on_nodes_and_only_there() -> None:
    node = SCHEMA.type_map["Node"]
    assert isinstance(node, GraphQLInterfaceType)
    implementing = {kind.name for kind in SCHEMA.get_possible_types(node)}
    with_id = {kind.name for kind in OUTPUTS if "id" in kind.fields} - {"Node"}
    assert with_id == implementing
    assert implementing == {"".join(word.capitalize() for word in kind.name.split("_")) for kind in Kind}
    assert {str(kind.fields["id"].type) for kind in OUTPUTS if "id" in kind.fields} == {"ID!"}


def test_names_are_uniform() -> None:
    assert [kind.name for kind in TYPES if not re.fullmatch(r"[A-Z][A-Za-z]*", kind.name)] == []
    assert [kind.name for kind in TYPES if kind.name.endswith("Type") and kind.name != "TransitionType"] == []
    assert [kind.name for kind in INPUTS if not kind.name.endswith("Input")] == []
    paths = [path for path, _ in fields()] + [path for path, _ in values()]
    assert [path for path in paths if not re.search(r"[.(][a-z][A-Za-z]*\)?$", path)] == []


def test_enum_values_scream() -> None:
    assert [one for kind in ENUMS for one in kind.values if not re.fullmatch(r"[A-Z]+(_[A-Z]+)*", one)] == []


def test_what_may_be_left_out_has_no_default() -> None:
    """Relay's compiler refuses a nullable variable where a default stands."""
    assert [path for path, value in values() if value.default_value is not Undefined or value.default] == []
    assert " = null" not in printed()


def test_no_directive_of_the_implementation_shows() -> None:
    used = set(re.findall(r"@(\w+)", re.sub(r'"""[\s\S]*?"""', "", printed())))
    assert used <= {"specifiedBy", "deprecated"}
    assert "directive @" not in printed()


def test_deprecations_say_what_to_use_and_until_when() -> None:
    marked = [one.deprecation_reason for _, one in [*fields(), *values()]]
    marked += [one.deprecation_reason for kind in ENUMS for one in kind.values.values()]
    assert [
        text for text in marked if text and not re.fullmatch(r"Use `.+`\. Removal on \d{4}-\d\d-\d\d\.", text)
    ] == []


def test_lists_are_connections_unless_they_are_short() -> None:
    connections: list[GraphQLNamedType] = [kind for kind in OUTPUTS if kind.name.endswith("Connection")]
    for kind in connections:
        assert isinstance(kind, GraphQLObjectType)
        assert set(kind.fields) == {"edges", "pageInfo"}
    for path, field in fields():
        if graphql.get_named_type(field.type) in connections:
            assert {"first", "after"} <= set(field.args), path
            assert str(field.args["first"].type) == "Int"
            assert str(field.args["after"].type) == "String"


def test_times_are_instants() -> None:
    instants = {path for path, field in fields() if path.endswith(("At", "Until", "Before", "From"))}
    assert instants
    kinds = {str(graphql.get_named_type(field.type)) for path, field in fields() if path in instants}
    assert kinds == {"DateTime"}
    assert SCHEMA.type_map["DateTime"].specified_by_url  # type: ignore[attr-defined]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda one: one.__name__)
def test_every_refusal_has_its_type(refusal: type[errors.Refusal]) -> None:
    kind = SCHEMA.type_map[refusal_name(refusal)]
    assert isinstance(kind, GraphQLObjectType)
    assert "UserError" in {interface.name for interface in kind.interfaces}
    assert kind.name in {member.name for union in UNIONS for member in union.types}


def test_every_error_type_is_of_a_refusal() -> None:
    user_error = SCHEMA.type_map["UserError"]
    assert isinstance(user_error, GraphQLInterfaceType)
    assert {kind.name for kind in SCHEMA.get_possible_types(user_error)} == {refusal_name(one) for one in REFUSALS}


def test_every_root_field_says_who_it_is_for() -> None:
    for name, field in {**QUERIES, **MUTATIONS}.items():
        said = (field.description or "").rpartition("\n\nFor ")[2].removesuffix(".")
        assert said in set(Access), name


def test_a_root_field_that_does_not_is_refused() -> None:
    import strawberry

    @strawberry.type
    class Open:
        @strawberry.field
        def anything(self) -> int | None:
            return None

    @strawberry.type
    class Stated:
        @root(Access.STAFF, "Something.")
        def anything(self) -> int | None:
            return None

    require_statements(Stated)
    with pytest.raises(TypeError, match=r"Open\.anything"):
        require_statements(Stated, Open)
