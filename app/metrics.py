"""What this process has done, counted for Prometheus.

Whoever does something calls the function that counts it; `rendered` writes all of it, together with what was read
elsewhere. Every label has few values, all of them of our own making: names of the schema, of templates, of timers,
and codes. Nothing that a client or a person chose is ever a label.

Knows nothing of Sunset: no rows, no settings, no HTTP.
"""

import platform
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from importlib.metadata import version
from typing import Final, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4

NOT_EXECUTED: Final = "none"
"""The operation of a request of which no field was executed."""
OK: Final = "ok"

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which says when the process saw it first

REGISTRY: Final = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

_build = Info("sunset_build", "The version that runs.", registry=REGISTRY)
_build.info({"version": version("sunset"), "python": platform.python_version()})

_requests = Counter(
    "sunset_requests",
    "Root fields answered, by field and result: ok, the type of a refusal, or an error's code.",
    ["operation", "result"],
    registry=REGISTRY,
)
_request_seconds = Histogram(
    "sunset_request_seconds",
    "Seconds that requests to the API took, for each root field in them.",
    ["operation"],
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=REGISTRY,
)
_refusals = Counter(
    "sunset_refusals",
    "Refusals that mutations answered, by mutation and type.",
    ["operation", "type"],
    registry=REGISTRY,
)
_transitions = Counter("sunset_transitions", "Transitions committed, by type.", ["type"], registry=REGISTRY)
_gate = Counter(
    "sunset_gate", "Calls of the gate, by answer: yes, no, refused, unavailable.", ["answer"], registry=REGISTRY
)
_connections_ended = Counter(
    "sunset_connections_ended",
    "Connections that the server ended by itself, by reason: `address` (too many from one), `silent`, `head_timeout`, "
    "`body_timeout`, `head_too_large`, `url_too_long`, `malformed`, `unread` (the client reads no answer).",
    ["reason"],
    registry=REGISTRY,
)
_deliveries = Counter(
    "sunset_deliveries",
    "Deliveries tried, by template and result: delivered, failed (to be tried again), dead.",
    ["template", "result"],
    registry=REGISTRY,
)
_delivery_seconds = Histogram(
    "sunset_delivery_seconds",
    "Seconds that one try to deliver a message took.",
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    registry=REGISTRY,
)
_subscriptions = Gauge("sunset_subscriptions", "Subscriptions that are open.", registry=REGISTRY)
_subscription_events = Counter(
    "sunset_subscription_events", "Events that subscribers were told of, the first status included.", registry=REGISTRY
)
_subscriptions_ended = Counter(
    "sunset_subscriptions_ended",
    "Subscriptions that have ended: `left` by their client, or with the code of the error that ended them.",
    ["reason"],
    registry=REGISTRY,
)
_webhook_tries = Counter(
    "sunset_webhook_tries",
    "Webhooks sent, by type of event and result: delivered, failed (to be tried again), dead.",
    ["event", "result"],
    registry=REGISTRY,
)
_webhook_seconds = Histogram(
    "sunset_webhook_seconds",
    "Seconds that one exchange with a receiver of webhooks took.",
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15),
    registry=REGISTRY,
)
_timer_latency = Histogram(
    "sunset_timer_latency_seconds",
    "Seconds from the time that something was due to when it was done.",
    ["timer"],
    buckets=(0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600, 21600, 86400),
    registry=REGISTRY,
)
_enforcement_seconds = Histogram(
    "sunset_enforcement_seconds",
    "Seconds from a cancellation's effect until the last enforcing system has acknowledged it.",
    buckets=(1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 21600, 86400),
    registry=REGISTRY,
)


def answered(results: Sequence[tuple[str, str]], refusals: Iterable[tuple[str, str]], seconds: float) -> None:
    """One request was answered: each of its root fields (`NOT_EXECUTED` when there was none) with its result, the
    refusals among them, and how long the whole took."""
    for operation, result in results:
        _requests.labels(operation, result).inc()
    for operation, refusal in refusals:
        _refusals.labels(operation, refusal).inc()
    for operation in {operation for operation, _ in results}:
        _request_seconds.labels(operation).observe(seconds)


def gate(answer: Literal["yes", "no", "refused", "unavailable"]) -> None:
    """The gate was asked; once for each account that was named."""
    _gate.labels(answer).inc()


def connection_ended(reason: str) -> None:
    """The server has ended a connection, because of what its client does or leaves undone."""
    _connections_ended.labels(reason).inc()


def transition(kind: str) -> None:
    """A transition was committed."""
    _transitions.labels(kind).inc()


def delivery(template: str, result: Literal["delivered", "failed", "dead"], seconds: float) -> None:
    """One try to deliver a message has ended so, and its outbox row says it."""
    _deliveries.labels(template, result).inc()
    _delivery_seconds.observe(seconds)


def subscription_begun() -> None:
    """Somebody subscribes."""
    _subscriptions.inc()


def subscription_told() -> None:
    """A subscriber is told something."""
    _subscription_events.inc()


def subscription_ended(reason: str) -> None:
    """A subscription is over: its client has left it, or an error of that code has ended it."""
    _subscriptions.dec()
    _subscriptions_ended.labels(reason).inc()


def webhook(event: str, result: Literal["delivered", "failed", "dead"], seconds: float) -> None:
    """One exchange with a receiver has ended so, and the delivery's row says it."""
    _webhook_tries.labels(event, result).inc()
    _webhook_seconds.observe(seconds)


def timer_done(timer: str, late: timedelta) -> None:
    """What was due is done, that long after its time."""
    _timer_latency.labels(timer).observe(late.total_seconds())


def enforced(after: timedelta) -> None:
    """The last of an account's enforcing systems has acknowledged, that long after the cancellation took effect."""
    _enforcement_seconds.observe(after.total_seconds())


class _Together(Collector):
    def __init__(self, more: Iterable[Metric]) -> None:
        self._more = more

    def collect(self) -> Iterator[Metric]:
        yield from REGISTRY.collect()
        yield from self._more


def rendered(more: Iterable[Metric]) -> bytes:
    """Everything that was counted, and `more`, in Prometheus's text format."""
    return generate_latest(_Together(more))
