"""The commands, as somebody at a terminal meets them."""

import json
import os
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import jwt
import pytest

from app import cli, policy
from app.graphql.schema import printed
from app.settings import Settings
from tests.cast import Stage
from tests.cli.conftest import Play, Result, Run

PRODUCTION = {
    "SUNSET_ENVIRONMENT": "production",
    "SUNSET_PUBLIC_URL": "https://cancel.company.example",
    "SUNSET_SECRET_KEY": "0123456789abcdef0123456789abcdef",
    "SUNSET_OIDC_ISSUER": "https://id.company.example/",
    "SUNSET_OIDC_AUDIENCE": "sunset",
    "SUNSET_SMTP_URL": "smtp://user:pa55word@mail.company.example",
}


def one_line(result: Result) -> str:
    """What an expected failure looks like: nothing on stdout, one line on stderr, no traceback."""
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("sunset: ")
    assert result.err.count("\n") == 1
    return result.err


def account_line(reference: str = "acme", email: str = "alice@acme.example", **more: object) -> str:
    member = {"subject": f"member:{email}", "email": email, "name": "Alice Adams", "role": "ADMIN"}
    return json.dumps({"reference": reference, "name": reference, "planCode": "essentials", "members": [member]} | more)


# -------------------------------------------------------------------------------------------------- set-up


def test_every_command_says_what_it_does(sunset: Run) -> None:
    names = [
        "serve",
        "worker",
        "migrate",
        "import",
        "token",
        "config",
        "schema",
        "deliveries",
        "doctor",
        "policy",
        "emails",
        "staff",
        "service",
    ]
    overview = sunset("--help")
    assert overview.status == 0
    for name in names:
        assert re.search(rf"│ {name} +\w", overview.out), f"{name} has no help"
        assert sunset(name, "--help").status == 0


def test_migrate_makes_the_database_and_can_be_repeated(sunset: Run, tmp_path: Path) -> None:
    first, second = sunset("migrate"), sunset("migrate")
    assert (first.status, second.status) == (0, 0)
    assert "Applied" in first.out
    assert "Applied" not in second.out
    assert (tmp_path / "var" / "sunset.db").exists()


@pytest.fixture
def usual_umask() -> Iterator[None]:
    """What most machines have: new files can be read by everybody."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    return {
        path.name: f"{stat.S_IMODE(path.stat().st_mode):o}"
        for path in (folder, *folder.rglob("*"))
        if path.suffix != ".eml"
    }


@pytest.mark.usefixtures("usual_umask")
def test_what_is_kept_is_its_owners_alone(sunset: Run, play: Play, tmp_path: Path) -> None:
    """Names, addresses and the key: from the first moment on, and while the database is in use, with its log."""
    seen: list[dict[str, str]] = []

    async def canceled(house: Stage) -> None:
        await house.cancel()
        assert await house.letters()
        seen.append(
            {name if "last-seen" not in name else "last-seen": mode for name, mode in modes(tmp_path / "var").items()}
        )

    play(canceled)
    files = ["sunset.db", "sunset.db-wal", "sunset.db-shm", "sunset.db.migrate.lock", "secret.key", "last-seen"]
    assert seen == [dict.fromkeys(["var", "mailbox"], "700") | dict.fromkeys(files, "600")]
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "var" / "mailbox").iterdir()} == {0o600}


@pytest.mark.usefixtures("usual_umask")
def test_folders_that_are_made_on_the_way_are_their_owners_too(
    sunset: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    above = tmp_path / "above"
    above.mkdir(0o755)
    monkeypatch.setenv("SUNSET_DATA_DIR", str(above / "one" / "two"))
    assert sunset("migrate").status == 0
    assert modes(above)["above"] == "755", "what was there is not touched"
    assert (modes(above)["one"], modes(above)["two"]) == ("700", "700")


@pytest.mark.parametrize("given", [0o644, 0o664, 0o606])
def test_a_database_that_everybody_may_read_is_closed(play: Play, tmp_path: Path, given: int) -> None:
    """As versions before this one made it; with the files beside it, which a process that was killed leaves."""
    file = tmp_path / "var" / "sunset.db"
    log = Path(f"{file}-wal")
    log.touch()
    for path in (file, log):
        path.chmod(given)
    seen: list[dict[str, str]] = []

    async def look(_: Stage) -> None:
        seen.append(
            {name if "last-seen" not in name else "last-seen": mode for name, mode in modes(tmp_path / "var").items()}
        )

    play(look)
    assert {seen[0][name] for name in ("sunset.db", "sunset.db-wal", "sunset.db-shm")} == {"600"}


def test_access_that_a_group_was_given_stays(migrated: Run, tmp_path: Path) -> None:
    file = tmp_path / "var" / "sunset.db"
    file.chmod(0o640)
    assert migrated("staff", "list").status == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.usefixtures("usual_umask")
def test_a_database_elsewhere_by_a_link_is_its_owners_alone(sunset: Run, tmp_path: Path) -> None:
    """SQLite makes the file at the link's end, and its log beside that."""
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "sunset.db").symlink_to(tmp_path / "disk.db")
    assert sunset("migrate").status == 0
    assert stat.S_IMODE((tmp_path / "disk.db").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "command", [["staff", "list"], ["service", "list"], ["token", "--service", "host"], ["import", os.devnull]]
)
def test_a_database_that_is_not_there_is_not_made_by_accident(sunset: Run, tmp_path: Path, command: list[str]) -> None:
    assert "sunset migrate" in one_line(sunset(*command))
    assert not (tmp_path / "var" / "sunset.db").exists()


def test_an_old_database_is_named_as_such(sunset: Run, tmp_path: Path) -> None:
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "sunset.db").touch()
    assert "sunset migrate" in one_line(sunset("staff", "list"))


def test_wrong_settings_stop_every_command_with_their_names(sunset: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUNSET_PORTT", "1")
    monkeypatch.setenv("SUNSET_LOG_LEVEL", "loud")
    for command in (["config"], ["serve"], ["worker"], ["migrate"], ["token", "--service", "host"]):
        result = sunset(*command)
        assert (result.status, result.out) == (1, "")
        assert "SUNSET_PORTT" in result.err
        assert "SUNSET_LOG_LEVEL" in result.err
        assert "Traceback" not in result.err


def test_config_shows_what_is_in_force_and_no_secret(sunset: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PRODUCTION.items():
        monkeypatch.setenv(name, value)
    result = sunset("config")
    assert result.status == 0
    for setting in Settings.documentation():
        assert f"{setting.variable}=" in result.out
    assert "SUNSET_PUBLIC_URL=https://cancel.company.example" in result.out
    assert PRODUCTION["SUNSET_SECRET_KEY"] not in result.out
    assert "pa55word" not in result.out


def test_a_policy_is_checked_before_it_is_used(sunset: Run, tmp_path: Path) -> None:
    assert "4 plans" in sunset("policy", "check", str(policy.DEFAULT_FILE)).out
    bad = tmp_path / "policy.toml"
    bad.write_text(policy.DEFAULT_FILE.read_text().replace("lifetime_hours = 72", "lifetime_hours = 0"))
    told = one_line(sunset("policy", "check", str(bad)))
    assert str(bad) in told
    assert "confirmation.lifetime_hours" in told
    assert "nowhere.toml" in one_line(sunset("policy", "check", "nowhere.toml"))


def test_the_schema_is_printed_compared_and_written(
    sunset: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "schema.graphql"
    monkeypatch.setattr(cli, "_SCHEMA_FILE", file)
    assert sunset("schema").out == printed()
    missing = sunset("schema", "--check")
    assert missing.status == 1
    assert sunset("schema", "--write").status == 0
    assert file.read_text() == printed()
    assert sunset("schema", "--check").status == 0
    file.write_text(printed().replace("cancelAccount", "killAccount"))
    changed = sunset("schema", "--check")
    assert changed.status == 1
    assert "-  killAccount" in changed.out
    assert "+  cancelAccount" in changed.out
    assert "schema --write" in changed.err


def test_emails_are_written_to_a_folder(sunset: Run, tmp_path: Path) -> None:
    result = sunset("emails", "preview", str(tmp_path / "mails"))
    assert result.status == 0
    assert {".txt", ".html", ".eml"} == {file.suffix for file in (tmp_path / "mails").iterdir()}


# ---------------------------------------------------------------------------------------- staff and services


def test_staff_are_added_listed_and_deactivated(migrated: Run) -> None:
    add = ("staff", "add", "Csm@vendor.example", "--name", "Casey Morgan", "--role", "CUSTOMER_SUCCESS_MANAGER")
    assert migrated(*add).status == 0
    assert "csm@vendor.example" in one_line(migrated(*add))
    assert "Casey Morgan  CUSTOMER_SUCCESS_MANAGER  active" in migrated("staff", "list").out
    assert migrated("staff", "deactivate", "csm@vendor.example").status == 0
    assert re.search(r"csm@vendor.example .*deactivated \d{4}-\d\d-\d\d", migrated("staff", "list").out)
    assert "staff" in one_line(migrated("staff", "deactivate", "nobody@vendor.example"))
    assert migrated("staff", "add", "x@vendor.example", "--name", "X", "--role", "BOSS").status == 2


def test_services_are_added_listed_and_deactivated(migrated: Run) -> None:
    add = ("service", "add", "host", "--scope", "provision", "--scope", "gate")
    assert migrated(*add).status == 0
    assert "host" in one_line(migrated(*add))
    assert "host  gate,provision  active" in migrated("service", "list").out
    assert migrated("service", "deactivate", "host").status == 0
    assert "deactivated" in migrated("service", "list").out
    assert migrated("service", "add", "other", "--scope", "everything").status == 2


def test_who_is_listed_as_a_member_can_become_staff_and_the_operator_is_told(migrated: Run, tmp_path: Path) -> None:
    file = tmp_path / "accounts.jsonl"
    file.write_text(account_line())
    assert migrated("import", str(file)).status == 0
    alice = ("--subject", "member:alice@acme.example")
    told = "accounts list this subject as a member"
    nobody = migrated("staff", "add", "sam@vendor.example", "--name", "Sam", "--role", "SUPPORT")
    assert told not in nobody.out
    added = migrated("staff", "add", "alice@vendor.example", "--name", "Alice", "--role", "SUPPORT", *alice)
    assert (added.status, f"1 {told}" in added.out) == (0, True)
    system = migrated("service", "add", "robot", "--scope", "gate", *alice)
    assert f"1 {told}" in system.out
    for arguments, summary in (
        (("--dry-run",), "1 would be updated, 0 unchanged; 0 bad lines, 1 member refused. Nothing was changed."),
        ((), "1 updated, 0 unchanged; 0 bad lines, 1 member refused."),
        ((), "0 updated, 1 unchanged; 0 bad lines, 1 member refused."),
    ):
        imported = migrated("import", str(file), *arguments)
        assert imported.status == 1
        assert "line 1: members[0].subject: The subject belongs to" in imported.err
        assert summary in imported.out
    assert migrated("staff", "deactivate", "alice@vendor.example").status == 0
    assert migrated("service", "deactivate", "robot").status == 0
    back = migrated("import", str(file))
    assert (back.status, "1 updated, 0 unchanged; 0 bad lines.\n" in back.out) == (0, True)


def test_people_of_an_identity_provider_need_its_subject(migrated: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUNSET_OIDC_ISSUER", "https://id.company.example/")
    monkeypatch.setenv("SUNSET_OIDC_AUDIENCE", "sunset")
    monkeypatch.setenv("SUNSET_DEVELOPMENT_ON_NETWORK", "true")
    add = ("staff", "add", "csm@vendor.example", "--name", "Casey Morgan", "--role", "SUPPORT")
    refused = migrated(*add)
    assert refused.status == 2
    assert "--subject" in refused.err
    assert migrated(*add, "--subject", "00u1").status == 0
    assert "https://id.company.example/  00u1" in migrated("staff", "list").out
    assert "https://id.company.example/" in one_line(migrated("token", "--staff", "csm@vendor.example"))


# ---------------------------------------------------------------------------------------------------- tokens


def test_a_token_is_printed_alone_for_each_kind_of_caller(migrated: Run, tmp_path: Path) -> None:
    file = tmp_path / "accounts.jsonl"
    file.write_text(account_line())
    migrated("import", str(file))
    migrated("staff", "add", "csm@vendor.example", "--name", "Casey", "--role", "SUPPORT")
    migrated("service", "add", "host", "--scope", "provision")
    for arguments, subject in (
        (("--member", "Alice@Acme.example", "--account", "acme"), "member:alice@acme.example"),
        (("--staff", "CSM@vendor.example"), "staff:csm@vendor.example"),
        (("--service", "host"), "service:host"),
    ):
        result = migrated("token", *arguments, "--lifetime", "15m")
        assert (result.status, result.err) == (0, "")
        claims = jwt.decode(result.out.strip(), options={"verify_signature": False})
        assert (claims["sub"], claims["exp"] - claims["iat"]) == (subject, 900)
        assert re.fullmatch(r"\S+\n", result.out)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--member", "alice@acme.example", "--account", "nope"), "No account has the reference nope"),
        (("--member", "bob@acme.example", "--account", "acme"), "no member bob@acme.example of acme"),
        (("--staff", "nobody@vendor.example"), "no staff nobody@vendor.example"),
        (("--service", "nobody"), "no service nobody"),
    ],
)
def test_an_unknown_person_gets_no_token(migrated: Run, tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    file = tmp_path / "accounts.jsonl"
    file.write_text(account_line())
    migrated("import", str(file))
    assert told in one_line(migrated("token", *arguments))


def test_who_was_deactivated_gets_no_token(migrated: Run) -> None:
    migrated("staff", "add", "csm@vendor.example", "--name", "Casey", "--role", "SUPPORT")
    migrated("staff", "deactivate", "csm@vendor.example")
    assert "deactivated" in one_line(migrated("token", "--staff", "csm@vendor.example"))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--member", "alice@acme.example"),
        ("--account", "acme"),
        ("--staff", "csm@vendor.example", "--service", "host"),
        ("--service", "host", "--lifetime", "25h"),
        ("--service", "host", "--lifetime", "0s"),
        ("--service", "host", "--lifetime", "soon"),
    ],
)
def test_a_token_is_for_one_caller_and_a_day_at_most(sunset: Run, arguments: tuple[str, ...]) -> None:
    result = sunset("token", *arguments)
    assert (result.status, result.out) == (2, "")


def test_there_are_no_tokens_of_our_own_in_production(sunset: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PRODUCTION.items():
        monkeypatch.setenv(name, value)
    told = one_line(sunset("token", "--service", "host"))
    assert "production" in told
    assert "SUNSET_DEVELOPMENT_ISSUER" in told
    monkeypatch.setenv("SUNSET_DEVELOPMENT_ISSUER", "true")
    assert "SUNSET_DEVELOPMENT_ISSUER" in one_line(sunset("token", "--service", "host"))


# ---------------------------------------------------------------------------------------------------- import


def test_import_tells_what_it_did_and_which_lines_are_bad(migrated: Run, tmp_path: Path) -> None:
    file = tmp_path / "accounts.jsonl"
    hostile = json.dumps({"\u001b[2J" + "k" * 5_000: 1, "reference": "x", "name": "x", "planCode": "startup"})
    file.write_text("\n".join([account_line(), account_line("bad", plan="startup"), "{", hostile, account_line("b")]))
    rehearsed = migrated("import", str(file), "--dry-run")
    assert rehearsed.status == 1
    assert "Nothing was changed" in rehearsed.out
    result = migrated("import", str(file))
    assert result.status == 1
    assert result.out.startswith("2 accounts created, 0 updated, 0 unchanged; 3 bad lines.")
    told = result.err.splitlines()
    assert [line.partition(":")[0] for line in told] == ["line 2", "line 3", "line 4"]
    assert "plan: There is no such key" in told[0]
    assert "\x1b" not in result.err
    assert len(told[2]) < 400
    file.write_text(account_line())
    again = migrated("import", str(file))
    assert (again.status, again.err) == (0, "")
    assert again.out.startswith("0 accounts created, 0 updated, 1 unchanged; 0 bad lines.")


def test_import_reads_a_pipe(migrated: Run) -> None:
    piped = subprocess.run(
        [sys.executable, "-m", "app.cli", "import", "-"],
        input=account_line() + "\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (piped.returncode, piped.stderr) == (0, "")
    assert piped.stdout.startswith("1 accounts created")


def test_import_names_a_file_that_it_cannot_read(migrated: Run, tmp_path: Path) -> None:
    assert "nowhere.jsonl" in one_line(migrated("import", "nowhere.jsonl"))
    assert str(tmp_path) in one_line(migrated("import", str(tmp_path)))


# ----------------------------------------------------------------------------------------------------- serve


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Served:
    """A `sunset serve` that has begun to listen."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "serve", "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        self.told = ""
        while "gatekeeper" not in self.told or not self.told.endswith("\n\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], 60)
            chunk = os.read(self.process.stdout.fileno(), 65_536) if ready else b""
            assert chunk, f"it did not start: {self.told}"
            self.told += chunk.decode()

    def token(self, who: str) -> str:
        found = re.search(rf"^{re.escape(who)}.*\n(\S+)$", self.told, re.MULTILINE)
        assert found is not None
        return found[1]

    def ask(self, who: str, query: str) -> dict[str, object]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql",
            data=json.dumps({"query": query}).encode(),
            headers={"Authorization": f"Bearer {self.token(who)}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
            assert response.headers["server"] is None
            answer: dict[str, object] = json.load(response)
            return answer

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stdout is not None
        with self.process.stdout:
            return self.process.wait(timeout=60)


@pytest.fixture
def serve() -> Iterator[Callable[[], Served]]:
    running: list[Served] = []

    def start() -> Served:
        running.append(Served(free_port()))
        return running[-1]

    yield start
    for one in running:
        if one.process.poll() is None:
            one.stop()


def test_serve_needs_no_set_up_and_keeps_its_data(serve: Callable[[], Served], sunset: Run, tmp_path: Path) -> None:
    """From nothing to an answer with a pasted token; the second start finds what the first one made."""
    first = serve()
    assert f"http://127.0.0.1:{first.port}/graphiql" in first.told
    assert f"http://127.0.0.1:{first.port}/mailbox" in first.told
    for who in ("alice@acme.example", "csm@vendor.example", "host"):
        assert first.ask(who, "{ viewer { __typename } }") == {"data": {"viewer": {"__typename": "Viewer"}}}
    assert first.stop() == 0
    file = tmp_path / "more.jsonl"
    file.write_text(account_line("later"))
    assert sunset("import", str(file)).status == 0
    assert sunset("staff", "deactivate", "support@vendor.example").status == 0
    second = serve()
    assert "support@vendor.example" not in second.told
    assert second.stop() == 0
    assert sunset("import", str(file)).out.startswith("0 accounts created, 0 updated, 1 unchanged")


@pytest.mark.parametrize("command", [["serve", "--host", "0.0.0.0"], ["serve"], ["worker"]])  # noqa: S104
def test_development_is_not_served_to_a_network_by_mistake(
    sunset: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    """By option or by variable: everybody on it would be an administrator."""
    if "--host" not in command:
        monkeypatch.setenv("SUNSET_HOST", "0.0.0.0")  # noqa: S104
    told = one_line(sunset(*command))
    assert "SUNSET_HOST is 0.0.0.0" in told
    assert "SUNSET_ENVIRONMENT=production" in told
    assert not (tmp_path / "var").exists()


def test_on_a_network_no_token_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a container prints is its log, and more people read that than may be everybody."""
    monkeypatch.setenv("SUNSET_DEVELOPMENT_ON_NETWORK", "true")
    with subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve", "--port", str(free_port())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        text=True,
    ) as process:
        assert process.stdout is not None
        told = ""
        for line in process.stdout:
            told += line
            if "sunset token" in line or "eyJ" in line:
                break
        process.terminate()
        told += process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "/graphiql" in told
    assert "sunset token --staff EMAIL" in told
    assert "eyJ" not in told


def test_serve_fails_when_its_port_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = subprocess.run(
            [sys.executable, "-m", "app.cli", "serve", "--port", str(taken.getsockname()[1])],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode not in (0, None)
    assert "address already in use" in ended.stderr
    assert "eyJ" not in ended.stdout


def test_serve_refuses_a_policy_without_the_plans_in_use(
    migrated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "accounts.jsonl"
    file.write_text(account_line())
    assert migrated("import", str(file)).status == 0
    own = tmp_path / "policy.toml"
    own.write_text(policy.DEFAULT_FILE.read_text().replace('"essentials"', '"basic"'))
    monkeypatch.setenv("SUNSET_POLICY_FILE", str(own))
    told = migrated("serve")
    assert told.status == 1
    assert "essentials" in told.err
    assert "Traceback" not in told.err


def test_a_worker_of_its_own_stops_in_order(migrated: Run) -> None:
    process = subprocess.Popen([sys.executable, "-m", "app.cli", "worker"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr:
        assert "worker.started" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
