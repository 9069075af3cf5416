"""Who has obeyed: each system speaks for itself, about the cancellation that stands, and the late are told of once."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from email.message import EmailMessage
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from tortoise.connection import get_connection

from app import (
    alarms,
    db,
    deletion,
    enforcement,
    errors,
    ids,
    invariants,
    metrics,
    outbox,
    people,
    policy,
    provisioning,
    restart,
    timers,
)
from app.auth import ServiceFacts
from app.db import Database
from app.lifecycle import CancellationTiming, Scope
from tests.actions.test_races import canceled as cancel_one
from tests.actions.test_races import held, raced, together, waiting
from tests.api.test_deletions import text
from tests.cast import ALICE, BILLING, GATEKEEPER, SUPPORT, Stage
from tests.ending import DAY, HOUR, MOMENT, WINDOW, StoppedClock, count, log_in_memory
from tests.enforcing import LOGIN, MAILER, MINUTE, SYSTEMS, acknowledge, add_system, obeyed, shown, statuses

OPERATORS = policy.load().operators.email


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StoppedClock:
    return StoppedClock(monkeypatch)


@pytest.fixture
async def house(database: Database, tmp_path: Path) -> AsyncIterator[Stage]:
    async with obeyed(database, tmp_path) as running:
        yield running


@pytest.fixture
async def postgres_house(postgres_database: Database, tmp_path: Path) -> AsyncIterator[Stage]:
    async with obeyed(postgres_database, tmp_path) as running:
        yield running


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[timedelta]:
    """What the histogram is told."""
    found: list[timedelta] = []
    monkeypatch.setattr(metrics, "enforced", found.append)
    return found


async def restart_acme(house: Stage) -> None:
    done = await house.do(BILLING, "restartAccount", accountId=await house.account_id("acme"))
    assert done["__typename"] == "RestartAccountSuccess"


def instead(house: Stage, *systems: policy.EnforcingSystem) -> Stage:
    """The same installation with another policy, as after a restart of its processes."""
    changed = replace(house.installation.policy, enforcing_systems=systems)
    return replace(house, installation=replace(house.installation, policy=changed))


# ------------------------------------------------------------------------------------------------ acknowledgements


async def test_each_system_is_waited_for_from_the_cancellation_on_until_it_acknowledges(
    house: Stage, clock: StoppedClock
) -> None:
    assert await shown(house) == []
    await house.cancel()
    at = clock.now
    clock.forward(3 * MINUTE)
    done = await acknowledge(house, MAILER, 1)
    mailer = {
        "system": "mailer",
        "name": "Mail delivery",
        "epoch": 1,
        "status": "ENFORCED",
        "askedAt": text(at),
        "dueAt": text(at + 10 * MINUTE),
        "enforcedAt": text(at + 3 * MINUTE),
        "isLate": False,
    }
    assert done == {
        "__typename": "AcknowledgeEnforcementSuccess",
        "enforcement": mailer | {"account": None},
    }, "a service reads no accounts"
    login = mailer | {"system": "login", "name": "Sign-in", "status": "PENDING", "enforcedAt": None}
    login["dueAt"] = text(at + 30 * MINUTE)
    acme = {"account": {"name": "Acme"}}
    assert await shown(house) == [login | acme, mailer | acme]


async def test_the_first_time_stays(house: Stage, clock: StoppedClock) -> None:
    await house.cancel()
    first = await acknowledge(house, MAILER, 1)
    clock.forward(HOUR)
    assert await acknowledge(house, MAILER, 1) == first
    assert first["enforcement"]["enforcedAt"] == text(clock.now - HOUR)


async def test_what_is_late_is_still_accepted(house: Stage, clock: StoppedClock) -> None:
    await house.cancel()
    clock.forward(10 * MINUTE - MOMENT)
    assert await statuses(house) == {"login": "PENDING", "mailer": "PENDING"}
    clock.forward(MOMENT)
    assert await statuses(house) == {"login": "PENDING", "mailer": "LATE"}
    await acknowledge(house, MAILER, 1)
    clock.forward(HOUR)
    assert await statuses(house) == {"login": "LATE", "mailer": "ENFORCED"}


async def test_no_system_acknowledges_for_another(house: Stage) -> None:
    """Nor does anybody else: the name of the service is what it speaks for."""
    await house.cancel()
    await add_system("mailer-2")
    await add_system("sign-in", Scope.GATE, Scope.WEBHOOKS)
    for who in ("mailer-2", "sign-in", GATEKEEPER, BILLING, SUPPORT):
        refused = await acknowledge(house, who, 1)
        assert refused.keys() == {"__typename", "message"}
        assert refused["__typename"] == "PermissionDeniedError"
    removed = await acknowledge(house, ALICE, 1)
    assert removed["extensions"]["code"] == "ACCESS_REMOVED"
    assert await statuses(house) == {"login": "PENDING", "mailer": "PENDING"}
    await acknowledge(house, LOGIN, 1)
    assert await statuses(house) == {"login": "ENFORCED", "mailer": "PENDING"}


async def test_a_service_that_was_deactivated_or_lost_the_scope_speaks_for_nothing(house: Stage) -> None:
    await house.cancel()
    await db.execute("UPDATE service SET scopes = 'gate' WHERE name = 'login'")
    assert (await acknowledge(house, LOGIN, 1))["__typename"] == "PermissionDeniedError"
    await provisioning.deactivate_service(MAILER)
    assert (await acknowledge(house, MAILER, 1))["extensions"]["code"] == "FORBIDDEN"
    assert await statuses(house) == {"login": "PENDING", "mailer": "PENDING"}


async def test_only_the_cancellation_that_stands_is_acknowledged(house: Stage) -> None:
    """An answer to an earlier one, which comes late, says nothing of it. The refusal says where the account is."""

    async def answers(epoch: int) -> tuple[Any, ...]:
        answer = await acknowledge(house, MAILER, epoch)
        return tuple(answer.get(key) for key in ("__typename", "epoch", "accountStatus"))

    not_awaited, accepted = "EnforcementNotAwaitedError", ("AcknowledgeEnforcementSuccess", None, None)
    for epoch in (-1, 0, 1, 2_147_483_647):
        assert await answers(epoch) == (not_awaited, 0, "ACTIVE")
    await house.cancel()
    assert await answers(2) == (not_awaited, 1, "CANCELED")
    assert await answers(1) == accepted
    await restart_acme(house)
    for epoch in (0, 1, 2, 3):
        assert await answers(epoch) == (not_awaited, 2, "ACTIVE")
    assert await shown(house) == [], "nobody is waited for any more"
    await house.cancel()
    for epoch in (1, 2, 4):
        assert await answers(epoch) == (not_awaited, 3, "CANCELED")
    assert await statuses(house) == {"login": "PENDING", "mailer": "PENDING"}
    assert await answers(3) == accepted
    assert await statuses(house) == {"login": "PENDING", "mailer": "ENFORCED"}
    assert await count("enforcement", "lifted_at IS NOT NULL AND enforced_at IS NOT NULL") == 1, "what was is known"
    assert await invariants.check() == []


@pytest.mark.parametrize("account", ["nowhere", "", "A" * 23])
async def test_an_account_that_does_not_exist_is_not_found(house: Stage, account: str) -> None:
    refused = await house.do(MAILER, "acknowledgeEnforcement", accountId=account, epoch=1)
    assert refused["__typename"] == "NotFoundError"


async def test_a_scheduled_cancellation_is_acknowledged_when_it_takes_effect(
    database: Database, tmp_path: Path, clock: StoppedClock, measured: list[timedelta]
) -> None:
    """And measured from then on: until then everything works, and there is nothing to obey."""
    plans = policy.load().plans
    later = replace(plans["essentials"], effective=CancellationTiming.PERIOD_END)
    async with obeyed(database, tmp_path, plans={**plans, "essentials": later}) as house:
        await db.execute("UPDATE account SET current_period_end = $1", clock.now + DAY)
        assert (await house.cancel())["account"]["status"] == "CANCELLATION_SCHEDULED"
        assert await shown(house) == []
        refused = await acknowledge(house, MAILER, 1)
        assert (refused["epoch"], refused["accountStatus"]) == (0, "CANCELLATION_SCHEDULED")
        clock.forward(DAY + 2 * MINUTE)
        await house.timers().run()
        assert [one["askedAt"] for one in await shown(house)] == [text(clock.now)] * 2
        clock.forward(MINUTE)
        for system in (MAILER, LOGIN):
            await acknowledge(house, system, 1)
        assert measured == [MINUTE]


async def test_a_cancellation_and_whom_it_waits_for_are_one(house: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails after it was written down takes it back."""
    write = people.write

    async def fail(*args: Any, **named: Any) -> None:
        await write(*args, **named)
        raise ZeroDivisionError

    monkeypatch.setattr(people, "write", fail)
    assert (await house.cancel())["extensions"]["code"] == "INTERNAL_SERVER_ERROR"
    assert await count("enforcement") == 0


async def test_while_and_after_its_data_is_deleted_an_account_is_acknowledged(
    house: Stage, clock: StoppedClock
) -> None:
    await house.cancel()
    account_id, key = await house.account_key("acme"), await house.account_id("acme")
    await house.letters()

    async def acknowledged(who: str) -> str:
        answer = await house.do(who, "acknowledgeEnforcement", accountId=key, epoch=1)
        return str(answer["__typename"])

    clock.forward(WINDOW)
    assert await deletion.begin(house.installation, [account_id]) == [account_id]
    assert await acknowledged(MAILER) == "AcknowledgeEnforcementSuccess"
    for _ in range(2):
        await house.letters()
        clock.forward(MINUTE)
    assert await count("account", "status = 'DELETED'") == 1
    late = {one.system: one.late for one in await enforcement.waiting(house.installation.policy)}
    assert late == {"mailer": 0, "login": 1}, "who has not obeyed is late, whatever became of the account"
    assert await acknowledged(LOGIN) == "AcknowledgeEnforcementSuccess"
    (login, mailer) = (await enforcement.of([account_id]))[account_id]
    assert (login.enforced_at, mailer.enforced_at) == (clock.now, clock.now - 2 * MINUTE)
    assert await invariants.check() == []


# ------------------------------------------------------------------------------------------------ another policy


async def test_a_system_that_is_named_later_is_not_asked_for_what_has_been(house: Stage) -> None:
    await house.cancel()
    await add_system("search")
    search = policy.EnforcingSystem(code="search", name="Search", within=MINUTE)
    facts = ServiceFacts(id=db.uuid7(), name="search", scopes=frozenset({Scope.ENFORCEMENT}))
    named = instead(house, *SYSTEMS, search).installation.policy
    with pytest.raises(errors.EnforcementNotAwaited, match="before 'search' was named") as refused:
        await enforcement.acknowledge(named, facts, await house.account_key("acme"), 1)
    assert (refused.value.epoch, refused.value.account_status) == (1, "CANCELED")
    assert set(await statuses(house)) == {"login", "mailer"}


async def test_a_system_that_is_no_longer_named_is_not_late_and_may_acknowledge(
    house: Stage, clock: StoppedClock
) -> None:
    await house.cancel()
    account_id = await house.account_key("acme")
    clock.forward(HOUR)
    without = instead(house, SYSTEMS[1])
    shared, (login, mailer) = without.installation, (await enforcement.of([account_id]))[account_id]
    assert (login.is_late(shared.policy, clock.now), mailer.is_late(shared.policy, clock.now)) == (True, False)
    assert [(one.system, one.late) for one in await enforcement.waiting(shared.policy)] == [("login", 1)]
    late = await enforcement.page(shared.policy, enforcement.Status, now=clock.now, late=True, limit=9)
    others = await enforcement.page(shared.policy, enforcement.Status, now=clock.now, late=False, limit=9)
    assert ([one.system for one in late], [one.system for one in others]) == (["login"], ["mailer"])
    assert enforcement.name_of("mailer", shared.policy) == "mailer"
    assert await without.timers().run() == 1
    (letter,) = [one for one in await without.letters() if one["To"].addresses[0].addr_spec == OPERATORS]
    assert systems_in(letter) == ["Sign-in (login): 1 waiting, 1 new"]
    facts = ServiceFacts(id=db.uuid7(), name=MAILER, scopes=frozenset({Scope.ENFORCEMENT}))
    assert (await enforcement.acknowledge(shared.policy, facts, account_id, 1)).enforced_at == clock.now


async def test_without_systems_nothing_is_late_or_told(house: Stage, clock: StoppedClock) -> None:
    await house.cancel()
    clock.forward(HOUR)
    nobody = instead(house)
    assert await enforcement.waiting(nobody.installation.policy) == []
    assert (
        await enforcement.page(nobody.installation.policy, enforcement.Status, now=clock.now, late=True, limit=9) == []
    )
    assert await nobody.timers().run() == 1, "they are noted, so that nothing looks at them again"
    assert await nobody.timers().run() == 0
    assert await to_operators(nobody) == []


# ----------------------------------------------------------------------------------------------- the last of them


async def test_the_last_acknowledgement_is_measured_from_the_cancellation_on(
    house: Stage, clock: StoppedClock, measured: list[timedelta]
) -> None:
    await house.cancel()
    clock.forward(2 * MINUTE)
    await acknowledge(house, LOGIN, 1)
    assert measured == []
    clock.forward(3 * MINUTE)
    await acknowledge(house, MAILER, 1)
    assert measured == [5 * MINUTE]
    clock.forward(MINUTE)
    await acknowledge(house, MAILER, 1)
    assert measured == [5 * MINUTE], "a repetition is no acknowledgement"
    await restart_acme(house)
    await house.cancel()
    await acknowledge(house, MAILER, 3)
    assert measured == [5 * MINUTE], "of this cancellation one is still waited for"


async def test_who_is_no_longer_named_neither_delays_the_last_acknowledgement_nor_gives_it(
    house: Stage, clock: StoppedClock, measured: list[timedelta]
) -> None:
    await house.cancel()
    without = instead(house, SYSTEMS[1])
    account_id = await house.account_key("acme")
    clock.forward(2 * MINUTE)
    await speak(without, LOGIN, account_id)
    assert measured == [2 * MINUTE]
    clock.forward(MINUTE)
    await speak(without, MAILER, account_id)
    assert measured == [2 * MINUTE]


# ------------------------------------------------------------------------------------------------ a clock set back


@pytest.mark.parametrize("after", [timedelta(), MINUTE])
async def test_a_clock_that_was_set_back_refuses_no_acknowledgement_and_no_restart(
    house: Stage, clock: StoppedClock, measured: list[timedelta], after: timedelta
) -> None:
    """As after a failover to a server whose clock is behind."""
    await house.cancel()
    canceled_at = clock.now
    clock.forward(after)
    if after:
        await acknowledge(house, LOGIN, 1)
    clock.forward(-5 * MINUTE)
    done = await acknowledge(house, MAILER, 1)
    assert done["enforcement"]["enforcedAt"] == text(canceled_at)
    assert measured == ([timedelta()] if after else [])
    await restart_acme(house)
    lifted = {row["system"]: db.as_datetime(row["lifted_at"]) for row in await db.fetch("SELECT * FROM enforcement")}
    assert lifted == {"mailer": canceled_at, "login": canceled_at + after}


# --------------------------------------------------------------------------------------------------------- letters


def said(letter: EmailMessage) -> str:
    body = letter.get_body(("plain",))
    assert isinstance(body, EmailMessage)
    return " ".join(body.get_content().split())


def systems_in(letter: EmailMessage) -> list[str]:
    """The systems that a letter names, with how many accounts wait for each and of how many it tells first."""
    found = re.findall(
        r"- ([\w-]+(?: \w+)* \(\w+\)): accounts waiting: (\d+), since [^;]+; new in this email: (\d+)", said(letter)
    )
    return [f"{system}: {late} waiting, {news} new" for system, late, news in found]


def accounts_in(letter: EmailMessage) -> list[str]:
    """The accounts that a letter lists, system by system, with their epochs."""
    return re.findall(r"- (\S{23}, epoch \d+)", said(letter))


async def to_operators(house: Stage) -> list[EmailMessage]:
    return [one for one in await house.letters() if one["To"].addresses[0].addr_spec == OPERATORS]


async def report_due(house: Stage) -> int:
    """What a round would still find."""
    (report,) = [one for one in await timers.backlog(house.installation.policy) if one.name == "report_enforcement"]
    return report.due


async def test_the_operators_are_told_when_a_system_is_late_and_not_before(house: Stage, clock: StoppedClock) -> None:
    """Once, however many workers go their rounds."""
    await house.cancel()
    at = clock.now
    assert await to_operators(house) == []
    clock.forward(10 * MINUTE - MOMENT)
    assert await to_operators(house) == []
    clock.forward(MOMENT)
    with log_in_memory() as log:
        for _ in range(3):
            await house.timers().run()
            (letter,) = await to_operators(house)
    assert log.getvalue().count("enforcement.late") == 1
    assert letter["Subject"] == "Cancellations are not obeyed in time by Mail delivery"
    assert systems_in(letter) == ["Mail delivery (mailer): 1 waiting, 1 new"]
    assert f"since {at:%B} {at.day}, {at + 10 * MINUTE:%Y, %H:%M} UTC" in said(letter)
    assert accounts_in(letter) == [f"{await house.account_id('acme')}, epoch 1"]
    assert "sunset enforcement list --late" in said(letter)
    for told in (said(letter), log.getvalue()):
        assert "acme" not in told.lower(), "what the account is called is erased with it, and the letter is not"


async def test_a_mass_cancellation_is_one_letter_and_then_one_an_hour(house: Stage, clock: StoppedClock) -> None:
    """Whatever becomes late meanwhile is told of in the next one. What waits for it keeps no worker busy, and is
    not overdue."""
    accounts = await raced(house, 120)
    for account_id in accounts[:115]:
        await cancel_one(house, account_id)
    clock.forward(10 * MINUTE)
    (first,) = await to_operators(house)
    assert systems_in(first) == ["Mail delivery (mailer): 115 waiting, 115 new"]
    assert len(accounts_in(first)) == 10
    assert "and 105 more" in said(first)

    for account_id in accounts[115:]:
        await cancel_one(house, account_id)
    clock.forward(HOUR - MINUTE)
    assert await house.timers().run() == 0
    assert await report_due(house) == 0
    assert await house.timers().next_due() == MINUTE
    clock.forward(MINUTE - MOMENT)
    assert len(await to_operators(house)) == 1
    clock.forward(MOMENT)
    first, second = await to_operators(house)
    assert systems_in(second) == [
        "Mail delivery (mailer): 120 waiting, 5 new",
        "Sign-in (login): 120 waiting, 120 new",
    ]
    assert {one[:23] for one in accounts_in(second)[:5]} == {
        ids.encode(ids.Kind.ACCOUNT, account_id) for account_id in accounts[115:]
    }
    assert await report_due(house) == 0
    clock.forward(DAY)
    assert len(await to_operators(house)) == 2, "there is nothing new"
    assert [one.name for one in await alarms.current(house.installation)] == [alarms.Name.ENFORCEMENT_LATE]
    assert await invariants.check() == []


async def test_who_obeys_before_the_next_letter_is_not_in_it(house: Stage, clock: StoppedClock) -> None:
    await house.cancel()
    clock.forward(10 * MINUTE)
    assert len(await to_operators(house)) == 1
    clock.forward(20 * MINUTE)
    await house.timers().run()
    await acknowledge(house, LOGIN, 1)
    clock.forward(DAY)
    assert len(await to_operators(house)) == 1


async def test_a_letter_that_cannot_be_promised_marks_nothing_and_is_tried_again(
    house: Stage, clock: StoppedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of it, with all of its accounts, and by who has not just failed with it."""
    for account_id in await raced(house, 3):
        await cancel_one(house, account_id)
    clock.forward(10 * MINUTE)
    tried = []

    async def fail(*_: Any, **__: Any) -> None:
        tried.append(clock.now)
        raise ZeroDivisionError

    worker = house.timers()
    with monkeypatch.context() as broken, log_in_memory() as log:
        broken.setattr(outbox, "put", fail)
        assert [await worker.run(), await worker.run()] == [0, 0]
    assert len(tried) == 1
    assert log.getvalue().count("timer.failed") == 1
    assert await report_due(house) == 3
    assert await worker.run() == 0, "it rests"
    (letter,) = await to_operators(house)
    assert systems_in(letter) == ["Mail delivery (mailer): 3 waiting, 3 new"]


async def test_those_that_are_late_together_are_told_of_in_one_letter(house: Stage, clock: StoppedClock) -> None:
    await house.cancel()
    clock.forward(HOUR)
    (letter,) = await to_operators(house)
    assert systems_in(letter) == ["Mail delivery (mailer): 1 waiting, 1 new", "Sign-in (login): 1 waiting, 1 new"]


async def test_who_has_obeyed_is_not_told_of(house: Stage, clock: StoppedClock) -> None:
    await house.cancel()
    await acknowledge(house, MAILER, 1)
    clock.forward(HOUR)
    (letter,) = await to_operators(house)
    assert systems_in(letter) == ["Sign-in (login): 1 waiting, 1 new"]


@pytest.mark.parametrize("before", [MINUTE, 9 * MINUTE])
async def test_a_restart_in_time_sends_no_letter(house: Stage, clock: StoppedClock, before: timedelta) -> None:
    await house.cancel()
    clock.forward(before)
    await restart_acme(house)
    clock.forward(DAY)
    assert await report_due(house) == 0, "no round looks at it again"
    assert await to_operators(house) == []
    assert [one.late + one.pending for one in await enforcement.waiting(house.installation.policy)] == [0, 0]


async def test_each_cancellation_of_an_account_is_told_of(house: Stage, clock: StoppedClock) -> None:
    for letters in (1, 2):
        await house.cancel()
        clock.forward(HOUR)
        assert len(await to_operators(house)) == letters
        await restart_acme(house)


async def test_a_round_that_comes_after_the_data_is_gone_writes_nothing_about_it(
    house: Stage, clock: StoppedClock
) -> None:
    await house.cancel()
    account_id = await house.account_key("acme")
    await house.letters()
    clock.forward(WINDOW)
    assert await deletion.begin(house.installation, [account_id]) == [account_id]

    async def keep(_: Any) -> None: ...

    assert await deletion.erase(house.installation, keep, account_id)
    assert await enforcement.report(house.installation) == {account_id}
    assert await enforcement.report(house.installation) == set()
    assert await count("outbox", "template = 'enforcement-late'") == 0
    assert await invariants.check() == []


# ------------------------------------------------------------------------------------------ at the same time


@pytest.mark.postgres
async def test_of_acknowledgements_at_the_same_time_exactly_one_is_the_last(
    postgres_house: Stage, measured: list[timedelta]
) -> None:
    accounts = await raced(postgres_house)
    for account_id in accounts:
        await cancel_one(postgres_house, account_id)
    answers = await together(
        *(speak(postgres_house, system, account_id) for account_id in accounts for system in (MAILER, LOGIN, MAILER))
    )
    assert all(isinstance(one, enforcement.EnforcementView) for one in answers)
    assert await count("enforcement", "enforced_at IS NOT NULL") == 2 * len(accounts)
    assert len(measured) == len(accounts)


async def speak(house: Stage, system: str, account_id: UUID, epoch: int = 1) -> enforcement.EnforcementView:
    row = await db.fetch_one("SELECT id FROM service WHERE name = $1", system)
    assert row is not None
    facts = ServiceFacts(id=db.as_uuid(row["id"]), name=system, scopes=frozenset({Scope.ENFORCEMENT}))
    return await enforcement.acknowledge(house.installation.policy, facts, account_id, epoch)


@pytest.mark.postgres
async def test_an_acknowledgement_that_waited_for_a_restart_is_told_of_it(postgres_house: Stage) -> None:
    """And not written down for what is over."""
    (account_id,) = await raced(postgres_house, 1)
    await cancel_one(postgres_house, account_id)
    async with held(account_id) as other:
        late = asyncio.create_task(speak(postgres_house, MAILER, account_id))
        await waiting()
        await other.execute("UPDATE enforcement SET lifted_at = clock_timestamp() WHERE account_id = $1", account_id)
        await other.execute(
            "UPDATE account SET status = 'ACTIVE', epoch = 2, canceled_at = NULL, restartable_until = NULL, "
            "deletion_scheduled_for = NULL, reminder_due_at = NULL WHERE id = $1",
            account_id,
        )
    with pytest.raises(errors.EnforcementNotAwaited) as refused:
        await late
    assert (refused.value.epoch, refused.value.account_status) == (2, "ACTIVE")
    assert await count("enforcement", "enforced_at IS NOT NULL") == 0


@pytest.mark.postgres
async def test_of_restarts_and_acknowledgements_each_has_an_order(postgres_house: Stage) -> None:
    accounts = await raced(postgres_house, 20)
    billing = await postgres_house.call(BILLING)
    for account_id in accounts:
        await cancel_one(postgres_house, account_id)
    for number, account_id in enumerate(accounts):
        actions = [restart.restart(billing, account_id), speak(postgres_house, MAILER, account_id)]
        first = number % 2
        answers = await together(actions[first], actions[1 - first])
        answer = answers[1 - first]
        row = await db.fetch_one(
            "SELECT enforced_at, lifted_at FROM enforcement WHERE account_id = $1 AND system = $2", account_id, MAILER
        )
        assert row is not None
        assert row["lifted_at"] is not None
        assert (row["enforced_at"] is None) is isinstance(answer, errors.EnforcementNotAwaited)
    assert await invariants.check() == []


@pytest.mark.postgres
async def test_of_workers_at_the_same_time_one_writes_the_letter(postgres_house: Stage) -> None:
    accounts = await raced(postgres_house)
    for account_id in accounts:
        await cancel_one(postgres_house, account_id)
    await db.advance_clock(HOUR)
    assert sum(await together(*(postgres_house.timers().run() for _ in range(4)))) == len(accounts)
    (letter,) = await to_operators(postgres_house)
    many = f"{len(accounts)} waiting, {len(accounts)} new"
    assert systems_in(letter) == [f"Mail delivery (mailer): {many}", f"Sign-in (login): {many}"]


@pytest.mark.postgres
async def test_a_letter_that_another_worker_is_writing_is_waited_for(postgres_house: Stage) -> None:
    """And what it does not tell of is left for an hour, as what becomes late after it."""
    (account_id,) = await raced(postgres_house, 1)
    await cancel_one(postgres_house, account_id)
    await db.advance_clock(HOUR)
    async with held(account_id) as other:
        await other.execute("SELECT pg_advisory_xact_lock(hashtextextended('enforcement', 0))")
        await other.execute(
            "UPDATE enforcement SET report_at = NULL, reported_at = $1 WHERE system = 'mailer'", await db.now()
        )
        second = asyncio.create_task(enforcement.report(postgres_house.installation))
        await waiting()
    assert await second == set()
    assert await report_due(postgres_house) == 0
    assert await count("outbox", "template = 'enforcement-late'") == 0


@pytest.mark.postgres
async def test_a_letter_waits_for_nobody_and_who_is_passed_over_is_in_the_next(postgres_house: Stage) -> None:
    """Somebody has the rows of one account: a restart, which takes several of them, one after the other."""
    accounts = await raced(postgres_house, 2)
    busy = accounts[0]
    for account_id in accounts:
        await cancel_one(postgres_house, account_id)
    await db.advance_clock(HOUR)
    client: Any = get_connection("postgresql")
    other = await client.connect()
    try:
        await other.execute("BEGIN")
        await other.execute("SELECT id FROM enforcement WHERE account_id = $1 AND system = $2 FOR UPDATE", busy, LOGIN)
        (letter,) = await to_operators(postgres_house)
        assert systems_in(letter) == [
            "Mail delivery (mailer): 2 waiting, 2 new",
            "Sign-in (login): 2 waiting, 1 new",
        ]
    finally:
        await other.close()
    await postgres_house.timers().run()
    assert await report_due(postgres_house) == 0
    await db.advance_clock(HOUR)
    _, second = await to_operators(postgres_house)
    assert accounts_in(second) == [f"{ids.encode(ids.Kind.ACCOUNT, busy)}, epoch 1"]
