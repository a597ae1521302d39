"""Accuracy class by class, as sums and counts that add up over batches, ranks and workers.

Part of the child (worker/task_host.py), which loads it by its path: torch, none of our packages.
"""

import torch
from torch import Tensor

MOST = 90  # classes with a name of their own: a message takes 100 names, and the rest are the task's other metrics


def accuracies(wanted: Tensor, right: Tensor) -> dict[str, tuple[float, float]]:
    """How many samples of each class were told right, and how many there are.

    The first MOST classes have names, `accuracy/0` …; all beyond are one, `accuracy/rest`: which have a name does not
    depend on the model, so that each curve goes on from evaluation to evaluation.

    Args:
        wanted: int64, any shape: the class of each prediction; one below 0 is none (cross_entropy passes over it).
        right: bool, the same shape.

    Returns:
        name -> (right, all); a class without a sample has no name.
    """
    counted = wanted >= 0
    classes = wanted[counted].clamp(max=MOST).flatten()
    there = torch.bincount(classes, minlength=1).tolist()
    hits = torch.bincount(classes[right[counted].flatten()], minlength=len(there)).tolist()
    names = [f"accuracy/{'rest' if number == MOST else number}" for number in range(len(there))]
    pairs = zip(names, hits, there, strict=True)
    return {name: (float(hit), float(count)) for name, hit, count in pairs if count}
