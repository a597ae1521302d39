"""The machine at the moment of a failure: versions, and what each GPU held, as a person would look up by hand.

Asked when an attempt has failed, never before, and in no more than a few calls of the driver. What is not told is left
out, and a driver that hangs, which may be why the attempt failed, is not waited for: a failure is reported without its
scene rather than not at all.
"""

import importlib
import platform
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from common.messages import GpuThen, Scene, TorchBuild

T = TypeVar("T")
PATIENCE_S = 5.0  # for all answers of the driver together
GPUS = 64  # at most, as messages.Scene takes them


def scene_now(torch: TorchBuild | None, nvml: Any = None) -> Scene:  # noqa: ANN401 - pynvml has no types
    """The machine now.

    Args:
        torch: what the child said of its torch; None: it had not come so far.
        nvml: the module pynvml, unless the caller brings another.
    """
    driver, gpus, why = _gpus_in_time(nvml)
    return Scene(
        python=platform.python_version()[:100],
        system=f"{platform.system()}-{platform.release()}-{platform.machine()}"[:200],
        torch=torch,
        driver=driver,
        gpus=gpus,
        no_gpus=why[:1_000],
    )


def _gpus_in_time(nvml: Any) -> tuple[str, tuple[GpuThen, ...], str]:  # noqa: ANN401
    """As `_gpus`, from a thread that is left behind where the driver does not answer."""
    told: queue.Queue[tuple[str, tuple[GpuThen, ...], str]] = queue.Queue()
    threading.Thread(target=lambda: told.put(_gpus(nvml)), name="scene", daemon=True).start()
    try:
        return told.get(timeout=PATIENCE_S)
    except queue.Empty:
        return "", (), f"the NVIDIA driver has not answered within {PATIENCE_S:g} s"


def _gpus(nvml: Any) -> tuple[str, tuple[GpuThen, ...], str]:  # noqa: ANN401
    """The driver's version, the GPUs as they are, and why there is none or what is not known."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return "", (), "nvidia-ml-py is not installed"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return "", (), f"the NVIDIA driver gives no session: {error or type(error).__name__}"
    unknown: list[str] = []

    def ask(what: str, question: Callable[[], T], otherwise: T) -> T:
        """One answer of the driver. One that it does not have costs this field alone."""
        try:
            return question()
        except (nvml.NVMLError, AttributeError) as error:  # an older nvidia-ml-py lacks a question
            unknown.append(f"{what} ({error or type(error).__name__})")
            return otherwise

    try:
        driver = str(ask("its version", nvml.nvmlSystemGetDriverVersion, ""))
        count = ask("the number of GPUs", nvml.nvmlDeviceGetCount, 0)
        found = [_gpu(nvml, index, ask) for index in range(min(count, GPUS))]
    finally:
        ask("the end of the session", nvml.nvmlShutdown, None)
    why = f"the NVIDIA driver does not tell {', '.join(unknown)}" if unknown else ""
    return driver[:100], tuple(gpu for gpu in found if gpu is not None), why


def _gpu(nvml: Any, index: int, ask: Callable[[str, Callable[[], Any], Any], Any]) -> GpuThen | None:  # noqa: ANN401
    handle = ask(f"GPU {index}", lambda: nvml.nvmlDeviceGetHandleByIndex(index), None)
    if handle is None:
        return None
    memory = ask(f"the memory of GPU {index}", lambda: nvml.nvmlDeviceGetMemoryInfo(handle), None)
    busy = ask(f"how busy GPU {index} is", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu, None)
    heat = ask(
        f"the temperature of GPU {index}",
        lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        None,
    )
    name = ask(f"the name of GPU {index}", lambda: nvml.nvmlDeviceGetName(handle), "unknown")
    return GpuThen(
        index=index,
        name=str(name)[:200],
        memory=int(memory.total) if memory else 0,
        free=int(memory.free) if memory else None,
        busy=None if busy is None else min(1.0, busy / 100),
        temperature=None if heat is None else float(heat),
        processes=ask(
            f"the processes of GPU {index}", lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)), None
        ),
    )
