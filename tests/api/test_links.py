"""The pages behind emailed links: what they show, when they show no form, and that opening them does nothing."""

from app import db
from tests.api.test_story import links
from tests.cast import CSM, GINA, Stage

FORM = "<form"


async def confirm_link(house: Stage) -> str:
    """The token of the link by which Gina can confirm the cancellation of Globex."""
    await house.request_cancellation(GINA, "globex")
    await house.request_cancellation(CSM, "globex", note="She is sure.")
    return links((await house.letters())[-1])["confirm"]


async def test_a_confirmation_says_what_will_happen_in_the_policys_numbers(house: Stage) -> None:
    page = await house.client.get("/links/confirm", params={"token": await confirm_link(house)})
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
    page = await house.client.get("/links/confirm", params={"token": token})
    assert page.status_code == 403
    assert "The account is canceled" in page.text
    assert FORM not in page.text


async def test_a_link_shows_nothing_to_who_has_lost_the_permission_since(house: Stage) -> None:
    token = await confirm_link(house)
    await db.execute("UPDATE member SET role = 'MEMBER' WHERE email = $1", GINA)
    page = await house.client.get("/links/confirm", params={"token": token})
    assert page.status_code == 409
    assert "Globex" not in page.text
    assert FORM not in page.text


async def test_a_link_opens_the_page_that_it_is_for_alone(house: Stage) -> None:
    token = await confirm_link(house)
    for path in ("/links/restart", "/links/feedback"):
        page = await house.client.get(path, params={"token": token})
        assert page.status_code == 401
        assert "Globex" not in page.text
