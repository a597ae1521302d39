"""The tables and outputs of docs/legacy-gpus.md, made by the code that they tell of.

    python -m tests.legacy_docs        writes them into the page anew; a test compares them

A block begins with a line <!-- made: NAME --> and ends with <!-- end -->.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client.doctor import judging
from client.doctor.findings import lines
from common.fitness import SETS, Remedy, driver_for, remedy, sm
from common.messages import MachineProbe, TorchBuild
from tests.fake_gpus import GTX_1080, LEGACY_TORCH, NEW_TORCH, RTX_4090, build, told

PAGE = Path(__file__).parent.parent / "docs" / "legacy-gpus.md"
BLOCK = re.compile(r"<!-- made: ([a-z -]+) -->\n.*?<!-- end -->", re.DOTALL)

GENERATIONS = (
    ("Kepler and older (GTX 600 and 700, K40, K80)", (3, 5)),
    ("Maxwell (GTX 750, GTX 900, M40)", (5, 0)),
    ("Pascal (P100)", (6, 0)),
    ("Pascal (GTX 1000, P4, P40)", (6, 1)),
    ("Volta (V100, Titan V)", (7, 0)),
    ("Turing (GTX 1600, RTX 2000, T4)", (7, 5)),
    ("Ampere (A100)", (8, 0)),
    ("Ampere (RTX 3000, A10, A40)", (8, 6)),
    ("Ada (RTX 4000, L4, L40)", (8, 9)),
    ("Hopper (H100, H200)", (9, 0)),
    ("Blackwell (B200)", (10, 0)),
    ("Blackwell (RTX 5000)", (12, 0)),
)
DRIVERS = ("580.95.05", "535.183.01", "470.256.02")
NO_KERNEL = "no kernel image is available for execution on the device"


def cards() -> Iterator[str]:
    """Which card and driver takes which file."""
    yield "| card | code | driver 580 and up | driver 525 to 579 | an older driver |"
    yield "|---|---|---|---|---|"
    for name, capability in GENERATIONS:
        cells = [cell(remedy(capability, driver)) for driver in DRIVERS]
        yield f"| {name} | {sm(capability)} | {' | '.join(cells)} |"


def cell(found: Remedy) -> str:
    """What a card and a driver need, in few words."""
    if found.requirements is None:
        return "CPU only"
    file = f"`{found.requirements.file}`"
    return f"driver {found.driver}, then {file}" if found.driver else file


def files() -> Iterator[str]:
    """What the torch of each file runs on."""
    yield "| file | torch | CUDA | has code for | needs driver |"
    yield "|---|---|---|---|---|"
    for one in SETS:
        torch = f"{one.torch} and newer" if one is SETS[0] else one.torch
        code = " ".join(one.architectures)
        yield f"| {one.file} | {torch} | {one.cuda} | {code} | {driver_for(one.cuda)} and up |"


def doctor(
    *gpus: dict[str, Any],
    torch: TorchBuild,
    device: str = "auto",
    driver: str = "580.95.05",
    failure: str = "",
    there: str = "",
) -> Iterator[str]:
    """What `lydian doctor --only training` prints on a machine with those cards.

    Args:
        gpus: the cards.
        torch: the build.
        device: that is asked for.
        driver: of the cards.
        failure: of a kernel on that device.
        there: the device on which a kernel runs instead.
    """
    yield "```"
    yield "$ lydian doctor --only training" + ("" if device == "auto" else f" --device {device}")
    probe = MachineProbe(inventory=told(*gpus, driver=driver), build=torch, failure=failure)
    choice = judging.chosen(probe, device, {})
    assert choice is not None
    tried = probe
    if there:
        tried = probe.model_copy(update={"failure": "", "build": torch.model_copy(update={"device": there})})
    yield from lines(judging.training(probe, device, choice, tried))
    yield "```"


def made() -> dict[str, str]:
    """Name -> what stands in the block."""
    blind = build(NEW_TORCH, architectures=())
    return {
        "cards": "\n".join(cards()),
        "files": "\n".join(files()),
        "in order": "\n".join(doctor(GTX_1080, torch=build(LEGACY_TORCH, "cuda"))),
        "no code": "\n".join(doctor(GTX_1080, torch=build(NEW_TORCH), failure=NO_KERNEL, there="cpu")),
        "old driver": "\n".join(doctor(RTX_4090, torch=blind, driver="535.183.01")),
        "mixed": "\n".join(doctor(GTX_1080, RTX_4090, torch=build(NEW_TORCH), failure=NO_KERNEL, there="cuda:1")),
        "mixed refused": "\n".join(
            doctor(GTX_1080, RTX_4090, torch=build(NEW_TORCH), device="cuda", failure=NO_KERNEL)
        ),
        "cpu build": "\n".join(
            doctor(RTX_4090, torch=build(NEW_TORCH, version="2.14.1+cpu", cuda=None, architectures=()))
        ),
    }


def page(text: str) -> str:
    """The page with every block made anew."""
    blocks = made()
    return BLOCK.sub(lambda found: f"<!-- made: {found[1]} -->\n{blocks[found[1]]}\n<!-- end -->", text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
