"""Where the coordinator listens: never everywhere by accident, and never silently on loopback alone."""

import asyncio
import contextlib
import errno
import json
import logging
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import tailscale
from common.errors import LydianError
from common.tailscale import SOCKET, TailscaleStatus, expiry_warning, parse_status, tailscale_status
from server import binding
from server.binding import Binding, choose, exposed, open_sockets
from tests.fake_tailscaled import FakeTailscaled, Peer

ME = Peer("100.64.0.1", "coordinator", ip6="fd7a:115c:a1e0::1", tags=("tag:lydian-coordinator",))
RUNNING = TailscaleStatus(
    "Running", addresses=("100.64.0.1", "fd7a:115c:a1e0::1"), name="coordinator.tailnet.test", stable_id="n0CNTRL"
)
NOW = datetime(2026, 8, 1, tzinfo=UTC)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTailscaled]:
    monkeypatch.setattr(tailscale, "TIMEOUT_S", 30.0)  # only where a test says so is the daemon slow
    with FakeTailscaled(tmp_path / "tailscaled.sock", [ME, Peer("100.64.0.2", "gpu-1")]) as daemon:
        yield daemon


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.1 that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def bound_at(hosts: list[str], port: int) -> list[tuple[str, int]]:
    """Address and port of each socket that `open_sockets` gives; all are closed again."""
    sockets = open_sockets(hosts, port)
    places = [sock.getsockname()[:2] for sock in sockets]
    for sock in sockets:
        sock.close()
    return places


# ---------------------------------------------------------------- asking tailscaled


def test_a_running_daemon_tells_addresses_and_name(daemon: FakeTailscaled) -> None:
    assert tailscale_status(daemon.path) == (RUNNING, "")
    assert daemon.calls == ["/localapi/v0/status?peers=false"]


@pytest.mark.parametrize("state", ["NeedsLogin", "NeedsMachineAuth", "Stopped"])
def test_a_daemon_that_is_not_on_the_tailnet_is_believed_at_once(daemon: FakeTailscaled, state: str) -> None:
    daemon.states = [state, "Running"]
    status, _ = tailscale_status(daemon.path)

    assert status is not None
    assert (status.state, status.addresses) == (state, ())
    assert len(daemon.calls) == 1


def test_a_starting_daemon_is_asked_again_until_it_runs_and_the_wait_is_said_once_a_state(
    daemon: FakeTailscaled, caplog: pytest.LogCaptureFixture
) -> None:
    daemon.states = ["NoState", "Starting", "Starting", "Running"]
    with caplog.at_level(logging.INFO, "lydian.tailscale"):
        answer = tailscale_status(daemon.path, poll_s=0.01)

    assert answer == (RUNNING, "")
    assert [record.getMessage() for record in caplog.records if record.name == "lydian.tailscale"] == [
        "tailscaled is in state NoState; waiting up to 60 s for the tailnet's address",
        "tailscaled is in state Starting; waiting up to 60 s for the tailnet's address",
    ]


def test_patience_ends_with_the_state_as_it_is(daemon: FakeTailscaled) -> None:
    daemon.states = ["Starting"]
    status, _ = tailscale_status(daemon.path, patience_s=0.1, poll_s=0.01)

    assert status is not None
    assert status.state == "Starting"


def test_a_daemon_that_is_too_slow_at_first_is_asked_again(
    daemon: FakeTailscaled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tailscale, "TIMEOUT_S", 0.5)
    daemon.delays_s = [60.0, 0.0]

    assert tailscale_status(daemon.path, poll_s=0.01) == (RUNNING, "")
    assert len(daemon.calls) >= 2


def test_a_daemon_that_stays_too_slow_counts_as_absent(daemon: FakeTailscaled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tailscale, "TIMEOUT_S", 0.05)
    daemon.delays_s = [60.0]
    status, why = tailscale_status(daemon.path, patience_s=0.0)

    assert status is None
    assert f"did not answer on {daemon.path} within 0.05 s" in why


def test_no_socket_is_no_status_with_a_reason_and_no_wait(tmp_path: Path) -> None:
    status, why = tailscale_status(tmp_path / "tailscaled.sock")

    assert status is None
    assert str(tmp_path / "tailscaled.sock") in why
    assert "No such file" in why


def test_a_socket_that_a_dead_daemon_left_behind_is_no_status(tmp_path: Path) -> None:
    path = tmp_path / "tailscaled.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    status, why = tailscale_status(path)

    assert status is None
    assert "refused" in why


def test_a_path_that_no_socket_can_have_is_no_status(tmp_path: Path) -> None:
    status, why = tailscale_status(tmp_path / ("x" * 200))

    assert status is None
    assert "too long" in why


def test_a_daemon_that_breaks_off_is_no_status(tmp_path: Path) -> None:
    def accept_and_hang_up(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                listener.accept()[0].close()

    path = tmp_path / "tailscaled.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=accept_and_hang_up, args=(listener,))
        thread.start()
        status, why = tailscale_status(path)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()

    assert status is None
    assert "broke off" in why


@pytest.mark.parametrize(
    "answer", [(500, "oops"), (403, "no"), (200, "not JSON"), (200, "[1]"), (200, '"Running"'), (200, {"TUN": True})]
)
def test_an_answer_that_is_no_status_is_quoted(daemon: FakeTailscaled, answer: tuple[int, Any]) -> None:
    daemon.answers["/localapi/v0/status"] = answer
    status, why = tailscale_status(daemon.path)

    assert status is None
    assert f"HTTP {answer[0]}" in why
    assert (answer[1] if isinstance(answer[1], str) else "TUN") in why


def test_a_proxy_for_the_web_is_not_asked_about_the_socket(
    daemon: FakeTailscaled, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert tailscale_status(daemon.path) == (RUNNING, "")


def test_the_socket_is_where_tailscaled_puts_it() -> None:
    assert str(SOCKET) == "/var/run/tailscale/tailscaled.sock"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
STATUS = st.fixed_dictionaries(
    {"BackendState": JSON | st.just("Running")},
    optional={
        "TUN": JSON,
        "TailscaleIPs": JSON | st.lists(JSON | st.ip_addresses().map(str)),
        "Self": JSON
        | st.fixed_dictionaries(
            {},
            optional={
                "DNSName": JSON,
                "TailscaleIPs": JSON,
                "KeyExpiry": JSON | st.datetimes(timezones=st.timezones() | st.none()).map(datetime.isoformat),
            },
        ),
        "CurrentTailnet": JSON | st.just({"MagicDNSEnabled": True}),
    },
)


@given(body=JSON | STATUS)
def test_no_json_makes_the_parser_fail_and_what_it_gives_can_be_used(body: Any) -> None:
    status = parse_status(body)
    if status is None:
        return
    assert status.state == body["BackendState"]
    assert status.name != ""
    expiry_warning(status, now=NOW)
    with contextlib.suppress(LydianError):
        assert choose(None, status, "").hosts[-1] == "127.0.0.1"


def test_only_a_name_that_the_tailnet_resolves_is_a_name(daemon: FakeTailscaled) -> None:
    daemon.magic_dns = False
    status, _ = tailscale_status(daemon.path)

    assert status is not None
    assert status.name is None


def test_addresses_may_stand_in_self_alone_and_what_is_no_address_is_left_out() -> None:
    body = {"BackendState": "Running", "TailscaleIPs": None, "Self": {"TailscaleIPs": ["100.64.0.9", 7, "x", None]}}

    assert parse_status(body) == TailscaleStatus("Running", addresses=("100.64.0.9",))


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2027-01-02T03:04:05Z", datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2027-01-02T03:04:05.123456789+01:00", datetime(2027, 1, 2, 2, 4, 5, 123456, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", None),
        ("soon", None),
        (None, None),
    ],
)
def test_key_expiry_is_read_as_go_writes_it(text: str | None, moment: datetime | None) -> None:
    status = parse_status({"BackendState": "Running", "Self": {"KeyExpiry": text}})

    assert status is not None
    assert status.key_expiry == moment


@pytest.mark.parametrize(
    ("days", "said"), [(None, None), (14.5, None), (13.5, "expires in 13.5 days"), (-2.0, "expired 2.0 days ago")]
)
def test_a_key_that_expires_within_two_weeks_is_warned_of(days: float | None, said: str | None) -> None:
    expiry = None if days is None else NOW + timedelta(days=days)
    warning = expiry_warning(TailscaleStatus("Running", key_expiry=expiry), now=NOW)

    assert (said is None and warning is None) or (said is not None and said in (warning or ""))


# ---------------------------------------------------------------- the choice


def test_on_a_tailnet_the_coordinator_listens_there_and_on_loopback_and_is_called_by_its_name() -> None:
    chosen = choose(None, RUNNING, "")

    assert chosen.hosts == ("100.64.0.1", "fd7a:115c:a1e0::1", "127.0.0.1")
    assert chosen.url(8470) == "http://coordinator.tailnet.test:8470"


def test_a_tailnet_without_names_is_called_by_address() -> None:
    assert choose(None, TailscaleStatus("Running", addresses=("100.64.0.1",)), "").url(1) == "http://100.64.0.1:1"
    assert choose(None, TailscaleStatus("Running", addresses=("fd7a::1",)), "").url(1) == "http://[fd7a::1]:1"


def test_userspace_networking_listens_on_loopback_alone_and_is_called_by_its_tailnet_name(
    daemon: FakeTailscaled,
) -> None:
    daemon.tun = False
    status, why = tailscale_status(daemon.path)
    chosen = choose(None, status, why)

    assert chosen.hosts == ("127.0.0.1",)
    assert chosen.urls_host == "coordinator.tailnet.test"
    assert "userspace" in chosen.reason


def test_without_tailscale_it_is_loopback_and_the_reason_says_why_and_what_to_do(tmp_path: Path) -> None:
    status, why = tailscale_status(tmp_path / "absent.sock")
    chosen = choose(None, status, why)

    assert (chosen.hosts, chosen.urls_host) == (("127.0.0.1",), "127.0.0.1")
    assert why in chosen.reason
    assert "--host" in chosen.reason


@pytest.mark.parametrize(
    ("state", "said", "advice"),
    [
        ("NeedsLogin", "logged out", "tailscale up"),
        ("NeedsMachineAuth", "approved", "admin"),
        ("Stopped", "stopped", "tailscale up"),
        ("Starting", "Starting", "tailscale status"),
        ("NoState", "NoState", "tailscale status"),
        ("Dreaming", "Dreaming", "tailscale status"),
    ],
)
def test_a_tailnet_that_is_down_is_an_error_and_not_a_silent_loopback(
    daemon: FakeTailscaled, state: str, said: str, advice: str
) -> None:
    daemon.states = [state]
    status, why = tailscale_status(daemon.path, patience_s=0.0)
    with pytest.raises(LydianError, match=said) as refusal:
        choose(None, status, why)

    assert refusal.value.code == "tailnet_down"
    assert advice in refusal.value.advice
    assert "--host 127.0.0.1" in refusal.value.advice


def test_a_running_tailscale_without_an_address_is_an_error() -> None:
    with pytest.raises(LydianError, match="no address"):
        choose(None, TailscaleStatus("Running"), "")


@pytest.mark.parametrize(
    ("host", "urls_host"),
    [
        ("192.168.1.5", "192.168.1.5"),
        ("localhost", "localhost"),
        ("::1", "[::1]"),
        ("[::1]", "[::1]"),
        ("127.1", "127.1"),
        ("gpu-box.lan", "gpu-box.lan"),
    ],
)
def test_a_given_host_is_taken_whatever_tailscale_says(host: str, urls_host: str) -> None:
    for status in (None, RUNNING, TailscaleStatus("Stopped")):
        chosen = choose(host, status, "not asked")
        assert chosen == Binding((host.strip("[]"),), urls_host, chosen.reason)
        assert "--host" in chosen.reason


EVERYWHERE = ["0.0.0.0", "::", "[::]", "0:0::0", "::ffff:0.0.0.0", "0", "0.0", "0x0", "00.0.0.0", "*", "", " 0.0.0.0 "]


@pytest.mark.parametrize("host", EVERYWHERE)
def test_every_interface_is_called_by_the_name_of_the_machine(host: str) -> None:
    chosen = choose(host, None, "", machine="gpu-box")
    assert chosen.url(8470) == "http://gpu-box:8470"
    assert "every interface" in chosen.reason
    assert chosen.encrypted(None).url(8470) == "https://gpu-box:8470"


def test_a_certificate_that_is_trusted_by_name_is_called_by_it_alone() -> None:
    chosen = choose(None, RUNNING, "").encrypted("coordinator.example.com")
    assert chosen.url(8470) == "https://coordinator.example.com:8470"
    assert chosen.address_url(8470) == ""
    pinned = choose(None, RUNNING, "").encrypted(None)
    assert pinned.address_url(8470) == "https://100.64.0.1:8470"


OTHERS = ["0.0.0.0", "::", "192.168.1.10", "10.0.0.1", "172.17.0.1", "203.0.113.5", "2001:db8::1"]
SHELTERED = ["127.0.0.1", "::1", "100.64.0.1", "fd7a:115c:a1e0::1"]


@given(st.lists(st.sampled_from(OTHERS + SHELTERED)), st.booleans(), st.booleans())
def test_plain_words_are_said_where_others_listen_only_if_that_was_allowed(
    addresses: list[str], encrypted: bool, insecure: bool
) -> None:
    others = tuple(address for address in addresses if address in OTHERS)
    if others and not encrypted and not insecure:
        with pytest.raises(LydianError) as refusal:
            exposed(addresses, encrypted=encrypted, insecure=insecure)
        assert refusal.value.code == "insecure_host"
        assert others[0] in str(refusal.value)
        assert all(way in refusal.value.advice for way in ("--tls", "--insecure"))
    else:
        assert exposed(addresses, encrypted=encrypted, insecure=insecure) == (() if encrypted else others)


def test_every_interface_without_a_name_for_the_machine_says_what_to_put_in_the_url() -> None:
    chosen = choose("0.0.0.0", None, "")

    assert chosen.urls_host == "127.0.0.1"
    assert "in place of 127.0.0.1" in chosen.reason


@given(
    state=st.sampled_from(["Running", "Starting", "NeedsLogin", "Stopped"]),
    tun=st.booleans(),
    addresses=st.lists(st.ip_addresses().filter(lambda ip: not ip.is_unspecified).map(str), max_size=3),
    asked=st.booleans(),
)
def test_without_a_host_it_never_listens_beyond_tailnet_and_loopback(
    state: str, tun: bool, addresses: list[str], asked: bool
) -> None:
    status = TailscaleStatus(state, tun, tuple(addresses)) if asked else None
    try:
        chosen = choose(None, status, "not asked")
    except LydianError:
        return
    assert set(chosen.hosts) <= {*addresses, "127.0.0.1"}
    assert chosen.reason


# ---------------------------------------------------------------- the sockets


def test_all_addresses_share_the_port_that_the_first_one_picked() -> None:
    places = bound_at(["127.0.0.1", "127.0.0.2", "::1"], 0)
    port = places[0][1]

    assert port > 0
    assert places == [("127.0.0.1", port), ("127.0.0.2", port), ("::1", port)]


def test_the_same_address_is_bound_once_however_often_it_is_named() -> None:
    assert [address for address, _ in bound_at(["127.0.0.1", "localhost", "127.0.0.1"], 0)] in (
        ["127.0.0.1"],
        ["127.0.0.1", "::1"],
    )


def test_bound_sockets_do_not_listen_until_the_server_says_so() -> None:
    (sock,) = open_sockets(["127.0.0.1"], 0)
    with sock:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(sock.getsockname(), timeout=1).close()
        sock.listen()
        socket.create_connection(sock.getsockname(), timeout=1).close()


def test_a_taken_port_is_an_error_that_names_it_and_leaves_no_socket_open(taken: int) -> None:
    with pytest.raises(LydianError, match=rf"port {taken} on 127\.0\.0\.1 is taken") as refusal:
        open_sockets(["127.0.0.2", "127.0.0.1"], taken)
    assert refusal.value.code == "port_taken"

    assert bound_at(["127.0.0.2"], taken) == [("127.0.0.2", taken)]


def test_a_restart_gets_its_port_back_while_old_connections_linger() -> None:
    with socket.create_server(("127.0.0.1", 0)) as old:
        port = old.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server_side, _ = old.accept()
            server_side.close()  # the side that closes first lingers in TIME_WAIT
            assert client.recv(1) == b""
    assert bound_at(["127.0.0.1"], port) == [("127.0.0.1", port)]


def test_a_free_port_is_sought_again_when_another_address_has_it_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    with socket.socket() as listener:

        def first_pick_is_taken(place: Any, port: int, bind: Any = binding._bind) -> socket.socket:
            sock = bind(place, port)
            if place.address == "127.0.0.1":
                tried.append(sock.getsockname()[1])
                if len(tried) == 1:
                    listener.bind(("127.0.0.2", tried[0]))
                    listener.listen()
            return sock

        monkeypatch.setattr(binding, "_bind", first_pick_is_taken)
        places = bound_at(["127.0.0.1", "127.0.0.2"], 0)

    assert len(tried) == 2
    assert places == [("127.0.0.1", tried[1]), ("127.0.0.2", tried[1])]


def test_a_search_for_a_free_port_ends() -> None:
    with pytest.raises(LydianError, match=r"203\.0\.113\.7") as refusal:
        open_sockets(["127.0.0.1", "203.0.113.7"], 0)
    assert refusal.value.code == "address_not_here"


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(LydianError, match=r"203\.0\.113\.7 is no address of this machine") as refusal:
        open_sockets(["203.0.113.7"], 0)
    assert refusal.value.code == "address_not_here"
    assert "Tailscale" in refusal.value.advice


def test_an_ipv6_address_that_the_machine_lacks_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert [address for address, _ in bound_at(["fd7a:115c:a1e0::1", "127.0.0.1"], 0)] == ["127.0.0.1"]
    assert "fd7a:115c:a1e0::1 is no address of this machine" in caplog.text


def test_an_ipv6_address_that_is_all_there_was_to_bind_is_an_error() -> None:
    with pytest.raises(LydianError, match="2001:db8::7 is no address of this machine"):
        open_sockets(["2001:db8::7"], 0)


def test_a_name_that_nobody_knows_is_refused() -> None:
    for name in ("no-such-host.invalid", "a..b", "x" * 300):
        with pytest.raises(LydianError, match="no address or name of this machine") as refusal:
            open_sockets([name], 0)
        assert refusal.value.code == "bad_host"


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EACCES, "port_forbidden"),
        (errno.EPERM, "port_forbidden"),
        (errno.EADDRINUSE, "port_taken"),
        (errno.EAFNOSUPPORT, "address_not_here"),
        (errno.EMFILE, "cannot_listen"),
    ],
)
def test_each_refusal_of_the_system_has_its_own_code(number: int, code: str) -> None:
    error = binding._cannot_bind("127.0.0.1", 80, OSError(number, "why"))

    assert error.code == code
    assert "127.0.0.1" in str(error)
    assert error.advice


def test_a_family_of_addresses_that_the_system_has_not_is_no_address_here() -> None:
    with pytest.raises(LydianError, match="no address of this machine") as refusal:
        binding._bind(binding._Address(9999, "::1", (), optional=False), 0)
    assert refusal.value.code == "address_not_here"


def test_the_sockets_serve_http_on_every_address() -> None:
    """What uvicorn does with them: `loop.create_server(sock=…)`."""

    async def talk() -> list[bytes]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(json.dumps("here").encode())
            writer.close()

        sockets = open_sockets(["127.0.0.1", "::1"], 0)
        servers = [await asyncio.start_server(answer, sock=sock) for sock in sockets]
        heard = []
        for sock in sockets:
            reader, writer = await asyncio.open_connection(*sock.getsockname()[:2])
            heard.append(await reader.read())
            writer.close()
            await writer.wait_closed()
        for server in servers:
            server.close()
            await server.wait_closed()
        return heard

    assert asyncio.run(talk()) == [b'"here"', b'"here"']


# ---------------------------------------------------------------- the stand-in itself


def test_the_stand_in_refuses_what_tailscaled_refuses(daemon: FakeTailscaled) -> None:
    status = "/localapi/v0/status"
    assert daemon.answer(status, {"Origin": "http://evil.example"})[0] == 403
    assert daemon.answer(status, {"Host": "evil.example"})[0] == 403
    assert daemon.answer(status, {"Host": "local-tailscaled.sock"})[0] == 200
    assert daemon.answer("/localapi/v0/prefs", {})[0] == 404


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("addr=100.64.0.2:53122&proto=tcp", 200),
        ("addr=100.64.0.2", 200),
        ("addr=[::ffff:100.64.0.2]:53122", 200),
        ("addr=fd7a:115c:a1e0::1", 200),
        ("addr=127.0.0.1:1", 404),
        ("addr=nowhere", 400),
        ("", 400),
    ],
)
def test_the_stand_in_knows_who_calls(daemon: FakeTailscaled, query: str, status: int) -> None:
    assert daemon.answer(f"/localapi/v0/whois?{query}", {})[0] == status
