"""The machine at the moment of a failure, and how a person reads it in `lydian logs`."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from client.troubles import trouble_lines
from common.messages import LogEntry, Scene, TorchBuild
from worker.scene import scene_now

BUILD = TorchBuild(version="2.11.0", device="cuda", cuda="13.0", threads=4, name="NVIDIA T4", capability=(7, 5))


class NVMLError(Exception):
    pass


def driver(**other: Any) -> Any:
    """The questions that are asked of nvidia-ml-py, answered for one GPU; what is given answers otherwise."""
    played: dict[str, Any] = {
        "NVMLError": NVMLError,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda _: "NVIDIA T4",
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=16_000_000_000, free=200_000_000),
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=97),
        "nvmlDeviceGetTemperature": lambda _, __: 71,
        "nvmlDeviceGetComputeRunningProcesses": lambda _: [object(), object()],
    }
    return SimpleNamespace(**played | other)


def refuse(*_: Any) -> Any:
    raise NVMLError("Not Supported")


def entry(scene: Scene | None, **other: Any) -> LogEntry:
    fields = {
        "id": 3, "at": "2026-01-01T00:00:00Z", "worker": "gpu-1", "where": "train of round 1, shard 2, attempt 1",
        "code": "out_of_memory", "sentence": "out of memory in train()", "detail": "Traceback …\n",
        "cause": "cuda_out_of_memory", "advice": "Lower train.batch_size.", "scene": scene,
    }  # fmt: skip
    return LogEntry.model_validate(fields | other)


def test_a_gpu_is_told_of_as_nvidia_smi_would() -> None:
    lines = list(trouble_lines(entry(scene_now(BUILD, driver()))))
    assert lines[0].endswith("out of memory in train() (out_of_memory, cuda_out_of_memory)")
    assert lines[1] == "what to do: Lower train.batch_size."
    assert "torch 2.11.0 for CUDA 13.0 on cuda, NVIDIA driver 580.65.06" in lines[2]
    assert lines[3] == "GPU 0 NVIDIA T4: 200.0 MB free of 16.0 GB, 97% busy, 71 °C, 2 processes"
    assert lines[4:] == ["Traceback …"]


@pytest.mark.parametrize(
    "question",
    [
        "nvmlSystemGetDriverVersion", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUtilizationRates",
        "nvmlDeviceGetTemperature", "nvmlDeviceGetComputeRunningProcesses", "nvmlShutdown",
    ],
)  # fmt: skip
def test_an_answer_that_the_driver_does_not_have_costs_that_field_alone(question: str) -> None:
    scene = scene_now(BUILD, driver(**{question: refuse}))
    assert len(scene.gpus) == 1
    assert "Not Supported" in scene.no_gpus
    told = [scene.driver, *(value for value in scene.gpus[0].model_dump().values() if value is not None)]
    assert len(told) >= 6


def test_without_a_driver_or_a_gpu_the_scene_says_so_and_has_the_versions() -> None:
    scene = scene_now(None, driver(nvmlInit=refuse))
    assert (scene.gpus, scene.torch, scene.driver) == ((), None, "")
    assert "Not Supported" in scene.no_gpus
    assert scene.python
    assert scene_now(None, driver(nvmlDeviceGetHandleByIndex=refuse)).gpus == ()


def test_a_driver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.scene.PATIENCE_S", 0.05)
    answers = threading.Event()
    try:
        scene = scene_now(BUILD, driver(nvmlInit=lambda: answers.wait(60)))
        assert scene.no_gpus == "the NVIDIA driver has not answered within 0.05 s"
        assert scene.torch == BUILD
    finally:
        answers.set()


def test_an_entry_of_an_older_worker_is_shown_without_a_scene() -> None:
    assert len(list(trouble_lines(entry(None, cause="", advice="", detail="")))) == 1


def test_what_a_worker_says_of_its_machine_cannot_steer_a_terminal() -> None:
    lines = trouble_lines(entry(scene_now(BUILD, driver(nvmlDeviceGetName=lambda _: "\x1b[31mred"))))
    assert not any("\x1b" in line for line in lines)
