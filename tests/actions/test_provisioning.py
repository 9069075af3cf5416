"""The host's accounts become rows, as often as it says so, and nothing that tells of a cancellation changes."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app import db, demo, errors, policy, provisioning
from app.auth import Installation
from app.db import Database
from app.lifecycle import MemberRole, Permission, Scope, StaffRole
from app.models import Account, Member, Staff
from app.provisioning import AccountItem, ItemResult, MemberItem, Outcome
from app.receivers import Receivers
from app.settings import Settings
from app.tokens import DEVELOPMENT_ISSUER, Tokens

BILLING = frozenset({Permission.ACCESS_BILLING_AND_ACCOUNT_INFO})
ALICE = MemberItem(subject="alice", email="alice@acme.example", name="Alice Adams", role=MemberRole.ADMIN)
CAROL = MemberItem(
    subject="carol", email="carol@acme.example", name="Carol Clark", role=MemberRole.MEMBER, permissions=BILLING
)
BOB = MemberItem(subject="bob", email="bob@acme.example", name="Bob Brandt", role=MemberRole.MEMBER)
ACME = AccountItem(reference="acme", name="Acme", plan_code="essentials", members=(ALICE, CAROL))
GLOBEX = AccountItem(reference="globex", name="Globex", plan_code="premium", members=())


@pytest.fixture
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    settings = Settings.load({"SUNSET_DATA_DIR": str(tmp_path_factory.mktemp("data"))})
    return Installation(
        policy=policy.load(),
        tokens=Tokens.from_settings(settings),
        mail_domain="sunset.example",
        member_issuer="https://id.example/",
        rate_limit_caller=0,
        rate_limit_account=0,
        request_timeout=timedelta(seconds=10),
        data_dir=settings.data_dir,
        receivers=Receivers(""),
    )


async def only(installation: Installation, item: AccountItem) -> ItemResult:
    (result,) = await provisioning.sync(installation, [item])
    return result


async def members_of(reference: str) -> dict[str, Member]:
    return {member.subject: member for member in await Member.filter(account__reference=reference)}


async def row(reference: str) -> dict[str, Any]:
    found = await db.fetch_one("SELECT * FROM account WHERE reference = $1", reference)
    assert found is not None
    return found


async def hire_csm(email: str = "csm@vendor.example") -> Staff:
    return await provisioning.add_staff(
        email=email,
        name="Casey Morgan",
        role=StaffRole.CUSTOMER_SUCCESS_MANAGER,
        issuer=DEVELOPMENT_ISSUER,
        subject=f"staff:{email}",
    )


async def force_status(reference: str, status: str) -> None:
    """Move an account along its arrows by hand, as far as `status`."""
    now = datetime.now(UTC)
    account = await Account.get(reference=reference)
    path = ["CANCELED", "DELETING", "DELETED"]
    for step in path[: path.index(status) + 1]:
        account.status = step  # type: ignore[assignment]
        if step == "CANCELED":
            account.canceled_at = now - timedelta(days=61)
            account.restartable_until = account.deletion_scheduled_for = now - timedelta(days=1)
        if step == "DELETING":
            account.deletion_started_at = now
        if step == "DELETED":
            await Member.filter(account_id=account.id).delete()
            account.deleted_at = now
        await account.save()


async def test_a_new_account_is_created_with_all_that_the_host_says(
    database: Database, installation: Installation
) -> None:
    csm = await hire_csm()
    end = datetime(2027, 1, 31, 12, 30, 0, 123_999, tzinfo=UTC)
    own = replace(BOB, issuer="https://other.example/")
    result = await only(
        installation,
        replace(ACME, current_period_end=end, csm_email="CSM@vendor.example", members=(ALICE, CAROL, own)),
    )
    account = await Account.get(reference="acme")
    assert (Outcome.CREATED, account.id, None) == (result.outcome, result.account_id, result.refusal)
    assert ("Acme", "essentials", "ACTIVE", csm.id, 0, 0) == (
        account.name,
        account.plan_code,
        account.status,
        account.csm_id,
        account.epoch,
        account.last_sequence,
    )
    assert end.replace(microsecond=123_000) == account.current_period_end  # the API's precision: milliseconds
    members = await members_of("acme")
    assert {
        "alice": ("https://id.example/", "alice@acme.example", "Alice Adams", MemberRole.ADMIN, frozenset()),
        "carol": ("https://id.example/", "carol@acme.example", "Carol Clark", MemberRole.MEMBER, BILLING),
        "bob": ("https://other.example/", "bob@acme.example", "Bob Brandt", MemberRole.MEMBER, frozenset()),
    } == {
        subject: (member.issuer, member.email, member.name, member.role, member.permissions)
        for subject, member in members.items()
    }


async def test_repeating_a_sync_changes_no_row(database: Database, installation: Installation) -> None:
    await hire_csm()
    items = [
        replace(ACME, csm_email="csm@vendor.example", current_period_end=datetime(2027, 1, 31, tzinfo=UTC)),
        GLOBEX,
    ]
    await provisioning.sync(installation, items)
    before = await db.fetch("SELECT * FROM account ORDER BY id") + await db.fetch("SELECT * FROM member ORDER BY id")
    results = await provisioning.sync(installation, items)
    assert [result.outcome for result in results] == [Outcome.UNCHANGED, Outcome.UNCHANGED]
    after = await db.fetch("SELECT * FROM account ORDER BY id") + await db.fetch("SELECT * FROM member ORDER BY id")
    assert before == after


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": "Acme Ltd"}, Outcome.UPDATED),
        ({"plan_code": "startup"}, Outcome.UPDATED),
        ({"current_period_end": datetime(2027, 1, 31, tzinfo=UTC)}, Outcome.UPDATED),
        ({"csm_email": "csm@vendor.example"}, Outcome.UPDATED),
        ({"members": (ALICE,)}, Outcome.UPDATED),
        ({"members": (ALICE, CAROL, BOB)}, Outcome.UPDATED),
        ({"members": (ALICE, replace(CAROL, permissions=frozenset()))}, Outcome.UPDATED),
        ({"members": (ALICE, replace(CAROL, role=MemberRole.ADMIN))}, Outcome.UPDATED),
        ({"members": (ALICE, replace(CAROL, email="carol@new.example"))}, Outcome.UPDATED),
        ({"members": (ALICE, replace(CAROL, name="Carol Cole"))}, Outcome.UPDATED),
        ({"members": (ALICE, replace(CAROL, issuer="https://other.example/"))}, Outcome.UPDATED),
        ({"members": (CAROL, ALICE)}, Outcome.UNCHANGED),
        ({"members": None}, Outcome.UNCHANGED),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else None,
)
async def test_each_difference_is_told_and_the_next_sync_finds_none(
    database: Database, installation: Installation, change: dict[str, Any], expected: Outcome
) -> None:
    await hire_csm()
    created = await only(installation, ACME)
    changed = replace(ACME, **change)
    result = await only(installation, changed)
    assert (expected, created.account_id) == (result.outcome, result.account_id)
    assert Outcome.UNCHANGED is (await only(installation, changed)).outcome


async def test_what_is_left_out_is_taken_away_except_members(database: Database, installation: Installation) -> None:
    await hire_csm()
    await only(
        installation,
        replace(ACME, csm_email="csm@vendor.example", current_period_end=datetime(2027, 1, 31, tzinfo=UTC)),
    )
    await only(installation, AccountItem(reference="acme", name="Acme", plan_code="essentials"))
    account = await row("acme")
    assert (account["csm_id"], account["current_period_end"]) == (None, None)
    assert {"alice", "carol"} == set(await members_of("acme"))


async def test_who_is_not_listed_is_removed_and_who_stays_keeps_their_id(
    database: Database, installation: Installation
) -> None:
    await only(installation, ACME)
    neighbour = replace(GLOBEX, members=(ALICE, BOB))
    await only(installation, neighbour)
    before = await members_of("acme")
    await only(installation, replace(ACME, members=(replace(CAROL, name="Carol Cole"), BOB)))
    after = await members_of("acme")
    assert {"carol", "bob"} == set(after)
    assert before["carol"].id == after["carol"].id
    assert before["carol"].created_at == after["carol"].created_at
    assert {"alice", "bob"} == set(await members_of("globex"))
    await only(installation, replace(ACME, members=()))
    assert await members_of("acme") == {}


async def test_a_cancellation_is_left_as_it_is(database: Database, installation: Installation) -> None:
    """Name, plan and members of a canceled account follow the host; status and dates do not."""
    await only(installation, ACME)
    await force_status("acme", "CANCELED")
    before, alice = await row("acme"), (await members_of("acme"))["alice"]
    result = await only(installation, replace(ACME, name="Acme Ltd", plan_code="startup", members=(ALICE, BOB)))
    after = await row("acme")
    assert Outcome.UPDATED is result.outcome
    assert before | {"name": "Acme Ltd", "plan_code": "startup"} == after
    members = await members_of("acme")
    assert {"alice", "bob"} == set(members)
    assert alice.id == members["alice"].id


async def test_what_became_of_the_members_is_counted_for_each_account(
    database: Database, installation: Installation
) -> None:
    globex = replace(GLOBEX, members=(ALICE, BOB))

    async def counted(*items: AccountItem) -> list[tuple[int, int, int]]:
        results = await provisioning.sync(installation, items)
        return [(one.members_added, one.members_changed, one.members_removed) for one in results]

    assert await counted(ACME, globex) == [(2, 0, 0), (2, 0, 0)]
    assert await counted(ACME, globex) == [(0, 0, 0), (0, 0, 0)]
    moved = replace(ALICE, email="alice@new.example")
    assert await counted(replace(ACME, members=(moved, BOB)), replace(globex, members=(BOB,))) == [(1, 1, 1), (0, 0, 1)]
    assert await counted(replace(ACME, members=None), replace(globex, members=())) == [(0, 0, 0), (0, 0, 1)]
    assert await counted(replace(ACME, plan_code="gold", members=())) == [(0, 0, 0)]


@pytest.mark.parametrize("status", ["DELETING", "DELETED"])
async def test_an_erasure_is_not_undone(database: Database, installation: Installation, status: str) -> None:
    await only(installation, ACME)
    await force_status("acme", status)
    before = await row("acme"), await db.fetch("SELECT * FROM member ORDER BY id")
    refused, other = await provisioning.sync(
        installation, [replace(ACME, name="Acme Ltd", members=(ALICE, BOB)), GLOBEX]
    )
    assert (refused.outcome, other.outcome) == (Outcome.REFUSED, Outcome.CREATED)
    assert refused.refusal is not None
    assert refused.refusal.field == "reference"
    assert before == (await row("acme"), await db.fetch("SELECT * FROM member ORDER BY id"))


LONG = "x" * 201
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"reference": ""}, "reference"),
    ({"reference": " acme"}, "reference"),
    ({"reference": LONG}, "reference"),
    ({"reference": "a\x00b"}, "reference"),
    ({"reference": "a\ud800b"}, "reference"),
    ({"name": ""}, "name"),
    ({"name": LONG}, "name"),
    ({"name": "Acme\nLtd"}, "name"),
    ({"plan_code": "gold"}, "planCode"),
    ({"current_period_end": datetime(2027, 1, 31)}, "currentPeriodEnd"),  # noqa: DTZ001
    ({"current_period_end": datetime.max.replace(tzinfo=UTC)}, "currentPeriodEnd"),
    ({"csm_email": "nobody@vendor.example"}, "csmEmail"),
    ({"csm_email": "billing@vendor.example"}, "csmEmail"),
    ({"csm_email": "former@vendor.example"}, "csmEmail"),
    ({"csm_email": "not an address"}, "csmEmail"),
    ({"members": (ALICE, replace(BOB, subject=""))}, "members[1].subject"),
    ({"members": (ALICE, replace(BOB, subject="x" * 256))}, "members[1].subject"),
    ({"members": (ALICE, replace(BOB, issuer="two\nlines"))}, "members[1].issuer"),
    ({"members": (ALICE, replace(BOB, email="bob"))}, "members[1].email"),
    ({"members": (ALICE, replace(BOB, email="bob@x@y.example, eve@z.example"))}, "members[1].email"),
    ({"members": (ALICE, replace(BOB, email="bob\r\n@acme.example"))}, "members[1].email"),
    ({"members": (ALICE, replace(BOB, name=""))}, "members[1].name"),
    ({"members": (ALICE, BOB, replace(BOB, name="Twin"))}, "members[2].subject"),
    ({"members": (ALICE, replace(ALICE, issuer="https://id.example/"))}, "members[1].subject"),
    ({"members": tuple(replace(BOB, subject=str(n)) for n in range(1_001))}, "members"),
]


@pytest.mark.parametrize(("change", "field"), REFUSED)
async def test_a_bad_item_is_refused_by_name_and_spoils_no_other(
    database: Database, installation: Installation, change: dict[str, Any], field: str
) -> None:
    await hire_csm("former@vendor.example")
    await provisioning.deactivate_staff("former@vendor.example")
    await provisioning.add_staff(
        email="billing@vendor.example",
        name="Billie Stone",
        role=StaffRole.BILLING_TEAM,
        issuer=DEVELOPMENT_ISSUER,
        subject="staff:billing",
    )
    refused, other = await provisioning.sync(installation, [replace(ACME, **change), GLOBEX])
    assert (refused.outcome, other.outcome) == (Outcome.REFUSED, Outcome.CREATED)
    assert refused.refusal is not None
    assert field == refused.refusal.field
    assert await Account.all().values_list("reference") == [("globex",)]
    assert await Member.all().count() == 0


async def test_staff_and_services_are_left_out_of_each_item_by_their_place_there(
    database: Database, installation: Installation
) -> None:
    """Of new accounts, too; an item that is refused tells its own reason alone."""
    csm = await hire_csm()
    await provisioning.add_service(
        name="host", scopes=frozenset({Scope.PROVISION}), issuer=DEVELOPMENT_ISSUER, subject="service:host"
    )
    staff = replace(BOB, issuer=csm.issuer, subject=csm.subject)
    service = replace(BOB, issuer=DEVELOPMENT_ISSUER, subject="service:host")
    await only(installation, ACME)
    await only(installation, replace(ACME, reference="old"))
    await force_status("old", "DELETING")
    items = [
        replace(ACME, name="Acme Ltd", members=(staff, ALICE, service)),
        replace(GLOBEX, members=(CAROL, service)),
        replace(ACME, reference="old", members=(staff,)),
        replace(ACME, reference="quiet", members=None),
    ]
    expected = [
        (Outcome.UPDATED, ["members[0].subject", "members[2].subject"], 0, 1),
        (Outcome.CREATED, ["members[1].subject"], 1, 0),
        (Outcome.REFUSED, [], 0, 0),
        (Outcome.CREATED, [], 0, 0),
    ]
    for dry_run in (True, False):
        assert set(await members_of("acme")) == {"alice", "carol"}
        results = await provisioning.sync(installation, items, dry_run=dry_run)
        assert [
            (one.outcome, [refused.field for refused in one.members_refused], one.members_added, one.members_removed)
            for one in results
        ] == expected
    assert [set(await members_of(one)) for one in ("acme", "globex", "quiet")] == [{"alice"}, {"carol"}, set()]
    assert (await row("acme"))["name"] == "Acme Ltd"


async def test_of_two_items_with_one_reference_neither_is_guessed_right(
    database: Database, installation: Installation
) -> None:
    results = await provisioning.sync(installation, [ACME, GLOBEX, replace(ACME, name="Acme Ltd")])
    assert [result.outcome for result in results] == [Outcome.REFUSED, Outcome.CREATED, Outcome.REFUSED]
    assert all("accounts[0] and accounts[2]" in str(result.refusal) for result in results[::2])


async def test_names_of_all_the_world_are_welcome(database: Database, installation: Installation) -> None:
    item = replace(
        ACME,
        name='株式会社\u3000アクメ 🌅 "O\'Brien" $1 \\',
        members=(replace(ALICE, name="Zoë d'Arc-Łukasz\u200d", email="zoë@münchen.example"),),
    )
    assert Outcome.CREATED is (await only(installation, item)).outcome
    assert item.name == (await row("acme"))["name"]
    assert Outcome.UNCHANGED is (await only(installation, item)).outcome


async def test_a_batch_has_limits(database: Database, installation: Installation) -> None:
    many = [replace(GLOBEX, reference=str(number)) for number in range(501)]
    with pytest.raises(errors.InvalidInput) as too_many:
        await provisioning.sync(installation, many)
    crowd = tuple(replace(BOB, subject=str(number)) for number in range(1_000))
    full = [replace(ACME, reference=str(number), members=crowd) for number in range(11)]
    with pytest.raises(errors.InvalidInput) as too_full:
        await provisioning.sync(installation, full)
    assert (too_many.value.field, too_full.value.field) == ("accounts", "accounts")
    assert await Account.all().count() == 0
    assert await provisioning.sync(installation, []) == []
    assert len(await provisioning.sync(installation, many[:500])) == 500


async def test_a_batch_costs_the_same_few_statements_however_large(
    database: Database, installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements: list[str] = []
    for name in ("fetch", "fetch_one", "execute"):
        original = getattr(db, name)

        async def counted(sql: str, *args: Any, original: Any = original) -> Any:
            statements.append(sql)
            return await original(sql, *args)

        monkeypatch.setattr(db, name, counted)
    await provisioning.sync(installation, [ACME])
    small = len(statements)
    statements.clear()
    await provisioning.sync(
        installation, [replace(ACME, reference=f"a{number}", members=(ALICE, BOB, CAROL)) for number in range(300)]
    )
    assert small == len(statements)
    assert small < 10


async def test_a_dry_run_answers_alike_and_leaves_nothing(database: Database, installation: Installation) -> None:
    await only(installation, ACME)
    items = [replace(ACME, name="Acme Ltd", members=()), GLOBEX, replace(GLOBEX, reference="x", plan_code="gold")]
    rehearsed = await provisioning.sync(installation, items, dry_run=True)
    assert [account.name for account in await Account.all()] == ["Acme"]
    assert {"alice", "carol"} == set(await members_of("acme"))
    done = await provisioning.sync(installation, items)
    assert [result.outcome for result in rehearsed] == [result.outcome for result in done]


async def test_parallel_syncs_of_the_same_new_accounts_all_succeed(
    database: Database, installation: Installation
) -> None:
    """Batches that overlap in opposite orders: none fails, none waits for one that waits for it."""
    items = [replace(ACME, reference=f"account-{number}") for number in range(40)]

    async def one(batch: Sequence[AccountItem]) -> list[ItemResult]:
        return await provisioning.sync(installation, batch)

    for _ in range(3):
        results = await asyncio.gather(*(one(items if number % 2 else items[::-1]) for number in range(6)))
        assert Outcome.REFUSED not in {result.outcome for batch in results for result in batch}
        items = [replace(item, members=item.members[::-1] if item.members else ()) for item in items]
        items += [replace(ACME, reference=f"more-{len(items)}-{number}") for number in range(10)]
    created = await Account.all().count()
    assert (created, await Member.all().count()) == (60, 120)
    first = [result.outcome for batch in results for result in batch]
    assert first.count(Outcome.CREATED) == 10  # each account was created once


async def test_new_accounts_are_made_in_one_order_so_that_no_two_batches_wait_for_each_other(
    postgres_database: Database, installation: Installation
) -> None:
    """Another batch has made `a` and is about to make `z`; this one, given `z` first, has not made it meanwhile."""
    halfway = asyncio.Event()

    async def other() -> None:
        async def make(reference: str) -> None:
            await db.execute(
                "INSERT INTO account (id, reference, name, plan_code, status, epoch, last_sequence, created_at) "
                "VALUES ($1, $2, 'Other', 'startup', 'ACTIVE', 0, 0, $3)",
                db.uuid7(),
                reference,
                await db.now(),
            )

        with postgres_database.bind():
            async with db.transaction(), asyncio.timeout(30):
                await make("a")
                halfway.set()
                while not await db.fetch("SELECT 1 FROM pg_locks WHERE NOT granted"):
                    pass
                await make("z")

    async def this() -> list[ItemResult]:
        await halfway.wait()
        with postgres_database.bind():
            return await provisioning.sync(
                installation, [replace(ACME, reference="z"), replace(ACME, reference="a", name="Other")]
            )

    _, results = await asyncio.gather(other(), this())
    assert [result.outcome for result in results] == [Outcome.UPDATED, Outcome.UPDATED]


async def test_a_sync_waits_for_an_account_that_is_locked(
    postgres_database: Database, installation: Installation
) -> None:
    """A member is taken away before a confirmation or after it, never during."""
    await only(installation, ACME)
    order: list[str] = []
    locked = asyncio.Event()

    async def confirm() -> None:
        with postgres_database.bind():
            async with db.transaction(), asyncio.timeout(30):
                await db.fetch("SELECT id FROM account WHERE reference = $1 FOR UPDATE", "acme")
                locked.set()
                while "removed" not in order and not await db.fetch("SELECT 1 FROM pg_locks WHERE NOT granted"):
                    pass
                order.append("confirmed")

    async def remove() -> None:
        await locked.wait()
        with postgres_database.bind():
            await only(installation, replace(ACME, members=(CAROL,)))
        order.append("removed")

    await asyncio.gather(confirm(), remove())
    assert order == ["confirmed", "removed"]


async def test_history_outlives_the_members_in_it(database: Database, installation: Installation) -> None:
    account_id = (await only(installation, ACME)).account_id
    carol = (await members_of("acme"))["carol"]
    await db.execute(
        "INSERT INTO transition (id, account_id, sequence, epoch, type, actor_kind, actor_id, account_status, "
        "occurred_at) VALUES ($1, $2, 1, 0, 'account.cancellation_requested', 'MEMBER', $3, 'ACTIVE', $4)",
        db.uuid7(),
        account_id,
        carol.id,
        await db.now(),
    )
    await only(installation, replace(ACME, members=(ALICE,)))
    told = await db.fetch_one("SELECT actor_id FROM transition WHERE account_id = $1", account_id)
    assert told is not None
    assert carol.id == db.as_uuid(told["actor_id"])


# ---------------------------------------------------------------------------------------------- staff and services


async def test_staff_come_and_go_and_come_back(database: Database, installation: Installation) -> None:
    hired = await hire_csm("CSM@Vendor.example")
    assert hired.email == "csm@vendor.example"
    with pytest.raises(errors.InvalidInput) as twice:
        await hire_csm()
    assert twice.value.field == "email"
    await only(installation, replace(ACME, csm_email="csm@vendor.example"))
    assert await provisioning.deactivate_staff("csm@vendor.example") == 1
    (gone,) = await provisioning.list_staff()
    assert gone.deactivated_at is not None
    await provisioning.deactivate_staff("csm@vendor.example")
    (still,) = await provisioning.list_staff()
    assert gone.deactivated_at == still.deactivated_at
    back = await provisioning.add_staff(
        email="csm@vendor.example", name="Casey M.", role=StaffRole.SUPPORT, issuer="https://id.example/", subject="42"
    )
    assert (hired.id, "Casey M.", None) == (back.id, back.name, back.deactivated_at)
    with pytest.raises(errors.NotFound):
        await provisioning.deactivate_staff("nobody@vendor.example")


async def test_a_subject_is_one_person_and_one_service(database: Database) -> None:
    await hire_csm()
    with pytest.raises(errors.InvalidInput) as person:
        await provisioning.add_staff(
            email="other@vendor.example",
            name="Other",
            role=StaffRole.SUPPORT,
            issuer=DEVELOPMENT_ISSUER,
            subject="staff:csm@vendor.example",
        )
    scopes = frozenset({Scope.GATE, Scope.PROVISION})
    service = await provisioning.add_service(name="host", scopes=scopes, issuer="i", subject="s")
    assert scopes == service.scopes
    with pytest.raises(errors.InvalidInput) as system:
        await provisioning.add_service(name="other", scopes=scopes, issuer="i", subject="s")
    assert (person.value.field, system.value.field) == ("subject", "subject")


async def test_services_come_and_go_and_come_back(database: Database) -> None:
    await provisioning.add_service(name="host", scopes=frozenset({Scope.PROVISION}), issuer="i", subject="s")
    with pytest.raises(errors.InvalidInput):
        await provisioning.add_service(name="host", scopes=frozenset({Scope.GATE}), issuer="i", subject="t")
    with pytest.raises(errors.InvalidInput):
        await provisioning.add_service(name="idle", scopes=frozenset(), issuer="i", subject="u")
    await provisioning.deactivate_service("host")
    (gone,) = await provisioning.list_services()
    assert gone.deactivated_at is not None
    back = await provisioning.add_service(name="host", scopes=frozenset({Scope.GATE}), issuer="i", subject="t")
    assert (gone.id, None, frozenset({"gate"})) == (back.id, back.deactivated_at, back.scopes)
    with pytest.raises(errors.NotFound):
        await provisioning.deactivate_service("nobody")


# ------------------------------------------------------------------------------------------------------------ demo


async def test_the_demo_is_made_once_and_into_an_empty_database_only(
    database: Database, installation: Installation
) -> None:
    assert await demo.make(installation)
    plans = dict(await Account.all().values_list("reference", "plan_code"))
    assert plans == {"acme": "essentials", "globex": "premium", "initech": "startup", "umbrella": "enterprise"}
    assert {
        "alice@acme.example": (MemberRole.ADMIN, frozenset()),
        "carol@acme.example": (MemberRole.MEMBER, BILLING),
        "bob@acme.example": (MemberRole.MEMBER, frozenset()),
    } == {
        member.email: (member.role, member.permissions)
        for member in await Member.filter(account__reference="acme", issuer=DEVELOPMENT_ISSUER)
    }
    globex = await Account.get(reference="globex").prefetch_related("csm")
    assert globex.csm is not None
    assert globex.csm.email == "csm@vendor.example"
    await only(installation, replace(ACME, name="Renamed"))
    assert not await demo.make(installation)
    assert (await row("acme"))["name"] == "Renamed"


async def test_a_demo_that_was_broken_off_is_finished(database: Database, installation: Installation) -> None:
    await hire_csm()
    assert await demo.make(installation)
    assert await Account.all().count() == 4
    assert len(await provisioning.list_staff()) == 4


async def test_the_demo_keeps_out_of_a_database_with_staff_of_its_own(
    database: Database, installation: Installation
) -> None:
    await hire_csm("real@company.example")
    assert not await demo.make(installation)
    assert await Account.all().count() == 0
    assert await demo.cast() == []


async def test_the_cast_is_who_is_there(database: Database, installation: Installation) -> None:
    await demo.make(installation)
    await provisioning.deactivate_staff("support@vendor.example")
    who = [character.who for character in await demo.cast()]
    assert {"alice@acme.example", "csm@vendor.example", "billing@vendor.example", "host", "gatekeeper"} <= set(who)
    assert "support@vendor.example" not in who
    assert len(who) == len(set(who))
