"""A machine with GPUs that is not here: put this folder on PYTHONPATH, and every Python process sees them.

    pynvml.py          in the place of nvidia-ml-py: FAKE_GPUS says what the driver answers
    sitecustomize.py   once torch is loaded, makes it the build that FAKE_TORCH says

Kernels are not played: none runs on any card, as none does on one that torch has no code for.
"""

import json
import os
from pathlib import Path
from typing import Any

from common.fitness import drives
from common.messages import Gpu, GpuInventory, TorchBuild

FOLDER = Path(__file__).parent

NEW_TORCH = {
    "version": "2.14.1",
    "cuda": "13.0",
    "architectures": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"],
}
LEGACY_TORCH = {
    "version": "2.7.1",
    "cuda": "12.6",
    "architectures": ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"],
}
GTX_1080 = {"name": "NVIDIA GeForce GTX 1080", "memory": 8510701568, "free": 8200000000, "capability": [6, 1]}
RTX_4090 = {"name": "NVIDIA GeForce RTX 4090", "memory": 25757220864, "free": 25200000000, "capability": [8, 9]}
A100 = {"name": "NVIDIA A100-SXM4-40GB", "memory": 42949672960, "free": 42400000000, "capability": [8, 0]}


def told(*gpus: dict[str, Any], driver: str = "580.95.05") -> GpuInventory:
    """What worker.hardware makes of the same cards."""
    known = [
        Gpu.model_validate(
            {
                "index": index,
                "name": gpu["name"],
                "memory": gpu["memory"],
                "driver": driver,
                "capability": gpu["capability"],
                "uuid": f"GPU-{index:08d}",
                "free": gpu["free"],
                "ecc_uncorrected": gpu.get("ecc", 0),
            }
        )
        for index, gpu in enumerate(gpus)
    ]
    return GpuInventory(gpus=tuple(known))


def build(torch: dict[str, Any], device: str = "cpu", **changed: Any) -> TorchBuild:
    """What a training process says of that torch."""
    return TorchBuild.model_validate({**torch, "device": device, "threads": 4, **changed})


def machine(
    *gpus: dict[str, Any], driver: str = "580.95.05", error: str = "", torch: dict[str, Any] = NEW_TORCH
) -> dict[str, str]:
    """The environment of processes on such a machine.

    Args:
        gpus: name, memory, free (bytes), capability, ecc (uncorrected errors).
        driver: its version.
        error: name of the NVMLError that the driver answers with instead.
        torch: the build.
    """
    path = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    sees = bool(gpus) and drives(driver, torch["cuda"] or "")
    played = {"driver": driver, "error": error, "gpus": list(gpus)}
    return {
        "PYTHONPATH": path,
        "LYDIAN_CHILD_ENV": "FAKE_GPUS FAKE_TORCH",
        "FAKE_GPUS": json.dumps(played),
        "FAKE_TORCH": json.dumps({**torch, "sees": sees}),
    }
