"""Who is asking, and what they are to an account: read from the database with each request.

A token says who somebody is and nothing else. Members are found by issuer, subject and account; staff by role;
services by scope. So a permission, a member or an account's access that is taken away is gone with the next
request, however long the token lives.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, Final
from uuid import UUID

import structlog

from app import accounts, db, errors, lifecycle
from app.accounts import AccountView, MemberView
from app.changes import Changes
from app.lifecycle import (
    AccountFacts,
    Action,
    Actor,
    ActorKind,
    LinkPurpose,
    Relation,
    RequestStatus,
    Scope,
    StaffRole,
)
from app.messages import LinkGrant
from app.policy import Policy
from app.receivers import Receivers
from app.tokens import Identity, Tokens


@dataclass(frozen=True, kw_only=True)
class Installation:
    """What all calls of one installation share."""

    policy: Policy
    tokens: Tokens
    mail_domain: str
    """The domain of its Message-IDs."""
    member_issuer: str
    """The issuer of members' tokens, where provisioning names none."""
    rate_limit_caller: int
    """How many of the limited mutations one caller, or one link, may send in a minute; 0: no limit."""
    rate_limit_account: int
    """The same about one account, by everybody who may by the same right."""
    request_timeout: timedelta
    """How long a request may wait for the database."""
    data_dir: Path
    """Where a process keeps what it has seen of the database."""
    receivers: Receivers
    """To whom webhooks may be sent."""
    changes: Changes = field(default_factory=Changes)
    """Who watches accounts in this process."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of an action: who asks, of which installation."""

    identity: Identity
    installation: Installation

    @property
    def policy(self) -> Policy:
        return self.installation.policy


@dataclass(frozen=True, kw_only=True, slots=True)
class StaffFacts:
    id: UUID
    name: str
    email: str
    role: StaffRole


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceFacts:
    id: UUID
    name: str
    scopes: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks, with the account that was asked about, as the database knew them in one statement.

    `now` is the database's clock at that moment. `account` is whatever the id named, visible or not: use `see`.
    """

    identity: Identity
    now: datetime
    staff: StaffFacts | None
    service: ServiceFacts | None
    member: MemberView | None
    """The caller's membership of the account asked about. Never of staff or of a service."""
    is_member: bool
    """Of any account; of none while staff or a service."""
    has_live_account: bool
    """A member of some account whose members can sign in."""
    account: AccountView | None

    @property
    def is_known(self) -> bool:
        return self.staff is not None or self.service is not None or self.is_member

    def see(self) -> AccountView | None:
        """The account asked about, if the caller may know that it exists. Raises as `require_access` does."""
        if self.account is None or self.identity.grant is not None:
            return None
        if self.staff is not None:
            return self.account
        if self.member is None:
            return None
        return self.account if self.account.has_access(self.now) else None

    def see_status(self) -> AccountView | None:
        """The account asked about, if the caller may know where it is in its life: who may see it, and services with
        the scope `gate`, which are to obey it."""
        if self.service is not None and Scope.GATE in self.service.scopes and self.identity.grant is None:
            return self.account
        return self.see()

    @property
    def is_staff(self) -> bool:
        """Reads what staff wrote for staff. Never the bearer of a link, whoever it was sent to: it lets them do one
        thing and read nothing."""
        return self.staff is not None and self.identity.grant is None

    def has_billing_permission(self) -> bool:
        """On the account asked about: a member with the permission, or staff, who reads everything. A link's bearer
        never."""
        if self.identity.grant is not None:
            return False
        return self.is_staff or (self.member is not None and self.member.has_billing_permission)

    def sees_webhooks(self) -> bool:
        """Staff, and services with the scope `webhooks`."""
        if self.identity.grant is not None:
            return False
        return self.is_staff or (self.service is not None and Scope.WEBHOOKS in self.service.scopes)

    def actor(self) -> Actor:
        """What the caller is to the account asked about, for the rules."""
        relations: set[Relation] = set()
        grant = self.identity.grant
        if grant is not None:
            fits = self.account is not None and grant.account_id == self.account.id
            if fits and self.member is not None and self.member.has_billing_permission:
                relations.add(_LINK_RELATION[LinkPurpose(grant.purpose)])
        else:
            if self.member is not None:
                relations.add(Relation.MEMBER)
                if self.member.has_billing_permission:
                    relations.add(Relation.BILLING_MEMBER)
            if self.staff is not None:
                relations.add(Relation.STAFF)
                if self.staff.role is StaffRole.BILLING_TEAM:
                    relations.add(Relation.BILLING_TEAM)
                # An account that names none, or one who has left, belongs to all of them.
                if (
                    self.staff.role is StaffRole.CUSTOMER_SUCCESS_MANAGER
                    and self.account is not None
                    and (self.account.csm is None or self.account.csm_id == self.staff.id)
                ):
                    relations.add(Relation.ACCOUNT_CSM)
            if self.service is not None:
                relations.add(Relation.SERVICE)
        if self.member is not None:
            return Actor(
                kind=ActorKind.MEMBER, id=self.member.id, name=self.member.name, relations=frozenset(relations)
            )
        if self.staff is not None:
            return Actor(kind=ActorKind.STAFF, id=self.staff.id, name=self.staff.name, relations=frozenset(relations))
        service = self.service
        return Actor(
            kind=ActorKind.SERVICE,
            id=service.id if service else None,
            name=service.name if service else "",
            relations=frozenset(relations),
        )


_LINK_RELATION = {
    LinkPurpose.CONFIRM: Relation.CONFIRM_LINK,
    LinkPurpose.FEEDBACK: Relation.FEEDBACK_LINK,
    LinkPurpose.RESTART: Relation.RESTART_LINK,
}

_OUTLIVING = frozenset({LinkPurpose.FEEDBACK, LinkPurpose.RESTART})
"""Links that are meant for after the cancellation."""

# Always one row: the left side stands alone, everything that is known of the caller and the account is joined to it.
# Staff and services are looked for first, and members among the others alone, as in `accounts.is_member_sql`.
_NO_INSIDER = "s.id IS NULL AND v.id IS NULL"
_IDENTIFY = f"""
SELECT {{now}} AS now,
       s.id AS s_id, s.name AS s_name, s.email AS s_email, s.role AS s_role,
       v.id AS v_id, v.name AS v_name, v.scopes AS v_scopes,
       m.id AS m_id, m.account_id AS m_account_id, m.name AS m_name, m.email AS m_email, m.role AS m_role,
       m.permissions AS m_permissions, m.created_at AS m_created_at,
       {_NO_INSIDER} AND EXISTS (SELECT 1 FROM member o WHERE o.issuer = $1 AND o.subject = $2) AS is_member,
       {_NO_INSIDER} AND EXISTS (SELECT 1 FROM member o JOIN account l ON l.id = o.account_id
               WHERE o.issuer = $1 AND o.subject = $2 AND {{has_access}}) AS has_live_account,
       {accounts.COLUMNS}
FROM (SELECT 1 AS one) q
LEFT JOIN staff s ON s.issuer = $1 AND s.subject = $2 AND s.deactivated_at IS NULL
LEFT JOIN service v ON v.issuer = $1 AND v.subject = $2 AND v.deactivated_at IS NULL
LEFT JOIN account a ON a.id = $3
LEFT JOIN member m ON m.account_id = a.id AND m.issuer = $1 AND m.subject = $2 AND {_NO_INSIDER}
{accounts.JOINS}
"""


async def identify(call: Call, account_id: UUID | None = None) -> Caller:
    """Who asks, and the account with that id, in one round trip.

    Raises `Forbidden` for somebody this installation does not know and `AccessRemoved` for a member all of whose
    accounts, or whose account asked about, are canceled. A link's bearer is let through to the one action that
    their link is for.
    """
    caller = await _read(call, account_id)
    _refuse_expired(caller.identity, caller.now)
    _refuse_unknown(caller)
    await _refuse_removed(call, caller)
    return caller


async def refuse_expired(identity: Identity) -> None:
    """Raises `Unauthenticated` for a link whose time is over by the database's clock, as `identify` does, and asks the
    database for nothing but the time."""
    _refuse_expired(identity, await db.database_now())


def _refuse_expired(identity: Identity, now: datetime) -> None:
    if identity.grant is not None and identity.expires_at <= now:
        raise errors.Unauthenticated("The link has expired.")


def _refuse_unknown(caller: Caller) -> None:
    if not caller.is_known:
        raise errors.Forbidden(
            "The token is valid, and nobody here goes by it: it belongs to no member, staff or service. "
            "Ask an admin of your account to add you."
        )


class KnownCallers:
    """Who was known to the database within the last minute, in this process's memory.

    It says whose request is worth reading, and how much of it, and permits nothing: what the request asks for is
    answered to who is known then, by the database. Somebody who is not known is looked for each time, so that they are
    served as soon as they are added.
    """

    SECONDS: ClassVar[float] = 60.0
    _MOST: Final = 10_000

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: OrderedDict[tuple[str, str], tuple[float, frozenset[str]]] = OrderedDict()
        """Until when, and with which scopes."""

    async def require(self, call: Call) -> frozenset[str]:
        """The scopes of the caller, who has some when they are a service. Raises `Forbidden` for somebody this
        installation does not know; members whose access is removed, and bearers of links, are known."""
        key, now = (call.identity.issuer, call.identity.subject), self._clock()
        until, scopes = self._known.get(key, _NEVER)
        if now < until:
            return scopes
        self._known.pop(key, None)
        caller = await _read(call, None)
        _refuse_unknown(caller)
        scopes = caller.service.scopes if caller.service is not None else frozenset()
        self._known[key] = now + self.SECONDS, scopes
        if len(self._known) > self._MOST:
            self._known.popitem(last=False)
        return scopes


_NEVER: Final[tuple[float, frozenset[str]]] = float("-inf"), frozenset()


async def _read(call: Call, account_id: UUID | None) -> Caller:
    identity = call.identity
    if account_id is not None:
        structlog.contextvars.bind_contextvars(account_id=str(account_id))
    sql = _IDENTIFY.format(now=db.now_sql(), has_access=accounts.has_access_sql("l"))
    row = await db.fetch_one(sql, identity.issuer, identity.subject, account_id)
    assert row is not None
    return Caller(
        identity=identity,
        now=db.as_datetime(row["now"]),
        staff=_staff(row),
        service=_service(row),
        member=accounts.member(row, "m_") if row["m_id"] is not None else None,
        is_member=bool(row["is_member"]),
        has_live_account=bool(row["has_live_account"]),
        account=accounts.view(row) if row["a_id"] is not None else None,
    )


async def look(call: Call, account: AccountView) -> Caller:
    """Who asks, beside an account that an action of theirs has just answered with. Refuses nothing: what a member
    did to their own access does not hide the answer to it."""
    return await _read(call, account.id)


async def _refuse_removed(call: Call, caller: Caller) -> None:
    """Members of canceled accounts have no access: not to the account, and to nothing at all when it was their last.

    Staff and services keep theirs. The bearer of a link that outlives the cancellation is told by its action.
    """
    if caller.staff is not None or caller.service is not None:
        return
    grant = caller.identity.grant
    if grant is not None and grant.purpose in _OUTLIVING:
        return
    removed = caller.account if caller.member is not None else None
    if removed is not None and not removed.has_access(caller.now):
        raise await _access_removed(removed, call)
    if not caller.has_live_account:
        row = await db.fetch_one(
            f"SELECT {accounts.COLUMNS} FROM member m JOIN account a ON a.id = m.account_id {accounts.JOINS} "
            "WHERE m.issuer = $1 AND m.subject = $2 ORDER BY a.canceled_at DESC LIMIT 1",
            caller.identity.issuer,
            caller.identity.subject,
        )
        if row is not None and not (last := accounts.view(row)).has_access(caller.now):
            raise await _access_removed(last, call)


async def _access_removed(account: AccountView, call: Call) -> errors.AccessRemoved:
    contact, grant = call.policy.billing_team, call.identity.grant
    message = (
        "The account is canceled and its members' access has been removed. "
        f"Contact {contact.name} ({contact.email}) to restart it in time."
    )
    if grant is not None and (grant.account_id != account.id or not await _has_confirmed(grant)):
        # The dates are of another cancellation than the link's, and not for its bearer to read.
        return errors.AccessRemoved(message, contact={"name": contact.name, "email": contact.email})
    return errors.AccessRemoved(
        message,
        canceledAt=_text(account.canceled_at or account.cancellation_effective_at),
        restartableUntil=_text(account.restartable_until),
        deletionScheduledFor=_text(account.deletion_scheduled_for),
        contact={"name": contact.name, "email": contact.email},
    )


def _text(value: datetime | None) -> str | None:
    return None if value is None else value.strftime("%Y-%m-%dT%H:%M:%S.") + f"{value.microsecond // 1000:03d}Z"


def _staff(row: dict[str, Any]) -> StaffFacts | None:
    if row["s_id"] is None:
        return None
    return StaffFacts(
        id=db.as_uuid(row["s_id"]), name=row["s_name"], email=row["s_email"], role=StaffRole(row["s_role"])
    )


def _service(row: dict[str, Any]) -> ServiceFacts | None:
    if row["v_id"] is None:
        return None
    return ServiceFacts(id=db.as_uuid(row["v_id"]), name=row["v_name"], scopes=frozenset(row["v_scopes"].split()))


# ------------------------------------------------------------------------------------------------- requirements


async def require_known(call: Call) -> Caller:
    """The caller, when they speak for themselves and not as the bearer of a link. Raises `Forbidden`."""
    caller = await identify(call)
    if caller.identity.grant is not None:
        raise errors.Forbidden("The link in an email is good for what it says, and for nothing else.")
    return caller


async def require_staff(call: Call) -> Caller:
    """The caller, when they are staff of any role. Raises `Forbidden`."""
    caller = await require_known(call)
    if caller.staff is None:
        raise errors.Forbidden("This is for staff.")
    return caller


async def require_scope(call: Call, scope: Scope) -> Caller:
    """The caller, when they are a service with that scope. Raises `PermissionDenied`."""
    caller = await require_known(call)
    if caller.service is None or scope not in caller.service.scopes:
        raise errors.PermissionDenied(f"This needs a service token whose service has the scope {scope.value!r}.")
    return caller


async def require_webhook_reader(call: Call) -> Caller:
    """The caller, when they are staff or a service with the scope `webhooks`. Raises `Forbidden`."""
    caller = await require_known(call)
    if not caller.sees_webhooks():
        raise errors.Forbidden("This is for staff, and for services with the scope 'webhooks'.")
    return caller


async def require_webhook_manager(call: Call) -> Caller:
    """The caller, when they are of the billing team or a service with the scope `webhooks`. Raises
    `PermissionDenied`."""
    caller = await require_known(call)
    if not caller.sees_webhooks() or (caller.staff is not None and caller.staff.role is not StaffRole.BILLING_TEAM):
        raise errors.PermissionDenied("Only the billing team, and services with the scope 'webhooks', manage webhooks.")
    return caller


async def check(action: Action, caller: Caller, account: AccountFacts) -> None:
    """Refuse `action` as `lifecycle.check` does, and to a link's bearer, where the request that it is about does not
    stand any more, as `lifecycle.check_link` does. It holds until the commit where the account's row is locked.

    What a refusal tells of a cancellation, a date or whom to contact, is told of the link's own alone.
    """
    grant = caller.identity.grant
    try:
        lifecycle.check(action, caller.actor(), account, caller.now)
    except (errors.RestartWindowClosed, errors.ConfirmationExpired, errors.AssistedPlan):
        if grant is not None:
            lifecycle.check_link(action, grant.request_id, await _linked(grant))
        raise
    if grant is not None:
        lifecycle.check_link(action, grant.request_id, await _linked(grant))


async def check_confirmed(grant: LinkGrant) -> None:
    """Refuse the answer to a confirmation, given again, to the bearer of a link whose cancellation is over: it would
    show what the account is now."""
    if not await _has_confirmed(grant):
        lifecycle.check_link(Action.CONFIRM_CANCELLATION, grant.request_id, None)


async def _has_confirmed(grant: LinkGrant) -> bool:
    """Whether the request that a link is about was confirmed, and neither withdrawn nor restarted since."""
    return await _linked(grant) in {RequestStatus.CONFIRMED, RequestStatus.EFFECTIVE}


async def _linked(grant: LinkGrant) -> RequestStatus | None:
    request = await accounts.load_request(grant.request_id)
    return request.status if request is not None and request.account_id == grant.account_id else None


@dataclass(frozen=True, kw_only=True)
class Acting:
    """A caller about to act on an account. Where its row is locked, what holds now holds until the commit."""

    caller: Caller
    actor: Actor
    account: AccountView
    facts: AccountFacts
    now: datetime


async def authorize(
    call: Call, action: Action, account_id: UUID | None, *, what: str = "account", request_id: UUID | None = None
) -> Acting:
    """Who asks and what holds, when the rules allow them the action in some phase of the account.

    Raises `NotFound` where the account does not exist or is not the caller's to know of, and for a link that is about
    another request than `request_id`; `PermissionDenied` where no rule allows it; and what `identify` raises.
    `account_id` is None for an id that is malformed or unknown: the answer is the same.
    """
    caller = await identify(call, account_id)
    actor, grant = caller.actor(), call.identity.grant
    visible = caller.account if grant is not None and actor.relations else caller.see()
    if visible is None or (grant is not None and request_id is not None and grant.request_id != request_id):
        raise errors.NotFound(what)
    lifecycle.permit(action, actor)
    return Acting(caller=caller, actor=actor, account=visible, facts=visible.facts(call.policy), now=caller.now)


async def act_on(
    call: Call, action: Action, account_id: UUID | None, *, what: str = "account", request_id: UUID | None = None
) -> Acting:
    """Lock the account's row, then read who asks and what holds. To be called inside the transaction. Raises what
    `authorize` raises."""
    if account_id is not None:
        await accounts.lock_row(account_id)
    return await authorize(call, action, account_id, what=what, request_id=request_id)
