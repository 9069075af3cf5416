"""The database goes away under load: every request is answered, nothing that was acknowledged is lost or done twice,
and the service goes on by itself when the database is back."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import httpx2
import pytest

from app import db, main, provisioning
from app.db import Database, asyncpg_backend
from app.lifecycle import FeedbackReason, LinkPurpose, MemberRole
from app.messages import LinkGrant
from app.provisioning import AccountItem, MemberItem
from tests.cast import ALICE, BILLING, Stage, subject
from tests.postgres import PostgresServer

pytestmark = pytest.mark.postgres

TIMEOUT = timedelta(seconds=1)
"""Of a request. What hangs until the database driver's own time-outs is seen to take longer than `PATIENCE`."""
PATIENCE = 15.0
CLIENTS = 16
"""Twice as many as the service has connections."""

CANCEL = """
mutation($input: CancelAccountInput!) {
  done: cancelAccount(input: $input) {
    __typename ... on CancelAccountSuccess { confirmationToken request { id } }
  }
}"""
FEEDBACK = "mutation($input: SubmitFeedbackInput!) { done: submitFeedback(input: $input) { __typename } }"
CONFIRM = "mutation($input: ConfirmCancellationInput!) { done: confirmCancellation(input: $input) { __typename } }"
RESTART = "mutation($input: RestartAccountInput!) { done: restartAccount(input: $input) { __typename } }"
STATUS = """
query($id: ID!) {
  account(id: $id) {
    status members { edges { node { name } } } history { edges { node { type } } } openRequest { offers { code } }
  }
}"""
"""Lists that are loaded at the same time, each by a task of its own."""


@pytest.fixture
async def service(postgres_house: Stage, postgres_server: PostgresServer) -> AsyncIterator[Stage]:
    """The service, impatient, on a database that the test may take away. It is given back in good health."""
    if not postgres_server.can_restart:
        pytest.skip("the given server is not ours to stop")
    installation = replace(postgres_house.installation, request_timeout=TIMEOUT)
    app = main.create_app(postgres_house.settings, installation)
    transport = httpx2.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://sunset.test") as client,
    ):
        yield replace(postgres_house, app=app, installation=installation, client=client)


class Client:
    """Cancels an account and has it restarted, again and again. Whatever was not acknowledged, it sends again."""

    def __init__(self, service: Stage, number: int) -> None:
        self.service = service
        self.name = f"Client {number}"
        self.reference = f"client-{number}"
        self.cycles = 0
        self.refused = 0
        self.stopping = False

    @property
    def account(self) -> AccountItem:
        email = f"{self.reference}@client.example"
        admin = MemberItem(subject=self.reference, email=email, name=self.name, role=MemberRole.ADMIN)
        return AccountItem(reference=self.reference, name=self.name, plan_code="essentials", members=[admin])

    async def run(self) -> None:
        account_id = await self.service.account_id(self.reference)
        admin = self.service.installation.tokens.mint(self.reference, timedelta(hours=1))
        billing = self.service.token(BILLING)
        while not self.stopping:
            asked = await self.send(admin, CANCEL, accountId=account_id)
            assert asked["__typename"] == "CancelAccountSuccess"
            request_id, token = asked["request"]["id"], asked["confirmationToken"]
            said = await self.send(admin, FEEDBACK, requestId=request_id, reason="OTHER", comment=str(self.cycles))
            assert said == {"__typename": "SubmitFeedbackSuccess"}
            before = self.refused
            confirmed = await self.send(
                admin, CONFIRM, requestId=request_id, confirmationToken=token, accountName=self.name
            )
            # Who was not told that it was confirmed learns it from having no access any more.
            removed = confirmed.get("extensions", {}).get("code") == "ACCESS_REMOVED" and self.refused > before
            assert removed or confirmed == {"__typename": "ConfirmCancellationSuccess"}
            restarted = await self.send(billing, RESTART, accountId=account_id)
            assert restarted == {"__typename": "RestartAccountSuccess"}
            self.cycles += 1

    async def send(self, token: str, document: str, **given: Any) -> dict[str, Any]:
        """What came of it in the end: each time with the same key, until it is answered."""
        given["idempotencyKey"] = f"{self.reference} {self.cycles}"
        while (response := await self.service.post(document, {"input": given}, token=token)).status_code == 503:
            assert_unavailable(response)
            self.refused += 1
            await asyncio.sleep(0.05)
        assert response.status_code == 200, response.text
        answer = response.json()
        return cast("dict[str, Any]", answer["errors"][0] if "errors" in answer else answer["data"]["done"])


def assert_unavailable(response: httpx2.Response) -> None:
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    if response.headers["content-type"].startswith("application/json"):
        [error] = response.json()["errors"]
        assert error["extensions"] == {"code": "SERVICE_UNAVAILABLE"}


async def until(condition: Callable[[], bool], running: Iterable[asyncio.Task[None]]) -> None:
    """Wait for it, while none of the clients has failed."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            for task in running:
                if task.done():
                    await task
            await asyncio.sleep(0.02)


Refused = Callable[[], Awaitable[None]]
"""Waits until every client has been told that the service is unavailable."""


async def stop(server: PostgresServer, refused: Refused) -> None:
    await asyncio.to_thread(server.stop, "immediate")
    try:
        await refused()
    finally:
        await asyncio.to_thread(server.start)


async def crash(server: PostgresServer, refused: Refused) -> None:
    await asyncio.to_thread(server.restart, "immediate")


async def shut_down_in_order(server: PostgresServer, refused: Refused) -> None:
    await asyncio.to_thread(server.restart, "fast")


async def pause(server: PostgresServer, refused: Refused) -> None:
    server.pause()
    try:
        await refused()
    finally:
        server.resume()


@pytest.mark.parametrize("outage", [stop, crash, shut_down_in_order, pause])
async def test_an_outage_under_load(
    service: Stage,
    postgres_server: PostgresServer,
    caplog: pytest.LogCaptureFixture,
    outage: Callable[[PostgresServer, Refused], Awaitable[None]],
) -> None:
    """Every answer is a success or 503 with Retry-After, also a second time; then each account's history is what its
    client was told, without gap and without double."""
    clients = [Client(service, number) for number in range(CLIENTS)]
    await provisioning.sync(service.installation, [client.account for client in clients])
    running = [asyncio.create_task(client.run()) for client in clients]
    try:
        for _ in range(2):
            cycles = [client.cycles for client in clients]
            await until(lambda done=cycles: all(c.cycles > n for c, n in zip(clients, done, strict=True)), running)  # type: ignore[misc]

            refusals = [client.refused for client in clients]

            async def refused(told: list[int] = refusals) -> None:
                await until(lambda: all(c.refused > n for c, n in zip(clients, told, strict=True)), running)

            await outage(postgres_server, refused)
            cycles = [client.cycles for client in clients]
            await until(lambda done=cycles: all(c.cycles > n for c, n in zip(clients, done, strict=True)), running)  # type: ignore[misc]
    finally:
        for client in clients:
            client.stopping = True
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*running)
    for client in clients:
        account_id = await service.account_key(client.reference)
        history = await db.fetch("SELECT type FROM transition WHERE account_id = $1 ORDER BY sequence", account_id)
        cycle = [
            "account.cancellation_requested",
            "account.feedback_submitted",
            "account.canceled",
            "account.restarted",
        ]
        assert [row["type"] for row in history] == cycle * client.cycles
        comments = await db.fetch("SELECT comment FROM feedback WHERE account_id = $1 ORDER BY id", account_id)
        assert [row["comment"] for row in comments] == [str(number) for number in range(client.cycles)]
        emails = await db.fetch("SELECT template FROM outbox WHERE account_id = $1", account_id)
        assert Counter(row["template"] for row in emails) == {
            "cancellation-confirmed": client.cycles,
            "account-restarted": client.cycles,
        }
    assert [record.getMessage() for record in caplog.records if record.levelname in {"ERROR", "CRITICAL"}] == []


@pytest.mark.parametrize("cleaning", [0.1, 60.0], ids=["connections are given up", "connections are still cleaned"])
async def test_two_hundred_clients_of_a_database_that_stands_still_are_all_told_so(
    service: Stage, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch, cleaning: float
) -> None:
    """Reading, changing, opening a link and asking for readiness: whoever has a connection, waits for one, or for a new
    one. When the database goes on, the next are served."""
    monkeypatch.setattr(asyncpg_backend, "_CLEAN_SECONDS", cleaning)
    account_id, now = await service.account_key("acme"), await db.database_now()
    grant = LinkGrant(
        purpose=LinkPurpose.FEEDBACK,
        issuer=service.installation.member_issuer,
        subject=subject(ALICE),
        account_id=account_id,
        request_id=db.uuid7(),
    )
    link = service.installation.tokens.mint_link(grant, issued_at=now, expires_at=now + timedelta(days=1))
    node_id, token, client = await service.account_id("acme"), service.token(ALICE), service.client
    form = {"token": link, "reason": FeedbackReason.OTHER.value, "comment": ""}
    kinds: list[Callable[[], Awaitable[httpx2.Response]]] = [
        lambda: service.post(STATUS, {"id": node_id}, token=token),
        lambda: service.post(CANCEL, {"input": {"accountId": node_id}}, token=token),
        lambda: client.get("/links/feedback", params={"token": link}, follow_redirects=True),
        lambda: client.post("/links/feedback", data=form),
        lambda: client.get("/readyz"),
    ]
    usual = [await kind() for kind in kinds]
    served = [answer.status_code for answer in usual]
    assert not any("errors" in answer.json() for answer in usual[:2])
    assert served == [200, 200, 409, 409, 200]

    postgres_server.pause()
    try:
        for _ in range(2):  # first with the connections that there were
            async with asyncio.timeout(PATIENCE):
                answers = await asyncio.gather(*(kind() for kind in kinds * 40))
            for answer in answers:
                if answer.request.url.path != "/readyz":
                    assert_unavailable(answer)
                assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
    finally:
        postgres_server.resume()

    async with asyncio.timeout(PATIENCE):
        # More of them than connections: none was lost.
        while [answer.status_code for answer in await asyncio.gather(*(kind() for kind in kinds * 3))] != served * 3:
            pass


async def test_an_answer_that_comes_too_late_says_that_it_may_have_been_done(service: Stage) -> None:
    """A row that somebody else holds for longer than a request may take: told to send it again with the same key, and
    told the same answer then."""
    account_id, token = await service.account_key("acme"), service.token(ALICE)
    given = {"input": {"accountId": await service.account_id("acme"), "idempotencyKey": "k"}}
    async with db.transaction():
        await db.fetch("SELECT id FROM account WHERE id = $1 FOR UPDATE", account_id)
        late = await asyncio.create_task(service.post(CANCEL, given, token=token))
    assert_unavailable(late)
    assert "same idempotency key" in late.json()["errors"][0]["message"]
    first, second = [(await service.post(CANCEL, given, token=token)).json() for _ in range(2)]
    assert first["data"]["done"]["__typename"] == "CancelAccountSuccess"
    assert first == second


async def test_who_listens_is_let_go_by_a_database_that_stands_still(
    postgres_database: Database, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that begins anew, or is to stop, would otherwise wait for its listener for ever."""
    if not postgres_server.can_restart:
        pytest.skip("the given server is not ours to stop")
    monkeypatch.setattr(asyncpg_backend, "_CLEAN_SECONDS", 0.1)
    try:
        async with asyncio.timeout(PATIENCE):
            async with db.listen("outbox") as wakeups:
                await wakeups.wait(PATIENCE)
                postgres_server.pause()
    finally:
        postgres_server.resume()
    async with db.listen("outbox") as wakeups:
        await wakeups.wait(PATIENCE)
        await db.notify("outbox")
        assert await wakeups.wait(PATIENCE)
