"""Whether a worker finds the machine that its join token names: asked of a stand-in for tailscaled."""

import gc
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import LydianError
from common.pins import Pins
from tests.fake_tailscaled import FakeTailscaled, Peer
from tests.tls_kit import Listener, pin_in, written
from worker import pin
from worker.__main__ import _agent
from worker.cage import Wish
from worker.identity import Identity
from worker.options import Options

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "lyd_join_0123456789ab_" + "x" * 43
CERTIFICATE = "sha256." + "y" * 43
HERE = Peer("100.64.0.2", "gpu", tags=("tag:lydian-worker",))
COORDINATOR = Peer("100.64.0.1", "coordinator", ip6="fd7a:115c:a1e0::1", tags=("tag:lydian-coordinator",))  # n1CNTRL
IMPOSTOR = Peer("100.64.0.3", "laptop", login="mallory@example.com")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeTailscaled]:
    with FakeTailscaled(tmp_path / "tailscaled.sock", [HERE, COORDINATOR, IMPOSTOR]) as running:
        yield running


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
        identity.repin(Pins("n1CNTRL"))  # there is nothing yet to keep it with
        assert identity.pins == Pins()
        identity.remember("w-1", "lyd_work_x", Pins("n1CNTRL"))
    with Identity.open(tmp_path, URL) as identity:
        assert identity.pins == Pins("n1CNTRL")
        identity.repin(Pins("n9CNTRL", CERTIFICATE))
    with Identity.open(tmp_path, URL) as identity:
        assert (identity.pins, identity.worker_id) == (Pins("n9CNTRL", CERTIFICATE), "w-1")


def test_an_identity_of_an_earlier_version_has_no_pin(tmp_path: Path) -> None:
    known = '{"coordinators": {"http://100.64.0.1:8470": {"worker_id": "w-1", "credential": "lyd_work_x"}}}'
    (tmp_path / "identity.json").write_text(known)
    with Identity.open(tmp_path, URL) as identity:
        assert (identity.credential, identity.pins) == ("lyd_work_x", Pins())


def test_a_worker_keeps_the_certificate_that_it_joined_by_and_speaks_to_no_other(tmp_path: Path) -> None:
    (tmp_path / "certificates").mkdir()
    first, second = (written(tmp_path / "certificates", f"{name}.pem") for name in ("first", "second"))
    with Listener(second) as there:
        url = f"https://127.0.0.1:{there.port}"
        with Identity.open(tmp_path / "w", url) as identity:
            identity.remember("w-1", "lyd_work_x", Pins(certificate=pin_in(first)))
        with pytest.raises(LydianError) as refused:
            _agent(url, "w", tmp_path / "w", [], [], Options(name=""), tmp_path / "nothing.sock", Wish())
        assert refused.value.code == "wrong_certificate"
        assert there.heard == b""
        del refused
        gc.collect()  # what was refused held the folder
        anew = Options(name="", join_token=TOKEN, pins=Pins(certificate=pin_in(second)))  # as a new join line says
        agent = _agent(url, "w", tmp_path / "w", [], [], anew, tmp_path / "nothing.sock", Wish())
        assert agent.identity.pins == Pins(certificate=pin_in(second))
        agent.api.close()
        agent.spool.close()
        agent.identity.close()


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
        identity.remember("w-1", "lyd_work_x", Pins("n1CNTRL"))
    with pytest.raises(LydianError) as refused:
        _agent(url, "w", tmp_path / "w", [], [], Options(name=""), daemon.path, Wish())
    assert refused.value.code == "wrong_coordinator"
