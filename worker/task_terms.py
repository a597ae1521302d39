"""What a job adds to the gradient of every local step: one small function a term.

Part of the child (worker/task_host.py), which loads it by its path: torch, none of our packages.

    backward ──▶ gradients, unscaled, of the whole batch ──the terms, in the order of TERMS──▶ clipped ──▶ a step

A term is a pure function of a parameter's weights, of what they were when the round began, and of the coefficient that
the job gives it; what it returns is added to the parameter's gradient. Another one is a function here, its line in
TERMS, and the job's key in `[train]`. What a term knows of the round's beginning is kept on the device, in float32.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Term = Callable[[Tensor, Tensor, float], Tensor]
"""weights now, weights when the round began, coefficient -> what the gradient gains; all of one shape and dtype."""

BeforeStep = Callable[[nn.Module], None]
"""Adds a term to the gradients of a model."""


def proximal(weights: Tensor, base: Tensor, mu: float) -> Tensor:
    """The gradient of (mu / 2) · ‖weights − base‖²: it pulls each local step back to the model that all began with.

    Source: Li et al. 2018, arXiv 1812.06127 (FedProx), equation 2 and algorithm 2.
    """
    return (weights - base).mul_(mu)


TERMS: dict[str, Term] = {"proximal": proximal}
"""Key in [train] -> the term whose coefficient it is; 0, or a key that is not given: there is none."""


def terms_of(config: Mapping[str, Any], base: Mapping[str, Tensor]) -> tuple[BeforeStep, ...]:
    """The terms that a job has.

    Args:
        config: coefficients by their key.
        base: as `base_of` gives it.
    """
    return tuple(partial(add, term, base, config[key]) for key, term in TERMS.items() if config.get(key))


def base_of(config: Mapping[str, Any], model: nn.Module, without: Collection[str] = ()) -> dict[str, Tensor]:
    """A copy of what is trained, to be taken when the round begins; nothing where the job has no terms.

    Args:
        config: coefficients by their key.
        model: on its device, with the round's base in it.
        without: parameters that are not the round's, and that no term has a say in.

    Returns:
        name -> tensor on the model's device, of float32, or of the parameter's dtype where that is wider.
    """
    if not any(config.get(key) for key in TERMS):
        return {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in without}
    return {name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in trained.items()}


@torch.no_grad()
def add(term: Term, base: Mapping[str, Tensor], coefficient: float, model: nn.Module) -> None:
    """Add a term to the gradients, as if the loss had it: a parameter without a gradient then has the term's alone.

    Raises:
        ValueError: a gradient is sparse.
    """
    for name, parameter in model.named_parameters():
        if name not in base:
            continue
        gained = term(parameter.detach().to(base[name].dtype), base[name], coefficient)
        if parameter.grad is None:
            parameter.grad = gained.to(parameter.dtype)
        elif parameter.grad.layout != torch.strided:
            raise ValueError(f"the gradient of {name!r} is sparse, and a term has every number: use sparse=False")
        else:
            parameter.grad.add_(gained)
