"""The commands: `sunset serve`, `sunset import`, `sunset token`, ...

A command reads the settings, opens what it needs, calls one function of the application, and tells what came of it.
What can be expected to go wrong is one line on standard error and exit status 1 (2 for wrong usage); a traceback is a
defect. Each command imports what it needs when it runs, so that the small ones start fast.
"""

import asyncio
import difflib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, NoReturn, TypeVar, cast
from uuid import UUID

import typer

from app import errors
from app.lifecycle import HaltCause, Scope, StaffRole
from app.policy import PolicyError
from app.settings import Settings, SettingsError, make_folder

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from app.breaker import BreakerView
    from app.db import Database
    from app.halts import HaltView
    from app.outbox import MessageView
    from app.receivers import Receivers
    from app.webhooks import DeliveryView, EndpointView

T = TypeVar("T")

_SCHEMA_FILE = Path(__file__).parents[1] / "schema.graphql"
_START_TOKENS = timedelta(hours=12)
"""How long the tokens live that `sunset serve` prints."""

app = typer.Typer(
    help="Runs the whole life of a SaaS account cancellation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
policy_commands = typer.Typer(help="The policy: plans, windows, offers, contacts.", no_args_is_help=True)
email_commands = typer.Typer(help="The emails that are sent.", no_args_is_help=True)
staff_commands = typer.Typer(help="People of the company that runs the SaaS.", no_args_is_help=True)
service_commands = typer.Typer(help="Other systems of that company.", no_args_is_help=True)
deletions_commands = typer.Typer(help="What is to be deleted, and whether it may be.", no_args_is_help=True)
deliveries_commands = typer.Typer(help="The emails that were promised, and what became of them.", no_args_is_help=True)
webhooks_commands = typer.Typer(help="Who is told of events, and what became of them.", no_args_is_help=True)
enforcement_commands = typer.Typer(help="Which systems have obeyed cancellations.", no_args_is_help=True)
clock_commands = typer.Typer(help="The development clock.", no_args_is_help=True)
app.add_typer(deletions_commands, name="deletions")
app.add_typer(deliveries_commands, name="deliveries")
app.add_typer(webhooks_commands, name="webhooks")
app.add_typer(enforcement_commands, name="enforcement")
app.add_typer(clock_commands, name="clock")
app.add_typer(policy_commands, name="policy")
app.add_typer(email_commands, name="emails")
app.add_typer(staff_commands, name="staff")
app.add_typer(service_commands, name="service")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command, by default the process's own. Always raises SystemExit."""
    try:
        app(args=arguments, prog_name="sunset")
    except SettingsError as error:
        _fail(*error.problems)
    except PolicyError as error:
        _fail(str(error))
    except (errors.Refusal, errors.RequestError) as error:
        _fail(error.message)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    sys.exit(0)


def _fail(*messages: str) -> NoReturn:
    for message in messages:
        print(f"sunset: {message}", file=sys.stderr)
    sys.exit(1)


def _settings(**options: object) -> Settings:
    """The settings in force; an option that is not None stands in for its variable."""
    environ = dict(os.environ)
    for name, value in options.items():
        if value is not None:
            variable = f"SUNSET_{name.upper()}"
            environ.pop(f"{variable}_FILE", None)
            environ[variable] = str(value)
    return Settings.load(environ)


def _run(work: Coroutine[Any, Any, T]) -> T:
    import uvloop

    return uvloop.run(work)


@asynccontextmanager
async def _database(settings: Settings) -> AsyncIterator["Database"]:
    """The database, bound. Raises `Refusal` where there is none or where migrations are missing."""
    from app import logs
    from app.db.migrate import pending

    logs.configure(format=settings.log_format, level=settings.log_level)
    file = _sqlite_file(settings)
    if file is not None and not file.exists():
        raise errors.Refusal(f"There is no database at {file} yet. Run `sunset migrate` first.")
    async with _opened(settings) as database:
        if await pending(database):
            raise errors.Refusal("The database does not have this version's schema yet. Run `sunset migrate` first.")
        with database.bind():
            yield database


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator["Database"]:
    """The database, whatever is in it; a SQLite file is made."""
    import asyncpg

    from app.db import Database

    file = _sqlite_file(settings)
    if file is not None:
        make_folder(file.parent)
    try:
        database = await Database.open(
            settings.database_url,
            pool_size=settings.database_pool_size,
            development_clock=settings.clock == "development",
        )
    except asyncpg.PostgresError as error:  # refused by the server: no such database, wrong password
        raise errors.Refusal(f"SUNSET_DATABASE_URL: {error}") from None
    try:
        yield database
    finally:
        await database.close()


def _sqlite_file(settings: Settings) -> Path | None:
    from app.db import sqlite_path

    return Path(sqlite_path(settings.database_url)) if settings.database_url.startswith("sqlite:") else None


def _issuer(settings: Settings) -> str:
    """Whose tokens people and services have unless something else is said."""
    from app.tokens import DEVELOPMENT_ISSUER

    return settings.oidc_issuer or DEVELOPMENT_ISSUER


def _columns(rows: Sequence[Sequence[str]]) -> None:
    """Aligned, and never wrapped: what is in it can be copied and searched."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))] if rows else []
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# ------------------------------------------------------------------------------------------------------- processes


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Instead of SUNSET_HOST.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Instead of SUNSET_PORT.", show_default=False)] = None,
) -> None:
    """Serve the API, with the worker inside unless SUNSET_WORKER is false.

    Brings the database to this version's schema first. In development, makes a demo company in a new database and,
    unless SUNSET_DEVELOPMENT_ON_NETWORK is true, prints tokens to try it with.
    """
    from app import logs
    from app.main import create_app, installation
    from app.server import Limits, Server

    settings = _settings(host=host, port=port)
    logs.configure(format=settings.log_format, level=settings.log_level)
    introduction = _run(_prepare(settings))
    shared = installation(settings)
    _allow_files(settings.streams)

    class Introduced(Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                _introduce(settings, introduction)

    server = Introduced(
        create_app(settings, shared),
        shared.changes,
        limits=Limits(connections_per_address=settings.connections_per_address),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        lifespan="on",
        timeout_graceful_shutdown=settings.grace_seconds,
    )
    # Uvicorn stops in order and then sends itself the signal again: an order that was followed is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(3)


def _allow_files(streams: int) -> None:
    """Let the process have as many connections as it may hold streams, as far as the system allows."""
    import resource

    import structlog

    wanted = streams + 1_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        structlog.stdlib.get_logger(__name__).info("serve.few_file_descriptors", allowed=allowed, wanted=wanted)


async def _prepare(settings: Settings) -> list[tuple[str, str, str]]:
    """Migrate, check, make the demo; answer whom there are tokens for: name, part, token. None on a network, where
    what is printed is the log of a container, and others read it."""
    from app import demo
    from app.db.migrate import migrate
    from app.main import check_clock, check_plans, installation

    shared = installation(settings)
    async with _opened(settings) as database:
        await migrate(database)
        with database.bind():
            await check_clock(settings)
            await check_plans(shared)
            if settings.demo:
                await demo.make(shared)
            if not settings.development_issuer or settings.development_on_network:
                return []
            await shared.tokens.follow()
            return [(one.who, one.part, shared.tokens.mint(one.subject, _START_TOKENS)) for one in await demo.cast()]


def _introduce(settings: Settings, cast: Sequence[tuple[str, str, str]]) -> None:
    """What to open, and as whom."""
    host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host  # noqa: S104  every interface
    base = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    pages = [("The API", "/graphql", True), ("Try it in the browser", "/graphiql", settings.graphiql)]
    pages.append(("The emails that were sent", "/mailbox", settings.mailbox and not settings.smtp_url))
    print()
    _columns([(f"{title}:", f"{base}{path}") for title, path, shown in pages if shown])
    if cast:
        print(f"\nTokens for {_hours(_START_TOKENS)}, for the header Authorization: Bearer TOKEN\n")
        for who, part, token in cast:
            print(f"{who}, {part}\n{token}\n")
    elif settings.development_issuer:
        print(
            "\nA token, for the header Authorization: sunset token --staff EMAIL, or --member EMAIL, or --service NAME"
        )
    sys.stdout.flush()


def _hours(duration: timedelta) -> str:
    return f"{duration // timedelta(hours=1)} hours"


@app.command()
def worker() -> None:
    """Deliver what is due, until told to stop (SIGTERM). Several may run, beside any number of `sunset serve`.

    With SUNSET_WORKER_PORT, serves `/metrics`, `/livez` and `/readyz` there.
    """
    from app import logs

    settings = _settings()
    logs.configure(format=settings.log_format, level=settings.log_level)
    _run(_work(settings))


async def _work(settings: Settings) -> None:
    import structlog

    from app import main as service
    from app import restores, tracing

    log = structlog.stdlib.get_logger(__name__)
    shared = service.installation(settings)
    async with _database(settings) as database, tracing.exporting(settings.otlp_endpoint):
        await service.check_clock(settings)
        await service.check_plans(shared)
        own = service.worker(settings, shared)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, own.stop)
        async with restores.watching(shared), _probed(settings, service.create_worker_app(settings, shared, database)):
            log.info("worker.started")
            await own.run()
        log.info("worker.stopped")


@asynccontextmanager
async def _probed(settings: Settings, probes: "Starlette") -> AsyncIterator[None]:
    """Within the block the worker's probes are served, where they have a port. Raises `Refusal` when it is taken."""
    from app.server import Limits, Server

    if not settings.worker_port:
        yield
        return

    class Probes(Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # the worker is who is told to stop

    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.worker_port), family=family)
    except OSError as error:
        raise errors.Refusal(f"SUNSET_WORKER_PORT: {settings.worker_port}: {error.strerror}") from None
    with listening:
        server = Probes(
            probes,
            None,
            limits=Limits(connections_per_address=settings.connections_per_address),
            lifespan="off",
            timeout_graceful_shutdown=settings.grace_seconds,
        )
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield
        finally:
            server.should_exit = True
            await serving


@app.command()
def migrate() -> None:
    """Bring the database to this version's schema. Safe to run while other processes do the same."""
    _run(_migrate(_settings()))


async def _migrate(settings: Settings) -> None:
    from app.db.migrate import migrate

    async with _opened(settings) as database:
        for name in await migrate(database):
            print(f"Applied {name}.")
    print("The database has this version's schema.")


# -------------------------------------------------------------------------------------------------------- accounts

_IMPORT_HELP = """
Create and update accounts from a file of JSON Lines: one account a line.

    {"reference": "acme", "name": "Acme", "planCode": "essentials", "members": [{"subject": "member:alice@acme.example",
    "email": "alice@acme.example", "name": "Alice Adams", "role": "ADMIN"}]}

An account (on one line) has **reference**, **name**, **planCode**, and may have **currentPeriodEnd**
(2027-01-31T00:00:00Z), **csmEmail** (an active Customer Success Manager) and **members**.

**members** are all of the account's members: who is not in the list is removed, also while the account is canceled.
Left out, they stay as they are. Who is staff or a service is none, and taken for not listed. A member has **subject**,
**email**, **name**, **role** (ADMIN or MEMBER), and may have **permissions** (["ACCESS_BILLING_AND_ACCOUNT_INFO"]) and
**issuer** (left out: the one that this installation trusts).

Bad lines, and members who are left out, are told with the line's number and the reason, and all else is imported; the
exit status is then 1. Importing again changes nothing, and no import changes the state of a cancellation.
"""


@app.command("import", help=_IMPORT_HELP)
def import_(
    file: Annotated[str, typer.Argument(help="The file; - for standard input.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, change nothing.")] = False,
) -> None:
    settings = _settings()
    with nullcontext(sys.stdin.buffer) if file == "-" else Path(file).open("rb") as stream:
        complete = _run(_import(settings, stream, dry_run=dry_run))
    if not complete:
        sys.exit(1)


async def _import(settings: Settings, stream: BinaryIO, *, dry_run: bool) -> bool:
    """Whether everything in the file could be used."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    from app import importing
    from app.main import installation

    shared = installation(settings)
    console = Console(stderr=True)
    size = os.fstat(stream.fileno()).st_size if stream.seekable() else None
    columns = TextColumn("{task.fields[lines]:,} lines"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    seen = 0
    async with _database(settings):
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("import", total=size, lines=0)

            def progress(lines: int, length: int) -> None:
                nonlocal seen
                seen += lines
                bar.update(task, advance=length, lines=seen)

            def complain(number: int, reason: str) -> None:
                console.print(f"line {number}: {_printable(reason)}", markup=False, highlight=False, soft_wrap=True)

            try:
                summary = await importing.run(shared, stream, dry_run=dry_run, complain=complain, progress=progress)
            except errors.Unavailable as error:
                raise errors.Refusal(
                    f"Stopped after line {seen:,}: {error.message} What is before is imported; import the file again."
                ) from None
    would, refused = "would be " if dry_run else "", summary.members_refused
    print(
        f"{summary.created:,} accounts {would}created, {summary.updated:,} {would}updated, {summary.unchanged:,} "
        f"unchanged; {summary.bad:,} bad {'line' if summary.bad == 1 else 'lines'}"
        + (f", {refused:,} {'member' if refused == 1 else 'members'} refused." if refused else ".")
        + (" Nothing was changed." if dry_run else "")
    )
    return not (summary.bad or refused)


def _printable(text: str, longest: int = 300) -> str:
    """Fit for a terminal: what came from elsewhere neither moves its cursor nor fills it."""
    shown = "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in text[:longest])
    return shown + ("..." if len(text) > longest else "")


# ---------------------------------------------------------------------------------------------------------- tokens


@app.command()
def token(
    member: Annotated[str | None, typer.Option(metavar="EMAIL", help="A member, by address.")] = None,
    account: Annotated[str | None, typer.Option(metavar="SLUG", help="The member's account, by reference.")] = None,
    staff: Annotated[str | None, typer.Option(metavar="EMAIL", help="Staff, by address.")] = None,
    service: Annotated[str | None, typer.Option(metavar="NAME", help="A service, by name.")] = None,
    lifetime: Annotated[str, typer.Option(help="How long it lives, at most 24h: 30s, 15m, 8h.")] = "1h",
) -> None:
    """Print a token of the development issuer, alone: TOKEN=$(sunset token --staff billing@vendor.example)."""
    if sum(one is not None for one in (member, staff, service)) != 1 or (member is None) != (account is None):
        raise typer.BadParameter("say one of: --member EMAIL --account SLUG, --staff EMAIL, --service NAME")
    duration = _duration(lifetime)
    settings = _settings()
    if not settings.development_issuer:
        where = "In production your" if settings.environment == "production" else "Your"
        raise errors.Refusal(
            f"There is no development issuer here (SUNSET_DEVELOPMENT_ISSUER is false). {where} identity provider "
            "makes the tokens."
        )
    print(_run(_token(settings, duration, member=member, account=account, staff=staff, service=service)))


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"(\d{1,6})([smh])", text)
    units = {"s": timedelta(seconds=1), "m": timedelta(minutes=1), "h": timedelta(hours=1)}
    duration = int(found[1]) * units[found[2]] if found else timedelta()
    if not timedelta() < duration <= timedelta(hours=24):
        raise typer.BadParameter("a lifetime is written as 30s, 15m or 8h, and is at most 24h", param_hint="--lifetime")
    return duration


async def _token(
    settings: Settings,
    lifetime: timedelta,
    *,
    member: str | None,
    account: str | None,
    staff: str | None,
    service: str | None,
) -> str:
    from app.models import Account, Member, Service, Staff
    from app.tokens import DEVELOPMENT_ISSUER, Tokens

    found: Member | Staff | Service | None
    tokens = Tokens.from_settings(settings)
    async with _database(settings):
        await tokens.follow()
        if member is not None:
            who = f"member {member} of {account}"
            if not await Account.exists(reference=account):
                raise errors.Refusal(f"No account has the reference {account}.")
            members = await Member.filter(account__reference=account, email__iexact=member)
            if len(members) > 1:
                raise errors.Refusal(f"{account} has {len(members)} members with the address {member}.")
            found = members[0] if members else None
        elif staff is not None:
            who = f"staff {staff}"
            found = await Staff.get_or_none(email=staff.lower(), deactivated_at=None)
        else:
            who = f"service {service}"
            found = await Service.get_or_none(name=service, deactivated_at=None)
    if found is None:
        raise errors.Refusal(f"There is no {who}, or they were deactivated.")
    if found.issuer != DEVELOPMENT_ISSUER:
        raise errors.Refusal(f"The tokens of {who} come from {found.issuer}, and from nobody else.")
    return tokens.mint(found.subject, lifetime)


# ------------------------------------------------------------------------------------------------ deletions, clock


@deletions_commands.command("list")
def deletions_list(
    due: Annotated[bool, typer.Option("--due", help="Only those whose date has come, oldest first.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell of each how many rows would be erased. Nothing is changed.")
    ] = False,
) -> None:
    """List the deletions that are to come, are on hold, or are under way, and where the breaker stands."""
    settings = _settings()
    _run(_deletions_list(settings, due=due, dry_run=dry_run))


async def _deletions_list(settings: Settings, *, due: bool, dry_run: bool) -> None:
    from app import breaker, db, deletion
    from app.main import installation

    policy = installation(settings).policy
    heading = ["reference", "account", "plan", "state", "deletion", *(["begins"] if due else [])]
    rows = [[*heading, *deletion.ERASED] if dry_run else heading]
    async with _database(settings):
        gate = await breaker.read(policy, exact=True)
        for halt in gate.halts:
            print(f"Halted since {halt.halted_at:%Y-%m-%d %H:%M} UTC, {halt.cause}: {_printable(halt.evidence, 2_000)}")
        print(
            f"{gate.waiting:,} to begin within 24 hours, {gate.due:,} with those begun, {gate.allowed:,} allowed, "
            f"{gate.left:,} may begin now: {gate.state}"
            + (", and the next worker stops them" if gate.would_halt else "")
            + (f" since {gate.halted_at:%Y-%m-%d %H:%M} UTC" if gate.halted_at else "")
        )
        now, left = await db.now(), gate.left
        async for account in deletion.due_first() if due else deletion.coming():
            date = account.deletion_scheduled_for
            row = [account.reference, str(account.id), account.plan_code, str(deletion.state(account, now))]
            row.append(f"{date:%Y-%m-%d %H:%M} UTC" if date else "")
            if due:
                row.append("yes" if len(rows) <= left else "no, halted" if gate.halts else "no, stopped")
            if dry_run:
                row += [str(count) for count in (await deletion.would_erase(account.id)).values()]
            rows.append(row)
    _columns(rows)
    if dry_run:
        print("Nothing was changed.")


@deletions_commands.command("approve")
def deletions_approve(
    count: Annotated[int, typer.Option(help="How many, as `sunset deletions list` says.")],
    note: Annotated[str, typer.Option(help="Why.")],
) -> None:
    """Let the deletions go on that have stopped because too many fell due: that many, for 24 hours."""
    from app import breaker
    from app.main import installation

    settings = _settings()

    async def approve() -> datetime | None:
        async with _database(settings):
            return (await breaker.approve_as_operator(installation(settings), count=count, note=note)).approved_until

    print(f"{count:,} deletions are approved until {_run(approve()):%Y-%m-%d %H:%M} UTC.")


@deletions_commands.command("halt")
def deletions_halt(note: Annotated[str, typer.Option(help="Why.")]) -> None:
    """Halt all deletions: none begins until `sunset deletions resume`. Those that have begun go on."""
    from app import halts
    from app.main import installation

    settings = _settings()

    async def halt() -> None:
        async with _database(settings):
            await halts.halt(installation(settings), note)

    _run(halt())
    print("No deletion begins any more.")


@deletions_commands.command("resume")
def deletions_resume(
    note: Annotated[str, typer.Option(help="Why.")],
    cause: Annotated[
        list[HaltCause] | None, typer.Option(help="Which halt ends, where several last; several times: each of these.")
    ] = None,
) -> None:
    """Let deletions begin again after a halt, a restore or a move. The breaker stays in force."""
    from app import breaker, halts, restores
    from app.main import installation

    settings = _settings()
    shared = installation(settings)

    async def resume() -> tuple[list["HaltView"], "BreakerView"]:
        async with _database(settings):
            await restores.check(shared)  # what has not been found yet does not end
            return await halts.resume(note, cause), await breaker.read(shared.policy, exact=True)

    ended, stands = _run(resume())
    for halt in ended:
        print(f"Ended: {halt.cause} since {_minute(halt.halted_at)}, {_printable(halt.evidence, 2_000)}")
    for halt in stands.halts:
        print(f"Still halted: {halt.cause} since {_minute(halt.halted_at)}, {_printable(halt.evidence, 2_000)}")
    print(
        f"Deletions may begin: {stands.waiting:,} fall due within 24 hours, the breaker lets {stands.left:,} begin now."
    )


@app.command()
def restored(
    as_of: Annotated[str, typer.Option("--as-of", metavar="TIME", help="What it was restored to: 2027-01-31T04:00Z.")],
    log: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A log since then, JSON lines or their gzip; several times; - for stdin."),
    ] = None,
) -> None:
    """Say that the database was restored from a back-up, and print what is lost and the commands that do it again.

    No deletion begins until `sunset deletions resume`; every account's epoch is ahead by a million; the workers send
    everybody how each account stands. Repeating it with the same time changes nothing.
    """
    _run(_restored(_settings(), _moment(as_of), log))


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter("a time is written as 2027-01-31T04:00Z", param_hint="--as-of") from None
    if moment.tzinfo is None:
        raise typer.BadParameter("a time needs its zone: Z is UTC", param_hint="--as-of")
    return moment.astimezone(UTC)


async def _restored(settings: Settings, as_of: datetime, logs: Sequence[str] | None) -> None:
    from app import breaker, lost_transitions, restores
    from app.lifecycle import EPOCHS_OF_A_RESTORE
    from app.main import installation

    shared, logged = installation(settings), []
    for name in logs or ():
        with _log_file(name) as stream:
            try:
                read = list(lost_transitions.read(stream))
            except errors.InvalidInput as refusal:
                raise errors.Refusal(f"{name}: {refusal.message}") from None
        logged += read
        span = f", from {_minute(read[0].occurred_at)} to {_minute(read[-1].occurred_at)}" if read else ""
        print(f"# {_printable(name)}: {len(read):,} transitions{span}")
    async with _database(settings):
        earlier = max((one.epoch // EPOCHS_OF_A_RESTORE for one in logged), default=0)
        await restores.declare(shared, as_of=as_of, at_least=earlier)
        left = (await restores.restatement()).left
        waiting = (await breaker.read(shared.policy)).waiting
        since = as_of - lost_transitions.MARGIN
        lost = await lost_transitions.find(one for one in logged if one.occurred_at >= since)
    print(f"# The database was restored as of {as_of:%Y-%m-%d %H:%M:%S} UTC.")
    print(f"# The workers send everybody how each account stands, with a new epoch: {left:,} accounts are left.")
    print(f"# {waiting:,} deletions fall due within 24 hours: sunset deletions list --due")
    if not logs:
        print("# What happened since is in the logs: sunset restored --as-of TIME --log FILE prints it.")
    elif not lost:
        print("# Everything that these logs tell of since then is in the database.")
    else:
        print(f"# {len(lost):,} accounts have lost something.")
        for line in lost_transitions.script(lost, settings.public_url):
            print(line)
    print('# When you have looked: sunset deletions resume --note "Why"')


@contextmanager
def _log_file(name: str) -> Iterator[BinaryIO]:
    """Standard input for -; what gzip has packed, unpacked."""
    import gzip

    with nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb") as stream:
        packed = name != "-" and stream.read(2) == b"\x1f\x8b"
        if name != "-":
            stream.seek(0)
        with gzip.open(stream) if packed else nullcontext(stream) as unpacked:
            yield cast("BinaryIO", unpacked)


@clock_commands.command("show")
def clock_show() -> None:
    """Print the time of the installation, and how far its clock was moved ahead."""
    from app import db

    settings = _settings()

    async def read() -> tuple[datetime, timedelta]:
        async with _database(settings):
            return await db.now(), await db.clock_offset()

    now, ahead = _run(read())
    print(f"{now:%Y-%m-%d %H:%M:%S} UTC" + (f", {ahead} ahead" if ahead else ""))


@clock_commands.command("advance")
def clock_advance(
    by: Annotated[str, typer.Argument(metavar="DURATION", help="60d, 36h, 30m or 10s.")],
) -> None:
    """Move the development clock ahead, for all processes of the installation. It never goes back."""
    from app import clock

    settings = _settings()
    duration = clock.duration(by)

    async def advance() -> datetime:
        async with _database(settings):
            return await clock.advance(duration)

    print(f"It is {_run(advance()):%Y-%m-%d %H:%M:%S} UTC now.")


# ------------------------------------------------------------------------------------------ deliveries, the doctor


class _DeliveryState(StrEnum):
    """`app.outbox.State` in the small letters of options; that module is imported when it is needed."""

    WAITING = "waiting"
    DUE = "due"
    CLAIMED = "claimed"
    DELIVERED = "delivered"
    DEAD = "dead"
    DROPPED = "dropped"


class _WebhookState(StrEnum):
    """`app.webhooks.State`, likewise."""

    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"


_MESSAGE = typer.Argument(metavar="ID", help="As `sunset deliveries list` says it, or the Message-ID.")


@deliveries_commands.command("list")
def deliveries_list(
    state: Annotated[list[_DeliveryState] | None, typer.Option(help="In this state; several times: in any.")] = None,
    account: Annotated[str | None, typer.Option(metavar="REFERENCE", help="About this account.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 50,
) -> None:
    """List messages, newest first: id, state, when promised, what, to whom, tries, when due, the last error."""
    from app import accounts, outbox

    settings = _settings()
    states = None if not state else frozenset(outbox.State[one.name] for one in state)

    async def read() -> list["MessageView"]:
        async with _database(settings):
            account_id = None
            if account is not None and (account_id := await accounts.find(account)) is None:
                raise errors.Refusal(f"No account has the reference {account}.")
            return await outbox.page(states, account_id=account_id, limit=limit + 1)

    found = _run(read())
    _columns(
        [
            (
                str(one.id),
                one.state.value,
                _minute(one.created_at),
                one.template,
                _printable(one.recipient_address) or "(erased)",
                str(one.attempts),
                _minute(one.due_at) if one.state in _TO_COME else "",
                _printable(one.last_error or ""),
            )
            for one in found[:limit]
        ]
    )
    if len(found) > limit:
        print(f"There are more: --limit {limit * 2}", file=sys.stderr)


_TO_COME = frozenset({"WAITING", "DUE", "CLAIMED"})


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


@deliveries_commands.command("show")
def deliveries_show(id: Annotated[str, _MESSAGE]) -> None:  # noqa: A002
    """Show one message: everything that is stored of it. Links are shown as what they grant, and not signed."""
    from app import outbox

    settings, key = _settings(), _message_key(id)

    async def read() -> "MessageView":
        async with _database(settings):
            found = await outbox.find(key)
        if found is None:
            raise errors.Refusal(f"There is no message {id}.")
        return found

    found = _run(read())
    times = ("created_at", "due_at", "delivered_at", "dead_at", "dropped_at")
    plain = ("id", "state", "template", "account_id", "message_id", "recipient_name", "recipient_address")
    shown = [(name, str(getattr(found, name) or "")) for name in plain]
    shown += [(name, f"{moment:%Y-%m-%d %H:%M:%S} UTC") for name in times if (moment := getattr(found, name))]
    shown += [("attempts", str(found.attempts)), ("last_error", found.last_error or "")]
    _columns([(name, _printable(value)) for name, value in shown])
    for line in json.dumps(found.facts, indent=2, ensure_ascii=False).splitlines():
        print(_printable(line, 5_000))


@deliveries_commands.command("retry")
def deliveries_retry(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help=_MESSAGE.help)] = None,
    all_dead: Annotated[bool, typer.Option("--all-dead", help="Every dead letter that can still be sent.")] = False,
) -> None:
    """Send again what is a dead letter or waits: due at once, with all tries before it and the same Message-ID."""
    from app import outbox

    if bool(ids) == all_dead:
        raise typer.BadParameter("say which: one or more IDs, or --all-dead")
    settings = _settings()
    if not all_dead:
        _each_message(settings, ids or [], outbox.retry, "is due now")
        return

    async def retry() -> tuple[int, int]:
        async with _database(settings):
            return await outbox.retry_dead(), (await outbox.depth()).dead

    retried, left = _run(retry())
    print(f"{retried:,} dead letters are due now.")
    if left:
        print(f"{left:,} stay: the data of their recipients was erased. Drop them.")


@deliveries_commands.command("drop")
def deliveries_drop(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help=_MESSAGE.help)],
) -> None:
    """Give messages up that were not delivered: they are never sent, and stay in the list."""
    from app import outbox

    _each_message(_settings(), ids, outbox.drop, "is dropped")


def _each_message(settings: Settings, ids: Sequence[str], act: Callable[[UUID], Awaitable[None]], done: str) -> None:
    """Each by itself: one that is refused keeps no other from it, and makes the exit status 1."""
    keys = [_message_key(id_) for id_ in ids]

    async def all_of_them() -> list[str]:
        refused = []
        async with _database(settings):
            for key in keys:
                try:
                    await act(key)
                except errors.Refusal as refusal:
                    refused.append(refusal.message)
                else:
                    print(f"Message {key} {done}.")
        return refused

    if refused := _run(all_of_them()):
        _fail(*refused)


def _message_key(text: str) -> UUID:
    try:
        return UUID(text.strip("<>").partition("@")[0])
    except ValueError:
        raise typer.BadParameter(
            "a message is named by the id that `sunset deliveries list` says, or by its Message-ID", param_hint="ID"
        ) from None


# ---------------------------------------------------------------------------------------------------------- webhooks

_ENDPOINT = typer.Argument(metavar="ENDPOINT", help="An endpoint, as `sunset webhooks list` says it.")
_TYPE = typer.Option("--type", metavar="TYPE", help="Only events of this type; several times: of these.")


async def _with_receivers(settings: Settings, act: Callable[["Receivers"], Awaitable[T]]) -> T:
    from app.receivers import Receivers

    async with _database(settings):
        return await act(Receivers(settings.webhook_allow))


def _webhook_key(text: str, kind: str) -> UUID:
    from app import ids

    key = ids.decode_as(ids.Kind[kind], text)
    if key is None:
        raise typer.BadParameter(f"{text!r} is no id of that kind")
    return key


def _tell_endpoint(settings: Settings, view: "EndpointView", generation: int | None = None) -> None:
    from app import ids
    from app.tokens import Tokens

    _columns([(ids.encode(ids.Kind.WEBHOOK_ENDPOINT, view.id), _printable(view.url))])
    if generation is not None:
        print(Tokens.from_settings(settings).webhook_secret(view.id, generation))


@webhooks_commands.command("list")
def webhooks_list() -> None:
    """List the endpoints: id, URL, state, failures in a row, which events, what for."""
    from app import ids, webhooks

    async def read() -> list["EndpointView"]:
        async with _database(_settings()):
            found: list[EndpointView] = []
            while page := await webhooks.endpoints(
                after=(found[-1].created_at, found[-1].id) if found else None, limit=500
            ):
                found += page
            return found

    _columns(
        [
            (
                ids.encode(ids.Kind.WEBHOOK_ENDPOINT, one.id),
                _printable(one.url),
                "enabled" if one.disabled_at is None else f"disabled {one.disabled_at:%Y-%m-%d}",
                str(one.failures),
                ",".join(one.event_types) or "all",
                _printable(one.description),
            )
            for one in _run(read())
        ]
    )


@webhooks_commands.command("add")
def webhooks_add(
    url: Annotated[str, typer.Argument(metavar="URL")],
    types: Annotated[list[str] | None, _TYPE] = None,
    description: Annotated[str | None, typer.Option(help="What it is for.")] = None,
) -> None:
    """Add an endpoint. Prints its id, and the secret that signs its events, which is told here alone."""
    from app import endpoints

    settings = _settings()
    made = _run(
        _with_receivers(
            settings,
            lambda receivers: endpoints.create(None, receivers, url=url, description=description, event_types=types),
        )
    )
    _tell_endpoint(settings, made.endpoint, made.secret_generation)


@webhooks_commands.command("update")
def webhooks_update(
    endpoint: Annotated[str, _ENDPOINT],
    url: Annotated[str | None, typer.Option(help="Where events are sent from now on.")] = None,
    types: Annotated[list[str] | None, _TYPE] = None,
    all_types: Annotated[bool, typer.Option("--all-types", help="Events of all types.")] = False,
    description: Annotated[str | None, typer.Option(help="What it is for.")] = None,
) -> None:
    """Change what is given of an endpoint."""
    from app import endpoints

    settings, key = _settings(), _webhook_key(endpoint, "WEBHOOK_ENDPOINT")
    wanted = [] if all_types else types or None
    view = _run(
        _with_receivers(
            settings,
            lambda receivers: endpoints.update(
                None, receivers, key, url=url, description=description, event_types=wanted
            ),
        )
    )
    _tell_endpoint(settings, view)


@webhooks_commands.command("rotate")
def webhooks_rotate(endpoint: Annotated[str, _ENDPOINT]) -> None:
    """Make a new secret, and print it. For 24 hours the one before signs too."""
    from app import endpoints

    settings, key = _settings(), _webhook_key(endpoint, "WEBHOOK_ENDPOINT")
    made = _run(_with_receivers(settings, lambda _: endpoints.rotate(None, key)))
    _tell_endpoint(settings, made.endpoint, made.secret_generation)


@webhooks_commands.command("disable")
def webhooks_disable(endpoint: Annotated[str, _ENDPOINT]) -> None:
    """Tell an endpoint nothing any more. What it was promised waits four days at most."""
    from app import endpoints

    settings, key = _settings(), _webhook_key(endpoint, "WEBHOOK_ENDPOINT")
    _run(_with_receivers(settings, lambda _: endpoints.disable(None, key)))
    print(f"{endpoint} is disabled.")


@webhooks_commands.command("enable")
def webhooks_enable(endpoint: Annotated[str, _ENDPOINT]) -> None:
    """Tell an endpoint again; what waits for it is due."""
    from app import endpoints

    settings, key = _settings(), _webhook_key(endpoint, "WEBHOOK_ENDPOINT")
    _run(_with_receivers(settings, lambda _: endpoints.enable(None, key)))
    print(f"{endpoint} is enabled.")


@webhooks_commands.command("ping")
def webhooks_ping(endpoint: Annotated[str, _ENDPOINT]) -> None:
    """Send an endpoint an event about nothing. Prints the delivery's id; the worker delivers it."""
    from app import endpoints, ids

    settings, key = _settings(), _webhook_key(endpoint, "WEBHOOK_ENDPOINT")
    delivery = _run(_with_receivers(settings, lambda _: endpoints.ping(None, key)))
    print(ids.encode(ids.Kind.WEBHOOK_DELIVERY, delivery.id))


@webhooks_commands.command("deliveries")
def webhooks_deliveries(
    endpoint: Annotated[str | None, typer.Option(metavar="ENDPOINT", help="To this endpoint.")] = None,
    state: Annotated[list[_WebhookState] | None, typer.Option(help="In this state; several times: in any.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 50,
) -> None:
    """List deliveries, newest first: id, state, when promised, what, tries, status, milliseconds, next try, error."""
    from app import ids, webhooks

    settings = _settings()
    key = None if endpoint is None else _webhook_key(endpoint, "WEBHOOK_ENDPOINT")
    states = None if not state else frozenset(webhooks.State[one.name] for one in state)

    async def read() -> list["DeliveryView"]:
        async with _database(settings):
            return await webhooks.page(endpoint_id=key, states=states, limit=limit + 1)

    found = _run(read())
    _columns(
        [
            (
                ids.encode(ids.Kind.WEBHOOK_DELIVERY, one.id),
                one.state.value,
                _minute(one.created_at),
                one.type,
                str(one.attempts),
                str(one.last_status or ""),
                str(one.last_latency_ms or ""),
                _minute(one.due_at) if one.state is webhooks.State.PENDING else "",
                _printable(one.last_error or ""),
            )
            for one in found[:limit]
        ]
    )
    if len(found) > limit:
        print(f"There are more: --limit {limit * 2}", file=sys.stderr)


@webhooks_commands.command("redeliver")
def webhooks_redeliver(
    delivery: Annotated[str | None, typer.Argument(metavar="[ID]", help="One delivery: its webhook-id.")] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="ENDPOINT", help="All of an endpoint; with --since.")] = None,
    since: Annotated[datetime | None, typer.Option(help="Those promised then (UTC) or later.")] = None,
) -> None:
    """Deliver again, with the same webhook-id, whatever came of it: one, or all of an endpoint since a time."""
    from app import endpoints

    settings = _settings()
    if delivery is not None and endpoint is None and since is None:
        one = _webhook_key(delivery, "WEBHOOK_DELIVERY")
        _run(_with_receivers(settings, lambda _: endpoints.redeliver(None, one)))
        print(f"{delivery} is due now.")
    elif delivery is None and endpoint is not None and since is not None:
        key, moment = _webhook_key(endpoint, "WEBHOOK_ENDPOINT"), since.replace(tzinfo=UTC)
        count = _run(_with_receivers(settings, lambda _: endpoints.redeliver_since(None, key, moment)))
        print(f"{count:,} deliveries are due now.")
    else:
        raise typer.BadParameter("say which: an ID, or --endpoint with --since")


@enforcement_commands.command("list")
def enforcement_list(
    late: Annotated[bool, typer.Option("--late", help="Only what is late.")] = False,
    system: Annotated[str | None, typer.Option(metavar="CODE", help="Of this system.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 50,
) -> None:
    """List what is not acknowledged, by when it is due: account, its id, epoch, system, since when, due, late."""
    from app import accounts, db, enforcement, ids
    from app.main import installation

    settings = _settings()
    policy = installation(settings).policy

    async def read() -> list[tuple[str, ...]]:
        async with _database(settings):
            now = await db.now()
            found = await enforcement.page(
                policy, {enforcement.Status.PENDING}, now=now, system=system, late=late or None, limit=limit + 1
            )
            about = await accounts.load_many([one.account_id for one in found])
        return [
            (
                _printable(about[one.account_id].reference),
                ids.encode(ids.Kind.ACCOUNT, one.account_id),
                str(one.epoch),
                _printable(one.system),
                _minute(one.asked_at),
                _minute(one.due_at),
                "late" if one.is_late(policy, now) else "",
            )
            for one in found
        ]

    rows = _run(read())
    _columns(rows[:limit])
    if len(rows) > limit:
        print(f"There are more: --limit {limit * 2}", file=sys.stderr)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object, for a monitoring system.")] = False,
) -> None:
    """Check the whole installation, one line for each check. Exit status 1 when one of them fails.

    Settings, policy, mail server, files, database, schema, clock, overdue work, dead letters, and every rule that
    always holds, on every row. Changes nothing and sends nothing.
    """
    from app import doctor as examiner
    from app import logs

    logs.configure(format="text", level="error")
    checks = _run(examiner.examine(os.environ))
    failed = any(check.verdict is examiner.Verdict.FAIL for check in checks)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{check.verdict:<4}  {check.name:<{width}}  {_printable(check.message, 2_000)}")
            for line in check.details:
                print(f"      {_printable(line, 2_000)}")
    if failed:
        sys.exit(1)


# -------------------------------------------------------------------------------------------- what is in force


@app.command()
def config() -> None:
    """Print the settings in force and where each comes from. Secrets are hidden."""
    _columns([(f"{name}={value}", f"# {source}") for name, value, source in _settings().describe()])


@policy_commands.command("check")
def policy_check(file: Annotated[Path, typer.Argument(help="The TOML file.")]) -> None:
    """Check a policy file before it is used: exit status 1 names the first thing that is wrong."""
    from app import policy

    checked = policy.load(file)
    print(
        f"{file} can be used: {len(checked.plans)} plans, {len(checked.reasons)} feedback reasons, "
        f"{len(checked.offers)} offers, {len(checked.enforcing_systems)} enforcing systems."
    )


@app.command()
def schema(
    check: Annotated[
        bool, typer.Option("--check", help="Compare schema.graphql with the code; tell what differs.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Write it to schema.graphql.")] = False,
) -> None:
    """Print the GraphQL schema."""
    from app.graphql.schema import printed

    text = printed()
    if write:
        _SCHEMA_FILE.write_text(text, encoding="utf-8")
    elif check:
        stored = _SCHEMA_FILE.read_text(encoding="utf-8") if _SCHEMA_FILE.exists() else ""
        difference = difflib.unified_diff(
            stored.splitlines(keepends=True), text.splitlines(keepends=True), "schema.graphql", "the code"
        )
        if stored != text:
            sys.stdout.writelines(difference)
            _fail("schema.graphql is not what the code says. Run `sunset schema --write`.")
        print("schema.graphql is current.")
    else:
        sys.stdout.write(text)


@email_commands.command("preview")
def emails_preview(directory: Annotated[Path, typer.Argument(help="The folder; it is made.")]) -> None:
    """Write every email as text, HTML and .eml, with the numbers of the policy in force."""
    from app import policy
    from app.delivery.preview import preview

    written = preview(directory, policy.load(_settings().policy_file or policy.DEFAULT_FILE))
    print(f"Wrote {len(written)} files to {directory}.")


# --------------------------------------------------------------------------------------------- staff and services

_SUBJECT_HELP = "Who they are to the identity provider (sub). The development issuer's tokens need none."
_ISSUER_HELP = "Whose tokens they have. Default: SUNSET_OIDC_ISSUER, else the development issuer."


def _identity(settings: Settings, issuer: str | None, subject: str | None, own: str) -> tuple[str, str]:
    """Issuer and subject of somebody new; `own` is the subject in tokens of our own making."""
    from app.tokens import DEVELOPMENT_ISSUER

    issuer = issuer or _issuer(settings)
    if subject is None and issuer != DEVELOPMENT_ISSUER:
        raise typer.BadParameter(f"is needed: who they are to {issuer}", param_hint="--subject")
    return issuer, subject or own


@staff_commands.command("add")
def staff_add(
    email: Annotated[str, typer.Argument(metavar="EMAIL")],
    name: Annotated[str, typer.Option(help="As emails and the API name them.")],
    role: Annotated[StaffRole, typer.Option(help="What they may do.")],
    subject: Annotated[str | None, typer.Option(help=_SUBJECT_HELP)] = None,
    issuer: Annotated[str | None, typer.Option(help=_ISSUER_HELP)] = None,
) -> None:
    """Add a person, or activate one again who was deactivated."""
    from app import provisioning
    from app.demo import staff_subject

    settings = _settings()
    issuer, subject = _identity(settings, issuer, subject, staff_subject(email.lower()))

    async def add() -> int:
        async with _database(settings):
            await provisioning.add_staff(email=email, name=name, role=role, issuer=issuer, subject=subject)
            return await provisioning.memberships(issuer, subject)

    accounts = _run(add())
    print(f"{email.lower()} is staff now, as {role.value}.")
    _tell_memberships(accounts)


def _tell_memberships(accounts: int) -> None:
    if accounts:
        print(
            f"{accounts:,} accounts list this subject as a member, which it is not for as long: the host's next syncs "
            "of these accounts take it off and name it in their answers (membersRefused)."
        )


@staff_commands.command("list")
def staff_list() -> None:
    """List everybody: address, name, role, since when deactivated, and their tokens' issuer and subject."""
    from app import provisioning

    async def read() -> None:
        async with _database(_settings()):
            _columns(
                [
                    (one.email, one.name, one.role.value, _state(one.deactivated_at), one.issuer, one.subject)
                    for one in await provisioning.list_staff()
                ]
            )

    _run(read())


@staff_commands.command("deactivate")
def staff_deactivate(email: Annotated[str, typer.Argument(metavar="EMAIL")]) -> None:
    """Take a person's access away, from their next request on."""
    from app import provisioning

    async def deactivate() -> int:
        async with _database(_settings()):
            return await provisioning.deactivate_staff(email)

    accounts = _run(deactivate())
    print(f"{email.lower()} has no access any more.")
    if accounts:
        print(f"{accounts:,} accounts still name them as Customer Success Manager: let a sync or an import change it.")


@service_commands.command("add")
def service_add(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    scope: Annotated[list[Scope], typer.Option(help="What it may do; may be given several times.")],
    subject: Annotated[str | None, typer.Option(help=_SUBJECT_HELP)] = None,
    issuer: Annotated[str | None, typer.Option(help=_ISSUER_HELP)] = None,
) -> None:
    """Add a service, or activate one again that was deactivated."""
    from app import provisioning
    from app.demo import service_subject

    settings = _settings()
    issuer, subject = _identity(settings, issuer, subject, service_subject(name))

    async def add() -> int:
        async with _database(settings):
            await provisioning.add_service(name=name, scopes=frozenset(scope), issuer=issuer, subject=subject)
            return await provisioning.memberships(issuer, subject)

    accounts = _run(add())
    print(f"{name} is a service now, with {', '.join(sorted(scope))}.")
    _tell_memberships(accounts)


@service_commands.command("list")
def service_list() -> None:
    """List every service: name, scopes, since when deactivated, and its tokens' issuer and subject."""
    from app import provisioning

    async def read() -> None:
        async with _database(_settings()):
            _columns(
                [
                    (one.name, ",".join(sorted(one.scopes)), _state(one.deactivated_at), one.issuer, one.subject)
                    for one in await provisioning.list_services()
                ]
            )

    _run(read())


@service_commands.command("deactivate")
def service_deactivate(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Take a service's access away, from its next request on."""
    from app import provisioning

    async def deactivate() -> None:
        async with _database(_settings()):
            await provisioning.deactivate_service(name)

    _run(deactivate())
    print(f"{name} has no access any more.")


def _state(deactivated_at: datetime | None) -> str:
    return "active" if deactivated_at is None else f"deactivated {deactivated_at:%Y-%m-%d}"


if __name__ == "__main__":
    main()
