"""The schema, put together; `schema.graphql` at the root is its printed form and the contract with clients."""

from itertools import chain

import strawberry
from graphql import GraphQLInputObjectType, GraphQLInterfaceType, GraphQLObjectType, GraphQLSchema, Undefined
from strawberry.schema.config import StrawberryConfig

from app.graphql.access import require_statements
from app.graphql.executor import Executor, shorten
from app.graphql.mutations import Mutation
from app.graphql.queries import Query
from app.graphql.refusals import HANDLERS
from app.graphql.scalars import SCALARS
from app.graphql.subscriptions import Subscription
from app.graphql.types import Feedback, Member, Offer, WebhookDelivery, WebhookEndpoint

require_statements(Query, Mutation, Subscription)

SCHEMA = strawberry.Schema(
    query=Query,
    mutation=Mutation,
    subscription=Subscription,
    types=[Feedback, Member, Offer, WebhookDelivery, WebhookEndpoint],
    exception_handlers=HANDLERS,
    execution_context_class=Executor,
    config=StrawberryConfig(scalar_map=dict(SCALARS)),
)


def _drop_null_defaults(schema: GraphQLSchema) -> None:
    """Take `= null` away from what may be left out: to resolvers the two are the same, and Relay's compiler refuses
    some documents where an argument has a default."""
    for kind in schema.type_map.values():
        if isinstance(kind, GraphQLObjectType | GraphQLInterfaceType):
            values = chain.from_iterable(field.args.values() for field in kind.fields.values())
        elif isinstance(kind, GraphQLInputObjectType):
            values = iter(kind.fields.values())
        else:
            continue
        for value in values:
            if value.default_value is None:
                value.default_value = Undefined


_drop_null_defaults(SCHEMA._schema)
shorten(SCHEMA._schema)


def printed() -> str:
    """The schema in GraphQL's own language, as `schema.graphql` has it."""
    return SCHEMA.as_str().rstrip() + "\n"
