"""What a job begins with: a file of weights, put into the model that model(config) built.

Part of the child (worker/task_host.py), which loads it by its path: torch, none of our packages.

    file ──differences──▶ a sentence, and the job fails, or
         └─put──▶ the model, which is then written as any first model is: with our notes, tied weights once

The file is the whole model, as `lydian pull` and others write it, tied weights under each of their names; or only what
travels, as the coordinator keeps it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

SHOWN = 3  # differences in a sentence
WIDER = {
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float64),
    (torch.bfloat16, torch.float64), (torch.float32, torch.float64),
}  # fmt: skip
"""(dtype of the file, of the model): every number of the first is one of the second."""


def put(house: ModuleType, model: nn.Module, file: Path, parts: Any) -> None:  # noqa: ANN401 - a task_parts.Parts
    """Have a model that was just built begin with what a file has. What stays with its worker begins as it was built.

    Args:
        house: task_host.
        model: on the CPU.
        file: safetensors.
        parts: of the model.

    Raises:
        TaskError: the file is of another model; code bad_task. What it does not have was built otherwise here; code
            no_data.
    """
    kept, layout = house.state_of(model, parts)
    given, state = load_file(file), model.state_dict()
    if parts.rest and rest_of(file):
        house.check_rest(file, parts.rest)
    found = list(differences(given, state, kept, layout.aliases, parts.built))
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        sentence = "the model that the job begins with does not fit the one that model(config) builds"
        raise house.TaskError("bad_task", f"{sentence}: {'; '.join(found[:SHOWN])}{more}")
    by_first = {layout.aliases.get(name, name): tensor for name, tensor in given.items()} | given
    house.put_state(model, {name: by_first[name].to(here.dtype) for name, here in kept.items()}, parts)


def rest_of(file: Path) -> str:
    """The digest of what was built where the file was written, and is not in it; empty: the file says of none."""
    with safe_open(file, framework="pt") as opened:
        return str(json.loads((opened.metadata() or {}).get("lydian", "{}")).get("rest") or "")


def differences(
    given: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    built: frozenset[str],
) -> Iterator[str]:
    """What of a file does not fit a model, a few words each, in the order of the model.

    Args:
        given: the file.
        state: all of the model.
        kept: what of it travels, tied weights under their first name.
        aliases: other name -> first name.
        built: what model(config) must build alike on each machine.
    """
    others = {first: other for other, first in aliases.items() if other in given}
    for name, here in kept.items():
        found = name if name in given else others.get(name)
        if found is None:
            yield f"{name!r} is missing"
        elif not fits(there := given[found], here):
            yield f"{found!r} is {kind(there)}, not {kind(here)}"
    for name in state:
        first = aliases.get(name, "")
        if first in given and name in given and not same(given[name], given[first]):
            yield f"{name!r} is another than {first!r}, and the model has one tensor for both"
        elif name in built and name in given and not same(given[name], state[name]):
            yield f"{name!r} is not as model(config) builds it, and with train.trainable_only it does not travel"
    yield from (f"{name!r} is not in the model" for name in given if name not in state)


def fits(there: Tensor, here: Tensor) -> bool:
    """Whether a tensor can be put into another one without a number changing."""
    return there.shape == here.shape and (there.dtype == here.dtype or (there.dtype, here.dtype) in WIDER)


def same(there: Tensor, here: Tensor) -> bool:
    """Whether two tensors have the same numbers."""
    return fits(there, here) and torch.equal(there.to(here.dtype), here.cpu())


def kind(tensor: Tensor) -> str:
    """A tensor's dtype and shape for a sentence."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
