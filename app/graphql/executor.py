"""How operations are executed: as graphql-core does, with a short way for the fields that most answers are made of.

A field that shows an attribute as a scalar or an enum needs no resolver, no arguments and no description of itself.
graphql-core prepares all of them for every field of every object, which is half of what executing a list costs. The
short way is taken only where nothing can go wrong; for everything else, errors included, graphql-core's own is.

It knows the form of a schema and none of its types.
"""

from operator import attrgetter
from typing import Any

from graphql import GraphQLField, GraphQLObjectType, GraphQLSchema, get_nullable_type, is_leaf_type, is_nullable_type
from strawberry.schema.schema import StrawberryGraphQLCoreExecutionContext
from strawberry.schema.schema_converter import GraphQLCoreConverter
from strawberry.types.field import StrawberryField


class _Shown:
    """A resolver that reads an attribute, with what makes a scalar or an enum of the value."""

    __slots__ = ("coerce", "nullable", "read")

    def __init__(self, attribute: str, kind: Any) -> None:
        self.read = attrgetter(attribute)
        self.coerce = get_nullable_type(kind).coerce_output_value
        self.nullable = is_nullable_type(kind)

    def __call__(self, source: Any, _info: Any) -> Any:
        return self.read(source)


class Executor(StrawberryGraphQLCoreExecutionContext):
    """Executes one operation of a schema that `shorten` has prepared."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.members: dict[str | int, GraphQLObjectType] = {}
        """Which type became of each root field that answers a union or an interface, by its key in the answer."""

    def ensure_valid_runtime_type(
        self, runtime_type_name: Any, return_type: Any, field_details_list: Any, info: Any, result: Any
    ) -> GraphQLObjectType:
        kind = super().ensure_valid_runtime_type(runtime_type_name, return_type, field_details_list, info, result)
        if info.path.prev is None:
            self.members[info.path.key] = kind
        return kind

    def execute_field(
        self, parent_type: GraphQLObjectType, source: Any, field_details_list: Any, path: Any, position_context: Any
    ) -> Any:
        field = parent_type.fields.get(field_details_list[0].node.name.value)
        if field is not None and type(shown := field.resolve) is _Shown:
            try:
                value = shown.read(source)
                if value is not None:
                    value = shown.coerce(value)
                    usable = value is not None
                else:
                    usable = shown.nullable
            except Exception:
                usable = False  # it goes wrong again below, where graphql-core says what and where
            if usable:
                return value
        return super().execute_field(parent_type, source, field_details_list, path, position_context)


def shorten(schema: GraphQLSchema) -> None:
    """Let `Executor` take the short way for every field that shows an attribute as a scalar or an enum."""
    for kind in schema.type_map.values():
        if isinstance(kind, GraphQLObjectType):
            for field in kind.fields.values():
                if (attribute := _attribute(field)) is not None:
                    field.resolve = _Shown(attribute, field.type)


def _attribute(field: GraphQLField) -> str | None:
    """The attribute that the field shows; None where there is more to it."""
    declared = field.extensions.get(GraphQLCoreConverter.DEFINITION_BACKREF)
    if not isinstance(declared, StrawberryField) or not declared.is_basic_field or field.args:
        return None
    return declared.python_name if is_leaf_type(get_nullable_type(field.type)) else None
