"""One exchange with a receiver: what is sent, and what a slow, huge, wandering or hostile one can do with it."""

import asyncio
import base64
import ipaddress
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from app.delivery.webhook import MAX_READ, Answer, NotTried, Poster, signed
from app.receivers import Receivers, Refused, is_public
from tests.delivery.certificates import Authority, self_signed
from tests.delivery.webhook_server import Request, receiving, says

LOCAL = Receivers("127.0.0.0/8")
SECRET, OTHER = ("whsec_" + base64.b64encode(byte * 32).decode() for byte in (b"a", b"b"))
BODY = '{"type": "webhook.ping", "data": {"name": "Zoë"}}'.encode()


async def post(
    url: str, *, receivers: Receivers = LOCAL, deadline: float = 20, headers: dict[str, str] | None = None
) -> Answer:
    poster = Poster(receivers, lookups=1, deadline=timedelta(seconds=deadline))
    return await poster.post(url, headers or {}, BODY, content_type="application/cloudevents+json")


async def test_what_is_sent_is_verified_by_the_package_of_standard_webhooks() -> None:
    """With either secret of a rotation, and with no other."""
    async with receiving() as receiver:
        headers = signed([SECRET, OTHER], "D123", datetime.now(UTC), BODY)
        answer = await post(receiver.url, headers=headers)
        (request,) = receiver.requests
    assert (answer.status, answer.error) == (204, None)
    assert request.line == "POST /hooks HTTP/1.1"
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert request.headers["content-type"] == "application/cloudevents+json"
    assert request.headers["webhook-id"] == "D123"
    for secret in (SECRET, OTHER):
        assert Webhook(secret).verify(request.body, request.headers)["data"] == {"name": "Zoë"}
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + base64.b64encode(b"c" * 32).decode()).verify(request.body, request.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(request.body + b" ", request.headers)


@pytest.mark.parametrize("zone", [UTC, datetime.fromisoformat("2026-01-01T00:00:00+14:00").tzinfo])
def test_a_time_in_any_zone_is_signed_as_the_moment_it_is(zone: object) -> None:
    """The package's own sign() takes such a time for one in UTC."""
    moment = datetime(2026, 11, 23, 9, 30, tzinfo=UTC)
    assert signed([SECRET], "D", moment.astimezone(zone), b"")["webhook-timestamp"] == str(int(moment.timestamp()))  # type: ignore[arg-type]


@pytest.mark.parametrize("status", ["200 OK", "202 Accepted", "299 Fine"])
async def test_only_2xx_is_success(status: str) -> None:
    async with receiving(says(status)) as receiver:
        assert (await post(receiver.url)).error is None


@pytest.mark.parametrize("status", ["301 Moved", "304 Not Modified", "400 No", "410 Gone", "500 Oops", "503 Later"])
async def test_everything_else_is_not(status: str) -> None:
    async with receiving(says(status)) as receiver:
        answer = await post(receiver.url)
    assert (answer.status, answer.error) == (int(status[:3]), f"answered {status[:3]}")


async def test_a_redirect_is_not_followed() -> None:
    """Neither to the metadata of a cloud nor back to who is allowed."""
    async with receiving() as second:
        for location in ("http://169.254.169.254/latest/meta-data/", second.url):
            async with receiving(says("307 Temporary Redirect", f"Location: {location}")) as receiver:
                answer = await post(receiver.url)
            assert answer.error == "answered 307"
            assert len(receiver.requests) == 1
        assert second.requests == []


async def test_a_drip_feed_ends_at_the_deadline() -> None:
    """Each byte comes in time; the answer does not."""
    stop = asyncio.Event()

    async def drip(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not stop.is_set():
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with receiving(drip) as receiver:
        answer = await post(receiver.url, deadline=0.3)
    assert (answer.status, answer.error) == (200, "no complete answer within 0.3 seconds")


async def test_a_drip_feed_of_headers_and_silence_end_at_the_deadline_too() -> None:
    async def headers(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X: y\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    async def nothing(_: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    for answer in (headers, nothing):
        async with receiving(answer) as receiver:
            came = await post(receiver.url, deadline=0.3)
        assert (came.status, came.error) == (None, "no complete answer within 0.3 seconds")


async def test_of_a_gigabyte_64_kib_are_read() -> None:
    """The rest stays where it is: the receiver sends no more than the buffers between hold."""
    sent = 0

    async def flood(_: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n")
        while sent < 1 << 30:
            writer.write(b"x" * 65_536)
            await writer.drain()
            sent += 65_536

    async with receiving(flood) as receiver:
        answer = await post(receiver.url)
    assert (answer.status, answer.error) == (200, None)
    assert MAX_READ <= sent + 65_536 < 1 << 26


async def test_headers_without_an_end_are_given_up() -> None:
    async def headers(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X: " + b"y" * 65_536 + b"\r\n")
            await writer.drain()

    async with receiving(headers) as receiver:
        answer = await post(receiver.url)
    assert answer.status is None
    assert answer.error == "no usable answer: its headers do not end"


async def test_what_is_no_http_or_no_answer_at_all_is_told() -> None:
    async def garbage(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")

    async def hangs_up(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def switches(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n")

    async def ends_early(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhal")

    closed = "the connection was closed before the answer was complete"
    for answer, status, error in (
        (garbage, None, "it is not HTTP"),
        (hangs_up, None, closed),
        (ends_early, 200, closed),
        (switches, None, "it is not HTTP"),
    ):
        async with receiving(answer) as receiver:
            came = await post(receiver.url)
        assert (came.status, came.error) == (status, f"no usable answer: {error}")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        came = await post(f"http://127.0.0.1:{nobody.getsockname()[1]}/")
    assert (came.status, came.error) == (None, "no usable answer: Connection refused")


async def test_an_answer_of_any_form_is_read_to_its_end() -> None:
    """In pieces, in chunks, until the connection ends, and behind what announces it; of two, the first."""
    for said in (
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early", b" Hints\r\n\r\nHTTP/1.1 202 Accepted\r\n", b"\r\n"),
        (b"HTTP/1.1 202 Accepted\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", b"lo\r\n0\r\nRetry-After: 9\r\n\r\n"),
        (b"HTTP/1.0 202 Accepted\r\n\r\nfine",),
        (b"HTTP/1.1 100 Continue\r\nContent-Length: 0\r\nRetry-After: 9\r\n\r\n", b"HTTP/1.1 202 Accepted\r\n\r\nfine"),
        (b"HTTP/1.1 202 Accepted\r\nRetry-After: 9\r\nContent-Length: 0\r\n\r\n",),
        (b"HTTP/1.1 202 A\r\nContent-Length: 0\r\n\r\nHTTP/1.1 410 B\r\nRetry-After: 9\r\nContent-Length: 0\r\n\r\n",),
    ):

        async def in_pieces(_: Request, writer: asyncio.StreamWriter, said: tuple[bytes, ...] = said) -> None:
            for piece in said:
                writer.write(piece)
                await writer.drain()

        async with receiving(in_pieces) as receiver:
            came = await post(receiver.url)
        assert (came.status, came.error, came.retry_after) == (202, None, None), said


async def test_no_proxy_of_the_environment_is_asked_and_no_cookie_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving(says("200 OK", "Set-Cookie: a=b")) as proxy, receiving(proxy.answer) as receiver:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        poster = Poster(LOCAL, lookups=1)
        for _ in range(2):
            assert (await poster.post(receiver.url, {}, BODY, content_type="a/b")).error is None
        assert proxy.requests == []
    assert len(receiver.requests) == 2
    assert all("cookie" not in request.headers for request in receiver.requests)


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        *(("120", 120), ("date", 90), ("soon", None), ("-5", None), ("9" * 60, 10_000_000)),
        ("Mon, 01 Jan 2026 00:00:00 +99999999999999999999", None),
    ],
)
async def test_retry_after_is_read_in_seconds_and_as_a_date(header: str, wanted: int | None) -> None:
    if header == "date":
        header = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    async with receiving(says("429 Too Many Requests", f"Retry-After: {header}")) as receiver:
        answer = await post(receiver.url)
    assert answer.error == "answered 429"
    if wanted is None:
        assert answer.retry_after is None
    else:
        assert answer.retry_after is not None
        assert wanted - 30 <= answer.retry_after.total_seconds() <= wanted


# ------------------------------------------------------------------------------------------------- who they prove to be


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """One that the operator trusts, as the README has it."""
    made = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.certificate))
    return made


async def test_the_host_is_named_and_proves_to_be_it_though_the_address_is_connected_to(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, named = authority.server("hooks.internal"), []
    certificate.sni_callback = lambda _, name, __: named.append(name)
    async with receiving(tls=certificate) as receiver:
        asked = answers_for_names(monkeypatch, "127.0.0.1")
        answer = await post(f"https://hooks.internal:{receiver.port}/", receivers=Receivers("hooks.internal"))
        assert (answer.status, answer.error) == (204, None)
        (request,) = receiver.requests
    assert asked == named == ["hooks.internal"]
    assert request.headers["host"] == f"hooks.internal:{receiver.port}"


async def test_an_address_can_have_a_certificate_too(authority: Authority) -> None:
    async with receiving(tls=authority.server("127.0.0.1")) as receiver:
        assert (await post(receiver.url)).error is None


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        ("other name", "Hostname mismatch, certificate is not valid for 'hooks.internal'."),
        ("address", "Hostname mismatch, certificate is not valid for 'hooks.internal'."),
        ("ended", "certificate has expired"),
        ("unknown authority", "unable to get local issuer certificate"),
        ("self-signed", "self-signed certificate"),
    ],
)
async def test_who_does_not_prove_to_be_the_host_is_sent_nothing(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str, told: str
) -> None:
    certificate = {
        "other name": lambda: authority.server("hooks.example.com"),
        "address": lambda: authority.server("127.0.0.1"),
        "ended": lambda: authority.server("hooks.internal", ended=True),
        "unknown authority": lambda: Authority(tmp_path, "Another").server("hooks.internal"),
        "self-signed": lambda: self_signed(tmp_path, "hooks.internal"),
    }[problem]()
    answers_for_names(monkeypatch, "127.0.0.1")
    async with receiving(tls=certificate) as receiver:
        answer = await post(f"https://hooks.internal:{receiver.port}/", receivers=Receivers("hooks.internal"))
        assert receiver.requests == []
    assert (answer.status, answer.error) == (None, f"its certificate is refused: {told}")


async def test_what_speaks_no_tls_or_says_nothing_is_told(authority: Authority) -> None:
    async def speaks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ESMTP\r\n")
        while await reader.read(1_000):
            pass
        writer.close()

    async with await asyncio.start_server(speaks, "127.0.0.1", 0) as server:
        answer = await post(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
    assert (answer.status, answer.error) == (None, "no TLS connection: WRONG_VERSION_NUMBER")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        answer = await post(url, deadline=0.3)
    assert (answer.status, answer.error) == (None, "no complete answer within 0.3 seconds")


# ----------------------------------------------------------------------------------------------- who is not asked


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.31.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.1"),
        *("192.0.0.1", "198.18.0.1", "203.0.113.9", "224.0.0.1", "239.255.255.250", "255.255.255.255", "240.0.0.1"),
        *("::1", "::", "fe80::1", "fc00::1", "fd12::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1"),
        *("64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:a9fe:a9fe::1", "2001:0:1::1", "2001:db8::1", "fec0::1"),
    ],
)
def test_what_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "2a00:1450::1"])
def test_what_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        *("http://hooks.example.com/", "ftp://hooks.example.com/", "https:///x", "hooks.example.com", ""),
        "https://a b/",
        *("https://user@hooks.example.com/", "https://u:p@hooks.example.com/", "https://hooks.example.com/#part"),
        *("https://10.0.0.1/", "https://[::1]/", "https://[fe80::1%25eth0]/", "https://hooks.example.com:99999/"),
        *("http://8.8.8.8/", "https://hooks.example.com/\n", "javascript:alert(1)"),
    ],
)
def test_addresses_that_are_refused_when_they_are_given(url: str) -> None:
    with pytest.raises(Refused):
        Receivers("").check_url(url)


def test_what_the_operator_allows_need_not_be_public_or_https() -> None:
    allowed = Receivers("hooks.internal, 10.1.0.0/16,::1")
    for url in ("http://hooks.internal/x", "https://hooks.internal/", "http://10.1.2.3:8080/", "http://[::1]/"):
        allowed.check_url(url)
    for receivers, url in ((Receivers("hooks.internal"), "http://other.internal/"), (allowed, "http://10.2.0.1/")):
        with pytest.raises(Refused):
            receivers.check_url(url)
    Receivers("").check_url("https://hooks.example.com/x?y=z")


def answers_for_names(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """The system's resolver, which knows one answer. Returns the names it is asked."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int | None, **_: object) -> list[object]:
        asked.append(host)
        kinds = [(socket.AF_INET6 if ":" in one else socket.AF_INET, one) for one in addresses]
        return [(kind, socket.SOCK_STREAM, 6, "", (one, port)) for kind, one in kinds]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize(
    "addresses", [("127.0.0.1",), ("8.8.8.8", "10.0.0.1"), ("::ffff:169.254.169.254",), ("169.254.169.254",)]
)
async def test_a_name_that_leads_inside_is_refused_if_only_one_of_its_addresses_does(
    monkeypatch: pytest.MonkeyPatch, addresses: tuple[str, ...]
) -> None:
    answers_for_names(monkeypatch, *addresses)
    answer = await post("https://hooks.example.com/", receivers=Receivers(""))
    assert answer.status is None
    assert answer.error is not None
    assert "not public" in answer.error


async def test_what_would_be_refused_when_it_is_given_is_not_sent_to_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been given when other things were allowed."""
    asked = answers_for_names(monkeypatch, "127.0.0.1")
    answer = await post("https://user@hooks.example.com/", receivers=Receivers("hooks.example.com"))
    assert answer.error is not None
    assert answer.error.startswith("It has a user")
    assert asked == []


async def test_only_what_is_allowed_is_sent_to_in_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    answers_for_names(monkeypatch, "8.8.8.8")
    answer = await post("http://hooks.example.com/", receivers=Receivers("10.0.0.0/8"))
    assert (answer.status, answer.error) == (None, "It is not https.")


async def test_a_name_is_looked_up_once_and_what_was_checked_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that would answer differently the second time (DNS rebinding) is not asked a second time."""
    async with receiving() as receiver:
        asked = answers_for_names(monkeypatch, "127.0.0.1")
        answer = await post(f"http://hooks.internal:{receiver.port}/x?y=1", receivers=Receivers("hooks.internal"))
        assert answer.error is None
        assert asked == ["hooks.internal"]
        (request,) = receiver.requests
        assert request.line == "POST /x?y=1 HTTP/1.1"
        assert request.headers["host"] == f"hooks.internal:{receiver.port}"


async def test_of_several_addresses_the_first_that_can_be_connected_to_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with receiving() as receiver:
        answers_for_names(monkeypatch, "127.0.0.2", "127.0.0.3", "127.0.0.1")
        answer = await post(f"http://hooks.internal:{receiver.port}/")
        assert answer.error is None
        answers_for_names(monkeypatch, "127.0.0.2", "127.0.0.3")
        answer = await post(f"http://hooks.internal:{receiver.port}/")
        assert answer.error == "no usable answer: Connection refused"


async def test_an_allowed_network_allows_its_names_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving() as receiver:
        answers_for_names(monkeypatch, "127.0.0.1")
        url = f"http://localhost:{receiver.port}/"
        assert (await post(url)).error is None
        refused = await post(url, receivers=Receivers("10.0.0.0/8"))
    assert refused.error is not None
    assert len(receiver.requests) == 1


# ------------------------------------------------------------------------------------------------ names that hang


class Resolver:
    """The system's resolver: names of `hang...` wait for `answers`, every name leads to `address` in the end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.answers = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)

    async def was_asked(self, number: int) -> None:
        async with asyncio.timeout(30):
            while True:
                if len(self.asked) >= number:
                    return
                await asyncio.sleep(0.01)

    def _getaddrinfo(self, host: str, port: int | None, **_: object) -> list[object]:
        self.asked.append(host)
        if host.startswith("hang"):
            self.answers.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


@pytest.fixture
async def resolver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Resolver]:
    made = Resolver(monkeypatch)
    yield made
    made.answers.set()


def looking_up(lookups: int, *, deadline: float, patience: float = 30) -> Callable[[str], Coroutine[Any, Any, Answer]]:
    poster = Poster(LOCAL, lookups=lookups, deadline=timedelta(seconds=deadline), patience=timedelta(seconds=patience))
    return lambda url: poster.post(url, {}, BODY, content_type="a/b")


async def test_waiting_behind_names_that_hang_is_no_failure(resolver: Resolver) -> None:
    """However long it is: the deadline begins with the receiver's own lookup."""
    async with receiving() as receiver:
        send = looking_up(2, deadline=2)
        hanging = [asyncio.create_task(send(f"http://hang{number}.internal/")) for number in range(2)]
        await resolver.was_asked(2)
        waiting = asyncio.create_task(send(f"http://works.internal:{receiver.port}/"))
        await asyncio.sleep(0)
        began = time.monotonic()
        for one in hanging:
            assert (await one).error == "no complete answer within 2 seconds"
        assert not waiting.done()
        waited = timedelta(seconds=time.monotonic() - began)
        resolver.answers.set()
        answer = await waiting
    assert (answer.status, answer.error) == (204, None)
    assert answer.latency < waited


async def test_what_waits_for_too_long_was_not_tried(resolver: Resolver) -> None:
    """An address needs no looking up, and does not wait."""
    async with receiving() as receiver:
        send = looking_up(1, deadline=30, patience=0.1)
        hanging = asyncio.create_task(send(f"http://hangs.internal:{receiver.port}/"))
        await resolver.was_asked(1)
        with pytest.raises(NotTried):
            await send(f"http://works.internal:{receiver.port}/")
        assert (await send(receiver.url)).error is None
        resolver.answers.set()
        assert (await hanging).error is None
        assert (await send(f"http://works.internal:{receiver.port}/")).error is None
    assert resolver.asked == ["hangs.internal", "works.internal"]


async def test_a_name_is_looked_up_once_at_a_time_for_all_who_ask(resolver: Resolver) -> None:
    async with receiving() as receiver:
        send = looking_up(2, deadline=30)
        both = [asyncio.create_task(send(f"http://hangs.internal:{receiver.port}/{number}")) for number in range(5)]
        await resolver.was_asked(1)
        assert (await send(f"http://works.internal:{receiver.port}/")).error is None
        resolver.answers.set()
        assert [answer.error for answer in await asyncio.gather(*both)] == [None] * 5
    assert resolver.asked == ["hangs.internal", "works.internal"]


async def test_a_name_that_hangs_fails_at_once_until_its_lookup_ends_and_has_a_place_of_its_own(
    resolver: Resolver,
) -> None:
    async with receiving() as receiver:
        urls = [f"http://hang{number}.internal:{receiver.port}/" for number in range(2)]
        send = looking_up(2, deadline=2)
        for answer in await asyncio.gather(*map(send, urls)):
            assert answer.error == "no complete answer within 2 seconds"
        for answer in await asyncio.gather(*map(send, urls)):
            assert answer.error == "its name cannot be resolved: the lookup before has not ended"
        assert sorted(resolver.asked) == ["hang0.internal", "hang1.internal"]
        resolver.answers.set()
        works = f"http://works.internal:{receiver.port}/"
        assert (await send(works)).error is None
        resolver.answers.clear()
        slow = [asyncio.create_task(send(url)) for url in urls]
        await resolver.was_asked(4)
        another = asyncio.create_task(send(f"http://hang2.internal:{receiver.port}/"))
        await resolver.was_asked(5)
        assert (await send(works)).error is None, "the two, known to be slow, hold one place, and none of these"
        resolver.answers.set()
        assert [answer.error for answer in await asyncio.gather(*slow, another)] == [None] * 3
