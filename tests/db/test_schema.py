"""The rules that the database keeps by itself, tried with hand-written SQL, and the columns behind the models."""

import asyncio
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tortoise.connection import get_connection
from tortoise.utils import generate_schema_for_client

from app import db
from app.db import Database, IntegrityError, sqlite_path
from app.db.migrations import m0001_initial, m0002_time, m0003_webhooks, m0004_enforcement, m0006_restores
from app.lifecycle import TransitionType
from tests.postgres import PostgresServer


def day(number: int) -> str:
    """A time as SQL, `number` days after the world of these tests began."""
    return f"'2026-{1 + number // 28:02}-{1 + number % 28:02} 12:00:00.000000+00:00'"


def key(number: int) -> str:
    return f"'00000000-0000-7000-8000-{number:012}'"


STAFF, SERVICE, MEMBER, REQUEST, OFFER, FEEDBACK, TRANSITION, MESSAGE, RECORD = (key(number) for number in range(1, 10))
ACTIVE, SCHEDULED, CANCELED, HELD, DELETING, DELETED, EMPTY, REMINDED = (key(number) for number in range(11, 19))
CLOSED, EFFECTIVE, CONFIRMED = (key(number) for number in range(21, 24))
HOLD, REMINDER, STEP, APPROVED, HALTED, TOMBSTONE, ENDPOINT, DELIVERY = (key(number) for number in range(41, 49))
PENDING, ENFORCED, LASTING = key(71), key(72), key(75)
NEW = key(99)

CANCELED_DATES = f"canceled_at = {day(1)}, restartable_until = {day(61)}, deletion_scheduled_for = {day(61)}"


def insert(table: str, **columns: object) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join(str(value) for value in columns.values())})"


def staff(**columns: object) -> str:
    return insert(
        "staff",
        **{"id": NEW, "issuer": "'i'", "subject": "'new'", "email": "'new@vendor.example'", "name": "'N'"}
        | {"role": "'SUPPORT'", "created_at": day(0)}
        | columns,
    )


def service(**columns: object) -> str:
    return insert(
        "service",
        **{"id": NEW, "issuer": "'i'", "subject": "'new'", "name": "'new'", "scopes": "''", "created_at": day(0)}
        | columns,
    )


def account(**columns: object) -> str:
    return insert(
        "account",
        **{
            "id": NEW,
            "reference": "'new'",
            "name": "'N'",
            "plan_code": "'essentials'",
            "status": "'ACTIVE'",
            "epoch": 0,
        }
        | {"last_sequence": 0, "created_at": day(0)}
        | columns,
    )


def member(**columns: object) -> str:
    return insert(
        "member",
        **{"id": NEW, "account_id": EMPTY, "issuer": "'i'", "subject": "'new'", "email": "'m@x.example'"}
        | {"name": "'M'", "role": "'ADMIN'", "permissions": "''", "created_at": day(0)}
        | columns,
    )


def request(**columns: object) -> str:
    return insert(
        "cancellation_request",
        **{"id": NEW, "account_id": EMPTY, "status": "'PENDING_CONFIRMATION'", "channel": "'SELF_SERVE'"}
        | {
            "plan_code": "'essentials'",
            "requested_at": day(0),
            "requested_by_kind": "'MEMBER'",
            "requested_by_id": MEMBER,
        }
        | {"confirmation_token_hash": "'hash'", "confirmation_generation": 0, "confirmation_expires_at": day(2)}
        | {"wrong_tries": 0}
        | columns,
    )


def feedback(**columns: object) -> str:
    return insert(
        "feedback",
        **{"id": NEW, "account_id": ACTIVE, "request_id": REQUEST, "reason": "'OTHER'", "submitted_by_id": MEMBER}
        | {"submitted_at": day(0)}
        | columns,
    )


def offer(**columns: object) -> str:
    return insert(
        "offer",
        **{"id": NEW, "account_id": ACTIVE, "request_id": REQUEST, "code": "'new'", "kind": "'PAUSE'", "title": "'T'"}
        | {"description": "'D'", "status": "'OPEN'", "offered_at": day(0)}
        | columns,
    )


def restart_request(**columns: object) -> str:
    return insert(
        "restart_request",
        **{"id": NEW, "account_id": CANCELED, "request_id": EFFECTIVE, "requested_by_id": MEMBER}
        | {"requested_at": day(2)}
        | columns,
    )


def transition(**columns: object) -> str:
    return insert(
        "transition",
        **{"id": NEW, "account_id": ACTIVE, "sequence": 2, "epoch": 0, "type": "'account.canceled'"}
        | {"actor_kind": "'SYSTEM'", "account_status": "'ACTIVE'", "occurred_at": day(0)}
        | columns,
    )


def message(**columns: object) -> str:
    return insert(
        "outbox",
        **{"id": NEW, "template": "'t'", "recipient_name": "'R'", "recipient_address": "'r@x.example'"}
        | {"facts": "'{}'", "message_id": "'<new@x>'", "created_at": day(0), "due_at": day(0), "attempts": 0}
        | columns,
    )


def record(**columns: object) -> str:
    return insert(
        "idempotency_record",
        **{"id": NEW, "caller": "'c'", "mutation": "'m'", "key": "'new'", "fingerprint": "'f'", "answer": "'{}'"}
        | {"created_at": day(0)}
        | columns,
    )


def hold(**columns: object) -> str:
    return insert(
        "deletion_hold",
        **{"id": NEW, "account_id": CANCELED, "note": "'why'", "held_at": day(2), "held_by_id": STAFF} | columns,
    )


def reminder(**columns: object) -> str:
    return insert(
        "deletion_reminder",
        **{"id": NEW, "account_id": CANCELED, "deletion_scheduled_for": day(61), "days": 7, "sent_at": day(54)}
        | columns,
    )


def step(**columns: object) -> str:
    return insert(
        "deletion_step",
        **{"id": NEW, "account_id": DELETING, "system": "'new'", "epoch": 1, "created_at": day(61), "due_at": day(61)}
        | {"attempts": 0}
        | columns,
    )


def breaker(**columns: object) -> str:
    return insert("deletion_breaker", **{"id": NEW, "tripped_at": day(61), "due": 11, "allowed": 10} | columns)


def tombstone(**columns: object) -> str:
    return insert(
        "tombstone",
        **{"id": NEW, "account_id": DELETING, "plan_code": "'essentials'", "canceled_at": day(1)}
        | {"deletion_started_at": day(61), "deleted_at": day(62), "members": 3, "feedback": 1, "offers": 0}
        | {"restart_requests": 0, "messages": 2, "idempotency_records": 1}
        | columns,
    )


def endpoint(**columns: object) -> str:
    return insert(
        "webhook_endpoint",
        **{"id": NEW, "url": "'https://x.example'", "description": "''", "event_types": "''", "created_at": day(0)}
        | {"secret_generation": 0, "failures": 0}
        | columns,
    )


def delivery(**columns: object) -> str:
    return insert(
        "webhook_delivery",
        **{"id": NEW, "endpoint_id": ENDPOINT, "account_id": ACTIVE, "sequence": 2, "epoch": 0, "payload": "'{}'"}
        | {"type": "'t'", "created_at": day(0), "queued_at": day(0), "due_at": day(0), "attempts": 0}
        | columns,
    )


def enforcement(**columns: object) -> str:
    return insert(
        "enforcement",
        **{"id": NEW, "account_id": CANCELED, "epoch": 1, "system": "'new'", "asked_at": day(1), "due_at": day(2)}
        | columns,
    )


def installation(**columns: object) -> str:
    return insert(
        "installation",
        **{"id": 1, "identity": key(76), "incidents": 2, "restores": 1, "created_at": day(0)} | columns,
    )


def change_installation(columns: str) -> str:
    return f"UPDATE installation SET {columns}"


def halt(**columns: object) -> str:
    return insert(
        "deletion_halt", **{"id": NEW, "cause": "'OPERATOR'", "evidence": "'e'", "halted_at": day(61)} | columns
    )


def change_enforcement(columns: str, one: str) -> str:
    return f"UPDATE enforcement SET {columns} WHERE id = {one}"


def change_request(columns: str, one: str = REQUEST) -> str:
    return f"UPDATE cancellation_request SET {columns} WHERE id = {one}"


def change_account(columns: str, one: str) -> str:
    return f"UPDATE account SET {columns} WHERE id = {one}"


EFFECTIVE_COLUMNS = {
    "status": "'EFFECTIVE'",
    "confirmed_at": day(1),
    "effective_at": day(1),
    "took_effect_at": day(1),
}
FIRST_APPROVAL = {"first_approved_at": day(61), "first_approved_by_id": STAFF, "first_approved_count": 11}
APPROVAL = {"approved_at": day(61), "approved_count": 11, "approved_until": day(62)}
APPROVED_BY_AN_OPERATOR = (
    f"UPDATE deletion_breaker SET ({', '.join(APPROVAL)}) = ({', '.join(map(str, APPROVAL.values()))}) WHERE id = "
)
DELETION_STARTED = f"UPDATE account SET status = 'DELETING', deletion_started_at = {day(61)} WHERE id = "
DELETION_DONE = f"UPDATE account SET status = 'DELETED', deleted_at = {day(62)} WHERE id = "

WORLD_OF_THE_FIRST_MIGRATION = [
    staff(id=STAFF, subject="'s'", email="'csm@vendor.example'"),
    service(id=SERVICE, subject="'s'", name="'host'"),
    account(id=ACTIVE, reference="'active'", last_sequence=1),
    account(id=EMPTY, reference="'empty'"),
    account(id=SCHEDULED, reference="'scheduled'"),
    change_account(f"status = 'CANCELLATION_SCHEDULED', cancellation_effective_at = {day(9)}", SCHEDULED),
    *(account(id=one, reference=f"'{number}'") for number, one in enumerate((CANCELED, HELD, DELETING, DELETED))),
    f"UPDATE account SET status = 'CANCELED', {CANCELED_DATES} WHERE id IN ({CANCELED}, {HELD}, {DELETING}, {DELETED})",
    f"UPDATE account SET deletion_held_at = {day(2)}, deletion_scheduled_for = NULL WHERE id = {HELD}",
    DELETION_STARTED + DELETING,
    DELETION_STARTED + DELETED,
    DELETION_DONE + DELETED,
    member(id=MEMBER, account_id=ACTIVE, subject="'m'"),
    member(id=key(31), account_id=DELETING, subject="'m'"),
    request(id=REQUEST, account_id=ACTIVE),
    request(id=CLOSED, account_id=ACTIVE, status="'WITHDRAWN'", closed_at=day(1)),
    request(id=EFFECTIVE, account_id=CANCELED, **EFFECTIVE_COLUMNS),
    request(id=CONFIRMED, account_id=SCHEDULED, status="'CONFIRMED'", confirmed_at=day(1), effective_at=day(9)),
    offer(id=OFFER, code="'pause'", status="'ACCEPTED'", answered_at=day(1)),
    offer(id=key(32), code="'open'"),
    feedback(id=FEEDBACK),
    feedback(id=key(33), account_id=DELETING),
    restart_request(id=key(34)),
    transition(id=TRANSITION, sequence=1),
    message(id=MESSAGE, message_id="'<sent@x>'", delivered_at=day(1)),
    record(id=RECORD, key="'k'"),
]
WORLD = [
    *WORLD_OF_THE_FIRST_MIGRATION,
    account(id=REMINDED, reference="'reminded'"),
    change_account(f"status = 'CANCELED', {CANCELED_DATES}, reminder_due_at = {day(31)}", REMINDED),
    hold(id=HOLD, account_id=HELD),
    hold(id=key(51), account_id=CANCELED, held_at=day(2), released_at=day(3), released_by_id=STAFF),
    reminder(id=REMINDER, days=30, sent_at=day(31)),
    step(id=STEP, system="'sunset'"),
    breaker(id=APPROVED, **FIRST_APPROVAL, **APPROVAL, approved_by_id=key(52)),
    breaker(id=HALTED),
    tombstone(id=TOMBSTONE, account_id=DELETED, reason="'UNUSED'"),
    "UPDATE clock_offset SET offset_seconds = 3600",
    insert("rate_limit", key="'caller'", whole_at=day(1)),
    endpoint(id=ENDPOINT),
    delivery(id=DELIVERY, sequence=1, delivered_at=day(1)),
    delivery(id=key(53), account_id="NULL", sequence="NULL", epoch="NULL"),
    enforcement(id=PENDING, system="'mailer'"),
    enforcement(id=ENFORCED, system="'login'", enforced_at=day(3), enforced_by_id=SERVICE),
    enforcement(id=key(73), account_id=ACTIVE, system="'mailer'", lifted_at=day(4), reported_at=day(2)),
    installation(),
    halt(id=LASTING),
    halt(id=key(74), cause="'MOVED'", resumed_at=day(62), resume_note="'Mended.'"),
]
"""Statements that every one of which keeps the rules; the tests below begin after them."""


class Attempt(NamedTuple):
    """A statement, and the name of the rule that refuses it."""

    rule: str
    statement: str


ATTEMPTS = [
    Attempt("staff_role", staff(role="'CEO'")),
    Attempt("staff_identity", staff(subject="'s'")),
    Attempt("staff_email", staff(email="'csm@vendor.example'")),
    Attempt("service_identity", service(subject="'s'")),
    Attempt("service_name", service(name="'host'")),
    Attempt("account_begins_active", account(status="'GONE'")),
    Attempt("account_arrows", change_account("status = 'GONE'", ACTIVE)),
    Attempt("account_epoch", account(epoch=-1)),
    Attempt("account_reference", account(reference="'active'")),
    Attempt("account_canceled_at", change_account("canceled_at = NULL", CANCELED)),
    Attempt("account_canceled_at", account(canceled_at=day(1))),
    Attempt("account_restartable_until", change_account("restartable_until = NULL", CANCELED)),
    Attempt("account_restartable_until", account(restartable_until=day(1))),
    Attempt("account_deletion_scheduled_for", change_account("deletion_scheduled_for = NULL", CANCELED)),
    Attempt("account_deletion_scheduled_for", change_account(f"deletion_scheduled_for = {day(90)}", HELD)),
    Attempt("account_deletion_scheduled_for", account(deletion_scheduled_for=day(90))),
    Attempt("account_deletion_scheduled_for", change_account("deletion_scheduled_for = NULL", DELETING)),
    Attempt("account_deletion_held_at", account(deletion_held_at=day(1))),
    Attempt("account_window", change_account(f"restartable_until = {day(1)}", CANCELED)),
    Attempt("account_deletion_after_window", change_account(f"deletion_scheduled_for = {day(60)}", CANCELED)),
    Attempt("account_cancellation_effective_at", account(cancellation_effective_at=day(1))),
    Attempt("account_cancellation_effective_at", change_account("cancellation_effective_at = NULL", SCHEDULED)),
    Attempt("account_deletion_started_at", change_account("status = 'DELETING'", CANCELED)),
    Attempt("account_deletion_started_at", change_account(f"deletion_started_at = {day(61)}", CANCELED)),
    Attempt(
        "account_deletion_not_early",
        change_account(f"status = 'DELETING', deletion_started_at = {day(60)}", CANCELED),
    ),
    Attempt("account_deleted_at", change_account(f"deleted_at = {day(62)}", DELETING)),
    Attempt("account_begins_active", account(status="'CANCELLATION_SCHEDULED'", cancellation_effective_at=day(1))),
    Attempt(
        "account_arrows",
        change_account(f"status = 'DELETING', {CANCELED_DATES}, deletion_started_at = {day(61)}", ACTIVE),
    ),
    Attempt(
        "account_arrows",
        change_account(
            "status = 'ACTIVE', canceled_at = NULL, restartable_until = NULL, deletion_scheduled_for = NULL, "
            "deletion_started_at = NULL",
            DELETING,
        ),
    ),
    Attempt("account_arrows", change_account("status = 'DELETING', deleted_at = NULL", DELETED)),
    Attempt("deleted_account_has_no_members", DELETION_DONE + DELETING),
    Attempt("no_member_of_deleted_account_insert", member(account_id=DELETED)),
    Attempt("no_member_of_deleted_account_update", f"UPDATE member SET account_id = {DELETED} WHERE id = {MEMBER}"),
    Attempt("member_role", member(role="'OWNER'")),
    Attempt("member_identity_in_account", member(account_id=ACTIVE, subject="'m'")),
    Attempt("cancellation_request_status", request(status="'LOST'")),
    Attempt("cancellation_request_channel", request(channel="'PHONE'")),
    Attempt("cancellation_request_requested_by_kind", request(requested_by_kind="'GHOST'")),
    Attempt("cancellation_request_confirmation", request(confirmation_token_hash="NULL")),
    Attempt("cancellation_request_confirmation", request(confirmation_expires_at="NULL")),
    Attempt(
        "cancellation_request_confirmation", request(confirmation_token_hash="NULL", confirmation_expires_at="NULL")
    ),
    Attempt("cancellation_request_confirmed_at", change_request(f"confirmed_at = {day(1)}, effective_at = {day(9)}")),
    Attempt("cancellation_request_confirmed_at", change_request("confirmed_at = NULL, effective_at = NULL", EFFECTIVE)),
    Attempt("cancellation_request_effective_at", change_request(f"effective_at = {day(1)}")),
    Attempt("cancellation_request_effective_at", change_request("effective_at = NULL", CONFIRMED)),
    Attempt("cancellation_request_effective_after_confirmed", change_request(f"effective_at = {day(0)}", EFFECTIVE)),
    Attempt("cancellation_request_took_effect_at", change_request(f"took_effect_at = {day(9)}", CONFIRMED)),
    Attempt("cancellation_request_took_effect_at", change_request("status = 'EFFECTIVE'", CONFIRMED)),
    Attempt("cancellation_request_closed_at", change_request(f"closed_at = {day(1)}")),
    Attempt("cancellation_request_closed_at", change_request("status = 'REVERTED'", EFFECTIVE)),
    Attempt("cancellation_request_wrong_tries", change_request("wrong_tries = 6")),
    Attempt("cancellation_request_wrong_tries", change_request("wrong_tries = -1")),
    Attempt("request_open", request(account_id=ACTIVE)),
    Attempt("request_open", request(account_id=SCHEDULED)),
    Attempt("request_effective", request(account_id=CANCELED, **EFFECTIVE_COLUMNS)),
    Attempt("request_arrows", change_request("status = 'PENDING_CONFIRMATION', closed_at = NULL", CLOSED)),
    Attempt("request_arrows", change_request("status = 'SAVED'", CLOSED)),
    Attempt(
        "request_arrows",
        change_request(
            "status = 'PENDING_CONFIRMATION', confirmed_at = NULL, effective_at = NULL, took_effect_at = NULL",
            EFFECTIVE,
        ),
    ),
    Attempt("feedback_reason", feedback(reason="'NONE'")),
    Attempt("feedback_is_never_changed", f"UPDATE feedback SET comment = 'nicer' WHERE id = {FEEDBACK}"),
    Attempt("feedback_is_kept", f"DELETE FROM feedback WHERE id = {FEEDBACK}"),
    Attempt("offer_kind", offer(kind="'BRIBE'")),
    Attempt("offer_status", offer(status="'MAYBE'", answered_at=day(1))),
    Attempt("offer_answered_at", offer(answered_at=day(1))),
    Attempt("offer_answered_at", offer(status="'DECLINED'")),
    Attempt("offer_code", offer(code="'pause'")),
    Attempt("offer_accepted", offer(status="'ACCEPTED'", answered_at=day(1))),
    Attempt("restart_request_once", restart_request()),
    Attempt("transition_type", transition(type="'account.sold'")),
    Attempt("transition_actor_kind", transition(actor_kind="'GHOST'")),
    Attempt("transition_account_status", transition(account_status="'GONE'")),
    Attempt("transition_sequence", transition(sequence=1)),
    Attempt("transition_is_never_changed", f"UPDATE transition SET epoch = 7 WHERE id = {TRANSITION}"),
    Attempt("transition_is_kept", f"DELETE FROM transition WHERE id = {TRANSITION}"),
    Attempt("outbox_settled_once", message(delivered_at=day(1), dead_at=day(1))),
    Attempt("outbox_settled_once", message(delivered_at=day(1), dropped_at=day(1))),
    Attempt("outbox_settled_once", message(dead_at=day(1), dropped_at=day(1))),
    Attempt("outbox_attempts", message(attempts=-1)),
    Attempt("outbox_message_id", message(message_id="'<sent@x>'")),
    Attempt("idempotency_key", record(key="'k'")),
    Attempt("account_reminder_due_at", account(reminder_due_at=day(1))),
    Attempt("account_reminder_due_at", change_account(f"reminder_due_at = {day(61)}", REMINDED)),
    Attempt("account_reminder_due_at", change_account(f"reminder_due_at = {day(31)}", HELD)),
    Attempt(
        "account_reminder_due_at",
        change_account(f"status = 'DELETING', deletion_started_at = {day(61)}", REMINDED),
    ),
    Attempt("cancellation_request_assistance", change_request(f"assistance_reminded_at = {day(1)}")),
    Attempt("cancellation_request_assistance", change_request(f"assistance_escalated_at = {day(3)}")),
    Attempt("deletion_hold_released_after_held", hold(released_at=day(1))),
    Attempt("deletion_hold_open", hold(account_id=HELD)),
    Attempt("deletion_reminder_sent_before", reminder(sent_at=day(61))),
    Attempt("deletion_reminder_once", reminder(days=30)),
    Attempt("deletion_step_attempts", step(attempts=-1)),
    Attempt("deletion_step_system", step(system="'sunset'")),
    *(Attempt("step_of_a_begun_deletion", step(account_id=one)) for one in (ACTIVE, CANCELED, HELD, DELETED)),
    Attempt("deletion_breaker_first_approval", breaker(first_approved_at=day(61), **APPROVAL)),
    Attempt("deletion_breaker_first_approval", breaker(first_approved_by_id=STAFF, **APPROVAL)),
    *(
        Attempt(
            "deletion_breaker_approval", breaker(**{name: value for name, value in APPROVAL.items() if name != left})
        )
        for left in APPROVAL
    ),
    Attempt("deletion_breaker_two_persons", breaker(**APPROVAL, approved_by_id=STAFF)),
    Attempt("deletion_breaker_two_persons", breaker(**FIRST_APPROVAL, **APPROVAL, approved_by_id=STAFF)),
    Attempt("deletion_breaker_open", breaker()),
    Attempt("tombstone_reason", tombstone(reason="'NONE'")),
    Attempt("tombstone_account", tombstone(account_id=DELETED)),
    Attempt("tombstone_is_never_changed", f"UPDATE tombstone SET reason = NULL WHERE id = {TOMBSTONE}"),
    Attempt("tombstone_is_kept", f"DELETE FROM tombstone WHERE id = {TOMBSTONE}"),
    Attempt("clock_offset_one", insert("clock_offset", id=2, offset_seconds=0)),
    Attempt("clock_offset_fixed", f"UPDATE clock_offset SET fixed_at = {day(1)}"),
    Attempt("clock_never_goes_back", "UPDATE clock_offset SET offset_seconds = 3599"),
    Attempt("clock_is_kept", "DELETE FROM clock_offset"),
    Attempt("webhook_endpoint_generation", endpoint(secret_generation=-1)),
    Attempt("webhook_endpoint_failures", endpoint(failures=-1)),
    Attempt("webhook_endpoint_disabled", endpoint(disabled_at=day(1))),
    Attempt("webhook_endpoint_disabled", endpoint(disabled_reason="'tired'")),
    Attempt("webhook_delivery_attempts", delivery(attempts=-1)),
    Attempt("webhook_delivery_settled_once", delivery(delivered_at=day(1), dead_at=day(1))),
    *(Attempt("webhook_delivery_about", delivery(**{one: "NULL"})) for one in ("account_id", "sequence", "epoch")),
    *(
        Attempt("webhook_delivery_settled_is_nobodys", delivery(**{one: day(1)}, lease=key(1)))
        for one in ("delivered_at", "dead_at")
    ),
    Attempt("webhook_delivery_once", delivery(sequence=1)),
    Attempt("enforcement_epoch", enforcement(epoch=0)),
    Attempt("enforcement_due_after_asked", enforcement(due_at=day(1))),
    Attempt("enforcement_enforced_by", enforcement(enforced_at=day(2))),
    Attempt("enforcement_enforced_by", enforcement(enforced_by_id=SERVICE)),
    Attempt("enforcement_enforced_after_asked", enforcement(enforced_at=day(0), enforced_by_id=SERVICE)),
    Attempt("enforcement_lifted_after_asked", enforcement(lifted_at=day(0))),
    Attempt(
        "enforcement_enforced_before_lifted",
        enforcement(enforced_at=day(3), enforced_by_id=SERVICE, lifted_at=day(2)),
    ),
    Attempt("enforcement_report_when_late", enforcement(report_at=day(1))),
    Attempt("enforcement_reported_when_late", enforcement(reported_at=day(1))),
    Attempt("enforcement_reported_once", enforcement(report_at=day(3), reported_at=day(3))),
    Attempt("enforcement_once", enforcement(system="'mailer'", lifted_at=day(2))),
    Attempt("enforcement_current", enforcement(system="'mailer'", epoch=3)),
    Attempt("enforcement_stays", change_enforcement(f"enforced_at = {day(4)}", ENFORCED)),
    Attempt("enforcement_stays", change_enforcement("enforced_at = NULL, enforced_by_id = NULL", ENFORCED)),
    Attempt("installation_one", change_installation("id = 2")),
    Attempt("installation_counts", change_installation("incidents = 2, restores = 3")),
    Attempt("installation_counts", change_installation("incidents = 2001, restores = 2001")),
    Attempt("restores_never_go_back", change_installation("restores = 0")),
    Attempt("restores_never_go_back", change_installation("incidents = 1")),
    Attempt("restores_never_go_back", change_installation(f"identity = {key(77)}")),
    Attempt("installation_is_kept", "DELETE FROM installation"),
    Attempt("deletion_halt_cause", halt(cause="'FUN'")),
    Attempt("deletion_halt_resumed", halt(cause="'MOVED'", resumed_at=day(62))),
    Attempt("deletion_halt_resumed", halt(cause="'MOVED'", resume_note="'n'")),
    Attempt("deletion_halt_resumed_after_halted", halt(resumed_at=day(60), resume_note="'n'")),
    Attempt("deletion_halt_open", halt()),
]

MIGRATIONS = (m0001_initial, m0002_time, m0003_webhooks, m0004_enforcement, m0006_restores)

UNIQUE_INDEXES = {
    line.split()[3]: line.split()[5]
    for migration in MIGRATIONS
    for line in migration.INDEXES.splitlines()
    if line.startswith("CREATE UNIQUE INDEX")
}


@pytest.fixture
async def world(database: Database) -> Database:
    async with db.transaction():
        for statement in WORLD:
            await db.execute(statement)
    return database


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.rule)
async def test_hand_written_sql_cannot_break_a_rule(world: Database, attempt: Attempt) -> None:
    """The database refuses by itself, naming the rule."""
    with pytest.raises(IntegrityError) as refused:
        await db.execute(attempt.statement)
    if world.dialect == "sqlite" and attempt.rule in UNIQUE_INDEXES:
        table = UNIQUE_INDEXES[attempt.rule]
        assert str(refused.value).startswith(
            (
                f"UNIQUE constraint failed: {table}.",
                f"UNIQUE constraint failed: index '{attempt.rule}'",  # one on an expression
                f"{table}_is_not_replaced",
            )
        )
    else:
        assert attempt.rule in str(refused.value)


def test_every_rule_is_tried() -> None:
    """A rule added by a migration needs an attempt above."""
    rules = set(UNIQUE_INDEXES)
    for migration in MIGRATIONS:
        rules -= {f"{check.table}_{check.name}" for check in getattr(migration, "REPLACED", ())}
        rules |= {f"{check.table}_{check.name}" for check in migration.CHECKS}
        rules |= {rule.name for rule in migration.REFUSALS}
    assert rules == {attempt.rule for attempt in ATTEMPTS}


async def test_allowed_ways_stay_open(world: Database) -> None:
    """The rules refuse what is wrong and nothing else: restart, hold and release, hand-over, the whole deletion."""
    async with db.transaction():
        for statement in (
            change_account(
                "status = 'ACTIVE', canceled_at = NULL, restartable_until = NULL, deletion_scheduled_for = NULL",
                CANCELED,
            ),
            f"DELETE FROM deletion_reminder WHERE account_id = {CANCELED}",
            change_request(f"status = 'REVERTED', closed_at = {day(3)}", EFFECTIVE),
            change_account(
                f"deletion_held_at = NULL, deletion_scheduled_for = {day(70)}, reminder_due_at = {day(63)}", HELD
            ),
            f"UPDATE deletion_hold SET released_at = {day(2)}, note = NULL WHERE id = {HOLD}",
            hold(id=key(61), account_id=HELD, held_at=day(4)),
            change_request(f"status = 'PENDING_ASSISTANCE', assistance_requested_at = {day(0)}"),
            change_request(f"assistance_reminded_at = {day(1)}, assistance_escalated_at = {day(3)}"),
            change_request("status = 'PENDING_CONFIRMATION'"),
            change_request(f"status = 'CONFIRMED', confirmed_at = {day(1)}, effective_at = {day(9)}"),
            change_request(f"status = 'WITHDRAWN', closed_at = {day(2)}"),
            f"DELETE FROM feedback WHERE account_id = {DELETING}",
            f"DELETE FROM member WHERE account_id = {DELETING}",
            f"UPDATE deletion_step SET attempts = 1, completed_at = {day(62)} WHERE id = {STEP}",
            DELETION_DONE + DELETING,
            tombstone(),
            change_account("name = ''", DELETED),
            APPROVED_BY_AN_OPERATOR + HALTED,
            breaker(),
            "UPDATE clock_offset SET offset_seconds = 3601",
            "DELETE FROM rate_limit",
            f"UPDATE webhook_delivery SET delivered_at = NULL, lease = {key(1)} WHERE id = {DELIVERY}",
            f"UPDATE webhook_delivery SET lease = NULL, dead_at = {day(2)} WHERE id = {DELIVERY}",
            change_enforcement(f"report_at = {day(3)}", PENDING),
            change_enforcement(f"report_at = NULL, reported_at = {day(3)}", PENDING),
            change_enforcement(f"enforced_at = {day(3)}, enforced_by_id = {SERVICE}", PENDING),
            f"UPDATE enforcement SET lifted_at = {day(3)} WHERE account_id = {CANCELED}",
            enforcement(system="'mailer'", epoch=3),
        ):
            assert await db.execute(statement) >= 1


async def test_every_transition_can_be_recorded(world: Database) -> None:
    """What the application may append, the schema accepts."""
    for number, kind in enumerate(TransitionType):
        await db.execute(transition(id=key(200 + number), sequence=2 + number, type=f"'{kind}'"))


def test_every_table_whose_rows_are_kept_is_tried() -> None:
    """By the two tests below."""
    kept = {table for migration in MIGRATIONS for table in migration.APPEND_ONLY}
    assert kept == {"feedback", "transition", "tombstone", "clock_offset", "installation"}


@pytest.mark.parametrize(
    "statement",
    [
        transition(id=TRANSITION).replace("INSERT", "REPLACE", 1),
        transition(sequence=1).replace("INSERT", "INSERT OR REPLACE", 1),
        feedback(id=FEEDBACK, reason="'UNUSED'").replace("INSERT", "INSERT OR REPLACE", 1),
        tombstone(id=TOMBSTONE).replace("INSERT", "REPLACE", 1),
        tombstone(account_id=DELETED).replace("INSERT", "REPLACE", 1),
        insert("clock_offset", id=1, offset_seconds=0).replace("INSERT", "REPLACE", 1),
        installation().replace("INSERT", "REPLACE", 1),
    ],
    ids=[
        "transition",
        "transition by sequence",
        "feedback",
        "tombstone",
        "tombstone by account",
        "clock",
        "installation",
    ],
)
async def test_replace_does_not_rewrite_history(sqlite_database: Database, statement: str) -> None:
    """SQLite's REPLACE deletes without asking the triggers that guard deletion."""
    for build in WORLD:
        await db.execute(build)
    with pytest.raises(IntegrityError, match="is_not_replaced"):
        await db.execute(statement)


@pytest.mark.postgres
@pytest.mark.parametrize("table", ["feedback", "transition", "tombstone", "clock_offset", "installation"])
async def test_truncate_does_not_erase_history(postgres_database: Database, table: str) -> None:
    """PostgreSQL's TRUNCATE asks no row's trigger."""
    with pytest.raises(IntegrityError, match=f"{table}_is_not_truncated"):
        await db.execute(f"TRUNCATE {table}")


@pytest.mark.parametrize(
    ("rule", "statement"),
    [
        ("account_created_at_type", account(created_at="'2026-01-01'")),
        ("account_created_at_type", account(created_at="'2026-01-01 12:00:00+00:00'")),
        ("account_created_at_type", account(created_at="'2026-01-01 12:00:00.000000+02:00'")),
        ("account_created_at_type", account(created_at="'2026-99-01 12:00:00.000000+00:00'")),
        ("account_id_type", account(id="'7'")),
        ("account_id_type", account(id="'00000000-0000-7000-8000-00000000000A'")),
        ("account_name_type", account(name="x'00'")),
        ("account_plan_code_type", account(plan_code=f"'{'p' * 65}'")),
        ("account_epoch_type", account(epoch="'many'")),
        ("outbox_facts_type", message(facts="'{'")),
        ("offer_description_type", offer(description="x'00'")),
        (
            "cancellation_request_assistance_reminded_at_type",
            change_request(f"assistance_requested_at = {day(0)}, assistance_reminded_at = 'soon'"),
        ),
        ("outbox_dropped_at_type", message(dropped_at="1")),
        ("outbox_traceparent_type", message(traceparent=f"'{'0' * 65}'")),
        ("deletion_hold_held_by_id_type", hold(account_id=ACTIVE, held_by_id="'me'")),
        ("deletion_reminder_days_type", reminder(account_id=ACTIVE, days="'seven'")),
        ("clock_offset_offset_seconds_type", "UPDATE clock_offset SET offset_seconds = 'more'"),
        ("rate_limit_whole_at_type", insert("rate_limit", key="'k'", whole_at="'2026-01-01'")),
    ],
)
async def test_sqlite_columns_hold_what_they_declare(sqlite_database: Database, rule: str, statement: str) -> None:
    """PostgreSQL's types refuse these by themselves; SQLite compares such values wrongly instead."""
    await db.execute(account(id=ACTIVE, reference="'active'"))
    await db.execute(request(id=REQUEST, account_id=ACTIVE))
    with pytest.raises(IntegrityError, match=rule):
        await db.execute(statement)


async def test_every_column_of_sqlite_holds_what_it_declares(sqlite_database: Database) -> None:
    """A column that a migration adds is checked like those before it; a reference to another row checks itself."""
    columns = set(without_record(sqlite_columns(Path(sqlite_path(sqlite_database.url)))))
    for table in {table for table, _ in columns}:
        columns -= {(table, row["from"]) for row in await db.fetch(f"PRAGMA foreign_key_list({table})")}
    triggers = {row["name"] for row in await db.fetch("SELECT name FROM sqlite_master WHERE type = 'trigger'")}
    wanted = {f"{table}_{column}_type_{event}" for table, column in columns for event in ("insert", "update")}
    assert wanted <= triggers, wanted - triggers


@pytest.mark.postgres
async def test_member_and_deletion_do_not_miss_each_other(postgres_database: Database) -> None:
    """A member's insert, not yet committed, and the account's deletion at the same time: one of them is refused."""
    for build in WORLD:
        await db.execute(build)
    await db.execute(f"DELETE FROM member WHERE account_id = {DELETING}")
    client: Any = get_connection("postgresql")
    other = await client.connect()
    try:
        await other.execute("BEGIN")
        await other.execute(DELETION_DONE + DELETING)

        async def commit_when_waited_for() -> None:
            async with asyncio.timeout(30):
                while not await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                    pass
            await other.execute("COMMIT")

        refused, _ = await asyncio.gather(
            db.execute(member(account_id=DELETING)), commit_when_waited_for(), return_exceptions=True
        )
    finally:
        await other.close()
    assert isinstance(refused, IntegrityError)
    assert "no_member_of_deleted_account_insert" in str(refused)


class Column(NamedTuple):
    type: str
    nullable: bool
    primary_key: bool
    default: str | None


def sqlite_columns(path: Path) -> dict[tuple[str, str], Column]:
    connection = sqlite3.connect(path)
    try:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        return {
            (table, name): Column(type_, not not_null, bool(primary_key), default)
            for (table,) in tables.fetchall()
            for _, name, type_, not_null, default, primary_key in connection.execute(f'PRAGMA table_info("{table}")')
        }
    finally:
        connection.close()


async def postgres_columns() -> dict[tuple[str, str], Column]:
    rows = await db.fetch(
        "SELECT c.relname AS table, a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type, "
        "NOT a.attnotnull AS nullable, coalesce(a.attnum = ANY (k.conkey), false) AS key, "
        "pg_get_expr(d.adbin, d.adrelid) AS default "
        "FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
        "LEFT JOIN pg_constraint k ON k.conrelid = c.oid AND k.contype = 'p' "
        "LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum "
        "WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace AND a.attnum > 0 AND NOT a.attisdropped"
    )
    return {
        (row["table"], row["name"]): Column(row["type"], row["nullable"], row["key"], row["default"]) for row in rows
    }


def without_record(columns: dict[tuple[str, str], Column]) -> dict[tuple[str, str], Column]:
    return {place: column for place, column in columns.items() if place[0] != "tortoise_migrations"}


async def test_models_and_migrations_agree_on_sqlite(sqlite_template: Path, tmp_path: Path) -> None:
    """A model changed without a migration fails here: its columns are not those of the migrated tables."""
    path = tmp_path / "models.db"
    database = await Database.open(f"sqlite://{path}")
    try:
        with database.bind():
            await generate_schema_for_client(get_connection("sqlite"), safe=False)
    finally:
        await database.close()
    assert sqlite_columns(path) == without_record(sqlite_columns(sqlite_template))


@pytest.mark.postgres
async def test_models_and_migrations_agree_on_postgresql(
    postgres_database: Database, postgres_server: PostgresServer
) -> None:
    migrated = without_record(await postgres_columns())
    name = await postgres_server.create_empty_database()
    try:
        database = await Database.open(postgres_server.url(name), pool_size=1)
        try:
            with database.bind():
                await generate_schema_for_client(get_connection("postgresql"), safe=False)
                modeled = await postgres_columns()
        finally:
            await database.close()
    finally:
        await postgres_server.drop_database(name)
    assert modeled == migrated
