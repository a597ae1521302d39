"""A stand-in for tailscaled's LocalAPI on a Unix socket, since tests have no tailnet.

Answers by the rules and in the JSON of Tailscale 1.103 (ipn/localapi, ipn/ipnstate):

    GET /localapi/v0/status[?peers=false]              200 {"BackendState": "Running", "Self": {…}, "Peer": {…}, …}
    GET /localapi/v0/whois?addr=IP[:PORT][&proto=tcp]  200 {"Node": {…}, "UserProfile": {…}, "CapMap": {…}}
        400 "missing 'addr' parameter", "invalid 'addr' parameter"; 404 "no match for IP:port"
    GET /localapi/v0/cert/NAME?type=pair               200 key and certificates in PEM; 403 "cert access denied"
        500 'invalid domain "X"; only "Y" is permitted', "your Tailscale account does not support getting TLS certs"
    any call with an Origin or a Referer, or a Host other than "local-tailscaled.sock" or none: 403

    with FakeTailscaled(socket_path, [
        Peer("100.64.0.1", "coordinator", tags=("tag:lydian-coordinator",)),  # the first one is this machine
        Peer("100.64.0.3", "laptop", login="alice@example.com"),  # its StableID is n1CNTRL
    ]) as daemon:
        daemon.peers = [...]  # a tailnet that changes
        daemon.states = ["Starting", "Running"]  # one a status call; the last one stays
        daemon.delays_s = [5.0, 0.0]  # a daemon that is slow at first; one a call, the last one stays
        daemon.pair = "-----BEGIN…"  # a tailnet with HTTPS certificates; daemon.permits_cert = False: not for us
        daemon.answers = {"/localapi/v0/status": (500, "oops")}  # a daemon that is strange
"""

import contextlib
import http.server
import ipaddress
import json
import socketserver
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

HOSTS = ("", "local-tailscaled.sock")  # any other could be a web page that was rebound to this socket
Answer = tuple[int, str | dict[str, Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Peer:
    """One machine of the tailnet."""

    ip: str
    name: str
    ip6: str = ""
    login: str = ""  # empty for a tagged node
    tags: tuple[str, ...] = ()
    caps: Mapping[str, list[Any]] = field(default_factory=dict)
    online: bool = True
    current_address: str = "198.18.0.9:41641"  # empty: not reached directly
    relay: str = "fra"
    peer_relay: str = ""  # address and port of a machine that passes packets on
    active: bool = True  # there were packets a short while ago
    proxied: tuple[int, ...] = ()  # ports of 127.0.0.1 that its connections come from (userspace networking)
    key_expiry: str = ""  # RFC 3339; empty: never

    @property
    def ips(self) -> list[str]:
        return [ip for ip in (self.ip, self.ip6) if ip]

    def _user(self, number: int) -> int:
        return 1 if self.tags else 100 + number

    def _optional(self) -> dict[str, Any]:
        tags = {"Tags": list(self.tags)} if self.tags else {}
        return tags | ({"KeyExpiry": self.key_expiry} if self.key_expiry else {})

    def node(self, number: int) -> dict[str, Any]:
        prefixes = [f"{ip}/{ipaddress.ip_address(ip).max_prefixlen}" for ip in self.ips]
        return {
            "ID": number, "StableID": f"n{number}CNTRL", "Name": f"{self.name}.tailnet.test.",
            "User": self._user(number), "Key": f"nodekey:{number:064x}", "Addresses": prefixes, "AllowedIPs": prefixes,
            "Hostinfo": {"Hostname": self.name, "OS": "linux"}, "ComputedName": self.name,
        } | self._optional()  # fmt: skip

    def profile(self, number: int) -> dict[str, Any]:
        if self.tags:
            return {"ID": 1, "LoginName": "tagged-devices", "DisplayName": "Tagged Devices"}
        return {"ID": self._user(number), "LoginName": self.login, "DisplayName": self.login.split("@")[0]}

    def status(self, number: int) -> dict[str, Any]:
        return {
            "ID": f"n{number}CNTRL", "PublicKey": f"nodekey:{number:064x}", "HostName": self.name, "OS": "linux",
            "DNSName": f"{self.name}.tailnet.test.", "UserID": self._user(number), "TailscaleIPs": self.ips,
            "CurAddr": self.current_address, "Relay": self.relay, "PeerRelay": self.peer_relay,
            "Online": self.online, "Active": self.active, "RxBytes": 0, "TxBytes": 0,
        } | self._optional()  # fmt: skip


class FakeTailscaled:
    """The daemon. A context manager: inside, it answers on the socket."""

    def __init__(self, path: Path, peers: Sequence[Peer]) -> None:
        self.path, self.peers = path, peers
        self.states = ["Running"]
        self.tun = True
        self.magic_dns = True
        self.delays_s = [0.0]
        self.pair = ""  # key and certificates; empty: the tailnet has none
        self.permits_cert = True
        self.answers: dict[str, Answer] = {}
        self.calls: list[str] = []
        self._leaving = threading.Event()

    def __enter__(self) -> Self:
        self.path.unlink(missing_ok=True)
        self._server = _Server(str(self.path), _Handler)
        self._server.daemon = self
        self.path.chmod(0o666)  # as tailscaled's: anyone may read, only root and the operator may write
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="fake tailscaled")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._leaving.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.path.unlink()

    def wait(self) -> None:
        """Be as slow as the test wants, but not slower than its end."""
        self._leaving.wait(_next(self.delays_s))

    def answer(self, url: str, headers: Mapping[str, str]) -> Answer:
        """Status and body for one call; a body that is text is sent as it is."""
        self.calls.append(url)
        if headers.get("Origin") or headers.get("Referer") or headers.get("Host", "") not in HOSTS:
            return 403, "invalid localapi request\n"
        parts = urllib.parse.urlsplit(url)
        query = dict(urllib.parse.parse_qsl(parts.query))
        if parts.path in self.answers:
            return self.answers[parts.path]
        if parts.path == "/localapi/v0/status":
            return 200, self._status(peers=query.get("peers") != "false")
        if parts.path == "/localapi/v0/whois":
            return self._whois(query.get("addr", ""))
        if parts.path.startswith("/localapi/v0/cert/"):
            return self._certificate(parts.path.rpartition("/")[2])
        return 404, "404 page not found\n"

    def _certificate(self, name: str) -> Answer:
        mine = f"{self.peers[0].name}.tailnet.test"
        if not self.permits_cert:
            return 403, "cert access denied\n"
        if not self.pair:
            return 500, "your Tailscale account does not support getting TLS certs\n"
        return (200, self.pair) if name == mine else (500, f'invalid domain "{name}"; only "{mine}" is permitted\n')

    def _status(self, *, peers: bool) -> dict[str, Any]:
        state = _next(self.states)
        me, others = self.peers[0], enumerate(self.peers[1:], start=1)
        ips = me.ips if state == "Running" else None
        return {
            "Version": "1.103.0-fake", "TUN": self.tun, "BackendState": state, "AuthURL": "", "TailscaleIPs": ips,
            "Self": me.status(0) | {"TailscaleIPs": ips}, "Health": [], "MagicDNSSuffix": "tailnet.test",
            "CurrentTailnet": {
                "Name": "example.com", "MagicDNSSuffix": "tailnet.test", "MagicDNSEnabled": self.magic_dns,
            },
            "CertDomains": [], "User": {},
            "Peer": {f"nodekey:{number:064x}": peer.status(number) for number, peer in others} if peers else None,
        }  # fmt: skip

    def _whois(self, address: str) -> Answer:
        if not address:
            return 400, "missing 'addr' parameter\n"
        found = _ip_and_port(address)
        if found is None:
            return 400, "invalid 'addr' parameter\n"
        ip, port = found
        for number, peer in enumerate(self.peers):
            if ip in peer.ips or (ip == "127.0.0.1" and port in peer.proxied):
                return 200, {"Node": peer.node(number), "UserProfile": peer.profile(number), "CapMap": dict(peer.caps)}
        return 404, "no match for IP:port\n"


def _next(values: list[T]) -> T:
    """The next of a list whose last value stays."""
    return values.pop(0) if len(values) > 1 else values[0]


def _ip_and_port(address: str) -> tuple[str, int] | None:
    """IP, IP:port or [v6]:port; IPv4 that is mapped into IPv6 counts as IPv4."""
    host, port = address, "0"
    with contextlib.suppress(ValueError):
        return _plain(host), 0
    host, _, port = address.rpartition(":")
    try:
        return _plain(host.strip("[]")), int(port)
    except ValueError:
        return None


def _plain(host: str) -> str:
    ip = ipaddress.ip_address(host)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped or ip)


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = False  # server_close waits for the last answer: no test leaves a thread or a socket behind
    block_on_close = True
    daemon: FakeTailscaled


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        daemon = self.server.daemon
        status, body = daemon.answer(self.path, dict(self.headers.items()))
        daemon.wait()
        text = body if isinstance(body, str) else json.dumps(body, indent="\t")
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8" if text is body else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who asked has given up waiting
            self.wfile.write(data)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        """Say nothing: tests read the calls from the daemon."""
