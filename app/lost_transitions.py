"""What a restore of the database has lost, read back from the log, and the commands that bring it about again.

Each transition is a line of the log (`app.history`). One that the database does not have is lost; the last one of an
account says how it stood. A command is a mutation for somebody of the company to send, so that every rule holds and
the history says who did it; staff never confirms for a member, and so a lost cancellation is opened again for the
members to confirm.

Where an account has gone on since, nobody but people can say what is right, and no command is printed.

It reads, and changes nothing.
"""

import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Final
from uuid import UUID

import orjson

from app import accounts, errors, history, ids
from app.accounts import AccountView
from app.lifecycle import AccountStatus, ActorKind, TransitionType

_BATCH: Final = 500

BILLING: Final = "BILLING"
"""The variable of the shell with a token of somebody of the billing team."""

MARGIN: Final = timedelta(hours=1)
"""As much before the time that the database was restored to, a transition may be lost: that time is rarely exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Logged:
    """A transition as the log tells of it."""

    id: UUID
    account_id: UUID
    type: TransitionType
    status: AccountStatus
    """The account's, after it."""
    epoch: int
    sequence: int
    actor_kind: ActorKind
    occurred_at: datetime


def read(lines: Iterable[bytes]) -> Iterator[Logged]:
    """The transitions in one log of JSON lines, whatever else is in it; also where something stands before the JSON,
    and where it stands as text in other JSON, as container engines write it.

    Raises `InvalidInput` for a line about a transition that cannot be read, and for a log that has no line in JSON:
    what is not read would be taken for nothing lost.
    """
    is_json = False
    for line in lines:
        entry = _entry(line)
        is_json = is_json or entry is not None
        if entry is not None and entry.get("event") == history.LOGGED:
            try:
                yield _logged(entry)
                continue
            except (KeyError, TypeError, ValueError):
                pass
        elif history.LOGGED.encode() not in line:
            continue
        raise errors.InvalidInput(
            f"A line about a transition cannot be read: {line[:200].decode(errors='replace')}", field="log"
        )
    if not is_json:
        raise errors.InvalidInput("No line of the log is JSON. Was SUNSET_LOG_FORMAT json?", field="log")


def _entry(line: bytes) -> dict[str, Any] | None:
    """The JSON object of the line: that in its text, where it is one that a container engine has made."""
    begin = line.find(b"{")
    while begin >= 0:
        try:
            entry = orjson.loads(line[begin:])
        except orjson.JSONDecodeError:
            begin = line.find(b"{", begin + 1)
            continue
        if not isinstance(entry, dict):
            return None
        wrapped = next((entry[key] for key in ("log", "message", "msg") if isinstance(entry.get(key), str)), None)
        return entry if wrapped is None or "event" in entry else _entry(wrapped.encode()) or entry
    return None


def _logged(entry: dict[str, Any]) -> Logged:
    return Logged(
        id=UUID(entry["transition_id"]),
        account_id=UUID(entry["account_id"]),
        type=TransitionType(entry["type"]),
        status=AccountStatus(entry["status"]),
        epoch=int(entry["epoch"]),
        sequence=int(entry["sequence"]),
        actor_kind=ActorKind(entry["actor_kind"]),
        occurred_at=datetime.fromisoformat(entry["occurred_at"]).astimezone(UTC),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """What an account has lost, in the order in which it happened."""

    account_id: UUID
    account: AccountView | None
    """As it is now; None where the account itself is lost."""
    transitions: Sequence[Logged]
    has_gone_on: bool
    """The database has what happened to it after all of these."""


async def find(logged: Iterable[Logged]) -> list[Lost]:
    """What the database does not have of these, by account: the one that lost something first is first."""
    lost: defaultdict[UUID, dict[UUID, Logged]] = defaultdict(dict)
    waiting = iter(logged)
    while batch := {one.id: one for one in islice(waiting, _BATCH)}:
        for id_ in await history.missing(batch.keys()):
            lost[batch[id_].account_id][id_] = batch[id_]
    found = []
    for account_id, steps in lost.items():
        transitions = sorted(steps.values(), key=lambda one: (one.occurred_at, one.sequence))
        last = await history.last_change(account_id)
        found.append(
            Lost(
                account_id=account_id,
                account=await accounts.load(account_id),
                transitions=transitions,
                has_gone_on=last is not None and last > transitions[-1].occurred_at,
            )
        )
    return sorted(found, key=lambda one: one.transitions[0].occurred_at)


# ------------------------------------------------------------------------------------------------------- the commands

_HELD = {
    TransitionType.DELETION_HELD: True,
    TransitionType.DELETION_RELEASED: False,
    TransitionType.RESTARTED: False,
    TransitionType.CANCELED: False,
}
_NOTE = "Lost by a restore of the database, and done again from the log."


def script(lost: Iterable[Lost], url: str) -> Iterator[str]:
    """Lines for a shell, with what was lost as comments above the commands, for the API at that address. The commands
    take tokens from variables, which comments explain: one for the billing team, and one for each manager."""
    lost = list(lost)
    managers = _managers(lost)
    yield f"# {BILLING}: a token of somebody of the billing team."
    for contact, variable in managers.items():
        yield f"# {variable}: a token of {_comment(contact) or 'any Customer Success Manager'}."
    yield ""
    for one in lost:
        name = "an account that the database does not have" if one.account is None else one.account.reference
        yield f"# {_comment(name)}, {ids.encode(ids.Kind.ACCOUNT, one.account_id)}"
        for step in one.transitions:
            yield (
                f"#   {step.occurred_at:%Y-%m-%d %H:%M:%S} UTC  {step.type.value}  by {step.actor_kind.value}, "
                f"then {step.status.value}"
            )
        for line in _remedy(one, managers.get(_manager(one), BILLING)):
            yield line if isinstance(line, str) else line.curl(url)
        yield ""


def _manager(lost: Lost) -> str:
    """The address of the account's manager; "" where any of them is."""
    return lost.account.csm.email if lost.account is not None and lost.account.csm is not None else ""


def _managers(lost: Iterable[Lost]) -> dict[str, str]:
    """The variable of each manager who is needed."""
    wanted = [
        _manager(one)
        for one in lost
        if any(isinstance(line, _Command) and line.by != BILLING for line in _remedy(one, ""))
    ]
    return {contact: f"CSM_{number}" for number, contact in enumerate(dict.fromkeys(wanted), 1)}


def _comment(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Command:
    mutation: str
    account_id: str
    by: str
    """The variable with the token."""
    key: str
    note: bool = False

    def curl(self, url: str) -> str:
        given = {"accountId": self.account_id, "idempotencyKey": self.key} | ({"note": _NOTE} if self.note else {})
        kind = self.mutation[0].upper() + self.mutation[1:]
        query = (
            f"mutation($input: {kind}Input!) {{ {self.mutation}(input: $input) "
            "{ __typename ... on UserError { message } } }"
        )
        body = orjson.dumps({"query": query, "variables": {"input": given}}).decode()
        return (
            f'curl -sS {shlex.quote(f"{url}/graphql")} -H "Authorization: Bearer ${self.by}" '
            f"-H 'Content-Type: application/json' -d {shlex.quote(body)}; echo"
        )


def _remedy(lost: Lost, manager: str) -> Iterator["str | _Command"]:
    """What brings the account from how it stands to how it stood. Comments where that is nobody's to do. `manager` is
    the variable for its Customer Success Manager."""
    last, account = lost.transitions[-1], lost.account

    def command(mutation: str, by: str = BILLING, *, note: bool = False) -> _Command:
        account_id = ids.encode(ids.Kind.ACCOUNT, lost.account_id)
        return _Command(mutation=mutation, account_id=account_id, by=by, key=f"lost-{last.id}-{mutation}", note=note)

    def open_again(account: AccountView) -> Iterator["str | _Command"]:
        yield "#   Only members confirm; this sends them the link."
        if account.request is not None:
            yield command("withdrawCancellation", manager)
        yield command("cancelAccount", note=True)

    if account is None:
        yield "#   The host's next sync makes it again, active, under another id. If it was canceled, open it then."
        return
    if lost.has_gone_on:
        yield "#   It has gone on since, as the database knows: look at it, and decide."
        return
    types = [step.type for step in lost.transitions]
    held = [_HELD[kind] for kind in types if kind in _HELD]
    was_held = held[-1] if held else account.deletion_held_at is not None
    if last.status in {AccountStatus.DELETING, AccountStatus.DELETED}:
        if account.status is AccountStatus.CANCELED:
            yield "#   It was being deleted, or was: it is again, when deletions are resumed."
    elif last.status is AccountStatus.CANCELED:
        if account.status is not AccountStatus.CANCELED:
            yield "#   It was canceled, and its members have access again."
            yield from open_again(account)
            if was_held:
                yield "#   When it is canceled again, hold its deletion."
        elif TransitionType.CANCELED in types:
            yield "#   It was restarted and canceled again since: its dates are those of the earlier cancellation."
            if account.deletion_held_at is None:
                yield command("holdDeletion", note=True)
        elif was_held and account.deletion_held_at is None:
            yield command("holdDeletion", note=True)
        elif not was_held and account.deletion_held_at is not None:
            yield command("releaseDeletion", note=True)
    elif account.status is AccountStatus.CANCELED:
        yield command("restartAccount")
        if last.status is AccountStatus.CANCELLATION_SCHEDULED:
            yield "#   Then it was to be canceled at the end of the paid period."
            yield from open_again(account)
    elif last.status is AccountStatus.CANCELLATION_SCHEDULED:
        if account.status is AccountStatus.ACTIVE:
            yield "#   Its cancellation was scheduled."
            yield from open_again(account)
    elif account.status is AccountStatus.CANCELLATION_SCHEDULED:
        yield "#   Of these two the first is refused once the cancellation has taken effect, and the second before."
        yield command("withdrawCancellation", manager)
        yield command("restartAccount")
    elif account.request is not None and {*types} & _CLOSED:
        yield command("withdrawCancellation", manager)
        if TransitionType.OFFER_ACCEPTED in types:
            yield "#   An offer was accepted: billing keeps to it."


_CLOSED = {TransitionType.OFFER_ACCEPTED, TransitionType.CANCELLATION_WITHDRAWN}
