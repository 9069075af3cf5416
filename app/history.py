"""An account's history: one row for each transition, in an order without gaps, never rewritten.

`append` is the only writer. It knows the account's row, which the caller has locked, and no people: actors are
kind and id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from app import accounts, changes, db, metrics, webhooks
from app.events import CATALOGUE, Event, Said
from app.lifecycle import AccountStatus, Actor, ActorKind, TransitionType
from app.models import Transition


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
        "UPDATE account SET last_sequence = last_sequence + 1, epoch = epoch + $2 WHERE id = $1 "
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
    db.on_commit(lambda: metrics.transition(kind))


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
