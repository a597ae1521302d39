"""The part of nvidia-ml-py that worker/hardware.py asks, answered by the environment's FAKE_GPUS."""

import json
import os
from types import SimpleNamespace

PLAYED = json.loads(os.environ["FAKE_GPUS"])
NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):
    pass


class NVMLError_DriverNotLoaded(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_LibRmVersionMismatch(NVMLError):
    def __str__(self) -> str:
        return "Driver/library version mismatch"


def nvmlInit() -> None:
    if PLAYED["error"]:
        raise globals()[PLAYED["error"]]


def nvmlShutdown() -> None:
    pass


def nvmlSystemGetDriverVersion() -> str:
    return PLAYED["driver"]


def nvmlDeviceGetCount() -> int:
    return len(PLAYED["gpus"])


def nvmlDeviceGetHandleByIndex(index: int) -> dict:
    return PLAYED["gpus"][index] | {"index": index}


def nvmlDeviceGetName(handle: dict) -> str:
    return handle["name"]


def nvmlDeviceGetMemoryInfo(handle: dict) -> SimpleNamespace:
    return SimpleNamespace(total=handle["memory"], free=handle["free"], used=handle["memory"] - handle["free"])


def nvmlDeviceGetCudaComputeCapability(handle: dict) -> tuple:
    return tuple(handle["capability"])


def nvmlDeviceGetUUID(handle: dict) -> str:
    return f"GPU-{handle['index']:08d}"


def nvmlDeviceGetTotalEccErrors(handle: dict, kind: int, counter: int) -> int:
    if "ecc" not in handle:
        raise NVMLError_NotSupported
    return handle["ecc"]
