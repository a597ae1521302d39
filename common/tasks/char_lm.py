"""A language model over bytes, for text that is on the machine already. Plain PyTorch.

The text: the file or folder of .txt and .py files that `lydian work --data char-lm=PATH` names, else the source code of
Python's standard library. The first `characters` bytes of it are used, and the last tenth of those is the test split.

There are no classes here, so shards cannot be cut by label: use partition iid, or local for text that stays private.
"""
# ruff: noqa: ARG001 - every function of a task gets the config

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

VOCABULARY = 256  # bytes, so that any text fits and no table has to travel
WINDOW = 128  # bytes that the model reads and predicts at a time
CHARACTERS = 2_000_000  # less than any standard library has, so that all machines count the same samples
TEST_SHARE = 0.1
SUFFIXES = {".txt", ".py"}


class ByteModel(nn.Module):
    """Embedding, one GRU, one linear layer: bytes (N, T) -> logits of the next byte (N, T, 256)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 64)
        self.memory = nn.GRU(64, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, bytes_NT: Tensor) -> Tensor:  # noqa: N803 - the letters are the axes
        """Logits of the byte that follows each of these."""
        states_NTD, _ = self.memory(self.embedding(bytes_NT.long()))  # noqa: N806
        logits: Tensor = self.head(states_NTD)
        return logits


def model(config: dict[str, Any]) -> nn.Module:
    """A GRU of `width` states (default 192: 214,400 parameters)."""
    return ByteModel(int(config.get("width", 192)))


def dataset(config: dict[str, Any], split: str) -> TensorDataset:
    """Windows of the text, uint8 (N, 129): 128 bytes to read, and each one's next byte to predict.

    Raises:
        FileNotFoundError: the named folder has no text.
    """
    text = read_text(config)
    cut = int(len(text) * (1 - TEST_SHARE))
    part = {"train": text[:cut], "test": text[cut:]}[split]
    if len(part) <= WINDOW:
        raise ValueError(f"{len(part)} bytes of text for the {split} split, and one sample needs {WINDOW + 1}")
    return TensorDataset(part.unfold(0, WINDOW + 1, WINDOW))


def loss(model: nn.Module, batch: list[Tensor], config: dict[str, Any]) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    logits, following = predict(model, batch)
    return functional.cross_entropy(logits, following)


def metrics(model: nn.Module, batch: list[Tensor], config: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Accuracy and cross-entropy (nats) of the next byte, as sums over bytes."""
    logits, following = predict(model, batch)
    right = (logits.argmax(1) == following).sum().item()
    total = functional.cross_entropy(logits, following, reduction="sum").item()
    return {"accuracy": (right, following.numel()), "loss": (total, following.numel())}


def optimizer(model: nn.Module, config: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW: plain SGD needs many times the steps for a recurrent net."""
    return torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=config.get("weight_decay", 0.0))


def predict(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (N·T, 256) and the bytes int64 (N·T,) that they are about."""
    (window,) = batch
    return model(window[:, :-1]).flatten(0, 1), window[:, 1:].long().flatten()


def read_text(config: dict[str, Any]) -> Tensor:
    """The first `characters` bytes of the text, uint8 (n,).

    Raises:
        FileNotFoundError: the named folder or file has no text.
    """
    limit = int(config.get("characters", CHARACTERS))
    named = config.get("data", {}).get("char-lm")
    root = Path(named).expanduser() if named else Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in text_files(root):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    if not text:
        wanted = " or ".join(sorted(SUFFIXES))
        raise FileNotFoundError(
            f"char-lm finds no {wanted} file with text under {root}: name a folder that has some with "
            "`lydian work --data char-lm=PATH`"
        )
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def text_files(root: Path) -> Iterator[Path]:
    """A file itself, or the text files of a folder and of all below it, in the order of their names."""
    if root.is_file():
        yield root
        return
    for path in sorted(root.iterdir() if root.is_dir() else ()):
        if path.is_dir() and path.name not in {"site-packages", "__pycache__"}:
            yield from text_files(path)
        elif path.suffix in SUFFIXES and path.is_file():
            yield path
