"""`sunset webhooks`: endpoints managed by who runs Sunset, without a token."""

import re

from tests.cast import Stage
from tests.cli.conftest import Play, Run

URL = "https://hooks.example.com/sunset"


def lines(sunset: Run, *arguments: str) -> list[list[str]]:
    result = sunset("webhooks", *arguments)
    assert (result.status, result.err) == (0, "")
    return [re.split(r"\s{2,}", line.strip()) for line in result.out.splitlines()]


def test_an_endpoint_is_added_changed_rotated_disabled_and_enabled(migrated: Run) -> None:
    (endpoint, url), (secret,) = lines(migrated, "add", URL, "--type", "account.canceled", "--description", "Billing")
    assert url == URL
    assert secret.startswith("whsec_")
    assert lines(migrated, "list") == [[endpoint, URL, "enabled", "0", "account.canceled", "Billing"]]
    lines(migrated, "update", endpoint, "--all-types", "--url", URL + "/2")
    _, (rotated,) = lines(migrated, "rotate", endpoint)
    assert rotated != secret
    lines(migrated, "disable", endpoint)
    ((_, _, state, _, types, _),) = lines(migrated, "list")
    assert state.startswith("disabled 20")
    assert types == "all"
    lines(migrated, "enable", endpoint)
    ((_, url, state, *_),) = lines(migrated, "list")
    assert (url, state) == (URL + "/2", "enabled")


def test_a_ping_is_promised_seen_and_promised_again(migrated: Run) -> None:
    (endpoint, _), _ = lines(migrated, "add", URL)
    ((ping,),) = lines(migrated, "ping", endpoint)
    ((shown, state, _, kind, *_),) = lines(migrated, "deliveries", "--endpoint", endpoint, "--state", "pending")
    assert (shown, state, kind) == (ping, "PENDING", "webhook.ping")
    assert lines(migrated, "deliveries", "--state", "dead") == []
    assert lines(migrated, "redeliver", ping) == [[f"{ping} is due now."]]
    assert lines(migrated, "redeliver", "--endpoint", endpoint, "--since", "2026-01-01") == [
        ["1 deliveries are due now."]
    ]


def test_what_is_wrong_is_told(migrated: Run) -> None:
    refused = migrated("webhooks", "add", "https://10.0.0.1/")
    assert (refused.status, refused.out) == (1, "")
    assert "not public" in refused.err
    for arguments in (("redeliver",), ("ping", "x"), ("redeliver", "--endpoint", "x")):
        assert migrated("webhooks", *arguments).status == 2


async def _cancel(house: Stage) -> None:
    await house.cancel()


def test_what_happens_is_promised_to_it(play: Play, migrated: Run) -> None:
    (endpoint, _), _ = lines(migrated, "add", URL)
    play(_cancel)
    types = {row[3] for row in lines(migrated, "deliveries", "--endpoint", endpoint)}
    assert types == {"account.cancellation_requested", "account.canceled"}
