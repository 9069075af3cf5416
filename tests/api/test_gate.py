"""The gate: a clear yes, and a no for everything else, from the first call after the commit on."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
import uvicorn

from app import db, provisioning
from app.main import create_app
from tests import cast
from tests.cast import ALICE, BILLING, GATEKEEPER, HOST, Stage
from tests.postgres import PostgresServer


def bearer(house: Stage, who: str = GATEKEEPER) -> dict[str, str]:
    return {"Authorization": f"Bearer {house.token(who)}"}


async def ask(house: Stage, path: str, who: str = GATEKEEPER, **headers: str) -> httpx2.Response:
    return await house.client.get(f"/gate/{path}", headers=bearer(house, who) | headers)


async def test_an_open_account_may_send_and_its_members_sign_in(house: Stage) -> None:
    answer = await ask(house, "accounts/acme")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {
        "reference": "acme",
        "status": "ACTIVE",
        "epoch": 0,
        "canSendMessages": True,
        "membersCanSignIn": True,
    }


async def test_the_first_call_after_the_cancellation_says_no_and_after_the_restart_yes(house: Stage) -> None:
    done = await house.cancel()
    canceled = (await ask(house, "accounts/acme")).json()
    assert (canceled["status"], canceled["epoch"]) == ("CANCELED", 1)
    assert (canceled["canSendMessages"], canceled["membersCanSignIn"]) == (False, False)
    for question in ("messages", "members"):
        assert (await ask(house, f"{question}/acme")).status_code == 403
    await house.do(BILLING, "restartAccount", accountId=done["account"]["id"])
    restarted = (await ask(house, "accounts/acme")).json()
    assert (restarted["epoch"], restarted["canSendMessages"]) == (2, True)


@pytest.mark.parametrize("question", ["messages", "members"])
async def test_the_bare_form_has_a_status_and_no_body(house: Stage, question: str) -> None:
    yes, no = await ask(house, f"{question}/acme"), await ask(house, f"{question}/nobody")
    assert (yes.status_code, yes.content) == (204, b"")
    assert (no.status_code, no.content) == (403, b"")
    by_header = {"X-Account-Reference": "acme"}
    for path in (question, f"{question}/", f"{question}/any/path?of=the&original=request"):
        assert (await ask(house, path, **by_header)).status_code == 204
    assert (await ask(house, f"{question}/acme", **{"X-Account-Reference": "nobody"})).status_code == 403


async def test_an_account_that_nobody_knows_is_a_no(house: Stage) -> None:
    answer = (await ask(house, "accounts/nobody")).json()
    assert answer == {
        "reference": "nobody",
        "status": None,
        "epoch": None,
        "canSendMessages": False,
        "membersCanSignIn": False,
    }


async def test_a_scheduled_cancellation_is_a_no_from_its_moment_on(house: Stage) -> None:
    """Also when no worker has carried it out."""
    await db.execute(
        f"UPDATE account SET status = 'CANCELLATION_SCHEDULED', cancellation_effective_at = {db.now_sql()} "
        "WHERE reference = 'acme'"
    )
    answer = (await ask(house, "accounts/acme")).json()
    assert (answer["status"], answer["canSendMessages"]) == ("CANCELLATION_SCHEDULED", False)


@pytest.mark.parametrize("reference", ["a/b c", "ärger?&#%", "100%", "..", "x" * 200])
async def test_any_reference_can_be_asked_about(house: Stage, reference: str) -> None:
    await db.execute("UPDATE account SET reference = $1 WHERE reference = 'acme'", reference)
    if reference != "..":  # a path that clients take away before it is sent
        answer = (await ask(house, f"accounts/{quote(reference, safe='')}")).json()
        assert (answer["reference"], answer["canSendMessages"]) == (reference, True)
    many = await house.client.post("/gate/accounts", json={"references": [reference]}, headers=bearer(house))
    assert many.json()["accounts"][0]["canSendMessages"] is True


async def test_many_are_answered_in_the_order_asked(house: Stage) -> None:
    await house.cancel()
    asked = ["globex", "nobody", "acme", "globex"]
    answer = await house.client.post("/gate/accounts", json={"references": asked}, headers=bearer(house))
    assert [(one["reference"], one["canSendMessages"]) for one in answer.json()["accounts"]] == [
        ("globex", True),
        ("nobody", False),
        ("acme", False),
        ("globex", True),
    ]
    thousand = [f"nobody-{number}" for number in range(999)] + ["globex"]
    answer = await house.client.post("/gate/accounts", json={"references": thousand}, headers=bearer(house))
    assert [one["canSendMessages"] for one in answer.json()["accounts"]] == [False] * 999 + [True]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"references": "acme"}',
        b'{"references": [7]}',
        b'{"references": []}',
        b"\xff",
        b'{"references": ["a\\u0000"]}',
        b'{"references": ["' + b"x" * 201 + b'"]}',
        b'{"references": [""]}',
        b'{"references": [' + b",".join([b'"a"'] * 1_001) + b"]}",
    ],
)
async def test_a_list_that_cannot_be_read_is_refused(house: Stage, body: bytes) -> None:
    answer = await house.client.post("/gate/accounts", content=body, headers=bearer(house))
    assert answer.status_code == 400
    assert answer.json()["error"]


async def test_a_list_that_is_too_large_is_refused(house: Stage) -> None:
    answer = await house.client.post("/gate/accounts", content=b" " * 600_000, headers=bearer(house))
    assert answer.status_code == 413


@pytest.mark.parametrize("who", [ALICE, BILLING, HOST])
async def test_only_a_service_with_the_scope_may_ask(house: Stage, who: str) -> None:
    for path in ("accounts/acme", "messages/acme", "members/acme", "accounts/nobody"):
        answer = await ask(house, path, who)
        assert answer.status_code == 403
        assert "gate" in answer.json()["error"]
    many = await house.client.post("/gate/accounts", json={"references": ["acme"]}, headers=bearer(house, who))
    assert many.status_code == 403


async def test_a_service_that_was_deactivated_may_not_ask_any_more(house: Stage) -> None:
    assert (await ask(house, "members/acme")).status_code == 204
    await provisioning.deactivate_service(GATEKEEPER)
    assert (await ask(house, "members/acme")).status_code == 403


async def test_a_scope_is_a_word_of_its_own(house: Stage) -> None:
    await db.execute("UPDATE service SET scopes = 'gateway mygate' WHERE name = $1", GATEKEEPER)
    assert (await ask(house, "members/acme")).status_code == 403
    await db.execute("UPDATE service SET scopes = 'deletion gate' WHERE name = $1", GATEKEEPER)
    assert (await ask(house, "members/acme")).status_code == 204


@pytest.mark.parametrize("header", [{}, {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer nonsense"}])
async def test_without_a_valid_token_it_is_a_no(house: Stage, header: dict[str, str]) -> None:
    answer = await house.client.get("/gate/members/acme", headers=header)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.postgres
async def test_it_fails_closed_while_the_database_is_away_and_then_goes_on(
    postgres_house: Stage, postgres_server: PostgresServer
) -> None:
    if not postgres_server.can_restart:
        pytest.skip("the server is somebody else's")
    assert (await ask(postgres_house, "members/acme")).status_code == 204
    await asyncio.to_thread(postgres_server.stop)
    try:
        for path in ("members/acme", "accounts/acme"):
            answer = await ask(postgres_house, path)
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
    finally:
        await asyncio.to_thread(postgres_server.start)
    assert (await ask(postgres_house, "members/acme")).status_code == 204


@pytest.mark.postgres
async def test_no_call_after_the_commit_says_yes_in_any_process(postgres_house: Stage, tmp_path: Path) -> None:
    """Calls race the commit, on the application that commits and on another one with connections of its own. Whoever
    has seen the answer of the confirmation never sees a yes again."""
    async with other_process(postgres_house) as other:
        for reference, name, who in (
            ("acme", "Acme", ALICE),
            ("initech", "Initech", "ingrid@initech.example"),
        ):
            committed = asyncio.Event()
            after: list[int] = []

            async def call(client: httpx2.AsyncClient, *, path: str, done: asyncio.Event, seen: list[int]) -> None:
                for _ in range(40):
                    was_committed = done.is_set()
                    answer = await client.get(path, headers=bearer(postgres_house))
                    assert answer.status_code in {204, 403}
                    if was_committed:
                        seen.append(answer.status_code)

            async def confirm(*, who: str, reference: str, name: str, done: asyncio.Event) -> None:
                answer = await postgres_house.cancel(who, reference, name)
                assert answer["account"]["status"] == "CANCELED"
                done.set()

            path = f"/gate/members/{reference}"
            await asyncio.gather(
                confirm(who=who, reference=reference, name=name, done=committed),
                *(
                    call(client, path=path, done=committed, seen=after)
                    for client in (postgres_house.client, other)
                    for _ in range(4)
                ),
            )
            for client in (postgres_house.client, other):
                await call(client, path=path, done=committed, seen=after)
            assert set(after) == {403}


@contextlib.asynccontextmanager
async def other_process(house: Stage) -> AsyncIterator[httpx2.AsyncClient]:
    """A second application with a database pool of its own, as another process has it."""
    app = create_app(house.settings, house.installation)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://other.test") as client,
    ):
        yield client


# ------------------------------------------------------------------------------------------------------------ nginx

NGINX = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location ~ ^/app/(?<account>[^/]+)/ {{
            auth_request /gate;
            proxy_pass http://127.0.0.1:{behind};
        }}
        location = /gate {{
            internal;
            proxy_pass http://127.0.0.1:{sunset}/gate/members/$account;
            proxy_pass_request_body off;
            proxy_set_header Content-Length "";
            proxy_set_header Authorization "Bearer {token}";
        }}
    }}
    server {{
        listen 127.0.0.1:{behind};
        return 200 "welcome";
    }}
}}
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.asynccontextmanager
async def over_tcp(house: Stage) -> AsyncIterator[int]:
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(create_app(house.settings, house.installation), port=port, log_config=None, lifespan="on")
    )
    running = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(30):
            while not server.started:  # noqa: ASYNC110  uvicorn has no event for it
                await asyncio.sleep(0.02)
        yield port
    finally:
        server.should_exit = True
        await running


@contextlib.contextmanager
def nginx(folder: Path, **values: Any) -> Iterator[None]:
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, **values), encoding="utf-8")
    process = subprocess.Popen(["nginx", "-c", config, "-e", folder / "error.log"], env={**os.environ})
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
async def test_nginx_lets_in_and_keeps_out_as_the_gate_says(house: Stage, tmp_path: Path) -> None:
    """The configuration of the README, on the real thing."""
    folder = tmp_path / "nginx"
    folder.mkdir(mode=0o777)
    port = free_port()
    token = house.installation.tokens.mint(cast.subject(GATEKEEPER), timedelta(hours=1))
    async with over_tcp(house) as sunset, httpx2.AsyncClient() as browser:
        with nginx(folder, port=port, behind=free_port(), sunset=sunset, token=token):

            async def visit(account: str) -> int:
                async with asyncio.timeout(30):
                    while True:
                        try:
                            return (await browser.get(f"http://127.0.0.1:{port}/app/{account}/home")).status_code
                        except httpx2.ConnectError:  # it is just starting
                            await asyncio.sleep(0.02)

            assert await visit("acme") == 200
            assert await visit("nobody") == 403
            await house.cancel()
            assert await visit("acme") == 403
            assert await visit("globex") == 200
            await provisioning.deactivate_service(GATEKEEPER)
            assert await visit("globex") == 403
