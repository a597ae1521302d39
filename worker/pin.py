"""Whether the coordinator's address belongs to the machine that the join token names.

    lyd_join_…@nXYZCNTRL ──common.pins──▶ token, pin  who has the pin, asks its own tailscaled before the first call
    address ──whois──▶ StableID ──equal?──▶ go on     so that no credential goes to a machine that took the address over

A pin is kept with the credential (worker.identity). Without Tailscale here it cannot be checked, and the token decides
alone; that is said, not hidden.
"""

import ipaddress
import socket
from pathlib import Path
from urllib.parse import urlsplit

from common.errors import LydianError
from common.tailscale import SOCKET, whois


def check(url: str, pin: str | None, socket_path: Path = SOCKET) -> str:
    """Compare the machine at the coordinator's address with the one that the pin names.

    Args:
        url: the coordinator's.
        pin: that machine's StableID; None: there is nothing to compare.
        socket_path: of tailscaled on this machine.

    Returns:
        What was found, for the log; empty without a pin.

    Raises:
        LydianError: it is another machine (`wrong_coordinator`).
    """
    if pin is None:
        return ""
    host = urlsplit(url).hostname or ""
    addresses = _addresses(host)
    if not addresses:
        return f"whether {host} is the machine {pin} is not checked, since its address is not known here"
    said = ""
    for address in addresses:
        if ipaddress.ip_address(address).is_loopback:
            said = f"whether {host} is the machine {pin} is not checked: {address} is a loopback address"
            continue
        found = whois(address, socket_path=socket_path)
        if not found.asked:
            said = f"whether {host} is the machine {pin} cannot be checked, so the token decides alone: {found.why}"
        elif found.node is None or found.node.stable_id != pin:
            whose = f"{found.node.name} ({found.node.stable_id})" if found.node else "no machine of the tailnet"
            raise LydianError(
                f"{host} ({address}) is {whose}, and the join token is of a coordinator on {pin}",
                code="wrong_coordinator",
                advice="Paste the line that `lydian serve` prints now. To join over another network than the tailnet, "
                f"cut @{pin} off the token.",
            )
        else:
            said = f"{host} is {found.node.name} ({pin}), as the join token says"
    return said


def _addresses(host: str) -> list[str]:
    """All that a name stands for here; none where it is resolved elsewhere, such as by a proxy."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(where[0]).partition("%")[0] for *_, where in found))
