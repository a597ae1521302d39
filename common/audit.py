"""The audit record: one chain of hashes over who did what, to which object, with what result. Here it is checked.

    row 1 ──hash──▶ row 2 ──hash──▶ … ──▶ head: (seq, hash)

A row either speaks of a fact of a job, whose text is in the journal already and is not written twice, or it is an event
of its own. The hash of a row covers the hash before it and every field, a fact's text included: whoever changes,
removes, adds or exchanges a row, or a fact, breaks the chain there, unless they write every later row anew. Against
that, and against a tail that is cut off, stands only an anchor: a head that was noted somewhere else.

Pure, and the same for the coordinator that writes and whoever checks: nobody has to believe a coordinator's verdict.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pydantic import Field, ValidationError

from common.begins import words
from common.errors import LydianError
from common.facts import (
    FACT,
    Accepted,
    Evaluated,
    EvaluationGivenUp,
    Extended,
    Fact,
    Frozen,
    HandedBack,
    HandedOut,
    Initialised,
    Late,
    Lost,
    Measured,
    Opened,
    OpenedAnew,
    Restored,
    RoundClosed,
    StateChanged,
    Submitted,
)
from common.messages import Message

GENESIS = hashlib.sha256(b"lydian audit record 1").hexdigest()  # what row 1 follows
FIRST = "record.begun"
"""Action of row 1. Its object is the coordinator's identity, drawn at random when the record began."""
COORDINATOR = "coordinator"  # the actor of what nobody's call decided
_ENDINGS = frozenset(
    {"expired", "lost", "released", "task_failed", "task_exited", "task_stalled", "out_of_memory", "no_data",
     "not_trusted", "unknown_task", "bad_task", "worker_error", "disk_full", "missing_package"}
)  # fmt: skip
"""Codes of an attempt that ended without a result; any other is that of a result which was refused."""
_ANCHOR = re.compile(r"([0-9]{1,18}):([0-9a-f]{64})")


class FactText(Message):
    """A fact of a job, as it stands in the journal."""

    id: int
    at: str
    job: str
    type: str
    round: int | None
    shard: int | None
    body: str = Field(description="JSON")


class AuditEntry(Message):
    """One row of the record, as it was written. Of a row about a fact, `action` to `detail` are empty."""

    seq: int
    at: str = Field("", description="UTC; for people, decides nothing. Empty: the fact's")
    actor: str = Field(description="scope:token id, or `coordinator`; empty: not known, from before the record began")
    worker: str = Field("", description="the worker's id, where one called")
    peer: str = Field("", description="the address that the call came from")
    node: str = Field("", description="the machine of the tailnet, where that was known")
    action: str = ""
    object: str = ""
    result: str = ""
    detail: str = ""
    fact: FactText | None = None
    hash: str = Field(description="SHA-256, in hex, of the hash before and of all of this")


class AuditHead(Message):
    """The newest row: noted elsewhere, it is an anchor."""

    seq: int
    hash: str


class AuditPage(Message):
    """`GET /v1/audit`: some rows, in their order."""

    entries: tuple[AuditEntry, ...]
    next: int | None = Field(description="the `after` of the next page; None: this was the last")
    head: AuditHead


class BrokenRecordError(LydianError):
    """The record, or what it speaks of, is not what was written."""

    code = "audit_broken"
    advice = "Keep the state folder as it is, and compare the row with a backup of the journal."


class Anchor(NamedTuple):
    """A head that was noted elsewhere."""

    seq: int
    hash: str


def parse_anchor(text: str) -> Anchor:
    """An anchor from `SEQ:HASH`, as `lydian audit head` prints it.

    Raises:
        ValueError: it is not of that form.
    """
    found = _ANCHOR.fullmatch(text.strip())
    if found is None or int(found[1]) < 1:
        raise ValueError(f"{text[:80]!r} is not of the form SEQ:HASH, as `lydian audit head` prints it")
    return Anchor(int(found[1]), found[2])


# ---------------------------------------------------------------- hashes


def row_hash(previous: str, entry: AuditEntry) -> str:
    """The hash of a row: SHA-256, in hex, of the hash before it and all fields, each with its length before it.

    Args:
        previous: the hash of the row before; GENESIS for the first.
        entry: the row. Its own `hash` is not looked at.
    """
    fact = entry.fact
    of = () if fact is None else (fact.id, fact.at, fact.job, fact.type, fact.round, fact.shard, fact.body)
    words = (entry.at, entry.action, entry.object, entry.result, entry.detail)
    kind = "event" if fact is None else "fact"
    return digest_of(previous, entry.seq, entry.actor, entry.worker, entry.peer, entry.node, *words, kind, *of)


def digest_of(*fields: str | int | None) -> str:
    """SHA-256, in hex, of fields, each as its length (8 bytes, big-endian) and its UTF-8: no two lists are alike.

    A number is its decimal digits; None is a length that no text has, and nothing after it.
    """
    parts = list[bytes]()
    for field in fields:
        if field is None:
            parts.append(b"\xff" * 8)
        else:
            text = str(field).encode("utf-8", "surrogatepass")
            parts += (len(text).to_bytes(8, "big"), text)
    return hashlib.sha256(b"".join(parts)).hexdigest()


# ---------------------------------------------------------------- checking


class Checker:
    """Walks a record from its first row on."""

    def __init__(self, anchors: Iterable[Anchor] = ()) -> None:
        """`anchors` are heads that were noted elsewhere."""
        self._anchors = {anchor.seq: anchor for anchor in anchors}
        self.seq, self.hash = 0, GENESIS  # of the row that was checked last
        self.facts = 0  # id of the last fact that a row speaks of
        self.identity = ""  # the coordinator's

    def take(self, entry: AuditEntry) -> None:
        """Check the next row.

        Raises:
            BrokenRecordError: it is not the one that was written, or does not follow.
        """
        row = f"row {entry.seq} of the audit record"
        if entry.seq != self.seq + 1:
            raise BrokenRecordError(f"{row} follows row {self.seq}: {_between(self.seq + 1, entry.seq - 1, 'row')}")
        if entry.fact is not None and entry.fact.id != self.facts + 1:
            gone = _between(self.facts + 1, entry.fact.id - 1, "fact")
            raise BrokenRecordError(f"{row} speaks of fact {entry.fact.id} after fact {self.facts}: {gone}")
        if row_hash(self.hash, entry) != entry.hash:
            what = "" if entry.fact is None else f", or fact {entry.fact.id} of {entry.fact.job} that it speaks of,"
            raise BrokenRecordError(f"{row}{what} was changed, or does not follow row {self.seq}: its hash is another")
        if self.seq == 0 and entry.action != FIRST:
            raise BrokenRecordError(f"{row} is no beginning of a record: it says {shown(entry).action}")
        anchor = self._anchors.get(entry.seq)
        if anchor is not None and anchor.hash != entry.hash:
            raise BrokenRecordError(
                f"{row} has the hash {entry.hash[:16]}…, and {anchor.hash[:16]}… was noted: it, or a row before it, "
                "was written anew"
            )
        self.identity = self.identity or entry.object
        self.seq, self.hash = entry.seq, entry.hash
        self.facts = self.facts if entry.fact is None else entry.fact.id

    def end(self) -> None:
        """The record has no more rows.

        Raises:
            BrokenRecordError: there is none at all, or an anchor says that there were more.
        """
        if self.seq == 0:
            raise BrokenRecordError("the audit record has no rows, and even an unused one has its first")
        beyond = max(self._anchors, default=0)
        if beyond > self.seq:
            raise BrokenRecordError(
                f"the audit record ends with row {self.seq}, and row {beyond} was noted: its end was cut off"
            )

    def proof(self) -> str:
        """What of a record that holds is proven by it, and what is not, in words."""
        newest = max(self._anchors, default=0)
        if not newest:
            return (
                f"no anchor was given: that rows after row {self.seq} were cut off, or that all was written anew, "
                "would not show. Note the head on another machine, and give it with --since the next time"
            )
        later = f"; rows {newest + 1} to {self.seq} follow it" if newest < self.seq else ""
        return (
            f"nothing up to row {newest}, which was noted, was changed or cut off{later}; that rows after row "
            f"{self.seq} were cut off would not show"
        )


def _between(first: int, last: int, what: str) -> str:
    """What is missing, or that the order is wrong."""
    if last < first:
        return f"{what}s came twice, or in another order"
    return f"{what} {first} is missing" if first == last else f"{what}s {first} to {last} are missing"


# ---------------------------------------------------------------- for people


class Shown(NamedTuple):
    """A row in words."""

    at: str
    action: str
    object: str
    result: str
    detail: str
    job: str = ""
    worker: str = ""  # that it is about, or that called


def shown(entry: AuditEntry) -> Shown:
    """A row in words: what it says itself, or what the fact says that it speaks of."""
    if entry.fact is None:
        job = entry.object if entry.action.startswith(("job.", "model.")) else ""
        about = entry.object if entry.action.startswith("worker.") else entry.worker
        return Shown(entry.at, entry.action, entry.object, entry.result, entry.detail, job, about)
    text = entry.fact
    try:
        fact = FACT.validate_json(text.body)
    except ValidationError:
        return Shown(text.at, f"fact.{text.type}", text.job, "unreadable", "", text.job, entry.worker)
    action, place, result, detail = _words(fact)
    worker = getattr(fact, "worker", None) or entry.worker
    return Shown(text.at, action, f"{text.job}{place}", result, detail, text.job, worker)


def _words(fact: Fact) -> tuple[str, str, str, str]:
    """(action, place in the job, result, detail)."""
    return _WORDS[type(fact)](fact)


def _place(fact: HandedOut | HandedBack) -> str:
    match fact.kind:
        case "init":
            return " initialisation"
        case "train":
            return f" round {fact.round} shard {fact.shard} attempt {fact.attempt}"
        case _:
            return f" evaluation of round {fact.round} attempt {fact.attempt}"


def _update(fact: Accepted | Late | Lost | Restored) -> str:
    return f" round {fact.round} shard {fact.shard} attempt {fact.attempt}"


def _state(fact: StateChanged) -> tuple[str, str, str, str]:
    name = "resumed" if fact.reason.startswith("resumed") else fact.state
    return f"job.{name}", "", fact.state, fact.reason


def _handed_back(fact: HandedBack) -> tuple[str, str, str, str]:
    action = "task.handed_back" if fact.code in _ENDINGS else "update.refused"
    return action, _place(fact), fact.code, fact.sentence


_WORDS: dict[type, Callable[..., tuple[str, str, str, str]]] = {
    Submitted: lambda f: (
        "job.submitted", "", "taken", f"task {f.spec.task}" + (f", file {f.task_digest}" if f.task_digest else "")
        + (f", begins with {words(f.begins_with)}: {f.begins_with.digest}" if f.begins_with else "")
    ),
    StateChanged: _state,
    HandedOut: lambda f: ("task.handed_out", _place(f), "ok", f"to {f.worker}"),
    HandedBack: _handed_back,
    Initialised: lambda f: ("model.built", "", "ok", f.digest),
    Opened: lambda f: ("round.opened", f" round {f.round}", "ok", f"base {f.base}"),
    OpenedAnew: lambda f: ("round.opened_anew", f" round {f.round}", "ok", f.reason),
    Accepted: lambda f: ("update.accepted", _update(f), "counts", f"{f.digest}, {f.samples} samples"),
    Lost: lambda f: ("update.lost", _update(f), "asked for again", f.digest),
    Restored: lambda f: ("update.restored", _update(f), "ok", f.digest),
    Late: lambda f: ("update.late", _update(f), "not used", ""),
    Extended: lambda f: ("round.extended", f" round {f.round}", "ok", f.reason),
    Frozen: lambda f: ("round.frozen", f" round {f.round}", "ok", f.reason),
    RoundClosed: lambda f: ("round.closed", f" round {f.round}", "ok", f.digest),
    Measured: lambda f: ("model.measured", f" round {f.round}", "none" if f.why else "ok", f.why),
    Evaluated: lambda f: ("model.evaluated", f" round {f.round}", "best" if f.best else "ok", ""),
    EvaluationGivenUp: lambda f: ("model.not_evaluated", f" round {f.round}", "given up", f.reason),
}  # fmt: skip
