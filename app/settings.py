"""What the operator decides: every setting, read once from the environment, checked, then frozen.

The one door is `Settings.load(environ)`. It either answers settings that fit together or raises one
`SettingsError` that lists every problem, each with the variable's name and what to do about it.
A value is read from `SUNSET_<NAME>` or from the file that `SUNSET_<NAME>_FILE` names (for secrets that
an orchestrator mounts). An empty value counts as not set. A `SUNSET_*` variable that does not exist is
refused, since a mistyped name would otherwise silently mean the default.

Knows the standard library only, and nothing of what the settings are used for: no database, no network.
All that it ever writes is the development installation's secret key, and folders.
"""

import difflib
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from email.utils import getaddresses
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal
from urllib.parse import SplitResult, urlsplit

PREFIX: Final = "SUNSET_"
_FILE_SUFFIX: Final = "_FILE"
_HIDDEN: Final = "********"

_SECRET_BYTES: Final = 32
"""The least length of the secret key: 256 bits when it is random."""
_SECRET_DISTINCT: Final = 10
"""The least number of different characters in it; 64 random hexadecimal digits have all 16."""


class SettingsError(Exception):
    """The settings cannot be used. `problems` has one sentence for each, naming its variable; no secret is in them."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class _Unusable(ValueError):
    """A value is refused; the text completes the sentence "SUNSET_X must be ..."."""


@dataclass(frozen=True, kw_only=True)
class Documentation:
    """One setting as people read about it."""

    variable: str
    default: str
    """The default's value, or in words how it comes about."""
    example: str
    description: str
    secret: bool


# --- How values are read: each parser takes the text and answers the value or raises _Unusable -------------------


def _text(value: str) -> str:
    if not value.isprintable():
        raise _Unusable("text on a single line")
    return value


def _boolean(value: str) -> bool:
    word = value.lower()
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise _Unusable("true or false")


def _integer(value: str, *, least: int, most: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise _Unusable(f"a whole number from {least} to {most}")
    return number


def _choice(value: str, *, of: tuple[str, ...]) -> str:
    word = value.lower()
    if word not in of:
        raise _Unusable(" or ".join(of))
    return word


def _path(value: str) -> Path:
    return Path(_text(value)).expanduser().absolute()


def _readable_file(value: str) -> Path:
    path = _path(value)
    if not path.is_file():
        raise _Unusable("the path of a file that exists")
    return path


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address, without port or brackets) can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split(value: str, *, what: str, schemes: tuple[str, ...], needs_host: bool = True) -> SplitResult:
    """`value` as a URL of one of `schemes`, with every part readable; else refused as not being `what`."""
    try:
        parts = urlsplit(_text(value))
        readable = parts.port != 0  # reading the port is what raises for a bad one
    except ValueError:
        raise _Unusable(what) from None
    if not readable or parts.scheme not in schemes or (needs_host and (not parts.hostname or " " in value)):
        raise _Unusable(what)
    return parts


def _database_url(value: str) -> str:
    what = "sqlite:///absolute/path/to/file.db or postgres://user:password@host:port/database"
    parts = _split(value, what=what, schemes=("sqlite", "postgres", "postgresql"), needs_host=False)
    if len(parts.path) < 2 or (parts.scheme == "sqlite" and (parts.netloc or parts.query)):
        raise _Unusable(what)
    return value


def _page_url(value: str) -> str:
    """A web address that a path or a query can be added to. The trailing slash goes, so that joining is plain."""
    what = "a web address such as https://cancel.example.com, without user, query or fragment"
    parts = _split(value, what=what, schemes=("http", "https"))
    if parts.username is not None or parts.query or parts.fragment:
        raise _Unusable(what)
    return value.rstrip("/")


def _identity_url(value: str) -> str:
    """An address at the identity provider. Kept letter for letter: issuers are compared as text."""
    what = "an https:// address (http:// is for localhost alone), without user or fragment"
    parts = _split(value, what=what, schemes=("http", "https"))
    if (
        parts.username is not None
        or parts.fragment
        or (parts.scheme == "http" and not is_loopback(parts.hostname or ""))
    ):
        raise _Unusable(what)
    return value


def _smtp_url(value: str) -> str:
    what = "smtp://user:password@host:port or smtps://user:password@host:port"
    parts = _split(value, what=what, schemes=("smtp", "smtps"))
    if parts.path not in ("", "/") or parts.query or parts.fragment or (parts.password and not parts.username):
        raise _Unusable(what)
    return value


def _mail_address(value: str) -> str:
    listed = getaddresses([_text(value)])
    local, _, domain = listed[0][1].rpartition("@")
    if len(listed) != 1 or not (local and domain) or " " in local + domain:
        raise _Unusable("one address, such as Sunset <no-reply@example.com>")
    return value


def _secret(value: str) -> str:
    if len(value.encode(errors="replace")) < _SECRET_BYTES or len(set(value)) < _SECRET_DISTINCT:
        raise _Unusable(f"at least {_SECRET_BYTES} random bytes; `openssl rand -hex 32` prints a good one")
    return value


def _metrics_token(value: str) -> str:
    if len(value) < 16 or not value.isascii() or not value.isprintable() or " " in value:
        raise _Unusable("at least 16 printable ASCII characters without spaces")
    return value


def _webhook_allow(value: str) -> str:
    """Hosts, addresses and networks, checked and kept as they are written."""
    for one in (part.strip() for part in _text(value).split(",")):
        try:
            ipaddress.ip_network(one)
        except ValueError:
            numeric = not one.strip("0123456789./:")  # a network that is none, and no name either
            if numeric or not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?", one):
                raise _Unusable(
                    "hosts, addresses and networks, separated by commas, such as hooks.internal,10.1.0.0/16"
                ) from None
    return value


# --- Defaults that depend on other settings: each is given those read before it --------------------------------------

_Default = str | Callable[[Mapping[str, Any]], str]


def _in_development(values: Mapping[str, Any]) -> str:
    return "true" if values["environment"] == "development" else "false"


def _default_database_url(values: Mapping[str, Any]) -> str:
    return f"sqlite:///{str(values['data_dir'] / 'sunset.db').lstrip('/')}"


def _default_public_url(values: Mapping[str, Any]) -> str:
    host = values["host"]
    if host in ("0.0.0.0", "::"):  # noqa: S104 -- every interface is no address that a link can name
        host = "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{values['port']}"


def _default_mail_from(values: Mapping[str, Any]) -> str:
    host = urlsplit(values["public_url"]).hostname or "localhost"
    return f"Sunset <no-reply@{'localhost' if is_loopback(host) else host}>"


def _default_starttls(values: Mapping[str, Any]) -> str:
    return "off" if values["smtp_url"] and is_loopback(urlsplit(values["smtp_url"]).hostname or "") else "required"


def _default_clock(values: Mapping[str, Any]) -> str:
    return "development" if values["environment"] == "development" else "system"


def _default_webhook_allow(values: Mapping[str, Any]) -> str:
    return "localhost,127.0.0.0/8,::1" if values["environment"] == "development" else ""


def _default_connections_per_address(values: Mapping[str, Any]) -> str:
    """All that a process has room for, behind a proxy that has one address: streams, and some requests beside them."""
    return str((values["streams"] or 0) + 500)


def _default_log_format(_: Mapping[str, Any]) -> str:
    return "text" if sys.stderr.isatty() else "json"


def _setting(
    description: str,
    *,
    default: _Default,
    example: str,
    parse: Callable[[str], Any] = _text,
    default_in_words: str = "",
    secret: bool = False,
) -> Mapping[str, Any]:
    """The metadata of one setting's field. `default` is text, parsed like any value; "" means none."""
    return {
        "description": description,
        "default": default,
        "default_in_words": default_in_words,
        "example": example,
        "parse": parse,
        "secret": secret,
    }


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """The settings in force. Made by `Settings.load` alone, so every value has been checked against the others."""

    environment: Literal["development", "production"] = field(
        metadata=_setting(
            "`production` refuses everything that is only safe on a developer's machine and requires the secrets.",
            default="development",
            example="production",
            parse=partial(_choice, of=("development", "production")),
        )
    )
    development_on_network: bool = field(
        metadata=_setting(
            "Development with a SUNSET_HOST that others can reach, an https SUNSET_PUBLIC_URL or a SUNSET_OIDC_ISSUER, "
            "which are refused without it: they look like production with SUNSET_ENVIRONMENT forgotten. Whoever "
            "reaches such a server can do everything. Refused in production.",
            default="false",
            example="false",
            parse=_boolean,
        )
    )
    host: str = field(
        metadata=_setting("The address that the server listens on.", default="127.0.0.1", example="0.0.0.0")  # noqa: S104
    )
    port: int = field(
        metadata=_setting(
            "The port that the server listens on.",
            default="8000",
            example="8080",
            parse=partial(_integer, least=1, most=65535),
        )
    )
    data_dir: Path = field(
        metadata=_setting(
            "The folder for what Sunset keeps itself: the SQLite file, the development key, the mailbox, and what was "
            "last seen in the database.",
            default="./var",
            example="/var/lib/sunset",
            parse=_path,
        )
    )
    database_url: str = field(
        metadata=_setting(
            "The database: a SQLite file by absolute path, or PostgreSQL.",
            default=_default_database_url,
            default_in_words="the SQLite file `sunset.db` in the data folder",
            example="postgres://sunset:password@db.internal:5432/sunset",
            parse=_database_url,
        )
    )
    database_pool_size: int = field(
        metadata=_setting(
            "The most connections that one process opens to PostgreSQL.",
            default="10",
            example="20",
            parse=partial(_integer, least=1, most=1000),
        )
    )
    public_url: str = field(
        metadata=_setting(
            "The address under which people reach this server; emailed links begin with it. "
            "Required in production, there with https:// unless it is localhost.",
            default=_default_public_url,
            default_in_words="`http://HOST:PORT`",
            example="https://cancel.example.com",
            parse=_page_url,
        )
    )
    clock: Literal["system", "development"] = field(
        metadata=_setting(
            "`system`: the database's clock. `development`: a clock that `sunset clock advance` moves ahead for the "
            "whole installation, to play weeks in a minute; the same for all processes. Refused in production.",
            default=_default_clock,
            default_in_words="`development` in development, else `system`",
            example="system",
            parse=partial(_choice, of=("system", "development")),
        )
    )
    policy_file: Path | None = field(
        metadata=_setting(
            "The TOML file with plans, windows, offers and contacts.",
            default="",
            default_in_words="the policy that is shipped",
            example="/etc/sunset/policy.toml",
            parse=_readable_file,
        )
    )
    secret_key: str = field(
        metadata=_setting(
            "The secret that signs emailed links and confirmation tokens: at least 32 random bytes, the same for all "
            "processes. Changing it makes the links sent before useless. Required in production.",
            default="",
            default_in_words="made once and kept in the data folder (development)",
            example="the output of `openssl rand -hex 32`",
            parse=_secret,
            secret=True,
        )
    )
    oidc_issuer: str = field(
        metadata=_setting(
            "The identity provider's issuer, letter for letter as in its tokens (`iss`). Required in production.",
            default="",
            default_in_words="none",
            example="https://id.example.com/",
            parse=_identity_url,
        )
    )
    oidc_audience: str = field(
        metadata=_setting(
            "The audience (`aud`) that a token must be issued for. Required with an issuer.",
            default="",
            default_in_words="none",
            example="https://cancel.example.com/graphql",
        )
    )
    oidc_jwks_url: str = field(
        metadata=_setting(
            "Where the identity provider publishes its keys.",
            default="",
            default_in_words="found by OpenID discovery at the issuer",
            example="https://id.example.com/.well-known/jwks.json",
            parse=_identity_url,
        )
    )
    development_issuer: bool = field(
        metadata=_setting(
            "Accept the tokens that `sunset token` mints. Refused in production.",
            default=_in_development,
            default_in_words="`true` in development",
            example="false",
            parse=_boolean,
        )
    )
    smtp_url: str = field(
        metadata=_setting(
            "The mail server, with user and password percent-encoded; smtps:// is TLS from the start. "
            "Required in production.",
            default="",
            default_in_words="none: emails become .eml files in `mailbox` in the data folder",
            example="smtp://sunset:password@mail.example.com:587",
            parse=_smtp_url,
        )
    )
    smtp_starttls: Literal["required", "off"] = field(
        metadata=_setting(
            "Whether an smtp:// connection must turn to TLS before anything is sent. `off` is for localhost alone.",
            default=_default_starttls,
            default_in_words="`required`; `off` when the mail server is localhost",
            example="required",
            parse=partial(_choice, of=("required", "off")),
        )
    )
    smtp_timeout: int = field(
        metadata=_setting(
            "Seconds that handing one message to the mail server may take.",
            default="30",
            example="10",
            parse=partial(_integer, least=1, most=240),  # less than an outbox lease
        )
    )
    mail_from: str = field(
        metadata=_setting(
            "The sender of every email.",
            default=_default_mail_from,
            default_in_words="`Sunset <no-reply@...>` at the host of the public URL",
            example="Example Billing <billing@example.com>",
            parse=_mail_address,
        )
    )
    link_url: str = field(
        metadata=_setting(
            "The host product's own page that emailed links open instead of Sunset's; https:// in production.",
            default="",
            default_in_words="Sunset's own pages",
            example="https://app.example.com/cancellation",
            parse=_page_url,
        )
    )
    graphiql: bool = field(
        metadata=_setting(
            "Serve the GraphiQL explorer at `/graphiql`.",
            default=_in_development,
            default_in_words="`true` in development",
            example="true",
            parse=_boolean,
        )
    )
    mailbox: bool = field(
        metadata=_setting(
            "Serve the page `/mailbox` that shows the .eml files to anyone who asks. Refused in production.",
            default=_in_development,
            default_in_words="`true` in development",
            example="false",
            parse=_boolean,
        )
    )
    log_format: Literal["json", "text"] = field(
        metadata=_setting(
            "One JSON object per line, or lines for people.",
            default=_default_log_format,
            default_in_words="`text` on a terminal, else `json`",
            example="json",
            parse=partial(_choice, of=("json", "text")),
        )
    )
    log_level: Literal["debug", "info", "warning", "error"] = field(
        metadata=_setting(
            "The least severity that is logged: debug, info, warning or error.",
            default="info",
            example="warning",
            parse=partial(_choice, of=("debug", "info", "warning", "error")),
        )
    )
    worker: bool = field(
        metadata=_setting(
            "Run the worker (emails, what is due) inside `sunset serve`; false when `sunset worker` runs beside it.",
            default="true",
            example="false",
            parse=_boolean,
        )
    )
    worker_concurrency: int = field(
        metadata=_setting(
            "Deliveries that one worker has under way at a time.",
            default="4",
            example="16",
            parse=partial(_integer, least=1, most=64),
        )
    )
    webhook_allow: str = field(
        metadata=_setting(
            "Receivers of webhooks that need not be public or https: hosts, addresses and networks, separated by "
            "commas. Everything else that is private is refused.",
            default=_default_webhook_allow,
            default_in_words="none; this machine in development",
            example="hooks.internal,10.1.0.0/16",
            parse=_webhook_allow,
        )
    )
    request_timeout: int = field(
        metadata=_setting(
            "Seconds after which a request that waits for the database is answered with 503.",
            default="10",
            example="5",
            parse=partial(_integer, least=1, most=300),
        )
    )
    streams: int = field(
        metadata=_setting(
            "How many subscriptions one process holds open at a time, and how many WebSockets; one caller has a "
            "hundredth of either at most. Each connection also needs a file descriptor.",
            default="20000",
            example="1000",
            parse=partial(_integer, least=1, most=1_000_000),
        )
    )
    connections_per_address: int = field(
        metadata=_setting(
            "How many connections one process takes from one address (of IPv6: from one /64) at a time; more are "
            "answered with 503 and closed. 0: no limit. A proxy is one address, for all its clients.",
            default=_default_connections_per_address,
            default_in_words="`SUNSET_STREAMS` + 500: as many as a proxy may need",
            example="100",
            parse=partial(_integer, least=0, most=1_000_000),
        )
    )
    rate_limit_caller: int = field(
        metadata=_setting(
            "How many of the mutations that change a cancellation one caller, or whoever has one emailed link, may "
            "send in a minute; 0: no limit. Only who may do it is counted; all processes count together.",
            default="60",
            example="30",
            parse=partial(_integer, least=0, most=100_000),
        )
    )
    rate_limit_account: int = field(
        metadata=_setting(
            "How many of them may be sent about one account in a minute by its members together, and as many by its "
            "Customer Success Manager, by the billing team, and with its links of each kind; 0: no limit.",
            default="120",
            example="60",
            parse=partial(_integer, least=0, most=100_000),
        )
    )
    rate_limit_documents: int = field(
        metadata=_setting(
            "How many documents that are new to a process one caller may send it in a minute, each counted once for "
            "every 1,000 characters; 0: no limit. What a process has read before is not counted, unless it "
            "asks for `__schema` or `__type`.",
            default="120",
            example="60",
            parse=partial(_integer, least=0, most=100_000),
        )
    )
    metrics_token: str = field(
        metadata=_setting(
            "The bearer token that Prometheus sends for `/metrics` and `/readyz?deep`. Without one, they answer in "
            "development alone, to local names.",
            default="",
            default_in_words="none",
            example="the output of `openssl rand -hex 24`",
            parse=_metrics_token,
            secret=True,
        )
    )
    worker_port: int = field(
        metadata=_setting(
            "The port on which `sunset worker` serves `/metrics`, `/livez` and `/readyz`, at SUNSET_HOST; 0: it serves "
            "none.",
            default="0",
            example="9100",
            parse=partial(_integer, least=0, most=65535),
        )
    )
    otlp_endpoint: str = field(
        metadata=_setting(
            "Where traces are sent, as OTLP over HTTP; Sunset adds `/v1/traces`.",
            default="",
            default_in_words="none: nothing is traced",
            example="http://localhost:4318",
            parse=_page_url,
        )
    )
    grace_seconds: int = field(
        metadata=_setting(
            "Seconds that running requests and deliveries get to finish when the process is told to stop.",
            default="10",
            example="25",
            parse=partial(_integer, least=0, most=600),
        )
    )
    demo: bool = field(
        metadata=_setting(
            "Make the demo company when the database is new. Refused in production.",
            default=_in_development,
            default_in_words="`true` in development",
            example="false",
            parse=_boolean,
        )
    )
    sources: Mapping[str, str] = field(compare=False)
    """For each field's name where its value came from: `default`, `environment` or `file`."""

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> "Settings":
        """The settings that `environ` asks for.

        A command that takes an option in a setting's place passes `{**os.environ, "SUNSET_PORT": ...}`, so that
        what derives from it follows. Raises SettingsError with every problem found. Writes nothing.
        """
        problems = _unknown_variables(environ)
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        unusable: set[str] = set()
        for setting in _declared():
            values[setting.name], sources[setting.name] = _value_of(setting, environ, values, problems, unusable)
        # What is compared with other settings waits until each is right by itself: no problem is then told twice.
        problems += _disagreements(values, sources, unusable)
        if problems:
            raise SettingsError(problems)
        return cls(sources=MappingProxyType(sources), **values)

    def describe(self) -> list[tuple[str, str, str]]:
        """(variable, value, source) of every setting in force, in the order of the documentation.

        Secrets are hidden whole, passwords inside URLs in part; nothing shown is of use to a stranger.
        """
        return [
            (
                _variable(setting.name),
                self._shown(setting.name, secret=setting.metadata["secret"]),
                self.sources[setting.name],
            )
            for setting in _declared()
        ]

    def _shown(self, name: str, *, secret: bool) -> str:
        value = getattr(self, name)
        if name == "secret_key" and not value:
            return f"(kept in {self._kept_key_file})"
        if value is None or value == "":
            return ""
        if secret:
            return _HIDDEN
        if isinstance(value, bool):
            return "true" if value else "false"
        return _without_password(str(value))

    def __repr__(self) -> str:
        shown = ", ".join(f"{variable}={value}" for variable, value, _ in self.describe())
        return f"<Settings {shown}>"

    @staticmethod
    def documentation() -> list[Documentation]:
        """Every setting, in order, for the README and the test that compares it with this module."""
        return [
            Documentation(
                variable=_variable(setting.name),
                default=setting.metadata["default_in_words"] or f"`{setting.metadata['default']}`",
                example=setting.metadata["example"],
                description=setting.metadata["description"],
                secret=setting.metadata["secret"],
            )
            for setting in _declared()
        ]

    def derive_key(self, purpose: str) -> bytes:
        """32 secret bytes for one purpose, the same in every process with this secret key.

        Keys of two purposes tell nothing about each other or about the secret key. In development the first call
        makes the secret key; SettingsError if the data folder cannot hold it.
        """
        return hmac.digest(self._root_key, b"sunset:" + purpose.encode(), hashlib.sha256)

    @cached_property
    def _root_key(self) -> bytes:
        return (self.secret_key or _kept_secret(self._kept_key_file)).encode()

    @property
    def _kept_key_file(self) -> Path:
        return self.data_dir / "secret.key"


def _declared() -> list[Field[Any]]:
    """The dataclass fields that are settings, in order."""
    return [declared for declared in fields(Settings) if declared.metadata]


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    known = [_variable(setting.name) for setting in _declared()]
    known += [variable + _FILE_SUFFIX for variable in known]
    problems = []
    for variable in sorted(environ):
        if variable.upper().startswith(PREFIX) and variable not in known:
            near = difflib.get_close_matches(variable.upper(), known, n=1)
            advice = f"did you mean {near[0]}?" if near else "`sunset config` lists those that exist."
            problems.append(f"{variable} is not a setting: remove it, or {advice}")
    return problems


def _value_of(
    setting: Field[Any], environ: Mapping[str, str], values: Mapping[str, Any], problems: list[str], unusable: set[str]
) -> tuple[Any, str]:
    """One setting's value and source.

    What is wrong is added to `problems`, and a default stands in, so that the rest is checked as well.
    """
    variable = _variable(setting.name)
    parse, secret = setting.metadata["parse"], setting.metadata["secret"]
    default = setting.metadata["default"]
    text, source = "", "default"
    try:
        text, source = _given(variable, environ)
        if secret and text == setting.metadata["example"]:
            raise SettingsError([f"{variable} is the example from the documentation: make one of your own."])
        text = text or (default(values) if callable(default) else default)
        if not text:
            return (None if setting.name == "policy_file" else ""), source
        return parse(text), source
    except _Unusable as reason:
        # The text of a file is not repeated: its path may have been mistaken for that of another secret.
        told = "" if secret or source == "file" else f", not {_without_password(text)!r}"
        problems.append(f"{variable} must be {reason}{told}.")
    except SettingsError as error:
        problems.extend(error.problems)
    unusable.add(setting.name)
    return (parse(default) if isinstance(default, str) and default else ""), "default"


def _given(variable: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """What the environment says for `variable`, and where; "" if nothing."""
    direct = environ.get(variable, "").strip()
    path = environ.get(variable + _FILE_SUFFIX, "").strip()
    if direct and path:
        raise SettingsError([f"{variable} and {variable}{_FILE_SUFFIX} are both set: remove one of them."])
    if not path:
        return direct, "environment" if direct else "default"
    try:
        content = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError([f"{variable}{_FILE_SUFFIX} names a file that cannot be read ({reason}): {path}"]) from None
    if not content:
        raise SettingsError([f"{variable}{_FILE_SUFFIX} names an empty file: {path}"])
    return content, "file"


def _disagreements(values: Mapping[str, Any], sources: Mapping[str, str], unusable: set[str]) -> list[str]:
    """The problems that lie between settings, in the order of the documentation."""
    production = values["environment"] == "production"
    problems = []

    def missing(name: str, why: str) -> None:
        if name not in unusable and sources[name] == "default":
            problems.append(f"{_variable(name)} is required {why}.")

    def in_clear(name: str) -> bool:
        parts = urlsplit(values[name])
        return name not in unusable and parts.scheme == "http" and not is_loopback(parts.hostname or "")

    if production:
        missing("public_url", "in production: set it to the address under which people reach this server")
        if in_clear("public_url"):
            problems.append(
                "SUNSET_PUBLIC_URL must begin with https:// in production (http:// is for localhost alone)."
            )
        missing("secret_key", "in production: `openssl rand -hex 32` prints a good one")
        missing("oidc_issuer", "in production: set it to your identity provider's issuer")
        missing("smtp_url", "in production: set it to your mail server, since the emails carry the confirmation links")
        if in_clear("link_url"):
            problems.append("SUNSET_LINK_URL must begin with https:// in production (http:// is for localhost alone).")
        if values["clock"] == "development":
            problems.append("SUNSET_CLOCK must be system in production: a clock that is moved ahead deletes too early.")
        problems += [
            f"{_variable(name)} must be false in production: {why}."
            for name, why in (
                ("development_issuer", "whoever reads its key can be anyone"),
                ("mailbox", "it shows every email to anyone who asks"),
                ("demo", "it would put made-up accounts beside real ones"),
                ("development_on_network", "it is about development alone"),
            )
            if values[name]
        ]
    elif not values["development_on_network"] and unusable.isdisjoint({"environment", "development_on_network"}):
        problems += [
            f"{_variable(name)} is {_without_password(values[name])}, and this is development, where everybody can be "
            "anyone: set SUNSET_ENVIRONMENT=production. If it is to be development nevertheless, set "
            "SUNSET_DEVELOPMENT_ON_NETWORK=true."
            for name in _signs_of_production(values)
            if name not in unusable
        ]
    if values["oidc_issuer"] or production:
        missing("oidc_audience", "with SUNSET_OIDC_ISSUER: set it to the `aud` of the tokens meant for this service")
    elif "oidc_issuer" not in unusable:
        problems += [
            f"{_variable(name)} is of no use without SUNSET_OIDC_ISSUER: set that as well, or remove it."
            for name in ("oidc_audience", "oidc_jwks_url")
            if values[name]
        ]
    if values["smtp_starttls"] == "off" and values["smtp_url"].startswith("smtp://"):
        host = urlsplit(values["smtp_url"]).hostname or ""
        if not is_loopback(host):
            problems.append(
                f"SUNSET_SMTP_STARTTLS must be required for {host}: without TLS, passwords and links travel in clear. "
                "`off` is for a mail server on localhost."
            )
    return problems


def _signs_of_production(values: Mapping[str, Any]) -> list[str]:
    """The settings that a developer's machine does not have, and a server whose environment was forgotten has."""
    public = urlsplit(values["public_url"])
    signs = {
        "host": not is_loopback(values["host"]),
        "public_url": public.scheme == "https" and not is_loopback(public.hostname or ""),
        "oidc_issuer": bool(values["oidc_issuer"]),
    }
    return [name for name, shown in signs.items() if shown]


_URL_PASSWORD: Final = re.compile(r"(?P<before>://[^/?#\s:]*:)[^\s]*@")
_QUERY_PASSWORD: Final = re.compile(r"(?P<before>[?&](?:ssl)?password=)[^&\s]*", re.IGNORECASE)


def _without_password(value: str) -> str:
    value = _URL_PASSWORD.sub(rf"\g<before>{_HIDDEN}@", value)
    return _QUERY_PASSWORD.sub(rf"\g<before>{_HIDDEN}", value)


def make_folder(path: Path) -> None:
    """Make the folder `path`, and those above it that are missing, for their owner alone. One that is there stays as
    it is."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def _kept_secret(path: Path) -> str:
    """The secret in the file `path`, made at the first call.

    However many processes call it at once, all get the same: the complete file is linked into place, which
    happens for one of them and fails for the others, who then read the winner's. Readable by the owner only.
    """
    try:
        make_folder(path.parent)
        if not path.exists():
            handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
            try:
                with os.fdopen(handle, "w", encoding="ascii") as file:
                    file.write(secrets.token_hex(_SECRET_BYTES) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                Path(path).hardlink_to(draft)
            except FileExistsError:
                pass
            finally:
                Path(draft).unlink()
        return _secret(path.read_text(encoding="ascii").strip())
    except _Unusable:
        raise SettingsError(
            [f"SUNSET_SECRET_KEY: {path} holds no usable key. Delete the file to have one made."]
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise SettingsError(
            [f"SUNSET_DATA_DIR: the secret key cannot be kept in {path} ({reason}). Choose a folder that is writable."]
        ) from None
