"""How refusals look to clients: each `errors.Refusal` is a type in result unions, mapped here once for all fields."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

import strawberry
from strawberry.types.field import StrawberryField

from app import accounts, auth, errors
from app.auth import Caller
from app.graphql.context import Info
from app.graphql.types import Account, CancellationRequest, Contact, Perspective, describe, refusal_name
from app.lifecycle import AccountStatus

R = TypeVar("R", bound=errors.Refusal)


@strawberry.interface(description="An expected refusal. Nothing was changed. The type's name says what was refused.")
class UserError:
    message: str = describe("What went wrong and what to do about it, for people.")


@strawberry.type(description="The id is malformed, unknown, or somebody else's; the three are answered alike.")
class NotFoundError(UserError):
    pass


@strawberry.type(description="The caller may see this and may not do it.")
class PermissionDeniedError(UserError):
    pass


@strawberry.type(description="The account's state does not allow it.")
class AccountStateError(UserError):
    _account: strawberry.Private[Account]

    @strawberry.field(
        description="The account, with its status and `allowedActions`. Forbidden to bearers of emailed links."
    )
    def account(self) -> Account:
        self._account._eye.require_account()
        return self._account


@strawberry.type(description="The cancellation request has moved on.")
class RequestStateError(UserError):
    request: CancellationRequest = describe("The request, with its status.")


@strawberry.type(description="Somebody else's request is open; an account has one at most.")
class CancellationAlreadyRequestedError(UserError):
    request: CancellationRequest = describe("The open request.")


@strawberry.type(description="The plan is canceled together with a Customer Success Manager.")
class AssistedPlanError(UserError):
    customer_success_manager: Contact = describe("Whom to contact.")


@strawberry.type(description="The confirmation token is wrong or void. A wrong try was counted.")
class ConfirmationTokenInvalidError(UserError):
    attempts_left: int = describe("How many more tries the token allows; 0: call `cancelAccount` for a new one.")


@strawberry.type(description="The cancellation was not confirmed in time; ask to cancel again.")
class ConfirmationExpiredError(UserError):
    expired_at: datetime = describe("Until when it could be confirmed.")


@strawberry.type(description="What was typed is not the account's name.")
class AccountNameMismatchError(UserError):
    pass


@strawberry.type(description="The offer was answered already, or accepted not long ago.")
class OfferUnavailableError(UserError):
    available_again_at: datetime | None = describe("When it can be accepted again; null when never.")


@strawberry.type(description="The time to restart the account has ended; a new account must be set up.")
class RestartWindowClosedError(UserError):
    closed_at: datetime = describe("When it ended.")
    contact: Contact = describe("Who can help with a new account.")


@strawberry.type(description="The deletions have not stopped; there is nothing to approve.")
class DeletionsNotHaltedError(UserError):
    pass


@strawberry.type(description="That is not the epoch of a cancellation that awaits this system.")
class EnforcementNotAwaitedError(UserError):
    epoch: int = describe("The account's now. Greater than the one given: that cancellation is over, drop it.")
    account_status: AccountStatus = describe("The account's status now.")


@strawberry.type(description="A value has the right type and cannot be used.")
class InvalidInputError(UserError):
    field: str = describe("Its path in the input.")


@strawberry.type(description="The idempotency key stood for other input before.")
class IdempotencyConflictError(UserError):
    pass


def _handler(refusal: type[R], error: type, more: Callable[[R, Info], Awaitable[dict[str, Any]]] | None = None) -> Any:
    """Turns one kind of refusal into its type, in every field whose union has it."""
    assert error.__name__ == refusal_name(refusal)

    class Handler:
        exception_type = refusal
        error_type = error

        def handle(self, exception: R, *, field: StrawberryField, info: Info) -> Awaitable[Any]:
            return self._convert(exception, info)

        async def _convert(self, exception: R, info: Info) -> Any:
            return error(message=exception.message, **(await more(exception, info) if more else {}))

    return Handler()


async def _account(refusal: errors.AccountStateRefused, info: Info) -> dict[str, Any]:
    caller = await auth.identify(info.context.call, refusal.account_id)
    assert caller.account is not None
    return {"_account": Account.of(caller.account, _refused(caller, info))}


async def _request(
    refusal: errors.RequestStateRefused | errors.CancellationAlreadyRequested, info: Info
) -> dict[str, Any]:
    view = await accounts.load_request(refusal.request_id)
    assert view is not None
    caller = await auth.identify(info.context.call, view.account_id)
    return {"request": CancellationRequest.of(view, _refused(caller, info))}


def _refused(caller: Caller, info: Info) -> Perspective:
    """Through whose eyes a refusal shows an account. A link's bearer reads nothing of it, since it may have come to a
    life that the link has no part in: only what they did is shown to them, and here they did nothing."""
    return replace(Perspective.of(caller, info.context.policy), sees_account=caller.identity.grant is None)


def _plain(*names: str) -> Callable[[Any, Info], Awaitable[dict[str, Any]]]:
    async def more(refusal: Any, info: Info) -> dict[str, Any]:
        values = {name: getattr(refusal, name) for name in names}
        return {
            name: Contact.of(value) if isinstance(value, errors.Contact) else value for name, value in values.items()
        }

    return more


async def _csm(refusal: errors.AssistedPlan, info: Info) -> dict[str, Any]:
    return {"customer_success_manager": Contact.of(refusal.contact)}


async def _not_awaited(refusal: errors.EnforcementNotAwaited, info: Info) -> dict[str, Any]:
    return {"epoch": refusal.epoch, "account_status": AccountStatus(refusal.account_status)}


HANDLERS = (
    _handler(errors.NotFound, NotFoundError),
    _handler(errors.PermissionDenied, PermissionDeniedError),
    _handler(errors.AccountStateRefused, AccountStateError, _account),
    _handler(errors.RequestStateRefused, RequestStateError, _request),
    _handler(errors.CancellationAlreadyRequested, CancellationAlreadyRequestedError, _request),
    _handler(errors.AssistedPlan, AssistedPlanError, _csm),
    _handler(errors.ConfirmationTokenInvalid, ConfirmationTokenInvalidError, _plain("attempts_left")),
    _handler(errors.ConfirmationExpired, ConfirmationExpiredError, _plain("expired_at")),
    _handler(errors.AccountNameMismatch, AccountNameMismatchError),
    _handler(errors.OfferUnavailable, OfferUnavailableError, _plain("available_again_at")),
    _handler(errors.RestartWindowClosed, RestartWindowClosedError, _plain("closed_at", "contact")),
    _handler(errors.DeletionsNotHalted, DeletionsNotHaltedError),
    _handler(errors.EnforcementNotAwaited, EnforcementNotAwaitedError, _not_awaited),
    _handler(errors.InvalidInput, InvalidInputError, _plain("field")),
    _handler(errors.IdempotencyConflict, IdempotencyConflictError),
)
