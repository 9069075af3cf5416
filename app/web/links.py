"""The pages behind emailed links: confirm a cancellation, say why, ask for a restart.

Plain and script-free. A GET shows a form and changes nothing, because mail scanners follow links; the POST acts, with
the link's token as the bearer. A link that is of no use now shows why, and no form. Pages may not be framed, cached,
or leak their address to others.
"""

from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse
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


def routes(installation: Installation) -> list[Route]:
    """`/links/confirm`, `/links/feedback` and `/links/restart`."""
    return [
        Route(f"/links/{purpose.value}", _page(installation, purpose), methods=["GET", "POST"])
        for purpose in LinkPurpose
    ]


def _page(installation: Installation, purpose: LinkPurpose) -> Callable[[Request], Awaitable[HTMLResponse]]:
    async def page(request: Request) -> HTMLResponse:
        try:
            form = await _form(request) if request.method == "POST" else None
            async with db.deadline(installation.request_timeout):
                token = form.get("token", "") if form is not None else request.query_params.get("token", "")
                identity = await installation.tokens.verify(token)
                grant = identity.grant
                if grant is None or grant.purpose != purpose:
                    raise errors.Unauthenticated("The link is not meant for this page.")
                call = Call(identity=identity, installation=installation)
                error = None
                if form is not None:
                    try:
                        return _show(f"links/{purpose.value}_done.html", await _ACT[purpose](call, grant, form))
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
