"""Reading accounts: one account with what belongs to it in one row, pages of them, and their requests.

SQL by hand, the same text for both engines: a status query is one round trip, a page is a constant number of
them. Nothing here decides who may see what; `app.auth` and the resolvers do, and pass the scope in.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from app import db, lifecycle
from app.errors import Contact
from app.lifecycle import (
    AccountFacts,
    AccountStatus,
    ActorKind,
    CancellationTiming,
    Channel,
    FeedbackReason,
    MemberRole,
    OfferKind,
    OfferStatus,
    Permission,
    RequestFacts,
    RequestStatus,
)
from app.policy import Plan, Policy

_OPEN = "('PENDING_ASSISTANCE', 'PENDING_CONFIRMATION', 'CONFIRMED')"

_REQUEST = (
    "id",
    "account_id",
    "status",
    "channel",
    "plan_code",
    "requested_at",
    "requested_by_kind",
    "requested_by_id",
    "assistance_requested_at",
    "opened_by_staff_at",
    "staff_note",
    "confirmation_expires_at",
    "wrong_tries",
    "confirmed_at",
    "effective_at",
    "took_effect_at",
    "closed_at",
)
_ACCOUNT = (
    "id",
    "reference",
    "name",
    "plan_code",
    "status",
    "epoch",
    "last_sequence",
    "current_period_end",
    "csm_id",
    "cancellation_effective_at",
    "canceled_at",
    "restartable_until",
    "deletion_scheduled_for",
    "deletion_held_at",
    "deletion_started_at",
    "deleted_at",
    "created_at",
)

COLUMNS = ", ".join(
    [f"a.{column} AS a_{column}" for column in _ACCOUNT]
    + [f"r.{column} AS r_{column}" for column in _REQUEST]
    + ["c.name AS csm_name", "c.email AS csm_email"]
)
"""What `view` needs of `account a` with `JOINS`."""

_CSM = "LEFT JOIN staff c ON c.id = a.csm_id AND c.deactivated_at IS NULL AND c.role = 'CUSTOMER_SUCCESS_MANAGER'"
"""Somebody who has left, or does something else now, is nobody's Customer Success Manager."""

JOINS = f"LEFT JOIN cancellation_request r ON r.account_id = a.id AND r.status IN {_OPEN} {_CSM}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestView:
    """A cancellation request as it is stored."""

    id: UUID
    account_id: UUID
    status: RequestStatus
    channel: Channel
    plan_code: str
    requested_at: datetime
    requested_by_kind: ActorKind
    requested_by_id: UUID
    assistance_requested_at: datetime | None
    opened_by_staff_at: datetime | None
    staff_note: str | None
    confirmation_expires_at: datetime | None
    wrong_tries: int
    confirmed_at: datetime | None
    effective_at: datetime | None
    took_effect_at: datetime | None
    closed_at: datetime | None

    def facts(self) -> RequestFacts:
        return RequestFacts(
            id=self.id,
            status=self.status,
            requested_by_id=self.requested_by_id,
            opened_by_staff_at=self.opened_by_staff_at,
            confirmation_expires_at=self.confirmation_expires_at,
            wrong_tries=self.wrong_tries,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AccountView:
    """An account with its open request and its Customer Success Manager."""

    id: UUID
    reference: str
    name: str
    plan_code: str
    status: AccountStatus
    epoch: int
    sequence: int
    """Of the last transition; 0 before the first."""
    current_period_end: datetime | None
    csm_id: UUID | None
    csm: Contact | None
    cancellation_effective_at: datetime | None
    canceled_at: datetime | None
    restartable_until: datetime | None
    deletion_scheduled_for: datetime | None
    deletion_held_at: datetime | None
    deletion_started_at: datetime | None
    deleted_at: datetime | None
    created_at: datetime
    request: RequestView | None

    def plan(self, policy: Policy) -> Plan:
        """Its plan. KeyError for a deleted account's that the policy does not have any more."""
        return policy.plan(self.plan_code)

    def has_access(self, now: datetime) -> bool:
        """Whether its members have access and messages may be sent for it."""
        return lifecycle.has_access(self.status, self.cancellation_effective_at, now)

    def facts(self, policy: Policy) -> AccountFacts:
        """What the rules need to know."""
        plan = policy.plans.get(self.plan_code)
        if plan is None and self.status is not AccountStatus.DELETED:
            raise KeyError(self.plan_code)
        return AccountFacts(
            id=self.id,
            name=self.name,
            status=self.status,
            channel=plan.channel if plan else Channel.SELF_SERVE,  # nothing is canceled any more
            effective=plan.effective if plan else CancellationTiming.IMMEDIATE,
            current_period_end=self.current_period_end,
            cancellation_effective_at=self.cancellation_effective_at,
            restartable_until=self.restartable_until,
            deletion_scheduled_for=self.deletion_scheduled_for,
            deletion_held_at=self.deletion_held_at,
            csm=self.csm or policy.customer_success,
            billing_contact=policy.billing_team,
            request=self.request.facts() if self.request else None,
        )


def has_access_sql(account: str) -> str:
    """`AccountView.has_access`, for an account of that alias."""
    return (
        f"({account}.status = 'ACTIVE' OR ({account}.status = 'CANCELLATION_SCHEDULED' "
        f"AND {account}.cancellation_effective_at > {db.now_sql()}))"
    )


def is_member_sql(member: str) -> str:
    """Whether a row of `member`, of that alias, makes its person a member: not while they are staff or a service,
    whoever was first. Staff opens cancellations and members confirm them, and nobody is to do both."""
    same = f"issuer = {member}.issuer AND o.subject = {member}.subject AND o.deactivated_at IS NULL"
    return f"NOT EXISTS (SELECT 1 FROM staff o WHERE o.{same}) AND NOT EXISTS (SELECT 1 FROM service o WHERE o.{same})"


async def listed_insiders() -> int:
    """How many rows of `member` make nobody a member: the host lists somebody who is staff or a service by now."""
    row = await db.fetch_one(
        "SELECT COUNT(*) AS listed FROM (SELECT issuer, subject FROM staff WHERE deactivated_at IS NULL UNION "
        "SELECT issuer, subject FROM service WHERE deactivated_at IS NULL) o "
        "JOIN member m ON m.issuer = o.issuer AND m.subject = o.subject"
    )
    assert row is not None
    return int(row["listed"])


def has_billing_permission_sql(member: str) -> str:
    """`MemberView.has_billing_permission`, of a row of `member` of that alias that makes its person a member."""
    return (
        f"({member}.role = 'ADMIN' OR ' ' || {member}.permissions || ' ' "
        f"LIKE '% {Permission.ACCESS_BILLING_AND_ACCOUNT_INFO} %') AND {is_member_sql(member)}"
    )


def view(row: Mapping[str, Any]) -> AccountView:
    """The account of a row with `COLUMNS`."""
    return AccountView(
        id=db.as_uuid(row["a_id"]),
        reference=row["a_reference"],
        name=row["a_name"],
        plan_code=row["a_plan_code"],
        status=AccountStatus(row["a_status"]),
        epoch=row["a_epoch"],
        sequence=row["a_last_sequence"],
        current_period_end=db.as_datetime(row["a_current_period_end"]),
        csm_id=db.as_uuid(row["a_csm_id"]),
        csm=Contact(name=row["csm_name"], email=row["csm_email"]) if row["csm_name"] is not None else None,
        cancellation_effective_at=db.as_datetime(row["a_cancellation_effective_at"]),
        canceled_at=db.as_datetime(row["a_canceled_at"]),
        restartable_until=db.as_datetime(row["a_restartable_until"]),
        deletion_scheduled_for=db.as_datetime(row["a_deletion_scheduled_for"]),
        deletion_held_at=db.as_datetime(row["a_deletion_held_at"]),
        deletion_started_at=db.as_datetime(row["a_deletion_started_at"]),
        deleted_at=db.as_datetime(row["a_deleted_at"]),
        created_at=db.as_datetime(row["a_created_at"]),
        request=_request(row, "r_") if row["r_id"] is not None else None,
    )


def _request(row: Mapping[str, Any], prefix: str) -> RequestView:
    return RequestView(
        id=db.as_uuid(row[prefix + "id"]),
        account_id=db.as_uuid(row[prefix + "account_id"]),
        status=RequestStatus(row[prefix + "status"]),
        channel=Channel(row[prefix + "channel"]),
        plan_code=row[prefix + "plan_code"],
        requested_at=db.as_datetime(row[prefix + "requested_at"]),
        requested_by_kind=ActorKind(row[prefix + "requested_by_kind"]),
        requested_by_id=db.as_uuid(row[prefix + "requested_by_id"]),
        assistance_requested_at=db.as_datetime(row[prefix + "assistance_requested_at"]),
        opened_by_staff_at=db.as_datetime(row[prefix + "opened_by_staff_at"]),
        staff_note=row[prefix + "staff_note"],
        confirmation_expires_at=db.as_datetime(row[prefix + "confirmation_expires_at"]),
        wrong_tries=row[prefix + "wrong_tries"],
        confirmed_at=db.as_datetime(row[prefix + "confirmed_at"]),
        effective_at=db.as_datetime(row[prefix + "effective_at"]),
        took_effect_at=db.as_datetime(row[prefix + "took_effect_at"]),
        closed_at=db.as_datetime(row[prefix + "closed_at"]),
    )


async def load(account_id: UUID) -> AccountView | None:
    """The account, whoever asks."""
    row = await db.fetch_one(f"SELECT {COLUMNS} FROM account a {JOINS} WHERE a.id = $1", account_id)
    return view(row) if row else None


async def lock(account_id: UUID) -> AccountView | None:
    """The account with its row locked until the transaction ends, read after the lock was had."""
    await lock_row(account_id)
    return await load(account_id)


async def lock_unless_busy(account_id: UUID) -> AccountView | None:
    """The same, without waiting: None also while another transaction has the row. For what can be tried again."""
    row = await db.fetch_one(f"SELECT id FROM account WHERE id = $1{db.for_update(skip_locked=True)}", account_id)
    return await load(account_id) if row else None


async def lock_row(account_id: UUID) -> None:
    """Wait for the account's row and lock it until the transaction ends. What is read after that, holds."""
    await db.fetch_one(f"SELECT id FROM account WHERE id = $1{db.for_update()}", account_id)


async def lock_rows(account_ids: Collection[UUID]) -> None:
    """The same for several, in the order in which everybody who locks several does."""
    if account_ids:
        marks = ", ".join(f"${index}" for index in range(1, len(account_ids) + 1))
        await db.fetch(f"SELECT id FROM account WHERE id IN ({marks}) ORDER BY id{db.for_update()}", *account_ids)


async def load_many(account_ids: Sequence[UUID]) -> dict[UUID, AccountView]:
    """The accounts of those ids that exist, in one statement."""
    if not account_ids:
        return {}
    marks = ", ".join(f"${index}" for index in range(1, len(account_ids) + 1))
    rows = await db.fetch(f"SELECT {COLUMNS} FROM account a {JOINS} WHERE a.id IN ({marks})", *account_ids)
    found = [view(row) for row in rows]
    return {account.id: account for account in found}


async def find(reference: str) -> UUID | None:
    """The id of the account with the host's reference."""
    row = await db.fetch_one("SELECT id FROM account WHERE reference = $1", reference)
    return db.as_uuid(row["id"]) if row else None


# ---------------------------------------------------------------------------------------------------- pages


class AccountSort(StrEnum):
    """Sort keys of the accounts' list. The value names its SQL, below."""

    NAME = "NAME"
    CREATED_AT = "CREATED_AT"
    DELETION_SCHEDULED_FOR = "DELETION_SCHEDULED_FOR"


@dataclass(frozen=True, kw_only=True)
class AccountFilter:
    """What staff looks for. Each field that is set narrows the list; sets mean "one of"."""

    statuses: frozenset[AccountStatus] | None = None
    plan_codes: frozenset[str] | None = None
    csm_email: str | None = None
    request_statuses: frozenset[RequestStatus] | None = None
    deletion_from: datetime | None = None
    deletion_before: datetime | None = None
    restart_requested: bool | None = None
    search: str | None = None
    """Matches the beginning or middle of name, reference, or a member's address, in any case."""
    person: tuple[str, str] | None = None
    """Only accounts of this (issuer, subject)."""
    with_access: bool = False
    """Only accounts whose members have access now."""


class _Where:
    """Collects conditions and their numbered arguments."""

    def __init__(self) -> None:
        self.conditions: list[str] = []
        self.args: list[Any] = []

    def arg(self, value: Any) -> str:
        self.args.append(value)
        return f"${len(self.args)}"

    def one_of(self, column: str, values: Iterable[Any]) -> str:
        marks = ", ".join(self.arg(value) for value in values)
        return f"{column} IN ({marks})" if marks else "1 = 0"

    def add(self, condition: str) -> None:
        self.conditions.append(condition)

    def sql(self) -> str:
        return " AND ".join(self.conditions) or "1 = 1"


_SORT_SQL = {
    AccountSort.NAME: "a.name",
    AccountSort.CREATED_AT: "a.created_at",
    AccountSort.DELETION_SCHEDULED_FOR: "a.deletion_scheduled_for",
}


def _account_conditions(where: _Where, wanted: AccountFilter) -> None:
    if wanted.statuses is not None:
        where.add(where.one_of("a.status", sorted(wanted.statuses)))
    if wanted.plan_codes is not None:
        where.add(where.one_of("a.plan_code", sorted(wanted.plan_codes)))
    if wanted.csm_email is not None:
        where.add(f"a.csm_id IN (SELECT id FROM staff WHERE email = {where.arg(wanted.csm_email.lower())})")
    if wanted.deletion_from is not None:
        where.add(f"a.deletion_scheduled_for >= {where.arg(wanted.deletion_from)}")
    if wanted.deletion_before is not None:
        where.add(f"a.deletion_scheduled_for < {where.arg(wanted.deletion_before)}")
    if wanted.request_statuses is not None:
        status = where.one_of("q.status", sorted(wanted.request_statuses))
        where.add(f"EXISTS (SELECT 1 FROM cancellation_request q WHERE q.account_id = a.id AND {status})")
    if wanted.restart_requested is not None:
        negation = "" if wanted.restart_requested else "NOT "
        where.add(
            f"{negation}EXISTS (SELECT 1 FROM restart_request q JOIN cancellation_request e ON e.id = q.request_id "
            "WHERE q.account_id = a.id AND e.status = 'EFFECTIVE')"
        )
    if wanted.with_access:
        where.add(has_access_sql("a"))
    if wanted.person is not None:
        issuer, subject = wanted.person
        where.add(
            "a.id IN (SELECT m.account_id FROM member m "
            f"WHERE m.issuer = {where.arg(issuer)} AND m.subject = {where.arg(subject)} AND {is_member_sql('m')})"
        )
    if wanted.search:
        escaped = wanted.search.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        pattern = f"LOWER({where.arg(f'%{escaped}%')})"
        where.add(
            f"(LOWER(a.name) LIKE {pattern} ESCAPE '\\' OR LOWER(a.reference) LIKE {pattern} ESCAPE '\\' OR EXISTS "
            f"(SELECT 1 FROM member m WHERE m.account_id = a.id AND LOWER(m.email) LIKE {pattern} ESCAPE '\\'))"
        )


async def page(
    wanted: AccountFilter, *, sort: AccountSort, descending: bool, after: tuple[Any, ...] | None, limit: int
) -> list[AccountView]:
    """Up to `limit` accounts behind `after`, the (sort value, id) of the last one seen. One statement."""
    where = _Where()
    _account_conditions(where, wanted)
    key = _SORT_SQL[sort]
    if sort is AccountSort.NAME and db.dialect() == "postgresql":
        key += ' COLLATE "C"'  # by code points, as on SQLite, whatever the server's language
    order, beyond = ("DESC", "<") if descending else ("ASC", ">")
    if sort is AccountSort.DELETION_SCHEDULED_FOR:
        where.add(f"{key} IS NOT NULL")  # An account without the date has no place in an order by it.
    if after is not None:
        value, account_id = after
        where.add(f"({key}, a.id) {beyond} ({where.arg(value)}, {where.arg(account_id)})")
    return await select(where.sql(), where.args, order=f"{key} {order}, a.id {order}", limit=limit)


async def select(condition: str, args: Sequence[Any], *, order: str, limit: int) -> list[AccountView]:
    """Up to `limit` accounts `a` that meet a condition, in that order. One statement.

    The limit stands in a sub-select as a literal: the plan then joins for that many rows instead of for the table.
    """
    rows = await db.fetch(
        f"SELECT {COLUMNS} FROM (SELECT a.* FROM account a WHERE {condition} ORDER BY {order} LIMIT {int(limit)}) a "
        f"{JOINS} ORDER BY {order}",
        *args,
    )
    return [view(row) for row in rows]


@dataclass(frozen=True, kw_only=True)
class RequestFilter:
    statuses: frozenset[RequestStatus]
    csm_id: UUID | None = None
    """Of accounts that name this Customer Success Manager, and of accounts that name none."""


async def request_page(wanted: RequestFilter, *, after: tuple[Any, ...] | None, limit: int) -> list[RequestView]:
    """Up to `limit` requests of all accounts, oldest first. One statement."""
    where = _Where()
    where.add(where.one_of("r.status", sorted(wanted.statuses)))
    if wanted.csm_id is not None:
        where.add(f"(c.id = {where.arg(wanted.csm_id)} OR c.id IS NULL)")
    if after is not None:
        where.add(f"(r.requested_at, r.id) > ({where.arg(after[0])}, {where.arg(after[1])})")
    columns = ", ".join(f"r.{column}" for column in _REQUEST)
    rows = await db.fetch(
        f"SELECT {columns} FROM cancellation_request r JOIN account a ON a.id = r.account_id {_CSM} "
        f"WHERE {where.sql()} ORDER BY r.requested_at, r.id LIMIT {int(limit)}",
        *where.args,
    )
    return [_request(row, "") for row in rows]


async def windows(
    table: str,
    columns: str,
    order: tuple[str, str],
    account_ids: Sequence[UUID],
    after: tuple[Any, ...] | None,
    limit: int,
    condition: str = "1 = 1",
) -> dict[UUID, list[dict[str, Any]]]:
    """For each account up to `limit` rows of a table that meet the condition, largest `order` first, behind `after`.
    One statement for all."""
    where = _Where()
    where.add(where.one_of("account_id", account_ids))
    where.add(condition)
    first, second = order
    if after is not None:
        where.add(f"({first}, {second}) < ({where.arg(after[0])}, {where.arg(after[1])})")
    rows = await db.fetch(
        f"SELECT {columns} FROM (SELECT {columns}, ROW_NUMBER() OVER (PARTITION BY account_id "
        f"ORDER BY {first} DESC, {second} DESC) AS place FROM {table} WHERE {where.sql()}) ranked "
        f"WHERE place <= {int(limit)} ORDER BY account_id, place",
        *where.args,
    )
    found: dict[UUID, list[dict[str, Any]]] = {account_id: [] for account_id in account_ids}
    for row in rows:
        found[db.as_uuid(row["account_id"])].append(row)
    return found


async def belonging_to(table: str, account_ids: Sequence[UUID], *, order: str) -> list[dict[str, Any]]:
    """All rows of a table about those accounts, in that order. One statement."""
    if not account_ids:
        return []
    where = _Where()
    where.add(where.one_of("account_id", account_ids))
    return await db.fetch(f"SELECT * FROM {table} WHERE {where.sql()} ORDER BY {order}", *where.args)


async def request_history(
    account_ids: Sequence[UUID], *, after: tuple[Any, ...] | None, limit: int
) -> dict[UUID, list[RequestView]]:
    """For each account up to `limit` requests, newest first, behind `after`."""
    found = await windows(
        "cancellation_request", ", ".join(_REQUEST), ("requested_at", "id"), account_ids, after, limit
    )
    return {account_id: [_request(row, "") for row in rows] for account_id, rows in found.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberView:
    id: UUID
    account_id: UUID
    name: str
    email: str
    role: MemberRole
    permissions: frozenset[str]
    created_at: datetime

    @property
    def has_billing_permission(self) -> bool:
        """Every ADMIN has it; a MEMBER has it when granted."""
        return self.role is MemberRole.ADMIN or Permission.ACCESS_BILLING_AND_ACCOUNT_INFO in self.permissions


_MEMBER = "id, account_id, name, email, role, permissions, created_at"


def member(row: Mapping[str, Any], prefix: str = "") -> MemberView:
    """The member of a row whose columns have that prefix."""
    return MemberView(
        id=db.as_uuid(row[prefix + "id"]),
        account_id=db.as_uuid(row[prefix + "account_id"]),
        name=row[prefix + "name"],
        email=row[prefix + "email"],
        role=MemberRole(row[prefix + "role"]),
        permissions=frozenset(row[prefix + "permissions"].split()),
        created_at=db.as_datetime(row[prefix + "created_at"]),
    )


async def members_of(
    account_ids: Sequence[UUID], *, after: tuple[Any, ...] | None, limit: int
) -> dict[UUID, list[MemberView]]:
    """For each account up to `limit` members, newest first, behind `after`."""
    found = await windows("member", _MEMBER, ("created_at", "id"), account_ids, after, limit, is_member_sql("member"))
    return {account_id: [member(row) for row in rows] for account_id, rows in found.items()}


async def memberships(issuer: str, subject: str, account_ids: Sequence[UUID]) -> dict[UUID, MemberView]:
    """What a person is in each of those accounts."""
    if not account_ids:
        return {}
    where = _Where()
    where.add(f"issuer = {where.arg(issuer)} AND subject = {where.arg(subject)} AND {is_member_sql('member')}")
    where.add(where.one_of("account_id", account_ids))
    rows = await db.fetch(f"SELECT {_MEMBER} FROM member WHERE {where.sql()}", *where.args)
    found = [member(row) for row in rows]
    return {one.account_id: one for one in found}


async def load_member(member_id: UUID) -> MemberView | None:
    """The member, whoever asks."""
    row = await db.fetch_one(f"SELECT {_MEMBER} FROM member WHERE id = $1 AND {is_member_sql('member')}", member_id)
    return member(row) if row else None


async def load_request(request_id: UUID) -> RequestView | None:
    """The request, whoever asks."""
    row = await db.fetch_one(f"SELECT {', '.join(_REQUEST)} FROM cancellation_request WHERE id = $1", request_id)
    return _request(row, "") if row else None


# ---------------------------------------------------------------------------------- what belongs to a request


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedbackView:
    id: UUID
    account_id: UUID
    request_id: UUID
    reason: FeedbackReason
    comment: str | None
    submitted_by_id: UUID
    submitted_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class OfferView:
    id: UUID
    account_id: UUID
    request_id: UUID
    code: str
    kind: OfferKind
    title: str
    description: str
    status: OfferStatus
    offered_at: datetime
    answered_at: datetime | None


_FEEDBACK = "id, account_id, request_id, reason, comment, submitted_by_id, submitted_at"


def _feedback(row: Mapping[str, Any]) -> FeedbackView:
    return FeedbackView(
        id=db.as_uuid(row["id"]),
        account_id=db.as_uuid(row["account_id"]),
        request_id=db.as_uuid(row["request_id"]),
        reason=FeedbackReason(row["reason"]),
        comment=row["comment"],
        submitted_by_id=db.as_uuid(row["submitted_by_id"]),
        submitted_at=db.as_datetime(row["submitted_at"]),
    )


async def feedback_of(request_ids: Sequence[UUID]) -> dict[UUID, list[FeedbackView]]:
    """The feedback of each request, oldest first. One statement."""
    where = _Where()
    where.add(where.one_of("request_id", request_ids))
    rows = await db.fetch(
        f"SELECT {_FEEDBACK} FROM feedback WHERE {where.sql()} ORDER BY submitted_at, id", *where.args
    )
    found: dict[UUID, list[FeedbackView]] = {request_id: [] for request_id in request_ids}
    for row in rows:
        feedback = _feedback(row)
        found[feedback.request_id].append(feedback)
    return found


async def load_feedback(feedback_id: UUID) -> FeedbackView | None:
    """The feedback, whoever asks."""
    row = await db.fetch_one(f"SELECT {_FEEDBACK} FROM feedback WHERE id = $1", feedback_id)
    return _feedback(row) if row else None


_OFFER = "id, account_id, request_id, code, kind, title, description, status, offered_at, answered_at"


def _offer(row: Mapping[str, Any]) -> OfferView:
    return OfferView(
        id=db.as_uuid(row["id"]),
        account_id=db.as_uuid(row["account_id"]),
        request_id=db.as_uuid(row["request_id"]),
        code=row["code"],
        kind=OfferKind(row["kind"]),
        title=row["title"],
        description=row["description"],
        status=OfferStatus(row["status"]),
        offered_at=db.as_datetime(row["offered_at"]),
        answered_at=db.as_datetime(row["answered_at"]),
    )


async def offers_of(request_ids: Sequence[UUID]) -> dict[UUID, list[OfferView]]:
    """The offers made in each request, in the order they were made. One statement."""
    where = _Where()
    where.add(where.one_of("request_id", request_ids))
    rows = await db.fetch(f"SELECT {_OFFER} FROM offer WHERE {where.sql()} ORDER BY offered_at, id", *where.args)
    found: dict[UUID, list[OfferView]] = {request_id: [] for request_id in request_ids}
    for row in rows:
        offer = _offer(row)
        found[offer.request_id].append(offer)
    return found


async def load_offer(offer_id: UUID) -> OfferView | None:
    """The offer, whoever asks."""
    row = await db.fetch_one(f"SELECT {_OFFER} FROM offer WHERE id = $1", offer_id)
    return _offer(row) if row else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """Somebody named in an account's history, as far as they are still known."""

    name: str
    email: str | None


async def people(ids: Sequence[UUID]) -> dict[UUID, Person]:
    """Members and staff of those ids that still exist. One statement."""
    if not ids:
        return {}
    where = _Where()
    members = where.one_of("id", ids)
    rows = await db.fetch(
        f"SELECT id, name, email FROM member WHERE {members} UNION ALL SELECT id, name, email FROM staff "
        f"WHERE {members}",
        *where.args,
    )
    return {db.as_uuid(row["id"]): Person(name=row["name"], email=row["email"]) for row in rows}


async def restart_requested_at(account_ids: Sequence[UUID]) -> dict[UUID, datetime]:
    """When a former member last asked to restart the account since its cancellation. One statement."""
    where = _Where()
    where.add(where.one_of("q.account_id", account_ids))
    rows = await db.fetch(
        "SELECT q.account_id, MAX(q.requested_at) AS requested_at FROM restart_request q "
        f"JOIN cancellation_request e ON e.id = q.request_id WHERE e.status = 'EFFECTIVE' AND {where.sql()} "
        "GROUP BY q.account_id",
        *where.args,
    )
    return {db.as_uuid(row["account_id"]): db.as_datetime(row["requested_at"]) for row in rows}


async def member_count(account_id: UUID) -> int:
    """How many members it has."""
    row = await db.fetch_one(
        f"SELECT COUNT(*) AS members FROM member WHERE account_id = $1 AND {is_member_sql('member')}", account_id
    )
    assert row is not None
    return int(row["members"])
