"""How email leaves: through real servers on loopback that accept, refuse, stall and go away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.delivery.email import (
    DeliveryError,
    FolderMailer,
    Mailer,
    Recipient,
    Rendered,
    SmtpMailer,
    compose,
    mailer_from_settings,
)
from app.settings import Settings
from tests.delivery.smtp_server import SmtpServer, self_made_certificate

PROMISED_AT = datetime(2026, 11, 23, 14, 5, 7, tzinfo=UTC)
SENDER = "Sunset <no-reply@vendor.example>"
ALICE = Recipient(name="Alice Adams", address="alice@acme.example")


def letter(
    to: Recipient = ALICE, *, subject: str = "Acme is canceled", text: str = "Canceled.\n", message_id: str = "<1@test>"
) -> EmailMessage:
    rendered = Rendered(subject=subject, text=text, html=f"<p>{text}</p>\n")
    return compose(rendered, to, SENDER, message_id, PROMISED_AT)


@asynccontextmanager
async def mailer_to(server: SmtpServer, *, starttls: bool = False, deadline: float = 20) -> AsyncIterator[SmtpMailer]:
    mailer = SmtpMailer(server.url, starttls=starttls, deadline=deadline)
    try:
        yield mailer
    finally:
        await mailer.close()


async def refusal(mailer: Mailer, message: EmailMessage) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        await mailer.send(message)
    return caught.value


# --- What a message is ---------------------------------------------------------------------------------------------


def test_a_message_says_who_to_whom_when_and_that_a_machine_wrote_it() -> None:
    parsed = message_from_bytes(letter().as_bytes(), policy=default)

    assert parsed["From"] == SENDER
    assert parsed["To"] == "Alice Adams <alice@acme.example>"
    assert parsed["Subject"] == "Acme is canceled"
    assert parsed["Date"].datetime == PROMISED_AT
    assert parsed["Message-ID"] == "<1@test>"
    assert parsed["Auto-Submitted"] == "auto-generated"
    assert [part.get_content_type() for part in parsed.iter_parts()] == ["text/plain", "text/html"]


def test_a_retry_is_the_same_message_byte_for_byte() -> None:
    """Its copies are recognized as copies."""
    assert letter().as_bytes() == letter().as_bytes()


def test_the_time_of_the_promise_is_told_in_utc() -> None:
    local = PROMISED_AT.astimezone(timezone(timedelta(hours=2)))
    message = compose(Rendered(subject="s", text="t", html="h"), ALICE, SENDER, "<1@test>", local)
    assert message["Date"] == "Mon, 23 Nov 2026 14:05:07 +0000"


def test_a_link_can_be_copied_from_the_raw_message() -> None:
    link = "https://sunset.example/links/restart?token=" + "a1B2=" * 150
    assert link.encode() in letter(text=f"Ask:\n{link}\n").as_bytes()


@pytest.mark.parametrize("text", ["Grüße\n", "x" * 2_000 + "\n"])
def test_any_text_arrives_whole_in_lines_that_every_server_takes(text: str) -> None:
    raw = letter(text=text).as_bytes()
    part = message_from_bytes(raw, policy=default).get_body(("plain",))

    assert isinstance(part, EmailMessage)
    assert part.get_content().replace("\r\n", "\n") == text
    assert raw.isascii()
    assert max(len(line) for line in raw.splitlines()) <= 998


ANYTHING = st.text(st.characters(codec="utf-8") | st.sampled_from('\r\n\0,;:<>@"()[]\\=?\u2028'), max_size=250)


@settings(deadline=None)
@example(name="a,b " * 40, subject="")
@example(name="=?utf-8?q?Alice=0D=0ABcc:_eve=40evil.example?=", subject="=?utf-8?q?a=0D=0ABcc:_eve=40evil.example?=")
@given(name=ANYTHING, subject=ANYTHING)
def test_no_name_and_no_subject_changes_the_structure_of_the_headers(name: str, subject: str) -> None:
    """Whatever people are called: one recipient, one subject, and no header that we did not write."""
    raw = letter(Recipient(name=name, address="alice@acme.example"), subject=subject).as_bytes()
    parsed = message_from_bytes(raw, policy=default)

    assert [address.addr_spec for address in parsed["To"].addresses] == ["alice@acme.example"]
    assert set(parsed.keys()) == set(letter().keys())
    assert len(parsed.keys()) == len(letter().keys())
    assert "\n" not in parsed["Subject"]
    assert not parsed.defects


@pytest.mark.parametrize("name", ["Alice\r\nBcc: eve@evil.example", "Alice\nBcc: eve@evil.example", "Alice\u2028\x00x"])
def test_a_name_with_newlines_stays_on_its_line(name: str) -> None:
    raw = letter(Recipient(name=name, address="alice@acme.example"), subject=f"About {name}").as_bytes()
    assert b"\nBcc:" not in raw
    assert message_from_bytes(raw, policy=default)["To"].addresses[0].addr_spec == "alice@acme.example"


def test_what_looks_like_an_encoded_word_is_not_decoded_into_something_else() -> None:
    lure = "=?utf-8?q?Your_bank?="
    parsed = message_from_bytes(
        letter(Recipient(name=lure, address="a@b.example"), subject=lure).as_bytes(), policy=default
    )
    assert "Your bank" not in f"{parsed['To']} {parsed['Subject']}"


@pytest.mark.parametrize("name", ["Zoë Müller", "山田太郎", "O'Brien, Alice", 'Alice "Al" Adams', "Adams " * 12 + "Ö"])
def test_a_name_arrives_as_it_is_written(name: str) -> None:
    raw = letter(Recipient(name=name, address="alice@acme.example")).as_bytes()
    assert raw.isascii()
    assert message_from_bytes(raw, policy=default)["To"].addresses[0].display_name == name


@pytest.mark.parametrize(
    "address",
    [
        "",
        "alice",
        "@acme.example",
        "alice@",
        "alice@acme.example, eve@evil.example",
        "alice@acme.example\r\nRCPT TO:<eve@evil.example>",
        "<alice@acme.example>",
        "alice adams@acme.example",
        "alice@acme example",
        "alice@bü cher.example",
        "alice@acme..exämple",
        "ali\x00ce@acme.example",
        "ali\u202ece@acme.example",
        "ali\ud800ce@acme.example",
        "a" * 65 + "@acme.example",
    ],
)
def test_what_is_no_address_is_refused_for_good(address: str) -> None:
    with pytest.raises(DeliveryError) as caught:
        letter(Recipient(name="Alice", address=address))
    assert caught.value.permanent


def test_a_sender_that_is_no_address_is_not_the_recipients_fault() -> None:
    with pytest.raises(DeliveryError) as caught:
        compose(Rendered(subject="s", text="t", html="h"), ALICE, "nobody", "<1@test>", PROMISED_AT)
    assert not caught.value.permanent


# --- What servers do -----------------------------------------------------------------------------------------------


async def test_a_message_reaches_its_recipient() -> None:
    with SmtpServer() as server:
        async with mailer_to(server) as mailer:
            await mailer.send(letter())
        (accepted,) = server.messages

    assert (accepted.mail_from, accepted.recipient) == ("no-reply@vendor.example", "alice@acme.example")
    assert accepted.message["Message-ID"] == "<1@test>"
    assert accepted.message["Subject"] == "Acme is canceled"


async def test_one_refused_recipient_is_permanent_and_does_not_touch_the_other() -> None:
    with SmtpServer() as server:
        server.answer_recipient = lambda address: "550 5.1.1 No such user" if address.startswith("carol") else None
        async with mailer_to(server) as mailer:
            error = await refusal(mailer, letter(Recipient(name="Carol", address="carol@acme.example")))
            await mailer.send(letter())

    assert error.permanent
    assert "550" in str(error)
    assert [accepted.recipient for accepted in server.messages] == ["alice@acme.example"]
    assert server.connections == 1, "a refusal is no reason for a new connection"


@pytest.mark.parametrize(
    ("where", "answer", "permanent"),
    [
        ("recipient", "550 5.1.1 No such user", True),
        ("recipient", "451 4.7.1 Try again later", False),
        ("recipient", "421 4.3.2 Going down", False),
        ("recipient", "530 5.7.0 Authentication required", False),
        ("data", "554 5.6.0 Not this content", True),
        ("data", "451 4.3.0 Try again later", False),
        ("sender", "550 5.7.1 Not from you", False),
        ("sender", "451 4.3.0 Try again later", False),
    ],
)
async def test_the_servers_word_decides_whether_trying_again_helps(where: str, answer: str, permanent: bool) -> None:
    """5xx about the recipient or the content is for good; what concerns the sender is ours to mend."""
    with SmtpServer() as server:
        if where == "recipient":
            server.answer_recipient = lambda address: answer
        else:
            setattr(server, f"answer_{where}", answer)
        async with mailer_to(server) as mailer:
            error = await refusal(mailer, letter())

    assert error.permanent is permanent
    assert answer[:3] in str(error)
    assert not server.messages


async def test_a_temporary_refusal_passes_when_it_is_tried_again() -> None:
    with SmtpServer(answer_data="451 4.3.0 Try again later") as server:
        async with mailer_to(server) as mailer:
            assert not (await refusal(mailer, letter())).permanent
            server.answer_data = None
            await mailer.send(letter())
    assert [accepted.message["Message-ID"] for accepted in server.messages] == ["<1@test>"]


@pytest.mark.parametrize("command", ["EHLO", "MAIL", "RCPT", "DATA"])
async def test_a_server_that_stalls_is_given_up_at_the_deadline(command: str) -> None:
    with SmtpServer(stall_at=command) as server:
        async with mailer_to(server, deadline=0.3) as mailer:
            assert not (await refusal(mailer, letter())).permanent
            server.stall_at = None
        async with mailer_to(server) as mailer:
            await mailer.send(letter())


async def test_the_deadline_is_for_the_whole_message_not_for_each_step() -> None:
    """A server that answers every line in time, but slowly, cannot hold a sender for long."""
    with SmtpServer(delay=0.4) as server:
        async with mailer_to(server, deadline=1) as mailer:
            error = await refusal(mailer, letter())
    assert not error.permanent
    assert "within 1 seconds" in str(error)
    assert not server.messages


async def test_a_server_that_goes_away_after_the_content_may_have_accepted_it() -> None:
    """So it is tried again, under the same Message-ID."""
    with SmtpServer(drop_after_data=True) as server:
        async with mailer_to(server) as mailer:
            error = await refusal(mailer, letter())
            server.drop_after_data = False
            await mailer.send(letter())

    assert not error.permanent
    assert [accepted.message["Message-ID"] for accepted in server.messages] == ["<1@test>", "<1@test>"]


async def test_a_server_that_is_not_there_is_temporary() -> None:
    server = SmtpServer()
    server.start()
    server.stop()
    async with mailer_to(server) as mailer:
        assert not (await refusal(mailer, letter())).permanent


async def test_a_cancelled_delivery_leaves_no_half_sent_message_on_a_kept_connection() -> None:
    with SmtpServer() as server:
        async with mailer_to(server) as mailer:
            await mailer.send(letter())
            server.stall_at = "RCPT"
            sending = asyncio.create_task(mailer.send(letter()))
            await asyncio.to_thread(server.stalled.wait)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            server.stall_at = None
            await mailer.send(letter(message_id="<2@test>"))
    assert [accepted.message["Message-ID"] for accepted in server.messages] == ["<1@test>", "<2@test>"]


# --- Connections ---------------------------------------------------------------------------------------------------


async def test_one_connection_carries_many_messages_and_is_ended_politely() -> None:
    with SmtpServer() as server:
        async with mailer_to(server) as mailer:
            for _ in range(3):
                await mailer.send(letter())
    assert len(server.messages) == 3
    assert server.connections == 1
    assert server.commands[-1] == "QUIT"


async def test_messages_sent_at_once_do_not_share_a_connection() -> None:
    with SmtpServer() as server:
        async with mailer_to(server) as mailer:
            await asyncio.gather(*(mailer.send(letter(message_id=f"<{number}@test>")) for number in range(8)))
    assert {accepted.message["Message-ID"] for accepted in server.messages} == {f"<{n}@test>" for n in range(8)}


@pytest.mark.parametrize("how", ["restarted", "hung up"])
async def test_a_connection_that_the_server_ended_costs_no_message(how: str) -> None:
    with SmtpServer() as server:
        async with mailer_to(server) as mailer:
            await mailer.send(letter(message_id="<1@test>"))
            if how == "restarted":
                server.stop()
                server.start()
            else:
                server.hang_up()
            await mailer.send(letter(message_id="<2@test>"))
    assert [accepted.message["Message-ID"] for accepted in server.messages] == ["<1@test>", "<2@test>"]


async def test_a_kept_connection_that_does_not_answer_is_replaced_within_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.delivery.email._POLITE_SECONDS", 0.2)
    with SmtpServer() as server:
        async with mailer_to(server) as mailer:
            await mailer.send(letter(message_id="<1@test>"))
            server.stall_at = "RSET"
            await mailer.send(letter(message_id="<2@test>"))
            server.stall_at = None
    assert [accepted.message["Message-ID"] for accepted in server.messages] == ["<1@test>", "<2@test>"]
    assert server.connections == 2


async def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.delivery.email._IDLE_SECONDS", 0.0)
    with SmtpServer() as server:
        async with mailer_to(server) as mailer:
            await mailer.send(letter())
            await mailer.send(letter())
    assert server.connections == 2


async def test_a_closed_mailer_keeps_no_connection() -> None:
    with SmtpServer() as server:
        mailer = SmtpMailer(server.url, starttls=False, deadline=20)
        await mailer.send(letter())
        await mailer.close()
        assert server.commands[-1] == "QUIT"


# --- TLS and logging in --------------------------------------------------------------------------------------------


async def test_nothing_is_sent_in_clear_when_tls_is_required() -> None:
    with SmtpServer(login=("sunset", "secret")) as server, capture_logs() as logs:
        url = server.url.replace("//", "//sunset:secret@")
        mailer = SmtpMailer(url, starttls=True, deadline=20)
        error = await refusal(mailer, letter())

    assert not error.permanent
    assert server.commands == ["EHLO"], "neither the login nor the message"
    assert [entry["log_level"] for entry in logs] == ["error"]


@pytest.mark.parametrize("implicit", [False, True], ids=["starttls", "smtps"])
async def test_mail_travels_over_tls_to_a_server_with_a_trusted_certificate(
    implicit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, certificate = self_made_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with SmtpServer(tls=context, implicit_tls=implicit, login=("sunset", "p@ss/word")) as server:
        mailer = SmtpMailer(server.url.replace("//", "//sunset:p%40ss%2Fword@"), starttls=True, deadline=20)
        await mailer.send(letter())
        await mailer.send(letter())
        await mailer.close()
    assert len(server.messages) == 2


@pytest.mark.parametrize("implicit", [False, True], ids=["starttls", "smtps"])
async def test_a_check_goes_as_far_as_a_message_does_and_leaves_no_connection(
    implicit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, certificate = self_made_certificate(tmp_path)
    with SmtpServer(tls=context, implicit_tls=implicit, login=("sunset", "secret")) as server:
        url = server.url.replace("//", "//sunset:secret@")
        with pytest.raises(DeliveryError, match="certificate"):
            await SmtpMailer(url, starttls=True, deadline=20).check()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        told = await SmtpMailer(url, starttls=True, deadline=20).check()
        assert server.commands[-1] == "QUIT"
        assert server.messages == []
    assert ("TLS, logged in" if implicit else "STARTTLS, logged in") in told


@pytest.mark.parametrize("implicit", [False, True], ids=["starttls", "smtps"])
async def test_a_certificate_that_nobody_vouches_for_is_temporary_and_alarms(implicit: bool, tmp_path: Path) -> None:
    context, _ = self_made_certificate(tmp_path)
    with SmtpServer(tls=context, implicit_tls=implicit) as server, capture_logs() as logs:
        async with mailer_to(server, starttls=True) as mailer:
            error = await refusal(mailer, letter())

    assert not error.permanent
    assert not server.messages
    assert [(entry["log_level"], entry["reason"]) for entry in logs] == [("error", "TLS failed")]


async def test_a_refused_login_is_temporary_and_alarms_without_the_password() -> None:
    """A password that expired must not turn every waiting message into a dead letter."""
    with SmtpServer(login=("sunset", "new")) as server, capture_logs() as logs:
        mailer = SmtpMailer(server.url.replace("//", "//sunset:out-of-date@"), starttls=False, deadline=20)
        error = await refusal(mailer, letter())

    assert not error.permanent
    assert "535" in str(error)
    assert [entry["log_level"] for entry in logs] == ["error"]
    assert "out-of-date" not in f"{logs} {error}"
    assert not server.messages


async def test_the_right_login_is_used() -> None:
    with SmtpServer(login=("sunset", "p@ss")) as server:
        mailer = SmtpMailer(server.url.replace("//", "//sunset:p%40ss@"), starttls=False, deadline=20)
        await mailer.send(letter())
        await mailer.close()
    assert len(server.messages) == 1


async def test_a_refusal_names_no_personal_address() -> None:
    """Refusals are kept and logged; servers like to repeat the recipient."""
    with SmtpServer(answer_recipient=lambda address: f"550 5.1.1 <{address}>: no such user") as server:
        async with mailer_to(server) as mailer:
            error = await refusal(mailer, letter())
    assert "alice" not in str(error)
    assert "no such user" in str(error)


# --- Addresses beyond ASCII ----------------------------------------------------------------------------------------


async def test_a_domain_beyond_ascii_travels_as_punycode_to_any_server() -> None:
    with SmtpServer(smtputf8=False) as server:
        async with mailer_to(server) as mailer:
            await mailer.send(letter(Recipient(name="Straße", address="info@straße.example")))
    (accepted,) = server.messages
    assert accepted.recipient == "info@xn--strae-oqa.example", "not strasse.example, which is somebody else"


async def test_a_local_part_beyond_ascii_needs_a_server_that_takes_it() -> None:
    message = letter(Recipient(name="Jörg Müller", address="jörg@acme.example"))
    with SmtpServer() as able, SmtpServer(smtputf8=False) as unable:
        async with mailer_to(able) as mailer:
            await mailer.send(message)
        async with mailer_to(unable) as mailer:
            error = await refusal(mailer, message)

    (accepted,) = able.messages
    assert accepted.recipient == "jörg@acme.example"
    assert "<jörg@acme.example>\r\n".encode() in accepted.content
    assert error.permanent
    assert "SMTPUTF8" in str(error)
    assert not unable.messages


# --- The folder ----------------------------------------------------------------------------------------------------


async def test_the_folder_keeps_one_file_for_each_message_however_often_it_is_sent(tmp_path: Path) -> None:
    folder = tmp_path / "var" / "mailbox"
    mailer = FolderMailer(folder)
    await mailer.send(letter(message_id="<0199-a@test>"))
    await mailer.send(letter(message_id="<0199-a@test>"))
    await mailer.send(letter(message_id="<0199-b@test>"))

    assert sorted(file.name for file in folder.iterdir()) == [
        "20261123T140507Z-0199-a.eml",
        "20261123T140507Z-0199-b.eml",
    ]
    parsed = message_from_bytes((folder / "20261123T140507Z-0199-a.eml").read_bytes(), policy=default)
    assert parsed["To"] == "Alice Adams <alice@acme.example>"


def test_a_message_id_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mailbox"
    asyncio.run(FolderMailer(folder).send(letter(message_id="<../../evil@test>")))
    assert [file.parent for file in tmp_path.rglob("*.eml")] == [folder]


async def test_a_folder_that_cannot_be_written_is_temporary(tmp_path: Path) -> None:
    (tmp_path / "mailbox").write_text("a file stands in the way")
    assert not (await refusal(FolderMailer(tmp_path / "mailbox"), letter())).permanent


async def test_the_settings_choose_the_way_out(tmp_path: Path) -> None:
    in_folder = mailer_from_settings(Settings.load({"SUNSET_DATA_DIR": str(tmp_path)}))
    await in_folder.send(letter())
    assert len(list((tmp_path / "mailbox").glob("*.eml"))) == 1

    with SmtpServer() as server:
        by_smtp = mailer_from_settings(Settings.load({"SUNSET_DATA_DIR": str(tmp_path), "SUNSET_SMTP_URL": server.url}))
        await by_smtp.send(letter())
        await by_smtp.close()
    assert len(server.messages) == 1

    with SmtpServer() as server:
        environ = {"SUNSET_SMTP_URL": server.url, "SUNSET_SMTP_STARTTLS": "required", "SUNSET_DATA_DIR": str(tmp_path)}
        await refusal(mailer_from_settings(Settings.load(environ)), letter())
    assert not server.messages
