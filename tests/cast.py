"""The cast and the stage: the demo company on a database of the test, and clients that speak for its people."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from email import policy as email_policy
from email.message import EmailMessage
from email.parser import BytesParser
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import httpx2
from starlette.applications import Starlette

from app import accounts, demo, main
from app.auth import Call, Installation
from app.db import Database
from app.delivery.email import FolderMailer
from app.graphql import nodes
from app.settings import Settings
from app.timers import Timers
from app.worker import Worker

ALICE, CAROL, BOB = "alice@acme.example", "carol@acme.example", "bob@acme.example"
GINA = "gina@globex.example"
CSM, BILLING, SUPPORT = "csm@vendor.example", "billing@vendor.example", "support@vendor.example"
FINANCE = "finance@vendor.example"
"""Of the billing team too."""
HOST, GATEKEEPER = "host", "gatekeeper"


def subject(who: str) -> str:
    """The `sub` of a token of somebody of the cast."""
    if "@" not in who:
        return demo.service_subject(who)
    return demo.staff_subject(who) if who.endswith("@vendor.example") else demo.member_subject(who)


@dataclass
class Stage:
    """One running service with the demo company, and its mail."""

    app: Starlette
    settings: Settings
    installation: Installation
    mail: Path
    client: httpx2.AsyncClient

    def token(self, who: str, lifetime: timedelta = timedelta(hours=1)) -> str:
        return self.installation.tokens.mint(subject(who), lifetime)

    async def call(self, who: str) -> Call:
        """An action's call, without HTTP."""
        identity = await self.installation.tokens.verify(self.token(who))
        return Call(identity=identity, installation=self.installation)

    async def post(
        self, document: str, variables: dict[str, Any] | None = None, *, token: str | None
    ) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        return await self.client.post("/graphql", json={"query": document, "variables": variables}, headers=headers)

    async def ask(self, who: str, document: str, **variables: Any) -> dict[str, Any]:
        """The whole answer to somebody's operation."""
        response = await self.post(document, variables, token=self.token(who))
        return cast("dict[str, Any]", response.json())

    async def do(self, who: str, mutation: str, selection: str = "", **given: Any) -> dict[str, Any]:
        """What came of a mutation: its union's member, with `__typename`, or the top-level error."""
        return await self.do_as(self.token(who), mutation, selection, **given)

    async def do_as(self, token: str, mutation: str, selection: str = "", **given: Any) -> dict[str, Any]:
        """The same for whoever has the token."""
        kind = mutation[0].upper() + mutation[1:] + "Input"
        fields = "__typename ... on UserError { message } " + selection
        document = f"mutation($input: {kind}!) {{ done: {mutation}(input: $input) {{ {fields} }} }}"
        answer = (await self.post(document, {"input": given}, token=token)).json()
        if "errors" in answer:
            return cast("dict[str, Any]", answer["errors"][0])
        return cast("dict[str, Any]", answer["data"]["done"])

    async def account_id(self, reference: str) -> str:
        return nodes.encode(nodes.Kind.ACCOUNT, await self.account_key(reference))

    async def account_key(self, reference: str) -> UUID:
        key = await accounts.find(reference)
        assert key is not None
        return key

    async def request_cancellation(self, who: str = ALICE, reference: str = "acme", **more: Any) -> dict[str, Any]:
        """A cancellation asked for, with its request's id and token."""
        return await self.do(
            who,
            "cancelAccount",
            "... on CancelAccountSuccess { confirmationToken account { id name status } "
            "request { id status offers { id code status } } preview { membersLosingAccess } }"
            "... on CancellationAssistanceRequested { request { id status } customerSuccessManager { name email } }",
            accountId=await self.account_id(reference),
            **more,
        )

    async def cancel(self, who: str = ALICE, reference: str = "acme", name: str = "Acme") -> dict[str, Any]:
        """A cancellation asked for and confirmed."""
        asked = await self.request_cancellation(who, reference)
        return await self.do(
            who,
            "confirmCancellation",
            "... on ConfirmCancellationSuccess { account { id status canceledAt restartableUntil "
            "deletionScheduledFor canSendMessages membersCanSignIn } request { id status } }",
            requestId=asked["request"]["id"],
            confirmationToken=asked["confirmationToken"],
            accountName=name,
        )

    def worker(self) -> Worker:
        return Worker(
            self.installation,
            FolderMailer(self.mail),
            sender="Sunset <no-reply@vendor.example>",
            link_base="https://sunset.example/links",
            concurrency=4,
            grace=timedelta(seconds=5),
        )

    def timers(self) -> Timers:
        return Timers(self.installation, forget=FolderMailer(self.mail).forget)

    async def letters(self) -> list[EmailMessage]:
        """Every email so far, after delivering what is due, oldest first."""
        await self.worker().drain()
        parser = BytesParser(policy=email_policy.default)
        files = sorted(self.mail.glob("*.eml")) if self.mail.exists() else []
        return [parser.parsebytes(file.read_bytes()) for file in files]


def settings(directory: Path, database_url: str, **environ: str) -> Settings:
    return Settings.load(
        {
            "SUNSET_DATA_DIR": str(directory),
            "SUNSET_DATABASE_URL": database_url,
            "SUNSET_WORKER": "false",
            "SUNSET_DEMO": "false",
            "SUNSET_DATABASE_POOL_SIZE": "8",
            "SUNSET_RATE_LIMIT_CALLER": "0",
            "SUNSET_RATE_LIMIT_ACCOUNT": "0",
            "SUNSET_RATE_LIMIT_DOCUMENTS": "0",
            **environ,
        }
    )


@asynccontextmanager
async def stage(database: Database, directory: Path, **changes: Any) -> AsyncIterator[Stage]:
    """The service on the test's bound database. `changes` are of the policy."""
    used = settings(directory, database.url)
    installation = main.installation(used)
    installation = replace(installation, policy=replace(installation.policy, **changes))
    await demo.make(installation)
    app = main.create_app(used, installation)
    transport = httpx2.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        yield Stage(app=app, settings=used, installation=installation, mail=directory / "mailbox", client=client)
