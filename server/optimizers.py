"""Outer steps: how the coordinator moves the model, given what the workers found.

Pure: float64 blocks in, float64 blocks out. The mean of the workers' models is not the new model yet: base − mean is a
gradient, of a kind, and an outer step is the optimiser that takes it. Only trained float tensors come here; buffers
take their mean as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.errors import BadJobError
from common.messages import AggregationSection
from server.averaging import Float64Block


class OuterStep(Protocol):
    """One optimiser over the pseudo-gradient base − mean.

    `apply` is called once for every block of every trained tensor, in any order and by several threads at once. What
    it remembers from round to round are numbers for each element, `states` of them: they come as blocks beside the
    model's, zeros in the first round, and are kept in float32.
    """

    @property
    def states(self) -> int:
        """Numbers that are remembered for each element."""
        ...

    @property
    def wants_base(self) -> bool:
        """Whether `base` is looked at. If not, it need not be read, and holds anything."""
        ...

    def apply(self, base: Float64Block, mean: Float64Block, states: Sequence[Float64Block]) -> Float64Block:
        """The new values of one block.

        Args:
            base: shape (n,), the model that the round began with.
            mean: shape (n,), the weighted mean of the updates.
            states: as many blocks of shape (n,) as `states` says; overwritten with what is to be remembered.

        Returns:
            shape (n,); may be `mean` itself, and may have overwritten either.
        """
        ...


@dataclass(frozen=True)
class FedAvg:
    """Federated averaging: SGD with learning rate 1, so that base − 1·(base − mean) is the mean.

    Source: McMahan et al. 2017, arXiv 1602.05629, algorithm 1; as an outer step: Reddi et al. 2020, arXiv 2003.00295.
    """

    states = 0
    wants_base = False

    def apply(self, base: Float64Block, mean: Float64Block, states: Sequence[Float64Block]) -> Float64Block:  # noqa: ARG002 - other steps need them
        """The mean. Going through the difference would only round it."""
        return mean


@dataclass(frozen=True)
class DiLoCo:
    """Nesterov's momentum over the pseudo-gradient, as PyTorch's SGD(nesterov=True) has it.

        g = base − mean;  b <- μ b + g;  x <- x − η (g + μ b)

    Source: Douillard et al. 2023, arXiv 2311.08105, algorithm 1 (OuterOpt); η 0.7 and μ 0.9 are its values.
    """

    states = 1  # the momentum b
    wants_base = True

    lr: float = 0.7
    momentum: float = 0.9

    def apply(self, base: Float64Block, mean: Float64Block, states: Sequence[Float64Block]) -> Float64Block:
        """One step."""
        (velocity,) = states
        gradient = np.subtract(base, mean, out=mean)
        np.multiply(velocity, self.momentum, out=velocity)
        np.add(velocity, gradient, out=velocity)
        np.add(gradient, self.momentum * velocity, out=gradient)
        np.multiply(gradient, self.lr, out=gradient)
        return np.subtract(base, gradient, out=gradient)


def outer_step(section: AggregationSection) -> OuterStep:
    """The outer step that a job asks for under `[aggregation]`.

    Raises:
        BadJobError: there is no such step.
    """
    match section.algorithm:
        case "fedavg":
            return FedAvg()
        case "diloco":
            given = {"lr": section.outer_lr, "momentum": section.outer_momentum}
            return DiLoCo(**{name: value for name, value in given.items() if value is not None})
        case unknown:
            raise BadJobError(f"there is no aggregation algorithm {unknown!r}", advice="Use fedavg or diloco.")
