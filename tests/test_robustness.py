"""Which robust jobs are taken, and in what words the others are refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from common.messages import JobSpec
from common.robustness import least_updates
from server.robust_rules import Rule, rule_of
from tests.rounds_kit import spec

AUTO = {"shards": "auto"}


def refused(sentence: str, **keys: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(**keys)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "clip_norm", "needs"),
    [("none", None, 1), ("clip", None, 5), ("clip", 1.0, 1), ("centered_clip", None, 5), ("trimmed", None, 5),
     ("median", None, 5), ("krum", None, 7), ("multikrum", None, 7), ("bulyan", None, 11), ("rfa", None, 5)],
)  # fmt: skip
def test_a_rule_needs_so_many_updates_against_two_bad_ones(rule: Any, clip_norm: float | None, needs: int) -> None:
    assert least_updates(rule, 2, clip_norm) == needs


def test_a_job_without_a_rule_is_as_it_was() -> None:
    job = spec()
    assert (job.aggregation.robust, job.aggregation.needs, rule_of(job.aggregation)) == ("none", 1, None)


def test_a_rule_comes_with_what_the_job_says_of_it() -> None:
    given = {"robust": "centered_clip", "faulty": 2, "clip_norm": 0.5}
    assert rule_of(spec(data=AUTO, aggregation=given).aggregation) == Rule("centered_clip", 2, 0.5)
    job = spec(data={"shards": 5}, aggregation={"robust": "krum"})
    assert rule_of(job.aggregation) == Rule("krum", 1, None)
    assert JobSpec.model_validate(job.model_dump()) == job


def test_fewer_workers_than_the_rule_needs_updates_are_refused() -> None:
    refused(
        "robust = krum with faulty = 1 needs 5 updates, and the job may start with round.min_workers = 4: "
        "raise round.min_workers, or lower aggregation.faulty",
        data=AUTO, aggregation={"robust": "krum"}, round={"min_workers": 4},
    )  # fmt: skip
    spec(data=AUTO, aggregation={"robust": "krum"}, round={"min_workers": 5})
    refused("needs 3 updates", data={"partition": "local"}, aggregation={"robust": "median"})


def test_fewer_shards_than_the_rule_needs_updates_are_refused() -> None:
    refused(
        "robust = bulyan with faulty = 2 needs 11 updates, and a round trains 10 of data.shards = 100: "
        "raise data.shards or data.fraction",
        data={"shards": 100, "fraction": 0.1}, aggregation={"robust": "bulyan", "faulty": 2},
    )  # fmt: skip


def test_a_quorum_below_what_the_rule_needs_is_refused() -> None:
    rule = {"robust": "trimmed", "faulty": 2}
    refused("round.quorum = 4 closes a round with fewer", data={"shards": 9}, aggregation=rule, round={"quorum": 4})
    refused(
        "round.quorum = 0.5 closes a round with 4 of 8", data={"shards": 8}, aggregation=rule, round={"quorum": 0.5}
    )
    spec(data={"shards": 9}, aggregation=rule, round={"quorum": 0.5})


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"faulty": 2}, "faulty = 2 says nothing without a robust rule"),
        ({"clip_norm": 2.0}, "clip_norm = 2 is for robust = clip or centered_clip, not none"),
        ({"robust": "krum", "clip_norm": 2.0}, "is for robust = clip or centered_clip, not krum"),
        (
            {"robust": "median", "update": "topk"},
            "robust = median compares whole changes, and update = topk sends a few",
        ),
        (
            {"robust": "median", "algorithm": "fednova"},
            "fednova weighs updates, and robust = median gives each one voice",
        ),
        ({"robust": "any"}, "Input should be 'none', 'clip'"),
        ({"norm_outlier": 1.0}, "greater than 1"),
        ({"norm_outlier": float("nan")}, "finite number"),
        ({"robust": "median", "faulty": 0}, "greater than or equal to 1"),
    ],
)
def test_keys_that_cannot_work_together_are_refused(keys: dict[str, Any], sentence: str) -> None:
    refused(sentence, data={"shards": 9}, aggregation=keys)


def test_rounds_that_mix_are_refused() -> None:
    keys = {"robust": "median", "update": "bf16"}
    refused("median judges the updates of one round, and late = use", data={"shards": 9}, aggregation=keys,
            round={"late": "use"})  # fmt: skip
    refused("clip judges the updates of one round", aggregation={"robust": "clip", "clip_norm": 1.0, "update": "bf16"},
            round={"late": "use"})  # fmt: skip


def test_a_clipped_mean_takes_sparse_updates_and_one_update_alone() -> None:
    spec(data={"shards": 3}, aggregation={"robust": "clip", "update": "topk"})
    spec(data={"shards": 1}, aggregation={"robust": "clip", "clip_norm": 1.0})
