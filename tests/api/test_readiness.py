"""`/readyz` for who sends requests, `/readyz?deep` for who is called at night."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import pytest

from app import db, endpoints, main, outbox, policy, webhooks
from app.alarms import Name
from app.db import Database
from app.errors import Unavailable
from app.lifecycle import RequestStatus
from tests.cast import Stage, settings
from tests.enforcing import LOGIN, MAILER, acknowledge, obeyed

TOKEN = "a-token-for-prometheus"


async def deep(house: Stage) -> tuple[int, dict[str, Any]]:
    response = await house.client.get("/readyz?deep")
    return response.status_code, response.json()


async def alarms(house: Stage) -> dict[str, dict[str, Any]]:
    """Those that are told while the answer is that all can be served."""
    status, told = await deep(house)
    assert (status, told["status"]) == (200, "ready")
    return {alarm["name"]: alarm for alarm in told["alarms"]}


async def put_off_reminders(house: Stage) -> None:
    """Only the deletion is to come."""
    await house.letters()
    await db.execute("UPDATE account SET reminder_due_at = NULL")


async def test_a_healthy_installation_rings_no_alarm(house: Stage) -> None:
    await house.cancel()
    assert await deep(house) == (200, {"status": "ready", "alarms": []})
    assert (await house.client.get("/readyz")).json() == {"status": "ready"}


async def test_a_deletion_that_is_overdue_by_more_than_an_hour_is_not_ready(house: Stage) -> None:
    await house.cancel()
    await put_off_reminders(house)
    await db.advance_clock(timedelta(days=60, minutes=50))
    assert await alarms(house) == {}, "it is late, and no alarm yet"
    await db.advance_clock(timedelta(minutes=20))
    status, told = await deep(house)
    assert (status, told["status"], [one["name"] for one in told["alarms"]]) == (503, "alarm", [Name.DELETIONS_OVERDUE])
    assert "1 deletion " in told["alarms"][0]["message"]
    assert (await house.client.get("/readyz")).status_code == 200, "requests can be served nevertheless"
    await house.letters()
    assert await deep(house) == (200, {"status": "ready", "alarms": []})


async def test_a_deletion_that_has_begun_and_does_not_end_is_not_ready(house: Stage) -> None:
    """It waits for the emails about the account, which nobody delivers."""
    await house.cancel()
    await db.advance_clock(timedelta(days=60, minutes=1))
    await house.timers().run()
    started = await db.fetch("SELECT status FROM account WHERE deletion_started_at IS NOT NULL")
    assert [row["status"] for row in started] == ["DELETING"]
    await db.advance_clock(timedelta(minutes=50))
    assert set(await alarms(house)) == {Name.MESSAGES_OVERDUE}
    await db.advance_clock(timedelta(minutes=20))
    status, told = await deep(house)
    assert (status, told["status"], told["alarms"][0]["name"]) == (503, "alarm", Name.DELETIONS_OVERDUE)


async def test_a_deletion_on_hold_is_not_overdue(house: Stage) -> None:
    await house.cancel()
    await put_off_reminders(house)
    hold = await house.do(
        "billing@vendor.example", "holdDeletion", accountId=await house.account_id("acme"), note="Law."
    )
    assert hold["__typename"] == "HoldDeletionSuccess"
    await db.advance_clock(timedelta(days=90))
    assert await deep(house) == (200, {"status": "ready", "alarms": []})


async def test_halted_deletions_are_told(house: Stage) -> None:
    since = datetime.fromisoformat("2026-01-01T00:00:00+00:00")
    await db.execute(
        "INSERT INTO deletion_breaker (id, tripped_at, due, allowed) VALUES ($1, $2, 40, 10)", db.uuid7(), since
    )
    found = await alarms(house)
    assert set(found) == {Name.DELETIONS_HALTED}
    assert datetime.fromisoformat(found[Name.DELETIONS_HALTED]["since"]) == since


async def test_work_that_is_overdue_by_more_than_an_hour_is_told(house: Stage) -> None:
    await house.request_cancellation()
    await db.advance_clock(policy.load().confirmation_lifetime + timedelta(minutes=50))
    assert await alarms(house) == {}
    await db.advance_clock(timedelta(minutes=20))
    found = await alarms(house)
    assert set(found) == {Name.TIMERS_OVERDUE}
    assert "expire_request" in found[Name.TIMERS_OVERDUE]["message"]
    stored = await db.fetch_one(
        "SELECT confirmation_expires_at AS at FROM cancellation_request WHERE status = $1",
        RequestStatus.PENDING_CONFIRMATION.value,
    )
    assert stored is not None
    assert datetime.fromisoformat(found[Name.TIMERS_OVERDUE]["since"]) == db.as_datetime(stored["at"])
    await house.letters()
    assert await alarms(house) == {}


async def test_dead_letters_are_told_until_they_are_settled(house: Stage) -> None:
    await house.cancel()
    for message in await outbox.claim(9):
        await outbox.failed(message, "550", permanent=True)
    found = await alarms(house)
    assert set(found) == {Name.DEAD_LETTERS}
    assert "2 messages" in found[Name.DEAD_LETTERS]["message"]
    dead = await outbox.page(frozenset({outbox.State.DEAD}), limit=9)
    await outbox.drop(dead[0].id)
    await outbox.retry(dead[1].id)
    assert await alarms(house) == {}


async def test_a_message_that_no_worker_takes_for_a_quarter_of_an_hour_is_told(house: Stage) -> None:
    await house.cancel()
    await db.advance_clock(timedelta(minutes=14))
    assert await alarms(house) == {}
    await db.advance_clock(timedelta(minutes=2))
    assert set(await alarms(house)) == {Name.MESSAGES_OVERDUE}
    await outbox.claim(9)
    assert await alarms(house) == {}, "a worker has them"


async def test_a_system_that_does_not_obey_in_time_is_told_until_it_does(database: Database, tmp_path: Path) -> None:
    async with obeyed(database, tmp_path) as house:
        at = datetime.fromisoformat((await house.cancel())["account"]["canceledAt"])
        await house.letters()
        await db.advance_clock(timedelta(minutes=9))
        assert await alarms(house) == {}
        await db.advance_clock(timedelta(minutes=31))
        await house.letters()
        found = await alarms(house)
        assert set(found) == {Name.ENFORCEMENT_LATE}
        message = found[Name.ENFORCEMENT_LATE]["message"]
        assert "in time by mailer (1 account), login (1 account): messages may still be going out" in message
        since = datetime.fromisoformat(found[Name.ENFORCEMENT_LATE]["since"])
        assert since - at == timedelta(minutes=10), "of the one that is late for longest"
        await acknowledge(house, MAILER, 1)
        assert "by login (1 account)" in (await alarms(house))[Name.ENFORCEMENT_LATE]["message"]
        await acknowledge(house, LOGIN, 1)
        assert await alarms(house) == {}


async def endpoint(house: Stage) -> UUID:
    made = await endpoints.create(
        None, house.installation.receivers, url="https://hooks.example.com/", description=None, event_types=None
    )
    return made.endpoint.id


async def test_a_webhook_that_nobody_takes_for_an_hour_is_told_unless_its_endpoint_is_disabled(house: Stage) -> None:
    endpoint_id = await endpoint(house)
    await endpoints.ping(None, endpoint_id)
    (claimed,) = await webhooks.claim(9)
    await db.advance_clock(timedelta(minutes=59))
    assert await alarms(house) == {}
    await db.advance_clock(timedelta(minutes=2))
    found = await alarms(house)
    assert set(found) == {Name.WEBHOOKS_OVERDUE}
    assert found[Name.WEBHOOKS_OVERDUE]["message"].startswith("1 endpoint did not take")
    assert datetime.fromisoformat(found[Name.WEBHOOKS_OVERDUE]["since"]) == claimed.queued_at
    await endpoints.disable(None, endpoint_id)
    assert await alarms(house) == {}
    await endpoints.enable(None, endpoint_id)
    assert set(await alarms(house)) == {Name.WEBHOOKS_OVERDUE}
    (claimed,) = await webhooks.claim(9)
    await webhooks.settle(claimed, webhooks.Outcome(status=204, latency=timedelta(), error=None))
    assert await alarms(house) == {}


async def test_a_webhook_that_is_given_up_is_told_for_a_day(house: Stage) -> None:
    endpoint_id = await endpoint(house)
    await endpoints.ping(None, endpoint_id)
    await db.advance_clock(webhooks.TRIED_FOR)
    (claimed,) = await webhooks.claim(9)
    assert await webhooks.settle(claimed, webhooks.Outcome(status=500, latency=timedelta(), error="answered 500"))
    found = await alarms(house)
    assert set(found) == {Name.DEAD_WEBHOOKS}
    assert found[Name.DEAD_WEBHOOKS]["message"].startswith("1 webhook given up")
    await db.advance_clock(timedelta(hours=25))
    assert await alarms(house) == {}


async def test_an_endpoint_that_disables_itself_is_told_until_somebody_decides(house: Stage) -> None:
    for decide in (endpoints.disable, endpoints.enable):
        endpoint_id = await endpoint(house)
        await endpoints.ping(None, endpoint_id)
        (claimed,) = await webhooks.claim(9)
        await webhooks.settle(
            claimed, webhooks.Outcome(status=410, latency=timedelta(), error="answered 410", gone=True)
        )
        found = await alarms(house)
        assert set(found) == {Name.ENDPOINTS_GONE}
        assert found[Name.ENDPOINTS_GONE]["message"].startswith("1 endpoint disabled by")
        at = (await decide(None, endpoint_id)).disabled_at
        assert at is None or at == datetime.fromisoformat(found[Name.ENDPOINTS_GONE]["since"])
        assert Name.ENDPOINTS_GONE not in await alarms(house)
        await db.advance_clock(timedelta(hours=25))


async def test_a_schema_that_is_not_migrated_is_not_ready(house: Stage) -> None:
    await db.execute("DELETE FROM tortoise_migrations WHERE name = 'm0006_restores'")
    status, told = await deep(house)
    assert (status, told) == (
        503,
        {"status": "unavailable", "database": "not migrated", "migrations": ["m0006_restores"]},
    )


async def test_a_database_that_is_away_is_not_ready(house: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: object) -> None:
        raise Unavailable("The database cannot be reached.")

    monkeypatch.setattr(db, "fetch", away)
    monkeypatch.setattr(db, "fetch_one", away)
    for path in ("/readyz", "/readyz?deep"):
        response = await house.client.get(path)
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert response.json() == {"status": "unavailable", "database": "unreachable"}


# ------------------------------------------------------------------------------------------------- who may ask


@asynccontextmanager
async def client_of(database: Database, tmp_path: Path, **environ: str) -> AsyncIterator[httpx2.AsyncClient]:
    app = main.create_app(settings(tmp_path, database.url, **environ))
    transport = httpx2.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://sunset.test") as client,
    ):
        yield client


async def test_only_who_has_the_token_looks_inside(sqlite_database: Database, tmp_path: Path) -> None:
    async with client_of(sqlite_database, tmp_path, SUNSET_METRICS_TOKEN=TOKEN) as client:
        for wrong in ({}, {"authorization": "Bearer wrong-token-of-somebody"}, {"authorization": f"Basic {TOKEN}"}):
            refused = await client.get("/readyz?deep", headers=wrong)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert "alarms" not in refused.text
            assert (await client.get("/readyz", headers=wrong)).status_code == 200, "the plain one is for everybody"
        allowed = await client.get("/readyz?deep", headers={"authorization": f"Bearer {TOKEN}"})
        assert (allowed.status_code, allowed.json()["alarms"]) == (200, [])


async def test_without_a_token_nobody_looks_inside_in_production(sqlite_database: Database, tmp_path: Path) -> None:
    production = {
        "SUNSET_ENVIRONMENT": "production",
        "SUNSET_PUBLIC_URL": "https://cancel.company.example",
        "SUNSET_SECRET_KEY": "0123456789abcdef0123456789abcdef",
        "SUNSET_OIDC_ISSUER": "https://id.company.example/",
        "SUNSET_OIDC_AUDIENCE": "sunset",
        "SUNSET_SMTP_URL": "smtp://mail.company.example",
    }
    async with client_of(sqlite_database, tmp_path, **production) as client:
        assert (await client.get("/readyz?deep")).status_code == 404
        assert (await client.get("/readyz")).status_code == 200
