"""`sunset doctor`: well when all is well, and for each thing that can be wrong the line that says so."""

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from app import alarms, db, invariants, outbox, policy
from app.errors import Unavailable
from tests.cast import Stage
from tests.cli.conftest import Play, Result, Run
from tests.delivery.smtp_server import SmtpServer
from tests.postgres import PostgresServer

CHECKS = [
    "settings",
    "policy",
    "mail",
    "files",
    "database",
    "schema",
    "clock",
    "clock_offset",
    "restores",
    "plans",
    "members",
    "enforcing_systems",
    *alarms.Name,
    "invariants",
]


def verdicts(result: Result) -> dict[str, str]:
    """Each check's first word; what is indented belongs to the check above."""
    assert result.err == ""
    found = [line.split(maxsplit=2) for line in result.out.splitlines() if not line.startswith(" ")]
    assert result.status == int(any(verdict == "FAIL" for verdict, *_ in found))
    assert len({name for _, name, _ in found}) == len(found), "one line for each check"
    return {name: verdict for verdict, name, _ in found}


def troubles(result: Result) -> dict[str, str]:
    """The lines of the checks that are not well."""
    wrong = {name for name, verdict in verdicts(result).items() if verdict != "ok"}
    return {name: line for line in result.out.splitlines() for name in wrong if name in line.split()[:2]}


def only_trouble(result: Result, name: str, verdict: str) -> str:
    (found,) = troubles(result).items()
    assert (found[0], found[1].split()[0]) == (name, verdict)
    return found[1]


async def nothing(_: Stage) -> None:
    """The demo company is there, and has done nothing."""


def doing(statement: str, *values: object) -> Callable[[Stage], Awaitable[None]]:
    async def scene(_: Stage) -> None:
        assert await db.execute(statement, *values) >= 1

    return scene


def later(after: timedelta, first: Callable[[Stage], Awaitable[object]]) -> Callable[[Stage], Awaitable[None]]:
    """It was done that long ago, and nobody has worked since."""

    async def scene(house: Stage) -> None:
        await first(house)
        await db.advance_clock(after)

    return scene


# --------------------------------------------------------------------------------------------------- all is well


def test_a_healthy_installation_is_well_in_every_line(sunset: Run, play: Play) -> None:
    play(nothing)
    result = sunset("doctor")
    assert result.status == 0
    assert verdicts(result) == dict.fromkeys(CHECKS, "ok")
    assert f"{len(invariants.RULES)} rules hold on every row" in result.out


def test_monitoring_gets_the_same_as_json(sunset: Run, play: Play) -> None:
    play(doing("UPDATE account SET plan_code = 'forgotten' WHERE reference = 'acme'"))
    result = sunset("doctor", "--json")
    told = json.loads(result.out)
    assert (result.status, result.err, told["ok"]) == (1, "", False)
    assert {check["name"]: check["verdict"] for check in told["checks"]} == verdicts(sunset("doctor"))
    (plans,) = [check for check in told["checks"] if check["name"] == "plans"]
    assert plans["verdict"] == "FAIL"
    assert "forgotten" in plans["message"]


@pytest.mark.postgres
def test_it_examines_postgresql(sunset: Run, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    name = asyncio.run(postgres_server.create_database())
    monkeypatch.setenv("SUNSET_DATABASE_URL", postgres_server.url(name))
    try:
        assert verdicts(sunset("doctor")) == dict.fromkeys(CHECKS, "ok")
    finally:
        asyncio.run(postgres_server.drop_database(name))
    assert name in only_trouble(sunset("doctor"), "database", "FAIL")


def test_it_sends_nothing_and_changes_nothing(sunset: Run, play: Play, tmp_path: Path) -> None:
    async def canceled(house: Stage) -> None:
        await house.cancel()

    play(canceled)
    file = tmp_path / "var" / "sunset.db"
    before = file.read_bytes()
    assert sunset("doctor").status == 0
    assert file.read_bytes() == before
    assert list((tmp_path / "var" / "mailbox").iterdir()) == []


# --------------------------------------------------------------------------------------------- settings and policy


def test_wrong_settings_are_all_that_can_be_said(sunset: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUNSET_PORTT", "1")
    monkeypatch.setenv("SUNSET_LOG_LEVEL", "loud")
    result = sunset("doctor")
    assert verdicts(result) == {"settings": "FAIL"}
    assert "SUNSET_PORTT" in result.out
    assert "SUNSET_LOG_LEVEL" in result.out


def test_a_policy_that_cannot_be_used_is_named_and_the_rows_are_looked_at_nevertheless(
    migrated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "policy.toml"
    own.write_text(policy.DEFAULT_FILE.read_text().replace("lifetime_hours = 72", "lifetime_hours = 0"))
    monkeypatch.setenv("SUNSET_POLICY_FILE", str(own))
    result = migrated("doctor")
    assert "confirmation.lifetime_hours" in only_trouble(result, "policy", "FAIL")
    assert "invariants" in verdicts(result)


def test_plans_in_use_that_the_policy_lacks_are_named(
    sunset: Run, play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(nothing)
    own = tmp_path / "policy.toml"
    own.write_text(policy.DEFAULT_FILE.read_text().replace('"essentials"', '"basic"'))
    monkeypatch.setenv("SUNSET_POLICY_FILE", str(own))
    assert "essentials" in only_trouble(sunset("doctor"), "plans", "FAIL")


# ------------------------------------------------------------------------------------------------------- database


def test_a_database_that_is_not_there_is_not_made(sunset: Run, tmp_path: Path) -> None:
    assert "sunset migrate" in only_trouble(sunset("doctor"), "database", "FAIL")
    assert not (tmp_path / "var" / "sunset.db").exists()


def test_a_file_that_is_no_database_is_named_as_such(sunset: Run, tmp_path: Path) -> None:
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "sunset.db").write_text("This is not a database. " * 1_000)
    assert "not a database" in only_trouble(sunset("doctor"), "database", "FAIL")


def test_a_server_that_is_away_is_a_failure_and_no_traceback(sunset: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        port = nobody.getsockname()[1]
        monkeypatch.setenv("SUNSET_DATABASE_URL", f"postgres://sunset:pa55word@127.0.0.1:{port}/sunset")
        result = sunset("doctor")
    only_trouble(result, "database", "FAIL")
    assert "pa55word" not in result.out


def test_a_schema_of_an_older_version_wants_migrating(sunset: Run, tmp_path: Path) -> None:
    (tmp_path / "var").mkdir(mode=0o700)
    (tmp_path / "var" / "sunset.db").touch()
    result = sunset("doctor")
    assert "sunset migrate" in only_trouble(result, "schema", "FAIL")
    assert "invariants" not in verdicts(result), "it cannot look at tables that are not there"


@pytest.mark.parametrize("statement", ["DROP TABLE webhook_delivery", "ALTER TABLE outbox RENAME COLUMN due_at TO due"])
def test_a_schema_that_is_not_what_the_migrations_made_is_a_failure(sunset: Run, play: Play, statement: str) -> None:
    async def scene(_: Stage) -> None:
        await db.execute(statement)

    play(scene)
    line = only_trouble(sunset("doctor"), "schema", "FAIL")
    assert "Tables are not what the migrations made" in line


def test_a_schema_of_a_newer_version_is_a_warning(sunset: Run, play: Play) -> None:
    """While an upgrade is under way the old version's processes still run."""
    play(
        doing(
            "INSERT INTO tortoise_migrations (app, name, applied_at) VALUES ('models', 'm9999_future', $1)",
            datetime.fromisoformat("2026-01-01T00:00:00+00:00"),
        )
    )
    result = sunset("doctor")
    assert "m9999_future" in only_trouble(result, "schema", "warn")
    assert result.status == 0


# --------------------------------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(-90, "FAIL"), (-30, "warn"), (-1, "ok"), (1, "ok"), (30, "warn"), (90, "FAIL")]
)
def test_a_clock_that_differs_from_the_databases_is_told(
    migrated: Run, monkeypatch: pytest.MonkeyPatch, seconds: int, verdict: str
) -> None:
    right = db.database_now

    async def wrong() -> datetime:
        return await right() + timedelta(seconds=seconds)

    monkeypatch.setattr(db, "database_now", wrong)
    result = migrated("doctor")
    assert verdicts(result)["clock"] == verdict
    if verdict != "ok":
        assert ("behind" if seconds > 0 else "ahead of") in only_trouble(result, "clock", verdict)


def test_a_clock_that_was_moved_is_told_and_is_wrong_where_the_clock_is_the_systems(
    migrated: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrated("clock", "advance", "60d")
    developed = migrated("doctor")
    assert verdicts(developed) == dict.fromkeys(CHECKS, "ok")
    assert "60 days" in developed.out
    monkeypatch.setenv("SUNSET_CLOCK", "system")
    assert "SUNSET_CLOCK" in only_trouble(migrated("doctor"), "clock_offset", "FAIL")


# ----------------------------------------------------------------------------------------------------------- mail


def test_a_mail_server_is_tried_without_sending(migrated: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with SmtpServer(login=("sunset", "pa55word")) as server:
        monkeypatch.setenv("SUNSET_SMTP_URL", server.url.replace("//", "//sunset:pa55word@"))
        result = migrated("doctor")
        assert verdicts(result)["mail"] == "ok"
        assert "logged in" in result.out
        assert (server.messages, set(server.commands)) == ([], {"EHLO", "QUIT"})


def test_a_mail_server_that_cannot_be_used_is_a_failure(migrated: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with SmtpServer(login=("sunset", "pa55word")) as server:
        monkeypatch.setenv("SUNSET_SMTP_URL", server.url.replace("//", "//sunset:wr0ng@"))
        refused = migrated("doctor")
        monkeypatch.setenv("SUNSET_SMTP_STARTTLS", "required")
        without_tls = migrated("doctor")
    away = migrated("doctor")
    for result, told in ((refused, "535"), (without_tls, "STARTTLS"), (away, "No connection")):
        (line,) = [line for line in result.out.splitlines() if line.startswith("FAIL")]
        assert line.split()[1] == "mail"
        assert told in line
        assert "wr0ng" not in result.out + result.err
        assert result.status == 1


def test_a_mail_server_that_does_not_answer_is_given_up(migrated: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with SmtpServer(stall_at="EHLO") as server:
        monkeypatch.setenv("SUNSET_SMTP_URL", server.url)
        monkeypatch.setenv("SUNSET_SMTP_TIMEOUT", "1")
        assert "did not finish" in only_trouble(migrated("doctor"), "mail", "FAIL")


def test_a_mailbox_folder_that_cannot_be_written_is_a_failure(migrated: Run, tmp_path: Path) -> None:
    (tmp_path / "var" / "mailbox").write_text("a file where the folder should be")
    (tmp_path / "var" / "mailbox").chmod(0o600)
    assert "mailbox" in only_trouble(migrated("doctor"), "mail", "FAIL")


# ------------------------------------------------------------------------------------------- what wants a person


@pytest.mark.parametrize(
    ("late", "verdict"), [(timedelta(minutes=1), "ok"), (timedelta(minutes=6), "warn"), (timedelta(hours=2), "FAIL")]
)
def test_work_that_is_not_done_is_a_warning_and_then_a_failure(
    sunset: Run, play: Play, late: timedelta, verdict: str
) -> None:
    play(later(policy.load().confirmation_lifetime + late, lambda house: house.request_cancellation()))
    result = sunset("doctor")
    assert verdicts(result)["timers_overdue"] == verdict
    if verdict != "ok":
        assert "expire_request (1 due" in only_trouble(result, "timers_overdue", verdict)


def test_a_deletion_that_is_overdue_is_a_failure(sunset: Run, play: Play) -> None:
    async def canceled_and_told(house: Stage) -> None:
        await house.cancel()
        await house.letters()
        await db.execute("UPDATE account SET reminder_due_at = NULL")

    play(later(timedelta(days=60, minutes=50), canceled_and_told))
    assert verdicts(sunset("doctor"))["deletions_overdue"] == "ok"
    play(later(timedelta(minutes=20), nothing))
    assert "1 deletion " in only_trouble(sunset("doctor"), "deletions_overdue", "FAIL")


def test_members_who_are_staff_are_a_warning(sunset: Run, play: Play) -> None:
    """They are none, and the host does not know yet."""
    play(doing("UPDATE staff SET subject = 'member:alice@acme.example' WHERE email = 'support@vendor.example'"))
    told = only_trouble(sunset("doctor"), "members", "warn")
    assert "1 member is staff" in told
    assert "refused until" not in told, "no sync is refused for it"


def test_halted_deletions_are_a_failure(sunset: Run, play: Play) -> None:
    play(
        doing(
            "INSERT INTO deletion_breaker (id, tripped_at, due, allowed) VALUES ($1, $2, 40, 10)",
            db.uuid7(),
            datetime.fromisoformat("2026-01-01T00:00:00+00:00"),
        )
    )
    assert "sunset deletions list --due" in only_trouble(sunset("doctor"), "deletions_halted", "FAIL")


def test_dead_letters_are_a_warning(sunset: Run, play: Play) -> None:
    async def one_is_dead(house: Stage) -> None:
        await house.cancel()
        alice, carol = await outbox.claim(2)
        await outbox.failed(alice, "550", permanent=True)
        await outbox.delivered(carol)

    play(one_is_dead)
    result = sunset("doctor")
    assert "1 message could" in only_trouble(result, "dead_letters", "warn")
    assert result.status == 0


def test_messages_that_nobody_takes_are_a_failure(sunset: Run, play: Play) -> None:
    play(later(timedelta(minutes=14), lambda house: house.cancel()))
    assert verdicts(sunset("doctor"))["messages_overdue"] == "ok"
    play(later(timedelta(minutes=2), nothing))
    assert "2 messages due" in only_trouble(sunset("doctor"), "messages_overdue", "FAIL")


def test_each_broken_row_is_listed_with_what_is_wrong(sunset: Run, play: Play) -> None:
    found: list[str] = []

    async def broken(_: Stage) -> None:
        await db.execute("UPDATE account SET epoch = epoch + 1 WHERE reference IN ('acme', 'globex')")
        rows = await db.fetch("SELECT id FROM account WHERE reference IN ('acme', 'globex')")
        found.extend(row["id"] for row in rows)

    play(broken)
    result = sunset("doctor")
    assert "broken 2 times" in only_trouble(result, "invariants", "FAIL")
    lines = [line for line in result.out.splitlines() if line.startswith(" ")]
    assert {line.split()[2] for line in lines} == set(found)
    assert all("history_ends_where_the_account_is: account" in line for line in lines)


def test_broken_rows_beyond_the_first_are_counted(sunset: Run, play: Play) -> None:
    async def many(_: Stage) -> None:
        for number in range(invariants.LISTED + 3):
            await db.execute(
                "INSERT INTO account (id, reference, name, plan_code, status, epoch, last_sequence, created_at) "
                "VALUES ($1, $2, 'N', 'essentials', 'ACTIVE', 7, 0, $3)",
                db.uuid7(),
                f"many-{number}",
                await db.now(),
            )

    play(many)
    result = sunset("doctor")
    lines = [line for line in result.out.splitlines() if line.startswith(" ")]
    assert len(lines) == invariants.LISTED + 1
    assert lines[-1].strip() == "history_ends_where_the_account_is: and 3 more"


def test_a_database_that_goes_away_meanwhile_is_a_failure(migrated: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone() -> list[invariants.Finding]:
        raise Unavailable("The database cannot be reached.")

    monkeypatch.setattr(invariants, "check", gone)
    result = migrated("doctor")
    assert "cannot be reached" in only_trouble(result, "database", "FAIL")


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["var", "var/mailbox", "var/secret.key"])
def test_what_others_on_the_machine_may_look_at_is_named(sunset: Run, play: Play, tmp_path: Path, name: str) -> None:
    """Folders that were there, or were made by an earlier version, are told of and left as they are."""
    play(nothing)
    (tmp_path / "var" / "mailbox").mkdir(mode=0o700)
    path = tmp_path / name
    path.chmod(0o755)
    result = sunset("doctor")
    assert "chmod" in only_trouble(result, "files", "warn")
    assert f"      {path} (755)" in result.out.splitlines()
    assert path.stat().st_mode & 0o777 == 0o755
    path.chmod(0o750)
    assert verdicts(sunset("doctor"))["files"] == "ok", "a group was let in on purpose"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_database_that_is_somebody_elses_is_told_of(sunset: Run, play: Play, tmp_path: Path) -> None:
    play(nothing)
    file = tmp_path / "var" / "sunset.db"
    os.chown(file, 10_001, 10_001)
    file.chmod(0o644)
    result = sunset("doctor")
    only_trouble(result, "files", "warn")
    assert f"{file} (644)" in result.out
