"""What development shows without asking who looks: under the names of this machine alone.

A page of a stranger's, open in a developer's browser, may let its own name point to 127.0.0.1 (DNS rebinding), and
then read what is served there as if it were its own. The name that it asks for gives it away. This keeps browsers out,
and nobody who can reach the server and writes the `Host` header by hand.
"""

import re
from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.settings import is_loopback

_HOST: Final = re.compile(r"(?:\[(?P<address>[^\[\]]+)\]|(?P<name>[^\[\]:]+))(?::\d*)?")


class LocalPages:
    """Middleware: each of `paths`, and what is below it, is refused to who asks for it by another name."""

    def __init__(self, app: ASGIApp, paths: Sequence[str]) -> None:
        self._app = app
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = None
        if scope["type"] == "http" and any(f"{scope['path']}/".startswith(f"{path}/") for path in self._paths):
            refused = refuse_other_names(Headers(scope=scope))
        await (refused or self._app)(scope, receive, send)


def refuse_other_names(headers: Headers) -> Response | None:
    """The answer to a request whose `Host` is not a name of this machine; None where it is."""
    hosts = headers.getlist("host")
    if hosts and all(map(_is_local, hosts)):
        return None
    return PlainTextResponse(
        "This is for development, and is shown under the names of this machine alone: open it at localhost or "
        "127.0.0.1. Under any other name, somebody else's page could read it.\n",
        403,
    )


def _is_local(host: str) -> bool:
    found = _HOST.fullmatch(host)
    return found is not None and is_loopback(found["address"] or found["name"])
