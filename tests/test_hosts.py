"""Whose name a call may come by: exactly ours, in whatever spelling, and never one that only looks like it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.hosts import Authority, host_of, names_of, parse_authority, refusal, shown, with_short

NAMES = names_of(["coordinator.tailnet.test", "coordinator", "100.64.0.1", "gpu_box"])
LISTENING = "192.0.2.7"


def code(*hosts: str, origins: tuple[str, ...] = (), scheme: str = "http", listening: str = LISTENING) -> str:
    found = refusal(hosts, origins, scheme=scheme, listening=listening, names=NAMES)
    return "" if found is None else found.code


OURS = [
    "localhost", "LOCALHOST:8470", "localhost.", "127.0.0.1", "127.0.0.1:1", "127.8.9.10:65535", "[::1]", "[::1]:8470",
    "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]:8470", "coordinator.tailnet.test", "Coordinator.Tailnet.TEST.:8470",
    "coordinator", "100.64.0.1:8470", "[::ffff:100.64.0.1]", "192.0.2.7", "192.0.2.7:9000", "gpu_box",
]  # fmt: skip
FOREIGN = [
    "evil.example", "evil.example:8470", "coordinator.tailnet.test.evil.example", "evilcoordinator.tailnet.test",
    "tailnet.test", "coordinator.", "x.localhost", "localhost.evil.example", "127.0.0.1.nip.io", "127-0-0-1.example",
    "192.0.2.8", "0.0.0.0", "0.0.0.0:8470", "[::]", "[fe80::1]", "169.254.169.254", "0x7f.1", "xn--80ak6aa92e.com",
    "gpu-box", "coordinator-tailnet-test", "[::ffff:192.0.2.8]:8470", "localhost-evil",
]  # fmt: skip
FOREIGN.remove("coordinator.")  # a dot at the end is the same name
UNCLEAR = [
    "", " ", ":", ":8470", "localhost:", "localhost:port", "localhost:65536", "localhost:0x1f90", "localhost:\xb2",
    "localhost 127.0.0.1", " localhost", "localhost ", "localhost\0", "localhost\0.evil.example", "localhost/x",
    "user@localhost", "localhost@evil.example", "localhost,evil.example", "::1", "[::1", "::1]", "[localhost]",
    "[127.0.0.1]", "[::1]x", "[::1]:", "127.0.0.256", "127.1", "2130706433", "127.0.0.01", "a..b", ".", "-" * 300,
    "loc\xe4lhost", "\u212aoordinator", "coordinat\u043er", "http://localhost", "localhost#", "localhost?", "*",
    "localhost\r\nHost: evil.example", "%6c%6f", "<img src=x>",
]  # fmt: skip


@pytest.mark.parametrize("host", OURS)
def test_a_call_by_one_of_our_names_is_taken_in_whatever_spelling(host: str) -> None:
    assert code(host) == ""


@pytest.mark.parametrize("host", FOREIGN)
def test_a_call_by_any_other_name_is_refused_and_told_how_to_allow_it(host: str) -> None:
    found = refusal([host], [], scheme="http", listening=LISTENING, names=NAMES)
    assert found is not None
    assert (found.status, found.code) == (403, "host_not_allowed")
    assert repr(host) in str(found)
    assert "--allow-host" in str(found)
    assert "--allow-host" in found.advice


@pytest.mark.parametrize("host", UNCLEAR)
def test_a_host_that_is_none_is_refused_as_a_broken_call(host: str) -> None:
    found = refusal([host], [], scheme="http", listening=LISTENING, names=NAMES)
    assert found is not None
    assert (found.status, found.code) == (400, "unclear_host")
    assert str(found).isascii()
    assert str(found).isprintable()
    assert len(str(found)) < 500


def test_no_host_and_two_hosts_are_refused_even_if_each_is_ours() -> None:
    assert code() == "unclear_host"
    assert code("localhost", "localhost") == "unclear_host"
    assert code("localhost", "evil.example") == "unclear_host"


def test_the_address_of_the_socket_is_ours_and_no_address_of_every_interface_is() -> None:
    assert code("198.51.100.4", listening="198.51.100.4") == ""
    assert code("[2001:DB8::4]:8470", listening="2001:db8::4") == ""
    assert code("[fe80::4]", listening="fe80::4%eth0") == ""
    assert code("198.51.100.4", listening="/run/lydian.sock") == "host_not_allowed"
    assert code("198.51.100.4", listening="") == "host_not_allowed"
    assert names_of(["0.0.0.0", "::", "", "a b", "[::1]", "Gpu"]) == {"::1", "gpu"}


SAME = [
    ("localhost:8470", "http", "http://localhost:8470"), ("LOCALHOST:8470", "http", "http://localhost.:8470"),
    ("localhost", "http", "http://localhost:80"), ("localhost:443", "https", "https://localhost"),
    ("[::1]:8470", "http", "http://[0::1]:8470"), ("coordinator:8470", "http", "http://coordinator:8470"),
]  # fmt: skip
ELSEWHERE = [
    "null", "", "http://evil.example", "http://localhost", "https://localhost:8470", "http://localhost:8471",
    "http://127.0.0.1:8470", "http://coordinator:8470", "localhost:8470", "http://localhost:8470/", "ws://localhost:8470",
    "http://localhost:8470@evil.example", "http://localhost:8470.evil.example", "file://", "HTTP://localhost:8470",
    "http://localhost:8470 http://localhost:8470", "http://localhost:8470\0", "chrome-extension://localhost:8470",
]  # fmt: skip


@pytest.mark.parametrize(("host", "scheme", "origin"), SAME)
def test_a_page_of_this_very_place_may_call(host: str, scheme: str, origin: str) -> None:
    assert code(host, origins=(origin,), scheme=scheme) == ""


@pytest.mark.parametrize("origin", ELSEWHERE)
def test_a_page_of_another_place_may_not_call_one_of_ours_at_another_port_either(origin: str) -> None:
    assert code("localhost:8470", origins=(origin,)) == "origin_not_allowed"


def test_two_origins_are_refused_even_if_each_is_ours_and_the_host_is_looked_at_first() -> None:
    assert code("localhost:8470", origins=("http://localhost:8470",) * 2) == "origin_not_allowed"
    assert code("evil.example", origins=("http://evil.example",)) == "host_not_allowed"


def test_a_machine_is_known_by_its_whole_name_and_the_first_label_and_an_address_has_no_labels() -> None:
    assert list(with_short("gpu.tailnet.test")) == ["gpu.tailnet.test", "gpu"]
    assert list(with_short("gpu")) == ["gpu", "gpu"]
    assert list(with_short("192.0.2.1")) == ["192.0.2.1"]
    assert list(with_short(None)) == list(with_short("")) == []


label = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
domain = st.lists(label, min_size=1, max_size=4).map(".".join)


@given(domain, st.none() | st.integers(0, 65_535), st.booleans())
def test_a_name_is_read_the_same_in_any_case_with_any_port_and_a_dot_at_its_end(
    name: str, port: int | None, dot: bool
) -> None:
    spelt = f"{name.upper()}{'.' if dot else ''}{'' if port is None else f':{port}'}"
    host = host_of(name)
    assert parse_authority(spelt) == (None if host is None else Authority(host, port))


@given(domain, domain)
def test_no_name_is_ours_because_ours_is_a_part_of_it(before: str, after: str) -> None:
    for name in (f"{before}.coordinator.tailnet.test", f"coordinator.tailnet.test.{after}", f"{before}coordinator"):
        assert code(name) in ("host_not_allowed", "unclear_host")


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6))
def test_an_address_is_ours_only_where_it_is_loopback_or_listened_on(address: object) -> None:
    text = f"[{address}]:1" if ":" in str(address) else f"{address}:1"
    assert code(text, listening=str(address)) == ""
    mapped = getattr(address, "ipv4_mapped", None) or address
    ours = mapped.is_loopback or str(mapped) in NAMES  # type: ignore[attr-defined]
    assert code(text, listening="") == ("" if ours else "host_not_allowed")


@given(st.text(max_size=100) | st.binary(max_size=100).map(lambda sent: sent.decode("latin-1")))
def test_any_host_and_origin_is_answered_in_words_that_any_terminal_can_show(text: str) -> None:
    for found in (
        refusal([text], [], scheme="http", listening=LISTENING, names=NAMES),
        refusal(["localhost"], [text], scheme="http", listening=LISTENING, names=NAMES),
    ):
        assert found is None or (str(found).isascii() and str(found).isprintable() and found.status in (400, 403))
    assert shown(text).isascii()
