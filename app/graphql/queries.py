"""What can be asked. Thin: find out who asks, read, show."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

import strawberry

from app import accounts, auth, breaker, deletion, enforcement, errors, halts, outbox, webhooks
from app.accounts import AccountFilter, AccountSort, RequestFilter
from app.auth import Caller
from app.graphql import nodes
from app.graphql.access import Access, root
from app.graphql.context import Info
from app.graphql.enums import SortDirection
from app.graphql.nodes import Keyset, Kind
from app.graphql.types import (
    REQUESTS_OLDEST_FIRST,
    Account,
    After,
    CancellationPreview,
    CancellationRequest,
    Connection,
    DeletionBreaker,
    DeletionHalt,
    Delivery,
    Enforcement,
    Feedback,
    FeedbackReasonLabel,
    First,
    Member,
    Node,
    Offer,
    Perspective,
    Plan,
    WebhookDelivery,
    WebhookEndpoint,
    WebhookEvent,
    connection,
    describe,
)
from app.lifecycle import (
    OPEN_REQUEST,
    AccountStatus,
    FeedbackReason,
    MemberRole,
    Permission,
    RequestStatus,
    Scope,
    StaffRole,
    TransitionType,
)

MAX_SEARCH_LENGTH = 200

_BY = {
    (AccountSort.NAME, False): Keyset(name="accounts:name", types=(str, UUID)),
    (AccountSort.NAME, True): Keyset(name="accounts:name:desc", types=(str, UUID)),
    (AccountSort.CREATED_AT, False): Keyset(name="accounts:created", types=(datetime, UUID)),
    (AccountSort.CREATED_AT, True): Keyset(name="accounts:created:desc", types=(datetime, UUID)),
    (AccountSort.DELETION_SCHEDULED_FOR, False): Keyset(name="accounts:deletion", types=(datetime, UUID)),
    (AccountSort.DELETION_SCHEDULED_FOR, True): Keyset(name="accounts:deletion:desc", types=(datetime, UUID)),
}
_SORT_ATTRIBUTE = {
    AccountSort.NAME: "name",
    AccountSort.CREATED_AT: "created_at",
    AccountSort.DELETION_SCHEDULED_FOR: "deletion_scheduled_for",
}
_DELETIONS = Keyset(name="deletions:restartable_until", types=(datetime, UUID))
_ENFORCEMENTS = Keyset(name="enforcements:due", types=(datetime, UUID))
_DELIVERIES = Keyset(name="deliveries:created:desc", types=(datetime, UUID))
_ENDPOINTS = Keyset(name="webhook_endpoints:created", types=(datetime, UUID))
_WEBHOOK_DELIVERIES = Keyset(name="webhook_deliveries:created:desc", types=(datetime, UUID))
_MEMBERSHIPS = Keyset(name="memberships:name", types=(str, UUID))


@strawberry.type(description="What the caller is in one account.")
class Membership:
    account: Account = describe("The account.")
    member: Member = describe("The caller, as the account knows them.")
    role: MemberRole = describe("The caller's role.")
    permissions: list[Permission] = describe("What was granted to the caller.")
    has_billing_permission: bool = describe('Whether the caller has "Access billing & account info".')


@strawberry.type(description="Who asks.")
class Viewer:
    _caller: strawberry.Private[Caller]
    name: str | None = describe("The caller's name, where staff or a service; a member's is in their accounts.")
    email: str | None = describe("The caller's address, where staff.")
    staff_role: StaffRole | None = describe("The caller's role, where staff.")
    service_scopes: list[Scope] | None = describe("What the caller may do, where a service.")

    @strawberry.field(description="The accounts that the caller is a member of and has access to, by name.")
    async def memberships(self, info: Info, first: First = None, after: After = None) -> Connection[Membership]:
        size, position = nodes.page_size(first), _MEMBERSHIPS.position(after)
        identity, policy = self._caller.identity, info.context.policy
        views = await accounts.page(
            AccountFilter(
                person=(identity.issuer, identity.subject),
                with_access=True,
            ),
            sort=AccountSort.NAME,
            descending=False,
            after=position,
            limit=size + 1,
        )
        members = await accounts.memberships(identity.issuer, identity.subject, [view.id for view in views])

        def membership(view: accounts.AccountView) -> Membership:
            member = members[view.id]
            shown = Member.of(member)
            return Membership(
                account=Account.of(view, Perspective.on(self._caller, policy, view, member)),
                member=shown,
                role=shown.role,
                permissions=shown.permissions,
                has_billing_permission=shown.has_billing_permission,
            )

        listed = [view for view in views if view.id in members]
        return connection(listed, size, after, lambda view: _MEMBERSHIPS.cursor(view.name, view.id), membership)


@strawberry.input(description="Which accounts. Every field that is given narrows the list.")
class AccountFilterInput:
    statuses: list[AccountStatus] | None = strawberry.field(default=None, description="In one of these statuses.")
    plan_codes: list[str] | None = strawberry.field(default=None, description="On one of these plans.")
    csm_email: str | None = strawberry.field(default=None, description="Of this Customer Success Manager.")
    request_statuses: list[RequestStatus] | None = strawberry.field(
        default=None, description="With a request, open or past, in one of these statuses."
    )
    deletion_scheduled_from: datetime | None = strawberry.field(
        default=None, description="With a deletion date at this time or later."
    )
    deletion_scheduled_before: datetime | None = strawberry.field(
        default=None, description="With a deletion date before this time."
    )
    restart_requested: bool | None = strawberry.field(
        default=None, description="Whether a former member has asked for a restart since the cancellation."
    )


@strawberry.input(description="The order of a list of accounts.")
class AccountSortInput:
    field: AccountSort = strawberry.field(description="What to sort by.")
    direction: SortDirection = strawberry.field(description="Which end comes first.")


@strawberry.input(description="Which requests. Every field that is given narrows the list.")
class CancellationRequestFilterInput:
    statuses: list[RequestStatus] | None = strawberry.field(
        default=None, description="In one of these statuses; left out: the open ones."
    )
    mine: bool | None = strawberry.field(
        default=None,
        description="Only requests of accounts whose Customer Success Manager is the caller, and of accounts that "
        "have none.",
    )


@strawberry.input(description="Which deliveries. Every field that is given narrows the list.")
class DeliveryFilterInput:
    states: list[outbox.State] | None = strawberry.field(default=None, description="In one of these states.")
    account_id: strawberry.ID | None = strawberry.field(default=None, description="About this account.")


@strawberry.input(description="Which systems' enforcement. Every field that is given narrows the list.")
class EnforcementFilterInput:
    statuses: list[enforcement.Status] | None = strawberry.field(
        default=None, description="In one of these statuses; left out: PENDING."
    )
    late: bool | None = strawberry.field(default=None, description="Whether it is late.")
    system: str | None = strawberry.field(default=None, description="Of the system with this code.")


@strawberry.input(description="Which deliveries of events. Every field that is given narrows the list.")
class WebhookDeliveryFilterInput:
    endpoint_id: strawberry.ID | None = strawberry.field(default=None, description="To this endpoint.")
    account_id: strawberry.ID | None = strawberry.field(default=None, description="About this account.")
    states: list[webhooks.State] | None = strawberry.field(default=None, description="In one of these states.")


def _some(values: list[str] | None, argument: str) -> frozenset[str] | None:
    if values is None:
        return None
    if len(values) > 100:
        raise errors.BadUserInput(f"`{argument}` has at most 100 values.", argument=argument)
    return frozenset(values)


@strawberry.type(name="Query", description="What can be asked. Every field says whom it is for.")
class Query:
    @root(Access.KNOWN, "Who asks, and in which accounts.")
    async def viewer(self, info: Info) -> Viewer | None:
        caller = await auth.require_known(info.context.call)
        staff, service = caller.staff, caller.service
        return Viewer(
            _caller=caller,
            name=staff.name if staff else service.name if service else None,
            email=staff.email if staff else None,
            staff_role=staff.role if staff else None,
            service_scopes=[Scope(scope) for scope in sorted(service.scopes)] if service else None,
        )

    @root(Access.MEMBERS_AND_STAFF, "One account; null when it does not exist or is not the caller's.")
    async def account(
        self, info: Info, id: Annotated[strawberry.ID, strawberry.argument(description="The account's id.")]
    ) -> Account | None:
        caller = await auth.identify(info.context.call, nodes.decode_as(Kind.ACCOUNT, id))
        view = caller.see()
        return None if view is None else Account.of(view, Perspective.of(caller, info.context.policy))

    @root(Access.STAFF, "Accounts, by name unless sorted otherwise.")
    async def accounts(
        self,
        info: Info,
        filter: Annotated[AccountFilterInput | None, strawberry.argument(description="Which.")] = None,
        search: Annotated[
            str | None,
            strawberry.argument(
                description="A part of the name, the reference, or a member's address, in any case; at most 200 "
                "characters."
            ),
        ] = None,
        sort: Annotated[AccountSortInput | None, strawberry.argument(description="In which order.")] = None,
        first: First = None,
        after: After = None,
    ) -> Connection[Account] | None:
        caller = await auth.require_staff(info.context.call)
        if search is not None and len(search) > MAX_SEARCH_LENGTH:
            raise errors.BadUserInput(f"`search` has at most {MAX_SEARCH_LENGTH} characters.", argument="search")
        order = sort.field if sort else AccountSort.NAME
        descending = sort is not None and sort.direction is SortDirection.DESC
        keyset, attribute = _BY[order, descending], _SORT_ATTRIBUTE[order]
        size, position = nodes.page_size(first), keyset.position(after)
        given = filter or AccountFilterInput()
        views = await accounts.page(
            AccountFilter(
                statuses=None if given.statuses is None else frozenset(given.statuses),
                plan_codes=_some(given.plan_codes, "planCodes"),
                csm_email=given.csm_email,
                request_statuses=None if given.request_statuses is None else frozenset(given.request_statuses),
                deletion_from=given.deletion_scheduled_from,
                deletion_before=given.deletion_scheduled_before,
                restart_requested=given.restart_requested,
                search=search,
            ),
            sort=order,
            descending=descending,
            after=position,
            limit=size + 1,
        )
        policy = info.context.policy
        return connection(
            views,
            size,
            after,
            lambda view: keyset.cursor(getattr(view, attribute), view.id),
            lambda view: Account.of(view, Perspective.on(caller, policy, view)),
        )

    @root(Access.STAFF, "Cancellation requests of all accounts, longest waiting first: the Customer Success queue.")
    async def cancellation_requests(
        self,
        info: Info,
        filter: Annotated[CancellationRequestFilterInput | None, strawberry.argument(description="Which.")] = None,
        first: First = None,
        after: After = None,
    ) -> Connection[CancellationRequest] | None:
        caller = await auth.require_staff(info.context.call)
        assert caller.staff is not None
        keyset = REQUESTS_OLDEST_FIRST
        size, position = nodes.page_size(first), keyset.position(after)
        given = filter or CancellationRequestFilterInput()
        mine = caller.staff.id if given.mine else None
        views = await accounts.request_page(
            RequestFilter(statuses=OPEN_REQUEST if given.statuses is None else frozenset(given.statuses), csm_id=mine),
            after=position,
            limit=size + 1,
        )
        eye = Perspective.of(caller, info.context.policy)
        return connection(
            views,
            size,
            after,
            lambda view: keyset.cursor(view.requested_at, view.id),
            lambda view: CancellationRequest.of(view, eye),
        )

    @root(
        Access.STAFF,
        "Canceled accounts by the end of their retention window: what is to be deleted, is being deleted, and was.",
    )
    async def deletions(
        self,
        info: Info,
        states: Annotated[
            list[deletion.State] | None,
            strawberry.argument(description="In one of these states; left out: in all but DELETED."),
        ] = None,
        first: First = None,
        after: After = None,
    ) -> Connection[Account] | None:
        caller = await auth.require_staff(info.context.call)
        size, position = nodes.page_size(first), _DELETIONS.position(after)
        wanted = frozenset(deletion.State) - {deletion.State.DELETED} if states is None else frozenset(states)
        views = await deletion.page(wanted, after=position, limit=size + 1)
        policy = info.context.policy
        return connection(
            views,
            size,
            after,
            lambda view: _DELETIONS.cursor(view.restartable_until, view.id),
            lambda view: Account.of(view, Perspective.on(caller, policy, view)),
        )

    @root(Access.STAFF, "Whether deletions may begin, or have stopped because too many fell due.")
    async def deletion_breaker(self, info: Info) -> DeletionBreaker | None:
        caller, policy = await auth.require_staff(info.context.call), info.context.policy
        return DeletionBreaker.of(await breaker.read(policy, exact=True), Perspective.of(caller, policy))

    @root(Access.STAFF, "What else than the breaker stops all deletions, oldest first: an operator, or a restore.")
    async def deletion_halts(self, info: Info) -> list[DeletionHalt] | None:
        eye = Perspective.of(await auth.require_staff(info.context.call), info.context.policy)
        return [DeletionHalt.of(view, eye) for view in await halts.current()]

    @root(Access.STAFF, "What canceled accounts wait for systems to acknowledge, by when it is due: who has obeyed.")
    async def enforcements(
        self,
        info: Info,
        filter: Annotated[EnforcementFilterInput | None, strawberry.argument(description="Which.")] = None,
        first: First = None,
        after: After = None,
    ) -> Connection[Enforcement] | None:
        caller = await auth.require_staff(info.context.call)
        size, position = nodes.page_size(first), _ENFORCEMENTS.position(after)
        given = filter or EnforcementFilterInput()
        views = await enforcement.page(
            info.context.policy,
            {enforcement.Status.PENDING} if given.statuses is None else given.statuses,
            now=caller.now,
            system=given.system,
            late=given.late,
            after=position,
            limit=size + 1,
        )
        eye = Perspective.of(caller, info.context.policy)
        return connection(
            views,
            size,
            after,
            lambda view: _ENFORCEMENTS.cursor(view.due_at, view.id),
            lambda view: Enforcement.of(view, eye),
        )

    @root(Access.STAFF, "Emails that were promised, newest first, with what became of each: dead letters, for example.")
    async def deliveries(
        self,
        info: Info,
        filter: Annotated[DeliveryFilterInput | None, strawberry.argument(description="Which.")] = None,
        first: First = None,
        after: After = None,
    ) -> Connection[Delivery] | None:
        caller = await auth.require_staff(info.context.call)
        size, position = nodes.page_size(first), _DELIVERIES.position(after)
        given = filter or DeliveryFilterInput()
        account_id = None if given.account_id is None else nodes.decode_as(Kind.ACCOUNT, given.account_id)
        views = []
        if given.account_id is None or account_id is not None:  # what no id can mean, no message is about
            views = await outbox.page(
                None if given.states is None else frozenset(given.states),
                account_id=account_id,
                after=position,
                limit=size + 1,
            )
        eye = Perspective.of(caller, info.context.policy)
        return connection(
            views,
            size,
            after,
            lambda view: _DELIVERIES.cursor(view.created_at, view.id),
            lambda view: Delivery.of(view, eye),
        )

    @root(Access.KNOWN, "The events that webhook endpoints are told of, in the order in which they happen.")
    async def event_types(self, info: Info) -> list[WebhookEvent] | None:
        await info.context.require_caller()
        return [WebhookEvent.of(kind) for kind in TransitionType]

    @root(Access.WEBHOOK_READERS, "The webhook endpoints, oldest first.")
    async def webhook_endpoints(
        self, info: Info, first: First = None, after: After = None
    ) -> Connection[WebhookEndpoint] | None:
        await auth.require_webhook_reader(info.context.call)
        size, position = nodes.page_size(first), _ENDPOINTS.position(after)
        views = await webhooks.endpoints(after=position, limit=size + 1)
        return connection(
            views, size, after, lambda view: _ENDPOINTS.cursor(view.created_at, view.id), WebhookEndpoint.of
        )

    @root(Access.WEBHOOK_READERS, "Events that were promised to endpoints, newest first, with what became of each.")
    async def webhook_deliveries(
        self,
        info: Info,
        filter: Annotated[WebhookDeliveryFilterInput | None, strawberry.argument(description="Which.")] = None,
        first: First = None,
        after: After = None,
    ) -> Connection[WebhookDelivery] | None:
        await auth.require_webhook_reader(info.context.call)
        size, position = nodes.page_size(first), _WEBHOOK_DELIVERIES.position(after)
        given = filter or WebhookDeliveryFilterInput()
        endpoint_id = nodes.decode_as(Kind.WEBHOOK_ENDPOINT, given.endpoint_id or "")
        account_id = nodes.decode_as(Kind.ACCOUNT, given.account_id or "")
        meaningless = (given.endpoint_id is not None and endpoint_id is None) or (
            given.account_id is not None and account_id is None
        )
        views = []
        if not meaningless:  # what no id can mean, nothing is about
            views = await webhooks.page(
                endpoint_id=endpoint_id,
                account_id=account_id,
                states=None if given.states is None else frozenset(given.states),
                after=position,
                limit=size + 1,
            )
        return connection(
            views,
            size,
            after,
            lambda view: _WEBHOOK_DELIVERIES.cursor(view.created_at, view.id),
            WebhookDelivery.of,
        )

    @root(Access.BILLING, "What a cancellation confirmed now would do: who loses access, until when it can be undone.")
    async def cancellation_preview(
        self,
        info: Info,
        account_id: Annotated[strawberry.ID, strawberry.argument(description="The account's id.")],
        reason: Annotated[
            FeedbackReason | None, strawberry.argument(description="Chooses which alternatives are offered.")
        ] = None,
    ) -> CancellationPreview | None:
        caller = await auth.identify(info.context.call, nodes.decode_as(Kind.ACCOUNT, account_id))
        view = caller.see()
        if view is None:
            return None
        eye = Perspective.of(caller, info.context.policy)
        eye.require_billing()
        if view.status is not AccountStatus.ACTIVE:
            return None
        return CancellationPreview(_view=view, _eye=eye, _reason=reason, _members=await accounts.member_count(view.id))

    @root(Access.KNOWN, "The plans, and how each is canceled.")
    async def plans(self, info: Info) -> list[Plan] | None:
        await info.context.require_caller()
        policy = info.context.policy
        return [Plan.of(plan, policy) for plan in policy.plans.values()]

    @root(Access.KNOWN, "The reasons to choose from, in the order to show them.")
    async def feedback_reasons(self, info: Info) -> list[FeedbackReasonLabel] | None:
        await info.context.require_caller()
        return [FeedbackReasonLabel(reason=one.code, label=one.label) for one in info.context.policy.reasons]

    @root(
        Access.MEMBERS_AND_STAFF,
        "The object with that id; null when there is none, or it is not the caller's. What belongs to a cancellation "
        "needs the billing permission, and is null without; what belongs to webhooks is for staff, and services with "
        "the scope `webhooks`.",
    )
    async def node(
        self, info: Info, id: Annotated[strawberry.ID, strawberry.argument(description="Any object's id.")]
    ) -> Node | None:
        named = nodes.decode(id)
        if named is not None and named[0] in _WEBHOOKS:
            return await _of_webhooks(info, *named)
        kind, key = named or (None, None)
        row = None if kind is None or key is None else await _LOAD[kind](key)
        account_id = None if row is None else row.id if isinstance(row, accounts.AccountView) else row.account_id
        caller = await auth.identify(info.context.call, account_id)
        view = caller.see()
        if view is None or row is None:
            return None
        eye = Perspective.of(caller, info.context.policy)
        if isinstance(row, accounts.AccountView):
            return Account.of(view, eye)
        if not eye.sees_billing:
            return None
        if isinstance(row, accounts.RequestView):
            return CancellationRequest.of(row, eye)
        if isinstance(row, accounts.FeedbackView):
            return Feedback.of(row)
        if isinstance(row, accounts.OfferView):
            return Offer.of(row)
        return Member.of(row)


_WEBHOOKS = frozenset({Kind.WEBHOOK_ENDPOINT, Kind.WEBHOOK_DELIVERY})


async def _of_webhooks(info: Info, kind: Kind, key: UUID) -> Node | None:
    caller = await auth.identify(info.context.call)
    if not caller.sees_webhooks():
        return None
    if kind is Kind.WEBHOOK_ENDPOINT:
        endpoint = await webhooks.endpoint(key)
        return None if endpoint is None else WebhookEndpoint.of(endpoint)
    delivery = await webhooks.delivery(key)
    return None if delivery is None else WebhookDelivery.of(delivery)


_LOAD = {
    Kind.ACCOUNT: accounts.load,
    Kind.CANCELLATION_REQUEST: accounts.load_request,
    Kind.FEEDBACK: accounts.load_feedback,
    Kind.OFFER: accounts.load_offer,
    Kind.MEMBER: accounts.load_member,
}
