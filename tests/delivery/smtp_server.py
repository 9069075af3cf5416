"""A real mail server on loopback that misbehaves on request: what the world's servers do, on demand.

`SmtpServer` runs aiosmtpd in a thread of its own, so it serves tests, event loops and other processes alike. What it
accepted is in `messages`; the rest of its attributes can be changed between two messages.
"""

import ipaddress
import socket
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
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Answer = str | None
"""What the server says, such as "550 5.1.1 No such user"; None for what it says when all is well."""


@dataclass(frozen=True)
class Accepted:
    """One message that the server took."""

    mail_from: str
    recipients: list[str]
    content: bytes

    @property
    def message(self) -> EmailMessage:
        return message_from_bytes(self.content, policy=default)


@dataclass
class SmtpServer:
    """`with SmtpServer() as server:` listens at `server.url`. Stopping and starting it again keeps the port."""

    answer_recipient: Callable[[str], Answer] = lambda address: None
    """The answer to each RCPT."""
    answer_sender: Answer = None
    answer_data: Answer = None
    """The answer to the content; the message is then not accepted."""
    drop_after_data: bool = False
    """Take the whole content, keep it, and end the connection without a word."""
    stall_at: str | None = None
    """A command (MAIL, RCPT, DATA, RSET) that is never answered, until `release` or the server's end."""
    login: tuple[str, str] | None = None
    """The user and password without which nothing is accepted."""
    tls: ssl.SSLContext | None = None
    """Offers STARTTLS, or with `implicit_tls` speaks TLS from the start."""
    implicit_tls: bool = False
    smtputf8: bool = True
    port: int = 0

    messages: list[Accepted] = field(default_factory=list)
    connections: int = 0
    """How many connections got as far as EHLO."""
    commands: list[str] = field(default_factory=list)
    """MAIL, RCPT, DATA, RSET and QUIT, as they came."""

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

    def start(self) -> None:
        if not self.port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        self._released = threading.Event()
        self._controller = _Controller(self)
        self._controller.start()
        self.connections = 0
        self.commands.clear()

    def stop(self) -> None:
        """End it and every connection to it."""
        self._released.set()
        self._controller.stop()

    def release(self) -> None:
        """Answer what was stalled, and stall no more."""
        self.stall_at = None
        self._released.set()


class _Controller(Controller):
    def __init__(self, server: SmtpServer) -> None:
        self._sunset = server
        super().__init__(
            _Handler(server),
            hostname="127.0.0.1",
            port=server.port,
            ssl_context=server.tls if server.implicit_tls else None,
        )

    def factory(self) -> SMTP:
        server = self._sunset
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that logging in without TLS is unwise
            return _Protocol(
                self.handler,
                loop=self.loop,
                hostname="mail.test",
                enable_SMTPUTF8=server.smtputf8,
                tls_context=None if server.implicit_tls else server.tls,
                auth_required=server.login is not None,
                auth_require_tls=False,
                authenticator=self._authenticate,
            )

    def _authenticate(
        self, smtp: SMTP, session: Session, envelope: Envelope, mechanism: str, auth_data: LoginPassword
    ) -> AuthResult:
        given = (auth_data.login.decode(), auth_data.password.decode())
        return AuthResult(success=given == self._sunset.login, handled=False)


class _Protocol(SMTP):
    """Ends its connections with the server, so that a client sees a server that went away."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)


class _Handler:
    """aiosmtpd's hooks. A hook that has nothing to say lets the server go on as usual."""

    def __init__(self, server: SmtpServer) -> None:
        self._server = server

    async def handle_EHLO(
        self, smtp: SMTP, session: Session, envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        session.host_name = hostname
        self._server.connections += 1
        return responses
