"""Where the coordinator listens: on the tailnet and loopback, or where it was told to, and nowhere by accident.

    --host ─┐
            ├─choose─▶ Binding: addresses, the host in its URLs, and why ──open_sockets──▶ bound sockets
    status ─┘

`choose` and `exposed` are pure; `open_sockets` binds and does not listen: the coordinator listens once its state is
loaded, and only where `exposed` has nothing against it: in plain words on loopback and tailnets, elsewhere with TLS.
"""

import contextlib
import errno
import ipaddress
import logging
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from common.errors import LydianError
from common.networks import is_sheltered
from common.tailscale import TailscaleStatus

LOOPBACK = "127.0.0.1"
FREE_PORT_TRIES = 20  # a port that the first address has free may be taken on another

log = logging.getLogger("lydian.binding")


@dataclass(frozen=True)
class Binding:
    """Where to listen. `hosts` are addresses or names of this machine, the one that workers use first."""

    hosts: tuple[str, ...]
    urls_host: str  # as it stands in a URL: an IPv6 address has its brackets
    reason: str
    address: str = ""  # the same in a URL as an address, where `urls_host` is a name of the tailnet
    pin: str | None = None  # this machine's StableID, where workers come over the tailnet
    scheme: Literal["http", "https"] = "http"

    def url(self, port: int) -> str:
        """The URL by which workers reach the coordinator."""
        return f"{self.scheme}://{self.urls_host}:{port}"

    def address_url(self, port: int) -> str:
        """The same without a name, for machines that do not resolve those of the tailnet; empty: there is none."""
        return f"{self.scheme}://{self.address}:{port}" if self.address else ""

    def encrypted(self, name: str | None) -> "Binding":
        """The same with TLS.

        Args:
            name: the only host that the certificate is trusted for; None: it is under any.
        """
        told = replace(self, scheme="https")
        return replace(told, urls_host=name, address="") if name else told


def choose(
    host: str | None,
    status: TailscaleStatus | None,
    why_none: str,
    *,
    machine: str = LOOPBACK,
) -> Binding:
    """Decide where to listen.

    Args:
        host: what the user asked for; None: not said.
        status: tailscaled's; None: there is none, or it was not asked. Beside a host it only says whether that is one
            of the tailnet.
        why_none: why there is no status.
        machine: what other machines call this one, for URLs of a coordinator that listens on every interface.

    Raises:
        LydianError: this machine is on a tailnet and cannot use it (code tailnet_down).
    """
    if host is not None:
        told = _as_told(host, machine)
        return replace(told, pin=status.stable_id) if status is not None and told.hosts[0] in status.addresses else told
    if status is None:
        return Binding(
            (LOOPBACK,),
            LOOPBACK,
            f"listening on {LOOPBACK} alone, so only this machine can join: {why_none}. "
            "With Tailscale running, or with --host ADDRESS, other machines can",
        )
    if status.state != "Running" or not status.addresses:
        raise _not_on_the_tailnet(status)
    urls_host, pin = status.name or _in_url(status.addresses[0]), status.stable_id
    address = _in_url(status.addresses[0]) if status.name else ""
    if not status.tun:
        return Binding(
            (LOOPBACK,),
            urls_host,
            f"listening on {LOOPBACK}: Tailscale runs without an interface here (userspace networking) and forwards "
            f"what comes for {urls_host} to it",
            address,
            pin,
        )
    hosts = (*status.addresses, LOOPBACK)
    return Binding(hosts, urls_host, f"listening on the tailnet and loopback: {', '.join(hosts)}", address, pin)


def exposed(addresses: Sequence[str], *, encrypted: bool, insecure: bool) -> tuple[str, ...]:
    """Where what is said in plain words may be read by others.

    Args:
        addresses: that are listened on, as addresses.
        encrypted: nothing is said in plain words.
        insecure: the user allowed it.

    Returns:
        Those of the addresses that are neither on loopback nor in a tailnet; none where all is encrypted.

    Raises:
        LydianError: there are such, and nobody allowed it (code insecure_host).
    """
    open_to_others = tuple(address for address in addresses if not is_sheltered(address))
    if encrypted or not open_to_others:
        return ()
    if not insecure:
        raise LydianError(
            f"plain HTTP on {', '.join(open_to_others)} could be read by whoever listens on that network: tokens, "
            "models and updates",
            code="insecure_host",
            advice="--tls self-made encrypts it, and the join line says how workers know the certificate. Or leave "
            "--host out to listen on the tailnet and loopback. --insecure allows it all the same.",
        )
    return open_to_others


def open_sockets(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """Bind one TCP socket to each address of `hosts`, all on one port. None listens yet.

    A name is bound at each of its addresses. An IPv6 address that this machine turns out not to have (tailscaled names
    its own even where IPv6 is off) is left out with a warning, as long as another address can be bound.

    Args:
        hosts: addresses or names of this machine, at least one.
        port: 0: a free one, the same for all.

    Returns:
        Sockets for `loop.create_server(sock=…)`, in the order of `hosts`. The caller closes them.

    Raises:
        LydianError: code port_taken, port_forbidden, bad_host (no such name), address_not_here or cannot_listen.
    """
    for _ in range(FREE_PORT_TRIES - 1 if port == 0 else 0):
        try:
            return _bind_all(hosts, port)
        except LydianError as error:
            if error.code != "port_taken":
                raise
    return _bind_all(hosts, port)


# ---------------------------------------------------------------- the choice


def _as_told(host: str, machine: str) -> Binding:
    host = host.strip().removeprefix("[").removesuffix("]")
    if not _is_everywhere(host):
        return Binding((host,), _in_url(host), f"listening on {host}, as told by --host")
    hint = f"; other machines need an address of this one in place of {LOOPBACK}" if machine == LOOPBACK else ""
    return Binding(
        (host,), _in_url(machine), f"listening on every interface, as told by --host {host or repr('')}{hint}"
    )


def _is_everywhere(host: str) -> bool:
    """Whether binding to this host binds to every interface, however that is written (0.0.0.0, ::, 0, 0x0, empty)."""
    if host in ("", "*"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        with contextlib.suppress(OSError):  # the old notations that the C library still takes for addresses
            return not any(socket.inet_aton(host))
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_unspecified


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _not_on_the_tailnet(status: TailscaleStatus) -> LydianError:
    instead = "or say --host 127.0.0.1 to listen for this machine alone"
    match status.state:
        case "NeedsLogin":
            sentence, advice = "Tailscale is logged out on this machine", "Run `tailscale up`"
        case "NeedsMachineAuth":
            sentence = "Tailscale waits for this machine to be approved"
            advice = "Have an admin of the tailnet approve it"
        case "Stopped":
            sentence, advice = "Tailscale is stopped on this machine", "Run `tailscale up`"
        case "Running":
            sentence, advice = "Tailscale runs and has no address for this machine", "Look at `tailscale status`"
        case state:
            sentence, advice = (
                f"Tailscale is not up on this machine: its state is {state}",
                "Look at `tailscale status`",
            )
    return LydianError(sentence, advice=f"{advice}, {instead}.", code="tailnet_down")


# ---------------------------------------------------------------- the sockets


@dataclass(frozen=True)
class _Address:
    family: int
    address: str  # numeric
    rest: tuple[int, ...]  # IPv6: flow and scope
    optional: bool  # one of several of a name


def _bind_all(hosts: Sequence[str], port: int) -> list[socket.socket]:
    bound: list[socket.socket] = []
    left_out: list[LydianError] = []
    with contextlib.ExitStack() as unless_done:
        for place in dict.fromkeys(place for host in hosts for place in _addresses(host)):
            try:
                sock = _bind(place, bound[0].getsockname()[1] if bound else port)
            except LydianError as error:
                if error.code != "address_not_here" or not (place.optional or place.family == socket.AF_INET6):
                    raise
                left_out.append(error)
            else:
                unless_done.callback(sock.close)
                bound.append(sock)
        if not bound:
            raise left_out[0]
        unless_done.pop_all()
    for missing in left_out:
        log.warning("%s; left out", missing)
    return bound


def _addresses(host: str) -> Iterator[_Address]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise LydianError(
            f"--host {host} is no address or name of this machine: {error}",
            code="bad_host",
            advice="`ip address` lists the addresses of this machine.",
        ) from error
    for family, _, _, _, where in found:
        yield _Address(family, str(where[0]), tuple(int(part) for part in where[2:]), optional=len(found) > 1)


def _bind(place: _Address, port: int) -> socket.socket:
    try:
        sock = socket.socket(place.family, socket.SOCK_STREAM)
    except OSError as error:
        raise _cannot_bind(place.address, port, error) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
        if place.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has sockets of its own
        sock.bind((place.address, port, *place.rest))
    except OSError as error:
        sock.close()
        raise _cannot_bind(place.address, port, error) from error
    return sock


def _cannot_bind(address: str, port: int, error: OSError) -> LydianError:
    if error.errno == errno.EADDRINUSE:
        return LydianError(
            f"port {port} on {address} is taken",
            code="port_taken",
            advice=f"Does another coordinator run? `ss -ltnp 'sport = :{port}'` shows what holds it; "
            "--port takes another, --port 0 any free one.",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return LydianError(
            f"this user may not listen on port {port} of {address}",
            code="port_forbidden",
            advice="Take a port above 1023.",
        )
    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return LydianError(
            f"{address} is no address of this machine now: {error.strerror}",
            code="address_not_here",
            advice="`ip address` lists the addresses of this machine; if this one is the tailnet's, is Tailscale up?",
        )
    return LydianError(
        f"port {port} on {address} cannot be listened on: {error.strerror}",
        code="cannot_listen",
        advice="This is the system's refusal; --host and --port take another place.",
    )
