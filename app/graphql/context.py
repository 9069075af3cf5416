"""What resolvers see as `info.context`: the call, and loaders: nested lists cost a constant number of queries."""

from collections.abc import Awaitable, Callable, Hashable, Sequence
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, TypeVar
from uuid import UUID

import strawberry
from strawberry.dataloader import DataLoader

from app import accounts, deletion, enforcement, history
from app.accounts import FeedbackView, MemberView, OfferView, Person, RequestView
from app.auth import Call, require_known
from app.history import TransitionView
from app.policy import Policy

V = TypeVar("V")
Slice = tuple[UUID, tuple[Any, ...] | None, int]
"""An account, the position that its page begins behind, and the page's length."""


class Context:
    """One request's context, or one event's. Its loaders live no longer: nothing read for one caller serves another.

    `authenticate` verifies again, for a subscription, whose call it is. `sends_batches` says whether they provision:
    their requests may be large."""

    def __init__(self, call: Call, authenticate: Callable[[], Awaitable[Call]], *, sends_batches: bool) -> None:
        self.call = call
        self.sends_batches = sends_batches
        self._authenticate = authenticate

    @property
    def policy(self) -> Policy:
        return self.call.policy

    @property
    def caller(self) -> Hashable:
        """Whose token it is, before anything else is known of them: a person's, or, apart from them, an emailed
        link's, which others may have."""
        identity = self.call.identity
        return identity.grant or (identity.issuer, identity.subject)

    @property
    def lifetime(self) -> timedelta:
        """For how long their token is good."""
        return self.call.installation.tokens.lifetime_left(self.call.identity)

    async def require_caller(self) -> None:
        """Refuse who is not known, or has lost access, before anything of the schema is answered."""
        await require_known(self.call)

    def forget(self) -> None:
        """Begin with empty loaders: a mutation has changed what an earlier one of the same document had read."""
        self.__dict__ = {name: self.__dict__[name] for name in ("call", "sends_batches", "_authenticate")}

    async def renew(self) -> Call:
        """Begin anew with the next event of a subscription: with empty loaders, and a caller whose token still holds.
        Raises `Unauthenticated`."""
        self.call = await self._authenticate()
        self.forget()
        return self.call

    @cached_property
    def feedback(self) -> DataLoader[UUID, list[FeedbackView]]:
        return _by_id(accounts.feedback_of)

    @cached_property
    def offers(self) -> DataLoader[UUID, list[OfferView]]:
        return _by_id(accounts.offers_of)

    @cached_property
    def people(self) -> DataLoader[UUID, Person | None]:
        return _by_id_or_none(accounts.people)

    @cached_property
    def accounts(self) -> DataLoader[UUID, accounts.AccountView | None]:
        return _by_id_or_none(accounts.load_many)

    @cached_property
    def restart_requested_at(self) -> DataLoader[UUID, datetime | None]:
        return _by_id_or_none(accounts.restart_requested_at)

    @cached_property
    def deletions(self) -> DataLoader[UUID, deletion.Details]:
        return _by_id(deletion.details)

    @cached_property
    def enforcement(self) -> DataLoader[UUID, list[enforcement.EnforcementView]]:
        return _by_id(enforcement.of)

    @cached_property
    def requests(self) -> DataLoader[Slice, list[RequestView]]:
        return _sliced(accounts.request_history)

    @cached_property
    def members(self) -> DataLoader[Slice, list[MemberView]]:
        return _sliced(accounts.members_of)

    @cached_property
    def transitions(self) -> DataLoader[Slice, list[TransitionView]]:
        return _sliced(history.of)


Info = strawberry.Info[Context, None]


def _by_id(load: Callable[[Sequence[UUID]], Awaitable[dict[UUID, V]]]) -> DataLoader[UUID, V]:
    async def batch(ids: list[UUID]) -> list[V]:
        found = await load(ids)
        return [found[id_] for id_ in ids]

    return DataLoader(load_fn=batch)


def _by_id_or_none(load: Callable[[Sequence[UUID]], Awaitable[dict[UUID, V]]]) -> DataLoader[UUID, V | None]:
    async def batch(ids: list[UUID]) -> list[V | None]:
        found = await load(ids)
        return [found.get(id_) for id_ in ids]

    return DataLoader(load_fn=batch)


def _sliced(load: Callable[..., Awaitable[dict[UUID, list[V]]]]) -> DataLoader[Slice, list[V]]:
    """Pages of many accounts: one statement for all that ask for the same page, as the rows of a list do."""

    async def batch(slices: list[Slice]) -> list[list[V]]:
        found: dict[Slice, list[V]] = {}
        for after, limit in {(after, limit) for _, after, limit in slices}:
            ids = [id_ for id_, after_, limit_ in slices if (after_, limit_) == (after, limit)]
            pages = await load(ids, after=after, limit=limit)
            found.update({(id_, after, limit): pages[id_] for id_ in ids})
        return [found[one] for one in slices]

    return DataLoader(load_fn=batch)
