"""The members whom an email about an account goes to, by name, address and identity, and writing to them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from app import accounts, db, outbox
from app.errors import Contact
from app.lifecycle import LinkPurpose
from app.messages import Email, Link


@dataclass(frozen=True, kw_only=True)
class Recipient:
    member_id: UUID
    issuer: str
    subject: str
    contact: Contact


async def with_billing_permission(account_id: UUID) -> list[Recipient]:
    """The account's members who have the billing permission now: every ADMIN, and each MEMBER to whom it is granted.
    Nobody, where the host names none any more."""
    return await _select(f"m.account_id = $1 AND {accounts.has_billing_permission_sql('m')}", account_id)


async def member(member_id: UUID | None) -> Recipient | None:
    """One member; None when they are one no more."""
    found = await _select(f"m.id = $1 AND {accounts.is_member_sql('m')}", member_id)
    return found[0] if found else None


async def _select(condition: str, key: UUID | None) -> list[Recipient]:
    rows = await db.fetch(
        f"SELECT m.id, m.issuer, m.subject, m.name, m.email FROM member m WHERE {condition} ORDER BY m.id", key
    )
    return [
        Recipient(
            member_id=db.as_uuid(row["id"]),
            issuer=row["issuer"],
            subject=row["subject"],
            contact=Contact(name=row["name"], email=row["email"]),
        )
        for row in rows
    ]


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
        [outbox.Addressed(to=one.contact, email=email(one)) for one in recipients],
        account_id=account_id,
        now=now,
        mail_domain=mail_domain,
    )
