"""What tells a database from a copy of it, as far as the engine says.

A copy that was dumped and loaded has rows that another transaction wrote than theirs; a server of its own has another
number; a server that recovered to a point in time, or was promoted, has begun another timeline; a copied SQLite file is
another file. Nothing here says whether something was lost: that is for who knows what there was.
"""

from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

from tortoise.exceptions import OperationalError

from app import db
from app.db import Database, sqlite_path


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """None: the engine does not have it, or does not tell this role."""

    database: str | None
    """The server's number and the database's, or the file's."""
    timeline: int | None
    is_standby: bool = False
    """It follows another server, and what it is will be known when it is promoted."""


_SYSTEM = "(SELECT system_identifier::text FROM pg_control_system())"
# Not that of the last checkpoint, which after a promotion is still the old one.
_TIMELINE = (
    "CASE WHEN pg_is_in_recovery() THEN NULL "
    "ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint END"
)
_unanswered: WeakKeyDictionary[Database, set[str]] = WeakKeyDictionary()


async def origin() -> Origin:
    """The bound database's. To be called outside of a transaction: what the role may not ask ends one."""
    database = db.bound()
    if database.dialect == "sqlite":
        return Origin(database=f"file {_inode(sqlite_path(database.url))}", timeline=None)
    system, timeline = await _ask(database, _SYSTEM), await _ask(database, _TIMELINE)
    row = await db.fetch_one(
        "SELECT oid::bigint AS oid, pg_is_in_recovery() AS is_standby FROM pg_database "
        "WHERE datname = current_database()"
    )
    assert row is not None
    return Origin(
        database=None if system is None else f"server {system}, database {row['oid']}",
        timeline=None if timeline is None else int(str(timeline)),
        is_standby=row["is_standby"],
    )


def _inode(path: str) -> int:
    return Path(path).stat().st_ino


async def _ask(database: Database, expression: str) -> object:
    """None where the role may not ask, as on some managed servers; it is not asked again then."""
    refused = _unanswered.setdefault(database, set())
    if expression in refused:
        return None
    try:
        row = await db.fetch_one(f"SELECT {expression} AS answer")
    except OperationalError:
        refused.add(expression)
        return None
    return row and row["answer"]


def this_transaction_sql() -> str:
    """The number of the running transaction, as rows remember it; NULL on SQLite, whose rows do not."""
    return "txid_current() % 4294967296" if db.dialect() == "postgresql" else "NULL"


def writer_sql(alias: str) -> str:
    """The number of the transaction that wrote a row of that alias; NULL on SQLite."""
    return f"{alias}.xmin::text::bigint" if db.dialect() == "postgresql" else "NULL"
