"""The gate: a clear yes, and a no for everything else, from the first call after the commit on."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote, unquote

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import db, provisioning
from app.db import Database
from app.main import create_app
from tests import cast
from tests.cast import ALICE, BILLING, GATEKEEPER, HOST, Stage
from tests.postgres import PostgresServer
from tests.raw import begin, request, say
from tests.serving import serving


@pytest.fixture
async def one_house(sqlite_database: Database, tmp_path: Path) -> AsyncIterator[Stage]:
    """The service where the engine makes no difference."""
    async with cast.stage(sqlite_database, tmp_path) as running:
        yield running


def bearer(house: Stage, who: str = GATEKEEPER) -> dict[str, str]:
    return {"Authorization": f"Bearer {house.token(who)}"}


async def ask(house: Stage, path: str, who: str = GATEKEEPER, **headers: str) -> httpx2.Response:
    return await house.client.get(f"/gate/{path}", headers=bearer(house, who) | headers)


async def test_an_open_account_may_send_and_its_members_sign_in(house: Stage) -> None:
    answer = await ask(house, "accounts/acme")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {
        "reference": "acme",
        "status": "ACTIVE",
        "epoch": 0,
        "canSendMessages": True,
        "membersCanSignIn": True,
    }


async def test_the_first_call_after_the_cancellation_says_no_and_after_the_restart_yes(house: Stage) -> None:
    done = await house.cancel()
    canceled = (await ask(house, "accounts/acme")).json()
    assert (canceled["status"], canceled["epoch"]) == ("CANCELED", 1)
    assert (canceled["canSendMessages"], canceled["membersCanSignIn"]) == (False, False)
    for question in ("messages", "members"):
        assert (await ask(house, f"{question}/acme")).status_code == 403
    await house.do(BILLING, "restartAccount", accountId=done["account"]["id"])
    restarted = (await ask(house, "accounts/acme")).json()
    assert (restarted["epoch"], restarted["canSendMessages"]) == (2, True)


@pytest.mark.parametrize("question", ["messages", "members"])
async def test_the_bare_form_has_a_status_and_no_body(house: Stage, question: str) -> None:
    yes, no = await ask(house, f"{question}/acme"), await ask(house, f"{question}/nobody")
    assert (yes.status_code, yes.content) == (204, b"")
    assert (no.status_code, no.content) == (403, b"")
    for one in (yes, no):
        assert one.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("question", ["messages", "members"])
async def test_the_path_alone_names_the_account(house: Stage, question: str) -> None:
    """Nobody is let in by a header, and one that a client adds keeps out who adds it."""
    await house.cancel()
    for name in ("X-Account-Reference", "x-account-reference"):
        assert (await ask(house, f"{question}/acme", **{name: "globex"})).status_code == 403
        assert (await ask(house, f"{question}/globex", **{name: "globex"})).status_code == 403
        for path in (question, f"{question}/", f"{question}/any/path?of=the&original=request"):
            answer = await ask(house, path, **{name: "globex"})
            assert (answer.status_code, answer.content) == (403, b"")
    assert (await ask(house, f"{question}/globex", X_Account_Reference="acme")).status_code == 204


@pytest.mark.parametrize("question", ["messages", "members"])
async def test_what_is_more_than_a_name_in_the_path_is_a_no(one_house: Stage, question: str) -> None:
    """And never a failure, of which a proxy would make one of its own: acme, by the ways of writing it that somebody
    on the way may read otherwise."""
    house = one_house
    route = b"/gate/" + question.encode()
    await db.execute("UPDATE account SET reference = '..' WHERE reference = 'initech'")
    async with serving(house.app, house.installation.changes) as served:
        told = f"Authorization: Bearer {house.token(GATEKEEPER)}".encode()

        async def status(target: bytes, *headers: bytes, method: bytes = b"GET") -> int:
            answer = await say(served.port, request(target, told, *headers, method=method))
            assert answer.status == 404 or answer.body == b"", target
            return answer.status

        assert await status(route + b"/acme") == 204
        assert await status(b"http://sunset.example" + route + b"/acme") == 204
        for name in MISLEADING:
            assert await status(route + name) == 403, name
        for target in (
            b"/gate/%2e/" + question.encode() + b"/acme",
            b"/gate%2f" + question.encode() + b"/acme",
            b"/gate/%6d" + question[1:].encode() + b"/acme",
            b"/gate//" + question.encode() + b"/acme",
            b"//gate/" + question.encode() + b"/acme",
            b"/x/.." + route + b"/acme",
        ):
            assert await status(target) in {403, 404}, target
        for method in (b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH"):
            assert await status(route + b"/acme", b"Content-Length: 0", method=method) == 204
            assert await status(route + b"/nobody", b"Content-Length: 0", method=method) == 403


MISLEADING = [
    b"",
    b"/",
    b"acme",
    b"//acme",
    b"/acme/",
    b"/acme//",
    b"/./acme",
    b"/../" + b"members/acme",
    b"/acme/..",
    b"/nobody/../acme",
    b"/acme?",
    b"/acme?x",
    b"/acme?/acme",
    b"/acme#",
    b"/acme#x",
    b"/acme#/acme",
    b"/acme%3f",
    b"/acme%3Fx",
    b"/acme%23",
    b"/acme%23x",
    b"/acme%0a",
    b"/acme%0d%0a",
    b"/acme%0d%0aX-Account-Reference:%20globex",
    b"/%0aacme",
    b"/acme%00",
    b"/acme%7f",
    b"/acme%c2%85",
    b"/acme%e2%80%a8",
    b"/acme%2f",
    b"/%2facme",
    b"%2facme",
    b"%2Facme",
    b"/nobody%2f..%2facme",
    b"/acme%5c",
    b"/acme\\",
    b"/.",
    b"/..",
    b"/%2e",
    b"/%2e%2e",
    b"/%61cme",
    b"/acm%65",
    b"/%2561cme",
    b"/acme%",
    b"/acme%2",
    b"/acme%zz",
    b"/acme%ff",
    b"/acme%c3",
    b"/acme%20",
    b"/%20acme",
    b"/" + b"x" * 201,
    b"/" + b"x" * 5_000,
    b"/" + b"%C3%A4" * 201,
]


@pytest.mark.parametrize("reference", ["a/b", "a?b", "a#b", "100%", "%61", "a\\b", ".", "..", "a\nb", "a\x7f"])
async def test_a_name_that_a_path_may_be_misread_for_is_a_no_even_if_an_account_has_it(
    one_house: Stage, reference: str
) -> None:
    """It is asked about in JSON, or by header."""
    await db.execute("UPDATE account SET reference = $1 WHERE reference = 'acme'", reference)
    escaped = quote(reference, safe="").replace(".", "%2E")
    assert (await ask(one_house, f"members/{escaped}")).status_code == 403
    if reference.isprintable():
        assert (await ask(one_house, f"accounts/{escaped}")).json()["membersCanSignIn"] is True
        assert (await ask_by_header(one_house, reference.encode())).status_code == 200


@pytest.mark.parametrize("reference", ["Zoë & Söhne", "acme:eu@1", "a,b;c=d", "~a_b-c.d", "日本", "x" * 200, "ä" * 200])
async def test_other_names_are_named_by_the_path_encoded_where_they_must_be(one_house: Stage, reference: str) -> None:
    await db.execute("UPDATE account SET reference = $1 WHERE reference = 'acme'", reference)
    for safe in ("", "!$&'()*+,;=:@"):
        assert (await ask(one_house, f"members/{quote(reference, safe=safe)}")).status_code == 204
        assert (await ask(one_house, f"members/{quote(reference, safe=safe).lower()}")).status_code == (
            204 if reference.lower() == reference else 403
        )


async def test_the_json_form_reads_the_path_as_it_was_sent(one_house: Stage) -> None:
    for name in ("acme%0a", "%0aacme", "acme%00", "%ff", "", "x" * 201):
        answer = await ask(one_house, f"accounts/{name}")
        assert answer.status_code == 400
        assert "reference" in answer.json()["error"]
    for name in ("acme/", "/acme", "acme%20", "acme%2F"):
        answer = await one_house.client.get(
            httpx2.URL("http://sunset.test", raw_path=f"/gate/accounts/{name}".encode()), headers=bearer(one_house)
        )
        assert (answer.json()["reference"], answer.json()["membersCanSignIn"]) == (unquote(name), False)


# -------------------------------------------------------------------------------------------------- named by a header


async def ask_by_header(
    house: Stage, *values: bytes, path: str = "members-by-header", method: str = "GET", who: str = GATEKEEPER
) -> httpx2.Response:
    headers = [(b"Authorization", f"Bearer {house.token(who)}".encode())]
    return await house.client.request(
        method, f"/gate/{path}", headers=headers + [(b"X-Account-Reference", value) for value in values]
    )


@pytest.mark.parametrize("question", ["messages", "members"])
async def test_the_header_alone_names_the_account(house: Stage, question: str) -> None:
    """Yes is 200 here: Envoy takes nothing else for one. It asks with the visitor's method and path behind its own."""
    await house.cancel()
    route = f"{question}-by-header"
    for path in ("", "/", "/app/acme/home", "/acme", "/globex", "?account=acme", "/a%0Ab%2F..%2F%FF?x=%0d%0a#c", "//"):
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"):
            yes = await ask_by_header(house, b"globex", path=route + path, method=method)
            no = await ask_by_header(house, b"acme", path=route + path, method=method)
            assert (yes.status_code, yes.content, yes.headers["cache-control"]) == (200, b"", "no-store")
            assert (no.status_code, no.content) == (403, b"")


@pytest.mark.parametrize(
    "values",
    [
        [],
        [b""],
        [b"acme", b"acme"],
        [b"acme", b"globex"],
        [b"acme", b""],
        [b"", b"acme"],
        [b"acme,acme"],
        [b"acme, globex"],
        [b"acme,"],
        [b",acme"],
        [b"%61cme"],
        [b"acme\xff"],
        ["Zoë".encode("latin-1")],
        [b"acme\x0b"],
        [b"acme\x7f"],
        [b"acme\xc2\x85"],
        [b"acme\xe2\x80\xa8"],
        [b"x" * 201],
        [b"*"],
        [b"%"],
    ],
)
async def test_a_header_that_does_not_name_one_account_is_a_no(one_house: Stage, values: list[bytes]) -> None:
    await db.execute("UPDATE account SET reference = 'Zoë' WHERE reference = 'globex'")
    answer = await ask_by_header(one_house, *values)
    assert (answer.status_code, answer.content) == (403, b"")


async def test_a_name_with_a_comma_cannot_be_told_from_two_by_a_header(one_house: Stage) -> None:
    await db.execute("UPDATE account SET reference = 'acme, globex' WHERE reference = 'initech'")
    assert (await ask_by_header(one_house, b"acme, globex")).status_code == 403
    assert (await ask(one_house, "members/acme,%20globex")).status_code == 204


@pytest.mark.parametrize("reference", ["Zoë & Söhne", "a/b c", "ärger?&#%", "100%", "%61", "..", "ä" * 200])
async def test_a_header_is_read_as_it_stands_there(one_house: Stage, reference: str) -> None:
    await db.execute("UPDATE account SET reference = $1 WHERE reference = 'acme'", reference)
    assert (await ask_by_header(one_house, reference.encode())).status_code == 200
    assert (await ask_by_header(one_house, quote(reference, safe="").replace(".", "%2E").encode())).status_code == 403
    async with serving(one_house.app, one_house.installation.changes) as served:
        told = f"Authorization: Bearer {one_house.token(GATEKEEPER)}".encode()
        spaced = b"x-ACCOUNT-reference: \t" + reference.encode() + b" \t "
        assert (await say(served.port, request(b"/gate/members-by-header", told, spaced))).status == 200


@pytest.mark.parametrize(
    "path", ["members-by-header", "messages-by-header/app/acme", "members/", "members/a%0a", "members/a%2Fb"]
)
async def test_who_may_not_ask_is_refused_whatever_they_name(one_house: Stage, path: str) -> None:
    for who in (ALICE, BILLING, HOST):
        answer = await ask_by_header(one_house, b"acme", path=path, who=who)
        assert answer.status_code == 403
        assert "gate" in answer.json()["error"]
    answer = await one_house.client.get(f"/gate/{path}", headers={"X-Account-Reference": "acme"})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


async def test_each_call_is_counted_by_its_answer(one_house: Stage) -> None:
    async def counted() -> dict[str, float]:
        text = (await one_house.client.get("/metrics")).text
        return {
            one.labels["answer"]: one.value
            for family in text_string_to_metric_families(text)
            for one in family.samples
            if one.name == "sunset_gate_total"
        }

    before = await counted()
    for path in ("members/acme", "accounts/acme"):
        await ask(one_house, path)  # yes
    await ask_by_header(one_house, b"acme")  # yes
    for path in ("members/nobody", "members/acme%2F", "members-by-header"):
        await ask(one_house, path)  # no
    await ask_by_header(one_house, b"acme", b"acme")  # no
    for path in ("accounts/%0A", "members/acme"):
        await ask(one_house, path, HOST if "acme" in path else GATEKEEPER)  # refused
    await one_house.client.post("/gate/accounts", content=b"[]", headers=bearer(one_house))  # refused
    many = {"references": ["acme", "globex", "nobody"]}
    await one_house.client.post("/gate/accounts", json=many, headers=bearer(one_house))  # yes, yes, no
    after = await counted()
    assert {answer: after[answer] - before.get(answer, 0) for answer in after} == {
        "yes": 5,
        "no": 5,
        "refused": 3,
        **({"unavailable": 0} if "unavailable" in after else {}),
    }


async def test_an_account_that_nobody_knows_is_a_no(house: Stage) -> None:
    answer = (await ask(house, "accounts/nobody")).json()
    assert answer == {
        "reference": "nobody",
        "status": None,
        "epoch": None,
        "canSendMessages": False,
        "membersCanSignIn": False,
    }


async def test_a_scheduled_cancellation_is_a_no_from_its_moment_on(house: Stage) -> None:
    """Also when no worker has carried it out."""
    await db.execute(
        f"UPDATE account SET status = 'CANCELLATION_SCHEDULED', cancellation_effective_at = {db.now_sql()} "
        "WHERE reference = 'acme'"
    )
    answer = (await ask(house, "accounts/acme")).json()
    assert (answer["status"], answer["canSendMessages"]) == ("CANCELLATION_SCHEDULED", False)


@pytest.mark.parametrize("reference", ["a/b c", "ärger?&#%", "100%", "..", "x" * 200])
async def test_any_reference_can_be_asked_about(house: Stage, reference: str) -> None:
    await db.execute("UPDATE account SET reference = $1 WHERE reference = 'acme'", reference)
    if reference != "..":  # a path that clients take away before it is sent
        answer = (await ask(house, f"accounts/{quote(reference, safe='')}")).json()
        assert (answer["reference"], answer["canSendMessages"]) == (reference, True)
    many = await house.client.post("/gate/accounts", json={"references": [reference]}, headers=bearer(house))
    assert many.json()["accounts"][0]["canSendMessages"] is True


async def test_many_are_answered_in_the_order_asked(house: Stage) -> None:
    await house.cancel()
    asked = ["globex", "nobody", "acme", "globex"]
    answer = await house.client.post("/gate/accounts", json={"references": asked}, headers=bearer(house))
    assert [(one["reference"], one["canSendMessages"]) for one in answer.json()["accounts"]] == [
        ("globex", True),
        ("nobody", False),
        ("acme", False),
        ("globex", True),
    ]
    thousand = [f"nobody-{number}" for number in range(999)] + ["globex"]
    answer = await house.client.post("/gate/accounts", json={"references": thousand}, headers=bearer(house))
    assert [one["canSendMessages"] for one in answer.json()["accounts"]] == [False] * 999 + [True]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"references": "acme"}',
        b'{"references": [7]}',
        b'{"references": []}',
        b"\xff",
        b'{"references": ["a\\u0000"]}',
        b'{"references": ["' + b"x" * 201 + b'"]}',
        b'{"references": [""]}',
        b'{"references": [' + b",".join([b'"a"'] * 1_001) + b"]}",
    ],
)
async def test_a_list_that_cannot_be_read_is_refused(house: Stage, body: bytes) -> None:
    answer = await house.client.post("/gate/accounts", content=body, headers=bearer(house))
    assert answer.status_code == 400
    assert answer.json()["error"]


async def test_a_list_that_is_too_large_is_refused(house: Stage) -> None:
    answer = await house.client.post("/gate/accounts", content=b" " * 600_000, headers=bearer(house))
    assert answer.status_code == 413


async def test_who_may_not_ask_is_told_so_before_a_body_is_read(one_house: Stage) -> None:
    """It never comes here, and they are answered all the same. The same holds for a body that is too large."""
    async with serving(one_house.app, one_house.installation.changes) as served:

        async def status(token: str, size: int, *headers: bytes) -> int:
            told = [f"Authorization: Bearer {token}".encode(), f"Content-Length: {size}".encode(), *headers]
            return (await begin(served.port, request(b"/gate/accounts", *told, method=b"POST", body=b'{"ref'))).status

        for size in (10, 500_000, 600_000, 10_000_000_000):
            assert await status("nonsense", size) == 401
            assert await status(one_house.token(HOST), size) == 403
            assert await status(one_house.token(ALICE), size) == 403
        assert await status(one_house.token(GATEKEEPER), 524_289) == 413
        assert await status(one_house.token(GATEKEEPER), 10_000_000_000) == 413
        assert await status("nonsense", 500_000, b"Expect: 100-continue") == 401
        assert await status(one_house.token(GATEKEEPER), 500_000, b"Expect: 100-continue") == 100


@pytest.mark.parametrize("character", ["x", "ä"])
async def test_a_thousand_of_the_longest_names_are_answered(one_house: Stage, character: str) -> None:
    asked = [f"{number:03}" + character * 197 for number in range(1_000)]
    answer = await one_house.client.post("/gate/accounts", json={"references": asked}, headers=bearer(one_house))
    assert [one["reference"] for one in answer.json()["accounts"]] == asked


@pytest.mark.parametrize("who", [ALICE, BILLING, HOST])
async def test_only_a_service_with_the_scope_may_ask(house: Stage, who: str) -> None:
    for path in ("accounts/acme", "messages/acme", "members/acme", "accounts/nobody"):
        answer = await ask(house, path, who)
        assert answer.status_code == 403
        assert "gate" in answer.json()["error"]
    many = await house.client.post("/gate/accounts", json={"references": ["acme"]}, headers=bearer(house, who))
    assert many.status_code == 403


async def test_a_service_that_was_deactivated_may_not_ask_any_more(house: Stage) -> None:
    assert (await ask(house, "members/acme")).status_code == 204
    await provisioning.deactivate_service(GATEKEEPER)
    assert (await ask(house, "members/acme")).status_code == 403


async def test_a_scope_is_a_word_of_its_own(house: Stage) -> None:
    await db.execute("UPDATE service SET scopes = 'gateway mygate' WHERE name = $1", GATEKEEPER)
    assert (await ask(house, "members/acme")).status_code == 403
    await db.execute("UPDATE service SET scopes = 'deletion gate' WHERE name = $1", GATEKEEPER)
    assert (await ask(house, "members/acme")).status_code == 204


@pytest.mark.parametrize("header", [{}, {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer nonsense"}])
async def test_without_a_valid_token_it_is_a_no(house: Stage, header: dict[str, str]) -> None:
    answer = await house.client.get("/gate/members/acme", headers=header)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.postgres
async def test_it_fails_closed_while_the_database_is_away_and_then_goes_on(
    postgres_house: Stage, postgres_server: PostgresServer
) -> None:
    if not postgres_server.can_restart:
        pytest.skip("the server is somebody else's")
    assert (await ask(postgres_house, "members/acme")).status_code == 204
    await asyncio.to_thread(postgres_server.stop)
    try:
        for path in ("members/acme", "accounts/acme"):
            answer = await ask(postgres_house, path)
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
    finally:
        await asyncio.to_thread(postgres_server.start)
    assert (await ask(postgres_house, "members/acme")).status_code == 204


@pytest.mark.postgres
async def test_no_call_after_the_commit_says_yes_in_any_process(postgres_house: Stage, tmp_path: Path) -> None:
    """Calls race the commit, on the application that commits and on another one with connections of its own. Whoever
    has seen the answer of the confirmation never sees a yes again."""
    async with other_process(postgres_house) as other:
        for reference, name, who in (
            ("acme", "Acme", ALICE),
            ("initech", "Initech", "ingrid@initech.example"),
        ):
            committed = asyncio.Event()
            after: list[int] = []

            async def call(client: httpx2.AsyncClient, *, path: str, done: asyncio.Event, seen: list[int]) -> None:
                for _ in range(40):
                    was_committed = done.is_set()
                    answer = await client.get(path, headers=bearer(postgres_house))
                    assert answer.status_code in {204, 403}
                    if was_committed:
                        seen.append(answer.status_code)

            async def confirm(*, who: str, reference: str, name: str, done: asyncio.Event) -> None:
                answer = await postgres_house.cancel(who, reference, name)
                assert answer["account"]["status"] == "CANCELED"
                done.set()

            path = f"/gate/members/{reference}"
            await asyncio.gather(
                confirm(who=who, reference=reference, name=name, done=committed),
                *(
                    call(client, path=path, done=committed, seen=after)
                    for client in (postgres_house.client, other)
                    for _ in range(4)
                ),
            )
            for client in (postgres_house.client, other):
                await call(client, path=path, done=committed, seen=after)
            assert set(after) == {403}


@contextlib.asynccontextmanager
async def other_process(house: Stage) -> AsyncIterator[httpx2.AsyncClient]:
    """A second application with a database pool of its own, as another process has it."""
    app = create_app(house.settings, house.installation)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://other.test") as client,
    ):
        yield client
