"""Fashion-MNIST, MNIST and CIFAR-10: pictures of ten kinds. Plain PyTorch; nothing is downloaded on import.

Which one, `config["images"]` says. The data is looked for on the machine first: in the folder that `lydian work
--data NAME=FOLDER` names, and then only there; else in /usr/share/datasets/NAME (Debian) and where torchvision keeps it
under ~/.cache/lydian/data, ~/data and ./data. If it is nowhere, torchvision downloads it into ~/.cache/lydian/data.
"""

import fcntl
import gzip
import math
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

Reader = Callable[[Path, str], tuple[Tensor, Tensor] | None]

DOWNLOAD_TIMEOUT_S = 30.0  # without a byte
IDX_UINT8 = 0x08  # third byte of the magic number; the fourth is the number of dimensions
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@dataclass(frozen=True)
class Source:
    """One data set: its class in torchvision, how to get it otherwise, and the numbers that centre its pixels."""

    torchvision_name: str
    advice: str
    mean: tuple[float, ...]  # of the training pixels in [0, 1], a channel
    deviation: tuple[float, ...]


SOURCES = {
    "fashion-mnist": Source("FashionMNIST", "`apt install dataset-fashion-mnist`, or ", (0.2860,), (0.3530,)),
    "mnist": Source("MNIST", "", (0.1307,), (0.3081,)),
    "cifar10": Source("CIFAR10", "", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


# ---------------------------------------------------------------- the models


class Pixels(nn.Module):
    """Bytes to centred numbers, uint8 (N, C, H, W) -> float32; on the device, so that only bytes travel there."""

    scale: Tensor
    shift: Tensor

    def __init__(self, source: Source) -> None:
        super().__init__()
        scale = [1 / (255 * deviation) for deviation in source.deviation]
        shift = [-mean / deviation for mean, deviation in zip(source.mean, source.deviation, strict=True)]
        self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1), persistent=False)  # a constant: not sent
        self.register_buffer("shift", torch.tensor(shift).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Centred pixels of mean 0 and deviation 1 over the training set."""
        return images * self.scale + self.shift


def small_cnn(source: Source) -> nn.Module:
    """The net of McMahan et al. 2017, section 3, 1,663,370 parameters: images (N, 1, 28, 28) -> logits (N, 10)."""
    return nn.Sequential(
        Pixels(source),
        nn.Conv2d(1, 32, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def colour_cnn(source: Source) -> nn.Module:
    """Six convolutions with GroupNorm, images (N, 3, 32, 32) -> logits (N, 10), 0.3 M parameters.

    GroupNorm and not BatchNorm: it keeps no statistics that differ between machines with different data.
    """
    layers: list[nn.Module] = [Pixels(source)]
    channels = 3
    for width in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def model(config: dict[str, Any]) -> nn.Module:
    """The net for these pictures: uint8 images -> logits (N, 10)."""
    name = chosen(config)
    return colour_cnn(SOURCES[name]) if name == "cifar10" else small_cnn(SOURCES[name])


# ---------------------------------------------------------------- the data


def dataset(config: dict[str, Any], split: str) -> TensorDataset:
    """Images uint8 (N, C, H, W) and classes int64 (N,). Bytes take a quarter of the memory of float32.

    Raises:
        FileNotFoundError: the data is not on this machine and cannot be downloaded.
        ValueError: a file is damaged.
    """
    name = chosen(config)
    read = read_cifar10 if name == "cifar10" else read_idx_folder
    named = config.get("data", {}).get(name)
    folders = named_folders(name, Path(named).expanduser()) if named else usual_folders(name)
    for folder in folders:
        if (found := read(folder, split)) is not None:
            return TensorDataset(*found)
    if named:
        raise missing(name, folders[:1], "a folder that was named is never downloaded into")
    return TensorDataset(*read_after_download(name, split, read))


def chosen(config: dict[str, Any]) -> str:
    """The name of the data set that the job is about.

    Raises:
        ValueError: there is no such data set.
    """
    name: str = config.get("images", "fashion-mnist")
    if name not in SOURCES:
        raise ValueError(f"[config] images is {name!r}; it must be one of {', '.join(SOURCES)}")
    return name


def cache() -> Path:
    """Where downloads go."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lydian" / "data"


def inside(name: str, root: Path) -> Path:
    """Where torchvision keeps a data set under its root."""
    return root if name == "cifar10" else root / SOURCES[name].torchvision_name / "raw"


def usual_folders(name: str) -> list[Path]:
    """Where the data may be when nobody said where, in the order of looking."""
    roots = (cache(), Path.home() / "data", Path("data").resolve())
    return [Path("/usr/share/datasets") / name, *(inside(name, root) for root in roots)]


def named_folders(name: str, folder: Path) -> list[Path]:
    """Where the data may be when a folder was named: in it, or as torchvision keeps it."""
    return [folder, folder.parent if name == "cifar10" else folder / "raw", inside(name, folder)]


def missing(name: str, folders: list[Path], why: str) -> FileNotFoundError:
    """The one sentence on data that is not there."""
    return FileNotFoundError(
        f"{name} is not on this machine: looked in {', '.join(map(str, folders))} ({why}); {SOURCES[name].advice}"
        f"put its files into a folder and start the worker with `lydian work --data {name}=FOLDER`"
    )


def read_idx_folder(folder: Path, split: str) -> tuple[Tensor, Tensor] | None:
    """Images uint8 (N, 1, 28, 28) and classes int64 (N,) of a folder with MNIST's files; None if it has none.

    Raises:
        ValueError: a file is damaged, or the two do not belong together.
    """
    paths = [find_idx(folder, stem) for stem in IDX_FILES[split]]
    if paths[0] is None or paths[1] is None:
        return None
    images, classes = read_idx(paths[0], dimensions=3), read_idx(paths[1], dimensions=1)
    if len(images) != len(classes):
        raise ValueError(f"{paths[0]} has {len(images)} images, {paths[1]} has {len(classes)} classes: fetch both anew")
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(classes.astype(np.int64))


def find_idx(folder: Path, stem: str) -> Path | None:
    """The file of this name, plain or compressed."""
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def read_idx(path: Path, dimensions: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read an IDX file of bytes, compressed if its name ends in .gz.

    Args:
        path: the file: a magic number, one big-endian length a dimension, then the bytes.
        dimensions: how many dimensions it must have.

    Returns:
        uint8, of the shape that the file says.

    Raises:
        ValueError: the file is damaged or something else.

    Source: Y. LeCun, "The IDX file format", as the MNIST pages describe it.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it anew") from error
    header = 4 + 4 * dimensions
    if raw[:4] != bytes((0, 0, IDX_UINT8, dimensions)) or len(raw) < header:
        begin = raw[:4].hex() or "nothing"
        raise ValueError(f"{path} is not an IDX file of bytes in {dimensions} dimensions: it begins with {begin}")
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    if len(raw) - header != math.prod(shape):
        raise ValueError(f"{path} is damaged: {len(raw) - header} bytes for the shape {shape}; fetch it anew")
    return np.frombuffer(bytearray(raw), dtype=np.uint8, offset=header).reshape(shape)


def read_cifar10(root: Path, split: str) -> tuple[Tensor, Tensor] | None:
    """Images uint8 (N, 3, 32, 32) and classes int64 (N,), by torchvision, which checks each file's digest first."""
    if not (root / "cifar-10-batches-py").is_dir():
        return None
    from torchvision.datasets import CIFAR10

    pictures = CIFAR10(str(root), train={"train": True, "test": False}[split], download=False)
    images = torch.from_numpy(pictures.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(pictures.targets, dtype=torch.int64)


def read_after_download(name: str, split: str, read: Reader) -> tuple[Tensor, Tensor]:
    """Have torchvision download the data into the cache, and read it.

    Raises:
        FileNotFoundError: that did not work.
    """
    folder = inside(name, cache())
    try:
        with alone_in(cache()):
            if (found := read(folder, split)) is not None:  # another worker on this machine was faster
                return found
            fetch(name)
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: torchvision, when no mirror has the file
        why = f"and it could not be downloaded: {' '.join(str(error).split())}"
        raise missing(name, usual_folders(name), why) from error
    found = read(folder, split)
    if found is None:
        raise missing(name, usual_folders(name), f"and after the download it is not in {folder}")
    return found


def fetch(name: str) -> None:
    """Download both splits into the cache."""
    import torchvision

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        getattr(torchvision.datasets, SOURCES[name].torchvision_name)(str(cache()), download=True)
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process of this machine at a time; the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
