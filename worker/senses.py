"""What the lookout sees: who else uses this machine, how warm the device is, what it draws, what memory is in use.

Asks the system (psutil) and, for a GPU, its driver (NVML), only for what a rule of the owner's needs. Decides nothing,
but that a rule which can never be kept here is refused at the start, and that what cannot be measured later is said.

"Others" are all processes but the agent and what it started. On a GPU they are those that compute on it, and those
that draw on it (a game, not a desktop that stands still) where the driver tells how busy they keep it. In a container
without the host's process ids the driver may show none of them.
"""

import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]

from common.errors import LydianError
from worker.manners import Measured, Rules, gigabytes

log = logging.getLogger("lydian.worker")

DRAWS_FROM = 10  # percent of a GPU's time from which a process that draws counts as using it
NAMED = 3  # other processes that a reason names; the rest are counted
CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")  # of the Linux kernel, for the processor


def watching(device: str, rules: Rules) -> Callable[[], Measured]:
    """What measures this machine for these rules.

    Args:
        device: that the worker trains on, as torch names it.
        rules: the owner's.

    Raises:
        LydianError: a rule needs what cannot be measured here (cannot_watch).
    """
    if not rules.measuring:
        return Measured
    senses = Senses(device, rules)
    senses.check()
    return senses.measure


class Senses:
    """The senses of one worker. Not for several threads at once."""

    def __init__(self, device: str, rules: Rules, nvml: Any = None) -> None:  # noqa: ANN401 - pynvml has no types
        """Opens a session with the GPU's driver where the device is one of its GPUs; it ends with the process.

        Args:
            device: as torch names it.
            rules: what need not be known is not asked.
            nvml: the module pynvml, unless the caller brings another.
        """
        self._rules = rules
        self._processor = _Processor()
        self._gpu, self._no_gpu = _open_gpu(device, nvml)
        self._device = device
        if rules.only_idle and self._gpu is None:
            log.info("only the processor's load says whether this machine is idle: %s", self._no_gpu)

    def check(self) -> None:
        """Make sure that what the rules ask for can be measured here.

        Raises:
            LydianError: it cannot (cannot_watch).
        """
        rules, seen = self._rules, self.measure()
        wanted = {"power": (rules.max_power, seen.power), "temperature": (rules.max_temperature, seen.temperature)}
        for what, (limit, value) in wanted.items():
            if limit is not None and value is None:
                raise LydianError(
                    f"--max-{what} cannot be kept: the {what} of {seen.device} is not known "
                    f"({seen.unknown or self._no_gpu})",
                    code="cannot_watch",
                    advice=f"Leave --max-{what} out. It is read from the driver of an NVIDIA GPU (nvidia-ml-py), "
                    "and for a processor, as far as its temperature goes, from Linux.",
                )

    def measure(self) -> Measured:
        """The machine now."""
        rules, unknown = self._rules, list[str]()
        temperature = power = None
        others: tuple[str, ...] = ()
        if self._gpu is not None:
            own = _own_processes()
            if rules.only_idle:
                others = self._gpu.ask("who uses it", self._gpu.others, own, otherwise=(), unknown=unknown)
            if rules.max_temperature is not None:
                temperature = self._gpu.ask("its temperature", self._gpu.temperature, otherwise=None, unknown=unknown)
            if rules.max_power is not None:
                power = self._gpu.ask("its power", self._gpu.power, otherwise=None, unknown=unknown)
        elif rules.max_temperature is not None:
            temperature = _processor_temperature()
            if temperature is None:
                unknown.append("the system does not tell the processor's temperature")
        memory = psutil.virtual_memory()
        return Measured(
            device=self._gpu.name if self._gpu is not None else "the processor",
            others_on_gpu=others,
            others_load=self._processor.others_load() if rules.only_idle else 0.0,
            temperature=temperature,
            power=power,
            memory=int(memory.total - memory.available),
            own_memory=_own_memory() if rules.max_memory is not None else 0,
            total_memory=int(memory.total),
            unknown="; ".join(unknown),
        )


# ---------------------------------------------------------------- the GPU


class _Gpu:
    """One GPU, as its driver tells of it."""

    def __init__(self, nvml: Any, handle: object, name: str) -> None:  # noqa: ANN401
        self._nvml, self._handle, self.name = nvml, handle, name
        self._seen_at = 0  # microseconds, the driver's clock: of the newest sample of how busy processes keep it
        self._tells_busy = True

    def ask(self, what: str, question: Callable[..., Any], *about: object, otherwise: Any, unknown: list[str]) -> Any:  # noqa: ANN401
        """One answer of the driver; what it does not tell is added to `unknown`."""
        try:
            return question(*about)
        except self._nvml.NVMLError as error:
            unknown.append(f"the driver does not tell {what} of {self.name} ({error})")
            return otherwise

    def temperature(self) -> float:
        """°C."""
        return float(self._nvml.nvmlDeviceGetTemperature(self._handle, self._nvml.NVML_TEMPERATURE_GPU))

    def memory_used(self) -> int:
        """Bytes of its memory that are taken, by whomever."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def power(self) -> float:
        """Watts."""
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1000

    def others(self, own: set[int]) -> tuple[str, ...]:
        """The other processes that use it, in words.

        Args:
            own: ids of the worker's processes.
        """
        found = {process.pid: process.usedGpuMemory for process in self._computing() if process.pid not in own}
        for pid in self._drawing():
            if pid not in own:
                found.setdefault(pid, None)
        named = [_named(pid, memory) for pid, memory in sorted(found.items())[:NAMED]]
        return (*named, *([f"{len(found) - NAMED} more"] if len(found) > NAMED else []))

    def _computing(self) -> list[Any]:
        return list(self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))

    def _drawing(self) -> Iterator[int]:
        """Those that draw, as far as the driver tells that they keep the GPU busy."""
        if not self._tells_busy:
            return
        try:
            samples = self._nvml.nvmlDeviceGetProcessUtilization(self._handle, self._seen_at)
        except self._nvml.NVMLError_NotFound:  # nobody has used it since the last look
            return
        except self._nvml.NVMLError_NotSupported as error:
            log.info("who draws on %s is not seen, only who computes: the driver answers %s", self.name, error)
            self._tells_busy = False
            return
        drawing = {process.pid for process in self._nvml.nvmlDeviceGetGraphicsRunningProcesses(self._handle)}
        for sample in samples:
            self._seen_at = max(self._seen_at, int(sample.timeStamp))
            if sample.smUtil >= DRAWS_FROM and sample.pid in drawing:
                yield sample.pid


def _open_gpu(device: str, nvml: Any) -> tuple[_Gpu | None, str]:  # noqa: ANN401
    """The GPU that torch calls so, or why there is none whose driver could be asked."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return None, f"the worker trains on {device}, which has no NVIDIA driver to ask"
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None, "nvidia-ml-py is not installed"
    try:
        nvml.nvmlInit()
        which = seen_as(int(number or 0), os.environ.get("CUDA_VISIBLE_DEVICES"))
        if isinstance(which, int):
            return _Gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(which), f"GPU {which}"), ""
        return _Gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(which), f"GPU {which[:12]}…"), ""
    except nvml.NVMLError as error:
        return None, f"the NVIDIA driver answers {error}"


def seen_as(number: int, visible: str | None) -> int | str:
    """The number or the UUID by which the driver knows the GPU that CUDA counts as `number`, in the order of the bus.

    Args:
        number: from 0.
        visible: CUDA_VISIBLE_DEVICES; None: it is not set.
    """
    chosen = [part.strip() for part in visible.split(",")] if visible else []
    if number >= len(chosen):
        return number
    return int(chosen[number]) if chosen[number].isdecimal() else chosen[number]


def _named(pid: int, memory: int | None) -> str:
    """A process in words: its name where this user may know it, and what it holds of the GPU's memory."""
    name = "a process"
    with suppress(psutil.Error):  # it has ended, or belongs to somebody else
        name = str(psutil.Process(pid).name())
    return f"{name} (pid {pid}{f', {gigabytes(memory)}' if memory else ''})"


class Gauged(NamedTuple):
    """A device at this moment; None where that is not known."""

    memory_used: int | None  # bytes of its memory that are taken, by whomever
    temperature: float | None  # °C
    power: float | None  # watts


def gauge(device: str) -> Gauged:
    """The device now: of what is no NVIDIA GPU, the machine's memory and its processor's temperature.

    Once a heartbeat, so that a person can see it (`lydian top`, the dashboard); no rule hangs on it.
    """
    gpu = _gauged(device)
    if gpu is None:
        memory = psutil.virtual_memory()
        return Gauged(int(memory.total - memory.available), _processor_temperature(), None)
    unknown: list[str] = []  # said at the start, where a rule needs it
    return Gauged(
        gpu.ask("its memory", gpu.memory_used, otherwise=None, unknown=unknown),
        gpu.ask("its temperature", gpu.temperature, otherwise=None, unknown=unknown),
        gpu.ask("its power", gpu.power, otherwise=None, unknown=unknown),
    )


@cache
def _gauged(device: str) -> _Gpu | None:
    return _open_gpu(device, None)[0]


# ---------------------------------------------------------------- the processor


class _Processor:
    """How much of the machine's processors others use, between two looks."""

    def __init__(self) -> None:
        self._all, self._own, self._at = _busy_seconds(), _own_seconds(), time.monotonic()

    def others_load(self) -> float:
        """Share of all processors, 0 to 1, since the last call; what the worker itself used is not in it."""
        every, own, now = _busy_seconds(), _own_seconds(), time.monotonic()
        used = (every - self._all) - sum(max(0.0, own[pid] - self._own.get(pid, 0.0)) for pid in own)
        passed = (now - self._at) * (psutil.cpu_count() or 1)
        self._all, self._own, self._at = every, own, now
        return min(max(used / passed, 0.0), 1.0) if passed > 0 else 0.0


def _busy_seconds() -> float:
    """Seconds that the machine's processors have worked, of all together, since it started."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # Linux counts them as user as well
    return float(sum(times) - idle - twice)


def _own_seconds() -> dict[int, float]:
    """Process id -> seconds of processor that it has used, of the worker's own."""
    seconds = {}
    for process in _own():
        with suppress(psutil.Error):
            times = process.cpu_times()
            seconds[process.pid] = float(times.user + times.system)
    return seconds


def _processor_temperature() -> float | None:
    """The highest that the kernel tells of the processor, °C; None: it tells none."""
    if not hasattr(psutil, "sensors_temperatures"):
        return None
    found = psutil.sensors_temperatures()
    return max((float(entry.current) for name in CPU_SENSORS for entry in found.get(name, [])), default=None)


# ---------------------------------------------------------------- the worker itself


def _own() -> list[Any]:
    """The agent and all that it started."""
    agent = psutil.Process()
    return [agent, *agent.children(recursive=True)]


def _own_processes() -> set[int]:
    return {process.pid for process in _own()}


def _own_memory() -> int:
    """Bytes of memory that are the worker's; what its processes share is counted in each of them."""
    total = 0
    for process in _own():
        with suppress(psutil.Error):
            total += int(process.memory_info().rss)
    return total
