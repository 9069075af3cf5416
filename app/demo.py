"""The demo company: accounts on each plan, their members, and the staff and services of the vendor.

Made on the first start in development, into an empty database, so that the story of a cancellation can be tried at
once. The people are made up; their tokens come from the development issuer, which production does not have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from app import db, errors, provisioning
from app.auth import Installation
from app.lifecycle import MemberRole, Permission, Scope, StaffRole
from app.models import Account, Member, Service, Staff
from app.provisioning import AccountItem, MemberItem, Outcome
from app.tokens import DEVELOPMENT_ISSUER

_BILLING = frozenset({Permission.ACCESS_BILLING_AND_ACCOUNT_INFO})
_PAID_FOR = timedelta(days=30)


@dataclass(frozen=True, kw_only=True)
class Character:
    """Somebody of the cast, as a token names them."""

    who: str
    """An address, or a service's name."""
    part: str
    """What they are, for the list of tokens."""
    subject: str


def member_subject(email: str) -> str:
    """The same in every account: one person is one subject."""
    return f"member:{email}"


def staff_subject(email: str) -> str:
    return f"staff:{email}"


def service_subject(name: str) -> str:
    return f"service:{name}"


def _member(email: str, name: str, role: MemberRole, permissions: frozenset[Permission] = frozenset()) -> MemberItem:
    return MemberItem(
        subject=member_subject(email),
        email=email,
        name=name,
        role=role,
        permissions=permissions,
        issuer=DEVELOPMENT_ISSUER,
    )


_DANA = _member("dana@advisors.example", "Dana Whitfield", MemberRole.MEMBER, _BILLING)
_CSM = "csm@vendor.example"

# reference, name, plan, Customer Success Manager, members
_ACCOUNTS: tuple[tuple[str, str, str, str | None, tuple[MemberItem, ...]], ...] = (
    (
        "acme",
        "Acme",
        "essentials",
        None,
        (
            _member("alice@acme.example", "Alice Adams", MemberRole.ADMIN),
            _member("carol@acme.example", "Carol Clark", MemberRole.MEMBER, _BILLING),
            _member("bob@acme.example", "Bob Brandt", MemberRole.MEMBER),
        ),
    ),
    (
        "globex",
        "Globex",
        "premium",
        _CSM,
        (
            _member("gina@globex.example", "Gina Grant", MemberRole.ADMIN),
            _member("hugo@globex.example", "Hugo Hall", MemberRole.MEMBER),
        ),
    ),
    (
        "initech",
        "Initech",
        "startup",
        None,
        (_member("ingrid@initech.example", "Ingrid Nilsen", MemberRole.ADMIN), _DANA),
    ),
    (
        "umbrella",
        "Umbrella",
        "enterprise",
        None,
        (_member("uma@umbrella.example", "Uma Banerjee", MemberRole.ADMIN), _DANA),
    ),
)
_STAFF = (
    (_CSM, "Casey Morgan", StaffRole.CUSTOMER_SUCCESS_MANAGER),
    ("billing@vendor.example", "Billie Stone", StaffRole.BILLING_TEAM),
    ("finance@vendor.example", "Fiona Marsh", StaffRole.BILLING_TEAM),
    ("support@vendor.example", "Sam Porter", StaffRole.SUPPORT),
)
_SERVICES = (("host", Scope.PROVISION), ("gatekeeper", Scope.GATE))


async def make(installation: Installation) -> bool:
    """Make the company in an empty database. False, and nothing is done, where there is anything else already.

    One that was broken off is finished by the next call.
    """
    staff = {person.email for person in await Staff.all()}
    services = {service.name for service in await Service.all()}
    theirs = (staff - {email for email, _, _ in _STAFF}) | (services - {name for name, _ in _SERVICES})
    if theirs or await Account.exists():
        return False
    for email, name, role in _STAFF:
        if email not in staff:
            await provisioning.add_staff(
                email=email, name=name, role=role, issuer=DEVELOPMENT_ISSUER, subject=staff_subject(email)
            )
    for name, scope in _SERVICES:
        if name not in services:
            await provisioning.add_service(
                name=name, scopes=frozenset({scope}), issuer=DEVELOPMENT_ISSUER, subject=service_subject(name)
            )
    period_end = await db.now() + _PAID_FOR
    plans = installation.policy.plans
    results = await provisioning.sync(
        installation,
        [
            AccountItem(
                reference=reference,
                name=name,
                plan_code=plan if plan in plans else next(iter(plans)),  # an own policy has other plans
                current_period_end=period_end,
                csm_email=csm,
                members=members,
            )
            for reference, name, plan, csm, members in _ACCOUNTS
        ],
    )
    for result in results:
        if result.outcome is Outcome.REFUSED:
            raise errors.Refusal(f"The demo's account {result.reference} is refused: {result.refusal}")
    return True


async def cast() -> Sequence[Character]:
    """Those of the demo's people and services who are there to be tried, in the order of the story."""
    rows = await Member.filter(issuer=DEVELOPMENT_ISSUER, account__reference__in=[account[0] for account in _ACCOUNTS])
    members = {row.subject for row in rows}
    staff = {person.subject for person in await Staff.filter(issuer=DEVELOPMENT_ISSUER, deactivated_at=None)}
    services = {service.subject for service in await Service.filter(issuer=DEVELOPMENT_ISSUER, deactivated_at=None)}
    characters = [
        Character(who=member.email, part=f"{_part(member)} of {reference} ({plan})", subject=member.subject)
        for reference, _, plan, _, people in _ACCOUNTS
        for member in people
        if member is not _DANA
    ]
    characters.append(Character(who=_DANA.email, part=f"{_part(_DANA)} of initech and umbrella", subject=_DANA.subject))
    characters += [Character(who=email, part=role.value, subject=staff_subject(email)) for email, _, role in _STAFF]
    characters += [
        Character(who=name, part=f"service with scope {scope.value}", subject=service_subject(name))
        for name, scope in _SERVICES
    ]
    there = members | staff | services
    return [character for character in characters if character.subject in there]


def _part(member: MemberItem) -> str:
    return f"{member.role.value} with the billing permission" if member.permissions else member.role.value
