"""`sunset deliveries`: what an operator sees of the emails, and what becomes of those they retry or drop."""

import re
from email import message_from_bytes
from pathlib import Path

import pytest

from app import cli, db, outbox
from tests.cast import ALICE, CAROL, CSM, Stage
from tests.cli.conftest import Play, Run
from tests.cli.test_cli import one_line

UNKNOWN = "01980000-0000-7000-8000-000000000000"


async def two_dead_one_delivered_one_due(house: Stage) -> None:
    """Acme's cancellation reached nobody; of globex's opened one, one email is sent and one is on its way."""
    await house.cancel()
    for message in await outbox.claim(9):
        await outbox.failed(message, f"mail.test answered 550 {message.recipient_name.split()[0]}", permanent=True)
    await house.request_cancellation("gina@globex.example", "globex")
    for message in await outbox.claim(9):
        if message.recipient_address == CSM:
            await outbox.delivered(message)
        else:
            await outbox.release(message)


@pytest.fixture
def played(play: Play) -> Play:
    play(two_dead_one_delivered_one_due)
    return play


def rows(sunset: Run, *options: str) -> list[list[str]]:
    result = sunset("deliveries", "list", *options)
    assert result.status == 0
    return [re.split(r"\s{2,}", line) for line in result.out.splitlines()]


def of(sunset: Run, address: str) -> str:
    """The id of the message to somebody."""
    (found,) = [row[0] for row in rows(sunset) if address in row]
    return found


def states(sunset: Run) -> dict[str, str]:
    return {row[4]: row[1] for row in rows(sunset)}


def mailbox(tmp_path: Path) -> dict[str, list[str]]:
    """The Message-IDs that somebody has."""
    found: dict[str, list[str]] = {}
    for file in (tmp_path / "var" / "mailbox").glob("*.eml"):
        letter = message_from_bytes(file.read_bytes())
        found.setdefault(str(letter["To"]).split("<")[-1].rstrip(">"), []).append(letter["Message-ID"])
    return found


def test_every_state_can_be_asked_for() -> None:
    assert {one.name: one.value.upper() for one in cli._DeliveryState} == {one.name: one for one in outbox.State}


def test_messages_are_listed_from_the_newest_back_with_why_they_failed(played: Play, sunset: Run) -> None:
    listed = rows(sunset)
    assert [(row[1], row[3]) for row in listed[2:]] == [
        ("DEAD", "cancellation-notice"),
        ("DEAD", "cancellation-confirmed"),
    ]
    assert {row[1] for row in listed[:2]} == {"DELIVERED", "DUE"}
    assert [row[-1] for row in listed[2:]] == ["mail.test answered 550 Carol", "mail.test answered 550 Alice"]
    assert rows(sunset, "--state", "dead") == rows(sunset, "--account", "acme") == listed[2:]
    assert len(rows(sunset, "--state", "due", "--state", "dead")) == 3


def test_a_list_that_is_cut_says_so(played: Play, sunset: Run) -> None:
    cut = sunset("deliveries", "list", "--limit", "3")
    assert (cut.status, len(cut.out.splitlines())) == (0, 3)
    assert "--limit" in cut.err
    whole = sunset("deliveries", "list", "--limit", "4")
    assert (len(whole.out.splitlines()), whole.err) == (4, "")


def test_an_unknown_account_is_told_from_one_without_messages(played: Play, sunset: Run) -> None:
    assert rows(sunset, "--account", "initech") == []
    assert "No account has the reference hooli" in one_line(sunset("deliveries", "list", "--account", "hooli"))


def test_a_message_is_shown_with_its_facts_and_without_its_links(played: Play, sunset: Run) -> None:
    shown = sunset("deliveries", "show", of(sunset, ALICE))
    assert shown.status == 0
    for fact in (ALICE, "DEAD", "cancellation-confirmed", "mail.test answered 550 Alice", '"account_name": "Acme"'):
        assert fact in shown.out
    assert '"purpose": "restart"' in shown.out
    assert "token" not in shown.out
    assert "eyJ" not in shown.out
    (message_id,) = re.findall(r"<\w+@[\w.-]+>", shown.out)
    assert sunset("deliveries", "show", message_id).out == shown.out


def test_a_message_that_is_not_there_is_refused_and_what_is_no_id_is_wrong_usage(migrated: Run) -> None:
    for command in ("show", "retry", "drop"):
        assert f"There is no message {UNKNOWN}" in one_line(migrated("deliveries", command, UNKNOWN))
        assert migrated("deliveries", command, "acme").status == 2


def test_what_a_server_said_does_not_move_the_cursor(played: Play, sunset: Run) -> None:
    async def hostile(_: Stage) -> None:
        await db.execute("UPDATE outbox SET last_error = $1 WHERE dead_at IS NOT NULL", "\x1b[2J\u202e" + "x" * 5_000)

    played(hostile)
    for arguments in (("list",), ("show", of(sunset, ALICE))):
        out = sunset("deliveries", *arguments).out
        assert "\x1b" not in out
        assert "\u202e" not in out
        assert "x" * 1_000 not in out


def test_a_dead_letter_that_is_retried_is_delivered_as_the_same_message(
    played: Play, sunset: Run, tmp_path: Path
) -> None:
    alice = of(sunset, ALICE)
    shown = sunset("deliveries", "show", alice).out
    retried = sunset("deliveries", "retry", alice)
    assert (retried.status, retried.out, retried.err) == (0, f"Message {alice} is due now.\n", "")
    assert states(sunset)[ALICE] == "DUE"

    async def deliver(house: Stage) -> None:
        await house.letters()

    played(deliver)
    assert states(sunset)[ALICE] == "DELIVERED"
    (message_id,) = mailbox(tmp_path)[ALICE]
    assert message_id in shown
    assert CAROL not in mailbox(tmp_path), "the other one stays dead"
    assert "was delivered at" in one_line(sunset("deliveries", "retry", alice))


def test_one_that_is_refused_keeps_no_other_from_being_retried(played: Play, sunset: Run) -> None:
    mixed = sunset("deliveries", "retry", of(sunset, CSM), UNKNOWN, of(sunset, ALICE))
    assert mixed.status == 1
    assert mixed.out == f"Message {of(sunset, ALICE)} is due now.\n"
    assert [line.startswith("sunset: ") for line in mixed.err.splitlines()] == [True, True]
    assert states(sunset)[CSM] == "DELIVERED"


def test_all_dead_letters_are_retried_at_once(played: Play, sunset: Run) -> None:
    for wrong in ((), ("--all-dead", UNKNOWN)):
        assert sunset("deliveries", "retry", *wrong).status == 2
    assert sunset("deliveries", "retry", "--all-dead").out == "2 dead letters are due now.\n"
    assert {states(sunset)[address] for address in (ALICE, CAROL)} == {"DUE"}


def test_what_was_dropped_is_listed_and_not_delivered(played: Play, sunset: Run, tmp_path: Path) -> None:
    gina = "gina@globex.example"
    dropped = sunset("deliveries", "drop", of(sunset, gina), of(sunset, ALICE))
    assert (dropped.status, dropped.err) == (0, "")

    async def deliver(house: Stage) -> None:
        await house.letters()

    played(deliver)
    assert (states(sunset)[gina], states(sunset)[ALICE]) == ("DROPPED", "DROPPED")
    assert mailbox(tmp_path) == {}
    assert "was dropped at" in one_line(sunset("deliveries", "drop", of(sunset, ALICE)))
    assert "was dropped at" in one_line(sunset("deliveries", "retry", of(sunset, gina)))
