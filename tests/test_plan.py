"""What the agent decides, by pure calls."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import errors
from common.errors import LydianError
from common.messages import Assignment, JobSpec, ModelRef, Range, TaskRef, Trust
from worker import plan

DIGEST = "a" * 64


def assignment(**keys: object) -> Assignment:
    fields = {
        "id": "j.train.3.1", "attempt": 2, "job": "j", "kind": "train", "round": 3, "shard": 1, "shards": 4,
        "samples": Range(start=0, stop=5), "task": TaskRef(name="digits"), "spec": JobSpec(task="digits"),
        "base": ModelRef(digest=DIGEST, size=9), "ttl_s": 40.0, "max_bytes": 10,
    }  # fmt: skip
    return Assignment.model_validate({**fields, **keys})


# ---------------------------------------------------------------- trust


@pytest.mark.parametrize(
    ("trust", "listed", "runs"),
    [
        ("none", (), False),
        ("none", (DIGEST,), False),
        ("listed", (), False),
        ("listed", (DIGEST,), True),
        ("any", (), True),
    ],
)
def test_a_users_task_runs_only_where_its_owner_allowed_it(trust: Trust, listed: tuple[str, ...], runs: bool) -> None:
    task = TaskRef(name="mine", digest=DIGEST)
    refused = plan.refusal(task, builtin={"digits"}, trust=trust, trusted=listed)
    assert (refused is None) == runs
    if refused is not None:
        assert refused.code == "not_trusted"
        assert "--trust listed --allow FILE" in refused.sentence


def test_a_users_task_named_like_a_built_in_one_is_still_a_users_task() -> None:
    task = TaskRef(name="digits", digest=DIGEST)
    assert plan.refusal(task, builtin={"digits"}, trust="none", trusted=()) is not None


def test_a_built_in_task_runs_and_one_of_a_newer_version_says_upgrade() -> None:
    assert plan.refusal(TaskRef(name="digits"), builtin={"digits"}, trust="none", trusted=()) is None
    refused = plan.refusal(TaskRef(name="newer"), builtin={"digits"}, trust="any", trusted=())
    assert refused is not None
    assert refused.code == "unknown_task"
    assert "upgrade it" in refused.sentence


# ---------------------------------------------------------------- what the child is asked


def test_the_jobs_config_wins_over_the_tasks_own_and_data_over_both() -> None:
    spec = JobSpec.model_validate({"task": "digits", "train": {"lr": 0.5}, "config": {"width": 8, "data": "x"}})
    config = plan.child_config(spec, {"width": 4, "depth": 2}, {"digits": "/d"})
    assert config["lr"] == 0.5
    assert (config["width"], config["depth"]) == (8, 2)
    assert config["data"] == {"digits": "/d"}
    assert "local_epochs" not in config


def test_data_under_another_name_is_found_by_the_task_under_its_own() -> None:
    spec = JobSpec.model_validate({"task": "mnist", "data": {"name": "ward-3"}})
    folders = plan.child_config(spec, {}, {"ward-3": "/w", "mnist": "/m"})["data"]
    assert folders == {"ward-3": "/w", "mnist": "/w"}
    assert plan.child_config(spec, {}, {"mnist": "/m"})["data"] == {"mnist": "/m"}


@pytest.mark.parametrize(
    ("train", "length"),
    [
        ({}, (1, None, None)),
        ({"local_epochs": 3}, (3, None, None)),
        ({"local_steps": 7}, (None, 7, None)),
        ({"local_seconds": 1.5}, (None, None, 1.5)),
    ],
)
def test_a_round_has_one_length(train: dict[str, object], length: tuple[object, ...]) -> None:
    spec = JobSpec.model_validate({"task": "digits", "train": train})
    command = plan.train_command(assignment(spec=spec), base="b", indices=None, out="o")
    assert (command["epochs"], command["steps"], command["seconds"]) == length


@given(st.integers(1, 99), st.integers(1, 99))
def test_the_seed_of_a_shard_does_not_depend_on_who_trains_it(first: int, second: int) -> None:
    seeds = {
        plan.train_command(assignment(attempt=n), base="b", indices=None, out="o")["seed"] for n in (first, second)
    }
    assert len(seeds) == 1


def test_the_seed_differs_between_rounds_shards_and_jobs() -> None:
    other = JobSpec(task="digits", seed=1)
    made = [assignment(), assignment(round=4), assignment(shard=2), assignment(spec=other)]
    seeds = {plan.train_command(a, base="b", indices=None, out="o")["seed"] for a in made}
    assert len(seeds) == 4
    assert plan.init_seed(other) != plan.init_seed(JobSpec(task="digits"))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "action"),
    [
        (errors.UnavailableError("x"), "wait"),
        (errors.DiskFullError("x"), "wait"),
        (errors.LydianError("x"), "wait"),
        (errors.UnauthenticatedError("x"), "stop"),
        (errors.ForbiddenError("x"), "stop"),
        (errors.VersionSkewError("x"), "stop"),
        (errors.SupersededError("x"), "drop"),
        (errors.JobOverError("x"), "drop"),
        (errors.LateError("x"), "drop"),
        (errors.NotFoundError("x"), "drop"),
        (errors.BadRequestError("x"), "drop"),
        (errors.ConflictError("x"), "drop"),
        (errors.BadUpdateError("x", code="not_finite"), "drop"),
        (errors.BadUpdateError("x", code="digest_mismatch"), "resend"),
        (errors.BadUpdateError("x", code="wrong_length"), "resend"),
        (errors.ConflictError("x", code="incomplete"), "resend"),
    ],
)
def test_every_error_has_one_consequence(error: LydianError, action: str) -> None:
    assert plan.after(error).action == action


def test_bytes_that_keep_arriving_damaged_are_given_up() -> None:
    error = errors.BadUpdateError("x", code="digest_mismatch")
    assert plan.after(error, resends=plan.RESENDS - 1).action == "resend"
    assert plan.after(error, resends=plan.RESENDS).action == "drop"


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_a_wait_is_never_longer_than_the_longest(failures: int, jitter: float) -> None:
    assert 0 <= plan.wait_s(failures, jitter) <= plan.LONGEST_WAIT_S
    assert plan.wait_s(failures, 0.999) <= plan.wait_s(failures + 1, 0.999)
