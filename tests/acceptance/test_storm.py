"""Fifty workers come back at once when their coordinator does; and rounds in which somebody is slow, or silent.

The workers are played, those of the storm in one process with a client each. Between two tries they wait as the agent
does (worker.plan.wait_s). What the claims took is printed; judged are counts.
"""

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
import pytest

from common.messages import Assignment, Heartbeat, PollAnswer, PollRequest, Progress, Submission
from common.weights import Notes, load, save
from tests.acceptance.kit import PATIENCE_S, LocalFleet, closed_rounds, of_type, wait_for
from tests.acceptance.played import MODEL, Played, sha, update
from tests.rounds_kit import registration
from worker import plan

pytestmark = pytest.mark.acceptance

WORKERS = 50
REFUSALS = 6  # that each worker meets before the coordinator is started again: an outage of some seconds
MOST_A_SECOND = 2.0  # requests of one worker, over the outage and its return
LONG_S, TTL_S = 600.0, 1.0  # a lease that no busy machine outlasts, and one that is to run out
DEADLINE_S = 4.0  # of a round, which an update must come before


# ---------------------------------------------------------------- the storm


@dataclass
class Stormed:
    """One worker of the storm: what it sent, and what came back."""

    number: int
    http: httpx2.AsyncClient
    id: str = ""
    given: Assignment | None = None  # by the claim whose answer is lost
    again: Assignment | None = None
    answers: Counter[str] = field(default_factory=Counter)
    claim_s: float = 0.0  # the claim that brought the assignment back
    away_s: float = 0.0  # from the coordinator's death to that

    async def join(self, token: str) -> None:
        welcome = await self.say("/v1/workers", registration(f"w{self.number}").model_dump_json(), token)
        self.id = welcome.json()["worker_id"]
        self.http.headers["Authorization"] = f"Bearer {welcome.json()['credential']}"

    async def say(self, path: str, body: str, token: str | None = None) -> httpx2.Response:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        return await self.http.post(path, content=body, headers=headers)

    async def claim(self) -> httpx2.Response:
        """The same claim each time."""
        request = PollRequest(start_id="s1", claim_key=f"c{self.number}", wait_s=0.0)
        return await self.say(f"/v1/workers/{self.id}/poll", request.model_dump_json())

    async def come_back(self, gone_at: float) -> None:
        """Claim again and again, with the agent's back-off, until the assignment is there."""
        chance = random.Random(self.number)
        while self.again is None:
            began = time.monotonic()
            try:
                response = await self.claim()
            except httpx2.TransportError:
                self.answers["none"] += 1
            else:
                self.answers[str(response.status_code)] += 1
                if response.status_code == 200:
                    self.again = PollAnswer.model_validate_json(response.content).assignment
                    self.claim_s, self.away_s = time.monotonic() - began, time.monotonic() - gone_at
                    return
            await asyncio.sleep(plan.wait_s(self.answers.total(), chance.random()))

    async def hand_in(self, folder: Path) -> None:
        """Upload an update and submit it."""
        assert self.given is not None
        file = folder / f"update.{self.number}"
        save(file, update(self.number), Notes())
        path = f"/v1/updates/{self.given.id}"
        put = await self.http.put(f"{path}?attempt={self.given.attempt}", content=file.read_bytes())
        assert put.status_code == 204, put.text
        submission = Submission(attempt=self.given.attempt, digest=sha(file), samples=1)
        receipt = await self.say(f"{path}/submit", submission.model_dump_json())
        assert receipt.status_code == 200, receipt.text


def test_fifty_workers_come_back_at_once_without_a_storm_and_get_the_work_they_had(tmp_path: Path) -> None:
    with LocalFleet(tmp_path, ttl_s=LONG_S) as fleet:
        job = fleet.submit(rounds=1, data={"shards": WORKERS})
        with Played(fleet, "builder") as builder:
            facts = {"parameters": 8, "train_samples": WORKERS, "test_samples": 0, "bounds": range(WORKERS + 1)}
            builder.init(facts=facts)
            builder.api.leave(builder.id, builder.start_id)
        workers = asyncio.run(_storm(fleet))
        fleet.finish(job)
        given = [(worker.given.id, worker.given.attempt) for worker in workers if worker.given is not None]
        assert len(set(given)) == WORKERS
        assert [(worker.again.id, worker.again.attempt) for worker in workers if worker.again is not None] == given
        told = sum((worker.answers for worker in workers), Counter())
        assert set(told) <= {"none", "200", "204", "503"}
        assert told["200"] == WORKERS
        rate = told.total() / sum(worker.away_s for worker in workers)
        claims = sorted(worker.claim_s for worker in workers)
        median_ms, p99_ms = (1e3 * float(np.quantile(claims, part)) for part in (0.5, 0.99))
        print(f"{told.total()} requests: {dict(told)}; {rate:.2f} a second and worker")
        all_back_s = max(worker.away_s for worker in workers)
        print(f"claims: median {median_ms:.0f} ms, p99 {p99_ms:.0f} ms; all back in {all_back_s:.1f} s")
        assert rate <= MOST_A_SECOND
        history = fleet.facts(job)
        assert not list(of_type(history, "handed_back"))
        assert len([fact for fact in of_type(history, "handed_out") if fact["kind"] == "train"]) == WORKERS
        assert [fact["shards"] for fact in closed_rounds(history)] == [WORKERS]


async def _storm(fleet: LocalFleet) -> list[Stormed]:
    """Fifty workers claim a shard each, lose the coordinator and the answer, claim again, and hand in."""
    async with AsyncExitStack() as stack:
        clients = [httpx2.AsyncClient(base_url=fleet.url, timeout=PATIENCE_S, verify=False) for _ in range(WORKERS)]
        workers = [Stormed(number, await stack.enter_async_context(http)) for number, http in enumerate(clients)]
        token = (fleet.state / "join.token").read_text().strip()
        await asyncio.gather(*(worker.join(token) for worker in workers))
        for worker, answer in zip(workers, await asyncio.gather(*(w.claim() for w in workers)), strict=True):
            worker.given = PollAnswer.model_validate_json(answer.content).assignment
        assert fleet.coordinator is not None
        fleet.coordinator.kill()
        gone_at = time.monotonic()
        coming = [asyncio.create_task(worker.come_back(gone_at)) for worker in workers]
        refused = f"every worker to be refused {REFUSALS} times"
        await asyncio.to_thread(wait_for, refused, lambda: min(w.answers["none"] for w in workers) >= REFUSALS)
        await asyncio.to_thread(fleet.start_coordinator)
        await asyncio.gather(*coming)
        await asyncio.gather(*(worker.hand_in(fleet.folder) for worker in workers))
        return workers


# ---------------------------------------------------------------- somebody is slow, or silent


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path, ttl_s=LONG_S) as running:
        yield running


@pytest.fixture
def four(fleet: LocalFleet) -> Iterator[list[Played]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Played(fleet, f"w{number}")) for number in range(4)]


def shards_to_all(four: list[Played]) -> list[Assignment]:
    """A model, and a shard of the first round for each of four workers."""
    facts = {"parameters": 8, "train_samples": 20, "test_samples": 0, "bounds": (0, 5, 10, 15, 20)}
    four[0].init(facts=facts)
    works = [worker.poll() for worker in four]
    assert sorted(work.shard for work in works) == [0, 1, 2, 3]
    return works


def shorten_leases(fleet: LocalFleet) -> None:
    """What is out is adopted by a coordinator whose leases are short: they run out from now on."""
    fleet.environment |= {"LYDIAN_TTL_S": str(TTL_S), "LYDIAN_HEARTBEAT_S": str(TTL_S / 8)}
    assert fleet.coordinator is not None
    fleet.coordinator.kill()
    fleet.start_coordinator()


def order(worker: Played, work: Assignment) -> str:
    """What a heartbeat is answered."""
    beat = Heartbeat(
        start_id=worker.start_id, assignment=work.id, attempt=work.attempt, progress=Progress(doing="training")
    )
    return worker.api.heartbeat(worker.id, beat).order


def test_a_round_that_misses_its_quorum_is_extended_once_and_then_fails_its_job_naming_the_shards(
    fleet: LocalFleet, four: list[Played]
) -> None:
    job = fleet.submit(rounds=1, data={"shards": 4}, round={"quorum": 3, "deadline": DEADLINE_S})
    works = shards_to_all(four)
    first = fleet.api.job(job).model
    four[0].hand_in(works[0], update(1))  # the other three are never heard of again
    view = fleet.finish(job, "failed")
    missing = ", ".join(f"shard {work.shard}" for work in sorted(works[1:], key=lambda work: work.shard))
    found = re.search(r"missed its quorum of 3 twice: 1 of 4 updates after ([0-9.]+) s; missing: (.*)", view.reason)
    assert found is not None, view.reason
    assert float(found[1]) >= 2 * DEADLINE_S
    assert found[2] == missing
    facts = fleet.facts(job)
    assert len(list(of_type(facts, "extended"))) == 1
    assert not list(of_type(facts, "frozen", "round"))
    assert view.model == first


def test_a_round_closes_by_its_quorum_without_a_slow_worker_which_is_told_so_and_works_on(
    fleet: LocalFleet, four: list[Played]
) -> None:
    job = fleet.submit(rounds=2, data={"shards": 4}, round={"quorum": 3})
    works = shards_to_all(four)
    slow, its = four[3], works[3]
    for worker, work in zip(four[:3], works[:3], strict=True):
        worker.hand_in(work, update(1))
    told = wait_for("the slow worker to be told", lambda: None if (said := order(slow, its)) == "continue" else said)
    assert told == "superseded"
    for worker in (slow, *four[:2]):  # the quorum once more, now with the one that was slow
        worker.hand_in(worker.poll(), update(3))
    fleet.finish(job)
    facts = fleet.facts(job)
    assert [(fact["shards"], fact["left_out"]) for fact in closed_rounds(facts)] == [(3, 1), (3, 1)]
    assert not list(of_type(facts, "handed_back"))
    assert np.array_equal(load(fleet.pull(job, "1"))["w"], MODEL["w"] + 1)
    assert np.array_equal(load(fleet.pull(job))["w"], MODEL["w"] + 3)


def test_a_round_that_needs_all_waits_for_a_slow_worker_as_long_as_it_beats(
    fleet: LocalFleet, four: list[Played]
) -> None:
    job = fleet.submit(rounds=1, data={"shards": 4})
    works = shards_to_all(four)
    for worker, work in zip(four[:3], works[:3], strict=True):
        worker.hand_in(work, update(1))
    shorten_leases(fleet)
    until = time.monotonic() + 3 * TTL_S
    orders: set[str] = set()
    wait_for("three lease times of beating", lambda: orders.add(order(four[3], works[3])) or time.monotonic() > until)
    assert orders == {"continue"}
    assert fleet.api.job(job).state == "training"
    four[3].hand_in(works[3], update(5))
    fleet.finish(job)
    assert [fact["attempt"] for fact in of_type(fleet.facts(job), "accepted")] == [1, 1, 1, 1]
    assert np.array_equal(load(fleet.pull(job))["w"], MODEL["w"] + 2)


def test_the_work_of_a_worker_whose_lease_ran_out_still_counts_while_its_shard_is_open(
    fleet: LocalFleet, four: list[Played]
) -> None:
    job = fleet.submit(rounds=1, data={"shards": 4})
    works = shards_to_all(four)
    four[0].hand_in(works[0], update(1))
    shorten_leases(fleet)

    def expired() -> int:
        return sum(entry.code == "expired" for entry in fleet.api.logs(job))

    wait_for("three leases to run out", lambda: expired() == 3)
    for worker, work in zip(four[1:], works[1:], strict=True):
        worker.hand_in(work, update(1))
    fleet.finish(job)
    assert [fact["attempt"] for fact in of_type(fleet.facts(job), "accepted")] == [1, 1, 1, 1]
