"""Which files a proof of a round needs, and for how many rounds a job keeps them (`[round] keep_updates`).

Pure: digests, no files. A round can be averaged again from what its average read: the model that it began with, its
updates, what the outer step and the codec remembered, and, where shards carry something, their slots.
"""

from server import drift, rounds
from server.buffering import Batch
from server.rounds import Job


def keeps_updates(job: Job) -> bool:
    """Whether updates of the job are kept beyond their round."""
    return job.spec.round.keep_updates != 0


def ingredients(job: Job) -> dict[str, str]:
    """Digest of every file that averaging the job's frozen round reads -> what it is, in words."""
    phase = rounds.frozen_of(job)
    if phase is None:
        return {}
    found = {phase.base.digest: "the model that it began with"}
    found |= {digest: f"the {what}" for digest, what in drift.carried(job).items() if digest not in job.slots.values()}
    if isinstance(phase, Batch):
        if job.spec.aggregation.update == "fp32":  # of an encoded change nobody reads the base
            found |= {
                base.digest: f"the model that an update of it began with, {base.digest[:12]}…" for base in phase.bases
            }
    else:
        keys = [drift.key_of(phase.before.shards[update.shard]) for update in phase.accepted]
        found |= {job.slots[key]: f"the slot of shard {key}" for key in keys if key in job.slots}
    for update in (*phase.accepted, *phase.late):
        found[update.digest] = f"the update of round {update.round}, shard {update.shard}, by {update.worker_name}"
    return found


class Keeping:
    """What the closed rounds of all jobs have kept."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[int, frozenset[str]]] = {}  # job -> round -> digests; the newest last

    def closed(self, job: Job) -> set[str]:
        """A frozen round is being closed. Returns the digests that are not kept any more, for this job's sake.

        Args:
            job: as it is before that.
        """
        phase, most = rounds.frozen_of(job), job.spec.round.keep_updates
        if phase is None or most == 0:
            return set()
        kept = self._kept.setdefault(job.id, {})
        kept[phase.round] = frozenset(ingredients(job))
        gone = set[str]()
        while most != "all" and len(kept) > most:
            gone |= kept.pop(next(iter(kept)))
        return gone - self.digests()

    def digests(self) -> set[str]:
        """All that is kept."""
        return {digest for kept in self._kept.values() for digests in kept.values() for digest in digests}
