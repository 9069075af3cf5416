"""How much one request may ask for, and the measuring of a document against it.

The measure is taken before the standard validation rules run, since some of those are expensive on hostile documents.
Each fragment is measured once, however often and deeply it is spread: the work is linear in the document's size,
and fragments that spread each other exponentially cost no more than others. Cycles are cut here and reported by the
standard rules. This module knows GraphQL documents and the schema's types; no transport, no caller, no rule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from graphql import (
    DocumentNode,
    ExecutableDefinitionNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLEnumType,
    GraphQLInputObjectType,
    GraphQLInterfaceType,
    GraphQLNamedType,
    GraphQLObjectType,
    GraphQLSchema,
    InlineFragmentNode,
    IntValueNode,
    NullValueNode,
    OperationDefinitionNode,
    OperationType,
    SchemaMetaFieldDef,
    SelectionNode,
    TokenKind,
    TypeMetaFieldDef,
    get_named_type,
    is_abstract_type,
)

from app import errors
from app.graphql import nodes

_MAX_NESTING: Final = 100
"""Selection sets and fragments inside each other, followed before giving up: it bounds this module's own recursion."""

_MAX_STEPS_PER_FIELD: Final = 10
"""Selections that are followed in all definitions together, for each field that one of them may have."""


class Budget(NamedTuple):
    """What one request may hold, whatever it asks for. It is looked at before anything is parsed."""

    body_bytes: int
    """Of the request's body, or of the query string of a GET."""
    values: int
    """In JSON: more commas and opening brackets are not even parsed. A text's own are counted with them."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for. The defaults leave room for GraphiQL's introspection and for a Relay client."""

    request: Budget = Budget(body_bytes=128 * 1024, values=8_000)
    """Of everybody."""
    batch: Budget = Budget(body_bytes=2 * 1024 * 1024, values=120_000)
    """Of who provisions. A batch of 500 accounts with 10,000 members fits."""
    list_items: int = 1_000
    """Of one list in `variables`. The longest that any action takes has so many."""
    json_depth: int = 32
    """Of objects and lists inside each other in the request, `variables` included."""
    query_characters: int = 50_000
    tokens: int = 2_000
    """Of the document. As many comments and as many lines are allowed: to say where one error is, all lines before it
    are counted."""
    operations: int = 10
    """Of which one is executed, and all are validated."""
    depth: int = 20
    """Of fields inside each other."""
    literal_depth: int = 10
    """Of lists and objects inside each other in the document's own values. What tells an error in one prints it whole,
    each line indented as deep as it is."""
    fields: int = 500
    """Of all fields of an operation, with fragments expanded."""
    aliases: int = 50
    directives: int = 50
    root_mutations: int = 10
    """Of mutations in one operation, aliased or not."""
    rows: int = 25_000
    """Of list items that the `first` arguments allow, pages within pages multiplied. A variable counts as 100."""
    introspection: int = 25_000
    """Of values that introspection answers, as an estimate. What GraphiQL and code generators ask for takes half."""
    overlaps: int = 5_000
    """Of pairs of fields in the same place of the answer, in all definitions: the standard rules compare each pair."""
    spreads: int = 5_000
    """Of pairs of fragments that are spread in the same place, which are compared, too."""


class Measure(NamedTuple):
    """What a selection set amounts to, everything below it and its fragments included."""

    depth: int = 0
    fields: int = 0
    aliases: int = 0
    directives: int = 0
    rows: int = 0
    introspection: float = 0.0
    """Values of the schema that are answered, as an estimate."""
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
    if sum(isinstance(definition, OperationDefinitionNode) for definition in document.definitions) > limits.operations:
        raise _too_complex("has more operations", "operations", limits.operations)
    _check_literals(document, limits.literal_depth)
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
        if measure.introspection > limits.introspection:
            raise _too_complex("asks for more values of the schema", "introspection", limits.introspection)
        ruler.compare(definition, limits)
    return measured


def _too_complex(what: str, limit: str, maximum: int) -> errors.OperationTooComplex:
    return errors.OperationTooComplex(f"The document {what} than the {maximum} allowed.", limit=limit, maximum=maximum)


def _check_literals(document: DocumentNode, deepest: int) -> None:
    """By the document's tokens: between parentheses, every bracket that opens begins a value, or a type of lists. This
    sees definitions that others hide by having their name, and costs a tenth of visiting the nodes."""
    assert document.loc is not None
    parentheses = depth = 0
    token = document.loc.start_token
    while token.next is not None:
        token = token.next
        kind = token.kind
        if kind is TokenKind.PAREN_L:
            parentheses += 1
        elif kind is TokenKind.PAREN_R:
            parentheses -= 1
        elif parentheses and (kind is TokenKind.BRACKET_L or kind is TokenKind.BRACE_L):
            depth += 1
            if depth > deepest:
                raise _too_complex("nests values deeper", "literal_depth", deepest)
        elif parentheses and (kind is TokenKind.BRACKET_R or kind is TokenKind.BRACE_R):
            depth -= 1


class _Ruler:
    """Measures one document, remembering its fragments."""

    def __init__(self, document: DocumentNode, schema: GraphQLSchema) -> None:
        self._schema = schema
        self._definitions = {
            definition.name.value: definition
            for definition in document.definitions
            if isinstance(definition, FragmentDefinitionNode)
        }
        self._sizes = _sizes(schema)
        self._measured: dict[str, Measure] = {}
        self._steps = 0
        self._overlaps = 0
        self._spreads = 0

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
        """Count how often fields and spreads share a place in the answer, as in `{ a { b ...F } a { b ...G } }`.

        This follows every spread, which is affordable only because `definition` is known to select few fields.
        """
        places: dict[tuple[int, str], int] = {}
        selected = [0]
        spread: list[set[int]] = [set()]
        pending = [(definition.selection_set, 0, frozenset[str]())]
        while pending:
            selection_set, place, within = pending.pop()
            for node in selection_set.selections:
                self._steps += 1
                if isinstance(node, FieldNode):
                    below = places.setdefault((place, (node.alias or node.name).value), len(selected))
                    if below == len(selected):
                        selected.append(0)
                        spread.append(set())
                    self._overlaps += selected[below]
                    selected[below] += 1
                    if node.selection_set:
                        pending.append((node.selection_set, below, within))
                elif isinstance(node, InlineFragmentNode):
                    pending.append((node.selection_set, place, within))
                elif isinstance(node, FragmentSpreadNode):
                    if id(node) not in spread[place]:
                        self._spreads += len(spread[place])
                        spread[place].add(id(node))
                    name = node.name.value
                    if name in self._definitions and name not in within:
                        pending.append((self._definitions[name].selection_set, place, within | {name}))
            if self._overlaps > limits.overlaps:
                raise _too_complex("selects the same fields more often", "overlaps", limits.overlaps)
            if self._spreads > limits.spreads:
                raise _too_complex("has more pairs of fragments spread side by side", "spreads", limits.spreads)
            if self._steps > limits.fields * _MAX_STEPS_PER_FIELD:
                raise _too_complex("spreads fragments too often to select no more fields", "fields", limits.fields)

    def _selections(self, selections: Sequence[SelectionNode], on: GraphQLNamedType | None, nesting: int) -> Measure:
        if nesting > _MAX_NESTING:
            raise _too_complex("nests selections and fragments deeper", "depth", _MAX_NESTING)
        depth = fields = aliases = directives = rows = roots = 0
        introspection = 0.0
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
            introspection += part.introspection
            resolves = resolves or (part.resolves and not own_directives)
            introspects = introspects or part.introspects
        return Measure(depth, fields, aliases, directives, rows, introspection, roots, resolves, introspects)

    def _field(self, node: FieldNode, on: GraphQLNamedType | None, nesting: int) -> Measure:
        name = node.name.value
        definition = _INTROSPECTION.get(name)
        if definition is None and isinstance(on, GraphQLObjectType | GraphQLInterfaceType):
            definition = on.fields.get(name)
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
            introspection=self._introspection(name, on, below),
            resolves=not name.startswith("__"),
            introspects=name in _INTROSPECTION,
        )

    def _introspection(self, name: str, on: GraphQLNamedType | None, below: Measure) -> float:
        if name == "__type":
            return max(_LARGE_TYPE, below.introspection)
        if name == "__schema" or (on is not None and on.name.startswith("__")):
            return 1 + self._sizes.get(name, 1.0) * below.introspection
        return below.introspection


_INTROSPECTION: Final = {"__schema": SchemaMetaFieldDef, "__type": TypeMetaFieldDef}
_LARGE_TYPE: Final = 1_000
"""What one type counts at least that is asked for by name: it may be much larger than the average."""


@lru_cache(maxsize=4)
def _sizes(schema: GraphQLSchema) -> Mapping[str, float]:
    """How many values the fields of introspection lead to, on the average of all types."""
    types = schema.type_map.values()
    fields = [
        field
        for kind in types
        if isinstance(kind, GraphQLObjectType | GraphQLInterfaceType)
        for field in kind.fields.values()
    ]
    lengths = {
        "fields": len(fields),
        "interfaces": sum(len(kind.interfaces) for kind in types if isinstance(kind, GraphQLObjectType)),
        "inputFields": sum(len(kind.fields) for kind in types if isinstance(kind, GraphQLInputObjectType)),
        "enumValues": sum(len(kind.values) for kind in types if isinstance(kind, GraphQLEnumType)),
        "possibleTypes": sum(len(schema.get_possible_types(kind)) for kind in types if is_abstract_type(kind)),
    }
    return {
        "types": len(types),
        "directives": len(schema.directives),
        "type": 2.0,  # fields are more often of the large types
        "ofType": 0.5,  # every second type ends such a chain
        "args": sum(len(field.args) for field in fields) / max(len(fields), 1),
        **{name: length / len(types) for name, length in lengths.items()},
    }


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
