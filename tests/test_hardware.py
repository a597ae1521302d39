"""What a worker tells about its machine. A stand-in for pynvml plays drivers; all else is this machine."""

import ctypes
import importlib
import logging
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import Gpu, GpuInventory, Hardware, TorchBuild
from worker import hardware
from worker.hardware import cpu_name, cpu_quotas, describe, idle_gpus, inventory, memory_limits, usable_cores

CPU_TORCH = TorchBuild(version="2.14.1+cpu", device="cpu", threads=2)
RTX = Gpu(
    index=0,
    name="NVIDIA GeForce RTX 4090",
    memory=24 << 30,
    driver="580.65.06",
    capability=(8, 9),
    uuid="GPU-1a2b",
    free=20 << 30,
    ecc_uncorrected=3,
)


def driver_is_here() -> bool:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


@dataclass
class Driver:
    """What pynvml would be on another machine: `errors` maps a function's name to the code that it answers with."""

    count: int = 1
    errors: dict[str, int] = field(default_factory=dict)
    sessions: int = 0

    NVMLError = pynvml.NVMLError
    NVMLError_LibraryNotFound = pynvml.NVMLError_LibraryNotFound
    NVMLError_DriverNotLoaded = pynvml.NVMLError_DriverNotLoaded
    NVMLError_NotSupported = pynvml.NVMLError_NotSupported
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    NVML_VOLATILE_ECC = pynvml.NVML_VOLATILE_ECC

    def _answer(self, name: str, answer: Any) -> Any:
        if name in self.errors:
            raise pynvml.NVMLError(self.errors[name])
        return answer

    def nvmlInit(self) -> None:
        self._answer("nvmlInit", None)
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.sessions -= 1
        self._answer("nvmlShutdown", None)

    def nvmlSystemGetDriverVersion(self) -> str:
        return self._answer("nvmlSystemGetDriverVersion", RTX.driver)

    def nvmlDeviceGetCount(self) -> int:
        return self._answer("nvmlDeviceGetCount", self.count)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:
        return self._answer(f"nvmlDeviceGetHandleByIndex {index}", f"handle {index}")

    def nvmlDeviceGetName(self, handle: object) -> str:
        return self._answer("nvmlDeviceGetName", RTX.name)

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> SimpleNamespace:
        return self._answer("nvmlDeviceGetMemoryInfo", SimpleNamespace(total=RTX.memory, free=RTX.free))

    def nvmlDeviceGetCudaComputeCapability(self, handle: object) -> tuple[int, int]:
        return self._answer("nvmlDeviceGetCudaComputeCapability", RTX.capability)

    def nvmlDeviceGetUUID(self, handle: object) -> str:
        return self._answer("nvmlDeviceGetUUID", RTX.uuid)

    def nvmlDeviceGetTotalEccErrors(self, handle: object, kind: int, counter: int) -> int:
        uncorrected, volatile = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        return self._answer(
            "nvmlDeviceGetTotalEccErrors", RTX.ecc_uncorrected * ((kind, counter) == (uncorrected, volatile))
        )


FUNCTIONS = sorted(name for name in vars(Driver) if name.startswith("nvml"))


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    """A mount of control groups; the process is in /machine.slice/box."""
    (tmp_path / "own").write_text("4:memory:/old\n0::/machine.slice/box\n")
    mount = tmp_path / "mount"
    (mount / "machine.slice" / "box").mkdir(parents=True)
    return mount


# ---------------------------------------------------------------- this machine


def test_this_machine_is_described_as_it_is() -> None:
    told = describe(CPU_TORCH)

    assert told.torch == CPU_TORCH
    assert 1 <= told.cores <= (os.cpu_count() or 1)
    assert 0 < told.memory <= psutil.virtual_memory().total
    assert told.python == sys.version.split()[0]
    assert told.system.split("-")[0] == os.uname().sysname
    assert told.hostname == os.uname().nodename
    assert told.cpu
    assert Hardware.model_validate_json(told.model_dump_json()) == told


def test_what_was_not_found_is_said_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if nvidia-ml-py were not installed
    with caplog.at_level(logging.INFO, "lydian.worker"):
        told = describe(CPU_TORCH)

    assert told.gpus == ()
    assert "nvidia-ml-py is not installed" in caplog.text


def test_cores_are_those_that_this_process_may_run_on() -> None:
    one_core = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})"
    script = f"{one_core}; from worker.hardware import usable_cores; print(usable_cores())"
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert told.stdout == "1\n"


def test_a_system_without_affinity_has_all_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(hardware, "cpu_quotas", list)
    assert usable_cores() == os.cpu_count()


def test_torch_is_not_imported_to_know_the_machine() -> None:
    script = "import sys, worker.hardware as h; h.inventory(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


# ---------------------------------------------------------------- control groups


def test_the_tightest_quota_around_the_process_bounds_its_cores(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cgroup / "machine.slice" / "box" / "cpu.max").write_text("max 100000\n")
    (cgroup / "machine.slice" / "cpu.max").write_text("150000 100000\n")
    (cgroup / "cpu.max").write_text("400000 100000\n")
    quotas = cpu_quotas(cgroup.parent / "own", cgroup)
    monkeypatch.setattr(hardware, "cpu_quotas", lambda: quotas)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))

    assert quotas == [1.5, 4.0]
    assert usable_cores() == 2  # one and a half keep two threads busy


def test_a_memory_limit_bounds_the_memory(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cgroup / "machine.slice" / "box" / "memory.max").write_text(f"{1 << 20}\n")
    (cgroup / "machine.slice" / "memory.max").write_text("max\n")
    limits = memory_limits(cgroup.parent / "own", cgroup)
    monkeypatch.setattr(hardware, "memory_limits", lambda: limits)

    assert limits == [1 << 20]
    assert hardware.usable_memory() == 1 << 20


def test_in_a_container_the_mount_itself_is_the_group(cgroup: Path) -> None:
    (cgroup.parent / "own").write_text("0::/docker/0123456789abcdef\n")  # the host's path, which is not there
    (cgroup / "cpu.max").write_text("50000 100000\n")

    assert cpu_quotas(cgroup.parent / "own", cgroup) == [0.5]


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert cpu_quotas(tmp_path / "absent", tmp_path) == []
    (tmp_path / "own").write_text("1:cpu:/\n")  # version 1 alone
    assert memory_limits(tmp_path / "own", tmp_path) == []


@given(text=st.text(max_size=30) | st.sampled_from(["max 100000", "0 100000", "5 0", "", "-1 100000", "1 2 3"]))
def test_whatever_a_limit_says_at_least_one_core_is_left(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    mount = tmp_path_factory.getbasetemp() / "limits"
    mount.mkdir(exist_ok=True)
    (mount / "own").write_text("0::/\n")
    (mount / "cpu.max").write_text(text, encoding="utf-8")
    quotas = cpu_quotas(mount / "own", mount)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "cpu_quotas", lambda: quotas)
        assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
    assert all(math.isfinite(quota) and quota >= 0 for quota in quotas)


# ---------------------------------------------------------------- the processor


def test_the_processor_has_its_model_name(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: AMD EPYC: the 2nd\n\nprocessor\t: 1\nmodel name\t: other\n")

    assert cpu_name(path) == ("AMD EPYC: the 2nd", "")


@pytest.mark.parametrize("content", [None, "", "processor\t: 0\nBogoMIPS\t: 50.00\n", "model name\t:\n"])
def test_a_processor_without_a_model_name_is_its_architecture_and_that_is_said(
    tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "cpuinfo"
    if content is not None:
        path.write_text(content)
    name, why = cpu_name(path)

    assert name
    assert name in why
    assert str(path) in why


# ---------------------------------------------------------------- GPUs


def none(missing: str, why: str) -> GpuInventory:
    return GpuInventory.model_validate({"missing": missing, "reason": f"no NVIDIA GPU is shown: {why}"})


@pytest.mark.skipif(driver_is_here(), reason="this machine has an NVIDIA driver")
def test_a_machine_without_a_driver_has_no_gpu_and_a_reason() -> None:
    assert inventory() == none("no_driver", "its driver is not installed")


@pytest.mark.skipif(not driver_is_here(), reason="this machine has no NVIDIA driver")
def test_a_machine_with_a_driver_tells_its_gpus() -> None:
    found = inventory()

    assert found.gpus or found.missing
    assert all(gpu.memory > 0 and gpu.name != "unknown" and gpu.driver[0].isdigit() for gpu in found.gpus)


def test_without_nvidia_ml_py_there_is_no_gpu_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert inventory() == none("no_library", "nvidia-ml-py is not installed")


def test_the_stand_in_offers_nothing_that_pynvml_does_not() -> None:
    real = importlib.import_module("pynvml")
    assert [name for name in FUNCTIONS if not callable(getattr(real, name, None))] == []


def test_every_gpu_is_told_and_the_session_ends() -> None:
    driver = Driver(count=2)

    assert inventory(driver) == GpuInventory(gpus=(RTX, RTX.model_copy(update={"index": 1})))
    assert driver.sessions == 0


@pytest.mark.parametrize(
    ("code", "missing", "said"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no_driver", "not installed"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "not_loaded", "not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "no_answer", "its driver answers"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "no_answer", "Insufficient Permissions"),
    ],
)
def test_a_driver_that_does_not_start_leaves_no_gpu_and_a_reason(code: int, missing: str, said: str) -> None:
    found = inventory(Driver(errors={"nvmlInit": code}))

    assert (found.gpus, found.missing) == ((), missing)
    assert said in found.reason


def test_a_driver_without_gpus_says_so() -> None:
    assert inventory(Driver(count=0)) == none("no_device", "its driver has none")


@pytest.mark.parametrize(
    ("function", "changed"),
    [
        ("nvmlSystemGetDriverVersion", {"driver": "unknown"}),
        ("nvmlDeviceGetName", {"name": "unknown"}),
        ("nvmlDeviceGetMemoryInfo", {"memory": 0, "free": None}),
        ("nvmlDeviceGetCudaComputeCapability", {"capability": None}),
        ("nvmlDeviceGetUUID", {"uuid": ""}),
        ("nvmlDeviceGetTotalEccErrors", {"ecc_uncorrected": 0}),
    ],
)
def test_a_field_that_the_driver_does_not_have_costs_this_field_alone(function: str, changed: dict[str, Any]) -> None:
    found = inventory(Driver(errors={function: pynvml.NVML_ERROR_UNKNOWN}))

    assert found.gpus == (RTX.model_copy(update=changed),)
    assert "does not tell" in found.reason
    assert "Unknown" in found.reason


def test_a_gpu_that_shares_the_machines_memory_has_the_machines_memory() -> None:
    found = inventory(Driver(errors={"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED}))
    shared = RTX.model_copy(update={"memory": psutil.virtual_memory().total, "free": None})

    assert found == GpuInventory(gpus=(shared,))


def test_a_gpu_that_does_not_count_memory_errors_has_none() -> None:
    found = inventory(Driver(errors={"nvmlDeviceGetTotalEccErrors": pynvml.NVML_ERROR_NOT_SUPPORTED}))
    assert found == GpuInventory(gpus=(RTX.model_copy(update={"ecc_uncorrected": 0}),))


def test_a_gpu_that_fell_off_the_bus_does_not_hide_the_others() -> None:
    found = inventory(Driver(count=3, errors={"nvmlDeviceGetHandleByIndex 1": pynvml.NVML_ERROR_GPU_IS_LOST}))

    assert [gpu.index for gpu in found.gpus] == [0, 2]
    assert "GPU 1 (GPU is lost)" in found.reason


@given(
    count=st.integers(0, 3),
    errors=st.dictionaries(
        st.sampled_from([*FUNCTIONS, "nvmlDeviceGetHandleByIndex 0", "nvmlDeviceGetHandleByIndex 1"]),
        st.sampled_from([code for code in vars(pynvml) if code.startswith("NVML_ERROR_")]).map(
            vars(pynvml).__getitem__
        ),
    ),
)
def test_no_answer_of_a_driver_keeps_a_worker_from_registering(count: int, errors: dict[str, int]) -> None:
    driver = Driver(count, errors)
    found = inventory(driver)

    assert len(found.gpus) <= count
    assert bool(found.gpus) == (not found.missing)
    assert found.gpus or found.reason
    assert driver.sessions == 0


# ---------------------------------------------------------------- what lies idle


@pytest.mark.parametrize(
    ("device", "gpus", "said"),
    [
        ("cpu", (RTX, RTX), False),
        ("cuda:0", (RTX, RTX), False),
        ("cuda", (RTX,), False),
        ("cuda", (RTX, RTX), True),
    ],
)
def test_gpus_that_lie_idle_are_named_with_the_way_to_use_them(device: str, gpus: tuple[Gpu, ...], said: bool) -> None:
    sentence = idle_gpus(device, gpus)

    assert ("one of 2 GPUs" in sentence, "--device cuda:all" in sentence) == (said, said)
