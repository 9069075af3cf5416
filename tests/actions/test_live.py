"""Live status: first as it is, then each change, from whichever process, to who may see it, and to nobody else."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from app import clock, db, errors, live, provisioning
from app.auth import Call
from app.changes import Changes, Watch, announce
from app.db import Database
from app.lifecycle import AccountStatus, MemberRole, Scope
from app.live import Change
from app.provisioning import AccountItem, MemberItem
from app.tokens import DEVELOPMENT_ISSUER
from tests import cast
from tests.cast import ALICE, BILLING, BOB, CSM, GATEKEEPER, GINA, HOST, SUPPORT, Stage
from tests.postgres import PostgresServer

LONG = 30.0
"""Ends a test that would hang; no test waits for it."""

Told = tuple[AccountStatus, int]


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set as soon as a stream has nothing to tell and waits for a hint: from then on it looks at nothing by itself."""
    begun, wait = asyncio.Event(), Watch.wait

    async def noted(self: Watch, seconds: float) -> Collection[UUID]:
        begun.set()
        return await wait(self, seconds)

    monkeypatch.setattr(Watch, "wait", noted)
    return begun


async def waiting(
    stream: AsyncGenerator[Change, None], waits: asyncio.Event, count: int = 1
) -> asyncio.Task[list[Told]]:
    """What it tells next, to be awaited; it waits by now."""
    task = asyncio.create_task(told(stream, count))
    await waits.wait()
    return task


def follow(house: Stage, who: str, *account_ids: UUID | None) -> AsyncGenerator[Change, None]:
    async def authenticate() -> Call:
        return await house.call(who)

    return live.follow(authenticate, account_ids, house.installation)


async def next_of(stream: AsyncGenerator[Change, None]) -> Change:
    async with asyncio.timeout(LONG):
        return await anext(stream)


async def told(stream: AsyncGenerator[Change, None], count: int) -> list[Told]:
    """What it says next: statuses with their sequences."""
    changes = [await next_of(stream) for _ in range(count)]
    return [(one.status, one.sequence) for one in changes]


@asynccontextmanager
async def watched(house: Stage, who: str, reference: str = "acme") -> AsyncIterator[AsyncGenerator[Change, None]]:
    """A stream that has told the account's first status, and waits."""
    async with aclosing(follow(house, who, await house.account_key(reference))) as stream:
        first = await next_of(stream)
        assert (first.account.reference, first.occurred_at) == (reference, None)
        yield stream


async def restart(house: Stage, reference: str = "acme") -> None:
    answer = await house.do(BILLING, "restartAccount", accountId=await house.account_id(reference))
    assert answer["__typename"] == "RestartAccountSuccess"


ACTIVE, CANCELED = AccountStatus.ACTIVE, AccountStatus.CANCELED


async def test_tells_every_status_first_in_the_order_that_was_asked_for(house: Stage) -> None:
    keys = [await house.account_key(reference) for reference in ("globex", "acme", "initech")]
    await house.cancel()

    async with aclosing(follow(house, SUPPORT, *keys)) as stream:
        first = [await next_of(stream) for _ in keys]

    assert [one.account.id for one in first] == keys
    assert [(one.status, one.epoch, one.sequence) for one in first] == [
        (ACTIVE, 0, 0),
        (CANCELED, 1, 2),
        (ACTIVE, 0, 0),
    ]
    assert [one.occurred_at for one in first] == [None] * 3


async def test_tells_each_change_when_it_is_committed(house: Stage, waits: asyncio.Event) -> None:
    async with watched(house, SUPPORT) as stream:
        coming = await waiting(stream, waits, 2)
        await house.cancel()
        assert await coming == [(ACTIVE, 1), (CANCELED, 2)]


async def test_a_reader_who_is_late_is_told_each_change_in_order_and_as_it_was(house: Stage) -> None:
    """Nothing is kept for them: it is read from the history."""
    async with watched(house, SUPPORT) as stream:
        for _ in range(3):
            await house.cancel()
            await restart(house)

        changes = [await next_of(stream) for _ in range(9)]

    assert [one.sequence for one in changes] == list(range(1, 10))
    assert [one.status for one in changes] == [ACTIVE, CANCELED, ACTIVE] * 3
    assert [one.epoch for one in changes] == [0, 1, 2, 2, 3, 4, 4, 5, 6]
    assert {one.account.status for one in changes} == {ACTIVE}
    times = [one.occurred_at for one in changes]
    assert None not in times
    assert times == sorted(times, key=lambda time: time or datetime.max.replace(tzinfo=UTC))


async def test_tells_of_no_account_but_those_asked_for(house: Stage) -> None:
    async with watched(house, SUPPORT, "initech") as stream:
        await house.cancel()
        await house.cancel("ingrid@initech.example", "initech", "Initech")
        assert await told(stream, 2) == [(ACTIVE, 1), (CANCELED, 2)]


async def test_what_is_not_a_change_of_status_is_not_told(house: Stage) -> None:
    """A sync wakes who watches, and has nothing to say."""
    async with watched(house, SUPPORT) as stream:
        await sync_members(house, ALICE, BOB)
        await house.cancel()
        assert (await told(stream, 1))[0] == (ACTIVE, 1)


async def sync_members(house: Stage, *who: str) -> None:
    """The host lists these members of acme, and no others."""
    members = [
        MemberItem(
            subject=cast.subject(one),
            email=one,
            name=one.partition("@")[0].title(),
            role=MemberRole.ADMIN if one == ALICE else MemberRole.MEMBER,
            permissions=frozenset(),
            issuer=house.installation.member_issuer,
        )
        for one in who
    ]
    acme = AccountItem(
        reference="acme", name="Acme", plan_code="essentials", current_period_end=None, csm_email=None, members=members
    )
    [result] = await provisioning.sync(house.installation, [acme])
    assert result.refusal is None


# ------------------------------------------------------------------------------------------------------ who is told


@pytest.mark.parametrize("who", [ALICE, BOB, CSM, SUPPORT, BILLING, GATEKEEPER])
async def test_is_for_members_staff_and_the_services_that_obey(house: Stage, who: str) -> None:
    async with watched(house, who):
        pass


@pytest.mark.parametrize("who", [GINA, HOST, "nobody@acme.example"])
async def test_is_for_nobody_else(house: Stage, who: str) -> None:
    with pytest.raises(errors.Forbidden):
        await next_of(follow(house, who, await house.account_key("acme")))


async def test_an_account_that_is_not_there_and_a_strangers_are_refused_alike(house: Stage) -> None:
    def refused(*ids: UUID | None) -> Any:
        return pytest.raises(errors.Forbidden), follow(house, ALICE, *ids)

    messages = set()
    for ids in [(await house.account_key("globex"),), (uuid4(),), (None,)]:
        expected, stream = refused(*ids)
        with expected as refusal:
            await next_of(stream)
        messages.add(refusal.value.message)
    assert len(messages) == 1


async def test_one_account_that_may_not_be_seen_ends_it_for_all(house: Stage) -> None:
    stream = follow(house, ALICE, await house.account_key("acme"), await house.account_key("globex"))
    async with aclosing(stream):
        assert await told(stream, 1) == [(ACTIVE, 0)]
        with pytest.raises(errors.Forbidden):
            await next_of(stream)


@pytest.mark.parametrize("who", [ALICE, BOB])
async def test_ends_for_members_when_the_account_is_canceled(house: Stage, who: str) -> None:
    async with watched(house, who) as stream:
        await house.request_cancellation()
        assert await told(stream, 1) == [(ACTIVE, 1)]
        await house.cancel()
        with pytest.raises(errors.AccessRemoved) as removed:
            await next_of(stream)
    assert removed.value.extensions["canceledAt"] is not None


async def test_ends_for_who_is_a_member_no_more(house: Stage, waits: asyncio.Event) -> None:
    async with watched(house, BOB) as stream:
        coming = await waiting(stream, waits)
        await sync_members(house, ALICE)
        with pytest.raises(errors.Forbidden):
            await coming


async def test_ends_for_a_member_whose_subject_becomes_a_services(house: Stage, waits: asyncio.Event) -> None:
    """Which is a member of nothing, and has not the scope to watch."""
    async with watched(house, ALICE) as stream:
        coming = await waiting(stream, waits)
        await provisioning.add_service(
            name="robot",
            scopes=frozenset({Scope.PROVISION}),
            issuer=DEVELOPMENT_ISSUER,
            subject=cast.subject(ALICE),
        )
        with pytest.raises(errors.Forbidden):
            await coming


async def test_ends_for_staff_who_have_left(house: Stage, waits: asyncio.Event) -> None:
    async with watched(house, SUPPORT) as stream:
        coming = await waiting(stream, waits)
        await provisioning.deactivate_staff(SUPPORT)
        with pytest.raises(errors.Forbidden):
            await coming


async def test_ends_for_a_service_that_was_deactivated(house: Stage, waits: asyncio.Event) -> None:
    async with watched(house, GATEKEEPER) as stream:
        coming = await waiting(stream, waits)
        await provisioning.deactivate_service(GATEKEEPER)
        with pytest.raises(errors.Forbidden):
            await coming


async def test_ends_when_a_scheduled_cancellation_takes_effect_without_anybody_saying_so(house: Stage) -> None:
    """The moment itself ends access; no worker runs here."""
    key = await house.account_key("acme")
    async with aclosing(follow(house, BOB, key)) as stream:
        assert await told(stream, 1) == [(ACTIVE, 0)]
        soon = await db.now() + timedelta(seconds=0.3)
        await db.execute(
            "UPDATE account SET status = 'CANCELLATION_SCHEDULED', cancellation_effective_at = $2 WHERE id = $1",
            key,
            soon,
        )
        house.installation.changes.hint_all()
        with pytest.raises(errors.AccessRemoved):
            await next_of(stream)


async def test_ends_when_the_clock_is_moved_past_a_scheduled_cancellation(house: Stage, waits: asyncio.Event) -> None:
    key = await house.account_key("acme")
    async with aclosing(follow(house, BOB, key)) as stream:
        await db.execute(
            "UPDATE account SET status = 'CANCELLATION_SCHEDULED', cancellation_effective_at = $2 WHERE id = $1",
            key,
            await db.now() + timedelta(days=3),
        )
        assert await told(stream, 1) == [(AccountStatus.CANCELLATION_SCHEDULED, 0)]
        coming = await waiting(stream, waits)
        await clock.advance(timedelta(days=4))
        with pytest.raises(errors.AccessRemoved):
            await coming


async def test_ends_when_the_token_expires(house: Stage) -> None:
    """Nothing happens to the account; nobody gives a hint."""
    token = house.token(SUPPORT, timedelta(seconds=1))

    async def authenticate() -> Call:
        return Call(identity=await house.installation.tokens.verify(token), installation=house.installation)

    async with aclosing(live.follow(authenticate, [await house.account_key("acme")], house.installation)) as stream:
        assert await told(stream, 1) == [(ACTIVE, 0)]
        with pytest.raises(errors.Unauthenticated):
            await next_of(stream)


async def test_ends_when_the_service_stops_and_cannot_begin_after(house: Stage, waits: asyncio.Event) -> None:
    async with watched(house, SUPPORT) as stream:
        coming = await waiting(stream, waits)
        house.installation.changes.end()
        with pytest.raises(errors.Unavailable, match="stopping"):
            await coming
    later = follow(house, SUPPORT, await house.account_key("acme"))
    with pytest.raises(errors.Unavailable, match="stopping"):
        await next_of(later)


@pytest.mark.postgres
async def test_a_stop_does_not_wait_for_a_database_that_does_not_answer(
    postgres_server: PostgresServer, tmp_path: Any, waits: asyncio.Event
) -> None:
    """However many would look at it, and wait for their turn."""
    if not postgres_server.can_restart:
        pytest.skip("the given server is not ours to pause")
    name = await postgres_server.create_database()
    database = await Database.open(postgres_server.url(name))
    try:
        with database.bind():
            async with cast.stage(database, tmp_path) as house, AsyncExitStack() as stack:
                patient = replace(house.installation, request_timeout=timedelta(hours=1))
                house = replace(house, installation=patient)  # noqa: PLW2901
                streams = [await stack.enter_async_context(watched(house, SUPPORT)) for _ in range(9)]
                looking = [await waiting(stream, waits) for stream in streams]
                postgres_server.pause()
                try:
                    patient.changes.hint_all()
                    while not patient.changes.turns.locked():  # noqa: ASYNC110  nobody tells
                        await asyncio.sleep(0)
                    patient.changes.end()
                    async with asyncio.timeout(LONG):
                        ended = await asyncio.gather(*looking, return_exceptions=True)
                finally:
                    postgres_server.resume()
                assert {str(one) for one in ended} == {"The service is stopping. Connect again in a moment."}
    finally:
        await database.close()
        await postgres_server.drop_database(name)


# -------------------------------------------------------------------------------------------- processes and databases


@pytest.mark.postgres
async def test_tells_what_another_process_has_done(postgres_house: Stage, waits: asyncio.Event) -> None:
    """Another `Database` stands for it: nothing but the server connects the two."""
    other = await Database.open(db.bound().url, pool_size=2)
    try:
        async with watched(postgres_house, SUPPORT) as stream:
            coming = await waiting(stream, waits, 2)
            with other.bind():
                await postgres_house.cancel()
            assert await coming == [(ACTIVE, 1), (CANCELED, 2)]
    finally:
        await other.close()


@pytest.mark.postgres
async def test_a_lost_connection_loses_no_change(postgres_house: Stage, waits: asyncio.Event) -> None:
    """What is announced while nobody listens is found when listening begins again."""
    async with watched(postgres_house, SUPPORT) as stream:
        coming = await waiting(stream, waits, 2)
        terminate = (
            "SELECT count(pg_terminate_backend(pid)) AS n FROM pg_stat_activity "
            "WHERE datname = current_database() AND query LIKE 'LISTEN %'"
        )
        async with asyncio.timeout(LONG):
            while await db.fetch(terminate) == [{"n": 0}]:  # it may be just beginning
                pass
        await postgres_house.cancel()
        assert await coming == [(ACTIVE, 1), (CANCELED, 2)]


@pytest.mark.postgres
async def test_a_restarted_database_ends_no_stream(
    postgres_server: PostgresServer, tmp_path: Any, waits: asyncio.Event
) -> None:
    if not postgres_server.can_restart:
        pytest.skip("the given server is not ours to restart")
    name = await postgres_server.create_database()
    database = await Database.open(postgres_server.url(name))
    try:
        with database.bind():
            async with cast.stage(database, tmp_path) as house, watched(house, SUPPORT) as stream:
                coming = await waiting(stream, waits, 2)
                await asyncio.to_thread(postgres_server.restart)
                await house.cancel()
                assert await coming == [(ACTIVE, 1), (CANCELED, 2)]
    finally:
        await database.close()
        await postgres_server.drop_database(name)


async def test_a_database_that_does_not_answer_is_asked_again(house: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Exception | None] = [errors.Unavailable("away"), errors.Unavailable("away"), None]
    monkeypatch.setattr(live, "_RETRY_SECONDS", 0.01)

    async def authenticate() -> Call:
        if answers and (failure := answers.pop(0)) is not None:
            raise failure
        return await house.call(SUPPORT)

    async with aclosing(live.follow(authenticate, [await house.account_key("acme")], house.installation)) as stream:
        assert await told(stream, 1) == [(ACTIVE, 0)]
    assert not answers


async def test_what_no_hint_told_of_is_seen_in_time(house: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody changes a row by hand, and tells nobody."""
    monkeypatch.setattr(live, "LOOK_AGAIN", timedelta(milliseconds=200))
    async with watched(house, BOB) as stream:
        await db.execute("DELETE FROM member WHERE email = $1", BOB)
        with pytest.raises(errors.Forbidden):
            await next_of(stream)


# ------------------------------------------------------------------------------------------------------------- hints


async def test_hints_are_kept_once_for_each_account(sqlite_database: Database) -> None:
    """However much happens while a reader is slow, what is kept for them grows no further."""
    ids: Sequence[UUID] = [uuid4(), uuid4()]
    changes = Changes()
    with changes.watch(ids) as watch:
        for _ in range(1_000):
            changes.hint(ids[0])
        assert await watch.wait(LONG) == {ids[0]}
        changes.hint_all()
        assert await watch.wait(LONG) == set(ids)
        assert await watch.wait(0) == set(ids)


async def test_a_large_batch_is_a_hint_about_its_accounts_and_about_no_other(house: Stage) -> None:
    """An import must not make everybody look at everything."""
    ids, other = [uuid4() for _ in range(450)], uuid4()
    with house.installation.changes.watch([ids[0], ids[-1], other]) as watch:
        await announce([other])
        await watch.wait(LONG)  # or the hint that listening has begun
        await announce(ids)
        hinted: set[UUID] = set()
        while not hinted >= {ids[0], ids[-1]}:
            hinted.update(await watch.wait(LONG))
    assert other not in hinted


async def test_nobody_is_remembered_who_has_left(house: Stage) -> None:
    changes = house.installation.changes
    async with watched(house, SUPPORT):
        assert len(changes) == 1
    assert len(changes) == 0


async def test_a_service_needs_the_scope(house: Stage) -> None:
    await provisioning.add_service(
        name="other",
        scopes=frozenset(set(Scope) - {Scope.GATE}),
        issuer=house.installation.member_issuer,
        subject="service:other",
    )
    with pytest.raises(errors.Forbidden):
        await next_of(follow(house, "other", await house.account_key("acme")))
