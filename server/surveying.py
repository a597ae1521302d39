"""The passes over a round's updates that a robust rule needs before anything is averaged: how far they lie apart.

    updates ──changes of one span──▶ sums of squares ──in order──▶ distances ──robust_rules.decide──▶ a Plan

Threads compute the spans. Their size is a constant and no option: the sums inside a span round, so another size would
give other last bits. Memory is a span of each update in each thread, and the matrix of distances.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Protocol

import numpy as np

from common.deltas import is_trained
from common.weights import Layout
from server import robust_rules
from server.robust_rules import Float64s

SPAN = 1 << 12  # elements of each update in memory at once; whole blocks of every codec
PIECE = 1 << 16  # elements that a thread works through before its sums are handed over; whole spans


class Reader(Protocol):
    """Where the blocks come from. Used by one thread at a time."""

    def changes(self, index: int, first: int, count: int) -> Float64s:
        """Shape (updates, count): what every update changed in these elements of a trained tensor."""
        ...

    def centre(self, index: int, first: int, count: int) -> Float64s:
        """Shape (count,): what the rule remembers of them from the round before."""
        ...


class Survey:
    """All the files of a round, to be measured. A `robust_rules.Measure`."""

    def __init__(
        self, readers: Sequence[Reader], updates: int, layout: Layout, threads: int, check: Callable[[], None]
    ) -> None:
        """Args: at least `threads` readers; `check` is called before each piece, and raises to break off."""
        self._readers, self._updates, self._layout = readers, updates, layout
        self._threads, self._check = threads, check

    def pairs(self) -> Float64s:
        """See robust_rules.Measure."""

        def of(reader: Reader, index: int, first: int, count: int) -> Float64s:
            return robust_rules.pair_sums(reader.changes(index, first, count))

        return self._total(of, (self._updates, self._updates))

    def from_point(self, weights: Sequence[float], of_centre: float) -> Float64s:
        """See robust_rules.Measure."""

        def of(reader: Reader, index: int, first: int, count: int) -> Float64s:
            rows = reader.changes(index, first, count)
            point = robust_rules.combination(rows, weights, np.empty(count), np.empty(count))
            if of_centre:
                point += of_centre * reader.centre(index, first, count)
            return robust_rules.point_sums(rows, point)

        return self._total(of, (self._updates,))

    def _total(self, of: Callable[[Reader, int, int, int], Float64s], shape: tuple[int, ...]) -> Float64s:
        """The sum over all spans of all trained tensors."""
        free = SimpleQueue[Reader]()
        for reader in self._readers:
            free.put(reader)

        def work(piece: tuple[int, int, int]) -> Float64s:
            index, start, elements = piece
            self._check()
            reader = free.get()
            try:
                sums = (of(reader, index, start + at, count) for at, count in robust_rules.spans(elements, SPAN))
                return robust_rules.total(sums, shape)
            finally:
                free.put(reader)

        with ThreadPoolExecutor(self._threads, thread_name_prefix="survey") as pool:
            return robust_rules.total(pool.map(work, self._pieces()), shape)

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        for index, tensor in enumerate(self._layout.tensors):
            if is_trained(tensor, self._layout.notes):
                for first, count in robust_rules.spans(tensor.elements, PIECE):
                    yield index, first, count
