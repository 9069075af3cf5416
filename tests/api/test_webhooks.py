"""Webhook endpoints by the API: who manages them, what is refused, and what can be seen of the deliveries."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import pytest
from standardwebhooks import Webhook

from app import db, endpoints, provisioning, webhooks
from app.graphql import nodes
from app.graphql.nodes import Kind
from app.lifecycle import Scope, TransitionType
from app.tokens import DEVELOPMENT_ISSUER
from tests.cast import ALICE, BILLING, CSM, GATEKEEPER, SUPPORT, Stage, subject
from tests.delivery.certificates import self_signed
from tests.delivery.webhook_server import receiving, says

INTEGRATOR = "integrator"
URL = "https://hooks.example.com/sunset"
ENDPOINT = "endpoint { id url description eventTypes disabledAt disabledReason failures previousSecretUntil }"
DELIVERIES = (
    "query($filter: WebhookDeliveryFilterInput, $first: Int, $after: String) { webhookDeliveries(filter: $filter, "
    "first: $first, after: $after) { edges { node { id endpointId accountId type epoch sequence state attempts "
    "nextAttemptAt lastStatus lastLatencyMs lastError deliveredAt deadAt } } pageInfo { hasNextPage endCursor } } }"
)


async def create(house: Stage, who: str = BILLING, **more: Any) -> dict[str, Any]:
    return await house.do(
        who,
        "createWebhookEndpoint",
        f"... on CreateWebhookEndpointSuccess {{ secret {ENDPOINT} }} ... on InvalidInputError {{ field }}",
        **{"url": URL, **more},
    )


async def change(house: Stage, mutation: str, endpoint: str, **more: Any) -> dict[str, Any]:
    kind = mutation[0].upper() + mutation[1:]
    done = await house.do(BILLING, mutation, f"... on {kind}Success {{ {ENDPOINT} }}", endpointId=endpoint, **more)
    assert done["__typename"] == f"{kind}Success"
    endpoint_now: dict[str, Any] = done["endpoint"]
    return endpoint_now


async def deliveries(house: Stage, **variables: Any) -> list[dict[str, Any]]:
    answer = await house.ask(SUPPORT, DELIVERIES, **variables)
    return [edge["node"] for edge in answer["data"]["webhookDeliveries"]["edges"]]


async def test_an_endpoint_is_made_by_the_api_and_hears_with_the_secret_of_the_answer(house: Stage) -> None:
    async with receiving() as receiver:
        made = await create(
            house, url=receiver.url, description=" Our billing ", eventTypes=["account.cancellation_requested"]
        )
        assert made["endpoint"] == {
            "id": made["endpoint"]["id"],
            "url": receiver.url,
            "description": "Our billing",
            "eventTypes": ["account.cancellation_requested"],
            "disabledAt": None,
            "disabledReason": None,
            "failures": 0,
            "previousSecretUntil": None,
        }
        await house.cancel()
        await house.letters()
        (request,) = receiver.requests
        assert Webhook(made["secret"]).verify(request.body, request.headers)["type"] == "account.cancellation_requested"
        (delivery,) = await deliveries(house)
    assert delivery["id"] == request.headers["webhook-id"]
    assert delivery["endpointId"] == made["endpoint"]["id"]
    assert delivery["accountId"] == await house.account_id("acme")
    assert (delivery["state"], delivery["attempts"], delivery["lastStatus"]) == ("DELIVERED", 1, 204)
    assert delivery["lastLatencyMs"] >= 0
    assert (delivery["nextAttemptAt"], delivery["lastError"], delivery["deadAt"]) == (None, None, None)
    assert delivery["deliveredAt"] is not None


async def test_what_fails_is_seen_with_its_next_try(house: Stage) -> None:
    async with receiving(says("503 Later")) as receiver:
        made = await create(house, url=receiver.url)
        await house.request_cancellation()
        await house.letters()
    (delivery,) = await deliveries(house, filter={"endpointId": made["endpoint"]["id"], "states": ["PENDING"]})
    assert (delivery["state"], delivery["lastStatus"], delivery["lastError"]) == ("PENDING", 503, "answered 503")
    assert delivery["nextAttemptAt"] is not None
    for nothing in ({"states": ["DEAD", "DELIVERED"]}, {"endpointId": "x"}, {"accountId": made["endpoint"]["id"]}):
        assert await deliveries(house, filter=nothing) == []
    assert await deliveries(house, filter={"accountId": await house.account_id("acme")}) == [delivery]


async def test_a_certificate_that_nobody_vouches_for_is_told(house: Stage, tmp_path: Path) -> None:
    async with receiving(tls=self_signed(tmp_path, "127.0.0.1")) as receiver:
        await create(house, url=receiver.url)
        await house.request_cancellation()
        await house.letters()
        assert receiver.requests == []
    (delivery,) = await deliveries(house)
    assert (delivery["state"], delivery["lastStatus"]) == ("PENDING", None)
    assert delivery["lastError"] == "its certificate is refused: self-signed certificate"


async def test_a_key_makes_one_endpoint_and_gives_its_secret_again(house: Stage) -> None:
    first, again = [await create(house, idempotencyKey="k") for _ in range(2)]
    assert first == again
    assert (await create(house, idempotencyKey="k", description="other"))["__typename"] == "IdempotencyConflictError"
    other = await create(house)
    assert other["secret"] != first["secret"]
    answer = await house.ask(SUPPORT, "{ webhookEndpoints { edges { node { id url } } } }")
    listed = [edge["node"]["id"] for edge in answer["data"]["webhookEndpoints"]["edges"]]
    assert listed == [first["endpoint"]["id"], other["endpoint"]["id"]]


async def test_a_key_pings_once_and_delivers_again_once(house: Stage) -> None:
    """A client that lost the answer asks again: nothing is sent twice by that, whatever has happened since."""
    async with receiving() as receiver:
        endpoint = (await create(house, url=receiver.url))["endpoint"]["id"]
        selection = "... on PingWebhookEndpointSuccess { delivery { id } }"
        given = {"endpointId": endpoint, "idempotencyKey": "k"}
        first, again = [await house.do(BILLING, "pingWebhookEndpoint", selection, **given) for _ in range(2)]
        assert first == again
        since = (await db.now() - timedelta(hours=1)).isoformat()
        await house.cancel()
        await house.letters()
        number = len(receiver.requests)
        assert number == 3
        selection = "... on RedeliverWebhookSuccess { count }"
        one = {"deliveryId": first["delivery"]["id"], "idempotencyKey": "one"}
        everything = {"endpointId": endpoint, "since": since, "idempotencyKey": "all"}
        for given, count in ((one, 1), (everything, number)):
            for _ in range(2):
                answer = await house.do(BILLING, "redeliverWebhook", selection, **given)
                assert answer == {"__typename": "RedeliverWebhookSuccess", "count": count}
                await db.advance_clock(timedelta(minutes=1))
                await house.letters()
            assert len(receiver.requests) == (number + 1 if given is one else 2 * number + 1)
        conflict = await house.do(BILLING, "redeliverWebhook", **{**everything, "idempotencyKey": "one"})
        assert conflict["__typename"] == "IdempotencyConflictError"
        await house.do(BILLING, "redeliverWebhook", **{**everything, "idempotencyKey": "another"})
        await house.letters()
        assert len(receiver.requests) == 3 * number + 1


async def test_a_repeated_call_goes_on_where_the_first_broke_down(
    house: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "_BATCH", 2)
    done, asked = webhooks.again, list[UUID]()

    async def breaks_down(endpoint_id: UUID, delivery_ids: Sequence[UUID], **more: Any) -> int:
        if len(asked) == 4:
            raise ZeroDivisionError
        asked.extend(delivery_ids)
        return await done(endpoint_id, delivery_ids, **more)

    async with receiving() as receiver:
        endpoint = (await create(house, url=receiver.url))["endpoint"]["id"]
        since = (await db.now() - timedelta(hours=1)).isoformat()
        for _ in range(7):
            await house.do(BILLING, "pingWebhookEndpoint", endpointId=endpoint)
        await house.letters()
        given = {"endpointId": endpoint, "since": since, "idempotencyKey": "k"}
        monkeypatch.setattr(webhooks, "again", breaks_down)
        failed = await house.do(BILLING, "redeliverWebhook", **given)
        assert failed["extensions"]["code"] == "INTERNAL_SERVER_ERROR"
        await house.letters()
        assert len(receiver.requests) == 7 + 4
        asked.clear()
        monkeypatch.setattr(endpoints, "_BATCH", 3)
        answer = await house.do(BILLING, "redeliverWebhook", "... on RedeliverWebhookSuccess { count }", **given)
        assert (answer["count"], len(asked)) == (7, 3)
        await house.letters()
    ids = [request.headers["webhook-id"] for request in receiver.requests]
    assert {ids.count(one) for one in ids} == {2}


async def test_a_key_rotates_once(house: Stage) -> None:
    made = await create(house)
    given = {"endpointId": made["endpoint"]["id"], "idempotencyKey": "k"}
    selection = f"... on RotateWebhookSecretSuccess {{ secret {ENDPOINT} }}"
    first, again = [await house.do(BILLING, "rotateWebhookSecret", selection, **given) for _ in range(2)]
    assert first == again
    assert first["secret"] != made["secret"]
    assert first["endpoint"]["previousSecretUntil"] is not None
    async with receiving() as receiver:
        await change(house, "updateWebhookEndpoint", made["endpoint"]["id"], url=receiver.url)
        await house.request_cancellation()
        await house.letters()
        (request,) = receiver.requests
        for secret in (made["secret"], first["secret"]):
            Webhook(secret).verify(request.body, request.headers)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"url": "ftp://hooks.example.com/"}, "url"),
        ({"url": "https://10.0.0.1/"}, "url"),
        ({"url": "https://169.254.169.254/latest"}, "url"),
        ({"url": "nowhere"}, "url"),
        ({"url": "https://hooks.example.com/" + "x" * 2_000}, "url"),
        ({"description": "x" * 501}, "description"),
        ({"eventTypes": ["account.sold"]}, "eventTypes"),
        ({"eventTypes": ["account.canceled account.deleted"]}, "eventTypes"),
    ],
)
async def test_what_cannot_be_used_is_refused_by_name(house: Stage, given: dict[str, Any], field: str) -> None:
    made = await create(house, **given)
    assert (made["__typename"], made["field"]) == ("InvalidInputError", field)


async def test_what_is_given_is_changed_and_nothing_else(house: Stage) -> None:
    made = (await create(house, description="Old", eventTypes=["account.canceled"]))["endpoint"]
    changed = await change(house, "updateWebhookEndpoint", made["id"], description="New")
    assert changed == made | {"description": "New"}
    assert (await change(house, "updateWebhookEndpoint", made["id"], eventTypes=[]))["eventTypes"] == []
    disabled = await change(house, "disableWebhookEndpoint", made["id"])
    assert disabled["disabledAt"] is not None
    assert disabled["disabledReason"] == "It was disabled by hand."
    refused = await house.do(BILLING, "pingWebhookEndpoint", endpointId=made["id"])
    assert refused["__typename"] == "InvalidInputError"
    assert (await change(house, "enableWebhookEndpoint", made["id"]))["disabledAt"] is None


async def test_one_or_all_since_a_time_are_delivered_again(house: Stage) -> None:
    async with receiving() as receiver:
        endpoint = (await create(house, url=receiver.url))["endpoint"]["id"]
        since = (await db.now()).isoformat()
        await house.cancel()
        await house.letters()
        number = len(receiver.requests)
        selection = "... on RedeliverWebhookSuccess { count } ... on InvalidInputError { field }"
        one = await house.do(
            BILLING, "redeliverWebhook", selection, deliveryId=receiver.requests[0].headers["webhook-id"]
        )
        assert one["count"] == 1
        await house.letters()
        assert receiver.requests[-1].body == receiver.requests[0].body
        everything = await house.do(BILLING, "redeliverWebhook", selection, endpointId=endpoint, since=since)
        assert everything["count"] == number
        await house.letters()
        assert len(receiver.requests) == 2 * number + 1
        for given in ({}, {"endpointId": endpoint}, {"since": since}, {"deliveryId": "D", "endpointId": endpoint}):
            assert (await house.do(BILLING, "redeliverWebhook", selection, **given))["field"] == "deliveryId"


async def test_the_billing_team_and_services_with_the_scope_manage_and_staff_sees(house: Stage) -> None:
    await provisioning.add_service(
        name=INTEGRATOR,
        scopes=frozenset({Scope.WEBHOOKS}),
        issuer=DEVELOPMENT_ISSUER,
        subject=subject(INTEGRATOR),
    )
    made = await create(house, INTEGRATOR)
    endpoint = made["endpoint"]["id"]
    for who in (SUPPORT, CSM, ALICE, GATEKEEPER):
        assert (await create(house, who))["__typename"] == "PermissionDeniedError"
    ping = await house.do(
        INTEGRATOR,
        "pingWebhookEndpoint",
        "... on PingWebhookEndpointSuccess { delivery { id type state accountId } }",
        endpointId=endpoint,
    )
    assert ping["delivery"] | {"id": ""} == {"id": "", "type": "webhook.ping", "state": "PENDING", "accountId": None}
    for id_, kind in ((endpoint, "WebhookEndpoint"), (ping["delivery"]["id"], "WebhookDelivery")):
        for who in (INTEGRATOR, SUPPORT, BILLING, CSM):
            answer = await house.ask(who, "query($id: ID!) { node(id: $id) { __typename id } }", id=id_)
            assert answer == {"data": {"node": {"__typename": kind, "id": id_}}}
        for who in (ALICE, GATEKEEPER):
            answer = await house.ask(who, "query($id: ID!) { node(id: $id) { __typename id } }", id=id_)
            assert answer == {"data": {"node": None}}
    unknown = nodes.encode(Kind.WEBHOOK_ENDPOINT, db.uuid7())
    assert (await house.do(BILLING, "rotateWebhookSecret", endpointId=unknown))["__typename"] == "NotFoundError"


async def test_lists_are_paged(house: Stage) -> None:
    endpoint = (await create(house))["endpoint"]["id"]
    pings = [await house.do(BILLING, "pingWebhookEndpoint", endpointId=endpoint) for _ in range(3)]
    assert len(pings) == 3
    seen: list[str] = []
    after = None
    for _ in range(3):
        answer = await house.ask(SUPPORT, DELIVERIES, first=1, after=after)
        page = answer["data"]["webhookDeliveries"]
        seen += [edge["node"]["id"] for edge in page["edges"]]
        after = page["pageInfo"]["endCursor"]
    assert len(set(seen)) == 3
    assert not page["pageInfo"]["hasNextPage"]


async def test_the_catalogue_is_in_the_schema(house: Stage) -> None:
    answer = await house.ask(ALICE, "{ eventTypes { type description example jsonSchema } }")
    told = answer["data"]["eventTypes"]
    assert [one["type"] for one in told] == [kind.value for kind in TransitionType]
    for one in told:
        assert orjson.loads(one["example"])["type"] == one["type"]
        assert orjson.loads(one["jsonSchema"])["title"] == one["type"]
        assert one["description"]
