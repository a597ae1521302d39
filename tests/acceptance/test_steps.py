"""Server steps in real jobs: their state outlives a killed coordinator, and equal steps make fednova fedavg."""

from typing import Any

import pytest

from common.errors import BadJobError
from tests.acceptance.kit import LocalFleet, closed_rounds, of_type

pytestmark = pytest.mark.acceptance

JOB: dict[str, Any] = {
    "rounds": 4,
    "seed": 3,
    "data": {"shards": 2},
    "train": {"local_steps": 8, "batch_size": 16, "lr": 0.05, "momentum": 0.9},
    "round": {"min_workers": 1, "evaluate_every": 0},
}


def test_state_outlives_a_killed_coordinator_and_fednova_of_equal_steps_is_fedavg(crew: LocalFleet) -> None:
    def run(**aggregation: Any) -> str:
        return crew.submit(**JOB, aggregation=aggregation)

    same = [crew.finish(run(algorithm=name)).model for name in ("fedavg", "fednova")]
    assert same[0] == same[1]

    yogi = {"algorithm": "fedyogi", "update": "int8", "outer_tau": 0.01}
    first = run(**yogi)
    truth = crew.finish(first).model
    job = run(**yogi)
    crew.await_event(job, lambda e: e["type"] == "round" and e["round"] == 2, "two rounds")
    assert crew.coordinator is not None
    crew.coordinator.kill()
    crew.start_coordinator()
    assert crew.finish(job).model == truth
    told = [[closed["amplification"] for closed in closed_rounds(crew.facts(one))] for one in (first, job)]
    assert told[0] == told[1]
    assert all(number > 0 for number in told[0])

    few = run(algorithm="diloco")
    crew.finish(few)
    began = next(fact for fact in of_type(crew.facts(few), "job") if fact["state"] == "initialising")
    assert "caution: diloco with outer_momentum = 0.9" in began["reason"]
    assert f"{few}: diloco with outer_momentum = 0.9 is meant for 50 local steps" in crew.coordinator.said()

    with pytest.raises(BadJobError, match=r"char-lm has optimizer\(\) of its own, and fednova"):
        crew.submit(task="char-lm", aggregation={"algorithm": "fednova"})
