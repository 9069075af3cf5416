"""The pages behind emailed links: confirm a cancellation, say why, ask for a restart.

Plain and script-free. A GET shows a form and changes nothing, because mail scanners follow links; the POST acts, with
the link's token as the bearer. A link that is of no use now shows why, and no form. Pages may not be framed, cached,
or leak their address to others.

The token does not stay in the address, which is kept in histories, shown on screens and written to logs: whoever opens
a link is sent on to the same page without it, and a cookie for that page carries it there. The cookie only shows the
form, which has the token in it; nothing is done on the strength of a cookie. Where there is none any more, or the
browser keeps none, the page asks for the link.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping
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
_MAX_FORM_BYTES = 64 * 1024


_COOKIE_LIFETIME: Final = timedelta(minutes=10)
"""For the way from the link to the form, and for coming back to it."""
_TOKEN: Final = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)


def routes(installation: Installation, public_url: str) -> list[Route]:
    """`/links/confirm`, `/links/feedback` and `/links/restart`, which people reach under `public_url`."""
    return [
        Route(
            f"/links/{purpose.value}",
            _page(installation, purpose, _Cookies(public_url, purpose)),
            methods=["GET", "POST"],
        )
        for purpose in LinkPurpose
    ]


def _page(
    installation: Installation, purpose: LinkPurpose, cookies: "_Cookies"
) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        try:
            form = await _form(request) if request.method == "POST" else None
            async with db.deadline(installation.request_timeout):
                token = _token(request, form, cookies)
                if token is None:
                    return _show("links/open.html", {}, status=401)
                identity = await installation.tokens.verify(token)
                grant = identity.grant
                if grant is None or grant.purpose != purpose:
                    raise errors.Unauthenticated("The link is not meant for this page.")
                if form is None and "token" in request.query_params:
                    return cookies.send_on(token)
                call = Call(identity=identity, installation=installation)
                error = None
                if form is not None and "token" in form:
                    try:
                        done = _show(f"links/{purpose.value}_done.html", await _ACT[purpose](call, grant, form))
                        cookies.drop(done, token)
                        return done
                    except (errors.AccountNameMismatch, errors.InvalidInput) as refusal:
                        error = refusal.message
                facts = {"token": token, "error": error, "given": form or {}, **await _facts(call, grant)}
                return _show(f"links/{purpose.value}.html", facts, status=422 if error else 200)
        except errors.Refusal as refusal:
            return _show("links/refused.html", {"message": refusal.message}, status=409)
        except errors.Unauthenticated:
            message = "This link is not valid, or not any more. Use the newest email, or contact the billing team."
            return _show("links/refused.html", {"message": message}, status=401)
        except errors.RequestError as refusal:
            refused = _show("links/refused.html", {"message": refusal.message}, status=refusal.http_status)
            if refusal.retry_after is not None:
                refused.headers["Retry-After"] = str(refusal.retry_after)
            return refused

    return page


def _token(request: Request, form: Mapping[str, str] | None, cookies: "_Cookies") -> str | None:
    """The link's token: of the address or, after that, of the cookie; of a form that was sent or, where the link was
    pasted, out of whatever somebody's mail program has made of it. None where there is none."""
    if form is None:
        return request.query_params.get("token") or cookies.read(request)
    if "token" in form:
        return form["token"]
    pasted = _TOKEN.search("".join(form.get("link", "").split()))
    return pasted[0] if pasted else None


@dataclass(frozen=True)
class _Cookies:
    """Carries a link's token from its address to the page without it. Each link has its own, named after the token's
    hash, which the address keeps: so two links that are open at once never show each other's page, and a cookie that
    somebody else has put there shows none."""

    public_url: str
    purpose: LinkPurpose

    def send_on(self, token: str) -> Response:
        """To the same page without the token, wherever proxies have put it: the way there is relative."""
        link = _hash(token)
        answer = Response(status_code=303, headers={**_HEADERS, "Location": f"{self.purpose.value}?link={link}"})
        lifetime = _COOKIE_LIFETIME // timedelta(seconds=1)
        # Lax: Strict ones do not come back when the way began at a webmail's page.
        answer.set_cookie(_name(link), token, lifetime, **self._where(), httponly=True, samesite="lax")
        return answer

    def read(self, request: Request) -> str | None:
        link = request.query_params.get("link", "")
        token = request.cookies.get(_name(link))
        return token if token is not None and _hash(token) == link else None

    def drop(self, answer: Response, token: str) -> None:
        answer.delete_cookie(_name(_hash(token)), **self._where(), httponly=True, samesite="lax")

    def _where(self) -> dict[str, Any]:
        parts = urlsplit(self.public_url)
        return {"path": f"{parts.path}/links/{self.purpose.value}", "secure": parts.scheme == "https"}


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


def _show(template: str, values: dict[str, Any], *, status: int = 200) -> HTMLResponse:
    return HTMLResponse(_TEMPLATES.get_template(template).render(values), status_code=status, headers=_HEADERS)


async def _facts(call: Call, grant: LinkGrant) -> dict[str, Any]:
    """What the form shows. Refuses what the form would be refused now, except for what is typed into it."""
    caller = await auth.identify(call, grant.account_id)
    account = caller.account
    if account is None:
        raise errors.NotFound("account")
    facts = account.facts(call.policy)
    lifecycle.check(_ACTION[grant.purpose], caller.actor(), facts, caller.now)
    await auth.check_link(_ACTION[grant.purpose], grant)
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
