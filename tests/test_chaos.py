"""The pure parts of `lydian chaos` by properties, its disk and clocks for real, and what is refused before it starts.

What it says of a real fleet is in tests/acceptance/test_chaos.py.
"""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from client.calling import run_program
from client.chaos import report
from client.chaos.clocks import Clock, find_library, why_no_clock
from client.chaos.disk import Disk, why_no_disk
from client.chaos.fleet import AimedWay
from client.chaos.proxy import Fault
from client.chaos.report import Incident, Outcome, Tally, tally
from client.chaos.run import Wish, choose_kinds, make_job, remove
from client.chaos.schedule import KINDS, POINTS, PlannedFault, plan_faults, schedule_digest
from client.main import app
from client.task_file import check_task
from common.errors import BadTaskError
from common.facts import Accepted, HandedBack, HandedOut, Lost, Restored, RoundClosed, StateChanged
from common.messages import Message
from server import failpoints
from tests.privileges import needs_mounts

WORKERS = 4

some_kinds = st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=20)
seeds = st.integers(min_value=0, max_value=2**63 - 1)


def planned(kinds: Sequence[str], seed: int, faults: int = 20, updates: int = 100) -> tuple[PlannedFault, ...]:
    return plan_faults(kinds, seed=seed, faults=faults, updates=updates, workers=WORKERS)


# ---------------------------------------------------------------- the schedule


@given(some_kinds, seeds, st.randoms(use_true_random=False))
def test_the_same_seed_gives_the_same_schedule_in_whatever_order_the_kinds_are_named(
    kinds: list[str], seed: int, chance: Any
) -> None:
    other = [*kinds, *kinds[:1]]
    chance.shuffle(other)
    assert planned(kinds, seed) == planned(other, seed)
    assert schedule_digest(planned(kinds, seed)) == schedule_digest(planned(other, seed))


@given(some_kinds, seeds)
def test_another_seed_gives_another_schedule(kinds: list[str], seed: int) -> None:
    assert schedule_digest(planned(kinds, seed)) != schedule_digest(planned(kinds, seed + 1))


def test_a_schedule_is_the_same_in_every_version_of_this_program() -> None:
    assert schedule_digest(planned(list(KINDS), seed=0)) == "89170de29aad6352"


@given(some_kinds, seeds, st.integers(1, 60), st.integers(1, 500))
def test_faults_come_in_order_within_the_job_and_each_kind_equally_often(
    kinds: list[str], seed: int, faults: int, updates: int
) -> None:
    schedule = planned(kinds, seed, faults, updates)
    assert [fault.number for fault in schedule] == list(range(1, faults + 1))
    at = [fault.after + fault.fraction for fault in schedule]
    assert at == sorted(at)
    assert all(0 <= fault.after < updates and 0 <= fault.fraction <= 1 for fault in schedule)
    often = Counter(dict.fromkeys(kinds, 0))
    often.update(fault.kind for fault in schedule)
    assert often.keys() == set(kinds)
    assert max(often.values()) - min(often.values()) <= 1


@given(seeds)
def test_parameters_are_within_what_the_fleet_has(seed: int) -> None:
    for fault in planned(list(KINDS), seed, faults=60):
        known = dict(fault.parameters)
        assert known.get("worker", 1) in range(1, WORKERS + 1)
        assert known.get("machine", 0) in range(WORKERS + 1)
        assert 0 <= float(known.get("away_s", 0)) <= 1
        assert 0 < float(known.get("leases", 1)) <= 1.5
        assert float(known.get("idles", 2)) > 1  # a stall that is shorter than what is put up with is none


def test_the_points_are_those_that_the_coordinator_has() -> None:
    assert POINTS == failpoints.POINTS


@pytest.mark.parametrize("kinds", [[], ["kill-everybody"], ["cut", "kill-everybody"]])
def test_a_schedule_of_nothing_or_of_an_unknown_kind_is_refused(kinds: list[str]) -> None:
    with pytest.raises(ValueError, match="kind"):
        planned(kinds, seed=0)


# ---------------------------------------------------------------- what is counted


def accepted(round_index: int, shard: int, attempt: int = 1, resumed_at: int = 0) -> Accepted:
    return Accepted(
        round=round_index, shard=shard, attempt=attempt, worker="w-1", worker_name="w", digest="a" * 64, samples=1,
        steps=1, seconds=0.1, metrics={}, bytes_down=0, bytes_up=0, resumed_at=resumed_at,
    )  # fmt: skip


def handed_out(round_index: int, shard: int, attempt: int = 1, kind: Any = "train") -> HandedOut:
    return HandedOut(kind=kind, round=round_index, shard=shard, attempt=attempt, worker="w-1")


def handed_back(round_index: int, shard: int, code: str, kind: Any = "train") -> HandedBack:
    return HandedBack(
        kind=kind, round=round_index, shard=shard, attempt=1, worker="w-1", worker_name="w", code=code, sentence="so"
    )


def closed(round_index: int, digest: str = "a" * 64) -> RoundClosed:
    return RoundClosed(
        round=round_index, seconds=1, workers=1, shards=1, samples=1, bytes_down=0, bytes_up=0, digest=digest, size=1
    )


ROUNDS, SHARDS = 3, 2
EXPECTED = [(r, s) for r in range(1, ROUNDS + 1) for s in range(SHARDS)]
places = st.tuples(st.integers(0, ROUNDS + 1), st.integers(0, SHARDS))  # some of them were never to be trained


@given(st.lists(places, max_size=20))
def test_any_updates_are_counted_right(taken: list[tuple[int, int]]) -> None:
    found = tally([accepted(*place) for place in taken], EXPECTED)
    count = Counter(taken)
    assert found.accepted == len(taken)
    assert found.lost == len(set(EXPECTED) - set(taken))
    assert found.twice == len(taken) - len(set(EXPECTED) & set(taken))
    assert (found.lost, found.twice) != (0, 0) or count == Counter(EXPECTED)


@given(st.lists(st.sampled_from(["out", "expired", "accepted", "evaluate", "resumed"]), max_size=30))
def test_attempts_that_were_not_needed_are_those_without_an_update(story: list[str]) -> None:
    facts: dict[str, list[Message]] = {
        "out": [handed_out(1, 0)],
        "expired": [handed_out(1, 0), handed_back(1, 0, "expired")],
        "accepted": [handed_out(1, 0), accepted(1, 0)],
        "resumed": [handed_out(1, 0), accepted(1, 0, resumed_at=7)],
        "evaluate": [handed_out(1, 0, kind="evaluate"), handed_back(1, 0, "expired", kind="evaluate")],
    }
    found = tally([fact for event in story for fact in facts[event]], EXPECTED)
    assert found.retrained == story.count("out") + story.count("expired")
    assert found.resumed == story.count("resumed")
    assert found.given_back == ({"expired": story.count("expired")} if "expired" in story else {})


def test_an_update_that_was_taken_back_counts_no_more_and_its_second_one_is_no_repeat() -> None:
    once = [accepted(1, 0), handed_back(1, 0, "lost")]
    assert (tally(once, [(1, 0)]).lost, tally(once, [(1, 0)]).taken_back) == (1, 1)
    again = tally([*once, accepted(1, 0, attempt=2)], [(1, 0)])
    assert (again.lost, again.twice, again.taken_back) == (0, 0, 1)


def test_bytes_that_came_back_after_a_power_cut_are_counted_beside_those_that_were_lost() -> None:
    what = {"round": 1, "attempt": 1, "worker": "w-1", "worker_name": "w", "digest": "a" * 64}
    lost = [Lost.model_validate({**what, "shard": shard, "reason": "gone"}) for shard in range(2)]
    found = tally([*lost, Restored.model_validate({**what, "shard": 0})], [])
    assert (found.bytes_lost, found.restored) == (2, 1)


@given(st.dictionaries(st.integers(1, 9), st.text(max_size=2)), st.sets(st.integers(1, 9)))
def test_a_fact_is_forgotten_if_it_is_gone_or_another(told: dict[int, str], damaged: set[int]) -> None:
    events = [{"id": number, "reason": reason} for number, reason in told.items()]
    later = [e | {"reason": "another"} if e["id"] in damaged and e["id"] % 2 else e for e in events]
    later = [e for e in later if e["id"] not in damaged or e["id"] % 2]
    assert report.forgotten(events, [*later, {"id": 10, "reason": "new"}]) == len(damaged & told.keys())


@given(st.floats(0, 100), st.lists(st.floats(0, 100), max_size=9))
def test_recovery_is_the_time_to_the_first_progress_after_the_fault(lifted_at: float, progress: list[float]) -> None:
    found = report.recovery_s(lifted_at, progress)
    after = sorted(at for at in progress if at >= lifted_at)
    assert found == (after[0] - lifted_at if after else None)


# ---------------------------------------------------------------- what it comes to

GOOD: list[Message] = [
    *(fact for place in EXPECTED for fact in (handed_out(*place), accepted(*place))),
    *(closed(r) for r in range(1, ROUNDS + 1)),
    StateChanged(state="finished", reason="3 rounds done"),
]


def incident(number: int, kind: str, recovery_s: float | None = 0.5, missed: str = "") -> Incident:
    return Incident(number, kind, {"away_s": 0.1}, 3, 1.0, 0.25, recovery_s, missed)


def outcome(facts: Sequence[Message] = GOOD, **changed: Any) -> Outcome:
    truth = tally(GOOD, EXPECTED)
    usual = {
        "seed": 0, "schedule": "0" * 16, "rounds": ROUNDS, "shards": SHARDS, "state": "finished", "reason": "done",
        "seconds": 9.0, "undisturbed_s": 3.0, "truth": truth, "found": tally(facts, EXPECTED), "forgotten": 0,
        "true_model": "a" * 64, "model": "a" * 64, "ended": [],
        "incidents": [incident(1, "cut"), incident(2, "cut", None), incident(3, "kill-worker", missed="too late")],
    }  # fmt: skip
    return Outcome(**{**usual, **changed})


def broken(result: Outcome) -> list[str]:
    return [promise.name for promise in report.promises(result) if not promise.kept]


def test_a_run_without_a_loss_keeps_every_promise() -> None:
    assert broken(outcome()) == []
    assert report.all_kept(outcome())


def damaged_round() -> Tally:
    return tally([*GOOD, closed(2, "b" * 64)], EXPECTED)


@pytest.mark.parametrize(
    ("changed", "promise", "words"),
    [
        ({"state": "failed", "reason": "round 2 was late"}, "the job finishes", "failed: round 2 was late"),
        ({"found": tally(GOOD[2:], EXPECTED)}, "no update is lost", "1 lost of 6"),
        ({"found": tally([*GOOD, accepted(1, 0)], EXPECTED)}, "no update counts twice", "1 counted twice"),
        (
            {"found": tally([*GOOD, handed_back(1, 0, "lost"), accepted(1, 0, 2)], EXPECTED)},
            "nothing that was acknowledged is trained again",
            "1 taken back",
        ),
        ({"forgotten": 2}, "no acknowledged fact is forgotten", "2 forgotten"),
        ({"found": damaged_round()}, "every round has the model that it has without faults", "round 2 is the first"),
        ({"model": "b" * 64}, "every round has the model that it has without faults", "bbbbbbbbbbbb, not aaaaaaaaaaaa"),
        ({"model": ""}, "every round has the model that it has without faults", "no final model with faults"),
        ({"true_model": ""}, "every round has the model that it has without faults", "no final model without faults"),
        ({"ended": ["worker-1"]}, "nobody ends who was not killed", "worker-1 ended"),
    ],
)
def test_each_loss_breaks_its_own_promise_and_says_what_was_found(
    changed: dict[str, Any], promise: str, words: str
) -> None:
    result = outcome(**changed)
    assert broken(result) == [promise]
    assert words in {p.name: p.found for p in report.promises(result)}[promise]
    assert not report.all_kept(result)
    assert report.as_json(result)["kept"] is False


def test_the_table_of_faults_has_a_line_a_kind_and_one_for_all() -> None:
    header, rows = report.fault_table(outcome().incidents)
    assert header[:3] == ["fault", "struck", "missed"]
    assert [row[:3] for row in rows] == [["kill-worker", "0", "1"], ["cut", "2", "0"], ["all", "2", "1"]]
    assert rows[1][3:] == ["0.25 s", "0.50 s", "0.50 s"]
    assert rows[0][3:] == ["-", "-", "-"]


def test_the_object_for_scripts_has_every_fault_and_every_number() -> None:
    told = report.as_json(outcome())
    assert (told["kept"], told["updates_lost"], told["updates_counted_twice"], told["facts_forgotten"]) == (
        True,
        0,
        0,
        0,
    )
    assert told["faults"] == {"cut": 2}
    assert [each["number"] for each in told["incidents"]] == [1, 2, 3]
    assert (told["recovery_median_s"], told["recovery_max_s"]) == (0.5, 0.5)
    assert told["same_model"] is True


def test_what_the_faults_cost_is_said_in_one_line() -> None:
    facts = [*GOOD, handed_out(1, 0, 2), handed_back(1, 0, "expired")]
    line = report.work_line(outcome(facts))
    assert "7 attempts to train, 1 attempt more than without faults (1 expired)" in line
    assert "9.00 s instead of 3.00 s" in line


# ---------------------------------------------------------------- aiming at a body


@given(st.integers(0, 10**6), st.integers(1, 1 << 14), st.integers(1, 1 << 14))
def test_an_aimed_fault_strikes_inside_what_is_large_enough_and_nothing_else(
    carried: int, coming: int, least: int
) -> None:
    way = AimedWay()
    way.least, way.fault = least, Fault("corrupt")
    struck = way.take(carried, coming)
    assert (struck is not None) == (coming >= least) == (way.fault is None)
    assert struck is None or 0 <= struck.after - carried < coming


# ---------------------------------------------------------------- what is asked for


def wish(**changed: Any) -> Wish:
    usual = {
        "faults": None, "seconds": None, "seed": 7, "workers": WORKERS, "rounds": None, "kinds": None, "task": None,
        "lease_s": 6.0, "keep": False,
    }  # fmt: skip
    return Wish(**{**usual, **changed})


@pytest.mark.parametrize(
    ("changed", "faults"), [({}, 20), ({"faults": 3}, 3), ({"seconds": 60}, 15), ({"seconds": 1}, 1)]
)
def test_the_number_of_faults_follows_from_what_was_asked_for(changed: dict[str, Any], faults: int) -> None:
    assert wish(**changed).number == faults
    assert make_job(wish(**changed)).spec.rounds > faults


def test_the_shipped_task_is_one_that_a_worker_takes() -> None:
    job = make_job(wish())
    assert job.task_source is not None
    check_task(job.task_source.encode(), "task.txt")
    assert (job.spec.seed, job.spec.data.shards) == (7, 2 * WORKERS)


def test_a_task_of_the_users_gets_its_rounds_seed_and_shards() -> None:
    job = make_job(wish(task="digits", rounds=4))
    assert job.task_source is None
    assert (job.spec.task, job.spec.rounds, job.spec.seed, job.spec.data.shards) == ("digits", 4, 7, 2 * WORKERS)
    with pytest.raises(BadTaskError, match="no built-in task"):
        make_job(wish(task="digts"))


def test_kinds_that_cannot_be_had_are_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = choose_kinds(None, {"power-cut": "needs root"})
    assert chosen == [kind for kind in KINDS if kind != "power-cut"]
    assert capsys.readouterr().err == "left out: power-cut: needs root\n"


def test_a_kind_that_is_asked_for_and_cannot_be_had_is_refused() -> None:
    assert choose_kinds(["cut", "kill-worker"], {}) == ["kill-worker", "cut"]
    with pytest.raises(typer.BadParameter, match="power-cut cannot be had here: needs root"):
        choose_kinds(["power-cut"], {"power-cut": "needs root"})
    with pytest.raises(typer.BadParameter, match="there is no 'kill-everybody'"):
        choose_kinds(["kill-everybody"], {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kinds", "cut,kill-everybody"], "there is no 'kill-everybody'"),
        (["--kinds", ""], "there is no ''"),
        (["--faults", "3", "--seconds", "9"], "keep one"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_wrong_usage_ends_with_2_before_anything_is_started(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        run_program(app, "lydian", ["chaos", *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the disk and the clock


@needs_mounts
def test_a_power_cut_takes_what_was_not_synced_and_leaves_what_was(tmp_path: Path) -> None:
    with Disk(tmp_path / "image", tmp_path / "disk", 8 << 20) as disk:
        kept, lost = disk.path / "kept", disk.path / "lost"
        with kept.open("wb") as file:
            file.write(b"kept")
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(disk.path, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        lost.write_bytes(b"lost")
        seen: list[bool] = []
        disk.cut(lambda: seen.append(lost.exists()))
        assert seen  # the processes are killed after the power has gone
        assert kept.read_bytes() == b"kept"
        assert not lost.exists() or lost.read_bytes() == b""


@needs_mounts
def test_a_filled_disk_takes_no_byte_until_it_is_emptied(tmp_path: Path) -> None:
    with Disk(tmp_path / "image", tmp_path / "disk", 8 << 20) as disk:
        more = disk.path / "more"
        with disk.filled(), pytest.raises(OSError, match="No space left"):
            more.write_bytes(bytes(4096))
        more.write_bytes(bytes(4096))
        assert more.stat().st_size == 4096


@needs_mounts
def test_a_disk_leaves_no_mount_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with disk:
            assert str(disk.path) in Path("/proc/mounts").read_text()
            raise KeyboardInterrupt

    disk = Disk(tmp_path / "image", tmp_path / "disk", 8 << 20)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert str(disk.path) not in Path("/proc/mounts").read_text()
    assert why_no_disk() == ""


def test_a_clock_that_jumps_leaves_durations_alone(tmp_path: Path) -> None:
    library = find_library()
    if library is None:
        pytest.skip("needs libfaketime: apt install libfaketime")
    assert why_no_clock(tmp_path, os.environ) == ""
    clock = Clock(library, tmp_path / "clock")
    clock.set(-864_000)
    program = "import time; print(time.time(), time.monotonic())"
    environment = os.environ | clock.environment()
    said = [
        subprocess.run([sys.executable, "-I", "-c", program], env=e, capture_output=True, text=True, check=True).stdout
        for e in (os.environ, environment)
    ]
    (day, passed), (other_day, passed_there) = (map(float, text.split()) for text in said)
    assert -864_000 - 60 < other_day - day < -864_000 + 60
    assert 0 <= passed_there - passed < 60


def test_without_the_library_clocks_cannot_jump_and_the_reason_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.chaos.clocks.LIBRARIES", (f"{tmp_path}/*.so",))
    assert "apt install libfaketime" in why_no_clock(tmp_path, os.environ)


def test_a_folder_that_is_still_written_into_is_deleted_once_its_writer_has_ended(tmp_path: Path) -> None:
    """By a process that makes, renames and makes again, as a worker does that has not yet died of its SIGKILL."""
    folder, script = tmp_path / "run", tmp_path / "writer.py"
    (folder / "state").mkdir(parents=True)
    script.write_text(
        "import pathlib, time\n"
        f"state, until = pathlib.Path({str(folder / 'state')!r}), time.monotonic() + 1.0\n"
        "print('writing', flush=True)\n"
        "while time.monotonic() < until:\n"
        "    try:\n"
        "        state.mkdir(parents=True, exist_ok=True)\n"
        "        (state / 'update.part').write_bytes(b'0')\n"
        "        (state / 'update.part').replace(state / f'update-{time.monotonic_ns() % 50}')\n"
        "    except FileNotFoundError:\n"
        "        pass\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        remove(folder)
        writer.wait(timeout=30)
    remove(folder)  # what came after the first was gone, and nothing now
    assert not folder.exists()
