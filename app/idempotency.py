"""The same key and input, from the same caller for the same mutation: the same answer, and one effect.

The answer is stored in the transaction that it tells of, for 30 days: ids and plain values, from which the caller
rebuilds what it said. A refused attempt changed nothing and is not stored. Authorization comes first, always: a key
gives nobody an answer that their token no longer would.
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

import orjson

from app import db, errors
from app.models import IdempotencyRecord
from app.tokens import Identity

MAX_KEY_LENGTH = 255

KEPT = timedelta(days=30)
"""How long a key gives its answer again."""


def _caller(identity: Identity) -> str:
    return hashlib.sha256(f"{identity.issuer}\0{identity.subject}".encode()).hexdigest()


def _fingerprint(values: Mapping[str, Any]) -> str:
    # asyncpg has a kind of UUID of its own, which orjson does not take for one.
    return hashlib.sha256(orjson.dumps(values, default=str, option=orjson.OPT_SORT_KEYS)).hexdigest()


async def once(
    identity: Identity,
    mutation: str,
    key: str | None,
    values: Mapping[str, Any],
    account_id: UUID | None,
    action: Callable[[], Awaitable[dict[str, Any]]],
) -> dict[str, Any]:
    """Run `action` and remember its answer, or give the answer that it gave before.

    To be called inside the transaction and under the account's lock, so that of two identical calls the second
    waits and finds the first's answer. Without a key, `action` simply runs. Raises `IdempotencyConflict` when the
    key stood for other values, `InvalidInput` for an unusable key; the transaction is then to be rolled back.
    """
    if key is None:
        return await action()
    if not 1 <= len(key) <= MAX_KEY_LENGTH:
        raise errors.InvalidInput(f"An idempotency key has 1 to {MAX_KEY_LENGTH} characters.", field="idempotencyKey")
    caller, fingerprint = _caller(identity), _fingerprint(values)
    record = await IdempotencyRecord.get_or_none(caller=caller, mutation=mutation, key=key)
    if record is not None:
        if record.fingerprint != fingerprint:
            raise errors.IdempotencyConflict
        return record.answer
    answer = await action()
    stored = await db.fetch_one(
        "INSERT INTO idempotency_record (id, caller, mutation, key, fingerprint, account_id, answer, created_at) "
        f"VALUES ($1, $2, $3, $4, $5, $6, $7, {db.now_sql()}) ON CONFLICT (caller, mutation, key) DO NOTHING "
        "RETURNING id",
        db.uuid7(),
        caller,
        mutation,
        key,
        fingerprint,
        account_id,
        orjson.dumps(answer).decode(),
    )
    if stored is None:  # A call about another account used the key since; this one's effect must not stay.
        raise errors.IdempotencyConflict
    return answer


async def forget(*, limit: int = 1_000) -> int:
    """Delete records that are older than `KEPT`, up to `limit`. Returns how many."""
    return await db.execute(
        "DELETE FROM idempotency_record WHERE id IN "
        f"(SELECT id FROM idempotency_record WHERE created_at < $1 ORDER BY created_at LIMIT {int(limit)})",
        await db.now() - KEPT,
    )
