"""What can be done. Thin: read the input, call the action, show what came of it; refusals are mapped in `refusals`."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

import strawberry

from app import (
    accounts,
    auth,
    breaker,
    cancellation,
    clock,
    deletion,
    endpoints,
    enforcement,
    feedback,
    offers,
    provisioning,
    restart,
)
from app.accounts import AccountView
from app.graphql import nodes
from app.graphql.access import Access, root
from app.graphql.context import Info
from app.graphql.enums import describe_enum
from app.graphql.nodes import Kind
from app.graphql.refusals import (
    AccountNameMismatchError,
    AccountStateError,
    AssistedPlanError,
    CancellationAlreadyRequestedError,
    ConfirmationExpiredError,
    ConfirmationTokenInvalidError,
    DeletionsNotHaltedError,
    EnforcementNotAwaitedError,
    IdempotencyConflictError,
    InvalidInputError,
    NotFoundError,
    OfferUnavailableError,
    PermissionDeniedError,
    RequestStateError,
    RestartWindowClosedError,
)
from app.graphql.types import (
    Account,
    CancellationPreview,
    CancellationRequest,
    Contact,
    DeletionBreaker,
    Enforcement,
    Feedback,
    Offer,
    Perspective,
    WebhookDelivery,
    WebhookEndpoint,
    describe,
)
from app.lifecycle import FeedbackReason, MemberRole, Permission, RequestStatus, Scope
from app.provisioning import AccountItem, MemberItem, Outcome

_KEY = (
    "Of the client's choosing, 1 to 255 characters: the same key with the same input has one effect and gives the same "
    "answer."
)


async def _shown(info: Info, view: AccountView) -> Account:
    """The account after the action, through the caller's eyes."""
    info.context.forget()
    caller = await auth.look(info.context.call, view)
    return Account.of(view, Perspective.of(caller, info.context.policy))


async def _request(account: Account, request_id: UUID) -> CancellationRequest:
    view = await accounts.load_request(request_id)
    assert view is not None, "the request was there a moment ago, and requests are never deleted"
    return CancellationRequest.of(view, account._eye)


# -------------------------------------------------------------------------------------------------- cancelAccount


@strawberry.input(description="Asks to cancel an account.")
class CancelAccountInput:
    account_id: strawberry.ID = describe("The account.")
    reason: FeedbackReason | None = strawberry.field(
        default=None, description="Chooses which alternatives are offered; feedback is given with `submitFeedback`."
    )
    note: str | None = strawberry.field(
        default=None, description="Why, at most 2,000 characters. Required of staff, refused from members."
    )
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(description="The cancellation waits for a member's confirmation.")
class CancelAccountSuccess:
    account: Account = describe("The account.")
    request: CancellationRequest = describe("The open request, with what is offered instead.")
    confirmation_token: str | None = describe(
        "What `confirmCancellation` wants, from this member or another with the permission. Null for staff, who never "
        "confirms: the members got a link by email."
    )
    preview: CancellationPreview = describe("What confirming would do.")


@strawberry.type(description="The Customer Success Manager was asked, and will be in touch.")
class CancellationAssistanceRequested:
    account: Account = describe("The account.")
    request: CancellationRequest = describe("The open request.")
    customer_success_manager: Contact = describe("Who will be in touch.")
    received_at: datetime = describe("When the request was received.")
    respond_by: datetime = describe("Until when they answer.")


CancelAccountResult = Annotated[
    CancelAccountSuccess
    | CancellationAssistanceRequested
    | NotFoundError
    | PermissionDeniedError
    | AccountStateError
    | CancellationAlreadyRequestedError
    | InvalidInputError
    | IdempotencyConflictError,
    strawberry.union("CancelAccountResult", description="What came of `cancelAccount`."),
]

# ------------------------------------------------------------------------------------------------- submitFeedback


@strawberry.input(description="Says why.")
class SubmitFeedbackInput:
    request_id: strawberry.ID = describe("The cancellation request.")
    reason: FeedbackReason = describe("The reason.")
    comment: str | None = strawberry.field(default=None, description="In one's own words, at most 5,000 characters.")
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(description="The feedback is kept.")
class SubmitFeedbackSuccess:
    feedback: Feedback = describe("What was said.")
    offers: list[Offer] = describe(
        "The request's offers, with those that the reason brought. None for bearers of emailed links."
    )


SubmitFeedbackResult = Annotated[
    SubmitFeedbackSuccess
    | NotFoundError
    | PermissionDeniedError
    | AccountStateError
    | RequestStateError
    | InvalidInputError
    | IdempotencyConflictError,
    strawberry.union("SubmitFeedbackResult", description="What came of `submitFeedback`."),
]

# --------------------------------------------------------------------------------------- acceptOffer, declineOffer


@strawberry.input(description="Accepts an alternative instead of canceling.")
class AcceptOfferInput:
    offer_id: strawberry.ID = describe("The offer.")
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(description="The request is SAVED, and the billing team carries the offer out.")
class AcceptOfferSuccess:
    offer: Offer = describe("The accepted offer.")
    account: Account = describe("The account, which stays active.")


AcceptOfferResult = Annotated[
    AcceptOfferSuccess
    | NotFoundError
    | PermissionDeniedError
    | AccountStateError
    | RequestStateError
    | OfferUnavailableError
    | InvalidInputError
    | IdempotencyConflictError,
    strawberry.union("AcceptOfferResult", description="What came of `acceptOffer`."),
]


@strawberry.input(description="Declines an alternative. Nobody has to.")
class DeclineOfferInput:
    offer_id: strawberry.ID = describe("The offer.")
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(description="The answer is recorded; nothing else changes.")
class DeclineOfferSuccess:
    offer: Offer = describe("The declined offer.")
    account: Account = describe("The account.")


DeclineOfferResult = Annotated[
    DeclineOfferSuccess
    | NotFoundError
    | PermissionDeniedError
    | AccountStateError
    | RequestStateError
    | OfferUnavailableError
    | InvalidInputError
    | IdempotencyConflictError,
    strawberry.union("DeclineOfferResult", description="What came of `declineOffer`."),
]

# ------------------------------------------------------------------------------------------- withdrawCancellation


@strawberry.input(description="Takes an open or scheduled cancellation back.")
class WithdrawCancellationInput:
    account_id: strawberry.ID = describe("The account.")
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(description="The cancellation is withdrawn.")
class WithdrawCancellationSuccess:
    account: Account = describe("The account, which stays active.")


WithdrawCancellationResult = Annotated[
    WithdrawCancellationSuccess
    | NotFoundError
    | PermissionDeniedError
    | AccountStateError
    | InvalidInputError
    | IdempotencyConflictError,
    strawberry.union("WithdrawCancellationResult", description="What came of `withdrawCancellation`."),
]

# -------------------------------------------------------------------------------------------- confirmCancellation


@strawberry.input(description="Confirms a cancellation.")
class ConfirmCancellationInput:
    request_id: strawberry.ID = describe("The cancellation request.")
    confirmation_token: str | None = strawberry.field(
        default=None,
        description="From `cancelAccount`. Left out only where the bearer token is that of an emailed link, which "
        "carries it.",
    )
    account_name: str = describe("The account's name, typed by the member.")
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(
    description="The cancellation is confirmed. Unless it is scheduled, messages have stopped and every member's "
    "access is removed: this answer is the last that the caller gets about the account."
)
class ConfirmCancellationSuccess:
    account: Account = describe("The account.")
    request: CancellationRequest = describe("The confirmed request.")


ConfirmCancellationResult = Annotated[
    ConfirmCancellationSuccess
    | NotFoundError
    | PermissionDeniedError
    | AccountStateError
    | RequestStateError
    | AssistedPlanError
    | ConfirmationTokenInvalidError
    | ConfirmationExpiredError
    | AccountNameMismatchError
    | InvalidInputError
    | IdempotencyConflictError,
    strawberry.union("ConfirmCancellationResult", description="What came of `confirmCancellation`."),
]

# ------------------------------------------------------------------------------------------------- restartAccount


@strawberry.input(description="Restarts a canceled account.")
class RestartAccountInput:
    account_id: strawberry.ID = describe("The account.")
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(
    description="The account is active again, with the members whom the host names by now. Who was removed while it "
    "was canceled does not return."
)
class RestartAccountSuccess:
    account: Account = describe("The account.")
    members_regaining_access: int = describe(
        "How many members have access again. Where it is 0, the host has removed all, and names them by its next sync."
    )


RestartAccountResult = Annotated[
    RestartAccountSuccess
    | NotFoundError
    | PermissionDeniedError
    | AccountStateError
    | RestartWindowClosedError
    | InvalidInputError
    | IdempotencyConflictError,
    strawberry.union("RestartAccountResult", description="What came of `restartAccount`."),
]

# ------------------------------------------------------------------------------------------------- requestRestart


@strawberry.input(description="Asks the billing team to restart the account that the emailed link is about.")
class RequestRestartInput:
    note: str | None = strawberry.field(default=None, description="For the billing team, at most 2,000 characters.")


@strawberry.type(description="The billing team knows. Nothing is restarted yet.")
class RequestRestartSuccess:
    account_name: str = describe("The account's name.")
    restartable_until: datetime | None = describe("Until when they can restart it.")
    contact: Contact = describe("The billing team.")


RequestRestartResult = Annotated[
    RequestRestartSuccess
    | NotFoundError
    | PermissionDeniedError
    | AccountStateError
    | RequestStateError
    | RestartWindowClosedError
    | InvalidInputError,
    strawberry.union("RequestRestartResult", description="What came of `requestRestart`."),
]

# -------------------------------------------------------------------------------------- holdDeletion, releaseDeletion


@strawberry.input(description="Suspends the deletion of a canceled account.")
class HoldDeletionInput:
    account_id: strawberry.ID = describe("The account.")
    note: str = describe("Why, 1 to 2,000 characters. Erased with the account's data.")
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(description="The deletion is on hold, and has no date. The time to restart the account is as it was.")
class HoldDeletionSuccess:
    account: Account = describe("The account.")


HoldDeletionResult = Annotated[
    HoldDeletionSuccess
    | NotFoundError
    | PermissionDeniedError
    | AccountStateError
    | InvalidInputError
    | IdempotencyConflictError,
    strawberry.union("HoldDeletionResult", description="What came of `holdDeletion`."),
]


@strawberry.input(description="Ends the hold on a deletion.")
class ReleaseDeletionInput:
    account_id: strawberry.ID = describe("The account.")
    note: str = describe("Why, 1 to 2,000 characters. Erased with the account's data.")
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(description="The deletion has a date again, never nearer than the policy's minimum notice.")
class ReleaseDeletionSuccess:
    account: Account = describe("The account.")


ReleaseDeletionResult = Annotated[
    ReleaseDeletionSuccess
    | NotFoundError
    | PermissionDeniedError
    | AccountStateError
    | InvalidInputError
    | IdempotencyConflictError,
    strawberry.union("ReleaseDeletionResult", description="What came of `releaseDeletion`."),
]

# ------------------------------------------------------------------------------------------------ approveDeletions


@strawberry.input(description="Approves the deletions that have stopped.")
class ApproveDeletionsInput:
    count: int = describe("How many, as `deletionBreaker.waiting` says: nobody approves more than they saw.")
    note: str = describe("Why, 1 to 2,000 characters.")
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(
    description="The approval counts. With that of a second person the deletions go on, for 24 hours and that many."
)
class ApproveDeletionsSuccess:
    breaker: DeletionBreaker = describe("Where it stands now.")


ApproveDeletionsResult = Annotated[
    ApproveDeletionsSuccess
    | PermissionDeniedError
    | DeletionsNotHaltedError
    | InvalidInputError
    | IdempotencyConflictError,
    strawberry.union("ApproveDeletionsResult", description="What came of `approveDeletions`."),
]

# --------------------------------------------------------------------------------------------------- advanceClock


@strawberry.input(description="Moves the development clock ahead.")
class AdvanceClockInput:
    by: str = describe("How far: `60d`, `36h`, `30m` or `10s`.")
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(description="The clock of the whole installation was moved; workers carry out what is due now.")
class AdvanceClockSuccess:
    now: datetime = describe("The time now.")


AdvanceClockResult = Annotated[
    AdvanceClockSuccess | PermissionDeniedError | InvalidInputError | IdempotencyConflictError,
    strawberry.union("AdvanceClockResult", description="What came of `advanceClock`."),
]

# --------------------------------------------------------------------------------------------------- syncAccounts

describe_enum(
    Outcome,
    "SyncOutcome",
    "What became of one account of a batch.",
    {
        Outcome.CREATED: "It is new.",
        Outcome.UPDATED: "Something changed.",
        Outcome.UNCHANGED: "It was so already.",
        Outcome.REFUSED: "It was not accepted; nothing of it changed.",
    },
)


@strawberry.input(description="A member, as the host knows them.")
class MemberSyncInput:
    subject: str = describe("The `sub` of their tokens.")
    issuer: str | None = strawberry.field(
        default=None, description="The `iss` of their tokens; left out: the installation's usual issuer."
    )
    email: str = describe("Their address.")
    name: str = describe("Their name.")
    role: MemberRole = describe("Their role.")
    permissions: list[Permission] | None = strawberry.field(default=None, description="What is granted to them.")


@strawberry.input(description="An account, as the host knows it: the whole of it.")
class AccountSyncInput:
    reference: str = describe("The host's own name for the account; never changes.")
    name: str = describe("Its name.")
    plan_code: str = describe("Its plan.")
    current_period_end: datetime | None = strawberry.field(default=None, description="When the paid period ends.")
    csm_email: str | None = strawberry.field(
        default=None, description="The address of its Customer Success Manager, who is staff."
    )
    members: list[MemberSyncInput] | None = strawberry.field(
        default=None,
        description="All of its members: who is not listed is removed at once, also while the account is canceled. Who "
        "is staff or a service is none and taken for not listed; `membersRefused` tells. Left out: they stay as they "
        "are.",
    )


@strawberry.input(description="A batch of accounts.")
class SyncAccountsInput:
    accounts: list[AccountSyncInput] = describe("Up to 500, with up to 10,000 members together.")


@strawberry.type(description="What became of one account.")
class SyncedAccount:
    reference: str = describe("As given.")
    outcome: Outcome = describe("What became of it.")
    account_id: strawberry.ID | None = describe("The account's id; null when refused.")
    members_added: int = describe("How many members it has more by this.")
    members_changed: int = describe("How many of its members are described differently now.")
    members_removed: int = describe("How many members it had and has no more.")
    error: InvalidInputError | None = describe("Why it was refused; null when it was not.")
    members_refused: list[InvalidInputError] = describe(
        "Who was listed as a member and left out, being staff or a service: `field` is the place, as "
        "`members[3].subject`. All else was done."
    )


@strawberry.type(description="Each account was answered by itself.")
class SyncAccountsSuccess:
    results: list[SyncedAccount] = describe("In the order given.")


SyncAccountsResult = Annotated[
    SyncAccountsSuccess | PermissionDeniedError | InvalidInputError,
    strawberry.union("SyncAccountsResult", description="What came of `syncAccounts`."),
]


def _item(given: AccountSyncInput) -> AccountItem:
    return AccountItem(
        reference=given.reference,
        name=given.name,
        plan_code=given.plan_code,
        current_period_end=given.current_period_end,
        csm_email=given.csm_email,
        members=None
        if given.members is None
        else [
            MemberItem(
                subject=member.subject,
                issuer=member.issuer,
                email=member.email,
                name=member.name,
                role=member.role,
                permissions=frozenset(member.permissions or ()),
            )
            for member in given.members
        ],
    )


# ------------------------------------------------------------------------------------------ acknowledgeEnforcement


@strawberry.input(description="Says that the caller's system has obeyed a cancellation.")
class AcknowledgeEnforcementInput:
    account_id: strawberry.ID = describe("The account: `accountId` of the event `account.canceled`.")
    epoch: int = describe("Which of its cancellations: `epoch` of that event.")


@strawberry.type(description="It is known. Repeating it changes nothing.")
class AcknowledgeEnforcementSuccess:
    enforcement: Enforcement = describe("What the cancellation asked of the system, with when it was acknowledged.")


AcknowledgeEnforcementResult = Annotated[
    AcknowledgeEnforcementSuccess | NotFoundError | PermissionDeniedError | EnforcementNotAwaitedError,
    strawberry.union("AcknowledgeEnforcementResult", description="What came of `acknowledgeEnforcement`."),
]

# -------------------------------------------------------------------------------------------------- webhook endpoints

_TYPES = "Only events of these types, as `eventTypes` names them; empty: all."
_ENDPOINT = "The endpoint."


@strawberry.input(description="Adds an endpoint.")
class CreateWebhookEndpointInput:
    url: str = describe("Where events are sent: https, and a public address unless the operator allows others.")
    description: str | None = strawberry.field(default=None, description="What it is for, at most 500 characters.")
    event_types: list[str] | None = strawberry.field(default=None, description=_TYPES + " Left out: all.")
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(description="The endpoint is told of what happens from now on.")
class CreateWebhookEndpointSuccess:
    endpoint: WebhookEndpoint = describe(_ENDPOINT)
    secret: str = describe("What signs its events. Keep it: it is told here alone.")


@strawberry.input(description="Changes what is given.")
class UpdateWebhookEndpointInput:
    endpoint_id: strawberry.ID = describe(_ENDPOINT)
    url: str | None = strawberry.field(default=None, description="Where events are sent from now on.")
    description: str | None = strawberry.field(default=None, description="What it is for.")
    event_types: list[str] | None = strawberry.field(default=None, description=_TYPES)


@strawberry.type(description="The endpoint is changed.")
class UpdateWebhookEndpointSuccess:
    endpoint: WebhookEndpoint = describe(_ENDPOINT)


@strawberry.input(description="Makes a new secret.")
class RotateWebhookSecretInput:
    endpoint_id: strawberry.ID = describe(_ENDPOINT)
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(description="There is a new secret; for 24 hours the one before signs too.")
class RotateWebhookSecretSuccess:
    endpoint: WebhookEndpoint = describe(_ENDPOINT)
    secret: str = describe("The new secret. Keep it: it is told here alone.")


@strawberry.input(description="Stops telling an endpoint.")
class DisableWebhookEndpointInput:
    endpoint_id: strawberry.ID = describe(_ENDPOINT)


@strawberry.type(description="The endpoint is told nothing.")
class DisableWebhookEndpointSuccess:
    endpoint: WebhookEndpoint = describe(_ENDPOINT)


@strawberry.input(description="Tells an endpoint again.")
class EnableWebhookEndpointInput:
    endpoint_id: strawberry.ID = describe(_ENDPOINT)


@strawberry.type(description="The endpoint is told again, and what waited for it is due.")
class EnableWebhookEndpointSuccess:
    endpoint: WebhookEndpoint = describe(_ENDPOINT)


@strawberry.input(description="Tries an endpoint.")
class PingWebhookEndpointInput:
    endpoint_id: strawberry.ID = describe(_ENDPOINT)
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(description="The ping is due.")
class PingWebhookEndpointSuccess:
    delivery: WebhookDelivery = describe("Ask `webhookDeliveries` or `node` for what becomes of it.")


@strawberry.input(description="Delivers again: one event, or all of an endpoint since a time. Give one of the two.")
class RedeliverWebhookInput:
    delivery_id: strawberry.ID | None = strawberry.field(default=None, description="One delivery, by its `webhook-id`.")
    endpoint_id: strawberry.ID | None = strawberry.field(default=None, description="An endpoint; with `since`.")
    since: datetime | None = strawberry.field(default=None, description="What was promised then or later.")
    idempotency_key: str | None = strawberry.field(default=None, description=_KEY)


@strawberry.type(description="They are due, with the same `webhook-id` and body as before.")
class RedeliverWebhookSuccess:
    count: int = describe(
        "How many. 10,000 at most; what was erased is not among them, and what is being delivered just now goes on."
    )


CreateWebhookEndpointResult = Annotated[
    CreateWebhookEndpointSuccess | PermissionDeniedError | InvalidInputError | IdempotencyConflictError,
    strawberry.union("CreateWebhookEndpointResult", description="What came of `createWebhookEndpoint`."),
]

UpdateWebhookEndpointResult = Annotated[
    UpdateWebhookEndpointSuccess | NotFoundError | PermissionDeniedError | InvalidInputError,
    strawberry.union("UpdateWebhookEndpointResult", description="What came of `updateWebhookEndpoint`."),
]

RotateWebhookSecretResult = Annotated[
    RotateWebhookSecretSuccess | NotFoundError | PermissionDeniedError | InvalidInputError | IdempotencyConflictError,
    strawberry.union("RotateWebhookSecretResult", description="What came of `rotateWebhookSecret`."),
]

DisableWebhookEndpointResult = Annotated[
    DisableWebhookEndpointSuccess | NotFoundError | PermissionDeniedError,
    strawberry.union("DisableWebhookEndpointResult", description="What came of `disableWebhookEndpoint`."),
]

EnableWebhookEndpointResult = Annotated[
    EnableWebhookEndpointSuccess | NotFoundError | PermissionDeniedError,
    strawberry.union("EnableWebhookEndpointResult", description="What came of `enableWebhookEndpoint`."),
]

PingWebhookEndpointResult = Annotated[
    PingWebhookEndpointSuccess | NotFoundError | PermissionDeniedError | InvalidInputError | IdempotencyConflictError,
    strawberry.union("PingWebhookEndpointResult", description="What came of `pingWebhookEndpoint`."),
]

RedeliverWebhookResult = Annotated[
    RedeliverWebhookSuccess | NotFoundError | PermissionDeniedError | InvalidInputError | IdempotencyConflictError,
    strawberry.union("RedeliverWebhookResult", description="What came of `redeliverWebhook`."),
]


def _endpoint_key(id_: strawberry.ID) -> UUID | None:
    return nodes.decode_as(Kind.WEBHOOK_ENDPOINT, id_)


def _secret(info: Info, made: endpoints.Created) -> str:
    return info.context.call.installation.tokens.webhook_secret(made.endpoint.id, made.secret_generation)


@strawberry.type(name="Mutation", description="What can be done. Every field says whom it is for.")
class Mutation:
    @root(
        Access.ACTION,
        "Ask to cancel an account. On a SELF_SERVE plan the answer has the token to confirm with; on an ASSISTED plan "
        "the Customer Success Manager is asked. Staff opens the request this way, and the members are asked to confirm "
        "by email. Repeating it returns the caller's open request.",
    )
    async def cancel_account(self, info: Info, input: CancelAccountInput) -> CancelAccountResult | None:
        done = await cancellation.cancel(
            info.context.call,
            nodes.decode_as(Kind.ACCOUNT, input.account_id),
            reason=input.reason,
            note=input.note,
            idempotency_key=input.idempotency_key,
        )
        account = await _shown(info, done.account)
        request = await _request(account, done.request_id)
        if request.status is RequestStatus.PENDING_ASSISTANCE:
            policy = info.context.policy
            received_at = request.assistance_requested_at
            assert received_at is not None
            return CancellationAssistanceRequested(
                account=account,
                request=request,
                customer_success_manager=Contact.of(done.account.csm or policy.customer_success),
                received_at=received_at,
                respond_by=received_at + policy.assistance_response,
            )
        preview = CancellationPreview(
            _view=done.account,
            _eye=account._eye,
            _reason=input.reason,
            _members=await accounts.member_count(done.account.id),
        )
        return CancelAccountSuccess(
            account=account, request=request, confirmation_token=done.confirmation_token, preview=preview
        )

    @root(
        Access.ACTION,
        "Say why. Never a condition for confirming. After the cancellation, with the link of the email, until the "
        "retention window ends or the account is restarted.",
    )
    async def submit_feedback(self, info: Info, input: SubmitFeedbackInput) -> SubmitFeedbackResult | None:
        view = await feedback.submit(
            info.context.call,
            nodes.decode_as(Kind.CANCELLATION_REQUEST, input.request_id),
            reason=input.reason,
            comment=input.comment,
            idempotency_key=input.idempotency_key,
        )
        info.context.forget()
        by_link = info.context.call.identity.grant is not None
        made = [] if by_link else await info.context.offers.load(view.request_id)
        return SubmitFeedbackSuccess(feedback=Feedback.of(view), offers=[Offer.of(offer) for offer in made])

    @root(Access.ACTION, "Take an alternative instead of canceling. The request is SAVED; the billing team is told.")
    async def accept_offer(self, info: Info, input: AcceptOfferInput) -> AcceptOfferResult | None:
        offer, account = await offers.accept(
            info.context.call, nodes.decode_as(Kind.OFFER, input.offer_id), idempotency_key=input.idempotency_key
        )
        return AcceptOfferSuccess(offer=Offer.of(offer), account=await _shown(info, account))

    @root(Access.ACTION, "Say that an alternative is not wanted. Recorded, and nothing else; nobody has to.")
    async def decline_offer(self, info: Info, input: DeclineOfferInput) -> DeclineOfferResult | None:
        offer, account = await offers.decline(
            info.context.call, nodes.decode_as(Kind.OFFER, input.offer_id), idempotency_key=input.idempotency_key
        )
        return DeclineOfferSuccess(offer=Offer.of(offer), account=await _shown(info, account))

    @root(Access.ACTION, "Take an open request back, or a scheduled cancellation before it takes effect.")
    async def withdraw_cancellation(
        self, info: Info, input: WithdrawCancellationInput
    ) -> WithdrawCancellationResult | None:
        account = await cancellation.withdraw(
            info.context.call, nodes.decode_as(Kind.ACCOUNT, input.account_id), idempotency_key=input.idempotency_key
        )
        return WithdrawCancellationSuccess(account=await _shown(info, account))

    @root(
        Access.ACTION,
        "Confirm a cancellation. With this commit messages stop and every member's access is removed, or, where the "
        "plan says so, at the end of the paid period. Wants the token and the account's name; five wrong tokens void "
        "it. Repeated by a member whose access it removed, it answers ACCESS_REMOVED with `canceledAt`.",
    )
    async def confirm_cancellation(
        self, info: Info, input: ConfirmCancellationInput
    ) -> ConfirmCancellationResult | None:
        request_id = nodes.decode_as(Kind.CANCELLATION_REQUEST, input.request_id)
        view = await cancellation.confirm(
            info.context.call,
            request_id,
            confirmation_token=input.confirmation_token,
            account_name=input.account_name,
            idempotency_key=input.idempotency_key,
        )
        assert request_id is not None, "confirming refuses an id that is none"
        account = await _shown(info, view)
        return ConfirmCancellationSuccess(account=account, request=await _request(account, request_id))

    @root(Access.ACTION, "Bring a canceled account back inside its retention window. The billing team's alone.")
    async def restart_account(self, info: Info, input: RestartAccountInput) -> RestartAccountResult | None:
        done = await restart.restart(
            info.context.call, nodes.decode_as(Kind.ACCOUNT, input.account_id), idempotency_key=input.idempotency_key
        )
        return RestartAccountSuccess(account=await _shown(info, done.account), members_regaining_access=done.members)

    @root(
        Access.RESTART_LINK,
        "Ask the billing team to restart the account that the link is about. It restarts nothing; repeating it changes "
        "nothing.",
    )
    async def request_restart(self, info: Info, input: RequestRestartInput) -> RequestRestartResult | None:
        account = await restart.request_restart(info.context.call, note=input.note)
        return RequestRestartSuccess(
            account_name=account.name,
            restartable_until=account.restartable_until,
            contact=Contact.of(info.context.policy.billing_team),
        )

    @root(Access.ACTION, "Suspend the deletion of a canceled account. The billing team's alone.")
    async def hold_deletion(self, info: Info, input: HoldDeletionInput) -> HoldDeletionResult | None:
        account = await deletion.hold(
            info.context.call,
            nodes.decode_as(Kind.ACCOUNT, input.account_id),
            note=input.note,
            idempotency_key=input.idempotency_key,
        )
        return HoldDeletionSuccess(account=await _shown(info, account))

    @root(Access.ACTION, "End the hold on a deletion; it gets a new date. The billing team's alone.")
    async def release_deletion(self, info: Info, input: ReleaseDeletionInput) -> ReleaseDeletionResult | None:
        account = await deletion.release(
            info.context.call,
            nodes.decode_as(Kind.ACCOUNT, input.account_id),
            note=input.note,
            idempotency_key=input.idempotency_key,
        )
        return ReleaseDeletionSuccess(account=await _shown(info, account))

    @root(
        Access.BILLING_TEAM,
        "Approve deletions that have stopped because too many fell due. Two persons are needed.",
    )
    async def approve_deletions(self, info: Info, input: ApproveDeletionsInput) -> ApproveDeletionsResult | None:
        view = await breaker.approve(
            info.context.call, count=input.count, note=input.note, idempotency_key=input.idempotency_key
        )
        caller = await auth.require_staff(info.context.call)
        return ApproveDeletionsSuccess(breaker=DeletionBreaker.of(view, Perspective.of(caller, info.context.policy)))

    @root(
        Access.STAFF,
        "Move the clock of the installation ahead, to see what weeks bring in a minute. Where the clock is the "
        "development clock alone; nowhere else is it moved.",
    )
    async def advance_clock(self, info: Info, input: AdvanceClockInput) -> AdvanceClockResult | None:
        now = await clock.advance_by(info.context.call, input.by, idempotency_key=input.idempotency_key)
        return AdvanceClockSuccess(now=now)

    @root(
        Access.PROVISION,
        "Create and update accounts and their members, as the host knows them. Repeatable; never touches the state of "
        "a cancellation.",
    )
    async def sync_accounts(self, info: Info, input: SyncAccountsInput) -> SyncAccountsResult | None:
        await auth.require_scope(info.context.call, Scope.PROVISION)
        results = await provisioning.sync(info.context.call.installation, [_item(one) for one in input.accounts])
        return SyncAccountsSuccess(
            results=[
                SyncedAccount(
                    reference=one.reference,
                    outcome=one.outcome,
                    account_id=None
                    if one.account_id is None
                    else strawberry.ID(nodes.encode(Kind.ACCOUNT, one.account_id)),
                    members_added=one.members_added,
                    members_changed=one.members_changed,
                    members_removed=one.members_removed,
                    error=None
                    if one.refusal is None
                    else InvalidInputError(message=one.refusal.message, field=one.refusal.field),
                    members_refused=[
                        InvalidInputError(message=refused.message, field=refused.field)
                        for refused in one.members_refused
                    ],
                )
                for one in results
            ]
        )

    @root(
        Access.ENFORCEMENT,
        "Say that the system whose service calls has obeyed a cancellation: it sends nothing for the account and lets "
        "none of its members in. Repeatable; the first time stays.",
    )
    async def acknowledge_enforcement(
        self, info: Info, input: AcknowledgeEnforcementInput
    ) -> AcknowledgeEnforcementResult | None:
        caller, policy = await auth.require_scope(info.context.call, Scope.ENFORCEMENT), info.context.policy
        assert caller.service is not None
        account_id = nodes.decode_as(Kind.ACCOUNT, input.account_id)
        view = await enforcement.acknowledge(policy, caller.service, account_id, input.epoch)
        return AcknowledgeEnforcementSuccess(enforcement=Enforcement.of(view, Perspective.of(caller, policy)))

    @root(Access.WEBHOOK_MANAGERS, "Add an endpoint, which is told of what happens from now on.")
    async def create_webhook_endpoint(
        self, info: Info, input: CreateWebhookEndpointInput
    ) -> CreateWebhookEndpointResult | None:
        call = info.context.call
        made = await endpoints.create(
            call,
            call.installation.receivers,
            url=input.url,
            description=input.description,
            event_types=input.event_types,
            idempotency_key=input.idempotency_key,
        )
        return CreateWebhookEndpointSuccess(endpoint=WebhookEndpoint.of(made.endpoint), secret=_secret(info, made))

    @root(Access.WEBHOOK_MANAGERS, "Change an endpoint's URL, description or types. What it was promised goes there.")
    async def update_webhook_endpoint(
        self, info: Info, input: UpdateWebhookEndpointInput
    ) -> UpdateWebhookEndpointResult | None:
        call = info.context.call
        view = await endpoints.update(
            call,
            call.installation.receivers,
            _endpoint_key(input.endpoint_id),
            url=input.url,
            description=input.description,
            event_types=input.event_types,
        )
        return UpdateWebhookEndpointSuccess(endpoint=WebhookEndpoint.of(view))

    @root(Access.WEBHOOK_MANAGERS, "Make a new secret. For 24 hours both sign, so that the receiver can change over.")
    async def rotate_webhook_secret(
        self, info: Info, input: RotateWebhookSecretInput
    ) -> RotateWebhookSecretResult | None:
        made = await endpoints.rotate(
            info.context.call, _endpoint_key(input.endpoint_id), idempotency_key=input.idempotency_key
        )
        return RotateWebhookSecretSuccess(endpoint=WebhookEndpoint.of(made.endpoint), secret=_secret(info, made))

    @root(Access.WEBHOOK_MANAGERS, "Tell an endpoint nothing any more. What it was promised waits four days at most.")
    async def disable_webhook_endpoint(
        self, info: Info, input: DisableWebhookEndpointInput
    ) -> DisableWebhookEndpointResult | None:
        view = await endpoints.disable(info.context.call, _endpoint_key(input.endpoint_id))
        return DisableWebhookEndpointSuccess(endpoint=WebhookEndpoint.of(view))

    @root(
        Access.WEBHOOK_MANAGERS,
        "Tell an endpoint again, with nothing held against it. What happened while it was disabled it is not told.",
    )
    async def enable_webhook_endpoint(
        self, info: Info, input: EnableWebhookEndpointInput
    ) -> EnableWebhookEndpointResult | None:
        view = await endpoints.enable(info.context.call, _endpoint_key(input.endpoint_id))
        return EnableWebhookEndpointSuccess(endpoint=WebhookEndpoint.of(view))

    @root(Access.WEBHOOK_MANAGERS, "Send an endpoint an event about nothing, to see whether it answers.")
    async def ping_webhook_endpoint(
        self, info: Info, input: PingWebhookEndpointInput
    ) -> PingWebhookEndpointResult | None:
        delivery = await endpoints.ping(
            info.context.call, _endpoint_key(input.endpoint_id), idempotency_key=input.idempotency_key
        )
        return PingWebhookEndpointSuccess(delivery=WebhookDelivery.of(delivery))

    @root(Access.WEBHOOK_MANAGERS, "Deliver again, whatever came of it: one event, or all of an endpoint since a time.")
    async def redeliver_webhook(self, info: Info, input: RedeliverWebhookInput) -> RedeliverWebhookResult | None:
        call, key = info.context.call, input.idempotency_key
        if input.delivery_id is not None and input.endpoint_id is None and input.since is None:
            delivery_id = nodes.decode_as(Kind.WEBHOOK_DELIVERY, input.delivery_id)
            await endpoints.redeliver(call, delivery_id, idempotency_key=key)
            return RedeliverWebhookSuccess(count=1)
        if input.delivery_id is None and input.endpoint_id is not None and input.since is not None:
            endpoint_id = _endpoint_key(input.endpoint_id)
            count = await endpoints.redeliver_since(call, endpoint_id, input.since, idempotency_key=key)
            return RedeliverWebhookSuccess(count=count)
        await endpoints.refuse_to_redeliver(call)
        return None
