"""What `lydian plan` reads out of a job's events, and what it prints of a forecast."""

from typing import Any

import pytest

from client.job_file import Job
from client.planning import Measured, Plan, PlanRow, _plan, kept_words, plan_of, show
from common.errors import LydianError
from common.forecast import Box, Row, Work
from common.messages import JobSpec

SPEC = JobSpec.model_validate({"task": "digits", "train": {"local_epochs": 2, "batch_size": 10}})
FACTS = {"parameters": 5, "train_samples": 100, "test_samples": 4, "bounds": (0, 100)}


def accepted(round_index: int, worker: str, seconds: float, took_s: float | None, **fields: Any) -> dict[str, Any]:
    given = {"round": round_index, "shard": 0, "attempt": 1, "worker": f"{worker}-1", "worker_name": worker,
             "digest": "0" * 64, "samples": 50, "steps": 10, "seconds": seconds, "metrics": {}, "bytes_down": 1,
             "bytes_up": 1, "took_s": took_s}  # fmt: skip
    return {"type": "accepted", "id": 1, "at": "now", **given, **fields}


def closed(round_index: int, seconds: float) -> dict[str, Any]:
    return {"type": "round", "id": 2, "at": "now", "round": round_index, "seconds": seconds, "workers": 2, "shards": 2,
            "samples": 100, "bytes_down": 2, "bytes_up": 2, "digest": "1" * 64, "size": 40}  # fmt: skip


MADE = {"type": "initialised", "id": 0, "at": "now", "attempt": 1, "worker": "a-1", "digest": "2" * 64, "size": 40,
        "facts": FACTS}  # fmt: skip


def test_speeds_are_samples_of_every_pass_a_second_and_the_first_round_is_left_out() -> None:
    events = [MADE, accepted(1, "a", 50.0, 60.0), closed(1, 60.0), accepted(2, "a", 1.0, 3.0),
              accepted(2, "b", 4.0, 5.0), closed(2, 6.0), {"type": "evaluation", "round": 2}]  # fmt: skip
    found = Measured.of("j", SPEC, events)
    assert found is not None
    assert found.rates == {"a": 100.0, "b": 25.0}
    assert found.busy_s == {"a": 3.0, "b": 5.0}
    assert (found.round_s, found.samples, found.model_bytes) == (6.0, 100, 40)


def test_of_several_shards_a_round_takes_their_sum() -> None:
    events = [MADE, accepted(2, "a", 1.0, 3.0), accepted(2, "a", 1.0, 4.0, shard=1), closed(2, 8.0)]
    found = Measured.of("j", SPEC, events)
    assert found is not None
    assert found.busy_s == {"a": 7.0}


def test_a_single_round_is_all_there_is_to_go_by() -> None:
    found = Measured.of("j", SPEC, [MADE, accepted(1, "a", 1.0, None), closed(1, 2.0)])
    assert found is not None
    assert (found.rates, found.busy_s, found.round_s) == ({"a": 100.0}, {}, 2.0)


@pytest.mark.parametrize("events", [[], [MADE], [closed(1, 1.0)]])
def test_a_job_without_a_model_or_a_round_tells_nothing(events: list[dict[str, Any]]) -> None:
    assert Measured.of("j", SPEC, events) is None


def test_by_steps_a_speed_is_of_the_steps_and_a_training_of_no_time_has_none() -> None:
    spec = JobSpec.model_validate({"task": "digits", "train": {"local_steps": 10, "batch_size": 10}})
    found = Measured.of("j", spec, [MADE, accepted(1, "a", 2.0, 3.0), accepted(1, "b", 0.0, 1.0), closed(1, 3.0)])
    assert found is not None
    assert found.rates == {"a": 50.0}


ROW = PlanRow(worker="a", role="trains", share=1.0, samples=100, down_s=1.0, train_s=2.0, up_s=1.0, wait_s=0.0,
              bytes_down=1_000_000, bytes_up=500_000)  # fmt: skip
PLAN = Plan(round_s=4.0, measured_by="j-1", workers=(ROW,), blame="a is waited for", advice=("do this",), unknown=())


def test_a_plan_is_a_table_and_then_what_follows_from_it(capsys: pytest.CaptureFixture[str]) -> None:
    show(PLAN.model_copy(update={"workers": (ROW, ROW.model_copy(update={"worker": "b", "role": "evaluates"}))}), 10)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[1].split() == ["a", "trains", "100.0%", "100", "1.00", "s", "2.00", "s", "1.00", "s", "0.00", "s",
                                "1.5", "MB"]  # fmt: skip
    assert lines[2].split()[:3] == ["b", "evaluates", "-"]
    assert lines[3] == "a round takes 4.00 s; 10 rounds 40.0 s, averaging and evaluation left out"
    assert lines[4:] == ["a is waited for", "do this"]
    assert "measured by j-1" in err


@pytest.mark.parametrize(("keep", "wanted"), [(0, ()), (2, ("32.0 MB", "2 rounds")), ("all", ("48.0 MB", "3 rounds"))])
def test_a_plan_says_what_kept_updates_take_on_the_disk(keep: Any, wanted: tuple[str, ...]) -> None:
    spec = JobSpec.model_validate({"task": "digits", "rounds": 3, "round": {"keep_updates": keep}})
    rows = [Row("a", "trains", bytes_up=6_000_000), Row("b", "trains", bytes_up=6_000_000)]
    said = kept_words(spec, rows, Work(samples=1, model_bytes=4_000_000, batch_size=1))
    assert len(said) == bool(wanted)
    assert all(word in said[0] for word in wanted)


def test_shards_that_are_drawn_one_by_one_are_foretold_by_their_mean() -> None:
    base, boxes = Measured("j-1", {"a": 10.0}, {}, 0.0, 100, 40), [Box("a", rate=10.0, down=1e6, up=1e6)]
    drawn = {"level": "worker", "sample": 0.25, "noise": 1.0, "delta": 1e-5, "clip": 1.0}
    keys = {"task": "digits", "data": {"shards": 20}}
    some, all_of_them = JobSpec.model_validate({**keys, "privacy": drawn}), JobSpec.model_validate(keys)
    assert [row.samples for row in _plan(base, boxes, some).workers] == [25]
    assert [row.samples for row in _plan(base, boxes, all_of_them).workers] == [100]


def test_truth_stands_beside_the_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    show(PLAN.model_copy(update={"true_round_s": 5.0, "workers": (ROW.model_copy(update={"true_s": 6.0}),)}), 1)
    out = capsys.readouterr().out
    assert [line.split()[-1] for line in out.splitlines()[-2:]] == ["1.50", "1.25"]


def test_asynchronous_rounds_are_not_foretold() -> None:
    spec = SPEC.model_copy(update={"round": SPEC.round.model_copy(update={"mode": "async"})})
    nobody: Any = None
    with pytest.raises(LydianError, match="there is none to foretell"):
        plan_of(nobody, Job(spec, None), like=None, measure=True)
