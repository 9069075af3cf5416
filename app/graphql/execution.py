"""One operation, from what a client asks for to what it is answered, whatever carries the two.

Operations are executed by graphql-core on Strawberry's schema, without Strawberry's own `execute`: that one parses and
validates each time, builds extension runners and cannot tell a refused operation from an executed one. What Strawberry
adds to resolvers, its exception handlers included, lives in the fields and works the same.

Of an error only what was written for clients is shown; everything else is logged whole and masked. This module knows
no transport, and not the schema's fields, tokens or rows: who asks is the business of the context that it is given.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from inspect import isawaitable
from typing import Any, Final, Generic, TypeVar, cast

import orjson
import strawberry
import structlog
from graphql import ExecutionResult, GraphQLError, create_source_event_stream
from graphql import Executor as GraphQLExecutor
from graphql.language import ValueNode
from strawberry.exceptions import StrawberryInputCoercionError
from strawberry.execution.is_awaitable import optimized_is_awaitable

from app import db, errors, metrics
from app.errors import RateLimited
from app.graphql import scalars
from app.graphql.allowance import Allowance
from app.graphql.documents import (
    MAX_ERRORS,
    UNREADABLE,
    Document,
    Documents,
    Operation,
    Rejection,
    formatted,
    innermost,
)
from app.graphql.executor import Executor
from app.graphql.limits import Budget, Limits

_log = structlog.stdlib.get_logger(__name__)

SLOWEST_SECONDS: Final = 30.0
"""How long something that is said on a stream may wait for a client that does not read; then the stream is over."""
_MASKED: Final = "Something went wrong on our side, and it is recorded. Please quote the request id if it persists."

Context = TypeVar("Context")


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a client asks to execute, well-formed, and not yet checked against the schema."""

    query: str
    operation_name: str | None
    variables: dict[str, Any] | None


class Malformed(Exception):
    """What a client has sent is unusable before it is looked at as GraphQL. The message is written for clients."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of an operation, or of one event of a subscription."""

    errors: Sequence[Mapping[str, Any]]
    """In GraphQL's form, as clients may see them."""
    data: Mapping[str, Any] | None = None
    executed: bool = True
    """False: refused before execution; there is no `data` then, not even null."""
    results: Sequence[tuple[str, str]] = ((metrics.NOT_EXECUTED, metrics.OK),)
    """What came of each root field, for who counts."""
    limited: Mapping[str | int, RateLimited] | None = None
    """The root fields, by their keys in the answer, that were refused because too much was asked for."""

    @property
    def code(self) -> str:
        """Of an answer that was not executed: why, by its first error."""
        code: str = self.errors[0]["extensions"]["code"]
        return code

    def body(self) -> dict[str, Any]:
        if not self.executed:
            return {"errors": self.errors}
        return {"errors": self.errors, "data": self.data} if self.errors else {"data": self.data}


@dataclass(frozen=True, slots=True)
class Prepared:
    """An operation that is valid and within the limits, ready to execute."""

    document: Document
    operation: Operation
    parameters: Parameters


class Operations(Generic[Context]):
    """What clients can execute on one schema.

    `gate` is awaited before operations that could answer something without any resolver having looked at the caller,
    such as introspection: it raises a `RequestError` for callers who may not use the schema at all.

    `refusals` are the names of the types that stand for an expected refusal; answers of one are counted as such.

    `new_documents` is how many documents that are not remembered, or ask for the schema itself, one caller may send in
    a minute, each counted once for every 1,000 characters that it begins; 0: no limit.

    `timeout` bounds `gate` and the execution together, and that of each event of a subscription: what takes longer is
    canceled and raises `Unavailable`, like a database that is away.
    """

    def __init__(
        self,
        schema: strawberry.Schema,
        *,
        gate: Callable[[Context], Awaitable[None]],
        refusals: Collection[str] = frozenset(),
        limits: Limits | None = None,
        new_documents: int = 0,
        timeout: timedelta = timedelta(seconds=10),
    ) -> None:
        if schema.extensions or schema.directives:
            raise ValueError("schema extensions and custom operation directives are not run here")
        self.limits = limits or Limits()
        self.timeout = timeout
        self.documents = Documents(schema._schema, self.limits)
        self._schema = schema
        self._gate = gate
        self._refusals = refusals
        self._allowance = Allowance(new_documents)

    def prepare(self, parameters: Parameters, caller: Hashable) -> Prepared | Answer:
        """The operation to execute, or the answer that refuses it. Raises `RateLimited` when the document is new, or
        asks for the schema itself, and the caller has sent too many of those."""
        units = 1 + len(parameters.query) // 1_000
        document = self.documents.remembered(parameters.query)
        is_new = document is None
        if document is None:
            self._allowance.spend(caller, units)
            document = self.documents.prepare(parameters.query)
        if isinstance(document, Rejection):
            return _refusing(document.errors)
        try:
            operation = document.select(parameters.operation_name)
            _refuse_long_lists(parameters.variables or {}, self.limits.list_items)
        except errors.BadUserInput as refusal:
            return refused(refusal)
        if operation.introspects and not is_new:
            self._allowance.spend(caller, units)
        return Prepared(document, operation, parameters)

    async def execute(self, prepared: Prepared, context: Context, request_id: str) -> Answer:
        """Execute a query or a mutation.

        Raises `Unavailable` rather than answering by halves: without its database the service is down, and half an
        answer would hide it from clients and balancers.
        """
        async with db.deadline(self.timeout):
            if prepared.operation.needs_gate:
                await self._gate(context)
            shown = _Shown(request_id)
            executor = self._executor(prepared, context, shown)
            if isinstance(executor, Answer):
                return executor
            return await self._run(executor, prepared.operation, shown)

    async def subscribe(
        self,
        prepared: Prepared,
        context: Context,
        request_id: str,
        *,
        turn: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> AsyncGenerator[Answer, None]:
        """Answer a subscription's events, one at a time: the next is looked for when this one was taken. `turn` is
        entered before an event is answered, and left when the answer was taken.

        A subscription that is refused, at its beginning or later, ends with an answer that was not executed. Where
        the client had better begin anew, it is raised: `Unauthenticated` when the caller's token does not hold any
        more, `Unavailable` when the database goes away while an event is executed, or the service is stopping.
        """
        outcome = "left"
        metrics.subscription_begun()
        try:
            async with aclosing(self._events(prepared, context, _Shown(request_id), turn)) as answers:
                async for answer in answers:
                    metrics.subscription_told()
                    outcome = "left" if answer.executed else answer.code
                    yield answer
        except errors.RequestError as refusal:
            outcome = refusal.code
            if isinstance(refusal, errors.Unavailable | errors.Unauthenticated):
                raise
            yield refused(refusal)
        except Exception as failure:
            _log.error("graphql.subscription_failed", exc_info=failure)
            answer = failed(request_id)
            outcome = answer.code
            yield answer
        finally:
            metrics.subscription_ended(outcome)

    async def _events(
        self,
        prepared: Prepared,
        context: Context,
        shown: "_Shown",
        turn: Callable[[], AbstractAsyncContextManager[None]],
    ) -> AsyncGenerator[Answer, None]:
        if prepared.operation.needs_gate:
            async with db.deadline(self.timeout):
                await self._gate(context)
        executor = self._executor(prepared, context, shown)
        if isinstance(executor, Answer):
            yield executor
            return
        source = create_source_event_stream(executor)
        if isawaitable(source):
            source = await source
        if isinstance(source, ExecutionResult):
            yield _refusing(list(map(shown.of, source.errors or ())))
            return
        async with aclosing(cast("AsyncGenerator[Any, None]", source)) as events:
            async for event in events:
                async with turn():
                    async with db.deadline(self.timeout):
                        answer = await self._run(executor.build_per_event_executor(event), prepared.operation, shown)
                    yield answer

    def _executor(self, prepared: Prepared, context: Context, shown: "_Shown") -> GraphQLExecutor[Any] | Answer:
        executor = self._schema.execution_context_class.build(
            self._schema._schema,
            prepared.document.ast,
            context_value=context,
            raw_variable_values=prepared.parameters.variables,
            operation_name=prepared.parameters.operation_name,
            max_coercion_errors=MAX_ERRORS,
            is_awaitable=cast("Any", optimized_is_awaitable),  # the same test, quicker for what resolvers return
            hide_suggestions=True,
        )
        if isinstance(executor, list):
            return _refusing([shown.of(error, coercion=True) for error in executor[:MAX_ERRORS]])
        return executor

    async def _run(self, executor: GraphQLExecutor[Any], operation: Operation, shown: "_Shown") -> Answer:
        result = executor.execute_operation()
        if isawaitable(result):
            result = await result
        assert isinstance(result, ExecutionResult)
        members = executor.members if isinstance(executor, Executor) else {}
        outcomes = {key: kind.name for key, kind in members.items() if kind.name in self._refusals}
        if not result.errors:
            return Answer((), result.data, results=_results(operation.roots, result.data or {}, outcomes))
        limited: dict[str | int, RateLimited] = {}
        for error in result.errors:
            cause = innermost(error)
            if isinstance(cause, errors.Unavailable):
                raise cause
            if isinstance(cause, RateLimited) and error.path is not None:
                limited[error.path[0]] = cause
        told = list(map(shown.of, result.errors))
        outcomes |= {
            error.path[0]: one["extensions"]["code"]
            for error, one in zip(result.errors, told, strict=True)
            if error.path
        }
        results = _results(operation.roots, outcomes if result.data is None else result.data, outcomes)
        return Answer(told, result.data, results=results, limited=limited)

    def count(self, results: Sequence[tuple[str, str]], seconds: float) -> None:
        """Count what became of the root fields of one operation, and how long it took."""
        metrics.answered(results, [one for one in results if one[1] in self._refusals], seconds)


def checked(raw: object) -> Parameters:
    """The parameters of a GraphQL request, read from JSON. Raises `Malformed`."""
    if not isinstance(raw, dict):
        raise Malformed("The request must be one JSON object; batches are not served.")
    query, name, variables = raw.get("query"), raw.get("operationName"), raw.get("variables")
    if not isinstance(query, str):
        raise Malformed("`query` must be given, as a string.")
    if not isinstance(name, str | None):
        raise Malformed("`operationName` must be a string or null.")
    if not isinstance(variables, dict | None):
        raise Malformed("`variables` must be an object or null.")
    if not isinstance(raw.get("extensions"), dict | None):
        raise Malformed("`extensions` must be an object or null.")
    # An empty name is how a query string, and some clients, say that there is none.
    return Parameters(query, name or None, variables)


def parsed(text: bytes | str, what: str, budget: Budget) -> Any:
    """JSON, as it is. Raises `Malformed`, also for more values than the budget allows: those are not parsed at all.

    Each value but the first follows a comma or an opening bracket, and to count these takes a tenth of the time."""
    marks = (",", "[", "{") if isinstance(text, str) else (b",", b"[", b"{")
    if sum(map(text.count, marks)) > budget.values:  # type: ignore[arg-type]  # marks are of the text's kind
        raise Malformed(f"{what} has more than the {budget.values} values (commas and opening brackets) allowed.")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise Malformed(f"{what} is not valid JSON in UTF-8.") from None


def loads(text: bytes | str, what: str, budget: Budget, *, depth: int) -> object:
    """JSON without what no operation can use: deep nesting, U+0000. Raises `Malformed`, as `parsed` does."""
    value: object = parsed(text, what, budget)
    # Only escapes can put a NUL into JSON, and only brackets make it deep: most texts need no walk.
    raw = text.encode() if isinstance(text, str) else text
    if b"\\u0000" in raw or raw.count(b"[") + raw.count(b"{") > depth:
        refuse_deep_or_nul(value, depth)
    return value


def refuse_deep_or_nul(value: object, depth: int) -> None:
    """Raise `Malformed` for lists and objects nested deeper than `depth`, and for U+0000 in any string."""
    level = [value]
    while level:
        if depth < 0:
            raise Malformed("The request nests lists and objects too deeply.")
        depth -= 1
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str) and "\0" in item:
                raise Malformed("The request contains the character U+0000.")
        level = below


def _refuse_long_lists(variables: Mapping[str, Any], longest: int) -> None:
    """Raise `BadUserInput` for a list that no action takes, before each of its items is read as its type."""
    for name, value in variables.items():
        pending = [value]
        while pending:
            item = pending.pop()
            if isinstance(item, dict):
                pending.extend(item.values())
            elif isinstance(item, list):
                if len(item) > longest:
                    raise errors.BadUserInput(f"Variable `${name[:100]}` has a list of more than {longest} items.")
                pending.extend(item)


def dumps(body: Mapping[str, Any]) -> bytes:
    """An answer's body, or a message around it, as JSON."""
    return orjson.dumps(body, _shown_value, orjson.OPT_PASSTHROUGH_DATETIME)


def refused(refusal: errors.RequestError) -> Answer:
    """What a client is told of an operation that is refused as a whole."""
    return _refusing([{"message": refusal.message, "extensions": refusal.extensions}])


def failed(request_id: str) -> Answer:
    """What a client is told of a failure that was logged: nothing, and how to ask about it."""
    return _refusing([{"message": _MASKED, "extensions": _internal(request_id)}])


def _internal(request_id: str) -> dict[str, Any]:
    return {"code": "INTERNAL_SERVER_ERROR", "requestId": request_id}


def _shown_value(value: object) -> str:
    """Times in the extensions of errors look like those in the data."""
    if isinstance(value, datetime):
        return scalars.format_instant(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _refusing(told: Sequence[Mapping[str, Any]]) -> Answer:
    return Answer(told, executed=False, results=((metrics.NOT_EXECUTED, told[0]["extensions"]["code"]),))


def _results(
    roots: Mapping[str, str], answered: Iterable[str | int], outcomes: Mapping[str | int, str]
) -> list[tuple[str, str]]:
    """What came of each root field that was executed. `roots` has their names by their keys in the answer."""
    return [(roots[key], outcomes.get(key, metrics.OK)) for key in answered if isinstance(key, str) and key in roots]


class _Shown:
    """What a client sees of errors: written messages, and a mask over everything else, which is logged once each."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._logged: list[BaseException] = []

    def of(self, error: GraphQLError, *, coercion: bool = False) -> dict[str, Any]:
        """`error` in GraphQL's form. `coercion` says that it comes from reading the variables' values."""
        cause = innermost(error)
        if isinstance(cause, errors.RequestError):
            return formatted(error, cause.extensions, cause.message)
        if isinstance(cause, GraphQLError) and (coercion or _is_coercion(cause)):
            return formatted(error, {"code": errors.BadUserInput.code})
        if isinstance(cause, StrawberryInputCoercionError) or (coercion and isinstance(cause, ValueError)):
            # The value is at fault, and the message was written for developers in Python.
            return formatted(error, {"code": errors.BadUserInput.code}, UNREADABLE)
        # One failure often breaks several fields, for example all that wait for the same batch.
        if not any(cause is logged for logged in self._logged):
            self._logged.append(cause)
            _log.error("graphql.field_failed", path=error.path, exc_info=cause)
        return formatted(error, _internal(self._request_id), _MASKED)


def _is_coercion(cause: GraphQLError) -> bool:
    """Whether graphql-core says that an argument's value is unusable; it shows that value and nothing else.

    graphql-core's other errors point to the field that failed, and show what a resolver returned.
    """
    return isinstance(next(iter(cause.nodes or ()), None), ValueNode)
