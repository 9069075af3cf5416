"""Three API processes and three workers on one PostgreSQL, killed at random while clients run the story.

What a client was told has happened has happened once; every history is legal and whole; every email that a
transaction promised reached its recipient or is a dead letter that says why, and its copies are one message.
"""

import asyncio
import json
import os
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import httpx2
import pytest

from app import db, demo, main, outbox, provisioning
from app.auth import Installation
from app.db import Database
from app.graphql import nodes
from app.lifecycle import MemberRole, Permission, TransitionType
from app.provisioning import AccountItem, MemberItem, Outcome
from app.settings import Settings
from tests.cast import ALICE, BILLING, CAROL, subject
from tests.delivery.smtp_server import Accepted, SmtpServer
from tests.processes import Processes

pytestmark = pytest.mark.postgres

SEED = os.environ.get("TEST_SEED", "sunset")
"""Chooses who is killed, what the clients do, and how the mail server behaves."""

CUSTOMERS = 6
STEPS = 6
"""Each kills one or two processes and waits for those that take their places."""
ACTIONS = 20
"""What the clients do, together, in one step."""

GONE = "gone@acme.example"
"""An address that the mail server refuses for good."""
BILLING_MEMBERS = (ALICE, CAROL, GONE)

LEASES_LAPSE = outbox.LEASE + timedelta(minutes=1)
WAITS_END = timedelta(hours=9)
"""Longer than the longest wait for another try."""

MOODS: list[dict[str, Any]] = [
    {},
    {"answer_data": "451 4.3.0 Try again later"},
    {"drop_after_data": True},
    {"delay": 0.05},
]
"""Ways in which the mail server behaves for one step."""

GIVE_UP_SECONDS = 240
"""A client's patience, and the test's: far more than a slow machine needs."""


class Over(Exception):
    """The clients have done what they were to do, and this one has nothing to end."""


class Ration:
    """How many actions the clients may still begin, and how many are acknowledged."""

    def __init__(self) -> None:
        self._left = 0
        self.over = False
        self._changed = asyncio.Condition()
        self.acknowledged = 0

    async def grant(self, count: int) -> None:
        async with self._changed:
            self._left += count
            self._changed.notify_all()

    async def end(self) -> None:
        async with self._changed:
            self.over = True
            self._changed.notify_all()

    async def take(self, *, ends: bool) -> None:
        """Wait for one. When there are no more, whoever `ends` what was begun may go on, and others stop."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._left or self.over)
            if self.over and not ends:
                raise Over
            self._left -= 1

    async def acknowledge(self) -> None:
        async with self._changed:
            self.acknowledged += 1
            self._changed.notify_all()

    async def reached(self, count: int) -> None:
        async with asyncio.timeout(GIVE_UP_SECONDS), self._changed:
            await self._changed.wait_for(lambda: self.acknowledged >= count)


class Client:
    """Sends a mutation with its idempotency key until somebody answers, to whichever process; now and then twice at
    the same time."""

    def __init__(
        self, processes: Processes, installation: Installation, http: httpx2.AsyncClient, chance: random.Random
    ) -> None:
        self._processes = processes
        self._installation = installation
        self._http = http
        self._chance = chance
        self.lost = 0
        """Tries that nobody answered."""

    async def do(self, who: str, mutation: str, selection: str, **given: Any) -> dict[str, Any]:
        """The success. Whoever confirmed a cancellation has no access any more: a repeated one is told that."""
        kind = mutation[0].upper() + mutation[1:]
        body = {
            "query": f"mutation($input: {kind}Input!) {{ done: {mutation}(input: $input) {{ __typename "
            f"... on {kind}Success {{ {selection} }} }} }}",
            "variables": {"input": {**given, "idempotencyKey": str(uuid4())}},
        }
        times = 2 if self._chance.random() < 0.25 else 1
        answers = await asyncio.gather(*(self._answer(who, body) for _ in range(times)))
        told = [answer["data"]["done"] for answer in answers if "errors" not in answer]
        codes = {error["extensions"]["code"] for answer in answers for error in answer.get("errors", ())}
        assert codes <= ({"ACCESS_REMOVED"} if mutation == "confirmCancellation" else set()), answers
        assert {one["__typename"] for one in told} <= {f"{kind}Success"}, told
        assert all(one == told[0] for one in told)
        return told[0] if told else {}

    async def _answer(self, who: str, body: dict[str, Any]) -> dict[str, Any]:
        token = self._installation.tokens.mint(subject(who), timedelta(hours=1))
        async with asyncio.timeout(GIVE_UP_SECONDS):
            while True:
                servers = [process for process in self._processes.running if process.command == "serve"]
                try:
                    response = await self._http.post(
                        f"{self._chance.choice(servers).url}/graphql",
                        json=body,
                        headers={"Authorization": f"Bearer {token}"},
                    )
                except httpx2.TransportError:
                    pass
                else:
                    if response.status_code != 503:
                        assert response.status_code in {200, 403}, response.text
                        return cast("dict[str, Any]", response.json())
                    assert response.headers["Retry-After"]
                self.lost += 1
                await asyncio.sleep(0.05)


@dataclass
class Customer:
    """One account with what its clients were told, which is what must have happened."""

    name: str
    id: UUID
    leaves: bool
    """Is canceled in the end."""
    status: str = "ACTIVE"
    held: bool = False
    epoch: int = 0
    history: list[tuple[int, int, str, str]] = field(default_factory=list)
    """Sequence, epoch, type and status."""
    letters: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Template and recipient."""

    def happened(self, kind: TransitionType, status: str | None = None) -> None:
        self.status = status or self.status
        self.epoch += kind in {TransitionType.CANCELED, TransitionType.RESTARTED}
        self.history.append((len(self.history) + 1, self.epoch, kind.value, self.status))

    def told(self, template: str, *members: str) -> None:
        self.letters.update((template, member) for member in members or BILLING_MEMBERS)


async def story(customer: Customer, client: Client, ration: Ration, chance: random.Random) -> None:
    """Cancel, perhaps say why, withdraw or confirm, perhaps hold and release, restart; again and again."""
    account = nodes.encode(nodes.Kind.ACCOUNT, customer.id)

    async def do(who: str, mutation: str, selection: str = "account { id }", **given: Any) -> dict[str, Any]:
        await ration.take(ends=customer.leaves)
        return await client.do(who, mutation, selection, **given)

    async def note(kind: TransitionType, status: str | None = None) -> None:
        customer.happened(kind, status)
        await ration.acknowledge()

    try:
        while True:
            who = chance.choice((ALICE, CAROL))
            asked = await do(who, "cancelAccount", "confirmationToken request { id }", accountId=account)
            await note(TransitionType.CANCELLATION_REQUESTED)
            request = asked["request"]["id"]
            if chance.random() < 0.4:
                await do(
                    who, "submitFeedback", "feedback { id }", requestId=request, reason="UNUSED", comment="Why not"
                )
                await note(TransitionType.FEEDBACK_SUBMITTED)
            if chance.random() < 0.25 and not ration.over:
                await do(who, "withdrawCancellation", accountId=account)
                customer.told("cancellation-withdrawn")
                await note(TransitionType.CANCELLATION_WITHDRAWN)
                continue
            await do(
                who,
                "confirmCancellation",
                requestId=request,
                confirmationToken=asked["confirmationToken"],
                accountName=customer.name,
            )
            customer.told("cancellation-confirmed", who)
            customer.told("cancellation-notice", *(one for one in BILLING_MEMBERS if one != who))
            await note(TransitionType.CANCELED, "CANCELED")
            if chance.random() < 0.5:
                await do(BILLING, "holdDeletion", accountId=account, note="Wait")
                customer.held = True
                await note(TransitionType.DELETION_HELD)
                if chance.random() < 0.7 or customer.leaves:
                    await do(BILLING, "releaseDeletion", accountId=account, note="Go on")
                    customer.held = False
                    customer.told("deletion-rescheduled")
                    await note(TransitionType.DELETION_RELEASED)
            if ration.over:
                return
            await do(BILLING, "restartAccount", accountId=account)
            customer.held = False
            customer.told("account-restarted")
            await note(TransitionType.RESTARTED, "ACTIVE")
    except Over:
        pass


async def havoc(processes: Processes, server: SmtpServer, ration: Ration, chance: random.Random) -> None:
    """While the clients act: kill, start others, misbehave as a mail server, let leases lapse."""
    moods = MOODS * (STEPS // len(MOODS) + 1)
    chance.shuffle(moods)
    for step in range(STEPS):
        await ration.grant(ACTIONS)
        for name, value in ({"answer_data": None, "drop_after_data": False, "delay": 0.01} | moods[step]).items():
            setattr(server, name, value)
        await ration.reached(step * ACTIONS + chance.randrange(ACTIONS))
        victims = chance.sample(processes.running, chance.choice((1, 2)))
        for victim in victims:
            processes.kill(victim)
        await processes.ready(
            *(processes.serve() if victim.command == "serve" else processes.worker() for victim in victims)
        )
        await advance(LEASES_LAPSE)
        await ration.reached((step + 1) * ACTIONS)
    await ration.end()


async def advance(by: timedelta) -> None:
    await db.advance_clock(by)
    await db.notify(outbox.CHANNEL)


async def count(condition: str) -> int:
    row = await db.fetch_one(f"SELECT COUNT(*) AS count FROM {condition}")
    assert row is not None
    return int(row["count"])


async def none_left(condition: str, *, leap: timedelta) -> None:
    """Return when there is no such row. From time to time the clock leaps, so that what was left by the dead
    and what waits for another try is due."""
    async with asyncio.timeout(GIVE_UP_SECONDS):
        looks = 0
        while await count(condition):
            if looks % 100 == 0:
                await advance(leap)
            looks += 1
            await asyncio.sleep(0.05)


def dice(whose: str) -> random.Random:
    return random.Random(f"{SEED} {whose}")  # noqa: S311  chance that can be repeated; not a secret


async def made(installation: Installation) -> list[Customer]:
    await demo.make(installation)
    members = [
        MemberItem(
            subject=demo.member_subject(email),
            email=email,
            name=email.partition("@")[0].title(),
            role=MemberRole.ADMIN if email == ALICE else MemberRole.MEMBER,
            permissions=frozenset(Permission),
        )
        for email in BILLING_MEMBERS
    ]
    items = [
        AccountItem(reference=f"customer-{number}", name=f"Customer {number}", plan_code="essentials", members=members)
        for number in range(CUSTOMERS)
    ]
    results = await provisioning.sync(installation, items)
    assert {result.outcome for result in results} == {Outcome.CREATED}
    return [
        Customer(item.name, cast("UUID", result.account_id), leaves=number % 2 == 0)
        for number, (item, result) in enumerate(zip(items, results, strict=True))
    ]


OPEN = "outbox WHERE delivered_at IS NULL AND dead_at IS NULL"


async def test_whoever_is_killed_nothing_is_lost_and_nothing_happens_twice(
    postgres_database: Database, tmp_path: Path
) -> None:
    chance = dice("havoc")
    with SmtpServer() as server, Processes(tmp_path, postgres_database.url, SUNSET_SMTP_URL=server.url) as processes:
        mail_chance = dice("mail")
        server.answer_recipient = lambda address: (
            "550 5.1.1 No such user" if address == GONE else "451 4.2.1 Busy" if mail_chance.random() < 0.1 else None
        )
        installation = main.installation(Settings.load(processes.environ))
        customers = await made(installation)
        await processes.ready(*(start() for start in (processes.serve, processes.worker) for _ in range(3)))
        ration = Ration()
        async with httpx2.AsyncClient(timeout=60) as http, asyncio.TaskGroup() as tasks:
            client = Client(processes, installation, http, dice("client"))
            for customer in customers:
                tasks.create_task(story(customer, client, ration, dice(customer.name)))
            tasks.create_task(havoc(processes, server, ration, chance))
        assert len(processes.running) == 6

        server.answer_data, server.drop_after_data, server.delay = None, False, 0
        server.answer_recipient = lambda address: "550 5.1.1 No such user" if address == GONE else None
        await none_left(OPEN, leap=WAITS_END)
        for customer in customers:
            await check_history(customer)
        await check_letters(customers, server.messages)
        assert client.lost, "no client ever met a process that was killed"

        await check_deletions(customers, processes, server, chance)
        check_logs(processes)


async def check_history(customer: Customer) -> None:
    """It is what the clients were told: no step more or less, without a gap, in a legal order."""
    rows = await db.fetch("SELECT * FROM transition WHERE account_id = $1 ORDER BY sequence", customer.id)
    assert [(row["sequence"], row["epoch"], row["type"], row["account_status"]) for row in rows] == customer.history
    row = await db.fetch_one("SELECT * FROM account WHERE id = $1", customer.id)
    assert row is not None
    assert (row["status"], row["epoch"], row["last_sequence"], row["deletion_held_at"] is not None) == (
        customer.status,
        customer.epoch,
        len(customer.history),
        customer.held,
    )
    requests = await db.fetch(
        "SELECT status FROM cancellation_request WHERE account_id = $1 ORDER BY requested_at", customer.id
    )
    closed = {"WITHDRAWN", "REVERTED"}
    assert {one["status"] for one in requests[:-1]} <= closed
    assert {one["status"] for one in requests[-1:]} <= (
        {"EFFECTIVE"} if customer.status == "CANCELED" else closed | {"PENDING_CONFIRMATION"}
    )


async def check_letters(customers: list[Customer], seen: list[Accepted]) -> None:
    """Every promised letter was promised once, and arrived or is a dead letter; its copies are one message."""
    rows = await db.fetch("SELECT * FROM outbox")
    for customer in customers:
        assert customer.letters == Counter(
            (row["template"], row["recipient_address"]) for row in rows if row["account_id"] == customer.id
        )
    copies = copies_of(seen)
    assert copies.keys() <= {row["message_id"] for row in rows}
    assert len({row["message_id"] for row in rows}) == len(rows)
    for row in rows:
        if row["recipient_address"] == GONE:
            assert row["dead_at"] is not None
            assert "550" in row["last_error"]
            assert row["message_id"] not in copies
        else:
            assert row["delivered_at"] is not None
            (content,) = {copy.content for copy in copies[row["message_id"]]}  # equal byte for byte
            assert {copy.recipient for copy in copies[row["message_id"]]} == {row["recipient_address"]}
            assert row["recipient_address"].encode() in content
    assert any(row["attempts"] > 1 for row in rows), "nothing was ever tried twice: the havoc was none"


def copies_of(seen: list[Accepted]) -> dict[str, list[Accepted]]:
    found = defaultdict(list)
    for one in seen:
        found[str(one.message["Message-ID"])].append(one)
    return found


async def check_deletions(
    customers: list[Customer], processes: Processes, server: SmtpServer, chance: random.Random
) -> None:
    """The 60 days later: workers die while they delete, and each deletion happens once, and is told of."""
    to_go = [customer for customer in customers if customer.status == "CANCELED" and not customer.held]
    assert len(to_go) >= CUSTOMERS // 2
    before = len(server.messages)
    workers = [process for process in processes.running if process.command == "worker"]
    await advance(timedelta(days=61))
    ids = ", ".join(f"'{customer.id}'" for customer in to_go)
    await none_left(
        f"(SELECT 1 WHERE NOT EXISTS (SELECT 1 FROM account WHERE id IN ({ids}) AND status <> 'CANCELED')) nobody",
        leap=timedelta(minutes=1),
    )
    for victim in chance.sample(workers, 2):
        processes.kill(victim)
    await none_left(f"account WHERE id IN ({ids}) AND status <> 'DELETED'", leap=timedelta(hours=1))
    await none_left(OPEN, leap=WAITS_END)

    copies = copies_of(server.messages[before:])
    for customer in to_go:
        rows = await db.fetch("SELECT type FROM transition WHERE account_id = $1 ORDER BY sequence", customer.id)
        assert [row["type"] for row in rows[len(customer.history) :]] == ["account.deletion_started", "account.deleted"]
        assert await count(f"tombstone WHERE account_id = '{customer.id}'") == 1
        last = await db.fetch("SELECT * FROM outbox WHERE account_id = $1", customer.id)
        assert {row["template"] for row in last} == {"account-deleted"}
        arrived = [copies[row["message_id"]] for row in last if row["delivered_at"]]
        assert sorted({copy.recipient for copy in one}.pop() for one in arrived) == [ALICE, CAROL]
        assert all(len({copy.content for copy in one}) == 1 for one in arrived)
        assert [row["dead_at"] is not None for row in last if not row["delivered_at"]] == [True]
    others = {customer.id for customer in customers} - {customer.id for customer in to_go}
    for row in await db.fetch("SELECT id, status FROM account WHERE id = ANY($1)", list(others)):
        assert row["status"] in {"ACTIVE", "CANCELED"}


def check_logs(processes: Processes) -> None:
    """Nothing went wrong in a way that nobody had thought of."""
    for process in processes.all:
        for line in process.log.read_text().splitlines():
            if line.startswith("{") and line.endswith("}"):
                assert json.loads(line)["level"] not in {"error", "critical"}, line
            else:
                assert "Traceback" not in line, process.log.read_text()
