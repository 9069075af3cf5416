"""Opaque ids: what the API, the events and the gate's answers call a row. A type's tag and the row's UUID.

Opaque by contract, not secret. Pure: it knows no row and no caller.
"""

import base64
import binascii
from enum import StrEnum
from uuid import UUID


class Kind(StrEnum):
    """The tag of each type that implements `Node`. Clients keep ids: a tag is never changed or reused."""

    ACCOUNT = "A"
    MEMBER = "M"
    CANCELLATION_REQUEST = "R"
    FEEDBACK = "F"
    OFFER = "O"
    WEBHOOK_ENDPOINT = "W"
    WEBHOOK_DELIVERY = "D"


def encode(kind: Kind, key: UUID) -> str:
    """The opaque `id` of the row `key`: 23 characters that are safe in a URL."""
    return to_base64(kind.encode() + key.bytes)


def decode(node_id: str) -> tuple[Kind, UUID] | None:
    """What `node_id` names, or None for everything that `encode` cannot have made."""
    raw = from_base64(node_id) if len(node_id) == 23 else None
    if raw is None:
        return None
    try:
        return Kind(chr(raw[0])), UUID(bytes=raw[1:])
    except ValueError:
        return None


def decode_as(kind: Kind, node_id: str) -> UUID | None:
    """The key in `node_id` if it is an id of this `kind`; None for other kinds as for anything malformed."""
    named = decode(node_id)
    return named[1] if named is not None and named[0] is kind else None


def to_base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def from_base64(text: str) -> bytes | None:
    """The bytes of canonical, unpadded base64url. Python's decoder alone skips foreign characters and spare bits."""
    try:
        raw = base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except (UnicodeEncodeError, binascii.Error):
        return None
    return raw if to_base64(raw) == text else None
