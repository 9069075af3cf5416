"""What is promised: plans, channels, windows, reminders, reasons, offers, and who enforces it, read from a TOML file
and checked.

Pure: the standard library, `app.lifecycle`'s vocabulary, and the file that it is given. Every text that names a
number of days derives it from here. `policy.toml` beside this module is the shipped default and the format's
documentation.
"""

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from app.errors import Contact
from app.lifecycle import CancellationTiming, Channel, FeedbackReason, OfferKind

DEFAULT_FILE = Path(__file__).with_name("policy.toml")

_MAX_HOURS = 24 * 366 * 10
_MAX_ENFORCEMENT_MINUTES = 24 * 60
"""As short as the shortest retention: who has not obeyed is known before anything is deleted."""

E_ = TypeVar("E_", bound=StrEnum)
T = TypeVar("T")


class PolicyError(Exception):
    """The policy file cannot be used. The message names the file, the key and the reason."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    code: str
    name: str
    channel: Channel
    effective: CancellationTiming
    retention: timedelta


@dataclass(frozen=True, kw_only=True)
class Reason:
    code: FeedbackReason
    label: str


@dataclass(frozen=True, kw_only=True)
class OfferTemplate:
    """An alternative solution. No reasons or plans named means: for all of them."""

    code: str
    kind: OfferKind
    title: str
    description: str
    reasons: frozenset[FeedbackReason]
    plans: frozenset[str]
    cooldown: timedelta

    def suits(self, plan_code: str, reason: FeedbackReason | None) -> bool:
        """Whether the offer is made for this plan and this reason; without a reason, only offers for any reason."""
        return (not self.plans or plan_code in self.plans) and (not self.reasons or reason in self.reasons)


@dataclass(frozen=True, kw_only=True)
class EnforcingSystem:
    """A system that acknowledges each cancellation. `code` is the name of the service that it speaks as."""

    code: str
    name: str
    within: timedelta
    """How long after a cancellation takes effect its acknowledgement is late."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    billing_team: Contact
    customer_success: Contact
    security: Contact
    operators: Contact
    confirmation_lifetime: timedelta
    assistance_response: timedelta
    assistance_escalation: timedelta
    reminder_days: tuple[int, ...]
    minimum_notice: timedelta
    breaker_at_least: int
    breaker_percent: float
    plans: Mapping[str, Plan]
    reasons: tuple[Reason, ...]
    offers: tuple[OfferTemplate, ...]
    enforcing_systems: tuple[EnforcingSystem, ...]

    def plan(self, code: str) -> Plan:
        """The plan of that code. Raises KeyError; `missing_plans` keeps accounts from naming one that is not here."""
        return self.plans[code]

    def missing_plans(self, codes: Iterable[str]) -> list[str]:
        """Codes that are in use and not in the policy: a service must not start with any."""
        return sorted(set(codes) - self.plans.keys())


def hours(duration: timedelta) -> int:
    """Whole hours, rounded down: how people are told of durations."""
    return duration // timedelta(hours=1)


def load(file: Path = DEFAULT_FILE) -> Policy:
    """Read and check a policy file. Raises `PolicyError` for the first thing that is wrong."""
    try:
        with file.open("rb") as stream:
            document = tomllib.load(stream)
    except OSError as error:
        raise PolicyError(f"{file}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PolicyError(f"{file}: is not valid TOML: {error}") from error
    return _read(_Table(file, "", document))


class _Table:
    """A TOML table that is read key by key; what is missing, mistyped or left over is an error with its place."""

    def __init__(self, file: Path, path: str, values: Mapping[str, Any]) -> None:
        self._file = file
        self._path = path
        self._values = dict(values)

    def error(self, key: str, reason: str) -> PolicyError:
        return PolicyError(f"{self._file}: {self._path}{key}: {reason}")

    def _take(self, key: str, kind: type[T], words: str) -> T:
        if key not in self._values:
            raise self.error(key, f"is missing; {words} is needed")
        value = self._values.pop(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(key, f"must be {words}, not {value!r}")
        return value

    def text(self, key: str, longest: int = 200) -> str:
        value = self._take(key, str, "a text").strip()
        if not value or len(value) > longest or any(character < " " for character in value):
            raise self.error(key, f"must be one line of 1 to {longest} characters")
        return value

    def whole(self, key: str, low: int, high: int) -> int:
        value = self._take(key, int, "a whole number")
        if not low <= value <= high:
            raise self.error(key, f"must be from {low} to {high}, not {value}")
        return value

    def has(self, key: str) -> bool:
        return key in self._values

    def percent(self, key: str) -> float:
        value = self._values.pop(key, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            raise self.error(key, f"must be a number from 0 to 100, not {value!r}")
        return float(value)

    def hours(self, key: str, low: int = 1) -> timedelta:
        return timedelta(hours=self.whole(key, low, _MAX_HOURS))

    def choice(self, key: str, kind: type[E_]) -> E_:
        value = self.text(key)
        if value not in kind.__members__:
            raise self.error(key, f"must be one of {', '.join(kind.__members__)}, not {value!r}")
        return kind[value]

    def items(self, key: str) -> list[Any]:
        return self._take(key, list, "a list")

    def table(self, key: str) -> "_Table":
        return _Table(self._file, f"{self._path}{key}.", self._take(key, dict, "a table"))

    def tables(self, key: str) -> "list[_Table]":
        values = self._values.pop(key, [])
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise self.error(key, f"must be written as [[{key}]] tables")
        return [_Table(self._file, f"{self._path}{key}[{index}].", value) for index, value in enumerate(values)]

    def done(self, result: T) -> T:
        for key in self._values:
            raise self.error(key, "is not a key that this table has")
        return result


def _contact(table: _Table) -> Contact:
    contact = Contact(name=table.text("name"), email=table.text("email", 254))
    local, at, domain = contact.email.rpartition("@")
    if not at or not local or not domain or " " in contact.email:
        raise table.error("email", f"must be an email address, not {contact.email!r}")
    return table.done(contact)


def _plan(table: _Table) -> Plan:
    return table.done(
        Plan(
            code=table.text("code", 64),
            name=table.text("name"),
            channel=table.choice("channel", Channel),
            effective=table.choice("effective", CancellationTiming),
            retention=table.hours("retention_hours", low=24),
        )
    )


def _reason(table: _Table) -> Reason:
    return table.done(Reason(code=table.choice("code", FeedbackReason), label=table.text("label")))


def _offer(table: _Table, plans: Mapping[str, Plan]) -> OfferTemplate:
    reasons = table.items("reasons")
    for reason in reasons:
        if reason not in FeedbackReason.__members__:
            raise table.error("reasons", f"{reason!r} is none of {', '.join(FeedbackReason.__members__)}")
    codes = table.items("plans")
    for code in codes:
        if code not in plans:
            raise table.error("plans", f"{code!r} is no plan of this policy")
    return table.done(
        OfferTemplate(
            code=table.text("code", 64),
            kind=table.choice("kind", OfferKind),
            title=table.text("title"),
            description=table.text("description", 1_000),
            reasons=frozenset(FeedbackReason[reason] for reason in reasons),
            plans=frozenset(codes),
            cooldown=timedelta(days=table.whole("cooldown_days", 0, 3_660)),
        )
    )


def _enforcing_system(table: _Table) -> EnforcingSystem:
    return table.done(
        EnforcingSystem(
            code=table.text("code", 64),
            name=table.text("name"),
            within=timedelta(minutes=table.whole("within_minutes", 1, _MAX_ENFORCEMENT_MINUTES)),
        )
    )


def _unique(table: _Table, key: str, values: list[T], code: Callable[[T], str]) -> list[T]:
    seen: set[str] = set()
    for value in values:
        if code(value) in seen:
            raise table.error(key, f"the code {str(code(value))!r} stands twice")
        seen.add(code(value))
    return values


def _read(root: _Table) -> Policy:
    contacts = root.table("contacts")
    confirmation = root.table("confirmation")
    assistance = root.table("assistance")
    deletion = root.table("deletion")
    plans = _unique(root, "plans", [_plan(table) for table in root.tables("plans")], lambda plan: plan.code)
    if not plans:
        raise root.error("plans", "is empty; at least one [[plans]] table is needed")
    by_code = {plan.code: plan for plan in plans}
    reasons = _unique(root, "reasons", [_reason(table) for table in root.tables("reasons")], lambda reason: reason.code)
    offers = _unique(
        root, "offers", [_offer(table, by_code) for table in root.tables("offers")], lambda offer: offer.code
    )
    systems = _unique(
        root,
        "enforcing_systems",
        [_enforcing_system(table) for table in root.tables("enforcing_systems")],
        lambda system: system.code,
    )
    days = deletion.items("reminder_days")
    shortest = min(plan.retention for plan in plans)
    for day in days:
        if not isinstance(day, int) or isinstance(day, bool) or day < 1:
            raise deletion.error("reminder_days", f"{day!r} is no number of days of 1 or more")
        if timedelta(days=day) >= shortest:
            raise deletion.error("reminder_days", f"{day} days is not inside the shortest plan's retention")
    billing_team = _contact(contacts.table("billing_team"))
    response = assistance.hours("response_hours")
    escalation = assistance.hours("escalation_hours") if assistance.has("escalation_hours") else 3 * response
    if escalation <= response:
        raise assistance.error("escalation_hours", "must be more than response_hours")
    # What an earlier version's file lacks has a default; what a file has is checked.
    policy = Policy(
        billing_team=billing_team,
        customer_success=_contact(contacts.table("customer_success")),
        security=_contact(contacts.table("security")),
        operators=_contact(contacts.table("operators")) if contacts.has("operators") else billing_team,
        confirmation_lifetime=confirmation.hours("lifetime_hours"),
        assistance_response=response,
        assistance_escalation=escalation,
        reminder_days=tuple(sorted(set(days), reverse=True)),
        minimum_notice=deletion.hours("minimum_notice_hours"),
        breaker_at_least=deletion.whole("breaker_at_least", 0, 1_000_000) if deletion.has("breaker_at_least") else 10,
        breaker_percent=deletion.percent("breaker_percent") if deletion.has("breaker_percent") else 1.0,
        plans=by_code,
        reasons=tuple(reasons),
        offers=tuple(offers),
        enforcing_systems=tuple(systems),
    )
    for table in (contacts, confirmation, assistance, deletion, root):
        table.done(policy)
    return policy
