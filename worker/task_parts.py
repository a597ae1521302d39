"""Which of a model's tensors are trained, which travel and which stay: what [train] says of them, for one model.

Part of the child (worker/task_host.py), which loads it by its path: torch, none of our packages.

    state_dict ──┬── shared      in the global model and in every update
                 ├── personal    kept on the worker from round to round, by job and shard; nobody else sees them
                 └── built       nowhere: model(config) makes them on each machine; a digest says that they are equal

`frozen` takes parameters out of the training. What is frozen still travels, unless `trainable_only` says that only what
is trained does: then it is built. Names are those of the state_dict; patterns are the shell's (`encoder.*`).
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

SHOWN = 20  # names in a sentence
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
DIGEST_BYTES = 1 << 24  # that are brought over from the device at once


class UnfitError(ValueError):
    """What [train] says does not fit this model; the sentence says why."""


@dataclass(frozen=True)
class Parts:
    """The tensors of a model that do not travel, and of those that do, what no optimiser trains."""

    personal: frozenset[str] = frozenset()
    built: frozenset[str] = frozenset()
    untrained: frozenset[str] = frozenset()  # parameters that travel and were taken out of the training
    rest: str = ""  # digest of what is built; empty: all that is not personal travels

    @property
    def stays(self) -> frozenset[str]:
        """What is in no file that leaves this machine."""
        return self.personal | self.built

    @property
    def here(self) -> "Parts":
        """As a checkpoint has it: all but what is built."""
        return Parts(built=self.built)


WHOLE = Parts()
"""Of a job that says nothing: everything travels."""


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Take the parameters with these names out of the training.

    Raises:
        UnfitError: a pattern matches none, or nothing is left to train.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = matching("train.frozen", patterns, parameters, "parameter")
    for name in chosen:
        parameters[name].requires_grad_(False)
    if chosen and not any(parameter.requires_grad for parameter in parameters.values()):
        raise UnfitError("train.frozen leaves nothing to train: every parameter of the model is frozen")


def parts_of(config: Mapping[str, Any], model: nn.Module, tied: Mapping[str, str]) -> Parts:
    """Which tensors travel and which stay.

    Args:
        config: `personal`, `trainable_only` and `frozen`, as [train] has them; each may be missing.
        model: frozen already, and as model(config) built it.
        tied: other name -> first name, of tensors that share their memory.

    Raises:
        UnfitError: a pattern matches nothing; a personal tensor is tied to another; nothing that is trained travels.
    """
    state = model.state_dict()
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    trained |= {tied[name] for name in trained if name in tied}
    personal = personal_names(config.get("personal") or (), model, state, tied)
    built: set[str] = set()
    if config.get("trainable_only"):
        kept = trained | running_statistics(model) | personal
        built = {name for name in state if tied.get(name, name) not in kept}
    shared = [name for name in state if name not in personal and name not in built]
    if (personal or built) and not trained.intersection(shared):
        raise UnfitError("nothing that is trained is left to travel: train.personal keeps all of it on the workers")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    untrained = parameters.intersection(shared) - trained if config.get("frozen") else set()
    rest = digest_of(state, built) if config.get("trainable_only") else ""
    return Parts(frozenset(personal), frozenset(built), frozenset(untrained), rest)


def chosen_by(travels: Callable[[str], bool], model: nn.Module, tied: Mapping[str, str]) -> Parts:
    """Which tensors travel by a function of their names; of the rest, what is trained stays with its worker.

    Args:
        travels: name -> whether it does.
        model: as it was built.
        tied: as `parts_of` takes it.

    Raises:
        UnfitError: two tensors that share their memory are told apart; nothing that is trained travels.
    """
    state = model.state_dict()
    chosen = {name for name in state if travels(name)}
    for name, first in sorted(tied.items()):
        if (name in chosen) != (first in chosen):
            inside, outside = (name, first) if name in chosen else (first, name)
            raise UnfitError(f"it takes {inside!r}, which is tied to {outside!r}, and not that: take both or neither")
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    if not chosen & trained:
        raise UnfitError(f"it takes {len(chosen)} of {len(state)} tensors, and none that is trained")
    personal = (trained | running_statistics(model)).intersection(state) - chosen
    built = set(state) - chosen - personal
    return Parts(frozenset(personal), frozenset(built), frozenset(), digest_of(state, built) if built else "")


def personal_names(
    personal: str | Iterable[str], model: nn.Module, state: Mapping[str, Tensor], tied: Mapping[str, str]
) -> set[str]:
    """The tensors that stay with their worker.

    Args:
        personal: patterns, or `batchnorm`: all that BatchNorm layers have.
        model: whose they are.
        state: its state_dict.
        tied: as `parts_of` takes it.

    Raises:
        UnfitError: as `parts_of`.

    Source: Li et al. 2021, arXiv 2102.07623 (FedBN), algorithm 1: all but the parameters of BN is averaged.
    """
    if personal == "batchnorm":
        layers = {at: m for at, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        chosen = {f"{at}.{name}" if at else name for at, layer in layers.items() for name in layer.state_dict()}
        if not chosen:
            raise UnfitError('train.personal = "batchnorm": the model has no BatchNorm layer that keeps anything')
    else:
        chosen = matching("train.personal", personal, state, "tensor")
    for name, first in sorted(tied.items()):
        if (name in chosen) != (first in chosen):
            inside, outside = (name, first) if name in chosen else (first, name)
            sentence = f"train.personal has {inside!r}, which is tied to {outside!r}, and that is not in it"
            raise UnfitError(f"{sentence}: name both or neither")
    return chosen


def running_statistics(model: nn.Module) -> set[str]:
    """What normalisation layers count while they train: it is no parameter, and changes all the same."""
    layers = {at: m for at, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
    return {f"{at}.{name}" if at else name for at in layers for name in RUNNING}


def matching(key: str, patterns: Iterable[str], names: Collection[str], kind: str) -> set[str]:
    """The names that any of the patterns matches.

    Raises:
        UnfitError: a pattern matches none; the sentence has the names that there are.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            there = ", ".join(list(names)[:SHOWN]) + more
            raise UnfitError(f"{key}: {pattern!r} matches no {kind} of the model, which has {there}")
        chosen |= found
    return chosen


def digest_of(state: Mapping[str, Tensor], names: Collection[str]) -> str:
    """SHA-256 of some tensors, in hexadecimal: of their names, dtypes, shapes and bytes."""
    seen = hashlib.sha256()
    for name in sorted(names):
        tensor = state[name].detach()
        seen.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        for piece in torch.split(tensor.reshape(-1), DIGEST_BYTES // max(tensor.element_size(), 1)):
            if len(piece):
                seen.update(piece.to("cpu").contiguous().view(torch.uint8).numpy().data)
    return seen.hexdigest()


# ---------------------------------------------------------------- what is built stays as it was built

Marks = dict[str, tuple[Tensor, int]]
"""name -> tensor, and how often it was written to."""


def marks_of(model: nn.Module, names: Collection[str]) -> Marks:
    """Where some tensors of a model stand."""
    if not names:
        return {}
    return {name: (t, t._version) for name, t in model.state_dict(keep_vars=True).items() if name in names}


def changed(marks: Marks, model: nn.Module) -> str | None:
    """The first of these tensors that was written to or replaced since; None: none was."""
    now = marks_of(model, marks.keys())
    return next(
        (name for name in sorted(marks) if now[name][0] is not marks[name][0] or now[name][1] != marks[name][1]), None
    )


# ---------------------------------------------------------------- personal tensors


def personal_of(model: nn.Module, parts: Parts) -> dict[str, Tensor]:
    """The personal tensors of a model, by name."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name in parts.personal}


def kind_of(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes and dtypes: only with the same one do kept tensors fit."""
    kinds = [[name, list(tensors[name].shape), str(tensors[name].dtype)] for name in sorted(tensors)]
    return hashlib.sha256(json.dumps(kinds).encode()).hexdigest()


@torch.no_grad()
def put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put values into some tensors of a model, where they are."""
    state = model.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
