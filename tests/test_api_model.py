"""The HTTP API against a model of it: any calls of any worker, in any order, each once or more often, and power cuts.

The coordinator is the real application behind its real ASGI interface, with a journal and files of its own. What is
simulated is time and chance: the loop's clock stands still until a test moves it, and what the coordinator does in
threads (looking at an update, averaging) waits until a test lets it. So every interleaving is hypothesis' choice, can
be had again, and is shrunk to the shortest one that fails.

    rules ──calls──▶ coordinator ──▶ journal
      │  allowed answers               │ facts
      └────────▶ Ledger ◀──────────────┘     P1 to P4 hold after every step

A call that is repeated stands for one whose answer was lost. LYDIAN_FAULTS=full tries 10,000 steps.
"""

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.facts import (
    Accepted,
    HandedBack,
)
from common.messages import (
    Abandon,
    Assignment,
    Heartbeat,
    Holding,
    JobRequest,
    ModelFacts,
    PollAnswer,
    PollRequest,
    Progress,
    Submission,
)
from common.ranges import Ranges, content_range, parse_ranges, with_range
from common.sharding import cut
from server.blame import has_had_its_turns
from tests.api_house import TTL_S, House
from tests.api_ledger import EXCLUDING, FORGIVEN, GOOD, POISON, SAMPLES, Arrays, Book, Ledger, contents, sha
from tests.rounds_kit import registration, spec

STRIKES = 3
FULL = os.environ.get("LYDIAN_FAULTS") == "full"


# ---------------------------------------------------------------- the workers, and their calls


@dataclass
class Player:
    """A worker that is played."""

    name: str
    id: str
    token: str
    start_id: str = "s1"
    place: str = "here"
    stale_id: str | None = None  # of the process before
    claim_key: str = ""
    kept: list[Holding] = field(default_factory=list)
    strikes: int = 0
    degraded: str = ""
    asked: dict[str, str] = field(default_factory=dict)  # job that it was asked to load -> the claim key it asked with
    suspected: bool = False  # an older process of it has called: a new one may be refused
    polls: int = 0  # that it has made, a goodbye counted as one


@dataclass(frozen=True)
class Work:
    """An assignment, and whom it was given to."""

    player: Player
    given: Assignment

    @property
    def key(self) -> tuple[str, int]:
        return self.given.id, self.given.attempt

    def contents(self, flavour: str) -> tuple[Arrays, bytes]:
        return contents(self.given.round, self.given.shard, flavour)


@dataclass
class Upload:
    """What the coordinator must hold of an upload."""

    data: bytearray
    ranges: Ranges = ()

    @property
    def complete(self) -> bool:
        return self.ranges == ((0, len(self.data)),)


@dataclass
class Call:
    """One call: how it is made, how it may be answered as things stand, and what follows from the answer."""

    send: Callable[[], asyncio.Task[httpx2.Response]]
    allowed: Callable[[], set[str]]
    then: Callable[[str, httpx2.Response], None] = lambda answer, response: None
    read: Callable[[httpx2.Response], str] = lambda response: f"{response.status_code}"
    again: Callable[[str], str] = lambda first: first  # how a repeat is answered, by the answer to the first
    holds: Callable[[], bool] | None = None  # a poll that waits: whether it may go on waiting
    looks_at: tuple[str, int] | None = None  # the upload that a submission has looked at
    waited: bool = False  # it was not answered at once


@dataclass
class InFlight:
    """A call that has not been answered, since the coordinator waits for a thread or for time."""

    call: Call
    task: asyncio.Task[httpx2.Response]
    allowed: set[str]  # when it was sent


REFUSALS = frozenset({*POISON.values(), "bad_samples"})  # of a result: a strike for its worker, once an attempt


def fitting(work: Work, flavour: str) -> str:
    """A first model may have any tensors, and is refused for its numbers alone."""
    return "good" if work.given.kind == "init" and POISON.get(flavour, "not_finite") != "not_finite" else flavour


def read_error(response: httpx2.Response) -> str:
    """An error's status and code; it must have a sentence and advice."""
    if response.request.method == "HEAD":
        return f"{response.status_code}"
    answer = response.json()
    assert set(answer) == {"code", "sentence", "advice"}
    assert answer["sentence"]
    return f"{response.status_code} {answer['code']}"


WHO = st.integers(0, 2)
BY = st.sampled_from([None, None, None, None, 0, 1, 2])  # None: the worker that has the assignment
WHICH = st.integers(0, 5)
TIMES = st.sampled_from([1, 1, 2, 3])
SELDOM = st.sampled_from([False, False, False, False, False, True])
MOSTLY = st.sampled_from([True, True, True, False])
FLAVOURS = st.sampled_from([*GOOD, *GOOD, *GOOD, *POISON])
PIECES = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8)), min_size=1, max_size=4)  # eighths: from, length


class ApiMachine(RuleBasedStateMachine):
    """Three workers and an operator do anything."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="lydian-api-"))
        self.house = House(self.folder)
        self.ledger = Ledger()
        self.players: list[Player] = []
        self.works: list[Work] = []
        self.uploads: dict[tuple[str, int], Upload] = {}
        self.in_flight: list[InFlight] = []
        self.blamed: set[tuple[str, int]] = set()  # attempts that failed or were refused, each once
        self.starts = self.claims = 0
        for round_index in range(10):
            for shard in range(3):
                for flavour in GOOD:
                    arrays, data = contents(round_index, shard, flavour)
                    self.ledger.good[sha(data)] = arrays

    @property
    def now(self) -> float:
        return self.house.loop.now

    # ------------------------------------------------------------ calls

    def call(self, call: Call, times: int = 1) -> str | None:
        """Make a call so many times; returns its first answer, None if that is still to come."""
        first: str | None = None
        for number in range(times):
            allowed, rows = call.allowed(), self.house.rows()
            task = call.send()
            if not task.done():
                call.waited = True
                self.in_flight.append(InFlight(call, task, allowed))
                self.take_answers()
                continue
            answer = self._judge(call, task, lambda allowed=allowed: allowed)
            if number and first is not None:
                assert answer == call.again(first), "a repeat was answered otherwise"
                same = self.house.rows() == rows
                assert same, f"a repeat of {answer} changed something"
            first = answer if number == 0 else first
            self.take_answers()
        return first

    def take_answers(self) -> None:
        """Look at every call that was answered meanwhile. It may be answered as of when it was sent, or as of now."""
        self.house.loop.quiet()
        done = [waiting for waiting in self.in_flight if waiting.task.done()]
        before = [waiting.call.allowed() for waiting in done]
        self.feed()
        for waiting, earlier in zip(done, before, strict=True):
            self.in_flight.remove(waiting)
            self._judge(
                waiting.call,
                waiting.task,
                lambda waiting=waiting, earlier=earlier: waiting.allowed | earlier | waiting.call.allowed(),
            )

    def _judge(self, call: Call, task: asyncio.Task[httpx2.Response], allowed: Callable[[], set[str]]) -> str:
        response = task.result()
        answer = call.read(response) if response.status_code < 300 else read_error(response)
        possible = allowed()
        assert answer in possible, f"{response.request.method} {response.request.url}: {answer}, not one of {possible}"
        self.feed()
        call.then(answer, response)
        return answer

    def feed(self, timed: bool = False) -> None:
        """Read what is new in the journal."""
        last = self.ledger.seen[-1].id if self.ledger.seen else 0
        for stored in self.house.coordinator.journal.facts(after=last):
            fact = stored.fact
            if timed and isinstance(fact, HandedBack) and fact.code == "expired":
                name = self.ledger.books[stored.job].name(fact.kind, fact.round, fact.shard)
                held_s = self.now - self.ledger.books[stored.job].tries[name][fact.attempt - 1].renewed_at
                assert held_s >= TTL_S, f"a lease was taken away after {held_s} s"
            self.ledger.feed(stored, self.now)
            if isinstance(fact, HandedBack) and fact.code not in (*FORGIVEN, *EXCLUDING):
                self._blame(stored.job, fact)

    def _blame(self, job: str, fact: HandedBack) -> None:
        key = self.ledger.books[job].name(fact.kind, fact.round, fact.shard), fact.attempt
        assert key not in self.blamed, f"{key} was held against its worker twice"
        self.blamed.add(key)
        if fact.code in REFUSALS:
            next(player for player in self.players if player.id == fact.worker).strikes += 1

    def book_of(self, name: str) -> Book:
        return self.ledger.books[name.split(".", maxsplit=1)[0]]

    def is_open(self, name: str) -> bool:
        return name in self.book_of(name).open_tasks()

    # ------------------------------------------------------------ workers and their leases

    def join(self, name: str) -> Player:
        token = (self.folder / "join.token").read_text().strip()
        body = registration(name, place="here")
        task = self.house.begin("POST", "/v1/workers", token, body)
        welcome = task.result().json()
        return Player(name, welcome["worker_id"], welcome["credential"])

    def register_again(self, player: Player, *, fresh: bool, elsewhere: bool, holding: bool) -> Call:
        start_id = f"s{self.starts}" if fresh else player.start_id
        place = "elsewhere" if elsewhere else "here"
        held = [Holding(assignment=w.key[0], attempt=w.key[1]) for w in self.works[-20:] if w.player is player]
        body = registration(
            player.name, start_id=start_id, place=place, holding=[h.model_dump() for h in held] if holding else []
        )

        def then(answer: str, response: httpx2.Response) -> None:
            if answer != "200":
                return
            assert response.json()["worker_id"] == player.id
            assert response.json()["credential"] is None
            player.place = place
            if start_id == player.start_id:
                return
            player.stale_id, player.start_id, player.degraded = player.start_id, start_id, ""
            player.asked.clear()
            for name, attempt in ((h.assignment, h.attempt) for h in held):
                lease = self.book_of(name).tries[name][attempt - 1]
                if holding and (lease.out or lease.revived):
                    lease.renewed_at = self.now

        def allowed() -> set[str]:
            may_be_refused = start_id != player.start_id and (player.suspected or place != player.place)
            return {"200", "409 already_working"} if may_be_refused else {"200"}

        return Call(lambda: self.house.begin("POST", "/v1/workers", player.token, body), allowed, then)

    def poll(self, player: Player, *, fresh: bool, wait_s: float, stale: bool, degraded: str) -> Call:
        if fresh or not player.claim_key:
            self.claims += 1
            player.claim_key = f"c{self.claims}"
        key = player.claim_key
        start_id = player.stale_id if stale and player.stale_id else player.start_id
        holding = tuple(player.kept)
        body = PollRequest(start_id=start_id, claim_key=key, wait_s=wait_s, holding=holding, degraded=degraded)
        begun_at = self.now
        numbers: list[int] = []  # of each time that it is sent

        def send() -> asyncio.Task[httpx2.Response]:
            if start_id == player.start_id:
                player.polls += 1
            numbers.append(player.polls)
            return self.house.begin("POST", path, player.token, body)

        def allowed() -> set[str]:
            return {"200", "204"} if start_id == player.start_id else {"409 superseded"}

        def then(answer: str, response: httpx2.Response) -> None:
            player.suspected |= answer.startswith("409")
            if answer == "200":
                said = PollAnswer.model_validate_json(response.content)
                self._check_copies(player, holding, said, exact=wait_s == 0)
                self._check_work(player, said.assignment, exact=wait_s == 0)
                self._check_preparation(player, said, key, exact=wait_s == 0)
            if answer == "204":
                ended = player.polls > numbers[0]  # it has polled again since, or said goodbye
                assert wait_s == 0 or ended or self.now >= begun_at + wait_s

        if start_id == player.start_id:
            player.degraded = degraded
        path = f"/v1/workers/{player.id}/poll"

        def holds() -> bool:
            return start_id != player.start_id or not self.work_for(player)

        return Call(send, allowed, then, holds=holds)

    def _check_copies(self, player: Player, holding: tuple[Holding, ...], said: PollAnswer, *, exact: bool) -> None:
        """Which copies need not be kept, and which are to be sent again."""

        def counts(held: Holding) -> bool:
            update = self.book_of(held.assignment).standing(held.assignment)
            return update is not None and (update.attempt, update.digest) == (held.attempt, held.digest)

        def is_lost(held: Holding) -> bool:
            update = self.book_of(held.assignment).standing(held.assignment)
            return counts(held) and update is not None and update.shard in self.book_of(held.assignment).lost

        assert set(said.settled) <= set(holding)
        assert not [held for held in said.settled if counts(held)], "a copy was called settled that may be needed"
        if exact:
            assert set(said.settled) == {held for held in holding if not counts(held)}
            assert set(said.wanted) == {held for held in holding if is_lost(held)}
        player.kept = [held for held in player.kept if held not in said.settled]

    def _check_work(self, player: Player, given: Assignment | None, *, exact: bool) -> None:
        if given is None:
            return
        tries = self.book_of(given.id).tries[given.id]
        assert tries[given.attempt - 1].worker == player.id
        known = [work for work in self.works if work.key == (given.id, given.attempt)]
        if not known:
            assert given.attempt == len(tries) or not exact
            assert player.strikes < STRIKES, "a worker that is set aside was given work"
            assert not player.degraded or not exact
            self.works.append(Work(player, given))

    def _check_preparation(self, player: Player, said: PollAnswer, key: str, *, exact: bool) -> None:
        """A job is to be loaded once, and only by a worker that has no work and may have some of it."""
        if said.prepare is None:
            return
        job, book = said.prepare.job, self.ledger.books[said.prepare.job]
        assert said.assignment is None
        assert player.strikes < STRIKES, "a worker that is set aside was asked to load a job"
        assert player.asked.setdefault(job, key) == key, "a worker was asked twice to load a job"
        if exact:
            assert not any((book.over, book.paused, player.degraded))
            assert player.id not in book.excluded
            assert not self.work_for(player), "a worker was asked to load a job, and there was work"

    def work_for(self, player: Player) -> set[str]:
        """Tasks that nobody holds and this worker must be given; those that it may have to leave to others are not."""
        tries = [tries[-1] for book in self.ledger.books.values() for tries in book.tries.values()]
        busy = any(each.worker == player.id and (each.out or each.revived) for each in tries)
        if player.strikes >= STRIKES or player.degraded or busy:
            return set()
        return {
            name
            for book in self.ledger.books.values()
            if not book.paused and book.state != "queued" and player.id not in book.excluded
            for name in book.open_tasks()
            if not ((newest := book.newest(name)) and (newest.out or newest.revived))
            and not has_had_its_turns(
                player.id, [each.worker for each in book.tries.get(name, [])], book.failures.get(name, [])
            )
        }

    def heartbeat(self, work: Work, by: Player, *, stale: bool) -> Call:
        name, attempt = work.key
        start_id = by.stale_id if stale and by.stale_id else by.start_id
        body = Heartbeat(start_id=start_id, assignment=name, attempt=attempt, progress=Progress(doing="training"))

        def allowed() -> set[str]:
            book = self.book_of(name)
            newest, given = book.newest(name), book.tries[name][attempt - 1]
            if start_id != by.start_id:
                return {"409 superseded"}
            if not book.given(name, attempt, by.id):
                return {"404 unknown_attempt"}
            if book.over:
                return {"cancelled"}
            if not self.is_open(name) or given is not newest:
                return {"superseded"}
            return {"continue"} if given.out or given.revived else {"continue", "superseded"}

        def then(answer: str, response: httpx2.Response) -> None:
            by.suspected |= answer.startswith("409")
            if answer == "continue":
                lease = self.book_of(name).tries[name][attempt - 1]
                lease.renewed_at, lease.revived = self.now, not lease.out

        return Call(
            lambda: self.house.begin("POST", f"/v1/workers/{by.id}/heartbeat", by.token, body),
            allowed,
            then,
            read=lambda response: str(response.json()["order"]),
        )

    # ------------------------------------------------------------ results

    def lost(self, work: Work, by: Player) -> Accepted | None:
        """The update that this attempt handed in, if its bytes are to be sent again."""
        name, attempt = work.key
        update = self.book_of(name).standing(name)
        is_its = update is not None and (update.attempt, update.worker) == (attempt, by.id)
        return update if is_its and update is not None and update.shard in self.book_of(name).lost else None

    def overtaken(self, work: Work) -> bool:
        """Whether its worker has been given the same task again since."""
        name, attempt = work.key
        tries = self.book_of(name).tries[name]
        return attempt < len(tries) and tries[-1].worker == work.player.id

    def looked_at(self, key: tuple[str, int]) -> bool:
        return any(waiting.call.looks_at == key for waiting in self.in_flight)

    def put(self, work: Work, by: Player, data: bytes, start: int, stop: int) -> Call:
        name, attempt = work.key

        def allowed() -> set[str]:
            upload = self.uploads.get(work.key)
            if not self.book_of(name).given(name, attempt, by.id):
                return {"404 unknown_attempt"}
            if not self.is_open(name) and self.lost(work, by) is None:
                return {"410 late"}
            if work.given.kind == "evaluate":
                return {"403 no_upload"}
            if upload is not None and len(upload.data) != len(data):
                return {"422 wrong_length"}
            return {"409 upload_closed"} if self.looked_at(work.key) else {"204"}

        def then(answer: str, response: httpx2.Response) -> None:
            if answer == "204":
                held = self.uploads.setdefault(work.key, Upload(bytearray(len(data))))
                held.data[start:stop] = data[start:stop]
                held.ranges = with_range(held.ranges, start, stop)

        return Call(
            lambda: self.house.begin(
                "PUT",
                f"/v1/updates/{name}?attempt={attempt}",
                by.token,
                data[start:stop],
                **{"Content-Range": content_range(start, stop, len(data))},
            ),
            allowed,
            then,
        )

    def head(self, work: Work, by: Player) -> Call:
        name, attempt = work.key

        def allowed() -> set[str]:
            return {"200"} if self.book_of(name).given(name, attempt, by.id) else {"404"}

        def then(answer: str, response: httpx2.Response) -> None:
            held = self.uploads.get(work.key)
            if answer == "200" and self.is_open(name):
                assert parse_ranges(response.headers["Lydian-Ranges"]) == (held.ranges if held else ())

        return Call(lambda: self.house.begin("HEAD", f"/v1/updates/{name}?attempt={attempt}", by.token), allowed, then)

    def submit(self, work: Work, by: Player, flavour: str, samples: int | None, *, bad_cut: bool = False) -> Call:
        name, attempt = work.key
        most = work.given.samples.stop - work.given.samples.start if work.given.samples else 0
        claimed = most if samples is None else samples
        digest = None if work.given.kind == "evaluate" else sha(work.contents(flavour)[1])
        cuts = (0, 1) if bad_cut else cut(SAMPLES, [1.0] * int(self.book_of(name).first.spec.data.shards))
        facts = ModelFacts(parameters=5, train_samples=SAMPLES, test_samples=4, bounds=cuts)
        body = Submission(
            attempt=attempt,
            digest=digest,
            samples=claimed,
            facts=facts if work.given.kind == "init" else None,
            metrics={"accuracy": (1.0, 4.0)} if work.given.kind == "evaluate" else {},
        )

        def bytes_allow() -> set[str]:
            held = self.uploads.get(work.key)
            if held is None or not held.complete:
                return {"409 incomplete"}
            if sha(held.data) != digest:
                return {"422 digest_mismatch"}
            if flavour in POISON:
                return {f"422 {POISON[flavour]}"}
            return {"422 bad_samples"} if work.given.kind == "init" and bad_cut else {"counts"}

        def allowed() -> set[str]:
            book = self.book_of(name)
            if (lost := self.lost(work, by)) is not None:
                if digest != lost.digest:
                    return {"409 superseded"}
                return {"repeat"} if bytes_allow() == {"counts"} else bytes_allow()
            if (attempt, by.id, digest) in book.results.get(name, []):
                return {"repeat"}
            if not book.given(name, attempt, by.id):
                return {"404 unknown_attempt"}
            if (standing := book.standing(name)) is not None:
                same = (standing.attempt, standing.digest) == (attempt, digest)
                return {"409 incomplete"} if same else {"409 superseded"}
            if book.over:
                return {"409 job_over"}
            if not self.is_open(name):
                return {"410 late"}
            if work.given.kind == "train" and not 1 <= claimed <= most:
                return {"422 bad_samples"}
            return {"counts"} if work.given.kind == "evaluate" else bytes_allow()

        def then(answer: str, response: httpx2.Response) -> None:
            if answer in ("counts", "repeat"):
                self.ledger.acknowledged.add((name, attempt, digest))
                self.uploads.pop(work.key, None)
                if work.given.kind == "train" and answer == "counts":
                    by.kept.append(Holding(assignment=name, attempt=attempt, digest=digest))
            elif answer.startswith("410") or (call.waited and answer != "409 incomplete"):
                self.uploads.pop(work.key, None)
            elif answer.startswith("422"):
                self.uploads.pop(work.key, None)
                assert work.key in self.blamed or answer == "422 digest_mismatch"

        call = Call(
            lambda: self.house.begin("POST", f"/v1/updates/{name}/submit", by.token, body),
            allowed,
            then,
            read=lambda response: "repeat" if response.json()["repeat"] else "counts",
            again=lambda first: (
                "repeat"
                if first == "counts"
                else "409 incomplete"
                if first.startswith("422") and first != "422 bad_samples"
                else first
            ),
            looks_at=work.key if work.given.kind != "evaluate" else None,
        )
        return call

    def abandon(self, work: Work, by: Player, code: str) -> Call:
        name, attempt = work.key
        body = Abandon.model_validate({"attempt": attempt, "code": code, "sentence": f"{by.name} says {code}"})

        def allowed() -> set[str]:
            return {"204"} if self.book_of(name).given(name, attempt, by.id) else {"404 unknown_attempt"}

        def then(answer: str, response: httpx2.Response) -> None:
            if answer == "204":
                self.uploads.pop(work.key, None)

        return Call(
            lambda: self.house.begin("POST", f"/v1/updates/{name}/abandon", by.token, body),
            allowed,
            then,
        )

    # ------------------------------------------------------------ anything, in any order

    @initialize(
        rounds=st.integers(1, 3),
        shards=st.integers(1, 3),
        quorum=st.sampled_from(["all", 1, 0.5]),
        deadline=st.sampled_from([None, 25.0]),
        every=st.integers(0, 1),
    )
    def begin(self, rounds: int, shards: int, quorum: Any, deadline: float | None, every: int) -> None:
        self.players = [self.join(name) for name in "abc"]
        sections = {
            "round": {"quorum": quorum, "deadline": deadline, "evaluate_every": every},
            "data": {"shards": shards},
        }
        self.job_spec = spec(rounds=rounds, **sections)
        self.submit_job(second=False, times=1)

    @rule(second=st.booleans(), times=TIMES)
    def submit_job(self, second: bool, times: int) -> None:
        key = "second" if second else "first"
        body = JobRequest(spec=self.job_spec, key=key)
        known = [book.id for book in self.ledger.books.values() if book.first.key == key]

        def then(answer: str, response: httpx2.Response) -> None:
            assert known in ([], [response.json()["id"]]), "a key made two jobs"
            known[:] = [response.json()["id"]]

        self.call(
            Call(lambda: self.house.begin("POST", "/v1/jobs", self.house.admin, body), lambda: {"201"}, then), times
        )

    @rule(
        who=WHO,
        fresh=MOSTLY,
        wait_s=st.sampled_from([0.0, 0.0, 5.0]),
        stale=SELDOM,
        forgets=SELDOM,
        full=SELDOM,
        times=TIMES,
    )
    def asks(self, who: int, fresh: bool, wait_s: float, stale: bool, forgets: bool, full: bool, times: int) -> None:
        player = self.players[who]
        if forgets:
            player.kept.clear()
        degraded = "no room" if full else ""
        self.call(self.poll(player, fresh=fresh, wait_s=wait_s, stale=stale, degraded=degraded), times)

    @precondition(lambda self: self.works)
    @rule(which=WHICH, by=BY, stale=SELDOM, times=TIMES)
    def beats(self, which: int, by: int | None, stale: bool, times: int) -> None:
        work, caller = self.pick(which, by)
        self.call(self.heartbeat(work, caller, stale=stale), times)

    @precondition(lambda self: self.works)
    @rule(which=WHICH, by=BY, flavour=FLAVOURS, pieces=PIECES, times=TIMES)
    def uploads_some(self, which: int, by: int | None, flavour: str, pieces: list[tuple[int, int]], times: int) -> None:
        work, caller = self.pick(which, by)
        flavour = fitting(work, flavour)
        data = work.contents(flavour)[1]
        for first, last in pieces:
            start, stop = len(data) * first // 8, len(data) * (first + last) // 8
            self.call(self.put(work, caller, data, start, min(stop, len(data))), times)
        self.call(self.head(work, caller), times)

    @precondition(lambda self: self.works)
    @rule(
        which=WHICH,
        by=BY,
        flavour=FLAVOURS,
        samples=st.sampled_from([None, 1, 0, SAMPLES + 1]),
        bad_cut=SELDOM,
        times=TIMES,
    )
    def hands_in(
        self, which: int, by: int | None, flavour: str, samples: int | None, bad_cut: bool, times: int
    ) -> None:
        work, caller = self.pick(which, by)
        if self.overtaken(work):
            return
        self.call(self.submit(work, caller, fitting(work, flavour), samples, bad_cut=bad_cut), times)

    @precondition(lambda self: self.works)
    @rule(which=WHICH, flavour=FLAVOURS, times=TIMES)
    def uploads_all_and_hands_in(self, which: int, flavour: str, times: int) -> None:
        work, caller = self.pick(which, None)
        flavour = fitting(work, flavour)
        if self.overtaken(work) and flavour in POISON:
            return
        self.send_whole(work, caller, flavour)
        self.call(self.submit(work, caller, flavour, None), times)

    @rule(who=WHO, flavour=st.sampled_from(GOOD), times=TIMES)
    def works_well(self, who: int, flavour: str, times: int) -> None:
        """Claims, trains and hands in, with nothing in between."""
        player = self.players[who]
        before = len(self.works)
        self.call(self.poll(player, fresh=True, wait_s=0.0, stale=False, degraded=""), times)
        if len(self.works) > before:
            work = self.works[-1]
            self.send_whole(work, player, flavour)
            self.call(self.submit(work, player, flavour, None), times)
            self.let_all_go()

    @precondition(lambda self: self.works)
    @rule(which=WHICH, by=BY, code=st.sampled_from(["released", "task_failed", "disk_full", "no_data"]), times=TIMES)
    def gives_back(self, which: int, by: int | None, code: str, times: int) -> None:
        work, caller = self.pick(which, by)
        if (
            self.overtaken(work)
            or self.looked_at(work.key)
            or (caller is not work.player and not self.is_open(work.key[0]))
        ):
            return
        self.call(self.abandon(work, caller, code), times)

    @rule(who=WHO, stale=SELDOM, times=TIMES)
    def leaves(self, who: int, stale: bool, times: int) -> None:
        player = self.players[who]
        start_id = player.stale_id if stale and player.stale_id else player.start_id

        def then(answer: str, response: httpx2.Response) -> None:
            player.suspected |= answer.startswith("409")
            if answer == "204":
                player.asked.clear()

        def send() -> asyncio.Task[httpx2.Response]:
            if start_id == player.start_id:
                player.polls += 1
            return self.house.begin("POST", path, player.token)

        path = f"/v1/workers/{player.id}/leave?start_id={start_id}"
        allowed = {"204"} if start_id == player.start_id else {"409 superseded"}
        self.call(Call(send, lambda: allowed, then), times)

    @rule(who=WHO, fresh=MOSTLY, elsewhere=SELDOM, holding=st.booleans(), times=TIMES)
    def starts_anew(self, who: int, fresh: bool, elsewhere: bool, holding: bool, times: int) -> None:
        self.starts += 1
        self.call(self.register_again(self.players[who], fresh=fresh, elsewhere=elsewhere, holding=holding), times)

    @rule(which=st.integers(0, 1), order=st.sampled_from(["pause", "resume", "pause", "resume", "cancel"]), times=TIMES)
    def operator(self, which: int, order: str, times: int) -> None:
        books = list(self.ledger.books.values())
        book = books[which % len(books)]

        def allowed() -> set[str]:
            done = order == "cancel" and book.state == "cancelled"
            return {"409 job_over"} if book.over and not done else {"200"}

        path = f"/v1/jobs/{book.id}/{order}"
        self.call(Call(lambda: self.house.begin("POST", path, self.house.admin), allowed), times)

    @rule(who=WHO, times=TIMES)
    def readmits(self, who: int, times: int) -> None:
        player = self.players[who]

        def then(answer: str, response: httpx2.Response) -> None:
            player.strikes = 0

        path = f"/v1/workers/{player.id}/readmit"
        self.call(Call(lambda: self.house.begin("POST", path, self.house.admin), lambda: {"200"}, then), times)

    @precondition(lambda self: self.house.threads.waiting)
    @rule(number=st.integers(0, 5))
    def a_thread_gets_on(self, number: int) -> None:
        self.house.threads.let_go(number)
        self.take_answers()

    @rule(seconds=st.integers(1, 12))
    def time_passes(self, seconds: int) -> None:
        for _ in range(seconds):
            self.house.loop.now += 1
            self.house.loop.quiet()
            self.feed(timed=True)
            self.take_answers()
            for book in self.ledger.books.values():
                for name in book.open_tasks():
                    newest = book.newest(name)
                    waited_s = self.now - newest.renewed_at if newest and newest.out else 0.0
                    assert waited_s <= TTL_S + 1, f"{name} is held for {waited_s} s by a worker that is silent"

    @rule()
    def coordinator_stands_still(self) -> None:
        """Longer than a lease: nobody could renew."""
        self.house.loop.now += TTL_S + 2
        self.all_renewed()
        self.house.loop.quiet()
        self.feed(timed=True)
        self.take_answers()

    @rule(power_cut=st.booleans(), victim=st.integers(0, 5))
    def coordinator_is_killed(self, power_cut: bool, victim: int) -> None:
        self.drop_calls()
        self.house.close()
        durable = {digest for book in self.ledger.books.values() for digest in (book.digest, *book.closed.values())}
        open_updates = [u for book in self.ledger.books.values() if not book.over for u in book.accepted.values()]
        victims = [update.digest for update in open_updates if update.digest not in durable]
        if power_cut and victims:
            self.house.blob(victims[victim % len(victims)]).write_bytes(b"")
        self.house.open()
        kept = list(self.house.coordinator.journal.facts())
        assert kept[: len(self.ledger.seen)] == self.ledger.seen, "the journal has lost something"
        self.feed()
        self.uploads = {key: upload for key, upload in self.uploads.items() if self.is_open(key[0])}
        for player in self.players:
            player.degraded, player.suspected = "", False
            player.asked.clear()
        for book in self.ledger.books.values():
            for tries in book.tries.values():
                for each in tries:
                    each.revived = False
        self.all_renewed()

    # ------------------------------------------------------------ words for the rules

    def pick(self, which: int, by: int | None) -> tuple[Work, Player]:
        """One of the newest assignments, and who calls for it: its worker, or another."""
        work = self.works[-1 - which % len(self.works)]
        return work, work.player if by is None else self.players[by]

    def send_whole(self, work: Work, by: Player, flavour: str) -> None:
        if work.given.kind != "evaluate":
            data = work.contents(flavour)[1]
            self.call(self.put(work, by, data, 0, len(data)))

    def let_all_go(self) -> None:
        while self.house.threads.waiting:
            self.house.threads.let_go(0)
            self.take_answers()

    def all_renewed(self) -> None:
        for book in self.ledger.books.values():
            for tries in book.tries.values():
                for each in tries:
                    each.renewed_at = self.now

    def drop_calls(self) -> None:
        """Nobody gets an answer any more."""
        for waiting in self.in_flight:
            waiting.task.cancel()
        self.house.loop.quiet()
        assert all(waiting.task.cancelled() for waiting in self.in_flight)
        self.in_flight.clear()
        self.feed()

    # ------------------------------------------------------------ what holds at every moment

    @invariant()
    def what_was_acknowledged_is_there(self) -> None:
        self.ledger.check_acknowledged()

    @invariant()
    def what_is_shown_is_what_happened(self) -> None:
        if not self.players:
            return
        jobs = self.house.begin("GET", "/v1/jobs", self.house.admin).result().json()
        assert [job["id"] for job in jobs] == list(self.ledger.books)
        for job in jobs:
            book = self.ledger.books[job["id"]]
            assert (job["state"], job["round"]) == (book.shown, len(book.closed))
            assert (job["model"] or {"digest": None})["digest"] == book.digest
            assert job["reason"]
        workers = self.house.begin("GET", "/v1/workers", self.house.admin).result().json()
        shown = {worker["id"]: worker["state"] == "set aside" for worker in workers}
        assert shown == {player.id: player.strikes >= STRIKES for player in self.players}

    @invariant()
    def nobody_waits_while_there_is_work(self) -> None:
        for waiting in self.in_flight:
            assert waiting.call.holds is None or waiting.call.holds(), "a poll waits although there is work"

    # ------------------------------------------------------------ all is well that ends well

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None and self.players:
                self.all_behave_until_the_end()
                self.closed_rounds_can_be_fetched()
                self.only_models_stay()
        finally:
            for waiting in self.in_flight:
                waiting.task.cancel()
            self.house.demolish()
            shutil.rmtree(self.folder)

    def all_behave_until_the_end(self) -> None:
        """P3: as soon as everybody does what they should, every job ends."""
        self.let_all_go()
        for who in range(3):
            self.readmits(who, 1)
        for number, book in enumerate(self.ledger.books.values()):
            if not book.over:
                self.operator(number, "resume", 1)
        for _ in range(100):
            if all(book.over for book in self.ledger.books.values()):
                break
            for player in self.players:
                self.behave(player)
            self.time_passes(1)
            self.let_all_go()  # what a restart began may be all that is left to do
        assert {book.id: book.state for book in self.ledger.books.values() if not book.over} == {}
        self.what_is_shown_is_what_happened()
        self.what_was_acknowledged_is_there()

    def behave(self, player: Player) -> None:
        self.call(self.poll(player, fresh=True, wait_s=0.0, stale=False, degraded=""))
        for held in player.kept:
            work = next(work for work in self.works if work.key == (held.assignment, held.attempt))
            if self.lost(work, player) is not None:
                flavour = next(each for each in GOOD if sha(work.contents(each)[1]) == held.digest)
                self.send_whole(work, player, flavour)
                assert self.finish(self.submit(work, player, flavour, None)) == "repeat"
                return
        for work in self.works[-3:]:
            name, attempt = work.key
            newest = self.book_of(name).newest(name)
            if work.player is player and newest and newest.out and attempt == len(self.book_of(name).tries[name]):
                self.send_whole(work, player, "good")
                self.finish(self.submit(work, player, "good", None))

    def finish(self, call: Call) -> str:
        answers: list[str] = []
        followed = call.then

        def then(answer: str, response: httpx2.Response) -> None:
            answers.append(answer)
            followed(answer, response)

        call.then = then
        self.call(call)
        self.let_all_go()
        return answers[0]

    def closed_rounds_can_be_fetched(self) -> None:
        for book in self.ledger.books.values():
            for round_index, digest in book.closed.items():
                path = f"http://coordinator/v1/jobs/{book.id}/model?which={round_index}"
                headers = {"Authorization": f"Bearer {self.house.admin}"}
                response = self.house.run(self.house.client.get(path, headers=headers))
                assert (response.status_code, sha(response.content)) == (200, digest)

    def only_models_stay(self) -> None:
        """Of jobs that are over, no update and no other bytes are kept."""
        models = {digest for book in self.ledger.books.values() for digest in (book.digest, *book.closed.values())}
        models |= {
            digest for book in self.ledger.books.values() for _, _, digest in book.results.get(book.name("init"), [])
        }
        assert {path.name for path in self.house.folder.glob("blobs/??/*")} <= models


TestApi = ApiMachine.TestCase
TestApi.settings = settings(
    deadline=None,
    max_examples=100 if FULL else 25,
    stateful_step_count=100 if FULL else 40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_bytes_that_are_looked_at_while_their_job_is_cancelled_are_deleted() -> None:
    machine = ApiMachine()
    machine.begin(rounds=2, shards=1, quorum="all", deadline=None, every=0)
    machine.works_well(0, "good", 1)
    machine.asks(0, fresh=True, wait_s=0.0, stale=False, forgets=False, full=False, times=1)
    machine.uploads_all_and_hands_in(0, "good", 1)
    assert machine.house.threads.waiting, "nobody looks at the update"
    machine.operator(0, "cancel", 1)
    machine.teardown()  # checks what is left
