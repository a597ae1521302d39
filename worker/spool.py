"""The worker's files: models fetched, task files, and what each attempt leaves behind until nobody can want it.

    FOLDER/models/DIGEST.safetensors     base models, the newest few; .part: half-fetched, gone on with
    FOLDER/tasks/DIGEST/NAME.py          task files
    FOLDER/optimizers/COORDINATOR/JOB.SHARD.ROUND   the optimiser's state after the newest accepted update of a shard
    FOLDER/personal/COORDINATOR/JOB.SHARD.ROUND     likewise the tensors that never leave this worker: the only copy
    FOLDER/work/JOB.labels.npy           labels of the training set, for one life
    FOLDER/work/ASSIGNMENT.ATTEMPT/      one attempt
        assignment.json                  what was asked for, by which coordinator, and how often it was started
        indices.npy                      the samples of the shard
        checkpoint                       the child's, while it trains
        trained.safetensors              what the child made, where the update is still to be encoded
        update.safetensors               what came out, and is sent
        pending                          what the encoded update leaves out
        optimizer, personal              what the training leaves: takes the place of the last one when accepted
        secret.json                      of a masked update: what it is unmasked with (worker.sealing)
        correction.safetensors           what the child adds to each gradient (train.drift)
        slot                             what the shard carries, should this update count
        submission.json                  written last: the update is whole, and this is how it is handed in
        accepted.json                    the same, renamed: handed in, and kept until the coordinator says settled
    FOLDER/errors/COORDINATOR/JOB.SHARD  what accepted updates have left out, added to the next one
    FOLDER/slots/COORDINATOR/JOB.SHARD   what a shard carries, JOB.total the sum of all; used where its digest is right
    FOLDER/sizes/COORDINATOR/JOB.json    how much of a job this machine's memory takes at once

        ──begin──▶ Untrained ──finish──▶ Trained ──keep──▶ Kept ──settled──▶ (gone)

The files are the truth: they are read at each start, and a kill between any two of them leaves one of these states.
What was trained is put onto the disk by `Durability`, in a thread beside hashing and uploading. Between the child's
last word and the submission's file lies the hashing of the update: a kill there has the shard trained again.

Names are digests, ids and numbers that we checked; nothing that was received becomes a path.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from common.messages import Assignment, Count, Holding, Kind, Message, Name, Roster, Submission
from common.weights import file_digest
from worker.identity import usable

log = logging.getLogger("lydian.worker")

MODELS_KEPT = 3  # the open round's base, the one being evaluated, and the one before
JSON_LIMIT = 16 << 20  # bytes; a job's whole configuration is in an assignment
PROBE_BYTES = 4096  # what a disk must take to count as well again

_PLACE = re.compile(r"([A-Za-z0-9._-]{1,63})\.([1-9][0-9]{0,8})")
_SIZES = re.compile(r"[A-Za-z0-9._-]{1,63}\.json")
_ERROR = re.compile(r"[A-Za-z0-9._-]{1,63}\.[0-9]{1,16}")
_SLOT = re.compile(r"[A-Za-z0-9._-]{1,63}\.([0-9]{1,16}|total)")
_STATE = re.compile(r"[A-Za-z0-9._-]{1,63}\.[0-9]{1,16}\.[0-9]{1,16}")

ASKED, TRAINED, ACCEPTED, UPDATE = "assignment.json", "submission.json", "accepted.json", "update.safetensors"
OPTIMIZER, PERSONAL, PENDING, SECRET = "optimizer", "personal", "pending", "secret.json"
STATES = {OPTIMIZER: "optimizers", PERSONAL: "personal"}
"""File of an attempt that its shard's next round goes on from -> folder where it is kept once the update counts."""

BYTES = (UPDATE, PENDING, *STATES)
"""What the child leaves of an attempt."""
WORDS = (SECRET, TRAINED, ACCEPTED)
"""What the agent writes beside it."""
FILES = (*BYTES, *WORDS, ASKED)

M = TypeVar("M", bound=Message)


class _Asked(Message):
    """The content of assignment.json."""

    coordinator: str
    starts: int = Field(ge=1, description="in a row that brought no checkpoint, but for the last of them")
    stood: str = Field("", description="which checkpoint was there at the last start; empty: none")
    assignment: Assignment


class _Done(Message):
    """The content of submission.json and accepted.json: enough to hand the update in without assignment.json."""

    coordinator: str
    assignment: Name
    job: Name
    kind: Kind
    shard: Count = 0
    round: Count = 0
    size: Count = Field(description="bytes of the update; 0: there is none")
    submission: Submission


class Secret(Message):
    """What a worker keeps of an attempt in a secure sum, until the round is settled. Nobody else may read it."""

    root: str = Field(pattern=r"^[0-9a-f]{64}$", description="everything that is secret comes from it")
    roster: Roster | None = Field(None, description="the only one that shares were cut for")
    group: tuple[Count, ...] | None = Field(None, description="whose masks are in the update")
    survivors: tuple[Count, ...] | None = Field(None, description="the only sum that shares were opened for")


class Sizes(Message):
    """How much of a job the memory of this worker's device takes: measured once, and known after a restart too."""

    device: str = Field(description="the device that it is true of")
    batch_size: Count = Field(0, description="samples a step that were found for batch_size = auto; 0: not looked for")
    samples_per_s: float | None = Field(None, description="speed of whole steps of that size, when it was found")
    fits: Count = Field(0, description="samples at once, since more ran out of memory; 0: none did")


# ---------------------------------------------------------------- one attempt


@dataclass(frozen=True)
class Place:
    """The folder of one attempt, and whose it is."""

    folder: Path
    coordinator: str
    job: str
    kind: Kind
    assignment: str  # its id
    attempt: int
    shard: int = 0
    round: int = 0

    @property
    def update(self) -> Path:
        """Where the result is written."""
        return self.folder / UPDATE

    @property
    def trained(self) -> Path:
        """Where the child writes a model that is still to be encoded."""
        return self.folder / "trained.safetensors"

    @property
    def pending(self) -> Path:
        """What the update leaves out, until it was accepted."""
        return self.folder / PENDING

    @property
    def secret(self) -> Path:
        """What a masked update is unmasked with."""
        return self.folder / SECRET

    @property
    def correction(self) -> Path:
        """What the child adds to each gradient."""
        return self.folder / "correction.safetensors"

    @property
    def slot(self) -> Path:
        """What the shard carries to its next round, should the update count."""
        return self.folder / "slot"

    @property
    def indices(self) -> Path:
        """The samples of the shard."""
        return self.folder / "indices.npy"

    @property
    def checkpoint(self) -> Path:
        """Where the child writes how far it came."""
        return self.folder / "checkpoint"

    def newest_checkpoint(self) -> str:
        """Which checkpoint is there; empty: none. Each is a new file, so no two are told the same."""
        try:
            file = self.checkpoint.stat()
        except FileNotFoundError:
            return ""
        return f"{file.st_ino}.{file.st_mtime_ns}"

    @property
    def optimizer(self) -> Path:
        """Where the child writes what became of the optimiser's state."""
        return self.folder / OPTIMIZER

    @property
    def personal(self) -> Path:
        """Where the child writes the personal tensors."""
        return self.folder / PERSONAL


@dataclass(frozen=True)
class Untrained:
    """An attempt that was begun."""

    place: Place
    assignment: Assignment
    starts: int
    stood: str = ""

    @property
    def in_vain(self) -> int:
        """How often in a row it was started and came no further: a life that left a checkpoint was of use."""
        return self.starts if self.place.newest_checkpoint() in ("", self.stood) else 0

    @property
    def holding(self) -> Holding:
        """How the coordinator is told of it."""
        return Holding(assignment=self.place.assignment, attempt=self.place.attempt)


@dataclass(frozen=True)
class Trained:
    """An attempt whose result is whole and not handed in."""

    place: Place
    submission: Submission

    @property
    def holding(self) -> Holding:
        """How the coordinator is told of it."""
        return Holding(assignment=self.place.assignment, attempt=self.place.attempt, digest=self.submission.digest)


@dataclass(frozen=True)
class Kept(Trained):
    """An attempt whose result was accepted, and may be wanted once more."""


Attempt = Untrained | Trained | Kept


class Durability:
    """Puts the files of one attempt onto the disk, in a thread beside the work; `wait` before somebody relies on it.

    Each file and each folder costs the disk a wait. So the result is put there in two parts, none of it twice, and what
    was asked for is left out: it does not outlive the training.
    """

    def __init__(self, disk: ThreadPoolExecutor, place: Place) -> None:
        self._disk, self._place = disk, place
        self._writes: list[Future[None]] = []
        self._has_bytes = False

    def begin(self) -> None:
        """Start to put all that is there onto the disk. Returns at once, as the others do. Any thread may call it."""
        self._submit(_everything(self._place))

    def begin_bytes(self) -> None:
        """Start with what the child has left, which nobody writes to any more, while the rest is made."""
        self._has_bytes = True
        self._submit([*_files(self._place, BYTES), self._place.folder.parent])

    def begin_result(self) -> None:
        """Start with the result, as far as that is still to do: the names of all its files go with this."""
        if not self._has_bytes:
            self.begin_bytes()
        self._submit([*_files(self._place, WORDS), self._place.folder])

    def _submit(self, paths: Sequence[Path]) -> None:
        self._writes.append(self._disk.submit(_put_onto_disk, paths))

    def wait(self) -> None:
        """Wait until all that was there when it was begun with would survive a power cut.

        Raises:
            OSError: the disk did not take it. EIO: what is on it is not known any more.
        """
        for write in self._writes:  # each one: the system tells of a failed write once
            write.result()


# ---------------------------------------------------------------- all of them


class Spool:
    """Files of one worker under one folder. Made by `open`; one process at a time (worker.identity has the lock)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._attempts: dict[Path, Attempt] = {}  # oldest first
        self._verified: set[str] = set()  # models that were hashed in this life
        self._over: set[str] = set()  # jobs that nothing more is said of, even where their files cannot go
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The spool in this folder, with what an earlier life left in it. What is torn or foreign is removed.

        Raises:
            DiskFullError: there is no room in the folder.
            LydianError: it cannot be written (code folder_unusable).
        """
        with usable(folder):
            for name in ("models", *STATES.values(), "tasks", "work", "errors", "sizes", "slots"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            self = cls(folder)
            self._probe()
            self._read()
        return self

    def close(self) -> None:
        """Wait for what is on its way to the disk."""
        self._disk.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ------------------------------------------------------------ attempts

    def untrained(self, coordinator: str) -> list[Untrained]:
        """The attempts for a coordinator that are to be carried on, oldest first."""
        return [held for held in self._of(coordinator) if isinstance(held, Untrained)]

    def trained(self, coordinator: str) -> list[Trained]:
        """The attempts for a coordinator that are to be handed in, oldest first."""
        return [held for held in self._of(coordinator) if isinstance(held, Trained) and not isinstance(held, Kept)]

    def kept(self, coordinator: str) -> list[Kept]:
        """The attempts that a coordinator accepted and has not settled, oldest first."""
        return [held for held in self._of(coordinator) if isinstance(held, Kept)]

    def _of(self, coordinator: str) -> list[Attempt]:
        return [held for held in self._attempts.values() if held.place.coordinator == coordinator]

    def begin(self, assignment: Assignment, coordinator: str) -> Untrained:
        """Make a place for a new attempt. What had its name before (another life of the coordinator's) is removed."""
        folder = self.folder / "work" / f"{assignment.id}.{assignment.attempt}"
        _remove(folder)
        self._attempts.pop(folder, None)
        folder.mkdir()
        place = _place(folder, coordinator, assignment)
        return self._put_down(Untrained(place, assignment, starts=1))

    def start_again(self, held: Untrained) -> Untrained:
        """Count one more start of an attempt. It is on the disk when this returns: the start may take the machine."""
        again = replace(held, starts=held.in_vain + 1, stood=held.place.newest_checkpoint())
        self._put_down(again)
        _put_onto_disk(_everything(held.place))
        return again

    def put_aside(self, held: Untrained) -> None:
        """It was ended on purpose, in good order, and may be gone on with: that start does not count against it."""
        again = replace(held, starts=held.starts - 1)
        if again.starts:  # one is never written as none: a kill before its next start costs it one
            self._put_down(again)
        self._attempts[held.place.folder] = again

    def _put_down(self, begun: Untrained) -> Untrained:
        """Write that an attempt is under way."""
        place = begun.place
        asked = _Asked(
            coordinator=place.coordinator, starts=begun.starts, stood=begun.stood, assignment=begun.assignment
        )
        _write(place.folder / ASKED, asked)
        self._attempts[place.folder] = begun
        return begun

    def durability(self, held: Attempt) -> Durability:
        """What puts an attempt's files onto the disk."""
        return Durability(self._disk, held.place)

    def finish(self, held: Untrained, submission: Submission) -> Trained:
        """The result is whole. From here on a killed agent hands it in instead of training again."""
        place = held.place
        size = place.update.stat().st_size if submission.digest is not None else 0
        done = _Done(
            coordinator=place.coordinator,
            assignment=place.assignment,
            job=place.job,
            kind=place.kind,
            shard=place.shard,
            round=place.round,
            size=size,
            submission=submission,
        )
        try:
            _write(place.folder / TRAINED, done)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            place.checkpoint.unlink(missing_ok=True)  # needed no more, and larger than what there was no room for
            _write(place.folder / TRAINED, done)
        trained = Trained(place, submission)
        self._attempts[place.folder] = trained
        return trained

    def keep(self, held: Trained) -> Kept:
        """The result was accepted: keep it until it is settled, without what only training needed. Twice is once.

        What the next round goes on from goes first: killed after that, the next life hears once more that the result
        was accepted.
        """
        place = held.place
        for kind in self.keep_states(place):
            own = [
                path
                for path in self._kept_states(kind, place.coordinator)
                if path.stem == f"{place.job}.{place.shard}" and path != self._state(kind, place, place.round)
            ]
            own.sort(key=lambda path: int(path.suffix[1:]))
            for path in own[: -1 if kind == PERSONAL else None]:  # the round may still be lost, and nobody has a copy
                _remove(path)
        kept = Kept(place, held.submission)
        self.commit(held)  # before the update is called accepted: that may be repeated, and this then is done
        self._attempts[place.folder] = kept
        if not isinstance(held, Kept):
            (place.folder / TRAINED).rename(place.folder / ACCEPTED)
        for path in place.folder.iterdir():
            if path.name not in (ASKED, ACCEPTED, UPDATE, SECRET):
                _remove(path)
        return kept

    def secret(self, place: Place) -> Secret | None:
        """What is kept of an attempt in a secure sum; None: nothing that can be read."""
        return _parse(place.secret, Secret)

    def keep_secret(self, place: Place, secret: Secret, *, durable: bool = False) -> None:
        """Keep it, readable by this user alone; with `durable`, it is on the disk when this returns."""
        _part(place.secret).touch(mode=0o600)
        _write(place.secret, secret)
        if durable:
            _put_onto_disk(_everything(place))

    def commit(self, held: Trained) -> None:
        """The result was accepted: what it left out is added to the next one, and its slot counts. Twice is once."""
        if held.place.slot.exists():
            slot = self.slot(held.place)
            slot.parent.mkdir(exist_ok=True)
            held.place.slot.replace(slot)
        if held.place.pending.exists():
            error = self.error(held.place)
            error.parent.mkdir(exist_ok=True)
            held.place.pending.replace(error)

    def drop(self, held: Attempt, *, may_count: bool = False) -> None:
        """The attempt is needed no more. It is known no more even where its files cannot go.

        Args:
            held: the attempt.
            may_count: its result may have been accepted, and the answer was lost: what its next round goes on from
                stays, beside the one before; the coordinator knows which of them counts.
        """
        self._attempts.pop(held.place.folder, None)
        if may_count and isinstance(held, Trained):
            self.keep_states(held.place)
        _remove(held.place.folder)

    def find(self, assignment: str, attempt: int) -> Attempt | None:
        """The attempt of this name; None: it was dropped, or never begun."""
        return self._attempts.get(self.folder / "work" / f"{assignment}.{attempt}")

    def drop_job(self, job: str, coordinator: str) -> None:
        """The job is over, and takes nothing more."""
        self._over.add(job)
        for held in self._of(coordinator):
            if held.place.job == job:
                self.drop(held)
        for path, of in self._states(coordinator):
            if of == job:
                _remove(path)

    def find_kept(self, told: Holding, coordinator: str) -> Kept | None:
        """The kept update that the coordinator speaks of; None: there is none like it."""
        return next((held for held in self.kept(coordinator) if held.holding == told), None)

    def intact(self, held: Trained) -> bool:
        """Whether the update is what it was when it was trained. Reads it all."""
        return _is_file(held.place.update) and file_digest(held.place.update) == held.submission.digest

    def write_indices(self, held: Untrained, indices: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> Path:
        """Write the samples of a shard for the child."""
        np.save(held.place.indices, indices, allow_pickle=False)
        return held.place.indices

    def labels(self, job: str) -> Path:
        """Where the child writes the labels of the training set."""
        return self.folder / "work" / f"{job}.labels.npy"

    # ------------------------------------------------------------ what a shard leaves to its next round

    def error(self, place: Place) -> Path:
        """What the accepted updates of this shard have left out: it is added to the next one."""
        return self._of_coordinator("errors", place.coordinator) / f"{place.job}.{place.shard}"

    def slot(self, place: Place) -> Path:
        """Where what this shard carries is, or would be; of whichever round."""
        return self._of_coordinator("slots", place.coordinator) / f"{place.job}.{place.shard}"

    def slot_total(self, place: Place) -> Path:
        """Where the sum of all that the job's shards carry is, or would be; of whichever round."""
        return self._of_coordinator("slots", place.coordinator) / f"{place.job}.total"

    def optimizer(self, place: Place, round_index: int, shard: int | None = None) -> Path:
        """Where the optimiser's state after an accepted update of this shard is, or would be."""
        return self._state(OPTIMIZER, place, round_index, shard)

    def personal(self, place: Place, round_index: int, shard: int | None = None) -> Path:
        """Where the personal tensors after an accepted update of this shard are, or would be."""
        return self._state(PERSONAL, place, round_index, shard)

    def newest_personal(self, place: Place) -> Path | None:
        """The personal tensors of the last round of the job that this worker trained in; of two shards, the lower."""
        own = [path for path in self._kept_states(PERSONAL, place.coordinator) if _job_of(path) == place.job]
        return min(own, key=lambda path: (-int(path.name.split(".")[-1]), int(path.name.split(".")[-2])), default=None)

    def _state(self, kind: str, place: Place, round_index: int, shard: int | None = None) -> Path:
        number = place.shard if shard is None else shard
        return self._of_coordinator(STATES[kind], place.coordinator) / f"{place.job}.{number}.{round_index}"

    def sizes(self, job: str, coordinator: str, device: str) -> Sizes:
        """What is known of a job's sizes on this device; nothing, where they were measured on another one."""
        known = _parse(self._of_coordinator("sizes", coordinator) / f"{job}.json", Sizes)
        return known if known is not None and known.device == device else Sizes(device=device)

    def remember_sizes(self, job: str, coordinator: str, sizes: Sizes) -> None:
        """Keep them until the job is over."""
        path = self._of_coordinator("sizes", coordinator) / f"{job}.json"
        path.parent.mkdir(exist_ok=True)
        _write(path, sizes)

    def jobs_with_state(self, coordinator: str) -> list[str]:
        """The jobs of a coordinator that something is kept for from round to round."""
        return sorted({job for _, job in self._states(coordinator)} - self._over)

    def _states(self, coordinator: str) -> list[tuple[Path, str]]:
        """Everything that is kept from round to round, and the job that it is of."""
        folder = self._of_coordinator("errors", coordinator)
        errors = [path for path in folder.iterdir() if _ERROR.fullmatch(path.name)] if folder.is_dir() else []
        folder = self._of_coordinator("slots", coordinator)
        slots = [path for path in folder.iterdir() if _SLOT.fullmatch(path.name)] if folder.is_dir() else []
        folder = self._of_coordinator("sizes", coordinator)
        sizes = [path for path in folder.iterdir() if _SIZES.fullmatch(path.name)] if folder.is_dir() else []
        return [
            *((path, path.stem) for path in sizes),
            *((path, path.name.rsplit(".", 1)[0]) for path in (*errors, *slots)),
            *((path, _job_of(path)) for kind in STATES for path in self._kept_states(kind, coordinator)),
        ]

    def keep_states(self, place: Place) -> list[str]:
        """Give what an attempt left its place among what is gone on from. Returns which kinds there were."""
        kept = []
        for kind in STATES:
            left, path = place.folder / kind, self._state(kind, place, place.round)
            if not _is_file(left):
                continue
            with _reading(left):
                path.parent.mkdir(exist_ok=True)
                left.replace(path)
                if kind == PERSONAL:
                    _sync(path.parent)  # nobody has another copy
                kept.append(kind)
        return kept

    def _kept_states(self, kind: str, coordinator: str) -> list[Path]:
        folder = self._of_coordinator(STATES[kind], coordinator)
        return [path for path in folder.iterdir() if _STATE.fullmatch(path.name)] if folder.is_dir() else []

    def _of_coordinator(self, kind: str, coordinator: str) -> Path:
        return self.folder / kind / hashlib.sha256(coordinator.encode()).hexdigest()[:16]

    # ------------------------------------------------------------ models and task files

    def model(self, digest: str) -> Path:
        """Where the model of this digest is, or would be."""
        return self.folder / "models" / f"{digest}.safetensors"

    def task(self, digest: str, name: str) -> Path:
        """Where the task file of this digest is, or would be: in a folder of its own, under its own name."""
        folder = self.folder / "tasks" / digest
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.py"

    def has_model(self, digest: str) -> bool:
        """Whether the model is here. One of an earlier life is hashed first: a power cut may have torn it."""
        path = self.model(digest)
        if not path.exists():
            return False
        if digest not in self._verified and file_digest(path) != digest:
            log.warning("the model %s… is damaged on this disk; it is fetched again", digest[:12])
            path.unlink()
            return False
        self._verified.add(digest)
        return True

    def fetched(self, digest: str) -> int:
        """Bytes of a model that are here already, whole or half-fetched."""
        path = self.model(digest)
        if path.exists():
            return path.stat().st_size
        part = _part(path)  # it has its whole length at once, its blocks by and by
        return part.stat().st_blocks * 512 if part.exists() else 0

    def forget_part(self, digest: str) -> None:
        """Give the room of a half-fetched model back."""
        _part(self.model(digest)).unlink(missing_ok=True)

    @property
    def models(self) -> tuple[str, ...]:
        """Digests of models that are here, fetched or looked at in this life."""
        return tuple(sorted(self._verified))

    def put_model(self, digest: str, data: bytes | memoryview) -> None:
        """Keep a model that came with its work, verified."""
        path = self.model(digest)
        part = path.with_suffix(".came")
        part.write_bytes(data)
        part.replace(path)
        self.took_model(digest)

    def took_model(self, digest: str) -> None:
        """A model was fetched, and verified on the way: older ones make room for it."""
        self._verified.add(digest)
        self._trim_models(digest, MODELS_KEPT)

    def _trim_models(self, keep: str, kept: int) -> None:
        """Delete the oldest models beyond some that are kept, and what is half-fetched; never the one named."""
        models = sorted((self.folder / "models").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        whole = [path for path in models if path.suffix == ".safetensors"]
        for path in {*whole[: max(len(whole) - kept, 0)], *(path for path in models if path not in whole)}:
            if not path.name.startswith(keep):
                _remove(path)
                self._verified.discard(path.stem)

    def step(self, digest: str) -> Path:
        """Where a step from one model to another is fetched to."""
        return self.folder / "models" / f"{digest}.step"

    # ------------------------------------------------------------ room

    def free(self) -> int:
        """Bytes that this user may still write in the folder."""
        return shutil.disk_usage(self.folder).free

    def make_room(self, needed: int, *, keep: str) -> int:
        """Delete models that can be fetched again where `needed` bytes are not free. Returns the bytes free then.

        Kept updates are never deleted here: those that no coordinator can want are gone already, by `drop_job` and
        by settling.
        """
        if self.free() < needed:
            self._trim_models(keep, kept=0)
        return self.free()

    def trouble(self, room: int) -> str:
        """Why no work can be done in this folder now; empty: it can.

        Args:
            room: bytes that must be free.

        Raises:
            OSError: EIO: the disk is broken.
        """
        try:
            self._probe()
        except OSError as error:
            if error.errno == errno.EIO:
                raise
            return f"{error.filename or self.folder} cannot be written: {error.strerror or error}"
        free = self.free()
        return "" if free >= room else f"{self.folder} has {free} bytes free, and {room} are needed"

    def _probe(self) -> None:
        """Write, sync and delete a small file in each folder.

        Raises:
            OSError: one of them does not take it.
        """
        for name in ("models", *STATES.values(), "tasks", "work"):
            probe = self.folder / name / "probe"
            try:
                with probe.open("wb") as file:
                    file.write(bytes(PROBE_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                error.filename = error.filename or str(probe)
                raise
            finally:
                with contextlib.suppress(OSError):  # it says nothing that the write has not said
                    probe.unlink(missing_ok=True)

    # ------------------------------------------------------------ reading an earlier life

    def _read(self) -> None:
        """Learn what an earlier life left, oldest first. What cannot be read is said, and removed."""
        found: list[tuple[int, Path, Attempt]] = []
        for path in list((self.folder / "work").iterdir()):
            with _reading(path):
                if path.name.endswith(".labels.npy") and _is_file(path):
                    path.unlink()
                    continue
                held = _attempt_in(path)
                if held is None:
                    log.warning("%r in the spool is no attempt that could be gone on with: removed", path.name)
                    _remove(path)
                    continue
                found.append((path.stat().st_mtime_ns, path, held))
        self._attempts = {path: held for _, path, held in sorted(found, key=lambda item: item[:2])}


def _attempt_in(folder: Path) -> Attempt | None:
    """The attempt whose files these are; None: they are nobody's, or too little is whole."""
    named = _PLACE.fullmatch(folder.name)
    if named is None or folder.is_symlink() or not folder.is_dir():
        return None
    assignment, attempt = named[1], int(named[2])
    for name, state in ((ACCEPTED, Kept), (TRAINED, Trained)):
        done = _parse(folder / name, _Done)
        if done is None or (done.assignment, done.submission.attempt) != (assignment, attempt):
            continue
        place = Place(folder, done.coordinator, done.job, done.kind, assignment, attempt, done.shard, done.round)
        held = state(place, done.submission)
        if _is_whole(held, done.size):
            return held
        log.warning("%r: the result is damaged on this disk", folder.name)
    asked = _parse(folder / ASKED, _Asked)
    if asked is None or (asked.assignment.id, asked.assignment.attempt) != (assignment, attempt):
        return None
    for name in (ACCEPTED, TRAINED, UPDATE):
        _remove(folder / name)
    place = _place(folder, asked.coordinator, asked.assignment)
    return Untrained(place, asked.assignment, asked.starts, asked.stood)


def _place(folder: Path, coordinator: str, of: Assignment) -> Place:
    return Place(folder, coordinator, of.job, of.kind, of.id, of.attempt, of.shard, of.round)


def _is_whole(held: Trained, size: int) -> bool:
    """Whether the update is there. One to be handed in is hashed as well; a kept one is not, unless it is wanted."""
    digest = held.submission.digest
    if digest is None:
        return held.place.kind == "evaluate"
    update = held.place.update
    if not _is_file(update) or update.stat().st_size != size:
        return False
    return isinstance(held, Kept) or file_digest(update) == digest


# ---------------------------------------------------------------- files


def _part(path: Path) -> Path:
    """Where `common.api` keeps a half-fetched file."""
    return path.with_name(path.name + ".part")


def _job_of(state: Path) -> str:
    """The job that a kept state is of."""
    return state.name.rsplit(".", 2)[0]


def _is_file(path: Path) -> bool:
    """Whether this is a plain file: neither a link that leads elsewhere, nor a pipe that would be read for ever."""
    return path.is_file() and not path.is_symlink()


def _parse(path: Path, kind: type[M]) -> M | None:
    """The message in a file; None: there is no such file, or none in it."""
    if not _is_file(path) or path.stat().st_size > JSON_LIMIT:
        return None
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError:
        return None


def _write(path: Path, message: Message) -> None:
    """Write a message so that a kill leaves the old content or the new."""
    part = _part(path)
    part.write_bytes(message.model_dump_json().encode())
    part.replace(path)


def _remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _files(place: Place, names: Iterable[str]) -> list[Path]:
    return [place.folder / name for name in names]


def _everything(place: Place) -> list[Path]:
    """Every file of an attempt that is to survive a power cut, and the folders with their names."""
    return [*_files(place, FILES), place.folder, place.folder.parent]


def _put_onto_disk(paths: Iterable[Path]) -> None:
    """Have files and folders survive a power cut, as far as they are there: an attempt may be dropped meanwhile.

    Raises:
        OSError: the disk did not take them.
    """
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Let what cannot be read or removed be; one bad file must not keep the worker from its work."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO:
            raise
        log.warning("%r in the spool is left alone: %s", path.name, error)
