"""One log, on standard error: structured, and without anything secret or personal.

`configure` is called once by each process. From then on Sunset's own events and those of the libraries
(uvicorn, tortoise, asyncio, ...) take the same way: fields bound with `structlog.contextvars`
(`request_id`, `account_id`, `operation`) are merged in, exceptions become text, and everything passes
`redacted` before it is written. That is the last line of defense and no license to log secrets: what is
logged are ids, codes and counts.

This module must not know what is logged, by whom or why; it knows no settings, only their two values.
"""

import logging
import re
import sys
from collections.abc import Mapping
from datetime import date, datetime
from functools import lru_cache
from typing import Final, Literal, TextIO
from uuid import UUID

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_REDACTED: Final = "[redacted]"
_MAX_DEPTH: Final = 8
"""Deeper nesting is cut off; it also ends what contains itself."""

_SENSITIVE: Final = r"authorization|token|secret|passw(?:or)?d|cookie|credential|api[_-]?key|private[_-]?key"
_SENSITIVE_KEY: Final = re.compile(_SENSITIVE, re.IGNORECASE)

_LOCAL: Final = r"[^\s@%<>()\[\]\",:;\\]"
"""What the part of an address before the @ is made of, as far as it is not quoted."""

# In the order in which they are applied. Each is made to search any text in a time that grows with its length only.
_PATTERNS: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    # user:password@ in a URL, up to the last @ before its path
    (
        re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]{0,30}://)[^\s/?#\"'<>]{1,512}@", re.IGNORECASE),
        rf"\g<scheme>{_REDACTED}@",
    ),
    (re.compile(r"\b(?P<kind>bearer)[ \t]+[^\s\"',;]+", re.IGNORECASE), rf"\g<kind> {_REDACTED}"),
    # a JSON Web Token, whole or cut short: base64url of { followed by " or white space
    (re.compile(r"\be[wy][A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?"), _REDACTED),
    # name=value and "name": "value", as in query strings, headers and the text of exceptions
    (
        re.compile(
            rf"(?P<name>(?:{_SENSITIVE})[\w-]{{0,40}}[\"']?[ \t]{{0,8}}[=:][ \t]{{0,8}})"
            r"(?:b?\"[^\"\n]*\"|b?'[^'\n]*'|[^\s\"'&,;)\]}]+)",
            re.IGNORECASE,
        ),
        rf"\g<name>{_REDACTED}",
    ),
    # what PostgreSQL says of the row that it refuses: its values
    (re.compile(r"\bDETAIL:[^\n]*"), f"DETAIL: {_REDACTED}"),
    # an email address, also percent-encoded, quoted, or at a host without dots
    (
        re.compile(rf"(?:\"[^\"\n]{{1,64}}\"|(?<!{_LOCAL}){_LOCAL}++)(?:@|%40)[^\s<>()\[\]\"',:;\\/&?|]{{1,255}}"),
        "[address]",
    ),
)


def configure(*, format: Literal["json", "text"], level: str, stream: TextIO | None = None) -> None:  # noqa: A002
    """Sends every log event of this process to `stream` (default: standard error), redacted.

    `level` is debug, info, warning or error; libraries are never heard below info. Handlers that libraries or an
    earlier call installed are removed; uvicorn must be started with `log_config=None`, or it puts its own back.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]
    output = stream or sys.stderr
    renderer: Processor
    if format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        # Exceptions are text by now. The formatters that show local variables are not for what holds secrets.
        renderer = structlog.dev.ConsoleRenderer(
            colors=output.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_level=False
        )
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _redact, renderer],
        )
    )
    for name in list(logging.root.manager.loggerDict):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    logging.root.handlers[:] = [handler]
    # What libraries tell at debug level is the data that they handle: statements with their values, whole requests.
    logging.root.setLevel(max(logging.INFO, logging.getLevelNamesMapping()[level.upper()]))
    logging.getLogger("app").setLevel(level.upper())
    # Transitions are logged at every level: after a restore of the database they are all that tells what it lacks.
    logging.getLogger("app.history").setLevel(logging.INFO)
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def redacted(text: str) -> str:
    """`text` without bearer and JSON Web Tokens, named secrets, credentials in URLs, the details of refused rows,
    and email addresses.

    Rather hides too much than too little. A secret that nothing marks as one cannot be told from other text.
    """
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _redact(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    event.pop("color_message", None)  # uvicorn says its messages twice
    return dict(_field(key, value) for key, value in event.items())


def _field(key: str, value: object, depth: int = 0) -> tuple[str, object]:
    shown, is_sensitive = _name(key)
    return shown, _REDACTED if is_sensitive else _plain(value, depth)


@lru_cache(maxsize=1024)
def _name(key: str) -> tuple[str, bool]:
    """How a field's name is shown, and whether it names a secret. Remembered: every line has the same few names."""
    return redacted(key), _SENSITIVE_KEY.search(key) is not None


def _plain(value: object, depth: int = 0) -> object:
    """`value` made of JSON's types alone, every text in it redacted: no object is left that a renderer would print."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, UUID | date | datetime):
        return str(value)
    if isinstance(value, bytes | bytearray):
        return redacted(value.decode(errors="replace"))
    if isinstance(value, Mapping | list | tuple | set | frozenset) and depth >= _MAX_DEPTH:
        return "..."
    if isinstance(value, Mapping):
        return dict(_field(str(key), item, depth + 1) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in value]
    return redacted(value if isinstance(value, str) else repr(value))
