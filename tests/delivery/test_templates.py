"""What the emails say: every fact, the same in text and HTML, from the policy, and nothing that somebody slipped in."""

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from app import messages, policy
from app.delivery import email as delivery
from app.delivery.email import Recipient, Rendered, duration, moment, render
from app.delivery.preview import preview, samples
from app.errors import Contact
from app.lifecycle import HaltCause
from app.policy import Policy

TEMPLATES = Path(delivery.__file__).with_name("templates")
SHIPPED = policy.load()
SAMPLES = {email.template: (email, to) for email, to in samples(SHIPPED)}
EVERY_EMAIL = pytest.mark.parametrize("template", list(messages.CATALOGUE))


def sign(link: messages.Link) -> str:
    return f"https://sunset.example/links/{link.purpose}?token=token-for-{link.purpose}"


def written(email: messages.Email, name: str = "Alice Adams") -> Rendered:
    return render(email, Recipient(name=name, address="alice@acme.example"), sign=sign)


def words(text: str) -> str:
    """Text without its line breaks."""
    return " ".join(text.split())


class _Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.lasttag not in {"title", "style"}:  # people see neither
            self.parts.append(data)

    @property
    def text(self) -> str:
        return words(" ".join(self.parts))

    @property
    def links(self) -> list[str]:
        return [attributes["href"] or "" for tag, attributes in self.tags if tag == "a"]


def test_the_samples_are_the_catalogue() -> None:
    assert list(SAMPLES) == list(messages.CATALOGUE)


@EVERY_EMAIL
def test_every_email_tells_every_fact_it_is_given_in_text_and_in_html(template: str) -> None:
    """A fact that a template forgets is a fact that somebody is not told."""
    email, _ = SAMPLES[template]
    rendered = written(email)
    page = _Page(rendered.html)
    for field in fields(email):
        for said in told(getattr(email, field.name), field.name):
            if said.startswith("https:"):
                assert said in rendered.text, field.name
                assert said in page.links, field.name
            else:
                assert said in words(rendered.text), field.name
                assert said in page.text, field.name


def told(value: object, name: str) -> Iterator[str]:
    match value:
        case datetime():
            yield moment(value)
        case int() if "hours" in name:
            yield duration(value)
        case int():
            yield str(value)
        case messages.Link():
            yield sign(value)
        case Contact():
            yield value.name
            yield value.email
        case messages.LateSystem():
            yield value.code
            yield value.name
            yield moment(value.since)
            yield f"accounts waiting: {value.late}, since"
            yield f"new in this email: {value.news}"
            yield from told(value.first, name)
        case messages.LateAccount():
            yield value.id
            yield f"epoch {value.epoch}"
        case tuple():
            for one in value:
                yield from told(one, name)
        case HaltCause():
            yield {
                HaltCause.OPERATOR: "An operator has halted all deletions.",
                HaltCause.RESTORED: "The database was restored from a back-up.",
                HaltCause.MOVED: "The database is not where or what it was",
            }[value]
        case str():
            yield from value.splitlines()
        case _:
            raise AssertionError(f"{name}: nobody has said how {value!r} is told")


@EVERY_EMAIL
def test_text_and_html_name_the_same_times_numbers_and_addresses(template: str) -> None:
    rendered = written(SAMPLES[template][0])
    pattern = r"\w+ \d{1,2}, \d{4}, \d{2}:\d{2} UTC|\d+ (?:days|hours?)|[\w.-]+@[\w.-]+\w"
    assert set(re.findall(pattern, words(rendered.text))) == set(re.findall(pattern, _Page(rendered.html).text))


@EVERY_EMAIL
def test_a_fact_that_a_template_asks_for_and_is_not_given_stops_the_email(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "fields", lambda email: [])
    with pytest.raises(UndefinedError):
        written(SAMPLES[template][0])


@EVERY_EMAIL
def test_no_template_has_a_number_of_its_own(template: str) -> None:
    """Every number of days or hours comes from the policy."""
    for file in [*(TEMPLATES / template).iterdir(), *TEMPLATES.glob("layout.*")]:
        source = re.sub(r"\{#.*?#\}|<style>.*?</style>|<!--.*?-->|</?[a-z].*?>", "", file.read_text(), flags=re.DOTALL)
        assert not re.search(r"\d", source), file


def test_a_policy_with_other_times_changes_every_number() -> None:
    plans = {code: replace(plan, retention=timedelta(days=45)) for code, plan in SHIPPED.plans.items()}
    other = replace(
        SHIPPED,
        plans=plans,
        assistance_response=timedelta(hours=36),
        confirmation_lifetime=timedelta(hours=1),
        reminder_days=(21,),
        minimum_notice=timedelta(days=4),
        breaker_at_least=70,
    )
    before, after = everything(SHIPPED), everything(other)

    assert "60 days" in before
    assert "60 days" not in after
    assert "45 days" in after
    assert "within 24 hours" in before
    assert "within 24 hours" not in after
    assert "within 36 hours" in after
    assert "November 26, 2026, 14:05 UTC" in before
    assert "November 26, 2026, 14:05 UTC" not in after
    assert "November 23, 2026, 15:05 UTC" in after
    assert "will be deleted in 30 days" in before
    assert "will be deleted in 30 days" not in after
    assert "will be deleted in 21 days" in after
    assert "will be deleted on November 30, 2026, 14:05 UTC" in before
    assert "will be deleted on November 27, 2026, 14:05 UTC" in after
    assert "10 allowed" in before
    assert "10 allowed" not in after
    assert "70 allowed" in after


def everything(of: Policy) -> str:
    rendered = [written(email) for email, _ in samples(of)]
    return words(" ".join(part for one in rendered for part in (one.subject, one.text, _Page(one.html).text)))


def test_a_plan_that_is_kept_for_36_hours_says_so() -> None:
    email, _ = SAMPLES["cancellation-confirmed"]
    assert isinstance(email, messages.CancellationConfirmed)
    rendered = written(replace(email, retention_hours=36))
    assert "kept for 36 hours" in words(rendered.text)
    assert "kept for 36 hours" in _Page(rendered.html).text


def reminder(**facts: Any) -> Rendered:
    email, _ = SAMPLES["deletion-reminder"]
    return written(replace(email, **facts))


@pytest.mark.parametrize(("hours", "said"), [(168, "in 7 days"), (47, "in 47 hours"), (0, "within the hour")])
def test_a_reminder_tells_how_long_is_left(hours: int, said: str) -> None:
    """A worker that was away reminds late, and then says how late it is."""
    rendered = reminder(hours_left=hours)
    assert rendered.subject == f"The data of Acme will be deleted {said}"
    assert f"will be deleted for good {said}." in words(rendered.text)
    assert f"will be deleted for good {said}." in _Page(rendered.html).text


def test_a_reminder_after_the_time_to_restart_promises_no_restart() -> None:
    rendered = reminder(restart_link=None)
    page = _Page(rendered.html)
    for said in (words(rendered.text), page.text):
        assert "The time to restart the account is over." in said
        assert "ask for a restart" not in said.lower()
        assert said.count(SHIPPED.billing_team.email) == 1
    assert page.links == [f"mailto:{SHIPPED.billing_team.email}"]


@pytest.mark.parametrize("template", ["assistance-reminder", "assistance-escalated"])
def test_a_request_of_somebody_who_is_no_longer_a_member_names_no_one_to_write_to(template: str) -> None:
    email, _ = SAMPLES[template]
    assert isinstance(email, messages.AssistanceRequested)
    rendered = written(replace(email, member=Contact(name="A former member", email="")))
    page = _Page(rendered.html)

    assert "Asked by: A former member\n" in rendered.text
    assert re.search("Asked by A former member (Received|Customer Success Manager) ", page.text)
    for said in (words(rendered.text), page.text):
        assert "A former member asked to cancel" in said
        assert re.search("[Tt]alk to a member who can manage billing", said)
        assert "()" not in said
    assert "mailto:" not in page.links


@pytest.mark.parametrize(
    ("hours", "said"),
    [(1, "1 hour"), (24, "24 hours"), (36, "36 hours"), (48, "2 days"), (1_440, "60 days"), (1_441, "1441 hours")],
)
def test_hours_are_said_as_days_only_when_they_are_whole_days(hours: int, said: str) -> None:
    assert duration(hours) == said


def test_times_are_told_in_utc_with_the_zone_and_never_later_than_they_are() -> None:
    assert moment(datetime.fromisoformat("2026-11-23T16:05:59.999+02:00")) == "November 23, 2026, 14:05 UTC"
    assert moment(datetime(2027, 1, 2, 3, 4, tzinfo=UTC)) == "January 2, 2027, 03:04 UTC"
    with pytest.raises(ValueError, match="zone"):
        moment(datetime(2026, 11, 23, 14, 5))  # noqa: DTZ001


# --- What strangers typed ------------------------------------------------------------------------------------------

HOSTILE = '<script>alert("x")</script><a href="https://evil.example">& more</a>'


def spoiled(value: object, hostile: Callable[[str], str]) -> object:
    match value:
        case str():
            return hostile(value)
        case Contact():
            return Contact(name=hostile(value.name), email=value.email)
        case messages.LateSystem():
            return replace(value, code=hostile(value.code), name=hostile(value.name))
        case messages.LateAccount():
            return replace(value, id=hostile(value.id))
        case tuple():
            return tuple(spoiled(one, hostile) for one in value)
        case _:
            return value


def with_names(email: messages.Email, hostile: Callable[[str], str]) -> messages.Email:
    facts: dict[str, Any] = {field.name: spoiled(getattr(email, field.name), hostile) for field in fields(email)}
    return replace(email, **facts)


@EVERY_EMAIL
def test_a_name_is_text_and_never_markup(template: str) -> None:
    email, _ = SAMPLES[template]
    clean = _Page(written(email).html)
    page = _Page(written(with_names(email, lambda _: HOSTILE), name=HOSTILE).html)

    assert HOSTILE in page.text
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in clean.tags}
    assert page.links == clean.links


@EVERY_EMAIL
def test_a_name_cannot_write_a_paragraph_of_its_own(template: str) -> None:
    """An account called "X, newline, Dear customer, newline, ..." does not speak in our name."""
    email, _ = SAMPLES[template]
    forged = written(with_names(email, lambda text: f"{text}\r\n\r\nDear customer\u2028"), name="Al\n\nDear customer")

    assert "\n" not in forged.subject
    assert not re.search(r"\n\s*\nDear customer", forged.text)


def test_a_note_is_quoted_line_by_line() -> None:
    email, _ = SAMPLES["restart-requested"]
    assert isinstance(email, messages.RestartRequested)
    note = "First.\n\nDear billing team,\nthis line is long enough that it has to be broken, and it stays a quotation."
    rendered = written(replace(email, note=note))

    quoted = rendered.text.partition("They wrote:\n\n")[2].partition("\n\nNothing has")[0].splitlines()
    assert quoted
    assert all(line.startswith(">") for line in quoted)
    assert "Dear billing team,<br>" in rendered.html


def test_a_request_without_a_note_quotes_nothing() -> None:
    email, _ = SAMPLES["restart-requested"]
    assert isinstance(email, messages.RestartRequested)
    rendered = written(replace(email, note=""))
    assert "wrote" not in rendered.text
    assert "blockquote" not in rendered.html


def test_a_member_without_a_name_is_greeted_all_the_same() -> None:
    rendered = written(SAMPLES["cancellation-confirmed"][0], name="")
    assert rendered.text.startswith("Hello,\n")
    assert "Hello," in _Page(rendered.html).text


# --- How they look -------------------------------------------------------------------------------------------------


@EVERY_EMAIL
def test_an_email_loads_nothing_and_runs_nothing(template: str) -> None:
    """No image, no tracking, no script, no address but the signed links and those of people."""
    html = written(SAMPLES[template][0]).html
    page = _Page(html)

    assert not {tag for tag, _ in page.tags} & {"img", "script", "link", "iframe", "form", "object", "video"}
    assert not re.search(r"\bsrc=|url\(|@import|\bon[a-z]+=", html)
    assert all(link.startswith(("https://sunset.example/links/", "mailto:")) for link in page.links)


@EVERY_EMAIL
def test_text_lines_are_short_and_a_link_stands_whole_on_a_line_of_its_own(template: str) -> None:
    long_token = "x" * 600
    email, _ = SAMPLES[template]
    rendered = render(
        email, Recipient(name="Alice", address="a@acme.example"), sign=lambda _: f"https://s.example/{long_token}"
    )
    for line in rendered.text.splitlines():
        assert len(line) <= 76 or line == f"https://s.example/{long_token}"


def test_the_confirmation_tells_what_stopped_and_where_to_turn() -> None:
    email, _ = SAMPLES["cancellation-confirmed"]
    text = words(written(email).text)
    assert "Messages: the account sends none any more." in text
    assert "Access: no member of the account can use it any more." in text
    assert f"Was this not you? Write to Security at {SHIPPED.security.email}" in text


def test_the_notice_tells_the_others_who_canceled() -> None:
    email, _ = SAMPLES["cancellation-notice"]
    rendered = written(email, name="Carol Clark")
    assert "Alice Adams confirmed the cancellation" in words(rendered.text)
    assert "You confirmed" not in rendered.text + rendered.html
    assert rendered.subject == "The account Acme was canceled by Alice Adams"


def test_the_last_email_says_that_it_is_the_last() -> None:
    email, _ = SAMPLES["account-deleted"]
    rendered = written(email)
    for said in (words(rendered.text), _Page(rendered.html).text):
        assert "This is the last email about the account." in said
        assert "is erased from the account's records" in said
        assert "a new account would have to be set up" in said


def test_an_email_without_an_account_names_none() -> None:
    """The operators' is about the installation."""
    email, _ = SAMPLES["deletions-halted"]
    assert not isinstance(email, messages.AccountEmail)
    rendered = written(email, name="Operators")
    assert "it is the operators who are told when deletions stop" in words(rendered.text)
    assert not re.search(r"[Tt]he account\b", rendered.text + _Page(rendered.html).text)


def test_the_preview_writes_every_email_in_three_forms(tmp_path: Path) -> None:
    files = preview(tmp_path / "emails", SHIPPED)

    assert [file.name for file in files] == [
        f"{template}.{suffix}" for template in messages.CATALOGUE for suffix in ("txt", "html", "eml")
    ]
    message = message_from_bytes((tmp_path / "emails" / "cancellation-notice.eml").read_bytes(), policy=default)
    assert message["To"] == "Carol Clark <carol@acme.example>"
    part = message.get_body(("html",))
    assert isinstance(part, EmailMessage)
    shown = (tmp_path / "emails" / "cancellation-notice.html").read_text()
    assert part.get_content().split() == shown.split()


def test_the_preview_takes_any_policy(tmp_path: Path) -> None:
    only = replace(SHIPPED.plan("startup"), code="basic", name="Basic")
    assert preview(tmp_path, replace(SHIPPED, plans={"basic": only}, offers=(), reminder_days=()))
    assert "Basic plan" in (tmp_path / "cancellation-confirmed.txt").read_text()
