"""A worker played by the test, call by call, against a real coordinator."""

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from common.api import CoordinatorApi
from common.errors import LydianError
from common.messages import (
    Assignment,
    Holding,
    ModelFacts,
    PollAnswer,
    PollRequest,
    Receipt,
    Registration,
    Submission,
)
from common.weights import Notes, save
from tests.acceptance.kit import LocalFleet, wait_for
from tests.rounds_kit import registration

Arrays = dict[str, np.ndarray]

MODEL: Arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, dtype=np.float32)}


class Played:
    """A worker by hand: registers, polls, uploads what the test wants."""

    def __init__(self, fleet: LocalFleet, name: str, token: str | None = None, **fields: object) -> None:
        """Join as a new worker; or, with the token of one, come as it once more."""
        self.fleet, self.folder = fleet, fleet.folder
        self.api = CoordinatorApi(fleet.url, token or (fleet.state / "join.token").read_text().strip())
        given = {**registration(name).model_dump(), "trust": "any", **fields}
        self.registration = Registration.model_validate(given)
        try:
            welcome = self.api.register(self.registration)
        except LydianError:
            self.api.close()
            raise
        assert (welcome.credential is None) == (token is not None)
        self.id, self.token = welcome.worker_id, welcome.credential or token
        assert self.token is not None
        self.api.use_token(self.token)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.api.close()

    @property
    def start_id(self) -> str:
        return self.registration.start_id

    def ask(self, wait_s: float = 25.0, **fields: object) -> PollAnswer | None:
        """One poll; asked to load a job, which a played worker has no use for, it polls again."""
        request = {"start_id": self.start_id, "claim_key": os.urandom(4).hex(), "wait_s": wait_s, **fields}
        answer = self.api.poll(self.id, PollRequest.model_validate(request))
        if answer is not None and answer.prepare is not None and not (answer.forget or answer.settled):
            return self.ask(wait_s, **fields)
        return answer

    def poll(self, **fields: object) -> Assignment:
        """Polls until one is answered, which must bring work."""
        answer = wait_for("work", lambda: self.ask(**fields))
        assert answer.assignment is not None
        return answer.assignment

    def file(self, work: Assignment, arrays: Arrays) -> Path:
        file = self.folder / f"{work.id}.{os.urandom(4).hex()}"
        save(file, arrays, Notes())
        return file

    def hand_in(self, work: Assignment, arrays: Arrays, *, digest: str | None = None, **fields: object) -> Receipt:
        file = self.file(work, arrays)
        self.api.upload(work.id, work.attempt, file)
        given = {"attempt": work.attempt, "digest": digest or sha(file), "samples": 5, "seconds": 0.1, **fields}
        return self.api.submit(work.id, Submission.model_validate(given))

    def init(self, **fields: object) -> Assignment:
        work = self.poll()
        assert work.kind == "init"
        facts = ModelFacts(parameters=8, train_samples=10, test_samples=0, bounds=(0, 5, 10))
        self.hand_in(work, MODEL, **{"facts": facts, **fields})
        return work

    def holding(self, work: Assignment, arrays: Arrays | None) -> Holding:
        """What a worker says of an update that it keeps; without arrays, of one that it has not trained to the end."""
        digest = None if arrays is None else sha(self.file(work, arrays))
        return Holding(assignment=work.id, attempt=work.attempt, digest=digest)


def update(number: float) -> Arrays:
    """An update that differs from the model by a number."""
    return {name: array + np.float32(number) for name, array in MODEL.items()}


def sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
