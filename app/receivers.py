"""To whom webhooks may be sent: the rules that keep them from the operator's own network.

Pure: addresses in, yes or no out. Nothing is looked up here. `app.delivery.webhook` looks a name up, once, asks again
about what it has found, and connects to nothing else.
"""

import ipaddress
from collections.abc import Sequence
from typing import Final
from urllib.parse import SplitResult, urlsplit

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NEVER: Final[tuple[_Network, ...]] = tuple(
    ipaddress.ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        # Of IPv6 only 2000::/3 is public, and within it what stands for an IPv4 address is not.
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)
_PUBLIC_V6: Final = ipaddress.ip_network("2000::/3")


class Refused(ValueError):
    """The address is one that webhooks are not sent to; the text says why."""


def is_public(address: _Address) -> bool:
    """Whether it can only mean a machine on the internet: neither private, local, shared or reserved, nor IPv6 that
    stands for IPv4 (mapped, 6to4, NAT64, Teredo), nor many machines at once."""
    if isinstance(address, ipaddress.IPv6Address) and address not in _PUBLIC_V6:
        return False
    return address.is_global and not any(address in network for network in _NEVER if network.version == address.version)


class Receivers:
    """To whom webhooks may be sent: https:// and public addresses, and whatever the operator allows beside."""

    def __init__(self, allow: str) -> None:
        """`allow`: hosts, addresses and networks, separated by commas, as SUNSET_WEBHOOK_ALLOW has them."""
        self._hosts: set[str] = set()
        self._networks: list[_Network] = []
        for one in filter(None, (part.strip() for part in allow.split(","))):
            try:
                self._networks.append(ipaddress.ip_network(one))
            except ValueError:
                self._hosts.add(one.lower())

    def check_url(self, url: str) -> SplitResult:
        """The URL's parts. Raises `Refused` for what could never be delivered to, whatever its name resolves to."""
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
            ascii_host = (host or "").encode("idna").decode()
        except ValueError:
            raise Refused("It is no web address.") from None
        if not url.isprintable() or " " in url or not ascii_host or parts.scheme not in ("https", "http"):
            raise Refused("It is no web address.")
        if parts.username is not None or parts.fragment:
            raise Refused("It has a user or a fragment; who sends is proven by the signature.")
        try:
            addresses = [ipaddress.ip_address(ascii_host.partition("%")[0])]
        except ValueError:
            addresses = []
        self._check(parts, addresses)
        in_a_network = addresses or self._networks  # where a name leads is found out later
        if parts.scheme == "http" and not in_a_network and not self._knows(ascii_host):
            raise Refused("It is not https.")
        return parts

    def _knows(self, host: str) -> bool:
        return host.lower() in self._hosts

    def _check(self, parts: SplitResult, addresses: Sequence[_Address]) -> None:
        if self._knows(parts.hostname or ""):
            return
        for address in addresses:
            allowed = any(address in network for network in self._networks if network.version == address.version)
            if not allowed and not is_public(address):
                raise Refused("It leads to an address that is not public, and that SUNSET_WEBHOOK_ALLOW does not name.")
            if not allowed and parts.scheme != "https":
                raise Refused("It is not https.")

    def checked(self, parts: SplitResult, addresses: Sequence[_Address]) -> Sequence[_Address]:
        """The addresses of the name, of which any may be connected to. Raises `Refused` if one of them may not."""
        if not addresses:
            raise Refused("Its name has no address.")
        self._check(parts, addresses)
        return addresses
