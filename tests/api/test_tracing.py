"""Traces, as a collector receives them: over the wire, decoded, and searched for what must not be in them."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app import db, endpoints, tracing
from app.db import Database
from app.models import Staff
from tests import cast
from tests.cast import ALICE, BILLING, Stage, subject
from tests.delivery.webhook_server import receiving, says

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
SERVER, CLIENT, CONSUMER = 2, 3, 5


@dataclass
class Span:
    trace: str
    id: str
    parent: str
    name: str
    kind: int
    failed: bool
    attributes: dict[str, str | int]


@dataclass
class Collector:
    """An OTLP receiver. `status` is what it answers."""

    endpoint: str
    status: int = 200
    bodies: list[bytes] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def resource(self) -> dict[str, str]:
        request = ExportTraceServiceRequest.FromString(self.bodies[0])
        return {one.key: one.value.string_value for one in request.resource_spans[0].resource.attributes}

    def spans(self) -> list[Span]:
        return [
            Span(
                trace=one.trace_id.hex(),
                id=one.span_id.hex(),
                parent=one.parent_span_id.hex(),
                name=one.name,
                kind=one.kind,
                failed=one.status.code == 2,
                attributes={
                    attribute.key: attribute.value.string_value or attribute.value.int_value
                    for attribute in one.attributes
                },
            )
            for body in self.bodies
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for one in scope.spans
        ]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans() if span.name == name]

    def one(self, name: str) -> Span:
        [span] = self.named(name)
        return span


@pytest.fixture
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/x-protobuf"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.paths.append(self.path)
            received.bodies.append(body)
            self.send_response(received.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        received = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield received
        finally:
            server.shutdown()
            thread.join()


@asynccontextmanager
async def traced(database: Database, directory: Path, endpoint: str) -> AsyncIterator[Stage]:
    """The service with the demo company, tracing. What it did is sent when the block has ended."""
    async with cast.stage(database, directory) as house, tracing.exporting(endpoint):
        yield house


def below(spans: list[Span], top: Span) -> list[Span]:
    """Everything that `top` has led to, and itself."""
    found = [top]
    for one in found:
        found += [span for span in spans if span.parent == one.id]
    return found


# ------------------------------------------------------------------------------------------------------- what is told


async def test_request_sql_and_delivery_are_one_trace(database: Database, tmp_path: Path, collector: Collector) -> None:
    """The client's own, where it sends one: its span is the request's parent."""
    async with traced(database, tmp_path, collector.endpoint) as house:
        asked = await house.request_cancellation()
        house.client.headers["traceparent"] = TRACEPARENT
        await house.do(
            ALICE,
            "confirmCancellation",
            requestId=asked["request"]["id"],
            confirmationToken=asked["confirmationToken"],
            accountName="Acme",
        )
        del house.client.headers["traceparent"]
        letters = await house.letters()
    assert set(collector.paths) == {"/v1/traces"}
    assert collector.resource()["service.name"] == "sunset"
    spans = [span for span in collector.spans() if span.trace == TRACE]
    [request] = [span for span in spans if span.kind == SERVER]
    assert (request.name, request.parent, request.failed) == ("mutation confirmCancellation", PARENT, False)
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/graphql",
        "http.response.status_code": 200,
        "graphql.operation.type": "mutation",
    }
    deliveries = [span for span in spans if span.kind == CONSUMER]
    assert len(deliveries) == len(letters) > 1
    assert "deliver cancellation-confirmed" in {span.name for span in deliveries}
    assert {span.attributes["messaging.message.id"] for span in deliveries} == {one["Message-ID"] for one in letters}
    assert {span.parent for span in deliveries} == {request.id}
    assert {span.id for span in below(spans, request)} == {span.id for span in spans}, "nothing stands beside it"
    for top in (request, deliveries[0]):
        statements = [span for span in spans if span.parent == top.id and span.kind == CLIENT]
        assert statements
        assert {span.attributes["db.system.name"] for span in statements} == {database.dialect}
    [other] = [span for span in collector.spans() if span.kind == SERVER and span.trace != TRACE]
    assert (other.name, other.parent) == ("mutation cancelAccount", "")


async def test_every_statement_of_a_request_is_a_span(database: Database, tmp_path: Path, collector: Collector) -> None:
    """Whether it is raw SQL or the ORM's, within a transaction or not, with its text and without its values."""
    async with traced(database, tmp_path, collector.endpoint) as house:
        await house.request_cancellation()
    request = collector.one("mutation cancelAccount")
    statements = [span for span in collector.spans() if span.parent == request.id]
    assert all(span.kind == CLIENT and not span.failed for span in statements)
    names = [span.name for span in statements]
    assert names.count("BEGIN") == names.count("COMMIT") == 1
    begun, ended = names.index("BEGIN"), names.index("COMMIT")
    inside = set(names[begun + 1 : ended])
    assert inside >= {"UPDATE account", "INSERT cancellation_request", "INSERT transition"}
    for span in statements:
        text = str(span.attributes["db.query.text"])
        assert span.attributes["db.query.summary"] == span.name
        assert span.attributes["db.operation.name"] == text.split(maxsplit=1)[0] == span.name.split()[0]
        assert span.attributes.get("db.collection.name", "") == span.name.partition(" ")[2]
    [insert] = [span for span in statements if span.name == "INSERT transition"]
    assert re.search(r"VALUES \((\$\d+|\?)", str(insert.attributes["db.query.text"]))


async def test_a_failed_statement_is_told_without_its_words(
    database: Database, tmp_path: Path, collector: Collector
) -> None:
    """What a database says of a broken rule quotes the row."""
    async with traced(database, tmp_path, collector.endpoint):
        with tracing.request("POST", None), pytest.raises(db.IntegrityError):
            await Staff.create(
                issuer="i",
                subject="canary-subject",
                email=BILLING,
                name="canary",
                role="SUPPORT",
                created_at=await db.now(),
            )
    insert = collector.one("INSERT staff")
    assert b"exception" not in b"".join(collector.bodies), "OpenTelemetry would record the message"
    assert insert.failed
    assert re.fullmatch(r"IntegrityError|UniqueViolationError", str(insert.attributes["error.type"]))
    assert all(canary not in b"".join(collector.bodies) for canary in (b"canary", BILLING.encode()))


async def test_what_is_asked_all_the_time_is_not_told(database: Database, tmp_path: Path, collector: Collector) -> None:
    """A worker with nothing to do, and probes."""
    async with traced(database, tmp_path, collector.endpoint) as house:
        await house.letters()
        for path in ("/livez", "/readyz", "/metrics"):
            assert (await house.client.get(path)).status_code == 200
        assert (await house.client.get("/schema.graphql")).status_code == 200
    assert [span.name for span in collector.spans()] == ["GET /schema.graphql"]


async def test_a_failed_delivery_is_told_and_the_next_one_joins_the_same_trace(
    database: Database, tmp_path: Path, collector: Collector
) -> None:
    async with traced(database, tmp_path, collector.endpoint) as house:
        await house.cancel()
        kept = await db.fetch("SELECT id, facts FROM outbox")
        await db.execute("UPDATE outbox SET facts = '{}'")
        assert await house.letters() == []
        for row in kept:
            await db.execute("UPDATE outbox SET facts = $1, due_at = created_at WHERE id = $2", row["facts"], row["id"])
        assert await house.letters()
    tries = collector.named("deliver cancellation-confirmed")
    assert [(span.failed, span.attributes["sunset.attempt"]) for span in tries] == [(True, 1), (False, 2)]
    assert tries[0].attributes["error.type"]
    [confirmed] = collector.named("mutation confirmCancellation")
    assert {(span.trace, span.parent) for span in tries} == {(confirmed.trace, confirmed.id)}


async def test_the_webhooks_of_a_request_are_in_its_trace(
    database: Database, tmp_path: Path, collector: Collector
) -> None:
    """Each try of each; and what is delivered again is in the trace of who asked for that."""
    async with receiving(says("503 Later")) as receiver, traced(database, tmp_path, collector.endpoint) as house:
        await endpoints.create(
            None, house.installation.receivers, url=receiver.url, description=None, event_types=["account.canceled"]
        )
        await house.cancel()
        await house.letters()
        receiver.answer = says("204 No Content")
        await db.advance_clock(timedelta(minutes=1))
        await house.letters()
        webhook_id = receiver.requests[0].headers["webhook-id"]
        done = await house.do(BILLING, "redeliverWebhook", deliveryId=webhook_id)
        assert done["__typename"] == "RedeliverWebhookSuccess"
        await house.letters()
        assert len(receiver.requests) == 3
    confirmed, asked_again = collector.one("mutation confirmCancellation"), collector.one("mutation redeliverWebhook")
    tries = collector.named("deliver account.canceled")
    assert [(span.parent, span.kind, span.failed) for span in tries] == [
        (confirmed.id, CONSUMER, True),
        (confirmed.id, CONSUMER, False),
        (asked_again.id, CONSUMER, False),
    ]
    assert [span.trace for span in tries] == [confirmed.trace, confirmed.trace, asked_again.trace]
    assert tries[0].attributes == {
        "messaging.system": "sunset",
        "messaging.destination.name": "webhooks",
        "messaging.operation.name": "deliver",
        "messaging.operation.type": "process",
        "messaging.message.id": webhook_id,
        "sunset.event": "account.canceled",
        "sunset.attempt": 1,
        "error.type": "503",
    }
    assert {span.name for span in below(collector.spans(), tries[0])} >= {"UPDATE webhook_delivery"}
    assert receiver.url.encode() not in b"".join(collector.bodies)


async def test_a_message_that_nobody_asked_for_begins_a_trace(
    sqlite_database: Database, tmp_path: Path, collector: Collector
) -> None:
    """What was promised while nothing was traced, for example."""
    async with cast.stage(sqlite_database, tmp_path) as house:
        await house.cancel()
        async with tracing.exporting(collector.endpoint):
            await house.letters()
    assert collector.one("deliver cancellation-confirmed").parent == ""


@pytest.mark.parametrize("given", ["", "hostile", "00-0-0-00", f"00-{'0' * 32}-{PARENT}-01", f"{TRACEPARENT}" * 99])
async def test_what_is_no_traceparent_is_ignored(
    sqlite_database: Database, tmp_path: Path, collector: Collector, given: str
) -> None:
    async with traced(sqlite_database, tmp_path, collector.endpoint) as house:
        response = await house.client.get("/schema.graphql", headers={"traceparent": given})
        assert response.status_code == 200
    assert collector.one("GET /schema.graphql").parent == ""


async def test_nothing_that_people_or_clients_wrote_is_exported(
    database: Database, tmp_path: Path, collector: Collector
) -> None:
    """Names, addresses, tokens, variables, arguments, paths, queries and headers, in every exported byte."""
    canary = "canary-" + "7" * 8
    async with traced(database, tmp_path, collector.endpoint) as house:
        token = house.token(ALICE)
        house.client.headers.update(
            {"tracestate": f"vendor={canary}", "User-Agent": canary, "X-Request-ID": canary, "Referer": canary}
        )
        asked = await house.request_cancellation()
        await house.do(
            ALICE,
            "confirmCancellation",
            requestId=asked["request"]["id"],
            confirmationToken=asked["confirmationToken"],
            accountName="Acme",
            idempotencyKey=canary,
        )
        await house.ask(
            BILLING, f'query {canary.replace("-", "_")} {{ accounts(search: "{canary}") {{ totalCount }} }}'
        )
        await house.client.get(f"/{canary}")
        await house.client.get(f"/links/confirm?token={canary}")
        letters = await house.letters()
    links = re.findall(r"token=([\w.-]+)", "".join(str(letter) for letter in letters))
    sent = b"".join(collector.bodies)
    assert b"/links/confirm" in sent
    secrets = [
        canary,
        canary.replace("-", "_"),
        token,
        asked["confirmationToken"],
        subject(ALICE),
        asked["request"]["id"],
    ]
    people = [value for who in await Staff.all() for value in (who.name, who.email)]
    rows = await db.fetch("SELECT name, email FROM member UNION SELECT name, reference FROM account")
    people += [value for row in rows for value in row.values()]
    assert len(people) > 10
    assert [one for one in {*secrets, *links, *people} if one.encode() in sent] == []


# -------------------------------------------------------------------------------------------------- when it is broken


@pytest.mark.parametrize("status", [400, 503])
async def test_a_collector_that_refuses_changes_nothing(
    sqlite_database: Database, tmp_path: Path, collector: Collector, status: int
) -> None:
    collector.status = status
    async with traced(sqlite_database, tmp_path, collector.endpoint) as house:
        assert (await house.cancel())["account"]["status"] == "CANCELED"
        assert len(await house.letters()) > 1
    assert collector.bodies


async def test_a_collector_that_is_away_changes_nothing(sqlite_database: Database, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    async with traced(sqlite_database, tmp_path, f"http://127.0.0.1:{port}") as house:
        assert (await house.cancel())["account"]["status"] == "CANCELED"
        assert len(await house.letters()) > 1


# -------------------------------------------------------------------------------------------------- the real process

_SERVE_ONCE = """
import asyncio, json, sys
import httpx2
from app import demo, main
from app.settings import Settings

async def run():
    settings = Settings.load({**json.loads(sys.argv[1])})
    app = main.create_app(settings)
    async with app.router.lifespan_context(app):
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://sunset.test") as client:
            response = await client.get("/schema.graphql")
            assert response.status_code == 200

asyncio.run(run())
print(json.dumps(sorted(name for name in sys.modules if name.startswith("opentelemetry"))))
print(json.dumps([one.name for one in __import__("threading").enumerate()]))
"""


def _once(database_file: Path, directory: Path, **more: str) -> list[Any]:
    settings = {
        "SUNSET_DATA_DIR": str(directory),
        "SUNSET_DATABASE_URL": f"sqlite://{database_file}",
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-c", _SERVE_ONCE, json.dumps(settings)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-2:]]


def test_without_the_setting_nothing_is_imported_or_started(sqlite_template: Path, tmp_path: Path) -> None:
    (tmp_path / "own.db").write_bytes(sqlite_template.read_bytes())
    modules, threads = _once(tmp_path / "own.db", tmp_path)
    assert modules == []
    assert [name for name in threads if "Otel" in name or "spans" in name] == []


def test_with_the_setting_the_service_sends_until_its_end(
    sqlite_template: Path, tmp_path: Path, collector: Collector
) -> None:
    (tmp_path / "own.db").write_bytes(sqlite_template.read_bytes())
    modules, _ = _once(tmp_path / "own.db", tmp_path, SUNSET_OTLP_ENDPOINT=collector.endpoint)
    assert modules
    assert collector.one("GET /schema.graphql").kind == SERVER
