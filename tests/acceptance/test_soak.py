"""Nothing grows, round after round: descriptors, threads and memory of a real coordinator and two real agents.

What may grow for a while is bounded: SQLite keeps up to 2 MB of the journal in memory, and pydantic up to 16,384
strings that it has read. The first fills with some 5 kB a round (its facts, and a row of the audit record for each
update), so that a coordinator is flat only after some hundred rounds; the second with 0.3 kB a round. The bounds are
just above: one more object of 2 kB a round that a coordinator forgets to let go breaks the short one, of 1 kB the full
one, and of less than a kB the full one of an agent. The short ones have room for what is taken once, some 60 kB of an
agent, which is much for a hundred rounds and nothing for two thousand. That needs quiet figures, which bench.soak sees
to: from run to run they differ by some 0.5 kB a round.
"""

import pytest

from bench.soak import counts, soak
from tests.acceptance.kit import size

pytestmark = pytest.mark.acceptance

ROUNDS = size(100, 2_000)
COORDINATOR = size(6_500, 1_000)  # bytes a round
AGENT = size(2_500, 900)
A_THREAD = 200_000  # bytes that one more thread of a pool takes once: its stack, and a heap of its own


@pytest.mark.timeout(size(300, 3_600))
def test_descriptors_threads_and_memory_are_flat_over_many_rounds() -> None:
    report = soak(ROUNDS, warm_up=size(200, 1_000), every_s=size(1, 4))
    for name, warm in report.warm.items():
        end, grown = report.end[name], report.growth(name)
        print(f"{name}: {counts(warm)} → {counts(end)}, {grown:+.0f} bytes a round, {report.slope(name):+.0f} a second")
        assert end.descriptors <= warm.descriptors, f"{name} holds more descriptors than before"
        assert end.threads <= warm.threads + 1, f"{name} has more threads than before"  # a pool may have grown by one
        most = COORDINATOR if name == "coordinator" else AGENT
        most += max(0, end.threads - warm.threads) * A_THREAD / ROUNDS
        assert grown < most, f"{name} grew by {grown:.0f} bytes a round, where {most:.0f} is the most"
    assert report.journal_bytes_a_round < 10_000
