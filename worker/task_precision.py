"""In which numbers a device trains, and whether torch can compile for it: by tables, each answer with its reason.

Part of the child (worker/task_host.py), which loads it by its path. Pure: no torch, no clock; worker/task_device.py
asks the device and brings the facts. The weights and the optimiser's state are float32 in any case; what is chosen here
is what autocast computes a forward and backward pass in.

    CUDA  >= 8.0 bf16 · 7.x fp16 with a scaled loss · below fp32     ROCm  matrix units for bfloat16: bf16 · else fp32
    XPU   bf16                 MPS  fp32                 CPU  bf16 with AMX or AVX-512 BF16 · else fp32
"""

from collections.abc import Collection
from dataclasses import dataclass

PRECISIONS = ("fp32", "bf16", "fp16")

BF16_FROM = (8, 0)  # compute capability: Ampere. Below it bfloat16 is emulated, or missing
FP16_FROM = (7, 0)  # Volta: the first with matrix units for float16. Pascal runs most float16 at 1/64 of float32
TRITON_FROM = (7, 0)  # triton-lang.org: NVIDIA GPUs of compute capability 7.0 and up

# AMD's instruction set reference: MFMA for bfloat16 from gfx908 on, WMMA from gfx11 on. A capability number of torch
# does not tell them apart: gfx900 (none) and gfx90a (has them) are both 9.0.
ROCM_BF16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
CPU_BF16 = ("amx_bf16", "avx512_bf16")  # flags of the processor


@dataclass(frozen=True)
class Device:
    """What is known of a device. `backend` tells a card of AMD from one of NVIDIA: torch calls both cuda."""

    backend: str  # cpu, cuda, rocm, xpu, mps
    capability: tuple[int, int] | None = None  # CUDA's compute capability
    architecture: str = ""  # ROCm: gfx90a …
    features: Collection[str] = ()  # CPU: flags of the processor
    works: Collection[str] = PRECISIONS  # in which of PRECISIONS a matrix product and its gradient came out right

    @property
    def words(self) -> str:
        """The device as a reason names it."""
        if self.capability is not None:
            return f"compute capability {self.capability[0]}.{self.capability[1]}"
        return self.architecture or {"cpu": "this processor"}.get(self.backend, self.backend)


Choice = tuple[str, str]
"""A precision, and the reason for it."""


def best(device: Device) -> Choice:
    """The precision that pays on a device and came out right there."""
    wanted, reason = _by_table(device)
    if wanted in device.works:
        return wanted, reason
    return "fp32", f"{reason}, but {wanted} came out wrong in the test of this device"


def _by_table(device: Device) -> Choice:
    match device.backend:
        case "cuda":
            capability = device.capability or (0, 0)
            if capability >= BF16_FROM:
                return "bf16", device.words
            if capability >= FP16_FROM:
                return "fp16", f"{device.words}: bfloat16 needs 8.0"
            return "fp32", f"{device.words}: half precision needs 7.0"
        case "rocm" if device.architecture.startswith(ROCM_BF16):
            return "bf16", f"{device.words} has matrix units for bfloat16"
        case "rocm":
            return "fp32", f"{device.words} has no matrix units for bfloat16"
        case "xpu":
            return "bf16", "Intel GPUs have matrix units for bfloat16"
        case "cpu":
            for flag in CPU_BF16:
                if flag in device.features:
                    return "bf16", f"the processor has {flag}"
            return "fp32", f"the processor has neither {' nor '.join(CPU_BF16)}"
        case _:
            return "fp32", f"half precision is not known to pay on {device.backend}"


def choose(asked: str, device: Device) -> Choice:
    """The precision of a job on a device. What a device cannot do is no reason to fail: it trains in float32.

    Args:
        asked: the job's `[train] precision`: auto, or one of PRECISIONS.
        device: where it trains.
    """
    if asked == "auto":
        return best(device)
    if asked == "fp16" and device.backend == "mps":
        return "fp32", "the job asks for fp16, and torch cannot scale losses on mps"
    if asked == "fp32" or asked in device.works:
        other, why = best(device)
        against = f"; auto would be {other}: {why}" if other != asked else ""
        return asked, f"the job asks for it{against}"
    return "fp32", f"the job asks for {asked}, which came out wrong in the test of {device.words}"


def unless_unfit(choice: Choice, *, dtypes: Collection[str], plain_optimizer: bool) -> Choice:
    """The precision in which this very model is trained: float32 where half precision would break the training.

    Args:
        choice: of the job on this device.
        dtypes: of the model's trained floating-point parameters, as torch names them without "torch.".
        plain_optimizer: the optimiser is a torch.optim.Optimizer, as scaled losses need it.
    """
    precision, _ = choice
    if precision == "fp32":
        return choice
    other = sorted(set(dtypes) - {"float32"})
    if other:
        return "fp32", f"the model's parameters are {' and '.join(other)}: it is trained as the task made it"
    if precision == "fp16" and not plain_optimizer:
        return "fp32", "fp16 needs a scaled loss, and the task's optimiser is no torch.optim.Optimizer"
    return choice


def compiles(device: Device, *, triton: bool, compiler: str) -> tuple[bool, str]:
    """Whether torch.compile can work for a device, and why or why not.

    Args:
        device: where it trains.
        triton: the package is installed.
        compiler: path of a C++ compiler; empty: there is none.
    """
    match device.backend:
        case "mps":
            return False, "torch.compile is a prototype on mps"
        case "cuda" if device.capability is None or device.capability < TRITON_FROM:
            return False, f"Triton needs compute capability 7.0, and this is {device.words}"
        case "cuda" | "rocm" | "xpu" if not triton:
            return False, "Triton is not installed"
    if not compiler:
        return False, "there is no C++ compiler: install g++ or clang++, or set CXX"
    return True, f"{'Triton and ' if device.backend != 'cpu' else ''}{compiler}"
