"""A worker with a valid token that lies in every way it can, beside honest ones: the model is what it would be without.

    honest job  ────────────────────────────▶ digest ─┐
    same job, with mallory's calls beside it ─▶ digest ─┴ the same; each shard counts once, by an honest worker

Nobody's honest work is ended by what she does, and she is set aside, with the reason, where the operator looks.
"""

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from common.errors import LydianError
from common.messages import Abandon, Assignment, WorkerView
from common.weights import load
from tests.acceptance.kit import LocalFleet, of_type, wait_for
from tests.acceptance.played import Arrays, Played, sha

pytestmark = pytest.mark.acceptance

ROUNDS, SHARDS, STRIKES = 6, 3, 4
REFUSALS = frozenset({"not_finite", "extra_tensor", "bad_samples", "missing_tensor", "wrong_shape", "bad_header"})
SPEC = {"rounds": ROUNDS, "data": {"shards": SHARDS}, "train": {"local_epochs": 1, "batch_size": 64}}


class Mallory:
    """Takes work as any worker does, and tries all there is to try on it. Keeps what she was answered."""

    def __init__(self, fleet: LocalFleet) -> None:
        self.fleet, self.worker = fleet, Played(fleet, "mallory")
        headers = {"Authorization": f"Bearer {self.worker.token}"}
        self.line = httpx2.Client(base_url=fleet.url, headers=headers, timeout=60)
        self.believed: list[str] = []  # calls that should have been refused, and were not
        self.refused: Counter[str] = Counter()
        self.spoilt: list[str] = []  # codes of results that were refused
        self.turns = 0
        self.stopping = threading.Event()
        self._thread = threading.Thread(target=self.run)
        self.failed: BaseException | None = None

    def __enter__(self) -> "Mallory":
        self._thread.start()
        return self

    def stop(self) -> None:
        """Let her make no more calls of her own."""
        self.stopping.set()
        self._thread.join()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.worker.api.close()
        self.line.close()
        if self.failed is not None:
            raise self.failed

    # ------------------------------------------------------------ calls that must be refused

    def wants(self, name: str, method: str, path: str, **options: Any) -> None:
        """One call that must be refused, or whose answer must say that nothing is hers."""
        try:
            answer = self.line.request(method, path, **options)
        except httpx2.TransportError:  # a body beyond its bound: the line is cut
            self.refused["cut"] += 1
            return
        said = {} if method == "HEAD" or not answer.content else answer.json()
        nothing = path.endswith("/abandon") and answer.status_code == 204  # of a task that is over: nothing comes of it
        nothing |= method == "HEAD" and answer.headers.get("Lydian-Ranges") == ""
        nothing |= path.endswith("/heartbeat") and said.get("order") in ("superseded", "cancelled")
        if not (nothing or 400 <= answer.status_code < 500):
            self.believed.append(f"{name}: {answer.status_code} {answer.text[:200]}")
        self.refused[f"{answer.status_code} {said.get('code', '')}"] += 1

    def foreign(self, work: Assignment) -> None:
        """Whatever is not hers, by ids that anybody can guess."""
        for round_index, shard, attempt in (
            (round_index, shard, attempt)
            for round_index in range(1, work.round + 2)
            for shard in range(SHARDS + 1)
            for attempt in (1, 2)
        ):
            name = f"{work.job}.train.{round_index}.{shard}"
            if (name, attempt) == (work.id, work.attempt):
                continue
            at, body = f"/v1/updates/{name}", b"0123456789"
            given = {"attempt": attempt, "digest": "0" * 64, "samples": 5}
            self.wants(f"bytes for {name}", "PUT", f"{at}?attempt={attempt}", content=body)
            self.wants(f"a look at {name}", "HEAD", f"{at}?attempt={attempt}")
            self.wants(f"a result of {name}", "POST", f"{at}/submit", json=given)
            leaves = {"attempt": attempt, "code": "task_failed", "sentence": "it is broken"}
            self.wants(f"the end of {name}", "POST", f"{at}/abandon", json=leaves)
            self.wants(f"a beat of {name}", "POST", self.mine("heartbeat"), json=self.beat(name, attempt))
        for job in (work.job, "digits-00000000"):
            self.wants(f"building {job} anew", "PUT", f"/v1/updates/{job}.init.0.0?attempt=1", content=b"0123456789")

    def mine(self, call: str) -> str:
        return f"/v1/workers/{self.worker.id}/{call}"

    def beat(self, name: str, attempt: int, start_id: str = "s1") -> dict[str, Any]:
        return {"start_id": start_id, "assignment": name, "attempt": attempt, "progress": {"doing": "training"}}

    def as_others(self) -> None:
        """Other workers, by their ids, and what belongs to people."""
        poll = {"start_id": "s1", "claim_key": "c", "wait_s": 0}
        for worker in self.fleet.api.workers():
            if worker.id != self.worker.id:
                self.wants("a poll as another", "POST", f"/v1/workers/{worker.id}/poll", json=poll)
                self.wants("a goodbye as another", "POST", f"/v1/workers/{worker.id}/leave?start_id=s1")
                self.wants("a pause of another", "POST", f"/v1/workers/{worker.id}/pause")
        for call in ("readmit", "resume"):
            self.wants(f"her own {call}", "POST", self.mine(call))
        for job in self.fleet.api.jobs():
            self.wants("the end of a job", "POST", f"/v1/jobs/{job.id}/cancel")
        self.wants("a token", "POST", "/v1/tokens", json={"scope": "join"})
        self.wants("a job", "POST", "/v1/jobs", json={"key": "k", "spec": {"task": "digits"}})

    def lies(self, work: Assignment) -> None:
        """About her own work, in ways that are refused before any of it is looked at."""
        at = f"/v1/updates/{work.id}"
        put, submit = f"{at}?attempt={work.attempt}", f"{at}/submit"
        far = work.max_bytes + 1
        for span in (
            f"bytes 0-9/{far}",
            "bytes 0-9/9",
            "bytes 9-0/10",
            f"bytes {far}-{far + 9}/{far + 10}",
            "bytes 0-9/*",
        ):
            self.wants(f"range {span}", "PUT", put, content=b"0123456789", headers={"Content-Range": span})
        for name in ("..%2f..%2fadmin.token", f"..%2f{work.id}", f"{work.id}%00", f"{work.id}.part", f"0{work.id}"):
            self.wants(f"upload as {name}", "PUT", f"/v1/updates/{name}?attempt=1", content=b"0123456789")
        given = {"attempt": work.attempt, "digest": "0" * 64, "samples": 5}
        for name, lie in {
            "samples below 0": {"samples": -199}, "2^53 samples": {"samples": 2**53}, "10^18 steps": {"steps": 10**18},
            "101 metrics": {"metrics": {str(n): [0, 1] for n in range(101)}}, "a name": {"digest": "../admin.token"},
            "a metric of a megabyte": {"metrics": {"x" * (9 << 20): [0, 1]}}, "seconds below 0": {"seconds": -1},
            "a result without bytes": {},
        }.items():  # fmt: skip
            self.wants(f"result with {name}", "POST", submit, json={**given, **lie})
        for start in ("s0", "s2"):
            beat = self.beat(work.id, work.attempt, start)
            self.wants(f"a beat of start {start}", "POST", self.mine("heartbeat"), json=beat)
        sums = {"roster": "0" * 64, "seeds": {}, "keys": {}, "attempt": work.attempt}
        self.wants("shares of a sum that is none", "POST", f"{at}/reveal", json=sums)

    def flood(self) -> None:
        """A hundred questions at once, with keys of every kind: none of them brings what is somebody else's."""

        def ask(number: int) -> None:
            fields = {"start_id": f"s{number % 3}", "claim_key": f"k{number}", "wait_s": 0}
            with contextlib.suppress(httpx2.TransportError):
                answer = self.line.post(self.mine("poll"), json=fields)
                if answer.status_code >= 500:
                    self.believed.append(f"a flood of polls: {answer.status_code}")

        with ThreadPoolExecutor(8) as many:
            list(many.map(ask, range(100)))

    def dribble(self, work: Assignment) -> None:
        """A body that is announced and never comes: the line is cut, and the next call is answered."""
        head = (
            f"PUT /v1/updates/{work.id}?attempt={work.attempt} HTTP/1.1\r\nHost: {self.fleet.host}\r\n"
            f"Authorization: Bearer {self.worker.token}\r\nContent-Length: {work.max_bytes}\r\n\r\n1"
        )
        with socket.create_connection((self.fleet.host, self.fleet.port), timeout=120) as line:
            line.sendall(head.encode())
            said = b""
            while piece := line.recv(1 << 16):
                said += piece
        if b" 408 " not in said.partition(b"\r\n")[0]:
            self.believed.append(f"a body that never comes: {said[:100]!r}")

    # ------------------------------------------------------------ results that must be refused

    def spoil(self, work: Assignment) -> None:
        """Hand in what must not count, by another kind of spoiling each time, and many times at once."""
        assert work.base is not None
        assert work.samples is not None
        base = self.fleet.folder / f"base.{work.id}.{work.attempt}"
        self.worker.api.download_model(work.base.digest, base)
        arrays, samples = load(base), work.samples.stop - work.samples.start
        self.hand_in(work, arrays, samples, digest="0" * 64)  # wrong: resend, no strike
        self.hand_in(work, arrays, samples, digest=work.base.digest, spoil=lambda a: a + a.dtype.type(1))
        kinds: list[tuple[int, Callable[[Arrays], Arrays]]] = [
            (samples, lambda given: {**given, next(iter(given)): np.full_like(next(iter(given.values())), np.nan)}),
            (samples, lambda given: {**given, "../../admin.token": np.zeros(2, np.float32)}),
            (10**12, lambda given: {name: array + array.dtype.type(1) for name, array in given.items()}),
            (0, lambda given: {name: array + array.dtype.type(1) for name, array in given.items()}),
        ]
        claimed, change = kinds[sum(code in REFUSALS for code in self.spoilt) % len(kinds)]
        self.spoilt += sorted(set(self.hand_in(work, change(arrays), claimed, at_once=8)))

    def hand_in(
        self,
        work: Assignment,
        arrays: Arrays,
        samples: int,
        *,
        digest: str | None = None,
        spoil: Callable[[Any], Any] = lambda array: array,
        at_once: int = 1,
    ) -> list[str]:
        """Upload and submit; the codes of the refusals."""
        file = self.worker.file(work, {name: spoil(array) for name, array in arrays.items()})
        given = {"attempt": work.attempt, "digest": digest or sha(file), "samples": samples}
        with contextlib.suppress(LydianError):
            self.worker.api.upload(work.id, work.attempt, file)

        def submit(_: int) -> str:
            answer = self.line.post(f"/v1/updates/{work.id}/submit", json=given)
            if answer.status_code < 400 or answer.status_code >= 500:
                self.believed.append(f"a spoilt result: {answer.status_code} {answer.text[:200]}")
            return str(answer.json().get("code"))

        with ThreadPoolExecutor(at_once) as many:
            return list(many.map(submit, range(at_once)))

    # ------------------------------------------------------------ her life

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                answer = self.worker.ask(wait_s=0.5)
                if answer is not None and answer.assignment is not None:
                    self.take(answer.assignment)
        except BaseException as error:  # noqa: BLE001 - told by the thread of the test
            self.failed = error

    def take(self, work: Assignment) -> None:
        if work.kind != "train":
            sentence = "only training is worth spoiling"
            self.worker.api.abandon(work.id, Abandon(attempt=work.attempt, code="released", sentence=sentence))
            wait_for("another to do it", lambda: self.fleet.api.job(work.job).state != "initialising")
            return
        self.turns += 1
        if self.turns > 1:
            self.spoil(work)
            return
        self.as_others()
        self.foreign(work)
        self.lies(work)
        self.dribble(work)
        self.flood()  # after which her work may be another's


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path, LYDIAN_BODY_IDLE_S="5", LYDIAN_STRIKES=str(STRIKES)) as running:
        running.start_workers(2)
        yield running


def test_a_malicious_worker_changes_no_byte_of_the_model_and_disturbs_nobody(fleet: LocalFleet) -> None:
    undisturbed = fleet.finish(fleet.submit(round={"min_workers": 2, "evaluate_every": 0}, **SPEC)).model
    assert undisturbed is not None
    honest = {worker.id for worker in fleet.api.workers()}
    past: dict[str, list[dict[str, Any]]] = {}  # job -> its facts
    with Mallory(fleet) as mallory:
        wait_for("her to poll", lambda: len(fleet.api.workers()) == 3)
        while shown(fleet, mallory).state != "set aside":  # where others are faster, one job gives her too few turns
            job = fleet.submit(round={"min_workers": 3, "evaluate_every": 0}, **SPEC)
            view = fleet.finish(job)
            assert view.model is not None
            assert view.model.digest == undisturbed.digest
            past[job] = fleet.facts(job)
        mallory.stop()
        replayed = Counter(mallory.refused)
        for job, facts in past.items():
            for fact in of_type(facts, "accepted"):  # what others have handed in, sent once more as hers
                body = {"attempt": fact["attempt"], "digest": fact["digest"], "samples": fact["samples"]}
                name = f"{job}.train.{fact['round']}.{fact['shard']}"
                mallory.wants(f"{name} again", "POST", f"/v1/updates/{name}/submit", json=body)
        assert (mallory.refused - replayed).total() == len(past) * ROUNDS * SHARDS
    assert mallory.believed == [], "\n".join(mallory.believed)

    for facts in past.values():
        counted = Counter((fact["round"], fact["shard"]) for fact in of_type(facts, "accepted"))
        assert counted == {(number, shard): 1 for number in range(1, ROUNDS + 1) for shard in range(SHARDS)}
        assert {fact["worker"] for fact in of_type(facts, "accepted")} <= honest
        ended = list(of_type(facts, "handed_back", "expired", "late", "lost"))
        assert {fact["worker"] for fact in ended} <= {mallory.worker.id}, "an honest attempt was ended"

    aside = shown(fleet, mallory)
    assert f"{STRIKES} results were refused, the last: " in aside.reason
    assert set(mallory.spoilt) & REFUSALS == {"not_finite", "extra_tensor", "bad_samples"}
    assert all(worker.state != "set aside" for worker in fleet.api.workers() if worker.id in honest)


def shown(fleet: LocalFleet, mallory: Mallory) -> WorkerView:
    """Mallory, as the operator sees her."""
    return next(worker for worker in fleet.api.workers() if worker.id == mallory.worker.id)
