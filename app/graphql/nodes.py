"""Opaque ids and cursors: what clients hold instead of keys and offsets.

Ids are those of `app.ids`; a cursor is a position in one sort order. Both are opaque by contract, not secret: what
they lead to is decided by the caller's rights, in the query. This module knows no row and no caller.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import orjson

from app import errors
from app.ids import Kind, decode, decode_as, encode, from_base64, to_base64

__all__ = [
    "DEFAULT_PAGE_SIZE",
    "MAX_PAGE_SIZE",
    "KeyValue",
    "Keyset",
    "Kind",
    "decode",
    "decode_as",
    "encode",
    "page_size",
]

DEFAULT_PAGE_SIZE: Final = 20
MAX_PAGE_SIZE: Final = 100
_MAX_CURSOR_CHARACTERS: Final = 4096
_INTEGERS: Final = range(-(2**31), 2**31)

KeyValue = str | int | datetime | UUID | None
"""What a sort order can be made of."""


def page_size(first: int | None) -> int:
    """How many items a page has: 20 when `first` is not given. Refuses what is not 1 to 100 with BadUserInput."""
    if first is None:
        return DEFAULT_PAGE_SIZE
    if not 1 <= first <= MAX_PAGE_SIZE:
        raise errors.BadUserInput(f"`first` must be between 1 and {MAX_PAGE_SIZE}.", argument="first")
    return first


@dataclass(frozen=True, kw_only=True)
class Keyset:
    """One sort order of one list, and the only one that reads its cursors.

    The sort's name and the types of its columns are part of each cursor's meaning: a cursor of another list or another
    sort is refused, so a position never silently starts a page somewhere else.
    """

    name: str
    """Unique among all lists and sorts, for example `accounts:name:asc`."""

    types: tuple[type | tuple[type, ...], ...]
    """What `isinstance` expects of each column's value, the unique last one included: `(str, UUID)`."""

    def cursor(self, *values: KeyValue) -> str:
        """The position of the row with these sort values, one per column. Times keep their microseconds.

        Refuses values of other types or number with ValueError: that is a mistake of the query, not of a client.
        """
        if not self._fits(values):
            raise ValueError(f"{self.name} does not sort by {values!r}")
        return to_base64(orjson.dumps([self.name, *map(_pack, values)]))

    def position(self, after: str | None) -> tuple[KeyValue, ...] | None:
        """The sort values that the page starts after; None starts at the beginning.

        Refuses with BadUserInput whatever `cursor` of this very sort cannot have made.
        """
        if after is None:
            return None
        raw = from_base64(after) if len(after) <= _MAX_CURSOR_CHARACTERS else None
        try:
            name, *packed = orjson.loads(raw or b"")
            values = tuple(map(_unpack, packed))
        except (ValueError, TypeError):
            raise _bad_cursor() from None
        if name != self.name or not self._fits(values):
            raise _bad_cursor()
        return values

    def _fits(self, values: tuple[KeyValue, ...]) -> bool:
        return len(values) == len(self.types) and all(map(isinstance, values, self.types))


def _bad_cursor() -> errors.BadUserInput:
    return errors.BadUserInput(
        "`after` is not a cursor of this list in this order. Take it from `pageInfo.endCursor` or start without it.",
        argument="after",
    )


def _pack(value: KeyValue) -> str | None:
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("a naive datetime is no position")
        return "t" + value.astimezone(UTC).isoformat()
    if isinstance(value, UUID):
        return "u" + value.hex
    if isinstance(value, int):
        return f"i{value}"
    return None if value is None else "s" + value


def _unpack(packed: object) -> KeyValue:
    if packed is None:
        return None
    if not isinstance(packed, str) or "\0" in packed:
        raise ValueError("not a packed value")
    tag, text = packed[:1], packed[1:]
    if tag == "s":
        return text
    if tag == "u":
        return UUID(hex=text)
    if tag == "i" and int(text) in _INTEGERS:
        return int(text)
    if tag == "t" and text.endswith("+00:00"):
        return datetime.fromisoformat(text)
    raise ValueError("not a packed value")
