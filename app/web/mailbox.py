"""The development mailbox: a page that shows the .eml files of a folder, newest first.

It reads the folder that `app.delivery.email.FolderMailer` writes and knows nothing else: no database, no settings,
no session. Whoever can reach it reads every email in it, so it is served in development alone. What an email
contains is foreign: it is shown as escaped text, or in a sandboxed frame in which nothing runs and nothing loads.
"""

from dataclasses import dataclass
from datetime import datetime
from email import message_from_bytes
from email.message import EmailMessage
from email.parser import BytesHeaderParser
from email.policy import default
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

_SHOWN = 200
_HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}
_PAGE_POLICY = (
    "default-src 'none'; style-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_EMAIL_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'; "
    "sandbox allow-popups allow-popups-to-escape-sandbox"
)

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A message in the list: what its headers say."""

    name: str
    subject: str
    sender: str
    recipient: str
    date: datetime | None


def routes(directory: Path) -> list[Route]:
    """The pages under /mailbox for the .eml files in `directory`, which need not exist yet."""

    def listing(request: Request) -> HTMLResponse:
        return _page(directory, None, as_text=False)

    def message(request: Request) -> HTMLResponse:
        file = _find(directory, request.path_params["name"])
        return _page(directory, file, as_text=request.query_params.get("as") == "text")

    def html_part(request: Request) -> HTMLResponse:
        part = _read(_find(directory, request.path_params["name"])).get_body(("html",))
        if not isinstance(part, EmailMessage):
            raise HTTPException(404, "This message has no HTML part.")
        # Links of the email open in a tab of their own: the frame itself must not leave this page.
        content = str(part.get_content()).replace("<head>", '<head><base target="_blank">', 1)
        return HTMLResponse(content, headers={**_HEADERS, "Content-Security-Policy": _EMAIL_POLICY})

    return [
        Route("/mailbox", listing, methods=["GET"]),
        Route("/mailbox/{name}", message, methods=["GET"]),
        Route("/mailbox/{name}/html", html_part, methods=["GET"]),
    ]


def _page(directory: Path, file: Path | None, *, as_text: bool) -> HTMLResponse:
    files = _files(directory)
    selected = None if file is None else _read(file)
    html = selected is not None and selected.get_body(("html",)) is not None
    plain = None if selected is None else selected.get_body(("plain",))
    content = _templates.get_template("mailbox.html").render(
        entries=[_entry(listed) for listed in files[:_SHOWN]],
        total=len(files),
        directory=str(directory),
        selected=None if file is None else _entry(file),
        as_text=as_text or not html,
        html=html,
        text=str(plain.get_content()) if isinstance(plain, EmailMessage) else "",
    )
    return HTMLResponse(content, headers={**_HEADERS, "Content-Security-Policy": _PAGE_POLICY})


def _files(directory: Path) -> list[Path]:
    """Newest first: the mailer's names begin with the time. Links to files elsewhere are not followed."""
    return sorted(
        (file for file in directory.glob("*.eml") if file.is_file() and not file.is_symlink()),
        key=lambda file: file.name,
        reverse=True,
    )


def _find(directory: Path, name: str) -> Path:
    """The listed file of that name. What is asked for never becomes part of a path, so it cannot lead elsewhere."""
    for file in _files(directory):
        if file.name == name:
            return file
    raise HTTPException(404, "No such message.")


def _read(file: Path) -> EmailMessage:
    return message_from_bytes(file.read_bytes(), policy=default)


def _entry(file: Path) -> _Entry:
    with file.open("rb") as stream:
        headers = BytesHeaderParser(policy=default).parse(stream)
    return _Entry(
        name=file.name,
        subject=_text(headers["Subject"]) or "(no subject)",
        sender=_text(headers["From"]),
        recipient=_text(headers["To"]),
        date=getattr(headers["Date"], "datetime", None),
    )


def _text(header: object) -> str:
    """The parser leaves UTF-8 in a header, as an internationalized address has it, as single undecoded bytes."""
    return str(header or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
