"""The development mailbox: it shows every email, and an email can do nothing in it."""

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from app.delivery.email import FolderMailer, Recipient, Rendered, compose
from app.web import mailbox

START = datetime(2026, 11, 23, 14, 5, tzinfo=UTC)
LINK = "https://sunset.example/links/restart?token=a.b-c_d"

Deliver = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "mailbox"


@pytest.fixture
def client(folder: Path) -> TestClient:
    return TestClient(Starlette(routes=mailbox.routes(folder)))


@pytest.fixture
def deliver(folder: Path) -> Deliver:
    """Sends an email into the folder, each a minute after the one before; answers the file's name."""
    sent = 0

    def deliver(
        subject: str = "Hello", *, text: str = "Hello.\n", html: str = "<p>Hello.</p>", to: str = "a@b.example"
    ) -> str:
        nonlocal sent
        sent += 1
        page = f"<html><head></head><body>{html}</body></html>"
        message = compose(
            Rendered(subject=subject, text=text, html=page),
            Recipient(name="Alice", address=to),
            "Sunset <no-reply@vendor.example>",
            f"<{100 - sent}@test>",
            START + timedelta(minutes=sent),
        )
        asyncio.run(FolderMailer(folder).send(message))
        return max(file.name for file in folder.glob("*.eml"))

    return deliver


def test_the_newest_email_stands_first(client: TestClient, deliver: Deliver) -> None:
    for subject in ("First", "Second", "Third"):
        deliver(subject)
    page = client.get("/mailbox").text
    assert page.index("Third") < page.index("Second") < page.index("First")
    assert "3 emails" in page


def test_an_empty_mailbox_says_so(client: TestClient, folder: Path) -> None:
    """Also before the first email has made the folder."""
    answer = client.get("/mailbox")
    assert answer.status_code == 200
    assert "No email yet" in answer.text
    assert str(folder) in answer.text


def test_an_email_is_shown_with_its_text_and_links_that_can_be_clicked(client: TestClient, deliver: Deliver) -> None:
    name = deliver("The account Acme is canceled", text=f"Ask:\n{LINK}\n")
    page = client.get(f"/mailbox/{name}?as=text").text
    assert "The account Acme is canceled" in page
    assert "Alice &lt;a@b.example&gt;" in page
    assert f'<a href="{LINK}"' in page


def test_html_is_shown_in_a_frame_where_nothing_runs_and_nothing_loads(client: TestClient, deliver: Deliver) -> None:
    name = deliver(html=f'<a href="{LINK}">Ask</a><script>steal()</script>')
    page = client.get(f"/mailbox/{name}")
    frame = re.search(r"<iframe[^>]*>", page.text)
    assert frame
    assert f'src="/mailbox/{name}/html"' in frame[0]
    assert 'sandbox="allow-popups allow-popups-to-escape-sandbox"' in frame[0]
    assert "steal()" not in page.text

    shown = client.get(f"/mailbox/{name}/html")
    policy = shown.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "sandbox allow-popups allow-popups-to-escape-sandbox" in policy, "also when it is opened by itself"
    assert "script-src" not in policy
    assert "allow-scripts" not in policy
    assert "allow-same-origin" not in policy
    assert '<base target="_blank">' in shown.text, "a link opens beside the frame, not in it"


@pytest.mark.parametrize("path", ["/mailbox", "/mailbox/{name}", "/mailbox/{name}?as=text", "/mailbox/{name}/html"])
def test_every_answer_is_private_and_strict(path: str, client: TestClient, deliver: Deliver) -> None:
    answer = client.get(path.format(name=deliver()))
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "script-src" not in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer", "a link's token stays here"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "<script" not in answer.text


def test_what_an_email_says_is_text_on_our_own_page(client: TestClient, deliver: Deliver) -> None:
    name = deliver("<script>alert(1)</script>", text="<script>alert(2)</script>\n")
    for page in (client.get("/mailbox").text, client.get(f"/mailbox/{name}?as=text").text):
        assert "<script>" not in page
        assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(
    "name",
    [
        "..%2Fsecret.eml",
        "%2e%2e%2fsecret.eml",
        "..%5Csecret.eml",
        "linked.eml",
        "notes.txt",
        "sub.eml",
        "missing.eml",
        "%00",
    ],
)
@pytest.mark.parametrize("part", ["", "/html"])
def test_nothing_but_the_folders_own_emails_can_be_read(
    name: str, part: str, client: TestClient, folder: Path, deliver: Deliver
) -> None:
    deliver()
    secret = folder.parent / "secret.eml"
    secret.write_text("Subject: secret\nContent-Type: text/html\n\nsecret\n")
    (folder / "linked.eml").symlink_to(secret)
    (folder / "notes.txt").write_text("secret")
    (folder / "sub.eml").mkdir()

    answer = client.get(f"/mailbox/{name}{part}")
    assert answer.status_code == 404
    assert "secret" not in answer.text
    assert "secret" not in client.get("/mailbox").text


def test_an_email_from_elsewhere_is_shown_as_well_as_it_can_be(client: TestClient, folder: Path) -> None:
    folder.mkdir()
    (folder / "broken.eml").write_bytes(b"\xff\xfe no email at all \x00")
    (folder / "plain.eml").write_text("Subject: Only text\n\nHello.\n")

    assert "(no subject)" in client.get("/mailbox").text
    assert client.get("/mailbox/broken.eml").status_code == 200
    assert "Hello." in client.get("/mailbox/plain.eml").text
    assert client.get("/mailbox/plain.eml/html").status_code == 404


def test_an_address_beyond_ascii_is_readable(client: TestClient, deliver: Deliver) -> None:
    name = deliver(to="jörg@acme.example")
    assert "jörg@acme.example" in client.get(f"/mailbox/{name}").text


def test_a_full_mailbox_shows_the_newest(client: TestClient, folder: Path) -> None:
    folder.mkdir()
    for number in range(205):
        (folder / f"{number:04}.eml").write_text(f"Subject: Number {number}.\n\nHello.\n")
    page = client.get("/mailbox").text
    assert "The newest 200 of 205 emails" in page
    assert "Number 204." in page
    assert "Number 4." not in page
    assert "Number 4." in client.get("/mailbox/0004.eml").text, "an older one can still be opened by its name"
