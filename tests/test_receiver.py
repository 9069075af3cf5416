"""The receiver of the README, as it stands there, in a process of its own: whatever comes when, it ends well."""

import os
import random
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import pytest

from app import db, endpoints, ids, webhooks
from app.db import Database
from app.ids import Kind
from app.webhooks import EndpointView
from tests.cast import ALICE, BILLING, Stage, stage
from tests.delivery.webhook_server import Receiver, Request, receiving
from tests.ending import DAY

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


class Reference:
    """The running receiver."""

    def __init__(self, port: int, folder: Path) -> None:
        self._port, self._folder = port, folder
        self.process: subprocess.Popen[str] | None = None

    def start(self, secret: str) -> None:
        [code] = [
            block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "standardwebhooks" in block
        ]
        assert len([line for line in code.splitlines() if line]) <= 35
        (self._folder / "receiver.py").write_text(code, encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "receiver.py"],
            cwd=self._folder,
            env=os.environ | {"WEBHOOK_SECRET": secret, "PORT": str(self._port)},
            stderr=subprocess.DEVNULL,
            text=True,
        )

    async def receive(self, request: Request, body: bytes | None = None) -> int:
        """The status of its answer to what another receiver got."""
        transport = httpx2.AsyncHTTPTransport(retries=10, trust_env=False)  # it may be just starting
        kept = {name: value for name, value in request.headers.items() if name.startswith("webhook-")}
        async with httpx2.AsyncClient(transport=transport, trust_env=False) as client:
            answer = await client.post(
                f"http://127.0.0.1:{self._port}/", content=request.body if body is None else body, headers=kept
            )
        return answer.status_code

    def accounts(self) -> dict[str, tuple[str, int]]:
        """What it believes: status and epoch, by id."""
        with closing(sqlite3.connect(self._folder / "accounts.db")) as kept:
            return {
                id_: (status, epoch) for id_, status, epoch in kept.execute("SELECT id, status, epoch FROM account")
            }


@pytest.fixture
def reference(port: int, tmp_path: Path) -> Iterator[Reference]:
    folder = tmp_path / "receiver"
    folder.mkdir()
    running = Reference(port, folder)
    try:
        yield running
    finally:
        if running.process is not None:
            running.process.terminate()
            running.process.wait(30)


async def truth() -> dict[str, tuple[str, int]]:
    """What the API says of the accounts that have a history."""
    rows = await db.fetch("SELECT id, status, epoch FROM account WHERE last_sequence > 0")
    return {ids.encode(Kind.ACCOUNT, db.as_uuid(row["id"])): (row["status"], row["epoch"]) for row in rows}


async def lives(house: Stage) -> None:
    """Acme is canceled and restarted again and again, and ends canceled; globex ends active."""
    globex = await house.account_id("globex")
    for _ in range(3):
        await house.cancel()
        await house.do(BILLING, "restartAccount", accountId=await house.account_id("acme"))
    await house.cancel()
    await house.request_cancellation("gina@globex.example", "globex")
    await house.do("gina@globex.example", "withdrawCancellation", accountId=globex)


def sequence(request: Request) -> int:
    data = request.event["data"]
    assert isinstance(data, dict)
    return int(data["sequence"])


async def endpoint_at(house: Stage, receiver: Receiver) -> EndpointView:
    made = await endpoints.create(
        None, house.installation.receivers, url=receiver.url, description="The reference", event_types=None
    )
    return made.endpoint


@pytest.mark.parametrize("seed", range(3))
async def test_the_receiver_of_the_readme_ends_in_the_apis_state(
    sqlite_database: Database, tmp_path: Path, reference: Reference, seed: int
) -> None:
    """Deliveries are shuffled, doubled, and some, accepted, are lost; delivering again brings those that were lost."""
    chance = random.Random(seed)  # noqa: S311  a test that can be repeated
    async with receiving() as network, stage(sqlite_database, tmp_path) as house:
        endpoint = await endpoint_at(house, network)
        reference.start(house.installation.tokens.webhook_secret(endpoint.id, 0))
        since = await db.now()
        await lives(house)
        await house.letters()
        events = network.requests[:]
        newest = {str(one.event["subject"]): one for one in sorted(events, key=sequence)}
        lost = {*map(id, newest.values()), *(id(one) for one in events if chance.random() < 0.3)}
        came = [one for one in events * 2 if id(one) not in lost]
        chance.shuffle(came)
        assert [await reference.receive(one) for one in came] == [204] * len(came)
        expected = await truth()
        assert reference.accounts() != expected, "what was lost is missed"

        assert await endpoints.redeliver_since(None, endpoint.id, since - DAY) == len(events)
        await house.letters()
        again = network.requests[len(events) :]
        assert sorted(one.headers["webhook-id"] for one in again) == sorted(one.headers["webhook-id"] for one in events)
        chance.shuffle(again)
        for one in again:
            assert await reference.receive(one) == 204
        assert reference.accounts() == expected
        assert {status for status, _ in expected.values()} == {"CANCELED", "ACTIVE"}


async def test_the_receiver_of_the_readme_lets_nobody_else_in(
    sqlite_database: Database, tmp_path: Path, reference: Reference
) -> None:
    async with receiving() as network, stage(sqlite_database, tmp_path) as house:
        endpoint = await endpoint_at(house, network)
        reference.start(house.installation.tokens.webhook_secret(endpoint.id, 0))
        await endpoints.ping(None, endpoint.id)
        await house.request_cancellation(ALICE)
        await house.letters()
        ping, asked = sorted(network.requests, key=lambda one: one.event["type"] != "webhook.ping")
        assert await reference.receive(asked, asked.body.replace(b"ACTIVE", b"CANCELED")) == 401
        assert (
            await reference.receive(Request(asked.line, asked.headers | {"webhook-signature": "v1"}, asked.body)) == 401
        )
        assert await reference.receive(Request(asked.line, {}, asked.body)) == 401
        assert await reference.receive(ping) == 204
        assert reference.accounts() == {}
        assert await reference.receive(asked) == 204
        assert list(reference.accounts().values()) == [("ACTIVE", 0)]
        (delivery, *_) = await webhooks.page(endpoint_id=endpoint.id, limit=1)
        assert delivery.state is webhooks.State.DELIVERED
