"""Offers: alternatives to canceling. They are shown beside the way to confirm and never stand in it."""

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from app import accounts, db, errors, history, idempotency, lifecycle, limiting, outbox
from app.accounts import AccountView, OfferView
from app.auth import Acting, Call, Installation, act_on
from app.errors import Contact
from app.lifecycle import Action, FeedbackReason, OfferStatus, RequestStatus, TransitionType
from app.messages import OfferAccepted
from app.models import CancellationRequest, Offer
from app.policy import OfferTemplate, Policy


async def suitable(
    policy: Policy, account: AccountView, reason: FeedbackReason | None, now: datetime
) -> list[OfferTemplate]:
    """The offers that the account can be made now: for its plan and this reason, and not within a cooldown."""
    templates = [offer for offer in policy.offers if offer.suits(account.plan_code, reason)]
    if not templates:
        return []
    accepted = await _accepted_at(account.id)
    return [
        template
        for template in templates
        if template.code not in accepted or accepted[template.code] + template.cooldown <= now
    ]


async def _accepted_at(account_id: UUID) -> dict[str, datetime]:
    """When the account last accepted each offer."""
    rows = await db.fetch(
        "SELECT code, MAX(answered_at) AS answered_at FROM offer WHERE account_id = $1 AND status = 'ACCEPTED' "
        "GROUP BY code",
        account_id,
    )
    return {row["code"]: db.as_datetime(row["answered_at"]) for row in rows}


async def make(
    policy: Policy, account: AccountView, request_id: UUID, reason: FeedbackReason | None, now: datetime
) -> None:
    """Add to the request the suitable offers that it does not have yet. The account's row is locked."""
    templates = await suitable(policy, account, reason, now)
    if not templates:
        return
    have = {offer.code for offer in await Offer.filter(request_id=request_id).only("code")}
    await Offer.bulk_create(
        [
            Offer(
                id=db.uuid7(),
                account_id=account.id,
                request_id=request_id,
                code=template.code,
                kind=template.kind,
                title=template.title,
                description=template.description,
                offered_at=now,
            )
            for template in templates
            if template.code not in have
        ]
    )


async def accept(
    call: Call, offer_id: UUID | None, *, idempotency_key: str | None = None
) -> tuple[OfferView, AccountView]:
    """Take the offer instead of canceling: the request is SAVED, and the billing team is asked to carry it out."""
    return await _answer(call, offer_id, Action.ACCEPT_OFFER, idempotency_key)


async def decline(
    call: Call, offer_id: UUID | None, *, idempotency_key: str | None = None
) -> tuple[OfferView, AccountView]:
    """Record that the offer is not wanted. Nothing else changes; nobody has to."""
    return await _answer(call, offer_id, Action.DECLINE_OFFER, idempotency_key)


async def _answer(
    call: Call, offer_id: UUID | None, action: Action, idempotency_key: str | None
) -> tuple[OfferView, AccountView]:
    found = None if offer_id is None else await accounts.load_offer(offer_id)
    account_id = found.account_id if found else None
    await limiting.admit(call, action, account_id, what="offer")
    async with db.transaction():
        acting = await act_on(call, action, account_id, what="offer")
        assert found is not None
        await idempotency.once(
            call.identity,
            "acceptOffer" if action is Action.ACCEPT_OFFER else "declineOffer",
            idempotency_key,
            {"offer": offer_id},
            acting.account.id,
            lambda: _settle(call.installation, acting, found.id, action),
        )
        offer = await accounts.load_offer(found.id)
        account = await accounts.load(found.account_id)
    assert offer is not None
    assert account is not None
    return offer, account


async def _settle(installation: Installation, acting: Acting, offer_id: UUID, action: Action) -> dict[str, Any]:
    lifecycle.check(action, acting.actor, acting.facts, acting.now)
    account, request = acting.account, acting.account.request
    offer = await accounts.load_offer(offer_id)
    assert offer is not None
    assert request is not None
    if offer.request_id != request.id:
        raise errors.RequestStateRefused(
            "The offer belongs to a request that is closed. The open request has offers of its own.",
            request_id=offer.request_id,
        )
    if offer.status is not OfferStatus.OPEN:
        raise errors.OfferUnavailable(f"The offer was {offer.status.lower()} already.", available_again_at=None)
    accepting = action is Action.ACCEPT_OFFER
    if accepting:
        await _check_cooldown(installation.policy, account.id, offer, acting.now)
    await Offer.filter(id=offer.id, status=OfferStatus.OPEN).update(
        status=OfferStatus.ACCEPTED if accepting else OfferStatus.DECLINED,
        answered_at=acting.now,
        answered_by_id=acting.actor.id,
    )
    await history.append(
        TransitionType.OFFER_ACCEPTED if accepting else TransitionType.OFFER_DECLINED,
        account_id=account.id,
        status=account.status,
        request_id=request.id,
        actor=acting.actor,
        now=acting.now,
        offer_code=offer.code,
    )
    if accepting:
        await CancellationRequest.filter(id=request.id, status=request.status).update(
            status=RequestStatus.SAVED, closed_at=acting.now
        )
        await _tell_billing_team(installation, acting, offer)
    return {}


async def _check_cooldown(policy: Policy, account_id: UUID, offer: OfferView, now: datetime) -> None:
    cooldown = next((template.cooldown for template in policy.offers if template.code == offer.code), timedelta(0))
    accepted_at = (await _accepted_at(account_id)).get(offer.code)
    if accepted_at is not None and accepted_at + cooldown > now:
        raise errors.OfferUnavailable(
            "The account has accepted this offer not long ago.", available_again_at=accepted_at + cooldown
        )


async def _tell_billing_team(installation: Installation, acting: Acting, offer: OfferView) -> None:
    account, member = acting.account, acting.caller.member
    assert member is not None
    await outbox.put(
        [
            outbox.Addressed(
                to=installation.policy.billing_team,
                email=OfferAccepted(
                    account_name=account.name,
                    plan_name=account.plan(installation.policy).name,
                    account_reference=account.reference,
                    accepted_at=acting.now,
                    accepted_by=Contact(name=member.name, email=member.email),
                    offer_code=offer.code,
                    offer_title=offer.title,
                ),
            )
        ],
        account_id=account.id,
        now=acting.now,
        mail_domain=installation.mail_domain,
    )
