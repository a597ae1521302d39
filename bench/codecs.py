"""`python -m bench.codecs`: how fast each codec is, how few bytes it needs and what it loses of a real training.

The delta is what 40 steps of SGD change in the net of the built-in task (Fashion-MNIST where it is installed, else
scikit-learn's digits), from a fixed seed. Speeds count float32 bytes: `encode` and `decode` in memory, `update` and
`step` with files, from the trained model to the encoded file and from that to the next model, hashed and made durable.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.limits import MEGABYTE, best_of, copy_bandwidth
from common.codecs import CODECS, Float32s, codec
from common.deltas import apply_step, encode_update, is_trained
from common.weights import Notes, load, read_layout, save

STEPS = 40


@dataclass(frozen=True)
class Result:
    """One codec on one delta."""

    codec: str
    encode: float  # MB/s of float32, in memory
    decode: float
    update: float  # MB/s of float32, with files
    step: float
    bits: float  # a parameter
    error: float  # relative L2


def train(folder: Path) -> tuple[str, Path, Path]:
    """What was trained, the model before and after."""
    import torch
    from torch.nn.functional import cross_entropy

    from common.tasks import digits, images

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        what, net, data = "Fashion-MNIST", images.model({}), images.dataset({}, "train")
    except FileNotFoundError:
        what, net, data = "digits", digits.model({}), digits.dataset({}, "train")

    def write(name: str) -> Path:
        arrays = {key: tensor.detach().numpy() for key, tensor in net.state_dict().items()}
        save(folder / name, arrays, Notes())
        return folder / name

    base = write("base")
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05)
    order = torch.randperm(len(data))
    for at in range(STEPS):
        inputs, classes = data[order[64 * at % len(data) :][:64]]
        optimiser.zero_grad()
        cross_entropy(net(inputs), classes).backward()
        optimiser.step()
    return f"{what}, {STEPS} steps of SGD", base, write("trained")


def measure(name: str, base: Path, trained: Path) -> Result:
    """One codec's result."""
    chosen, layout, old, new = codec(name), read_layout(base), load(base), load(trained)
    names = [tensor.name for tensor in layout.tensors if is_trained(tensor, layout.notes)]
    flat: Float32s = np.concatenate([(new[key] - old[key]).reshape(-1) for key in names])
    data = chosen.encode(flat)
    update, following = base.with_name("update"), base.with_name("next")
    encoded = encode_update(base, trained, update, chosen)

    def rate(call: Callable[[], object]) -> float:
        def once() -> float:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began

        return flat.nbytes / best_of(5, once) / MEGABYTE

    return Result(
        codec=name,
        encode=rate(lambda: chosen.encode(flat)),
        decode=rate(lambda: chosen.decode(data, flat.size, out=flat)),
        update=rate(lambda: encode_update(base, trained, update, chosen)),
        step=rate(lambda: apply_step(base, update, following, chosen)),
        bits=8 * sum(chosen.size(old[key].size) for key in names) / flat.size,
        error=encoded.error,
    )


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.codecs", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args()
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}"
    )
    copy = copy_bandwidth() / MEGABYTE
    with tempfile.TemporaryDirectory() as folder:
        what, base, trained = train(Path(folder))
        size = base.stat().st_size
        results = [measure(name, base, trained) for name in CODECS]
    if chosen.json:
        found = {"machine": machine, "copy_megabytes_per_s": copy, "delta": what, "model_bytes": size}
        print(json.dumps({**found, "codecs": [asdict(result) for result in results]}, indent=2))
        return
    print(f"{machine}; copy {copy:,.0f} MB/s")
    print(f"{what}, a model of {size / MEGABYTE:.1f} MB")
    print()
    print("MB/s of float32   encode   decode   update     step   bits a parameter   relative error")
    for result in results:
        rates = (result.encode, result.decode, result.update, result.step)
        columns = " ".join(f"{rate:8,.0f}" for rate in rates)
        print(f"{result.codec:14s} {columns}   {result.bits:16.3f}   {result.error:14.2%}")


if __name__ == "__main__":
    main()
