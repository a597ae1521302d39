"""`lydian verify`: closed rounds averaged again from a coordinator's own folder, and what a changed byte comes to."""

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from common.cautions import cautions
from common.codecs import codec
from common.deltas import encode_update
from common.messages import JobSpec
from common.weights import Notes, load, save
from server.accounting import Planned, Spent
from server.keeping import Keeping, ingredients
from server.proof.__main__ import app
from server.replay import Proof, prove
from server.store import Journal
from tests.rounds_kit import registration, spec, training
from tests.trust_kit import JSON, MODEL, Member, Served

NOTES = Notes()
MOST_TURNS = 2000  # a bound for a job that hangs; nothing is asserted about it


class Book:
    """Privacy that costs one a round, without the process that counts it."""

    async def plan(self, spec: JobSpec) -> Planned | None:
        return Planned(float(spec.rounds), None) if spec.privacy.level == "worker" else None

    async def spent(self, spec: JobSpec, rounds: int) -> Spent:
        return Spent(float(rounds), 2.0 * rounds)


class Players(Served):
    """Three workers without torch, whose training adds a little noise to the model: real files, real averages."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.coordinator.accounting = Book()  # type: ignore[assignment]
        self._number, self._closed = 0, False
        self.members = [self._member(name) for name in "abc"]

    def close(self) -> None:
        """Twice is once."""
        if not self._closed:
            self._closed = True
            super().close()

    def _post(self, path: str, token: str, fields: Any) -> Any:
        answer = self.call("POST", path, token, json.dumps(fields).encode(), JSON)
        assert answer.status < 300, answer
        return answer.json() if answer.body else None

    def _member(self, name: str) -> Member:
        given = registration(name, trust="any").model_dump(mode="json")
        welcome = self._post("/v1/workers", self.join, given)
        return Member(welcome["worker_id"], welcome["credential"])

    def play(self, **keys: Any) -> str:
        """A job of three rounds, from its first model to its end."""
        given = spec(**{"rounds": 3, "data": {"shards": 3}, "round": {"keep_updates": "all"}, **keys})
        request = {"spec": given.model_dump(mode="json"), "key": json.dumps(keys)}
        job = str(self._post("/v1/jobs", self.admin, request)["id"])
        for turn in range(MOST_TURNS):
            if self.coordinator.jobs[job].over:
                assert self.coordinator.jobs[job].phase.state == "finished", self.coordinator.jobs[job].reason
                return job
            self._turn(self.members[turn % len(self.members)])
        raise AssertionError(f"{job} does not end: {self.coordinator.jobs[job].reason}")

    def _turn(self, member: Member) -> None:
        self._number += 1
        request = {"start_id": "s1", "claim_key": f"c{self._number}", "wait_s": 0}
        answer = self._post(f"/v1/workers/{member.id}/poll", member.token, request)
        work = answer["assignment"] if answer else None
        if work is None:
            return
        result = {"attempt": work["attempt"], "samples": 4 + work["shard"], "seconds": 0.1, "steps": 1}
        if work["kind"] == "evaluate":
            result |= {"metrics": {"accuracy": [1.0, 2.0]}}
        else:
            file = self._made(work)
            path = f"/v1/updates/{work['id']}"
            assert self.call("PUT", f"{path}?attempt={work['attempt']}", member.token, file).status == 204
            result |= {"digest": hashlib.sha256(file).hexdigest()}
        if work["kind"] == "init":
            bounds = [8 * shard for shard in range(4)]
            result |= {"facts": {"parameters": 8, "train_samples": 24, "test_samples": 4, "bounds": bounds}}
        if work["spec"]["train"]["drift"] != "none":
            result |= {"rate_sum": work["spec"]["train"]["lr"]}
        self._post(f"/v1/updates/{work['id']}/submit", member.token, result)

    def _made(self, work: dict[str, Any]) -> bytes:
        trained, encoded = self.folder.parent / "trained", self.folder.parent / "encoded"
        if work["kind"] == "init":
            save(trained, MODEL, NOTES)
            return trained.read_bytes()
        base = self.coordinator.blobs.path(work["base"]["digest"])
        chance = np.random.default_rng(self._number)
        arrays = {
            name: (array + 0.01 * chance.normal(size=array.shape)).astype(array.dtype)
            for name, array in load(base).items()
        }
        save(trained, arrays, NOTES)
        update = work["spec"]["aggregation"]["update"]
        if update == "fp32":
            return trained.read_bytes()
        encode_update(base, trained, encoded, codec(update))
        return encoded.read_bytes()


@pytest.fixture
def players(tmp_path: Path) -> Iterator[Players]:
    running = Players(tmp_path / "state")
    yield running
    running.close()


def proofs(folder: Path, job: str) -> list[Proof]:
    with Journal.reading(folder / "journal.sqlite") as journal:
        facts = list(journal.facts(job=job))
    return list(prove(facts, folder))


def verdicts(folder: Path, job: str) -> list[str]:
    return [proof.verdict for proof in proofs(folder, job)]


JOBS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "int8, with steps": {"aggregation": {"update": "int8", "download": "same"}},
    "diloco": {"aggregation": {"algorithm": "diloco"}},
    "fednova": {"aggregation": {"algorithm": "fednova"}},
    "median": {"aggregation": {"robust": "median"}},
    "centered clip": {"aggregation": {"robust": "centered_clip"}},
    "scaffold": {"train": {"drift": "scaffold"}},
    "asynchronous": {"round": {"mode": "async", "buffer": 2, "keep_updates": "all"}},
    "asynchronous, int8": {
        "round": {"mode": "async", "buffer": 2, "keep_updates": "all"},
        "aggregation": {"update": "int8"},
    },
    "private by worker": {"privacy": {"level": "worker", "clip": 1.0, "noise": 1.0, "delta": 1e-3}},
}


@pytest.mark.parametrize("name", JOBS)
def test_every_round_of_a_job_that_keeps_its_updates_is_proven_after_its_end(players: Players, name: str) -> None:
    job = players.play(**JOBS[name])
    found = proofs(players.folder, job)
    assert [proof.verdict for proof in found] == ["proven"] * 3, found
    assert found[-1].digest == players.coordinator.model(job, "newest").digest


def test_without_the_setting_nothing_is_kept_and_no_round_can_be_proven(players: Players) -> None:
    job = players.play(round={})
    found = proofs(players.folder, job)
    assert [proof.verdict for proof in found] == ["not kept"] * 3
    assert "round.keep_updates" in found[0].sentence
    newest = {path.name for path in (players.folder / "blobs").rglob("*") if path.is_file()}
    assert newest == {model.digest for model in players.coordinator.models[job].values()}


def test_a_number_keeps_that_many_rounds_and_a_new_start_forgets_none(players: Players) -> None:
    job = players.play(round={"keep_updates": 2})
    assert verdicts(players.folder, job) == ["not kept", "proven", "proven"]
    players.close()
    with running_again(players.folder) as again:
        assert verdicts(again.folder, job) == ["not kept", "proven", "proven"]


@contextmanager
def running_again(folder: Path) -> Iterator[Served]:
    served = Served(folder)
    try:
        yield served
    finally:
        served.close()


def test_a_round_that_is_not_frozen_needs_nothing_and_keeps_nothing() -> None:
    job = training(round={"keep_updates": 1}).job
    assert (ingredients(job), Keeping().closed(job)) == ({}, set())


def test_masked_updates_are_not_kept_since_nobody_could_average_them() -> None:
    keys = {"secure": {"enabled": True}, "round": {"min_workers": 3, "keep_updates": 1}, "data": {}}
    with pytest.raises(
        ValueError, match=r"round\.keep_updates = 1 keeps updates to average them again, and the shares"
    ):
        spec(**keys)


def test_whoever_keeps_updates_of_a_private_job_is_told_that_they_lie_there_without_noise() -> None:
    keys: dict[str, Any] = JOBS["private by worker"]
    assert any("without noise" in said for said in cautions(spec(**keys, round={"keep_updates": "all"})))
    assert not any("without noise" in said for said in cautions(spec(**keys)))
    assert not any("without noise" in said for said in cautions(spec(round={"keep_updates": "all"})))


# ---------------------------------------------------------------- what was changed is named


def files_of(players: Players, job: str) -> dict[str, Path]:
    """What a proof of round 2 reads -> its file."""
    facts = [stored.fact for stored in players.coordinator.journal.facts(job=job)]
    update = next(fact for fact in facts if fact.type == "accepted" and fact.round == 2)
    closed = [fact for fact in facts if fact.type == "round"]
    digests = {
        "the model that it began with": closed[0].digest,
        "the update of round 2": update.digest,
        "the memory of the outer step": closed[0].memory[0],
        "its model": closed[1].digest,
    }
    return {what: players.coordinator.blobs.path(digest) for what, digest in digests.items()}


def test_a_changed_byte_of_any_file_is_found_and_the_file_named(players: Players) -> None:
    job = players.play(aggregation={"algorithm": "diloco"})
    for what, path in files_of(players, job).items():
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        found = proofs(players.folder, job)[1]
        assert (found.verdict, what in found.sentence) == ("wrong", True), (what, found)
        path.write_bytes(before)
    assert verdicts(players.folder, job) == ["proven"] * 3


def test_an_exchanged_update_whose_fact_was_changed_too_makes_another_model(players: Players) -> None:
    job = players.play()
    facts = list(players.coordinator.journal.facts(job=job))
    one = next(stored for stored in facts if stored.fact.type == "accepted" and stored.fact.round == 1)
    other = next(stored for stored in facts if stored.fact.type == "accepted" and stored.fact.round == 2)
    swapped = one.fact.model_copy(update={"digest": other.fact.digest}).model_dump_json()
    players.close()
    with closing(sqlite3.connect(players.folder / "journal.sqlite", isolation_level=None)) as database:
        database.execute("UPDATE facts SET body = ? WHERE id = ?", (swapped, one.id))
    found = proofs(players.folder, job)[0]
    assert (found.verdict, "make another result: the model" in found.sentence) == ("wrong", True), found
    ran = CliRunner().invoke(app, ["job", job, "--state-dir", str(players.folder)])
    assert ran.exit_code == 1
    assert f"fact {one.id} of {job}" in ran.stderr  # the record says so by itself


def test_a_lost_seed_of_the_noise_is_said_and_is_no_fault(players: Players) -> None:
    job = players.play(**JOBS["private by worker"])
    (players.folder / "privacy" / f"{job}.seed").unlink()
    found = proofs(players.folder, job)
    assert {(proof.verdict, proof.sentence) for proof in found} == {
        ("not kept", "the secret seed of its noise is not kept here any more")
    }


def test_the_command_prints_a_line_a_round_and_ends_with_one_only_if_something_is_wrong(players: Players) -> None:
    job, run = players.play(), CliRunner()
    folder = ["--state-dir", str(players.folder)]
    good = run.invoke(app, ["job", job, *folder, "--json"])
    lines = [json.loads(line) for line in good.stdout.splitlines()]
    assert (good.exit_code, [line["verdict"] for line in lines]) == (0, ["proven"] * 3), good.output
    assert run.invoke(app, ["job", job, *folder, "--round", "2"]).stdout.startswith("round 2  proven  ")
    unknown = run.invoke(app, ["job", "no-such", *folder])
    assert (unknown.exit_code, "there is no job 'no-such'" in unknown.stderr) == (1, True)
    files_of_one = players.coordinator.blobs.path(lines[2]["digest"])
    files_of_one.write_bytes(b"something else")
    assert run.invoke(app, ["job", job, *folder]).exit_code == 1
    nowhere = run.invoke(app, ["job", job, "--state-dir", str(players.folder / "nowhere")])
    assert (nowhere.exit_code, "there is no journal" in nowhere.stderr) == (1, True)
