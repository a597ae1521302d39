"""What a simulating process decides: which assignments are done together.

Pure: no network, disk, clock or tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.messages import Assignment


@dataclass(frozen=True)
class Claim:
    """An assignment, and which of the process's virtual workers holds it."""

    worker: int
    assignment: Assignment


def groups(claims: Sequence[Claim]) -> list[list[Claim]]:
    """Claims that one command of the child can do, in the order in which they are to be done.

    Shards of one round come together, by their number, so that the same shards make the same command whoever of the
    workers holds them; they come before an evaluation, since a round waits for them.
    """
    together: dict[tuple[str, int], list[Claim]] = {}
    alone: list[list[Claim]] = []
    for claim in claims:
        assignment = claim.assignment
        if assignment.kind == "train":
            together.setdefault((assignment.job, assignment.round), []).append(claim)
        else:
            alone.append([claim])
    trained = [sorted(group, key=lambda claim: claim.assignment.shard) for group in together.values()]
    return [*trained, *alone]
