"""The rules of the lifecycle asked of every row: a healthy installation breaks none, and no broken row is missed."""

from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app import db, endpoints, invariants, policy, restores
from app.db import Database
from app.lifecycle import CancellationTiming, TransitionType
from app.models import CancellationRequest, DeletionHold, Transition
from tests.api.test_story import links
from tests.cast import ALICE, BILLING, CSM, GINA, HOST, Stage
from tests.db.test_schema import ATTEMPTS, MIGRATIONS, WORLD
from tests.delivery.webhook_server import receiving
from tests.enforcing import MAILER, acknowledge, obeyed

INGRID, UMA = "ingrid@initech.example", "uma@umbrella.example"
HANA, WILMA = "hana@hooli.example", "wilma@wayne.example"

NEW = "'00000000-0000-7000-8000-000000000099'"
FAR = "'2999-01-01 00:00:00.000000+00:00'"
LONG_AGO = "'2000-01-01 00:00:00.000000+00:00'"

# ---------------------------------------------------------------------------------------------------- the story


async def tell_the_story(house: Stage) -> None:
    """Everything that can happen to an account has happened to one, and each status is some account's."""
    await new_customers(house)

    # Umbrella goes all the way: assisted, with feedback and a hold that is released, until nothing is left.
    await cancel_with_help(house, UMA, "umbrella", "Umbrella")
    umbrella = await house.account_id("umbrella")
    await house.do(BILLING, "holdDeletion", accountId=umbrella, note="A question of law.")
    await house.do(BILLING, "releaseDeletion", accountId=umbrella, note="Answered.")
    await house.letters()
    await db.advance_clock(timedelta(days=75))
    await house.letters()

    # Acme is restarted after a reminder, and canceled again; its deletion is on hold.
    await house.cancel()
    await acknowledge(house, MAILER, 1)
    (link,) = [
        links(one) for one in await house.letters() if "Acme" in one["Subject"] and one["To"] and ALICE in one["To"]
    ]
    await house.client.post("/links/restart", data={"token": link["restart"], "note": "We miss it"})
    await house.client.post("/links/feedback", data={"token": link["feedback"], "reason": "UNUSED"})
    await db.advance_clock(timedelta(days=31))
    await house.letters()
    acme = await house.account_id("acme")
    await house.do(BILLING, "holdDeletion", accountId=acme, note="They think about it.")
    await house.do(BILLING, "restartAccount", accountId=acme, idempotencyKey="once")
    await house.cancel()
    await house.do(BILLING, "holdDeletion", accountId=acme, note="Again.")

    # Hooli hesitates: withdrawn, saved by an offer, too late, and once more.
    hooli = await house.account_id("hooli")
    await house.request_cancellation(HANA, "hooli")
    await house.do(HANA, "withdrawCancellation", accountId=hooli)
    asked = await house.request_cancellation(HANA, "hooli", reason="UNUSED")
    declined, accepted, *_ = asked["request"]["offers"]
    await house.do(HANA, "declineOffer", offerId=declined["id"])
    await house.do(HANA, "acceptOffer", offerId=accepted["id"])
    await house.request_cancellation(HANA, "hooli")
    await db.advance_clock(timedelta(days=4))
    await house.letters()

    # Globex's deletion has begun, and waits for the emails about it.
    await cancel_with_help(house, GINA, "globex", "Globex")
    await db.advance_clock(timedelta(days=61))
    await house.timers().run()

    # Wayne is canceled and was reminded once; initech's cancellation is scheduled; hooli has asked again.
    await house.cancel(WILMA, "wayne", "Wayne")
    await db.advance_clock(timedelta(days=31))
    await house.timers().run()
    later = (await db.now() + timedelta(days=9)).isoformat()
    await sync(house, reference="initech", name="Initech", planCode="startup", currentPeriodEnd=later)
    await house.cancel(INGRID, "initech", "Initech")
    asked = await house.request_cancellation(HANA, "hooli")
    await house.do(HANA, "submitFeedback", requestId=asked["request"]["id"], reason="OTHER", comment="Hm.")


async def restore(house: Stage) -> None:
    """The database was restored, it is said, and everybody is notified."""
    await restores.declare(house.installation, as_of=await db.now())
    while await restores.restate(house.installation):
        pass


async def sync(house: Stage, **account: Any) -> None:
    done = await house.do(
        HOST, "syncAccounts", "... on SyncAccountsSuccess { results { outcome } }", accounts=[account]
    )
    assert done["results"][0]["outcome"] != "REFUSED"


async def new_customers(house: Stage) -> None:
    for reference, admin in (("hooli", HANA), ("wayne", WILMA)):
        member = {"subject": f"member:{admin}", "email": admin, "name": "Somebody", "role": "ADMIN"}
        await sync(house, reference=reference, name=reference.title(), planCode="essentials", members=[member])


async def cancel_with_help(house: Stage, admin: str, reference: str, name: str) -> None:
    asked = await house.request_cancellation(admin, reference)
    assert asked["__typename"] == "CancellationAssistanceRequested"
    await house.request_cancellation(CSM, reference, note="She is sure.")
    done = await house.cancel(admin, reference, name)
    assert done["account"]["status"] == "CANCELED"


@pytest.fixture
async def installation(database: Database, tmp_path: Path) -> AsyncIterator[Stage]:
    """After the story. Initech's plan is canceled at the end of the paid period; two systems obey, or do not."""
    shipped = policy.load().plans
    plans = {**shipped, "startup": replace(shipped["startup"], effective=CancellationTiming.PERIOD_END)}
    async with obeyed(database, tmp_path, plans=plans) as house, receiving() as receiver:
        await endpoints.create(
            None, house.installation.receivers, url=receiver.url, description="Hears it.", event_types=None
        )
        await tell_the_story(house)
        await restore(house)
        yield house


# ------------------------------------------------------------------------------------------- what is broken by hand


def of(reference: str) -> str:
    return f"(SELECT id FROM account WHERE reference = '{reference}')"


DELETING = "(SELECT id FROM account WHERE status = 'DELETING')"
DELETED = "(SELECT id FROM account WHERE status = 'DELETED')"
_OPEN = "delivered_at IS NULL AND dead_at IS NULL AND dropped_at IS NULL"


def copied(model: Any, condition: str, **changes: str) -> str:
    """One row of the table once more, with another id and other changes."""
    columns = [*model._meta.fields_db_projection.values(), *(f"{field}_id" for field in model._meta.fk_fields)]
    columns = list(dict.fromkeys(columns))
    values = [{"id": NEW, **changes}.get(column, column) for column in columns]
    table = model._meta.db_table
    found = f"SELECT {', '.join(values)} FROM {table} WHERE {condition} LIMIT 1"
    return f"INSERT INTO {table} ({', '.join(columns)}) {found}"


def account(changes: str, condition: str) -> str:
    return f"UPDATE account SET {changes} WHERE {condition}"


def request(changes: str, condition: str) -> str:
    return f"UPDATE cancellation_request SET {changes} WHERE {condition}"


def transition(changes: str, condition: str) -> str:
    return f"UPDATE transition SET {changes} WHERE {condition}"


def message(changes: str, condition: str) -> str:
    return f"UPDATE outbox SET {changes} WHERE {condition}"


def moved(table: str, where: str, condition: str = "1 = 1") -> str:
    """One row that belongs to another account now."""
    one = f"(SELECT x.id FROM {table} x WHERE {condition} LIMIT 1)"
    return f"UPDATE {table} SET account_id = {where} WHERE id = {one}"


BROKEN: dict[str, list[str]] = {
    "one_open_request": [
        copied(CancellationRequest, "status = 'PENDING_CONFIRMATION'"),
        moved("cancellation_request", of("wayne"), "x.status = 'PENDING_CONFIRMATION'"),
    ],
    "confirmed_request_of_a_scheduled_cancellation": [
        request("status = 'WITHDRAWN', closed_at = confirmed_at", "status = 'CONFIRMED'"),
        account("status = 'ACTIVE', cancellation_effective_at = NULL", "status = 'CANCELLATION_SCHEDULED'"),
        copied(CancellationRequest, "status = 'CONFIRMED'"),
    ],
    "effective_request_of_a_canceled_account": [
        request(
            "status = 'REVERTED', closed_at = took_effect_at", f"status = 'EFFECTIVE' AND account_id = {of('acme')}"
        ),
        copied(CancellationRequest, "status = 'EFFECTIVE'"),
        request("status = 'EFFECTIVE', closed_at = NULL", "status = 'REVERTED'"),
    ],
    "scheduled_for_the_time_that_was_confirmed": [
        account("cancellation_effective_at = created_at", "status = 'CANCELLATION_SCHEDULED'")
    ],
    "canceled_when_the_request_took_effect": [account(f"canceled_at = {LONG_AGO}", "reference = 'wayne'")],
    "one_effect_of_a_request": [copied(Transition, "type = 'account.canceled'", sequence="99")],
    "history_without_gaps": [
        f"DELETE FROM transition WHERE account_id = {of('acme')} AND sequence = 2",
        f"DELETE FROM transition WHERE account_id = {of('acme')}",
        transition("sequence = 1", f"account_id = {of('acme')} AND sequence = 2"),
        transition("sequence = sequence + 1", f"account_id = {of('wayne')}"),
        account("last_sequence = last_sequence + 1", "reference = 'hooli'"),
        copied(Transition, f"account_id = {of('wayne')} AND sequence = 1", sequence="99"),
    ],
    "history_ends_where_the_account_is": [
        account("epoch = epoch + 1", "reference = 'hooli'"),
        account("status = 'DELETING', deletion_started_at = deletion_scheduled_for", "reference = 'wayne'"),
    ],
    "history_goes_along_the_arrows": [
        transition("account_status = 'DELETED'", f"account_id = {of('acme')} AND sequence = 1"),
        transition("account_status = 'ACTIVE'", "type = 'account.deletion_started'"),
    ],
    "history_says_what_its_transitions_do": [
        transition("type = 'account.deleted'", f"account_id = {of('acme')} AND sequence = 1")
    ],
    "history_counts_epochs": [
        transition("epoch = 0", "type = 'account.restarted'"),
        transition("epoch = epoch + 1", f"account_id = {of('hooli')} AND sequence = 2"),
        transition("epoch = epoch - 2 * 1000000", "type = 'account.status'"),
    ],
    "history_tells_of_every_request": [
        transition("type = 'account.offer_declined'", "type = 'account.cancellation_requested'")
    ],
    "history_tells_of_every_effect": [
        transition("type = 'account.restart_requested'", "type = 'account.canceled'"),
        transition("type = 'account.canceled'", "type = 'account.offer_declined'"),
    ],
    "history_tells_of_every_end": [
        transition("type = 'account.offer_declined'", f"type = 'account.{ended}'")
        for ended in ("cancellation_withdrawn", "cancellation_expired", "offer_accepted", "restarted")
    ],
    "transition_of_the_accounts_own_request": [
        transition(f"request_id = {NEW}", f"account_id = {of('acme')} AND sequence = 1")
    ],
    **{
        f"{table}_of_the_accounts_own_request": [moved(table, of("wayne"))]
        for table in ("feedback", "offer", "restart_request")
    },
    "deletion_not_before_its_date": [account(f"deletion_scheduled_for = {FAR}", "status = 'DELETING'")],
    "held_by_an_open_hold": [
        "UPDATE deletion_hold SET released_at = held_at WHERE released_at IS NULL",
        account("deletion_held_at = NULL, deletion_scheduled_for = restartable_until", "reference = 'acme'"),
        copied(DeletionHold, "released_at IS NULL"),
    ],
    "reminders_of_a_canceled_account": [moved("deletion_reminder", of("hooli"))],
    "steps_of_a_begun_deletion": [
        moved("deletion_step", of("hooli")),
        f"UPDATE deletion_step SET epoch = epoch + 1 WHERE account_id = {DELETING}",
    ],
    "own_step_of_a_begun_deletion": [
        f"UPDATE deletion_step SET completed_at = created_at WHERE account_id = {DELETING}",
        f"UPDATE deletion_step SET system = 'billing' WHERE account_id = {DELETING}",
    ],
    "deleted_with_every_step_done": [
        f"UPDATE deletion_step SET completed_at = NULL WHERE account_id = {DELETED}",
        f"DELETE FROM deletion_step WHERE account_id = {DELETED}",
    ],
    "tombstone_of_a_deleted_account": ["DELETE FROM tombstone", moved("tombstone", of("hooli"))],
    "tombstone_tells_the_accounts_dates": [
        f"UPDATE tombstone SET {date} = {LONG_AGO}" for date in ("canceled_at", "deletion_started_at", "deleted_at")
    ],
    "deleted_account_without_personal_data": [
        account(change, "status = 'DELETED'")
        for change in (
            "name = 'Umbrella'",
            "reference = 'umbrella'",
            "reference = 'deleted:umbrella'",
            "current_period_end = deleted_at",
            "csm_id = (SELECT id FROM staff LIMIT 1)",
        )
    ],
    "deleted_account_without_notes_on_requests": [
        request("staff_note = 'She said'", f"account_id = {DELETED}"),
        request("confirmation_token_hash = 'hash', confirmation_expires_at = requested_at", f"account_id = {DELETED}"),
    ],
    "deleted_account_without_notes_on_holds": [
        f"UPDATE deletion_hold SET {note} = 'They said' WHERE account_id = {DELETED}"
        for note in ("note", "release_note")
    ],
    **{
        f"deleted_account_without_{table}": [moved(table, DELETED)]
        for table in ("member", "feedback", "offer", "restart_request", "idempotency_record")
    },
    "deleted_account_without_webhook_delivery": [moved("webhook_delivery", DELETED, "x.type <> 'account.deleted'")],
    "deleted_account_without_outbox": [moved("outbox", DELETED, "x.template <> 'account-deleted'")],
    "one_message_of_a_message_id": [message("message_id = '<same@vendor.example>'", "1 = 1")],
    "message_of_a_known_kind": [message("template = 'a-newer-one'", _OPEN)],
    "message_given_up_after_its_last_try": [
        message("attempts = 30", _OPEN),
        message(f"attempts = 30, lease = {NEW}, due_at = {LONG_AGO}", _OPEN),
    ],
    "settled_message_is_nobodys": [
        message(f"lease = {NEW}", "delivered_at IS NOT NULL"),
        message(f"lease = {NEW}, dead_at = created_at", _OPEN),
    ],
    "last_email_is_erased": [
        message("recipient_address = 'uma@umbrella.example'", "template = 'account-deleted'"),
        message("recipient_name = 'Uma Banerjee'", "template = 'account-deleted'"),
    ],
    "enforcement_of_a_cancellation": [
        "UPDATE enforcement SET epoch = epoch + 1",
        f"UPDATE enforcement SET asked_at = {LONG_AGO}",
        moved("enforcement", of("hooli")),
    ],
    "enforcement_until_the_restart": [
        "UPDATE enforcement SET lifted_at = NULL WHERE lifted_at IS NOT NULL",
        f"UPDATE enforcement SET lifted_at = {FAR} WHERE lifted_at IS NULL",
    ],
    "enforcement_told_in_a_letter": [
        f"UPDATE enforcement SET report_at = NULL, reported_at = {FAR} WHERE reported_at IS NULL",
        "DELETE FROM outbox WHERE template = 'enforcement-late'",
    ],
    "last_event_is_erased": [
        "UPDATE webhook_delivery SET payload = '{}', delivered_at = created_at WHERE type = 'account.deleted'"
    ],
}
"""For each rule that is about more than one row, ways to break it by hand after the story."""

KEPT_BY_THE_DATABASE = {f"{check.table}_{check.name}" for migration in MIGRATIONS for check in migration.CHECKS} - {
    "clock_offset_one"
}
"""Two clocks are no broken row: nothing could ask for the time any more."""


async def lift_the_rules() -> None:
    """As somebody does who knows better: no trigger, constraint or unique index is left but keys and references."""
    if db.dialect() == "sqlite":
        for row in await db.fetch("SELECT name FROM sqlite_master WHERE type = 'trigger'"):
            await db.execute(f'DROP TRIGGER "{row["name"]}"')
        unique = "SELECT name FROM sqlite_master WHERE type = 'index' AND sql LIKE 'CREATE UNIQUE%'"
    else:
        for row in await db.fetch("SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public'"):
            await db.execute(f'ALTER TABLE "{row["name"]}" DISABLE TRIGGER USER')
        for row in await db.fetch(
            "SELECT conname AS name, conrelid::regclass::text AS of FROM pg_constraint "
            "WHERE contype = 'c' AND connamespace = 'public'::regnamespace"
        ):
            await db.execute(f'ALTER TABLE {row["of"]} DROP CONSTRAINT "{row["name"]}"')
        unique = (
            "SELECT indexname AS name FROM pg_indexes WHERE schemaname = 'public' "
            "AND indexdef LIKE 'CREATE UNIQUE%' AND indexname NOT LIKE '%_pkey' AND tablename <> 'tortoise_migrations'"
        )
    for row in await db.fetch(unique):
        await db.execute(f'DROP INDEX "{row["name"]}"')


class _Undone(Exception):
    pass


async def found_after(statement: str) -> dict[str, invariants.Finding]:
    """What is found when the statement was run, which is then undone."""
    found: dict[str, invariants.Finding] = {}
    with suppress(_Undone):
        async with db.transaction():
            assert await db.execute(statement) >= 1, f"nothing was broken by: {statement}"
            found = {finding.rule.name: finding for finding in await invariants.check()}
            raise _Undone
    return found


# -------------------------------------------------------------------------------------------------------- the tests


def test_every_rule_is_broken_below() -> None:
    names = [rule.name for rule in invariants.RULES]
    assert len(names) == len(set(names))
    assert set(names) == set(BROKEN) | KEPT_BY_THE_DATABASE
    assert {attempt.rule for attempt in ATTEMPTS} >= KEPT_BY_THE_DATABASE


async def test_a_healthy_installation_breaks_no_rule_and_every_broken_row_is_found(installation: Stage) -> None:
    statuses = await db.fetch("SELECT status, COUNT(*) AS accounts FROM account GROUP BY status")
    assert {row["status"]: row["accounts"] for row in statuses} == {
        "ACTIVE": 1,
        "CANCELLATION_SCHEDULED": 1,
        "CANCELED": 2,
        "DELETING": 1,
        "DELETED": 1,
    }
    kinds = {row["type"] for row in await db.fetch("SELECT DISTINCT type FROM transition")}
    assert kinds == set(TransitionType), "the story has everything that can happen"
    assert await invariants.check() == []

    await lift_the_rules()
    missed = [
        f"{rule}: {statement}"
        for rule, statements in BROKEN.items()
        for statement in statements
        if rule not in await found_after(statement)
    ]
    assert missed == []
    assert await invariants.check() == []


async def test_what_the_database_keeps_is_found_when_it_does_not_any_more(database: Database) -> None:
    """Each way to break a rule that the database refuses, with nothing there to refuse it."""
    for statement in WORLD:
        await db.execute(statement)
    assert KEPT_BY_THE_DATABASE.isdisjoint(finding.rule.name for finding in await invariants.check())
    await lift_the_rules()
    missed = [
        attempt
        for attempt in ATTEMPTS
        if attempt.rule in KEPT_BY_THE_DATABASE and attempt.rule not in await found_after(attempt.statement)
    ]
    assert missed == []


async def test_many_broken_rows_are_counted_and_the_first_are_named(sqlite_database: Database) -> None:
    await lift_the_rules()
    many = invariants.LISTED + 5
    for number in range(many):
        await db.execute(
            "INSERT INTO outbox (id, template, recipient_name, recipient_address, facts, message_id, created_at, "
            f"due_at, attempts) VALUES ($1, 'a-newer-one', '', '', '{{}}', '<{number}@x>', $2, $2, 0)",
            db.uuid7(),
            await db.now(),
        )
    (finding,) = await invariants.check()
    first = await db.fetch(f"SELECT id FROM outbox ORDER BY id LIMIT {invariants.LISTED}")
    assert (finding.rule.name, finding.count) == ("message_of_a_known_kind", many)
    assert finding.ids == [row["id"] for row in first]
