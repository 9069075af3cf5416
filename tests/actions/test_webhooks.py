"""Events by webhook: promised with what they tell of, delivered to who wants them, retried, paused, and done again."""

import asyncio
import re
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from standardwebhooks import Webhook, WebhookVerificationError

from app import db, endpoints, errors, events, history, ids, webhooks
from app import worker as worker_module
from app.delivery.webhook import DEADLINE, PATIENCE, Poster
from app.ids import Kind
from app.lifecycle import SYSTEM, AccountStatus, TransitionType
from app.webhooks import Claimed, EndpointView, Outcome
from tests.actions.test_races import waiting
from tests.cast import ALICE, BILLING, Stage
from tests.delivery.webhook_server import Receiver, receiving, says
from tests.ending import DAY, HOUR, WINDOW, StoppedClock, many, steps

SECOND = timedelta(seconds=1)
START = datetime(2031, 5, 5, 12, tzinfo=UTC)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StoppedClock:
    return StoppedClock(monkeypatch, START)


async def add(house: Stage, receiver: Receiver | None = None, *types: str) -> EndpointView:
    """An endpoint, at the receiver or somewhere where nothing is sent by these tests."""
    url = receiver.url if receiver else "https://hooks.example.com/"
    made = await endpoints.create(
        None, house.installation.receivers, url=url, description="of the test", event_types=types
    )
    return made.endpoint


async def rows(condition: str = "1 = 1", *args: Any) -> list[dict[str, Any]]:
    return await db.fetch(f"SELECT * FROM webhook_delivery WHERE {condition} ORDER BY created_at, id", *args)


async def tell(
    house: Stage, reference: str = "acme", kind: TransitionType = TransitionType.CANCELLATION_EXPIRED
) -> UUID:
    """A transition of an account, by itself."""
    account_id = await house.account_key(reference)
    async with db.transaction():
        await append(account_id, kind)
    return account_id


async def append(account_id: UUID, kind: TransitionType) -> None:
    await history.append(
        kind,
        account_id=account_id,
        status=AccountStatus.ACTIVE,
        request_id=None,
        actor=SYSTEM,
        now=await db.now(),
    )


async def claim_one() -> Claimed:
    (claimed,) = await webhooks.claim(10)
    return claimed


def refused(status: int = 500, **more: Any) -> Outcome:
    return Outcome(status=status, latency=timedelta(milliseconds=7), error=f"answered {status}", **more)


ACCEPTED = Outcome(status=200, latency=timedelta(milliseconds=7), error=None)


# -------------------------------------------------------------------------------------------------- what is told


async def test_a_whole_life_is_told_in_order_and_every_event_is_valid(house: Stage, receiver: Receiver) -> None:
    """From the request to the deletion: what the history has, the receiver got, once each."""
    endpoint = await add(house, receiver)
    account_id = await house.account_key("acme")
    asked = await house.request_cancellation(ALICE, reason="TOO_EXPENSIVE")
    await house.do(ALICE, "declineOffer", offerId=asked["request"]["offers"][0]["id"])
    await house.do(
        ALICE, "submitFeedback", requestId=asked["request"]["id"], reason="UNUSED", comment="We have moved on."
    )
    await house.cancel()
    for mutation in ("holdDeletion", "releaseDeletion"):
        await house.do(BILLING, mutation, accountId=await house.account_id("acme"), note="They called.")
    await house.letters()
    await db.advance_clock(WINDOW + 10 * DAY)
    await house.letters()
    await db.advance_clock(timedelta(minutes=2))
    await house.letters()

    told = sorted(receiver.events, key=lambda event: event["data"]["sequence"])  # type: ignore[index]
    assert [str(event["type"]).removeprefix("account.") for event in told] == await steps(account_id)
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == len(told)
    for event in told:
        Draft202012Validator(events.schema(TransitionType(str(event["type"])))).validate(event)
    facts: list[dict[str, Any]] = [event["data"] for event in told]  # type: ignore[misc]
    assert {one["accountReference"] for one in facts} == {"acme"}
    assert {one["accountId"] for one in facts} == {ids.encode(Kind.ACCOUNT, account_id)}
    by_type = {str(event["type"]): event["data"] for event in told}
    (said,) = by_type["account.canceled"]["feedback"]  # type: ignore[index]
    assert (said["reason"], said["comment"]) == ("UNUSED", "We have moved on.")
    assert by_type["account.canceled"]["epoch"] == 1  # type: ignore[index]
    assert by_type["account.offer_declined"]["offerCode"]  # type: ignore[index]
    assert "alice" not in str(told).lower()
    secret = house.installation.tokens.webhook_secret(endpoint.id, 0)
    for request in receiver.requests:
        Webhook(secret).verify(request.body, request.headers)


async def test_what_the_deletion_leaves_is_the_last_event_emptied(house: Stage, receiver: Receiver) -> None:
    await add(house, receiver)
    await house.cancel()
    await house.letters()
    account_id = await house.account_key("acme")
    await db.advance_clock(WINDOW + DAY)
    await house.letters()
    await db.advance_clock(timedelta(minutes=2))
    await house.letters()
    assert receiver.types[-1] == "account.deleted"
    (left,) = await rows("account_id = $1", account_id)
    assert (left["type"], left["payload"]) == ("account.deleted", "")
    with pytest.raises(errors.InvalidInput, match="erased"):
        await endpoints.redeliver(None, db.as_uuid(left["id"]))


async def test_the_deletion_waits_for_events_that_are_not_delivered(house: Stage, receiver: Receiver) -> None:
    receiver.answer = says("500 Oops")
    await add(house, receiver)
    await house.cancel()
    for later in (WINDOW + HOUR, timedelta(minutes=2)):
        await db.advance_clock(later)
        await house.letters()
    row = await db.fetch_one("SELECT last_error FROM deletion_step WHERE system = 'sunset'")
    assert row is not None
    assert "webhook deliver" in row["last_error"]
    receiver.answer = says("204 No Content")
    for _ in range(4):
        await db.advance_clock(2 * HOUR)
        await house.letters()
    assert receiver.types[-1] == "account.deleted"


# -------------------------------------------------------------------------------------------------------- promising


async def test_each_enabled_endpoint_is_promised_each_transition_once(house: Stage) -> None:
    first, second, disabled = [await add(house) for _ in range(3)]
    await endpoints.disable(None, disabled.id)
    account_id = await tell(house)
    await tell(house)
    told = [(db.as_uuid(row["endpoint_id"]), row["sequence"]) for row in await rows("account_id = $1", account_id)]
    assert sorted(told) == sorted((one.id, number) for one in (first, second) for number in (1, 2))


async def test_a_filter_lets_through_what_it_names(house: Stage) -> None:
    """Whole names: one is not a part of another's, and an underscore stands for itself."""
    wanted = await add(house, None, "account.canceled", "account.deleted")
    other = await add(house, None, "account.cancellation_requested")
    await db.execute(
        "UPDATE webhook_endpoint SET event_types = 'account.cancellationXexpired xaccount.canceled' WHERE id = $1",
        other.id,
    )
    for kind in (TransitionType.CANCELLATION_EXPIRED, TransitionType.CANCELED, TransitionType.RESTARTED):
        await tell(house, kind=kind)
    assert [(db.as_uuid(row["endpoint_id"]), row["type"]) for row in await rows()] == [(wanted.id, "account.canceled")]


async def test_what_is_rolled_back_is_not_told(house: Stage) -> None:
    await add(house)
    account_id = await house.account_key("acme")

    async def fail_after_telling() -> None:
        async with db.transaction():
            await append(account_id, TransitionType.RESTARTED)
            assert len(await rows()) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_after_telling()
    assert await rows() == []


# --------------------------------------------------------------------------------------------------- claim and settle


async def test_a_lease_is_fenced(house: Stage, clock: StoppedClock) -> None:
    """Who was too slow can settle nothing: neither the delivery nor what is thought of the endpoint."""
    endpoint = await add(house)
    await tell(house)
    slow = await claim_one()
    assert await webhooks.claim(10) == []
    clock.forward(webhooks.LEASE)
    quick = await claim_one()
    assert (quick.id, quick.attempt) == (slow.id, 2)
    assert not await webhooks.settle(slow, refused())
    assert not await webhooks.release(slow)
    assert await webhooks.settle(quick, ACCEPTED)
    assert not await webhooks.settle(slow, refused())
    (row,) = await rows()
    assert row["delivered_at"] is not None
    found = await webhooks.endpoint(endpoint.id)
    assert found is not None
    assert found.failures == 0


async def test_no_endpoint_gets_more_than_its_share_and_no_delivery_two_workers(house: Stage) -> None:
    busy, calm = await add(house), await add(house, None, "account.restarted")
    for reference in ("acme", "globex"):
        for kind in (TransitionType.CANCELLATION_EXPIRED, TransitionType.RESTARTED, TransitionType.RESTARTED):
            await tell(house, reference, kind)
    claims = await asyncio.gather(*(webhooks.claim(4) for _ in range(4)))
    claimed = [one for some in claims for one in some]
    assert len({one.id for one in claimed}) == len(claimed)
    counts = [sum(one.endpoint_id == endpoint.id for one in claimed) for endpoint in (busy, calm)]
    assert all(0 < count <= webhooks.PER_ENDPOINT for count in counts), counts
    assert await webhooks.settle(claimed[0], ACCEPTED)
    (following,) = await webhooks.claim(4) + await webhooks.claim(4)
    assert following.endpoint_id == claimed[0].endpoint_id


async def test_it_is_tried_for_three_days_and_then_a_dead_letter(house: Stage, clock: StoppedClock) -> None:
    """Were there no breaker: an endpoint that fails some of the time."""
    await add(house)
    await tell(house)
    tries = []
    for _ in range(100):
        claimed = await webhooks.claim(1)
        if claimed:
            tries.append(clock.now - START)
            await webhooks.settle(claimed[0], refused())
            await db.execute("UPDATE webhook_endpoint SET failures = 0, paused_until = NULL")
        due = await webhooks.next_due()
        if due is None:
            break
        clock.put(due)
    (row,) = await rows()
    assert row["dead_at"] is not None
    assert tries[-1] >= timedelta(hours=72)
    assert len(tries) > 10
    waits = [later - earlier for earlier, later in pairwise(tries)]
    assert timedelta(seconds=5) <= waits[0] <= timedelta(seconds=10)
    assert max(waits) <= timedelta(hours=8)
    assert (row["last_status"], row["last_error"], row["last_latency_ms"]) == (500, "answered 500", 7)


async def test_waits_differ_so_that_what_failed_together_does_not_come_back_together(
    house: Stage, clock: StoppedClock
) -> None:
    await add(house)
    for _ in range(10):
        await tell(house)
    due = set()
    for _ in range(10):
        (claimed,) = await webhooks.claim(1)
        await webhooks.settle(claimed, refused())
        await db.execute("UPDATE webhook_endpoint SET failures = 0, paused_until = NULL")
        due.add(str((await rows("id = $1", claimed.id))[0]["due_at"]))
    assert len(due) > 1


async def test_a_failing_endpoint_is_paused_and_then_tried_by_one_delivery(house: Stage, clock: StoppedClock) -> None:
    """Its other deliveries wait and lose no try; one success, and everything is as before."""
    endpoint = await add(house)
    for _ in range(8):
        await tell(house)
    for _ in range(webhooks.BREAKS_AFTER):
        (claimed, *_) = await webhooks.claim(1)
        await webhooks.settle(claimed, refused())
    paused = await webhooks.endpoint(endpoint.id)
    assert paused is not None
    assert paused.failures == webhooks.BREAKS_AFTER
    assert paused.paused_until is not None
    assert 15 * SECOND <= paused.paused_until - clock.now <= 30 * SECOND
    assert await webhooks.claim(10) == []
    untried = await rows("attempts = 0")
    assert len(untried) == 8 - webhooks.BREAKS_AFTER
    assert await webhooks.next_due() is not None

    clock.put(paused.paused_until)
    probe = await claim_one()
    assert await webhooks.claim(10) == []
    await webhooks.settle(probe, refused())
    longer = await webhooks.endpoint(endpoint.id)
    assert longer is not None
    assert longer.paused_until is not None
    assert longer.paused_until - clock.now >= 30 * SECOND

    clock.put(longer.paused_until)
    await webhooks.settle(await claim_one(), ACCEPTED)
    healthy = await webhooks.endpoint(endpoint.id)
    assert healthy is not None
    assert (healthy.failures, healthy.paused_until) == (0, None)
    assert len(await webhooks.claim(10)) == webhooks.PER_ENDPOINT


async def test_endpoints_that_work_come_before_those_that_fail(house: Stage, clock: StoppedClock) -> None:
    failing = await add(house)
    await tell(house)
    await webhooks.settle(await claim_one(), refused())
    await tell(house)
    clock.forward(HOUR)
    healthy = await add(house)
    await tell(house)
    (first,) = await webhooks.claim(1)
    assert first.endpoint_id == healthy.id
    (second,) = await webhooks.claim(1)
    assert second.endpoint_id == failing.id


async def test_endpoints_that_fail_leave_places_to_others(house: Stage, clock: StoppedClock) -> None:
    """However many hang, what is promised to the others meanwhile has a place."""
    for _ in range(4):
        await add(house)
    await tell(house)
    failing = await webhooks.claim(4)
    for one in failing:
        await webhooks.settle(one, refused())
    clock.forward(HOUR)
    working = await add(house)
    await tell(house)
    claimed = await webhooks.claim(4, kept_free=2)
    assert [one.endpoint_id for one in claimed].count(working.id) == 1
    assert len(claimed) == 1 + 2
    assert await webhooks.claim(2, kept_free=2) == []
    assert len(await webhooks.claim(2)) == 2


async def test_places_go_to_endpoints_that_can_use_them_and_first_to_those_that_have_none(
    house: Stage, clock: StoppedClock
) -> None:
    """What hangs is older than everything, and must not be in the way of what is new."""
    hangs = await add(house)
    for _ in range(webhooks.PER_ENDPOINT + 2):
        await tell(house)
    (first,) = await webhooks.claim(1)
    clock.forward(SECOND)
    later = await add(house)
    await tell(house)
    (second,) = await webhooks.claim(1)
    assert (first.endpoint_id, second.endpoint_id) == (hangs.id, later.id)
    assert {one.endpoint_id for one in await webhooks.claim(webhooks.PER_ENDPOINT - 1)} == {hangs.id}
    clock.forward(SECOND)
    latest = await add(house)
    await tell(house)
    assert {one.endpoint_id for one in await webhooks.claim(2)} == {later.id, latest.id}
    assert await webhooks.claim(10) == []


@pytest.mark.postgres
async def test_a_claim_reads_what_it_takes(postgres_house: Stage) -> None:
    """And not, for each endpoint, what is due to all the others: PostgreSQL takes what is open for next to nothing."""
    await db.execute(
        "INSERT INTO webhook_endpoint (id, url, description, event_types, secret_generation, created_at, failures) "
        "SELECT gen_random_uuid(), 'https://hooks.example.com/', '', '', 0, clock_timestamp(), 0 "
        "FROM generate_series(1, 1000)"
    )
    await db.execute("ANALYZE")
    await tell(postgres_house)
    client: Any = db.bound()._client
    asked: list[tuple[str, Any]] = []
    fetch = client.fetch

    async def noted(sql: str, args: Any) -> Any:
        asked.append((sql, args))
        return await fetch(sql, args)

    client.fetch = noted
    try:
        assert len(await webhooks.claim(4)) == 4
    finally:
        client.fetch = fetch
    looked = [(sql, args) for sql, args in asked if "webhook_delivery" in sql]
    assert looked
    for sql, args in looked:
        plan = "\n".join(row["QUERY PLAN"] for row in await db.fetch(f"EXPLAIN (ANALYZE, TIMING OFF) {sql}", *args))
        removed = [int(number) for number in re.findall(r"Rows Removed by Filter: (\d+)", plan)]
        assert max(removed, default=0) <= 10, plan


async def test_retry_after_is_honored_within_bounds(house: Stage, clock: StoppedClock) -> None:
    """For all that the endpoint is promised."""
    endpoint = await add(house)
    for asked, waited in ((600, 600), (10**9, 3600)):
        for _ in range(2):
            await tell(house)
        (claimed,) = await webhooks.claim(1)
        await webhooks.settle(claimed, refused(429, retry_after=timedelta(seconds=asked)))
        row = (await rows("id = $1", claimed.id))[0]
        assert db.as_datetime(row["due_at"]) - clock.now == timedelta(seconds=waited)
        assert await webhooks.claim(10) == [], "it asked for the other deliveries too"
        clock.forward(timedelta(seconds=waited))
        for _ in range(2):
            await webhooks.settle(await claim_one(), ACCEPTED)
    found = await webhooks.endpoint(endpoint.id)
    assert found is not None
    assert found.failures == 0


async def test_what_a_receiver_asks_for_is_done(house: Stage, receiver: Receiver) -> None:
    receiver.answer = says("503 Later", "Retry-After: 3000")
    await add(house, receiver)
    await tell(house)
    await house.letters()
    (row,) = await rows()
    assert timedelta(seconds=2_900) < db.as_datetime(row["due_at"]) - await db.now() <= timedelta(seconds=3_000)


async def test_what_waits_behind_a_disabled_endpoint_is_given_up_in_time(house: Stage, clock: StoppedClock) -> None:
    endpoint = await add(house)
    await tell(house)
    await endpoints.disable(None, endpoint.id)
    clock.forward(webhooks.GIVEN_UP_AFTER)
    assert await webhooks.give_up() == 0
    clock.forward(SECOND)
    assert await webhooks.claim(10) == []
    assert await webhooks.give_up() == 1
    (row,) = await rows()
    assert row["dead_at"] is not None
    assert "never tried" in row["last_error"]
    clock.forward(webhooks.KEPT)
    assert await webhooks.forget() == 1


# ------------------------------------------------------------------------------------------------ through the worker


async def test_gone_disables_the_endpoint_and_nobody_else(house: Stage, receiver: Receiver) -> None:
    receiver.answer = says("410 Gone")
    async with receiving() as other:
        gone, stays = await add(house, receiver), await add(house, other)
        await tell(house)
        await house.letters()
        await tell(house)
        await house.letters()
        assert len(receiver.requests) == 1
        assert len(other.requests) == 2
    found = await webhooks.endpoint(gone.id)
    assert found is not None
    assert (found.disabled_at is not None, found.disabled_reason) == (True, "It answered 410 Gone.")
    assert (await rows("endpoint_id = $1", gone.id))[0]["dead_at"] is not None
    kept = await webhooks.endpoint(stays.id)
    assert kept is not None
    assert kept.disabled_at is None


async def test_a_receiver_that_hangs_delays_no_other(
    house: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it holds its exchanges, everybody else hears everything; each exchange that ends lets the next begin."""
    monkeypatch.setattr(worker_module, "POLL_SECONDS", 3_600.0)
    release = asyncio.Event()

    async def hangs(*_: object) -> None:
        await release.wait()

    receiver.answer = hangs
    async with receiving() as healthy:
        await add(house, receiver)
        await add(house, healthy)
        for _ in range(20):
            await tell(house)
        worker = house.worker()
        running = asyncio.create_task(worker.run())
        await healthy.has(20)
        assert receiver.open == webhooks.PER_ENDPOINT
        release.set()
        worker.stop()
        await running
    assert len({request.headers["webhook-id"] for request in healthy.requests}) == 20
    assert receiver.most_open <= webhooks.PER_ENDPOINT


async def test_a_worker_keeps_places_free_of_what_fails(
    house: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "WEBHOOKS_AT_A_TIME", 4)
    monkeypatch.setattr(worker_module, "WEBHOOKS_KEPT_FREE", 2)

    async def hangs(*_: object) -> None:
        await asyncio.sleep(3600)

    receiver.answer = hangs
    async with receiving() as healthy:
        for _ in range(6):
            await add(house, receiver)
        await db.execute("UPDATE webhook_endpoint SET failures = 1")
        await tell(house)
        worker = house.worker()
        worker._grace = timedelta()
        running = asyncio.create_task(worker.run())
        await receiver.has(2)
        await add(house, healthy)
        await tell(house)
        await healthy.has(1)
        assert receiver.most_open == 2
        worker.stop()
        await running


async def test_a_delivery_that_waits_for_too_long_behind_names_that_hang_is_put_back(
    house: Stage, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver has done nothing: it is not held against it, and is no try."""
    asked, answers = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def getaddrinfo(host: str, port: int | None, **_: object) -> list[object]:
        if host == "hangs.internal":
            loop.call_soon_threadsafe(asked.set)
            answers.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    endpoint = await add(house, receiver)
    await endpoints.update(
        None, house.installation.receivers, endpoint.id, url=f"http://works.internal:{receiver.port}/"
    )
    await tell(house)
    worker = house.worker()
    worker._poster = Poster(house.installation.receivers, lookups=1, patience=timedelta(seconds=0.1))
    hanging = asyncio.create_task(
        worker._poster.post(f"http://hangs.internal:{receiver.port}/", {}, b"", content_type="a/b")
    )
    await asked.wait()
    await worker._notify(await claim_one())
    (row,) = await rows()
    assert (row["attempts"], row["lease"], row["last_error"]) == (0, None, None)
    found = await webhooks.endpoint(endpoint.id)
    assert found is not None
    assert found.failures == 0
    answers.set()
    assert (await hanging).error is None
    assert PATIENCE + DEADLINE < webhooks.LEASE, "meanwhile nobody else takes it"
    await worker.drain()
    assert (await rows())[0]["delivered_at"] is not None


@pytest.mark.postgres
async def test_many_workers_claim_each_delivery_once_and_share_each_endpoint(postgres_house: Stage) -> None:
    for _ in range(20):
        await add(postgres_house)
    for _ in range(4):
        await tell(postgres_house)
    for _ in range(10):
        claims = await asyncio.gather(*(webhooks.claim(7) for _ in range(8)))
        claimed = [one for some in claims for one in some]
        assert len({one.id for one in claimed}) == len(claimed) > 0
        shares = Counter(one.endpoint_id for one in claimed)
        assert max(shares.values()) <= webhooks.PER_ENDPOINT
        for one in claimed:
            assert await webhooks.release(one)


async def test_a_worker_that_stops_gives_back_what_it_could_not_finish(house: Stage, receiver: Receiver) -> None:
    async def hangs(*_: object) -> None:
        await asyncio.sleep(3600)

    receiver.answer = hangs
    await add(house, receiver)
    await tell(house)
    worker = house.worker()
    worker._grace = timedelta()
    running = asyncio.create_task(worker.run())
    await receiver.has(1)
    worker.stop()
    await running
    (row,) = await rows()
    assert (row["lease"], row["attempts"], row["delivered_at"], row["dead_at"]) == (None, 0, None, None)


async def test_in_a_rotation_both_secrets_sign_until_the_old_one_ends(house: Stage, receiver: Receiver) -> None:
    endpoint = await add(house, receiver)
    rotated = await endpoints.rotate(None, endpoint.id)
    old, new = (house.installation.tokens.webhook_secret(endpoint.id, generation) for generation in (0, 1))
    assert rotated.secret_generation == 1
    await tell(house)
    await house.letters()
    (request,) = receiver.requests
    for secret in (old, new):
        Webhook(secret).verify(request.body, request.headers)
    await db.advance_clock(endpoints.ROTATION)
    await tell(house)
    await house.letters()
    request = receiver.requests[-1]
    Webhook(new).verify(request.body, request.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(old).verify(request.body, request.headers)


async def test_no_secret_is_stored(house: Stage) -> None:
    endpoint = await add(house)
    secret = house.installation.tokens.webhook_secret(endpoint.id, 0)
    row = await db.fetch_one("SELECT * FROM webhook_endpoint WHERE id = $1", endpoint.id)
    assert secret.startswith("whsec_")
    assert secret.removeprefix("whsec_") not in str(row)
    assert secret != house.installation.tokens.webhook_secret(endpoint.id, 1)
    assert secret != house.installation.tokens.webhook_secret(db.uuid7(), 0)


# -------------------------------------------------------------------------------------------------------- doing again


async def test_one_is_delivered_again_with_the_same_id_and_body(house: Stage, receiver: Receiver) -> None:
    await add(house, receiver)
    await tell(house)
    await house.letters()
    (row,) = await rows()
    await endpoints.redeliver(None, db.as_uuid(row["id"]))
    await house.letters()
    first, second = receiver.requests
    assert first.body == second.body
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    (row,) = await rows()
    assert (row["attempts"], row["delivered_at"] is not None) == (1, True)


async def test_a_dead_letter_has_all_its_time_again(house: Stage, clock: StoppedClock) -> None:
    await add(house)
    await tell(house)
    clock.forward(webhooks.TRIED_FOR)
    claimed = await claim_one()
    await webhooks.settle(claimed, refused())
    assert (await rows())[0]["dead_at"] is not None
    await endpoints.redeliver(None, claimed.id)
    clock.forward(SECOND)
    await webhooks.settle(await claim_one(), refused())
    assert (await rows())[0]["dead_at"] is None


async def test_what_is_under_way_is_not_delivered_again(house: Stage) -> None:
    await add(house)
    await tell(house)
    claimed = await claim_one()
    with pytest.raises(errors.InvalidInput, match="just now"):
        await endpoints.redeliver(None, claimed.id)
    assert await webhooks.settle(claimed, ACCEPTED)


async def test_all_since_a_time_are_delivered_again(house: Stage, receiver: Receiver) -> None:
    async with receiving() as other:
        endpoint = await add(house, receiver)
        await add(house, other)
        await tell(house)
        await db.advance_clock(HOUR)
        since = await db.now()
        for _ in range(3):
            await tell(house)
        await house.letters()
        assert await endpoints.redeliver_since(None, endpoint.id, since) == 3
        await house.letters()
        assert len(receiver.requests) == 7
        assert len(other.requests) == 4


async def test_many_are_delivered_again_by_the_same_few_statements(
    house: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several accounts, too: ten thousand come to their end within a request's time."""
    endpoint, since = await add(house), await db.now()
    run: list[str] = []
    for name in ("fetch", "fetch_one", "execute"):
        original = getattr(db, name)

        async def counted(sql: str, *args: Any, original: Any = original) -> Any:
            run.append(sql)
            return await original(sql, *args)

        monkeypatch.setattr(db, name, counted)

    async def statements(number: int) -> int:
        await db.execute("UPDATE webhook_delivery SET delivered_at = due_at")
        run.clear()
        assert await endpoints.redeliver_since(None, endpoint.id, since) == number
        spent = len(run)
        assert len(await rows("delivered_at IS NULL")) == number
        return spent

    await tell(house)
    one = await statements(1)
    for reference in ("acme", "globex") * 20:
        await tell(house, reference)
    assert await statements(41) == one < 15


@pytest.mark.postgres
async def test_who_delivers_many_again_lets_a_worker_that_claims_of_them_go_first(postgres_house: Stage) -> None:
    """Each has the endpoint before its deliveries, so that they never wait for each other."""
    endpoint, since = await add(postgres_house), await db.now()
    await tell(postgres_house)
    await tell(postgres_house)
    connection = await asyncpg.connect(db.bound().url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT 1 FROM webhook_endpoint FOR NO KEY UPDATE")
            doing = asyncio.create_task(endpoints.redeliver_since(None, endpoint.id, since))
            await waiting()
            await connection.execute("SELECT 1 FROM webhook_delivery FOR UPDATE NOWAIT")
    finally:
        await connection.close()
    assert await doing == 2


@pytest.mark.postgres
async def test_what_somebody_delivers_again_is_left_to_them_by_who_throws_away(
    postgres_house: Stage, clock: StoppedClock
) -> None:
    """Waiting for it, while holding others, they might wait for each other."""
    await add(postgres_house)
    await tell(postgres_house)
    await tell(postgres_house)
    delivered, _ = await rows()
    await db.execute("UPDATE webhook_delivery SET delivered_at = due_at WHERE id = $1", delivered["id"])
    clock.forward(webhooks.KEPT + DAY)
    has_them, ends = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with db.transaction():
            await db.fetch(f"SELECT id FROM webhook_delivery{db.for_update()}")
            has_them.set()
            await ends.wait()

    holding = asyncio.create_task(hold())
    await has_them.wait()
    async with asyncio.timeout(30):
        assert (await webhooks.forget(), await webhooks.give_up()) == (0, 0)
    ends.set()
    await holding
    assert (await webhooks.forget(), await webhooks.give_up()) == (1, 1)


async def test_what_is_promised_to_a_disabled_endpoint_is_delivered_when_it_is_enabled(
    house: Stage, receiver: Receiver
) -> None:
    endpoint = await add(house, receiver)
    await tell(house)
    await endpoints.disable(None, endpoint.id)
    await tell(house)
    await house.letters()
    assert receiver.requests == []
    await endpoints.enable(None, endpoint.id)
    await house.letters()
    assert len(receiver.requests) == 1, "what happened while it was disabled it was not promised"


async def test_a_ping_is_delivered_like_any_event(house: Stage, receiver: Receiver) -> None:
    endpoint = await add(house, receiver, "account.deleted")
    await endpoints.ping(None, endpoint.id)
    await house.letters()
    (event,) = receiver.events
    assert (event["type"], event["data"]) == ("webhook.ping", {})
    Webhook(house.installation.tokens.webhook_secret(endpoint.id, 0)).verify(
        receiver.requests[0].body, receiver.requests[0].headers
    )


async def test_many_endpoints_hear_of_one_transition(house: Stage) -> None:
    """More than are claimed at a time."""
    for _ in range(30):
        await add(house)
    await many(house, 1)
    await tell(house, "many-0")
    seen: set[UUID] = set()
    while claimed := await webhooks.claim(8):
        assert len(claimed) <= 8
        for one in claimed:
            assert one.endpoint_id not in seen
            seen.add(one.endpoint_id)
            await webhooks.settle(one, ACCEPTED)
    assert len(seen) == 30
