"""Webhook deliveries: events that are rows of the transaction they tell of, one for each endpoint that wants them.

The only owner of its table. `put` joins the caller's transaction. `claim` takes what is due, with a lease, for at
most `PER_ENDPOINT` exchanges with one endpoint at a time, however many workers there are; `settle` is fenced by the
lease. An endpoint that fails is tried by one delivery at a time, and after `BREAKS_AFTER` failures in a row it is
paused: its deliveries wait, and cost nobody else anything. What cannot be delivered for `TRIED_FOR` ends as a dead
letter, which stays visible and can be delivered again.

Knows rows and times, and neither HTTP nor who may do what (`app.endpoints`).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Literal, Self
from uuid import UUID

import orjson

from app import db, events, outbox, tracing
from app.events import Event
from app.lifecycle import TransitionType
from app.models import WebhookDelivery

CHANNEL = "sunset_webhooks"
"""Woken, after the commit, by each transaction that puts a delivery."""

LEASE = timedelta(minutes=1)
"""Longer than an exchange may wait to begin, and then take; both have deadlines of their own."""

PER_ENDPOINT = 2
"""Exchanges with one endpoint at a time; one while it fails."""

TRIED_FOR = timedelta(hours=72)
"""The first failure after so long is the last."""

GIVEN_UP_AFTER = timedelta(hours=96)
"""What still waits after so long, behind a paused or disabled endpoint, is a dead letter untried."""

BREAKS_AFTER = 5
"""Failures in a row that pause an endpoint."""

LONGEST_PAUSE = timedelta(hours=1)
_FIRST_PAUSE = timedelta(seconds=30)

LONGEST_RETRY_AFTER = timedelta(hours=1)
"""What a receiver may ask for at most."""

KEPT = timedelta(days=30)
"""How long a delivery can be looked up, and delivered again."""

GONE = "It answered 410 Gone."
BY_HAND = "It was disabled by hand."
"""Why an endpoint is disabled."""

_COUNTED = 100_000

_OPEN = "delivered_at IS NULL AND dead_at IS NULL"
"""Not settled."""

_OPEN_OF_ALL = f"{_OPEN} AND attempts >= 0"
"""The same for statements about all endpoints, which have indexes of their own: see the migration that made them."""

ERASED_TYPE = TransitionType.DELETED
"""The event that outlives the account's data: it is emptied as soon as it is settled."""

_EMPTIED = f", payload = CASE WHEN type = '{ERASED_TYPE.value}' THEN '' ELSE payload END"


async def put(event: Event) -> None:
    """Promise the event to each endpoint that is enabled and wants its type, within the open transaction. After a
    restore, how an account stands is for all of them."""
    put_rows = await db.execute(
        "INSERT INTO webhook_delivery (id, endpoint_id, account_id, sequence, epoch, type, payload, created_at, "
        "queued_at, due_at, attempts, traceparent) "
        f"SELECT {db.random_uuid_sql()}, e.id, CAST($1 AS {_UUID[db.dialect()]}), CAST($2 AS INTEGER), "
        f"CAST($3 AS INTEGER), CAST($4 AS VARCHAR(64)), CAST($5 AS TEXT), {db.now_sql()}, {db.now_sql()}, "
        f"{db.now_sql()}, 0, CAST($7 AS VARCHAR(64)) FROM webhook_endpoint e "
        "WHERE e.disabled_at IS NULL AND (e.event_types = '' OR ' ' || e.event_types || ' ' LIKE $6 ESCAPE '!' "
        f"OR CAST($4 AS VARCHAR(64)) = '{TransitionType.STATUS.value}')",
        event.account_id,
        event.sequence,
        event.epoch,
        event.type.value,
        orjson.dumps(events.body(event)).decode(),
        f"% {event.type.value.replace('_', '!_')} %",
        tracing.traceparent(),
    )
    if put_rows:
        await db.notify(CHANNEL)


_UUID = {"postgresql": "UUID", "sqlite": "TEXT"}


async def put_ping(endpoint_id: UUID) -> UUID:
    """Promise a ping to an endpoint, within the open transaction. Returns the delivery's id."""
    id_, now = db.uuid7(), await db.now()
    await WebhookDelivery.create(
        id=id_,
        endpoint_id=endpoint_id,
        account_id=None,
        type=events.PING,
        payload=orjson.dumps(events.ping(id_, now)).decode(),
        created_at=now,
        queued_at=now,
        due_at=now,
        attempts=0,
        traceparent=tracing.traceparent(),
    )
    await db.notify(CHANNEL)
    return id_


# ------------------------------------------------------------------------------------------------- what workers do


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """A delivery that this worker alone may make until its lease ends. `attempt` counts from 1."""

    id: UUID
    lease: UUID
    endpoint_id: UUID
    account_id: UUID | None
    type: str
    payload: str
    url: str
    secret_generations: tuple[int, ...]
    """Whose secrets sign it, the newest first."""
    queued_at: datetime
    attempt: int
    signed_at: datetime
    """By the database's own clock, which is the receivers': a development clock runs ahead of theirs."""
    traceparent: str | None
    """The trace in which it was promised."""


_DUE = (
    "FROM webhook_delivery d WHERE d.endpoint_id = e.id AND d.delivered_at IS NULL AND d.dead_at IS NULL "
    "AND d.due_at <= $1 ORDER BY d.due_at, d.id LIMIT 1"
)
"""To an endpoint `e`, at the time $1."""
_FIRST_DUE = f"(SELECT d.due_at {_DUE})"
_UNDER_WAY = (
    "(SELECT COUNT(*) FROM webhook_delivery c WHERE c.endpoint_id = e.id AND c.lease IS NOT NULL AND c.due_at > $1)"
)
_SHARE = f"CASE WHEN e.failures > 0 THEN 1 ELSE {PER_ENDPOINT} END"


async def claim(limit: int, *, kept_free: int = 0) -> list[Claimed]:
    """Take up to `limit` due deliveries: those of endpoints that work before those of endpoints that fail, those that
    nothing is under way to before others, then the oldest. No two workers get the same one while its lease lasts, and
    no endpoint gets more than its share. Those that fail leave `kept_free` of the places to others."""
    lease = db.uuid7()
    async with db.transaction():
        now = await db.now()
        found = await db.fetch(
            "SELECT e.id, e.failures FROM webhook_endpoint e WHERE e.disabled_at IS NULL "
            f"AND (e.paused_until IS NULL OR e.paused_until <= $1) AND {_FIRST_DUE} IS NOT NULL "
            f"AND {_UNDER_WAY} < {_SHARE} "
            f"ORDER BY CASE WHEN e.failures > 0 THEN 1 ELSE 0 END, {_UNDER_WAY}, {_FIRST_DUE} "
            f"LIMIT {int(limit)}{db.for_update(skip_locked=True, key=False)}",
            now,
        )
        failing = [row for row in found if row["failures"]]
        found = found[: len(found) - len(failing)] + failing[: max(limit - kept_free, 0)]
        if not found:
            return []
        # Under the endpoints' locks nobody else claims of them, so that what is under way can be counted.
        keys = ", ".join(f"${number}" for number in range(4, 4 + len(found)))
        slots = " UNION ALL ".join(
            f"SELECT (SELECT d.id {_DUE} OFFSET {slot}) AS id, {slot} AS slot FROM webhook_endpoint e "
            f"WHERE e.id IN ({keys}) AND {_UNDER_WAY} < {_SHARE} - {slot}"
            for slot in range(PER_ENDPOINT)
        )
        rows = await db.fetch(
            "UPDATE webhook_delivery SET lease = $2, due_at = $3, attempts = attempts + 1, last_attempt_at = $1 "
            f"WHERE id IN (SELECT id FROM ({slots}) slots WHERE id IS NOT NULL ORDER BY slot LIMIT {int(limit)}) "
            "RETURNING *",
            now,
            lease,
            now + LEASE,
            *(row["id"] for row in found),
        )
        endpoints = await _endpoints({db.as_uuid(row["endpoint_id"]) for row in rows})
        signed_at = await db.database_now()
    return [
        Claimed(
            id=db.as_uuid(row["id"]),
            lease=lease,
            endpoint_id=db.as_uuid(row["endpoint_id"]),
            account_id=db.as_uuid(row["account_id"]),
            type=row["type"],
            payload=row["payload"],
            url=endpoint.url,
            secret_generations=endpoint.signing(now),
            queued_at=db.as_datetime(row["queued_at"]),
            attempt=row["attempts"],
            signed_at=signed_at,
            traceparent=row["traceparent"],
        )
        for row in sorted(rows, key=lambda row: (row["queued_at"], str(row["id"])))
        if (endpoint := endpoints[db.as_uuid(row["endpoint_id"])])
    ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one try. `status`: None when there was no answer. `error`: None when it was delivered."""

    status: int | None
    latency: timedelta
    error: str | None
    gone: bool = False
    """The receiver wants no more, ever."""
    retry_after: timedelta | None = None
    """How long the receiver asked to be left alone."""


Result = Literal["delivered", "failed", "dead"]
"""What came of a try; what failed is tried again."""


async def settle(delivery: Claimed, outcome: Outcome) -> Result | None:
    """Note what came of a try, and what it says of the endpoint. None when the lease was lost meanwhile: then nothing
    is noted."""
    now = await db.now()
    told = (outcome.status, round(outcome.latency / timedelta(milliseconds=1)), outcome.error)
    result: Result
    if outcome.error is None:
        result, kept = "delivered", await _settle(delivery, f"delivered_at = $6{_EMPTIED}", *told, now)
    elif outcome.gone or now >= delivery.queued_at + TRIED_FOR:
        result, kept = "dead", await _settle(delivery, f"dead_at = $6{_EMPTIED}", *told, now)
    else:
        wait = max(outbox.backoff(delivery.attempt), _asked_for(outcome))
        result, kept = "failed", await _settle(delivery, "due_at = $6", *told, now + wait)
    if not kept:
        return None
    if result == "delivered":
        await db.execute(
            "UPDATE webhook_endpoint SET failures = 0, paused_until = NULL WHERE id = $1 AND failures > 0",
            delivery.endpoint_id,
        )
    else:
        await _note_failure(delivery.endpoint_id, outcome, now)
    return result


def _asked_for(outcome: Outcome) -> timedelta:
    return min(outcome.retry_after or timedelta(), LONGEST_RETRY_AFTER)


async def _note_failure(endpoint_id: UUID, outcome: Outcome, now: datetime) -> None:
    row = await db.fetch_one(
        "UPDATE webhook_endpoint SET failures = failures + 1 WHERE id = $1 RETURNING failures", endpoint_id
    )
    assert row is not None
    pause = max(_pause(row["failures"]), _asked_for(outcome))
    if pause:
        await db.execute("UPDATE webhook_endpoint SET paused_until = $2 WHERE id = $1", endpoint_id, now + pause)
    if outcome.gone:
        await disable(endpoint_id, GONE)


def _pause(failures: int) -> timedelta:
    """Doubling from half a minute to an hour, half of it at random."""
    if failures < BREAKS_AFTER:
        return timedelta()
    longest: timedelta = min(_FIRST_PAUSE * 2 ** min(failures - BREAKS_AFTER, 20), LONGEST_PAUSE)
    return longest * (0.5 + random.random() / 2)  # noqa: S311  spreads load; not a secret


async def release(delivery: Claimed) -> bool:
    """Give it back untried, to be taken at once: by a worker that is stopping, or could not begin."""
    changed = await db.execute(
        f"UPDATE webhook_delivery SET lease = NULL, attempts = attempts - 1, due_at = $3 WHERE {_HELD}",
        delivery.id,
        delivery.lease,
        await db.now(),
    )
    return changed == 1


_HELD = f"id = $1 AND lease = $2 AND {_OPEN}"


async def _settle(delivery: Claimed, assignments: str, *args: Any) -> bool:
    changed = await db.execute(
        "UPDATE webhook_delivery SET lease = NULL, last_status = $3, last_latency_ms = $4, last_error = $5, "
        f"{assignments} WHERE {_HELD}",
        delivery.id,
        delivery.lease,
        *args,
    )
    return changed == 1


async def give_up(*, limit: int = 1_000) -> int:
    """Make dead letters of what has waited for too long behind a paused or disabled endpoint, up to `limit`."""
    now = await db.now()
    return await db.execute(
        f"UPDATE webhook_delivery SET dead_at = $1, lease = NULL, last_error = COALESCE(last_error, $2){_EMPTIED} "
        f"WHERE id IN (SELECT id FROM webhook_delivery WHERE {_OPEN_OF_ALL} AND queued_at < $3 "
        f"AND (lease IS NULL OR due_at <= $1) ORDER BY queued_at LIMIT {int(limit)}{db.for_update(skip_locked=True)})",
        now,
        "never tried: the endpoint was paused or disabled",
        now - GIVEN_UP_AFTER,
    )


async def forget(*, limit: int = 1_000) -> int:
    """Delete settled deliveries, dead letters too, that are older than `KEPT`, up to `limit`. Returns how many."""
    return await db.execute(
        "DELETE FROM webhook_delivery WHERE id IN (SELECT id FROM webhook_delivery WHERE created_at < $1 "
        "AND (delivered_at IS NOT NULL OR dead_at IS NOT NULL) ORDER BY created_at, id "
        f"LIMIT {int(limit)}{db.for_update(skip_locked=True)})",
        await db.now() - KEPT,
    )


async def next_due() -> datetime | None:
    """When something falls due that is not due yet. What is due already waits for a place at its endpoint."""
    row = await db.fetch_one(
        f"SELECT (SELECT MIN(due_at) FROM webhook_delivery WHERE {_OPEN_OF_ALL} AND due_at > $1) AS due_at, "
        "(SELECT MIN(paused_until) FROM webhook_endpoint WHERE paused_until > $1 AND disabled_at IS NULL) AS paused",
        await db.now(),
    )
    assert row is not None
    times = [db.as_datetime(row[name]) for name in ("due_at", "paused") if row[name] is not None]
    return min(times, default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Depth:
    """How many deliveries are not made, at `now`, and since when."""

    now: datetime
    due: int
    """To endpoints that do not fail."""
    waiting: int
    """For the time of their next try."""
    held: int
    """Due, and behind an endpoint that fails, is paused or is disabled."""
    claimed: int
    """By workers, which make them just now."""
    oldest_at: datetime | None
    """When the oldest of those to enabled endpoints was promised."""
    late_endpoints: int
    """Enabled ones that something waits for since `LATE`."""
    dead: int
    dead_lately: int
    """Given up in the last day, though the endpoint is enabled."""
    dead_lately_at: datetime | None


LATE = timedelta(hours=1)


async def depth() -> Depth:
    """How full it is. Of more than 100,000 deliveries that are not settled, the first to be due are counted."""
    now = await db.now()
    row = await db.fetch_one(
        "SELECT COUNT(CASE WHEN due_at <= $1 AND failures = 0 AND enabled THEN 1 END) AS due, "
        "COUNT(CASE WHEN due_at <= $1 AND NOT (failures = 0 AND enabled) THEN 1 END) AS held, "
        "COUNT(CASE WHEN due_at > $1 AND lease IS NULL THEN 1 END) AS waiting, "
        "COUNT(CASE WHEN due_at > $1 AND lease IS NOT NULL THEN 1 END) AS claimed, "
        "MIN(CASE WHEN enabled THEN queued_at END) AS oldest_at, "
        "COUNT(DISTINCT CASE WHEN enabled AND queued_at <= $2 THEN endpoint_id END) AS late_endpoints "
        "FROM (SELECT d.endpoint_id, d.due_at, d.lease, d.queued_at, e.failures, e.disabled_at IS NULL AS enabled "
        f"FROM (SELECT * FROM webhook_delivery WHERE {_OPEN_OF_ALL} ORDER BY due_at LIMIT {_COUNTED}) d "
        "JOIN webhook_endpoint e ON e.id = d.endpoint_id) counted",
        now,
        now - LATE,
    )
    dead = await db.fetch_one(
        "SELECT COUNT(*) AS dead, COUNT(CASE WHEN dead_at > $1 AND enabled THEN 1 END) AS dead_lately, "
        "MIN(CASE WHEN dead_at > $1 AND enabled THEN dead_at END) AS dead_lately_at "
        "FROM (SELECT d.dead_at, e.disabled_at IS NULL AS enabled FROM (SELECT * FROM webhook_delivery "
        f"WHERE dead_at IS NOT NULL ORDER BY dead_at DESC LIMIT {_COUNTED}) d "
        "JOIN webhook_endpoint e ON e.id = d.endpoint_id) counted",
        now - timedelta(days=1),
    )
    assert row is not None
    assert dead is not None
    return Depth(
        now=now,
        due=row["due"],
        waiting=row["waiting"],
        held=row["held"],
        claimed=row["claimed"],
        oldest_at=db.as_datetime(row["oldest_at"]),
        late_endpoints=row["late_endpoints"],
        dead=dead["dead"],
        dead_lately=dead["dead_lately"],
        dead_lately_at=db.as_datetime(dead["dead_lately_at"]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoints:
    """How many endpoints there are of each kind; each is of one."""

    working: int
    failing: int
    paused: int
    gone: int
    """Disabled by a 410 that nobody has looked at."""
    gone_at: datetime | None
    """The first of these."""
    disabled: int
    """By hand."""


async def count_endpoints() -> Endpoints:
    row = await db.fetch_one(
        "SELECT COUNT(CASE WHEN disabled_at IS NULL AND failures = 0 THEN 1 END) AS working, "
        "COUNT(CASE WHEN disabled_at IS NULL AND failures > 0 AND (paused_until IS NULL OR paused_until <= $1) "
        "THEN 1 END) AS failing, "
        "COUNT(CASE WHEN disabled_at IS NULL AND failures > 0 AND paused_until > $1 THEN 1 END) AS paused, "
        f"COUNT(CASE WHEN disabled_reason = '{GONE}' THEN 1 END) AS gone, "
        f"MIN(CASE WHEN disabled_reason = '{GONE}' THEN disabled_at END) AS gone_at, "
        f"COUNT(CASE WHEN disabled_reason <> '{GONE}' THEN 1 END) AS disabled FROM webhook_endpoint",
        await db.now(),
    )
    assert row is not None
    return Endpoints(**{**row, "gone_at": db.as_datetime(row["gone_at"])})


# ------------------------------------------------------------------------------------------------------- endpoints


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointView:
    """An endpoint as it is stored."""

    id: UUID
    url: str
    description: str
    event_types: tuple[str, ...]
    """Empty: all."""
    secret_generation: int
    previous_secret_until: datetime | None
    created_at: datetime
    disabled_at: datetime | None
    disabled_reason: str | None
    failures: int
    paused_until: datetime | None

    @classmethod
    def of(cls, row: dict[str, Any]) -> Self:
        return cls(
            id=db.as_uuid(row["id"]),
            url=row["url"],
            description=row["description"],
            event_types=tuple(row["event_types"].split()),
            secret_generation=row["secret_generation"],
            previous_secret_until=db.as_datetime(row["previous_secret_until"]),
            created_at=db.as_datetime(row["created_at"]),
            disabled_at=db.as_datetime(row["disabled_at"]),
            disabled_reason=row["disabled_reason"],
            failures=row["failures"],
            paused_until=db.as_datetime(row["paused_until"]),
        )

    def signing(self, now: datetime) -> tuple[int, ...]:
        """The generations of the secrets that sign, the newest first."""
        if self.previous_secret_until is None or self.previous_secret_until <= now:
            return (self.secret_generation,)
        return self.secret_generation, self.secret_generation - 1


async def endpoint(endpoint_id: UUID) -> EndpointView | None:
    return (await _endpoints({endpoint_id})).get(endpoint_id)


async def _endpoints(ids: set[UUID]) -> dict[UUID, EndpointView]:
    if not ids:
        return {}
    keys = ", ".join(f"${number}" for number in range(1, 1 + len(ids)))
    rows = await db.fetch(f"SELECT * FROM webhook_endpoint WHERE id IN ({keys})", *ids)
    return {view.id: view for view in map(EndpointView.of, rows)}


async def endpoints(*, after: tuple[Any, ...] | None, limit: int) -> list[EndpointView]:
    """Up to `limit` endpoints, oldest first, behind the (created_at, id) `after`."""
    condition = "(created_at, id) > ($1, $2)" if after else "1 = 1"
    rows = await db.fetch(
        f"SELECT * FROM webhook_endpoint WHERE {condition} ORDER BY created_at, id LIMIT {int(limit)}", *(after or ())
    )
    return [EndpointView.of(row) for row in rows]


async def disable(endpoint_id: UUID, reason: str) -> None:
    """Deliver nothing to it any more, and promise it nothing; what it was promised waits, and is given up in time. By
    hand also what is disabled already: then somebody knows."""
    await db.execute(
        "UPDATE webhook_endpoint SET disabled_at = COALESCE(disabled_at, $2), disabled_reason = $3 "
        f"WHERE id = $1 AND (disabled_at IS NULL OR disabled_reason = '{GONE}')",
        endpoint_id,
        await db.now(),
        reason,
    )


# ------------------------------------------------------------------------------------- what people see and ask for


class State(StrEnum):
    """Where a delivery is."""

    PENDING = "PENDING"
    DELIVERED = "DELIVERED"
    DEAD = "DEAD"


_IN_STATE = {
    State.PENDING: f"({_OPEN})",
    State.DELIVERED: "delivered_at IS NOT NULL",
    State.DEAD: "dead_at IS NOT NULL",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeliveryView:
    """A delivery as it is stored, without its payload."""

    id: UUID
    endpoint_id: UUID
    account_id: UUID | None
    sequence: int | None
    epoch: int | None
    type: str
    created_at: datetime
    due_at: datetime
    attempts: int
    last_attempt_at: datetime | None
    last_status: int | None
    last_latency_ms: int | None
    last_error: str | None
    delivered_at: datetime | None
    dead_at: datetime | None
    emptied: bool
    """Its payload is gone, with the account's data."""

    @property
    def state(self) -> State:
        if self.delivered_at is not None:
            return State.DELIVERED
        return State.PENDING if self.dead_at is None else State.DEAD

    @classmethod
    def of(cls, row: dict[str, Any]) -> Self:
        return cls(
            id=db.as_uuid(row["id"]),
            endpoint_id=db.as_uuid(row["endpoint_id"]),
            account_id=db.as_uuid(row["account_id"]),
            sequence=row["sequence"],
            epoch=row["epoch"],
            type=row["type"],
            created_at=db.as_datetime(row["created_at"]),
            due_at=db.as_datetime(row["due_at"]),
            attempts=row["attempts"],
            last_attempt_at=db.as_datetime(row["last_attempt_at"]),
            last_status=row["last_status"],
            last_latency_ms=row["last_latency_ms"],
            last_error=row["last_error"],
            delivered_at=db.as_datetime(row["delivered_at"]),
            dead_at=db.as_datetime(row["dead_at"]),
            emptied=row["payload"] == "",
        )


async def delivery(delivery_id: UUID) -> DeliveryView | None:
    row = await db.fetch_one("SELECT * FROM webhook_delivery WHERE id = $1", delivery_id)
    return DeliveryView.of(row) if row else None


async def page(
    *,
    endpoint_id: UUID | None = None,
    account_id: UUID | None = None,
    states: frozenset[State] | None = None,
    after: tuple[Any, ...] | None = None,
    limit: int,
) -> list[DeliveryView]:
    """Up to `limit` deliveries, newest first, behind the (created_at, id) `after`."""
    args: list[Any] = []
    conditions = []
    for column, value in (("endpoint_id", endpoint_id), ("account_id", account_id)):
        if value is not None:
            args.append(value)
            conditions.append(f"{column} = ${len(args)}")
    if states is not None:
        conditions.append("(" + (" OR ".join(_IN_STATE[state] for state in sorted(states)) or "1 = 0") + ")")
    if after is not None:
        args += after
        conditions.append(f"(created_at, id) < (${len(args) - 1}, ${len(args)})")
    rows = await db.fetch(
        f"SELECT * FROM webhook_delivery WHERE {' AND '.join(conditions) or '1 = 1'} "
        f"ORDER BY created_at DESC, id DESC LIMIT {int(limit)}",
        *args,
    )
    return [DeliveryView.of(row) for row in rows]


async def again(endpoint_id: UUID, delivery_ids: Sequence[UUID], *, unless_since: datetime | None = None) -> int:
    """Make deliveries to the endpoint due now, delivered or not, with the same webhook-ids and all their time before
    them. To be called under their accounts' locks: a deletion erases what it has found settled. Returns how many; left
    out is what a worker has just now, whose payload is gone, and what this was done to since that time."""
    # Who locks several deliveries has their endpoints, as `claim` does, or waits for no lock: nobody waits in a circle.
    await db.fetch(f"SELECT id FROM webhook_endpoint WHERE id = $1{db.for_update(key=False)}", endpoint_id)
    now = await db.now()
    keys = ", ".join(f"${number}" for number in range(5, 5 + len(delivery_ids)))
    changed = await db.execute(
        "UPDATE webhook_delivery SET due_at = $1, queued_at = $1, attempts = 0, delivered_at = NULL, dead_at = NULL, "
        "lease = NULL, traceparent = $2 WHERE endpoint_id = $3 AND payload <> '' "
        f"AND (lease IS NULL OR due_at <= $1) AND queued_at < $4 AND id IN ({keys})",
        now,
        tracing.traceparent(),
        endpoint_id,
        unless_since or now + timedelta(microseconds=1),
        *delivery_ids,
    )
    if changed:
        await db.notify(CHANNEL)
    return changed


@dataclass(frozen=True, kw_only=True, slots=True)
class Promised:
    """A delivery, as far as delivering many again needs it."""

    id: UUID
    account_id: UUID | None
    queued_at: datetime


async def since(endpoint_id: UUID, moment: datetime, until: datetime, *, limit: int) -> list[Promised]:
    """The first `limit` deliveries to an endpoint that were promised from that moment on and before the other, oldest
    first, and whose payload is there."""
    rows = await db.fetch(
        "SELECT id, account_id, queued_at FROM webhook_delivery "
        "WHERE endpoint_id = $1 AND created_at >= $2 AND created_at < $3 "
        f"AND payload <> '' ORDER BY created_at, id LIMIT {int(limit)}",
        endpoint_id,
        moment,
        until,
    )
    return [
        Promised(
            id=db.as_uuid(row["id"]),
            account_id=db.as_uuid(row["account_id"]),
            queued_at=db.as_datetime(row["queued_at"]),
        )
        for row in rows
    ]
