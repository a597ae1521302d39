"""How unlike the shards of a cut are.

Pure: numpy alone. A table of samples by shard and class is all that it rests on; where samples have no class, the
table has one column.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.sharding import Partition

Table = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spread:
    """Of a number a shard: the least, the median, the mean and the most."""

    least: float
    median: float
    mean: float
    most: float

    @classmethod
    def of(cls, values: npt.NDArray[np.float64]) -> "Spread":
        """Of values of shape (shards,), at least one."""
        return cls(float(values.min()), float(np.median(values)), float(values.mean()), float(values.max()))


@dataclass(frozen=True)
class Statistics:
    """What a cut comes to."""

    shards: int
    samples: int
    sizes: Spread
    gini: float
    labels: Spread | None  # effective number of labels of a shard; None: samples have no class
    distance: Spread | None  # total variation between a shard's labels and those of the whole


def table_of(partition: Partition, classes: npt.NDArray[np.int64] | None) -> tuple[Table, list[int]]:
    """Samples by shard and class, int64 (shards, classes), and the classes' values, rising.

    Args:
        partition: the cut.
        classes: int64 (total,), the class of each sample; None: they have none, and the one column is 0.
    """
    bounds = np.array(partition.bounds, np.int64)
    sizes: Table = bounds[1:] - bounds[:-1]
    if classes is None:
        return sizes[:, np.newaxis], [0]
    values, columns = np.unique(classes, return_inverse=True)
    cells = np.repeat(np.arange(sizes.size), sizes) * values.size + columns.reshape(-1)[partition.order]
    counted = np.bincount(cells, minlength=sizes.size * values.size).reshape(sizes.size, values.size)
    return counted.astype(np.int64, copy=False), [int(value) for value in values]


def statistics_of(table: Table, *, labelled: bool) -> Statistics:
    """What a cut comes to.

    Args:
        table: as `table_of` gives it.
        labelled: whether its columns are classes.
    """
    sizes = table.sum(axis=1)
    return Statistics(
        shards=table.shape[0],
        samples=int(sizes.sum()),
        sizes=Spread.of(sizes.astype(np.float64)),
        gini=gini(sizes.tolist()),
        labels=Spread.of(effective_labels(table)) if labelled else None,
        distance=Spread.of(distances(table)) if labelled else None,
    )


def gini(sizes: Sequence[int]) -> float:
    """How unequal sizes are: 0 where all are equal, near 1 where one has nearly everything.

    Half the mean difference of two shards, as a part of the mean: sum_i (2 i - n - 1) x_i / (n sum x), sizes rising.

    Source: Gini 1912, by the sorted formula.
    """
    rising = sorted(sizes)
    number, whole = len(rising), sum(rising)
    weighed = sum((2 * rank - number - 1) * size for rank, size in enumerate(rising, start=1))
    return weighed / (number * whole)


def effective_labels(table: Table) -> npt.NDArray[np.float64]:
    """For each shard, how many equally frequent labels would be as mixed: exp of the entropy of its labels.

    Args:
        table: int64 (shards, classes); no shard is empty.

    Returns:
        float64 (shards,), from 1 to the number of classes.

    Source: Hill 1973, Diversity and evenness, order 1.
    """
    shares = table / table.sum(axis=1, keepdims=True)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    found: npt.NDArray[np.float64] = np.exp(-(shares * logs).sum(axis=1))
    return found


def distances(table: Table) -> npt.NDArray[np.float64]:
    """For each shard, the total variation between its labels and those of the whole: half the sum of differences.

    Args:
        table: int64 (shards, classes); no shard is empty.

    Returns:
        float64 (shards,): 0 is the whole in small; 0.9 says that nine tenths of the labels would have to be others.
    """
    whole = table.sum(axis=0) / table.sum()
    shares = table / table.sum(axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = 0.5 * np.abs(shares - whole).sum(axis=1)
    return found


def histogram(counts: Sequence[int], classes: Sequence[int], most: int) -> str:
    """A shard's samples by class in words, the most frequent first: `3:120 7:44 +2 more`.

    Args:
        counts: samples of each class.
        classes: their values.
        most: classes that are named.
    """
    there = sorted((-count, label) for count, label in zip(counts, classes, strict=True) if count)
    named = " ".join(f"{label}:{-count}" for count, label in there[:most])
    rest = len(there) - most
    return f"{named} +{rest} more" if rest > 0 else named


def rounded(value: float) -> float:
    """As it is printed: four places are more than a cut means."""
    return round(value, 4) if math.isfinite(value) else value
