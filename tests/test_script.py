"""Training scripts: their loop alone, in the child, and every way in which one goes wrong. No process is started."""

import difflib
import hashlib
import io
import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

import lydian
from client.job_file import flag_layer, read_job, set_layer
from client.partition.command import run_partition
from client.simulate import Wish, job_of
from client.task_file import check_task, script_of
from common.errors import BadTaskError, LydianError
from common.messages import JobRequest, JobSpec
from lydian import loop
from worker import plan, task_host

ROOT = Path(__file__).resolve().parent.parent

HEAD = """
import torch, sys
from safetensors.torch import save_file
from torch import nn
import lydian

x = torch.arange(40.0).view(10, 4) / 40
y = torch.arange(10) % 3
model = nn.Linear(4, 3)

def step(rows):
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return loss
"""
GOOD = (
    HEAD
    + """
def evaluate(model):
    return {"accuracy": (int((model(x).argmax(1) == y).sum()), 10), "training": float(model.training)}

for round in lydian.rounds(model, data=x, evaluate=evaluate):
    for row in torch.tensor(round.share())[torch.randperm(len(round.share()))].split(2):
        loss = step(row)
    round.report(samples=len(round.share()), loss=loss, metrics={"lost": (1, 4)})
"""
)


LOOP = "\nfor round in lydian.rounds(model):\n    "


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has a loop that has not begun, and the machine's cards afterwards."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("LYDIAN_ROUNDS", raising=False)
    loop.put(loop.Alone())
    yield
    loop.put(loop.Alone())


class Desk:
    """A child without a process: the commands that a script will find, and what is answered to each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stopping = folder, threading.Event()
        self._told = io.BytesIO()
        self.host = task_host.Host(torch.device("cpu"), task_host.Events(self._told), self.stopping)
        self.host.inbox = queue.Queue()

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def init(self) -> dict[str, Any]:
        return {"do": "init", "seed": 1, "out": str(self.path("base")), "labels": None}

    def train(self, out: str = "out", rows: list[int] | None = None, base: str = "base") -> dict[str, Any]:
        indices = None
        if rows is not None:
            indices = str(self.folder / "rows.npy")
            np.save(indices, np.array(rows, dtype=np.int64))
        paths = {"base": str(self.path(base)), "indices": indices, "out": str(self.path(out))}
        return {"do": "train", **paths, "seed": 5, "round": 2, "shard": 1, "shards": 2}

    def evaluate(self) -> dict[str, Any]:
        return {"do": "evaluate", "base": str(self.path("base")), "batch_size": 8}

    def run(self, source: str, *commands: dict[str, Any], **terms: Any) -> list[dict[str, Any]]:
        """The answers to open and to these commands, and to close after them, as far as the script comes."""
        file = self.folder / "train.py"
        file.write_text(source)
        for command in [*commands, {"do": "close"}]:
            self.host.inbox.put(dict(command))
        about = {"config": {}, "arguments": (), "rounds": 3, "shared": False, **terms}
        opened = {"do": "open", "task": str(file), "config": {"data": {"scans": "/data/scans"}}}
        last = self.host.answer({**opened, "terms": {"script": about, "seed": 7}})
        told = [json.loads(line) for line in self._told.getvalue().splitlines()]
        return [event for event in told if event["event"] != "progress"] + [last]

    def fails(self, source: str, *commands: dict[str, Any], **terms: Any) -> dict[str, Any]:
        """The one error that these commands lead to."""
        (error,) = [answer for answer in self.run(source, *commands, **terms) if answer["event"] == "error"]
        return error


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------- in the child


def test_a_script_trains_and_measures_what_it_is_given_and_answers_each_command_once(desk: Desk) -> None:
    commands = desk.init(), {"do": "describe", "labels": None, "by": None}, desk.train(rows=[0, 2, 4]), desk.evaluate()
    opened, init, described, trained, measured, closed = desk.run(GOOD, *commands)
    assert (opened, closed) == ({"event": "done"}, {"event": "done"})
    assert init == {"event": "done", "parameters": 15, "test_samples": 1, "train_samples": 10}
    assert described == {"event": "done", "train_samples": 10}
    assert (trained["samples"], trained["steps"]) == (3, 2)
    assert trained["metrics"]["lost"] == [1, 4]
    assert trained["metrics"]["train_loss"][1] == 3
    assert measured["metrics"]["accuracy"][1] == 10
    assert measured["metrics"]["training"] == [0.0, 1.0]
    assert digest(desk.path("base")) != digest(desk.path("out"))


def test_a_round_given_again_leaves_the_same_bytes_whatever_was_trained_between(desk: Desk) -> None:
    desk.run(GOOD, desk.init(), desk.train("a"), desk.train("b", rows=[1]), desk.evaluate(), desk.train("c"))
    assert digest(desk.path("a")) == digest(desk.path("c")) != digest(desk.path("b"))


def test_the_model_of_a_script_begins_with_what_the_job_begins_with_or_the_misfit_is_told(desk: Desk) -> None:
    begun = {**desk.init(), "base": str(desk.path("out")), "out": str(desk.path("begun"))}
    desk.run(GOOD, desk.init(), desk.train(), begun)
    assert digest(desk.path("begun")) == digest(desk.path("out")) != digest(desk.path("base"))
    save_file({"weight": torch.zeros(2)}, desk.path("out"))
    error = Desk(desk.folder).fails(GOOD, begun)
    assert error["code"] == "bad_task"
    assert "the model that the job begins with does not fit" in error["sentence"]


def test_what_a_script_draws_before_its_loop_comes_from_the_jobs_seed(desk: Desk, tmp_path: Path) -> None:
    desk.run(GOOD, desk.init())
    again = Desk(tmp_path)
    torch.manual_seed(99)
    before = digest(desk.path("base"))
    again.run(GOOD, again.init())
    assert digest(again.path("base")) == before


def test_a_script_is_the_main_program_and_its_place_tells_it_what_the_job_says(desk: Desk) -> None:
    source = (
        GOOD
        + """
import dataclasses, __main__
assert (__name__, sys.argv[1:]) == ("__main__", ["--width", "3"]) and __main__.model is model
assert lydian.config() == {"a": 1} and round.config == {"a": 1} and lydian.device() == "cpu"
assert lydian.data("scans") == "/data/scans" and lydian.data("other", default="here") == "here"
assert (round.number, round.rounds, round.shard, round.shards, round.seed) == (2, 3, 1, 2, 5)
for name in ("server", "worker.agent", "client", "common"):
    assert name.partition(".")[0] not in vars()
"""
    )
    main = __import__("__main__")
    answers = desk.run(source, desk.init(), desk.train(), config={"a": 1}, arguments=("--width", "3"))
    assert [answer["event"] for answer in answers] == ["done"] * 4
    assert __import__("__main__") is main


def test_what_stands_below_the_loop_runs_when_the_job_is_over(desk: Desk) -> None:
    answers = desk.run(GOOD + f"open({str(desk.folder / 'after')!r}, 'w').close()\nsys.exit(0)\n", desk.init())
    assert answers[-1] == {"event": "done"}
    assert (desk.folder / "after").exists()


def test_a_round_that_nobody_wants_any_more_is_answered_as_stopped_and_the_loop_goes_on(desk: Desk) -> None:
    source = (
        HEAD
        + """
for round in lydian.rounds(model):
    step([0])
    if not round.stopping:
        round.report(samples=1)
"""
    )
    desk.stopping.set()
    assert [answer["event"] for answer in desk.run(source, desk.init(), desk.train())] == [
        "done",
        "done",
        "stopped",
        "done",
    ]


def test_a_script_that_leaves_its_loop_when_nobody_wants_the_round_ends_the_process_without_an_error(
    desk: Desk,
) -> None:
    desk.stopping.set()
    with pytest.raises(SystemExit) as ended:
        desk.run(HEAD + LOOP + "break", desk.init(), desk.train())
    assert ended.value.code == 0
    assert b'{"event": "stopped"}' in desk._told.getvalue()


def test_only_what_is_trained_travels_when_a_script_says_so(desk: Desk) -> None:
    source = GOOD.replace(
        "model = nn.Linear(4, 3)",
        "model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))\nmodel[0].requires_grad_(False)",
    ).replace("data=x", 'data=x, only="trainable"')
    assert desk.run(source, desk.init(), desk.train())[2]["event"] == "done"
    assert set(load_file(desk.path("out"))) == {"1.weight", "1.bias"}


def test_what_a_function_of_names_leaves_behind_is_trained_on_and_stays(desk: Desk) -> None:
    source = GOOD.replace("data=x", 'data=x, only=lambda name: name == "weight"')
    answers = desk.run(source, desk.init(), desk.train("a"), desk.train("b"))
    assert [answer["event"] for answer in answers] == ["done"] * 5
    assert set(load_file(desk.path("a"))) == {"weight"}
    assert digest(desk.path("a")) != digest(desk.path("b"))  # the bias went on


def test_classes_are_told_of_a_data_set_and_not_of_a_number(desk: Desk) -> None:
    labels = {"do": "describe", "labels": str(desk.folder / "labels.npy"), "by": None}
    source = GOOD.replace("data=x", "data=torch.utils.data.TensorDataset(x, y)")
    assert desk.run(source, desk.init(), labels)[2] == {"event": "done", "train_samples": 10}
    assert np.load(labels["labels"], allow_pickle=False).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    answer = Desk(desk.folder).run(GOOD.replace("data=x", "data=10"), desk.init(), labels)[2]
    assert "gives lydian.rounds(data=…) a number" in answer["sentence"]


@pytest.mark.parametrize(
    ("source", "code", "sentence"),
    [
        (HEAD, "bad_task", "train.py came to its end and never to `for round in lydian.rounds(model):`"),
        (HEAD + "lydian.rounds(model)", "bad_task", "never to `for round in"),
        (HEAD + "sys.exit(0)", "bad_task", "never to `for round in"),
        (HEAD + "sys.exit(2)", "task_failed", "train.py ended before lydian.rounds(model) with exit code 2"),
        (HEAD + "sys.exit('no card')", "task_failed", "and said: no card"),
        (HEAD + "open('not there')", "no_data", "FileNotFoundError in train.py, line 17, before lydian.rounds(model)"),
        (HEAD + "lydian.data('scans2')", "no_data", "no data named scans2 is offered here"),
        ("import not_there", "missing_package", "ModuleNotFoundError in train.py, line 1"),
        ("def f(:", "bad_task", "SyntaxError in train.py, line 1"),
        (HEAD + "lydian.rounds(3)", "task_failed", "needs a torch.nn.Module, and was given a int"),
        (HEAD + "lydian.rounds(torch.optim.SGD(model.parameters()))", "bad_task", "and was given a SGD"),
        (HEAD + "lydian.rounds(model, data=[])", "task_failed", "the number of samples"),
        (HEAD + "lydian.rounds(model, only='all')", "task_failed", "only='all'"),
        (HEAD + "lydian.rounds(model, only=lambda name: False)", "bad_task", "0 of 2 tensors, and none that is"),
        (HEAD + "two = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)); two[1].weight = two[0].weight\n"
         "lydian.rounds(two, only=lambda name: name == '0.weight')", "bad_task", "which is tied to '1.weight'"),
        (HEAD + "lydian.rounds(nn.LazyLinear(3))", "bad_task", "only dense tensors with a shape"),
        (HEAD + LOOP + "step([0])", "task_failed", "round 2 came to its end without round.report(samples=…)"),
        (HEAD + LOOP + "step([0]); round.report(samples=0)", "task_failed", "is 0, where a whole number of at least 1"),
        (HEAD + LOOP + "round.report(samples=1, loss=float('nan'))", "task_failed", "train_loss is nan in round 2"),
        (HEAD + LOOP + "round.report(1); round.report(1)", "task_failed", "round 2 was reported before"),
        (HEAD + LOOP + "round.share()", "task_failed", "say what there is, lydian.rounds(model, data=…)"),
        (HEAD + LOOP + "1 / 0", "task_failed", "ZeroDivisionError in train.py, line 19, in round 2: division by zero"),
        (HEAD + LOOP + "break", "task_failed", "left its loop over lydian.rounds(model) in round 2 of 3"),
        (HEAD + LOOP + "sys.exit(1)", "task_failed", "ended in round 2 with exit code 1"),
        (HEAD + LOOP + "lydian.rounds(model)", "task_failed", "called a second time"),
        (HEAD + LOOP + "model.weight = nn.Parameter(torch.ones(5, 4)); round.report(1)", "task_failed",
         "'weight' was float32 [3, 4] and is float32 [5, 4] now"),
        (HEAD + LOOP + "model = nn.Linear(4, 3); step([0]); round.report(1)", "task_failed", "changed nothing of the"),
        (HEAD + LOOP + "raise MemoryError('all gone')", "out_of_memory", "use a smaller batch or a smaller model"),
    ],
)  # fmt: skip
def test_a_script_that_goes_wrong_is_told_of_in_one_sentence(desk: Desk, source: str, code: str, sentence: str) -> None:
    found = desk.fails(source, desk.init(), desk.train())
    assert (found["event"], found["code"]) == ("error", code), found
    assert sentence in found["sentence"]


def test_the_traceback_of_a_script_begins_in_the_script(desk: Desk) -> None:
    detail = desk.fails(HEAD + LOOP + "step([77])", desk.init(), desk.train())["detail"].splitlines()
    assert "train.py" in detail[1]
    assert "IndexError" in detail[-1]


def test_a_report_of_more_samples_than_the_shard_has_is_an_error(desk: Desk) -> None:
    source = GOOD.replace("samples=len(round.share())", "samples=10")
    assert (
        "this shard has 3; train on round.share()"
        in desk.fails(source, desk.init(), desk.train(rows=[1, 2, 3]))["sentence"]
    )


def test_a_script_that_shares_must_say_what(desk: Desk) -> None:
    answer = desk.run(HEAD + LOOP + "pass", desk.init(), shared=True)[1]
    assert answer["code"] == "bad_task"
    assert "lydian.rounds(model, data=train_set)" in answer["sentence"]


def test_an_evaluation_that_fails_is_told_of_and_the_loop_goes_on(desk: Desk) -> None:
    source = GOOD.replace("return {", "return {'wrong': 'text'} if len(sys.argv) else {")
    answers = desk.run(source, desk.init(), desk.evaluate(), desk.train())
    assert "gives 'wrong' as a str" in answers[2]["sentence"]
    assert answers[3]["event"] == "done"


def test_a_damaged_base_and_an_unknown_command_are_told_of_and_the_loop_goes_on(desk: Desk) -> None:
    desk.path("torn").write_bytes(b"no model")
    answers = desk.run(GOOD, desk.init(), desk.train(base="torn"), {"do": "probe"}, desk.train())
    assert [answer.get("code") for answer in answers] == [None, None, "worker_error", "worker_error", None, None]


def test_a_text_that_is_not_the_one_that_was_allowed_is_not_run(desk: Desk) -> None:
    file = desk.folder / "train.py"
    file.write_text("open('ran', 'w')")
    terms = {"script": {"config": {}, "arguments": (), "rounds": 1, "shared": False}, "seed": 1}
    answer = desk.host.answer({"do": "open", "task": str(file), "config": {}, "terms": terms, "allowed": "0" * 64})
    assert answer["code"] == "not_trusted"


def test_steps_and_what_a_script_says_of_its_progress_are_seen(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_host, "PROGRESS_EVERY_S", 0.0)
    source = HEAD + LOOP + "loss = step([0]); round.progress(steps=9, samples=4, loss=loss); round.report(1)"
    desk.run(source, desk.init(), desk.train())
    told = [json.loads(line) for line in desk._told.getvalue().splitlines()]
    training = [event for event in told if event.get("doing") == "training"]
    assert [event["step"] for event in training] == [0, 1, 1]
    assert (training[-1]["steps"], training[-1]["samples"]) == (9, 4)
    assert training[-1]["loss"] > 0


# ---------------------------------------------------------------- alone


def test_alone_a_script_trains_as_many_rounds_as_it_is_told_and_says_how_it_went(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LYDIAN_ROUNDS", "2")
    model = nn.Linear(2, 2)
    dull = lambda model: {"dull": not model.training}  # noqa: E731 - as short as in a script
    for round in lydian.rounds(model, data=[1, 2, 3], evaluate=dull):  # noqa: A001 - the word of a script
        assert (round.share(), round.stopping, lydian.config()) == ([0, 1, 2], False, {})
        round.progress(step=1)
        round.report(samples=3, loss=torch.tensor(0.5))
    assert model.training
    said = capsys.readouterr().err.splitlines()
    assert said == [f"lydian: round {n} of 2, 3 samples, train_loss 0.5, dull 1" for n in (1, 2)]


@pytest.mark.parametrize("said", ["0", "-1", "many", ""])
def test_a_number_of_rounds_that_is_none_is_refused(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYDIAN_ROUNDS", said)
    with pytest.raises(ValueError, match="where a whole number of at least 1 is needed"):
        next(lydian.rounds(nn.Linear(1, 1)))


def test_alone_a_forgotten_report_and_a_second_loop_are_errors_too() -> None:
    rounds = lydian.rounds(nn.Linear(1, 1))
    next(rounds)
    with pytest.raises(RuntimeError, match=r"without round\.report"):
        next(rounds)
    with pytest.raises(RuntimeError, match="called a second time"):
        lydian.rounds(nn.Linear(1, 1))


@given(st.dictionaries(st.text(max_size=5), st.floats(-1e6, 1e6), max_size=4), st.integers(1, 1_000))
def test_a_mean_and_the_same_as_sum_and_count_are_one_report(means: dict[str, float], samples: int) -> None:
    bare, pairs = lydian.Round(1, 1), lydian.Round(1, 1)
    bare.report(samples, metrics=means)
    pairs.report(samples, metrics={name: (value * samples, samples) for name, value in means.items()})
    assert bare.said == pairs.said


@given(st.one_of(st.integers(max_value=0), st.floats(), st.booleans(), st.none(), st.text()))
def test_samples_that_are_no_count_are_never_reported(samples: Any) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1"):
        lydian.Round(1, 1).report(samples)


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        (3, "gives a int, where name -> number is needed"),
        ({"a": "text"}, "gives 'a' as a str"),
        ({"a": torch.ones(2)}, "gives 'a' as a Tensor"),
        ({"a": (1, -1)}, "with a count of -1"),
        ({"a": (1, float("nan"))}, "with a count of nan"),
        ({f"m{n}": n for n in range(101)}, "gives 101 metrics, and 99 are possible"),
        ({"a": (float("inf"), 1)}, "a is inf in round 1"),
    ],
)
def test_metrics_that_are_none_are_refused_where_they_are_reported(metrics: Any, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        lydian.Round(1, 1).report(1, metrics=metrics)


def test_progress_that_is_no_count_is_refused_where_it_is_told() -> None:
    lydian.Round(1, 1).progress(step=0, steps=3, samples=0, loss=None)
    for wrong in ({"step": -1}, {"steps": 1.5}, {"samples": "many"}):
        with pytest.raises(ValueError, match=r"round\.progress"):
            lydian.Round(1, 1).progress(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what the page says


def test_the_page_shows_what_three_lines_more_are() -> None:
    names = [f"examples/scripts/{name}.py" for name in ("digits_before", "digits")]
    before, after = ((ROOT / name).read_text(encoding="utf-8").splitlines() for name in names)
    shown = "\n".join(difflib.unified_diff(before, after, *names, lineterm="", n=1))
    assert shown in (ROOT / "docs" / "scripts.md").read_text(encoding="utf-8"), shown


# ---------------------------------------------------------------- submitting one


@pytest.mark.parametrize(
    ("source", "shares"),
    [
        ("import lydian\nfor r in lydian.rounds(m): ...", False),
        ("import lydian as l\nfor r in l.rounds(m, data=d): ...", True),
        ("from lydian import rounds as go\nfor r in go(m, data=d): ...", True),
        ("import lydian.lightning\nlydian.lightning.fit(t, m, l, data=d)", True),
        ("from lydian.transformers import train\ntrain(t)", False),
    ],
)
def test_a_file_that_goes_through_rounds_is_a_script(source: str, shares: bool) -> None:
    check_task(source.encode(), "train.py")
    found = script_of(source)
    assert found is not None
    assert found.shares == shares


@pytest.mark.parametrize("source", ["import lydian", "from lydian import rounds\nrounds", "import lydian\nx.rounds(m)"])
def test_a_file_that_imports_lydian_for_nothing_is_refused(source: str) -> None:
    with pytest.raises(BadTaskError, match=r"never calls lydian\.rounds"):
        check_task(source.encode(), "train.py")


def test_a_file_that_does_not_import_lydian_is_a_task_file(tmp_path: Path) -> None:
    source = "def model(config): ...\ndef dataset(config, split): ...\nlydian = None\n"
    check_task(source.encode(), "task.py")
    assert script_of(source) is None


def test_submit_tells_a_script_by_its_text_and_shares_where_that_names_the_data(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import lydian\nfor r in lydian.rounds(m): ...\n")
    own = read_job(
        None, flag_layer({("task",): str(tmp_path / "train.py"), ("arguments",): "--lr 0.1 --name 'a b'"}), {}
    )
    assert (own.spec.script, own.spec.data.partition) == (True, "local")
    assert own.spec.arguments == ("--lr", "0.1", "--name", "a b")
    said = set_layer(["data.partition=iid"])
    assert read_job(None, flag_layer({("task",): str(tmp_path / "train.py")}), said).spec.data.partition == "iid"
    shared = read_job(None, flag_layer({("task",): str(ROOT / "examples" / "scripts" / "digits.py")}), {})
    assert (shared.spec.script, shared.spec.data.partition) == (True, "iid")


@pytest.mark.parametrize(
    ("section", "keys", "sentence"),
    [
        ("train", {"lr": 0.5}, "train.lr = 0.5 does not reach the training of a script"),
        ("train", {"local_steps": 5}, "train.local_steps = 5"),
        ("train", {"batch_size": "auto"}, "train.batch_size = auto"),
        ("train", {"trainable_only": True}, r'call lydian\.rounds\(model, only="trainable"\)'),
        ("train", {"personal": ["head.*"]}, "with a function of the names that travel"),
        ("train", {"drift": "scaffold"}, "train.drift = scaffold"),
        ("privacy", {"level": "example", "clip": 1, "noise": 1, "delta": 1e-5}, "clips the gradient of each sample"),
        ("aggregation", {"algorithm": "fednova"}, "weighs updates by the steps"),
        ("evaluation", {"per_class": True}, "measured by our metrics"),
    ],
)
def test_a_setting_that_a_script_would_not_follow_is_refused(section: str, keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        JobSpec.model_validate({"task": "train", "script": True, section: keys})


def test_a_command_line_is_for_scripts_and_a_script_is_a_file_that_is_sent() -> None:
    with pytest.raises(ValidationError, match=r"are a script's, and this task is none"):
        JobSpec(task="digits", arguments=("--x",))
    with pytest.raises(ValidationError, match="script = true is for a file that is sent"):
        JobRequest(spec=JobSpec(task="digits", script=True), key="k")
    source = "import torch\nfrom lydian import rounds\n"
    with pytest.raises(ValidationError, match="so it is a training script: set script = true"):
        JobRequest(spec=JobSpec(task="train"), task_source=source, key="k")
    assert JobRequest(spec=JobSpec(task="train", script=True), task_source=source, key="k")
    assert JobSpec(task="digits", script=True).beyond_protocol_1 == "script"


def test_a_job_that_went_over_the_wire_is_the_same_job() -> None:
    spec = JobSpec(task="train", script=True, arguments=("--lr", "0.1"), data={"partition": "local"})  # type: ignore[arg-type]
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


def test_the_child_is_told_of_a_script_and_of_none_of_trains_keys() -> None:
    spec = JobSpec(task="train", script=True, arguments=("-v",), config={"a": 1}, rounds=4)
    assert plan.child_config(spec, {}, {"scans": "/x"}) == {"data": {"scans": "/x"}}
    terms = plan.client_terms(spec)
    assert terms["script"] == {"config": {"a": 1}, "arguments": ("-v",), "rounds": 4, "shared": True}
    assert terms["seed"] == plan.init_seed(spec)


def test_what_would_have_to_run_a_script_elsewhere_refuses_it(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "scripts" / "digits.py")
    with pytest.raises(LydianError, match="a training script has a process of its own"):
        job_of(Wish(script, 4, None, None, None, (), 1, 1, "cpu", 1, "auto", (), 40.0, None, None))
    job = read_job(None, flag_layer({("task",): script}), {})
    with pytest.raises(LydianError, match="has to be run to know its data"):
        run_partition(job, None, as_json=False)  # type: ignore[arg-type]
