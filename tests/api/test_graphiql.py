"""GraphiQL's page: complete by itself, and unable to run or reach anything else."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from app.web import graphiql


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(Starlette(routes=graphiql.routes())) as client:
        yield client


def policy_of(page: httpx2.Response) -> dict[str, set[str]]:
    directives = (directive.split() for directive in page.headers["content-security-policy"].split(";"))
    return {name: set(sources) for name, *sources in directives}


def test_the_policy_lets_only_this_origins_files_run_and_only_this_origin_be_called(client: TestClient) -> None:
    policy = policy_of(client.get("/graphiql"))

    assert policy["default-src"] == {"'none'"}
    assert policy["script-src"] == {"'self'"}
    assert policy["connect-src"] == {"'self'"}
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == {"'none'"}


def test_the_nonce_for_styles_is_new_each_time_and_the_one_of_the_page(client: TestClient) -> None:
    nonces = set()
    for _ in range(3):
        page = client.get("/graphiql")
        [nonce] = re.findall(r'nonce="([^"]+)"', page.text)
        assert policy_of(page)["style-src"] == {"'self'", f"'nonce-{nonce}'"}
        nonces.add(nonce)

    assert len(nonces) == 3


def test_everything_the_page_loads_is_served_here(client: TestClient) -> None:
    page = client.get("/graphiql").text
    loaded = [address for address in re.findall(r'(?:src|href)="([^"]+)"', page) if address != "data:,"]

    assert len(loaded) == 6
    for address in loaded:
        assert address.startswith("/graphiql/")
        response = client.get(address)
        assert response.status_code == 200
        assert response.headers["content-type"].split(";")[0] in {"text/javascript", "text/css"}


def test_the_page_has_no_script_or_style_of_its_own(client: TestClient) -> None:
    page = client.get("/graphiql").text

    assert re.findall(r"<script[^>]*>([^<]+)</script>", page) == []
    assert "<style" not in page
    assert not re.search(r"\s(?:on\w+|style)=", page)


def test_styles_load_nothing_from_elsewhere(client: TestClient) -> None:
    for name in ("graphiql.min.css", "page.css"):
        style = client.get(f"/graphiql/{name}").text
        assert all(source.startswith("data:") for source in re.findall(r"url\([\"']?([^)\"']+)", style))
        assert "@import" not in style


def test_nothing_is_kept_in_the_browser(client: TestClient) -> None:
    """GraphiQL writes to the `storage` that it is given, and falls back to localStorage without one."""
    script = client.get("/graphiql/page.js").text

    assert re.search(r"^\s+storage,$", script, re.MULTILINE)
    assert "isHeadersEditorEnabled: false" in script
    assert "shouldPersistHeaders: false" in script
    assert 'credentials: "omit"' in script
    assert not re.search(r"localStorage|sessionStorage|document\.cookie|indexedDB", script)


def test_the_files_come_with_their_licenses_and_stay_small(client: TestClient) -> None:
    licenses = client.get("/graphiql/LICENSES.txt").text

    for name in ("graphiql", "react", "react-dom", "codemirror", "Roboto", "Fira Code"):
        assert re.search(rf"^{name}\b", licenses, re.MULTILINE)
    served = Path(graphiql.__file__).with_name("static") / "graphiql"
    assert sum(file.stat().st_size for file in served.iterdir()) < 3_000_000


@pytest.mark.parametrize("path", ["/graphiql/../graphiql.py", "/graphiql/%2e%2e/sunset.css", "/graphiql/nothing.js"])
def test_no_other_file_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404
