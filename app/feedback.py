"""Feedback: why, in the customer's words. Appended, never edited, and never a condition for anything."""

from typing import Any
from uuid import UUID

from app import accounts, db, errors, history, idempotency, lifecycle, limiting, offers
from app.accounts import FeedbackView, RequestView
from app.auth import Acting, Call, act_on, check
from app.lifecycle import (
    MAX_COMMENT_LENGTH,
    MAX_FEEDBACK_PER_REQUEST,
    Action,
    FeedbackReason,
    RequestStatus,
    TransitionType,
)
from app.models import Feedback


async def submit(
    call: Call,
    request_id: UUID | None,
    *,
    reason: FeedbackReason,
    comment: str | None = None,
    idempotency_key: str | None = None,
) -> FeedbackView:
    """Add feedback to a cancellation request; once access is removed, with the link of the email, until the account is
    restarted (`RequestStateRefused`).

    A comment has at most 5,000 characters, a request at most 20 pieces of feedback (`InvalidInput`). While the
    request awaits confirmation, the reason can bring further offers.
    """
    values = {"request": request_id, "reason": reason, "comment": comment}
    found = None if request_id is None else await accounts.load_request(request_id)
    action, account_id, what = Action.SUBMIT_FEEDBACK, found.account_id if found else None, "cancellation request"
    await limiting.admit(call, action, account_id, what=what, request_id=request_id)
    async with db.transaction():
        acting = await act_on(call, action, account_id, what=what, request_id=request_id)
        assert found is not None
        answer = await idempotency.once(
            call.identity,
            "submitFeedback",
            idempotency_key,
            values,
            acting.account.id,
            lambda: _submit(call, acting, found, reason, comment),
        )
        given = await accounts.feedback_of([found.id])
    return next(one for one in given[found.id] if str(one.id) == answer["feedback"])


async def _submit(
    call: Call, acting: Acting, request: RequestView, reason: FeedbackReason, comment: str | None
) -> dict[str, Any]:
    await check(Action.SUBMIT_FEEDBACK, acting.caller, acting.facts)
    comment = (comment or "").strip() or None
    if comment is not None and len(comment) > MAX_COMMENT_LENGTH:
        raise errors.InvalidInput(
            f"A comment has at most {MAX_COMMENT_LENGTH:,} characters; this one has {len(comment):,}.", field="comment"
        )
    if await Feedback.filter(request_id=request.id).count() >= MAX_FEEDBACK_PER_REQUEST:
        raise errors.InvalidInput(
            f"A request takes up to {MAX_FEEDBACK_PER_REQUEST} pieces of feedback, and this one has them. Thank you.",
            field="requestId",
        )
    assert acting.actor.id is not None
    feedback = await Feedback.create(
        id=db.uuid7(),
        account_id=acting.account.id,
        request_id=request.id,
        reason=reason,
        comment=comment,
        submitted_by_id=acting.actor.id,
        submitted_at=acting.now,
    )
    await history.append(
        TransitionType.FEEDBACK_SUBMITTED,
        account_id=acting.account.id,
        status=acting.account.status,
        request_id=request.id,
        actor=acting.actor,
        now=acting.now,
    )
    current = acting.account.request  # as it is under the lock
    if (
        current is not None
        and current.id == request.id
        and current.status is not RequestStatus.CONFIRMED
        and not lifecycle.has_expired(current.facts(), acting.now)
    ):
        await offers.make(call.policy, acting.account, request.id, reason, acting.now)
    return {"feedback": str(feedback.id)}
