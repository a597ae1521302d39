"""What the coordinator does with client-drift methods: whose slot is whose, and the outer step of one of them.

Pure. The arithmetic of slots is in common.drift; their files are made in server.slots.

A job has N shards. Cut data has those of its cut. Where data is a worker's own (`partition = local`), the shards are
the workers that have had one so far: who joins adds one that carries nothing, and who leaves stays in the sum, as a
shard that is not drawn does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.drift import alpha_of, needs_total
from common.facts import Shard
from common.messages import JobSpec, Slots
from server.averaging import Float64Block
from server.optimizers import OuterStep
from server.rounds import Job


def key_of(shard: Shard) -> str:
    """What a shard's slot is known by from round to round."""
    return shard.worker if shard.worker is not None else str(shard.shard)


def shards_of(job: Job) -> int:
    """N: the shards of the job in the round that is open or being averaged."""
    if job.spec.data.partition == "local":
        return max(len(job.owners), 1)
    assert job.facts is not None  # noqa: S101 - a round is open
    return len(job.facts.bounds) - 1


def slots_for(job: Job, shard: Shard, size: int) -> Slots | None:
    """What a worker is told of the slots that its shard begins with; None: the job has none.

    Args:
        job: the job, with an open round.
        shard: of that round.
        size: bytes of a slot, where there is one.
    """
    method = job.spec.train.drift
    if method == "none":
        return None
    own = job.slots.get(key_of(shard))
    total = job.slot_total[0] if job.slot_total and needs_total(method) else None
    return Slots(own=own, total=total, size=size if own or total else 0, shards=shards_of(job))


def fresh_words(job: Job) -> str:
    """How many shards carry nothing yet, in words; empty: the job has no slots, or every shard has one."""
    if job.spec.train.drift == "none":
        return ""
    number, left = shards_of(job), shards_of(job) - len(job.slots)
    return f"{left} of {number} shards carry nothing yet" if left else ""


def carried(job: Job) -> dict[str, str]:
    """Digest of everything that the job carries from round to round beside its model -> what it is, in words."""
    found = dict.fromkeys(job.memory, "memory of the outer step")
    found |= {digest: f"slot of shard {key}" for key, digest in job.slots.items()}
    return found | dict.fromkeys(job.slot_total, "sum of the slots")


def room_for(spec: JobSpec, size: int, updates: int) -> int:
    """Bytes that the slots of a round and their sum take at most.

    Args:
        spec: the job's.
        size: bytes of the model; it has at least two an element, and a slot four.
        updates: of the round.
    """
    return 0 if spec.train.drift == "none" else 2 * size * (updates + 2)


# ---------------------------------------------------------------- the outer step


@dataclass(frozen=True)
class DynStep:
    """FedDyn's outer step: θ <- mean of θ_k − h / α, where h = Σ h_k / N is the mean of all slots after this round.

    Source: Acar et al. 2021, arXiv 2111.04263, algorithm 1; its h^t = h^{t-1} − α/m Σ_{k∈P} (θ_k − θ^{t-1}) is that
    mean, since each h_k of the round changes by −α (θ_k − θ^{t-1}), and the others do not.
    """

    states = 0
    wants_base = True  # for the length of its way alone

    alpha: float
    shards: int

    def apply(self, base: Float64Block, mean: Float64Block, states: Sequence[Float64Block]) -> Float64Block:  # noqa: ARG002
        """One step. `states` are the two numbers of the sum of all slots (common.drift.next_total)."""
        total, rest = states
        h = np.add(total, rest, out=total)
        np.divide(h, self.alpha * self.shards, out=h)
        return np.subtract(mean, h, out=mean)


def outer_step(job: Job) -> OuterStep | None:
    """The outer step that the job's method has; None: that of `[aggregation]`."""
    return DynStep(alpha_of(job.spec.train), shards_of(job)) if job.spec.train.drift == "feddyn" else None
