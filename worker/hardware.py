"""What this machine is: processor, memory and GPUs, as a registration tells it. Imports no torch and decides nothing.

What torch itself knows comes from the child that trains (TorchBuild); what drivers and the system know is asked here. A
part that cannot be found is left out, and the reason goes to the log: no GPU, library or driver is an error here.
"""

import contextlib
import importlib
import logging
import math
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped]

from common.messages import Gpu, Hardware, TorchBuild

log = logging.getLogger("lydian.worker")

T = TypeVar("T")

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/proc/self/cgroup")
CGROUP_MOUNT = Path("/sys/fs/cgroup")


def describe(torch: TorchBuild, device: str) -> Hardware:
    """This machine as a worker registers it. Logs what could not be found and why.

    Args:
        torch: what the child that trains said about its torch.
        device: the device it trains on, e.g. cpu, cuda:1.
    """
    gpus, no_gpus = gpus_by_nvml()
    cpu, no_cpu = cpu_name()
    for why in (no_gpus, no_cpu, unused_gpus(torch, device, gpus)):
        if why:
            log.info("%s", why)
    log.info("%s", abilities(torch))
    return Hardware(
        hostname=platform.node() or "unknown",
        system=f"{platform.system()}-{platform.release()}-{platform.machine()}",
        python=platform.python_version(),
        cpu=cpu,
        cores=usable_cores(),
        memory=usable_memory(),
        gpus=gpus,
        torch=torch,
    )


def abilities(torch: TorchBuild) -> str:
    """One line on what the device can do, and why not more."""
    name = f"{torch.device} ({torch.name})" if torch.name else torch.device
    compiles = "works" if torch.compiles else "cannot work"
    best = f"precision auto is {torch.precision} ({torch.precision_reason})"
    return f"torch {torch.version} on {name}: {best}; torch.compile {compiles} ({torch.compiles_reason})"


def usable_cores() -> int:
    """CPU cores that this process may use: its affinity, and the CPU quota of its control group, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota) for quota in cpu_quotas())]))


def usable_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or the limit of its control group."""
    return min([int(psutil.virtual_memory().total), *memory_limits()])


def cpu_name(cpuinfo: Path = CPUINFO) -> tuple[str, str]:
    """The processor's name, and why it is only its architecture where the system does not tell."""
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip(), ""
    name = platform.processor() or platform.machine() or "unknown"
    return name, f"the processor is shown as {name}: {cpuinfo} has no model name"


def unused_gpus(torch: TorchBuild, device: str, gpus: tuple[Gpu, ...]) -> str:
    """A sentence when GPUs lie idle and nobody chose that; empty otherwise."""
    if device == "cuda" and len(gpus) > 1:
        return f"training on one of {len(gpus)} GPUs: `--device cuda:all` has one worker train on all of them"
    if device != "cpu" or not gpus:
        return ""
    build = f"built for CUDA {torch.cuda}" if torch.cuda else "built without CUDA"
    names = ", ".join(gpu.name for gpu in gpus)
    return f"training on the CPU beside {names}: torch {torch.version} is {build}; `lydian doctor` says what fits"


# ---------------------------------------------------------------- GPUs


def gpus_by_nvml(nvml: Any = None) -> tuple[tuple[Gpu, ...], str]:  # noqa: ANN401 - pynvml has no types
    """The NVIDIA GPUs of this machine in the order of the PCI bus, as their driver reports them.

    CUDA may count them in another order, and sees only those that CUDA_VISIBLE_DEVICES leaves it.

    Args:
        nvml: the module pynvml, unless the caller brings another.

    Returns:
        The GPUs, and why there are none or what of them is not known; empty when all is.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return (), "no NVIDIA GPU is shown: nvidia-ml-py is not installed"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return (), f"no NVIDIA GPU is shown: {_no_session(nvml, error)}"
    try:
        return _read_gpus(nvml)
    finally:
        try:
            nvml.nvmlShutdown()
        except nvml.NVMLError as error:
            log.info("the NVIDIA driver did not end the session: %s", error)


def _no_session(nvml: Any, error: Exception) -> str:  # noqa: ANN401
    if isinstance(error, nvml.NVMLError_LibraryNotFound):
        return "its driver is not installed"
    if isinstance(error, nvml.NVMLError_DriverNotLoaded):
        return "its driver is installed and not loaded"
    return f"its driver answers {error}"


def _read_gpus(nvml: Any) -> tuple[tuple[Gpu, ...], str]:  # noqa: ANN401
    unknown: list[str] = []

    def ask(what: str, question: Callable[..., T], *about: object, otherwise: T) -> T:
        """One answer of the driver. One that it does not have costs this field alone."""
        try:
            return question(*about)
        except nvml.NVMLError as error:
            unknown.append(f"{what} ({error})")
            return otherwise

    def gpu_memory(handle: object) -> int:
        try:
            return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
        except nvml.NVMLError_NotSupported:  # a GPU without memory of its own shares the machine's, such as a GB10
            return int(psutil.virtual_memory().total)

    driver: str = ask("its version", nvml.nvmlSystemGetDriverVersion, otherwise="unknown")
    gpus = []
    for index in range(ask("the number of GPUs", nvml.nvmlDeviceGetCount, otherwise=0)):
        handle: object = ask(f"GPU {index}", nvml.nvmlDeviceGetHandleByIndex, index, otherwise=None)
        if handle is None:
            continue
        name: str = ask(f"the name of GPU {index}", nvml.nvmlDeviceGetName, handle, otherwise="unknown")
        memory = ask(f"the memory of GPU {index}", gpu_memory, handle, otherwise=0)
        capability: tuple[int, int] | None = ask(
            f"the compute capability of GPU {index}", nvml.nvmlDeviceGetCudaComputeCapability, handle, otherwise=None
        )
        gpus.append(Gpu(index=index, name=name, memory=memory, driver=driver, capability=capability))
    if unknown:
        return tuple(gpus), f"the NVIDIA driver does not tell {', '.join(unknown)}"
    return tuple(gpus), "" if gpus else "no NVIDIA GPU is shown: its driver has none"


# ---------------------------------------------------------------- control groups


def cpu_quotas(own: Path = CGROUP, mount: Path = CGROUP_MOUNT) -> list[float]:
    """CPU cores, as fractions, that the control groups around this process allow; none where there is no limit."""
    quotas = []
    for text in _limits("cpu.max", own, mount):
        match text.split():
            case [microseconds, period] if microseconds.isdecimal() and period.isdecimal() and int(period):
                quotas.append(int(microseconds) / int(period))
    return quotas


def memory_limits(own: Path = CGROUP, mount: Path = CGROUP_MOUNT) -> list[int]:
    """Bytes of memory that the control groups around this process allow; none where there is no limit."""
    return [int(text) for text in _limits("memory.max", own, mount) if text.strip().isdecimal()]


def _limits(name: str, own: Path, mount: Path) -> Iterator[str]:
    """The contents of a limit's file in this process's control group (version 2) and in those around it.

    In a container the path may be the host's, which is not there; the container's own group is then the mount itself.
    """
    try:
        lines = own.read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        if line.startswith("0::/"):
            group = mount / line.removeprefix("0::/")
            for folder in (group, *group.parents):
                with contextlib.suppress(OSError):  # no such group, or no limit of this kind there
                    yield (folder / name).read_text()
                if folder == mount:
                    break
