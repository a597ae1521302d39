"""`lydian doctor` and joining: on machines with GPUs that are played, and against a real coordinator.

The NVIDIA driver is played to the very processes that ask it (tests/fake_gpus); all else is real: the doctor, the
training process, torch, the coordinator, and the worker that is refused.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from client.chaos.clocks import Clock, find_library
from client.chaos.proxy import Fault, Proxy
from client.doctor import checks
from common import api
from common.api import CoordinatorApi
from tests.acceptance.kit import PATIENCE_S, LocalFleet, Process, free_port, wait_for
from tests.fake_gpus import A100, GTX_1080, RTX_4090, machine
from tests.fake_tailscaled import FakeTailscaled, Peer

pytestmark = pytest.mark.acceptance

Found = list[dict[str, str]]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running


def doctor(*arguments: str, environment: dict[str, str] | None = None, python: str = sys.executable, rc: int) -> Found:
    """What `lydian doctor --json` finds, and that it ends as it should."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("LYDIAN_")}
    command = [python, "-m", "client.main", "doctor", "--json", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**base, **(environment or {})}, timeout=200
    )
    assert done.returncode == rc, done.stdout + done.stderr
    found: Found = json.loads(done.stdout)
    assert all(finding.keys() == {"side", "check", "verdict", "sentence", "fix"} for finding in found)
    return found


def asked(url: str | None, side: str, **more: Any) -> Found:
    """The same checks of one side, without a process of their own."""
    wish = checks.Wish(url=url, sides=frozenset({side}), **more)
    return [finding.model_dump() for finding in checks.examine(wish, lambda _: None)]


def one(found: Found, check: str, among: int = 0) -> tuple[str, str, str]:
    """Verdict, sentence and fix of a check, or of one of several of that name."""
    named = [finding for finding in found if finding["check"] == check]
    return named[among]["verdict"], named[among]["sentence"], named[among]["fix"]


# ---------------------------------------------------------------- GPUs


def test_a_box_of_many_cards_hears_of_each_and_what_a_worker_would_do() -> None:
    """Too old, full, failing, and in order: one machine with all of them."""
    cards = (GTX_1080, {**RTX_4090, "free": 100_000_000}, {**A100, "ecc": 3}, RTX_4090)
    found = doctor("--only", "training", "--device", "cuda", environment=machine(*cards), rc=1)

    assert one(found, "gpu", 0) == (
        "failure",
        "GPU 0 (NVIDIA GeForce GTX 1080) is sm_61; torch 2.14.1 has sm_75 and up",
        "install requirements_legacy_gpu.txt",
    )
    assert one(found, "gpu", 1)[1] == "GPU 1 (NVIDIA GeForce RTX 4090) is full: 0.1 GB of 25.8 GB are free"
    assert "GPU 2 (NVIDIA A100-SXM4-40GB) had 3 uncorrected memory errors (ECC)" in one(found, "gpu", 2)[1]
    assert one(found, "gpu", 3)[0] == "ok"
    verdict, sentence, fix = one(found, "device")
    assert verdict == "failure"
    assert "`lydian work --device cuda` refuses: GPU 0 (NVIDIA GeForce GTX 1080) is sm_61" in sentence
    assert fix.startswith("--device cuda:3 (NVIDIA GeForce RTX 4090) fits")


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has what this one has, but nothing that only workers need."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    here = Path(sysconfig.get_path("purelib"))
    there = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for entry in here.iterdir():
        if not entry.name.lower().startswith(("torch", "functorch", "pynvml", "nvidia", "sklearn", "scikit", "_")):
            (there / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def test_a_machine_without_torch_may_coordinate(without_torch: Path) -> None:
    found = doctor("--only", "training", "--only", "machine", python=str(without_torch), rc=0)

    assert one(found, "packages, coordinator")[0] == "ok"
    assert "gpu" not in [finding["check"] for finding in found]  # nor is nvidia-ml-py there, and nobody misses it
    verdict, sentence, _ = one(found, "torch")
    assert verdict == "ok"
    assert sentence == "there is no torch: this machine can serve, submit and watch, and not train"


def test_a_gpu_without_torch_hears_which_file_it_needs(without_torch: Path) -> None:
    found = doctor("--only", "training", python=str(without_torch), environment=machine(GTX_1080), rc=0)

    verdict, sentence, fix = one(found, "torch")
    assert (verdict, sentence) == ("warning", "there is no torch, so GPU 0 (NVIDIA GeForce GTX 1080) cannot train")
    assert fix.startswith("pip install -r requirements_legacy_gpu.txt")


# ---------------------------------------------------------------- joining


def worker(
    fleet: LocalFleet, name: str, environment: dict[str, str], *arguments: str, python: str = sys.executable
) -> Process:
    token = (fleet.state / "join.token").read_text().strip()
    command = ["-m", "worker", fleet.url, "--name", name, "--state-dir", str(fleet.folder / name), "--threads", "1"]
    given = {"LYDIAN_TOKEN": token, **environment}
    return Process([*command, *arguments], fleet.folder / f"{name}.log", given, python)


def test_a_worker_is_refused_before_it_joins_where_its_torch_has_no_code_for_the_card(fleet: LocalFleet) -> None:
    process = worker(fleet, "old", machine(GTX_1080), "--device", "cuda")

    assert process.popen.wait(PATIENCE_S) == 5, process.said()
    said = process.said().splitlines()
    assert "GPU 0 (NVIDIA GeForce GTX 1080) is sm_61; torch 2.14.1 has sm_75 and up" in said
    assert "Install requirements_legacy_gpu.txt." in said
    assert "old" not in [known.name for known in fleet.api.workers()]


def test_a_worker_without_torch_hears_which_file_its_card_needs(fleet: LocalFleet, without_torch: Path) -> None:
    process = worker(fleet, "bare", machine(GTX_1080), python=str(without_torch))

    assert process.popen.wait(PATIENCE_S) == 5, process.said()
    assert f"{without_torch} has no torch" in process.said()
    assert "Install requirements_legacy_gpu.txt." in process.said()


def test_a_worker_is_refused_where_there_is_no_gpu_and_one_was_asked_for(fleet: LocalFleet) -> None:
    process = worker(fleet, "none", machine(error="NVMLError_DriverNotLoaded"), "--device", "cuda")

    # A driver may yet be loaded: a service manager tries again.
    assert process.popen.wait(PATIENCE_S) == 1, process.said()
    assert "no NVIDIA GPU is shown: its driver is installed and not loaded" in process.said()
    assert "modprobe nvidia" in process.said()


def test_a_worker_that_may_choose_trains_on_the_cpu_and_the_fleet_sees_why(fleet: LocalFleet) -> None:
    process = worker(fleet, "auto", machine(GTX_1080), "--device", "auto")
    try:
        known = wait_for(
            "the worker to join",
            lambda: [each for each in fleet.api.workers() if each.name == "auto"] or _dead(process),
        )[0]
    finally:
        process.kill_all()

    assert known.hardware.torch.device == "cpu"
    reason = "GPU 0 (NVIDIA GeForce GTX 1080) is sm_61; torch 2.14.1 has sm_75 and up: install"
    assert known.hardware.device_reason.startswith(reason)
    assert f"training on cpu: {reason}" in process.said()
    listed = subprocess.run(
        [sys.executable, "-m", "client.main", "workers"],
        capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "LYDIAN_URL": fleet.url, "LYDIAN_TOKEN": fleet.admin_token},
    )  # fmt: skip
    assert reason in listed.stdout


def _dead(process: Process) -> None:
    assert process.popen.poll() is None, process.said()


# ---------------------------------------------------------------- the way to the coordinator


def test_a_machine_in_order_has_no_failure(fleet: LocalFleet, tmp_path: Path) -> None:
    given = {"LYDIAN_TOKEN": fleet.admin_token, "LYDIAN_STATE_DIR": str(tmp_path), "LYDIAN_URL": fleet.url}
    found = doctor(environment=given, rc=0)

    sides = [finding["side"] for finding in found]
    assert sides == sorted(sides, key=["machine", "training", "coordinator", "tailnet"].index)
    known = {finding["check"] for finding in found}
    assert {"python", "packages, base", "memory", "disk", "gpu", "kernel", "device"} <= known
    assert {"connection", "version", "clock", "token", "line", "mtu", "tailscale"} <= known
    assert one(found, "token")[1] == "the token that was given is an admin's"
    assert list(tmp_path.iterdir()) == []


def test_what_is_found_is_printed_a_line_each_and_what_is_waited_for_on_stderr(fleet: LocalFleet) -> None:
    command = [sys.executable, "-m", "client.main", "doctor", fleet.url, "--only", "coordinator", "--token", "wrong"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "the coordinator"
    assert [line.split()[0] for line in lines[1:]] == ["ok", "ok", "ok", "failure"]
    assert "\x1b" not in done.stdout
    assert "waiting for a connection to the coordinator: 10 s at most" in done.stderr
    assert done.stderr.splitlines()[-1] == "1 failure"


def test_a_coordinator_that_is_away_is_a_failure_where_it_was_named() -> None:
    (found,) = asked(f"http://127.0.0.1:{free_port()}", "coordinator")

    assert (found["check"], found["verdict"]) == ("connection", "failure")
    assert "lydian serve" in found["fix"]


def test_a_coordinator_that_nobody_named_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "DEFAULT_URL", f"http://127.0.0.1:{free_port()}")
    assert [found["verdict"] for found in asked(None, "coordinator")] == ["warning"]


def test_a_name_that_nobody_knows_is_said() -> None:
    assert one(asked("http://gpu-box.invalid:8470", "coordinator"), "address")[0] == "failure"


def test_a_token_of_another_coordinator_is_a_failure_and_is_not_shown(fleet: LocalFleet) -> None:
    token = "lyd_join_0123456789_secretsecretsecretsecret"
    found = doctor(fleet.url, "--only", "coordinator", environment={"LYDIAN_TOKEN": token}, rc=1)

    assert one(found, "token")[0] == "failure"
    assert "secretsecret" not in json.dumps(found)


def test_a_join_token_is_known_for_what_it_is_and_measures_the_line(fleet: LocalFleet) -> None:
    token = (fleet.state / "join.token").read_text().strip()
    found = asked(fleet.url, "coordinator", token=f"{token}@nXCNTRL")

    assert one(found, "token")[1] == "the token that was given lets a worker join"
    assert "Mbit/s down" in one(found, "line")[1]


def test_something_else_at_the_address_is_no_coordinator() -> None:
    with closing(_Elsewhere()) as elsewhere:
        found = asked(elsewhere.url, "coordinator")

    assert one(found, "version")[0] == "failure"


class _Elsewhere:
    """A web server that is no coordinator."""

    def __init__(self) -> None:
        self._port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "http.server", str(self._port), "--bind", "127.0.0.1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.url = f"http://127.0.0.1:{self._port}"
        wait_for("a web server", self._listens)

    def _listens(self) -> bool:
        from client.doctor.asking import Place, connect

        try:
            connect(Place(self.url))
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.mark.skipif(find_library() is None, reason="needs libfaketime (Debian: apt install libfaketime)")
def test_a_clock_that_is_wrong_is_a_warning(fleet: LocalFleet, tmp_path: Path) -> None:
    library = find_library()
    assert library is not None
    clock = Clock(library, tmp_path / "clock")
    clock.set(3600.0)
    found = doctor(fleet.url, "--only", "coordinator", environment=clock.environment(), rc=0)

    verdict, sentence, _ = one(found, "clock")
    assert verdict == "warning"
    assert "ahead of the coordinator's" in sentence


def test_large_bodies_that_stall_where_small_calls_pass_are_told_apart(
    fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a path that loses large packets and tells nobody."""
    monkeypatch.setattr(api, "PROBE_IDLE_S", 0.5)
    with Proxy(fleet.host, fleet.port) as net:
        wish = checks.Wish(
            url=f"http://127.0.0.1:{net.port}", token=fleet.admin_token, sides=frozenset({"coordinator"})
        )
        net.up.fault = Fault("stall", after=20_000, times=100)
        found = {finding.check: finding for finding in checks.examine(wish, lambda _: None)}

    assert found["version"].verdict == found["token"].verdict == "ok"
    assert found["line"].verdict == "failure"
    assert "larger ones stall" in found["line"].sentence
    assert "tcp_mtu_probing" in found["line"].fix


# ---------------------------------------------------------------- the tailnet


def tailnet(tmp_path: Path, **coordinator: Any) -> FakeTailscaled:
    soon = (datetime.now(UTC) + timedelta(days=3)).isoformat()
    me = Peer("100.64.0.9", "me", login="alice@example.com", key_expiry=soon)
    return FakeTailscaled(tmp_path / "tailscaled.sock", [me, Peer("100.64.0.1", "coordinator", **coordinator)])


def test_a_key_that_expires_and_a_relayed_path_are_warnings(tmp_path: Path) -> None:
    with tailnet(tmp_path, current_address="", relay="fra") as daemon:
        found = doctor("http://100.64.0.1:8470", "--only", "tailnet", "--tailscaled", str(daemon.path), rc=0)

    assert one(found, "tailscale")[0] == "ok"
    assert one(found, "key")[0] == "warning"
    assert "expires in " in one(found, "key")[1]
    verdict, sentence, fix = one(found, "path")
    assert (verdict, sentence) == ("warning", "packets to 100.64.0.1 go through a relay in fra (DERP), which is slow")
    assert "41641" in fix


def test_a_tailnet_that_nobody_is_logged_in_to_is_a_failure_where_it_is_needed(tmp_path: Path) -> None:
    with tailnet(tmp_path) as daemon:
        daemon.states = ["NeedsLogin"]
        needed = asked("http://100.64.0.1:8470", "tailnet", tailscaled=daemon.path)
        spare = asked("http://127.0.0.1:8470", "tailnet", tailscaled=daemon.path)

    assert one(needed, "tailscale") == ("failure", "tailscaled is in state NeedsLogin", "sudo tailscale up")
    assert one(spare, "tailscale")[0] == "warning"


def test_the_clock_of_a_coordinator_is_read_to_the_second(fleet: LocalFleet) -> None:
    with CoordinatorApi(fleet.url) as anybody:
        told = anybody.wall_clock()
    assert told is not None
    assert told.tzinfo is not None
