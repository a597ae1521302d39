"""The worker's files: what a life leaves behind, the next one finds; and nothing that is in the folder ends it."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.errors import LydianError
from common.messages import Assignment, JobSpec, ModelRef, Range, Submission, TaskRef
from tests.privileges import needs_mounts
from worker.spool import ASKED, MODELS_KEPT, TRAINED, Attempt, Kept, Sizes, Spool, Trained, Untrained

URL = "http://127.0.0.1:8470"
UPDATE = b"an update " * 100


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def assignment(number: int = 1, attempt: int = 1, job: str = "job-1", **fields: Any) -> Assignment:
    given = {
        "id": f"{job}.train.{number}.0", "attempt": attempt, "job": job, "kind": "train", "round": number, "shards": 1,
        "samples": Range(start=0, stop=5), "task": TaskRef(name="digits"), "spec": JobSpec(task="digits"),
        "base": ModelRef(digest=digest(b"base"), size=4), "ttl_s": 40.0, "max_bytes": 10_000,
    }  # fmt: skip
    return Assignment.model_validate({**given, **fields})


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with Spool.open(tmp_path) as one:
        yield one


def train(spool: Spool, work: Assignment, content: bytes = UPDATE, coordinator: str = URL) -> Trained:
    """What the agent and the child do, up to the submission."""
    begun = spool.begin(work, coordinator)
    begun.place.checkpoint.write_text("3")
    spool.write_indices(begun, np.arange(5))
    begun.place.update.write_bytes(content)
    submission = Submission(attempt=work.attempt, digest=digest(content), samples=5)
    return spool.finish(begun, submission)


def all_of(spool: Spool) -> list[Attempt]:
    return [*spool.untrained(URL), *spool.trained(URL), *spool.kept(URL)]


@contextlib.contextmanager
def next_life(folder: Path) -> Iterator[Spool]:
    with Spool.open(folder) as one:
        yield one


# ---------------------------------------------------------------- from one life to the next


def test_each_state_of_an_attempt_is_found_by_the_next_life(tmp_path: Path, spool: Spool) -> None:
    begun = spool.begin(assignment(1), URL)
    begun.place.checkpoint.write_text("3")
    trained = train(spool, assignment(2))
    kept = spool.keep(train(spool, assignment(3)))
    with next_life(tmp_path) as found:
        assert found.untrained(URL) == [begun]
        assert found.trained(URL) == [trained]
        assert found.kept(URL) == [kept]
        assert begun.place.checkpoint.read_text() == "3"
    assert (begun.holding.digest, trained.holding.digest) == (None, digest(UPDATE))


def test_attempts_for_one_coordinator_are_not_shown_to_another_and_stay(tmp_path: Path, spool: Spool) -> None:
    kept = train(spool, assignment(), coordinator=URL)
    with next_life(tmp_path) as found:
        other = "http://100.64.0.9:8470"
        assert (found.untrained(other), found.trained(other), found.kept(other)) == ([], [], [])
        assert found.trained(URL) == [kept]


def test_an_accepted_update_keeps_nothing_that_only_training_needed(spool: Spool) -> None:
    kept = spool.keep(train(spool, assignment()))
    assert {path.name for path in kept.place.folder.iterdir()} == {
        "assignment.json", "accepted.json", "update.safetensors",
    }  # fmt: skip
    assert spool.keep(kept) == kept


def test_a_dropped_attempt_is_gone_for_good(tmp_path: Path, spool: Spool) -> None:
    held = train(spool, assignment())
    spool.drop(held)
    spool.drop(held)
    assert spool.find(held.place.assignment, 1) is None
    with next_life(tmp_path) as found:
        assert found.trained(URL) == []


def test_a_job_that_is_over_takes_its_attempts_with_it_and_no_others(spool: Spool) -> None:
    for number in (1, 2):
        spool.keep(train(spool, assignment(number)))
    other = spool.keep(train(spool, assignment(1, job="job-2")))
    elsewhere = spool.keep(train(spool, assignment(3), coordinator="http://other:1"))
    spool.drop_job("job-1", URL)
    assert spool.kept(URL) == [other]
    assert spool.kept("http://other:1") == [elsewhere]


def test_only_the_very_update_that_is_spoken_of_is_found(spool: Spool) -> None:
    kept = spool.keep(train(spool, assignment()))
    assert spool.find_kept(kept.holding, URL) == kept
    for other in ({"digest": digest(b"other")}, {"attempt": 2}, {"assignment": "x"}):
        assert spool.find_kept(kept.holding.model_copy(update=other), URL) is None
    train(spool, assignment(2))
    assert spool.find_kept(assignment_holding(spool, 2), URL) is None  # not handed in: nobody can have settled it


def assignment_holding(spool: Spool, number: int) -> Any:
    held = spool.find(assignment(number).id, 1)
    assert held is not None
    return held.holding


def test_starts_are_counted_over_lives(tmp_path: Path, spool: Spool) -> None:
    spool.begin(assignment(), URL)
    for starts in (1, 2, 3):
        with next_life(tmp_path) as found:
            (held,) = found.untrained(URL)
            assert held.in_vain == starts
            assert found.start_again(held).starts == starts + 1


@given(lives=st.lists(st.sampled_from(["nothing", "checkpoint", "loses it", "put aside"]), max_size=8))
def test_only_lives_since_the_last_new_checkpoint_are_in_vain(lives: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with next_life(Path(folder)) as first:
            checkpoint = first.begin(assignment(), URL).place.checkpoint
        in_vain = 1
        for number, life in enumerate(lives):
            if life == "checkpoint":
                new = checkpoint.with_name("checkpoint.part")
                new.write_bytes(b"as far as this")
                os.utime(new, ns=(number, number))
                new.replace(checkpoint)
                in_vain = 0
            elif life == "loses it":
                checkpoint.unlink(missing_ok=True)
            with next_life(Path(folder)) as spool:
                (held,) = spool.untrained(URL)
                if life == "put aside":
                    spool.put_aside(held)
                    (held,) = spool.untrained(URL)
                    in_vain = max(in_vain - 1, 0)
                assert held.in_vain == in_vain
                spool.start_again(held)
                in_vain += 1


def test_an_attempt_begun_anew_under_the_same_name_has_nothing_of_the_old_one(spool: Spool) -> None:
    spool.keep(train(spool, assignment()))
    begun = spool.begin(assignment(), URL)
    assert spool.kept(URL) == []
    assert {path.name for path in begun.place.folder.iterdir()} == {"assignment.json"}


def test_a_torn_result_goes_back_to_the_checkpoint(tmp_path: Path, spool: Spool) -> None:
    trained = train(spool, assignment())
    trained.place.update.write_bytes(bytes(len(UPDATE)))  # as a power cut leaves it: the size is right
    with next_life(tmp_path) as found:
        (held,) = found.untrained(URL)
        assert held.place.checkpoint.read_text() == "3"
        assert {path.name for path in held.place.folder.iterdir()} == {"assignment.json", "checkpoint", "indices.npy"}


def test_a_trained_update_is_handed_in_even_if_its_assignment_cannot_be_read(tmp_path: Path, spool: Spool) -> None:
    trained = train(spool, assignment())
    (trained.place.folder / "assignment.json").write_text("{")
    with next_life(tmp_path) as found:
        assert found.trained(URL) == [trained]


def test_a_kept_update_is_looked_at_when_it_is_wanted(tmp_path: Path, spool: Spool) -> None:
    kept = spool.keep(train(spool, assignment()))
    assert spool.intact(kept)
    kept.place.update.write_bytes(bytes(len(UPDATE)))
    assert not spool.intact(kept)
    kept.place.update.unlink()
    assert not spool.intact(kept)


def test_a_full_disk_gives_up_the_checkpoint_for_the_submission(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = spool.begin(assignment(), URL)
    begun.place.checkpoint.write_text("3")
    begun.place.update.write_bytes(UPDATE)
    real = Path.write_bytes

    def full_until_then(path: Path, content: bytes) -> int:
        if begun.place.checkpoint.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_until_then)
    trained = spool.finish(begun, Submission(attempt=1, digest=digest(UPDATE)))
    assert spool.trained(URL) == [trained]


def test_what_was_waited_for_was_synced_and_a_broken_disk_is_told(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = train(spool, assignment())
    durability = spool.durability(held)
    durability.begin()
    durability.wait()

    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    durability.begin()
    with pytest.raises(OSError, match="Input/output error"):
        durability.wait()


@pytest.mark.parametrize("in_two_parts", [True, False])
def test_what_is_handed_in_is_put_onto_the_disk_once_and_what_was_asked_for_only_with_everything(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, in_two_parts: bool
) -> None:
    begun = spool.begin(assignment(), URL)
    begun.place.update.write_bytes(UPDATE)
    synced = list[int]()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    durability, folder = spool.durability(begun), begun.place.folder
    if in_two_parts:
        durability.begin_bytes()
        durability.wait()
        assert synced == [path.stat().st_ino for path in (begun.place.update, folder.parent)]
    spool.finish(begun, Submission(attempt=1, digest=digest(UPDATE)))
    durability.begin_result()
    durability.wait()
    needed = [path.stat().st_ino for path in (begun.place.update, folder / TRAINED, folder, folder.parent)]
    assert sorted(synced) == sorted(needed)
    assert synced.index(folder.stat().st_ino) > synced.index((folder / TRAINED).stat().st_ino)
    synced.clear()
    durability.begin()
    durability.wait()
    assert sorted(synced) == sorted([*needed, (folder / ASKED).stat().st_ino])


# ---------------------------------------------------------------- whatever is in the folder

NAMES = st.one_of(
    st.sampled_from([f"{assignment().id}.1", f"{assignment(2).id}.1", "x.1", "x", "..1", "a.0", "j.labels.npy"]),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20),
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 200)  # fmt: skip
FILES = st.sampled_from(
    ["assignment.json", "submission.json", "accepted.json", "update.safetensors", "checkpoint", "x"]
)
GOOD = {
    "assignment.json": json.dumps(
        {"coordinator": URL, "starts": 1, "assignment": assignment().model_dump(mode="json")}
    ),
    "submission.json": json.dumps(
        {
            "coordinator": URL, "assignment": assignment().id, "job": "job-1", "kind": "train", "size": len(UPDATE),
            "submission": Submission(attempt=1, digest=digest(UPDATE)).model_dump(mode="json"),
        }
    ),
}  # fmt: skip
CONTENTS = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([value.encode() for value in GOOD.values()]),
    st.sampled_from([UPDATE, b"null", b"[" * 5000, b"\xff\xfe", GOOD["submission.json"].replace("1", "2").encode()]),
)
ENTRIES = st.one_of(CONTENTS, st.none(), st.dictionaries(FILES, st.one_of(CONTENTS, st.none()), max_size=5))


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """A folder for a property: hundreds of spools are opened, and each one probes its disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


def put(path: Path, entry: Any) -> None:
    """A file, a folder with files, or (None) a link that leads out of the spool."""
    if isinstance(entry, bytes):
        path.write_bytes(entry)
    elif entry is None:
        path.symlink_to(path.parent.parent.parent / "outside")
    else:
        path.mkdir()
        for name, inner in entry.items():
            put(path / name, inner) if isinstance(inner, bytes) else (path / name).mkdir()


@settings(deadline=None)
@given(garbage=st.dictionaries(NAMES, ENTRIES, max_size=6))
def test_no_garbage_ends_the_worker_or_takes_an_intact_update_with_it(
    garbage: dict[str, Any],
) -> None:
    with in_memory() as folder:
        check_that_garbage_is_harmless(folder, garbage)


def check_that_garbage_is_harmless(folder: Path, garbage: dict[str, Any]) -> None:
    (folder / "outside").mkdir()
    (folder / "outside" / "precious").write_text("x")
    state = folder / "state"
    with Spool.open(state) as spool:
        trained = train(spool, assignment(8))
        kept = spool.keep(train(spool, assignment(9)))
    for name, entry in garbage.items():
        if name not in (trained.place.folder.name, kept.place.folder.name):
            put(state / "work" / name, entry)
    with next_life(state) as found:
        assert trained in found.trained(URL)
        assert kept in found.kept(URL)
        assert found.intact(kept)
        assert {held.place.folder for held in all_of(found)} == set(
            (state / "work").iterdir()
        )  # what is left is known, and what is known is there
        for other in found.trained(URL):
            assert found.intact(other)
        by_chance = garbage.get(f"{assignment().id}.1")
        whole = {"submission.json": GOOD["submission.json"].encode(), "update.safetensors": UPDATE}
        if isinstance(by_chance, dict) and "accepted.json" not in by_chance and whole.items() <= by_chance.items():
            assert len(found.trained(URL)) == 2
    assert (folder / "outside" / "precious").exists()


def test_what_is_removed_is_said_in_one_line(tmp_path: Path, spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "work" / "nobody's").mkdir()
    (tmp_path / "work" / "job-1.labels.npy").write_bytes(b"x")
    with caplog.at_level(logging.INFO), next_life(tmp_path):
        assert [record.getMessage() for record in caplog.records] == [
            '"nobody\'s" in the spool is no attempt that could be gone on with: removed'
        ]
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("cut", ["assignment.json", "submission.json", "accepted.json", "update.safetensors"])
def test_a_pipe_in_the_place_of_a_file_does_not_stop_the_worker(tmp_path: Path, spool: Spool, cut: str) -> None:
    held = spool.keep(train(spool, assignment())) if cut == "accepted.json" else train(spool, assignment())
    (held.place.folder / cut).unlink(missing_ok=True)
    os.mkfifo(held.place.folder / cut)
    with next_life(tmp_path) as found:
        assert len(found.trained(URL)) == (cut == "assignment.json")


def with_state(spool: Spool, number: int = 1, content: str = "state", **fields: Any) -> Trained:
    held = train(spool, assignment(number, **fields))
    held.place.optimizer.write_text(content)
    return held


def test_an_optimisers_state_counts_once_its_update_does_and_takes_the_place_of_the_one_before(spool: Spool) -> None:
    first = with_state(spool)
    assert spool.jobs_with_state(URL) == []
    spool.keep(first)
    assert spool.optimizer(first.place, 1).read_text() == "state"
    other = with_state(spool, 1, "other", id="job-1.train.1.7", shard=7)
    spool.keep(other)
    second = with_state(spool, 2, "second")
    spool.keep(spool.keep(second))
    assert not spool.optimizer(second.place, 1).exists()
    assert spool.optimizer(second.place, 2).read_text() == "second"
    assert spool.optimizer(other.place, 1).read_text() == "other"
    spool.drop(with_state(spool, 3, "refused"))
    assert spool.optimizer(second.place, 2).read_text() == "second"
    assert not spool.optimizer(second.place, 3).exists()


def with_personal(spool: Spool, number: int, **fields: Any) -> Trained:
    held = train(spool, assignment(number, **fields))
    held.place.personal.write_text(f"of {number}")
    return held


def test_personal_tensors_of_the_last_two_rounds_stay_since_the_last_one_may_be_lost(
    tmp_path: Path, spool: Spool
) -> None:
    assert spool.newest_personal(train(spool, assignment(9)).place) is None
    for number in (1, 2, 10):
        spool.keep(spool.keep(with_personal(spool, number)))
    spool.drop(with_personal(spool, 11))  # refused
    with next_life(tmp_path) as found:
        place = train(found, assignment(12)).place
        assert {path.name for path in found.folder.glob("personal/*/*")} == {"job-1.0.2", "job-1.0.10"}
        assert found.newest_personal(place) == found.personal(place, 10)
        assert found.personal(place, 10).read_text() == "of 10"
        assert found.jobs_with_state(URL) == ["job-1"]
        found.drop_job("job-1", URL)
        assert list(found.folder.glob("personal/*/*")) == []


def test_the_newest_personal_tensors_are_the_jobs_own_and_of_two_shards_those_of_the_lower(spool: Spool) -> None:
    for shard in (7, 3):
        spool.keep(with_personal(spool, 2, id=f"job-1.train.2.{shard}", shard=shard))
    spool.keep(with_personal(spool, 9, job="job-10", id="job-10.train.9.0"))
    place = train(spool, assignment(3)).place
    assert spool.newest_personal(place) == spool.personal(place, 2, 3)


def test_a_kill_between_the_state_and_the_record_of_its_acceptance_loses_neither(tmp_path: Path, spool: Spool) -> None:
    held = with_state(spool)
    spool.keep_states(held.place)
    with next_life(tmp_path) as found:
        (again,) = found.trained(URL)
        assert again == held
        found.keep(again)  # the coordinator says once more that it was accepted
        assert found.optimizer(again.place, 1).read_text() == "state"


def test_a_job_that_is_over_takes_its_states_with_it_and_no_others(tmp_path: Path, spool: Spool) -> None:
    for job in ("job-1", "job-1.0", "job-10"):
        spool.keep(with_state(spool, job=job, id=f"{job}.train.1.0"))
    with next_life(tmp_path) as found:
        assert found.jobs_with_state(URL) == ["job-1", "job-1.0", "job-10"]
        assert found.jobs_with_state("http://other:1") == []
        found.drop_job("job-1", "http://other:1")
        assert len(list(found.folder.glob("optimizers/*/*"))) == 3
        found.drop_job("job-1", URL)
        assert found.jobs_with_state(URL) == ["job-1.0", "job-10"]


def test_what_an_update_leaves_out_counts_once_it_does_and_goes_with_its_job(tmp_path: Path, spool: Spool) -> None:
    held = train(spool, assignment())
    held.place.pending.write_bytes(b"rest")
    assert not spool.error(held.place).exists()
    spool.keep(spool.keep(held))
    assert spool.error(held.place).read_bytes() == b"rest"
    refused = train(spool, assignment(2))
    refused.place.pending.write_bytes(b"never")
    spool.drop(refused)
    with next_life(tmp_path) as found:
        assert found.error(held.place).read_bytes() == b"rest"
        assert found.jobs_with_state(URL) == ["job-1"]
        assert found.jobs_with_state("http://other:1") == []
        found.drop_job("job-1", URL)
        assert found.jobs_with_state(URL) == []
        assert not found.error(held.place).exists()


def test_what_a_shard_carries_counts_once_its_update_does_and_goes_with_its_job(tmp_path: Path, spool: Spool) -> None:
    held = train(spool, assignment())
    held.place.slot.write_bytes(b"after")
    held.place.correction.write_bytes(b"of this round alone")
    spool.keep(spool.keep(held))
    assert spool.slot(held.place).read_bytes() == b"after"
    assert not held.place.correction.exists()
    spool.slot_total(held.place).write_bytes(b"sum")
    refused = train(spool, assignment(2))
    refused.place.slot.write_bytes(b"never")
    spool.drop(refused)
    with next_life(tmp_path) as found:
        assert found.slot(held.place).read_bytes() == b"after"
        assert found.jobs_with_state(URL) == ["job-1"]
        found.drop_job("job-1", URL)
        assert found.jobs_with_state(URL) == []
        assert not found.slot(held.place).exists()
        assert not found.slot_total(held.place).exists()


def test_what_is_in_the_way_of_a_state_costs_the_state_alone(spool: Spool) -> None:
    held = with_state(spool)
    (spool.optimizer(held.place, 1) / "in the way").mkdir(parents=True)
    assert isinstance(spool.keep(held), Kept)
    assert spool.kept(URL) == [spool.find(held.place.assignment, 1)]


class Lives(RuleBasedStateMachine):
    """Any order of steps, with a kill (and a next life) between any two: what was trained is handed in or settled."""

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = contextlib.ExitStack()
        self.folder = self.cleanup.enter_context(in_memory())
        self.spool = Spool.open(self.folder)
        self.number = 0
        self.states: dict[str, type] = {}  # assignment -> the state that it must be in

    def held(self, state: type) -> Any:
        return [self.spool.find(name, 1) for name, known in self.states.items() if known is state]

    @rule()
    def begin(self) -> None:
        self.number += 1
        begun = self.spool.begin(assignment(self.number), URL)
        self.states[begun.place.assignment] = Untrained

    @precondition(lambda self: self.held(Untrained))
    @rule()
    def finish(self) -> None:
        held = self.held(Untrained)[0]
        held.place.update.write_bytes(UPDATE)
        self.spool.finish(held, Submission(attempt=1, digest=digest(UPDATE)))
        self.states[held.place.assignment] = Trained

    @precondition(lambda self: self.held(Trained))
    @rule()
    def accepted(self) -> None:
        held = self.held(Trained)[0]
        self.spool.keep(held)
        self.states[held.place.assignment] = Kept

    @precondition(lambda self: self.held(Kept))
    @rule()
    def settled(self) -> None:
        held = self.held(Kept)[0]
        self.spool.drop(held)
        del self.states[held.place.assignment]

    @rule()
    def killed(self) -> None:
        self.spool.close()
        self.spool = Spool.open(self.folder)

    @invariant()
    def each_attempt_is_in_its_state(self) -> None:
        found = all_of(self.spool)
        assert {held.place.assignment: type(held) for held in found} == self.states
        assert all(self.spool.intact(held) for held in found if isinstance(held, Trained))

    def teardown(self) -> None:
        self.spool.close()
        self.cleanup.close()


TestLives = Lives.TestCase
TestLives.settings = settings(deadline=None, max_examples=20, stateful_step_count=15)


# ---------------------------------------------------------------- models and task files


def put_model(spool: Spool, content: bytes) -> str:
    name = digest(content)
    spool.model(name).write_bytes(content)
    return name


def test_a_model_of_an_earlier_life_is_hashed_before_it_is_used(tmp_path: Path, spool: Spool) -> None:
    good, torn = put_model(spool, b"good"), put_model(spool, b"torn")
    spool.model(torn).write_bytes(b"")
    with next_life(tmp_path) as found:
        assert found.has_model(good)
        assert not found.has_model(torn)
        assert not found.model(torn).exists()
        assert not found.has_model(digest(b"absent"))


def test_half_fetched_files_are_there_in_the_next_life(tmp_path: Path, spool: Spool) -> None:
    part = spool.model(digest(b"model")).with_name(f"{digest(b'model')}.safetensors.part")
    part.write_bytes(bytes(8192))
    task = spool.task(digest(b"task"), "mine").with_name("mine.py.part")
    task.write_bytes(b"x")
    with next_life(tmp_path) as found:
        assert part.exists()
        assert task.exists()
        assert found.fetched(digest(b"model")) == 8192
        assert found.fetched(digest(b"absent")) == 0


def test_the_newest_models_stay_and_what_was_half_fetched_before_goes(spool: Spool) -> None:
    names = []
    for number in range(MODELS_KEPT + 2):
        names.append(put_model(spool, bytes([number])))
        os.utime(spool.model(names[-1]), ns=(number, number))
    half = spool.model(digest(b"half")).with_suffix(".safetensors.part")
    half.write_bytes(b"x")
    spool.took_model(names[0])  # the oldest by its date, and the one that is needed
    assert {name for name in names if spool.model(name).exists()} == {names[0], *names[-MODELS_KEPT:]}
    assert not half.exists()


def test_room_is_made_of_models_and_never_of_updates(spool: Spool) -> None:
    kept = spool.keep(train(spool, assignment()))
    base, other = put_model(spool, b"base"), put_model(spool, b"other")
    assert spool.make_room(1, keep=base) == pytest.approx(spool.free(), rel=0.5)
    assert spool.has_model(other)  # there is room: nothing is deleted
    spool.make_room(1 << 62, keep=base)
    assert spool.has_model(base)
    assert not spool.model(other).exists()
    assert spool.intact(kept)


# ---------------------------------------------------------------- trouble


def test_a_disk_with_room_is_no_trouble_and_one_without_is(tmp_path: Path, spool: Spool) -> None:
    assert spool.trouble(0) == ""
    assert f"and {1 << 62} are needed" in spool.trouble(1 << 62)
    assert [path.name for path in tmp_path.rglob("probe*")] == []


@needs_mounts
def test_a_folder_that_is_read_only_is_trouble_in_words_and_ends_no_start_with_a_traceback(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with next_life(folder) as spool:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder / "work")], check=True)
        try:
            assert "work/probe cannot be written: Read-only file system" in spool.trouble(0)
            with pytest.raises(LydianError, match=r"cannot be used: Read-only file system"), next_life(folder):
                pass
        finally:
            subprocess.run(["umount", str(folder / "work")], check=True)
        assert spool.trouble(0) == ""


def test_a_broken_disk_is_not_taken_for_a_full_one(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        spool.trouble(0)


def test_sizes_are_known_in_the_next_life_for_their_device_until_the_job_is_over(tmp_path: Path, spool: Spool) -> None:
    assert spool.sizes("job-1", URL, "cuda:0 RTX 3060") == Sizes(device="cuda:0 RTX 3060")
    sizes = Sizes(device="cuda:0 RTX 3060", batch_size=64, samples_per_s=812.5, fits=16)
    spool.remember_sizes("job-1", URL, sizes)
    spool.remember_sizes("job-10", URL, sizes)
    with next_life(tmp_path) as found:
        assert found.sizes("job-1", URL, "cuda:0 RTX 3060") == sizes
        assert found.sizes("job-1", URL, "cpu") == Sizes(device="cpu")
        assert found.sizes("job-1", "http://other:1", "cuda:0 RTX 3060").batch_size == 0
        assert found.jobs_with_state(URL) == ["job-1", "job-10"]
        found.drop_job("job-1", URL)
        assert found.jobs_with_state(URL) == ["job-10"]
        assert found.sizes("job-1", URL, "cuda:0 RTX 3060").batch_size == 0


def test_sizes_that_cannot_be_read_are_measured_again(spool: Spool) -> None:
    spool.remember_sizes("job-1", URL, Sizes(device="cpu", batch_size=64))
    (path,) = spool.folder.glob("sizes/*/*")
    path.write_text('{"device": "cpu"')
    assert spool.sizes("job-1", URL, "cpu") == Sizes(device="cpu")
