"""An account's history: one row for each transition, in an order without gaps, never rewritten.

`append` is the only writer. It knows the account's row, which the caller has locked, and no people: actors are
kind and id. Each transition is logged when it is committed, so that what a restore of the database has lost can be
read from the log.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

import structlog

from app import accounts, changes, db, metrics, webhooks
from app.db import Database
from app.events import CATALOGUE, Event, Said
from app.lifecycle import EPOCHS_OF_A_RESTORE, AccountStatus, Actor, ActorKind, TransitionType
from app.models import Transition

_log = structlog.stdlib.get_logger(__name__)

LOGGED = "account.transition"
"""The log line of a transition, whatever level is logged. `app.restores` reads it back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Landmark:
    """A transition that was seen in the database, by which it is found out whether the database still has it."""

    id: UUID
    occurred_at: datetime


_committed: WeakKeyDictionary[Database, Landmark] = WeakKeyDictionary()


def newest_committed() -> Landmark | None:
    """The transition that this process last committed to the bound database, since that was last forgotten."""
    return _committed.get(db.bound())


def forget_committed(landmark: Landmark | None) -> None:
    """What the database was asked for since. One that was committed meanwhile stays."""
    if landmark is not None and _committed.get(db.bound()) is landmark:
        del _committed[db.bound()]


async def newest() -> Landmark | None:
    """The newest transition that the database has, by the installation's clock."""
    row = await db.fetch_one("SELECT id, occurred_at FROM transition ORDER BY occurred_at DESC, id DESC LIMIT 1")
    return None if row is None else Landmark(id=db.as_uuid(row["id"]), occurred_at=db.as_datetime(row["occurred_at"]))


async def last_change(account_id: UUID) -> datetime | None:
    """When something last happened to an account; that its status was sent again is nothing that happened."""
    row = await db.fetch_one(
        f"SELECT occurred_at FROM transition WHERE account_id = $1 AND type <> '{TransitionType.STATUS}' "
        "ORDER BY sequence DESC LIMIT 1",
        account_id,
    )
    return None if row is None else db.as_datetime(row["occurred_at"])


async def missing(ids: Collection[UUID]) -> set[UUID]:
    """Which of those transitions the database does not have. One statement; up to 1,000 of them."""
    if not ids:
        return set()
    marks = ", ".join(f"${index}" for index in range(1, len(ids) + 1))
    rows = await db.fetch(f"SELECT id FROM transition WHERE id IN ({marks})", *ids)
    return set(ids) - {db.as_uuid(row["id"]) for row in rows}


def first_epoch_sql() -> str:
    """The epoch of a new account, as an SQL expression: 0, and ahead of all that were ever told after a restore."""
    return f"COALESCE((SELECT restores FROM installation), 0) * {EPOCHS_OF_A_RESTORE}"


async def append(
    kind: TransitionType,
    *,
    account_id: UUID,
    status: AccountStatus,
    request_id: UUID | None,
    actor: Actor,
    now: datetime,
    new_epoch: bool = False,
    offer_code: str | None = None,
    reference: str | None = None,
) -> None:
    """Add a transition, and promise the event that tells of it to who wants to know. To be called when the account's
    row is as the transition leaves it; `status` is its status then. `new_epoch`: a cancellation took effect, or a
    restart. `offer_code`: which offer was answered. `reference`: what the account was called, where its row has
    forgotten it."""
    row = await db.fetch_one(
        # After a restore the first transition, of whatever type, takes the account's epoch ahead.
        f"UPDATE account SET last_sequence = last_sequence + 1, "
        f"epoch = epoch % {EPOCHS_OF_A_RESTORE} + {first_epoch_sql()} + $2 WHERE id = $1 "
        "RETURNING last_sequence, epoch, reference, cancellation_effective_at, canceled_at, restartable_until, "
        "deletion_scheduled_for",
        account_id,
        int(new_epoch),
    )
    assert row is not None, f"account {account_id} vanished under its lock"
    transition_id = db.uuid7()
    await Transition.create(
        id=transition_id,
        account_id=account_id,
        sequence=row["last_sequence"],
        epoch=row["epoch"],
        type=kind,
        request_id=request_id,
        actor_kind=actor.kind,
        actor_id=actor.id,
        account_status=status,
        occurred_at=now,
    )
    await webhooks.put(
        Event(
            id=transition_id,
            type=kind,
            account_id=account_id,
            account_reference=reference or row["reference"],
            status=status,
            epoch=row["epoch"],
            sequence=row["last_sequence"],
            request_id=request_id,
            occurred_at=now,
            effective_at=db.as_datetime(row["cancellation_effective_at"]),
            canceled_at=db.as_datetime(row["canceled_at"]),
            restartable_until=db.as_datetime(row["restartable_until"]),
            deletion_scheduled_for=db.as_datetime(row["deletion_scheduled_for"]),
            offer_code=offer_code,
            feedback=await _said(kind, request_id),
        )
    )
    await changes.announce([account_id])
    database = db.bound()

    def committed() -> None:
        _committed[database] = Landmark(id=transition_id, occurred_at=now)
        metrics.transition(kind)
        _log.info(
            LOGGED,
            account_id=str(account_id),
            type=kind.value,
            epoch=row["epoch"],
            sequence=row["last_sequence"],
            status=status.value,
            actor_kind=actor.kind.value,
            cancellation_request_id=request_id and str(request_id),
            transition_id=str(transition_id),
            occurred_at=now.isoformat(),
        )

    db.on_commit(committed)


async def _said(kind: TransitionType, request_id: UUID | None) -> list[Said]:
    """The feedback that the event tells, oldest first."""
    if request_id is None or "feedback" not in CATALOGUE[kind].more:
        return []
    told = (await accounts.feedback_of([request_id]))[request_id]
    if kind is TransitionType.FEEDBACK_SUBMITTED:
        told = told[-1:]
    return [Said(reason=one.reason, comment=one.comment, submitted_at=one.submitted_at) for one in told]


_COLUMNS = "sequence, epoch, type, account_id, request_id, actor_kind, account_status, occurred_at"


@dataclass(frozen=True, kw_only=True, slots=True)
class TransitionView:
    sequence: int
    epoch: int
    type: TransitionType
    account_id: UUID
    request_id: UUID | None
    actor_kind: ActorKind
    account_status: AccountStatus
    occurred_at: datetime


async def of(
    account_ids: Sequence[UUID], *, after: tuple[int, UUID] | None, limit: int
) -> dict[UUID, list[TransitionView]]:
    """For each account up to `limit` transitions, newest first, behind the (sequence, account) `after`."""
    found = await accounts.windows(
        "transition",
        _COLUMNS,
        ("sequence", "account_id"),
        account_ids,
        after,
        limit,
    )
    return {account_id: [_view(account_id, row) for row in rows] for account_id, rows in found.items()}


async def next_after(account_id: UUID, sequence: int) -> TransitionView | None:
    """The account's first transition behind that one."""
    row = await db.fetch_one(
        f"SELECT {_COLUMNS} FROM transition WHERE account_id = $1 AND sequence > $2 ORDER BY sequence LIMIT 1",
        account_id,
        sequence,
    )
    return None if row is None else _view(account_id, row)


def _view(account_id: UUID, row: Mapping[str, Any]) -> TransitionView:
    return TransitionView(
        sequence=row["sequence"],
        epoch=row["epoch"],
        type=TransitionType(row["type"]),
        account_id=account_id,
        request_id=db.as_uuid(row["request_id"]),
        actor_kind=ActorKind(row["actor_kind"]),
        account_status=AccountStatus(row["account_status"]),
        occurred_at=db.as_datetime(row["occurred_at"]),
    )
