"""Outer steps: how the coordinator moves the model, given what the workers found.

Pure: float64 blocks in, float64 blocks out. The mean of the workers' models is not the new model yet: base − mean is a
gradient, of a kind, and an outer step is the optimiser that takes it. Only trained float tensors come here; buffers
take their mean as it is.
"""

from collections.abc import Callable
from typing import Protocol

from common.errors import BadJobError
from server.averaging import Float64Block


class OuterStep(Protocol):
    """One optimiser over the pseudo-gradient base − mean, for one round.

    `apply` is called once for every block of every trained tensor: tensors in the order of the model's file, blocks
    ascending, each element in exactly one. A step that has state therefore reads and writes it as one flat stream
    beside the model, block for block, and never holds more of it than a block.
    """

    def apply(self, base: Float64Block, mean: Float64Block) -> Float64Block:
        """The new values of one block.

        Args:
            base: shape (n,), the model that the round began with.
            mean: shape (n,), the weighted mean of the updates.

        Returns:
            shape (n,); may be `mean` itself, and may have overwritten either.
        """
        ...


class FedAvg:
    """Federated averaging: SGD with learning rate 1, so that base − 1·(base − mean) is the mean.

    Source: McMahan et al. 2017, arXiv 1602.05629, algorithm 1; as an outer step: Reddi et al. 2020, arXiv 2003.00295.
    """

    def apply(self, base: Float64Block, mean: Float64Block) -> Float64Block:  # noqa: ARG002 - other steps need base
        """The mean. Going through the difference would only round it."""
        return mean


_STEPS: dict[str, Callable[[], OuterStep]] = {"fedavg": FedAvg}


def outer_step(name: str) -> OuterStep:
    """The outer step that a job names under `[aggregation] algorithm`.

    Raises:
        BadJobError: there is no such step.
    """
    if name not in _STEPS:
        known = ", ".join(sorted(_STEPS))
        raise BadJobError(
            f"there is no aggregation algorithm {name!r}", advice=f"Set aggregation.algorithm to one of: {known}."
        )
    return _STEPS[name]()
