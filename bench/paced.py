"""A task whose speed its machine sets: it trains for real, but sleeps until so many samples a second have passed.

`lydian work … --data speed=FILE`: the file has one number, the machine's speed; [config] rate is the samples a second
of speed 1. The data are random numbers in two classes; or Fashion-MNIST, with `--data images=FOLDER`. Of either, the
training set has [config] samples.
"""

import gzip
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

RESUMABLE = True


def model(config):
    """A small network: what a step costs is nothing beside the pace."""
    features = 784 if "images" in config["data"] else 8
    return nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 10))


def dataset(config, split):
    """The images of a folder, or random numbers."""
    folder, samples = config["data"].get("images"), int(config["samples"]) if split == "train" else 10_000
    if folder is not None:
        prefix = "train" if split == "train" else "t10k"
        images = _read(Path(folder), f"{prefix}-images-idx3-ubyte", 16)[: samples * 784].reshape(samples, 784)
        labels = _read(Path(folder), f"{prefix}-labels-idx1-ubyte", 8)[:samples]
        return TensorDataset(torch.from_numpy(images / np.float32(255)), torch.from_numpy(labels.astype(np.int64)))
    drawn = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, 8, generator=drawn)
    return TensorDataset(x, (x[:, 0] > 0).long())


def _read(folder, name, header):
    plain = folder / name
    data = plain.read_bytes() if plain.exists() else gzip.decompress((folder / f"{name}.gz").read_bytes())
    return np.frombuffer(data, np.uint8, offset=header)


def train(model, loader, context):
    """The usual loop; behind each step, a sleep for as long as the machine is to have needed."""
    rate = float(Path(context.config["data"]["speed"]).read_text()) * float(context.config["rate"])
    began, done = time.monotonic(), 0
    while not context.done:
        for x, y in loader:
            context.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            context.optimizer.step()
            done += len(x)
            time.sleep(max(began + done / rate - time.monotonic(), 0.0))
            context.step(loss)
