"""Every root operation of the schema x every kind of caller x every state of an account: what comes of it.

The table is written by hand and the operations are taken from the schema: one without a row here fails. Whatever is
refused is seen to have changed nothing.
"""

import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import graphql
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from graphql import GraphQLField

from app import accounts, db, endpoints, provisioning
from app.db import Database, uuid7
from app.graphql import nodes
from app.graphql.nodes import Kind
from app.graphql.schema import printed
from app.lifecycle import LinkPurpose, MemberRole, Permission, Scope, StaffRole
from app.messages import LinkGrant
from app.models import Account, CancellationRequest, Member, Offer, RateLimit, Staff
from app.tokens import DEVELOPMENT_ISSUER
from tests import cast, enforcing
from tests.actions.test_limiting import UNLIMITED_MUTATIONS, service
from tests.cast import ALICE, BILLING, BOB, CAROL, CSM, GATEKEEPER, GINA, HOST, SUPPORT, Stage
from tests.enforcing import MAILER

STATES = ("ACTIVE", "ASSISTANCE", "PENDING", "SCHEDULED", "CANCELED", "CLOSED", "DELETING", "DELETED")
"""ASSISTANCE and PENDING: active, with alice's request open. CLOSED: canceled, and the time to restart is over."""

# Who asks about acme, which names the Customer Success Manager `csm`:
#   admin, permitted, member   alice, who asked to cancel; carol, who has the permission; and who has it not (any more)
#   stranger                   the admin of another account
#   ..._link                   the bearer of a link in alice's emails; ungranted: who has lost the permission since;
#                              foreign: about another account
#
# ok: done, or shown. null: nothing there. forbidden, removed: the top-level errors FORBIDDEN and ACCESS_REMOVED.
# missing: NotFoundError, denied: PermissionDeniedError, state: AccountStateError, asked:
# CancellationAlreadyRequestedError, closed: RestartWindowClosedError, clear: DeletionsNotHaltedError, unawaited:
# EnforcementNotAwaitedError. One word stands for all states.
#
# Members whose account is canceled are told so, whatever they ask; once its data is gone nobody knows them.
TABLE = """
viewer
  admin, permitted, member         ok        ok        ok        ok        removed   removed   removed   forbidden
  stranger, host, gatekeeper       ok
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

plans
  admin, permitted, member         ok        ok        ok        ok        removed   removed   removed   forbidden
  stranger, host, gatekeeper       ok
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

feedbackReasons
  admin, permitted, member         ok        ok        ok        ok        removed   removed   removed   forbidden
  stranger, host, gatekeeper       ok
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

account
  admin, permitted, member         ok        ok        ok        ok        removed   removed   removed   forbidden
  stranger, host, gatekeeper       null
  csm, other_csm, billing, support ok
  confirm_link                     null      null      null      null      removed   removed   removed   forbidden
  feedback_link, restart_link      null      null      null      null      null      null      null      forbidden
  ungranted_link                   null      null      null      null      null      null      null      forbidden
  foreign_link                     null

accounts
  admin, permitted, member         forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       forbidden
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

deliveries
  admin, permitted, member         forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       forbidden
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

cancellationRequests
  admin, permitted, member         forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       forbidden
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

deletions
  admin, permitted, member         forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       forbidden
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

enforcements
  admin, permitted, member         forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       forbidden
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

deletionBreaker
  admin, permitted, member         forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       forbidden
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

deletionHalts
  admin, permitted, member         forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       forbidden
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

cancellationPreview
  admin, permitted                 ok        ok        ok        null      removed   removed   removed   forbidden
  member                           forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       null
  csm, other_csm, billing, support ok        ok        ok        null      null      null      null      null
  confirm_link                     null      null      null      null      removed   removed   removed   forbidden
  feedback_link, restart_link      null      null      null      null      null      null      null      forbidden
  ungranted_link                   null      null      null      null      null      null      null      forbidden
  foreign_link                     null

node
  admin, permitted                 ok        ok        ok        ok        removed   removed   removed   forbidden
  member                           null      null      null      null      removed   removed   removed   forbidden
  stranger, host, gatekeeper       null
  csm, other_csm, billing, support ok
  confirm_link                     null      null      null      null      removed   removed   removed   forbidden
  feedback_link, restart_link      null      null      null      null      null      null      null      forbidden
  ungranted_link                   null      null      null      null      null      null      null      forbidden
  foreign_link                     null

cancelAccount
  admin                            ok        ok        ok        state     removed   removed   removed   forbidden
  permitted                        ok        asked     asked     state     removed   removed   removed   forbidden
  member                           denied    denied    denied    denied    removed   removed   removed   forbidden
  csm, billing                     ok        ok        asked     state     state     state     state     state
  other_csm, support               denied
  stranger, host, gatekeeper       missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

submitFeedback
  admin, permitted                 ok        ok        ok        ok        removed   removed   removed   forbidden
  member                           denied    denied    denied    denied    removed   removed   removed   forbidden
  csm, other_csm, billing, support denied
  stranger, host, gatekeeper       missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link                    state     state     state     state     ok        ok        state     forbidden
  restart_link                     denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

acceptOffer
  admin, permitted                 state     ok        ok        state     removed   removed   removed   forbidden
  member                           denied    denied    denied    denied    removed   removed   removed   forbidden
  csm, other_csm, billing, support denied
  stranger, host, gatekeeper       missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

declineOffer
  admin, permitted                 state     ok        ok        state     removed   removed   removed   forbidden
  member                           denied    denied    denied    denied    removed   removed   removed   forbidden
  csm, other_csm, billing, support denied
  stranger, host, gatekeeper       missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

withdrawCancellation
  admin, permitted                 state     ok        ok        ok        removed   removed   removed   forbidden
  member                           denied    denied    denied    denied    removed   removed   removed   forbidden
  csm                              state     ok        ok        ok        state     state     state     state
  other_csm, billing, support      denied
  stranger, host, gatekeeper       missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

confirmCancellation
  admin, permitted                 state     state     ok        state     removed   removed   removed   forbidden
  member                           denied    denied    denied    denied    removed   removed   removed   forbidden
  csm, other_csm, billing, support denied
  stranger, host, gatekeeper       missing
  confirm_link                     state     state     ok        state     removed   removed   removed   forbidden
  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

restartAccount
  admin, permitted, member         denied    denied    denied    denied    removed   removed   removed   forbidden
  billing                          state     state     state     state     ok        closed    closed    closed
  csm, other_csm, support          denied
  stranger, host, gatekeeper       missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

requestRestart
  admin, permitted, member         missing   missing   missing   missing   removed   removed   removed   forbidden
  stranger, host, gatekeeper       missing
  csm, other_csm, billing, support missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link                    denied    denied    denied    denied    denied    denied    denied    forbidden
  restart_link                     state     state     state     state     ok        closed    closed    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     state

holdDeletion
  admin, permitted, member         denied    denied    denied    denied    removed   removed   removed   forbidden
  billing                          state     state     state     state     ok        ok        state     state
  csm, other_csm, support          denied
  stranger, host, gatekeeper       missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

releaseDeletion
  admin, permitted, member         denied    denied    denied    denied    removed   removed   removed   forbidden
  billing                          state
  csm, other_csm, support          denied
  stranger, host, gatekeeper       missing
  confirm_link                     denied    denied    denied    denied    removed   removed   removed   forbidden
  feedback_link, restart_link      denied    denied    denied    denied    denied    denied    denied    forbidden
  ungranted_link                   missing   missing   missing   missing   missing   missing   missing   forbidden
  foreign_link                     missing

approveDeletions
  admin, permitted, member         forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       forbidden
  billing                          clear
  csm, other_csm, support          denied
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

advanceClock
  admin, permitted, member         forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       forbidden
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

syncAccounts
  admin, permitted, member         denied    denied    denied    denied    removed   removed   removed   forbidden
  host                             ok
  stranger, gatekeeper             denied
  csm, other_csm, billing, support denied
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

acknowledgeEnforcement
  admin, permitted, member         denied    denied    denied    denied    removed   removed   removed   forbidden
  mailer                           unawaited unawaited unawaited unawaited ok        ok        ok        ok
  stranger, host, gatekeeper       denied
  csm, other_csm, billing, support denied
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

eventTypes
  admin, permitted, member         ok        ok        ok        ok        removed   removed   removed   forbidden
  stranger, host, gatekeeper       ok
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

webhookEndpoints
  admin, permitted, member         forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       forbidden
  integrator                       ok
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

webhookDeliveries
  admin, permitted, member         forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  stranger, host, gatekeeper       forbidden
  integrator                       ok
  csm, other_csm, billing, support ok
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

createWebhookEndpoint
  admin, permitted, member         denied    denied    denied    denied    removed   removed   removed   forbidden
  integrator, billing              ok
  stranger, host, gatekeeper       denied
  csm, other_csm, support          denied
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

updateWebhookEndpoint
  admin, permitted, member         denied    denied    denied    denied    removed   removed   removed   forbidden
  integrator, billing              ok
  stranger, host, gatekeeper       denied
  csm, other_csm, support          denied
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

rotateWebhookSecret
  admin, permitted, member         denied    denied    denied    denied    removed   removed   removed   forbidden
  integrator, billing              ok
  stranger, host, gatekeeper       denied
  csm, other_csm, support          denied
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

disableWebhookEndpoint
  admin, permitted, member         denied    denied    denied    denied    removed   removed   removed   forbidden
  integrator, billing              ok
  stranger, host, gatekeeper       denied
  csm, other_csm, support          denied
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

enableWebhookEndpoint
  admin, permitted, member         denied    denied    denied    denied    removed   removed   removed   forbidden
  integrator, billing              ok
  stranger, host, gatekeeper       denied
  csm, other_csm, support          denied
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

pingWebhookEndpoint
  admin, permitted, member         denied    denied    denied    denied    removed   removed   removed   forbidden
  integrator, billing              ok
  stranger, host, gatekeeper       denied
  csm, other_csm, support          denied
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden

redeliverWebhook
  admin, permitted, member         denied    denied    denied    denied    removed   removed   removed   forbidden
  integrator, billing              ok
  stranger, host, gatekeeper       denied
  csm, other_csm, support          denied
  confirm_link                     forbidden forbidden forbidden forbidden removed   removed   removed   forbidden
  feedback_link, restart_link      forbidden
  ungranted_link, foreign_link     forbidden
"""

NOBODY = ("no_token", "expired", "wrong_audience", "forged_key")
"""UNAUTHENTICATED, whatever they ask."""
UNKNOWN = ("unknown", "removed", "removed_link", "former_staff", "former_service")
"""FORBIDDEN, whatever they ask: a good token of nobody here."""
LIKE = {"ungranted": "member", "demoted": "member", "integrator": "gatekeeper", "mailer": "gatekeeper"}
"""Tokens issued to a member with the permission and to an admin, before it was taken from them; and services with the
scope `webhooks`, or with `enforcement` and in the policy, which are like any other where they have no line of their
own."""

WORDS = {
    "UNAUTHENTICATED": "unauthenticated",
    "FORBIDDEN": "forbidden",
    "ACCESS_REMOVED": "removed",
    "NotFoundError": "missing",
    "PermissionDeniedError": "denied",
    "AccountStateError": "state",
    "CancellationAlreadyRequestedError": "asked",
    "RestartWindowClosedError": "closed",
    "DeletionsNotHaltedError": "clear",
    "EnforcementNotAwaitedError": "unawaited",
}

MAY_NOT = {"unauthenticated", "forbidden", "removed", "missing", "denied"}
"""What is answered to who may not do it at all, whatever state it is in."""

SCHEMA = graphql.build_schema(printed())
assert SCHEMA.query_type is not None
assert SCHEMA.mutation_type is not None
QUERIES, MUTATIONS = SCHEMA.query_type.fields, SCHEMA.mutation_type.fields


def read_table() -> dict[str, dict[str, dict[str, str]]]:
    """Operation, caller, state -> word."""
    rows: dict[str, dict[str, dict[str, str]]] = {}
    operation = ""
    for line in filter(str.strip, TABLE.splitlines()):
        if not line.startswith(" "):
            operation = line.strip()
            rows[operation] = {}
            continue
        callers, words = line[:35].split(","), line[35:].split()
        outcomes = dict(zip(STATES, words * len(STATES) if len(words) == 1 else words, strict=len(words) > 1))
        for caller in callers:
            assert caller.strip() not in rows[operation], f"{operation}: {caller} stands twice"
            rows[operation][caller.strip()] = outcomes
    for row in rows.values():
        row |= {caller: row[like] for caller, like in LIKE.items() if caller not in row}
        row |= {caller: dict.fromkeys(STATES, "unauthenticated") for caller in NOBODY}
        row |= {caller: dict.fromkeys(STATES, "forbidden") for caller in UNKNOWN}
    return rows


ROWS = read_table()


def test_every_operation_of_the_schema_has_a_row_and_every_row_its_operation() -> None:
    assert set(ROWS) == set(QUERIES) | set(MUTATIONS)


@pytest.mark.parametrize("operation", ROWS)
def test_every_row_has_every_caller(operation: str) -> None:
    assert set(ROWS[operation]) == set(ROWS["viewer"])


@dataclass(frozen=True)
class Scene:
    """The service with acme in one state, and a token for each caller, issued before anything was taken away."""

    stage: Stage
    tokens: dict[str, str | None]
    account_id: UUID
    request_id: UUID
    offer_id: UUID
    endpoint_id: UUID
    delivery_id: UUID

    def arguments(self, operation: str, caller: str) -> dict[str, Any]:
        """Values that would be accepted, for each argument of a query or field of a mutation's input."""
        account = nodes.encode(Kind.ACCOUNT, self.account_id)
        request = nodes.encode(Kind.CANCELLATION_REQUEST, self.request_id)
        offer = nodes.encode(Kind.OFFER, self.offer_id)
        endpoint = nodes.encode(Kind.WEBHOOK_ENDPOINT, self.endpoint_id)
        by_staff = {"note": "They called."} if ROWS["accounts"][caller]["ACTIVE"] == "ok" else {}
        known: dict[str, dict[str, Any]] = {
            "account": {"id": account},
            "node": {"id": request},
            "cancellationPreview": {"accountId": account},
            "cancelAccount": {"accountId": account, **by_staff},
            "submitFeedback": {"requestId": request, "reason": "OTHER"},
            "acceptOffer": {"offerId": offer},
            "declineOffer": {"offerId": offer},
            "withdrawCancellation": {"accountId": account},
            "confirmCancellation": {
                "requestId": request,
                "confirmationToken": self.stage.installation.tokens.confirmation_token(self.request_id, 0),
                "accountName": "Acme",
            },
            "restartAccount": {"accountId": account},
            "holdDeletion": {"accountId": account, "note": "They called."},
            "releaseDeletion": {"accountId": account, "note": "They called."},
            "approveDeletions": {"count": 1, "note": "They called."},
            "acknowledgeEnforcement": {"accountId": account, "epoch": 1},
            "advanceClock": {"by": "1s"},
            "createWebhookEndpoint": {"url": "https://hooks.example.com/"},
            "updateWebhookEndpoint": {"endpointId": endpoint, "description": "Changed."},
            "rotateWebhookSecret": {"endpointId": endpoint},
            "disableWebhookEndpoint": {"endpointId": endpoint},
            "enableWebhookEndpoint": {"endpointId": endpoint},
            "pingWebhookEndpoint": {"endpointId": endpoint},
            "redeliverWebhook": {"deliveryId": nodes.encode(Kind.WEBHOOK_DELIVERY, self.delivery_id)},
            "syncAccounts": {"accounts": [{"reference": "hooli", "name": "Hooli", "planCode": "startup"}]},
        }
        return known.get(operation, {})

    async def outcome(self, operation: str, caller: str) -> str:
        """The table's word for what comes of it."""
        answer = await self.answer(operation, caller, self.arguments(operation, caller))
        if "errors" in answer:
            (error,) = answer["errors"]
            assert not (answer.get("data") or {}).get("it")
            return WORDS.get(error["extensions"]["code"], str(error))
        shown = answer["data"]["it"]
        if shown is None:
            return "null"
        kind = shown["__typename"] if isinstance(shown, dict) else ""
        return WORDS.get(kind, kind) if kind.endswith("Error") else "ok"

    async def answer(self, operation: str, caller: str, values: dict[str, Any]) -> dict[str, Any]:
        if operation in MUTATIONS:
            kind = MUTATIONS[operation].args["input"].type
            document = f"mutation($input: {kind}) {{ it: {operation}(input: $input) {{ __typename }} }}"
            values = {"input": values}
        else:
            document = query(operation, QUERIES[operation], set(values))
        response = await self.stage.post(document, values, token=self.tokens[caller])
        answer: dict[str, Any] = response.json()
        return answer


def query(name: str, field: GraphQLField, given: set[str]) -> str:
    kinds = {argument: str(field.args[argument].type) for argument in sorted(given)}
    variables = ", ".join(f"${argument}: {kind}" for argument, kind in kinds.items())
    arguments = ", ".join(f"{argument}: ${argument}" for argument in kinds)
    selection = "{ __typename }" if graphql.is_composite_type(graphql.get_named_type(field.type)) else ""
    return f"query{f'({variables})' if kinds else ''} {{ it: {name}{f'({arguments})' if kinds else ''} {selection} }}"


# ---------------------------------------------------------------------------------------------------- the scene


def person(email: str) -> str:
    return cast.subject(email)


async def add_member(reference: str, email: str, role: MemberRole, *permissions: Permission) -> None:
    await Member.create(
        id=uuid7(),
        account_id=await accounts.find(reference),
        issuer=DEVELOPMENT_ISSUER,
        subject=person(email),
        email=email,
        name=email,
        role=role,
        permissions=frozenset(permissions),
        created_at=await db.now(),
    )


async def add_people(stage: Stage) -> None:
    """Beside the cast: those from whom something is taken later."""
    for name in ("ungranted", "removed"):
        await add_member("acme", f"{name}@acme.example", MemberRole.MEMBER, Permission.ACCESS_BILLING_AND_ACCOUNT_INFO)
    await add_member("acme", "demoted@acme.example", MemberRole.ADMIN)
    for name in ("other_csm", "former"):
        await provisioning.add_staff(
            email=f"{name}@vendor.example",
            name=name,
            role=StaffRole.CUSTOMER_SUCCESS_MANAGER,
            issuer=DEVELOPMENT_ISSUER,
            subject=person(f"{name}@vendor.example"),
        )
    await provisioning.add_service(
        name="former", scopes=frozenset({Scope.PROVISION}), issuer=DEVELOPMENT_ISSUER, subject=person("former")
    )
    await provisioning.add_service(
        name="integrator",
        scopes=frozenset({Scope.WEBHOOKS}),
        issuer=DEVELOPMENT_ISSUER,
        subject=person("integrator"),
    )
    await enforcing.add_system(MAILER)
    # The host lists staff and services as members, too, and as admins: that gives them nothing.
    for insider in (CSM, "other_csm@vendor.example", BILLING, SUPPORT, HOST, GATEKEEPER, "integrator", MAILER):
        await add_member("acme", insider, MemberRole.ADMIN)
    csm = await Staff.get(email=CSM)
    await Account.filter(reference="acme").update(csm_id=csm.id)


async def take_away() -> None:
    """After the tokens were issued."""
    now = await db.now()
    await db.execute("UPDATE member SET permissions = '' WHERE email = 'ungranted@acme.example'")
    await db.execute("UPDATE member SET role = 'MEMBER' WHERE email = 'demoted@acme.example'")
    await db.execute("DELETE FROM member WHERE email = 'removed@acme.example'")
    await db.execute("UPDATE staff SET deactivated_at = $1 WHERE email = 'former@vendor.example'", now)
    await db.execute("UPDATE service SET deactivated_at = $1 WHERE name = 'former'", now)


async def ask(stage: Stage) -> UUID:
    asked = await stage.request_cancellation(ALICE)
    request_id = nodes.decode_as(Kind.CANCELLATION_REQUEST, asked["request"]["id"])
    assert request_id is not None
    return request_id


async def put_into(state: str, stage: Stage, account_id: UUID) -> UUID:
    """Brings acme into a state, by what people do and then by the clock. Returns the newest request."""
    if state == "ASSISTANCE":
        await Account.filter(id=account_id).update(plan_code="premium")
    request_id = await ask(stage)
    now = await db.now()
    if state == "ACTIVE":
        await stage.do(ALICE, "withdrawCancellation", accountId=nodes.encode(Kind.ACCOUNT, account_id))
    elif state == "SCHEDULED":
        later = now + timedelta(days=10)
        await CancellationRequest.filter(id=request_id).update(status="CONFIRMED", confirmed_at=now, effective_at=later)
        await Account.filter(id=account_id).update(
            status="CANCELLATION_SCHEDULED", cancellation_effective_at=later, current_period_end=later
        )
    elif state not in {"ASSISTANCE", "PENDING"}:
        done = await stage.cancel(ALICE)
        assert done["account"]["status"] == "CANCELED"
    if state in {"CLOSED", "DELETING", "DELETED"}:
        over = now - timedelta(minutes=1)
        await Account.filter(id=account_id).update(
            canceled_at=over - timedelta(days=60),
            restartable_until=over,
            deletion_scheduled_for=over,
            reminder_due_at=None,
        )
    if state in {"DELETING", "DELETED"}:
        await Account.filter(id=account_id).update(status="DELETING", deletion_started_at=now)
    if state == "DELETED":
        await Member.filter(account_id=account_id).delete()
        await Account.filter(id=account_id).update(status="DELETED", deleted_at=now)
    return request_id


def foreign_tokens(stage: Stage) -> dict[str, str | None]:
    """Of nobody who was let in: each but the last is right in everything but one thing."""
    now = datetime.now(UTC)
    claims = {
        "iss": DEVELOPMENT_ISSUER,
        "aud": "sunset",
        "sub": person(BILLING),
        "iat": now - timedelta(minutes=2),
        "exp": now + timedelta(hours=1),
    }
    own = Ed25519PrivateKey.from_private_bytes(stage.settings.derive_key("development issuer"))

    def signed(key: Ed25519PrivateKey = own, **changes: Any) -> str:
        return jwt.encode(claims | changes, key, algorithm="EdDSA")

    return {
        "no_token": None,
        "expired": signed(exp=now - timedelta(minutes=1)),
        "wrong_audience": signed(aud="another"),
        "forged_key": signed(Ed25519PrivateKey.generate()),
        "unknown": signed(sub="member:nobody@nowhere.example"),
    }


def link_token(
    stage: Stage,
    email: str,
    purpose: LinkPurpose,
    account_id: UUID,
    request_id: UUID,
    now: datetime | None = None,
) -> str:
    """`now` where the clock was moved."""
    grant = LinkGrant(
        purpose=purpose,
        issuer=DEVELOPMENT_ISSUER,
        subject=person(email),
        account_id=account_id,
        request_id=request_id,
    )
    now = now or datetime.now(UTC)
    return stage.installation.tokens.mint_link(grant, issued_at=now, expires_at=now + timedelta(days=60))


async def make_scene(stage: Stage, state: str) -> Scene:
    await add_people(stage)
    account_id, elsewhere = await stage.account_key("acme"), await stage.account_key("globex")
    named = {
        "admin": ALICE,
        "permitted": CAROL,
        "member": BOB,
        "ungranted": "ungranted@acme.example",
        "demoted": "demoted@acme.example",
        "removed": "removed@acme.example",
        "stranger": GINA,
        "csm": CSM,
        "other_csm": "other_csm@vendor.example",
        "billing": BILLING,
        "support": SUPPORT,
        "former_staff": "former@vendor.example",
        "host": HOST,
        "gatekeeper": GATEKEEPER,
        "former_service": "former",
        "integrator": "integrator",
        "mailer": MAILER,
    }
    tokens: dict[str, str | None] = {caller: stage.token(who) for caller, who in named.items()}
    request_id = await put_into(state, stage, account_id)
    offer = await Offer.filter(request_id=request_id).first()
    assert offer is not None
    for name, who, purpose, about in (
        ("confirm", ALICE, LinkPurpose.CONFIRM, account_id),
        ("feedback", ALICE, LinkPurpose.FEEDBACK, account_id),
        ("restart", ALICE, LinkPurpose.RESTART, account_id),
        ("ungranted", named["ungranted"], LinkPurpose.RESTART, account_id),
        ("removed", named["removed"], LinkPurpose.RESTART, account_id),
        ("foreign", GINA, LinkPurpose.RESTART, elsewhere),
    ):
        tokens[f"{name}_link"] = link_token(stage, who, purpose, about, request_id)
    made = await endpoints.create(
        None, stage.installation.receivers, url="https://hooks.example.com/", description=None, event_types=None
    )
    ping = await endpoints.ping(None, made.endpoint.id)
    await take_away()
    return Scene(
        stage=stage,
        tokens=tokens | foreign_tokens(stage),
        account_id=account_id,
        request_id=request_id,
        offer_id=offer.id,
        endpoint_id=made.endpoint.id,
        delivery_id=ping.id,
    )


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
async def scene(sqlite_database: Database, tmp_path: Path, state: str) -> AsyncIterator[Scene]:
    async with cast.stage(sqlite_database, tmp_path, enforcing_systems=enforcing.SYSTEMS) as stage:
        yield await make_scene(stage, state)


class Watch:
    """Tells whether the service has changed its database, and puts it back as it was."""

    def __init__(self, file: Path) -> None:
        self._own = sqlite3.connect(file)
        self._kept = sqlite3.connect(":memory:")
        self._own.backup(self._kept)
        self._version = self._now()

    def _now(self) -> int:
        version: int = self._own.execute("PRAGMA data_version").fetchone()[0]
        return version

    def changed(self) -> bool:
        return self._now() != self._version

    def restore(self) -> None:
        self._kept.backup(self._own)
        self._version = self._now()

    def close(self) -> None:
        self._own.close()
        self._kept.close()


async def test_matrix(scene: Scene, state: str, tmp_path: Path) -> None:
    wrong = []
    with closing(Watch(tmp_path / "sunset.db")) as watch:
        for operation, row in ROWS.items():
            for caller, expected in row.items():
                found = await scene.outcome(operation, caller)
                if found != expected[state]:
                    wrong.append(f"{operation} by {caller}: {found} instead of {expected[state]}")
                if watch.changed():
                    if operation not in MUTATIONS or found != "ok":
                        wrong.append(f"{operation} by {caller} changed the database, and answered {found}")
                    watch.restore()
    assert wrong == []


@pytest.mark.parametrize("state", ["PENDING", "CANCELED", "DELETED"], indirect=True)
async def test_who_may_not_act_is_refused_in_the_same_words_before_anything_is_counted(
    scene: Scene, state: str, tmp_path: Path
) -> None:
    wrong = []
    async with service(scene.stage, caller=1_000, account=1_000) as limited:
        scene = replace(scene, stage=limited)
        with closing(Watch(tmp_path / "sunset.db")) as watch:
            for operation in MUTATIONS.keys() - UNLIMITED_MUTATIONS:
                for caller, expected in ROWS[operation].items():
                    found = await scene.outcome(operation, caller)
                    if found != expected[state]:
                        wrong.append(f"{operation} by {caller}: {found} instead of {expected[state]}")
                    counted = await RateLimit.all().count()
                    if bool(counted) is (found in MAY_NOT) or (found in MAY_NOT and watch.changed()):
                        wrong.append(f"{operation} by {caller}: {found}, and {counted} allowances were used")
                    if watch.changed():
                        watch.restore()
    assert wrong == []


async def test_a_foreign_id_an_unknown_id_and_no_id_at_all_are_answered_alike(scene: Scene) -> None:
    """Else ids could be guessed: what others have, and what state it is in, is nobody's business."""
    unknown = UUID("01980000-0000-7000-8000-000000000000")
    tried = 0
    for operation in ROWS:
        given = scene.arguments(operation, "stranger")
        for key in [key for key in given if key == "id" or key.endswith("Id")]:
            kind, _ = nodes.decode(given[key]) or pytest.fail("an id")
            malformed = (nodes.encode(kind, unknown), nodes.encode(Kind.MEMBER, unknown), "x", "", "A" * 23)
            for caller in ("stranger", "host", "gatekeeper", "foreign_link"):
                foreign = await scene.answer(operation, caller, given)
                others = [await scene.answer(operation, caller, given | {key: one}) for one in malformed]
                assert all(json.dumps(foreign) == json.dumps(other) for other in others), f"{operation} by {caller}"
                tried += 1
    assert tried == 4 * 19


async def test_a_canceled_account_is_told_apart_from_none_by_its_own_members_alone(scene: Scene, state: str) -> None:
    document = f'{{ account(id: "{nodes.encode(Kind.ACCOUNT, scene.account_id)}") {{ name }} }}'
    answers = [(await scene.stage.post(document, token=scene.tokens[who])).json() for who in ("admin", "stranger")]
    assert answers[1] == {"data": {"account": None}}
    if state in {"CANCELED", "CLOSED", "DELETING"}:
        (error,) = answers[0]["errors"]
        told = error["extensions"]
        assert told["code"] == "ACCESS_REMOVED"
        assert told["contact"] == {"name": "Billing Team", "email": BILLING}
        assert told["canceledAt"] < told["restartableUntil"] <= told["deletionScheduledFor"]


@pytest.mark.parametrize("state", ["PENDING"], indirect=True)
@pytest.mark.parametrize(
    "operation", ["cancelAccount", "submitFeedback", "declineOffer", "acceptOffer", "withdrawCancellation"]
)
async def test_a_key_gives_nobody_an_answer_once_the_permission_is_gone(scene: Scene, operation: str) -> None:
    given = scene.arguments(operation, "admin") | {"idempotencyKey": "again"}
    done = await scene.answer(operation, "admin", given)
    assert await scene.answer(operation, "admin", given) == done
    assert done["data"]["it"]["__typename"].endswith("Success")
    await db.execute("UPDATE member SET role = 'MEMBER' WHERE email = $1", ALICE)
    refused = await scene.answer(operation, "admin", given)
    assert refused["data"]["it"]["__typename"] == "PermissionDeniedError"
