"""What can be asked: lists that page, sort and filter the same on each engine, at a cost that does not grow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app import accounts, db
from app.db import Database, uuid7
from app.graphql import nodes
from app.graphql.nodes import Kind
from app.lifecycle import MemberRole, Permission
from app.models import Account, Member
from app.tokens import DEVELOPMENT_ISSUER
from tests.cast import ALICE, BILLING, BOB, CAROL, CSM, GATEKEEPER, GINA, SUPPORT, Stage, subject

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
DANA = "dana@advisors.example"


async def add(reference: str, name: str, *, plan: str = "startup", members: int = 0, **more: Any) -> Account:
    account = await Account.create(
        id=uuid7(), reference=reference, name=name, plan_code=plan, created_at=more.pop("created_at", BEGIN), **more
    )
    for index in range(members):
        email = f"{reference}-{index}@many.example"
        await Member.create(
            id=uuid7(),
            account_id=account.id,
            issuer=DEVELOPMENT_ISSUER,
            subject=subject(email),
            email=email,
            name=email,
            role=MemberRole.ADMIN,
            permissions=frozenset(),
            created_at=BEGIN,
        )
    return account


async def listed(house: Stage, arguments: str = "", who: str = SUPPORT) -> list[str]:
    """The references of a list of accounts."""
    given = f"({arguments})" if arguments else ""
    answer = await house.ask(who, f"{{ accounts{given} {{ edges {{ node {{ reference }} }} }} }}")
    return [edge["node"]["reference"] for edge in answer["data"]["accounts"]["edges"]]


async def pages(house: Stage, arguments: str, size: int) -> list[list[str]]:
    """The same, page by page to the end."""
    found: list[list[str]] = []
    after: str | None = None
    while True:
        answer = await house.ask(
            SUPPORT,
            f"query($after: String) {{ accounts({arguments}, first: {size}, after: $after) {{ edges {{ cursor node "
            "{ reference } } pageInfo { hasNextPage hasPreviousPage startCursor endCursor } } }",
            after=after,
        )
        page = answer["data"]["accounts"]
        info, edges = page["pageInfo"], page["edges"]
        assert info["hasPreviousPage"] is bool(found)
        assert [info["startCursor"], info["endCursor"]] == [edges[0]["cursor"], edges[-1]["cursor"]]
        found.append([edge["node"]["reference"] for edge in edges])
        if not info["hasNextPage"]:
            return found
        after = info["endCursor"]


async def code(house: Stage, who: str, document: str) -> str:
    """The code of the only error."""
    (error,) = (await house.ask(who, document))["errors"]
    found: str = error["extensions"]["code"]
    return found


class TestAccounts:
    @pytest.mark.parametrize("direction", ["ASC", "DESC"])
    @pytest.mark.parametrize("field", ["NAME", "CREATED_AT"])
    async def test_are_paged_without_gap_or_repetition_though_all_sort_alike(
        self, house: Stage, field: str, direction: str
    ) -> None:
        for index in range(7):
            await add(f"same-{index}", "Same")
        arguments = f'search: "same-", sort: {{field: {field}, direction: {direction}}}'
        found = await pages(house, arguments, 3)
        assert [len(page) for page in found] == [3, 3, 1]
        references = [reference for page in found for reference in page]
        assert sorted(references) == [f"same-{index}" for index in range(7)]
        assert references == await listed(house, arguments)

    async def test_that_come_and_go_between_pages_move_nobody_else(self, house: Stage) -> None:
        for name in ("b", "c", "d", "e"):
            await add(f"row-{name}", name)
        first = await house.ask(
            SUPPORT, '{ accounts(search: "row-", first: 2) { edges { node { reference } } pageInfo { endCursor } } }'
        )
        await add("row-a", "a")
        await db.execute("DELETE FROM account WHERE reference = 'row-b'")
        after = first["data"]["accounts"]["pageInfo"]["endCursor"]
        assert await listed(house, f'search: "row-", after: "{after}"') == ["row-d", "row-e"]

    async def test_are_sorted_by_code_points_on_each_engine(self, house: Stage, database: Database) -> None:
        if database.dialect == "postgresql":  # as on a server that speaks a language
            await db.execute('ALTER TABLE account ALTER COLUMN name TYPE varchar(200) COLLATE "und-x-icu"')
        for name in ("b", "B", "a", "Z", "é", "z"):
            await add(f"letter-{name}", name)
        assert "".join(one[-1] for one in await listed(house, 'search: "letter-"')) == "BZabzé"
        found = await pages(house, 'search: "letter-"', 1)
        assert "".join(page[0][-1] for page in found) == "BZabzé"

    async def test_without_a_deletion_date_have_no_place_in_an_order_by_it(self, house: Stage) -> None:
        await house.cancel()
        arguments = "sort: {field: DELETION_SCHEDULED_FOR, direction: ASC}"
        assert await pages(house, arguments, 1) == [["acme"]]

    async def test_cursors_of_another_order_or_of_nobodys_making_are_refused(self, house: Stage) -> None:
        answer = await house.ask(SUPPORT, "{ accounts(first: 1) { pageInfo { endCursor } } }")
        cursor = answer["data"]["accounts"]["pageInfo"]["endCursor"]
        for arguments in (
            f'after: "{cursor}", sort: {{field: NAME, direction: DESC}}',
            f'after: "{cursor}", sort: {{field: CREATED_AT, direction: ASC}}',
            'after: "x"',
            'after: ""',
        ):
            assert await code(house, SUPPORT, f"{{ accounts({arguments}) {{ edges {{ cursor }} }} }}") == (
                "BAD_USER_INPUT"
            )
        assert await code(
            house, SUPPORT, f'{{ cancellationRequests(after: "{cursor}") {{ edges {{ cursor }} }} }}'
        ) == ("BAD_USER_INPUT")

    async def test_cursors_of_a_history_are_no_place_for_other_text(self, house: Stage) -> None:
        await house.request_cancellation()
        id_ = await house.account_id("acme")
        forged = nodes.Keyset(name="transitions:sequence:desc", types=(str, type(uuid7()))).cursor("abc", uuid7())
        for after in (forged, "WyJ0cmFuc2l0aW9uczpzZXF1ZW5jZTpkZXNjIl0"):
            document = f'{{ account(id: "{id_}") {{ history(after: "{after}") {{ edges {{ cursor }} }} }} }}'
            assert await code(house, SUPPORT, document) == "BAD_USER_INPUT"

    @pytest.mark.parametrize("first", [0, -1, 101])
    async def test_come_1_to_100_at_a_time(self, house: Stage, first: int) -> None:
        assert await code(house, SUPPORT, f"{{ accounts(first: {first}) {{ edges {{ cursor }} }} }}") == (
            "BAD_USER_INPUT"
        )

    async def test_come_20_at_a_time_unless_told_otherwise(self, house: Stage) -> None:
        for index in range(21):
            await add(f"many-{index}", "Many")
        assert len(await listed(house)) == 20
        assert len(await listed(house, "first: 100")) == 25

    async def test_are_filtered(self, house: Stage) -> None:
        await house.cancel()
        await house.request_cancellation(GINA, "globex")
        (account,) = await Account.filter(reference="acme")
        assert account.deletion_scheduled_for is not None
        due = account.deletion_scheduled_for.isoformat().replace("+00:00", "Z")
        for wanted, references in {
            "statuses: [CANCELED]": ["acme"],
            "statuses: [ACTIVE, DELETED]": ["globex", "initech", "umbrella"],
            "statuses: []": [],
            'planCodes: ["premium", "enterprise"]': ["globex", "umbrella"],
            f'csmEmail: "{CSM}"': ["globex"],
            'csmEmail: "nobody@vendor.example"': [],
            "requestStatuses: [PENDING_ASSISTANCE, EFFECTIVE]": ["acme", "globex"],
            "requestStatuses: [EXPIRED]": [],
            f'deletionScheduledFrom: "{due}"': ["acme"],
            f'deletionScheduledBefore: "{due}"': [],
            'deletionScheduledBefore: "2100-01-01T00:00:00Z"': ["acme"],
            "restartRequested: false, statuses: [CANCELED]": ["acme"],
            "restartRequested: true": [],
            'statuses: [ACTIVE], planCodes: ["premium"], requestStatuses: [PENDING_ASSISTANCE]': ["globex"],
            "statuses: null": ["acme", "globex", "initech", "umbrella"],
        }.items():
            assert await listed(house, f"filter: {{{wanted}}}") == references, wanted

    async def test_are_found_by_a_part_of_name_reference_or_address_in_any_case(
        self, house: Stage, database: Database
    ) -> None:
        await add("ecole-ref", "École Polytechnique")
        for text, references in {
            "ACM": ["acme"],
            "cme": ["acme"],
            "REF": ["ecole-ref"],
            "École": ["ecole-ref"],
            "GINA@globex": ["globex"],
            DANA: ["initech", "umbrella"],
            "nothing like it": [],
            "": ["acme", "globex", "initech", "umbrella", "ecole-ref"],
        }.items():
            assert await listed(house, f'search: "{text}"') == references, text
        if database.dialect == "sqlite":  # PostgreSQL knows the letters of its locale; the tests' server has none
            assert await listed(house, 'search: "éCOLE"') == ["ecole-ref"]

    async def test_are_searched_for_what_is_written_wildcards_included(self, house: Stage) -> None:
        await add("p", "100% Pure")
        await add("u", "snake_case")
        await add("s", "back\\slash")
        for text, references in {"%": ["p"], "_": ["u"], "\\\\": ["s"], "0%": ["p"], "a%e": [], "k__c": []}.items():
            assert await listed(house, f'search: "{text}"') == references, text

    async def test_are_searched_for_200_characters_at_most(self, house: Stage) -> None:
        assert await listed(house, f'search: "{"x" * 200}"') == []
        assert await code(house, SUPPORT, f'{{ accounts(search: "{"x" * 201}") {{ edges {{ cursor }} }} }}') == (
            "BAD_USER_INPUT"
        )
        assert await code(
            house,
            SUPPORT,
            f"{{ accounts(filter: {{planCodes: {['x'] * 101}}}) {{ edges {{ cursor }} }} }}".replace("'", '"'),
        ) == ("BAD_USER_INPUT")


class TestTheQueue:
    QUEUE = (
        "{ cancellationRequests%s { edges { node { id account { reference allowedActions { action allowed } } } } } }"
    )

    async def references(self, house: Stage, who: str, arguments: str = "") -> list[str]:
        answer = await house.ask(who, self.QUEUE % arguments)
        return [edge["node"]["account"]["reference"] for edge in answer["data"]["cancellationRequests"]["edges"]]

    async def test_has_the_open_requests_longest_waiting_first(self, house: Stage) -> None:
        await house.request_cancellation(GINA, "globex")
        await house.request_cancellation(ALICE, "acme")
        await house.cancel("ingrid@initech.example", "initech", "Initech")
        assert await self.references(house, CSM) == ["globex", "acme"]
        assert await self.references(house, CSM, "(filter: {statuses: [EFFECTIVE]})") == ["initech"]

    async def test_of_ones_own_has_those_of_accounts_without_a_manager_too(self, house: Stage) -> None:
        await house.request_cancellation(GINA, "globex")
        await house.request_cancellation(ALICE, "acme")
        assert await self.references(house, CSM, "(filter: {mine: true})") == ["globex", "acme"]
        assert await self.references(house, BILLING, "(filter: {mine: true})") == ["acme"]

    async def test_says_of_each_what_the_one_who_asks_can_do(self, house: Stage) -> None:
        await house.request_cancellation(GINA, "globex")
        for who, can in ((CSM, {"CANCEL_ACCOUNT", "WITHDRAW_CANCELLATION"}), (SUPPORT, set())):
            answer = await house.ask(who, self.QUEUE % "")
            (edge,) = answer["data"]["cancellationRequests"]["edges"]
            actions = edge["node"]["account"]["allowedActions"]
            assert {one["action"] for one in actions if one["allowed"]} == can


# ------------------------------------------------------------------------------------------------------- the cost

_inside: ContextVar[bool] = ContextVar("inside", default=False)


@pytest.fixture
def statements(database: Database, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """`with statements() as run:` collects every statement of the application, the ORM's included."""
    run: list[str] = []
    kind = type(database._client)

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        async def wrapper(self: Any, *args: Any, **named: Any) -> Any:
            if _inside.get():
                return await original(self, *args, **named)
            run.append(str(args[0]) if args else original.__name__)
            token = _inside.set(True)
            try:
                return await original(self, *args, **named)
            finally:
                _inside.reset(token)

        return wrapper

    for name in ("fetch", "execute", "now", "execute_query", "execute_query_dict", "execute_insert", "execute_many"):
        if hasattr(kind, name):
            monkeypatch.setattr(kind, name, counted(getattr(kind, name)))

    @contextmanager
    def collected() -> Iterator[list[str]]:
        run.clear()
        yield run

    return collected


STATUS = """query($id: ID!) { account(id: $id) { name status canSendMessages membersCanSignIn
  plan { code channel effective retentionHours } allowedActions { action allowed reason message }
  currentPeriodEnd customerSuccessManager { name email } openRequest { id status channel ageSeconds respondBy }
  canceledAt restartableUntil deletionScheduledFor } }"""

LIST = """{ accounts(first: 100) { edges { cursor node { id name status plan { code } allowedActions { action allowed }
  customerSuccessManager { email } restartRequestedAt openRequest { status requestedBy { name } }
  cancellationRequests(first: 5) { edges { node { status requestedBy { name email } account { name }
    feedback { reason comment } offers { code status } } } } enforcement { system status account { name } }
  members(first: 5) { edges { node { email } } } history(first: 5) { edges { node { type } } } } } } }"""


class TestTheCost:
    @pytest.mark.parametrize("who", [ALICE, SUPPORT, CSM])
    async def test_of_a_status_query_is_one_statement_with_who_asks(
        self, house: Stage, statements: Callable[[], Any], who: str
    ) -> None:
        await house.request_cancellation()
        id_ = await house.account_id("acme")
        await house.ask(who, "{ plans { code } }")  # that somebody is known is read once a minute
        with statements() as run:
            answer = await house.ask(who, STATUS, id=id_)
        assert answer["data"]["account"]["openRequest"]["status"] == "PENDING_CONFIRMATION"
        assert len(run) == 1, run

    async def test_of_a_list_does_not_grow_with_it(self, house: Stage, statements: Callable[[], Any]) -> None:
        async def cost() -> int:
            with statements() as run:
                answer = await house.ask(SUPPORT, LIST)
            assert "errors" not in answer
            for edge in answer["data"]["accounts"]["edges"]:
                (asked,) = edge["node"]["cancellationRequests"]["edges"]
                assert asked["node"]["feedback"]
                assert asked["node"]["offers"]
                assert edge["node"]["members"]["edges"]
                assert edge["node"]["history"]["edges"]
            return len(run)

        async def ask_to_cancel(who: str, reference: str) -> None:
            asked = await house.request_cancellation(who, reference)
            said = await house.do(who, "submitFeedback", requestId=asked["request"]["id"], reason="TOO_EXPENSIVE")
            assert said["__typename"] == "SubmitFeedbackSuccess"

        for who, reference in ((ALICE, "acme"), (GINA, "globex"), (DANA, "initech"), (DANA, "umbrella")):
            await ask_to_cancel(who, reference)
        await cost()  # that somebody is known is read once a minute
        few = await cost()
        for index in range(16):
            await add(f"many-{index}", "Many", members=1)
            await ask_to_cancel(f"many-{index}-0@many.example", f"many-{index}")
        assert await cost() == few
        assert few <= 11

    async def test_of_ones_accounts_does_not_grow_with_them(self, house: Stage, statements: Callable[[], Any]) -> None:
        document = "{ viewer { memberships(first: 100) { edges { node { role account { name plan { code } } } } } } }"
        for who in (ALICE, DANA):
            await house.ask(who, document)  # the clock that tokens are judged by, and who is known: once a minute
        with statements() as run:
            answer = await house.ask(ALICE, document)
        assert len(answer["data"]["viewer"]["memberships"]["edges"]) == 1
        few = len(run)
        with statements() as run:
            answer = await house.ask(DANA, document)
        assert len(answer["data"]["viewer"]["memberships"]["edges"]) == 2
        assert len(run) == few == 3


# ------------------------------------------------------------------------------------------------------ who sees what


class TestNode:
    async def test_of_each_kind_is_shown_to_whom_it_concerns_and_to_nobody_else(self, house: Stage) -> None:
        asked = await house.request_cancellation(reason="TOO_EXPENSIVE")
        said = await house.do(
            ALICE,
            "submitFeedback",
            "... on SubmitFeedbackSuccess { feedback { id } }",
            requestId=asked["request"]["id"],
            reason="OTHER",
        )
        member = await Member.get(email=CAROL)
        ids = {
            "Account": asked["account"]["id"],
            "CancellationRequest": asked["request"]["id"],
            "Feedback": said["feedback"]["id"],
            "Offer": asked["request"]["offers"][0]["id"],
            "Member": nodes.encode(Kind.MEMBER, member.id),
        }
        assert len(ids) == len(set(Kind) - {Kind.WEBHOOK_ENDPOINT, Kind.WEBHOOK_DELIVERY})  # which are nobody's
        for kind, id_ in ids.items():
            shown = {"node": {"__typename": kind, "id": id_}}
            for who in (ALICE, CAROL, SUPPORT, CSM, BILLING):
                answer = await house.ask(who, "query($id: ID!) { node(id: $id) { __typename id } }", id=id_)
                assert answer == {"data": shown}, (kind, who)
            for who in (GINA, GATEKEEPER):
                answer = await house.ask(who, "query($id: ID!) { node(id: $id) { __typename id } }", id=id_)
                assert answer == {"data": {"node": None}}, (kind, who)
            # Without the permission: the account, and nothing of its cancellation or its people.
            answer = await house.ask(BOB, "query($id: ID!) { node(id: $id) { __typename id } }", id=id_)
            assert answer["data"] == (shown if kind == "Account" else {"node": None})

    async def test_of_one_kind_is_not_taken_for_another(self, house: Stage) -> None:
        asked = await house.request_cancellation()
        answer = await house.ask(ALICE, "query($id: ID!) { account(id: $id) { name } }", id=asked["request"]["id"])
        assert answer == {"data": {"account": None}}


BILLING_FIELDS = {
    "currentPeriodEnd": "",
    "customerSuccessManager": "{ name }",
    "openRequest": "{ id }",
    "cancellationRequests": "{ edges { cursor } }",
    "members": "{ edges { cursor } }",
    "history": "{ edges { cursor } }",
    "restartRequestedAt": "",
    "enforcement": "{ status }",
}


class TestBillingFields:
    DOCUMENT = "query($id: ID!) { account(id: $id) { name %s } }" % " ".join(  # noqa: UP031
        f"{name} {selection}" for name, selection in BILLING_FIELDS.items()
    )

    async def test_are_null_and_forbidden_one_by_one_without_the_permission(self, house: Stage) -> None:
        answer = await house.ask(BOB, self.DOCUMENT, id=await house.account_id("acme"))
        assert answer["data"]["account"] == {"name": "Acme", **dict.fromkeys(BILLING_FIELDS)}
        found = {error["path"][-1]: error["extensions"]["code"] for error in answer["errors"]}
        assert found == dict.fromkeys(BILLING_FIELDS, "FORBIDDEN")

    @pytest.mark.parametrize("who", [ALICE, CAROL, SUPPORT])
    async def test_are_shown_with_it(self, house: Stage, who: str) -> None:
        answer = await house.ask(who, self.DOCUMENT, id=await house.account_id("acme"))
        assert "errors" not in answer
        assert answer["data"]["account"]["members"]["edges"]

    async def test_are_shown_from_the_request_on_after_which_it_was_granted(self, house: Stage) -> None:
        id_ = await house.account_id("acme")
        assert "errors" in await house.ask(BOB, self.DOCUMENT, id=id_)
        granted = Permission.ACCESS_BILLING_AND_ACCOUNT_INFO.value
        await db.execute("UPDATE member SET permissions = $1 WHERE email = $2", granted, BOB)
        assert "errors" not in await house.ask(BOB, self.DOCUMENT, id=id_)

    async def test_say_nothing_of_staffs_note_to_members(self, house: Stage) -> None:
        await house.request_cancellation(BILLING, note="They are moving away.")
        document = "query($id: ID!) { account(id: $id) { openRequest { status staffNote } } }"
        for who, note in ((ALICE, None), (SUPPORT, "They are moving away.")):
            answer = await house.ask(who, document, id=await house.account_id("acme"))
            assert answer["data"]["account"]["openRequest"] == {"status": "PENDING_CONFIRMATION", "staffNote": note}


class TestTheBearerOfALink:
    async def test_is_shown_nothing_beside_what_the_link_does(self, house: Stage) -> None:
        await house.request_cancellation(BILLING, note="They called.")
        letter = next(one for one in await house.letters() if one["To"].addresses[0].addr_spec == ALICE)
        part = letter.get_body(("plain",))
        assert part is not None
        token = part.get_content().split("/links/confirm?token=")[1].split()[0]
        view = await accounts.load(await house.account_key("acme"))
        assert view is not None
        assert view.request is not None
        response = await house.post(
            "mutation($input: ConfirmCancellationInput!) { confirmCancellation(input: $input) "
            "{ ... on ConfirmCancellationSuccess { account { status members { edges { node { email } } } } } } }",
            {
                "input": {
                    "requestId": nodes.encode(Kind.CANCELLATION_REQUEST, view.request.id),
                    "accountName": "Acme",
                }
            },
            token=token,
        )
        answer = response.json()
        assert answer["data"]["confirmCancellation"]["account"] == {"status": "CANCELED", "members": None}
        assert [error["extensions"]["code"] for error in answer["errors"]] == ["FORBIDDEN"]


VIEWER = """{ viewer { name email staffRole serviceScopes
  memberships { edges { node { role permissions account { reference } } } } } }"""


class TestViewer:
    async def test_is_who_asks(self, house: Stage) -> None:
        nothing: dict[str, Any] = {"name": None, "email": None, "staffRole": None, "serviceScopes": None}
        for who, expected in {
            SUPPORT: nothing | {"name": "Sam Porter", "email": SUPPORT, "staffRole": "SUPPORT"},
            GATEKEEPER: nothing | {"name": GATEKEEPER, "serviceScopes": ["GATE"]},
        }.items():
            answer = await house.ask(who, VIEWER)
            assert answer["data"]["viewer"] == expected | {"memberships": {"edges": []}}

    async def test_of_several_accounts_lists_them_by_name(self, house: Stage) -> None:
        answer = await house.ask(DANA, VIEWER)
        assert [edge["node"] for edge in answer["data"]["viewer"]["memberships"]["edges"]] == [
            {
                "role": "MEMBER",
                "permissions": [Permission.ACCESS_BILLING_AND_ACCOUNT_INFO],
                "account": {"reference": one},
            }
            for one in ("initech", "umbrella")
        ]

    async def test_of_two_accounts_keeps_the_one_that_is_not_canceled(self, house: Stage) -> None:
        await house.cancel(DANA, "initech", "Initech")
        answer = await house.ask(DANA, VIEWER)
        assert [edge["node"]["account"]["reference"] for edge in answer["data"]["viewer"]["memberships"]["edges"]] == [
            "umbrella"
        ]
        name = "query($a: ID!, $b: ID!) { a: account(id: $a) { name } b: account(id: $b) { name } plans { code } }"
        both = await house.ask(DANA, name, a=await house.account_id("initech"), b=await house.account_id("umbrella"))
        assert both["data"]["a"] is None
        assert both["data"]["b"] == {"name": "Umbrella"}
        assert both["data"]["plans"]
        assert [(error["path"], error["extensions"]["code"]) for error in both["errors"]] == [(["a"], "ACCESS_REMOVED")]

    async def test_of_two_canceled_accounts_is_refused_whatever_they_ask(self, house: Stage) -> None:
        await house.cancel(DANA, "initech", "Initech")
        await house.request_cancellation(BILLING, "umbrella", note="All of it.")
        view = await accounts.load(await house.account_key("umbrella"))
        assert view is not None
        assert view.request is not None
        done = await house.do(
            DANA,
            "confirmCancellation",
            requestId=nodes.encode(Kind.CANCELLATION_REQUEST, view.request.id),
            confirmationToken=house.installation.tokens.confirmation_token(view.request.id, 0),
            accountName="Umbrella",
        )
        assert done["__typename"] == "ConfirmCancellationSuccess"
        for document in (VIEWER, "{ plans { code } }", "{ __typename }", '{ node(id: "x") { id } }'):
            assert await code(house, DANA, document) == "ACCESS_REMOVED"


class TestThePreview:
    DOCUMENT = """query($id: ID!, $reason: FeedbackReason) { cancellationPreview(accountId: $id, reason: $reason) {
      membersLosingAccess effectiveAt restartableUntil deletionScheduledFor offers { code } account { status } } }"""

    async def test_tells_who_until_when_and_what_else_and_changes_nothing(self, house: Stage) -> None:
        id_ = await house.account_id("acme")
        answer = await house.ask(ALICE, self.DOCUMENT, id=id_, reason="TOO_EXPENSIVE")
        preview = answer["data"]["cancellationPreview"]
        assert preview["membersLosingAccess"] == 3
        effective, until = (datetime.fromisoformat(preview[name]) for name in ("effectiveAt", "restartableUntil"))
        assert until - effective == timedelta(hours=1440)
        assert preview["deletionScheduledFor"] == preview["restartableUntil"]
        assert {offer["code"] for offer in preview["offers"]} == {"discount-3-months", "pause-2-months", "guided-setup"}
        assert preview["account"] == {"status": "ACTIVE"}
        assert await db.fetch("SELECT id FROM cancellation_request") == []
        without = await house.ask(ALICE, self.DOCUMENT, id=id_)
        assert without["data"]["cancellationPreview"]["offers"] == [{"code": "guided-setup"}]
