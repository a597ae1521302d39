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

from common.messages import Gpu, GpuInventory, Hardware, NoGpu, TorchBuild

log = logging.getLogger("lydian.worker")

T = TypeVar("T")

REASON_LIMIT = 1_000  # characters, as messages.Hardware takes them

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/proc/self/cgroup")
CGROUP_MOUNT = Path("/sys/fs/cgroup")


def describe(torch: TorchBuild, found: GpuInventory | None = None, device_reason: str = "") -> Hardware:
    """This machine as a worker registers it. Logs what could not be found and why.

    Args:
        torch: what the child that trains said about its torch.
        found: the GPUs, where they were asked for before the child took memory of one; None: they are asked for now.
        device_reason: why the child does not train on a GPU that is there.
    """
    found = found or inventory()
    cpu, no_cpu = cpu_name()
    for why in (found.reason, no_cpu, idle_gpus(torch.device, found.gpus)):
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
        gpus=found.gpus,
        torch=torch,
        device_reason=device_reason[:REASON_LIMIT],
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


def idle_gpus(device: str, gpus: tuple[Gpu, ...]) -> str:
    """A sentence when GPUs lie idle and nobody chose that; empty otherwise."""
    if device != "cuda" or len(gpus) < 2:
        return ""
    return f"training on one of {len(gpus)} GPUs: `--device cuda:all` has one worker train on all of them"


# ---------------------------------------------------------------- GPUs


def inventory(nvml: Any = None) -> GpuInventory:  # noqa: ANN401 - pynvml has no types
    """The NVIDIA GPUs of this machine in the order of the PCI bus, as their driver reports them.

    The child counts them in the same order (worker.child), and sees those that CUDA_VISIBLE_DEVICES leaves it.

    Args:
        nvml: the module pynvml, unless the caller brings another.

    Returns:
        The GPUs, and why there are none or what of them is not known; no reason when all is.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return _none("no_library", "nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return _no_session(nvml, error)
    try:
        return _read_gpus(nvml)
    finally:
        try:
            nvml.nvmlShutdown()
        except nvml.NVMLError as error:
            log.info("the NVIDIA driver did not end the session: %s", error)


def _none(missing: NoGpu, why: str) -> GpuInventory:
    return GpuInventory(missing=missing, reason=f"no NVIDIA GPU is shown: {why}")


def _no_session(nvml: Any, error: Exception) -> GpuInventory:  # noqa: ANN401
    if isinstance(error, nvml.NVMLError_LibraryNotFound):
        return _none("no_driver", "its driver is not installed")
    if isinstance(error, nvml.NVMLError_DriverNotLoaded):
        return _none("not_loaded", "its driver is installed and not loaded")
    return _none("no_answer", f"its driver answers {error}")


def _read_gpus(nvml: Any) -> GpuInventory:  # noqa: ANN401
    unknown: list[str] = []

    def ask(what: str, question: Callable[..., T], *about: object, otherwise: T) -> T:
        """One answer of the driver. One that it does not have costs this field alone."""
        try:
            return question(*about)
        except nvml.NVMLError as error:
            unknown.append(f"{what} ({error})")
            return otherwise

    driver: str = ask("its version", nvml.nvmlSystemGetDriverVersion, otherwise="unknown")
    gpus = []
    for index in range(ask("the number of GPUs", nvml.nvmlDeviceGetCount, otherwise=0)):
        handle: object = ask(f"GPU {index}", nvml.nvmlDeviceGetHandleByIndex, index, otherwise=None)
        if handle is None:
            continue
        name: str = ask(f"the name of GPU {index}", nvml.nvmlDeviceGetName, handle, otherwise="unknown")
        unseen: tuple[int, int | None] = (0, None)
        memory, free = ask(f"the memory of GPU {index}", _memory, nvml, handle, otherwise=unseen)
        capability: tuple[int, int] | None = ask(
            f"the compute capability of GPU {index}", nvml.nvmlDeviceGetCudaComputeCapability, handle, otherwise=None
        )
        uuid: str = ask(f"the UUID of GPU {index}", nvml.nvmlDeviceGetUUID, handle, otherwise="")
        errors = ask(f"the memory errors of GPU {index}", _ecc_uncorrected, nvml, handle, otherwise=0)
        gpus.append(
            Gpu(
                index=index,
                name=name,
                memory=memory,
                driver=driver,
                capability=capability,
                uuid=uuid,
                free=free,
                ecc_uncorrected=errors,
            )
        )
    if unknown:
        what = f"the NVIDIA driver does not tell {', '.join(unknown)}"
        return GpuInventory(gpus=tuple(gpus), missing="" if gpus else "no_answer", reason=what)
    return GpuInventory(gpus=tuple(gpus)) if gpus else _none("no_device", "its driver has none")


def _memory(nvml: Any, handle: object) -> tuple[int, int | None]:  # noqa: ANN401
    """Bytes of a GPU's memory, and how many of them are free; None where that is not known."""
    try:
        told = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:  # a GPU without memory of its own shares the machine's, such as a GB10
        return int(psutil.virtual_memory().total), None
    return int(told.total), int(told.free)


def _ecc_uncorrected(nvml: Any, handle: object) -> int:  # noqa: ANN401
    """Memory errors since the driver was loaded that could not be mended; 0 for a card that does not count them."""
    try:
        kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        return int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, since))
    except nvml.NVMLError_NotSupported:
        return 0


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
