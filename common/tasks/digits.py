"""Handwritten digits, 8×8 pixels, from scikit-learn: real data without a download. Plain PyTorch.

scikit-learn is looked for and not imported: that takes longer than everything else here, and this file is all we need.
"""
# ruff: noqa: ARG001 - every function of a task gets the config

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

TEST_EVERY = 5  # of the samples sorted by class, so that both splits have all classes in the same shares


def model(config: dict[str, Any]) -> nn.Module:
    """Two convolutions and one linear layer, 9,930 parameters: images (N, 1, 8, 8) -> logits (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def dataset(config: dict[str, Any], split: str) -> TensorDataset:
    """Images float32 (N, 1, 8, 8) in [0, 1] and classes int64 (N,): 1,437 to train, 360 to test, always the same.

    Raises:
        FileNotFoundError: scikit-learn is not installed.
    """
    with gzip.open(data_file(), "rt") as lines:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.float32)  # 64 pixels of 0 to 16, and the class
    is_test = np.zeros(len(rows), dtype=bool)
    is_test[np.argsort(rows[:, -1], kind="stable")[::TEST_EVERY]] = True
    part = torch.from_numpy(rows[{"train": ~is_test, "test": is_test}[split]])
    return TensorDataset(part[:, :-1].div(16).reshape(-1, 1, 8, 8), part[:, -1].long())


def data_file() -> Path:
    """The file that scikit-learn brings.

    Raises:
        FileNotFoundError: scikit-learn is not installed, or keeps it elsewhere.
    """
    found = find_spec("sklearn")
    for folder in found.submodule_search_locations or [] if found else []:
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return file
    raise FileNotFoundError("digits come with scikit-learn, which has no digits.csv.gz here: pip install scikit-learn")
