"""Averaging closed rounds again, to prove that a published model is what its updates make: `lydian verify JOB`.

    facts up to `frozen` ──▶ the job as it was ──▶ versions.make on the kept files ──▶ the same digest, or not

The code that averages is that of the coordinator; a proof holds for this version of it. Nothing is written but into a
scratch folder, and the coordinator may run beside it: what it deletes meanwhile is not kept, and no fault.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import BadUpdateError, DiskFullError, LydianError
from common.facts import RoundClosed, Submitted
from common.weights import file_digest
from server import rounds, versions
from server.blobs import Blobs
from server.keeping import ingredients
from server.rounds import Job
from server.seeds import SeedLostError, Seeds
from server.store import StoredFact
from server.versions import Version

Verdict = Literal["proven", "wrong", "not kept", "hidden"]


@dataclass(frozen=True)
class Proof:
    """What could be said of one closed round."""

    round: int
    verdict: Verdict
    digest: str  # of its model, as the coordinator published it
    updates: int  # that were averaged
    sentence: str


class _Kept(Blobs):
    """The files of a state folder, to be read alone: what is made lies in a scratch folder, and goes at once."""

    def __init__(self, state: Path, scratch: Path) -> None:
        super().__init__(scratch, reserve_bytes=0)
        self._blobs = state / "blobs"

    def adopt(self, part: Path, digest: str, durable: bool, *, synced: bool = False) -> None:  # noqa: ARG002
        """Let a finished file go: its digest is all that is asked."""
        part.unlink()


def prove(facts: Iterable[StoredFact], state: Path, only: int | None = None) -> Iterator[Proof]:
    """Every closed round of a job, in order, averaged again where its files are kept.

    Args:
        facts: all of the job, in order.
        state: the coordinator's state folder.
        only: this round alone.

    Raises:
        DiskFullError: the scratch folder has no room for a model.
        OSError: reading or writing failed.
    """
    job: Job | None = None
    with tempfile.TemporaryDirectory(prefix="lydian-verify-") as scratch:
        kept = _Kept(state, Path(scratch))
        for stored in facts:
            fact = stored.fact
            if isinstance(fact, Submitted):
                job = rounds.new_job(stored.job, fact)
                continue
            if job is None:
                raise LydianError(f"the first fact of {stored.job} is no submission", code="journal_damaged")
            if isinstance(fact, RoundClosed) and only in (None, fact.round):
                yield _prove(job, fact, kept, state)
            job = rounds.evolve(job, fact, 0.0)


def _prove(job: Job, closed: RoundClosed, kept: Blobs, state: Path) -> Proof:
    phase = rounds.frozen_of(job)
    count = len(phase.accepted) + len(phase.late) if phase is not None else 0

    def answer(verdict: Verdict, sentence: str) -> Proof:
        return Proof(closed.round, verdict, closed.digest, count, sentence)

    if phase is None or phase.round != closed.round:
        return answer("wrong", "it was closed without a set of updates that was frozen")
    try:
        if changed := _changed(kept, {closed.digest: "its model"}):
            return answer("wrong", changed)
        if job.spec.secure.enabled:
            return answer("hidden", "its updates are masked, and the shares that take the masks off were deleted: only "
                          "who handed in which bytes, and the model's digest, are on record")  # fmt: skip
        needed = ingredients(job)
        if gone := [what for digest, what in needed.items() if not kept.has(digest)]:
            more = f" and {len(gone) - 1} more files" if len(gone) > 1 else ""
            return answer("not kept", f"{gone[0]}{more} of {len(needed)} are not kept here (round.keep_updates)")
        if changed := _changed(kept, needed):
            return answer("wrong", changed)
        seed = Seeds(state).read(job.id) if job.spec.privacy.level == "worker" else None
        made = versions.make(job, phase, kept, lambda: False, None, seed)
    except SeedLostError:
        return answer("not kept", "the secret seed of its noise is not kept here any more")
    except FileNotFoundError as error:
        return answer("not kept", f"{Path(str(error.filename)).name[:12]}… was deleted while it was averaged again")
    except (BadUpdateError, DiskFullError, ValueError) as error:
        if isinstance(error, DiskFullError):
            raise
        return answer("wrong", f"its updates cannot be averaged: {error}")
    if other := _other(made, closed):
        return answer("wrong", other)
    return answer("proven", f"its {count} updates make this model")


def _changed(kept: Blobs, files: dict[str, str]) -> str:
    """The first file that is here and is not what its name says, in a sentence; empty: none."""
    for digest, what in files.items():
        if kept.has(digest) and (found := file_digest(kept.path(digest))) != digest:
            return f"{what} is damaged or was changed: its bytes have the digest {found}, and on record is {digest}"
    return ""


def _other(made: Version, closed: RoundClosed) -> str:
    """What averaging gave that is not on record, in a sentence; empty: all is."""
    step = closed.step.digest if closed.step else None
    pairs = (
        ("the model", made.model.digest, closed.digest),
        ("the step to it", made.step.digest if made.step else None, step),
        ("what the next round needs", made.memory, closed.memory),
        ("what its shards carry", (made.slots, made.slot_total), (closed.slots, closed.slot_total)),
        ("the next round's clip", made.next_clip, closed.privacy.next_clip if closed.privacy else None),
    )
    for what, found, recorded in pairs:
        if found != recorded:
            return f"its updates make another result: {what} is {found}, and on record is {recorded}"
    return ""
