"""Who calls as a worker, over which path, and what of that a person should hear.

Pure: what tailscaled said comes in (common.tailscale), decisions and sentences go out.
"""

import ipaddress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Literal

from common.messages import Link, TailnetNode, TailnetPath
from common.tailscale import EXPIRY_ADVICE, Peer, TailscaleStatus, Whois, expires

RELAY_ADVICE = "let UDP port 41641 through at its end or the coordinator's, or set up a peer relay"


@dataclass(frozen=True)
class Verdict:
    """Whether the one who calls with a worker's credential is the machine that it was given to."""

    code: Literal["", "wrong_node", "cannot_verify"] = ""
    sentence: str = ""  # without a full stop; empty: nothing is wrong


def judge(pinned: TailnetNode | None, address: str, found: Whois) -> Verdict:
    """Compare a caller with the machine that a credential is pinned to.

    Args:
        pinned: that machine; None: the credential is good from anywhere.
        address: the caller's.
        found: whose it is.
    """
    if pinned is None or (found.node is not None and found.node.stable_id == pinned.stable_id):
        return Verdict()
    joined = f"the worker joined from {shown(pinned)}"
    if found.node is not None:
        return Verdict("wrong_node", f"its credential came from {shown(found.node)}, and {joined}")
    if found.asked:
        return Verdict("wrong_node", f"its credential came from {address}, which is not in the tailnet, and {joined}")
    return Verdict("cannot_verify", f"{joined}, and whether {address} is that machine cannot be told: {found.why}")


def shown(node: TailnetNode) -> str:
    """A machine in a sentence."""
    return f"{node.name} ({node.stable_id})"


def path_to(address: str, node: TailnetNode | None, status: TailscaleStatus | None) -> TailnetPath:
    """The way that packets take to a caller.

    Args:
        address: where it calls from.
        node: whose address that is; None: not known.
        status: the newest, with peers; None: there is none.
    """
    if node is None:
        return TailnetPath(kind="loopback" if is_loopback(address) else "other")
    if status is None:
        return TailnetPath(kind="unknown")
    if node.stable_id == status.stable_id:
        return TailnetPath(kind="loopback")
    found = [peer for peer in status.peers if peer.stable_id == node.stable_id]
    return _path(found[0]) if found else TailnetPath(kind="unknown")


def _path(peer: Peer) -> TailnetPath:
    if peer.direct:
        return TailnetPath(kind="direct", via=peer.direct)
    if peer.peer_relay:
        return TailnetPath(kind="peer relay", via=peer.peer_relay)
    if peer.relay and peer.active:
        return TailnetPath(kind="relay", via=peer.relay)
    return TailnetPath(kind="unknown")  # nothing was sent for a while: the region named is where it could be reached


@lru_cache(maxsize=1024)
def is_loopback(address: str) -> bool:
    """Whether a caller is on this machine, or comes through something on it."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # a Unix socket, or a test without any
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def warnings(
    path: TailnetPath | None, node: TailnetNode | None, link: Link | None, verdict: Verdict, *, now: datetime
) -> tuple[str, ...]:
    """What a person should hear about a worker's line, its key and its identity: sentences without a full stop.

    Args:
        path: the way to it; None: it has not called.
        node: whose address it called from; None: not known.
        link: what its line carries, as it measured it.
        verdict: on its last call.
        now: aware, the wall clock; for the key alone.
    """
    said = []
    if verdict.sentence:
        said.append(f"{verdict.sentence}: a copied state folder, or a machine that was set up anew?")
    if path is not None and path.kind in ("relay", "peer relay"):
        speed = f" ({link.down * 8e-6:.1f} Mbit/s down, {link.up * 8e-6:.1f} Mbit/s up)" if link else ""
        by = path.via if path.kind == "relay" else f"the peer relay {path.via}"
        advice = f": {RELAY_ADVICE}" if path.kind == "relay" else ""
        said.append(f"relayed by {by}, which is slow{speed}{advice}")
    if node is not None and (when := expires(node.key_expiry, now=now)) is not None:
        said.append(f"its Tailscale key {when}, and it is out of reach then: {EXPIRY_ADVICE}")
    return tuple(said)
