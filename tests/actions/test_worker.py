"""The worker with a real mail server: each recipient's outcome, retries, and every way of going away."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app import db, outbox, policy
from app import worker as worker_module
from app.db import Database
from app.delivery.email import SmtpMailer
from app.errors import Contact, Unavailable
from app.lifecycle import CancellationTiming
from app.messages import AccountRestarted
from app.worker import Worker
from tests.cast import ALICE, CAROL, GINA, Stage, stage
from tests.delivery.smtp_server import SmtpServer
from tests.postgres import PostgresServer


@pytest.fixture
async def sqlite_house(sqlite_database: Database, tmp_path: Path) -> AsyncIterator[Stage]:
    async with stage(sqlite_database, tmp_path) as running:
        yield running


@pytest.fixture
def server() -> Iterator[SmtpServer]:
    with SmtpServer() as running:
        yield running


def smtp_worker(
    house: Stage, server: SmtpServer, *, deadline: float = 20, concurrency: int = 4, grace: float = 20
) -> Worker:
    return Worker(
        house.installation,
        SmtpMailer(server.url, starttls=False, deadline=deadline),
        sender="Sunset <no-reply@vendor.example>",
        link_base="https://sunset.example/links",
        concurrency=concurrency,
        grace=timedelta(seconds=grace),
    )


@asynccontextmanager
async def running(worker: Worker) -> AsyncIterator[None]:
    task = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        worker.stop()
        async with asyncio.timeout(30):
            await task


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Return as soon as it holds; a database that is away is waited for."""
    for _ in range(1_500):
        try:
            if await condition():
                return
        except Unavailable:
            pass
        await asyncio.sleep(0.02)
    raise AssertionError(f"never came: {what}")


async def rows() -> dict[str, dict[str, Any]]:
    """The outbox by recipient."""
    return {row["recipient_address"]: row for row in await db.fetch("SELECT * FROM outbox ORDER BY id")}


async def all_settled() -> bool:
    return all(row["delivered_at"] or row["dead_at"] for row in (await rows()).values())


async def end_waits() -> None:
    """What waits for another try is due, and whoever waits for work is woken."""
    await db.execute("UPDATE outbox SET due_at = created_at WHERE lease IS NULL AND attempts > 0")
    await db.notify(outbox.CHANNEL)


async def end_leases() -> None:
    """As if the five minutes were over."""
    await db.execute("UPDATE outbox SET due_at = created_at WHERE lease IS NOT NULL")


async def has_failed(who: str = ALICE) -> bool:
    row = (await rows())[who]
    return row["last_error"] is not None and row["lease"] is None


async def promise(count: int) -> None:
    async with db.transaction():
        now = await db.now()
        email = AccountRestarted(
            account_name="Acme",
            plan_name="Essentials",
            restarted_at=now,
            billing_contact=Contact(name="Billing Team", email="billing@vendor.example"),
        )
        await outbox.put(
            [
                outbox.Addressed(to=Contact(name=f"Person {number}", email=f"person{number}@acme.example"), email=email)
                for number in range(count)
            ],
            account_id=db.uuid7(),
            now=now,
            mail_domain="vendor.example",
        )


def copies(server: SmtpServer) -> dict[str, list[bytes]]:
    """What the server took, by Message-ID."""
    found = defaultdict(list)
    for accepted in list(server.messages):
        found[accepted.message["Message-ID"]].append(accepted.content)
    return found


# ------------------------------------------------------------------------------------------------ what servers do


async def test_a_refused_recipient_is_a_dead_letter_and_the_other_gets_the_message(
    sqlite_house: Stage, server: SmtpServer
) -> None:
    server.answer_recipient = lambda address: "550 5.1.1 No such user" if address == CAROL else None
    await sqlite_house.cancel()
    async with running(smtp_worker(sqlite_house, server)):
        await until(all_settled, "both settled")
    settled = await rows()
    assert settled[ALICE]["delivered_at"] is not None
    assert settled[CAROL]["dead_at"] is not None
    assert "550" in settled[CAROL]["last_error"]
    assert [accepted.recipient for accepted in server.messages] == [ALICE]


async def test_a_temporary_refusal_is_tried_again_with_the_same_message(
    sqlite_house: Stage, server: SmtpServer
) -> None:
    server.answer_recipient = lambda address: "451 4.7.1 Greylisted" if address == ALICE else None
    await sqlite_house.cancel()
    async with running(smtp_worker(sqlite_house, server)):
        await until(has_failed, "the first try's failure")
        failed = (await rows())[ALICE]
        assert failed["dead_at"] is None
        assert "451" in failed["last_error"]
        assert db.as_datetime(failed["due_at"]) > await db.now(), "it waits"
        server.answer_recipient = lambda address: None
        await end_waits()
        await until(all_settled, "both delivered")
    assert ((await rows())[ALICE]["attempts"], (await rows())[CAROL]["attempts"]) == (2, 1)
    assert Counter(accepted.recipient for accepted in server.messages) == {ALICE: 1, CAROL: 1}


async def test_a_server_that_stalls_is_given_up_and_tried_again(sqlite_house: Stage, server: SmtpServer) -> None:
    server.stall_at = "DATA"
    await sqlite_house.cancel()
    async with running(smtp_worker(sqlite_house, server, deadline=0.5)):
        await until(has_failed, "the deadline")
        server.stall_at = None
        await until(lambda: has_failed(CAROL), "the other's deadline")
        await end_waits()
        await until(all_settled, "both delivered")
    assert {row["dead_at"] for row in (await rows()).values()} == {None}
    assert Counter(accepted.recipient for accepted in server.messages) == {ALICE: 1, CAROL: 1}


async def test_a_connection_that_ends_after_the_content_makes_copies_with_one_message_id(
    sqlite_house: Stage, server: SmtpServer
) -> None:
    server.drop_after_data = True
    await sqlite_house.cancel()
    async with running(smtp_worker(sqlite_house, server)):
        await until(has_failed, "the dropped connection")
        await until(lambda: has_failed(CAROL), "the other's dropped connection")
        server.drop_after_data = False
        await end_waits()
        await until(all_settled, "both delivered")
    received = copies(server)
    assert set(received) == {row["message_id"] for row in (await rows()).values()}
    assert [len(contents) for contents in received.values()] == [2, 2]
    assert all(len(set(contents)) == 1 for contents in received.values()), "equal byte for byte"


async def test_what_is_due_by_the_clock_does_not_wait_for_a_server_that_stalls(
    sqlite_house: Stage, server: SmtpServer
) -> None:
    server.stall_at = "DATA"
    await sqlite_house.request_cancellation(GINA, "globex")
    await sqlite_house.request_cancellation()

    async def expired() -> bool:
        row = await db.fetch_one("SELECT status FROM cancellation_request WHERE status = 'EXPIRED'")
        return row is not None

    async with running(smtp_worker(sqlite_house, server, concurrency=1, deadline=60, grace=0)):
        await asyncio.to_thread(server.stalled.wait, 30)
        assert not await expired()
        await db.execute(
            "UPDATE cancellation_request SET confirmation_expires_at = requested_at "
            "WHERE status = 'PENDING_CONFIRMATION'"
        )
        await db.notify(outbox.CHANNEL)
        await until(expired, "the request's expiry")
        assert server.messages == []


async def test_a_worker_that_is_stopped_gives_back_what_it_could_not_finish(
    sqlite_house: Stage, server: SmtpServer
) -> None:
    server.stall_at = "DATA"
    await sqlite_house.cancel()
    async with running(smtp_worker(sqlite_house, server, concurrency=1, deadline=600, grace=0.1)):
        await asyncio.to_thread(server.stalled.wait, 30)
    assert {(row["lease"], row["attempts"]) for row in (await rows()).values()} == {(None, 0)}
    server.stall_at = None
    async with running(smtp_worker(sqlite_house, server)):
        await until(all_settled, "both delivered, without a wait for a lease")


async def test_a_message_that_this_version_cannot_read_is_kept_and_holds_up_no_other(
    sqlite_house: Stage, server: SmtpServer
) -> None:
    await sqlite_house.cancel()
    await db.execute("UPDATE outbox SET template = 'of-the-future' WHERE recipient_address = $1", CAROL)
    async with running(smtp_worker(sqlite_house, server)):
        await until(lambda: has_failed(CAROL), "the failure")
        assert (await rows())[CAROL]["dead_at"] is None
        await db.execute("UPDATE outbox SET template = 'cancellation-notice' WHERE recipient_address = $1", CAROL)
        await end_waits()
        await until(all_settled, "both delivered")
    assert {accepted.recipient for accepted in server.messages} == {ALICE, CAROL}


async def test_an_account_that_cannot_be_moved_holds_up_neither_mail_nor_others(
    sqlite_database: Database, tmp_path: Path, server: SmtpServer
) -> None:
    """A plan that has left the policy since: its cancellation waits for somebody to mend it, the others' do not."""
    shipped = policy.load().plans
    plans = {code: replace(plan, effective=CancellationTiming.PERIOD_END) for code, plan in shipped.items()}
    async with stage(sqlite_database, tmp_path, plans=plans) as house:
        await house.cancel()
        await house.cancel("ingrid@initech.example", "initech", "Initech")
        await db.execute("UPDATE cancellation_request SET confirmed_at = requested_at, effective_at = requested_at")
        await db.execute(
            "UPDATE account SET cancellation_effective_at = created_at WHERE status = 'CANCELLATION_SCHEDULED'"
        )
        await db.execute("UPDATE account SET plan_code = 'gone' WHERE reference = 'acme'")
        assert await house.timers().run() == 1
        found = await db.fetch("SELECT reference, status FROM account WHERE reference IN ('acme', 'initech')")
        assert {row["reference"]: row["status"] for row in found} == {
            "acme": "CANCELLATION_SCHEDULED",
            "initech": "CANCELED",
        }
        async with running(smtp_worker(house, server)):
            await until(all_settled, "all delivered")
        await db.execute("UPDATE account SET plan_code = 'essentials' WHERE reference = 'acme'")
        assert await house.timers().run() == 1


# ------------------------------------------------------------------------------------------------- ways to go away


@contextmanager
def process(house: Stage, server: SmtpServer, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """`sunset worker` on the house's database, in a process of its own."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "worker"],
        env={
            **os.environ,
            "SUNSET_DATA_DIR": str(house.settings.data_dir),
            "SUNSET_DATABASE_URL": house.settings.database_url,
            "SUNSET_SMTP_URL": server.url,
            "SUNSET_LOG_FORMAT": "json",
            **environ,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield worker
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.postgres
async def test_a_worker_killed_in_mid_delivery_loses_nothing(postgres_house: Stage, server: SmtpServer) -> None:
    def stall_after_five(_: str) -> None:
        if len(server.messages) >= 5:
            server.stall_at = "DATA"

    await promise(40)
    server.answer_recipient = stall_after_five
    with process(postgres_house, server) as first:
        await asyncio.to_thread(server.stalled.wait, 30)
        first.send_signal(signal.SIGKILL)
        await asyncio.to_thread(first.wait)
    assert first.returncode == -signal.SIGKILL
    assert [row for row in (await rows()).values() if row["lease"] is not None], "it died with claims"
    server.answer_recipient, server.stall_at = lambda _: None, None
    await end_leases()
    with process(postgres_house, server) as second:
        await until(all_settled, "the rest, by the second worker")
        second.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(second.wait) == 0
    received = copies(server)
    promised = await rows()
    assert set(received) == {row["message_id"] for row in promised.values()}
    assert all(len(set(contents)) == 1 for contents in received.values())
    assert {row["dead_at"] for row in promised.values()} == {None}


@pytest.mark.postgres
async def test_a_worker_told_to_stop_finishes_what_it_has_begun_and_begins_nothing_more(
    postgres_house: Stage, server: SmtpServer
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait_for_the_order(_: str) -> None:
        reached.set()
        go_on.wait(30)

    await promise(12)
    server.answer_recipient = wait_for_the_order
    with process(postgres_house, server, SUNSET_WORKER_CONCURRENCY="2") as worker:
        await asyncio.to_thread(reached.wait, 30)
        worker.send_signal(signal.SIGTERM)
        go_on.set()
        assert await asyncio.to_thread(worker.wait) == 0
    left = await rows()
    delivered = [row for row in left.values() if row["delivered_at"] is not None]
    assert 0 < len(delivered) < 12
    assert {row["lease"] for row in left.values()} == {None}, "nobody has to wait for a lease of it"
    assert sorted(copies(server)) == sorted(row["message_id"] for row in delivered)


@pytest.mark.postgres
async def test_a_worker_outlives_a_restart_of_the_database(
    postgres_house: Stage, postgres_server: PostgresServer, server: SmtpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not postgres_server.can_restart:
        pytest.skip("the server is not the tests' own")
    monkeypatch.setattr(worker_module, "POLL_SECONDS", 0.2)
    async with running(smtp_worker(postgres_house, server)):
        await promise(1)
        await until(all_settled, "a message before")
        await asyncio.to_thread(postgres_server.restart)

        async def promised() -> bool:
            await promise(3)
            return True

        await until(promised, "the database again")
        await until(all_settled, "the messages after")
    recipients = {accepted.recipient for accepted in server.messages}
    assert recipients == {f"person{number}@acme.example" for number in range(3)}
