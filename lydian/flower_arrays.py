"""The arrays of a Flower app as a model that travels: names, shapes and dtypes are those of the first ones.

ArrayRecord or Parameters ──▶ {name: numpy array} ──▶ Arrays, a torch.nn.Module ──▶ safetensors, and back
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STATISTICS = ("running_mean", "running_var")
"""What normalisation layers count: averaged, and no parameters, so that no optimiser of the coordinator moves them."""

Named = Mapping[str, Any]
"""Name -> numpy array, in the app's order."""


class Arrays(nn.Module):
    """Tensors by name, with a state_dict of those very names in that very order, whatever they are called."""

    def __init__(self, arrays: Named) -> None:
        """Copy arrays.

        Raises:
            ValueError: there is none, or one has no numbers that a tensor can have.
        """
        super().__init__()
        if not arrays:
            raise ValueError("the app begins with no arrays: give initial_arrays a model's, as ArrayRecord(state_dict)")
        self._order = list(arrays)
        for name, array in arrays.items():
            tensor, (holder, last) = tensor_of(name, array), self._place(name)
            if tensor.is_floating_point() and last not in STATISTICS:
                holder._parameters[last] = nn.Parameter(tensor)
            else:
                holder._buffers[last] = tensor

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The module that a name leads to, and what it is called there. No name is refused, as add_module would."""
        holder: nn.Module = self
        *path, last = name.split(".")
        for part in path:
            below = holder._modules.get(part) or nn.Module()
            holder._modules[part] = holder = below
        return holder, last

    def arrays(self) -> dict[str, Any]:
        """Name -> numpy array, copies, in the app's order."""
        state = self.state_dict()
        return {name: state[name].detach().cpu().numpy().copy() for name in self._order}

    @torch.no_grad()
    def put(self, arrays: Named, who: str) -> None:
        """Take new values, in place.

        Args:
            arrays: of the same names and shapes.
            who: gave them, for the sentence.

        Raises:
            ValueError: they are other ones.
        """
        state = self.state_dict(keep_vars=True)
        taken = {name: fitting(name, array, state.get(name), who) for name, array in arrays.items()}
        if missing := [name for name in self._order if name not in taken]:
            raise ValueError(f"{who} gave {len(taken)} arrays and not {missing[0]!r}, of which there are {len(state)}")
        for name, tensor in taken.items():
            state[name].copy_(tensor)


def tensor_of(name: str, array: Any) -> Tensor:  # noqa: ANN401 - a numpy array
    """A tensor with a copy of an array.

    Raises:
        ValueError: torch has no such numbers.
    """
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError as error:
        raise ValueError(f"the array {name!r} is of {array.dtype}, which no tensor can hold") from error


def fitting(name: str, array: Any, known: Tensor | None, who: str) -> Tensor:  # noqa: ANN401 - a numpy array
    """An array as a tensor that can take the known one's place.

    Raises:
        ValueError: it cannot.
    """
    tensor = tensor_of(name, array)
    if known is None:
        raise ValueError(f"{who} gave an array {name!r}, which the model that the job began with has not")
    if tensor.shape != known.shape or not torch.can_cast(tensor.dtype, known.dtype):
        there, here = shown(tensor), shown(known)
        raise ValueError(f"{who} gave {name!r} as {there}, and the model that the job began with has it as {here}")
    return tensor


def shown(tensor: Tensor) -> str:
    """A tensor's dtype and shape for a sentence."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


class Mean:
    """The mean of several clients' arrays, weighted by their samples, as FedAvg has it; a single client's as they are.

    Source: McMahan et al. 2017, algorithm 1, last line: w <- sum_k (n_k / n) w_k. Whole numbers: the largest.
    """

    def __init__(self) -> None:
        self.samples, self._clients, self._sums = 0, 0, dict[str, Any]()

    def add(self, arrays: Named, samples: int) -> None:
        """Take what one client gave. Shapes must be equal; `Arrays.put` looks at names.

        Raises:
            ValueError: the shapes are not.
        """
        for name, given in arrays.items():
            array, before = np.asarray(given), self._sums.get(name)
            whole = not np.issubdtype(array.dtype, np.floating)
            if self._clients and (before is None or before[0].shape != array.shape):
                raise ValueError(f"two clients of this worker gave {name!r} in unlike shapes")
            if before is None:
                self._sums[name] = (array if whole else array * np.float64(samples), array)
            else:
                joined = np.maximum(before[0], array) if whole else before[0] + array * np.float64(samples)
                self._sums[name] = (joined, array)
        self.samples, self._clients = self.samples + samples, self._clients + 1

    def arrays(self) -> dict[str, Any]:
        """The mean, in the dtypes that came."""
        if self._clients == 1:
            return {name: last for name, (_, last) in self._sums.items()}
        floats = {name for name, (_, last) in self._sums.items() if np.issubdtype(last.dtype, np.floating)}
        return {
            name: (total / self.samples).astype(last.dtype) if name in floats else total
            for name, (total, last) in self._sums.items()
        }
