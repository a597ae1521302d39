"""What a run with faults came to: facts and incidents in, promises and numbers out.

Pure: no clock, process, network or disk. An update counts where its acceptance stands: one that was taken back, since
its bytes were lost with the coordinator's power, counts no more, and its shard is trained again.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from client import shown
from client.chaos.schedule import KINDS, Parameter
from common.facts import Accepted, HandedBack, HandedOut, Lost, Restored, RoundClosed
from common.messages import Message

Shards = Iterable[tuple[int, int]]  # (round, shard)


@dataclass(frozen=True, slots=True)
class Incident:
    """One fault of the schedule, and what became of it."""

    number: int
    kind: str
    parameters: Mapping[str, Parameter]
    accepted: int  # updates of the job, when it struck
    struck_s: float  # seconds after the job was sent
    lasted_s: float  # until it was lifted: processes run and listen again, connections carry again
    recovery_s: float | None  # from then until the job's next progress; None: the job was over, or never moved again
    missed: str = ""  # why it did not strike; empty: it did


@dataclass(frozen=True, slots=True)
class Tally:
    """What the journal says of one job."""

    accepted: int  # updates that count
    lost: int  # shards of the rounds that were to be trained, without an update that counts
    twice: int  # updates that count besides another one of their shard, or where none was to be trained
    taken_back: int  # updates that were acknowledged, and trained again
    handed_out: int  # attempts to train a shard
    resumed: int  # updates that went on from a checkpoint
    bytes_lost: int  # updates whose bytes a power cut took
    restored: int  # of these, those that came back from their workers
    given_back: Mapping[str, int]  # attempts that ended without a result, by their code
    digests: Mapping[int, str]  # round -> its model

    @property
    def retrained(self) -> int:
        """Attempts to train that were not needed without faults."""
        return self.handed_out - self.accepted


def tally(facts: Iterable[Message], expected: Shards) -> Tally:
    """Count what a job's facts say, in their order.

    Args:
        facts: of common.facts; those that say nothing of updates are passed over.
        expected: what was to be trained.
    """
    counts: Counter[tuple[int, int]] = Counter()
    given_back: Counter[str] = Counter()
    handed_out = taken_back = resumed = bytes_lost = restored = 0
    digests: dict[int, str] = {}
    for fact in facts:
        match fact:
            case Accepted():
                counts[fact.round, fact.shard] += 1
                resumed += fact.resumed_at > 0
            case HandedOut(kind="train"):
                handed_out += 1
            case HandedBack(kind="train", code="lost"):
                counts[fact.round, fact.shard] -= 1
                taken_back += 1
            case HandedBack(kind="train"):
                given_back[fact.code] += 1
            case Lost():
                bytes_lost += 1
            case Restored():
                restored += 1
            case RoundClosed():
                digests[fact.round] = fact.digest
    wanted = set(expected)
    return Tally(
        accepted=counts.total(),
        lost=sum(counts[place] < 1 for place in wanted),
        twice=sum(max(count - (place in wanted), 0) for place, count in counts.items()),
        taken_back=taken_back,
        handed_out=handed_out,
        resumed=resumed,
        bytes_lost=bytes_lost,
        restored=restored,
        given_back=dict(given_back),
        digests=digests,
    )


def forgotten(acknowledged: Iterable[Mapping[str, Any]], kept: Iterable[Mapping[str, Any]]) -> int:
    """How many facts were told once and are not in the journal any more, or are others there."""
    by_id = {event["id"]: event for event in kept}
    return sum(by_id.get(event["id"]) != event for event in acknowledged)


def recovery_s(lifted_at: float, progress: Iterable[float]) -> float | None:
    """Seconds from the end of a fault until the job moved again; None: it did not."""
    return min((at - lifted_at for at in progress if at >= lifted_at), default=None)


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a run has observed."""

    seed: int
    schedule: str  # its digest
    rounds: int
    shards: int
    state: str  # that the disturbed job came to
    reason: str
    seconds: float  # that it took
    undisturbed_s: float  # that the same job took before
    truth: Tally  # of the undisturbed job
    found: Tally  # of the disturbed one
    forgotten: int
    true_model: str  # SHA-256 of the final model, as it was fetched from the undisturbed job
    model: str  # of the disturbed one; empty where there is none
    ended: Sequence[str]  # parts that ended by themselves
    incidents: Sequence[Incident]


@dataclass(frozen=True, slots=True)
class Promise:
    """One promise, and whether it was kept."""

    name: str
    kept: bool
    found: str  # in words


def promises(outcome: Outcome) -> list[Promise]:
    """What must hold whatever strikes."""
    found, updates = outcome.found, outcome.rounds * outcome.shards
    differing = [r for r, digest in sorted(outcome.truth.digests.items()) if found.digests.get(r) != digest]
    return [
        Promise("the job finishes", outcome.state == "finished", f"it is {outcome.state}: {outcome.reason}"),
        Promise("no update is lost", found.lost == 0, f"{found.lost} lost of {shown.count(updates)}"),
        Promise("no update counts twice", found.twice == 0, f"{found.twice} counted twice"),
        Promise(
            "nothing that was acknowledged is trained again",
            found.taken_back == 0,
            f"{found.taken_back} taken back; {found.restored} of {found.bytes_lost} came back after a power cut",
        ),
        Promise("no acknowledged fact is forgotten", outcome.forgotten == 0, f"{outcome.forgotten} forgotten"),
        Promise(
            "every round has the model that it has without faults",
            not differing and bool(outcome.model) and outcome.model == outcome.true_model,
            _model_words(outcome, differing),
        ),
        Promise("nobody ends who was not killed", not outcome.ended, f"{', '.join(outcome.ended) or 'nobody'} ended"),
    ]


def _model_words(outcome: Outcome, differing: Sequence[int]) -> str:
    if differing:
        return f"round {differing[0]} is the first that differs"
    if not outcome.model or not outcome.true_model:
        return f"there is no final model {'with' if outcome.true_model else 'without'} faults any more"
    if outcome.model != outcome.true_model:
        return f"the final model is {outcome.model[:12]}, not {outcome.true_model[:12]}"
    return f"the final model is {outcome.model[:12]} in both"


def all_kept(outcome: Outcome) -> bool:
    """Whether every promise was."""
    return all(promise.kept for promise in promises(outcome))


# ---------------------------------------------------------------- shown


def fault_table(incidents: Sequence[Incident]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a line a kind that was to strike, and one for all."""
    header = ["fault", "struck", "missed", "lasted", "recovery", "at most"]
    by_kind = [(kind, [i for i in incidents if i.kind == kind]) for kind in KINDS]
    rows = [_fault_cells(kind, some) for kind, some in by_kind if some]
    return header, [*rows, _fault_cells("all", incidents)]


def _fault_cells(name: str, incidents: Sequence[Incident]) -> list[str]:
    struck = [incident for incident in incidents if not incident.missed]
    waits = [incident.recovery_s for incident in struck if incident.recovery_s is not None]
    return [
        name,
        shown.count(len(struck)),
        shown.count(len(incidents) - len(struck)),
        shown.duration(median(incident.lasted_s for incident in struck)) if struck else shown.NOTHING,
        shown.duration(median(waits)) if waits else shown.NOTHING,
        shown.duration(max(waits)) if waits else shown.NOTHING,
    ]


def promise_table(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a line a promise."""
    rows = [[p.name, "yes" if p.kept else "NO", shown.one_line(p.found)] for p in promises(outcome)]
    return ["promise", "kept", "found"], rows


def work_line(outcome: Outcome) -> str:
    """What the faults cost, in one line."""
    found = outcome.found
    backs = ", ".join(f"{count} {code}" for code, count in sorted(found.given_back.items()))
    again = f"{shown.several(found.retrained, 'attempt')} more than without faults{f' ({backs})' if backs else ''}"
    resumed = f"{shown.several(found.resumed, 'update')} went on from a checkpoint"
    lasted = f"{shown.duration(outcome.seconds)} instead of {shown.duration(outcome.undisturbed_s)}"
    return f"{shown.count(found.handed_out)} attempts to train, {again}; {resumed}; {lasted}"


def as_json(outcome: Outcome) -> dict[str, Any]:
    """All of it as one object for scripts."""
    struck = Counter(incident.kind for incident in outcome.incidents if not incident.missed)
    waits = [i.recovery_s for i in outcome.incidents if i.recovery_s is not None]
    whole = asdict(outcome)
    return {
        "kept": all_kept(outcome),
        "promises": [asdict(promise) for promise in promises(outcome)],
        "faults": dict(struck),
        "updates_lost": outcome.found.lost,
        "updates_counted_twice": outcome.found.twice,
        "facts_forgotten": outcome.forgotten,
        "attempts_more": outcome.found.retrained,
        "updates_resumed": outcome.found.resumed,
        "recovery_median_s": median(waits) if waits else None,
        "recovery_max_s": max(waits) if waits else None,
        "same_model": bool(outcome.model) and outcome.model == outcome.true_model,
        **whole,
    }
