"""From the text of a query to a document that is safe and correct to execute, remembered.

Parsing, measuring and validating cost ten times what executing a small query does, and clients repeat their queries.
Both outcomes are remembered, in caches bounded by entries and by text, apart from each other so that a flood of
invalid documents cannot push out the valid ones. This module knows no transport and no caller.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar

import structlog
from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    GraphQLSchema,
    GraphQLSyntaxError,
    InlineFragmentNode,
    OperationDefinitionNode,
    StringValueNode,
    Visitor,
    parse,
    specified_rules,
    validate,
    visit,
)
from strawberry.schema.validation_rules.one_of import OneOfInputValidationRule

from app import errors
from app.graphql.limits import Limits, Measure, check

_log = structlog.stdlib.get_logger(__name__)

MAX_ERRORS: Final = 5
"""How many errors a client is told of one document or one set of variables."""

_RULES: Final = (*specified_rules, OneOfInputValidationRule)
"""Strawberry tells graphql-core of its one-of inputs by this rule alone."""

UNREADABLE: Final = "A value cannot be read as its type."

_MAX_NAME_CHARACTERS: Final = 100
_MAX_MESSAGE_CHARACTERS: Final = 500
"""Of one error. graphql-core repeats in it what the client has sent, names and values, however long."""

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a document, as logs and the endpoint need it."""

    name: str | None
    """As the client wrote it, cut to 100 characters."""
    kind: Literal["query", "mutation", "subscription"]
    introspects: bool
    """Whether it answers of the schema itself: that takes the process longer than most documents do to read."""
    needs_gate: bool
    """Whether it may answer something without any resolver having checked the caller: introspection, `__typename`."""
    roots: Mapping[str, str]
    """The root fields that it may execute, by their keys in the answer."""


@dataclass(frozen=True, slots=True)
class Document:
    """Parsed, within the limits, and valid."""

    ast: DocumentNode
    operations: Mapping[str | None, Operation]
    """By the name that `operationName` may carry; None for the anonymous one."""

    def select(self, name: str | None) -> Operation:
        """The operation to execute. Refuses an unknown name, and none where there are several, with BadUserInput."""
        if name is None and len(self.operations) == 1:
            return next(iter(self.operations.values()))
        operation = self.operations.get(name)
        if operation is None or name is None:
            raise errors.BadUserInput(
                "The document has several operations: `operationName` must say which."
                if name is None
                else "The document has no operation of this `operationName`."
            )
        return operation


@dataclass(frozen=True, slots=True)
class Rejection:
    """A document that is not executed, and why, in GraphQL's form."""

    errors: Sequence[Mapping[str, Any]]


class Recent(Generic[_Value]):
    """The most recently used values by text; bounded, so that no client can make it grow."""

    def __init__(self, *, entries: int, characters: int) -> None:
        self._entries = entries
        self._characters = characters
        self._values: OrderedDict[str, _Value] = OrderedDict()
        self._held = 0

    def get(self, text: str) -> _Value | None:
        value = self._values.get(text)
        if value is not None:
            self._values.move_to_end(text)
        return value

    def put(self, text: str, value: _Value) -> None:
        """Remember `value`, forgetting the longest unused. A text that would take a tenth of the room is not kept."""
        if len(text) * 10 > self._characters or text in self._values:
            return
        self._values[text] = value
        self._held += len(text)
        while len(self._values) > self._entries or self._held > self._characters:
            forgotten, _ = self._values.popitem(last=False)
            self._held -= len(forgotten)

    def __len__(self) -> int:
        return len(self._values)


class Documents:
    """All documents that clients send for one schema."""

    def __init__(self, schema: GraphQLSchema, limits: Limits) -> None:
        self._schema = schema
        self._limits = limits
        # A parsed document takes some hundred times its text: this is some 50 MB at the worst.
        self.valid: Recent[Document] = Recent(entries=1_000, characters=500_000)
        self.invalid: Recent[Rejection] = Recent(entries=200, characters=100_000)

    def remembered(self, query: str) -> Document | Rejection | None:
        """What was prepared of this text before; None when it is new, or forgotten."""
        return self.valid.get(query) or self.invalid.get(query)

    def prepare(self, query: str) -> Document | Rejection:
        """The document of this text; the same object as last time while it is remembered."""
        if known := self.remembered(query):
            return known
        prepared = self._prepare(query)
        if isinstance(prepared, Document):
            self.valid.put(query, prepared)
        else:
            self.invalid.put(query, prepared)
        return prepared

    def _prepare(self, query: str) -> Document | Rejection:
        try:
            ast = self._parse(query)
            measures = check(ast, self._schema, self._limits)
        except GraphQLSyntaxError as error:
            return Rejection([formatted(error, {"code": "GRAPHQL_PARSE_FAILED"})])
        except errors.RequestError as error:
            return Rejection([{"message": error.message, "extensions": error.extensions}])
        if invalid := validate(self._schema, ast, _RULES, max_errors=MAX_ERRORS, hide_suggestions=True):
            return Rejection(list(map(_invalid, invalid[:MAX_ERRORS])))
        definitions = [node for node in ast.definitions if isinstance(node, OperationDefinitionNode)]
        fragments = {node.name.value: node for node in ast.definitions if isinstance(node, FragmentDefinitionNode)}
        return Document(
            ast, dict(_operation(node, measure, fragments) for node, measure in zip(definitions, measures, strict=True))
        )

    def _parse(self, query: str) -> DocumentNode:
        limits = self._limits
        if query.count("\n") + query.count("\r") >= limits.tokens:
            raise self._too_long()
        try:
            ast = parse(
                query,
                max_source_length=limits.query_characters,
                max_lexical_tokens=limits.tokens,
                max_comments=limits.tokens,
                allow_empty_selection_sets=False,
            )
        except GraphQLSyntaxError as error:
            # The parser's limits and its syntax errors differ in this ending alone.
            if error.description.endswith("Parsing aborted."):
                raise self._too_long() from None
            raise
        if "\\u" in query:
            visit(ast, _NoNul())
        return ast

    def _too_long(self) -> errors.OperationTooComplex:
        characters, tokens = self._limits.query_characters, self._limits.tokens
        return errors.OperationTooComplex(
            f"The document is nested too deeply, or longer than the {characters} characters, {tokens} tokens, {tokens} "
            f"comments and {tokens} lines allowed.",
            limit="tokens",
            maximum=tokens,
        )


class _NoNul(Visitor):
    """Refuses strings with an escaped NUL, which no database text can hold."""

    def enter_string_value(self, node: StringValueNode, *_: object) -> None:
        if "\0" in node.value:
            raise errors.BadUserInput("A string of the document contains the character U+0000.")


def _invalid(error: GraphQLError) -> Mapping[str, Any]:
    cause = innermost(error)
    message = None
    if not isinstance(cause, GraphQLError):
        # A scalar refused a literal without words for clients; graphql-core would show the exception's text.
        message = UNREADABLE
        if not isinstance(cause, ValueError):
            _log.error("graphql.scalar_failed", exc_info=cause)
    return formatted(error, {"code": "GRAPHQL_VALIDATION_FAILED"}, message)


def _operation(
    node: OperationDefinitionNode, measure: Measure, fragments: Mapping[str, FragmentDefinitionNode]
) -> tuple[str | None, Operation]:
    name = node.name.value if node.name else None
    return name, Operation(
        name=name and name[:_MAX_NAME_CHARACTERS],
        kind=node.operation.value,
        introspects=measure.introspects,
        needs_gate=measure.introspects or not measure.resolves,
        roots=_roots(node, fragments),
    )


def _roots(node: OperationDefinitionNode, fragments: Mapping[str, FragmentDefinitionNode]) -> dict[str, str]:
    """Of a valid document: each key stands for one field, and every fragment exists and does not reach itself."""
    roots: dict[str, str] = {}
    pending, spread = [node.selection_set], set[str]()
    while pending:
        for selected in pending.pop().selections:
            if isinstance(selected, FieldNode):
                roots[(selected.alias or selected.name).value] = selected.name.value
            elif isinstance(selected, InlineFragmentNode):
                pending.append(selected.selection_set)
            elif isinstance(selected, FragmentSpreadNode) and selected.name.value not in spread:
                spread.add(selected.name.value)
                pending.append(fragments[selected.name.value].selection_set)
    return roots


def innermost(error: GraphQLError) -> Exception:
    """What went wrong at first, under the layers of GraphQL errors that only add its place."""
    cause: Exception = error
    while isinstance(cause, GraphQLError) and cause.original_error is not None:
        cause = cause.original_error
    return cause


def _cut(message: str) -> str:
    return message if len(message) <= _MAX_MESSAGE_CHARACTERS else message[: _MAX_MESSAGE_CHARACTERS - 1] + "…"


def formatted(error: GraphQLError, extensions: Mapping[str, Any], message: str | None = None) -> dict[str, Any]:
    """`error` in the form of GraphQL's specification: its message and its place, and nothing else that it carries."""
    shown: dict[str, Any] = {"message": _cut(error.message if message is None else message)}
    if error.locations:
        shown["locations"] = [{"line": place.line, "column": place.column} for place in error.locations]
    if error.path is not None:
        shown["path"] = error.path
    shown["extensions"] = extensions
    return shown
