"""Jobs that cannot be summed securely are refused when they are submitted, each in a sentence."""

from typing import Any

import pytest
from pydantic import ValidationError

from client.job_keys import job_keys
from common.messages import NEW_SECTIONS, JobSpec


def job(**keys: Any) -> JobSpec:
    fields = {"secure": {"enabled": True}, "round": {"min_workers": 3}}
    return JobSpec.model_validate({"task": "digits", **fields, **keys})


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"aggregation": {"algorithm": "diloco"}},
        {"aggregation": {"algorithm": "fedadam"}},
        {"data": {"partition": "local"}},
        {"train": {"local_steps": 3}},
    ],
)
def test_a_job_that_needs_only_the_mean_is_taken(keys: dict[str, Any]) -> None:
    assert job(**keys).secure.enabled


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"aggregation": {"update": "int8"}}, "aggregation.update = int8 is no whole number that can be masked"),
        ({"aggregation": {"update": "auto"}}, "aggregation.update = auto is no whole number"),
        ({"aggregation": {"algorithm": "fednova"}}, "aggregation.algorithm = fednova weighs each update by itself"),
        ({"aggregation": {"norm_bound": 1.0}}, "aggregation.norm_bound measures each update"),
        ({"aggregation": {"update": "bf16"}, "round": {"min_workers": 3, "late": "use"}}, "round.late = use adds"),
        ({"round": {"min_workers": 3, "quorum": 0.5}}, "round.quorum = 0.5 closes a round"),
        ({"round": {"min_workers": 3, "deadline": 60.0}}, "round.deadline in seconds ends a round"),
        ({"round": {"min_workers": 2}}, "round.min_workers = 2: a sum of fewer than 3 updates hides none"),
        ({"data": {"shards": 8}}, "data.shards = 8 gives one worker several updates of a sum"),
        ({"data": {"fraction": 0.5}}, "data.fraction = 0.5 may draw fewer than 3 workers"),
        ({"train": {"local_seconds": 5.0}}, "train.local_seconds weighs an update by what was done"),
    ],
)
def test_a_job_that_would_have_to_see_an_update_is_refused_in_a_sentence(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        job(**keys)
    assert "secure.enabled cannot work with this job" in str(refused.value)
    assert said in str(refused.value)
    JobSpec.model_validate({"task": "digits", **keys})  # without masks it is a job like any other


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValidationError) as refused:
        job(data={"shards": 8}, round={"min_workers": 1})
    assert "data.shards = 8" in str(refused.value)
    assert "round.min_workers = 1" in str(refused.value)


@pytest.mark.parametrize("threshold", [0.5, 0.3, 1.1])
def test_a_threshold_of_half_the_workers_or_less_is_refused(threshold: float) -> None:
    with pytest.raises(ValidationError, match="threshold"):
        job(secure={"enabled": True, "threshold": threshold})


def test_a_worker_of_protocol_1_cannot_do_it_and_is_not_told_of_it() -> None:
    assert job().beyond_protocol_1 == "secure.enabled"
    assert JobSpec(task="digits").beyond_protocol_1 == ""
    assert "secure" in NEW_SECTIONS


def test_its_flags_name_their_section() -> None:
    flags = {key.flag for path, key in job_keys().items() if path[0] == "secure"}
    assert flags == {"--secure-enabled", "--secure-threshold", "--secure-clip", "--secure-bits"}
