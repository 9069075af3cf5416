"""Accounts come in: the host's accounts and members, and the staff and services of the company that runs them.

`sync` takes what the host knows and makes the rows say the same, as often as it is called. It owns the columns that
come from the host (name, plan, paid period, Customer Success Manager, members) and never writes those that tell of a
cancellation: status, dates and requests are `app.cancellation`'s and `app.restart`'s.

Knows no file format, no GraphQL and no caller: whoever calls has been authorized.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

import orjson

from app import changes, db, deletion, errors, history
from app.auth import Installation
from app.lifecycle import AccountStatus, MemberRole, Permission, Scope, StaffRole
from app.models import Account, Member, Service, Staff
from app.policy import Policy

MAX_ITEMS = 500
"""Accounts in one batch."""
MAX_MEMBERS = 1_000
"""Members of one account."""
MAX_BATCH_MEMBERS = 10_000
"""Members in one batch: what a transaction writes while it holds the accounts' locks."""

MAX_TEXT_LENGTH = 200
"""References and names."""
MAX_IDENTITY_LENGTH = 255
"""Issuers and subjects: what a token may carry."""
MAX_EMAIL_LENGTH = 254
MAX_SERVICE_NAME_LENGTH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberItem:
    """A member as the host knows them; to a token they are `issuer` and `subject`."""

    subject: str
    email: str
    name: str
    role: MemberRole
    permissions: frozenset[Permission] = frozenset()
    issuer: str | None = None
    """None: the installation's usual one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AccountItem:
    """An account as the host knows it: the whole of it, so that a date or a manager left out is taken away."""

    reference: str
    """The host's own name for the account; it never changes."""
    name: str
    plan_code: str
    current_period_end: datetime | None = None
    """When the period that is paid for ends; aware."""
    csm_email: str | None = None
    """The account's Customer Success Manager."""
    members: Sequence[MemberItem] | None = None
    """All members: who is not in it is removed, also while the account is canceled, and so is who is staff or a
    service. None leaves them as they are."""


class Outcome(StrEnum):
    CREATED = "CREATED"
    UPDATED = "UPDATED"
    UNCHANGED = "UNCHANGED"
    REFUSED = "REFUSED"


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemResult:
    """What became of one item. A refused one changed nothing; its `refusal` names the field within the item."""

    reference: str
    outcome: Outcome
    account_id: UUID | None = None
    members_added: int = 0
    members_changed: int = 0
    members_removed: int = 0
    refusal: errors.InvalidInput | None = None
    members_refused: Sequence[errors.InvalidInput] = ()
    """Listed members without whom the item was applied, by their place: they are staff or services."""


# --------------------------------------------------------------------------------------------- what is acceptable

_LOCAL_PART = re.compile(r"[^\s\"(),:;<>@\[\\\]]{1,64}")
_DOMAIN = re.compile(r"[\w.-]{1,253}")


def _text(value: str, field: str, longest: int = MAX_TEXT_LENGTH) -> None:
    """A line that people read: no control characters, no line ends, no half of a surrogate pair."""
    if not 1 <= len(value) <= longest or value != value.strip():
        raise errors.InvalidInput(
            f"It has 1 to {longest} characters and no space at its ends; this one has {len(value):,}.", field=field
        )
    if any(unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in value):
        raise errors.InvalidInput("It is a single line, without control characters.", field=field)


def _identity(value: str, field: str) -> None:
    """A subject or an issuer, as `app.tokens` accepts them."""
    if not 1 <= len(value) <= MAX_IDENTITY_LENGTH or not value.isprintable() or value != value.strip():
        raise errors.InvalidInput(
            f"It has 1 to {MAX_IDENTITY_LENGTH} printable characters and no space at its ends.", field=field
        )


def _email(value: str, field: str) -> None:
    """An address that a message can be sent to, as far as its form tells."""
    local, _, domain = value.rpartition("@")
    if len(value) > MAX_EMAIL_LENGTH or not value.isprintable():
        raise errors.InvalidInput(f"An address has up to {MAX_EMAIL_LENGTH} printable characters.", field=field)
    if not _LOCAL_PART.fullmatch(local) or not _DOMAIN.fullmatch(domain) or ".." in value or value.startswith("."):
        raise errors.InvalidInput(f"{value!r} is not an email address.", field=field)


def check(item: AccountItem, policy: Policy, member_issuer: str) -> None:
    """Refuse with `InvalidInput` an item that no database would make acceptable. Pure."""
    _text(item.reference, "reference")
    if item.reference.startswith("deleted:"):
        raise errors.InvalidInput("`deleted:` begins the references of deleted accounts.", field="reference")
    _text(item.name, "name")
    if item.plan_code not in policy.plans:
        known = ", ".join(sorted(policy.plans))
        raise errors.InvalidInput(f"{item.plan_code!r} is no plan of the policy, which has {known}.", field="planCode")
    end = item.current_period_end
    if end is not None and end.utcoffset() is None:
        raise errors.InvalidInput("A time needs its zone, best UTC: 2027-01-31T00:00:00Z.", field="currentPeriodEnd")
    if end is not None and not 2000 <= end.year <= 9000:  # at the calendar's ends, other zones have no date
        raise errors.InvalidInput(f"The year {end.year} cannot be meant.", field="currentPeriodEnd")
    if item.csm_email is not None:
        _email(item.csm_email, "csmEmail")
    members = item.members or ()
    if len(members) > MAX_MEMBERS:
        raise errors.InvalidInput(
            f"An account has up to {MAX_MEMBERS:,} members; this one has {len(members):,}.", field="members"
        )
    seen: dict[tuple[str, str], int] = {}
    for index, member in enumerate(members):
        path = f"members[{index}]"
        _identity(member.subject, f"{path}.subject")
        if member.issuer is not None:
            _identity(member.issuer, f"{path}.issuer")
        _email(member.email, f"{path}.email")
        _text(member.name, f"{path}.name")
        first = seen.setdefault((member.issuer or member_issuer, member.subject), index)
        if first != index:
            raise errors.InvalidInput(
                f"members[{first}] has the same subject: a person is a member of an account once.",
                field=f"{path}.subject",
            )


# ------------------------------------------------------------------------------------------------------------ sync


def _gone() -> errors.InvalidInput:
    return errors.InvalidInput(
        "The account's deletion has begun or is done; it cannot come back. Set up a new account, under a reference of "
        "its own.",
        field="reference",
    )


class _DryRun(Exception):
    """Ends the transaction of a dry run."""


async def sync(installation: Installation, items: Sequence[AccountItem], *, dry_run: bool = False) -> list[ItemResult]:
    """Create or update the accounts, all in one transaction, and answer for each item, in order.

    Repeating it changes nothing. A refused item (see `check`; also an unknown Customer Success Manager, an account
    whose deletion has begun, a reference that stands twice in the batch) leaves the others alone. Who is staff or a
    service is no member, and no reason to keep somebody whom the host removes: the item is applied as if it did not
    list them, and the answer names them. The accounts' rows are locked, so a member whose permission is taken away here
    either confirmed before or cannot any more, and a restart brings back those who are named before it or after it,
    never during. `dry_run` does everything and rolls back. Raises `InvalidInput` for a batch that is too large.
    """
    if len(items) > MAX_ITEMS:
        raise errors.InvalidInput(
            f"A batch has up to {MAX_ITEMS} items; this one has {len(items):,}.", field="accounts"
        )
    members = sum(len(item.members or ()) for item in items)
    if members > MAX_BATCH_MEMBERS:
        raise errors.InvalidInput(
            f"A batch has up to {MAX_BATCH_MEMBERS:,} members; this one has {members:,}. Split it.", field="accounts"
        )
    batch = _Batch(installation, items)
    try:
        async with db.transaction():
            await batch.run()
            if dry_run:
                raise _DryRun
    except _DryRun:
        pass
    return batch.results()


class _Batch:
    """One batch on its way: what was refused, and the accounts that the rest of the items are about.

    A handful of statements whatever the batch's size: rows travel as one JSON parameter, and the database compares.
    """

    def __init__(self, installation: Installation, items: Sequence[AccountItem]) -> None:
        self._policy = installation.policy
        self._member_issuer = installation.member_issuer
        self._items = items
        self._refusals: dict[int, errors.InvalidInput] = {}
        self._accepted: dict[str, AccountItem] = {}
        """By reference; without the members who are refused."""
        self._members_refused: dict[str, list[errors.InvalidInput]] = {}
        """By reference, of the accepted."""
        self._ids: dict[str, UUID] = {}
        self._created: set[UUID] = set()
        self._changed: set[UUID] = set()
        self._members_added: Counter[UUID] = Counter()
        self._members_changed: Counter[UUID] = Counter()
        self._members_removed: Counter[UUID] = Counter()

    def results(self) -> list[ItemResult]:
        return [self._result(index, item) for index, item in enumerate(self._items)]

    def _result(self, index: int, item: AccountItem) -> ItemResult:
        refusal = self._refusals.get(index)
        if refusal is not None:
            return ItemResult(reference=item.reference, outcome=Outcome.REFUSED, refusal=refusal)
        id_ = self._ids[item.reference]
        if id_ in self._created:
            outcome = Outcome.CREATED
        else:
            outcome = Outcome.UPDATED if id_ in self._changed else Outcome.UNCHANGED
        return ItemResult(
            reference=item.reference,
            outcome=outcome,
            account_id=id_,
            members_added=self._members_added[id_],
            members_changed=self._members_changed[id_],
            members_removed=self._members_removed[id_],
            members_refused=self._members_refused[item.reference],
        )

    async def run(self) -> None:
        managers, insiders = await self._managers(), await self._insiders()
        places: defaultdict[str, list[int]] = defaultdict(list)
        for index, item in enumerate(self._items):
            places[item.reference].append(index)
        for index, item in enumerate(self._items):
            try:
                check(item, self._policy, self._member_issuer)
                if len(places[item.reference]) > 1:
                    where = " and ".join(f"accounts[{place}]" for place in places[item.reference])
                    raise errors.InvalidInput(f"The reference stands in {where}; which one holds?", field="reference")
                if item.csm_email is not None and item.csm_email.lower() not in managers:
                    raise errors.InvalidInput(
                        f"No active Customer Success Manager has the address {item.csm_email!r}.", field="csmEmail"
                    )
            except errors.InvalidInput as refusal:
                self._refusals[index] = refusal
            else:
                self._accept(item, insiders)
        if not self._accepted:
            return
        wanted = {reference: self._account_row(item, managers) for reference, item in self._accepted.items()}
        now = await db.now()
        # Creating comes before locking, by reference and by id: whoever waits for another batch here never holds
        # what that one is waiting for.
        await self._create(wanted, now)
        await self._refuse_deleted(wanted)
        await self._lock_and_compare(wanted)
        await self._update([{"id": self._ids[reference], **row} for reference, row in wanted.items()])
        await self._replace_members(now)
        await changes.announce(self._changed - self._created)

    def _accept(self, item: AccountItem, insiders: dict[tuple[str, str], str]) -> None:
        """Their rows go like those of anybody who is not listed: what they were as members does not wait for them to
        leave the company, and the host, which is told each time, brings them back by naming them then."""
        kinds = [insiders.get(self._identity_of(member)) for member in item.members or ()]
        self._members_refused[item.reference] = [
            errors.InvalidInput(
                f"The subject belongs to {kind}, and neither staff nor services can be members: it is left out.",
                field=f"members[{place}].subject",
            )
            for place, kind in enumerate(kinds)
            if kind is not None
        ]
        if item.members is not None:
            members = [member for member, kind in zip(item.members, kinds, strict=True) if kind is None]
            item = replace(item, members=members)
        self._accepted[item.reference] = item

    async def _managers(self) -> dict[str, UUID]:
        """The ids of the Customer Success Managers that the items name, by address."""
        addresses = {item.csm_email.lower() for item in self._items if item.csm_email is not None}
        if not addresses:
            return {}
        rows = await db.fetch(
            "SELECT id, email FROM staff WHERE role = 'CUSTOMER_SUCCESS_MANAGER' AND deactivated_at IS NULL"
        )
        return {row["email"]: db.as_uuid(row["id"]) for row in rows if row["email"] in addresses}

    async def _insiders(self) -> dict[tuple[str, str], str]:
        """Who is staff or a service, by issuer and subject. Whoever becomes so while this batch runs is listed as a
        member then, and is none (`accounts.is_member_sql`)."""
        if not any(item.members for item in self._items):
            return {}
        rows = await db.fetch(
            "SELECT issuer, subject, 'staff' AS kind FROM staff WHERE deactivated_at IS NULL UNION ALL "
            "SELECT issuer, subject, 'a service' AS kind FROM service WHERE deactivated_at IS NULL"
        )
        return {(row["issuer"], row["subject"]): row["kind"] for row in rows}

    def _identity_of(self, member: MemberItem) -> tuple[str, str]:
        return member.issuer or self._member_issuer, member.subject

    def _account_row(self, item: AccountItem, managers: dict[str, UUID]) -> dict[str, Any]:
        return {
            "name": item.name,
            "plan_code": item.plan_code,
            "current_period_end": _milliseconds(item.current_period_end),
            "csm_id": managers[item.csm_email.lower()] if item.csm_email is not None else None,
        }

    async def _create(self, wanted: dict[str, dict[str, Any]], now: datetime) -> None:
        rows = [{"id": db.uuid7(), "reference": reference, **row} for reference, row in wanted.items()]
        created = await db.fetch(
            "INSERT INTO account (id, reference, name, plan_code, current_period_end, csm_id, status, epoch, "
            "last_sequence, created_at) SELECT id, reference, name, plan_code, current_period_end, csm_id, 'ACTIVE', "
            f"{history.first_epoch_sql()}, 0, $2 FROM {_rowset(reference='text', **_ACCOUNT)} WHERE TRUE "
            "ORDER BY reference ON CONFLICT (reference) DO NOTHING RETURNING id, reference",
            _json(rows),
            now,
        )
        for row in created:
            id_ = db.as_uuid(row["id"])
            self._created.add(id_)
            self._ids[row["reference"]] = id_

    async def _refuse_deleted(self, wanted: dict[str, dict[str, Any]]) -> None:
        """Take back the accounts just created whose reference is that of a deleted one: a host that still lists it
        must not bring it back by its next sync."""
        tombstones = {deletion.tombstone_reference(reference): reference for reference in self._ids}
        rows = await db.fetch(
            f"SELECT reference FROM account WHERE reference IN (SELECT reference FROM {_rowset(reference='text')})",
            _json([{"reference": tombstone} for tombstone in tombstones]),
        )
        for row in rows:
            reference = tombstones[row["reference"]]
            id_ = self._ids.pop(reference)
            self._created.remove(id_)
            await db.execute("DELETE FROM account WHERE id = $1", id_)
            self._refuse(reference, _gone())
            del wanted[reference]

    async def _lock_and_compare(self, wanted: dict[str, dict[str, Any]]) -> None:
        """Lock the accounts that existed; leave in `wanted` those of them whose row is to change."""
        for reference in self._ids:
            del wanted[reference]
        rows = await db.fetch(
            "SELECT id, reference, name, plan_code, current_period_end, csm_id, status FROM account "
            f"WHERE reference IN (SELECT reference FROM {_rowset(reference='text')}) ORDER BY id{db.for_update()}",
            _json([{"reference": reference} for reference in wanted]),
        )
        for row in rows:
            reference, id_ = row["reference"], db.as_uuid(row["id"])
            self._ids[reference] = id_
            if AccountStatus(row["status"]) in {AccountStatus.DELETING, AccountStatus.DELETED}:
                self._refuse(reference, _gone())
                del wanted[reference]
            elif wanted[reference] == {
                "name": row["name"],
                "plan_code": row["plan_code"],
                "current_period_end": db.as_datetime(row["current_period_end"]),
                "csm_id": db.as_uuid(row["csm_id"]),
            }:
                del wanted[reference]

        for reference in [one for one in wanted if one not in self._ids]:
            # It was there when this one was to be created, and its erasure was committed while its lock was waited for.
            self._refuse(reference, _gone())
            del wanted[reference]

    def _refuse(self, reference: str, refusal: errors.InvalidInput) -> None:
        index = next(index for index, item in enumerate(self._items) if item.reference == reference)
        self._refusals[index] = refusal
        del self._accepted[reference]

    async def _update(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        await db.execute(
            "UPDATE account SET name = r.name, plan_code = r.plan_code, current_period_end = r.current_period_end, "
            f"csm_id = r.csm_id FROM {_rowset(**_ACCOUNT)} WHERE account.id = r.id",
            _json(rows),
        )
        self._changed.update(row["id"] for row in rows)

    async def _replace_members(self, now: datetime) -> None:
        """Remove, add and change members where the items list them. Who stays keeps their id."""
        accounts = [
            {"account_id": self._ids[reference]}
            for reference, item in self._accepted.items()
            if item.members is not None and self._ids[reference] not in self._created
        ]
        listed = [
            {
                "id": db.uuid7(),
                "account_id": self._ids[reference],
                "issuer": self._identity_of(member)[0],
                "subject": member.subject,
                "email": member.email,
                "name": member.name,
                "role": member.role.value,
                "permissions": " ".join(sorted(member.permissions)),
            }
            for reference, item in self._accepted.items()
            for member in item.members or ()
        ]
        rows = _json(listed)
        if accounts:
            removed = await db.fetch(
                f"DELETE FROM member WHERE account_id IN (SELECT account_id FROM {_rowset(account_id='uuid')}) "
                "AND (account_id, issuer, subject) NOT IN "
                f"(SELECT account_id, issuer, subject FROM {_rowset(parameter='$2', **_MEMBER)}) RETURNING account_id",
                _json(accounts),
                rows,
            )
            self._members_removed.update(db.as_uuid(row["account_id"]) for row in removed)
        written = await db.fetch(
            "INSERT INTO member (id, account_id, issuer, subject, email, name, role, permissions, created_at) "
            "SELECT id, account_id, issuer, subject, email, name, role, permissions, $2 "
            f"FROM {_rowset(**_MEMBER)} WHERE NOT EXISTS (SELECT 1 FROM member m WHERE m.account_id = r.account_id "
            "AND m.issuer = r.issuer AND m.subject = r.subject AND m.email = r.email AND m.name = r.name "
            "AND m.role = r.role AND m.permissions = r.permissions) "
            "ON CONFLICT (account_id, issuer, subject) DO UPDATE SET email = excluded.email, name = excluded.name, "
            "role = excluded.role, permissions = excluded.permissions RETURNING account_id, id",
            rows,
            now,
        )
        new = {member["id"] for member in listed}
        for row in written:
            counted = self._members_added if db.as_uuid(row["id"]) in new else self._members_changed
            counted[db.as_uuid(row["account_id"])] += 1
        self._changed.update(*(self._members_added, self._members_changed, self._members_removed))


_ACCOUNT = {"id": "uuid", "name": "text", "plan_code": "text", "current_period_end": "timestamptz", "csm_id": "uuid"}
_MEMBER = {
    "id": "uuid",
    "account_id": "uuid",
    "issuer": "text",
    "subject": "text",
    "email": "text",
    "name": "text",
    "role": "text",
    "permissions": "text",
}


def _rowset(*, parameter: str = "$1", **columns: str) -> str:
    """A parameter of `_json` as a table `r` of an SQL statement. No limit on parameters applies to its rows."""
    if db.dialect() == "postgresql":
        typed = ", ".join(f"{name} {kind}" for name, kind in columns.items())
        return f"json_to_recordset({parameter}::json) AS r({typed})"
    fields = ", ".join(f"json_extract(value, '$.{name}') AS {name}" for name in columns)
    return f"(SELECT {fields} FROM json_each({parameter})) AS r"


def _json(rows: list[dict[str, Any]]) -> str:
    """Rows in the one form that both engines' columns read alike: SQLite keeps times as this text."""
    return orjson.dumps(rows, default=_plain, option=orjson.OPT_PASSTHROUGH_DATETIME).decode()


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(sep=" ", timespec="microseconds")
    return str(value)  # asyncpg's own kind of UUID, which orjson does not take for one


def _milliseconds(value: datetime | None) -> datetime | None:
    """Cut to what the API tells, so that what was read can be written back unchanged."""
    return value and value.astimezone(UTC).replace(microsecond=value.microsecond // 1000 * 1000)


# ---------------------------------------------------------------------------------------------- staff and services


async def add_staff(*, email: str, name: str, role: StaffRole, issuer: str, subject: str) -> Staff:
    """A new person of the company, known to tokens by issuer and subject. Addresses are kept in lower case.

    Somebody who was deactivated is activated again, as they are described now. Whoever is a member of accounts is none
    from now on, for as long as they are staff. Raises `InvalidInput` when an active person has the address, or anybody
    else the subject.
    """
    _email(email, "email")
    _text(name, "name")
    _identity(issuer, "issuer")
    _identity(subject, "subject")
    email = email.lower()
    async with db.transaction():
        person = await Staff.get_or_none(email=email)
        if person is not None and person.deactivated_at is None:
            raise errors.InvalidInput(f"{email} is staff already, as {person.role.value}.", field="email")
        other = await Staff.get_or_none(issuer=issuer, subject=subject)
        if other is not None and (person is None or other.id != person.id):
            raise errors.InvalidInput(f"{other.email} has this subject.", field="subject")
        if person is None:
            person = Staff(id=db.uuid7(), email=email, created_at=await db.now())
            is_new = True
        else:
            is_new = False
        person.name, person.role, person.issuer, person.subject = name, role, issuer, subject
        person.deactivated_at = None
        await person.save(force_create=is_new)
        await changes.announce_all()
    return person


async def deactivate_staff(email: str) -> int:
    """Take a person's access away, from their next request on; history keeps naming them. Repeating changes nothing.

    Answers how many accounts still name them as Customer Success Manager: the host names another with a sync.
    Raises `NotFound`.
    """
    async with db.transaction():
        person = await Staff.get_or_none(email=email.lower())
        if person is None:
            raise errors.NotFound("staff")
        if person.deactivated_at is None:
            person.deactivated_at = await db.now()
            await person.save(update_fields=["deactivated_at"])
            await changes.announce_all()
        return await Account.filter(csm_id=person.id).count()


async def list_staff() -> list[Staff]:
    """Everybody, by address, also who was deactivated."""
    return await Staff.all().order_by("email")


async def add_service(*, name: str, scopes: frozenset[Scope], issuer: str, subject: str) -> Service:
    """Another system of the company, known to tokens by issuer and subject.

    One that was deactivated is activated again, as it is described now. Like staff, it is no member of any account from
    now on. Raises `InvalidInput` when an active service has the name, or any other the subject, and for no scopes at
    all.
    """
    _text(name, "name", MAX_SERVICE_NAME_LENGTH)
    _identity(issuer, "issuer")
    _identity(subject, "subject")
    if not scopes:
        raise errors.InvalidInput("A service without a scope may do nothing; give it one.", field="scopes")
    async with db.transaction():
        service = await Service.get_or_none(name=name)
        if service is not None and service.deactivated_at is None:
            raise errors.InvalidInput(f"There is a service {name} already.", field="name")
        other = await Service.get_or_none(issuer=issuer, subject=subject)
        if other is not None and (service is None or other.id != service.id):
            raise errors.InvalidInput(f"The service {other.name} has this subject.", field="subject")
        is_new = service is None
        if service is None:
            service = Service(id=db.uuid7(), name=name, created_at=await db.now())
        service.scopes = frozenset(scope.value for scope in scopes)
        service.issuer, service.subject, service.deactivated_at = issuer, subject, None
        await service.save(force_create=is_new)
        await changes.announce_all()
    return service


async def deactivate_service(name: str) -> None:
    """Take a service's access away, from its next request on. Repeating changes nothing. Raises `NotFound`."""
    async with db.transaction():
        service = await Service.get_or_none(name=name)
        if service is None:
            raise errors.NotFound("service")
        if service.deactivated_at is None:
            service.deactivated_at = await db.now()
            await service.save(update_fields=["deactivated_at"])
            await changes.announce_all()


async def memberships(issuer: str, subject: str) -> int:
    """How many accounts list somebody as a member, whatever else they are."""
    return await Member.filter(issuer=issuer, subject=subject).count()


async def list_services() -> list[Service]:
    """Every service, by name, also the deactivated."""
    return await Service.all().order_by("name")
