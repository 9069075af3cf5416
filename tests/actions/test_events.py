"""The catalogue of events: each has an example that is valid, and is what the service really sends."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from app import endpoints, events, policy
from app.db import Database
from app.lifecycle import CancellationTiming, TransitionType
from tests.actions.test_invariants import HANA, restore, tell_the_story
from tests.cast import BILLING, stage
from tests.delivery.webhook_server import receiving

ISSUED = [
    "cancellation_requested",
    "cancellation_assistance_requested",
    "cancellation_withdrawn",
    "cancellation_expired",
    "offer_accepted",
    "offer_declined",
    "cancellation_scheduled",
    "canceled",
    "feedback_submitted",
    "restart_requested",
    "restarted",
    "deletion_reminder",
    "deletion_held",
    "deletion_released",
    "deletion_started",
    "deleted",
    "status",
]
"""What receivers were promised, in the order in which it is documented. A name is never changed or taken away."""


def shape(value: Any) -> Any:
    """What stays the same from one event of a type to the next."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items()}
    if isinstance(value, list):
        return [shape(one) for one in value[:1]]
    return type(value).__name__


def test_the_catalogue_is_what_was_promised_in_order() -> None:
    assert [f"account.{name}" for name in ISSUED] == list(events.CATALOGUE) == list(TransitionType)


@pytest.mark.parametrize("kind", TransitionType)
def test_its_example_is_valid_and_small_and_no_example_of_another(kind: TransitionType) -> None:
    Draft202012Validator.check_schema(events.schema(kind))
    example = events.example(kind)
    valid = [one for one in TransitionType if Draft202012Validator(events.schema(one)).is_valid(example)]
    assert valid == [kind]
    assert len(str(example)) < 1_500


async def test_every_event_that_is_really_sent_has_the_shape_of_its_example(database: Database, tmp_path: Path) -> None:
    """All of them, each made by the action that it tells of: valid, and with the example's fields, status and epoch."""
    plans = policy.load().plans
    plans = {**plans, "startup": replace(plans["startup"], effective=CancellationTiming.PERIOD_END)}
    async with receiving() as receiver, stage(database, tmp_path, plans=plans) as house:
        await endpoints.create(None, house.installation.receivers, url=receiver.url, description=None, event_types=None)
        await tell_the_story(house)
        await house.do(BILLING, "releaseDeletion", accountId=await house.account_id("acme"), note="They go.")
        canceled = await house.cancel(HANA, "hooli", "Hooli")  # with the feedback that was given
        assert canceled["__typename"] == "ConfirmCancellationSuccess"
        await restore(house)
        await house.letters()
    came = {kind: [one for one in receiver.events if one["type"] == kind] for kind in TransitionType}
    assert [kind for kind, some in came.items() if not some] == []
    for kind, some in came.items():
        example, validator = events.example(kind), Draft202012Validator(events.schema(kind))
        for event in some:
            validator.validate(event)
        assert shape(example) in [shape(one) for one in some]
        told = {(one["data"]["status"], one["data"]["epoch"]) for one in some}  # type: ignore[index]
        assert (example["data"]["status"], example["data"]["epoch"]) in told
