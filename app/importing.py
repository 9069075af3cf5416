"""Accounts from a file of JSON Lines: one account a line, streamed, so that memory does not grow with the file.

    {"reference": "acme", "name": "Acme", "planCode": "essentials", "members": [{"subject": "member:alice@acme.example",
     "email": "alice@acme.example", "name": "Alice Adams", "role": "ADMIN"}]}

(on a single line). The keys are those of the API's syncAccounts, and so is what they mean:

* reference, name, planCode: required.
* currentPeriodEnd: when the paid period ends, as 2027-01-31T00:00:00Z. csmEmail: the address of an active Customer
  Success Manager. Left out or null: the account has none.
* members: all of the account's members; who is not in the list is removed, also while the account is canceled. Left out
  or null: they stay as they are. Who is staff or a service is none, and taken for not listed. A member has subject,
  email, name and role (ADMIN or MEMBER), and may have permissions (["ACCESS_BILLING_AND_ACCOUNT_INFO"]) and issuer
  (left out: this installation's).

A line that cannot be used is told with its number and reason, and the others are imported; so is each member who is
left out of a line that is imported. Importing the same file
again changes nothing; of two lines with one reference, the later one holds. Blank lines are skipped.

Knows the format and `app.provisioning`; neither terminals nor files by name.
"""

import codecs
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, BinaryIO, TypeVar

import orjson

from app import errors, provisioning
from app.auth import Installation
from app.lifecycle import MemberRole, Permission
from app.provisioning import MAX_BATCH_MEMBERS, MAX_ITEMS, AccountItem, MemberItem, Outcome

MAX_LINE_BYTES = 4 * 1024 * 1024
"""More than an account with the most members and the longest names takes."""

E_ = TypeVar("E_", bound=StrEnum)
T = TypeVar("T")


@dataclass(kw_only=True)
class Summary:
    """How many accounts were or, in a dry run, would be created, updated and left alone, how many lines are bad, and
    how many members were left out of the others."""

    created: int = 0
    updated: int = 0
    unchanged: int = 0
    bad: int = 0
    members_refused: int = 0


async def run(
    installation: Installation,
    stream: BinaryIO,
    *,
    dry_run: bool = False,
    complain: Callable[[int, str], None],
    progress: Callable[[int, int], None] = lambda lines, size: None,
) -> Summary:
    """Import the whole stream in batches, each of them one transaction.

    `complain` is told of each bad line and of each member refused, by the line's number from 1 and the reason;
    `progress`, after each batch, how many lines and bytes were taken since. Raises `Unavailable` when the database goes
    away: what was told of as progress is imported, and the import can be run again.
    """
    summary = Summary()
    batch = _Batch()
    lines = size = 0

    async def flush() -> None:
        nonlocal lines, size
        if batch.items:
            for number, result in zip(
                batch.numbers, await provisioning.sync(installation, batch.items, dry_run=dry_run), strict=True
            ):
                if result.refusal is not None:
                    refuse(number, result.refusal)
                    continue
                _count(summary, result.outcome)
                summary.members_refused += len(result.members_refused)
                for refused in result.members_refused:
                    complain(number, _reason(refused))
        batch.clear()
        progress(lines, size)
        lines = size = 0

    def refuse(number: int, refusal: errors.InvalidInput) -> None:
        summary.bad += 1
        complain(number, _reason(refusal))

    for number, (line, length) in enumerate(_lines(stream), start=1):
        try:
            if line is None:
                raise _bad("", f"The line is longer than {MAX_LINE_BYTES // 1024 // 1024} MiB.")
            if line.strip():
                item = parse(line)
                provisioning.check(item, installation.policy, installation.member_issuer)
                if not batch.has_room_for(item):
                    await flush()
                batch.add(number, item)
        except errors.InvalidInput as refusal:
            refuse(number, refusal)
        lines, size = lines + 1, size + length
    await flush()
    return summary


def _reason(refusal: errors.InvalidInput) -> str:
    return f"{refusal.field}: {refusal.message}" if refusal.field else refusal.message


def _count(summary: Summary, outcome: Outcome) -> None:
    match outcome:
        case Outcome.CREATED:
            summary.created += 1
        case Outcome.UPDATED:
            summary.updated += 1
        case _:
            summary.unchanged += 1


class _Batch:
    """Items that go together, with the numbers of their lines."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.items: list[AccountItem] = []
        self.numbers: list[int] = []
        self._references: set[str] = set()
        self._members = 0

    def has_room_for(self, item: AccountItem) -> bool:
        """Whether it fits. A reference that is in the batch already has to wait for the next: the later line holds."""
        return (
            len(self.items) < MAX_ITEMS
            and self._members + len(item.members or ()) <= MAX_BATCH_MEMBERS
            and item.reference not in self._references
        )

    def add(self, number: int, item: AccountItem) -> None:
        self.items.append(item)
        self.numbers.append(number)
        self._references.add(item.reference)
        self._members += len(item.members or ())


def _lines(stream: BinaryIO) -> Iterator[tuple[bytes | None, int]]:
    """Each line with its length in bytes; None in place of one that is too long to hold."""
    mark: bytes = codecs.BOM_UTF8  # some programs begin a file with it
    while line := stream.readline(MAX_LINE_BYTES):
        length = len(line)
        if length < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line.removeprefix(mark), length
            mark = b""
            continue
        while rest := stream.readline(MAX_LINE_BYTES):
            length += len(rest)
            if rest.endswith(b"\n"):
                break
        yield None, length


# --------------------------------------------------------------------------------------------------------- format


def parse(line: bytes) -> AccountItem:
    """The account of one line. Raises `InvalidInput` with the reason, and the field's path where there is one."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _bad("", f"It is not JSON: {error.msg} at character {error.pos + 1}.") from None
    account = _Object(value, "")
    item = AccountItem(
        reference=account.required("reference", _text),
        name=account.required("name", _text),
        plan_code=account.required("planCode", _text),
        current_period_end=account.optional("currentPeriodEnd", _time),
        csm_email=account.optional("csmEmail", _text),
        members=account.optional("members", _members),
    )
    account.done()
    return item


def _bad(path: str, reason: str) -> errors.InvalidInput:
    return errors.InvalidInput(reason, field=path)


class _Object:
    """A JSON object that is read key by key; what is missing, mistyped or left over is refused with its path."""

    def __init__(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise _bad(path, f"It must be an object, not {_kind(value)}.")
        self._values = value
        self._prefix = f"{path}." if path else ""

    def required(self, key: str, read: Callable[[Any, str], T]) -> T:
        if key not in self._values:
            raise _bad(self._prefix + key, "It is missing.")
        return read(self._values.pop(key), self._prefix + key)

    def optional(self, key: str, read: Callable[[Any, str], T]) -> T | None:
        value = self._values.pop(key, None)
        return None if value is None else read(value, self._prefix + key)

    def done(self) -> None:
        for key in self._values:
            raise _bad(self._prefix + key, "There is no such key in this format.")


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}[type(value)]


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _bad(path, f"It must be a text, not {_kind(value)}.")
    return value


def _time(value: Any, path: str) -> datetime:
    with suppress(ValueError):
        return datetime.fromisoformat(_text(value, path))
    raise _bad(path, f"It must be a time such as 2027-01-31T00:00:00Z, not {value!r}.")


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise _bad(path, f"It must be a list, not {_kind(value)}.")
    return value


def _code(kind: type[E_]) -> Callable[[Any, str], E_]:
    def read(value: Any, path: str) -> E_:
        text = _text(value, path)
        if text not in kind.__members__:
            raise _bad(path, f"It must be {' or '.join(kind.__members__)}, not {text!r}.")
        return kind[text]

    return read


_role = _code(MemberRole)
_permission = _code(Permission)


def _permissions(value: Any, path: str) -> frozenset[Permission]:
    return frozenset(_permission(code, f"{path}[{index}]") for index, code in enumerate(_list(value, path)))


def _members(value: Any, path: str) -> tuple[MemberItem, ...]:
    return tuple(_member(_Object(one, f"{path}[{index}]")) for index, one in enumerate(_list(value, path)))


def _member(member: _Object) -> MemberItem:
    item = MemberItem(
        subject=member.required("subject", _text),
        email=member.required("email", _text),
        name=member.required("name", _text),
        role=member.required("role", _role),
        permissions=member.optional("permissions", _permissions) or frozenset(),
        issuer=member.optional("issuer", _text),
    )
    member.done()
    return item
