"""`sunset import`: a file of accounts comes in whole, bad lines are told by number, and memory stays where it is."""

import gc
import io
import tracemalloc
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from app import db, errors, importing, policy, provisioning
from app.auth import Installation
from app.db import Database
from app.importing import Summary
from app.lifecycle import MemberRole, Permission, StaffRole
from app.models import Account, Member
from app.provisioning import AccountItem, MemberItem
from app.receivers import Receivers
from app.settings import Settings
from app.tokens import DEVELOPMENT_ISSUER, Tokens

ALICE = {"subject": "alice", "email": "alice@acme.example", "name": "Alice Adams", "role": "ADMIN"}
ACME = {"reference": "acme", "name": "Acme", "planCode": "essentials", "members": [ALICE]}


@pytest.fixture
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    settings = Settings.load({"SUNSET_DATA_DIR": str(tmp_path_factory.mktemp("data"))})
    return Installation(
        policy=policy.load(),
        tokens=Tokens.from_settings(settings),
        mail_domain="sunset.example",
        member_issuer=DEVELOPMENT_ISSUER,
        rate_limit_caller=0,
        rate_limit_account=0,
        request_timeout=timedelta(seconds=10),
        data_dir=settings.data_dir,
        receivers=Receivers(""),
    )


def lines(*accounts: Any) -> bytes:
    return b"".join((one if isinstance(one, bytes) else orjson.dumps(one)) + b"\n" for one in accounts)


async def imported(
    installation: Installation, content: bytes, *, dry_run: bool = False
) -> tuple[Summary, dict[int, str]]:
    told: dict[int, str] = {}
    summary = await importing.run(
        installation,
        io.BytesIO(content),
        dry_run=dry_run,
        complain=lambda number, reason: told.update({number: reason}),
    )
    return summary, told


class Endless(io.RawIOBase):
    """A file that is made while it is read: `accounts` lines with two members each, every tenth of them bad."""

    def __init__(self, accounts: int) -> None:
        self._lines = self._make(accounts)

    def readline(self, size: int | None = -1, /) -> bytes:
        return next(self._lines, b"")

    def _make(self, accounts: int) -> Iterator[bytes]:
        for number in range(accounts):
            members = [ALICE | {"subject": f"member-{number}-{member}"} for member in range(2)]
            plan = "gold" if number % 10 == 9 else "startup"
            yield lines(ACME | {"reference": f"account-{number}", "planCode": plan, "members": members})


async def test_every_key_of_the_format_arrives(database: Database, installation: Installation) -> None:
    await provisioning.add_staff(
        email="csm@vendor.example",
        name="Casey Morgan",
        role=StaffRole.CUSTOMER_SUCCESS_MANAGER,
        issuer=DEVELOPMENT_ISSUER,
        subject="staff:csm",
    )
    carol = {
        "subject": "carol",
        "issuer": "https://id.example/",
        "email": "carol@acme.example",
        "name": "Carol Clark",
        "role": "MEMBER",
        "permissions": ["ACCESS_BILLING_AND_ACCOUNT_INFO"],
    }
    end = {"currentPeriodEnd": "2027-01-31T01:00:00+01:00", "csmEmail": "csm@vendor.example"}
    summary, told = await imported(installation, lines(ACME | end | {"members": [ALICE, carol]}))
    assert (summary, told) == (Summary(created=1), {})
    account = await Account.get(reference="acme").prefetch_related("csm")
    assert (account.name, account.plan_code) == ("Acme", "essentials")
    assert str(account.current_period_end) == "2027-01-31 00:00:00+00:00"
    assert account.csm is not None
    assert account.csm.email == "csm@vendor.example"
    members = {member.subject: member for member in await Member.all()}
    assert (members["alice"].issuer, members["alice"].role) == (DEVELOPMENT_ISSUER, MemberRole.ADMIN)
    assert (members["carol"].issuer, members["carol"].permissions) == (
        "https://id.example/",
        frozenset({Permission.ACCESS_BILLING_AND_ACCOUNT_INFO}),
    )


def test_the_documented_example_is_in_the_format() -> None:
    assert importing.__doc__ is not None
    example = importing.__doc__[importing.__doc__.index("{") :].partition("\n\n")[0]
    item = importing.parse(example.replace("\n", "").replace("     ", " ").encode())
    alice = MemberItem(
        subject="member:alice@acme.example", email="alice@acme.example", name="Alice Adams", role=MemberRole.ADMIN
    )
    assert item == AccountItem(reference="acme", name="Acme", plan_code="essentials", members=(alice,))


BAD: list[tuple[Any, str]] = [
    (b"{", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b'{"reference": NaN}', "not JSON"),
    (b'"acme"', "must be an object, not a text"),
    (b"[]", "must be an object, not a list"),
    (b"null", "must be an object, not null"),
    ({"name": "Acme", "planCode": "essentials"}, "reference: It is missing"),
    (ACME | {"reference": 7}, "reference: It must be a text, not a number"),
    (ACME | {"name": None}, "name: It must be a text, not null"),
    (ACME | {"plan": "essentials"}, "plan: There is no such key"),
    (ACME | {"planCode": "gold"}, "planCode: 'gold' is no plan"),
    (ACME | {"status": "CANCELED"}, "status: There is no such key"),
    (ACME | {"currentPeriodEnd": "tomorrow"}, "currentPeriodEnd: It must be a time"),
    (ACME | {"currentPeriodEnd": "2027-01-31T00:00:00"}, "currentPeriodEnd: A time needs its zone"),
    (ACME | {"currentPeriodEnd": "2027-01-31"}, "currentPeriodEnd: A time needs its zone"),
    (ACME | {"csmEmail": "nobody@vendor.example"}, "csmEmail: No active Customer Success Manager"),
    (ACME | {"members": {}}, "members: It must be a list, not an object"),
    (ACME | {"members": ["alice"]}, "members[0]: It must be an object, not a text"),
    (ACME | {"members": [ALICE | {"role": "OWNER"}]}, "members[0].role: It must be ADMIN or MEMBER, not 'OWNER'"),
    (ACME | {"members": [ALICE | {"permissions": "ALL"}]}, "members[0].permissions: It must be a list"),
    (ACME | {"members": [ALICE | {"permissions": ["ALL"]}]}, "members[0].permissions[0]: It must be ACCESS_BILLING"),
    (ACME | {"members": [ALICE | {"email": "alice"}]}, "members[0].email"),
    (ACME | {"members": [ALICE | {"rôle": True}]}, "members[0].rôle: There is no such key"),
    (ACME | {"members": [ALICE, ALICE]}, "members[1].subject: members[0] has the same subject"),
    (b'{"reference": "' + b"x" * importing.MAX_LINE_BYTES + b'"}', "longer than 4 MiB"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=[reason for _, reason in BAD])
async def test_a_bad_line_is_told_with_its_number_and_the_others_are_imported(
    sqlite_database: Database, installation: Installation, bad: Any, reason: str
) -> None:
    content = lines(ACME | {"reference": "one"}, b"", bad, ACME | {"reference": "two"})
    summary, told = await imported(installation, content)
    assert summary == Summary(created=2, bad=1)
    assert list(told) == [3]
    assert reason in told[3]
    assert {account.reference for account in await Account.all()} == {"one", "two"}


async def test_the_later_of_two_lines_holds_also_across_batches(database: Database, installation: Installation) -> None:
    others = [ACME | {"reference": f"other-{number}", "members": None} for number in range(600)]
    summary, told = await imported(
        installation,
        lines(ACME, ACME | {"name": "Second"}, *others, ACME | {"name": "Third", "members": []}),
    )
    assert (summary, told) == (Summary(created=601, updated=2), {})
    assert (await Account.get(reference="acme")).name == "Third"
    assert await Member.all().count() == 0


async def test_importing_again_changes_nothing(database: Database, installation: Installation) -> None:
    content = lines(*(ACME | {"reference": str(number)} for number in range(3)))
    await imported(installation, content)
    before = await db.fetch("SELECT * FROM account ORDER BY id") + await db.fetch("SELECT * FROM member ORDER BY id")
    summary, _ = await imported(installation, content)
    after = await db.fetch("SELECT * FROM account ORDER BY id") + await db.fetch("SELECT * FROM member ORDER BY id")
    assert (summary, after) == (Summary(unchanged=3), before)


async def test_a_dry_run_finds_what_only_the_database_knows_and_changes_nothing(
    database: Database, installation: Installation
) -> None:
    await imported(installation, lines(ACME))
    content = lines(ACME | {"name": "New"}, ACME | {"reference": "x", "csmEmail": "no@vendor.example"}, b"{")
    summary, told = await imported(installation, content, dry_run=True)
    assert summary == Summary(updated=1, bad=2)
    assert set(told) == {2, 3}
    assert [account.name for account in await Account.all()] == ["Acme"]


@pytest.mark.parametrize("dry_run", [True, False])
async def test_a_line_is_imported_without_the_members_who_are_staff_and_they_are_told(
    database: Database, installation: Installation, dry_run: bool
) -> None:
    await provisioning.add_staff(
        email="x@vendor.example", name="X", role=StaffRole.SUPPORT, issuer=DEVELOPMENT_ISSUER, subject="bob"
    )
    bob, carol = (ALICE | {"subject": one, "email": f"{one}@acme.example"} for one in ("bob", "carol"))
    await imported(installation, lines(ACME | {"members": [ALICE, carol]}))
    content = lines(b"{", ACME | {"name": "New", "members": [ALICE, bob]}, ACME | {"reference": "two"})
    summary, told = await imported(installation, content, dry_run=dry_run)
    assert summary == Summary(created=1, updated=1, bad=1, members_refused=1)
    assert set(told) == {1, 2}
    assert told[2].startswith("members[1].subject: The subject belongs to staff")
    account = await Account.get(reference="acme")
    subjects = {member.subject for member in await Member.filter(account_id=account.id)}
    assert (account.name, subjects) == (("Acme", {"alice", "carol"}) if dry_run else ("New", {"alice"}))


async def test_batches_stay_within_what_a_sync_takes(sqlite_database: Database, installation: Installation) -> None:
    """Accounts with very many members make a batch full before it has 500 accounts."""
    crowd = [ALICE | {"subject": str(number)} for number in range(900)]
    summary, told = await imported(
        installation, lines(*(ACME | {"reference": str(number), "members": crowd} for number in range(13)))
    )
    assert (summary, told) == (Summary(created=13), {})
    assert await Member.all().count() == 13 * 900


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
async def test_files_of_all_editors_are_read(sqlite_database: Database, installation: Installation, end: bytes) -> None:
    content = b"\xef\xbb\xbf" + orjson.dumps(ACME) + b"\r\n   \r\n" + orjson.dumps(ACME | {"reference": "two"}) + end
    summary, told = await imported(installation, content)
    assert (summary, told) == (Summary(created=2), {})


async def test_what_was_told_as_progress_is_imported_when_the_database_goes_away(
    sqlite_database: Database, installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = provisioning.sync
    done: list[int] = []

    async def failing(*args: Any, **options: Any) -> Any:
        if done:
            raise errors.Unavailable("The database is away.")
        return await sync(*args, **options)

    monkeypatch.setattr(provisioning, "sync", failing)
    with pytest.raises(errors.Unavailable):
        await importing.run(
            installation,
            io.BytesIO(lines(*(ACME | {"reference": str(number)} for number in range(700)))),
            complain=lambda number, reason: None,
            progress=lambda count, size: done.append(count),
        )
    assert [await Account.all().count()] == done == [500]


async def test_memory_does_not_grow_with_the_file(sqlite_database: Database, installation: Installation) -> None:
    """The most that Python held at a time: the same for a file that is five times as long."""

    async def peak(accounts: int) -> int:
        gc.collect()
        tracemalloc.start()
        try:
            summary = await importing.run(installation, Endless(accounts), complain=lambda number, reason: None)  # type: ignore[arg-type]
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert summary.bad == accounts // 10
        assert summary.created + summary.updated + summary.unchanged == accounts - accounts // 10
        return most

    await peak(600)  # fills the caches of imports and statements
    assert await peak(5_000) < 1.25 * await peak(1_000)


async def test_a_real_file_of_accounts_becomes_rows(
    database: Database, installation: Installation, tmp_path: Path
) -> None:
    """Two thousand accounts with ten thousand members; a second file takes a member from each and adds one."""

    def crowd(number: int, first: int) -> list[dict[str, str]]:
        return [ALICE | {"subject": f"{number}-{member}"} for member in range(first, first + 5)]

    for first, expected in ((0, Summary(created=2_000)), (1, Summary(updated=2_000))):
        file = tmp_path / "accounts.jsonl"
        file.write_bytes(
            lines(*(ACME | {"reference": str(number), "members": crowd(number, first)} for number in range(2_000)))
        )
        with file.open("rb") as stream:
            summary = await importing.run(installation, stream, complain=lambda number, reason: None)
        assert summary == expected
    assert await Member.all().count() == 10_000
    assert await Member.filter(subject="7-0").count() == 0
    assert await Member.filter(subject="7-5").count() == 1
