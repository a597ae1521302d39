"""Whether a worker finds the machine that its join token names: asked of a stand-in for tailscaled."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import LydianError
from tests.fake_tailscaled import FakeTailscaled, Peer
from worker import pin
from worker.__main__ import _agent
from worker.identity import Identity
from worker.options import Options

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "lyd_join_0123456789ab_" + "x" * 43
HERE = Peer("100.64.0.2", "gpu", tags=("tag:lydian-worker",))
COORDINATOR = Peer("100.64.0.1", "coordinator", ip6="fd7a:115c:a1e0::1", tags=("tag:lydian-coordinator",))  # n1CNTRL
IMPOSTOR = Peer("100.64.0.3", "laptop", login="mallory@example.com")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeTailscaled]:
    with FakeTailscaled(tmp_path / "tailscaled.sock", [HERE, COORDINATOR, IMPOSTOR]) as running:
        yield running


@given(st.from_regex(r"[A-Za-z0-9]+", fullmatch=True))
def test_a_token_is_split_into_what_is_told_and_what_must_be_found(stable_id: str) -> None:
    assert pin.split(f"{TOKEN}@{stable_id}") == (TOKEN, stable_id)
    assert pin.split(f" {TOKEN}\n") == (TOKEN, None)


def test_no_token_names_nothing() -> None:
    assert pin.split(None) == (None, None)
    assert pin.split(f"{TOKEN}@") == (TOKEN, None)


@pytest.mark.parametrize("host", ["100.64.0.1", "[fd7a:115c:a1e0::1]"])
def test_the_machine_that_the_token_names_is_found(daemon: FakeTailscaled, host: str) -> None:
    said = pin.check(f"http://{host}:8470", "n1CNTRL", daemon.path)
    assert "coordinator.tailnet.test (n1CNTRL)" in said


def test_another_machine_at_the_address_is_refused_by_name(daemon: FakeTailscaled) -> None:
    with pytest.raises(LydianError) as refused:
        pin.check("http://100.64.0.3:8470", "n1CNTRL", daemon.path)
    assert refused.value.code == "wrong_coordinator"
    assert "100.64.0.3) is laptop.tailnet.test (n2CNTRL)" in str(refused.value)
    assert "n1CNTRL" in str(refused.value)
    assert "cut @n1CNTRL off" in refused.value.advice


def test_an_address_outside_the_tailnet_is_refused(daemon: FakeTailscaled) -> None:
    with pytest.raises(LydianError, match=r"192\.168\.1\.7\) is no machine of the tailnet"):
        pin.check("http://192.168.1.7:8470", "n1CNTRL", daemon.path)


def test_a_name_with_one_address_of_the_coordinator_and_one_of_another_is_refused(
    daemon: FakeTailscaled, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in ("100.64.0.1", "100.64.0.3")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(LydianError, match="laptop"):
        pin.check("http://coordinator:8470", "n1CNTRL", daemon.path)


@pytest.mark.parametrize(
    ("url", "socket_name", "why"),
    [
        ("http://100.64.0.1:8470", "nothing.sock", "the token decides alone: no tailscaled"),
        ("http://127.0.0.1:8470", "tailscaled.sock", "127.0.0.1 is a loopback address"),
        ("http://no-such-host.invalid:8470", "tailscaled.sock", "its address is not known here"),
    ],
)
def test_what_cannot_be_checked_is_said_and_passes(
    daemon: FakeTailscaled, tmp_path: Path, url: str, socket_name: str, why: str
) -> None:
    assert why in pin.check(url, "n1CNTRL", tmp_path / socket_name)


def test_without_a_pin_nobody_is_asked(daemon: FakeTailscaled) -> None:
    assert pin.check("http://100.64.0.3:8470", None, daemon.path) == ""
    assert daemon.calls == []


# ---------------------------------------------------------------- kept

URL = "http://100.64.0.1:8470"


def test_a_pin_is_kept_with_the_credential_and_can_be_changed(tmp_path: Path) -> None:
    with Identity.open(tmp_path, URL) as identity:
        identity.repin("n1CNTRL")  # there is nothing yet to keep it with
        assert identity.pin is None
        identity.remember("w-1", "lyd_work_x", "n1CNTRL")
    with Identity.open(tmp_path, URL) as identity:
        assert identity.pin == "n1CNTRL"
        identity.repin("n9CNTRL")
    with Identity.open(tmp_path, URL) as identity:
        assert (identity.pin, identity.worker_id) == ("n9CNTRL", "w-1")


def test_an_identity_of_an_earlier_version_has_no_pin(tmp_path: Path) -> None:
    known = '{"coordinators": {"http://100.64.0.1:8470": {"worker_id": "w-1", "credential": "lyd_work_x"}}}'
    (tmp_path / "identity.json").write_text(known)
    with Identity.open(tmp_path, URL) as identity:
        assert (identity.credential, identity.pin) == ("lyd_work_x", None)


# ---------------------------------------------------------------- as a person meets it


def work(url: str, token: str, folder: Path, tailscaled: Path) -> subprocess.CompletedProcess[str]:
    environment: dict[str, Any] = {k: v for k, v in os.environ.items() if not k.startswith("LYDIAN_")}
    return subprocess.run(
        [sys.executable, "-m", "worker", url, "--state-dir", str(folder), "--device", "cpu"],
        env={**environment, "LYDIAN_TOKEN": token, "LYDIAN_TAILSCALED": str(tailscaled)},
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_a_worker_that_meets_another_machine_ends_before_it_says_a_word(daemon: FakeTailscaled, tmp_path: Path) -> None:
    ended = work("http://100.64.0.3:8470", f"{TOKEN}@n1CNTRL", tmp_path / "w", daemon.path)
    assert ended.returncode == 1
    assert "laptop.tailnet.test (n2CNTRL), and the join token is of a coordinator on n1CNTRL" in ended.stderr
    assert TOKEN not in ended.stderr


def test_a_worker_goes_on_asking_for_the_machine_that_it_joined(daemon: FakeTailscaled, tmp_path: Path) -> None:
    url = "http://100.64.0.3:8470"
    with Identity.open(tmp_path / "w", url) as identity:
        identity.remember("w-1", "lyd_work_x", "n1CNTRL")
    with pytest.raises(LydianError) as refused:
        _agent(url, "w", tmp_path / "w", [], [], Options(name=""), daemon.path)
    assert refused.value.code == "wrong_coordinator"
