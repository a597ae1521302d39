"""Which torch fits which NVIDIA card, and what to do where they do not fit.

Pure: no network, disk, clock or driver. The caller brings what was found; the answer is a verdict with one sentence and
the one thing to do.

    the card's compute capability ─┐
    the driver ────────────────────┼─▶ Fit: ok, warning or failure ─▶ Choice: the device to train on, or none
    torch: its CUDA, its kernels ──┘

A build of torch runs on a card if it has binary code for it and the driver knows the CUDA it was built for. Code for
X.y runs on every X.z with z >= y: a card of 6.1 runs code for 6.0, one of 8.9 code for 8.6. PTX, which a driver could
compile into such code, does not count: compiling all of torch's kernels takes minutes to hours, and the libraries
beside torch have none.

Sources: NVIDIA, CUDA Compatibility, table 1 (drivers) and CUDA C++ Programming Guide, binary compatibility; the kernels
were read from the wheels.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from common.messages import Gpu, GpuInventory, NoGpu, TorchBuild

Capability = tuple[int, int]
Verdict = Literal["ok", "warning", "failure"]

LEAST_FREE = 512 << 20  # bytes of a GPU that a CUDA context and cuBLAS take before the first tensor of a model
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Major version of CUDA -> the first driver branch that runs what was built for it."""
OLDEST_CARD = {11: (3, 5), 12: (5, 0), 13: (7, 5)}
"""Major version of CUDA -> the first card that its compiler builds for."""
PCI_ORDER = "PCI_BUS_ID"
"""Of CUDA_DEVICE_ORDER: cards are counted as nvidia-smi counts them, where CUDA would take the fastest first."""
LAST_DRIVER = ((7, 2), 580)
"""Cards up to this capability, and the last driver branch that knows them."""


@dataclass(frozen=True)
class RequirementSet:
    """One of the files that a worker is installed from, and what the torch of its default build runs on."""

    file: str
    torch: str  # version; the oldest where the file allows several
    cuda: str
    architectures: tuple[str, ...]

    def knows(self, capability: Capability) -> bool:
        """Whether its torch has code for a card."""
        return has_code(capability, self.architectures)


NEW = RequirementSet(
    "requirements_new_gpu.txt", "2.11", "13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
)
LEGACY = RequirementSet(
    "requirements_legacy_gpu.txt",
    "2.7.1",
    "12.6",
    ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"),
)
SETS = (NEW, LEGACY)  # the better one first


@dataclass(frozen=True)
class Fit:
    """A verdict, why, and the one thing to do; nothing where all is well."""

    verdict: Verdict
    sentence: str
    fix: str = ""
    code: str = ""  # of a failure: what kind it is
    lasting: bool = False  # of a failure: trying again cannot help, somebody has to change the machine

    def words(self) -> str:
        """Sentence and fix on one line."""
        return f"{self.sentence}: {self.fix}" if self.fix else self.sentence


@dataclass(frozen=True)
class Choice:
    """The device to train on, and why it is not the first GPU; or none, and why not."""

    device: str | None
    fit: Fit


@dataclass(frozen=True)
class Remedy:
    """What makes a card usable."""

    requirements: RequirementSet | None  # None: no torch that is offered here has code for it
    driver: int | None = None  # the branch to upgrade to first; None: the present one will do


# ---------------------------------------------------------------- the rules


def has_code(capability: Capability, architectures: Collection[str]) -> bool:
    """Whether a build has binary code that runs on a card.

    Args:
        capability: the card's.
        architectures: as torch.cuda.get_arch_list() has them. sm_90a is for 9.0 alone, sm_100f for 10.x from 10.0 on;
            compute_… is PTX.
    """
    return any(_runs(capability, name) for name in architectures)


def _runs(capability: Capability, architecture: str) -> bool:
    parsed = re.fullmatch(r"sm_(\d+)(\d)([af]?)", architecture)
    if parsed is None:
        return False
    code = (int(parsed[1]), int(parsed[2]))
    if parsed[3] == "a":
        return capability == code
    return capability[0] == code[0] and capability[1] >= code[1]


def branch_of(driver: str) -> int | None:
    """The branch of a driver's version: 580.65.06 is of 580. None where the version is none."""
    parsed = re.match(r"\d+", driver)
    return int(parsed[0]) if parsed else None


def driver_for(cuda: str) -> int | None:
    """The first driver branch that runs what was built for a CUDA version; None where that is not known."""
    return OLDEST_DRIVER.get(branch_of(cuda) or 0)


def drives(driver: str, cuda: str) -> bool:
    """Whether a driver runs what was built for a CUDA version. One of which nothing is known passes: a kernel tells."""
    branch, least = branch_of(driver), driver_for(cuda)
    return branch is None or least is None or branch >= least


def remedy(capability: Capability, driver: str) -> Remedy:
    """What to install for a card: the newest torch that runs with its driver, else after an upgrade of the driver."""
    fitting = [one for one in SETS if one.knows(capability)]
    for one in fitting:
        if drives(driver, one.cuda):
            return Remedy(one)
    return Remedy(fitting[0], OLDEST_DRIVER[13]) if fitting else Remedy(None)


def remedy_words(capability: Capability, driver: str, build: TorchBuild | None) -> str:
    """The one thing to do for a card that the present torch has no code for.

    Args:
        capability: of the card.
        driver: its version.
        build: the torch that is installed; None: none is.
    """
    found = remedy(capability, driver)
    if found.requirements is None:
        if capability >= _parsed(NEW.architectures[0]):
            return f"install a newer torch: pip install --upgrade -r {NEW.file}"
        return "train on the CPU (--device cpu), or put another card in"
    install = f"install {found.requirements.file}"
    if build is not None and build.cuda is None:  # pip takes a CPU build for the version that is asked for
        install = f"pip uninstall -y torch torchvision, then {install}"
    return f"{_upgrade(capability)}, then {install}" if found.driver is not None else install


def _upgrade(capability: Capability) -> str:
    """Words for a driver that runs either set of requirements on a card."""
    last_card, last = LAST_DRIVER
    which = f"{last}, the last that knows this card" if capability <= last_card else f"{OLDEST_DRIVER[13]} or newer"
    return f"upgrade the NVIDIA driver to {which}"


def _parsed(architecture: str) -> Capability:
    digits = architecture.removeprefix("sm_")
    return int(digits[:-1]), int(digits[-1])


def sm(capability: Capability) -> str:
    """A capability as kernels are named: (6, 1) is sm_61."""
    return f"sm_{capability[0]}{capability[1]}"


# ---------------------------------------------------------------- one card


def label(gpu: Gpu) -> str:
    """A card as sentences name it: GPU 0 (NVIDIA GeForce GTX 1080)."""
    return f"GPU {gpu.index} ({gpu.name})"


def fit(gpu: Gpu, build: TorchBuild) -> Fit:
    """Whether a torch can use a card, and the card is fit to be used.

    Args:
        gpu: as its driver reports it.
        build: what the training process says of its torch. A build whose kernels are not known (torch tells them only
            where it finds a driver that it can use) is judged by its CUDA.
    """
    return _torch_fit(gpu, build) or _health(gpu) or _fine(gpu, build)


def _torch_fit(gpu: Gpu, build: TorchBuild) -> Fit | None:
    """What keeps this torch from using the card; None: nothing."""
    capability = gpu.capability
    if build.cuda is None:
        fix = remedy_words(capability, gpu.driver, build) if capability else f"install {NEW.file} or {LEGACY.file}"
        sentence = f"{label(gpu)} cannot be used: torch {build.version} is built without CUDA"
        return Fit("failure", sentence, fix, "cpu_build", lasting=True)
    if capability is None:
        sentence = (
            f"{label(gpu)}: its driver does not tell its compute capability, so only a kernel can tell if it fits"
        )
        return Fit("warning", sentence, "upgrade the NVIDIA driver")
    if not _may_have_code(capability, build):
        sentence = f"{label(gpu)} is {sm(capability)}; torch {build.version} has {_span(build)}"
        return Fit("failure", sentence, remedy_words(capability, gpu.driver, build), "no_code", lasting=True)
    if not drives(gpu.driver, build.cuda):
        sentence = (
            f"driver {gpu.driver} of {label(gpu)} is too old: torch {build.version} is built for CUDA {build.cuda}, "
            f"which needs driver {driver_for(build.cuda)} or newer"
        )
        return Fit("failure", sentence, _for_old_driver(capability, gpu.driver), "old_driver", lasting=True)
    return None


def _may_have_code(capability: Capability, build: TorchBuild) -> bool:
    """Whether a build has code for a card; where its kernels are not known, whether it could."""
    if build.architectures:
        return has_code(capability, build.architectures)
    return capability >= OLDEST_CARD.get(branch_of(build.cuda or "") or 0, (0, 0))


def _for_old_driver(capability: Capability, driver: str) -> str:
    """A new driver is the better way, and another torch the one that needs no root."""
    found = remedy(capability, driver)
    if found.requirements is None or found.driver is not None:
        return _upgrade(capability)
    return f"{_upgrade(capability)}; without the right to, install {found.requirements.file}"


def _health(gpu: Gpu) -> Fit | None:
    """What is wrong with the card itself; None: nothing."""
    if gpu.ecc_uncorrected:
        many = "errors" if gpu.ecc_uncorrected > 1 else "error"
        sentence = f"{label(gpu)} had {gpu.ecc_uncorrected} uncorrected memory {many} (ECC) since its driver was loaded"
        reset = f"reset it (sudo nvidia-smi --gpu-reset -i {gpu.index}) or restart the machine"
        fix = f"{reset}; if they come back, replace it"
        return Fit("failure", sentence, fix, "ecc")
    if gpu.free is not None and gpu.memory and gpu.free < LEAST_FREE:
        sentence = f"{label(gpu)} is full: {gigabytes(gpu.free)} of {gigabytes(gpu.memory)} are free"
        return Fit(
            "failure", sentence, "end what uses it (nvidia-smi lists it), or wait until it has ended", "gpu_full"
        )
    return None


def _fine(gpu: Gpu, build: TorchBuild) -> Fit:
    free = "" if gpu.free is None else f", {gigabytes(gpu.free)} of {gigabytes(gpu.memory)} free"
    what = sm(gpu.capability) if gpu.capability else "capability not known"
    return Fit("ok", f"{label(gpu)}: {what}, driver {gpu.driver}{free}, fits torch {build.version} (CUDA {build.cuda})")


def gigabytes(count: int) -> str:
    """Bytes, as 8.5 GB."""
    return f"{count / 1e9:.1f} GB"


def _span(build: TorchBuild) -> str:
    """The kernels of a build in words: sm_75 and up, where it has the newest; else the first and the last."""
    if not build.architectures:
        return f"CUDA {build.cuda}, which builds for {sm(OLDEST_CARD[branch_of(build.cuda or '') or 0])} and up"
    known = sorted(_parsed(name) for name in build.architectures if re.fullmatch(r"sm_\d{2,}", name))
    if not known:
        return f"kernels for {' '.join(build.architectures)} alone"
    if known[-1] >= _parsed(NEW.architectures[-1]):
        return f"{sm(known[0])} and up"
    return f"{sm(known[0])} to {sm(known[-1])}"


# ---------------------------------------------------------------- no card

_ABSENCE: dict[NoGpu, tuple[Verdict, str]] = {
    "no_library": ("warning", f"install nvidia-ml-py, which {NEW.file} and {LEGACY.file} bring"),
    "no_driver": ("ok", "on a machine with an NVIDIA GPU, install its driver (580), then this again"),
    "not_loaded": ("failure", "load it (sudo modprobe nvidia), or restart the machine after an upgrade of the driver"),
    "no_answer": ("failure", "restart the machine: after an upgrade of the driver the old one is still loaded"),
    "no_device": (
        "failure",
        f"see whether `lspci` shows the card; driver {LAST_DRIVER[1]} is the last that knows Maxwell, Pascal and Volta",
    ),
}


def absence(inventory: GpuInventory) -> Fit:
    """What it means that a machine shows no GPU: nothing on a machine that has none, a failure with a broken driver."""
    verdict, fix = _ABSENCE.get(inventory.missing or "no_device", _ABSENCE["no_device"])
    sentence = inventory.reason or "no NVIDIA GPU is shown"
    return Fit(verdict, sentence, fix if verdict != "ok" else "", "no_gpu" if verdict == "failure" else "")


def _wanted_gpu(inventory: GpuInventory) -> Fit:
    """Somebody asked for a GPU, and there is none."""
    fix = _ABSENCE.get(inventory.missing or "no_device", _ABSENCE["no_device"])[1]
    sentence = inventory.reason or "no NVIDIA GPU is shown"
    return Fit("failure", sentence, f"{fix}; or train on the CPU with --device cpu", "no_gpu")


# ---------------------------------------------------------------- the whole box


def visible(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> tuple[Gpu, ...] | None:
    """The cards that torch counts in the child, in its order: that of the PCI bus, unless the environment has another.

    Args:
        gpus: all, in the order of the PCI bus.
        environment: of which CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER matter. What follows an entry that names no
            card is not seen.

    Returns:
        None where it cannot be told: parts of cards (MIG) are named, or several cards are in an order of CUDA's own.
    """
    if environment.get("CUDA_DEVICE_ORDER", PCI_ORDER) != PCI_ORDER and len(gpus) > 1:
        return None
    setting = environment.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return tuple(gpus)
    found: list[Gpu] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.startswith("MIG-"):
            return None
        named = [gpu for gpu in gpus if _is_named(gpu, entry)]
        if len(named) != 1 or named[0] in found:
            break
        found += named
    return tuple(found)


def _is_named(gpu: Gpu, entry: str) -> bool:
    return entry == str(gpu.index) or (entry.startswith("GPU-") and gpu.uuid.startswith(entry))


def file_for(gpus: Collection[Gpu]) -> str:
    """The requirements file for a machine: the one whose torch runs on most of its cards, the newer one in doubt."""
    found = [remedy(gpu.capability, gpu.driver).requirements for gpu in gpus if gpu.capability is not None]
    return max(SETS, key=found.count).file


def choose(
    asked: str, inventory: GpuInventory, build: TorchBuild, *, seen: Sequence[Gpu] | None, broke: str | None = None
) -> Choice:
    """The device that a worker trains on.

    A device that its owner named is used or refused, with what to do. Left to choose (`auto`), a worker takes the first
    card that fits, and the CPU where none does, saying why.

    Args:
        asked: cpu, cuda, cuda:N, mps, xpu or auto.
        inventory: of the machine.
        build: its torch; `device` is where a kernel ran, if one did.
        seen: the cards that torch counts (`visible`); None: not known, and nothing is judged.
        broke: why no kernel ran on the device that was asked for; None: one did.
    """
    kind, _, number = asked.partition(":")
    if kind == "auto":
        return _choose_freely(inventory, build, seen, broke)
    if kind != "cuda" or seen is None or (number and not number.isdecimal()):
        return _as_asked(asked, broke)
    if not seen:
        return Choice(None, _wanted_gpu(inventory)) if broke else Choice(asked, Fit("ok", ""))
    wanted = int(number or 0)
    if wanted >= len(seen):
        names = ", ".join(f"cuda:{at} is {gpu.name}" for at, gpu in enumerate(seen))
        sentence = f"there is no {asked}: {names}"
        return Choice(None, Fit("failure", sentence, "name one of these with --device", "no_gpu", lasting=True))
    found = fit(seen[wanted], build)
    if found.verdict == "failure":
        return Choice(None, _with_another(found, wanted, seen, build))
    return _as_asked(asked, broke, found)


def _as_asked(asked: str, broke: str | None, found: Fit | None = None) -> Choice:
    if broke:
        return Choice(None, Fit("failure", broke, "`lydian doctor` checks this machine", "broken_device"))
    shown = found if found is not None and found.verdict == "warning" else Fit("ok", "")
    return Choice(asked, shown)


def _choose_freely(inventory: GpuInventory, build: TorchBuild, seen: Sequence[Gpu] | None, broke: str | None) -> Choice:
    if not seen:
        if broke:
            return Choice("cpu", Fit("warning", broke))
        missing = absence(inventory) if seen is not None and not inventory.gpus else Fit("ok", "")
        return Choice(
            build.device, missing if missing.verdict == "failure" and build.device == "cpu" else Fit("ok", "")
        )
    fits = [fit(gpu, build) for gpu in seen]
    fitting = [at for at, found in enumerate(fits) if found.verdict != "failure"]
    if broke is None and build.device != "cpu" and fitting[:1] == [0]:
        return Choice(build.device, fits[0] if fits[0].verdict == "warning" else Fit("ok", ""))
    if broke is None and build.device == "cpu" and build.cuda is not None and fitting[:1] == [0]:
        sentence = f"torch {build.version} does not see {label(seen[0])}, though it fits"
        return Choice("cpu", Fit("warning", sentence, "see whether this user, or this container, may use the GPU"))
    others = [at for at in fitting if at > 0] if build.device != "cpu" or broke else []
    why = fits[0] if fits[0].verdict == "failure" else Fit("failure", broke or "")
    return Choice(f"cuda:{others[0]}" if others else "cpu", replace(why, verdict="warning"))


def _with_another(found: Fit, wanted: int, seen: Sequence[Gpu], build: TorchBuild) -> Fit:
    """A failure, whose way out is another card of the same machine where one fits."""
    for at, gpu in enumerate(seen):
        if at != wanted and fit(gpu, build).verdict != "failure":
            return replace(found, fix=f"--device cuda:{at} ({gpu.name}) fits; or {found.fix}")
    return found
