"""The vocabulary of the migrations: tables, and the rules that hold against hand-written SQL on both engines.

Tables and columns are Tortoise's `CreateModel` and `AddField`, with plain columns: codes are text, because the enums
in `app.lifecycle` move on and a migration does not. Everything else is SQL, made here for both engines from the same
conditions, in which NEW and OLD are the row:

* `Check`: a condition on one row. A CHECK constraint on PostgreSQL, triggers on SQLite (which adds checks to a table
  only by remaking it).
* `Refusal`: a condition on a change (status arrows, append-only rows). Triggers on both.
* On SQLite also the types: its columns take anything, and times and ids are compared as text there.

What is refused raises an integrity error that names the rule. What this module makes is part of every migration that
has landed: it may grow, and what it makes for them must not change.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tortoise import fields
from tortoise.fields.base import Field, OnDelete
from tortoise.migrations import AddField, CreateModel

from app.db import Dialect, UtcDatetimeField

# ------------------------------------------------------------------------------------------------------- columns


def key() -> Any:
    return fields.UUIDField(primary_key=True)


def to(model: str, related_name: str, *, null: bool = False) -> Any:
    options: dict[str, Any] = {"null": null, "on_delete": OnDelete.RESTRICT}
    return fields.ForeignKeyField(f"models.{model}", related_name=related_name, **options)


def text(length: int, *, null: bool = False) -> Any:
    options: dict[str, Any] = {"null": null}
    return fields.CharField(max_length=length, **options)


def table(model: str, table: str, columns: list[tuple[str, Any]]) -> CreateModel:
    return CreateModel(name=model, fields=columns, options={"table": table, "app": "models"})


# -------------------------------------------------------------------------------------------------------- rules


def one_of(column: str, codes: str) -> str:
    return f"NEW.{column} IN ({', '.join(repr(code) for code in codes.split())})"


def exactly(column: str, condition: str) -> str:
    return f"(NEW.{column} IS NOT NULL) = ({condition})"


def together(*columns: str) -> str:
    first, *others = columns
    return " AND ".join(f"(NEW.{first} IS NULL) = (NEW.{other} IS NULL)" for other in others)


def not_along(arrows: str) -> str:
    allowed = ", ".join(repr(arrow) for arrow in arrows.split())
    return f"OLD.status <> NEW.status AND (OLD.status || '>' || NEW.status) NOT IN ({allowed})"


class Check(NamedTuple):
    """A condition that every row of `table` meets."""

    table: str
    name: str
    condition: str


class Refusal(NamedTuple):
    """A change (`event`) of a row of `table` that is refused when `condition` holds.

    `subquery`: the condition looks at other rows, which PostgreSQL wants inside the trigger's function. `lock`: a
    statement that runs there first, so that two transactions cannot each miss the other's change."""

    table: str
    name: str
    event: str
    condition: str
    subquery: bool = False
    lock: str = ""


_EVENTS = ("INSERT", "UPDATE")
_RAISE = "RAISE EXCEPTION '%', TG_NAME USING ERRCODE = 'integrity_constraint_violation';"


def indexes(statements: str, dialect: Dialect) -> str:
    """The statements, with `{binary}` as the collation by code points, which `accounts.page` sorts names by, and
    `{leading_status}` in partial indexes on a status: SQLite prefers another index to one that does not begin with the
    column, while PostgreSQL, to which it says nothing, would read the whole index for it."""
    if dialect == "sqlite":
        return statements.format(binary="BINARY", leading_status="status, ")
    return statements.format(binary='"C"', leading_status="")


def refusing(
    checks: Iterable[Check], refusals: Iterable[Refusal], append_only: Mapping[str, str], dialect: Dialect
) -> str:
    """What makes the database refuse. `append_only`: tables whose rows are kept, each with the condition by which a
    row is found by each unique key: SQLite's REPLACE deletes the old row without asking its triggers. On PostgreSQL
    it is TRUNCATE that asks no row's trigger."""
    return "\n".join(
        _sqlite(checks, refusals, append_only) if dialect == "sqlite" else _postgresql(checks, refusals, append_only)
    )


def no_longer(checks: Iterable[Check], dialect: Dialect) -> str:
    """What takes checks away, for a migration that puts wider ones in their place."""
    if dialect == "sqlite":
        return "\n".join(
            f'DROP TRIGGER "{check.table}_{check.name}_{event.lower()}";' for check in checks for event in _EVENTS
        )
    return "\n".join(f'ALTER TABLE "{check.table}" DROP CONSTRAINT "{check.table}_{check.name}";' for check in checks)


def _postgresql(checks: Iterable[Check], refusals: Iterable[Refusal], append_only: Mapping[str, str]) -> Iterable[str]:
    for check in checks:
        condition = check.condition.replace("NEW.", "")
        yield f'ALTER TABLE "{check.table}" ADD CONSTRAINT "{check.table}_{check.name}" CHECK ({condition});'
    yield f"CREATE OR REPLACE FUNCTION sunset_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {_RAISE} END $$;"
    for rule in refusals:
        function, when = "sunset_refuse", f"WHEN ({rule.condition}) "
        if rule.subquery:
            function, when, lock = f"sunset_{rule.name}", "", f"{rule.lock};" if rule.lock else ""
            row = "OLD" if rule.event == "DELETE" else "NEW"
            yield (
                f"CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                f"{lock} IF {rule.condition} THEN {_RAISE} END IF; RETURN {row}; END $$;"
            )
        yield (
            f'CREATE TRIGGER "{rule.name}" BEFORE {rule.event} ON "{rule.table}" '
            f"FOR EACH ROW {when}EXECUTE FUNCTION {function}();"
        )
    for kept in append_only:
        yield f'CREATE TRIGGER "{kept}_is_not_truncated" BEFORE TRUNCATE ON "{kept}" EXECUTE FUNCTION sunset_refuse();'


def _sqlite(checks: Iterable[Check], refusals: Iterable[Refusal], append_only: Mapping[str, str]) -> Iterable[str]:
    for check in checks:
        yield from _sqlite_check(check.table, f"{check.table}_{check.name}", check.condition)
    for rule in refusals:
        yield _sqlite_trigger(rule.name, rule.name, rule.event, rule.table, rule.condition)
    for kept, same in append_only.items():
        name = f"{kept}_is_not_replaced"
        yield _sqlite_trigger(name, name, "INSERT", kept, f'EXISTS (SELECT 1 FROM "{kept}" WHERE {same})')


def _sqlite_check(table: str, name: str, condition: str) -> Iterable[str]:
    for event in _EVENTS:
        yield _sqlite_trigger(f"{name}_{event.lower()}", name, event, table, f"NOT ({condition})")


def _sqlite_trigger(name: str, rule: str, event: str, table: str, condition: str) -> str:
    return (
        f'CREATE TRIGGER "{name}" BEFORE {event} ON "{table}" FOR EACH ROW WHEN {condition} '
        f"BEGIN SELECT RAISE(ABORT, '{rule}'); END;"
    )


def columns_hold_their_types(tables: Sequence[CreateModel], dialect: Dialect) -> str:
    """On SQLite, triggers by which the tables' columns hold what they declare. PostgreSQL does so by itself."""
    return "\n".join(
        statement
        for create in tables
        for name, field in create.model._meta.fields_map.items()
        for statement in _holds_its_type(
            create.model._meta.db_table, name, create.model._meta.fields_db_projection.get(name), field, dialect
        )
    )


def added_columns_hold_their_types(tables: Mapping[str, str], added: Sequence[AddField], dialect: Dialect) -> str:
    """The same for columns that are added; `tables` names each model's table."""
    return "\n".join(
        statement
        for one in added
        for statement in _holds_its_type(tables[one.model_name], one.name, one.name, one.field, dialect)
    )


def _holds_its_type(table: str, name: str, column: str | None, field: Any, dialect: Dialect) -> Iterable[str]:
    condition = _sqlite_type(field)
    if dialect != "sqlite" or condition is None or column is None:
        return
    condition = f"NEW IS NULL OR ({condition})".replace("NEW", f'NEW."{column}"')
    yield from _sqlite_check(table, f"{table}_{name}_type", condition)


def _sqlite_type(field: Field[Any]) -> str | None:
    """The condition on a value, NEW, by which an SQLite column holds what the field says."""
    if isinstance(field, UtcDatetimeField):
        return "length(NEW) = 32 AND NEW GLOB '????-??-?? ??:??:??.??????+00:00' AND julianday(NEW) IS NOT NULL"
    if isinstance(field, fields.UUIDField):
        return "length(NEW) = 36 AND NEW NOT GLOB '*[^0-9a-f-]*' AND NEW GLOB '????????-????-????-????-????????????'"
    if isinstance(field, fields.CharField):
        return f"typeof(NEW) = 'text' AND length(NEW) <= {field.max_length}"
    if isinstance(field, fields.TextField):
        return "typeof(NEW) = 'text'"
    if isinstance(field, fields.IntField):
        return "typeof(NEW) = 'integer'"
    if isinstance(field, fields.JSONField):
        return "json_valid(NEW)"
    return None
