"""Deny by default: every root field states who it is for; one that does not is refused when the schema is built.

The statement stands in the field's description, so that a reader of the schema sees it. What it promises is enforced
where the field reads the database (`app.auth`), and tried for every field and every kind of caller by the tests.
"""

from collections.abc import Callable
from enum import StrEnum
from inspect import isasyncgenfunction
from typing import Any

import strawberry


class Access(StrEnum):
    KNOWN = "every known caller"
    MEMBERS_AND_STAFF = "members of the account, and staff"
    BILLING = 'members with "Access billing & account info", and staff'
    STAFF = "staff"
    ACTION = "who the rules allow; see `Account.allowedActions`"
    BILLING_TEAM = "the billing team"
    WEBHOOK_READERS = "staff, and services with the scope `webhooks`"
    WEBHOOK_MANAGERS = "the billing team, and services with the scope `webhooks`"
    PROVISION = "services with the scope `provision`"
    WATCHERS = "members of the account, staff, and services with the scope `gate`"
    ENFORCEMENT = "services with the scope `enforcement` that the policy names"
    RESTART_LINK = "bearers of the link in a cancellation email"


_ACCESS = "access"


def root(access: Access, description: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A root field for `access`; a subscription's where the resolver yields."""

    def declare(resolver: Callable[..., Any]) -> Any:
        kind = strawberry.subscription if isasyncgenfunction(resolver) else strawberry.field
        return kind(
            resolver=resolver,
            description=f"{description}\n\nFor {access.value}.",
            metadata={_ACCESS: access},
            **options,
        )

    return declare


def require_statements(*roots: type) -> None:
    """TypeError for a root field that does not say who it is for."""
    for kind in roots:
        for field in kind.__strawberry_definition__.fields:  # type: ignore[attr-defined]
            if not isinstance(field.metadata.get(_ACCESS), Access):
                raise TypeError(f"{kind.__name__}.{field.name} does not state who it is for")
