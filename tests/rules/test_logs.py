"""The log: one stream for all, and nothing secret or personal in it, whoever logs and whatever goes wrong."""

import io
import json
import logging
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from app import logs

JWT = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl"

Configure = Callable[..., io.StringIO]


@pytest.fixture
def configure() -> Iterator[Configure]:
    """Configures the log of this process into memory; afterwards everything is as before."""
    root, app = logging.root, logging.getLogger("app")
    handlers, levels = root.handlers[:], (root.level, app.level)

    def configured(format: Literal["json", "text"] = "json", level: str = "info") -> io.StringIO:  # noqa: A002
        stream = io.StringIO()
        logs.configure(format=format, level=level, stream=stream)
        return stream

    with structlog.contextvars.bound_contextvars():
        yield configured
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    app.setLevel(levels[1])
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def own() -> structlog.stdlib.BoundLogger:
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger("app.cancellation")
    return logger


# --- One stream ------------------------------------------------------------------------------------------------------


def test_our_events_and_the_libraries_look_alike(configure: Configure) -> None:
    """Both are JSON lines with time, level, logger and the fields of the request that they belong to."""
    stream = configure()
    structlog.contextvars.bind_contextvars(request_id="r-1", account_id=str(UUID(int=1)), operation="CancelAccount")

    own().info("canceled", plan="startup")
    logging.getLogger("uvicorn.error").warning("took %d ms", 7)

    ours, theirs = lines(stream)
    assert (ours["event"], ours["level"], ours["logger"], ours["plan"]) == (
        "canceled",
        "info",
        "app.cancellation",
        "startup",
    )
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("took 7 ms", "warning", "uvicorn.error")
    for line in (ours, theirs):
        assert (line["request_id"], line["account_id"], line["operation"]) == ("r-1", str(UUID(int=1)), "CancelAccount")
        assert line["timestamp"].endswith("Z")


def test_people_get_lines_that_they_can_read(configure: Configure) -> None:
    stream = configure("text")

    own().info("canceled", plan="startup", to="alice@acme.example")

    text = stream.getvalue()
    assert "canceled" in text
    assert "plan=startup" in text
    assert "alice" not in text
    assert "\x1b" not in text, "colors are for terminals"


def test_handlers_that_a_library_installed_are_removed(configure: Configure) -> None:
    """They would write what it logs a second time, past the redaction."""
    stray = io.StringIO()
    library = logging.getLogger("uvicorn.access")
    library.addHandler(logging.StreamHandler(stray))
    library.propagate = False

    stream = configure()
    library.info("GET /")

    assert stray.getvalue() == ""
    assert [line["event"] for line in lines(stream)] == ["GET /"]


def test_configuring_again_does_not_write_twice(configure: Configure) -> None:
    first = configure()
    second = configure()

    own().info("once")

    assert (first.getvalue(), len(lines(second))) == ("", 1)


def test_transitions_are_written_at_every_level(configure: Configure) -> None:
    """They are what tells, after a restore, what the database has lost."""
    stream = configure(level="error")
    structlog.stdlib.get_logger("app.history").info("account.transition")
    own().warning("something.else")
    assert [line["event"] for line in lines(stream)] == ["account.transition"]


def test_the_level_is_the_least_that_is_written(configure: Configure) -> None:
    stream = configure(level="warning")

    own().info("no")
    own().warning("yes")
    logging.getLogger("uvicorn.error").info("no")

    assert [line["event"] for line in lines(stream)] == ["yes"]


def test_debugging_does_not_turn_on_the_libraries(configure: Configure) -> None:
    """At debug level the database library logs statements with their values: people's words, names and addresses."""
    stream = configure(level="debug")

    own().debug("ours")
    logging.getLogger("tortoise.db_client").debug("INSERT INTO feedback ... ['too expensive for us']")

    assert [line["event"] for line in lines(stream)] == ["ours"]


# --- Nothing secret --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["token", "confirmationToken", "authorization", "Authorization", "password", "smtp_password", "client_secret",
     "secret_key", "set-cookie", "api_key", "apiKey", "private_key", "credentials"],
)  # fmt: skip
@pytest.mark.parametrize(
    "value", ["canary", b"canary", ["canary"], {"a": "canary"}], ids=["text", "bytes", "list", "dict"]
)
def test_what_a_secret_name_holds_is_hidden(configure: Configure, name: str, value: object) -> None:
    """At the top, nested, and from the libraries' `extra`; the name stays, so that one sees that there was a value."""
    stream = configure()

    own().info("event", **{name: value})
    own().info("event", request={"headers": [{name: value}]})
    logging.getLogger("library").info("event", extra={name: value})

    assert "canary" not in stream.getvalue()
    assert stream.getvalue().count(name) == 3


SECRETS = {
    "bearer": ("Authorization: Bearer canary-1.x/y+z=", "canary"),
    "bearer in lower case": ("bearer canary123", "canary"),
    "JSON Web Token": (f"got {JWT}, refused", "eyJ"),
    "JSON Web Token in a URL": (f"GET /confirm/{JWT} 200", "eyJ"),
    "JSON Web Token cut short": (JWT[:40], "eyJ"),
    "query string": ("GET /confirm?token=canary&x=1", "canary"),
    "prefixed name": ("confirmation_token=canary", "canary"),
    "text of an exception": ("{'password': 'canary with blanks', 'user': 'x'}", "canary"),
    "JSON": ('{"apiKey": "canary with blanks"}', "canary"),
    "SMTP URL": ("smtp://sunset:canary@mail.example.com:587", "canary"),
    "database URL with an @ in its password": ("postgres://u:can@nary@db:5432/x", "nary"),
    "URL with a user alone": ("https://canary@example.com/", "canary"),
    "address": ("to canary@acme.example failed", "canary"),
    "address in brackets": ("Canary <canary@acme.example>", "canary@"),
    "address with an apostrophe": ("o'canary@acme.example", "canary"),
    "address with a tag": ("canary+tag.x_y-z@acme.example", "canary"),
    "returned mail's address": ("bounce+canary=acme.example@mail.example", "canary"),
    "quoted address": ('"canary the cat"@acme.example', "canary"),
    "encoded address": ("GET /?to=canary%40acme.example", "canary"),
    "address without a dot": ("canary@localhost", "canary"),
    "international address": ("canaryä@exämple.example", "canary"),
    "its host": ("alice@canary.example", "canary"),
    "several": ("a@x.example, canary@y.example;canary@z.example", "canary"),
    "database's refused row": ("DETAIL:  Failing row contains (7, Zoe Canary, KING).", "Canary"),
    "database's detail": ("DETAIL: Key (email)=(canary@acme.example) already exists.", "canary"),
}


@pytest.mark.parametrize(("text", "secret"), SECRETS.values(), ids=SECRETS.keys())
@pytest.mark.parametrize("form", ["json", "text"])
def test_secrets_and_addresses_are_hidden_wherever_they_are(
    configure: Configure, form: Literal["json", "text"], text: str, secret: str
) -> None:
    """In the event, its arguments, its fields at any depth, bytes, objects, keys, bound fields and exceptions."""

    @dataclass
    class Record:
        content: str

    stream = configure(form)
    with structlog.contextvars.bound_contextvars(operation=text):
        own().info(text)
        own().info("%s", text)
        own().info("event", field=text, nested={"list": [(text,), {text}]}, raw=text.encode(), record=Record(text))
        own().info("event", by={text: 1})
        logging.getLogger("library").info("said %s", text)
        logging.getLogger("library").info("event", extra={"field": text})
    try:
        try:
            raise ValueError(text)
        except ValueError as error:
            raise RuntimeError(Record(text)) from error
    except RuntimeError:
        own().exception("failed")
        logging.getLogger("library").exception("failed")
        own().error("failed", exc_info=True, stack_info=True)

    assert secret not in stream.getvalue()
    assert stream.getvalue().count("RuntimeError") >= 3, "what went wrong is still told"


def test_values_of_local_variables_are_not_written(configure: Configure) -> None:
    """A pretty traceback would show them."""
    stream = configure("text")
    marked = "can" + "ary"
    try:
        raise ValueError(len(marked))
    except ValueError:
        own().exception("failed")

    assert "canary" not in stream.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "canceled account 01936f4e-7d1a-7000-8000-000000000001 of plan essentials",
        "GET /graphql 200 in 3.5 ms",
        "postgres://db.internal:5432/sunset",
        "app.graphql.http.handle",
        "@dataclass",
        "2026-11-23T09:42:02.856301Z",
        "token expired",
    ],
)
def test_what_is_neither_stays_as_it_is(text: str) -> None:
    assert logs.redacted(text) == text


def test_ids_and_numbers_stay(configure: Configure) -> None:
    stream = configure()

    values = {"attempts": 3, "share": 0.5, "last": None, "ok": True}
    own().info("event", id=UUID(int=1), **values)

    [line] = lines(stream)
    assert {name: line[name] for name in ("id", *values)} == {"id": str(UUID(int=1)), **values}


def test_what_contains_itself_is_cut_off(configure: Configure) -> None:
    stream = configure()
    endless: list[object] = ["x"]
    endless.append(endless)

    own().info("event", endless=endless)

    assert lines(stream)[0]["event"] == "event"


def test_what_uvicorn_says_twice_is_written_once(configure: Configure) -> None:
    stream = configure()

    logging.getLogger("uvicorn.error").info("Started", extra={"color_message": "Started in color"})

    assert "color" not in stream.getvalue()


LOCAL = st.text(string.ascii_letters + string.digits + "!#$&'*+/=?^_`{|}~.-", min_size=1, max_size=64)
HOST = st.from_regex(r"[a-z0-9-]{1,20}(\.[a-z0-9-]{1,20}){0,3}", fullmatch=True)
AFTER = st.sampled_from(["", " ", ", next", ">", '"', "\n", ")"])


@settings(deadline=None)
@given(before=st.text(max_size=20), local=LOCAL, host=HOST, after=AFTER)
def test_no_address_gets_through(before: str, local: str, host: str, after: str) -> None:
    """Whatever stands around it, nothing is left that has the form of the address."""
    assert f"{local}@{host}" not in logs.redacted(f"{before} {local}@{host}{after}")
