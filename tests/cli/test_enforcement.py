"""`sunset enforcement`, and what else tells who runs Sunset that a system has not obeyed."""

import re
from pathlib import Path

import pytest

from app import db
from tests.cast import Stage
from tests.cli.conftest import Play, Run
from tests.cli.test_doctor import nothing, only_trouble, verdicts
from tests.enforcing import MINUTE, obeyed
from tests.rules.test_policy import WITH_ITS_EXAMPLE

SIGN_IN = '\n[[enforcing_systems]]\ncode = "login"\nname = "Sign-in"\nwithin_minutes = 30\n'


@pytest.fixture(autouse=True)
def named(environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The policy of these commands: the mailer is late after 10 minutes, the sign-in after 30."""
    file = tmp_path / "policy.toml"
    file.write_text(WITH_ITS_EXAMPLE + SIGN_IN, encoding="utf-8")
    monkeypatch.setenv("SUNSET_POLICY_FILE", str(file))
    return file


async def canceled(house: Stage) -> None:
    """Acme, a quarter of an hour ago; nobody has acknowledged it."""
    async with obeyed(db.bound(), house.mail.parent) as obeying:
        await obeying.cancel()
        await db.advance_clock(15 * MINUTE)
        await obeying.letters()


def rows(sunset: Run, *options: str) -> list[list[str]]:
    result = sunset("enforcement", "list", *options)
    assert result.status == 0
    return [re.split(r"\s{2,}", line) for line in result.out.splitlines()]


def test_what_is_not_acknowledged_is_listed(sunset: Run, play: Play) -> None:
    play(canceled)
    mailer, login = rows(sunset)
    assert (mailer[0], mailer[2:4], mailer[-1]) == ("acme", ["1", "mailer"], "late")
    assert (login[0], login[2:4], len(login)) == ("acme", ["1", "login"], len(mailer) - 1)
    assert len(mailer[1]) == 23, "the id that the API and the events use"
    assert rows(sunset, "--late") == [mailer]
    assert rows(sunset, "--system", "login") == [login]
    assert rows(sunset, "--system", "login", "--late") == []
    short = sunset("enforcement", "list", "--limit", "1")
    assert (short.out.count("\n"), short.err) == (1, "There are more: --limit 2\n")


def test_a_late_system_is_a_failure_to_the_doctor(sunset: Run, play: Play) -> None:
    play(canceled)
    told = only_trouble(sunset("doctor"), "enforcement_late", "FAIL")
    assert "mailer (1 account)" in told
    assert "login" not in told
    assert "sunset enforcement list --late" in told


def test_a_system_for_which_nobody_may_speak_is_a_warning(sunset: Run, play: Play) -> None:
    play(nothing)
    assert "waits for mailer, login, and" in only_trouble(sunset("doctor"), "enforcing_systems", "warn")
    assert sunset("service", "add", "mailer", "--scope", "enforcement").status == 0
    assert sunset("service", "add", "login", "--scope", "gate").status == 0
    assert "waits for login, and" in only_trouble(sunset("doctor"), "enforcing_systems", "warn")
    assert sunset("service", "deactivate", "login").status == 0
    assert sunset("service", "add", "login", "--scope", "gate", "--scope", "enforcement").status == 0
    assert verdicts(sunset("doctor"))["enforcing_systems"] == "ok"
    assert sunset("service", "deactivate", "mailer").status == 0
    assert "waits for mailer, and" in only_trouble(sunset("doctor"), "enforcing_systems", "warn")


def test_a_policys_systems_are_counted_when_it_is_checked(sunset: Run, named: Path) -> None:
    assert sunset("policy", "check", str(named)).out.endswith("3 offers, 2 enforcing systems.\n")
