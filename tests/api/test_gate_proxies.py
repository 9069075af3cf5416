"""The gate behind the real nginx, Envoy and Traefik, set up as the README sets them up, and attacked.

Each keeps what is below `/app/{reference}/` from the members of accounts that are closed. Acme is canceled here and
Globex is not: whatever is sent, an application behind the proxy must not be reached by a path that anybody could read
as Acme's, and must be told the account that the gate was asked about.
"""

import asyncio
import json
import os
import posixpath
import re
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from ruamel.yaml import YAML

from app import provisioning
from app.db import Database
from tests import cast
from tests.cast import GATEKEEPER, Stage
from tests.raw import request, say
from tests.serving import serving

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
REFERENCE = b"x-account-reference"


def documented(language: str, mark: str) -> str:
    """The one configuration of the README that has `mark` in it."""
    [found] = [one for one in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if mark in one]
    return str(found)


def command(name: str) -> str | Path:
    """A proxy's program: the development group's, or the machine's. Where there is none, CI fails."""
    own = Path(sys.executable).with_name(name)
    if found := own if own.exists() else shutil.which(name):
        return found
    if os.environ.get("CI"):
        pytest.fail(f"{name} is not installed: the README's configuration of it was not tried.")
    pytest.skip(f"{name} is not installed")


# -------------------------------------------------------------------------------------------------- the application


@dataclass
class Visit:
    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def named(self) -> list[bytes]:
        """The account that the proxy says this is about."""
        return [value for name, value in self.headers if name == REFERENCE]

    def readings(self) -> set[bytes]:
        """The accounts that applications may take this for: they decode and tidy paths each in their own way."""
        path = self.target.partition(b"?")[0]
        tidied = (
            path,
            unquote_to_bytes(path),
            posixpath.normpath(path),
            posixpath.normpath(unquote_to_bytes(path)),
            unquote_to_bytes(posixpath.normpath(path)),
        )
        found = {parts[2] for one in tidied if len(parts := re.sub(rb"/+", b"/", one).split(b"/")) > 2}
        return {unquote_to_bytes(one).strip().lower() for one in found}


@dataclass
class Application:
    """What is behind the proxy. Lets everybody in, and remembers who came."""

    port: int = 0
    visits: list[Visit] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with_body = b""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:  # somebody looked whether we listen
            writer.close()
            return
        first, *lines = head[:-4].split(b"\r\n")
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
        told = dict(headers)
        if b"content-length" in told:
            with_body = await reader.readexactly(int(told[b"content-length"]))
        elif b"transfer-encoding" in told:
            with_body = await reader.readuntil(b"0\r\n\r\n")
        method, target, _ = first.split(b" ", 2)
        self.visits.append(Visit(method, target, headers, with_body))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\n")
        writer.write(b"" if method == b"HEAD" else b"welcome")
        await writer.drain()
        writer.close()


@asynccontextmanager
async def application() -> AsyncIterator[Application]:
    behind = Application()
    server = await asyncio.start_server(behind.serve, "127.0.0.1", 0)
    async with server:
        behind.port = server.sockets[0].getsockname()[1]
        yield behind


# ------------------------------------------------------------------------------------------------------ the proxies


@pytest.fixture
async def one_house(sqlite_database: Database, tmp_path: Path) -> AsyncIterator[Stage]:
    """The service where the engine makes no difference."""
    async with cast.stage(sqlite_database, tmp_path) as running:
        yield running


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Place:
    """Where a proxy finds everything, in a folder of its own."""

    folder: Path
    proxy: int
    sunset: int
    application: int
    token: str

    def filled(self, text: str, **ports: int) -> str:
        """The README's text with the ports and the token of this test."""
        for told, real in {"8000": self.sunset, "3000": self.application, **ports}.items():
            text, found = re.subn(rf"\b{told}\b", str(real), text)
            assert found, told
        assert "Bearer ..." in text
        return text.replace("Bearer ...", f"Bearer {self.token}")


NGINX = """
worker_processes 1;
daemon off;
pid nginx.pid;
events { worker_connections 64; }
http {
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    server {
        listen 127.0.0.1:%d;
        location / { return 404; }
        %s
    }
}
"""


def nginx(place: Place) -> list[str | Path]:
    (place.folder / "nginx.conf").write_text(
        NGINX % (place.proxy, place.filled(documented("nginx", "auth_request"))), encoding="utf-8"
    )
    return [command("nginx"), "-p", place.folder, "-c", "nginx.conf", "-e", "error.log"]


ENVOY = """
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
static_resources:
  listeners:
  - address: {socket_address: {address: 127.0.0.1, port_value: %(proxy)d}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: app
          delayed_close_timeout: 0.05s
          route_config:
            virtual_hosts:
            - name: app
              domains: ["*"]
              routes: [{match: {prefix: /}, route: {cluster: app}}]
%(documented)s
  clusters:
  - name: app
    load_assignment: {cluster_name: app, endpoints: [{lb_endpoints: [
      {endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %(application)d}}}}]}]}
  - name: sunset
    load_assignment: {cluster_name: sunset, endpoints: [{lb_endpoints: [
      {endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %(sunset)d}}}}]}]}
"""


def envoy(place: Place) -> list[str | Path]:
    text = documented("yaml", "envoy.filters.http.ext_authz").replace("Bearer ...", f"Bearer {place.token}")
    indented = "".join(f"          {line}" for line in text.splitlines(keepends=True))
    (place.folder / "envoy.yaml").write_text(
        ENVOY
        % {
            "proxy": place.proxy,
            "application": place.application,
            "sunset": place.sunset,
            "documented": indented,
        },
        encoding="utf-8",
    )
    return [command("envoy"), "-c", place.folder / "envoy.yaml", "--use-dynamic-base-id", "--log-level", "warning"]


def traefik(place: Place) -> list[str | Path]:
    """With a second account, which has what the README shows for the first."""
    gate = free_port()
    text = place.filled(documented("yaml", "forwardAuth"), **{"8081": gate})
    config = YAML(typ="safe").load(text)["http"]
    for kind in (config["routers"], config["middlewares"]):
        kind["acme"] = json.loads(json.dumps(kind["globex"]).replace("globex", "acme"))
    (place.folder / "sunset.yaml").write_text(json.dumps({"http": config}), encoding="utf-8")
    return [
        command("traefik"),
        f"--entryPoints.web.address=127.0.0.1:{place.proxy}",
        "--entryPoints.web.asDefault=true",
        f"--entryPoints.gate.address=127.0.0.1:{gate}",
        f"--providers.file.filename={place.folder / 'sunset.yaml'}",
        "--providers.file.watch=false",
        "--global.checkNewVersion=false",
        "--global.sendAnonymousUsage=false",
    ]


PROXIES = pytest.mark.parametrize("proxy", [nginx, envoy, traefik], ids=lambda proxy: proxy.__name__)
Proxy = Callable[[Place], list[str | Path]]


@asynccontextmanager
async def behind(proxy: Proxy, house: Stage, folder: Path) -> AsyncIterator[tuple[int, Application]]:
    """A proxy that asks this house's gate before it lets anybody into an application: its port, and the application."""
    folder = folder / "proxy"
    folder.mkdir(mode=0o777)
    token = house.installation.tokens.mint(cast.subject(GATEKEEPER), timedelta(hours=1))
    async with serving(house.app, house.installation.changes) as sunset, application() as app:
        place = Place(folder, free_port(), sunset.port, app.port, token)
        with (folder / "output").open("w") as output:
            process = await asyncio.create_subprocess_exec(*proxy(place), cwd=folder, stdout=output, stderr=output)
        try:
            async with asyncio.timeout(60):
                while not await answers(place.proxy):
                    assert process.returncode is None, (folder / "output").read_text(encoding="utf-8")
                    await asyncio.sleep(0.05)
            app.visits.clear()
            yield place.proxy, app
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def answers(port: int) -> bool:
    """Whether the proxy is there, with its configuration: it lets into an open account."""
    try:
        return (await say(port, request(b"/app/globex/"))).status == 200
    except (OSError, IndexError):
        return False


@PROXIES
async def test_it_lets_in_and_keeps_out_as_the_gate_says(proxy: Proxy, house: Stage, tmp_path: Path) -> None:
    """The configuration of the README, on the real thing."""
    async with behind(proxy, house, tmp_path) as (port, app):

        async def visit(account: bytes) -> int:
            return (await say(port, request(b"/app/%s/home?page=2" % account))).status

        assert await visit(b"acme") == 200
        assert await visit(b"nobody") == (404 if proxy is traefik else 403)  # it has a router for each account
        assert [(one.target, one.named()) for one in app.visits] == [(b"/app/acme/home?page=2", [b"acme"])]
        await house.cancel()
        assert await visit(b"acme") == 403
        assert await visit(b"globex") == 200
        await provisioning.deactivate_service(GATEKEEPER)
        assert await visit(b"globex") == 403


@PROXIES
async def test_who_may_come_in_sends_what_they_like(proxy: Proxy, one_house: Stage, tmp_path: Path) -> None:
    """Any method, with a body, with a token of the application's own, by the account's bare address too."""
    async with behind(proxy, one_house, tmp_path) as (port, app):
        own = b"Authorization: Bearer of-the-application"
        for method in (b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"):
            sent = request(b"/app/globex/form", own, b"Content-Length: 5", method=method, body=b"hello")
            assert (await say(port, sent)).status == 200, method
        chunked = b"5\r\nhello\r\n0\r\n\r\n"
        sent = request(b"/app/globex/form", own, b"Transfer-Encoding: chunked", method=b"POST", body=chunked)
        assert (await say(port, sent)).status == 200
        assert (await say(port, request(b"/app/globex", own))).status == 200
        assert [b"hello" in one.body for one in app.visits] == [True] * 8 + [False]
        for one in app.visits:
            assert dict(one.headers)[b"authorization"] == b"Bearer of-the-application"
            assert one.named() == [b"globex"]


# --------------------------------------------------------------------------------------------------------- attacks

HEADERS = [
    [b"X-Account-Reference: globex"],
    [b"X-Account-Reference: globex", b"X-Account-Reference: globex"],
    [b"X-Account-Reference: acme", b"X-Account-Reference: globex"],
    [b"X-Account-Reference: globex, acme"],
    [b"x-account-reference:globex"],
    [b"X_Account_Reference: globex"],
    [b"X-Account-Reference: globex", b"Connection: X-Account-Reference"],
    [b"X-Account-Reference: globex", b"Connection: close, X-Account-Reference, Authorization"],
    [b"Authorization: Bearer nonsense"],
    [b"X-Account-Reference: globex", b"X-Forwarded-Uri: /app/globex/", b"X-Original-URI: /app/globex/"],
    [b"X-Envoy-Original-Path: /app/globex/", b"X-Rewrite-URL: /app/globex/", b"X-HTTP-Method-Override: HEAD"],
    [b"Upgrade: websocket", b"X-Account-Reference: globex"],
    [b"Cookie: account=globex", b"Content-Length: 0"],
]

TARGETS = [
    b"/app/acme/",
    b"/app/acme",
    b"/app/acme?/app/globex/",
    b"/app/acme/?account=globex",
    b"/app/acme/../acme/",
    b"/app/globex/../acme/",
    b"/app/globex/./../acme/home",
    b"/app/globex/%2e%2e/acme/",
    b"/app/globex/%2E./acme/",
    b"/app/globex/..%2facme/",
    b"/app/globex/..%2Facme/home",
    b"/app/globex%2f..%2facme/",
    b"/app/globex%2F..%2Facme%2F",
    b"/app/globex%2f%2e%2e%2facme/",
    b"/app/globex/../../app/acme/",
    b"/app/globex/..//acme/",
    b"/app/globex//../../acme/",
    b"/app//acme/",
    b"//app/acme/",
    b"/app/./acme/",
    b"/app/%61cme/",
    b"/%61pp/acme/",
    b"/app%2facme/",
    b"/app/acme/../globex/../acme/",
    b"/app/acme/../globex/%2e%2e/acme/",
    b"/app/acme%0a/",
    b"/app/acme%0d/",
    b"/app/acme%0a",
    b"/app/acme%20/",
    b"/app/%20acme/",
    b"/app/acme%09/",
    b"/app/acme%00/",
    b"/app/acme%3f/",
    b"/app/acme%23/",
    b"/app/acme%2f",
    b"/app/acme%5c/",
    b"/app/acme%0d%0aX-Account-Reference:%20globex/",
    b"/app/acme%0d%0aX-Account-Reference:%20globex%0d%0aA:/",
    b"/app/acme%20HTTP/1.1%0d%0aX-Account-Reference:%20globex%0d%0aA:%20/",
    b"/app/globex%20HTTP%2f1.1%0d%0aA:%20/../acme/",
    b"/app/globex%0d%0a%0d%0aGET%20/gate/members/globex/../acme/",
    b"/app/acme/%0d%0aX-Account-Reference:%20globex",
    b"http://app.example/app/acme/",
    b"http://globex/app/acme/",
    b"/app/acme/#/app/globex/",
]
"""For Acme, by every way of writing it that might be taken for Globex, or for no account at all."""

DETOURS = [
    b"/app/acme/../globex/",
    b"/app/acme/./../globex/home",
    b"/app/acme/%2e%2e/globex/",
    b"/app/acme/..%2fglobex/",
    b"/app/acme%2f..%2fglobex/",
    b"/app/acme/../../app/globex/",
    b"/app/acme//..//../globex/",
    b"/app/globex//../acme/",
    b"/app/globex/../acme/../globex/",
    b"/app/globex/x/../../acme%2f../globex/",
    b"/app//globex/",
    b"//app/globex/",
    b"/%61pp/globex/",
    b"/app/globex/%252e%252e/acme/",
    b"/app/globex/..%252facme/",
]
"""Through both. Who comes out at Globex may get in there, by a path that nobody takes for Acme's."""

NAMELESS = [
    b"/app/",
    b"/app",
    b"/app//",
    b"/app///",
    b"/app/%20/",
    b"/app/%0a/",
    b"/app/%0d%0a/",
    b"/app/?/globex/",
    b"/app/.",
    b"/app/./",
    b"/app/%2e/",
    b"/app/-/",
    b"/app/?globex",
    b"/app/globex%3f/",
    b"/app/globex%23/",
    b"/app/globex%23acme/",
    b"/app/globex%3facme/",
    b"/app/globex%00/",
    b"/app/globex%0a/",
    b"/app/globex%0d%0aX:%20/",
    b"/app/globex%20/",
    b"/app/%2561cme/",
    b"/app/globex%252f..%252facme/",
    b"/app/%2567lobex/",
    b"/app/globex,acme/",
    b"/app/globex;acme/",
    b"/app/globex%2cacme/",
    b"/app/globex%5c..%5cacme/",
    b"/app/\xc3\xa4/",
    b"/app/%c3%a4/",
    b"/app/%ff/",
    b"/app/%u0061cme/",
    b"/app/" + b"x" * 201 + b"/",
    b"/app/" + b"x" * 2_000 + b"/",
    b"/app/gate/",
    b"/app/$account/",
]
"""Accounts that nobody has: the gate's no, never a failure of the gate."""


@PROXIES
async def test_no_header_path_or_name_opens_an_account_that_is_closed(
    proxy: Proxy, one_house: Stage, tmp_path: Path
) -> None:
    await one_house.cancel()
    async with behind(proxy, one_house, tmp_path) as (port, app):

        async def attack(sent: bytes) -> None:
            app.visits.clear()
            answer = await say(port, sent)
            assert answer.status in {200, 400, 403, 404, 308, 301}, (sent, answer)
            assert answer.status == 200 or app.visits == [], sent
            for visit in app.visits:
                assert visit.readings() == {b"globex"}, (sent, visit)
                assert visit.named() == [b"globex"], (sent, visit)

        for headers in HEADERS:
            await attack(request(b"/app/acme/home", *headers))
            assert app.visits == [], headers
            sent = request(
                b"/app/acme/form", *headers, b"Transfer-Encoding: chunked", method=b"POST", body=b"0\r\n\r\n"
            )
            await attack(sent)
            assert app.visits == [], headers
            await attack(request(b"/app/globex/home", *headers))
            assert app.visits or b"Connection" in b"".join(headers), headers  # Traefik takes away what that names
        for target in (*TARGETS, *DETOURS, *NAMELESS):
            await attack(request(target))
            await attack(request(target, b"X-Account-Reference: globex"))
        for target in TARGETS:
            assert (await say(port, request(target, method=b"POST"))).status != 200, target
        assert (await say(port, request(b"/app/globex/"))).status == 200
