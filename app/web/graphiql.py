"""GraphiQL at /graphiql: the page for trying the API by hand, from the package's own files.

It is served where the settings turn it on, in development by default. Nothing comes from another origin, and the
Content-Security-Policy lets nothing run, load or be sent anywhere else. The page knows no token but the one that a
person pastes, and keeps it in memory only. This module knows the file names alone: no schema, no caller, no settings.
"""

import secrets
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

_HERE: Final = Path(__file__).parent
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def routes() -> list[BaseRoute]:
    """The page at /graphiql and its files below. It talks to /graphql of the same origin."""
    templates = Environment(loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined)
    template = templates.get_template("graphiql.html")

    def page(request: Request) -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        return HTMLResponse(
            template.render(nonce=nonce), headers={**_HEADERS, "Content-Security-Policy": _policy(nonce)}
        )

    return [
        Route("/graphiql", page, methods=["GET"]),
        Mount("/graphiql", StaticFiles(directory=_HERE / "static" / "graphiql")),
    ]


def _policy(nonce: str) -> str:
    """Scripts are this origin's files alone. The nonce is for the one style element that GraphiQL's dialogs insert."""
    return (
        f"default-src 'none'; script-src 'self'; style-src 'self' 'nonce-{nonce}'; font-src data:; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
