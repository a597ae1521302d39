"""By which names a call may come, and from which web page: what `Host` and `Origin` say, compared with our own.

Pure. A web page that an operator visits can have his browser call us: by our address, from its own origin, or, having
pointed its own name at our address (DNS rebinding), from what the browser takes for ours. The first names another
`Origin`, the second a `Host` that is not one of our names; a token does not help where a page finds one some day.

    Host ──Authority──▶ loopback · the address of the very socket · our names ──▶ goes on
                        none, two, no name at all ──▶ 400          anything else ──▶ 403
    Origin, where there is one ──▶ this very scheme, host and port ──▶ goes on, else 403

Names are compared whole, without regard to case and to a dot at the end. The port of a Host says nothing: a tunnel has
another one. It counts for an Origin, which is a page of this very place or of another.
"""

import ipaddress
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from common.errors import BadRequestError, ForbiddenError, LydianError

LOCALHOST = "localhost"
EVERY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 - to be left out: some browsers take them for this machine
SHOWN = 80  # characters of a name that a refusal repeats
PORTS = {"http": 80, "https": 443}  # what an Origin and a Host leave out

_NAME = re.compile(r"(?!.{254})[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*", re.ASCII)
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)


@dataclass(frozen=True)
class Authority:
    """A host, in one spelling, and the port where one was said."""

    host: str
    port: int | None = None


def host_of(text: str) -> str | None:
    """A name or an address in the one spelling that is compared; None: it is neither.

    Args:
        text: without a port; an IPv6 address with its brackets or without.
    """
    if not text.isascii():  # some letters of other scripts are ours in small
        return None
    bare = text.removeprefix("[").removesuffix("]") if text.startswith("[") else text
    if ":" in bare:
        return _address(bare)
    name = bare.lower().removesuffix(".")
    if re.fullmatch(r"[0-9.]+", name, re.ASCII):  # the last label of a name is no number
        return _address(name)
    return name if _NAME.fullmatch(name) else None


def _address(text: str) -> str | None:
    """An address without its zone, which means something on one machine alone; one of IPv4 in IPv6 is one of IPv4."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def parse_authority(text: str) -> Authority | None:
    """What a `Host` header names; None: it is none.

    Args:
        text: `name`, `name:port`, `1.2.3.4:port` or `[::1]:port`.
    """
    bare, port = text, None
    if not text.endswith("]"):
        before, colon, after = text.rpartition(":")
        if colon:
            if not _PORT.fullmatch(after) or int(after) > 65_535:
                return None
            bare, port = before, int(after)
    if (":" in bare) != (bare.startswith("[") and bare.endswith("]")):  # IPv6 has brackets here, and nothing else
        return None
    host = host_of(bare)
    return None if host is None else Authority(host, port)


def names_of(told: Iterable[str]) -> frozenset[str]:
    """Names and addresses as they are compared; what is neither, or stands for every address, is left out."""
    return frozenset(host for host in map(host_of, told) if host is not None and host not in EVERY_ADDRESS)


def with_short(name: str | None) -> Iterator[str]:
    """A machine's name, and its first label, by which its neighbours call it; nothing of nothing."""
    if name:
        yield name
        if host_of(name) != _address(name):
            yield name.partition(".")[0]


def is_ours(host: str, listening: str, names: Collection[str]) -> bool:
    """Whether a host is this coordinator.

    Args:
        host: in its one spelling.
        listening: the address of the socket that the call came through.
        names: ours, in their one spelling.
    """
    if host == LOCALHOST or host in names or host == host_of(listening):
        return True
    return _is_loopback(host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refusal(
    hosts: Sequence[str], origins: Sequence[str], *, scheme: str, listening: str, names: Collection[str]
) -> LydianError | None:
    """Why a call is not answered; None: nothing speaks against it.

    Args:
        hosts: its `Host` headers.
        origins: its `Origin` headers.
        scheme: `http` or `https`: what it came by.
        listening: the address of the socket that it came through; empty: it is not known.
        names: ours, in their one spelling.
    """
    if len(hosts) != 1:
        return BadRequestError(f"the call names {len(hosts)} hosts, where exactly one is due", code="unclear_host")
    host = parse_authority(hosts[0])
    if host is None:
        return BadRequestError(f"the Host {shown(hosts[0])} is neither a name nor an address", code="unclear_host")
    if not is_ours(host.host, listening, names):
        return ForbiddenError(
            f"the coordinator is not called {shown(hosts[0])}: it answers to its own addresses and names, and to those "
            "that --allow-host adds",
            code="host_not_allowed",
            advice=f"If that is a name of its machine: `lydian serve --allow-host {host.host}` or LYDIAN_ALLOW_HOST.",
        )
    if not origins or (len(origins) == 1 and _is_same(origins[0], scheme, host)):
        return None
    return ForbiddenError(
        f"a page of {shown(', '.join(origins))} may not call the coordinator at {scheme}://{shown(hosts[0])}: only its "
        "own pages may",
        code="origin_not_allowed",
        advice="No Origin is needed: leave the header out, or open the coordinator's own address.",
    )


def _is_same(origin: str, scheme: str, host: Authority) -> bool:
    """Whether an origin is the very place that is called."""
    said, colon, rest = origin.partition("://")
    page = parse_authority(rest) if colon and said == scheme else None
    if page is None or page.host != host.host:
        return False
    default = PORTS.get(scheme)
    return (page.port or default) == (host.port or default)


def shown(text: str) -> str:
    """What somebody sent, for a sentence or a log: cut, and without what a terminal would obey."""
    return ascii(text[:SHOWN])
