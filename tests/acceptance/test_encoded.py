"""Jobs whose updates and models travel encoded: fewer bytes, the same model on every machine, whatever dies."""

import itertools
from typing import Any

import numpy as np
import pytest

from common.codecs import CODECS
from common.weights import load
from tests.acceptance.kit import LocalFleet, closed_rounds, of_type, wait_for

pytestmark = pytest.mark.acceptance

ROUNDS = 4
JOB: dict[str, Any] = {
    "rounds": ROUNDS,
    "seed": 3,
    "data": {"shards": 2},
    "train": {"local_steps": 20, "batch_size": 16, "lr": 0.05, "momentum": 0.9},
    "round": {"min_workers": 2},
}


def run(fleet: LocalFleet, **aggregation: Any) -> str:
    return fleet.submit(**JOB, aggregation=aggregation)


def test_encoded_jobs_send_fewer_bytes_both_ways_and_learn(crew: LocalFleet) -> None:
    crew.workers["w2"].terminate()  # two may share the shards so that one has a model already, or needs it whole
    down, up, accuracy = {}, {}, {}
    for codec in ("fp32", *CODECS):
        job = crew.submit(**{**JOB, "round": {"min_workers": 1}}, aggregation={"update": codec})
        crew.finish(job)
        last = closed_rounds(crew.facts(job))[-1]
        down[codec], up[codec] = last["bytes_down"], last["bytes_up"]
        accuracy[codec] = crew.api.job(job).metrics["accuracy"]
        print(f"{codec}: {up[codec]} up, {down[codec]} down, accuracy {accuracy[codec]:.3f}")
    least = {"bf16": 1.9, "int8": 3.5, "int4": 6.0, "topk": 20.0}  # a small model: its header counts
    for codec, times in least.items():
        assert up[codec] * times <= up["fp32"]
        assert down[codec] * times <= down["fp32"]
        assert accuracy[codec] > (0.7 if codec == "topk" else 0.85)


def test_a_job_of_steps_survives_the_death_of_everybody_and_ends_with_the_same_bytes(crew: LocalFleet) -> None:
    crew.workers["w2"].terminate()  # what topk left unsent is on one worker's disk
    job_spec = {**JOB, "round": {"min_workers": 1}, "data": {"shards": 1}}
    for codec in ("int8", "topk"):
        aggregation = {"update": codec, "algorithm": "diloco", "outer_lr": 0.7}
        truth = crew.finish(crew.submit(**job_spec, aggregation=aggregation)).model
        job = crew.submit(**job_spec, aggregation=aggregation)
        crew.await_event(job, lambda e: e["type"] == "round" and e["round"] == 2, "two rounds")
        assert crew.coordinator is not None
        crew.coordinator.kill()
        crew.workers["w1"].kill()
        crew.start_coordinator()
        crew.start_worker("w1")
        assert crew.finish(job).model == truth
        rounds = closed_rounds(crew.facts(job))
        assert all(closed["step"] is not None for closed in rounds)
        for before, after in itertools.pairwise(rounds):
            assert after["step"]["base"] == before["digest"]
            assert after["step"]["model"] == after["digest"]


def test_whole_models_go_down_where_the_job_wants_that(crew: LocalFleet) -> None:
    job = run(crew, update="int8", download="fp32")
    crew.finish(job)
    rounds = closed_rounds(crew.facts(job))
    assert all(closed["step"] is None for closed in rounds)
    down = [closed["bytes_down"] for closed in rounds]  # an evaluation may have brought a worker the model before
    assert sum(down) > 0
    assert all(received % rounds[-1]["size"] == 0 for received in down)


def test_diloco_without_momentum_and_rate_one_is_fedavg(crew: LocalFleet) -> None:
    plain, outer = run(crew), run(crew, algorithm="diloco", outer_lr=1.0, outer_momentum=0.0)
    crew.finish(plain)
    crew.finish(outer)
    first, second = load(crew.pull(plain)), load(crew.pull(outer))
    assert all(np.allclose(first[name], second[name], atol=1e-5) for name in first)
    assert not list(of_type(crew.facts(outer), "handed_back"))


def test_auto_is_decided_once_by_the_link_of_the_first_model_and_is_the_same_job_for_its_key(crew: LocalFleet) -> None:
    job = run(crew, update="auto")
    view = crew.finish(job)
    (built,) = of_type(crew.facts(job), "initialised")
    assert built["update"] == "fp32"  # loopback
    assert view.spec.aggregation.update == "fp32"


def files_of(fleet: LocalFleet) -> set[str]:
    """The digests of all files that the coordinator keeps."""
    return {path.name for path in (fleet.state / "blobs").glob("*/*")}


def models_of(fleet: LocalFleet, job: str) -> set[str]:
    facts = fleet.facts(job)
    return {fact["digest"] for fact in [*closed_rounds(facts), *of_type(facts, "initialised")]}


def test_nothing_of_a_job_that_is_over_stays_but_its_models(crew: LocalFleet) -> None:
    aggregation = {"update": "int8", "algorithm": "diloco"}
    others = files_of(crew)
    done = run(crew, **aggregation)
    crew.finish(done)
    wait_for("steps, outer state and updates to be gone", lambda: files_of(crew) <= others | models_of(crew, done))
    cancelled = crew.submit(**{**JOB, "rounds": 1000}, aggregation=aggregation)
    crew.await_event(cancelled, lambda e: e["type"] == "accepted" and e["round"] == 3, "an update of round 3")
    crew.api.cancel(cancelled)
    models = others | models_of(crew, done) | models_of(crew, cancelled)
    wait_for("those of a cancelled job too", lambda: files_of(crew) <= models)
