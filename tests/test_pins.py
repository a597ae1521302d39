"""What stands behind the @ of a token: one grammar, nothing of it lost, nothing damaged taken for less."""

import contextlib
import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import pins
from common.errors import LydianError
from common.pins import Pins, certificate_pin, parse, pin_of, split
from server.tokens import _TOKEN

TOKEN = "lyd_join_0123456789ab_" + "x" * 43
NODES = st.from_regex(r"[A-Za-z0-9]+", fullmatch=True).filter(lambda node: node != "sha256")
CERTIFICATES = st.from_regex(pins.CERTIFICATE, fullmatch=True)
ALL = st.builds(Pins, st.none() | NODES, st.none() | CERTIFICATES)


@given(ALL)
def test_what_stands_behind_a_token_is_read_as_it_was_written(known: Pins) -> None:
    assert split(f" {known.behind(TOKEN)}\n") == (TOKEN, known)
    assert bool(known) == (known != Pins())
    if known:
        assert parse(str(known)) == known


@given(ALL)
def test_a_coordinator_takes_every_token_that_it_can_have_written(known: Pins) -> None:
    found = _TOKEN.fullmatch(known.behind(TOKEN))
    assert found is not None
    assert found[3] == "x" * 43


@given(ALL.filter(bool), st.integers(1, 60))
def test_a_token_that_was_cut_off_is_refused_or_says_less_of_nothing_but_a_machine(known: Pins, cut: int) -> None:
    found = Pins()
    with contextlib.suppress(LydianError):
        _, found = split(known.behind(TOKEN)[:-cut])
    assert found.certificate is None  # never another certificate than the whole token named


@pytest.mark.parametrize(
    "text",
    ["", "@", "n1@", "n1@n2", "sha256.short", "sha256", "sha256.", f"sha256.{'a' * 43}@n1", f"sha256.{'a' * 44}"],
)
def test_damaged_pins_are_never_taken_for_none(text: str) -> None:
    with pytest.raises(LydianError) as refused:
        split(f"{TOKEN}@{text}")
    assert refused.value.code == "bad_pin"


def test_no_token_names_nothing() -> None:
    assert split(None) == (None, Pins())
    assert split(TOKEN) == (TOKEN, Pins())


def test_what_is_said_now_goes_before_what_was_kept_one_by_one() -> None:
    assert Pins("n1").over(Pins("n2", "sha256.kept")) == Pins("n1", "sha256.kept")
    assert Pins().over(Pins("n2")) == Pins("n2")


@given(st.binary(max_size=99))
def test_a_pin_is_taken_in_our_notation_and_in_openssls(certificate: bytes) -> None:
    pin, hexed = pin_of(certificate), hashlib.sha256(certificate).hexdigest()
    assert re.fullmatch(pins.CERTIFICATE, pin)
    colons = ":".join(hexed[at : at + 2] for at in range(0, 64, 2)).upper()
    for text in (pin, f" @{pin}\n", hexed, colons, f"sha256 Fingerprint={colons}", f"SHA256:{hexed}"):
        assert certificate_pin(text) == pin


@pytest.mark.parametrize("text", ["", "sha256.abc", "ab" * 31, "sha1 Fingerprint=" + "AB:" * 19 + "AB", "zz" * 32])
def test_what_is_no_pin_is_refused(text: str) -> None:
    with pytest.raises(LydianError) as refused:
        certificate_pin(text)
    assert refused.value.code == "bad_pin"
