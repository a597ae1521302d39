"""What tailscaled on this machine says about itself, asked through its LocalAPI on a Unix socket.

    tailscale_status ──GET /localapi/v0/status──▶ tailscaled
                     ◀── parse_status: tolerant, since Tailscale promises no stable shape

Reads only, and needs no rights: any local user may ask. A machine without Tailscale is a normal case and no error:
there is no status then, and the reason says why. Nothing here decides anything.
"""

import contextlib
import ipaddress
import logging
import socket
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2

log = logging.getLogger("lydian.tailscale")

SOCKET = Path("/var/run/tailscale/tailscaled.sock")  # on Linux; elsewhere there is none, and the reason says so
TIMEOUT_S = 0.5  # for one answer
PATIENCE_S = 60.0  # for a daemon that starts: it is asked again until it knows its address
EXPIRY_WARNING = timedelta(days=14)

_URL = "http://local-tailscaled.sock"  # the host that tailscaled insists on
_STARTING = ("Starting", "NoState")


@dataclass(frozen=True)
class TailscaleStatus:
    """The part of tailscaled's status that matters here."""

    state: str  # BackendState: NoState, NeedsLogin, NeedsMachineAuth, Stopped, Starting, Running
    tun: bool = True  # False: userspace networking, where this machine has no tailnet interface
    addresses: tuple[str, ...] = ()  # this machine's on the tailnet, as tailscaled orders them: IPv4 first
    name: str | None = None  # full MagicDNS name without the last dot; None when the tailnet does not resolve names
    key_expiry: datetime | None = None  # None: never


@dataclass(frozen=True)
class _NoAnswer:
    why: str
    again: bool  # it may answer in a moment


def tailscale_status(
    socket_path: Path = SOCKET, *, patience_s: float = PATIENCE_S, poll_s: float = 0.5
) -> tuple[TailscaleStatus | None, str]:
    """Ask tailscaled where it stands. One that starts, or is too busy to answer, is asked again for a while.

    Args:
        socket_path: tailscaled's Unix socket.
        patience_s: seconds after which whatever it said last is the answer.
        poll_s: seconds between two questions.

    Returns:
        (status, "") or (None, why there is none). The state may be any, Starting included.
    """
    give_up_at = time.monotonic() + patience_s
    said = ""
    while True:
        answer = _ask(socket_path)
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
    )


def expiry_warning(status: TailscaleStatus, *, now: datetime) -> str | None:
    """A sentence when this machine's Tailscale key expires soon or has expired: its tailnet ends with it.

    Args:
        status: of this machine.
        now: aware, the wall clock; it decides nothing but the sentence.
    """
    if status.key_expiry is None or status.key_expiry - now > EXPIRY_WARNING:
        return None
    left = (status.key_expiry - now) / timedelta(days=1)
    when = f"expires in {left:.1f} days" if left > 0 else f"expired {-left:.1f} days ago"
    return (
        f"this machine's Tailscale key {when}, and no worker reaches it then: run `tailscale up --force-reauth`, "
        "or disable key expiry for it in Tailscale's admin console"
    )


# ---------------------------------------------------------------- the wire


def _ask(socket_path: Path) -> TailscaleStatus | _NoAnswer:
    """One question, one answer."""
    if (why := _out_of_reach(socket_path)) is not None:
        return _NoAnswer(f"no tailscaled on {socket_path}: {why}", again=False)
    try:
        # No TLS on this socket: a context without certificates saves the 40 ms that loading them takes.
        transport = httpx2.HTTPTransport(uds=str(socket_path), verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        with httpx2.Client(transport=transport, base_url=_URL, timeout=TIMEOUT_S, trust_env=False) as client:
            answer = client.get("/localapi/v0/status", params={"peers": "false"})
    except httpx2.TimeoutException:
        return _NoAnswer(f"tailscaled did not answer on {socket_path} within {TIMEOUT_S} s", again=True)
    except httpx2.RequestError as error:
        return _NoAnswer(f"tailscaled broke off on {socket_path}: {error}", again=False)
    status = None
    if answer.status_code == httpx2.codes.OK:
        with contextlib.suppress(ValueError):  # not JSON is not a status
            status = parse_status(answer.json())
    if status is None:
        shown = answer.text.strip()[:100]
        return _NoAnswer(f"{socket_path} answered HTTP {answer.status_code} and no status: {shown!r}", again=False)
    return status


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
