"""GraphiQL's page: complete by itself, and unable to run or reach anything else."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from app import main
from app.settings import Settings
from app.web import graphiql
from tests import cast
from tests.rules.test_settings import PRODUCTION


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


# ------------------------------------------------------------------------------------------------ under which names

PAGES = ["/graphiql", "/graphiql/page.js", "/mailbox", "/mailbox/nothing.eml"]
LOCAL = ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.8.8.8", "[::1]", "[::1]:8000"]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "10.0.0.5:8000",
    "0.0.0.0:8000",
    "[fe80::1]:8000",
    "::1",
    "localhost@evil.example",
    "evil.example/localhost",
    "localhost:8000:8000",
    "",
]


async def asked(settings: Settings, path: str, *hosts: str) -> httpx2.Response:
    """What an application that is not started answers to a request with these `Host` headers."""
    headers = [(b"host", host.encode()) for host in hosts]
    transport = httpx2.ASGITransport(app=main.create_app(settings))
    async with httpx2.AsyncClient(transport=transport) as client:
        request = client.build_request("GET", f"http://ignored{path}")
        request.headers = httpx2.Headers(headers)
        return await client.send(request)


@pytest.mark.parametrize("path", PAGES)
async def test_what_development_shows_to_anyone_is_shown_under_this_machines_names_alone(
    tmp_path: Path, path: str
) -> None:
    """A stranger's page in a developer's browser may let its own name point here, and read what answers to it."""
    settings = cast.settings(tmp_path, f"sqlite://{tmp_path / 'sunset.db'}")
    for host in LOCAL:
        assert (await asked(settings, path, host)).status_code in {200, 404}, host
    for foreign in ([host] for host in FOREIGN):
        refused = await asked(settings, path, *foreign)
        assert (refused.status_code, refused.headers["content-type"]) == (403, "text/plain; charset=utf-8"), foreign
        assert "localhost" in refused.text
    assert (await asked(settings, path)).status_code == 403, "no name at all"
    assert (await asked(settings, path, "localhost", "evil.example")).status_code == 403
    assert (await asked(settings, "/schema.graphql", "evil.example")).status_code == 200, "the API has its own names"
    assert (await asked(settings, "/mailboxes", "evil.example")).status_code == 404


@pytest.mark.parametrize("path", ["/metrics", "/readyz?deep"])
async def test_who_has_no_token_looks_inside_under_this_machines_names_alone(tmp_path: Path, path: str) -> None:
    """In development, where no token is set; with one, the name does not matter."""
    database = f"sqlite://{tmp_path / 'sunset.db'}"
    refused = await asked(cast.settings(tmp_path, database), path, "evil.example")
    assert refused.status_code == 403
    token = cast.settings(tmp_path, database, SUNSET_METRICS_TOKEN="a-token-for-prometheus")
    assert (await asked(token, path, "evil.example")).status_code == 401


async def test_graphiql_that_production_turns_on_has_productions_name(tmp_path: Path) -> None:
    settings = Settings.load({**PRODUCTION, "SUNSET_DATA_DIR": str(tmp_path), "SUNSET_GRAPHIQL": "true"})
    assert (await asked(settings, "/graphiql", "cancel.example.com")).status_code == 200
