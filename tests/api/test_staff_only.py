"""What staff wrote for staff, and who, reaches nobody else: by no path of the schema, in no later life of an account.

A canary stands in every column that the API does not show to everybody, and all that can be asked is asked by each kind
of caller in each phase of an account's two lives, with every field that the schema has. The same search finds for staff
whatever the database holds: else it would prove nothing.
"""

import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import graphql
import pytest
from graphql import GraphQLNamedType, GraphQLObjectType, GraphQLUnionType
from tortoise import Model, fields

from app import db, endpoints, lifecycle, policy, provisioning
from app.auth import Call
from app.db import Database
from app.graphql import nodes
from app.graphql.context import Context
from app.graphql.execution import Operations, Parameters, Prepared
from app.graphql.nodes import Kind
from app.graphql.schema import SCHEMA as STRAWBERRY
from app.lifecycle import CancellationTiming, HaltCause, LinkPurpose, MemberRole, Scope, StaffRole
from app.models import DeletionBreaker, DeletionHalt, DeletionStep, Offer, Staff
from app.tokens import DEVELOPMENT_ISSUER
from tests import cast, enforcing
from tests.actions.test_erasure import tables, texts
from tests.api.test_matrix import MUTATIONS, QUERIES, SCHEMA, Scene, Watch, add_member, link_token
from tests.cast import ALICE, BILLING, BOB, CSM, GATEKEEPER, GINA, HOST, SUPPORT, Stage, subject
from tests.delivery.webhook_server import receiving
from tests.ending import WINDOW, log_in_memory
from tests.enforcing import MAILER

EVERYBODY: Final = "who may see what it is about"
STAFF: Final = "staff"
WEBHOOKS: Final = "staff, and services with the scope `webhooks`"
NOBODY: Final = "nobody"

AUDIENCE: Final[Mapping[str, str]] = {
    "account.reference": EVERYBODY,
    "account.name": EVERYBODY,
    "account.plan_code": EVERYBODY,
    "account.csm_id": EVERYBODY,
    "cancellation_request.plan_code": EVERYBODY,
    "cancellation_request.requested_by_id": EVERYBODY,  # an email names the staff who opened it to the members
    "cancellation_request.opened_by_staff_id": EVERYBODY,
    "cancellation_request.staff_note": STAFF,
    "cancellation_request.confirmation_token_hash": NOBODY,
    "cancellation_request.confirmed_by_id": EVERYBODY,
    "deletion_breaker.first_approved_by_id": STAFF,
    "deletion_breaker.first_note": NOBODY,
    "deletion_breaker.approved_by_id": NOBODY,
    "deletion_breaker.note": NOBODY,
    "deletion_halt.evidence": STAFF,
    "deletion_halt.resume_note": NOBODY,
    "deletion_hold.held_by_id": STAFF,
    "deletion_hold.note": STAFF,
    "deletion_hold.released_by_id": STAFF,
    "deletion_hold.release_note": STAFF,
    "deletion_step.system": EVERYBODY,
    "deletion_step.last_error": STAFF,
    "enforcement.system": EVERYBODY,
    "enforcement.enforced_by_id": NOBODY,
    "feedback.comment": EVERYBODY,
    "feedback.submitted_by_id": NOBODY,
    "idempotency_record.caller": NOBODY,
    "idempotency_record.mutation": NOBODY,
    "idempotency_record.key": NOBODY,
    "idempotency_record.fingerprint": NOBODY,
    "idempotency_record.answer": NOBODY,
    "installation.database": NOBODY,
    "member.issuer": NOBODY,
    "member.subject": NOBODY,
    "member.email": EVERYBODY,
    "member.name": EVERYBODY,
    "member.permissions": EVERYBODY,
    "offer.code": EVERYBODY,
    "offer.title": EVERYBODY,
    "offer.description": EVERYBODY,
    "offer.answered_by_id": NOBODY,
    "outbox.template": STAFF,
    "outbox.recipient_name": STAFF,
    "outbox.recipient_address": STAFF,
    "outbox.facts": NOBODY,
    "outbox.message_id": STAFF,
    "outbox.last_error": STAFF,
    "outbox.traceparent": NOBODY,
    "rate_limit.key": NOBODY,
    "restart_request.note": NOBODY,  # the billing team reads it in an email
    "restart_request.requested_by_id": NOBODY,
    "service.issuer": NOBODY,
    "service.subject": NOBODY,
    "service.name": EVERYBODY,
    "service.scopes": EVERYBODY,
    "staff.issuer": NOBODY,
    "staff.subject": NOBODY,
    "staff.email": EVERYBODY,  # of those who are named to members: see the columns that name people
    "staff.name": EVERYBODY,
    "tombstone.plan_code": EVERYBODY,
    "transition.actor_id": NOBODY,  # but what kind of actor it was
    "webhook_delivery.type": WEBHOOKS,
    "webhook_delivery.payload": NOBODY,
    "webhook_delivery.last_error": WEBHOOKS,
    "webhook_delivery.traceparent": NOBODY,
    "webhook_endpoint.url": WEBHOOKS,
    "webhook_endpoint.description": WEBHOOKS,
    "webhook_endpoint.event_types": WEBHOOKS,
    "webhook_endpoint.disabled_reason": WEBHOOKS,
}
"""Who may read a column by the API: of all that hold text or name people. A new one has to be decided."""

WHO: Final = {
    "deletion_hold.held_by_id": "holder",
    "deletion_hold.released_by_id": "releaser",
    "deletion_breaker.first_approved_by_id": "approver",
    "deletion_breaker.approved_by_id": "second",
}
"""Columns that name one of the staff, who is called by the column's canary."""

WITHOUT: Final = {
    column for column in AUDIENCE if column.endswith((".issuer", ".subject"))
} | {  # who asks is found by them: they are searched for as they are
    "rate_limit.key",
    "installation.database",  # by which the database is recognized
    # Members and services, whose names are everybody's:
    "enforcement.enforced_by_id",
    "feedback.submitted_by_id",
    "offer.answered_by_id",
    "restart_request.requested_by_id",
    "transition.actor_id",  # of staff among others, who are in other columns, too
}
"""Columns that get no canary."""

IDENTITIES: Final = re.compile(r"(?:member|staff|service):[a-z_]+(?:@|\b)|urn:sunset:development")


def canary(column: str) -> str:
    return "canary-" + column.replace(".", "-")


def found_in(text: str) -> set[str]:
    """The columns whose canaries are in it; and whose `sub` and `iss`."""
    columns = {f"{table}.{name}" for table, name in re.findall(r"canary-([a-z_]+)-([a-z_]+)", text)}
    return columns | set(IDENTITIES.findall(text))


def names_people(model: type[Model]) -> list[str]:
    return [
        name
        for name, column in model._meta.fields_map.items()
        if isinstance(column, fields.UUIDField) and re.search(r"_by(_staff)?_id$|^actor_id$|^csm_id$", name)
    ]


async def test_it_is_decided_of_every_column_who_may_read_it(sqlite_database: Database) -> None:
    columns = {f"{table}.{name}" for table, model in tables().items() for name in {*texts(model), *names_people(model)}}
    assert sorted(AUDIENCE) == sorted(columns)


# ----------------------------------------------------------------------------------- everything that can be selected

Tree = dict[str, Any]
_FIELDS: Final = 400
"""In one document, below the limit of an operation."""
_TWICE: Final = 2
"""How often a path may come by a type: an account, its request, and that request's account."""

ARGUMENTS: Final = {
    "deletions": "states: [SCHEDULED, HELD, DUE, OVERDUE, STARTED, STALLED, DELETED], first: 9",
    "cancellationRequests": "filter: {statuses: [PENDING_ASSISTANCE, PENDING_CONFIRMATION, CONFIRMED, EFFECTIVE, "
    "REVERTED, WITHDRAWN, SAVED, EXPIRED]}, first: 9",
    "enforcements": "filter: {statuses: [PENDING, ENFORCED]}, first: 9",
    "deliveries": "first: 99",
    "webhookDeliveries": "first: 99",
}
"""Of root fields that show a part of what they have when nothing is said."""


def tree(kind: GraphQLNamedType, seen: tuple[str, ...] = ()) -> Tree:
    """Every field of the type, and of those that it leads to."""
    if isinstance(kind, GraphQLUnionType) or graphql.is_interface_type(kind):
        return {f"... on {one.name}": tree(one, seen) for one in SCHEMA.get_possible_types(kind)}
    assert isinstance(kind, GraphQLObjectType)
    selected: Tree = {}
    for name, field in kind.fields.items():
        inner = graphql.get_named_type(field.type)
        if graphql.is_leaf_type(inner):
            selected[name] = {}
        elif (*seen, kind.name).count(inner.name) < _TWICE:
            selected[f"{name}(first: 5)" if "first" in field.args else name] = tree(inner, (*seen, kind.name))
    return selected


def selections(selected: Tree) -> Iterator[str]:
    """The same in several selection sets, each small enough for one document."""
    part: Tree = {}
    size = 0
    for path in _paths(selected):
        here = part
        for step in path:
            size += step not in here
            here = here.setdefault(step, {})
        if size >= _FIELDS:
            yield _printed(part)
            part, size = {}, 0
    if part:
        yield _printed(part)


def _paths(selected: Tree, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for step, below in selected.items():
        if below:
            yield from _paths(below, (*before, step))
        else:
            yield (*before, step)


def _printed(selected: Tree) -> str:
    inside = " ".join(f"{step} {_printed(below)}" if below else step for step, below in selected.items())
    return f"{{ {inside} }}"


@cache
def all_of(type_: str) -> list[str]:
    """Selection sets that have every field of a type together; of a leaf none."""
    kind = SCHEMA.type_map[type_]
    return [""] if graphql.is_leaf_type(kind) else list(selections(tree(kind)))


def test_nothing_of_the_schema_is_left_out() -> None:
    """Every field of every type that an answer can have is selected by some document."""
    roots = [graphql.get_named_type(field.type) for field in (*QUERIES.values(), *MUTATIONS.values())]
    roots += [graphql.get_named_type(field.type) for field in SUBSCRIPTIONS.values()]
    selected = [graphql.parse(text) for kind in roots for text in all_of(kind.name) if text]
    names = {node.name.value for document in selected for node in _fields(document)}
    wanted = {
        name
        for kind in SCHEMA.type_map.values()
        if isinstance(kind, GraphQLObjectType) and not kind.name.startswith("__")
        for name in kind.fields
    }
    assert names | QUERIES.keys() | MUTATIONS.keys() | SUBSCRIPTIONS.keys() == wanted


def _fields(document: graphql.DocumentNode) -> list[graphql.FieldNode]:
    class Collect(graphql.Visitor):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[graphql.FieldNode] = []

        def enter_field(self, node: graphql.FieldNode, *_: Any) -> None:
            self.found.append(node)

    collect = Collect()
    graphql.visit(document, collect)
    return collect.found


assert SCHEMA.subscription_type is not None
SUBSCRIPTIONS: Final = SCHEMA.subscription_type.fields


class Reader:
    """Somebody who asks whatever can be asked, and what of it is not everybody's."""

    def __init__(self, scene: Scene, caller: str, watch: Watch) -> None:
        self.scene = scene
        self.token = scene.tokens[caller]
        self.watch = watch
        self.found: set[str] = set()
        self.answered: set[str] = set()
        """Root fields that were answered with something."""
        self.came_to: set[str] = set()
        """What mutations were answered with: the types' names."""

    async def read(self) -> set[str]:
        for name in QUERIES:
            await self.query(name)
        for name in SUBSCRIPTIONS:
            await self.subscribe(name)
        for name in MUTATIONS:
            await self.mutate(name)
        return self.found

    def _search(self, name: str, answer: dict[str, Any]) -> dict[str, Any]:
        for error in answer.get("errors", ()):
            assert error["extensions"]["code"] in EXPECTED, error
        if (answer.get("data") or {}).get("it") is not None:
            self.answered.add(name)
        self.found |= found_in(json.dumps(answer))
        return answer

    async def _ask(self, name: str, document: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
        response = await self.scene.stage.post(document, values, token=self.token)
        return self._search(name, response.json())

    async def query(self, name: str) -> None:
        kind = graphql.get_named_type(QUERIES[name].type)
        if name == "node":
            for id_, type_ in await ids(self.scene):
                for selection in all_of(type_):
                    await self._ask(name, f'{{ it: node(id: "{id_}") {{ ... on {type_} {selection} }} }}')
            return
        given = ARGUMENTS.get(name) or ", ".join(
            f'{argument}: "{value}"' for argument, value in self.scene.arguments(name, "admin").items()
        )
        for selection in all_of(kind.name):
            await self._ask(name, f"{{ it: {name}{f'({given})' if given else ''} {selection} }}")

    async def mutate(self, name: str) -> None:
        """Each time from the beginning: with as many fields of what it comes to as one document may have."""
        values = {"input": self.scene.arguments(name, "admin")}
        document = f"mutation($input: {MUTATIONS[name].args['input'].type}) {{ it: {name}(input: $input) {{ %s }} }}"
        done: Any = await self._ask(name, document % "__typename ... on UserError { message }", values)
        self._restore()
        shown: Any = (done.get("data") or {}).get("it")
        if shown is None:
            return
        self.came_to.add(shown["__typename"])
        for selection in all_of(shown["__typename"]):
            again: Any = await self._ask(
                name, document % f"__typename ... on {shown['__typename']} {selection}", values
            )
            told = again["data"]["it"]
            if told is None:  # a link's bearer is refused with nothing of the account below
                assert {error["extensions"]["code"] for error in again["errors"]} == {"FORBIDDEN"}
            else:
                assert told["__typename"] == shown["__typename"], "what was done was undone"
            self._restore()

    def _restore(self) -> None:
        if self.watch.changed():
            self.watch.restore()

    async def subscribe(self, name: str) -> None:
        """What is told first, which has all that is told later."""
        assert name == "accountStatusChanged", "what is it given?"
        call = Call(
            identity=await self.scene.stage.installation.tokens.verify(self.token or ""),
            installation=self.scene.stage.installation,
        )

        async def authenticate() -> Call:
            return call

        operations = Operations(STRAWBERRY, gate=Context.require_caller)
        (id_,) = self.scene.arguments("account", "admin").values()
        for selection in all_of(graphql.get_named_type(SUBSCRIPTIONS[name].type).name):
            query = f'subscription {{ it: {name}(accountIds: ["{id_}"]) {selection} }}'
            prepared = operations.prepare(Parameters(query=query, variables={}, operation_name=None), "somebody")
            assert isinstance(prepared, Prepared)
            context = Context(call, authenticate, sends_batches=False)
            async with aclosing(operations.subscribe(prepared, context, "first")) as answers:
                answer = await anext(answers)
            self._search(name, {"data": answer.data, "errors": answer.errors})


EXPECTED: Final = {"FORBIDDEN", "ACCESS_REMOVED", "RATE_LIMITED"}
"""Of errors: how fields are refused to those who may not read them."""


async def ids(scene: Scene) -> list[tuple[str, str]]:
    """Every id of a node about the account, or of webhooks, with its type's name."""
    found = [
        (nodes.encode(kind, db.as_uuid(row["id"])), type_)
        for kind, type_, table, key in (
            (Kind.ACCOUNT, "Account", "account", "id"),
            (Kind.CANCELLATION_REQUEST, "CancellationRequest", "cancellation_request", "account_id"),
            (Kind.FEEDBACK, "Feedback", "feedback", "account_id"),
            (Kind.OFFER, "Offer", "offer", "account_id"),
            (Kind.MEMBER, "Member", "member", "account_id"),
        )
        for row in await db.fetch(f"SELECT id FROM {table} WHERE {key} = $1", scene.account_id)
    ]
    return [
        *found,
        (nodes.encode(Kind.WEBHOOK_ENDPOINT, scene.endpoint_id), "WebhookEndpoint"),
        (nodes.encode(Kind.WEBHOOK_DELIVERY, scene.delivery_id), "WebhookDelivery"),
    ]


# ------------------------------------------------------------------------------------------------ a life, and another

PHASES: Final = (
    "OPENED",
    "SCHEDULED",
    "CANCELED",
    "HELD",
    "RELEASED",
    "RESTARTED",
    "ASKED_AGAIN",
    "CANCELED_AGAIN",
    "HELD_AGAIN",
    "DELETING",
    "DELETED",
)


async def live(house: Stage, account_id: UUID, until: str) -> None:
    """What people do to an account, one phase after the other."""
    key = nodes.encode(Kind.ACCOUNT, account_id)
    period_end = await db.now() + timedelta(hours=1)
    await db.execute("UPDATE account SET current_period_end = $2 WHERE id = $1", account_id, period_end)

    async def does(who: str, mutation: str, selection: str = "", **given: Any) -> dict[str, Any]:
        done = await house.do(who, mutation, selection, **given)
        assert done.get("__typename", "").endswith("Success"), done
        return done

    async def open_() -> None:
        await does(CSM, "cancelAccount", accountId=key, note=canary("cancellation_request.staff_note"))

    async def ask() -> dict[str, Any]:
        selection = "... on CancelAccountSuccess { confirmationToken request { id } }"
        return await does(ALICE, "cancelAccount", selection, accountId=key)

    async def confirm() -> None:
        asked = await ask()
        given = {"requestId": asked["request"]["id"], "confirmationToken": asked["confirmationToken"]}
        await does(ALICE, "confirmCancellation", accountName="Acme", **given)

    async def take_effect() -> None:
        await db.advance_clock(timedelta(hours=2))
        await house.letters()
        request = await db.fetch_one("SELECT id FROM cancellation_request WHERE status = 'EFFECTIVE'")
        assert request is not None, "the paid period has ended"
        link = link_token(house, ALICE, LinkPurpose.RESTART, account_id, db.as_uuid(request["id"]))
        wished = await house.do_as(link, "requestRestart", note=canary("restart_request.note"))
        assert wished["__typename"] == "RequestRestartSuccess"

    async def hold() -> None:
        who = mail(WHO["deletion_hold.held_by_id"])
        await does(who, "holdDeletion", accountId=key, note=canary("deletion_hold.note"), idempotencyKey=phase)

    async def release() -> None:
        who = mail(WHO["deletion_hold.released_by_id"])
        await does(who, "releaseDeletion", accountId=key, note=canary("deletion_hold.release_note"))

    async def restart() -> None:
        await hold()
        await does(BILLING, "restartAccount", accountId=key)

    async def begin() -> None:
        await release()
        await db.advance_clock(WINDOW + timedelta(days=10))
        now = await db.now()
        await db.execute(
            "UPDATE account SET status = 'DELETING', deletion_started_at = $2, reminder_due_at = NULL WHERE id = $1",
            account_id,
            now,
        )
        await DeletionStep.create(
            id=db.uuid7(), account_id=account_id, system="sunset", epoch=3, created_at=now, due_at=now
        )

    async def delete() -> None:
        for _ in range(3):
            await house.letters()
            await db.advance_clock(timedelta(minutes=2))
        row = await db.fetch_one("SELECT status FROM account WHERE id = $1", account_id)
        assert row == {"status": "DELETED"}

    phase = ""
    steps = (open_, confirm, take_effect, hold, release, restart, ask, confirm, hold, begin, delete)
    for phase, step in zip(PHASES, steps, strict=True):
        await step()
        if phase == until:
            return


def mail(name: str) -> str:
    return f"{name}@vendor.example"


async def add_people() -> None:
    """Those of the staff whom nobody else is told of; one of the staff who is a member, too; and a service of each
    scope."""
    for name in WHO.values():
        await provisioning.add_staff(
            email=mail(name),
            name=name,
            role=StaffRole.BILLING_TEAM,
            issuer=DEVELOPMENT_ISSUER,
            subject=subject(mail(name)),
        )
    await add_member("acme", SUPPORT, MemberRole.ADMIN)
    for scope in Scope:
        await enforcing.add_system(MAILER if scope is Scope.ENFORCEMENT else f"of-{scope}", scope)


async def plant(scene: Scene) -> None:
    """A canary in every column that has rows and is not everybody's: in what people write it is already."""
    for column, name in WHO.items():
        await Staff.filter(email=mail(name)).update(name=canary(column), email=f"{canary(column)}@vendor.example")
    now = await db.now()
    for approved in (True, False):
        await DeletionBreaker.create(
            id=db.uuid7(),
            tripped_at=now,
            due=7,
            allowed=3,
            first_approved_at=now,
            first_approved_by_id=(await Staff.get(name=canary("deletion_breaker.first_approved_by_id"))).id,
            first_approved_count=7,
            first_note=canary("deletion_breaker.first_note"),
            approved_at=now if approved else None,
            approved_by_id=(await Staff.get(name=canary("deletion_breaker.approved_by_id"))).id if approved else None,
            approved_count=7 if approved else None,
            approved_until=now + timedelta(hours=1) if approved else None,
            note=canary("deletion_breaker.note") if approved else None,
        )
    for resumed in (True, False):
        await DeletionHalt.create(
            id=db.uuid7(),
            cause=HaltCause.OPERATOR,
            evidence=canary("deletion_halt.evidence"),
            halted_at=now,
            resumed_at=now if resumed else None,
            resume_note=canary("deletion_halt.resume_note") if resumed else None,
        )
    disabled = "webhook_endpoint.disabled_reason"
    await db.execute(
        "UPDATE webhook_endpoint SET disabled_at = $2, disabled_reason = $3 WHERE id <> $1",
        scene.endpoint_id,
        now,
        canary(disabled),
    )
    for table in ("deletion_step", "idempotency_record", "outbox", "webhook_delivery", "webhook_endpoint"):
        row = await db.fetch_one(f"SELECT id FROM {table} ORDER BY id LIMIT 1")
        for column in [name for name in AUDIENCE if name.startswith(f"{table}.") and AUDIENCE[name] is not EVERYBODY]:
            value = (
                json.dumps(canary(column))
                if column in {"outbox.facts", "idempotency_record.answer"}
                else canary(column)
            )
            if row is not None:
                await db.execute(f"UPDATE {table} SET {column.partition('.')[2]} = $2 WHERE id = $1", row["id"], value)
    await db.execute(
        "UPDATE cancellation_request SET confirmation_token_hash = $1 "
        "WHERE confirmation_token_hash IS NOT NULL AND status <> 'PENDING_CONFIRMATION'",
        canary("cancellation_request.confirmation_token_hash"),
    )


async def held_by_the_database() -> set[str]:
    """The columns that hold their canary now."""
    found = set()
    for column in AUDIENCE.keys() - WITHOUT:
        table, _, name = column.partition(".")
        if column in WHO:
            condition = f"{name} IN (SELECT id FROM staff WHERE name = '{canary(column)}')"
        else:
            condition = f"CAST({name} AS TEXT) LIKE '%{canary(column)}%'"
        row = await db.fetch_one(f"SELECT COUNT(*) AS rows FROM {table} WHERE {condition}")
        assert row is not None
        if row["rows"]:
            found.add(column)
    return found


OTHERS: Final = (
    "admin",
    "member",
    "stranger",
    "confirm_link",
    "feedback_link",
    "restart_link",
    "staffs_link",
    "unknown@nowhere.example",
    "host",
    "gatekeeper",
    *(f"of-{scope}" for scope in Scope if scope not in {Scope.ENFORCEMENT, Scope.WEBHOOKS}),
    MAILER,
)
"""Neither staff nor services with the scope `webhooks`. `staffs_link`: sent to one of the staff, as a member."""


ACTIVE_AGAIN: Final = {"RESTARTED", "ASKED_AGAIN"}
"""Phases in which there is no deletion that could be asked about, and so none of its holds."""

TAKEN: Final = {
    "OPENED": {"admin": "ConfirmCancellationSuccess", "confirm_link": "ConfirmCancellationSuccess"},
    "CANCELED": {"feedback_link": "SubmitFeedbackSuccess", "restart_link": "RequestRestartSuccess"},
    "HELD": {"restart_link": "RequestRestartSuccess"},
    "ASKED_AGAIN": {"admin": "ConfirmCancellationSuccess", "confirm_link": "ConfirmCancellationSuccess"},
    "HELD_AGAIN": {"feedback_link": "SubmitFeedbackSuccess"},
}
"""What members and links come to in a phase, among others: the ways in which they are shown what is canceled."""


@asynccontextmanager
async def scene_of(database: Database, directory: Path, phase: str) -> AsyncIterator[Scene]:
    """Acme in that phase. What was sent to members and to other systems until then is searched, too."""
    plans = {code: replace(plan, effective=CancellationTiming.PERIOD_END) for code, plan in policy.load().plans.items()}
    with log_in_memory() as log:
        async with (
            receiving() as receiver,
            cast.stage(database, directory, enforcing_systems=enforcing.SYSTEMS, plans=plans) as house,
        ):
            await add_people()
            await endpoints.create(
                None, house.installation.receivers, url=receiver.url, description=None, event_types=None
            )
            account_id = await house.account_key("acme")
            await live(house, account_id, phase)
            sent = [one.as_string() for one in await house.letters() if "@vendor.example" not in one["To"]]
            assert len(sent) > 1
            assert receiver.events
            assert found_in("".join(sent)) == set(), "in emails to members"
            assert found_in(json.dumps(receiver.events)) == set(), "in events"
            scene = await made(house, account_id)
            await plant(scene)
            yield scene
        assert "http.request" in log.getvalue()
        assert {column for column in found_in(log.getvalue()) if column in AUDIENCE} == set(), "in the log"


async def made(house: Stage, account_id: UUID) -> Scene:
    """With what is needed to ask about the account as it is now."""
    row = await db.fetch_one("SELECT id FROM cancellation_request WHERE account_id = $1 ORDER BY id DESC", account_id)
    assert row is not None
    request_id = db.as_uuid(row["id"])
    offer = await Offer.filter(request_id=request_id).first()
    people = {"admin": ALICE, "member": BOB, "stranger": GINA, "host": HOST, "gatekeeper": GATEKEEPER, "staff": SUPPORT}
    people |= {name: name for name in ("unknown@nowhere.example", MAILER, *(f"of-{scope}" for scope in Scope))}
    links = {f"{purpose}_link": (ALICE, purpose) for purpose in LinkPurpose}
    links["staffs_link"] = (SUPPORT, LinkPurpose.CONFIRM)
    tokens: dict[str, str | None] = {caller: house.token(who) for caller, who in people.items()}
    now = await db.now()
    for name, (who, purpose) in links.items():
        tokens[name] = link_token(house, who, purpose, account_id, request_id, now)
    endpoint = await endpoints.create(
        None, house.installation.receivers, url="https://hooks.example.com/", description=None, event_types=None
    )
    ping = await endpoints.ping(None, endpoint.endpoint.id)
    return Scene(
        stage=house,
        tokens=tokens,
        account_id=account_id,
        request_id=request_id,
        offer_id=offer.id if offer else db.uuid7(),
        endpoint_id=endpoint.endpoint.id,
        delivery_id=ping.id,
    )


@pytest.mark.parametrize("phase", PHASES)
async def test_what_is_for_staff_is_read_by_staff_alone(sqlite_database: Database, tmp_path: Path, phase: str) -> None:
    async with scene_of(sqlite_database, tmp_path, phase) as scene:
        kept = await held_by_the_database()
        if phase == "DELETING":
            assert kept == {column for column in AUDIENCE.keys() - WITHOUT if AUDIENCE[column] is not EVERYBODY}
        staffs = {column for column in kept if AUDIENCE[column] in {STAFF, WEBHOOKS}}
        shown = {column for column in staffs if phase not in ACTIVE_AGAIN or not column.startswith("deletion_hold.")}
        with closing(Watch(tmp_path / "sunset.db")) as watch:
            staff = Reader(scene, "staff", watch)
            assert shown <= await staff.read() <= staffs
            assert staff.answered >= QUERIES.keys() - {"cancellationPreview"}
            webhooks = Reader(scene, f"of-{Scope.WEBHOOKS}", watch)
            assert await webhooks.read() == {column for column in kept if AUDIENCE[column] is WEBHOOKS}
            others = {caller: Reader(scene, caller, watch) for caller in OTHERS}
            for caller, reader in others.items():
                assert await reader.read() == set(), f"told to {caller}"
        for caller, answer in TAKEN.get(phase, {}).items():
            assert answer in others[caller].came_to, "a way that was open was not taken"


async def test_the_rule_stands_where_the_field_is_and_not_on_the_way_to_it(
    sqlite_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it lean on that members have no access while there is something to hide."""
    asked = "{ account(id: %s) { deletion { holds { note releaseNote heldBy { name } releasedBy { name } } "
    asked += "steps { system lastError } } cancellationRequests { edges { node { staffNote } } } } }"
    async with scene_of(sqlite_database, tmp_path, "DELETING") as scene:
        monkeypatch.setattr(lifecycle, "has_access", lambda *_: True)
        (id_,) = scene.arguments("account", "admin").values()
        told: dict[str, Any] = {}
        for caller in ("staff", "admin"):
            answer = (await scene.stage.post(asked % json.dumps(id_), token=scene.tokens[caller])).json()
            assert "errors" not in answer
            told[caller] = answer["data"]["account"]
    private = {"note", "releaseNote", "heldBy", "releasedBy", "lastError", "staffNote"}
    assert without(told["staff"], private) == told["admin"]
    assert told["admin"]["deletion"]["steps"] == [{"system": "sunset", "lastError": None}]
    assert found_in(json.dumps(told["staff"])) == {
        "cancellation_request.staff_note",
        "deletion_hold.held_by_id",
        "deletion_hold.note",
        "deletion_hold.release_note",
        "deletion_hold.released_by_id",
        "deletion_step.last_error",
    }


def without(answer: Any, names: set[str]) -> Any:
    """The same with null for the fields of those names."""
    if isinstance(answer, dict):
        return {name: None if name in names else without(value, names) for name, value in answer.items()}
    return [without(one, names) for one in answer] if isinstance(answer, list) else answer
