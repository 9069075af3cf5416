"""The policy file: the default promises what the article promises, and whatever is wrong is named with its place."""

from datetime import timedelta
from pathlib import Path

import pytest

from app import policy
from app.lifecycle import CancellationTiming, Channel, FeedbackReason
from app.policy import DEFAULT_FILE, PolicyError

DEFAULT = DEFAULT_FILE.read_text(encoding="utf-8")
_BEFORE, _MARK, _EXAMPLE = DEFAULT.partition("# [[enforcing_systems]]\n")
WITH_ITS_EXAMPLE = _BEFORE + (_MARK + _EXAMPLE).replace("# ", "", 4)
"""The default, with the example that ends it no comment any more."""


class TestTheDefault:
    def test_is_the_article(self) -> None:
        plans = policy.load().plans
        assert {code: plan.channel for code, plan in plans.items()} == {
            "essentials": Channel.SELF_SERVE,
            "startup": Channel.SELF_SERVE,
            "premium": Channel.ASSISTED,
            "enterprise": Channel.ASSISTED,
        }
        assert {plan.retention for plan in plans.values()} == {timedelta(days=60)}
        assert {plan.effective for plan in plans.values()} == {CancellationTiming.IMMEDIATE}

    def test_reminds_30_7_and_2_days_before_the_deletion(self) -> None:
        assert policy.load().reminder_days == (30, 7, 2)

    def test_has_words_for_every_reason(self) -> None:
        reasons = policy.load().reasons
        assert {one.code for one in reasons} == set(FeedbackReason)
        assert all(one.label for one in reasons)

    def test_knows_which_plans_it_lacks(self) -> None:
        assert policy.load().missing_plans(["startup", "platinum", "gold", "gold"]) == ["gold", "platinum"]

    def test_waits_for_no_system(self) -> None:
        """Nobody has set one up yet; without, nothing is late."""
        assert policy.load().enforcing_systems == ()


def changed(tmp_path: Path, old: str, new: str, *, of: str = DEFAULT) -> Path:
    assert old in of
    file = tmp_path / "policy.toml"
    file.write_text(of.replace(old, new, 1), encoding="utf-8")
    return file


def test_the_example_of_an_enforcing_system_is_one(tmp_path: Path) -> None:
    (system,) = policy.load(changed(tmp_path, "", "", of=WITH_ITS_EXAMPLE)).enforcing_systems
    assert (system.code, system.name, system.within) == ("mailer", "Mail delivery", timedelta(minutes=10))


@pytest.mark.parametrize(
    ("old", "new", "key", "reason"),
    [
        ("within_minutes = 10", "within_minutes = 0", "enforcing_systems[0].within_minutes", "must be from 1 to 1440"),
        ("within_minutes = 10", "within_minutes = 1441", "enforcing_systems[0].within_minutes", "must be from 1"),
        ("within_minutes = 10", "within_hours = 1", "enforcing_systems[0].within_minutes", "is missing"),
        ("within_minutes = 10", "within_minutes = 10\nurl = ''", "enforcing_systems[0].url", "is not a key"),
        ('code = "mailer"', 'code = ""', "enforcing_systems[0].code", "must be one line of 1 to 64 characters"),
        ('name = "Mail delivery"', "", "enforcing_systems[0].name", "is missing"),
        ("[[enforcing_systems]]", "[enforcing_systems]", "enforcing_systems", "must be written as [["),
        (
            "[[enforcing_systems]]",
            "[[enforcing_systems]]\ncode = 'mailer'\nname = 'The old one'\nwithin_minutes = 1\n[[enforcing_systems]]",
            "enforcing_systems",
            "the code 'mailer' stands twice",
        ),
    ],
)
def test_a_mistake_in_an_enforcing_system_is_named(tmp_path: Path, old: str, new: str, key: str, reason: str) -> None:
    file = changed(tmp_path, old, new, of=WITH_ITS_EXAMPLE)
    with pytest.raises(PolicyError) as refused:
        policy.load(file)
    assert str(refused.value).startswith(f"{file}: {key}: {reason}")


MISTAKES = [
    # what stands there, what is written instead, the key that the error names, and the reason that it gives
    ("lifetime_hours = 72", "lifetime_hours = 0", "confirmation.lifetime_hours", "must be from 1 to 87840, not 0"),
    ("lifetime_hours = 72", "lifetime_hours = 9e9", "confirmation.lifetime_hours", "must be a whole number"),
    ("lifetime_hours = 72", "lifetime_hours = true", "confirmation.lifetime_hours", "must be a whole number, not True"),
    ("lifetime_hours = 72", "", "confirmation.lifetime_hours", "is missing; a whole number is needed"),
    ("lifetime_hours = 72", "lifetime_hours = 72\nlifetime = 1", "confirmation.lifetime", "is not a key"),
    ("[confirmation]", "[confirmations]", "confirmation", "is missing; a table is needed"),
    ("[contacts]", "hours = 3\n[contacts]", "hours", "is not a key that this table has"),
    ("response_hours = 24", 'response_hours = "24"', "assistance.response_hours", "must be a whole number, not '24'"),
    ("= 168", "= 0", "deletion.minimum_notice_hours", "must be from 1"),
    ("[30, 7, 2]", "[30, 60]", "deletion.reminder_days", "60 days is not inside the shortest plan's retention"),
    ("[30, 7, 2]", "[30, 0]", "deletion.reminder_days", "0 is no number of days of 1 or more"),
    ("[30, 7, 2]", "30", "deletion.reminder_days", "must be a list, not 30"),
    ("billing@vendor.example", "billing", "contacts.billing_team.email", "must be an email address, not 'billing'"),
    ('name = "Billing Team"', 'name = " "', "contacts.billing_team.name", "must be one line of 1 to 200 characters"),
    ('"Essentials"', '"Two\\nlines"', "plans[0].name", "must be one line"),
    ('code = "startup"', 'code = "essentials"', "plans", "the code 'essentials' stands twice"),
    ('channel = "SELF_SERVE"', 'channel = "ALONE"', "plans[0].channel", "must be one of SELF_SERVE, ASSISTED"),
    ('effective = "IMMEDIATE"', 'effective = "LATER"', "plans[0].effective", "must be one of IMMEDIATE, PERIOD_END"),
    ("retention_hours = 1440", "retention_hours = 23", "plans[0].retention_hours", "must be from 24"),
    ("retention_hours = 1440", "retention_days = 60", "plans[0].retention_hours", "is missing"),
    ('code = "UNUSED"', 'code = "BORED"', "reasons[3].code", "must be one of TOO_EXPENSIVE"),
    ('code = "UNUSED"', 'code = "TOO_EXPENSIVE"', "reasons", "the code 'TOO_EXPENSIVE' stands twice"),
    ('["TOO_EXPENSIVE"]', '["CHEAP"]', "offers[0].reasons", "'CHEAP' is none of TOO_EXPENSIVE"),
    ("plans = []", 'plans = ["gold"]', "offers[0].plans", "'gold' is no plan of this policy"),
    ('kind = "PAUSE"', 'kind = "REST"', "offers[1].kind", "must be one of DISCOUNT"),
    ("cooldown_days = 365", "cooldown_days = -1", "offers[0].cooldown_days", "must be from 0 to 3660, not -1"),
    ('code = "pause-2-months"', 'code = "guided-setup"', "offers", "the code 'guided-setup' stands twice"),
]


@pytest.mark.parametrize(("old", "new", "key", "reason"), MISTAKES, ids=[f"{key} {new}" for _, new, key, _ in MISTAKES])
def test_a_mistake_is_named_with_file_key_and_reason(tmp_path: Path, old: str, new: str, key: str, reason: str) -> None:
    file = changed(tmp_path, old, new)
    with pytest.raises(PolicyError) as refused:
        policy.load(file)
    assert str(refused.value).startswith(f"{file}: {key}: ")
    assert reason in str(refused.value)


def test_a_policy_without_plans_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(DEFAULT[: DEFAULT.index("[[plans]]")], encoding="utf-8")
    with pytest.raises(PolicyError, match=r": plans: is empty"):
        policy.load(file)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"plans = [", "is not valid TOML"), (b"name = '\xff'", "is not valid TOML")]
)
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "policy.toml"
    file.write_bytes(content)
    with pytest.raises(PolicyError, match=reason) as refused:
        policy.load(file)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(PolicyError, match="cannot be read") as refused:
        policy.load(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)


def test_reminders_come_in_order_and_once(tmp_path: Path) -> None:
    assert policy.load(changed(tmp_path, "[30, 7, 2]", "[2, 30, 2]")).reminder_days == (30, 2)


class TestOffers:
    def test_for_a_reason_are_made_for_it_alone(self) -> None:
        offers = {offer.code: offer for offer in policy.load().offers}
        assert offers["discount-3-months"].suits("essentials", FeedbackReason.TOO_EXPENSIVE)
        assert not offers["discount-3-months"].suits("essentials", FeedbackReason.UNUSED)
        assert not offers["discount-3-months"].suits("essentials", None)

    def test_without_reasons_are_made_whatever_the_reason(self) -> None:
        (offer,) = [offer for offer in policy.load().offers if offer.code == "guided-setup"]
        assert all(offer.suits("essentials", reason) for reason in (None, *FeedbackReason))

    def test_for_a_plan_are_made_on_it_alone(self, tmp_path: Path) -> None:
        (offer, *_) = policy.load(changed(tmp_path, "plans = []", 'plans = ["startup"]')).offers
        assert offer.suits("startup", FeedbackReason.TOO_EXPENSIVE)
        assert not offer.suits("essentials", FeedbackReason.TOO_EXPENSIVE)
