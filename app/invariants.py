"""What `lifecycle.md` says always holds, asked of every row: for the day on which somebody doubts it.

The application keeps these rules under its locks, and the database refuses most of what would break them. This is for
what gets past both: a constraint that was dropped, a restored half of a back-up, SQL by hand. Each rule is one
statement that finds the rows that break it, on both engines, without a lock; a row that is changing is seen before or
after its transaction, when the rule holds.

Finds, and mends nothing: what is right is known to people.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from app import db
from app.db.migrations import m0001_initial, m0002_time, m0003_webhooks, m0004_enforcement, m0006_restores
from app.deletion import ERASED, OWN_SYSTEM, tombstone_reference
from app.lifecycle import EPOCHS_OF_A_RESTORE, OPEN_REQUEST, AccountStatus, RequestStatus, TransitionType
from app.messages import CATALOGUE, EnforcementLate
from app.outbox import KEPT, MAX_ATTEMPTS
from app.webhooks import ERASED_TYPE

LISTED = 20
"""So many of the rows that break one rule are named; the others are counted."""

_CLAIMED_FOR_AGES = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """`broken` selects the `id` of each row that breaks the rule, of the table `of`; `wrong` says of such a row what
    is the matter with it. With `since`, $1 is the time that long ago."""

    name: str
    of: str
    wrong: str
    broken: str
    since: timedelta | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A rule that is broken, by how many rows, and the first of them."""

    rule: Rule
    count: int
    ids: Sequence[str]


async def check() -> list[Finding]:
    """Every rule that is broken. One statement for each rule: with a million accounts a matter of a minute, which
    wants a database that was opened with time-outs to match."""
    found = []
    for rule in RULES:
        args = [] if rule.since is None else [await db.now() - rule.since]
        rows = await db.fetch(
            f"SELECT id, COUNT(*) OVER () AS found FROM ({rule.broken}) broken ORDER BY id LIMIT {LISTED}", *args
        )
        if rows:
            found.append(Finding(rule=rule, count=rows[0]["found"], ids=[str(row["id"]) for row in rows]))
    return found


def _codes(some: Iterable[str]) -> str:
    return "(" + ", ".join(f"'{code}'" for code in sorted(some)) + ")"


_OPEN = _codes(OPEN_REQUEST)
_CANCELED = _codes({AccountStatus.CANCELED, AccountStatus.DELETING, AccountStatus.DELETED})
_DELETION_BEGUN = _codes({AccountStatus.DELETING, AccountStatus.DELETED})
_GONE = tombstone_reference("")
_ERASED_TEMPLATES = _codes(name for name, email in CATALOGUE.items() if email.erased_when_settled)

_KEPT_OF_THE_DELETED = {
    "outbox": f" AND x.template NOT IN {_ERASED_TEMPLATES}",
    "webhook_delivery": f" AND x.type <> '{ERASED_TYPE}'",
}

_ARROWS = frozenset(
    {
        (AccountStatus.ACTIVE, AccountStatus.CANCELLATION_SCHEDULED),
        (AccountStatus.ACTIVE, AccountStatus.CANCELED),
        (AccountStatus.CANCELLATION_SCHEDULED, AccountStatus.CANCELED),
        (AccountStatus.CANCELLATION_SCHEDULED, AccountStatus.ACTIVE),
        (AccountStatus.CANCELED, AccountStatus.ACTIVE),
        (AccountStatus.CANCELED, AccountStatus.DELETING),
        (AccountStatus.DELETING, AccountStatus.DELETED),
    }
)

_ACTIVE = frozenset({AccountStatus.ACTIVE})
_CANCELED_ONLY = frozenset({AccountStatus.CANCELED})
_LEFT_IN: Mapping[TransitionType, frozenset[AccountStatus]] = {
    TransitionType.CANCELLATION_REQUESTED: _ACTIVE,
    TransitionType.CANCELLATION_ASSISTANCE_REQUESTED: _ACTIVE,
    TransitionType.CANCELLATION_WITHDRAWN: _ACTIVE,
    TransitionType.CANCELLATION_EXPIRED: _ACTIVE,
    TransitionType.OFFER_ACCEPTED: _ACTIVE,
    TransitionType.OFFER_DECLINED: _ACTIVE,
    TransitionType.CANCELLATION_SCHEDULED: frozenset({AccountStatus.CANCELLATION_SCHEDULED}),
    TransitionType.CANCELED: _CANCELED_ONLY,
    TransitionType.FEEDBACK_SUBMITTED: _ACTIVE | _CANCELED_ONLY | {AccountStatus.CANCELLATION_SCHEDULED},
    TransitionType.RESTART_REQUESTED: _CANCELED_ONLY,
    TransitionType.RESTARTED: _ACTIVE,
    TransitionType.DELETION_REMINDER: _CANCELED_ONLY,
    TransitionType.DELETION_HELD: _CANCELED_ONLY,
    TransitionType.DELETION_RELEASED: _CANCELED_ONLY,
    TransitionType.DELETION_STARTED: frozenset({AccountStatus.DELETING}),
    TransitionType.DELETED: frozenset({AccountStatus.DELETED}),
    TransitionType.STATUS: frozenset(AccountStatus) - {AccountStatus.DELETED},
}
"""The account's status after each kind of transition."""

_NEW_EPOCH = _codes({TransitionType.CANCELED, TransitionType.RESTARTED})

_ENDS: Mapping[RequestStatus, TransitionType] = {
    RequestStatus.WITHDRAWN: TransitionType.CANCELLATION_WITHDRAWN,
    RequestStatus.EXPIRED: TransitionType.CANCELLATION_EXPIRED,
    RequestStatus.SAVED: TransitionType.OFFER_ACCEPTED,
    RequestStatus.REVERTED: TransitionType.RESTARTED,
}
"""How the history tells of a request that is closed."""


def _kept_by_the_database() -> Iterable[Rule]:
    """The conditions on single rows that the migrations have the database keep: here they are asked once more."""
    replaced = m0002_time.REPLACED + m0006_restores.REPLACED
    made = (m0001_initial, m0002_time, m0003_webhooks, m0004_enforcement, m0006_restores)
    for check in (check for migration in made for check in migration.CHECKS if check not in replaced):
        if (check.table, check.name) == ("clock_offset", "one"):
            continue  # with two clocks, nothing here could ask for the time
        condition = check.condition.replace("NEW.", "")
        yield Rule(
            name=f"{check.table}_{check.name}",
            of=check.table,
            wrong=f"does not meet: {condition}",
            broken=f"SELECT id FROM {check.table} WHERE NOT ({condition})",
        )


_REQUESTS = (
    "SELECT a.id FROM account a LEFT JOIN (SELECT account_id, COUNT(*) AS requests FROM cancellation_request "
    "WHERE status IN {statuses} GROUP BY account_id) r ON r.account_id = a.id "
    "WHERE COALESCE(r.requests, 0) {compared} CASE WHEN a.status IN {account} THEN 1 ELSE 0 END"
)
"""Accounts that have another number of requests in those statuses than one in theirs, and none in others."""

_ABOUT_IT = "t.account_id = r.account_id AND t.request_id = r.id"

_REQUEST_RULES = (
    Rule(
        name="one_open_request",
        of="account",
        wrong="has more than one open request, or has one and is not active any more",
        broken=_REQUESTS.format(
            statuses=_codes(OPEN_REQUEST),
            compared=">",
            account=_codes({AccountStatus.ACTIVE, AccountStatus.CANCELLATION_SCHEDULED}),
        ),
    ),
    Rule(
        name="confirmed_request_of_a_scheduled_cancellation",
        of="account",
        wrong="has exactly one confirmed request when its cancellation is scheduled, else none: this is not so",
        broken=_REQUESTS.format(
            statuses=_codes({RequestStatus.CONFIRMED}),
            compared="<>",
            account=_codes({AccountStatus.CANCELLATION_SCHEDULED}),
        ),
    ),
    Rule(
        name="effective_request_of_a_canceled_account",
        of="account",
        wrong="has exactly one effective request when it is canceled, else none: this is not so",
        broken=_REQUESTS.format(statuses=_codes({RequestStatus.EFFECTIVE}), compared="<>", account=_CANCELED),
    ),
    Rule(
        name="scheduled_for_the_time_that_was_confirmed",
        of="account",
        wrong="has its cancellation scheduled for another time than its confirmed request says",
        broken="SELECT a.id FROM account a JOIN cancellation_request r ON r.account_id = a.id "
        "AND r.status = 'CONFIRMED' WHERE a.cancellation_effective_at <> r.effective_at",
    ),
    Rule(
        name="canceled_when_the_request_took_effect",
        of="account",
        wrong="was canceled at another time than its effective request took effect",
        broken="SELECT a.id FROM account a JOIN cancellation_request r ON r.account_id = a.id "
        "AND r.status = 'EFFECTIVE' WHERE a.canceled_at <> r.took_effect_at",
    ),
    Rule(
        name="one_effect_of_a_request",
        of="cancellation_request",
        wrong="has canceled its account more than once",
        broken=f"SELECT request_id AS id FROM transition WHERE type = '{TransitionType.CANCELED}' "
        "GROUP BY request_id HAVING COUNT(*) > 1",
    ),
)

_HISTORY_RULES = (
    Rule(
        name="history_without_gaps",
        of="account",
        wrong="has a history that does not count from 1 to its last sequence",
        broken="SELECT a.id FROM account a LEFT JOIN (SELECT account_id, COUNT(DISTINCT sequence) AS steps, "
        "MIN(sequence) AS first, MAX(sequence) AS last, COUNT(*) AS transitions FROM transition GROUP BY account_id) h "
        "ON h.account_id = a.id WHERE COALESCE(h.transitions, 0) <> a.last_sequence "
        "OR h.steps <> h.transitions OR h.first <> 1 OR h.last <> a.last_sequence",
    ),
    Rule(
        name="history_ends_where_the_account_is",
        of="account",
        wrong="is in another status or epoch than its last transition says",
        broken="SELECT a.id FROM account a LEFT JOIN transition t ON t.account_id = a.id "
        "AND t.sequence = a.last_sequence WHERE COALESCE(t.account_status, 'ACTIVE') <> a.status "
        f"OR COALESCE(t.epoch, a.epoch - a.epoch % {EPOCHS_OF_A_RESTORE}) <> a.epoch",
    ),
    Rule(
        name="history_goes_along_the_arrows",
        of="transition",
        wrong="moves its account where no arrow leads",
        broken="SELECT id FROM (SELECT id, account_status AS came, LAG(account_status, 1, 'ACTIVE') "
        "OVER (PARTITION BY account_id ORDER BY sequence) AS went FROM transition) moved "
        f"WHERE went <> came AND went || '>' || came NOT IN {_codes(f'{went}>{came}' for went, came in _ARROWS)}",
    ),
    Rule(
        name="history_says_what_its_transitions_do",
        of="transition",
        wrong="leaves its account in a status that a transition of its type does not lead to",
        broken="SELECT id FROM transition WHERE type || '>' || account_status NOT IN "
        + _codes(f"{kind}>{status}" for kind, statuses in _LEFT_IN.items() for status in statuses),
    ),
    Rule(
        name="history_counts_epochs",
        of="transition",
        wrong="does not begin an epoch where a cancellation takes effect or a restart happens, or begins one where "
        "neither does and the database was not restored",
        broken="SELECT id FROM (SELECT id, type, epoch - LAG(epoch, 1, 0) "
        "OVER (PARTITION BY account_id ORDER BY sequence) AS grown FROM transition) counted "
        f"WHERE grown < 0 OR grown % {EPOCHS_OF_A_RESTORE} <> CASE WHEN type IN {_NEW_EPOCH} THEN 1 ELSE 0 END",
    ),
    Rule(
        name="history_tells_of_every_request",
        of="cancellation_request",
        wrong="is not in its account's history",
        broken="SELECT r.id FROM cancellation_request r WHERE NOT EXISTS (SELECT 1 FROM transition t "
        f"WHERE {_ABOUT_IT} AND t.type = '{TransitionType.CANCELLATION_REQUESTED}')",
    ),
    Rule(
        name="history_tells_of_every_effect",
        of="cancellation_request",
        wrong="has canceled its account and its history does not say so, or says so and it has not",
        broken=f"SELECT r.id FROM cancellation_request r WHERE (r.status IN ('EFFECTIVE', 'REVERTED')) <> EXISTS "
        f"(SELECT 1 FROM transition t WHERE {_ABOUT_IT} AND t.type = '{TransitionType.CANCELED}')",
    ),
    Rule(
        name="history_tells_of_every_end",
        of="cancellation_request",
        wrong="is closed, and its account's history does not say why",
        broken=f"SELECT r.id FROM cancellation_request r WHERE r.status IN {_codes(_ENDS)} AND NOT EXISTS "
        f"(SELECT 1 FROM transition t WHERE {_ABOUT_IT} AND r.status || '>' || t.type IN "
        + _codes(f"{status}>{kind}" for status, kind in _ENDS.items())
        + ")",
    ),
    *(
        Rule(
            name=f"{table}_of_the_accounts_own_request",
            of=table,
            wrong="is about a request that does not exist or belongs to another account",
            broken=f"SELECT x.id FROM {table} x LEFT JOIN cancellation_request r ON r.id = x.request_id "
            "AND r.account_id = x.account_id WHERE x.request_id IS NOT NULL AND r.id IS NULL",
        )
        for table in ("transition", "feedback", "offer", "restart_request")
    ),
)

_DELETION_RULES = (
    Rule(
        name="deletion_not_before_its_date",
        of="account",
        wrong="has a deletion that began before its date",
        broken="SELECT id FROM account WHERE deletion_started_at < deletion_scheduled_for",
    ),
    Rule(
        name="held_by_an_open_hold",
        of="account",
        wrong="is on hold without exactly one open hold, or has an open hold and is not on hold",
        broken="SELECT a.id FROM account a LEFT JOIN (SELECT account_id, COUNT(*) AS holds FROM deletion_hold "
        "WHERE released_at IS NULL GROUP BY account_id) h ON h.account_id = a.id "
        "WHERE COALESCE(h.holds, 0) <> CASE WHEN a.deletion_held_at IS NULL THEN 0 ELSE 1 END",
    ),
    Rule(
        name="reminders_of_a_canceled_account",
        of="deletion_reminder",
        wrong="is about the deletion of an account that is not canceled",
        broken="SELECT x.id FROM deletion_reminder x JOIN account a ON a.id = x.account_id "
        f"WHERE a.status NOT IN {_CANCELED}",
    ),
    Rule(
        name="steps_of_a_begun_deletion",
        of="deletion_step",
        wrong="belongs to no deletion that has begun, or to one of another epoch",
        broken="SELECT x.id FROM deletion_step x JOIN account a ON a.id = x.account_id "
        f"WHERE a.status NOT IN {_DELETION_BEGUN} "
        f"OR x.epoch % {EPOCHS_OF_A_RESTORE} <> a.epoch % {EPOCHS_OF_A_RESTORE}",
    ),
    Rule(
        name="own_step_of_a_begun_deletion",
        of="account",
        wrong="is being deleted without a step of Sunset's own that is still to do: nothing will end its deletion",
        broken="SELECT a.id FROM account a WHERE a.status = 'DELETING' AND NOT EXISTS (SELECT 1 FROM deletion_step x "
        f"WHERE x.account_id = a.id AND x.system = '{OWN_SYSTEM}' AND x.completed_at IS NULL)",
    ),
    Rule(
        name="deleted_with_every_step_done",
        of="account",
        wrong="is deleted without Sunset's own step, or with one that is not done",
        broken="SELECT a.id FROM account a LEFT JOIN (SELECT account_id, "
        f"COUNT(CASE WHEN system = '{OWN_SYSTEM}' THEN 1 END) AS own, COUNT(completed_at) AS done, COUNT(*) AS steps "
        "FROM deletion_step GROUP BY account_id) x ON x.account_id = a.id "
        "WHERE a.status = 'DELETED' AND (COALESCE(x.own, 0) <> 1 OR x.done <> x.steps)",
    ),
    Rule(
        name="tombstone_of_a_deleted_account",
        of="account",
        wrong="has exactly one tombstone when it is deleted, else none: this is not so",
        broken="SELECT a.id FROM account a LEFT JOIN (SELECT account_id, COUNT(*) AS tombstones FROM tombstone "
        "GROUP BY account_id) t ON t.account_id = a.id "
        "WHERE COALESCE(t.tombstones, 0) <> CASE WHEN a.status = 'DELETED' THEN 1 ELSE 0 END",
    ),
    Rule(
        name="tombstone_tells_the_accounts_dates",
        of="tombstone",
        wrong="says other dates than its account",
        broken="SELECT t.id FROM tombstone t JOIN account a ON a.id = t.account_id "
        "WHERE t.canceled_at <> a.canceled_at OR t.deletion_started_at <> a.deletion_started_at "
        "OR t.deleted_at <> a.deleted_at",
    ),
    Rule(
        name="deleted_account_without_personal_data",
        of="account",
        wrong="is deleted, and its row still tells its name, its reference, its manager or its paid period",
        broken="SELECT id FROM account WHERE status = 'DELETED' AND (name <> '' "
        f"OR reference NOT LIKE '{_GONE.partition(':')[0]}:%' OR LENGTH(reference) <> {len(_GONE)} "
        "OR csm_id IS NOT NULL OR current_period_end IS NOT NULL)",
    ),
    Rule(
        name="deleted_account_without_notes_on_requests",
        of="cancellation_request",
        wrong="still has its note or its token, and its account is deleted",
        broken="SELECT r.id FROM cancellation_request r JOIN account a ON a.id = r.account_id "
        "WHERE a.status = 'DELETED' AND (r.staff_note IS NOT NULL OR r.confirmation_token_hash IS NOT NULL)",
    ),
    Rule(
        name="deleted_account_without_notes_on_holds",
        of="deletion_hold",
        wrong="still has its notes, and its account is deleted",
        broken="SELECT h.id FROM deletion_hold h JOIN account a ON a.id = h.account_id "
        "WHERE a.status = 'DELETED' AND (h.note IS NOT NULL OR h.release_note IS NOT NULL)",
    ),
    *(
        Rule(
            name=f"deleted_account_without_{table}",
            of=table,
            wrong="belongs to an account that is deleted",
            broken=f"SELECT x.id FROM {table} x JOIN account a ON a.id = x.account_id WHERE a.status = 'DELETED'"
            + _KEPT_OF_THE_DELETED.get(table, ""),
        )
        for table in ERASED
    ),
)

_MESSAGE_RULES = (
    Rule(
        name="one_message_of_a_message_id",
        of="message_id",
        wrong="is the Message-ID of more than one message",
        broken="SELECT message_id AS id FROM outbox GROUP BY message_id HAVING COUNT(*) > 1",
    ),
    Rule(
        name="message_of_a_known_kind",
        of="outbox",
        wrong="is of a template that this version does not have, and cannot be sent",
        broken="SELECT id FROM outbox WHERE delivered_at IS NULL AND dead_at IS NULL AND dropped_at IS NULL "
        f"AND template NOT IN {_codes(CATALOGUE)}",
    ),
    Rule(
        name="message_given_up_after_its_last_try",
        of="outbox",
        wrong="was tried as often as it may be, and is neither delivered nor a dead letter: does it end its workers?",
        broken="SELECT id FROM outbox WHERE delivered_at IS NULL AND dead_at IS NULL AND dropped_at IS NULL "
        f"AND attempts >= {MAX_ATTEMPTS} AND (lease IS NULL OR due_at <= $1)",
        since=_CLAIMED_FOR_AGES,
    ),
    Rule(
        name="settled_message_is_nobodys",
        of="outbox",
        wrong="is delivered, dead or dropped, and still claimed",
        broken="SELECT id FROM outbox WHERE lease IS NOT NULL "
        "AND (delivered_at IS NOT NULL OR dead_at IS NOT NULL OR dropped_at IS NOT NULL)",
    ),
    Rule(
        name="last_email_is_erased",
        of="outbox",
        wrong="is settled, and still tells to whom it went",
        broken="SELECT id FROM outbox "
        "WHERE (delivered_at IS NOT NULL OR dead_at IS NOT NULL OR dropped_at IS NOT NULL) "
        f"AND template IN {_ERASED_TEMPLATES} AND (recipient_address <> '' OR recipient_name <> '')",
    ),
    Rule(
        name="last_event_is_erased",
        of="webhook_delivery",
        wrong="is settled, and still tells what the deleted account was called",
        broken="SELECT id FROM webhook_delivery WHERE (delivered_at IS NOT NULL OR dead_at IS NOT NULL) "
        f"AND type = '{ERASED_TYPE}' AND payload <> ''",
    ),
)

_ENFORCEMENT_RULES = (
    Rule(
        name="enforcement_of_a_cancellation",
        of="enforcement",
        wrong="asks for an epoch, or since a time, with which no cancellation of its account took effect, or was told "
        "anew after a restore",
        broken="SELECT e.id FROM enforcement e WHERE NOT EXISTS (SELECT 1 FROM transition t WHERE "
        f"t.account_id = e.account_id AND t.type IN ('{TransitionType.CANCELED}', '{TransitionType.STATUS}') "
        "AND t.epoch = e.epoch AND t.occurred_at = e.asked_at)",
    ),
    Rule(
        name="enforcement_until_the_restart",
        of="enforcement",
        wrong="is waited for after its account was restarted, or was lifted without a restart",
        broken="SELECT e.id FROM enforcement e JOIN account a ON a.id = e.account_id "
        # After a restore, the epoch is ahead before the systems are asked anew.
        f"WHERE CASE WHEN e.lifted_at IS NULL THEN (a.epoch - e.epoch) % {EPOCHS_OF_A_RESTORE} <> 0 "
        "ELSE e.epoch = a.epoch END",
    ),
    Rule(
        name="enforcement_told_in_a_letter",
        of="enforcement",
        wrong="is marked as told to the operators at a time at which no letter was promised to them",
        broken=f"SELECT id FROM enforcement WHERE reported_at > $1 AND reported_at NOT IN "
        f"(SELECT created_at FROM outbox WHERE template = '{EnforcementLate.template}')",
        since=KEPT,
    ),
)

RULES: Sequence[Rule] = (
    *_kept_by_the_database(),
    *_REQUEST_RULES,
    *_HISTORY_RULES,
    *_DELETION_RULES,
    *_MESSAGE_RULES,
    *_ENFORCEMENT_RULES,
)
