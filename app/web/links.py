"""The pages behind emailed links: confirm a cancellation, say why, ask for a restart.

Plain and script-free. A GET shows a form and changes nothing, because mail scanners follow links; the POST acts, with
the link's token as the bearer. A link that is of no use now shows why, and no form. Pages may not be framed, cached,
or leak their address to others.

The token does not stay in the address, which is kept in histories, shown on screens and written to logs: whoever opens
a link is sent on to a page under the token's hash, and a cookie for that page alone carries it there. The cookie only
shows the form, which has the token in it; nothing is done on the strength of a cookie. Where there is none any more,
or the browser keeps none, the page asks for the link.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from app import auth, cancellation, db, errors, feedback, lifecycle, restart
from app.auth import Call, Installation
from app.delivery.email import duration, moment
from app.lifecycle import Action, FeedbackReason, LinkPurpose
from app.messages import LinkGrant

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, undefined=StrictUndefined
)
_TEMPLATES.filters["moment"] = moment
_TEMPLATES.filters["duration"] = duration

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
}
_MAX_FORM_BYTES: Final = 64 * 1024
"""Room for a comment of 5,000 characters, of which each is four bytes that a form writes with three characters."""
_MAX_PASTED: Final = 16 * 1024
"""Characters of a link as somebody pastes it: a token, and what a mail program has wrapped around it."""

_COOKIE_LIFETIME: Final = timedelta(minutes=10)
"""For the way from the link to the form, and for coming back to it."""
_RUN: Final = re.compile(r"[\w.-]+", re.ASCII)
"""A run of the characters that tokens are made of."""


def routes(installation: Installation, public_url: str) -> list[Route]:
    """`/links/confirm`, `/links/feedback` and `/links/restart`, and below each its links under their tokens' hashes.
    People reach them under `public_url`."""
    return [
        Route(
            path,
            _page(installation, purpose, _Cookies(public_url, purpose)),
            methods=["GET", "POST"],
        )
        for purpose in LinkPurpose
        for path in (f"/links/{purpose.value}", f"/links/{purpose.value}/{{link}}")
    ]


def _page(
    installation: Installation, purpose: LinkPurpose, cookies: "_Cookies"
) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        up = "../../" if "link" in request.path_params else "../"

        def show(template: str, values: dict[str, Any], *, status: int = 200) -> HTMLResponse:
            text = _TEMPLATES.get_template(template).render(values, up=up)
            return HTMLResponse(text, status_code=status, headers=_HEADERS)

        def refuse(message: str, *, status: int, contact: errors.Contact | None = None) -> HTMLResponse:
            return show("links/refused.html", {"message": message, "contact": contact}, status=status)

        try:
            form = await _form(request) if request.method == "POST" else None
            async with db.deadline(installation.request_timeout):
                token = _token(request, form, cookies)
                if token is None:
                    return show("links/open.html", {}, status=401)
                identity = await installation.tokens.verify(token)
                grant = identity.grant
                if grant is None or grant.purpose != purpose:
                    raise errors.Unauthenticated("The link is not meant for this page.")
                if form is None and "link" not in request.path_params:
                    with suppress(errors.Unavailable):  # the token leaves the address all the same
                        await auth.refuse_expired(identity)
                    return cookies.send_on(token)
                call = Call(identity=identity, installation=installation)
                error = None
                if form is not None and "token" in form:
                    try:
                        done = show(f"links/{purpose.value}_done.html", await _ACT[purpose](call, grant, form))
                        cookies.drop(done, token)
                        return done
                    except (errors.AccountNameMismatch, errors.InvalidInput) as refusal:
                        error = refusal.message
                facts = {"token": token, "error": error, "given": form or {}, **await _facts(call, grant)}
                return show(f"links/{purpose.value}.html", facts, status=422 if error else 200)
        except (errors.Forbidden, errors.PermissionDenied, errors.NotFound) as refusal:
            # Whoever it was sent to has left, lost the permission or become staff. What clients are told is not for
            # people, and a page has no ids that could be wrong.
            status = refusal.http_status if isinstance(refusal, errors.Forbidden) else 409
            billing = installation.policy.billing_team
            return refuse("This link is no longer yours to use.", status=status, contact=billing)
        except errors.Refusal as refusal:
            return refuse(refusal.message, status=409)
        except errors.Unauthenticated:
            message = "This link is not valid, or not any more. Use the newest email, or contact the billing team."
            return refuse(message, status=401)
        except errors.RequestError as refusal:
            refused = refuse(refusal.message, status=refusal.http_status)
            if refusal.retry_after is not None:
                refused.headers["Retry-After"] = str(refusal.retry_after)
            return refused

    return page


def _token(request: Request, form: Mapping[str, str] | None, cookies: "_Cookies") -> str | None:
    """The link's token: of the address or, after that, of the cookie; of a form that was sent or, where the link was
    pasted, out of whatever somebody's mail program has made of it. None where there is none."""
    if form is None:
        link = request.path_params.get("link")
        return request.query_params.get("token") or None if link is None else cookies.read(request, link)
    if "token" in form:
        return form["token"]
    pasted = form.get("link", "")
    return find_token(pasted) if len(pasted) <= _MAX_PASTED else None


def find_token(pasted: str) -> str | None:
    """The first thing in a text that has a token's form, broken lines or not. None where there is none. Anybody may
    have it read any text: it looks at no character more often than a few times."""
    for run in _RUN.finditer("".join(pasted.split())):
        _, found, rest = run[0].partition("eyJ")
        parts = (found + rest).split(".", 3)[:3]
        if len(parts) == 3 and all(parts):
            return ".".join(parts)
    return None


@dataclass(frozen=True)
class _Cookies:
    """Carries a link's token from its address to the page without it. Each link has a page of its own, under the
    token's hash, and a cookie for that page alone: so two links that are open at once never show each other's page, a
    cookie that somebody else has put there shows none, and a request carries one of them, however many there are."""

    public_url: str
    purpose: LinkPurpose

    def send_on(self, token: str) -> Response:
        """To the link's page without the token, wherever proxies have put it: the way there is relative."""
        link = _hash(token)
        answer = Response(status_code=303, headers={**_HEADERS, "Location": f"{self.purpose.value}/{link}"})
        lifetime = _COOKIE_LIFETIME // timedelta(seconds=1)
        # Lax: Strict ones do not come back when the way began at a webmail's page.
        answer.set_cookie(_name(link), token, lifetime, **self._where(link), httponly=True, samesite="lax")
        return answer

    def read(self, request: Request, link: str) -> str | None:
        token = request.cookies.get(_name(link))
        return token if token is not None and _hash(token) == link else None

    def drop(self, answer: Response, token: str) -> None:
        link = _hash(token)
        answer.delete_cookie(_name(link), **self._where(link), httponly=True, samesite="lax")

    def _where(self, link: str) -> dict[str, Any]:
        parts = urlsplit(self.public_url)
        path = f"{parts.path.rstrip('/')}/links/{self.purpose.value}/{link}"
        return {"path": path, "secure": parts.scheme == "https"}


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()[:32]


def _name(link: str) -> str:
    return f"sunset_link_{link}"


async def _form(request: Request) -> Mapping[str, str]:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FORM_BYTES:
            raise errors.PayloadTooLarge("The form is too large.")
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=10)
    except ValueError:
        raise errors.BadUserInput("The form is not readable.") from None
    return {name: value.replace("\0", "") for name, value in pairs}


async def _facts(call: Call, grant: LinkGrant) -> dict[str, Any]:
    """What the form shows. Refuses what the form would be refused now, except for what is typed into it."""
    caller = await auth.identify(call, grant.account_id)
    account = caller.account
    if account is None:
        raise errors.NotFound("account")
    facts = account.facts(call.policy)
    await auth.check(_ACTION[grant.purpose], caller, facts)
    return {
        "account": account,
        "confirmed": lifecycle.confirm(facts, caller.now),
        "retention_hours": account.plan(call.policy).retention // timedelta(hours=1),
        "reasons": call.policy.reasons,
        "billing": call.policy.billing_team,
    }


async def _confirm(call: Call, grant: LinkGrant, form: Mapping[str, str]) -> dict[str, Any]:
    account = await cancellation.confirm(
        call, grant.request_id, confirmation_token=None, account_name=form.get("accountName", "")
    )
    return {"account": account, "billing": call.policy.billing_team}


async def _feedback(call: Call, grant: LinkGrant, form: Mapping[str, str]) -> dict[str, Any]:
    reason = form.get("reason", "")
    if reason not in FeedbackReason.__members__:
        raise errors.InvalidInput("Please choose a reason.", field="reason")
    await feedback.submit(call, grant.request_id, reason=FeedbackReason[reason], comment=form.get("comment", ""))
    return {}


async def _restart(call: Call, grant: LinkGrant, form: Mapping[str, str]) -> dict[str, Any]:
    account = await restart.request_restart(call, note=form.get("note", ""))
    return {"account": account, "billing": call.policy.billing_team}


_ACTION = {
    LinkPurpose.CONFIRM: Action.CONFIRM_CANCELLATION,
    LinkPurpose.FEEDBACK: Action.SUBMIT_FEEDBACK,
    LinkPurpose.RESTART: Action.REQUEST_RESTART,
}
_ACT = {LinkPurpose.CONFIRM: _confirm, LinkPurpose.FEEDBACK: _feedback, LinkPurpose.RESTART: _restart}
