"""Webhook endpoints: who is told of what, where, and signed with which secret.

The billing team and services with the scope `webhooks` manage them; so does who runs Sunset, at the command line, where
there is no caller (`by` is None). Secrets derive from the installation's and are told when they are made, never stored.
What is delivered to them, and how, is `app.webhooks`.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from app import accounts, db, errors, idempotency, limiting, webhooks
from app.auth import Call, require_webhook_manager
from app.lifecycle import TransitionType
from app.models import WebhookEndpoint
from app.receivers import Receivers, Refused
from app.webhooks import DeliveryView, EndpointView, Promised

ROTATION: Final = timedelta(hours=24)
"""How long the secret before a rotation signs too."""

MAX_ENDPOINTS: Final = 5_000
MAX_URL_LENGTH: Final = 2_000
MAX_DESCRIPTION_LENGTH: Final = 500
MAX_AT_ONCE: Final = 10_000
"""How many deliveries one call delivers again at most; the next call, since the last one's time, goes on."""

_BATCH = 500
"""Deliveries in one transaction, which holds the locks of their accounts."""

_NAME = "webhook endpoints"


@dataclass(frozen=True, kw_only=True)
class Created:
    """An endpoint, and the generation of the secret that was made with it or for it."""

    endpoint: EndpointView
    secret_generation: int


@asynccontextmanager
async def _managing(by: Call | None) -> AsyncIterator[None]:
    """A transaction of somebody who may. Raises `PermissionDenied` for others, before it raises what `limiting.spend`
    does."""
    if by is not None:
        await require_webhook_manager(by)
        await limiting.spend(by)
    async with db.transaction():
        if by is not None:
            await require_webhook_manager(by)
        yield


async def _once(
    by: Call | None,
    mutation: str,
    key: str | None,
    values: dict[str, Any],
    action: Callable[[], Awaitable[dict[str, Any]]],
) -> dict[str, Any]:
    if by is None:
        return await action()
    await db.exclusively(_NAME)  # so that of two identical calls the second finds the first's answer
    return await idempotency.once(by.identity, mutation, key, values, None, action)


async def create(
    by: Call | None,
    receivers: Receivers,
    *,
    url: str,
    description: str | None,
    event_types: Sequence[str] | None,
    idempotency_key: str | None = None,
) -> Created:
    """A new endpoint, which is told from now on of what happens: of these types, or of all. `InvalidInput` for a URL
    that webhooks are not sent to, and for types that do not exist."""
    values = {"url": url, "description": description, "event_types": event_types}

    async def made() -> dict[str, Any]:
        row = await db.fetch_one("SELECT COUNT(*) AS count FROM webhook_endpoint WHERE disabled_at IS NULL")
        assert row is not None
        if row["count"] >= MAX_ENDPOINTS:
            raise errors.InvalidInput(f"There are {MAX_ENDPOINTS:,} endpoints; disable some first.", field="url")
        endpoint = await WebhookEndpoint.create(
            id=db.uuid7(),
            url=_url(receivers, url),
            description=_description(description),
            event_types=_types(event_types),
            secret_generation=0,
            created_at=await db.now(),
            failures=0,
        )
        return {"endpoint": str(endpoint.id)}

    async with _managing(by):
        answer = await _once(by, "createWebhookEndpoint", idempotency_key, values, made)
        return Created(endpoint=await _found(UUID(answer["endpoint"])), secret_generation=0)


async def update(
    by: Call | None,
    receivers: Receivers,
    endpoint_id: UUID | None,
    *,
    url: str | None = None,
    description: str | None = None,
    event_types: Sequence[str] | None = None,
) -> EndpointView:
    """Change what is given. An empty list of types means all."""
    async with _managing(by):
        endpoint = await _locked(endpoint_id)
        await db.execute(
            "UPDATE webhook_endpoint SET url = $2, description = $3, event_types = $4 WHERE id = $1",
            endpoint.id,
            endpoint.url if url is None else _url(receivers, url),
            endpoint.description if description is None else _description(description),
            " ".join(endpoint.event_types) if event_types is None else _types(event_types),
        )
        return await _found(endpoint.id)


async def rotate(by: Call | None, endpoint_id: UUID | None, *, idempotency_key: str | None = None) -> Created:
    """A new secret. The one before signs too for `ROTATION`, so that the receiver can change over; an older one signs
    no more."""

    async def rotated() -> dict[str, Any]:
        endpoint = await _locked(endpoint_id)
        await db.execute(
            "UPDATE webhook_endpoint SET secret_generation = secret_generation + 1, previous_secret_until = $2 "
            "WHERE id = $1",
            endpoint.id,
            await db.now() + ROTATION,
        )
        return {"endpoint": str(endpoint.id), "generation": endpoint.secret_generation + 1}

    async with _managing(by):
        answer = await _once(by, "rotateWebhookSecret", idempotency_key, {"endpoint": endpoint_id}, rotated)
        return Created(endpoint=await _found(UUID(answer["endpoint"])), secret_generation=answer["generation"])


async def disable(by: Call | None, endpoint_id: UUID | None) -> EndpointView:
    """Tell it nothing any more. What it was promised waits for it to be enabled, four days at most."""
    async with _managing(by):
        endpoint = await _locked(endpoint_id)
        await webhooks.disable(endpoint.id, webhooks.BY_HAND)
        return await _found(endpoint.id)


async def enable(by: Call | None, endpoint_id: UUID | None) -> EndpointView:
    """Tell it again, with nothing held against it: what waits is due. What happened meanwhile it was not promised."""
    async with _managing(by):
        endpoint = await _locked(endpoint_id)
        await db.execute(
            "UPDATE webhook_endpoint SET disabled_at = NULL, disabled_reason = NULL, failures = 0, paused_until = NULL "
            "WHERE id = $1",
            endpoint.id,
        )
        await db.notify(webhooks.CHANNEL)
        return await _found(endpoint.id)


async def ping(by: Call | None, endpoint_id: UUID | None, *, idempotency_key: str | None = None) -> DeliveryView:
    """Send it an event about nothing; the delivery tells what came of it. `InvalidInput` for one that is disabled."""

    async def pinged() -> dict[str, Any]:
        endpoint = await _enabled(endpoint_id)
        return {"delivery": str(await webhooks.put_ping(endpoint.id))}

    async with _managing(by):
        answer = await _once(by, "pingWebhookEndpoint", idempotency_key, {"endpoint": endpoint_id}, pinged)
        return await _delivery(UUID(answer["delivery"]))


async def redeliver(by: Call | None, delivery_id: UUID | None, *, idempotency_key: str | None = None) -> DeliveryView:
    """Deliver one again, whatever came of it, with the same webhook-id. `InvalidInput` while a worker has it, when its
    endpoint is disabled, and when what it said is erased."""

    async def made_due() -> dict[str, Any]:
        delivery = await _delivery(delivery_id)
        await _enabled(delivery.endpoint_id)
        if not await _again(delivery.endpoint_id, [delivery]):
            raise errors.InvalidInput(
                "What it said was erased with the account's data."
                if delivery.emptied
                else "It is being delivered just now.",
                field="deliveryId",
            )
        return {"delivery": str(delivery.id)}

    async with _managing(by):
        answer = await _once(by, "redeliverWebhook", idempotency_key, {"delivery": delivery_id}, made_due)
        return await _delivery(UUID(answer["delivery"]))


async def redeliver_since(
    by: Call | None, endpoint_id: UUID | None, since: datetime, *, idempotency_key: str | None = None
) -> int:
    """Deliver again whatever an endpoint was promised from that time to now, `MAX_AT_ONCE` at most, with the same
    webhook-ids. Returns how many; what is erased is not among them, and what a worker has just now is left to it. They
    are made due in batches, the oldest first: a call that repeats one with the same key, however far that came, goes on
    with what was not made due."""

    async def begun() -> dict[str, Any]:
        endpoint, now = await _enabled(endpoint_id), await db.now()
        count = len(await webhooks.since(endpoint.id, since, now, limit=MAX_AT_ONCE))
        return {"endpoint": str(endpoint.id), "until": now.isoformat(), "count": count}

    async with _managing(by):
        values = {"endpoint": endpoint_id, "since": since}
        answer = await _once(by, "redeliverWebhook", idempotency_key, values, begun)
    endpoint, until = UUID(answer["endpoint"]), datetime.fromisoformat(answer["until"])
    promised = await webhooks.since(endpoint, since, until, limit=MAX_AT_ONCE)
    left = [one for one in promised if one.queued_at < until]
    for start in range(0, len(left), _BATCH):
        async with db.transaction():
            await _again(endpoint, left[start : start + _BATCH], until)
    count: int = answer["count"]
    return count


async def refuse_to_redeliver(by: Call | None) -> None:
    """What a call comes to that does not name one delivery, or an endpoint and a time: `InvalidInput`, for who may."""
    async with _managing(by):
        raise errors.InvalidInput("Give `deliveryId`, or `endpointId` with `since`.", field="deliveryId")


async def _again(
    endpoint_id: UUID, deliveries: Sequence[DeliveryView | Promised], unless_since: datetime | None = None
) -> int:
    await accounts.lock_rows({one.account_id for one in deliveries if one.account_id is not None})
    return await webhooks.again(endpoint_id, [one.id for one in deliveries], unless_since=unless_since)


async def _delivery(delivery_id: UUID | None) -> DeliveryView:
    found = None if delivery_id is None else await webhooks.delivery(delivery_id)
    if found is None:
        raise errors.NotFound("delivery")
    return found


async def _locked(endpoint_id: UUID | None) -> EndpointView:
    if endpoint_id is not None:
        await db.fetch(f"SELECT id FROM webhook_endpoint WHERE id = $1{db.for_update(key=False)}", endpoint_id)
    return await _found(endpoint_id)


async def _found(endpoint_id: UUID | None) -> EndpointView:
    found = None if endpoint_id is None else await webhooks.endpoint(endpoint_id)
    if found is None:
        raise errors.NotFound("webhook endpoint")
    return found


async def _enabled(endpoint_id: UUID | None) -> EndpointView:
    endpoint = await _found(endpoint_id)
    if endpoint.disabled_at is not None:
        raise errors.InvalidInput("The endpoint is disabled; enable it first.", field="endpointId")
    return endpoint


def _url(receivers: Receivers, url: str) -> str:
    if not 1 <= len(url) <= MAX_URL_LENGTH:
        raise errors.InvalidInput(f"A URL has 1 to {MAX_URL_LENGTH:,} characters.", field="url")
    try:
        receivers.check_url(url)
    except Refused as refused:
        raise errors.InvalidInput(f"Webhooks are not sent there. {refused}", field="url") from None
    return url


def _description(description: str | None) -> str:
    text = (description or "").strip()
    if len(text) > MAX_DESCRIPTION_LENGTH:
        raise errors.InvalidInput(
            f"A description has at most {MAX_DESCRIPTION_LENGTH} characters.", field="description"
        )
    return text


def _types(event_types: Sequence[str] | None) -> str:
    known = set(TransitionType)
    for one in event_types or ():
        if one not in known:
            raise errors.InvalidInput("There is no such event type; `eventTypes` lists them.", field="eventTypes")
    return " ".join(sorted(set(event_types or ())))
