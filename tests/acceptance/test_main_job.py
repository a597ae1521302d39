"""The main job with real processes: a coordinator, workers, a model, real images."""

import contextlib
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from bench.reference import fedavg
from common import tasks
from common.messages import OVER
from common.weights import file_digest, load, publish
from tests.acceptance.kit import PATIENCE_S, LocalFleet, closed_rounds, of_type, wait_for

pytestmark = pytest.mark.acceptance

WARY = ("--trust", "any", "--stall-timeout", "15")
SMALL: dict[str, Any] = {
    "data": {"shards": 4},
    "train": {"local_epochs": 1, "batch_size": 32, "lr": 0.1},
    "round": {"min_workers": 2},
}
UNMEASURED = {**SMALL, "round": {**SMALL["round"], "evaluate_every": 0}}


@pytest.fixture(scope="module")
def _wary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path_factory.mktemp("fleet"), LYDIAN_MAX_ATTEMPTS="2") as running:
        yield running


@pytest.fixture
def fleet(_wary: LocalFleet) -> Iterator[LocalFleet]:
    """A coordinator that gives up after two failures, and two workers that do not wait long for a task that hangs."""
    with _wary.mended(("w1", "w2"), *WARY) as fleet:
        yield fleet


@pytest.fixture
def alone(_wary: LocalFleet) -> Iterator[LocalFleet]:
    """The same with one worker."""
    with _wary.mended(("w1",), *WARY) as fleet:
        yield fleet


# ---------------------------------------------------------------- it trains


def test_digits_reach_nine_in_ten_in_five_rounds_and_every_round_says_what_it_cost(crew: LocalFleet) -> None:
    defaults = tasks.BUILTIN["digits"].defaults
    spec: dict[str, dict[str, object]] = {"round": {"min_workers": 2}}
    for dotted, value in defaults.items():
        section, _, key = dotted.partition(".")
        spec.setdefault(section, {})[key] = value
    job = crew.submit(rounds=5, **spec)
    facts = crew.facts(job)
    rounds = closed_rounds(facts)
    assert [r["round"] for r in rounds] == [1, 2, 3, 4, 5]
    for closed in rounds:
        assert closed["seconds"] > 0
        assert closed["samples"] == rounds[0]["samples"] > 1000
        assert closed["bytes_up"] >= 2 * closed["size"]
        assert closed["bytes_down"] >= closed["size"] - 1
        assert closed["workers"] >= 1
    evaluations = {e["round"]: e["metrics"]["accuracy"] for e in of_type(facts, "evaluation")}
    assert set(evaluations) == {1, 2, 3, 4, 5}
    assert evaluations[5] >= 0.90
    view = crew.api.job(job)
    assert view.best_value == max(evaluations.values())
    assert facts[-1]["type"] == "job"
    assert facts[-1]["state"] == "finished"


def test_every_rounds_model_equals_that_of_a_plain_fedavg_loop_bit_for_bit(crew: LocalFleet) -> None:
    """The reference: one process, no coordinator, no HTTP, numpy's own sums over whole arrays."""
    job = crew.submit(rounds=3, seed=11, **SMALL)
    facts = crew.facts(job)
    accuracies = {e["round"]: e["metrics"]["accuracy"] for e in of_type(facts, "evaluation")}
    for reference in fedavg(crew.finish(job).spec):
        pulled = load(crew.pull(job, str(reference.number)))
        assert pulled.keys() == reference.state.keys()
        for name, tensor in reference.state.items():
            assert pulled[name].tobytes() == tensor.tobytes(), (reference.number, name)
        assert accuracies[reference.number] == reference.accuracy


def test_the_same_job_again_gives_the_same_digest(crew: LocalFleet) -> None:
    digests = {crew.finish(crew.submit(rounds=2, seed=3, **SMALL)).model for _ in range(2)}
    assert len(digests) == 1
    other = crew.finish(crew.submit(rounds=2, seed=4, **SMALL)).model
    assert other not in digests


def test_a_pulled_model_loads_into_the_tasks_own_module(crew: LocalFleet, tmp_path: Path) -> None:
    source = tmp_path / "tied.py"
    source.write_text(TIED)
    job = crew.submit(source, rounds=1, **SMALL)
    crew.finish(job)
    publish(crew.pull(job), tmp_path / "model.safetensors")
    namespace: dict[str, object] = {}
    exec(compile(TIED, "tied.py", "exec"), namespace)
    model = namespace["model"]({})  # type: ignore[operator]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    after = model.state_dict()
    assert model.out.weight is model.embed.weight
    assert after["norm.num_batches_tracked"] > before["norm.num_batches_tracked"]
    assert not torch.equal(after["embed.weight"], before["embed.weight"])


TIED = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 8, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.shift = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))

    def forward(self, x):
        return self.out(self.norm(self.embed(x))) * self.scale + self.shift.float().sum()


def model(config):
    return Model()


def dataset(config, split):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64 if split == "train" else 16, 8, generator=g)
    return TensorDataset(x, x.argmax(1))
"""


# ---------------------------------------------------------------- partitions


def test_mcmahans_split_with_a_hundred_virtual_clients_draws_ten_a_round(crew: LocalFleet) -> None:
    spec = {"data": {"partition": "labels", "shards": 100, "fraction": 0.1}, "train": {"lr": 0.1, "batch_size": 10}}
    facts = crew.facts(crew.submit(rounds=3, **spec))
    opened = list(of_type(facts, "opened"))
    assert [len(o["shards"]) for o in opened] == [10, 10, 10]
    assert len({tuple(s["shard"] for s in o["shards"]) for o in opened}) == 3
    assert [r["shards"] for r in closed_rounds(facts)] == [10, 10, 10]
    assert facts[-1]["state"] == "finished"


def test_a_dirichlet_split_uses_every_sample_once_a_round(crew: LocalFleet) -> None:
    spec = {"data": {"partition": "dirichlet", "alpha": 0.1, "shards": 5}}
    facts = crew.facts(crew.submit(rounds=1, **spec))
    (opened,) = of_type(facts, "opened")
    sizes = [s["stop"] - s["start"] for s in opened["shards"]]
    assert sum(sizes) == closed_rounds(facts)[0]["samples"]
    assert max(sizes) > 2 * min(sizes)


def test_private_data_is_weighted_by_what_each_worker_has(tmp_path: Path) -> None:
    task = tmp_path / "scans.py"
    task.write_text(PRIVATE)
    with LocalFleet(tmp_path) as fleet:
        for name, count in (("left", 10), ("right", 30)):
            folder = tmp_path / f"data-{name}"
            folder.mkdir()
            (folder / "count").write_text(str(count))
            fleet.start_worker(name, "--trust", "any", "--data", f"scans={folder}")
        fleet.start_worker("none", "--trust", "any")
        fleet.await_workers(3)
        job = fleet.submit(
            task, rounds=2, data={"partition": "local"}, round={"min_workers": 2}, train={"local_steps": 1}
        )
        facts = fleet.facts(job)
        assert facts[-1]["state"] == "finished", facts[-1]["reason"]
        assert {(a["worker_name"], a["samples"]) for a in of_type(facts, "accepted")} == {("left", 10), ("right", 30)}
        (value,) = load(fleet.pull(job, "1"))["w"]
        assert value == np.float32((10 * 10 + 30 * 30) / 40)


PRIVATE = """
from pathlib import Path
from typing import Any
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))


def model(config):
    return Model()


def dataset(config, split):
    if split != "train":
        return TensorDataset(torch.zeros(0, 1), torch.zeros(0, dtype=torch.long))
    count = int((Path(config["data"]["scans"]) / "count").read_text())
    return TensorDataset(torch.full((count, 1), float(count)), torch.zeros(count, dtype=torch.long))


def train(model, loader, context):
    for x, _ in loader:
        with torch.no_grad():
            model.w.copy_(x[0])
        context.step(loss=0.0, samples=len(x))
        break
"""


# ---------------------------------------------------------------- it ends, and says why


def test_a_job_stops_when_its_target_is_reached(crew: LocalFleet) -> None:
    view = crew.finish(crew.submit(rounds=50, target=0.5, **SMALL))
    assert view.round < 50
    assert "reached the target 0.5" in view.reason


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("raise ValueError('the loss is purple')", "task_failed", "the loss is purple"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "task_exited", "SIGSEGV"),
    ],
)
def test_a_task_that_breaks_fails_its_job_with_the_traceback_and_leaves_the_fleet_usable(
    fleet: LocalFleet, tmp_path: Path, body: str, code: str, says: str
) -> None:
    task = tmp_path / "breaks.py"
    task.write_text(TIED + f"\n\ndef train(model, loader, context):\n    print('I was here')\n    {body}\n")
    job = fleet.submit(task, rounds=1, **{**SMALL, "data": {"shards": 2}})
    view = fleet.finish(job, "failed")
    assert re.search("given up after [2-4] failures", view.reason), "of both workers"
    entries = fleet.api.logs(job)
    assert {e.code for e in entries} == {code}
    later = fleet.api.logs(job, after=entries[0].id)  # another may have come meanwhile
    assert later[: len(entries) - 1] == entries[1:]
    assert any(says in e.sentence + e.detail for e in entries)
    assert any("I was here" in e.detail or "Traceback" in e.detail for e in entries)
    fleet.finish(fleet.submit(rounds=1, **SMALL))


def test_a_task_that_hangs_is_stopped_and_its_stack_is_shown(fleet: LocalFleet, tmp_path: Path) -> None:
    task = tmp_path / "hangs.py"
    task.write_text(
        TIED
        + "\n\ndef train(model, loader, context):\n    import threading\n    wait_for_godot = threading.Event().wait\n"
        + "    wait_for_godot()\n"
    )
    job = fleet.submit(task, rounds=1, data={"shards": 1})
    fleet.finish(job, "failed")
    entries = fleet.api.logs(job)
    assert {e.code for e in entries} == {"task_stalled"}
    assert "hangs.py" in entries[0].detail


def test_a_syntax_error_fails_the_job_once_both_workers_have_seen_it(fleet: LocalFleet, tmp_path: Path) -> None:
    task = tmp_path / "broken.py"
    task.write_text("def model(config:\n")
    view = fleet.finish(fleet.submit(task, rounds=1), "failed")
    assert "broken.py" in view.reason
    assert "line 1" in view.reason or ":1" in view.reason
    assert len(fleet.api.logs(view.id)) == 2
    assert view.reason.endswith("2 workers say that it cannot be used")


def test_data_that_no_worker_has_fails_the_job_with_what_would_do(crew: LocalFleet) -> None:
    spec = {"task": "mnist", "config": {"download": False}}
    view = crew.finish(crew.submit(rounds=1, **spec), "failed")
    assert "none of the 2 live workers can do this job" in view.reason
    assert "--data mnist=" in view.reason


def test_a_task_is_not_run_by_a_worker_whose_owner_did_not_allow_it(tmp_path: Path) -> None:
    task = tmp_path / "mine.py"
    task.write_text(TIED)
    with LocalFleet(tmp_path) as fleet:
        fleet.start_worker("strict")
        fleet.await_workers(1)
        job = fleet.submit(task, rounds=1)
        wait_for("the reason", lambda: "runs built-in tasks only (--trust none)" in fleet.api.job(job).reason)
        assert fleet.api.job(job).state == "queued"
        fleet.start_worker("careful", "--trust", "listed", "--allow", str(task))
        fleet.finish(job)
        workers = {fact["worker_name"] for fact in of_type(fleet.facts(job), "accepted")}
        assert workers == {"careful"}


# ---------------------------------------------------------------- people


def test_a_paused_job_stands_still_and_goes_on(crew: LocalFleet) -> None:
    job = crew.submit(rounds=1000, **UNMEASURED)
    crew.await_event(job, lambda e: e["type"] == "round", "a round closed")
    assert crew.api.pause(job).state == "paused"
    settled = wait_for("the work that was out to come in", lambda: _standing_still(crew, job))
    assert crew.api.job(job).round == settled - 1
    assert crew.api.resume(job).state in ("training", "aggregating")
    wait_for("rounds after it", lambda: crew.api.job(job).round > settled)
    crew.api.cancel(job)


def _standing_still(fleet: LocalFleet, job: str) -> int | None:
    """One more than the rounds closed, once no worker has work of the job and nothing is being averaged."""
    count = Counter[str]()
    for event in fleet.api.events(job):
        if event["type"] == "now":
            still = not event["workers"] and count["frozen"] == count["round"]
            return count["round"] + 1 if still else None
        count[event["type"]] += 1
    return None


def test_a_cancelled_job_ends_keeps_its_model_and_frees_the_workers(crew: LocalFleet) -> None:
    job = crew.submit(rounds=1000, **SMALL)
    crew.await_event(job, lambda e: e["type"] == "round", "a round closed")
    view = crew.api.cancel(job)
    assert view.state == "cancelled"
    assert f"after {view.round} of 1000 rounds" in view.reason
    assert file_digest(crew.pull(job)) == view.model.digest  # type: ignore[union-attr]
    crew.finish(crew.submit(rounds=1, **SMALL))


def test_a_second_job_waits_in_the_queue_and_then_runs(crew: LocalFleet) -> None:
    first = crew.submit(rounds=1000, **UNMEASURED)
    second = crew.submit(rounds=1, **SMALL)
    assert crew.api.job(second).state == "queued"
    assert "older jobs go first" in crew.api.job(second).reason
    crew.api.cancel(first)
    crew.finish(second)


def test_two_jobs_run_side_by_side_when_the_first_leaves_workers(crew: LocalFleet) -> None:
    one = {"data": {"shards": 1}, "round": {"min_workers": 1}, "train": {"local_epochs": 3}}
    first, second = crew.submit(rounds=1000, **one), crew.submit(rounds=2, **one)
    crew.finish(second)
    assert crew.api.job(first).state not in OVER
    crew.api.cancel(first)


# ---------------------------------------------------------------- processes


def test_a_worker_drains_on_sigterm_and_leaves_no_child(crew: LocalFleet) -> None:
    job = crew.submit(rounds=1000, **{**SMALL, "round": {"min_workers": 2}})
    crew.await_event(job, lambda e: e["type"] == "round", "a round closed")
    leaving = crew.workers["w1"]
    children = wait_for("its child", lambda: psutil.Process(leaving.popen.pid).children(recursive=True))
    assert leaving.terminate() == 0
    assert not psutil.wait_procs(children, timeout=PATIENCE_S)[1]
    assert {w.name: w.state for w in crew.api.workers()}["w1"] == "gone"
    before = crew.api.job(job).round
    wait_for("the other worker to go on alone", lambda: crew.api.job(job).round > before + 1)


def test_a_worker_whose_folder_breaks_gives_its_work_back_and_lives_on(alone: LocalFleet) -> None:
    job = alone.submit(rounds=1000, data={"shards": 1})
    alone.await_event(job, lambda e: e["type"] == "round", "a round closed")
    work, aside = alone.folder / "w1" / "work", alone.folder / "w1" / "aside"
    work.rename(aside)
    try:
        view = alone.finish(job, "failed")
        assert "work" in view.reason
    finally:
        aside.rename(work)
    assert alone.workers["w1"].popen.poll() is None
    alone.finish(alone.submit(rounds=1, data={"shards": 1}))


def test_a_killed_agent_leaves_no_orphan(crew: LocalFleet) -> None:
    process = crew.workers["w1"]
    children = wait_for("its child", lambda: psutil.Process(process.popen.pid).children(recursive=True))
    process.kill()
    assert not psutil.wait_procs(children, timeout=PATIENCE_S)[1]


def test_a_coordinator_stops_within_seconds_while_workers_wait_and_people_watch(crew: LocalFleet) -> None:
    job = crew.submit(rounds=1, round={"min_workers": 3})
    watching = crew.api._stream(job, 0)
    next(watching)
    assert crew.coordinator is not None
    began = time.monotonic()
    assert crew.coordinator.terminate() == 0
    assert time.monotonic() - began < 20  # not as long as the polls, which wait for 25
    watching.close()


def test_the_admin_token_is_private_and_nothing_prints_a_secret(crew: LocalFleet) -> None:
    crew.finish(crew.submit(rounds=1))
    assert (crew.state / "admin.token").stat().st_mode & 0o777 == 0o600
    secrets = [crew.admin_token, json.loads(_credential(crew.folder / "w1"))]
    written = [data for path, data in _files(crew.state) if path.suffix != ".token"]
    written += [path.read_bytes() for path in crew.folder.glob("*.log")]
    for secret in secrets:
        assert not any(secret.encode() in data for data in written)


def _files(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file in a folder that is in use, but those that go while it is looked through."""
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    yield path, path.read_bytes()


def _credential(folder: Path) -> str:
    """The worker's own token, as JSON text, wherever in its state folder it is."""
    for _, data in _files(folder):
        if len(data) < 10_000 and b"lyd_work_" in data:
            text = data.decode()
            start = text.index("lyd_work_")
            return json.dumps(text[start:].split('"')[0].strip())
    raise AssertionError("no credential was kept")


def test_sigint_twice_stops_a_worker_in_the_middle_of_its_work(crew: LocalFleet) -> None:
    job = crew.submit(rounds=1, data={"shards": 1}, train={"local_steps": 1_000_000})
    worker = crew.workers[wait_for("a worker to have all that it trains from", lambda: _training(crew, job))]
    before = len(worker.said())
    worker.popen.send_signal(signal.SIGINT)
    wait_for("the first signal to be taken", lambda: "once more stops at once" in worker.said()[before:])
    worker.popen.send_signal(signal.SIGINT)
    assert worker.popen.wait(PATIENCE_S) == 0
    backs = wait_for("the shard to come back", lambda: [e for e in crew.api.logs(job) if e.code == "released"])
    assert len(backs) == 1


def _training(fleet: LocalFleet, job: str) -> str | None:
    """The worker that is at work on a shard of the job, and knows it."""
    found = next(fleet.folder.glob(f"*/work/{job}.train.1.*/indices.npy"), None)
    return found.relative_to(fleet.folder).parts[0] if found else None
