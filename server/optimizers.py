"""Outer steps: how the coordinator moves the model, given what the workers found.

Pure: float64 blocks in, float64 blocks out. The mean of the workers' models is not the new model yet: base − mean is a
gradient, of a kind, and an outer step is the optimiser that takes it. Only trained float tensors come here; buffers
take their mean as it is.

A step is a frozen dataclass: its fields are the keys `outer_…` of a job, with their defaults, and `apply` is its rule.
STEPS names it, and common.messages.OUTER_KEYS says which keys it has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.errors import BadJobError
from common.messages import OUTER_KEYS, AggregationSection
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
        """Whether `base` is looked at. If not, it need not be read, and holds anything; and the step gives the mean."""
        ...

    def apply(self, base: Float64Block, mean: Float64Block, states: Sequence[Float64Block]) -> Float64Block:
        """The new values of one block.

        Args:
            base: shape (n,), the model that the round began with.
            mean: shape (n,), the weighted mean of the updates.
            states: as many blocks of shape (n,) as `states` says; overwritten with what is to be remembered. After
                them those that are only read (server.folding.Memory).

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
class FedAvgM:
    """Heavy-ball momentum over the mean change Δ = mean − base.

        m <- β m + Δ;  x <- x + η m

    Source: Hsu, Qi, Brown 2019, arXiv 1909.06335; β 0.9 is its value.
    """

    states = 1  # the momentum m
    wants_base = True

    lr: float = 1.0
    momentum: float = 0.9

    def apply(self, base: Float64Block, mean: Float64Block, states: Sequence[Float64Block]) -> Float64Block:
        """One step."""
        (velocity,) = states
        change = np.subtract(mean, base, out=mean)
        _gather(velocity, self.momentum, change)
        np.multiply(velocity, self.lr, out=change)
        return np.add(base, change, out=change)


@dataclass(frozen=True)
class FedAdagrad:
    """Adagrad over the mean change Δ = mean − base: elements that have moved much move less.

        m <- β1 m + (1 − β1) Δ;  v <- v + Δ²;  x <- x + η m / (√v + τ)

    Source: Reddi et al. 2020, arXiv 2003.00295, algorithm 2, its first line for v; without momentum (β1 0) as there.
    """

    states = 2  # the mean change m, and the sum v of its squares
    wants_base = True

    lr: float = 0.1
    beta1: float = 0.0
    tau: float = 1e-3

    def apply(self, base: Float64Block, mean: Float64Block, states: Sequence[Float64Block]) -> Float64Block:
        """One step."""
        first, second = states
        square = _follow(base, mean, first, self.beta1)
        np.add(second, square, out=second)
        return _move(base, first, second, self.lr, self.tau, out=square)


@dataclass(frozen=True)
class FedAdam:
    """Adam over the mean change Δ = mean − base, without the correction of its first steps: the paper has none.

        m <- β1 m + (1 − β1) Δ;  v <- β2 v + (1 − β2) Δ²;  x <- x + η m / (√v + τ)

    Source: Reddi et al. 2020, arXiv 2003.00295, algorithm 2, its third line for v, with v = 0 in the beginning.
    """

    states = 2  # the means m of the change and v of its square
    wants_base = True

    lr: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def apply(self, base: Float64Block, mean: Float64Block, states: Sequence[Float64Block]) -> Float64Block:
        """One step."""
        first, second = states
        square = _follow(base, mean, first, self.beta1)
        np.multiply(second, self.beta2, out=second)
        np.add(second, np.multiply(square, 1.0 - self.beta2, out=square), out=second)
        return _move(base, first, second, self.lr, self.tau, out=square)


@dataclass(frozen=True)
class FedYogi:
    """Yogi over the mean change Δ = mean − base: as Adam, but v changes by no more than (1 − β2) Δ² a round.

        m <- β1 m + (1 − β1) Δ;  v <- v − (1 − β2) Δ² sign(v − Δ²);  x <- x + η m / (√v + τ)

    sign(0) is 0, and v never falls below 0: where it falls, it is above Δ².

    Source: Reddi et al. 2020, arXiv 2003.00295, algorithm 2, its second line for v, with v = 0 in the beginning.
    """

    states = 2  # the mean change m, and v, which follows its square
    wants_base = True

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def apply(self, base: Float64Block, mean: Float64Block, states: Sequence[Float64Block]) -> Float64Block:
        """One step."""
        first, second = states
        square = _follow(base, mean, first, self.beta1)
        np.multiply(square, np.sign(second - square) * (1.0 - self.beta2), out=square)
        np.subtract(second, square, out=second)
        return _move(base, first, second, self.lr, self.tau, out=square)


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
        _gather(velocity, self.momentum, gradient)
        np.add(gradient, self.momentum * velocity, out=gradient)
        np.multiply(gradient, self.lr, out=gradient)
        return np.subtract(base, gradient, out=gradient)


@dataclass(frozen=True)
class FedNova:
    """The mean of what the workers changed a step, taken as often as they stepped on the mean (server.nova).

        x <- x + scale (mean − x)

    `scale` is of one round: 1 where all updates come of equally many steps, and then the mean is not even looked at.

    Source: Wang et al. 2020, arXiv 2007.07481.
    """

    states = 0

    scale: float = 1.0

    @property
    def wants_base(self) -> bool:
        """Not where the step gives the mean."""
        return self.scale != 1.0

    def apply(self, base: Float64Block, mean: Float64Block, states: Sequence[Float64Block]) -> Float64Block:  # noqa: ARG002 - other steps need them
        """One step."""
        if not self.wants_base:
            return mean
        change = np.subtract(mean, base, out=mean)
        np.multiply(change, self.scale, out=change)
        return np.add(base, change, out=change)


STEPS: Mapping[str, Callable[..., OuterStep]] = {
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "diloco": DiLoCo,
    "fednova": FedNova,
}
"""Algorithm -> its step, which takes the job's keys without their `outer_`."""


def outer_step(section: AggregationSection) -> OuterStep:
    """The outer step that a job asks for under `[aggregation]`.

    Raises:
        BadJobError: there is no such step.
    """
    kind = STEPS.get(section.algorithm)
    if kind is None:
        advice = f"Use one of {', '.join(STEPS)}."
        raise BadJobError(f"there is no aggregation algorithm {section.algorithm!r}", advice=advice)
    given = {key.removeprefix("outer_"): getattr(section, key) for key in OUTER_KEYS[section.algorithm]}
    return kind(**{name: value for name, value in given.items() if value is not None})


def _gather(velocity: Float64Block, momentum: float, change: Float64Block) -> None:
    """Momentum without damping: b <- μ b + change."""
    np.multiply(velocity, momentum, out=velocity)
    np.add(velocity, change, out=velocity)


def _follow(base: Float64Block, mean: Float64Block, first: Float64Block, beta1: float) -> Float64Block:
    """Bring m up to date with the mean change. Returns the change's square, in the memory of `mean`."""
    change = np.subtract(mean, base, out=mean)
    np.multiply(first, beta1, out=first)
    np.add(first, (1.0 - beta1) * change, out=first)
    return np.square(change, out=change)


def _move(
    base: Float64Block, first: Float64Block, second: Float64Block, lr: float, tau: float, *, out: Float64Block
) -> Float64Block:
    """base + η m / (√v + τ), in the memory of `out`."""
    np.sqrt(second, out=out)
    np.add(out, tau, out=out)
    np.divide(first, out, out=out)
    np.multiply(out, lr, out=out)
    return np.add(base, out, out=out)
