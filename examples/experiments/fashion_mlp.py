"""A task: Fashion-MNIST with one hidden layer. Small enough that hundreds of rounds take minutes on two cores.

[config] width    units of the hidden layer (64: 50,890 parameters)
         samples  of the training set: its first so many (12,000 of 60,000); the test set is whole
"""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

USUAL = "/usr/share/datasets/fashion-mnist"  # where Debian's package has it
FILES = {"train": "train", "test": "t10k"}
MEAN, DEVIATION = 0.2860, 0.3530  # of the training pixels in [0, 1]


def model(config):
    width = config.get("width", 64)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))


def dataset(config, split):
    folder = Path(config.get("data", {}).get("fashion-mnist", USUAL))
    images, classes = (
        read(folder / f"{FILES[split]}-{name}-ubyte.gz", header)
        for name, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    x = (torch.from_numpy(images).reshape(-1, 1, 28, 28) / 255 - MEAN) / DEVIATION
    most = config.get("samples", 12_000) if split == "train" else len(x)
    return TensorDataset(x[:most], torch.from_numpy(classes.astype(np.int64))[:most])


def read(file, header):
    """The bytes of an IDX file after its header."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not there: `apt install dataset-fashion-mnist`, or put the four files of Fashion-MNIST into a "
            "folder and say --data FOLDER"
        )
    return np.frombuffer(bytearray(gzip.decompress(file.read_bytes())), np.uint8, offset=header)
