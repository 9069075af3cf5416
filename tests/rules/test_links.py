"""Where an emailed link leads: to Sunset's own page, or to the host's."""

import pytest

from app.lifecycle import LinkPurpose
from app.worker import link_url


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("https://sunset.example/links", "https://sunset.example/links/restart?token=T"),
        ("https://app.example/billing", "https://app.example/billing?purpose=restart&token=T"),
        ("https://app.example/?page=billing", "https://app.example/?page=billing&purpose=restart&token=T"),
    ],
)
def test_a_link_leads_to_sunsets_page_or_the_hosts(base: str, expected: str) -> None:
    assert link_url(base, LinkPurpose.RESTART, "T") == expected
