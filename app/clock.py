"""The development clock: weeks of waiting played in a minute.

Everything about accounts, emailed links included, goes by `db.now()`: the database's clock and what the development
clock was moved ahead. People's tokens do not: they are made by somebody else and judged by real time.
"""

import re
from datetime import datetime, timedelta

import structlog

from app import changes, db, errors, idempotency
from app.auth import Call, require_staff

_log = structlog.stdlib.get_logger(__name__)

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_MOST = timedelta(days=3_660)


def duration(text: str) -> timedelta:
    """`60d`, `36h`, `30m` or `10s`. Raises `InvalidInput` for anything else, for nothing, and beyond ten years."""
    found = re.fullmatch(r"(\d{1,9})([smhd])", text.strip(), re.ASCII)
    parsed = timedelta(**{_UNITS[found[2]]: int(found[1])}) if found else timedelta()
    if not timedelta() < parsed <= _MOST:
        raise errors.InvalidInput("Write a duration as 60d, 36h, 30m or 10s, of ten years at most.", field="by")
    return parsed


async def advance(by: timedelta) -> datetime:
    """Move the development clock ahead, for the whole installation, and answer the time. Workers see it in seconds.

    Raises `PermissionDenied` where the clock is the database's own."""
    now = await db.advance_clock(by)
    if now is None:
        raise errors.PermissionDenied(
            "The clock here is the database's own. Only SUNSET_CLOCK=development is moved, and never the clock of a "
            "database that production has used."
        )
    await changes.announce_all()
    return now


async def advance_by(call: Call, by: str, *, idempotency_key: str | None = None) -> datetime:
    """The same by staff."""

    async def once() -> dict[str, str]:
        now = (await advance(duration(by))).isoformat()
        db.on_commit(lambda: _log.warning("clock.advanced", by=by, now=now))
        return {"now": now}

    async with db.transaction():
        await require_staff(call)
        done = await idempotency.once(call.identity, "advanceClock", idempotency_key, {"by": by}, None, once)
    return datetime.fromisoformat(done["now"])
