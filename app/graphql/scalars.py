"""The `DateTime` scalar: an instant on the wire, never a wall clock.

Registered in the schema with `StrawberryConfig(scalar_map=scalars.SCALARS)`, so that a Python `datetime` in a type,
an argument or an input field is this scalar. It knows neither the database nor what an instant means.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import strawberry
from graphql import GraphQLError
from strawberry.types.scalar import ScalarDefinition

_RFC_3339: Final = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(?:\.\d{1,9})?(?:Z|[+-]\d{2}:\d{2})", re.ASCII)
_EXPECTED: Final = (
    "DateTime expects a string of RFC 3339 with date, time, seconds and offset, such as 2026-11-23T09:30:00.000Z."
)


def format_instant(value: datetime) -> str:
    """`value` in UTC with exactly three digits of milliseconds, cut and not rounded: 2026-11-23T09:30:00.000Z.

    Refuses a naive `value` with ValueError: nobody can tell which instant it is.
    """
    if value.tzinfo is None:
        raise ValueError("a naive datetime is no instant")
    return value.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def parse_instant(value: object) -> datetime:
    """The instant that a client wrote, in UTC, cut to milliseconds.

    Any offset is understood. Refuses with GraphQLError, in words for the client: a value that is no string, a missing
    offset (or "-00:00", which RFC 3339 defines as unknown), a date alone, and dates that do not exist.
    """
    if not isinstance(value, str) or not _RFC_3339.fullmatch(value) or value.endswith("-00:00"):
        raise GraphQLError(_EXPECTED)
    try:
        instant = datetime.fromisoformat(value).astimezone(UTC)
    except (ValueError, OverflowError):
        raise GraphQLError(f"{_EXPECTED} This date or time does not exist.") from None
    return instant.replace(microsecond=instant.microsecond // 1000 * 1000)


def _serialize(value: Any) -> str:
    if not isinstance(value, datetime):
        raise TypeError(f"DateTime cannot show a {type(value).__name__}")
    return format_instant(value)


DATE_TIME: Final = strawberry.scalar(
    name="DateTime",
    description=(
        "An instant, as RFC 3339 writes it. Answers are in UTC with milliseconds: `2026-11-23T09:30:00.000Z`. "
        "Input may have any offset and is cut to milliseconds; a time without an offset is refused."
    ),
    specified_by_url="https://www.rfc-editor.org/rfc/rfc3339",
    serialize=_serialize,
    parse_value=parse_instant,
)

SCALARS: Final[Mapping[object, ScalarDefinition]] = {datetime: DATE_TIME}
"""What `StrawberryConfig(scalar_map=...)` takes."""
