"""The commands: `sunset serve`, `sunset import`, `sunset token`, ...

A command reads the settings, opens what it needs, calls one function of the application, and tells what came of it.
What can be expected to go wrong is one line on standard error and exit status 1 (2 for wrong usage); a traceback is a
defect. Each command imports what it needs when it runs, so that the small ones start fast.
"""

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import typer

from app import errors
from app.policy import DEFAULT_FILE, Policy, PolicyError
from app.settings import Settings, SettingsError

if TYPE_CHECKING:
    from app.db import Database

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


def _policy(settings: Settings) -> Policy:
    from app import policy

    return policy.load(settings.policy_file or DEFAULT_FILE)


def _run(work: Awaitable[T]) -> T:
    import uvloop

    async def run() -> T:
        return await work

    return uvloop.run(run())


@asynccontextmanager
async def _database(settings: Settings) -> AsyncIterator["Database"]:
    """The database, bound and up to date. Raises `Refusal` when migrations are missing."""
    from app.db import Database
    from app.db.migrate import pending

    if settings.database_url.startswith("sqlite:"):
        Path(settings.database_url.removeprefix("sqlite://")).parent.mkdir(parents=True, exist_ok=True)
    database = await Database.open(settings.database_url, pool_size=settings.database_pool_size)
    try:
        if await pending(database):
            raise errors.Refusal("The database is not at this version's schema. Run `sunset migrate` first.")
        with database.bind():
            yield database
    finally:
        await database.close()
