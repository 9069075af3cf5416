"""The pages behind emailed links: what they show, when they show no form, and that opening them does nothing."""

import asyncio
import html
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import graphql
import httpx2
import pytest

from app import db, limiting, main
from app.errors import Unavailable
from app.graphql.schema import SCHEMA
from app.lifecycle import LinkPurpose
from tests import cast
from tests.actions.test_limiting import link
from tests.api.test_story import links
from tests.cast import ALICE, BILLING, CAROL, CSM, GINA, Stage
from tests.serving import serving

FORM = "<form"


async def confirm_link(house: Stage) -> str:
    """The token of the link by which Gina can confirm the cancellation of Globex."""
    await house.request_cancellation(GINA, "globex")
    await house.request_cancellation(CSM, "globex", note="She is sure.")
    return links((await house.letters())[-1])["confirm"]


async def test_a_confirmation_says_what_will_happen_in_the_policys_numbers(house: Stage) -> None:
    page = await house.client.get("/links/confirm", params={"token": await confirm_link(house)}, follow_redirects=True)
    assert page.status_code == 200
    assert FORM in page.text
    assert "60 days" in page.text
    assert "at once" in page.text


async def test_what_was_typed_wrong_is_shown_again_and_stays_text(house: Stage) -> None:
    token = await confirm_link(house)
    page = await house.client.post("/links/confirm", data={"token": token, "accountName": '"><b>Globex'})
    assert page.status_code == 422
    assert 'value="&#34;&gt;&lt;b&gt;Globex"' in page.text
    assert 'aria-invalid="true"' in page.text


async def test_a_link_that_was_used_shows_why_and_no_form(house: Stage) -> None:
    token = await confirm_link(house)
    await house.client.post("/links/confirm", data={"token": token, "accountName": "Globex"})
    page = await house.client.get("/links/confirm", params={"token": token}, follow_redirects=True)
    assert page.status_code == 403
    assert "The account is canceled" in page.text
    assert FORM not in page.text


async def test_a_link_shows_nothing_to_who_has_lost_the_permission_since(house: Stage) -> None:
    token = await confirm_link(house)
    await db.execute("UPDATE member SET role = 'MEMBER' WHERE email = $1", GINA)
    page = await house.client.get("/links/confirm", params={"token": token}, follow_redirects=True)
    assert page.status_code == 409
    assert "Globex" not in page.text
    assert FORM not in page.text


async def test_a_link_opens_the_page_that_it_is_for_alone(house: Stage) -> None:
    token = await confirm_link(house)
    for path in ("/links/restart", "/links/feedback"):
        page = await house.client.get(path, params={"token": token})
        assert page.status_code == 401
        assert "Globex" not in page.text


# --------------------------------------------------------------------------------------- the token and the address


def cookie(page: httpx2.Response) -> tuple[str, str, dict[str, str]]:
    """Name, value and attributes of the one cookie that an answer sets."""
    [line] = page.headers.get_list("set-cookie")
    pair, *attributes = line.split("; ")
    name, _, value = pair.partition("=")
    return name, value, dict(one.lower().partition("=")[::2] for one in attributes)


def loaded(page: httpx2.Response) -> list[httpx2.URL]:
    """What a browser loads with a page: its style sheets, by their addresses as seen from the page's."""
    return [page.url.join(found) for found in re.findall(r'<link rel="stylesheet" href="([^"]+)">', page.text)]


@asynccontextmanager
async def behind(house: Stage, public_url: str) -> AsyncIterator[httpx2.AsyncClient]:
    """The service as people reach it under that address: a proxy takes the address's path away."""
    settings = cast.settings(
        house.settings.data_dir,
        house.settings.database_url,
        SUNSET_PUBLIC_URL=public_url,
        SUNSET_DEVELOPMENT_ON_NETWORK="true",
    )
    app = main.create_app(settings, house.installation)
    prefix = httpx2.URL(public_url).path.rstrip("/")

    class Proxy(httpx2.ASGITransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            assert request.url.path.startswith(f"{prefix}/")
            url = request.url.copy_with(path=request.url.path.removeprefix(prefix))
            passed_on = httpx2.Request(request.method, url, headers=request.headers, stream=request.stream)
            return await super().handle_async_request(passed_on)

    async with app.router.lifespan_context(app), httpx2.AsyncClient(transport=Proxy(app=app)) as client:
        yield client


@pytest.mark.parametrize(
    "public_url", ["http://localhost:8000", "https://cancel.example.com", "https://example.com/sunset"]
)
async def test_the_token_leaves_the_address_at_once(house: Stage, public_url: str) -> None:
    """Addresses are kept in histories, shown on screens and written to logs. The way on is relative, so that it leads
    to the same page behind any proxy; the cookie is for that page alone, is short-lived, and is shown to no script."""
    token, url = await confirm_link(house), f"{public_url}/links/confirm"
    async with behind(house, public_url) as client:
        opened = await client.get(url, params={"token": token})
        assert opened.status_code == 303
        assert re.fullmatch(r"confirm/[0-9a-f]{32}", opened.headers["location"])
        assert token not in opened.headers["location"] + opened.text
        assert opened.headers["referrer-policy"] == "no-referrer"
        assert opened.headers["cache-control"] == "no-store"
        name, value, attributes = cookie(opened)
        assert value == token
        assert name.endswith(opened.headers["location"].partition("/")[2])
        secure = {"secure": ""} if public_url.startswith("https") else {}
        path = f"{httpx2.URL(public_url).path.rstrip('/')}/links/{opened.headers['location']}"
        assert attributes == {"httponly": "", "samesite": "lax", "max-age": "600", "path": path, **secure}
        assert opened.next_request is not None
        shown = await client.send(opened.next_request)
        assert (str(shown.url), shown.status_code) == (f"{public_url}/links/{opened.headers['location']}", 200)
        assert FORM in shown.text
        assert httpx2.URL(public_url + "/static/sunset.css") in loaded(shown), "its style, from where it stands"
        assert token not in str(shown.url)
        assert "set-cookie" not in shown.headers
        again = await client.get(shown.url)
        assert (again.status_code, FORM in again.text) == (200, True), "it can be loaded again"


async def test_a_head_changes_nothing_and_moves_the_token_too(house: Stage) -> None:
    answer = await house.client.head("/links/confirm", params={"token": await confirm_link(house)})
    assert (answer.status_code, answer.content) == (303, b"")


async def test_without_the_cookie_the_page_asks_for_the_link_and_takes_it_as_it_was_copied(house: Stage) -> None:
    """Mail scanners keep no cookies, and neither do some browsers: nobody is kept from canceling by that."""
    token = await confirm_link(house)
    opened = await house.client.get("/links/confirm", params={"token": token})
    house.client.cookies.clear()
    page = await house.client.get(f"/links/{opened.headers['location']}")
    assert page.status_code == 401
    assert "Open the link once more" in page.text
    assert 'name="link"' in page.text
    assert "Globex" not in page.text
    link = f"https://sunset.example/links/confirm?token={token}"
    wrapped = f"https://safe.mail.example/?url={quote(link, safe='')}&data=a.b.c"
    for pasted in (link, token, f"  {link}\n", f"{link[:90]}\n{link[90:]}", wrapped):
        shown = await house.client.post(f"/links/{opened.headers['location']}", data={"link": pasted})
        assert (shown.status_code, FORM in shown.text) == (200, True), pasted
        assert f'name="token" value="{token}"' in shown.text
        assert "set-cookie" not in shown.headers
    nothing = await house.client.post("/links/confirm", data={"link": "https://sunset.example/links/confirm"})
    assert (nothing.status_code, 'name="link"' in nothing.text) == (401, True)
    forged = await house.client.post("/links/confirm", data={"link": link[:-3]})
    assert (forged.status_code, FORM in forged.text) == (401, False)


@pytest.mark.parametrize("piece", ["eyJ", "eyJa.", "eyJa.b", "eyJ-.", ".", "eyJa.b.", "%", "eyJ "])
def test_looking_for_a_token_takes_no_longer_than_reading(piece: str) -> None:
    """Anybody may send a form. By what looks at each character again for each that may begin a token, this takes
    hours; in a process of its own, since nothing else could stop it."""
    program = (
        f"from app.web.links import find_token; text = {piece!r} * (6_000_000 // {len(piece)}); "
        "found = find_token(text); assert found is None or found.startswith('eyJ'), 'no token'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


async def test_what_is_too_long_for_a_link_is_not_searched(house: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    token = await confirm_link(house)
    near = await house.client.post("/links/confirm", data={"link": f"{'x' * 12_000} {token}"})
    assert (near.status_code, FORM in near.text, token in near.text) == (200, True, True)
    monkeypatch.setattr("app.web.links.find_token", lambda _: pytest.fail("it was searched"))
    far = await house.client.post("/links/confirm", data={"link": f"{'x' * 60_000} {token}"})
    assert (far.status_code, 'name="link"' in far.text) == (401, True)


async def test_the_longest_comment_fits_into_a_form(house: Stage) -> None:
    await house.cancel()
    comment = "\N{GRINNING FACE}" * 5_000
    form = {"token": (await granted(house))["feedback"], "reason": "OTHER", "comment": comment}
    done = await house.client.post("/links/feedback", data=form)
    assert done.status_code == 200
    assert [row["comment"] for row in await db.fetch("SELECT comment FROM feedback")] == [comment]


async def test_however_many_links_were_opened_a_request_carries_the_cookie_of_one(house: Stage) -> None:
    """Admins have many: all cookies together would be more than the server takes, and lock each page."""
    await house.cancel()
    granted = [await link(house, ALICE, purpose=LinkPurpose.RESTART, generation=number) for number in range(60)]
    opened = [await house.client.get("/links/restart", params={"token": token}) for token in granted]
    assert len(house.client.cookies) == 60
    pages = [await house.client.get(f"/links/{one.headers['location']}") for one in opened]
    assert {page.status_code for page in pages} == {200}
    for page, token in zip(pages, granted, strict=True):
        assert page.request.headers["cookie"].count(";") == 0
        assert page.request.headers["cookie"].endswith(f"={token}")
        assert f'name="token" value="{token}"' in page.text
    asking = await house.client.get("/links/restart")
    assert (asking.status_code, "cookie" in asking.request.headers) == (401, False)


@pytest.mark.parametrize("purpose", LinkPurpose)
async def test_an_expired_link_is_told_so_at_once_and_leaves_no_cookie(house: Stage, purpose: LinkPurpose) -> None:
    await house.request_cancellation()
    expired = await link(house, ALICE, purpose=purpose, expires_in=-timedelta(seconds=1))
    page = await house.client.get(f"/links/{purpose.value}", params={"token": expired})
    assert (page.status_code, "not valid" in page.text) == (401, True)
    assert "set-cookie" not in page.headers


async def test_a_form_under_a_links_own_address_is_sent_there_and_shown_again_with_its_style(house: Stage) -> None:
    token = await confirm_link(house)
    page = await house.client.get("/links/confirm", params={"token": token}, follow_redirects=True)
    assert re.findall(r"<form[^>]*>", page.text) == ['<form method="post">'], "to its own address"
    for where, status in ((str(page.url), 422), ("/links/confirm", 422), ("/links/confirm/" + "0" * 32, 422)):
        wrong = await house.client.post(where, data={"token": token, "accountName": "Acme"})
        assert wrong.status_code == status
        [style] = loaded(wrong)
        assert (await house.client.get(style)).headers["content-type"].startswith("text/css")
    smuggled = await house.client.get("/links/confirm/" + "0" * 32, params={"token": token})
    assert (smuggled.status_code, FORM in smuggled.text, token in smuggled.text) == (401, True, False)


@pytest.mark.parametrize("gone", ["removed", "staff", "ungranted"])
async def test_who_may_not_use_a_link_any_more_is_told_in_plain_words(house: Stage, gone: str) -> None:
    token = await confirm_link(house)
    opened = await house.client.get("/links/confirm", params={"token": token})
    if gone == "removed":
        await db.execute("DELETE FROM member WHERE email = $1", GINA)
    elif gone == "staff":
        await db.execute(
            "INSERT INTO staff (id, name, email, role, issuer, subject, created_at) "
            "SELECT id, name, email, 'SUPPORT', issuer, subject, created_at FROM member WHERE email = $1",
            GINA,
        )
    else:
        await db.execute("UPDATE member SET role = 'MEMBER' WHERE email = $1", GINA)
    form = {"token": token, "accountName": "Globex"}
    for page in (
        await house.client.get(f"/links/{opened.headers['location']}"),
        await house.client.post(f"/links/{opened.headers['location']}", data=form),
        await house.client.post("/links/confirm", data={"link": token}),
    ):
        assert page.status_code == (403 if gone == "removed" else 409)
        words = html.unescape(re.sub(r"<[^>]+>", " ", page.text.partition("<main>")[2]))
        billing = house.installation.policy.billing_team
        assert "This link is no longer yours to use." in words
        assert f"write to {billing.name}" in words
        assert f'href="mailto:{billing.email}"' in page.text
        told = re.findall(r"token|permission|admin|service|\bid\b|Globex|Action", words)
        assert told == [], words


async def test_a_pasted_link_is_shown_and_not_acted_upon(house: Stage) -> None:
    """Asking for a restart wants nothing but the token: what shows the form must not send it."""
    await house.cancel()
    token = links(next(one for one in await house.letters() if one["To"].addresses[0].addr_spec == ALICE))["restart"]
    shown = await house.client.post("/links/restart", data={"link": token})
    assert (shown.status_code, FORM in shown.text) == (200, True)
    assert await db.fetch("SELECT 1 FROM restart_request") == []


async def test_a_cookie_alone_does_nothing(house: Stage) -> None:
    """A form on somebody else's page could send it along."""
    token = await confirm_link(house)
    page = await house.client.get("/links/confirm", params={"token": token}, follow_redirects=True)
    assert page.status_code == 200
    assert house.client.cookies
    for form in ({"accountName": "Globex"}, {"accountName": "Globex", "token": ""}, {}):
        done = await house.client.post(str(page.url), data=form)
        assert done.status_code == 401, form
        assert "Globex" not in done.text
    status = await db.fetch("SELECT status FROM account WHERE reference = 'globex'")
    assert [row["status"] for row in status] == ["ACTIVE"]


async def test_two_links_that_are_open_at_once_show_each_its_own_page(house: Stage) -> None:
    """Of one purpose, for two accounts: a click on one must never show the other, in whatever order answers come."""
    await house.cancel()
    await house.request_cancellation(GINA, "globex")
    asked = await house.request_cancellation(CSM, "globex", note="She is sure.")
    letters = await house.letters()
    confirm = links(letters[-1])["confirm"]
    done = await house.do_as(confirm, "confirmCancellation", requestId=asked["request"]["id"], accountName="Globex")
    assert done["__typename"] == "ConfirmCancellationSuccess"
    tokens = {}
    for letter in await house.letters():
        found = links(letter)
        if "restart" in found:
            tokens[letter["To"].addresses[0].addr_spec] = found["restart"]
    first = await house.client.get("/links/restart", params={"token": tokens[ALICE]})
    second = await house.client.get("/links/restart", params={"token": tokens[GINA]})
    for opened, name in ((first, "Acme"), (second, "Globex"), (first, "Acme")):
        page = await house.client.get(f"/links/{opened.headers['location']}")
        assert f"Ask to restart {name}" in page.text


async def test_a_cookie_that_somebody_else_has_put_there_shows_nothing(house: Stage) -> None:
    """A neighbor's page under the same domain may set cookies for this one: it must not change whose form is shown."""
    await house.cancel()
    granted = {
        letter["To"].addresses[0].addr_spec: links(letter)["restart"]
        for letter in await house.letters()
        if "restart" in links(letter)
    }
    opened = await house.client.get("/links/restart", params={"token": granted[ALICE]})
    name, _, _ = cookie(opened)
    house.client.cookies.clear()
    house.client.cookies.set(name, granted[CAROL])
    page = await house.client.get(f"/links/{opened.headers['location']}")
    assert page.status_code == 401
    assert granted[CAROL] not in page.text


async def test_the_cookie_goes_when_the_form_was_sent(house: Stage) -> None:
    token = await confirm_link(house)
    page = await house.client.get("/links/confirm", params={"token": token}, follow_redirects=True)
    wrong = await house.client.post(str(page.url), data={"token": token, "accountName": "Acme"})
    assert (wrong.status_code, len(house.client.cookies)) == (422, 1)
    done = await house.client.post(str(page.url), data={"token": token, "accountName": "Globex"})
    assert (done.status_code, len(house.client.cookies)) == (200, 0)
    _, _, attributes = cookie(done)
    assert attributes["path"] == page.url.path


@pytest.mark.parametrize("purpose", LinkPurpose)
async def test_nothing_is_kept_of_a_token_that_is_not_good_for_the_page(house: Stage, purpose: LinkPurpose) -> None:
    """Nobody's, a caller's own, and one of another page: each is refused where it stands."""
    confirm = await confirm_link(house)
    tokens = ["", "x", "a.b.c", "eyJ.é.c", confirm[:-2], house.token(GINA)]
    tokens += [confirm] if purpose is not LinkPurpose.CONFIRM else []
    for token in tokens:
        page = await house.client.get(f"/links/{purpose.value}", params={"token": token})
        assert page.status_code == 401, token
        assert "set-cookie" not in page.headers
        assert "location" not in page.headers


async def test_a_link_whose_database_is_away_is_kept_for_when_it_is_back(
    house: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = await house.client.get("/links/confirm", params={"token": await confirm_link(house)})
    with monkeypatch.context() as away:

        async def unavailable(*_: object) -> None:
            raise Unavailable("The database cannot be reached.")

        away.setattr(db, "fetch_one", unavailable)
        page = await house.client.get(f"/links/{opened.headers['location']}")
        assert (page.status_code, "retry-after" in page.headers) == (503, True)
    page = await house.client.get(f"/links/{opened.headers['location']}")
    assert (page.status_code, FORM in page.text) == (200, True)


# ------------------------------------------------------------------------- what a link is good for, and until when


async def granted(house: Stage, who: str = ALICE) -> dict[str, str]:
    """The tokens of the newest email to somebody that has links, by purpose."""
    letters = [one for one in await house.letters() if one["To"].addresses[0].addr_spec == who]
    return next(found for one in reversed(letters) if (found := links(one)))


async def restart(house: Stage) -> None:
    done = await house.do(BILLING, "restartAccount", accountId=await house.account_id("acme"))
    assert done["__typename"] == "RestartAccountSuccess"


async def say_why(house: Stage, token: str, request_id: str, selection: str = "") -> dict[str, Any]:
    return await house.do_as(
        token, "submitFeedback", selection, requestId=request_id, reason="TOO_EXPENSIVE", comment="By link"
    )


async def feedback_by_link(house: Stage) -> int:
    return len(await db.fetch("SELECT 1 FROM feedback WHERE comment = 'By link'"))


def everything(kind: graphql.GraphQLNamedType, depth: int) -> str:
    """A selection of all that a type's fields show without arguments, so far down."""
    if isinstance(kind, graphql.GraphQLUnionType):
        return " ".join(f"... on {one.name} {{ {everything(one, depth)} }}" for one in kind.types)
    assert isinstance(kind, graphql.GraphQLObjectType)
    selected = ["__typename"]
    for name, field in kind.fields.items():
        below = graphql.get_named_type(field.type)
        if any(graphql.is_required_argument(argument) for argument in field.args.values()):
            continue
        if graphql.is_leaf_type(below):
            selected.append(name)
        elif depth:
            selected.append(f"{name} {{ {everything(below, depth - 1)} }}")
    return " ".join(selected)


NEW_NAME, NEW_PLAN, NEW_EPOCH = "Canary of the second life", "startup", 7_654_321


async def second_life(house: Stage) -> None:
    """Whatever an account has after the cancellation that a link is about, it has in other values than before."""
    await db.execute(
        "UPDATE account SET name = $1, plan_code = $2, epoch = $3 WHERE reference = 'acme'",
        NEW_NAME,
        NEW_PLAN,
        NEW_EPOCH,
    )


@pytest.mark.parametrize("life", ["canceled", "restarted", "asked again", "canceled again", "closed again"])
@pytest.mark.parametrize("purpose", LinkPurpose)
async def test_the_bearer_of_a_link_reads_nothing_but_what_it_does(
    house: Stage, purpose: LinkPurpose, life: str
) -> None:
    """All that its mutation can answer, in each life of the account: no offers, no feedback but its own, no people."""
    asked = await house.request_cancellation(BILLING, note="Canary of staff.")
    request_id = asked["request"]["id"]
    tokens = await granted(house)
    await house.do(ALICE, "submitFeedback", requestId=request_id, reason="UNUSED", comment="Canary of a colleague.")
    given = {"requestId": request_id, "accountName": "Acme"}
    if purpose is not LinkPurpose.CONFIRM:
        assert (await house.do_as(tokens["confirm"], "confirmCancellation", **given))["__typename"].endswith("Success")
        tokens = await granted(house)
    if life != "canceled":
        if purpose is LinkPurpose.CONFIRM:
            await house.do_as(tokens["confirm"], "confirmCancellation", **given)
        await restart(house)
        await second_life(house)
    if life == "asked again":
        await house.request_cancellation(CAROL)
    if life in {"canceled again", "closed again"}:
        asked_again = await house.request_cancellation(CAROL)
        done = await house.do(
            CAROL,
            "confirmCancellation",
            requestId=asked_again["request"]["id"],
            confirmationToken=asked_again["confirmationToken"],
            accountName=NEW_NAME,
        )
        assert done["__typename"] == "ConfirmCancellationSuccess"
    if life == "closed again":
        now = await db.database_now()
        await db.execute(
            "UPDATE account SET canceled_at = $1, restartable_until = $2, deletion_scheduled_for = $2, "
            "reminder_due_at = NULL WHERE reference = 'acme'",
            now - timedelta(days=60),
            now - timedelta(days=1),
        )
    mutation, own = {
        LinkPurpose.CONFIRM: ("confirmCancellation", given),
        LinkPurpose.FEEDBACK: ("submitFeedback", {"requestId": request_id, "reason": "OTHER", "comment": "By link"}),
        LinkPurpose.RESTART: ("requestRestart", {}),
    }[purpose]
    depth = 2 if purpose is LinkPurpose.CONFIRM else 3  # as far as the API's limits let one mutation go
    kind = SCHEMA._schema.type_map[f"{mutation[0].upper()}{mutation[1:]}Result"]
    document = (
        f"mutation($input: {mutation[0].upper()}{mutation[1:]}Input!) "
        f"{{ done: {mutation}(input: $input) {{ {everything(kind, depth)} }} }}"
    )
    answer = (await house.post(document, {"input": own}, token=tokens[purpose.value])).json()
    expected = "Success" if life == "canceled" else "Error"
    done = (answer["data"] or {}).get("done") or {"__typename": "Error"}
    assert done["__typename"].endswith(expected), answer
    codes = {error["extensions"]["code"] for error in answer.get("errors", ())}
    assert codes <= {"FORBIDDEN", "ACCESS_REMOVED"}
    shown = json.dumps(answer["data"])
    offers = [row["title"] for row in await db.fetch("SELECT DISTINCT title FROM offer")]
    assert offers
    others = [CAROL, "Carol", "bob@", CSM, "Canary", *offers]
    assert [one for one in others if one in shown] == []
    if life == "canceled":
        return

    # The later life, in whatever a client picks of the answer, and in the errors beside it.
    [row] = await db.fetch("SELECT * FROM account WHERE reference = 'acme'")
    dates = [
        db.as_datetime(row[name]).isoformat()[:16]
        for name in ("canceled_at", "restartable_until", "deletion_scheduled_for")
        if row[name] is not None and (name != "canceled_at" or life == "closed again")  # else it is just now, as all
    ]
    plan = house.installation.policy.plans[NEW_PLAN].name
    selections = [everything(kind, depth), everything(kind, 0)]
    selections += [
        f"... on {error} {{ message {field} {{ {selected} }} }}"
        for error, field in (("AccountStateError", "account"), ("RequestStateError", "request"))
        for selected in (
            "id name status epoch plan { code name } allowedActions { action allowed reason }"
            if field == "account"
            else "id status account { name status epoch plan { name } allowedActions { action reason } }",
        )
    ]
    selections.append("... on RequestStateError { request { id status planCode } }")
    for selection in selections:
        document = (
            f"mutation($input: {mutation[0].upper()}{mutation[1:]}Input!) "
            f"{{ done: {mutation}(input: $input) {{ __typename ... on UserError {{ message }} {selection} }} }}"
        )
        answer = (await house.post(document, {"input": own}, token=tokens[purpose.value])).json()
        assert "data" in answer, answer
        found = json.dumps(answer)
        for canary in (
            NEW_NAME,
            str(NEW_EPOCH)[:6],
            f'"{plan}"',
            f'"{NEW_PLAN}"',
            '"epoch"',
            'allowedActions": [',
            *dates,
        ):
            assert canary not in found.replace('"path": ["done"', ""), (selection, canary)
        assert not re.search(r'"status": "(ACTIVE|CANCELED|PENDING_CONFIRMATION|HELD)"', found)


async def test_a_confirmation_repeated_with_its_key_by_an_old_link_shows_nothing_of_what_came_after(
    house: Stage,
) -> None:
    """The key gives the first answer again while the cancellation stands; then it would show another life."""
    asked = await house.request_cancellation(BILLING, note="They called.")
    token = (await granted(house))["confirm"]
    given = {"requestId": asked["request"]["id"], "accountName": "Acme", "idempotencyKey": "once"}
    selection = "... on ConfirmCancellationSuccess { account { name status } } ... on UserError { message }"
    done = await house.do_as(token, "confirmCancellation", selection, **given)
    assert done["account"] == {"name": "Acme", "status": "CANCELED"}
    await restart(house)
    await second_life(house)
    again = await house.do_as(token, "confirmCancellation", selection, **given)
    assert again["__typename"] == "RequestStateError"
    assert NEW_NAME not in json.dumps(again)


async def test_a_feedback_link_ends_with_the_cancellation_that_it_is_about(house: Stage) -> None:
    """A restart ends it, and the account's next cancellation has links of its own: nothing is added to what is over."""
    first = (await house.cancel())["request"]["id"]
    old = (await granted(house))["feedback"]
    assert (await say_why(house, old, first))["__typename"] == "SubmitFeedbackSuccess"
    await restart(house)
    refused = await say_why(house, old, first, "... on AccountStateError { message }")
    assert (refused["__typename"], "is over" in refused["message"]) == ("AccountStateError", True)
    page = await house.client.get("/links/feedback", params={"token": old}, follow_redirects=True)
    assert (page.status_code, FORM in page.text) == (409, False)

    asked = await house.request_cancellation()
    assert (await say_why(house, old, first))["__typename"] == "AccountStateError"
    again = await house.cancel()
    second = again["request"]["id"]
    assert second == asked["request"]["id"]
    refused = await say_why(house, old, first, "... on RequestStateError { request { id status } }")
    assert refused["__typename"] == "RequestStateError"
    assert refused["request"] == {"id": first, "status": "REVERTED"}
    assert "newest email" in refused["message"]
    assert (await say_why(house, old, second))["__typename"] == "NotFoundError"
    posted = await house.client.post("/links/feedback", data={"token": old, "reason": "OTHER"})
    assert posted.status_code == 409
    assert await feedback_by_link(house) == 1

    new = (await granted(house))["feedback"]
    assert (await say_why(house, new, second))["__typename"] == "SubmitFeedbackSuccess"
    assert await feedback_by_link(house) == 2


async def test_feedback_by_link_loses_against_a_restart_that_commits_before_it(
    house: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read before the account was locked does not count."""
    first = (await house.cancel())["request"]["id"]
    link = (await granted(house))["feedback"]
    admit = limiting.admit

    async def meanwhile(*args: Any, **given: Any) -> None:
        await admit(*args, **given)
        monkeypatch.setattr(limiting, "admit", admit)
        await restart(house)
        await house.cancel()

    monkeypatch.setattr(limiting, "admit", meanwhile)
    assert (await say_why(house, link, first))["__typename"] == "RequestStateError"
    assert await feedback_by_link(house) == 0


@pytest.mark.parametrize("purpose", LinkPurpose)
async def test_a_link_of_an_earlier_cancellation_shows_no_form(house: Stage, purpose: LinkPurpose) -> None:
    """Sending it would be refused: the page says so before anybody has written anything."""
    await house.request_cancellation(BILLING, note="They called.")
    tokens = await granted(house)
    if purpose is LinkPurpose.CONFIRM:
        await house.do(ALICE, "withdrawCancellation", accountId=await house.account_id("acme"))
        await house.request_cancellation(BILLING, note="They called again.")
    else:
        await house.cancel()
        tokens = await granted(house)
        await restart(house)
        await house.cancel(CAROL)
    path = f"/links/{purpose.value}"
    page = await house.client.get(path, params={"token": tokens[purpose.value]}, follow_redirects=True)
    assert (page.status_code, FORM in page.text) == (409, False)
    assert "newest email" in page.text
    tokens = await granted(house)
    page = await house.client.get(path, params={"token": tokens[purpose.value]}, follow_redirects=True)
    assert (page.status_code, FORM in page.text) == (200, True)


# ------------------------------------------------------------------------------------------------------------ nginx


@contextmanager
def nginx(folder: Path) -> Iterator[None]:
    process = subprocess.Popen(["nginx", "-c", folder / "nginx.conf", "-e", folder / "start.log"])
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
async def test_nginx_logs_no_token_with_the_format_of_the_readme(house: Stage, tmp_path: Path) -> None:
    """Neither of what is shown, nor of what fails because the service behind it is gone."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    [told] = [block for block in re.findall(r"```nginx\n(.*?)```", readme, re.DOTALL) if "log_format" in block]
    folder = tmp_path / "nginx"
    folder.mkdir(mode=0o777)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = await confirm_link(house)

    async with serving(house.app, house.installation.changes) as served:
        block = told.replace("/var/log/nginx", str(folder)).replace("127.0.0.1:8001", f"127.0.0.1:{served.port}")
        block = block.replace("server {", f"server {{ listen 127.0.0.1:{port};")
        temporary = "".join(f"{kind}_temp_path {folder}/{kind}; " for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
        (folder / "nginx.conf").write_text(
            f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log crit; events {{}}\n"
            f"http {{ access_log off; client_body_temp_path {folder}/body; {temporary}\n{block} }}\n"
        )
        with nginx(folder):
            async with asyncio.timeout(60), httpx2.AsyncClient(follow_redirects=True) as browser:
                while True:
                    try:
                        page = await browser.get(f"http://127.0.0.1:{port}/links/confirm", params={"token": token})
                        break
                    except httpx2.ConnectError:  # it is just starting
                        await asyncio.sleep(0.02)
                assert (page.status_code, FORM in page.text) == (200, True)
                assert [one.status_code for one in page.history] == [303]
                await served.stop()
                gone = await browser.get(f"http://127.0.0.1:{port}/links/confirm", params={"token": token})
                assert gone.status_code == 502
    access = (folder / "access.log").read_text()
    assert re.findall(r'"GET (\S+) HTTP/1\.1" (\d+)', access) == [
        ("/links/confirm", "303"),
        (page.url.path, "200"),
        ("/links/confirm", "502"),
    ]
    logged = "".join(file.read_text() for file in folder.glob("*.log"))
    assert token[:20] not in logged
    assert "?" not in logged
