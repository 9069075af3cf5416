"""Everything that can be wrong with an installation, looked at once: settings, policy, mail, database, alarms, rows.

Each check says in one line how it stands and what to do. Nothing is changed and nothing is sent; where one check makes
another impossible, the other is left out.
"""

import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

import asyncpg
from tortoise.exceptions import OperationalError

from app import accounts, alarms, db, errors, invariants, main, provisioning, restores
from app.auth import Installation
from app.db import Database, sqlite_path
from app.db.migrate import pending, unknown
from app.delivery.email import DeliveryError, mailer_from_settings
from app.lifecycle import Scope
from app.policy import PolicyError
from app.settings import Settings, SettingsError

_STATEMENT_SECONDS = 900.0
"""How long one look at every row of a table may take."""

_TIMERS_LATE = timedelta(minutes=5)
_CLOCK_WARN = timedelta(seconds=2)
_CLOCK_FAIL = timedelta(seconds=60)


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    name: str
    verdict: Verdict
    message: str
    """How it stands and, unless it is well, what to do."""
    details: tuple[str, ...] = ()


async def examine(environ: Mapping[str, str]) -> list[Check]:
    """Check the installation that these settings describe. Raises nothing that can be expected to be wrong."""
    try:
        settings = Settings.load(environ)
    except SettingsError as error:
        return [_fail("settings", "Correct them; `sunset config` then shows what is in force.", *error.problems)]
    checks = [_ok("settings", f"valid, for {settings.environment}")]
    shared: Installation | None = None
    try:
        shared = main.installation(settings)
    except PolicyError as error:
        checks.append(_fail("policy", str(error)))
    else:
        checks.append(_ok("policy", f"valid: {len(shared.policy.plans)} plans"))
    checks.append(await _mail(settings))
    try:
        async with _opened(settings) as database:
            checks += [_files(settings), _ok("database", f"{database.dialect} answers")]
            checks += await _inside(settings, shared, database)
    except (errors.Unavailable, errors.Refusal) as error:
        checks = [check for check in checks if check.name != "database"]
        checks.append(_fail("database", error.message))
    except OperationalError as error:
        checks.append(_fail("schema", "Tables are not what the migrations made. Restore a back-up.", str(error)))
    finally:
        if shared is not None:
            await shared.tokens.close()
    return checks


async def _mail(settings: Settings) -> Check:
    mailer = mailer_from_settings(settings)
    try:
        return _ok("mail", await mailer.check())
    except DeliveryError as error:
        where = "SUNSET_SMTP_URL and SUNSET_SMTP_STARTTLS" if settings.smtp_url else "SUNSET_DATA_DIR"
        return _fail("mail", f"{error} Nothing is lost meanwhile: emails wait. See {where}.")
    finally:
        await mailer.close()


def _files(settings: Settings) -> Check:
    """With the database open, which closes a file of its own to others."""
    kept = [settings.data_dir, settings.data_dir / "mailbox", settings.data_dir / "secret.key"]
    if settings.database_url.startswith("sqlite:"):
        file = sqlite_path(settings.database_url)
        kept += [Path(file + end) for end in ("", "-wal", "-shm")]
    open_to_others = []
    for path in kept:
        with suppress(OSError):  # not there, or not any more
            if (mode := path.stat().st_mode) & 0o007:
                open_to_others.append(f"{path} ({mode & 0o777:o})")
    if open_to_others:
        return _warn(
            "files",
            "Others on this machine may look at these: `chmod 0700` for a folder, `chmod 0600` for a file.",
            *open_to_others,
        )
    return _ok("files", "closed to others on this machine")


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[Database]:
    """The database, bound, with time to look at all of it. Raises `Refusal` or `Unavailable`."""
    if settings.database_url.startswith("sqlite:") and not (file := Path(sqlite_path(settings.database_url))).exists():
        raise errors.Refusal(f"There is no database at {file} yet. Run `sunset migrate`.")
    try:
        database = await Database.open(
            settings.database_url,
            pool_size=1,
            statement_seconds=_STATEMENT_SECONDS,
            development_clock=settings.clock == "development",
        )
    except (asyncpg.PostgresError, sqlite3.DatabaseError) as error:  # not there, not ours, or no database
        raise errors.Refusal(f"SUNSET_DATABASE_URL: {error}") from error
    try:
        with database.bind():
            yield database
    finally:
        await database.close()


async def _inside(settings: Settings, shared: Installation | None, database: Database) -> list[Check]:
    if missing := await pending(database):
        return [_fail("schema", f"Run `sunset migrate`: {', '.join(missing)} is not applied.")]
    checks = [await _schema(database), await _clock(), await _offset(settings)]
    if shared is not None:
        checks += [
            await _restores(shared),
            await _plans(shared),
            await _members(),
            await _enforcing_systems(shared),
            *await _alarms(shared),
        ]
    return [*checks, await _invariants()]


async def _schema(database: Database) -> Check:
    if newer := await unknown(database):
        return _warn(
            "schema",
            f"A newer version has applied {', '.join(newer)}. Well while an upgrade is under way; end it: this version "
            "does not know them.",
        )
    return _ok("schema", "this version's")


async def _clock() -> Check:
    before = datetime.now(UTC)
    theirs = await db.database_now()
    after = datetime.now(UTC)
    ahead = before + (after - before) / 2 - theirs
    told = f"this machine's is {abs(ahead).total_seconds():.1f} s {'ahead of' if ahead > timedelta() else 'behind'}"
    if abs(ahead) <= _CLOCK_WARN:
        return _ok("clock", f"{told} the database's")
    message = f"{told} the database's, which alone decides. People's tokens go by this one: set it by NTP."
    return _fail("clock", message) if abs(ahead) > _CLOCK_FAIL else _warn("clock", message)


async def _offset(settings: Settings) -> Check:
    try:
        await main.check_clock(settings)
    except SettingsError as error:
        return _fail("clock_offset", *error.problems)
    ahead = await db.clock_offset()
    return _ok("clock_offset", f"the development clock was moved {ahead} ahead" if ahead else "none")


async def _restores(shared: Installation) -> Check:
    found = await restores.examine(shared)
    if found is not None:
        return _fail(
            "restores",
            f"{found.evidence} No deletion begins from when a process has noticed. If it was restored from a back-up: "
            "`sunset restored`, and follow the README's checklist. If it was a planned move and nothing is lost: start "
            "a process, and `sunset deletions resume`.",
        )
    status = await restores.restatement()
    if status.left:
        message = f"After a restore, the status of {status.left:,} accounts is still to be sent. Does a worker run?"
        return _warn("restores", message)
    return _ok("restores", "the database has what was seen in it")


async def _plans(shared: Installation) -> Check:
    try:
        await main.check_plans(shared)
    except PolicyError as error:
        return _fail("plans", f"{error}. Put them into the policy file.")
    return _ok("plans", "the policy has every plan in use")


async def _members() -> Check:
    if listed := await accounts.listed_insiders():
        return _warn(
            "members",
            f"{listed:,} {'member is' if listed == 1 else 'members are'} staff or a service, and so no member for as "
            "long. The host's next syncs of their accounts take them off and name them (membersRefused).",
        )
    return _ok("members", "none of them is staff or a service")


async def _enforcing_systems(shared: Installation) -> Check:
    speaking = {
        service.name
        for service in await provisioning.list_services()
        if service.deactivated_at is None and Scope.ENFORCEMENT in service.scopes
    }
    named = [system.code for system in shared.policy.enforcing_systems]
    if mute := [code for code in named if code not in speaking]:
        return _warn(
            "enforcing_systems",
            f"The policy waits for {', '.join(mute)}, and no service may acknowledge: "
            "`sunset service add NAME --scope enforcement`.",
        )
    return _ok("enforcing_systems", "each has its service" if named else "the policy names none")


_QUIET: Mapping[alarms.Name, str] = {
    alarms.Name.DELETIONS_OVERDUE: "none",
    alarms.Name.DELETIONS_HALTED: "no",
    alarms.Name.DELETION_HALT: "none",
    alarms.Name.TIMERS_OVERDUE: "nothing",
    alarms.Name.DEAD_LETTERS: "none",
    alarms.Name.MESSAGES_OVERDUE: "none",
    alarms.Name.ENFORCEMENT_LATE: "none",
    alarms.Name.WEBHOOKS_OVERDUE: "none",
    alarms.Name.DEAD_WEBHOOKS: "none",
    alarms.Name.ENDPOINTS_GONE: "none",
}

_OF_OTHERS = frozenset(
    {
        alarms.Name.DEAD_LETTERS,
        alarms.Name.WEBHOOKS_OVERDUE,
        alarms.Name.DEAD_WEBHOOKS,
        alarms.Name.ENDPOINTS_GONE,
    }
)
"""What servers of others refuse is no fault of the installation."""


async def _alarms(shared: Installation) -> list[Check]:
    ringing = {alarm.name: alarm for alarm in await alarms.current(shared)}
    checks = []
    for name, quiet in _QUIET.items():
        if name not in ringing:
            checks.append(_ok(name, quiet))
        elif name in _OF_OTHERS:
            checks.append(_warn(name, ringing[name].message))
        else:
            checks.append(_fail(name, ringing[name].message))
    late = await alarms.overdue_timers(shared.policy, _TIMERS_LATE)
    if late and alarms.Name.TIMERS_OVERDUE not in ringing:
        message = f"Not done for more than 5 minutes: {alarms.told(late)}. Does a worker run?"
        place = list(_QUIET).index(alarms.Name.TIMERS_OVERDUE)
        checks[place] = _warn(alarms.Name.TIMERS_OVERDUE, message)
    return checks


async def _invariants() -> Check:
    found = await invariants.check()
    if not found:
        return _ok("invariants", f"{len(invariants.RULES)} rules hold on every row")
    lines = []
    for finding in found:
        rule = finding.rule
        lines += [f"{rule.name}: {rule.of} {id_} {rule.wrong}" for id_ in finding.ids]
        if finding.count > len(finding.ids):
            lines.append(f"{rule.name}: and {finding.count - len(finding.ids):,} more")
    count = sum(finding.count for finding in found)
    message = f"Rules are broken {count:,} times. Stop the workers until it is known why: they delete by these rows."
    return _fail("invariants", message, *lines)


def _ok(name: str, message: str) -> Check:
    return Check(name=name, verdict=Verdict.OK, message=message)


def _warn(name: str, message: str, *details: str) -> Check:
    return Check(name=name, verdict=Verdict.WARN, message=message, details=details)


def _fail(name: str, message: str, *details: str) -> Check:
    return Check(name=name, verdict=Verdict.FAIL, message=message, details=details)
