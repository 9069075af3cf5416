"""What somebody should be called for, as far as the database knows: the same for `/readyz?deep` and `sunset doctor`.

Times are the installation's. What is merely late is in the metrics; what stands here wants a person.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from app import breaker, db, deletion, enforcement, halts, outbox, timers, webhooks
from app.auth import Installation
from app.lifecycle import HaltCause
from app.policy import Policy
from app.timers import BEGIN_DELETION, Backlog

TIMERS_OVERDUE = timedelta(hours=1)
MESSAGES_OVERDUE = timedelta(minutes=15)


class Name(StrEnum):
    DELETIONS_OVERDUE = "deletions_overdue"
    DELETIONS_HALTED = "deletions_halted"
    DELETION_HALT = "deletion_halt"
    TIMERS_OVERDUE = "timers_overdue"
    DEAD_LETTERS = "dead_letters"
    MESSAGES_OVERDUE = "messages_overdue"
    ENFORCEMENT_LATE = "enforcement_late"
    WEBHOOKS_OVERDUE = "webhooks_overdue"
    DEAD_WEBHOOKS = "dead_webhooks"
    ENDPOINTS_GONE = "endpoints_gone"


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    name: Name
    message: str
    """What is the matter, and what to do, on one line."""
    since: datetime | None


async def current(installation: Installation) -> list[Alarm]:
    """Every alarm that there is reason for now. What is looked at grows with what is due, not with the accounts."""
    policy = installation.policy
    found = [
        await _deletions_overdue(),
        await _deletions_halted(policy),
        await _deletion_halt(),
        await _timers_overdue(policy),
        *await _messages(),
        await _enforcement_late(policy),
        *await _webhooks(),
    ]
    return [alarm for alarm in found if alarm is not None]


async def _deletions_overdue() -> Alarm | None:
    count = await deletion.overdue()
    if not count:
        return None
    message = (
        f"{_counted(count, 'deletion')} should have begun, or ended, more than an hour ago. Does a worker run? "
        "`sunset deletions list` says where each is."
    )
    return Alarm(name=Name.DELETIONS_OVERDUE, message=message, since=None)


async def _deletions_halted(policy: Policy) -> Alarm | None:
    stands = await breaker.read(policy)
    if stands.halted_at is None:
        return None
    message = (
        f"All deletions have stopped: {stands.due:,} are due within 24 hours, {stands.allowed:,} are allowed. "
        "Look at them with `sunset deletions list --due`, then approve them or hold those that are wrong."
    )
    return Alarm(name=Name.DELETIONS_HALTED, message=message, since=stands.halted_at)


_HALTED = {
    HaltCause.OPERATOR: "An operator has halted all deletions: {evidence} `sunset deletions resume` lets them go on.",
    HaltCause.RESTORED: "The database was restored, and no deletion begins. {evidence} Follow the README's checklist: "
    "`sunset restored`, look, then `sunset deletions resume`.",
    HaltCause.MOVED: "No deletion begins. {evidence} If it was restored from a back-up: `sunset restored`. If it was a "
    "planned move and nothing is lost: `sunset deletions resume`.",
}


async def _deletion_halt() -> Alarm | None:
    """Of several, the one that asks most of people."""
    lasting = {one.cause: one for one in await halts.current()}
    halt = lasting.get(HaltCause.RESTORED) or lasting.get(HaltCause.MOVED) or lasting.get(HaltCause.OPERATOR)
    if halt is None:
        return None
    evidence = halt.evidence if halt.evidence.endswith((".", "!", "?")) else f"{halt.evidence}."
    message = _HALTED[halt.cause].format(evidence=evidence)
    return Alarm(name=Name.DELETION_HALT, message=message, since=halt.halted_at)


async def _timers_overdue(policy: Policy) -> Alarm | None:
    late = await overdue_timers(policy, TIMERS_OVERDUE)
    if not late:
        return None
    message = f"Not done for more than an hour: {told(late)}. Does a worker run? Its log says what fails."
    since = min(one.oldest_due_at for one in late if one.oldest_due_at is not None)
    return Alarm(name=Name.TIMERS_OVERDUE, message=message, since=since)


async def overdue_timers(policy: Policy, by: timedelta) -> list[Backlog]:
    """The timers whose oldest due row waits for that long. Deletions have an alarm of their own, because a halted one
    is not for the worker to do."""
    limit = await db.now() - by
    return [
        one
        for one in await timers.backlog(policy)
        if one.oldest_due_at is not None and one.oldest_due_at <= limit and one.name != BEGIN_DELETION.name
    ]


def told(late: list[Backlog]) -> str:
    return ", ".join(f"{one.name} ({one.due:,} due, since {one.oldest_due_at:%Y-%m-%d %H:%M} UTC)" for one in late)


async def _messages() -> list[Alarm]:
    depth, due_at = await outbox.depth(), await outbox.next_due()
    found = []
    if depth.dead:
        message = (
            f"{_counted(depth.dead, 'message')} could not be delivered. `sunset deliveries list --state dead` says "
            "why; retry or drop each."
        )
        found.append(Alarm(name=Name.DEAD_LETTERS, message=message, since=depth.oldest_dead_at))
    if due_at is not None and due_at <= depth.now - MESSAGES_OVERDUE:
        message = f"{_counted(depth.due, 'message')} due, the oldest for more than 15 minutes. Does a worker run?"
        found.append(Alarm(name=Name.MESSAGES_OVERDUE, message=message, since=due_at))
    return found


async def _enforcement_late(policy: Policy) -> Alarm | None:
    late = [one for one in await enforcement.waiting(policy) if one.late_since is not None]
    if not late:
        return None
    systems = ", ".join(f"{one.system} ({_counted(one.late, 'account')})" for one in late)
    message = (
        f"Cancellations are not acknowledged in time by {systems}: messages may still be going out. "
        "`sunset enforcement list --late` says for which accounts."
    )
    since = min(one.late_since for one in late if one.late_since is not None)
    return Alarm(name=Name.ENFORCEMENT_LATE, message=message, since=since)


async def _webhooks() -> list[Alarm]:
    depth, endpoints = await webhooks.depth(), await webhooks.count_endpoints()
    found = []
    if depth.late_endpoints:
        message = (
            f"{_counted(depth.late_endpoints, 'endpoint')} did not take what was promised more than an hour ago. Does "
            "a worker run? `sunset webhooks deliveries --state pending` says what they answer."
        )
        found.append(Alarm(name=Name.WEBHOOKS_OVERDUE, message=message, since=depth.oldest_at))
    if depth.dead_lately:
        message = (
            f"{_counted(depth.dead_lately, 'webhook')} given up within a day. `sunset webhooks deliveries --state "
            "dead` says why; deliver them again with `sunset webhooks redeliver`."
        )
        found.append(Alarm(name=Name.DEAD_WEBHOOKS, message=message, since=depth.dead_lately_at))
    if endpoints.gone:
        message = (
            f"{_counted(endpoints.gone, 'endpoint')} disabled by their answer, 410 Gone. Enable each again, or disable "
            "it by hand: `sunset webhooks enable`, `sunset webhooks disable`."
        )
        found.append(Alarm(name=Name.ENDPOINTS_GONE, message=message, since=endpoints.gone_at))
    return found


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
