"""A worker that sends what is a hundred times too long: refused, named, set aside, and the job comes to its end."""

import contextlib
import threading
from pathlib import Path

import numpy as np
import pytest

from common.errors import LateError
from common.messages import Abandon, Assignment
from common.weights import load
from tests.acceptance.kit import LocalFleet, closed_rounds, of_type, wait_for
from tests.acceptance.played import Arrays, Played

pytestmark = pytest.mark.acceptance

ROUNDS = 8  # three with the hostile worker, which is quick and so gets most of the samples, and some without it


def hundredfold(file: Path, turn: int) -> Arrays:
    """The model, moved far: whatever training says, this says it a hundred times as loud."""
    chance = np.random.default_rng(turn)
    return {
        name: (array + np.asarray(chance.normal(0, 10, array.shape), array.dtype)) if array.dtype.kind == "f" else array
        for name, array in load(file).items()
    }


class Hostile(threading.Thread):
    """Asks for work as any worker does, and spoils what it is given, until it is set aside."""

    def __init__(self, fleet: LocalFleet) -> None:
        super().__init__()
        self.worker, self.fleet = Played(fleet, "mallory"), fleet
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.is_set():
            answer = self.worker.ask(wait_s=0.5)
            if answer is not None and answer.assignment is not None:
                self.spoil(answer.assignment)

    def spoil(self, work: Assignment) -> None:
        if work.kind != "train" or work.base is None or work.samples is None:
            sentence = "only training can be spoilt"
            self.worker.api.abandon(work.id, Abandon(attempt=work.attempt, code="released", sentence=sentence))
            wait_for("another to do it", lambda: self.fleet.api.job(work.job).state != "initialising")
            return
        model = self.fleet.folder / f"base.{work.id}"
        self.worker.api.download_model(work.base.digest, model)
        samples = work.samples.stop - work.samples.start
        with contextlib.suppress(LateError):
            self.worker.hand_in(work, hundredfold(model, work.round), samples=samples)

    def __enter__(self) -> "Hostile":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.join()
        self.worker.api.close()


def test_a_hostile_worker_is_refused_named_and_set_aside_and_the_job_ends_well(crew: LocalFleet) -> None:
    with Hostile(crew) as mallory:
        wait_for("the hostile worker to poll", lambda: any(each.name == "mallory" for each in crew.api.workers()))
        job = crew.submit(
            rounds=ROUNDS,
            round={"min_workers": 3, "evaluate_every": 0},
            data={"shards": "auto"},
            aggregation={"norm_outlier": 10},
        )
        view = crew.finish(job)
        facts = crew.facts(job)
    # Where the first model was to be made by it, it gave that back of its own accord: no refusal.
    refused = [fact for fact in of_type(facts, "handed_back") if fact["code"] != "released"]
    assert {(fact["code"], fact["worker_name"]) for fact in refused} == {("norm_outlier", "mallory")}
    assert len(refused) == 3
    named = [one for fact in closed_rounds(facts) for one in fact["absent"] if one["worker_name"] == "mallory"]
    assert len(named) == 3
    assert all(one["why"].startswith("refused: its change has the norm ") for one in named)
    aside = next(worker for worker in crew.api.workers() if worker.id == mallory.worker.id)
    assert aside.state == "set aside"
    assert "3 results were refused, the last: the update was refused when the round closed" in aside.reason
    assert view.metrics["accuracy"] > 0.5
