"""A small model with a shared body and a head: for jobs in which each worker keeps a head of its own."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    """1,000 numbers."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 64), nn.ReLU()), nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.body(x))


def model(config):
    return Net()


def dataset(config, split):
    """128 samples of four classes, which each machine calls by names of its own: by how far the folder turns them."""
    turned = int((Path(config["data"]["personal_task"]) / "turned").read_text())
    x = torch.randn(128, 8, generator=torch.Generator().manual_seed({"train": 1, "test": 2}[split]))
    return TensorDataset(x, (x[:, :4].argmax(1) + turned) % 4)
