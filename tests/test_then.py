"""The machine on which an attempt failed, in words."""

from typing import Any

import pytest

from client.shown import size
from common.messages import GpuThen, Scene, TorchBuild
from common.then import scene_lines


def build(**keys: Any) -> TorchBuild:
    return TorchBuild(**{"version": "2.14.1", "device": "cuda", "threads": 4} | keys)


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({}, ["Python 3.11.7, Linux-6.1"]),
        ({"torch": build(cuda="13.0"), "driver": "580.95.05"},
         ["Python 3.11.7, torch 2.14.1 for CUDA 13.0 on cuda, NVIDIA driver 580.95.05, Linux-6.1"]),
        ({"torch": build(rocm="6.4")}, ["Python 3.11.7, torch 2.14.1 for ROCm 6.4 on cuda, Linux-6.1"]),
        ({"torch": build(device="cpu"), "no_gpus": "no driver"}, ["Python 3.11.7, torch 2.14.1 on cpu, Linux-6.1"]),
        ({"no_gpus": "no driver"}, ["Python 3.11.7, Linux-6.1"]),
        ({"torch": build(cuda="13.0"), "no_gpus": "no driver"},
         ["Python 3.11.7, torch 2.14.1 for CUDA 13.0 on cuda, Linux-6.1", "no more of the GPUs: no driver"]),
        ({"gpus": (GpuThen(index=0, name="P40", memory=25 * 10**9),)},
         ["Python 3.11.7, Linux-6.1", "GPU 0 P40: 25.0 GB"]),
        ({"gpus": (GpuThen(index=1, name="P40", memory=25 * 10**9, free=0, busy=0.5, temperature=81.4, processes=1),)},
         ["Python 3.11.7, Linux-6.1", "GPU 1 P40: 0 B free of 25.0 GB, 50% busy, 81 °C, 1 process"]),
    ],
)  # fmt: skip
def test_what_is_known_of_the_machine_is_said_and_nothing_else(known: dict[str, Any], said: list[str]) -> None:
    assert list(scene_lines(Scene(python="3.11.7", system="Linux-6.1", **known), size)) == said
