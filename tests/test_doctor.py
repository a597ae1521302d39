"""What the doctor says: the rules as tables, what it prints, and what it asks of this machine and of sockets."""

import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement as Packaging
from packaging.version import Version

from client.doctor import asking, checks, judging
from client.doctor.findings import Finding, blocks, exit_code, lines, summary
from common.errors import ForbiddenError, UnauthenticatedError, UnavailableError
from common.messages import GpuInventory, Link, MachineProbe, TorchBuild, VersionView
from common.tailscale import Peer, TailscaleStatus
from tests import legacy_docs
from tests.fake_gpus import A100, GTX_1080, LEGACY_TORCH, NEW_TORCH, RTX_4090, build, told
from worker.hardware import inventory

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
PY = (3, 12)


def say(verdict: str, side: str = "machine", check: str = "x", sentence: str = "so it is", fix: str = "") -> Finding:
    return Finding.model_validate({"side": side, "check": check, "verdict": verdict, "sentence": sentence, "fix": fix})


# ---------------------------------------------------------------- findings


def test_warnings_are_allowed_and_failures_are_not() -> None:
    assert exit_code([]) == 0
    assert exit_code([say("ok"), say("warning")]) == 0
    assert exit_code([say("ok"), say("failure"), say("warning")]) == 1


def test_findings_stand_below_their_side_in_the_order_of_the_checks() -> None:
    found = [say("ok", "tailnet"), say("ok", check="a"), say("ok", "coordinator"), say("ok", check="b")]
    titles = [(title, [finding.check for finding in group]) for title, group in blocks(found)]

    assert titles == [("this machine", ["a", "b"]), ("the coordinator", ["x"]), ("the tailnet", ["x"])]


def test_a_line_cannot_steer_a_terminal_and_its_verdict_is_painted() -> None:
    found = [say("ok", check="long name"), say("failure", sentence="a\x1b[31mb\nc", fix="do it")]
    printed = list(lines(found, lambda text, verdict: f"<{verdict}>{text}"))

    assert printed == [
        "this machine",
        "  <ok>ok       long name  so it is",
        "  <failure>failure  x          a\N{REPLACEMENT CHARACTER}[31mb c: do it",
    ]
    assert list(lines([])) == []


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (["ok"], "all is well"),
        (["failure"], "1 failure"),
        (["failure", "warning", "warning"], "1 failure, 2 warnings"),
        (["warning"], "1 warning"),
    ],
)
def test_the_summary_counts(verdicts: list[str], said: str) -> None:
    assert summary([say(verdict) for verdict in verdicts]) == said


# ---------------------------------------------------------------- this machine


def test_python_that_is_too_old_is_a_failure() -> None:
    assert judging.python((3, 10), "3.10.1", "/usr/bin/python3", "0.1.0").verdict == "failure"
    assert judging.python((3, 11), "3.11.0", "/usr/bin/python3", "0.1.0").verdict == "ok"


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_versions_are_compared_as_packaging_compares_them(have: list[int], wanted: list[int]) -> None:
    version, other = ".".join(map(str, have)), ".".join(map(str, wanted))
    for clause in (f">={other}", f"=={other}", f"<{other}", f"<={other}", f">{other}"):
        expected = Packaging(f"x{clause}").specifier.contains(Version(version), prereleases=True)
        assert judging.requirement(f"x{clause}").allows(version) is expected, clause


@pytest.mark.parametrize("installed", ["2.7.1+cpu", "2.7.1"])
def test_a_build_of_a_version_is_that_version(installed: str) -> None:
    assert judging.requirement("torch==2.7.1; extra == 'legacy-gpu'").allows(installed)


def test_a_version_that_is_none_will_not_do() -> None:
    assert not judging.requirement("x>=1").allows("unknown")


def test_the_projects_own_requirements_are_understood() -> None:
    known = {(one.name, one.extra): str(one) for one in asking.requirements()}

    assert known["torch", "new-gpu"] == "torch<3,>=2.11"
    assert known["torch", "legacy-gpu"] == "torch==2.7.1"
    assert known["uvicorn", "server"].startswith("uvicorn>=0.")
    assert known["numpy", ""].startswith("numpy>=1.")


REQUIREMENTS = [
    judging.requirement(line)
    for line in ("numpy>=1.26", "torch<3,>=2.11; extra == 'new-gpu'", "torch==2.7.1; extra == 'legacy-gpu'")
]


def test_packages_that_are_missing_or_too_old_are_named_with_the_file() -> None:
    old = judging.packages(REQUIREMENTS, {"numpy": "1.20.0"}, "", "requirements_server.txt")
    gone = judging.packages(REQUIREMENTS, {"numpy": None}, "", "requirements_server.txt")

    assert (old.sentence, old.fix) == (
        "numpy is 1.20.0, and numpy>=1.26 is needed",
        "pip install -r requirements_server.txt",
    )
    assert (gone.verdict, gone.sentence) == ("failure", "numpy is missing")
    assert judging.packages(REQUIREMENTS, {"numpy": "2.0"}, "", "f").verdict == "ok"


@pytest.mark.parametrize(
    ("torch", "file", "extra"),
    [
        ("2.14.1", "requirements_legacy_gpu.txt", "new-gpu"),
        ("2.7.1+cu126", "requirements_new_gpu.txt", "legacy-gpu"),
        ("2.6.0", "requirements_legacy_gpu.txt", "legacy-gpu"),  # neither: what the cards want
        (None, "requirements_new_gpu.txt", "new-gpu"),
    ],
)
def test_the_installed_torch_says_which_set_it_is(torch: str | None, file: str, extra: str) -> None:
    assert judging.training_set(REQUIREMENTS, {"torch": torch}, file) == extra


@pytest.mark.parametrize(("free", "verdict"), [(8 << 30, "ok"), (100 << 20, "warning")])
def test_little_memory_is_a_warning(free: int, verdict: str) -> None:
    assert judging.memory(16 << 30, free).verdict == verdict


@pytest.mark.parametrize(
    ("free", "fsync_s", "verdict"),
    [
        (50 << 30, 0.01, "ok"),
        (50 << 30, None, "ok"),
        (1 << 30, 0.01, "warning"),
        (1 << 20, 0.01, "failure"),
        (50 << 30, 2.0, "warning"),
    ],
)
def test_a_disk_has_room_and_writes(free: int, fsync_s: float | None, verdict: str) -> None:
    found = judging.disk("/state", free, fsync_s)
    assert (found.verdict, bool(found.fix)) == (verdict, verdict != "ok")


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    tried = asking.try_disk(tmp_path / "a" / "b")

    assert tried.fsync_s is None
    assert tried.free > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    tried = asking.try_disk(tmp_path)

    assert tried.fsync_s is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that takes no files")
def test_a_folder_that_takes_no_files_is_a_failure() -> None:
    examined = checks.Examined(checks.Wish(state_dir=Path("/sys/kernel")))
    (found,) = next(check for check in checks.CHECKS if check.name == "disk").look(examined)

    assert found.verdict == "failure"
    assert "/sys/kernel cannot be used" in found.sentence


# ---------------------------------------------------------------- training here


class Driver:
    """What pynvml would be on the machine that is played (tests/fake_gpus has the same for a real process)."""

    NVMLError = NVMLError_LibraryNotFound = NVMLError_DriverNotLoaded = type("NVMLError", (Exception,), {})
    NVMLError_NotSupported = type("NotSupported", (NVMLError,), {})
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0

    def __init__(self, *gpus: dict[str, Any], driver: str = "580.95.05") -> None:
        self.gpus, self.driver = gpus, driver
        self.nvmlInit: Callable[[], None] = lambda: None
        self.nvmlShutdown = self.nvmlInit

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.driver

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return self.gpus[index]

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> str:
        return str(handle["name"])

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(total=handle["memory"], free=handle["free"])

    def nvmlDeviceGetCudaComputeCapability(self, handle: dict[str, Any]) -> tuple[int, ...]:
        return tuple(handle["capability"])

    def nvmlDeviceGetUUID(self, handle: dict[str, Any]) -> str:
        return f"GPU-{handle['name']}"

    def nvmlDeviceGetTotalEccErrors(self, handle: dict[str, Any], kind: int, counter: int) -> int:
        return int(handle.get("ecc", 0))


def examined(probe: MachineProbe, device: str, environment: dict[str, str] | None = None) -> list[Finding]:
    choice = judging.chosen(probe, device, environment or {})
    assert choice is not None
    return judging.training(probe, device, choice, probe)


NO_KERNEL = "CUDA error: no kernel image is available"


@pytest.mark.parametrize(
    ("driver", "torch", "failure", "sentence", "fix"),
    [
        (
            Driver(RTX_4090, driver="535.183.01"),
            build(NEW_TORCH, architectures=()),
            "no driver",
            "driver 535.183.01 of GPU 0 (NVIDIA GeForce RTX 4090) is too old: torch 2.14.1 is built for CUDA 13.0",
            "upgrade the NVIDIA driver to 580 or newer; without the right to, install requirements_legacy_gpu.txt",
        ),
        (
            Driver(GTX_1080),
            build(NEW_TORCH),
            NO_KERNEL,
            "GPU 0 (NVIDIA GeForce GTX 1080) is sm_61; torch 2.14.1 has sm_75 and up",
            "install requirements_legacy_gpu.txt",
        ),
        (
            Driver(),
            build(NEW_TORCH, architectures=()),
            "no driver",
            "no NVIDIA GPU is shown: its driver has none",
            "see whether `lspci` shows the card",
        ),
        (
            Driver({**GTX_1080, "free": 100_000_000}),
            build(LEGACY_TORCH, "cuda"),
            "",
            "GPU 0 (NVIDIA GeForce GTX 1080) is full: 0.1 GB of 8.5 GB are free",
            "end what uses it",
        ),
        (
            Driver({**A100, "ecc": 2}),
            build(NEW_TORCH, "cuda"),
            "",
            "GPU 0 (NVIDIA A100-SXM4-40GB) had 2 uncorrected memory errors (ECC)",
            "reset it (sudo nvidia-smi --gpu-reset -i 0)",
        ),
        (
            Driver(GTX_1080, RTX_4090),
            build(NEW_TORCH),
            NO_KERNEL,
            "GPU 0 (NVIDIA GeForce GTX 1080) is sm_61",
            "--device cuda:1 (NVIDIA GeForce RTX 4090) fits",
        ),
    ],
    ids=["driver too old", "architecture missing", "no GPU", "GPU full", "ECC errors", "mixed GPUs"],
)
def test_a_box_that_cannot_train_on_its_gpu_is_refused_with_the_one_thing_to_do(
    driver: Driver, torch: TorchBuild, failure: str, sentence: str, fix: str
) -> None:
    probe = MachineProbe(inventory=inventory(driver), build=torch, failure=failure)
    found = examined(probe, "cuda")
    refused = found[-1]

    assert (refused.check, refused.verdict) == ("device", "failure")
    assert f"`lydian work --device cuda` refuses: {sentence}" in refused.sentence
    assert refused.fix.startswith(fix)
    assert exit_code(found) == 1


def test_left_to_choose_a_mixed_box_trains_on_the_card_that_fits_and_that_is_no_failure() -> None:
    probe = MachineProbe(inventory=inventory(Driver(GTX_1080, RTX_4090)), build=build(NEW_TORCH), failure=NO_KERNEL)
    choice = judging.chosen(probe, "auto", {})
    assert choice is not None
    tried = probe.model_copy(update={"failure": "", "build": build(NEW_TORCH, "cuda:1")})
    found = judging.training(probe, "auto", choice, tried)

    assert [finding.verdict for finding in found] == ["warning", "ok", "ok", "warning"]
    assert "trains on cuda:1" in found[-1].sentence
    assert exit_code(found) == 0


def test_a_device_that_runs_no_kernel_is_said_once() -> None:
    probe = MachineProbe(inventory=told(RTX_4090), build=build(NEW_TORCH), failure="CUDA error: 999")
    *_, kernel, device = examined(probe, "cuda")

    assert (kernel.verdict, device.verdict) == ("failure", "failure")
    assert "CUDA error: 999" in kernel.sentence
    assert "CUDA error: 999" not in device.words


def test_a_card_that_is_hidden_is_not_chosen() -> None:
    probe = MachineProbe(inventory=inventory(Driver(GTX_1080, RTX_4090)), build=build(NEW_TORCH), failure=NO_KERNEL)
    assert "cpu" in examined(probe, "auto", {"CUDA_VISIBLE_DEVICES": "0"})[-1].sentence


def test_a_box_that_is_well_has_nothing_to_do() -> None:
    probe = MachineProbe(inventory=inventory(Driver(RTX_4090)), build=build(NEW_TORCH, "cuda"))
    found = examined(probe, "cuda")

    assert {finding.verdict for finding in found} == {"ok"}
    assert not any(finding.fix for finding in found)
    assert [finding.check for finding in found] == ["gpu", "kernel", "device"]


def test_what_a_driver_does_not_tell_is_a_warning() -> None:
    found = inventory(Driver(RTX_4090)).model_copy(update={"reason": "the NVIDIA driver does not tell GPU 1 (lost)"})
    lines = examined(MachineProbe(inventory=found, build=build(NEW_TORCH, "cuda")), "cuda")

    assert ("warning", found.reason) in [(line.verdict, line.sentence) for line in lines]


def test_a_broken_driver_is_a_failure_though_the_cpu_would_do() -> None:
    gone = GpuInventory(missing="not_loaded", reason="its driver is installed and not loaded")
    found = examined(MachineProbe(inventory=gone, build=build(NEW_TORCH, architectures=())), "auto")

    assert [finding.verdict for finding in found] == ["failure", "ok", "warning"]


def test_a_card_that_fits_and_is_not_seen_says_so_in_the_line_of_the_device() -> None:
    probe = MachineProbe(inventory=inventory(Driver(RTX_4090)), build=build(NEW_TORCH, architectures=()))
    assert "does not see GPU 0" in examined(probe, "auto")[-1].sentence


def test_the_played_cards_are_told_alike_by_both_stand_ins() -> None:
    cards = (GTX_1080, {**A100, "ecc": 2})
    seen = inventory(Driver(*cards)).gpus
    assert [gpu.model_copy(update={"uuid": ""}) for gpu in seen] == [
        gpu.model_copy(update={"uuid": ""}) for gpu in told(*cards).gpus
    ]


NOTHING = GpuInventory(missing="no_driver", reason="its driver is not installed")


@pytest.mark.parametrize(
    ("gpus", "has_torch", "python", "verdict", "fix"),
    [
        (NOTHING, False, PY, "ok", ""),
        (GpuInventory(missing="no_library", reason="no nvidia-ml-py"), False, PY, "ok", ""),
        (NOTHING, True, PY, "failure", "install torch anew: pip install -r requirements_new_gpu.txt"),
        (inventory(Driver(RTX_4090)), True, PY, "failure", "install torch anew"),
        (inventory(Driver(RTX_4090)), False, PY, "warning", "pip install -r requirements_new_gpu.txt"),
        (inventory(Driver(GTX_1080)), False, (3, 13), "warning", "pip install -r requirements_legacy_gpu.txt"),
        (
            inventory(Driver(GTX_1080)),
            False,
            (3, 14),
            "warning",
            "pip install -r requirements_legacy_gpu.txt, with Python",
        ),
    ],
)
def test_without_torch_a_machine_may_do_all_but_train(
    gpus: GpuInventory, has_torch: bool, python: tuple[int, int], verdict: str, fix: str
) -> None:
    probe = MachineProbe(inventory=gpus, failure="No module named 'torch'")
    found = judging.no_build(probe, has_torch=has_torch, python=python)[-1]

    assert (found.check, found.verdict) == ("torch", verdict)
    assert found.fix.startswith(fix)
    assert judging.chosen(probe, "auto", {}) is None


# ---------------------------------------------------------------- the coordinator

OURS = VersionView(version="0.3.0", protocol=3)


@pytest.mark.parametrize(
    ("theirs", "verdict", "fix"),
    [
        (("0.3.0", 3), "ok", ""),
        (("0.3.1", 3), "warning", "upgrade this machine soon"),
        (("0.2.9", 3), "warning", "upgrade the coordinator soon"),
        (("0.4.0", 4), "warning", "upgrade this machine soon"),  # a coordinator serves the protocol before its own
        (("0.5.0", 5), "failure", "upgrade this machine"),
        (("0.2.0", 2), "failure", "upgrade the coordinator"),
    ],
)
def test_the_older_side_is_to_be_upgraded(theirs: tuple[str, int], verdict: str, fix: str) -> None:
    found = judging.version(VersionView(version=theirs[0], protocol=theirs[1]), OURS)
    assert (found.verdict, found.fix) == (verdict, fix)


@pytest.mark.parametrize(
    ("ahead", "verdict", "said"),
    [(2.0, "ok", ""), (-29.0, "ok", ""), (90.0, "warning", "ahead"), (-90.0, "warning", "behind")],
)
def test_a_clock_that_is_wrong_is_only_a_warning(ahead: float, verdict: str, said: str) -> None:
    found = judging.clock(ahead)
    assert found.verdict == verdict
    assert said in found.sentence


@pytest.mark.parametrize(
    ("token", "answer", "verdict", "said"),
    [
        (None, None, "warning", "no token"),
        ("lyd_admin_1_s", None, "ok", "is an admin's"),
        ("lyd_submit_1_s", None, "ok", "may submit jobs"),
        ("lyd_read_1_s", None, "ok", "may read"),
        ("lyd_join_1_s", ForbiddenError("no"), "ok", "lets a worker join"),
        ("lyd_work_1_s", ForbiddenError("no"), "ok", "is a worker's"),
        ("secret", ForbiddenError("no"), "ok", "is known"),
        ("lyd_join_1_s", UnauthenticatedError("not known"), "failure", "does not count: not known"),
    ],
)
def test_a_token_is_known_or_not(token: str | None, answer: Any, verdict: str, said: str) -> None:
    found = judging.token(token, "that was given", answer)

    assert found.verdict == verdict
    assert said in found.sentence
    assert token is None or token not in found.words


@pytest.mark.parametrize(
    ("up", "latency_s", "control", "line", "hint"),
    [
        (100e6, 0.001, "cubic", "ok", False),
        (0.5e6, 0.08, "cubic", "warning", True),
        (0.5e6, 0.08, "bbr", "warning", False),
        (0.5e6, 0.001, "cubic", "warning", False),
        (100e6, 0.08, "cubic", "ok", False),
    ],
)
def test_a_slow_line_is_a_warning_and_a_long_slow_one_has_a_hint(
    up: float, latency_s: float, control: str, line: str, hint: bool
) -> None:
    link = Link(down=100e6, up=up, latency_s=latency_s)

    assert judging.line(link).verdict == line
    assert (judging.congestion(link, control) is not None) is hint


def test_large_packets_that_are_lost_are_told_from_a_coordinator_that_is_away() -> None:
    found = judging.stalled("http://x:1", UnavailableError("timed out"), 1420)

    assert found.verdict == "failure"
    assert "packets of up to 1420 bytes" in found.sentence
    assert "tcp_mtu_probing=1" in found.fix
    assert "packets" not in judging.stalled("http://x:1", UnavailableError("timed out"), None).sentence


@pytest.mark.parametrize(("size", "verdict"), [(65_536, "ok"), (1280, "ok"), (1200, "warning")])
def test_an_interface_with_small_packets_is_a_warning(size: int, verdict: str) -> None:
    assert judging.mtu(size).verdict == verdict


def test_a_coordinator_that_nobody_named_is_none_to_miss() -> None:
    assert judging.nobody_named("http://127.0.0.1:8470").verdict == "warning"


def test_a_name_that_nobody_knows_is_a_failure() -> None:
    found = judging.no_address("gpu-box", "Name or service not known")
    assert (found.verdict, found.sentence) == ("failure", "gpu-box cannot be resolved: Name or service not known")


def test_a_port_where_nobody_listens_is_told_from_one_that_is_shut() -> None:
    refused = judging.no_connection("http://x:1", "refused", refused=True)
    silent = judging.no_connection("http://x:1", "timed out", refused=False)

    assert "lydian serve" in refused.fix
    assert "let through" in silent.fix


# ---------------------------------------------------------------- the tailnet


def status(**known: Any) -> TailscaleStatus:
    return TailscaleStatus(**{"state": "Running", "addresses": ("100.64.0.1",), "name": "me.tailnet.test"} | known)


@pytest.mark.parametrize(
    ("told", "needed", "verdicts", "said"),
    [
        (None, False, ["ok"], "not in use: no socket"),
        (None, True, ["failure"], "address is a tailnet's"),
        (status(state="NeedsLogin"), True, ["failure"], "NeedsLogin"),
        (status(state="Stopped"), False, ["warning"], "Stopped"),
        (status(), False, ["ok", "ok"], "does not expire"),
        (status(name=None, addresses=()), False, ["ok", "ok"], "no address yet"),
        (status(tun=False), False, ["ok", "ok"], "HTTP_PROXY"),
        (status(key_expiry=NOW + timedelta(days=90)), False, ["ok", "ok"], "valid for 90 days"),
        (status(key_expiry=NOW + timedelta(days=3)), False, ["ok", "warning"], "expires in 3.0 days"),
        (status(key_expiry=NOW - timedelta(days=1)), False, ["ok", "failure"], "expired 1.0 days ago"),
    ],
)
def test_where_tailscale_stands(told: TailscaleStatus | None, needed: bool, verdicts: list[str], said: str) -> None:
    found = judging.tailnet(told, "no socket", now=NOW, needed=needed)

    assert [finding.verdict for finding in found] == verdicts
    assert said in " ".join(finding.sentence for finding in found)
    assert all(bool(finding.fix) == (finding.verdict != "ok") for finding in found)


@pytest.mark.parametrize(
    ("known", "verdict", "said"),
    [
        ({"direct": "198.18.0.9:41641", "relay": "fra"}, "ok", "directly, to 198.18.0.9:41641"),
        ({"relay": "fra", "active": True}, "warning", "a relay in fra (DERP)"),
        ({"peer_relay": "198.18.0.7:7777"}, "warning", "another machine (198.18.0.7:7777)"),
        ({"relay": "fra"}, "ok", "not known yet"),
    ],
)
def test_a_relayed_path_is_a_warning(known: dict[str, Any], verdict: str, said: str) -> None:
    found = judging.path("100.64.0.2", Peer(stable_id="n2", addresses=("100.64.0.2",), **known))

    assert found.verdict == verdict
    assert said in found.sentence


# ---------------------------------------------------------------- sockets and names


def test_a_port_where_nobody_listens_refuses() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        place = asking.Place(f"http://127.0.0.1:{listener.getsockname()[1]}")
        asking.connect(place)
    with pytest.raises(ConnectionRefusedError):
        asking.connect(place)


def test_names_become_addresses() -> None:
    assert "127.0.0.1" in asking.resolve(asking.Place("http://localhost:8470"))


def test_a_resolver_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    over, ended = threading.Event(), threading.Event()

    def resolver(*_: Any, **__: Any) -> list[Any]:
        over.wait()
        ended.set()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    monkeypatch.setattr(asking, "NAME_S", 0.01)
    try:
        with pytest.raises(TimeoutError, match=r"no answer within 0\.01 s"):
            asking.resolve(asking.Place("http://gpu-box:8470"))
    finally:
        over.set()
        assert ended.wait(10)


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="Linux tells the MTU of a path")
def test_the_kernel_tells_the_mtu_of_a_path() -> None:
    found = asking.path_mtu(asking.Place("http://127.0.0.1:8470"))
    assert found is not None
    assert found >= judging.LEAST_MTU


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("http://GPU-box:8470", "http://gpu-box:8470"),
        ("http://gpu-box", "http://gpu-box:80"),
        ("http://[fd7a::1]:8470/", "http://[fd7a::1]:8470"),
    ],
)
def test_a_worker_that_has_joined_needs_no_other_token(tmp_path: Path, url: str, key: str) -> None:
    content = {"coordinators": {key: {"worker_id": "w-1", "credential": "lyd_work_1_s"}}}
    (tmp_path / "identity.json").write_text(json.dumps(content))
    found = asking.worker_credential([tmp_path / "none", tmp_path], asking.Place(url))

    assert found == ("lyd_work_1_s", tmp_path / "identity.json")
    assert asking.worker_credential([tmp_path], asking.Place("http://other:1")) is None


@pytest.mark.parametrize("content", ["", "[]", '{"coordinators": []}', '{"coordinators": {"http://x:80": 1}}'])
def test_a_damaged_identity_is_no_token(tmp_path: Path, content: str) -> None:
    (tmp_path / "identity.json").write_text(content)
    assert asking.worker_credential([tmp_path], asking.Place("http://x")) is None


def test_a_proxy_of_the_environment_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://localhost:1055")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    assert asking.Place("http://coordinator:8470").proxy == "http://localhost:1055"
    assert asking.Place("http://127.0.0.1:8470").proxy is None


# ---------------------------------------------------------------- the page


def test_the_page_on_old_gpus_has_the_tables_and_outputs_of_this_version() -> None:
    """Else: python -m tests.legacy_docs."""
    text = legacy_docs.PAGE.read_text(encoding="utf-8")

    assert text == legacy_docs.page(text)
    assert set(legacy_docs.BLOCK.findall(text)) == legacy_docs.made().keys()
