"""Fashion-MNIST with BatchNorm, whose running statistics are averaged as well: variances by the pooled formula.

Alone: `python examples/scripts/fashion_batchnorm.py`. By all: `lydian submit examples/scripts/fashion_batchnorm.py
--rounds 10 --arguments "--train 60000 --width 32" --watch`. The pictures: the folder that `lydian work --data
fashion-mnist=PATH` names, else Debian's package dataset-fashion-mnist.
"""

import argparse
import gzip
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import lydian

options = argparse.ArgumentParser()
options.add_argument("--train", type=int, default=6_000, help="pictures to train on, of 60,000")
options.add_argument("--width", type=int, default=16, help="channels of the first layer")
options.add_argument("--lr", type=float, default=0.1)
given = options.parse_args()
folder = Path(lydian.data("fashion-mnist", default="/usr/share/datasets/fashion-mnist"))
device = lydian.device()


def read(name, header):
    """The numbers of an IDX file, packed or not."""
    path = folder / name
    content = path.read_bytes() if path.exists() else gzip.decompress((folder / f"{name}.gz").read_bytes())
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8)


def load(part, most):
    pictures = read(f"{part}-images-idx3-ubyte", 16).view(-1, 1, 28, 28)[:most]
    return TensorDataset(pictures.float() / 255 - 0.286, read(f"{part}-labels-idx1-ubyte", 8)[:most].long())


def block(channels, more):
    return nn.Sequential(nn.Conv2d(channels, more, 3, padding=1), nn.BatchNorm2d(more), nn.ReLU(), nn.MaxPool2d(2))


train_set, test_set = load("train", given.train), load("t10k", 2_000)
model = nn.Sequential(
    block(1, given.width), block(given.width, 2 * given.width), nn.Flatten(), nn.Linear(2 * given.width * 49, 10)
).to(device)


def evaluate(model):
    right, total, count = 0, 0.0, 0
    for x, y in DataLoader(test_set, batch_size=500):
        logits, labels = model(x.to(device)), y.to(device)
        right += int((logits.argmax(1) == labels).sum())
        total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += len(y)
    return {"accuracy": (right, count), "loss": (total, count)}


for round in lydian.rounds(model, data=train_set, evaluate=evaluate):
    optimizer = torch.optim.SGD(model.parameters(), lr=given.lr, momentum=0.9)  # fresh: no momentum of another model
    share = Subset(train_set, round.share())
    model.train()
    losses = []
    for x, y in DataLoader(share, batch_size=64, shuffle=True, drop_last=len(share) > 64):
        if round.stopping:
            break
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        round.progress(samples=64 * len(losses), loss=loss)
    round.report(samples=len(share), loss=torch.stack(losses).mean() if losses else None)
