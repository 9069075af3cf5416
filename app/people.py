"""Whom an email about an account goes to, by name, address and identity."""

from dataclasses import dataclass
from uuid import UUID

from tortoise.expressions import Q

from app.errors import Contact
from app.lifecycle import MemberRole, Permission
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
    return [
        Recipient(
            member_id=member.id,
            issuer=member.issuer,
            subject=member.subject,
            contact=Contact(name=member.name, email=member.email),
        )
        for member in members
    ]


async def member(member_id: UUID | None) -> Recipient | None:
    """One member; None when they have been removed since."""
    found = await Member.get_or_none(id=member_id)
    if found is None:
        return None
    return Recipient(
        member_id=found.id,
        issuer=found.issuer,
        subject=found.subject,
        contact=Contact(name=found.name, email=found.email),
    )
