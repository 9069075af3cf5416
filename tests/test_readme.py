"""README.md is what the code does: its story is run as it stands there, its tables are compared with the code."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
import typer
from graphql import GraphQLInterfaceType, GraphQLObjectType

from app import (
    endpoints,
    errors,
    events,
    importing,
    lifecycle,
    live,
    messages,
    outbox,
    policy,
    provisioning,
    webhooks,
    worker,
)
from app.cli import app as commands
from app.db import Database
from app.delivery import webhook
from app.graphql.documents import MAX_ERRORS
from app.graphql.execution import SLOWEST_SECONDS
from app.graphql.schema import SCHEMA
from app.graphql.subscriptions import MAX_ACCOUNTS
from app.graphql.websocket import MAX_MESSAGE_BYTES, MAX_OPERATIONS
from app.server import Limits
from app.settings import Settings
from tests.cast import stage
from tests.rules.test_policy import WITH_ITS_EXAMPLE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- the tables


def _names(some: frozenset[Any], of: type[Any]) -> str:
    return ", ".join(f"`{one.value}`" for one in of if one in some)


def _sentence(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split())


def settings() -> Iterator[str]:
    for one in Settings.documentation():
        yield f"| `{one.variable}` | {one.default} | {one.description} |"


def rules() -> Iterator[str]:
    for action, rule in lifecycle.RULES.items():
        who, phases = _names(rule.who, lifecycle.Relation), _names(rule.phases, lifecycle.Phase)
        yield f"| `{action.value}` | {who} | {phases} |"


def emails() -> Iterator[str]:
    for template, email in messages.CATALOGUE.items():
        yield f"| `{template}` | {email.about} |"


def webhook_events() -> Iterator[str]:
    for kind, event in events.CATALOGUE.items():
        more = ", ".join(f"`{name}`" for name in event.more)
        yield f"| `{kind.value}` | {more} | {event.description} |"


def refusals() -> Iterator[str]:
    kinds = SCHEMA._schema
    interface = kinds.type_map["UserError"]
    assert isinstance(interface, GraphQLInterfaceType)
    for kind in sorted(kinds.get_implementations(interface).objects, key=lambda kind: kind.name):
        assert isinstance(kind, GraphQLObjectType)
        more = ", ".join(f"`{name}`" for name in kind.fields if name != "message")
        yield f"| `{kind.name}` | {more} | {kind.description} |"


def codes() -> Iterator[str]:
    for kind in errors.RequestError.__subclasses__():
        yield f"| `{kind.code}` | {kind.http_status} | {_sentence(kind.__doc__)} |"


def command_lines() -> Iterator[str]:
    def walk(command: Any, name: str) -> Iterator[str]:
        if below := getattr(command, "commands", None):
            for word, one in below.items():
                yield from walk(one, f"{name} {word}")
            return
        given = "".join(f" {one.name.upper()}" for one in command.params if one.param_type_name == "argument")
        yield f"| `{name}{given}` | {_sentence(command.help)} |"

    yield from walk(typer.main.get_command(commands), "sunset")


@pytest.mark.parametrize(
    "table", [settings, rules, emails, webhook_events, refusals, codes, command_lines], ids=lambda table: table.__name__
)
def test_a_table_is_what_the_code_says(table: Any) -> None:
    """A missing line is one to paste."""
    expected = list(table())
    assert len(expected) > 1
    assert [line for line in expected if line not in README.splitlines()] == []


def test_every_code_that_the_endpoint_writes_by_itself_is_explained() -> None:
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "app" / "graphql").glob("*.py"))
    written = set(re.findall(r'"code": "([A-Z_]+)"', source))
    assert "INTERNAL_SERVER_ERROR" in written
    assert {code for code in written if f"\n| `{code}` |" not in README} == set()


def test_every_key_of_the_policy_is_explained() -> None:
    def keys(path: str, value: Any) -> Iterator[str]:
        if isinstance(value, dict) and not {"name", "email"} >= value.keys():
            for key, below in value.items():
                yield from keys(f"{path}.{key}" if path else key, below)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for one in value:
                yield from keys(path, one)
        else:
            yield path

    document = tomllib.loads(WITH_ITS_EXAMPLE)
    assert "enforcing_systems" in document
    assert {key for key in keys("", document) if f"`{key}`" not in README} == set()


def test_every_number_is_the_codes() -> None:
    hours = policy.hours
    [pool] = (int(one.default.strip("`")) for one in Settings.documentation() if "POOL_SIZE" in one.variable)
    limits = Limits()
    told = [
        f"at most {limits.headers} headers and {limits.head_bytes // 1024} KiB",
        f"must come within {limits.head_seconds:.0f} seconds (408), a body within {limits.body_seconds:.0f} more",
        f"reads nothing of its answer for {limits.reading_seconds:.0f} seconds",
        f"default of {pool}: at most 2 x ({pool} + 1) + 2 x ({pool} + 2) = {4 * pool + 6}.",
        f"delivered after {outbox.LEASE // timedelta(minutes=1)} minutes by another",
        f"tried {outbox.MAX_ATTEMPTS} times",
        f"up to {provisioning.MAX_ITEMS} at a time",
        f"{MAX_ERRORS} errors at most",
        f"For {hours(endpoints.ROTATION)} hours after a rotation",
        f"within {webhook.DEADLINE.total_seconds():.0f} seconds; at most {webhook.MAX_READ // 1024} KiB",
        f"keeps {worker.WEBHOOKS_KEPT_FREE} of its {worker.WEBHOOKS_AT_A_TIME} places",
        f"go on for {hours(webhooks.TRIED_FOR)} hours",
        f"in the last {webhooks.KEPT.days} days",
        f"given up after {hours(webhooks.GIVEN_UP_AFTER)} hours",
        f"the status of up to {MAX_ACCOUNTS} accounts",
        f"another process changes is told within {live.LOOK_AGAIN // timedelta(minutes=1)} minutes",
        f"reads nothing for {SLOWEST_SECONDS:.0f} seconds",
        f"1009 for a message of more than {MAX_MESSAGE_BYTES // 1024} KiB",
        f"1008 for more than {MAX_OPERATIONS} operations at once",
    ]
    assert [sentence for sentence in told if sentence not in README] == []


def test_every_status_is_in_a_diagram() -> None:
    drawn = "".join(re.findall(r"```mermaid\n(.*?)```", README, re.DOTALL))
    statuses = [*lifecycle.AccountStatus, *lifecycle.RequestStatus]
    assert [status for status in statuses if not re.search(rf"\b{status.value}\b", drawn)] == []


def test_every_file_that_is_named_exists() -> None:
    linked = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README)}
    named = set(re.findall(r"(?<!/)\b(?:scripts|tests|app)/[\w./]+\b", README))
    local = {path for path in linked | named if "://" not in path}
    assert local
    assert [path for path in sorted(local) if not (ROOT / path).exists()] == []


def test_the_example_of_each_event_is_the_catalogues() -> None:
    """A missing line is one to paste."""
    expected = [json.dumps(events.example(kind), ensure_ascii=False) for kind in lifecycle.TransitionType]
    assert [line for line in README.splitlines() if line.startswith('{"specversion"')] == expected


async def test_the_line_to_import_is_imported(sqlite_database: Database, tmp_path: Path) -> None:
    """Into the demo's installation, which has the manager that it names."""
    [example] = re.findall(r'^\{"reference".*\}$', README, re.MULTILINE)
    complaints: list[str] = []
    async with stage(sqlite_database, tmp_path) as house:
        summary = await importing.run(
            house.installation, BytesIO(example.encode()), complain=lambda _, reason: complaints.append(reason)
        )
    assert (summary.created, complaints) == (1, [])


# -------------------------------------------------------------------------------------------------------- the story


def _environ(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SUNSET_")}
    return {**kept, **settings}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A folder in which `scripts/sunset` and `./var` are as the README has them, and the port of `sunset serve`."""
    with _serving(tmp_path) as serving:
        yield serving


@pytest.fixture
def served_with_systems(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """The same with the default policy and the systems that the README adds to it."""
    [systems] = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    own = tmp_path / "policy.toml"
    own.write_text(policy.DEFAULT_FILE.read_text(encoding="utf-8") + systems, encoding="utf-8")
    with _serving(tmp_path, SUNSET_POLICY_FILE=str(own)) as serving:
        yield serving


@contextmanager
def _serving(tmp_path: Path, **settings: str) -> Iterator[tuple[Path, int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    command = scripts / "sunset"
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m app.cli "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    environ = _environ(SUNSET_PORT=str(port), SUNSET_LOG_FORMAT="json", **settings)
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [command, "serve"], cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=log, text=True
        )
        with server:
            assert server.stdout is not None
            try:
                for line in server.stdout:  # what to open is printed when it can be opened
                    if "/mailbox" in line:
                        break
                yield tmp_path, port
            finally:
                server.terminate()
                server.communicate(timeout=30)
    assert server.returncode == 0
    logged = [json.loads(line) for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]
    assert {entry["level"] for entry in logged} == {"info"}
    assert re.findall(r"eyJ|[\w.]+@[\w.]+", (tmp_path / "log").read_text(encoding="utf-8")) == []


def _shape(text: str) -> str:
    """What stays the same from one run to the next."""
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "TIME", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "TIME", text)
    text = re.sub(r"\b[A-Z][a-z]+ \d{1,2}, \d{4},\s\d\d:\d\d\s+UTC", "MOMENT", text)
    text = re.sub(r"\b[A-Z][A-Za-z0-9_-]{22}(?=\")", "ID", text)
    text = re.sub(r"(?<=\"confirmationToken\":\")[^\"]+", "TOKEN", text)
    text = re.sub(r"http://127\.0\.0\.1:\d+(/\S*\?token=)\S+", r"URL\1TOKEN", text)
    return re.sub(r"\s+", " ", text).strip()  # a time's length decides where an email's lines break


def _chapter(heading: str, until: str) -> str:
    return README.partition(f"\n{heading}\n")[2].partition(f"\n{until}\n")[0]


def _goes_as_it_is_told(chapter: str, served: tuple[Path, int]) -> None:
    """Its commands, run one after the other, print what stands below each."""
    folder, port = served
    blocks = re.findall(r"```(sh|json|text)\n(.*?)```", chapter, re.DOTALL)
    told, script = [], "set -eu\n"
    for language, block in blocks:
        if language == "sh":
            # A person is slower than the worker, which this waits for: the email that a block reads has come.
            wanted = re.search(r"Hello \w+|links..confirm", block) if "var/mailbox" in block else None
            if wanted:
                script += f"until grep -qs '{wanted[0]}' var/mailbox/*.eml; do sleep 0.05; done\n"
            script += block.replace(":8000", f":{port}") + "echo '@@@@'\n"
            told.append("")
        else:
            told[-1] = json.dumps(json.loads(block), separators=(",", ":")) if language == "json" else block
    done = subprocess.run(
        ["bash"], input=script, cwd=folder, env=_environ(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    heard = done.stdout.split("@@@@\n")[:-1]
    assert len([one for one in told if one]) > 3
    assert [_shape(one) for one in heard] == [_shape(one) for one in told]


told_with_curl = pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("bash")), reason="the story is told with curl and bash"
)


@told_with_curl
def test_the_story_goes_as_it_is_told(served: tuple[Path, int]) -> None:
    _goes_as_it_is_told(_chapter("## The story", "## States"), served)


@told_with_curl
def test_systems_ask_and_listen_and_obey_as_it_is_told(served_with_systems: tuple[Path, int]) -> None:
    """Of the account that the story has canceled by then."""
    beginning = _chapter("## The story", "### The billing team restarts the account")
    _goes_as_it_is_told(beginning + _chapter("### The gate", "## Emails"), served_with_systems)


def test_the_subscriber_hears_as_it_happens(served: tuple[Path, int]) -> None:
    """The program that the README has, told of a cancellation while it runs."""
    folder, port = served
    [program] = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "gql" in code]

    def token(*who: str) -> str:
        command = [str(folder / "scripts" / "sunset"), "token", *who]
        return subprocess.run(command, cwd=folder, env=_environ(), capture_output=True, text=True).stdout.strip()

    def ask(bearer: str, query: str) -> Any:
        answer = httpx2.post(
            f"http://127.0.0.1:{port}/graphql", json={"query": query}, headers={"Authorization": f"Bearer {bearer}"}
        )
        return answer.json()["data"]

    alice = token("--member", "alice@acme.example", "--account", "acme")
    account = ask(alice, "{ viewer { memberships { edges { node { account { id } } } } } }")
    account_id = account["viewer"]["memberships"]["edges"][0]["node"]["account"]["id"]
    told_of = {
        "SUNSET": f"ws://127.0.0.1:{port}/graphql",
        "TOKEN": token("--service", "gatekeeper"),
        "ACCOUNTS": account_id,
    }
    with subprocess.Popen(
        [sys.executable, "-c", program], env=_environ() | told_of, stdout=subprocess.PIPE, text=True
    ) as subscriber:
        assert subscriber.stdout is not None
        try:
            assert subscriber.stdout.readline() == "acme 0 ACTIVE\n"
            asked = ask(
                alice,
                f'mutation {{ done: cancelAccount(input: {{accountId: "{account_id}"}}) '
                "{ ... on CancelAccountSuccess { confirmationToken request { id } } } }",
            )["done"]
            assert subscriber.stdout.readline() == "acme 1 ACTIVE\n"
            ask(
                alice,
                f'mutation {{ confirmCancellation(input: {{requestId: "{asked["request"]["id"]}", '
                f'confirmationToken: "{asked["confirmationToken"]}", accountName: "Acme"}}) {{ __typename }} }}',
            )
            assert subscriber.stdout.readline() == "acme 2 CANCELED\n"
        finally:
            subscriber.terminate()
