"""Every email as people get it, written to a folder: for whoever words, translates or approves them.

The people are the demo's, the numbers are those of the policy that is given, and the links lead nowhere. Knows no
installation: neither settings nor a database.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from app import ids, lifecycle, messages
from app.delivery.email import Recipient, compose, render
from app.errors import Contact
from app.lifecycle import HaltCause, LinkPurpose
from app.policy import EnforcingSystem, Plan, Policy

_NOW = datetime(2026, 11, 23, 14, 5, tzinfo=UTC)
_HOUR = timedelta(hours=1)
_ALICE = Contact(name="Alice Adams", email="alice@acme.example")
_CAROL = Contact(name="Carol Clark", email="carol@acme.example")
_GINA = Contact(name="Gina Grant", email="gina@globex.example")
_CSM = Contact(name="Casey Morgan", email="csm@vendor.example")


def preview(directory: Path, policy: Policy) -> list[Path]:
    """Write every email of the catalogue as .txt, .html and .eml; answer the files, in the catalogue's order."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for email, to in samples(policy):
        recipient = Recipient(name=to.name, address=to.email)
        rendered = render(email, recipient, sign=_sample_url)
        message = compose(
            rendered, recipient, "Sunset <no-reply@vendor.example>", f"<{email.template}@vendor.example>", _NOW
        )
        for suffix, content in (
            ("txt", f"Subject: {rendered.subject}\n\n{rendered.text}".encode()),
            ("html", rendered.html.encode()),
            ("eml", message.as_bytes()),
        ):
            file = directory / f"{email.template}.{suffix}"
            file.write_bytes(content)
            written.append(file)
    return written


def samples(policy: Policy) -> list[tuple[messages.Email, Contact]]:
    """One email of each kind with its recipient, in the catalogue's order."""
    own, assisted = _plan(policy, "essentials"), _plan(policy, "premium")
    window = lifecycle.retention_window(_NOW, own.retention)
    retention_hours = own.retention // _HOUR
    confirm_by = _NOW + policy.confirmation_lifetime
    first_reminder = timedelta(days=policy.reminder_days[0]) if policy.reminder_days else own.retention

    def asked(kind: type[messages.AssistanceRequested], **more: Contact) -> messages.AssistanceRequested:
        return kind(
            account_name="Globex",
            plan_name=assisted.name,
            account_reference="globex",
            requested_at=_NOW,
            respond_by=_NOW + policy.assistance_response,
            member=_GINA,
            **more,
        )

    def canceled(kind: type[messages.CancellationConfirmed], to: Contact) -> messages.CancellationConfirmed:
        return kind(
            account_name="Acme",
            plan_name=own.name,
            canceled_at=window.canceled_at,
            canceled_by=_ALICE.name,
            restartable_until=window.restartable_until,
            deletion_scheduled_for=window.deletion_scheduled_for,
            retention_hours=retention_hours,
            billing_contact=policy.billing_team,
            security_contact=policy.security,
            restart_link=_link(LinkPurpose.RESTART, to, window.restartable_until),
            feedback_link=_link(LinkPurpose.FEEDBACK, to, window.restartable_until),
        )

    return [
        (
            messages.CancellationReceived(
                account_name="Globex",
                plan_name=assisted.name,
                requested_at=_NOW,
                csm=_CSM,
                response_hours=policy.assistance_response // _HOUR,
            ),
            _GINA,
        ),
        (asked(messages.AssistanceRequested), _CSM),
        (
            messages.ConfirmationRequested(
                account_name="Globex",
                plan_name=assisted.name,
                opened_by=_CSM,
                expires_at=confirm_by,
                link=_link(LinkPurpose.CONFIRM, _GINA, confirm_by),
            ),
            _GINA,
        ),
        (canceled(messages.CancellationConfirmed, _ALICE), _ALICE),
        (canceled(messages.CancellationNotice, _CAROL), _CAROL),
        (
            messages.CancellationScheduled(
                account_name="Acme",
                plan_name=own.name,
                confirmed_at=_NOW,
                confirmed_by=_ALICE.name,
                effective_at=_NOW + timedelta(weeks=1),
                retention_hours=retention_hours,
                security_contact=policy.security,
            ),
            _CAROL,
        ),
        (
            messages.CancellationWithdrawn(
                account_name="Acme", plan_name=own.name, withdrawn_at=_NOW, withdrawn_by=_ALICE.name
            ),
            _CAROL,
        ),
        (
            messages.OfferAccepted(
                account_name="Acme",
                plan_name=own.name,
                account_reference="acme",
                accepted_at=_NOW,
                accepted_by=_ALICE,
                offer_code=policy.offers[0].code if policy.offers else "sample-offer",
                offer_title=policy.offers[0].title if policy.offers else "A sample offer",
            ),
            policy.billing_team,
        ),
        (
            messages.RestartRequested(
                account_name="Acme",
                plan_name=own.name,
                account_reference="acme",
                requested_at=_NOW,
                requested_by=_CAROL,
                note="We canceled too early.\nPlease call me before Friday.",
                restartable_until=window.restartable_until,
            ),
            policy.billing_team,
        ),
        (
            messages.AccountRestarted(
                account_name="Acme", plan_name=own.name, restarted_at=_NOW, billing_contact=policy.billing_team
            ),
            _ALICE,
        ),
        (asked(messages.AssistanceReminder), _CSM),
        (asked(messages.AssistanceEscalated, csm=_CSM), policy.billing_team),
        (
            messages.DeletionReminder(
                account_name="Acme",
                plan_name=own.name,
                canceled_at=window.canceled_at,
                deletion_scheduled_for=window.deletion_scheduled_for,
                hours_left=first_reminder // _HOUR,
                restart_link=_link(LinkPurpose.RESTART, _CAROL, window.restartable_until),
                billing_contact=policy.billing_team,
            ),
            _CAROL,
        ),
        (
            messages.DeletionRescheduled(
                account_name="Acme",
                plan_name=own.name,
                deletion_scheduled_for=_NOW + policy.minimum_notice,
                billing_contact=policy.billing_team,
            ),
            _CAROL,
        ),
        (
            messages.AccountDeleted(
                account_name="Acme",
                plan_name=own.name,
                canceled_at=window.canceled_at,
                deleted_at=window.deletion_scheduled_for,
                billing_contact=policy.billing_team,
            ),
            _ALICE,
        ),
        (
            messages.DeletionsHalted(
                halted_at=_NOW, due=3 * policy.breaker_at_least + 1, allowed=policy.breaker_at_least
            ),
            policy.operators,
        ),
        (
            messages.HaltBegan(
                halted_at=_NOW,
                cause=HaltCause.RESTORED,
                evidence="What happened on 2026-11-23 at 13:58:12 UTC was in this database and is not any more.",
            ),
            policy.operators,
        ),
        (
            messages.EnforcementLate(systems=_late(policy)),
            policy.operators,
        ),
    ]


def _plan(policy: Policy, code: str) -> Plan:
    """The plan of that code, or the first of a policy that has other plans."""
    return policy.plans.get(code) or next(iter(policy.plans.values()))


def _late(policy: Policy) -> tuple[messages.LateSystem, ...]:
    """The policy's first two enforcing systems, or one of a policy that has none. The first has more to tell
    than is listed, and was told of before."""
    shipped = EnforcingSystem(code="mailer", name="Mail delivery", within=timedelta(minutes=10))
    return tuple(
        messages.LateSystem(
            code=system.code,
            name=system.name,
            since=_NOW + system.within,
            late=late,
            news=news,
            first=tuple(
                messages.LateAccount(id=ids.encode(ids.Kind.ACCOUNT, UUID(int=number)), epoch=1)
                for number in range(1, min(news, 10) + 1)
            ),
        )
        for system, (late, news) in zip(policy.enforcing_systems[:2] or (shipped,), ((31, 12), (1, 1)), strict=False)
    )


def _link(purpose: LinkPurpose, to: Contact, expires_at: datetime) -> messages.Link:
    return messages.Link(
        purpose=purpose,
        issuer="preview",
        subject=to.email,
        account_id=UUID(int=1),
        request_id=UUID(int=2),
        generation=1,
        issued_at=_NOW,
        expires_at=expires_at,
    )


def _sample_url(link: messages.Link) -> str:
    return f"https://sunset.vendor.example/links/{link.purpose}?token=a-signed-token"
