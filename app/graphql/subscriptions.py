"""What can be subscribed to. Thin: follow, show."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from typing import Annotated

import strawberry

from app import errors, live
from app.graphql import nodes
from app.graphql.access import Access, root
from app.graphql.context import Info
from app.graphql.nodes import Kind
from app.graphql.types import EPOCH, Account, Perspective, describe
from app.lifecycle import AccountStatus
from app.policy import Policy

MAX_ACCOUNTS = 100


@strawberry.type(
    description="A change of an account, or, as the first that a subscriber is told, how it stands. What `epoch`, "
    "`sequence`, `status` and `occurredAt` say is that change's; the rest is the account's as it is by now."
)
class AccountStatusChange:
    account_id: strawberry.ID = describe("The account's id.")
    reference: str = describe("The host's own name for the account.")
    status: AccountStatus = describe("The account's status after the change.")
    epoch: int = describe(EPOCH)
    sequence: int = describe("Grows by one with each change of the account; 0 before the first.")
    occurred_at: datetime | None = describe("When it changed; null in what a subscriber is told first.")
    can_send_messages: bool = describe("Whether messages may be sent for the account now.")
    members_can_sign_in: bool = describe("Whether its members have access now.")
    account: Account | None = describe("The account as it is now; null for services.")

    @staticmethod
    def of(change: live.Change, policy: Policy) -> "AccountStatusChange":
        view, caller = change.account, change.caller
        has_access = view.has_access(caller.now)
        return AccountStatusChange(
            account_id=strawberry.ID(nodes.encode(Kind.ACCOUNT, view.id)),
            reference=view.reference,
            status=change.status,
            epoch=change.epoch,
            sequence=change.sequence,
            occurred_at=change.occurred_at,
            can_send_messages=has_access,
            members_can_sign_in=has_access,
            account=None if caller.see() is None else Account.of(view, Perspective.of(caller, policy)),
        )


@strawberry.type(
    name="Subscription",
    description="What can be subscribed to, over a WebSocket (`graphql-transport-ws`) or as server-sent events.",
)
class Subscription:
    @root(
        Access.WATCHERS,
        "The status of each account now, then each change of one of them, in the account's order and without gaps, "
        "whichever process made it. Every event is told to who may see the account at that moment: the subscription "
        "ends with an error when the caller loses access to one of the accounts, as members do when it is canceled.",
    )
    async def account_status_changed(
        self,
        info: Info,
        account_ids: Annotated[
            list[strawberry.ID], strawberry.argument(description=f"The accounts' ids: 1 to {MAX_ACCOUNTS}.")
        ],
    ) -> AsyncGenerator[AccountStatusChange | None, None]:
        if not 1 <= len(account_ids) <= MAX_ACCOUNTS:
            raise errors.BadUserInput(f"`accountIds` has 1 to {MAX_ACCOUNTS} ids.", argument="accountIds")
        ids = [nodes.decode_as(Kind.ACCOUNT, one) for one in dict.fromkeys(account_ids)]
        context = info.context
        async with aclosing(live.follow(context.renew, ids, context.call.installation)) as followed:
            async for change in followed:
                yield AccountStatusChange.of(change, context.policy)
