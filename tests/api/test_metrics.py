"""/metrics: what a process counts, what it reads from the database, and who may see it."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Self

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import breaker, db, endpoints, history, main, metrics, observation, outbox, webhooks
from app.db import Database
from app.lifecycle import SYSTEM, AccountStatus, TransitionType
from app.observation import observe
from app.settings import Settings
from app.timers import TIMERS
from tests import cast
from tests.actions.test_outbox import promise
from tests.cast import ALICE, BILLING, BOB, Stage
from tests.delivery.webhook_server import receiving, says
from tests.enforcing import LOGIN, MAILER, acknowledge, obeyed
from tests.postgres import PostgresServer
from tests.rules.test_settings import PRODUCTION

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
TOKEN = "prometheus-reads-with-this"

Series = tuple[str, tuple[tuple[str, str], ...]]


def series(name: str, **labels: str) -> Series:
    return name, tuple(sorted(labels.items()))


def parsed(text: str) -> dict[Series, float]:
    return {
        series(sample.name, **sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape(client: httpx2.AsyncClient) -> dict[Series, float]:
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parsed(response.text)


class Counted:
    """What a process has counted within the block, and not before."""

    def __init__(self, house: Stage) -> None:
        self._house = house
        self._more: dict[Series, float] = {}

    async def __aenter__(self) -> Self:
        self._before = await scrape(self._house.client)
        return self

    async def __aexit__(self, *_: object) -> None:
        after = await scrape(self._house.client)
        self._more = {key: value - self._before.get(key, 0) for key, value in after.items()}

    def of(self, name: str) -> dict[tuple[str, ...], float]:
        """The values of the labels, in the order of the labels' names, with how often."""
        return {
            tuple(value for _, value in labels): more
            for (found, labels), more in self._more.items()
            if found == name and more
        }


# --------------------------------------------------------------------------------------------------- what is counted


async def test_the_story_is_counted(house: Stage) -> None:
    async with Counted(house) as counted:
        asked = await house.request_cancellation()
        given = {"requestId": asked["request"]["id"], "accountName": "Acme"}
        await house.do(ALICE, "confirmCancellation", confirmationToken="guessed", **given)
        await house.do(ALICE, "confirmCancellation", confirmationToken=asked["confirmationToken"], **given)
        await house.do(BILLING, "cancelAccount", accountId="nowhere")
        letters = await house.letters()
        await house.post("{ viewer { __typename } }", token="forged")
        await house.ask(BILLING, "{ viewer { nowhere } }")
        await house.ask(BILLING, "query Mine { seen: viewer { __typename } }")
    assert counted.of("sunset_requests_total") == {
        ("cancelAccount", "ok"): 1,
        ("cancelAccount", "NotFoundError"): 1,
        ("confirmCancellation", "ConfirmationTokenInvalidError"): 1,
        ("confirmCancellation", "ok"): 1,
        ("viewer", "ok"): 1,
        ("none", "UNAUTHENTICATED"): 1,
        ("none", "GRAPHQL_VALIDATION_FAILED"): 1,
    }
    assert counted.of("sunset_refusals_total") == {
        ("cancelAccount", "NotFoundError"): 1,
        ("confirmCancellation", "ConfirmationTokenInvalidError"): 1,
    }
    assert counted.of("sunset_request_seconds_count") == {
        ("cancelAccount",): 2,
        ("confirmCancellation",): 2,
        ("viewer",): 1,
        ("none",): 2,
    }
    assert counted.of("sunset_transitions_total") == {
        ("account.cancellation_requested",): 1,
        ("account.canceled",): 1,
    }
    assert sum(counted.of("sunset_deliveries_total").values()) == len(letters) > 1
    assert {result for result, _ in counted.of("sunset_deliveries_total")} == {"delivered"}
    assert counted.of("sunset_delivery_seconds_count") == {(): len(letters)}


async def test_each_root_field_is_counted_with_its_own_result(house: Stage) -> None:
    """Whatever it is called in the answer, also behind fragments; what is skipped is not counted."""
    document = """
        query ($no: Boolean = false) { ...More mine: viewer { __typename } viewer @include(if: $no) { __typename } }
        fragment More on Query { ... on Query { theirs: account(id: "?") { id } all: deletions { __typename } } }
    """
    async with Counted(house) as counted:
        answer = await house.ask(ALICE, document)
    codes = {error["path"][0]: error["extensions"]["code"] for error in answer.get("errors", [])}
    assert answer["data"]["mine"] == {"__typename": "Viewer"}
    assert codes.keys() == {"all"}
    assert counted.of("sunset_requests_total") == {
        ("viewer", "ok"): 1,
        ("account", "ok"): 1,
        ("deletions", codes["all"]): 1,
    }
    assert counted.of("sunset_request_seconds_count") == {("viewer",): 1, ("account",): 1, ("deletions",): 1}


async def test_what_a_client_calls_things_is_no_label(house: Stage) -> None:
    """Names of operations, aliases, fields, and methods are a client's to choose: no number of them makes a series."""
    await house.ask(ALICE, "query Honest { viewer { __typename } }")
    await house.ask(ALICE, "{ nowhere }")
    await house.client.post("/graphql", json={"query": 1}, headers={"Authorization": f"Bearer {house.token(ALICE)}"})
    before = await scrape(house.client)
    for number in range(20):
        name = f"hostile{number}"
        headers = {"Authorization": f"Bearer {house.token(ALICE)}", "X-Request-ID": name}
        for body in (
            {"query": f"query {name} {{ {name}: viewer {{ __typename }} }}", "operationName": name},
            {"query": f"{{ viewer {{ __typename }} {name} }}"},
            {"query": "query a { viewer { __typename } } query b { viewer { id } }", "operationName": name},
            {"query": f"query {name} {{"},
            {"query": number},
        ):
            await house.client.post("/graphql", json=body, headers=headers)
        await house.client.get(f"/{name}")
    after = await scrape(house.client)
    fresh = {found for found in after.keys() - before.keys() if found[0].startswith("sunset_requests")}
    assert {dict(labels)["operation"] for _, labels in fresh} <= {"none"}, "codes are new at most"
    assert {dict(labels)["result"] for _, labels in fresh} <= {"BAD_USER_INPUT", "GRAPHQL_PARSE_FAILED"}
    assert "hostile" not in str(after)


async def test_what_is_rolled_back_is_no_transition(database: Database, tmp_path: Path) -> None:
    async with cast.stage(database, tmp_path) as house:
        key = await house.account_key("acme")

        async def move(*, fail: bool) -> None:
            async with db.transaction():
                await history.append(
                    TransitionType.CANCELLATION_REQUESTED,
                    account_id=key,
                    status=AccountStatus.ACTIVE,
                    request_id=None,
                    actor=SYSTEM,
                    now=await db.now(),
                )
                if fail:
                    raise ZeroDivisionError

        async with Counted(house) as counted:
            with pytest.raises(ZeroDivisionError):
                await move(fail=True)
        assert counted.of("sunset_transitions_total") == {}
        async with Counted(house) as counted:
            await move(fail=False)
        assert counted.of("sunset_transitions_total") == {("account.cancellation_requested",): 1}


async def test_failed_deliveries_and_dead_letters_are_counted(house: Stage) -> None:
    """A row of a version that this one cannot read fails and is tried again, up to its last try."""
    await house.cancel()
    await db.execute("UPDATE outbox SET facts = '{}'")
    promised = Counter((row["template"],) for row in await db.fetch("SELECT template FROM outbox"))
    assert promised
    async with Counted(house) as counted:
        await house.letters()
    assert counted.of("sunset_deliveries_total") == {("failed", *template): n for template, n in promised.items()}
    await db.execute("UPDATE outbox SET attempts = $1, due_at = created_at", outbox.MAX_ATTEMPTS - 1)
    async with Counted(house) as counted:
        await house.letters()
    assert counted.of("sunset_deliveries_total") == {("dead", *template): n for template, n in promised.items()}
    assert (await scrape(house.client))[series("sunset_outbox_messages", state="dead")] == promised.total()


async def test_an_unexpected_failure_is_counted_by_its_code(house: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("app.cancellation.cancel", fail)
    async with Counted(house) as counted:
        answer = await house.do(ALICE, "cancelAccount", accountId=await house.account_id("acme"))
    assert answer["extensions"]["code"] == "INTERNAL_SERVER_ERROR"
    assert counted.of("sunset_requests_total") == {("cancelAccount", "INTERNAL_SERVER_ERROR"): 1}


async def test_a_timer_tells_how_late_it_was(house: Stage) -> None:
    async with Counted(house) as counted:
        metrics.timer_done("begin_deletion", timedelta(seconds=4))
    assert counted.of("sunset_timer_latency_seconds_sum") == {("begin_deletion",): 4.0}


# ------------------------------------------------------------------------------------- what is read when it is asked


async def test_the_outbox_by_state_and_age(house: Stage) -> None:
    await promise(6)
    claimed = await outbox.claim(3)
    assert await outbox.failed(claimed[0], "451", permanent=False)
    assert await outbox.failed(claimed[1], "550", permanent=True)
    seen = await scrape(house.client)
    states = {
        state: seen[series("sunset_outbox_messages", state=state)] for state in ("due", "waiting", "claimed", "dead")
    }
    assert states == {"due": 3, "waiting": 1, "claimed": 1, "dead": 1}
    assert 0 <= seen[series("sunset_outbox_oldest_age_seconds")] < 60
    await db.advance_clock(timedelta(days=3))
    later = await scrape(house.client)
    assert later[series("sunset_outbox_messages", state="due")] == 5, "the lease has lapsed, the wait is over"
    days = 3 * 86_400
    assert days <= later[series("sunset_outbox_oldest_age_seconds")] < days + 60
    assert days <= later[series("sunset_dead_letter_oldest_age_seconds")] < days + 60
    assert later[series("sunset_clock_offset_seconds")] == days


async def test_webhooks_by_state_and_age_and_their_endpoints(house: Stage) -> None:
    async with receiving() as receiver:
        made = [
            (
                await endpoints.create(
                    None, house.installation.receivers, url=receiver.url, description=None, event_types=None
                )
            ).endpoint.id
            for _ in range(6)
        ]
        answers = (
            says("204 No Content"),
            *(says("500 Oops") for _ in range(webhooks.BREAKS_AFTER + 1)),
            says("410 Gone"),
        )
        asked = (made[0], *[made[1]] * webhooks.BREAKS_AFTER, made[2], made[3])
        async with Counted(house) as counted:
            for endpoint_id, answer in zip(asked, answers, strict=True):
                receiver.answer = answer
                await endpoints.ping(None, endpoint_id)
                await house.letters()
    assert counted.of("sunset_webhook_tries_total") == {
        ("webhook.ping", "delivered"): 1,
        ("webhook.ping", "failed"): webhooks.BREAKS_AFTER + 1,
        ("webhook.ping", "dead"): 1,
    }
    assert counted.of("sunset_webhook_seconds_count") == {(): len(asked)}
    for endpoint_id in (made[0], made[1], made[4]):
        await endpoints.ping(None, endpoint_id)
    await endpoints.disable(None, made[4])
    (claimed,) = await webhooks.claim(1)
    assert claimed.endpoint_id == made[0]
    await endpoints.ping(None, made[0])
    seen = await scrape(house.client)
    states = ("due", "waiting", "held", "claimed", "dead")
    assert {one: seen[series("sunset_webhook_deliveries", state=one)] for one in states} == {
        "due": 1,
        "waiting": webhooks.BREAKS_AFTER + 1,
        "held": 2,
        "claimed": 1,
        "dead": 1,
    }
    kinds = ("working", "failing", "paused", "gone", "disabled")
    assert {one: seen[series("sunset_webhook_endpoints", state=one)] for one in kinds} == {
        "working": 2,
        "failing": 1,
        "paused": 1,
        "gone": 1,
        "disabled": 1,
    }
    assert 0 <= seen[series("sunset_webhook_oldest_age_seconds")] < 60
    await db.advance_clock(timedelta(hours=1))
    later = await scrape(house.client)
    assert 3_600 <= later[series("sunset_webhook_oldest_age_seconds")] < 3_660
    assert later[series("sunset_webhook_endpoints", state="paused")] == 0, "the pause is over"


async def test_timers_holds_and_deletions(house: Stage) -> None:
    quiet = await scrape(house.client)
    for timer in TIMERS:
        assert quiet[series("sunset_timers_due", timer=timer.name)] == 0
        assert quiet[series("sunset_timer_overdue_seconds", timer=timer.name)] == 0
    await house.cancel()
    await db.advance_clock(timedelta(days=60, hours=2))
    late = await scrape(house.client)
    assert late[series("sunset_timers_due", timer="begin_deletion")] == 1
    assert 7_200 <= late[series("sunset_timer_overdue_seconds", timer="begin_deletion")] < 7_260
    assert late[series("sunset_deletions_overdue")] == 1
    assert late[series("sunset_deletions_due")] == 1
    assert late[series("sunset_deletions_allowed")] == house.installation.policy.breaker_at_least
    assert late[series("sunset_deletions_halted")] == 0
    assert late[series("sunset_deletion_holds")] == 0
    held = await house.do(BILLING, "holdDeletion", accountId=await house.account_id("acme"), note="Audit.")
    assert held["__typename"] == "HoldDeletionSuccess"
    after = await scrape(house.client)
    assert after[series("sunset_deletion_holds")] == 1
    assert after[series("sunset_timers_due", timer="begin_deletion")] == 0
    assert after[series("sunset_deletions_overdue")] == 0


async def test_who_has_obeyed(database: Database, tmp_path: Path) -> None:
    """The last acknowledgement's time is counted; what is waited for is read, of each system that the policy names."""
    async with obeyed(database, tmp_path) as house:

        async def seen() -> dict[str, float]:
            found = await scrape(house.client)
            return {
                f"{system} {state}": found[series("sunset_enforcements", system=system, state=state)]
                for system in (MAILER, LOGIN)
                for state in ("pending", "late")
            }

        nothing = {"mailer pending": 0, "mailer late": 0, "login pending": 0, "login late": 0}
        assert await seen() == nothing
        async with Counted(house) as counted:
            await house.cancel()
            assert await seen() == nothing | {"mailer pending": 1, "login pending": 1}
            await db.advance_clock(timedelta(minutes=20))
            assert await seen() == nothing | {"mailer late": 1, "login pending": 1}
            await acknowledge(house, MAILER, 1)
            assert await seen() == nothing | {"login pending": 1}
        assert counted.of("sunset_enforcement_seconds_count") == {}
        async with Counted(house) as counted:
            await acknowledge(house, LOGIN, 1)
            assert await seen() == nothing
        assert counted.of("sunset_enforcement_seconds_count") == {(): 1}
        assert 1_200 <= counted.of("sunset_enforcement_seconds_sum")[()] < 1_260


async def test_the_breaker(database: Database, tmp_path: Path) -> None:
    async with cast.stage(database, tmp_path, breaker_at_least=0, breaker_percent=0) as house:
        await house.cancel()
        await db.advance_clock(timedelta(days=61))
        async with db.transaction():
            await breaker.enter(house.installation)
        seen = await scrape(house.client)
    assert seen[series("sunset_deletions_halted")] == 1
    assert seen[series("sunset_deletions_due")] == 1
    assert seen[series("sunset_deletions_allowed")] == 0


@pytest.mark.parametrize("days", [-1, 1])
async def test_a_process_with_a_wrong_clock_says_so(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + timedelta(days=days)

    async with cast.stage(sqlite_database, tmp_path) as house:
        assert abs((await scrape(house.client))[series("sunset_clock_difference_seconds")]) < 60
        monkeypatch.setattr(observation, "datetime", Wrong)
        difference = (await scrape(house.client))[series("sunset_clock_difference_seconds")]
    assert abs(difference - days * 86_400) < 60


async def test_what_is_not_due_is_not_looked_at(sqlite_database: Database, tmp_path: Path) -> None:
    """Every table that grows is read by an index on what is open or due alone."""
    async with cast.stage(sqlite_database, tmp_path) as house:
        client: Any = db.bound()._client
        asked: list[tuple[str, Any]] = []
        fetch = client.fetch

        async def noted(sql: str, args: Any) -> Any:
            asked.append((sql, args))
            return await fetch(sql, args)

        client.fetch = noted
        try:
            await observe(house.installation)
        finally:
            client.fetch = fetch
    partial = {
        row["name"]
        for row in await db.fetch("SELECT name FROM sqlite_master WHERE type = 'index' AND sql LIKE '% WHERE %'")
    }
    tables = {row["name"] for row in await db.fetch("SELECT name FROM sqlite_master WHERE type = 'table'")}
    used = Counter[str]()
    for sql, args in asked:
        # As good: what is in one of the states that do not last.
        passing = sql.count("status = 'PENDING_") + sql.count("status = 'DELETING'")
        for row in await db.fetch(f"EXPLAIN QUERY PLAN {sql}", *args):
            found = re.match(r"(?:SCAN|SEARCH) (\w+)(?:.* INDEX (\w+))?", row["detail"])
            if found is None or found[1] not in tables - {"clock_offset", "deletion_breaker", "webhook_endpoint"}:
                continue
            used[found[1]] += 1
            if found[2] not in partial:
                assert "(status=?)" in row["detail"], (sql, row["detail"])
                passing -= 1
        assert passing >= 0, sql
    assert used.keys() >= {
        "account",
        "outbox",
        "webhook_delivery",
        "cancellation_request",
        "deletion_step",
        "enforcement",
    }


# ------------------------------------------------------------------------------------------------------ who may look


@asynccontextmanager
async def unopened(settings: Settings) -> AsyncIterator[httpx2.AsyncClient]:
    """The application before it has a database: who is turned away does not reach it."""
    transport = httpx2.ASGITransport(app=main.create_app(settings))
    async with httpx2.AsyncClient(transport=transport, base_url="http://sunset.test") as client:
        yield client


async def test_in_production_nobody_looks_without_a_token_being_set(tmp_path: Path) -> None:
    settings = Settings.load({**PRODUCTION, "SUNSET_DATA_DIR": str(tmp_path)})
    async with unopened(settings) as client:
        assert (await client.get("/metrics")).status_code == 404
        assert (await client.get("/metrics", headers={"Authorization": "Bearer "})).status_code == 404
        assert (await client.get("/nowhere")).text == (await client.get("/metrics")).text


@pytest.mark.parametrize("environment", [{}, PRODUCTION], ids=["development", "production"])
@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN, "Bearer é"],
)
async def test_with_a_token_set_nobody_else_looks(
    tmp_path: Path, environment: dict[str, str], given: str | None
) -> None:
    settings = Settings.load({**environment, "SUNSET_DATA_DIR": str(tmp_path), "SUNSET_METRICS_TOKEN": TOKEN})
    headers = [] if given is None else [(b"authorization", given.encode("latin-1"))]
    async with unopened(settings) as client:
        response = await client.get("/metrics", headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "sunset_" not in response.text


async def test_the_token_opens(sqlite_database: Database, tmp_path: Path) -> None:
    settings = cast.settings(tmp_path, sqlite_database.url, SUNSET_METRICS_TOKEN=TOKEN)
    app = main.create_app(settings)
    transport = httpx2.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://sunset.test") as client,
    ):
        assert (await client.get("/metrics")).status_code == 401
        response = await client.get("/metrics", headers={"Authorization": f"bearer {TOKEN}"})
    assert response.status_code == 200
    assert parsed(response.text)[series("sunset_database_up")] == 1


async def test_a_callers_token_opens_nothing(sqlite_database: Database, tmp_path: Path) -> None:
    """Staff is not who runs the installation."""
    settings = cast.settings(tmp_path, sqlite_database.url, SUNSET_METRICS_TOKEN=TOKEN)
    async with cast.stage(sqlite_database, tmp_path) as house, unopened(settings) as client:
        token = house.token(BILLING)
        assert (await client.get("/metrics", headers={"Authorization": f"Bearer {token}"})).status_code == 401


# ------------------------------------------------------------------------------------------------------ when it fails


async def _answers_without_its_database(house: Stage, away: Any) -> dict[Series, float]:
    await house.ask(BOB, "{ viewer { __typename } }")
    assert (await scrape(house.client))[series("sunset_database_up")] == 1
    await away()
    await house.ask(BOB, "{ viewer { __typename } }")
    seen = await scrape(house.client)
    assert seen[series("sunset_database_up")] == 0
    read = {name for name, _ in seen if name.startswith(("sunset_outbox", "sunset_timers", "sunset_deletion"))}
    assert read == set(), "what cannot be read is not told"
    assert seen[series("sunset_requests_total", operation="viewer", result="ok")] >= 1
    return seen


@pytest.mark.postgres
async def test_without_its_database_a_process_tells_what_it_counted(
    postgres_house: Stage, postgres_server: PostgresServer
) -> None:
    if not postgres_server.can_restart:
        pytest.skip("the given server is not ours to stop")
    try:
        seen = await _answers_without_its_database(postgres_house, lambda: asyncio.to_thread(postgres_server.stop))
    finally:
        await asyncio.to_thread(postgres_server.start)
    refused = [
        labels for name, labels in seen if name == "sunset_requests_total" and "SERVICE_UNAVAILABLE" in str(labels)
    ]
    assert refused
    assert (await scrape(postgres_house.client))[series("sunset_database_up")] == 1, "and is back by itself"


async def test_without_its_file_a_process_tells_what_it_counted(sqlite_database: Database, tmp_path: Path) -> None:
    async with cast.stage(sqlite_database, tmp_path) as house:
        opened: list[Database] = []
        bind = Database.bind

        def noted(database: Database) -> Any:
            opened.append(database)
            return bind(database)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Database, "bind", noted)
            await house.client.get("/readyz")
        await _answers_without_its_database(house, opened[0].close)


# ---------------------------------------------------------------------------------------------------- the worker's port


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`sunset worker` beside a migrated database, with a port for its probes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SUNSET_")}
    environ |= {
        "SUNSET_DATA_DIR": str(tmp_path),
        "SUNSET_WORKER_PORT": str(port),
        "SUNSET_METRICS_TOKEN": TOKEN,
        "SUNSET_LOG_FORMAT": "json",
    }
    command = [sys.executable, "-m", "app.cli"]
    subprocess.run([*command, "migrate"], env=environ, check=True, capture_output=True, timeout=60)
    with subprocess.Popen([*command, "worker"], env=environ, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            assert any(b"worker.started" in line for line in process.stderr), "it did not start"
            yield process, port
        finally:
            process.kill()


def _get(port: int, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_worker_shows_its_own_numbers(worker: tuple[subprocess.Popen[bytes], int]) -> None:
    process, port = worker
    assert _get(port, "/livez")[0] == 200
    assert _get(port, "/readyz")[0] == 200
    assert _get(port, "/metrics")[0] == 401
    assert _get(port, "/graphql")[0] == 404
    status, text = _get(port, "/metrics", Authorization=f"Bearer {TOKEN}")
    assert status == 200
    assert parsed(text)[series("sunset_database_up")] == 1
    assert parsed(text)[series("sunset_outbox_messages", state="due")] == 0
    again = subprocess.run(process.args, env=_environ_of(process), capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert re.fullmatch(rf"sunset: SUNSET_WORKER_PORT: {port}: .*\n", again.stderr)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def _environ_of(process: subprocess.Popen[bytes]) -> dict[str, str]:
    pairs = Path(f"/proc/{process.pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if pair)


# -------------------------------------------------------------------------------------------------------- the README


async def test_every_metric_is_explained(sqlite_database: Database, tmp_path: Path) -> None:
    """A missing line is one to paste."""
    async with cast.stage(sqlite_database, tmp_path) as house:
        families = [*metrics.REGISTRY.collect(), *await observe(house.installation)]
    suffix = {"counter": "_total", "info": "_info"}
    expected = [
        f"| `{one.name}{suffix.get(one.type, '')}` | {one.type} | {one.documentation} |"
        for one in families
        if not one.name.startswith("process_")
    ]
    assert len(expected) > 20
    assert [line for line in expected if line not in README.splitlines()] == []
