"""Where plain words are read by nobody else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.networks import is_address, is_loopback, is_sheltered, is_tailnet


@pytest.mark.parametrize(
    ("host", "loopback", "tailnet"),
    [
        ("127.0.0.1", True, False),
        ("127.9.9.9", True, False),
        ("::1", True, False),
        ("[::1]", True, False),
        ("::ffff:127.0.0.1", True, False),
        ("100.64.0.1", False, True),
        ("100.127.255.255", False, True),
        ("fd7a:115c:a1e0::1", False, True),
        ("::ffff:100.100.0.1", False, True),
        ("fd7a:115c:a1e0::1%tailscale0", False, True),
        ("100.63.255.255", False, False),
        ("100.128.0.0", False, False),
        ("fd7a:115c:a1e1::1", False, False),
        ("192.168.1.10", False, False),
        ("10.0.0.1", False, False),
        ("172.17.0.2", False, False),
        ("169.254.1.1", False, False),
        ("fe80::1%eth0", False, False),
        ("0.0.0.0", False, False),
        ("::", False, False),
        ("::ffff:192.168.1.10", False, False),
        ("8.8.8.8", False, False),
        ("2001:db8::1", False, False),
    ],
)
def test_only_loopback_and_tailnets_are_sheltered(host: str, loopback: bool, tailnet: bool) -> None:
    assert (is_loopback(host), is_tailnet(host)) == (loopback, tailnet)
    assert is_sheltered(host) == (loopback or tailnet)
    assert is_address(host)


@given(st.text())
def test_a_name_is_never_sheltered_by_its_looks(host: str) -> None:
    if not is_address(host):
        assert not is_sheltered(host)


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1.evil.example", "100.64.0.1.nip.io", "", "2130706433", "127.1"]
)
def test_what_only_looks_like_an_address_is_a_name(host: str) -> None:
    assert not is_address(host)
    assert not is_sheltered(host)
