"""The device that the child trains on: which one, whether it works, what it can do, and what memory it has left.

Part of the child (worker/task_host.py), which loads it by its path: torch, none of our packages. `torch.accelerator` is
asked where this torch has it, and the module of the device's kind where not (2.7 has no memory functions there).
"""

import gc
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
CGROUP = Path("/proc/self/cgroup")
CGROUP_MOUNT = Path("/sys/fs/cgroup")
UNKNOWN_FREE = 1 << 30  # bytes that a system which does not tell is taken to have free


class BrokenDeviceError(Exception):
    """The device does not work with this torch; the sentence says which card, which build, what the driver said."""


# ---------------------------------------------------------------- which one, and whether it works


def pick_device(asked: str) -> torch.device:
    """The device to train on; `auto` is the accelerator that torch finds, else the CPU.

    Raises:
        RuntimeError: no such kind of device.
    """
    if asked != "auto":
        return torch.device(asked)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.xpu.is_available():
        return torch.device("xpu")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def run_kernel(device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Run one small matrix product and its gradient on the device, and wait for them.

    The numbers are whole and small, so that they are exact in every dtype. A[i, j] is j mod 3 and B all ones: each of
    the 64 numbers of A B is 7, and the gradient of their sum by each of A's is 8.

    Raises:
        RuntimeError: the device does not work with this torch, or computes wrong numbers.
        AssertionError: this torch was built without that kind of device.
    """
    row = torch.arange(8, device=device, dtype=torch.float32).remainder(3).to(dtype)
    a = row.expand(8, 8).clone().requires_grad_()
    product = a @ torch.ones(8, 8, device=device, dtype=dtype)
    product.float().sum().backward()  # type: ignore[no-untyped-call]
    gradient = a.grad
    assert gradient is not None  # noqa: S101 - backward() made it
    found = float(product.detach().float().sum()), float(gradient.float().sum())
    if found != (448.0, 512.0):
        sentence = (
            f"a matrix product on {device} came out wrong in {dtype}: {found[0]:g} and a gradient of {found[1]:g}"
        )
        raise RuntimeError(f"{sentence} instead of 448 and 512")


def working_dtypes(device: torch.device) -> tuple[str, ...]:
    """In which precisions a matrix product and its gradient come out right on the device."""
    works = []
    for name, dtype in DTYPES.items():
        try:
            run_kernel(device, dtype)
        except (RuntimeError, TypeError):  # there is no such kernel, or no such dtype on this kind of device
            continue
        works.append(name)
    return tuple(works)


def ready_device(asked: str, threads: int, rules: ModuleType) -> tuple[torch.device, dict[str, Any]]:
    """Set torch up for the device and try it.

    Args:
        asked: cpu, cuda, cuda:N, mps, xpu or auto.
        threads: CPU threads to compute with; 0 leaves torch's choice.
        rules: worker/task_precision.py.

    Returns:
        the device, and what hello says about this torch (messages.TorchBuild).

    Raises:
        BrokenDeviceError: the device does not work.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once; without it cuBLAS is not deterministic
    if threads:
        torch.set_num_threads(threads)
    try:
        device = pick_device(asked)
        run_kernel(device)
    except (RuntimeError, AssertionError) as error:
        raise BrokenDeviceError(broken_device(asked, error)) from error
    return device, build_of(device, rules)


def broken_device(asked: str, error: BaseException) -> str:
    """One sentence on a device that does not work: which card, which build, what the driver said."""
    card = asked
    kind, _, number = asked.partition(":")
    if kind in {"cuda", "auto"} and torch.cuda.is_available():
        index = int(number) if number.isdigit() else 0
        if index < torch.cuda.device_count():
            major, minor = torch.cuda.get_device_capability(index)
            card = f"{asked} ({torch.cuda.get_device_name(index)}, sm_{major}{minor})"
    kernels = " ".join(torch.cuda.get_arch_list()) or "no GPU that it can see"
    build = f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}, kernels for {kernels})"
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"device {card} does not work with {build}: {said}; --device cpu always works"


# ---------------------------------------------------------------- what it is


def build_of(device: torch.device, rules: ModuleType) -> dict[str, Any]:
    """What hello says: this torch, its device, what works there and what would be chosen."""
    facts = facts_of(device, rules)
    precision, reason = rules.best(facts)
    triton = importlib.util.find_spec("triton") is not None
    compiles, why = rules.compiles(facts, triton=triton, compiler=cpp_compiler())
    free, total = memory(device)
    return {
        "version": torch.__version__,
        "device": str(device),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "architectures": torch.cuda.get_arch_list(),
        "threads": torch.get_num_threads(),
        "name": device_name(device),
        "capability": facts.capability,
        "memory": total,
        "free": free,
        "dtypes": tuple(facts.works),
        "precision": precision,
        "precision_reason": reason,
        "opacus": installed_version("opacus"),
        "compiles": compiles,
        "compiles_reason": why,
    }


def installed_version(package: str) -> str:
    """The version of a package, which is not imported; empty: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def facts_of(device: torch.device, rules: ModuleType) -> Any:  # noqa: ANN401 - a task_precision.Device
    """What the choice of a precision rests on."""
    works = working_dtypes(device)
    if device.type == "cuda":
        if torch.version.hip:
            name = str(getattr(torch.cuda.get_device_properties(device), "gcnArchName", ""))
            return rules.Device("rocm", architecture=name.partition(":")[0], works=works)
        return rules.Device("cuda", capability=torch.cuda.get_device_capability(device), works=works)
    features = cpu_features() if device.type == "cpu" else frozenset()
    return rules.Device(device.type, features=features, works=works)


def device_name(device: torch.device) -> str:
    """The card's name as its driver has it; empty for a device without one."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    return ""


def cpu_features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """The flags of this machine's first processor; none where the system does not tell."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def cpp_compiler() -> str:
    """The C++ compiler that torch would take; empty where there is none."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl"):
        if name and (found := shutil.which(name)):
            return found
    return ""


# ---------------------------------------------------------------- its memory


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes (free, in all) of the device, for this process: what torch holds and does not use counts as used."""
    if device.type == "cpu":
        return cpu_memory()
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return max(total - torch.mps.driver_allocated_memory(), 0), total
    for owner in (getattr(torch, "accelerator", None), module_of(device)):
        for name in ("get_memory_info", "mem_get_info"):
            ask = getattr(owner, name, None)
            if ask is not None:
                free, total = ask(device)
                return int(free), int(total)
    return 0, int(module_of(device).get_device_properties(device).total_memory)


def module_of(device: torch.device) -> Any:  # noqa: ANN401 - torch.cuda, torch.xpu …
    """The module of torch for this kind of device."""
    return getattr(torch, device.type)


def cpu_memory(meminfo: Path = MEMINFO, own: Path = CGROUP, mount: Path = CGROUP_MOUNT) -> tuple[int, int]:
    """Bytes (free, in all) of main memory that this process may use: the machine's, or what its control group leaves.

    What the page cache holds counts as free, as the system counts it.
    """
    total = free = 0
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:  # not Linux
        return UNKNOWN_FREE, UNKNOWN_FREE
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemTotal":
            total = int(value.split()[0]) * 1024
        elif name == "MemAvailable":
            free = int(value.split()[0]) * 1024
    for limit, used in group_limits(own, mount):
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return free, total


def group_limits(own: Path, mount: Path) -> Iterator[tuple[int, int]]:
    """(limit, in use) in bytes of each control group (version 2) around this process that has a limit."""
    try:
        lines = own.read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        if not line.startswith("0::/"):
            continue
        group = mount / line.removeprefix("0::/")
        for folder in (group, *group.parents):
            try:
                limit, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text()
            except OSError:  # no such group here, or the root, which has no limit
                limit, used = "max", "0"
            if limit.isdecimal():
                yield int(limit), int(used)
            if folder == mount:
                break


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        module_of(device).synchronize(device)


def give_back_memory(device: torch.device) -> None:
    """Give back to the device what nothing holds any more."""
    gc.collect()
    if device.type != "cpu":
        module_of(device).empty_cache()


class Meter:
    """The most memory that this process held on the device since `begin`."""

    def __init__(self, device: torch.device, status: Path = STATUS, forget: Path = CLEAR_REFS) -> None:
        """Measures nothing yet.

        Args:
            device: the one that trains.
            status: where Linux tells what memory the process has and had.
            forget: where it is told to forget the latter.
        """
        self._device, self._status, self._forget = device, status, forget

    def begin(self) -> int | None:
        """Forget what was. Returns the bytes that are held now; None: this system does not tell."""
        if self._device.type == "cpu":
            try:
                self._forget.write_text("5")  # proc_pid_clear_refs(5): resets the peak resident set size
            except OSError:
                return None
            return self._resident("VmRSS")
        if self._device.type == "mps":
            return torch.mps.driver_allocated_memory()
        module = module_of(self._device)
        module.reset_peak_memory_stats(self._device)
        return int(module.memory_allocated(self._device))

    def peak(self) -> int | None:
        """The most bytes that were held since; None: this system does not tell."""
        if self._device.type == "cpu":
            return self._resident("VmHWM")
        if self._device.type == "mps":  # it keeps what it had
            return torch.mps.driver_allocated_memory()
        return int(module_of(self._device).max_memory_allocated(self._device))

    def _resident(self, name: str) -> int | None:
        try:
            lines = self._status.read_text().splitlines()
        except OSError:  # not Linux
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the device or in the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # These say it only in words: two allocators of torch, and that of mps.
    words = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory")
    return isinstance(error, RuntimeError) and any(part in str(error) for part in words)
