"""Which addresses may be spoken to in plain words: those where nobody else listens. Pure.

    loopback    never leaves the machine
    a tailnet   WireGuard encrypts it

An address of 100.64.0.0/10 can also be one of a carrier's own network, which no look at it tells apart; where
tailscaled runs, its answer does, and a worker asks for it (worker/pin.py).
"""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

TAILNETS = (ip_network("100.64.0.0/10"), ip_network("fd7a:115c:a1e0::/48"))


def is_tailnet(host: str) -> bool:
    """Whether this is an address that a tailnet gives; a name is none."""
    known = _address(host)
    return known is not None and any(known in net for net in TAILNETS if net.version == known.version)


def is_loopback(host: str) -> bool:
    """Whether this is an address of loopback; a name is none."""
    known = _address(host)
    return known is not None and known.is_loopback


def is_sheltered(host: str) -> bool:
    """Whether what is sent to this address in plain words is read by nobody else; of a name that is not known."""
    return is_loopback(host) or is_tailnet(host)


def is_address(host: str) -> bool:
    """Whether this is an address, and no name."""
    return _address(host) is not None


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        known = ip_address(host.partition("%")[0].removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
    mapped = known.ipv4_mapped if isinstance(known, IPv6Address) else None
    return mapped or known
