"""How much one request may ask for, and the measuring of a document against it.

The measure is taken before the standard validation rules run, since some of those are expensive on hostile documents.
Each fragment is measured once, however often and deeply it is spread: the work is linear in the document's size,
and fragments that spread each other exponentially cost no more than others. Cycles are cut here and reported by the
standard rules. This module knows GraphQL documents and the schema's types; no transport, no caller, no rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from graphql import (
    DocumentNode,
    ExecutableDefinitionNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLInterfaceType,
    GraphQLNamedType,
    GraphQLObjectType,
    GraphQLSchema,
    InlineFragmentNode,
    IntValueNode,
    NullValueNode,
    OperationDefinitionNode,
    OperationType,
    SelectionNode,
    get_named_type,
)

from app import errors
from app.graphql import nodes

_MAX_NESTING: Final = 100
"""Selection sets and fragments inside each other, followed before giving up: it bounds this module's own recursion."""

_MAX_STEPS_PER_FIELD: Final = 10
"""Selections that are followed in all definitions together, for each field that one of them may have."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for. The defaults leave room for GraphiQL's introspection and for a Relay client."""

    body_bytes: int = 2 * 1024 * 1024
    """Of the request's body, or of the query string of a GET. A batch of 500 accounts with their members fits."""
    json_depth: int = 32
    """Of objects and lists inside each other in the request, `variables` included."""
    query_characters: int = 50_000
    tokens: int = 4_000
    """Of the document. As many comments are allowed."""
    depth: int = 20
    """Of fields inside each other."""
    fields: int = 500
    """Of all fields of an operation, with fragments expanded."""
    aliases: int = 50
    directives: int = 50
    root_mutations: int = 10
    """Of mutations in one operation, aliased or not."""
    rows: int = 25_000
    """Of list items that the `first` arguments allow, pages within pages multiplied. A variable counts as 100."""
    overlaps: int = 5_000
    """Of pairs of fields in the same place of the answer, in all definitions: the standard rules compare each pair."""


class Measure(NamedTuple):
    """What a selection set amounts to, everything below it and its fragments included."""

    depth: int = 0
    fields: int = 0
    aliases: int = 0
    directives: int = 0
    rows: int = 0
    roots: int = 0
    """Fields of this selection set itself."""
    resolves: bool = False
    """Whether a field of this selection set surely runs a resolver: not introspection, under no directive."""
    introspects: bool = False
    """Whether this selection set itself selects `__schema` or `__type`."""


def check(document: DocumentNode, schema: GraphQLSchema, limits: Limits) -> list[Measure]:
    """The measure of each operation of `document`, in its order.

    Refuses with OperationTooComplex the first limit that an operation or a fragment, used or not, exceeds. The
    document need not be valid: what the schema does not know is counted all the same.
    """
    ruler = _Ruler(document, schema)
    measured = []
    for definition in document.definitions:
        if isinstance(definition, OperationDefinitionNode):
            measure = ruler.operation(definition)
            measured.append(measure)
            if definition.operation is OperationType.MUTATION and measure.roots > limits.root_mutations:
                raise _too_complex("has more mutations", "root_mutations", limits.root_mutations)
        elif isinstance(definition, FragmentDefinitionNode):
            measure = ruler.fragment(definition.name.value, 0)
        else:
            continue
        if measure.depth > limits.depth:
            raise _too_complex("nests fields deeper", "depth", limits.depth)
        if measure.fields > limits.fields:
            raise _too_complex("selects more fields, fragments included,", "fields", limits.fields)
        if measure.aliases > limits.aliases:
            raise _too_complex("has more aliases, fragments included,", "aliases", limits.aliases)
        if measure.directives > limits.directives:
            raise _too_complex("has more directives, fragments included,", "directives", limits.directives)
        if measure.rows > limits.rows:
            raise _too_complex("can load more list items, pages within pages multiplied,", "rows", limits.rows)
        ruler.compare(definition, limits)
    return measured


def _too_complex(what: str, limit: str, maximum: int) -> errors.OperationTooComplex:
    return errors.OperationTooComplex(f"The document {what} than the {maximum} allowed.", limit=limit, maximum=maximum)


class _Ruler:
    """Measures one document, remembering its fragments."""

    def __init__(self, document: DocumentNode, schema: GraphQLSchema) -> None:
        self._schema = schema
        self._definitions = {
            definition.name.value: definition
            for definition in document.definitions
            if isinstance(definition, FragmentDefinitionNode)
        }
        self._measured: dict[str, Measure] = {}
        self._steps = 0
        self._overlaps = 0

    def operation(self, node: OperationDefinitionNode) -> Measure:
        measure = self._selections(node.selection_set.selections, self._schema.get_root_type(node.operation), 0)
        return measure._replace(directives=measure.directives + len(node.directives or ()))

    def fragment(self, name: str, nesting: int) -> Measure:
        known = self._measured.get(name)
        if known is None:
            # Until it is measured, a fragment that reaches itself counts as nothing.
            self._measured[name] = known = Measure()
            if definition := self._definitions.get(name):
                on = self._schema.get_type(definition.type_condition.name.value)
                known = self._selections(definition.selection_set.selections, on, nesting)
                self._measured[name] = known
        return known

    def compare(self, definition: ExecutableDefinitionNode, limits: Limits) -> None:
        """Count how often fields share a place in the answer, as in `{ a { b } a { b } }`.

        This follows every spread, which is affordable only because `definition` is known to select few fields.
        """
        places: dict[tuple[int, str], int] = {}
        selected = [0]
        pending = [(definition.selection_set, 0, frozenset[str]())]
        while pending:
            selection_set, place, within = pending.pop()
            for node in selection_set.selections:
                self._steps += 1
                if isinstance(node, FieldNode):
                    below = places.setdefault((place, (node.alias or node.name).value), len(selected))
                    if below == len(selected):
                        selected.append(0)
                    self._overlaps += selected[below]
                    selected[below] += 1
                    if node.selection_set:
                        pending.append((node.selection_set, below, within))
                elif isinstance(node, InlineFragmentNode):
                    pending.append((node.selection_set, place, within))
                elif isinstance(node, FragmentSpreadNode):
                    name = node.name.value
                    if name in self._definitions and name not in within:
                        pending.append((self._definitions[name].selection_set, place, within | {name}))
            if self._overlaps > limits.overlaps:
                raise _too_complex("selects the same fields more often", "overlaps", limits.overlaps)
            if self._steps > limits.fields * _MAX_STEPS_PER_FIELD:
                raise _too_complex("spreads fragments too often to select no more fields", "fields", limits.fields)

    def _selections(self, selections: Sequence[SelectionNode], on: GraphQLNamedType | None, nesting: int) -> Measure:
        if nesting > _MAX_NESTING:
            raise _too_complex("nests selections and fragments deeper", "depth", _MAX_NESTING)
        depth = fields = aliases = directives = rows = roots = 0
        resolves = introspects = False
        for node in selections:
            own_directives = len(node.directives or ())
            if isinstance(node, FieldNode):
                part = self._field(node, on, nesting)
                roots += 1
            else:
                if isinstance(node, FragmentSpreadNode):
                    part = self.fragment(node.name.value, nesting + 1)
                else:
                    assert isinstance(node, InlineFragmentNode)
                    condition = node.type_condition
                    inner = self._schema.get_type(condition.name.value) if condition else on
                    part = self._selections(node.selection_set.selections, inner, nesting + 1)
                roots += part.roots
            depth = max(depth, part.depth)
            fields += part.fields
            aliases += part.aliases
            directives += part.directives + own_directives
            rows += part.rows
            resolves = resolves or (part.resolves and not own_directives)
            introspects = introspects or part.introspects
        return Measure(depth, fields, aliases, directives, rows, roots, resolves, introspects)

    def _field(self, node: FieldNode, on: GraphQLNamedType | None, nesting: int) -> Measure:
        name = node.name.value
        definition = on.fields.get(name) if isinstance(on, GraphQLObjectType | GraphQLInterfaceType) else None
        below = Measure()
        if node.selection_set:
            inner = get_named_type(definition.type) if definition else None
            below = self._selections(node.selection_set.selections, inner, nesting + 1)
        page = _page(node) if definition and "first" in definition.args else 0
        return Measure(
            depth=below.depth + 1,
            fields=below.fields + 1,
            aliases=below.aliases + (node.alias is not None),
            directives=below.directives,
            rows=page + page * below.rows if page else below.rows,
            resolves=not name.startswith("__"),
            introspects=name in {"__schema", "__type"},
        )


def _page(node: FieldNode) -> int:
    """The most items that the page of this connection can have; its cost when the size is a variable."""
    for argument in node.arguments or ():
        if argument.name.value == "first":
            value = argument.value
            if isinstance(value, NullValueNode):
                break
            # Longer numbers are refused later; converting them here could take long or fail.
            if isinstance(value, IntValueNode) and len(value.value) < len(str(nodes.MAX_PAGE_SIZE)):
                return max(int(value.value), 0)
            return nodes.MAX_PAGE_SIZE
    return nodes.DEFAULT_PAGE_SIZE
