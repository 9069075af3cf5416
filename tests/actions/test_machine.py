"""The lifecycle as a state machine: whoever does whatever in whichever order, the database agrees with a small model.

The model is written from the vocabulary of the lifecycle, not from the code: it knows who may do what when, and says
for each action what must come of it. After each step the rows are compared with it, and with the rules that always
hold.
"""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app import accounts, auth, cancellation, db, demo, errors, feedback, lifecycle, main, offers, policy, restart
from app.auth import Call, Installation
from app.db import Database
from app.delivery.email import FolderMailer
from app.lifecycle import CancellationTiming, FeedbackReason
from app.timers import Timers
from tests import cast
from tests.cast import ALICE, BILLING, BOB, CAROL, CSM, GINA, SUPPORT

INGRID = "ingrid@initech.example"
PEOPLE = (ALICE, CAROL, BOB, GINA, INGRID, CSM, BILLING, SUPPORT)
STAFF = {CSM, BILLING, SUPPORT}

BILLING_MEMBERS = {"acme": {ALICE, CAROL}, "initech": {INGRID}, "globex": {GINA}}
MEMBERS = {"acme": {ALICE, CAROL, BOB}, "initech": {INGRID}, "globex": {GINA}}
NAMES = {"acme": "Acme", "initech": "Initech", "globex": "Globex"}
ASSISTED = {"globex"}
AT_PERIOD_END = {"initech"}

NOT_CONFIRMED_YET = {"PENDING_ASSISTANCE", "PENDING_CONFIRMATION"}

numbers = st.integers(0, 99)
"""Choose an account or a person: `Lifecycle.account` and `Lifecycle.person` prefer those who get somewhere."""
mostly = st.sampled_from([True, True, True, False])


@dataclass
class Request:
    id: UUID
    by: str
    status: str
    opened_by_staff: bool = False
    is_late: bool = False
    wrong_tries: int = 0
    generation: int = 0
    feedback: int = 0


@dataclass
class Account:
    reference: str
    id: UUID
    status: str = "ACTIVE"
    is_due: bool = False
    """Scheduled, and the paid period is over."""
    epoch: int = 0
    requests: list[Request] = field(default_factory=list)
    history: list[str] = field(default_factory=list)
    accepted: set[str] = field(default_factory=set)
    seen: list[tuple[Any, ...]] = field(default_factory=list)
    """The history's rows as they were after the step before."""

    @property
    def has_no_access(self) -> bool:
        """From the moment on at which the cancellation takes effect, also when the worker is late."""
        return self.status == "CANCELED" or self.is_due

    @property
    def open(self) -> Request | None:
        newest = self.requests[-1] if self.requests else None
        return newest if newest and newest.status in NOT_CONFIRMED_YET | {"CONFIRMED"} else None

    @property
    def pending(self) -> Request | None:
        """What can still be confirmed, or opened so that it can."""
        request = self.open
        return request if request and request.status in NOT_CONFIRMED_YET and not request.is_late else None


class Lifecycle(RuleBasedStateMachine):
    """One example: a database of its own with the demo company, and its model."""

    seed: ClassVar[Path]
    installation: ClassVar[Installation]

    def __init__(self) -> None:
        super().__init__()
        self.file = self.seed.with_name("example.db")
        shutil.copy(self.seed, self.file)
        self.runner = asyncio.Runner()
        self.database = self.runner.run(Database.open(f"sqlite://{self.file}"))
        self.model: dict[str, Account] = {}

    def teardown(self) -> None:
        self.runner.run(self.database.close())
        self.runner.close()

    def run(self, action: Awaitable[Any]) -> Any:
        async def bound() -> Any:
            with self.database.bind():
                return await action

        return self.runner.run(bound())

    def call(self, who: str) -> Call:
        token = self.installation.tokens.mint(cast.subject(who), timedelta(hours=1))
        return Call(identity=self.run(self.installation.tokens.verify(token)), installation=self.installation)

    def expect(self, refusal: type[Exception] | None, action: Awaitable[Any]) -> Any:
        """The action's answer, or None when it was refused as it had to be."""
        answer, refused = None, None
        try:
            answer = self.run(action)
        except (errors.Refusal, errors.RequestError) as error:
            refused = error
        assert (type(refused) if refused else None) is refusal, f"it came to {answer} {refused!r}"
        return answer

    @initialize()
    def read_accounts(self) -> None:
        for row in self.run(db.fetch("SELECT id, reference FROM account")):
            if row["reference"] in NAMES:
                self.model[row["reference"]] = Account(row["reference"], db.as_uuid(row["id"]))

    def account(self, number: int, fits: Callable[[Account], object]) -> Account:
        """Three times of four one that fits, if there is one."""
        everyone = list(self.model.values())
        fitting = [account for account in everyone if fits(account)]
        return fitting[number % len(fitting)] if number % 4 and fitting else everyone[number % len(everyone)]

    def person(self, number: int, account: Account, *, or_staff: str | None = None) -> str:
        """Three times of four one who is not refused for who they are."""
        likely = [*sorted(BILLING_MEMBERS[account.reference]), *([or_staff] if or_staff else [])]
        return likely[number % len(likely)] if number % 4 else PEOPLE[number // 4 % len(PEOPLE)]

    def refused(self, account: Account, who: str, allowed: set[str]) -> type[Exception] | None:
        """Who is refused whatever the state, and how: a former member, a stranger, somebody without the permission."""
        if who not in STAFF:
            if any(who in MEMBERS[one.reference] and one.has_no_access for one in self.model.values()):
                return errors.AccessRemoved  # everywhere: nobody of these has another account
            if who not in MEMBERS[account.reference]:
                return errors.NotFound
        return None if who in allowed else errors.PermissionDenied

    def some(self, status: str) -> bool:
        return any(account.status == status for account in self.model.values())

    # ---------------------------------------------------------------------------------------------------- actions

    @rule(where=numbers, by=numbers, reason=st.none() | st.sampled_from(FeedbackReason))
    def cancel(self, where: int, by: int, reason: FeedbackReason | None) -> None:
        account = self.account(where, lambda account: account.status == "ACTIVE")
        self.cancel_as(self.person(by, account, or_staff=CSM), account, reason)

    def cancel_as(self, who: str, account: Account, reason: FeedbackReason | None = None) -> None:
        reference = account.reference
        by_staff = who in STAFF
        refusal = self.refused(account, who, BILLING_MEMBERS[reference] | {CSM, BILLING})
        request = account.pending
        if refusal is None and account.status != "ACTIVE":
            refusal = errors.AccountStateRefused
        opens = by_staff and request is not None and request.status == "PENDING_ASSISTANCE"
        if refusal is None and request is not None and not (opens or request.by == who or request.opened_by_staff):
            refusal = errors.CancellationAlreadyRequested
        done = self.expect(
            refusal,
            cancellation.cancel(self.call(who), account.id, reason=reason, note="She is sure." if by_staff else None),
        )
        if done is None:
            return
        if request is None:
            late = account.open
            if late is not None:
                late.status = "EXPIRED"
                account.history.append("cancellation_expired")
            request = Request(done.request_id, who, "PENDING_CONFIRMATION", opened_by_staff=by_staff)
            account.requests.append(request)
            account.history.append("cancellation_requested")
            if reference in ASSISTED and not by_staff:
                request.status = "PENDING_ASSISTANCE"
                account.history.append("cancellation_assistance_requested")
        elif opens:
            request.status, request.opened_by_staff = "PENDING_CONFIRMATION", True
            account.history.append("cancellation_requested")
        elif request.status == "PENDING_CONFIRMATION" and request.wrong_tries == lifecycle.MAX_WRONG_TRIES:
            request.wrong_tries, request.generation = 0, request.generation + 1
        assert done.request_id == request.id
        confirmable = request.status == "PENDING_CONFIRMATION" and not by_staff
        assert done.confirmation_token == (self.token(request) if confirmable else None)

    def token(self, request: Request) -> str:
        return self.installation.tokens.confirmation_token(request.id, request.generation)

    @rule(where=numbers, by=numbers, right=mostly, typed=mostly)
    def confirm(self, where: int, by: int, right: bool, typed: bool) -> None:
        account = self.account(where, lambda account: account.pending)
        if account.requests:
            self.confirm_as(self.person(by, account), account, right=right, typed=typed)

    def confirm_as(self, who: str, account: Account, *, right: bool, typed: bool) -> None:
        reference = account.reference
        request = account.requests[-1]
        refusal = self.refused(account, who, BILLING_MEMBERS[reference])
        if refusal is None and (account.pending is None or request.status != "PENDING_CONFIRMATION"):
            refusal = errors.ConfirmationExpired if request.is_late and account.open else errors.AccountStateRefused
        if refusal is None and (not right or request.wrong_tries == lifecycle.MAX_WRONG_TRIES):
            refusal = errors.ConfirmationTokenInvalid
            request.wrong_tries += request.wrong_tries < lifecycle.MAX_WRONG_TRIES
        if refusal is None and not typed:
            refusal = errors.AccountNameMismatch
        done = self.expect(
            refusal,
            cancellation.confirm(
                self.call(who),
                request.id,
                confirmation_token=self.token(request) if right else "guess",
                account_name=NAMES[reference] if typed else "Something else",
            ),
        )
        if done is None:
            return
        if reference in AT_PERIOD_END:
            request.status, account.status = "CONFIRMED", "CANCELLATION_SCHEDULED"
            account.history.append("cancellation_scheduled")
        else:
            self.take_effect(account, request)

    def take_effect(self, account: Account, request: Request) -> None:
        request.status, account.status, account.is_due = "EFFECTIVE", "CANCELED", False
        account.epoch += 1
        account.history.append("canceled")

    @precondition(lambda self: any(account.requests for account in self.model.values()))
    @rule(where=numbers, by=numbers)
    def withdraw(self, where: int, by: int) -> None:
        account = self.account(where, lambda account: account.open)
        reference, who = account.reference, self.person(by, account, or_staff=CSM)
        refusal = self.refused(account, who, BILLING_MEMBERS[reference] | {CSM})
        request = account.open if account.status == "CANCELLATION_SCHEDULED" else account.pending
        if refusal is None and (request is None or account.is_due):
            refusal = errors.AccountStateRefused
        if self.expect(refusal, cancellation.withdraw(self.call(who), account.id)) is not None:
            assert request is not None
            request.status, account.status = "WITHDRAWN", "ACTIVE"
            account.history.append("cancellation_withdrawn")

    @rule(where=numbers, by=numbers, accepting=st.booleans(), pick=st.integers(0, 5))
    def answer_offer(self, where: int, by: int, accepting: bool, pick: int) -> None:
        account = self.account(where, lambda account: account.pending)
        reference, who = account.reference, self.person(by, account)
        made = self.run(
            db.fetch(
                "SELECT id, request_id, code, status FROM offer WHERE account_id = $1 ORDER BY id DESC", account.id
            )
        )
        if not made:
            return
        offer = made[pick % len(made)]
        request = account.pending
        refusal = self.refused(account, who, BILLING_MEMBERS[reference])
        if refusal is None and request is None:
            refusal = errors.AccountStateRefused
        if refusal is None and request is not None and db.as_uuid(offer["request_id"]) != request.id:
            refusal = errors.RequestStateRefused
        if refusal is None and offer["status"] != "OPEN":
            refusal = errors.OfferUnavailable
        action = offers.accept if accepting else offers.decline
        if self.expect(refusal, action(self.call(who), db.as_uuid(offer["id"]))) is None:
            return
        assert request is not None
        assert offer["code"] not in account.accepted, "not made again within its cooldown"
        if accepting:
            request.status = "SAVED"
            account.accepted.add(offer["code"])
        account.history.append("offer_accepted" if accepting else "offer_declined")

    @rule(where=numbers, by=numbers, pick=st.integers(0, 5), reason=st.sampled_from(FeedbackReason))
    def submit_feedback(self, where: int, by: int, pick: int, reason: FeedbackReason) -> None:
        account = self.account(where, lambda account: account.requests)
        reference, who = account.reference, self.person(by, account)
        if not account.requests:
            return
        request = account.requests[-1 - pick % len(account.requests)]
        refusal = self.refused(account, who, BILLING_MEMBERS[reference])
        if refusal is None and request.feedback == lifecycle.MAX_FEEDBACK_PER_REQUEST:
            refusal = errors.InvalidInput
        action = feedback.submit(self.call(who), request.id, reason=reason, comment="Because")
        if self.expect(refusal, action) is not None:
            request.feedback += 1
            account.history.append("feedback_submitted")

    @rule(where=numbers, who=st.sampled_from([BILLING, *PEOPLE]))
    def restart(self, where: int, who: str) -> None:
        self.restart_as(who, self.account(where, lambda account: account.status == "CANCELED"))

    def restart_as(self, who: str, account: Account) -> None:
        refusal = self.refused(account, who, {BILLING})
        if refusal is None and account.status != "CANCELED":
            refusal = errors.AccountStateRefused
        if self.expect(refusal, restart.restart(self.call(who), account.id)) is not None:
            account.requests[-1].status, account.status = "REVERTED", "ACTIVE"
            account.epoch += 1
            account.history.append("restarted")

    @rule(where=numbers)
    def the_story_goes_on(self, where: int) -> None:
        """What usually comes next, so that the machine also gets far."""
        account = self.account(where, lambda account: account.open)
        request = account.pending
        somebody = min(BILLING_MEMBERS[account.reference])
        if account.status == "CANCELED":
            self.restart_as(BILLING, account)
        elif account.status == "CANCELLATION_SCHEDULED":
            self.the_paid_period_ends()
            self.timers_run()
        elif request is None:
            self.cancel_as(somebody, account)
        elif request.status == "PENDING_ASSISTANCE":
            self.cancel_as(CSM, account)
        else:
            self.confirm_as(somebody, account, right=True, typed=True)

    # --------------------------------------------------------------------------------------------- the clock moves

    @precondition(lambda self: any(account.pending for account in self.model.values()))
    @rule(where=numbers)
    def the_time_to_confirm_passes(self, where: int) -> None:
        request = self.account(where, lambda account: account.pending).open
        if request is not None and request.status == "PENDING_CONFIRMATION":
            self.run(
                db.execute(
                    "UPDATE cancellation_request SET confirmation_expires_at = requested_at WHERE id = $1", request.id
                )
            )
            request.is_late = True

    @precondition(lambda self: self.some("CANCELLATION_SCHEDULED"))
    @rule()
    def the_paid_period_ends(self) -> None:
        self.run(
            db.execute(
                "UPDATE account SET cancellation_effective_at = created_at WHERE status = 'CANCELLATION_SCHEDULED'"
            )
        )
        for account in self.model.values():
            account.is_due = account.status == "CANCELLATION_SCHEDULED"

    @rule()
    def timers_run(self) -> None:
        due = 0
        for account in self.model.values():
            request = account.open
            if request is not None and request.is_late and request.status == "PENDING_CONFIRMATION":
                request.status = "EXPIRED"
                account.history.append("cancellation_expired")
                due += 1
            if account.is_due:
                assert request is not None
                self.take_effect(account, request)
                due += 1
        assert self.run(Timers(self.installation, forget=FolderMailer(self.seed).forget).run()) == due

    @precondition(lambda self: self.some("CANCELED"))
    @rule()
    def nobody_restarts_after_the_window(self) -> None:
        """The window is over for a moment: the billing team is refused, and the account stays as it is."""
        account = next(account for account in self.model.values() if account.status == "CANCELED")
        dates = self.run(
            db.fetch_one(
                "SELECT canceled_at, restartable_until, deletion_scheduled_for, reminder_due_at FROM account "
                "WHERE id = $1",
                account.id,
            )
        )
        move = (
            "UPDATE account SET canceled_at = $2, restartable_until = $3, deletion_scheduled_for = $4, "
            "reminder_due_at = $5 WHERE id = $1"
        )
        start, *ends = (db.as_datetime(value) for value in dates.values())
        past = start - timedelta(hours=1_500)
        over = past + timedelta(hours=1_440)
        self.run(db.execute(move, account.id, past, over, over, past))
        self.expect(errors.RestartWindowClosed, restart.restart(self.call(BILLING), account.id))
        self.run(db.execute(move, account.id, start, *ends))

    # ------------------------------------------------------------------------------------------- what always holds

    @invariant()
    def rows_agree(self) -> None:
        for account in self.model.values():
            row = self.run(db.fetch_one("SELECT * FROM account WHERE id = $1", account.id))
            assert (row["status"], row["epoch"]) == (account.status, account.epoch)
            is_canceled = account.status == "CANCELED"
            assert [
                row[name] is not None for name in ("canceled_at", "restartable_until", "deletion_scheduled_for")
            ] == [is_canceled] * 3
            assert (row["cancellation_effective_at"] is not None) == (account.status == "CANCELLATION_SCHEDULED")
            if is_canceled:
                window = db.as_datetime(row["deletion_scheduled_for"]) - db.as_datetime(row["canceled_at"])
                assert window == timedelta(hours=1_440)
            requests = self.run(
                db.fetch("SELECT id, status FROM cancellation_request WHERE account_id = $1 ORDER BY id", account.id)
            )
            assert [(db.as_uuid(one["id"]), one["status"]) for one in requests] == [
                (one.id, one.status) for one in account.requests
            ]
            assert sum(one["status"] in lifecycle.OPEN_REQUEST for one in requests) <= 1
            given = self.run(db.fetch_one("SELECT count(*) AS given FROM feedback WHERE account_id = $1", account.id))
            assert given["given"] == sum(one.feedback for one in account.requests)

    @invariant()
    def history_is_appended(self) -> None:
        for account in self.model.values():
            rows = self.run(db.fetch("SELECT * FROM transition WHERE account_id = $1 ORDER BY sequence", account.id))
            assert [row["sequence"] for row in rows] == list(range(1, len(rows) + 1))
            assert [row["type"].removeprefix("account.") for row in rows] == account.history
            epochs = [row["epoch"] for row in rows]
            assert epochs == sorted(epochs)
            assert (epochs[-1] if rows else 0) == account.epoch
            assert (rows[-1]["account_status"] if rows else "ACTIVE") == account.status
            told = [tuple(row.values()) for row in rows]
            assert told[: len(account.seen)] == account.seen, "what was written stays as it was"
            account.seen = told

    @invariant()
    def access_and_messages_follow_the_status(self) -> None:
        for reference, account in self.model.items():
            is_open = not account.has_no_access
            view = self.run(accounts.load(account.id))
            assert view.has_access(self.run(db.now())) is is_open
            for who in sorted(MEMBERS[reference])[:1]:
                caller = self.expect(
                    None if is_open else errors.AccessRemoved, auth.identify(self.call(who), account.id)
                )
                assert (caller is not None) is is_open


def test_the_lifecycle_agrees_with_its_model(sqlite_template: Path, tmp_path: Path) -> None:
    seed = tmp_path / "seed.db"
    shutil.copy(sqlite_template, seed)
    url = f"sqlite://{seed}"
    plans = dict(policy.load().plans)
    plans["startup"] = replace(plans["startup"], effective=CancellationTiming.PERIOD_END)
    installation = main.installation(cast.settings(tmp_path, url))
    installation = replace(installation, policy=replace(installation.policy, plans=plans))

    async def make() -> None:
        database = await Database.open(url)
        try:
            with database.bind():
                await demo.make(installation)
        finally:
            await database.close()

    asyncio.run(make())

    class Seeded(Lifecycle):
        pass

    Seeded.seed, Seeded.installation = seed, installation
    run_state_machine_as_test(
        Seeded,
        settings=settings(
            max_examples=20,
            stateful_step_count=40,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
