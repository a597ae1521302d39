"""What a shard of a job with `train.drift` adds to the gradients of its steps, and the learning rates that these had.

Part of the child (worker/task_host.py), which loads it by its path: torch, none of our packages.

    correction file ──read──▶ name -> float32 tensor ──add──▶ every gradient, unscaled, before it is clipped

What a correction is, and what becomes of the sum of rates, is in common/drift.py. FedDyn's pull to the round's model is
the proximal term of worker/task_terms.py, with α for its coefficient.
"""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class UnfitError(Exception):
    """The task cannot be trained by this method, in words."""


def read(path: str, model: nn.Module, aliases: dict[str, str]) -> dict[str, Tensor]:
    """A shard's correction.

    Args:
        path: of the file that the agent made; empty: there is nothing to correct yet.
        model: on its device.
        aliases: other name of a tied weight -> the name in the file.

    Returns:
        name of a parameter -> float32 on its device.

    Raises:
        UnfitError: the file and the model's trainable parameters have different names: some would go uncorrected.
    """
    if not path:
        return {}
    given = load_file(path)
    parameters = dict(model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad} - aliases.keys()
    if strange := sorted((given.keys() - parameters.keys()) | (trained - given.keys())):
        raise UnfitError(f"{strange[0]!r} is known by another name in the model's state, and would not be corrected")
    return {name: given[name].to(parameters[name].device) for name in trained}


@torch.no_grad()
def add(correction: Mapping[str, Tensor], model: nn.Module) -> None:
    """Add a shard's correction to its gradients. One that is not there is zero, and not nothing: what no loss of this
    shard depends on is moved by the others', and else its slot would run away from zero by the mean of all.

    Raises:
        ValueError: a gradient is sparse.
    """
    for name, parameter in model.named_parameters():
        given = correction.get(name)
        if given is None:
            continue
        if parameter.grad is None:
            parameter.grad = given.to(parameter.dtype, copy=True)  # clipping changes it in place
        elif parameter.grad.layout != torch.strided:
            raise ValueError(f"the gradient of {name!r} is sparse, and its correction is not: use sparse=False")
        else:
            parameter.grad.add_(given)


def why_not_plain(optimizer: Any) -> str | None:  # noqa: ANN401 - a task may bring its own kind
    """Why an optimiser is not plain SGD; None: it is."""
    if type(optimizer) is not torch.optim.SGD:
        return f"a {type(optimizer).__name__}"
    if len(optimizer.param_groups) != 1:
        return f"SGD with {len(optimizer.param_groups)} groups of parameters"
    momentum = optimizer.param_groups[0]["momentum"]
    return f"SGD with momentum {momentum:g}" if momentum else None
