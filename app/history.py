"""An account's history: one row for each transition, in an order without gaps, never rewritten.

`append` is the only writer. It knows the account's row, which the caller has locked, and no people: actors are
kind and id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from app import accounts, db, metrics
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
) -> None:
    """Add a transition; `status` is the account's after it. `new_epoch`: a cancellation took effect, or a restart."""
    row = await db.fetch_one(
        "UPDATE account SET last_sequence = last_sequence + 1, epoch = epoch + $2 WHERE id = $1 "
        "RETURNING last_sequence, epoch",
        account_id,
        int(new_epoch),
    )
    assert row is not None, f"account {account_id} vanished under its lock"
    await Transition.create(
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
    db.on_commit(lambda: metrics.transition(kind))


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
        "sequence, epoch, type, account_id, request_id, actor_kind, account_status, occurred_at",
        ("sequence", "account_id"),
        account_ids,
        after,
        limit,
    )
    return {
        account_id: [
            TransitionView(
                sequence=row["sequence"],
                epoch=row["epoch"],
                type=TransitionType(row["type"]),
                account_id=account_id,
                request_id=db.as_uuid(row["request_id"]),
                actor_kind=ActorKind(row["actor_kind"]),
                account_status=AccountStatus(row["account_status"]),
                occurred_at=db.as_datetime(row["occurred_at"]),
            )
            for row in rows
        ]
        for account_id, rows in found.items()
    }
