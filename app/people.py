"""The members whom an email about an account goes to, by name, address and identity, and writing to them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from tortoise.expressions import Q

from app import outbox
from app.errors import Contact
from app.lifecycle import LinkPurpose, MemberRole, Permission
from app.messages import Email, Link
from app.models import Member


@dataclass(frozen=True, kw_only=True)
class Recipient:
    member_id: UUID
    issuer: str
    subject: str
    contact: Contact


async def with_billing_permission(account_id: UUID) -> list[Recipient]:
    """The account's members who have the billing permission now: every ADMIN, and each MEMBER to whom it is granted."""
    members = await Member.filter(
        Q(role=MemberRole.ADMIN) | Q(permissions__contains=Permission.ACCESS_BILLING_AND_ACCOUNT_INFO),
        account_id=account_id,
    ).order_by("id")
    return [_recipient(member) for member in members]


async def member(member_id: UUID | None) -> Recipient | None:
    """One member; None when they have been removed since."""
    found = await Member.get_or_none(id=member_id)
    return None if found is None else _recipient(found)


def _recipient(member: Member) -> Recipient:
    return Recipient(
        member_id=member.id,
        issuer=member.issuer,
        subject=member.subject,
        contact=Contact(name=member.name, email=member.email),
    )


def link(
    purpose: LinkPurpose,
    recipient: Recipient,
    account_id: UUID,
    request_id: UUID,
    now: datetime,
    expires_at: datetime,
    *,
    generation: int = 0,
) -> Link:
    """A link for the recipient's email."""
    return Link(
        purpose=purpose,
        issuer=recipient.issuer,
        subject=recipient.subject,
        account_id=account_id,
        request_id=request_id,
        generation=generation,
        issued_at=now,
        expires_at=expires_at,
    )


async def write(
    recipients: Iterable[Recipient],
    email: Callable[[Recipient], Email],
    *,
    account_id: UUID,
    now: datetime,
    mail_domain: str,
) -> None:
    """Promise each of them an email of their own, within the open transaction."""
    await outbox.put(
        [outbox.Addressed(name=one.contact.name, address=one.contact.email, email=email(one)) for one in recipients],
        account_id=account_id,
        now=now,
        mail_domain=mail_domain,
    )
