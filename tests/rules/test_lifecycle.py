"""The rules of an account's life: who may do what when, written as the table that a product manager would draw."""

import contextlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from app import errors, lifecycle
from app.errors import Contact
from app.lifecycle import (
    AccountFacts,
    AccountStatus,
    Action,
    Actor,
    ActorKind,
    CancellationTiming,
    CancelStep,
    Channel,
    Phase,
    Relation,
    RequestFacts,
    RequestStatus,
)

NOW = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)
ALICE, CAROL, CASEY = UUID(int=1), UUID(int=2), UUID(int=3)
CSM = Contact(name="Casey", email="csm@vendor.example")
BILLING = Contact(name="Billing Team", email="billing@vendor.example")

# yes: allowed. no: not for them, whatever the state. Otherwise the reason why not now:
# state: the account is in another state; asked: somebody else has asked already; closed: too late, a new account must
# be set up. The open request, where there is one, is the asking member's own.
RULES = """
                        ACTIVE  ASSISTANCE_PENDING  CONFIRMATION_PENDING  SCHEDULED  CANCELED  HELD   DELETING  DELETED

CANCEL_ACCOUNT
  BILLING_MEMBER         yes     yes                 yes                   state      state     state   state     state
  ACCOUNT_CSM            yes     yes                 asked                 state      state     state   state     state
  BILLING_TEAM           yes     yes                 asked                 state      state     state   state     state
  everybody else         no      no                  no                    no         no        no      no        no

SUBMIT_FEEDBACK
  BILLING_MEMBER         yes     yes                 yes                   yes        yes       yes     state     state
  FEEDBACK_LINK          state   state               state                 state      yes       yes     state     state
  everybody else         no      no                  no                    no         no        no      no        no

ACCEPT_OFFER
  BILLING_MEMBER         state   yes                 yes                   state      state     state   state     state
  everybody else         no      no                  no                    no         no        no      no        no

DECLINE_OFFER
  BILLING_MEMBER         state   yes                 yes                   state      state     state   state     state
  everybody else         no      no                  no                    no         no        no      no        no

WITHDRAW_CANCELLATION
  BILLING_MEMBER         state   yes                 yes                   yes        state     state   state     state
  ACCOUNT_CSM            state   yes                 yes                   yes        state     state   state     state
  everybody else         no      no                  no                    no         no        no      no        no

CONFIRM_CANCELLATION
  BILLING_MEMBER         state   state               yes                   state      state     state   state     state
  CONFIRM_LINK           state   state               yes                   state      state     state   state     state
  everybody else         no      no                  no                    no         no        no      no        no

RESTART_ACCOUNT
  BILLING_TEAM           state   state               state                 state      yes       yes     closed    closed
  everybody else         no      no                  no                    no         no        no      no        no

REQUEST_RESTART
  RESTART_LINK           state   state               state                 state      yes       yes     closed    closed
  everybody else         no      no                  no                    no         no        no      no        no
HOLD_DELETION
  BILLING_TEAM           state   state               state                 state      yes       state   state     state
  everybody else         no      no                  no                    no         no        no      no        no

RELEASE_DELETION
  BILLING_TEAM           state   state               state                 state      state     yes     state     state
  everybody else         no      no                  no                    no         no        no      no        no
"""

ANSWERS: dict[str, type[errors.Refusal] | None] = {
    "yes": None,
    "no": errors.PermissionDenied,
    "state": errors.AccountStateRefused,
    "asked": errors.CancellationAlreadyRequested,
    "closed": errors.RestartWindowClosed,
}


def read_rules() -> dict[tuple[Action, Relation, Phase], str]:
    """The table above, with `everybody else` spelled out."""
    heading, *lines = [line for line in RULES.splitlines() if line.strip()]
    phases = [Phase[name] for name in heading.split()]
    rules: dict[tuple[Action, Relation, Phase], str] = {}
    action = None
    for line in lines:
        if not line.startswith(" "):
            action = Action[line.strip()]
            continue
        assert action is not None
        *who, answers = line.strip().split(maxsplit=2 if line.strip().startswith("everybody") else 1)
        named = list(Relation) if who == ["everybody", "else"] else [Relation[who[0]]]
        for relation, (phase, answer) in product(named, zip(phases, answers.split(), strict=True)):
            rules.setdefault((action, relation, phase), answer)
    return rules


TABLE = read_rules()


def actor(*relations: Relation, id: UUID = ALICE, kind: ActorKind = ActorKind.MEMBER) -> Actor:  # noqa: A002
    return Actor(kind=kind, id=id, name="Somebody", relations=frozenset(relations))


MEMBER = actor(Relation.MEMBER, Relation.BILLING_MEMBER)
COLLEAGUE = actor(Relation.MEMBER, Relation.BILLING_MEMBER, id=CAROL)
STAFF = actor(Relation.STAFF, Relation.ACCOUNT_CSM, id=CASEY, kind=ActorKind.STAFF)
OF_STAFF = {Relation.ACCOUNT_CSM, Relation.BILLING_TEAM, Relation.STAFF, Relation.SERVICE}


def request(status: RequestStatus = RequestStatus.PENDING_CONFIRMATION, **changes: object) -> RequestFacts:
    facts = RequestFacts(
        id=UUID(int=9),
        status=status,
        requested_by_id=ALICE,
        opened_by_staff_at=None,
        confirmation_expires_at=None if status is RequestStatus.PENDING_ASSISTANCE else NOW + timedelta(hours=72),
        wrong_tries=0,
    )
    return replace(facts, **changes)  # type: ignore[arg-type]


def account(status: AccountStatus = AccountStatus.ACTIVE, **changes: object) -> AccountFacts:
    window_ends = {
        AccountStatus.CANCELED: NOW + timedelta(days=1),
        AccountStatus.DELETING: NOW - timedelta(days=1),
        AccountStatus.DELETED: NOW - timedelta(days=1),
    }.get(status)
    facts = AccountFacts(
        id=UUID(int=8),
        name="Acme",
        status=status,
        channel=Channel.SELF_SERVE,
        effective=CancellationTiming.IMMEDIATE,
        current_period_end=None,
        cancellation_effective_at=None,
        restartable_until=window_ends,
        deletion_scheduled_for=window_ends,
        deletion_held_at=None,
        csm=CSM,
        billing_contact=BILLING,
        request=None,
    )
    return replace(facts, **changes)  # type: ignore[arg-type]


IN_PHASE = {
    Phase.ACTIVE: account(),
    Phase.ASSISTANCE_PENDING: account(request=request(RequestStatus.PENDING_ASSISTANCE)),
    Phase.CONFIRMATION_PENDING: account(request=request()),
    Phase.SCHEDULED: account(AccountStatus.CANCELLATION_SCHEDULED, request=request(RequestStatus.CONFIRMED)),
    Phase.CANCELED: account(AccountStatus.CANCELED),
    Phase.HELD: account(AccountStatus.CANCELED, deletion_held_at=NOW - timedelta(days=1), deletion_scheduled_for=None),
    Phase.DELETING: account(AccountStatus.DELETING),
    Phase.DELETED: account(AccountStatus.DELETED),
}


def refusal(action: Action, who: Actor, facts: AccountFacts, now: datetime = NOW) -> errors.Refusal | None:
    """What the API would show in `allowedActions`."""
    (one,) = [one for one in lifecycle.availability(who, facts, now) if one.action is action]
    return one.refusal


def test_the_table_has_every_action_relation_and_phase() -> None:
    assert set(TABLE) == set(product(Action, Relation, Phase))


@pytest.mark.parametrize("phase", Phase)
def test_the_phases_are_what_the_accounts_are_in(phase: Phase) -> None:
    assert IN_PHASE[phase].phase(NOW) is phase


@pytest.mark.parametrize(
    ("action", "relation", "phase", "expected"),
    [(*key, answer) for key, answer in TABLE.items()],
    ids=["-".join(key) for key in TABLE],
)
def test_rule(action: Action, relation: Relation, phase: Phase, expected: str) -> None:
    who = actor(relation, id=CASEY, kind=ActorKind.STAFF) if relation in OF_STAFF else actor(relation)
    refused = refusal(action, who, IN_PHASE[phase])
    assert (None if refused is None else type(refused)) is ANSWERS[expected]


@pytest.mark.parametrize("action", Action)
@pytest.mark.parametrize("phase", Phase)
def test_nobody_in_particular_may_do_nothing(action: Action, phase: Phase) -> None:
    with pytest.raises(errors.PermissionDenied):
        lifecycle.check(action, actor(), IN_PHASE[phase], NOW)


def test_the_system_itself_is_allowed_nothing_by_the_table() -> None:
    assert all(isinstance(one.refusal, errors.PermissionDenied) for one in availability_of(lifecycle.SYSTEM))


def availability_of(who: Actor) -> list[lifecycle.Availability]:
    return [one for facts in IN_PHASE.values() for one in lifecycle.availability(who, facts, NOW)]


def test_a_refused_state_names_the_account_whose_state_it_is() -> None:
    with pytest.raises(errors.AccountStateRefused) as refused:
        lifecycle.check(Action.WITHDRAW_CANCELLATION, MEMBER, account(), NOW)
    assert refused.value.account_id == account().id


class TestAsking:
    @pytest.mark.parametrize(
        ("who", "open_request", "channel", "step"),
        [
            pytest.param(MEMBER, None, Channel.SELF_SERVE, CancelStep.REQUEST, id="a member alone"),
            pytest.param(MEMBER, None, Channel.ASSISTED, CancelStep.REQUEST_ASSISTANCE, id="a member with help"),
            pytest.param(STAFF, None, Channel.SELF_SERVE, CancelStep.OPEN_NEW, id="staff unasked"),
            pytest.param(STAFF, None, Channel.ASSISTED, CancelStep.OPEN_NEW, id="staff unasked, assisted"),
            pytest.param(MEMBER, request(), Channel.SELF_SERVE, CancelStep.RETURN, id="one's own again"),
            pytest.param(
                MEMBER,
                request(RequestStatus.PENDING_ASSISTANCE),
                Channel.ASSISTED,
                CancelStep.RETURN,
                id="one's own, waiting for help",
            ),
            pytest.param(
                STAFF,
                request(RequestStatus.PENDING_ASSISTANCE),
                Channel.ASSISTED,
                CancelStep.OPEN,
                id="staff opens what waits",
            ),
            pytest.param(
                COLLEAGUE,
                request(opened_by_staff_at=NOW),
                Channel.ASSISTED,
                CancelStep.RETURN,
                id="what staff opened is any member's to confirm",
            ),
            pytest.param(
                STAFF,
                request(opened_by_staff_at=NOW),
                Channel.ASSISTED,
                CancelStep.RETURN,
                id="what staff opened, again",
            ),
            pytest.param(
                MEMBER,
                request(RequestStatus.PENDING_ASSISTANCE),
                Channel.SELF_SERVE,
                CancelStep.CONFIRM_ALONE,
                id="one's own, and the plan became self-served",
            ),
            pytest.param(
                MEMBER, request(), Channel.ASSISTED, CancelStep.HAND_OVER, id="one's own, and the plan became assisted"
            ),
            pytest.param(
                MEMBER,
                request(opened_by_staff_at=NOW),
                Channel.ASSISTED,
                CancelStep.RETURN,
                id="one's own, opened by staff, is not handed over again",
            ),
            pytest.param(
                COLLEAGUE,
                request(confirmation_expires_at=NOW),
                Channel.SELF_SERVE,
                CancelStep.REQUEST,
                id="a colleague's expired one is none",
            ),
            pytest.param(
                STAFF,
                request(confirmation_expires_at=NOW),
                Channel.SELF_SERVE,
                CancelStep.OPEN_NEW,
                id="a member's expired one is none",
            ),
        ],
    )
    def test_leads_to(self, who: Actor, open_request: RequestFacts | None, channel: Channel, step: CancelStep) -> None:
        assert lifecycle.cancel(who, account(request=open_request, channel=channel), NOW) is step

    @pytest.mark.parametrize("status", [RequestStatus.PENDING_ASSISTANCE, RequestStatus.PENDING_CONFIRMATION])
    def test_is_refused_while_a_colleagues_request_is_open(self, status: RequestStatus) -> None:
        with pytest.raises(errors.CancellationAlreadyRequested) as refused:
            lifecycle.cancel(COLLEAGUE, account(request=request(status)), NOW)
        assert refused.value.request_id == request().id

    def test_is_refused_to_staff_while_a_member_is_about_to_confirm(self) -> None:
        with pytest.raises(errors.CancellationAlreadyRequested):
            lifecycle.cancel(STAFF, account(request=request()), NOW)

    def test_by_nobody_known_is_not_taken_for_the_request_of_somebody_forgotten(self) -> None:
        nobody = Actor(kind=ActorKind.MEMBER, id=None, name="", relations=frozenset({Relation.BILLING_MEMBER}))
        with pytest.raises(errors.CancellationAlreadyRequested):
            lifecycle.cancel(nobody, account(request=request(requested_by_id=None)), NOW)


class TestConfirming:
    def test_alone_is_refused_once_the_plan_is_assisted(self) -> None:
        with pytest.raises(errors.AssistedPlan) as refused:
            lifecycle.check(
                Action.CONFIRM_CANCELLATION, MEMBER, account(request=request(), channel=Channel.ASSISTED), NOW
            )
        assert refused.value.contact == CSM
        assert CSM.email in refused.value.message

    def test_what_staff_opened_is_for_members(self) -> None:
        opened = account(request=request(opened_by_staff_at=NOW), channel=Channel.ASSISTED)
        lifecycle.check(Action.CONFIRM_CANCELLATION, MEMBER, opened, NOW)
        lifecycle.check(Action.CONFIRM_CANCELLATION, actor(Relation.CONFIRM_LINK), opened, NOW)
        with pytest.raises(errors.PermissionDenied):
            lifecycle.check(Action.CONFIRM_CANCELLATION, STAFF, opened, NOW)

    def test_works_until_the_time_is_over_and_not_at_it(self) -> None:
        ends = NOW + timedelta(hours=72)
        facts = account(request=request(confirmation_expires_at=ends))
        lifecycle.check(Action.CONFIRM_CANCELLATION, MEMBER, facts, ends - timedelta(milliseconds=1))
        with pytest.raises(errors.ConfirmationExpired) as refused:
            lifecycle.check(Action.CONFIRM_CANCELLATION, MEMBER, facts, ends)
        assert refused.value.expired_at == ends

    def test_what_waits_for_assistance_never_expires(self) -> None:
        waiting = request(RequestStatus.PENDING_ASSISTANCE, confirmation_expires_at=NOW - timedelta(days=1))
        assert account(request=waiting).phase(NOW) is Phase.ASSISTANCE_PENDING

    @pytest.mark.parametrize(
        ("timing", "period_end", "takes_effect"),
        [
            pytest.param(CancellationTiming.IMMEDIATE, NOW + timedelta(days=9), None, id="immediate"),
            pytest.param(
                CancellationTiming.PERIOD_END, NOW + timedelta(days=9), NOW + timedelta(days=9), id="period end"
            ),
            pytest.param(
                CancellationTiming.PERIOD_END,
                NOW + timedelta(milliseconds=1),
                NOW + timedelta(milliseconds=1),
                id="just before the period's end",
            ),
            pytest.param(CancellationTiming.PERIOD_END, NOW, None, id="at the period's end"),
            pytest.param(CancellationTiming.PERIOD_END, NOW - timedelta(days=9), None, id="after the period's end"),
            pytest.param(CancellationTiming.PERIOD_END, None, None, id="no period"),
        ],
    )
    def test_takes_effect(
        self, timing: CancellationTiming, period_end: datetime | None, takes_effect: datetime | None
    ) -> None:
        confirmed = lifecycle.confirm(account(effective=timing, current_period_end=period_end), NOW)
        assert confirmed.effective_at == (takes_effect or NOW)
        assert confirmed.at_once is (takes_effect is None)


class TestRestarting:
    def test_works_until_the_window_ends_and_not_at_it(self) -> None:
        billing_team = actor(Relation.BILLING_TEAM, id=CASEY, kind=ActorKind.STAFF)
        facts = account(AccountStatus.CANCELED)
        ends = facts.restartable_until
        assert ends is not None
        assert refusal(Action.RESTART_ACCOUNT, billing_team, facts, ends - timedelta(milliseconds=1)) is None
        closed = refusal(Action.RESTART_ACCOUNT, billing_team, facts, ends)
        assert isinstance(closed, errors.RestartWindowClosed)
        assert (closed.closed_at, closed.contact) == (ends, BILLING)
        assert "new account" in closed.message
        assert isinstance(
            refusal(Action.REQUEST_RESTART, actor(Relation.RESTART_LINK), facts, ends), errors.RestartWindowClosed
        )

    def test_of_a_held_account_ends_with_its_window_all_the_same(self) -> None:
        billing_team = actor(Relation.BILLING_TEAM, id=CASEY, kind=ActorKind.STAFF)
        held = account(AccountStatus.CANCELED, deletion_scheduled_for=None)
        assert refusal(Action.RESTART_ACCOUNT, billing_team, held) is None
        late = NOW + timedelta(days=2)
        assert isinstance(refusal(Action.RESTART_ACCOUNT, billing_team, held, late), errors.RestartWindowClosed)

    def test_window_without_an_end_is_a_mistake_of_the_database_and_not_an_answer(self) -> None:
        billing_team = actor(Relation.BILLING_TEAM, id=CASEY, kind=ActorKind.STAFF)
        with pytest.raises(ValueError, match="restartable_until"):
            lifecycle.check(
                Action.RESTART_ACCOUNT, billing_team, account(AccountStatus.CANCELED, restartable_until=None), NOW
            )


class TestRetentionWindow:
    SIXTY_DAYS = timedelta(hours=1440)

    @pytest.mark.parametrize(
        "canceled_at",
        [
            pytest.param(datetime(2026, 3, 1, 1, 30, tzinfo=UTC), id="summer time begins"),
            pytest.param(datetime(2026, 10, 1, 0, 30, tzinfo=UTC), id="summer time ends"),
            pytest.param(datetime(2028, 1, 15, 23, 59, 59, 999_000, tzinfo=UTC), id="a leap day"),
            pytest.param(datetime(2027, 1, 15, 23, 59, 59, 999_000, tzinfo=UTC), id="no leap day"),
            pytest.param(datetime(2026, 12, 1, tzinfo=UTC), id="a new year"),
        ],
    )
    def test_is_exactly_its_hours(self, canceled_at: datetime) -> None:
        window = lifecycle.retention_window(canceled_at, self.SIXTY_DAYS)
        assert window.canceled_at == canceled_at
        assert (window.deletion_scheduled_for - canceled_at) / timedelta(hours=1) == 1440
        assert window.restartable_until == window.deletion_scheduled_for

    def test_is_neither_longer_nor_shorter_where_the_clocks_change(self) -> None:
        berlin = ZoneInfo("Europe/Berlin")
        window = lifecycle.retention_window(datetime(2026, 3, 1, 12, 0, tzinfo=UTC), self.SIXTY_DAYS)
        began, ends = window.canceled_at.astimezone(berlin), window.deletion_scheduled_for.astimezone(berlin)
        assert (began.hour, ends.hour) == (13, 14)  # the same hours of UTC, another hour on the wall
        assert ends.date() - began.date() == timedelta(days=60)

    def test_over_a_leap_day_ends_a_calendar_day_earlier(self) -> None:
        leap = lifecycle.retention_window(datetime(2028, 1, 15, tzinfo=UTC), self.SIXTY_DAYS)
        common = lifecycle.retention_window(datetime(2027, 1, 15, tzinfo=UTC), self.SIXTY_DAYS)
        assert (leap.deletion_scheduled_for.month, leap.deletion_scheduled_for.day) == (3, 15)
        assert (common.deletion_scheduled_for.month, common.deletion_scheduled_for.day) == (3, 16)


@pytest.mark.parametrize(
    ("status", "works"),
    [
        (AccountStatus.ACTIVE, True),
        (AccountStatus.CANCELLATION_SCHEDULED, True),
        (AccountStatus.CANCELED, False),
        (AccountStatus.DELETING, False),
        (AccountStatus.DELETED, False),
    ],
)
def test_messages_and_access_stop_with_the_cancellation(status: AccountStatus, works: bool) -> None:
    assert lifecycle.has_access(status, None, NOW) is works


@pytest.mark.parametrize(("effective_at", "works"), [(NOW + timedelta(seconds=1), True), (NOW, False)])
def test_a_scheduled_cancellation_takes_access_away_at_its_moment(effective_at: datetime, works: bool) -> None:
    """Also when the worker that carries it out is late."""
    assert lifecycle.has_access(AccountStatus.CANCELLATION_SCHEDULED, effective_at, NOW) is works


@pytest.mark.parametrize(("effective_at", "withdrawable"), [(NOW + timedelta(seconds=1), True), (NOW, False)])
def test_a_scheduled_cancellation_is_withdrawn_until_its_moment_and_not_after(
    effective_at: datetime, withdrawable: bool
) -> None:
    """Also when the worker that lets it take effect is late."""
    scheduled = account(
        AccountStatus.CANCELLATION_SCHEDULED,
        request=request(RequestStatus.CONFIRMED),
        cancellation_effective_at=effective_at,
    )
    with contextlib.nullcontext() if withdrawable else pytest.raises(errors.AccountStateRefused):
        lifecycle.check(Action.WITHDRAW_CANCELLATION, MEMBER, scheduled, NOW)
