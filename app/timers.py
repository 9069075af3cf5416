"""Everything that falls due by the clock, in one table, and the round that carries it out.

Due work is a query on the rows that it concerns, never a job of its own: what a restart, a hold or a withdrawal has
changed is simply not found. Any number of workers run rounds. What is due is found without a lock, oldest first, in
pages; each row is checked again under its account's lock, in a transaction of its own. A row that another transaction
holds is left for the next round; one that cannot be moved rests for a while and holds up no other.
"""

import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

import structlog

from app import assistance, cancellation, db, deletion, enforcement, errors
from app.auth import Installation
from app.deletion import Forget
from app.policy import Policy

_log = structlog.stdlib.get_logger(__name__)

PAGE = 100
"""Rows of one timer that are taken at a time."""

_REST_SECONDS = 60.0
_COUNTED = 1_000
"""A backlog is counted so far."""


@dataclass(frozen=True, kw_only=True)
class Timer:
    """Work that is due on the rows of a table: those that meet `condition` and whose time in `column` lies `after`
    (the policy's duration) in the past. Each wants a partial index on that column."""

    name: str
    table: str
    account: str
    """The column with the account's id."""
    column: str
    condition: str
    after: Callable[[Policy], timedelta] = lambda _: timedelta()


EXPIRE = Timer(
    name="expire_request",
    table="cancellation_request",
    account="account_id",
    column="confirmation_expires_at",
    condition="status = 'PENDING_CONFIRMATION'",
)
TAKE_EFFECT = Timer(
    name="take_effect",
    table="account",
    account="id",
    column="cancellation_effective_at",
    condition="cancellation_effective_at IS NOT NULL",
)
REMIND_CSM = Timer(
    name="remind_csm",
    table="cancellation_request",
    account="account_id",
    column="assistance_requested_at",
    condition="status = 'PENDING_ASSISTANCE' AND assistance_reminded_at IS NULL",
    after=lambda policy: policy.assistance_response,
)
ESCALATE = Timer(
    name="escalate_assistance",
    table="cancellation_request",
    account="account_id",
    column="assistance_requested_at",
    # Whose reminder fails is not found here, where they would stand before all others.
    condition=(
        "status = 'PENDING_ASSISTANCE' AND assistance_reminded_at IS NOT NULL AND assistance_escalated_at IS NULL"
    ),
    after=lambda policy: policy.assistance_escalation,
)
REMIND_DELETION = Timer(
    name="remind_deletion",
    table="account",
    account="id",
    column="reminder_due_at",
    condition="reminder_due_at IS NOT NULL",
)
BEGIN_DELETION = Timer(
    name="begin_deletion",
    table="account",
    account="id",
    column="deletion_scheduled_for",
    condition="status = 'CANCELED'",
)
ERASE = Timer(
    name="erase_account",
    table="deletion_step",
    account="account_id",
    column="due_at",
    condition=f"completed_at IS NULL AND system = '{deletion.OWN_SYSTEM}'",
)
REPORT_ENFORCEMENT = Timer(
    name="report_enforcement",
    table="enforcement",
    account="account_id",
    column="report_at",
    condition="enforced_at IS NULL AND lifted_at IS NULL AND report_at IS NOT NULL",
)
TIMERS = (EXPIRE, TAKE_EFFECT, REMIND_CSM, ESCALATE, REPORT_ENFORCEMENT, REMIND_DELETION, BEGIN_DELETION, ERASE)

Done = Callable[[str, timedelta], None]
"""Told of each row that was moved: the timer's name, and how long after its time."""

_Move = Callable[[Installation, Sequence[UUID]], Awaitable[Sequence[UUID]]]


class Timers:
    """Carries out what is due. One for each worker: it remembers which rows could not be moved just now."""

    def __init__(self, installation: Installation, *, forget: Forget, done: Done = lambda _name, _late: None) -> None:
        self._installation = installation
        self._done = done
        self._resting: dict[tuple[str, UUID], float] = {}
        self._moves: Mapping[str, _Move] = {
            EXPIRE.name: self._each(EXPIRE, cancellation.expire),
            TAKE_EFFECT.name: self._each(TAKE_EFFECT, cancellation.take_effect),
            REMIND_CSM.name: self._each(REMIND_CSM, assistance.remind),
            ESCALATE.name: self._each(ESCALATE, assistance.escalate),
            REPORT_ENFORCEMENT.name: self._whole(REPORT_ENFORCEMENT, enforcement.report),
            REMIND_DELETION.name: self._each(REMIND_DELETION, deletion.remind),
            BEGIN_DELETION.name: self._together(BEGIN_DELETION, deletion.begin),
            ERASE.name: self._each(ERASE, lambda shared, account_id: deletion.erase(shared, forget, account_id)),
        }

    async def run(self) -> int:
        """One round: a page of each timer. Returns how many rows were moved; there may be more when it is not 0."""
        moved = 0
        for timer in TIMERS:
            due_at = await self._page(timer)
            if not due_at:
                continue
            done = await self._moves[timer.name](self._installation, list(due_at))
            now = await db.now()
            for account_id in done:
                self._done(timer.name, now - due_at[account_id])
            moved += len(done)
        return moved

    async def next_due(self) -> timedelta | None:
        """How long until something falls due that is not due yet; None when nothing is to come."""
        policy, now = self._installation.policy, await db.now()
        times = [now - timer.after(policy) for timer in TIMERS]
        columns = ", ".join(
            f"(SELECT MIN({timer.column}) FROM {timer.table} WHERE {timer.condition} AND {timer.column} > ${index}) "
            f"AS {timer.name}"
            for index, timer in enumerate(TIMERS, 1)
        )
        row = await db.fetch_one(f"SELECT {columns}", *times)
        assert row is not None
        waits = [
            db.as_datetime(row[timer.name]) - since
            for timer, since in zip(TIMERS, times, strict=True)
            if row[timer.name] is not None
        ]
        return min(waits, default=None)

    async def _page(self, timer: Timer) -> dict[UUID, datetime]:
        """The oldest rows that are due and not resting, with the time at which each was."""
        clock = time.monotonic()
        self._resting = {row: until for row, until in self._resting.items() if until > clock}
        after = timer.after(self._installation.policy)
        now = await db.now()
        behind: tuple[datetime, UUID] | None = None
        while True:
            rows = await _due(timer, now - after, behind)
            found = {row: due_at + after for row, due_at in rows if (timer.name, row) not in self._resting}
            if found or len(rows) < PAGE:
                return found
            account_id, due_at = rows[-1]
            behind = due_at, account_id

    def _each(self, timer: Timer, move: Callable[[Installation, UUID], Awaitable[bool]]) -> _Move:
        """Moves one account after the other. One that fails, its plan being gone from the policy for example, rests."""

        async def all_of(shared: Installation, account_ids: Sequence[UUID]) -> Sequence[UUID]:
            done = []
            for account_id in account_ids:
                try:
                    if await move(shared, account_id):
                        done.append(account_id)
                except Exception as error:
                    await self._rest(timer, [account_id], error)
            return done

        return all_of

    def _whole(self, timer: Timer, move: Callable[[Installation], Awaitable[Collection[UUID]]]) -> _Move:
        """Moves at once all that is due, of which the page is a part. When that fails, the page rests."""

        async def all_of(shared: Installation, account_ids: Sequence[UUID]) -> Sequence[UUID]:
            try:
                moved = await move(shared)
            except Exception as error:
                await self._rest(timer, account_ids, error)
                return []
            return [account_id for account_id in account_ids if account_id in moved]

        return all_of

    async def _rest(self, timer: Timer, account_ids: Sequence[UUID], error: Exception) -> None:
        """Let them be for a while, and say why; to be called where `error` is caught."""
        about = {"account_id": str(account_ids[0])} if len(account_ids) == 1 else {"accounts": len(account_ids)}
        if isinstance(error, errors.Unavailable):
            await db.now()  # Raises where it is the database that is away, and not one row that is held.
            _log.warning("timer.busy", timer=timer.name, **about)
        else:
            _log.exception("timer.failed", timer=timer.name, **about)
        for account_id in account_ids:
            self._resting[timer.name, account_id] = time.monotonic() + _REST_SECONDS

    def _together(self, timer: Timer, move: _Move) -> _Move:
        """Moves all accounts at once. When that fails, one by one, so that the one that fails holds up no other."""

        async def one(shared: Installation, account_id: UUID) -> bool:
            return bool(await move(shared, [account_id]))

        async def all_of(shared: Installation, account_ids: Sequence[UUID]) -> Sequence[UUID]:
            try:
                return await move(shared, account_ids)
            except Exception:
                await db.now()
                return await self._each(timer, one)(shared, account_ids)

        return all_of


async def _due(timer: Timer, until: datetime, behind: tuple[datetime, UUID] | None) -> list[tuple[UUID, datetime]]:
    args: list[object] = [until]
    condition = f"{timer.condition} AND {timer.column} <= $1"
    if behind is not None:
        condition += f" AND ({timer.column}, {timer.account}) > ($2, $3)"
        args += behind
    rows = await db.fetch(
        f"SELECT {timer.account} AS id, {timer.column} AS due_at FROM {timer.table} WHERE {condition} "
        f"ORDER BY {timer.column}, {timer.account} LIMIT {PAGE}",
        *args,
    )
    return [(db.as_uuid(row["id"]), db.as_datetime(row["due_at"])) for row in rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class Backlog:
    """What is due of one timer and not done yet."""

    name: str
    due: int
    """Up to 1,000 are counted."""
    oldest_due_at: datetime | None


async def backlog(policy: Policy) -> list[Backlog]:
    """What is due and not done, timer by timer."""
    now = await db.now()
    found = []
    for timer in TIMERS:
        after = timer.after(policy)
        row = await db.fetch_one(
            f"SELECT COUNT(*) AS due, MIN(due_at) AS oldest FROM (SELECT {timer.column} AS due_at FROM {timer.table} "
            f"WHERE {timer.condition} AND {timer.column} <= $1 ORDER BY {timer.column} LIMIT {_COUNTED}) counted",
            now - after,
        )
        assert row is not None
        oldest = db.as_datetime(row["oldest"])
        found.append(Backlog(name=timer.name, due=row["due"], oldest_due_at=oldest and oldest + after))
    return found
