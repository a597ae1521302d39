"""Who is alive, who holds what, who gets which work: pure calls with a clock of our own."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import NEW_IN_TRAIN, Assignment, PollAnswer, Progress, TaskRef, TaskSignature, TrainSection
from server import fleet as fleets
from server import rounds
from server.fleet import Fleet, Lease, Timing, standing
from server.rounds import Job, Task
from server.views import poll_answer
from tests.rounds_kit import Play, digest, registration, spec, training

TASK = Task("train", 1, 0)


def fleet(*names: str, **keys: Any) -> Fleet:
    made = Fleet(Timing(ttl_s=40.0))
    for name in names:
        made.register(name, registration(name, **keys), now=0.0)
    return made


def running(job_id: str, **keys: Any) -> Job:
    return rounds.replace(training(**keys).job, id=job_id)


def queued(job_id: str = "q", **keys: Any) -> Job:
    return rounds.replace(Play(spec(**keys)).job, id=job_id)


# ---------------------------------------------------------------- who is there


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"optimizer": "adamw"},
        {"clip": 1.0},
        {"keep_optimizer": True},
        {"precision": "auto"},
        {"proximal": 0.1},
        {"frozen": ["a.*"]},
        {"personal": "batchnorm"},
        {"trainable_only": True},
    ],
)
def test_a_worker_of_protocol_1_is_given_no_job_that_it_would_train_in_another_way(train: dict[str, Any]) -> None:
    some = fleet("old", protocol=1)
    why = fleets.why_not(some.workers["old"], running("j", train=train))
    assert (
        why is None
        if not train
        else why == f"old speaks protocol 1, which has no train.{next(iter(train))}: " + ("upgrade it")
    )
    assert set(NEW_IN_TRAIN) <= TrainSection.model_fields.keys()


@pytest.mark.parametrize(
    ("section", "given"),
    [
        ("aggregation", {"update": "int8"}),
        ("aggregation", {"update": "auto"}),
        ("aggregation", {"algorithm": "diloco"}),
        ("train", {"batch_size": "auto"}),
        ("data", {"partition": "quantity", "shards": 2}),
        ("data", {"partition": "natural", "by": "users"}),
        ("evaluation", {"scope": "workers"}),
    ],
)
def test_a_worker_of_protocol_1_is_given_no_job_that_it_could_not_read(section: str, given: dict[str, str]) -> None:
    some, job = fleet("old", protocol=1), running("j", **{section: given})
    key, value = next(iter(given.items()))
    missing = f"old speaks protocol 1, which has no {section}.{key} = {value}: upgrade it"
    assert fleets.why_not(some.workers["old"], job) == missing
    assert fleets.why_not(fleet("new").workers["new"], job) is None


def test_a_worker_of_protocol_1_is_told_nothing_that_it_would_refuse_as_unknown() -> None:
    job = spec(evaluation={"patience": 3})  # what the coordinator alone looks at is no reason to leave a worker out
    work = Assignment(id="j.init.0.0", attempt=1, job="j", kind="init", round=0, shards=1, task=TaskRef(name="digits"),
                      spec=job, ttl_s=1, max_bytes=1)  # fmt: skip
    told = json.loads(poll_answer(PollAnswer(assignment=work), 1))["assignment"]["spec"]
    assert "evaluation" not in told
    assert not {"by"} & told["data"].keys()
    assert not set(NEW_IN_TRAIN) & told["train"].keys()
    assert fleets.why_not(fleet("old", protocol=1).workers["old"], running("j", evaluation={"patience": 3})) is None
    newest = json.loads(poll_answer(PollAnswer(assignment=work), 2))["assignment"]["spec"]
    assert newest["evaluation"]["patience"] == 3


def test_a_worker_is_live_for_one_lease_time_after_its_last_call() -> None:
    some = fleet("a")
    assert some.live(40.0) == ["a"]
    assert some.live(40.1) == []


def test_a_waiting_poll_keeps_a_worker_live() -> None:
    some = fleet("a")
    some.workers["a"].polling = 1
    assert some.live(1e9) == ["a"]


def test_a_worker_that_said_goodbye_is_gone_until_it_calls_again() -> None:
    some = fleet("a")
    some.workers["a"].left = True
    assert some.live(0.0) == []
    some.seen("a", 1.0)
    assert some.live(1.0) == ["a"]


def test_a_worker_from_the_journal_is_not_live_before_it_calls() -> None:
    some = fleet("a")
    some.workers["a"].seen_at = None
    assert some.live(0.0) == []
    assert some.places(queued(), 0.0) == []


def test_drained_and_set_aside_workers_are_not_counted_on() -> None:
    some = fleet("a", "b", "c")
    some.workers["a"].draining = True
    some.workers["b"].set_aside = "three refusals"
    assert some.live(0.0) == ["c"]
    assert some.choose("a", [running("j")], 0.0) is None
    assert some.choose("b", [running("j")], 0.0) is None


def test_a_new_start_of_a_worker_voids_its_lease_and_keeps_its_strikes() -> None:
    some = fleet("a")
    some.workers["a"].strikes = 2
    lease = some.grant("j", TASK, 1, "a", 0.0)
    assert some.register("a", registration("a"), 1.0) == []
    assert some.leases == {"a": lease}
    assert some.register("a", registration("a", start_id="s2"), 1.0) == [lease]
    assert some.leases == {}
    assert some.workers["a"].strikes == 2
    assert some.register("a", registration("a", start_id="s3"), 1.0) == []


def test_a_vanished_worker_keeps_its_place_for_a_while() -> None:
    some = fleet("a", "b")
    some.seen("a", 300.0)
    job = queued()
    assert some.serving(job, 300.0) == ["a"]
    assert some.places(job, 300.0) == ["a", "b"]
    some.seen("a", fleets.PLACE_KEPT_S + 1)
    assert some.places(job, fleets.PLACE_KEPT_S + 1) == ["a"]
    some.seen("b", 700.0)
    some.workers["b"].left = True
    assert some.places(job, 601.0) == ["a"]


def test_workers_come_for_their_shards_unless_they_are_gone_or_at_work_for_another_job() -> None:
    some, job = fleet("a", "b", "c", "d", "e"), queued("j", data={"shards": "auto"})
    some.grant("j", TASK, 1, "b", 0.0)
    some.grant("other", TASK, 1, "c", 0.0)
    some.workers["d"].left = True
    excluding = rounds.replace(job, excluded={"e": "no data"})
    coming = some.coming(excluding, 0.0)
    assert coming == {"a": True, "b": False}
    assert len(coming) == 2
    assert "nobody" not in coming


def test_a_free_worker_leaves_the_shard_that_was_cut_for_another_which_is_there() -> None:
    some = fleet("a", "b", "c")
    play = Play(spec(data={"shards": "auto"}))
    play.begin("a", "b")
    play.init(places=("a", "b"))
    assert some.choose("c", [play.job], 0.0) is None
    assert some.choose("b", [play.job], 0.0) == (play.job, Task("train", 1, 1))
    some.workers["a"].left = True
    assert some.choose("c", [play.job], 0.0) == (play.job, TASK)


# ---------------------------------------------------------------- leases


def test_what_becomes_of_an_older_attempt_does_not_free_the_newer_one() -> None:
    some = fleet("a")
    lease = some.grant("j", TASK, 3, "a", 0.0)
    some.release("a", "j", TASK, 2)
    assert some.leases == {"a": lease}
    some.release("a", "j", TASK, 3)
    assert some.leases == {}


def test_a_lease_expires_unless_it_is_renewed() -> None:
    some = fleet("a", "b")
    kept = some.grant("j", TASK, 1, "a", 0.0)
    lost = some.grant("j", Task("train", 1, 1), 1, "b", 0.0)
    some.renew(kept, Progress(doing="training", step=3), 30.0)
    assert some.expired(39.9) == []
    assert some.expired(40.0) == [lost]
    assert some.held("j").keys() == {TASK}
    some.renew(kept, None, 31.0)
    assert kept.progress is not None
    assert kept.progress.step == 3


def test_standing_still_extends_every_lease_instead_of_expiring_it() -> None:
    some = fleet("a", "b")
    some.workers["b"].left = True
    some.grant("j", TASK, 1, "a", 0.0)
    some.extend_all(1000.0)
    assert some.expired(1039.0) == []
    assert some.live(1039.0) == ["a"]


def test_adopted_leases_live_one_lease_time() -> None:
    some = fleet("a")
    some.adopt([("j", TASK, 3, "a", "key")], now=100.0)
    assert some.leases["a"].claim_key == "key"
    assert some.lease_of("a", "j", TASK, 3) is not None
    assert some.lease_of("a", "j", TASK, 2) is None
    assert some.lease_of("b", "j", TASK, 3) is None
    assert len(some.expired(140.0)) == 1


def test_releasing_another_task_takes_nothing_away() -> None:
    some = fleet("a")
    some.grant("j", TASK, 1, "a", 0.0)
    some.release("a", "j", Task("train", 1, 1))
    some.release("b", "j", TASK)
    assert some.held("j").keys() == {TASK}
    some.release("a", "j", TASK)
    some.release("a", "j", TASK)
    assert not some.held("j")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.floats(0, 100)), max_size=30))
def test_a_worker_never_holds_two_leases_and_time_never_revives_one(grants: list[tuple[str, int, float]]) -> None:
    some, now = fleet("a", "b", "c"), 0.0
    for worker, shard, passed in grants:
        now += passed
        gone = some.expired(now)
        assert all(lease.expires_at <= now for lease in gone)
        assert not {lease.worker for lease in gone} & set(some.leases)
        some.grant("j", Task("train", 1, shard), 1, worker, now)
        assert len(some.leases) <= 3
        assert all(worker_id == lease.worker for worker_id, lease in some.leases.items())


LEASING = st.tuples(
    st.sampled_from(["grant", "release", "expire", "restart"]),
    st.sampled_from("abc"),
    st.sampled_from(["j", "k"]),
    st.integers(0, 3),
)


@given(st.lists(LEASING, max_size=40))
def test_the_tasks_held_are_always_those_of_the_leases(steps: list[tuple[str, str, str, int]]) -> None:
    some = fleet("a", "b", "c")
    for now, (what, worker, job, shard) in enumerate(steps):
        task = Task("train", 1, shard)
        match what:
            case "grant" if task not in some.held(job):
                some.grant(job, task, 1, worker, 10.0 * now)
            case "release":
                some.release(worker, job, task)
            case "expire":
                some.expired(10.0 * now)
            case "restart":
                some.register(worker, registration(worker).model_copy(update={"start_id": f"s{now}"}), 10.0 * now)
        for each in ("j", "k"):
            of_leases = {lease.task: lease.worker for lease in some.leases.values() if lease.job == each}
            assert some.held(each) == of_leases
            assert some.tasks_held(each) == of_leases.keys()
            assert len(some.tasks_held(each)) == len(of_leases)


# ---------------------------------------------------------------- the queue's policy


def test_the_oldest_running_job_is_served_first() -> None:
    some = fleet("a", "b", "c")
    jobs = [running("old"), running("young")]
    assert some.choose("a", jobs, 0.0) == (jobs[0], TASK)
    some.grant("old", TASK, 1, "a", 0.0)
    some.grant("old", Task("train", 1, 1), 1, "b", 0.0)
    assert some.choose("c", jobs, 0.0) == (jobs[1], TASK)


def test_queued_paused_and_ended_jobs_hand_out_nothing() -> None:
    some = fleet("a")
    paused, ended = training(), training()
    paused.do(rounds.pause(paused.job, "me"))
    ended.do(rounds.cancel(ended.job, "me"))
    assert some.choose("a", [queued(), paused.job, ended.job], 0.0) is None


def test_a_job_of_auto_shards_leaves_no_worker_to_a_younger_one() -> None:
    some = fleet("a", "b", "c")
    assert some.spare(queued(), [running("old", data={"shards": "auto"})], 0.0) == 0


def test_a_job_with_two_shards_leaves_the_third_worker() -> None:
    some = fleet("a", "b", "c")
    assert some.spare(queued(), [running("old")], 0.0) == 1
    assert some.spare(queued(), [running("old"), running("older")], 0.0) == 0
    assert some.spare(queued(), [running("old", data={"shards": 2, "fraction": 0.5})], 0.0) == 2


def test_queued_paused_and_ended_jobs_need_no_worker() -> None:
    some = fleet("a", "b")
    paused = training()
    paused.do(rounds.pause(paused.job, "me"))
    ended = training()
    ended.do(rounds.cancel(ended.job, "me"))
    assert some.spare(queued(), [queued("first"), paused.job, ended.job], 0.0) == 2


def test_a_job_that_only_awaits_evaluations_needs_as_many_workers_as_those() -> None:
    play = training(rounds=1)
    play.train(0, "a")
    play.train(1, "b")
    play.close_if_due("a", "b")
    assert fleets.workers_needed(play.job, 5) == 1
    play.close()
    assert fleets.workers_needed(play.job, 5) == 1
    longer = training(rounds=2)
    longer.train(0, "a")
    longer.train(1, "b")
    longer.close_if_due("a", "b")
    assert fleets.workers_needed(longer.job, 5) == 2


# ---------------------------------------------------------------- who can do what


def test_a_users_task_goes_only_to_workers_that_trust_it() -> None:
    job = Play(spec(), task_digest=digest(1)).job
    some = Fleet()
    some.register("none", registration("none"), 0.0)
    some.register("listed", registration("listed", trust="listed", trusted=(digest(2),)), 0.0)
    some.register("this", registration("this", trust="listed", trusted=(digest(1),)), 0.0)
    some.register("any", registration("any", trust="any"), 0.0)
    assert some.serving(job, 0.0) == ["any", "this"]
    assert fleets.why_not(some.workers["none"], job) == "none runs built-in tasks only (--trust none)"
    assert "has not listed task 000000000000…" in str(fleets.why_not(some.workers["listed"], job))
    begun = rounds.replace(job, phase=rounds.Initialising())
    assert some.choose("none", [begun], 0.0) is None
    assert some.choose("any", [begun], 0.0) == (begun, Task("init", 0))


def test_a_signed_task_goes_to_workers_that_list_a_key_of_who_signed_it_or_the_file() -> None:
    signed = TaskSignature(name="ada", key="a" * 16, digest=digest(1), signature="A" * 86)
    job = rounds.replace(Play(spec(), task_digest=digest(1)).job, signatures=(signed,))
    some = Fleet()
    some.register("of-ada", registration("of-ada", trust="signed", signers=("b" * 16, "a" * 16)), 0.0)
    some.register("of-bob", registration("of-bob", trust="signed", signers=("b" * 16,)), 0.0)
    some.register("of-file", registration("of-file", trust="signed", trusted=(digest(1),)), 0.0)
    some.register("listed", registration("listed", trust="listed", signers=("a" * 16,)), 0.0)
    assert some.serving(job, 0.0) == ["of-ada", "of-file"]
    assert "of-bob lists no key of who signed task 000000000000…: ada (key aaaaaaaaaaaaaaaa)" in str(
        fleets.why_not(some.workers["of-bob"], job)
    )
    unsigned = rounds.replace(job, signatures=())
    assert "is not signed" in str(fleets.why_not(some.workers["of-ada"], unsigned))
    assert job.task == TaskRef(name=job.spec.task, digest=digest(1), signatures=(signed,))


def test_a_worker_of_protocol_1_hears_of_no_signatures() -> None:
    signed = TaskSignature(name="ada", key="a" * 16, digest=digest(1), signature="A" * 86)
    task = TaskRef(name="mine", digest=digest(1), signatures=(signed,))
    work = Assignment(id="j.init.0.0", attempt=1, job="j", kind="init", round=0, shards=1, task=task,
                      spec=spec(), ttl_s=1, max_bytes=1)  # fmt: skip
    assert json.loads(poll_answer(PollAnswer(assignment=work), 1))["assignment"]["task"] == {
        "name": "mine", "digest": digest(1)
    }  # fmt: skip
    assert len(json.loads(poll_answer(PollAnswer(assignment=work), 2))["assignment"]["task"]["signatures"]) == 1


def test_private_data_is_trained_by_workers_that_offer_it() -> None:
    some = Fleet()
    some.register("has", registration("has", data=("scans",)), 0.0)
    some.register("not", registration("not"), 0.0)
    job = queued(data={"partition": "local", "name": "scans"})
    assert some.serving(job, 0.0) == ["has"]
    assert some.places(job, 100.0) == ["has"]
    assert "offers no data named scans (--data scans=PATH)" in str(fleets.why_not(some.workers["not"], job))
    assert fleets.workers_needed(rounds.replace(job, phase=rounds.Initialising()), 7) == 7


def test_a_script_on_each_workers_own_data_goes_to_all_unless_it_names_that_data() -> None:
    some = Fleet()
    some.register("has", registration("has", data=("scans",)), 0.0)
    some.register("not", registration("not"), 0.0)
    assert some.serving(queued(script=True, data={"partition": "local"}), 0.0) == ["has", "not"]
    assert some.serving(queued(script=True, data={"partition": "local", "name": "scans"}), 0.0) == ["has"]


def test_why_nobody_speaks_only_when_no_live_worker_can() -> None:
    some, job = fleet("a", "b"), queued()
    assert fleets.why_nobody(some, job, 0.0) == ""
    assert fleets.why_nobody(some, job, 100.0) == ""
    excluded = rounds.replace(job, excluded={"a": "no data on a", "b": "no data on b"})
    assert fleets.why_nobody(some, excluded, 0.0) == "no data on a; no data on b"
    private = queued(data={"partition": "local"})
    assert "a offers no data named digits" in fleets.why_nobody(some, private, 0.0)


@pytest.mark.parametrize(
    ("change", "state", "reason"),
    [
        ({}, "idle", "waiting for work"),
        ({"set_aside": "3 refused"}, "set aside", "3 refused"),
        ({"left": True}, "gone", "it said goodbye"),
        ({"seen_at": None}, "gone", "not seen since the coordinator started"),
        ({"seen_at": -50.0}, "gone", "no call for a lease time"),
        ({"draining": True}, "draining", "takes no more work until it is resumed"),
        ({"paused": True}, "paused", "by an operator, until it is resumed"),
        ({"resting": "outside its hours"}, "resting", "outside its hours"),
        ({"resting": "outside its hours", "draining": True}, "draining", "takes no more work until it is resumed"),
        ({"paused": True, "left": True}, "gone", "it said goodbye"),
    ],
)
def test_a_workers_standing_says_why(change: dict[str, Any], state: str, reason: str) -> None:
    some = fleet("a")
    for key, value in change.items():
        setattr(some.workers["a"], key, value)
    shown = standing(some, some.workers["a"], 0.0, _describe)
    assert (shown.state, shown.reason) == (state, reason)


def test_a_worker_at_work_is_shown_with_its_task() -> None:
    some = fleet("a")
    some.grant("j", TASK, 1, "a", 0.0)
    assert standing(some, some.workers["a"], 0.0, _describe).reason == "j round 1, shard 0"
    some.workers["a"].draining = True
    assert standing(some, some.workers["a"], 0.0, _describe).state == "draining"
    some.workers["a"].paused = True
    assert standing(some, some.workers["a"], 0.0, _describe).reason == "giving back j round 1, shard 0"


def test_a_worker_that_stands_still_is_shown_at_work_with_the_reason() -> None:
    some = fleet("a")
    some.grant("j", TASK, 1, "a", 0.0).held = "GPU 0 is at 81 °C"
    shown = standing(some, some.workers["a"], 0.0, _describe)
    assert (shown.state, shown.reason) == ("working", "j round 1, shard 0, stands still: GPU 0 is at 81 °C")


@pytest.mark.parametrize("change", [{"paused": True}, {"draining": True}, {"resting": "not its hours"}])
def test_a_worker_that_is_to_do_nothing_gets_no_work_and_no_place(change: dict[str, Any]) -> None:
    some, job = fleet("a", "b"), running("j")
    for key, value in change.items():
        setattr(some.workers["a"], key, value)
    assert some.choose("a", [job], 0.0) is None
    assert some.live(0.0) == ["b"]
    assert some.places(job, 0.0) == ["b"]
    assert some.choose("b", [job], 0.0) is not None


@pytest.mark.parametrize("order", ["drain", "pause"])
def test_an_order_outlives_the_worker_process(order: str) -> None:
    some = fleet("a")
    some.workers["a"].draining, some.workers["a"].paused = order == "drain", order == "pause"
    some.register("a", registration("a", start_id="another"), 1.0)
    assert some.workers["a"].order == order
    some.workers["a"].draining = some.workers["a"].paused = False
    assert some.workers["a"].order == "work"


def _describe(lease: Lease) -> str:
    return f"{lease.job} {lease.task}"


# ---------------------------------------------------------------- one credential, two machines


def at(place: str, start_id: str) -> Any:
    return registration("a", place=place, start_id=start_id)


def working_at(place: str) -> Fleet:
    made = Fleet(Timing(ttl_s=40.0))
    made.register("a", at(place, "s1"), now=0.0)
    return made


def test_a_new_worker_has_no_rival() -> None:
    assert Fleet().rival("a", at("here", "s1"), now=0.0) is None


def test_the_same_process_that_registers_again_is_no_rival_of_itself() -> None:
    assert working_at("here").rival("a", at("here", "s1"), now=1.0) is None


def test_a_restart_in_the_same_folder_goes_before_its_earlier_life() -> None:
    assert working_at("here").rival("a", at("here", "s2"), now=1.0) is None


def test_a_copied_folder_finds_the_worker_at_work() -> None:
    some = working_at("here")
    assert some.rival("a", at("there", "s2"), now=1.0) is some.workers["a"]


def test_a_moved_folder_may_work_once_the_old_place_is_silent_for_a_lease_time() -> None:
    assert working_at("here").rival("a", at("there", "s2"), now=40.1) is None


def test_a_worker_of_the_older_protocol_has_no_place_and_no_rival() -> None:
    assert working_at("").rival("a", at("there", "s2"), now=1.0) is None
    assert working_at("here").rival("a", at("", "s2"), now=1.0) is None


def test_two_processes_of_one_place_cannot_push_each_other_out_in_turn() -> None:
    some = working_at("here")
    some.register("a", at("here", "s2"), now=1.0)  # a clone of the machine
    some.workers["a"].rival_at = 2.0  # and the first one was seen to live on
    assert some.rival("a", at("here", "s3"), now=3.0) is some.workers["a"]
    some.register("a", at("here", "s2"), now=4.0)
    assert some.workers["a"].rival_at == 2.0
    some.workers["a"].seen_at = 700.0
    assert some.rival("a", at("here", "s3"), now=700.0) is None


# ---------------------------------------------------------------- degraded


def test_a_degraded_worker_gets_no_work_and_is_shown_with_its_reason() -> None:
    some = fleet("a")
    some.workers["a"].degraded = "no room in its state folder"
    assert some.choose("a", [running("j")], 0.0) is None
    assert some.live(0.0) == []
    shown = standing(some, some.workers["a"], 0.0, lambda lease: str(lease.task))
    assert (shown.state, shown.reason) == ("degraded", "no room in its state folder")


def test_no_place_is_kept_for_a_degraded_worker() -> None:
    some = fleet("a", "b")
    some.workers["b"].degraded = "read-only disk"
    assert some.places(running("j"), 0.0) == ["a"]


# ---------------------------------------------------------------- what a worker loads before there is work


def prepared(some: Fleet, worker: str, *jobs: Job, key: str = "k", loaded: tuple[str, ...] = ()) -> str | None:
    """The job that a worker is asked to load, as the coordinator asks."""
    job = some.to_prepare(worker, key, loaded, jobs)
    if job is not None:
        some.ask_to_prepare(worker, key, job.id, 0.0)
    return job.id if job else None


def test_a_job_in_the_queue_is_prepared_once_by_each_worker_that_it_can_keep_busy() -> None:
    some = fleet("a", "b", "c")
    asked = [prepared(some, worker, queued(data={"shards": 2}), key=worker) for worker in "aabc"]
    assert asked == ["q", "q", "q", None]  # the same claim key again is the same poll
    assert prepared(some, "a", queued(data={"shards": 2}), key="another") is None


def test_a_worker_is_asked_again_in_its_next_life() -> None:
    some = fleet("a")
    assert prepared(some, "a", queued()) == "q"
    some.register("a", registration("a", start_id="s2"), 1.0)
    assert prepared(some, "a", queued(), key="another") == "q"


def test_who_works_for_the_job_already_is_counted() -> None:
    some = fleet("a", "b", "c")
    some.grant("q", Task("init", 0), 1, "a", 0.0)
    assert [prepared(some, worker, queued(data={"shards": 2})) for worker in "bc"] == ["q", None]


def test_a_worker_never_forgets_a_job_that_goes_on_to_load_another() -> None:
    some = fleet("a")
    assert prepared(some, "a", running("j"), queued(), loaded=("j",)) is None
    assert prepared(some, "a", queued(), loaded=("ended",)) == "q"


def test_only_a_worker_that_may_get_work_of_a_job_is_asked_to_load_it() -> None:
    some = fleet("a", "b", "c", "d", "e")
    some.workers["a"].degraded = "no room"
    some.workers["b"].draining = True
    some.workers["c"].set_aside = "three refusals"
    some.register("e", registration("e", protocol=1), 0.0)
    refused_here = rounds.replace(queued(), excluded={"d": "no data"})
    assert [prepared(some, worker, refused_here) for worker in "abcde"] == [None] * 5
    untrusted = rounds.replace(queued(), task_digest=digest(1))
    assert prepared(fleet("a", trust="none"), "a", untrusted) is None
    assert prepared(fleet("a", trust="listed", trusted=[digest(2)]), "a", untrusted) is None
    assert prepared(fleet("a", trust="listed", trusted=[digest(1)]), "a", untrusted) == "q"
    assert prepared(fleet("a"), "a", queued(data={"partition": "local"})) is None
    over = rounds.replace(queued(), phase=rounds.Cancelled())
    assert prepared(fleet("a"), "a", over) is None


def test_a_worker_that_loads_a_job_is_not_taken_for_gone() -> None:
    some = fleet("a")
    prepared(some, "a", queued())
    assert some.live(fleets.PREPARING_S) == ["a"]
    assert some.live(fleets.PREPARING_S + 0.1) == []
    assert standing(some, some.workers["a"], 50.0, str).reason == "loading q"
    some.seen("a", 60.0)
    assert some.live(100.1) == []
