"""Every refusal: its name, its message, and what a client needs to go on.

Two families, because clients meet them in two places:

* `Refusal`: an expected answer to a well-formed mutation. It becomes a member of the mutation's
  result union (`NotFound` -> `NotFoundError`, ...) in `app.graphql.refusals`, once for all fields.
* `RequestError`: the request as a whole, or one of its root fields, cannot be served. It becomes a
  top-level GraphQL error with `extensions.code`.

Nothing else reaches a client: any other exception is logged whole and answered as
INTERNAL_SERVER_ERROR. This module knows the standard library only.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID


@dataclass(frozen=True, kw_only=True)
class Contact:
    """Whom a person can turn to."""

    name: str
    email: str


class Refusal(Exception):
    """An expected "no" to one action. Nothing was changed, except where a subclass says so."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class NotFound(Refusal):
    """The id is malformed, unknown, or belongs to somebody else: the three are not told apart."""

    def __init__(self, what: str) -> None:
        super().__init__(f"No such {what}. Check the id; ids of other accounts are answered the same way.")


class PermissionDenied(Refusal):
    """The caller is known, may see the account, and may not do this."""


class AccountStateRefused(Refusal):
    """The account's state does not allow the action. Carries the account to show its `allowedActions`."""

    def __init__(self, message: str, *, account_id: UUID) -> None:
        super().__init__(message)
        self.account_id = account_id


class RequestStateRefused(Refusal):
    """The cancellation request has moved on (withdrawn, expired, confirmed, ...)."""

    def __init__(self, message: str, *, request_id: UUID) -> None:
        super().__init__(message)
        self.request_id = request_id


class CancellationAlreadyRequested(Refusal):
    """The account has an open request of somebody else; there is one at most."""

    def __init__(self, message: str, *, request_id: UUID) -> None:
        super().__init__(message)
        self.request_id = request_id


class AssistedPlan(Refusal):
    """The plan is canceled with a Customer Success Manager. Names them."""

    def __init__(self, message: str, *, contact: Contact) -> None:
        super().__init__(message)
        self.contact = contact


class ConfirmationTokenInvalid(Refusal):
    """The confirmation token is wrong or used up. The wrong try was counted, and that count is kept."""

    def __init__(self, message: str, *, attempts_left: int) -> None:
        super().__init__(message)
        self.attempts_left = attempts_left


class ConfirmationExpired(Refusal):
    """The confirmation was not given in time."""

    def __init__(self, message: str, *, expired_at: datetime) -> None:
        super().__init__(message)
        self.expired_at = expired_at


class AccountNameMismatch(Refusal):
    """What was typed is not the account's name. Not counted as a wrong try of the token."""


class OfferUnavailable(Refusal):
    """The offer is answered already, or was accepted within its cooldown."""

    def __init__(self, message: str, *, available_again_at: datetime | None) -> None:
        super().__init__(message)
        self.available_again_at = available_again_at


class RestartWindowClosed(Refusal):
    """The retention window has ended or the deletion has begun; a new account must be set up."""

    def __init__(self, message: str, *, closed_at: datetime, contact: Contact) -> None:
        super().__init__(message)
        self.closed_at = closed_at
        self.contact = contact


class DeletionsNotHalted(Refusal):
    """There is nothing to approve: no breaker stops the deletions."""


class EnforcementNotAwaited(Refusal):
    """The account awaits no acknowledgement of that epoch from this system. Carries where the account is now: an
    `epoch` that is greater means that the cancellation is over, and its own event tells what came after."""

    def __init__(self, message: str, *, epoch: int, account_status: str) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.account_status = account_status


class InvalidInput(Refusal):
    """A value is well-typed and not acceptable. `field` is its path in the input, in GraphQL's spelling."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class IdempotencyConflict(Refusal):
    """The idempotency key was used before, by this caller for this mutation, with other input."""

    def __init__(self) -> None:
        super().__init__(
            "This idempotency key was already used with other input. Use a new key for a new operation, "
            "or repeat the first input unchanged to get its answer again."
        )


class RequestError(Exception):
    """A top-level GraphQL error with `extensions.code`; the message is written for clients."""

    code: ClassVar[str]
    http_status: ClassVar[int]
    """The status when the whole HTTP request is refused before execution."""
    retry_after: int | None = None
    """After how many seconds trying again makes sense, where it does: HTTP's `Retry-After`."""

    def __init__(self, message: str, **extensions: Any) -> None:
        super().__init__(message)
        self.message = message
        self.extensions: dict[str, Any] = {"code": self.code, **extensions}


class Unauthenticated(RequestError):
    """No token, or one that is malformed, expired, or not meant for this service."""

    code = "UNAUTHENTICATED"
    http_status = 401


class Forbidden(RequestError):
    """Nobody here goes by the token, or its bearer may not use this field at all."""

    code = "FORBIDDEN"
    http_status = 403


class AccessRemoved(RequestError):
    """The account is canceled and its members' access is removed. Says until when it can be restarted and by whom."""

    code = "ACCESS_REMOVED"
    http_status = 403


class BadUserInput(RequestError):
    """An argument cannot be used, for example a malformed cursor."""

    code = "BAD_USER_INPUT"
    http_status = 400


class OperationTooComplex(RequestError):
    """The document is deeper, wider or more repetitive than the limits allow."""

    code = "OPERATION_TOO_COMPLEX"
    http_status = 400


class PayloadTooLarge(RequestError):
    """The request's body is over the limit."""

    code = "PAYLOAD_TOO_LARGE"
    http_status = 413


class RateLimited(RequestError):
    """The caller, or callers together about one account, ask for too much in too short a time."""

    code = "RATE_LIMITED"
    http_status = 429
    retry_after: int

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, retryAfter=retry_after)
        self.retry_after = retry_after


class Unavailable(RequestError):
    """The database cannot be reached just now. Nothing is known to have been changed; try again."""

    code = "SERVICE_UNAVAILABLE"
    http_status = 503
    retry_after = 1
