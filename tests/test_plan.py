"""What the agent decides, by pure calls."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import errors
from common.errors import LydianError
from common.guarding import REFUSALS
from common.messages import (
    AggregationSection,
    Assignment,
    HeartbeatAnswer,
    Holding,
    JobSpec,
    Kind,
    ModelRef,
    PollRequest,
    Range,
    Registration,
    TaskRef,
    TrainSection,
    Trust,
    VersionView,
)
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


def test_a_script_is_told_which_shard_it_has_and_the_seed_that_a_task_would_have_and_no_length() -> None:
    work, paths = assignment(spec=JobSpec(task="train", script=True)), {"base": "b", "indices": "i", "out": "o"}
    seed = plan.train_command(assignment(), **paths)["seed"]
    about = {"round": 3, "shard": 1, "shards": 4, "seed": seed}
    assert plan.script_command(work, **paths) == {"do": "train", **paths, **about}


@pytest.mark.parametrize("every_s", [0.0, 30.0])
def test_a_checkpoint_is_asked_for_unless_there_is_to_be_none(every_s: float) -> None:
    command = plan.train_command(
        assignment(), base="b", indices=None, out="o", checkpoint="c", checkpoint_every_s=every_s
    )
    asked = {name: command.get(name) for name in ("checkpoint", "checkpoint_every_s", "base_digest")}
    if every_s:
        assert asked == {"checkpoint": "c", "checkpoint_every_s": 30.0, "base_digest": DIGEST}
    else:
        assert not asked.keys() & command.keys()


def test_an_optimisers_state_is_asked_for_where_the_job_keeps_it_and_needs_room() -> None:
    kept = assignment(optimizer_of=2, spec=JobSpec(task="digits", train=TrainSection(keep_optimizer=True)))
    given = {"base": "b", "indices": "i", "out": "o", "optimizer": "after", "optimizer_from": "before"}
    command = plan.train_command(kept, **given)
    assert [command[k] for k in ("optimizer", "optimizer_from", "optimizer_of")] == ["after", "before", 2]
    assert not {"optimizer", "optimizer_of"} & plan.train_command(assignment(), **given).keys()
    assert plan.room_needed(kept, fetched=9) == 27


def test_personal_tensors_are_asked_for_where_the_job_has_some() -> None:
    train = TrainSection(personal=("head.*",), proximal=0.1)
    given = {"base": "b", "indices": "i", "out": "o", "personal": "after", "personal_from": "before"}
    command = plan.train_command(assignment(optimizer_of=2, spec=JobSpec(task="digits", train=train)), **given)
    assert [command[name] for name in ("personal", "personal_from", "personal_of")] == ["after", "before", 2]
    assert "optimizer" not in command
    assert not {"personal", "personal_of"} & plan.train_command(assignment(), **given).keys()


def test_what_no_task_has_to_know_of_is_told_beside_its_configuration() -> None:
    train = TrainSection(personal=("head.*",), proximal=0.1, frozen=("a.*",))
    spec = JobSpec(task="digits", train=train, config={"frozen": True})
    assert plan.client_terms(spec) == {
        "proximal": 0.1, "frozen": ["a.*"], "personal": ["head.*"], "seed": plan.init_seed(spec),
    }  # fmt: skip
    assert plan.child_config(spec, {}, {})["frozen"] is True  # a key of the task's own
    assert not {"personal", "proximal"} & plan.child_config(spec, {}, {}).keys()
    assert plan.client_terms(JobSpec(task="digits")) == {}
    assert "seed" not in plan.client_terms(JobSpec(task="digits", train=TrainSection(proximal=1.0)))


def test_an_encoded_update_needs_room_beside_what_it_is_made_of() -> None:
    encoded = assignment(spec=JobSpec(task="digits", aggregation=AggregationSection(update="topk")))
    assert plan.room_needed(encoded, fetched=9) == 9 + 4 + 9


def test_the_steps_of_the_whole_job_are_known_where_a_round_has_steps() -> None:
    counted = assignment(spec=JobSpec(task="digits", rounds=6, train=TrainSection(local_steps=50)))
    assert plan.train_command(counted, base="b", indices="i", out="o")["total_steps"] == 300
    assert plan.train_command(assignment(), base="b", indices="i", out="o")["total_steps"] is None


def test_a_schedule_of_epochs_counts_the_steps_of_the_largest_shard_for_all() -> None:
    spec = JobSpec.model_validate(
        {"task": "d", "rounds": 9, "train": {"schedule": "linear", "local_epochs": 2}, "data": {"shards": 4}}
    )
    command = plan.train_command(assignment(spec=spec, train_samples=17), base="b", indices="i", out="o")
    assert (command["job_rounds"], command["largest_shard"]) == (9, 5)
    steady = plan.train_command(assignment(), base="b", indices="i", out="o")
    assert "largest_shard" not in steady


def test_ids_are_cut_into_as_many_shards_as_there_are_unless_the_job_says_how_many() -> None:
    by_id = {"task": "d", "data": {"partition": "natural", "by": "users"}}
    assert plan.shards_to_cut(assignment(spec=JobSpec.model_validate(by_id))) is None
    by_id["data"] = {**by_id["data"], "shards": 4}  # type: ignore[dict-item]
    assert plan.shards_to_cut(assignment(spec=JobSpec.model_validate(by_id))) == 4
    assert plan.shards_to_cut(assignment()) == 4


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({}, {}),
        ({"evaluation": {"per_class": True}}, {"per_class": True}),
        ({"evaluation": {"scope": "workers"}}, {"splits": ["local-test"]}),
        (
            {"evaluation": {"scope": "workers"}, "data": {"partition": "local"}},
            {"splits": ["local-test", "test"]},
        ),
    ],
)
def test_where_all_data_is_a_workers_own_its_test_split_is_too(
    sections: dict[str, object], wanted: dict[str, object]
) -> None:
    assert plan.measuring(JobSpec.model_validate({"task": "d", **sections})) == wanted


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
        *((errors.UnavailableError("x", code=code), "wait") for code in REFUSALS),
        (errors.DiskFullError("x"), "wait"),
        (errors.TooSlowError("x"), "wait"),
        (errors.LydianError("x"), "wait"),
        (errors.UnauthenticatedError("x"), "stop"),
        (errors.ForbiddenError("x"), "stop"),
        (errors.VersionSkewError("x"), "stop"),
        (errors.SupersededError("x"), "drop"),
        (errors.JobOverError("x"), "drop"),
        (errors.LateError("x"), "drop"),
        (errors.NotFoundError("x"), "drop"),
        (errors.BadRequestError("x"), "resend"),
        (errors.UnavailableError("x", code="unreadable"), "resend"),
        (errors.ConflictError("x"), "drop"),
        (errors.BadUpdateError("x", code="not_finite"), "drop"),
        (errors.BadUpdateError("x", code="digest_mismatch"), "resend"),
        (errors.BadUpdateError("x", code="wrong_length"), "resend"),
        (errors.ConflictError("x", code="incomplete"), "resend"),
    ],
)
def test_every_error_has_one_consequence(error: LydianError, action: str) -> None:
    assert plan.after(error).action == action


def test_a_certificate_that_is_another_in_the_middle_of_work_is_said_with_what_to_do() -> None:
    error = errors.UnavailableError("it is another", code="wrong_certificate", advice="Paste the line.")
    assert plan.after(error) == plan.Next("wait", "it is another. Paste the line.")


@pytest.mark.parametrize(
    "error",
    [
        errors.BadUpdateError("x", code="digest_mismatch"),
        errors.BadRequestError("x"),
        errors.UnavailableError("x", code="unreadable"),
    ],
)
def test_what_keeps_arriving_damaged_is_given_up(error: LydianError) -> None:
    assert plan.after(error, resends=plan.RESENDS - 1).action == "resend"
    assert plan.after(error, resends=plan.RESENDS).action == "drop"


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_a_wait_is_never_longer_than_the_longest(failures: int, jitter: float) -> None:
    assert 0 <= plan.wait_s(failures, jitter) <= plan.LONGEST_WAIT_S
    assert plan.wait_s(failures, 0.999) <= plan.wait_s(failures + 1, 0.999)


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True), st.floats(0.1, 100))
def test_a_coordinator_that_is_back_is_tried_several_times_within_a_lease(
    failures: int, jitter: float, ttl_s: float
) -> None:
    assert plan.wait_s(failures, jitter, ttl_s=ttl_s) <= ttl_s / 4


@pytest.mark.parametrize(
    ("error", "rival"),
    [
        (errors.SupersededError("x"), True),
        (errors.ConflictError("x", code="already_working"), True),
        (errors.ConflictError("x"), False),
        (errors.JobOverError("x"), False),
        (errors.UnauthenticatedError("x"), False),
    ],
)
def test_only_another_process_with_the_same_credential_is_a_rival(error: LydianError, rival: bool) -> None:
    assert plan.is_rival(error) == rival


@pytest.mark.parametrize(
    ("error", "doubts"),
    [
        (errors.BadUpdateError("x", code="digest_mismatch"), True),
        (errors.LydianError("it became shorter while it was sent"), True),
        (errors.UnavailableError("x"), False),
        (errors.ConflictError("x", code="incomplete"), False),
    ],
)
def test_bytes_are_hashed_again_only_where_the_failure_may_be_theirs(error: LydianError, doubts: bool) -> None:
    assert plan.doubts_bytes(error) == doubts


# ---------------------------------------------------------------- versions


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_coordinator_is_refused_only_if_it_is_older(theirs: int, ours: int) -> None:
    refusal = plan.version_refusal(VersionView(version="1.2", protocol=theirs), protocol=ours, version="2.0")
    assert (refusal is not None) == (theirs < ours)
    if refusal is not None:
        assert refusal.advice == "Upgrade the coordinator, or install version 1.2 here."
        assert f"speaks protocol {theirs}" in str(refusal)


# ---------------------------------------------------------------- what the spool holds


@pytest.mark.parametrize(("kind", "stays"), [("train", True), ("init", False), ("evaluate", False)])
def test_only_what_the_coordinator_may_lose_is_kept_after_the_receipt(kind: Kind, stays: bool) -> None:
    assert plan.stays(kind) == stays


@pytest.mark.parametrize(
    ("order", "starts", "action"),
    [
        ("continue", 0, "go on"),
        ("continue", 1, "go on"),
        ("drain", 1, "go on"),
        ("continue", 2, "give back"),
        ("drain", 7, "give back"),
        ("pause", 1, "leave"),
        ("pause", 2, "leave"),
        ("superseded", 1, "drop"),
        ("cancelled", 2, "drop"),
    ],
)
def test_unfinished_work_goes_on_if_it_is_wanted_and_did_not_take_the_agent_with_it(
    order: str, starts: int, action: str
) -> None:
    answer = HeartbeatAnswer.model_validate({"order": order, "reason": "why"})
    then = plan.resumption(answer, starts)
    assert then.action == action
    if action == "give back":
        assert f"ended {starts} times" in then.why


HELD = st.builds(
    Holding, assignment=st.from_regex(r"[a-z]{1,5}", fullmatch=True), attempt=st.integers(1, 9),
    digest=st.sampled_from([None, DIGEST]),
)  # fmt: skip


@given(st.lists(HELD, max_size=150), st.lists(HELD, max_size=150))
def test_what_is_told_always_fits_into_a_message_and_begins_with_what_is_unsent(
    unsent: list[Holding], kept: list[Holding]
) -> None:
    told = plan.told(unsent, kept)
    assert told == tuple(unsent + kept)[: len(told)]
    assert len(told) == min(len(unsent) + len(kept), plan.HOLDINGS)
    assert PollRequest(start_id="s", claim_key="c", holding=told).holding == told
    limits = [part.max_length for part in Registration.model_fields["holding"].metadata if hasattr(part, "max_length")]
    assert limits == [plan.HOLDINGS]


# ---------------------------------------------------------------- the disk


@pytest.mark.parametrize(
    ("number", "verdict"),
    [
        (errno.ENOSPC, "full"), (errno.EDQUOT, "full"), (errno.EROFS, "closed"), (errno.EACCES, "closed"),
        (errno.EPERM, "closed"), (errno.EIO, "broken"), (errno.ENOENT, "other"), (None, "other"),
    ],
)  # fmt: skip
def test_the_disk_is_told_from_everything_else(number: int | None, verdict: str) -> None:
    assert plan.disk_verdict(number) == verdict


@pytest.mark.parametrize(
    ("sentence", "number"),
    [
        ("OSError in the training process: [Errno 28] No space left on device: '/x'", errno.ENOSPC),
        ("SafetensorError: I/O error: Read-only file system (os error 30)", errno.EROFS),
        ("KeyError: 28", None),
        ("[Errno] os error 5", None),
    ],
)
def test_the_systems_error_is_found_in_the_childs_words(sentence: str, number: int | None) -> None:
    assert plan.errno_in(sentence) == number


@given(st.integers(0, 1000), st.integers(0, 2000), st.sampled_from(["train", "evaluate"]))
def test_the_room_for_work_is_what_is_left_to_fetch_and_what_comes_out(size: int, fetched: int, kind: str) -> None:
    needed = plan.room_needed(assignment(kind=kind, base=ModelRef(digest=DIGEST, size=size)), fetched=fetched)
    assert needed - max(size - fetched, 0) == (size if kind == "train" else 0)


def test_the_room_for_a_first_model_is_not_known() -> None:
    assert plan.room_needed(assignment(kind="init", base=None), fetched=0) == 0
