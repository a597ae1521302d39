"""`python -m bench.faster`: what half precision, channels_last, torch.compile and loader processes win on this machine.

Trains the models of the built-in tasks on random batches of their shapes, in this process, and prints samples/s of each
way beside the plain loop, and after how many steps the compiler's time is won back. The better of several turns, the
ways in turn, so that a busy machine is unkind to all of them alike.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.tasks import char_lm, images

WARM_UP, TIMED, TURNS = 3, 10, 3
BATCH = 64
WAYS = ("plain", "bf16", "channels_last", "compile")
MODELS = ("fashion-mnist", "cifar10", "char-lm")

Step = Callable[[], None]


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--way", action="append", choices=WAYS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    print(f"torch {torch.__version__}, {device}, {asked.threads} threads, batches of {BATCH}")
    print("model           way             samples/s   times  ready after  won back after")
    for model in asked.model or MODELS:
        measure(model, device, asked.way or WAYS)
    print("reading a sample  in the loop  1 process  2 processes")
    for milliseconds in (0.0, 0.2, 2.0):
        rates = [read_rate(milliseconds, processes) for processes in (0, 1, 2)]
        print(f"{milliseconds:>13} ms {rates[0]:>10,.0f}/s {rates[1]:>8,.0f}/s {rates[2]:>10,.0f}/s", flush=True)


def measure(name: str, device: torch.device, ways: tuple[str, ...] | list[str]) -> None:
    """One model in every way."""
    steps: dict[str, Step] = {}
    ready: dict[str, float] = {}
    for way in ways:
        began = time.monotonic()
        steps[way] = step_of(name, device, way)
        for _ in range(WARM_UP):
            steps[way]()
        settle(device)
        ready[way] = time.monotonic() - began
    best: dict[str, float] = {}
    for _ in range(TURNS):
        for way, step in steps.items():
            began = time.monotonic()
            for _ in range(TIMED):
                step()
            settle(device)
            best[way] = min(best.get(way, 1e9), (time.monotonic() - began) / TIMED)
    for way, seconds in best.items():
        plain = best.get("plain", seconds)
        saved = plain - seconds
        back = (
            f"{max(ready[way] - ready.get('plain', 0.0), 0) / saved:,.0f} steps"
            if saved > 0 and way != "plain"
            else "-"
        )
        print(
            f"{name:<15} {way:<14} {BATCH / seconds:>9,.0f}/s {plain / seconds:>7.2f} {ready[way]:>10.1f} s  {back}",
            flush=True,
        )


def step_of(name: str, device: torch.device, way: str) -> Step:
    """One training step of a model, in one way."""
    torch.manual_seed(0)
    model, batch, loss_of = parts(name)
    model, batch = model.to(device), [part.to(device) for part in batch]
    if way == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        batch[0] = batch[0].to(memory_format=torch.channels_last) if batch[0].dim() == 4 else batch[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    called = torch.compile(model) if way == "compile" else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=way == "bf16"):
            loss = loss_of(called, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def parts(name: str) -> tuple[nn.Module, list[Tensor], Callable[[nn.Module, list[Tensor]], Tensor]]:
    """A built-in model, a random batch for it, and its loss."""
    if name == "char-lm":
        text = torch.randint(256, (BATCH, 65), dtype=torch.uint8)
        return char_lm.model({}), [text], lambda model, batch: char_lm.loss(model, batch, {})
    shape = (3, 32, 32) if name == "cifar10" else (1, 28, 28)
    pixels, classes = torch.randint(256, (BATCH, *shape), dtype=torch.uint8), torch.randint(10, (BATCH,))
    model = images.model({"images": name})
    return model, [pixels, classes], lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1])


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Slow(Dataset[Tensor]):
    """Samples that take some processor time each, as decoding and augmentation do."""

    def __init__(self, milliseconds: float) -> None:
        self._seconds = milliseconds / 1000

    def __len__(self) -> int:
        """Enough for a second or so."""
        return 2048 if self._seconds < 0.001 else 512

    def __getitem__(self, index: int) -> Tensor:
        """One sample."""
        until = time.process_time() + self._seconds
        while time.process_time() < until:
            pass
        return torch.full((1, 28, 28), float(index))


def read_rate(milliseconds: float, processes: int) -> float:
    """Samples/s that a loop of a step of the Fashion-MNIST model gets through, with so many readers."""
    model = images.model({"images": "fashion-mnist"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = Slow(milliseconds)
    loader = DataLoader(
        data, batch_size=BATCH, num_workers=processes, multiprocessing_context="fork" if processes else None
    )
    began = time.monotonic()
    for batch in loader:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(batch), torch.zeros(len(batch), dtype=torch.int64)).backward()
        optimizer.step()
    return len(data) / (time.monotonic() - began)


if __name__ == "__main__":
    main()
