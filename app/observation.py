"""How the installation is doing, read from its database when somebody asks: the same from every process.

What is read is bounded by what is open or due; accounts that nothing is due of cost nothing. Knows Prometheus's form
of numbers and no HTTP.
"""

from datetime import UTC, datetime, timedelta
from typing import Final

import structlog
from prometheus_client.core import GaugeMetricFamily

from app import breaker, db, deletion, enforcement, errors, outbox, restores, timers, webhooks
from app.auth import Installation

_log = structlog.stdlib.get_logger(__name__)

_READ_WITHIN: Final = timedelta(seconds=5)
"""How long the database may take to tell. Prometheus itself waits ten."""


async def observe(installation: Installation) -> list[GaugeMetricFamily]:
    """Gauges for Prometheus. A database that is away, or does not answer in time, is `sunset_database_up` 0 and no
    other number: nothing old is told as if it were so now."""
    try:
        async with db.deadline(_READ_WITHIN):
            return [_gauge("sunset_database_up", "Whether the database answers.", 1), *await _read(installation)]
    except errors.Unavailable:
        _log.warning("metrics.database_unavailable")
        return [_gauge("sunset_database_up", "Whether the database answers.", 0)]


async def _read(installation: Installation) -> list[GaugeMetricFamily]:
    return [
        *await _clock(),
        *await _outbox(),
        *await _webhooks(),
        *await _timers(installation),
        *await _deletions(installation),
        await _enforcement(installation),
    ]


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, meaning, value)


async def _clock() -> list[GaugeMetricFamily]:
    before = datetime.now(UTC)
    theirs = await db.database_now()
    after = datetime.now(UTC)
    ours = before + (after - before) / 2
    ahead = await db.clock_offset()
    return [
        _gauge(
            "sunset_clock_difference_seconds",
            "How far this process's clock is ahead of the database's, which alone decides.",
            (ours - theirs).total_seconds(),
        ),
        _gauge(
            "sunset_clock_offset_seconds",
            "How far the development clock was moved ahead; 0 in production.",
            ahead.total_seconds(),
        ),
    ]


async def _outbox() -> list[GaugeMetricFamily]:
    depth = await outbox.depth()
    messages = GaugeMetricFamily(
        "sunset_outbox_messages",
        "Messages that are not delivered: due now, waiting for their next try, claimed by a worker, or dead letters.",
        labels=["state"],
    )
    messages.add_metric(["due"], depth.due)
    messages.add_metric(["waiting"], depth.waiting)
    messages.add_metric(["claimed"], depth.claimed)
    messages.add_metric(["dead"], depth.dead)
    return [
        messages,
        _gauge(
            "sunset_outbox_oldest_age_seconds",
            "Age of the oldest message that is neither delivered nor a dead letter; 0 when there is none.",
            _since(depth.oldest_at, depth.now),
        ),
        _gauge(
            "sunset_dead_letter_oldest_age_seconds",
            "How long ago the oldest dead letter was given up; 0 when there is none.",
            _since(depth.oldest_dead_at, depth.now),
        ),
    ]


async def _webhooks() -> list[GaugeMetricFamily]:
    depth, endpoints = await webhooks.depth(), await webhooks.count_endpoints()
    deliveries = GaugeMetricFamily(
        "sunset_webhook_deliveries",
        "Webhooks that are not delivered: due now, waiting for their next try, held back behind an endpoint that fails "
        "or is disabled, claimed by a worker, or dead letters.",
        labels=["state"],
    )
    for state in ("due", "waiting", "held", "claimed", "dead"):
        deliveries.add_metric([state], getattr(depth, state))
    kinds = GaugeMetricFamily(
        "sunset_webhook_endpoints",
        "Endpoints: working, failing, paused after several failures, gone (they disabled themselves), disabled by "
        "hand.",
        labels=["state"],
    )
    for state in ("working", "failing", "paused", "gone", "disabled"):
        kinds.add_metric([state], getattr(endpoints, state))
    return [
        deliveries,
        _gauge(
            "sunset_webhook_oldest_age_seconds",
            "Age of the oldest webhook that an enabled endpoint has not taken; 0 when there is none.",
            _since(depth.oldest_at, depth.now),
        ),
        kinds,
    ]


async def _timers(installation: Installation) -> list[GaugeMetricFamily]:
    now = await db.now()
    due = GaugeMetricFamily("sunset_timers_due", "What is due and not done; counted up to 1,000.", labels=["timer"])
    overdue = GaugeMetricFamily(
        "sunset_timer_overdue_seconds", "For how long the oldest of it is due; 0 when nothing is.", labels=["timer"]
    )
    for one in await timers.backlog(installation.policy):
        due.add_metric([one.name], one.due)
        overdue.add_metric([one.name], _since(one.oldest_due_at, now))
    return [due, overdue]


async def _deletions(installation: Installation) -> list[GaugeMetricFamily]:
    held = await db.fetch_one("SELECT COUNT(*) AS held FROM account WHERE deletion_held_at IS NOT NULL")
    assert held is not None
    stands, status = await breaker.read(installation.policy), await restores.restatement()
    return [
        _gauge("sunset_deletion_holds", "Accounts whose deletion is on hold.", held["held"]),
        _gauge(
            "sunset_deletions_overdue",
            "Deletions that have not begun, or not ended, an hour after they should have.",
            await deletion.overdue(),
        ),
        _gauge(
            "sunset_deletions_halted",
            "1 while all deletions are stopped: by the breaker, by an operator, or after a restore.",
            stands.halted_at is not None or bool(stands.halts),
        ),
        _gauge("sunset_restores", "How often the database was restored from a back-up.", status.restores),
        _gauge(
            "sunset_restatement_accounts",
            "Accounts whose status is still to be sent to everybody, after a restore.",
            status.left,
        ),
        _gauge("sunset_deletions_due", "Deletions within 24 hours, as the breaker counts them.", stands.due),
        _gauge("sunset_deletions_allowed", "How many of them the breaker allows.", stands.allowed),
    ]


async def _enforcement(installation: Installation) -> GaugeMetricFamily:
    waiting = GaugeMetricFamily(
        "sunset_enforcements",
        "Acknowledgements of cancellations that are waited for, by system of the policy: pending, or late.",
        labels=["system", "state"],
    )
    for one in await enforcement.waiting(installation.policy):
        waiting.add_metric([one.system, "pending"], one.pending)
        waiting.add_metric([one.system, "late"], one.late)
    return waiting


def _since(moment: datetime | None, now: datetime) -> float:
    return max((now - moment).total_seconds(), 0.0) if moment is not None else 0.0
