"""Nothing of a deleted account is left: a canary in every column of every table, and everything is searched for them.

The columns are found in the models and compared with the database's own, so that none can be forgotten: a table is the
company's, or it belongs to accounts; a text in the latter names a code, or it holds a canary before the deletion.
"""

import io
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from tortoise import Model, fields
from tortoise.apps import Apps
from tortoise.context import get_current_context
from tortoise.fields.data import CharEnumFieldInstance

from app import db, deletion, endpoints, ids
from app.db import Database, UtcDatetimeField
from app.lifecycle import LinkPurpose, Permission
from app.messages import LinkGrant
from app.models import DeletionStep
from app.tokens import DEVELOPMENT_ISSUER
from tests.cast import ALICE, BILLING, BOB, CAROL, CSM, Stage, subject
from tests.delivery.webhook_server import receiving
from tests.ending import WINDOW, account, count, log_in_memory, many, steps
from tests.enforcing import MAILER, acknowledge, obeyed

MIGRATIONS = "tortoise_migrations"
"""The record of those that ran."""

THE_COMPANYS = {
    *("staff", "service", "deletion_breaker", "deletion_halt", "clock_offset", "installation", "webhook_endpoint")
}
"""Tables about nobody's account. What the billing team writes to approve deletions is about their number."""

CODES = {
    "account.plan_code",
    "cancellation_request.plan_code",
    "tombstone.plan_code",
    "outbox.template",
    "outbox.message_id",
    "idempotency_record.mutation",
    "deletion_step.system",
    "webhook_delivery.type",
    "enforcement.system",
}
"""Texts that are codes without being an enumeration: of the policy, of the catalogue of emails, of Sunset itself."""

RECOGNIZED = re.compile("canary|kept-")
"""What is about the erased account alone is called canary; what the neighbor has too, or alone, is called kept."""

PAID_UNTIL = datetime(2033, 3, 3, 3, 33, 33, 333000, tzinfo=UTC)
ALICES, CAROLS, BOBS = "kept-alice", "kept-carol", "canary-bob"


def tables() -> dict[str, type[Model]]:
    context = get_current_context()
    assert context is not None
    apps = context.apps
    assert isinstance(apps, Apps)
    return {model._meta.db_table: model for model in apps["models"].values()}


def texts(model: type[Model]) -> list[str]:
    """The columns that can hold somebody's words: all but enumerations, ids, numbers and times."""
    plain = (CharEnumFieldInstance, fields.UUIDField, fields.IntField, fields.BigIntField, UtcDatetimeField)
    return [
        column
        for name, column in model._meta.fields_db_projection.items()
        if not isinstance(model._meta.fields_map[name], plain)
    ]


async def columns() -> dict[str, set[str]]:
    """The database's own tables, without the record of its migrations."""
    if db.dialect() == "postgresql":
        rows = await db.fetch(
            'SELECT table_name AS "table", column_name AS "column" FROM information_schema.columns '
            "WHERE table_schema NOT IN ('pg_catalog', 'information_schema')"
        )
    else:
        rows = await db.fetch(
            'SELECT m.name AS "table", c.name AS "column" FROM sqlite_master m, pragma_table_info(m.name) c '
            "WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite_%'"
        )
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["table"], set()).add(row["column"])
    return found


async def dump() -> dict[str, list[str]]:
    """Every row of every table, as text."""
    found = {}
    for table in await columns():
        if db.dialect() == "postgresql":
            rows = await db.fetch(f'SELECT t::text AS row FROM "{table}" t')
            found[table] = sorted(row["row"] for row in rows)
        else:
            found[table] = sorted(str(tuple(row.values())) for row in await db.fetch(f'SELECT * FROM "{table}"'))
    return found


async def of(account_id: UUID) -> list[str]:
    """Every row that names the account, in any column."""
    return [f"{table}: {row}" for table, rows in (await dump()).items() for row in rows if str(account_id) in row]


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    with log_in_memory() as stream:
        yield stream


# ------------------------------------------------------------------------------------------------- a life, in words


async def two_accounts(house: Stage) -> tuple[UUID, UUID]:
    """One to be deleted and its neighbor, in which Alice and Carol are too; Bob is in the first alone. They have names
    and addresses to be recognized by."""
    erased = await house.account_key("acme")
    (neighbor,) = await many(house, 1, "kept")
    await db.execute("DELETE FROM member WHERE account_id = $1", neighbor)
    await db.execute(
        "UPDATE account SET name = 'canary-name', current_period_end = $2 WHERE id = $1", erased, PAID_UNTIL
    )
    await db.execute("UPDATE account SET name = 'kept-name' WHERE id = $1", neighbor)
    for who, word in ((ALICE, ALICES), (CAROL, CAROLS), (BOB, BOBS)):
        await db.execute(
            "UPDATE member SET name = $2, email = $3, permissions = $4 WHERE subject = $1",
            subject(who),
            word,
            f"{word}@example.com",
            f"{Permission.ACCESS_BILLING_AND_ACCOUNT_INFO} {word}-permission",
        )
    for row in await db.fetch("SELECT * FROM member WHERE account_id = $1 AND name <> $2", erased, BOBS):
        values = row | {"id": db.uuid7(), "account_id": neighbor}
        marks = ", ".join(f"${index}" for index in range(1, len(values) + 1))
        await db.execute(f"INSERT INTO member ({', '.join(values)}) VALUES ({marks})", *values.values())
    return erased, neighbor


async def live(house: Stage, reference: str, name: str, word: str) -> UUID:
    """Whatever people write about an account is written, by the API, and what they are mailed is delivered."""
    account_id = await house.account_key(reference)
    key = await house.account_id(reference)
    manager = await db.fetch_one("SELECT id FROM staff WHERE email = $1", CSM)
    assert manager is not None
    await db.execute("UPDATE account SET csm_id = $2 WHERE id = $1", account_id, manager["id"])
    opened = await house.request_cancellation(CSM, reference, note=f"{word}-staff-note", idempotencyKey=f"{word}-key")
    assert opened["__typename"] == "CancelAccountSuccess"
    await house.do(ALICE, "withdrawCancellation", accountId=key)
    asked = await house.request_cancellation(ALICE, reference, reason="TOO_EXPENSIVE", idempotencyKey=f"{word}-key")
    request = asked["request"]["id"]
    await house.do(ALICE, "declineOffer", offerId=asked["request"]["offers"][0]["id"], idempotencyKey=f"{word}-no")
    said = await house.do(
        ALICE,
        "submitFeedback",
        requestId=request,
        reason="UNUSED",
        comment=f"{word}-comment",
        idempotencyKey=f"{word}-said",
    )
    assert said["__typename"] == "SubmitFeedbackSuccess"
    done = await house.do(
        ALICE,
        "confirmCancellation",
        requestId=request,
        confirmationToken=asked["confirmationToken"],
        accountName=name,
        idempotencyKey=f"{word}-yes",
    )
    assert done["__typename"] == "ConfirmCancellationSuccess"
    await house.letters()
    found = await db.fetch_one(
        "SELECT id FROM cancellation_request WHERE account_id = $1 AND status = 'EFFECTIVE'", account_id
    )
    assert found is not None
    grant = LinkGrant(
        purpose=LinkPurpose.RESTART,
        issuer=DEVELOPMENT_ISSUER,
        subject=subject(ALICE),
        account_id=account_id,
        request_id=db.as_uuid(found["id"]),
    )
    now = await db.now()
    link = house.installation.tokens.mint_link(grant, issued_at=now, expires_at=now + timedelta(days=1))
    wished = await house.do_as(link, "requestRestart", note=f"{word}-wish")
    assert wished["__typename"] == "RequestRestartSuccess"
    for mutation in ("holdDeletion", "releaseDeletion"):
        kept = await house.do(BILLING, mutation, accountId=key, note=f"{word}-{mutation}", idempotencyKey=f"{word}-key")
        assert kept["__typename"].endswith("Success")
    await house.letters()
    return account_id


async def fill(erased: UUID) -> None:
    """A canary in the texts that nobody writes."""
    for who, word in ((ALICE, ALICES), (CAROL, CAROLS), (BOB, BOBS)):  # of Alice and Carol in both accounts
        await db.execute(
            "UPDATE member SET issuer = $2, subject = $3 WHERE subject = $1",
            subject(who),
            f"{word}-issuer",
            f"{word}-subject",
        )
    changed = {
        "account": ["reference"],
        "cancellation_request": ["confirmation_token_hash"],
        "offer": ["code", "title", "description"],
        "outbox": ["last_error", "traceparent"],
        "webhook_delivery": ["last_error", "traceparent"],
        "idempotency_record": ["caller", "fingerprint"],
    }
    for table, names in changed.items():
        key = "id" if table == "account" else "account_id"
        for row in await db.fetch(f"SELECT * FROM {table} WHERE {key} = $1", erased):
            for name in names:
                if row[name] is not None or table in {"outbox", "webhook_delivery"}:
                    await db.execute(f"UPDATE {table} SET {name} = $2 WHERE id = $1", row["id"], f"canary-{row['id']}")
    await db.execute(
        "UPDATE idempotency_record SET answer = $2 WHERE account_id = $1", erased, '{"said": "canary-answer"}'
    )
    await db.execute(
        "INSERT INTO rate_limit (key, whole_at) VALUES ($1, $2)", f"account:{erased}", await db.now() + 2 * WINDOW
    )


async def unfilled(account_id: UUID) -> list[str]:
    """The texts of the account that hold no canary in any of its rows."""
    empty = []
    for table, model in tables().items():
        if table in THE_COMPANYS or table == "rate_limit":
            continue
        key = "id" if table == "account" else "account_id"
        for column in texts(model):
            if f"{table}.{column}" in CODES:
                continue
            row = await db.fetch_one(
                f"SELECT COUNT(*) AS filled FROM {table} WHERE {key} = $1 AND CAST({column} AS TEXT) LIKE '%canary%'",
                account_id,
            )
            if row is None or not row["filled"]:
                empty.append(f"{table}.{column}")
    return empty


async def settle_in_every_way(account_id: UUID) -> UUID:
    """Of what was delivered, one message is a dead letter, one was given up, and one, which is answered, is some
    worker's that does not settle it."""
    dead, dropped, claimed, *_ = await db.fetch("SELECT id FROM outbox WHERE account_id = $1 ORDER BY id", account_id)
    for row, ending in ((dead, "dead_at"), (dropped, "dropped_at")):
        await db.execute(f"UPDATE outbox SET {ending} = delivered_at, delivered_at = NULL WHERE id = $1", row["id"])
    await db.execute(
        "UPDATE outbox SET delivered_at = NULL, lease = $2, due_at = $3 WHERE id = $1",
        claimed["id"],
        db.uuid7(),
        await db.now() + 2 * WINDOW,
    )
    waited_for: UUID = db.as_uuid(claimed["id"])
    return waited_for


async def mail_about(house: Stage, account_id: UUID) -> set[Path]:
    rows = await db.fetch("SELECT message_id FROM outbox WHERE account_id = $1", account_id)
    ids = {row["message_id"].strip("<>").partition("@")[0] for row in rows}
    return {file for file in house.mail.iterdir() if file.stem.partition("-")[2] in ids}


# ------------------------------------------------------------------------------------------------------- the search


async def test_every_column_of_the_database_is_a_models_and_every_table_has_its_owner(database: Database) -> None:
    """What is not in a model would not be filled below."""
    known = {table: set(model._meta.fields_db_projection.values()) for table, model in tables().items()}
    assert {table: names for table, names in (await columns()).items() if table != MIGRATIONS} == known
    for table, names in known.items():
        belongs = "account_id" in names or table in {"account", "rate_limit"}
        assert belongs is (table not in THE_COMPANYS), table


async def test_nothing_of_a_deleted_account_is_left_anywhere(
    database: Database, tmp_path: Path, log: io.StringIO
) -> None:
    async with obeyed(database, tmp_path) as house, receiving() as receiver:
        await endpoints.create(None, house.installation.receivers, url=receiver.url, description=None, event_types=None)
        erased, neighbor = await two_accounts(house)
        await live(house, "acme", "canary-name", "canary")
        await live(house, "kept-0", "kept-name", "kept")
        await acknowledge(house, MAILER, 1)
        await db.advance_clock(timedelta(hours=1))
        await house.letters()
        assert await count("outbox", "template = 'enforcement-late' AND account_id IS NULL") == 1
        await house.do(BILLING, "holdDeletion", accountId=await house.account_id("kept-0"), note="kept-note")
        await house.letters()
        mail_before = await mail_about(house, erased)
        assert len(mail_before) > 10
        await fill(erased)
        waited_for = await settle_in_every_way(erased)
        before = {"steps": await steps(erased), **await account(erased)}
        neighbors_rows, neighbors_mail = await of(neighbor), await mail_about(house, neighbor)

        await db.advance_clock(WINDOW + timedelta(days=10))
        await house.letters()
        assert (await account(erased))["status"] == "DELETING"
        now = await db.now()
        await DeletionStep.create(
            id=db.uuid7(), account_id=erased, system="other", epoch=1, created_at=now, due_at=now, completed_at=now
        )
        await DeletionStep.filter(account_id=erased).update(last_error="canary-error")
        assert await unfilled(erased) == [], "a column that nobody has thought of"
        await db.execute("UPDATE outbox SET lease = NULL, delivered_at = created_at WHERE id = $1", waited_for)
        await db.advance_clock(timedelta(minutes=1))
        await house.letters()

        row = await account(erased)
        assert row["status"] == "DELETED"
        everything = await dump()
        others = [(table, one) for table, rows in everything.items() for one in rows if str(neighbor) not in one]
        assert [one for one in others if RECOGNIZED.search(one[1])] == []
        assert [one for one in others if "@acme.example" in one[1]] == [], "whose tokens they had"
        assert [one for one in others if "2033-03-03" in one[1]] == [], "until when they had paid"
        assert [one for one in everything["rate_limit"] if str(erased) in one] == []
        assert await of(neighbor) == neighbors_rows

        assert row["reference"] == deletion.tombstone_reference(f"canary-{erased}")
        assert [row[name] for name in ("plan_code", "canceled_at")] == ["essentials", before["canceled_at"]]
        assert await steps(erased) == [*before["steps"], "deletion_started", "deleted"]
        assert len([one for one in everything["enforcement"] if str(erased) in one]) == 2, "who has obeyed stays known"
        (stone,) = everything["tombstone"]
        assert all(fact in stone for fact in (str(erased), "essentials", "UNUSED"))

        files = set(house.mail.iterdir())
        last = [file.read_text() for file in files - neighbors_mail]
        assert neighbors_mail <= files
        assert not files & mail_before
        assert sorted(re.findall("^To: .*<(.+)>", "\n".join(last), re.MULTILINE)) == [
            *(f"{word}@example.com" for word in (BOBS, ALICES, CAROLS)),
            house.installation.policy.operators.email,
        ]
        (late,) = [letter for letter in last if "\nTo: Operators" in letter]
        assert ids.encode(ids.Kind.ACCOUNT, erased) in late, "told of by what remains of it"
        told = {word for letter in last for word in re.findall("canary[a-z-]*", letter)}
        assert told == {"canary-name", BOBS}, "whom the letter is to, and which account it is about"

        assert receiver.types[-1] == "account.deleted"
        assert "deletion.done" in log.getvalue()
        assert RECOGNIZED.findall(log.getvalue()) == []
        assert "@acme.example" not in log.getvalue()

        if database.dialect == "sqlite":
            told_last = {"canary-name", BOBS, "canary-"}
            assert in_files(tmp_path) <= told_last, "the last letters' and event's facts, until the log is written back"
    await database.close()
    if database.dialect == "sqlite":
        assert in_files(tmp_path) == set()


def in_files(directory: Path) -> set[str]:
    """The canaries in the bytes of SQLite's files, whether they are in use or not."""
    files = list(directory.glob("sunset.db*"))
    assert files
    found = (re.findall(b"canary-(?:(?!canary)[a-z])*", file.read_bytes()) for file in files)
    return {word.decode() for words in found for word in words}
