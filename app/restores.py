"""Restores: the installation finds out that its database went back in time, or is told so, and nobody is harmed by it.

After a restore an account that was restarted since the back-up is canceled again and may be due, a hold is gone, and
epochs repeat that receivers have had. Therefore, from the moment that it is known:

1. No deletion begins until an operator has looked (`app.halts`), and every canceled account can be restarted for
   the minimum notice at least.
2. Every account's epoch is ahead by a million: the first transition of each takes it there, in `app.history`.
3. The present status of every account is enqueued for every endpoint, subscriber and enforcing system (`restate`),
   account by account, by whatever worker is there; it goes on where it was interrupted.

How it is known. A process remembers the newest transition that it has committed or read, and keeps it in a file in the
data folder. When the database does not have it any more, and nothing as new, time went back: a restore. The database
itself remembers what it was (`app.db.origin`): when it is not that any more, it was copied, moved or restored, and only
people know which. Deletions are halted then, and the rest waits for them to say so (`declare`). A fail-over begins a
new timeline and is told apart by the processes that ran through it: they find everything that they have seen.

What it is told by: `check`, which a process calls every few seconds (`watching`), and before any deletion begins.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final
from uuid import UUID
from weakref import WeakKeyDictionary

import orjson
import structlog

from app import accounts, changes, db, enforcement, errors, halts, history, lifecycle
from app.accounts import AccountView
from app.auth import Installation
from app.db import Database
from app.db.origin import Origin, origin, this_transaction_sql, writer_sql
from app.history import Landmark
from app.lifecycle import SYSTEM, AccountStatus, HaltCause, TransitionType

_log = structlog.stdlib.get_logger(__name__)

CHECK_SECONDS: Final = 5.0
"""What a process has seen is at most that old when it is kept in the data folder."""

_CHECK_WITHIN = timedelta(seconds=3)

_PAGE = 50
"""Accounts whose status is enqueued in one transaction, which holds their locks."""

_NAME = "restores"
_NOBODY = UUID(int=0)
_LEFT = f"FROM account WHERE id > $1 AND status <> '{AccountStatus.DELETED}'"
"""Accounts whose status is still to be enqueued, behind the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The row by which the database knows whose it is and what it was."""

    identity: UUID
    database: str | None
    timeline: int | None
    incidents: int
    restores: int
    restated_behind: UUID | None
    restated_at: datetime | None
    is_copied: bool
    """Another transaction wrote the row than the one that it names."""

    @property
    def is_restating(self) -> bool:
        """Whether the status of accounts is still to be enqueued."""
        return self.restores > 0 and self.restated_at is None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What a process has seen of the database, or the file in the data folder says that one has."""

    incidents: int
    restores: int
    landmark: Landmark | None
    timeline: int | None
    """None where it is from the file: who was not there cannot tell a fail-over from a restore."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The database is not what it was."""

    cause: HaltCause
    evidence: str


_seen: WeakKeyDictionary[Database, _Seen] = WeakKeyDictionary()


# ------------------------------------------------------------------------------------------------------- finding out


async def check(installation: Installation) -> None:
    """Look whether the database went back in time or is another one, and halt all deletions if so. Remembers what
    there is to see now. To be called outside of a transaction. A standby is left alone: it is another one's copy."""
    where = await origin()
    while not where.is_standby:
        record, is_new = await _record(), False
        if record is None:
            finding = await _unknown_here(installation)
            is_new = await _introduce(where)
            if not is_new:
                continue  # another process was first
            record = await _record()
            assert record is not None
        else:
            finding = await _compare(installation, record, where)
        if finding is not None and not await _act(installation, finding, record.incidents, where):
            continue  # another process has found something meanwhile: is there more to find?
        if finding is None and _differ(record.timeline, where.timeline):
            await _adopt(where)
            _log.warning("database.failed_over", timeline=where.timeline)
        await _remember(installation, where)
        await _keep_time(installation)
        return


async def examine(installation: Installation) -> Finding | None:
    """What `check` would find, without doing anything about it."""
    record, where = await _record(), await origin()
    if where.is_standby:
        return None
    return await (_unknown_here(installation) if record is None else _compare(installation, record, where))


async def _record() -> Record | None:
    row = await db.fetch_one(f"SELECT i.*, {writer_sql('i')} AS writer FROM installation i WHERE i.id = 1")
    if row is None:
        return None
    return Record(
        identity=db.as_uuid(row["identity"]),
        database=row["database"],
        timeline=row["timeline"],
        incidents=row["incidents"],
        restores=row["restores"],
        restated_behind=db.as_uuid(row["restated_behind"]),
        restated_at=db.as_datetime(row["restated_at"]),
        is_copied=row["written_by"] != row["writer"],
    )


async def _unknown_here(installation: Installation) -> Finding | None:
    """Of a database that knows no installation: whether one that the data folder knows was using it. A database
    without a history is a new one."""
    if not any(installation.data_dir.glob(_file_name("*"))) or await history.newest() is None:
        return None
    return Finding(
        cause=HaltCause.MOVED,
        evidence="The data folder knows an installation, and the database does not: it may be from an earlier version.",
    )


async def _compare(installation: Installation, record: Record, where: Origin) -> Finding | None:
    """What a process has seen itself is certain. What the file in the data folder says may be another database's, a
    copy for testing that is made anew each night: then it has what is later than that."""
    own, kept = _seen.get(db.bound()), _kept(installation, record.identity)
    found = [await _missing(record, one, is_certain=one is own) for one in (own, kept) if one is not None]
    for cause in (HaltCause.RESTORED, HaltCause.MOVED):
        if (one := next((one for one in found if one is not None and one.cause is cause), None)) is not None:
            return one
    if record.is_copied:
        return Finding(cause=HaltCause.MOVED, evidence="The database is a copy that was dumped and loaded.")
    if _differ(record.database, where.database):
        return Finding(
            cause=HaltCause.MOVED,
            evidence=f"It was {record.database}, and is {where.database}: a copy, or it has moved.",
        )
    if _differ(record.timeline, where.timeline) and (own is None or own.timeline != record.timeline):
        return Finding(
            cause=HaltCause.MOVED,
            evidence=f"The server's timeline was {record.timeline} and is {where.timeline}: a standby was promoted, or "
            "the server was restored to a point in time, and this process did not run through it.",
        )
    return None


async def _missing(record: Record, seen: _Seen, *, is_certain: bool) -> Finding | None:
    """What was seen, and is not there."""
    if record.restores > seen.restores:
        return None  # it is known: a restore was found or said since
    landmarks = [one for one in (seen.landmark, history.newest_committed() if is_certain else None) if one is not None]
    missing = await history.missing({one.id for one in landmarks})
    lost = max((one for one in landmarks if one.id in missing), key=lambda one: one.occurred_at, default=None)
    newest = await history.newest()
    has_later = lost is not None and newest is not None and newest.occurred_at >= lost.occurred_at
    if lost is None and record.incidents >= seen.incidents:
        return None
    what = (
        "An earlier restore or move"
        if lost is None
        else f"What happened on {lost.occurred_at:%Y-%m-%d at %H:%M:%S} UTC"
    )
    if is_certain or (lost is not None and not has_later):
        return Finding(cause=HaltCause.RESTORED, evidence=f"{what} was in the database and is not any more.")
    if record.incidents > seen.incidents:
        return None  # the same was found by another process
    return Finding(cause=HaltCause.MOVED, evidence=f"{what} is not in the database, which has another history.")


def _differ(one: object, other: object) -> bool:
    """Of what both are known."""
    return one is not None and other is not None and one != other


async def _introduce(where: Origin) -> bool:
    """Let a database that knows no installation know this one. Whether it did not."""
    made = await db.execute(
        "INSERT INTO installation (id, identity, database, timeline, written_by, incidents, restores, created_at) "
        f"SELECT 1, CAST($1 AS {'UUID' if db.dialect() == 'postgresql' else 'TEXT'}), CAST($2 AS VARCHAR(100)), "
        f"CAST($3 AS BIGINT), {this_transaction_sql()}, 0, 0, {db.now_sql()} "
        "WHERE NOT EXISTS (SELECT 1 FROM installation) ON CONFLICT (id) DO NOTHING",
        db.uuid7(),
        where.database,
        where.timeline,
    )
    return made == 1


async def _adopt(where: Origin) -> None:
    """What the database is, it is to be from now on."""
    await db.execute(
        f"UPDATE installation SET database = $1, timeline = $2, written_by = {this_transaction_sql()} WHERE id = 1",
        where.database,
        where.timeline,
    )


async def _act(installation: Installation, finding: Finding, incidents: int, where: Origin) -> bool:
    """Halt all deletions for what was found when there had been so many incidents. False, and nothing is done, where
    there is one more: another process has found something."""
    async with db.transaction():
        await db.exclusively(_NAME)
        record = await _record()
        assert record is not None
        if record.incidents != incidents:
            return False
        await _note(installation, record, where, restored=finding.cause is HaltCause.RESTORED)
        await halts.begin(installation, finding.cause, finding.evidence)
        db.on_commit(lambda: _log.error("restores.found", cause=finding.cause.value, evidence=finding.evidence))
    return True


async def _note(
    installation: Installation, record: Record, where: Origin, *, restored: bool, at_least: int = 0
) -> None:
    """Count what was found or said, within the open transaction, and take the database for what it is now. `at_least`:
    so many restores there have been, by what else is known."""
    # Restored twice, the database knows nothing of the first time: what this process and the data folder know counts.
    known: list[Record | _Seen] = [record, *_kept_of_all(installation)]
    if (own := _seen.get(db.bound())) is not None:
        known.append(own)
    incidents = max(at_least, *(one.incidents for one in known)) + 1
    restores = max(at_least, *(one.restores for one in known)) + restored
    status = ", restated_behind = NULL, restated_at = NULL" if restored else ""
    await db.execute(
        f"UPDATE installation SET incidents = $1, restores = $2, database = $3, timeline = $4{status}, "
        f"written_by = {this_transaction_sql()} WHERE id = 1",
        incidents,
        restores,
        where.database,
        where.timeline,
    )
    if restored:
        await _leave_time(installation, installation.policy.minimum_notice)
        await changes.announce_all()


async def _leave_time(installation: Installation, less_than: timedelta) -> None:
    """Whose window has ended, or ends soon, could not be restarted again, though it was restarted since the back-up:
    a canceled account that has less left has the minimum notice again."""
    policy, now = installation.policy, await db.now()
    date = now + policy.minimum_notice
    await db.execute(
        "UPDATE account SET restartable_until = $1, "
        "deletion_scheduled_for = CASE WHEN deletion_scheduled_for < $1 THEN $1 ELSE deletion_scheduled_for END, "
        "reminder_due_at = CASE WHEN deletion_scheduled_for < $1 THEN $2 ELSE reminder_due_at END "
        f"WHERE status = '{AccountStatus.CANCELED}' AND restartable_until < $3",
        date,
        lifecycle.reminders(date, policy.reminder_days, (), now).next_at,
        now + less_than,
    )


async def _keep_time(installation: Installation) -> None:
    """As long as nobody has looked after a restore, the time to restart an account does not run out."""
    if any(one.cause is HaltCause.RESTORED for one in await halts.current()):
        await _leave_time(installation, installation.policy.minimum_notice / 2)


async def _remember(installation: Installation, where: Origin) -> None:
    committed, record = history.newest_committed(), await _record()
    assert record is not None
    now = _Seen(
        incidents=record.incidents,
        restores=record.restores,
        landmark=await history.newest(),
        timeline=where.timeline,
    )
    history.forget_committed(committed)  # which the database was asked for since
    if now != _seen.get(db.bound()):
        _keep(installation, record.identity, now)
    _seen[db.bound()] = now


@asynccontextmanager
async def watching(installation: Installation) -> AsyncIterator[None]:
    """Within the block, `check` is called every few seconds; the first time before it begins, the last time when it
    has ended, so that the data folder knows all that was seen."""
    await check(installation)
    watch = asyncio.create_task(_watch(installation))
    try:
        yield
    finally:
        watch.cancel()
        await asyncio.wait([watch])
        await _check_quietly(installation)


async def _watch(installation: Installation) -> None:
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        await _check_quietly(installation)


async def _check_quietly(installation: Installation) -> None:
    try:
        async with db.deadline(_CHECK_WITHIN):
            await check(installation)
    except errors.Unavailable:
        pass  # who wants the database, says so
    except Exception:
        _log.exception("restores.check_failed")


# --------------------------------------------------------------------------------------------- the data folder's file


def _file_name(identity: UUID | str) -> str:
    return f"last-seen-{identity}.json"


def _kept(installation: Installation, identity: UUID) -> _Seen | None:
    """What the file in the data folder says; None where there is none, or it cannot be read."""
    return _read(installation.data_dir / _file_name(identity))


def _kept_of_all(installation: Installation) -> list[_Seen]:
    """Of all installations that the data folder knows: one that was restored from before it had a record is another."""
    return [one for file in installation.data_dir.glob(_file_name("*")) if (one := _read(file)) is not None]


def _read(file: Path) -> _Seen | None:
    try:
        kept = orjson.loads(file.read_bytes())
        landmark = kept["landmark"]
        return _Seen(
            incidents=int(kept["incidents"]),
            restores=int(kept["restores"]),
            landmark=landmark
            and Landmark(id=UUID(landmark["id"]), occurred_at=datetime.fromisoformat(landmark["occurred_at"])),
            timeline=None,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(installation: Installation, identity: UUID, seen: _Seen) -> None:
    """Best effort: a folder that cannot be written to takes away one way of finding out, and nothing else."""
    landmark = seen.landmark
    text = orjson.dumps(
        {
            "incidents": seen.incidents,
            "restores": seen.restores,
            "landmark": landmark and {"id": str(landmark.id), "occurred_at": landmark.occurred_at.isoformat()},
        }
    )
    folder, draft = installation.data_dir, None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=folder, prefix=".last-seen-")  # mkstemp makes it 0600
        with os.fdopen(handle, "wb") as file:
            file.write(text)
        Path(draft).replace(folder / _file_name(identity))
    except OSError as error:
        _log.info("restores.not_kept", reason=error.strerror)
        if draft is not None:
            Path(draft).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------- being told so


async def declare(installation: Installation, *, as_of: datetime, at_least: int = 0) -> None:
    """The database was restored to that time, an operator says: halt all deletions, take every account's epoch ahead,
    and have everybody notified how each account stands. `at_least` is what the logs tell of earlier restores.

    Saying it of a restore that was found already adds the time and nothing else, unless the logs tell of more restores
    than were found; repeating it changes nothing. Another time is another restore, and so is one of which there is
    evidence. Raises `InvalidInput` for a time that has not come.
    """
    if as_of > await db.now():
        raise errors.InvalidInput("That time has not come.", field="asOf")
    where = await origin()
    await _introduce(where)
    async with db.transaction():
        await db.exclusively(_NAME)
        record = await _record()
        assert record is not None
        if await _compare(installation, record, where) is None and await _is_known(as_of):
            return
        if record.restores < at_least or not await _is_found(installation, record, where, as_of):
            await _note(installation, record, where, restored=True, at_least=at_least)
        evidence = f"An operator has said that the database was restored as of {as_of:%Y-%m-%d %H:%M:%S} UTC."
        await halts.begin(installation, HaltCause.RESTORED, evidence, as_of=as_of)
    await _remember(installation, where)
    _log.error("restores.declared", as_of=as_of.isoformat())


async def _is_known(as_of: datetime) -> bool:
    """Whether that restore was said, and the halt after it has ended, or lasts."""
    lasting = [one.as_of for one in await halts.current() if one.cause is HaltCause.RESTORED]
    return as_of in lasting or (not lasting and await halts.ended(HaltCause.RESTORED, as_of))


async def _is_found(installation: Installation, record: Record, where: Origin, as_of: datetime) -> bool:
    """Whether the halt that lasts is of that restore. One that is older than what was restored came with it."""
    if await _compare(installation, record, where) is not None:
        return False
    lasting = [one for one in await halts.current() if one.cause is HaltCause.RESTORED]
    return any(one.as_of is None and as_of < one.halted_at for one in lasting)


# ------------------------------------------------------------------------------------------ telling how accounts stand


@dataclass(frozen=True, kw_only=True, slots=True)
class Restatement:
    """How far it is enqueued, for everybody, how each account stands."""

    restores: int
    """How many there have been."""
    left: int
    """Accounts whose status is still to be enqueued."""


async def restatement() -> Restatement:
    record = await _record()
    if record is None or not record.is_restating:
        return Restatement(restores=record.restores if record else 0, left=0)
    row = await db.fetch_one(f"SELECT COUNT(*) AS accounts {_LEFT}", record.restated_behind or _NOBODY)
    assert row is not None
    return Restatement(restores=record.restores, left=row["accounts"])


async def restate(installation: Installation) -> int:
    """Enqueue the status of the next accounts after a restore, in one transaction. Answers of how many: 0 when there
    are none left. An account that is deleted stays what it is: its last event was sent, or still is."""
    if (record := await _record()) is None or not record.is_restating:
        return 0
    async with db.transaction():
        await db.exclusively(_NAME)
        record = await _record()
        if record is None or not record.is_restating:
            return 0
        rows = await db.fetch(f"SELECT id {_LEFT} ORDER BY id LIMIT {_PAGE}", record.restated_behind or _NOBODY)
        now, behind, done = await db.now(), record.restated_behind, 0
        for row in rows:
            account = await accounts.lock_unless_busy(account_id := db.as_uuid(row["id"]))
            if account is None and await accounts.load(account_id) is not None:
                break  # somebody else has it: it is the next one, when they are done
            if account is not None and account.status is not AccountStatus.DELETED:
                await _restate(installation, account, now)
            behind, done = account_id, done + 1
        if rows and not done:
            return 0
        await db.execute(
            f"UPDATE installation SET restated_behind = $1, restated_at = $2, written_by = {this_transaction_sql()}",
            behind,
            None if rows else now,
        )
    if not rows:
        _log.info("restores.restated", restores=record.restores)
    return done


async def _restate(installation: Installation, account: AccountView, now: datetime) -> None:
    await history.append(
        TransitionType.STATUS,
        account_id=account.id,
        status=account.status,
        request_id=None,
        actor=SYSTEM,
        now=now,
    )
    await enforcement.ask_anew(installation.policy, account.id, now)
