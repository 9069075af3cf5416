"""What tests of who has obeyed share: a policy that names two systems, and the services that speak for them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from app import provisioning
from app.db import Database
from app.lifecycle import Scope
from app.policy import EnforcingSystem
from app.tokens import DEVELOPMENT_ISSUER
from tests.cast import SUPPORT, Stage, stage, subject

MAILER, LOGIN = "mailer", "login"
MINUTE = timedelta(minutes=1)
SYSTEMS = (
    EnforcingSystem(code=MAILER, name="Mail delivery", within=10 * MINUTE),
    EnforcingSystem(code=LOGIN, name="Sign-in", within=30 * MINUTE),
)


async def add_system(name: str, *scopes: Scope) -> None:
    """A service with the scope `enforcement`, unless others are given."""
    await provisioning.add_service(
        name=name,
        scopes=frozenset(scopes or {Scope.ENFORCEMENT}),
        issuer=DEVELOPMENT_ISSUER,
        subject=subject(name),
    )


@asynccontextmanager
async def obeyed(database: Database, directory: Path, **changes: Any) -> AsyncIterator[Stage]:
    """The service with the demo company and two enforcing systems. `changes` are of the policy."""
    async with stage(database, directory, **{"enforcing_systems": SYSTEMS, **changes}) as house:
        for system in (MAILER, LOGIN):
            await add_system(system)
        yield house


async def acknowledge(house: Stage, who: str, epoch: int, reference: str = "acme") -> dict[str, Any]:
    """What a service is answered."""
    return await house.do(
        who,
        "acknowledgeEnforcement",
        "... on AcknowledgeEnforcementSuccess { enforcement { system name epoch status askedAt dueAt enforcedAt isLate "
        "account { name } } } ... on EnforcementNotAwaitedError { epoch accountStatus }",
        accountId=await house.account_id(reference),
        epoch=epoch,
    )


async def shown(house: Stage, reference: str = "acme", who: str = SUPPORT) -> list[dict[str, Any]]:
    """What staff sees of an account's systems."""
    answer = await house.ask(
        who,
        "query($id: ID!) { account(id: $id) { enforcement { system name epoch status askedAt dueAt enforcedAt isLate "
        "account { name } } } }",
        id=await house.account_id(reference),
    )
    found: list[dict[str, Any]] = answer["data"]["account"]["enforcement"]
    return found


async def statuses(house: Stage, reference: str = "acme") -> dict[str, str]:
    """System -> PENDING, LATE (which is PENDING, and told as such) or ENFORCED."""
    found = await shown(house, reference)
    assert all(one["status"] == "PENDING" for one in found if one["isLate"])
    return {one["system"]: "LATE" if one["isLate"] else one["status"] for one in found}
