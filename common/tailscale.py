"""What tailscaled on this machine says about itself and others, asked through its LocalAPI on a Unix socket.

    tailscale_status ──GET /localapi/v0/status──▶ tailscaled
    whois            ──GET /localapi/v0/whois───▶
                     ◀── parse_status, parse_node: tolerant, since Tailscale promises no stable shape
    tailscale_certificate ──GET /localapi/v0/cert/NAME──▶

Status and whois need no rights: any local user may ask. A machine without Tailscale is a normal case and no error:
there is no status then, and the reason says why. Nothing here decides anything.
"""

import contextlib
import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from common.messages import TailnetNode

log = logging.getLogger("lydian.tailscale")

SOCKET = Path("/var/run/tailscale/tailscaled.sock")  # on Linux; elsewhere there is none, and the reason says so
TIMEOUT_S = 0.5  # for one answer
CERTIFICATE_S = 120.0  # for a certificate: an authority on the internet is asked for it
PATIENCE_S = 60.0  # for a daemon that starts: it is asked again until it knows its address
EXPIRY_WARNING = timedelta(days=14)
EXPIRY_ADVICE = "run `tailscale up --force-reauth`, or disable key expiry for it in Tailscale's admin console"

_URL = "http://local-tailscaled.sock"  # the host that tailscaled insists on
_STARTING = ("Starting", "NoState")

T = TypeVar("T")


@dataclass(frozen=True)
class Peer:
    """Another machine of the tailnet, and how this one reaches it."""

    stable_id: str
    addresses: tuple[str, ...]
    direct: str = ""  # the address and port that packets go to; empty: none goes directly
    peer_relay: str = ""  # address and port of another machine that passes packets on
    relay: str = ""  # the DERP region that it can be reached through, in use or not
    active: bool = False  # there were packets a short while ago


@dataclass(frozen=True)
class TailscaleStatus:
    """The part of tailscaled's status that matters here."""

    state: str  # BackendState: NoState, NeedsLogin, NeedsMachineAuth, Stopped, Starting, Running
    tun: bool = True  # False: userspace networking, where this machine has no tailnet interface
    addresses: tuple[str, ...] = ()  # this machine's on the tailnet, as tailscaled orders them: IPv4 first
    name: str | None = None  # full MagicDNS name without the last dot; None when the tailnet does not resolve names
    key_expiry: datetime | None = None  # None: never
    stable_id: str | None = None  # this machine's
    peers: tuple[Peer, ...] = ()  # only if they were asked for


@dataclass(frozen=True)
class Whois:
    """Who has an address."""

    node: TailnetNode | None
    why: str = ""  # there is no node
    asked: bool = True  # False: tailscaled could not be asked, so nothing is known


@dataclass(frozen=True)
class Person:
    """Who has an address, as far as rights may be given for it."""

    stable_id: str
    login: str  # of its user; empty for a tagged machine
    tags: tuple[str, ...]
    guest: bool  # shared from another tailnet
    capabilities: Mapping[str, tuple[Any, ...]]  # what the tailnet's policy grants it on this machine: name -> values


@dataclass(frozen=True)
class _NoAnswer:
    why: str
    again: bool  # it may answer in a moment


def tailscale_status(
    socket_path: Path = SOCKET, *, patience_s: float = PATIENCE_S, poll_s: float = 0.5, peers: bool = False
) -> tuple[TailscaleStatus | None, str]:
    """Ask tailscaled where it stands. One that starts, or is too busy to answer, is asked again for a while.

    Args:
        socket_path: tailscaled's Unix socket.
        patience_s: seconds after which whatever it said last is the answer.
        poll_s: seconds between two questions.
        peers: tell of the other machines too.

    Returns:
        (status, "") or (None, why there is none). The state may be any, Starting included.
    """
    give_up_at = time.monotonic() + patience_s
    said = ""
    while True:
        answer = _status(socket_path, peers=peers)
        if isinstance(answer, TailscaleStatus):
            waiting = f"tailscaled is in state {answer.state}" if answer.state in _STARTING else ""
        else:
            waiting = answer.why if answer.again else ""
        if not waiting or time.monotonic() >= give_up_at:
            return (answer, "") if isinstance(answer, TailscaleStatus) else (None, answer.why)
        if waiting != said:
            said = waiting
            log.info("%s; waiting up to %g s for the tailnet's address", waiting, patience_s)
        time.sleep(poll_s)  # between two questions: neither of the two calls that are relied on can wait


def whois(address: str, port: int = 0, socket_path: Path = SOCKET) -> Whois:
    """Ask tailscaled which machine has an address. One question, half a second at most.

    Args:
        address: IPv4 or IPv6.
        port: of the caller's end of a connection; where tailscaled runs in userspace, callers come from loopback, and
            only the port tells them apart. 0: the machine is asked for by its address alone.
        socket_path: tailscaled's Unix socket.
    """
    asked = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    answer = _get(socket_path, "whois", {"addr": asked if port else address, "proto": "tcp"})
    if isinstance(answer, _NoAnswer):
        return Whois(None, answer.why, asked=False)
    if answer.status_code == httpx2.codes.NOT_FOUND:
        return Whois(None, f"{address} is no address of a machine of the tailnet")
    node = _parsed(answer, parse_node)
    if node is None:
        shown = answer.text.strip()[:100]
        return Whois(None, f"tailscaled answered HTTP {answer.status_code} and nobody: {shown!r}", asked=False)
    return Whois(node)


def tailscale_certificate(name: str, socket_path: Path = SOCKET) -> tuple[str | None, str]:
    """Have tailscaled get, or show, the certificate of this machine's name. It renews that 14 days before its end.

    Root and tailscaled's operator may ask, and the user whose number TS_PERMIT_CERT_UID is set to.

    Args:
        name: this machine's full MagicDNS name.
        socket_path: tailscaled's Unix socket.

    Returns:
        (key and certificates in PEM, "") or (None, why there are none).
    """
    answer = _get(socket_path, f"cert/{name}", {"type": "pair"}, timeout_s=CERTIFICATE_S)
    if isinstance(answer, _NoAnswer):
        return None, answer.why
    if answer.status_code != httpx2.codes.OK or "BEGIN CERTIFICATE" not in answer.text:
        return None, f"tailscaled answered HTTP {answer.status_code}: {answer.text.strip()[:300]!r}"
    return answer.text, ""


def person(address: str, port: int = 0, socket_path: Path = SOCKET) -> Person | None:
    """Ask tailscaled who has an address, and what is granted to it here; None: nobody, or it cannot be told.

    Args:
        address: IPv4 or IPv6.
        port: of the caller's end of a connection, where it comes from loopback; 0: asked for by its address alone.
        socket_path: tailscaled's Unix socket.
    """
    asked = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    answer = _get(socket_path, "whois", {"addr": asked if port else address, "proto": "tcp"})
    return None if isinstance(answer, _NoAnswer) else _parsed(answer, parse_person)


def parse_person(body: Any) -> Person | None:  # noqa: ANN401 - whatever the daemon sent
    """Read a whois as the LocalAPI sends it. Never raises; None when it names nobody, or tags that cannot be read."""
    node, profile = _object(_object(body).get("Node")), _object(_object(body).get("UserProfile"))
    stable_id, tags = _text(node.get("StableID")), node.get("Tags") or []
    if not stable_id or not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        return None
    granted = {name: tuple(values) for name, values in _object(_object(body).get("CapMap")).items()
               if isinstance(values, list)}  # fmt: skip
    return Person(
        stable_id=stable_id,
        login="" if tags else _text(profile.get("LoginName")),
        tags=tuple(tags),
        guest=bool(node.get("Sharer")),
        capabilities=granted,
    )


def parse_node(body: Any) -> TailnetNode | None:  # noqa: ANN401 - whatever the daemon sent
    """Read a whois as the LocalAPI sends it. Never raises.

    Returns:
        None when it names nobody: there is no StableID.
    """
    node, profile = _object(_object(body).get("Node")), _object(_object(body).get("UserProfile"))
    stable_id = _text(node.get("StableID"))
    if not stable_id:
        return None
    tags = node.get("Tags") if isinstance(node.get("Tags"), list) else []  # they go before the user: it has none then
    return TailnetNode(
        stable_id=stable_id,
        name=_text(node.get("Name")).rstrip(".") or stable_id,
        owner=", ".join(_text(tag) for tag in tags or ()) or _text(profile.get("LoginName")),
        os=_text(_object(node.get("Hostinfo")).get("OS")),
        key_expiry=_moment(node.get("KeyExpiry")),
    )


def parse_status(body: Any) -> TailscaleStatus | None:  # noqa: ANN401 - whatever the daemon sent
    """Read a status as the LocalAPI sends it. Never raises: what is missing or strange counts as not known.

    Returns:
        None when it is no status at all: there is no BackendState.
    """
    body = _object(body)
    state = body.get("BackendState")
    if not isinstance(state, str) or not state:
        return None
    me = _object(body.get("Self"))
    tailnet = _object(body.get("CurrentTailnet"))
    name = me.get("DNSName") if tailnet.get("MagicDNSEnabled") is True else None
    return TailscaleStatus(
        state=state,
        tun=body.get("TUN") is not False,
        addresses=_addresses(body.get("TailscaleIPs")) or _addresses(me.get("TailscaleIPs")),
        name=name.rstrip(".") or None if isinstance(name, str) else None,
        key_expiry=_moment(me.get("KeyExpiry")),
        stable_id=_text(me.get("ID")) or None,
        peers=tuple(_peer(_object(peer)) for peer in _object(body.get("Peer")).values()),
    )


def _peer(body: dict[str, Any]) -> Peer:
    return Peer(
        stable_id=_text(body.get("ID")),
        addresses=_addresses(body.get("TailscaleIPs")),
        direct=_text(body.get("CurAddr")),
        peer_relay=_text(body.get("PeerRelay")),
        relay=_text(body.get("Relay")),
        active=body.get("Active") is True,
    )


def expiry_warning(status: TailscaleStatus, *, now: datetime) -> str | None:
    """A sentence when this machine's Tailscale key expires soon or has expired: its tailnet ends with it.

    Args:
        status: of this machine.
        now: aware, the wall clock; it decides nothing but the sentence.
    """
    when = expires(status.key_expiry, now=now)
    if when is None:
        return None
    return f"this machine's Tailscale key {when}, and no worker reaches it then: {EXPIRY_ADVICE}"


def expires(key_expiry: datetime | None, *, now: datetime) -> str | None:
    """`expires in 3.2 days` or `expired 0.1 days ago`; None: not within EXPIRY_WARNING."""
    if key_expiry is None or key_expiry - now > EXPIRY_WARNING:
        return None
    left = (key_expiry - now) / timedelta(days=1)
    return f"expires in {left:.1f} days" if left > 0 else f"expired {-left:.1f} days ago"


# ---------------------------------------------------------------- the wire


def _status(socket_path: Path, *, peers: bool) -> TailscaleStatus | _NoAnswer:
    answer = _get(socket_path, "status", {"peers": "true" if peers else "false"})
    if isinstance(answer, _NoAnswer):
        return answer
    status = _parsed(answer, parse_status)
    if status is None:
        shown = answer.text.strip()[:100]
        return _NoAnswer(f"{socket_path} answered HTTP {answer.status_code} and no status: {shown!r}", again=False)
    return status


def _parsed(answer: httpx2.Response, parse: Callable[[Any], T | None]) -> T | None:
    """What an answer says; None: it is an error, or says nothing of the kind."""
    if answer.status_code == httpx2.codes.OK:
        with contextlib.suppress(ValueError, RecursionError):  # not JSON, or too deep, says nothing
            return parse(answer.json())
    return None


def _get(
    socket_path: Path, call: str, parameters: dict[str, str], *, timeout_s: float | None = None
) -> httpx2.Response | _NoAnswer:
    """One question, one answer."""
    if (why := _out_of_reach(socket_path)) is not None:
        return _NoAnswer(f"no tailscaled on {socket_path}: {why}", again=False)
    timeout_s = timeout_s or TIMEOUT_S
    try:
        # No TLS on this socket: a context without certificates saves the 40 ms that loading them takes.
        transport = httpx2.HTTPTransport(uds=str(socket_path), verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        with httpx2.Client(transport=transport, base_url=_URL, timeout=timeout_s, trust_env=False) as client:
            return client.get(f"/localapi/v0/{call}", params=parameters)
    except httpx2.TimeoutException:
        return _NoAnswer(f"tailscaled did not answer on {socket_path} within {timeout_s:g} s", again=True)
    except httpx2.RequestError as error:
        return _NoAnswer(f"tailscaled broke off on {socket_path}: {error}", again=False)


def _out_of_reach(socket_path: Path) -> str | None:
    """Why nobody can be reached on the socket. Asked first, since httpcore2 leaks a Unix socket that cannot connect."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(TIMEOUT_S)
            probe.connect(str(socket_path))
    except OSError as error:  # a path that is too long has no strerror
        return error.strerror or str(error)
    return None


def _object(value: Any) -> dict[str, Any]:  # noqa: ANN401
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:  # noqa: ANN401
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""  # no half of a surrogate pair


def _addresses(value: Any) -> tuple[str, ...]:  # noqa: ANN401
    """What of a JSON list is IP addresses."""
    found = []
    for item in value if isinstance(value, list) else ():
        with contextlib.suppress(ValueError):
            found.append(str(ipaddress.ip_address(item if isinstance(item, str) else "")))
    return tuple(found)


def _moment(value: Any) -> datetime | None:  # noqa: ANN401
    """An RFC 3339 time; None for anything else, and for Go's zero time, which means never."""
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return moment if moment.year > 1 else None
