"""The forms of times and ids: one in Python, one in each database.

A time is an aware `datetime` in UTC; SQLite stores it as text of a fixed width, because it compares times as text.
Naive times are refused wherever they come from: guessing a zone is how a deletion begins too early.
"""

import os
import threading
import time
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, overload
from uuid import UUID

from tortoise import fields


def utc(value: datetime) -> datetime:
    """The same moment in UTC. ValueError for a naive time."""
    if value.tzinfo is None or value.utcoffset() is None:
        raise ValueError(f"A time without a zone is refused: {value!r}")
    return value if value.tzinfo is UTC else value.astimezone(UTC)


def sqlite_text(value: datetime) -> str:
    """`YYYY-MM-DD HH:MM:SS.ffffff+00:00`: always 32 characters, so that text order is the order of time."""
    return utc(value).isoformat(sep=" ", timespec="microseconds")


@overload
def as_datetime(value: datetime | str) -> datetime: ...
@overload
def as_datetime(value: datetime | str | None) -> datetime | None: ...
def as_datetime(value: datetime | str | None) -> datetime | None:
    """A raw column's time as an aware UTC `datetime`, on both engines."""
    if value is None:
        return None
    return utc(datetime.fromisoformat(value) if isinstance(value, str) else value)


@overload
def as_uuid(value: UUID | str) -> UUID: ...
@overload
def as_uuid(value: UUID | str | None) -> UUID | None: ...
def as_uuid(value: UUID | str | None) -> UUID | None:
    """A raw column's id as a `UUID`, on both engines."""
    return UUID(value) if isinstance(value, str) else value


T = TypeVar("T", datetime, datetime | None)


class UtcDatetimeField(fields.DatetimeField[T]):
    """A moment, always aware and in UTC. Refuses naive values, when assigned and when stored, with ValueError.

    No `auto_now`: what decides about deletion reads the database's clock (`app.db.now`), never a process's."""

    @overload
    def __init__(self: "UtcDatetimeField[datetime]", *, null: Literal[False] = False) -> None: ...
    @overload
    def __init__(self: "UtcDatetimeField[datetime | None]", *, null: Literal[True]) -> None: ...
    def __init__(self, *, null: bool = False) -> None:
        super().__init__(null=null)  # type: ignore[call-overload, misc]

    def to_python_value(self, value: Any) -> datetime | None:
        moment: datetime | None = as_datetime(value)
        return moment

    def to_db_value(self, value: Any, instance: Any) -> Any:
        if isinstance(value, datetime):
            value = utc(value)
        self.validate(value)
        return value


_TAIL_BITS = 74
_last_stamp = 0
_stamp_lock = threading.Lock()


def uuid7() -> UUID:
    """A new time-ordered id (RFC 9562, version 7). Ids of one process grow strictly, also when its clock does not."""
    global _last_stamp  # noqa: PLW0603  the newest id is what makes the next one larger
    noise = int.from_bytes(os.urandom(10))
    stamp = (time.time_ns() // 1_000_000) << _TAIL_BITS | noise >> 7  # the tail's first bit is 0: room to count
    with _stamp_lock:
        if stamp <= _last_stamp:
            stamp = _last_stamp + 1 + (noise & 0xFFFFFFFF)
        _last_stamp = stamp
    milliseconds, tail = stamp >> _TAIL_BITS, stamp & ((1 << _TAIL_BITS) - 1)
    high, low = tail >> 62, tail & ((1 << 62) - 1)
    return UUID(int=(milliseconds & 0xFFFFFFFFFFFF) << 80 | 7 << 76 | high << 64 | 2 << 62 | low)
