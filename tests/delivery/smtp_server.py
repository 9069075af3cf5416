"""A real mail server on loopback that misbehaves on request: what the world's servers do, on demand.

`SmtpServer` runs aiosmtpd in a thread of its own, so it serves tests, event loops and other processes alike. What it
accepted is in `messages`; the rest of its attributes can be changed between two messages.
"""

import asyncio
import ipaddress
import ssl
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import MISSING, SMTP, AuthResult, Envelope, LoginPassword, Session
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Accepted:
    """One message that the server took."""

    mail_from: str
    recipient: str
    content: bytes

    @property
    def message(self) -> EmailMessage:
        return message_from_bytes(self.content, policy=default)


@dataclass
class SmtpServer:
    """`with SmtpServer() as server:` listens at `server.url`. Stopped and started again, it keeps its port.

    An answer is what the server says, such as "550 5.1.1 No such user"; None is what it says when all is well.
    """

    answer_recipient: Callable[[str], str | None] = lambda address: None
    answer_sender: str | None = None
    answer_data: str | None = None
    """The answer to the whole content, which is then not accepted."""
    drop_after_data: bool = False
    """Take the whole content, keep it, and end the connection without a word."""
    stall_at: str | None = None
    """A command (EHLO, MAIL, RCPT, DATA, RSET) that is never answered; `stalled` is set when it came."""
    delay: float = 0
    """Seconds before each answer."""
    login: tuple[str, str] | None = None
    """The user and password without which nothing is accepted."""
    tls: ssl.SSLContext | None = None
    """Offers STARTTLS with it, or with `implicit_tls` speaks TLS from the start."""
    implicit_tls: bool = False
    smtputf8: bool = True

    port: int = 0
    stalled: threading.Event = field(default_factory=threading.Event)
    messages: list[Accepted] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    """EHLO, MAIL, RCPT, DATA, RSET and QUIT, as they came."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"{'smtps' if self.implicit_tls else 'smtp'}://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many times a client said EHLO: once a connection, twice with STARTTLS."""
        return self.commands.count("EHLO")

    def start(self) -> None:
        self._controller = _Controller(self)
        self._controller.start()
        self.port = self._controller.port

    def stop(self) -> None:
        """End the server and every connection to it, as a machine does that goes away."""
        self._controller.hang_up()
        self._controller.stop()

    def hang_up(self) -> None:
        """End every connection and go on listening, as a server does with clients that were idle for long."""
        self._controller.hang_up()


class _Controller(Controller):
    def __init__(self, server: SmtpServer) -> None:
        self._settings = server
        self._transports: set[asyncio.BaseTransport] = set()
        super().__init__(
            _Handler(server),
            hostname="127.0.0.1",
            port=server.port,
            ssl_context=server.tls if server.implicit_tls else None,
        )

    def factory(self) -> SMTP:
        server = self._settings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that logging in without TLS is unwise
            return _Protocol(
                self._transports,
                self.handler,
                loop=self.loop,
                hostname="mail.test",
                enable_SMTPUTF8=server.smtputf8,
                tls_context=None if server.implicit_tls else server.tls,
                auth_required=server.login is not None,
                auth_require_tls=False,
                authenticator=self._authenticate,
            )

    def hang_up(self) -> None:
        async def end() -> None:
            while self._transports:
                for transport in list(self._transports):
                    transport.abort()  # type: ignore[attr-defined]
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result()

    def _trigger_server(self) -> None:
        assert self.server is not None
        self.port = self.server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        super()._trigger_server()  # type: ignore[no-untyped-call]

    def _authenticate(
        self, smtp: SMTP, session: Session, envelope: Envelope, mechanism: str, given: LoginPassword
    ) -> AuthResult:
        accepted = (given.login.decode(), given.password.decode()) == self._settings.login
        return AuthResult(success=accepted, handled=False)


class _Protocol(SMTP):
    """Remembers the connections, so that they can be ended."""

    def __init__(self, transports: set[asyncio.BaseTransport], *arguments: Any, **options: Any) -> None:
        self._transports = transports
        super().__init__(*arguments, **options)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transports.add(transport)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._transports -= {self.transport, self._original_transport}
        super().connection_lost(error)


class _Handler:
    """aiosmtpd's hooks: note the command, stall if told to, and say what the server was told to say."""

    def __init__(self, server: SmtpServer) -> None:
        self._server = server

    async def _note(self, command: str) -> None:
        self._server.commands.append(command)
        if self._server.stall_at == command:
            self._server.stalled.set()
            await asyncio.Event().wait()  # ends with the connection, which cancels this
        await asyncio.sleep(self._server.delay)

    async def handle_EHLO(  # noqa: N802
        self, smtp: SMTP, session: Session, envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        await self._note("EHLO")
        session.host_name = hostname
        return responses

    async def handle_MAIL(  # noqa: N802
        self, smtp: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> Any:
        await self._note("MAIL")
        if self._server.answer_sender:
            return self._server.answer_sender
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(  # noqa: N802
        self, smtp: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> Any:
        await self._note("RCPT")
        answer = self._server.answer_recipient(address)
        if answer:
            return answer
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, smtp: SMTP, session: Session, envelope: Envelope) -> Any:  # noqa: N802
        await self._note("DATA")
        if self._server.answer_data:
            return self._server.answer_data
        assert isinstance(envelope.content, bytes)
        assert envelope.mail_from is not None
        (recipient,) = envelope.rcpt_tos
        self._server.messages.append(
            Accepted(mail_from=envelope.mail_from, recipient=recipient, content=envelope.content)
        )
        if self._server.drop_after_data:
            smtp.transport.abort()  # type: ignore[union-attr]
            await asyncio.Event().wait()
        return "250 OK"

    async def handle_RSET(self, smtp: SMTP, session: Session, envelope: Envelope) -> Any:  # noqa: N802
        await self._note("RSET")
        return MISSING

    async def handle_QUIT(self, smtp: SMTP, session: Session, envelope: Envelope) -> Any:  # noqa: N802
        await self._note("QUIT")
        return MISSING


def self_made_certificate(directory: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's TLS context for 127.0.0.1, and the file of the certificate that a client may trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    trusted, private = directory / "certificate.pem", directory / "key.pem"
    trusted.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusted, private)
    return context, trusted
