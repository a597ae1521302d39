"""What the journal's facts may say, one after the other: P1, P2 and P4 as assertions."""

import hashlib
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from common.facts import (
    Accepted,
    Evaluated,
    EvaluationGivenUp,
    Fact,
    Frozen,
    HandedBack,
    HandedOut,
    Initialised,
    Lost,
    Opened,
    Restored,
    RoundClosed,
    StateChanged,
    Submitted,
)
from common.weights import Notes, save
from server.store import StoredFact

SAMPLES = 12  # in the training set
EXCLUDING = ("no_data", "not_trusted", "unknown_task")
FORGIVEN = ("released", "expired", "lost", "disk_full")
OVER = ("finished", "failed", "cancelled")

Arrays = dict[str, np.ndarray]


# ---------------------------------------------------------------- weights


GOOD = ("good", "other")
POISON = {"nan": "not_finite", "infinite": "not_finite", "shape": "wrong_shape", "extra": "extra_tensor"}


@cache
def contents(round_index: int, shard: int, flavour: str) -> tuple[Arrays, bytes]:
    """An update of a round and shard: what is in it, and its file."""
    number = 0.37 * round_index + 0.11 * shard + (0.05 if flavour == "other" else 0.0)
    arrays: Arrays = {
        "w": np.array([1.0, 2.5, -3.0], np.float32) + np.float32(number),
        "h": np.array([0.1, 7.0], np.float16) * np.float16(1 + number),
        "n": np.array(10 * round_index + shard, np.int64),
    }
    match flavour:
        case "nan":
            arrays["w"][1] = np.nan
        case "infinite":
            arrays["h"][0] = np.inf
        case "shape":
            arrays["w"] = arrays["w"][:2]
        case "extra":
            arrays["x"] = np.zeros(1, np.float32)
    return arrays, encoded(arrays)


def encoded(arrays: Arrays) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "file", arrays, Notes())
        return (Path(folder) / "file").read_bytes()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def mean_of(updates: list[tuple[Arrays, int]]) -> bytes:
    """The file of the mean: float64 sums in the order given, one division, one rounding."""
    total = float(sum(samples for _, samples in updates))
    result: Arrays = {}
    for name, first in updates[0][0].items():
        if first.dtype.kind == "i":
            result[name] = np.max([arrays[name] for arrays, _ in updates], axis=0)
            continue
        mean = sum((arrays[name].astype(np.float64) * float(samples) for arrays, samples in updates), np.float64(0))
        mean = np.asarray(mean / total)
        result[name] = (mean if first.dtype == np.float32 else mean.astype(np.float32)).astype(first.dtype)
    return encoded(result)


# ---------------------------------------------------------------- the model


@dataclass
class Try:
    """One attempt at a task."""

    worker: str
    out: bool = True  # by the journal
    revived: bool = False  # its lease ran out and lives again, by a heartbeat
    renewed_at: float = 0.0


@dataclass
class Book:
    """One job as its facts tell it. Tasks go by the names of their assignments."""

    id: str
    first: Submitted
    state: str = "queued"
    paused: bool = False
    tries: dict[str, list[Try]] = field(default_factory=dict)
    results: dict[str, list[tuple[int, str, str | None]]] = field(default_factory=dict)  # attempt, worker, digest
    round: Opened | None = None
    accepted: dict[int, Accepted] = field(default_factory=dict)  # of the round that is open or being averaged
    lost: set[int] = field(default_factory=set)
    frozen: tuple[int, ...] | None = None
    closed: dict[int, str] = field(default_factory=dict)  # round -> digest
    digest: str | None = None
    evaluations: set[int] = field(default_factory=set)
    excluded: set[str] = field(default_factory=set)
    failures: dict[str, list[str]] = field(default_factory=dict)  # by name: a worker for each attempt that failed

    @property
    def over(self) -> bool:
        return self.state in OVER

    @property
    def shown(self) -> str:
        return "paused" if self.paused and not self.over else self.state

    def name(self, kind: str, round_index: int = 0, shard: int = 0) -> str:
        return f"{self.id}.{kind}.{round_index}.{shard}"

    def open_tasks(self) -> set[str]:
        """What a result could count for."""
        if self.over:
            return set()
        tasks = {self.name("evaluate", each) for each in self.evaluations}
        if self.state == "initialising":
            tasks.add(self.name("init"))
        if self.state == "training" and self.round is not None:
            waiting = [shard.shard for shard in self.round.shards if shard.shard not in self.accepted]
            tasks |= {self.name("train", self.round.round, shard) for shard in waiting}
        return tasks

    def standing(self, name: str) -> Accepted | None:
        """The update that counts for a shard, while its round is not closed."""
        if self.over:
            return None
        return next((u for u in self.accepted.values() if self.name("train", u.round, u.shard) == name), None)

    def newest(self, name: str) -> Try | None:
        return self.tries[name][-1] if self.tries.get(name) else None

    def given(self, name: str, attempt: int, worker: str) -> bool:
        tries = self.tries.get(name, [])
        return 1 <= attempt <= len(tries) and tries[attempt - 1].worker == worker


class Ledger:
    """All jobs, from the journal's facts, each checked against those before it and against what workers were told."""

    def __init__(self) -> None:
        self.books: dict[str, Book] = {}
        self.seen: list[StoredFact] = []
        self.good: dict[str, Arrays] = {}  # digest -> an update that may count
        self.acknowledged: set[tuple[str, int, str | None]] = set()  # task, attempt, digest: told that it counts
        self.given_up: set[tuple[str, int]] = set()  # acknowledged, and lost on both sides

    def feed(self, stored: StoredFact, now: float) -> None:
        assert not self.seen or stored.id > self.seen[-1].id
        self.seen.append(stored)
        if isinstance(stored.fact, Submitted):
            assert stored.job not in self.books
            self.books[stored.job] = Book(stored.job, stored.fact)
            return
        book = self.books[stored.job]
        assert not book.over or isinstance(stored.fact, HandedBack), "an ended job went on"
        self._turn(book, stored.fact, now)

    def _turn(self, book: Book, fact: Fact, now: float) -> None:
        match fact:
            case StateChanged():
                self._change(book, fact)
            case HandedOut():
                self._hand_out(book, fact, now)
            case HandedBack():
                self._hand_back(book, fact)
            case Initialised():
                name = book.name("init")
                assert book.given(name, fact.attempt, fact.worker)
                assert fact.digest in self.good, "a model counts that was refused"
                assert book.digest is None
                book.digest, book.tries[name][fact.attempt - 1].out = fact.digest, False
                book.results.setdefault(name, []).append((fact.attempt, fact.worker, fact.digest))
            case Opened():
                assert fact.round == len(book.closed) + 1
                assert fact.base == book.digest
                book.round, book.accepted, book.lost, book.frozen = fact, {}, set(), None
                book.state = "training"
            case Accepted():
                self._accept(book, fact)
            case Lost():
                assert book.accepted[fact.shard].digest == fact.digest
                book.lost.add(fact.shard)
            case Restored():
                book.lost.remove(fact.shard)
            case Frozen():
                assert fact.shards == tuple(sorted(book.accepted))
                assert fact.shards, "an empty mean"
                assert not book.lost, "a round was frozen without bytes that it needs"
                book.frozen, book.state = fact.shards, "aggregating"
            case RoundClosed():
                self._close(book, fact)
            case Evaluated(round=number) | EvaluationGivenUp(round=number):
                book.evaluations.remove(number)
                if isinstance(fact, Evaluated):
                    name = book.name("evaluate", number)
                    assert book.given(name, fact.attempt, fact.worker)
                    book.results.setdefault(name, []).append((fact.attempt, fact.worker, None))

    def _change(self, book: Book, fact: StateChanged) -> None:
        assert fact.reason
        if fact.state == "paused":
            book.paused = True
        elif fact.state in OVER:
            book.state = fact.state
        elif fact.state == "initialising" and book.state == "queued":
            book.state = "initialising"
        elif fact.state == "evaluating" and book.state == "aggregating":
            book.state = "evaluating"
        else:
            assert book.paused
            assert fact.state == book.state, "resumed to another state than it was paused in"
            book.paused = False

    def _hand_out(self, book: Book, fact: HandedOut, now: float) -> None:
        name = book.name(fact.kind, fact.round, fact.shard)
        tries = book.tries.setdefault(name, [])
        assert name in book.open_tasks(), "work was handed out that could not count"
        assert not book.paused
        assert fact.attempt == len(tries) + 1
        assert not any(each.out or each.revived for each in tries), "two workers hold one task"
        assert fact.worker not in book.excluded
        tries.append(Try(fact.worker, renewed_at=now))

    def _hand_back(self, book: Book, fact: HandedBack) -> None:
        name = book.name(fact.kind, fact.round, fact.shard)
        assert book.given(name, fact.attempt, fact.worker)
        attempt = book.tries[name][fact.attempt - 1]
        attempt.out = attempt.revived = False
        if fact.code in EXCLUDING:
            book.excluded.add(fact.worker)
        elif fact.code not in FORGIVEN:
            book.failures.setdefault(name, []).append(fact.worker)
        if fact.code == "lost" and not book.over:
            assert fact.shard in book.lost
            del book.accepted[fact.shard]
            book.lost.remove(fact.shard)
            book.results[name] = []
            self.given_up.add((name, fact.attempt))
            book.state, book.frozen = "training", None

    def _accept(self, book: Book, fact: Accepted) -> None:
        name = book.name("train", fact.round, fact.shard)
        assert name in book.open_tasks(), "a task counts twice, or in a round that takes no more"
        assert book.given(name, fact.attempt, fact.worker)
        assert fact.digest in self.good, "an update counts that was refused"
        book.accepted[fact.shard] = fact
        book.tries[name][fact.attempt - 1].out = False
        book.results.setdefault(name, []).append((fact.attempt, fact.worker, fact.digest))

    def _close(self, book: Book, fact: RoundClosed) -> None:
        assert book.round is not None
        assert fact.round == book.round.round
        assert book.frozen == tuple(sorted(book.accepted))
        updates = [book.accepted[shard] for shard in sorted(book.accepted)]
        assert fact.digest == sha(mean_of([(self.good[u.digest], u.samples) for u in updates]))
        assert (fact.shards, fact.samples) == (len(updates), sum(u.samples for u in updates))
        book.closed[fact.round] = book.digest = fact.digest
        section, last = book.first.spec.round, fact.round == book.first.spec.rounds
        if last or (section.evaluate_every and fact.round % section.evaluate_every == 0):
            book.evaluations.add(fact.round)
        book.accepted, book.frozen = {}, None

    def check_acknowledged(self) -> None:
        """P1: whatever a worker was told to count is in the journal, unless it was lost on both sides."""
        results = {
            (name, attempt, digest)
            for book in self.books.values()
            for name, taken in book.results.items()
            for attempt, _, digest in taken
        }
        missing = {each for each in self.acknowledged - results if each[:2] not in self.given_up}
        assert not missing, f"acknowledged and not there: {missing}"
