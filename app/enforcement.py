"""Who has obeyed: the systems that the policy names acknowledge each cancellation; who does not in time is told of.

The only owner of its table. `ask` and `lift` join the transaction in which a cancellation takes effect or a restart
ends it. What systems acknowledge is the epoch that the cancellation began, so that an answer to an earlier cancellation
is never taken for one to this. Who is waited for is written down when it takes effect: a policy that names another
system later does not ask for what has been, and one that a policy no longer names is not late any more.

Knows no HTTP and no template. It changes nothing of an account: that messages stop and access ends does not wait for
anybody's acknowledgement.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import structlog

from app import accounts, db, errors, ids, metrics, outbox
from app.auth import Installation, ServiceFacts
from app.lifecycle import AccountStatus
from app.messages import EnforcementLate, LateAccount, LateSystem
from app.models import Enforcement
from app.policy import Policy

_log = structlog.stdlib.get_logger(__name__)

LETTERS_APART = timedelta(hours=1)
"""So far is one letter to the operators from the next. What becomes late in between is in the next one."""

_PENDING = "enforced_at IS NULL AND lifted_at IS NULL"
_NAME = "enforcement"
_LISTED = 10
"""A letter lists so many accounts of a system; the others are counted."""


class Status(StrEnum):
    PENDING = "PENDING"
    ENFORCED = "ENFORCED"


@dataclass(frozen=True, kw_only=True, slots=True)
class EnforcementView:
    """What one system was asked by a cancellation that stands, and whether it has obeyed."""

    id: UUID
    account_id: UUID
    epoch: int
    system: str
    asked_at: datetime
    due_at: datetime
    enforced_at: datetime | None

    @property
    def status(self) -> Status:
        return Status.PENDING if self.enforced_at is None else Status.ENFORCED

    def is_late(self, policy: Policy, now: datetime) -> bool:
        """Whether it is waited for in vain. Not of a system that the policy does not name any more."""
        return self.enforced_at is None and self.due_at <= now and self.system in _names(policy)


def _names(policy: Policy) -> dict[str, str]:
    return {system.code: system.name for system in policy.enforcing_systems}


def _among(policy: Policy, first: int) -> tuple[str, list[str]]:
    """The condition that a row is of a system of the policy, and its arguments from `$first` on."""
    codes = list(_names(policy))
    marks = ", ".join(f"${index}" for index in range(first, first + len(codes)))
    return (f"system IN ({marks})" if codes else "1 = 0"), codes


def name_of(system: str, policy: Policy) -> str:
    """A system's name for people: its code, where the policy does not name it any more."""
    return _names(policy).get(system, system)


def _view(row: Mapping[str, Any]) -> EnforcementView:
    return EnforcementView(
        id=db.as_uuid(row["id"]),
        account_id=db.as_uuid(row["account_id"]),
        epoch=row["epoch"],
        system=row["system"],
        asked_at=db.as_datetime(row["asked_at"]),
        due_at=db.as_datetime(row["due_at"]),
        enforced_at=db.as_datetime(row["enforced_at"]),
    )


# ------------------------------------------------------------------------------------- what a cancellation brings


async def ask(policy: Policy, account_id: UUID, now: datetime) -> None:
    """Wait for each system of the policy to acknowledge the cancellation that takes effect now. To be called when the
    account has the epoch that the cancellation begins."""
    if not policy.enforcing_systems:
        return
    row = await db.fetch_one("SELECT epoch FROM account WHERE id = $1", account_id)
    assert row is not None, f"account {account_id} vanished under its lock"
    await Enforcement.bulk_create(
        [
            Enforcement(
                id=db.uuid7(),
                account_id=account_id,
                epoch=row["epoch"],
                system=system.code,
                asked_at=now,
                due_at=now + system.within,
                report_at=now + system.within,
            )
            for system in policy.enforcing_systems
        ]
    )


async def lift(account_id: UUID, now: datetime) -> int:
    """The epoch that systems were asked for is over, since a restart has ended the cancellation: nobody is waited for
    any more, and what was acknowledged stays known. After what it ends, even if the clock was set back since. To be
    called when the account has its new epoch. Returns how many were asked."""
    last = "COALESCE(enforced_at, asked_at)"
    return await db.execute(
        f"UPDATE enforcement SET lifted_at = CASE WHEN {last} > $2 THEN {last} ELSE $2 END "
        "WHERE account_id = $1 AND lifted_at IS NULL AND epoch < (SELECT epoch FROM account WHERE id = $1)",
        account_id,
        now,
    )


async def ask_anew(policy: Policy, account_id: UUID, now: datetime) -> None:
    """After a restore of the database: what systems have acknowledged since the back-up, of this cancellation or of
    its end, is not known. They acknowledge the account's new epoch, where they were asked for an earlier one."""
    if await lift(account_id, now):
        await ask(policy, account_id, now)


async def acknowledge(policy: Policy, service: ServiceFacts, account_id: UUID | None, epoch: int) -> EnforcementView:
    """The service's system has obeyed the cancellation that began that epoch. Repeating it changes nothing: the first
    time stays. How far the deletion of the account has gone does not matter. `service` has the scope for it, and what
    it is called is all that it can speak for.

    Raises `PermissionDenied` for a service that is no enforcing system, `NotFound`, and `EnforcementNotAwaited` where
    that is not the epoch of a cancellation that awaits this system.
    """
    async with db.transaction():
        if account_id is not None:
            await accounts.lock_row(account_id)
        row = await db.fetch_one(
            "SELECT * FROM enforcement WHERE account_id = $1 AND epoch = $2 AND system = $3 AND lifted_at IS NULL",
            account_id,
            epoch,
            service.name,
        )
        if row is None:
            raise await _refusal(policy, service.name, account_id, epoch)
        found = _view(row)
        if found.enforced_at is None:
            now = max(await db.now(), found.asked_at)  # the clock may have been set back
            await db.execute(
                "UPDATE enforcement SET enforced_at = $2, enforced_by_id = $3 WHERE id = $1", found.id, now, service.id
            )
            await _measure(policy, found, now)
            found = replace(found, enforced_at=now)
        return found


async def _refusal(policy: Policy, system: str, account_id: UUID | None, epoch: int) -> errors.Refusal:
    if system not in _names(policy):
        return errors.PermissionDenied(f"The policy names no enforcing system {system!r}.")
    account = None if account_id is None else await accounts.load(account_id)
    if account is None:
        return errors.NotFound("account")
    if epoch < account.epoch:
        reason = "That cancellation is over: the account was restarted since. What came after has events of its own."
    elif epoch > account.epoch:
        reason = f"The account is at epoch {account.epoch}. Acknowledge the `epoch` of its `account.canceled`."
    elif account.canceled_at is None:
        reason = "The account is not canceled. Let its members in and send its messages."
    else:
        reason = f"It took effect before {system!r} was named as an enforcing system."
    return errors.EnforcementNotAwaited(
        f"No acknowledgement of epoch {epoch} is awaited. {reason}",
        epoch=account.epoch,
        account_status=account.status,
    )


async def _measure(policy: Policy, last: EnforcementView, now: datetime) -> None:
    """Under the account's lock, so that of several acknowledgements at once exactly one is the last. Systems that the
    policy does not name any more are not waited for."""
    if last.system not in _names(policy):
        return
    named, codes = _among(policy, 2)
    waits = await db.fetch_one(
        f"SELECT 1 AS one FROM enforcement WHERE account_id = $1 AND {_PENDING} AND {named} LIMIT 1",
        last.account_id,
        *codes,
    )
    if waits is None:
        db.on_commit(lambda: metrics.enforced(now - last.asked_at))


# ---------------------------------------------------------------------------------------------------------- timers


async def report(installation: Installation) -> set[UUID]:
    """Tell the operators, in one letter, which systems are late with which cancellations. What is late meanwhile waits
    for the next letter, an hour later. Answers the accounts of which they are told now, and those of which there is
    nothing to tell any more: their data is gone, or the policy does not name the system.

    It waits for nobody: what somebody is about to acknowledge or to restart is left for the next time.
    """
    policy = installation.policy
    async with db.transaction():
        await db.exclusively(_NAME)
        now = await db.now()
        last = await db.fetch_one("SELECT MAX(reported_at) AS at FROM enforcement WHERE reported_at IS NOT NULL")
        told_at = db.as_datetime(last["at"]) if last is not None else None
        if told_at is not None and now < told_at + LETTERS_APART:
            await _due("report_at = $2", "1 = 1", [now, told_at + LETTERS_APART])
            return set()
        named, codes = _among(policy, 2)
        worth_it = (
            f"{named} AND NOT EXISTS (SELECT 1 FROM account WHERE account.id = enforcement.account_id "
            f"AND account.status = '{AccountStatus.DELETED}')"
        )
        dropped = await _due("report_at = NULL", f"NOT ({worth_it})", [now, *codes])
        news = await _due("report_at = NULL, reported_at = $1", worth_it, [now, *codes])
        if news:
            late = await db.fetch(
                "SELECT system, COUNT(*) AS late, MIN(due_at) AS since FROM enforcement "
                f"WHERE {_PENDING} AND due_at <= $1 AND {worth_it} GROUP BY system",
                now,
                *codes,
            )
            await _tell(installation, late, news, now)
        return {db.as_uuid(row["account_id"]) for row in [*dropped, *news]}


async def _due(assignments: str, condition: str, args: list[Any]) -> list[dict[str, Any]]:
    """Change what is to be told at the time $1, and answer it. A row that another transaction has is passed over: a
    restart takes several, and would wait for this one while this one waits for it."""
    return await db.fetch(
        f"UPDATE enforcement SET {assignments} WHERE id IN (SELECT id FROM enforcement "
        f"WHERE {_PENDING} AND report_at IS NOT NULL AND report_at <= $1 AND {condition}"
        f"{db.for_update(skip_locked=True)}) RETURNING account_id, epoch, system, due_at",
        *args,
    )


async def _tell(
    installation: Installation, late: Sequence[Mapping[str, Any]], news: Sequence[Mapping[str, Any]], now: datetime
) -> None:
    counted = {row["system"]: row for row in late}
    systems = []
    for code, name in _names(installation.policy).items():
        if code not in counted:
            continue
        new = [row for row in news if row["system"] == code]
        new.sort(key=lambda row: (db.as_datetime(row["due_at"]), str(row["account_id"])))
        systems.append(
            LateSystem(
                code=code,
                name=name,
                since=db.as_datetime(counted[code]["since"]),
                late=counted[code]["late"],
                news=len(new),
                first=tuple(
                    LateAccount(id=ids.encode(ids.Kind.ACCOUNT, db.as_uuid(row["account_id"])), epoch=row["epoch"])
                    for row in new[:_LISTED]
                ),
            )
        )
    await outbox.put(
        [outbox.Addressed(to=installation.policy.operators, email=EnforcementLate(systems=tuple(systems)))],
        account_id=None,
        now=now,
        mail_domain=installation.mail_domain,
    )
    told = {system.code: system.news for system in systems}
    db.on_commit(lambda: _log.error("enforcement.late", systems=told))


# --------------------------------------------------------------------------------------------------------- reading


async def of(account_ids: Sequence[UUID]) -> dict[UUID, list[EnforcementView]]:
    """What the cancellations that stand ask of each system, by system; nothing for an account that is not canceled.
    One statement."""
    found: dict[UUID, list[EnforcementView]] = {account_id: [] for account_id in account_ids}
    for row in await accounts.belonging_to("enforcement", account_ids, order="system"):
        if row["lifted_at"] is None:
            found[db.as_uuid(row["account_id"])].append(_view(row))
    return found


_STATUS_SQL: Mapping[Status, str] = {
    Status.PENDING: "enforced_at IS NULL",
    Status.ENFORCED: "enforced_at IS NOT NULL",
}


async def page(
    policy: Policy,
    statuses: Iterable[Status],
    *,
    now: datetime,
    system: str | None = None,
    late: bool | None = None,
    after: tuple[Any, ...] | None = None,
    limit: int,
) -> list[EnforcementView]:
    """Up to `limit` of what the cancellations that stand ask of systems, by when it is due, behind the (due_at, id)
    `after`. One statement."""
    args: list[Any] = []

    def arg(value: Any) -> str:
        args.append(value)
        return f"${len(args)}"

    conditions = ["lifted_at IS NULL"]
    conditions.append("(" + (" OR ".join(_STATUS_SQL[status] for status in sorted(set(statuses))) or "1 = 0") + ")")
    if system is not None:
        conditions.append(f"system = {arg(system)}")
    if late is not None:
        named = ", ".join(arg(code) for code in _names(policy))
        is_late = f"enforced_at IS NULL AND due_at <= {arg(now)} AND system IN ({named})" if named else "1 = 0"
        conditions.append(f"{'' if late else 'NOT '}({is_late})")
    if after is not None:
        conditions.append(f"(due_at, id) > ({arg(after[0])}, {arg(after[1])})")
    rows = await db.fetch(
        f"SELECT * FROM enforcement WHERE {' AND '.join(conditions)} ORDER BY due_at, id LIMIT {int(limit)}", *args
    )
    return [_view(row) for row in rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """How many accounts' cancellations one system has not acknowledged."""

    system: str
    pending: int
    """In time still."""
    late: int
    late_since: datetime | None


async def waiting(policy: Policy) -> list[Waiting]:
    """For each system of the policy what it has not acknowledged. It costs what is pending, and no more."""
    now = await db.now()
    rows = await db.fetch(
        "SELECT system, COUNT(*) AS pending, COUNT(CASE WHEN due_at <= $1 THEN 1 END) AS late, MIN(due_at) AS first "
        f"FROM enforcement WHERE {_PENDING} GROUP BY system",
        now,
    )
    found = {row["system"]: row for row in rows}
    return [
        Waiting(
            system=code,
            pending=row["pending"] - row["late"] if row else 0,
            late=row["late"] if row else 0,
            late_since=db.as_datetime(row["first"]) if row and row["late"] else None,
        )
        for code in _names(policy)
        for row in [found.get(code)]
    ]
