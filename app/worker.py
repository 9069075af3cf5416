"""The worker: delivers what is promised and runs what is due, until it is told to stop.

1. Sleep until a transaction wakes the outbox's channel, something is due, or a few seconds have passed.
2. Claim as many messages as there are free places, and deliver them at the same time, each with its own deadline.
3. Settle each: delivered, another try later, or a dead letter.
4. Beside it the same for webhooks, of which many more are under way at a time, since they wait for strangers.
5. Beside both, so that none waits for another: carry out what is due by the clock (`app.timers`), enqueue the status
   of every account after a restore (`app.restores`), and once an hour throw away what has been kept long enough.
6. When told to stop: begin nothing more, let what is on its way end within the grace period, then return.

Any number of workers may run, in the API's process or in their own. A worker that is killed loses nothing: its
claims lapse, and the copies that a receiver may then see share their Message-ID.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Generic, TypeVar

import structlog

from app import db, events, idempotency, ids, limiting, metrics, outbox, restores, tracing, webhooks
from app.auth import Installation
from app.delivery.email import DeliveryError, Mailer, Recipient, compose, render
from app.delivery.webhook import NotTried, Poster, signed
from app.errors import Unavailable
from app.lifecycle import LinkPurpose
from app.messages import Link
from app.outbox import Claimed
from app.timers import Timers

_log = structlog.stdlib.get_logger(__name__)

POLL_SECONDS = 5.0
"""The longest sleep: what is due by the clock alone is at most this late, and a lost wake-up costs no more."""

WEBHOOKS_AT_A_TIME = 256
"""Exchanges under way; all of them mostly wait."""

WEBHOOKS_KEPT_FREE = 64
"""Of these, for endpoints that do not fail: however many others hang, they wait for none of them."""

WEBHOOKS_LOOKUPS = 2 * WEBHOOKS_AT_A_TIME
"""Names looked up at a time: for every place one, and one for the exchange that had it before and has given up."""

WEBHOOKS_GATHERED = timedelta(milliseconds=20)
"""Looking for what is due costs the same for one place as for many."""

GONE = 410
"""The status by which a receiver says that it wants no more."""

_HOUSEKEEPING_SECONDS = 3600.0

_PATHS = {LinkPurpose.CONFIRM: "confirm", LinkPurpose.FEEDBACK: "feedback", LinkPurpose.RESTART: "restart"}


Work = TypeVar("Work")


class _Line(Generic[Work]):
    """Delivers one kind of work as it falls due, so many at a time."""

    def __init__(
        self,
        *,
        channel: str,
        claim: Callable[[int], Awaitable[list[Work]]],
        deliver: Callable[[Work], Coroutine[Any, Any, None]],
        next_due: Callable[[], Awaitable[datetime | None]],
        concurrency: int,
        gathered: timedelta,
        stopping: asyncio.Event,
    ) -> None:
        """`gathered`: for how long places that become free are counted before it is asked who wants them."""
        self._channel = channel
        self._take = claim
        self._deliver = deliver
        self._next_due = next_due
        self._concurrency = concurrency
        self._gathered = gathered.total_seconds()
        self._stopping = stopping
        self._freed = asyncio.Event()
        """Something has ended since it was last asked what is due."""
        self.under_way: set[asyncio.Task[None]] = set()

    async def keep_delivering(self) -> None:
        async with db.listen(self._channel) as wakeups:
            while not self._stopping.is_set():
                self._freed.clear()
                if not await self.claim():
                    await self._sleep(wakeups)

    async def claim(self) -> bool:
        """Begin to deliver what is due, as far as there is room. True when it was something: there may be more."""
        places = self._concurrency - len(self.under_way)
        claimed = await self._take(places) if places > 0 else []
        for one in claimed:
            task = asyncio.create_task(self._deliver(one))
            self.under_way.add(task)
            task.add_done_callback(self._free)
        return bool(claimed)

    def _free(self, task: asyncio.Task[None]) -> None:
        self.under_way.discard(task)
        asyncio.get_running_loop().call_later(self._gathered, self._freed.set)

    def _has_room(self) -> bool:
        return len(self.under_way) < self._concurrency

    async def _sleep(self, wakeups: db.Wakeups) -> None:
        """Until there may be work: a wake-up, a delivery that ended, the time that something is due, or the order
        to stop. While every place is taken, what is due has to wait and wakes nobody."""
        pause = await self._pause() if self._has_room() else POLL_SECONDS
        stopping = asyncio.ensure_future(self._stopping.wait())
        woken = asyncio.ensure_future(wakeups.wait(pause))
        freed = asyncio.ensure_future(self._freed.wait())
        try:
            await asyncio.wait({stopping, woken, freed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (stopping, woken, freed):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _pause(self) -> float:
        due = await self._next_due()
        if due is None:
            return POLL_SECONDS
        return min(max((due - await db.now()).total_seconds(), 0.05), POLL_SECONDS)

    async def finish(self, within: timedelta) -> None:
        """Let what is under way end, and cancel what has not by then."""
        if self.under_way:
            await asyncio.wait(self.under_way, timeout=within.total_seconds())
        for task in self.under_way:
            task.cancel()
        await asyncio.gather(*self.under_way, return_exceptions=True)


class Worker:
    """One worker on the database that is bound where `run` is called."""

    def __init__(
        self,
        installation: Installation,
        mailer: Mailer,
        *,
        sender: str,
        link_base: str,
        concurrency: int,
        grace: timedelta,
    ) -> None:
        self._installation = installation
        self._mailer = mailer
        self._poster = Poster(installation.receivers, lookups=WEBHOOKS_LOOKUPS)
        self._sender = sender
        self._link_base = link_base
        self._grace = grace
        self._stopping = asyncio.Event()
        self._house_kept_until = 0.0
        self._emails = _Line(
            channel=outbox.CHANNEL,
            claim=outbox.claim,
            deliver=self._deliver,
            next_due=outbox.next_due,
            concurrency=concurrency,
            gathered=timedelta(),
            stopping=self._stopping,
        )
        self._webhooks = _Line(
            channel=webhooks.CHANNEL,
            claim=partial(webhooks.claim, kept_free=WEBHOOKS_KEPT_FREE),
            deliver=self._notify,
            next_due=webhooks.next_due,
            concurrency=WEBHOOKS_AT_A_TIME,
            gathered=WEBHOOKS_GATHERED,
            stopping=self._stopping,
        )
        self._timers = Timers(installation, forget=mailer.forget, done=metrics.timer_done)

    def stop(self) -> None:
        """Ask `run` to return as soon as what it is doing is done. Safe to call from a signal handler."""
        self._stopping.set()

    async def run(self) -> None:
        """Work until `stop`, once. A database that is away is waited for."""
        beside = [
            asyncio.create_task(self._persist(work)) for work in (self._keep_time, self._webhooks.keep_delivering)
        ]
        await self._persist(self._emails.keep_delivering)
        await asyncio.gather(self._emails.finish(self._grace), self._webhooks.finish(self._grace))
        await asyncio.gather(*beside)
        await self._webhooks.finish(timedelta())  # what was claimed at the very moment of the order to stop
        await self._mailer.close()

    async def _persist(self, work: Callable[[], Awaitable[None]]) -> None:
        while not self._stopping.is_set():
            try:
                await work()
            except Unavailable:
                _log.warning("worker.database_unavailable", retry_in_seconds=POLL_SECONDS)
                await self._rest(POLL_SECONDS)
            except Exception:
                _log.exception("worker.failed", retry_in_seconds=POLL_SECONDS)
                await self._rest(POLL_SECONDS)

    async def _rest(self, seconds: float) -> None:
        """Unless told to stop."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _keep_time(self) -> None:
        while not self._stopping.is_set():
            if not await self._timers.run() + await restores.restate(self._installation):
                await self._keep_house()
                due_in = await self._timers.next_due()
                await self._rest(POLL_SECONDS if due_in is None else min(due_in.total_seconds(), POLL_SECONDS))

    async def _keep_house(self) -> None:
        """Once an hour; at once again while there is more than one portion of anything."""
        if time.monotonic() < self._house_kept_until:
            return
        thrown_away = await outbox.forget(self._mailer.forget) + await idempotency.forget() + await limiting.forget()
        if not thrown_away + await webhooks.give_up() + await webhooks.forget():
            self._house_kept_until = time.monotonic() + _HOUSEKEEPING_SECONDS

    async def drain(self) -> None:
        """Carry out what is due and deliver, until nothing is due. For commands and tests; a service calls `run`."""
        lines = (self._emails, self._webhooks)
        while await self._timers.run() + await restores.restate(self._installation) + sum(
            [await line.claim() for line in lines]
        ) or any(line.under_way for line in lines):
            if under_way := self._emails.under_way | self._webhooks.under_way:
                await asyncio.wait(under_way)

    async def _deliver(self, message: Claimed) -> None:
        with structlog.contextvars.bound_contextvars(
            outbox_id=str(message.id), account_id=str(message.account_id), template=message.template
        ):
            try:
                with tracing.delivery(
                    message.template,
                    channel="outbox",
                    message_id=message.message_id,
                    attempt=message.attempt,
                    parent=message.traceparent,
                ):
                    await self._try(message)
            except Unavailable:
                _log.warning("worker.not_settled", reason="the database is away; the lease will lapse")
            except Exception:
                _log.exception("worker.delivery_failed")

    async def _try(self, message: Claimed) -> None:
        began = time.perf_counter()
        recipient = Recipient(name=message.recipient_name, address=message.recipient_address)
        try:
            rendered = render(message.email(), recipient, sign=self._sign)
            composed = compose(rendered, recipient, self._sender, message.message_id, message.created_at)
            await self._mailer.send(composed)
        except asyncio.CancelledError:  # The grace period is over; a copy that got through has the same Message-ID.
            await outbox.release(message)
            raise
        except DeliveryError as error:
            tracing.failed(type(error).__name__)
            seconds = time.perf_counter() - began
            kept = await outbox.failed(message, str(error), permanent=error.permanent)
            _count_failure(message, seconds, permanent=error.permanent, kept=kept)
            _log.warning("email.failed", attempt=message.attempt, permanent=error.permanent, lease_kept=kept)
        except Exception as error:
            # A fault of ours must not lose the message: a corrected version delivers it.
            _log.exception("email.not_sendable", attempt=message.attempt)
            tracing.failed(type(error).__name__)
            seconds = time.perf_counter() - began
            reason = f"{type(error).__name__} in this version; see the log"
            kept = await outbox.failed(message, reason, permanent=False)
            _count_failure(message, seconds, permanent=False, kept=kept)
        else:
            seconds = time.perf_counter() - began
            kept = await outbox.delivered(message)
            if kept:
                metrics.delivery(message.template, "delivered", seconds)
            _log.info("email.delivered", attempt=message.attempt, lease_kept=kept)

    def _sign(self, link: Link) -> str:
        """The URL of a link: Sunset's own page, or the host's, with the token that grants what the link says."""
        token = self._installation.tokens.mint_link(link, issued_at=link.issued_at, expires_at=link.expires_at)
        return link_url(self._link_base, link.purpose, token)

    async def _notify(self, delivery: webhooks.Claimed) -> None:
        with structlog.contextvars.bound_contextvars(
            webhook_id=str(delivery.id),
            endpoint_id=str(delivery.endpoint_id),
            account_id=delivery.account_id and str(delivery.account_id),
            event=delivery.type,
        ):
            try:
                with tracing.delivery(
                    delivery.type,
                    channel="webhooks",
                    message_id=ids.encode(ids.Kind.WEBHOOK_DELIVERY, delivery.id),
                    attempt=delivery.attempt,
                    parent=delivery.traceparent,
                ):
                    await self._exchange(delivery)
            except Unavailable:
                _log.warning("worker.not_settled", reason="the database is away; the lease will lapse")
            except Exception:
                _log.exception("worker.delivery_failed")

    async def _exchange(self, delivery: webhooks.Claimed) -> None:
        tokens = self._installation.tokens
        body = delivery.payload.encode()
        headers = signed(
            [tokens.webhook_secret(delivery.endpoint_id, generation) for generation in delivery.secret_generations],
            ids.encode(ids.Kind.WEBHOOK_DELIVERY, delivery.id),
            delivery.signed_at,
            body,
        )
        try:
            answer = await self._poster.post(delivery.url, headers, body, content_type=events.CONTENT_TYPE)
        except asyncio.CancelledError:  # The grace period is over; a copy that got through has the same webhook-id.
            await webhooks.release(delivery)
            raise
        except NotTried:
            tracing.failed("not tried")
            await webhooks.release(delivery)
            _log.warning("webhook.put_back", reason="too many names are being looked up that do not answer")
            return
        if answer.error is not None:
            tracing.failed(str(answer.status or "no answer"))
        result = await webhooks.settle(
            delivery,
            webhooks.Outcome(
                status=answer.status,
                latency=answer.latency,
                error=answer.error,
                gone=answer.status == GONE,
                retry_after=answer.retry_after,
            ),
        )
        if result is not None:
            metrics.webhook(delivery.type, result, answer.latency.total_seconds())
        _log.info(
            "webhook.delivered" if answer.error is None else "webhook.failed",
            attempt=delivery.attempt,
            status=answer.status,
            lease_kept=result is not None,
        )


def _count_failure(message: Claimed, seconds: float, *, permanent: bool, kept: bool) -> None:
    """What another worker has claimed meanwhile counts there."""
    if kept:
        metrics.delivery(
            message.template, "dead" if outbox.is_last(message, permanent=permanent) else "failed", seconds
        )


def link_url(base: str, purpose: LinkPurpose, token: str) -> str:
    """`base` is a page of the host's, or ends in Sunset's own path of pages."""
    joiner = "&" if "?" in base else "?"
    if base.endswith("/links"):
        return f"{base}/{_PATHS[purpose]}?token={token}"
    return f"{base}{joiner}purpose={_PATHS[purpose]}&token={token}"
