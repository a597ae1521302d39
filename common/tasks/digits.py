"""Handwritten digits, 8×8 pixels, from scikit-learn: real data without a download. Plain PyTorch."""
# ruff: noqa: ARG001 - every function of a task gets the config

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

TEST_SHARE = 0.2


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
    """Images float32 (N, 1, 8, 8) in [0, 1] and classes int64 (N,): 1,437 to train, 360 to test, always the same."""
    images, classes = load_digits(return_X_y=True)
    parts = train_test_split(images, classes, test_size=TEST_SHARE, stratify=classes, random_state=0)
    train_images, test_images, train_classes, test_classes = (torch.tensor(part) for part in parts)
    pixels, labels = {"train": (train_images, train_classes), "test": (test_images, test_classes)}[split]
    return TensorDataset(pixels.float().div(16).reshape(-1, 1, 8, 8), labels.long())
