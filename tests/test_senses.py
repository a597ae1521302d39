"""What a polite worker sees. A stand-in for pynvml plays the driver of a GPU; all else is this machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import LydianError
from worker import senses
from worker.manners import Amount, Measured, Rules
from worker.senses import Senses, seen_as, watching


@dataclass
class Driver:
    """What pynvml would be with one GPU: `errors` maps a function's name to the code that it answers with."""

    computing: dict[int, int | None] = field(default_factory=dict)  # process id -> bytes of the GPU's memory
    drawing: dict[int, int] = field(default_factory=dict)  # process id -> percent of the GPU's time
    errors: dict[str, int] = field(default_factory=dict)
    asked_since: list[int] = field(default_factory=list)

    NVMLError = pynvml.NVMLError
    NVMLError_NotFound = pynvml.NVMLError_NotFound
    NVMLError_NotSupported = pynvml.NVMLError_NotSupported
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU

    def _answer(self, name: str, answer: Any) -> Any:
        if name in self.errors:
            raise pynvml.NVMLError(self.errors[name])
        return answer

    def nvmlInit(self) -> None:
        self._answer("nvmlInit", None)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return str(self._answer("nvmlDeviceGetHandleByIndex", f"gpu {index}"))

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return f"gpu {uuid}"

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return int(self._answer("nvmlDeviceGetTemperature", 71))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return int(self._answer("nvmlDeviceGetPowerUsage", 182_500))

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return self._answer("nvmlDeviceGetMemoryInfo", SimpleNamespace(used=3 << 30))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.computing.items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in self.drawing]

    def nvmlDeviceGetProcessUtilization(self, handle: str, since: int) -> list[Any]:
        self.asked_since.append(since)
        self._answer("nvmlDeviceGetProcessUtilization", None)
        return [
            SimpleNamespace(pid=pid, smUtil=busy, timeStamp=1000 + at)
            for at, (pid, busy) in enumerate(self.drawing.items())
        ]


def look(driver: Driver, device: str = "cuda", **rules: Any) -> Measured:
    return Senses(device, Rules(**rules), nvml=driver).measure()


@pytest.fixture
def other() -> Iterator[int]:
    """The id of a process that is none of ours, as far as a worker knows: no child of this one."""
    program = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'input()'], stdin=0).pid, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        starter.wait()
        yield pid
        psutil.Process(pid).kill()


# ---------------------------------------------------------------- the GPU


def test_a_process_that_computes_on_the_gpu_is_named_with_what_it_holds(other: int) -> None:
    name = psutil.Process(other).name()
    seen = look(Driver(computing={other: 3_000_000_000}), only_idle=True)
    assert seen.others_on_gpu == (f"{name} (pid {other}, 3.0 GB)",)
    assert (seen.device, seen.unknown) == ("GPU 0", "")


def test_the_worker_and_what_it_started_are_no_others() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert look(Driver(computing={os.getpid(): 1, child.pid: 1}), only_idle=True).others_on_gpu == ()
        child.communicate()


def test_a_process_that_is_gone_or_hidden_is_still_counted() -> None:
    assert look(Driver(computing={2**30: None}), only_idle=True).others_on_gpu == (f"a process (pid {2**30})",)


def test_of_many_others_some_are_named_and_the_rest_counted() -> None:
    found = look(Driver(computing={2**30 + n: None for n in range(5)}), only_idle=True).others_on_gpu
    assert [word.startswith("a process") for word in found] == [True, True, True, False]
    assert found[-1] == "2 more"


def test_who_draws_counts_only_if_it_keeps_the_gpu_busy() -> None:
    desktop, game = 2**30, 2**30 + 1
    driver = Driver(drawing={desktop: 3, game: 80})
    both = Senses("cuda", Rules(only_idle=True), nvml=driver)
    assert both.measure().others_on_gpu == (f"a process (pid {game})",)
    both.measure()
    assert driver.asked_since == [0, 1001], "samples are looked at once"


@pytest.mark.parametrize(("code", "again"), [(pynvml.NVML_ERROR_NOT_FOUND, 2), (pynvml.NVML_ERROR_NOT_SUPPORTED, 1)])
def test_a_driver_that_does_not_tell_who_draws_is_no_reason_to_rest(code: int, again: int) -> None:
    driver = Driver(drawing={2**30: 80}, errors={"nvmlDeviceGetProcessUtilization": code})
    one = Senses("cuda", Rules(only_idle=True), nvml=driver)
    for _ in range(2):
        seen = one.measure()
        assert (seen.others_on_gpu, seen.unknown) == ((), "")
    assert len(driver.asked_since) == again


def test_temperature_and_power_are_those_of_the_gpu_and_asked_only_where_a_rule_is_about_them() -> None:
    seen = look(Driver(), max_temperature=80, max_power=200)
    assert (seen.temperature, seen.power) == (71.0, 182.5)
    assert look(Driver(), only_idle=True).temperature is None


@pytest.mark.parametrize(
    ("name", "rules", "what"),
    [
        ("nvmlDeviceGetTemperature", {"max_temperature": 80}, "its temperature"),
        ("nvmlDeviceGetPowerUsage", {"max_power": 200}, "its power"),
        ("nvmlDeviceGetProcessUtilization", {"only_idle": True}, "who uses it"),
    ],
)
def test_what_the_driver_does_not_tell_any_more_is_said(name: str, rules: dict[str, Any], what: str) -> None:
    lost = {name: pynvml.NVML_ERROR_GPU_IS_LOST}
    assert look(Driver(errors=lost), **rules).unknown.startswith(
        f"the driver does not tell {what} of GPU 0 (GPU is lost"
    )


@pytest.mark.parametrize(
    ("number", "visible", "which"),
    [
        (0, None, 0), (1, None, 1), (0, "", 0), (0, "3", 3), (1, "3, 1", 1), (0, "GPU-8f2a", "GPU-8f2a"), (2, "0,1", 2),
    ],
)  # fmt: skip
def test_a_gpu_is_asked_for_by_the_name_that_its_driver_has_for_it(
    number: int, visible: str | None, which: int | str
) -> None:
    assert seen_as(number, visible) == which


@given(st.lists(st.integers(0, 15), min_size=1, unique=True), st.data())
def test_each_gpu_that_cuda_sees_is_another_one(chosen: list[int], data: st.DataObject) -> None:
    visible = ",".join(map(str, chosen))
    assert [seen_as(at, visible) for at in range(len(chosen))] == chosen


def test_a_gpu_may_be_chosen_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f2a6c1e-77")
    assert look(Driver(), only_idle=True).device == "GPU GPU-8f2a6c1e…"


# ---------------------------------------------------------------- rules that cannot be kept


@pytest.mark.parametrize(
    ("device", "errors", "words"),
    [
        ("cuda", {"nvmlInit": pynvml.NVML_ERROR_DRIVER_NOT_LOADED}, "the NVIDIA driver answers Driver Not Loaded"),
        ("cuda", {"nvmlDeviceGetPowerUsage": pynvml.NVML_ERROR_NOT_SUPPORTED}, "its power of GPU 0 (Not Supported)"),
        ("mps", {}, "the worker trains on mps"),
    ],
)
def test_a_limit_of_power_that_cannot_be_measured_is_refused(device: str, errors: dict[str, int], words: str) -> None:
    with pytest.raises(LydianError, match=r"^--max-power cannot be kept") as refused:
        Senses(device, Rules(max_power=200), nvml=Driver(errors=errors)).check()
    assert words in str(refused.value)
    assert refused.value.code == "cannot_watch"


def test_on_a_processor_its_own_sensor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "coretemp": [SimpleNamespace(current=50.0), SimpleNamespace(current=61.0)],
        "nvme": [SimpleNamespace(current=90.0)],
    }
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: found, raising=False)
    one = Senses("cpu", Rules(max_temperature=80))
    one.check()
    assert (one.measure().temperature, one.measure().device) == (61.0, "the processor")
    found.clear()
    with pytest.raises(LydianError, match=r"--max-temperature .*the system does not tell the processor's temperature"):
        one.check()
    assert one.measure().unknown == "the system does not tell the processor's temperature"


def test_a_gauge_has_what_the_driver_tells_and_nothing_in_place_of_what_it_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver()
    gpu, _ = senses._open_gpu("cuda", driver)
    monkeypatch.setattr(senses, "_gauged", lambda device: gpu)
    assert senses.gauge("cuda") == (3 << 30, 71.0, 182.5)
    driver.errors["nvmlDeviceGetPowerUsage"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    assert senses.gauge("cuda") == (3 << 30, 71.0, None)
    monkeypatch.setattr(senses, "_gauged", lambda device: None)
    used, _, power = senses.gauge("cpu")
    assert used is not None
    assert power is None


def test_without_a_rule_nothing_is_measured() -> None:
    assert watching("cuda", Rules()) is Measured


def test_without_a_gpu_only_the_processors_load_says_what_is_idle(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lydian.worker")
    assert watching("cpu", Rules(only_idle=True))().others_on_gpu == ()
    assert "only the processor's load" in caplog.text


# ---------------------------------------------------------------- the processor and memory


def test_what_the_worker_computes_itself_is_no_load_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, own, clock = [100.0], {1: 10.0, 2: 5.0}, [0.0]
    monkeypatch.setattr(senses, "_busy_seconds", lambda: busy[0])
    monkeypatch.setattr(senses, "_own_seconds", lambda: dict(own))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(senses.time, "monotonic", lambda: clock[0])
    processor = senses._Processor()
    busy[0], clock[0] = 106.0, 2.0  # 6 of 8 seconds
    own |= {1: 12.0, 3: 2.0}  # 4 of them its own, 2 in a process that it has started since
    del own[2]
    assert processor.others_load() == pytest.approx(0.25)
    assert processor.others_load() == 0.0, "no time has passed"
    busy[0], clock[0] = 200.0, 3.0
    assert processor.others_load() == 1.0, "a clock that was set cannot make it more than all"


def test_the_load_of_this_machine_is_a_share() -> None:
    assert 0.0 <= senses._Processor().others_load() <= 1.0


def test_memory_is_that_of_the_machine_and_of_all_the_workers_processes() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        seen = Senses("cpu", Rules(max_memory=Amount(0.9, share=True))).measure()
        assert psutil.Process().memory_info().rss < seen.own_memory < seen.total_memory
        assert 0 < seen.memory <= seen.total_memory == psutil.virtual_memory().total
        child.communicate()
