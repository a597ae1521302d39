"""What `lydian track` tells trackers: points from facts, files that go on where they were, and the real packages."""

import csv
import json
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from client.main import app
from client.tracking.command import run_track, tell
from client.tracking.points import Point, Teller, run_of
from client.tracking.trackers import KINDS, Wish, tracker, wish
from client.watching import read_event
from common.errors import LydianError
from common.messages import JobSpec, JobView
from tests.test_watching import DIGEST, NOW, closed, ended, evaluated

JOB = JobView(
    id="clothes-1", name="clothes", task="fashion-mnist", state="training", reason="waiting",
    submitted_at="2026-01-01T00:00:00Z", round=0, rounds=2,
    spec=JobSpec(task="fashion-mnist", rounds=2, config={"width": 8, "layers": [1, 2]}),
)  # fmt: skip
AT = "2026-01-01T00:00:00+00:00"


def accepted(fact_id: int, number: int, shard: int, worker: str, **more: Any) -> dict[str, Any]:
    fact = {
        "id": fact_id, "at": AT, "type": "accepted", "round": number, "shard": shard, "attempt": 1,
        "worker": f"{worker}-id", "worker_name": worker, "digest": DIGEST,
        "samples": 100, "steps": 10, "seconds": 1.5, "metrics": {},
        "bytes_down": 7, "bytes_up": 9, "took_s": 2.0,
    }  # fmt: skip
    return fact | more


def frozen(fact_id: int, number: int, *shards: int, **more: Any) -> dict[str, Any]:
    return {"id": fact_id, "at": AT, "type": "frozen", "round": number, "shards": shards, "reason": "all"} | more


def late(worker: str, number: int, shard: int, staleness: int) -> dict[str, Any]:
    return {
        "round": number, "shard": shard, "worker": f"{worker}-id", "worker_name": worker, "staleness": staleness,
        "factor": 0.5,
    }  # fmt: skip


SUBMITTED = {"id": 1, "at": AT, "type": "submitted", "spec": JOB.spec.model_dump(mode="json"), "key": "k"}
INITIALISED = {
    "id": 3, "at": AT, "type": "initialised", "attempt": 1, "worker": "gpu-id", "digest": DIGEST, "size": 40,
    "facts": {"parameters": 10, "train_samples": 200, "test_samples": 50},
}  # fmt: skip
ABSENT = [{"shard": 2, "worker": "attic-id", "worker_name": "attic", "why": "fell\x1bbehind"}]
STORY = [
    SUBMITTED,
    INITIALISED,
    accepted(5, 1, 0, "gpu"),
    accepted(6, 1, 1, "gpu"),
    frozen(7, 1, 0, 1),
    closed(1, absent=ABSENT, left_out=1, at=AT),
    evaluated(1, 0.5) | {"at": AT},
    accepted(15, 2, 0, "gpu", took_s=None),
    frozen(16, 2, 0),
    closed(2, at=AT),
    evaluated(2, 0.75) | {"at": AT},
    ended("finished") | {"at": AT},
]


def points(*events: dict[str, Any]) -> list[Point]:
    teller, found = Teller(), []
    for event in events:
        fact = read_event(event)
        assert fact is not None, event
        if (point := teller.take(event["id"], event["at"], fact)) is not None:
            found.append(point)
    return found


# ---------------------------------------------------------------- points


def test_a_job_is_told_as_one_point_a_round_an_evaluation_and_a_change() -> None:
    told = points(*STORY)
    assert [(one.id, one.type, one.round) for one in told] == [
        (1, "submitted", 0), (3, "initialised", 0), (10, "round", 1), (11, "evaluation", 1), (20, "round", 2),
        (21, "evaluation", 2), (999, "job", 2),
    ]  # fmt: skip
    first = told[2]
    assert first.values["round/samples"] == 1500
    assert first.values["train/train_loss"] == 0.5
    assert {name: value for name, value in first.values.items() if name.startswith("worker/")} == {
        "worker/gpu/updates": 2, "worker/gpu/samples": 200, "worker/gpu/steps": 20, "worker/gpu/train_seconds": 3.0,
        "worker/gpu/seconds": 4.0, "worker/gpu/bytes_down": 14, "worker/gpu/bytes_up": 18,
    }  # fmt: skip
    assert first.words == {"digest": DIGEST, "absent": "shard 2, attic: fell�behind"}
    assert "worker/gpu/seconds" not in told[4].values  # nobody saw how long it took
    assert told[3].values == {
        "evaluation/accuracy": 0.5, "evaluation/loss": 0.25, "evaluation/samples": 100, "evaluation/seconds": 0.1,
        "evaluation/best": 1.0,
    }  # fmt: skip
    assert told[6].words == {"state": "finished", "reason": "all 4 rounds are done"}


def test_an_update_counts_for_its_worker_in_the_round_that_it_was_averaged_in() -> None:
    told = points(
        accepted(1, 1, 0, "gpu"),
        frozen(2, 1, 0),
        closed(1, at=AT),
        accepted(11, 1, 1, "attic"),  # after round 1 had closed
        accepted(12, 2, 0, "gpu"),
        accepted(13, 2, 1, "cpu"),
        {"id": 14, "at": AT, "type": "late", "round": 2, "shard": 1, "attempt": 1, "worker": "cpu-id"},
        frozen(15, 2, 0, 1, late=[late("attic", 1, 1, 1)]),
        closed(2, late=[late("attic", 1, 1, 1)], at=AT),
        accepted(25, 2, 5, "gpu"),  # asynchronous: any round, no shards
        accepted(26, 1, 6, "cpu"),
        frozen(27, 3, members=[late("gpu", 2, 5, 0), late("cpu", 1, 6, 1)]),
        closed(3, at=AT),  # and the stale one was lost since
    )
    updates = [{name: one.values[name] for name in one.values if name.endswith("/updates")} for one in told]
    assert updates == [
        {"worker/gpu/updates": 1},
        {"worker/gpu/updates": 1, "worker/attic/updates": 1},
        {"worker/gpu/updates": 1},
    ]
    assert told[1].words["late"] == "attic: of round 1, x 0.50"


def test_two_workers_of_one_name_are_told_apart_and_no_name_becomes_a_group() -> None:
    same = [{"worker": f"w-{n}", "worker_name": "a/b=c", "attempt": 1, "metrics": {"accuracy": n}, "samples": 1,
             "why": "" if n else "no data"} for n in (0, 1)]  # fmt: skip
    (point,) = points(evaluated(1, 0.5) | {"workers": same, "metrics": {"accuracy/3": 1.0, "f1 (µ)": 2.0}})
    assert point.values["worker/a_b_c/accuracy"] == 0
    assert point.values["worker/w-1/accuracy"] == 1
    assert point.values["evaluation/accuracy/3"] == 1.0
    assert point.values["evaluation/f1 ___"] == 2.0
    assert point.words == {"not_measured": "a/b=c: no data"}


def test_what_a_private_round_spent_and_a_task_file_are_told() -> None:
    spent = {"level": "worker", "epsilon": 2.5, "delta": 1e-5, "clip": 0.1}
    told = points(SUBMITTED | {"task_digest": DIGEST}, closed(1, privacy=spent, amplification=1.5, at=AT))
    assert told[0].words == {"task_digest": DIGEST}
    assert (told[1].values["privacy/epsilon"], told[1].values["privacy/clip"]) == (2.5, 0.1)
    assert told[1].values["round/amplification"] == 1.5


def test_settings_are_flat_and_those_that_are_not_set_are_left_out() -> None:
    run = run_of(JOB)
    assert run.settings["train.lr"] == 0.1
    assert run.settings["config.layers"] == "[1, 2]"
    assert "target" not in run.settings
    assert run.target == "evaluation/accuracy"


# ---------------------------------------------------------------- telling


class Kept:
    """A tracker that keeps what it is told."""

    place, failures = "here", (OSError,)

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.settled_at: list[int] = []

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_: object) -> None: ...

    def take(self, point: Point) -> None:
        self.taken.append(point.id)

    def settle(self) -> None:
        self.settled_at.append(len(self.taken))


def test_without_follow_it_ends_when_all_that_happened_is_told_and_with_it_when_the_job_is_over() -> None:
    events = [*STORY[:6], NOW, *STORY[6:], {"id": 1000, "at": AT, "type": "round"}]
    now, later = Kept(), Kept()
    assert tell(events, [(Wish("csv", "x"), now)], follow=False) == 1
    assert tell(events, [(Wish("csv", "x"), later)], follow=True) == 2
    assert (now.taken, now.settled_at) == ([1, 3, 10], [3])
    assert later.taken == [1, 3, 10, 11, 20, 21, 999]


def test_an_event_that_says_nothing_to_a_tracker_or_is_of_a_newer_coordinator_is_passed_over() -> None:
    kept = Kept()
    unknown, untold = (
        {"id": 1, "type": "novelty"},
        {"id": 2, "at": AT, "type": "extended", "round": 1, "reason": "slow"},
    )
    tell([unknown, untold, *STORY], [(Wish("csv", "x"), kept)], follow=True)
    assert kept.taken[-1] == 999


class Api:
    """A coordinator with one job."""

    def job(self, _: str) -> JobView:
        return JOB

    def events(self, _: str, **__: Any) -> Iterator[dict[str, Any]]:
        return iter([*STORY[:6], NOW])


def test_where_it_was_tracked_goes_to_stdout_and_the_rest_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.csv"
    assert run_track(Api(), "clothes-1", [Wish("csv", str(file))], follow=False) == 0  # type: ignore[arg-type]
    assert capsys.readouterr() == (f"{file}\n", "tracked clothes-1 up to round 1\n")


def test_a_tracker_that_takes_nothing_is_named_with_what_to_do(tmp_path: Path) -> None:
    target = Wish("csv", str(tmp_path / "no" / "such" / "folder.csv"))
    with pytest.raises(LydianError, match=r"--to csv=\S+ did not take it: .*No such file") as caught:
        run_track(Api(), "clothes-1", [target], follow=False)  # type: ignore[arg-type]
    assert caught.value.code == "tracker_failed"
    assert "goes on where it was" in caught.value.advice


@pytest.mark.parametrize("text", ["excel=x", "csv", "csv=", "=x", ""])
def test_a_wish_for_no_tracker_is_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(LydianError, match="names no tracker") as caught:
        wish(text)
    assert all(name in caught.value.advice for name in KINDS)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    ended = CliRunner().invoke(app, ["track", "j", "--to", "wandb=x"])
    assert isinstance(ended.exception, LydianError)
    assert "needs the package wandb" in str(ended.exception)
    assert "'.[wandb]'" in ended.exception.advice


# ---------------------------------------------------------------- files

RUN = run_of(JOB)


def track(kind: str, target: Path | str, *events: dict[str, Any]) -> None:
    """One start of `lydian track` on these events."""
    one = Wish(kind, str(target))
    opened = tracker(one, RUN)
    with opened:
        tell(events, [(one, opened)], follow=True)


def test_a_csv_file_has_a_line_a_round_with_its_evaluation(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    track("csv", file, *STORY)
    track("csv", file, *STORY)  # again: the same file
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    assert [(row["job"], row["round"], row["evaluation/accuracy"]) for row in rows] == [
        ("clothes-1", "1", "0.5"), ("clothes-1", "2", "0.75"),
    ]  # fmt: skip
    assert rows[0]["absent"] == "shard 2, attic: fell�behind"
    assert (rows[0]["worker/gpu/seconds"], rows[1]["worker/gpu/seconds"]) == ("4.0", "")
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_a_text_in_a_table_is_no_formula(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    track("csv", file, closed(1, at=AT, warning="=HYPERLINK(1)"))
    assert next(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))["warning"] == "'=HYPERLINK(1)"


def test_json_lines_begin_with_the_settings_and_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    worst = {"a": float("nan"), "b": float("inf"), "c": -float("inf")}
    track("jsonl", file, closed(1, at=AT, metrics=worst))
    head, line = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert (head["type"], head["settings.train.lr"], head["job"]) == ("run", 0.1, "clothes-1")
    assert [line[f"train/{name}"] for name in "abc"] == ["NaN", "Infinity", "-Infinity"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("content", ["my,own,table\n1,2,3\n", '{"job": "other-2", "id": 5}\n', "diary", "[1]\n"])
def test_a_file_that_is_something_else_is_left_alone(kind: str, content: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(LydianError, match="is there already") as caught:
        track(kind, file, *STORY)
    assert (caught.value.code, file.read_text(encoding="utf-8")) == ("file_exists", content)


def test_a_table_of_another_job_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("job,round,at,digest\nother-2,1,x,y\n", encoding="utf-8")
    with pytest.raises(LydianError, match="is not the table of clothes-1"):
        track("csv", file, *STORY)


@settings(max_examples=40, deadline=None)
@given(stop=st.integers(0, len(STORY)), torn=st.integers(0, 400))
def test_json_lines_come_out_alike_wherever_an_earlier_start_was_killed(stop: int, torn: int, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("lines")
    whole, file = folder / "whole", folder / "t.jsonl"
    track("jsonl", whole, *STORY)
    track("jsonl", file, *STORY[:stop])
    file.write_bytes(file.read_bytes()[: max(0, file.stat().st_size - torn)])
    track("jsonl", file, *STORY)
    assert file.read_bytes() == whole.read_bytes()


def test_a_last_line_longer_than_one_look_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.tracking.lines.TAIL", 7)
    file = tmp_path / "t.jsonl"
    track("jsonl", file, *STORY[:5])
    with file.open("ab") as end:
        end.write(b'{"job": "clothes-1", "id": 77')
    track("jsonl", file, *STORY)
    assert [json.loads(line)["id"] for line in file.read_text(encoding="utf-8").splitlines()] == [
        0,
        1,
        3,
        10,
        11,
        20,
        21,
        999,
    ]


# ---------------------------------------------------------------- TensorBoard


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of every scalar in the event files of a run, which are records with lengths and checksums."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            event = Event.FromString(data[12 : 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value if v.HasField("simple_value")]
            data = data[16 + length :]
    return found


def test_tensorboard_has_every_point_once_though_a_start_was_killed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="what writes event files is not here: pip install -e '.[tensorboard]'")
    track("tensorboard", tmp_path, *STORY[:7])
    killed = tracker(Wish("tensorboard", str(tmp_path)), RUN)
    with ExitStack() as stack:
        stack.enter_context(killed)
        tell(STORY[:10], [(Wish("tensorboard", "x"), killed)], follow=True)
        killed._writer.flush()  # type: ignore[attr-defined] # it is on the disk, and not settled
        killed._changed = False  # type: ignore[attr-defined] # … nor will be
    track("tensorboard", tmp_path, *STORY)
    track("tensorboard", tmp_path, *STORY)
    found = scalars(tmp_path / "clothes-1")
    assert [one for one in found if one[0] == "evaluation/accuracy"] == [
        ("evaluation/accuracy", 1, 0.5), ("evaluation/accuracy", 2, 0.75),
    ]  # fmt: skip
    assert [step for name, step, _ in found if name == "round/samples"] == [1, 2]
    assert len(found) == len(set(found))


def test_a_damaged_mark_begins_the_event_files_anew(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="what writes event files is not here: pip install -e '.[tensorboard]'")
    track("tensorboard", tmp_path, *STORY)
    (tmp_path / "clothes-1" / "lydian.json").write_text('{"after": 12}')
    track("tensorboard", tmp_path, *STORY)
    assert [step for name, step, _ in scalars(tmp_path / "clothes-1") if name == "round/samples"] == [1, 2]


# ---------------------------------------------------------------- W&B, Trackio, MLflow


class FakeWandb(ModuleType):
    """What of wandb is used: a service that keeps runs by id, and drops a step that it has."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = SimpleNamespace(Error=RuntimeError)
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.asked: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []

    def Settings(self, **given: Any) -> dict[str, Any]:
        return given

    def init(self, **asked: Any) -> Any:
        print("wandb: a banner")
        self.asked.append(asked)
        last = max((step for step, _ in self.logged), default=-1)
        return SimpleNamespace(
            starting_step=last + 1, url="https://wandb.example/r", define_metric=lambda *_, **__: None,
            log=lambda data, step: self.logged.append((step, data)),
            finish=lambda exit_code: self.exit_codes.append(exit_code),
        )  # fmt: skip


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_goes_on_after_what_it_has(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    track("wandb", "team/clothes", *STORY[:7])
    track("wandb", "team/clothes", *STORY)
    assert [step for step, _ in fake.logged] == [1, 3, 10, 11, 20, 21, 999]
    assert fake.logged[3][1]["round"] == 1
    assert fake.logged[3][1]["evaluation/accuracy"] == 0.5
    first = fake.asked[0]
    assert (first["entity"], first["project"], first["id"], first["resume"]) == (
        "team",
        "clothes",
        "clothes-1",
        "allow",
    )
    assert first["config"]["train.lr"] == 0.1
    assert fake.exit_codes == [0, 0]
    assert capsys.readouterr().out == ""  # its banner is no answer


def kept_by_wandb(file: Path) -> list[dict[str, Any]]:
    """The rows of a run that is offline: its file is a LevelDB log of protobuf records, after 7 bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    data, at, record, rows = file.read_bytes(), 7, b"", list[dict[str, Any]]()
    while at < len(data):
        if 32_768 - at % 32_768 < 7:  # no header fits into the rest of the block
            at += 32_768 - at % 32_768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            read, record = wandb_internal_pb2.Record.FromString(record), b""
            items = read.history.item if read.WhichOneof("record_type") == "history" else ()
            rows += (
                [{(one.key or ".".join(one.nested_key)): json.loads(one.value_json) for one in items}] if items else []
            )
    return rows


def test_wandb_itself_has_every_point_once_where_it_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="it is no part of dev, being large: pip install -e '.[wandb]'")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", tmp_path), ("XDG_STATE_HOME", tmp_path / "state")):
        monkeypatch.setenv(name, str(value))
    for told in (7, len(STORY), len(STORY)):
        track("wandb", "team/clothes", *STORY[:told])
    rows = [row for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")) for row in kept_by_wandb(file)]
    assert [(row["round"], row["evaluation/accuracy"]) for row in rows if "evaluation/accuracy" in row] == [
        (1, 0.5), (2, 0.75),
    ]  # fmt: skip
    assert [row["round"] for row in rows if "round/samples" in row] == [1, 2]


def test_trackio_has_every_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="it is no part of dev, being large: pip install -e '.[trackio]'")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    project = f"test-{tmp_path.name}".replace("_", "-")
    track("trackio", project, *STORY[:7])
    track("trackio", project, *STORY)
    track("trackio", project, *STORY)
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs(project, "clothes-1")
    assert [(one["step"], one["evaluation/accuracy"]) for one in logs if "evaluation/accuracy" in one] == [
        (1, 0.5), (2, 0.75),
    ]  # fmt: skip
    assert [one["step"] for one in logs if "round/samples" in one] == [1, 2]


def test_mlflow_has_every_value_once_though_a_call_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="it is no part of dev, being large: pip install -e '.[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    track("mlflow", uri, *STORY[:7])
    opened: Any = tracker(Wish("mlflow", uri), RUN)
    with opened:
        client, run_id = opened._client, opened._id
        told = points(*STORY)[4]
        from client.tracking.trackers import seconds

        client.log_metric(run_id, "round/samples", 1500.0, int(seconds(told.at) * 1000), 2)  # and no tag came with it
    track("mlflow", uri, *STORY)
    track("mlflow", uri, *STORY)
    run = client.get_run(run_id)
    assert [(one.step, one.value) for one in client.get_metric_history(run_id, "evaluation/accuracy")] == [
        (1, 0.5), (2, 0.75),
    ]  # fmt: skip
    assert [one.step for one in client.get_metric_history(run_id, "round/samples")] == [1, 2]
    assert (run.info.status, run.data.params["train.lr"]) == ("FINISHED", "0.1")
    assert run.data.tags["round.digest"] == DIGEST
    assert "rounds.csv" in [one.path for one in client.list_artifacts(run_id)]
