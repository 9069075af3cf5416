"""The schema, put together; `schema.graphql` at the root is its printed form and the contract with clients."""

import strawberry
from strawberry.schema.config import StrawberryConfig

from app.graphql.access import require_statements
from app.graphql.mutations import Mutation
from app.graphql.queries import Query
from app.graphql.refusals import HANDLERS
from app.graphql.scalars import SCALARS
from app.graphql.types import Feedback, Member, Offer

require_statements(Query, Mutation)

SCHEMA = strawberry.Schema(
    query=Query,
    mutation=Mutation,
    types=[Feedback, Member, Offer],
    exception_handlers=HANDLERS,
    config=StrawberryConfig(scalar_map=dict(SCALARS)),
)


def printed() -> str:
    """The schema in GraphQL's own language, as `schema.graphql` has it."""
    return SCHEMA.as_str().rstrip() + "\n"
