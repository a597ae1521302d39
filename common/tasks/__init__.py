"""The built-in tasks: what they are called, where their files are, and the job that suits them. Never imports torch.

The task files beside this one are plain PyTorch and import nothing of ours; the child that trains loads them by path.
"""

from dataclasses import dataclass, field
from pathlib import Path

Value = str | int | float | bool

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class BuiltinTask:
    """One task that needs no file of the user's."""

    name: str
    file: Path
    summary: str  # one line, for `lydian submit --help`
    defaults: dict[str, Value]  # dotted job keys, e.g. {"train.lr": 0.05}, that hold unless the job says otherwise
    config: dict[str, Value] = field(default_factory=dict)  # handed to the task under the job's [config]


BUILTIN: dict[str, BuiltinTask] = {
    task.name: task
    for task in (
        BuiltinTask(
            name="digits",
            file=_HERE / "digits.py",
            summary="1,797 handwritten digits of 8×8 pixels; ships with scikit-learn, trains in seconds",
            defaults={"train.local_epochs": 2, "train.batch_size": 16, "train.lr": 0.05, "train.momentum": 0.9},
        ),
        BuiltinTask(
            name="fashion-mnist",
            file=_HERE / "images.py",
            summary="70,000 pictures of clothes, 28×28 (Debian: dataset-fashion-mnist); 1.7 M parameters",
            defaults={"train.local_epochs": 1, "train.batch_size": 64, "train.lr": 0.05, "train.momentum": 0.9},
            config={"images": "fashion-mnist"},
        ),
        BuiltinTask(
            name="mnist",
            file=_HERE / "images.py",
            summary="70,000 handwritten digits, 28×28; 1.7 M parameters",
            defaults={"train.local_epochs": 1, "train.batch_size": 64, "train.lr": 0.05, "train.momentum": 0.9},
            config={"images": "mnist"},
        ),
        BuiltinTask(
            name="cifar10",
            file=_HERE / "images.py",
            summary="60,000 colour pictures of 10 kinds, 32×32; a small convolutional net with GroupNorm",
            defaults={"train.local_epochs": 1, "train.batch_size": 64, "train.lr": 0.05, "train.momentum": 0.9},
            config={"images": "cifar10"},
        ),
        BuiltinTask(
            name="char-lm",
            file=_HERE / "char_lm.py",
            summary="next-byte model of text on the machine: your folder, or else Python's own source code",
            defaults={"train.local_epochs": 1, "train.batch_size": 32, "train.lr": 0.005},
        ),
    )
}
