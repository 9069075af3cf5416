"""Email: from the facts of `app.messages` to words, from words to a message, from a message to a mail server.

Three steps, each usable by itself: `render` puts an email's facts into its templates, `compose` makes the message
of one recipient, and a `Mailer` hands it over. This module knows no rows, no database and no clock: the worker gives
it facts, the time of the promise, the constant Message-ID and the way to sign a link, and learns from `DeliveryError`
whether trying again makes sense. Names, accounts and notes are what strangers typed: nothing of them reaches a
header's structure, a line of its own or unescaped HTML.
"""

import asyncio
import contextlib
import os
import re
import ssl
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP, SMTPUTF8
from email.utils import parseaddr
from pathlib import Path
from textwrap import wrap
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

import aiosmtplib
import idna
import structlog
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from app import messages
from app.settings import Settings, make_folder

_log = structlog.get_logger(__name__)


class DeliveryError(Exception):
    """The message was not accepted, or nobody can know whether it was.

    `permanent`: trying again cannot help, because this recipient or this message is refused. Otherwise it can, and a
    copy that had arrived nevertheless carries the same Message-ID. The text names no personal address.
    """

    def __init__(self, message: str, *, permanent: bool) -> None:
        super().__init__(message)
        self.permanent = permanent


@dataclass(frozen=True, kw_only=True)
class Recipient:
    """One person, as they were when the message was promised."""

    name: str
    address: str


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """An email's words: one line, plain text, and a whole HTML page."""

    subject: str
    text: str
    html: str


# --- Words -------------------------------------------------------------------------------------------------------

# Not strftime's, which follow the locale of the process.
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_TEXT_WIDTH = 76
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line breaks, overrides of the writing direction, halves of surrogate pairs."""


def moment(value: datetime) -> str:
    """A time as people read it, with its zone: "November 23, 2026, 14:05 UTC". Refuses a time without a zone.

    Seconds are cut off, so that a last moment is never told later than it is.
    """
    if value.utcoffset() is None:
        raise ValueError(f"{value} has no zone")
    value = value.astimezone(UTC)
    return f"{_MONTHS[value.month - 1]} {value.day}, {value.year}, {value:%H:%M} UTC"


def duration(hours: int) -> str:
    """A number of hours as people say it: "60 days" for whole days from two on, else "36 hours"."""
    if hours >= 48 and hours % 24 == 0:
        return f"{hours // 24} days"
    return "1 hour" if hours == 1 else f"{hours} hours"


def _single_line(value: Any) -> Any:
    """What an expression of a template puts out: one line of visible text. Markup of our own macros stays."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return " ".join(_UNPRINTABLE.sub(" ", value).split())


def _environment(*, html: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=html,  # noqa: S701 -- off for plain text alone
        undefined=StrictUndefined,
        finalize=_single_line,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"moment": moment, "duration": duration}
    return environment


_PLAIN = _environment(html=False)
_HTML = _environment(html=True)


def render(email: messages.Email, recipient: Recipient, *, sign: Callable[[messages.Link], str]) -> Rendered:
    """The words of `email` for `recipient`. `sign` answers the URL of a link, complete with its signed token.

    Every fact of the email is known to its templates by its name, a link as its URL. A template that asks for
    anything else raises `jinja2.UndefinedError`: half an email is never sent.
    """
    facts: dict[str, Any] = {"recipient_name": recipient.name}
    for field in fields(email):
        value = getattr(email, field.name)
        facts[field.name] = sign(value) if isinstance(value, messages.Link) else value
    subject = _PLAIN.get_template(f"{email.template}/subject.txt").render(facts)
    return Rendered(
        subject=_single_line(subject),
        text=_wrapped(_PLAIN.get_template(f"{email.template}/body.txt").render(facts)),
        html=_HTML.get_template(f"{email.template}/body.html").render(facts, subject=_single_line(subject)),
    )


def _wrapped(text: str) -> str:
    """Lines short enough for every mail program; a link is never broken. Templates write one line a paragraph."""
    lines = []
    for line in re.sub(r"\n{3,}", "\n\n", text.strip()).split("\n"):
        indent = {"- ": "  ", "> ": "> "}.get(line[:2], "")
        lines += wrap(line, _TEXT_WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [
            ""
        ]
    return "\n".join(lines) + "\n"


# --- Messages ----------------------------------------------------------------------------------------------------

_SPECIALS = re.compile(r'[][\\()<>@,:;"]')
_LOCAL_PART = re.compile(r"[^\s\"(),:;<>@\[\\\]]+")
_DOMAIN = re.compile(r"[A-Za-z0-9_.-]+|\[[A-Za-z0-9:.]+\]")
_HEADER_WIDTH = 78


def compose(rendered: Rendered, recipient: Recipient, sender: str, message_id: str, date: datetime) -> EmailMessage:
    """The message of one recipient, text and HTML, the same bytes however often it is made.

    `sender` is a From value such as `Sunset <no-reply@example.com>`; `message_id` stands in angle brackets; `date` is
    when the message was promised. A recipient's address that no message can be sent to is refused permanently.
    """
    message = EmailMessage(policy=SMTP)
    try:
        message["From"] = _address(*parseaddr(sender))
    except ValueError as error:
        raise DeliveryError("The sender's address is not one that email can come from.", permanent=False) from error
    try:
        message["To"] = _address(recipient.name, recipient.address)
    except ValueError as error:
        raise DeliveryError("The recipient's address is not one that email can go to.", permanent=True) from error
    message["Subject"] = _header_text(rendered.subject)
    message["Date"] = date.astimezone(UTC)
    message["Message-ID"] = message_id
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(rendered.text, cte=_encoding(rendered.text))
    message.add_alternative(rendered.html, subtype="html", cte=_encoding(rendered.html))
    # A boundary from the Message-ID instead of chance: copies of a message are equal byte for byte.
    message.set_boundary("=_" + re.sub(r"[^A-Za-z0-9.-]", "_", message_id.strip("<>"))[:60])
    return message


def _address(name: str, address: str) -> Address:
    """As it stands in a header and on the wire. ValueError for one that cannot stand there."""
    local, _, domain = address.rpartition("@")
    if not domain.isascii():
        domain = idna.encode(domain, uts46=True).decode("ascii")
    if not (_LOCAL_PART.fullmatch(local) and _DOMAIN.fullmatch(domain)) or _UNPRINTABLE.search(local):
        raise ValueError("not an address")
    if len(local.encode()) > 64 or len(domain) > 253:
        raise ValueError("too long for an address")
    name = _header_text(name)
    if len(f'To: "{name}" <{local}@{domain}>') > _HEADER_WIDTH:
        # The standard library loses the quotation marks when it folds a long name, and a comma in it would then
        # begin another address.
        name = " ".join(_SPECIALS.sub(" ", name).split())
    return Address(name, local, domain)


def _header_text(text: str) -> str:
    """Text that cannot be taken for a header's structure: a single line without encoded words."""
    return str(_single_line(text)).replace("=?", "= ?")[:200]


def _encoding(text: str) -> str:
    """As it is when that can travel anywhere, so that a link in a raw message can be read and copied."""
    plain = text.isascii() and all(len(line) <= 998 for line in text.split("\n"))
    return "7bit" if plain else "quoted-printable"


@dataclass(frozen=True, kw_only=True)
class _Wire:
    """A composed message as a server gets it."""

    sender: str
    recipient: str
    utf8: bool
    content: bytes


def _wire(message: EmailMessage) -> _Wire:
    sender, recipient = (message[header].addresses[0].addr_spec for header in ("From", "To"))
    utf8 = not (sender + recipient).isascii()
    content = message.as_bytes(policy=SMTPUTF8 if utf8 else SMTP)
    return _Wire(sender=sender, recipient=recipient, utf8=utf8, content=content)


# --- Mailers -----------------------------------------------------------------------------------------------------


class Mailer(Protocol):
    """A way out for messages. Several may be sent at once."""

    async def send(self, message: EmailMessage) -> None:
        """Hand over one composed message. When this returns, it has been accepted; else `DeliveryError`."""

    async def check(self) -> str:
        """Try everything but sending, and answer in a few words what is ready; else `DeliveryError`."""

    async def forget(self, message_ids: Sequence[str]) -> None:
        """Take away the copies that are kept here of messages with those ids. What was handed on is out of reach."""

    async def close(self) -> None:
        """Give back what is held, in a few seconds at most. Nothing is sent afterwards."""


def mailer_from_settings(settings: Settings) -> Mailer:
    """SMTP when a server is set, else a folder of .eml files in the data folder."""
    if settings.smtp_url:
        return SmtpMailer(
            settings.smtp_url, starttls=settings.smtp_starttls == "required", deadline=settings.smtp_timeout
        )
    return FolderMailer(settings.data_dir / "mailbox")


def _file_ending(message_id: str) -> str:
    """What a message's file is called behind its time."""
    return f"{quote(message_id.strip('<>').partition('@')[0], safe='')}.eml"


class FolderMailer:
    """Keeps messages as .eml files, for development: named by time, one file for one message however often sent."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def send(self, message: EmailMessage) -> None:
        try:
            await asyncio.to_thread(self._write, message)
        except OSError as error:
            raise DeliveryError(f"The mailbox folder cannot be written: {error.strerror}.", permanent=False) from error

    async def check(self) -> str:
        """That a file can be written there."""
        try:
            await asyncio.to_thread(self._try_to_write)
        except OSError as error:
            raise DeliveryError(f"{self._directory} cannot be written: {error.strerror}.", permanent=False) from error
        return f"emails become files in {self._directory}"

    async def forget(self, message_ids: Sequence[str]) -> None:
        await asyncio.to_thread(self._remove, frozenset(map(_file_ending, message_ids)))

    async def close(self) -> None:
        """Nothing is held."""

    def _try_to_write(self) -> None:
        make_folder(self._directory)
        with tempfile.NamedTemporaryFile(dir=self._directory, prefix="."):
            pass

    def _remove(self, endings: frozenset[str]) -> None:
        if endings and self._directory.exists():
            for file in self._directory.iterdir():
                if file.name.partition("-")[2] in endings:
                    file.unlink(missing_ok=True)

    def _write(self, message: EmailMessage) -> None:
        make_folder(self._directory)
        name = f"{message['Date'].datetime:%Y%m%dT%H%M%SZ}-{_file_ending(message['Message-ID'])}"
        handle, draft = tempfile.mkstemp(dir=self._directory, prefix=".")  # readable by the owner only
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_wire(message).content)
                file.flush()
                os.fsync(file.fileno())
            Path(draft).replace(self._directory / name)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise


_IDLE_SECONDS = 60.0
"""A connection that was idle for longer is not used again: servers close theirs after some minutes."""
_IDLE_CONNECTIONS = 4
_POLITE_SECONDS = 2.0
"""How long a server may take to say that an old connection still works, or to answer a good-bye."""

_CREDENTIALS_REFUSED = frozenset({530, 534, 535, 538})


class SmtpMailer:
    """Hands messages to one mail server and keeps its connections for the next ones.

    Each message has one deadline, from looking for a connection to the server's acceptance. The server's word decides:
    5xx about the recipient or the content is permanent. All else is temporary: 4xx, time-outs, a connection that
    ends (also after the content was sent: it may or may not have been accepted), and whatever is wrong between this
    server and us rather than with the message: TLS, the login, the sender. Those are logged as errors, since
    somebody has to mend them.
    """

    def __init__(self, url: str, *, starttls: bool, deadline: float) -> None:
        """`url` is smtp:// or smtps://, user and password percent-encoded; `starttls`: without it, send nothing over
        smtp://; `deadline` in seconds. The server's certificate is checked against the system's authorities."""
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._implicit_tls = parts.scheme == "smtps"
        self._starttls = starttls and not self._implicit_tls
        self._port = parts.port or (465 if self._implicit_tls else 587 if self._starttls else 25)
        self._username = unquote(parts.username) if parts.username else None
        self._password = unquote(parts.password) if parts.password else None
        self._tls = ssl.create_default_context() if self._implicit_tls or self._starttls else None
        self._deadline = deadline
        self._idle: list[tuple[aiosmtplib.SMTP, float]] = []
        self._closed = False

    async def send(self, message: EmailMessage) -> None:
        wire = _wire(message)
        connection: aiosmtplib.SMTP | None = None
        try:
            async with asyncio.timeout(self._deadline):
                connection = await self._connection()
                await self._submit(connection, wire)
        except TimeoutError as error:
            if connection is not None:
                connection.close()
            raise DeliveryError(
                f"{self._host} did not finish within {self._deadline:g} seconds.", permanent=False
            ) from error
        except asyncio.CancelledError:
            if connection is not None:
                connection.close()
            raise
        finally:
            if connection is not None:
                self._keep(connection)

    async def check(self) -> str:
        """Connect as for a message, with TLS and login as they are set, and say good-bye."""
        connection: aiosmtplib.SMTP | None = None
        try:
            async with asyncio.timeout(self._deadline):
                connection = await self._connect()
                try:
                    await connection.noop()
                    await connection.quit()
                except (aiosmtplib.SMTPException, OSError) as error:
                    raise self._unusable(error) from error
        except TimeoutError as error:
            raise DeliveryError(
                f"{self._host} did not finish within {self._deadline:g} seconds.", permanent=False
            ) from error
        finally:
            if connection is not None:
                connection.close()
        security = "TLS" if self._implicit_tls else "STARTTLS" if self._starttls else "no TLS"
        login = "logged in" if self._username else "no login"
        return f"{self._host}:{self._port} answers ({security}, {login})"

    async def forget(self, message_ids: Sequence[str]) -> None:
        """Nothing is kept: the server has what it accepted."""

    async def close(self) -> None:
        self._closed = True
        while self._idle:
            connection, _ = self._idle.pop()
            with contextlib.suppress(aiosmtplib.SMTPException, OSError):
                await connection.quit(timeout=_POLITE_SECONDS)
            connection.close()

    def _keep(self, connection: aiosmtplib.SMTP) -> None:
        if connection.is_connected and not self._closed and len(self._idle) < _IDLE_CONNECTIONS:
            self._idle.append((connection, time.monotonic()))
        else:
            connection.close()

    async def _connection(self) -> aiosmtplib.SMTP:
        """One that was kept and still answers, else a new one."""
        while self._idle:
            connection, since = self._idle.pop()
            if time.monotonic() - since < _IDLE_SECONDS and await _answers(connection):
                return connection
            connection.close()
        return await self._connect()

    async def _connect(self) -> aiosmtplib.SMTP:
        """A new one, with TLS and login as they are set."""
        connection = aiosmtplib.SMTP(
            hostname=self._host,
            port=self._port,
            username=self._username,
            password=self._password,
            use_tls=self._implicit_tls,
            start_tls=self._starttls,  # never None, which sends in clear to a server that does not offer TLS
            tls_context=self._tls,
            timeout=self._deadline,
        )
        try:
            await connection.connect()
        except (aiosmtplib.SMTPException, OSError) as error:
            raise self._unusable(error) from error
        return connection

    async def _submit(self, connection: aiosmtplib.SMTP, wire: _Wire) -> None:
        options = ["SMTPUTF8", "BODY=8BITMIME"] if wire.utf8 else []
        try:
            await connection.sendmail(wire.sender, [wire.recipient], wire.content, mail_options=options)
        except aiosmtplib.SMTPNotSupported as error:
            raise DeliveryError(
                f"{self._host} cannot send to an address with letters outside ASCII (it does not offer SMTPUTF8).",
                permanent=True,
            ) from error
        except aiosmtplib.SMTPRecipientsRefused as error:
            raise self._refused(error.recipients[0]) from error
        except aiosmtplib.SMTPResponseException as error:
            raise self._refused(error) from error
        except (aiosmtplib.SMTPException, OSError) as error:
            raise DeliveryError(
                f"The connection to {self._host} ended while the message was sent; it may have arrived.",
                permanent=False,
            ) from error

    def _refused(self, error: aiosmtplib.SMTPResponseException) -> DeliveryError:
        ours = isinstance(error, aiosmtplib.SMTPSenderRefused) or error.code in _CREDENTIALS_REFUSED
        if ours and error.code >= 500:
            self._alarm("the server refuses the sender, whoever the recipient is", error)
        return DeliveryError(self._answer(error), permanent=error.code >= 500 and not ours)

    def _unusable(self, error: Exception) -> DeliveryError:
        """No connection that a message can be given to. Never the message's fault, so never permanent."""
        if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError):
            self._alarm("TLS failed", error)
        elif isinstance(error, aiosmtplib.SMTPResponseException):
            if error.code >= 500:
                self._alarm("the server refuses the login or the connection", error)
            return DeliveryError(self._answer(error), permanent=False)
        elif not isinstance(error, OSError):
            self._alarm("the server lacks what the settings ask for", error)
        return DeliveryError(f"No connection to {self._host}: {_without_addresses(str(error))}", permanent=False)

    def _alarm(self, reason: str, error: Exception) -> None:
        detail = _without_addresses(str(error))
        _log.error("smtp.misconfigured", server=self._host, port=self._port, reason=reason, detail=detail)

    def _answer(self, error: aiosmtplib.SMTPResponseException) -> str:
        return f"{self._host} answered {error.code} {_without_addresses(error.message)}"


async def _answers(connection: aiosmtplib.SMTP) -> bool:
    try:
        await connection.rset(timeout=_POLITE_SECONDS)
    except (aiosmtplib.SMTPException, OSError):
        return False
    except asyncio.CancelledError:
        connection.close()
        raise
    return True


def _without_addresses(text: str) -> str:
    """A server's words, fit to be kept and logged: servers like to repeat the recipient."""
    return re.sub(r"[^\s<>]+@[^\s<>]+", "[address]", str(_single_line(text)))[:300]
